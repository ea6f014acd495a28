"""IDX files, written here byte by byte: what is read from them, and each way in which they can be wrong."""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import elbozoo as ez
from elbozoo.cli import main
from elbozoo.idx import read_idx
from elbozoo.models.contract.errors import InvalidInput

IMAGES = [[[0, 255, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 128]], [[127, 0, 0], [1, 2, 250]]]
LABELS = [7, 0, 9]
TEST_IMAGES = [[[1, 1, 1], [2, 2, 2]], [[3, 3, 3], [4, 4, 4]]]
TEST_LABELS = [1, 2]

# Code of the type, struct's letter for one big-endian cell, and cells that need all of its bytes.
TYPES = [
    (0x08, "B", [0, 1, 255]),
    (0x09, "b", [-128, 0, 127]),
    (0x0B, "h", [-32768, 258, 32767]),
    (0x0C, "i", [-(2**31), 66051, 2**31 - 1]),
    (0x0D, "f", [-1.5, 0.0, 3.0e38]),
    (0x0E, "d", [-1.5, 1e-300, 3.141592653589793]),
]


def flat(values: Any) -> list[Any]:
    return [cell for value in values for cell in flat(value)] if isinstance(values, list) else [values]


def shape(values: Any) -> list[int]:
    return [len(values), *shape(values[0])] if isinstance(values, list) else []


def idx(values: list[Any], code: int = 0x08, letter: str = "B") -> bytes:
    """Bytes of an IDX file as its description has them, made without NumPy."""
    sizes, cells = shape(values), flat(values)
    header = struct.pack(">BBBB", 0, 0, code, len(sizes)) + b"".join(struct.pack(">I", size) for size in sizes)
    return header + b"".join(struct.pack(f">{letter}", cell) for cell in cells)


MNIST: dict[str, bytes] = {
    "train-images-idx3-ubyte": idx(IMAGES),
    "train-labels-idx1-ubyte": idx(LABELS),
    "t10k-images-idx3-ubyte": idx(TEST_IMAGES),
    "t10k-labels-idx1-ubyte": idx(TEST_LABELS),
}

Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Write:
    def write(files: dict[str, bytes] = MNIST, under: str = ".") -> Path:
        place = tmp_path / under
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (place / name).write_bytes(content)
        return tmp_path

    return write


def refused(match: str, **arguments: Any) -> None:
    with pytest.raises(InvalidInput, match=match) as error:
        ez.load_data(arguments.pop("source", "mnist"), **arguments)
    assert len(str(error.value).splitlines()) == 1
    assert "expected" in str(error.value)


# ---- the reader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "letter", "cells"), TYPES)
def test_every_type_of_cell_is_read(tmp_path: Path, code: int, letter: str, cells: list[Any]) -> None:
    path = tmp_path / "x"
    path.write_bytes(idx([cells, cells[::-1]], code, letter))
    array = read_idx(path)
    # Single precision holds 3e38 as the nearest of its numbers, which struct rounds to as well.
    expected = [struct.unpack(f">{letter}", struct.pack(f">{letter}", cell))[0] for cell in cells]
    assert array.tolist() == [expected, expected[::-1]]
    assert array.dtype.isnative and array.dtype.kind == ("f" if letter in "fd" else "u" if letter == "B" else "i")
    # The same bytes in the other order are other numbers, unless a cell is one byte.
    swapped = [struct.unpack(f"<{letter}", struct.pack(f">{letter}", cell))[0] for cell in cells]
    assert (array[0].tolist() == swapped) == (letter in "Bb")


@pytest.mark.parametrize("values", [[1, 2, 3], [[1, 2], [3, 4]], [[[[5]], [[6]]]]])
def test_any_number_of_dimensions_is_read(tmp_path: Path, values: list[Any]) -> None:
    path = tmp_path / "x"
    path.write_bytes(idx(values))
    assert read_idx(path).tolist() == values
    path.write_bytes(struct.pack(">BBBBB", 0, 0, 8, 0, 42))
    assert read_idx(path).tolist() == 42


def test_compressed_files_are_told_by_their_content(tmp_path: Path) -> None:
    for name in ("x", "x.gz", "x.bin"):
        (tmp_path / name).write_bytes(gzip.compress(idx(IMAGES)))
        assert read_idx(tmp_path / name).tolist() == IMAGES
    (tmp_path / "x.gz").write_bytes(idx(IMAGES))
    assert read_idx(tmp_path / "x.gz").tolist() == IMAGES


