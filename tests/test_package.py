"""The package: metadata from settings.ini, a wheel with course_lib and nothing else, light imports, files that tools accept."""
import configparser
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from course_lib.run import COMMANDS, ROOT, readme_table, with_results

MODULES = sorted(p.stem for p in (ROOT / "course_lib").glob("*.py") if not p.stem.startswith("_"))
# import matplotlib too
DRAW = {"images", "similarity", "datasets", "dataloader", "learner", "activations", "schedule", "batchnorm", "resnet", "scale",
        "checks"}


def settings() -> configparser.SectionProxy:
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel, built from a copy of what it is made of"
    source = tmp_path_factory.mktemp("source")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("course_lib", "nbs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    backend = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    (source / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", backend], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return source / "dist" / done.stdout.split()[-1]


def test_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert tops == {"course_lib", f"course_lib-{settings()['version']}.dist-info"}
    assert {f"course_lib/{m}.py" for m in MODULES} <= set(names)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert f"Requires-Python: >={settings()['min_python']}" in metadata
    for requirement in settings()["requirements"].split():
        assert f"Requires-Dist: {requirement}" in metadata


def test_wheel_installs_into_an_empty_environment_and_imports_there(wheel, tmp_path):
    "Without its dependencies (they are gigabytes): those are lent by this environment through a path file"
    env = tmp_path / "env"
    venv.create(env, with_pip=False)
    python = env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}        # this checkout must not be found instead
    done = subprocess.run(install, capture_output=True, text=True, env=alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    (site / "lent.pth").write_text(str(Path(torch.__file__).parents[1]))
    code = "import course_lib; print(course_lib.__file__)\n" + "\n".join(f"import course_lib.{m}" for m in MODULES)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(site)) and not done.stderr


def import_in_fresh_process(module: str) -> tuple[float, list[str]]:
    "CPU seconds that importing a module adds to torch (and matplotlib where it draws), and which heavy packages it brought along"
    given = ["torch"] + ["matplotlib.pyplot"] * (module in DRAW)
    program = (f"import sys, time, {', '.join(given)}\nbefore = time.process_time()\nimport course_lib.{module}\n"
               "print(time.process_time() - before, *(p for p in ('torchvision', 'IPython', 'nbdev') if p in sys.modules))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not done.stderr
    seconds, *heavy = done.stdout.split()
    return float(seconds), heavy


@pytest.mark.parametrize("module", MODULES)
def test_import_is_light(module):
    "At most .15 s on top of torch (and matplotlib); torchvision waits until it is used. The best of three tries counts"
    for _ in range(3):
        seconds, heavy = import_in_fresh_process(module)
        assert not heavy
        if seconds <= .15:
            return
    raise AssertionError(f"importing course_lib.{module} takes {seconds:.2f} s")


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows_are_valid(workflow):
    done = subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_workflows():
    assert {p.name for p in (ROOT / ".github" / "workflows").glob("*.yml")} >= {"test.yml", "newest.yml", "real-data.yml"}


def test_code_is_lint_free():
    places = [p for p in ("course_lib", "tests", "benchmarks", "examples", "setup.py", "nbs/conftest.py") if (ROOT / p).exists()]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *places], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_requirement_has_a_tested_version():
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    tested = {normal(m[1]) for m in re.finditer(r"(?m)^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text())}
    wanted = [r for key in settings() if key.endswith("requirements") for r in settings()[key].split()]
    assert "fastai>=2.8" in wanted and {normal(re.match(r"[\w.-]+", r)[0]) for r in wanted} <= tested


def test_environment_file_takes_the_packages_from_pip():
    text = (ROOT / "environment.yml").read_text()
    for line in ("conda-forge", "- -e .[dev]", "- -c constraints.txt", f"python>={settings()['min_python']}"):
        assert line in text


def test_every_command_is_a_make_target():
    targets = re.search(r"(?m)^TARGETS := (.+)$", (ROOT / "Makefile").read_text())[1].split()
    assert sorted(targets) == sorted(COMMANDS)


def test_readme_names_only_commands_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z-]+)", readme)) | set(re.findall(r"course_lib\.run ([a-z-]+)", readme))
    assert {"lab", "test"} <= named <= set(COMMANDS)


def test_readme_results_are_those_of_the_notebooks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_results(readme, readme_table()) == readme and readme_table().count("\n") > 10


def test_readme_example_runs_and_goes_on(tmp_path):
    code = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first, again = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    result = re.search(r"after one epoch: ([\d.]+)", first.stdout)
    assert .7 < float(result[1]) <= 1 and result[0] in again.stdout
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == ["example.safetensors"]
