"""Checkers: each accepts its solution, rejects mistakes with a helpful sentence, and survives whatever an answer does."""
import json
import random
import re

import pytest
import torch
from answers import solutions
from torch import nn

from course_lib import checks
from course_lib.checks import EXERCISES, Case, Check, Inputs, Raises, check_bottom_right, difference, is_stub, progress_table, reader_folder
from course_lib.run import ROOT, _code, read_notebook

CHAPTERS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
each_exercise = pytest.mark.parametrize("check", EXERCISES.values(), ids=EXERCISES)
each_mistake = pytest.mark.parametrize(("check", "cause"), [(c, cause) for c in EXERCISES.values() for cause in c.mistakes],
                                       ids=[f"{c.name}-{i}" for c in EXERCISES.values() for i in range(len(c.mistakes))])
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=[p.stem for p in CHAPTERS])


@each_exercise
def test_solution_is_accepted(check, device):
    report = check.examine(solutions(check.chapter)[check.name], device)
    assert report.right, report.text


@each_mistake
def test_mistake_is_rejected_with_its_cause(check, cause, device):
    report = check.examine(check.mistakes[cause], device)
    assert report.answered and not report.right
    assert cause in report.text, report.text


@each_exercise
def test_there_are_enough_mistakes(check):
    assert len(check.mistakes) >= 3


def test_there_are_enough_exercises():
    assert len(EXERCISES) >= 60


@each_chapter
def test_exercises_of_a_chapter_call_their_checkers(path):
    cells = read_notebook(path)["cells"]
    chapter, heading, found = int(path.name[:2]), "", {}
    for c in cells:
        if c["cell_type"] == "markdown":
            heading = m[0] if (m := re.findall(r"^### Exercise (\d+)", "".join(c["source"]), re.M)[-1:]) else heading
        elif (code := _code(c)).startswith("# EXERCISE"):
            name = re.fullmatch(r"check_(\w+)\((\w+)\)", code.strip().splitlines()[-1])
            assert name and name[1] == name[2], code
            assert "not answered yet" in "".join("".join(o.get("text", "")) for o in c["outputs"])
            found[name[1]] = int(heading)
    assert found == {e.name: e.number for e in EXERCISES.values() if e.chapter == chapter}
    assert sorted(found.values()) == list(range(1, len(found) + 1))


def a_check(cases, mistakes=None, **more):
    check = Check("only_for_a_test", 99, 1, cases, mistakes, **more)
    del EXERCISES[check.name]
    return check


def stub(x):
    "What to write"
    ...


class Stub(nn.Module):
    "What to write"
    def forward(self, x): ...


class StaticStub(torch.autograd.Function):
    "What to write"
    @staticmethod
    def forward(ctx, x): ...


