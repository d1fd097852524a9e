"""Every way in which pictures can fail to arrive, against torchvision's own download code and a small server on this machine."""
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib import datasets
from course_lib.datasets import ImageData, NoDataError, URLs
from course_lib.settings import data_path

GIVEN = {name: os.environ.get(name) for name in ("COURSE_DATA", "COURSE_SOURCE")}  # before the fixtures change them


# ---- what the tests stand on ----

def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def small_set() -> tuple[dict[str, bytes], torch.Tensor]:
    "The four unpacked files of a set of 20 + 10 pictures of 4x4, and its training pictures"
    rng = np.random.default_rng(0)
    train, valid = (rng.integers(0, 256, (n, 4, 4), dtype=np.uint8) for n in (20, 10))
    labels = [rng.permutation(np.arange(n, dtype=np.uint8) % 10) for n in (20, 10)]
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return dict(zip(names, map(idx, (train, labels[0], valid, labels[1])), strict=True)), torch.from_numpy(train)


FILES, TRAIN = small_set()
PACKED = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in FILES.items()}
COUNTS = {"train_counts": (2,) * 10, "valid_counts": (1,) * 10, "size": 4, "mirrors": ()}
FIRST = "train-images-idx3-ubyte.gz"


def photos() -> bytes:
    "Imagenette's archive in small: 2 + 1 pictures in each of two folders"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for part, n in (("train", 2), ("val", 1)):
            for folder in ("n01440764", "n02102040"):
                for i in range(n):
                    info = tarfile.TarInfo(f"imagenette2-160/{part}/{folder}/{i}.JPEG")
                    info.size = 3
                    tar.addfile(info, io.BytesIO(b"jpg"))
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    "Hands out `files`, or misbehaves as `manner` says for a file: a status, or hang, stall, trickle, truncated, empty, html, redirect"
    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.manner, self.got, self.over, self.delay = files, {}, [], threading.Event(), 0.

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self): self.answer(body=False)

    def do_GET(self):
        self.server.got.append(self.path[1:])
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path[1:]
        data, manner = self.server.files.get(name, b""), self.server.manner.get(name)
        time.sleep(self.server.delay)
        if manner == "hang":
            return self.server.over.wait(30)
        if isinstance(manner, int):
            return self.send_error(manner)
        if manner == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://example.invalid/{name}")
            return self.end_headers()
        data = {"empty": b"", "html": b"<html>Please sign in to this network.</html>"}.get(manner, data)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return None
        if manner == "stall":
            return self.server.over.wait(30)
        if manner == "truncated":
            data = data[:len(data) // 2]
        with contextlib.suppress(OSError):  # the other side may have given up
            for i in range(0, len(data), 1 if manner == "trickle" else 1 << 20):
                self.wfile.write(data[i:i + (1 if manner == "trickle" else 1 << 20)])
                if manner == "trickle" and self.server.over.wait(.1):
                    return None

    def log_message(self, *_): pass


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "An empty data folder, no memory of other tests, and no network but this machine"
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COURSE_SOURCE", "real")
    monkeypatch.setattr(datasets.platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "own")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datasets, "_said", set())
    monkeypatch.setattr(datasets, "_gave_up", {})
    real = socket.create_connection

    def here_only(address, *args, **kwargs):
        assert address[0] == "127.0.0.1", f"a test wanted to reach {address[0]}"
        return real(address, *args, **kwargs)
    monkeypatch.setattr(socket, "create_connection", here_only)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def server(monkeypatch):
    "A mirror of the small set that torchvision's classes and the course believe to be MNIST"
    import torchvision
    server = Server({**PACKED, "imagenette2-160.tgz": photos()})
    thread = threading.Thread(target=server.serve_forever, args=(.01,))
    thread.start()
    for name in ("MNIST", "FashionMNIST"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "mirrors", [server.url])
        monkeypatch.setattr(getattr(torchvision.datasets, name), "resources", [(name, md5(data)) for name, data in PACKED.items()])
    monkeypatch.setitem(torchvision.datasets.Imagenette._ARCHIVES, "160px",
                        (f"{server.url}imagenette2-160.tgz", md5(server.files["imagenette2-160.tgz"])))
    small(monkeypatch)
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def small(monkeypatch) -> None:
    "Expect the small sets; what is checked stays the same"
    monkeypatch.setattr(datasets, "_MNIST", dataclasses.replace(datasets._MNIST, md5=tuple(map(md5, FILES.values())), **COUNTS))
    monkeypatch.setattr(datasets, "_FASHION", dataclasses.replace(datasets._FASHION, **COUNTS))
    monkeypatch.setattr(datasets, "_IMAGENETTE", dataclasses.replace(
        datasets._IMAGENETTE, counts={"n01440764": (2, 1), "n02102040": (2, 1)}))


