"""Data sets by name, from an entry's own program, from files, and from arrays: every way in ends in a `Dataset`."""

from __future__ import annotations

import functools
import logging
import math
import numbers
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.registry import get_entry

__all__ = ["Dataset", "list_datasets", "load_data"]

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

SIMULATED_ROWS = 500
SIMULATE = "simulate:"
STANDARDISED = "-standardised"
PARQUET_SUFFIXES = {".parquet", ".pq"}
FILE_SUFFIXES = PARQUET_SUFFIXES | {".csv", ".tsv", ".txt"}
SEPARATORS = (",", ";", "\t")
# From here on float64 skips integers, so that different cells could become equal.
INEXACT_INTEGER = 2**53
UNNAMED = re.compile(r"Unnamed: \d+")
ANY_SOURCE = "a data set's name, simulate:MODEL, a CSV or Parquet path, a DataFrame, an array, a tensor or a Dataset"
LEAVE_OUT = "pick the other columns with columns=[...] or --columns"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A table of numbers that can be fitted: at least two rows, finite, float64, every column named.

    Attributes
    ----------
    name : str
        Name of the data set, or of the file or kind of object it came from.
    x : Tensor (N, D) of float64
        The rows, in the units that ``description`` gives.
    columns : list of str
        Names of the D columns, all different.
    labels : Tensor (N,) of int64, or None
        Class of each row where it is known. No model sees it; it only colours pictures.
    description : str
        What the rows are, their units, and what was done to them or left out.
    image_shape : (int, int) or None
        Height and width where a row is an image, ``height * width = D``.

    Raises
    ------
    InvalidInput
        If ``x``, ``columns`` or ``labels`` are not as described.
    """

    name: str
    x: Tensor
    columns: list[str]
    labels: Tensor | None = None
    description: str = ""
    image_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        if self.x.ndim != 2 or self.x.dtype != torch.float64:
            found = f"x of shape {tuple(self.x.shape)} and {self.x.dtype}"
            raise InvalidInput(f"{self.name}: found {found}; expected (N, D) and torch.float64; use load_data(x)")
        if self.rows < 2:
            raise InvalidInput(f"{self.name}: found {_count(self.rows, 'row')}; expected at least 2; bring more data")
        if self.width == 0:
            raise InvalidInput(f"{self.name}: found no column; expected at least 1; bring data with numeric columns")
        _refuse_duplicates(self.name, self.columns)
        for what, length, expected in self._lengths():
            if length != expected:
                raise InvalidInput(f"{self.name}: found {length} {what}; expected {expected}, to agree with x")
        self._refuse_non_finite()

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
        if self.image_shape is not None:
            lengths.append(("pixels in image_shape", math.prod(self.image_shape), self.width))
        return lengths

    def _refuse_non_finite(self) -> None:
        bad = (~torch.isfinite(self.x)).nonzero().tolist()
        if bad:
            row, column = bad[0]
            first = f"{self.x[row, column].item()} in column {self.columns[column]!r}, row {row + 1}"
            raise InvalidInput(
                f"{self.name}: found {_count(len(bad), 'missing (NaN) or infinite value')}, first {first}; "
                f"expected finite numbers; remove those rows, fill them in, or {LEAVE_OUT}"
            )

    def _pick(self, columns: Sequence[str] | str | None) -> Dataset:
        if columns is None:
            return self
        names = _picked(self.name, columns, self.columns)
        positions = [self.columns.index(name) for name in names]
        return replace(self, x=self.x[:, positions], columns=names, image_shape=None)


class _Table(NamedTuple):
    """What a loader returns: rows (N, D), column names, classes (N,) where known."""

    x: Floats
    columns: list[str]
    labels: npt.NDArray[np.int64] | None


@dataclass(frozen=True)
class _Facts:
    """What is known of a named data set without loading it."""

    load: Callable[[], _Table]
    rows: int
    columns: int
    kind: str
    description: str
    source: str
    image_shape: tuple[int, int] | None = None


def list_datasets() -> pd.DataFrame:
    """Return a table of the named data sets; loads none of them.

    Besides these names, :func:`load_data` takes ``simulate:MODEL``, files, frames, arrays and tensors.

    Returns
    -------
    DataFrame
        Indexed by ``name``, with ``rows``, ``columns``, ``kind`` (continuous, count, binary, or estimates with their
        standard errors), ``description`` (with units) and ``source`` (with citation).
    """
    shown = ["rows", "columns", "kind", "description", "source"]
    table = {name: [getattr(facts, key) for key in shown] for name, facts in _NAMED.items()}
    return pd.DataFrame.from_dict(table, orient="index", columns=shown).rename_axis("name")


def load_data(
    source: Any,
    columns: Sequence[str] | str | None = None,
    *,
    rows: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load the data that ``source`` stands for.

    Parameters
    ----------
    source : str, path, DataFrame, Series, array, Tensor or Dataset
        A name from :func:`list_datasets`; ``simulate:MODEL`` for draws from an entry with parameters drawn at random;
        the path of a CSV file (UTF-8, separated by comma, semicolon or tab; decimal commas are read in files with
        semicolons) or of a Parquet file, each with a header; or the numbers themselves, (N, D) or (N,). Columns of a
        file or frame that hold no numbers are left out, which is logged and noted in ``description``; booleans become
        0 and 1. Arrays and tensors are copied, and their columns are called ``x0``, ``x1``, ....
    columns : sequence of str, optional
        The columns to keep, in this order; by default every numeric one.
    rows : int, optional
        Number of rows to simulate, 500 by default; goes with ``simulate:MODEL`` only.
    seed : int
        Seed of the simulation, of its parameters as of its rows.

    Returns
    -------
    Dataset
        Always finite, float64, and with at least two rows; numbers are in the units of the source.

    Raises
    ------
    InvalidInput
        With one line that says what was found, what was expected and what to do.
    """
    if isinstance(source, str) and source.startswith(SIMULATE):
        return _simulated(source, SIMULATED_ROWS if rows is None else rows, seed)._pick(columns)
    if rows is not None:
        raise InvalidInput(f"found rows={rows!r}; expected it with simulate:MODEL only; take the rows before loading")
    if isinstance(source, Dataset):
        return source._pick(columns)
    if isinstance(source, pd.Series):
        source = source.to_frame("x0" if source.name is None else source.name)
    if isinstance(source, pd.DataFrame):
        return _from_frame(source, "DataFrame", columns, "the caller's data frame")
    if isinstance(source, Tensor):
        return _from_array(_tensor_values(source), "tensor")._pick(columns)
    if isinstance(source, np.ndarray):
        return _from_array(source, "array")._pick(columns)
    if isinstance(source, str) and source in _NAMED:
        return _named(source)._pick(columns)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fspath(source), columns)
    raise InvalidInput(f"found a {type(source).__name__} as data; expected {ANY_SOURCE}; try numpy.asarray(data)")


