"""Each way into the data, and each way it can be refused; every refusal stands beside a near input that is accepted."""

from __future__ import annotations

import decimal
import gzip
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from elbozoo.data import Dataset, list_datasets, load_data
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.registry import get_entry

NAMES = list(list_datasets().index)
STANDARDISED = [name for name in NAMES if name.endswith("-standardised")]
GOOD = [[1.0, 2.0], [3.0, 4.5], [-5.0, 6.0]]


def refused(source: Any, match: str, **arguments: Any) -> str:
    """Assert that ``source`` is refused with one line that matches, and return the line."""
    with pytest.raises(InvalidInput, match=match) as error:
        load_data(source, **arguments)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert "expected" in message or message.startswith("unknown")
    return message


@pytest.fixture
def csv(tmp_path: Path):
    def write(content: str | bytes, name: str = "data.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# ---- named data sets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_table_states_what_is_loaded(name: str) -> None:
    data, facts = load_data(name), list_datasets().loc[name]
    assert (data.rows, data.width) == (facts["rows"], facts["columns"])
    assert data.x.dtype == torch.float64
    assert len(data.columns) == data.width
    assert data.name == name
    assert data.description == facts["description"]
    is_binary = bool(((data.x == 0) | (data.x == 1)).all())
    is_count = bool((data.x == data.x.round()).all() and (data.x >= 0).all())
    assert is_binary == (facts["kind"] == "binary")
    assert is_count == (facts["kind"] in ("binary", "count"))


def test_the_table_cites_its_sources() -> None:
    table = list_datasets()
    assert table.index.name == "name"
    assert list(table.columns) == ["rows", "columns", "kind", "description", "source"]
    assert table["source"].str.contains(r"\b(?:19|20)\d\d\b").all()


@pytest.mark.parametrize(
    "name, classes",
    [("digits", 10), ("digits-binary", 10), ("iris", 3), ("wine", 3), ("breast-cancer", 2), ("diabetes", None)],
)
def test_labels_are_known_where_there_are_classes(name: str, classes: int | None) -> None:
    labels = load_data(name).labels
    assert (labels is None) == (classes is None)
    if labels is not None:
        assert labels.dtype == torch.int64
        assert len(labels.unique()) == classes


def test_digits_are_images_and_binary_digits_are_their_upper_half() -> None:
    digits, binary = load_data("digits"), load_data("digits-binary")
    assert digits.image_shape == binary.image_shape == (8, 8)
    assert (digits.x.min(), digits.x.max()) == (0, 16)
    assert torch.equal(binary.x, (digits.x >= 8).double())
    assert not torch.equal(binary.x, (digits.x > 8).double())


def test_iris_has_the_values_of_fisher() -> None:
    iris = load_data("iris")
    assert iris.x[0].tolist() == [5.1, 3.5, 1.4, 0.2]
    assert iris.columns[2] == "petal length (cm)"
    # Row 35 ends in 0.2 with Fisher and in R, and in 0.1 at UCI.
    assert iris.x[34].tolist() == [4.9, 3.1, 1.5, 0.2]


def test_diabetes_has_columns_of_unit_sum_of_squares() -> None:
    squares = load_data("diabetes").x.square().sum(dim=0)
    # The stored values carry about ten digits.
    torch.testing.assert_close(squares, torch.ones(10, dtype=torch.float64), rtol=0, atol=1e-8)
    assert (load_data("diabetes-standardised").x.square().sum(dim=0) > 400).all()


def test_eight_schools_agrees_with_arviz() -> None:
    import arviz

    schools = load_data("eight-schools")
    assert schools.columns == ["effect", "standard_error"]
    assert schools.x[:, 0].tolist() == arviz.load_arviz_data("centered_eight").observed_data["obs"].values.tolist()
    assert schools.x[:, 1].tolist() == [15, 10, 16, 11, 9, 11, 10, 18]


@pytest.mark.parametrize("name", STANDARDISED)
def test_standardised_columns_have_mean_zero_and_variance_one_over_n(name: str) -> None:
    x, raw = load_data(name).x, load_data(name.removesuffix("-standardised")).x
    # 1e-12 allows a few hundred roundings of 1e-16 relative to values of order 10.
    assert x.mean(dim=0).abs().max() < 1e-12
    assert (x.std(dim=0, correction=0) - 1).abs().max() < 1e-12
    assert (x.std(dim=0, correction=1) - 1).abs().max() > 1e-4
    assert (raw.std(dim=0, correction=0) - 1).abs().max() > 1e-2


def test_every_continuous_set_and_no_other_comes_standardised() -> None:
    table = list_datasets()
    raw = table[~table.index.isin(STANDARDISED)]
    expected = [f"{name}-standardised" for name in raw.index[raw["kind"] == "continuous"]]
    assert sorted(expected) == sorted(STANDARDISED)
    refused("digits-binary-standardised", "unknown data set")


def test_unknown_name_lists_close_matches() -> None:
    assert "'iris'" in refused("irsi", "unknown data set 'irsi'; did you mean")
    assert "'wine-standardised'" in refused("wine-standardized", "did you mean")
    assert "eight-schools" in refused("q", "known: ")


def test_a_name_that_looks_like_a_path_is_a_missing_file() -> None:
    refused("iris.csv", "found no file 'iris.csv'.*check the path")
    refused("nowhere/iris", "found no file")
    refused(Path("iris.parquet"), "found no file")
    refused("~nobody-of-this-name/iris.csv", "found no file")
    refused("a\0b.csv", "found no file")
    refused("x" * 5000 + ".csv", "found no file")


# ---- simulation ------------------------------------------------------------------------------------------------------


def test_simulated_data_repeat_with_their_seed() -> None:
    data = load_data("simulate:ppca", seed=3)
    assert data.rows == 500
    assert (data.name, data.x.dtype) == ("simulate:ppca", torch.float64)
    assert torch.equal(data.x, load_data("simulate:ppca", seed=3).x)
    assert not torch.equal(data.x, load_data("simulate:ppca", seed=4).x)
    x, _ = get_entry("ppca").example(seed=3).simulate(500, 3)
    assert torch.equal(data.x, x)
    assert load_data("simulate:ppca", rows=7).rows == 7


def test_networks_in_single_precision_give_data_in_double() -> None:
    assert get_entry("vae").dtype == torch.float32
    assert load_data("simulate:vae", rows=5).x.dtype == torch.float64


def test_discrete_latents_become_labels_and_continuous_ones_do_not() -> None:
    mixture = load_data("simulate:gaussian-mixture", rows=40)
    assert mixture.labels is not None
    assert mixture.labels.shape == (40,)
    assert load_data("simulate:ppca", rows=40).labels is None


def test_columns_pick_from_simulated_data() -> None:
    data = load_data("simulate:ppca", ["x2", "x0"], rows=7)
    assert torch.equal(data.x, load_data("simulate:ppca", rows=7).x[:, [2, 0]])


def test_unknown_entry_lists_close_matches() -> None:
    refused("simulate:ppac", "unknown model 'ppac'; did you mean 'ppca'")
    refused("simulate:", "unknown model ''")


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"rows": 1}, "rows=1; expected an integer from 2"),
        ({"rows": 2.5}, "rows=2.5"),
        ({"rows": True}, "rows=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": "a"}, "seed='a'"),
    ],
)
def test_senseless_simulations_are_refused(arguments: dict[str, Any], match: str) -> None:
    refused("simulate:ppca", match, **arguments)
    assert load_data("simulate:ppca", rows=np.int64(2), seed=np.int64(1)).rows == 2


