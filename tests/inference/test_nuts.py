"""NUTS against posteriors that are known, and what it says when it cannot be trusted.

Means of draws are held against the truth in units of their Monte Carlo standard error, as ArviZ estimates it from the
chains; seeds are fixed, so a run that passes passes again on the same machine.
"""

from __future__ import annotations

import math
from typing import Any

import arviz
import numpy as np
import pyro
import pytest
import torch
from contract import example_data, joint_trace
from pyro import distributions as dist
from pyro.infer import NUTS
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

import elbozoo as ez
from elbozoo.guides.draws import DrawsGuide
from elbozoo.inference import nuts
from elbozoo.inference.nuts import NUTSOptions, NUTSRun, diagnostics, run_nuts
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.collapse import collapsed
from elbozoo.models.contract.entry import Program
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.isolation import isolated

SCHOOLS = ez.load_data("eight-schools").x
Z = 5.0  # a false alarm of 6e-7 for each number compared, if its standard error were known


def z_scores(draws: Tensor, mean: Tensor) -> np.ndarray:
    """Distance of the mean of draws (chains, draws, *event) from the truth, in Monte Carlo standard errors."""
    dataset = arviz.convert_to_dataset({"z": draws.numpy()})
    error = arviz.mcse(dataset, method="mean")["z"].to_numpy()
    return np.asarray(np.abs(draws.mean((0, 1)).numpy() - mean.numpy()) / error)


def quick(entry: Entry, x: Tensor, seed: int = 0, **options: Any) -> NUTSRun:
    return run_nuts(entry, x, NUTSOptions(**options), seed=seed, progress=False)


@pytest.fixture(scope="module")
def normal_mean() -> tuple[Entry, Tensor, NUTSRun]:
    x = get_entry("normal-mean").example(2, seed=1).simulate(20, seed=2)[0]
    entry = get_entry("normal-mean").from_data(x)
    return entry, x, quick(entry, x, chains=2, warmup=200, draws=500)


