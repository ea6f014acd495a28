"""Rows that stay in their files are those that NumPy and Arrow read whole, and no more of them is ever in memory."""

from __future__ import annotations

import decimal
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from elbozoo import stored
from elbozoo.cli import main
from elbozoo.data import Dataset, load_data
from elbozoo.files import parquet_files
from elbozoo.inference.rows import Part, Rows
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.stored import ArrayBlock, ParquetBlock, StoredData, stored_rows

ROWS, CHUNKS = 1_000, (1, 7, 256, 5_000)  # of which some divide neither the rows nor the blocks


def numbers(rows: int = ROWS, columns: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)) * 100


def side_by_side(left: list[Part], right: list[Part]) -> list[Part]:
    return [*left, *right]


def alone(part: Part) -> list[Part]:
    return [part]


def read(rows: Rows, chunk: int) -> np.ndarray:
    """Return all rows by way of ``total``, having looked at how they came."""
    parts = rows.total(alone, side_by_side, chunk)
    assert [part.start for part in parts] == [0, *np.cumsum([len(part.x) for part in parts])[:-1]]
    assert all(0 < len(part.x) <= chunk and part.x.dtype == torch.float64 for part in parts)
    x = torch.cat([part.x for part in parts]).numpy()
    assert len(x) == len(rows)
    return x


def refused(source: Any, match: str, **arguments: Any) -> str:
    """Assert that ``source`` is refused with one line that matches, and return the line."""
    with pytest.raises(InvalidInput, match=match) as error:
        load_data(source, **arguments)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert "expected" in message or message.startswith("unknown")
    return message


def refused_on_reading(source: Any, match: str, chunk: int = 64) -> None:
    """Assert that ``source`` is found and that reading it is refused with one line that matches."""
    data = load_data(source, stream=True)
    with pytest.raises(InvalidInput, match=match) as error:
        list(data.rows.parts(chunk))
    assert len(str(error.value).splitlines()) == 1 and "expected" in str(error.value)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "ROWS_OF_BLOCK", 300)


@pytest.fixture
def npy(tmp_path: Path) -> Any:
    def write(array: np.ndarray, name: str = "data.npy") -> Path:
        np.save(tmp_path / name, array)
        return tmp_path / name

    return write


@pytest.fixture
def table(tmp_path: Path) -> Any:
    def write(columns: dict[str, Any], name: str = "data.parquet", **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(columns), path, **options)
        return path

    return write


# ---- arrays ----------------------------------------------------------------------------------------------------------

ARRAYS = {
    "float64": numbers(),
    "float32": numbers().astype(np.float32),
    "float16": numbers().astype(np.float16),
    "big-endian": numbers().astype(">f8"),
    "Fortran": np.asfortranarray(numbers()),
    "int64": numbers().astype(np.int64) * 2**40,
    "uint8": np.abs(numbers()).astype(np.uint8),
    "bool": numbers() > 0,
    "one dimension": numbers()[:, 0],
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ARRAYS)
def test_rows_of_an_array_are_those_of_numpy(kind: str, npy: Any) -> None:
    array = ARRAYS[kind]
    rows = stored_rows(npy(array))
    whole = array.astype(np.float64).reshape(len(array), -1)
    assert [len(block) for block in rows.blocks] == [300, 300, 300, 100]
    assert rows.names == tuple(f"x{column}" for column in range(whole.shape[1]))
    for chunk in CHUNKS:
        np.testing.assert_array_equal(read(rows, chunk), whole, strict=True)  # bit for bit
    assert not np.array_equal(read(rows, 256), whole[::-1])


@pytest.mark.usefixtures("small_blocks")
def test_columns_of_an_array_come_in_the_order_asked_for(npy: Any) -> None:
    array, path = numbers(), npy(numbers())
    rows = stored_rows(path, ["x2", "x0"])
    assert rows.names == ("x2", "x0")
    np.testing.assert_array_equal(read(rows, 256), array[:, [2, 0]])
    again = load_data(load_data(path, ["x2", "x0"], stream=True), "x0")
    assert isinstance(again, StoredData) and again.columns == ["x0"] == list(again.rows.names)
    np.testing.assert_array_equal(read(again.rows, 256), array[:, [0]])
    refused(path, "unknown column of data.npy 'x9'", columns=["x9"], stream=True)