# ---- named and simulated ---------------------------------------------------------------------------------------------


def _named(name: str) -> Dataset:
    facts = _NAMED[name]
    table = facts.load()
    labels = None if table.labels is None else torch.tensor(table.labels)
    return Dataset(name, torch.tensor(table.x), table.columns, labels, facts.description, facts.image_shape)


def _simulated(source: str, rows: int, seed: int) -> Dataset:
    _refuse_no_integer(source, "rows", rows, least=2)
    _refuse_no_integer(source, "seed", seed, least=0)
    entry = get_entry(source.removeprefix(SIMULATE)).example(seed=int(seed))
    x, z = entry.simulate(int(rows), int(seed))
    is_class = isinstance(z, Tensor) and z.shape == (len(x),) and not z.is_floating_point()
    labels = z.long() if isinstance(z, Tensor) and is_class else None
    description = f"{rows} draws from {entry.name()} with parameters drawn at random, seed {seed}"
    return Dataset(source, x.detach().double(), _numbered(x.shape[1]), labels, description)


def _scikit_learn(name: str, has_classes: bool = True) -> _Table:
    # Imported here because scikit-learn is slow to import and files need none of it.
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    labels = bunch.target.astype(np.int64) if has_classes else None
    return _Table(bunch.data.astype(np.float64), [str(column) for column in bunch.feature_names], labels)


def _digits_binary() -> _Table:
    digits = _scikit_learn("digits")
    return digits._replace(x=(digits.x >= 8).astype(np.float64))


def _eight_schools() -> _Table:
    effect = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
    standard_error = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
    return _Table(np.column_stack([effect, standard_error]), ["effect", "standard_error"], None)


def _standardise(load: Callable[[], _Table]) -> _Table:
    table = load()
    return table._replace(x=(table.x - table.x.mean(axis=0)) / table.x.std(axis=0))


def _standardised(facts: _Facts) -> _Facts:
    rule = "each column minus its mean, over its standard deviation (N in the denominator)"
    load = functools.partial(_standardise, facts.load)
    return replace(facts, load=load, description=f"{facts.description}; {rule}")


