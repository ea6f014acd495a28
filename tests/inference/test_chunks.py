"""Chunks: no tensor grows with rows, columns or hidden width beyond its bound, and they change no number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elbozoo.guides import Guide, build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.inference import best_member as best_member_module
from elbozoo.inference import evidence as evidence_module
from elbozoo.inference import weights as weights_module
from elbozoo.inference.best_member import best_member
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.member_search import Normals, NormalSearch
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.numerics import quadrature
from elbozoo.models.numerics.quadrature import log_integral


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                # What is expanded holds no more numbers than it was expanded from.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def decoder(rows: int, columns: int, hidden: int, latent_dim: int = 2) -> tuple[Entry, Tensor]:
    """A VAE with random weights, in float64, and rows drawn from it."""
    entry = get_entry("vae").example(columns, seed=1, latent_dim=latent_dim, hidden=hidden).double()
    return entry, entry.simulate(rows, seed=2)[0].double()


def largest_of_quadrature(entry: Entry, x: Tensor) -> int:
    with Largest() as seen:
        log_evidence(entry, x)
    return seen.elements


@pytest.mark.parametrize(("rows", "columns", "hidden"), [(3, 4, 512), (1000, 8, 4)])
def test_quadrature_holds_a_bounded_number_of_numbers(
    rows: int, columns: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,096 nodes times the widest layer, or 2²⁰ of anything: not all nodes times a layer, nor times the rows."""
    monkeypatch.setattr(evidence_module, "QUADRATURE_TOLERANCE", 1e-2)
    monkeypatch.setattr(quadrature, "NODES", 2**12)
    entry, x = decoder(rows, columns, hidden)
    bound = max(2**12 * max(hidden, columns), 2**20)
    assert largest_of_quadrature(entry, x) <= bound
    # Negative control: without the limits one of them is exceeded.
    monkeypatch.setattr(quadrature, "NODES", 2**30)
    monkeypatch.setattr(quadrature, "CHUNK", 2**30)
    assert largest_of_quadrature(entry, x) > bound


def test_search_and_weights_hold_a_bounded_number_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best member and 1,000 weights of 12 rows of 50 columns, at most so many numbers of columns at once.

    What is larger is q's own: 1,000 draws of the latents of each row, or points for each row of a chunk.
    """
    entry, x = decoder(12, 50, 20, latent_dim=3)
    with isolated(0):
        guide = build_guide("mean-field", entry, x).double()
    monkeypatch.setattr(weights_module, "MODEL_ELEMENTS", 2**15)
    monkeypatch.setattr(best_member_module, "CHUNK_ELEMENTS", 2**15)
    monkeypatch.setattr(best_member_module, "PRIOR_DRAWS", 64)
    bound = 1000 * 12 * 3

    def largest() -> int:
        with Largest() as seen:
            best_member(entry, "diagonal-normal", x, GuideOptions())
            importance_weights(entry, guide, Batch.full(x), 1000, seed=0)
        return seen.elements

    assert largest() <= bound
    monkeypatch.setattr(weights_module, "MODEL_ELEMENTS", 2**30)
    assert largest() > bound


@pytest.mark.parametrize(("name", "kind"), [("vae", "mean-field"), ("mixture-of-factor-analyzers", "mean-field")])
def test_draws_are_the_same_however_few_the_model_meets_at_once(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of each draw, row and enumerated value to 1e-12 relative; draws from another seed are others."""
    entry = get_entry(name).example(5, seed=1).double()
    x = entry.simulate(7, seed=2)[0].double()
    with isolated(0):
        guide = build_guide(kind, entry, x).double()

    def log_weights(seed: int) -> np.ndarray:
        found: np.ndarray = importance_weights(entry, guide, Batch.full(x), 50, seed=seed).log_weight.numpy()
        return found

    whole = log_weights(0)
    monkeypatch.setattr(weights_module, "MODEL_ELEMENTS", 7 * 5 * 4)
    np.testing.assert_allclose(log_weights(0), whole, rtol=1e-12, atol=1e-12)
    assert np.abs(log_weights(1) - whole).max() > 1e-6


