"""Quadrature against closed forms, PPCA's exact evidence and another, finer rule; its errors are honest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, StudentT

from elbozoo.models.numerics import quadrature
from elbozoo.models.numerics.quadrature import Quadrature, log_integral
from elbozoo.models.ppca import PPCA
from elbozoo.models.vae import VAE

LogDensity = Callable[[Tensor, Tensor], Tensor]


def integrate(rowwise: LogDensity, rows: int, dim: int, **options: float) -> Quadrature:
    """Integrate log densities given as (index (R,), z (R, G, K)) -> (R, G) over a box about a standard normal."""
    centre, scale = torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
    return log_integral(
        lambda index, z: rowwise(index, z.expand(len(index), -1, -1)), rowwise, rows, centre, scale, **options
    )


def gaussians(loc: Tensor, scale: float, rho: float) -> LogDensity:
    """Normalised Gaussians at ``loc`` (N, K) of that scale, correlated in two dimensions: log integral 0."""
    dim = loc.shape[1]
    correlation = torch.eye(dim, dtype=torch.float64)
    if dim == 2:
        correlation[0, 1] = correlation[1, 0] = rho
    normal = MultivariateNormal(torch.zeros(dim).double(), scale**2 * correlation)
    return lambda index, z: normal.log_prob(z - loc[index, None])


def scattered(rows: int, dim: int, width: float) -> Tensor:
    return (2 * torch.rand(rows, dim, dtype=torch.float64) - 1) * width


def assert_honest(result: Quadrature, truth: Tensor | float, tolerance: float) -> None:
    """Every value is within its error of the truth, and every error within the tolerance."""
    assert result.log_value.dtype == torch.float64
    assert (result.error > 0).all()
    assert ((result.log_value - truth).abs() <= result.error).all()
    assert (result.error <= tolerance).all()


@pytest.mark.parametrize("scale", [0.5, 0.1, 0.02, 1e-3, 1e-5])
@pytest.mark.parametrize(("dim", "rho"), [(1, 0.0), (2, 0.0), (2, 0.99), (2, -0.9)])
def test_gaussians_of_any_width_anywhere(dim: int, rho: float, scale: float) -> None:
    result = integrate(gaussians(scattered(20, dim, 3.0), scale, rho), 20, dim)
    assert_honest(result, 0.0, 1.1e-6)


@pytest.mark.parametrize("dim", [1, 2])
def test_two_narrow_modes_of_unequal_width_and_mass(dim: int) -> None:
    loc = scattered(10, dim, 3.0)
    first, second = gaussians(loc, 0.01, 0.0), gaussians(loc.flip(0), 0.03, 0.0)

    def mixture(index: Tensor, z: Tensor) -> Tensor:
        return torch.logaddexp(first(index, z) + math.log(0.3), second(index, z) + math.log(0.7))

    assert_honest(integrate(mixture, 10, dim), 0.0, 1.1e-6)
    missed = integrate(lambda index, z: first(index, z) + math.log(0.3), 10, dim)
    assert (missed.log_value.abs() > missed.error).all()  # negative control: one mode alone is not the whole


@pytest.mark.parametrize("place", [0.0, 5.0, 7.0, 12.0])
@pytest.mark.parametrize("dim", [1, 2])
def test_posterior_far_out_in_the_prior(dim: int, place: float) -> None:
    noise = 0.05
    x = torch.zeros(3, dim, dtype=torch.float64)
    x[:, 0] = torch.tensor([place, -place, place + 0.03])

    def joint(index: Tensor, z: Tensor) -> Tensor:
        prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return prior + Normal(z, noise).log_prob(x[index, None].expand_as(z)).sum(-1)

    truth = Normal(torch.zeros(()).double(), math.sqrt(1 + noise**2)).log_prob(x).sum(-1)
    assert_honest(integrate(joint, 3, dim), truth, 1.1e-6)


@pytest.mark.parametrize(("df", "tolerance"), [(1.0, 0.1), (3.0, 1e-3), (8.0, 2e-6)])
def test_heavy_tails_are_cut_off_and_say_so(df: float, tolerance: float) -> None:
    scale = torch.tensor([0.5, 1.0, 2.0]).double()
    result = integrate(lambda index, z: StudentT(df, 0.0, scale[index, None]).log_prob(z[..., 0]), 3, 1)
    assert_honest(result, 0.0, tolerance * scale.max().item() ** df)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_evidence_of_ppca(latent_dim: int) -> None:
    entry = PPCA.example(columns=4, latent_dim=latent_dim, seed=3)
    x, _ = entry.simulate(20, seed=0)

    def joint(index: Tensor, z: Tensor) -> Tensor:
        mean = z @ entry.loading.mT + entry.loc
        return Normal(mean, entry.noise_scale).log_prob(x[index, None]).sum(-1) + Normal(0.0, 1.0).log_prob(z).sum(-1)

    with torch.no_grad():
        assert_honest(integrate(joint, 20, latent_dim), entry.log_evidence(x), 1.1e-6)
        truth = entry.log_evidence(x + 0.01)
        assert ((integrate(joint, 20, latent_dim).log_value - truth).abs() > 1e-4).any()  # negative control


def decoder_integral(entry: VAE, x: Tensor, **options: float) -> Quadrature:
    def shared(index: Tensor, z: Tensor) -> Tensor:
        return entry.log_likelihood(x[index], z) + Normal(0.0, 1.0).log_prob(z).sum(-1)

    def rowwise(index: Tensor, z: Tensor) -> Tensor:
        rows = entry.likelihood.distribution(entry.decoder(z)).log_prob(x[index, None])
        return rows + Normal(0.0, 1.0).log_prob(z).sum(-1)

    dim = entry.options.latent_dim
    zeros = torch.zeros(dim, dtype=torch.float64)
    return log_integral(shared, rowwise, len(x), zeros, zeros + 1, **options)


def gauss_legendre(entry: VAE, x: Tensor, edges: Tensor) -> Tensor:
    """Evidence by 12-point Gauss-Legendre between the edges in each dimension: another rule, other code."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(12))
    middle, half = (edges[:-1] + edges[1:]) / 2, edges.diff() / 2
    axis = (middle[:, None] + half[:, None] * nodes).flatten()
    log_weight = (half[:, None] * weights).flatten().log()
    dim = entry.options.latent_dim
    z = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    log_weights = torch.cartesian_prod(*[log_weight] * dim).reshape(-1, dim).sum(-1)
    with torch.no_grad():
        prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return (entry.log_likelihood(x, z) + prior + log_weights).logsumexp(-1)


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
@pytest.mark.parametrize(("likelihood", "noise"), [("bernoulli", 0.0), ("normal", 0.25), ("normal", 0.06)])
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_evidence_of_decoders_is_within_its_error(
    latent_dim: int, likelihood: str, noise: float, activation: str
) -> None:
    options = {"latent_dim": latent_dim, "likelihood": likelihood, "activation": activation, "noise_floor": 0.0}
    entry = VAE.example(hidden=16, seed=latent_dim, **options).double()
    if noise:
        entry.noise_scale = torch.tensor(noise).double()
    x, _ = entry.simulate(4, seed=0)
    edges = torch.linspace(-9, 9, 361 if latent_dim == 1 else 181 if noise == 0.06 else 91).double()
    truth = gauss_legendre(entry, x, edges)
    assert_honest(decoder_integral(entry, x), truth, 2e-6)


