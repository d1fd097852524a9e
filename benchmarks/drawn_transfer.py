"""Do drawn digits teach the real thing? A small CNN is trained on nothing but drawn digits and then reads the real MNIST.

    COURSE_SOURCE=real python benchmarks/drawn_transfer.py                   # both settings, three seeds, the real test set
    COURSE_SOURCE=real python benchmarks/drawn_transfer.py --score train     # scored on the real training set: for choosing
    COURSE_SOURCE=real python benchmarks/drawn_transfer.py --parts           # what each part of the recipe is worth (on train)
    COURSE_SOURCE=real python benchmarks/drawn_transfer.py --variation .5 --epochs 10 --fresh     # one setting of your own

Every choice in the drawing and in this training was made on real *training* pictures or on none; the test set is read once,
after the last step. `--write` puts the rows into results/drawn_transfer.json, which the appendix on drawn digits shows.
"""
import argparse
import dataclasses
import sys
import time
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

from common import environment, mean_and_spread, print_table, write_results
from course_lib.conv import NormType, simple_cnn
from course_lib.datasets import mnist
from course_lib.drawn import STEADY, VARIED, Hand, digits, draw_digits

RESULTS = Path(__file__).resolve().parent.parent / "results" / "drawn_transfer.json"
BATCH, RATE = 512, .03


@dataclasses.dataclass
class Setting:
    name: str
    epochs: int
    hand: float | Hand = 0.
    fresh: bool = False          # new pictures every epoch, or the same 60,000
    real: bool = False           # train on MNIST itself: what the network can reach
    least: float = 0.            # what the mean on the real test set has to reach


SETTINGS = [Setting("drawn, default", 5, least=.965),
            Setting("drawn, variation 1, fresh every epoch", 20, 1., fresh=True, least=.982),
            Setting("MNIST itself, for comparison", 5, real=True)]
PARTS = [Setting("the default", 3),
         *[Setting(name, 3, dataclasses.replace(STEADY, **change)) for name, change in {
             "one way to write each digit": {"ways": 0.},
             "control points stay in place": {"jitter": 0.},
             "no smooth warp": {"warp": 0.},
             "no slant, no turn, one width": {"slant": 0., "turn": 0., "width": 0.},
             "pen of one width": {"pen": 0., "pressure": 0.},
             "no noise in the place": {"shift": 0.}}.items()],
         Setting("variation 1, same pictures every epoch", 3, VARIED)]


def to_float(x: torch.Tensor) -> torch.Tensor:
    "uint8 [N, 28, 28] -> normalised float [N, 1, 28, 28]"
    return ((x[:, None] / 255) - .1307) / .3081


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    return sum(int((model(to_float(xb)).argmax(1) == yb).sum()) for xb, yb in zip(x.split(1000), y.split(1000), strict=True)) / len(x)


def train(setting: Setting, seed: int, data, score: str, device: torch.device) -> tuple[float, float, float]:
    "Train from scratch; accuracy on drawn validation pictures and on the real ones asked for, and CPU seconds"
    start = time.process_time()
    torch.manual_seed(seed)
    train_x, train_y, valid_x, valid_y = digits(seed, setting.hand)
    if setting.real:
        train_x, train_y = data.train_x, data.train_y
    train_x, train_y = train_x.to(device), train_y.to(device)
    model = simple_cnn(norm_type=NormType.Batch).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = len(train_y) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=setting.epochs * steps)
    for epoch in range(setting.epochs):
        if setting.fresh and epoch:       # seeds that `digits` does not use: validation pictures never come up in training
            train_x = draw_digits(train_y, seed=1_000_000 + 1000 * seed + epoch, variation=setting.hand).to(device)
        model.train()
        for places in torch.randperm(len(train_y), device=device)[:steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(to_float(train_x[places])), train_y[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    x, y = (data.train_x, data.train_y) if score == "train" else (data.valid_x, data.valid_y)
    seconds = time.process_time() - start
    return accuracy(model, valid_x.to(device), valid_y.to(device)), accuracy(model, x.to(device), y.to(device)), seconds


def real_mnist():
    "The real MNIST; where only drawn digits are in use, the benchmark says so and is left out"
    data = mnist()
    if data.source != "real":
        print("Left out: this benchmark needs the real MNIST, but drawn digits are in use; set COURSE_SOURCE=real, and COURSE_DATA "
              "to the folder that holds it (or leave it out to download).")
        sys.exit(0)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="instead of each setting's own number")
    parser.add_argument("--variation", type=float, help="one setting of your own, 0 to 1")
    parser.add_argument("--fresh", action="store_true", help="with --variation: new pictures every epoch")
    parser.add_argument("--score", choices=["test", "train"], default="test", help="which real pictures are read at the end")
    parser.add_argument("--parts", action="store_true", help="leave out one part of the recipe at a time; scored on train")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help=f"put the rows into results/{RESULTS.name}")
    args = parser.parse_args()
    settings, score = (PARTS, "train") if args.parts else (SETTINGS, args.score)
    if args.variation is not None:
        settings = [Setting(f"drawn, variation {args.variation:g}{', fresh every epoch' if args.fresh else ''}",
                            args.epochs or 5, args.variation, args.fresh)]
    data, rows, missed = real_mnist(), [], []
    for setting in settings:
        if args.epochs:
            setting = dataclasses.replace(setting, epochs=args.epochs)
        drawn, real, seconds = zip(*[train(setting, seed, data, score, torch.device(args.device)) for seed in args.seeds], strict=True)
        rows.append({"name": setting.name, "epochs": setting.epochs, "drawn_valid": [round(a, 4) for a in drawn],
                     f"real_{score}": [round(a, 5) for a in real], "seconds": round(fmean(seconds), 1)})
        if score == "test" and not args.epochs and fmean(real) < setting.least:
            missed.append(f"{setting.name}: {fmean(real):.4f} is below {setting.least}")
        print(f"{setting.name}: {mean_and_spread(real)}", file=sys.stderr, flush=True)
    print_table([(r["name"], r["epochs"], mean_and_spread(r["drawn_valid"]), mean_and_spread(r[f"real_{score}"]), f"{r['seconds']:.0f}")
                 for r in rows],
                ("trained on", "epochs", "drawn validation", f"real MNIST, {score} set", "CPU seconds a run"))
    print(f"\n{len(args.seeds)} seeds; {environment()}")
    if args.write:
        write_results(RESULTS, "parts" if args.parts else "settings",
                      {"rows": rows, "seeds": args.seeds, "scored_on": score, "environment": environment()})
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
