"""Fixtures that several files of tests share."""
import time

import pytest

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
