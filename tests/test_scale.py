"""Scaling up on one device: mixed precision, accumulation, clipping, averages, compilation; what full memory and lost devices end in

What needs a GPU is marked and skips with a reason. Several processes: test_distributed.py."""
import copy
import math
import weakref
from functools import partial
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import course_lib.scale as scale
import course_lib.schedule  # noqa: F401  (gives the Learner its lr_find)
from course_lib.batchnorm import AverageWeights
from course_lib.dataloader import DataLoader, DataLoaders
from course_lib.learner import Callback, CancelBatchException, CancelTrainException, Checkpoint, Learner, accuracy, read_checkpoint
from course_lib.optim import SGD, AdamW
from course_lib.scale import EMA, Compile, GradientAccumulation, GradientClip, MixedPrecision, gradients, training_memory
from course_lib.settings import default_device, set_seed
from killed_run import learner_of, loaders, pictures, plain_net

BF16, FP16 = torch.bfloat16, torch.float16
OPTIONS = {"bf16": lambda: MixedPrecision(), "accumulation": lambda: GradientAccumulation(2), "clip": lambda: GradientClip(1.),
           "ema": lambda: EMA(.9), "compile": lambda: Compile(backend="eager")}


MOMENTUM = partial(SGD, momentum=.9)


def learner(cbs=(), size: int = 16, n: int = 96, model=None, seed: int = 0, opt_func=MOMENTUM, lr: float = .05, kind: str = "",
            **kwargs) -> Learner:
    set_seed(seed)
    return Learner(loaders(kind, n, size), plain_net() if model is None else model, opt_func=opt_func, lr=lr, metrics=accuracy, cbs=cbs,
                   device="cpu", progress=False, **kwargs)


def weights(learn: Learner) -> list[torch.Tensor]:
    return [t.detach().clone() for t in learn.model.state_dict().values()]


def assert_equal(a: Learner, b: Learner) -> None:
    assert all(v.equal(w) for v, w in zip(weights(a), weights(b), strict=True))
    assert list(a.recorder.losses) == list(b.recorder.losses)


class Spy(Callback):
    "Keeps what it sees at an event"
    order = 30

    def __init__(self, event: str, look):
        self.seen, self.look = [], look
        setattr(self, event, lambda: self.seen.append(self.look(self.learn)))


class RaiseAt(Callback):
    order = 30

    def __init__(self, event: str, error: Exception, at: int = 1, only_training: bool = True):
        self.error, self.at, self.only = error, at, only_training
        setattr(self, event, self.hit)

    def hit(self) -> None:
        if self.learn.training or not self.only:
            self.at -= 1
            if self.at == 0:
                raise self.error


# ---- mixed precision

def autocast_is_on() -> bool:
    return torch.is_autocast_enabled("cpu")


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    "float16 is refused on a CPU because it is slow there; the machinery can be tested all the same"
    monkeypatch.setattr(scale, "precision_trouble", lambda device, dtype: None)


def test_mixed_precision_computes_in_16_bits_and_keeps_the_rest_in_32():
    model = plain_net()
    inside, kinds = [], set()
    model[3].register_forward_hook(lambda m, i, o: inside.append((m.training, o.dtype)))
    def loss(pred, yb):
        kinds.add((pred.dtype, autocast_is_on()))
        return F.cross_entropy(pred, yb)
    grads = Spy("before_step", lambda learn: {g.dtype for g in gradients(learn)})
    learn = learner([MixedPrecision(), grads], model=model, channels_last=False)
    learn.loss_func = loss
    learn.fit(1)
    assert {d for _, d in inside} == {BF16} and {t for t, _ in inside} == {True, False}
    assert kinds == {(torch.float32, True)}
    assert {p.dtype for p in model.parameters()} == {torch.float32} == set.union(*grads.seen)
    assert not autocast_is_on()


def test_backward_is_outside_autocast():
    spy = Spy("before_backward", lambda learn: autocast_is_on())
    learner([MixedPrecision(), spy]).fit(1)
    assert spy.seen and not any(spy.seen)


