"""What the exercises of chapter 06 and their solutions state, on real MNIST where pictures are involved."""
import itertools
from functools import partial
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from answers import solutions
from torch import nn

from course_lib.checks import (
    check_conv1d,
    check_corner_kernel,
    check_matrix_by_hand,
    check_moves_along,
    check_same_padding,
    check_separable,
    check_smallest_net,
)
from course_lib.conv import conv_size
from course_lib.datasets import three_or_seven


@pytest.fixture
def real(real_pictures):
    return three_or_seven()


@pytest.fixture
def six():
    return solutions(6)


def n_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def accuracies(make_model, data, seeds: int = 3, **settings) -> list[float]:
    "In validation, for each seed"
    found = [solutions(6)["trained"](make_model, data, seed=seed, **settings).recorder.values[-1][-1] for seed in range(seeds)]
    print(n_params(make_model()), "parameters", found)
    return found


def held_back(data):
    "The training pictures alone, 2,000 of them for validation"
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:2000], order[2000:]
    return type(data)(data.train_x[rest], data.train_y[rest], data.train_x[held], data.train_y[held],
                      classes=data.classes, source=data.source, name="held back")


def test_1_a_kernel_for_corners(six):
    kernel, i = six["corner_kernel"](), torch.arange(20)
    ink = torch.stack([(i[:, None] > 9) & (i > 9), (i[:, None] > 9).expand(20, 20), i[:, None] + i > 19]).float()[:, None]
    answers = F.conv2d(ink, kernel[None, None]).amax((1, 2, 3)).tolist()
    assert answers == pytest.approx([4, 2.4, 3]) and kernel.sum().abs() < 1e-6


@pytest.mark.parametrize("kernel", [
    [[-1, -1, -1], [-1, 1.25, 1.25], [-1, 1.25, 1.25]], [[0, -4, -4], [-4, 4, 4], [-4, 4, 4]], [[-4, -4, -4], [-4, 5, 5], [-4, 5, 5]]])
def test_1_other_kernels_are_right(kernel):
    report = check_corner_kernel.examine(lambda: torch.tensor(kernel))
    assert report.right, report.text


def test_2_padding_that_keeps_the_size(six):
    for k, d in itertools.product((1, 3, 5, 7), (1, 2, 3)):
        assert conv_size(28, k, 1, six["same_padding"](k, d), d) == 28
    assert six["same_padding"](7, 3) == 9 and all(conv_size(28, 4, 1, p) != 28 for p in range(10))


def test_2_other_paddings_are_right():
    def odd_only(kernel_size, dilation=1):
        if kernel_size % 2 == 0:
            raise ValueError("even")
        return kernel_size // 2 * dilation
    assert check_same_padding.examine(odd_only).right


def test_3_the_matrix_of_top_edge_with_stride_2(six):
    assert six["matrix_by_hand"](torch.ones(3, 3), 28, 28, 2).shape == (169, 784)


def test_3_other_matrices_are_right():
    def by_loops(kernel, rows, columns, stride=1):
        found = []
        for i in range(0, rows - len(kernel) + 1, stride):
            for j in range(0, columns - kernel.shape[1] + 1, stride):
                row = torch.zeros(rows, columns, device=kernel.device)
                row[i:i + len(kernel), j:j + kernel.shape[1]] = kernel
                found.append(row.flatten())
        return torch.stack(found)

    def by_pictures(kernel, rows, columns, stride=1):
        eye = torch.eye(rows * columns, device=kernel.device).view(-1, rows, columns)
        windows = eye.unfold(1, kernel.shape[0], stride).unfold(2, kernel.shape[1], stride)
        return (windows * kernel).sum((3, 4)).flatten(1).T
    assert check_matrix_by_hand.examine(by_loops).right and check_matrix_by_hand.examine(by_pictures).right


def test_4_other_convolutions_are_right():
    def by_loop(x, weight, stride=1):
        k = weight.shape[2]
        return torch.stack([(x[:, None, :, i:i + k] * weight).sum((2, 3)) for i in range(0, x.shape[2] - k + 1, stride)], 2)

    def by_einsum(x, weight, stride=1):
        return torch.einsum("nclk,ock->nol", x.unfold(2, weight.shape[2], stride), weight)
    assert check_conv1d.examine(by_loop).right and check_conv1d.examine(by_einsum).right


