"""The site that make docs builds: without a warning, complete, and whole without any other host."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from course_lib.run import DOCS, ROOT, notebooks, read_notebook

pytestmark = pytest.mark.skipif(not all(map(importlib.util.find_spec, DOCS)),
                                reason="the site's packages are not installed: make docs installs them")
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src", "object": "data"}


class Page(HTMLParser):
    "What a page links to, loads and names"

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.links, self.loads, self.images, self.ids, self.text = path, [], [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a["id"]} if a.get("id") else set()
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "img":
            self.images.append(a)
        if tag in LOADED and a.get(LOADED[tag]):
            self.loads.append(a[LOADED[tag]])

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The whole site, built for a repository of a made-up name"
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "build.py"), str(folder)], capture_output=True, text=True,
                          env={**os.environ, "GITHUB_REPOSITORY": "someone/a-course"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {p: Page(p) for p in site.rglob("*.html") if "_static" not in p.relative_to(site).parts}


def chapter(site: Path, path: Path) -> Path:
    return site / path.relative_to(ROOT).with_suffix(".html")


def test_every_notebook_and_module_has_a_page(site, pages):
    modules = {p.stem for p in (ROOT / "course_lib").glob("*.py") if not p.stem.startswith("_")}
    assert {chapter(site, p) for p in notebooks()} <= set(pages)
    assert {p.stem for p in (site / "api").glob("*.html")} - {"index"} == modules


def test_every_link_within_the_site_resolves(site, pages):
    missing = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file() or (url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids):
                missing.append((path.relative_to(site).as_posix(), link))
    assert not [m for m in missing if m[1] != "#"]


def test_nothing_is_loaded_from_another_host(site, pages):
    assert not [(p.name, u) for p, page in pages.items() for u in page.loads if urlsplit(u).netloc]
    assert not [p.name for p in pages if re.search(r"url\(.?(?:https?:)?//|@import .?(?:https?:)?//", p.read_text(encoding="utf-8"))]
    styles = {p.name: p.read_text(encoding="utf-8") for p in (site / "_static").rglob("*.css")}
    assert styles and not [n for n, css in styles.items() if re.search(r"url\([\"']?(?:https?:)?//|@import [\"'](?:https?:)?//", css)]
    assert 'src="../_static/tex-svg.js' in chapter(site, ROOT / "nbs" / "03_gradient_descent.ipynb").read_text(encoding="utf-8")


def test_figures_keep_their_alt_text(site, pages):
    assert not [(p.name, i.get("src")) for p, page in pages.items() for i in page.images if not (i.get("alt") or "").strip()]
    for path in notebooks():
        stored = [o["metadata"]["image/png"]["alt"] for c in read_notebook(path)["cells"] for o in c.get("outputs", [])
                  if "image/png" in o.get("data", {})]
        assert [i["alt"] for i in pages[chapter(site, path)].images] == stored


def test_directives_are_gone_and_stubs_stay(site, pages):
    for path in notebooks():
        text = "".join(pages[chapter(site, path)].text)
        assert not re.search(r"^(#\| ?\w+|# NBVAL_\w+)", text, re.M), path.name
        assert text.count("# EXERCISE\n") == sum("".join(c["source"]).startswith("# EXERCISE") for c in read_notebook(path)["cells"])


def test_search_finds_batchnorm(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(index[index.index("{"):index.rindex("}") + 1])
    hits = [index[kind].get("batchnorm", []) for kind in ("terms", "titleterms")]     # a number where there is one page
    found = {index["docnames"][i] for hit in hits for i in (hit if isinstance(hit, list) else [hit])}
    assert {"nbs/09_batchnorm", "api/batchnorm"} <= found


def test_a_chapter_opens_in_colab_and_leads_on(site, pages):
    chapters = [p for p in notebooks() if p.parent.name == "nbs"]
    for path, after in zip(chapters, chapters[1:], strict=False):
        page = pages[chapter(site, path)]
        assert f"https://colab.research.google.com/github/someone/a-course/blob/main/nbs/{path.name}" in page.links
        assert "git clone -q --depth 1 https://github.com/someone/a-course course" in "".join(page.text)
        assert after.with_suffix(".html").name in page.links


def test_reference_shows_docments_and_leads_to_source_and_notebook(pages, site):
    page = pages[site / "api" / "learner.html"]
    text = " ".join("".join(page.text).split())
    assert ".train and .valid: loaders of pairs (inputs, targets)" in text and "Learner.fit" in text
    links = [u for u in page.links if u.startswith("https://github.com/someone/a-course/blob/main/course_lib/learner.py#L")]
    assert len(links) > 30 and any(u.startswith("../nbs/05_learner.html#") for u in page.links)
    assert "Learner.fit_one_cycle" in "".join(pages[site / "api" / "schedule.html"].text)
