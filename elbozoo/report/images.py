"""What a model of images makes of its codes: decoded from a grid, drawn from the prior, reconstructed from rows."""

from __future__ import annotations

import io
from typing import NamedTuple

import matplotlib.image
import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from elbozoo.inference.comparison import Comparison
from elbozoo.inference.fit import Fit
from elbozoo.models.contract.images import ImageShape
from elbozoo.series import Floats, first_fits

GRID = 13  # images along each side of a grid of codes
SHOWN = 12  # rows that are reconstructed, and draws of the prior, side by side
QUANTILES = (0.02, 0.98)
SEED = 0
DRAWN_LINES = 3  # of draws of the prior
PIXELS = 34  # of the screen, for the width of one image
BETWEEN = 0.5


class Decoded(NamedTuple):
    """A picture made of images.

    Attributes
    ----------
    title : str
        Method, seed, and what the images are.
    png : bytes
        The picture.
    width : int
        Pixels of the screen that it may take.
    """

    title: str
    png: bytes
    width: int


def decoded_images(comparison: Comparison) -> list[Decoded]:
    """Return what the first seed of each method decodes; nothing unless the rows are images.

    A code of two numbers is decoded on a grid; of another size, draws from the prior are, and the first rows are
    shown with their reconstructions.
    """
    shape = shape_of(comparison)
    if shape is None:
        return []
    return [picture for fit in first_fits(comparison) if has_code(fit) for picture in _pictures(fit, shape)]


def shape_of(comparison: Comparison) -> ImageShape | None:
    """Return the shape of a row that is an image, as the model has it or the data say; None where it is none."""
    entry = comparison.fits[0].entry
    if entry.image_shape is not None:
        return entry.image_shape
    known = getattr(comparison, "image_shape", None)
    shape = None if known is None else ImageShape(*[1, *known][-3:])
    return shape if shape is not None and shape.size == entry.columns else None


def has_code(fit: Fit) -> bool:
    """Whether each row has one continuous latent."""
    if fit.x is None or fit.x.ndim != 2:
        return False
    sites = fit.entry.latent_sites(fit.x)
    return len(sites) == 1 and sites[0].is_local and not sites[0].is_discrete


def codes_on_grid(fit: Fit) -> Tensor:
    """Return codes (GRID², 2), row by row from the top: quantiles of the prior, or of the codes of the rows."""
    shares = np.linspace(*QUANTILES, GRID)
    (site,) = fit.entry.latent_sites(fit.x)
    if site.is_proper:
        across = down = norm.ppf(shares)
    else:  # a flat prior has no quantiles
        across, down = np.quantile(fit.transform().double().cpu().numpy(), shares, axis=0).T
    grid = np.stack(np.meshgrid(across, down[::-1]), -1)
    return torch.tensor(grid.reshape(-1, 2))


def _pictures(fit: Fit, shape: ImageShape) -> list[Decoded]:
    (site,) = fit.entry.latent_sites(fit.x)
    assert fit.x is not None
    rows, name = fit.x, f"{fit.method}, seed {fit.seed}"
    span = float(rows.min()), float(rows.max())
    if site.dim == 2:
        where = "quantiles of the prior" if site.is_proper else "quantiles of the codes of the rows"
        title = f"{name}: the mean of x at z on a grid of {where}"
        return [_decoded(title, fit.decode(codes_on_grid(fit)), shape, GRID, span)]
    found = []
    if site.is_proper:
        _, z = fit.entry.simulate(DRAWN_LINES * SHOWN, SEED)
        found.append(_decoded(f"{name}: the mean of x at draws of z from its prior", fit.decode(z), shape, SHOWN, span))
    both = torch.cat([rows[:SHOWN], fit.reconstruct()[:SHOWN].to(rows.dtype)])
    title = f"{name}: the first rows, and under each the mean of x at its code"
    return [*found, _decoded(title, both, shape, len(both) // 2, span)]


def _decoded(title: str, rows: Tensor, shape: ImageShape, columns: int, span: tuple[float, float]) -> Decoded:
    tiled = _tiled(rows, shape, columns)
    times = max(1, round(PIXELS / shape.width))
    return Decoded(title, _png(tiled, *span, times), tiled.shape[1] * times)


def _tiled(rows: Tensor, shape: ImageShape, columns: int) -> Floats:
    """Return images side by side as one, (height, width, channels), with a line of one pixel between them."""
    images = rows[:, : shape.size].double().cpu().numpy().reshape(-1, *shape).transpose(0, 2, 3, 1)
    lines = len(images) // columns
    framed = np.full((len(images), shape.height + 1, shape.width + 1, shape.channels), np.nan)
    framed[:, :-1, :-1] = images
    tiled = framed.reshape(lines, columns, *framed.shape[1:]).swapaxes(1, 2)
    whole: Floats = tiled.reshape(lines * framed.shape[1], columns * framed.shape[2], shape.channels)[:-1, :-1]
    return whole


def _png(values: Floats, low: float, high: float, times: int) -> bytes:
    """Return values from ``low``, black, to ``high``, white, as a PNG; what is between images is grey."""
    scaled = np.nan_to_num(np.clip((values - low) / max(high - low, 1e-12), 0, 1), nan=BETWEEN)
    coloured = scaled if scaled.shape[-1] == 3 else np.repeat(scaled[..., :1], 3, axis=-1)
    content = io.BytesIO()
    matplotlib.image.imsave(content, coloured.repeat(times, 0).repeat(times, 1), format="png")
    return content.getvalue()