def test_rows_go_with_simulation_only() -> None:
    refused("iris", r"rows=10; expected it with simulate:MODEL only", rows=10)


# ---- CSV files -------------------------------------------------------------------------------------------------------

READABLE = {
    "comma": "a,b\n1,2\n3,4.5\n-5,6\n",
    "semicolon": "a;b\n1;2\n3;4.5\n-5;6\n",
    "semicolon, decimal comma": "a;b\n1,0;2\n3;4,5\n-5;6,0\n",
    "tab": "a\tb\n1\t2\n3\t4.5\n-5\t6\n",
    "spaces": "a, b\n1, 2\n3, 4.5\n-5, 6\n",
    "quotes": '"a","b"\n"1","2"\n"3","4.5"\n"-5","6"\n',
    "spaces before quotes": '"a", "b"\n1, "2"\n3, "4.5"\n-5, "6"\n',
    "byte order mark": b"\xef\xbb\xbfa,b\n1,2\n3,4.5\n-5,6\n",
    "byte order mark before quotes": b'\xef\xbb\xbf"a","b"\n1,2\n3,4.5\n-5,6\n',
    "Windows lines": "a,b\r\n1,2\r\n3,4.5\r\n-5,6\r\n",
    "no last newline": "a,b\n1,2\n3,4.5\n-5,6",
    "blank lines": "\na,b\n1,2\n\n3,4.5\n-5,6\n\n",
    "exponents": "a,b\n1e0,2\n3,4.5e0\n-5,6\n",
    "trailing separator": "a,b,\n1,2,\n3,4.5,\n-5,6,\n",
    "row names of pandas": ",a,b\n0,1,2\n1,3,4.5\n2,-5,6\n",
    "row names of a shuffled frame": ",a,b\n17,1,2\n4,3,4.5\n9,-5,6\n",
    "row names of R": '"","a","b"\n"1",1,2\n"2",3,4.5\n"3",-5,6\n',
}


