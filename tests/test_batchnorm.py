"""course_lib.batchnorm against PyTorch: norms, starts, shifts, averaged weights; and what it says to bad input"""
import copy
import math
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import course_lib.schedule  # noqa: F401
from course_lib.batchnorm import AverageWeights, BatchNorm, RandomShift, digit_learner, digit_net, five_looks, group_norm, init_kaiming
from course_lib.conv import NormType, simple_cnn
from course_lib.dataloader import Compose, DataLoader, DataLoaders, Normalize
from course_lib.datasets import ImageData
from course_lib.learner import CancelEpochException, CancelFitException, Callback, Checkpoint, Learner, accuracy

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])   # float64: not on MPS


def some(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def numbers(shape: tuple, dtype: torch.dtype, layout: str, device: str = "cpu") -> torch.Tensor:
    "Random numbers off zero in a chosen layout of memory"
    if layout == "strided":
        return torch.randn(*shape, 2, dtype=dtype, device=device)[..., 1] * 3 + 1
    if layout == "transposed" and len(shape) > 2:
        return (torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype, device=device) * 3 + 1).transpose(-1, -2)
    x = torch.randn(shape, dtype=dtype, device=device) * 3 + 1
    return x.to(memory_format=torch.channels_last) if layout == "channels last" and len(shape) == 4 else x


def close(a: torch.Tensor, b: torch.Tensor, limit: float) -> None:
    "Within `limit` of the largest number of `b`, and of 1"
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a.double() - b.double()).abs().max() <= limit * max(1., b.double().abs().max().item())


def shapes() -> list[tuple]:
    return [(some(2, 9), some(1, 7), *(some(1, 6) for _ in range(places))) for places in (0, 1, 2, 3)] + [(1, 4, 2, 3), (2, 3, 1, 1)]


OF = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@devices
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}, {"affine": False}, {"eps": .1, "momentum": .7}], ids=str)
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed", "channels last"])
def test_batchnorm_is_pytorchs(seed, layout, kwargs, device):
    for dtype, limit in LIMITS.items():
        for shape in shapes():
            ours, theirs = BatchNorm(shape[1], **kwargs).to(device, dtype), OF[len(shape)](shape[1], **kwargs).to(device, dtype)
            for p in ours.parameters():
                nn.init.normal_(p)
            theirs.load_state_dict(ours.state_dict())
            for _ in range(3):
                x = numbers(shape, dtype, layout, device)
                g, pair = torch.randn_like(x), []
                for m in (ours, theirs):
                    inp = x.clone(memory_format=torch.preserve_format).requires_grad_()
                    m.zero_grad()
                    out = m(inp)
                    out.backward(g)
                    pair.append([out, inp.grad, *(p.grad for p in m.parameters())])
                # two numbers a channel may have hardly any spread: what rounding left of their difference is divided by it
                var = x.transpose(0, 1).flatten(1).var(1, correction=0)
                scale = limit * max(1., (var + ours.eps).rsqrt().max().item()) * max(1., x.abs().max().item())
                for a, b in zip(*pair, strict=True):
                    close(a, b, scale)
            for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
                assert name == other
                close(a, b, limit)
            x = numbers(shape, dtype, layout, device)
            close(ours.eval()(x), theirs.eval()(x), limit)


def test_as_exact_as_pytorchs_where_numbers_lie_channels_last(seed):
    "There PyTorch adds up in float32 one after the other, so both are compared with float64"
    x = torch.relu(torch.randn(512, 8, 14, 14)).to(memory_format=torch.channels_last)
    exact = nn.BatchNorm2d(8).double()(x.double())
    error = {m: (m(x).double() - exact).abs().max().item() for m in (BatchNorm(8), nn.BatchNorm2d(8))}
    ours, theirs = error.values()
    assert ours < 3e-6 and ours < 2 * theirs


