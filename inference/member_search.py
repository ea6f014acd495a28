"""Natural-gradient ascent of the ELBO in the mean and covariance of a normal q, for many rows at once.

With q = N(m, R Rᵀ) and z = m + R u the ELBO over fixed nodes u has the gradient E[∇f] in m, and I - S in a symmetric
matrix A with R → R (I + A), where S = -E[u ∇fᵀ] R, made symmetric, is E[-∇²f] in units of q by Stein's lemma. A step of
length ρ brings q's precision in those units to B = (1 - ρ) I + ρ S, and moves the mean by ρ R B⁻¹ Rᵀ E[∇f], so that for
a quadratic f a whole step ends at the optimum. R follows by the symmetric root of B⁻¹, and not by a Cholesky factor:
that would turn the nodes as q changes, and with few nodes the bound over the turned ones has another gradient.

The ascent is made twice. On few nodes, a central difference along each axis of q (the rule of degree 3 of Arasaratnam
& Haykin 2009, equation 27), it comes from far away to near a maximum; on all nodes from the best of those ends
on. Where two ends of a row lie apart and are nearly as good, both go on, so that the first rule decides nothing.

References
----------
```bibtex
@article{arasaratnam2009cubature,
  author = {Arasaratnam, Ienkaran and Haykin, Simon}, title = {Cubature {K}alman Filters},
  journal = {IEEE Transactions on Automatic Control}, volume = {54}, number = {6}, pages = {1254--1269}, year = {2009}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from elbozoo.guides.bound import whitened_noise
from elbozoo.models.numerics.low_rank import LowRankCovariance, nearest_low_rank

GAIN = 1e-4  # nats per datum in the last step, below which the ascent is at a maximum
LEAST_RATE = 1e-3
HERMITE_NODES = {1: 24, 2: 8}
FEW_HERMITE_NODES = {1: 8, 2: 4}
SOBOL_NODES = 128
CLOSE_CALL = 0.5  # nats: ends of the first ascent that much below a row's best one go on beside it
APART = 0.5  # standard deviations of q between the means of two ends, above which they are two

LogJoint = Callable[[Tensor, Tensor], Tensor]


class Normals(NamedTuple):
    """Normals of some rows.

    Attributes
    ----------
    mean : Tensor (B, K)
        Means.
    root : Tensor (B, K, K)
        R, with R Rᵀ the covariance.
    variance : Tensor (B, K)
        Where the covariance has low rank, what it is on top of F Fᵀ, on the diagonal; otherwise its own diagonal.
    factor : Tensor (B, K, rank)
        F; of rank 0 where the covariance has no low rank.
    """

    mean: Tensor
    root: Tensor
    variance: Tensor
    factor: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, factor: Tensor | None = None) -> Normals:
        """Return the normals with ``mean`` (B, K) and ``covariance`` (B, K, K), of which F Fᵀ is a part."""
        factor = covariance.new_zeros(*mean.shape, 0) if factor is None else factor
        variance = covariance.diagonal(dim1=-2, dim2=-1) - factor.square().sum(-1)
        return cls(mean, torch.linalg.cholesky(covariance), variance, factor)

    def covariance(self) -> Tensor:
        """Return R Rᵀ, (B, K, K)."""
        return self.root @ self.root.mT

    def select(self, rows: Tensor) -> Normals:
        """Return those of the rows."""
        return Normals(*(field[rows] for field in self))

    def put(self, rows: Tensor, others: Normals) -> Normals:
        """Return all, with ``others`` in the place of ``rows`` (an index)."""
        return Normals(*(mine.index_copy(0, rows, theirs) for mine, theirs in zip(self, others, strict=True)))

    def where(self, mask: Tensor, others: Normals) -> Normals:
        """Return these where ``mask`` (B,) holds and the ``others`` elsewhere."""
        return Normals(*(torch.where(_as(mask, mine), mine, theirs) for mine, theirs in zip(self, others, strict=True)))


class Rule(NamedTuple):
    """Nodes (S, K) and weights (S,) for expectations under N(0, I)."""

    nodes: Tensor
    weights: Tensor


class Ascent(NamedTuple):
    """Where an ascent of some rows ended: normals, ELBO of each row (B,) in nats, and whether it was at a maximum."""

    normals: Normals
    value: Tensor
    converged: bool


class _Pace(NamedTuple):
    """How far an ascent goes.

    Attributes
    ----------
    gain : float
        Nats: a row has settled after a bold step that gains less.
    iterations : int
        Most steps.
    sweeps : int
        Of the projection onto covariances of low rank, in each step. Few leave it short of the nearest one, and so the
        ascent some thousandths of a nat short of its maximum.
    """

    gain: float
    iterations: int
    sweeps: int


FIRST, LAST = _Pace(1e-2, 40, 3), _Pace(1e-6, 100, 30)


class _State(NamedTuple):
    """Where the ascent of some rows is: ELBO (B,), E[∇f] (B, K), S (B, K, K) and the length of the next step (B,)."""

    normals: Normals
    value: Tensor
    slope: Tensor
    curvature: Tensor
    rate: Tensor

    def where(self, mask: Tensor, others: _State) -> _State:
        fields = [torch.where(_as(mask, mine), mine, theirs) for mine, theirs in zip(self[1:], others[1:], strict=True)]
        return _State(self.normals.where(mask, others.normals), *fields)

    def select(self, mask: Tensor) -> _State:
        return _State(self.normals.select(mask), *(field[mask] for field in self[1:]))


class NormalSearch:
    """The best normals of all rows, independent between the latents, of one family.

    Parameters
    ----------
    log_joint : callable
        ``log_joint(index, z)``: log p(x_n, c, z) of the rows ``index`` (B,) at points (S, B, K), (C, S, B), nats, for
        every value c of a finite latent, C = 1 where there is none.
    rows : int
        Number of rows.
    dims : sequence of int
        Numbers of dimensions of the real latents, which stand side by side in z.
    family : str
        ``diagonal-normal``, ``full-rank-normal`` or ``low-rank-normal``.
    ranks : sequence of int
        Of each latent's covariance, for the last one.
    at_once : int
        How many points times rows are evaluated at once.
    dtype : torch.dtype
        That of the points.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        rows: int,
        dims: Sequence[int],
        family: str,
        ranks: Sequence[int],
        *,
        at_once: int,
        dtype: torch.dtype,
    ) -> None:
        self.log_joint, self.rows, self.dims, self.at_once = log_joint, rows, dims, at_once
        self.ranks = ranks if family == "low-rank-normal" else None
        self.is_diagonal = family == "diagonal-normal"
        blocks = [torch.eye(dim) if self.is_diagonal else torch.ones(dim, dim) for dim in dims]
        self.free = torch.block_diag(*blocks).to(dtype)  # which elements of q's precision may differ from zero
        self.all_nodes, self.few_nodes = (
            Rule(nodes.to(dtype), weights.to(dtype))
            for nodes, weights in (gaussian_nodes(sum(dims)), few_gaussian_nodes(sum(dims)))
        )

    def run(self, starts: Sequence[Normals], given: Sequence[Normals]) -> Ascent:
        """Return the best end for each row: of ascents from all starts, and never below a ``given`` one."""
        starts, given = [self._member(q) for q in starts], [self._member(q) for q in given]
        everyone = torch.arange(self.rows)
        ends = [self._ascend(start, everyone, self.few_nodes, FIRST).normals for start in (*starts, *given)]
        candidates = [*ends, *given]
        values = torch.stack([self.value(q) for q in candidates]).nan_to_num(nan=-math.inf)
        chosen = values.argmax(0)
        leaders = candidates[0]
        for number, candidate in enumerate(candidates[1:], 1):
            leaders = candidate.where(chosen == number, leaders)
        best = self._ascend(leaders, everyone, self.all_nodes, LAST)
        for number, end in enumerate(ends):
            is_close = (chosen != number) & (values[number] > values.amax(0) - CLOSE_CALL) & _apart(end, leaders)
            if is_close.any():
                rows = is_close.nonzero()[:, 0]
                best = _better(best, rows, self._ascend(end.select(rows), rows, self.all_nodes, LAST))
        return best

    def value(self, q: Normals) -> Tensor:
        """ELBO of each row over all nodes, (N,), nats."""
        with torch.no_grad():
            expected = torch.cat([e for _, e in self._expected(q, torch.arange(self.rows), self.all_nodes)], 1)
        return expected.logsumexp(0) + _entropy(q)

    def best_logits(self, q: Normals) -> Tensor:
        """Log probabilities (N, C) of the finite latent's best q given ``q`` over the real ones."""
        with torch.no_grad():
            expected = torch.cat([e for _, e in self._expected(q, torch.arange(self.rows), self.all_nodes)], 1)
        return expected.log_softmax(0).mT

    def by_latent(self, q: Normals) -> list[Normals]:
        """Return the normals of each latent."""
        covariance, ranks = q.covariance(), self.ranks or [0] * len(self.dims)
        parts = zip(_spans(self.dims), _spans(ranks), strict=True)
        return [
            Normals(
                q.mean[:, of],
                torch.linalg.cholesky(covariance[:, of, of]),
                q.variance[:, of],
                q.factor[:, of, along],
            )
            for of, along in parts
        ]

    def _member(self, q: Normals) -> Normals:
        """Return a member of the family to start from, with the diagonal of q's covariance where q is none."""
        if self.ranks is not None and q.factor.shape[-1] == 0:
            factor = q.mean.new_zeros(*q.mean.shape, sum(self.ranks))
            return Normals.of(q.mean, torch.diag_embed(q.variance), factor)
        if self.is_diagonal:
            # The nearest diagonal normal has the diagonal of the precision.
            precision = torch.cholesky_inverse(torch.linalg.cholesky(q.covariance())).diagonal(dim1=-2, dim2=-1)
            return Normals.of(q.mean, torch.diag_embed(1 / precision))
        return q

    def _expected(self, q: Normals, rows: Tensor, rule: Rule) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the points (S, B, K) and E[log p(x, c, z)], (C, B), nats, of some rows after the others."""
        size = max(1, self.at_once // len(rule.nodes))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            z = q.mean[part] + torch.einsum("nij,sj->sni", q.root[part], rule.nodes)
            if torch.is_grad_enabled():
                z = z.detach().requires_grad_()
            yield z, torch.einsum("s,csn->cn", rule.weights, self.log_joint(rows[part], z))

    def _evaluate(self, q: Normals, rows: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
        """Return ELBO, E[∇f] and S of the rows (an index), of which ``q`` are the normals."""
        values, slopes, moments = [], [], []
        with torch.enable_grad():
            for z, expected in self._expected(q, rows, rule):
                bound = expected.logsumexp(0)
                (weighted_slopes,) = torch.autograd.grad(bound.sum(), z)
                values.append(bound.detach())
                slopes.append(weighted_slopes.sum(0))
                moments.append(torch.einsum("si,snj->nij", rule.nodes, weighted_slopes))
        curvature = -torch.cat(moments) @ q.root
        return torch.cat(values) + _entropy(q), torch.cat(slopes), 0.5 * (curvature + curvature.mT)

    def _ascend(self, start: Normals, rows: Tensor, rule: Rule, pace: _Pace) -> Ascent:
        """Climb from ``start``, each row at its own rate; rows that have settled cost nothing more."""
        count = len(rows)
        state = _State(start, *self._evaluate(start, rows, rule), start.mean.new_ones(count))
        best, value, climbing = start, state.value.clone(), torch.arange(count)
        gain = math.inf
        for _ in range(pace.iterations):
            state, gains, settled = self._iterate(state, rows[climbing], rule, pace)
            best = best.put(climbing, state.normals)
            value[climbing] = state.value
            gain = float(gains.sum()) / count
            climbing, state = climbing[~settled], state.select(~settled)
            if len(climbing) == 0:
                break
        return Ascent(best, value, bool(value.isfinite().all()) and (len(climbing) == 0 or gain < GAIN))

    def _iterate(self, state: _State, rows: Tensor, rule: Rule, pace: _Pace) -> tuple[_State, Tensor, Tensor]:
        proposal, valid = self._step(state, pace.sweeps)
        evaluated = _State(proposal, *self._evaluate(proposal, rows, rule), state.rate)
        better = valid & (evaluated.value > state.value)
        gains = torch.where(better, evaluated.value - state.value, torch.zeros_like(state.value))
        rate = torch.where(better, (1.5 * state.rate).clamp(max=1.0), 0.4 * state.rate)
        # A row settles when a bold step gains nothing to speak of, or no step however small gains anything.
        settled = (better & (gains < pace.gain) & (state.rate > 0.3)) | (rate < LEAST_RATE)
        return evaluated.where(better, state)._replace(rate=rate), gains, settled

    def _step(self, state: _State, sweeps: int) -> tuple[Normals, Tensor]:
        """Return the normals a step further, and which of them are numbers."""
        q, rate = state.normals, state.rate
        one = torch.eye(q.mean.shape[1], dtype=q.mean.dtype)
        blend = one + rate[:, None, None] * (state.curvature - one)
        factor, failed = torch.linalg.cholesky_ex(blend)
        # Where the curvature is not that of a maximum, keep the covariance and follow the slope alone.
        is_saddle = (failed > 0) | ~blend.isfinite().all(-1).all(-1)
        blend = torch.where(is_saddle[:, None, None], one, blend)
        factor = torch.where(is_saddle[:, None, None], one, factor)
        # A diagonal normal moves by the whole curvature too: by its diagonal alone, correlated numbers would wait for
        # one another.
        slope = (q.root.mT @ state.slope[..., None])[..., 0]
        move = (q.root @ torch.cholesky_solve(slope[..., None], factor))[..., 0]
        mean = q.mean + rate[:, None] * move
        return self._reshaped(q, mean, blend, sweeps), mean.isfinite().all(-1)

    def _reshaped(self, q: Normals, mean: Tensor, blend: Tensor, sweeps: int) -> Normals:
        """Return members of the family with ``mean`` whose precision is near to ``blend`` (B, K, K) in units of q."""
        if self.is_diagonal:
            shrink = blend.diagonal(dim1=-2, dim2=-1).rsqrt()
            return Normals(mean, q.root * shrink[:, None], q.variance * shrink.square(), q.factor)
        if self.ranks is None:
            root = q.root @ _power(blend * self.free, -0.5)
            return Normals(mean, root, root.square().sum(-1), q.factor)
        back = torch.linalg.inv(q.root)
        near = self._low_rank(q, back.mT @ blend @ back, sweeps)
        inner = back @ near.dense() @ back.mT
        return Normals(mean, q.root @ _power(inner, 0.5), near.variance, near.factor)

    def _low_rank(self, q: Normals, precision: Tensor, sweeps: int) -> LowRankCovariance:
        """Project onto covariances of low rank, latent by latent, from the one that q has."""
        assert self.ranks is not None
        found = [
            nearest_low_rank(precision[:, part, part], q.variance[:, part], rank, sweeps=sweeps)
            for part, rank in zip(_spans(self.dims), self.ranks, strict=True)
        ]
        return LowRankCovariance(torch.cat([f.variance for f in found], -1), blocks([f.factor for f in found]))


def _better(best: Ascent, rows: Tensor, other: Ascent) -> Ascent:
    better = other.value > best.value[rows]
    where, kept = rows[better], other.normals.select(better)
    value = best.value.index_copy(0, where, other.value[better])
    return Ascent(best.normals.put(where, kept), value, best.converged and other.converged)


def _apart(first: Normals, second: Normals) -> Tensor:
    """Whether the means are not the same for all that q says, (B,)."""
    distance = torch.linalg.solve(second.root, (first.mean - second.mean)[..., None])
    return ~(distance.square().sum((-1, -2)) < APART**2)


def _entropy(q: Normals) -> Tensor:
    dim = q.mean.shape[1]
    return torch.linalg.slogdet(q.root).logabsdet + 0.5 * dim * (1 + math.log(2 * math.pi))


def _power(matrices: Tensor, exponent: float) -> Tensor:
    """Return a power of symmetric positive matrices (B, K, K), itself symmetric."""
    eigenvalues, eigenvectors = torch.linalg.eigh(0.5 * (matrices + matrices.mT))
    powers = eigenvalues.clamp(min=torch.finfo(eigenvalues.dtype).tiny).pow(exponent)
    return (eigenvectors * powers[:, None]) @ eigenvectors.mT


def blocks(matrices: Sequence[Tensor]) -> Tensor:
    """Put ``matrices`` (N, A, B) on the diagonal of one, (N, ΣA, ΣB)."""
    if len(matrices) == 1:
        return matrices[0]
    widths = [matrix.shape[-1] for matrix in matrices]
    left = np.cumsum(widths) - widths
    pads = [(int(before), sum(widths) - int(before) - width) for before, width in zip(left, widths, strict=True)]
    return torch.cat([torch.nn.functional.pad(m, pad) for m, pad in zip(matrices, pads, strict=True)], -2)


def _spans(widths: Sequence[int]) -> list[slice]:
    """Return where things of these widths are that lie side by side."""
    stops = accumulate(widths)
    return [slice(stop - width, stop) for stop, width in zip(stops, widths, strict=True)]


def _as(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def gaussian_nodes(dim: int) -> tuple[Tensor, Tensor]:
    """Nodes (S, dim) and weights (S,) for expectations under N(0, I).

    A product Gauss-Hermite rule for one or two dimensions; above that antithetic Sobol points, whitened so
    that the first two moments are exact.
    """
    if dim in HERMITE_NODES:
        return _hermite(dim, HERMITE_NODES[dim])
    white = whitened_noise(SOBOL_NODES, dim, seed=0, like=torch.empty(0, dtype=torch.float64))
    return white, torch.full((len(white),), 1 / len(white), dtype=white.dtype)


def few_gaussian_nodes(dim: int) -> Rule:
    """Return a rule of few nodes, exact to the third order: 2 dim of them above two dimensions."""
    if dim in FEW_HERMITE_NODES:
        return Rule(*_hermite(dim, FEW_HERMITE_NODES[dim]))
    axes = math.sqrt(dim) * torch.eye(dim, dtype=torch.float64)
    nodes = torch.cat([axes, -axes])
    return Rule(nodes, torch.full((len(nodes),), 1 / len(nodes), dtype=nodes.dtype))


def _hermite(dim: int, count: int) -> tuple[Tensor, Tensor]:
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    grid = np.stack(np.meshgrid(*[points] * dim, indexing="ij"), -1).reshape(-1, dim)
    mass = np.prod(np.stack(np.meshgrid(*[weights] * dim, indexing="ij"), -1), -1).reshape(-1)
    return torch.from_numpy(grid), torch.from_numpy(mass / mass.sum())
