"""IDX files, the format of MNIST and of what is laid out like it: a reader, and where the files are looked for.

An IDX file is two zero bytes, a byte for the type of the cells, a byte for the number of dimensions, each dimension as
a 32-bit integer, and the cells in row-major order; all numbers are big-endian (Y. LeCun, C. Cortes and C. J. C.
Burges, The MNIST database of handwritten digits, 1998, "File formats for the MNIST database").
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from elbozoo.models.contract.errors import InvalidInput
from elbozoo.words import count, flat, short

CELL_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP = b"\x1f\x8b"
CHUNK = 2**20
PARTS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
AGAIN = "copy or download it again"


class LabelledImages(NamedTuple):
    """Images (N, H, W), each pixel a byte, and the class of each, (N,)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def load_labelled_images(name: str, root: str | os.PathLike[str] | None, folder: str, split: str) -> LabelledImages:
    """Read images and labels from the IDX files of the user.

    Parameters
    ----------
    name : str
        Name of the data set, for messages.
    root : path or None
        Folder that holds the files, or that holds ``folder``.
    folder : str
        Where torchvision puts the files below its ``root``.
    split : str
        ``train``, ``test``, or ``all`` for both, those to train with first.

    Raises
    ------
    InvalidInput
        If a file is not there, cannot be read, or does not hold what its name says.
    """
    if split not in PARTS:
        raise InvalidInput(f"{name}: found split={split!r}; expected train, test or all; change split")
    files = [f"{part}-{what}" for part in PARTS[split] for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if root is None:
        raise InvalidInput(
            f"data set {name!r}: found no root; expected the folder with your files {_and(files)}, plain or ending in "
            f".gz; give load_data({name!r}, root=DIR) or --root DIR"
        )
    # The folder of this data set first, since the files of all such data sets have the same names.
    top = Path(os.path.expanduser(root))
    places = [top / folder, top]
    found = [_found(name, file, places, files) for file in files]
    parts = [_labelled(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
    shapes = [part.images.shape[1:] for part in parts]
    if len(set(shapes)) > 1:
        raise InvalidInput(
            f"data set {name!r}: found images of unequal shape, {shapes[0]} to train with and {shapes[1]} to test "
            "with; expected one shape; take split=train or split=test"
        )
    return LabelledImages(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Return the array in an IDX file, which may be compressed by gzip, in the byte order of this machine.

    Raises
    ------
    InvalidInput
        If the file cannot be read, is no IDX file, or is cut short or too long.
    """
    where = flat(path.name)
    try:
        with path.open("rb") as file:
            is_compressed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            if not is_compressed:
                return _read(file, where)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _read(unpacked, where)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInput(
            f"{where}: found damaged gzip data ({short(flat(error), 80)}); expected a whole file; {AGAIN}"
        ) from None
    except OSError as error:
        raise InvalidInput(f"{str(path)!r} cannot be read ({flat(error.strerror or error)}); check the file") from None


def _read(file: BinaryIO, where: str) -> npt.NDArray[Any]:
    dtype, shape = _header(file, where)
    size = math.prod(shape) * dtype.itemsize
    # One byte more would be too long a file; a header that promises more than there is must not fill the memory.
    cells = _at_most(file, size + 1)
    if len(cells) != size:
        found = f"more than {size}" if len(cells) > size else str(len(cells))
        raise InvalidInput(
            f"{where}: found {found} bytes after the header; expected {size}, for {_times(shape)} cells of "
            f"{count(dtype.itemsize, 'byte')}; {AGAIN}"
        )
    return np.frombuffer(cells, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _header(file: BinaryIO, where: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in CELL_TYPES:
        start = " ".join(f"{byte:02x}" for byte in magic) or "nothing"
        known = ", ".join(f"{code:02x}" for code in CELL_TYPES)
        raise InvalidInput(
            f"{where} is no IDX file: found {start} at its start; expected 00 00, one of {known} and the number of "
            "dimensions; give the original file"
        )
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise InvalidInput(
            f"{where}: found the end of the file within its header; expected {count(magic[3], 'dimension')}; {AGAIN}"
        )
    return np.dtype(CELL_TYPES[magic[2]]), tuple(int(size) for size in np.frombuffer(sizes, ">u4"))


def _at_most(file: BinaryIO, size: int) -> bytes:
    chunks, left = [], size
    while left and (chunk := file.read(min(left, CHUNK))):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


def _found(name: str, file: str, places: list[Path], files: list[str]) -> Path:
    # Some copies of the files have a dot in the place of the second dash.
    spellings = [file, file.replace("-idx", ".idx")]
    for place in places:
        for spelling in spellings:
            for path in (place / spelling, place / f"{spelling}.gz"):
                if path.is_file():
                    return path
    looked = " or ".join(repr(str(place)) for place in reversed(places))
    raise InvalidInput(
        f"data set {name!r}: found no file {file} in {looked}; expected {_and(files)}, plain or ending in .gz; put "
        "them there"
    )


def _labelled(images_at: Path, labels_at: Path) -> LabelledImages:
    images, labels = read_idx(images_at), read_idx(labels_at)
    for path, array, dimensions, what in ((images_at, images, 3, "images"), (labels_at, labels, 1, "labels")):
        if array.dtype != np.uint8 or array.ndim != dimensions:
            raise InvalidInput(
                f"{flat(path.name)}: found {array.dtype} cells in {count(array.ndim, 'dimension')}; expected uint8 in "
                f"{dimensions}, as {what} have; give the original file"
            )
    if len(images) != len(labels):
        raise InvalidInput(
            f"{flat(labels_at.name)}: found {count(len(labels), 'label')} for {count(len(images), 'image')} in "
            f"{flat(images_at.name)}; expected one for each; give files that belong together"
        )
    return LabelledImages(images, labels.astype(np.int64))


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _and(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
