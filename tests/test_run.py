"""The commands behind make: what a notebook cannot test about the program that runs it."""
import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest

from course_lib import run


def test_runs_without_any_package():
    "The module that builds the environment has to start where nothing is installed"
    done = subprocess.run([sys.executable, "-S", "-I", "-c", f"import sys; sys.path.insert(0, {str(run.ROOT)!r})\n"
                           "from course_lib.run import main; main(['help'])"], capture_output=True, text=True)
    assert done.returncode == 0 and "lab " in done.stdout, done.stderr


def test_unknown_command_is_refused():
    done = subprocess.run([sys.executable, "-m", "course_lib.run", "labb"], cwd=run.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "labb" in done.stderr
    done = subprocess.run([sys.executable, "-m", "course_lib.run", "lab", "--prot", "1"], cwd=run.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "lab does not know --prot 1" in done.stderr


def test_environment_is_rebuilt_when_its_recipe_changed(tmp_path, monkeypatch):
    calls = []
    for name in ("settings.ini", "setup.py", "constraints.txt"):
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "NEEDED", ("no_such_package",))
    monkeypatch.setattr(run, "_pip", lambda python, args: calls.append(args))
    monkeypatch.setattr(run.subprocess, "run", lambda command, **kw: subprocess.CompletedProcess(
        command, run._venv_python().parent.mkdir(parents=True, exist_ok=True) or run._venv_python().touch() or 0))
    assert run.setup() == run._venv_python() and len(calls) == 1
    assert run.setup() == run._venv_python() and len(calls) == 1       # a second start does nothing
    (tmp_path / "constraints.txt").write_text("y")
    run.setup()
    assert len(calls) == 2
    run.setup("https://example.org/cpu")
    assert len(calls) == 4 and calls[2][-2:] == ["-i", "https://example.org/cpu"]


def test_peers_are_installed_into_the_courses_own_environment_only(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(run, "_pip", lambda python, args: calls.append(args))
    peers = lambda *needed: run._add_extra("bench", needed, "To compare with the others")
    assert peers("json")
    assert not calls and not capsys.readouterr().out                   # nothing to do
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert not peers("json", "no_such_package")
    assert not calls and "pip install -e '.[bench]'" in capsys.readouterr().out
    monkeypatch.setattr(run.sys, "prefix", str(tmp_path / ".venv"))
    assert peers("json", "no_such_package")
    assert calls == [["-e", ".[bench]", "-c", "constraints.txt"]]


def test_benchmarks_get_their_options_and_three_tries(tmp_path, monkeypatch, capsys):
    calls = []

    def benchmark(command, **kwargs):
        calls.append([run.Path(command[1]).stem, *command[2:]])
        return subprocess.CompletedProcess(command, codes[calls[-1][0]].pop(0))

    (tmp_path / "benchmarks").mkdir()
    for name in ("common", "one", "two"):
        (tmp_path / "benchmarks" / f"{name}.py").touch()
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run.subprocess, "run", benchmark)
    codes = {"two": [0]}
    assert run.bench(["two", "--bs", "64", "512"]) == 0 and calls == [["two", "--bs", "64", "512"]]
    calls, codes = [], {"one": [0], "two": [1, 0]}
    assert run.bench([]) == 0 and calls == [["one"], ["two"], ["two"]]
    assert "Failed once, and run again: two" in capsys.readouterr().out
    calls, codes = [], {"one": [3, 3, 3], "two": [1, 0]}
    assert run.bench([]) == 1 and calls == [["one"], ["two"], ["one"], ["two"], ["one"]]
    assert capsys.readouterr().out.endswith("Failed three times: one\n")
    with pytest.raises(SystemExit, match="There is no benchmark three"):
        run.bench(["three"])


def test_failed_install_is_one_sentence_and_tried_again(tmp_path, capfd):
    with pytest.raises(SystemExit, match="^pip could not install the packages"):
        run._pip(run.Path(sys.executable), ["--no-index", "a-package-that-is-nowhere"])
    assert "a-package-that-is-nowhere" in capfd.readouterr().err


def test_reader_copy_survives_a_damaged_start(tmp_path):
    "A notebook that the reader already has without a record of it (an older copy) is never overwritten"
    nbs, my = tmp_path / "nbs", tmp_path / "my"
    (nbs / "appendix").mkdir(parents=True)
    my.mkdir()
    nb = lambda s: json.dumps({"cells": [{"cell_type": "code", "source": s}]})
    (nbs / "a.ipynb").write_text(nb("new"))
    (nbs / "appendix" / "b.ipynb").write_text(nb("new"))
    (my / "a.ipynb").write_text(nb("mine"))
    said = run.copy_for_reader(nbs, my)
    assert "mine" in (my / "a.ipynb").read_text() and "new" in (my / "a.new.ipynb").read_text()
    assert len(said) == 1 and "a.new.ipynb" in said[0]
    (my / "a.new.ipynb").write_text(nb("mine too"))              # the reader works in the newer one, and then comes a third
    (nbs / "a.ipynb").write_text(nb("newest"))
    assert "a.new2.ipynb" in run.copy_for_reader(nbs, my)[0] and "newest" in (my / "a.new2.ipynb").read_text()
    assert "mine" in (my / "a.ipynb").read_text() and "mine too" in (my / "a.new.ipynb").read_text()
    assert (my / "appendix" / "b.ipynb").exists()


def test_reset_keeps_even_a_damaged_notebook(tmp_path):
    nbs, my = tmp_path / "nbs", tmp_path / "my"
    (nbs / "appendix").mkdir(parents=True)
    (nbs / "appendix" / "b.ipynb").write_text("{}")
    (my / "appendix").mkdir(parents=True)
    (my / "appendix" / "b.ipynb").write_text("damaged")
    assert "b.mine.ipynb" in run.reset(["b"], nbs, my)[0]
    assert (my / "appendix" / "b.mine.ipynb").read_text() == "damaged" and (my / "appendix" / "b.ipynb").read_text() == "{}"
    assert not list(my.rglob("*.tmp"))


def test_reset_wants_a_notebook(tmp_path):
    with pytest.raises(SystemExit, match="Name the notebook"):
        run.reset([], my=tmp_path)
    with pytest.raises(SystemExit, match="There is no notebook 99_x"):
        run.reset(["99_x"], my=tmp_path)
    assert "is the original again" in run.reset(["00_images"], my=tmp_path)[0]       # one that the reader did not have


def test_progress_is_a_line_a_chapter(tmp_path):
    (tmp_path / "progress.json").write_text('{"bottom_right": "2026-01-31"}')
    assert "●○" in run.progress(tmp_path) and "1 of " in run.progress(tmp_path).splitlines()[0]
    assert "●" not in run.progress(tmp_path / "nowhere")
    (tmp_path / "progress.json").write_text("{")
    with pytest.raises(SystemExit, match="damaged"):
        run.progress(tmp_path)


def test_headings_are_found_outside_code():
    cells = [{"cell_type": "markdown", "source": ["# A `few` words\n", "```\n", "# no heading\n", "```\n", "### *Why?*"]}]
    assert run.heading_ids({"cells": cells}) == ["A-few-words", "Why?"]


def test_names_of_notebooks():
    nbs = run.ROOT / "nbs"
    names = [nbs / "00_a.ipynb", nbs / "appendix" / "settings.ipynb", nbs / "solutions" / "00_a.ipynb"]
    assert [run.notebook_name(p) for p in names] == ["00_a", "settings", "solutions/00_a"]


def test_error_in_a_notebook_names_it(tmp_path):
    path = tmp_path / "broken.ipynb"
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": "1 / 0", "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    with pytest.raises(SystemExit, match="broken.ipynb stopped with an error"):
        run.execute(path, "drawn", "test")


def test_stored_form_reads_back(tmp_path):
    nb = run.read_notebook(run.notebooks()[0])
    run.write_notebook(nb, tmp_path / "a.ipynb")
    assert (tmp_path / "a.ipynb").read_bytes() == run.notebooks()[0].read_bytes()


def test_clean_keeps_the_readers_notebooks(tmp_path, capsys):
    for name in (".venv/bin", "my", "build/run", "course_lib/__pycache__", "nbs/.ipynb_checkpoints", "x.egg-info"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "my" / "a.ipynb").write_text("mine")
    run.clean(tmp_path)
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    assert left == {"my", "my/a.ipynb", "course_lib", "nbs"}
    assert "removed .venv" in capsys.readouterr().out


def test_notebook_report_counts_cells_and_names_the_first_failure(tmp_path):
    "The summary of the tests: cells, compared cells, assertions, and the first cell that failed"
    def cell(i, source, outputs=()):
        return {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": source, "outputs": list(outputs), "execution_count": i}
    stored = [{"output_type": "stream", "name": "stdout", "text": "2\n"}]
    cells = [cell(1, "x = 1\nassert x == 1\nassert x < 2"), cell(2, "# NBVAL_CHECK_OUTPUT\nprint(x + 1)", stored),
             cell(3, "undefined"), cell(4, "undefined")]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (tmp_path / "conftest.py").write_text((run.ROOT / "nbs" / "conftest.py").read_text())
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", str(tmp_path)], cwd=tmp_path,
                          capture_output=True, text=True, env=run._environment())
    assert "1 notebooks, 2 cells ran, 1 compared with their stored output, 2 assertions held" in done.stdout, done.stdout
    assert re.search(r"a\.ipynb: Cell 2 failed first", done.stdout), done.stdout


def test_lab_answers_only_with_its_token(tmp_path):
    "A real JupyterLab: it prints its address, answers on 127.0.0.1, and refuses without the token"
    port = run._free_port(8950)
    command = run.lab_command(tmp_path, port, "sesame", browser=False)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=run._environment()) as server:
        try:
            address, end = f"http://127.0.0.1:{port}/api/contents", time.monotonic() + 60
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            while True:
                try:
                    assert json.load(opener.open(f"{address}?token=sesame", timeout=5))["type"] == "directory"
                    break
                except urllib.error.URLError:
                    assert time.monotonic() < end and server.poll() is None, "JupyterLab did not start"
                    time.sleep(.3)
            with pytest.raises(urllib.error.HTTPError) as refused:
                opener.open(address, timeout=5)
            assert refused.value.code == 403
        finally:
            server.terminate()
