"""What an entry says about itself, as Markdown: the parts of its page, and a table of its options."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from elbozoo.models.contract.options import Options


class PageParts(NamedTuple):
    """An entry's page, taken apart: first line, what follows, what goes wrong, references; Markdown, may be empty."""

    title: str
    story: str
    failures: str
    references: str


def page_parts(page: str) -> PageParts:
    """Take the docstring of an entry's file apart."""
    title, _, rest = page.partition("\n")
    body, *references = re.split(r"^References\n-+\n", rest, maxsplit=1, flags=re.MULTILINE)
    story, *failures = re.split(r"^What goes wrong:\s*", body, maxsplit=1, flags=re.MULTILINE)
    sentence = re.sub(r"^\**[a-z]", lambda start: start[0].upper(), "".join(failures))
    return PageParts(*[text.strip() for text in (title.rstrip("."), story, sentence, "".join(references))])


def options_table(options: type[Options]) -> str:
    """Return the options as a Markdown table; empty if there are none."""
    rows = [
        (f"`{o['option']}`", o["type"], "none" if o["default"] is None else o["default"], o["bounds"], o["description"])
        for o in options.describe()
    ]
    return markdown_table(["option", "type", "default", "bounds", "meaning"], rows)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table, its bars inside cells escaped; empty if there are no rows."""
    lines = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    if not lines:
        return ""
    names = list(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *lines])


def code_block(source: str, language: str) -> str:
    """Return ``source`` as a Markdown code block, between fences longer than any inside."""
    longest = max(map(len, re.findall(r"`{3,}", source)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{source}\n{fence}"
