"""What the exercises of chapter 09 tell the reader to expect (their cells are the reader's to fill, so no cell asserts it)."""
import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import course_lib.schedule  # noqa: F401  (gives the Learner its fit_one_cycle)
from course_lib.conv import NormType, simple_cnn
from course_lib.dataloader import DataLoader, DataLoaders, get_dls
from course_lib.datasets import mnist
from course_lib.learner import Hook, Hooks, Learner, accuracy, evaluating
from course_lib.optim import SGD
from course_lib.settings import set_seed


@pytest.fixture
def digits(real_pictures):
    return mnist()


def fit(make_model, dls, seed, lr, **kwargs) -> float:
    "The accuracy after one epoch at a constant rate, as in the chapter"
    set_seed(seed)
    dls.train.generator.manual_seed(seed)
    learn = Learner(dls, make_model(), metrics=accuracy, progress=False, **kwargs)
    learn.fit(1, lr)
    return learn.recorder.values[-1][-1]


def test_batches_to_forget():
    def batches_to_forget(momentum=.1, share=.01):
        return math.ceil(math.log(share) / math.log(1 - momentum))
    assert batches_to_forget() == 44
    assert .9**44 <= .01 < .9**43 and batches_to_forget(.5) == 7


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    folded, scale = copy.deepcopy(conv), norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        folded.weight.mul_(scale[:, None, None, None])
        folded.bias.copy_((conv.bias - norm.running_mean) * scale + norm.bias)
    return folded


def test_fold():
    set_seed(0)
    model = simple_cnn(norm_type=NormType.Batch)
    for _ in range(20):
        model(torch.randn(32, 1, 28, 28) * 2 + 1)                     # moves the running averages
    x = torch.randn(16, 1, 28, 28)
    folded = nn.Sequential(*(nn.Sequential(fold(m[0], m[1]), *m[2:]) for m in model[:5]), nn.Flatten())
    with evaluating(model), evaluating(folded):
        torch.testing.assert_close(folded(x), model(x), atol=1e-4, rtol=0)
    assert sum(p.numel() for p in folded.parameters()) == 30_282


def lsuv(model: nn.Module, xb: torch.Tensor) -> nn.Module:
    for m in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        with Hook(m, lambda m, i, o: o) as hook, torch.no_grad():
            for _ in range(5):
                model(xb)
                if hook.stored.std() > 0:
                    m.weight /= hook.stored.std()
                    model(xb)
                    m.bias -= hook.stored.mean()
    return model


@pytest.mark.slow
def test_lsuv(digits):
    dls = get_dls(512, digits, seed=0)
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
    found = [fit(lambda: lsuv(simple_cnn().to(dls.device), xb), dls, seed, .1, opt_func=partial(SGD, momentum=.9)) for seed in range(2)]
    assert all(v > .95 for v in found)


@pytest.mark.slow
def test_how_high_the_rate_can_be(digits):
    dls = get_dls(512, digits, seed=0)
    assert fit(partial(simple_cnn, norm_type=NormType.Batch), dls, 0, .2) > .9
    assert fit(simple_cnn, dls, 0, .2) < .15


def orientation_features(x: torch.Tensor) -> torch.Tensor:
    p = F.pad(x[:, None].float() / 255, [1] * 4)
    dx, dy = p[:, 0, 1:-1, 2:] - p[:, 0, 1:-1, :-2], p[:, 0, 2:, 1:-1] - p[:, 0, :-2, 1:-1]
    bins = (torch.atan2(dy, dx) / (2 * math.pi) % 1 * 8).long().clamp(max=7)
    h = torch.zeros(len(x), 8, 28, 28).scatter_(1, bins[:, None], (dx**2 + dy**2).sqrt()[:, None])
    h = F.avg_pool2d(h, 4).flatten(1)
    return h / (h.norm(dim=1, keepdim=True) + 1e-6)


@pytest.mark.slow
def test_features_by_hand(digits):
    x, v = (torch.cat([orientation_features(p) for p in x.split(5000)]) for x in (digits.train_x, digits.valid_x))
    assert x.shape == (60_000, 392)
    mean, std = x.mean(0), x.std(0) + 1e-3
    set_seed(0)
    dls = DataLoaders(DataLoader(TensorDataset((x - mean) / std, digits.train_y), 512, shuffle=True, seed=0, drop_last=True),
                      DataLoader(TensorDataset((v - mean) / std, digits.valid_y), 1000))
    learn = Learner(dls, nn.Linear(392, 10), metrics=accuracy, progress=False)
    learn.fit_one_cycle(5, .01)
    assert .97 < learn.recorder.values[-1][-1] < .985


def test_batchnorm_by_hand():
    class FastBatchNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, eps):
            dims = (0, 2, 3)
            x_hat = x - x.mean(dims, keepdim=True)
            scale = (x_hat.square().mean(dims, keepdim=True) + eps).rsqrt()
            x_hat = x_hat * scale
            ctx.save_for_backward(x_hat, scale * weight[:, None, None])
            return x_hat * weight[:, None, None] + bias[:, None, None]

        @staticmethod
        def backward(ctx, grad):
            x_hat, scale = ctx.saved_tensors
            g, gx = grad.mean((0, 2, 3), keepdim=True), (grad * x_hat).mean((0, 2, 3), keepdim=True)
            n = grad.numel() // grad.shape[1]
            return scale * (grad - g - x_hat * gx), gx.flatten() * n, g.flatten() * n, None
    torch.manual_seed(0)
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 2, 2), (3,), (3,))]
    assert torch.autograd.gradcheck(lambda x, w, b: FastBatchNorm.apply(x, w, b, 1e-5), args)
