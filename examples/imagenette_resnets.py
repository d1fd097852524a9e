"""The nets of chapter 10 on Imagenette: the book's four, and two controls, without skip connections and with other starts.

    COURSE_SOURCE=real python examples/imagenette_resnets.py --write                       # all six; hours on a CPU
    COURSE_SOURCE=real python examples/imagenette_resnets.py --runs plain --seeds 0 1 2 --write
    COURSE_SOURCE=drawn python examples/imagenette_resnets.py --write                      # the small ones on drawn scenes
    COURSE_SOURCE=real python examples/imagenette_resnets.py --runs "ResNet-50" --epochs 20 --write
    COURSE_SOURCE=real python examples/imagenette_resnets.py --opt Muon --write            # the same, but for the optimiser

The book's settings: pictures of 128 pixels, batches of 128, 5 epochs of 1cycle up to 3e-3, random crops and flips. On drawn
scenes, which have 64 pixels and hold digits: no flips and crops, batches of 64, 10 epochs. `--write` adds each run to
results/imagenette_resnets.json as soon as it is done (one with the same name, pictures, settings and seed is replaced), so that
a run that is broken off loses nothing but itself; chapter 10 shows the file. Nothing was chosen by these validation pictures but
what the book had chosen. Muon's peak rate of .02 is AdamW's 3e-3 in its own units: Muon's step in a matrix of 128 rows and 1,152
columns has a root mean square of .02 / sqrt(1152) = .0006, and so has AdamW's, which is about .2 of its rate (J. Liu et al.,
2502.16982). Seconds are those of the training with its five validations. They are worth what the machine was quiet: CPU seconds
and the load average at the start are kept beside them.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import add_photo_options, add_run, environment, measured_fit, photo_dls, photo_settings, print_table  # noqa: E402

import course_lib.schedule  # noqa: E402, F401  (gives the Learner its fit_one_cycle)
from course_lib.datasets import ImageData, imagenette  # noqa: E402
from course_lib.learner import Learner, accuracy, default_opt  # noqa: E402
from course_lib.resnet import NETS, Muon, costs  # noqa: E402
from course_lib.settings import default_device, set_seed  # noqa: E402

RESULTS = ROOT / "results" / "imagenette_resnets.json"
RUNS = {"real": ["plain", "ten in a row", "ResBlock", "ResBlock from 0", "two ResBlocks", "ResNet-18"],
        "drawn": ["plain", "ten in a row", "ResBlock", "ResBlock from 0"]}


OPTS = {"AdamW": (default_opt, 1), "Muon": (Muon, .02 / 3e-3)}       # and the rate as a multiple of AdamW's


def run(data: ImageData, name: str, opt: str, seed: int, epochs: int, batch: int, rate: float, size: int) -> dict:
    "Train a net once: losses and accuracy of each epoch, seconds, parameters, multiply-adds a picture"
    set_seed(seed)
    dls = photo_dls(data, batch, size, seed)
    model = NETS[name](data.c)
    opt_func, factor = OPTS[opt]
    rate = round(rate * factor, 6)
    learn = Learner(dls, model, opt_func=opt_func, metrics=accuracy, progress=False)
    return {"name": name, "opt": opt, "source": data.source, "seed": seed, "epochs": epochs, "batch": batch, "rate": rate, "size": size,
            "macs": sum(c.macs for c in costs(model, size)), **measured_fit(learn, lambda: learn.fit_one_cycle(epochs, rate))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(NETS), metavar="NET", help=f"of {', '.join(NETS)}")
    parser.add_argument("--opt", choices=list(OPTS), default="AdamW", help="the optimiser")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_photo_options(parser)
    parser.add_argument("--threads", type=int, help="of PyTorch; as many as it takes itself if not given")
    parser.add_argument("--write", action="store_true", help=f"add each run to results/{RESULTS.name}")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = imagenette()
    settings = photo_settings(args, data)
    rows = []
    for name in args.runs or RUNS[data.source]:
        for seed in args.seeds:
            rows.append(run(data, name, args.opt, seed, **settings))
            print(name, args.opt, seed, rows[-1]["accuracy"], f"{rows[-1]['wall_s']} s", file=sys.stderr, flush=True)
            if args.write:
                add_run(RESULTS, rows[-1], ("name", "opt", "source", "seed", "epochs", "batch", "rate", "size"))
    print_table([(r["name"], r["opt"], r["seed"], f"{r['accuracy'][-1]:.4f}", f"{r['params']:,}", f"{r['macs'] / 1e6:.1f} M",
                  f"{r['wall_s']:.0f}", f"{r['cpu_s']:.0f}", r["load"]) for r in rows],
                ("net", "optimiser", "seed", "accuracy", "parameters", "multiply-adds", "wall s", "CPU s", "load"))
    print(f"\n{data.source} pictures, {settings}, on {default_device()}; {environment()}")


if __name__ == "__main__":
    main()
