"""course_lib.dataloader against PyTorch's DataLoader, on random data sets, and what bad input does."""
import hashlib
import os
import random
import string
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.data
from torch.utils.data import Subset, TensorDataset

from course_lib.dataloader import (DataLoader, DataLoaders, Normalize, batch_accuracy, first, get_dls, init_params, mnist_loss,
                                   pixel_stats, to_cpu, to_device)
from course_lib.datasets import ImageData
from course_lib.settings import random_state

TorchLoader = torch.utils.data.DataLoader


def equal(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(params=range(8))
def rng(request):
    print("seed", request.param)
    torch.manual_seed(request.param)
    return random.Random(request.param)


@pytest.fixture
def tiny() -> ImageData:
    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (50, 6, 5), dtype=torch.uint8, generator=g)
    y = torch.arange(50) % 3
    return ImageData(x, y, x[:20].clone(), y[:20].clone(), ["a", "b", "c"], "drawn", "tiny")


# ---- the same batches as PyTorch's loader

def random_dataset(rng: random.Random):
    n = rng.randint(1, 70)
    x, y = torch.randn(n, *[rng.randint(1, 4) for _ in range(rng.randint(0, 3))]), torch.randint(0, 9, (n,))
    kind = rng.randrange(5)
    if kind == 0:
        return TensorDataset(x, y)
    if kind == 1:
        return TensorDataset(x.transpose(0, -1).contiguous().transpose(0, -1), y, torch.rand(n) > .5)  # not contiguous
    if kind == 2:
        return list(zip(x, y.tolist(), strict=True))
    if kind == 3:
        return [{"x": xi, "name": rng.choice(string.ascii_letters), "weight": rng.random()} for xi in x]
    return list(zip(x.numpy(), y.tolist(), string.printable[:n], strict=True))


@pytest.mark.parametrize("drop_last", [False, True])
def test_in_order_like_torch(rng, drop_last):
    for _ in range(10):
        dataset = random_dataset(rng)
        size = rng.randint(1, len(dataset) if drop_last else 80)
        mine, theirs = DataLoader(dataset, size, drop_last=drop_last), TorchLoader(dataset, size, drop_last=drop_last)
        a, b = list(mine), list(theirs)
        assert len(a) == len(b) == len(mine) == len(theirs)
        for p, q in zip(a, b, strict=True):
            assert isinstance(p, dict if isinstance(q, dict) else tuple)
            same(p, q)


def same(a, b) -> None:
    "Equal, tensors exactly; a list may stand for a tuple"
    if isinstance(a, torch.Tensor):
        equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for v, w in zip(a, b, strict=True):
            same(v, w)
    else:
        assert a == b


