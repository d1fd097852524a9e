"""course_lib.learner against plain loops, its promises and its faults. Checkpoints are in test_resume.py.

The defects of other libraries' learners that ours must not have, and the test of each:

==================================================  ==============================================================
summary, predictions train a step or change a mode  test_looking_changes_nothing
a plot raises NameError outside its notebook        test_plots_work_in_a_plain_script
state on the parameters reaches a fresh optimiser   test_a_fresh_optimiser_starts_afresh
every fit resets the optimiser                      test_two_fits_are_one_long_fit
hooks stay after an error                           test_an_exception_at_any_event, test_nothing_is_left_after
autocast stays on after an error                    test_autocast_ends_with_the_fit
without its callbacks a learner trains nothing      test_a_learner_without_callbacks_trains
a misspelt callback method is ignored               test_a_misspelt_event
progress crashes outside a notebook                 test_progress_in_a_script, test_progress
a parameter without gradient crashes momentum       test_a_parameter_without_gradient
runs with one seed differ                           test_four_runs_with_one_seed, test_fresh_processes_agree
metrics copy whole batches to the CPU every step    test_nothing_is_copied_to_the_host_in_a_step
loading costs more than training                    benchmarks/; test_dataloader.py for the loader itself
==================================================  ==============================================================

Those of later chapters come with them: a convolution's bias before a norm, residual blocks and their norms (convolutions, batch
norm, residual networks), in-place operations and what activation statistics cost (activations), lr_find that leaves the model
trained (1cycle), dead layers under LSUV."""
import contextlib
import copy
import gc
import math
import os
import random
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
import torch.utils.data
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import course_lib.learner as learner_module
from course_lib import optim
from course_lib.dataloader import DataLoader, DataLoaders, Normalize, batch_accuracy, get_dls, mnist_loss
from course_lib.datasets import ImageData
from course_lib.learner import (EVENTS, Averages, Callback, CancelBatchException, CancelEpochException, CancelFitException,
                                CancelTrainException, CancelValidException, ClassificationInterpretation, Hook, Hooks,
                                Learner, Progress, Recorder, ShowGraph, TerminateOnNaN, accuracy, activation_of, error_rate, evaluating,
                                failing_layer, smooth, vision_learner)
from course_lib.settings import random_state, set_seed
from killed_run import N_BATCH, learner_of, loaders, net, opt_of, pictures, schedule
from test_resume import copy_of, one_thread, same  # noqa: F401 (a fixture)

TESTS = Path(__file__).parent
TorchLoader = torch.utils.data.DataLoader


def dls_of(train, valid=None, classes=("a", "b", "c"), size=16) -> DataLoaders:
    "Loaders of lists of batches, of loaders, or of a pair of tensors"
    def loader(data): return DataLoader(TensorDataset(*data), size) if isinstance(data, tuple) else data
    return DataLoaders(loader(train), loader(train if valid is None else valid), classes=list(classes))


def tiny(**kwargs) -> Learner:
    "A linear layer on noise, 3 batches of 4 in training and 2 in validation"
    set_seed(0)
    x, y = torch.randn(12, 2), torch.randint(3, (12,))
    given = {"opt_func": optim.SGD, "lr": .1, "device": "cpu", "progress": False}
    return Learner(kwargs.pop("dls", None) or dls_of((x, y), (x[:8], y[:8]), size=4), kwargs.pop("model", None) or nn.Linear(2, 3),
                   **{**given, **kwargs})


def state_of(learn: Learner) -> dict:
    "All that may not change unseen: parameters, buffers, modes, optimiser, random states"
    return copy_of({"model": dict(learn.model.state_dict()), "modes": [m.training for m in learn.model.modules()],
                    "opt": None if learn.opt is None else learn.opt.state_dict(), "random": learn._random_states(),
                    "grads": [p.grad for p in learn.model.parameters()], "hooks": hooks_of(learn.model)})


def hooks_of(model: nn.Module) -> int:
    return sum(len(getattr(m, name)) for m in model.modules() for name in vars(m) if name.endswith("_hooks"))


