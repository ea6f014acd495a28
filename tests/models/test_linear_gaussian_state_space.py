"""The state space entry: published figures, a dense joint normal, reductions, other libraries, EM, degenerate data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from contract import joint_trace
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.distributions.kl import kl_divergence

import elbozoo as ez
from elbozoo.inference.convergence import MONOTONE_SLACK
from elbozoo.inference.em import EMOptions, run_em
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.distributions.gaussian_chain import GaussianChain

NAME = "linear-gaussian-state-space"
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

NILE = ez.load_data("nile").x

# Structure and first state of every kind of model there is.
KINDS = pytest.mark.parametrize(
    ("structure", "initial"),
    [
        ("general", "stated"),
        ("general", "free"),
        ("local-level", "stated"),
        ("local-level", "free"),
        ("local-level", "diffuse"),
        ("local-linear-trend", "free"),
        ("local-linear-trend", "diffuse"),
    ],
)


def nile_at(noise: float, process: list[float], **options: Any) -> Entry:
    """Model of the Nile with the given variances."""
    entry = get_entry(NAME).from_data(NILE, **options)
    with torch.no_grad():
        entry._set_noise(torch.tensor([noise], dtype=torch.float64))
        entry._set_process(torch.diag(torch.tensor(process, dtype=torch.float64)) / entry.unit.square())
    return entry


def levels(entry: Entry, x: Tensor) -> tuple[Tensor, Tensor]:
    """Smoothed mean and variance (T, K) of level and slope of a table, in the data's units."""
    with torch.no_grad():
        posterior = entry.posterior(entry.arrange(x, entry.options))
        origin = torch.zeros(entry.states, dtype=x.dtype)
        origin[: entry.columns] = entry.loc
        return origin + entry.state_unit * posterior.mean[0], entry.state_unit.square() * posterior.variance[0]


def evidence(entry: Entry, x: Tensor = NILE) -> float:
    """Total log p(x) of a table."""
    with torch.no_grad():
        return float(entry.log_evidence(entry.arrange(x, entry.options)).sum())