_DIGITS = _Facts(
    functools.partial(_scikit_learn, "digits"),
    rows=1797,
    columns=64,
    kind="count",
    description="handwritten digits, 8 x 8 pixels, each a count of ink from 0 to 16; labels: the digit",
    source="scikit-learn load_digits; E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, "
    "UCI Machine Learning Repository, 1998 (its test set)",
    image_shape=(8, 8),
)
_RAW = {
    "digits": _DIGITS,
    "digits-binary": replace(
        _DIGITS,
        load=_digits_binary,
        kind="binary",
        description="handwritten digits, 8 x 8 pixels: 1 where digits has 8 or more of 16, otherwise 0; "
        "labels: the digit",
    ),
    "iris": _Facts(
        functools.partial(_scikit_learn, "iris"),
        rows=150,
        columns=4,
        kind="continuous",
        description="length and width of sepals and petals of iris flowers, in cm; labels: the species",
        source="scikit-learn load_iris (the values of R, not of UCI); R. A. Fisher, The use of multiple measurements "
        "in taxonomic problems, Annals of Eugenics 7, 179-188, 1936",
    ),
    "wine": _Facts(
        functools.partial(_scikit_learn, "wine"),
        rows=178,
        columns=13,
        kind="continuous",
        description="chemical analysis of Italian wines, each column in its own unit; labels: the cultivar",
        source="scikit-learn load_wine; M. Forina et al., PARVUS; S. Aeberhard and M. Forina, Wine, UCI Machine "
        "Learning Repository, 1991",
    ),
    "breast-cancer": _Facts(
        functools.partial(_scikit_learn, "breast_cancer"),
        rows=569,
        columns=30,
        kind="continuous",
        description="mean, error and worst value of ten measures of cell nuclei, in pixels and their ratios; "
        "labels: 0 malignant, 1 benign",
        source="scikit-learn load_breast_cancer; W. N. Street, W. H. Wolberg and O. L. Mangasarian, Nuclear feature "
        "extraction for breast tumor diagnosis, SPIE 1905, 861-870, 1993",
    ),
    "diabetes": _Facts(
        functools.partial(_scikit_learn, "diabetes", has_classes=False),
        rows=442,
        columns=10,
        kind="continuous",
        description="age, sex, body mass index, blood pressure and six serum measures of patients, each column centred "
        "and scaled to a sum of squares of 1 (no unit); the disease progression is left out",
        source="scikit-learn load_diabetes; B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, Least angle "
        "regression, Annals of Statistics 32, 407-499, 2004",
    ),
    "eight-schools": _Facts(
        _eight_schools,
        rows=8,
        columns=2,
        kind="estimates with standard errors",
        description="effect of coaching on SAT-V scores in eight schools and its standard error, in points",
        source="D. B. Rubin, Estimation in parallel randomized experiments, Journal of Educational Statistics 6, "
        "377-401, 1981; A. Gelman et al., Bayesian Data Analysis, section 5.5; the effects as in ArviZ centered_eight",
    ),
}
_NAMED = _RAW | {
    name + STANDARDISED: _standardised(facts) for name, facts in _RAW.items() if facts.kind == "continuous"
}


# ---- files -----------------------------------------------------------------------------------------------------------


def _from_path(source: str, columns: Sequence[str] | str | None) -> Dataset:
    path = Path(os.path.expanduser(source))
    where = _flat(path.name)
    if not os.path.exists(path):
        raise _nothing_called(source)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no regular file"
        raise InvalidInput(f"found {found} at {source!r}; expected a CSV or Parquet file; give the path of one file")
    try:
        frame = _read_parquet(path, where) if path.suffix.lower() in PARQUET_SUFFIXES else _read_csv(path, where)
    except OSError as error:
        raise InvalidInput(f"{source!r} cannot be read ({_flat(error.strerror or error)}); check the file") from None
    return _from_frame(_without_row_names(frame, where), where, columns, f"the file {where}")


def _nothing_called(source: str) -> InvalidInput:
    if Path(source).suffix.lower() in FILE_SUFFIXES or os.sep in source:
        return InvalidInput(f"found no file {source!r}; expected a CSV or Parquet file with a header; check the path")
    return unknown_name("data set", source, _NAMED)


