"""How `make docs` builds the site: pages in Markdown, the API from the docstrings, nothing from the network."""

from __future__ import annotations

import bn_ext

project = "bn_ext"
copyright = "2026, the bn_ext authors"
version = release = bn_ext.__version__

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
