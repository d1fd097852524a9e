"ChannelsLast: where it is used, that its trial leaves no trace, and that a run in this format is resumed exactly"
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from course_lib.dataloader import DataLoader, DataLoaders
from course_lib.learner import Callback, ChannelsLast, Checkpoint, Learner, accuracy
from course_lib.optim import SGD, AdamW
from course_lib.settings import random_state, set_seed


def loaders(n: int = 96, bs: int = 16, channels: int = 1) -> DataLoaders:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, channels, 12, 12, generator=g), torch.randint(0, 4, (n,), generator=g)
    data = TensorDataset(x, y)
    return DataLoaders(DataLoader(data, bs, shuffle=True, seed=1, device="cpu"), DataLoader(data, 32, device="cpu"))


def net(norm: bool = True, nf: int = 8, dropout: float = .2) -> nn.Sequential:
    layers = [nn.Conv2d(1, nf, 3, padding=1), *[nn.BatchNorm2d(nf)] * norm, nn.ReLU(), nn.Conv2d(nf, nf, 3, stride=2, padding=1),
              nn.ReLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nf, 4)]
    return nn.Sequential(*layers)


class Viewing(nn.Module):
    "Works for channels first only, as many models that people write do"
    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(.2))
        self.linear = nn.Linear(8 * 144, 4)

    def forward(self, x):
        x = self.convs(x)
        return self.linear(x.view(len(x), -1))


def learner(model: nn.Module, **kwargs) -> Learner:
    return Learner(loaders(), model, metrics=accuracy, progress=False, **kwargs)


def is_last(model: nn.Module) -> bool:
    "Whether all convolutions have their channels last (a weight with one channel in or out tells nothing)"
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and min(m.weight.shape[1:]) > 1]
    return all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    return all(v.equal(w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_used_where_a_batch_outweighs_the_weights():
    small, large = nn.Sequential(net(), nn.Identity()), net(nf=256)      # 18,432 activations and 648 weights; 592,128 weights
    for model, bs, expected in [(small, 16, True), (large, 1, False)]:
        learn = Learner(loaders(8, bs), model, progress=False)
        learn.fit(1, .01)
        assert is_last(model) is expected


def test_can_be_left_out():
    model = net()
    learn = learner(model, channels_last=False)
    learn.fit(1, .01)
    assert not is_last(model) and not any(isinstance(cb, ChannelsLast) for cb in learn.cbs)


def test_a_model_that_needs_channels_first_keeps_them_and_its_results_bit_for_bit():
    models = []
    for channels_last in (True, False):
        set_seed(0)
        models.append(Viewing())
        learner(models[-1], channels_last=channels_last).fit(2, .01)
    assert not is_last(models[0]) and equal_states(*models)


def test_the_trial_draws_no_random_number_and_touches_no_buffer():
    set_seed(0)
    learn = learner(net())
    before, loader = random_state(), learn.dls.train.generator.get_state()
    buffers = [b.clone() for b in learn.model.buffers()]
    seen = []

    class Look(Callback):
        def before_epoch(self) -> None:
            seen.append((random_state(), learn.dls.train.generator.get_state(), [b.clone() for b in learn.model.buffers()]))
    learn.fit(1, .01, cbs=Look)
    (state, generator, later), = seen
    assert is_last(learn.model) and state["torch"].equal(before["torch"]) and state["python"] == before["python"]
    assert generator.equal(loader) and all(a.equal(b) for a, b in zip(buffers, later, strict=True))


def test_without_batch_norm_and_dropout_only_the_last_digits_change():
    models = []
    for channels_last in (True, False):
        set_seed(0)
        models.append(net(norm=False, dropout=0))
        learner(models[-1], opt_func=SGD, channels_last=channels_last).fit(1, .1)
    assert is_last(models[0]) and not is_last(models[1])
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_format_that_the_user_chose_stays():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 256, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 4))
    model.to(memory_format=torch.channels_last)
    Learner(loaders(2, 1, 3), model, progress=False).fit(1, .01)          # of itself it would not: 22,784 activations, 149,184 weights
    assert is_last(model)


class Stop(Callback):
    def after_batch(self) -> None:
        if self.learn.training and (self.learn.epoch, self.learn.iter) == (1, 2):
            raise RuntimeError("the power went off")


@pytest.mark.parametrize("opt_func", [partial(SGD, momentum=.9), AdamW, partial(torch.optim.AdamW, foreach=True)],
                         ids=["SGD", "AdamW", "torch"])
def test_resumed_bit_for_bit(tmp_path, opt_func):
    def start() -> Learner:
        set_seed(2)
        return learner(net(), opt_func=opt_func)
    whole = start()
    whole.fit(3, .02)
    broken = start()
    with pytest.raises(RuntimeError, match="power"):
        broken.fit(3, .02, cbs=[Checkpoint(tmp_path / "run", every_batches=2), Stop])
    torch.rand(7)
    again = start()
    again.fit(3, .02, resume=tmp_path / "run")
    assert is_last(again.model) and equal_states(whole.model, again.model) and whole.recorder.values == again.recorder.values
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        for v, w in zip(whole.opt.state[p].values(), again.opt.state[q].values(), strict=True):
            assert torch.equal(torch.as_tensor(v), torch.as_tensor(w))
            assert not isinstance(v, torch.Tensor) or v.stride() == w.stride()
