"Settings: every variable, every sentence that an error ends in"
import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import platformdirs
import pytest
import torch

from course_lib import settings
from course_lib.settings import (course_scale, course_source, data_path, default_device, expect, in_notebook, pick, random_state, record,
                                 set_random_state, set_seed)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    "No setting from outside, and no device remembered from before or for later"
    for name in ("COURSE_DATA", "COURSE_SOURCE", "COURSE_DEVICE", "COURSE_SCALE"):
        monkeypatch.delenv(name, raising=False)
    settings._default_device.cache_clear()
    yield
    settings._default_device.cache_clear()


@pytest.mark.parametrize(("read", "name", "options"), [(course_scale, "COURSE_SCALE", ["full", "test"]),
                                                       (course_source, "COURSE_SOURCE", ["auto", "real", "drawn"])])
def test_variables_with_a_list_of_values(monkeypatch, read, name, options):
    assert read() == options[0]
    for value in options:
        monkeypatch.setenv(name, value)
        assert read() == value
    monkeypatch.setenv(name, "")                     # empty is unset
    assert read() == options[0]
    for wrong in (options[1].upper(), options[0] + " ", "1"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(ValueError) as error:
            read()
        listed = ", ".join(options[:-1]) + f" or {options[-1]}"
        assert str(error.value) == f"{name} is {wrong!r}; it can be {listed}. Correct it, or unset it to get {options[0]!r}."


def test_data_path(monkeypatch, tmp_path):
    assert data_path() == platformdirs.user_cache_path("course_lib", appauthor=False)
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "not yet there"))
    assert data_path() == tmp_path / "not yet there" and not data_path().exists()
    monkeypatch.setenv("COURSE_DATA", "~/pictures")
    assert data_path() == Path.home() / "pictures"
    monkeypatch.setenv("COURSE_DATA", "")
    assert data_path() == platformdirs.user_cache_path("course_lib", appauthor=False)


def test_pick(monkeypatch):
    assert pick(full=5, test=2) == 5
    monkeypatch.setenv("COURSE_SCALE", "test")
    assert pick(full=5, test=2) == 2 and pick(full=None, test=[1]) == [1]
    with pytest.raises(TypeError):
        pick(5, 2)
    monkeypatch.setenv("COURSE_SCALE", "tiny")
    with pytest.raises(ValueError, match="^COURSE_SCALE is 'tiny'"):
        pick(full=5, test=2)


@pytest.mark.parametrize(("value", "known", "right"), [
    (.95108, .9511, True), (.95105, .9511, True), (.95114, .9511, True), (.9513, .9511, False), (.9509, .9511, False),
    (84, 84, True), (84.4, 84, True), (85, 84, False), (25823.812, 25823.81, True), (25823.83, 25823.81, False),
    (.00012, .0001, True), (.0002, .0001, False), (-.25, -.25, True), (-.26, -.25, False), (1e-6, 1e-6, True), (3e-6, 1e-6, False),
    (.9, (.8, 1.), True), (.8, (.8, 1.), True), (1., (.8, 1.), True), (.79, (.8, 1.), False), (1.01, (.8, 1.), False),
    (float("nan"), .5, False), (float("nan"), (0., 1.), False), (float("inf"), (0., 1.), False),
])
def test_expect(value, known, right):
    other = (-1e9, 1e9)
    for v in (value, torch.tensor(value, dtype=torch.float64)):
        for source in ("real", "drawn"):
            figures = {"real": other, "drawn": other, source: known}
            if right:
                expect(v, source, **figures)
            else:
                with pytest.raises(AssertionError, match=rf" on {source} pictures is (not|outside) "):
                    expect(v, source, **figures)


def test_expect_says_what_was_measured_and_known():
    with pytest.raises(AssertionError, match=r"^0\.9513 on real pictures is not 0\.9511$"):
        expect(.9513, "real", real=.9511, drawn=(.93, .97))
    with pytest.raises(AssertionError, match=r"^0\.91 on drawn pictures is outside 0\.93 to 0\.97$"):
        expect(.91, "drawn", real=.9511, drawn=(.93, .97))
    for wrong in ("auto", "", None):
        with pytest.raises(ValueError) as error:
            expect(.9511, wrong, real=.9511, drawn=(.93, .97))
        assert str(error.value) == f"source is {wrong!r}; it has to be 'real' or 'drawn', as in data.source."


