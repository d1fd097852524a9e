"""Crops, colour and mapped sets: against torchvision picture by picture, on every path, seeded, and without a copy of the set."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from course_lib import dataloader
from course_lib.dataloader import (Compose, DataLoader, DataLoaders, ImageDataLoaders, Normalize, RandomResizedCrop, ResizeCrop,
                                   crop_resize, get_dls, pixel_stats)
from course_lib.datasets import ImageData, mnist
from course_lib.settings import data_path, set_seed
from test_datasets import GIVEN, alone  # noqa: F401  (a fixture: an empty data folder)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print("seed", seed)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def pictures(rng, n: int = 6, h: int = 40, w: int = 40, channels: int = 3, last: bool = True) -> torch.Tensor:
    x = torch.from_numpy(rng.integers(0, 256, (n, h, w, channels), dtype=np.uint8)).permute(0, 3, 1, 2)
    return x if last else x.contiguous()


def colour(n: int = 20, size: int = 16, classes: tuple = ("cat", "dog")) -> ImageData:
    rng = np.random.default_rng(0)
    y = torch.arange(n) % len(classes)
    return ImageData(pictures(rng, n, size, size), y, pictures(rng, n // 2, size, size), y[:n // 2], list(classes), "real", "small")


def boxes_in(rng, n: int, h: int, w: int) -> torch.Tensor:
    hs, ws = rng.integers(1, h + 1, n), rng.integers(1, w + 1, n)
    return torch.tensor([[rng.integers(0, h - a + 1), rng.integers(0, w - b + 1), a, b] for a, b in zip(hs, ws, strict=True)])


# ---- crop and resize ----

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("h, w, size", [(40, 40, 32), (37, 53, 16), (20, 20, 48), (5, 9, 7)])
def test_crop_resize_is_torchvisions_picture_by_picture(rng, channels, last, h, w, size):
    "Bytes: equal to the last bit. As products of matrices: one step of 255, for PyTorch rounds twice"
    x = pictures(rng, 8, h, w, channels, last)
    boxes, flips = boxes_in(rng, 8, h, w), torch.from_numpy(rng.random(8) < .5)
    ours, products = crop_resize(x, boxes, flips, size), dataloader._by_products(x, boxes, flips, size)
    floats = dataloader._by_products(x.float() / 255, boxes, flips, size)
    for i, (box, flip) in enumerate(zip(boxes.tolist(), flips, strict=True)):
        theirs = v2.functional.resized_crop(x[i].contiguous(), *box, [size, size], antialias=True)
        exact = v2.functional.resized_crop(x[i].float() / 255, *box, [size, size], antialias=True)
        if flip:
            theirs, exact = v2.functional.horizontal_flip(theirs), v2.functional.horizontal_flip(exact)
        assert (ours[i].int() - theirs.int()).abs().max() <= (0 if channels == 3 else 1)
        assert (products[i].int() - theirs.int()).abs().max() <= 1
        torch.testing.assert_close(floats[i], exact, rtol=0, atol=1e-5)
    assert ours.dtype == products.dtype == torch.uint8 and ours.shape == products.shape == (8, channels, size, size)


def test_floats_on_the_cpu(rng):
    x, boxes = pictures(rng).double() / 255, torch.tensor([[3, 4, 30, 20]]).expand(6, 4)
    theirs = v2.functional.resized_crop(x, 3, 4, 30, 20, [16, 16], antialias=True)
    torch.testing.assert_close(crop_resize(x, boxes, torch.zeros(6, dtype=torch.bool), 16), theirs)


def test_the_whole_picture_at_its_size_stays_as_it_is(rng):
    x = pictures(rng)
    boxes, none, all_ = torch.tensor([[0, 0, 40, 40]]).expand(6, 4), torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    for f in (crop_resize, dataloader._by_products):
        assert torch.equal(f(x, boxes, none, 40), x) and torch.equal(f(x, boxes, all_, 40), x.flip(-1))
    assert torch.equal(ResizeCrop(40, crop_pct=1)(x), x)


def test_the_input_is_not_touched_and_its_arrangement_is_kept(rng):
    for last in (True, False):
        x = pictures(rng, last=last)
        before = x.clone()
        y = Compose([RandomResizedCrop(24), Normalize((.4, .5, .6), (.2, .3, .4))])(x)
        assert torch.equal(x, before) and y.dtype == torch.float32 and y.shape == (6, 3, 24, 24)
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# ---- random crops ----

def test_random_crops_are_distributed_like_torchvisions():
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(8, scale=(.2, .9), ratio=(.5, 1.5))
    a = torch.tensor([list(theirs.make_params([torch.empty(3, 60, 90)]).values()) for _ in range(3000)]).double()
    ours = RandomResizedCrop(8, scale=(.2, .9), ratio=(.5, 1.5))
    b, flips = ours.draw(3000, 60, 90)
    b = b.double()
    assert (b[:, :2] >= 0).all() and (b[:, 0] + b[:, 2] <= 60).all() and (b[:, 1] + b[:, 3] <= 90).all() and (b[:, 2:] >= 1).all()
    for x, y in ((a, b), (a[:, 2:].prod(1, keepdim=True), b[:, 2:].prod(1, keepdim=True))):
        error = ((x.var(0) + y.var(0)) / 3000).sqrt()
        assert ((x.mean(0) - y.mean(0)).abs() < 4 * error).all() and ((x.std(0) / y.std(0) - 1).abs() < .1).all()
    assert abs(flips.float().mean() - .5) < .04


@pytest.mark.parametrize("h, w", [(1, 1), (2, 300), (300, 2), (7, 5)])
def test_crops_of_strange_shapes_lie_inside(h, w):
    crop = RandomResizedCrop(4, scale=(.9, 1.))
    boxes, _ = crop.draw(200, h, w)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all() and (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([h, w])).all()
    if h != w:                                                     # as torchvision: the largest one of the shape that is nearest
        theirs = list(v2.RandomResizedCrop(4, scale=(.9, 1.)).make_params([torch.empty(3, h, w)]).values())
        assert h * w < 100 or boxes[0, 2:].tolist() == [max(1, v) for v in theirs[2:]]
    assert crop(torch.zeros(3, 3, h, w, dtype=torch.uint8)).shape == (3, 3, 4, 4)


def test_whole_pictures_only():
    boxes, flips = RandomResizedCrop(8, scale=(1, 1), ratio=(1, 1), flip=False).draw(50, 20, 20)
    assert (boxes == torch.tensor([0, 0, 20, 20])).all() and not flips.any()


def test_seeds_repeat_crops_and_each_epoch_has_its_own(rng):
    x = pictures(rng, 12)
    dls = [DataLoader(TensorDataset(x, torch.arange(12)), 4, shuffle=True, seed=1, transform=RandomResizedCrop(16)) for _ in range(2)]
    runs = []
    for dl in dls:
        set_seed(3)
        runs.append([[xb.clone() for xb, _ in dl] for _ in range(2)])
    assert all(a.equal(b) for p, q in zip(*runs, strict=True) for a, b in zip(p, q, strict=True))
    assert not runs[0][0][0].equal(runs[0][1][0])
    set_seed(4)
    dls[0].generator.manual_seed(1)
    assert not next(iter(dls[0]))[0].equal(runs[0][0][0])


def test_resize_crop_is_the_middle(rng):
    x = pictures(rng, 3, 40, 56)
    theirs = v2.functional.resized_crop(x, 2, 10, 35, 35, [24, 24], antialias=True)
    assert torch.equal(ResizeCrop(24)(x), theirs) and torch.equal(ResizeCrop(24)(x), ResizeCrop(24)(x))
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 5, 5), (160, 160), mode="bicubic").clamp(0, 1)
    theirs = v2.Compose([v2.Resize(round(128 / .875), antialias=True), v2.CenterCrop(128)])(smooth)
    assert (ResizeCrop(128)(smooth) - theirs).abs().mean() < 2e-3  # resize, then crop: the same but for a part of a pixel


@pytest.mark.parametrize("make, words", [
    (lambda: RandomResizedCrop(0), "size is 0; it has to be a whole number of pixels"),
    (lambda: RandomResizedCrop(12.), "size is 12.0"),
    (lambda: RandomResizedCrop(8, scale=(.5, .2)), "scale is (0.5, 0.2); give a lower and an upper bound"),
    (lambda: RandomResizedCrop(8, scale=(.5, 2)), "a cut is at most the whole picture"),
    (lambda: RandomResizedCrop(8, ratio=(0, 1)), "ratio is (0, 1)"),
    (lambda: ResizeCrop(8, crop_pct=1.2), "crop_pct is 1.2; it has to be"),
    (lambda: ResizeCrop(8, crop_pct=0), "crop_pct is 0; it has to be"),
    (lambda: RandomResizedCrop(8)(torch.zeros(4, 20, 20)), "but got the shape [4, 20, 20]; grey ones need a channel"),
    (lambda: ResizeCrop(8)(torch.zeros(4, 20, 20)), "but got the shape [4, 20, 20]"),
    (lambda: Compose([RandomResizedCrop(8), 3]), "Compose takes functions of a batch, but got a int"),
    (lambda: Compose(RandomResizedCrop(8)), "Compose takes a list of functions"),
])
def test_bad_input_ends_in_one_sentence(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


# ---- normalisation, in colour ----

@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("h, w", [(16, 16), (5, 9), (1, 1)])
def test_normalize_colour(rng, last, h, w):
    x = pictures(rng, 4, h, w, last=last)
    mean, std = (.4, .5, .6), (.2, .25, .3)
    expected = v2.functional.normalize(x.float() / 255, mean, std)
    norm = Normalize(mean, std)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm(x[0]), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(norm(x[:, :, ::2, 1:] if h > 1 else x), expected[:, :, ::2, 1:] if h > 1 else expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.decode(norm(x)), x.float() / 255, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError):
        norm(x[:, :2])


@pytest.mark.parametrize("last", [True, False])
def test_pixel_stats_in_colour_are_exact(rng, last):
    x = pictures(rng, 50, 30, 20, last=last)
    mean, std = pixel_stats(x)
    torch.testing.assert_close(torch.tensor(mean), (x.double() / 255).mean((0, 2, 3)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(std), (x.double() / 255).std((0, 2, 3), correction=0).float(), rtol=1e-6, atol=0)
    grey = pixel_stats(x[:, 0])
    assert isinstance(grey[0], float) and grey == pytest.approx((mean[0], std[0])) == pixel_stats(x[:, :1])


def test_pixel_stats_of_a_large_set_look_at_an_even_sample(monkeypatch):
    x = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 3, 2**10, 2**10)  # 600 MB, if anybody made them
    seen, square = [], torch.Tensor.square_
    monkeypatch.setattr(torch.Tensor, "square_", lambda self: seen.append(self.numel()) or square(self))
    mean, _ = pixel_stats(x)
    assert sum(seen) <= 1.5 * 2**27 and mean[0] == pytest.approx(99.5 / 255, rel=.03)


# ---- loaders ----

def test_compose():
    add = Compose([lambda x: x + 1, Normalize(.5, .25)])
    x = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(add(x), (x + .5) / .25)
    torch.testing.assert_close(add.decode(add(x)), x + 1)
    assert repr(Compose([RandomResizedCrop(8), ResizeCrop(4)])) == ("Compose([RandomResizedCrop(8, scale=(0.35, 1.0), flip=True), "
                                                                    "ResizeCrop(4, crop_pct=0.875)])")


def test_get_dls_in_colour():
    data = colour(60)
    dls = get_dls(8, data, seed=0, device="cpu")
    xb, yb = dls.one_batch()
    assert xb.shape == (8, 3, 16, 16) and dls.classes == ["cat", "dog"] and dls.c == 2 and len(dls.train) == 7
    everything = torch.cat([x for x, _ in get_dls(60, data, device="cpu").train])
    assert everything.mean((0, 2, 3)).abs().max() < 1e-5 and (everything.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    plain = get_dls(8, data, normalize=False, device="cpu").one_batch()[0]
    assert 0 <= plain.min() and plain.max() <= 1


def test_validation_is_never_augmented():
    data = colour()
    dls = get_dls(4, data, seed=0, device="cpu", size=12, augment=True)
    assert dls.one_batch()[0].shape == (4, 3, 12, 12)
    a, b = ([x for x, _ in dls.valid] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and a[0].shape == (8, 3, 12, 12)
    assert repr(dls.valid.transform).startswith("Compose([ResizeCrop(12, crop_pct=0.875), Normalize(")
    plain = get_dls(4, data, device="cpu", size=12)
    assert repr(plain.train.transform) == repr(plain.valid.transform) and "ResizeCrop(12, crop_pct=1)" in repr(plain.train.transform)
    same = get_dls(4, data, device="cpu", augment=True)
    assert "RandomResizedCrop(16" in repr(same.train.transform) and "ResizeCrop(16, crop_pct=1)" in repr(same.valid.transform)
    own = get_dls(4, data, device="cpu", augment=lambda x: x.flip(-1))
    assert torch.equal(own.valid.transform(data.valid_x), plain.train.transform.transforms[1](data.valid_x))
    bare = get_dls(4, data, device="cpu")                                          # pictures of any size can be given to it
    assert torch.equal(bare.valid.transform(data.valid_x), own.valid.transform(data.valid_x))
    assert bare.valid.transform(torch.zeros(1, 3, 50, 70, dtype=torch.uint8)).shape == (1, 3, 16, 16)


def test_digits_are_not_mirrored():
    for classes, flip in (("38", False), (("cat", "dog"), True)):
        dls = get_dls(4, colour(classes=tuple(classes)), device="cpu", augment=True)
        assert dls.train.transform.transforms[0].flip is flip
    grey = ImageData(torch.zeros(8, 9, 9, dtype=torch.uint8) + 5, torch.zeros(8).long(), torch.ones(2, 9, 9, dtype=torch.uint8),
                     torch.zeros(2).long(), ["a"], "drawn", "grey")
    assert get_dls(4, grey, normalize=False, device="cpu", size=6, augment=True).one_batch()[0].shape == (4, 1, 6, 6)


def mapped(path, n: int, size: int) -> torch.Tensor:
    "A mapped set of n pictures, all zeros, not in memory"
    with open(path, "wb") as f:
        f.truncate(n * size * size * 3)
    return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=(n, size, size, 3))).permute(0, 3, 1, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
def test_a_mapped_set_is_not_copied(tmp_path):
    x = mapped(tmp_path / "zeros.u8", 4000, 160)                                   # 307 MB
    rss = psutil.Process().memory_info
    data = ImageData(x, torch.zeros(4000).long(), x[:10], torch.zeros(10).long(), ["a"], "real", "zeros")
    before = rss()
    dls = get_dls(64, data, normalize=False, device="cpu", size=128, augment=True, seed=0)
    batches = iter(dls.train)
    for _ in range(5):
        xb, _ = next(batches)
    assert dls.train.tensors[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    now = rss()
    own = (now.rss - now.shared) - (before.rss - before.shared)                    # without pages of files
    assert own < 150e6 and now.rss - before.rss < 250e6 and xb.is_contiguous(memory_format=torch.channels_last)


def test_batches_of_a_mapped_set_are_copies(tmp_path):
    x = mapped(tmp_path / "zeros.u8", 8, 4)
    for shuffle in (True, False):
        batch = next(iter(DataLoader(x, 4, shuffle=shuffle)))
        batch += 1
        assert batch.shape == (4, 3, 4, 4) and x.sum() == 0


def test_a_set_too_large_for_the_device_stays_and_batches_go(monkeypatch):
    x = torch.arange(12.).view(6, 2)
    monkeypatch.setattr(dataloader, "_fits", lambda tensors, device: False)
    moved, to = [], dataloader.to_device
    monkeypatch.setattr(dataloader, "to_device", lambda item, device: moved.append(device) or to(item, device))
    batches = list(DataLoader(TensorDataset(x, x[:, 0]), 4, shuffle=True, seed=0, device="cpu"))
    assert moved.count("cpu") >= 2 and sorted(torch.cat([y for _, y in batches]).tolist()) == x[:, 0].tolist()


def test_from_folder(tmp_path, rng, monkeypatch):
    for part, n in (("train", 8), ("valid", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(tmp_path / "pets" / part / name / f"{i}.png")
    dls = ImageDataLoaders.from_folder(tmp_path / "pets", bs=4, size=32, device="cpu", seed=1)
    assert isinstance(dls, DataLoaders) and dls.classes == ["cat", "dog"] and dls.one_batch()[0].shape == (4, 3, 32, 32)
    assert dls.train.dataset.tensors[0].shape == (16, 3, 40, 40) and len(dls.valid.dataset) == 8
    shown = []
    monkeypatch.setattr(dataloader, "show_images", lambda ims, **_: shown.append(ims))
    monkeypatch.setattr(dataloader, "show_figure", lambda *_, **__: None)
    dls.show_batch(4)
    assert len(shown[0]) == 4 and all(im.shape == (3, 32, 32) and 0 <= im.min() and im.max() <= 1 and im.std() > .1 for im in shown[0])
    own = ImageDataLoaders.from_folder(tmp_path / "pets", bs=4, augment=True, device="cpu")
    assert own.one_batch()[0].shape == (4, 3, 40, 40) and "RandomResizedCrop(40" in repr(own.train.transform)
    share = ImageDataLoaders.from_folder(tmp_path / "pets" / "train", valid_pct=.25, bs=4, size=16, normalize=False, device="cpu")
    assert len(share.valid.dataset) == 4 and share.one_batch()[0].max() <= 1


@pytest.mark.slow
def test_exercise_8_of_chapter_04(monkeypatch):
    monkeypatch.setenv("COURSE_DATA", GIVEN["COURSE_DATA"] or str(data_path()))
    if not (data_path() / "MNIST" / "raw").is_dir():
        pytest.skip("MNIST is not in the data folder")
    x = mnist().train_x[:4000, None]

    def losing(low: float) -> tuple[float, float]:
        set_seed(0)
        boxes = RandomResizedCrop(28, scale=(low, 1)).draw(4000, 28, 28)[0].tolist()
        kept = torch.stack([p[:, t:t + h, l:l + w].sum() / p.sum() for p, (t, l, h, w) in zip(x, boxes, strict=True)])
        return kept.mean().item(), (kept < .9).float().mean().item()
    mean, share = losing(.35)
    assert mean == pytest.approx(.90, abs=.005) and share == pytest.approx(1 / 3, abs=.03)
    assert losing(.6)[1] > .05 > losing(.7)[1]


TWO = """
import torch
from course_lib.dataloader import RandomResizedCrop
from course_lib.settings import set_seed
set_seed(7)
x = torch.arange(6 * 3 * 30 * 30).remainder(251).byte().view(6, 3, 30, 30)
print(RandomResizedCrop(20)(x).long().mul(torch.arange(20)).sum().item())
"""


def test_two_fresh_processes_agree():
    found = {subprocess.run([sys.executable, "-c", TWO], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(found) == 1


@pytest.mark.slow
def test_the_benchmark_runs_on_drawn_pictures():
    "Whether the bar is reached is the benchmark's own exit status; a busy machine may miss it on so few pictures"
    script = Path(__file__).parent.parent / "benchmarks" / "image_pipeline.py"
    done = subprocess.run([sys.executable, str(script), "--drawn", "1"], capture_output=True, text=True)
    assert done.returncode in (0, 1) and "decoded once, all cores: 640 pictures" in done.stdout, done.stderr
    assert ("reached" if done.returncode == 0 else "MISSED") in done.stdout.splitlines()[-1] and "| course_lib, one thread |" in done.stdout


@pytest.mark.gpu
def test_the_same_crops_on_a_gpu(rng):
    device, data = torch.device("cuda"), colour(24, 40)
    batches = {}
    for d in ("cpu", device):
        set_seed(1)
        dls = get_dls(8, data, normalize=False, seed=0, device=d, size=24, augment=True)
        batches[d] = [x.cpu() for x, _ in dls.train] + [x.cpu() for x, _ in dls.valid]
        assert dls.train.tensors[0].device.type == torch.device(d).type
    for a, b in zip(*batches.values(), strict=True):
        assert (a - b).abs().max() < 1.01 / 255
