"""course_lib.schedule: annealers and 1cycle against torch.optim.lr_scheduler, schedules in a fit, and a finder that leaves no trace"""
import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from course_lib import optim
from course_lib.dataloader import DataLoader, DataLoaders
from course_lib.learner import Callback, CancelBatchException, CancelTrainException, Checkpoint, Learner, ShowGraph, accuracy
from course_lib.schedule import (SUGGESTIONS, combine, descent, diverged, one_cycle, sched_cos, sched_exp, sched_lin, sched_no, steep,
                                 valley)
from course_lib.settings import set_seed
from killed_run import loaders, net

ANNEALERS = [sched_no, sched_lin, sched_cos, sched_exp]


ADAMW = partial(optim.AdamW, betas=(.9, .99))


def learner(seed: int = 0, opt_func=ADAMW, **kw) -> Learner:
    set_seed(seed)
    return Learner(loaders(), net(), metrics=accuracy, opt_func=opt_func, progress=False, **kw)


def theirs(make, n: int, optimizer=torch.optim.SGD, lr: float = .1, **kw) -> dict[str, list[float]]:
    "Learning rates and momenta of n steps under one of PyTorch's schedulers"
    settings = {"momentum": .9} if optimizer is torch.optim.SGD else {}
    opt = optimizer([torch.zeros(1, requires_grad=True)], lr=lr, **settings)
    sched, found = make(opt, **kw), {"lr": [], "momentum": []}
    for i in range(n):
        group = opt.param_groups[0]
        found["lr"].append(group["lr"])
        found["momentum"].append(group["betas"][0] if "betas" in group else group["momentum"])
        opt.step()
        if i < n - 1:
            sched.step()
    return found


def ours(sched, n: int) -> list:
    return [sched(i / (n - 1)) for i in range(n)]


# ---- annealers and their combination

@pytest.mark.parametrize("sched", ANNEALERS)
def test_annealers_start_and_end_exactly(sched, seed):
    for _ in range(200):
        a, b = random.uniform(1e-9, 10), random.uniform(1e-9, 10)
        f = sched(a, b)
        assert f(0) == a and f(1) == (a if sched is sched_no else b)
        values = [f(p) for p in np.linspace(0, 1, 50)]
        assert min(a, b) * (1 - 1e-12) <= min(values) <= max(values) <= max(a, b) * (1 + 1e-12)


def test_annealers_equal_torch(seed):
    for _ in range(20):
        n, lr, low = random.randint(2, 400), 10**random.uniform(-5, 1), random.random()
        np.testing.assert_allclose(ours(sched_lin(lr, low * lr), n), theirs(
            lr_scheduler.LinearLR, n, lr=lr, start_factor=1, end_factor=low, total_iters=n - 1)["lr"], rtol=0, atol=1e-10)
        np.testing.assert_allclose(ours(sched_cos(lr, low * lr), n), theirs(
            lr_scheduler.CosineAnnealingLR, n, lr=lr, T_max=n - 1, eta_min=low * lr)["lr"], rtol=0, atol=1e-10)
        gamma = random.uniform(.9, 1.01)
        np.testing.assert_allclose(ours(sched_exp(lr, lr * gamma**(n - 1)), n), theirs(
            lr_scheduler.ExponentialLR, n, lr=lr, gamma=gamma)["lr"], rtol=1e-10, atol=1e-10)


def test_exponential_needs_numbers_above_zero():
    for pair in [(0, 1), (.1, 0), (-1, 1), (1, -1), (math.nan, 1)]:
        with pytest.raises(ValueError, match="above 0"):
            sched_exp(*pair)


def test_combine_goes_through_the_phases(seed):
    for _ in range(100):
        shares = np.random.dirichlet(np.ones(random.randint(1, 6)))
        values = np.random.rand(len(shares), 2)
        sched = combine(shares.tolist(), [sched_lin(*v) for v in values.tolist()])
        assert sched(0) == values[0, 0] and sched(1) == values[-1, 1]
        start = 0
        for share, (a, b) in zip(shares, values, strict=True):
            assert sched(start + share / 2) == pytest.approx((a + b) / 2, abs=1e-9)
            start += share


