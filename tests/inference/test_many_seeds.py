"""Many seeds as one batch: each ends where it would end alone.

A batch does the same operations on larger tensors, so what differs is rounding: 1e-5 relative along a fit.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import example_data
from torch import Tensor

import elbozoo as ez
from elbozoo.inference import many_seeds
from elbozoo.inference.fit import Fit
from elbozoo.inference.method import plan
from elbozoo.inference.records import Records
from elbozoo.models.contract.errors import NumericalFailure

STEPS = 30
TOLERANCE = 1e-5


def prepared(name: str, guide: str, **options: Any) -> Any:
    return plan(name, example_data(name), guide, {"steps": STEPS, "engine": "captured", **options})


def together(name: str, guide: str, seeds: list[int], **options: Any) -> list[Fit]:
    """The fits, which must have been run as one."""
    calls = []
    with pytest.MonkeyPatch.context() as patched:
        run = many_seeds.run_together
        patched.setattr(
            "elbozoo.inference.method.run_together", lambda *a, **k: calls.append(len(a[0])) or run(*a, **k)
        )
        fits = list(prepared(name, guide, **options).run_all(seeds, progress=False))
    assert calls == [len(seeds)]
    return fits


def objectives(fit: Fit) -> np.ndarray:
    values: np.ndarray = fit.trajectory["objective"].to_numpy()
    return values


def difference(one: Fit, other: Fit) -> float:
    """Largest relative difference of objectives and of parameters."""
    a, b = objectives(one), objectives(other)
    assert len(a) == len(b)
    pairs = zip(one.guide.parameters(), other.guide.parameters(), strict=True)
    of_guide = [float((p - q).detach().abs().max() / q.abs().max().clamp(min=1e-3)) for p, q in pairs]
    return max(float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)))), *of_guide, 0.0)


CASES = {
    "free": ("ppca", "mean-field", {}),
    "encoder": ("vae", "amortized", {}),
    "minibatches": ("vae", "amortized", {"batch_size": 7}),
    "free, minibatches": ("ppca", "mean-field", {"batch_size": 7}),
    "enumerated": ("gaussian-mixture", "amortized", {}),
    "score of a class": ("gaussian-mixture", "amortized", {"objective": "elbo", "gradient": "score"}),
    "global": ("eight-schools", "full-rank", {}),
    "annealed": ("vae", "amortized", {"objective": "beta", "kl_schedule": "annealed", "kl_steps": 20}),
    "corrupted": ("denoising-autoencoder", "amortized", {"batch_size": 7}),
    "iwae": ("vae", "amortized", {"objective": "iwae"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_seed_ends_where_it_ends_alone(case: str) -> None:
    """Batched, captured alone and eager alone; another seed does not (negative control)."""
    name, guide, options = CASES[case]
    fits = together(name, guide, [3, 5, 0], **options)
    assert [fit.seed for fit in fits] == [3, 5, 0]
    for fit in fits[:2]:
        for engine in ("eager", "captured"):
            alone = prepared(name, guide, **{**options, "engine": engine}).run(fit.seed, progress=False)
            assert difference(fit, alone) <= TOLERANCE
    assert difference(fits[0], fits[1]) > TOLERANCE


@pytest.mark.slow
def test_compiled_seeds_end_where_they_end_alone() -> None:
    """Machine code for four seeds at once."""
    fits = together("ppca", "amortized", [0, 1, 2, 3], engine="compiled")
    for fit in fits:
        alone = prepared("ppca", "amortized", engine="eager").run(fit.seed, progress=False)
        assert difference(fit, alone) <= TOLERANCE


def test_seeds_end_one_by_one_and_stop_costing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed keeps its own schedule: it ends at the step at which it ends alone, and then leaves the batch."""
    sizes = []
    step = many_seeds._SeedBatch.step

    def counted(self: Any, running: Any) -> Any:
        result = step(self, running)
        sizes.append(len(self.slots))
        return result

    monkeypatch.setattr(many_seeds._SeedBatch, "step", counted)
    options = {"steps": 3000, "tolerance": 0.05, "learning_rate": 0.05, "particles": 1}
    fits = together("ppca", "mean-field", list(range(6)), **options)
    lengths = [len(fit.trajectory) for fit in fits]
    assert all(fit.converged for fit in fits) and len(set(lengths)) > 1
    for fit in fits[:2]:
        alone = prepared("ppca", "mean-field", **options).run(fit.seed, progress=False)
        assert len(alone.trajectory) == len(fit.trajectory) and difference(fit, alone) <= 1e-4  # over 600 steps
    assert sizes[0] == 6 and sizes == sorted(sizes, reverse=True) and sizes[-1] <= 3
    for at, size in enumerate(sizes, start=1):
        running = sum(length > at for length in lengths)
        assert size < 2 * max(running, 1) or running == size  # never more than twice as many slots as seeds


