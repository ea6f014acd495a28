"""EM's loop: restarts side by side, extrapolated steps, and when to stop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from contract import entry_for, every_entry, example_data
from torch import Tensor

import elbozoo as ez
from elbozoo.inference import em
from elbozoo.inference.acceleration import Squarem
from elbozoo.inference.convergence import MonotoneMonitor
from elbozoo.inference.em import EMOptions, run_em
from elbozoo.models import get_entry
from elbozoo.models.contract.entry import SupportsEM
from elbozoo.models.contract.isolation import isolated


class _Never:
    """No entry is one."""


def overlapping(rows: int, columns: int, apart: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x[: rows // 2] += apart
    return x


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_restarts_side_by_side_are_those_one_by_one(covariance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start's log-likelihoods to 1e-9 relative, of as many iterations, and the same best."""
    x = ez.load_data("iris").x
    cls: Any = get_entry("gaussian-mixture")

    def runs(seed: int) -> list[em.EMRun]:
        entry = cls.from_data(x, components=3, covariance=covariance)
        return list(
            em._runs(entry, em._Data.of(entry, x, None, seed, 1), EMOptions(), 6, seed, lambda done, text="": None)
        )

    together, other = runs(0), runs(1)
    best = run_em(cls.from_data(x, components=3, covariance=covariance), x, EMOptions(restarts=6), seed=0)
    monkeypatch.setattr(em, "SharesPasses", _Never)
    alone = runs(0)
    best_alone = run_em(cls.from_data(x, components=3, covariance=covariance), x, EMOptions(restarts=6), seed=0)

    def histories(runs: list[em.EMRun]) -> list[np.ndarray]:
        return [run.trajectory.frame()["log_evidence"].to_numpy() for run in runs]

    for one, two in zip(histories(together), histories(alone), strict=True):
        assert len(one) == len(two)
        assert (np.abs(one - two) <= 1e-9 * np.abs(two)).all()
    assert any(len(a) != len(b) for a, b in zip(histories(other), histories(alone), strict=True))
    assert best.log_evidence == pytest.approx(best_alone.log_evidence, rel=1e-9)
    for name, value in best.state.items():
        assert (value - best_alone.state[name]).abs().max() <= 1e-5 * value.abs().max(), name


def test_of_equal_maxima_the_first_start_is_kept() -> None:
    """Rounding must not choose among names of the same mixture; a better start is taken."""
    entry = get_entry("ppca").from_data(ez.load_data("iris").x)
    run = run_em(entry, ez.load_data("iris").x, EMOptions(iterations=5), seed=0, progress=False)
    closer = run._replace(log_evidence=run.log_evidence + 1e-10 * abs(run.log_evidence))
    better = run._replace(log_evidence=run.log_evidence + 1e-6 * abs(run.log_evidence))
    assert not em._is_better(closer, run) and em._is_better(better, run)
    assert not em._is_better(better._replace(degeneracy="collapsed"), run)


def test_interrupted_starts_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C in the fourth E step: what there is comes back, finite, and marked as cut short."""
    x = ez.load_data("iris").x
    cls: Any = get_entry("gaussian-mixture")
    entry = cls.from_data(x, components=3)
    inner, calls = cls.expected_statistics_together.__func__, iter(range(10**6))

    def interrupted(_: type, entries: Any, part: Tensor) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return inner(cls, entries, part)

    monkeypatch.setattr(cls, "expected_statistics_together", classmethod(interrupted))
    run = run_em(entry, x, EMOptions(restarts=3), seed=0, progress=False)
    assert run.interrupted and not run.converged and len(run.trajectory.rows) == 3
    assert np.isfinite(run.log_evidence)


def slow_cases() -> Iterator[tuple[str, str, Tensor, dict[str, Any], float]]:
    """Entry, data, options, and how many times fewer E steps extrapolation must need."""
    iris, wine = ez.load_data("iris").x, ez.load_data("wine-standardised").x
    yield "iris, a Heywood case", "factor-analysis", iris, {"latent_dim": 1}, 10
    yield "wine", "factor-analysis", wine, {"latent_dim": 2}, 1.5
    yield (
        "two that overlap",
        "gaussian-mixture",
        overlapping(500, 2, 1.0, 1),
        {"components": 2, "covariance": "tied"},
        2,
    )
    yield "two regimes", "poisson-mixture", (5 + 2 * overlapping(500, 2, 1.0, 2)).abs().round(), {"components": 2}, 1.5


@pytest.mark.parametrize("case", list(slow_cases()), ids=lambda case: case[0])
def test_squarem_ends_where_em_does_in_fewer_steps(case: tuple[str, str, Tensor, dict[str, Any], float]) -> None:
    """Never falling, and no further from the maximum than three times the tolerance of 1e-6 nats per datum."""
    _, name, x, options, gain = case
    cls = get_entry(name)

    def climb(acceleration: str, tolerance: float, iterations: int = 3000) -> em.EMRun:
        settings = EMOptions(restarts=1, acceleration=acceleration, tolerance=tolerance, iterations=iterations)  # type: ignore[arg-type]
        return run_em(cls.from_data(x, **options), x, settings, seed=0, progress=False)

    plain, fast, best = climb("none", 1e-6), climb("squarem", 1e-6), climb("squarem", 1e-11)
    history = fast.trajectory.frame()["log_evidence"].to_numpy()
    assert (np.diff(history) >= -1e-9 * np.abs(history[1:])).all()
    assert fast.converged
    assert fast.log_evidence >= max(best.log_evidence, plain.log_evidence) - 3e-6 * len(x)
    assert gain * len(history) <= len(plain.trajectory.rows)
    assert history[0] < fast.log_evidence - 3e-6 * len(x)


def test_a_step_that_lowers_the_likelihood_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extrapolations that all go the wrong way leave EM's own steps, of the same log-likelihoods to rounding."""
    x = ez.load_data("wine-standardised").x
    cls = get_entry("factor-analysis")
    right, taken_back = Squarem.take_back, []

    def astray(self: Squarem, start: Tensor, once: Tensor, twice: Tensor) -> None:
        self._iterates, self._fallback = [twice], twice
        self._set(start - 30 * (twice - start))
        self.has_jumped = True

    monkeypatch.setattr(Squarem, "_extrapolate", astray)
    monkeypatch.setattr(Squarem, "take_back", lambda self: taken_back.append(1) or right(self))
    runs = [
        run_em(
            cls.from_data(x, latent_dim=2),
            x,
            EMOptions(acceleration=acceleration, iterations=iterations, tolerance=1e-300),  # type: ignore[arg-type]
            seed=0,
            progress=False,
        )
        for acceleration, iterations in (("none", 21), ("squarem", 31))
    ]
    plain, fast = (run.trajectory.frame()["log_evidence"].to_numpy() for run in runs)
    assert len(taken_back) == 10
    assert np.abs(np.unique(fast) - np.unique(plain)).max() <= 1e-10 * np.abs(plain).max()
    # Each trial is a row of its own, with the log-likelihood of what was kept.
    assert len(fast) == 31 and (np.diff(fast) == 0).sum() == 10


