"""A table of numbers that can be fitted, parts of it, and the codes of its columns of labels."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from elbozoo.binarisation import binarise as make_binary
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.labels import UNLABELLED, spelled
from elbozoo.splits import partition
from elbozoo.words import count, flat, refuse_duplicates, shown

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Columns = Sequence[str] | str | None
Keys = Sequence[str | int] | str | int

POSITION = re.compile(r"-?\d+")
FIRST_KEY = "auto"
LEAVE_OUT = "pick the other columns with columns=[...] or --columns"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A table of numbers that can be fitted: at least two rows, float64, every column named, finite.

    Attributes
    ----------
    name : str
        Name of the data set, or of the file or kind of object it came from.
    x : Tensor (N, D) of float64
        The rows, in the units that ``description`` gives. Columns in ``levels`` hold codes of labels.
    columns : list of str
        Names of the D columns, all different.
    labels : Tensor (N,) of int64, or None
        Class of each row where it is known. No model sees it; it only colours pictures.
    description : str
        What the rows are, their units, and what was done to them or left out.
    image_shape : (int, int), (int, int, int) or None
        Height and width, or channels, height and width, where a row is an image; their product is D.
    levels : dict of list of str
        For each column of labels, such as the names of sequences or groups, what its codes 0, 1, 2, ... stand for.
    missing : bool
        Whether NaN may stand in ``x`` for a value that was not observed. No column is missing throughout.
    factors : Tensor (N, F) of int64, or None
        Values, counted from 0, of the factors that made each row, where they are known. No model sees them;
        they are what :meth:`Fit.disentanglement` compares codes with.
    factor_names : tuple of str
        Names of the F factors.
    top : float or None
        Largest value that a cell can take, where that is known, such as 255 for images of bytes.
    intensities : Tensor (N, D) of float64, or None
        Where training draws binary pixels anew at each step: the probability of a 1, and NaN in columns that are no
        pixels. ``x`` then holds one such draw, which everything is evaluated on.
    arguments : dict
        What :func:`load_data` was told beside the source to make these rows, by name.

    Raises
    ------
    InvalidInput
        If ``x``, ``columns``, ``labels``, ``levels``, ``factors`` or ``intensities`` are not as described.
    """

    name: str
    x: Tensor
    columns: list[str]
    labels: Tensor | None = None
    description: str = ""
    image_shape: tuple[int, int] | tuple[int, int, int] | None = None
    levels: dict[str, list[str]] = field(default_factory=dict)
    missing: bool = False
    factors: Tensor | None = None
    factor_names: tuple[str, ...] = ()
    top: float | None = None
    intensities: Tensor | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        if self.x.ndim != 2 or self.x.dtype != torch.float64:
            found = f"x of shape {tuple(self.x.shape)} and {self.x.dtype}"
            raise InvalidInput(f"{self.name}: found {found}; expected (N, D) and torch.float64; use load_data(x)")
        if self.rows < 2:
            raise InvalidInput(f"{self.name}: found {count(self.rows, 'row')}; expected at least 2; bring more data")
        if self.width == 0:
            raise InvalidInput(f"{self.name}: found no column; expected at least 1; bring data with numeric columns")
        refuse_duplicates(self.name, self.columns)
        for what, length, expected in self._lengths():
            if length != expected:
                raise InvalidInput(f"{self.name}: found {length} {what}; expected {expected}, to agree with x")
        self._refuse_wrong_codes()
        self._refuse_non_finite()
        self._refuse_wrong_intensities()

    @property
    def rows(self) -> int:
        """Number of rows N."""
        return self.x.shape[0]

    @property
    def width(self) -> int:
        """Number of columns D."""
        return self.x.shape[1]

    def _lengths(self) -> list[tuple[str, int, int]]:
        lengths = [("column names", len(self.columns), self.width)]
        if self.labels is not None:
            lengths.append(("labels", len(self.labels), self.rows))
        if self.factors is not None:
            lengths.append(("rows of factors", len(self.factors), self.rows))
            lengths.append(("factor names", len(self.factor_names), self.factors[:1].numel()))
        if self.image_shape is not None:
            lengths.append(("pixels in image_shape", math.prod(self.image_shape), self.width))
        return lengths

    def _refuse_wrong_codes(self) -> None:
        for name, levels in self.levels.items():
            if name not in self.columns:
                raise unknown_name(f"column in levels of {self.name}", name, self.columns)
            codes = self.x[:, self.columns.index(name)]
            codes = codes[~codes.isnan()]  # of rows without a label, where values may be missing
            bad = codes[~torch.isin(codes, torch.arange(len(levels), dtype=codes.dtype))]
            if len(bad):
                found = f"{bad[0]:g} in column {name!r}"
                raise InvalidInput(
                    f"{self.name}: found {found}; expected codes from 0 to {len(levels) - 1}, one for each of its "
                    "levels; use load_data(..., keys=[...])"
                )
        if len(self.levels) == self.width:
            keys = ", ".join(map(repr, self.levels))
            raise InvalidInput(
                f"{self.name}: found no column of numbers beside the labels in {keys}; expected at least 1; "
                "pick more columns"
            )

    def _refuse_non_finite(self) -> None:
        bad = (self.x.isinf() if self.missing else ~self.x.isfinite()).nonzero().tolist()
        if bad:
            row, column = bad[0]
            what = "infinite value" if self.missing else "missing (NaN) or infinite value"
            expected = "finite or missing (NaN)" if self.missing else "finite"
            first = f"{self.x[row, column].item()} in column {self.columns[column]!r}, row {row + 1}"
            raise InvalidInput(
                f"{self.name}: found {count(len(bad), what)}, first {first}; "
                f"expected {expected} numbers; remove those rows, fill them in, or {LEAVE_OUT}"
            )
        empty = self.x.isnan().all(dim=0).nonzero().flatten().tolist()
        if empty:
            raise InvalidInput(
                f"{self.name}: found no number in column {self.columns[empty[0]]!r}, all of it is missing; "
                f"expected at least 1; fill it in, or {LEAVE_OUT}"
            )

    def _refuse_wrong_intensities(self) -> None:
        if self.intensities is None:
            return
        are_probabilities = ((self.intensities >= 0) & (self.intensities <= 1)) | self.intensities.isnan()
        if self.intensities.shape != self.x.shape or not are_probabilities.all():
            found = f"intensities of shape {tuple(self.intensities.shape)}"
            raise InvalidInput(
                f"{self.name}: found {found}; expected {tuple(self.x.shape)}, from 0 to 1; use load_data(..., "
                "binarise='stochastic')"
            )

    def binarised(self, how: str, seed: int = 0, *, leave: Sequence[str] = ()) -> Dataset:
        """Return the data with binary pixels.

        An intensity is a pixel's share of the range, which ends at ``top``; where that is not known, at 1 if no pixel
        exceeds it, and else at the largest pixel.

        Parameters
        ----------
        how : str
            ``threshold``: 1 from half of the range upwards. ``static``: one draw, with the intensity as the probability
            of a 1 (Salakhutdinov and Murray 2008). ``stochastic``: such a draw in ``x``, and the intensities beside
            it, from which every step of training draws anew (Burda et al. 2016).
        seed : int
            Seed of the draw.
        leave : sequence of str
            Columns that are no pixels and stay as they are; those of labels stay anyway.

        Returns
        -------
        Dataset
            Another one; with ``intensities`` where ``stochastic``.

        Raises
        ------
        InvalidInput
            For another way, or values that are no intensities.
        """
        refuse_no_integer(self.name, "seed", seed, least=0)
        is_pixel = torch.tensor([name not in leave and name not in self.levels for name in self.columns])
        if self.intensities is not None:
            raise InvalidInput(f"{self.name}: found binary pixels already; expected intensities; leave binarise out")
        binary = make_binary(self.x, is_pixel, how, int(seed), top=self.top, where=self.name, columns=self.columns)
        return replace(
            self,
            x=binary.x,
            intensities=binary.intensities,
            description="; ".join(filter(None, [self.description, f"binary pixels: {how}"])),
            top=None if self.top is None else 1.0,
            arguments=self.arguments | {"binarise": how} | ({} if how == "threshold" else {"seed": int(seed)}),
        )

    def split(self, validation: float = 0.0, test: float = 0.0, seed: int = 0, *, by: str | None = FIRST_KEY) -> Split:
        """Cut the rows into those to fit to, those that say when to stop, and those that nothing sees.

        What was done to all rows before, such as standardising them, has seen every part.

        Parameters
        ----------
        validation, test : float
            Shares of the rows, from 0 to below 1; a part with the share 0 is None.
        seed : int
            Seed of the cut; the rows of each part keep their order.
        by : str or None
            Column of labels whose rows are never parted, such as the steps of one sequence or the members of one
            group; shares are then those of the labels. By default the first such column, if there is one; None takes
            every row by itself.

        Returns
        -------
        Split
            ``train``, ``validation`` and ``test``: data sets, or None for a part with the share 0.

        Raises
        ------
        InvalidInput
            For shares that leave a part with fewer than two rows, or a column that holds no labels.

        Examples
        --------
        >>> import elbozoo as ez
        >>> parts = ez.load_data("iris").split(test=0.2, seed=0)
        >>> parts.train.rows, parts.test.rows, parts.validation
        (120, 30, None)
        """
        refuse_no_integer(self.name, "seed", seed, least=0)
        if by == FIRST_KEY:
            by = next(iter(self.levels), None)
        if by is not None and by not in self.levels:
            raise InvalidInput(
                f"{self.name}: found by={by!r}; expected a column of labels ({', '.join(self.levels) or 'none here'}); "
                "load the data with keys=[...]"
            )
        units = None if by is None else self.x[:, self.columns.index(by)]
        parts = partition(
            self.rows,
            {"validation": validation, "test": test},
            int(seed),
            where=self.name,
            unit="row" if by is None else f"different {by}",
            units=units,
        )
        others = {
            part: self._of_rows(parts[part], part) if len(parts[part]) else None for part in ("validation", "test")
        }
        return Split(self._of_rows(parts["train"], "train"), **others)

    def _of_rows(self, index: Tensor, part: str) -> Dataset:
        note = f"{part}: {len(index)} of {self.rows} rows"

        def rows(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        return replace(
            self,
            x=self.x[index],
            labels=rows(self.labels),
            factors=rows(self.factors),
            intensities=rows(self.intensities),
            description="; ".join(filter(None, [self.description, note])),
        )

    def pick(self, wanted: Wanted) -> Dataset:
        """Return the columns that are wanted, those of labels coded, if they may be fitted.

        Parameters
        ----------
        wanted : Wanted
            The columns, those of labels among them, and whether values or labels may be missing.

        Returns
        -------
        Dataset
            The same one where nothing changes.

        Raises
        ------
        InvalidInput
            For a column that is not there, or values that may not be fitted.
        """
        keys = wanted.key_names(self.name, self.columns)
        names = wanted.names(self.name, self.columns, keys)
        levels = {name: self.levels[name] for name in [*keys, *self.levels] if name in self.levels and name in names}
        left = [name for name in levels if name not in keys]
        if left:
            logger.warning("%s: column %r holds codes of labels, which are taken as numbers here", self.name, left[0])
        missing = (self.missing and wanted.missing) or wanted.missing_labels
        new = [name for name in keys if name not in levels]
        if (names, list(levels), missing, new) == (self.columns, list(self.levels), self.missing, []):
            return self
        picked = [self.columns.index(name) for name in names]
        x = self.x[:, picked]
        intensities = None if self.intensities is None else self.intensities[:, picked]
        if new:
            if intensities is not None:
                intensities[:, [names.index(name) for name in new]] = torch.nan
            values, coded = coded_columns(x.numpy(), names, new, self.name, wanted.missing_labels)
            x, levels = torch.from_numpy(values), {name: (levels | coded)[name] for name in [*keys, *left]}
        image_shape = self.image_shape if wanted.columns is None and not new else None
        return replace(
            self,
            x=x,
            columns=names,
            image_shape=image_shape,
            levels=levels,
            missing=missing,
            intensities=intensities,
        )


class Split(NamedTuple):
    """Data to fit to, data that say when to stop, and data that nothing has seen; None for a part without rows."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None


class Wanted(NamedTuple):
    """What the caller asks of the columns: which ones, which of them hold labels, whether values may be missing."""

    columns: Columns
    keys: Keys
    missing: bool
    missing_labels: bool

    def key_names(self, where: str, known: list[str]) -> list[str]:
        """Return the names of the columns that hold labels."""
        keys = [self.keys] if isinstance(self.keys, str | int) else self.keys
        return list(dict.fromkeys(_key_name(where, key, known) for key in keys))

    def names(self, where: str, known: list[str], keys: list[str]) -> list[str]:
        """Return the columns to keep, in order; labels that were not picked come first."""
        if self.columns is None:
            return known
        picked = _picked(where, self.columns, known)
        return [*(name for name in keys if name not in picked), *picked]


# ---- columns of labels -----------------------------------------------------------------------------------------------


def _key_name(where: str, key: str | int, known: list[str]) -> str:
    if isinstance(key, str):
        name = flat(key)
        if name in known:
            return name
        # A command line gives positions as text, too.
        if not POSITION.fullmatch(name):
            raise unknown_name(f"column of {where}", name, known)
        key = int(name)
    if not isinstance(key, int | np.integer) or isinstance(key, bool) or not -len(known) <= key < len(known):
        raise InvalidInput(
            f"{where}: found {shown(key)} as a column of labels; expected a column's name, or a position from "
            f"{-len(known)} to {len(known) - 1}; change it"
        )
    return known[key]


def coded_columns(
    rows: npt.NDArray[Any], names: list[str], keys: list[str], where: str, missing_labels: bool
) -> tuple[Floats, dict[str, list[str]]]:
    """Return the rows in float64 with codes in the place of the labels, and what the codes stand for."""
    values, levels = filled(rows), {}
    for key in keys:
        position = names.index(key)
        labels = rows[:, position]
        column = pd.Series(labels.astype(labels.dtype.newbyteorder("=")), name=key)
        values[:, position], levels[key] = codes_of(column, where, missing_labels)
    return values, levels


def codes_of(column: pd.Series, where: str, missing_labels: bool) -> tuple[Floats, list[str]]:
    """Return the codes 0, 1, 2, ... of the labels of a column in order of first appearance, and the labels.

    NaN stands for a label that is missing where that is allowed.
    """
    try:
        by_value, values = pd.factorize(column)
    except TypeError:
        found = f"column {column.name!r} holds {shown(column.iloc[0])}"
        raise InvalidInput(
            f"{where}: {found}; expected labels, which are text, numbers or dates; pick another column"
        ) from None
    # Cells of different types may spell the same label, such as 1 and "1" or words with spaces about them.
    no_label = ("", UNLABELLED) if missing_labels else ("",)
    labels = [spelled(value) for value in values]
    by_label, levels = pd.factorize(np.array([None if label in no_label else label for label in labels], dtype=object))
    codes = np.append(by_label, -1)[by_value]
    blank = np.flatnonzero(codes < 0)
    if missing_labels:
        return np.where(codes < 0, np.nan, codes), [str(level) for level in levels]
    if len(blank):
        raise InvalidInput(
            f"{where}: column {column.name!r}, row {blank[0] + 1} holds no label; expected one in every row, to say "
            f"where the row belongs; fill in {count(len(blank), 'such cell')} of {len(codes)}, or remove those rows"
        )
    return codes.astype(np.float64), [str(level) for level in levels]


def filled(array: npt.NDArray[Any]) -> Floats:
    """Return a copy in float64 with NaN for the masked cells, whose values NumPy would let through."""
    values: Floats = np.array(np.ma.getdata(array), dtype=np.float64, order="C")
    values[np.ma.getmaskarray(array)] = np.nan
    return values


def _picked(where: str, columns: Sequence[str] | str, known: list[str]) -> list[str]:
    names = [flat(name) for name in ([columns] if isinstance(columns, str) else columns)]
    if not names:
        raise InvalidInput(
            f"found an empty list of columns; expected at least 1 of {where}; name some, or leave it out"
        )
    for name in names:
        if name not in known:
            raise unknown_name(f"column of {where}", name, known)
    refuse_duplicates("columns", names)
    return names


def refuse_no_integer(where: str, name: str, value: Any, least: int) -> None:
    """Refuse a ``value`` of an argument that is no integer from ``least`` to 2**32 - 1."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value < 2**32:
        found = f"{name}={shown(value)}"
        raise InvalidInput(f"{where}: found {found}; expected an integer from {least} to 2**32 - 1; change {name}")
