"""What the exercises of chapter 08 and their solutions tell the reader to expect, most of it on real MNIST"""
import functools
from statistics import median

import pytest
import torch
from answers import solutions
from torch import nn
from torch.optim import lr_scheduler

from course_lib.conv import simple_cnn
from course_lib.dataloader import get_dls
from course_lib.learner import Learner, accuracy
from course_lib.optim import SGD
from course_lib.schedule import combine, descent, one_cycle, sched_lin, valley
from course_lib.settings import set_seed

real = pytest.mark.usefixtures("real_pictures")


def answer(name: str):
    return solutions(8)[name]


def digit_learner(seed: int, bs: int = 512, **kwargs) -> Learner:
    set_seed(seed)
    return Learner(get_dls(bs, seed=seed, device="cpu"), simple_cnn(), metrics=accuracy, progress=False, **kwargs)


def accuracies(learn: Learner) -> list[float]:
    return [values[2] for values in learn.recorder.values]


def one_epoch(peak: float, seed: int, pct_start: float = .25) -> float:
    learn = digit_learner(seed)
    learn.fit_one_cycle(1, peak, pct_start=pct_start)
    return accuracies(learn)[-1]


def test_1_a_power():
    sched_poly = answer("sched_poly")
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=.1)
    sched, found = lr_scheduler.PolynomialLR(opt, total_iters=49, power=2), []
    for _ in range(50):
        found.append(opt.param_groups[0]["lr"])
        opt.step(), sched.step()
    assert found == pytest.approx([sched_poly(.1, 0, 2)(i / 49) for i in range(50)], abs=1e-12)
    assert sched_poly(1, 0, 1)(.3) == pytest.approx(sched_lin(1, 0)(.3)) and sched_poly(1, 0, 2)(.5) == .25


def test_2_how_far_it_goes():
    distance = answer("distance")
    line = combine([.25, .75], [sched_lin(1 / 25, 1), sched_lin(1, 1e-5)])
    assert distance(lambda p: {"lr": 1}, 117) == 117
    assert round(distance(one_cycle(1.), 117), 1) == round(distance(lambda p: {"lr": line(p)}, 117), 1) == 58.6
    warm_up = sum(one_cycle(1.)(i / 116)["lr"] for i in range(29)) / distance(one_cycle(1.), 117)
    assert warm_up == pytest.approx(.25, abs=.01)


def test_3_values_of_warm_restarts():
    schedule = answer("restarts")(1, 2)
    assert round(schedule(.2)["lr"], 5) == .65451 and schedule(.5)["lr"] == 1


@real
@pytest.mark.slow
def test_3_warm_restarts():
    three, one = digit_learner(0), digit_learner(0)
    three.fit(3, schedule=answer("restarts")(.01, 3))
    one.fit(3, schedule=answer("restarts")(.01, 1))
    assert abs(accuracies(three)[-1] - accuracies(one)[-1]) < .005
    assert min(accuracies(three)[-1], accuracies(one)[-1]) > .975
    assert all(a < b for a, b in zip(accuracies(three)[:2], accuracies(one)[:2], strict=True))


def test_4_schedule_what_the_optimiser_does_not_own():
    seen, x = [], torch.ones(4, 3)
    learn = Learner(get_dls_of(6, x), nn.Sequential(nn.Dropout(.3), nn.Linear(3, 2), nn.Dropout(.1)), device="cpu", progress=False)
    learn.model[0].register_forward_pre_hook(lambda m, i: seen.append(m.p) if m.training else None)
    learn.fit(1, .01, cbs=answer("ScheduleDropout")(sched_lin(.5, 0)))
    assert seen == pytest.approx([.5, .4, .3, .2, .1, 0]) and (learn.model[0].p, learn.model[2].p) == (.3, .1)


def get_dls_of(n: int, x: torch.Tensor):
    from course_lib.dataloader import DataLoaders
    return DataLoaders([(x, torch.zeros(len(x), dtype=torch.int64))] * n, [(x, torch.zeros(len(x), dtype=torch.int64))])


@real
@pytest.mark.slow
def test_5_how_high_can_you_go():
    found = {peak: one_epoch(peak, 0) for peak in (.03, .06, .48)}
    assert found[.03] > .96 and found[.06] > .96 and found[.48] < .9
    assert answer("highest_peak")(one_epoch, (.12, .24)) == .12
    assert all(.95 < one_epoch(.12, seed) < .965 for seed in range(3))
    assert all(one_epoch(.12, seed, pct_start=.5) < .2 for seed in range(3))
    assert answer("highest_peak")(functools.partial(one_epoch, pct_start=.5), (.06, .12)) == .06


@real
@pytest.mark.slow
def test_6_finder_against_search():
    "Two of the six cases: the suggestions of the table, and that its best peaks are better than their neighbours"
    for kwargs, best, suggested in (({"opt_func": functools.partial(SGD, momentum=.9)}, .128, (.320, .153)), ({}, .016, (.008, .009))):
        sweeps = [descent(*digit_learner(seed, 256, **kwargs).lr_sweep()) for seed in range(3)]
        for rule, rate in zip((valley, answer("my_suggestion")), suggested, strict=True):
            assert median(rule(*sweep) for sweep in sweeps) == pytest.approx(rate, rel=.3)
        found = {}
        for peak in (best / 2, best, 2 * best):
            learn = digit_learner(0, 256, **kwargs)
            learn.fit_one_cycle(1, peak)
            found[peak] = accuracies(learn)[-1]
        assert max(found, key=found.get) == best and found[best] == pytest.approx({.128: .970, .016: .982}[best], abs=.003)
