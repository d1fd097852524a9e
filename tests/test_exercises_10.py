"""What the exercises of chapter 10 and their solutions state (the chapter's own cells are the reader's to fill, so no cell asserts it)."""
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from answers import solutions
from torch import nn

import course_lib.schedule  # noqa: F401  (gives the Learner its fit_one_cycle)
from course_lib.conv import ConvLayer, receptive_field, sequential
from course_lib.dataloader import get_dls
from course_lib.datasets import drawn_scenes, mnist
from course_lib.learner import Learner, accuracy
from course_lib.settings import set_seed


def test_conv1x1_gives_gradients():
    conv1x1 = solutions(10)["conv1x1"]
    set_seed(0)
    args = [torch.randn(s, requires_grad=True, dtype=torch.float64) for s in ((2, 3, 5, 4), (4, 3, 1, 1), (4,))]
    assert torch.autograd.gradcheck(partial(conv1x1, stride=2), args)


def test_top_k_accuracy():
    top_k_accuracy = solutions(10)["top_k_accuracy"]
    set_seed(0)
    scores, targets = torch.randn(2000, 10), torch.randint(10, (2000,))
    assert top_k_accuracy(scores, targets, 1) == accuracy(scores, targets)
    assert top_k_accuracy(scores, targets, 10) == top_k_accuracy(scores, targets, 12) == 1
    assert abs(top_k_accuracy(scores, targets) - .5) < .05               # chance


def test_small_pooled_net_is_small_and_sees_the_digit():
    net = solutions(10)["small_pooled_net"]()
    assert sum(p.numel() for p in net.parameters()) == 15_554 < 20_000
    assert receptive_field(net[:4])[-1] == 31
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("real_pictures")
def test_small_pooled_net_reads_digits():
    dls = get_dls(128, mnist(), seed=0)
    set_seed(0)
    learn = Learner(dls, solutions(10)["small_pooled_net"](), metrics=accuracy, progress=False)
    learn.fit_one_cycle(2, 1e-2)
    assert learn.recorder.values[-1][-1] > .98
    right, around, left = (learn.validate([(F.pad(x, sides, value=x.min().item()), y) for x, y in dls.valid])[1]
                           for sides in ([0, 4, 0, 4], [2] * 4, [4, 0, 4, 0]))
    assert right > .95 and .6 < around < .85 and left < .3


def test_pre_activation_passes_the_input_on():
    set_seed(0)
    x = torch.randn(2, 8, 5, 5)
    block = solutions(10)["PreActPair"](8)
    nn.init.zeros_(block.convs[-1].weight)
    assert block(x).equal(x)                                             # negative numbers, too


def test_drop_path():
    set_seed(0)
    x = torch.rand(4000, 2, 3, 3) + .5
    drop = solutions(10)["DropPath"](.25)
    y = drop(x)
    gone = (y == 0).flatten(1)
    assert (gone.all(1) == gone.any(1)).all() and abs(gone.all(1).float().mean() - .25) < .03      # whole pictures
    assert abs(y.mean() / x.mean() - 1) < .03
    torch.testing.assert_close(y[~gone.all(1)], x[~gone.all(1)] / .75)
    assert drop.eval()(x).equal(x)


def test_find_border_of_the_chapters_depths():
    assert solutions(10)["find_border"]({10: [.207], 22: [.567], 34: [.859]}) == (10, 22)


def deep_net(pairs: int, pair: Callable[[int], nn.Module], *end: nn.Module) -> nn.Module:
    "The chapter's net for comparing depths: four convolutions of stride 2, pairs after all but the first"
    layers = [ConvLayer(3, 8, stride=2)]
    for ni, nf in ((8, 16), (16, 32), (32, 64)):
        layers += [ConvLayer(ni, nf, stride=2), *[pair(nf) for _ in range(pairs)]]
    return sequential(*layers, *end, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def in_a_row(nf: int) -> nn.Module:
    "The chapter's `Pair` without a skip"
    return sequential(ConvLayer(nf, nf), ConvLayer(nf, nf, act_cls=None), nn.ReLU())


def training_error(make_net: Callable[[], nn.Module]) -> float:
    "On the first thousand of 3,200 drawn scenes, after five epochs with seed 0, as in the chapter's race"
    scenes = drawn_scenes()
    data = replace(scenes, train_x=scenes.train_x[:3200], train_y=scenes.train_y[:3200], valid_x=scenes.valid_x[:500],
                   valid_y=scenes.valid_y[:500])
    dls = get_dls(40, data, seed=0)
    seen = [(dls.train.transform(x), y) for x, y in zip(data.train_x[:1000].split(100), data.train_y[:1000].split(100), strict=True)]
    set_seed(0)
    learn = Learner(dls, make_net(), metrics=accuracy, progress=False)
    learn.fit_one_cycle(5, 3e-3)
    return 1 - learn.validate(seen)[1]


@pytest.mark.slow
def test_sixteen_convolutions_in_a_row_are_worse_than_ten():
    ten, sixteen = (training_error(partial(deep_net, pairs, in_a_row)) for pairs in (1, 2))
    assert .1 < ten < sixteen - .03 < .5


@pytest.mark.slow
def test_pre_activation_trains_34_convolutions():
    pair = solutions(10)["PreActPair"]
    assert .2 < training_error(lambda: deep_net(5, pair, nn.BatchNorm2d(64), nn.ReLU())) < .5