@pytest.fixture
def few(monkeypatch):
    "Drawn digits, 20 + 10 of them, and how often they were drawn"
    calls = []

    def digits(seed=0, variation=0.):
        calls.append((seed, variation))
        x = torch.arange(20 * 16, dtype=torch.int64).remainder(251).to(torch.uint8).view(20, 4, 4)
        return x, torch.arange(20) % 10, x[:10] + 1, torch.arange(10)
    monkeypatch.setattr(datasets.drawn, "digits", digits)
    return calls


def put(root: Path, name: str = "MNIST", **changed: bytes | None) -> Path:
    "The small set in the data folder, as torchvision lays it out"
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for file, data in FILES.items():
        data = changed.get(file.split("-ubyte")[0].replace("-", "_"), data)
        if data is not None:
            (folder / file).write_bytes(data)
    return folder


def left(root: Path) -> list[str]:
    "Every file below `root`, lock files aside"
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.name.endswith(".lock"))


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and 20 < len(text) < 600, text
    return text


def one_download(server: Server, names) -> bool:
    "Whether each file was asked for, and not more often than torchvision does for one download (it looks for a redirect first)"
    return set(server.got) == set(names) and max(map(server.got.count, names)) <= 2


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- ImageData ----

def parts(**changed) -> dict:
    good = dict(train_x=torch.zeros(4, 5, 6, dtype=torch.uint8), train_y=torch.tensor([0, 1, 0, 1]),
                valid_x=torch.zeros(2, 5, 6, dtype=torch.uint8), valid_y=torch.tensor([1, 0]),
                classes=["a", "b"], source="real", name="a set")
    return {**good, **changed}


def test_image_data():
    data = ImageData(**parts())
    assert repr(data) == "ImageData(a set, real: 4 training and 2 validation pictures of 5x6, 2 classes)" and data.c == 2
    assert isinstance(data.train, torch.utils.data.TensorDataset) and len(data.train) == 4 and len(data.valid) == 2
    x, y = data.train[1]
    assert x.shape == (5, 6) and x.dtype == torch.uint8 and y == 1


@pytest.mark.parametrize("changed, words", [
    (dict(train_y=torch.tensor([0, 1, 0])), "4 pictures and train_y 3 labels"),
    (dict(valid_y=torch.tensor([0, 1, 0])), "2 pictures and valid_y 3 labels"),
    (dict(train_x=torch.zeros(4, 5, 6)), "torch.float32"),
    (dict(valid_x=np.zeros((2, 5, 6), np.uint8)), "valid_x is a ndarray"),
    (dict(train_x=torch.zeros(4, 1, 5, 6, dtype=torch.uint8)), "[4, 1, 5, 6]"),
    (dict(train_x=torch.zeros(0, 5, 6, dtype=torch.uint8), train_y=torch.zeros(0, dtype=torch.int64)), "train_x is empty"),
    (dict(valid_x=torch.zeros(2, 5, 7, dtype=torch.uint8)), "5x6 and valid_x of 5x7"),
    (dict(train_y=torch.tensor([0, 1, 0, 1.])), "train_y holds torch.float32"),
    (dict(train_y=[0, 1, 0, 1]), "train_y is a list"),
    (dict(train_y=torch.tensor([[0, 1, 0, 1]])), "[1, 4]"),
    (dict(train_y=torch.tensor([0, 1, 0, 2])), "label 2, but with 2 classes"),
    (dict(valid_y=torch.tensor([-1, 0])), "label -1"),
    (dict(classes=["a", "a"]), "a name of its own"),
    (dict(classes=[]), "at least one class"),
    (dict(source="painted"), "'painted'"),
])
def test_image_data_that_does_not_fit(changed, words):
    with pytest.raises(ValueError) as error:
        ImageData(**parts(**changed))
    assert words in one_sentence(error)


# ---- downloads ----

