"""The ledger of a fit: how far its bound is from the truth, and why.

best log p(x) = ELBO + amortization gap + approximation gap + learning gap
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.local import LocalGuide
from elbozoo.guides.sequences import SequenceGuide
from elbozoo.guides.whole import WholeGuide
from elbozoo.inference.best_flow import best_flow
from elbozoo.inference.best_group import best_group_member
from elbozoo.inference.best_member import BestMember, best_member
from elbozoo.inference.best_path import best_path_member
from elbozoo.inference.corruption import denoising_elbo
from elbozoo.inference.diagnostics import k_hat
from elbozoo.inference.divergence import kl_to_posterior
from elbozoo.inference.evidence import PARTICLES, Evidence, estimate_evidence, log_evidence
from elbozoo.inference.losses import expected_elbo
from elbozoo.inference.weights import Weights, importance_weights
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasExpectedLogJoint
from elbozoo.models.contract.errors import NumericalFailure
from elbozoo.models.contract.groups import GroupEntry
from elbozoo.models.contract.isolation import isolated

KINDS = ("exact", "quadrature", "estimate", None)  # of the evidence, from the best to none at all
BOUND_Z = 6.0
ROUNDING = 1e-9
KHAT_DRAWS = 100  # below which the tail that k-hat is fitted to would have too few of them


@dataclass(frozen=True)
class Ledger:
    """Totals over the rows of a data set, in nats; NaN where a figure does not apply.

    Attributes
    ----------
    elbo, elbo_se : float
        E_q[log p(x, z) - log q(z)] and its Monte Carlo standard error; NaN for a q without a density.
    log_evidence, log_evidence_se, log_evidence_kind : float, float, str
        See :class:`~elbozoo.inference.evidence.Evidence`.
    gap : float
        ``log_evidence - elbo``.
    approximation_gap : float
        From the evidence to the best member of the guide's family.
    amortization_gap : float
        From that member to this q: what encoder, sharing or unfinished optimisation cost.
    learning_gap : float
        From the best evidence known on these data to this θ's; NaN where nothing better is known.
    kl, kl_se : float
        KL(q ‖ posterior), computed without the evidence; NaN where the posterior is not known.
    khat_max, khat_share : float
        Largest Pareto k-hat of a datum, share of data above 0.7.
    best_member_converged : bool
        Whether the search for the best member ended at a maximum; True where it was not needed.
    rows : int
        Number of rows that the totals are over.
    is_bound : bool
        Whether q has a density, so that there is an ELBO, which bounds the evidence.
    denoising_elbo, denoising_elbo_se : float
        ELBO of the denoising criterion and its standard error, where q is trained on corrupted rows; NaN elsewhere.
        See :func:`~elbozoo.inference.corruption.denoising_elbo`.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    log_evidence_kind: str | None
    gap: float
    approximation_gap: float
    amortization_gap: float
    learning_gap: float
    kl: float
    kl_se: float
    khat_max: float
    khat_share: float
    best_member_converged: bool
    rows: int
    is_bound: bool
    denoising_elbo: float
    denoising_elbo_se: float

    def merge(self, other: Ledger) -> Ledger:
        """Return the ledger of the rows of both, of other draws each."""
        sums = ("elbo", "log_evidence", "gap", "approximation_gap", "amortization_gap", "learning_gap", "kl")
        errors = ("elbo_se", "kl_se", "denoising_elbo_se")
        kind = max(self.log_evidence_kind, other.log_evidence_kind, key=KINDS.index)
        together = self.rows + other.rows
        figures: dict[str, Any] = {
            **{name: getattr(self, name) + getattr(other, name) for name in (*sums, "denoising_elbo")},
            **{name: math.hypot(getattr(self, name), getattr(other, name)) for name in errors},
        }
        return replace(
            self,
            **figures,
            log_evidence_se=joined_error(kind, self.log_evidence_se, other.log_evidence_se),
            log_evidence_kind=kind,
            khat_max=max(self.khat_max, other.khat_max),
            khat_share=(self.khat_share * self.rows + other.khat_share * other.rows) / together,
            best_member_converged=self.best_member_converged and other.best_member_converged,
            rows=together,
        )

    def as_dict(self) -> dict[str, float | str | bool | None]:
        """Return the figures by name."""
        return asdict(self)