def series(seed: int = 0) -> Tensor:
    """Three sequences of two wandering columns (3, 15, 3), of 15, 12 and 6 steps, with gaps."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(3, 15, 2, generator=generator, dtype=torch.float64)
    values = 5 + steps.cumsum(1) + 0.5 * torch.randn(3, 15, 2, generator=generator, dtype=torch.float64)
    values[0, 3:8] = values[1, 0] = values[2, 2, 1] = math.nan
    length = torch.tensor([15, 12, 6])
    real = torch.arange(15) < length[:, None]
    numbers = (real.flatten().cumsum(0).reshape(3, 15) * real).double()
    return torch.cat([numbers[..., None], values.masked_fill(~real[..., None], 0.0)], -1)


def entry_of(structure: str, initial: str, x: Tensor, **options: Any) -> Entry:
    """Entry at its starting values, which are not those of any maximum."""
    return get_entry(NAME).from_data(x, structure=structure, initial=initial, **options)


# Published figures ---------------------------------------------------------------------------------------------------


def test_the_nile_at_its_published_maximum() -> None:
    """Durbin & Koopman (2012), section 2.10: the maximum is at 15099 and 1469.1.

    There the exact diffuse log-likelihood is -632.5456 in Durbin & Koopman's convention and -633.4646 in statsmodels'
    (both to the four decimals given: 5e-5), and they differ by half of log 2π (1e-9).
    """
    durbin_koopman = evidence(nile_at(15099, [1469.1], structure="local-level"))
    statsmodels = evidence(nile_at(15099, [1469.1], structure="local-level", likelihood_convention="statsmodels"))
    assert durbin_koopman == pytest.approx(-632.5456, abs=5e-5)
    assert statsmodels == pytest.approx(-633.4646, abs=5e-5)
    assert durbin_koopman - statsmodels == pytest.approx(HALF_LOG_2PI, abs=1e-9)
    assert evidence(nile_at(15099, [2000], structure="local-level")) != pytest.approx(-632.5456, abs=5e-5)


def test_the_published_variances_of_the_nile_are_where_the_slope_vanishes() -> None:
    """The published figures are rounded to half a unit: slopes of 0.01 nats by the log variances leave room for it."""

    def slope(noise: float, process: float) -> float:
        ends = [
            (evidence(nile_at(noise * a, [process * b], structure="local-level")) for a, b in pair)
            for pair in ([(1.001, 1), (0.999, 1)], [(1, 1.001), (1, 0.999)])
        ]
        return max(abs(high - low) / 0.002 for high, low in ends)

    assert slope(15099, 1469.1) < 0.01
    assert slope(15300, 1469.1) > 0.01
    assert slope(15099, 1500) > 0.01


@pytest.mark.slow
def test_em_finds_the_published_maximum_of_the_nile() -> None:
    """To half a unit of the published variances; by direct maximisation of log p(x) too, which knows no E step."""
    fit = ez.fit(NAME, NILE, method="em", structure="local-level", tolerance=1e-12)
    assert fit.converged
    assert float(fit.entry.noise.detach()) == pytest.approx(15099, abs=1.0)
    assert float(fit.entry.innovation_variance.detach()) == pytest.approx(1469.1, abs=0.5)
    assert fit.log_evidence().value == pytest.approx(-632.5456, abs=5e-5)

    def loss(logs: np.ndarray) -> float:
        noise, process = np.exp(logs)
        return -evidence(nile_at(noise, [process], structure="local-level"))

    direct = minimize(loss, np.log([10_000, 1_000]), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    np.testing.assert_allclose(np.exp(direct.x), [15098.5, 1469.2], rtol=0, atol=0.5)
    assert fit.log_evidence().value == pytest.approx(-direct.fun, abs=1e-6)
    start = get_entry(NAME).from_data(NILE, structure="local-level")
    assert float(start.noise.detach()) != pytest.approx(15099, abs=1.0)
    assert evidence(start) < -632.5456 - 5e-5


# Another library -----------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize(("structure", "peer"), [("local-level", "local level"), ("local-linear-trend", "lltrend")])
@pytest.mark.parametrize("gaps", [False, True])
def test_evidence_and_smoother_agree_with_statsmodels(structure: str, peer: str, gaps: bool) -> None:
    """With the same stated first state and with the exact diffuse one: 1e-6 nats, and 1e-6 relative in the states."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    x = NILE.clone()
    if gaps:
        x[20:40] = math.nan
        x[0] = math.nan
    process = [1469.1, 10.0][: 1 if structure == "local-level" else 2]
    theirs = UnobservedComponents(x[:, 0].numpy(), peer, loglikelihood_burn=0)
    states = len(process)
    theirs.ssm.initialize_known(np.full(states, 900.0), 250.0**2 * np.eye(states))
    stated = {"initial": "stated", "initial_mean": 900.0, "initial_scale": 250.0}
    entry = nile_at(15099, process, structure=structure, **stated)
    parameters = [15099, *process]
    assert evidence(entry, x) == pytest.approx(theirs.loglike(parameters), abs=1e-6)
    assert evidence(entry, x + 1) != pytest.approx(theirs.loglike(parameters), abs=1e-6)
    smooth = theirs.smooth(parameters)
    mean, variance = levels(entry, x)
    np.testing.assert_allclose(mean, smooth.smoothed_state.T, rtol=1e-6)
    np.testing.assert_allclose(variance, np.diagonal(smooth.smoothed_state_cov), rtol=1e-6)

    theirs.ssm.initialize_diffuse()
    diffuse = nile_at(15099, process, structure=structure, likelihood_convention="statsmodels")
    assert evidence(diffuse, x) == pytest.approx(theirs.loglike(parameters), abs=1e-6)
    ours = nile_at(15099, process, structure=structure)
    assert evidence(ours, x) == pytest.approx(theirs.loglike(parameters) + states * HALF_LOG_2PI, abs=1e-6)
    assert evidence(ours, x) != pytest.approx(theirs.loglike(parameters), abs=1e-6)
    smooth = theirs.smooth(parameters)
    np.testing.assert_allclose(levels(ours, x)[0], smooth.smoothed_state.T, rtol=1e-6, atol=1e-6)
    forecast = ours.forecast(ours.arrange(x, ours.options), 5)
    peer_forecast = smooth.get_forecast(5)
    np.testing.assert_allclose(forecast.mean[0, :, 0], peer_forecast.predicted_mean, rtol=1e-6)
    np.testing.assert_allclose(forecast.variance[0, :, 0], peer_forecast.var_pred_mean, rtol=1e-6)


# Reductions and identities -------------------------------------------------------------------------------------------


