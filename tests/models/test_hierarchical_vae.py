"""The hierarchical VAE: the linear case against a dense joint normal, the others on a grid; layers and their guides."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from scipy.stats import multivariate_normal
from torch import Tensor

import elbozoo as ez
from elbozoo.guides import build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.guides.hierarchical import BottomUpGuide, LadderGuide
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.method import program_entry
from elbozoo.inference.objectives import resolve_objective
from elbozoo.inference.svi import TrainingOptions, run_svi
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.entry import capabilities
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.hierarchical_vae import HierarchicalVAE


def example(latent_dims: str = "3,2", **options: object) -> HierarchicalVAE:
    entry = HierarchicalVAE.example(columns=5, seed=1, hidden=8, latent_dims=latent_dims, **options).double()
    if entry.options.likelihood == "normal":
        with torch.no_grad():  # units of the columns that are not all the same
            entry.likelihood.location.copy_(torch.linspace(-3, 4, 5))
            entry.likelihood.unit.copy_(torch.linspace(0.5, 2, 5))
    return entry


def linear(latent_dims: str = "3,2") -> HierarchicalVAE:
    return example(latent_dims, decoder="linear", likelihood="normal")


def dense(entry: HierarchicalVAE) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (z_1, ..., z_L, x) from v = B v + c + noise: (I - B)⁻¹ S (I - B)⁻ᵀ, in NumPy."""
    sizes = [*entry.latent_dims, entry.columns]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    n, levels = starts[-1], len(entry.latent_dims)
    weights, constant, variance = np.zeros((n, n)), np.zeros(n), np.ones(n)

    def put(child: int, parent: int, weight: np.ndarray, bias: np.ndarray, scale: np.ndarray) -> None:
        rows = slice(starts[child], starts[child + 1])
        weights[rows, starts[parent] : starts[parent + 1]] = weight
        constant[rows], variance[rows] = bias, scale**2

    numbers = {name: value.detach().numpy() for name, value in entry.state_dict().items()}
    for level in range(levels - 1):
        mean = (numbers[f"layers.{level}.mean.weight"], numbers[f"layers.{level}.mean.bias"])
        put(level, level + 1, *mean, np.exp(numbers[f"layers.{level}.log_scale"]))
    unit, location = numbers["likelihood.unit"], numbers["likelihood.location"]
    noise = entry.options.noise_floor + np.exp(numbers["likelihood.log_excess"])
    bias = location + unit * numbers["decoder.bias"]
    put(levels, 0, unit[:, None] * numbers["decoder.weight"], bias, unit * noise)
    inverse = np.linalg.inv(np.eye(n) - weights)
    return inverse @ constant, inverse @ np.diag(variance) @ inverse.T