def assert_fine(learn: Learner, cbs: list[Callback], hooks: int = 0) -> None:
    "No trace of a fit that broke off, and the next one works"
    assert hooks_of(learn.model) == hooks and learn.cbs == cbs
    assert not any(m.training for m in learn.model.modules()), "left in training mode"
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert not list(getattr(tqdm, "_instances", ())), "a bar is left"
    assert all(p.grad is None for p in learn.model.parameters())
    assert learn.xb is learn.yb is learn.pred is learn.loss is None
    fresh = learn.opt_func(list(learn.model.parameters()), lr=learn.lr)
    settings, expected = ([{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] for opt in (learn.opt, fresh))
    assert settings == expected, "the fit's settings are left"
    assert all(p.isfinite().all() for p in learn.model.parameters())
    before = copy_of(dict(learn.model.state_dict()))
    learn.fit(1, .01)
    assert len(learn.recorder.values) == 1 and all(map(math.isfinite, learn.recorder.values[0]))
    assert any(not torch.equal(before[k], v) for k, v in learn.model.state_dict().items()), "it did not train"


# ---- the same as a plain loop

def plain_loop(model, dls, opt, loss_func, epochs, schedule=None) -> dict:
    "Training and validation as anybody would write them"
    losses, valid, step, n = [], [], 0, epochs * N_BATCH
    for _ in range(epochs):
        model.train()
        for xb, yb in dls.train:
            if schedule:
                for group in opt.param_groups:
                    s = schedule(step / (n - 1))
                    group["lr"], group["weight_decay"] = s["lr"], s["weight_decay"]
                    if "betas" in group:
                        group["betas"] = (s["momentum"], group["betas"][1])
                    else:
                        group["momentum"] = s["momentum"]
            loss = loss_func(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
            step += 1
        model.eval()
        with torch.no_grad():
            sums = np.zeros(2)
            for xb, yb in dls.valid:
                pred = model(xb)
                sums += [loss_func(pred, yb).item() * len(yb), (pred.argmax(1) == yb).sum().item()]
            valid.append(sums / 40)
    return {"model": dict(model.state_dict()), "opt": opt.state_dict()["state"], "losses": losses, "valid": valid}


@pytest.mark.parametrize("scheduled", [False, True], ids=["one rate", "schedule"])
@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw", "torch sgd", "torch adamw"])
@pytest.mark.parametrize("data", ["ours", "torch loader", "list", "stream"])
def test_equals_a_plain_loop_bit_by_bit(data, opt, scheduled):
    if scheduled and data == "stream":
        pytest.skip("a stream has no length, so it cannot have a schedule")
    learn = learner_of(data, opt_func=opt_of(opt), channels_last=False)
    learn.fit(3, schedule=schedule if scheduled else None)
    set_seed(3)
    dls, model = loaders(data), net()
    plain = plain_loop(model, dls, opt_of(opt)(model.parameters(), lr=.05), F.cross_entropy, 3, schedule if scheduled else None)
    r = learn.recorder
    same({"model": dict(learn.model.state_dict()), "opt": learn.opt.state_dict()["state"], "losses": list(r.losses)},
         {k: v for k, v in plain.items() if k != "valid"})
    np.testing.assert_allclose([v[1:] for v in r.values], plain["valid"], rtol=1e-6)
    assert len(r.losses) == 3 * N_BATCH and r.losses[0] != r.losses[N_BATCH]


def test_channels_last_equals_a_plain_loop_with_channels_last():
    learn = learner_of("ours", opt_func=opt_of("adamw"))
    learn.fit(2)
    assert learn.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    set_seed(3)
    dls, model = loaders("ours"), net().to(memory_format=torch.channels_last)
    plain = plain_loop(model, dls, opt_of("adamw")(model.parameters(), lr=.05), F.cross_entropy, 2)
    same(dict(learn.model.state_dict()), plain["model"])
    assert list(learn.recorder.losses) == plain["losses"]


def test_channels_last_where_it_does_not_work():
    "A network that looks at memory is left as it was, in a fit that works"
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(144, 3)

        def forward(self, x): return self.last(self.conv(x).view(len(x), -1))
    set_seed(0)
    learn = Learner(loaders(), Flat(), device="cpu", progress=False)
    learn.fit(1)
    assert learn.model.conv.weight.is_contiguous() and hooks_of(learn.model) == 0
    set_seed(0)
    other = Learner(loaders(), Flat(), device="cpu", progress=False, channels_last=False)
    other.fit(1)
    same(dict(learn.model.state_dict()), dict(other.model.state_dict()))


def test_the_defaults():
    learn = tiny(opt_func=learner_module.default_opt, lr=1e-3)
    learn.fit(1)
    group = learn.opt.param_groups[0]
    assert type(learn.opt) is optim.AdamW
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (.9, .99), 1e-5, .01)
    assert learn.loss_func is F.cross_entropy and Learner.__init__.__kwdefaults__ is None


# ---- nothing but the end of an epoch waits for the device

class Watched(torch.Tensor):
    "A tensor that counts each time its numbers are asked for, and so do all that are computed from it"
    asked = 0
    names = {"item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero", "__array__", "is_nonzero"}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked += getattr(func, "__name__", "") in cls.names
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(("opt", "bar"), [("sgd", True), ("adamw", False)], ids=["SGD, with a bar", "AdamW"])
def test_nothing_is_copied_to_the_host_in_a_step(opt, bar, monkeypatch):
    "PyTorch's profiler sees no reading of a number beyond a few an epoch, whether it has 10 batches or 100"
    if bar:
        monkeypatch.setenv("COURSE_SCALE", "full")
        monkeypatch.setattr(learner_module, "in_notebook", lambda: True)
    counts = []
    for n in (10, 100):
        set_seed(0)
        x, y = pictures(4 * n)
        dls = DataLoaders(DataLoader(TensorDataset(x, y), 4, shuffle=True), DataLoader(TensorDataset(x, y), 4), classes=list("abc"))
        learn = Learner(dls, net(), opt_func=opt_of(opt), metrics=[accuracy, error_rate], device="cpu", progress=bar)
        learn.fit(1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
            learn.fit(1, schedule=schedule)
        events = {e.key: e.count for e in prof.key_averages()}
        assert events["aten::convolution_backward"] == n           # the profiler did look
        counts.append(sum(events.get(k, 0) for k in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero")))
    assert counts[0] == counts[1] <= 10, counts


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_no_number_of_a_batch_is_asked_for(opt):
    counts = []
    for n in (10, 100):
        batches = [(x.as_subclass(Watched), y.as_subclass(Watched)) for x, y in (pictures(4, i) for i in range(n))]
        learn = Learner(dls_of(batches), net(), opt_func=opt_of(opt), metrics=accuracy, device="cpu", progress=False)
        Watched.asked = 0
        learn.fit(1)
        counts.append(Watched.asked)
    assert 0 < counts[0] == counts[1] <= 20, counts
    learn.model(batches[0][0]).sum().item()
    assert Watched.asked == counts[1] + 1                          # it does count


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    "The driver itself is told to refuse: no step may synchronise"
    class Strict(Callback):
        order = 1000

        def before_batch(self) -> None:
            if self.learn.iter == 2:
                torch.cuda.set_sync_debug_mode("error")

        def after_train(self) -> None: torch.cuda.set_sync_debug_mode("default")

        after_validate = cleanup = after_train
    dls = loaders()
    dls = DataLoaders(*(DataLoader(dl.dataset, 16, shuffle=s, device="cuda") for dl, s in ((dls.train, True), (dls.valid, False))),
                      classes=list("abc"))
    Learner(dls, net(), metrics=accuracy, progress=False).fit(2, schedule=schedule, cbs=Strict)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("mps", marks=pytest.mark.gpu("mps"))])
@pytest.mark.parametrize("data", ["ours", "list"])
def test_trains_on_a_gpu(device, data):
    learn = learner_of(data, device=device)
    learn.fit(2)
    assert all(p.device.type == device for p in learn.model.parameters()) and learn.recorder.values[-1][2] > .4
    cpu = learner_of(data, device="cpu", channels_last=False)
    cpu.model[3] = nn.Identity()                                   # dropout draws other numbers there
    gpu = learner_of(data, device=device)
    gpu.model[3] = nn.Identity()
    cpu.fit(2), gpu.fit(2)
    np.testing.assert_allclose(gpu.recorder.losses, cpu.recorder.losses, rtol=1e-3)
    preds, targets = gpu.get_preds()
    assert preds.device.type == targets.device.type == "cpu"
    assert gpu.summary().params == cpu.summary().params
    assert gpu.predict(pictures(1)[0][0])[0] in "abc"


# ---- memory

class Census(Callback):
    "Live tensors and the process's memory at some steps"
    order = 2000

    def before_fit(self) -> None: self.steps, self.seen = 0, {}

    def after_batch(self) -> None:
        if self.learn.training:
            self.steps += 1
            if self.steps in (1000, 9000, 10000):
                gc.collect()
                tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
                self.seen[self.steps] = tensors, psutil.Process().memory_info().rss


def test_memory_does_not_grow():
    """Two epochs of 5,000 batches: from step 1,000 to step 10,000 there are no more tensors, and the process grows by less than 2 MiB;
    a tensor kept at each step would be 9,000 tensors and more than 5 MiB, a graph kept much more"""
    x, y = torch.randn(4, 8), torch.randint(3, (4,))

    class Same:
        def __len__(self): return 5000

        def __iter__(self): return ((x, y) for _ in range(5000))
    learn = Learner(DataLoaders(Same(), [(x, y)] * 3, classes=list("abc")), nn.Linear(8, 3), opt_func=optim.SGD, metrics=accuracy,
                    device="cpu", progress=False)
    census = Census()
    learn.fit(1, .01)                                    # what is allocated once, at an epoch's end, too
    learn.fit(2, .01, cbs=census)
    (n1, m1), (n2, m2), (n3, m3) = census.seen[1000], census.seen[9000], census.seen[10_000]
    assert n1 == n2 == n3, f"{n1}, {n2}, {n3} tensors"
    assert max(m2, m3) - m1 < 2 << 20, f"grew by {(max(m2, m3) - m1) / 2**20:.1f} MiB"


def test_nothing_of_a_batch_or_a_callback_stays_after_a_fit():
    big = []

    class Heavy(Callback):
        def after_pred(self) -> None:
            big.append(weakref.ref(self.learn.pred))
            self.keep = torch.zeros(5)
    learn, cb = tiny(), Heavy()
    learn.fit(1, cbs=cb)
    ref = weakref.ref(cb)
    del cb
    gc.collect()
    assert ref() is None, "a callback for one fit is kept"
    assert all(r() is None for r in big), "predictions are kept"


# ---- events

class Log(Callback):
    "Writes down what happens"
    order = 1000

    def __init__(self):
        self.events = []
        for event in EVENTS:
            setattr(self, event, partial(self.write, event))

    def write(self, event: str) -> None:
        self.events.append(event)

    def cleanup(self) -> None:
        self.events.append("cleanup")


FORWARD = ["before_batch", "after_pred", "after_loss"]
BATCH = [*FORWARD, "before_backward", "after_backward", "before_step", "after_step", "after_batch"]
VALID = ["before_validate", *FORWARD, "after_batch", "after_validate"]


def test_the_order_of_events():
    assert EVENTS == ("before_fit", "before_epoch", "before_train", "before_batch", "after_pred", "after_loss", "before_backward",
                      "after_backward", "before_step", "after_step", "after_cancel_batch", "after_batch", "after_cancel_train",
                      "after_train", "before_validate", "after_cancel_validate", "after_validate", "after_cancel_epoch",
                      "after_epoch", "after_cancel_fit", "after_fit")
    x, y = torch.randn(8, 2), torch.randint(3, (8,))
    learn, log = tiny(dls=dls_of((x, y), (x[:4], y[:4]), size=4)), Log()
    learn.fit(1, cbs=log)
    assert log.events == ["before_fit", "before_epoch", "before_train", *BATCH, *BATCH, "after_train", *VALID, "after_epoch",
                          "after_fit", "cleanup"]


@pytest.mark.parametrize(("error", "at", "rest"), [
    (CancelBatchException, "before_batch", ["after_cancel_batch", "after_batch", "after_train", *VALID, "after_epoch", "after_fit"]),
    (CancelBatchException, "after_loss", ["after_cancel_batch", "after_batch", "after_train", *VALID, "after_epoch", "after_fit"]),
    (CancelBatchException, "after_backward", ["after_cancel_batch", "after_batch", "after_train", *VALID, "after_epoch", "after_fit"]),
    (CancelTrainException, "after_pred", ["after_cancel_train", "after_train", *VALID, "after_epoch", "after_fit"]),
    (CancelTrainException, "before_train", ["after_cancel_train", "after_train", *VALID, "after_epoch", "after_fit"]),
    (CancelValidException, "before_validate", ["after_cancel_validate", "after_validate", "after_epoch", "after_fit"]),
    (CancelEpochException, "after_step", ["after_cancel_epoch", "after_epoch", "after_fit"]),
    (CancelEpochException, "before_epoch", ["after_cancel_epoch", "after_epoch", "after_fit"]),
    (CancelFitException, "after_loss", ["after_cancel_fit", "after_fit"]),
    (CancelFitException, "before_fit", ["after_cancel_fit", "after_fit"]),
    (CancelFitException, "after_epoch", ["after_cancel_fit", "after_fit"]),
], ids=lambda v: v.__name__ if isinstance(v, type) else v if isinstance(v, str) else "")
def test_cancelling(error, at, rest):
    "Raised in the only epoch's last batch; what comes after a part that was left early still happens"
    x, y = torch.randn(4, 2), torch.randint(3, (4,))
    learn, log = tiny(dls=dls_of([(x, y)])), Log()

    class Cancel(Callback):
        order = 2000
        done = False

    def stop(self):
        if not self.done:
            self.done = True
            raise error
    setattr(Cancel, at, stop)
    learn.fit(1, cbs=[log, Cancel])
    assert log.events[log.events.index(at) + 1:] == [*rest, "cleanup"]
    assert_fine(learn, learn.cbs)


class Skip(Callback):
    "Cancels the second batch of a training"
    def __init__(self, event): setattr(self, event, self.skip)

    def skip(self):
        if self.learn.training and self.learn.iter == 1:
            raise CancelBatchException


def test_a_cancelled_batch_makes_no_step():
    batches = [(torch.randn(4, 2), torch.randint(3, (4,))) for _ in range(3)]
    without = tiny(dls=dls_of([batches[0], batches[2]]))
    without.fit(1)
    for event in ("before_batch", "after_pred", "after_loss", "before_backward"):
        skipped = tiny(dls=dls_of(batches))
        skipped.fit(1, cbs=Skip(event))
        same(dict(skipped.model.state_dict()), dict(without.model.state_dict()), event)


def test_a_batch_cancelled_after_its_gradients_adds_them_to_the_next():
    "Which is how gradients are accumulated"
    batches = [(torch.randn(4, 2), torch.randint(3, (4,))) for _ in range(3)]
    learn, by_hand = tiny(dls=dls_of(batches)), tiny().model
    learn.fit(1, cbs=Skip("before_step"))
    opt = optim.SGD(by_hand.parameters(), lr=.1)
    for i, (x, y) in enumerate(batches):
        F.cross_entropy(by_hand(x), y).backward()
        if i != 1:
            opt.step(), opt.zero_grad()
    same(dict(learn.model.state_dict()), dict(by_hand.state_dict()))
    assert_fine(learn, learn.cbs)


def test_cancelled_validation_batches_are_left_out():
    class SkipFirst(Callback):
        def before_batch(self):
            if not self.learn.training and self.learn.iter == 0:
                raise CancelBatchException
    learn = tiny(metrics=accuracy)
    learn.fit(1, cbs=SkipFirst)
    assert learn.recorder.values[-1][1:] == pytest.approx(learn.validate(list(learn.dls.valid)[1:]))


def test_callbacks_are_called_in_their_order():
    calls = []

    class First(Callback):
        order = -5
        def before_fit(self): calls.append("first")

    class Second(Callback):
        def before_fit(self): calls.append("second")

    class Third(Callback):
        def before_fit(self): calls.append("third")

    class Last(Callback):
        order = 70
        def before_fit(self): calls.append("last")
    learn = tiny(cbs=[Last, Second])
    learn.fit(1, cbs=[Third, First])
    assert calls == ["first", "second", "third", "last"]           # those of one order as they were added
    assert [c.order for c in learn.cbs] == sorted(c.order for c in learn.cbs)


def test_names_of_callbacks():
    class MyOwnCallback(Callback): pass
    class HTTPLogger(Callback): pass
    learn = tiny(cbs=[MyOwnCallback, HTTPLogger()])
    assert learn.my_own.name == "my_own" and learn.my_own.learn is learn and isinstance(learn.http_logger, HTTPLogger)
    assert isinstance(learn.recorder, Recorder)
    with pytest.raises(ValueError, match="has a 'my_own' already"):
        learn.add_cbs(MyOwnCallback)

    class Model(Callback): pass
    with pytest.raises(ValueError, match="has a 'model' already"):
        learn.add_cbs(Model)
    for odd in (3, print, nn.Linear(1, 1), "recorder"):
        with pytest.raises(ValueError, match="is no Callback"):
            learn.add_cbs([odd])
    learn.remove_cbs(MyOwnCallback)
    assert not hasattr(learn, "my_own")
    with pytest.raises(ValueError, match="has no callback"):
        learn.remove_cbs(MyOwnCallback)


def test_callbacks_for_one_fit():
    class Count(Callback):
        n = 0
        def before_epoch(self): self.n += 1
    learn, count = tiny(), Count()
    before = list(learn.cbs)
    learn.fit(2, cbs=count)
    learn.fit(1)
    assert count.n == 2 and learn.cbs == before and not hasattr(learn, "count")
    learn.fit(1, cbs=Count)                                        # a class, alone
    with learn.added_cbs([count]):
        learn.fit(1)
        assert learn.count is count
    assert count.n == 3 and learn.cbs == before
    with pytest.raises(ValueError, match="already"):               # the second one is refused: the first is gone, too
        learn.fit(1, cbs=[Count, Recorder])
    assert learn.cbs == before and not hasattr(learn, "count")
    learn.fit(1)


@pytest.mark.parametrize("name", ["before_bach", "after_backwards", "befor_batch", "beforefit", "after_predict", "before_anything",
                                  "after_fit_", "before_validation", "after_cancel_valid", "clean_up", "cleanUp"])
def test_a_misspelt_event(name):
    with pytest.raises(AttributeError, match=rf"Mine.{name} would never be called.*did you mean \w+\?"):
        type("Mine", (Callback,), {name: lambda self: None})


def test_names_that_are_no_event_but_fine():
    class Fine(Callback):
        before = after = fit = epoch = batch = 1
        def state_dict(self): return {}
        def on_begin(self): pass
        def cleanup(self): pass
        def _before_batch(self): pass
        def batches(self): pass
    tiny(cbs=Fine).fit(1)


# ---- faults: a sentence, and a learner that works

def conv_net() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(64, 3))


PICTURES, LABELS = pictures(16)


@pytest.mark.parametrize(("x", "message"), [
    (torch.randn(16, 3, 6, 6), r"layer '0.0', Conv2d, got \[16, 3, 6, 6\]"),
    (torch.randn(16, 1, 7, 7), r"layer '2', Linear, got \[16, 100\]"),
    (torch.randn(16, 36), r"layer '0.0', Conv2d, got \[16, 36\]"),
    (torch.randint(9, (16, 1, 6, 6)), r"layer '0.0', Conv2d, got \[16, 1, 6, 6\]"),
], ids=["channels", "size", "flat", "whole numbers"])
@pytest.mark.parametrize("where", ["first batch", "later batch", "validation"])
def test_an_input_of_the_wrong_shape(x, message, where):
    good, bad = (PICTURES, LABELS), (x, LABELS)
    train, valid = {"first batch": ([bad, good], [good]), "later batch": ([good, bad], [good]), "validation": ([good], [good, bad])}[where]
    learn = Learner(dls_of(train, valid), conv_net(), device="cpu", progress=False, channels_last=False)
    cbs = learn.cbs
    with pytest.raises(ValueError, match="The model cannot take this batch: " + message) as e:
        learn.fit(1)
    assert len(str(e.value).splitlines()) == 1 and isinstance(e.value.__cause__, RuntimeError)
    learn.dls = dls_of([good])
    assert_fine(learn, cbs)


def test_an_error_that_only_training_makes_names_the_layer_too():
    "A batch of one: batch norm refuses it in training mode only"
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    learn = tiny(model=model, dls=dls_of([(torch.randn(4, 2), torch.randint(3, (4,))), (torch.randn(1, 2), torch.tensor([1]))]))
    with pytest.raises(ValueError, match=r"layer '1', BatchNorm1d, got \[1, 4\]: Expected more than 1 value"):
        learn.fit(1)
    learn.dls = dls_of((torch.randn(4, 2), torch.randint(3, (4,))))
    assert_fine(learn, learn.cbs)


def test_an_error_inside_a_model_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.broken = nn.Linear(2, 3), True

        def forward(self, x):
            y = self.first(x)
            if self.broken:
                raise KeyError("thing")
            return y
    learn = tiny(model=Own())
    with pytest.raises(ValueError, match=r"cannot take this batch: Own, got \[4, 2\]: 'thing'") as e:
        learn.fit(1)
    assert isinstance(e.value.__cause__, KeyError)
    learn.model.broken = False
    assert_fine(learn, learn.cbs)


def test_looking_for_the_failing_layer_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(.5), nn.Linear(2, 2), nn.Linear(3, 3))
    before, state = copy_of(dict(model.state_dict())), random_state()
    assert "layer '3', Linear, got [4, 2]" in failing_layer(model, torch.randn(4, 2, generator=torch.Generator()))
    same(dict(model.state_dict()), before)
    same(random_state(), state)
    assert hooks_of(model) == 0 and failing_layer(nn.Linear(2, 2), torch.randn(4, 2)) is None


