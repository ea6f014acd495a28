"""Log-integrals over one or two dimensions, of many integrands at once, each with an error estimate.

The evidence of a datum under a low-dimensional latent is such an integral. Every rule here is the midpoint rule
on an equally spaced lattice, that is the trapezoid rule shifted by half a cell: for smooth integrands that
vanish at the boundary its error falls faster than any power of the spacing (Trefethen & Weideman 2014, "The
exponentially convergent trapezoidal rule", SIAM Review 56(3), theorem 5.1). Two stages:

1. *Shared lattices* of growing density over one box, the same nodes for all rows: a decoder runs once per node.
2. *Cells of their own* for the rows that no shared lattice resolves: each row keeps the cells in which its integrand
   may matter, and splits them until it is resolved, so that a peak of any width costs some ten thousand nodes.

Rows with mass near the boundary do the same again in boxes of twice, four and eight times the size. The error is how
far the last rules are from each other, plus the mass that may lie outside the box, plus rounding.

What goes wrong: a peak so narrow that not even its tails show at a spacing of 0.2 ``scale``, beside one that does,
cannot be found by any rule. The log joint of a smooth decoder falls off like a polynomial and has no such peak.
Integrands with kinks, such as those of a relu decoder, converge like a power of the spacing only: they stop at
the largest rule with the error that they have, and about one in two hundred has more than its estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Shared = Callable[[Int64[Tensor, " r"], Float[Tensor, "g k"]], Float[Tensor, "r g"]]
Common = Callable[[Float[Tensor, "g k"]], Float[Tensor, " g"]]
Rowwise = Callable[[Int64[Tensor, " r"], Float[Tensor, "r g k"]], Float[Tensor, "r g"]]

RADII = (6.5, 13.0, 26.0, 52.0)  # half-widths of the box, in units of ``scale``
COARSEST, GROWTH = 32, 1.5  # shared lattices: cells per dimension of the first, ratio of each to the one before
SHARED_NODES = 550**2  # largest shared lattice
HOPELESS = 1.0  # nats of change at which a row leaves the shared lattices, from a hundred cells per dimension on
ROOTS = 2**10  # cells of the smallest box that a row's own cells descend from
NEGLIGIBLE = 30.0  # nats below a row's maximum at which a cell is dropped: e^-30 of the mass
SHELL = 0.9  # the outer shell of the box begins at this share of its half-width
TAIL = 10.0  # bound on mass beyond the box over mass in its shell: 9 for densities like 1/z², far less for faster ones
ROUNDING = 1e-12  # relative to max(1, |log value|)
CHUNK = 2**20  # integrand values held at once on shared nodes
OWN_CHUNK = 2**15  # integrand values held at once on nodes of a row's own, where a decoder holds a layer for each
NODES = 2**14  # shared nodes evaluated at once, for each of which a decoder holds a layer
ROWS = 2**12  # rows that share nodes at once
BLOCK = 2**22  # nodes held at once by a block of rows with cells of their own
CONVERGING = 1e-2  # nats: differences below it show how fast they fall
LUCK = 0.01  # share of a difference that the next one may fall short of by chance
AGREEMENT = 1e-10  # nats: differences below it count as rounding
DEEPEST = 40  # times that a cell is split


class Quadrature(NamedTuple):
    """Logarithms of integrals.

    Attributes
    ----------
    log_value : Tensor (N,)
        Log of each integral, nats.
    error : Tensor (N,)
        Estimate of the absolute error of ``log_value``, nats; infinite where that is not finite.
    nodes : int
        Evaluations of an integrand, over all rows and rules.
    """

    log_value: Tensor
    error: Tensor
    nodes: int


@torch.no_grad()
def log_integral(
    shared: Shared,
    rowwise: Rowwise,
    rows: int,
    centre: Float[Tensor, " k"],
    scale: Float[Tensor, " k"],
    *,
    common: Common | None = None,
    tolerance: float = 1e-6,
    shared_nodes: int = SHARED_NODES,
    own_nodes: int = 2**16,
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
        Where the mass may lie, float64: mean and standard deviation of the prior for an evidence.
    common : callable, optional
        ``common(z)``: a term (G,) of f that is the same for all rows, such as a log prior, which ``shared`` leaves out
        and ``rowwise`` does not. It is evaluated for many more nodes at once.
    tolerance : float
        Error in nats, per row, at which to stop. A row that does not reach it reports the error that it has.
    shared_nodes : int
        Largest shared lattice.
    own_nodes : int
        Largest rule on a row's own cells; 0 keeps to the shared lattices.

    Returns
    -------
    Quadrature
        float64, not differentiable.

    Raises
    ------
    ValueError
        For other than one or two dimensions, or a dtype other than float64.
    """
    if len(centre) not in (1, 2) or centre.dtype != torch.float64 or scale.dtype != torch.float64:
        raise ValueError(
            f"found a centre of {len(centre)} dimensions in {centre.dtype} and a scale in {scale.dtype}; "
            "expected one or two dimensions in float64"
        )
    integrand = _Integrand(shared, rowwise, common, centre, scale)
    limits = _Limits(tolerance, shared_nodes, own_nodes)
    estimate = _Estimate.unknown(rows, scale)
    for radius in RADII:
        index = estimate.truncated(tolerance)
        if not len(index):
            break
        estimate.improve(index, _in_box(integrand, index, radius, limits))
    return Quadrature(estimate.log_value + scale.log().sum(), estimate.error(), integrand.nodes)


