"""Pages that are written by hand and run: side by side, into the cache that MyST-NB reads.

Pages in two languages with the same code come from one run.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from myst_nb.core.config import NbParserConfig
from myst_nb.core.read import create_nb_reader
from myst_parser.config.main import MdParserConfig
from nbclient import execute

from sitegen.fingerprint import digest
from sitegen.runs import Run

TIMEOUT = 600  # seconds that a cell may take
MODULES = ("elbozoo", "elbozoo.api", "elbozoo.cli")


def notebook_of(page: Path) -> nbformat.NotebookNode | None:
    """Return a page with code as MyST-NB reads it, or None for a page without."""
    text = page.read_text(encoding="utf-8")
    reader = create_nb_reader(str(page), MdParserConfig(), NbParserConfig(), text)
    return None if reader is None else reader.read(text)


def runs_of(pages: list[Path], cache: JupyterCacheAbstract) -> list[Run]:
    """Return a run for each page whose code no page before it has; all entries are in reach of them."""
    from elbozoo.models import entry_names

    key = digest([*MODULES, *(f"elbozoo.models.{name.replace('-', '_')}" for name in entry_names())])
    runs: dict[str, Run] = {}
    for page in pages:
        notebook = notebook_of(page)
        if notebook is not None:
            _, code = cache.create_hashed_notebook(notebook)
            runs.setdefault(code, Run(f"learn/{page.stem}", f"{key}-{code}", run_page, (str(page),)))
    return list(runs.values())


def run_page(page: str, out: Path) -> None:
    """Execute a page by a kernel of its own, away from the sources, and write it as a notebook."""
    notebook = notebook_of(Path(page))
    assert notebook is not None
    folder = tempfile.mkdtemp()
    try:
        execute(notebook, cwd=folder, timeout=TIMEOUT, record_timing=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    nbformat.write(notebook, out)


def fill(cache: JupyterCacheAbstract, executed: list[Path]) -> None:
    """Have ``cache`` hold these runs and no others."""
    for record in cache.list_cache_records():
        cache.remove_cache(record.pk)
    for path in executed:
        notebook = nbformat.read(path, as_version=4)
        cache.cache_notebook_bundle(CacheBundleIn(notebook, str(path)), check_validity=False, overwrite=True)


def open_cache(folder: Path) -> JupyterCacheAbstract:
    """Return the cache in ``folder``, made if there is none."""
    return get_cache(str(folder))
