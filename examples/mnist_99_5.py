"""How well can the first nine chapters read MNIST in four epochs on a CPU? The recipe of chapter 09's last section.

    python examples/mnist_99_5.py                    # three seeds on the real MNIST, scored on the test set
    python examples/mnist_99_5.py --held-out         # trained on 50,000 pictures, scored on the other 10,000: for choosing
    python examples/mnist_99_5.py --parts            # the same, one part of the recipe left out at a time

Every setting was chosen with the last 10,000 *training* pictures; the test set is read after the last step. `--write` puts
the rows into results/mnist_99_5.json, which chapter 09 shows. The seconds are those from the pictures in memory to the last
answer: building, training, validation after each epoch and the five looks at each test picture. They are worth what the machine was
quiet: the load average at the start of each run is kept beside them.
"""
import argparse
import os
import sys
import time
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from common import environment, held_out, mean_and_spread, print_table, real_only, write_results  # noqa: E402

import course_lib.schedule  # noqa: E402, F401  (gives the Learner its fit_one_cycle)
from course_lib.batchnorm import digit_learner, five_looks  # noqa: E402
from course_lib.datasets import ImageData, mnist  # noqa: E402

RESULTS = Path(__file__).resolve().parent.parent / "results" / "mnist_99_5.json"
EPOCHS, RATE = 4, .01
GOAL = .9945                                           # in the mean over the seeds, on the test set

PARTS = {"all of it": {}, "pictures that stay": {"shift": 0}, "hard labels": {"smoothing": 0.}, "no average": {"average": 0},
         "half as wide": {"width": 16}}


def run(data: ImageData, seed: int, epochs: int, **settings) -> dict:
    "Train and score once; accuracies of five looks and of one, seconds"
    load, start, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    learn = digit_learner(data, seed, progress=False, **settings)
    learn.fit_one_cycle(epochs, RATE)
    preds, targets = five_looks(learn)
    right = (preds.argmax(1) == targets).float().mean().item()
    return {"seed": seed, "accuracy": round(right, 4), "one_look": round(learn.recorder.values[-1][-1], 4),
            "wall_s": round(time.perf_counter() - start, 1), "cpu_s": round(time.process_time() - cpu, 1), "load": round(load, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, help="of PyTorch; as many as it takes itself if not given")
    parser.add_argument("--held-out", action="store_true", help="train on 50,000 pictures, score on the 10,000 others")
    parser.add_argument("--parts", action="store_true", help="leave out one part of the recipe at a time, as --held-out")
    parser.add_argument("--write", action="store_true", help=f"put the rows into results/{RESULTS.name}")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = real_only(mnist())
    what = "parts" if args.parts else "held_out" if args.held_out else "test"
    data = data if what == "test" else held_out(data)
    results = {}
    for name, settings in (PARTS if args.parts else {"all of it": {}}).items():
        results[name] = []
        for seed in args.seeds:
            results[name].append(run(data, seed, args.epochs, **settings))
            print(name, results[name][-1], file=sys.stderr, flush=True)
    print_table([(name, mean_and_spread([r["accuracy"] for r in rows]), mean_and_spread([r["one_look"] for r in rows]),
                  f"{fmean(r['wall_s'] for r in rows):.0f}", f"{fmean(r['cpu_s'] for r in rows):.0f}") for name, rows in results.items()],
                (f"{len(args.seeds)} seed(s), {'test set' if what == 'test' else 'held-out training pictures'}", "accuracy, five looks",
                 "one look", "wall s", "CPU s"))
    print(f"\n{environment()}")
    if args.write:
        write_results(RESULTS, what, {"runs": results if args.parts else results["all of it"], "epochs": args.epochs, "rate": RATE,
                                      "source": data.source, "environment": environment()})
    if what == "test" and (mean := fmean(r["accuracy"] for r in results["all of it"])) < GOAL:
        sys.exit(f"The mean, {mean:.4f}, is below {GOAL}.")


if __name__ == "__main__":
    main()