def test_combine_at_borders_and_with_empty_phases():
    steps = combine([.25, .5, .25], [sched_no(i, i) for i in range(3)])
    assert [steps(p) for p in (0, .249, .25, .749, .75, 1)] == [0, 0, 1, 1, 2, 2]
    assert [combine([0, 1], [sched_lin(5, 6), sched_lin(0, 1)])(p) for p in (0, .5, 1)] == [0, .5, 1]
    assert [combine([1, 0], [sched_lin(0, 1), sched_lin(5, 6)])(p) for p in (0, .5, 1)] == [0, .5, 1]


@pytest.mark.parametrize("shares", [[], [.5], [.5, .6], [.5, .4], [-.5, 1.5], [math.nan, .5], [.2, .3, .5]])
def test_combine_refuses_shares_that_do_not_fit(shares):
    with pytest.raises(ValueError, match="together 1"):
        combine(shares, [sched_lin(0, 1)] * 2)


# ---- 1cycle

@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_one_cycle_equals_torch(optimizer, seed):
    for _ in range(20):
        n, lr_max, pct = random.randint(10, 500), 10**random.uniform(-4, 1), random.uniform(.2, .9)
        div, final, low, high = random.uniform(1, 50), 10**random.uniform(0, 6), random.uniform(.5, .9), random.uniform(.9, .99)
        found = theirs(lr_scheduler.OneCycleLR, n, optimizer, max_lr=lr_max, total_steps=n, pct_start=pct, div_factor=div,
                       final_div_factor=final, base_momentum=low, max_momentum=high)
        sched = one_cycle(lr_max, div, div * final, (pct * n - 1) / (n - 1), (high, low, high))
        for name in ("lr", "momentum"):
            np.testing.assert_allclose([h[name] for h in ours(sched, n)], found[name], rtol=0, atol=1e-10)


def test_one_cycle_has_the_books_defaults():
    cycle = one_cycle(.06)
    assert cycle(0) == {"lr": .06 / 25, "momentum": .95}
    assert cycle(.25) == {"lr": .06, "momentum": .85}
    assert cycle(1) == {"lr": .06 / 1e5, "momentum": .95}
    assert one_cycle(.06, moms=None)(.25) == {"lr": .06}
    for pct in (0., 1.):
        assert max(one_cycle(1, pct_start=pct)(p)["lr"] for p in np.linspace(0, 1, 11)) == 1


@pytest.mark.parametrize("bad", [{"lr_max": 0}, {"lr_max": -1}, {"lr_max": math.nan}, {"lr_max": math.inf}, {"div": 0}, {"div_final": -1},
                                 {"pct_start": 1.1}, {"pct_start": -.1}, {"moms": (.9, .8)}, {"moms": (.9, 1., .9)},
                                 {"moms": (-.1, .9, .9)}])
def test_one_cycle_refuses(bad):
    with pytest.raises(ValueError, match=f"one_cycle got .*{next(iter(bad))}") as e:
        one_cycle(**{"lr_max": .1, **bad})
    assert str(e.value).count(". ") == 0 and str(e.value).endswith(".")


# ---- in a fit

@pytest.mark.parametrize("opt_func", [partial(optim.SGD, momentum=.9), optim.Adam, torch.optim.AdamW], ids=["sgd", "adam", "torch adamw"])
def test_fit_one_cycle(opt_func):
    learn = learner(opt_func=opt_func)
    learn.fit_one_cycle(3, .02, div=10, div_final=100, pct_start=.4, moms=(.9, .7, .8))
    n = 3 * len(learn.dls.train)
    wanted = ours(one_cycle(.02, 10, 100, .4, (.9, .7, .8)), n)
    np.testing.assert_allclose(learn.recorder.lrs, [w["lr"] for w in wanted], rtol=0, atol=1e-12)
    np.testing.assert_allclose(learn.recorder.moms, [w["momentum"] for w in wanted], rtol=0, atol=1e-12)
    group = learn.opt.param_groups[0]
    assert (group["betas"][0] if "betas" in group else group["momentum"]) == .9      # as before the fit


def test_fit_one_cycle_takes_the_learners_rate_and_callbacks_and_leaves_momentum():
    class Count(Callback):
        n = 0

        def before_step(self): self.n += 1
    learn, count = learner(opt_func=optim.SGD, lr=.03), Count()
    learn.fit_one_cycle(2, moms=None, cbs=count)
    n = 2 * len(learn.dls.train)
    assert max(learn.recorder.lrs) <= .03 and learn.recorder.lrs[0] == .03 / 25 and count.n == n
    assert set(learn.recorder.moms) == {0.}


