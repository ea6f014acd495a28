"""References as a reader wants them, made from BibTeX."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from elbozoo.models.contract.errors import InvalidInput

ACCENTS = {
    "`": "\u0300",
    "'": "\u0301",
    "^": "\u0302",
    "~": "\u0303",
    '"': "\u0308",
    "c": "\u0327",
    "v": "\u030c",
    "r": "\u030a",
    "H": "\u030b",
    "=": "\u0304",
    "u": "\u0306",
}
LETTERS = {r"\ss": "ß", r"\o": "ø", r"\O": "Ø", r"\l": "ł", r"\L": "Ł", r"\ae": "æ", r"\aa": "å", r"\i": "ı"}
NAMED_AUTHORS = 6
OTHERS = "others"


def reference_lines(bibtex: str) -> list[str]:
    """Return a line of Markdown for each entry: authors, year, title, where it appeared.

    Raises
    ------
    InvalidInput
        For an entry without author, title or year.
    """
    return [_line(key, fields) for key, fields in _entries(bibtex)]


def _line(key: str, fields: dict[str, str]) -> str:
    for needed in ("author", "title", "year"):
        if not fields.get(needed):
            raise InvalidInput(f"reference {key}: found no {needed}, expected one; add it to the BibTeX")
    parts = [f"{_authors(fields['author'])} ({fields['year']}). {_ended(fields['title'])}"]
    where = _where(fields)
    if where:
        parts.append(_ended(where))
    if fields.get("doi"):
        parts.append(f"[doi:{fields['doi']}](https://doi.org/{fields['doi']})")
    return " ".join(parts)


def _where(fields: dict[str, str]) -> str:
    """Journal with volume and pages, book, or publisher."""
    venue = fields.get("journal") or fields.get("booktitle")
    parts = [f"*{venue}*"] if venue else []
    if fields.get("edition"):
        parts.append(f"Edition {fields['edition']}")
    if fields.get("volume"):
        number = f"({fields['number']})" if fields.get("number") else ""
        parts.append(f"{fields['volume']}{number}")
    if fields.get("pages"):
        parts.append(fields["pages"])
    publisher = fields.get("publisher") or fields.get("school") or fields.get("institution")
    if publisher and not fields.get("journal"):
        parts.append(publisher)
    if fields.get("eprint"):
        parts.append(f"arXiv:{fields['eprint']}")
    return ", ".join(parts)


def _authors(names: str) -> str:
    people = [_person(name) for name in re.split(r"\s+and\s+", names)]
    if len(people) > NAMED_AUTHORS or people[-1] == OTHERS:
        return f"{people[0]} et al."
    return people[0] if len(people) == 1 else f"{', '.join(people[:-1])} and {people[-1]}"


def _person(name: str) -> str:
    if name == OTHERS:
        return name
    family, comma, given = name.partition(",")
    if not comma:
        *first, family = name.split()
        given = " ".join(first)
    initials = " ".join("-".join(f"{part[0]}." for part in word.split("-") if part) for word in given.split())
    return f"{family.strip()}, {initials}" if initials else family.strip()


def _ended(text: str) -> str:
    return text if text.endswith((".", "?", "!", "?*", "!*")) else f"{text}."


def _entries(bibtex: str) -> Iterator[tuple[str, dict[str, str]]]:
    for start in re.finditer(r"@(\w+)\s*\{\s*([^,\s]+)\s*,", bibtex):
        body = _braced(bibtex, start.start(0) + start.group(0).index("{"))
        yield start.group(2), dict(_fields(body.partition(",")[2]))


def _fields(body: str) -> Iterator[tuple[str, str]]:
    position = 0
    while found := re.compile(r"\s*,?\s*(\w+)\s*=\s*").match(body, position):
        rest = found.end()
        if body[rest : rest + 1] == "{":
            value = _braced(body, rest)
            position = rest + len(value) + 2
        elif body[rest : rest + 1] == '"':
            value = body[rest + 1 : body.index('"', rest + 1)]
            position = rest + len(value) + 2
        else:
            value = re.compile(r"[^,}\s]*").match(body, rest).group()  # type: ignore[union-attr]
            position = rest + len(value)
        yield found.group(1).lower(), _plain(value)


def _braced(text: str, start: int) -> str:
    """Return what stands between the brace at ``start`` and its partner."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0) if text[position - 1 : position] != "\\" else 0
        if depth == 0:
            return text[start + 1 : position]
    raise InvalidInput(f"found a reference that does not end: {text[start : start + 40]!r}; close its braces")


def _plain(value: str) -> str:
    """Return a value of BibTeX as text: accents as letters, without the braces that keep capitals."""
    accents = "".join(re.escape(mark) for mark in ACCENTS if not mark.isalpha())
    value = re.sub(
        rf"\\([{accents}])\s*\{{?(\\?[A-Za-z])\}}?", lambda m: m.group(2).lstrip("\\") + ACCENTS[m.group(1)], value
    )
    value = re.sub(r"\\([cvrHu])\s*\{(\w)\}", lambda m: m.group(2) + ACCENTS[m.group(1)], value)
    for command, letter in LETTERS.items():
        value = re.sub(rf"{re.escape(command)}(?![A-Za-z])\s*", letter, value)
    value = value.replace(r"\&", "&").replace("---", "—").replace("--", "–")
    return " ".join(unicodedata.normalize("NFC", value.replace("{", "").replace("}", "").replace("~", " ")).split())
