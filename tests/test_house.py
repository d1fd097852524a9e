"""The rules of the house: what every notebook and the library they export have to keep to."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course_lib.run import ROOT, code_hash, export_library, heading_ids, is_current, normalise, notebooks, read_notebook
from course_lib.run import test_environment as environment_of_tests

NOTEBOOKS = notebooks()
NAMES = [p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)

GROUND = {"settings", "images", "drawn"}            # import nothing of the course (images: settings)
TOP = {"run", "checks"}                             # imported by nobody
LIMIT = 1_000_000                                   # bytes a notebook

PRIVATE = re.compile(r" at 0x[0-9a-f]{6,}|(?<![\w.])/(?:home|root|Users|work|tmp|var|mnt|opt)/|[A-Z]:\\\\")


def is_chapter(path: Path) -> bool:
    return path.parent.name == "nbs"


def code_cells(nb: dict) -> list[dict]:
    return [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]


def outputs(nb: dict) -> list[dict]:
    return [o for c in code_cells(nb) for o in c["outputs"]]


def exported_module(nb: dict) -> str | None:
    found = [m[1] for c in code_cells(nb) if (m := re.match(r"#\| default_exp (\w+)", "".join(c["source"])))]
    assert len(found) <= 1, "a notebook exports one module"
    return found[0] if found else None


def course_imports(code: str) -> set[str]:
    "The modules of course_lib that some code imports, wherever in it"
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert not any(a.name == "*" for a in node.names), "no star import"
            parts = (node.module or "").split(".")
            if parts[0] == "course_lib":
                found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("course_lib.")}
    return found


def test_there_are_notebooks():
    assert {"00_images.ipynb", "04_minibatches.ipynb", "appendix/settings.ipynb"} <= set(NAMES)


def test_library_is_a_fresh_export(tmp_path):
    for name in ("nbs", "course_lib"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module in (tmp_path / "course_lib").glob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    export_library(tmp_path)
    fresh = {p.name: p.read_bytes() for p in (tmp_path / "course_lib").glob("*.py")}
    kept = {p.name: p.read_bytes() for p in (ROOT / "course_lib").glob("*.py")}
    assert fresh.keys() == kept.keys()
    different = [name for name in kept if kept[name] != fresh[name]]
    assert not different, f"{different} differ from a fresh export of nbs/: edit the notebooks, then make outputs"


def test_reading_order_is_import_order():
    order = {}
    for path, name in zip(NOTEBOOKS, NAMES, strict=True):
        module = exported_module(read_notebook(path))
        if module:
            assert module not in order, f"two notebooks export {module}"
            order[module] = int(m[1]) if (m := re.match(r"(\d\d)_", name)) else None
    assert {p.stem for p in (ROOT / "course_lib").glob("*.py")} - {"__init__", "_modidx"} == set(order)
    for module, number in order.items():
        imports = course_imports((ROOT / "course_lib" / f"{module}.py").read_text(encoding="utf-8"))
        if module == "images":
            assert imports <= {"settings"}
        elif module in GROUND:
            assert not imports
        elif module not in TOP:
            late = {i for i in imports - GROUND if i in TOP or order[i] >= number}
            assert not late, f"{module} imports {late}, which the reader has not met yet"


def test_import_rule_sees_a_forbidden_import():
    assert course_imports("def f():\n    from course_lib.run import x\nimport course_lib.optim") == {"run", "optim"}
    with pytest.raises(AssertionError, match="star"):
        course_imports("from course_lib.images import *")


@each_notebook
def test_form(path):
    nb = read_notebook(path)
    nbformat.validate(nbformat.from_dict(nb))
    ids = [c["id"] for c in nb["cells"]]
    assert len(set(ids)) == len(ids)
    assert nb == normalise(nb) and path.read_text(encoding="utf-8").endswith("}\n"), "write it with make outputs"
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert not any(not "".join(c["source"]).strip() for c in nb["cells"]), "an empty cell"
    counts = [c["execution_count"] for c in code_cells(nb)]
    assert counts == list(range(1, len(counts) + 1))
    assert path.stat().st_size < LIMIT
    assert "widgets" not in nb["metadata"]


@each_notebook
def test_outputs_come_from_this_code(path):
    nb = read_notebook(path)
    assert is_current(nb), "the code has changed since its outputs were made: make outputs"
    stamp = nb["metadata"]["course"]
    assert stamp["source"] == "real" and stamp["scale"] == "full" and stamp["device"] and "PyTorch" in stamp["versions"]


@each_notebook
def test_outputs_are_fit_to_keep(path):
    for o in outputs(read_notebook(path)):
        assert o["output_type"] != "error" and o.get("name") != "stderr", o
        assert not any("widget" in mime for mime in o.get("data", {}))
        text = json.dumps({k: v for k, v in o.get("data", {}).items() if k != "image/png"}) + "".join(o.get("text", []))
        assert not (found := PRIVATE.search(text)), f"{found[0]!r} is private to one machine: {text[:200]}"


@each_notebook
def test_figures_have_alt_text_and_caption(path):
    for c in code_cells(read_notebook(path)):
        figures = [o for o in c["outputs"] if "image/png" in o.get("data", {})]
        for o in figures:
            assert len(o["metadata"].get("image/png", {}).get("alt", "")) >= 30, "".join(c["source"])
        captions = [o for o in c["outputs"] if "".join(o.get("data", {}).get("text/markdown", "")).startswith("*")]
        assert len(captions) >= len(figures)
        assert not any(o.get("data", {}).keys() & {"image/jpeg", "image/svg+xml"} for o in c["outputs"])


@each_notebook
def test_compared_cells_have_an_output(path):
    compared = [c for c in code_cells(read_notebook(path)) if "# NBVAL_CHECK_OUTPUT" in "".join(c["source"][:2])]
    assert all(c["outputs"] and c["execution_count"] for c in compared)
    assert len(compared) >= (5 if is_chapter(path) else 1)


@each_notebook
def test_skipped_cells_are_skipped_by_both_runners(path):
    for c in code_cells(read_notebook(path)):
        code = "".join(c["source"])
        assert ("# NBVAL_SKIP" in code) == (re.search(r"#\| *eval: *false", code) is not None), code


@each_notebook
def test_exported_cells_carry_no_marker_and_star_import(path):
    for c in code_cells(read_notebook(path)):
        code = "".join(c["source"])
        if "#| export" in code:
            assert code.startswith("#| export") and "NBVAL" not in code
        assert not re.search(r"^from \S+ import \*", code, re.M)
        assert ".cuda()" not in code and not re.search(r"^nbdev_export\(\)", code, re.M)


@each_notebook
def test_teaching_apparatus(path):
    nb = read_notebook(path)
    text = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    assert text.startswith("# ")
    assert re.search(r"^## Summary", text, re.M)
    if is_chapter(path):
        questions = text.split("## Questionnaire")[1].split("## Exercises")[0]
        assert questions.count("<details>") == questions.count("</details>") >= 8
        exercises = text.split("## Exercises")[1]
        assert exercises.count("### Exercise") >= 5 and exercises.count("Difficulty: ") == exercises.count("### Exercise")
        assert exercises.count("minutes") >= exercises.count("### Exercise")
        parts = exercises.split("### Exercise")[1:]
        assert all(re.search(r"^Objective: ", part, re.M) and "<details><summary>If " in part for part in parts)
        answers = re.findall(r"<details>.*?</details>", questions, re.S)
        assert [int(re.search(r"<summary>(\d+)\.", a)[1]) for a in answers] == list(range(1, len(answers) + 1))
        ends = [a.removesuffix("</details>").strip().splitlines()[-1] for a in answers]
        assert all("](" in end for end in ends), "an answer ends with a link to its section"
        stubs = [c for c in code_cells(nb) if c["source"][0].startswith("# EXERCISE")]
        assert len(stubs) == exercises.count("### Exercise")


def test_readme_lists_the_chapters_with_their_titles_and_reading_times():
    rows = re.findall(r"^\| \[(\d\d) ([^]]+)\]\(nbs/(\S+)\) \| [^|]+ \| (\d+) \| `course_lib\.(\w+)` \|$",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    found = []
    for path in filter(is_chapter, NOTEBOOKS):
        nb = read_notebook(path)
        title, text = "".join(nb["cells"][0]["source"]).split("\n")[0], "".join(nb["cells"][0]["source"])
        minutes = re.search(r"(?:Reading time:|\*\*Time:\*\*) (\d+) minutes", text)
        assert minutes, f"{path.name} does not say how long it takes to read"
        found.append((path.name[:2], title.removeprefix("# "), path.name, minutes[1], exported_module(nb)))
    assert rows == found


@each_notebook
def test_settings_are_read_in_one_place(path):
    if path.stem in ("settings", "run"):
        return
    exported = [code for c in code_cells(read_notebook(path)) if (code := "".join(c["source"])).startswith("#| export")]
    assert not re.search(r"environ[^\n]*COURSE_|getenv\(.COURSE_", "\n".join(exported))


def test_stamp_notices_a_change():
    nb = read_notebook(NOTEBOOKS[0])
    before = code_hash(nb)
    code_cells(nb)[-1]["source"].append("\n# a comment")
    assert code_hash(nb) == before
    next(c for c in code_cells(nb) if not c["source"][0].startswith("#"))["source"].append("\nprint(1)")
    assert code_hash(nb) != before


def test_the_project_holds_no_private_path():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    texts = {p: p.read_text(encoding="utf-8", errors="replace") for p in paths if p.suffix != ".ipynb" and p != Path(__file__)}
    assert not [f"{p.relative_to(ROOT)}: {m[0]}" for p, t in texts.items() if (m := PRIVATE.search(t))]


@each_notebook
def test_code_fits_a_browser_window(path):
    "Chapters: 110 characters are what JupyterLab shows without scrolling at 1280 px; appendices keep to the library's 140"
    limit = 110 if re.match(r"\d\d_", path.name) else 140
    wide = [line for c in code_cells(read_notebook(path)) for line in "".join(c["source"]).splitlines() if len(line) > limit]
    assert not wide


@pytest.mark.slow
@each_notebook
def test_notebook_runs_alone(path, tmp_path):
    "In a fresh copy of the tree where no other notebook has run, with an empty folder for pictures and no network"
    for name in ("course_lib", "nbs", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    env = {**environment_of_tests(tmp_path / "pictures"), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    done = subprocess.run([*command, str(path.relative_to(ROOT))], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:]


@each_notebook
def test_links_to_other_notebooks_and_to_sections_resolve(path):
    nb = read_notebook(path)
    text = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    assert not set(re.findall(r"\]\(#([^)]+)\)", text)) - set(heading_ids(nb))          # JupyterLab decodes no %3F
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert not [link for link in links if not (path.parent / link).exists()]
    if is_chapter(path) and any(n.startswith(f"{int(path.name[:2]) + 1:02d}_") for n in NAMES):
        assert "**Next:**" in text