GOOD = idx(IMAGES)
PACKED = gzip.compress(GOOD)
WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no IDX file: found nothing at its start"),
    "three bytes": (GOOD[:3], "is no IDX file: found 00 00 08 at its start"),
    "text": (b"label,pixel\n1,2\n", "is no IDX file: found 6c 61 62 65 at its start"),
    "little-endian": (GOOD[:4][::-1] + GOOD[4:], "is no IDX file: found 03 08 00 00"),
    "unknown type": (b"\0\0\x0a\x01" + GOOD[4:], "expected 00 00, one of 08, 09, 0b, 0c, 0d, 0e"),
    "cut in its header": (GOOD[:10], "found the end of the file within its header; expected 3 dimensions"),
    "cut in its cells": (GOOD[:-1], "found 17 bytes after the header; expected 18, for 3 x 2 x 3 cells of 1 byte"),
    "no cell": (GOOD[:16], "found 0 bytes after the header; expected 18"),
    "too long": (GOOD + b"\0", "found more than 18 bytes after the header; expected 18"),
    "promises more than it has": (
        GOOD[:4] + b"\xff" * 12 + GOOD[16:],
        "found 18 bytes after the header; expected 79",
    ),
    "cut gzip": (PACKED[:-9], "found damaged gzip data"),
    "garbled gzip": (PACKED[:12] + b"\xff\xff\xff" + PACKED[15:], "found damaged gzip data"),
    "gzip of another checksum": (PACKED[:-8] + b"\0" * 8, "found damaged gzip data"),
    "gzip of text": (gzip.compress(b"label,pixel\n"), "is no IDX file: found 6c 61 62 65"),
    "pickle": (b"\x80\x04\x95\x00", "is no IDX file: found 80 04 95 00"),
}


@pytest.mark.parametrize(("content", "match"), WRONG.values(), ids=WRONG.keys())
def test_wrong_files_are_refused_in_one_line(folder: Write, content: bytes, match: str) -> None:
    root = folder()
    assert ez.load_data("mnist", root=root).rows == 3
    folder({"train-images-idx3-ubyte": content})
    refused(f"train-images-idx3-ubyte.*{match}", root=root)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nothing' cannot be read \(No such file"):
        read_idx(tmp_path / "nothing")


# ---- the data sets ---------------------------------------------------------------------------------------------------


def test_images_become_rows_with_their_labels(folder: Write) -> None:
    data = ez.load_data("mnist", root=folder())
    assert data.x.tolist() == [flat(image) for image in IMAGES]
    assert data.x.dtype == torch.float64
    assert data.labels is not None and data.labels.tolist() == LABELS
    assert (data.image_shape, data.top, data.name) == ((2, 3), 255.0, "mnist")
    assert data.columns[:4] == ["pixel_0_0", "pixel_0_1", "pixel_0_2", "pixel_1_0"]


def test_the_parts_are_those_of_the_files(folder: Write) -> None:
    root = folder()
    test = ez.load_data("mnist", root=root, split="test")
    assert test.x.tolist() == [flat(image) for image in TEST_IMAGES]
    both = ez.load_data("mnist", root=str(root), split="all")
    assert both.x.tolist() == [flat(image) for image in [*IMAGES, *TEST_IMAGES]]
    assert both.labels is not None and both.labels.tolist() == [*LABELS, *TEST_LABELS]
    assert torch.equal(ez.load_data("mnist", root=root, split="train").x, ez.load_data("mnist", root=root).x)
    refused("mnist: found split='valid'; expected train, test or all", root=root, split="valid")


@pytest.mark.parametrize("under", [".", "MNIST/raw"])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_files_are_found_under_their_usual_names(folder: Write, under: str, dotted: bool, packed: bool) -> None:
    files = {
        (name.replace("-idx", ".idx") if dotted else name) + (".gz" if packed else ""): (
            gzip.compress(content) if packed else content
        )
        for name, content in MNIST.items()
    }
    assert ez.load_data("mnist", root=folder(files, under), split="all").rows == 5