def test_kinks_have_honest_errors_in_all_but_few_rows() -> None:
    underestimated, true_total, reported_total = 0, 0.0, 0.0
    for seed in range(6):
        entry = VAE.example(latent_dim=1, likelihood="normal", activation="relu", seed=seed).double()
        x, _ = entry.simulate(50, seed=seed)
        kinks = (-entry.decoder[0].bias / entry.decoder[0].weight[:, 0]).detach()
        edges = torch.cat([kinks[kinks.abs() < 9], torch.linspace(-9, 9, 401).double()]).sort().values
        result = decoder_integral(entry, x)
        true = (result.log_value - gauss_legendre(entry, x, edges)).abs()
        underestimated += int((true > result.error).sum())
        true_total += float(true.sum())
        reported_total += float(result.error.sum())
    assert underestimated <= 0.02 * 300
    assert true_total < reported_total


def test_too_coarse_a_rule_is_wrong_and_says_so() -> None:
    """Negative control of all the above."""
    result = integrate(gaussians(scattered(20, 2, 3.0), 0.05, 0.0), 20, 2, shared_nodes=72**2, own_nodes=0)
    assert result.log_value.abs().max() > 0.1
    assert (result.log_value.abs() <= result.error).all()
    assert result.error.max() > 0.1


def test_converges_faster_than_any_power() -> None:
    loc = scattered(20, 2, 1.0)
    errors = [
        integrate(gaussians(loc, 0.25, 0.0), 20, 2, shared_nodes=cells**2, own_nodes=0).log_value.abs().max().item()
        for cells in (32, 48, 72)
    ]
    orders = [math.log(a / b) / math.log(1.5) for a, b in itertools.pairwise(errors)]
    assert orders[0] > 5
    assert orders[1] > orders[0] + 3


