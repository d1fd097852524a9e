"""One epoch of training, the same work everywhere: course_lib's Learner, plain loops, Lightning and fastai.

    python benchmarks/training.py [--bs 64 512] [--rounds 5] [--only learner loader ...] [--no-peers]

The work: MNIST, ten classes, a batch-normalised CNN with the same initial weights for a seed, one epoch of 1cycle (torch's
OneCycleLR with its defaults) with Adam (torch's defaults), an incomplete last batch left out, then loss and accuracy over the
validation set. A round is a seed; everybody takes turns on one thread, and CPU time counts. Loading the data, building the
model and importing are not timed. Floats are normalised beforehand for all but course_lib, which keeps bytes, and fastai from
its folder, which decodes PNG files. Whatever costs time and can be switched off is off in Lightning and fastai (logger, check-
points, progress bars, summary); course_lib's metrics, record and progress bar are on. No worker processes anywhere.

Exits with 1 if a bar is missed: the Learner within 1.03 times the bare loop at 512, 1.05 at other sizes, ahead of every
peer that ran, and (from three rounds on) as accurate as the bare loop up to noise.
"""
import argparse
import contextlib
import gc
import importlib.util
import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from statistics import fmean, median, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from common import environment, print_table, ratio
from course_lib import optim
from course_lib.conv import NormType, simple_cnn
from course_lib.dataloader import Normalize, get_dls, pixel_stats
from course_lib.datasets import URLs, ImageData, mnist, untar_data
from course_lib.learner import Learner, accuracy

RATE = .03                                     # the highest learning rate of the schedule
FOLDER_ROUNDS = 2                              # of the slow one: it is far away from the others anyway
BARS = {512: 1.03}                             # batch size -> times the bare loop; 1.05 for others
Run = Callable[[], float]                      # trains; returns the accuracy


class Work:
    "The data in the forms that the contenders want, and what is the same for all"
    def __init__(self, data: ImageData, bs: int):
        self.data, self.bs, self.steps = data, bs, len(data.train_x) // bs
        self.stats = pixel_stats(data.train_x)
        normalize = Normalize(*self.stats)
        self.train = normalize(data.train_x.unsqueeze(1)), data.train_y
        self.valid = normalize(data.valid_x.unsqueeze(1)), data.valid_y

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        "PyTorch's, over the normalised floats"
        return (DataLoader(TensorDataset(*self.train), self.bs, shuffle=True, drop_last=True),
                DataLoader(TensorDataset(*self.valid), 2 * self.bs))

    def optimizer(self, params) -> tuple[torch.optim.Optimizer, OneCycleLR]:
        opt = torch.optim.Adam(params, lr=RATE)
        return opt, OneCycleLR(opt, max_lr=RATE, total_steps=self.steps)


def one_cycle(progress: float) -> dict[str, float]:
    "OneCycleLR's curve with its defaults: up for 30 %, then down, momentum the other way"
    def between(a: float, b: float, part: float) -> float:
        return b + (a - b) / 2 * (1 + math.cos(math.pi * part))
    up, part = progress < .3, progress / .3 if progress < .3 else (progress - .3) / .7
    return ({"lr": between(RATE / 25, RATE, part), "momentum": between(.95, .85, part)} if up else
            {"lr": between(RATE, RATE / 25 / 1e4, part), "momentum": between(.85, .95, part)})


class Terminal(io.TextIOWrapper):
    "Nowhere, which passes for a terminal: progress bars are drawn in full"
    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"))

    def isatty(self) -> bool:
        return True


def learner(work: Work, model: nn.Module, seed: int, **options) -> Run:
    dls = get_dls(work.bs, work.data, seed=seed, device="cpu")
    learn = Learner(dls, model, F.cross_entropy, opt_func=optim.Adam, metrics=accuracy, **options)

    def run() -> float:
        with contextlib.redirect_stdout(Terminal()):
            learn.fit(1, RATE, schedule=one_cycle)
        return learn.recorder.values[-1][-1]
    return run


