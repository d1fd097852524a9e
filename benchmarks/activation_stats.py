"""
What watching costs: training the ten-digit CNN with and without ActivationStats.

    python benchmarks/activation_stats.py [--rounds 5] [--exact]

Within one training at rate .06, eight steps with the hooks and eight without take turns, so that whatever else the machine does
hits both alike. CPU time of this thread: watched/unwatched, from the medians of the steps, with the time for the counting added
that comes once in many steps. "again" is the same without any hooks: the noise of the measurement. Several trainings of each
kind, one after the other; their median, and the lowest and highest. It ends with an error where that median is more than 1.05,
with or without histograms, at either batch size.
"""
import argparse
import sys
import time
from statistics import median

import torch

from common import environment, print_table
from course_lib import activations
from course_lib.activations import ActivationStats
from course_lib.conv import simple_cnn
from course_lib.dataloader import get_dls
from course_lib.datasets import ImageData, mnist
from course_lib.learner import Callback, Hooks, Learner

LIMIT, TURN = 1.05, 8
counting: list[int] = []         # ns of each time that waiting samples were counted


def timed_count(self: activations._Layer, batch: int, count=activations._Layer.count) -> None:
    start = time.thread_time_ns()
    count(self, batch)
    counting.append(time.thread_time_ns() - start)


class Turns(Callback):
    "Puts the hooks on and off in turns"
    order = -100

    def __init__(self, hooked: bool):
        self.hooked = hooked

    def before_batch(self) -> None:
        learn, stats = self.learn, self.learn.activation_stats
        if learn.training:
            self.watched = learn.iter // TURN % 2 == 1
            if learn.iter % TURN == 0:
                stats.hooks.remove()
                stats.hooks = Hooks(stats.layers if self.watched and self.hooked else (), stats._note)
            learn.stopwatch.start = time.thread_time_ns()


class Stopwatch(Callback):
    "Nanoseconds of each step, by whether it was watched"
    order = 100

    def __init__(self) -> None:
        self.steps: dict[bool, list[int]] = {False: [], True: []}

    def after_batch(self) -> None:
        if self.learn.training and self.learn.iter >= 2 * TURN:
            self.steps[self.learn.turns.watched].append(time.thread_time_ns() - self.start)


def cost(data: ImageData, bs: int, epochs: int, hooked: bool = True, **options) -> tuple[float, float]:
    "Watched/unwatched, and milliseconds of an unwatched step"
    torch.manual_seed(0)
    cbs = [ActivationStats(**options), Turns(hooked), Stopwatch()]
    learn = Learner(get_dls(bs, data, seed=0, device="cpu"), simple_cnn(), cbs=cbs, progress=False)
    counting.clear()
    learn.fit(epochs, .06)
    steps = learn.stopwatch.steps
    rows = len(steps[True]) + len(steps[False])      # a step without hooks has a row too, an empty one, and it is counted
    rare = sum(counting) / rows if len(counting) < rows / 4 else 0     # else it is in the medians already
    return (median(steps[True]) + rare) / median(steps[False]), median(steps[False]) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each kind")
    parser.add_argument("--exact", action="store_true", help="also what it costs to count every number")
    args = parser.parse_args()
    torch.set_num_threads(1)       # the time of one thread: what waits for another is not counted
    activations._Layer.count = timed_count
    print(environment(), end="\n\n")
    variants = {"again": {"hooked": False}, "statistics": {}, "with histograms": {"with_hist": True}}
    if args.exact:
        variants["all numbers, with histograms"] = {"with_hist": True, "sample": None}
    data, rows, dear = mnist(), [], []
    for bs, epochs in ((64, 1), (512, 4)):
        rounds = [{name: cost(data, bs, epochs, **options) for name, options in variants.items()} for _ in range(args.rounds)]
        ratios = {name: sorted(r[name][0] for r in rounds) for name in variants}
        rows.append((bs, f"{median(r['again'][1] for r in rounds):.2f}",
                     *(f"{median(r):.3f} ({r[0]:.3f} to {r[-1]:.3f})" for r in ratios.values())))
        dear += [f"{name} at batch {bs}: {median(ratios[name]):.3f}" for name in ("statistics", "with histograms")
                 if median(ratios[name]) > LIMIT]
    print_table(rows, ("batch", "unwatched, CPU ms a step", *variants))
    if dear:
        print(f"\nover {LIMIT} times the unwatched time: " + "; ".join(dear))
    return 1 if dear else 0


if __name__ == "__main__":
    sys.exit(main())
