"""Pieces of HTML: whatever text they are given stays text."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from elbozoo.report.tables import Cell, Table


def section(title: str, *contents: str) -> str:
    """Return a part of the page under a heading; nothing where it is empty."""
    content = "\n".join(filter(None, contents))
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def scrolling(content: str, label: str) -> str:
    """Return a box of its own for what may be wider than a phone."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>'


def items(texts: Iterable[str], kind: str = "") -> str:
    """Return a list."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<ul{attribute}>\n" + "\n".join(f"<li>{escape(text)}</li>" for text in texts) + "\n</ul>"


def paragraphs(texts: Iterable[str]) -> str:
    """Return a paragraph for each text."""
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)


def definitions(terms: Mapping[str, str]) -> str:
    """Return terms with what they mean."""
    return "<dl>\n" + "\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in terms.items()) + "\n</dl>"


def pairs(values: Mapping[str, str]) -> str:
    """Return a table of names and values."""
    lines = "\n".join(
        f'<tr><th scope="row">{escape(k)}</th><td class="wrap">{escape(v)}</td></tr>' for k, v in values.items()
    )
    return scrolling(f"<table><tbody>\n{lines}\n</tbody></table>", "Table")


def sortable(table: Table) -> str:
    """Return a table that sorts by a click on a column's name, or by Enter there; cells without a figure come last."""
    texts = [name in table.texts for name in table.head]
    head = "".join(
        f'<th scope="col"{_class(text)}>{escape(name)}</th>' for name, text in zip(table.head, texts, strict=True)
    )
    lines = "\n".join(f"<tr>{_row(row, texts)}</tr>" for row in table.rows)
    shown = (
        f'<table id="{escape(table.name)}" class="sortable"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table>"
    )
    # The caption stands outside the box, so that it does not scroll away with a wide table.
    caption = f'<p class="faint"><small>{escape(table.caption)}</small></p>'
    return f"{scrolling(shown, 'Table, scrolls sideways')}\n{caption}"


def chart(name: str, panels: Iterable[Any], alt: str, caption: str, instead: str) -> str:
    """Return a figure of interactive charts.

    Parameters
    ----------
    name : str
        Identifies the figure on the page.
    panels : iterable
        What the script finds each chart by, see :func:`data`.
    alt : str
        What the charts show, for who cannot see them.
    caption : str
        What to know to read them.
    instead : str
        HTML that stands there where scripts do not run.
    """
    boxes = "".join(
        f'<div class="chart" role="img" aria-label="{escape(alt)}" data-chart="{escape(str(panel))}"></div>'
        for panel in panels
    )
    return (
        f'<figure id="{escape(name)}"><div class="panels">{boxes}</div><noscript>{instead}</noscript>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def picture(png: bytes, alt: str, caption: str, width: str) -> str:
    """Return a figure of one picture, which is never wider than ``width`` or its box."""
    return f"<figure>{image(png, alt, f'max-width: {width}')}<figcaption>{escape(caption)}</figcaption></figure>"


def image(png: bytes, alt: str, style: str = "") -> str:
    """Return a picture that the page holds itself."""
    content = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(alt)}" style="{escape(style)}" src="data:image/png;base64,{content}">'


def data(name: str, value: Any) -> str:
    """Return ``value`` as data that scripts of the page read; no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def policy(scripts: Iterable[str]) -> str:
    """Return a content security policy under which these scripts run, and no other, and nothing is loaded."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") for script in scripts)
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _class(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _row(cells: list[Cell], texts: list[bool]) -> str:
    first, *others = zip(cells, texts, strict=True)
    head = f'<th scope="row" data-sort="{_order(first[0])}">{_content(first[0])}</th>'
    rest = (f'<td{_class(text)} data-sort="{_order(cell)}">{_content(cell)}</td>' for cell, text in others)
    return head + "".join(rest)


def _content(cell: Cell) -> str:
    return escape(cell.text) + (f"<small>{escape(cell.small)}</small>" if cell.small else "")


def _order(cell: Cell) -> str:
    return "" if cell.order is None else escape(str(cell.order))
