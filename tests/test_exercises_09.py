"""What the exercises of chapter 09 and their solutions tell the reader to expect, most of it on real MNIST"""
from dataclasses import replace
from functools import partial

import pytest
import torch
from answers import solutions
from torch import nn
from torch.utils.data import TensorDataset

import course_lib.schedule  # noqa: F401  (gives the Learner its fit_one_cycle)
from course_lib.batchnorm import digit_learner, five_looks
from course_lib.conv import NormType, simple_cnn
from course_lib.dataloader import Compose, DataLoader, DataLoaders, get_dls
from course_lib.datasets import mnist
from course_lib.learner import Hooks, Learner, accuracy, evaluating
from course_lib.optim import SGD
from course_lib.settings import set_seed

with_norms = partial(simple_cnn, norm_type=NormType.Batch)


def answer(name: str):
    return solutions(9)[name]


@pytest.fixture
def digits(real_pictures):
    return mnist()


def fit(make_model, dls, seed, lr, **kwargs) -> Learner:
    "One epoch at a constant rate, as in the chapter"
    set_seed(seed)
    dls.train.generator.manual_seed(seed)
    learn = Learner(dls, make_model(), metrics=accuracy, progress=False, **kwargs)
    learn.fit(1, lr)
    return learn


def reached(*args, **kwargs) -> float:
    return fit(*args, **kwargs).recorder.values[-1][-1]


def test_1_batches_to_forget():
    assert answer("batches_to_forget")() == 44 and .9**44 <= .01 < .9**43 and round(.9**43, 4) == .0108


def test_2_fold():
    set_seed(0)
    model = with_norms()
    for _ in range(20):
        model(torch.randn(32, 1, 28, 28) * 2 + 1)                     # moves the running averages
    x = torch.randn(16, 1, 28, 28)
    folded = nn.Sequential(*(nn.Sequential(answer("fold")(m[0], m[1]), *m[2:]) for m in model[:5]), nn.Flatten())
    with evaluating(model), evaluating(folded):
        torch.testing.assert_close(folded(x), model(x), atol=1e-4, rtol=0)
    assert sum(p.numel() for p in folded.parameters()) == 30_282


@pytest.mark.slow
def test_3_lsuv(digits):
    lsuv, dls = answer("lsuv"), get_dls(512, digits, seed=0)
    xb, _ = dls.one_batch()
    set_seed(0)
    model = lsuv(simple_cnn().to(dls.device), xb)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    with evaluating(model), Hooks(convs, lambda m, i, o: (o.mean().item(), o.std().item())) as hooks:
        model(xb)
    assert all(abs(mean) < .01 and abs(std - 1) < .01 for mean, std in hooks.stored)
    dead = simple_cnn().to(dls.device)
    for p in dead[0].parameters():
        nn.init.zeros_(p)
    assert all(p.isfinite().all() for p in lsuv(dead, xb).parameters())
    found = [reached(lambda: lsuv(simple_cnn().to(dls.device), xb), dls, seed, .1, opt_func=partial(SGD, momentum=.9)) for seed in range(2)]
    assert all(v > .95 for v in found)


def test_4_the_weights_at_the_start():
    set_seed(0)
    weight = [m for m in simple_cnn().modules() if isinstance(m, nn.Conv2d)][2].weight
    assert round(weight.std().item(), 2) == .05


@pytest.mark.slow
def test_4_how_high_the_rate_can_be(digits):
    dls = get_dls(512, digits, seed=0)
    assert reached(simple_cnn, dls, 0, .06) < .15 and min(reached(simple_cnn, dls, seed, .06) for seed in (1, 2)) > .85
    assert all(reached(simple_cnn, dls, seed, .2) < .15 for seed in range(3))
    assert reached(simple_cnn, dls, 0, 2) < .15
    assert .94 < min(reached(with_norms, dls, seed, .06) for seed in range(3))
    assert .88 < reached(with_norms, dls, 0, .5) < .95 and .3 < reached(with_norms, dls, 1, 2) < .8
    learn = fit(with_norms, dls, 0, .2, cbs=answer_class("Turns"))
    turns = learn.turns
    assert .93 < learn.recorder.values[-1][-1] < .97
    assert 70 < turns.angles[0] < 85 and sum(turns.angles[-10:]) / 10 < .5 and 11.5 < turns.lengths[-1] < 13.5


def answer_class(name: str) -> type:
    "A class that a solution's notebook defines in a cell beside the answers"
    from course_lib.run import ROOT, _code, read_notebook
    cells = map(_code, read_notebook(next((ROOT / "nbs" / "solutions").glob("09_*.ipynb")))["cells"])
    code = next(c for c in cells if c.startswith(f"class {name}("))
    names = dict(solutions(9))
    exec(code.split("\n\n")[0], names)
    return names[name]


def linear(train, valid, digits) -> float:
    mean, std = train.mean(0), train.std(0) + 1e-3
    set_seed(0)
    dls = DataLoaders(DataLoader(TensorDataset((train - mean) / std, digits.train_y), 512, shuffle=True, seed=0, drop_last=True),
                      DataLoader(TensorDataset((valid - mean) / std, digits.valid_y), 1000))
    learn = Learner(dls, nn.Linear(train.shape[1], 10), metrics=accuracy, progress=False)
    learn.fit_one_cycle(5, .01)
    return learn.recorder.values[-1][-1]


@pytest.mark.slow
def test_5_features_by_hand(digits):
    x, v = (torch.cat([answer("orientation_features")(p) for p in x.split(5000)]) for x in (digits.train_x, digits.valid_x))
    assert x.shape == (60_000, 392)
    assert .97 < linear(x, v, digits) < .985
    assert .91 < linear(digits.train_x.flatten(1) / 255, digits.valid_x.flatten(1) / 255, digits) < .93


def test_6_batchnorm_by_hand():
    torch.manual_seed(0)
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 2, 2), (3,), (3,))]
    assert torch.autograd.gradcheck(answer("fast_batch_norm"), args)


@pytest.mark.slow
def test_7_varied_pictures_and_a_vote(digits):
    part = replace(digits, train_x=digits.train_x[:12_000], train_y=digits.train_y[:12_000], valid_x=digits.train_x[50_000:],
                   valid_y=digits.train_y[50_000:])
    for vary in (False, True):
        probabilities, mistakes = 0, []
        for seed in range(3):
            learn = digit_learner(part, seed, width=16, progress=False)
            if vary:
                learn.dls.train.transform = Compose([answer("varied"), *learn.dls.train.transform.transforms])
            learn.fit_one_cycle(4, .01)
            found, targets = five_looks(learn)
            probabilities = probabilities + found
            mistakes.append((found.argmax(1) != targets).sum().item())
        vote = (probabilities.argmax(1) != targets).sum().item()
        assert 60 < min(mistakes) and max(mistakes) < 125 and 80 < sum(mistakes) / 3 < 100 and vote < sum(mistakes) / 3, (mistakes, vote)
