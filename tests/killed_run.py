"""A small training with everything that a resumed fit has to bring back, and ways to kill it; run in processes of their own
by test_resume.py, and read by test_learner.py for its network and data"""
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.data
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import course_lib.learner as learner
from course_lib import optim
from course_lib.dataloader import DataLoader, DataLoaders
from course_lib.learner import Callback, Checkpoint, Learner, accuracy
from course_lib.settings import set_seed

N_EPOCH, N_BATCH = 3, 7                           # of a training; each epoch has 2 validation batches as well
KINDS = ("sgd", "adam", "adamw", "torch sgd", "torch adamw", "torch loader", "torch loader, own generator", "list", "stream",
         "item by item", "random transform")


def net(channels: int = 1, classes: int = 3) -> nn.Module:
    "Convolution, batch norm, dropout, linear: parameters, buffers (one of them of whole numbers) and random numbers"
    return nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.3),
                         nn.Flatten(), nn.Linear(36, classes))


def plain_net(norm: bool = True) -> nn.Module:
    "Group norm or none, no dropout: what a picture gives does not depend on the others of its batch"
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), *[nn.GroupNorm(2, 8)] * norm, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
                         nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


def pictures(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    "Noise [n, 1, 6, 6] that is lighter where its class is, and the classes [n] from 0 to 2"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    x = torch.randn(n, 1, 6, 6, generator=g)
    x[torch.arange(n), 0, 2 * y] += 1.5
    return x, y


class Stream:
    "Batches without a length, in another order each epoch, drawn from PyTorch's generator"
    def __init__(self, x: Tensor, y: Tensor, size: int):
        self.x, self.y, self.size = x, y, size

    def __iter__(self):
        for i in torch.randperm(len(self.x)).split(self.size):
            yield self.x[i], self.y[i]


def loaders(kind: str = "", n: int = 100, size: int = 16) -> DataLoaders:
    (x, y), (vx, vy) = pictures(n), pictures(40, 1)
    train, valid = TensorDataset(x, y), TensorDataset(vx, vy)
    dl, valid_dl = DataLoader(train, size, shuffle=True, seed=5), DataLoader(valid, 25)
    if kind.startswith("torch loader"):
        g = torch.Generator().manual_seed(9) if "own" in kind else None
        dl = torch.utils.data.DataLoader(train, size, shuffle=True, generator=g)
        valid_dl = torch.utils.data.DataLoader(valid, 25)  # draws a number an epoch, too
    elif kind == "list":
        dl = list(zip(x.split(size), y.split(size), strict=True))
    elif kind == "stream":
        dl = Stream(x, y, size)
    elif kind == "item by item":
        dl = DataLoader(list(zip(x, y.tolist(), strict=True)), size, shuffle=True)
    elif kind == "random transform":
        dl = DataLoader(train, size, shuffle=True, seed=5, transform=lambda x: x + .1 * torch.randn_like(x))
    return DataLoaders(dl, valid_dl, classes=["a", "b", "c"])


def opt_of(kind: str) -> Any:
    module, name = (torch.optim, kind[6:]) if kind in ("torch sgd", "torch adamw") else (optim, kind)
    if name == "adam":
        return module.Adam
    if name == "adamw":
        return partial(module.AdamW, betas=(.9, .99))
    return partial(module.SGD, momentum=.9, weight_decay=.01)


def schedule(progress: float) -> dict[str, float]:
    return {"lr": .02 + .1 * progress * (1 - progress), "momentum": .95 - .1 * progress, "weight_decay": .01 * progress}


def learner_of(kind: str = "sgd", seed: int = 3, **kwargs: Any) -> Learner:
    "A learner for a `kind` of training, the same again for the same seed"
    set_seed(seed)
    given = {"opt_func": opt_of(kind), "lr": .05, "metrics": accuracy, "device": "cpu", "progress": False}
    return Learner(loaders(kind), net(), **{**given, **kwargs})


class KillAt(Callback):
    "Kill this process when an event happens for the `n`-th time"
    order = 1000

    def __init__(self, event: str, n: int):
        self.left = n
        setattr(self, event, self.count)

    def count(self) -> None:
        self.left -= 1
        if self.left <= 0:
            die()


class Tell(Callback):
    "Say in a file how many training batches are done, for one who kills from outside"
    order = 1000

    def __init__(self, path: Path):
        self.path, self.n = path, 0

    def after_batch(self) -> None:
        if self.learn.training:
            self.n += 1
            self.path.write_text(str(self.n))


def die() -> None:
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows the latter ends a process at once, too
    time.sleep(60)


def kill_in_write(n: int, moment: str) -> None:
    "Kill this process while it writes its `n`-th checkpoint: with half the file written, before or after the renaming"
    import safetensors.torch
    save, replace, written = safetensors.torch.save_file, os.replace, [0]

    def half(tensors: dict, path: Any, **kwargs: Any) -> None:
        save(tensors, path, **kwargs)
        written[0] += 1
        if written[0] == n and moment == "half":
            with open(path, "rb+") as f:
                f.truncate(os.path.getsize(path) // 2)
            die()

    def rename(a: Any, b: Any) -> None:
        if written[0] == n and moment == "before":
            die()
        replace(a, b)
        if written[0] == n and moment == "after":
            die()

    safetensors.torch.save_file = half
    learner.os.replace = rename


def train(kind: str, folder: str | Path, every: int | None = None, kill: tuple | None = None) -> Learner:
    """The whole training, from a checkpoint in `folder` on if there is one; `kill` is ("event", name, n), ("write", n, moment)
    or ("outside",): then it waits a little in each batch, for its killer"""
    torch.set_num_threads(1)
    folder = Path(folder)
    learn, path = learner_of(kind), folder / "fit.safetensors"
    cbs: list[Callback] = [Checkpoint(path, every)]
    if kill and kill[0] == "event":
        cbs.append(KillAt(*kill[1:]))
    elif kill and kill[0] == "write":
        kill_in_write(*kill[1:])
    elif kill:
        cbs.append(Tell(folder / "batches"))
    learn.fit(N_EPOCH, schedule=None if kind == "stream" else schedule, cbs=cbs, resume=path)
    return learn
