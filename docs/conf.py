"""Sphinx: these documents and the reference, from the docstrings. `make docs` builds them into docs/_build."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = "avalanche_sp"
version = release = installed("avalanche-sp")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {  # code at full width
    "page_width": "95%",
    "body_max_width": "none",
    "description": "Selective plasticity for continual learning",
}
html_copy_source = False
html_show_copyright = False


def links_within(app, docname, source):
    """The README is this site's first page, and what else lies outside this folder is a file to download."""
    source[0] = source[0].replace("](../README.md", "](index.md")


def setup(app):
    app.connect("source-read", links_within)


myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "ParamsT")}
autodoc_inherit_docstrings = False  # Avalanche's callbacks are no part of what is to be read
autodoc_default_options = {"members": True, "show-inheritance": True}
