"""Annealed importance sampling against known normalisers, closed forms and cubature, and its error bar over seeds.

Bounds are five standard errors wherever nothing else is said: a two-sided false alarm of 6e-7 for each comparison if
the estimates were normal; their seeds are fixed.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pytest
import torch
from pyro import distributions as dist
from scipy import stats
from torch import Tensor

from elbozoo.inference import hmc
from elbozoo.inference.annealing import (
    AnnealedEstimate,
    Whitening,
    anneal,
    annealed_evidence,
    explore,
    mean_weight,
    schedule,
)
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.unconstrained import UnconstrainedProgram
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.entry import Entry, Program
from elbozoo.models.contract.errors import NumericalFailure

Z = 5.0
DIM = 6


def hidden(name: str, columns: int, rows: int, **options: Any) -> tuple[Entry, Tensor, UnconstrainedProgram]:
    """An entry, rows drawn from it, and its program alone."""
    x, _ = get_entry(name).example(columns, seed=0, **options).simulate(rows, seed=1)
    entry = get_entry(name).from_data(x, **options)
    program = UnconstrainedProgram.of(Program(entry, columns), x)
    assert program is not None
    return entry, x, program


def estimate(program: UnconstrainedProgram, seed: int = 0) -> AnnealedEstimate:
    torch.manual_seed(seed)
    return annealed_evidence(program.log_terms, program.prior_draws(256))


def within(found: AnnealedEstimate, truth: float) -> bool:
    return abs(found.log_value - truth) <= Z * found.standard_error


@pytest.mark.parametrize("noise", ["known", "unknown"])
def test_six_coefficients_of_a_linear_regression(noise: str) -> None:
    """The closed form within five standard errors of less than 0.05 nats; for other data it is further away."""
    entry, x, program = hidden("linear-regression", DIM, 60, noise=noise)
    assert program.dim == (DIM if noise == "known" else DIM + 1)
    found = estimate(program)
    truth = float(entry.log_evidence(x))  # type: ignore[operator]
    assert 0 < found.standard_error <= 0.05
    assert within(found, truth)
    assert not within(found, float(entry.log_evidence(x[:-1])))  # type: ignore[operator]


def test_three_coefficients_of_a_logistic_regression_agree_with_cubature() -> None:
    """Neither knows of the other: within five standard errors; the evidence under a prior half as wide is not."""
    entry, x, program = hidden("logistic-regression", 3, 60)
    by_cubature = log_evidence(entry, x)
    assert by_cubature is not None and by_cubature.kind == "quadrature" and by_cubature.standard_error < 1e-3
    found = estimate(program)
    assert 0 < found.standard_error <= 0.05
    assert within(found, by_cubature.value)
    narrow = log_evidence(get_entry("logistic-regression").from_data(x, prior_scale=1.25, intercept_scale=5.0), x)
    assert narrow is not None and not within(found, narrow.value)


def test_the_jacobian_of_a_constrained_site_is_in_it() -> None:
    """Five rates on the half line, against the closed form; as a density over the rates themselves it would be off."""
    entry, x, program = hidden("gamma-poisson", 5, 30)
    truth = float(entry.log_evidence(x))  # type: ignore[operator]
    assert within(estimate(program), truth)

    def without_jacobian(u: Tensor) -> tuple[Tensor, Tensor]:
        prior, likelihood = program.log_terms(u)
        return prior - u.sum(-1), likelihood

    torch.manual_seed(0)
    assert not within(annealed_evidence(without_jacobian, program.prior_draws(256)), truth)


@pytest.mark.slow
def test_the_error_bar_is_calibrated() -> None:
    """Over 30 seeds Σ z² is χ² with 30 degrees of freedom: between its 1e-6 tails; with half the error bar it is not.

    The deviations of each run are nearly normal, as its log weights spread by less than half a nat. The regression is
    written out here, which is faster than its program.
    """
    entry, x, _ = hidden("linear-regression", DIM, 40, noise="known")
    truth = float(entry.log_evidence(x))  # type: ignore[operator]
    design, y = entry.constant_data(x)["design"], x[:, -1]
    prior = dist.Normal(torch.zeros(DIM).double(), entry.prior_scale(x))  # type: ignore[operator]

    def log_terms(u: Tensor) -> tuple[Tensor, Tensor]:
        return prior.log_prob(u).sum(-1), dist.Normal(u @ design.mT, 1.0).log_prob(y).sum(-1)

    scores = []
    for seed in range(30):
        torch.manual_seed(seed)
        found = annealed_evidence(log_terms, prior.sample((256,)))
        scores.append((found.log_value - truth) / found.standard_error)
    low, high = stats.chi2(30).ppf([1e-6, 1 - 1e-6])
    total = sum(score**2 for score in scores)
    assert low < total < high
    assert not low < 4 * total < high
    assert abs(sum(scores)) / math.sqrt(30) < Z


def banana() -> Any:
    """A curved density of mass e^-7 in six dimensions."""
    normal = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)

    def log_target(u: Tensor) -> Tensor:
        bent = torch.cat([u[:, :1], u[:, 1:2] + 0.5 * (u[:, :1] ** 2 - 1), u[:, 2:]], -1)
        return normal.log_prob(bent).sum(-1) - 7.0

    return log_target


def wide_base() -> Whitening:
    return Whitening(torch.full((DIM,), 0.5).double(), 1.5 * torch.eye(DIM).double())


def test_the_mean_weight_is_unbiased_with_and_without_moves_and_moves_pay() -> None:
    """A mass of e^-7 within five standard errors from few and many temperatures; the spread falls with their number."""
    spreads = []
    for temperatures in (4, 32, 256):
        log_weights = anneal(banana(), wide_base(), 0.5, temperatures, 1000)
        found = mean_weight(log_weights, temperatures)
        assert within(found, -7.0)
        assert not within(found, -7.0 + 10 * found.standard_error)
        spreads.append(float(log_weights.std()))
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.5 * spreads[0]
    still = mean_weight(anneal(banana(), wide_base(), 0.5, 32, 20_000, moves=False), 32)
    assert within(still, -7.0)
    assert float(still.log_weights.std()) > 2 * spreads[1]


def test_chains_without_an_accept_step_are_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with steps of which many would be rejected, accepting them all gets the mass wrong."""
    normal = dist.Normal(torch.tensor(0.3).double(), 0.6)

    def estimated() -> AnnealedEstimate:
        return mean_weight(anneal(lambda u: normal.log_prob(u).sum(-1) - 7.0, wide_base(), 0.6, 64, 2000), 64)

    assert within(estimated(), -7.0)
    monkeypatch.setattr(hmc, "_accept", lambda probability: torch.ones_like(probability, dtype=torch.bool))
    assert not within(estimated(), -7.0)