def test_tolerance_trades_nodes_for_digits() -> None:
    loc = scattered(20, 2, 2.0)
    loose, tight = (integrate(gaussians(loc, 0.2, 0.5), 20, 2, tolerance=t) for t in (1e-2, 1e-9))
    assert_honest(loose, 0.0, 1e-2)
    assert_honest(tight, 0.0, 1.1e-9)
    assert loose.nodes < tight.nodes


def test_counts_its_evaluations() -> None:
    loc, evaluations = scattered(5, 2, 3.0), 0
    density = gaussians(loc, 0.01, 0.0)

    def counting(index: Tensor, z: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += z.shape[0] * z.shape[1]
        return density(index, z)

    assert integrate(counting, 5, 2).nodes == evaluations


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    density = gaussians(torch.cat([scattered(9, 2, 3.0), torch.full((1, 2), 7.0).double()]), 0.03, 0.5)
    whole = integrate(density, 10, 2)
    for name, value in {"CHUNK": 999, "OWN_CHUNK": 77, "ROWS": 3, "BLOCK": 2**16}.items():
        monkeypatch.setattr(quadrature, name, value)
    parts = integrate(density, 10, 2)
    assert (whole.log_value - parts.log_value).abs().max() < 1e-12
    assert whole.nodes == parts.nodes


def test_centre_and_scale_place_the_box() -> None:
    centre, scale = torch.tensor([100.0, -3.0]).double(), torch.tensor([0.01, 50.0]).double()
    normal = MultivariateNormal(centre + scale, torch.diag(scale.square() / 4))
    density = lambda index, z: normal.log_prob(z.expand(len(index), -1, -1))  # noqa: E731
    assert_honest(log_integral(density, density, 3, centre, scale), 0.0, 1.1e-6)


def test_integrands_without_a_value_have_infinite_errors() -> None:
    def density(index: Tensor, z: Tensor) -> Tensor:
        bad = torch.tensor([0.0, math.nan, -math.inf]).double()
        return Normal(0.0, 1.0).log_prob(z[..., 0]) + bad[index, None]

    result = integrate(density, 3, 1)
    assert result.log_value[0].abs() < 1e-6
    assert result.error.isinf().tolist() == [False, True, True]


def test_refuses_three_dimensions_and_single_precision() -> None:
    with pytest.raises(ValueError, match=r"found a centre of 3 dimensions.*expected one or two"):
        integrate(gaussians(scattered(2, 3, 1.0), 1.0, 0.0), 2, 3)
    with pytest.raises(ValueError, match=r"torch\.float32.*expected one or two dimensions in float64"):
        log_integral(lambda i, z: z, lambda i, z: z, 2, torch.zeros(1), torch.ones(1))
