"""Held-out figures: those of new rows alone, from SciPy and by hand, and none where there is nothing to say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import elbozoo as ez
from elbozoo.inference import heldout
from elbozoo.inference.evidence import Evidence
from elbozoo.inference.heldout import joined
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.sequences import observations, steps_mask

QUICK: dict[str, Any] = {"hidden": 4, "steps": 30, "progress": False}


def wine(start: int, stop: int) -> Tensor:
    return ez.load_data("wine-standardised").x[start:stop, :4]


def bits(start: int, stop: int) -> Tensor:
    return ez.load_data("digits-binary").x[start:stop, 18:24]


# ---- local latents ---------------------------------------------------------------------------------------------------


def test_evidence_of_new_rows_is_their_density_at_the_fitted_parameters() -> None:
    fit = ez.fit("ppca", wine(0, 100), test=wine(100, 178), method="em", latent_dim=2, progress=False)
    figures = fit.heldout()
    loading, noise = fit.entry.loading.detach().numpy(), float(fit.entry.noise_scale.detach())
    normal = stats.multivariate_normal(fit.entry.loc.detach().numpy(), loading @ loading.T + noise**2 * np.eye(4))
    expected = normal.logpdf(wine(100, 178).numpy()).sum()
    # Absolute, nats over 78 rows: log densities near -5 in float64.
    assert abs(figures["heldout_log_evidence"] - expected) < 1e-9
    assert abs(figures["heldout_elbo"] - expected) < 1e-9  # the exact posterior's bound is tight
    assert (figures["heldout_rows"], figures["heldout_log_evidence_kind"]) == (78, "exact")
    assert abs(normal.logpdf(wine(0, 78).numpy()).sum() - expected) > 1
    assert abs(float(fit.ledger()["log_evidence"]) - expected) > 1


@pytest.mark.parametrize("guide", ["amortized", "shared-diagonal-normal", "exact", "free-diagonal-normal"])
def test_an_elbo_of_new_rows_needs_a_q_for_them(guide: str) -> None:
    fit = ez.fit("ppca", wine(0, 60), test=wine(60, 178), guide=guide, latent_dim=2, **QUICK)
    figures = fit.heldout()
    assert figures["heldout_log_evidence_kind"] == "exact"
    if guide.startswith("free"):
        assert math.isnan(figures["heldout_elbo"]) and math.isnan(figures["heldout_elbo_se"])
        return
    # A bound within its error: six standard errors, false alarms below 1e-9, and rounding.
    assert figures["heldout_elbo"] < figures["heldout_log_evidence"] + 6 * figures["heldout_elbo_se"] + 1e-6
    assert fit.elbo(wine(60, 178)) == figures["heldout_elbo"]


@pytest.mark.parametrize(
    ("latent_dim", "guide", "kind"),
    [
        (1, "amortized", "quadrature"),
        (3, "amortized", "estimate"),
        (1, "mean-field", "quadrature"),
        (3, "mean-field", None),
    ],
)
def test_kinds_of_evidence_without_an_oracle(latent_dim: int, guide: str, kind: str | None) -> None:
    """An estimate takes draws of q, so that a q for the rows of the fit alone leaves nothing to say."""
    options = QUICK | {"latent_dim": latent_dim, "guide": guide, "steps": 3}
    figures = ez.fit("vae", bits(0, 40), **options).heldout(bits(40, 60))
    assert figures["heldout_log_evidence_kind"] == kind
    assert math.isnan(figures["heldout_log_evidence"]) == (kind is None)
    assert math.isnan(figures["heldout_elbo"]) == (guide == "mean-field")


def test_a_point_mass_bounds_nothing_on_new_rows_either() -> None:
    figures = ez.fit("ppca", wine(0, 60), guide="amortized-delta", latent_dim=2, **QUICK).heldout(wine(60, 100))
    assert math.isnan(figures["heldout_elbo"]) and math.isfinite(figures["heldout_log_evidence"])


def test_a_bound_above_the_evidence_of_new_rows_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = ez.fit("ppca", wine(0, 60), guide="amortized", latent_dim=2, **QUICK)
    elbo = fit.heldout(wine(60, 100))["heldout_elbo"]
    monkeypatch.setattr(heldout, "log_evidence", lambda entry, x: Evidence(elbo - 10, 0.0, "exact", None))
    with pytest.raises(NumericalFailure, match="exceeds log p"):
        fit.heldout(wine(60, 100))


# ---- global latents --------------------------------------------------------------------------------------------------


def by_succession(rows: np.ndarray, before: np.ndarray, alpha: float, beta: float) -> float:
    """Log probability of ``rows`` one after the other, by Laplace's rule of succession."""
    ones, count, total = before.sum(0), len(before), 0.0
    for row in rows:
        p = (alpha + ones) / (alpha + beta + count)
        total += np.log(np.where(row == 1, p, 1 - p)).sum()
        ones, count = ones + row, count + 1
    return float(total)


