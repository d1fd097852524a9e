"""What the exercises of chapter 08 tell the reader to expect, on real MNIST; their cells are the reader's to fill, so no cell asserts it"""
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from course_lib.conv import simple_cnn
from course_lib.dataloader import get_dls
from course_lib.learner import Callback, Learner, accuracy
from course_lib.schedule import combine, one_cycle, sched_cos, sched_lin
from course_lib.settings import set_seed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_pictures")]


def digit_learner(seed: int) -> Learner:
    set_seed(seed)
    return Learner(get_dls(512, seed=seed, device="cpu"), simple_cnn(), metrics=accuracy, progress=False)


def accuracies(learn: Learner) -> list[float]:
    return [values[2] for values in learn.recorder.values]


def test_1_a_power():
    def sched_poly(start, end, power):
        return lambda p: end + (start - end) * (1 - p)**power
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=.1)
    sched, found = lr_scheduler.PolynomialLR(opt, total_iters=49, power=2), []
    for _ in range(50):
        found.append(opt.param_groups[0]["lr"])
        opt.step(), sched.step()
    np.testing.assert_allclose(found, [sched_poly(.1, 0, 2)(i / 49) for i in range(50)], atol=1e-12)
    assert sched_poly(1, 0, 1)(.3) == pytest.approx(sched_lin(1, 0)(.3))


def test_2_how_far_it_goes():
    def distance(schedule, n):
        return sum(schedule(i / (n - 1))["lr"] for i in range(n))
    line = combine([.25, .75], [sched_lin(1 / 25, 1), sched_lin(1, 1e-5)])
    warm_up = sum(one_cycle(1.)(i / 116)["lr"] for i in range(29)) / distance(one_cycle(1.), 117)
    assert distance(one_cycle(1.), 117) / 117 == pytest.approx(.505, abs=.005)
    assert distance(lambda p: {"lr": line(p)}, 117) / 117 == pytest.approx(.505, abs=.005)
    assert warm_up == pytest.approx(.25, abs=.02)


def test_3_warm_restarts():
    def restarts(lr_max, cycles):
        rate = combine([1 / cycles] * cycles, [sched_cos(lr_max, 0)] * cycles)
        return lambda p: {"lr": rate(p)}
    three, one = digit_learner(0), digit_learner(0)
    three.fit(3, schedule=restarts(.01, 3))
    one.fit(3, schedule=restarts(.01, 1))
    assert abs(accuracies(three)[-1] - accuracies(one)[-1]) < .005
    assert min(accuracies(three)[-1], accuracies(one)[-1]) > .975


def test_4_schedule_what_the_optimiser_does_not_own():
    class ScheduleDropout(Callback):
        def __init__(self, sched): self.sched = sched

        def before_fit(self):
            self.layers = [(m, m.p) for m in self.learn.model.modules() if isinstance(m, nn.Dropout)]

        def before_batch(self):
            if self.learn.training:
                for m, _ in self.layers: m.p = self.sched(self.learn.pct_train)

        def cleanup(self):
            for m, p in self.layers: m.p = p

    class Look(Callback):
        order, seen = 10, ()

        def before_batch(self):
            if self.learn.training: self.seen += (self.learn.model[1].p,)
    learn, look = digit_learner(0), Look()
    learn.model = nn.Sequential(nn.Flatten(), nn.Dropout(.3), nn.Linear(784, 10), nn.Dropout(.1))
    learn.fit(1, .01, cbs=[ScheduleDropout(sched_lin(.5, 0)), look])
    np.testing.assert_allclose(look.seen, np.linspace(.5, 0, 117), atol=1e-12)
    assert (learn.model[1].p, learn.model[3].p) == (.3, .1)


def test_5_how_high_can_you_go():
    found = {}
    for peak in (.03, .06, .24, .48):
        learn = digit_learner(0)
        learn.fit_one_cycle(1, peak)
        found[peak] = accuracies(learn)[-1]
    assert found[.03] > .96 and found[.06] > .96 and found[.48] < .9
