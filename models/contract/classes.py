"""A column of a table that holds the class of each row, as codes 0, 1, 2, ..., beside columns that are explained."""

from __future__ import annotations

import torch
from torch import Tensor

from elbozoo.models.contract.errors import InvalidInput


def beside(position: int, columns: int) -> list[int]:
    """Return the positions of the columns beside the one of classes, which may be counted from the end."""
    return [column for column in range(columns) if column != position % columns]


def unit_vectors(codes: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return a one at the place of each of the ``codes`` (...) among zeros, (..., classes)."""
    # PyTorch's own one_hot looks at the values of the codes, which no captured graph may.
    return (codes[..., None] == torch.arange(classes, device=codes.device)).to(dtype)


def count_classes(codes: Tensor) -> int:
    """Return the largest of the ``codes`` (N,) and one more, at most N whatever is there."""
    largest = codes.max()
    return max(1, int(largest) + 1) if largest.isfinite() and largest < len(codes) else len(codes)


def refuse_classes(
    x: Tensor, position: int, option: str, classes: int, latent_dim: int, *, blank: int | None = None
) -> None:
    """Refuse codes that are no class, and more latent dimensions than the rows or the columns beside them allow.

    Parameters
    ----------
    x : Tensor (N, D)
        The table.
    position : int
        Position of the column of classes.
    option : str
        Name of the option that names it.
    classes : int
        Number of classes.
    latent_dim : int
        Number of latent dimensions.
    blank : int, optional
        Code of a row without a class, where there may be some.

    Raises
    ------
    InvalidInput
        With what was found, what was expected and what to do.
    """
    rows, columns = x.shape
    if columns < 2:
        raise InvalidInput(f"found no column beside the {option}, expected at least one to explain: add columns")
    codes = x[:, position]
    least = 0 if blank is None else blank
    wrong = codes[(codes != codes.floor()) | (codes < least) | (codes >= classes)]
    if len(wrong):
        none = "" if blank is None else f", or {blank} for none"
        raise InvalidInput(
            f"option {option}: found {wrong[0].item():g} in column {position % columns + 1} (counted from 1), expected "
            f"classes as whole numbers from 0 to {classes - 1}{none}; name the column, as in "
            f"--set {option}=COLUMN, to have its labels numbered"
        )
    most = min(rows - 1, columns - 1)
    if latent_dim > most:
        raise InvalidInput(
            f"option latent_dim: found {latent_dim} for {rows} rows x {columns - 1} columns beside the {option}, "
            f"expected at most {most}: data of fewer columns or rows fill no more dimensions"
        )
