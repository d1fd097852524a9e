"""Pictures from files to one mapped tensor: every kind of bad picture, killed and competing decodes, what is kept and what is not."""
# ruff: noqa: F811  (pytest hands fixtures over by their names)
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib import datasets
from course_lib.datasets import ImageData, NoDataError, image_folder, imagenette, to_rgb
from test_datasets import GIVEN, alone, full_disk, left, one_sentence, parts, refuse_writing, root  # noqa: F401  (fixtures)


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    "A smooth picture that JPEG hardly changes"
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path) -> Path:
    "Six and four pictures of two classes, in three formats and several shapes"
    place = tmp_path / "animals"
    for part, n in (("train", 3), ("valid", 2)):
        for k, name in enumerate(("cat", "dog")):
            (place / part / name).mkdir(parents=True)
            for i in range(n):
                suffix = ("jpg", "png", "BMP")[i]
                picture(10 * k + i, ((40, 30), (30, 40), (33, 33))[i]).save(place / part / name / f"{i}.{suffix}")
    return place


def decoded(root: Path) -> list[str]:
    return [name for name in left(root) if name.startswith("decoded/")]


def square(image: Image.Image, size: int) -> torch.Tensor:
    "What is expected of a picture, [3, size, size], with PIL's own means"
    from torchvision.transforms import functional as F
    image = F.resize(F.center_crop(image, min(image.size)), [size, size])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- ImageData in colour ----

def test_image_data_in_colour():
    x = torch.zeros(4, 3, 5, 6, dtype=torch.uint8)
    data = ImageData(**parts(train_x=x, valid_x=x[:2]))
    assert repr(data) == "ImageData(a set, real: 4 training and 2 validation pictures of 5x6 in colour, 2 classes)"
    assert data.train[1][0].shape == (3, 5, 6)


@pytest.mark.parametrize("changed, words", [
    (dict(train_x=torch.zeros(4, 4, 5, 6, dtype=torch.uint8)), "train_x has the shape [4, 4, 5, 6]; pictures have to be [N, H, W] if grey"),
    (dict(train_x=torch.zeros(4, 5, 6, 3, dtype=torch.uint8)), "[N, 3, H, W] if in colour"),
    (dict(valid_x=torch.zeros(2, 3, 5, 6, dtype=torch.uint8)), "train_x has pictures of 5x6 and valid_x of 5x6 in colour"),
    (dict(valid_x=np.zeros((2, 5, 6), np.uint8)), "make it a uint8 tensor, [N, H, W] or [N, 3, H, W]"),
])
def test_image_data_refuses(changed, words):
    with pytest.raises(ValueError) as error:
        ImageData(**parts(**changed))
    assert words in one_sentence(error)


# ---- a folder of pictures ----

def test_image_folder(folder, root):
    data = image_folder(folder, size=24)
    assert data.classes == ["cat", "dog"] and data.name == "animals" and data.source == "real"
    assert data.train_y.tolist() == [0, 0, 0, 1, 1, 1] and data.valid_y.tolist() == [0, 0, 1, 1]
    assert data.train_x.shape == (6, 3, 24, 24) and data.train_x.is_contiguous(memory_format=torch.channels_last)
    for x, files in ((data.train_x, sorted(folder.glob("train/*/*"))), (data.valid_x, sorted(folder.glob("valid/*/*")))):
        for mine, file in zip(x, files, strict=True):
            assert torch.equal(mine, square(Image.open(file), 24)), file
    assert len(decoded(root)) == 3 and decoded(root)[0].startswith("decoded/animals-")


def test_later_calls_open_no_picture(folder, monkeypatch):
    first = image_folder(folder, size=24)
    monkeypatch.setattr(datasets, "_square", None)
    again = image_folder(str(folder), size=24)
    assert torch.equal(first.train_x, again.train_x) and torch.equal(first.valid_y, again.valid_y)


