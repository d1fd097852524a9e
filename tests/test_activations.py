"""ActivationStats against PyTorch's own statistics: any shape and layout, interrupted fits, resumed fits, odd models."""
import random

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from course_lib.activations import BINS, NEAR_ZERO, ActivationStats, _Layer, dead_units, output_stats
from course_lib.conv import simple_cnn
from course_lib.dataloader import DataLoader, DataLoaders
from course_lib.learner import Callback, CancelBatchException, CancelFitException, Checkpoint, Learner

SEED = random.randrange(2**31)


@pytest.fixture(autouse=True)
def seeded():
    print("seed", SEED)                                # shown when a test fails
    torch.manual_seed(SEED)


def digits_like(n: int = 40, bs: int = 8, **kwargs) -> DataLoaders:
    "Random pictures with random labels: training in 5 batches of 8, unless said otherwise"
    data = TensorDataset(torch.randn(n, 1, 28, 28), torch.randint(10, (n,)))
    return DataLoaders(DataLoader(data, bs, seed=0, **kwargs), DataLoader(data, bs), classes=[str(i) for i in range(10)])


def learner(model: nn.Module | None = None, cbs=(), dls: DataLoaders | None = None, **kwargs) -> Learner:
    return Learner(dls or digits_like(), model or simple_cnn(), cbs=cbs, progress=False, device="cpu", **kwargs)