@pytest.mark.parametrize("content", READABLE.values(), ids=READABLE.keys())
def test_readable_files(csv: Any, content: str | bytes) -> None:
    data = load_data(csv(content))
    assert data.columns == ["a", "b"]
    assert data.x.tolist() == GOOD
    assert data.x.dtype == torch.float64
    assert data.name == "data.csv"


@pytest.mark.parametrize("content", ["a\n1\n3\n", '"a,b"\n1\n3\n', "a b\n1\n3\n", "a\n1\n\n3"])
def test_single_column_files(csv: Any, content: str) -> None:
    assert load_data(str(csv(content))).x.tolist() == [[1.0], [3.0]]


def test_a_path_wins_over_no_name_and_a_name_over_a_path(csv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = csv(READABLE["comma"], name="iris")
    monkeypatch.chdir(path.parent)
    assert load_data("iris").width == 4
    assert load_data("./iris").width == 2
    path.rename("measurements")
    assert load_data("measurements").x.tolist() == GOOD


def test_files_are_found_under_the_home_directory(csv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(csv(READABLE["comma"]).parent))
    assert load_data("~/data.csv").rows == 3


def test_decimals_are_read_exactly(csv: Any) -> None:
    x = np.random.default_rng(0).normal(size=200)
    path = csv("a\n" + "\n".join(map(repr, x.tolist())))
    assert load_data(path).x[:, 0].tolist() == x.tolist()
    assert load_data(path).x[:, 0].tolist() != np.nextafter(x, 9).tolist()


def test_columns_without_numbers_are_left_out_and_named(csv: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = csv("when,a,who\n2020-01-01,1,ann\n2020-01-02,2,bob\n")
    with caplog.at_level(logging.WARNING, logger="elbozoo.data"):
        data = load_data(path)
    assert data.columns == ["a"]
    assert "'when', 'who'" in data.description
    assert "data.csv: columns left out, no numbers: 'when', 'who'" in caplog.text
    caplog.clear()
    assert "left out" not in load_data(path, ["a"]).description
    assert not caplog.records


def test_row_names_that_are_left_out_are_reported(csv: Any, caplog: pytest.LogCaptureFixture) -> None:
    load_data(csv(READABLE["row names of R"]))
    assert "left out 1 column without a name" in caplog.text


def test_a_nameless_column_of_measurements_is_kept(csv: Any) -> None:
    assert load_data(csv(",a\n0.5,1\n0.7,2\n")).columns == ["Unnamed: 0", "a"]
    assert load_data(csv(",a\n4,1\n4,2\n")).columns == ["Unnamed: 0", "a"]
    assert load_data(csv("a,\n1,7\n2,8\n")).columns == ["a", "Unnamed: 1"]


def test_booleans_become_zero_and_one(csv: Any) -> None:
    assert load_data(csv("a,b\nTrue,1\nFALSE,2\n")).x[:, 0].tolist() == [1, 0]
    refused(csv("a,b\nTrue,1\n,2\n"), "nan in column 'a', row 2")


@pytest.mark.parametrize(
    "content, columns",
    [
        ("0,1,2\n7,8,9\n7,8,9\n", ["0", "1", "2"]),
        ("1,2,3\n7,8,9\n7,8,9\n", ["1", "2", "3"]),
        ("0,1,2,label\n7,8,9,x\n7,8,9,y\n", ["0", "1", "2"]),
        (",0,1\n0,7,8\n1,7,8\n", ["0", "1"]),
        (",0\n0,7\n1,7\n", ["0"]),
    ],
)
def test_counted_columns_are_a_header(csv: Any, content: str, columns: list[str]) -> None:
    data = load_data(csv(content))
    assert data.columns == columns
    assert data.rows == 2


@pytest.mark.parametrize(
    "header, rows",
    [
        ("a,b", "5.1,3.5\n4.9,3.0\n"),
        ("a,b,species", "5.1,3.5,setosa\n4.9,3.0,setosa\n"),
        ("a,b", "0,1\n1,1\n"),
        ("a", "1\n2\n3\n"),
        ("a", "1.0e+00\n2.0e+00\n"),
        ("a,b", "1,1\n2,3\n"),
    ],
)
def test_a_file_without_header_is_refused(csv: Any, header: str, rows: str) -> None:
    refused(csv(rows), "data.csv: the first line holds numbers .*; expected a header; add column names")
    assert load_data(csv(f"{header}\n{rows}")).rows == rows.count("\n")


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": (b"", "data.csv is empty; expected a header"),
    "blank": (b"\n \n\n", "data.csv is empty"),
    "header only": ("a,b\n", "found 2 columns and 0 rows"),
    "one row": ("a,b\n1,2\n", "found 1 row; expected at least 2"),
    "only row names": (",\n0,\n1,\n", "found 0 columns"),
    "no numbers": ("a,b\nx,y\nz,w\n", "found no numeric column .'a' holds 'x', 'b' holds 'y'.; expected at least 1"),
    "only dates": ("when\n2020-01-01\n2020-01-02\n", "found no numeric column .*'2020-01-01'"),
    "separated by spaces": ("a b\n1 2\n3 4\n", "found no numeric column .*check the separator"),
    "word among numbers": (
        "a,b\n1,2\n3,x\n5,6\n",
        r"column 'b', row 2 holds 'x'; expected a number; correct 1 such cell",
    ),
    "two words": ("a\n1\n2\n3\n?\n4\n-\n", "column 'a', row 4 holds '.'; expected a number; correct 2 such cells of 6"),
    "underscore": ("a\n1_000\n2\n3\n", "row 1 holds '1_000'"),
    "percent": ("a\n1\n2\n3%\n", "row 3 holds '3%'"),
    "long cell": ("a\n1\n2\n" + "x" * 500 + "\n", r"row 3 holds 'x{20,40}\.\.\.; expected"),
    "cell of two lines": ('a\n1\n2\n"x\ny"\n', r"row 3 holds 'x\\ny'"),
    "missing": ("a,b\n1,2\n3,\n5,6\n", r"found 1 missing \(NaN\) or infinite value, first nan in column 'b', row 2"),
    "missing, spelt": ("a,b\n1,2\nNA,4\n5,nan\n", r"found 2 missing .* first nan in column 'a', row 2.*--columns"),
    "infinite": ("a,b\n1,2\n3,4\n5,-inf\n", "first -inf in column 'b', row 3"),
    "overflow": ("a\n1\n1e999\n", "first inf in column 'a', row 2"),
    "no value in a column": ("a,b\n1,\n3,\n", "found 2 missing .* column 'b', row 1"),
    "short row": ("a,b\n1,2\n3\n5,6\n", "nan in column 'b', row 2"),
    "long row": (
        "a,b\n1,2\n3,4,5\n",
        r"cannot be read as CSV \(Expected 2 fields in line 3, saw 3\); .* correct that line",
    ),
    "long first row": ("a,b\n1,2,3\n4,5,6\n", "the first row has more fields than the header"),
    "open quote": ('a,b\n1,"2\n3,4\n', "cannot be read as CSV .*inside string"),
    "twice the same name": ("a,b,a\n1,2,3\n4,5,6\n", "found the column name 'a' twice"),
    "twice, but for spaces": ("a,b,a \n1,2,3\n4,5,6\n", "found the column name 'a' twice"),
    "identifiers": ("id\n9007199254740993\n2\n", r"column 'id', row 1 holds an integer of about 9.01e\+15; .*2\*\*53"),
    "large identifiers": ("id\n1\n123456789012345678901234567890\n", "row 2 holds an integer of about 1.23e"),
    "enormous integers": ("id\n1\n" + "9" * 400 + "\n", "row 2 holds an integer of about inf"),
    "Latin-1": ("naïve,b\n1,2\n3,4\n".encode("latin-1"), r"is not UTF-8 text \(byte 0xef\); .*save it as CSV in UTF-8"),
    "UTF-16": ("a,b\n1,2\n3,4\n".encode("utf-16"), "is not UTF-8 text"),
    "zeros": (bytes(100), "holds binary data"),
    "control characters": (b"a\x07b,c\n1,2\n3,4\n", "holds binary data"),
    "picture": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "is not UTF-8 text"),
    "compressed": (b"\x1f\x8b\x08\x00abc", "is not UTF-8 text"),
}


