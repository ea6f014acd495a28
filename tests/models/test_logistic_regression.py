"""Logistic regression against SciPy's quadrature, scikit-learn's optimum, reductions, and separable data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import dblquad
from sklearn.linear_model import LogisticRegression as PeerLogisticRegression
from torch import Tensor

import elbozoo as ez
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.unconstrained import UnconstrainedProgram
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.logistic_regression import LogisticRegression

PRIOR = {"prior_scale": 1.5, "intercept_scale": 3.0}


def table(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Standard normal covariates, and a target of both classes in the last column."""
    rng = np.random.default_rng(seed)
    design = rng.standard_normal((rows, columns - 1))
    logits = 0.3 + design @ np.linspace(-1, 1.5, columns - 1)
    target = rng.random(rows) < 1 / (1 + np.exp(-logits))
    target[:2] = False, True
    return torch.from_numpy(np.c_[design, target])


def build(x: Tensor, **options: Any) -> LogisticRegression:
    entry = get_entry("logistic-regression").from_data(x, **options)
    assert isinstance(entry, LogisticRegression)
    return entry


def log_joint(entry: LogisticRegression, x: Tensor, coefficients: np.ndarray) -> np.ndarray:
    """The program's own log p(y, β) at points (G, P)."""
    program = UnconstrainedProgram.of(entry, x)
    assert program is not None
    return program.log_joint(torch.from_numpy(np.atleast_2d(coefficients))).numpy()


