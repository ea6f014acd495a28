"""The posterior of single rows on a grid, where at most two real dimensions are latent: what q can be held against."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from elbozoo.inference.row_density import RowDensity
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, supports_quadrature
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

POINTS = 101  # along each axis
PRIOR_DRAWS = 2000
# A normal has less than 1e-8 of its mass beyond; the first grid only has to find the posterior.
WIDE, REACH = 6.0, 6.0
ZOOMS = 3


class PosteriorGrid(NamedTuple):
    """p(z given x_n) of B rows, each on a grid of its own; sites stand side by side as the program draws them.

    Attributes
    ----------
    nodes : Tensor (B, G, K)
        Points.
    density : Tensor (B, G)
        Posterior density there.
    mean, sd : Tensor (B, K)
        Posterior mean and standard deviation.
    """

    nodes: Tensor
    density: Tensor
    mean: Tensor
    sd: Tensor

    @property
    def points(self) -> int:
        """Number of points along each axis."""
        return round(self.nodes.shape[1] ** (1 / self.nodes.shape[2]))


def posterior_on_grid(entry: Entry, x: Tensor, points: int = POINTS) -> PosteriorGrid:
    """Return the posterior of the rows ``x`` (B, D) at the θ of ``entry``, finite latents summed out.

    The grid covers the prior at first and then what the posterior fills, six standard deviations to each side, so that
    the trapezoid rule on it errs far below what a picture can show.

    Parameters
    ----------
    entry : Entry
        A program whose latents are at most two reals of each row, with finite ones beside them.
    x : Tensor (B, D)
        Rows.
    points : int
        Points along each axis.

    Raises
    ------
    InvalidInput
        For a program with other latents.
    """
    if not supports_quadrature(entry.latent_sites(x)):
        raise InvalidInput(
            f"found the latents {[site.name for site in entry.latent_sites(x)]} of {entry.name()}, expected at most "
            "two real numbers of each row under a proper prior; compare q with draws of nuts, or not at all"
        )
    with isolated(0), torch.no_grad():
        rows = [_of_row(RowDensity(entry, Batch.full(row[None])), points) for row in x]
    return PosteriorGrid(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _of_row(density: RowDensity, points: int) -> PosteriorGrid:
    draws = density.prior_draws(PRIOR_DRAWS)[:, 0]
    centre, scale = draws.mean(0), draws.std(0) * WIDE / REACH
    for _ in range(ZOOMS):
        grid = _on_grid(density, centre, scale, points)
        # A posterior narrower than the spacing has no width on this grid, and is looked at more closely.
        spacing = 2 * REACH * scale / (points - 1)
        centre, scale = grid.mean, torch.maximum(grid.sd, spacing)
    return _on_grid(density, centre, scale, points)


def _on_grid(density: RowDensity, centre: Tensor, scale: Tensor, points: int) -> PosteriorGrid:
    steps = torch.linspace(-REACH, REACH, points, dtype=centre.dtype)
    standard = torch.cartesian_prod(*[steps] * len(centre)).reshape(-1, len(centre))
    nodes = centre + scale * standard
    log_joint = density.log_joint(nodes[:, None])[:, 0]
    weights = log_joint.softmax(0)
    mean = weights @ nodes
    sd = (weights @ (nodes - mean).square()).sqrt()
    cell = math.prod((scale * 2 * REACH / (points - 1)).tolist())
    return PosteriorGrid(nodes, weights / cell, mean, sd)