def bare(work: Work, model: nn.Module, seed: int, memory_format: torch.memory_format = torch.contiguous_format) -> Run:
    model.to(memory_format=memory_format)
    x, y = work.train

    def run() -> float:
        opt, schedule = work.optimizer(model.parameters())
        model.train()
        for places in torch.randperm(len(x))[:work.steps * work.bs].split(work.bs):
            loss = F.cross_entropy(model(x[places]), y[places])
            loss.backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
        return validate(model, zip(*(t.split(2 * work.bs) for t in work.valid), strict=True))
    return run


def loader(work: Work, model: nn.Module, seed: int) -> Run:
    train, valid = work.loaders()

    def run() -> float:
        opt, schedule = work.optimizer(model.parameters())
        model.train()
        for xb, yb in train:
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
        return validate(model, valid)
    return run


@torch.no_grad()
def validate(model: nn.Module, batches) -> float:
    "Accuracy; the loss is computed as well, for everybody does"
    model.eval()
    right, loss, n = torch.zeros(()), torch.zeros(()), 0
    for xb, yb in batches:
        pred = model(xb)
        loss += F.cross_entropy(pred, yb) * len(yb)
        right += (pred.argmax(1) == yb).sum()
        n += len(yb)
    return (right / n).item()


def lightning(work: Work, model: nn.Module, seed: int) -> Run:
    import lightning as L
    for part in ("pytorch", "fabric"):         # no lines about devices and tips
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            pred = self.model(batch[0])
            self.log_dict({"loss": F.cross_entropy(pred, batch[1]), "accuracy": (pred.argmax(1) == batch[1]).float().mean()},
                          on_step=False, on_epoch=True, batch_size=len(pred))

        def configure_optimizers(self) -> dict:
            opt, schedule = work.optimizer(self.parameters())
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module, (train, valid) = Module(), work.loaders()
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)

    def run() -> float:
        trainer.fit(module, train, valid)
        return trainer.callback_metrics["accuracy"].item()
    return run


def fastai(dls, model: nn.Module) -> Run:
    "The learner of fastai on given loaders, with its own Adam (torch's in its wrapper took as long) and torch's constants"
    from fastai.callback.schedule import ParamScheduler, combined_cos
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import Adam
    schedule = ParamScheduler({"lr": combined_cos(.3, RATE / 25, RATE, RATE / 25 / 1e4), "mom": combined_cos(.3, .95, .85, .95)})
    learn = Learner(dls, model, loss_func=F.cross_entropy, metrics=accuracy, lr=RATE,
                    opt_func=partial(Adam, mom=.9, sqr_mom=.999, eps=1e-8, wd=0.))

    def run() -> float:
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, lr=RATE, cbs=schedule)
        return learn.recorder.values[-1][-1]
    return run


def fastai_memory(work: Work, model: nn.Module, seed: int) -> Run:
    from fastai.data.core import DataLoaders
    return fastai(DataLoaders(*work.loaders(), device=torch.device("cpu")), model)


def fastai_folder(work: Work, model: nn.Module, seed: int) -> Run:
    "As in the book's chapter 13, with grey pictures read from PNG files; normalised with the same numbers"
    import fastai.vision.all as fv
    block = fv.DataBlock((fv.ImageBlock(cls=fv.PILImageBW), fv.CategoryBlock), get_items=fv.get_image_files, get_y=fv.parent_label,
                         splitter=fv.GrandparentSplitter("training", "testing"),
                         batch_tfms=fv.Normalize.from_stats(*([s] for s in work.stats), cuda=False))
    dls = block.dataloaders(untar_data(URLs.MNIST), bs=work.bs, val_bs=2 * work.bs, num_workers=0, device=torch.device("cpu"))
    return fastai(dls, model)


CONTENDERS: dict[str, tuple[str, Callable[[Work, nn.Module, int], Run]]] = {
    "learner": ("**course_lib's Learner**", learner),
    "plain-learner": ("course_lib's Learner, `channels_last=False`", partial(learner, channels_last=False)),
    "bare": ("bare PyTorch loop over preloaded tensors", bare),
    "bare-channels-last": ("bare loop, model channels last", partial(bare, memory_format=torch.channels_last)),
    "loader": ("PyTorch's DataLoader in a plain loop", loader),
    "lightning": ("Lightning", lightning),
    "fastai": ("fastai, from memory", fastai_memory),
    "fastai-folder": ("fastai, from its picture folder", fastai_folder)}
