"""Where executed pages go: MyST Markdown, a Jupyter notebook or HTML, as the suffix says; whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from elbozoo.inference.storage import writable_directory
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.notebook.cells import Executed
from elbozoo.notebook.html import html_files
from elbozoo.notebook.jupyter import notebook_files
from elbozoo.notebook.markdown import markdown_files, pictures_folder

WRITERS: dict[str, Callable[[list[Executed], Path], dict[Path, bytes]]] = {
    ".md": markdown_files,
    ".ipynb": notebook_files,
    ".html": html_files,
}
SUFFIXES = "{} or {}".format(", ".join(list(WRITERS)[:-1]), list(WRITERS)[-1])


def check_destination(page: Path) -> None:
    """Refuse a page that cannot be written, before the work starts.

    Raises
    ------
    InvalidInput
        For a suffix other than .md, .ipynb and .html, a directory, or a folder that cannot be written to.
    """
    if page.suffix not in WRITERS:
        raise InvalidInput(f"page {page}: found the suffix {page.suffix!r}, expected {SUFFIXES}")
    if page.is_dir():
        raise InvalidInput(f"page {page}: found a directory, expected the path of a file; add a file name")
    writable_directory(page.parent)
    if page.suffix == ".md" and os.path.lexists(pictures_folder(page)):
        writable_directory(pictures_folder(page))


def write_page(cells: list[Executed], page: Path) -> Path:
    """Write the executed ``cells`` to ``page``, in the format that its suffix names, and return it."""
    for path, content in WRITERS[page.suffix](cells, page).items():
        writable_directory(path.parent)
        replace(path, content)
    return page


def replace(path: Path, content: bytes) -> None:
    """Write the whole of ``content``, or leave ``path`` as it was.

    Raises
    ------
    InvalidInput
        If it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}; choose a path that can be written to") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