def test_a_comparison_of_seeds_is_the_comparison_of_each() -> None:
    """``compare(seeds=3)`` and three fits give the same figures; the table keeps its order."""
    options = {"latent_dim": 2, "steps": 250, "particles": 1}
    both = ez.compare("ppca", "iris", methods=["mean-field", "em"], seeds=3, **options)
    assert list(both.table["method"]) == ["mean-field"] * 3 + ["em"] * 3 and list(both.table["seed"]) == [0, 1, 2] * 2
    for seed in range(3):
        alone = ez.fit("ppca", "iris", guide="mean-field", seed=seed, **options)
        assert difference(both.fits[seed], alone) <= 1e-4  # over 250 steps


def test_learned_models_differ_between_seeds_and_stay_fixed() -> None:
    """Each seed's q is fitted to that seed's θ, which does not move."""
    thetas = {seed: prepared("ppca", "mean-field").run(seed, progress=False).entry for seed in (0, 1)}
    fits = list(prepared("ppca", "amortized").run_all([0, 1], thetas=thetas, progress=False))
    for fit in fits:
        alone = prepared("ppca", "amortized").run(fit.seed, theta=thetas[fit.seed], progress=False)
        assert difference(fit, alone) <= TOLERANCE
        assert torch.equal(fit.entry.loading, thetas[fit.seed].loading)


def test_validation_rows_end_each_seed_for_itself() -> None:
    """Patience is counted per seed, and each goes back to its own best parameters."""
    rows = ez.load_data("wine-standardised").x
    options = {"steps": 200, "patience": 2, "validate_every": 5, "learning_rate": 0.02, "particles": 1}
    kept = {"latent_dim": 3, "engine": "captured", "guide": "amortized", "validation": rows[60:].numpy(), **options}
    (first, second) = ez.compare(
        "ppca", rows[:20].numpy(), methods=["amortized"], seeds=2, **{k: v for k, v in kept.items() if k != "guide"}
    ).fits
    for fit in (first, second):
        alone = ez.fit("ppca", rows[:20].numpy(), seed=fit.seed, **kept)
        assert fit.validation is not None and alone.validation is not None
        assert list(fit.validation["step"]) == list(alone.validation["step"])
        assert np.abs(fit.validation["objective"] - alone.validation["objective"]).max() <= 1e-6 * 100


# ---- what is not run as one ------------------------------------------------------------------------------------------

ALONE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "values": ("hidden-markov-model", "amortized", {}, "its step cannot be captured: RuntimeError"),
    "eager": ("ppca", "mean-field", {"engine": "eager"}, "its steps are not captured"),
    "short": ("ppca", "mean-field", {"engine": "auto"}, "its steps are not captured"),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_cannot_run_as_one_runs_one_by_one_and_says_why(case: str, caplog: pytest.LogCaptureFixture) -> None:
    name, guide, options, reason = ALONE[case]
    with caplog.at_level(logging.INFO, "elbozoo"):
        fits = list(prepared(name, guide, **{"steps": 5, **options}).run_all([0, 1], progress=False))
    assert [fit.seed for fit in fits] == [0, 1]
    (line,) = [record.message for record in caplog.records if "one by one" in record.message]
    assert "2 seeds run one by one" in line and reason in line
    alone = prepared(name, guide, **{"steps": 5, **options}).run(1, progress=False)
    assert objectives(fits[1]).tolist() == objectives(alone).tolist()


