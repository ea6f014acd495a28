"""Figures of fits to rows that are not in memory: each part is looked at where it stands, and the results are added.

Draws are fewer where rows are many: the Monte Carlo error of a total grows with the root of the number of rows, so that
a few draws of each of many rows leave less error per datum than a thousand draws of few rows. The best member of the
guide's family is not searched for, since that takes milliseconds a row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.inference.evidence import PARTICLES, Evidence, estimate_evidence, evidence_or_estimate
from elbozoo.inference.ledger import KINDS, Ledger, check_bound, compute_ledger, joined_error, without_bound
from elbozoo.inference.rows import Part, Rows
from elbozoo.inference.weights import Weights, importance_weights
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import SEEDS

DRAWS_OF_ALL = 2**26  # of all rows together
FEWEST_DRAWS = 16
WEIGHTS_AT_ONCE = 2**20
MOST_ROWS = 2**14  # in a part, each of which may meet every value of a finite latent at once


def draws_of_each(rows: int) -> int:
    """Return how many draws of q each of so many rows gets."""
    return max(FEWEST_DRAWS, min(PARTICLES, DRAWS_OF_ALL // max(1, rows)))


def streamed_ledger(
    entry: Entry, guide: Guide, rows: Rows, options: GuideOptions, *, seed: int, best_known: float = math.nan
) -> Ledger:
    """Return the ledger of ``guide`` at the θ of ``entry``, part by part; see :func:`~.ledger.compute_ledger`.

    How the gap is divided is known where q is the posterior or one for the whole data set, and NaN elsewhere; so is
    k-hat where there are fewer than 100 draws of each row.

    Raises
    ------
    NumericalFailure
        If the ELBO exceeds the evidence beyond the errors of both.
    """
    if guide.is_local:
        draws = draws_of_each(len(rows))
        of_part = partial(_ledger_of_part, entry, guide, options, draws, seed)
        ledger = rows.total(of_part, Ledger.merge, _chunk(draws))
        _check_total(ledger)
    elif guide.is_bound:
        ledger = _ledger_of_one_q(entry, guide, rows, seed)
    else:  # parts share a latent, so that their evidence does not add up
        ledger = without_bound(None, best_known, len(rows))
    return replace(ledger, learning_gap=best_known - ledger.log_evidence)


def streamed_evidence(entry: Entry, guide: Guide, rows: Rows, seed: int) -> Evidence | None:
    """Return log p(x) part by part, of the least certain kind among them; None where there is none."""
    if not guide.is_local:
        return _weights_of_one_q(entry, guide, rows, seed).evidence() if guide.is_bound else None
    draws = draws_of_each(len(rows))
    return rows.total(partial(_evidence_of_part, entry, guide, draws, seed), _both, _chunk(draws))


def _ledger_of_part(entry: Entry, guide: Guide, options: GuideOptions, draws: int, seed: int, part: Part) -> Ledger:
    # Each part has draws of its own; with the same ones, the errors of parts would not average out.
    return compute_ledger(
        entry, guide, part.x, options, seed=_stream_of(seed, part), particles=draws, search=False, check=False
    )


def _check_total(ledger: Ledger) -> None:
    """Hold the bound of all rows against their evidence; that of a part, of few draws, has too long a tail for it."""
    kind = ledger.log_evidence_kind
    if ledger.is_bound and kind is not None:
        evidence = Evidence(ledger.log_evidence, ledger.log_evidence_se, kind, None)  # type: ignore[arg-type]
        check_bound(ledger.elbo, ledger.elbo_se, evidence)
        if not math.isnan(ledger.denoising_elbo):
            check_bound(ledger.denoising_elbo, ledger.denoising_elbo_se, evidence)


def _chunk(draws: int) -> int:
    return max(1, min(MOST_ROWS, WEIGHTS_AT_ONCE // draws))


def _stream_of(seed: int, part: Part) -> int:
    return (seed + part.start) % SEEDS


def _evidence_of_part(entry: Entry, guide: Guide, draws: int, seed: int, part: Part) -> Evidence | None:
    found = evidence_or_estimate(entry, guide, part.x, _stream_of(seed, part), draws)
    return found and found._replace(per_datum=None)


def _both(left: Evidence | None, right: Evidence | None) -> Evidence | None:
    if left is None or right is None:
        return None
    kind = max(left.kind, right.kind, key=KINDS.index)
    return Evidence(left.value + right.value, joined_error(kind, left.standard_error, right.standard_error), kind, None)


class _Draws(NamedTuple):
    """What S draws of latents of the whole data set weigh.

    Attributes
    ----------
    common : Tensor (S,)
        Log weights of those latents themselves, nats.
    elbo, marginal : Tensor (S,)
        Sums over rows of the expectation under q, and of the log of the sum, over finite latents of each row.
    """

    common: Tensor
    elbo: Tensor
    marginal: Tensor

    def merge(self, other: _Draws) -> _Draws:
        """Return what the same draws weigh on the rows of both."""
        return _Draws(self.common, self.elbo + other.elbo, self.marginal + other.marginal)

    def evidence(self) -> Evidence:
        """Return the estimate of log p(x) from the draws."""
        log_weight = (self.common + self.marginal)[None, :, None]
        return estimate_evidence(Weights(log_weight, torch.zeros_like(log_weight)))


def _weights_of_one_q(entry: Entry, guide: Guide, rows: Rows, seed: int) -> _Draws:
    return rows.total(partial(_draws_of_part, entry, guide, seed), _Draws.merge, _chunk(PARTICLES))


def _draws_of_part(entry: Entry, guide: Guide, seed: int, part: Part) -> _Draws:
    # The same seed gives the same latents of the whole data set for every part.
    weights = importance_weights(entry, guide, Batch.full(part.x), PARTICLES, seed)
    assert weights.common is not None
    of_rows = weights._replace(common=None)
    return _Draws(weights.common, of_rows.elbo().sum(-1), of_rows.marginal().sum(-1))


def _ledger_of_one_q(entry: Entry, guide: Guide, rows: Rows, seed: int) -> Ledger:
    """Return the ledger of one q for the whole data set: the gap is that of its family and of the optimiser."""
    draws = _weights_of_one_q(entry, guide, rows, seed)
    evidence, each = draws.evidence(), draws.common + draws.elbo
    elbo, elbo_se = float(each.mean()), float(each.std() / math.sqrt(len(each)))
    check_bound(elbo, elbo_se, evidence)
    gap = evidence.value - elbo
    figures = without_bound(evidence, math.nan, len(rows))
    return replace(
        figures, elbo=elbo, elbo_se=elbo_se, gap=gap, approximation_gap=gap, amortization_gap=0.0, is_bound=True
    )