def test_a_single_step_and_no_epoch():
    set_seed(0)
    x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    learn = Learner(DataLoaders([(x, y)], [(x, y)], classes=list("abc")), net(), progress=False)
    learn.fit_one_cycle(1, .1)
    assert list(learn.recorder.lrs) == [.1 / 25]
    learn.fit_one_cycle(0, .1)
    assert not learn.recorder.lrs


def test_momentum_that_an_optimiser_does_not_have():
    learn = learner(opt_func=torch.optim.Adagrad)
    with pytest.raises(ValueError, match="Adagrad has no setting 'momentum'"):
        learn.fit_one_cycle(1, .01)
    learn.fit_one_cycle(1, .01, moms=None)


def test_resumed_cycle_is_the_same(tmp_path):
    class Killed(Callback):
        order = 95

        def after_batch(self):
            if len(self.learn.recorder.lrs) == 11: raise KeyboardInterrupt
    whole = learner()
    whole.fit_one_cycle(3, .02)
    with pytest.raises(KeyboardInterrupt):
        learner().fit_one_cycle(3, .02, cbs=[Checkpoint(tmp_path / "c", every_batches=3), Killed])
    again = learner(1)                                      # other weights and random numbers: all of it comes from the file
    again.fit_one_cycle(3, .02, resume=tmp_path / "c")
    assert again.recorder.lrs == whole.recorder.lrs and again.recorder.moms == whole.recorder.moms
    for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_plot_sched(monkeypatch):
    drawn = []
    monkeypatch.setattr("course_lib.schedule.show_figure", lambda fig, alt, caption: drawn.append((fig, alt, caption)))
    learn = learner()
    with pytest.raises(ValueError, match="nothing to draw"):
        learn.recorder.plot_sched()
    learn.fit_one_cycle(2, .02)
    learn.recorder.plot_sched()
    fig, alt, caption = drawn.pop()
    assert [ax.get_ylabel() for ax in fig.axes] == ["learning rate", "momentum"]
    assert all(ax.get_xlabel() == "training batch" for ax in fig.axes)
    for ax, values in zip(fig.axes, (learn.recorder.lrs, learn.recorder.moms), strict=True):
        assert ax.lines[0].get_ydata().tolist() == list(values)
    assert "14 training batches" in alt and caption
    learn = learner(opt_func=torch.optim.Adagrad)
    learn.fit(1, .01)
    learn.recorder.plot_sched()
    assert [ax.get_ylabel() for ax in drawn.pop()[0].axes] == ["learning rate"]


# ---- the finder

def same(a, b) -> bool:
    "Equal to the last bit, through dicts, lists and tensors"
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b or (a != a and b != b)


def state(learn: Learner) -> dict:
    "Whatever a sweep could have changed, copied"
    model, opt = learn.model, learn.opt
    return copy.deepcopy({
        "parameters": dict(model.named_parameters()), "buffers": dict(model.named_buffers()),
        "grads": [p.grad for p in model.parameters()], "modes": [m.training for m in model.modules()],
        "opt": opt and opt.state_dict(), "random": learn._random_states(),
        "recorder": {k: v for k, v in vars(learn.recorder).items() if k not in ("learn", "waiting", "valid")},
        "place": [learn.epoch, learn.n_epoch, learn.iter, learn.n_iter], "cbs": [cb.name for cb in learn.cbs]})


class Kill(Callback):
    "Raises at a place of the third batch"
    def __init__(self, error: BaseException, event: str):
        self.error = error
        setattr(self, event, self.maybe)

    def maybe(self):
        if self.learn.iter == 2: raise self.error


OPTIMISERS = {"adamw": ADAMW, "sgd": partial(optim.SGD, momentum=.9), "torch adam": torch.optim.Adam}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_trace(name, trained):
    learn = learner(opt_func=OPTIMISERS[name])
    learn.model.register_buffer("aside", torch.zeros(2), persistent=False)
    if trained:
        learn.fit(2, .01)
        learn.model[1].eval()                               # odd modes, and gradients that somebody has left
        learn.model[0].weight.grad = torch.ones_like(learn.model[0].weight)
    before, objects = state(learn), [learn.model, learn.opt, *learn.model.parameters(), *learn.cbs]
    found = learn.lr_find(num_it=40, show_plot=False)
    assert found._fields == ("valley", "steep")
    assert same(state(learn), before)
    assert all(a is b for a, b in zip(objects, [learn.model, learn.opt, *learn.model.parameters(), *learn.cbs], strict=True))


