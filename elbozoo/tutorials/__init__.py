"""Tutorials: pages whose text, pictures and numbers come from one run of a model and a guide.

A page is a list of cells made by the functions of the modules beside this one. Sentences with numbers are functions of
what the code cells before them have computed, so that the page cannot disagree with its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elbozoo.notebook import check_destination, replace, write_page
from elbozoo.notebook.cells import Code, Text, execute
from elbozoo.tutorials import comparing, ending, fitting, opening, posterior, rows
from elbozoo.tutorials.progress import page_progress
from elbozoo.tutorials.subject import Effort, Subject

__all__ = ["EFFORT", "tutorial_cells", "write_tutorial"]

EFFORT = Effort()
ENTRY_PAGE = (
    opening.introduction,
    opening.diagram,
    opening.program,
    opening.guide,
    rows.data,
    fitting.fit,
    posterior.posterior,
    fitting.climb,
    fitting.ledger,
    comparing.comparison,
    ending.failures,
    ending.exercises,
    ending.references,
    ending.provenance,
)
# A program says nothing of itself before it has data.
PROGRAM_PAGE = (
    opening.introduction,
    opening.program,
    rows.data,
    opening.diagram,
    opening.guide,
    *ENTRY_PAGE[ENTRY_PAGE.index(fitting.fit) :],
)


def write_tutorial(
    model: Any,
    path: str | Path,
    *,
    guide: str | None = None,
    data: Any = None,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Write a page that teaches ``model`` with ``guide`` from a run, and return its path.

    The page can be executed: MyST Markdown, with its pictures in ``PAGE_files`` beside it, or a Jupyter notebook. HTML
    is one file to be read, with all in it.

    Parameters
    ----------
    model : str or callable
        Name of an entry, ``path/to/file.py:function``, or a program of your own at the top of a file.
    path : path
        Page to write, ending in ``.md``, ``.ipynb`` or ``.html``; it is written when the run has ended.
    guide : str, optional
        Guide that the page is about; ``"mean-field"`` by default, ``"exact"`` where there is no latent, and
        ``"amortized"`` where a q must see its row.
    data : optional
        Whatever :func:`~elbozoo.load_data` takes; by default rows that the model draws. Those in memory are written
        to ``PAGE_data.csv`` beside the page, whose code reads them from there.
    progress : bool
        Show a bar on standard error where that is a terminal.
    **options
        Options of the model, the guide and the methods, such as ``latent_dim=3`` or ``steps=2000``; the page's code
        shows them.

    Raises
    ------
    InvalidInput
        For anything unknown or out of range, or a path that cannot be written; before the run.
    """
    page = Path(path)
    check_destination(page)
    subject = Subject.of(model, page, guide=guide, data=data, options=options, effort=EFFORT)
    cells = tutorial_cells(subject)
    runs = sum(isinstance(cell, Code) for cell in cells)
    with _data_beside(subject), page_progress(page.name, runs, shown=progress) as report:
        return write_page(execute(cells, page.parent, report), page)


def tutorial_cells(subject: Subject) -> list[Text | Code]:
    """Return the page as cells, in order."""
    sections: tuple[Callable[[Subject], list[Text | Code]], ...] = PROGRAM_PAGE if subject.is_bare else ENTRY_PAGE
    return [cell for section in sections for cell in section(subject)]


@contextmanager
def _data_beside(subject: Subject) -> Iterator[None]:
    """Put the rows where the page's code reads them; they go again if the page does not come about."""
    if subject.source.file is None:
        yield
        return
    path, content = subject.source.file
    before = path.read_bytes() if path.exists() else None
    replace(path, content)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink() if before is None else path.write_bytes(before)
        raise