def dense_posterior(entry: HierarchicalVAE, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (z_1, ..., z_L) given ``row``."""
    mean, covariance = dense(entry)
    k = sum(entry.latent_dims)
    gain = covariance[:k, k:] @ np.linalg.inv(covariance[k:, k:])
    return mean[:k] + gain @ (row - mean[k:]), covariance[:k, :k] - gain @ covariance[k:, :k]


def test_is_in_the_registry_and_knows_when_it_has_an_oracle() -> None:
    assert get_entry("hierarchical-vae") is HierarchicalVAE
    assert {"oracle", "posterior"} <= set(capabilities(linear()))
    for options in ({}, {"decoder": "linear"}, {"likelihood": "normal"}):
        assert not {"oracle", "posterior"} & set(capabilities(example(**options)))


@pytest.mark.parametrize("latent_dims", ["1,1", "3,2", "2,3", "4,2,1"])
def test_linear_evidence_is_that_of_the_dense_joint_normal(latent_dims: str) -> None:
    """To 1e-9 nats per datum (rounding of two factorisations); another scale of a layer is further away."""
    entry = linear(latent_dims)
    x, _ = entry.simulate(9, seed=2)
    mean, covariance = dense(entry)
    k = sum(entry.latent_dims)
    truth = multivariate_normal(mean[k:], covariance[k:, k:]).logpdf(x.numpy())
    with torch.no_grad():
        assert np.abs(entry.log_evidence(x).numpy() - truth).max() <= 1e-9
        entry.layers[0].log_scale += 0.01
        assert np.abs(entry.log_evidence(x).numpy() - truth).max() > 1e-9


@pytest.mark.parametrize("latent_dims", ["1,1", "3,2", "2,3", "4,2,1"])
def test_linear_posterior_from_the_bottom_up_is_the_dense_one(latent_dims: str) -> None:
    """Log density of all layers together at draws of the prior, 1e-8 absolute; at another row it is another."""
    entry = linear(latent_dims)
    x, values = entry.simulate(6, seed=2)
    assert isinstance(values, dict)
    names = [f"z{level + 1}" for level in range(len(entry.latent_dims))]
    together = torch.cat([values[name] for name in names], -1).numpy()
    with torch.no_grad():
        found = entry.posterior(x).log_prob(values).numpy()
    truth = [multivariate_normal(*dense_posterior(entry, x[i].numpy())).logpdf(together[i]) for i in range(6)]
    wrong = [multivariate_normal(*dense_posterior(entry, x[i - 1].numpy())).logpdf(together[i]) for i in range(6)]
    assert np.abs(found - truth).max() <= 1e-8 * (1 + np.abs(truth).max())
    assert np.abs(found - wrong).max() > 1e-3


def test_exact_guide_of_the_linear_case_has_no_gap_and_a_copy_keeps_its_own_methods() -> None:
    """ELBO - log p(x) to 1e-9 relative; the methods of a copy follow the copy's parameters."""
    entry = linear()
    x, _ = entry.simulate(8, seed=3)
    guide = build_guide("exact", entry, x)
    elbo = importance_weights(entry, guide, Batch.full(x), 50, seed=0).elbo().sum(-1)
    truth = float(entry.log_evidence(x).sum().detach())
    assert float((elbo - truth).abs().max()) <= 1e-9 * abs(truth)
    other = copy.deepcopy(entry)
    with torch.no_grad():
        other.decoder.weight *= 1.1
    assert float(other.log_evidence(x).sum().detach()) != pytest.approx(truth, rel=1e-6)
    assert float(entry.log_evidence(x).sum().detach()) == truth
    wrong = importance_weights(other, guide, Batch.full(x), 50, seed=0).elbo().sum(-1)
    assert float((wrong - truth).abs().max()) > 1e-9 * abs(truth)


def test_layers_above_the_first_add_nothing_to_factor_analysis() -> None:
    """With z_1's mean and Cholesky factor in the loading, factor analysis has the same evidence (1e-9 per datum)."""
    entry = linear("3,2")
    x, _ = entry.simulate(40, seed=2)
    mean, covariance = dense(entry)
    peer = get_entry("factor-analysis").from_data(x, latent_dim=3)
    with torch.no_grad():
        weight = entry.likelihood.unit.numpy()[:, None] * entry.decoder.weight.numpy()
        peer.loc.copy_(torch.from_numpy(mean[5:]))
        peer.loading.copy_(torch.from_numpy(weight @ np.linalg.cholesky(covariance[:3, :3])))
        peer._set_variance((entry.likelihood.unit * entry.likelihood.noise_scale).square())
        # The floor of factor analysis is 1e-6 of a column's variance.
        assert (entry.log_evidence(x) - peer.log_evidence(x)).abs().max() <= 1e-9
        peer.loading.copy_(torch.from_numpy(weight))
        assert (entry.log_evidence(x) - peer.log_evidence(x)).abs().max() > 1e-3


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_evidence_of_two_small_layers_is_their_integral(likelihood: str) -> None:
    """Quadrature over (z_1, z_2) equals a grid over z_2 and the standardised rest of z_1, to 1e-4 nats per datum."""
    entry = example("1,1", likelihood=likelihood)
    if likelihood == "normal":
        entry.likelihood.set_noise_scale(0.6)
    x, _ = entry.simulate(5, seed=3)
    axis = np.linspace(-8, 8, 401)
    grid = torch.from_numpy(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    with torch.no_grad():
        mean, scale = entry.layers[0](grid[:, :1])
        centre = entry.decode(mean + scale * grid[:, 1:])
        rows = x[:, None]
        if likelihood == "bernoulli":
            terms = rows * centre.log() + (1 - rows) * (1 - centre).log()
        else:
            noise = entry.likelihood.unit * entry.likelihood.noise_scale
            terms = -0.5 * ((rows - centre) / noise).square() - noise.log() - 0.5 * math.log(2 * math.pi)
    weight = -0.5 * grid.square().sum(-1) - math.log(2 * math.pi) + 2 * math.log(axis[1] - axis[0])
    expected = (terms.sum(-1) + weight).logsumexp(-1)
    evidence = log_evidence(entry, x)
    assert evidence is not None and evidence.kind == "quadrature" and evidence.per_datum is not None
    assert (evidence.per_datum - expected).abs().max() <= 1e-4
    assert (evidence.per_datum - expected.roll(1)).abs().max() > 1e-4


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_log_likelihood_is_that_of_the_program(likelihood: str) -> None:
    """Of row n at the n-th draw of all layers, 1e-11 relative; of another draw it is another."""
    entry = example("3,2", likelihood=likelihood)
    x, values = entry.simulate(7, seed=2)
    assert isinstance(values, dict)
    found = entry.log_likelihood(x, torch.cat([values[site.name] for site in entry.latent_sites()], -1))
    with isolated(0):
        trace = poutine.trace(poutine.condition(entry, values)).get_trace(Batch.full(x))
    trace.compute_log_prob()
    traced = trace.nodes["x"]["unscaled_log_prob"]
    assert found.shape == (7, 7)
    assert (found.diagonal() - traced).abs().max() < 1e-11 * traced.abs().max()
    assert (found.roll(1, 0).diagonal() - traced).abs().max() > 1e-3


def test_latents_may_carry_a_particle_dimension_and_sites_are_named_from_the_bottom() -> None:
    entry = example("4,2,1")
    x, values = entry.simulate(4, seed=0)
    assert isinstance(values, dict)
    assert {name: tuple(value.shape) for name, value in values.items()} == {"z3": (4, 1), "z2": (4, 2), "z1": (4, 4)}
    particles = {name: value.expand(3, *value.shape) for name, value in values.items()}
    with isolated(0):
        trace = poutine.trace(poutine.condition(entry, particles)).get_trace(Batch.full(x))
    trace.compute_log_prob()
    assert trace.nodes["x"]["unscaled_log_prob"].shape == (3, 4)


def fitted_guide(entry: HierarchicalVAE, guide: object, x: Tensor, steps: int) -> float:
    """Train q alone, θ fixed, and return its ELBO per datum."""
    for parameter in entry.parameters():
        parameter.requires_grad_(False)
    options = TrainingOptions(steps=steps, learning_rate=0.05, schedule="cosine", particles=5)
    with isolated(0):
        run_svi(entry, guide, resolve_objective("elbo", guide), Batch.full(x), options, progress=False)  # type: ignore[arg-type]
    return float(importance_weights(entry, guide, Batch.full(x), 500, seed=1).elbo().mean())  # type: ignore[arg-type]


def test_bottom_up_inference_contains_the_linear_posterior_and_a_product_does_not() -> None:
    """q(z_1 given x) q(z_2 given z_1) reaches log p(x) within 0.02 nats per datum, with linear encoders.

    Layers independent under q stay below by ½ (Σ log P_ii - log det P), P the precision of the dense posterior, which
    is what the layers tell about each other. Errors: 500 draws on 60 rows, and the encoders' last steps.
    """
    entry = linear("1,1")
    with torch.no_grad():
        entry.layers[0].mean.weight.fill_(1.0)
        entry.decoder.weight *= 0.4
    # Layers close to each other and far from the data know much about each other.
    entry.layers[0].set_scale(0.5)
    entry.likelihood.set_noise_scale(0.99)
    x, _ = entry.simulate(60, seed=4)
    truth = float(entry.log_evidence(x).mean().detach())
    precision = np.linalg.inv(dense_posterior(entry, x[0].numpy())[1])
    gap = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    options = GuideOptions(encoder="linear")
    with isolated(0):
        upward = BottomUpGuide(entry, entry.latent_sites(x), x, options).double()
        product = build_guide("amortized-diagonal-normal", entry, x, options).double()
    assert gap > 0.1
    assert truth - 0.02 <= fitted_guide(entry, upward, x, 300) <= truth + 0.01
    assert abs(fitted_guide(entry, product, x, 300) - (truth - gap)) <= 0.02


def test_bottom_up_samples_every_layer_and_says_whom_it_serves() -> None:
    """Sites, shapes and means as the contract asks; one layer, or finite or global latents, are refused."""
    entry = example("4,2,1")
    x, _ = entry.simulate(6, seed=0)
    sites = entry.latent_sites(x)
    assert BottomUpGuide.refusal(entry, sites) is None
    guide = BottomUpGuide(entry, sites, x, GuideOptions()).double()
    with isolated(0), torch.no_grad():
        trace = poutine.trace(guide).get_trace(Batch.full(x))
        assert guide.means(Batch.full(x)).shape == (6, 7)
    assert {site.name: trace.nodes[site.name]["value"].shape[1:] for site in sites} == {
        site.name: site.event_shape for site in sites
    }
    weights = importance_weights(entry, guide, Batch.full(x), 20, seed=0)
    assert weights.log_weight.shape == (1, 20, 6) and torch.isfinite(weights.log_weight).all()
    for name, reason in (("vae", "one layer"), ("normal-gamma", "whole data set"), ("gaussian-mixture", "3 values")):
        other = get_entry(name).example()
        assert reason in str(BottomUpGuide.refusal(other, other.latent_sites()))


def ladder_case() -> HierarchicalVAE:
    """Two layers of 2 and 1 whose likelihoods p(x given z_l) have diagonal precision, and whose bottom layer is tied.

    The columns of the decoder are orthogonal in units of the noise, which is what makes it so; the bottom layer's two
    numbers depend on each other through the one above.
    """
    entry = linear("2,1")
    with torch.no_grad():
        orthogonal = torch.linalg.qr(entry.decoder.weight)[0]
        entry.decoder.weight.copy_(orthogonal * torch.tensor([0.9, 0.6]))
        entry.layers[0].mean.weight.copy_(torch.tensor([[1.2], [-0.9]]))
        entry.layers[0].log_scale.copy_(torch.tensor([-0.7, -0.3]))
    entry.likelihood.set_noise_scale(0.8)
    return entry


def likelihoods_of_layers(entry: HierarchicalVAE) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each layer, the bottom first: A, m and covariance S of x given z_l ~ N(A z_l + m, S), in NumPy."""
    numbers = {name: value.detach().numpy() for name, value in entry.state_dict().items()}
    unit, location = numbers["likelihood.unit"], numbers["likelihood.location"]
    noise = unit * (entry.options.noise_floor + np.exp(numbers["likelihood.log_excess"]))
    gain, centre = unit[:, None] * numbers["decoder.weight"], location + unit * numbers["decoder.bias"]
    covariance = np.diag(noise**2)
    found = [(gain, centre, covariance)]
    for level in range(len(entry.latent_dims) - 1):
        scale = np.exp(numbers[f"layers.{level}.log_scale"])
        covariance = covariance + gain @ np.diag(scale**2) @ gain.T
        centre = centre + gain @ numbers[f"layers.{level}.mean.bias"]
        gain = gain @ numbers[f"layers.{level}.mean.weight"]
        found.append((gain, centre, covariance))
    return found


def set_linear(head: torch.nn.Module, weight: np.ndarray, bias: np.ndarray, variance: np.ndarray) -> None:
    """Let an encoder's last layer give N(weight h + bias, variance) at its input h."""
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(np.concatenate([weight, np.zeros_like(weight)])))
        head.bias.copy_(torch.from_numpy(np.concatenate([bias, 0.5 * np.log(variance)])))


def exact_ladder(entry: HierarchicalVAE, x: Tensor) -> LadderGuide:
    """The ladder with linear encoders, each set to the likelihood of its layer by dense algebra."""
    guide = LadderGuide(entry, entry.latent_sites(x), x, GuideOptions(encoder="linear")).double()
    mean, scale = guide.bottom.mean.numpy(), guide.bottom.scale.numpy()
    heads = [guide.bottom.network[-1], *(network[-1] for network in guide.above)]
    for head, (gain, centre, covariance) in zip(heads, likelihoods_of_layers(entry), strict=True):
        solved = np.linalg.solve(covariance, gain)
        precision = gain.T @ solved
        assert np.abs(precision - np.diag(np.diag(precision))).max() < 1e-6 * precision.max()
        slope = np.linalg.solve(precision, solved.T)
        set_linear(head, slope * scale, slope @ (mean - centre), 1 / np.diag(precision))
    return guide


def test_ladder_contains_the_linear_posterior_where_bottom_up_does_not() -> None:
    """With the encoders at the layers' likelihoods every weight is p(x), 1e-6 nats per datum (an orthogonal basis that
    was rounded to float32).

    q from the bottom up, at its best, stays below by ½ (Σ log P_ii - log det P), P the precision of p(z_1 given x):
    within 5 standard errors (6e-7). Negative control: one encoder a hundredth off.
    """
    entry = ladder_case()
    x, _ = entry.simulate(40, seed=4)
    truth = entry.log_evidence(x).detach()
    guide = exact_ladder(entry, x)
    elbo = importance_weights(entry, guide, Batch.full(x), 30, seed=0).elbo()
    assert (elbo - truth).abs().max() <= 1e-6

    mean, covariance = dense(entry)
    gain = covariance[:2, 3:] @ np.linalg.inv(covariance[3:, 3:])
    posterior = covariance[:2, :2] - gain @ covariance[3:, :2]
    precision = np.linalg.inv(posterior)
    upward = BottomUpGuide(entry, entry.latent_sites(x), x, GuideOptions(encoder="linear")).double()
    bottom = upward.bottom
    bias = mean[:2] + gain @ (bottom.mean.numpy() - mean[3:])
    set_linear(bottom.network[-1], gain * bottom.scale.numpy(), bias, 1 / np.diag(precision))
    above = covariance[2:3, :2] @ np.linalg.inv(covariance[:2, :2])
    rest = covariance[2:3, 2:3] - above @ covariance[:2, 2:3]
    set_linear(upward.above[0][-1], above, mean[2:3] - above @ mean[:2], np.diag(rest))
    gap = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    assert gap > 0.05
    draws = importance_weights(entry, upward, Batch.full(x), 400, seed=0).elbo().mean(1)
    error = float(draws.std() / math.sqrt(len(draws)))
    assert abs(float(draws.mean()) - (float(truth.mean()) - gap)) <= 5 * error < gap / 5
    with torch.no_grad():
        guide.above[0][-1].bias += 0.01
    assert (importance_weights(entry, guide, Batch.full(x), 30, seed=0).elbo() - truth).abs().max() > 1e-4


def test_ladder_multiplies_the_likelihood_of_a_layer_by_the_models_own_normal() -> None:
    """q of each layer is the normalised product of two normals on a grid in NumPy, 1e-6; with another θ it is not."""
    entry = example("1,1", likelihood="normal")
    x, _ = entry.simulate(3, seed=1)
    with isolated(0), torch.no_grad():
        guide = LadderGuide(entry, entry.latent_sites(x), x, GuideOptions(hidden=4, initial_scale=0.7)).double()
        above = torch.tensor([[0.3], [-1.0], [2.0]], dtype=torch.float64)
        q = guide.conditionals(Batch.full(x))["z1"]({"z2": above})  # type: ignore[operator]
        parameters = guide._upward(Batch.full(x))[0].numpy()
        mean, scale = (value.numpy() for value in entry.layers[0](above))
    grid = np.linspace(-12, 12, 48_001)

    def product(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        terms = -0.5 * ((grid - parameters[:, :1]) / np.exp(parameters[:, 1:])) ** 2
        density = np.exp(terms - 0.5 * ((grid - mean) / scale) ** 2)
        density /= density.sum(1, keepdims=True)
        centre = (density * grid).sum(1)
        return centre, (density * grid**2).sum(1) - centre**2

    centre, variance = product(mean)
    assert np.abs(q.mean[:, 0].numpy() - centre).max() <= 1e-6
    assert np.abs(q.variance[:, 0].numpy() - variance).max() <= 1e-6
    assert np.abs(q.mean[:, 0].numpy() - product(mean + 0.1)[0]).max() > 1e-3


def test_ladder_draws_from_the_top_in_minibatches_and_says_whom_it_serves() -> None:
    """Sites, shapes, particles; a minibatch has the q of its rows; θ moves q; programs without a hook are refused."""
    entry = example("4,2,1")
    x, _ = entry.simulate(6, seed=0)
    sites = entry.latent_sites(x)
    assert LadderGuide.refusal(entry, sites) is None
    with isolated(0):
        guide = LadderGuide(entry, sites, x, GuideOptions(hidden=8)).double()
    with isolated(0), torch.no_grad():
        nodes = poutine.trace(guide).get_trace(Batch.full(x)).nodes
        assert [name for name in nodes if name.startswith("z")] == ["z3", "z2", "z1"]
        assert guide.means(Batch.full(x)).shape == (6, 7)
        whole = guide.conditionals(Batch.full(x))["z3"].mean  # type: ignore[union-attr]
        part = guide.conditionals(Batch(x[2:4], torch.arange(2, 4), 6))["z3"].mean  # type: ignore[union-attr]
    assert torch.equal(whole[2:4], part) and not torch.equal(whole[:2], part)
    weights = importance_weights(entry, guide, Batch.full(x), 20, seed=0)
    assert weights.log_weight.shape == (1, 20, 6) and torch.isfinite(weights.log_weight).all()
    above = {"z3": torch.ones(5, 6, 1, dtype=torch.float64)}
    mean = guide.conditionals(Batch.full(x))["z2"](above).mean  # type: ignore[operator]
    slope = torch.autograd.grad(mean.sum(), entry.layers[1].network[-1].bias)
    assert slope[0].abs().max() > 0
    options = TrainingOptions(steps=5, batch_size=2, particles=3)
    with isolated(0):
        result = run_svi(entry, guide, resolve_objective("elbo", guide), Batch.full(x), options, progress=False)
    assert np.isfinite(result.trajectory.frame()["elbo"]).all()
    for name, reason in (("vae", "one layer"), ("normal-gamma", "whole data set"), ("gaussian-mixture", "3 values")):
        other = get_entry(name).example()
        assert reason in str(LadderGuide.refusal(other, other.latent_sites()))

    def chain(batch: Batch) -> None:
        with pyro.plate("data", batch.total, subsample=batch.index):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=batch.x)

    program = program_entry(chain, torch.zeros(4, 1))
    assert "by a method prior_of" in str(LadderGuide.refusal(program, program.latent_sites(torch.zeros(4, 1))))


@pytest.mark.slow
def test_linear_layers_learned_by_svi_reach_ppca_and_no_more() -> None:
    """On standardised wine the evidence ends within 0.02 nats per datum of PPCA's maximum with K = 3, not above it.

    The bound of the mean-field guide stays below it by what the layers tell about each other.
    """
    x = ez.load_data("wine-standardised").x
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True)))[::-1]
    log_determinant = np.log(eigenvalues[:3]).sum() + 10 * math.log(eigenvalues[3:].mean())
    truth = -0.5 * (13 * math.log(2 * math.pi) + log_determinant + 13)
    options = {"decoder": "linear", "likelihood": "normal", "latent_dims": "3,2", "encoder": "linear"}
    fit = ez.fit("hierarchical-vae", x, guide="amortized", learning_rate=0.02, **options)
    per_row = fit.log_evidence().value / len(x)
    assert fit.log_evidence().kind == "exact"
    # Units are stored in float32 while fitting: 1e-5 nats.
    assert truth - 0.02 <= per_row <= truth + 1e-5
    assert fit.elbo() / len(x) <= per_row + 1e-3
    early = ez.fit("hierarchical-vae", x, guide="amortized", steps=20, **options)
    assert early.log_evidence().value / len(x) < truth - 0.02


