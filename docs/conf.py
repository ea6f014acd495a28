"""Sphinx settings; pages about models, guides, methods, data and the command line are generated before the build."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402
from sphinx.errors import SphinxError  # noqa: E402
from sphinx.util import logging  # noqa: E402

import elbozoo  # noqa: E402

RUNS = HERE / "_build" / "runs"  # what tutorials, examples and hand-written pages gave, until their code changes

project = "elbozoo"
author = "the elbozoo developers"
copyright = "the elbozoo developers, Apache-2.0"
version = release = elbozoo.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "jupyter_execute", "_generated/notebooks"]
templates_path = ["_templates"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# What is generated has run already; hand-written pages find their outputs in the cache, which is filled before.
nb_execution_mode = "cache"
nb_execution_cache_path = str(RUNS / "jupyter-cache")
nb_execution_excludepatterns = ["_generated/*/*.ipynb", "_generated/*/*/*.ipynb"]
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_output_stderr = "remove"
nb_ipywidgets_js = {}  # nothing is fetched from elsewhere

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

html_theme = "pydata_sphinx_theme"
html_title = "elbozoo"
html_theme_options = {
    "navbar_persistent": ["language-switch", "search-button"],  # these stay where the others hide in a menu
    "navbar_end": ["theme-switcher", "navbar-icon-links"],
    "navigation_with_keys": False,
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
# Only the zoo, guides and methods have pages below them to list at the side.
html_sidebars = {page: [] for page in ("*", "_generated/datasets", "_generated/json")}
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["elbozoo.css", "tables.css"]
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"

# Pages that exist in both languages, for the switch in the navigation bar.
chinese = {f"learn/zh/{page.stem}": f"learn/{page.stem}" for page in (HERE / "learn" / "zh").glob("*.md")}
chinese["learn/zh/index"] = "index"
html_context = {
    "default_mode": "auto",  # without it the theme complains on the console of a new reader
    "chinese": list(chinese),
    "twins": {**chinese, **{english: page for page, english in chinese.items()}, "learn/index": "learn/zh/index"},
}


def generate_pages(app: Sphinx) -> None:
    """Make every page that is not written by hand, and run those that are; a run that breaks down ends the build."""
    logger = logging.getLogger("elbozoo")
    try:
        generate.write_pages(HERE / "_generated", RUNS, entries=generate.wanted_entries(), report=logger.info)
        generate.run_written_pages(HERE, RUNS, RUNS / "jupyter-cache", report=logger.info)
    except generate.runs.PageFailed as error:
        raise SphinxError(str(error)) from error


def setup(app: Sphinx) -> None:
    """Generate before Sphinx looks for sources."""
    app.connect("builder-inited", generate_pages)
