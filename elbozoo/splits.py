"""Splits: which rows are fitted to, which say when to stop, and which nothing has seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from elbozoo.models.contract.errors import InvalidInput
from elbozoo.words import count, shown

LEAST_ROWS = 2


def partition(
    rows: int, shares: Mapping[str, float], seed: int, *, where: str, unit: str = "row", units: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the positions, in order, of the rows of each part, and under ``train`` those of the rest.

    Parameters
    ----------
    rows : int
        Number of rows.
    shares : mapping of float
        Share of the units in each part, at least 0 and together below 1; each number is rounded to the nearest.
    seed : int
        Seed of the permutation that is cut.
    where, unit : str
        Names of the data and of one unit, for messages.
    units : Tensor (rows,), optional
        What each row belongs to; rows of one unit stay together. By default each row is one of its own.

    Raises
    ------
    InvalidInput
        For shares that are none, or that leave a part without rows.
    """
    for part, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise InvalidInput(
                f"{where}: found {part}={shown(share)}; expected a share from 0 to below 1; change {part}"
            )
    given = " and ".join(f"{part}={share:g}" for part, share in shares.items())
    if sum(shares.values()) >= 1:
        raise InvalidInput(f"{where}: found {given}; expected shares that leave rows to fit to; lower them")
    which = torch.arange(rows) if units is None else torch.unique(units, return_inverse=True)[1]
    total = int(which.max()) + 1
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    parts, start = {}, 0
    for part, share in shares.items():
        stop = start + round(share * total)
        parts[part] = _rows_of(which, order[start:stop])
        start = stop
    parts["train"] = _rows_of(which, order[start:])
    for part, found in parts.items():
        if len(found) < LEAST_ROWS and (part == "train" or shares[part] > 0):
            units_found = "" if unit == "row" else f" of {count(total, unit)}"
            raise InvalidInput(
                f"{where}: found {count(len(found), 'row')}{units_found} for {part} with {given} of {rows} rows; "
                f"expected at least {LEAST_ROWS}; change the shares, or bring more data"
            )
    return parts


def _rows_of(which: Tensor, chosen: Tensor) -> Tensor:
    return torch.isin(which, chosen).nonzero().flatten()