@pytest.mark.parametrize(("pred", "target"), [
    ((4, 1), torch.rand(4)), ((4, 1), torch.randint(2, (4,))), ((4, 1), torch.rand(4) > .5), ((4, 3), torch.rand(4)),
    ((4,), torch.rand(4, 1)), ((4, 3), torch.randint(3, (4, 1))), ((4, 3), torch.rand(4, 2)), ((4, 3, 5), torch.randint(3, (4, 6))),
    ((4, 3), torch.randint(3, (5,))), ((), torch.rand(4)), ((4,), torch.randint(2, (3,)))],
    ids=lambda v: str(list(v)) if isinstance(v, tuple) else f"{list(v.shape)} {v.dtype}"[:20])
@pytest.mark.parametrize("loss_func", [F.mse_loss, F.cross_entropy, lambda p, y: (p - y).pow(2).mean()], ids=["mse", "entropy", "own"])
def test_predictions_and_targets_that_do_not_fit(pred, target, loss_func):
    "Above all those that PyTorch broadcasts in silence"
    class Give(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(()))

        def forward(self, x): return self.w * torch.ones(pred)
    for train_is_bad in (True, False):
        x = torch.zeros(4, 2)
        good = (x, torch.rand(pred))
        learn = tiny(model=Give(), loss_func=F.mse_loss if loss_func is F.cross_entropy else loss_func,
                     dls=dls_of([(x, target)] if train_is_bad else [good], [good] if train_is_bad else [(x, target)]))
        if loss_func is F.cross_entropy:
            learn.loss_func = loss_func if train_is_bad else lambda p, y: p.sum() if torch.is_grad_enabled() else F.cross_entropy(p, y)
        with pytest.raises(ValueError, match="The predictions have the shape .* and the targets .*, which a loss would broadcast") as e:
            learn.fit(1)
        assert len(str(e.value).splitlines()) == 1 and str(list(pred)) in str(e.value)
        learn.dls, learn.loss_func = dls_of([good]), F.mse_loss
        assert_fine(learn, learn.cbs)


@pytest.mark.parametrize("label", [3, 7, -1], ids=["one too many", "far out", "negative"])
@pytest.mark.parametrize("where", ["first batch", "later batch", "validation", "later in validation"])
@pytest.mark.parametrize("data", ["tensors", "batches", "torch loader"])
def test_labels_out_of_range(label, where, data):
    x, y = torch.randn(12, 2), torch.arange(12) % 3
    bad = y.clone()
    bad[9 if "later" in where else 1] = label
    train, valid = ((x, y), (x, bad)) if "valid" in where else ((x, bad), (x, y))
    if data == "batches":
        train, valid = (list(zip(a.split(4), b.split(4), strict=True)) for a, b in (train, valid))
    elif data == "torch loader":
        train, valid = (TorchLoader(TensorDataset(*d), 4) for d in (train, valid))
    learn = tiny(dls=dls_of(train, valid, size=4))
    before = copy_of(dict(learn.model.state_dict()))
    low = label if label < 0 else "[01]"
    message = rf"^The labels go from {low} to {max(2, label)}, but the model gives 3 scores, for the classes 0 to 2; correct"
    with pytest.raises(ValueError, match=message) as e:
        learn.fit(1)
    assert len(str(e.value).splitlines()) == 1
    if "valid" not in where and data != "batches":                 # all labels are at hand: seen before the first step
        same(dict(learn.model.state_dict()), before)
    learn.dls = dls_of((x, y))
    assert_fine(learn, learn.cbs)


def test_labels_that_are_to_be_ignored():
    x, y = torch.randn(12, 2), torch.arange(12) % 3
    y[3] = -100                                                    # cross-entropy's mark
    tiny(dls=dls_of((x, y))).fit(1)
    tiny(dls=dls_of([(x, torch.full((12,), -100)), (x, y)], (x, y)), cbs=[]).remove_cbs(TerminateOnNaN)


def spoilt(where: str, value: float) -> DataLoaders:
    x, y = torch.randn(12, 2), torch.arange(12) % 3
    bad = x.clone()
    bad[9] = value
    return dls_of((bad if where == "training" else x, y), (bad if where == "validation" else x, y), size=4)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["training", "validation"])
@pytest.mark.parametrize("opt", ["sgd", "adamw", "torch sgd", "torch adamw"])
def test_a_loss_that_is_no_number(value, where, opt):
    "Noticed at the end of the epoch; model and optimiser are back at its start"
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    learn = tiny(model=model, opt_func=opt_of(opt))
    learn.fit(2, .01)
    good = learn.dls
    before = copy_of([dict(learn.model.state_dict()), learn.opt.state_dict()])

    class Later(Callback):
        "The trouble comes in the second epoch"
        def before_epoch(self):
            if self.learn.epoch == 1:
                self.learn.dls = spoilt(where, value)
                before[:] = copy_of([dict(self.learn.model.state_dict()), self.learn.opt.state_dict()])
    cbs = learn.cbs
    place = "at batch 2 of the training" if where == "training" else "in validation"
    with pytest.raises(FloatingPointError, match=rf"^The loss became (nan|inf) in epoch 1, {place}\. Model and optimiser are back") as e:
        learn.fit(3, .02, cbs=Later)
    assert "it was 0.02" in str(e.value) and len(str(e.value).splitlines()) == 1
    before[1]["param_groups"][0]["lr"] = .1                        # the fit's rate has gone with it
    same([dict(learn.model.state_dict()), learn.opt.state_dict()], before)
    learn.dls = good
    assert_fine(learn, cbs)


