"""Sprites: pixels against drawings by hand, every combination of factors once, and a data set that carries them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import elbozoo as ez
from elbozoo.data import Dataset
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.sprites import FACTOR_SIZES, draw_sprite, sprites

BY_HAND = {
    ("square", 1): ["#####"] * 5,
    ("ellipse", 0): [".#.", ".#.", ".#."],
    ("ellipse", 1): ["..#..", ".###.", ".###.", ".###.", "..#.."],
    ("heart", 0): ["###", "###", ".#."],
    ("heart", 1): ["##.##", "#####", "#####", ".###.", "..#.."],
    ("heart", 3): [
        ".###.###.",
        *["#########"] * 4,
        ".#######.",
        "..#####..",
        "...###...",
        "....#....",
    ],
}
SHAPES = ["square", "ellipse", "heart"]


def by_hand(shape: str, scale: int, x: int, y: int) -> np.ndarray:
    """The drawing with its middle at column 4 + x and row 4 + y of an empty image."""
    drawing = np.array([[pixel == "#" for pixel in line] for line in BY_HAND[shape, scale]], dtype=float)
    image, reach = np.zeros((16, 16)), len(drawing) // 2
    image[4 + y - reach : 5 + y + reach, 4 + x - reach : 5 + x + reach] = drawing
    return image


@pytest.mark.parametrize(("shape", "scale"), list(BY_HAND))
@pytest.mark.parametrize(("x", "y"), [(0, 0), (2, 5), (7, 7)])
def test_sprites_are_those_drawn_by_hand(shape: str, scale: int, x: int, y: int) -> None:
    drawn = draw_sprite(SHAPES.index(shape), scale, x, y)
    assert np.array_equal(drawn, by_hand(shape, scale, x, y))
    if x != y:  # negative control: the first coordinate is the column, not the row
        assert not np.array_equal(drawn, by_hand(shape, scale, y, x))


def test_every_combination_of_factors_is_there_once_and_looks_different() -> None:
    found = sprites()
    assert found.images.shape == (768, 256) and found.factors.shape == (768, 4)
    assert len(np.unique(found.factors, axis=0)) == np.prod(FACTOR_SIZES) == 768
    assert [len(np.unique(column)) for column in found.factors.T] == [3, 4, 8, 8]
    assert set(np.unique(found.images)) == {0.0, 1.0}
    assert len(np.unique(found.images, axis=0)) == 768
    # Negative control: without the top row of each shape's pixels some would be the same.
    assert len(np.unique(found.images[:, ::4], axis=0)) < 768


def test_sprites_move_without_changing_and_stay_inside() -> None:
    found = sprites()
    images = found.images.reshape(3, 4, 8, 8, 16, 16)
    for place in range(8):
        assert np.array_equal(images[:, :, place, 0], np.roll(images[:, :, 0, 0], place, axis=-1))
        assert np.array_equal(images[:, :, 0, place], np.roll(images[:, :, 0, 0], place, axis=-2))
    ink = images.sum((-1, -2))
    assert (ink == ink[:, :, :1, :1]).all()  # nothing is cut off at the edges
    assert (np.diff(ink[:, :, 0, 0], axis=1) > 0).all()  # a larger scale has more ink
    assert not np.array_equal(images[:, :, 1, 0], images[:, :, 0, 0])  # negative control: a place is a place


def test_the_data_set_carries_its_factors() -> None:
    data = ez.load_data("sprites")
    assert data.image_shape == (16, 16) and data.factors is not None and data.labels is not None
    assert data.factors.dtype == torch.int64 and data.factor_names == ("shape", "scale", "x", "y")
    assert torch.equal(data.labels, data.factors[:, 0])
    row = (data.factors == torch.tensor([2, 3, 6, 1])).all(-1).nonzero().item()
    assert np.array_equal(data.x[row].reshape(16, 16).numpy(), by_hand("heart", 3, 6, 1))
    assert data.columns[17] == "pixel_1_1"
    assert torch.equal(data.x, ez.load_data("sprites").x)
    # A choice of columns has the same rows, and other data sets have no factors.
    some = ez.load_data(data, columns=["pixel_4_4", "pixel_8_8"])
    assert some.factors is not None and some.image_shape is None
    assert ez.load_data("digits-binary").factors is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": torch.zeros(3, 2, dtype=torch.int64)}, "found 3 rows of factors; expected 4"),
        ({"factor_names": ("one",)}, "found 1 factor names; expected 2"),
    ],
)
def test_factors_that_do_not_agree_are_refused(change: dict[str, object], message: str) -> None:
    x, factors = torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.int64)
    good = Dataset("made", x, ["a"], factors=factors, factor_names=("one", "two"))
    with pytest.raises(InvalidInput, match=message):
        replace(good, **change)
