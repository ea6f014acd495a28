"""Tables in files, CSV and Parquet with a header, and arrays in NPY and NPZ files; all else is refused in one line."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.words import as_number, count, flat, refuse_duplicates, short

logger = logging.getLogger(__name__)

PARQUET_SUFFIXES = {".parquet", ".pq"}
ARRAY_SUFFIXES = {".npy", ".npz"}
TABLE_SUFFIXES = PARQUET_SUFFIXES | {".csv", ".tsv", ".txt"}
FILE_SUFFIXES = TABLE_SUFFIXES | ARRAY_SUFFIXES
ROW_KEYS = ("x", "X", "images", "data", "arr_0")
LABEL_KEYS = ("y", "labels")
SEPARATORS = (",", ";", "\t")
Mapped = np.memmap[Any, np.dtype[Any]]  # an array that lies in a file
HIDDEN = (".", "_")
ANY_FILE = "a CSV, Parquet, NPY or NPZ file, or a folder of Parquet files"
UNNAMED = re.compile(r"Unnamed: \d+")


def read_file(path: Path, where: str) -> pd.DataFrame:
    """Return the table in a file without the nameless columns that are no data.

    Raises
    ------
    InvalidInput
        If the file cannot be read or is no such table; ``where`` names it.
    """
    frame = _read_parquet(path, where) if is_parquet(path) else _read_csv(path, where)
    return _without_row_names(frame, where)


def read_labels(path: Path, where: str, names: Sequence[str]) -> pd.DataFrame:
    """Return the columns ``names`` of a CSV file as they are written: "007" is another label than "7"."""
    return _read_csv(path, where, usecols=list(names), dtype=str)


def is_parquet(path: Path) -> bool:
    """Whether the name of a file says that it is Parquet."""
    return path.suffix.lower() in PARQUET_SUFFIXES


def parquet_files(folder: Path) -> list[tuple[Path, str]]:
    """Return the Parquet files of a folder in the order of their names, with what messages call them.

    Those of folders such as ``year=2024`` within it belong to it, as Hive and Spark write them. Names that begin with a
    dot or an underscore are of files that hold no rows.

    Raises
    ------
    InvalidInput
        If there is none, or one in a folder within it that is called otherwise.
    """
    try:
        found = list(_parquet_below(folder))
    except OSError as error:
        raise InvalidInput(
            f"{os.fspath(folder)!r} cannot be read ({flat(error.strerror or error)}); check the folder"
        ) from None
    if not found:
        raise InvalidInput(
            f"found a directory at {os.fspath(folder)!r} without Parquet files; expected {ANY_FILE}; give another path"
        )
    return [(path, flat(path.relative_to(folder.parent))) for path in found]


def _parquet_below(folder: Path) -> Iterator[Path]:
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(HIDDEN)):
        if not path.is_dir():
            yield from [path] if is_parquet(path) else []
        elif "=" in path.name:
            yield from _parquet_below(path)
        elif any(map(is_parquet, path.iterdir())):
            raise InvalidInput(
                f"{flat(folder.name)}: found Parquet files in the folder {path.name!r} within it; expected all of them "
                "side by side, or in folders such as year=2024; give the path of one folder, or move them"
            )


def is_array(path: Path) -> bool:
    """Whether the name of a file says that it is NumPy's; all that are neither these nor Parquet are read as CSV."""
    return path.suffix.lower() in ARRAY_SUFFIXES


class Arrays(NamedTuple):
    """What a NumPy file gives: an array of numbers, not checked, and the class of each of its rows where it says so."""

    x: npt.NDArray[Any]
    labels: npt.NDArray[Any] | None


