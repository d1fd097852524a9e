"""What the exercises of chapter 07 and their solutions state, on real MNIST where pictures are involved."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from answers import solutions
from torch import nn

from course_lib.activations import ActivationStats
from course_lib.checks import check_constant_loss, check_died_at, check_GradientStats, check_Leak, check_omen, check_relative_steps
from course_lib.conv import simple_cnn
from course_lib.dataloader import get_dls
from course_lib.datasets import mnist
from course_lib.learner import Callback, Learner, accuracy, default_opt
from course_lib.optim import SGD
from course_lib.settings import set_seed

real = pytest.mark.usefixtures("real_pictures")


@pytest.fixture
def seven():
    return solutions(7)


def right(check, *answers) -> None:
    for answer in answers:
        report = check.examine(answer)
        assert report.right, report.text


def test_1_constant_loss(seven):
    loss = seven["constant_loss"]
    assert loss(torch.bincount(mnist().train_y)) == pytest.approx(2.3012, abs=.00005)          # the counts of both sources
    assert loss(torch.full((10,), 7)) == pytest.approx(math.log(10)) and round(math.log(10), 4) == 2.3026
    assert loss(torch.tensor([99, 1])) == pytest.approx(.0560, abs=.00005) and round(math.log2(10), 2) == 3.32


def test_1_other_answers_are_right():
    def by_loop(counts):
        return -sum(n / sum(counts.tolist()) * math.log(n / sum(counts.tolist())) for n in counts.tolist() if n)

    def by_cross_entropy(counts):
        p = counts[counts > 0] / counts.sum()
        return float((p * F.cross_entropy(p.log().expand(len(p), -1), torch.arange(len(p), device=p.device), reduction="none")).sum())
    right(check_constant_loss, by_loop, by_cross_entropy)


def test_2_other_answers_are_right():
    def backwards(near_zero, limit=.999):
        n = len(near_zero)
        while n and near_zero[n - 1] >= limit:
            n -= 1
        return n if n < len(near_zero) else None

    def by_products(near_zero, limit=.999):
        stays = (near_zero >= limit).flip(0).int().cumprod(0).sum().item()
        return len(near_zero) - stays if stays else None
    right(check_died_at, backwards, by_products)


def test_3_other_answers_are_right():
    class GradientStats(Callback):                         # rows in a list of lists, on the device
        def __init__(self): self.norms = []

        def before_step(self):
            self.norms.append([p.grad.flatten().norm() for p in self.learn.model.parameters()])

    class InATensor(Callback):
        def before_fit(self):
            self.norms = torch.empty(0)

        def after_backward(self):
            row = torch.tensor([p.grad.pow(2).sum().sqrt() for p in self.learn.model.parameters()], device=self.learn.device)
            self.norms = torch.cat([self.norms.to(row.device), row[None]])
    right(check_GradientStats, GradientStats, InATensor)


def test_4_other_answers_are_right():
    class Larger(nn.Module):
        def __init__(self, slope=.1):
            super().__init__()
            self.register_buffer("slope", torch.tensor(slope))

        def forward(self, x):
            return torch.maximum(x, self.slope.to(x) * x)

    class Parts(nn.Module):
        def __init__(self, slope=.1):
            super().__init__()
            self.slope = slope

        def forward(self, x):
            return x.clamp(min=0) + self.slope * x.clamp(max=0)
    right(check_Leak, Larger, Parts)


def test_5_other_answers_are_right():
    def by_names(model, opt_func, xb, yb):
        old = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("weight")}
        opt = opt_func(list(model.parameters()))
        nn.CrossEntropyLoss()(model(xb), yb).backward()
        opt.step()
        return torch.tensor([torch.dist(model.state_dict()[k], v) / v.norm() for k, v in old.items()], device=xb.device)
    right(check_relative_steps, by_names)


def test_6_other_answers_are_right():
    def spread_of_scores(model, xb, yb):
        return -model(xb).std(0).mean().item()

    def negative_weights(model, xb, yb):
        return sum((w < 0).sum().item() for w in model[1][0].weight)

    def gradient(model, xb, yb):
        F.cross_entropy(model(xb), yb).backward()
        return -model[1][0].weight.grad.abs().sum().item()
    right(check_omen, spread_of_scores, negative_weights, gradient)


@pytest.mark.slow
@real
def test_3_the_gradient_is_exactly_zero(seven):
    learn = seven["begun"](0, 40, cbs=[seven["GradientStats"](), ActivationStats()])
    norms, near_zero = torch.stack(learn.gradient_stats.norms), learn.activation_stats.layer_stats(1).near_zero
    assert norms[0, 2] > 0 and (norms[30:, 2] == 0).all() and (near_zero[30:] >= .999).all()
    assert seven["died_at"](near_zero) <= 12


def accuracies(make_model, lr, seeds, opt_func=default_opt) -> list[float]:
    "After an epoch at batch 512, for each seed; 0 where the loss was no number"
    found = []
    for seed in range(seeds):
        set_seed(seed)
        learn = Learner(get_dls(512, mnist(), seed=seed), make_model(), metrics=accuracy, opt_func=opt_func, progress=False)
        try:
            learn.fit(1, lr)
            found.append(learn.recorder.values[-1][-1])
        except FloatingPointError:
            found.append(0.)
    print(lr, found)
    return found


@pytest.mark.slow
@real
def test_4_leaky_networks(seven):
    found = sorted(accuracies(partial(simple_cnn, act_cls=seven["Leak"]), .06, 10))
    assert found[3] > .7 and found[-1] < .969 and sum(a < .15 for a in found) <= 2
    assert min(accuracies(simple_cnn, .02, 3)) > .955


@pytest.mark.slow
@real
def test_5_first_steps(seven):
    def steps(opt_func, lr):
        set_seed(0)
        dls = get_dls(512, mnist(), seed=0, device="cpu")
        return seven["relative_steps"](simple_cnn(), partial(opt_func, lr=lr), *dls.one_batch())
    adam, sgd = steps(default_opt, .06), steps(SGD, 1.)
    assert adam[0].item() == pytest.approx(.48, abs=.02) and adam[-1].item() == pytest.approx(1.4, abs=.05)
    assert sgd[:4].max() < .006 and sgd[-1] < .03


@pytest.mark.slow
@real
def test_5_sgd_learns_less_in_an_epoch_and_fails_at_high_rates():
    low, best, high, adam = (accuracies(simple_cnn, lr, 3, opt) for lr, opt in ((.03, SGD), (.3, SGD), (1., SGD), (.006, default_opt)))
    assert max(low) < .5 and .75 < min(best) and max(best) < min(adam) and min(adam) > .95 and min(high) < .2
    assert all(.85 < a < min(adam) for a in accuracies(simple_cnn, .03, 3, partial(SGD, momentum=.9)))
