"""What the exercises of chapter 07 tell the reader to expect, on real MNIST."""
import math

import pytest
import torch

from course_lib.activations import ActivationStats
from course_lib.conv import simple_cnn
from course_lib.dataloader import get_dls
from course_lib.datasets import mnist
from course_lib.learner import Callback, Learner
from course_lib.settings import set_seed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_pictures")]


def watched(seed: int, batches: int, cbs) -> Learner:
    "The first batches of a run of the chapter at batch 64"
    class Enough(Callback):
        def before_batch(self):
            if self.learn.training and self.learn.iter == batches:
                raise KeyboardInterrupt
    set_seed(seed)
    learn = Learner(get_dls(64, mnist(), seed=seed, device="cpu"), simple_cnn(), cbs=[*cbs, Enough()], progress=False)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, .06)
    return learn


def test_07_constant_loss():
    def loss(counts: torch.Tensor) -> float:
        p = counts / counts.sum()
        return -torch.special.xlogy(p, p).sum().item()
    assert loss(torch.bincount(mnist().train_y)) == pytest.approx(2.3012, abs=.00005)
    assert loss(torch.full((10,), 7)) == pytest.approx(math.log(10)) and round(math.log(10), 4) == 2.3026
    assert loss(torch.tensor([99, 1])) == pytest.approx(.0560, abs=.00005)


def test_07_the_gradient_is_exactly_zero():
    class GradientStats(Callback):
        def before_fit(self): self.norms = []

        def after_backward(self):
            self.norms.append(torch.stack(torch._foreach_norm([p.grad for p in self.learn.model.parameters()])))
    learn = watched(0, 40, [GradientStats(), ActivationStats()])
    norms, near_zero = torch.stack(learn.gradient_stats.norms), learn.activation_stats.layer_stats(1).near_zero
    assert norms[0, 2] > 0 and (norms[30:, 2] == 0).all() and (near_zero[30:] >= .999).all()
