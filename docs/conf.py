"""How `make docs` builds the site: pages in Markdown, the API from the docstrings, nothing from the network."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

import bn_ext

project = "bn_ext"
copyright = "2026, the bn_ext authors"
version = release = bn_ext.__version__.split("+")[0]  # without the torch that this library was built for

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]

html_theme = "furo"
html_title = f"bn_ext {release}"
html_copy_source = False  # the pages are in the repository
html_show_sphinx = False

myst_heading_anchors = 4  # as deep as pages link to; a link to none of them fails the build

napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Dtypes"]
smartquotes = False  # who copies "relu" wants it as it is typed
default_role = "code"  # docstrings write `x` for code
python_maximum_signature_line_length = 100
autodoc_typehints_format = "short"


def _hand_out_files(app: Sphinx, page: str, text: list[str]) -> None:
    """Have a link to a Markdown file outside docs/ hand out that file; MyST takes it for a page and finds none."""
    text[0] = re.sub(r"\]\((\.\./[^)#\s]+\.md)(?:#[^)\s]*)?\)", r"](path:\1)", text[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _hand_out_files)