def joined_error(kind: str | None, one: float, other: float) -> float:
    """Return the error of a sum of evidences: of quadrature, whose errors are upper estimates, they add up."""
    return one + other if kind == "quadrature" else math.hypot(one, other)


def compute_ledger(
    entry: Entry,
    guide: Guide,
    x: Tensor,
    options: GuideOptions,
    *,
    seed: int,
    best_known: float = math.nan,
    evidence: Evidence | None = None,
    particles: int = PARTICLES,
    search: bool = True,
    check: bool = True,
) -> Ledger:
    """Compute the ledger of ``guide`` at the θ of ``entry`` on the rows ``x`` (N, D), float64.

    Parameters
    ----------
    best_known : float
        Largest log p(x) known on these rows, total nats.
    evidence : Evidence, optional
        log p(x) at this θ where it has been computed before.
    particles : int
        Draws of q of each datum; k-hat is told from 100 of them upwards.
    search : bool
        Whether to search for the best member of the guide's family where it has to be searched for, which takes by far
        the most time; the gap is not divided otherwise.
    check : bool
        Whether to hold the bound against the evidence.

    Raises
    ------
    NumericalFailure
        If the ELBO exceeds the evidence beyond the errors of both.
    """
    evidence = evidence or log_evidence(entry, x)
    if not guide.is_bound:
        return without_bound(evidence, best_known, entry.count(x))
    weights = importance_weights(entry, guide, Batch.full(x), particles, seed)
    elbo, elbo_se = elbo_of(entry, guide, x, weights)
    evidence = evidence or estimate_evidence(weights)
    if check:
        check_bound(elbo, elbo_se, evidence)
    denoising, denoising_se = denoising_elbo(entry, guide, x, seed)
    if check and not math.isnan(denoising):
        check_bound(denoising, denoising_se, evidence)
    best = _best_elbo(entry, guide, x, options, seed, elbo, search)
    if evidence.kind == "estimate" and best.weights is not None:
        # Both are lower bounds, and a better q draws the better one.
        evidence = max(evidence, estimate_evidence(best.weights), key=lambda estimate: estimate.value)
    gap = evidence.value - elbo
    approximation = 0.0 if best.is_posterior else evidence.value - best.elbo
    kl = kl_to_posterior(entry, guide, x, seed + 1)
    khat = k_hat(weights) if particles >= KHAT_DRAWS else None
    return Ledger(
        elbo=elbo,
        elbo_se=elbo_se,
        log_evidence=evidence.value,
        log_evidence_se=evidence.standard_error,
        log_evidence_kind=evidence.kind,
        gap=gap,
        approximation_gap=approximation,
        amortization_gap=gap - approximation,
        learning_gap=best_known - evidence.value,
        kl=kl.value if kl else math.nan,
        kl_se=kl.standard_error if kl else math.nan,
        khat_max=khat.maximum if khat else math.nan,
        khat_share=khat.share_above if khat else math.nan,
        best_member_converged=best.converged,
        rows=entry.count(x),
        is_bound=True,
        denoising_elbo=denoising,
        denoising_elbo_se=denoising_se,
    )


def elbo_of(entry: Entry, guide: Guide, x: Tensor, weights: Weights) -> tuple[float, float]:
    """Total ELBO and its standard error, nats: in closed form for a factorised q over paths, else by draws."""
    if isinstance(guide, SequenceGuide) and isinstance(entry, HasExpectedLogJoint):
        with torch.no_grad():
            return float(expected_elbo(entry, guide, Batch.full(x)).sum()), 0.0
    return elbo_estimate(weights)


def elbo_estimate(weights: Weights) -> tuple[float, float]:
    """Total ELBO and its Monte Carlo standard error, nats; the error is zero where nothing was drawn."""
    draws = weights.elbo()
    if len(draws) == 1:
        return float(draws.sum()), 0.0
    return float(draws.mean(0).sum()), float((draws.var(0) / len(draws)).sum().sqrt())


