"""q against the exact posterior, at the θ of each fit: of rows by their moments, of global latents by intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.inference.comparison import Comparison
from elbozoo.inference.fit import Fit
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import HasPosterior
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.joint import Joint
from elbozoo.models.contract.sequences import StackedEntry, steps_mask
from elbozoo.report.charts import NEUTRAL, Figure, Look, looks, numbers, plain_layout, room_for_names, room_for_numbers
from elbozoo.series import Floats, first_fits

DRAWS = 4000
SEED = 0
MOST_POINTS = 600  # of each method in each panel
MOST_COORDINATES = 40  # of one global latent
TAILS = (5.0, 95.0)  # percent
EXACT = "exact posterior"


class Agreement(NamedTuple):
    """One figure of the posterior of each row, exact and of q; arrays of the same length."""

    what: str
    exact: Floats
    q: Floats


class Interval(NamedTuple):
    """Mean and central 90 % of one number of a global latent."""

    mean: float
    low: float
    high: float


def posterior_figures(comparison: Comparison) -> list[Figure]:
    """Return the panels of q against the exact posterior, of the first seed of each method; none where none is known.

    For global latents there is a panel for each site, with or without an exact posterior.
    """
    fits = [fit for fit in first_fits(comparison) if fit.x is not None and fit.entry.latent_sites(fit.x)]
    look = looks(fit.method for fit in comparison.fits)
    if all(fit.guide.is_local for fit in fits):
        return _agreement_figures({fit.method: list(agreements(fit)) for fit in fits}, look)
    return _interval_figures({fit.method: intervals(fit) for fit in fits}, _exact_intervals(fits[0]), look)


# ---- one latent for each row -----------------------------------------------------------------------------------------


def agreements(fit: Fit) -> Iterator[Agreement]:
    """Yield what of q is held against the exact posterior: probabilities, or means and standard deviations."""
    if not isinstance(fit.entry, HasPosterior) or fit.x is None:
        return
    sites = fit.entry.latent_sites(fit.x)
    if len(sites) != 1:
        return
    with isolated(SEED), torch.no_grad():
        exact = fit.entry.posterior(fit.x)
        if not isinstance(exact, Distribution):
            return
        if sites[0].is_discrete:
            yield Agreement("probability", _flat(fit, exact.probs), _of_rows(fit))  # type: ignore[attr-defined]
            return
        yield Agreement("mean", _flat(fit, exact.mean), _of_rows(fit))
        (q,) = fit.guide.distributions(Batch.full(fit.x)).values()
        deviation = _deviation(q)
        if deviation.shape == exact.mean.shape:
            yield Agreement("standard deviation", _flat(fit, _deviation(exact)), _flat(fit, deviation))


def is_thinned(comparison: Comparison) -> bool:
    """Whether some points of :func:`posterior_figures` are left out."""
    return any(len(each.exact) > MOST_POINTS for fit in first_fits(comparison) for each in agreements(fit))


def _of_rows(fit: Fit) -> Floats:
    """Means or probabilities of q, in the order of the table."""
    return fit.transform().double().reshape(-1).cpu().numpy()


def _flat(fit: Fit, values: Any) -> Floats:
    """Return values of each row, or of each step in the order of the table, as one array."""
    assert fit.x is not None
    if isinstance(fit.entry, StackedEntry):
        mask = steps_mask(fit.x)
        values = values[mask][fit.x[..., 0][mask].argsort()]
    result: Floats = values.double().reshape(-1).cpu().numpy()
    return result


def _deviation(q: Distribution) -> Tensor:
    """Standard deviations of q; of draws where there is no formula."""
    deviation: Tensor
    try:
        deviation = q.variance.sqrt()
    except NotImplementedError:
        deviation = q.sample((DRAWS,)).std(0)
    return deviation


def _agreement_figures(found: Mapping[str, list[Agreement]], look: Mapping[str, Look]) -> list[Figure]:
    kinds = dict.fromkeys(each.what for several in found.values() for each in several)
    return [
        _agreement_figure(
            what, {method: each for method, several in found.items() for each in several if each.what == what}, look
        )
        for what in kinds
    ]


def _agreement_figure(what: str, found: Mapping[str, Agreement], look: Mapping[str, Look]) -> Figure:
    ends = np.concatenate([values for each in found.values() for values in (each.exact, each.q)])
    low, high = float(ends.min()), float(ends.max())
    layout = plain_layout(
        420,
        room_for_numbers(low, high),
        xaxis={"title": {"text": f"{what}, {EXACT}"}},
        yaxis={"title": {"text": f"{what}, q"}},
        shapes=[{"type": "line", "x0": low, "x1": high, "y0": low, "y1": high, "line": {"color": NEUTRAL, "width": 1}}],
        showlegend=True,
    )
    return {"data": [_agreement_trace(method, each, look[method]) for method, each in found.items()], "layout": layout}


def _agreement_trace(method: str, found: Agreement, look: Look) -> dict[str, Any]:
    shown = np.unique(np.linspace(0, len(found.exact) - 1, min(len(found.exact), MOST_POINTS)).astype(int))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(method),
        "x": numbers(found.exact[shown]),
        "y": numbers(found.q[shown]),
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 6, "opacity": 0.7},
        "meta": [escape(method)],
        "hovertemplate": f"<b>%{{meta[0]}}</b><br>{EXACT} %{{x:.4f}}<br>q %{{y:.4f}}<extra></extra>",
    }


# ---- global latents --------------------------------------------------------------------------------------------------


def intervals(fit: Fit) -> dict[str, list[Interval]]:
    """Return mean and central 90 % of every number of each global latent under q, from draws."""
    posterior = fit.to_inferencedata(draws=DRAWS)["posterior"]
    sites = [site.name for site in fit.entry.latent_sites(fit.x) if not site.is_local and not site.is_discrete]
    return {name: _intervals(posterior[name].values.reshape(-1, *posterior[name].shape[2:])) for name in sites}


def _exact_intervals(fit: Fit) -> dict[str, list[Interval]]:
    """The same of the exact posterior, from as many draws; empty where it is not known."""
    if not isinstance(fit.entry, HasPosterior) or fit.x is None:
        return {}
    names = [site.name for site in fit.entry.latent_sites(fit.x)]
    with isolated(SEED), torch.no_grad():
        exact = fit.entry.posterior(fit.x)
        joint = exact if isinstance(exact, Joint) else Joint({names[0]: exact})
        draws = joint.sample((DRAWS,))
    return {name: _intervals(values.double().cpu().numpy()) for name, values in draws.items()}


def _intervals(draws: Floats) -> list[Interval]:
    flat = draws.reshape(len(draws), -1)[:, :MOST_COORDINATES]
    low, high = np.percentile(flat, TAILS, axis=0)
    return [Interval(*map(float, each)) for each in zip(flat.mean(0), low, high, strict=True)]


def _interval_figures(
    found: Mapping[str, dict[str, list[Interval]]], exact: Mapping[str, list[Interval]], look: Mapping[str, Look]
) -> list[Figure]:
    sites = dict.fromkeys(name for each in found.values() for name in each)
    figures = []
    for site in sites:
        of_site = {method: each[site] for method, each in found.items() if site in each}
        if site in exact:
            of_site = {EXACT: exact[site], **of_site}
        figures.append(_interval_figure(site, of_site, look))
    return figures


def _interval_figure(site: str, found: Mapping[str, list[Interval]], look: Mapping[str, Look]) -> Figure:
    coordinates = len(next(iter(found.values())))
    names = [f"{escape(site)}[{i}]" if coordinates > 1 else escape(site) for i in range(coordinates)]
    offsets = np.linspace(-0.3, 0.3, len(found)) if len(found) > 1 else np.zeros(1)
    traces = [
        _interval_trace(name, several, names, float(offset), look.get(name, Look(NEUTRAL, "diamond")))
        for offset, (name, several) in zip(offsets, found.items(), strict=True)
    ]
    layout = plain_layout(
        140 + max(14 * len(found), 24) * coordinates,
        room_for_names(names),
        xaxis={"title": {"text": escape(site)}},
        yaxis={
            "tickvals": list(range(coordinates)),
            "ticktext": names,
            "range": [coordinates - 0.5, -0.5],
            "showgrid": False,
        },
        showlegend=True,
    )
    return {"data": traces, "layout": layout}


def _interval_trace(name: str, several: list[Interval], names: list[str], offset: float, look: Look) -> dict[str, Any]:
    means = np.array([each.mean for each in several])
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": numbers(means),
        "y": [place + offset for place in range(len(several))],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": numbers(np.array([each.high for each in several]) - means),
            "arrayminus": numbers(means - np.array([each.low for each in several])),
            "width": 0,
            "thickness": 2,
        },
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 7},
        "customdata": [[label, *numbers(each)] for label, each in zip(names, several, strict=True)],
        "meta": [escape(name)],
        "hovertemplate": "<b>%{meta[0]}</b><br>%{customdata[0]}: mean %{customdata[1]:.4~f}<br>90 % from "
        "%{customdata[2]:.4~f} to %{customdata[3]:.4~f}<extra></extra>",
    }
