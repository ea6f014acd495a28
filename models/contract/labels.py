"""Labels of rows: how a cell of a column of labels is spelled, and which code it has in a fit."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elbozoo.models.contract.errors import InvalidInput

UNLABELLED = "-1"  # how a label that is missing is written in scikit-learn
WHOLE = re.compile(r"(-?\d+)\.0+")  # a whole number as pandas writes it in a column with empty cells


def spelled(value: Any) -> str:
    """Return a label as text: cells of different types, such as 1, 1.0 and "1", may spell the same one."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and value != value:
        return ""
    text = " ".join(str(int(value) if is_number and value == value // 1 else value).split())
    whole = WHOLE.fullmatch(text)
    return whole.group(1) if whole else text


def codes_among(labels: Iterable[Any], levels: Sequence[str], name: str, *, may_be_blank: bool) -> npt.NDArray[Any]:
    """Return the positions of ``labels`` among ``levels``, the labels of a fit in the order of its codes.

    Parameters
    ----------
    labels : iterable
        Cells of the column.
    levels : sequence of str
        What the codes 0, 1, 2, ... stand for.
    name : str
        Name of the column.
    may_be_blank : bool
        Whether a row may have no label; its code is NaN.

    Raises
    ------
    InvalidInput
        For a label that the fit does not know.
    """
    codes: dict[str, float] = {level: float(code) for code, level in enumerate(levels)}
    if may_be_blank:
        codes |= {"": np.nan, UNLABELLED: np.nan}
    found = [spelled(label) if label is not None else "" for label in labels]
    for row, label in enumerate(found):
        if label not in codes:
            known = ", ".join(levels[:8]) + (", ..." if len(levels) > 8 else "")
            raise InvalidInput(
                f"found the label {label!r} in column {name!r}, row {row + 1}, expected one of those of the fit: "
                f"{known}; fit again with rows of all labels, or leave those rows out"
            )
    return np.array([codes[label] for label in found])