def test_zero_dynamics_is_factor_analysis() -> None:
    """With A = 0, Q = I and z_1 ~ N(0, I), every step is a datum of factor analysis (1e-9 nats each)."""
    x = ez.load_data("wine-standardised").x[:60]
    factors = get_entry("factor-analysis").from_data(x, latent_dim=2)
    entry = get_entry(NAME).from_data(x, latent_dim=2)
    with torch.no_grad():
        entry.transition.zero_()
        entry.loading.copy_(factors.loading)
        entry.loc.copy_(factors.loc)
        entry._set_process(torch.eye(2, dtype=torch.float64))
        entry._set_noise(factors.variance)
        rows = entry.arrange(x, entry.options)
        truth, posterior = factors.log_evidence(x), factors.posterior(x)
        assert float(entry.log_evidence(rows)) == pytest.approx(float(truth.sum()), abs=1e-9 * len(x))
        chain = entry.posterior(rows)
        np.testing.assert_allclose(chain.mean[0], posterior.mean, rtol=0, atol=1e-9)
        np.testing.assert_allclose(chain.variance[0], posterior.variance, rtol=0, atol=1e-9)
        z = posterior.sample()
        assert float(chain.log_prob(z[None])) == pytest.approx(float(posterior.log_prob(z).sum()), abs=1e-9 * len(x))
        entry.transition.fill_diagonal_(0.1)
        assert float(entry.log_evidence(rows)) != pytest.approx(float(truth.sum()), abs=1e-9 * len(x))


@KINDS
def test_joint_minus_posterior_is_the_evidence_for_every_path(structure: str, initial: str) -> None:
    """log p(x, z) - log p(z given x) = log p(x) for each sequence, whatever z (1e-9 relative), flat priors included.

    With gaps and padding; values of z at padding count for nothing. The posterior of other data fails.
    """
    x = series()
    entry = entry_of(structure, initial, x)
    batch = Batch.full(x)
    with torch.no_grad():
        truth, posterior = entry.log_evidence(x), entry.posterior(x)
        for seed in range(3):
            shape = (*posterior.batch_shape, *posterior.event_shape)
            z = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            nodes = joint_trace(entry, batch, {"z": z}).nodes
            joint = nodes["z"]["log_prob"] + nodes["x"]["log_prob"]
            np.testing.assert_allclose(joint - posterior.log_prob(z), truth, rtol=1e-9)
            other = entry.posterior(torch.cat([x[..., :1], x[..., 1:] + 0.1], -1)).log_prob(z)
            assert ((joint - other - truth).abs() > 1e-9 * truth.abs()).all()


@KINDS
def test_draws_of_the_posterior_have_its_moments_and_entropy(structure: str, initial: str) -> None:
    """Means, variances and entropy from 4000 draws: |z| < 6, a false alarm in 2e-9 per number, 2e-7 in all."""
    x = series()
    with torch.no_grad():
        posterior = entry_of(structure, initial, x).posterior(x)
        draws = posterior.sample((4000,))
        real = (x[..., :1] > 0).expand_as(posterior.mean)
        assert bool((draws[:, ~real] == 0).all())
        error = (posterior.variance / 4000).sqrt()
        assert bool(((draws.mean(0) - posterior.mean).abs() <= 6 * error)[real].all())
        spread = posterior.variance * (2 / 4000) ** 0.5
        assert bool(((draws.var(0) - posterior.variance).abs() <= 6 * spread)[real].all())
        log_prob = posterior.log_prob(draws)
        error = log_prob.std(0) / 4000**0.5
        assert bool(((log_prob.mean(0) + posterior.entropy()).abs() <= 6 * error).all())
        # Negative control: the draws' neighbours are correlated, which independent draws of each step are not.
        shuffled = torch.stack([step[torch.randperm(4000)] for step in draws.unbind(2)], 2)
        assert bool((posterior.log_prob(shuffled).mean(0) < -posterior.entropy() - 6 * error)[0])


def test_expanded_posterior_is_the_same_for_every_particle() -> None:
    """As a plate of particles expands it; draws carry gradients to the parameters."""
    x = series()
    entry = entry_of("local-level", "diffuse", x)
    posterior = entry.posterior(x)
    wide = posterior.expand((4, 3))
    z = wide.rsample()
    assert z.shape == (4, 3, 15, 2)
    assert torch.equal(wide.mean, posterior.mean.expand(4, -1, -1, -1))
    np.testing.assert_allclose(wide.log_prob(z).detach(), posterior.log_prob(z).detach(), rtol=1e-12)
    (gradient,) = torch.autograd.grad(z.square().sum(), entry.noise_factor)
    assert bool((gradient != 0).all())


