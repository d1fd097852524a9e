"""Checkpoints: a training that was killed, at any moment and more than once, goes on exactly; what does not fit is refused with a
sentence and nothing is changed

The killed trainings run in processes of their own (killed_run.py), started by a fork server where the system has one and by
spawning elsewhere."""
import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from course_lib import optim
from course_lib.learner import Callback, CancelFitException, Checkpoint, Learner, read_checkpoint, write_checkpoint
from course_lib.settings import set_seed
from killed_run import KINDS, N_BATCH, N_EPOCH, learner_of, loaders, net, schedule, train

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread():
    "Sums in another number of threads may be rounded otherwise"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(a, b, path: str = "") -> None:
    "Equal to the last bit, through dicts, lists and tensors; nan equals nan"
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape, path
        assert torch.equal(a.nan_to_num(nan=12345.), b.nan_to_num(nan=12345.)) if a.is_floating_point() else torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{path}: {a.keys() ^ b.keys()}"
        for k in a:
            same(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{path}: {len(a)} and {len(b)}"
        for i, (v, w) in enumerate(zip(a, b, strict=True)):
            same(v, w, f"{path}[{i}]")
    else:
        assert a == b or (a != a and b != b), f"{path}: {a} and {b}"


def result(learn: Learner) -> dict:
    "Everything that a training leaves behind: parameters, buffers, optimiser, history, random states"
    r = learn.recorder
    history = {} if learn.opt is None or not hasattr(r, "values") else {
        "values": r.values, "losses": list(r.losses), "lrs": list(r.lrs), "moms": list(r.moms), "ends": r.epoch_ends}
    opt = {k: v for k, v in learn.opt.state_dict().items() if k == "state"}
    groups = [[(k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(g.items())] for g in learn.opt.state_dict()["param_groups"]]
    return {"model": dict(learn.model.state_dict()), "opt": opt, "groups": groups, **history, "random": learn._random_states()}


def content(path: Path) -> dict:
    "A checkpoint without what two equal runs may differ in: the seconds, and helpers of one of them"
    state = read_checkpoint(path)
    state["cbs"] = {"recorder": {k: v for k, v in state["cbs"]["recorder"].items() if k != "seconds"}}
    return state


def unbroken(kind: str, folder: Path, every: int | None = None) -> dict:
    return result(train(kind, folder / "unbroken", every))


# ---- a killed process

@pytest.fixture(scope="session")
def processes():
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    ctx = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        ctx.set_forkserver_preload(["course_lib.learner"])
    return ctx


def kill_outside(process, folder: Path, n: int, delay: float) -> None:
    "Wait until `n` batches are done, and `delay` seconds more, then kill"
    told, limit = folder / "batches", time.monotonic() + 60
    while process.is_alive() and time.monotonic() < limit:
        with contextlib.suppress(OSError, ValueError):
            if int(told.read_text()) >= n:
                break
        time.sleep(.0005)
    time.sleep(delay)
    process.kill()


def draw_kill(rng: random.Random, every: int | None) -> tuple:
    "A moment at which to kill a training"
    events = ("before_batch", "after_pred", "after_backward", "before_step", "after_step", "after_batch", "before_epoch", "after_train",
              "before_validate", "after_epoch")
    what = rng.choice(["event", "write", "outside"])
    if what == "event":
        name = rng.choice(events)
        per_epoch = {"before_batch": N_BATCH + 2, "after_batch": N_BATCH + 2, "after_pred": N_BATCH + 2}.get(
            name, N_BATCH if name in events[:6] else 1)
        return "event", name, rng.randint(1, N_EPOCH * per_epoch)
    if what == "write":
        return "write", rng.randint(1, N_EPOCH * (1 + (N_BATCH // every if every else 0))), rng.choice(["half", "before", "after"])
    return "outside", rng.randint(1, N_EPOCH * N_BATCH - 1), rng.random() * .01


def killed(processes, kind: str, folder: Path, every: int | None, kill: tuple, surely: bool = True) -> None:
    "Train in a process that is killed on the way; not `surely` where the rest of a training may have been too short for it"
    folder.mkdir(exist_ok=True)
    (folder / "batches").unlink(missing_ok=True)
    process = processes.Process(target=train, args=(kind, folder, every, kill))
    process.start()
    if kill[0] == "outside":
        kill_outside(process, folder, *kill[1:])
    process.join(60)
    assert not process.is_alive()
    died = (1, 15) if os.name == "nt" else (-9,)
    if kill[0] == "outside" or not surely:         # it may have been quicker than its killer
        died = (0, *died)
    assert process.exitcode in died, f"{kill}: ended with {process.exitcode}"


def check_rounds(processes, kind: str, folder: Path, seed: int, rounds: int, kills: int = 1) -> None:
    "Trainings with drawn kills, each resumed here, end as one that was left alone"
    rng = random.Random(seed)
    expected: dict = {}
    for i in range(rounds):
        every = rng.choice([None, 1, 2, 3, N_BATCH])
        if every not in expected:
            expected[every] = unbroken(kind, folder / f"every-{every}", every), content(folder / f"every-{every}/unbroken/fit.safetensors")
        here, plan = folder / str(i), [draw_kill(rng, every) for _ in range(kills)]
        print(f"seed {seed}, round {i}: {kind}, checkpoint every {every}, killed at {plan}")
        for j, kill in enumerate(plan):
            if j and kill[0] != "outside":         # less is left to do: count the rest of the way only
                kill = (kill[0], *((kill[1], 1) if kill[0] == "event" else (1, kill[2])))
            killed(processes, kind, here, every, kill, surely=j == 0)
        got = result(train(kind, here, every))
        same(got, expected[every][0], "learner")
        same(content(here / "fit.safetensors"), expected[every][1], "checkpoint")
        if here.joinpath("fit.safetensors.tmp").exists():
            pytest.fail("a half-written file is left after a fit that ended well")


def new_seed() -> int:
    seed = int(time.time() * 1e6) % 2**31
    print("seed", seed)                            # pytest shows it when a test fails
    return seed


@pytest.mark.parametrize("kind", ["sgd", "adamw", "torch loader"])
def test_killed_and_resumed_like_never_killed(processes, kind, tmp_path):
    check_rounds(processes, kind, tmp_path, new_seed(), 1)


def test_killed_twice_and_resumed(processes, tmp_path):
    check_rounds(processes, "torch sgd", tmp_path, new_seed(), 1, kills=2)


@pytest.mark.parametrize("moment", ["half", "before", "after"])
def test_killed_while_a_checkpoint_is_written(processes, moment, tmp_path):
    killed(processes, "sgd", tmp_path, 2, ("write", 4, moment))  # 2, 4, 6 batches, the first epoch's end
    place = read_checkpoint(tmp_path / "fit.safetensors")["fit"]
    assert (place["epoch"], place["batch"]) == ((1, 0) if moment == "after" else (0, 6))
    assert (tmp_path / "fit.safetensors.tmp").exists() == (moment != "after")
    same(result(train("sgd", tmp_path, 2)), unbroken("sgd", tmp_path, 2))
    assert not (tmp_path / "fit.safetensors.tmp").exists()


def test_killed_while_the_first_checkpoint_is_written(processes, tmp_path, capsys):
    killed(processes, "sgd", tmp_path, 2, ("write", 1, "half"))
    assert not (tmp_path / "fit.safetensors").exists()
    same(result(train("sgd", tmp_path, 2)), unbroken("sgd", tmp_path, 2))
    assert "There is no fit.safetensors yet" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_twenty_times(processes, kind, tmp_path):
    check_rounds(processes, kind, tmp_path, new_seed(), 20 if kind == "sgd" else 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_three_times_in_a_run(processes, kind, tmp_path):
    check_rounds(processes, kind, tmp_path, new_seed(), 2, kills=3)


def test_resumed_in_a_fresh_process(tmp_path):
    "Nothing that a process keeps to itself is needed"
    stop_at("adam", tmp_path, 2, 11)
    code = f"import killed_run; killed_run.train('adam', {str(tmp_path)!r}, 2)"
    subprocess.run([sys.executable, "-c", code], cwd=TESTS, check=True, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                                           "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])})
    unbroken("adam", tmp_path, 2)
    same(content(tmp_path / "fit.safetensors"), content(tmp_path / "unbroken/fit.safetensors"))


# ---- stopped at each place in turn, in this process

class StopAt(Callback):
    "An error after so many training batches of this process"
    order = 1000

    def __init__(self, n: int):
        self.left = n

    def after_batch(self) -> None:
        if self.learn.training:
            self.left -= 1
            if not self.left:
                raise InterruptedError("stop")


def stop_at(kind: str, folder: Path, every: int | None, n: int) -> Learner:
    learn = learner_of(kind)
    with pytest.raises(InterruptedError):
        learn.fit(N_EPOCH, schedule=None if kind == "stream" else schedule, resume=folder / "fit.safetensors",
                  cbs=[Checkpoint(folder / "fit", every), StopAt(n)])
    return learn


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_for_each_kind_of_training(kind, tmp_path):
    expected = unbroken(kind, tmp_path, 3)
    for n in (2, 3, 7, 8, 13, 21):                 # before and at a checkpoint, the last batch of an epoch, of the fit
        here = tmp_path / str(n)
        stop_at(kind, here, 3, n)
        same(result(train(kind, here, 3)), expected, f"{kind} stopped at {n}")


def test_stopped_at_every_batch(tmp_path):
    "Of an epoch, and of the ends of those beside it"
    expected = unbroken("adamw", tmp_path, 1)
    for n in range(N_BATCH - 1, 2 * N_BATCH + 2):
        here = tmp_path / str(n)
        stop_at("adamw", here, 1, n)
        assert read_checkpoint(here / "fit.safetensors")["fit"]["batch"] == (n - 1) % N_BATCH + 1
        same(result(train("adamw", here, 1)), expected, f"stopped at {n}")


def test_stopped_again_and_again(tmp_path):
    "A fit that gets 2 batches further each time, and repeats one"
    for _ in range(9):
        stop_at("sgd", tmp_path, 2, 3)
    same(result(train("sgd", tmp_path, 2)), unbroken("sgd", tmp_path, 2))


def test_the_loader_begins_in_the_middle(tmp_path):
    "What was trained on already is not fetched again"
    fetched = []

    class Watched(list):
        def __getitem__(self, i):
            fetched.append(i)
            return super().__getitem__(i)

    def make() -> Learner:
        learn = learner_of("item by item", channels_last=False)      # which would look at a first batch
        learn.dls.train.dataset = Watched(learn.dls.train.dataset)
        return learn
    learn = make()
    with pytest.raises(InterruptedError):
        learn.fit(1, cbs=[Checkpoint(tmp_path / "fit", 2), StopAt(5)])
    del fetched[:]
    make().fit(1, resume=tmp_path / "fit")
    assert len(fetched) == 100 - 4 * 16


def test_a_checkpoint_changes_nothing(tmp_path):
    for kind in ("sgd", "torch loader"):
        learn = learner_of(kind)
        learn.fit(N_EPOCH, schedule=schedule)
        same(result(learn), unbroken(kind, tmp_path / kind, 1), kind)


def test_a_fit_that_had_ended_is_not_repeated(tmp_path):
    "Also the next fit is as it would have been: random numbers go on from where they were"
    def two_fits(make_second_fit: bool) -> Learner:
        learn = learner_of("sgd")
        learn.fit(2, cbs=Checkpoint(tmp_path / "first"), resume=tmp_path / "first")
        if make_second_fit:
            learn.fit(1, .01)
        return learn
    expected = result(two_fits(True))
    again = two_fits(False)
    assert len(again.recorder.values) == 2 and len(again.recorder.losses) == 2 * N_BATCH
    again.fit(1, .01)
    same(result(again), expected)


def test_random_numbers_of_callbacks_between_epochs(tmp_path):
    "Drawn before an epoch begins, they are drawn once more by a resumed fit, from the same state"
    class Noise(Callback):
        def before_fit(self) -> None: torch.rand(()), random.random()
        def before_epoch(self) -> None: self.draw()
        def before_train(self) -> None: self.draw()
        def after_train(self) -> None: self.draw()
        def before_validate(self) -> None: self.draw()

        def draw(self) -> None:
            with torch.no_grad():
                self.learn.model[5].bias.add_(.01 * torch.randn(3) + .01 * random.random())

    def run(folder: str, stop: int | None = None) -> Learner:
        learn = learner_of("sgd")
        cbs = [Noise, Checkpoint(tmp_path / folder, 1000), *([StopAt(stop)] if stop else [])]
        with pytest.raises(InterruptedError) if stop else contextlib.nullcontext():
            learn.fit(N_EPOCH, cbs=cbs, resume=tmp_path / folder)
        return learn
    expected = result(run("unbroken"))
    for stop in (9, 16):
        run(str(stop), stop)
        same(result(run(str(stop))), expected)


def test_a_callback_gets_back_what_it_kept(tmp_path):
    class Mean(Callback):
        "A running mean of the parameters, as a callback with a state of its own"
        def before_fit(self) -> None:
            self.mean, self.steps = [torch.zeros_like(p) for p in self.learn.model.parameters()], {"n": 0}

        def after_step(self) -> None:
            self.steps["n"] += 1
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.learn.model.parameters()], .1)

        def state_dict(self) -> dict: return {"mean": self.mean, "steps": self.steps}

        def load_state_dict(self, state: dict) -> None: self.mean, self.steps = state["mean"], state["steps"]

    def run(folder: str, stop: int | None = None) -> Mean:
        learn, mean = learner_of("adam"), Mean()
        with pytest.raises(InterruptedError) if stop else contextlib.nullcontext():
            learn.fit(2, cbs=[mean, Checkpoint(tmp_path / folder, 3), *([StopAt(stop)] if stop else [])], resume=tmp_path / folder)
        return mean
    expected = run("unbroken")
    run("stopped", 10)
    got = run("stopped")
    same([got.mean, got.steps], [expected.mean, expected.steps])
    assert got.steps == {"n": 2 * N_BATCH}


def test_resumed_with_other_callbacks(tmp_path):
    "A record that was not kept is begun; what was kept for a callback that is gone is let go"
    learn = learner_of("sgd", channels_last=False)
    learn.remove_cbs(list(learn.cbs))
    with pytest.raises(InterruptedError):
        learn.fit(2, cbs=[Checkpoint(tmp_path / "fit", 3), StopAt(10)])
    learn = learner_of("sgd", channels_last=False)
    learn.fit(2, resume=tmp_path / "fit")
    assert len(learn.recorder.values) == 1 and len(learn.recorder.losses) == 2 * N_BATCH - 10
    whole = learner_of("sgd", channels_last=False)
    whole.fit(2)
    same(dict(learn.model.state_dict()), dict(whole.model.state_dict()))


def test_a_cancelled_fit_goes_on(tmp_path):
    class Cancel(Callback):
        def after_step(self) -> None:
            if self.learn.epoch == 1 and self.learn.iter == 4:
                raise CancelFitException
    learn = learner_of("sgd")
    learn.fit(N_EPOCH, schedule=schedule, cbs=[Checkpoint(tmp_path / "fit", 2), Cancel])
    same(result(train("sgd", tmp_path, 2)), unbroken("sgd", tmp_path, 2))


def test_a_long_epoch_of_unknown_length(tmp_path):
    "More losses than the recorder had room for at first"
    x, y = torch.randn(1, 2), torch.tensor([0])

    class Endless:
        def __iter__(self):
            return iter([(x, y)] * 1105)

    def make() -> Learner:
        set_seed(0)
        dls = type(loaders())(Endless(), [(x, y)], classes=["a", "b"])
        return Learner(dls, nn.Linear(2, 2), opt_func=optim.SGD, device="cpu", progress=False)
    whole, first, second = make(), make(), make()
    whole.fit(1)
    with pytest.raises(InterruptedError):
        first.fit(1, cbs=[Checkpoint(tmp_path / "fit", 1100), StopAt(1101)])
    second.fit(1, resume=tmp_path / "fit")
    assert list(second.recorder.losses) == list(whole.recorder.losses) and len(whole.recorder.losses) == 1105


def test_a_checkpoint_never_holds_a_broken_model(tmp_path):
    "Between a loss that is nan and the end of the epoch, where it is noticed, the last good checkpoint stays"
    class Spoil(Callback):
        def before_batch(self) -> None:
            if self.learn.training and self.learn.iter == 3:
                self.learn.xb = self.learn.xb * float("nan")
    learn = learner_of("sgd")
    with pytest.raises(FloatingPointError):
        learn.fit(1, cbs=[Spoil, Checkpoint(tmp_path / "fit", 1)])
    saved = read_checkpoint(tmp_path / "fit.safetensors")
    assert all(v.isfinite().all() for v in saved["model"].values()) and saved["fit"]["batch"] == 3


# ---- save and load

@pytest.mark.parametrize("kind", ["sgd", "adamw", "torch sgd", "torch adamw"])
def test_save_and_load(kind, tmp_path):
    learn, other = learner_of(kind), learner_of(kind, seed=8)
    learn.fit(1)
    path = learn.save(tmp_path / "model")
    assert path == tmp_path / "model.safetensors" and path.is_file() and os.listdir(tmp_path) == ["model.safetensors"]
    assert other.load(tmp_path / "model") is other
    for part in ("model", "opt", "groups"):
        same(result(other)[part], result(learn)[part], part)
    for one in (learn, other):
        set_seed(1)
        one.dls.train.generator.manual_seed(1)
        one.fit(1)
    same(result(other), result(learn))             # momentum and all


def test_save_without_the_optimiser(tmp_path):
    learn = learner_of("adamw")
    learn.fit(1)
    path = learn.save(tmp_path / "model.st", with_opt=False)
    assert path.name == "model.st" and "opt" not in read_checkpoint(path)
    other = learner_of("torch sgd", seed=8).load(path)   # another optimiser is fine
    assert other.opt is None
    same(dict(other.model.state_dict()), dict(learn.model.state_dict()))
    learner_of("sgd").save(tmp_path / "fresh")           # before a first fit there is no optimiser to keep
    assert "opt" not in read_checkpoint(tmp_path / "fresh.safetensors")


def test_what_is_saved_is_no_view_of_what_is_trained(tmp_path):
    learn = learner_of("sgd")
    learn.fit(1)
    learn.save(tmp_path / "model")
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    saved = read_checkpoint(tmp_path / "model.safetensors")
    learn.fit(1)
    same(saved["model"], before)
    kept = {k: v.clone() for k, v in saved["model"].items()}
    (tmp_path / "model.safetensors").write_bytes(b"")    # nor of the file
    same(saved["model"], kept)


def test_shared_and_strided_parameters(tmp_path):
    "Tied weights, channels-last weights: safetensors refuses both as they are"
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x): return self.b(self.a(self.conv(x).mean((2, 3))))
    batch = [(torch.randn(4, 3, 6, 6), torch.randint(3, (4,)))]
    learn, other = (Learner(type(loaders())(batch, batch, classes=list("abc")), Tied(), device="cpu", progress=False) for _ in range(2))
    learn.fit(1)
    other.load(learn.save(tmp_path / "tied"))
    same(dict(other.model.state_dict()), dict(learn.model.state_dict()))
    assert other.model.b.weight is other.model.a.weight and other.model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_any_state_survives_the_file(tmp_path):
    state = {"none": None, "nan": float("nan"), "text": "ä\n", "deep": [{"a": [torch.arange(3), 1.5, True]}], "empty": {}, "list": [],
             "no numbers": torch.zeros(0, 3), "number": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16), "big": 2**64 - 1,
             "tensor": {"tensor": "a dict with names that the file uses itself", "dict": 1}}
    write_checkpoint(tmp_path / "x", state)
    same(read_checkpoint(tmp_path / "x"), state)
    write_checkpoint(tmp_path / "new" / "folders" / "x", {"a": 1})       # folders are made, a file may hold no tensor
    assert read_checkpoint(tmp_path / "new" / "folders" / "x")["a"] == 1


def test_no_pickle_in_the_file(tmp_path):
    learner_of("sgd").save(tmp_path / "model")
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    assert {v["dtype"] for k, v in header.items() if k != "__metadata__"} <= {"F32", "I64"} and b"pickle" not in data


# ---- writing that fails

def test_a_full_disk_leaves_the_old_file(tmp_path):
    "A limit on the size of files stands for the full disk"
    resource = pytest.importorskip("resource", reason="limits on file sizes are POSIX only")
    train("sgd", tmp_path, 2)
    path = tmp_path / "fit.safetensors"
    old, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    learn = learner_of("sgd")
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limit[1]))
    try:
        with pytest.raises(OSError, match="^The checkpoint fit.safetensors could not be written .*; make room or choose") as e:
            learn.fit(1, cbs=Checkpoint(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(str(e.value).splitlines()) == 1 and "epoch 0" in e.value.__notes__[0]
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["fit.safetensors"]
    learn.fit(1, cbs=Checkpoint(path))
    assert path.read_bytes() != old


@pytest.mark.parametrize("how", ["read-only folder", "file in place of the folder", "folder in place of the file", "no such drive"])
def test_a_place_that_cannot_be_written(how, tmp_path, monkeypatch):
    learn, folder = learner_of("sgd"), tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.safetensors"
    learn.save(path)
    old = path.read_bytes()
    if how == "read-only folder":
        if not hasattr(os, "geteuid"):
            pytest.skip("folders on Windows are not made read-only by chmod")
        if os.geteuid() == 0:                          # root may write everywhere: let the writing itself be refused

            def refused(tensors, to, metadata):
                raise PermissionError(13, "Permission denied", str(to))
            monkeypatch.setattr(safetensors.torch, "save_file", refused)
        else:
            folder.chmod(0o500)
        bad = path
    elif how == "file in place of the folder":
        bad = path / "model.safetensors"
    elif how == "folder in place of the file":
        bad = tmp_path / "folder.safetensors"
        bad.mkdir()
    else:
        bad = Path("/proc/nowhere/model.safetensors")
        if not Path("/proc").exists():
            pytest.skip("no place here that nobody can write to")
    try:
        with pytest.raises(OSError, match=r"^The checkpoint \w+.safetensors could not be written \(.+\)") as e:
            learn.save(bad)
    finally:
        folder.chmod(0o700)
    assert len(str(e.value).splitlines()) == 1
    assert path.read_bytes() == old and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    learn.save(path)


# ---- files that do not fit

def bad_files(folder: Path) -> dict:
    "Name of a case: (file, what the sentence says, type of the error)"
    def path(name: str) -> Path: return folder / f"{name}.safetensors"
    train("sgd", folder / "good", 2)
    good = (folder / "good/fit.safetensors").read_bytes()
    cases = {}
    for size in (0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1):
        path(f"cut-{size}").write_bytes(good[:size])
        cases[f"cut off at {size} bytes" if size else "empty"] = f"cut-{size}", "no complete checkpoint", ValueError
    path("random").write_bytes(random.Random(0).randbytes(5000))
    path("text").write_text("This is not a checkpoint.\n" * 50)
    path("zeros").write_bytes(bytes(5000))
    for name in ("random", "text", "zeros"):
        cases[name] = name, "no complete checkpoint", ValueError
    safetensors.torch.save_file({"w": torch.ones(2)}, path("plain"))
    safetensors.torch.save_file({"w": torch.ones(2)}, path("tagged"), metadata={"format": "pt"})
    cases["plain safetensors"] = "plain", "not from this library", ValueError
    cases["safetensors of another library"] = "tagged", "not from this library", ValueError
    state = read_checkpoint(folder / "good/fit.safetensors")

    def write(name: str, **changed) -> str:
        write_checkpoint(path(name), {**state, **changed})
        return name
    cases["another model"] = write("model", model=dict(nn.Linear(2, 2).state_dict())), "of another model", ValueError
    shapes = dict(net(classes=4).state_dict())
    cases["the same layers with other shapes"] = write("shapes", model=shapes), r"of another model: .*\[4, 36\].*\[3, 36\]", ValueError
    cases["another optimiser"] = write("opt", opt_name="course_lib.optim.Adam"), "Adam, but this learner trains with .*SGD", ValueError
    cases["a save without a fit"] = learner_of("sgd").save(path("saved")).stem, "written by save, not by Checkpoint", ValueError
    for what, value, text in (("n_epoch", 5, "n_epoch = 5"), ("lr", .5, "lr = 0.5"), ("batches an epoch", 9, "batches an epoch = 9")):
        cases[f"another {what}"] = write(what.split()[0], fit={**state["fit"], what: value}), f"{text}, and here it is", ValueError
    cases["missing"] = "missing/", "There is no .*yet", None
    return cases


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return folder, bad_files(folder)


def everything(learn: Learner) -> dict:
    return {**result(learn), "modes": [m.training for m in learn.model.modules()], "cbs": [id(c) for c in learn.cbs]}


CASES = ["empty", *(f"cut off at {n} bytes" for n in (1, 7, 8, 9, 100)), "random", "text", "zeros", "plain safetensors",
         "safetensors of another library", "another model", "the same layers with other shapes", "another optimiser",
         "a save without a fit", "another n_epoch", "another lr", "another batches an epoch"]


def test_all_files_are_tried(files):
    assert len(files[1]) == len(CASES) + 3         # two more lengths, that depend on the file, and the missing one


@pytest.mark.parametrize("case", [*CASES, "cut off in the middle", "cut off at the last byte"])
def test_a_file_that_does_not_fit_changes_nothing(files, case):
    folder, cases = files
    cuts = sorted(int(c.split()[3]) for c in cases if c.startswith("cut off"))
    size = {"cut off in the middle": cuts[-2], "cut off at the last byte": cuts[-1]}.get(case)
    name, text, error = cases[f"cut off at {size} bytes" if size else case]
    path = folder / f"{name}.safetensors"
    learn = learner_of("sgd")
    learn.fit(1)
    before, groups = copy_of(everything(learn)), [p.data_ptr() for p in learn.model.parameters()]
    with pytest.raises(error, match=text) as e:
        learn.fit(N_EPOCH, schedule=schedule, resume=path)
    assert len(str(e.value).splitlines()) == 1 and str(e.value).endswith(".") and path.name in str(e.value)
    same(everything(learn), before)
    if "another n_epoch" != case != "another lr" and case not in ("another batches an epoch", "a save without a fit"):
        with pytest.raises(error, match=text):
            learn.load(path)
        same(everything(learn), before)
    assert [p.data_ptr() for p in learn.model.parameters()] == groups
    learn.fit(1)                                   # and it goes on as if nothing had been
    other = learner_of("sgd")
    other.fit(1), other.fit(1)
    same(result(learn), result(other))


def copy_of(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {k: copy_of(v) for k, v in state.items()}
    return [copy_of(v) for v in state] if isinstance(state, (list, tuple)) else state


def test_a_fresh_learner_stays_fresh(files):
    folder, cases = files
    learn = learner_of("sgd")
    before = copy_of([dict(learn.model.state_dict()), learn._random_states()])
    for name, text, error in cases.values():
        if error:
            with pytest.raises(error, match=text):
                learn.fit(N_EPOCH, resume=folder / f"{name}.safetensors")
    same([dict(learn.model.state_dict()), learn._random_states()], before)
    learn.fit(1)
    other = learner_of("sgd")
    other.fit(1)
    same(result(learn), result(other))


@pytest.mark.parametrize(("saved", "trained"), [("torch sgd", "sgd"), ("sgd", "torch sgd"), ("torch adamw", "adamw"),
                                                ("adamw", "torch adamw"), ("adam", "adamw")])
def test_the_state_of_an_optimiser_of_the_same_name(saved, trained, tmp_path):
    "PyTorch's keep other things than ours: refused, rather than half understood"
    train(saved, tmp_path)
    learn = learner_of(trained)
    learn.fit(1)
    before = copy_of(everything(learn))
    with pytest.raises(ValueError, match="holds the state of .*, but this learner trains with"):
        learn.fit(N_EPOCH, schedule=schedule, resume=tmp_path / "fit.safetensors")
    same(everything(learn), before)


def test_a_newer_format(tmp_path):
    "Whatever a later course_lib writes into its files, this one says which it is"
    write_checkpoint(tmp_path / "now.safetensors", {"model": {}})
    data = (tmp_path / "now.safetensors").read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    number = next(k for k, v in header.items() if v == "1")
    for text in ("{}", "[1, 2]", "no JSON at all", header["course_lib"]):
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "new.safetensors",
                                    metadata={**header, number: "2", "course_lib": text})
        learn = learner_of("sgd")
        with pytest.raises(ValueError, match="has format 2, and this course_lib reads up to 1; update course_lib"):
            learn.load(tmp_path / "new.safetensors")
        with pytest.raises(ValueError, match="has format 2"):
            learn.fit(1, resume=tmp_path / "new.safetensors")
    for text in ("{}", "no JSON at all", '{"dict": {"a": {"tensor": "missing"}}}'):  # of this format, but damaged
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "odd.safetensors", metadata={**header, "course_lib": text})
        with pytest.raises(ValueError, match="no complete checkpoint"):
            read_checkpoint(tmp_path / "odd.safetensors")


def test_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    learn = learner_of("sgd")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint model.safetensors; check the path"):
        learn.load("model")
    with pytest.raises(FileNotFoundError):
        learn.load(tmp_path)
    learn.fit(1, resume="model")
    assert capsys.readouterr().out == "There is no model.safetensors yet, so the fit starts at its beginning.\n"
    assert learn.save("model") == Path("model.safetensors")
    Checkpoint("a/b", 3)
    assert Checkpoint("a/b").path == Path("a/b.safetensors")
    for every in (0, -1):
        with pytest.raises(ValueError, match="every_batches is .*; it has to be 1 or more, or None"):
            Checkpoint("x", every)
