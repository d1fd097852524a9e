"""
Time of an optimiser's step, ours against torch.optim: its default, foreach=True and fused=True.

    python benchmarks/optimisers.py [--rounds 15]

CPU time of interleaved rounds; each cell is ours/theirs: median (lowest to highest over the rounds). Below 1 we are faster.
It ends with an error where ours takes more than 1.2 times the time of torch's default in the median.
"""
import argparse
import gc
import sys
from collections.abc import Callable
from statistics import median

import torch
from torchvision.models import resnet18

from common import environment, interleaved, print_table, ratio
from course_lib import optim

RIVALS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
METHODS = {"SGD": ("SGD", {}), "SGD, momentum": ("SGD", {"momentum": .9}),
           "SGD, Nesterov, decay": ("SGD", {"momentum": .9, "nesterov": True, "weight_decay": .01}),
           "Adam": ("Adam", {}), "AdamW": ("AdamW", {})}


def with_gradients(shapes: list[torch.Size | tuple[int, ...]]) -> list[torch.Tensor]:
    params = [torch.randn(s).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def stepping(opt: object, times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            opt.step()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    models = {  # shapes, steps a round
        "100 tensors of 100": ([(100,)] * 100, 100), "100 tensors of 5,000": ([(5000,)] * 100, 30),
        "100 tensors of 100,000": ([(100_000,)] * 100, 2), "ResNet-18, 62 tensors, 11.7 M": ([p.shape for p in resnet18().parameters()], 2)}
    print(environment(), end="\n\n")
    gc.disable()  # a collection in the middle of a round would be counted against whoever's turn it is
    rows, slow = [], []
    for model, (shapes, times) in models.items():
        for method, (name, kw) in METHODS.items():
            runs = {"ours": stepping(getattr(optim, name)(with_gradients(shapes), lr=1e-3, **kw), times)}
            for rival, options in RIVALS.items():
                runs[rival] = stepping(getattr(torch.optim, name)(with_gradients(shapes), lr=1e-3, **kw, **options), times)
            seconds = interleaved(runs, args.rounds)
            ratios = {rival: ratio(seconds, "ours", rival) for rival in RIVALS}
            rows.append((model, method, f"{1e6 * median(seconds['ours']) / times:,.0f}",
                         *("{:.2f} ({:.2f} to {:.2f})".format(*r) for r in ratios.values())))
            if ratios["default"][0] > 1.2:
                slow.append(f"{method} on {model}: {ratios['default'][0]:.2f}")
    print_table(rows, ("parameters", "method", "ours, µs a step", *(f"ours / torch {r}" for r in RIVALS)))
    if slow:
        print("\nover 1.2 times torch's default: " + "; ".join(slow))
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