def numpy_log_joint(x: Tensor, coefficients: np.ndarray) -> np.ndarray:
    """Log p(y, β) at points (G, 2) of an intercept and one slope, written out."""
    logits = coefficients @ np.c_[np.ones(len(x)), x[:, 0].numpy()].T
    sign = 2 * x[:, -1].numpy() - 1
    log_likelihood = -np.logaddexp(0, -sign * logits).sum(-1)
    scale = np.array([PRIOR["intercept_scale"], PRIOR["prior_scale"]])
    log_prior = (-0.5 * (coefficients / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum(-1)
    return log_likelihood + log_prior


def test_evidence_is_scipys_double_integral() -> None:
    """Intercept and slope, dblquad on the densities written out: within its 1e-7 and the error reported."""
    x = table(15, 2)
    found = log_evidence(build(x, **PRIOR), x)
    assert found is not None and found.kind == "quadrature" and 0 < found.standard_error <= 1e-5
    top = float(numpy_log_joint(x, np.zeros((1, 2)))[0])
    integral = dblquad(
        lambda slope, intercept: math.exp(numpy_log_joint(x, np.array([[intercept, slope]]))[0] - top),
        *(-25, 25, -12, 12),
        epsabs=0,
        epsrel=1e-7,
    )[0]
    truth = top + math.log(integral)
    assert abs(found.value - truth) <= found.standard_error + 1e-7
    other = log_evidence(build(x, **{**PRIOR, "prior_scale": 1.501}), x)
    assert other is not None and abs(other.value - truth) > other.standard_error + 1e-7


def test_logits_far_out_keep_their_digits() -> None:
    """At β of 1e4 probabilities round to 0 and 1; the log joint is still the written-out one, to 1e-12 relative."""
    x = table(15, 2)
    points = np.array([[0.3, -0.2], [1e4, -1e4], [-3e3, 5e4]])
    found = log_joint(build(x, **PRIOR), x, points)
    np.testing.assert_allclose(found, numpy_log_joint(x, points), rtol=1e-12)
    assert np.isfinite(found).all()
    assert np.abs(found / numpy_log_joint(x, 1.0001 * points) - 1).max() > 1e-12


def test_the_mode_is_scikit_learns_optimum() -> None:
    """At its penalised optimum the gradient of the log joint vanishes: below 1e-6 nats per unit, its own tolerance."""
    data = ez.load_data("wine-standardised").x
    x = torch.cat([data[:, 1:6], (data[:, :1] > 0).double()], 1)
    entry = build(x, intercept=False, prior_scale=1.5)
    peer = PeerLogisticRegression(C=1.5**2, fit_intercept=False, tol=1e-12, max_iter=10_000)
    peer.fit(x[:, :-1].numpy(), x[:, -1].numpy())
    program = UnconstrainedProgram.of(entry, x)
    assert program is not None

    def slope(stretch: float) -> float:
        u = torch.from_numpy(stretch * peer.coef_).requires_grad_()
        (gradient,) = torch.autograd.grad(program.log_joint(u).sum(), u)
        return float(gradient.abs().max())

    assert slope(1.0) <= 1e-6
    assert slope(1.0001) > 1e-6


def test_perfect_separation_has_a_finite_answer() -> None:
    """The likelihood rises without bound along β, the prior does not: evidence by quadrature, and a posterior.

    As the prior widens, every label is right or wrong with certainty, and the evidence goes to the prior's share of
    the β that separate the classes: those whose boundary falls between -2/19 and 2/19. What is left falls like
    the square of the scale, and is 3e-3 nats at 100: 1e-4 nats at 1000 leave it room.
    """
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    x = torch.cat([x, (x > 0).double()], 1)
    limit = math.log(math.atan(2 / 19) / math.pi)
    values = {}
    for scale in (2.5, 1000.0):
        found = log_evidence(build(x, prior_scale=scale, intercept_scale=scale), x)
        assert found is not None and found.kind == "quadrature" and found.standard_error <= 1e-4
        values[scale] = found.value
    assert values[1000.0] == pytest.approx(limit, abs=1e-4)
    assert values[2.5] != pytest.approx(limit, abs=1e-4)
    ledger = ez.fit("logistic-regression", x, guide="mean-field", steps=300).full_ledger()
    assert all(math.isfinite(value) for value in (ledger.elbo, ledger.log_evidence, ledger.gap))


def test_without_rows_that_tell_the_evidence_is_a_coin() -> None:
    """A prior of almost no width leaves every label at one half: N log ½, to 1e-5 nats; a wider one does not."""
    x = table(12, 3)
    narrow = log_evidence(build(x, prior_scale=1e-4, intercept_scale=1e-4), x)
    wide = log_evidence(build(x, prior_scale=1.0, intercept_scale=1.0), x)
    assert narrow is not None and wide is not None
    assert narrow.value == pytest.approx(12 * math.log(0.5), abs=1e-5)
    assert wide.value != pytest.approx(12 * math.log(0.5), abs=1e-5)


def test_two_equal_columns_are_one_with_a_wider_prior() -> None:
    """A collinear design, two dimensions against one: within both errors; with another prior it is not."""
    x = table(20, 2)
    twice = torch.cat([x[:, :1], x], 1)
    once = log_evidence(build(x, intercept=False, prior_scale=2 * math.sqrt(2)), x)
    both = log_evidence(build(twice, intercept=False, prior_scale=2.0), twice)
    narrow = log_evidence(build(twice, intercept=False, prior_scale=1.99), twice)
    assert once is not None and both is not None and narrow is not None
    error = once.standard_error + both.standard_error
    assert abs(both.value - once.value) <= error
    assert abs(narrow.value - once.value) > error


def test_a_constant_column_is_a_second_intercept() -> None:
    """A column of ones beside the intercept: the evidence of one intercept with both variances, within both errors."""
    x = table(20, 2)
    ones = torch.cat([torch.ones(20, 1, dtype=torch.float64), x[:, 1:]], 1)
    both = log_evidence(build(ones, prior_scale=3.0, intercept_scale=4.0), ones)
    joined = log_evidence(build(x[:, 1:], intercept_scale=5.0), x[:, 1:])
    other = log_evidence(build(x[:, 1:], intercept_scale=5.01), x[:, 1:])
    assert both is not None and joined is not None and other is not None
    assert abs(both.value - joined.value) <= both.standard_error + joined.standard_error
    assert abs(both.value - other.value) > both.standard_error + other.standard_error


def test_one_class_only_and_one_row_only_have_an_answer() -> None:
    """No row of the other class, and a single row, whose evidence is one half by symmetry: 1e-6 nats."""
    x = table(12, 2)
    x[:, -1] = 0
    found = log_evidence(build(x), x)
    assert found is not None and -12 * math.log(2) < found.value < 0
    single = log_evidence(build(x[:1]), x[:1])
    assert single is not None and single.value == pytest.approx(-math.log(2), abs=1e-6)
    assert found.value != pytest.approx(-math.log(2), abs=1e-6)


def test_more_than_three_coefficients_are_an_estimate_that_says_so_and_repeats() -> None:
    x = table(30, 5)
    entry = build(x)
    found, again = log_evidence(entry, x), log_evidence(entry, x)
    assert found is not None and found.kind == "estimate"
    assert 0 < found.standard_error < 0.1
    assert found == again
    x = x[:, 1:]
    fewer = log_evidence(build(x), x)
    assert fewer is not None and fewer.kind == "estimate"
    x = x[:, 1:]
    three = log_evidence(build(x), x)
    assert three is not None and three.kind == "quadrature"


def test_a_target_that_is_not_zero_or_one_is_refused() -> None:
    x = table(10, 3)
    frame = pd.DataFrame(x.numpy(), columns=["dose", "age", "died"])
    with pytest.raises(InvalidInput, match=r"option target: found the value .* in column 2 .*expected 0 or 1"):
        ez.fit("logistic-regression", frame, target="age")
    with pytest.raises(InvalidInput, match="'deid'; did you mean 'died'"):
        ez.fit("logistic-regression", frame, target="deid")
    with pytest.raises(InvalidInput, match="found no column beside the target"):
        build(x[:, -1:], intercept=False)
    assert build(x[:, -1:]).coords() == {"coefficient": ["intercept"]}


def test_simulated_targets_have_the_programs_probabilities() -> None:
    """20,000 rows: the score Σ φ(y - p) at the β drawn is zero within five standard errors (6e-7 for each column)."""
    entry = get_entry("logistic-regression").example(3, seed=3)
    x, coefficients = entry.simulate(20_000, seed=1)
    assert isinstance(entry, LogisticRegression) and isinstance(coefficients, Tensor)
    design, probability = entry.design(x), torch.sigmoid(entry.design(x) @ coefficients)
    error = 5 * ((design.square() * (probability * (1 - probability))[:, None]).sum(0)).sqrt()
    score = design.mT @ (x[:, -1] - probability)
    assert (score.abs() <= error).all()
    assert not ((design.mT @ (x[:, -1] - torch.sigmoid(1.2 * design @ coefficients))).abs() <= error).all()
