"""The best member of a guide's family for each datum, at fixed θ: it marks the approximation gap.

In closed form where the posterior is normal or categorical; otherwise by natural gradients (Khan & Rue
2023, section 1.3), a Newton method for normal families: with f = log p(x, z), the precision moves towards
-E[∇²f] and the mean along its inverse times E[∇f]. The Hessian is taken from gradients by Stein's lemma,
E[∇²f] = Σ⁻¹ E[(z - m) ∇fᵀ], which holds for decoders with kinks too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from scipy.stats import norm, qmc
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.families import FAMILIES, Family, LowRankNormal, Reshaped
from elbozoo.guides.local import LocalGuide
from elbozoo.inference.weights import PARTICLE_DIM, log_joint
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasPosterior
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import LatentSite

GAIN = 1e-4
ITERATIONS = 100
SETTLED = 1e-6
PRIOR_DRAWS, NARROW = 256, 0.1
LEAST_RATE = 1e-3
PATIENCE = 3
ADAM_RATE, ADAM_BLOCK, ADAM_BLOCKS = 0.02, 50, 100
HERMITE_NODES = {1: 24, 2: 8}
SOBOL_NODES = 128
CHUNK_ELEMENTS = 2**23


class BestMember(NamedTuple):
    """A free guide of the family, whether it is at its maximum, and how it was found."""

    guide: Guide
    converged: bool
    method: str


def best_member(
    entry: Entry, family: str, x: Tensor, options: GuideOptions, start: Distribution | None = None
) -> BestMember | None:
    """Return the free guide of ``family`` with the largest ELBO for the rows ``x`` (N, D) at the entry's θ.

    Where the maximum is searched, the search begins narrowly at the likeliest of many prior draws and, if
    given, once more at ``start`` (batch shape (N,)); the better end of the two is kept for each row.

    Returns None for a family that has no bound (``delta``), and where there is no search: for more than one
    latent site, or a support other than the real vectors.
    """
    sites = entry.latent_sites()
    if len(sites) != 1 or family not in FAMILIES or family == "delta":
        return None
    with isolated(0):
        guide = LocalGuide(f"free-{family}", family, "free", sites, x, options)
    if isinstance(entry, HasPosterior):
        with torch.no_grad():
            closest = guide.families[sites[0].name].closest(entry.posterior(x))
        if closest is not None:
            return BestMember(_with_values(guide, closest), True, "closed form")
    if not sites[0].is_real:
        return None
    search = _Search(entry, sites[0], x, diagonal=family != "full-rank-normal")
    normal, converged = search.run([search.likeliest(), *([_normals(start)] if start is not None else [])])
    member = guide.families[sites[0].name]
    if isinstance(member, LowRankNormal):
        values, converged = search.refine(member, member.near_diagonal(normal))
        return BestMember(_with_values(guide, values), converged, "Adam")
    closest = member.closest(normal)
    assert closest is not None
    return BestMember(_with_values(guide, closest), converged, "natural gradient")


def _with_values(guide: LocalGuide, values: Tensor) -> LocalGuide:
    (source,) = guide.sources.values()
    with torch.no_grad():
        source.values.copy_(values)  # type: ignore[operator]
    return guide


class _Normals(NamedTuple):
    mean: Tensor
    precision: Tensor

    def scale_tril(self) -> Tensor:
        return torch.linalg.cholesky(torch.linalg.inv(self.precision))

    def where(self, mask: Tensor, other: _Normals) -> _Normals:
        return _Normals(
            torch.where(mask[:, None], self.mean, other.mean),
            torch.where(mask[:, None, None], self.precision, other.precision),
        )

    def put(self, rows: Tensor, others: _Normals) -> _Normals:
        return _Normals(
            self.mean.index_copy(0, rows, others.mean), self.precision.index_copy(0, rows, others.precision)
        )


class _State(NamedTuple):
    normals: _Normals
    value: Tensor
    slope: Tensor
    target: Tensor
    rate: Tensor

    def where(self, mask: Tensor, other: _State) -> _State:
        return _State(
            self.normals.where(mask, other.normals),
            torch.where(mask, self.value, other.value),
            torch.where(mask[:, None], self.slope, other.slope),
            torch.where(mask[:, None, None], self.target, other.target),
            self.rate,
        )

    def select(self, mask: Tensor) -> _State:
        normals = _Normals(self.normals.mean[mask], self.normals.precision[mask])
        return _State(normals, self.value[mask], self.slope[mask], self.target[mask], self.rate[mask])


class _Search:
    def __init__(self, entry: Entry, site: LatentSite, x: Tensor, *, diagonal: bool) -> None:
        self.entry, self.site, self.x, self.diagonal = entry, site, x, diagonal
        nodes, weights = gaussian_nodes(site.dim)
        self.nodes, self.weights = nodes.to(x.dtype), weights.to(x.dtype)

    def likeliest(self) -> _Normals:
        """Return narrow normals at the draw of the prior with the largest log p(x, z), for each row.

        From a q as wide as the prior, a sharp posterior shows neither its place nor its curvature.
        """
        batch = Batch.full(self.x)
        with isolated(0), torch.no_grad():
            with pyro.plate("particles", PRIOR_DRAWS, dim=PARTICLE_DIM):
                node = poutine.trace(self.entry).get_trace(batch).nodes[self.site.name]
            draws = node["value"].expand(PRIOR_DRAWS, len(self.x), *self.site.event_shape)
            rows = max(1, CHUNK_ELEMENTS // (PRIOR_DRAWS * self.x.shape[1]))
            spans = [slice(i, i + rows) for i in range(0, len(self.x), rows)]
            parts = [log_joint(self.entry, Batch.full(self.x[s]), {self.site.name: draws[:, s]}) for s in spans]
        best = torch.cat(parts, -1).argmax(0)
        mean = draws[best, torch.arange(len(self.x))].reshape(len(self.x), self.site.dim)
        spread = NARROW * draws.reshape(-1, self.site.dim).std(0)
        return _Normals(mean, torch.diag(spread**-2).expand(len(self.x), -1, -1).clone())

    def run(self, starts: list[_Normals]) -> tuple[torch.distributions.MultivariateNormal, bool]:
        ends = [self._ascend(start) for start in starts]
        best, value, converged = ends[0]
        for other, other_value, other_converged in ends[1:]:
            better = other_value > value
            best, value = other.where(better, best), torch.where(better, other_value, value)
            converged = converged and other_converged
        return torch.distributions.MultivariateNormal(best.mean, precision_matrix=best.precision), converged

    def _ascend(self, start: _Normals) -> tuple[_Normals, Tensor, bool]:
        """Climb from ``start``, each row at its own rate; rows that have settled cost nothing more."""
        rows = torch.arange(len(self.x))
        best, value = start, self.x.new_empty(len(self.x))
        state = _State(start, *self._evaluate(start, rows), self.x.new_ones(len(self.x)))
        value[:] = state.value
        gain = math.inf
        for _ in range(ITERATIONS):
            state, gains, settled = self._iterate(state, rows)
            best = best.put(rows, state.normals)
            value[rows] = state.value
            gain = float(gains.sum()) / len(self.x)
            rows, state = rows[~settled], state.select(~settled)
            if len(rows) == 0:
                break
        return best, value, len(rows) == 0 or gain < GAIN

    def _iterate(self, state: _State, rows: Tensor) -> tuple[_State, Tensor, Tensor]:
        proposal, valid = _step(state)
        evaluated = _State(proposal, *self._evaluate(proposal, rows), state.rate)
        better = valid & (evaluated.value > state.value)
        gains = torch.where(better, evaluated.value - state.value, torch.zeros_like(state.value))
        rate = torch.where(better, (1.5 * state.rate).clamp(max=1.0), 0.4 * state.rate)
        # A row settles when a bold step gains nothing to speak of, or no step however small gains anything.
        settled = (better & (gains < SETTLED) & (state.rate > 0.3)) | (rate < LEAST_RATE)
        return evaluated.where(better, state)._replace(rate=rate), gains, settled

    def refine(self, family: Family, values: Tensor) -> tuple[Tensor, bool]:
        """Ascend from ``values`` (N, P) by Adam on fixed nodes, lowering the step size at each standstill."""
        values = values.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([values], lr=ADAM_RATE)
        best, standstills = -math.inf, 0
        for _ in range(ADAM_BLOCKS):
            for _ in range(ADAM_BLOCK):
                optimizer.zero_grad()
                loss = -self._objective(_vectors(family.distribution(values)))
                loss.backward()
                optimizer.step()
            objective = -float(loss.detach())
            if objective - best < GAIN * len(self.x):
                standstills += 1
                optimizer.param_groups[0]["lr"] *= 0.2
            best = max(best, objective)
            if standstills == PATIENCE:
                return values.detach(), True
        return values.detach(), False

    def _objective(self, q: Distribution) -> Tensor:
        z = q.mean + torch.einsum("nij,sj->sni", q.scale_tril, self.nodes)  # type: ignore[attr-defined]
        with isolated(0):
            shaped = z.reshape(*z.shape[:2], *self.site.event_shape)
            log_density = log_joint(self.entry, Batch.full(self.x), {self.site.name: shaped})
        return (self.weights @ log_density + q.entropy()).sum()

    def _evaluate(self, q: _Normals, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chunk = max(1, CHUNK_ELEMENTS // (len(self.nodes) * self.x.shape[1]))
        x = self.x[rows]
        spans = [slice(i, i + chunk) for i in range(0, len(x), chunk)]
        parts = [self._evaluate_rows(x[s], _Normals(q.mean[s], q.precision[s])) for s in spans]
        value, slope, curvature = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if self.diagonal:
            curvature = torch.diag_embed(curvature.diagonal(dim1=-2, dim2=-1))
        return value, slope, -curvature

    def _evaluate_rows(self, x: Tensor, q: _Normals) -> tuple[Tensor, Tensor, Tensor]:
        scale_tril = q.scale_tril()
        offsets = torch.einsum("nij,sj->sni", scale_tril, self.nodes)
        z = (q.mean + offsets).detach().requires_grad_()
        shaped = z.reshape(*z.shape[:2], *self.site.event_shape)
        with isolated(0):
            log_density = log_joint(self.entry, Batch.full(x), {self.site.name: shaped})
        (slopes,) = torch.autograd.grad(log_density.sum(), z)
        entropy = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * self.site.dim * (
            1 + math.log(2 * math.pi)
        )
        slope = torch.einsum("s,sni->ni", self.weights, slopes)
        curvature = q.precision @ torch.einsum("s,sni,snj->nij", self.weights, offsets, slopes)
        return self.weights @ log_density.detach() + entropy, slope, (curvature + curvature.mT) / 2


def _vectors(q: Distribution) -> Distribution:
    """Return ``q`` over real vectors, whatever the shape of the site's draws."""
    return q.base_dist if isinstance(q, Reshaped) else q


