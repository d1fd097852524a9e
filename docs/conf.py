"""Sphinx's settings for the site; its pages are made by build.py."""
import base64
import hashlib
import json
from pathlib import Path

from docutils import nodes

project = "From pixels to ResNets"
author = "The course authors"
html_title = project
extensions = ["myst_nb", "sphinx.ext.mathjax"]
nb_execution_mode = "off"                           # the outputs that are stored in the notebooks
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]    # what `record` publishes has plain text beside it

html_theme = "sphinx_book_theme"
html_theme_options = {
    "home_page_in_toc": True, "show_toc_level": 2, "use_download_button": False, "use_fullscreen_button": False,
    "navbar_persistent": [],                        # the search field stands in the sidebar
    "pygments_light_style": "a11y-high-contrast-light", "pygments_dark_style": "a11y-high-contrast-dark",
}
html_static_path = ["_static"]
templates_path = ["_templates"]
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}
html_css_files = ["course.css"]
html_copy_source = False
html_show_sphinx = False
mathjax_path = "tex-svg.js"                         # one file, with its fonts: no other host is asked


def describe_figures(app, doctree) -> None:
    "Give each figure the alt text and the width that stand in its output's metadata; MyST-NB names its file by its hash"
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix != ".ipynb":
        return
    outputs = [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
    about = {hashlib.sha256(base64.b64decode(o["data"]["image/png"])).hexdigest(): o["metadata"]["image/png"]
             for o in outputs if "image/png" in o.get("data", {})}
    for image in doctree.findall(nodes.image):
        if found := about.get(Path(image["uri"]).stem):
            image.attributes |= {"alt": found["alt"], "width": f"{found['width']}px"}


def setup(app) -> None:
    app.connect("doctree-read", describe_figures)