PACKAGE = {"lightning": "lightning", "fastai": "fastai", "fastai-folder": "fastai"}
PEERS = ("loader", *PACKAGE)                   # whom the Learner has to beat


def race(work: Work, names: list[str], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    "CPU seconds and accuracy of each in each round, taking turns; the first round warms up and does not count"
    seconds: dict[str, list[float]] = {name: [] for name in names}
    reached: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds + 1):
        for name in names:
            if name == "fastai-folder" and not 0 < r <= FOLDER_ROUNDS:
                continue
            torch.manual_seed(r)               # the same weights for all
            run = CONTENDERS[name][1](work, simple_cnn(norm_type=NormType.Batch), r)
            gc.collect()                       # rubbish of the one before is not this one's cost
            start = time.process_time()
            value = run()
            if r:
                seconds[name].append(time.process_time() - start)
                reached[name].append(value)
    return seconds, reached


def missed(bs: int, seconds: dict[str, list[float]], reached: dict[str, list[float]]) -> list[str]:
    "A sentence for every bar that the Learner misses"
    if "learner" not in seconds:
        return []
    found, (times, *_), bar = [], ratio(seconds, "learner", "bare"), BARS.get(bs, 1.05)
    if times > bar:
        found.append(f"batch {bs}: the Learner takes {times:.3f} times the bare loop, over {bar}")
    for name in set(PEERS) & seconds.keys():
        if median(x / y for x, y in zip(seconds["learner"], seconds[name], strict=False)) >= 1:
            found.append(f"batch {bs}: the Learner is not ahead of {CONTENDERS[name][0]}")
    ours, theirs = reached["learner"], reached["bare"]
    noise = max(.002, 3 * math.sqrt(sum(spread(a)**2 / len(a) for a in (ours, theirs))))
    if len(ours) > 2 and fmean(ours) < fmean(theirs) - noise:  # two runs say nothing about noise
        found.append(f"batch {bs}: the Learner reaches {fmean(ours):.4f}, the bare loop {fmean(theirs):.4f}")
    return found


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.


def choose(only: list[str], peers: bool) -> list[str]:
    "The contenders that shall run and can, with a sentence for those that cannot"
    names = [n for n in CONTENDERS if (not only or n in only or n == "bare") and (peers or n not in PACKAGE)]
    absent = [n for n in names if n in PACKAGE and not importlib.util.find_spec(PACKAGE[n])]
    if absent:
        print(f"Left out: {', '.join(absent)} (not installed); pip install -e '.[bench]' -c constraints.txt gets them.")
    return [n for n in names if n not in absent]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bs", type=int, nargs="+", default=[64, 512], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=[], help="these, and the bare loop")
    parser.add_argument("--no-peers", action="store_true", help="without fastai and Lightning")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")          # the peers' deprecations and advice
    data, names, late = mnist(), choose(args.only, not args.no_peers), []
    if data.source != "real":
        print("Drawn digits are in use: times compare, the accuracies are not MNIST's.")
    for bs in args.bs:
        seconds, reached = race(Work(data, bs), names, args.rounds)
        rows = []
        for name in names:
            r, low, high = (f"{v:.2f}" for v in ratio({k: s[:len(seconds[name])] for k, s in seconds.items()}, name, "bare"))
            rows.append((CONTENDERS[name][0], r if name == "bare" else f"{r} ({low} to {high})", f"{median(seconds[name]):.2f}",
                         f"{fmean(reached[name]):.4f} ± {spread(reached[name]):.4f}", len(seconds[name])))
        print()
        print_table(rows, (f"batch {bs}", "CPU time against the bare loop (range)", "CPU s", "accuracy (mean ± spread)", "rounds"))
        late += missed(bs, seconds, reached)
    print(f"\n{environment()}" + "".join(f", {p} {version(p)}" for p in sorted({PACKAGE[n] for n in names if n in PACKAGE})))
    if late:
        print("\nMISSED: " + "; ".join(late))
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