def test_prior_is_the_dense_normal_of_the_path() -> None:
    """log p(z) against SciPy's normal of all steps (1e-9), padding left out; draws have its covariance (|z| < 6)."""
    generator = torch.Generator().manual_seed(0)
    transition = 0.5 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
    start = torch.tensor([[1.0, 0.0], [0.3, 0.5]], dtype=torch.float64)
    process = torch.tensor([[0.7, 0.0], [-0.2, 0.4]], dtype=torch.float64)
    steps = torch.tensor([[True] * 4, [True, True, False, False]])
    chain = GaussianChain(torch.tensor([1.0, -1.0], dtype=torch.float64), start, transition, process, steps)
    maps = [torch.linalg.matrix_power(transition, t) for t in range(4)]
    mean = torch.cat([m @ chain.initial_mean for m in maps]).numpy()
    noises = torch.zeros(8, 8, dtype=torch.float64)
    for t in range(4):
        for s in range(t + 1):
            noises[2 * t : 2 * t + 2, 2 * s : 2 * s + 2] = maps[t - s] @ (start if s == 0 else process)
    covariance = (noises @ noises.mT).numpy()
    z = chain.sample((5000,))
    full = multivariate_normal(mean, covariance).logpdf(z[:5, 0].flatten(1))
    half = multivariate_normal(mean[:4], covariance[:4, :4]).logpdf(z[:5, 1, :2].flatten(1))
    np.testing.assert_allclose(chain.log_prob(z[:5]).T, [full, half], rtol=0, atol=1e-9)
    assert not np.allclose(chain.log_prob(z[:5] + 1e-3).T, [full, half], rtol=0, atol=1e-9)
    centred = z[:, 0].flatten(1).numpy() - mean
    products = centred[:, :, None] * centred[:, None, :]
    scores = (products.mean(0) - covariance) / (products.std(0) / 5000**0.5)
    assert np.abs(scores).max() < 6
    assert bool((z[:, 1, 2:] == 0).all())


def test_a_path_of_one_padded_batch_is_that_of_each_sequence_alone() -> None:
    """Evidence and smoothed means do not depend on what else is in the batch (1e-10)."""
    x = series()
    for structure, initial in [("general", "stated"), ("local-linear-trend", "diffuse")]:
        entry = entry_of(structure, initial, x)
        with torch.no_grad():
            together, means = entry.log_evidence(x), entry.posterior(x).mean
            for n, length in enumerate([15, 12, 6]):
                alone = x[n : n + 1, :length]
                np.testing.assert_allclose(entry.log_evidence(alone)[0], together[n], rtol=0, atol=1e-10)
                np.testing.assert_allclose(entry.posterior(alone).mean[0], means[n, :length], rtol=0, atol=1e-10)
                assert bool((means[n, length:] == 0).all())
            assert abs(float(entry.log_evidence(x[:1, :12])[0] - together[0])) > 1e-10


# Mean field ----------------------------------------------------------------------------------------------------------


@KINDS
def test_mean_field_gap_is_the_dense_precisions(structure: str, initial: str) -> None:
    """The best q with independent steps misses ½ (Σ log |J_tt| - log |J|) nats, J the dense precision (1e-8).

    J comes from second derivatives of the program's log joint, which know nothing of the filter. The divergence in
    closed form is that gap; with the marginal variances in place of the conditional ones it is larger.
    """
    x = series()[2:, :6]
    x = torch.cat([torch.arange(1.0, 7.0, dtype=torch.float64)[None, :, None], x[..., 1:]], -1)
    entry = entry_of(structure, initial, x)
    batch = Batch.full(x)
    with torch.no_grad():
        posterior = entry.posterior(x)
        best = posterior.factorised()
    shape = posterior.mean.shape

    def log_joint(z: Tensor) -> Tensor:
        return joint_trace(entry, batch, {"z": z.reshape(shape)}).log_prob_sum()

    precision = -torch.autograd.functional.hessian(log_joint, torch.zeros(shape.numel(), dtype=torch.float64))
    states = shape[-1]
    blocks = [precision[i : i + states, i : i + states] for i in range(0, len(precision), states)]
    gap = 0.5 * float(sum(torch.logdet(b) for b in blocks) - torch.logdet(precision))
    np.testing.assert_allclose(posterior.precision_blocks[0].detach(), torch.stack(blocks), rtol=1e-8, atol=1e-8)
    mask = x[..., 0] > 0
    with torch.no_grad():
        q = pyro.distributions.MultivariateNormal(best.mean, precision_matrix=best.precision_matrix)
        assert float(kl_divergence(q.mask(mask).to_event(1), posterior)) == pytest.approx(gap, abs=1e-8)
        wide = pyro.distributions.Normal(posterior.mean, posterior.variance.sqrt()).to_event(1)
        assert float(kl_divergence(wide.mask(mask).to_event(1), posterior)) > gap + 1e-8