def test_a_download_arrives_whole_and_is_not_repeated(server, root, capsys):
    before = socket.getdefaulttimeout(), urllib.request._opener
    data = datasets.mnist()
    assert torch.equal(data.train_x, TRAIN) and data.source == "real" and data.name == "MNIST"
    assert left(root) == ["MNIST", "MNIST/raw", *(f"MNIST/raw/{name}" for name in sorted(FILES))]
    assert (socket.getdefaulttimeout(), urllib.request._opener) == before
    assert one_download(server, PACKED)
    server.got.clear()
    datasets.mnist()
    assert not server.got and capsys.readouterr().out == "MNIST: the real pictures, 20 for training and 10 for validation.\n"


REFUSALS = [
    (403, "HTTP Error 403: Forbidden"), (404, "HTTP Error 404: Not Found"), (503, "HTTP Error 503: Service Unavailable"),
    ("hang", "no answer for 0.5 seconds"), ("stall", "no answer for 0.5 seconds"), ("trickle", "not complete after 0.8 seconds"),
    ("truncated", "wrong checksum"), ("empty", "wrong checksum"), ("html", "wrong checksum"),
    ("redirect", "example.invalid offers no https"),
]


@pytest.mark.parametrize("manner, words", REFUSALS)
@pytest.mark.parametrize("name", [FIRST, "t10k-labels-idx1-ubyte.gz"])
def test_a_refused_download(server, root, monkeypatch, name, manner, words):
    server.manner[name] = manner
    with monkeypatch.context() as impatient, pytest.raises(NoDataError) as error:
        if manner in ("hang", "stall"):
            impatient.setattr(datasets, "ANSWER_SECONDS", .5)
        elif manner == "trickle":
            impatient.setattr(datasets, "_MNIST", dataclasses.replace(datasets._MNIST, seconds=.8))
        datasets.mnist()
    text = one_sentence(error)
    assert words in text and "127.0.0.1" in text and str(root / "MNIST" / "raw") in text and "COURSE_SOURCE=drawn" in text
    assert left(root) == []
    assert socket.getdefaulttimeout() is None
    server.manner.clear()
    assert len(datasets.mnist().train_x) == 20  # and the next attempt works


def test_the_second_mirror_is_tried(server, root, monkeypatch):
    import torchvision
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{server.url}gone/", server.url])
    server.manner.update({f"gone/{name}": 404 for name in PACKED})
    assert len(datasets.mnist().train_x) == 20


def test_only_https_leaves_this_machine(monkeypatch):
    for spec in (datasets._MNIST, datasets._FASHION, datasets._IMAGENETTE):
        assert spec.sources() and all(url.startswith("https://") for url in spec.sources())
    with datasets._careful_downloads(5), pytest.raises(datasets._PlainHttp, match="example.invalid offers no https"):
        urllib.request.urlopen("http://example.invalid/")


def test_behind_a_proxy_the_host_is_named_and_not_the_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with datasets._careful_downloads(5), pytest.raises(datasets._PlainHttp, match="example.invalid offers no https"):
        urllib.request.urlopen("http://example.invalid/")


def test_a_download_that_fills_the_disk(server, root, monkeypatch):
    import torchvision

    class Small(io.FileIO):
        def write(self, data):
            super().write(data[:5])
            full_disk()

    def small_disk(path, mode):
        return Small(path, mode) if "w" in mode else open(path, mode)
    monkeypatch.setattr(torchvision.datasets.utils, "open", small_disk, raising=False)
    with pytest.raises(NoDataError) as error:
        datasets.mnist()
    assert "the disk is full" in one_sentence(error)
    assert left(root) == []


def test_a_full_disk_is_seen_behind_the_second_try_over_http(server, monkeypatch):
    "After any error over https torchvision tries http, which is refused; the first error is the one to tell"
    from torchvision.datasets import MNIST, utils
    fetch = utils._urlretrieve
    monkeypatch.setattr(MNIST, "mirrors", ["https://example.invalid/"])
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, *rest: full_disk() if url.startswith("https") else fetch(url, *rest))
    with pytest.raises(NoDataError) as error:
        datasets.mnist()
    assert error.value.reason == "the disk is full"


def test_a_folder_that_cannot_be_written(server, root, monkeypatch, capsys, few):
    root.write_text("a file stands where the folder should be")
    with pytest.raises(NoDataError) as error:
        datasets.mnist()
    assert f"cannot be read from or written to {root}" in one_sentence(error) and not server.got
    monkeypatch.setenv("COURSE_SOURCE", "drawn")
    assert len(datasets.mnist().train_x) == len(datasets.mnist().train_x) == 20 and len(few) == 2
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and out[0].startswith("The drawn digits cannot be kept in the data folder (") and str(root) not in out[0]
    with pytest.raises(RuntimeError) as error:
        datasets.untar_data(URLs.MNIST_SAMPLE)
    assert "cannot be written" in one_sentence(error) and root.is_file()


