"""Batches of 128 photos at 128 pixels, randomly cropped, mirrored, normalised: course_lib's mapped file against torchvision and PIL.

    python benchmarks/image_pipeline.py [rounds]          Imagenette, all of it (COURSE_DATA, COURSE_SOURCE)
    python benchmarks/image_pipeline.py --drawn [rounds]  the same on a few hundred drawn scenes, kept as JPEG files

torchvision: its Imagenette class with RandomResizedCrop(128), flip, ToTensor and Normalize on PIL pictures, in PyTorch's DataLoader with
two workers. Ours: decoded once, then RandomResizedCrop and Normalize on batches, in this process. Both crop alike (8 to 100 % of the area).
Pictures a second are by wall time, since workers are other processes; epochs take turns. Beside it the CPU time of a picture, workers
included, which is the same on a busy machine, where wall time is not. Memory is what a process that trains a small net needs at most,
workers included. Exits with 1 if ours, on one thread or on two, does not reach 3 times torchvision's pictures a second.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.utils.data
from PIL import Image
from torch import nn
from torchvision import datasets, transforms

from common import environment, interleaved, print_table, ratio
from course_lib.dataloader import Compose, DataLoader, Normalize, RandomResizedCrop
from course_lib.datasets import ImageData, NoDataError, image_folder, imagenette, imagenette_folder
from course_lib.drawn import draw_scenes

BATCH, SIZE, WORKERS, BAR = 128, 128, 2, 3.
SCALE = (.08, 1.)                                                      # torchvision's default, for both
MEAN, STD = (.465, .458, .430), (.285, .280, .302)


def write_scenes(folder: Path, n: int) -> None:
    "Drawn scenes as JPEG files of 160x160 in class folders"
    for part, count in (("train", n), ("val", n // 4)):
        labels = torch.arange(count) % 10
        for i, (x, k) in enumerate(zip(draw_scenes(labels, seed=len(part)), labels.tolist(), strict=True)):
            (place := folder / part / str(k)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.permute(1, 2, 0).numpy()).resize((160, 160)).save(place / f"{i}.JPEG", quality=90)


def load(folder: Path) -> ImageData:
    return imagenette() if folder.name == "imagenette2-160" else image_folder(folder)


def torchvision_loader(folder: Path) -> torch.utils.data.DataLoader:
    tfms = transforms.Compose([transforms.RandomResizedCrop(SIZE, scale=SCALE), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                               transforms.Normalize(MEAN, STD)])
    if folder.name == "imagenette2-160":
        dataset = datasets.Imagenette(folder.parent, size="160px", transform=tfms)
    else:
        dataset = datasets.ImageFolder(folder / "train", transform=tfms)
    return torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True)


def our_loader(folder: Path, *more) -> DataLoader:
    tfms = Compose([RandomResizedCrop(SIZE, scale=SCALE), Normalize(MEAN, STD), *more])
    return DataLoader(load(folder).train, BATCH, shuffle=True, drop_last=True, transform=tfms)


def drain(loader) -> None:
    for xb, _ in loader:
        assert xb.shape == (BATCH, 3, SIZE, SIZE) and xb.dtype == torch.float32


def cpu_seconds() -> float:
    "CPU time of this process and its workers so far"
    processes = psutil.Process(), *psutil.Process().children(recursive=True)
    return sum(sum(p.cpu_times()[:2]) for p in processes)


def noting(cpu: list[float], f) -> None:
    "Run `f` and add the CPU seconds that it took to `cpu`"
    before = cpu_seconds()
    f()
    cpu.append(cpu_seconds() - before)


def on_one_thread(loader) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    drain(loader)
    torch.set_num_threads(threads)


class Peak(threading.Thread):
    "The most memory that this process and its children had at once, and how much of it were pages of files (which may be forgotten)"
    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.files, self.process, self.over = 0, 0, psutil.Process(), threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(.02):
            rss = files = 0
            for process in (self.process, *self.process.children(recursive=True)):
                try:
                    info = process.memory_info()
                except psutil.Error:
                    continue
                rss, files = rss + info.rss, files + getattr(info, "shared", 0)
            if rss > self.peak:
                self.peak, self.files = rss, files


def child(kind: str, folder: Path) -> None:
    "Train a small net for up to 20 batches in this fresh process; print the peak of its memory in MB"
    peak = Peak()
    net = nn.Sequential(*(m for i, o in ((3, 16), (16, 32), (32, 64)) for m in (nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    opt = torch.optim.SGD(net.parameters(), lr=.01)
    loader = our_loader(folder) if kind == "ours" else torchvision_loader(folder)
    for i, (xb, yb) in enumerate(loader):
        nn.functional.cross_entropy(net(xb), yb).backward()
        opt.step(), opt.zero_grad()
        if i == 20:
            break
    peak.over.set()
    peak.join()
    print(peak.peak / 1e6, peak.files / 1e6)


def memory(kind: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, __file__, "--child", kind, str(folder)], capture_output=True, text=True, check=True)
    peak, files = map(float, done.stdout.split()[-2:])
    return f"{peak:.0f} MB, of which {files:.0f} MB pages of files"


def decode(folder: Path) -> tuple[float, int, int]:
    "Seconds to decode a fresh copy, the number of pictures, and the bytes of the decoded file"
    before = os.environ.get("COURSE_DATA")
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(folder, Path(root, folder.name), copy_function=os.symlink)
        os.environ["COURSE_DATA"] = root
        start = time.perf_counter()
        data = load(Path(root, folder.name))
        seconds = time.perf_counter() - start
        result = seconds, len(data.train_x) + len(data.valid_x), data.train_x.nbytes + data.valid_x.nbytes
        del data
    if before is None:
        del os.environ["COURSE_DATA"]
    else:
        os.environ["COURSE_DATA"] = before
    return result


def main(folder: Path, rounds: int) -> int:
    torch.set_num_threads(WORKERS)                                     # the same number for both
    print(environment())
    seconds, pictures, size = decode(folder)
    print(f"decoded once, all cores: {pictures:,} pictures in {seconds:.1f} s ({pictures / seconds:,.0f} a second), "
          f"a file of {size / 1e6:,.0f} MB\n")
    theirs, ours = torchvision_loader(folder), our_loader(folder)
    n = len(ours) * BATCH
    a, b = f"torchvision, PIL, {WORKERS} workers", "course_lib, one thread"
    judged = {b: partial(on_one_thread, ours), f"course_lib, {WORKERS} threads": partial(drain, ours)}
    ways = {a: partial(drain, theirs), **judged,
            f"{b}, batches made contiguous": partial(on_one_thread, our_loader(folder, torch.Tensor.contiguous))}
    cpu = {name: [] for name in ways}
    found = interleaved({name: partial(noting, cpu[name], f) for name, f in ways.items()}, rounds, time.perf_counter)
    rows = []
    for name, s in found.items():
        r, low, high = ratio(found, a, name)
        rows.append((name, f"{n / median(s):,.0f}", f"{r:.1f} ({low:.1f} to {high:.1f})", f"{median(cpu[name][1:]) / n * 1e6:.0f}"))
    print_table(rows, (f"an epoch of {n:,} at {SIZE} px", "pictures a second", "times torchvision's (range)", "CPU microseconds a picture"))
    print()
    print_table([("torchvision, PIL, workers included", memory("theirs", folder)), ("course_lib", memory("ours", folder))],
                ("training a small net", "peak memory"))
    reached = max(ratio(found, a, name)[0] for name in judged)
    print(f"\ntimes torchvision's pictures a second: {reached:.2f}, at least {BAR:g}: {'reached' if reached >= BAR else 'MISSED'}")
    return int(reached < BAR)


def on_drawn(rounds: int) -> int:
    with tempfile.TemporaryDirectory() as place:
        os.environ["COURSE_DATA"] = place
        write_scenes(Path(place, "scenes"), 512)
        return main(Path(place, "scenes"), rounds)


def on_photos(rounds: int) -> int:
    try:
        folder = imagenette_folder()
    except NoDataError as e:
        print(f"On drawn scenes in place of Imagenette ({e.reason}).")
        return on_drawn(rounds)
    return main(folder, rounds)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--child"]:
        child(arguments[1], Path(arguments[2]))
    else:
        drawn = arguments[:1] == ["--drawn"]
        sys.exit((on_drawn if drawn else on_photos)(int(arguments[drawn]) if arguments[drawn:] else 3))