@pytest.mark.slow
def test_the_ledger_of_a_mean_field_fit_finds_the_gap() -> None:
    """A fitted mean-field guide on the Nile: gap = KL within six standard errors, and its family's part in closed form.

    θ is learned too, so that the truth moves: the identity holds at the θ of the fit.
    """
    fit = ez.fit(NAME, NILE, guide="mean-field", structure="local-level", seed=0)
    ledger = fit.full_ledger()
    assert abs(ledger.gap - ledger.kl) <= 6 * math.hypot(ledger.elbo_se, ledger.kl_se) + 1e-7 * abs(ledger.log_evidence)
    assert 0 < ledger.approximation_gap <= ledger.gap + 6 * ledger.elbo_se
    assert ledger.elbo < ledger.log_evidence


# EM ------------------------------------------------------------------------------------------------------------------


@KINDS
def test_em_never_decreases_with_gaps_and_padding(structure: str, initial: str) -> None:
    """At any of 25 steps from 3 random starts (slack of the monitor: 1e-9 relative), and it gains."""
    x = series()
    for restart in range(3):
        entry = entry_of(structure, initial, x, seed=restart)
        entry.initialize(x, restart)
        run = run_em(entry, x, EMOptions(restarts=1, iterations=25), seed=restart, progress=False)
        history = run.trajectory.frame()["log_evidence"]
        assert (history.diff().dropna() >= -MONOTONE_SLACK * history.abs().iloc[1:].clip(lower=3)).all()
        assert history.iloc[-1] > history.iloc[0] + 1e-3


@pytest.mark.parametrize("initial", ["stated", "free"])
def test_where_em_ends_the_likelihood_has_no_slope(initial: str) -> None:
    """The gradient of log p(x) by autograd, which no M step enters, has fallen to a hundredth of the start's."""
    truth = get_entry(NAME).example(2, seed=3, latent_dim=1)
    x, _ = truth.simulate(20, seed=4)
    x[:, 3, 1] = math.nan
    entry = get_entry(NAME).from_data(x, latent_dim=1, initial=initial)

    def slope() -> float:
        gradient = torch.autograd.grad(entry.log_evidence(x).sum(), list(entry.parameters()))
        return math.sqrt(sum(float(g.square().sum()) for g in gradient))

    before = slope()
    run_em(entry, x, EMOptions(restarts=1, iterations=150, tolerance=1e-12), seed=0, progress=False)
    assert slope() < 0.01 * before


def test_sequences_of_one_step_leave_the_dynamics_alone() -> None:
    """They say nothing of how the state moves; the rest is learned and nothing is NaN."""
    x = ez.load_data("wine-standardised").x[:40, :4]
    entry = get_entry(NAME).from_data(torch.cat([torch.arange(40.0)[:, None].double(), x], 1), sequence=0, latent_dim=1)
    rows = torch.cat([torch.arange(1.0, 41.0).double()[:, None], x], 1)[:, None]
    before = entry.transition.clone()
    run = run_em(entry, rows, EMOptions(restarts=1, iterations=50), seed=0, progress=False)
    assert torch.equal(entry.transition, before)
    history = run.trajectory.frame()["log_evidence"]
    assert history.iloc[-1] > history.iloc[0] + 1


# Degenerate data -----------------------------------------------------------------------------------------------------