TWO = """
import dataclasses, json, sys
import torchvision
from course_lib import datasets
url, resources, changed = json.loads(sys.argv[1])
torchvision.datasets.MNIST.mirrors, torchvision.datasets.MNIST.resources = [url], resources
datasets._MNIST = dataclasses.replace(datasets._MNIST, **{k: tuple(v) if isinstance(v, list) else v for k, v in changed.items()})
print("ready", flush=True)
sys.stdin.readline()
print(datasets.mnist())
"""


def test_two_processes_share_one_download(server, root):
    server.delay = .1
    resources = [(name, md5(data)) for name, data in PACKED.items()]
    given = json.dumps([server.url, resources, {**COUNTS, "md5": list(map(md5, FILES.values()))}])
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    runs = [subprocess.Popen([sys.executable, "-c", TWO, given], text=True, **pipes) for _ in range(2)]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        out, err = run.communicate(timeout=60)
        assert run.returncode == 0 and "ImageData(MNIST, real: 20 training" in out, err
    assert one_download(server, PACKED)
    assert left(root) == ["MNIST", "MNIST/raw", *(f"MNIST/raw/{name}" for name in sorted(FILES))]


@pytest.mark.parametrize("changed, words", [
    (dict(train_counts=(3, 1) + (2,) * 8), "labels a class instead of [3, 1, 2,"),
    (dict(train_counts=(2,) * 9 + (1,)), "train-images-idx3-ubyte has 336 bytes instead of 320"),
    (dict(size=5), "train-images-idx3-ubyte has 336 bytes instead of 516"),
])
def test_a_download_with_another_content_is_not_kept(server, root, monkeypatch, changed, words):
    "The packed file has the right checksum, as from a host that changed both; what is in it is looked at all the same"
    monkeypatch.setattr(datasets, "_FASHION", dataclasses.replace(datasets._FASHION, **changed))
    with pytest.raises(NoDataError) as error:
        datasets.fashion_mnist()
    assert words in one_sentence(error) and left(root) == []


def test_what_a_killed_process_left_is_cleared(server, root):
    (root / ".MNIST.part" / "MNIST" / "raw").mkdir(parents=True)
    (root / ".MNIST.part" / "MNIST" / "raw" / FIRST).write_bytes(b"half")
    datasets.mnist()
    assert left(root)[0] == "MNIST"


def test_a_process_that_never_finishes_is_not_waited_for_forever(root):
    with datasets._workshop(root, "MNIST", 1), pytest.raises(TimeoutError, match="another process has been busy with MNIST"):
        with datasets._workshop(root, "MNIST", .1):
            pass


# ---- present files ----

def test_present_files_need_no_network(root, monkeypatch):
    small(monkeypatch)
    put(root)
    monkeypatch.setattr(socket, "socket", None)
    before = left(root)
    for source in ("real", "auto"):
        monkeypatch.setenv("COURSE_SOURCE", source)
        assert torch.equal(datasets.mnist().train_x, TRAIN)
    assert left(root) == before and not list(root.rglob("*.lock"))


def test_packed_files_put_there_by_hand_are_used(server, root):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, data in PACKED.items():
        (folder / name).write_bytes(data)
    assert torch.equal(datasets.mnist().train_x, TRAIN) and not server.got
    assert all((folder / name).exists() for name in (*PACKED, *FILES))


def test_one_missing_file_is_added(server, root):
    folder = put(root, t10k_labels_idx1=None)
    kept = (folder / "train-images-idx3-ubyte").stat().st_mtime_ns
    assert len(datasets.mnist().valid_y) == 10
    assert (folder / "train-images-idx3-ubyte").stat().st_mtime_ns == kept and left(folder) == sorted(FILES)


images, labels = FILES["train-images-idx3-ubyte"], FILES["train-labels-idx1-ubyte"]


