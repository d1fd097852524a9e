"""What the exercises of chapter 06 tell the reader to expect, on real MNIST where pictures are involved."""
import itertools
import math
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.conv import ConvLayer, Flatten, conv_size, sequential
from course_lib.dataloader import get_dls
from course_lib.datasets import three_or_seven
from course_lib.learner import Learner, accuracy
from course_lib.settings import set_seed

pytestmark = pytest.mark.slow


@pytest.fixture
def real(real_pictures):
    return three_or_seven()


def one_cycle(progress: float, lr: float = .01, up: float = .25) -> dict[str, float]:
    t = progress / up if progress < up else (1 - progress) / (1 - up)
    bend = (1 - math.cos(math.pi * t)) / 2
    end = lr / 25 if progress < up else lr / 1e5
    return {"lr": end + (lr - end) * bend, "momentum": .95 - .1 * bend}


def results(make_model, data, epochs: int, seeds: int) -> list[float]:
    "The accuracy in validation for each seed"
    found = []
    for seed in range(seeds):
        set_seed(seed)
        learn = Learner(get_dls(64, data, seed=seed, device="cpu"), make_model(), metrics=accuracy, progress=False)
        learn.fit(epochs, .01, schedule=one_cycle)
        found.append(learn.recorder.values[-1][-1])
    print(sum(p.numel() for p in make_model().parameters()), "parameters", found)
    return found


def small_cnn(widths: list[int], layer=lambda ni, nf: nn.Conv2d(ni, nf, 3, 2, 1)) -> nn.Sequential:
    first, *rest = itertools.pairwise(widths)
    middle = [sequential(layer(*pair), nn.ReLU()) for pair in rest]
    return sequential(ConvLayer(*first, stride=2, norm_type=None), *middle, layer(widths[-1], 2), Flatten())


def test_1_a_kernel_for_corners():
    kernel = torch.full((3, 3), -.8)
    kernel[1:, 1:] = 1
    assert kernel.sum().abs() < 1e-6
    ink = torch.zeros(2, 2, 20, 20)                       # [corner and edges, ...]
    ink[0, 0, 10:, 10:] = ink[0, 1, 10:, :] = ink[1, 0, :, 10:] = 1
    pictures = torch.stack([ink[0, 0], ink[0, 1], ink[1, 0]])[:, None]
    corner, top, left = F.conv2d(pictures, kernel[None, None])[..., 2:-2, 2:-2].amax((1, 2, 3)).tolist()
    assert corner == pytest.approx(4) and max(top, left) == pytest.approx(2.4)


def test_2_padding_that_keeps_the_size():
    for k, d in itertools.product((1, 3, 5, 7), (1, 2, 3)):
        assert conv_size(28, k, 1, d * (k - 1) // 2, d) == 28
    assert all(conv_size(28, 4, 1, p) != 28 for p in range(10))


def test_3_the_matrix_of_top_edge_with_stride_2():
    picture = torch.eye(784).view(784, 1, 28, 28)
    assert F.conv2d(picture, torch.ones(1, 1, 3, 3), stride=2).flatten(1).T.shape == (169, 784)


def test_5_moves():
    def moves(stride, by):
        torch.manual_seed(0)
        conv, x = nn.Conv2d(1, 3, 3, stride, 1), torch.zeros(1, 1, 40, 40)
        x[..., 14:26, 14:26] = torch.rand(12, 12)
        moved = conv(torch.roll(x, (by, by), (2, 3)))
        return torch.allclose(torch.roll(conv(x), (by // stride, by // stride), (2, 3)), moved, atol=1e-5)
    assert all(moves(1, by) for by in range(-4, 5)) and [by for by in range(-4, 5) if moves(2, by)] == [-4, -2, 0, 2, 4]


def test_5_scores_of_a_three_that_has_moved(real):
    torch.manual_seed(0)
    net, three = small_cnn([1, 4, 8, 16, 32]), real.valid_x[:1, None].float() / 255
    assert not torch.allclose(net(three), net(torch.roll(three, 1, 3)), atol=1e-4)


def separable(ni: int, nf: int, stride: int = 2) -> nn.Sequential:
    return sequential(nn.Conv2d(ni, ni, 3, stride, 1, groups=ni), nn.Conv2d(ni, nf, 1))


def test_6_separable(real):
    weights = sum(p.numel() for p in separable(16, 32).parameters() if p.ndim == 4)
    assert weights == 656 and nn.Conv2d(16, 32, 3).weight.numel() == 4608
    found = results(lambda: small_cnn([1, 4, 8, 16, 32], separable), real, epochs=2, seeds=3)
    full = results(lambda: small_cnn([1, 4, 8, 16, 32]), real, epochs=2, seeds=3)
    assert fmean(found) == pytest.approx(.986, abs=.003) and fmean(full) == pytest.approx(.994, abs=.002)


def test_7_half_the_channels(real):
    net = small_cnn([1, 2, 4, 8, 16])
    assert sum(p.numel() for p in net.parameters()) == 1850
    assert fmean(results(lambda: small_cnn([1, 2, 4, 8, 16]), real, epochs=5, seeds=3)) > .99