def test_5_moves(six):
    moves, conv = six["moves_along"], partial(nn.Conv2d, 1, 3, 3, padding=1)
    assert all(moves(conv(), by, -by) for by in range(-4, 5))
    assert [by for by in range(-4, 5) if moves(conv(stride=2), by, 0, 2)] == [-4, -2, 0, 2, 4]


def test_5_other_experiments_are_right():
    def on_one_point(layer, rows, columns, stride=1):
        x, y = torch.zeros(2, 1, 1, 64, 64)
        x[..., 32, 32] = y[..., 32 + rows, 32 + columns] = 1
        if rows % stride or columns % stride:
            return False
        a, b = layer(x), layer(y)
        return bool(((a.roll((rows // stride, columns // stride), (-2, -1)) - b).abs() < 1e-5).all())

    def in_doubles(layer, rows, columns, stride=1):
        x = torch.zeros(1, 1, 40, 44)
        x[0, 0, 14:24, 14:24] = torch.rand(10, 10)
        down, across = rows // stride, columns // stride
        moved = layer(x).detach().numpy().astype("float64")
        there = layer(torch.roll(x, (rows, columns), (2, 3))).detach().numpy()
        if rows != down * stride or columns != across * stride:
            return False
        h, w = moved.shape[2:]
        return all(abs(moved[0, c, i, j] - there[0, c, (i + down) % h, (j + across) % w]) < 1e-4
                   for c in range(moved.shape[1]) for i in range(h) for j in range(w))
    for answer in (on_one_point, in_doubles):
        report = check_moves_along.examine(answer)
        assert report.right, report.text


def test_6_separable_counts(six):
    weights = sum(p.numel() for p in six["separable"](16, 32, 2).parameters() if p.ndim == 4)
    assert weights == 656 and nn.Conv2d(16, 32, 3).weight.numel() == 4608
    assert n_params(six["separable_cnn"]()) == 1434 and n_params(six["small_cnn"]()) == 6722


def test_6_other_layers_are_right():
    class Two(nn.Module):
        def __init__(self, ni, nf, stride):
            super().__init__()
            self.mix = nn.Conv2d(ni, nf, 1, bias=False)                # made first, called last
            self.each = nn.Conv2d(ni, ni, 3, stride, padding=1, groups=ni, bias=False)

        def forward(self, x):
            return self.mix(self.each(x))

    def stride_at_the_end(ni, nf, stride=1):
        return nn.Sequential(nn.Conv2d(ni, ni, 3, 1, 1, groups=ni), nn.Conv2d(ni, nf, 1, stride))
    for answer in (lambda ni, nf, stride=1: Two(ni, nf, stride), stride_at_the_end):
        report = check_separable.examine(answer)
        assert report.right, report.text


def test_7_other_small_nets_are_right(six):
    half = partial(six["small_cnn"], (1, 2, 4, 8, 16))
    assert n_params(half()) == 1850
    for net in (half, lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 2))):
        report = check_smallest_net.examine(net)
        assert report.right, report.text


@pytest.mark.slow
def test_6_separable_on_real_digits(six, real):
    found, full = accuracies(six["separable_cnn"], real), accuracies(six["small_cnn"], real)
    assert fmean(found) == pytest.approx(.986, abs=.003) and fmean(full) == pytest.approx(.994, abs=.002)


@pytest.mark.slow
def test_7_half_the_channels(six, real):
    assert fmean(accuracies(partial(six["small_cnn"], (1, 2, 4, 8, 16)), real, epochs=5)) > .99


@pytest.mark.slow
def test_7_the_smallest_net(six, real):
    assert n_params(six["smallest_net"]()) == 206
    assert fmean(accuracies(six["smallest_net"], real, seeds=5, epochs=5, lr=.03)) == pytest.approx(.9917, abs=.001)
    assert fmean(accuracies(six["smallest_net"], held_back(real), epochs=5, lr=.03)) == pytest.approx(.992, abs=.002)
