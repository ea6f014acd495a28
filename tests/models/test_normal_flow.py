"""The normalising flow: densities against dense Jacobians and integrals, a known density learned, no latent."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

import elbozoo as ez
from elbozoo.guides import build_guide, guide_names
from elbozoo.guides.base import GuideOptions
from elbozoo.inference.ledger import compute_ledger
from elbozoo.inference.method import default_methods, method_names
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.entry import capabilities
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.normal_flow import NormalFlow

TRANSFORMS = ["affine-coupling", "spline-coupling"]
LOG_2PI = math.log(2 * math.pi)


def example(columns: int = 3, **options: object) -> NormalFlow:
    entry = NormalFlow.example(columns=columns, seed=1, **options).double()
    with torch.no_grad():  # units of the columns that are not all the same
        entry.location.copy_(torch.linspace(-2, 3, columns))
        entry.unit.copy_(torch.linspace(0.5, 2, columns))
    return entry


def banana(rows: int, seed: int) -> Tensor:
    """x1 ~ N(0, 1), x2 given x1 ~ N(x1², 0.3²)."""
    random = np.random.default_rng(seed)
    first = random.standard_normal(rows)
    return torch.from_numpy(np.stack([first, first**2 + 0.3 * random.standard_normal(rows)], 1))


def banana_log_density(x: Tensor) -> Tensor:
    return -0.5 * (x[:, 0] ** 2 + ((x[:, 1] - x[:, 0] ** 2) / 0.3) ** 2) - LOG_2PI - math.log(0.3)


def test_is_in_the_registry_as_a_model_without_latents() -> None:
    """Its only guide is the posterior of nothing, and every other is refused with the reason."""
    entry = NormalFlow.example()
    assert get_entry("normal-flow") is NormalFlow
    assert entry.latent_sites() == [] and guide_names(entry) == ["exact"]
    assert default_methods(entry) == method_names(entry) == ["exact"]
    assert {"oracle", "posterior"} <= set(capabilities(entry))
    with pytest.raises(InvalidInput, match=r"it has no latent, so there is nothing for a q to say; .* exact"):
        ez.fit("normal-flow", banana(20, 0), guide="amortized")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("columns", [2, 3, 5])
def test_density_is_that_of_the_change_of_variables(transform: str, columns: int) -> None:
    """Against log N(u) + log |det ∂u/∂x| with a dense Jacobian by automatic differentiation, 1e-5 nats.

    Pyro's splines find the piece of a number with a tolerance of 1e-6 at its ends, which the two sides meet apart.
    """
    entry = example(columns, transform=transform)
    x, _ = entry.simulate(30, seed=2)
    u = entry.normal_numbers(x)
    matrices = [jacobian(lambda row: entry.normal_numbers(row[None])[0], row) for row in x]
    determinant = torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in matrices])
    truth = (-0.5 * u.square() - 0.5 * LOG_2PI).sum(-1) + determinant
    found = entry.log_evidence(x)
    assert (found - truth).abs().max() <= 1e-5
    assert (found - (truth - 2 * determinant)).abs().max() > 0.1  # negative control: the wrong sign


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_density_integrates_to_one(transform: str) -> None:
    """Midpoints of 400² cells over ±12 units about the centre, 1e-3: what bends sharply between them."""
    entry = NormalFlow.from_data(banana(50, seed=0), hidden=8, transform=transform).double()
    with torch.no_grad():
        for parameter in entry.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    axis = (torch.arange(400, dtype=torch.float64) + 0.5) / 400 * 24 - 12
    cell = (24 / 400) ** 2 * entry.unit.prod()
    with torch.no_grad():
        log_density = entry.log_evidence(entry.location + entry.unit * torch.cartesian_prod(axis, axis))
        straight = entry.normal_numbers(entry.location + entry.unit * torch.cartesian_prod(axis, axis))
    assert float(log_density.exp().sum() * cell) == pytest.approx(1, abs=1e-3)
    # Negative control: without the Jacobian it is no density of x.
    without = (-0.5 * straight.square() - 0.5 * LOG_2PI).sum(-1)
    assert float(without.exp().sum() * cell) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_simulation_draws_from_the_density(transform: str) -> None:
    """u = f⁻¹(x) of 20,000 simulated rows are standard normal: six moments within 5 standard errors (6e-7 each)."""
    entry = example(3, transform=transform)
    x, z = entry.simulate(20_000, seed=3)
    assert z == {}
    with torch.no_grad():
        u = entry.normal_numbers(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        bound = 5 * math.sqrt(variance / len(u))
        assert ((u**power).mean(0) - moment).abs().max() < bound
    assert float((u[:, 0] * u[:, 1]).mean().abs()) < 5 / math.sqrt(len(u))
    standard = (x - x.mean(0)) / x.std(0)
    assert ((standard**4).mean(0) - 3).abs().max() > 5 * math.sqrt(96 / len(u))  # negative control: x is not normal


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_starts_as_independent_normals(transform: str) -> None:
    """With the columns' moments, to a tenth of a nat: the networks' last layers are small, not zero."""
    x = banana(300, seed=0)
    entry = NormalFlow.from_data(x, transform=transform).double()
    normals = torch.distributions.Normal(x.mean(0), x.std(0, correction=0)).log_prob(x).sum(-1)
    with torch.no_grad():
        assert (entry.log_evidence(x) - normals).abs().mean() < 0.1
        bent = NormalFlow.example(columns=2, transform=transform).double()
        assert (bent.log_evidence(x) - normals).abs().mean() > 0.1


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nothing_is_remembered_from_call_to_call(transform: str) -> None:
    """The same rows after a change of the parameters have another density, and an entry in use can be copied."""
    entry = example(3, transform=transform)
    x, _ = entry.simulate(5, seed=0)
    before = entry.log_evidence(x)
    twin = copy.deepcopy(entry)
    with torch.no_grad():
        for parameter in entry.parameters():
            parameter.add_(0.05)
    assert (entry.log_evidence(x) - before).abs().min() > 1e-6
    assert torch.equal(twin.log_evidence(x), before)


def test_bound_is_the_likelihood_whose_every_gap_is_zero() -> None:
    """The ledger of the exact guide: ELBO = log p(x), to rounding, and no divergence; at another θ it is another."""
    entry = example(3)
    x, _ = entry.simulate(40, seed=0)
    ledger = compute_ledger(entry, build_guide("exact", entry, x), x, GuideOptions(), seed=0)
    truth = float(entry.log_evidence(x).sum().detach())
    assert ledger.elbo == pytest.approx(truth, rel=1e-12) and ledger.elbo_se == 0
    assert ledger.log_evidence_kind == "exact"
    assert abs(ledger.gap) <= 1e-9 * abs(truth) and ledger.kl == 0 and ledger.approximation_gap == 0
    with torch.no_grad():
        entry.location.add_(0.1)
    assert float(entry.log_evidence(x).sum().detach()) != pytest.approx(truth, rel=1e-6)


def test_a_fit_transforms_to_nothing_samples_and_is_stored(tmp_path: object) -> None:
    fit = ez.fit("normal-flow", banana(50, seed=0), steps=5, transforms=2, hidden=4, guide="exact")
    assert fit.objective == "elbo"
    assert fit.transform().shape == (50, 0) and fit.sample(7).shape == (7, 2)
    assert fit.score_samples().shape == (50,)
    data = fit.to_inferencedata(draws=4)
    assert "posterior" not in data.groups() and data.log_likelihood["x"].shape == (1, 4, 50)
    loaded = type(fit).load(fit.save(f"{tmp_path}/fit"))
    assert loaded.elbo(fit.x) == fit.elbo()
    assert loaded.guide.means(Batch.full(fit.x)).shape == (50, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "most", "steps"), [("affine-coupling", 0.05, 1000), ("spline-coupling", 0.35, 300)]
)
def test_learns_a_banana_to_its_entropy(transform: str, most: float, steps: int) -> None:
    """Mean log p(x) of 4000 fresh rows below the true density's by at most so many nats, and above by at most 0.02.

    A normal with the rows' moments is 1.5 nats below. The Monte Carlo error of these mean differences is below 0.01.
    Splines stop at three standard deviations, and the banana's second column goes on to five.
    """
    x, new = banana(2000, seed=0), banana(4000, seed=1)
    options = {"transform": transform, "transforms": 3, "bins": 6, "hidden": 32, "schedule": "cosine"}
    fit = ez.fit("normal-flow", x, guide="exact", steps=steps, **options)
    with torch.no_grad():
        learned, truth = fit.entry.log_evidence(new), banana_log_density(new)
        normal = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(new)
    assert -0.02 <= float((truth - learned).mean()) <= most
    assert float((truth - normal).mean()) > 1.4


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.randn(9, 1), {}, "found 1 column, expected at least 2"),
        (torch.cat([torch.randn(9, 2), torch.ones(9, 1)], 1), {}, r"columns \[3\] .* constant"),
        (torch.randn(9, 2), {"bins": 1}, "option bins: found 1, expected int >= 2"),
        (torch.randn(9, 2), {"transform": "planar"}, r"found 'planar', expected affine-coupling \| spline-coupling"),
    ],
)
def test_bad_input_gets_one_line(x: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        NormalFlow.from_data(x.double(), **options)
    assert "\n" not in str(caught.value)