@pytest.mark.parametrize("content, match", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files_are_refused(csv: Any, content: str | bytes, match: str) -> None:
    refused(csv(content), match)


# Each differs from one of BAD_FILES in the one thing that was wrong with it.
MENDED: dict[str, tuple[str | bytes, tuple[int, int]]] = {
    "two rows": ("a,b\n1,2\n3,4\n", (2, 2)),
    "one numeric column": ("a,b\nx,1\nz,2\n", (2, 1)),
    "years beside dates": ("when,year\n2020-01-01,2020\n2020-01-02,2021\n", (2, 1)),
    "mostly words": ("a,b\nx,1\ny,2\n3,3\n", (3, 1)),
    "half words": ("a,b\nx,1\n3,3\n", (2, 1)),
    "long row in line with the header": ("a,b,c\n1,2,0\n3,4,5\n", (2, 3)),
    "closed quote": ('a,b\n1,"2"\n3,4\n', (2, 2)),
    "names that differ in case": ("a,b,A\n1,2,3\n4,5,6\n", (2, 3)),
    "largest exact integer": ("id\n9007199254740991\n2\n", (2, 1)),
    "large float": ("a\n9.1e15\n1e300\n", (2, 1)),
    "UTF-8": ("naïve,b\n1,2\n3,4\n", (2, 2)),
}


@pytest.mark.parametrize("content, shape", MENDED.values(), ids=MENDED.keys())
def test_mended_files_are_read(csv: Any, content: str | bytes, shape: tuple[int, int]) -> None:
    data = load_data(csv(content))
    assert (data.rows, data.width) == shape


def test_no_warning_of_a_reader_reaches_the_user(csv: Any) -> None:
    path = csv(READABLE["semicolon, decimal comma"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(path)


def test_compressed_files_are_refused_whatever_their_name(csv: Any) -> None:
    refused(csv(gzip.compress(READABLE["comma"].encode()), name="data.csv.gz"), "data.csv.gz is not UTF-8 text")
    assert load_data(csv(READABLE["comma"], name="plain.csv.gz")).rows == 3


def test_directories_and_pipes_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "found a directory at .*; expected a CSV or Parquet file")
    os.mkfifo(tmp_path / "pipe.csv")
    refused(tmp_path / "pipe.csv", "found no regular file")


def test_unreadable_files_are_refused(csv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = csv(READABLE["comma"])

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    assert load_data(path).rows == 3
    monkeypatch.setattr(pd, "read_csv", forbid)
    with pytest.raises(InvalidInput, match=r"cannot be read \(Permission denied\); check") as error:
        load_data(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_whose_name_has_two_lines_is_refused_in_one(csv: Any) -> None:
    refused(csv("a\n1\n", name="two\nlines.csv"), "two lines.csv: found 1 row")
    refused("two\nlines.csv", "found no file")
    refused("two\nlines", "unknown data set")


# ---- picked columns --------------------------------------------------------------------------------------------------


def test_columns_are_picked_in_the_order_given(csv: Any) -> None:
    path = csv("a,b,c,d\n1,2,3,x\n4,5,6,y\n")
    assert load_data(path, ["c", "a"]).x.tolist() == [[3, 1], [6, 4]]
    assert load_data(path, "b").columns == ["b"]
    picked = load_data("iris", ["petal width (cm)"])
    assert torch.equal(picked.x, load_data("iris").x[:, [3]])
    assert picked.labels is not None


def test_an_image_without_all_its_pixels_is_no_image() -> None:
    assert load_data("digits", ["pixel_0_3"]).image_shape is None
    assert load_data("digits").image_shape == (8, 8)


def test_bad_columns_do_no_harm_unless_picked(csv: Any) -> None:
    path = csv("a,b,c\n1,2,x\n3,y,\n5,6,\n")
    assert load_data(path, ["a"]).x.tolist() == [[1], [3], [5]]
    refused(path, "column 'b', row 2 holds 'y'", columns=["a", "b"])
    refused(path, "column 'c', row 1 holds 'x'; expected a number; correct 1 such cell", columns=["c"])


@pytest.mark.parametrize("source", ["iris", np.ones((3, 2)), pd.DataFrame({"x0": [1, 2], "x1": [3, 4]})])
def test_unknown_columns_list_close_matches(source: Any) -> None:
    refused(source, "unknown column of .* 'petal widht'", columns=["petal widht"])
    refused(source, "found an empty list of columns", columns=[])
    known = load_data(source).columns[0]
    refused(source, "found the column name .* twice", columns=[known, known])


def test_close_matches_of_columns() -> None:
    refused("iris", "did you mean 'petal width", columns=["petal widht (cm)"])
    refused(np.ones((3, 2)), "did you mean", columns=["x2"])


# ---- Parquet files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    path = tmp_path / "data.parquet"
    pd.DataFrame({"a": [1, 3, -5], "b": [2, 4.5, 6], "who": list("xyz")}).to_parquet(path)
    return path


def test_parquet_is_read_like_csv(parquet: Path) -> None:
    data = load_data(parquet)
    assert data.x.tolist() == GOOD
    assert data.columns == ["a", "b"]
    assert "'who'" in data.description


def test_the_index_of_a_parquet_file_is_no_data(tmp_path: Path) -> None:
    path = tmp_path / "data.pq"
    pd.DataFrame({"a": [1.0, 2.0]}, index=pd.Index([5, 6], name="id")).to_parquet(path)
    assert load_data(path).columns == ["a"]


@pytest.mark.parametrize(
    "harm", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"a,b\n1,2\n3,4\n", lambda b: b[::-1]]
)
def test_corrupt_parquet_is_refused(parquet: Path, harm: Any) -> None:
    parquet.write_bytes(harm(parquet.read_bytes()))
    refused(parquet, r"data.parquet cannot be read as Parquet \(.*write it again")


def test_harmed_bytes_end_in_data_or_in_one_line(parquet: Path) -> None:
    generator, whole = np.random.default_rng(0), parquet.read_bytes()
    refusals = 0
    for _ in range(100):
        harmed = np.frombuffer(whole, np.uint8).copy()
        harmed[generator.integers(len(harmed), size=10)] = generator.integers(256, size=10)
        parquet.write_bytes(harmed.tobytes())
        try:
            load_data(parquet)
        except InvalidInput as error:
            refusals += 1
            assert len(str(error).splitlines()) == 1
    assert refusals > 50


def test_random_text_ends_in_data_or_in_one_line(csv: Any) -> None:
    generator = np.random.default_rng(0)
    pieces = [b"a", b",", b";", b"\t", b"\n", b"\r", b"1", b".", b'"', b" ", b"\0", b"\xff", b"nan", b"'", b"1,2\n"]
    read = 0
    for _ in range(500):
        choice = generator.choice(len(pieces), size=generator.integers(30))
        try:
            read += load_data(csv(b"a,b\n1,2\n3,4\n" + b"".join(pieces[i] for i in choice))).rows > 1
        except InvalidInput as error:
            assert len(str(error).splitlines()) == 1
    assert 0 < read < 500


# ---- frames ----------------------------------------------------------------------------------------------------------

FRAMES: dict[str, tuple[Any, list[float]]] = {
    "integers": ([1, 2], [1, 2]),
    "booleans": ([True, False], [1, 0]),
    "nullable integers": (pd.array([1, 2], dtype="Int64"), [1, 2]),
    "nullable booleans": (pd.array([True, False], dtype="boolean"), [1, 0]),
    "nullable floats": (pd.array([1.5, 2], dtype="Float64"), [1.5, 2]),
    "Arrow booleans": (pd.array([True, False], dtype="bool[pyarrow]"), [1, 0]),
    "Arrow floats": (pd.array([1.5, 2], dtype="double[pyarrow]"), [1.5, 2]),
    "sparse": (pd.array([0.0, 2.0], dtype="Sparse[float]"), [0, 2]),
    "half precision": (np.array([0.5, 2], dtype=np.float16), [0.5, 2]),
    "objects": (np.array([1, 2.5], dtype=object), [1, 2.5]),
    "decimals": ([decimal.Decimal("1.5"), decimal.Decimal(2)], [1.5, 2]),
    "spelt numbers": (["1.5", "-2"], [1.5, -2]),
    "NumPy scalars as objects": (np.array([np.float32(1.5), np.bool_(True)], dtype=object), [1.5, 1]),
}


@pytest.mark.parametrize("column, expected", FRAMES.values(), ids=FRAMES.keys())
def test_frames_of_numbers(column: Any, expected: list[float]) -> None:
    data = load_data(pd.DataFrame({"a": column}))
    assert data.x[:, 0].tolist() == expected
    assert (data.name, data.columns, data.x.dtype) == ("DataFrame", ["a"], torch.float64)


LEFT_OUT: dict[str, Any] = {
    "dates": pd.to_datetime(["2020-01-01", "2020-01-02"]),
    "durations": pd.to_timedelta([1, 2], unit="s"),
    "categories": pd.Categorical([1, 2]),
    "periods": pd.period_range("2020", periods=2, freq="M"),
    "dates as objects": np.array(pd.to_datetime(["2020-01-01", "2020-01-02"]).to_pydatetime(), dtype=object),
    "lists": pd.Series([[1, 2], [3]]),
    "words": ["x", "y"],
}


@pytest.mark.parametrize("column", LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_frames_with_other_columns(column: Any) -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": column})
    data = load_data(frame)
    assert data.columns == ["a"]
    assert "'b'" in data.description
    refused(frame, "DataFrame: column 'b'", columns=["b"])
    refused(frame[["b"]], "found no numeric column .'b' holds")


BAD_FRAMES: dict[str, tuple[Any, str]] = {
    "missing nullable": (pd.array([1, None], dtype="Int64"), "first nan in column 'a', row 2"),
    "missing boolean": (pd.array([None, True], dtype="boolean"), "first nan in column 'a', row 1"),
    "missing object": (np.array([1.5, None], dtype=object), "first nan in column 'a', row 2"),
    "infinite": ([1.0, np.inf], "first inf in column 'a', row 2"),
    "complex": ([1j, 2], "column 'a' is complex; expected real numbers"),
    "huge integers": ([1, -(2**53)], "column 'a', row 2 holds an integer"),
    "huge unsigned": (np.array([2**63, 1], dtype=np.uint64), "column 'a', row 1 holds an integer"),
    "huge nullable": (pd.array([2**60, None], dtype="Int64"), "column 'a', row 1 holds an integer"),
    "huge objects": (np.array([10**30, 1.5], dtype=object), "column 'a', row 1 holds an integer"),
    "one row": ([1.0], "found 1 row; expected at least 2"),
    "no row": ([], "found 1 column and 0 rows"),
}


@pytest.mark.parametrize("column, match", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_bad_frames_are_refused(column: Any, match: str) -> None:
    refused(pd.DataFrame({"a": column}), match)


def test_names_of_frames() -> None:
    assert load_data(pd.DataFrame(GOOD)).columns == ["0", "1"]
    assert load_data(pd.DataFrame(GOOD), [1]).columns == ["1"]
    assert load_data(pd.DataFrame(GOOD, columns=["two\nlines", " b "]), ["b", "two lines"]).columns == [
        "b",
        "two lines",
    ]
    refused(pd.DataFrame(GOOD, columns=["a", "a"]), "found the column name 'a' twice")
    refused(pd.DataFrame(GOOD, columns=[1, "1"]), "found the column name '1' twice")
    refused(pd.DataFrame(index=[0, 1]), "found 0 columns and 2 rows")


def test_a_series_is_one_column() -> None:
    assert load_data(pd.Series([1, 2])).columns == ["x0"]
    assert load_data(pd.Series([1, 2], name="a")).columns == ["a"]


# ---- arrays and tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.array(GOOD),
        np.array(GOOD, dtype=np.float32),
        np.array(GOOD, dtype=">f8"),
        np.asfortranarray(GOOD),
        np.array(GOOD)[::-1][::-1],
        np.ma.masked_array(GOOD),
        torch.tensor(GOOD),
        torch.tensor(GOOD, requires_grad=True),
        torch.tensor(GOOD, dtype=torch.bfloat16),
        torch.tensor(GOOD).to_sparse(),
    ],
)
def test_arrays_and_tensors_of_numbers(array: Any) -> None:
    data = load_data(array)
    assert data.x.tolist() == GOOD
    assert data.x.dtype == torch.float64
    assert not data.x.requires_grad
    assert data.columns == ["x0", "x1"]
    assert data.name == ("tensor" if isinstance(array, torch.Tensor) else "array")


def test_reversed_arrays_are_read() -> None:
    assert load_data(np.array(GOOD)[::-1]).x.tolist() == GOOD[::-1]


@pytest.mark.parametrize("array", [np.array([1, 0]), np.array([True, False]), torch.tensor([True, False])])
def test_one_dimension_becomes_one_column(array: Any) -> None:
    assert load_data(array).x.tolist() == [[1], [0]]


@pytest.mark.parametrize("array", [np.array(GOOD), torch.tensor(GOOD, dtype=torch.float64)])
def test_arrays_are_copied(array: Any) -> None:
    data = load_data(array)
    array[0, 0] = 99.0
    assert data.x[0, 0] == 1.0


BAD_ARRAYS: dict[str, tuple[Any, str]] = {
    "objects": (np.array([[1, 2], [3, None]], dtype=object), r"dtype object; expected real numbers; convert .*astype"),
    "words": (np.array([["1", "2"], ["3", "4"]]), "array: found dtype <U1"),
    "dates": (np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"), "found dtype datetime64"),
    "records": (np.zeros(3, dtype=[("a", float)]), "found dtype"),
    "complex": (np.ones((3, 2), dtype=complex), "found complex numbers; expected real numbers; split"),
    "complex tensor": (torch.ones(3, 2, dtype=torch.complex64), "tensor: found complex numbers"),
    "conjugate tensor": (torch.ones(3, 2, dtype=torch.complex64).conj(), "tensor: found complex numbers"),
    "three dimensions": (np.ones((3, 2, 2)), r"found 3 dimensions, shape \(3, 2, 2\); expected \(N, D\).*reshape"),
    "three dimensions of a tensor": (torch.ones(3, 2, 2), "tensor: found 3 dimensions"),
    "a scalar": (np.ones(()), "found 0 dimensions"),
    "a scalar tensor": (torch.tensor(1.0), "found 0 dimensions"),
    "no row": (np.ones((0, 2)), "found 0 rows; expected at least 2"),
    "no element": (np.ones(0), "found 0 rows"),
    "one row": (np.ones((1, 2)), "found 1 row; expected at least 2"),
    "one number": (np.ones(1), "found 1 row"),
    "no column": (np.ones((3, 0)), "found no column"),
    "NaN": (np.array([[1, 2], [3, np.nan]]), "found 1 missing .* first nan in column 'x1', row 2"),
    "NaN in a tensor": (torch.tensor([[1, 2], [3, torch.nan]]), "tensor: found 1 missing"),
    "infinity": (np.array([[-np.inf, 2], [3, np.nan]]), "found 2 missing .* first -inf in column 'x0', row 1"),
    "masked": (np.ma.masked_equal([[1, 2], [3, 4]], 3), "first nan in column 'x0', row 2"),
    "huge integers": (np.array([[1, 2], [3, 2**60]]), "column 'x1', row 2 holds an integer"),
    "huge integers in a tensor": (torch.tensor([1, -(2**60)]), "column 'x0', row 2 holds an integer"),
}


@pytest.mark.parametrize("array, match", BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_bad_arrays_are_refused(array: Any, match: str) -> None:
    refused(array, match)


def test_exact_integers_are_read() -> None:
    assert load_data(np.array([2**53 - 1, -5], dtype=np.int64)).x[0, 0] == 2**53 - 1
    assert load_data(np.array([200, 5], dtype=np.uint8)).x[:, 0].tolist() == [200, 5]


@pytest.mark.parametrize("source", [None, 3, [[1, 2], [3, 4]], {"a": [1, 2]}, b"iris"])
def test_other_objects_are_refused(source: Any) -> None:
    refused(source, f"found a {type(source).__name__} as data; expected a data set's name")


# ---- Dataset ---------------------------------------------------------------------------------------------------------


def a_dataset(**changes: Any) -> Dataset:
    fields: dict[str, Any] = {"name": "mine", "x": torch.tensor(GOOD, dtype=torch.float64), "columns": ["a", "b"]}
    return Dataset(**(fields | changes))


def test_a_dataset_passes_through() -> None:
    data = a_dataset(labels=torch.tensor([0, 1, 1]), image_shape=(1, 2))
    assert load_data(data) is data
    assert (data.rows, data.width) == (3, 2)
    picked = load_data(data, ["b"])
    assert picked.x.tolist() == [[2.0], [4.5], [6.0]]
    assert picked.labels is data.labels


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"x": torch.tensor(GOOD)}, "mine: found x of shape .3, 2. and torch.float32; expected .* use load_data"),
        ({"x": torch.ones(3, dtype=torch.float64)}, "found x of shape"),
        ({"columns": ["a"]}, "found 1 column names; expected 2"),
        ({"columns": ["a", "a"]}, "found the column name 'a' twice"),
        ({"labels": torch.zeros(2)}, "found 2 labels; expected 3"),
        ({"image_shape": (2, 2)}, "found 4 pixels in image_shape; expected 2"),
        ({"x": torch.full((3, 2), torch.nan, dtype=torch.float64)}, "found 6 missing"),
    ],
)
def test_a_dataset_refuses_what_cannot_be_fitted(changes: dict[str, Any], match: str) -> None:
    a_dataset()
    with pytest.raises(InvalidInput, match=match) as error:
        a_dataset(**changes)
    assert len(str(error.value).splitlines()) == 1


def test_a_dataset_is_frozen() -> None:
    with pytest.raises(AttributeError):
        a_dataset().name = "yours"  # type: ignore[misc]
