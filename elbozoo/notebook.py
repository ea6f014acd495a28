"""Executable pages: a list of cells, run once in order, written as MyST Markdown or as a Jupyter notebook."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from elbozoo.inference.storage import writable_directory
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.pages import code_block

DPI = 110
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
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


@dataclass(frozen=True)
class Text:
    """Markdown, or a function that makes it from the names that the code before it has defined."""

    source: str | Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Code:
    """Python source, with an alternative text for the picture that it draws."""

    source: str
    alt: str = ""


class Output(NamedTuple):
    """What a code cell gave: its kind, and its content by MIME type as in the notebook format."""

    kind: Literal["stream", "execute_result", "display_data"]
    data: dict[str, str | bytes]


class Executed(NamedTuple):
    """A cell as it stands on the page; ``outputs`` is None for text."""

    source: str
    outputs: list[Output] | None = None
    alt: str = ""


def check_destination(page: Path) -> None:
    """Refuse a page that cannot be written, before the work starts.

    Raises
    ------
    InvalidInput
        For a suffix other than .md and .ipynb, a directory, or a folder that cannot be written to.
    """
    if page.suffix not in _WRITERS:
        raise InvalidInput(f"page {page}: found the suffix {page.suffix!r}, expected {' or '.join(_WRITERS)}")
    if page.is_dir():
        raise InvalidInput(f"page {page}: found a directory, expected the path of a file; add a file name")
    writable_directory(page.parent)
    if page.suffix == ".md" and os.path.lexists(_pictures(page)):
        writable_directory(_pictures(page))


def execute(cells: Iterable[Text | Code]) -> list[Executed]:
    """Run the code of ``cells`` in one namespace and write the texts that depend on it.

    Random state, matplotlib's settings and Pyro's parameter store are afterwards as they were before.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with isolated(0), matplotlib.rc_context(), plt.ioff(), pd.option_context("display.width", 100):
        return [_executed(cell, namespace) for cell in cells]


def write_page(cells: list[Executed], page: Path) -> Path:
    """Write the executed ``cells`` to ``page``, in the format that its suffix names, and return it."""
    _WRITERS[page.suffix](cells, page)
    return page


def _executed(cell: Text | Code, namespace: dict[str, Any]) -> Executed:
    if isinstance(cell, Code):
        return Executed(cell.source.strip(), _run(cell.source, namespace), cell.alt)
    source = cell.source if isinstance(cell.source, str) else cell.source(namespace)
    return Executed(source.strip())


def _run(source: str, namespace: dict[str, Any]) -> list[Output]:
    """Execute ``source`` as a notebook would: what it prints, the value of a last expression, the figures it opened."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    opened_before = set(plt.get_fignums())
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "<page>", "exec"), namespace)
        value = eval(compile(last, "<page>", "eval"), namespace) if last else None
    outputs = [Output("stream", {"text/plain": printed.getvalue()})] if printed.getvalue() else []
    if value is not None:
        outputs.append(Output("execute_result", _representations(value)))
    for number in sorted(set(plt.get_fignums()) - opened_before):
        outputs.append(Output("display_data", _representations(plt.figure(number))))
        plt.close(number)
    return outputs


def _representations(value: Any) -> dict[str, str | bytes]:
    found: dict[str, str | bytes] = {"text/plain": repr(value)}
    if isinstance(value, Figure):
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
        found["image/png"] = picture.getvalue()
    elif hasattr(value, "_repr_html_"):
        found["text/html"] = value._repr_html_()
    return found


# ---- MyST Markdown ---------------------------------------------------------------------------------------------------


def _write_markdown(cells: list[Executed], page: Path) -> None:
    pictures: dict[str, bytes] = {}
    blocks = [block for cell in cells for block in _markdown_blocks(cell, page, pictures)]
    if pictures:
        folder = writable_directory(_pictures(page))
        for name, picture in pictures.items():
            _replace(folder / name, picture)
    _replace(page, (FRONT_MATTER + "\n" + "\n\n".join(blocks) + "\n").encode())


def _markdown_blocks(cell: Executed, page: Path, pictures: dict[str, bytes]) -> Iterable[str]:
    if cell.outputs is None:
        yield cell.source
        return
    # The page shows the outputs of its own run; a build that executes it again must not show them twice.
    tags = ":tags: [remove-output]\n\n" if cell.outputs else ""
    yield code_block(tags + cell.source, "{code-cell} ipython3")
    for output in cell.outputs:
        picture = output.data.get("image/png")
        if isinstance(picture, bytes):
            name = f"figure-{len(pictures) + 1}.png"
            pictures[name] = picture
            yield f"![{cell.alt}]({_pictures(page).name}/{name})"
        else:
            yield code_block(str(output.data["text/plain"]).rstrip(), "text")


def _pictures(page: Path) -> Path:
    # Not every reader of Markdown turns the %20 of a link back into the space of a file's name.
    return page.with_name(f"{quote(page.stem).replace('%', '-')}_files")


# ---- Jupyter ---------------------------------------------------------------------------------------------------------


def _write_notebook(cells: list[Executed], page: Path) -> None:
    document = {
        "cells": [_notebook_cell(cell, position) for position, cell in enumerate(cells, start=1)],
        "metadata": {"kernelspec": KERNEL, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    _replace(page, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _notebook_cell(cell: Executed, position: int) -> dict[str, Any]:
    common = {"id": f"cell-{position}", "metadata": {}, "source": cell.source}
    if cell.outputs is None:
        return {"cell_type": "markdown", **common}
    outputs = [_notebook_output(output, position) for output in cell.outputs]
    return {"cell_type": "code", **common, "execution_count": position, "outputs": outputs}


def _notebook_output(output: Output, position: int) -> dict[str, Any]:
    if output.kind == "stream":
        return {"output_type": "stream", "name": "stdout", "text": output.data["text/plain"]}
    data = {kind: base64.b64encode(v).decode() if isinstance(v, bytes) else v for kind, v in output.data.items()}
    counted = {"execution_count": position} if output.kind == "execute_result" else {}
    return {"output_type": output.kind, "data": data, "metadata": {}, **counted}


_WRITERS: dict[str, Callable[[list[Executed], Path], None]] = {".md": _write_markdown, ".ipynb": _write_notebook}


def _replace(path: Path, content: bytes) -> None:
    """Write the whole of ``content``, or leave ``path`` as it was."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}; choose a path that can be written to") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
