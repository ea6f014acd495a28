"""The SVI loop: the same trajectory as Pyro's own SVI, and what it does when something goes wrong."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule

import elbozoo as ez
from elbozoo.guides import build_guide
from elbozoo.inference.convergence import PlateauMonitor
from elbozoo.inference.losses import BetaELBO
from elbozoo.inference.objectives import OBJECTIVES, resolve_objective
from elbozoo.inference.steps import PyroStep
from elbozoo.inference.svi import TrainingOptions, run_svi
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.isolation import isolated

STEPS = 20


def pair(model: str, guide: str, seed: int = 0, **options: Any) -> tuple[Any, Any, Batch]:
    x = ez.load_data("iris").x[::3]
    entry = get_entry(model).from_data(x, seed=seed, **options)
    with isolated(seed):
        return entry, build_guide(guide, entry, x), Batch.full(x)


@pytest.mark.parametrize(
    ("model", "guide", "objective"),
    [
        ("ppca", "mean-field", "elbo"),
        ("ppca", "amortized-full-rank-normal", "elbo"),
        ("factor-analysis", "amortized", "elbo-analytic"),
        ("gaussian-mixture", "free-categorical", "elbo-enumerated"),
        ("normal-mean", "full-rank", "elbo"),
    ],
)
def test_our_step_is_pyros_svi_on_the_same_noise(model: str, guide: str, objective: str) -> None:
    """Twenty losses of ours and of pyro.infer.SVI with Pyro's Adam agree to 1e-9 relative; other noise does not."""
    options = TrainingOptions(steps=STEPS, particles=2, schedule="constant")
    entry, q, batch = pair(model, guide)
    with isolated(3):
        ours = run_svi(entry, q, OBJECTIVES[objective], batch, options, progress=False).trajectory.frame()["objective"]

    def by_pyro(seed: int) -> list[float]:
        entry, q, batch = pair(model, guide)
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(seed)
            optimizer = pyro.optim.Adam({"lr": options.learning_rate})
            svi = pyro.infer.SVI(entry, q, optimizer, OBJECTIVES[objective].build(2, q))
            return [-svi.step(batch) for _ in range(STEPS)]

    assert ours.tolist() == pytest.approx(by_pyro(3), rel=1e-9)
    if objective != "elbo-enumerated":
        assert ours.tolist() != pytest.approx(by_pyro(4), rel=1e-9)


def test_interruption_returns_the_fit_so_far() -> None:
    """Control-C is not an error: what was reached is kept and marked."""
    entry, q, batch = pair("ppca", "mean-field")

    class Interrupted(PyroStep):
        calls = 0

        def __call__(self, batch: Batch) -> float:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().__call__(batch)

    with isolated(0):
        result = run_svi(entry, q, OBJECTIVES["elbo"], batch, TrainingOptions(), progress=False, make_step=Interrupted)
    assert result.interrupted and not result.converged
    assert len(result.trajectory.rows) == 3


def test_a_breakdown_names_step_site_and_remedy() -> None:
    """A step size far too large ends in one line, not in NaN in a table; a sensible one goes through."""
    with pytest.raises(NumericalFailure, match=r"step \d+: .*(parameter|site).*try a smaller learning_rate") as caught:
        ez.fit("ppca", "iris", guide="mean-field", learning_rate=1e6, steps=200)
    assert "\n" not in str(caught.value)
    ez.fit("ppca", "iris", guide="mean-field", steps=3)


def test_a_site_without_a_finite_log_probability_is_named() -> None:
    """The model's site, where the parameters themselves are finite."""

    class Overflowing(PyroModule):
        def forward(self, batch: Batch) -> torch.Tensor:
            with pyro.plate("data", batch.total, subsample=batch.index):
                z = pyro.sample("z", dist.Normal(batch.x.new_zeros(()), 1.0))
                rate = (1e4 * (z + 10)).exp()
                return pyro.sample("x", dist.Normal(rate[..., None], 1.0).to_event(1), obs=batch.x)

    with pytest.raises(NumericalFailure, match="site 'x' of the model"):
        ez.fit(Overflowing(), torch.ones(4, 1), guide="free-diagonal-normal", steps=3)


def test_minibatches_cover_the_data_and_are_unbiased() -> None:
    """Every epoch is a permutation cut into whole minibatches; their mean loss is the full one within six errors."""
    seen: list[torch.Tensor] = []

    class Recording(PyroStep):
        def __call__(self, batch: Batch) -> float:
            seen.append(batch.index)
            assert batch.total == 50
            return super().__call__(batch)

    entry, q, batch = pair("ppca", "mean-field")
    options = TrainingOptions(steps=10, batch_size=10, learning_rate=1e-12, schedule="constant", particles=50)
    with isolated(0):
        small = run_svi(entry, q, OBJECTIVES["elbo"], batch, options, progress=False, make_step=Recording)
        full = run_svi(
            entry, q, OBJECTIVES["elbo"], batch, options.model_copy(update={"batch_size": 50}), progress=False
        )
    for epoch in (seen[:5], seen[5:]):
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(50))
    losses, whole = small.trajectory.frame()["objective"], full.trajectory.frame()["objective"]
    # Two epochs average out which rows came together, so that only the draws' noise is left.
    error = 6 * math.hypot(whole.std() * math.sqrt(5 / 10), whole.std() / math.sqrt(10))
    assert abs(losses.mean() - whole.mean()) <= error
    assert abs(losses.mean() / 5 - whole.mean()) > error