def test_draws_of_a_global_latent_are_the_same_however_few_the_model_meets_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Common and local terms of a coefficient of all data, 1e-12 relative; draws from another seed are others."""
    entry = get_entry("logistic-regression").example(4, seed=1)
    x = entry.simulate(11, seed=2)[0]
    with isolated(0):
        guide: Guide = build_guide("mean-field", entry, x)
        guide(Batch.full(x))
    whole, other = (importance_weights(entry, guide, Batch.full(x), 30, seed=seed).elbo().numpy() for seed in (0, 1))
    monkeypatch.setattr(weights_module, "MODEL_ELEMENTS", 11 * 4 * 4)
    parts = importance_weights(entry, guide, Batch.full(x), 30, seed=0).elbo().numpy()
    np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-12)
    assert np.abs(other - whole).max() > 1e-6


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_a_term_that_rows_have_in_common_may_be_given_apart(latent_dim: int) -> None:
    """The prior apart from the likelihood: the same integral and error to 1e-10 nats; left out, it is another."""
    entry, x = decoder(6, 5, 8, latent_dim)
    centre, scale = torch.zeros(latent_dim).double(), torch.ones(latent_dim).double()

    def prior(z: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(z).sum(-1)

    def likelihood(index: Tensor, z: Tensor) -> Tensor:
        return entry.log_likelihood(x[index], z)

    def own(index: Tensor, z: Tensor) -> Tensor:
        return torch.stack([likelihood(i[None], each)[0] for i, each in zip(index, z, strict=True)]) + prior(z)

    apart = log_integral(likelihood, own, 6, centre, scale, common=prior)
    joint = log_integral(lambda index, z: likelihood(index, z) + prior(z), own, 6, centre, scale)
    alone = log_integral(likelihood, own, 6, centre, scale, own_nodes=0)
    np.testing.assert_allclose(apart.log_value, joint.log_value, rtol=0, atol=1e-10)
    np.testing.assert_allclose(apart.error, joint.error, rtol=0, atol=1e-10)
    assert float((alone.log_value - joint.log_value).abs().max()) > 1e-3


# ---- the search, against a plain one ---------------------------------------------------------------------------------


def plain_bound(entry: Entry, x: Tensor, mean: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
    """ELBO of independent normals by draws, (N,), from the decoder's logits alone."""
    z = mean + log_scale.exp() * noise[:, None]
    logits = entry.decoder(z)
    likelihood = (x * logits - torch.nn.functional.softplus(logits, threshold=100)).sum(-1)
    entropy = log_scale.sum(-1) + 0.5 * z.shape[-1] * (1 + math.log(2 * math.pi))
    prior = -0.5 * (mean.square() + (2 * log_scale).exp() + math.log(2 * math.pi)).sum(-1)
    return likelihood.mean(0) + prior + entropy


def plainly_best(entry: Entry, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best of three ends of L-BFGS on fixed draws for each row, from points of the prior."""
    ends = []
    for _ in range(3):
        parameters = torch.cat([torch.randn(len(x), 5), torch.full((len(x), 5), -1.0)], -1).double().requires_grad_()
        optimizer = torch.optim.LBFGS([parameters], max_iter=150, line_search_fn="strong_wolfe")

        def loss(parameters: Tensor = parameters) -> Tensor:
            parameters.grad = None
            value = -plain_bound(entry, x, *parameters.split(5, -1), noise).sum()
            (parameters.grad,) = torch.autograd.grad(value, parameters)
            return value.detach()

        optimizer.step(loss)
        ends.append(parameters.detach())
    with torch.no_grad():
        values = torch.stack([plain_bound(entry, x, *end.split(5, -1), noise) for end in ends])
    mean, log_scale = torch.stack(ends)[values.argmax(0), torch.arange(len(x))].split(5, -1)
    return mean, log_scale


def test_the_search_finds_what_plain_gradients_on_many_draws_find() -> None:
    """Five latents: on average not 1e-3 nats a datum below the best of three plain ascents with 1,024 draws each.

    Both are judged by the same 8,192 fresh draws, from the decoder alone, so that the error of their difference is
    small: three standard errors are allowed for (1.3e-3 false alarms). Means moved by a tenth of q's scales fail.
    """
    entry, x = decoder(16, 20, 8, latent_dim=5)
    sobol = torch.quasirandom.SobolEngine(5, scramble=True, seed=3)
    normal = torch.distributions.Normal(torch.zeros(()).double(), 1.0)
    draws, fresh = (normal.icdf(sobol.draw(count).double().clamp(1e-9, 1 - 1e-9)) for count in (1024, 8192))
    plain = plainly_best(entry, x, draws)
    best = best_member(entry, "diagonal-normal", x, GuideOptions())
    assert best is not None and best.converged
    with torch.no_grad():
        q = best.guide.distributions(Batch.full(x))["z"]
        reference = plain_bound(entry, x, *plain, fresh)
        lag = reference - plain_bound(entry, x, q.mean, q.stddev.log(), fresh)
        moved = reference - plain_bound(entry, x, q.mean + 0.1 * q.stddev, q.stddev.log(), fresh)
    error = float(lag.std()) / math.sqrt(len(x))
    assert float(lag.mean()) <= 1e-3 + 3 * error
    assert float(moved.mean()) > 1e-3 + 3 * error


@pytest.mark.parametrize("family", ["diagonal-normal", "full-rank-normal", "low-rank-normal"])
def test_a_given_start_is_never_left_for_worse(family: str) -> None:
    """A narrow mode that no prior draw shows: from the start given there the bound is not lower, to 1e-9 nats."""

    def log_joint(rows: Tensor, z: Tensor) -> Tensor:
        wide, narrow = -0.5 * z.square().sum(-1), 12.0 - 0.5 * (20 * (z - 6)).square().sum(-1)
        return torch.logaddexp(wide, narrow)[None]

    rank = [1] if family == "low-rank-normal" else []
    search = NormalSearch(log_joint, 2, [3], family, rank, at_once=10**6, dtype=torch.float64)
    one = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    wide, narrow = Normals.of(torch.zeros(2, 3).double(), one), Normals.of(torch.full((2, 3), 6.0).double(), one / 400)
    found, alone = search.run([wide], [narrow]), search.run([wide], [])
    assert (found.value >= search.value(narrow) - 1e-9).all()
    assert (alone.value < search.value(narrow) - 1e-9).all()