@pytest.mark.parametrize("method", ["closed-form", "mean-field", "nuts"])
def test_new_rows_given_those_of_the_fit(method: str) -> None:
    """Each new row adds its predictive probability, whatever q was fitted; the ELBO of one part says nothing of it."""
    options = {"alpha": 2.0, "beta": 3.0, "method": method, "progress": False}
    few = {"nuts": {"draws": 10, "warmup": 10, "chains": 1}, "mean-field": {"steps": 5}}
    options |= few.get(method, {})
    figures = ez.fit("beta-bernoulli", bits(0, 30), test=bits(30, 50), **options).heldout()
    train, test = bits(0, 30).numpy(), bits(30, 50).numpy()
    # Absolute, nats: differences of log beta functions near 100.
    assert abs(figures["heldout_log_evidence"] - by_succession(test, train, 2.0, 3.0)) < 1e-9
    assert abs(figures["heldout_log_evidence"] - by_succession(test, test[:0], 2.0, 3.0)) > 1
    assert figures["heldout_log_evidence_kind"] == "exact"
    assert math.isnan(figures["heldout_elbo"])


def test_what_is_not_exact_is_not_subtracted() -> None:
    """Two quadratures or two estimates leave a difference with both their errors, and nothing is said."""
    frame = torch.cat([wine(0, 30)[:, :1], (wine(0, 30)[:, 1:2] > 0).double()], 1)
    figures = ez.fit("logistic-regression", frame[:20], guide="laplace", progress=False).heldout(frame[20:])
    assert math.isnan(figures["heldout_log_evidence"]) and figures["heldout_log_evidence_kind"] is None
    assert figures["heldout_rows"] == 10


# ---- stacks ----------------------------------------------------------------------------------------------------------


def test_sequences_of_a_fit_and_new_ones_make_one_table() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    names = torch.tensor([0.0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3], dtype=torch.float64)
    table = torch.cat([names[:, None], x], 1)
    entry = get_entry("hidden-markov-model").from_data(table, sequence=0, states=2)
    whole, first, last = (entry.arrange(rows, entry.options) for rows in (table, table[:5], table[5:]))
    assert torch.equal(joined(entry, first, last), whole)
    assert not torch.equal(joined(entry, last, first), whole)
    assert first.shape[1] < last.shape[1]  # so that the first ones had to be padded
    assert torch.equal(observations(last)[steps_mask(last)], x[5:])


def test_whole_sequences_are_held_out() -> None:
    rows = ez.load_data("simulate:hidden-markov-model", rows=60).x
    names = torch.arange(60, dtype=torch.float64)[:, None].div(6, rounding_mode="floor")
    table = torch.cat([names, rows], 1)
    options = {"sequence": 0, "states": 2, "method": "em", "iterations": 3, "restarts": 1, "progress": False}
    fit = ez.fit("hidden-markov-model", table[:48], test=table[48:], **options)
    figures = fit.heldout()
    evidence = fit.log_evidence(table[48:])
    assert evidence is not None
    assert figures["heldout_rows"] == 12
    assert figures["heldout_log_evidence"] == evidence.value
    # Sequences are independent given θ, so the parts add up to the whole; steps of one sequence are not.
    together, alone = fit.log_evidence(table), fit.log_evidence(table[:48])
    assert together is not None and alone is not None
    # Absolute, nats over 60 steps in float64.
    assert abs(together.value - alone.value - evidence.value) < 1e-9
    cut = [fit.log_evidence(part) for part in (table[:45], table[45:])]
    assert abs(together.value - sum(part.value for part in cut if part is not None)) > 1e-3


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_loaded_fit_needs_its_rows_only_where_new_ones_depend_on_them(tmp_path: Path) -> None:
    local = ez.fit("ppca", wine(0, 60), method="em", latent_dim=1, progress=False)
    loaded = ez.load_fit(local.save(tmp_path / "local"))
    assert loaded.heldout(wine(60, 80)).equals(local.heldout(wine(60, 80)))
    shared = ez.fit("beta-bernoulli", bits(0, 30), method="closed-form", progress=False)
    assert shared.heldout(bits(30, 40))["heldout_rows"] == 10
    with pytest.raises(InvalidInput, match="found no rows of the fit, expected them: beta-bernoulli has a"):
        ez.load_fit(shared.save(tmp_path / "shared")).heldout(bits(30, 40))


def test_a_fit_without_held_out_rows_asks_for_some() -> None:
    fit = ez.fit("ppca", wine(0, 60), method="em", latent_dim=1, progress=False)
    with pytest.raises(InvalidInput, match=r"found no held-out rows, expected some; pass x, or fit with test=0\.2"):
        fit.heldout()
    assert fit.heldout(wine(60, 80))["heldout_rows"] == 20
    validated = ez.fit("ppca", wine(0, 60), validation=wine(60, 75), method="em", latent_dim=1, progress=False)
    assert validated.heldout()["heldout_rows"] == 15