def test_a_step_out_of_the_computable_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A covariance that overflows ends the trial and not the fit; EM that comes there by itself is an error."""
    x = ez.load_data("iris").x
    cls = get_entry("gaussian-mixture")
    right = Squarem._extrapolate

    def to_infinity(self: Squarem, start: Tensor, once: Tensor, twice: Tensor) -> None:
        right(self, start, once, twice)
        self._set(1e200 * twice)
        self.has_jumped = True

    monkeypatch.setattr(Squarem, "_extrapolate", to_infinity)
    options = EMOptions(restarts=2, acceleration="squarem", iterations=200)
    run = run_em(cls.from_data(x, components=2), x, options, seed=0, progress=False)
    assert run.converged and np.isfinite(run.log_evidence)
    entry: Any = cls.from_data(x, components=2)
    with torch.no_grad():
        entry.factor.mul_(1e200)
    with pytest.raises(torch.linalg.LinAlgError):
        run_em(entry, x, EMOptions(restarts=1), seed=0, progress=False)


@pytest.mark.parametrize("name", [n for n in every_entry() if isinstance(get_entry(n).example(), SupportsEM)])
def test_squarem_never_falls_with_any_entry(name: str) -> None:
    """At no step by more than rounding, 1e-9 relative; and it rises."""
    entry, x = entry_for(name), example_data(name)
    with isolated(0):
        entry.initialize(x)
    options = EMOptions(restarts=1, acceleration="squarem", iterations=60, tolerance=1e-9)
    history = run_em(entry, x, options, seed=0, progress=False).trajectory.frame()["log_evidence"].to_numpy()
    slack = 1e-9 * np.maximum(np.abs(history[1:]), len(x))
    assert (np.diff(history) >= -slack).all()
    assert history[-1] > history[0]


def test_gains_across_a_jump_are_not_taken_for_a_rate() -> None:
    """EM that gains a thousandth of what it did, right after a jump, has not converged; without one it has."""
    values = [-100.0, -10.0, -9.9999, -9.9999 + 1e-9]
    for jumped, expected in ((False, True), (True, False)):
        monitor = MonotoneMonitor(1e-6, 1)
        found = [monitor.update(value, jumped=jumped and step == 2) for step, value in enumerate(values)]
        assert found[-1] == expected


def test_jumps_that_still_gain_are_not_the_end() -> None:
    """Steps that gain nothing between jumps that each gain 1e-3: goes on; when the jumps stop gaining too, it ends."""
    monitor, value, ended = MonotoneMonitor(1e-6, 1), 0.0, []
    for cycle in range(40):
        value += 1e-3 if cycle < 20 else 0.0
        ended.append([monitor.update(value, jumped=jumped) for jumped in (cycle > 0, False, False)][-1])
    assert not any(ended[1:20]) and ended[-1]


def test_the_slowest_rate_known_bounds_the_tail() -> None:
    """Gains that halve leave as much again; where a direction is known to lose a hundredth a step, 99 times."""
    monitor = MonotoneMonitor(1e-6, 1)
    for value in (-4.0, -2.0, -1.0):
        monitor.update(value)
    assert monitor.remaining() == pytest.approx(1.0, rel=1e-12)
    monitor.slowest = 0.99
    assert monitor.remaining() == pytest.approx(99.0, rel=1e-9)


def test_what_comes_back_was_judged() -> None:
    """Wherever the iterations run out, θ is one whose log p(x) was computed, never an extrapolation on trial."""
    x = ez.load_data("wine-standardised").x
    for iterations in range(1, 31):
        entry = get_entry("factor-analysis").from_data(x, latent_dim=4)
        options = EMOptions(iterations=iterations, acceleration="squarem")
        run = run_em(entry, x, options, seed=0, progress=False)
        with torch.no_grad():
            assert float(entry.log_evidence(x).sum()) >= run.log_evidence - 1e-9 * abs(run.log_evidence)