def _normals(q: Distribution) -> _Normals:
    q = _vectors(q)
    covariance = getattr(q, "covariance_matrix", None)
    precision = torch.diag_embed(1 / q.variance) if covariance is None else torch.linalg.inv(covariance)
    return _Normals(q.mean.detach(), precision.detach())


def _step(state: _State) -> tuple[_Normals, Tensor]:
    now, rate = state.normals, state.rate
    precision = now.precision + rate[:, None, None] * (state.target - now.precision)
    factor, failed = torch.linalg.cholesky_ex(precision)
    # Where the curvature is not that of a maximum, keep the old precision and follow the slope alone.
    precision = torch.where((failed > 0)[:, None, None], now.precision, precision)
    factor = torch.where((failed > 0)[:, None, None], torch.linalg.cholesky(now.precision), factor)
    move = torch.cholesky_solve(state.slope[..., None], factor)[..., 0]
    return _Normals(now.mean + rate[:, None] * move, precision), torch.isfinite(move).all(-1)


def gaussian_nodes(dim: int) -> tuple[Tensor, Tensor]:
    """Nodes (S, dim) and weights (S,) for expectations under N(0, I).

    A product Gauss-Hermite rule for one or two dimensions; above that antithetic Sobol points, whitened so
    that the first two moments are exact.
    """
    if dim in HERMITE_NODES:
        points, weights = np.polynomial.hermite_e.hermegauss(HERMITE_NODES[dim])
        grid = np.stack(np.meshgrid(*[points] * dim, indexing="ij"), -1).reshape(-1, dim)
        mass = np.prod(np.stack(np.meshgrid(*[weights] * dim, indexing="ij"), -1), -1).reshape(-1)
        return torch.from_numpy(grid), torch.from_numpy(mass / mass.sum())
    half = norm.ppf(qmc.Sobol(dim, seed=0).random(max(SOBOL_NODES // 2, 2 ** math.ceil(math.log2(2 * dim)))))
    symmetric = torch.from_numpy(np.concatenate([half, -half]))
    factor = torch.linalg.cholesky(symmetric.mT @ symmetric / len(symmetric))
    white = torch.linalg.solve_triangular(factor, symmetric.mT, upper=False).mT
    return white, torch.full((len(white),), 1 / len(white), dtype=white.dtype)