def test_array_file_is_not_held_open(npy: Any) -> None:
    """A map that stays would count its pages towards the process."""
    path = npy(numbers())
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of maps on this system")
    parts = stored_rows(path).parts(10)
    next(parts)
    assert str(path) not in maps.read_text(encoding="utf-8")
    held = np.load(path, mmap_mode="r")
    assert str(path) in maps.read_text(encoding="utf-8") and len(held) == ROWS


WRONG_NUMBERS = {
    "NaN": (np.nan, r"found a missing value \(NaN\) in column 'x1', row 703"),
    "infinity": (-np.inf, "found -inf in column 'x1', row 703"),
    "integer": (-(2**53), "column 'x1', row 703 holds an integer of about -9.*e[+]15; expected less than"),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", WRONG_NUMBERS)
def test_numbers_that_cannot_be_streamed_are_named_when_read(kind: str, order: Any, npy: Any) -> None:
    wrong, match = WRONG_NUMBERS[kind]
    array = numbers().astype(np.int64 if kind == "integer" else np.float64, order=order)
    array[702, 1] = wrong
    refused_on_reading(npy(array), f"^data.npy: {match}")
    array[702, 1] = 2**53 - 1
    np.testing.assert_array_equal(read(stored_rows(npy(array)), 64), array.astype(np.float64))


def test_sum_that_overflows_is_no_infinite_number(npy: Any) -> None:
    array = np.full((4, 2), 1e308)
    np.testing.assert_array_equal(read(stored_rows(npy(array)), 4), array)


UNREADABLE_ARRAYS = {
    "text": (np.array([["1"], ["2"]]), "data.npy: found dtype <U1; expected real numbers"),
    "complex": (numbers().astype(complex), "data.npy: found dtype complex128"),
    "images": (np.zeros((5, 4, 3)), r"data.npy: found 3 dimensions, shape \(5, 4, 3\); expected rows"),
    "no rows": (np.zeros((0, 3)), "data.npy: found 0 rows; expected at least 2"),
    "one row": (np.zeros((1, 3)), "data.npy: found 1 row; expected at least 2"),
    "no columns": (np.zeros((5, 0)), "data.npy: found no column"),
    "objects": (np.array([{}, 1], dtype=object), "data.npy: found an array of Python objects"),
}


@pytest.mark.parametrize("kind", UNREADABLE_ARRAYS)
def test_arrays_that_cannot_be_streamed_are_refused(kind: str, npy: Any) -> None:
    array, match = UNREADABLE_ARRAYS[kind]
    path = npy(numbers(), "good.npy")
    assert isinstance(load_data(path, stream=True), StoredData)
    np.save(path.with_name("data.npy"), array, allow_pickle=True)
    refused(path.with_name("data.npy"), match, stream=True)


def test_array_file_that_is_not_whole_is_refused(npy: Any, tmp_path: Path) -> None:
    path = npy(numbers())
    data = load_data(path, stream=True)
    path.write_bytes(path.read_bytes()[:-8])
    refused(path, "data.npy cannot be read as NumPy's", stream=True)
    with pytest.raises(InvalidInput, match=r"data\.npy: found other rows than when it was opened"):
        read(data.rows, 64)
    npy(numbers(ROWS - 1))
    with pytest.raises(InvalidInput, match=r"data\.npy: found other rows than when it was opened"):
        read(data.rows, 64)
    np.savez(tmp_path / "x.npz", x=numbers())
    (tmp_path / "x.npz").rename(path)
    refused(path, "data.npy: found a NPZ file under this name", stream=True)


def test_a_file_that_is_written_again_is_refused_when_read(npy: Any, table: Any) -> None:
    """Other numbers in the same shape and type, which only the time of writing tells; a file that stays is read."""
    for write in (npy, lambda x: table({"x": x[:, 0]})):
        data = load_data(write(numbers()), stream=True)
        assert len(read(data.rows, 64)) == ROWS
        path = write(numbers(seed=1))
        later = path.stat().st_mtime_ns + 10**9
        os.utime(path, ns=(later, later))
        with pytest.raises(InvalidInput, match=r"found other rows than when it was opened; .*load the data again"):
            read(data.rows, 64)


def test_names_of_rows_are_no_column_of_a_stream_either(table: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Integers without a name in front, as pandas writes them; picked by name they are a column."""
    path = table({"Unnamed: 0": np.arange(ROWS), "x": numbers()[:, 0]})
    assert load_data(path, stream=True).columns == load_data(path, stream=False).columns == ["x"]
    assert "left out 1 column without a name" in caplog.text
    assert load_data(path, ["Unnamed: 0", "x"], stream=True).columns == ["Unnamed: 0", "x"]


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def mixed(rows: int = ROWS, seed: int = 0) -> dict[str, Any]:
    """Return columns of every kind of number, whose values float64 holds."""
    x = numbers(rows, 1, seed)[:, 0]
    return {
        "double": x,
        "single": x.astype(np.float32),
        "half": x.astype(np.float16),
        "integer": x.astype(np.int64) * 2**40,
        "byte": np.abs(x).astype(np.uint8),
        "is it": x > 0,
        "a.b": -x,
        "a": 2 * x,
        "decimal": pa.array([decimal.Decimal(round(100 * float(value))) / 100 for value in x], pa.decimal128(12, 2)),
    }


def in_float64(columns: dict[str, Any]) -> np.ndarray:
    """Return the columns side by side, by way of Python's numbers."""
    lists = [column.to_pylist() if isinstance(column, pa.Array) else column.tolist() for column in columns.values()]
    return np.array([[float(value) for value in column] for column in lists]).T


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("group", [64, 130, 450, 5_000])
def test_rows_of_parquet_are_those_of_arrow(group: int, table: Any) -> None:
    columns = mixed()
    rows = stored_rows(table(columns, row_group_size=group))
    assert rows.names == tuple(columns) and len(rows) == ROWS
    sizes = [len(block) for block in rows.blocks]
    assert sizes == {64: [320, 320, 320, 40], 130: [390, 390, 220], 450: [450, 450, 100], 5_000: [1_000]}[group]
    for chunk in CHUNKS if group == 130 else (256,):
        np.testing.assert_array_equal(read(rows, chunk), in_float64(columns), strict=True)  # bit for bit
    assert not np.array_equal(read(rows, 256)[1:], in_float64(columns)[:-1])


def test_columns_of_parquet_come_in_the_order_asked_for(table: Any) -> None:
    path, columns = table(mixed()), mixed()
    rows = stored_rows(path, ["is it", "a", "double"])
    expected = in_float64({name: columns[name] for name in ("is it", "a", "double")})
    np.testing.assert_array_equal(read(rows, 256), expected)
    again = load_data(load_data(path, ["is it", "a", "double"], stream=True), ["double", "is it"])
    np.testing.assert_array_equal(read(again.rows, 256), expected[:, [2, 0]])
    refused(path, "unknown column of data.parquet 'duoble'; did you mean 'double'", columns=["duoble"], stream=True)


def test_what_is_no_number_is_left_out_and_said_once(table: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = table({"who": list("abc"), "x": [1.0, 2.0, 4.0], "when": pa.array([1, 2, 3], pa.timestamp("s"))})
    with caplog.at_level(logging.WARNING):
        data = load_data(path, stream=True)
    assert [record.getMessage() for record in caplog.records] == [
        "data.parquet: columns left out, no numbers: 'who', 'when'"
    ]
    assert data.description == "the file data.parquet; left out, no numbers: 'who', 'when'"
    assert (data.name, data.columns, data.width, data.arguments) == ("data.parquet", ["x"], 1, {"stream": True})
    refused(path, "column 'who' holds string; expected numbers; convert it", columns=["x", "who"], stream=True)
    refused(table({"who": ["a", "b"]}), "column 'who' holds string; expected numbers", stream=True)


def test_names_of_rows_that_pandas_wrote_are_no_data(tmp_path: Path) -> None:
    frame = pd.DataFrame({" a ": [1.0, 2.0]}, index=pd.Index([5, 6], name="id"))
    frame.to_parquet(tmp_path / "data.parquet")
    data = load_data(tmp_path / "data.parquet", stream=True)
    assert data.columns == ["a"]
    assert read(data.rows, 5).tolist() == [[1.0], [2.0]]
    frame.reset_index().to_parquet(tmp_path / "data.parquet")
    assert load_data(tmp_path / "data.parquet", stream=True).columns == ["id", "a"]


WRONG_CELLS = {
    "null": (pa.array([1.0] * 702 + [None] * 298), r"found a missing value \(NaN\) in column 'bad one', row 703"),
    "null integer": (pa.array([1] * 702 + [None] * 298), r"found a missing value \(NaN\) in column 'bad one', row 703"),
    "NaN": (np.where(np.arange(ROWS) == 702, np.nan, 1), r"found a missing value \(NaN\) in column 'bad one', row 703"),
    "infinity": (np.where(np.arange(ROWS) == 702, np.inf, 1), "found inf in column 'bad one', row 703"),
    "integer": (
        np.where(np.arange(ROWS) == 702, -(2**53), 1),
        "column 'bad one', row 703 holds an integer of about -9",
    ),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", WRONG_CELLS)
def test_cells_that_cannot_be_streamed_are_named_when_read(kind: str, tmp_path: Path, table: Any) -> None:
    column, match = WRONG_CELLS[kind]
    table(mixed(), "folder/a.parquet")
    table({"good": np.ones(ROWS), "bad one": column}, "other/b.parquet", row_group_size=130)
    refused_on_reading(tmp_path / "other", f"^other/b.parquet: {match}")
    assert read(stored_rows(tmp_path / "other", ["good"]), 64).sum() == ROWS


@pytest.mark.parametrize("harm", [lambda b: b[:100], lambda b: b"", lambda b: b[:-1], lambda b: b"x" * len(b)])
def test_corrupt_parquet_is_refused(harm: Any, table: Any) -> None:
    path = table(mixed())
    good = load_data(path, stream=True)
    path.write_bytes(harm(path.read_bytes()))
    refused(path, r"^data.parquet cannot be read as Parquet \(.*write it again$", stream=True)
    with pytest.raises(InvalidInput, match=r"^data.parquet: found other rows than when it was opened"):
        read(good.rows, 64)


def test_pages_that_are_corrupt_are_refused_when_read(table: Any) -> None:
    path = table({"x": numbers()[:, 0]}, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[100:2_000] = bytes(1_900)
    path.write_bytes(content)
    refused_on_reading(path, r"^data.parquet cannot be read as Parquet")


def test_parquet_that_has_changed_is_refused(table: Any) -> None:
    data = load_data(table({"x": numbers()[:, 0]}), stream=True)
    table({"x": numbers(ROWS + 1)[:, 0]})
    with pytest.raises(InvalidInput, match=r"data\.parquet: found other rows than when it was opened"):
        read(data.rows, 64)


def test_footer_of_a_file_that_was_written_again_is_read_again(table: Any) -> None:
    path = table({"x": [1.0, 2.0]})
    assert read(stored_rows(path), 5).tolist() == [[1.0], [2.0]]
    table({"y": [3, 4, 5]})
    os.utime(path, ns=(1, 1))
    assert read(stored_rows(path), 5).tolist() == [[3.0], [4.0], [5.0]]


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, table: Any) -> Path:
    """Three files of a table in the order of their names, one of them in a folder, and others that hold no rows."""
    for number, name in enumerate(["b.parquet", "c=1/year=2/x.parquet", "d.PQ", ".hidden.parquet", "_delta/a.parquet"]):
        table({"t": np.arange(3.0) + 10 * number, "n": [number] * 3, "who": list("abc")}, f"data/{name}")
    (tmp_path / "data" / "_SUCCESS").write_text("")
    (tmp_path / "data" / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "data" / "empty").mkdir()
    return tmp_path / "data"


EXPECTED = [[t + 10.0 * number, number] for number in range(3) for t in range(3)]


@pytest.mark.parametrize("stream", [None, False, True])
def test_files_of_a_folder_are_one_table(stream: bool | None, folder: Path) -> None:
    data = load_data(folder, stream=stream)
    x = read(data.rows, 2).tolist() if isinstance(data, StoredData) else data.x.tolist()
    assert x == EXPECTED
    assert isinstance(data, StoredData) == (stream is True)
    assert (data.name, data.columns) == ("data", ["t", "n"])
    assert data.description == "the folder data, 3 files; left out, no numbers: 'who'"
    assert data.arguments == ({} if stream is None else {"stream": stream})
    assert [where for _, where in parquet_files(folder)] == ["data/b.parquet", "data/c=1/year=2/x.parquet", "data/d.PQ"]


def test_folder_in_memory_has_labels_and_the_present_folder_a_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(folder, keys=["who"])
    assert isinstance(data, Dataset) and data.levels == {"who": ["a", "b", "c"]} and data.rows == 9
    monkeypatch.chdir(folder)
    assert load_data(".").name == "data" == load_data(".", stream=True).name
    rows = stored_rows(".", "t")
    monkeypatch.chdir(folder.parent)
    assert read(rows, 5)[:, 0].tolist() == [t for t, _ in EXPECTED]  # wherever the process goes


@pytest.mark.parametrize("stream", [None, True])
def test_files_that_are_not_alike_are_refused(stream: bool | None, folder: Path, table: Any) -> None:
    table({"n": [1], "t": pa.array([5], pa.int8()), "who": [b"bytes"]}, "data/e.parquet")
    other = load_data(folder, ["n", "t"], stream=stream)
    x = read(other.rows, 4) if isinstance(other, StoredData) else other.x.numpy()
    assert x.tolist() == [[n, t] for t, n in [*EXPECTED, [5.0, 1.0]]]  # by their names

    table({"t": [1.0]}, "data/e.parquet")
    alike = "expected the same columns of numbers in every file"
    refused(
        folder, f"^data/e.parquet: found no column 'n', while that of data/b.parquet is int64; {alike}", stream=stream
    )
    assert load_data(folder, ["t"], stream=stream).columns == ["t"]
    table({"t": [1.0], "n": ["one"]}, "data/e.parquet")
    refused(folder, f"^data/e.parquet: found column 'n' of string, while that of data/b.parquet is int64; {alike}")
    table({"t": [1.0], "n": [1], "new": [2.0]}, "data/e.parquet")
    refused(
        folder,
        f"^data/b.parquet: found no column 'new', while that of data/e.parquet is double; {alike}",
        stream=stream,
    )


@pytest.mark.parametrize("stream", [None, False, True])
def test_folders_without_a_table_are_refused(stream: bool | None, tmp_path: Path, table: Any) -> None:
    where = tmp_path / "data"
    where.mkdir()
    refused(where, "found a directory at .*data' without Parquet files; expected a CSV", stream=stream)
    (where / "x.csv").write_text("a\n1\n2\n")
    refused(where, "found a directory at .*data' without Parquet files", stream=stream)
    table({"x": [1.0, 2.0]}, "data/train/x.parquet")
    refused(where, "data: found Parquet files in the folder 'train' within it; expected all of them", stream=stream)
    assert len(load_data(where / "train", stream=True).rows) == 2
    table({"x": [1.0, 2.0], "X": [1.0, 2.0]}, "corrupt/x.parquet")
    (where.parent / "corrupt" / "y.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "corrupt", "^corrupt/y.parquet cannot be read as Parquet", stream=stream)
    table({"x": pa.array([], pa.float64())}, "nothing/x.parquet")
    refused(tmp_path / "nothing", "nothing: found .*0 rows; expected", stream=stream)


def test_folder_that_cannot_be_listed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbid)
    with pytest.raises(InvalidInput, match=r"data' cannot be read \(Permission denied\); check the folder"):
        load_data(folder)


# ---- what is streamed, and what is not -------------------------------------------------------------------------------


def test_what_is_large_in_float64_is_streamed(
    npy: Any, table: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array, file = npy(numbers().astype(np.float32)), table(mixed())
    size = {array: 8 * 3 * ROWS, file: 8 * 9 * ROWS, folder: 8 * 2 * 9}
    for path, in_float64 in size.items():
        monkeypatch.setattr("elbozoo.data.STREAM_BYTES", in_float64)
        assert isinstance(load_data(path), Dataset)
        monkeypatch.setattr("elbozoo.data.STREAM_BYTES", in_float64 - 1)
        data = load_data(path)
        assert isinstance(data, StoredData) and data.arguments == {"stream": True}
        assert isinstance(load_data(path, data.columns[:1]), Dataset)  # of fewer columns
        assert isinstance(load_data(path, stream=False), Dataset)


def test_what_a_stream_cannot_give_is_read_into_memory(npy: Any, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elbozoo.data.STREAM_BYTES", 0)
    images = np.arange(60).reshape(5, 4, 3) % 2 > 0
    for arguments in ({}, {"binarise": "threshold"}):
        data = load_data(npy(images), **arguments)
        assert isinstance(data, Dataset) and data.image_shape == (4, 3)
    path = table({"who": [7, 8, 7], "x": [1.0, None, 3.0]})
    assert load_data(path, keys=0, missing=True).levels == {"who": ["7", "8"]}
    assert load_data(path, missing=True).x.isnan().sum() == 1
    assert isinstance(load_data(path), StoredData)
    assert load_data(table({"x": ["1", "2.5"]})).x.tolist() == [[1.0], [2.5]]  # text that spells numbers


REFUSED = {
    "keys": {"keys": ["double"]},
    "keys by position": {"keys": 0},
    "missing": {"missing": True},
    "missing_labels": {"missing_labels": True},
    "binarise": {"binarise": "static"},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_stream_cannot_give_is_refused(what: str, table: Any) -> None:
    path = table(mixed())
    (name,) = list(REFUSED[what])[:1]
    match = f"^data.parquet: found {name} with rows that are streamed; expected numbers as they are stored"
    refused(path, match, stream=True, **REFUSED[what])
    data = load_data(path, stream=True)
    if what == "missing":  # which a model may allow and the data do without
        assert load_data(data, missing=True) is data
    else:
        refused(data, match, **REFUSED[what])
    refused(data, "^data.parquet: found stream=False with rows that are streamed", stream=False)
    assert load_data(data) is load_data(data, stream=True) is data


def test_other_sources_cannot_be_streamed(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=numbers())
    (tmp_path / "x.csv").write_text("a\n1\n2\n")
    for name in ("x.npz", "x.csv"):
        refused(tmp_path / name, f"found stream=True with the file {name}; .*convert the file to Parquet", stream=True)
        assert isinstance(load_data(tmp_path / name, stream=False), Dataset)
    refused(tmp_path / "no.npy", "found no file .*no.npy'; expected a CSV", stream=True)
    refused("iris", "found stream=True with 'iris'; expected it with the path of", stream=True)
    refused("simulate:ppca", "found stream=True with 'simulate:ppca'; expected it with the path of", stream=True)
    refused(numbers(), "found stream=True with a ndarray; expected it with the path of", stream=True)


def test_command_line_fits_the_same_to_a_stream(
    tmp_path: Path, table: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    array = numbers(400, 2) + 500 * (np.arange(400) % 2)[:, None]
    for name, some in (("0", array[:150]), ("1", array[150:])):
        table({"a": some[:, 0], "b": some[:, 1], "who": [name] * len(some)}, f"folder/{name}.parquet")

    def fit(*options: str, components: int = 2) -> dict[str, Any]:
        command = ["elbozoo", "fit", "gaussian-mixture", "--data", str(tmp_path / "folder"), "--columns", "b,a"]
        settings = ["--set", f"components={components}", "--set", "restarts=1"]
        monkeypatch.setattr(sys, "argv", [*command, "--method", "em", *settings, "--json", *options])
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    def evidence(document: dict[str, Any]) -> Any:
        return document["rows"][0]["log_evidence"]

    streamed, held = fit("--stream"), fit("--no-stream")
    assert streamed["data"] == {"name": "folder", "rows": 400, "columns": 2, "arguments": {"stream": True}}
    # Relative: both start from k-means on all rows, and add the same numbers up in parts of other sizes.
    assert evidence(streamed) == pytest.approx(evidence(held), rel=1e-9)
    assert evidence(fit("--stream", components=1)) != pytest.approx(evidence(held), rel=1e-9)


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_pickled_by_what_it_takes_to_find_them(npy: Any, table: Any) -> None:
    array = npy(numbers(50_000))
    file = table({"x": numbers(50_000)[:, 0], "y": numbers(50_000)[:, 1]}, row_group_size=500)
    for path, kind in ((array, ArrayBlock), (file, ParquetBlock)):
        rows = stored_rows(path)
        again = pickle.loads(pickle.dumps(rows))
        assert len(rows.blocks) > 90 and all(type(block) is kind for block in again.blocks)
        np.testing.assert_array_equal(read(again, 7_000), read(rows, 9_000))
        sizes = [len(pickle.dumps(block)) for block in rows.blocks]
        # Bytes: a path of this machine and a few numbers; the rows of a block are 300 times 16 or more.
        assert max(sizes) < 200 + len(os.fsencode(path)) < 4_800 < len(pickle.dumps(next(rows.parts(300)).x))


CHILD = """
import operator, pathlib, sys
from elbozoo.stored import stored_rows

def of_part(part):
    return part.x.sum(0)

def size(what):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**10

def grown(work):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = size("VmRSS")
    total = work()
    print(size("VmHWM") - before, float(total))

small, *large = map(stored_rows, sys.argv[1:])
list(small.parts(2))  # loads what is loaded once
for rows in large:
    grown(lambda: rows.total(of_part, operator.add, 2**14).sum())
    grown(lambda: sum(x.sum() for x in [part.x for part in rows.parts(2**14)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak size from Linux's /proc")
def test_memory_is_that_of_a_part(tmp_path: Path, table: Any) -> None:
    """400 MB as float64, 2.5 million rows of 20 columns, of which 16,384 are read at once: 2.5 MiB."""
    rows, columns = 2_500_000, 20
    paths = [tmp_path / "C.npy", tmp_path / "Fortran.npy", tmp_path / "data.parquet"]
    for path in paths[:2]:
        held = np.lib.format.open_memmap(path, "w+", np.float64, (rows, columns), fortran_order=path == paths[1])
        held[-1] = rows  # the rest is a hole in the file, which takes no space
        del held
    last = np.zeros(rows)
    last[-1] = rows
    as_it_is = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    table({f"c{column}": last for column in range(columns)}, row_group_size=rows, **as_it_is)
    small = table({"x": [1.0, 2.0]}, "small.parquet")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    found = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert [total for _, total in found] == [float(rows * columns)] * 6  # sums of whole numbers
    # MiB: a part, its pages of the file and what is made of it; of Parquet also a page of each column, which are 1 MiB.
    assert max(peak for peak, _ in found[::2]) < 40, found
    assert min(peak for peak, _ in found[1::2]) > 380, found