def test_a_loss_that_diverges():
    learn = tiny(loss_func=F.mse_loss, dls=dls_of((torch.randn(64, 2) * 10, torch.randn(64, 3)), size=4))
    before = copy_of(dict(learn.model.state_dict()))
    with pytest.raises(FloatingPointError, match="it was 1e[+]05"):
        learn.fit(1, 1e5)
    same(dict(learn.model.state_dict()), before)
    learn.fit(1, 1e-4)
    assert learn.recorder.values[0][1] < 200


def test_nan_in_validation_without_a_training_batch():
    class NoTraining(Callback):
        def before_train(self): raise CancelTrainException
    with pytest.raises(FloatingPointError, match="in validation"):
        tiny(dls=spoilt("validation", math.nan)).fit(1, cbs=NoTraining)


class NoLength:
    def __init__(self, batches): self.batches = batches

    def __iter__(self): return iter(self.batches)


@pytest.mark.parametrize("which", ["training", "validation"])
@pytest.mark.parametrize("kind", ["list", "no length", "torch loader", "lies about its length"])
def test_an_empty_loader(which, kind):
    batch = (torch.randn(4, 2), torch.randint(3, (4,)))
    empty = {"list": [], "no length": NoLength([]), "lies about its length": type("Liar", (NoLength,), {"__len__": lambda s: 3})([]),
             "torch loader": TorchLoader(TensorDataset(torch.zeros(0, 2), torch.zeros(0)), 4)}[kind]
    learn = tiny(dls=dls_of(empty, [batch]) if which == "training" else dls_of([batch], empty))
    with pytest.raises(ValueError, match=rf"^The {which} loader (is empty|gave no batch); give it at least one( batch)?\."):
        learn.fit(1)
    with pytest.raises(ValueError, match="loader (is empty|gave no batch)"):
        learn.fit(1, cbs=Progress)
    learn.dls = dls_of([batch])
    if learn.opt is None:
        learn.fit(1)
    assert_fine(learn, learn.cbs)


def test_a_cancelled_part_is_not_empty():
    class NoTraining(Callback):
        def before_train(self): raise CancelTrainException

    class NoValidation(Callback):
        def before_validate(self): raise CancelValidException
    batch = (torch.randn(4, 2), torch.randint(3, (4,)))
    learn = tiny(dls=DataLoaders(NoLength([batch]), NoLength([batch]), classes=list("abc")))
    learn.fit(1, cbs=NoTraining)
    assert math.isnan(learn.recorder.values[0][0]) and math.isfinite(learn.recorder.values[0][1])
    learn.fit(1, cbs=NoValidation)
    assert math.isfinite(learn.recorder.values[0][0]) and math.isnan(learn.recorder.values[0][1])


@pytest.mark.parametrize(("batch", "text"), [
    (torch.zeros(4, 2), "a Tensor"), ((torch.zeros(4, 2),), "a tuple of 1"), ((torch.zeros(4, 2),) * 3, "a tuple of 3"),
    ({"x": 1}, "a dict"), ([torch.zeros(4, 2)], "a list of 1"), (None, "a NoneType"), ("ab", "a str")],
    ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("where", ["first", "later", "validation"])
def test_a_batch_that_is_no_pair(batch, text, where):
    good = (torch.randn(4, 2), torch.randint(3, (4,)))
    train, valid = {"first": ([batch, good], [good]), "later": ([good, batch], [good]), "validation": ([good], [batch])}[where]
    learn = tiny(dls=dls_of(train, valid))
    with pytest.raises(ValueError, match=re.escape(f"A batch has to be a pair (inputs, targets), but the loader gave {text}.")):
        learn.fit(1)
    learn.dls = dls_of([good])
    assert_fine(learn, learn.cbs)


class Boom(Exception): pass


class Raise(Callback):
    "Raises at the `n`-th time of an event; other callbacks of lower order have been called by then"
    order = 75

    def __init__(self, event: str, error: BaseException, n: int = 1):
        self.error, self.left = error, n
        setattr(self, event, self.boom)

    def boom(self) -> None:
        self.left -= 1
        if not self.left:
            raise self.error


class Cleaned(Callback):
    "Registers a hook and enters autocast, as careful callbacks do, and takes both away"
    def __init__(self, order: int = 0): self.order, self.cleaned, self.hooks, self.cast = order, 0, None, None

    def before_fit(self) -> None:
        self.hooks = Hooks(self.learn.model.modules(), lambda m, i, o: None)
        self.cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=True)
        self.cast.__enter__()

    def cleanup(self) -> None:
        self.cleaned += 1
        if self.hooks:
            self.hooks.remove()
            self.cast.__exit__(None, None, None)
            self.hooks = None


class CleanedLast(Cleaned): pass


def cancelling(event: str) -> list[Callback]:
    "What it takes for an event of cancelling to happen"
    for part, error, at in (("batch", CancelBatchException, "after_pred"), ("train", CancelTrainException, "after_pred"),
                            ("validate", CancelValidException, "before_validate"), ("epoch", CancelEpochException, "after_train"),
                            ("fit", CancelFitException, "after_train")):
        if event == f"after_cancel_{part}":
            class Cancel(Callback):
                order = 74

            def stop(self, error=error): raise error
            setattr(Cancel, at, stop)
            return [Cancel()]
    return []


@pytest.fixture
def without_advice(monkeypatch) -> None:
    "Importing chapter 11, as other tests do, adds advice to errors of the machine; it is tested there"
    if scale := sys.modules.get("course_lib.scale"):
        monkeypatch.setattr(Learner, "_explained", scale._explained_before)


@pytest.mark.usefixtures("without_advice")
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_exception_at_any_event(event, error, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_SCALE", "full")
    monkeypatch.setattr(learner_module, "in_notebook", lambda: True)             # with a bar
    learn = learner_of("ours", progress=True)
    hook = Hook(learn.model[0], lambda m, i, o: None)                             # the reader's own stays
    learn.fit(1)
    cbs, hooks = learn.cbs, hooks_of(learn.model)
    early, late = Cleaned(-100), CleanedLast(1000)
    with pytest.raises(error, match="^here") as e:
        learn.fit(2, schedule=schedule, cbs=[early, late, *cancelling(event), Raise(event, error("here"))])
    assert early.cleaned == late.cleaned == 1
    out = capsys.readouterr().out
    where = r"epoch [01], (training|validation) batch \d of [27]"
    if error is KeyboardInterrupt:
        if event not in ("before_fit", "before_epoch", "before_train"):
            assert re.search(rf"^Interrupted in {where}\. The learner keeps what it has learned; fit goes on from there\.$", out, re.M)
    elif event not in ("before_fit", "before_epoch", "before_train"):
        assert re.fullmatch(rf"It happened in {where}; the learner can go on from there\.", e.value.__notes__[0])
    assert_fine(learn, cbs, hooks)
    hook.remove()


def test_where_it_happened():
    places = []
    for event, n in (("after_pred", 2), ("after_step", 5), ("before_validate", 1), ("after_pred", 4), ("before_train", 2),
                     ("after_epoch", 1), ("before_validate", 2)):
        learn = tiny()
        with pytest.raises(Boom) as e:
            learn.fit(2, cbs=Raise(event, Boom(), n))
        places.append(re.search(r"in (.*);", e.value.__notes__[0])[1])
    assert places[:2] == ["epoch 0, training batch 1 of 3", "epoch 1, training batch 1 of 3"]
    assert places[3] == "epoch 0, validation batch 0 of 2"
    for place in places:                                                          # and never a batch that there is not
        part, i, n = re.search(r"(\w+) batch (\d) of (\d)", place).groups()
        assert int(i) < int(n) == {"training": 3, "validation": 2}[part], place
    assert places[4].startswith("epoch 1, training") and places[6].startswith("epoch 1, validation")


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_an_exception_in_a_cleanup(error):
    class Bad(Callback):
        fail = True
        def cleanup(self):
            if self.fail:
                raise error("here")
    learn = learner_of("ours", cbs=Bad)
    cbs, early, late = learn.cbs, Cleaned(-100), CleanedLast(1000)
    with pytest.raises(error, match="here"):
        learn.fit(1, cbs=[early, late])
    assert early.cleaned == late.cleaned == 1
    learn.bad.fail = False
    assert_fine(learn, cbs)


def test_an_exception_in_other_peoples_code():
    "A metric, a loss, an optimiser, a schedule, a loader: the type is kept, and the next fit works"
    def bad(*args, **kwargs): raise Boom("here")

    class BadLoader:
        def __init__(self, batches): self.batches = batches

        def __len__(self): return 3

        def __iter__(self):
            yield self.batches[0]
            bad()
    learn = tiny(metrics=accuracy)
    learn.fit(1)
    good = dict(vars(learn), step=learn.opt.step)
    for name, value in (("metrics", [bad]), ("loss_func", bad), ("dls", dls_of(BadLoader(list(learn.dls.train)), learn.dls.valid))):
        setattr(learn, name, value)
        with pytest.raises(Boom, match="^here"):
            learn.fit(1)
        setattr(learn, name, good[name])
        assert_fine(learn, good["cbs"])
    learn.opt.step = bad
    with pytest.raises(Boom):
        learn.fit(1)
    del learn.opt.step
    assert_fine(learn, good["cbs"])
    with pytest.raises(Boom):
        learn.fit(1, schedule=bad)
    assert_fine(learn, good["cbs"])
    with pytest.raises(Boom):
        tiny(opt_func=bad).fit(1)


def test_an_exception_before_a_batch_does_not_reach_the_model():
    "A schedule with a mistake, say: no forward pass is made in search of its cause that counts for batch norm or dropout"
    learn = learner_of("ours")
    learn.fit(1)
    before = {}

    class Fail(Callback):
        order = 75
        def before_batch(self):
            if self.learn.training:
                before.update(copy_of({"model": dict(learn.model.state_dict()), "random": random_state()}))
                raise Boom
    with pytest.raises(Boom):
        learn.fit(1, cbs=Fail)
    same({"model": dict(learn.model.state_dict()), "random": random_state()}, before)


def test_autocast_ends_with_the_fit():
    learn, seen = learner_of("ours"), []

    class Look(Callback):
        order = 3
        def after_pred(self): seen.append(self.learn.pred.dtype)
    learn.fit(1, cbs=[Cleaned(), Look])
    assert set(seen) == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")
    with pytest.raises(Boom):
        learn.fit(1, cbs=[Cleaned(), Raise("before_step", Boom())])
    assert not torch.is_autocast_enabled("cpu") and hooks_of(learn.model) == 0


def test_interrupted_and_gone_on(capsys):
    learn = tiny(metrics=accuracy)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(5, cbs=Raise("after_step", KeyboardInterrupt(), 8))
    assert capsys.readouterr().out == ("Interrupted in epoch 2, training batch 1 of 3. The learner keeps what it has learned; "
                                       "fit goes on from there.\n")
    assert len(learn.recorder.values) == 2 and len(learn.recorder.losses) >= 6
    assert len(learn.validate()) == 2 and learn.get_preds()[0].shape == (8, 3)
    learn.recorder.plot_loss()
    assert_fine(learn, learn.cbs)


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"n_epoch": -1}, "n_epoch is -1; it has to be a whole number, 0 or more"), ({"n_epoch": 1.5}, "n_epoch is 1.5"),
    ({"n_epoch": "1"}, "n_epoch is '1'"), ({"n_epoch": 1, "lr": -.1}, "lr is -0.1; a learning rate is a number >= 0"),
    ({"n_epoch": 1, "lr": math.nan}, "lr is nan"), ({"n_epoch": 1, "lr": math.inf}, "lr is inf")])
