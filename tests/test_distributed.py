"""Training in two processes over gloo, as torchrun starts them: the same as in one, one voice, one checkpoint, and what happens when a
process is killed

The processes run distributed_run.py; the training in one process that they are compared with runs here."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from course_lib.learner import Learner, read_checkpoint
from course_lib.run import ROOT
from course_lib.scale import Distributed, _Cut, _Part, share
from distributed_run import EPOCHS, N_VALID, TRAININGS, learner, loaders, train
from killed_run import pictures, plain_net

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate: pip install -e '.[scale]'")
SCRIPT = Path(__file__).parent / "distributed_run.py"
LIMIT = 120                     # seconds within which the other process of a killed one ends; on a quiet computer a few


def environment() -> dict[str, str]:
    "For a process: this checkout, the CPU, full scale so that progress is shown, nothing that a launcher has set"
    launchers = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**{k: v for k, v in os.environ.items() if k not in launchers}, "PYTHONPATH": os.pathsep.join(paths),
            "COURSE_DEVICE": "cpu", "COURSE_SCALE": "full", "OMP_NUM_THREADS": "1"}


def torchrun(*command: str, n: int = 2, timeout: float = 900) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    return subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, env=environment(), timeout=timeout)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_processes(*command: str) -> list[subprocess.Popen]:
    "Without torchrun, which would end the other one itself"
    port = str(free_port())
    return [subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**environment(), "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for i in range(2)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[dict, str]:
    "What two processes found, and what they printed"
    folder = tmp_path_factory.mktemp("compare")
    done = torchrun(SCRIPT, "compare", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_checkpoint(folder / "compare.safetensors"), done.stdout


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gap(a: dict, b: dict) -> float:
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@needs_accelerate
@pytest.mark.parametrize("kind", [k for k in TRAININGS if k != "batch norm"])
def test_two_processes_train_as_one(compared, kind):
    "Losses and weights to 2e-6 (2e-7 is usual): sums of half batches are rounded otherwise. Each share is of the same global batch"
    two, one = compared[0][kind], train(kind, Distributed())
    assert two["world"] == 2 and one["world"] == 1 and two["batches"] == one["batches"]
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=2e-6)
    assert gap(two["model"], one["model"]) < 2e-6
    for a, b in zip(two["values"], one["values"], strict=True):
        assert a == pytest.approx(b, abs=2e-6)


@needs_accelerate
def test_accuracy_is_that_of_all_1001_pictures(compared):
    "Not one counted twice, none forgotten: the count of right answers is a whole number, and the same"
    two, one = compared[0]["group norm"], train("group norm", Distributed())
    assert two["n"] == one["n"] == N_VALID
    right = two["values"][-1][2] * N_VALID
    assert right == pytest.approx(round(right), abs=1e-3) and round(right) == round(one["values"][-1][2] * N_VALID)
    assert .4 < two["values"][-1][2] < 1


@needs_accelerate
def test_batch_norm_differs_for_it_sees_half_batches(compared):
    two, one = compared[0]["batch norm"], train("batch norm", Distributed())
    assert 1e-4 < gap(two["model"], one["model"]) < 1
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=.5)


@needs_accelerate
def test_the_main_process_alone_prints(compared):
    said = compared[1]
    assert said.count("process 0 of 2") == 1 and "process 1" not in said
    assert len(re.findall(r"epoch +train_loss", said)) == len(TRAININGS) + 4         # unbroken, stopped twice, few
    assert len(re.findall(r"(?m)^ +0 +\d\.\d+ ", said)) == len(TRAININGS) + 3 - 1    # one line for each epoch 0; one was resumed later


@needs_accelerate
def test_a_stopped_training_goes_on_bit_for_bit(compared):
    "Stopped in an epoch, between two checkpoints; dropout differs from process to process and is brought back"
    unbroken, stopped = compared[0]["unbroken"], compared[0]["stopped"]
    assert gap(unbroken["model"], stopped["model"]) == 0
    assert unbroken["losses"].equal(stopped["losses"]) and unbroken["values"] == stopped["values"]


@needs_accelerate
def test_what_cannot_be_shared_is_refused_in_all_processes(compared):
    assert "A training batch of 1 cannot be shared by 2 processes" in compared[0]["few"]
    assert "The processes do not begin alike: batches an epoch is 6, 5" in compared[0]["lengths"]
    assert "look for a learning rate in one" in compared[0]["lr_find"]


@needs_accelerate
def test_a_killed_process_ends_the_other_with_a_sentence_and_the_run_resumes(tmp_path, compared):
    processes = two_processes(SCRIPT, "killed", tmp_path)
    try:
        processes[1].wait(timeout=900)
        dead = time.monotonic()
        _, err = processes[0].communicate(timeout=LIMIT)
        took = time.monotonic() - dead
    finally:
        for p in processes:
            p.kill()
            p.communicate()
    assert processes[1].returncode == -getattr(signal, "SIGKILL", signal.SIGTERM)
    assert processes[0].returncode not in (0, None) and took < LIMIT
    assert "Another process of this training has ended" in err and "goes on from its last checkpoint" in err, err[-2000:]
    assert "RuntimeError: Another process" in err.strip().splitlines()[-1]
    done = torchrun(SCRIPT, "resumed", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed, unbroken = read_checkpoint(tmp_path / "resumed.safetensors")["resumed"], compared[0]["unbroken"]
    assert gap(resumed["model"], unbroken["model"]) == 0 and resumed["losses"].equal(unbroken["losses"])
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["fit.safetensors"]


@needs_accelerate
@pytest.mark.slow
def test_torchrun_reports_a_killed_process(tmp_path):
    start = time.monotonic()
    done = torchrun(SCRIPT, "killed", tmp_path)
    assert done.returncode and "SIGKILL" in done.stderr and time.monotonic() - start < 300


# ---- in one process

def test_in_one_process_it_does_nothing():
    with_it, without = learner(size=16), learner(size=16)
    with_it.fit(EPOCHS, cbs=Distributed()), without.fit(EPOCHS)
    assert list(with_it.recorder.losses) == list(without.recorder.losses) and with_it.recorder.values == without.recorder.values
    learn = learner(cbs=[Distributed], size=16)
    learn.lr_find(num_it=5, show_plot=False)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 1001])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_all_of_a_batch_and_of_almost_one_size(n, world):
    parts = [range(n)[share(n, rank, world)] for rank in range(world)]
    assert [i for p in parts for i in p] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", ["course", "torch", "list"])
def test_the_shares_of_a_loader_are_its_batches(kind):
    whole = loaders(16, n_valid=101, torch=kind == "torch")
    dl = list(whole.valid) if kind == "list" else whole.valid
    if kind == "torch":
        dl = torch.utils.data.DataLoader(TensorDataset(*pictures(101, 1)), 50)
    parts = [list((_Part if kind == "course" else _Cut)(dl, rank, 2, False)) for rank in range(2)]
    assert [len(p) for p in parts] == [2, 3]                    # the last batch has one item
    for i, (xb, yb) in enumerate(dl):
        of = [p[i] for p in parts if i < len(p)]
        assert torch.cat([b[0] for b in of]).equal(xb) and torch.cat([b[1] for b in of]).equal(yb)


def test_a_part_knows_what_its_loader_knows():
    dl = loaders(16).train
    part, cut = _Part(dl, 1, 2, True), _Cut(torch.utils.data.DataLoader(TensorDataset(*pictures(20)), 5), 1, 2, True)
    assert len(part) == len(dl) and part.generator is dl.generator and part.dataset is dl.dataset and part.device == dl.device
    assert len(cut) == 4 and len(cut.dataset) == 20 and not hasattr(cut, "batches")
    assert [len(yb) for _, yb in part.batches(4)] == [8, 8] and part.whole == 16


def test_a_loader_that_is_shared_out_already_is_refused():
    data = TensorDataset(*pictures(20))
    dl = torch.utils.data.DataLoader(data, 5, sampler=DistributedSampler(data, 2, 0))
    with pytest.raises(ValueError, match="DistributedSampler"):
        Distributed()._part(dl, True)


def test_without_accelerate_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ImportError, match=r"pip install 'course_lib\[scale\]'"):
        Distributed()


# ---- the example

def example(*args: str, env: dict | None = None, n: int = 1) -> subprocess.CompletedProcess:
    script = ROOT / "examples" / "train_imagenette.py"
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []), str(script)]
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, env={**environment(), "COURSE_SOURCE": "drawn"},
                          timeout=1200)


SMALL = ("--net", "plain", "--epochs", 1, "--batch", 32, "--limit", 128, "--precision", "float32")


@needs_accelerate
@pytest.mark.slow
def test_example_runs_in_one_process_and_in_two_and_resumes(tmp_path):
    runs = [example(*SMALL, "--checkpoint", tmp_path / f"{n}", n=n) for n in (1, 2)]
    runs.append(example(*SMALL, "--checkpoint", tmp_path / "2", "--resume", n=2))
    for done in runs:
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("| net |") == 1
    rows = [[c.strip() for c in done.stdout.split("| net |")[1].splitlines()[2].split("|")] for done in runs]
    assert [r[2] for r in rows] == ["1", "2", "2"] and rows[1][3:5] == rows[2][3:5]


def test_a_learner_stays_whole_after_a_fit():
    learn: Learner = learner(plain_net, size=16)
    dls, model = learn.dls, learn.model
    learn.fit(1, cbs=Distributed())
    assert learn.dls is dls and learn.model is model and not hasattr(learn, "distributed")
