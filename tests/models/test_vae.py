"""The VAE: likelihoods of all pairs, starting values, bad data, simulation, gradients."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from sklearn.datasets import load_wine
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import capabilities
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.registry import get_entry
from elbozoo.models.vae import VAE

LIKELIHOODS = ["bernoulli", "normal"]
ACTIVATIONS = ["tanh", "relu", "softplus"]
Z_BOUND = 5.0  # a two-sided false alarm of 6e-7 per number compared


def example(**options: object) -> VAE:
    return VAE.example(hidden=8, seed=1, **options).double()


def traced_log_likelihood(entry: VAE, x: Tensor, z: Tensor) -> Tensor:
    """Log p(x_n given z_g) of every pair, (N, G), one traced program per latent value."""
    columns = []
    for value in z:
        fixed = poutine.condition(entry, {"z": value.expand(len(x), -1)})
        with isolated(0):
            node = poutine.trace(fixed).get_trace(Batch.full(x)).nodes["x"]
        columns.append(node["fn"].log_prob(node["value"]))
    return torch.stack(columns, -1)


def test_is_in_the_registry() -> None:
    assert get_entry("vae") is VAE
    assert "quadrature" in capabilities(VAE.example())
    assert "quadrature" not in capabilities(VAE.example(latent_dim=3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_log_likelihood_is_that_of_the_program(likelihood: str, activation: str) -> None:
    entry = example(likelihood=likelihood, activation=activation)
    x, _ = entry.simulate(6, seed=2)
    z = torch.randn(5, 2, dtype=torch.float64)
    traced = traced_log_likelihood(entry, x, z)
    found = entry.log_likelihood(x, z)
    assert found.shape == (6, 5)
    assert (found - traced).abs().max() < 1e-11 * traced.abs().max()
    assert (entry.log_likelihood(x, z.flip(0)) - traced).abs().max() > 0.1  # negative control


def test_log_likelihood_of_sharp_noise_far_from_zero_does_not_cancel() -> None:
    entry = example(likelihood="normal", noise_floor=1e-4)
    with torch.no_grad():
        entry.noise_scale = torch.tensor(2e-4, dtype=torch.float64)
    x, z = entry.simulate(6, seed=2)
    with torch.no_grad():
        entry.decoder[2].bias += 1e4
    moved = x + 1e4
    direct = dist.Normal(entry.decode(z), entry.unit * entry.noise_scale).log_prob(moved[:, None]).sum(-1)
    error = (entry.log_likelihood(moved, z) - direct).abs() / direct.abs()
    assert error.max() < 1e-9
    y = moved[:, None] / entry.unit
    uncentred = y.square().sum(-1) + entry.decoder(z).square().sum(-1) - 2 * (y[:, 0] @ entry.decoder(z).mT)
    centred = (y - entry.decoder(z)).square().sum(-1)
    assert ((uncentred - centred).abs() / centred).max() > 1e-9  # negative control: without centring digits are lost


def test_decode_is_the_mean_of_the_program() -> None:
    for likelihood in LIKELIHOODS:
        entry = example(likelihood=likelihood)
        with torch.no_grad():
            entry.decoder[2].weight *= 0.3  # no probability so near 0 or 1 that its count is far from normal
        z = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
        draws = 20_000
        with isolated(3), torch.no_grad(), pyro.validation_enabled(False):
            fixed = poutine.condition(poutine.uncondition(entry), {"z": z.expand(draws, -1)})
            x = poutine.trace(fixed).get_trace(Batch.full(torch.zeros(draws, 8).double())).nodes["x"]["value"]
        standard_error = x.std(0) / math.sqrt(draws)
        assert ((x.mean(0) - entry.decode(z)[0]).abs() < Z_BOUND * standard_error).all()
        assert ((x.mean(0) - entry.decode(-z)[0]).abs() > Z_BOUND * standard_error).any()  # negative control


def test_latents_may_carry_a_particle_dimension() -> None:
    entry = example()
    x, _ = entry.simulate(4, seed=0)
    with isolated(0), pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(entry).get_trace(Batch.full(x))
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (3, 4, 2)
    assert trace.nodes["x"]["log_prob"].shape == (3, 4)


def test_starts_at_the_mean_of_binary_columns() -> None:
    x = (torch.rand(400, 6, dtype=torch.float64) < torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0, 0.0])).double()
    entry = VAE.from_data(x)
    start = entry.decoder[2].bias.sigmoid().double()
    assert (start - x.mean(0)).abs().max() < 1.5e-3  # the last two columns are constant: half a count away
    assert start.max() < 1
    assert start.min() > 0


def test_raw_columns_of_any_unit_start_at_the_same_footing() -> None:
    x = torch.tensor(load_wine().data)
    entry = VAE.from_data(x, likelihood="normal").double()
    _, z = entry.simulate(2000, seed=0)
    assert x.std(0).max() / x.std(0).min() > 1000
    residual = (x - entry.decode(z).mean(0)).square().mean(0).sqrt() / x.std(0)
    assert ((residual > 0.7) & (residual < 1.5)).all()
    standardised = VAE.from_data((x - x.mean(0)) / x.std(0, correction=0), likelihood="normal").double()
    zs = torch.randn(4, 2, dtype=torch.float64)
    jacobian = x.std(0, correction=0).log().sum()
    expected = standardised.log_likelihood((x - x.mean(0)) / x.std(0, correction=0), zs) - jacobian
    assert (entry.log_likelihood(x, zs) - expected).abs().max() < 1e-3  # the buffers of both were rounded to float32


def test_constant_columns_have_the_unit_one() -> None:
    x = torch.cat([torch.randn(50, 2), torch.full((50, 1), 0.1)], 1).double()
    entry = VAE.from_data(x, likelihood="normal")
    assert entry.unit[2] == 1
    assert entry.log_likelihood(x.float(), torch.zeros(1, 2)).isfinite().all()


def test_restarts_differ_and_seeds_repeat() -> None:
    x, _ = VAE.example().simulate(50, seed=0)
    first, again, other = (VAE.from_data(x, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.decoder[0].weight, again.decoder[0].weight)
    assert not torch.equal(first.decoder[0].weight, other.decoder[0].weight)
    before = first.decoder[0].weight.clone()
    first.initialize(x, restart=1)
    assert not torch.equal(first.decoder[0].weight, before)


def test_noise_scale_stays_above_its_floor() -> None:
    entry = VAE.example(likelihood="normal", noise_floor=0.05)
    with torch.no_grad():
        entry.noise_scale_unconstrained.fill_(-80.0)
    assert entry.noise_scale.item() == pytest.approx(0.05, rel=1e-6)
    assert VAE.example(likelihood="normal", noise_floor=0.9).noise_scale > 0.9


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_simulates_structured_rows_and_repeats_a_seed(likelihood: str) -> None:
    entry = VAE.example(likelihood=likelihood, columns=7)
    x, z = entry.simulate(500, seed=4)
    assert x.shape == (500, 7)
    assert z.shape == (500, 2)
    assert x.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip((x, z), entry.simulate(500, seed=4), strict=True))
    assert not torch.equal(x, entry.simulate(500, seed=5)[0])
    if likelihood == "bernoulli":
        assert ((x == 0) | (x == 1)).all()
    largest = torch.linalg.eigvalsh(torch.corrcoef(x.mT))[-1]
    shuffled = torch.stack([column[torch.randperm(500)] for column in x.mT])
    assert largest > 1.7
    assert torch.linalg.eigvalsh(torch.corrcoef(shuffled))[-1] < 1.5  # negative control: no structure left


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradients_agree_with_finite_differences(likelihood: str) -> None:
    entry = example(likelihood=likelihood)
    x, _ = entry.simulate(5, seed=0)
    z = torch.randn(4, 2, dtype=torch.float64)
    parameters = list(entry.parameters())

    def objective() -> Tensor:
        return entry.log_likelihood(x, z).logsumexp(-1).sum()

    direction = [torch.randn_like(p) for p in parameters]
    gradient = torch.autograd.grad(objective(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=step)
            ends.append(float(objective()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
    assert -slope != pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)  # negative control


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, -2.0]]), {}, "found -2 in column 2, row 3.*likelihood=normal"),
        (torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.0, 1.0]]), {}, "found 0.5 in column 1, row 2.*digits-binary"),
        (torch.zeros(9, 2), {"latent_dim": 3}, "latent_dim: found 3 for 9 rows x 2 columns, expected at most 2"),
        (torch.zeros(3, 8), {"latent_dim": 3}, "latent_dim: found 3 for 3 rows x 8 columns, expected at most 2"),
        (torch.zeros(9, 2), {"latent_dim": 0}, "latent_dim: found 0, expected int >= 1"),
        (torch.zeros(9, 2), {"activation": "tan"}, r"activation: found 'tan', expected tanh \| relu \| softplus"),
        (torch.zeros(9, 2), {"likelihod": "normal"}, "did you mean 'likelihood'"),
    ],
)
def test_bad_input_gets_one_line(x: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        VAE.from_data(x.double(), **options)
    assert "\n" not in str(error.value)


def test_numbers_are_welcome_under_the_normal_likelihood() -> None:
    assert VAE.from_data(torch.randn(9, 2).double(), likelihood="normal").dtype == torch.float32