def test_mixed_precision_is_torchs_autocast_bit_for_bit():
    learn = learner([MixedPrecision()], channels_last=False)
    model = copy.deepcopy(learn.model)
    opt = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    twin = loaders("", 96, 16).train
    learn.fit(1)
    for xb, yb in twin:
        with torch.autocast("cpu", BF16):
            loss = F.cross_entropy(model(xb).float(), yb)
        loss.backward()
        opt.step(); opt.zero_grad()
    for a, b in zip(learn.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nested_predictions_become_float32():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain_net()

        def forward(self, x):
            y = self.net(x)
            return {"scores": y, "pair": (y, y.argmax(1))}

    spy = Spy("after_pred", lambda learn: (learn.pred["scores"].dtype, learn.pred["pair"][0].dtype, learn.pred["pair"][1].dtype))
    learn = learner([MixedPrecision(), spy], model=Two())
    learn.metrics = []
    learn.loss_func = lambda pred, yb: F.cross_entropy(pred["scores"], yb)
    learn.fit(1)
    assert set(spy.seen) == {(torch.float32, torch.float32, torch.int64)}


@pytest.mark.parametrize("event", ["after_pred", "before_batch", "before_step", "after_loss"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), CancelBatchException(), CancelTrainException()])
def test_no_error_and_no_cancelling_leaves_autocast_on(event, error):
    spy = Spy("before_validate", lambda learn: autocast_is_on())
    learn = learner([MixedPrecision(), RaiseAt(event, error)])
    try:
        learn.fit(1, cbs=spy)
    except (RuntimeError, KeyboardInterrupt) as e:
        assert e is error
    assert not autocast_is_on() and not any(spy.seen)
    learn.fit(1)                                            # and the learner goes on


def test_an_error_in_the_forward_leaves_autocast_off():
    class Breaks(nn.Module):
        def forward(self, x):
            assert autocast_is_on() or x.dtype == torch.float32
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        learner([MixedPrecision()], model=nn.Sequential(plain_net(), Breaks())).fit(1)
    assert not autocast_is_on()


@pytest.mark.parametrize("given, dtype", [("bfloat16", BF16), ("bf16", BF16), (BF16, BF16), ("fp16", FP16), (FP16, FP16)])
def test_names_of_dtypes(given, dtype):
    assert MixedPrecision(given).dtype == dtype


@pytest.mark.parametrize("given", ["float32", "int8", torch.float64, "half-ish"])
def test_other_dtypes_are_refused(given):
    with pytest.raises(ValueError, match="'bfloat16' or 'float16'"):
        MixedPrecision(given)


def test_what_a_device_cannot_do_is_said_before_training_starts(monkeypatch):
    learn = learner()
    before = weights(learn)
    with pytest.raises(ValueError, match="float16 is for GPUs.*bfloat16"):
        learn.to_fp16().fit(1)
    assert all(v.equal(w) for v, w in zip(weights(learn), before, strict=True))
    learn.remove_cbs(MixedPrecision)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: pytest.fail("not here") if a[0] != "cpu" else _raise())
    with pytest.raises(ValueError, match="bfloat16 does not work on cpu"):
        learn.to_bf16().fit(1)


def _raise():
    raise RuntimeError("User specified an unsupported autocast device_type")


def test_bf16_works_with_channels_last():
    model = nn.Sequential(plain_net())
    learn = learner([MixedPrecision()], model=model)
    learn.fit(1)
    assert not model[0][3].weight.is_contiguous() and model[0][3].weight.is_contiguous(memory_format=torch.channels_last)


def test_to_bf16_trains_as_the_callback():
    a, b = learner([MixedPrecision()]), learner().to_bf16()
    a.fit(1), b.fit(1)
    assert_equal(a, b)


def fp16_learner(grow_every: int = 4, **kwargs) -> Learner:
    cb = MixedPrecision("float16")
    cb.scaler = torch.amp.GradScaler("cpu", init_scale=2.**10, growth_interval=grow_every)
    return learner([cb], **kwargs)


def test_the_scaled_loss_gives_unscaled_gradients(fp16_on_cpu):
    learn = fp16_learner(channels_last=False)
    seen = Spy("before_step", lambda learn: [g.clone() for g in gradients(learn)])
    learn.fit(1, cbs=seen)
    model, (xb, yb) = learner(channels_last=False).model, next(iter(loaders("", 96, 16).train))
    F.cross_entropy(model(xb), yb).backward()
    for g, p in zip(seen.seen[0], model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=.02, atol=2e-3)
    assert learn.mixed_precision.scaler.get_scale() == 2.**11 and learn.mixed_precision.skipped == 0      # 6 steps, 4 to grow


