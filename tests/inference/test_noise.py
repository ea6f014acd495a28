"""Noise from outside gives PyTorch's own draws: the same bits from the same seed, and the same state afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.inference.noise import OutsideNoise

PROBS = torch.linspace(0.1, 0.9, 300)
ONES = torch.ones(5)
DRAWS: dict[str, Callable[[], Tensor]] = {
    "normal, with gradient": lambda: dist.Normal(torch.full((50, 3), 2.0), 1.5).rsample(),
    "normal": lambda: dist.Normal(torch.full((50, 3), 2.0), torch.full((50, 3), 1.5)).sample(),
    "few normals": lambda: dist.Normal(torch.zeros(3), 1.0).rsample(),
    "multivariate normal": lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)).expand((50,)).rsample(),
    "low-rank normal": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(5), torch.ones(5, 2), torch.ones(5)
    ).rsample(),
    "log-normal": lambda: dist.LogNormal(torch.zeros(9), 1.0).rsample(),
    "uniform": lambda: dist.Uniform(0.0, torch.ones(40)).sample(),
    "exponential": lambda: dist.Exponential(torch.ones(40)).sample(),
    "gumbel": lambda: dist.Gumbel(torch.zeros(40), 1.0).rsample(),
    "bernoulli": lambda: dist.Bernoulli(PROBS.reshape(3, 100)).sample(),
    "bernoulli, double": lambda: dist.Bernoulli(PROBS.double().expand(4, 300)).sample(),
    "categorical": lambda: dist.Categorical(torch.ones(100, 7).cumsum(-1)).sample(),
    "one-hot": lambda: dist.OneHotCategorical(torch.ones(10, 3)).sample(),
    "rand_like": lambda: torch.rand_like(PROBS) + torch.randn_like(PROBS),
    "scaled in place": lambda: torch.empty(30).normal_(1.0, 2.0),
}
TURNED = torch.linspace(0.1, 0.9, 12).reshape(3, 4).mT
DRAWS |= {"keywords": lambda: torch.multinomial(input=PROBS[None], num_samples=1) + torch.bernoulli(input=PROBS)}
INSIDE: dict[str, Callable[[], Tensor]] = {
    "gamma": lambda: dist.Gamma(torch.ones(9), 1.0).rsample(),
    "poisson": lambda: dist.Poisson(torch.ones(9)).sample(),
    "other order in memory": lambda: torch.rand_like(TURNED) + torch.empty(3, 4).mT.normal_(),
    "multinomial": lambda: dist.Multinomial(5, torch.ones(4)).sample(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_those_of_pytorch(name: str) -> None:
    """With noise drawn as the program goes, and with the same noise given to it later."""
    torch.manual_seed(1)
    expected, state = DRAWS[name](), torch.get_rng_state()
    torch.manual_seed(1)
    with OutsideNoise() as noise:
        ours = DRAWS[name]()
    assert noise.asked and torch.equal(ours, expected) and torch.equal(torch.get_rng_state(), state)
    with OutsideNoise(noise.values) as again:
        assert torch.equal(DRAWS[name](), expected)
    assert again.asked == noise.asked and torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    generator = torch.Generator().manual_seed(1)
    drawn = [each.draw(generator) for each in noise.asked]
    assert all(torch.equal(one, other) for one, other in zip(drawn, noise.values, strict=True))
    torch.manual_seed(2)
    assert not torch.equal(DRAWS[name](), expected)  # negative control


def test_laplace_draws_are_those_of_pytorch_up_to_rounding() -> None:
    """Its uniform numbers are stretched before they are used: 1e-6, a few roundings in single precision."""
    torch.manual_seed(1)
    expected = dist.Laplace(torch.zeros(40), 1.0).rsample()
    torch.manual_seed(1)
    with OutsideNoise() as noise:
        ours = dist.Laplace(torch.zeros(40), 1.0).rsample()
    assert noise.asked and float((ours - expected).abs().max()) <= 1e-6 < float(expected.abs().max())


@pytest.mark.parametrize("name", INSIDE)
def test_what_cannot_come_from_outside_is_left_alone(name: str) -> None:
    torch.manual_seed(1)
    expected = INSIDE[name]()
    torch.manual_seed(1)
    with OutsideNoise() as noise:
        ours = INSIDE[name]()
    assert not noise.asked and torch.equal(ours, expected)


def test_normal_draws_pass_no_gradient_where_pytorchs_pass_none() -> None:
    """``torch.normal(mean, std)`` cuts it."""
    mean = torch.ones(3, requires_grad=True)
    (theirs,) = torch.autograd.grad(torch.normal(mean, torch.ones(3)).sum(), [mean])
    with OutsideNoise():
        assert not torch.normal(mean, torch.ones(3, requires_grad=True)).requires_grad
    assert theirs.tolist() == [0.0] * 3
