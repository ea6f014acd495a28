"""Data sets by name, from an entry's own program, from files, and from arrays: every way in ends in a `Dataset`."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from elbozoo.datasets import NAMED, list_datasets
from elbozoo.files import (
    ANY_FILE,
    FILE_SUFFIXES,
    is_array,
    is_parquet,
    parquet_files,
    read_arrays,
    read_file,
    read_labels,
)
from elbozoo.inference.cluster import dask_rows, is_collection
from elbozoo.models.contract.entry import default_names
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.registry import get_entry
from elbozoo.stored import STREAM_BYTES, StoredData, Survey, is_stored, look_into, refuse_inexact, survey
from elbozoo.tables import (
    LEAVE_OUT,
    Columns,
    Dataset,
    Floats,
    Keys,
    Split,
    Wanted,
    coded_columns,
    codes_of,
    refuse_no_integer,
)
from elbozoo.words import as_number, count, flat, refuse_duplicates, short, shown

__all__ = ["FILE_SUFFIXES", "Dataset", "Split", "list_datasets", "load_data"]

logger = logging.getLogger(__name__)


SIMULATED_ROWS = 500
SIMULATE = "simulate:"
ANY_SOURCE = (
    "a data set's name, simulate:MODEL, a file's path, a DataFrame, an array, a tensor, a Dask collection or a Dataset"
)
ANY_STORED = "the path of a NPY file, a Parquet file or a folder of Parquet files"
CHANNELS = (1, 3, 4)  # of grey, colour, and colour with opacity


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
    stream: bool | None = None,
) -> Dataset | StoredData:
    """Load the data that ``source`` stands for.

    Parameters
    ----------
    source : str, path, DataFrame, Series, array, Tensor, Dask collection, Dataset or StoredData
        A name from :func:`list_datasets`; ``simulate:MODEL`` for draws from an entry with parameters drawn at random;
        the path of a CSV file (UTF-8, separated by comma, semicolon or tab; decimal commas are read in files with
        semicolons) or of a Parquet file, each with a header; the path of a NPY or NPZ file; the path of a folder of
        Parquet files with the same columns, which are one table in the order of their names; or the numbers
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
    stream : bool, optional
        Whether the rows of a NPY file, a Parquet file or a folder of Parquet files stay there and are read part by part
        when they are needed. By default those do that take more than 512 MiB in float64, unless they are images, or
        ``keys``, ``missing``, ``missing_labels`` or ``binarise`` ask for what a stream cannot give.

    Returns
    -------
    Dataset or StoredData
        In float64, finite but for missing values, with at least two rows; numbers are in the units of the source. A
        stream finds out that they are finite when it reads them.

    Raises
    ------
    InvalidInput
        With one line that says what was found, what was expected and what to do.

    Examples
    --------
    >>> import elbozoo as ez
    >>> data = ez.load_data("iris", columns=["petal length (cm)", "petal width (cm)"])
    >>> data.rows, data.width, sorted(set(data.labels.tolist()))
    (150, 2, [0, 1, 2])
    >>> ez.load_data("simulate:ppca", rows=20, seed=1).columns
    ['x0', 'x1', 'x2', 'x3', 'x4']
    """
    _refuse_misplaced(source, rows=rows, root=root, split=split, key=key)
    asked = {
        "keys": isinstance(keys, str | int) or len(keys) > 0,
        "missing": missing,
        "missing_labels": missing_labels,
        "key": key is not None,
        "binarise": binarise is not None,
    }
    stored = _stored(source, columns, stream, [name for name, is_asked in asked.items() if is_asked])
    if stored is not None:
        return stored
    wanted, how = Wanted(columns, keys, missing, missing_labels), _Place(rows, seed, root, split or "train", key)
    data = _loaded(source, wanted, how)
    if stream is False and isinstance(source, str | os.PathLike):
        data = replace(data, arguments=data.arguments | {"stream": False})
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


def _loaded(source: Any, wanted: Wanted, how: _Place) -> Dataset:
    if isinstance(source, str) and source.startswith(SIMULATE):
        return _simulated(source, SIMULATED_ROWS if how.rows is None else how.rows, how.seed).pick(wanted)
    if isinstance(source, Dataset):
        return source.pick(wanted)
    if isinstance(source, pd.Series):
        source = source.to_frame("x0" if source.name is None else source.name)
    if isinstance(source, pd.DataFrame):
        return _from_frame(source, "DataFrame", wanted, "the caller's data frame")
    if isinstance(source, Tensor):
        return _from_array(_tensor_values(source), "tensor", wanted)
    if isinstance(source, np.ndarray):
        return _from_array(source, "array", wanted)
    if isinstance(source, str) and source in NAMED:
        return _named(source, how).pick(wanted)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fspath(source), wanted, how.key)
    raise InvalidInput(f"found a {type(source).__name__} as data; expected {ANY_SOURCE}; try numpy.asarray(data)")


# ---- rows that stay in their files -----------------------------------------------------------------------------------


def _stored(source: Any, columns: Columns, stream: bool | None, asked: list[str]) -> StoredData | None:
    """Return rows that are read when they are needed, and None where all of them are to be read now."""
    if isinstance(source, StoredData):
        # A model that may have missing values does without them.
        asked = [name for name in asked if name != "missing"]
        if asked or stream is False:
            raise _no_stream(source.name, asked or ["stream=False"], source.is_computed)
        return source.pick(columns)
    if is_collection(source):
        return _computed(source, columns, stream, asked)
    if stream is False:
        return None
    if stream is None and (asked or not _is_stored(source)):
        return None
    found = _large(source, columns) if stream is None else _whatever_size(source, columns, asked)
    if found is None:
        return None
    if found.note:
        logger.warning("%s: columns %s", found.where, found.note)
    return found.data({"stream": True})


def _computed(source: Any, columns: Columns, stream: bool | None, asked: list[str]) -> StoredData:
    """Return the rows of a Dask collection, which may have none missing."""
    where = f"Dask {type(source).__name__}"
    # A model that may have missing values does without them.
    asked = [name for name in asked if name != "missing"]
    if asked or stream is False:
        raise _no_stream(where, asked or ["stream=False"], True)
    rows = dask_rows(source, [columns] if isinstance(columns, str) else columns)
    return StoredData(where, rows, list(rows.names), "computed by Dask", is_computed=True)


def _is_stored(source: Any) -> bool:
    return _is_path(source) and os.path.exists(_expanded(source)) and is_stored(_expanded(source))


def _is_path(source: Any) -> bool:
    is_name = isinstance(source, str) and (source in NAMED or source.startswith(SIMULATE))
    return isinstance(source, str | os.PathLike) and not is_name


def _expanded(source: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(source))


def _large(source: str | os.PathLike[str], columns: Columns) -> Survey | None:
    """Return what is at a path if it is large and can be streamed."""
    try:
        found = survey(source, columns)
    except InvalidInput:
        return None  # reading it into memory takes more, and says what is wrong with what it does not take
    return found if found.size > STREAM_BYTES else None


def _whatever_size(source: Any, columns: Columns, asked: list[str]) -> Survey:
    """Return what is at a path.

    Raises
    ------
    InvalidInput
        If it cannot be streamed.
    """
    if not _is_path(source):
        what = shown(source) if isinstance(source, str) else f"a {type(source).__name__}"
        raise InvalidInput(f"found stream=True with {what}; expected it with {ANY_STORED}; leave it out")
    path = _expanded(source)
    if not os.path.exists(path):
        raise _nothing_called(os.fspath(source))
    if not is_stored(path):
        raise InvalidInput(
            f"found stream=True with the file {flat(path.name)}; expected it with {ANY_STORED}; convert the file to "
            "Parquet with pandas.DataFrame.to_parquet, or leave stream out"
        )
    if asked:
        raise _no_stream(flat(path.name), asked)
    return survey(path, columns)


def _no_stream(where: str, asked: list[str], is_computed: bool = False) -> InvalidInput:
    instead = (
        "bring what its compute() returns" if is_computed else "load the path again with stream=False or --no-stream"
    )
    return InvalidInput(
        f"{where}: found {', '.join(asked)} with rows that are streamed; expected numbers as they are stored, since a "
        f"stream has no labels, missing values or binary pixels; {instead}"
    )


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
    refuse_no_integer(source, "rows", rows, least=2)
    refuse_no_integer(source, "seed", seed, least=0)
    entry = get_entry(source.removeprefix(SIMULATE)).example(seed=int(seed))
    x, labels = entry.simulate_table(int(rows), int(seed))
    description = f"{rows} draws from {entry.name()} with parameters drawn at random, seed {seed}"
    return Dataset(source, x.detach().double(), list(entry.table_names), labels, description)


# ---- files -----------------------------------------------------------------------------------------------------------


def _from_path(source: str, wanted: Wanted, key: str | None) -> Dataset:
    path = _expanded(source)
    where = flat(path.name)
    if not os.path.exists(path):
        raise _nothing_called(source)
    if path.is_dir():
        return _from_folder(Path(os.path.abspath(path)), wanted)
    if not path.is_file():
        raise InvalidInput(f"found no regular file at {source!r}; expected {ANY_FILE}; give the path of one")
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


def _from_folder(path: Path, wanted: Wanted) -> Dataset:
    files, where = parquet_files(path), flat(path.name)
    look_into(files, wanted.columns)  # refuses those that are not alike
    frames = [read_file(file, called) for file, called in files]
    # Names that differ in their spaces are the same in messages and options.
    alike = [frame.set_axis([flat(name) for name in frame.columns], axis=1) for frame in frames]
    return _from_frame(pd.concat(alike), where, wanted, f"the folder {where}, {count(len(files), 'file')}")


def _from_arrays(path: Path, where: str, wanted: Wanted, key: str | None) -> Dataset:
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


def _from_frame(frame: pd.DataFrame, where: str, wanted: Wanted, origin: str) -> Dataset:
    frame = _with_index_levels(frame.set_axis([flat(name) for name in frame.columns], axis=1), wanted.keys)
    known = list(frame.columns)
    refuse_duplicates(where, known)
    if frame.empty:
        found = f"{count(frame.shape[1], 'column')} and {count(len(frame), 'row')}"
        raise InvalidInput(f"{where}: found {found}; expected rows of numbers under a header; bring more data")
    keys = wanted.key_names(where, known)
    names = wanted.names(where, known, keys)
    coded = {name: codes_of(frame[name], where, wanted.missing_labels) for name in keys}
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
        missing=wanted.missing or wanted.missing_labels,
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
        refuse_inexact(where, [str(column.name)], values[:, None], pd.api.types.is_integer_dtype(dtype))
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
    refuse_inexact(where, [str(column.name)], values[:, None], integers[:, None])
    return values


def _tensor_values(x: Tensor) -> npt.NDArray[Any]:
    dense = x.detach().to_dense() if x.layout != torch.strided else x.detach()
    # NumPy knows neither bfloat16 nor the 8-bit floats.
    real = dense.double() if dense.is_floating_point() else dense
    values: npt.NDArray[Any] = real.cpu().resolve_conj().numpy()
    return values


def _from_array(array: npt.NDArray[Any], where: str, wanted: Wanted, origin: str | None = None) -> Dataset:
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
    values, levels = coded_columns(picked, names, keys, where, wanted.missing_labels)
    refuse_inexact(where, names, values, array.dtype.kind in "iu")
    note = f"images of {' x '.join(map(str, image_shape))}" if image_shape else ""
    return Dataset(
        where,
        torch.from_numpy(values),
        names,
        description="; ".join(filter(None, [origin or f"the caller's {where}", note])),
        image_shape=image_shape if wanted.columns is None and not keys else None,
        levels=levels,
        missing=wanted.missing or wanted.missing_labels,
        top=_top(array),
    )


def _top(array: npt.NDArray[Any]) -> float | None:
    """Largest value that a pixel can have, by its type; bytes of zeros and ones are no shades of 255."""
    if array.dtype.name == "uint8":
        return 255.0 if array.size and array.max() > 1 else 1.0
    return 1.0 if array.dtype.name == "bool" else None


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


# ---- words ------------------------------------------------------------------------------------------------


def _first_cells(frame: pd.DataFrame) -> str:
    return short(", ".join(f"{name!r} holds {shown(frame[name].iloc[0])}" for name in frame.columns), 120)
