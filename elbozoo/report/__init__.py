"""The report of a comparison: an HTML page that needs nothing else, or Markdown with pictures beside it."""

from __future__ import annotations

import os
from pathlib import Path

from elbozoo.inference.comparison import Comparison
from elbozoo.inference.storage import writable_directory
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.report.markdown import folder_of, markdown, stills
from elbozoo.report.page import html
from elbozoo.report.settings import reproduction
from elbozoo.report.words import headline, notes

__all__ = ["headline", "html", "notes", "reproduction", "write"]

PAGES, TEXTS = (".html", ".htm"), (".md",)


def write(comparison: Comparison, path: str | Path) -> Path:
    """Write the report of ``comparison`` and return its path.

    A page ``.html`` holds its pictures, scripts and style and loads nothing. Beside ``PAGE.md`` the pictures lie in
    ``PAGE_files``. A page appears whole or not at all.

    Parameters
    ----------
    comparison : Comparison
        What was compared.
    path : path
        Page to write, ending in ``.html`` or ``.md``.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InvalidInput
        For another ending, or if the page cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise InvalidInput(
            f"report: found a directory at {target}, expected a file's path, such as {target / 'report.html'}"
        )
    suffix = target.suffix.lower()
    if suffix not in PAGES + TEXTS:
        raise InvalidInput(
            f"report: found {target.name!r}, expected a name that ends in .html or .md, such as report.html"
        )
    writable_directory(target.parent)
    try:
        _write_whole(target, html(comparison) if suffix in PAGES else _with_pictures(comparison, target))
    except OSError as error:
        raise InvalidInput(
            f"report {target}: {error.strerror or error}; choose a path that can be written to"
        ) from None
    return target


def _with_pictures(comparison: Comparison, page: Path) -> str:
    """Write the pictures of a page and return its text."""
    folder, written = folder_of(page), []
    folder.mkdir(exist_ok=True)
    for still in stills(comparison):
        (folder / still.name).write_bytes(still.png)
        written.append((f"{folder.name}/{still.name}", still.alt))
    return markdown(comparison, written)


def _write_whole(target: Path, text: str) -> None:
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
