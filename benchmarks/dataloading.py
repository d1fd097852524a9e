"""Handing out 60,000 pictures of 28x28 in batches of 512, shuffled and normalised: course_lib against PyTorch and PNG files.

    python benchmarks/dataloading.py [rounds]

One thread, CPU time of the process, taking turns. PyTorch's loader gets floats that were normalised beforehand; ours keeps
bytes and normalises each batch. Memory is the bytes of the stored tensors, and what an epoch adds to the peak of a fresh
process. The PNG files are read with PIL, without any loader, and 3,000 of them are scaled to 60,000. Exits with 1 if a
target is missed: 0.65 of PyTorch's time, a quarter of its bytes, 30 times as fast as PNG files.
"""
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, TensorDataset

from common import environment, interleaved, print_table, ratio
from course_lib.dataloader import DataLoader, Normalize, pixel_stats
from course_lib.datasets import mnist

N, BATCH, FILES = 60_000, 512, 3_000


def drain(loader) -> None:
    for _ in loader:
        pass


def torch_loader(x: Tensor, y: Tensor) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)


def torch_batched(x: Tensor, y: Tensor) -> torch.utils.data.DataLoader:
    "PyTorch's loader told to index whole batches: less known, and faster"
    dataset = TensorDataset(x, y)
    return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=BatchSampler(RandomSampler(dataset), BATCH, drop_last=False))


def ours(x: Tensor, y: Tensor, transform=None) -> DataLoader:
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=True, seed=0, transform=transform)


def read_png(files: list[Path]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files])


def peak_mb() -> float:
    "The highest resident memory of this process so far (Linux)"
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmHWM"))


def child(kind: str) -> None:
    "One epoch in this fresh process; print by how many MB the peak grew"
    warm = torch.zeros(1024, 1, 28, 28, dtype=torch.uint8)
    drain(ours(warm, warm[:, 0, 0, 0], Normalize(.13, .31))), drain(torch_loader(warm, warm[:, 0, 0, 0]))
    before, y = peak_mb(), torch.zeros(N, dtype=torch.int64)
    if kind == "ours":
        drain(ours(torch.empty(N, 1, 28, 28, dtype=torch.uint8).random_(), y, Normalize(.13, .31)))
    else:
        drain(torch_loader(torch.empty(N, 1, 28, 28).uniform_(), y))
    print(peak_mb() - before)


def growth(kind: str) -> str:
    if not Path("/proc/self/status").exists():
        return "-"
    done = subprocess.run([sys.executable, __file__, "--child", kind], capture_output=True, text=True, check=True)
    return f"{float(done.stdout.split()[-1]):.0f} MB"


def main(rounds: int) -> int:
    torch.set_num_threads(1)
    data = mnist()
    print(environment())
    x, y = data.train_x[:N].unsqueeze(1), data.train_y[:N]
    mean, std = pixel_stats(x)
    normalize = Normalize(mean, std)
    floats = normalize(x)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.png") for i in range(FILES)]
        for f, picture in zip(files, x[:, 0], strict=False):
            Image.fromarray(picture.numpy()).save(f)
        assert read_png(files[:50]).equal(x[:50, 0])
        torch.testing.assert_close(next(iter(DataLoader(TensorDataset(x, y), BATCH, transform=normalize)))[0],
                                   (x[:BATCH].float() / 255 - mean) / std, rtol=0, atol=1e-6)
        a, b = "PyTorch's loader, normalised floats", "PyTorch's, indexing whole batches, floats"
        c, d, e = "course_lib, normalised floats", "course_lib, bytes, (x / 255 - mean) / std", "course_lib, bytes, Normalize"
        png = f"PNG files, decoding alone ({FILES:,}, scaled)"
        seconds = interleaved({
            a: partial(drain, torch_loader(floats, y)), b: partial(drain, torch_batched(floats, y)), c: partial(drain, ours(floats, y)),
            d: partial(drain, ours(x, y, lambda xb: (xb.float() / 255 - mean) / std)), e: partial(drain, ours(x, y, normalize)),
            png: partial(read_png, files)}, rounds)
    seconds[png] = [s * N / FILES for s in seconds[png]]
    rows = []
    for name, s in seconds.items():
        r, low, high = ratio(seconds, name, a)
        rows.append((name, f"{median(s):.4f}", f"{r:.2f} ({low:.2f} to {high:.2f})"))
    print_table(rows, ("an epoch of 60,000, batches of 512", "CPU s", "against PyTorch's loader (range)"))
    print()
    print_table([("PyTorch's loader, floats", f"{floats.nbytes / 1e6:.1f} MB", growth("torch")),
                 ("course_lib, bytes", f"{x.nbytes / 1e6:.1f} MB", growth("ours"))],
                ("memory", "stored pictures", "peak of a process grows by"))
    print()
    found = {"time against PyTorch's loader": (ratio(seconds, e, a)[0], .65), "bytes against floats": (x.nbytes / floats.nbytes, .25),
             "time against PNG files": (ratio(seconds, e, png)[0], 1 / 30)}
    print_table([(k, f"{v:.4f}", f"{t:.4f}", "reached" if v <= t else "MISSED") for k, (v, t) in found.items()],
                ("claim", "measured", "at most", ""))
    return int(any(v > t for v, t in found.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        torch.set_num_threads(1)
        child(sys.argv[2])
    else:
        sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 7))