def test_record_prints_in_a_script(capsys):
    record("one", .95108, book=.9511)
    record("a tensor", torch.tensor(7.305), digits=3)
    record("seeds", [.968, .971, .970], book="about .97")
    assert capsys.readouterr().out.splitlines() == [
        "one: 0.9511; the book has 0.9511", "a tensor: 7.305",
        "seeds: 0.9697 in the mean of 3 (spread 0.0015, 0.9680 to 0.9710); the book has about .97"]


def test_record_in_a_notebook_leaves_its_values_in_the_metadata(monkeypatch, capsys):
    import IPython.display
    shown = []
    monkeypatch.setattr(settings, "in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", lambda *args, **kwargs: shown.append((args, kwargs)))
    record("seeds", [.5, torch.tensor(.25)], book=.4)
    [((data,), options)] = shown
    assert data["text/plain"].startswith("seeds: 0.3750 in the mean of 2") and options["raw"] is True
    assert options["metadata"] == {"course": {"result": "seeds", "values": [.5, .25], "book": .4, "digits": 4}}
    json.dumps(options["metadata"])                  # plain numbers: it will be written into a file
    assert capsys.readouterr().out == ""


def test_in_notebook(monkeypatch):
    import IPython
    assert not in_notebook()
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=None))
    assert not in_notebook()                         # IPython in a terminal
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    assert in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert not in_notebook()                         # not installed


def draws():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 5])
def test_set_seed_repeats_all_three(seed):
    set_seed(seed); first = draws()
    set_seed(seed); again = draws()
    set_seed(seed + 1); other = draws()
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))


def test_the_random_state_comes_back_also_from_a_file():
    set_seed(3)
    random.gauss(0, 1), np.random.randn()            # both keep a second number for the next call
    state = random_state()
    first = draws(), random.gauss(0, 1), np.random.randn()
    draws()
    written = json.loads(json.dumps({k: state[k] for k in ("python", "numpy")}))
    set_random_state({**state, **written})
    assert (draws(), random.gauss(0, 1), np.random.randn()) == first


def test_set_seed_is_the_same_in_a_new_process():
    set_seed(42)
    code = """
        import random, json, numpy as np, torch
        from course_lib.settings import set_seed
        set_seed(42)
        print(json.dumps([random.random(), np.random.rand(), torch.rand(3).tolist()]))"""
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == list(draws())


def test_device_as_wanted(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    assert default_device() == torch.device("cpu")
    monkeypatch.setenv("COURSE_DEVICE", "warp")      # read anew, not remembered
    with pytest.raises(ValueError) as error:
        default_device()
    assert str(error.value) == "COURSE_DEVICE is 'warp', which names no device; use cpu, cuda, cuda:1 or mps."


def test_wanted_device_that_does_not_work(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "meta")      # it computes no values
    with pytest.raises(RuntimeError, match=r"^COURSE_DEVICE is 'meta', but it does not work here \(.+\)\. Unset it, or set it to cpu\.$"):
        default_device()
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    monkeypatch.setattr(settings, "_trouble", lambda device: "no code for this chip")
    with pytest.raises(RuntimeError) as error:
        default_device()
    assert str(error.value) == "COURSE_DEVICE is 'cpu', but it does not work here (no code for this chip). Unset it, or set it to cpu."


@pytest.mark.parametrize(("there", "broken", "found"), [
    ("", "", "cpu"), ("mps", "", "mps"), ("cuda", "", "cuda"), ("cuda mps", "", "cuda"),
    ("cuda mps", "cuda", "mps"), ("cuda", "cuda", "cpu"), ("cuda mps", "cuda mps", "cpu")])
def test_device_that_is_found(monkeypatch, capsys, there, broken, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(settings, "_trouble", lambda device: "the driver is too old" if device.type in broken else None)
    assert default_device().type == found
    said = [f"The {name} device is there but does not work (the driver is too old); going on without it." for name in broken.split()]
    assert capsys.readouterr().out.splitlines() == said
    default_device()
    assert capsys.readouterr().out == ""             # tried, and said, once a process


def test_trouble_tries_the_device(monkeypatch):
    assert settings._trouble(torch.device("cpu")) is None
    assert settings._trouble(torch.device("meta"))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size, device=device))
    assert settings._trouble(torch.device("cpu")) == "it computes wrong results"

    def fails(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")
    monkeypatch.setattr(torch, "ones", fails)
    assert settings._trouble(torch.device("cpu")) == "CUDA error: no kernel image is available"