def test_nothing_is_read_until_it_is_used_and_nothing_goes_back_to_the_file(folder, root):
    x = image_folder(folder, size=24).train_x
    file = root / "decoded" / decoded(root)[0].split("/")[1] / "pictures.u8"
    before = file.read_bytes()
    assert len(before) == 10 * 24 * 24 * 3
    assert x.untyped_storage().data_ptr() == x.permute(0, 2, 3, 1).data_ptr()      # a view of the file, no copy
    x[0] = 7
    assert file.read_bytes() == before and not torch.equal(image_folder(folder, size=24).train_x[0], x[0])


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename", "time"])
def test_changed_files_are_decoded_anew(folder, root, change):
    old = image_folder(folder, size=24)
    file = folder / "train/cat/1.png"
    if change == "edit":
        picture(99, (50, 50)).save(file)
    elif change == "add":
        picture(99).save(folder / "train/dog/new.jpg")
    elif change == "remove":
        file.unlink()
    elif change == "rename":
        file.rename(folder / "train/cat/9.png")
    else:
        file = folder / "train/cat/2.BMP"
        length = file.stat().st_size
        picture(99, (33, 33)).save(file)
        assert file.stat().st_size == length
        os.utime(file, ns=(1, 1))
    new = image_folder(folder, size=24)
    assert len(new.train_x) == {"add": 7, "remove": 5}.get(change, 6)
    assert len(old.train_x) == 6 and old.train_x[1].sum() > 0                       # what was open stays as it was
    for mine, path in zip(new.train_x, sorted(folder.glob("train/*/*")), strict=True):
        assert torch.equal(mine, square(Image.open(path), 24))
    assert len(decoded(root)) == 3, "the old one is replaced"


def test_val_and_other_names(folder):
    (folder / "valid").rename(folder / "val")
    a = image_folder(folder, size=8)
    (folder / "train").rename(folder / "learn")
    b = image_folder(folder, train="learn", valid="val", size=8)
    assert torch.equal(a.train_x, b.train_x) and torch.equal(a.valid_x, b.valid_x)


def test_a_share_for_validation(folder, root):
    shutil.rmtree(folder / "valid")
    for k in range(8):
        picture(k).save(folder / "train/cat" / f"more{k}.png")
    for place in (folder, folder / "train"):
        data = image_folder(place, valid_pct=.3, size=8)
        assert len(data.train_x) == 10 and len(data.valid_x) == 4 and data.classes == ["cat", "dog"]
    again = image_folder(folder, valid_pct=.3, size=8)
    same = image_folder(folder, valid_pct=.3, seed=0, size=8)
    other = image_folder(folder, valid_pct=.3, seed=1, size=8)
    seen = {x.numpy().tobytes() for x in data.train_x} | {x.numpy().tobytes() for x in data.valid_x}
    assert len(seen) >= 12 and not ({x.numpy().tobytes() for x in data.train_x} & {x.numpy().tobytes() for x in data.valid_x})
    assert torch.equal(again.valid_x, data.valid_x) and torch.equal(same.valid_x, data.valid_x)
    assert not torch.equal(other.valid_x, data.valid_x)
    assert len(image_folder(folder, valid_pct=.001, size=8).valid_x) == 1 == len(image_folder(folder, valid_pct=.999, size=8).train_x)


def test_size_of_the_first_picture(folder):
    assert image_folder(folder, size=None).train_x.shape[2:] == (30, 30)
    (folder / "train/cat/0.jpg").write_bytes(b"no picture")
    picture(0, (400, 300)).save(folder / "train/cat/1.png")
    assert image_folder(folder, size=None).train_x.shape[2:] == (160, 160)


def test_folders_below_a_class_and_other_files(folder):
    (folder / "train/cat/2023/summer").mkdir(parents=True)
    picture(50).save(folder / "train/cat/2023/summer/a.jpeg")
    for name in ("notes.txt", ".DS_Store", "._0.jpg"):
        (folder / "train/cat" / name).write_text("not a picture")
    (folder / "train/.ipynb_checkpoints").mkdir()
    assert image_folder(folder, size=8).train_y.tolist() == [0] * 4 + [1] * 3