class _Limits(NamedTuple):
    tolerance: float
    shared_nodes: int
    own_nodes: int


class _Integrand:
    """Log integrands of all rows at z = centre + scale * u, without that volume element; counts its evaluations."""

    def __init__(self, shared: Shared, rowwise: Rowwise, common: Common | None, centre: Tensor, scale: Tensor) -> None:
        self.shared, self.rowwise, self.common = shared, rowwise, common
        self.centre, self.scale = centre, scale
        self.nodes = 0

    @property
    def dim(self) -> int:
        """Number K of dimensions."""
        return len(self.centre)

    def of_all(self, u: Tensor) -> Tensor:
        """Return the term that all rows have in common at the nodes ``u`` (G, K): (G,)."""
        if self.common is None:
            return u.new_zeros(len(u))
        return torch.cat([self.common(self.centre + self.scale * part) for part in u.split(NODES)])

    def at_common(self, index: Tensor, u: Tensor, of_all: Tensor) -> Tensor:
        """Rows ``index`` (R,) at the nodes ``u`` (G, K), with the term that they have in common there: (R, G)."""
        self.nodes += len(index) * len(u)
        value = torch.cat([self.shared(index, self.centre + self.scale * part) for part in u.split(NODES)], -1)
        return value if self.common is None else value + of_all

    def at_own(self, index: Tensor, u: Tensor) -> Tensor:
        """Row ``index[r]`` at its own nodes ``u[r]`` (G, K), in chunks: (R, G)."""
        self.nodes += u.shape[0] * u.shape[1]
        size = max(1, OWN_CHUNK // u.shape[1])
        chunks = zip(index.split(size), u.split(size), strict=True)
        return torch.cat([self.rowwise(i, self.centre + self.scale * v) for i, v in chunks])


class _Estimate(NamedTuple):
    """What is known of some rows.

    Attributes
    ----------
    log_value : Tensor (R,)
        Log of the integral over the box.
    change : Tensor (R,)
        How far the last rules are from each other, nats.
    tail : Tensor (R,)
        Bound on the share of the mass outside the box.
    slow : Tensor (R,) of bool
        Whether the rules converge like a power of the spacing only, so that finer ones are wasted.
    """

    log_value: Tensor
    change: Tensor
    tail: Tensor
    slow: Tensor

    @classmethod
    def unknown(cls, rows: int, like: Tensor) -> _Estimate:
        """Nothing is known yet."""
        infinite = like.new_full((rows,), math.inf)
        return cls(-infinite, infinite, infinite.clone(), torch.zeros_like(infinite, dtype=torch.bool))

    def error(self) -> Tensor:
        """All that may be wrong with the value, nats."""
        rounding = ROUNDING * self.log_value.abs().clamp(min=1.0)
        return (self.change + self.tail + rounding).nan_to_num(nan=math.inf, posinf=math.inf)

    def truncated(self, tolerance: float) -> Tensor:
        """Index of the rows that need a larger box."""
        return ((self.tail > tolerance) & ~self.log_value.isnan()).nonzero()[:, 0]

    def coarse(self, tolerance: float) -> Tensor:
        """Whether finer rules would help: not where what lies outside the box is the larger error."""
        return self.log_value.isfinite() & (self.change > self.tail.clamp(min=tolerance))

    def update(self, index: Tensor, new: _Estimate) -> None:
        """Take over the rows ``index`` from ``new``."""
        for mine, theirs in zip(self, new, strict=True):
            mine[index] = theirs

    def improve(self, index: Tensor, new: _Estimate) -> None:
        """Take over those of the rows ``index`` in which ``new`` has no larger error."""
        better = new.error() <= self.error()[index]
        self.update(index[better], _Estimate(*(field[better] for field in new)))


class _Convergence:
    """Follows the log-integrals of some rows from rule to rule, and judges how far they have converged.

    The spacing of each rule is ``ratio`` times finer than the one before, so that the differences d of successive
    rules fall like d -> d^ratio under geometric convergence. Two steps like that in a row earn trust: the error is then
    the last difference, or what the two before it made one expect if that is more. Without trust it is twice the
    largest difference so far, reduced as convergence of order 2 would. One lucky difference earns nothing either way.
    """

    def __init__(self, rows: int, like: Tensor, ratio: float) -> None:
        self.ratio = ratio
        self.value = like.new_full((rows,), math.nan)
        self.before = like.new_full((rows,), math.inf)
        self.last = like.new_full((rows,), math.inf)
        self.envelope = like.new_zeros(rows)
        self.fast_steps = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.slow_steps = torch.zeros(rows, dtype=torch.int64, device=like.device)

    def follow(self, index: Tensor, inner: Tensor, shell: Tensor) -> _Estimate:
        """Take the next rule of the rows ``index``: log masses inside the box and in its outer shell."""
        value = torch.logaddexp(inner, shell)
        difference = (value - self.value[index]).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        before, last = self.before[index], self.last[index]
        self._count_steps(index, last, difference)
        trusted = self.fast_steps[index] > 1
        fallen = torch.maximum(difference, self.envelope[index] / self.ratio**2)
        change = torch.where(trusted, _trusted_error(before, last, difference), 2 * fallen)
        self.envelope[index] = torch.where(trusted, change, fallen).where(difference.isfinite(), 0.0)
        self.value[index], self.before[index], self.last[index] = value, last, difference
        change = change.where(last.isfinite(), math.inf)
        return _Estimate(value, change, TAIL * (shell - value).exp(), self.slow_steps[index] > 1)

    def _count_steps(self, index: Tensor, last: Tensor, difference: Tensor) -> None:
        """Count the steps in a row that look like geometric convergence, and those that surely do not."""
        order = 1 + 0.55 * (self.ratio - 1)
        fast = difference <= (last.clamp(max=0.5) ** order).clamp(min=AGREEMENT)
        slow = ~fast & (torch.maximum(last, difference) < CONVERGING)
        self.fast_steps[index] = torch.where(fast, self.fast_steps[index] + 1, 0)
        self.slow_steps[index] = torch.where(slow, self.slow_steps[index] + 1, 0)


def _trusted_error(before: Tensor, last: Tensor, difference: Tensor) -> Tensor:
    """Error under geometric convergence, from three differences in a row.

    A drop to less than ``LUCK`` of the last difference is not believed, unless it is so deep that no luck explains it.
    """
    expected = last ** _order(before, last).clamp(max=2.0)
    believed = torch.where(_order(last, difference) > 2.9, difference, LUCK * last)
    return torch.maximum(difference, torch.maximum(expected, believed))


def _order(before: Tensor, last: Tensor) -> Tensor:
    """Return p >= 1 such that ``last`` = ``before``^p, for differences below 1."""
    return (last.clamp(min=1e-15).log() / before.clamp(1e-15, 0.5).log()).clamp(min=1.0)


def _in_box(integrand: _Integrand, index: Tensor, radius: float, limits: _Limits) -> _Estimate:
    """Integrate the rows ``index`` over the box of that half-width: on shared lattices, then on their own cells."""
    estimate = _Estimate.unknown(len(index), integrand.scale)
    for block in torch.arange(len(index), device=index.device).split(ROWS):
        estimate.update(block, _on_shared_lattices(integrand, index[block], radius, limits))
    wanted = (estimate.coarse(limits.tolerance) & ~estimate.slow).nonzero()[:, 0]
    at_once = max(1, BLOCK // max(limits.own_nodes, (2 * _roots(radius, integrand.dim)) ** integrand.dim))
    for block in wanted.split(at_once) if len(wanted) and limits.own_nodes else ():
        estimate.improve(block, _on_own_cells(integrand, index[block], radius, limits))
    return estimate


def _on_shared_lattices(integrand: _Integrand, index: Tensor, radius: float, limits: _Limits) -> _Estimate:
    """Refine a lattice for the rows ``index`` until each is resolved or hopeless, or the lattice is at its largest."""
    estimate = _Estimate.unknown(len(index), integrand.scale)
    convergence = _Convergence(len(index), integrand.scale, GROWTH)
    present = torch.arange(len(index), device=index.device)
    cells = COARSEST
    while len(present) and cells**integrand.dim <= limits.shared_nodes:
        u, width = _lattice(cells, radius, integrand.scale)
        of_all, in_shell = integrand.of_all(u), _in_shell(u, radius)
        log_volume = integrand.dim * math.log(width)
        inside, outside = (_log_sum(integrand, index[present], u[m], of_all[m]) for m in (~in_shell, in_shell))
        new = convergence.follow(present, inside + log_volume, outside + log_volume)
        estimate.update(present, new)
        hopeless = (new.change > HOPELESS) & (cells >= 100)
        present = present[new.coarse(limits.tolerance) & ~hopeless]
        cells = math.ceil(cells * GROWTH)
    return estimate


def _log_sum(integrand: _Integrand, index: Tensor, u: Tensor, of_all: Tensor) -> Tensor:
    """Log of the sum of the integrands of rows ``index`` over common nodes ``u``, in chunks."""
    size = min(NODES, max(1, CHUNK // len(index)))
    chunks = zip(u.split(size), of_all.split(size), strict=True)
    return torch.stack([integrand.at_common(index, *chunk).logsumexp(-1) for chunk in chunks]).logsumexp(0)


class _Cells(NamedTuple):
    """Groups of 2^K cells split off one parent each.

    Attributes
    ----------
    owner : Tensor (C,)
        Position of the group's row in its block.
    u : Tensor (C, 2^K, K)
        Centres of the cells.
    value : Tensor (C, 2^K)
        Log integrand there.
    parent : Tensor (C,)
        Log integrand at the parent's centre.
    """

    owner: Tensor
    u: Tensor
    value: Tensor
    parent: Tensor

    def bound(self) -> Tensor:
        """Estimate of how high the integrand may rise in each cell: its value plus its group's spread."""
        top = torch.maximum(self.value.amax(-1), self.parent)
        bottom = torch.minimum(self.value.amin(-1), self.parent)
        return self.value + (top - bottom)[:, None]

    def log_sum(self, rows: int, mask: Tensor) -> Tensor:
        """Log of the sum of the integrand over each row's cells in ``mask`` (C, 2^K): (rows,)."""
        value = self.value.masked_fill(~mask, -math.inf)
        top = _largest_by_row(value, self.owner, rows)
        shift = top.nan_to_num(neginf=0.0)
        total = torch.zeros_like(top).index_add(0, self.owner, (value - shift[self.owner, None]).exp().sum(-1))
        return shift + total.log()


def _on_own_cells(integrand: _Integrand, index: Tensor, radius: float, limits: _Limits) -> _Estimate:
    """Split the cells of each of the rows ``index`` in which it may have mass, until it is resolved."""
    rows = len(index)
    estimate = _Estimate.unknown(rows, integrand.scale)
    convergence = _Convergence(rows, integrand.scale, 2.0)
    cells, width = _first_cells(integrand, index, radius, convergence)
    for _ in range(DEEPEST):
        present = torch.unique(cells.owner)
        in_shell = _in_shell(cells.u, radius)
        log_volume = integrand.dim * math.log(width)
        masses = [cells.log_sum(rows, mask)[present] + log_volume for mask in (~in_shell, in_shell)]
        new = convergence.follow(present, *masses)
        estimate.update(present, new)
        unresolved = present[new.coarse(limits.tolerance) & ~new.slow]
        keep = _worth_splitting(cells, rows, limits.own_nodes) & torch.isin(cells.owner, unresolved)[:, None]
        if not keep.any():
            break
        cells, width = _split(integrand, index, cells, keep, width), width / 2
    return estimate


def _first_cells(
    integrand: _Integrand, index: Tensor, radius: float, convergence: _Convergence
) -> tuple[_Cells, float]:
    """Return cells over the whole box, the same for all rows and so evaluated at common nodes, and their width."""
    rows = torch.arange(len(index), device=index.device)
    u, width = _lattice(_roots(radius, integrand.dim), radius, integrand.scale)
    parent = integrand.at_common(index, u, integrand.of_all(u))
    in_shell = _in_shell(u, radius)
    log_volume = integrand.dim * math.log(width)
    convergence.follow(rows, *(parent[:, mask].logsumexp(-1) + log_volume for mask in (~in_shell, in_shell)))
    children = _children(u, width)
    leaves = children.flatten(0, 1)
    value = integrand.at_common(index, leaves, integrand.of_all(leaves)).unflatten(1, children.shape[:2])
    owner = rows.repeat_interleave(len(u))
    return _Cells(owner, children.repeat(len(index), 1, 1), value.flatten(0, 1), parent.flatten()), width / 2


def _worth_splitting(cells: _Cells, rows: int, largest: int) -> Tensor:
    """Mask (C, 2^K) of the cells that may matter, in rows that can afford to split them."""
    top = _largest_by_row(cells.value, cells.owner, rows)
    keep = cells.bound() >= top[cells.owner, None] - NEGLIGIBLE
    count = torch.zeros(rows, dtype=torch.int64, device=keep.device).index_add(0, cells.owner, keep.sum(-1))
    affordable = count * keep.shape[1] <= largest
    return keep & affordable[cells.owner, None]


def _split(integrand: _Integrand, index: Tensor, cells: _Cells, keep: Tensor, width: float) -> _Cells:
    """Split the kept cells of the given width."""
    owner = cells.owner[:, None].expand_as(keep)[keep]
    u = _children(cells.u[keep], width)
    return _Cells(owner, u, integrand.at_own(index[owner], u), cells.value[keep])


def _lattice(cells: int, radius: float, like: Tensor) -> tuple[Tensor, float]:
    """Centres (cells^K, K) of the cells that tile the box of that half-width, and their width."""
    width = 2 * radius / cells
    axis = (torch.arange(cells, dtype=like.dtype, device=like.device) + 0.5) * width - radius
    return torch.cartesian_prod(*[axis] * len(like)).reshape(-1, len(like)), width


def _children(u: Tensor, width: float) -> Tensor:
    """Centres (C, 2^K, K) of the halves or quarters of the cells with centres ``u`` (C, K)."""
    signs = u.new_tensor([-1.0, 1.0])
    corners = torch.cartesian_prod(*[signs] * u.shape[1]).reshape(-1, u.shape[1])
    return u[:, None, :] + corners * (width / 4)


def _in_shell(u: Tensor, radius: float) -> Tensor:
    return u.abs().amax(-1) > SHELL * radius


def _largest_by_row(value: Tensor, owner: Tensor, rows: int) -> Tensor:
    smallest = value.new_full((rows,), -math.inf)
    return smallest.scatter_reduce(0, owner, value.amax(-1), "amax")


def _roots(radius: float, dim: int) -> int:
    return round(ROOTS ** (1 / dim) * radius / RADII[0])