def check_bound(elbo: float, elbo_se: float, evidence: Evidence) -> None:
    """Refuse a bound above the truth by more than six standard errors (false alarms below 1e-9) and rounding.

    An ``estimate`` is itself a lower bound, so nothing can be said against an ELBO above it. But one whose
    own error is not finite is that of a q that ran away, whatever the evidence.
    """
    if elbo > evidence.value and not math.isfinite(elbo_se):
        raise NumericalFailure(
            f"the ELBO {elbo:.6g} has a standard error of {elbo_se}: q has left the data; lower learning_rate, or "
            "start from another seed"
        )
    allowed = BOUND_Z * math.hypot(elbo_se, evidence.standard_error) + ROUNDING * max(1.0, abs(evidence.value))
    if evidence.kind != "estimate" and elbo > evidence.value + allowed:
        raise NumericalFailure(
            f"the ELBO {elbo:.6f} exceeds log p(x) = {evidence.value:.6f} by more than its error {allowed:.2g}: "
            "the guide, the model's log density or the oracle is wrong"
        )


class _BestELBO(NamedTuple):
    """What the best member of the guide's family reaches.

    Attributes
    ----------
    elbo : float
        Its ELBO, total nats; NaN where the best member is not known.
    is_posterior : bool
        Whether it is the posterior itself, so that there is nothing to measure.
    converged : bool
        Whether the search for it ended at a maximum.
    weights : Weights or None
        Importance weights of its draws, where it was searched for.
    """

    elbo: float = math.nan
    is_posterior: bool = False
    converged: bool = True
    weights: Weights | None = None


def _best_elbo(
    entry: Entry, guide: Guide, x: Tensor, options: GuideOptions, seed: int, elbo: float, search: bool
) -> _BestELBO:
    if holds_posterior(guide, entry, x):
        return _BestELBO(is_posterior=True)
    if not guide.is_local:
        # One q for the whole data set leaves nothing to amortize: the gap is the family's and the optimiser's.
        return _BestELBO(elbo)
    best = _best(entry, guide, x, options) if search else None
    if best is None:
        return _BestELBO()
    # The same seed gives both the same draws, so that their difference has little noise.
    weights = importance_weights(entry, best.guide, Batch.full(x), PARTICLES, seed)
    return _BestELBO(elbo_of(entry, best.guide, x, weights)[0], converged=best.converged, weights=weights)


def holds_posterior(guide: Guide, entry: Entry, x: Tensor) -> bool:
    """Whether the posterior is a member of the guide's family: its best one, which nobody has to search for."""
    # The categorical family over one finite latent contains every posterior.
    is_any = guide.is_discrete and len(entry.latent_sites(x)) == 1 and guide.is_local
    return guide.family == "posterior" or is_any


def _best(entry: Entry, guide: Guide, x: Tensor, options: GuideOptions) -> BestMember | None:
    if isinstance(guide, SequenceGuide):
        return best_path_member(entry, guide, x, options)
    if isinstance(entry, GroupEntry):
        return best_group_member(entry, guide, x, options)
    if guide.family == "flow" and isinstance(guide, LocalGuide):
        return best_flow(entry, guide, x, options)
    if isinstance(guide, WholeGuide):
        return None  # its sites depend on one another, so no q of each datum alone is its best member
    with isolated(0), torch.no_grad():
        members = guide.distributions(Batch.full(x))
    return best_member(entry, guide.family, x, options, start=members)


def without_bound(evidence: Evidence | None, best_known: float, rows: int) -> Ledger:
    """Return the ledger of a q without a density: what there is to say about the evidence of so many ``rows``."""
    nan = math.nan
    value = evidence.value if evidence else nan
    return Ledger(
        elbo=nan,
        elbo_se=nan,
        log_evidence=value,
        log_evidence_se=evidence.standard_error if evidence else nan,
        log_evidence_kind=evidence.kind if evidence else None,
        gap=nan,
        approximation_gap=nan,
        amortization_gap=nan,
        learning_gap=best_known - value,
        kl=nan,
        kl_se=nan,
        khat_max=nan,
        khat_share=nan,
        best_member_converged=True,
        rows=rows,
        is_bound=False,
        denoising_elbo=nan,
        denoising_elbo_se=nan,
    )