@pytest.mark.parametrize("prepare, arguments, words", [
    (lambda f: shutil.rmtree(f / "valid"), {}, "and 'valid', or, for one folder of classes, valid_pct=.2"),
    (lambda f: shutil.rmtree(f), {}, "There is no folder"),
    (lambda f: shutil.rmtree(f), {"valid_pct": .2}, "There is no folder"),
    (lambda f: (shutil.rmtree(f / "train/dog"), (f / "train/dog").mkdir()), {}, "The class folder 'dog' in "),
    (lambda f: (shutil.rmtree(f / "valid/dog"), (f / "valid/dog").mkdir()), {}, "The class folder 'dog' in "),
    (lambda f: (shutil.rmtree(f / "train/dog"), (f / "train/dog").mkdir(), (f / "train/dog/a.heic").write_text("")), {},
     "has no pictures (its 1 files are of other kinds, such as a.heic)"),
    (lambda f: (shutil.rmtree(f / "train"), (f / "train").mkdir()), {}, "has no folders; put the pictures of each class"),
    (lambda f: (f / "valid/cat").rename(f / "valid/lynx"), {}, "has the class 'lynx', which 'train' does not have"),
    (lambda f: [p.write_text("x") for p in (f / "train/dog").iterdir()], {},
     "None of the pictures of the class 'dog' in "),
    (lambda f: [p.write_text("x") for p in (f / "valid").rglob("*.*")], {}, "None of the validation pictures in "),
    (lambda f: None, {"valid_pct": 0}, "valid_pct is 0 of"),
    (lambda f: None, {"valid_pct": 20}, "valid_pct is 20 of"),
    (lambda f: None, {"size": 0}, "size is 0; it has to be a number of pixels from 1 to 4096"),
    (lambda f: None, {"size": 16.}, "size is 16.0"),
])
def test_a_folder_that_does_not_fit_ends_in_one_sentence(folder, root, prepare, arguments, words):
    prepare(folder)
    with pytest.raises(ValueError) as error:
        image_folder(folder, **{"size": 8, **arguments})
    assert words in one_sentence(error) and decoded(root) == []


# ---- every kind of picture ----

def save_kind(kind: str, path: Path) -> tuple[Path, Image.Image]:
    "A picture of a strange kind below `path`, and what it looks like in RGB"
    plain = picture(3, (48, 48))
    file = path / f"{kind}.png"
    if kind == "grey":
        plain.convert("L").save(file)
        return file, plain.convert("L").convert("RGB")
    if kind == "1 bit":
        plain.convert("1").save(file)
        return file, plain.convert("1").convert("RGB")
    if kind == "palette":
        plain.quantize(16).save(file)
        return file, plain.quantize(16).convert("RGB")
    if kind == "grey 16 bits":
        grey = np.array(plain.convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 256 + 17).save(file)
        return file, Image.fromarray(grey).convert("RGB")
    if kind in ("alpha", "grey alpha", "palette alpha"):
        alpha = Image.fromarray(np.tri(48, dtype=np.uint8) * 255)
        white, colours = Image.new("RGB", (48, 48), "white"), plain.convert("L").convert("RGB") if kind == "grey alpha" else plain
        seen = Image.composite(colours, white, alpha)
        if kind == "palette alpha":
            rgba = plain.quantize(8).convert("RGBA")
            rgba.putalpha(alpha)
            seen = Image.composite(rgba.convert("RGB"), white, alpha)
            index = np.array(plain.quantize(8))
            index[np.array(alpha) == 0] = 8
            p = Image.fromarray(index, "P")
            p.putpalette(plain.quantize(8).getpalette()[:24] + [1, 2, 3])
            p.save(file, transparency=8)
        else:
            image = plain.convert("L" if kind == "grey alpha" else "RGB")
            image.putalpha(alpha)
            image.save(file)
        return file, seen
    if kind == "CMYK":
        file = path / "cmyk.jpg"
        plain.convert("CMYK").save(file, quality=98)
        return file, plain
    if kind == "gif":
        file = path / "moving.gif"
        plain.save(file, save_all=True, append_images=[picture(4, (48, 48))])
        return file, plain
    assert kind == "webp"
    file = path / "web.webp"
    plain.save(file, lossless=True)
    return file, plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind, tolerance", [("grey", 0), ("1 bit", 0), ("palette", 0), ("grey 16 bits", 0), ("alpha", 0),
                                             ("grey alpha", 0), ("palette alpha", 0), ("CMYK", 8), ("gif", 40), ("webp", 0)])
