"""Sprites: small binary images drawn from four factors that are known, one image for each combination of values.

A square, an ellipse or a heart of one of four sizes stands at one of eight by eight places. A pixel is 1 where its
centre lies in the shape, so that nothing is blurred and nothing is drawn at random: the images are the same on every
machine. They are a small relative of dSprites (Matthey et al. 2017), whose heart is one of these shapes too, and
serve the same end: whoever claims that latent dimensions have found the factors can be held to the factors.

References
----------
```bibtex
@misc{matthey2017dsprites,
  author = {Matthey, Loic and Higgins, Irina and Hassabis, Demis and Lerchner, Alexander},
  title = {d{S}prites: Disentanglement testing Sprites dataset},
  howpublished = {https://github.com/deepmind/dsprites-dataset/}, year = {2017}
}
```
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SIDE = 16  # pixels
REACHES = (1, 2, 3, 4)  # of each scale, pixels from the middle one to the edge: 3, 5, 7 and 9 pixels across
PLACES = 8  # along each side, one pixel apart
FIRST_PLACE = 4  # the pixel of the first one, so that the largest sprite stays inside the image at every place

Inside = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], npt.NDArray[np.bool_]]


def in_square(right: npt.NDArray[np.float64], up: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether points lie in the square [-1, 1]²."""
    return np.maximum(np.abs(right), np.abs(up)) <= 1


def in_ellipse(right: npt.NDArray[np.float64], up: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether points lie in an upright ellipse with half axes 0.6 and 1."""
    return (right / 0.6) ** 2 + up**2 <= 1


def in_heart(right: npt.NDArray[np.float64], up: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether points lie in the heart (x² + y² - 1)³ <= x² y³, moved and scaled to fill [-1, 1]²."""
    x, y = 1.14 * right, 1.12 * up + 0.12
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


SHAPES: dict[str, Inside] = {"square": in_square, "ellipse": in_ellipse, "heart": in_heart}
FACTOR_NAMES = ("shape", "scale", "x", "y")
FACTOR_SIZES = (len(SHAPES), len(REACHES), PLACES, PLACES)


class Sprites(NamedTuple):
    """All sprites, in the order of their factors, the last of which changes fastest.

    Attributes
    ----------
    images : array (N, 256)
        Zeros and ones; the pixels of a row of the image stand together, the top row first.
    factors : array (N, 4) of int64
        Of each image, from 0: shape, scale, x (place from the left) and y (place from the top).
    """

    images: npt.NDArray[np.float64]
    factors: npt.NDArray[np.int64]


def sprites() -> Sprites:
    """Draw the sprites of all combinations of factors."""
    factors = np.array(list(itertools.product(*map(range, FACTOR_SIZES))), dtype=np.int64)
    return Sprites(np.stack([draw_sprite(*row).ravel() for row in factors.tolist()]), factors)


def draw_sprite(shape: int, scale: int, x: int, y: int) -> npt.NDArray[np.float64]:
    """Draw the sprite with these factors, each counted from 0: (16, 16), zeros and ones, the top row first."""
    pixels = np.arange(SIDE, dtype=np.float64)
    half_width = REACHES[scale] + 0.5
    right = (pixels - FIRST_PLACE - x) / half_width
    up = -(pixels - FIRST_PLACE - y) / half_width
    inside = list(SHAPES.values())[shape](right[None, :], up[:, None])
    return inside.astype(np.float64)
