"""Rows that stay in their files: NumPy arrays and Parquet, a file or a folder of them, read part by part.

A block says where its rows are and reads them when they are asked for, so that it costs nothing to send to another
process, and so that no more than a part of them is ever in memory.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from elbozoo.files import UNNAMED, Mapped, corrupt_parquet, is_array, is_parquet, mapped_array, parquet_files
from elbozoo.inference.rows import Rows
from elbozoo.models.contract.entry import default_names
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.tables import LEAVE_OUT, Columns, Floats, Wanted
from elbozoo.words import count, flat, refuse_duplicates, short

logger = logging.getLogger(__name__)

STREAM_BYTES = 2**29  # in float64; what is larger is left where it is
ROWS_OF_BLOCK = 2**18  # of an array, and of small row groups together: enough to share among the workers of a cluster
PAGES = 2**16  # bytes of a column that are read from a Parquet file at once, rather than all of a row group
FOOTERS = 8  # of Parquet files that are open side by side or one after the other
INEXACT_INTEGER = 2**53  # from here on float64 skips integers, so that different cells could become equal


@dataclass(frozen=True)
class ArrayBlock:
    """A stretch of the rows of a NPY file, (N, D) or (N,).

    The file is mapped anew for each part: pages that stay mapped would count as memory of the process.

    Attributes
    ----------
    path : str
        The file.
    where : str
        What messages call it.
    stamp : tuple of int
        What the file was when it was opened, see :func:`_stamp`.
    first, last : int
        Positions in the file of the first row, and of the one after the last.
    columns : tuple of int
        Positions of the columns; those of all of them if it is empty.
    """

    path: str
    where: str
    stamp: tuple[int, int]
    first: int
    last: int
    columns: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.last - self.first

    def parts(self, chunk: int) -> Iterator[Tensor]:
        """Yield the rows in order, float64, at most ``chunk`` at once.

        Raises
        ------
        InvalidInput
            For numbers that are not finite or that float64 does not hold, and if the file is no longer what it was.
        """
        for start in range(self.first, self.last, chunk):
            yield torch.from_numpy(self._read(start, min(start + chunk, self.last)))

    def pick(self, positions: Sequence[int]) -> ArrayBlock:
        """Return the same rows with the columns at ``positions``."""
        return replace(self, columns=tuple(self.columns[p] if self.columns else p for p in positions))

    def _read(self, start: int, stop: int) -> Floats:
        if _stamp(self.path) != self.stamp:
            raise _changed(self.where)
        array = mapped_array(Path(self.path), self.where)
        width = _shape(array)[1]
        columns = self.columns or tuple(range(width))
        if array.flags.c_contiguous:
            values = _rows_of(array, start, stop, self.columns)
        else:
            values = _columns_of(array, self.path, start, stop, columns)
        may_be_inexact = array.dtype.kind in "iu" and array.dtype.itemsize == 8
        names = [f"x{position}" for position in columns]
        _refuse_unusable(values, names, np.full(len(columns), may_be_inexact), self.where, start)
        return values


def _rows_of(array: Mapped, start: int, stop: int, columns: tuple[int, ...]) -> Floats:
    """Return rows of an array (N, D) or (N,) that lies row by row; no columns stand for all."""
    rows = array[start:stop].reshape(stop - start, -1)
    values: Floats = np.array(rows[:, columns] if columns else rows, dtype=np.float64, order="C")
    return values


def _columns_of(array: Mapped, path: str, start: int, stop: int, columns: tuple[int, ...]) -> Floats:
    """Return rows of an array (N, D) that lies column by column.

    Each stretch is read, since a map of it may take up to 2 MiB of the file into the process around every one.
    """
    values: Floats = np.empty((stop - start, len(columns)))
    for position, column in enumerate(columns):
        offset = array.offset + (column * len(array) + start) * array.itemsize
        values[:, position] = np.fromfile(path, array.dtype, stop - start, offset=offset)
    return values


@dataclass(frozen=True)
class ParquetBlock:
    """Row groups of a Parquet file that follow one another.

    Attributes
    ----------
    path : str
        The file.
    where : str
        What messages call it.
    stamp : tuple of int
        What the file was when it was opened, see :func:`_stamp`.
    groups : tuple of int
        Positions of the row groups.
    first : int
        Position in the file of the first row.
    rows : int
        Number of rows.
    columns : tuple of str
        Names of the columns, as the file spells them.
    """

    path: str
    where: str
    stamp: tuple[int, int]
    groups: tuple[int, ...]
    first: int
    rows: int
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return self.rows

    def parts(self, chunk: int) -> Iterator[Tensor]:
        """Yield the rows in order, float64, at most ``chunk`` at once.

        Raises
        ------
        InvalidInput
            For cells that are missing, not finite or not held by float64, and if the file cannot be read or is no
            longer what it was.
        """
        if _stamp(self.path) != self.stamp:
            raise _changed(self.where)
        read = 0
        for batch in self._batches(chunk):
            yield torch.from_numpy(self._values(batch, self.first + read))
            read += len(batch)
        if read != self.rows:
            raise _changed(self.where)

    def pick(self, positions: Sequence[int]) -> ParquetBlock:
        """Return the same rows with the columns at ``positions``."""
        return replace(self, columns=tuple(self.columns[position] for position in positions))

    def _batches(self, chunk: int) -> Iterator[pa.RecordBatch]:
        try:
            footer = _footer(self.path, *_stamp(self.path))
            # A buffer of all that is asked for would hold whole row groups.
            with parquet.ParquetFile(self.path, metadata=footer, buffer_size=PAGES, pre_buffer=False) as file:
                yield from file.iter_batches(
                    chunk,
                    row_groups=list(self.groups),
                    columns=list(self.columns),
                    use_threads=torch.get_num_threads() > 1,
                )
        # A corrupt file fails anywhere inside Arrow.
        except Exception as error:
            raise corrupt_parquet(self.where, error) from None

    def _values(self, batch: pa.RecordBatch, before: int) -> Floats:
        columns = [batch.column(name) for name in self.columns]
        values: Floats = np.empty((len(batch), len(columns)))
        for position, column in enumerate(columns):
            values[:, position] = _in_float64(column)
        wide = np.array([pa.types.is_integer(column.type) and column.type.bit_width == 64 for column in columns])
        _refuse_unusable(values, [flat(name) for name in self.columns], wide, self.where, before)
        return values


def _in_float64(column: pa.Array) -> Floats:
    """Return a column rounded to float64, NaN where cells are missing."""
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.string())  # Arrow reads digits to the closest float64, and decimals to one beside it
    values: Floats = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


@dataclass(frozen=True)
class StoredData:
    """A table of numbers that stays where it is stored: at least two rows, every column named.

    Attributes
    ----------
    name : str
        Name of the file or folder.
    rows : Rows
        The rows, float64, in the units of the file; that they are finite is seen when they are read.
    columns : list of str
        Names of the D columns, all different.
    description : str
        Where the rows are, and what was left out.
    arguments : dict
        What :func:`~elbozoo.load_data` was told beside the source, by name.
    is_computed : bool
        Whether the rows are what Dask computes, which takes a cluster.
    """

    name: str
    rows: Rows
    columns: list[str]
    description: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    is_computed: bool = False

    @property
    def width(self) -> int:
        """Number of columns D."""
        return len(self.columns)

    def pick(self, columns: Columns) -> StoredData:
        """Return the columns that are wanted, in their order.

        Parameters
        ----------
        columns : sequence of str, optional
            Names of columns; None wants all.

        Returns
        -------
        StoredData
            Its rows stay where they are.

        Raises
        ------
        InvalidInput
            For a column that is not there.
        """
        names = Wanted(columns, (), False, False).names(self.name, self.columns, [])
        if names == self.columns:
            return self
        positions = [self.columns.index(name) for name in names]
        blocks: Any = self.rows.blocks  # each an ArrayBlock or a ParquetBlock
        return replace(self, rows=Rows([block.pick(positions) for block in blocks], names), columns=names)


class Survey(NamedTuple):
    """What is stored at a path, without its rows.

    Attributes
    ----------
    where : str
        What messages call it.
    origin : str
        What it is.
    blocks : list of Block
        Where the rows are.
    names : list of str
        Names of the columns of numbers that are wanted.
    left_out : list of str
        Names of the columns that hold no numbers.
    """

    where: str
    origin: str
    blocks: list[ArrayBlock] | list[ParquetBlock]
    names: list[str]
    left_out: list[str]

    @property
    def size(self) -> int:
        """Bytes of the rows in float64."""
        return 8 * sum(map(len, self.blocks)) * len(self.names)

    @property
    def note(self) -> str:
        """What was left out, in words."""
        return f"left out, no numbers: {', '.join(map(repr, self.left_out))}" if self.left_out else ""

    def data(self, arguments: dict[str, Any]) -> StoredData:
        """Return the data set, which :func:`~elbozoo.load_data` was given the ``arguments`` to make."""
        description = "; ".join(filter(None, [self.origin, self.note]))
        return StoredData(self.where, Rows(self.blocks, self.names), self.names, description, arguments)


def is_stored(path: Path) -> bool:
    """Whether rows at ``path`` can be read part by part, by what it is called: a folder, Parquet or NPY."""
    return path.is_dir() or is_parquet(path) or (is_array(path) and path.suffix.lower() != ".npz")


def stored_rows(path: str | os.PathLike[str], columns: Columns = None) -> Rows:
    """Return the rows at ``path``, which are read when they are asked for; see :func:`survey`."""
    found = survey(path, columns)
    return Rows(found.blocks, found.names)


def survey(path: str | os.PathLike[str], columns: Columns = None) -> Survey:
    """Look at a NPY file, a Parquet file or a folder of Parquet files.

    Parameters
    ----------
    path : path
        Of the file or folder. Files of a folder come in the order of their names.
    columns : sequence of str, optional
        The columns to keep, in this order; by default every numeric one. Booleans are numbers, and text is none.

    Raises
    ------
    InvalidInput
        If it cannot be read, holds fewer than two rows or no numbers, or if its files do not have the same columns.
    """
    place = Path(os.path.abspath(os.path.expanduser(path)))
    where = flat(place.name)
    if not os.path.exists(place):
        raise InvalidInput(f"found nothing at {os.fspath(path)!r}; expected a file or folder; check the path")
    if place.is_dir():
        files = parquet_files(place)
        origin = f"the folder {where}, {count(len(files), 'file')}"
        found = _of_tables(where, origin, look_into(files, columns), columns)
    elif is_parquet(place):
        found = _of_tables(where, f"the file {where}", look_into([(place, where)], columns), columns)
    else:
        found = _of_array(place, where, columns)
    rows = sum(map(len, found.blocks))
    if rows < 2:
        raise InvalidInput(f"{where}: found {count(rows, 'row')}; expected at least 2; bring more data")
    return found


# ---- arrays ----------------------------------------------------------------------------------------------------------


def _of_array(path: Path, where: str, columns: Columns) -> Survey:
    array = mapped_array(path, where)
    if array.dtype.kind not in "biuf":
        raise InvalidInput(
            f"{where}: found dtype {short(str(array.dtype), 60)}; expected real numbers; convert with x.astype(float)"
        )
    if array.ndim not in (1, 2):
        raise InvalidInput(
            f"{where}: found {count(array.ndim, 'dimension')}, shape {array.shape}; expected rows (N, D) or (N,) for a "
            "stream; save x.reshape(len(x), -1), or leave stream out"
        )
    rows, width = _shape(array)
    known = list(default_names(width))
    names = Wanted(columns, (), False, False).names(where, known, [])
    if not names:
        raise InvalidInput(f"{where}: found no column; expected at least 1; bring data with numeric columns")
    picked = () if names == known else tuple(map(known.index, names))
    stamp = _stamp(path)
    blocks = [
        ArrayBlock(os.fspath(path), where, stamp, start, min(start + ROWS_OF_BLOCK, rows), picked)
        for start in range(0, rows, ROWS_OF_BLOCK)
    ]
    return Survey(where, f"the file {where}", blocks, names, [])


def _shape(array: Mapped) -> tuple[int, int]:
    return len(array), 1 if array.ndim == 1 else array.shape[1]


# ---- Parquet ---------------------------------------------------------------------------------------------------------


class Footer(NamedTuple):
    """What a Parquet file says about itself.

    Attributes
    ----------
    path : str
        The file.
    where : str
        What messages call it.
    spelled : dict of str
        As the file spells them, the names of its columns, by their names on one line.
    types : dict
        The type of each column, by name.
    groups : tuple of int
        Number of rows of each row group.
    """

    path: str
    where: str
    spelled: dict[str, str]
    types: dict[str, pa.DataType]
    groups: tuple[int, ...]

    @property
    def numeric(self) -> list[str]:
        """Names of the columns of numbers."""
        return [name for name, kind in self.types.items() if _is_number(kind)]


def look_into(files: Sequence[tuple[Path, str]], columns: Columns) -> list[Footer]:
    """Return what Parquet files, which are one table, say about themselves.

    Parameters
    ----------
    files : sequence of (Path, str)
        The files, and what messages call them.
    columns : sequence of str, optional
        Columns that must be alike; by default all those of numbers.

    Raises
    ------
    InvalidInput
        If a file cannot be read, has two columns of one name, or if one file lacks a column of numbers of another.
    """
    footers = [_footer_of(path, where) for path, where in files]
    wanted = None if columns is None else set(map(flat, [columns] if isinstance(columns, str) else columns))
    for other in footers[1:]:
        for one, two in permutations((footers[0], other)):
            lacking = [name for name in one.numeric if name not in two.numeric and (wanted is None or name in wanted)]
            if lacking:
                name = lacking[0]
                found = f"column {name!r} of {two.types[name]}" if name in two.types else f"no column {name!r}"
                raise InvalidInput(
                    f"{two.where}: found {found}, while that of {one.where} is {one.types[name]}; expected the same "
                    f"columns of numbers in every file; write them alike, or {LEAVE_OUT}"
                )
    return footers


def _footer_of(path: Path, where: str) -> Footer:
    try:
        footer = _footer(os.fspath(path), *_stamp(path))
        with parquet.ParquetFile(path, metadata=footer) as file:
            schema = file.schema_arrow
        groups = tuple(footer.row_group(position).num_rows for position in range(footer.num_row_groups))
        index = (schema.pandas_metadata or {}).get("index_columns", [])
    # A corrupt file fails anywhere inside Arrow.
    except Exception as error:
        raise corrupt_parquet(where, error) from None
    # What pandas wrote as names of the rows is no data, as when pandas reads it.
    fields = [each for each in schema if each.name not in index]
    refuse_duplicates(where, [flat(each.name) for each in fields])
    spelled = {flat(each.name): each.name for each in fields}
    return Footer(os.fspath(path), where, spelled, {flat(each.name): each.type for each in fields}, groups)


def _stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return what changes as a file is written again: the time of that, and its size."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return (0, 0)
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(FOOTERS)
def _footer(path: str, time: int, size: int) -> parquet.FileMetaData:
    """Read the footer of a Parquet file, once for all of its blocks."""
    return parquet.read_metadata(path)


def _is_number(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return any(is_kind(kind) for is_kind in kinds)


def _of_tables(where: str, origin: str, footers: Sequence[Footer], columns: Columns) -> Survey:
    first = footers[0]
    picked = Wanted(columns, (), False, False).names(where, list(first.types), [])
    if columns is None and picked and UNNAMED.fullmatch(picked[0]) and pa.types.is_integer(first.types[picked[0]]):
        logger.warning("%s: left out 1 column without a name (row names)", where)
        picked = picked[1:]
    left_out = [name for name in picked if name not in first.numeric]
    if left_out and (columns is not None or not first.numeric):
        found = f"column {left_out[0]!r} holds {short(str(first.types[left_out[0]]), 40)}"
        raise InvalidInput(f"{first.where}: {found}; expected numbers; convert it, or pick other columns")
    if not picked:
        raise InvalidInput(f"{first.where}: found no column; expected at least 1; bring data with numeric columns")
    names = [name for name in picked if name not in left_out]
    blocks = [block for footer in footers for block in _blocks(footer, names)]
    return Survey(where, origin, blocks, names, left_out)


def _blocks(footer: Footer, names: Sequence[str]) -> Iterator[ParquetBlock]:
    """Yield blocks of the row groups of a file, small ones together."""
    columns, stamp = tuple(footer.spelled[name] for name in names), _stamp(footer.path)
    before = [0, *accumulate(footer.groups)]
    start = 0
    for stop in range(1, len(before)):
        rows = before[stop] - before[start]
        is_last = stop == len(before) - 1
        if rows and (is_last or rows >= ROWS_OF_BLOCK):
            groups = tuple(range(start, stop))
            yield ParquetBlock(footer.path, footer.where, stamp, groups, before[start], rows, columns)
            start = stop


# ---- checks ----------------------------------------------------------------------------------------------------------


def _refuse_unusable(
    values: Floats, names: Sequence[str], wide: npt.NDArray[np.bool_], where: str, before: int
) -> None:
    """Refuse numbers that are not finite, or integers of ``wide`` columns that float64 may have rounded."""
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        value = values[row, column]
        found = "a missing value (NaN)" if np.isnan(value) else f"{value}"
        raise InvalidInput(
            f"{where}: found {found} in column {names[column]!r}, row {before + row + 1}; expected finite numbers, as "
            f"streamed rows cannot be missing any; remove such rows, fill them in, or {LEAVE_OUT}"
        )
    if wide.any():
        refuse_inexact(where, names, values, wide, before)


def refuse_inexact(
    where: str, names: Sequence[str], values: Floats, integer: bool | npt.NDArray[np.bool_], before: int = 0
) -> None:
    """Refuse integers that float64 does not hold exactly, in rows that come after ``before`` others.

    Raises
    ------
    InvalidInput
        With the first such integer.
    """
    bad = np.argwhere((np.abs(values) >= INEXACT_INTEGER) & integer)
    if len(bad):
        row, column = bad[0]
        raise InvalidInput(
            f"{where}: column {names[column]!r}, row {before + row + 1} holds an integer of about "
            f"{values[row, column]:.3g}; expected less than 2**53 in size, which float64 holds exactly; rescale it, or "
            f"{LEAVE_OUT}"
        )


def _changed(where: str) -> InvalidInput:
    return InvalidInput(
        f"{where}: found other rows than when it was opened; expected a file that stays as it is; load the data again"
    )
