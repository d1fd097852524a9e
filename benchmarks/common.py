"""What benchmarks and examples share: interleaved rounds, ratios and means with their spread, a line that names the hardware,
pictures held out for choosing, files of results."""
import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

import torch

from course_lib.dataloader import DataLoaders, get_dls
from course_lib.datasets import ImageData
from course_lib.learner import Learner


def environment() -> str:
    "One line: processor, cores, threads in use, versions"
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used{gpu}; "
            f"{platform.system()}, Python {platform.python_version()}, PyTorch {torch.__version__}")


def interleaved(functions: dict[str, Callable[[], object]], rounds: int = 7,
                clock: Callable[[], float] = time.process_time) -> dict[str, list[float]]:
    "Seconds (CPU time of this process) that each function took in each round; A B C A B C ..., after one round to warm up"
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for r in range(rounds + 1):
        for name, f in functions.items():
            start = clock()
            f()
            if r:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> tuple[float, float, float]:
    "Median, lowest and highest ratio a/b, round by round"
    rs = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
    return median(rs), min(rs), max(rs)


def print_table(rows: list[tuple], head: tuple) -> None:
    "Print rows as a Markdown table"
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(str(c) for c in row) + " |")


def mean_and_spread(values: list[float]) -> str:
    "For a table; one value has no spread"
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def real_only(data: ImageData) -> ImageData:
    "The data, if they are real; drawn ones end the program with a sentence"
    if data.source != "real":
        sys.exit(f"This needs the real {data.name}, but drawn pictures are in use; set COURSE_SOURCE=real, and COURSE_DATA to the "
                 "folder that holds it (or leave it out to download).")
    return data


def held_out(data: ImageData, n: int = 10_000, seed: int | None = None) -> ImageData:
    """The last `n` training pictures (with a seed: drawn ones) for validation, the others for training: what is chosen is chosen
    without the test set"""
    total = len(data.train_x)
    order = torch.arange(total) if seed is None else torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    train, valid = order[:-n].sort().values, order[-n:].sort().values
    return dataclasses.replace(data, train_x=data.train_x[train], train_y=data.train_y[train],
                               valid_x=data.train_x[valid], valid_y=data.train_y[valid])


def read_results(file: Path) -> dict:
    "The parts of a file of results; none if there is no file yet"
    return json.loads(file.read_text()) if file.exists() else {}


def write_results(file: Path, part: str, found: dict) -> None:
    "Put one part into a file of results; the others stay"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**read_results(file), part: found}, indent=1) + "\n")


def measured_fit(learn: Learner, fit: Callable[[], None]) -> dict:
    "Run `fit`, which trains `learn` with accuracy as its metric: figures of each epoch, seconds, size of the model, where it ran"
    load, start, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    fit()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    train, valid, accuracies = zip(*([round(v, 4) for v in values] for values in learn.recorder.values), strict=True)
    return {"accuracy": accuracies, "train_loss": train, "valid_loss": valid, "wall_s": round(wall, 1), "cpu_s": round(cpu, 1),
            "load": round(load, 1), "params": sum(p.numel() for p in learn.model.parameters()), "device": str(learn.device),
            "environment": environment()}


def add_run(file: Path, row: dict, same: Sequence[str]) -> None:
    "Put a run into the list `runs` of a file of results, at once and whole; one that agrees in all of `same` is replaced"
    rows = [r for r in read_results(file).get("runs", []) if any(r[k] != row[k] for k in same)]
    rows = sorted([*rows, row], key=lambda r: [str(r[k]) for k in same])
    file.parent.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text('{"runs": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n]}\n")
    part.replace(file)


# Chapter 10's, by the source of the pictures; drawn scenes are small and hold digits: no crops and flips
PHOTO_SETTINGS = {"real": {"epochs": 5, "batch": 128, "rate": 3e-3, "size": 128},
                  "drawn": {"epochs": 10, "batch": 64, "rate": 3e-3, "size": 64}}


def add_photo_options(parser: argparse.ArgumentParser) -> None:
    "An option for each of the settings"
    for name, kind in (("epochs", int), ("batch", int), ("rate", float), ("size", int)):
        parser.add_argument(f"--{name}", type=kind, help="chapter 10's if not given")


def photo_settings(args: argparse.Namespace, data: ImageData) -> dict:
    "The settings for these pictures, with what the options say"
    return {k: v if getattr(args, k) is None else getattr(args, k) for k, v in PHOTO_SETTINGS[data.source].items()}


def photo_dls(data: ImageData, batch: int, size: int, seed: int) -> DataLoaders:
    "Loaders that crop and flip photos, and take scenes as they are"
    return get_dls(batch, data, seed=seed, **({"size": size, "augment": True} if data.source == "real" else {}))
