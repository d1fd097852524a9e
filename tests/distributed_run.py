"""Trainings in several processes, for test_distributed.py, which starts this file once for each process:

    python distributed_run.py compare|killed|resumed FOLDER

`compare` trains every kind of TRAININGS one after the other; the main process writes what came out into the folder."""
import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.utils.data
from torch import nn
from torch.utils.data import TensorDataset

import course_lib.schedule  # noqa: F401  (gives the Learner its lr_find)
from course_lib.dataloader import DataLoader, DataLoaders
from course_lib.learner import Callback, Checkpoint, Learner, accuracy, write_checkpoint
from course_lib.optim import SGD
from course_lib.scale import EMA, Distributed, GradientAccumulation, GradientClip
from course_lib.settings import set_seed
from killed_run import die, net, pictures, plain_net

N_TRAIN, N_VALID, EPOCHS = 100, 1001, 2


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))


TRAININGS: dict[str, tuple[Callable, dict, list]] = {            # the network, the loader, callbacks
    "group norm": (plain_net, {"size": 16}, []),
    "uneven": (plain_net, {"size": 15, "drop_last": False}, []),  # shares of 7 and 8; a last batch of 10
    "torch loader": (plain_net, {"size": 15, "torch": True}, []),
    "options": (plain_net, {"size": 16}, [partial(GradientAccumulation, 4), partial(GradientClip, .5), partial(EMA, .5)]),
    "batch norm": (batch_norm_net, {"size": 16}, []),
}


def loaders(size: int, drop_last: bool = True, torch: bool = False, n_valid: int = N_VALID) -> DataLoaders:
    train, valid = TensorDataset(*pictures(N_TRAIN)), TensorDataset(*pictures(n_valid, 1))
    if torch:
        return DataLoaders(globals()["torch"].utils.data.DataLoader(train, size, shuffle=True), DataLoader(valid, 50, device="cpu"))
    return DataLoaders(DataLoader(train, size, shuffle=True, seed=5, drop_last=drop_last, device="cpu"),
                       DataLoader(valid, 50, device="cpu"))      # the last batch has one item: nothing for one of two processes


def learner(model: Callable = plain_net, cbs: list = (), seed: int = 0, **kwargs) -> Learner:
    set_seed(seed)
    return Learner(loaders(**kwargs), model(), opt_func=partial(SGD, momentum=.9), lr=.05, metrics=accuracy, device="cpu",
                   cbs=[cb() for cb in cbs])


def result(learn: Learner, distributed: Distributed) -> dict:
    r = learn.recorder
    return {"model": dict(learn.model.state_dict()), "losses": torch.tensor(r.losses), "values": r.values, "n": r.validated,
            "batches": len(r.losses), "world": distributed.world}


def train(kind: str, distributed: Distributed) -> dict:
    model, kwargs, cbs = TRAININGS[kind]
    learn = learner(model, cbs, seed=distributed.rank if distributed.world > 1 and kind == "group norm" else 0, **kwargs)
    if kind == "group norm":                                     # other weights in each process: the main one's count
        set_seed(0)
        if distributed.main:
            learn.model.load_state_dict(model().state_dict())
    set_seed(3)
    learn.fit(EPOCHS, cbs=distributed)
    return result(learn, distributed)


class At(Callback):
    "Does something before the `n`-th training batch"
    order = 100

    def __init__(self, n: int, do: Callable):
        self.left, self.do = n, do

    def before_batch(self) -> None:
        if self.learn.training:
            self.left -= 1
            if self.left == 0:
                self.do()


class Stop(Exception):
    pass


def stop() -> None:
    raise Stop


def train_with_checkpoints(distributed: Distributed, folder: Path, at: At | None = None) -> dict:
    "Batch norm, dropout, half an accumulated step in some checkpoints: all that a resumed fit has to bring back"
    learn = learner(net, [partial(GradientAccumulation, 2), partial(EMA, .5)], size=16)
    cbs = [distributed, Checkpoint(folder / "fit", 3), *[at] * (at is not None)]
    learn.fit(EPOCHS, cbs=cbs, resume=folder / "fit")
    return result(learn, distributed)


def main(plan: str, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed = Distributed(timeout=60)
    print(f"process {distributed.rank} of {distributed.world}", flush=True)
    found = {}
    if plan == "compare":
        found = {kind: train(kind, distributed) for kind in TRAININGS}
        found["unbroken"] = train_with_checkpoints(distributed, folder / "unbroken")
        with contextlib.suppress(Stop):
            train_with_checkpoints(distributed, folder / "stopped", At(11, stop))
        found["stopped"] = train_with_checkpoints(distributed, folder / "stopped")
        for name, odd in {"few": {"size": 1}, "lengths": {"size": 16 + distributed.rank * 4}}.items():
            try:
                learner(**odd).fit(1, cbs=distributed)
            except (ValueError, RuntimeError) as e:
                found[name] = str(e)
        try:
            learner(cbs=[lambda: distributed], size=16).lr_find(show_plot=False)
        except RuntimeError as e:
            found["lr_find"] = str(e)
    elif plan == "killed":
        at = At(11, die) if distributed.rank == 1 else None
        found["killed"] = train_with_checkpoints(distributed, folder / "killed", at)
    elif plan == "resumed":
        found["resumed"] = train_with_checkpoints(distributed, folder / "killed")
    if distributed.main:
        write_checkpoint(folder / f"{plan}.safetensors", found)
        print(json.dumps({"written": plan}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