def test_arguments_that_make_no_sense(kwargs, message):
    learn = tiny()
    with pytest.raises(ValueError, match=message):
        learn.fit(**kwargs)
    learn.fit(1)
    assert_fine(learn, learn.cbs)


def test_no_epoch_at_all():
    learn, log = tiny(), Log()
    before = copy_of(dict(learn.model.state_dict()))
    learn.fit(0, cbs=log)
    assert log.events == ["before_fit", "after_fit", "cleanup"] and learn.recorder.values == []
    same(dict(learn.model.state_dict()), before)
    with pytest.raises(ValueError, match="nothing to draw yet"):
        learn.recorder.plot_loss()


# ---- the optimiser belongs to the learner

@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw", "torch sgd", "torch adamw"])
def test_two_fits_are_one_long_fit(opt):
    once = learner_of(opt)
    once.fit(4)
    twice = learner_of(opt)
    twice.fit(1), twice.fit(3)
    same([dict(once.model.state_dict()), once.opt.state_dict()], [dict(twice.model.state_dict()), twice.opt.state_dict()])
    third = learner_of(opt)
    third.fit(1)
    third.opt = None                                               # a new optimiser on request
    third.fit(3)
    assert any(not torch.equal(a, b) for a, b in zip(once.model.parameters(), third.model.parameters(), strict=True))


def test_a_fresh_optimiser_starts_afresh():
    first = tiny(opt_func=partial(optim.SGD, momentum=.9))
    first.fit(2)
    start = copy.deepcopy(first.model)
    same_model = Learner(first.dls, first.model, opt_func=first.opt_func, lr=.1, device="cpu", progress=False)
    fresh_model = Learner(first.dls, start, opt_func=first.opt_func, lr=.1, device="cpu", progress=False)
    same_model.fit(1), fresh_model.fit(1)
    same(dict(same_model.model.state_dict()), dict(fresh_model.model.state_dict()))


def test_a_changed_model_gets_a_new_optimiser(capsys):
    learn = tiny(model=nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3)))
    learn.fit(1)
    opt = learn.opt
    learn.fit(1)
    assert learn.opt is opt and capsys.readouterr().out == ""
    learn.model[1] = nn.Linear(4, 3)
    weight = learn.model[1].weight.clone()
    learn.fit(1)
    assert learn.opt is not opt and "a new optimiser is made" in capsys.readouterr().out
    assert not torch.equal(weight, learn.model[1].weight)


def test_a_parameter_without_gradient():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x): return self.frozen(self.used(x))
    for opt in ("sgd", "adam", "adamw", "torch sgd"):
        learn = tiny(model=Unused(), opt_func=opt_of(opt))
        before = copy_of(dict(learn.model.state_dict()))
        learn.fit(2)
        for k, v in learn.model.state_dict().items():
            assert torch.equal(v, before[k]) == (not k.startswith("used")), k


def test_the_schedule_is_called_with_the_progress_and_undone():
    asked, set_to = [], []

    def plan(progress: float) -> dict:
        asked.append(progress)
        return {"lr": .01 + progress, "momentum": .9 - progress / 2, "weight_decay": progress / 10}

    class Look(Callback):
        def before_step(self): set_to.append([dict(g) for g in self.learn.opt.param_groups][0])
    for opt in (partial(optim.SGD, momentum=.7), partial(optim.AdamW, betas=(.7, .99)), partial(torch.optim.AdamW, betas=(.7, .99))):
        del asked[:], set_to[:]
        learn = tiny(opt_func=opt, lr=.3)
        learn.fit(2, schedule=plan, cbs=Look)
        assert asked == pytest.approx([i / 5 for i in range(6)]) and asked[0] == 0 and asked[-1] == 1
        for p, group in zip(asked, set_to, strict=True):
            assert group["lr"] == .01 + p and group["weight_decay"] == p / 10
            assert (group["betas"][0] if "betas" in group else group["momentum"]) == .9 - p / 2
        r = learn.recorder
        assert list(r.lrs) == [.01 + p for p in asked] and list(r.moms) == [.9 - p / 2 for p in asked]
        group = learn.opt.param_groups[0]
        assert group["lr"] == .3 and (group["betas"] == (.7, .99) if "betas" in group else group["momentum"] == .7)
        assert group["weight_decay"] == learn.opt.defaults["weight_decay"]
        learn.fit(1, .02, cbs=Look)
        assert set_to[-1]["lr"] == .02 and learn.opt.param_groups[0]["lr"] == .3
    del asked[:]
    one = dls_of([(torch.randn(4, 2), torch.randint(3, (4,)))])
    tiny(dls=one, opt_func=partial(optim.SGD, momentum=.7)).fit(1, schedule=plan)
    assert asked == [0]


def test_a_schedule_that_cannot_be():
    learn = tiny(opt_func=partial(optim.SGD, momentum=.5))
    with pytest.raises(ValueError, match="SGD has no setting 'momentun'; it has lr, momentum, "):
        learn.fit(1, schedule=lambda p: {"lr": .5, "momentun": 1.})
    assert_fine(learn, learn.cbs)
    with pytest.raises(ValueError, match="AdamW has no setting 'nesterov'"):
        adam = tiny(opt_func=optim.AdamW)
        adam.fit(1, schedule=lambda p: {"nesterov": True})
    stream = tiny(dls=DataLoaders(NoLength(list(learn.dls.train)), learn.dls.valid, classes=list("abc")))
    with pytest.raises(ValueError, match="the training loader has no length; fit without a schedule"):
        stream.fit(1, schedule=lambda p: {"lr": .1})
    assert_fine(stream, stream.cbs)


def test_groups_of_parameters():
    "Settings of each group are back after the fit, also when a callback adds a group"
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 3))

    def two_groups(params, lr):
        params = list(params)
        return optim.SGD([{"params": params[:2], "momentum": .5}, {"params": params[2:], "weight_decay": .1}], lr=lr, momentum=.9)
    learn = tiny(model=model, opt_func=two_groups)
    learn.fit(1, schedule=lambda p: {"momentum": p})
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in learn.opt.param_groups] == [(.1, .5, 0), (.1, .9, .1)]
    assert_fine(learn, learn.cbs)

    class Add(Callback):
        def before_fit(self): self.learn.opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    learn.fit(1, .3, cbs=Add)
    assert [g["momentum"] for g in learn.opt.param_groups] == [.5, .9, .9] and learn.opt.param_groups[0]["lr"] == .1


# ---- without callbacks, with one seed

def test_a_learner_without_callbacks_trains():
    learn = learner_of("ours", channels_last=False)
    learn.remove_cbs(list(learn.cbs))
    assert learn.cbs == []
    learn.fit(2)
    other = learner_of("ours", channels_last=False)
    other.fit(2)
    same(dict(learn.model.state_dict()), dict(other.model.state_dict()))


@pytest.mark.parametrize("cb", ["batch_check", "recorder", "terminate_on_nan", "progress", "channels_last"])
def test_each_callback_can_be_taken_away(cb):
    learn = learner_of("ours", progress=True)
    names = [c.name for c in learn.cbs]
    assert cb in names, names
    learn.remove_cbs(getattr(learn, cb))
    if cb == "recorder":
        learn.remove_cbs([learn.progress, learn.terminate_on_nan])               # they read it
    before = copy_of(dict(learn.model.state_dict()))
    learn.fit(1)
    assert any(not torch.equal(before[k], v) for k, v in learn.model.state_dict().items())


