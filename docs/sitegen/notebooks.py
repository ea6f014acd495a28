"""Notebooks as the pages of the site: what is said around a run, and the picture that stands for it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

THUMBNAIL = (480, 360)  # pixels, twice what a card is wide
PREFERRED = ("posterior", "latent", "data")  # words in the heading above the picture that stands for a page


class Shown(NamedTuple):
    """A picture of a notebook: the heading that it stands under, its alternative text, and its PNG."""

    heading: str
    alt: str
    content: bytes


def read(path: Path) -> dict[str, Any]:
    """Return a notebook."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def with_text(document: dict[str, Any], position: int, text: str) -> dict[str, Any]:
    """Return the notebook with a cell of Markdown more, before the cell at ``position``."""
    cells = list(document["cells"])
    cell = {"id": f"docs-{position}-{len(cells)}", "cell_type": "markdown", "metadata": {}, "source": text}
    return {**document, "cells": [*cells[:position], cell, *cells[position:]]}


def text_of(document: dict[str, Any]) -> str:
    """Return the notebook as it is written to a file."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def picture_of(document: dict[str, Any]) -> Shown | None:
    """Return the picture that stands for a page: of the posterior, else of the latents, else of the data."""
    found = list(_pictures(document))
    for word in PREFERRED:
        for shown in found:
            if word in shown.heading.lower():
                return shown
    return found[0] if found else None


def _pictures(document: dict[str, Any]) -> Iterator[Shown]:
    heading = ""
    for cell in document["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = next((line for line in source.splitlines() if line.startswith("## ")), heading)
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                yield Shown(heading, _alt(cell, heading), base64.b64decode("".join(picture)))


def _alt(cell: dict[str, Any], heading: str) -> str:
    settings: dict[str, Any] = cell["metadata"].get("mystnb", {})
    return str(settings.get("image", {}).get("alt") or heading.removeprefix("## "))


def thumbnail(content: bytes) -> bytes:
    """Return a PNG that fits a card: scaled down, on white of one size, so that cards stand in rows."""
    with Image.open(io.BytesIO(content)) as picture:
        small = picture.convert("RGB")
    small.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    paper = Image.new("RGB", THUMBNAIL, "white")
    paper.paste(small, tuple((whole - part) // 2 for whole, part in zip(THUMBNAIL, small.size, strict=True)))
    written = io.BytesIO()
    paper.save(written, format="PNG", optimize=True)
    return written.getvalue()


def markdown_cells(document: dict[str, Any]) -> Sequence[str]:
    """Return the sources of the Markdown cells."""
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "markdown"]
