"""Sphinx settings; the pages about models, guides, methods, data and the command line are generated first."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

import elbozoo  # noqa: E402

generate.write_pages(HERE / "_generated")

project = "elbozoo"
author = "the elbozoo developers"
copyright = "the elbozoo developers, Apache-2.0"
version = release = elbozoo.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # a page runs again when its code has changed; remove _build when the library has
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

html_theme = "pydata_sphinx_theme"
html_title = "elbozoo"
html_theme_options = {
    "navbar_end": ["language-switch", "theme-switcher", "navbar-icon-links"],
    "navigation_with_keys": False,
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
# Only the zoo has pages below it to list at the side.
html_sidebars = {page: [] for page in ("*", "_generated/guides", "_generated/methods", "_generated/datasets")}
html_copy_source = False

# Pages that exist in both languages, for the switch in the navigation bar.
chinese = {f"learn/zh/{page.stem}": f"learn/{page.stem}" for page in (HERE / "learn" / "zh").glob("*.md")}
chinese["learn/zh/index"] = "index"
html_context = {
    "chinese": list(chinese),
    "twins": {**chinese, **{english: page for page, english in chinese.items()}, "learn/index": "learn/zh/index"},
}
