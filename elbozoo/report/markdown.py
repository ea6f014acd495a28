"""The report as Markdown for a README: words, a table as GitHub sets it, pictures beside the page, the command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from elbozoo import plots
from elbozoo.inference.comparison import Comparison
from elbozoo.report import captions
from elbozoo.report.images import decoded_images
from elbozoo.report.settings import reproduction
from elbozoo.report.tables import Cell, Table, heldout_table, summary_table
from elbozoo.report.words import headline, subtitle

# What Markdown, or the HTML in it, would read as more than text.
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


class Still(NamedTuple):
    """A picture with its file's name and what it shows."""

    name: str
    png: bytes
    alt: str


def stills(comparison: Comparison) -> Iterator[Still]:
    """Yield the pictures of the report."""
    alts = {
        "curves": captions.curves_alt(comparison),
        "ledger": captions.ledger_alt(comparison),
        "latent_space": "The mean of q for every row in the two-dimensional latent space, a panel for each method.",
    }
    for name, figure in plots.figures(comparison).items():
        yield Still(f"{name}.png", plots.png(figure), alts[name])
    for position, decoded in enumerate(decoded_images(comparison)):
        yield Still(f"images-{position}.png", decoded.png, decoded.title)


def markdown(comparison: Comparison, pictures: list[tuple[str, str]]) -> str:
    """Return the report of ``comparison`` as Markdown.

    Parameters
    ----------
    comparison : Comparison
        What was compared.
    pictures : list of (str, str)
        Path and alternative text of each picture.
    """
    words, code = reproduction(comparison)
    language = "python" if code.startswith("import") else "sh"
    heldout = heldout_table(comparison)
    parts = [
        f"# {plain(comparison.model)} on {plain(str(comparison.data['name']))}",
        plain(subtitle(comparison)),
        "\n".join(f"- {plain(sentence)}" for sentence in headline(comparison)),
        table(summary_table(comparison)),
        *(["## Held-out rows", table(heldout)] if heldout else []),
        *(plain(str(failure)) for failure in comparison.failures),
        *(f"![{plain(alt)}]({quote(path)})" for path, alt in pictures),
        "## To reproduce",
        *map(plain, words),
        fenced(code, language),
    ]
    return "\n\n".join(parts) + "\n"


def table(found: Table) -> str:
    """Return a table as GitHub sets it, with its caption."""
    head = [plain(name) for name in found.head]
    rule = ["---" if name in found.texts else "---:" for name in found.head]
    rows = [head, rule, *([_cell(cell) for cell in row] for row in found.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{plain(found.caption)}"


def plain(text: str) -> str:
    """Return ``text`` in one line, as text that Markdown reads nothing into."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def fenced(code: str, language: str) -> str:
    """Return a code block whose fence is longer than any in ``code``."""
    longest = max((len(found) for found in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _cell(cell: Cell) -> str:
    return plain(cell.text) + (f"<br><sub>{plain(cell.small)}</sub>" if cell.small else "")


def folder_of(page: Path) -> Path:
    """Return the folder of the pictures of ``page``."""
    return page.with_name(f"{page.stem}_files")
