"""The log joint of a program whose latents are all global, as a density over unconstrained real coordinates.

Each site is carried to the reals by the bijection that its support has in ``torch.distributions.biject_to``, as
Hamiltonian Monte Carlo and Laplace's approximation do. With the Jacobian of that map in the prior,

    log p(x) = log ∫ exp(log_prior(u) + log_likelihood(u)) du.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import PARTICLE_DIM
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.sites import LatentSite, is_local_node, log_density

CHUNK_ELEMENTS = 2**19  # points times numbers in the data that are held at once


class LogTerms(NamedTuple):
    """Terms of the log joint at G points, nats.

    Attributes
    ----------
    prior : Tensor (G,)
        Log density of the unconstrained latents, Jacobian included; -inf where it is not a number.
    likelihood : Tensor (G,)
        Log p(x given z); -inf where it is not a number.
    """

    prior: Tensor
    likelihood: Tensor

    def joint(self) -> Tensor:
        """Their sum, (G,)."""
        return self.prior + self.likelihood


class UnconstrainedProgram:
    """A program on given data as a function of unconstrained coordinates u (G, K), G points at once.

    Attributes
    ----------
    dim : int
        Number K of real coordinates.
    """

    def __init__(self, entry: Entry, x: Tensor, sites: Sequence[LatentSite]) -> None:
        self.entry, self.batch, self.sites = entry, Batch.full(x), list(sites)
        self.transforms = [biject_to(site.support) for site in sites]
        inverse = [t.inverse_shape(site.event_shape) for t, site in zip(self.transforms, sites, strict=True)]
        self.shapes = [torch.Size(shape) for shape in inverse]
        self.dim = sum(shape.numel() for shape in self.shapes)

    @classmethod
    def of(cls, entry: Entry, x: Tensor) -> Self | None:
        """Return the program in these coordinates; None where it has none or does not broadcast over particles."""
        sites = entry.latent_sites(x)
        if any(site.is_local or site.support.is_discrete or not site.is_proper for site in sites):
            return None
        try:
            found = cls(entry, x, sites)
            with torch.no_grad():
                shapes = [value.shape for value in found._draw(2)]
                found._log_terms(x.new_zeros(2, found.dim))
        except (NotImplementedError, RuntimeError, ValueError):
            # A support without a bijection, or a program of the user's that was not written for particles.
            return None
        return found if shapes == [(2, 1, *site.event_shape) for site in sites] else None

    def prior_draws(self, count: int) -> Tensor:
        """Draw ``count`` points (G, K) from the prior, from the global random state; draws at the edge are left out."""
        with torch.no_grad():
            parts = [
                t.inv(value).reshape(count, -1) for t, value in zip(self.transforms, self._draw(count), strict=True)
            ]
            draws = torch.cat(parts, -1)
        return draws[draws.isfinite().all(-1)]

    def log_terms(self, u: Tensor) -> LogTerms:
        """Log prior and log likelihood at the points ``u`` (G, K); differentiable in ``u``."""
        size = max(1, CHUNK_ELEMENTS // max(1, self.batch.x.numel()))
        chunks = [self._log_terms(part) for part in u.split(size)]
        return LogTerms(*(_number(torch.cat(terms)) for terms in zip(*chunks, strict=True)))

    def log_joint(self, u: Tensor) -> Tensor:
        """Log p(x, u) at the points ``u`` (G, K): (G,), nats."""
        return self.log_terms(u).joint()

    def _draw(self, count: int) -> list[Tensor]:
        with pyro.validation_enabled(False), pyro.plate("particles", count, dim=PARTICLE_DIM):
            trace = poutine.trace(self.entry).get_trace(self.batch)
        return [trace.nodes[site.name]["value"] for site in self.sites]

    def _log_terms(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, log_jacobian = self._constrained(u)
        with pyro.validation_enabled(False), pyro.plate("particles", len(u), dim=PARTICLE_DIM):
            trace = poutine.trace(poutine.condition(self.entry, data=values)).get_trace(self.batch)
            trace.compute_log_prob()
        prior, likelihood = log_jacobian, torch.zeros_like(log_jacobian)
        for name, node in trace.nodes.items():
            if "unscaled_log_prob" not in node:
                continue
            width = len(self.batch.x) if is_local_node(node) else 1
            term = log_density(node).expand(len(u), width).sum(-1)
            if name in values:
                prior = prior + term
            else:
                likelihood = likelihood + term
        return prior, likelihood

    def _constrained(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the sites, (G, 1, ...) as one per particle, and the log of the Jacobian, (G,)."""
        values, log_jacobian = {}, u.new_zeros(len(u))
        parts = u.split([shape.numel() for shape in self.shapes], -1)
        for site, transform, shape, part in zip(self.sites, self.transforms, self.shapes, parts, strict=True):
            free = part.reshape(len(u), 1, *shape)
            values[site.name] = transform(free)
            volume = transform.log_abs_det_jacobian(free, values[site.name])
            log_jacobian = log_jacobian + volume.reshape(len(u), -1).sum(-1)
        return values, log_jacobian


def _number(log_value: Tensor) -> Tensor:
    """Far out, where a density overflows to inf - inf, there is no mass."""
    return log_value.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
