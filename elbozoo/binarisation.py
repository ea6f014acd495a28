"""Binary pixels from intensities: by a threshold, by one draw, or by a new draw for every step of training.

An intensity between 0 and 1 is taken as the probability that the pixel is on (Salakhutdinov and Murray, On the
quantitative analysis of deep belief networks, 2008, section 4.1, whose binary MNIST is one such draw). Drawn anew
for every step, the same rows keep a model from learning one draw by heart (Burda, Grosse and Salakhutdinov,
Importance weighted autoencoders, 2016, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elbozoo.models.contract.errors import InvalidInput, unknown_name

WAYS = {
    "threshold": "1 where a pixel has at least half of the range",
    "static": "one draw, with the intensity as the probability of 1",
    "stochastic": "one draw to evaluate on, and the intensities, from which each step of training draws anew",
}


class Binary(NamedTuple):
    """Rows (N, D) of zeros and ones, and the intensities (N, D) they were drawn from where they are to be drawn anew.

    Columns that are no pixels are as they were in ``x``, and NaN in ``intensities``.
    """

    x: Tensor
    intensities: Tensor | None


def largest(pixels: Tensor) -> float:
    """Return the intensity that stands for 1 where nobody says: 1 if no pixel exceeds it, and else the largest."""
    return max(1.0, float(pixels.max()))


def binarise(
    x: Tensor, is_pixel: Tensor, how: str, seed: int, *, top: float | None, where: str, columns: Sequence[str]
) -> Binary:
    """Make the pixels of ``x`` (N, D) binary.

    Parameters
    ----------
    is_pixel : Tensor (D,) of bool
        The columns that are pixels.
    how : str
        Key of :data:`WAYS`.
    seed : int
        Seed of the draw.
    top : float or None
        Intensity that stands for 1; None takes 1 if no pixel exceeds it, and else the largest pixel.

    Raises
    ------
    InvalidInput
        For another way, or a pixel outside 0 to ``top``.
    """
    if how not in WAYS:
        raise unknown_name("value of binarise", str(how), WAYS)
    if not is_pixel.any():
        raise InvalidInput(
            f"{where}: found no column of pixels to make binary; expected at least 1; leave binarise out"
        )
    pixels = x[:, is_pixel]
    if top is None:
        top = largest(pixels)
    bad = (~((pixels >= 0) & (pixels <= top))).nonzero().tolist()
    if bad:
        row, column = bad[0]
        names = [name for name, counts in zip(columns, is_pixel.tolist(), strict=True) if counts]
        raise InvalidInput(
            f"{where}: found {pixels[row, column]:g} in column {names[column]!r}, row {row + 1}; expected intensities "
            f"from 0 to {top:g} to make binary; rescale the columns, or pick others"
        )
    intensities = torch.full_like(x, torch.nan)
    intensities[:, is_pixel] = pixels / top
    if how == "threshold":
        return Binary(torch.where(is_pixel, (intensities >= 0.5).to(x.dtype), x), None)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.bernoulli(intensities[:, is_pixel], generator=generator)
    binary = x.clone()
    binary[:, is_pixel] = drawn
    return Binary(binary, intensities if how == "stochastic" else None)