@pytest.mark.slow
def test_ladder_needs_warm_up_and_then_uses_its_layers() -> None:
    """On 500 binary digits with layers of 8 and 4: without warm-up the top layer never wakes, at a cost of a nat.

    That is section 3 of Sønderby et al.; the ELBO is that at β = 1, 100 draws of 500 rows, standard error below 0.01.
    """
    x = ez.load_data("digits-binary").x[:500]
    options = {"latent_dims": "8,4", "hidden": 32, "schedule": "cosine", "particles": 1, "steps": 600}
    cold = ez.fit("hierarchical-vae", x, guide="ladder", **options)
    warm = ez.fit(
        "hierarchical-vae", x, guide="ladder", objective="beta", kl_schedule="annealed", kl_steps=300, **options
    )

    def elbo(fit: ez.Fit) -> float:
        return float(importance_weights(fit.entry, fit.guide, Batch.full(x), 100, seed=1).elbo().mean())

    def spread_of_prior(fit: ez.Fit) -> float:
        """Standard deviation, over draws of the top layer, of the mean of the bottom one: zero where it is asleep."""
        top = {"z2": torch.randn(500, 4, dtype=torch.float64)}
        with torch.no_grad():
            return float(fit.entry.prior_of("z1", top).mean.std(0).mean())

    assert elbo(warm) > elbo(cold) + 1
    assert spread_of_prior(warm) > 0.3 > spread_of_prior(cold)


