"""Log-integrals over one or two dimensions, of many integrands at once, each with an error estimate.

The evidence of a datum under a low-dimensional latent is such an integral. Every rule here is the midpoint rule
on an equally spaced lattice, that is the trapezoid rule shifted by half a cell: for smooth integrands that
vanish at the boundary its error falls faster than any power of the spacing (Trefethen & Weideman 2014, "The
exponentially convergent trapezoidal rule", SIAM Review 56(3), theorem 5.1). Two stages:

1. *Shared lattices* of growing density over one box, the same nodes for all rows: a decoder runs once per node.
2. *Cells of their own* for the rows that no shared lattice resolves: each row keeps the cells in which its integrand
   may matter, and splits them until it is resolved, so that a peak of any width costs some thousand nodes.

The error is the change from the rule before, never less than the square of the change before that (under
geometric convergence the error squares at each step), plus the mass that may lie outside the box, plus rounding.

A peak so narrow that not even its tails show at a spacing of 0.2 ``scale`` cannot be found by any rule; the log
joint of a smooth decoder falls off like a polynomial and has no such peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Shared = Callable[[Int64[Tensor, " r"], Float[Tensor, "g k"]], Float[Tensor, "r g"]]
Rowwise = Callable[[Int64[Tensor, " r"], Float[Tensor, "r g k"]], Float[Tensor, "r g"]]

RADIUS, LARGEST_RADIUS = 6.5, 52.0  # half-width of the box in units of ``scale``: where it starts, how far it may grow
COARSEST, GROWTH = 32, 1.5  # shared lattices: cells per dimension of the first, ratio of one to the next
SHARED_NODES = 2**16  # largest shared lattice
ROOTS = 2**10  # cells of the box that a row begins with when it goes its own way
NEGLIGIBLE = 30.0  # nats below a row's maximum at which a cell is dropped: a share of e^-30
SHELL = 0.9  # the outer shell of the box begins at this share of its half-width
TAIL = 10.0  # mass beyond the box over mass in its shell: 9 for 1/z² tails, far less for all that fall faster
ROUNDING = 1e-12  # relative to max(1, |log value|)
CHUNK = 2**20  # numbers held at once by one evaluation
BLOCK = 2**22  # cells held at once by one block of rows
DEEPEST = 40  # splits of a cell


class Quadrature(NamedTuple):
    """Logarithms of integrals.

    Attributes
    ----------
    log_value : Tensor (N,)
        Log of each integral, nats.
    error : Tensor (N,)
        Estimate of the absolute error of ``log_value``, nats; infinite where there is no finite value.
    nodes : int
        Evaluations of an integrand, over all rows and rules.
    """

    log_value: Tensor
    error: Tensor
    nodes: int


class Integrand(NamedTuple):
    """Log integrands of all rows, seen in coordinates where z = centre + scale * u.

    Attributes
    ----------
    shared : callable
        See :func:`log_integral`.
    rowwise : callable
        See :func:`log_integral`.
    centre, scale : Tensor (K,)
        Middle of the box and its unit of length in each dimension.
    """

    shared: Shared
    rowwise: Rowwise
    centre: Tensor
    scale: Tensor

    def at_common(self, index: Tensor, u: Tensor) -> Tensor:
        """Evaluate rows ``index`` (R,) at the nodes ``u`` (G, K), with the volume element: (R, G)."""
        return self.shared(index, self.centre + self.scale * u) + self.scale.log().sum()

    def at_own(self, index: Tensor, u: Tensor) -> Tensor:
        """Evaluate rows ``index`` (R,) at their own nodes ``u`` (R, G, K), in chunks: (R, G)."""
        size = max(1, CHUNK // 32 // u.shape[1])
        chunks = zip(index.split(size), u.split(size), strict=True)
        return torch.cat([self.rowwise(i, self.centre + self.scale * v) for i, v in chunks]) + self.scale.log().sum()


@torch.no_grad()
def log_integral(
    shared: Shared,
    rowwise: Rowwise,
    rows: int,
    centre: Float[Tensor, " k"],
    scale: Float[Tensor, " k"],
    *,
    tolerance: float = 1e-6,
    max_nodes: int = 2**16,
) -> Quadrature:
    """Return log ∫ exp f_n(z) dz for all rows n, z of one or two dimensions, with an error estimate each.

    Parameters
    ----------
    shared : callable
        ``shared(index, z)``: f of the rows ``index`` (R,) at the common nodes ``z`` (G, K), shape (R, G), nats.
    rowwise : callable
        ``rowwise(index, z)``: f of row ``index[r]`` at its own nodes ``z[r]`` (G, K), shape (R, G). A row may appear
        more than once in ``index``.
    rows : int
        Number N of integrands.
    centre, scale : Tensor (K,)
        Where the mass may lie: mean and standard deviation of the prior for an evidence. float64.
    tolerance : float
        Error in nats, per row, at which to stop.
    max_nodes : int
        Largest rule of one row. A row that needs more stops there and reports the error that it has;
        0 keeps to the shared lattices.

    Returns
    -------
    Quadrature
        Not differentiable.

    Raises
    ------
    ValueError
        For other than one or two dimensions, or a dtype other than float64.
    """
    if len(centre) not in (1, 2) or centre.dtype != torch.float64 or scale.dtype != torch.float64:
        raise ValueError(
            f"found a centre of {len(centre)} dimensions and type {centre.dtype}, scale {scale.dtype}; "
            "expected one or two dimensions in float64"
        )
    integrand = Integrand(shared, rowwise, centre, scale)
    result = _on_shared_lattices(integrand, rows, tolerance)
    radius = RADIUS
    while max_nodes and radius <= LARGEST_RADIUS:
        open_rows = (result.error > tolerance).nonzero()[:, 0]
        if radius > RADIUS:
            open_rows = open_rows[_tail_is_open(result, open_rows, tolerance)]
        if not len(open_rows):
            break
        result = _on_own_cells(integrand, result, open_rows, radius, tolerance, max_nodes)
        radius *= 2
    return result