class Outputs(Callback):
    "All outputs of some modules in training, kept whole"
    def before_fit(self):
        self.all = {m: [] for m in self.learn.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        self.handles = [m.register_forward_hook(self.note) for m in self.all]

    def note(self, module, inputs, output):
        if module.training:
            self.all[module].append(output.detach().clone())

    def cleanup(self):
        for h in self.handles:
            h.remove()


def reference(x: torch.Tensor) -> tuple[float, float, float]:
    x = x.double()
    return x.mean().item(), x.std().item(), (x <= NEAR_ZERO).double().mean().item()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


# ---- the numbers

@pytest.mark.parametrize("shape", [(1, 2), (3, 1000), (50, 77), (2, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_stats_are_pytorchs(shape, dtype):
    x = torch.randn(shape, dtype=dtype) * 4 + 3
    found = output_stats(x, with_hist=True)
    torch.testing.assert_close(found[:, 0], x.mean(1))
    torch.testing.assert_close(found[:, 1], x.std(1))
    torch.testing.assert_close(found[:, 2], (x <= .05).to(dtype).mean(1))
    torch.testing.assert_close(found[:, 3:], torch.stack([torch.histc(r, BINS, 0, 10) for r in x]))
    torch.testing.assert_close(output_stats(x), found[:, :3], rtol=0, atol=0)


def test_output_stats_of_a_non_contiguous_tensor():
    x = torch.randn(300, 6).T
    torch.testing.assert_close(output_stats(x, True), output_stats(x.contiguous(), True))


def test_the_edge_of_near_zero_counts():
    x = torch.tensor([[-3., 0., .05, .0500001, 1., 20.]])
    assert output_stats(x)[0, 2] == .5
    assert output_stats(x, True)[0, 3:].sum() == 4               # 0, .05, .0500001 and 1


def test_a_mean_far_from_zero_costs_no_precision():
    x = torch.randn(3, 2000) + 1000
    torch.testing.assert_close(output_stats(x)[:, 1], x.double().std(1).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_numbers_that_are_none_do_not_break_the_histogram(bad):
    x = torch.full((2, 100), 5.)
    x[1, 7] = bad
    found = output_stats(x, True)
    assert found[0, 3 + 20] == 100 and found[1, 3 + 20] == 99 and found[1, 3:].sum() == 99
    assert found[0, 0] == 5 and (abs(bad) == 1e30 or not found[1, 0].isfinite())


# ---- the record of a fit

@pytest.mark.parametrize("channels_last", [True, False])
def test_every_number_counted_is_exact(channels_last):
    learn = learner(cbs=[ActivationStats(with_hist=True, sample=None), Outputs()], channels_last=channels_last)
    learn.fit(2, .01)
    stats = learn.activation_stats
    assert stats.n == 10 and len(stats.names) == 5
    for i, outputs in enumerate(learn.outputs.all.values()):
        for b, x in enumerate(outputs):
            for value, known in zip(stats.layer_stats(i), reference(x), strict=True):
                assert value[b].item() == pytest.approx(known, rel=1e-5, abs=1e-6)
            torch.testing.assert_close(stats.hist(i)[:, b].expm1(), torch.histc(x.contiguous(), BINS, 0, 10), rtol=1e-4, atol=1e-3)


def test_a_sample_is_spread_over_channels_places_and_items():
    for shape in ((64, 8, 14, 14), (512, 16, 7, 7), (64, 64, 2, 2), (3, 7, 11, 13), (64, 49, 7, 7)):
        x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        layer = _Layer(2048, False, 1)
        layer.note(x, 0)
        taken = layer.waiting[0].long()
        places = [(taken // s) % n for n, s in zip(shape, x.stride(), strict=True)]
        assert 2048 <= len(taken) <= 2 * 2048 + 2048 or len(taken) == x.numel()
        assert [len(p.unique()) for p in places] == list(shape)
        for p, n in zip(places, shape, strict=True):              # and evenly so
            seen = torch.bincount(p, minlength=n).float()
            assert seen.max() <= 1.5 * seen.mean() + 2


@pytest.mark.parametrize("shape", [(64, 8, 14, 14), (256, 1000), (32, 100, 48)])
def test_a_sample_agrees_with_the_whole(shape):
    x = torch.randn(shape).cumsum(-1)                            # neighbours are alike
    layer, n = _Layer(2048, False, 1), 2048
    layer.note(x, 0)
    layer.count(1)
    mean, std, near = layer.kept[0].tolist()
    m, s, z = reference(x)
    assert abs(mean - m) < 5 * s / n**.5 and abs(std / s - 1) < .15 and abs(near - z) < 5 * .5 / n**.5


@pytest.mark.parametrize("make", [
    lambda: torch.randn(6, 8, 5, 5)[:, ::2], lambda: torch.randn(5, 6).T, lambda: torch.randn(1, 4).expand(9, 4),
    lambda: torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)[:, :, 1:], lambda: torch.randn(2, 3, 4, 5, 6).transpose(1, 4)])
def test_outputs_with_gaps_in_memory(make):
    x, layer = make(), _Layer(None, False, 1)
    layer.note(x, 0)
    layer.count(1)
    torch.testing.assert_close(layer.kept[0].double(), torch.tensor(reference(x), dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_batches_of_different_size():
    learn = learner(cbs=[ActivationStats(sample=None), Outputs()], dls=digits_like(21, 8))       # 8, 8, 5
    learn.fit(2, .01)
    stats = learn.activation_stats
    assert stats.n == 6
    for i, outputs in enumerate(learn.outputs.all.values()):
        assert [len(x) for x in outputs] == [8, 8, 5] * 2
        torch.testing.assert_close(stats.layer_stats(i).mean, torch.stack([x.mean() for x in outputs]))


def test_watching_changes_nothing():
    def weights(cbs):
        torch.manual_seed(1)
        learn = learner(cbs=cbs, dls=digits_like(shuffle=True))
        learn.fit(2, .01)
        return list(learn.model.parameters()), torch.rand(1)
    (a, ra), (b, rb) = weights([]), weights([ActivationStats(with_hist=True)])
    assert all(x.equal(y) for x, y in zip(a, b, strict=True)) and ra.equal(rb)


def test_every_second_batch():
    learn = learner(cbs=[ActivationStats(sample=None, every=2), Outputs()])
    learn.fit(2, .01)                                             # 10 batches: 0, 2, 4, 6, 8
    outputs = next(iter(learn.outputs.all.values()))[::2]
    torch.testing.assert_close(learn.activation_stats.layer_stats(0).mean, torch.stack([x.mean() for x in outputs]))


def test_more_batches_than_expected():
    dls = digits_like(64 * 3, 1)
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), [ActivationStats(sample=None), Outputs()],
                    DataLoaders(list(dls.train), dls.valid, classes=dls.classes))
    learn.fit(1, .01)                                             # more rows than wait together
    torch.testing.assert_close(learn.activation_stats.layer_stats(0).mean,
                               torch.stack([x.mean() for x in next(iter(learn.outputs.all.values()))]))


class Stream:
    "Batches without a length"
    def __init__(self, batches): self.batches = batches

    def __iter__(self): return iter(self.batches)


def test_a_loader_without_length():
    dls = digits_like(24, 8)
    learn = learner(cbs=ActivationStats(), dls=DataLoaders(Stream(list(dls.train)), dls.valid, classes=dls.classes))
    learn.fit(2, .01)
    assert learn.activation_stats.n == 6 and learn.activation_stats.layer_stats(-1).mean.isfinite().all()


def test_room_grows():
    layer = _Layer(None, True, 1)
    xs = [torch.randn(30) for _ in range(150)]
    for b, x in enumerate(xs):
        layer.note(x, b)
    layer.count(150)
    torch.testing.assert_close(layer.kept[:150, 0], torch.stack([x.mean() for x in xs]))


def test_reading_in_the_middle_of_a_fit():
    class Reader(Callback):
        order = -5                                                # before the statistics have counted the batch

        def after_batch(self):
            if self.learn.training and self.learn.activation_stats.n:
                self.learn.activation_stats.layer_stats(0)
    learn = learner(cbs=[ActivationStats(sample=None), Outputs(), Reader()])
    learn.fit(1, .01)
    torch.testing.assert_close(learn.activation_stats.layer_stats(0).mean,
                               torch.stack([x.mean() for x in next(iter(learn.outputs.all.values()))]))


def test_chosen_modules_and_models_with_other_outputs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head, self.unused = nn.LSTM(28, 12, batch_first=True), nn.Linear(12, 10), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.rnn(x[:, 0])[0][:, -1])
    model = Odd()
    learn = learner(model, ActivationStats(with_hist=True))
    learn.fit(1, .01)
    assert learn.activation_stats.names == ["rnn LSTM", "head Linear", "unused Linear"]
    assert learn.activation_stats.layer_stats(0).std.isfinite().all() and learn.activation_stats.layer_stats(2).mean.isnan().all()
    learn = learner(model := simple_cnn(), ActivationStats(modules=[model[0][1]]))
    learn.fit(1, .01)
    assert learn.activation_stats.names == ["0.1 ReLU"] and learn.activation_stats.layer_stats(0).mean.min() > 0


def test_a_layer_that_is_skipped_now_and_then():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.extra, self.head, self.calls = nn.Linear(784, 784), nn.Linear(784, 10), 0

        def forward(self, x):
            x, self.calls = x.flatten(1), self.calls + self.training
            return self.head(self.extra(x) if self.calls % 3 == 1 else x)
    learn = learner(Skips(), ActivationStats(sample=None))
    learn.fit(1, .01)
    assert learn.activation_stats.layer_stats(0).near_zero.isnan().tolist() == [False, True, True, False, True]
    assert learn.activation_stats.layer_stats(1).mean.isfinite().all()


def test_half_precision_outputs():
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)).bfloat16()
    learn = learner(Half(784, 10), ActivationStats(with_hist=True), loss_func=lambda p, y: F.cross_entropy(p.float(), y))
    learn.fit(1, .01)
    assert learn.activation_stats.layer_stats(0).mean.dtype == torch.float32
    assert learn.activation_stats.layer_stats(0).mean.isfinite().all()


# ---- hooks go, whatever happens

@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CancelFitException, torch.OutOfMemoryError])
@pytest.mark.parametrize("event", ["before_epoch", "after_pred", "after_backward", "after_batch", "before_validate"])
def test_hooks_are_removed(error, event):
    def stop(self):
        if self.learn.iter >= 3 or "_batch" not in event and "after" not in event:
            raise error("stop")
    learn = learner(cbs=[ActivationStats(), type("Stop", (Callback,), {event: stop})()])
    try:
        learn.fit(1, .01)
    except error:
        pass
    assert hooks_of(learn.model) == 0
    stats = learn.activation_stats
    assert not stats.n or stats.layer_stats(-2).mean.isfinite().all()
    learn.remove_cbs([c for c in learn.cbs if c.name == "stop"])
    learn.fit(1, .01)                                             # and the next fit starts afresh
    assert stats.n == 5 and hooks_of(learn.model) == 0


def test_a_cancelled_batch_leaves_a_gap():
    class Skip(Callback):
        def before_batch(self):
            if self.learn.training and self.learn.iter == 2:
                raise CancelBatchException
    learn = learner(cbs=[ActivationStats(), Skip()])
    learn.fit(1, .01)
    assert learn.activation_stats.layer_stats(0).mean.isnan().tolist() == [False, False, True, False, False]


def test_validation_and_other_passes_are_not_counted():
    learn = learner(cbs=ActivationStats())
    learn.fit(1, .01)
    before = learn.activation_stats.layer_stats(0).mean
    learn.validate(), learn.summary(), learn.get_preds()
    assert learn.activation_stats.n == 5 and learn.activation_stats.layer_stats(0).mean.equal(before)


def test_nan_in_training_is_recorded_and_stops_as_always():
    class Poison(Callback):
        def before_batch(self):
            if self.learn.training and self.learn.iter == 3:
                self.learn.xb = self.learn.xb * float("nan")
    learn = learner(cbs=[ActivationStats(with_hist=True), Poison()])
    with pytest.raises(FloatingPointError):
        learn.fit(1, .01)
    assert learn.activation_stats.layer_stats(0).mean.isnan().tolist() == [False, False, False, True, True]
    assert hooks_of(learn.model) == 0


def test_a_resumed_fit_has_the_whole_record(tmp_path):
    class Kill(Callback):
        def before_batch(self):
            if self.learn.training and self.learn.epoch == 1 and self.learn.iter == 3:
                raise KeyboardInterrupt

    def fit(*cbs, resume=None):
        torch.manual_seed(3)
        learn = learner(cbs=[ActivationStats(with_hist=True), *cbs], dls=digits_like(shuffle=True))
        learn.fit(2, .01, resume=resume)
        return learn.activation_stats
    path, whole = tmp_path / "c.safetensors", fit()
    with pytest.raises(KeyboardInterrupt):
        fit(Checkpoint(path, every_batches=2), Kill())
    resumed = fit(resume=path)
    assert resumed.n == whole.n == 10
    for i in range(5):
        torch.testing.assert_close(resumed.hist(i), whole.hist(i), rtol=0, atol=0)
        torch.testing.assert_close(torch.stack(resumed.layer_stats(i)), torch.stack(whole.layer_stats(i)), rtol=0, atol=0)


def test_no_host_synchronisation():
    "On a device that only pretends, any look at a number raises"
    layer = _Layer(64, True, 100)
    for b in range(80):
        layer.note(torch.empty(4, 8, 6, 6, device="meta"), b)     # .item(), .tolist(), bool() fail on meta tensors
    layer.count(80)
    assert layer.kept.device.type == "meta"


@pytest.mark.gpu
def test_cuda_agrees_and_does_not_wait():
    torch.manual_seed(0)
    model, dls = simple_cnn().cuda(), digits_like()
    learn = Learner(dls, model, cbs=[ActivationStats(with_hist=True), Outputs()], progress=False, device="cuda")
    learn.fit(1, .01)
    x = torch.randn(64, 8, 14, 14, device="cuda")
    layer = _Layer(2048, True, 100)
    layer.note(x, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for b in range(1, 99):
            layer.note(x, b)
        layer.count(99)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(layer.kept[50], output_stats(layer.waiting[:1], True)[0])


# ---- what it says and draws

def test_errors_in_one_sentence():
    stats = ActivationStats()
    learn = learner(cbs=stats)
    with pytest.raises(ValueError, match="no statistics yet"):
        stats.layer_stats(0)
    learn.fit(1, .01)
    for i in (5, -6):
        with pytest.raises(ValueError, match=r"no layer -?\d; 5 are watched: 0.0 Conv2d"):
            stats.layer_stats(i)
    with pytest.raises(ValueError, match="with_hist=True"):
        stats.color_dim(0)
    for wrong in ({"sample": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            ActivationStats(**wrong)
    with pytest.raises(ValueError, match="no part of the model"):
        learner(cbs=ActivationStats(modules=[nn.Linear(1, 1)])).fit(1, .01)
    with pytest.raises(ValueError, match="nothing to watch"):
        learner(cbs=ActivationStats(modules=[])).fit(1, .01)


def test_shapes_and_names():
    learn = learner(cbs=ActivationStats(with_hist=True))
    learn.fit(1, .01)
    stats = learn.activation_stats
    assert stats.hist(-2).shape == (40, 5) and [len(v) for v in stats.layer_stats(-2)] == [5, 5, 5]
    torch.testing.assert_close(stats.hist(3), stats.hist(-2))
    assert stats.layer_stats(0)._fields == ("mean", "std", "near_zero") and repr(stats) == "ActivationStats(5 layers, 5 batches)"


@pytest.mark.parametrize("every", [1, 2])
def test_figures_are_drawn(every, monkeypatch):
    learn, drawn = learner(cbs=ActivationStats(with_hist=True, every=every)), []
    learn.fit(1, .01)
    stats = learn.activation_stats
    monkeypatch.setattr("course_lib.activations.show_figure", lambda fig, **kw: drawn.append((fig, kw)))
    stats.plot_layer_stats(-2)
    stats.color_dim(-2)
    (curves, a), (colours, b) = drawn
    assert [ax.get_title() for ax in curves.axes] == ["mean", "standard deviation", "share near zero (≤ .05)"]
    assert curves.axes[1].lines[0].get_ydata().tolist() == stats.layer_stats(-2).std.tolist()
    assert list(curves.axes[0].lines[0].get_xdata()) == list(range(0, 5, every))
    assert torch.tensor(colours.axes[0].images[0].get_array()).equal(stats.hist(-2))
    assert all(len(k["alt"]) > 40 and k["caption"] for k in (a, b))
    _, ax = plt.subplots()
    stats.color_dim(0, ax=ax)
    assert len(drawn) == 2 and ax.images
    plt.close("all")


def test_the_line_of_the_colourful_dimension():
    learn = learner(cbs=ActivationStats(with_hist=True))
    learn.fit(1, .01)
    stats = learn.activation_stats
    kept = torch.zeros(5, 43)
    kept[0, 3:13] = 100                                           # all below 2.5
    kept[1, 3:13], kept[1, 42] = 1000, 5                          # a handful at the top, less than 1 %
    kept[3, 42] = 7                                               # all at the top
    list(stats.layers.values())[0].kept = kept
    _, ax = plt.subplots()
    stats.color_dim(0, ax=ax)
    line = ax.lines[-1].get_ydata()
    assert line[:2].tolist() == [2.5, 2.5] and line[3] == 10 and str(line[2]) == str(line[4]) == "nan"
    plt.close("all")


# ---- dead units

def test_dead_units_against_a_loop():
    model = simple_cnn()
    with torch.no_grad():
        model[0][0].bias[:3] = -100                               # three of eight
        model[1][0].weight[5] = model[1][0].bias[5] = 0
    learn = learner(model)
    found, x = dead_units(learn), torch.cat([xb for xb, _ in learn.dls.valid])
    known = {}
    with torch.no_grad():
        for i in range(4):
            x = model[i](x)
            known[f"{i}.1"] = sum(bool((x[:, c] <= 0).all()) for c in range(x.shape[1])) / x.shape[1]
    assert found == pytest.approx(known) and found["0.1"] >= 3 / 8
    assert hooks_of(model) == 0


def test_dead_units_of_a_linear_network_and_another_loader():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.ReLU(), nn.Linear(6, 10))
    with torch.no_grad():
        model[1].weight[0] = 0
        model[1].bias[0] = -1
    learn = learner(model)
    assert dead_units(learn, [(torch.randn(500, 1, 28, 28), None)]) == pytest.approx({"2": 1 / 6})
    assert dead_units(learner(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))) == {}
