"""Data sets by name, from an entry's own program, from files, and from arrays: every way in ends in a `Dataset`."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from elbozoo.binarisation import binarise as make_binary
from elbozoo.datasets import NAMED, list_datasets
from elbozoo.files import FILE_SUFFIXES, is_array, is_parquet, read_arrays, read_file, read_labels
from elbozoo.models.contract.entry import default_names
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.labels import UNLABELLED, spelled
from elbozoo.models.contract.registry import get_entry
from elbozoo.splits import partition
from elbozoo.words import as_number, count, flat, refuse_duplicates, short, shown

__all__ = ["FILE_SUFFIXES", "Dataset", "Split", "list_datasets", "load_data"]

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Columns = Sequence[str] | str | None
Keys = Sequence[str | int] | str | int

SIMULATED_ROWS = 500
SIMULATE = "simulate:"
POSITION = re.compile(r"-?\d+")
# From here on float64 skips integers, so that different cells could become equal.
INEXACT_INTEGER = 2**53
ANY_SOURCE = "a data set's name, simulate:MODEL, a file's path, a DataFrame, an array, a tensor or a Dataset"
ANY_FILE = "a CSV, Parquet, NPY or NPZ file"
CHANNELS = (1, 3, 4)  # of grey, colour, and colour with opacity
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

        Raises
        ------
        InvalidInput
            For another way, or values that are no intensities.
        """
        _refuse_no_integer(self.name, "seed", seed, least=0)
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

        Raises
        ------
        InvalidInput
            For shares that leave a part with fewer than two rows, or a column that holds no labels.
        """
        _refuse_no_integer(self.name, "seed", seed, least=0)
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

    def _pick(self, wanted: _Wanted) -> Dataset:
        """Return the columns that are wanted, those of labels coded, if they may be fitted."""
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
            values, coded = _coded(x.numpy(), names, new, self.name, wanted.missing_labels)
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


class _Wanted(NamedTuple):
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


def load_data(
    source: Any,
    columns: Columns = None,
    *,
    rows: int | None = None,
    seed: int = 0,
    keys: Keys = (),
    missing: bool = False,
    missing_labels: bool = False,
    root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    key: str | None = None,
    binarise: str | None = None,
) -> Dataset:
    """Load the data that ``source`` stands for.

    Parameters
    ----------
    source : str, path, DataFrame, Series, array, Tensor or Dataset
        A name from :func:`list_datasets`; ``simulate:MODEL`` for draws from an entry with parameters drawn at random;
        the path of a CSV file (UTF-8, separated by comma, semicolon or tab; decimal commas are read in files with
        semicolons) or of a Parquet file, each with a header; the path of a NPY or NPZ file; or the numbers
        themselves, (N, D) or (N,), or images (N, H, W) or (N, C, H, W), which become rows with an ``image_shape``.
        Columns of a file or frame that hold no numbers are left out, which is logged and noted in ``description``;
        booleans become 0 and 1. Arrays and tensors are copied, and their columns are called ``x0``, ``x1``, .... A NPZ
        file may hold the class of each row under ``y`` or ``labels``, or beside ``x_train`` under ``y_train``.
    columns : sequence of str, optional
        The columns to keep, in this order; by default every numeric one.
    rows : int, optional
        Number of rows to simulate, 500 by default; goes with ``simulate:MODEL`` only.
    seed : int
        Seed of the simulation, of its parameters as of its rows, and of a draw of binary pixels.
    keys : str, int, or sequence of them
        Columns that hold labels, such as names of sequences or groups, by name or by position in the source. They
        may hold text, dates or numbers, and are kept whether picked or not: those not picked come first. Labels become
        codes 0, 1, 2, ... in order of first appearance, and what the codes stand for is in ``levels``, in the order
        of ``keys``. The labels of a CSV file are taken as they are written.
    missing : bool
        Whether values may be missing: empty cells, ``NA``, ``NaN``, None. They become NaN, which only a model that
        marginalises them can be fitted to; labels may not be missing.
    missing_labels : bool
        Whether rows may be without a label in the columns of ``keys``: an empty or missing cell, or -1 as scikit-learn
        has it. They become NaN there.
    root : path, optional
        Folder with your own IDX files of ``mnist`` or ``fashion-mnist``, or the root that torchvision put them under.
    split : str, optional
        Of these data sets, ``train`` (the default), ``test`` or ``all``.
    key : str, optional
        Name of the array that holds the rows in a NPZ file; needed where the file does not tell by itself.
    binarise : str, optional
        ``threshold``, ``static`` or ``stochastic``: make the pixels binary, see :meth:`Dataset.binarised`.

    Returns
    -------
    Dataset
        In float64, finite but for missing values, with at least two rows; numbers are in the units of the source.

    Raises
    ------
    InvalidInput
        With one line that says what was found, what was expected and what to do.
    """
    _refuse_misplaced(source, rows=rows, root=root, split=split, key=key)
    wanted, how = _Wanted(columns, keys, missing, missing_labels), _Place(rows, seed, root, split or "train", key)
    data = _loaded(source, wanted, how)
    return data if binarise is None else data.binarised(binarise, seed)


class _Place(NamedTuple):
    """What some sources need beside their names."""

    rows: int | None
    seed: int
    root: str | os.PathLike[str] | None
    split: str
    key: str | None


def _refuse_misplaced(source: Any, **given: Any) -> None:
    """Refuse arguments that ``source`` would not look at."""
    name = source if isinstance(source, str) else ""
    is_brought = name in NAMED and NAMED[name].is_brought
    is_archive = isinstance(source, str | os.PathLike) and os.fspath(source).lower().endswith((".npy", ".npz"))
    goes_with = {
        "rows": (name.startswith(SIMULATE), "simulate:MODEL only; take the rows before loading"),
        "root": (is_brought, "mnist or fashion-mnist only; give the path of a file as data"),
        "split": (is_brought, "mnist or fashion-mnist only; cut other data with validation= and test="),
        "key": (is_archive, "a NPZ file only; leave it out"),
    }
    for argument, value in given.items():
        is_right, where = goes_with[argument]
        if value is not None and not is_right:
            raise InvalidInput(f"found {argument}={shown(value)}; expected it with {where}")


def _loaded(source: Any, wanted: _Wanted, how: _Place) -> Dataset:
    if isinstance(source, str) and source.startswith(SIMULATE):
        return _simulated(source, SIMULATED_ROWS if how.rows is None else how.rows, how.seed)._pick(wanted)
    if isinstance(source, Dataset):
        return source._pick(wanted)
    if isinstance(source, pd.Series):
        source = source.to_frame("x0" if source.name is None else source.name)
    if isinstance(source, pd.DataFrame):
        return _from_frame(source, "DataFrame", wanted, "the caller's data frame")
    if isinstance(source, Tensor):
        return _from_array(_tensor_values(source), "tensor", wanted)
    if isinstance(source, np.ndarray):
        return _from_array(source, "array", wanted)
    if isinstance(source, str) and source in NAMED:
        return _named(source, how)._pick(wanted)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fspath(source), wanted, how.key)
    raise InvalidInput(f"found a {type(source).__name__} as data; expected {ANY_SOURCE}; try numpy.asarray(data)")


# ---- named and simulated ---------------------------------------------------------------------------------------------


def _named(name: str, how: _Place) -> Dataset:
    facts = NAMED[name]
    brought = {"root": how.root, "split": how.split} if facts.is_brought else {}
    table = facts.load(**brought)
    return Dataset(
        name,
        torch.tensor(table.x),
        table.columns,
        None if table.labels is None else torch.tensor(table.labels),
        facts.description,
        table.image_shape or facts.image_shape,
        factors=None if table.factors is None else torch.tensor(table.factors),
        factor_names=table.factor_names,
        top=facts.top,
        arguments={"root": os.fspath(how.root or ""), "split": how.split} if facts.is_brought else {},
    )


def _simulated(source: str, rows: int, seed: int) -> Dataset:
    _refuse_no_integer(source, "rows", rows, least=2)
    _refuse_no_integer(source, "seed", seed, least=0)
    entry = get_entry(source.removeprefix(SIMULATE)).example(seed=int(seed))
    x, labels = entry.simulate_table(int(rows), int(seed))
    description = f"{rows} draws from {entry.name()} with parameters drawn at random, seed {seed}"
    return Dataset(source, x.detach().double(), list(entry.table_names), labels, description)


# ---- files -----------------------------------------------------------------------------------------------------------


def _from_path(source: str, wanted: _Wanted, key: str | None) -> Dataset:
    path = Path(os.path.expanduser(source))
    where = flat(path.name)
    if not os.path.exists(path):
        raise _nothing_called(source)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no regular file"
        raise InvalidInput(f"found {found} at {source!r}; expected {ANY_FILE}; give the path of one file")
    is_text = not is_parquet(path)
    try:
        if is_array(path):
            return _from_arrays(path, where, wanted, key)
        frame = read_file(path, where)
        if wanted.missing and is_text and frame.shape[1] == 1:
            _refuse_empty_lines(path, where)
        keys = wanted.key_names(where, list(frame.columns)) if is_text else []
        if keys:
            labels = read_labels(path, where, keys)
            frame = frame.assign(**{name: labels[name] for name in keys})
    except OSError as error:
        raise InvalidInput(f"{source!r} cannot be read ({flat(error.strerror or error)}); check the file") from None
    return _from_frame(frame, where, wanted, f"the file {where}")


def _from_arrays(path: Path, where: str, wanted: _Wanted, key: str | None) -> Dataset:
    arrays = read_arrays(path, where, key)
    data = _from_array(arrays.x, where, wanted, f"the file {where}")
    labels = arrays.labels
    if labels is not None and (labels.dtype.kind not in "biu" or labels.ndim != 1):
        logger.warning("%s: left out labels of shape %s and dtype %s, no classes", where, labels.shape, labels.dtype)
        labels = None
    codes = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return replace(data, labels=codes, arguments={} if key is None else {"key": key})


def _refuse_empty_lines(path: Path, where: str) -> None:
    """Refuse empty lines within a single column, which are skipped, but may stand for missing values."""
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    empty = [position for position, line in enumerate(lines) if not line.strip()]
    if empty:
        raise InvalidInput(
            f"{where}: found an empty line after {shown(lines[empty[0] - 1])}; expected NA for a missing value; "
            f"write it there, or remove {count(len(empty), 'such line')}"
        )


def _nothing_called(source: str) -> InvalidInput:
    if Path(source).suffix.lower() in FILE_SUFFIXES or os.sep in source:
        return InvalidInput(f"found no file {source!r}; expected {ANY_FILE}; check the path")
    return unknown_name("data set", source, NAMED)


# ---- frames, arrays, tensors -----------------------------------------------------------------------------------------


def _from_frame(frame: pd.DataFrame, where: str, wanted: _Wanted, origin: str) -> Dataset:
    frame = _with_index_levels(frame.set_axis([flat(name) for name in frame.columns], axis=1), wanted.keys)
    known = list(frame.columns)
    refuse_duplicates(where, known)
    if frame.empty:
        found = f"{count(frame.shape[1], 'column')} and {count(len(frame), 'row')}"
        raise InvalidInput(f"{where}: found {found}; expected rows of numbers under a header; bring more data")
    keys = wanted.key_names(where, known)
    names = wanted.names(where, known, keys)
    coded = {name: _codes(frame[name], where, wanted.missing_labels) for name in keys}
    numeric = {
        name: _column_values(frame[name], where, required=wanted.columns is not None)
        for name in names
        if name not in coded
    }
    left_out = [name for name, column in numeric.items() if column is None]
    if len(left_out) == len(numeric):
        beside = f" beside the labels in {', '.join(map(repr, keys))}" if keys else ""
        raise InvalidInput(
            f"{where}: found no numeric column{beside} ({_first_cells(frame)}); expected at least 1; "
            "check the separator and the cells"
        )
    note = f"left out, no numbers: {', '.join(map(repr, left_out))}" if left_out else ""
    if left_out:
        logger.warning("%s: columns %s", where, note)
    columns = numeric | {name: codes for name, (codes, _) in coded.items()}
    kept = {name: values for name in names if (values := columns[name]) is not None}
    return Dataset(
        where,
        torch.tensor(np.column_stack(list(kept.values()))),
        list(kept),
        description="; ".join(filter(None, [origin, note])),
        levels={name: levels for name, (_, levels) in coded.items()},
        missing=wanted.missing,
    )


def _with_index_levels(frame: pd.DataFrame, keys: Keys) -> pd.DataFrame:
    """Return the frame with those levels of its index as columns that are keys, as in a panel by patient and time."""
    wanted = [keys] if isinstance(keys, str | int) else list(keys)
    levels = [name for name in frame.index.names if isinstance(name, str) and name in wanted and name not in frame]
    return frame.reset_index(level=levels) if levels else frame


def _column_values(column: pd.Series, where: str, required: bool) -> Floats | None:
    """Return the numbers of a column, NaN where missing, or None if it holds something else and is not required."""
    dtype = column.dtype
    if pd.api.types.is_complex_dtype(dtype):
        raise InvalidInput(
            f"{where}: column {column.name!r} is complex; expected real numbers; split it into two columns"
        )
    if pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):
        values: Floats = column.to_numpy(dtype=np.float64, na_value=np.nan)
        _refuse_inexact(where, [str(column.name)], values[:, None], pd.api.types.is_integer_dtype(dtype))
        return values
    if pd.api.types.is_object_dtype(dtype) or pd.api.types.is_string_dtype(dtype):
        return _cell_values(column, where, required)
    if required:
        found = f"holds {dtype}, such as {shown(column.iloc[0])}"
        raise InvalidInput(
            f"{where}: column {column.name!r} {found}; expected numbers; convert it, or pick other columns"
        )
    return None


def _cell_values(column: pd.Series, where: str, required: bool) -> Floats | None:
    cells = column.tolist()
    values = np.array([as_number(cell) for cell in cells])
    bad = np.flatnonzero(np.isnan(values) & column.notna().to_numpy())
    good = int(column.notna().sum()) - len(bad)
    if len(bad) and (required or good > len(bad)):
        raise InvalidInput(
            f"{where}: column {column.name!r}, row {bad[0] + 1} holds {shown(cells[bad[0]])}; expected a number; "
            f"correct {count(len(bad), 'such cell')} of {len(cells)}, or {LEAVE_OUT}"
        )
    if len(bad):
        return None
    integers = np.array([isinstance(cell, int) for cell in cells])
    _refuse_inexact(where, [str(column.name)], values[:, None], integers[:, None])
    return values


def _tensor_values(x: Tensor) -> npt.NDArray[Any]:
    dense = x.detach().to_dense() if x.layout != torch.strided else x.detach()
    # NumPy knows neither bfloat16 nor the 8-bit floats.
    real = dense.double() if dense.is_floating_point() else dense
    values: npt.NDArray[Any] = real.cpu().resolve_conj().numpy()
    return values


def _from_array(array: npt.NDArray[Any], where: str, wanted: _Wanted, origin: str | None = None) -> Dataset:
    if array.dtype.kind not in "biuf":
        _refuse_unequal_shapes(array, where)
        what = "complex numbers" if array.dtype.kind == "c" else f"dtype {array.dtype}"
        advice = "split into real and imaginary columns" if array.dtype.kind == "c" else "convert with x.astype(float)"
        raise InvalidInput(f"{where}: found {short(what, 60)}; expected real numbers; {advice}")
    image_shape = _image_shape(array, where)
    rows = array[:, None] if array.ndim == 1 else array.reshape(len(array), math.prod(array.shape[1:]))
    known = list(default_names(rows.shape[1]))
    keys = wanted.key_names(where, known)
    names = wanted.names(where, known, keys)
    picked = rows if names == known else rows[:, [known.index(name) for name in names]]
    values, levels = _coded(picked, names, keys, where, wanted.missing_labels)
    _refuse_inexact(where, names, values, array.dtype.kind in "iu")
    note = f"images of {' x '.join(map(str, image_shape))}" if image_shape else ""
    return Dataset(
        where,
        torch.from_numpy(values),
        names,
        description="; ".join(filter(None, [origin or f"the caller's {where}", note])),
        image_shape=image_shape if wanted.columns is None and not keys else None,
        levels=levels,
        missing=wanted.missing,
        top={"bool": 1.0, "uint8": 255.0}.get(array.dtype.name),
    )


def _image_shape(array: npt.NDArray[Any], where: str) -> tuple[int, int] | tuple[int, int, int] | None:
    """Return height and width, with the channels before them, of an array of images; None for one of rows.

    Raises
    ------
    InvalidInput
        For any other number of dimensions, or channels that come last.
    """
    if array.ndim in (1, 2):
        return None
    if array.ndim not in (3, 4):
        raise InvalidInput(
            f"{where}: found {count(array.ndim, 'dimension')}, shape {array.shape}; expected rows (N, D) or (N,), or "
            "images (N, H, W) or (N, C, H, W); reshape to one row per datum, x.reshape(len(x), -1)"
        )
    if array.ndim == 4 and array.shape[-1] in CHANNELS and array.shape[1] not in CHANNELS:
        raise InvalidInput(
            f"{where}: found images of shape {array.shape[1:]}, channels last; expected channels first, (N, C, H, W); "
            "turn them with numpy.moveaxis(x, -1, 1)"
        )
    return array.shape[1:]


def _refuse_unequal_shapes(array: npt.NDArray[Any], where: str) -> None:
    """Refuse an array of arrays with what is wrong with it: their shapes."""
    if array.dtype.kind != "O":
        return
    shapes = [element.shape for element in array.flat if isinstance(element, np.ndarray)]
    if len(shapes) == array.size and len(set(shapes)) > 1:
        other = next(shape for shape in shapes if shape != shapes[0])
        raise InvalidInput(
            f"{where}: found images of unequal shape, such as {shapes[0]} and {other}; expected one shape; resize or "
            "crop them to one"
        )


def _filled(array: npt.NDArray[Any]) -> Floats:
    """Return a copy in float64 with NaN for the masked cells, whose values NumPy would let through."""
    values: Floats = np.array(np.ma.getdata(array), dtype=np.float64, order="C")
    values[np.ma.getmaskarray(array)] = np.nan
    return values


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


def _coded(
    rows: npt.NDArray[Any], names: list[str], keys: list[str], where: str, missing_labels: bool
) -> tuple[Floats, dict[str, list[str]]]:
    """Return the rows in float64 with codes in the place of the labels, and what the codes stand for."""
    values, levels = _filled(rows), {}
    for key in keys:
        position = names.index(key)
        labels = rows[:, position]
        column = pd.Series(labels.astype(labels.dtype.newbyteorder("=")), name=key)
        values[:, position], levels[key] = _codes(column, where, missing_labels)
    return values, levels


def _codes(column: pd.Series, where: str, missing_labels: bool) -> tuple[Floats, list[str]]:
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


# ---- checks and words ------------------------------------------------------------------------------------------------


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


def _refuse_no_integer(where: str, name: str, value: Any, least: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value < 2**32:
        found = f"{name}={shown(value)}"
        raise InvalidInput(f"{where}: found {found}; expected an integer from {least} to 2**32 - 1; change {name}")


def _refuse_inexact(where: str, names: list[str], values: Floats, integer: bool | npt.NDArray[np.bool_]) -> None:
    bad = np.argwhere((np.abs(values) >= INEXACT_INTEGER) & integer)
    if len(bad):
        row, column = bad[0]
        raise InvalidInput(
            f"{where}: column {names[column]!r}, row {row + 1} holds an integer of about {values[row, column]:.3g}; "
            f"expected less than 2**53 in size, which float64 holds exactly; rescale it, or {LEAVE_OUT}"
        )


def _first_cells(frame: pd.DataFrame) -> str:
    return short(", ".join(f"{name!r} holds {shown(frame[name].iloc[0])}" for name in frame.columns), 120)
