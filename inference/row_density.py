"""Log p(x, z) of each row as a function of real coordinates of its continuous latents, finite ones summed out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from elbozoo.inference.weights import log_joint
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import PARTICLE_DIM
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import LatentSite

PROBES = 4  # draws of the prior that show which coordinates the density depends on
MOST_VALUES = 1000  # of all finite latents together


class RowDensity:
    """The density of a program with local latents, S points u (S, B, K) for each of B rows at once.

    The coordinates of all continuous sites stand side by side, in the order in which the program draws them, each
    carried to the reals by the bijection of its support; the Jacobian of that is in the density. A coordinate on
    which the density does not depend belongs to an element that the program masks, such as the padding of a group. It
    has a standard normal distribution here, so that there is a distribution at all, and log p(x) is what it was.

    Parameters
    ----------
    entry : Entry
        The program; its θ may change between calls.
    batch : Batch
        Rows.
    """

    def __init__(self, entry: Entry, batch: Batch) -> None:
        sites = entry.latent_sites(batch.x)
        self.entry, self.batch = entry, batch
        self.sites = [site for site in sites if not site.is_enumerable]
        self.summed_out = [site.name for site in sites if site.is_enumerable]
        self.transforms = [biject_to(site.support) for site in self.sites]
        inverse = [t.inverse_shape(site.event_shape) for t, site in zip(self.transforms, self.sites, strict=True)]
        self.shapes = [torch.Size(shape) for shape in inverse]
        self.idle = self._idle(self.prior_draws(PROBES))

    @property
    def dim(self) -> int:
        """Number K of coordinates."""
        return sum(shape.numel() for shape in self.shapes)

    def prior_draws(self, count: int) -> Tensor:
        """Draw ``count`` points (S, B, K) from the prior, from the global random state."""
        with torch.no_grad(), pyro.validation_enabled(False), pyro.plate("particles", count, dim=PARTICLE_DIM):
            trace = poutine.trace(self.entry).get_trace(self.batch)
        lead = (count, len(self.batch.x))
        parts = []
        for site, transform, shape in zip(self.sites, self.transforms, self.shapes, strict=True):
            value = trace.nodes[site.name]["value"].expand(*lead, *site.event_shape)
            parts.append(transform.inv(value).reshape(*lead, shape.numel()))
        return torch.cat(parts, -1)

    def log_joint(self, u: Tensor) -> Tensor:
        """Log density of the rows and of ``u`` (S, B, K): (S, B), nats; differentiable in both u and θ."""
        idle = -0.5 * (u.square() + math.log(2 * math.pi))
        return self._log_joint(u) + (idle * self.idle).sum(-1)

    def _log_joint(self, u: Tensor) -> Tensor:
        values, log_volume = {}, u.new_zeros(u.shape[:2])
        for site, transform, free in zip(self.sites, self.transforms, self._by_site(u), strict=True):
            values[site.name] = transform(free)
            volume = transform.log_abs_det_jacobian(free, values[site.name])
            log_volume = log_volume + volume.reshape(*u.shape[:2], -1).sum(-1)
        with pyro.validation_enabled(False):
            return log_joint(self.entry, self.batch, values, self.summed_out) + log_volume

    def _by_site(self, u: Tensor) -> Iterator[Tensor]:
        parts = u.split([shape.numel() for shape in self.shapes], -1)
        return (part.reshape(*u.shape[:2], *shape) for part, shape in zip(parts, self.shapes, strict=True))

    def _idle(self, u: Tensor) -> Tensor:
        """Which coordinates change nothing, (B, K), 1 or 0."""
        with torch.enable_grad():
            u = u.requires_grad_()
            (slope,) = torch.autograd.grad(self._log_joint(u).sum(), u)
        return (slope == 0).all(0).to(u.dtype)


def refusal_of_density(entry: Entry, sites: Sequence[LatentSite]) -> str | None:
    """Say why a program with the latent ``sites`` has no :class:`RowDensity`, or return None."""
    for site in sites:
        if not site.is_local:
            return f"the latent {site.name!r} is one for the whole data set, and draws are made for each datum"
        if not site.is_proper:
            return f"the prior of the latent {site.name!r} is flat, so that there is no log p(x) for EM to climb"
        if site.support.is_discrete and not site.is_enumerable:
            return (
                f"the latent {site.name!r} is discrete and not one of finitely many values, so that it can neither be "
                "moved along gradients nor be summed out"
            )
    values = math.prod(site.cardinality or 1 for site in sites)
    if values > MOST_VALUES:
        return f"its finite latents take {values} values together, more than the {MOST_VALUES} that are summed out"
    if all(site.is_discrete for site in sites):
        return "all of its latents are finite, so that nothing has to be drawn: a free-categorical q is exact"
    return _refusal_of_trial(entry)


def _refusal_of_trial(entry: Entry) -> str | None:
    """Evaluate the density once, on rows that the program draws."""
    try:
        x, _ = entry.simulate(2, seed=0)
        with isolated(0):
            density = RowDensity(entry, Batch.full(x))
            shape = density.log_joint(density.prior_draws(PROBES)).shape
    except (NotImplementedError, RuntimeError, ValueError, IndexError) as error:
        return f"it cannot be evaluated for several draws of each row at once ({_first_line(error)})"
    if shape != (PROBES, 2):
        return f"for {PROBES} draws of each of 2 rows it has log densities of shape {tuple(shape)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().partition("\n")[0]
