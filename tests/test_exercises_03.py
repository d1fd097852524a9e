"""What the exercises of chapter 03 and their solutions tell the reader to expect."""
import math

import pytest
import torch
from answers import solutions
from torch import Tensor

from course_lib.optim import SGD

answers = solutions(3)


@pytest.fixture
def coaster() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    "The roller-coaster's times, speeds, first parameters and table of inputs, as the chapter draws them"
    torch.manual_seed(42)
    time = torch.arange(0, 20).float()
    speed = torch.randn(20) * 3 + .75 * (time - 9.5)**2 + 1
    return time, speed, torch.randn(3), torch.stack([time**2, time, torch.ones(20)], 1)


def test_1_eight_digits_and_the_error_of_a_wide_step():
    x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nudged = {h: answers["numerical_gradient"](lambda x: (x**3).sum(), x, h) for h in (1e-5, .1)}
    assert ((nudged[1e-5] - 3 * x**2).abs() < 1e-8 * (1 + 3 * x**2)).all()
    torch.testing.assert_close(nudged[.1], 3 * x**2 + .1**2)


def test_2_the_limit(coaster):
    time, speed, start, X = coaster
    limit = answers["largest_stable_rate"](X.double())
    assert f"{limit:.2e}" == "3.54e-05"

    def after(share, steps=50):
        params = start.double()
        for _ in range(steps):
            params = params - share * limit * 2 / 20 * X.double().T @ (X.double() @ params - speed)
        return ((X.double() @ params - speed)**2).mean()
    assert after(.99) < after(0) < after(1.01)


def test_3_the_gradient_in_portions(coaster):
    time, speed, start, _ = coaster
    for portions in (1, 2, 3, 20):
        gradient = answers["accumulated_gradient"](start.clone().requires_grad_(), time, speed, portions)
        torch.testing.assert_close(gradient, torch.tensor([-53195.86, -3419.71, -253.89]), atol=.05, rtol=1e-6)


def test_4_stops_near_677(coaster):
    _, speed, start, X = coaster
    params = start.clone().requires_grad_()
    losses = answers["train_until"](params, lambda p: ((X @ p - speed)**2).mean(), SGD([params], lr=1e-5), 10, 1e-3)
    assert len(losses) - 1 == 17 and losses[-1] == pytest.approx(676.9, abs=.05)


def test_5_rmsprop(coaster):
    _, speed, start, X = coaster
    ends = []
    for opt_class in (answers["RMSprop"], torch.optim.RMSprop):
        params = start.clone().requires_grad_()
        opt = opt_class([params])
        for _ in range(100):
            opt.zero_grad()
            ((X @ params - speed)**2).mean().backward()
            opt.step()
        ends.append(params.detach())
    torch.testing.assert_close(*ends)


def steps(kappa: float, momentum: float, lr: float, most: int = 4000) -> float:
    "Steps from a loss of 100 to below .001 for good"
    p = torch.tensor([-10., 10 / math.sqrt(kappa)], dtype=torch.float64).requires_grad_()
    opt, curvature, last = torch.optim.SGD([p], lr, momentum=momentum), torch.tensor([1., kappa], dtype=torch.float64), 0
    for n in range(most):
        loss = (curvature * p**2).sum() / 2
        if loss >= 1e-3:
            last = n
        opt.zero_grad()
        loss.backward()
        opt.step()
    return last + 1 if last < most - 1 else math.inf


@pytest.mark.parametrize(("kappa", "momentum", "theory", "plain"), [(25, .444, 23, 70), (100, .669, 50, 276), (1000, .881, 178, 2730)])
def test_6_theory_and_plain_descent(kappa, momentum, theory, plain):
    pair = answers["best_momentum"](kappa)
    assert pair[0] == pytest.approx(momentum, abs=5e-4) and steps(kappa, *pair, 400) == theory
    assert min(steps(kappa, 0., share * 2 / kappa, plain + 300) for share in (.94, .96, .99)) == pytest.approx(plain, rel=.02)


def test_6_a_little_more_momentum_is_quicker():
    assert answers["best_momentum"](25) == pytest.approx((.44, .11), abs=.005)
    assert steps(25, .5, .1, 400) == 18 < steps(25, *answers["best_momentum"](25), 400)