class Coin(torch.nn.Module):
    """A global mean, and a coin per row that moves it by 3: a program with something to sum out."""

    def forward(self, batch: Batch) -> Tensor:
        mean = pyro.sample("mean", dist.Normal(batch.x.new_zeros(()), 2.0))
        with pyro.plate("data", batch.total, subsample=batch.index):
            coin = pyro.sample("coin", dist.Bernoulli(batch.x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            return pyro.sample("x", dist.Normal(mean + 3 * coin, 1.0), obs=batch.x[:, 0])


COINS = torch.tensor([[0.2], [2.5], [-0.4], [1.4], [3.9]], dtype=torch.float64)


def coin_density(mean: float) -> float:
    """p(x, mean) of the coins, the coins summed out, written down a second time."""
    x = COINS[:, 0].numpy()
    return float(norm.pdf(mean, 0, 2) * np.prod(0.7 * norm.pdf(x, mean, 1) + 0.3 * norm.pdf(x, mean + 3, 1)))


# ---- the right answer ------------------------------------------------------------------------------------------------


def test_draws_have_the_mean_and_variance_of_a_known_posterior(normal_mean: tuple[Entry, Tensor, NUTSRun]) -> None:
    entry, x, run = normal_mean
    posterior = entry.posterior(x)  # type: ignore[operator]
    draws = run.draws["mu"]
    assert draws.shape == (2, 500, 2) and draws.dtype == torch.float64
    assert (z_scores(draws, posterior.mean) < Z).all()
    squares = (draws - posterior.mean).square()
    assert (z_scores(squares, posterior.variance) < Z).all()
    # Negative control: the posterior of other data, and one twice as wide.
    assert (z_scores(draws, entry.posterior(x + 0.2).mean) > Z).all()  # type: ignore[operator]
    assert (z_scores(squares, 2 * posterior.variance) > Z).all()
    assert run.converged and run.r_hat < 1.01 and run.ess >= 200 and run.divergences == 0


@pytest.mark.slow
def test_eight_schools_agree_with_quadrature_and_the_verdict_tells_the_forms_apart() -> None:
    """Non-centred: every mean within 5 standard errors. Centred: it diverges, and its verdict says so."""
    entry = get_entry("eight-schools").from_data(SCHOOLS)
    run = quick(entry, SCHOOLS, warmup=300, draws=500)
    theta = run.draws["mu"][..., None] + run.draws["tau"][..., None] * run.draws["eta"]
    draws = {"mu": run.draws["mu"], "tau": run.draws["tau"], "theta": theta}
    moments = entry.posterior_moments(SCHOOLS)  # type: ignore[operator]
    assert run.converged, run.notes
    assert all((z_scores(values, moments[site].mean) < Z).all() for site, values in draws.items())
    wider = get_entry("eight-schools").from_data(SCHOOLS, mu_scale=20.0, tau_scale=20.0)
    other = wider.posterior_moments(SCHOOLS)  # type: ignore[attr-defined]
    assert all((z_scores(values, other[site].mean) > Z).any() for site, values in draws.items())

    centred = get_entry("eight-schools").from_data(SCHOOLS, parameterization="centred")
    doubtful = quick(centred, SCHOOLS, chains=2, warmup=200, draws=200)
    assert doubtful.divergences > 0 and not doubtful.converged
    assert any("divergence" in note and "non-centred" in note for note in doubtful.notes)


@pytest.mark.slow
def test_a_finite_local_latent_is_summed_out() -> None:
    """The mean of the coins' posterior by SciPy (1e-8), within 5 standard errors; without the coins it is elsewhere."""
    total = quad(coin_density, -10, 10, epsrel=1e-10)[0]
    mean = quad(lambda m: m * coin_density(m), -10, 10, epsrel=1e-10)[0] / total
    run = quick(Program(Coin(), 1), COINS, chains=4, warmup=200, draws=250)
    assert set(run.draws) == {"mean"} and run.summed_out == ("coin",)
    assert z_scores(run.draws["mean"], torch.tensor(mean)) < Z
    assert z_scores(run.draws["mean"], COINS.mean()) > Z


def test_what_is_summed_out_here_is_what_pyro_enumerates() -> None:
    """The potential of the program without its coins, against Pyro's own enumeration of them: 1e-10 nats."""
    program, batch, position = Program(Coin(), 1), Batch.full(COINS), {"mean": torch.tensor(0.7).double()}
    with isolated(0):
        ours, theirs = NUTS(collapsed(program, ["coin"]), max_plate_nesting=1), NUTS(program, max_plate_nesting=1)
        for kernel in (ours, theirs):
            kernel.setup(1, batch)
        assert float(ours.potential_fn(position)) == pytest.approx(float(theirs.potential_fn(position)), abs=1e-10)
        assert float(ours.potential_fn(position)) == pytest.approx(-math.log(coin_density(float(position["mean"]))))
        moved = {"mean": position["mean"] + 1e-3}
        assert float(ours.potential_fn(moved)) != pytest.approx(float(theirs.potential_fn(position)), abs=1e-10)


def test_lp_is_the_log_joint_in_unconstrained_coordinates() -> None:
    """log p(x, z) + log τ, the volume of τ = exp(u): 1e-9 nats. So a draw's statistics stand beside that draw."""
    entry = get_entry("eight-schools").from_data(SCHOOLS)
    run = quick(entry, SCHOOLS, chains=2, warmup=15, draws=6)

    def log_joint(chain: int, draw: int) -> float:
        values = {name: value[chain, draw] for name, value in run.draws.items()}
        joint = joint_trace(entry, Batch.full(SCHOOLS), values).log_prob_sum()
        return float(joint + values["tau"].log())

    for chain, draw in ((0, 0), (0, 5), (1, 3)):
        assert float(run.statistics["lp"][chain, draw]) == pytest.approx(log_joint(chain, draw), abs=1e-9)
        assert float(run.statistics["lp"][chain, draw]) != pytest.approx(log_joint(1 - chain, draw), abs=1e-9)
    assert (run.statistics["n_steps"] >= 1).all() and (run.statistics["step_size"] > 0).all()
    objective = run.trajectory.frame()["objective"].to_numpy().reshape(2, 21)
    np.testing.assert_array_equal(objective[:, 15:], run.statistics["lp"].numpy())


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_same_seed_same_draws_and_the_callers_state_stays() -> None:
    x = example_data("normal-mean")
    entry = get_entry("normal-mean").from_data(x)
    before = torch.get_rng_state()
    runs = [quick(entry, x, seed, chains=2, warmup=10, draws=8) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].draws["mu"], runs[1].draws["mu"])
    assert not torch.equal(runs[0].draws["mu"], runs[2].draws["mu"])
    assert not torch.equal(runs[0].draws["mu"][0], runs[0].draws["mu"][1])
    # A chain does not depend on how many run beside it.
    alone = quick(entry, x, 3, chains=1, warmup=10, draws=8)
    assert torch.equal(alone.draws["mu"][0], runs[0].draws["mu"][0])


# ---- the verdict -----------------------------------------------------------------------------------------------------


def test_diagnostics_are_those_of_arviz_over_all_scalars() -> None:
    torch.manual_seed(0)
    draws = {"a": torch.randn(4, 200).double(), "b": torch.randn(4, 200, 2, 3).double()}
    dataset = arviz.convert_to_dataset({name: value.numpy() for name, value in draws.items()})
    r_hat, ess = diagnostics(draws)
    assert r_hat == max(float(arviz.rhat(dataset)[name].max()) for name in draws)
    assert ess == min(float(arviz.ess(dataset, method=m)[name].min()) for m in ("bulk", "tail") for name in draws)
    assert r_hat < 1.02 and ess > 300
    draws["b"][2, :, 1, 1] += 1.0
    assert diagnostics(draws)[0] > 1.05


def test_constants_are_left_out_and_a_stuck_chain_is_not() -> None:
    torch.manual_seed(0)
    moving = torch.randn(4, 100, 1).double()
    with_constant = torch.cat([moving, torch.ones(4, 100, 1)], -1)
    assert diagnostics({"z": with_constant}) == diagnostics({"z": moving})
    stuck = moving.clone()
    stuck[1] = 0.5
    r_hat, ess = diagnostics({"z": stuck})
    assert not (r_hat < nuts.R_HAT and ess >= 400)
    each_stuck = torch.arange(4.0).double()[:, None].expand(4, 100)
    r_hat, ess = diagnostics({"z": each_stuck})
    assert not (r_hat < nuts.R_HAT and ess >= 400)


def test_divergences_are_counted_and_say_what_to_do() -> None:
    """A wall that no step can follow: beyond z = 0.5 the density is e^-500000 of what it is before."""

    def wall(batch: Batch) -> Tensor:
        z = pyro.sample("z", dist.Normal(batch.x.new_zeros(()), 1.0))
        with pyro.plate("data", batch.total, subsample=batch.index):
            scale = torch.where(z > 0.5, 1e-3, 1.0)
            return pyro.sample("x", dist.Normal(torch.ones_like(scale), scale), obs=batch.x[:, 0])

    run = quick(Program(wall, 1), COINS, chains=2, warmup=30, draws=60)
    assert run.divergences == int(run.statistics["diverging"].sum()) > 0
    assert run.statistics["diverging"].dtype == torch.bool
    assert not run.converged
    assert f"{run.divergences} divergence" in run.notes[-1] and "raise target_acceptance" in run.notes[-1]
    assert "r-hat" in run.notes[0] and "ESS" in run.notes[0]


def test_one_chain_is_never_converged(caplog: pytest.LogCaptureFixture) -> None:
    x = example_data("normal-mean")
    run = quick(get_entry("normal-mean").from_data(x), x, chains=1, warmup=20, draws=20)
    assert math.isnan(run.r_hat) and not run.converged
    assert "need at least 2" in run.notes[0]
    assert not caplog.records


# ---- what does not work ----------------------------------------------------------------------------------------------


def test_local_latents_are_refused() -> None:
    x = example_data("ppca")
    with pytest.raises(InvalidInput, match="the latent 'z' of ppca is local, one per datum") as caught:
        quick(get_entry("ppca").from_data(x), x)
    assert "\n" not in str(caught.value)
    x = example_data("gaussian-mixture")
    with pytest.raises(InvalidInput, match="the latents of gaussian-mixture are local"):
        quick(get_entry("gaussian-mixture").from_data(x), x)


def test_a_finite_global_latent_is_refused() -> None:
    def program(batch: Batch) -> Tensor:
        which = pyro.sample("which", dist.Bernoulli(batch.x.new_tensor(0.5)))
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Normal(which, 1.0), obs=batch.x[:, 0])

    with pytest.raises(InvalidInput, match="'which' of program takes 2 values, expected a continuous one"):
        quick(Program(program, 1), COINS)