@pytest.mark.parametrize("drop_last", [False, True])
def test_shuffled_each_item_once_and_x_stays_with_y(rng, drop_last):
    n, size = rng.randint(20, 200), rng.randint(1, 20)
    y = torch.randperm(n)
    for dataset in (TensorDataset(y * 10, y), list(zip(y * 10, y, strict=True))):
        dl = DataLoader(dataset, size, shuffle=True, drop_last=drop_last, seed=rng.randint(0, 99))
        epochs = [list(dl) for _ in range(3)]
        orders = [torch.cat([yb for _, yb in e]) for e in epochs]
        for e, order in zip(epochs, orders, strict=True):
            assert all(len(yb) == size for _, yb in e[:-1]) and len(e) == len(dl)
            assert all(xb.equal(yb * 10) for xb, yb in e)
            assert len(order.unique()) == len(order) == (n // size * size if drop_last else n)
        assert not orders[0].equal(orders[1]) and not orders[1].equal(orders[2])


def test_every_place_is_equally_likely():
    dl = DataLoader(torch.arange(4), 4, shuffle=True, seed=0)
    counts = torch.zeros(4, 4)
    for _ in range(4000):
        counts[torch.arange(4), first(dl)] += 1
    assert counts.min() > 880 and counts.max() < 1120  # 1000 expected, standard deviation 27


@pytest.mark.parametrize("dataset", [range(15), list(enumerate(string.ascii_lowercase)), "abcdefg", np.arange(12.).reshape(6, 2),
                                     Subset(range(100), [5, 7, 9]), torch.eye(5), [1.5, 2.5, 3.5]], ids=lambda d: type(d).__name__)
def test_anything_indexable(dataset):
    items = []
    for batch in DataLoader(dataset, 4):
        column = batch[0] if isinstance(batch, tuple) else batch
        items += list(column)
    want = [d[0] if isinstance(d, tuple) else d for d in (dataset[i] for i in range(len(dataset)))]
    assert len(items) == len(want)
    assert all(np.array_equal(a, b) for a, b in zip(items, want, strict=True))


def test_only_length_and_index_are_used():
    class Squares:
        def __len__(self): return 7
        def __getitem__(self, i): return i, i * i   # never raises IndexError: iterating it would not end

    assert torch.cat([sq for _, sq in DataLoader(Squares(), 3)]).tolist() == [i * i for i in range(7)]


def test_named_tuples_and_nested_items():
    Pair = namedtuple("Pair", "x y")
    dataset = [Pair(torch.full((2,), float(i)), (i, -i)) for i in range(5)]
    batch = first(DataLoader(dataset, 3, device="cpu"))
    assert isinstance(batch, Pair) and batch.x.shape == (3, 2) and batch.y[1].tolist() == [0, -1, -2]


# ---- orders and seeds

def test_one_seed_one_order_whatever_else_is_drawn():
    a, b, c = (DataLoader(torch.arange(100), 7, shuffle=True, seed=s) for s in (3, 3, 4))
    order = [torch.cat(list(a)) for _ in range(3)]
    torch.rand(5)
    assert all(o.equal(torch.cat(list(b))) for o in order)
    assert not order[0].equal(torch.cat(list(c)))


def test_both_paths_share_the_order():
    x = torch.arange(40)
    for a, b in zip(DataLoader(x, 6, shuffle=True, seed=9), DataLoader(x.tolist(), 6, shuffle=True, seed=9), strict=True):
        equal(a, b)


def test_without_a_seed_torchs_seed_rules():
    def order(s):
        torch.manual_seed(s)
        return torch.cat(list(DataLoader(torch.arange(50), 7, shuffle=True)))
    assert order(1).equal(order(1)) and not order(1).equal(order(2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    list(DataLoader(torch.arange(50), 7)), list(DataLoader(torch.arange(50), 7, shuffle=True, seed=1))
    assert torch.get_rng_state().equal(state), "a loader in order, or with a seed, draws nothing from PyTorch's generator"


def test_the_generators_state_brings_an_epoch_back():
    dl = DataLoader(torch.arange(30), 4, shuffle=True, seed=0)
    list(dl)
    state = dl.generator.get_state()
    want = [torch.cat(list(dl)) for _ in range(2)]
    other = DataLoader(torch.arange(30), 4, shuffle=True, seed=77)
    other.generator.set_state(state)
    assert all(w.equal(torch.cat(list(other))) for w in want)


@pytest.mark.parametrize("dataset", [torch.arange(10), list(range(10))], ids=["tensor", "list"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("start", [0, 3, 4])
def test_an_epoch_goes_on_from_a_batch(dataset, shuffle, start):
    dl = DataLoader(dataset, 3, shuffle=shuffle, seed=1)
    before = dl.generator.get_state()
    whole = [b.tolist() for b in dl]
    after = dl.generator.get_state()
    dl.generator.set_state(before)
    assert [b.tolist() for b in dl.batches(start)] == whole[start:]
    assert dl.generator.get_state().equal(after)


def test_two_processes_hand_out_the_same_bytes():
    code = ("import hashlib, torch; from course_lib.dataloader import *; from torch.utils.data import TensorDataset\n"
            "g = torch.Generator().manual_seed(0); x = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=g)\n"
            "h = hashlib.sha256(); dl = DataLoader(TensorDataset(x, torch.arange(300)), 32, True, seed=5, transform=Normalize(.13, .31))\n"
            "torch.manual_seed(1); w = init_params((64, 1)); free = DataLoader(torch.arange(99), 8, shuffle=True)\n"
            "h.update(w.detach().numpy().tobytes())\n"
            "for _ in range(2):\n"
            "    for xb, yb in dl: h.update(xb.numpy().tobytes()); h.update(yb.numpy().tobytes())\n"
            "    for b in free: h.update(b.numpy().tobytes())\n"
            "print(h.hexdigest())")
    out = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}).stdout
           for seed, threads in (("1", "1"), ("2", "2"))]
    assert len(out[0].strip()) == len(hashlib.sha256().hexdigest()) and out[0] == out[1]


# ---- batches

@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("transform", [None, Normalize(.2, .3), lambda x: x])
def test_batches_alias_neither_the_data_nor_each_other(shuffle, transform):
    x, y = torch.rand(20, 3), torch.arange(20)
    before = x.clone(), y.clone()
    dl = DataLoader(TensorDataset(x, y), 8, shuffle=shuffle, transform=transform, seed=0)
    batches = list(dl)
    kept = [(xb.clone(), yb.clone()) for xb, yb in batches]
    places = {t.untyped_storage().data_ptr() for b in batches for t in b}
    assert len(places) == 2 * len(batches) and not places & {t.untyped_storage().data_ptr() for t in (x, y)}
    batches[0][0].zero_(), batches[0][1].zero_()
    equal(batches[1:], kept[1:])
    equal((x, y), before)


@pytest.mark.parametrize("dataset", [torch.arange(10), list(range(10))], ids=["tensor", "list"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_iterations_may_overlap(dataset, shuffle):
    dl = DataLoader(dataset, 3, shuffle=shuffle, seed=0)
    pairs = [(a, b) for o in dl for i in dl for a in o.tolist() for b in i.tolist()]
    assert sorted(pairs) == [(a, b) for a in range(10) for b in range(10)]
    one, two = iter(dl), iter(dl)
    halves = [(next(one), next(two)) for _ in range(len(dl))]
    for side in (0, 1):
        assert sorted(torch.cat([h[side] for h in halves]).tolist()) == list(range(10))


def test_stopping_early_leaves_the_next_epoch_whole():
    dl = DataLoader(torch.arange(20), 3, shuffle=True, seed=0)
    for _ in dl:
        break
    assert len(torch.cat(list(dl)).unique()) == 20


def test_bytes_and_floats_give_the_same_batches(tiny):
    x, y = tiny.train_x.unsqueeze(1), tiny.train_y
    mean, std = pixel_stats(x)
    ready = (x.float() / 255 - mean) / std
    a = DataLoader(TensorDataset(x, y), 8, True, seed=1, transform=Normalize(mean, std))
    for (xa, ya), (xb, yb) in zip(a, DataLoader(TensorDataset(ready, y), 8, True, seed=1), strict=True):
        assert xa.dtype == torch.float32 and xa.is_contiguous() and ya.dtype == torch.int64
        torch.testing.assert_close(xa, xb, rtol=0, atol=1e-6)
        equal(ya, yb)
    assert a.tensors[0].dtype == torch.uint8 and a.tensors[0].data_ptr() == x.data_ptr()  # on its device: not even copied


def test_a_batch_of_strings_is_no_pair():
    assert first(DataLoader("abcdef", 3)) == ["a", "b", "c"]
    assert first(DataLoader(["ab", "cd"], 2, transform=lambda b: [s.upper() for s in b])) == ["AB", "CD"]


def test_the_transform_gets_the_inputs_alone():
    seen = []
    def twice(x): seen.append(x.shape); return x * 2
    for dataset in (TensorDataset(torch.ones(5, 2), torch.ones(5)), [(torch.ones(2), 1.)] * 5, torch.ones(5, 2), [torch.ones(2)] * 5):
        batch = first(DataLoader(dataset, 5, transform=twice))
        xb, rest = (batch[0], batch[1:]) if isinstance(batch, tuple) else (batch, ())
        assert (xb == 2).all() and all((r == 1).all() for r in rest)
    assert seen == [(5, 2)] * 4


# ---- Normalize and pixel_stats

@pytest.mark.parametrize("dtype, tolerance", [(torch.uint8, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_normalize(rng, dtype, tolerance, channels):
    x = torch.randint(0, 256, (4, channels or 1, 5, 7), dtype=torch.uint8)
    scaled = x.double() / 255
    mean, std = torch.rand(channels or 1) * .8 + .1, torch.rand(channels or 1) * .4 + .2
    given = (mean.tolist(), std.tolist()) if channels else (mean.item(), std.item())
    m, s = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in given)
    x = x if dtype == torch.uint8 else scaled.to(dtype)
    x = x.transpose(-1, -2) if rng.random() < .5 else x
    scaled = scaled.transpose(-1, -2) if scaled.shape != x.shape else scaled
    before, n = x.clone(), Normalize(*given)
    out = n(x)
    want = (scaled - m) / s
    assert out.dtype == (torch.float32 if dtype == torch.uint8 else dtype) and x.equal(before)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(n.decode(out).double(), scaled, rtol=0, atol=tolerance)


def test_normalize_refuses():
    for mean, std in ((.5, 0.), (.5, -1.), ((.1, .2), .5), ((.1, .2), (.5, .5, .5)), ([[.1]], [[.2]]), (.5, float("nan"))):
        with pytest.raises(ValueError, match="Normalize got"):
            Normalize(mean, std)
    with pytest.raises(ValueError, match="torch.int64"):
        Normalize(.5, .5)(torch.arange(4))


def test_pixel_stats_are_exact():
    x = torch.randint(0, 256, (5000, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = pixel_stats(x)
    d = x.double() / 255
    assert abs(mean - d.mean().item()) < 1e-12 and abs(std - d.std(correction=0).item()) < 1e-12
    assert pixel_stats(torch.full((3, 2, 2), 255, dtype=torch.uint8)) == (1, 0)


# ---- bad input: one sentence each

@pytest.mark.parametrize("make, words", [
    (lambda: DataLoader([]), "data set is empty"),
    (lambda: DataLoader(torch.zeros(0, 3)), "data set is empty"),
    (lambda: DataLoader(TensorDataset(torch.zeros(0), torch.zeros(0)), drop_last=True), "data set is empty"),
    (lambda: DataLoader(range(5), 0), "batch_size is 0"),
    (lambda: DataLoader(range(5), -3), "batch_size is -3"),
    (lambda: DataLoader(range(5), 2.), "batch_size is 2.0"),
    (lambda: DataLoader(range(5), True), "batch_size is True"),
    (lambda: DataLoader(range(5), 6, drop_last=True), "fewer than one batch"),
    (lambda: DataLoader(range(5), seed="42"), "seed is '42'"),
    (lambda: DataLoader(range(5), seed=1.), "seed is 1.0"),
    (lambda: DataLoader(range(5), shuffle=True, seed=2**64), "at most 64 bits"),
    (lambda: DataLoader(i for i in range(5)), "generator lacks them"),
    (lambda: DataLoaders([], iter([])), "validation loader is a list_iterator"),
    (lambda: DataLoaders((i for i in range(3)), []), "training loader is a generator"),
    (lambda: DataLoaders([], []).one_batch(), "no batch"),
    (lambda: DataLoaders(DataLoader([1.5, 2.5]), []).c, "classes="),
])
def test_bad_input_ends_in_one_sentence(make, words):
    with pytest.raises(ValueError, match=words) as e:
        make()
    text = str(e.value)
    assert text.endswith(".") and "\n" not in text


def test_inputs_and_targets_of_different_length():
    dataset = TensorDataset(torch.zeros(4, 2), torch.zeros(4))
    dataset.tensors = torch.zeros(4, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="4, 3 items; .*same length"):
        DataLoader(dataset)


def test_seeds_at_the_limits_work():
    for seed in (0, -1, 2**63, 2**64 - 1, -2**63):
        assert len(list(DataLoader(range(5), 2, shuffle=True, seed=seed))) == 3


# ---- loss, accuracy, parameters

def test_loss_and_accuracy_like_torch(rng):
    n = rng.randint(1, 50)
    p, t = (torch.randn(n, 1) * 3).requires_grad_(), (torch.rand(n, 1) > .5).float()
    loss = mnist_loss(p, t)
    torch.testing.assert_close(loss, F.l1_loss(p.sigmoid(), t))
    grad, = torch.autograd.grad(loss, p)
    want, = torch.autograd.grad(F.l1_loss(p.sigmoid(), t), p)
    torch.testing.assert_close(grad, want)
    for targets in (t, t.long(), t.bool()):
        assert mnist_loss(p, targets) == loss
        assert batch_accuracy(p, targets).item() == pytest.approx(((p > 0).float() == t).float().mean().item())


@pytest.mark.parametrize("f", [mnist_loss, batch_accuracy])
@pytest.mark.parametrize("shapes", [((5, 1), (5,)), ((5,), (5, 1)), ((5, 1), (4, 1)), ((5, 1), (1, 1)), ((5, 2), (5, 1))])
def test_shapes_that_would_broadcast_are_refused(f, shapes):
    with pytest.raises(ValueError, match="same shape") as e:
        f(*(torch.zeros(s) for s in shapes))
    assert all(str(list(s)) in str(e.value) for s in shapes)


@pytest.mark.parametrize("f", [mnist_loss, batch_accuracy])
def test_empty_batch_is_refused(f):
    with pytest.raises(ValueError, match=r"^The batch is empty \(shape \[0, 1\]\), and the mean of nothing is nan"):
        f(torch.zeros(0, 1), torch.zeros(0, 1))


@pytest.mark.parametrize("x", [torch.zeros(0, 28, 28, dtype=torch.uint8), torch.zeros(2, 28, 28)])
def test_pixel_stats_refuses_what_it_would_get_wrong(x):
    with pytest.raises(ValueError, match="^pixel_stats takes uint8 pictures"):
        pixel_stats(x)


def test_init_params():
    torch.manual_seed(0); w = init_params((784, 1), std=.5)
    torch.manual_seed(0); equal(w.detach(), torch.randn(784, 1) * .5)
    assert w.requires_grad and w.is_leaf and init_params(1).shape == (1,) and abs(w.std().item() - .5) < .05


# ---- DataLoaders

def test_get_dls(tiny):
    dls = get_dls(8, tiny, seed=0, device="cpu")
    assert (len(dls.train), len(dls.valid), dls.c, dls.classes, dls.device.type) == (6, 2, 3, ["a", "b", "c"], "cpu")
    xs = torch.cat([xb for xb, _ in get_dls(5, tiny, device="cpu").train])
    assert xs.shape == (50, 1, 6, 5) and abs(xs.mean()) < 1e-5 and abs(xs.std(correction=0) - 1) < 1e-5
    equal(torch.cat([yb for _, yb in dls.valid]), tiny.valid_y)
    raw = torch.cat([xb for xb, _ in get_dls(8, tiny, normalize=False, device="cpu").valid])
    torch.testing.assert_close(raw[:, 0], tiny.valid_x.float() / 255)
    assert len(get_dls(8, tiny, drop_last=False, device="cpu").train) == 7
    again = get_dls(8, tiny, seed=0, device="cpu")
    equal(list(dls.train), list(again.train))
    with pytest.raises(ValueError, match="smaller batch_size or drop_last=False"):
        get_dls(64, tiny, device="cpu")


@pytest.mark.parametrize("kind", ["ours", "torch", "augmenting", "torch with a generator", "list"])
def test_looking_at_a_batch_changes_nothing(tiny, kind):
    train = {"ours": lambda: DataLoader(tiny.train, 8, True, seed=0, transform=lambda x: x.float() + torch.rand(()) * 0),
             "torch": lambda: TorchLoader(tiny.train, 8, shuffle=True),
             "augmenting": lambda: DataLoader(tiny.train, 8, transform=lambda x: x.float() + random.random() + np.random.rand()),
             "torch with a generator": lambda: TorchLoader(tiny.train, 8, shuffle=True, generator=torch.Generator().manual_seed(4)),
             "list": lambda: [tuple(t[:8] for t in tiny.train.tensors)]}[kind]()
    dls = DataLoaders(train, TorchLoader(tiny.valid, 8), classes=tiny.classes)
    torch.manual_seed(11)
    state = random_state()
    batch = dls.one_batch()
    equal(tuple(batch), tuple(dls.one_batch()))
    dls.show_batch(4)
    now = random_state()
    assert now["torch"].equal(state["torch"]) and (now["python"], now["numpy"]) == (state["python"], state["numpy"])
    equal(first(train)[1], batch[1])


def test_classes_are_found_or_asked_for(tiny):
    assert DataLoaders(TorchLoader(tiny.train, 8), []).classes == ["0", "1", "2"]
    class Named(list): classes = ["cat", "dog"]
    assert DataLoaders(DataLoader(Named([(1., 0), (2., 1)]), 2), []).c == 2
    with pytest.raises(ValueError, match="classes="):
        _ = DataLoaders([(torch.zeros(2, 3), torch.zeros(2))], []).classes


def test_show_batch_undoes_the_normalisation(tiny, monkeypatch):
    shown = {}
    monkeypatch.setattr("course_lib.dataloader.show_figure", lambda fig, **kw: shown.update(fig=fig, **kw))
    dls = get_dls(8, tiny, seed=0, device="cpu")
    xb, yb = dls.one_batch()
    dls.show_batch(5)
    axes = [ax for ax in shown["fig"].axes if ax.images]
    assert [ax.get_title() for ax in axes] == [tiny.classes[i] for i in yb[:5]] and all(t in shown["alt"] for t in tiny.classes[:1])
    pixels = axes[0].images[0].get_array()
    torch.testing.assert_close(torch.as_tensor(np.asarray(pixels)), dls.train.transform.decode(xb[0, 0]).clamp(0, 1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="N, H, W"):
        DataLoaders(DataLoader(TensorDataset(torch.zeros(4, 9), torch.zeros(4).long())), []).show_batch()


def test_to_device_and_to_cpu():
    x = {"a": [torch.ones(2, requires_grad=True), "text", 3], "b": (torch.zeros(1),)}
    y = to_cpu(x)
    assert not y["a"][0].requires_grad and y["a"][1:] == ["text", 3] and isinstance(y["b"], tuple)
    z = to_device(x, "meta")
    assert z["a"][0].device.type == z["b"][0].device.type == "meta" and to_device(x, None) is x


@pytest.mark.gpu
def test_the_same_batches_on_a_gpu(tiny):
    cpu, gpu = (get_dls(8, tiny, seed=0, device=d) for d in ("cpu", "cuda"))
    assert gpu.train.tensors[0].is_cuda and gpu.device.type == "cuda"
    for a, b in zip(cpu.train, gpu.train, strict=True):
        assert b[0].is_cuda and b[1].is_cuda
        torch.testing.assert_close(to_cpu(b), a, rtol=0, atol=1e-6)
    colour = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    n = Normalize((.1, .2, .3), (.4, .5, .6))
    torch.testing.assert_close(n(colour.cuda()).cpu(), n(colour), rtol=0, atol=1e-6)
