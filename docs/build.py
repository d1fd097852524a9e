"""The course as a website: python docs/build.py [FOLDER [NOTEBOOK ...]]

From the notebooks' stored outputs (nothing is run), README.md and the library, pages are written to FOLDER/source and built by Sphinx
into FOLDER/html. A page links to the repository and to Colab if it is known: from GITHUB_REPOSITORY (owner/name), or the clone's origin."""
import ast
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

from fastcore.docments import docments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from course_lib.run import ROOT, _code, heading_ids, named_notebooks, notebook_name, outside_fences, read_notebook, write_notebook

MATHJAX = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"   # tex-svg.js of MathJax 3.2.2
DIRECTIVE = re.compile(r"^(#\|.*|# NBVAL_\w+)\s*\n?", re.M)
PARTS = {".": "Chapters", "appendix": "Appendices", "solutions": "Solutions"}


def repository() -> str | None:
    "owner/name on GitHub"
    if name := os.environ.get("GITHUB_REPOSITORY"):
        return name
    origin = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True).stdout
    return m[1] if (m := re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?\s*$", origin)) else None


class Site:
    "What the pages are made of, and what they link to"

    def __init__(self, source: Path, paths: list[Path]):
        self.source, self.repo, self.paths = source, repository(), paths
        self.nbs = {p: read_notebook(p) for p in paths}
        self.module_of = {p: m[1] for p, nb in self.nbs.items() for c in nb["cells"] if (m := re.match(r"#\| default_exp (\w+)", _code(c)))}
        self.label_of: dict[str, str] = {}          # id of a code cell -> the section in which it stands

    def title(self, path: Path) -> str:
        return "".join(self.nbs[path]["cells"][0]["source"]).splitlines()[0].removeprefix("# ")

    def number(self, path: Path) -> str:
        return m[0] + " " if path.parent.name == "nbs" and (m := re.match(r"\d\d", path.stem)) else ""

    def page(self, path: Path) -> str:
        return path.relative_to(ROOT).as_posix()

    def github(self, file: str) -> str:
        return f"https://github.com/{self.repo}/blob/main/{file}"

    def write(self, name: str, text: str) -> None:
        (self.source / name).parent.mkdir(parents=True, exist_ok=True)
        (self.source / name).write_text(text + "\n", encoding="utf-8")

    # Notebooks

    def opening(self, path: Path) -> str:
        "What a page of the site adds below a notebook's title"
        up, module = "../" * (len(path.relative_to(ROOT).parts) - 1), self.module_of.get(path)
        links = [f"[`course_lib.{module}`]({up}api/{module}.md)"] if module else []
        if not self.repo:
            return " · ".join(links)
        page = self.page(path)
        links = [f"[Open in Colab](https://colab.research.google.com/github/{self.repo}/blob/main/{page})",
                 f"[Notebook on GitHub]({self.github(page)})", *links]
        install = (f"!git clone -q --depth 1 https://github.com/{self.repo} course\n"
                   "%pip install -q ./course\n%cd course/nbs")
        return (" · ".join(links) + "\n\n<details><summary>On Colab, run this in a new cell first</summary>\n\n"
                f"```text\n{install}\n```\n\n"
                "It fetches the library and the results of long runs. A GPU is chosen under *Runtime*.\n\n</details>")

    def notebook(self, path: Path) -> None:
        "A copy of a notebook without directives, with labels before its headings"
        cells, label, n, nb = [], None, 0, self.nbs[path]
        name = notebook_name(path).replace("/", "-")
        label_of = {heading: f"{name}-{i}" for i, heading in enumerate(heading_ids(nb), 1)}

        def inner(m: re.Match) -> str:              # a link to a section of the same notebook
            return f"](#{label_of.get(m[1], m[1])})"
        for cell in nb["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                lines = []
                for line, prose in outside_fences(text):
                    if prose and re.match(r"#{1,4} ", line):
                        n += 1
                        label = f"{name}-{n}"
                        title = f"# {self.number(path)}{self.title(path)}"
                        lines += [f"({label})=", line] if n > 1 else [f"({label})=", title, "", self.opening(path)]
                    else:
                        lines.append(re.sub(r"\]\(#([^)]+)\)", inner, line) if prose else line)
                text = "\n".join(lines)
            else:
                self.label_of[cell["id"]] = label
                if re.search(r"^#\| *hide\b", text, re.M) or not (text := DIRECTIVE.sub("", text).strip("\n")):
                    continue
            cells.append(cell | {"source": text})
        (self.source / self.page(path)).parent.mkdir(parents=True, exist_ok=True)
        write_notebook(nb | {"cells": cells}, self.source / self.page(path))

    # README

    def readme(self) -> dict[str, str]:
        "Sections of the README by their title (the first: ''), with links that hold on the site"
        def link(m: re.Match) -> str:
            text, target = m[1], m[2]
            if "://" in target or target.startswith("#") or (self.source / target).is_file():
                return m[0]
            return f"[{text}]({self.github(target)})" if self.repo else text
        sections, name = {"": []}, ""
        for line, prose in outside_fences((ROOT / "README.md").read_text(encoding="utf-8")):
            if prose and line.startswith("## "):
                name = line[3:]
                sections[name] = []
                continue
            if prose:
                line = re.sub(r"(!\[[^\]]+\])\(docs/", r"\1(", line)         # pictures lie in the site's own folder _static
                line = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, line)
                line = re.sub(r"(?<!\[)`course_lib\.(\w+)`(?!\])", lambda m: f"[{m[0]}](api/{m[1]}.md)"
                              if m[1] in self.module_of.values() else m[0], line)
            sections[name].append(line)
        return {k: "\n".join(v).strip() for k, v in sections.items()}

    def front(self) -> None:
        "The index and the page of results, both from the README"
        sections = self.readme()
        results = [re.sub(r"^</?details>.*\n|^<!--.*\n", "", sections.pop(k) + "\n", flags=re.M) for k in ("Results", "Speed")]
        self.write("results.md", f"# Results and speed\n\n## Results\n\n{results[0]}\n## Speed\n\n{results[1]}")
        trees = [(caption, [self.page(p).removesuffix(".ipynb") for p in self.paths
                            if p.parent.relative_to(ROOT / "nbs").as_posix() == part]) for part, caption in PARTS.items()]
        trees += [("Library", ["api/index", *[f"api/{m}" for m in self.module_of.values()]]), ("More", ["results"])]
        text = [sections.pop("")] + [f"## {k}\n\n{v}" for k, v in sections.items()]
        text += [f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```"
                 for caption, entries in trees if entries]
        self.write("index.md", "\n\n".join(text))

    # The library

    def api(self) -> None:
        "A page a module, and a list of them"
        rows = []
        for path, module in self.module_of.items():
            page = Module(self, path, module)
            self.write(f"api/{module}.md", page.text())
            rows.append(f"| [`course_lib.{module}`]({module}.md) | [{self.number(path)}{self.title(path)}](../{self.page(path)}) | "
                        f"{', '.join(f'`{n}`' for n in page.names)} |")
        self.write("api/index.md", "# The library\n\nEach module of `course_lib` is exported from one notebook, where it is developed and "
                   "tested.\n\n| module | chapter | names |\n| --- | --- | --- |\n" + "\n".join(rows))


class Module:
    "The reference of one module, from its source: signatures as written, docments as a table of parameters"

    def __init__(self, site: Site, path: Path, name: str):
        self.site, self.path, self.name = site, path, name
        self.object = importlib.import_module(f"course_lib.{name}")
        self.code = (ROOT / "course_lib" / f"{name}.py").read_text(encoding="utf-8")
        self.names: list[str] = []
        nodes = ast.parse(self.code).body
        self.patches = {n: p for n in nodes if (p := patched(n))}
        here = {n.name for n in nodes if isinstance(n, ast.ClassDef)}
        self.entries = [e for n in nodes if self.patches.get(n) not in here for e in self.entry(n)]   # those stand below their class

    def text(self) -> str:
        site = self.site
        intro = "".join(site.nbs[self.path]["cells"][0]["source"]).split("\n\n")[1]
        here = f"../{self.path.parent.relative_to(ROOT).as_posix()}/"       # its links start at the notebook
        intro = re.sub(r"\]\((?!\w+:|#)", f"]({here}", intro)
        where = f"Developed in [{site.number(self.path)}{site.title(self.path)}](../{site.page(self.path)})."
        return "\n\n".join([f"# `course_lib.{self.name}`", intro, where, *self.entries])

    def entry(self, node: ast.stmt) -> list[str]:
        "The text on a top-level statement: a function, a class with its methods, a method patched into a class, a constant"
        if isinstance(node, ast.ClassDef) and node.name in self.object.__all__:
            cls = getattr(self.object, node.name)
            self.names.append(node.name)
            inits = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
            fields = [f"{ast.unparse(f)}" for f in node.body if isinstance(f, ast.AnnAssign)] if not inits else []
            bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
            head = signature(node.name, inits[0]) if inits else call(node.name, fields) if fields else f"{node.name}{bases}"
            of = f"A kind of {', '.join(f'`{ast.unparse(b)}`' for b in node.bases)}." if node.bases and (inits or fields) else ""
            table = parameters(inits[0] if inits else node, cls.__init__ if inits else cls) if inits or fields else ""
            text = [self.block(2, node.name, f"class {head}", node, of, table)]
            methods = [f for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_") and ast.get_docstring(f)]
            methods += [n for n, owner in self.patches.items() if owner == node.name]
            return text + [self.function(f, getattr(cls, f.name), f"{node.name}.{f.name}", 3) for f in methods]
        if isinstance(node, ast.FunctionDef):
            if owner := self.patches.get(node):
                return [self.function(node, getattr(getattr(self.object, owner), node.name), f"{owner}.{node.name}", 2)]
            if node.name in self.object.__all__:
                self.names.append(node.name)
                return [self.function(node, getattr(self.object, node.name), node.name, 2)]
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id in self.object.__all__ and target.id != "__all__":
                self.names.append(target.id)
                lines = ast.get_source_segment(self.code, node).splitlines()
                shown = lines if len(lines) <= 12 else [*lines[:8], "    ..."]
                return [self.block(2, target.id, "\n".join(shown), node)]
        return []

    def function(self, node: ast.FunctionDef, obj, name: str, level: int) -> str:
        kinds = [k for d in node.decorator_list if (k := ast.unparse(d)) in ("property", "staticmethod", "classmethod")]
        obj = getattr(obj, "fget", None) or getattr(obj, "__func__", None) or getattr(obj, "__wrapped__", None) or obj
        head = signature(name, node, method="." in name and kinds != ["staticmethod"])
        return self.block(level, name, name if kinds == ["property"] else head, node, f"A {kinds[0]}." if kinds else "",
                          parameters(node, obj, method="." in name and kinds != ["staticmethod"]))

    def block(self, level: int, name: str, head: str, node: ast.stmt, *more: str) -> str:
        "Heading, signature, docstring, what else there is, and where to read on"
        doc = ast.get_docstring(node) if not isinstance(node, ast.Assign | ast.AnnAssign) else ""
        return "\n\n".join(filter(None, [f"{'#' * level} `{name}`", f"```python\n{head}\n```", doc, *more, self.links(node)]))

    def links(self, node: ast.stmt) -> str:
        "To the section of the notebook that defines it, and to the source"
        cell = re.findall(r"^# %% \S+ #(\w+)", "\n".join(self.code.splitlines()[:node.lineno]), re.M)
        found = [f"[in the notebook](#{label})"] if cell and (label := self.site.label_of.get(cell[-1])) else []
        if self.site.repo:
            found.append(f"[source]({self.site.github(f'course_lib/{self.name}.py')}#L{node.lineno}-L{node.end_lineno})")
        return " · ".join(found)


def patched(node: ast.stmt) -> str | None:
    "The class into which fastcore's `patch` puts a public function, if it does"
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and "patch" in map(ast.unparse, node.decorator_list):
        return ast.unparse(node.args.args[0].annotation)
    return None


def arguments(node: ast.FunctionDef, method: bool) -> list[tuple[str, ast.arg | None, ast.expr | None]]:
    "(name as written, its annotation's node, default) of each parameter, bare * and / included"
    a = node.args
    plain = a.posonlyargs + a.args
    rows = list(zip([x.arg for x in plain], plain, [None] * (len(plain) - len(a.defaults)) + a.defaults, strict=True))
    if a.posonlyargs:
        rows.insert(len(a.posonlyargs), ("/", None, None))
    if a.vararg or a.kwonlyargs:
        rows.append(("*" + (a.vararg.arg if a.vararg else ""), a.vararg, None))
    rows += list(zip([x.arg for x in a.kwonlyargs], a.kwonlyargs, a.kw_defaults, strict=True))
    if a.kwarg:
        rows.append(("**" + a.kwarg.arg, a.kwarg, None))
    return rows[1:] if method else rows


def written(name: str, arg: ast.arg | None, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(arg.annotation)}" if arg and arg.annotation else ""
    return name + kind + (("=" if not kind else " = ") + ast.unparse(default) if default is not None else "")


def call(name: str, args: list[str], returns: str = "") -> str:
    "name(arguments) -> returns, on one line if it fits"
    line = f"{name}({', '.join(args)}){returns}"
    return line if len(line) <= 80 else f"{name}(\n" + "".join(f"    {a},\n" for a in args) + f"){returns}"


def signature(name: str, node: ast.FunctionDef, method: bool = False) -> str:
    init = node.name == "__init__"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and not init else ""
    return call(name, [written(*row) for row in arguments(node, method or init)], returns)


def parameters(node: ast.FunctionDef | ast.ClassDef, obj, method: bool = False) -> str:
    "The parameters that the source comments on, as a table; '' if there is none"
    told = docments(obj, full=True)
    if isinstance(node, ast.ClassDef):
        rows = [(f.target.id, ast.unparse(f.annotation), f.value) for f in node.body if isinstance(f, ast.AnnAssign)]
    else:
        rows = [(n, ast.unparse(a.annotation) if a.annotation else "", d)
                for n, a, d in arguments(node, method or node.name == "__init__") if a]
    said = {n: (told.get(n.lstrip("*")) or {}).get("docment") or "" for n, _, _ in rows}
    returns = (told.get("return") or {}).get("docment") or ""
    if not any(said.values()) and not returns:
        return ""
    cell = lambda text: f"`{text}`".replace("|", r"\|") if text else ""
    table = [f"| {cell(n)} | {cell(kind)} | {cell(ast.unparse(d)) if d is not None else ''} | {prose(said[n])} |" for n, kind, d in rows]
    if returns:
        table.append(f"| returns | {cell(ast.unparse(node.returns))} | | {prose(returns)} |")
    return "\n".join(["| parameter | type | default | meaning |", "| --- | --- | --- | --- |", *table])


def prose(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def mathjax() -> bytes:
    "MathJax in one file, from the package that brings it along, if it is the file that it should be"
    script = Path(next(f for f in files("sphinx-mathjax-offline") if f.name == "tex-svg.js").locate()).read_bytes()
    if hashlib.sha256(script).hexdigest() != MATHJAX:
        raise SystemExit("MathJax is not the file that was tested: install sphinx-mathjax-offline in the version of constraints.txt.")
    return script


def build(folder: Path, names: list[str]) -> int:
    "Write the pages and let Sphinx build them; its exit status: for the whole course a warning is an error"
    source, html = folder / "source", folder / "html"
    for old in (source, html):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("build.py", "__pycache__"))
    (source / "_static" / "tex-svg.js").write_bytes(mathjax())
    site = Site(source, named_notebooks(names))
    for path in site.paths:
        site.notebook(path)
    site.api()
    site.front()
    if not site.repo:
        print("No links to GitHub and Colab: name the repository, GITHUB_REPOSITORY=owner/name.")
    strict = [] if names else ["-W", "--keep-going"]         # a part of the course has links that lead nowhere
    command = [sys.executable, "-m", "sphinx", "-q", *strict, "-b", "html", str(source), str(html)]
    done = subprocess.run(command, cwd=ROOT)
    if not done.returncode:
        print(f"The site is in {html.relative_to(ROOT) if html.is_relative_to(ROOT) else html}; make docs-serve shows it.")
    return done.returncode


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site"), sys.argv[2:]))