def test_a_step_that_overflows_is_left_out_and_the_scale_halved(fp16_on_cpu):
    learn = fp16_learner(grow_every=1000)

    class Overflow(Callback):
        def after_backward(self):
            if self.learn.iter == 2:
                next(self.learn.model.parameters()).grad[0] = math.inf

    steps = Spy("after_step", lambda learn: learn.iter)
    scales = type("Scales", (Spy,), {})("after_batch", lambda learn: learn.mixed_precision.scaler.get_scale() if learn.training else None)
    before = type("Before", (Spy,), {})("before_batch", lambda learn: next(learn.model.parameters()).detach().clone())
    learn.fit(1, cbs=[Overflow, steps, scales, before])
    assert steps.seen == [0, 1, 3, 4, 5] and learn.mixed_precision.skipped == 1
    assert [s for s in scales.seen if s] == [2.**10] * 2 + [2.**9] * 4
    assert before.seen[3].equal(before.seen[2]) and not before.seen[4].equal(before.seen[3])
    assert all(p.isfinite().all() for p in learn.model.parameters()) and len(learn.recorder.losses) == 6


@pytest.mark.parametrize("n", [1, 2])
def test_the_scaler_is_resumed_exactly(fp16_on_cpu, tmp_path, n):
    "Also in the middle of an accumulated step"
    def run(folder, stop: bool = False) -> Learner:
        learn = fp16_learner()
        learn.add_cbs([GradientAccumulation(n), GradientClip(1.), EMA(.5)])
        cbs = [Checkpoint(folder / "fit", 3)]
        if stop:
            cbs.append(RaiseAt("before_backward", RuntimeError("stop"), at=10))
            with pytest.raises(RuntimeError, match="stop"):
                learn.fit(2, cbs=cbs, resume=folder / "fit")
        else:
            learn.fit(2, cbs=cbs, resume=folder / "fit")
        return learn

    whole = run(tmp_path / "whole")
    run(tmp_path / "broken", stop=True)
    state = read_checkpoint(tmp_path / "broken" / "fit.safetensors")
    assert state["cbs"]["mixed_precision"]["scaler"]["scale"] >= 2.**10
    assert len(state["cbs"]["gradient_accumulation"]["grads"]) == (6 if n == 2 else 0) + 2 * (n == 2)
    again = run(tmp_path / "broken")
    assert_equal(whole, again)
    assert whole.mixed_precision.scaler.state_dict() == again.mixed_precision.scaler.state_dict()
    assert list(whole.gradient_clip.norms) == list(again.gradient_clip.norms)


# ---- accumulation

@pytest.mark.parametrize("kind", ["", "torch loader"])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_accumulation_is_the_large_batch(n, kind):
    "The loaders draw the same order for both sizes"
    large, small = learner(size=16 * n, kind=kind), learner([GradientAccumulation(n)], kind=kind)
    for learn in (large, small):
        set_seed(1)                                         # PyTorch's loader draws its orders from here
        learn.fit(2)
    for a, b in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert large.recorder.values[-1][1] == pytest.approx(small.recorder.values[-1][1], abs=1e-6)