@pytest.mark.parametrize("changed, words", [
    (dict(train_images_idx3=images[:100]), "train-images-idx3-ubyte has 100 bytes instead of 336"),
    (dict(train_images_idx3=b""), "train-images-idx3-ubyte has 0 bytes"),
    (dict(train_images_idx3=images[:3] + b"\1" + images[4:]), "train-images-idx3-ubyte does not begin as a file of shape [20, 4, 4]"),
    (dict(train_images_idx3=images[:2] + b"\x0d" + images[3:]), "does not begin"),  # floats
    (dict(train_images_idx3=images[:-1] + bytes([images[-1] ^ 1])), "does not have the MD5 checksum"),
    (dict(train_labels_idx1=labels[:-1]), "train-labels-idx1-ubyte has 27 bytes instead of 28"),  # labels and images of different length
    (dict(t10k_labels_idx1=b"<html></html>"), "t10k-labels-idx1-ubyte has 13 bytes"),
])
def test_a_wrong_file_is_named_and_kept(server, root, monkeypatch, capsys, few, changed, words):
    folder = put(root, **changed)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(NoDataError) as error:
        datasets.mnist()
    text = one_sentence(error)
    assert words in text and "delete it" in text and str(folder) in text
    monkeypatch.setenv("COURSE_SOURCE", "auto")
    assert datasets.mnist().source == "drawn"
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and words in out and "delete it" in out and str(root) not in out
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and not server.got
    for file in FILES:
        if before[file] != FILES[file]:
            (folder / file).unlink()
    assert datasets.mnist().source == "real"  # what the sentence advised helps, in the same process


def test_label_counts_are_checked_where_no_checksum_is_known(server, root):
    put(root, "FashionMNIST", train_labels_idx1=labels[:-1] + bytes([(labels[-1] + 1) % 10]))
    with pytest.raises(NoDataError) as error:
        datasets.fashion_mnist()
    assert "labels a class instead of [2, 2," in one_sentence(error)


# ---- which pictures ----

def test_auto_falls_back_says_so_and_asks_once(server, root, monkeypatch, capsys, few):
    monkeypatch.setenv("COURSE_SOURCE", "auto")
    server.manner[FIRST] = 403
    data = datasets.mnist()
    assert data.source == "drawn" and repr(data).startswith("ImageData(MNIST, drawn:")
    server.manner.clear()
    server.got.clear()
    assert datasets.mnist().source == datasets.three_or_seven().source == "drawn" and not server.got
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("MNIST: drawn digits in place of the real pictures (it could not be downloaded: "
                                                   "HTTP Error 403: Forbidden)")
    assert str(root) not in out
    monkeypatch.setenv("COURSE_SOURCE", "real")  # who asks for them gets another attempt
    assert datasets.mnist().source == "real"


def test_auto_downloads_where_it_can(server, monkeypatch, few):
    monkeypatch.setenv("COURSE_SOURCE", "auto")
    assert datasets.mnist().source == "real" and not few


def test_drawn_never_touches_the_network(server, root, monkeypatch, few, capsys):
    monkeypatch.setenv("COURSE_SOURCE", "drawn")
    put(root)  # and not the real files either
    assert datasets.mnist().source == "drawn" and "as COURSE_SOURCE asks" in capsys.readouterr().out
    for wanted in (datasets.fashion_mnist, datasets.imagenette_folder):
        with pytest.raises(NoDataError) as error:
            wanted()
        assert "has no drawn version" in one_sentence(error)
    assert not server.got


def test_fashion_mnist(server, root):
    data = datasets.fashion_mnist()
    assert data.name == "FashionMNIST" and data.classes[9] == "Ankle boot" and torch.equal(data.train_x, TRAIN)


# ---- Imagenette ----

def test_imagenette(server, root):
    folder = datasets.imagenette_folder()
    assert folder == root / "imagenette2-160" == datasets.imagenette_folder() and one_download(server, ["imagenette2-160.tgz"])
    assert len(list(folder.rglob("*.JPEG"))) == 6 and left(root)[0] == "imagenette2-160"


@pytest.mark.parametrize("manner, words", [(404, "404"), ("truncated", "wrong checksum"), ("html", "wrong checksum")])
def test_imagenette_refused(server, root, manner, words):
    server.manner["imagenette2-160.tgz"] = manner
    with pytest.raises(NoDataError) as error:
        datasets.imagenette_folder()
    assert words in one_sentence(error) and left(root) == []