@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"momentum": None}], ids=str)
def test_gradcheck(seed, kwargs):
    for shape in ((5, 3), (3, 2, 4), (2, 3, 3, 2)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        m = BatchNorm(shape[1], **kwargs).double()
        assert torch.autograd.gradcheck(m, (x,)) and torch.autograd.gradcheck(m.eval(), (x,))
    assert torch.autograd.gradgradcheck(BatchNorm(3).double(), (torch.randn(4, 3, dtype=torch.float64, requires_grad=True),))


def test_a_network_trains_the_same_with_ours(seed):
    theirs = simple_cnn(norm_type=NormType.Batch).double()
    ours = copy.deepcopy(theirs)
    for name, m in theirs.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            ours.set_submodule(name, BatchNorm(m.num_features).double())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, y = torch.randn(16, 1, 28, 28, dtype=torch.float64), torch.randint(10, (16,))
    for model in (ours, theirs):
        opt = torch.optim.SGD(model.parameters(), .1)
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_half_precision_sums_in_full(seed):
    x = torch.randn(64, 3, 8, 8) * 2 + 5
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
        out = ours(x.to(dtype))
        assert out.dtype == dtype and ours.running_mean.dtype == torch.float32
        torch.testing.assert_close(out.float(), theirs(x.to(dtype).float()), atol=.03, rtol=.02)
        torch.testing.assert_close(ours.running_var, theirs.running_var, atol=1e-5, rtol=1e-5)


def test_state_is_a_modules(seed):
    m = BatchNorm(4)
    m(torch.randn(3, 4))
    assert [n for n, _ in m.named_buffers()] == ["running_mean", "running_var", "num_batches_tracked"]
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert all(a.equal(b) for a, b in zip(other.state_dict().values(), m.state_dict().values(), strict=True))
    assert repr(m) == "BatchNorm(4, eps=1e-05, momentum=0.1, affine=True)"
    before = copy.deepcopy(m.state_dict())
    m.eval()(torch.randn(3, 4))
    assert all(a.equal(b) for a, b in zip(before.values(), m.state_dict().values(), strict=True))
    with torch.no_grad():
        m.train()(torch.randn(3, 4))
    assert m.num_batches_tracked == 2 and not m.running_mean.equal(before["running_mean"])


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1), (0, 4, 3, 3)], ids=str)
def test_nothing_to_divide_by(shape):
    m = BatchNorm(4)
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match="no spread to divide by") as e:
        m(torch.randn(shape))
    assert str(e.value).count(". ") == 0
    assert all(a.equal(b) for a, b in zip(before.values(), m.state_dict().values(), strict=True))
    assert m.eval()(torch.randn(shape)).shape == shape


def test_one_picture_is_enough_where_it_has_places(seed):
    x = torch.randn(1, 4, 2, 1)
    torch.testing.assert_close(BatchNorm(4)(x), nn.BatchNorm2d(4)(x))


@pytest.mark.parametrize("x", [torch.zeros(3, 5, 2, 2), torch.zeros(4), torch.zeros(3, 4, dtype=torch.int64)], ids=str)
def test_wrong_input(x):
    with pytest.raises(ValueError, match=r"takes floats \[N, 4, ...\]"):
        BatchNorm(4)(x)


@pytest.mark.parametrize("layout", ["plain", "strided", "transposed", "channels last"])
def test_group_norm_is_pytorchs(seed, layout):
    for (dtype, limit), shape in product(LIMITS.items(), shapes()):
        c = shape[1]
        for groups in (g for g in range(1, c + 1) if c % g == 0):
            x = numbers(shape, dtype, layout)
            if x.numel() // len(x) // groups < 2:
                continue                                        # one number in a group: PyTorch refuses
            w, b, g = torch.randn(c, dtype=dtype), torch.randn(c, dtype=dtype), torch.randn_like(x)
            results = []
            for f in (group_norm, F.group_norm):
                args = [x.clone(memory_format=torch.preserve_format), w.clone(), b.clone()]
                [a.requires_grad_() for a in args]
                out = f(args[0], groups, args[1], args[2])
                out.backward(g)
                results.append([out, *(a.grad for a in args)])
            # a group of two numbers may have hardly any spread: what rounding left of their difference is divided by it
            var = x.reshape(len(x), groups, -1).var(2, correction=0)
            scale = limit * max(1., (var + 1e-5).rsqrt().max().item()) * max(1., x.abs().max().item())
            for ours, theirs in zip(*results, strict=True):
                close(ours, theirs, scale)
            close(group_norm(x, groups), F.group_norm(x, groups), scale)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: group_norm(x, 2), (x,))