def test_the_rest_of_an_epoch_and_a_smaller_batch_count_by_their_items():
    "100 items: batches of 16 and a last one of 4; steps of 3 batches are of 48, 48 and 4 items"
    large, small = learner(size=48, n=100), learner([GradientAccumulation(3)], n=100)
    large.fit(1), small.fit(1)
    assert len(small.recorder.losses) == 7 and len(large.recorder.losses) == 3
    for a, b in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    large, small = learner(size=100, n=100), learner([GradientAccumulation(7)], n=100)
    large.fit(2), small.fit(2)
    for a, b in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_with_batch_norm_accumulation_differs():
    nets = [nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    large, small = learner(size=32, model=nets[0]), learner([GradientAccumulation(2)], model=nets[1])
    large.fit(1), small.fit(1)
    gap = max((a - b).abs().max() for a, b in zip(large.model.parameters(), small.model.parameters(), strict=True))
    assert 1e-4 < gap < .5


def test_steps_are_counted_rightly():
    spy = Spy("after_step", lambda learn: learn.iter)
    learner([GradientAccumulation(4), spy]).fit(2)
    assert spy.seen == [3, 5] * 2


def test_an_epoch_that_is_cancelled_leaves_no_gradients():
    learn = learner([GradientAccumulation(4), RaiseAt("after_batch", CancelTrainException(), at=2)])
    spy = Spy("before_validate", lambda learn: len(gradients(learn)))
    learn.fit(1, cbs=spy)
    assert spy.seen == [0] and learn.gradient_accumulation.done == 0


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_accumulation_refuses_what_makes_no_sense(n):
    with pytest.raises(ValueError, match="number of batches a step"):
        GradientAccumulation(n)


def test_accumulation_needs_a_length():
    with pytest.raises(ValueError, match="has no length"):
        learner([GradientAccumulation(2)], kind="stream").fit(1)


# ---- clipping

def test_clipping_is_torchs():
    learn = learner([GradientClip(.1)])
    norms = Spy("before_step", lambda learn: torch.stack([g.norm() for g in gradients(learn)]).norm().item())
    norms.order = 30
    learn.fit(2, cbs=norms)
    clipped = learn.gradient_clip.norms
    assert len(clipped) == 12 and max(clipped) > .1
    for before, after in zip(clipped, norms.seen, strict=True):
        assert after == pytest.approx(min(before, .1), rel=1e-4)


def test_clipping_at_infinity_only_looks():
    a, b = learner([GradientClip(math.inf)]), learner()
    a.fit(1), b.fit(1)
    assert_equal(a, b)
    assert len(a.gradient_clip.norms) == 6 and min(a.gradient_clip.norms) > 0


@pytest.mark.parametrize("norm", [0, -1., math.nan])
def test_clipping_refuses_what_makes_no_sense(norm):
    with pytest.raises(ValueError, match="above 0"):
        GradientClip(norm)


# ---- the average

def test_ema_against_torchs():
    learn = learner([EMA(.9)])
    averaged, kept = torch.optim.swa_utils, []

    class Mean(Callback):
        def before_fit(self):
            self.n = 0

        def after_step(self):
            share = max(.1, 1 / (1 + self.n))
            now = [p.detach().clone() for p in self.learn.model.parameters()]
            kept[:] = [torch.lerp(a, b, share) for a, b in zip(kept or now, now, strict=True)]
            self.n += 1

    learn.fit(3, cbs=Mean)
    for a, b in zip(learn.model.parameters(), kept, strict=True):
        torch.testing.assert_close(a, b)
    assert averaged.get_ema_avg_fn(.9)(torch.ones(1), torch.zeros(1), 5) == .9


def test_ema_of_decay_0_is_no_average():
    a, b = learner([EMA(0)]), learner()
    a.fit(2), b.fit(2)
    assert_equal(a, b)


def test_ema_is_an_average_of_weights():
    "With its resume, its view in validation and its end"
    assert issubclass(EMA, AverageWeights) and "after_step" not in vars(EMA)
    with pytest.raises(ValueError, match="decay is 1"):
        EMA(1)


# ---- compilation

def test_compile_is_used_in_training_and_validation_and_leaves_no_trace():
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(torch.is_grad_enabled())
            return graph(*args)
        return run

    plain, learn = learner(channels_last=False), learner([Compile(backend=backend)], channels_last=False)
    keys = list(learn.model.state_dict())
    plain.fit(2), learn.fit(1)
    tried = len(calls)
    assert {True, False} <= set(calls) and learn.model._compiled_call_impl is None
    learn.model(torch.zeros(1, 1, 6, 6))
    assert len(calls) == tried and list(learn.model.state_dict()) == keys
    plain = learner(channels_last=False)
    plain.fit(1)
    assert_equal(plain, learn)


def test_what_cannot_be_compiled_trains_all_the_same(capsys):
    def backend(graph, inputs):
        raise RuntimeError("no compiler on this computer")

    learn, plain = learner([Compile(backend=backend)]), learner()
    learn.fit(1), learn.fit(1), plain.fit(1), plain.fit(1)
    said = capsys.readouterr().out
    assert said.count("torch.compile does not work here") == 1 and "goes on without it" in said
    assert_equal(plain, learn)


def test_compile_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="it can be None, default, reduce-overhead"):
        Compile("fast")


def test_lr_find_of_a_learner_with_options_trains_a_copy():
    learn = learner([cb() for name, cb in OPTIONS.items() if name != "accumulation"])
    learn.fit(1)
    before = weights(learn)
    learn.lr_find(num_it=5, show_plot=False)
    assert all(v.equal(w) for v, w in zip(weights(learn), before, strict=True))
    learn.fit(1)
    assert not all(v.equal(w) for v, w in zip(weights(learn), before, strict=True))