class Static(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x + 1


def test_a_class_of_static_methods_is_an_answer():
    assert not is_stub(Static)


@pytest.mark.parametrize("answer", [None, ..., stub, Stub, StaticStub, lambda x: None])
def test_unanswered(answer):
    assert is_stub(answer)
    report = check_bottom_right.examine(answer)
    assert not report.answered and not report.right and "not answered yet" in report.text and "\n" not in report.text


def test_an_answer_that_forgets_its_return_is_no_stub():
    def forgot(t):
        t * 2
    assert not is_stub(forgot) and "return" in check_bottom_right.examine(forgot).text


def test_an_error_is_told_with_the_line_it_came_from():
    def hasty(t):
        return t.view(2, 2)
    text = check_bottom_right.examine(hasty).text
    assert "RuntimeError" in text and "return t.view(2, 2)" in text and "[[1, 2, 3], [4, 5, 6], [7, 8, 9]]" in text


def test_the_smallest_failing_case_is_shown():
    check = a_check(lambda make: [Case((n,), n * n, f"{n} squared") for n in (0, 1, 2, 3)])
    text = check.examine(lambda n: 2 * n).text
    assert "1 of 4 cases passed" in text and "1 squared" in text and "expected: 1" in text and "came:     2" in text


def test_a_changed_input_is_no_other_mistake():
    check = a_check(lambda make: [Case((torch.ones(2),), torch.full((2,), 2.), "ones")], {"the squares are wanted.": lambda t: t + 1})

    def in_place(t):
        t += 1
        return t
    text = check.examine(in_place).text
    assert "the input was changed" in text and "squares" not in text


def test_expected_exceptions():
    check = a_check(lambda make: [Case((1,), 1, "one"), Case((-1,), Raises(ValueError), "below 0")])

    def right(n):
        if n < 0:
            raise ValueError("below 0")
        return n

    def wrong_kind(n):
        assert n >= 0
        return n
    assert check.examine(right).right
    assert "ValueError is expected" in check.examine(lambda n: n).text
    assert "ValueError is expected" in check.examine(wrong_kind).text


def test_a_result_that_cannot_be_judged_is_wrong():
    check = a_check(lambda make: [Case((), lambda net: None if net(1) == 2 else "It is not 2.", "a function that adds 1")])
    assert check.examine(lambda: lambda n: n + 1).right
    assert "It is not 2." in check.examine(lambda: lambda n: n).text
    assert "TypeError" in check.examine(lambda: 2).text


def test_a_check_leaves_random_states_and_arguments():
    def answer(t):
        torch.rand(3), random.random()
        return (2 * t)[1:, 1:]
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(2), random.random()
    torch.manual_seed(1)
    random.seed(1)
    assert check_bottom_right.examine(answer).right
    assert torch.rand(2).equal(expected[0]) and random.random() == expected[1]


def test_everybody_meets_the_same_inputs():
    a, b = Inputs(), Inputs()
    assert a.number(1, 100) == b.number(1, 100) and a.normal(3, 4).equal(b.normal(3, 4)) and a.uniform(5).equal(b.uniform(5))
    assert not a.normal(5).equal(a.normal(5))


E = torch.tensor([[1., 2.], [3., 5.]])


@pytest.mark.parametrize(("got", "phrase"), [
    (None, "`return`"), (2.5, "type float; what is expected is a Tensor"), (E[0], "shape is [2]"),
    (E.double(), "torch.float32 is expected"), (E.int(), "torch.int32"),
    (-E, "other sign"), (3 * E, "3 times"), (E.T, "other places"), (E + torch.nan, "nan"), (E + torch.eye(2), "2 of 4 numbers differ"),
    (torch.cat([E, E])[:3], "shape is [3, 2]")])
def test_difference_of_tensors(got, phrase):
    assert phrase in difference(got, E)


def test_rows_and_columns_exchanged():
    e = torch.arange(6.).view(2, 3)
    assert "exchanged" in difference(e.T, e) and "exchanged" not in difference(e.view(3, 2), e)


@pytest.mark.parametrize(("got", "expected", "phrase"), [
    (torch.tensor(3), 3, ".item()"), (3.0, 3, "type float"), (True, 1, "type bool"), ((1, 2), (1, 2, 3), "2 parts"),
    ((1, 2.5), (1, 2.0), "Part 1"), (4, (4,), "type int"), ("a", "b", "differs"), (None, 1.5, "`return`"),
    (1.5, None, "what is expected is None.")])
def test_difference_of_other_values(got, expected, phrase):
    assert phrase in difference(got, expected)


@pytest.mark.parametrize(("got", "expected"), [
    (E + 1e-7, E), (3, 3.0), (float("nan"), float("nan")), ([1, 2], (1, 2)),
    (E * torch.nan, E * torch.nan), (torch.zeros(0), torch.zeros(0))])
def test_no_difference(got, expected):
    assert difference(got, expected) is None


@pytest.fixture
def my(tmp_path, monkeypatch):
    "A reader's folder, as the working folder"
    my = tmp_path / "my"
    (my / "appendix").mkdir(parents=True)
    (my / ".copied.json").write_text("{}")
    monkeypatch.chdir(my / "appendix")
    return my


def right_part(t):
    return (2 * t)[1:, 1:]


def test_progress_is_kept_in_the_readers_folder(my, capsys):
    check_bottom_right(lambda t: t)
    assert not (my / "progress.json").exists()
    check_bottom_right(right_part)
    assert re.search(r"Solved: 1 of \d+ in this chapter, 1 of \d+ in all\.", capsys.readouterr().out)
    assert list(json.loads((my / "progress.json").read_text())) == ["bottom_right"]
    check_bottom_right(lambda t: t)                       # what was solved once stays solved
    assert list(checks.read_progress(my)) == ["bottom_right"]
    assert sorted(p.name for p in my.iterdir() if p.is_file()) == [".copied.json", "progress.json"]


def test_no_progress_elsewhere(tmp_path, monkeypatch, capsys):
    (tmp_path / "my").mkdir()                             # somebody's folder of that name, but not the course's
    monkeypatch.chdir(tmp_path / "my")
    check_bottom_right(right_part)
    assert reader_folder() is None and "Solved" not in capsys.readouterr().out and not list((tmp_path / "my").iterdir())


def test_running_a_solution_solves_nothing(my, monkeypatch, capsys):
    (my / "solutions").mkdir()
    monkeypatch.chdir(my / "solutions")
    check_bottom_right(right_part)
    assert "Solved" not in capsys.readouterr().out and not (my / "progress.json").exists()


def test_damaged_progress_is_said_and_kept(my, capsys):
    (my / "progress.json").write_text("{")
    check_bottom_right(right_part)
    assert "damaged" in capsys.readouterr().out and (my / "progress.json").read_text() == "{"


def test_progress_table():
    lines = progress_table(["bottom_right", "no longer in the course"]).splitlines()
    assert lines[0].startswith("chapter 00  ●○") and "next: exercise 2" in lines[0]
    assert lines[-1] == f"1 of {len(EXERCISES)} exercises solved."
    assert "all solved" in progress_table(EXERCISES).splitlines()[0]
