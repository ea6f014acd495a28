"""A page as MyST Markdown: it shows the outputs of its own run, and can be run again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from elbozoo.notebook.cells import Executed, Output
from elbozoo.pages import code_block

SUFFIXES = {"image/png": "png", "image/svg+xml": "svg"}
FRONT_MATTER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""


def pictures_folder(page: Path) -> Path:
    """Return the folder beside ``page`` that holds its pictures."""
    # Not every reader of Markdown turns the %20 of a link back into the space of a file's name.
    return page.with_name(f"{quote(page.stem).replace('%', '-')}_files")


def markdown_files(cells: list[Executed], page: Path) -> dict[Path, bytes]:
    """Return the files that make up the page, the page itself last, with their content."""
    files: dict[Path, bytes] = {}
    blocks = [block for cell in cells for block in _blocks(cell, page, files)]
    return {**files, page: (FRONT_MATTER + "\n" + "\n\n".join(blocks) + "\n").encode()}


def _blocks(cell: Executed, page: Path, files: dict[Path, bytes]) -> Iterator[str]:
    if cell.outputs is None:
        yield cell.source
        return
    # The page shows the outputs of its own run; a build that executes it again must not show them twice.
    tags = ":tags: [remove-output]\n\n" if cell.outputs else ""
    yield code_block(tags + cell.source, "{code-cell} ipython3")
    for output in cell.outputs:
        if output.picture is None:
            yield _printed(output)
            continue
        kind, content = output.picture
        path = pictures_folder(page) / f"figure-{len(files) + 1}.{SUFFIXES[kind]}"
        files[path] = content
        yield _figure(f"{path.parent.name}/{path.name}", cell)


def _figure(link: str, cell: Executed) -> str:
    alt = " ".join(cell.alt.split())
    return code_block(f":alt: {alt}\n\n{cell.caption}".rstrip(), f"{{figure}} {link}")


def _printed(output: Output) -> str:
    table = output.data.get("text/html")
    if isinstance(table, str):
        return f'<div class="pst-scrollable-table-container">\n{without_style(table)}\n</div>'
    return code_block(str(output.data["text/plain"]).rstrip(), "text")


def without_style(html: str) -> str:
    """Return a table of pandas' without style sheet, borders, and blank lines, which would end a block of Markdown."""
    plain = re.sub(r"<style\b.*?</style>", "", html, flags=re.DOTALL).replace(' border="1"', "")
    return "\n".join(line for line in plain.splitlines() if line.strip())