@pytest.mark.slow
def test_inductor_gives_the_same_training(capsys):
    plain, learn = learner(), learner([Compile()])
    plain.fit(1), learn.fit(1)
    assert "does not work" not in capsys.readouterr().out
    for a, b in zip(plain.model.parameters(), learn.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- all together

def test_all_options_together_resume_exactly(tmp_path):
    def run(folder, stop: int = 0) -> Learner:
        learn = learner_of("adamw", cbs=[cb() for cb in OPTIONS.values()])
        cbs = [Checkpoint(folder / "fit", 3)] + [RaiseAt("before_batch", RuntimeError("stop"), at=stop)] * bool(stop)
        try:
            learn.fit(2, cbs=cbs, resume=folder / "fit")
        except RuntimeError:
            assert stop
        return learn

    whole, _ = run(tmp_path / "whole"), run(tmp_path / "broken", stop=11)
    assert_equal(whole, run(tmp_path / "broken"))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_keep_the_accuracy(name):
    "Within noise of the plain training, in the mean of three seeds: noise is what three other seeds would differ by"
    def scores(cbs) -> list[float]:
        found = []
        for seed in range(3):
            model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
            learn = learner(cbs(), model=model, seed=seed, n=480, size=16 if name != "accumulation" else 8, opt_func=AdamW, lr=.01)
            (vx, vy) = pictures(600, 7)
            learn.dls.valid = DataLoader(TensorDataset(vx, vy), 200)
            learn.fit(3)
            found.append(learn.recorder.values[-1][-1])
        return found

    with_it, without = scores(lambda: [OPTIONS[name]()]), scores(lambda: [])
    assert fmean(with_it) > fmean(without) - .03 and fmean(without) > .7


# ---- memory, and what goes wrong with machines

class Fails(nn.Module):
    "Works until the `at`-th training batch, and then raises"
    def __init__(self, error: Exception, at: int = 3):
        super().__init__()
        self.net, self.error, self.left, self.held = plain_net(), error, at, None

    def forward(self, x):
        y = self.net(x)
        if self.training:
            self.left -= 1
            if self.left == 0:
                large = torch.zeros(1000) + y.sum()          # what a batch leaves in the frames of the model
                self.held = weakref.ref(large)
                raise self.error
        return y


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB")


@pytest.mark.parametrize("error", [OOM, RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate "
                                                     "memory: you tried to allocate 80000000000 bytes."), MemoryError()])
def test_full_memory_ends_in_a_sentence_and_a_learner_that_goes_on(error):
    model = Fails(error)
    learn = learner(model=model)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        learn.fit(1)
    text = str(caught.value)
    assert "epoch 0, training batch 2 of 6" in text and "Take batches of 8 instead of 16" in text and "GradientAccumulation(2)" in text
    assert "MixedPrecision" in text and "\n" not in text
    assert model.held() is None, "the traceback keeps the batch's memory"
    assert not gradients(learn) and learn.xb is None and learn.pred is None and learn.loss is None
    learn.fit(1)
    assert len(learn.recorder.losses) == 6


def test_really_full_memory():
    class Hungry(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain_net()

        def forward(self, x):
            return self.net(x) + torch.empty(2**52, dtype=torch.uint8).sum()

    with pytest.raises(torch.OutOfMemoryError, match="The memory of cpu is full"):
        learner(model=Hungry()).fit(1)


def test_a_batch_of_one_cannot_be_halved():
    with pytest.raises(torch.OutOfMemoryError, match="Take smaller batches or pictures"):
        learner(model=Fails(OOM), size=1).fit(1)


@pytest.mark.parametrize("text", ["CUDA error: unspecified launch failure", "CUDA error: device-side assert triggered"])
def test_a_lost_device_ends_in_a_sentence(text):
    model = Fails(RuntimeError(text + "\nCUDA kernel errors might be asynchronously reported"))
    with pytest.raises(RuntimeError, match="The device cpu has failed in epoch 0, training batch 2") as caught:
        learner(model=model).fit(1)
    assert "Restart the kernel" in str(caught.value) and text in str(caught.value) and "asynchronously" not in str(caught.value)
    assert model.held() is None


def test_an_operation_without_a_16_bit_version():
    with pytest.raises(ValueError, match=r"cannot do in bfloat16.*x\.float\(\)"):
        learner([MixedPrecision()], model=Fails(RuntimeError("\"cdist\" not implemented for 'BFloat16'"))).fit(1)
    with pytest.raises(RuntimeError, match="not implemented"):              # without mixed precision it is the model's affair
        learner(model=Fails(RuntimeError("\"cdist\" not implemented for 'BFloat16'"))).fit(1)


def test_other_errors_stay_what_they_are():
    with pytest.raises(KeyError, match="mine"):
        learner(model=Fails(KeyError("mine"))).fit(1)
    wrong = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match="The model cannot take this batch: layer '2', Linear"):
        learner(model=wrong).fit(1)


