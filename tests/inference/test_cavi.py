"""Coordinate ascent: it never falls, its bound is that of its guide, and its fits are kept and judged as any other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from contract import entry_for, every_entry, example_data

import elbozoo as ez
from elbozoo.guides.conjugate import ConjugateGuide
from elbozoo.inference.cavi import CAVIOptions, run_cavi
from elbozoo.inference.convergence import MONOTONE_SLACK
from elbozoo.inference.fit import Fit
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.entry import HasOracle, SupportsCAVI
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.isolation import isolated

MIXTURE = "bayesian-gaussian-mixture"
CAVI_ENTRIES = [name for name in every_entry() if isinstance(get_entry(name).example(), SupportsCAVI)]
cavi_entries = pytest.mark.parametrize("name", CAVI_ENTRIES)


def factors_after(entry, x, sweeps, restart=1):
    with isolated(restart):
        factors = entry.initial_factors(x, restart)
    for _ in range(sweeps):
        factors = entry.update_factors(x, factors)
    return factors


@cavi_entries
def test_bound_never_falls_from_twenty_starts(name):
    """By no more than 1e-9 per datum at any sweep, from 20 starts, and it rises."""
    entry, x = entry_for(name), example_data(name)
    for restart in range(20):
        factors = factors_after(entry, x, 0, restart)
        bounds = [float(entry.bound(x, factors))]
        for _ in range(20):
            factors = entry.update_factors(x, factors)
            bounds.append(float(entry.bound(x, factors)))
        slack = MONOTONE_SLACK * max(len(x), abs(bounds[-1]))
        falls = [before - after for before, after in itertools.pairwise(bounds)]
        assert max(falls) <= slack
        assert bounds[-1] > bounds[0]
        # Negative control: run backwards, the same record falls.
        assert max(-fall for fall in falls) > slack


@cavi_entries
def test_a_wrong_update_is_caught(name, monkeypatch):
    """Negative control of the monitor: updates that drift away lower the bound, and that ends the fit."""
    entry, x = entry_for(name), example_data(name)
    right = type(entry).update_factors
    sweeps = []

    def drifting(self, rows, factors):
        sweeps.append(0)
        updated = right(self, rows, factors)
        return updated._replace(mean=updated.mean + 0.1 * len(sweeps) * (1 + updated.mean.abs()))

    monkeypatch.setattr(type(entry), "update_factors", drifting)
    with pytest.raises(NumericalFailure, match=r"CAVI iteration .*: the bound fell from"):
        run_cavi(entry, x, CAVIOptions(restarts=1), seed=0, progress=False)


@cavi_entries
@pytest.mark.parametrize("sweeps", [1, 30])
def test_draws_of_the_guide_agree_with_the_closed_form(name, sweeps):
    """ELBO by 4000 draws within six standard errors (false alarms 2e-9) and rounding; factors a tenth off are not.

    Where the last sweep left q(z) at its optimum the draws hardly differ, so that the agreement is to many digits.
    """
    entry, x = entry_for(name), example_data(name)
    factors = factors_after(entry, x, sweeps)
    guide = ConjugateGuide(entry, factors).double()
    with torch.no_grad():
        draws = importance_weights(entry, guide, Batch.full(x), 4000, seed=1).elbo().sum(-1)
        error = 6 * float(draws.std()) / math.sqrt(len(draws)) + 1e-8 * abs(float(draws.mean()))
        assert abs(float(entry.bound(x, factors)) - float(draws.mean())) <= error
        moved = factors._replace(mean=factors.mean + 0.1 * (1 + factors.mean.abs()))
        assert abs(float(entry.bound(x, moved)) - float(draws.mean())) > error


@cavi_entries
def test_draws_agree_away_from_any_optimum_too(name):
    """With every factor moved, so that all terms of the bound vary: six standard errors of 4000 draws."""
    entry, x = entry_for(name), example_data(name)
    settled = factors_after(entry, x, 2)
    factors = type(settled)(*(1.1 * field for field in settled))
    guide = ConjugateGuide(entry, factors).double()
    with torch.no_grad():
        draws = importance_weights(entry, guide, Batch.full(x), 4000, seed=2).elbo().sum(-1)
        error = 6 * float(draws.std()) / math.sqrt(len(draws))
        assert error > 0
        assert abs(float(entry.bound(x, factors)) - float(draws.mean())) <= error
        assert abs(float(entry.bound(x, settled)) - float(draws.mean())) > error


@pytest.mark.parametrize("name", [n for n in CAVI_ENTRIES if isinstance(get_entry(n).example(), HasOracle)])
def test_bound_stays_below_an_exact_evidence(name):
    """From the first start on, to rounding; after 50 sweeps by less than one nat per scalar latent here."""
    entry, x = entry_for(name), example_data(name)
    with torch.no_grad():
        evidence = float(entry.log_evidence(x))
        bounds = [float(entry.bound(x, factors_after(entry, x, sweeps))) for sweeps in (0, 1, 50)]
    assert max(bounds) <= evidence + 1e-9 * abs(evidence)
    scalars = sum(site.dim for site in entry.latent_sites(x))
    assert evidence - bounds[-1] < scalars
    # Negative control: at the start q is far off, and mirrored at the evidence it would not be below.
    assert evidence - bounds[0] > scalars
    assert 2 * evidence - bounds[0] > evidence + 1e-9 * abs(evidence)


@cavi_entries
def test_fits_repeat_and_are_kept(name, tmp_path):
    """The same seed gives the same bits; a loaded fit gives the same bound."""
    x = example_data(name)
    fit, again = (ez.fit(name, x, method="cavi", restarts=2, iterations=20, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(fit.guide.factors, again.guide.factors, strict=True))
    loaded = Fit.load(fit.save(tmp_path / "fit"))
    assert loaded.guide.factors._fields == fit.guide.factors._fields
    assert all(torch.equal(a, b) for a, b in zip(fit.guide.factors, loaded.guide.factors, strict=True))
    assert loaded.elbo(x) == fit.elbo()
    assert list(fit.trajectory["elbo"]) == list(fit.trajectory["objective"])


def test_the_best_start_is_kept_and_more_starts_are_no_worse():
    x = ez.load_data("iris").x
    entry = get_entry(MIXTURE).from_data(x, components=5)
    runs = [run_cavi(entry, x, CAVIOptions(restarts=n), seed=0, progress=False) for n in (1, 2, 4)]
    assert runs[0].bound <= runs[1].bound <= runs[2].bound
    assert runs[0].bound < runs[2].bound
    for run in runs:
        assert float(entry.bound(x, run.factors)) == run.bound
        assert run.trajectory.frame()["elbo"].iloc[-1] == run.bound
        assert run.converged and not run.notes and not run.interrupted


def test_iterations_that_run_out_are_said():
    x = ez.load_data("iris").x
    fit = ez.fit(MIXTURE, x, method="cavi", components=5, restarts=1, iterations=4)
    assert not fit.converged
    assert len(fit.notes) == 1 and "CAVI stopped after 4 iterations with about" in fit.notes[0]


def test_an_interrupted_fit_holds_what_was_reached(monkeypatch):
    x = ez.load_data("iris").x
    entry = get_entry(MIXTURE).from_data(x)
    right, sweeps = type(entry).update_factors, []

    def interrupted(self, rows, factors):
        sweeps.append(0)
        if len(sweeps) > 3:
            raise KeyboardInterrupt
        return right(self, rows, factors)

    monkeypatch.setattr(type(entry), "update_factors", interrupted)
    run = run_cavi(entry, x, CAVIOptions(tolerance=1e-12), seed=0, progress=False)
    assert run.interrupted and not run.converged
    assert len(run.trajectory.frame()) == 3
    assert float(entry.bound(x, run.factors)) == run.bound


def test_ledger_of_a_mixture_with_few_rows_has_the_exact_gap():
    """By enumeration of the assignments: the gap is a number without error, and above ln 2 for the second mode."""
    x = ez.load_data("iris").x[::15]
    fit = ez.fit(MIXTURE, x, method="cavi", components=2, covariance="diagonal")
    ledger = fit.ledger()
    assert ledger["log_evidence_kind"] == "exact"
    exact = float(fit.entry.enumerated_log_evidence(x))
    assert ledger["log_evidence"] == pytest.approx(exact, rel=0, abs=1e-9)
    bound = float(fit.entry.bound(x, fit.guide.factors))
    assert ledger["gap"] == pytest.approx(exact - bound, rel=0, abs=6 * ledger["elbo_se"] + 1e-8)
    assert ledger["gap"] > 0
    assert ledger["gap"] != pytest.approx(exact - bound + 0.01, rel=0, abs=6 * ledger["elbo_se"] + 1e-8)


def test_new_rows_get_their_responsibilities():
    x = ez.load_data("iris").x
    fit = ez.fit(MIXTURE, x[::2], method="cavi", restarts=2)
    batch = Batch.full(x[1::2])
    means = fit.guide.means(batch)
    with torch.no_grad():
        expected = fit.entry.log_responsibilities(x[1::2], fit.guide.factors).exp()
    assert torch.allclose(means, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(means.roll(1, 1), expected, rtol=0, atol=1e-12)


def test_tensors_of_another_entry_are_refused():
    entry = get_entry(MIXTURE).example()
    with pytest.raises(InvalidInput, match=r"found the factors \['factor_mean'\], expected those of bayesian-gaussian"):
        ConjugateGuide.from_state(entry, {"factor_mean": torch.zeros(2)})


def test_other_entries_say_why_they_have_no_cavi():
    with pytest.raises(InvalidInput, match="method 'cavi' does not apply to ppca"):
        ez.fit("ppca", ez.load_data("iris").x, method="cavi")