@pytest.mark.parametrize("event", ["before_fit", "before_batch", "after_loss", "before_step", "after_batch"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_no_trace_after_an_error(error, event, capsys):
    learn = learner()
    learn.fit(1, .01)
    learn.iter = 2 if event == "before_fit" else learn.iter
    before = state(learn)
    with learn.added_cbs(Kill(error, event)):
        with pytest.raises(type(error)):
            learn.lr_find(show_plot=False)
    assert same(state(learn), before)
    learn.fit(1, .01)


def test_a_fit_after_the_finder_is_the_fit_without_it():
    results = []
    for find in (False, True):
        learn = learner()
        if find:
            learn.lr_find(num_it=30, show_plot=False)
        learn.fit_one_cycle(2, .01)
        results.append([learn.model.state_dict(), learn.recorder.values, learn.recorder.lrs])
    assert same(*results)


def test_closures_over_the_model_are_safe():
    "An opt_func or a loss that knows the parameters by name would reach the real ones"
    set_seed(0)
    model = net()
    learn = Learner(loaders(), model, progress=False,
                    opt_func=lambda ps, lr: optim.SGD([{"params": list(part.parameters())} for part in (model[:3], model[3:])], lr=lr),
                    loss_func=lambda pred, y: nn.functional.cross_entropy(pred, y) + 1e-3 * model[0].weight.square().sum())
    before = state(learn)
    _, losses = learn.lr_sweep(.01, 1., 20)
    assert same(state(learn), before) and learn.opt is None
    assert len(set(losses)) > 10 and min(losses) < losses[0]          # the copy did learn


def test_sweep_ignores_callbacks_that_speak_stop_or_save(tmp_path, capsys):
    set_seed(0)
    learn = Learner(loaders(), net(), cbs=[Checkpoint(tmp_path / "kept"), ShowGraph])
    path = tmp_path / "kept.safetensors"
    learn.fit(1, .01)
    kept, _ = path.read_bytes(), capsys.readouterr()
    lrs, losses = learn.lr_sweep(num_it=50)
    assert path.read_bytes() == kept and capsys.readouterr().out == "" and len(losses) > 20
    assert not learn.recorder.lrs == lrs


def test_sweep_rates_losses_and_other_callbacks():
    class Count(Callback):
        seen = 0

        def before_batch(self): self.seen += 1
    learn, count = learner(), Count()
    with learn.added_cbs(count):
        lrs, losses = learn.lr_sweep(1e-6, 1e-3, 30)
    assert count.seen == 0                                  # a copy of it took part
    np.testing.assert_allclose(lrs, ours(sched_exp(1e-6, 1e-3), 30), rtol=1e-12)
    assert len(losses) == 30 and all(map(math.isfinite, losses))      # over the end of several epochs, and not longer
    model = copy.deepcopy(learn.model).train()
    before = learn._random_states()
    xb, yb = next(iter(learn.dls.train))
    assert losses[0] == pytest.approx(nn.functional.cross_entropy(model(xb), yb).item(), abs=.3)  # dropout differs
    learn._set_random_states(before)


def test_sweep_equals_a_plain_loop():
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    batches = [(x[i:i + 16], y[i:i + 16]) for i in range(0, 64, 16)]
    model = nn.Linear(5, 3)
    learn = Learner(DataLoaders(batches, batches, classes=list("abc")), model, opt_func=torch.optim.SGD, progress=False)
    lrs, losses = learn.lr_sweep(1e-3, 1., 10)
    plain, wanted = copy.deepcopy(model), []
    for i in range(10):
        loss = nn.functional.cross_entropy(plain(batches[i % 4][0]), batches[i % 4][1])
        wanted.append(loss.item())
        grads = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for p, g in zip(plain.parameters(), grads, strict=True):
                p -= 1e-3 * 1000**(i / 9) * g
    np.testing.assert_allclose(losses, wanted, atol=1e-6)


def test_sweep_of_a_loader_without_length():
    class Stream:
        def __iter__(self):
            g = torch.Generator().manual_seed(0)
            return ((torch.randn(8, 1, 6, 6, generator=g), torch.arange(8) % 3) for _ in range(7))
    set_seed(0)
    learn = Learner(DataLoaders(Stream(), Stream(), classes=list("abc")), net(), progress=False)
    assert len(learn.lr_sweep(1e-6, 1e-3, 30)[1]) == 30


def test_sweep_stops_at_nan_and_at_divergence():
    learn = learner(opt_func=optim.SGD)
    lrs, losses = learn.lr_sweep(1e-3, 1e9, 200)
    assert len(losses) < 200
    assert diverged([1., math.nan]) and diverged([math.inf]) and not diverged([1.])
    assert not diverged([2.3, 2.4, 2.2, 1.5, .5, .6]) and diverged([2.3, 1., .5, .4, 3., 3., 3.])
    assert not diverged([-1., -2., -3., -2.9]) and diverged([-1., -2., -3., *[5.] * 10])      # a loss may be below 0
    assert not diverged([1., .1, .001, .002, .003])                                              # or nearly 0


@pytest.mark.parametrize("kw", [{"start_lr": 0}, {"start_lr": -1}, {"start_lr": 20.}, {"end_lr": math.inf}, {"num_it": 1}])
def test_sweeps_that_make_no_sense(kw):
    with pytest.raises(ValueError, match="makes no sense"):
        learner().lr_find(**kw)


def test_unknown_suggestion():
    with pytest.raises(ValueError, match="no suggestion 'minimum'; it has valley and steep"):
        learner().lr_find(suggestions=("minimum",))


def test_what_cannot_be_copied():
    learn = learner()
    learn.model.lock = __import__("threading").Lock()
    before = learn._random_states()
    with pytest.raises(RuntimeError, match="cannot be copied"):
        learn.lr_find()
    assert same(learn._random_states(), before) and learn.opt is None


def test_suggestions_on_a_known_curve(seed):
    lrs = [10**(-7 + 8 * i / 99) for i in range(100)]
    losses = [.4 + 2 / (1 + math.exp(4 * (math.log10(lr) + 2.5))) + random.gauss(0, .02) for lr in lrs]     # falls around 10**-2.5
    losses = [v if lr < .5 else 10 * lr for v, lr in zip(losses, lrs, strict=True)]
    x, y = descent(lrs, losses)
    assert .1 < x[-1] < 1.5 and len(x) == len(y)
    assert abs(math.log10(steep(x, y)) + 2.5) < .35 and -2.6 < math.log10(valley(x, y)) < -1
    assert steep([1.], [2.]) is None and valley([1.], [2.]) is None


def test_finder_draws_also_when_nothing_falls(monkeypatch):
    drawn = []
    monkeypatch.setattr("course_lib.schedule.show_figure", lambda fig, alt, caption: drawn.append((fig, alt)))
    found = learner().lr_find(num_it=30)
    fig, alt = drawn.pop()
    ax = fig.axes[0]
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "learning rate" and ax.get_ylabel() == "loss"
    assert all(f"{name} {getattr(found, name):.2g}" in alt for name in found._fields if getattr(found, name))
    monkeypatch.setattr(Learner, "lr_sweep", lambda *a: ([.1, .2, .4], [1., 2., 30.]))
    assert learner().lr_find() == (None, None) and "none" in drawn.pop()[1]


def test_one_suggestion_alone():
    found = learner().lr_find(num_it=30, suggestions=("steep",), show_plot=False)
    assert found._fields == ("steep",) and set(SUGGESTIONS) == {"valley", "steep"}


def test_torchs_loader_and_random_models_repeat():
    "Dropout and torch's own loader draw from the global generator, which is put back"
    set_seed(0)
    data = loaders().train.dataset
    dls = DataLoaders(torch.utils.data.DataLoader(data, 8, shuffle=True), DataLoader(data, 8), classes=list("abc"))
    learn = Learner(dls, net(), progress=False)
    assert learn.lr_sweep(1e-4, .1, 20) == learn.lr_sweep(1e-4, .1, 20)


def test_callbacks_that_cancel():
    class Never(Callback):
        def before_batch(self): raise CancelTrainException

    class EverySecond(Callback):
        order = -1

        def before_batch(self):
            if self.learn.iter % 2: raise CancelBatchException
    learn = learner()
    with learn.added_cbs(Never), pytest.raises(ValueError, match="no loss"):
        learn.lr_find(num_it=5)
    with learn.added_cbs(EverySecond):
        lrs, losses = learn.lr_sweep(1e-6, 1e-3, 7)
    assert len(lrs) == len(losses) == 4                     # one epoch, as for seven batches
    np.testing.assert_allclose(lrs, ours(sched_exp(1e-6, 1e-3), 7)[:4])