CODE = """import hashlib
from killed_run import learner_of
learn = learner_of("item by item", progress=True)
learn.fit(2)
learn.recorder.plot_loss()
print(learn.summary())
r = learn.recorder
text = repr([[p.tolist() for p in learn.model.state_dict().values()], list(r.losses), r.values])
print(hashlib.sha256(text.encode()).hexdigest())"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    "What a plain script does whose output goes to a file, in an encoding that has not many characters"
    env = {**os.environ, "COURSE_SCALE": "full", "PYTHONIOENCODING": "ascii", "MPLBACKEND": "agg", "PYTHONHASHSEED": "random",
           "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    return subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", CODE], capture_output=True, text=True, env=env,
                          cwd=tmp_path_factory.mktemp("script"))


@pytest.mark.parametrize("kind", ["sgd", "torch loader", "item by item"])
def test_four_runs_with_one_seed(kind):
    runs = []
    for _ in range(4):
        learn = learner_of(kind)
        learn.fit(2)
        runs.append([dict(learn.model.state_dict()), list(learn.recorder.losses), learn.recorder.values])
    for run in runs[1:]:
        same(run, runs[0])
    other = learner_of(kind, seed=4)
    other.fit(2)
    assert list(other.recorder.losses) != runs[0][1]


def test_fresh_processes_agree(script, capsys):
    exec(CODE, {})
    here = capsys.readouterr().out.splitlines()[-1]
    assert script.stdout.splitlines()[-1:] == [here] and len(here) == 64, script.stderr


# ---- the record

def test_metrics_are_means_over_items_not_over_batches():
    """The book's validation set: 7 batches of 256 and one of 246, of which the first 1,010 items are threes. A model that calls
    everything a three has .4956 of them right; the mean of the batches' shares is .4932"""
    y = (torch.arange(2038) < 1010).float().unsqueeze(1)
    batches = list(zip(torch.ones(2038, 1).split(256), y.split(256), strict=True))
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(5), model.bias.fill_(0)
    learn = tiny(dls=DataLoaders(batches, batches, classes=["7", "3"]), model=model, loss_func=mnist_loss, metrics=batch_accuracy)
    assert learn.validate()[1] == pytest.approx(1010 / 2038, abs=1e-6) and f"{learn.validate()[1]:.4f}" == "0.4956"
    by_batch = [batch_accuracy(model(x), t).item() for x, t in batches]
    assert f"{sum(by_batch) / 8:.4f}" == "0.4932"
    learn.fit(1, 0.)
    assert learn.recorder.values[0][2] == pytest.approx(1010 / 2038, abs=1e-6)
    loss = mnist_loss(model(torch.ones(2038, 1)), y).item()
    assert learn.recorder.values[0][:2] == pytest.approx([loss, loss], rel=1e-6)


def test_averages_of_every_kind_of_target():
    x, y = torch.randn(10, 3), torch.randint(3, (10,))
    for split in (lambda t: t, lambda t: (t, t), lambda t: {"a": t}):
        averages = Averages([lambda p, y: p.sum() / len(p), lambda p, y: 1., lambda p, y: torch.tensor(2, dtype=torch.int64)])
        for a, b in zip(x.split(4), y.split(4), strict=True):
            averages.add(a.mean(), a, split(b))
        assert averages.values() == pytest.approx([x.mean().item(), x.sum().item() / 10, 1, 2], abs=1e-6)
    assert all(map(math.isnan, Averages([accuracy]).values()))


def test_accuracy_and_error_rate():
    pred, targ = torch.tensor([[.1, .9], [.8, .2], [.3, .7], [.6, .4]]), torch.tensor([1, 0, 0, 0])
    assert accuracy(pred, targ) == .75 and error_rate(pred, targ) == .25
    assert accuracy(torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))).ndim == 0            # a picture of classes
    for bad in (targ.unsqueeze(1), targ[:3], torch.zeros(4, 2)):
        with pytest.raises(ValueError, match=r"accuracy takes scores \[N, classes\] and class numbers \[N\], but got"):
            accuracy(pred, bad)
    with pytest.raises(ValueError, match="accuracy takes scores"):
        error_rate(pred[:, 0], targ)


def test_names_of_metrics():
    class Share:
        def __call__(self, p, y): return accuracy(p, y)
    learn = tiny(metrics=[partial(accuracy), error_rate, Share(), partial(partial(accuracy))])
    learn.fit(1)
    assert learn.recorder.metric_names == ["epoch", "train_loss", "valid_loss", "accuracy", "error_rate", "Share", "accuracy", "time"]
    v = learn.recorder.values[0]
    assert len(v) == 6 and v[2] == v[4] == v[5] and v[2] + v[3] == pytest.approx(1)
    one = tiny(metrics=accuracy)
    assert one.metrics == [accuracy]


def test_the_recorder():
    learn, losses, sizes = learner_of("ours", opt_func=optim.AdamW), [], []

    class Note(Callback):
        def after_loss(self):
            if self.learn.training:
                losses.append(self.learn.loss.item()), sizes.append(len(self.learn.yb))
    learn.fit(3, .02, cbs=Note)
    r = learn.recorder
    assert list(r.losses) == losses and r.epoch_ends == [N_BATCH, 2 * N_BATCH, 3 * N_BATCH]
    assert list(r.lrs) == [.02] * 21 and list(r.moms) == [.9] * 21 and len(r.seconds) == 3 and all(s > 0 for s in r.seconds)
    assert sizes[N_BATCH - 1] == 4                                 # 100 items in batches of 16
    for e in range(3):
        part = slice(e * N_BATCH, (e + 1) * N_BATCH)
        assert r.values[e][0] == pytest.approx(np.average(losses[part], weights=sizes[part]), rel=1e-6)
    assert r.values[-1][1:] == pytest.approx(learn.validate(), rel=1e-6)
    learn.fit(1)
    assert len(learn.recorder.values) == 1                         # the last fit's


def test_the_record_after_a_fit_that_broke_off():
    "Losses, rates and momenta are of one length, and can be drawn"
    for error in (CancelFitException(), KeyboardInterrupt(), Boom()):
        learn = tiny()
        with contextlib.suppress(KeyboardInterrupt, Boom):
            learn.fit(3, cbs=Raise("after_step", error, 5))
        r = learn.recorder
        assert len(r.losses) == len(r.lrs) == len(r.moms) == 5 and len(r.values) == 1
        assert all(map(math.isfinite, r.losses))
        r.plot_loss()
        with contextlib.suppress(KeyboardInterrupt, Boom):         # in the first epoch
            learn.fit(3, cbs=Raise("after_step", error, 2))
        r.plot_loss()


def test_optimisers_without_momentum():
    learn = tiny(opt_func=lambda p, lr: torch.optim.Adagrad(p, lr=lr))
    learn.fit(1)
    assert all(map(math.isnan, learn.recorder.moms))


def test_smooth():
    values = [random.Random(0).random() for _ in range(50)]
    for beta in (.98, .5, 0.):
        weights = [[beta ** (i - j) for j in range(i + 1)] for i in range(50)]
        expected = [sum(w * v for w, v in zip(ws, values, strict=False)) / sum(ws) for ws in weights]
        assert smooth(values, beta) == pytest.approx(expected)
    assert smooth([]) == [] and smooth([3.]) == pytest.approx([3.]) and smooth([2.] * 9) == pytest.approx([2.] * 9)


@pytest.fixture
def shown(monkeypatch) -> list:
    "Figures that would have been shown, with their texts"
    figures = []
    monkeypatch.setattr(learner_module, "show_figure", lambda fig, alt, caption, **kw: figures.append((fig, alt, caption)))
    return figures


def test_show_graph_replaces_one_figure_and_draws_at_most_a_tenth_of_the_time(monkeypatch):
    calls, clock = [], [0.]

    def draw(self, **kwargs):
        calls.append((clock[0], kwargs))
        clock[0] += .5
    monkeypatch.setattr(Recorder, "plot_loss", draw)
    monkeypatch.setattr(learner_module.time, "perf_counter", lambda: clock[0])

    class Second(Callback):
        def after_batch(self): clock[0] += 1
    learn = tiny(dls=dls_of([(torch.randn(4, 2), torch.randint(3, (4,)))] * 12))
    learn.fit(2, cbs=[ShowGraph(seconds=2), Second])
    assert not calls, "nobody watches a script"
    clock[0] = 0.
    monkeypatch.setattr(learner_module, "in_notebook", lambda: True)
    learn.fit(2, cbs=[ShowGraph(seconds=2), Second])
    # 12 batches of training and 12 of validation, a second each; a picture takes half a second, so the next waits for five,
    # or for the end of the epoch
    assert [t for t, _ in calls] == [3, 8.5, 25, 30.5, 36, 50.5]
    assert [c["replace"] for _, c in calls] == [False] + [True] * (len(calls) - 1) and len({c["name"] for _, c in calls}) == 1


def test_plot_loss(shown):
    learn = learner_of("ours")
    learn.fit(2)
    learn.recorder.plot_loss(skip_start=3)
    fig, alt, caption = shown[-1]
    training, validation = fig.axes[0].lines
    np.testing.assert_allclose(training.get_ydata(), smooth(learn.recorder.losses)[3:])
    assert list(training.get_xdata()) == list(range(4, 15))
    assert list(validation.get_xdata()) == [7, 14] and list(validation.get_ydata()) == [v[1] for v in learn.recorder.values]
    assert "14 batches" in alt and caption
    learn.recorder.plot_loss(skip_start=100, with_valid=False)     # more than there is
    assert len(shown[-1][0].axes[0].lines) == 1 and len(shown[-1][0].axes[0].lines[0].get_xdata()) == 1


# ---- what is shown on the way

def test_progress(monkeypatch, capsys):
    for kind in ("ours", "stream"):
        monkeypatch.setenv("COURSE_SCALE", "full")
        learn = learner_of(kind, progress=True)
        learn.fit(2)
        lines = capsys.readouterr().out.splitlines()
        assert [re.sub(r"\d\.\d{6}", "#", re.sub(r"[\d.]+ s", "T", line)).split() for line in lines] == [
            ["epoch", "train_loss", "valid_loss", "accuracy", "time"], ["0", "#", "#", "#", "T"], ["1", "#", "#", "#", "T"]]
        assert len({len(line) for line in lines}) == 1                            # aligned
        monkeypatch.setattr(learner_module, "in_notebook", lambda: True)
        learn.fit(1)
        monkeypatch.undo()
        monkeypatch.setenv("COURSE_SCALE", "test")
        capsys.readouterr()
        learn.fit(1)
        assert capsys.readouterr() == ("", "")
        assert not list(tqdm._instances)


def test_progress_in_a_script(script):
    assert script.returncode == 0 and script.stderr == "", script.stderr
    assert len(re.findall(r"^ +[01]  .* s$", script.stdout, re.M)) == 2 and "\r" not in script.stdout
    assert "159 of 159 parameters are trainable" in script.stdout


def test_plots_work_in_a_plain_script():
    "Called from outside any notebook: only what the module imports itself is needed"
    x = torch.randint(0, 256, (40, 1, 6, 6), dtype=torch.uint8)
    y = torch.randint(3, (40,))
    learn = Learner(dls_of([(x / 255, y)]), net(), device="cpu", progress=False, metrics=accuracy)
    learn.fit(1)
    learn.recorder.plot_loss()
    learn.show_results()
    found = ClassificationInterpretation.from_learner(learn)
    found.plot_top_losses(4)
    found.plot_confusion_matrix()


# ---- looking changes nothing

