"""What the exercises of chapter 10 tell the reader to expect (their cells are the reader's to fill, so no cell asserts it)."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import course_lib.schedule  # noqa: F401  (gives the Learner its fit_one_cycle)
from course_lib.conv import ConvLayer, receptive_field, sequential
from course_lib.dataloader import get_dls
from course_lib.datasets import mnist
from course_lib.learner import Learner, accuracy
from course_lib.resnet import pooled_net
from course_lib.settings import set_seed


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    out = torch.einsum("nchw,kc->nkhw", x[:, :, ::stride, ::stride], weight[:, :, 0, 0])
    return out if bias is None else out + bias[:, None, None]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_conv1x1(stride, with_bias):
    set_seed(stride)
    x, weight = torch.randn(2, 5, 7, 8), torch.randn(4, 5, 1, 1)
    bias = torch.randn(4) if with_bias else None
    torch.testing.assert_close(conv1x1(x, weight, bias, stride), F.conv2d(x, weight, bias, stride), atol=1e-5, rtol=1e-5)


def top_k_accuracy(scores: Tensor, targets: Tensor, k: int = 5) -> Tensor:
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == targets[:, None]).any(1).float().mean()


def test_top_k_accuracy():
    set_seed(0)
    scores, targets = torch.randn(2000, 10), torch.randint(10, (2000,))
    assert top_k_accuracy(scores, targets, 1) == accuracy(scores, targets)
    assert top_k_accuracy(scores, targets, 10) == top_k_accuracy(scores, targets, 12) == 1
    assert abs(top_k_accuracy(scores, targets) - .5) < .05               # chance


def small_pooled_net() -> nn.Module:
    return pooled_net(partial(ConvLayer, stride=2), widths=(8, 16, 32, 32), channels=1)


def test_small_pooled_net_is_small_and_sees_the_digit():
    net = small_pooled_net()
    assert sum(p.numel() for p in net.parameters()) < 20_000
    assert receptive_field(net[:4])[-1] >= 28
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("real_pictures")
def test_small_pooled_net_reads_digits():
    dls = get_dls(128, mnist(), seed=0)
    set_seed(0)
    learn = Learner(dls, small_pooled_net(), metrics=accuracy, progress=False)
    learn.fit_one_cycle(2, 1e-2)
    assert learn.recorder.values[-1][-1] > .98
    right, around, left = (learn.validate([(F.pad(x, sides, value=x.min().item()), y) for x, y in dls.valid])[1]
                           for sides in ([0, 4, 0, 4], [2] * 4, [4, 0, 4, 0]))
    assert right > .95 and .6 < around < .85 and left < .3


class PreActPair(nn.Module):
    def __init__(self, nf: int):
        super().__init__()
        self.convs = sequential(*[m for _ in range(2) for m in (nn.BatchNorm2d(nf), nn.ReLU(),
                                                                nn.Conv2d(nf, nf, 3, padding=1, bias=False))])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


def test_pre_activation_passes_the_input_on():
    set_seed(0)
    x = torch.randn(2, 8, 5, 5)
    block = PreActPair(8)
    nn.init.zeros_(block.convs[-1].weight)
    assert block(x).equal(x)                                             # negative numbers, too


class DropPath(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * (torch.rand(len(x), 1, 1, 1, device=x.device) >= self.p) / (1 - self.p)


def test_drop_path():
    set_seed(0)
    x = torch.rand(4000, 2, 3, 3) + .5
    drop = DropPath(.25)
    y = drop(x)
    gone = (y == 0).flatten(1)
    assert (gone.all(1) == gone.any(1)).all() and abs(gone.all(1).float().mean() - .25) < .03      # whole pictures
    assert abs(y.mean() / x.mean() - 1) < .03
    torch.testing.assert_close(y[~gone.all(1)], x[~gone.all(1)] / .75)
    assert drop.eval()(x).equal(x)