@pytest.mark.slow
def test_two_layers_on_digits_stay_below_their_evidence_and_learn() -> None:
    """On 600 binary digits with layers of one dimension each, whose evidence quadrature knows."""
    x = ez.load_data("digits-binary").x[:600]
    options = {"latent_dims": "1,1", "hidden": 32, "schedule": "cosine"}
    fit = ez.fit("hierarchical-vae", x, guide="amortized", steps=1200, **options)
    early = ez.fit("hierarchical-vae", x, guide="amortized", steps=30, **options)
    evidence, before = fit.log_evidence(), early.log_evidence()
    assert evidence.kind == "quadrature"
    assert fit.elbo() <= evidence.value + 6 * evidence.standard_error + 0.01 * len(x)
    # An untrained decoder is that of independent pixels; the latents are worth more than three nats per image.
    assert evidence.value - before.value > 3 * len(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dims": "3"}, "option latent_dims: found '3', expected at least two whole numbers"),
        ({"latent_dims": "3,0"}, "found '3,0'"),
        ({"latent_dims": "3,two"}, "found '3,two'"),
        ({"latent_dims": "7,2"}, "found 7 at the bottom for 9 rows x 6 columns, expected at most 6"),
        ({"decoder": "cubic"}, r"option decoder: found 'cubic', expected mlp \| linear"),
        ({"likelihood": "bernoulli"}, "likelihood=bernoulli: found .* in column 1, row 1"),
    ],
)
def test_bad_input_gets_one_line(options: dict[str, object], message: str) -> None:
    x = torch.randn(9, 6).double()
    with pytest.raises(InvalidInput, match=message) as caught:
        HierarchicalVAE.from_data(x, **{"likelihood": "normal", **options})
    assert "\n" not in str(caught.value)
    HierarchicalVAE.from_data(x, likelihood="normal", latent_dims=" 6, 3,3")