def read_arrays(path: Path, where: str, key: str | None) -> Arrays:
    """Return the array in a NPY file, or the one called ``key`` in a NPZ file, with its labels.

    Without ``key`` a NPZ file gives its only array, or the one called x, X, images, data or arr_0 if just one of these
    is there. Labels are what is called y or labels, or, for an array such as x_train, y_train.

    Raises
    ------
    InvalidInput
        If the file cannot be read, holds Python objects, or does not tell which array is meant.
    """
    loaded = _loaded(lambda: np.load(path, allow_pickle=False), where)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        if key is not None:
            raise InvalidInput(f"{where}: found key={key!r} for a single array; expected it for several; leave it out")
        return Arrays(loaded, None)
    # Its arrays are read one by one, so that those that nobody wants cost nothing.
    with loaded as archive:
        names = list(archive.files)
        chosen = _row_key(where, names, key, lambda name: _loaded(lambda: archive[name], where).shape)
        labels = next((name for name in _label_keys(chosen) if name in names and name != chosen), None)
        x = _loaded(lambda: archive[chosen], where)
        return Arrays(x, None if labels is None else _labels(lambda: archive[labels], where, labels))


def mapped_array(path: Path, where: str) -> Mapped:
    """Return the array in a NPY file as it lies there, of which only what is looked at is read.

    Raises
    ------
    InvalidInput
        If the file cannot be read, or holds Python objects or several arrays.
    """
    array: Any = _loaded(lambda: np.load(path, mmap_mode="r", allow_pickle=False), where)
    if isinstance(array, np.lib.npyio.NpzFile):
        array.close()
        raise InvalidInput(f"{where}: found a NPZ file under this name; expected one array; save it with numpy.save")
    mapped: Mapped = array
    return mapped


def _labels(load: Callable[[], Any], where: str, name: str) -> Any:
    """Return the labels beside the rows, or None where they cannot be read, since no fit needs them."""
    try:
        return _loaded(load, where)
    except InvalidInput:
        logger.warning("%s: left out %r, which holds no labels that are numbers", where, name)
        return None


def _loaded(load: Callable[[], Any], where: str) -> Any:
    try:
        return load()
    # A corrupt file fails anywhere inside NumPy, zipfile and zlib.
    except Exception as error:
        if "Object arrays cannot be loaded" in str(error) or "Python objects in dtype" in str(error):
            raise InvalidInput(
                f"{where}: found an array of Python objects, as images of unequal shape or text are saved; expected "
                "numbers, one shape for all rows; resize or crop the images and save numpy.stack(images)"
            ) from None
        raise InvalidInput(
            f"{where} cannot be read as NumPy's ({short(flat(error), 120)}); expected a whole file by numpy.save or "
            "numpy.savez; write it again"
        ) from None


def _row_key(where: str, names: list[str], key: str | None, shape_of: Callable[[str], tuple[int, ...]]) -> str:
    if key is not None:
        if key not in names:
            raise unknown_name(f"array of {where}", key, names)
        return key
    if not names:
        raise InvalidInput(f"{where}: found no array; expected at least 1; save one with numpy.savez(path, x=x)")
    others = [name for name in names if name not in LABEL_KEYS]
    known = [name for name in ROW_KEYS if name in names]
    if len(others) == 1 or len(names) == 1:
        return (others or names)[0]
    numbered = all(name.startswith("arr_") for name in others)
    if len(known) == 1 and not numbered:
        return known[0]
    shapes = {name: shape_of(name) for name in others}
    listed = short(", ".join(f"{name} {shape}" for name, shape in shapes.items()), 200)
    if numbered and len(set(shapes.values())) > 1 and len({len(shape) for shape in shapes.values()}) == 1:
        raise InvalidInput(
            f"{where}: found images of unequal shape, {listed}; expected one array of images of one shape; resize or "
            "crop them and save numpy.stack(images), or pick an array with key=NAME or --key NAME"
        )
    raise InvalidInput(
        f"{where}: found the arrays {listed}; expected one that holds the rows; pick it with key=NAME or --key NAME"
    )