@pytest.mark.parametrize("groups", [0, 3, 5, -1])
def test_groups_that_do_not_divide(groups):
    with pytest.raises(ValueError, match="cannot cut the channels of \\[2, 4, 3\\]"):
        group_norm(torch.zeros(2, 4, 3), groups)


def test_kaiming_is_pytorchs(seed):
    model = nn.Sequential(nn.Conv1d(3, 4, 5), nn.Conv2d(8, 6, 3, groups=2), nn.Conv3d(2, 3, 2, bias=False), nn.Linear(9, 4),
                          nn.BatchNorm1d(4))
    for a in (0., .1, 1.):
        torch.manual_seed(seed)
        assert init_kaiming(model, a) is model
        ours = [m.weight.clone() for m in model[:4]]
        torch.manual_seed(seed)
        for m, w in zip(model[:4], ours, strict=True):
            torch.testing.assert_close(nn.init.kaiming_normal_(m.weight, a), w)
    assert all((m.bias == 0).all() for m in model[:4] if m.bias is not None) and (model[4].weight == 1).all()


def test_kaiming_keeps_the_size(seed):
    model = init_kaiming(nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(256, 256), nn.ReLU()))))
    size = model(torch.randn(200, 256)).square().mean().sqrt()
    assert .2 < size < 4