def test_data_sets_of_equal_file_names_are_told_apart_by_their_folders(folder: Write) -> None:
    other = MNIST | {"train-images-idx3-ubyte": idx(IMAGES[::-1])}
    folder(MNIST, "MNIST/raw")
    root = folder(other, "FashionMNIST/raw")
    mnist, fashion = ez.load_data("mnist", root=root), ez.load_data("fashion-mnist", root=root)
    assert fashion.name == "fashion-mnist"
    assert torch.equal(fashion.x, mnist.x.flip(0)) and not torch.equal(fashion.x, mnist.x)
    # Files beside the folders are of nobody's in particular, and come second.
    folder(MNIST | {"train-images-idx3-ubyte": idx([IMAGES[0], IMAGES[0], IMAGES[0]])})
    assert torch.equal(ez.load_data("mnist", root=root).x, mnist.x)


def test_what_is_missing_is_named_with_where_to_put_it(folder: Write, tmp_path: Path) -> None:
    refused(
        r"data set 'mnist': found no root; expected the folder with your files train-images-idx3-ubyte and "
        r"train-labels-idx1-ubyte, plain or ending in .gz; give load_data\('mnist', root=DIR\) or --root DIR"
    )
    missing = r"data set 'mnist': found no file train-labels-idx1-ubyte in '.*' or '.*MNIST/raw'; expected .* put them"
    root = folder({"train-images-idx3-ubyte": idx(IMAGES)})
    refused(missing, root=root)
    refused("found no file t10k-images-idx3-ubyte", root=root, split="test")
    refused("found no file train-images-idx3-ubyte in .*FashionMNIST/raw", source="fashion-mnist", root=tmp_path / "no")
    folder({"train-labels-idx1-ubyte": idx(LABELS)})
    assert ez.load_data("mnist", root=root).rows == 3


IMAGES_AT, LABELS_AT = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
MISMATCHED: dict[str, tuple[dict[str, bytes], str]] = {
    "labels for images": ({IMAGES_AT: idx(LABELS)}, "found uint8 cells in 1 dimension; expected uint8 in 3"),
    "images for labels": ({LABELS_AT: idx(IMAGES)}, "found uint8 cells in 3 dimensions; expected uint8 in 1"),
    "wide cells": ({IMAGES_AT: idx(IMAGES, 0x0C, "i")}, "found int32 cells in 3 dimensions; expected uint8 in 3"),
    "too few labels": ({LABELS_AT: idx([1, 2])}, f"found 2 labels for 3 images in {IMAGES_AT}"),
}


@pytest.mark.parametrize(("files", "match"), MISMATCHED.values(), ids=MISMATCHED.keys())
def test_files_that_do_not_belong_together_are_refused(folder: Write, files: dict[str, bytes], match: str) -> None:
    refused(match, root=folder(MNIST | files))


def test_images_of_unequal_shape_are_refused_together_and_taken_apart(folder: Write) -> None:
    root = folder(MNIST | {"t10k-images-idx3-ubyte": idx([[[1, 2]], [[3, 4]]])})
    refused(r"found images of unequal shape, \(2, 3\) to train with and \(1, 2\) to test with", root=root, split="all")
    assert ez.load_data("mnist", root=root, split="test").image_shape == (1, 2)


def test_arguments_that_a_source_would_not_look_at_are_refused(folder: Write) -> None:
    root = folder()
    refused("found root=.*expected it with mnist or fashion-mnist only", source="iris", root=root)
    refused("found split='test'; expected it with mnist or fashion-mnist only", source="iris", split="test")
    refused("found key='x'; expected it with a NPZ file only", root=root, key="x")


def test_the_list_names_them_without_their_files() -> None:
    table = ez.list_datasets()
    assert table.loc["mnist", "columns"] == table.loc["fashion-mnist", "columns"] == 28 * 28
    assert table.loc["mnist", "kind"] == "count"


def test_from_the_shell(folder: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a root the images are fitted; without one the line says what to give."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(12, 3, 3))
    files = {
        "train-images-idx3-ubyte.gz": gzip.compress(idx(images.tolist())),
        "train-labels-idx1-ubyte.gz": gzip.compress(idx([0, 1] * 6)),
    }
    command = ["elbozoo", "fit", "ppca", "--data", "mnist", "--method", "em", "--set", "latent_dim=1"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("elbozoo: data set 'mnist': found no root; expected the folder")
    monkeypatch.setattr(sys, "argv", [*command, "--root", str(folder(files))])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "ppca on mnist by em (nats, totals over 12 rows)" in capsys.readouterr().out