def test_exploration_ends_at_the_posterior() -> None:
    """Whitened by the particles, the exact posterior is nearly standard: centre within 0.5, scales from 0.7 to 1.4.

    Of 256 particles a mean has an error of 0.06 and a scale one of 4 %, more by as much as they are related. A
    prior a hundred times wider is far from that.
    """
    entry, x, program = hidden("linear-regression", DIM, 60, noise="known")
    posterior = entry.posterior(x)  # type: ignore[operator]
    torch.manual_seed(0)
    draws = program.prior_draws(256)

    def is_close(whitening: Whitening) -> bool:
        centre = whitening.inward(posterior.mean[None])
        scales = torch.linalg.svdvals(
            torch.linalg.solve_triangular(whitening.scale_tril, posterior.scale_tril, upper=False)
        )
        return bool((centre.abs() < 0.5).all() and (scales > 0.7).all() and (scales < 1.4).all())

    found = explore(program.log_terms, draws)
    assert is_close(found.whitening)
    assert not is_close(Whitening.of(draws))
    assert 0.1 < found.step_size < 2.0
    back = found.whitening.outward(found.whitening.inward(found.particles))
    assert float((back - found.particles).abs().max()) < 1e-9  # coordinates there and back, to rounding


def test_the_path_rises_from_base_to_target() -> None:
    for temperatures in (1, 2, 33):
        powers = schedule(temperatures)
        assert len(powers) == temperatures + 1
        assert powers[0] == 0.0 and powers[-1] == 1.0
        assert all(after > before for before, after in itertools.pairwise(powers))
    steps = [after - before for before, after in itertools.pairwise(schedule(32))]
    assert steps[0] < 0.5 * steps[16] and steps[-1] < 0.5 * steps[16]


def test_seeds_repeat() -> None:
    _, _, program = hidden("linear-regression", 4, 20, noise="unknown")

    def few_chains(seed: int) -> AnnealedEstimate:
        torch.manual_seed(seed)
        return annealed_evidence(program.log_terms, program.prior_draws(64), chains=64)

    first, again, other = few_chains(0), few_chains(0), few_chains(1)
    assert torch.equal(first.log_weights, again.log_weights)
    assert first.log_value != other.log_value


def test_data_that_are_impossible_under_every_draw_are_refused() -> None:
    def impossible(u: Tensor) -> tuple[Tensor, Tensor]:
        return u.sum(-1), torch.full((len(u),), -math.inf, dtype=u.dtype)

    with pytest.raises(NumericalFailure, match="the likelihood is zero at all 64 draws"):
        annealed_evidence(impossible, torch.randn(64, 5, dtype=torch.float64))


def four_means(batch: Batch) -> Tensor:
    """A program of a user's: a normal mean of each of four columns, with known scale."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(4).double(), 10.0).to_event(1))
    with pyro.plate("data", batch.total, subsample=batch.index):
        return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=batch.x)


def test_a_program_of_the_users_gets_an_estimate() -> None:
    """Of four dimensions, against the closed form of the entry it is; as told, it is the same for every caller."""
    x, _ = get_entry("normal-mean").example(4, seed=0).simulate(30, seed=1)
    truth = float(get_entry("normal-mean").from_data(x).log_evidence(x))  # type: ignore[operator]
    found = log_evidence(Program(four_means, 4), x)
    assert found is not None and found.kind == "estimate" and found.per_datum is None
    assert abs(found.value - truth) <= Z * found.standard_error
    assert abs(found.value - truth - 10 * found.standard_error) > Z * found.standard_error
    torch.manual_seed(5)
    assert log_evidence(Program(four_means, 4), x) == found


def test_programs_that_do_not_broadcast_or_have_discrete_globals_have_none() -> None:
    """They are as they were: nothing is estimated for them without a guide."""

    def one_at_a_time(batch: Batch) -> Tensor:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(4).double(), 10.0).to_event(1))
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Normal(loc.reshape(4), 1.0).to_event(1), obs=batch.x)

    def discrete(batch: Batch) -> Tensor:
        sign = pyro.sample("sign", dist.Bernoulli(torch.tensor(0.5).double()))
        loc = pyro.sample("loc", dist.Normal(torch.zeros(4).double(), 10.0).to_event(1))
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Normal(loc + sign[..., None], 1.0).to_event(1), obs=batch.x)

    x = torch.randn(10, 4, dtype=torch.float64)
    assert log_evidence(Program(one_at_a_time, 4), x) is None
    assert log_evidence(Program(discrete, 4), x) is None