def _read_parquet(path: Path, where: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    # A corrupt file fails anywhere inside Arrow and pandas, down to a KeyError for their metadata.
    except Exception as error:
        raise InvalidInput(
            f"{where} cannot be read as Parquet ({_short(_flat(error), 120)}); "
            "expected a whole Parquet file; write it again"
        ) from None


def _read_csv(path: Path, where: str) -> pd.DataFrame:
    expected = "expected a header and rows of equally many fields, in UTF-8"
    try:
        return _parse_csv(path, where)
    except pd.errors.EmptyDataError:
        raise InvalidInput(f"{where} is empty; expected a header and rows of numbers; check the file") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InvalidInput(
            f"{where} is not UTF-8 text (byte {byte:#04x}); {expected}; save it as CSV in UTF-8"
        ) from None
    except pd.errors.ParserWarning:
        raise InvalidInput(f"{where}: the first row has more fields than the header; {expected}; correct it") from None
    except pd.errors.ParserError as error:
        detail = _flat(error).rpartition("C error: ")[2]
        raise InvalidInput(f"{where} cannot be read as CSV ({detail}); {expected}; correct that line") from None


def _parse_csv(path: Path, where: str) -> pd.DataFrame:
    read = functools.partial(pd.read_csv, path, compression=None, skipinitialspace=True, low_memory=False)
    separator, names = _header(read)
    _refuse_binary(where, names)
    _refuse_numbers_as_names(where, names)
    _refuse_duplicates(where, names)
    with warnings.catch_warnings():
        # Without this pandas would drop the surplus fields of a first row that is longer than the header.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        # Programs that separate by semicolons do so because they write decimal commas.
        decimal = "," if separator == ";" else "."
        frame: pd.DataFrame = read(sep=separator, decimal=decimal, header=0, names=names, index_col=False)
    return frame


def _header(read: Callable[..., pd.DataFrame]) -> tuple[str, list[str]]:
    """Return the separator that gives the first line the most fields, and those fields."""
    lines = {
        separator: read(sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
        for separator in SEPARATORS
    }
    separator = max(SEPARATORS, key=lambda candidate: len(lines[candidate]))
    return separator, [_flat(name) or f"Unnamed: {position}" for position, name in enumerate(lines[separator])]


def _refuse_binary(where: str, names: list[str]) -> None:
    if any(ord(character) < 32 for name in names for character in name):
        raise InvalidInput(f"{where} holds binary data; expected text with a header; export it as CSV or Parquet")


def _refuse_numbers_as_names(where: str, names: list[str]) -> None:
    """Refuse a first line of data, which would be lost as a header; columns counted from 0 or 1 are names."""
    found = [name for name in names if not math.isnan(_number(name))]
    # One or two columns that begin with 0 or 1 may well be data, unless they stand beside row names.
    enough = len(found) > 2 or any(UNNAMED.fullmatch(name) for name in names)
    counted = enough and any(found == [str(start + i) for i in range(len(found))] for start in (0, 1))
    if 2 * len(found) > len(names) and not counted:
        shown = _short(", ".join(found), 60)
        raise InvalidInput(
            f"{where}: the first line holds numbers ({shown}); expected a header; add column names above it"
        )


def _without_row_names(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Leave out nameless columns that are no data: empty ones, and row names as pandas and R write them."""
    nameless = [position for position, name in enumerate(frame.columns) if UNNAMED.fullmatch(str(name))]
    no_data = [position for position in nameless if _is_no_data(frame.iloc[:, position], position)]
    if no_data:
        logger.warning("%s: left out %s without a name (row names or empty)", where, _count(len(no_data), "column"))
    return frame.iloc[:, [position for position in range(frame.shape[1]) if position not in no_data]]


def _is_no_data(column: pd.Series, position: int) -> bool:
    are_row_names = position == 0 and pd.api.types.is_integer_dtype(column.dtype) and column.is_unique
    return are_row_names or bool(column.isna().all())


# ---- frames, arrays, tensors -----------------------------------------------------------------------------------------


def _from_frame(frame: pd.DataFrame, where: str, columns: Sequence[str] | str | None, origin: str) -> Dataset:
    frame = frame.set_axis([_flat(name) for name in frame.columns], axis=1)
    _refuse_duplicates(where, list(frame.columns))
    if frame.empty:
        found = f"{_count(frame.shape[1], 'column')} and {_count(len(frame), 'row')}"
        raise InvalidInput(f"{where}: found {found}; expected rows of numbers under a header; bring more data")
    names = list(frame.columns) if columns is None else _picked(where, columns, list(frame.columns))
    values = {name: _column_values(frame[name], where, required=columns is not None) for name in names}
    kept = {name: column for name, column in values.items() if column is not None}
    if not kept:
        raise InvalidInput(
            f"{where}: found no numeric column ({_first_cells(frame)}); expected at least 1; "
            "check the separator and the cells"
        )
    left_out = [name for name in names if name not in kept]
    note = f"left out, no numbers: {', '.join(map(repr, left_out))}" if left_out else ""
    if left_out:
        logger.warning("%s: columns %s", where, note)
    x = torch.tensor(np.column_stack(list(kept.values())))
    return Dataset(where, x, list(kept), description="; ".join(filter(None, [origin, note])))


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
        found = f"holds {dtype}, such as {_shown(column.iloc[0])}"
        raise InvalidInput(
            f"{where}: column {column.name!r} {found}; expected numbers; convert it, or pick other columns"
        )
    return None


def _cell_values(column: pd.Series, where: str, required: bool) -> Floats | None:
    cells = column.tolist()
    values = np.array([_number(cell) for cell in cells])
    bad = np.flatnonzero(np.isnan(values) & column.notna().to_numpy())
    good = int(column.notna().sum()) - len(bad)
    if len(bad) and (required or good > len(bad)):
        raise InvalidInput(
            f"{where}: column {column.name!r}, row {bad[0] + 1} holds {_shown(cells[bad[0]])}; expected a number; "
            f"correct {_count(len(bad), 'such cell')} of {len(cells)}, or {LEAVE_OUT}"
        )
    if len(bad):
        return None
    integers = np.array([isinstance(cell, int) for cell in cells])
    _refuse_inexact(where, [str(column.name)], values[:, None], integers[:, None])
    return values


def _number(cell: object) -> float:
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


def _tensor_values(x: Tensor) -> npt.NDArray[Any]:
    dense = x.detach().to_dense() if x.layout != torch.strided else x.detach()
    # NumPy knows neither bfloat16 nor the 8-bit floats.
    real = dense.double() if dense.is_floating_point() else dense
    values: npt.NDArray[Any] = real.cpu().resolve_conj().numpy()
    return values


def _from_array(array: npt.NDArray[Any], where: str) -> Dataset:
    if array.dtype.kind not in "biuf":
        what = "complex numbers" if array.dtype.kind == "c" else f"dtype {array.dtype}"
        advice = "split into real and imaginary columns" if array.dtype.kind == "c" else "convert with x.astype(float)"
        raise InvalidInput(f"{where}: found {_short(what, 60)}; expected real numbers; {advice}")
    if array.ndim not in (1, 2):
        raise InvalidInput(
            f"{where}: found {_count(array.ndim, 'dimension')}, shape {array.shape}; expected (N, D) or (N,); "
            "reshape to one row per datum, x.reshape(len(x), -1)"
        )
    values = _filled(array)
    rows = values[:, None] if values.ndim == 1 else values
    names = _numbered(rows.shape[1])
    _refuse_inexact(where, names, rows, array.dtype.kind in "iu")
    return Dataset(where, torch.from_numpy(rows), names, description=f"the caller's {where}")


def _filled(array: npt.NDArray[Any]) -> Floats:
    """Return a copy in float64 with NaN for the masked cells, whose values NumPy would let through."""
    values: Floats = np.array(np.ma.getdata(array), dtype=np.float64, order="C")
    values[np.ma.getmaskarray(array)] = np.nan
    return values


# ---- checks and words ------------------------------------------------------------------------------------------------


def _picked(where: str, columns: Sequence[str] | str, known: list[str]) -> list[str]:
    names = [_flat(name) for name in ([columns] if isinstance(columns, str) else columns)]
    if not names:
        raise InvalidInput(
            f"found an empty list of columns; expected at least 1 of {where}; name some, or leave it out"
        )
    for name in names:
        if name not in known:
            raise unknown_name(f"column of {where}", name, known)
    _refuse_duplicates("columns", names)
    return names


def _refuse_duplicates(where: str, names: list[str]) -> None:
    duplicates = [name for name, times in Counter(names).items() if times > 1]
    if duplicates:
        raise InvalidInput(
            f"{where}: found the column name {duplicates[0]!r} twice; expected different names; rename one"
        )


def _refuse_no_integer(where: str, name: str, value: Any, least: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value < 2**32:
        found = f"{name}={_shown(value)}"
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
    return _short(", ".join(f"{name!r} holds {_shown(frame[name].iloc[0])}" for name in frame.columns), 120)


def _numbered(width: int) -> list[str]:
    return [f"x{position}" for position in range(width)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _flat(value: object) -> str:
    return " ".join(str(value).split())


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _shown(cell: object) -> str:
    return _short(_flat(repr(cell)), 40)