def test_a_program_without_a_finite_start_fails_in_one_line() -> None:
    def program(batch: Batch) -> Tensor:
        z = pyro.sample("z", dist.Normal(batch.x.new_zeros(()), 1.0))
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Normal(z * math.inf, 1.0, validate_args=False), obs=batch.x[:, 0])

    with pytest.raises(NumericalFailure, match="nuts cannot start: log p") as caught:
        quick(Program(program, 1), COINS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("calls", "kept"), [(25, (1, 10)), (18, (1, 8))])
def test_an_interrupt_keeps_what_is_finished(
    calls: int, kept: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second chain, the first is kept; in the first, what it has drawn so far; in its warm-up, nothing."""
    x = example_data("normal-mean")
    entry = get_entry("normal-mean").from_data(x)
    whole = quick(entry, x, chains=3, warmup=10, draws=10)
    interrupt_after(calls, monkeypatch)
    run = quick(entry, x, chains=3, warmup=10, draws=10)
    assert run.interrupted and not run.converged
    assert run.draws["mu"].shape[:2] == kept
    assert torch.equal(run.draws["mu"][0], whole.draws["mu"][0, : kept[1]])


def test_an_interrupt_before_the_first_draw_has_nothing_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    x = example_data("normal-mean")
    interrupt_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quick(get_entry("normal-mean").from_data(x), x, chains=3, warmup=10, draws=10)


def interrupt_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, made = NUTS.sample, [0]

    def interrupted(self: NUTS, position: dict[str, Tensor]) -> dict[str, Tensor]:
        made[0] += 1
        if made[0] > calls:
            raise KeyboardInterrupt
        return sample(self, position)  # type: ignore[no-any-return]

    monkeypatch.setattr(NUTS, "sample", interrupted)


# ---- draws as a guide ------------------------------------------------------------------------------------------------


def draws_guide() -> DrawsGuide:
    """Six draws in two chains, of two sites that tell which draw they come from."""
    number = torch.arange(6.0).double().reshape(2, 3)
    draws = {"a": number, "nested.b": number[..., None] * torch.tensor([1.0, 10.0]).double()}
    return DrawsGuide(draws, {"diverging": number > 4}, summed_out=("z",))


@pytest.mark.parametrize("particles", [None, 7])
def test_all_sites_come_from_the_same_draw(particles: int | None) -> None:
    guide, batch = draws_guide(), Batch.full(COINS)
    with isolated(0):
        if particles is None:
            values, shape = guide(batch), ()
        else:
            with pyro.plate("particles", particles, dim=-2):
                values, shape = guide(batch), (particles, 1)
    assert values["a"].shape == shape and values["nested.b"].shape == (*shape, 2)
    assert torch.equal(values["nested.b"][..., 1], 10 * values["a"])
    assert particles is None or len(values["a"].unique()) > 1


def test_every_draw_is_as_probable_as_any_other() -> None:
    """Counts of 6 draws in 6000 particles: each within 5 standard errors of 1000."""
    with isolated(0), pyro.plate("particles", 6000, dim=-2):
        picked = draws_guide()(Batch.full(COINS))["a"]
    counts = torch.bincount(picked.flatten().long(), minlength=6)
    error = math.sqrt(6000 / 6 * 5 / 6)
    assert ((counts - 1000).abs() < 5 * error).all()
    assert not ((1.2 * counts - 1000).abs() < 5 * error).all()


def test_the_guide_comes_back_from_its_state() -> None:
    guide = draws_guide()
    back = DrawsGuide.from_state(guide.state_dict()).double()
    for name, values in guide.draws.items():
        assert torch.equal(back.draws[name], values)
    assert torch.equal(back.statistics["diverging"], guide.statistics["diverging"])
    assert back.statistics["diverging"].dtype == torch.bool
    assert back.summed_out == guide.summed_out == ("z",)
    assert not back.is_bound and not back.is_local and back.name == DrawsGuide.NAME and not list(back.parameters())


def test_importance_weights_of_draws_are_log_joints(normal_mean: tuple[Entry, Tensor, NUTSRun]) -> None:
    """Without a density their log weight is log p(x, z) of one of the draws: in lp to 1e-9 nats."""
    entry, x, run = normal_mean
    weights = importance_weights(entry, run.guide(), Batch.full(x), 50, seed=0).elbo().flatten()
    distance = (weights[:, None] - run.statistics["lp"].flatten()).abs().amin(1)
    assert float(distance.max()) < 1e-9
    assert float((weights[:, None] + 0.01 - run.statistics["lp"].flatten()).abs().amin(1).max()) > 1e-9