def test_every_kind_of_picture_becomes_rgb(tmp_path, kind, tolerance):
    file, seen = save_kind(kind, tmp_path)
    found = datasets._square(file, 48)
    assert isinstance(found, bytes), found
    difference = np.abs(np.frombuffer(found, np.uint8).astype(int) - np.array(seen).flatten().astype(int))
    assert difference.max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, orientation):
    from PIL import ImageOps
    exif, image = Image.Exif(), picture(1, (60, 40))
    exif[0x0112] = orientation
    image.save(tmp_path / "phone.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "phone.png"))
    assert upright.size == ((60, 40) if orientation < 5 else (40, 60))
    assert np.array_equal(to_rgb(Image.open(tmp_path / "phone.png")), upright)
    found = np.frombuffer(datasets._square(tmp_path / "phone.png", 40), np.uint8).reshape(40, 40, 3)
    assert np.array_equal(torch.from_numpy(found.copy()).permute(2, 0, 1), square(upright, 40))


def test_damaged_exif_counts_as_none(folder, recwarn):
    picture(1, (40, 40)).save(folder / "train/cat/0.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert len(image_folder(folder, size=8).train_x) == 6 and not recwarn.list


def test_small_large_and_long_pictures(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert datasets._square(tmp_path / "dot.png", 4) == bytes([1, 2, 3]) * 16
    Image.new("RGB", (20_000, 1), "red").save(tmp_path / "line.png")
    assert datasets._square(tmp_path / "line.png", 2) == bytes([255, 0, 0]) * 4
    wide = Image.new("RGB", (20_000, 300), "white")
    wide.paste((0, 0, 255), (9_850, 0, 10_150, 300))
    wide.save(tmp_path / "wide.jpg")
    middle = np.frombuffer(datasets._square(tmp_path / "wide.jpg", 32), np.uint8).reshape(-1, 3)[32 * 16 + 16]
    assert np.abs(middle.astype(int) - [0, 0, 255]).max() < 4


def test_a_huge_jpeg_is_decoded_small(tmp_path):
    Image.new("L", (20_000, 6_000), 99).save(tmp_path / "huge.jpg", quality=50)     # 120 million pixels
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        start = time.process_time()
        found = datasets._square(tmp_path / "huge.jpg", 64)
    assert isinstance(found, bytes) and abs(found[0] - 99) < 3 and time.process_time() - start < 5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size, words", [((9_000, 9_000), "its 81 million pixels are too many"), ((14_000, 14_000), "far too many pixels")])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, size, words):
    Image.new("1", size).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "convert", None)                              # not even unpacked
    assert words in datasets._square(tmp_path / "bomb.png", 8)


def bad_pictures(place: Path) -> dict[str, str]:
    "Files with which something is wrong, by name, with words of what is"
    whole = place / "whole.jpg"
    picture(5, (200, 200)).save(whole)
    picture(5, (200, 200)).save(place / "whole.png")
    data, png = whole.read_bytes(), (place / "whole.png").read_bytes()
    (place / "cut.jpg").write_bytes(data[:len(data) // 2])
    (place / "cut.png").write_bytes(png[:len(png) // 2])
    (place / "start.jpg").write_bytes(data[:20])
    (place / "letter.jpg").write_text("Dear reader,")
    (place / "nothing.jpg").write_bytes(b"")
    (place / "gone.jpg").symlink_to(place / "nowhere.jpg")
    (place / "flipped.png").write_bytes(png[:60] + bytes(b ^ 255 for b in png[60:90]) + png[90:])
    (place / "folder.jpg").mkdir()
    return {"cut.jpg": "cut off", "cut.png": "cut off", "start.jpg": "", "letter.jpg": "no picture", "nothing.jpg": "no picture",
            "flipped.png": ""}


def test_bad_pictures_are_named_and_the_others_are_there(folder, root, capsys):
    good = image_folder(folder, size=8).train_x
    words = bad_pictures(folder / "train/cat")
    data = image_folder(folder, size=8)
    out = capsys.readouterr().out
    assert len(data.train_x) == 8 and torch.equal(data.train_x[-3:], good[-3:]) and data.train_y.tolist() == [0] * 5 + [1] * 3
    assert out.startswith("animals: 6 of 18 pictures cannot be read and are left out: train/cat/cut.jpg (it is cut off), ")
    assert out.endswith(" and 3 more.\n") and out.count("\n") == 1 and str(folder) not in out
    about = json.loads((root / decoded(root)[1]).read_text(encoding="utf-8"))
    for line, (name, why) in zip(about["left_out"], sorted(words.items()), strict=True):
        assert line.startswith(f"train/cat/{name} (") and why in line and str(folder) not in line
    image_folder(folder, size=8)
    assert capsys.readouterr().out == ""                                            # once a process


# ---- what is kept ----

@pytest.mark.parametrize("damage", ["cut", "longer", "bytes", "zeros", "no about", "half about", "other about", "no pictures"])
def test_damaged_files_are_decoded_again(folder, root, damage):
    good = image_folder(folder, size=8).train_x.clone()
    pictures, about = (root / decoded(root)[2], root / decoded(root)[1])
    data = pictures.read_bytes()
    if damage == "cut":
        pictures.write_bytes(data[:-1])
    elif damage == "longer":
        pictures.write_bytes(data + b"1")
    elif damage == "bytes":
        pictures.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    elif damage == "zeros":
        pictures.write_bytes(bytes(len(data)))
    elif damage == "no about":
        about.unlink()
    elif damage == "half about":
        about.write_text(about.read_text()[:100])
    elif damage == "other about":
        about.write_text("[1, 2]")
    else:
        pictures.unlink()
    assert torch.equal(image_folder(folder, size=8).train_x, good)
    assert pictures.read_bytes() == data


def test_full_disk(folder, root, monkeypatch):
    real = open

    def small_disk(file, mode="r", *args, **kwargs):
        f = real(file, mode, *args, **kwargs)
        return Full(f) if str(file).endswith("pictures.u8") and "w" in mode else f

    class Full:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *_): self.f.close()
        def write(self, data): full_disk()
    monkeypatch.setattr("builtins.open", small_disk)
    with pytest.raises(NoDataError) as error:
        image_folder(folder, size=8)
    assert "the disk is full" in one_sentence(error) and "point COURSE_DATA at another folder" in str(error.value)
    assert decoded(root) == []


def test_a_data_folder_for_reading_only(folder, root, monkeypatch, tmp_path):
    refuse_writing(monkeypatch, root, errno.EROFS)
    first = image_folder(folder, size=8)
    assert len(decoded(tmp_path / "own")) == 3 and not root.exists()
    monkeypatch.setattr(datasets, "_square", None)
    assert torch.equal(image_folder(folder, size=8).train_x, first.train_x)


def test_an_interrupted_decode_leaves_nothing_and_begins_anew(folder, root, monkeypatch):
    real, calls = datasets._square, []

    def interrupted(file, size):
        calls.append(file)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(file, size)
    monkeypatch.setattr(datasets, "_square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        image_folder(folder, size=8)
    assert decoded(root) == []
    assert len(image_folder(folder, size=8).train_x) == 6


RUN = """
import sys, time
from course_lib import datasets
real, slow = datasets._square, float(sys.argv[2])
def square(file, size):
    time.sleep(slow)
    sys.stdout.write("decoding\\n")          # at once: print writes the end of the line by itself, and there are several threads
    sys.stdout.flush()
    return real(file, size)
datasets._square = square
print("ready", flush=True)
sys.stdin.readline()
data = datasets.image_folder(sys.argv[1], size=8)
print(len(data.train_x), int(data.train_x.sum()), flush=True)
"""


def start(folder: Path, slow: float) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    run = subprocess.Popen([sys.executable, "-c", RUN, str(folder), str(slow)], text=True, **pipes)
    assert run.stdout.readline() == "ready\n", run.communicate()[1]
    run.stdin.write("go\n")
    run.stdin.flush()
    return run


def test_a_killed_decode_and_two_processes_at_once(folder, root):
    killed = start(folder, 1.)
    assert killed.stdout.readline() == "decoding\n"
    killed.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    killed.communicate()
    assert any(".part" in name for name in left(root)) and not any(name.endswith("about.json") for name in left(root))
    runs = [start(folder, .05) for _ in range(2)]
    outputs = [run.communicate(timeout=60) for run in runs]
    lines = [out.split("\n") for out, _ in outputs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert lines[0][-2] == lines[1][-2] == f"6 {int(image_folder(folder, size=8).train_x.sum())}"
    assert sorted(line.count("decoding") for line in lines) == [0, 10]              # one decoded, one waited
    assert len(decoded(root)) == 3


# ---- Imagenette, real or drawn ----

@pytest.fixture
def nette(root, monkeypatch) -> Path:
    "Imagenette in small, unpacked: 2 + 1 pictures in each of two classes"
    monkeypatch.setattr(datasets, "_IMAGENETTE", dataclasses.replace(
        datasets._IMAGENETTE, counts={"n01440764": (2, 1), "n02102040": (2, 1)}))
    for part, n in (("train", 2), ("val", 1)):
        for name in ("n01440764", "n02102040"):
            (root / "imagenette2-160" / part / name).mkdir(parents=True)
            for i in range(n):
                picture(i, (213, 160), "RGB" if i else "L").save(root / "imagenette2-160" / part / name / f"{name}_{i}.JPEG")
    return root / "imagenette2-160"


@pytest.fixture
def few_scenes(monkeypatch) -> list:
    "Drawn scenes, 20 + 10 of them, and how often they were drawn"
    calls = []

    def scenes(seed=0):
        calls.append(seed)
        x = torch.arange(20 * 48).remainder(251).to(torch.uint8).view(20, 3, 4, 4)
        return x, torch.arange(20) % 10, x[:10] + 1, torch.arange(10)
    monkeypatch.setattr(datasets.drawn, "scenes", scenes)
    return calls


def test_imagenette(nette, root, monkeypatch, capsys):
    data = imagenette()
    assert data.classes == ["tench", "English springer"] and data.train_y.tolist() == [0, 0, 1, 1] and data.source == "real"
    assert data.train_x.shape == (4, 3, 160, 160)
    for mine, file in zip(data.train_x, sorted(nette.glob("train/*/*")), strict=True):
        assert torch.equal(mine, square(Image.open(file).convert("RGB"), 160))
    assert capsys.readouterr().out == "Imagenette: the real photos, 4 for training and 2 for validation.\n"
    assert imagenette(size=64).train_x.shape == (4, 3, 64, 64)
    shutil.rmtree(nette)                                                            # later runs need no JPEG
    assert torch.equal(imagenette().train_x, data.train_x) and imagenette(64).valid_x.shape == (2, 3, 64, 64)
    monkeypatch.setattr(datasets, "_IMAGENETTE", dataclasses.replace(datasets._IMAGENETTE, counts={"n01440764": (9, 1)}))
    monkeypatch.setattr(datasets, "_download", lambda *_: full_disk())
    with pytest.raises(NoDataError):                                                # decoded from another set
        imagenette()


@pytest.mark.parametrize("size", [0, 161, 320, True, 128.])
def test_imagenette_has_160_pixels(size):
    with pytest.raises(ValueError) as error:
        imagenette(size)
    assert "from 1 to 160" in one_sentence(error)


def test_a_damaged_photo_of_imagenette_is_no_reason_to_go_on_without_it(nette, root, monkeypatch, capsys, few_scenes):
    file = nette / "val/n02102040/n02102040_0.JPEG"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(NoDataError) as error:
        imagenette()
    assert "has a damaged photo, val/n02102040/n02102040_0.JPEG (it is cut off); delete it" in one_sentence(error) and decoded(root) == []
    monkeypatch.setenv("COURSE_SOURCE", "auto")
    assert imagenette().source == "drawn" and few_scenes == [0]
    assert "damaged photo" in capsys.readouterr().out


def test_imagenette_on_a_full_disk(nette, monkeypatch, few_scenes, capsys):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(NoDataError) as error:
        imagenette()
    assert "the disk is full" in one_sentence(error)
    monkeypatch.setenv("COURSE_SOURCE", "auto")
    assert imagenette().source == "drawn" and "the disk is full" in capsys.readouterr().out


def test_drawn_scenes(root, monkeypatch, few_scenes, capsys):
    monkeypatch.setenv("COURSE_SOURCE", "drawn")
    data = imagenette()
    assert repr(data) == "ImageData(Imagenette, drawn: 20 training and 10 validation pictures of 4x4 in colour, 10 classes)"
    assert capsys.readouterr().out == ("Imagenette: drawn scenes in place of the real photos (as COURSE_SOURCE asks), 20 for training and "
                                       "10 for validation.\n")
    assert torch.equal(datasets.drawn_scenes().train_x, data.train_x) and few_scenes == [0]
    datasets.drawn_scenes(seed=1)
    assert few_scenes == [0, 1] and all("scenes-" in p.name for p in (root / "drawn").glob("*.npz"))


# ---- the real photos ----

@pytest.mark.slow
def test_the_real_imagenette(monkeypatch, root):
    monkeypatch.setenv("COURSE_DATA", GIVEN["COURSE_DATA"] or str(datasets.data_path()))
    if not (datasets.data_path() / "imagenette2-160").is_dir():
        pytest.skip("Imagenette is not in the data folder")
    data = imagenette()
    assert len(data.train_x) == 9469 and len(data.valid_x) == 3925 and data.train_x.shape[1:] == (3, 160, 160)
    assert torch.bincount(data.train_y).tolist() == [n for n, _ in datasets._IMAGENETTE.counts.values()]
    assert torch.bincount(data.valid_y).tolist() == [n for _, n in datasets._IMAGENETTE.counts.values()]
    from torchvision.datasets import Imagenette
    theirs = Imagenette(datasets.data_path(), split="train", size="160px")
    assert [names[0] for names in theirs.classes] == data.classes
    files = sorted((datasets.data_path() / "imagenette2-160/train").glob("*/*.JPEG"))
    for i in torch.randperm(9469, generator=torch.Generator().manual_seed(0))[:200].tolist():
        image = Image.open(files[i]).convert("RGB")
        assert torch.equal(data.train_x[i], square(image, 160)), files[i]