def looks() -> dict:
    def a_picture(learn): learn.predict(learn.dls.one_batch()[0][0])
    return {"summary": lambda learn: str(learn.summary()), "get_preds": lambda learn: learn.get_preds(),
            "get_preds of the training set": lambda learn: learn.get_preds(learn.dls.train), "predict": a_picture,
            "validate": lambda learn: learn.validate(), "show_results": lambda learn: learn.show_results(),
            "one_batch": lambda learn: learn.dls.one_batch(),
            "interpretation": lambda learn: ClassificationInterpretation.from_learner(learn).plot_top_losses(2)}


@pytest.mark.parametrize("what", looks())
@pytest.mark.parametrize("kind", ["ours", "torch loader", "torch loader, own generator", "random transform", "stream"])
@pytest.mark.parametrize("mode", ["eval", "train", "mixed"])
def test_looking_changes_nothing(what, kind, mode, monkeypatch):
    "No parameter, buffer, mode, hook, gradient, optimiser state, random state; also of Python's and NumPy's generators"
    learn = learner_of(kind)
    learn.fit(1)
    learn.model.train(mode != "eval")
    if mode == "mixed":
        learn.model[1].eval()
    draw = learn.model.register_forward_hook(lambda m, i, o: (random.random(), np.random.rand(), None)[2])   # a model that draws
    learn.model[0].weight.grad = torch.ones_like(learn.model[0].weight)
    before = state_of(learn)
    looks()[what](learn)
    same(state_of(learn), before)
    draw.remove()


def test_looking_before_a_first_fit():
    for what, look in looks().items():
        learn = learner_of("ours")
        before = state_of(learn)
        look(learn)
        same(state_of(learn), before, what)
        assert learn.opt is None


def test_evaluating_and_hooks_let_go_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Linear(2, 2)))
    model[2].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(Boom), evaluating(model), Hooks(model, lambda m, i, o: o.shape) as hooks, Hook(model[0], lambda m, i, o: 3) as hook:
        model(torch.ones(1, 2))
        assert len(hooks) == 3 and hooks[0].stored == (1, 2) and hooks.stored[2] == (1, 2) and hook.stored == 3
        assert not torch.is_grad_enabled() and not any(m.training for m in model.modules())
        raise Boom
    assert [m.training for m in model.modules()] == modes and hooks_of(model) == 0 and torch.is_grad_enabled()


# ---- summary

def rows(model: nn.Module, x: torch.Tensor):
    set_seed(0)
    learn = Learner(dls_of([(x, torch.zeros(len(x), dtype=torch.long))]), model, device="cpu", progress=False)
    return learn.summary()


@pytest.mark.parametrize(("layer", "x", "params", "macs", "shape"), [
    (nn.Linear(10, 4), (5, 10), 44, 40, [5, 4]),
    (nn.Linear(10, 4, bias=False), (5, 10), 40, 40, [5, 4]),
    (nn.Linear(10, 4), (5, 7, 10), 44, 7 * 40, [5, 7, 4]),
    (nn.Conv2d(3, 8, 3), (2, 3, 9, 9), 224, 7 * 7 * 8 * 27, [2, 8, 7, 7]),
    (nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), (2, 3, 9, 9), 216, 5 * 5 * 8 * 27, [2, 8, 5, 5]),
    (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 9, 9), 8 * 2 * 9 + 8, 7 * 7 * 8 * 18, [2, 8, 7, 7]),
    (nn.Conv2d(4, 4, (1, 5), groups=4, dilation=2), (2, 4, 9, 9), 24, 9 * 1 * 4 * 5, [2, 4, 9, 1]),
    (nn.Conv1d(2, 3, 3), (2, 2, 9), 21, 7 * 3 * 6, [2, 3, 7]),
    (nn.BatchNorm2d(3), (2, 3, 9, 9), 6, 0, [2, 3, 9, 9]),
    (nn.ReLU(), (2, 3), 0, 0, [2, 3])], ids=lambda v: str(v)[:30] if isinstance(v, nn.Module) else "")
def test_summary_against_a_count_by_hand(layer, x, params, macs, shape):
    for model, name in ((layer, ""), (nn.Sequential(nn.Identity(), nn.Sequential(layer)), "1.0")):
        s = rows(model, torch.randn(x))
        row = s.rows[-1]
        assert (row["name"], row["params"], row["macs"], row["shape"]) == (name, params, macs, shape)
        assert (s.params, s.trainable, s.macs, s.input_shape) == (params, params, macs, list(x))


def test_summary_of_resnet18():
    resnet18 = pytest.importorskip("torchvision.models").resnet18
    s = rows(resnet18(), torch.randn(2, 3, 224, 224))
    assert s.params == 11_689_512 and s.macs == 1_814_073_344
    assert s.rows[0]["shape"] == [2, 64, 112, 112] and s.rows[-1]["shape"] == [2, 1000]
    text = str(s)
    assert "11,689,512" in text and "1,814,073,344" in text and len({len(line) for line in text.splitlines()[1:2]}) == 1


def test_summary_counts_shared_parameters_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
            self.b.weight = self.a.weight
            self.d = nn.Sequential(self.c[0])                      # one layer in two places

        def forward(self, x): return self.d(self.c(self.b(self.a(x))))
    s = rows(Tied(), torch.randn(3, 4))
    assert s.params == sum(p.numel() for p in Tied().parameters()) == 20 + 4 + 20
    assert s.macs == 4 * 16


def test_summary_of_what_is_no_layer():
    "Parameters of a module that has layers too, and multiplications outside of all layers"
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.first, self.act = nn.Parameter(torch.randn(8, 5)), nn.Linear(4, 8), nn.ReLU()
            self.frozen = nn.Linear(5, 5).requires_grad_(False)
            self.unused = nn.Linear(7, 7)

        def forward(self, x): return self.frozen(self.act(self.first(x)) @ self.w)
    s = rows(nn.Sequential(Own()), torch.randn(3, 4))
    assert s.params == 40 + 40 + 30 + 56 and s.trainable == s.params - 30
    assert s.macs == 32 + 40 + 25
    assert {r["name"]: r["params"] for r in s.rows}["0"] == 40 and "136 of 166 parameters are trainable" in str(s)


def test_summary_of_layers_with_several_outputs():
    class Last(nn.Module):
        def forward(self, x): return x[0][:, -1]
    s = rows(nn.Sequential(nn.LSTM(3, 5, batch_first=True), Last(), nn.Linear(5, 3)), torch.randn(4, 6, 3))
    assert s.rows[0]["shape"] == [[4, 6, 5], [[1, 4, 5], [1, 4, 5]]] and s.rows[0]["params"] == 4 * 5 * (3 + 5 + 2)

    class Dict(nn.Module):
        def forward(self, x): return {"a": x}

    class Take(nn.Module):
        def forward(self, x): return x["a"]
    assert "Dict" in str(rows(nn.Sequential(Dict(), Take(), nn.Linear(3, 3)), torch.randn(4, 3)))


def test_summary_in_words():
    text = str(tiny(metrics=accuracy).summary())
    assert text.splitlines()[0] == "input [4, 2]" and "9 of 9 parameters are trainable" in text
    assert "loss: cross_entropy; optimiser: SGD" in text and "Recorder" in text


# ---- predictions

def test_get_preds_and_validate():
    learn = learner_of("ours", metrics=[accuracy, error_rate])
    learn.fit(1)
    x, y = learn.dls.valid.dataset.tensors
    with torch.no_grad():
        scores = learn.model(x)
    preds, targets = learn.get_preds()
    torch.testing.assert_close(preds, scores.softmax(1))
    assert torch.equal(targets, y) and not preds.requires_grad
    torch.testing.assert_close(learn.get_preds(act=lambda s: s)[0], scores)
    acc = (scores.argmax(1) == y).float().mean().item()
    assert learn.validate() == pytest.approx([F.cross_entropy(scores, y).item(), acc, 1 - acc], rel=1e-5)
    some = DataLoader(TensorDataset(*pictures(10, 7)), 3)
    assert len(learn.get_preds(some)[0]) == 10 and learn.validate(some) != learn.validate()
    assert learn.validate([]) == pytest.approx([math.nan] * 3, nan_ok=True)
    with pytest.raises(ValueError, match="get_preds got a loader without a batch"):
        learn.get_preds([])


@pytest.mark.parametrize(("loss_func", "expected"), [
    (F.cross_entropy, "softmax"), (nn.CrossEntropyLoss(label_smoothing=.1), "softmax"),
    (partial(F.cross_entropy, label_smoothing=.1), "softmax"),
    (F.binary_cross_entropy_with_logits, "sigmoid"), (nn.BCEWithLogitsLoss(), "sigmoid"), (mnist_loss, "sigmoid"),
    (F.binary_cross_entropy, "same"), (nn.BCELoss(), "same"), (F.mse_loss, "same"), (nn.MSELoss(), "same"),
    (lambda p, y: p.sum(), "same")], ids=lambda v: v if isinstance(v, str) else getattr(v, "__name__", type(v).__name__))
def test_the_activation_of_a_loss(loss_func, expected):
    scores = torch.tensor([[.2, .8], [.4, .6]])
    f = {"softmax": partial(torch.softmax, dim=1), "sigmoid": torch.sigmoid, "same": lambda s: s}[expected]
    torch.testing.assert_close(activation_of(loss_func)(scores), f(scores))


def test_the_activation_of_ones_own_loss():
    class MyLoss(nn.Module):
        def forward(self, p, y): return F.cross_entropy(p, y)

        def activation(self, scores): return scores * 2
    assert activation_of(MyLoss())(torch.ones(1)) == 2

    def my_loss(p, y): return F.cross_entropy(p, y)
    assert activation_of(my_loss)(torch.ones(1)) == 1
    my_loss.activation = torch.exp
    assert activation_of(my_loss)(torch.zeros(1)) == 1


def picture_learner(channels: int = 1, classes: int = 3) -> Learner:
    "Trained on uint8 pictures, normalised in the loader"
    set_seed(0)
    x = torch.randint(0, 256, (30, channels, 6, 6), dtype=torch.uint8)
    y = torch.arange(30) % classes
    norm = Normalize(.5, .25)
    dls = DataLoaders(DataLoader(TensorDataset(x, y), 8, shuffle=True, transform=norm), DataLoader(TensorDataset(x, y), 8, transform=norm),
                      classes=["cat", "dog", "eel"][:classes])
    learn = Learner(dls, net(channels, classes), device="cpu", progress=False, lr=.05)
    learn.fit(3)
    return learn


