"""Words that several parts of the front door use; those about data fit on one line, however odd what they show."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from decimal import Decimal

import numpy as np

from elbozoo.models.contract.errors import InvalidInput

NOT_A_BOUND = "not a bound"  # in place of the ELBO of a q without a density


def count(number: int, noun: str) -> str:
    """Return ``number`` with ``noun`` in the singular or plural."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def flat(value: object) -> str:
    """Return ``value`` as text on one line, without spaces about it."""
    return " ".join(str(value).split())


def short(text: str, length: int) -> str:
    """Return ``text`` cut to ``length`` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def shown(cell: object) -> str:
    """Return a cell of a table as messages show it."""
    return short(flat(repr(cell)), 40)


def as_number(cell: object) -> float:
    """Return the number that a cell of a table holds or spells, NaN where it is none."""
    if not isinstance(cell, str | numbers.Real | np.bool_ | Decimal):
        return math.nan
    try:
        # float() reads Python's 1_000, which is no number to anybody else.
        return math.nan if isinstance(cell, str) and "_" in cell else float(cell)
    except OverflowError:
        return math.inf
    except ValueError:
        return math.nan


def refuse_duplicates(where: str, names: list[str]) -> None:
    """Refuse two columns of one name.

    Raises
    ------
    InvalidInput
        With the first such name.
    """
    duplicates = [name for name, times in Counter(names).items() if times > 1]
    if duplicates:
        raise InvalidInput(
            f"{where}: found the column name {duplicates[0]!r} twice; expected different names; rename one"
        )