def test_a_half_unpacked_imagenette_is_not_taken_for_a_whole_one(server, root):
    datasets.imagenette_folder()
    (root / "imagenette2-160" / "val" / "n02102040" / "0.JPEG").unlink()
    with pytest.raises(NoDataError) as error:
        datasets.imagenette_folder()
    assert "imagenette2-160 is not whole (val/n02102040 has 0 pictures instead of 1); delete it" in one_sentence(error)
    assert len(list(root.rglob("*.JPEG"))) == 5


# ---- drawn digits ----

def cache(root: Path) -> list[Path]:
    return sorted((root / "drawn").glob("*.npz"))


def test_drawn_digits_are_kept(root, few):
    first, again = datasets.drawn_mnist(), datasets.drawn_mnist()
    assert len(few) == 1 and torch.equal(first.train_x, again.train_x) and torch.equal(first.valid_y, again.valid_y)
    datasets.drawn_mnist(seed=1)
    datasets.drawn_mnist(variation=1)
    datasets.drawn_mnist(variation=1.)
    assert few == [(0, 0.), (1, 0.), (0, 1)] and len(cache(root)) == 3
    assert len(left(root)) == 4  # the folder drawn and three files


@pytest.mark.parametrize("damage", [lambda b: b[:-200], lambda b: b"", lambda b: b"<html>",
                                    lambda b: b[:200] + bytes([b[200] ^ 255]) + b[201:]])
def test_a_damaged_cache_is_drawn_again(root, few, damage):
    good = datasets.drawn_mnist()
    file, = cache(root)
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(datasets.drawn_mnist().train_x, good.train_x) and len(few) == 2
    assert torch.equal(datasets.drawn_mnist().train_x, good.train_x) and len(few) == 2 and len(left(root)) == 2


def test_a_full_disk_only_costs_the_cache(root, few, monkeypatch, capsys):
    def savez(file, **arrays):
        file.write(b"a beginning")
        full_disk()
    monkeypatch.setattr(np, "savez", savez)
    assert len(datasets.drawn_mnist().train_x) == len(datasets.drawn_mnist().train_x) == 20
    assert capsys.readouterr().out == ("The drawn digits cannot be kept in the data folder (the disk is full); "
                                       "they are drawn afresh each time.\n")
    assert left(root) == ["drawn"]


def test_all_drawn_digits_come_from_the_cache_in_no_time(root):
    drawn = datasets.drawn_mnist()
    assert torch.bincount(drawn.train_y).tolist() == list(datasets._MNIST.train_counts)
    assert torch.bincount(drawn.valid_y).tolist() == list(datasets._MNIST.valid_counts)
    assert drawn.train_y[12] == drawn.train_y[10000] == 3
    start = time.process_time()
    again = datasets.drawn_mnist()
    assert time.process_time() - start < 1
    assert torch.equal(drawn.train_x, again.train_x)


# ---- three or seven, and folders of PNG files ----

def test_three_or_seven_has_the_order_of_file_names(monkeypatch):
    n = 2000
    y = torch.arange(n) % 10
    data = ImageData(torch.arange(n).remainder(256).to(torch.uint8)[:, None, None], y, torch.zeros(20, 1, 1, dtype=torch.uint8), y[:20],
                     list("0123456789"), "drawn", "MNIST")
    monkeypatch.setattr(datasets, "mnist", lambda: data)
    both = datasets.three_or_seven()
    names = sorted(f"{i}.png" for i in range(n) if i % 10 == 3)
    assert names[:4] == ["1003.png", "1013.png", "1023.png", "103.png"]
    assert both.train_x[:200, 0, 0].tolist() == [int(name[:-4]) % 256 for name in names]
    assert both.classes == ["3", "7"] and both.train_y.tolist() == [0] * 200 + [1] * 200 and both.valid_y.tolist() == [0, 0, 1, 1]
    assert both.source == "drawn" and both.name == "three-or-seven"


