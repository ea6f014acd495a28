"""Small pieces of Markdown that several kinds of pages share."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Any

import pandas as pd

from elbozoo.pages import code_block, markdown_table


def page(*blocks: str) -> str:
    """Join the blocks that are not empty to a page."""
    return "\n\n".join(block for block in blocks if block) + "\n"


def names(words: Iterable[str]) -> str:
    """Return names as code, with commas between."""
    return ", ".join(f"`{word}`" for word in words)


def links(words: Iterable[str], folder: str) -> str:
    """Return names as code, each a link to its page in ``folder``, with commas between."""
    return ", ".join(f"[`{word}`]({folder}/{word}.ipynb)" for word in words)


def prose(documented: Any) -> list[str]:
    """Return the paragraphs of a docstring up to its first section, in Markdown."""
    text, *_ = re.split(r"\n\n[^\n]+\n-{3,}\n", inspect.getdoc(documented) or "", maxsplit=1)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return [paragraph.strip() for paragraph in text.split("\n\n")]


def first_paragraph(documented: Any) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join(prose(documented)[0].split())


def source_of(function: Any) -> str:
    """Return a function's source as a code block."""
    return code_block(textwrap.dedent(inspect.getsource(function)).strip(), "python")


def frame_table(frame: pd.DataFrame, columns: Iterable[str]) -> str:
    """Return columns of a table, its index among them, as Markdown."""
    plain = frame.reset_index()[list(columns)]
    return markdown_table(plain.columns, plain.to_numpy().tolist())


def toctree(pages: Iterable[str], caption: str = "") -> str:
    """Return a table of contents that only the navigation shows."""
    options = [f":caption: {caption}"] if caption else []
    return "\n".join(["```{toctree}", ":hidden:", *options, "", *pages, "```"])


def definitions(facts: dict[str, str]) -> str:
    """Return a definition list."""
    return "\n\n".join(f"{fact}\n: {value}" for fact, value in facts.items() if value)