def test_training_memory_counts():
    net = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    x, y = torch.randn(64, 100), torch.randint(10, (64,))
    dls = DataLoaders(DataLoader(TensorDataset(x, y), 32, device="cpu"), DataLoader(TensorDataset(x, y), 32, device="cpu"))
    n = sum(p.numel() for p in net.parameters())
    learn = Learner(dls, net, opt_func=AdamW, device="cpu", progress=False)
    before = weights(learn)
    found = training_memory(learn)
    assert found["parameters"] == found["gradients"] == 4 * n and found["optimiser"] == 8 * n
    # kept for the way back: the ReLU's output (the second layer's input, once), the loss's log-probabilities; labels come with the batch
    assert 4 * 32 * 50 + 4 * 32 * 10 <= found["activations"] <= 4 * 32 * 50 + 2 * 4 * 32 * 10 + 100
    assert found["batch"] == 4 * 32 * 100 + 8 * 32
    assert all(v.equal(w) for v, w in zip(weights(learn), before, strict=True)) and learn.opt is None and not gradients(learn)
    plain = training_memory(Learner(dls, net, opt_func=SGD, device="cpu", progress=False))
    assert plain["optimiser"] == 0 and plain["activations"] == found["activations"]
    assert training_memory(Learner(dls, net, opt_func=partial(SGD, momentum=.9), device="cpu", progress=False))["optimiser"] == 4 * n


def test_training_memory_leaves_batch_norm_and_random_numbers_alone():
    learn = learner_of()
    before, state = weights(learn), torch.get_rng_state()
    small, large = training_memory(learn), training_memory(Learner(loaders("", 100, 32), learn.model, device="cpu", progress=False))
    assert all(v.equal(w) for v, w in zip(weights(learn), before, strict=True)) and state.equal(torch.get_rng_state())
    assert 1.8 < large["activations"] / small["activations"] < 2.2 and large["parameters"] == small["parameters"]


def test_bf16_halves_the_activations_of_products():
    net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)], nn.Linear(256, 3))
    x, y = torch.randn(4096, 256), torch.randint(3, (4096,))
    dls = DataLoaders(DataLoader(TensorDataset(x, y), 2048, device="cpu"), DataLoader(TensorDataset(x, y), 2048, device="cpu"))
    learn = Learner(dls, net, device="cpu", progress=False)
    full = training_memory(learn)["activations"]
    assert .45 < training_memory(learn.to_bf16())["activations"] / full < .75


# ---- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_a_gpu(dtype):
    if scale.precision_trouble(default_device(), scale.DTYPES[dtype]):
        pytest.skip(f"this GPU has no {dtype}")
    results = []
    for cbs in ([], [MixedPrecision(dtype)]):
        set_seed(0)
        dls = DataLoaders(DataLoader(TensorDataset(*pictures(960)), 32, shuffle=True, seed=0, device="cuda"),
                          DataLoader(TensorDataset(*pictures(400, 1)), 200, device="cuda"))
        learn = Learner(dls, plain_net(), lr=.01, metrics=accuracy, cbs=cbs, progress=False)
        learn.fit(3)
        results.append(learn.recorder.values[-1][-1])
    assert abs(results[0] - results[1]) < .05


@pytest.mark.gpu
def test_real_out_of_memory_on_a_gpu_is_freed():
    class Hungry(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.on = plain_net(), True

        def forward(self, x):
            y = self.net(x)
            kept = []
            while self.on:
                kept.append(torch.empty(2**30, dtype=torch.uint8, device=x.device))
            return y

    model = Hungry()
    learn = Learner(DataLoaders(*[DataLoader(TensorDataset(*pictures(64)), 16, device="cuda")] * 2), model, progress=False)
    with pytest.raises(torch.OutOfMemoryError, match="batches of 8 instead of 16"):
        learn.fit(1)
    assert torch.cuda.memory_reserved() < 2**29
    model.on = False
    learn.fit(1)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile_on_a_gpu(mode):
    results = []
    for cbs in ([], [Compile(mode)]):
        set_seed(0)
        dls = DataLoaders(*[DataLoader(TensorDataset(*pictures(320)), 32, device="cuda")] * 2)
        learn = Learner(dls, plain_net(), lr=.01, cbs=cbs, progress=False)
        learn.fit(2)
        results.append(learn.recorder.values[-1][:2])
    assert results[0] == pytest.approx(results[1], abs=1e-3)