def test_clipping_and_schedules_move_the_parameters_less() -> None:
    """`clip_norm` bounds the gradient per datum; the cosine schedule ends at a step size of almost nothing."""
    entry, q, batch = pair("ppca", "mean-field")
    step = PyroStep(entry, q, OBJECTIVES["elbo"], 1, TrainingOptions(clip_norm=1e-3))
    with isolated(0):
        step(batch)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in step.parameters if p.grad is not None))
    assert norm == pytest.approx(1e-3 * batch.total, rel=1e-3)
    step.scale_learning_rate(0.1)
    assert step.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    cosine = ez.fit("ppca", "iris", schedule="cosine", steps=50)
    assert cosine.converged and len(cosine.trajectory) == 50


def test_a_moving_beta_is_told_the_step_and_stops_no_fit() -> None:
    """β is that of the step taken; plateaus are looked for once it rests, which they otherwise are from the start."""
    seen: list[float] = []

    class Recording(PyroStep):
        def __call__(self, batch: Batch) -> float:
            loss = super().__call__(batch)
            assert isinstance(self.elbo, BetaELBO)
            seen.append(float(self.elbo.beta))
            return loss

    lengths = []
    for schedule in ("annealed", "constant"):
        entry, q, batch = pair("ppca", "mean-field")
        # A tolerance that calls every window flat.
        options = TrainingOptions(tolerance=1e9, kl_schedule=schedule, kl_steps=150, kl_weight=3.0)
        with isolated(0):
            run = run_svi(entry, q, OBJECTIVES["beta"], batch, options, progress=False, make_step=Recording)
        lengths.append(len(run.trajectory.rows))
    assert seen[:150] == pytest.approx([3.0 * step / 150 for step in range(150)])
    assert set(seen[150:]) == {3.0}
    assert lengths[0] == lengths[1] + 150


def test_convergence_is_said_only_where_it_was_seen() -> None:
    """A fit stopped by its number of steps has not converged; one that went flat has."""
    assert not ez.fit("ppca", "iris", steps=50).converged
    done = ez.fit("ppca", "iris", latent_dim=1)
    assert done.converged and len(done.trajectory) < 10_000


def test_the_plateau_monitor_tells_a_rise_from_noise() -> None:
    """A steady rise above the tolerance never ends a window flat; noise around a constant does at the second window."""
    rising, flat = PlateauMonitor(1e-3, window=20), PlateauMonitor(1e-3, window=20)
    noise = torch.randn(200).tolist()
    assert not any(rising.update(0.1 * i + 0.01 * e) for i, e in enumerate(noise))
    assert any(flat.update(5.0 + 0.1 * e) for e in noise[:80])


def test_no_progress_is_written_where_standard_error_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Logs are not for bars."""
    ez.fit("ppca", "iris", steps=5)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_objectives_that_do_not_suit_a_guide_are_refused() -> None:
    """With the reason, and what to use."""
    with pytest.raises(InvalidInput, match="cannot be enumerated; use elbo"):
        ez.fit("ppca", "iris", objective="elbo-enumerated", steps=1)
    with pytest.raises(InvalidInput, match="did you mean 'elbo-analytic'"):
        ez.fit("ppca", "iris", objective="elbo-analytical", steps=1)
    _, q, _ = pair("gaussian-mixture", "free-categorical")
    assert resolve_objective("auto", q).name == "elbo-enumerated"


@pytest.mark.parametrize("objective", ["elbo", "elbo-analytic"])
def test_objectives_estimate_the_same_elbo(objective: str) -> None:
    """Means over 400 untrained losses agree with the evaluated ELBO within six standard errors."""
    entry, q, batch = pair("ppca", "mean-field")
    options = TrainingOptions(steps=400, learning_rate=1e-12, schedule="constant", objective=objective, particles=1)
    with isolated(1):
        losses = run_svi(entry, q, OBJECTIVES[objective], batch, options, progress=False).trajectory.frame()[
            "objective"
        ]
    from elbozoo.inference.ledger import elbo_estimate
    from elbozoo.inference.weights import importance_weights

    value, error = elbo_estimate(importance_weights(entry, q, batch, 4000, seed=5))
    bound = 6 * math.hypot(error, losses.std() / math.sqrt(len(losses)))
    assert abs(losses.mean() - value) <= bound
    assert abs(losses.mean() - value + 3 * bound) > bound


def test_trajectory_pairs_each_bound_with_the_evidence_at_the_same_parameters() -> None:
    """With the exact guide the two are one number at every step (1e-9 relative); a step apart they are not."""
    trajectory = ez.fit("gaussian-mixture", "iris", guide="exact", steps=15).trajectory
    assert trajectory["elbo"].tolist() == pytest.approx(trajectory["log_evidence"].tolist(), rel=1e-9)
    assert trajectory["elbo"][1:].tolist() != pytest.approx(trajectory["log_evidence"][:-1].tolist(), rel=1e-9)
