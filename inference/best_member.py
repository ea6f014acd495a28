"""The best member of a guide's family for each datum, at fixed θ: it marks the approximation gap.

In closed form where the posterior is normal or categorical; otherwise by natural gradients (Khan & Rue
2023, section 1.3), a Newton method for normal families: with f = log p(x, z), the precision moves towards
-E[∇²f] and the mean along its inverse times E[∇f]. The Hessian is taken from gradients by Stein's lemma,
E[∇²f] = Σ⁻¹ E[(z - m) ∇fᵀ], which holds for decoders with kinks too.

A finite latent c beside the real one, independent of it under q, is maximised out. Given q(z) the best q(c) is
proportional to exp E[log p(x, c, z)] (Bishop 2006, equation 10.9), and the ELBO there is

    log Σ_c exp E[log p(x, c, z)] + entropy of q(z),

whose derivatives are those of E[Σ_c q(c) log p(x, c, z)] at that q(c). So each step is one of coordinate ascent:
q(c) at its optimum, then a natural-gradient step of q(z), which for a normal posterior given c is its optimum too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.bound import whitened_noise
from elbozoo.guides.families import FAMILIES, Family, LowRankNormal, Reshaped
from elbozoo.guides.local import LocalGuide
from elbozoo.inference.weights import PARTICLE_DIM, log_joint
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasPosterior
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import LatentSite

SEARCHED = ("diagonal-normal", "full-rank-normal", "low-rank-normal")
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
    entry: Entry, family: str, x: Tensor, options: GuideOptions, start: Mapping[str, Distribution] | None = None
) -> BestMember | None:
    """Return the free guide of ``family`` with the largest ELBO for the rows ``x`` (N, D) at the entry's θ.

    Where the maximum is searched, the search begins narrowly at the likeliest of many prior draws, for each value
    of the finite latent if there is one, and, if given, once more at ``start``, the q of each site (batch shape
    (N,)). The best end is kept for each row: a local maximum where there are several, so that it bounds the best
    one from below, and never below ``start`` for a family that natural gradients search.

    Without a closed form, returns None for families other than normal ones, and for programs other than those of
    latents over the real vectors, independent of one another under q, and at most one more, that takes finitely many
    values.
    """
    sites = entry.latent_sites()
    if family not in FAMILIES:
        return None
    if len(sites) == 1 and isinstance(entry, HasPosterior):
        guide = _free_guide(family, sites, x, options)
        with torch.no_grad():
            closest = guide.families[sites[0].name].closest(entry.posterior(x))
        if closest is not None:
            return BestMember(_with_values(guide, {sites[0].name: closest}), True, "closed form")
    density = _Density.of(entry, sites)
    if density is None or family not in SEARCHED:
        return None
    return _searched(density, _free_guide(family, sites, x, options), x, start)


def _searched(density: _Density, guide: LocalGuide, x: Tensor, start: Mapping[str, Distribution] | None) -> BestMember:
    search = _Search(density, x, diagonal=guide.family != "full-rank-normal")
    given = [] if start is None else [_side_by_side([_normals(start[site.name]) for site in density.real])]
    joint, converged = search.run([*search.likeliest(), *given])
    members = [guide.families[site.name] for site in density.real]
    normals = density.by_site(joint)
    values: Sequence[Tensor]
    if guide.family == LowRankNormal.name:
        method = "Adam"
        near = [m.near_diagonal(n) for m, n in zip(members, normals, strict=True) if isinstance(m, LowRankNormal)]
        values, converged = search.refine(members, near)
    else:
        method = "natural gradient"
        values = [_closest(member, normal) for member, normal in zip(members, normals, strict=True)]
    found = {site.name: of_site for site, of_site in zip(density.real, values, strict=True)}
    if density.finite is not None:
        best = [_normals(member.distribution(of_site)) for member, of_site in zip(members, values, strict=True)]
        found[density.finite.name] = search.best_logits(_side_by_side(best))
    return BestMember(_with_values(guide, found), converged, method)


def _closest(member: Family, normal: Distribution) -> Tensor:
    closest = member.closest(normal)
    assert closest is not None
    return closest


def _free_guide(family: str, sites: list[LatentSite], x: Tensor, options: GuideOptions) -> LocalGuide:
    with isolated(0):
        return LocalGuide(f"free-{family}", family, "free", sites, x, options)


def _with_values(guide: LocalGuide, values: Mapping[str, Tensor]) -> LocalGuide:
    with torch.no_grad():
        for site, of_site in values.items():
            guide.sources[site].values.copy_(of_site)  # type: ignore[operator]
    return guide


class _Density(NamedTuple):
    """Log p(x, c, z) as a function of the real latents z, at every value c of a finite one where there is one.

    Where there are several real latents, they lie side by side in z, in the order in which the program draws them.
    """

    entry: Entry
    real: tuple[LatentSite, ...]
    finite: LatentSite | None

    @classmethod
    def of(cls, entry: Entry, sites: list[LatentSite]) -> _Density | None:
        """Return the density of a program with these latent ``sites``, or None where they are others."""
        real = tuple(site for site in sites if site.is_real)
        finite = [site for site in sites if site.is_enumerable]
        if not real or len(finite) > 1 or len(sites) > len(real) + len(finite):
            return None
        return cls(entry, real, finite[0] if finite else None)

    @property
    def dims(self) -> list[int]:
        """Numbers of dimensions of the real latents."""
        return [site.dim for site in self.real]

    def by_site(self, joint: torch.distributions.MultivariateNormal) -> list[torch.distributions.MultivariateNormal]:
        """Return the normals of the real latents, which are independent of one another under ``joint``."""
        stops = np.cumsum(self.dims)
        parts = [slice(stop - dim, stop) for stop, dim in zip(stops, self.dims, strict=True)]
        mean, precision = joint.mean, joint.precision_matrix
        return [
            torch.distributions.MultivariateNormal(mean[:, part], precision_matrix=precision[:, part, part])
            for part in parts
        ]

    @property
    def values(self) -> int:
        """Number C of values of the finite latent; 1 where there is none."""
        return (self.finite.cardinality if self.finite else None) or 1

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, c, z), (C, S, B), nats, of rows ``x`` (B, D) at S points ``z`` (S, B, dim) for each row."""
        points, rows, _ = z.shape
        parts = z.repeat(self.values, 1, 1).split(self.dims, -1)
        latents = {
            site.name: part.reshape(-1, rows, *site.event_shape) for site, part in zip(self.real, parts, strict=True)
        }
        if self.finite is not None:
            # One column for all rows, so that what the program looks up by c is not copied for each.
            latents[self.finite.name] = torch.arange(self.values).repeat_interleave(points)[:, None]
        with isolated(0):
            return log_joint(self.entry, Batch.full(x), latents).reshape(self.values, points, rows)

    def prior_draws(self, x: Tensor) -> Tensor:
        """Draws of the real latents from the prior, (PRIOR_DRAWS, B, dim)."""
        with pyro.plate("particles", PRIOR_DRAWS, dim=PARTICLE_DIM):
            nodes = poutine.trace(self.entry).get_trace(Batch.full(x)).nodes
        draws = [nodes[site.name]["value"].expand(PRIOR_DRAWS, len(x), *site.event_shape) for site in self.real]
        return torch.cat([draw.reshape(PRIOR_DRAWS, len(x), -1) for draw in draws], -1)


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
    def __init__(self, density: _Density, x: Tensor, *, diagonal: bool) -> None:
        self.density, self.x = density, x
        blocks = [torch.eye(dim) if diagonal else torch.ones(dim, dim) for dim in density.dims]
        self.free = torch.block_diag(*blocks).to(x.dtype)  # which elements of q's precision may differ from zero
        nodes, weights = gaussian_nodes(sum(density.dims))
        self.nodes, self.weights = nodes.to(x.dtype), weights.to(x.dtype)

    def likeliest(self) -> list[_Normals]:
        """Return narrow normals at the draw of the prior with the largest log p(x, c, z), for each row: one per c.

        From a q as wide as the prior, a sharp posterior shows neither its place nor its curvature.
        """
        with isolated(0), torch.no_grad():
            parts = [self._likeliest_rows(self.x[s]) for s in self._spans(len(self.x), PRIOR_DRAWS)]
        mean, precision = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        return [_Normals(*start) for start in zip(mean, precision, strict=True)]

    def _likeliest_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        draws = self.density.prior_draws(x)
        best = self.density.log_joint(x, draws).argmax(1)
        mean = draws[best, torch.arange(len(x))]
        spread = NARROW * draws.flatten(0, 1).std(0)
        return mean, torch.diag(spread**-2).expand(*mean.shape[:2], -1, -1)

    def _spans(self, rows: int, points: int) -> Iterator[slice]:
        """Yield spans of rows that bound the memory of evaluations at so many points of each."""
        chunk = max(1, CHUNK_ELEMENTS // (self.density.values * points * self.density.entry.elements(self.x)))
        return (slice(i, i + chunk) for i in range(0, rows, chunk))

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
        proposal, valid = _step(state, self.free)
        evaluated = _State(proposal, *self._evaluate(proposal, rows), state.rate)
        better = valid & (evaluated.value > state.value)
        gains = torch.where(better, evaluated.value - state.value, torch.zeros_like(state.value))
        rate = torch.where(better, (1.5 * state.rate).clamp(max=1.0), 0.4 * state.rate)
        # A row settles when a bold step gains nothing to speak of, or no step however small gains anything.
        settled = (better & (gains < SETTLED) & (state.rate > 0.3)) | (rate < LEAST_RATE)
        return evaluated.where(better, state)._replace(rate=rate), gains, settled

    def refine(self, families: Sequence[Family], starts: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
        """Ascend from ``starts`` (N, P) by Adam on fixed nodes, lowering the step size at each standstill.

        Returns the best values of each real latent that each row has met.
        """
        sizes = [family.size for family in families]
        values = torch.cat(list(starts), -1).detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([values], lr=ADAM_RATE)
        best, best_value, standstills = values.detach().clone(), self.x.new_full((len(self.x),), -math.inf), 0
        for _ in range(ADAM_BLOCKS):
            before = float(best_value.sum())
            for _ in range(ADAM_BLOCK):
                optimizer.zero_grad()
                value = self._value_and_gradient(families, values)
                better = value > best_value
                best = torch.where(better[:, None], values.detach(), best)
                best_value = torch.where(better, value, best_value)
                optimizer.step()
            if float(best_value.sum()) - before < GAIN * len(self.x):
                standstills += 1
                optimizer.param_groups[0]["lr"] *= 0.2
            if standstills == PATIENCE:
                return best.split(sizes, -1), True
        return best.split(sizes, -1), False

    def _value_and_gradient(self, families: Sequence[Family], values: Tensor) -> Tensor:
        """Return the ELBO of each row and leave the gradient of minus their sum in ``values``."""
        parts = []
        for s in self._spans(len(values), len(self.nodes)):
            of_sites = values[s].split([family.size for family in families], -1)
            q = [_vectors(family.distribution(each)) for family, each in zip(families, of_sites, strict=True)]
            scale_tril = _blocks([each.scale_tril for each in q])  # type: ignore[attr-defined]
            points = self._points(torch.cat([each.mean for each in q], -1), scale_tril)
            entropy = torch.stack([each.entropy() for each in q]).sum(0)
            value = self._expected(self.x[s], points).logsumexp(0) + entropy
            (-value.sum()).backward()
            parts.append(value.detach())
        return torch.cat(parts)

    def best_logits(self, q: _Normals) -> Tensor:
        """Log probabilities (N, C) of the finite latent's best q given ``q`` over the real one."""
        with torch.no_grad():
            points = self._points(q.mean, q.scale_tril())
            spans = self._spans(len(self.x), len(self.nodes))
            expected = torch.cat([self._expected(self.x[s], points[:, s]) for s in spans], 1)
        return expected.log_softmax(0).mT

    def _points(self, mean: Tensor, scale_tril: Tensor) -> Tensor:
        """Nodes (S, B, dim) of the normals with ``mean`` (B, dim) and ``scale_tril`` (B, dim, dim)."""
        return mean + torch.einsum("nij,sj->sni", scale_tril, self.nodes)

    def _expected(self, x: Tensor, z: Tensor) -> Tensor:
        """E[log p(x, c, z)] of each value c and row, (C, B), nats, over the nodes ``z`` (S, B, dim)."""
        return torch.einsum("s,csn->cn", self.weights, self.density.log_joint(x, z))

    def _evaluate(self, q: _Normals, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.x[rows]
        spans = self._spans(len(x), len(self.nodes))
        parts = [self._evaluate_rows(x[s], _Normals(q.mean[s], q.precision[s])) for s in spans]
        value, slope, curvature = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return value, slope, -curvature

    def _evaluate_rows(self, x: Tensor, q: _Normals) -> tuple[Tensor, Tensor, Tensor]:
        scale_tril = q.scale_tril()
        z = self._points(q.mean, scale_tril).detach().requires_grad_()
        bound = self._expected(x, z).logsumexp(0)
        (weighted_slopes,) = torch.autograd.grad(bound.sum(), z)
        entropy = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * z.shape[-1] * (1 + math.log(2 * math.pi))
        curvature = q.precision @ torch.einsum("sni,snj->nij", z.detach() - q.mean, weighted_slopes)
        return bound.detach() + entropy, weighted_slopes.sum(0), (curvature + curvature.mT) / 2


def _vectors(q: Distribution) -> Distribution:
    """Return ``q`` over real vectors, whatever the shape of the site's draws."""
    return q.base_dist if isinstance(q, Reshaped) else q


def _blocks(matrices: Sequence[Tensor]) -> Tensor:
    """Put ``matrices`` (N, K, K) on the diagonal of one, (N, ΣK, ΣK)."""
    if len(matrices) == 1:
        return matrices[0]
    sizes = [matrix.shape[-1] for matrix in matrices]
    pads = zip(np.cumsum(sizes) - sizes, sizes, matrices, strict=True)
    wide = [torch.nn.functional.pad(m, (int(before), sum(sizes) - int(before) - size)) for before, size, m in pads]
    return torch.cat(wide, -2)


def _side_by_side(normals: Sequence[_Normals]) -> _Normals:
    """Return one normal over all numbers, in which the given ones are independent."""
    return _Normals(torch.cat([n.mean for n in normals], -1), _blocks([n.precision for n in normals]))


def _normals(q: Distribution) -> _Normals:
    q = _vectors(q)
    covariance = getattr(q, "covariance_matrix", None)
    precision = torch.diag_embed(1 / q.variance) if covariance is None else torch.linalg.inv(covariance)
    return _Normals(q.mean.detach(), precision.detach())


def _step(state: _State, free: Tensor) -> tuple[_Normals, Tensor]:
    now, rate = state.normals, state.rate
    metric = now.precision + rate[:, None, None] * (state.target - now.precision)
    factor, failed = torch.linalg.cholesky_ex(metric)
    # Where the curvature is not that of a maximum, keep the old precision and follow the slope alone.
    metric = torch.where((failed > 0)[:, None, None], now.precision, metric)
    factor = torch.where((failed > 0)[:, None, None], torch.linalg.cholesky(now.precision), factor)
    move = torch.cholesky_solve(state.slope[..., None], factor)[..., 0]
    # A diagonal normal moves by the whole curvature too: by its diagonal alone, correlated numbers would wait for
    # one another.
    return _Normals(now.mean + rate[:, None] * move, metric * free), torch.isfinite(move).all(-1)


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
    white = whitened_noise(SOBOL_NODES, dim, seed=0, like=torch.empty(0, dtype=torch.float64))
    return white, torch.full((len(white),), 1 / len(white), dtype=white.dtype)
