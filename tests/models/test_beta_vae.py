"""The β-VAE: the VAE that it is at every β, its objective against integrals on a grid, and what β does to sprites."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import elbozoo as ez
from elbozoo.guides import Guide, build_guide
from elbozoo.inference.anatomy import anatomy
from elbozoo.inference.objectives import resolve_objective
from elbozoo.inference.svi import TrainingOptions, run_svi
from elbozoo.models import Batch, get_entry
from elbozoo.models.beta_vae import BetaVAE
from elbozoo.models.contract.isolation import isolated

Z_BOUND = 5.0  # two-sided, normal: a false alarm of 6e-7 for each number compared
SMALL = {"latent_dim": 2, "hidden": 8, "progress": False}


def same_parameters(one: ez.Fit, other: ez.Fit) -> bool:
    pairs = zip(
        [*one.entry.state_dict().values(), *one.guide.state_dict().values()],
        [*other.entry.state_dict().values(), *other.guide.state_dict().values()],
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


# ---- what it is ------------------------------------------------------------------------------------------------------


def test_is_a_vae_with_other_defaults() -> None:
    """Bit for bit the fit of `vae` by the objective beta at 4; at another β, or by the ELBO, that of `vae` there."""
    assert get_entry("beta-vae") is BetaVAE
    x = ez.load_data("digits-binary").x[:40]

    def fitted(model: str, **options: Any) -> ez.Fit:
        return ez.fit(model, x, guide="amortized", steps=10, **SMALL, **options)

    plain = fitted("beta-vae")
    assert plain.objective == "beta" and plain.trajectory["elbo"].isna().all()
    assert same_parameters(plain, fitted("vae", objective="beta", kl_weight=4.0))
    assert same_parameters(fitted("beta-vae", kl_weight=2.0), fitted("vae", objective="beta", kl_weight=2.0))
    by_elbo = fitted("beta-vae", objective="elbo")
    assert by_elbo.objective == "elbo" and by_elbo.trajectory["elbo"].notna().all()
    assert same_parameters(by_elbo, fitted("vae"))
    assert not same_parameters(plain, by_elbo)  # negative control


@pytest.mark.parametrize(
    "options",
    [
        {"kl_schedule": "annealed", "kl_steps": 15},
        {"kl_schedule": "cyclical", "kl_steps": 16, "kl_cycles": 2},
        {"free_bits": 5.0},
        {"kl": "analytic"},
    ],
    ids=lambda options: next(iter(options)) + "-" + str(next(iter(options.values()))),
)
def test_schedules_and_free_bits_need_no_other_option(options: dict[str, Any]) -> None:
    """They change the fit, which stays one by `beta` with its ELBO beside it; a schedule starts at β = 0."""
    x = ez.load_data("digits-binary").x[:40]
    fit = ez.fit("beta-vae", x, guide="amortized", steps=20, **SMALL, **options)
    constant = ez.fit("beta-vae", x, guide="amortized", steps=20, **SMALL)
    assert fit.objective == "beta"
    assert not same_parameters(fit, constant)
    assert math.isfinite(fit.elbo()) and fit.elbo() <= fit.log_evidence().value
    first = {name: float(each.trajectory["objective"].iloc[0]) for name, each in (("fit", fit), ("constant", constant))}
    if "kl_schedule" in options:
        free = ez.fit("vae", x, guide="amortized", steps=1, objective="beta", kl_weight=0.0, **SMALL)
        assert first["fit"] == float(free.trajectory["objective"].iloc[0])  # the same draws: equal to the bit
        assert first["fit"] > first["constant"]  # negative control: with a price from the start


# ---- the objective, on a grid ----------------------------------------------------------------------------------------


def grid_log_means(entry: BetaVAE, x: Tensor, weights: list[float]) -> dict[float, float]:
    """Total of β log ∫ p(z) p(x given z)^(1/β) dz for each β, nats, by NumPy on 161² points of [-6, 6]²."""
    axis = np.linspace(-6, 6, 161)
    z = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    log_prior = -0.5 * (z**2).sum(-1) - math.log(2 * math.pi) + 2 * math.log(axis[1] - axis[0])
    first, last = (m for m in entry.decoder.modules() if isinstance(m, torch.nn.Linear))
    w1, b1, w2, b2 = (p.detach().numpy() for p in (first.weight, first.bias, last.weight, last.bias))
    logits = np.tanh(z @ w1.T + b1) @ w2.T + b2
    signs = 2 * x.numpy() - 1
    log_likelihood = -np.logaddexp(0, -signs[:, None, :] * logits[None]).sum(-1)
    return {b: float((b * np.logaddexp.reduce(log_prior + log_likelihood / b, axis=1)).sum()) for b in weights}


def at_fixed_theta(entry: BetaVAE, x: Tensor, weight: float) -> Guide:
    """A normal of each datum, full rank, fitted by the objective beta while θ stays as it is."""
    options = TrainingOptions(objective="beta", kl_weight=weight, steps=250, schedule="cosine", learning_rate=0.05)
    with isolated(0):
        guide = build_guide("free-full-rank-normal", entry, x).double()
        objective = resolve_objective("beta", guide, options)
        run_svi(entry, guide, objective, Batch.full(x), options, progress=False)
    return guide


def test_the_best_objective_is_a_power_mean_of_the_likelihood() -> None:
    """-D - β R of a fitted normal lies below β log ∫ p(z) p(x|z)^(1/β) dz, and within 0.15 nats per datum of it.

    The tolerance is what a normal misses of q_β; the bound itself holds within five Monte Carlo standard errors.
    """
    weights = [0.5, 3.0]
    entry = BetaVAE.example(hidden=8, seed=1).double()
    with torch.no_grad():  # less steep, so that q_β is close to normal at every β
        entry.decoder[2].weight *= 0.4
    entry.requires_grad_(False)
    x, _ = entry.simulate(20, seed=2)
    means = grid_log_means(entry, x, [*weights, 1.0])
    assert means[0.5] > means[1.0] + 1 > means[3.0] + 2  # it falls with β, by nats over 20 rows
    reached, error = {}, {}
    for weight in weights:
        found = anatomy(entry, at_fixed_theta(entry, x, weight), x, seed=3, draws=400)
        assert found.rate_form == "closed"
        reached[weight] = -found.distortion.total - weight * found.rate.total
        error[weight] = Z_BOUND * found.distortion.standard_error
        assert reached[weight] <= means[weight] + error[weight]
        assert reached[weight] >= means[weight] - 0.15 * len(x) - error[weight]
    # Negative controls: below β = 1 the objective is above log p(x), and above it too far below.
    assert reached[0.5] > means[1.0] + error[0.5]
    assert reached[3.0] < means[1.0] - 0.15 * len(x) - error[3.0]


# ---- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_comparison_has_both_columns() -> None:
    """The table of methods: an objective above log p(x) at β = 0.1 stands beside an ELBO below it."""
    x = ez.load_data("digits-binary").x[:40]
    options = {**SMALL, "steps": 300, "schedule": "cosine", "kl_weight": 0.1}
    row = ez.compare("beta-vae", x, methods=["amortized"], seeds=1, **options).table.iloc[0]
    assert row["objective"] > row["log_evidence"] >= row["elbo"] - Z_BOUND * row["elbo_se"]
    assert row["gap"] > 0


@pytest.mark.slow
def test_a_dearer_code_separates_the_factors_of_sprites_more() -> None:
    """Sprites at every second place, three seeds: mean MIG and completeness at β = 4 at least 1.4 times those at 0.1.

    What is compared is the codes that are left when bits are dear with those when they are cheap; single seeds differ
    by as much, and which axes are found is theirs to decide.
    """
    data = ez.load_data("sprites")
    assert data.factors is not None
    chosen = (data.factors[:, 2:] % 2 == 0).all(1)
    x, factors = data.x[chosen], data.factors[chosen]
    options = {"latent_dim": 4, "hidden": 32, "steps": 400, "schedule": "cosine", "particles": 1, "progress": False}

    def means(weight: float, factors: Tensor) -> dict[str, float]:
        found = [fit.disentanglement(factors, trees=50).as_dict() for fit in fits[weight]]
        return {name: float(np.mean([each[name] for each in found])) for name in ("mig", "completeness")}

    fits = {
        weight: [ez.fit("beta-vae", x, guide="amortized", kl_weight=weight, seed=seed, **options) for seed in range(3)]
        for weight in (0.1, 4.0)
    }
    cheap, dear = means(0.1, factors), means(4.0, factors)
    assert all(dear[name] > 1.4 * cheap[name] for name in dear), (cheap, dear)
    # Negative control: of factors that belong to other images neither knows more.
    with isolated(0):
        shuffled = factors[torch.randperm(len(factors))]
    cheap, dear = means(0.1, shuffled), means(4.0, shuffled)
    assert not all(dear[name] > 1.4 * cheap[name] for name in dear), (cheap, dear)