def test_missing_stretches_and_sequences_have_right_answers() -> None:
    """A sequence with nothing observed has evidence zero and the prior for a posterior; a stretch is interpolated.

    In a local level without observations between two, the smoothed mean is a straight line (1e-9 relative).
    """
    x = series()
    entry = entry_of("general", "stated", x)
    blank = torch.cat([x[..., :1], torch.full_like(x[..., 1:], math.nan)], -1)
    with torch.no_grad():
        np.testing.assert_allclose(entry.log_evidence(blank), 0.0, rtol=0, atol=1e-12)
        z = torch.randn(3, 15, 2, dtype=torch.float64)
        prior = entry.chain(x[..., 0] > 0)
        np.testing.assert_allclose(entry.posterior(blank).log_prob(z), prior.log_prob(z), rtol=1e-10)
        assert not np.allclose(entry.posterior(x).log_prob(z), prior.log_prob(z), rtol=1e-10)

    gap = NILE.clone()
    gap[20:40] = math.nan
    level = nile_at(15099, [1469.1], structure="local-level")
    mean, whole = levels(level, gap)[0][19:41, 0], levels(level, NILE)[0][19:41, 0]
    assert float(mean.diff().diff().abs().max()) < 1e-9 * float(mean.abs().max())
    assert float(whole.diff().diff().abs().max()) > 1


def test_a_forecast_is_the_posterior_of_steps_not_yet_seen() -> None:
    """Appending missing rows to the table and smoothing gives the same means and variances (1e-10 relative)."""
    entry = nile_at(15099, [1469.1, 10.0], structure="local-linear-trend")
    longer = torch.cat([NILE, torch.full((7, 1), math.nan, dtype=torch.float64)])
    with torch.no_grad():
        forecast = entry.forecast(entry.arrange(NILE, entry.options), 7)
        mean, variance = levels(entry, longer)
        np.testing.assert_allclose(forecast.mean[0, :, 0], mean[100:, 0], rtol=1e-10)
        np.testing.assert_allclose(forecast.variance[0, :, 0], variance[100:, 0] + 15099, rtol=1e-10)
        assert not np.allclose(forecast.mean[0, :, 0], mean[99, 0], rtol=1e-10)


def test_a_sequence_of_length_one_has_its_evidence() -> None:
    """Under a stated start it is one normal; under a flat one p(x) is the flat density itself (1e-12)."""
    x = torch.cat([NILE[:1], NILE[1:3]])
    key = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    table = torch.cat([key, x], 1)
    options = {"structure": "local-level", "sequence": 0}
    stated = get_entry(NAME).from_data(table, initial="stated", initial_mean=1000.0, initial_scale=50.0, **options)
    rows = stated.arrange(table, stated.options)
    with torch.no_grad():
        normal = multivariate_normal(1000.0, 2500 + float(stated.noise)).logpdf(1120.0)
        assert float(stated.log_evidence(rows)[0]) == pytest.approx(normal, abs=1e-12)
        flat = get_entry(NAME).from_data(table, **options)
        assert float(flat.log_evidence(rows)[0]) == pytest.approx(0.0, abs=1e-12)
        assert float(flat.loc + flat.unit * flat.posterior(rows).mean[0, 0, 0]) == pytest.approx(1120.0)
        other = get_entry(NAME).from_data(table, likelihood_convention="statsmodels", **options)
        assert float(other.log_evidence(rows)[0]) == pytest.approx(-HALF_LOG_2PI, abs=1e-12)
        assert float(flat.log_evidence(rows)[1]) != pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("empty column", {}, r"columns \[2\] .* hold no value"),
        ("constant column", {}, r"columns \[2\] .* are constant"),
        ("one row", {}, "are constant"),
        ("none", {"latent_dim": 100}, "found 100 for 100 steps"),
        ("none", {"initial": "diffuse"}, "found diffuse with structure=general"),
        ("short", {"structure": "local-linear-trend", "sequence": 1}, r"sequence 2, column 1 .* found 1 values"),
        ("none", {"initial": "stationary"}, "option initial: found 'stationary'"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(change: str, options: dict[str, Any], message: str) -> None:
    """And the same options on the data as they are, or the data with other options, are taken."""
    x = torch.cat([NILE, NILE.flip(0)], 1)
    if change == "empty column":
        x[:, 1] = math.nan
    elif change == "constant column":
        x[:, 1] = torch.where(torch.arange(100) < 50, 3.0, math.nan)
    elif change == "one row":
        x = x[:1]
    elif change == "short":
        x[:, 1] = (torch.arange(100) == 99).double()
    with pytest.raises(InvalidInput, match=message) as caught:
        get_entry(NAME).from_data(x, **options)
    assert "\n" not in str(caught.value)
    get_entry(NAME).from_data(torch.cat([NILE, NILE.flip(0)], 1))
