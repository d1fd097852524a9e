"""The answers to the exercises, taken from the notebooks of solutions, so that tests need no second copy."""
import functools
from typing import Any

from course_lib.run import ROOT, _code, read_notebook


@functools.cache
def solutions(chapter: int) -> dict[str, Any]:
    "What the solutions of a chapter define: its first code cell and those that begin with # SOLUTION, without the calls of checkers"
    path = next((ROOT / "nbs" / "solutions").glob(f"{chapter:02d}_*.ipynb"))
    codes = [code for c in read_notebook(path)["cells"] if (code := _code(c).strip())]
    names: dict[str, Any] = {"__name__": f"solutions_{chapter:02d}"}
    for code in [codes[0], *(c for c in codes[1:] if c.startswith("# SOLUTION"))]:
        lines = [line for line in code.splitlines() if not line.startswith("check_")]
        exec(compile("\n".join(lines), path.name, "exec"), names)
    return names
