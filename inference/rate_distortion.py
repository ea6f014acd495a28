"""The rate-distortion curve of a model: one fit for each β, and what each pays for its code.

A fit at β minimises distortion + β rate, D + β R, so that with enough freedom for model and q it ends where the curve
of attainable (R, D) has the slope -β (Alemi et al. 2018, "Fixing a broken ELBO"; reference under
:mod:`elbozoo.inference.anatomy`). On the curve R falls as β grows. Every q and every model obey

    R + D = -ELBO >= -log p(x)

with p the model at its own θ: lines of constant ELBO have the slope -1, and nothing lies below the one at
the best log p(x) that any of the models has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor

from elbozoo.inference.comparison import seed_list
from elbozoo.inference.fit import Fit
from elbozoo.inference.ledger import check_bound
from elbozoo.inference.method import SPECIAL, Plan, plan, warn_of_unread
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import plain
from elbozoo.models.contract.sequences import StackedEntry

WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)
SMOOTHED_STEPS = 100
RESERVED = ("objective", "kl_weight")
AVERAGED = ("objective", "elbo", "log_evidence", "rate", "distortion", "mutual_information", "active_units")


@dataclass(frozen=True)
class RateDistortion:
    """Fits of one model by one guide at several β, from several seeds each, on the same rows.

    Attributes
    ----------
    model : str
        Name of the entry.
    method : str
        Name of the guide, as it was asked for.
    data : dict
        ``name``, ``rows`` and ``columns`` of the data.
    fits : list of Fit
        One for each β and seed, in the order of :attr:`table`.
    table : DataFrame
        A row for each fit; nats, totals over the rows, but for ``mutual_information``, which is that of one datum's
        index and its code. ``weight`` is β; ``objective`` what was maximised, -distortion - β rate (less what free
        bits leave untaxed), its last value smoothed over the last hundred steps; ``elbo`` is that at β = 1,
        -distortion - rate. ``log_evidence`` is NaN where only an estimate by draws from q could be had.
    options : dict
        Options that were given, by name.
    """

    model: str
    method: str
    data: dict[str, Any]
    fits: list[Fit]
    table: pd.DataFrame
    options: dict[str, Any]

    @property
    def summary(self) -> pd.DataFrame:
        """Mean and standard deviation over the seeds for each β, the least first: units as in :attr:`table`."""
        return self.table.groupby("weight")[list(AVERAGED)].agg(["mean", "std"])

    @property
    def best_log_evidence(self) -> float:
        """Largest log p(x) that any of the models has, total nats; NaN where none is known."""
        return float(self.table["log_evidence"].max())


def run_rate_distortion(
    model: Any,
    x: Tensor,
    method: str,
    weights: float | Iterable[float],
    seeds: int | Iterable[int],
    options: Mapping[str, Any],
    *,
    name: str = "data",
    names: Sequence[str] | None = None,
    progress: bool = True,
    on_fit: Callable[[Fit], None] = lambda fit: None,
) -> RateDistortion:
    """Fit ``model`` by the objective ``beta`` at each of ``weights`` from every seed, and take each ELBO apart.

    Parameters
    ----------
    model : str, type or callable
        See :func:`~elbozoo.inference.method.plan`; its latents belong to the rows.
    x : Tensor (N, D)
        Data, float64.
    method : str
        A guide whose q has a density.
    weights : float or iterable of float
        Values of β, above 0.
    seeds : int or iterable of int
        Number of seeds, counted from 0, or the seeds themselves.
    options : mapping
        Options by name, without ``objective`` and ``kl_weight``.
    name : str
        Name of the data in the results.
    names : sequence of str, optional
        Names of the columns.
    on_fit : callable
        Called with each fit as it ends.

    Raises
    ------
    InvalidInput
        Before anything runs, for anything that does not fit.
    NumericalFailure
        If a fit breaks down, or an ELBO exceeds the evidence.
    """
    for option in RESERVED:
        if option in options:
            raise InvalidInput(
                f"option {option}: found {options[option]!r} with a rate-distortion curve, expected it to be left out: "
                "every fit is by objective=beta, at the weights; set weights=[...]"
            )
    chosen, betas = seed_list(seeds), _weights(weights)
    plans = [plan(model, x, method, {**options, "objective": "beta", "kl_weight": beta}, names) for beta in betas]
    if reason := _refusal(plans[0]):
        raise InvalidInput(f"no rate-distortion curve of {plans[0].entry.name()} by {method!r}: {reason}")
    warn_of_unread(plans)
    fits, rows = [], []
    for beta, each in zip(betas, plans, strict=True):
        for seed in chosen:
            fit = each.run(seed, progress=progress)
            on_fit(fit)
            fits.append(fit)
            rows.append(_row(beta, fit))
            if fit.interrupted:  # the user wants what there is, not the next fit
                break
        if fits[-1].interrupted:
            break
    data = {"name": name, "rows": x.shape[0], "columns": x.shape[1]}
    return RateDistortion(fits[0].model, method, data, fits, pd.DataFrame(rows), plain(options))


def _weights(weights: float | Iterable[float]) -> list[float]:
    given = list(weights) if isinstance(weights, Iterable) else [weights]
    try:
        betas = sorted({float(weight) for weight in given})
    except (TypeError, ValueError):
        raise InvalidInput(f"option weights: found {given!r}, expected numbers above 0, values of β") from None
    if not betas:
        raise InvalidInput("option weights: found none, expected at least one, such as weights=[0.1, 1, 10]")
    wrong = [beta for beta in betas if not 0 < beta < math.inf]
    if wrong:
        raise InvalidInput(
            f"option weights: found {wrong[0]:g}, expected finite numbers above 0: a rate without a price has no limit"
        )
    return betas


def _refusal(ready: Plan) -> str | None:
    """Say why a fit has no rate and distortion for each datum, or return None."""
    sites = ready.entry.latent_sites(ready.x)
    if ready.method in SPECIAL:
        return "it has no β; name a guide, such as amortized"
    if ready.method.endswith("delta"):
        return (
            "a point mass has no density, and its rate is infinite; name a guide with one, such as "
            "amortized-diagonal-normal, for a model whose code has a proper prior"
        )
    if isinstance(ready.entry, StackedEntry) or not all(site.is_local for site in sites):
        return "it needs latents that belong to one row each; use fit() with objective=beta"
    return None


def _row(beta: float, fit: Fit) -> dict[str, Any]:
    parts, evidence = fit.anatomy(), fit.known_evidence()
    if evidence is not None:
        check_bound(parts.elbo, parts.elbo_se, evidence)
    return {
        "weight": beta,
        "seed": fit.seed,
        "objective": float(fit.trajectory["objective"].tail(SMOOTHED_STEPS).mean()),
        "elbo": parts.elbo,
        "elbo_se": parts.elbo_se,
        "log_evidence": math.nan if evidence is None else evidence.value,
        "log_evidence_se": math.nan if evidence is None else evidence.standard_error,
        "log_evidence_kind": None if evidence is None else evidence.kind,
        "rate": parts.rate.total,
        "rate_se": parts.rate.standard_error,
        "distortion": parts.distortion.total,
        "distortion_se": parts.distortion.standard_error,
        "mutual_information": parts.mutual_information,
        "active_units": parts.active_units,
        "units": len(parts.unit_variances),
        "seconds": fit.seconds,
        "converged": fit.converged,
    }
