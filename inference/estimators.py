"""Estimators of log p(x) under one interface, each with its error and a word on whether to trust it.

| estimator | draws from | value | fails where |
|---|---|---|---|
| `prior` | the prior | log of the mean likelihood | the posterior is far narrower than the prior |
| `importance` | q | log of the mean weight | q misses what the posterior has, or has lighter tails |
| `iwae` | q | bound by K draws at a time (Burda et al. 2016) | as above; and it is a bound by design |
| `annealed` | the prior, carried to the posterior | log of the mean weight (Neal 2001) | modes are missed |
| `bidirectional` | the same, and back | a lower and an upper end (Grosse et al. 2015) | only where z is known |
| `quadrature` | – | an integral over few dimensions | there are more than two, or three for all data |

All but quadrature are logarithms of unbiased estimates of p(x), and so low in expectation by Jensen's inequality: by
half the relative variance of the mean weight of each datum, which adds up over the rows while standard errors add
up in squares. That shortfall is estimated and reported beside the standard error. Both come from the weights
themselves, and a handful of weights that outweigh all others tells nothing of those that would outweigh
them: below 10 effective draws (Kong et al. 1994) for some datum the estimate says that it is not to be trusted,
and is a lower bound at best.

References
----------
```bibtex
@inproceedings{burda2016importance,
  author = {Burda, Yuri and Grosse, Roger and Salakhutdinov, Ruslan},
  title = {Importance Weighted Autoencoders},
  booktitle = {International Conference on Learning Representations}, year = {2016}
}
@article{kong1994sequential,
  author = {Kong, Augustine and Liu, Jun S. and Wong, Wing Hung},
  title = {Sequential Imputations and {B}ayesian Missing Data Problems},
  journal = {Journal of the American Statistical Association},
  volume = {89}, number = {425}, pages = {278--288}, year = {1994}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd
import pyro
import torch
from pyro import poutine
from torch import Tensor

from elbozoo.guides.base import Guide
from elbozoo.inference.annealing import annealed_evidence
from elbozoo.inference.evidence import Evidence, log_evidence, summarised
from elbozoo.inference.row_annealing import (
    RowProgram,
    forward_log_weights,
    pilot_path,
    reverse_log_weights,
)
from elbozoo.inference.unconstrained import UnconstrainedProgram
from elbozoo.inference.weights import CHUNK_ELEMENTS, importance_weights
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import PARTICLE_DIM, collapsed
from elbozoo.models.contract.entry import (
    Entry,
    HasEnumeratedEvidence,
    HasOracle,
    Program,
    supports_cubature,
    supports_quadrature,
)
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure, unknown_name
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.options import Field, Options
from elbozoo.models.contract.sites import LatentSite, is_local_node, log_density

ENOUGH = 10.0  # effective draws of a datum: below, its standard error is not to be trusted
COARSE = 0.01  # nats per datum: error of a quadrature above which it is not to be trusted
DRAWS = 1000
CHAINS = 64  # whose draws are worth more, and cost hundreds of gradients each

Latents = Tensor | Mapping[str, Tensor]


class EstimatorOptions(Options):
    """Options of the estimators; each reads those that apply to it."""

    draws: int | None = Field(
        None, ge=2, description="draws, or chains, for each datum; none takes 1000, and 64 where they are annealed"
    )
    particles: int = Field(50, ge=1, description="draws K in each importance-weighted bound")
    temperatures: int = Field(200, ge=2, description="densities from prior to posterior that a chain crosses")


class EvidenceEstimate(NamedTuple):
    """Evidence as an estimator found it; the first four fields are those of :class:`Evidence`.

    Attributes
    ----------
    value : float
        Total over the rows, nats.
    standard_error : float
        Of ``value``, nats: by the delta method, or the error estimate of a quadrature.
    kind : str
        ``estimate``, ``quadrature``, or ``exact`` where all that was to be drawn could be enumerated.
    per_datum : Tensor (N,) or None
        Each row's part; None where the latent is global.
    estimator : str
        Its name.
    shortfall : float
        How far ``value`` is below log p(x) in expectation, total nats, estimated from the weights.
    effective_size : float
        Effective number of draws of the datum that has the fewest; NaN for a quadrature.
    reliable : bool
        Whether value, error and shortfall can be taken for what they say. If not, the value is a lower bound in
        expectation and no more.
    reason : str
        Why not; empty where it is reliable.
    upper : Evidence or None
        The upper end of a bidirectional estimate: above log p(x) in expectation.
    """

    value: float
    standard_error: float
    kind: Literal["exact", "quadrature", "estimate"]
    per_datum: Tensor | None
    estimator: str
    shortfall: float
    effective_size: float
    reliable: bool
    reason: str
    upper: Evidence | None = None

    def __repr__(self) -> str:
        return summarised(self)

    def interval(self, z: float = 2.0) -> tuple[float, float]:
        """Return the range that holds log p(x) within ``z`` standard errors, total nats.

        What is not reliable has no upper end of its own, since it tells only what p(x) is not below.
        """
        low = self.value - z * self.standard_error
        if self.upper is not None:
            return low, self.upper.value + z * self.upper.standard_error
        return low, self.value + self.shortfall + z * self.standard_error if self.reliable else math.inf


class _Request(NamedTuple):
    """All that an estimator may look at."""

    entry: Entry
    x: Tensor
    sites: list[LatentSite]
    guide: Guide | None
    options: EstimatorOptions
    latents: Latents | None
    seed: int

    @property
    def batch(self) -> Batch:
        return Batch.full(self.x)

    def draws(self, default: int) -> int:
        return self.options.draws or default


@dataclass(frozen=True)
class Estimator:
    """An estimator of log p(x).

    Attributes
    ----------
    name : str
        By which it is asked for.
    meaning : str
        One line on what it does.
    reads : tuple of str
        Options that it reads.
    refusal : callable
        Why it does not apply to an entry, its sites, data and guide; None where it does.
    run : callable
        From a request to the estimate.
    """

    name: str
    meaning: str
    reads: tuple[str, ...]
    refusal: Callable[[Entry, list[LatentSite], Tensor | None, Guide | None], str | None]
    run: Callable[[_Request], EvidenceEstimate]

    def reason_against(
        self, entry: Entry, sites: list[LatentSite], x: Tensor | None, guide: Guide | None
    ) -> str | None:
        """Say why it does not apply, or return None."""
        for site in sites:
            if not site.is_proper:
                return f"the prior of the latent {site.name!r} is flat, so that p(x) does not exist"
        return self.refusal(entry, sites, x, guide)


def estimate_log_evidence(
    entry: Entry,
    x: Tensor,
    estimator: str,
    *,
    guide: Guide | None = None,
    latents: Latents | None = None,
    seed: int = 0,
    **options: Any,
) -> EvidenceEstimate:
    """Estimate log p(x) at the θ of ``entry`` by the estimator of that name.

    Parameters
    ----------
    x : Tensor (N, D)
        Rows, or arranged data, float64.
    estimator : str
        ``prior``, ``importance``, ``iwae``, ``annealed``, ``bidirectional`` or ``quadrature``.
    guide : Guide, optional
        q, for those that draw from it.
    latents : Tensor (N, ...) or mapping by site, optional
        The z that the rows were simulated from, for ``bidirectional``.
    seed : int
        Decides every draw.
    **options
        See :class:`EstimatorOptions`.

    Raises
    ------
    InvalidInput
        For an unknown name or option, or an estimator that does not apply, with the reason.
    NumericalFailure
        If no draw of some datum has any weight.
    """
    if estimator not in ESTIMATORS:
        raise unknown_name("estimator", estimator, ESTIMATORS)
    chosen = ESTIMATORS[estimator]
    parsed = EstimatorOptions.parse(options)
    for name in options:
        if name not in chosen.reads:
            read = ", ".join(chosen.reads) or "none"
            raise InvalidInput(f"option {name}: found it for estimator {estimator!r}, expected {read}; leave it out")
    sites = entry.latent_sites(x)
    if reason := chosen.reason_against(entry, sites, x, guide):
        others = (e.name for e in ESTIMATORS.values() if e.reason_against(entry, sites, x, guide) is None)
        fitting = ", ".join(others) or "none"
        raise InvalidInput(
            f"estimator {estimator!r} does not apply to {entry.name()}: {reason}; estimators that do: {fitting}"
        )
    return chosen.run(_Request(entry, x, sites, guide, parsed, latents, seed))


def list_estimators(entry: Entry, guide: Guide | None = None) -> pd.DataFrame:
    """Return a table of all estimators for ``entry``: what they do, the options they read, and why some do not fit."""
    sites = entry.latent_sites()
    rows = [
        {"estimator": e.name, "meaning": e.meaning, "options": ", ".join(e.reads), "fits": reason is None}
        | {"reason": reason or ""}
        for e in ESTIMATORS.values()
        for reason in [e.reason_against(entry, sites, None, guide)]
    ]
    return pd.DataFrame(rows).set_index("estimator")


def _prior(request: _Request) -> EvidenceEstimate:
    draws = request.draws(DRAWS)
    with isolated(request.seed), torch.no_grad():
        return _of_weights("prior", _prior_log_weights(request, draws), advice="draw from q by estimator='importance'")


def _importance(request: _Request) -> EvidenceEstimate:
    log_weights = _guide_log_weights(request)
    if len(log_weights) == 1:
        return _exact("importance", log_weights[0])
    return _of_weights("importance", log_weights, advice="take more draws, a richer guide or estimator='annealed'")


def _iwae(request: _Request) -> EvidenceEstimate:
    draws, particles = request.draws(max(DRAWS, 2 * request.options.particles)), request.options.particles
    if draws < 2 * particles:
        raise InvalidInput(
            f"option draws: found {draws} for bounds of {particles} particles, expected at least {2 * particles}, so "
            "that there are two bounds to tell an error from"
        )
    log_weights = _guide_log_weights(request, draws)
    if len(log_weights) == 1:
        return _exact("iwae", log_weights[0])
    together = _of_weights("iwae", log_weights, advice="take more particles or estimator='importance'")
    bounds = log_weights[: draws // particles * particles].unflatten(0, (-1, particles)).logsumexp(1)
    bounds = bounds - math.log(particles)
    per_datum = bounds.mean(0)
    value = float(per_datum.sum())
    # A bound stands on K draws: what is missing is the way to the mean over all draws, and the shortfall of that one.
    sizes = _effective_sizes(log_weights) * particles / len(log_weights)
    reason = _distrust(sizes, particles, "take more particles or estimator='importance'")
    return together._replace(
        value=value,
        standard_error=float((bounds.var(0) / len(bounds)).sum().sqrt()),
        per_datum=per_datum if together.per_datum is not None else None,
        shortfall=max(0.0, together.value + together.shortfall - value),
        effective_size=float(sizes.min()),
        reliable=not reason,
        reason=reason,
    )


def _annealed(request: _Request) -> EvidenceEstimate:
    chains, advice = request.draws(CHAINS), "take more temperatures or more draws"
    with isolated(request.seed):
        if all(site.is_local for site in request.sites):
            log_weights = torch.cat([_forward(request, part, chains) for part in _parts(request, chains)], -1)
            return _of_weights("annealed", log_weights, advice=advice)
        program = UnconstrainedProgram.of(request.entry, request.x)
        assert program is not None
        found = annealed_evidence(program.log_terms, program.prior_draws(max(chains, CHAINS)), chains=chains)
    return _of_weights("annealed", found.log_weights[:, None], advice="take more draws")


def _bidirectional(request: _Request) -> EvidenceEstimate:
    chains, advice = request.draws(CHAINS), "take more temperatures or more draws"
    known = _latents_by_site(request)
    forward, reverse = [], []
    with isolated(request.seed):
        for part in _parts(request, chains):
            program = RowProgram(request.entry, request.sites, part)
            path = pilot_path(program, request.options.temperatures)
            draw = program.coordinates({name: value[part.index][None] for name, value in known.items()})
            forward.append(forward_log_weights(program, path, chains))
            reverse.append(reverse_log_weights(program, path, draw, chains))
    lower = _of_weights("bidirectional", torch.cat(forward, -1), advice=advice)
    inverse = _of_weights("bidirectional", -torch.cat(reverse, -1), advice=advice)
    assert inverse.per_datum is not None
    upper = Evidence(-inverse.value, inverse.standard_error, "estimate", -inverse.per_datum)
    reason = "; ".join(
        f"{end} end: {found.reason}" for end, found in (("lower", lower), ("upper", inverse)) if found.reason
    )
    size = min(lower.effective_size, inverse.effective_size)
    return lower._replace(upper=upper, effective_size=size, reliable=not reason, reason=reason)


def _quadrature(request: _Request) -> EvidenceEstimate:
    entry = request.entry
    if isinstance(entry, HasOracle | HasEnumeratedEvidence):
        # Asked for by name, quadrature is not to be answered by the oracle that it may be there to check.
        entry = Program(entry, entry.columns)
    found = log_evidence(entry, request.x)
    assert found is not None and found.kind == "quadrature"
    allowed = COARSE * request.entry.count(request.x)
    reason = ""
    if found.standard_error > allowed:
        reason = f"its error is {found.standard_error:.3g} nats, expected at most {allowed:.3g}: kinks or narrow peaks"
    return EvidenceEstimate(*found, "quadrature", 0.0, math.nan, not reason, reason)


def _exact(name: str, per_datum: Tensor) -> EvidenceEstimate:
    rows = per_datum if len(per_datum) > 1 else None
    return EvidenceEstimate(float(per_datum.sum()), 0.0, "exact", rows, name, 0.0, math.inf, True, "")


def _of_weights(name: str, log_weights: Tensor, *, advice: str) -> EvidenceEstimate:
    """Estimate from log weights (S, N), nats, whose exponentials have p(x_n) as their mean; N = 1 for all data."""
    draws, rows = log_weights.shape
    per_datum = log_weights.logsumexp(0) - math.log(draws)
    lost = (~per_datum.isfinite()).nonzero().flatten().tolist()
    if lost:
        where = f"row {lost[0] + 1}" if rows > 1 else "the data"
        raise NumericalFailure(
            f"estimator {name!r}: the weights of all {draws} draws of {where} are zero or not finite, so that nothing "
            f"can be said; {advice}"
        )
    variance = (log_weights - per_datum).exp().var(0) / draws
    sizes = _effective_sizes(log_weights)
    reason = _distrust(sizes, draws, advice)
    return EvidenceEstimate(
        value=float(per_datum.sum()),
        standard_error=float(variance.sum().sqrt()),
        kind="estimate",
        per_datum=per_datum if rows > 1 else None,
        estimator=name,
        shortfall=0.5 * float(variance.sum()),
        effective_size=float(sizes.min()),
        reliable=not reason,
        reason=reason,
    )


def _effective_sizes(log_weights: Tensor) -> Tensor:
    """Effective number of draws of each datum, (N,), from log weights (S, N)."""
    return 1 / log_weights.softmax(0).square().sum(0)


def _distrust(sizes: Tensor, draws: int, advice: str) -> str:
    """Say which data have too few effective draws; empty where none has."""
    few = int((sizes < ENOUGH).sum())
    if not few:
        return ""
    worst = int(sizes.argmin())
    where = f"row {worst + 1} has" if len(sizes) > 1 else "the data have"
    others = f", as {few} of {len(sizes)} rows" if few > 1 else ""
    return (
        f"{where} {float(sizes[worst]):.1f} effective draws of {draws}, below {ENOUGH:g}{others}: the error is itself "
        f"unknown and the value a lower bound at best; {advice}"
    )


def _guide_log_weights(request: _Request, draws: int | None = None) -> Tensor:
    """Log weights (S, N), nats, of draws from q, finite latents summed out; S = 1 where nothing was drawn."""
    assert request.guide is not None
    draws = draws or request.draws(DRAWS)
    return importance_weights(request.entry, request.guide, request.batch, draws, request.seed).marginal()


def _prior_log_weights(request: _Request, draws: int) -> Tensor:
    """Log p(x given z), (S, N) or (S, 1) where the latent is global, nats, at draws from the prior."""
    if all(site.is_local for site in request.sites):
        parts = _parts(request, draws)
        return torch.cat([_drawn(request.entry, part, draws) for part in parts], -1)
    # Finite latents of rows are summed out: their number grows with the data, so that draws would say nothing.
    finite = [site.name for site in request.sites if site.is_local and site.is_enumerable]
    program = collapsed(request.entry, finite)
    at_once = max(1, CHUNK_ELEMENTS // (len(request.x) * request.entry.elements(request.x)))
    counts = [min(at_once, draws - done) for done in range(0, draws, at_once)]
    return torch.cat([_drawn(program, request.batch, count).sum(-1, keepdim=True) for count in counts])


def _drawn(program: Callable[[Batch], Any], batch: Batch, draws: int) -> Tensor:
    """Log likelihood of each row, (S, B), at draws of all latents from the prior."""
    with pyro.validation_enabled(False), pyro.plate("particles", draws, dim=PARTICLE_DIM):
        trace = poutine.trace(program).get_trace(batch)
    trace.compute_log_prob()
    total = batch.x.new_zeros(draws, len(batch.x))
    for node in trace.nodes.values():
        if "unscaled_log_prob" in node and node["is_observed"]:
            # An observation for the whole data set counts once: in the first row.
            share = 1.0 if is_local_node(node) else (torch.arange(len(batch.x)) == 0).to(total)
            total = total + share * log_density(node)
    return total


def _parts(request: _Request, draws: int) -> list[Batch]:
    """Cut the data into batches of rows that bound the memory."""
    size = draws * max(request.entry.elements(request.x), sum(site.dim for site in request.sites))
    rows = max(1, CHUNK_ELEMENTS // size)
    return [request.batch.rows(start, start + rows) for start in range(0, len(request.x), rows)]


def _forward(request: _Request, part: Batch, chains: int) -> Tensor:
    program = RowProgram(request.entry, request.sites, part)
    return forward_log_weights(program, pilot_path(program, request.options.temperatures), chains)


def _latents_by_site(request: _Request) -> dict[str, Tensor]:
    known = request.latents
    if known is None:
        raise InvalidInput(
            "estimator 'bidirectional': found rows without their latents, expected latents=z of rows that were "
            "simulated; x, z = fit.entry.simulate(50, seed=1) gives both"
        )
    by_site = {request.sites[0].name: known} if isinstance(known, Tensor) else dict(known)
    for site in request.sites:
        expected = (len(request.x), *site.event_shape)
        found = tuple(by_site[site.name].shape) if site.name in by_site else None
        if found != expected:
            raise InvalidInput(
                f"estimator 'bidirectional': found latents of shape {found} for {site.name!r}, expected {expected}; "
                "pass z as simulate() returned it"
            )
    return {site.name: by_site[site.name].to(request.x.dtype) for site in request.sites}


def _no_refusal(entry: Entry, sites: list[LatentSite], x: Tensor | None, guide: Guide | None) -> str | None:
    return None


def _refusal_without_q(entry: Entry, sites: list[LatentSite], x: Tensor | None, guide: Guide | None) -> str | None:
    if guide is None:
        return "it draws from q, and there is no guide"
    return None if guide.is_bound else f"guide {guide.name!r} has no density to weigh its draws with"


def _refusal_of_gradients(entry: Entry, sites: list[LatentSite], x: Tensor | None, guide: Guide | None) -> str | None:
    if not sites:
        return "it has no latent, and its likelihood is exact"
    for site in sites:
        if site.support.is_discrete:
            return f"the latent {site.name!r} is discrete, and its chains follow gradients"
    if len({site.is_local for site in sites}) > 1:
        return "it has latents for each row beside latents for all data"
    if not sites[0].is_local and x is not None and UnconstrainedProgram.of(entry, x) is None:
        return "its program cannot be run at many values of its latents at once"
    return None


def _refusal_of_return(entry: Entry, sites: list[LatentSite], x: Tensor | None, guide: Guide | None) -> str | None:
    if not all(site.is_local for site in sites):
        return "its latent is one for the whole data set, and only latents of rows have chains back from them"
    return _refusal_of_gradients(entry, sites, x, guide)


def _refusal_of_integral(entry: Entry, sites: list[LatentSite], x: Tensor | None, guide: Guide | None) -> str | None:
    if supports_quadrature(sites) or supports_cubature(entry, x):
        return None
    return "its latents have more real dimensions than an integral can be taken over: two for each row, three for all"


ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        Estimator("prior", "mean likelihood at draws from the prior", ("draws",), _no_refusal, _prior),
        Estimator("importance", "mean weight of draws from q", ("draws",), _refusal_without_q, _importance),
        Estimator(
            "iwae", "importance-weighted bound by K draws from q", ("draws", "particles"), _refusal_without_q, _iwae
        ),
        Estimator(
            "annealed",
            "mean weight of chains annealed from the prior to the posterior",
            ("draws", "temperatures"),
            _refusal_of_gradients,
            _annealed,
        ),
        Estimator(
            "bidirectional",
            "chains from the prior for a lower end and back from a known z for an upper end",
            ("draws", "temperatures"),
            _refusal_of_return,
            _bidirectional,
        ),
        Estimator("quadrature", "integral over the latent space", (), _refusal_of_integral, _quadrature),
    )
}
