"""The contract of fits, over every entry x valid guide."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pyro
import pytest
import torch
from contract import ROWS, entry_for, every_entry, every_pair, example_data, guide_for

from elbozoo.guides import resolve_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.guides.registry import guide_cards
from elbozoo.inference.evidence import Evidence, log_evidence
from elbozoo.inference.fit import Fit
from elbozoo.inference.ledger import check_bound, compute_ledger
from elbozoo.inference.method import default_methods, plan
from elbozoo.inference.weights import importance_weights, iwae
from elbozoo.models import Batch
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.isolation import isolated

pairs = pytest.mark.parametrize(("name", "guide"), every_pair())

# z-bound of the Monte Carlo comparisons below: two-sided false-alarm rate 2e-9 per comparison.
Z = 6.0


def short_fit(name: str, guide: str, seed: int = 0) -> Fit:
    return plan(name, example_data(name), guide, {"steps": 5}).run(seed, progress=False)


@pairs
def test_sites_and_shapes(name: str, guide: str) -> None:
    """The guide samples the model's latent sites, in their shapes, and nothing the model does not know."""
    entry, x = entry_for(name), example_data(name)
    q = guide_for(entry, guide, x)
    with isolated(0), torch.no_grad():
        trace = pyro.poutine.trace(q).get_trace(Batch.full(x))
    for site in entry.latent_sites(x):
        if site.name in q.summed_out:
            assert site.name not in trace.nodes
            continue
        expected = (ROWS, *site.event_shape) if site.is_local else tuple(site.event_shape)
        assert trace.nodes[site.name]["value"].shape == expected
        assert (
            torch.isfinite(trace.nodes[site.name]["fn"].log_prob(trace.nodes[site.name]["value"])).all()
            or not q.is_bound
        )


@pairs
def test_bound_does_not_exceed_the_evidence(name: str, guide: str) -> None:
    """ELBO <= IWAE-10 <= log p(x) within six standard errors, for an untrained guide; and the check can fail."""
    entry, x = entry_for(name), example_data(name)
    q = guide_for(entry, guide, x)
    evidence = log_evidence(entry, x)
    if not q.is_bound or evidence is None:
        return
    weights = importance_weights(entry, q, Batch.full(x), 1000, seed=1)
    draws = weights.elbo().sum(-1)
    elbo, error = float(draws.mean()), float(draws.std() / math.sqrt(len(draws))) if len(draws) > 1 else 0.0
    check_bound(elbo, error, evidence)
    if len(draws) > 1:
        assert elbo <= float(iwae(weights, 10).sum()) + Z * error + 1e-9
    lowered = evidence._replace(
        value=elbo - Z * (error + evidence.standard_error) - 1e-3 * (1 + abs(elbo)), standard_error=0.0
    )
    with pytest.raises(NumericalFailure, match="exceeds log p"):
        check_bound(elbo, error, lowered)


@pytest.mark.parametrize("kind", ["exact", "estimate"])
def test_a_bound_of_a_q_that_ran_away_is_refused(kind: Literal["exact", "estimate"]) -> None:
    """Its standard error has no end, so that no multiple of it can be exceeded; a finite one is another matter."""
    evidence = Evidence(-2373.2, 0.0, kind, None)
    with pytest.raises(NumericalFailure, match="standard error of inf"):
        check_bound(4e151, math.inf, evidence)
    check_bound(-2373.0, 1.0, evidence)
    check_bound(-math.inf, math.nan, evidence)


@pairs
def test_ledger_adds_up_and_agrees_with_the_divergence(name: str, guide: str) -> None:
    """elbo + approximation + amortization = log p(x); gap = KL(q ‖ posterior) within six standard errors."""
    fit = short_fit(name, guide)
    ledger = fit.full_ledger()
    if not fit.guide.is_bound:
        assert math.isnan(ledger.elbo) and math.isnan(ledger.gap)
        return
    parts = ledger.elbo + ledger.approximation_gap + ledger.amortization_gap
    if not math.isnan(ledger.approximation_gap):
        assert parts == pytest.approx(ledger.log_evidence, rel=1e-9)
    assert ledger.gap >= -Z * math.hypot(ledger.elbo_se, ledger.log_evidence_se) - 1e-6
    assert (
        math.isnan(ledger.approximation_gap)
        or ledger.approximation_gap >= -Z * ledger.elbo_se - ledger.log_evidence_se - 1e-4 * ROWS
    )
    if math.isnan(ledger.kl):
        return
    error = Z * math.hypot(ledger.elbo_se, ledger.kl_se) + 1e-7 * abs(ledger.log_evidence)
    assert abs(ledger.gap - ledger.kl) <= error
    # Negative control: the divergence to the posterior of other data is another number.
    wrong = replace(ledger, kl=ledger.kl + 2 * error + 0.1)
    assert abs(wrong.gap - wrong.kl) > error


@pairs
def test_same_seed_same_fit_bit_for_bit(name: str, guide: str) -> None:
    """Every random result comes from the seed."""
    first, again = short_fit(name, guide), short_fit(name, guide)
    assert first.trajectory["objective"].equals(again.trajectory["objective"])
    for one, other in zip(first.guide.state_dict().values(), again.guide.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first.entry.state_dict().values(), again.entry.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pairs
def test_save_and_load_round_trip_is_exact(name: str, guide: str, tmp_path: Path) -> None:
    """A loaded fit answers with the same numbers, to the last bit."""
    fit = short_fit(name, guide)
    loaded = Fit.load(fit.save(tmp_path / "fit"))
    x = example_data(name)
    for key, value in fit.guide.state_dict().items():
        assert torch.equal(value, loaded.guide.state_dict()[key]), key
    one, other = fit.elbo(x), loaded.elbo(x)
    assert one == other or (math.isnan(one) and math.isnan(other))
    assert loaded.trajectory.shape == fit.trajectory.shape
    assert not list(tmp_path.rglob("*.pkl")) and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("name", [n for n, g in every_pair() if g == "exact"])
def test_exact_guide_has_no_gap(name: str) -> None:
    """With q the posterior, every weight is p(x): gap and its error vanish to rounding (1e-9 relative)."""
    entry, x = entry_for(name), example_data(name)
    q = guide_for(entry, "exact", x)
    ledger = compute_ledger(entry, q, x, GuideOptions(), seed=0)
    assert abs(ledger.gap) <= 1e-9 * abs(ledger.log_evidence)
    assert abs(ledger.kl) <= 1e-9 * abs(ledger.log_evidence)
    other = next((g for n, g in every_pair() if n == name and g != "exact" and not g.endswith("delta")), None)
    if other is None:  # no latent, so no other q
        return
    untrained = compute_ledger(entry, guide_for(entry, other, x), x, GuideOptions(), seed=0)
    assert untrained.gap > 1e-9 * abs(untrained.log_evidence)


@pytest.mark.parametrize("name", every_entry())
def test_every_guide_that_does_not_fit_is_refused_with_the_reason(name: str) -> None:
    """A pair that makes no sense is refused, and the message says what would work."""
    entry = entry_for(name)
    for card in guide_cards(entry):
        if card.refusal is None:
            assert resolve_guide(card.name, entry) == card.name
            continue
        with pytest.raises(InvalidInput, match="does not fit") as caught:
            resolve_guide(card.name, entry)
        assert "guides that fit: " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", every_entry())
def test_default_methods_apply(name: str) -> None:
    """What is compared when nobody says what must work for every entry."""
    x = example_data(name)
    methods = default_methods(entry_for(name))
    assert methods
    for method in methods:
        plan(name, x, method, {})