def test_untar_data(root, few, monkeypatch):
    monkeypatch.setenv("COURSE_SOURCE", "drawn")
    data = datasets.mnist()
    path = datasets.untar_data(URLs.MNIST_SAMPLE)
    assert sorted(p.name for p in path.ls()) == ["labels.csv", "train", "valid"]
    assert left(path) == ["labels.csv", "train", "train/3", "train/3/13.png", "train/3/3.png", "train/7", "train/7/17.png", "train/7/7.png",
                          "valid", "valid/3", "valid/3/3.png", "valid/7", "valid/7/7.png"]
    rows = [f"{name},{int('/7/' in name)}\n" for name in ("train/3/13.png", "train/3/3.png", "train/7/17.png", "train/7/7.png",
                                                         "valid/3/3.png", "valid/7/7.png")]
    assert (path / "labels.csv").read_text() == "".join(["name,label\n", *rows])
    for sub, x in (("train", data.train_x), ("valid", data.valid_x)):
        for file in (path / sub).rglob("*.png"):
            assert np.array_equal(np.array(Image.open(file)), x[int(file.stem)].numpy())
    monkeypatch.setattr(datasets, "_write_pngs", None)  # written once
    assert datasets.untar_data(URLs.MNIST_SAMPLE) == path
    (path / "train" / "3" / "3.png").unlink()
    with pytest.raises(RuntimeError) as error:
        datasets.untar_data(URLs.MNIST_SAMPLE)
    assert "is not whole (train/3 has 1 pictures instead of 2); delete it" in one_sentence(error)


def test_untar_data_of_the_whole_set_and_of_another_source(server, root, few, monkeypatch):
    path = datasets.untar_data(URLs.MNIST)
    assert path == root / "mnist_png" and sorted(p.name for p in path.ls()) == ["testing", "training"]
    assert len(list(path.glob("training/?/*.png"))) == 20 and len(list(path.glob("testing/?/*.png"))) == 10
    monkeypatch.setenv("COURSE_SOURCE", "drawn")
    other = datasets.untar_data(URLs.MNIST)
    assert other.parent == root / "drawn" and other.name.startswith("mnist_png-")
    with pytest.raises(ValueError) as error:
        datasets.untar_data("mnist_tiny")
    assert "not 'mnist_tiny'" in one_sentence(error)


def test_untar_data_on_a_full_disk(root, few, monkeypatch):
    monkeypatch.setenv("COURSE_SOURCE", "drawn")
    datasets.mnist()
    before, save, saved = left(root), Image.Image.save, []

    def some(self, path, **kwargs):
        saved.append(path)
        full_disk() if len(saved) == 3 else save(self, path, **kwargs)
    monkeypatch.setattr(Image.Image, "save", some)
    with pytest.raises(RuntimeError) as error:
        datasets.untar_data(URLs.MNIST)
    assert "the disk is full" in one_sentence(error) and left(root) == before


def refuse_writing(monkeypatch, root: Path, why: int) -> None:
    "Whoever wants to write to `root` gets the OSError `why`"
    workshop = datasets._workshop

    def refusing(folder, *rest, **kwargs):
        if root in (folder, *folder.parents):
            raise OSError(why, os.strerror(why))
        return workshop(folder, *rest, **kwargs)
    monkeypatch.setattr(datasets, "_workshop", refusing)


def test_untar_data_beside_a_folder_that_is_for_reading_only(root, few, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_SOURCE", "drawn")
    refuse_writing(monkeypatch, root, errno.EACCES)
    path = datasets.untar_data(URLs.MNIST_SAMPLE)
    assert path.parent == tmp_path / "own" / "drawn" and (path / "labels.csv").exists() and not root.exists()


def test_two_at_once_write_one_folder(root, few, monkeypatch):
    monkeypatch.setenv("COURSE_SOURCE", "drawn")
    paths, start, write, writes = [], threading.Barrier(2), datasets._write_pngs, []

    def slow(*args):
        writes.append(args)
        time.sleep(.2)
        write(*args)
    monkeypatch.setattr(datasets, "_write_pngs", slow)

    def one():
        start.wait()
        paths.append(datasets.untar_data(URLs.MNIST))
    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(paths) == 2 and paths[0] == paths[1] and len(writes) == 1 and len(few) == 1


# ---- the real thing ----

@pytest.mark.slow
def test_real_mnist(monkeypatch):
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    if datasets._MNIST.missing(data_path()) and GIVEN["COURSE_SOURCE"] != "real":
        pytest.skip("MNIST is not in the data folder, and COURSE_SOURCE is not real")
    monkeypatch.setenv("COURSE_SOURCE", "real")
    both = datasets.three_or_seven()
    assert both.train_y.bincount().tolist() == [6131, 6265] and both.valid_y.bincount().tolist() == [1010, 1028]
    assert both.train_x[1][4:10, 4:10].tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 29], [0, 0, 0, 48, 166, 224],
                                                    [0, 93, 244, 249, 253, 187], [0, 107, 253, 253, 230, 48], [0, 3, 20, 20, 15, 0]]
