"""The site that `sphinx-build docs docs/_build` makes: Markdown pages, the API from docstrings."""

import sys
from pathlib import Path

import mentorch

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "mentorch"
author = "the mentorch authors"
project_copyright = author
version = release = mentorch.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "repository",  # links to files of the repository; docs/_ext
    "docstrings",  # our docstrings' formulas and names; docs/_ext
]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = f"mentorch {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

# GitHub gives headings these names too, so one link works in both places, and is checked here.
myst_heading_anchors = 4

suppress_warnings = ["misc.highlighting_failure"]  # pages abbreviate code with …
highlight_language = "none"  # blocks of docstrings are formulas; those of pages say what they are

# Everything that Sphinx can complain about fails the build: a link, a heading, a name, a picture.
nitpicky = True
nitpick_ignore = [  # types that are imported for type checkers only, or made by tyro
    ("py:class", "pa.Table"),
    ("py:class", "pathlib.Annotated"),
]
default_role = "py:obj"  # `name` in a docstring is a name; ``text`` is literal
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "signature"  # docstrings say shape, unit and range instead
autodoc_preserve_defaults = True
napoleon_use_ivar = True
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Pages of the site that stand for files outside docs/.
repository_pages = {
    "bench/RESULTS.md": "benchmarks",
    "CHANGELOG.md": "changelog",
}