def _label_keys(key: str) -> list[str]:
    beside = [f"y{key[1:]}"] if key.startswith("x_") else []
    return [*beside, *LABEL_KEYS]


def _read_parquet(path: Path, where: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, partitioning=None)  # a folder called year=2024 on its path is no column of it
    # A corrupt file fails anywhere inside Arrow and pandas, down to a KeyError for their metadata.
    except Exception as error:
        raise corrupt_parquet(where, error) from None


def corrupt_parquet(where: str, error: Exception) -> InvalidInput:
    """Return what to say of a file in which Arrow met an ``error``."""
    return InvalidInput(
        f"{where} cannot be read as Parquet ({short(flat(error), 120)}); expected a whole Parquet file; write it again"
    )


def _read_csv(path: Path, where: str, **options: Any) -> pd.DataFrame:
    expected = "expected a header and rows of equally many fields, in UTF-8"
    try:
        return _parse_csv(path, where, **options)
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
        detail = flat(error).rpartition("C error: ")[2]
        raise InvalidInput(f"{where} cannot be read as CSV ({detail}); {expected}; correct that line") from None


def _parse_csv(path: Path, where: str, **options: Any) -> pd.DataFrame:
    read = functools.partial(pd.read_csv, path, compression=None, skipinitialspace=True, low_memory=False)
    separator, names = _header(read)
    _refuse_binary(where, names)
    _refuse_numbers_as_names(where, names)
    refuse_duplicates(where, names)
    with warnings.catch_warnings():
        # Without this pandas would drop the surplus fields of a first row that is longer than the header.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        # Programs that separate by semicolons do so because they write decimal commas.
        decimal = "," if separator == ";" else "."
        frame: pd.DataFrame = read(sep=separator, decimal=decimal, header=0, names=names, index_col=False, **options)
    return frame


def _header(read: Callable[..., pd.DataFrame]) -> tuple[str, list[str]]:
    """Return the separator that gives the first line the most fields, and those fields."""
    lines = {
        separator: read(sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
        for separator in SEPARATORS
    }
    separator = max(SEPARATORS, key=lambda candidate: len(lines[candidate]))
    return separator, [flat(name) or f"Unnamed: {position}" for position, name in enumerate(lines[separator])]


def _refuse_binary(where: str, names: list[str]) -> None:
    if any(ord(character) < 32 for name in names for character in name):
        raise InvalidInput(f"{where} holds binary data; expected text with a header; export it as CSV or Parquet")


def _refuse_numbers_as_names(where: str, names: list[str]) -> None:
    """Refuse a first line of data, which would be lost as a header; columns counted from 0 or 1 are names."""
    found = [name for name in names if not math.isnan(as_number(name))]
    # One or two columns that begin with 0 or 1 may well be data, unless they stand beside row names.
    enough = len(found) > 2 or any(UNNAMED.fullmatch(name) for name in names)
    counted = enough and any(found == [str(start + i) for i in range(len(found))] for start in (0, 1))
    if 2 * len(found) > len(names) and not counted:
        shown = short(", ".join(found), 60)
        raise InvalidInput(
            f"{where}: the first line holds numbers ({shown}); expected a header; add column names above it"
        )


def _without_row_names(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Leave out nameless columns that are no data: empty ones, and row names as pandas and R write them."""
    nameless = [position for position, name in enumerate(frame.columns) if UNNAMED.fullmatch(str(name))]
    no_data = [position for position in nameless if _is_no_data(frame.iloc[:, position], position)]
    if no_data:
        logger.warning("%s: left out %s without a name (row names or empty)", where, count(len(no_data), "column"))
    return frame.iloc[:, [position for position in range(frame.shape[1]) if position not in no_data]]


def _is_no_data(column: pd.Series, position: int) -> bool:
    are_row_names = position == 0 and pd.api.types.is_integer_dtype(column.dtype) and column.is_unique
    return are_row_names or bool(column.isna().all())
