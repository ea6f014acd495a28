"""The best member of a guide's family for each datum, at fixed θ: it marks the approximation gap.

In closed form where the posterior is normal or categorical; otherwise by natural gradients (Khan & Rue
2023, section 1.3), a Newton method for normal families: with f = log p(x, z), the precision moves towards
-E[∇²f] and the mean along its inverse times E[∇f]. The Hessian is taken from gradients by Stein's lemma,
E[∇²f] = Σ⁻¹ E[(z - m) ∇fᵀ], which holds for decoders with kinks too. A family that does not contain the normal of
that precision takes its member nearest to it. How the steps are made is in :mod:`elbozoo.inference.member_search`.

A finite latent c beside the real one, independent of it under q, is maximised out. Given q(z) the best q(c) is
proportional to exp E[log p(x, c, z)] (Bishop 2006, equation 10.9), and the ELBO there is

    log Σ_c exp E[log p(x, c, z)] + entropy of q(z),

whose derivatives are those of E[Σ_c q(c) log p(x, c, z)] at that q(c). So each step is one of coordinate ascent:
q(c) at its optimum, then a natural-gradient step of q(z), which for a normal posterior given c is its optimum too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, LowRankMultivariateNormal

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.families import FAMILIES, Family, LowRankNormal, Reshaped
from elbozoo.guides.local import LocalGuide
from elbozoo.inference.member_search import Normals, NormalSearch, blocks
from elbozoo.inference.weights import PARTICLE_DIM, log_joint
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasPosterior
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import LatentSite

SEARCHED = ("diagonal-normal", "full-rank-normal", "low-rank-normal")
PRIOR_DRAWS, NARROW = 256, 0.1
CHUNK_ELEMENTS = 2**20  # numbers held at once: chunks that fit into the cache take half the time of larger ones


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
    one from below, and never below a ``start`` of the same family.

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
    members = [guide.families[site.name] for site in density.real]
    at_once = CHUNK_ELEMENTS // (density.values * density.entry.elements(x))
    search = NormalSearch(
        lambda rows, z: density.log_joint(x[rows], z),
        len(x),
        density.dims,
        guide.family,
        [member.rank for member in members if isinstance(member, LowRankNormal)],
        at_once=at_once,
        dtype=x.dtype,
    )
    given = [] if start is None else [_side_by_side([_normals(start[site.name]) for site in density.real])]
    found = search.run(density.likeliest(x, at_once), given)
    values = {
        site.name: _parameters(member, normal)
        for site, member, normal in zip(density.real, members, search.by_latent(found.normals), strict=True)
    }
    if density.finite is not None:
        values[density.finite.name] = search.best_logits(found.normals)
    return BestMember(_with_values(guide, values), found.converged, "natural gradient")


def _parameters(member: Family, normal: Normals) -> Tensor:
    """Return the parameters (N, P) of the member of the family that ``normal`` is."""
    if isinstance(member, LowRankNormal):
        return torch.cat([normal.mean, 0.5 * normal.variance.log(), normal.factor.flatten(-2)], -1)
    closest = member.closest(torch.distributions.MultivariateNormal(normal.mean, normal.covariance()))
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

    def likeliest(self, x: Tensor, at_once: int) -> list[Normals]:
        """Return narrow normals at the draw of the prior with the largest log p(x, c, z), for each row: one per c.

        From a q as wide as the prior, a sharp posterior shows neither its place nor its curvature.
        """
        with isolated(0), torch.no_grad():
            parts = [self._likeliest_rows(rows) for rows in x.split(max(1, at_once // PRIOR_DRAWS))]
        mean, spread = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        return [Normals.of(*start) for start in zip(mean, torch.diag_embed(spread.square()), strict=True)]

    def _likeliest_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the likeliest draw and its standard deviations, (C, B, dim) each."""
        draws = self.prior_draws(x)
        best = self.log_joint(x, draws).argmax(1)
        mean = draws[best, torch.arange(len(x))]
        return mean, (NARROW * draws.flatten(0, 1).std(0)).expand_as(mean)


def _side_by_side(normals: Sequence[Normals]) -> Normals:
    """Return one normal over all numbers, in which the given ones are independent."""
    mean, factor = torch.cat([n.mean for n in normals], -1), blocks([n.factor for n in normals])
    variance, root = torch.cat([n.variance for n in normals], -1), blocks([n.root for n in normals])
    return Normals(mean, root, variance, factor)


def _normals(q: Distribution) -> Normals:
    q = q.base_dist if isinstance(q, Reshaped) else q
    covariance = getattr(q, "covariance_matrix", None)
    covariance = torch.diag_embed(q.variance) if covariance is None else covariance
    factor = q.cov_factor.detach() if isinstance(q, LowRankMultivariateNormal) else None
    return Normals.of(q.mean.detach(), covariance.detach(), factor)
