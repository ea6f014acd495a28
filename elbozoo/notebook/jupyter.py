"""A page as a Jupyter notebook with its outputs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elbozoo.notebook.cells import Executed, Output

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook_files(cells: list[Executed], page: Path) -> dict[Path, bytes]:
    """Return the file that is the notebook, with its content."""
    document = {
        "cells": [made for position, cell in enumerate(cells, start=1) for made in _cells(cell, position)],
        "metadata": {"kernelspec": KERNEL, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return {page: (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()}


def _cells(cell: Executed, position: int) -> Iterator[dict[str, Any]]:
    if cell.outputs is None:
        yield _markdown(f"cell-{position}", cell.source)
        return
    yield {
        "cell_type": "code",
        "id": f"cell-{position}",
        # Where MyST-NB shows the notebook, this is what describes its pictures.
        "metadata": {"mystnb": {"image": {"alt": cell.alt}}} if cell.alt else {},
        "source": cell.source,
        "execution_count": position,
        "outputs": [_output(output, position, cell.alt) for output in cell.outputs],
    }
    if cell.caption:
        yield _markdown(f"caption-{position}", cell.caption)


def _markdown(identifier: str, source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": identifier, "metadata": {}, "source": source}


def _output(output: Output, position: int, alt: str) -> dict[str, Any]:
    if output.kind == "stream":
        return {"output_type": "stream", "name": "stdout", "text": output.data["text/plain"]}
    data = {kind: base64.b64encode(v).decode() if isinstance(v, bytes) else v for kind, v in output.data.items()}
    described = {} if output.picture is None or not alt else {output.picture[0]: {"alt": alt}}
    counted = {"execution_count": position} if output.kind == "execute_result" else {}
    return {"output_type": output.kind, "data": data, "metadata": described, **counted}
