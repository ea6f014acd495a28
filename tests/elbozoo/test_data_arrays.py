"""Images as arrays, and arrays in NPY and NPZ files; every refusal stands beside a near input that is accepted."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elbozoo.data import load_data
from elbozoo.models.contract.errors import InvalidInput

ROWS = np.array([[1.0, 2.0], [3.0, 4.5], [-5.0, 6.0]])
GREY = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4)
COLOUR = np.arange(5 * 3 * 2 * 4, dtype=np.float32).reshape(5, 3, 2, 4)
LABELS = np.array([2, 0, 2])


def refused(source: Any, match: str, **arguments: Any) -> None:
    with pytest.raises(InvalidInput, match=match) as error:
        load_data(source, **arguments)
    assert len(str(error.value).splitlines()) == 1
    assert re.search("expected|unknown", str(error.value))


# ---- images ----------------------------------------------------------------------------------------------------------


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array)


@pytest.mark.parametrize("kind", [np.asarray, as_tensor])
@pytest.mark.parametrize(("images", "shape"), [(GREY, (2, 4)), (COLOUR, (3, 2, 4)), (GREY[:, None], (1, 2, 4))])
def test_images_become_rows_that_know_their_shape(kind: Any, images: np.ndarray, shape: tuple[int, ...]) -> None:
    data = load_data(kind(images))
    assert data.image_shape == shape
    assert data.x.tolist() == [image.ravel().tolist() for image in images]
    assert data.columns[:2] == ["x0", "x1"]
    assert f"images of {' x '.join(map(str, shape))}" in data.description
    # Picked columns are no image any more.
    assert load_data(kind(images), ["x0", "x3"]).image_shape is None


def test_rows_are_no_images() -> None:
    assert load_data(ROWS).image_shape is None
    assert load_data(ROWS[:, 0]).image_shape is None


def test_channels_that_come_last_are_not_guessed_at() -> None:
    refused(np.moveaxis(COLOUR, 1, -1), r"images of shape \(2, 4, 3\), channels last; expected channels first")
    assert load_data(np.moveaxis(np.moveaxis(COLOUR, 1, -1), -1, 1)).image_shape == (3, 2, 4)


def test_the_range_is_known_where_the_type_tells_it() -> None:
    assert load_data(GREY).top == 255
    assert load_data(GREY > 3).top == 1
    assert load_data(GREY.astype(float)).top is None
    assert load_data(torch.tensor(GREY)).top == 255


def test_images_of_unequal_shape_are_told_by_their_shapes() -> None:
    images = np.empty(3, dtype=object)
    images[:] = [np.ones((2, 4)), np.ones((2, 5)), np.ones((2, 4))]
    refused(images, r"found images of unequal shape, such as \(2, 4\) and \(2, 5\); expected one shape; resize or crop")
    images[1] = np.ones((2, 4))
    refused(images, "found dtype object; expected real numbers")
    assert load_data(np.stack(list(images))).image_shape == (2, 4)


# ---- NPY -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def npy(tmp_path: Path):
    def write(array: np.ndarray, name: str = "data.npy", **options: Any) -> Path:
        np.save(tmp_path / name, array, **options)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    "array",
    [ROWS, np.asfortranarray(ROWS), ROWS.astype(">f8"), ROWS.astype(np.float32), ROWS.astype(np.float16)],
    ids=["rows", "by columns", "big-endian", "single", "half"],
)
def test_rows_in_a_file(npy: Any, array: np.ndarray) -> None:
    data = load_data(npy(array))
    assert data.x.tolist() == ROWS.tolist()
    assert (data.name, data.columns, data.labels, data.image_shape) == ("data.npy", ["x0", "x1"], None, None)
    assert data.description == "the file data.npy"
    assert load_data(str(npy(array, "DATA.NPY".lower())), ["x1"]).x.tolist() == ROWS[:, 1:].tolist()


def test_images_and_keys_in_a_file(npy: Any) -> None:
    assert load_data(npy(GREY)).image_shape == (2, 4)
    keyed = load_data(npy(ROWS), keys=[0])
    assert keyed.levels == {"x0": ["1", "3", "-5"]}
    assert keyed.x[:, 0].tolist() == [0, 1, 2]


BAD: dict[str, tuple[np.ndarray, str]] = {
    "objects": (
        np.array([None, 1], dtype=object),
        "array of Python objects, as images of unequal shape or text",
    ),
    "text": (np.array([["1", "2"], ["3", "4"]]), "data.npy: found dtype <U1; expected real numbers"),
    "complex": (ROWS.astype(complex), "data.npy: found complex numbers"),
    "NaN": (np.where(ROWS > 4, np.nan, ROWS), "data.npy: found 2 missing .* first nan in column 'x1', row 2"),
    "infinity": (np.where(ROWS > 4, np.inf, ROWS), "first inf in column 'x1', row 2"),
    "five dimensions": (np.ones((2, 1, 1, 1, 1)), "found 5 dimensions"),
    "one row": (ROWS[:1], "found 1 row; expected at least 2"),
    "huge integers": (np.array([[2**60], [1]]), "column 'x0', row 1 holds an integer"),
}


@pytest.mark.parametrize(("array", "match"), BAD.values(), ids=BAD.keys())
def test_bad_arrays_in_files_are_refused(npy: Any, array: np.ndarray, match: str) -> None:
    refused(npy(array, allow_pickle=True), match)
    assert load_data(npy(ROWS)).rows == 3


def test_damaged_files_are_refused(npy: Any, tmp_path: Path) -> None:
    path = npy(ROWS)
    whole = path.read_bytes()
    for content in (whole[:-3], whole[:20], b"", b"a,b\n1,2\n", b"\x80\x04]\x94."):
        path.write_bytes(content)
        refused(path, "data.npy cannot be read as NumPy's .* expected a whole file")
    path.write_bytes(whole)
    assert load_data(path).rows == 3
    refused(tmp_path / "no.npy", "found no file .*expected a CSV, Parquet, NPY or NPZ file")


def test_missing_values_are_marked_where_they_may_be(npy: Any) -> None:
    data = load_data(npy(np.where(ROWS > 4, np.nan, ROWS)), missing=True)
    assert data.x.isnan().tolist() == [[False, False], [False, True], [False, True]]


# ---- NPZ -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def npz(tmp_path: Path):
    def write(*arrays: np.ndarray, save: Any = np.savez, **named: np.ndarray) -> Path:
        save(tmp_path / "data.npz", *arrays, **named)
        return tmp_path / "data.npz"

    return write


@pytest.mark.parametrize(
    "named",
    [
        {"x": ROWS},
        {"whatever": ROWS},
        {"y": ROWS},
        {"x": ROWS, "y": LABELS},
        {"whatever": ROWS, "labels": LABELS},
        {"x": ROWS, "other": ROWS + 1, "y": LABELS},
        {"images": ROWS, "mask": ROWS > 0},
    ],
    ids=["x", "any name", "y alone", "x and y", "any name and labels", "x among others", "images among others"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_array_that_is_meant(npz: Any, named: dict[str, np.ndarray], save: Any) -> None:
    data = load_data(npz(save=save, **named))
    assert data.x.tolist() == ROWS.tolist()
    has_labels = len(named) > 1 and bool({"y", "labels"} & set(named))
    assert (data.labels is None) != has_labels
    if has_labels:
        assert data.labels is not None and data.labels.tolist() == LABELS.tolist()


def test_an_array_without_a_name(npz: Any) -> None:
    data = load_data(npz(GREY))
    assert (data.image_shape, data.columns[0]) == ((2, 4), "x0")


def test_an_array_is_picked_by_its_key(npz: Any) -> None:
    path = npz(x_train=ROWS, y_train=LABELS, x_test=ROWS[:2] + 1, y_test=LABELS[:2] + 1)
    refused(path, r"found the arrays x_train \(3, 2\), y_train \(3,\), .*; expected one .*; pick it with key=NAME")
    train, test = load_data(path, key="x_train"), load_data(path, key="x_test")
    assert train.x.tolist() == ROWS.tolist() and test.x.tolist() == (ROWS[:2] + 1).tolist()
    assert train.labels is not None and train.labels.tolist() == LABELS.tolist()
    assert test.labels is not None and test.labels.tolist() == (LABELS[:2] + 1).tolist()
    assert train.arguments == {"key": "x_train"}
    refused(path, "unknown array of data.npz 'x_tran'; did you mean 'x_train'", key="x_tran")


def test_several_candidates_are_listed(npz: Any) -> None:
    refused(npz(ROWS, ROWS + 1), r"found the arrays arr_0 \(3, 2\), arr_1 \(3, 2\); expected one that holds the rows")
    refused(npz(x=ROWS, data=ROWS), r"found the arrays x \(3, 2\), data \(3, 2\)")
    assert load_data(npz(ROWS, ROWS + 1), key="arr_1").x.tolist() == (ROWS + 1).tolist()


def test_an_archive_of_images_of_unequal_shape(npz: Any) -> None:
    refused(
        npz(np.ones((2, 4)), np.ones((2, 5))),
        r"found images of unequal shape, arr_0 \(2, 4\), arr_1 \(2, 5\); expected one array .*; resize or crop",
    )
    refused(
        npz(x=np.array([np.ones(2), np.ones(3)], dtype=object)), "array of Python objects, as images of unequal shape"
    )


def test_other_arrays_that_cannot_be_read_do_not_matter(npz: Any) -> None:
    path = npz(x=ROWS, names=np.array([None, "a"], dtype=object))
    assert load_data(path).x.tolist() == ROWS.tolist()
    refused(path, "Python objects", key="names")


def test_labels_that_are_no_classes_are_left_out(npz: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_data(npz(x=ROWS, y=np.array([0.5, 1.0, 2.0]))).labels is None
    assert "left out labels of shape (3,) and dtype float64" in caplog.text
    caplog.clear()
    assert load_data(npz(x=ROWS, y=LABELS.astype(np.uint8))).labels is not None
    assert not caplog.text
    refused(npz(x=ROWS, y=LABELS[:2]), "found 2 labels; expected 3")


def test_damaged_archives_are_refused(npz: Any) -> None:
    path = npz(x=ROWS)
    whole = path.read_bytes()
    for content in (whole[:-30], b"", b"a,b\n1,2\n", whole[:40]):
        path.write_bytes(content)
        refused(path, "data.npz cannot be read as NumPy's")
    # An error within the cells is found by the archive's own checksum.
    start = whole.index(ROWS.tobytes())
    path.write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
    refused(path, "data.npz cannot be read as NumPy's .*CRC")
    with zipfile.ZipFile(path, "w"):
        pass
    refused(path, "found no array; expected at least 1")
    path.write_bytes(whole)
    assert load_data(path).rows == 3


def test_archives_are_told_by_their_content(npz: Any, tmp_path: Path) -> None:
    npz(x=ROWS, other=ROWS + 1).rename(tmp_path / "data.npy")
    assert load_data(tmp_path / "data.npy", key="other").x.tolist() == (ROWS + 1).tolist()
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, ROWS)
    assert load_data(tmp_path / "data.npz").x.tolist() == ROWS.tolist()
    refused(tmp_path / "data.npz", "found key='x' for a single array; expected it for several", key="x")


@pytest.mark.parametrize("kind", ["bool", "uint8", "int64", "float64"])
def test_zeros_and_ones_stay_what_they_are_under_a_threshold(kind: str) -> None:
    """Bytes of zeros and ones are no shades of 255; bytes of shades are."""
    pixels = np.random.default_rng(0).random((10, 6)) > 0.5
    assert (load_data(pixels.astype(kind), binarise="threshold").x.numpy() == pixels).all()
    shades = np.array([[0, 100, 200], [255, 127, 128]], dtype="uint8")
    assert load_data(shades, binarise="threshold").x.tolist() == [[0, 0, 1], [1, 0, 1]]
