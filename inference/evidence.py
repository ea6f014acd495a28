"""The evidence log p(x): exact, by quadrature, or as an estimate that says so."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from elbozoo.guides.base import Guide
from elbozoo.inference.annealing import annealed_evidence
from elbozoo.inference.cubature import LARGEST_DIM, log_cubature
from elbozoo.inference.unconstrained import UnconstrainedProgram
from elbozoo.inference.weights import MODEL_ELEMENTS, Weights, importance_weights, log_joint
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import PARTICLE_DIM
from elbozoo.models.contract.entry import (
    Entry,
    HasEnumeratedEvidence,
    HasOracle,
    HasReducedJoint,
    HasRowLikelihoods,
    supports_quadrature,
)
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import LatentSite, log_density
from elbozoo.models.numerics.quadrature import Quadrature, log_integral

PARTICLES = 1000
CHUNK_ROWS = 65_536
QUADRATURE_TOLERANCE = 1e-5  # nats per datum
POINTS = 2**15  # evaluated at once, however narrow the rows are: a decoder holds a layer for each
STARTS = 1000  # draws of the prior about which cubature looks for the mass
UNKNOWN_SCALE = 10.0  # standard deviation of points to start from where there is no prior to draw from
MOST_CHAINS, FEWEST_CHAINS, CHAIN_ROWS = 256, 64, 2**17  # of the annealing; fewer where rows times chains are many
HARD_ROW, HARD_ROW_NODES = 1e-4, 2**18  # rows whose error is above this, nats, are integrated again with more nodes


class Evidence(NamedTuple):
    """log p(x) of a data set at the present θ; it does not depend on a guide, unless it is an estimate from its draws.

    Attributes
    ----------
    value : float
        Total over the rows, nats.
    standard_error : float
        Standard error of ``value``, nats: zero for ``exact``; for ``quadrature`` an upper estimate of its
        error; for ``estimate`` the Monte Carlo error of a quantity that is below log p(x) in expectation, be it
        by annealing or from draws of a guide.
    kind : str
        ``exact``, ``quadrature`` or ``estimate``.
    per_datum : Tensor (N,) or None
        log p(x_n) of each row; None where the latent is global and the rows are not independent.
    """

    value: float
    standard_error: float
    kind: Literal["exact", "quadrature", "estimate"]
    per_datum: Tensor | None

    def __repr__(self) -> str:
        return summarised(self)


def summarised(record: Any) -> str:
    """Return the repr of a named tuple in which tensors are told by their shapes, so that it is read at a glance."""
    fields = [
        f"{name}=<tensor {tuple(value.shape)}>" if isinstance(value, Tensor) else f"{name}={value!r}"
        for name, value in zip(record._fields, record, strict=True)
    ]
    return f"{type(record).__name__}({', '.join(fields)})"


def log_evidence(entry: Entry, x: Tensor) -> Evidence | None:
    """Return the evidence of ``x`` (N, D) where it can be had without a guide, otherwise None.

    Exact where the entry knows it; by quadrature where it is an integral over two real dimensions for each datum,
    or over three for all data; an annealed estimate where there are more for all data and they are continuous. The same
    data and parameters have the same value whenever it is asked for.
    """
    if isinstance(entry, HasOracle):
        return _exact(entry, x)
    with torch.no_grad():
        enumerated = entry.enumerated_log_evidence(x) if isinstance(entry, HasEnumeratedEvidence) else None
    if enumerated is not None:
        return Evidence(float(enumerated), 0.0, "exact", None)
    if supports_quadrature(entry.latent_sites(x)):
        return _quadrature(entry, x)
    with isolated(0):
        if isinstance(entry, HasReducedJoint):
            return _reduced(entry, x)
        program = UnconstrainedProgram.of(entry, x)
        return None if program is None else _global(program)


def estimate_evidence(weights: Weights) -> Evidence:
    """Importance-sampled estimate of the evidence (an IWAE bound), with the delta method's standard error.

    In expectation the value is a lower bound of log p(x) for every number of draws (Burda et al. 2016). Where the
    latent was enumerated, the weights add up to p(x) itself, and the evidence is exact.
    """
    marginal = weights.marginal()
    if weights.is_enumerated and len(marginal) == 1:
        per_datum = marginal[0]
        return Evidence(float(per_datum.sum()), 0.0, "exact", per_datum)
    draws = len(marginal)
    per_datum = torch.logsumexp(marginal, 0) - math.log(draws)
    relative = (marginal - per_datum).exp()
    variance = relative.var(0) / draws if draws > 1 else torch.zeros_like(per_datum)
    error = float(variance.sum().sqrt())
    return Evidence(float(per_datum.sum()), error, "estimate", per_datum if len(per_datum) > 1 else None)


def evidence_or_estimate(
    entry: Entry, guide: Guide, x: Tensor, seed: int, particles: int = PARTICLES
) -> Evidence | None:
    """Return :func:`log_evidence`, or an estimate from draws of the guide; None if the guide has no density."""
    known = log_evidence(entry, x)
    if known is not None or not guide.is_bound:
        return known
    return estimate_evidence(importance_weights(entry, guide, Batch.full(x), particles, seed))


def _exact(entry: HasOracle, x: Tensor) -> Evidence:
    with torch.no_grad():
        if all(site.is_local for site in entry.latent_sites(x)):  # type: ignore[attr-defined]
            per_datum = torch.cat([entry.log_evidence(part) for part in x.split(CHUNK_ROWS)])
            return Evidence(float(per_datum.sum()), 0.0, "exact", per_datum)
        return Evidence(float(entry.log_evidence(x)), 0.0, "exact", None)


class _Sites(NamedTuple):
    """Latent sites of a program for quadrature.

    Attributes
    ----------
    real : list of LatentSite
        Those that are integrated over, side by side in the order in which they are drawn.
    finite : list of LatentSite
        Those that are summed over at each point.
    """

    real: list[LatentSite]
    finite: list[LatentSite]

    @classmethod
    def of(cls, entry: Entry, x: Tensor) -> _Sites:
        """Return the sites of ``entry``, read off a trace on ``x``."""
        sites = entry.latent_sites(x)
        return cls([s for s in sites if not s.is_enumerable], [s for s in sites if s.is_enumerable])

    @property
    def values(self) -> int:
        """Number of terms of the sum at each point."""
        return math.prod(site.cardinality or 1 for site in self.finite)


def _quadrature(entry: Entry, x: Tensor) -> Evidence:
    sites = _Sites.of(entry, x)
    with isolated(0), torch.no_grad():
        centre, scale = _prior_moments(entry, sites, x)

        def integrate(rows: Tensor, **limits: int) -> Quadrature:
            return log_integral(
                lambda index, nodes: _log_likelihood_shared(entry, sites, rows[index], nodes),
                lambda index, nodes: _log_joint_rowwise(entry, sites, rows[index], nodes),
                len(rows),
                centre,
                scale,
                common=lambda nodes: _log_prior_shared(entry, sites, rows[:1], nodes),
                tolerance=QUADRATURE_TOLERANCE,
                **limits,
            )

        value, error, _ = integrate(x)
        hard = error > HARD_ROW
        if hard.any():
            again = integrate(x[hard], own_nodes=HARD_ROW_NODES)
            value[hard], error[hard] = again.log_value, again.error
    return Evidence(float(value.sum()), float(error.sum()), "quadrature", value)


def _reduced(entry: HasReducedJoint, x: Tensor) -> Evidence:
    dim = entry.reduced_dim
    starts = UNKNOWN_SCALE * torch.randn(STARTS, dim, dtype=x.dtype)
    found = log_cubature(lambda u: entry.reduced_log_joint(x, u), starts)
    return Evidence(found.log_value, found.error, "quadrature", None)


def _global(program: UnconstrainedProgram) -> Evidence:
    if program.dim <= LARGEST_DIM:
        integral = log_cubature(program.log_joint, program.prior_draws(STARTS))
        return Evidence(integral.log_value, integral.error, "quadrature", None)
    chains = min(MOST_CHAINS, max(FEWEST_CHAINS, CHAIN_ROWS // len(program.batch.x)))
    estimate = annealed_evidence(program.log_terms, program.prior_draws(chains), chains=chains)
    return Evidence(estimate.log_value, estimate.standard_error, "estimate", None)


def _prior_moments(entry: Entry, sites: _Sites, x: Tensor) -> tuple[Tensor, Tensor]:
    draws = poutine.trace(entry).get_trace(Batch.full(x[:1].expand(4096, *x.shape[1:])))
    z = torch.cat([draws.nodes[s.name]["value"].reshape(4096, s.dim) for s in sites.real], -1)
    return z.mean(0), z.std(0)


def _log_joint_rowwise(entry: Entry, sites: _Sites, x: Tensor, nodes: Tensor) -> Tensor:
    """Log p(x_n, z_ng), (N, G), nats, at points ``nodes`` (N, G, K) of each row's own."""
    summed_out = [site.name for site in sites.finite]
    at_once = max(1, min(POINTS, MODEL_ELEMENTS // (sites.values * entry.elements(x))))  # points of all rows together
    rows = min(len(x), at_once)
    done = []
    for some, theirs in zip(x.split(rows), nodes.split(rows), strict=True):
        parts = [
            log_joint(entry, Batch.full(some), _by_site(sites.real, part.transpose(0, 1)), summed_out).mT
            for part in theirs.split(max(1, at_once // rows), 1)
        ]
        done.append(torch.cat(parts, -1))
    return torch.cat(done)


def _log_likelihood_shared(entry: Entry, sites: _Sites, x: Tensor, nodes: Tensor) -> Tensor:
    """Log p(x_n given z_g), (N, G), nats, at ``nodes`` (G, K) of all rows; the log joint where it is not known."""
    if isinstance(entry, HasRowLikelihoods):
        return entry.log_likelihood(x, nodes)
    return _log_joint_rowwise(entry, sites, x, nodes.expand(len(x), -1, -1))


def _log_prior_shared(entry: Entry, sites: _Sites, row: Tensor, nodes: Tensor) -> Tensor:
    """Log p(z_g), (G,), nats, where :func:`_log_likelihood_shared` leaves it out: any one row (1, D) shows it."""
    if not isinstance(entry, HasRowLikelihoods):
        return nodes.new_zeros(len(nodes))
    program = poutine.condition(entry, data=_by_site(sites.real, nodes[:, None]))
    with pyro.plate("particles", len(nodes), dim=PARTICLE_DIM):
        trace = poutine.trace(program).get_trace(Batch.full(row))
    names = {site.name for site in sites.real}
    trace.compute_log_prob(lambda name, _: name in names)
    return torch.stack([log_density(trace.nodes[name]).expand(len(nodes), 1)[:, 0] for name in names]).sum(0)


def _by_site(sites: list[LatentSite], z: Tensor) -> dict[str, Tensor]:
    parts = z.split([site.dim for site in sites], -1)
    return {site.name: part.reshape(*z.shape[:-1], *site.event_shape) for site, part in zip(sites, parts, strict=True)}