@pytest.mark.parametrize("channels", [1, 3])
def test_predict(channels):
    learn = picture_learner(channels)
    x, y = learn.dls.valid.dataset.tensors
    preds, _ = learn.get_preds()
    array = x[4].permute(1, 2, 0).squeeze(-1).numpy()
    items = [x[4], Normalize(.5, .25)(x[4]), Image.fromarray(array), *([x[4, 0]] if channels == 1 else [])]
    for item in items:
        name, index, probs = learn.predict(item)
        torch.testing.assert_close(probs, preds[4])
        assert index == preds[4].argmax() and name == learn.dls.classes[index] and probs.shape == (3,)
    other = Image.fromarray(x[4, 0].numpy()).convert("RGB") if channels == 1 else Image.fromarray(array).convert("L")
    assert learn.predict(other)[0] in learn.dls.classes            # colour to grey, and back
    with pytest.raises(ValueError, match=rf"predict takes an item of the shape \[{channels}, 6, 6\], as in the batches, but got "
                                         rf"\[{channels}, 9, 7\]; resize"):
        learn.predict(Image.new("RGB", (7, 9)))
    with pytest.raises(ValueError, match=r"but got \[2, 6, 6\]"):
        learn.predict(torch.zeros(2, 6, 6))


def test_predict_scales_a_photo_as_validation_does():
    "Any size, upright as its EXIF data say, and never a random cut"
    set_seed(0)
    data = ImageData(torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12) % 3,
                     torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6) % 3, ["cat", "dog", "eel"], "real", "pets")
    learn = Learner(get_dls(4, data, size=6, augment=True, device="cpu"), net(3), progress=False)
    photo = torch.randint(0, 256, (3, 20, 11), dtype=torch.uint8)
    learn.model.eval()
    with torch.no_grad():
        wanted = learn.model(learn.dls.valid.transform(photo[None])).softmax(1)[0]
    turned = Image.fromarray(photo.permute(1, 2, 0).numpy()).transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6                                      # "turn me by 90 degrees to the right"
    for item in (photo, Image.fromarray(photo.permute(1, 2, 0).numpy()), turned):
        torch.testing.assert_close(learn.predict(item)[2], wanted)


def test_predict_without_a_transform():
    "Loaders of floats say nothing about how bytes became them"
    learn = learner_of("ours")
    learn.fit(1)
    for item in (torch.zeros(1, 6, 6, dtype=torch.uint8), Image.new("L", (6, 6))):
        with pytest.raises(ValueError, match="float"):
            learn.predict(item)
    assert learn.predict(torch.zeros(6, 6))[0] in "abc"
    with pytest.raises(ValueError, match="predict takes"):
        learn.predict("cat.png")


def binary() -> Learner:
    set_seed(0)
    x = torch.randn(20, 2)
    y = (x.sum(1, keepdim=True) > 0).float()
    learn = tiny(dls=DataLoaders([(x, y)] * 30, [(x[:9], y[:9]), (x[9:], y[9:])], classes=["neg", "pos"]), model=nn.Linear(2, 1),
                 loss_func=F.binary_cross_entropy_with_logits, metrics=batch_accuracy, lr=1.)
    learn.fit(2)
    return learn


def test_one_score_for_two_classes():
    learn = binary()
    preds, targets = learn.get_preds()
    assert preds.shape == targets.shape == (20, 1) and 0 <= preds.min() <= preds.max() <= 1
    for x, p in zip(learn.dls.train[0][0], preds, strict=True):
        name, index, probs = learn.predict(x)
        torch.testing.assert_close(probs, p)
        assert name == ["neg", "pos"][index] and index == (p > .5).long()
    m = ClassificationInterpretation.from_learner(learn).confusion_matrix()
    assert m.sum() == 20 and m.diagonal().sum() == ((preds > .5) == (targets == 1)).sum()


def test_interpretation():
    learn = picture_learner()
    found = ClassificationInterpretation.from_learner(learn)
    preds, y = learn.get_preds()
    guessed = preds.argmax(1)
    matrix = found.confusion_matrix()
    for i in range(3):
        for j in range(3):
            assert matrix[i, j] == ((y == i) & (guessed == j)).sum()               # row: true, column: predicted
    losses = F.cross_entropy(learn.get_preds(act=lambda s: s)[0], y, reduction="none")
    values, places = found.top_losses(5)
    torch.testing.assert_close(values, losses.topk(5).values)
    torch.testing.assert_close(losses[places], values)
    assert len(found.top_losses(1000)[0]) == 30
    pairs = found.most_confused()
    assert sum(n for *_, n in pairs) == (guessed != y).sum() and [n for *_, n in pairs] == sorted((n for *_, n in pairs), reverse=True)
    assert all(matrix[learn.dls.classes.index(t), learn.dls.classes.index(g)] == n and t != g for t, g, n in pairs)
    assert found.most_confused(min_val=100) == []
    batch = learn.dls.one_batch()
    assert ClassificationInterpretation.from_learner(learn, [batch]).confusion_matrix().sum() == 8


def test_the_pictures_that_are_shown(monkeypatch, shown):
    learn, drawn = picture_learner(), []
    monkeypatch.setattr(learner_module, "show_images", lambda ims, titles, **kw: drawn.append((ims, titles)))
    x, y = learn.dls.valid.dataset.tensors
    guessed = learn.get_preds()[0].argmax(1)
    names = learn.dls.classes
    learn.show_results(max_n=5)
    ims, titles = drawn[-1]
    assert titles == [f"{names[y[i]]}, read {names[guessed[i]]}{'' if y[i] == guessed[i] else ' ✗'}" for i in range(5)]
    torch.testing.assert_close(torch.stack(ims), x[:5] / 255)                      # normalisation undone
    learn.show_results(max_n=100)
    assert len(drawn[-1][0]) == 8                                                  # a batch
    found = ClassificationInterpretation.from_learner(learn)
    found.plot_top_losses(3)
    ims, titles = drawn[-1]
    values, places = found.top_losses(3)
    torch.testing.assert_close(torch.stack(ims), x[places] / 255)
    assert titles == [f"{names[y[i]]}, read {names[guessed[i]]}\nloss {v:.2f}" for v, i in zip(values, places, strict=True)]
    assert all(alt and caption and "\n" not in alt for _, alt, caption in shown) and len(shown) == 3
    found.plot_confusion_matrix()
    fig, _, caption = shown[-1]
    matrix = found.confusion_matrix()
    assert [t.get_text() for t in fig.axes[0].texts] == [str(int(v)) for v in matrix.flatten()]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == names and fig.axes[0].get_ylabel() == "true class"
    assert f"{int(matrix.diagonal().sum())} of 30 are right" in caption


# ---- ready-made networks

def vision_dls(channels: int, classes: int = 4, size: int = 32) -> DataLoaders:
    x = torch.randn(8, channels, size, size)
    return dls_of([(x, torch.arange(8) % classes)], classes=[str(i) for i in range(classes)])


@pytest.mark.parametrize("channels", [1, 3])
def test_vision_learner(channels):
    models = pytest.importorskip("torchvision.models")
    set_seed(0)
    learn = vision_learner(vision_dls(channels), models.resnet18, metrics=accuracy, lr=.01, device="cpu", progress=False)
    assert learn.model.conv1.in_channels == channels and learn.model.fc.out_features == 4 and learn.metrics == [accuracy]
    assert learn.model.conv1.weight.detach().std() == pytest.approx((2 / (64 * 49)) ** .5, rel=.1)      # He's, by fan-out
    learn.fit(1)
    assert learn.get_preds()[0].shape == (8, 4)
    assert vision_learner(vision_dls(1), models.resnet18, n_in=2, progress=False).model.conv1.in_channels == 2


def test_vision_learner_takes_over_pretrained_weights():
    "As a network of ours has them, without a download: those of the first convolution are summed over the colours"
    def arch(weights=None, num_classes=1000):
        set_seed(1)
        assert weights == "DEFAULT" and num_classes == 1000
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=True), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(8, 1000))
    original = arch("DEFAULT")
    grey = torch.rand(2, 1, 8, 8)
    learn = vision_learner(vision_dls(1), arch, pretrained=True, device="cpu", progress=False)
    torch.testing.assert_close(learn.model[0](grey), original[0](grey.expand(-1, 3, -1, -1)))  # grey in all colours
    assert learn.model[-1].out_features == 4
    colour = vision_learner(vision_dls(3), arch, pretrained=True, device="cpu", progress=False)
    assert torch.equal(colour.model[0].weight, original[0].weight)
    many = vision_learner(vision_dls(5, classes=1000), arch, pretrained=True, device="cpu", progress=False)
    assert many.model[0].in_channels == 5 and torch.equal(many.model[-1].weight, original[-1].weight)


def test_vision_learner_without_a_layer_to_fit():
    def convolutions_only(num_classes): return nn.Sequential(nn.Conv2d(3, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    def linear_only(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
    for arch in (convolutions_only, linear_only):
        with pytest.raises(ValueError, match=f"{arch.__name__} has no convolution or no linear layer to fit to the data"):
            vision_learner(vision_dls(1), arch, progress=False)


# ---- workers of PyTorch's loader

@pytest.mark.slow
def test_workers_that_are_spawned(tmp_path):
    "As on Windows and macOS; what they need comes from course_lib"
    code = """
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from course_lib.datasets import three_or_seven
from course_lib.dataloader import DataLoaders
from course_lib.learner import Checkpoint, Learner, accuracy
from course_lib.optim import SGD
from course_lib.settings import set_seed

class Scaled(nn.Module):
    def forward(self, x): return x.float().flatten(1) / 255

def fit(workers):
    set_seed(0)
    data = three_or_seven()
    some = torch.utils.data.Subset(data.train, range(0, len(data.train), 40))
    kw = dict(num_workers=workers, multiprocessing_context="spawn") if workers else {}
    dls = DataLoaders(DataLoader(some, 64, shuffle=True, **kw), DataLoader(some, 64, **kw), classes=data.classes)
    learn = Learner(dls, nn.Sequential(Scaled(), nn.Linear(784, 2)), opt_func=SGD, lr=.1, metrics=accuracy, progress=False, device="cpu")
    learn.fit(2, cbs=Checkpoint("fit"))
    return [p.tolist() for p in learn.model.parameters()], learn.recorder.values

if __name__ == "__main__":
    a, b = fit(0), fit(1)
    assert a == b, (a[1], b[1])
    print("the same", a[1][-1][2] > .8)
"""
    (tmp_path / "script.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "the same True", done.stdout + done.stderr
