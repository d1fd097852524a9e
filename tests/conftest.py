"""Fixtures that several files of tests share."""
import time

import pytest
import torch

from course_lib.settings import data_path, set_seed


@pytest.fixture
def seed() -> int:
    "Another seed each time, set everywhere"
    seed = int(time.time() * 1e6) % 2**31
    print("seed", seed)  # pytest shows it when a test fails
    set_seed(seed)
    return seed


@pytest.fixture
def real_pictures(monkeypatch) -> None:
    "The real MNIST is in use; without it in the data folder the test is skipped"
    if not (data_path() / "MNIST" / "raw").is_dir():
        pytest.skip("MNIST is not in the data folder")
    monkeypatch.setenv("COURSE_SOURCE", "real")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Skip what is marked `gpu` where there is no CUDA device, or no MPS device where it says `gpu('mps')`; pytest lists them"
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for item in items:
        for mark in item.iter_markers("gpu"):
            if not there[name := mark.args[0] if mark.args else "cuda"]:
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: no {name} device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("mps", marks=pytest.mark.gpu("mps"))])
def device(request) -> str:
    "Each kind of device in turn"
    return request.param