def test_no_more_seeds_run_at_once_than_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seeds in batches of two, the last one alone; each ends where it ends alone."""
    monkeypatch.setattr(many_seeds, "NUMBERS_AT_ONCE", 1)
    fits = list(prepared("ppca", "mean-field").run_all(range(5), progress=False))
    assert [fit.seed for fit in fits] == list(range(5))
    for fit in fits[3:]:
        assert difference(fit, prepared("ppca", "mean-field").run(fit.seed, progress=False)) <= TOLERANCE


def test_a_seed_that_fills_the_machine_runs_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(many_seeds, "is_filling", lambda graph: True)
    with caplog.at_level(logging.INFO, "elbozoo"):
        assert len(list(prepared("ppca", "mean-field").run_all([0, 1], progress=False))) == 2
    assert "the step of one seed fills the machine" in caplog.text


def test_checkpoints_keep_fits_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = plan(
        "ppca", example_data("ppca"), "mean-field", {"steps": 5, "engine": "captured"}, records=Records(tmp_path)
    )
    with caplog.at_level(logging.INFO, "elbozoo"):
        assert len(list(kept.run_all([0, 1], progress=False))) == 2
    assert "each has checkpoints of its own" in caplog.text


def test_a_batch_that_does_not_give_each_seed_its_own_loss_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first batched losses are held against each program's own; here the mapped graph gives all the first's."""
    mapped = many_seeds.for_many_seeds

    def broken(*arguments: Any) -> Any:
        graph = mapped(*arguments)
        return lambda *inputs: [graph(*inputs)[0][:1].expand(2), *graph(*inputs)[1:]]

    monkeypatch.setattr(many_seeds, "for_many_seeds", broken)
    monkeypatch.setattr(many_seeds, "step_of_compilation", lambda *_, **__: None)
    with caplog.at_level(logging.INFO, "elbozoo"):
        fits = list(prepared("ppca", "mean-field").run_all([0, 1], progress=False))
    assert "a seed has the loss" in caplog.text
    alone = prepared("ppca", "mean-field").run(1, progress=False)
    assert objectives(fits[1]).tolist() == objectives(alone).tolist()


def test_a_seed_whose_objective_breaks_down_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NumericalFailure, match="the objective is"):
        together("ppca", "mean-field", [0, 1], learning_rate=1e300)


def interrupt_the_tenth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Control-C in the tenth step that the seeds take together."""
    step, count = many_seeds._SeedBatch.step, 0

    def interrupted(self: Any, running: Any) -> Any:
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt
        return step(self, running)

    monkeypatch.setattr(many_seeds._SeedBatch, "step", interrupted)


def test_interrupted_seeds_come_back_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C ends all of them, with what they have learned so far."""
    interrupt_the_tenth_step(monkeypatch)
    fits = together("ppca", "mean-field", [0, 1])
    alone = prepared("ppca", "mean-field", steps=10).run(0, progress=False)
    assert all(fit.interrupted and not fit.converged for fit in fits)
    assert len(fits[0].trajectory) == 10 and difference(fits[0], alone) <= TOLERANCE


def test_an_interrupted_comparison_keeps_every_seed_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three fits come back, and no other method begins."""
    interrupt_the_tenth_step(monkeypatch)
    options = {"latent_dim": 2, "engine": "captured", "particles": 1}
    found = ez.compare("ppca", "iris", methods=["mean-field", "em"], seeds=3, **options)
    assert [(fit.method, fit.interrupted) for fit in found.fits] == [("mean-field", True)] * 3


def test_nothing_is_left_behind() -> None:
    """The random state is as before."""
    before: Tensor = torch.get_rng_state()
    together("ppca", "mean-field", [0, 1])
    assert torch.equal(torch.get_rng_state(), before)
