"""A training on Imagenette (or on drawn scenes) that runs unchanged on one CPU, on one GPU and in many processes.

    python examples/train_imagenette.py                                              # one process, on the GPU if there is one
    torchrun --nproc-per-node 4 examples/train_imagenette.py                         # four GPUs of one computer
    COURSE_DEVICE=cpu torchrun --nproc-per-node 2 examples/train_imagenette.py       # two processes on a CPU
    accelerate launch --num_processes 4 examples/train_imagenette.py                 # as torchrun
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/train_imagenette.py
    python examples/train_imagenette.py --checkpoint fit --resume                    # goes on where it was stopped or killed

The batch is that of all processes together: each takes its share. On drawn scenes (COURSE_SOURCE=drawn), which are small and hold
digits: no crops and flips, smaller batches. Without --precision: bfloat16 on a GPU that has it, else float32.
"""
import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import add_photo_options, environment, photo_dls, photo_settings, print_table  # noqa: E402

import course_lib.schedule  # noqa: E402, F401  (gives the Learner its fit_one_cycle)
from course_lib.datasets import ImageData, imagenette  # noqa: E402
from course_lib.learner import Checkpoint, Learner, accuracy  # noqa: E402
from course_lib.resnet import NETS  # noqa: E402
from course_lib.scale import (DTYPES, EMA, Compile, Distributed, GradientAccumulation, GradientClip, MixedPrecision,  # noqa: E402
                              precision_trouble)
from course_lib.settings import set_seed  # noqa: E402


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(NETS), default="ResNet-18", metavar="NET", help=f"of {', '.join(NETS)}")
    add_photo_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--clip", type=float, help="highest norm of the gradients")
    parser.add_argument("--ema", type=float, help="decay of an average of the weights, such as .99")
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="torch.compile, such as reduce-overhead")
    parser.add_argument("--checkpoint", help="file to save to, at each epoch's end and every --every batches")
    parser.add_argument("--every", type=int, help="batches between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint, once there is one")
    parser.add_argument("--limit", type=int, help="take so many training pictures, and a quarter of it for validation")
    parser.add_argument("--threads", type=int, help="of PyTorch, in each process")
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint, the file to go on from")
    return args


def cut(data: ImageData, limit: int | None) -> ImageData:
    "The first pictures of a set"
    if limit is None:
        return data
    return dataclasses.replace(data, train_x=data.train_x[:limit], train_y=data.train_y[:limit],
                               valid_x=data.valid_x[:max(1, limit // 4)], valid_y=data.valid_y[:max(1, limit // 4)])


def callbacks(args: argparse.Namespace, device: torch.device) -> list:
    "What the options ask for"
    precision = args.precision
    if precision is None and device.type == "cuda" and not precision_trouble(device, torch.bfloat16):
        precision = "bfloat16"
    cbs = [MixedPrecision(precision)] if precision in DTYPES else []
    cbs += [GradientAccumulation(args.accumulate)] if args.accumulate > 1 else []
    cbs += [GradientClip(args.clip)] if args.clip else []
    cbs += [EMA(args.ema)] if args.ema else []
    cbs += [Compile(args.compile)] if args.compile else []
    return cbs + ([Checkpoint(args.checkpoint, args.every)] if args.checkpoint else [])


def main() -> None:
    args = options()
    distributed = Distributed()                                # first: it gives each process its GPU
    if args.threads:
        torch.set_num_threads(args.threads)
    set_seed(args.seed)
    data = cut(imagenette(), args.limit)
    s = photo_settings(args, data)
    dls = photo_dls(data, s["batch"], s["size"], args.seed)
    learn = Learner(dls, NETS[args.net](data.c), metrics=accuracy, cbs=distributed)
    learn.add_cbs(callbacks(args, learn.device))
    start = time.perf_counter()
    learn.fit_one_cycle(s["epochs"], s["rate"], resume=args.checkpoint if args.resume else None)
    seconds = time.perf_counter() - start
    last = learn.recorder.values[-1]
    print_table([(args.net, distributed.world, f"{last[-1]:.4f}", f"{last[1]:.4f}", f"{seconds:.0f}",
                  f"{len(data.train_x) * s['epochs'] / seconds:.0f}")],
                ("net", "processes", "accuracy", "validation loss", "seconds", "pictures a second"))
    print(f"\n{data.source} pictures, {s}, on {learn.device}; {environment()}")


if __name__ == "__main__":
    main()