def one_shift(x: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    "[C, H, W] moved by dy rows and dx columns, zeros come in: pixel by pixel"
    out, (_, h, w) = torch.zeros_like(x), x.shape
    for r, c in product(range(h), range(w)):
        if 0 <= r - dy < h and 0 <= c - dx < w:
            out[:, r, c] = x[:, r - dy, c - dx]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_shift(seed, dtype):
    x = torch.randint(1, 256, (40, 2, 7, 5)).to(dtype)
    before, shifted = x.clone(), RandomShift(2)(x)
    assert shifted.shape == x.shape and shifted.dtype == dtype and x.equal(before)
    found = set()
    for a, b in zip(x, shifted, strict=True):
        fits = [(dy, dx) for dy, dx in product(range(-2, 3), repeat=2) if one_shift(a, dy, dx).equal(b)]
        assert len(fits) == 1
        found |= set(fits)
    assert len(found) > 10 and min(min(f) for f in found) == -2 and max(max(f) for f in found) == 2
    torch.manual_seed(seed)
    again = RandomShift(2)(x)
    torch.manual_seed(seed)
    assert RandomShift(2)(x).equal(again) and RandomShift(0)(x).equal(x)
    assert RandomShift(2)(x.float().to(memory_format=torch.channels_last)).shape == x.shape


def test_random_shift_before_normalize():
    shift, normalize = RandomShift(1), Normalize(.1, .3)
    both, black = Compose([shift, normalize]), torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    assert both(black).equal(normalize(black)) and repr(shift) == "RandomShift(1)"
    torch.testing.assert_close(both.decode(normalize(black)), black.float(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="give 0 or more"):
        RandomShift(-1)


@devices
def test_random_shift_on_the_device(seed, device):
    x = torch.randint(0, 256, (5, 1, 6, 6), dtype=torch.uint8)
    torch.manual_seed(seed)
    here = RandomShift(1)(x)
    torch.manual_seed(seed)
    assert RandomShift(1)(x.to(device)).cpu().equal(here)


def small_dls() -> DataLoaders:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=g), torch.randint(3, (40,), generator=g)
    return DataLoaders(DataLoader(TensorDataset(x, y), 8, shuffle=True, seed=1), DataLoader(TensorDataset(x, y), 20))


def small_learner(**kwargs) -> Learner:
    torch.manual_seed(0)
    return Learner(small_dls(), nn.Sequential(nn.Linear(6, 5), BatchNorm(5), nn.ReLU(), nn.Linear(5, 3)), lr=.05, progress=False, **kwargs)


class Follow(Callback):
    "All floating tensors of the model after each step, and what validation sees"
    order = 10

    def before_fit(self):
        self.steps, self.validated = [], []

    def tensors(self):
        return [t.clone() for t in self.learn.model.state_dict().values() if t.is_floating_point()]

    def after_step(self): self.steps.append(self.tensors())

    def after_loss(self):
        if not self.learn.training:
            self.validated.append(self.tensors())


def by_hand(steps: list, over: float) -> list:
    average = steps[0]
    for k, now in enumerate(steps[1:], 1):
        average = [a + (n - a) / (1 + over * k) for a, n in zip(average, now, strict=True)]
    return average


@pytest.mark.parametrize("over", [0, .1, .5, 1])
def test_average_of_weights(over):
    plain = small_learner(cbs=Follow)
    plain.fit(2)
    learn = small_learner(cbs=[Follow, AverageWeights(over)])
    learn.fit(2)
    assert all(a.equal(b) for p, q in zip(plain.follow.steps, learn.follow.steps, strict=True) for a, b in zip(p, q, strict=True))
    for a, b in zip(by_hand(learn.follow.steps, over), learn.follow.tensors(), strict=True):
        torch.testing.assert_close(a, b)
    if over == 1:
        for column, b in zip(zip(*learn.follow.steps, strict=True), learn.follow.tensors(), strict=True):
            torch.testing.assert_close(torch.stack(column).mean(0), b)
    for a, b in zip(by_hand(learn.follow.steps[:5], over), learn.follow.validated[0], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("over", [1.1, -.1])
def test_over_is_a_share(over):
    with pytest.raises(ValueError, match="it is a share"):
        AverageWeights(over)


@pytest.mark.parametrize("cancel", [CancelEpochException, CancelFitException])
def test_a_validation_that_breaks_off_leaves_no_average_in_training(cancel):
    class Leave(Callback):
        def after_loss(self):
            if not self.learn.training and self.learn.epoch == 0:
                raise cancel
    learn = small_learner(cbs=[Follow, AverageWeights(.9), Leave])
    learn.fit(2)
    plain = small_learner(cbs=Follow)
    plain.fit(2)
    steps = learn.follow.steps
    assert all(a.equal(b) for p, q in zip(plain.follow.steps[:len(steps)], steps, strict=True) for a, b in zip(p, q, strict=True))
    for a, b in zip(by_hand(steps, .9), learn.follow.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_averaged_run_is_resumed_exactly(tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if self.learn.training and (self.learn.epoch, self.learn.iter) == (1, 2):
                raise RuntimeError("power cut")
    whole = small_learner(cbs=AverageWeights(.8))
    whole.fit(3)
    path = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        small_learner(cbs=[AverageWeights(.8), Checkpoint(path, every_batches=1), Stop]).fit(3)
    learn = small_learner(cbs=[AverageWeights(.8), Checkpoint(path, every_batches=1)])
    learn.fit(3, resume=path)
    for a, b in zip(learn.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert a.equal(b)


def few_digits(n: int = 64) -> ImageData:
    g = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, 256, (n, 28, 28), generator=g, dtype=torch.uint8), torch.arange(n) % 10
    return ImageData(x, y, x[:20], y[:20], [str(i) for i in range(10)], "drawn", "noise")


def test_digit_net():
    net = digit_net(16, 7)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert sum(p.numel() for p in digit_net().parameters()) == 288_682
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))


def test_digit_learner_is_seeded():
    runs = []
    for _ in range(2):
        learn = digit_learner(few_digits(), 5, width=16, batch_size=16, progress=False)
        learn.fit_one_cycle(1, .01)
        runs.append((learn.recorder.losses.tolist(), five_looks(learn)[0]))
    assert runs[0][0] == runs[1][0] and runs[0][1].equal(runs[1][1])
    assert digit_learner(few_digits(), batch_size=16, shift=0).dls.train.transform.transforms[0].pixels == 0


def test_five_looks_are_five(seed):
    learn = digit_learner(few_digits(), 5, width=16, batch_size=16, progress=False)
    mode = learn.model.training
    preds, targets = five_looks(learn)
    assert learn.model.training == mode and targets.equal(few_digits().valid_y)
    torch.testing.assert_close(preds.sum(1), torch.ones(20))
    x = torch.cat([xb for xb, _ in learn.dls.valid])
    looks = []
    for dy, dx in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        rows, columns = (torch.arange(28) - dy).clamp(0, 27), (torch.arange(28) - dx).clamp(0, 27)
        looks.append(x[:, :, rows][..., columns])
    learn.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(preds, sum(learn.model(look).softmax(1) for look in looks) / 5, atol=1e-5, rtol=1e-4)
    assert math.isclose((preds.argmax(1) == targets).float().mean(), accuracy(preds, targets))
