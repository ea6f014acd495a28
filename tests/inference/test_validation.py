"""Validation rows along a fit: the curve, the stop, the parameters that are kept, and what none of it may disturb."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elbozoo as ez
from elbozoo.inference.ledger import elbo_estimate
from elbozoo.inference.steps import PyroStep
from elbozoo.inference.training import TrainingOptions
from elbozoo.inference.validation import PARTICLES, STREAM, Validation
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch
from elbozoo.models.contract.errors import InvalidInput

QUICK: dict[str, Any] = {"guide": "amortized", "hidden": 4, "latent_dim": 1, "progress": False, "schedule": "constant"}
OVERFITTING: dict[str, Any] = {
    "guide": "amortized",
    "hidden": 64,
    "latent_dim": 2,
    "steps": 400,
    "particles": 1,
    "schedule": "constant",
    "progress": False,
}


def digits(start: int, stop: int) -> Tensor:
    return ez.load_data("digits-binary").x[start:stop]


def wine(start: int, stop: int) -> Tensor:
    return ez.load_data("wine-standardised").x[start:stop, :4]


def parameters(fit: ez.Fit) -> dict[str, Tensor]:
    modules = {"model": fit.entry, "guide": fit.guide}
    return {f"{what}.{key}": value for what, module in modules.items() for key, value in module.state_dict().items()}


def same(one: ez.Fit, other: ez.Fit) -> bool:
    first, second = parameters(one), parameters(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- early stopping --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fit_that_learns_its_rows_by_heart_is_stopped_in_time() -> None:
    """Sixty digits and 64 hidden units: what the rows gain after the first hundred steps, others lose."""
    rows, test = digits(0, 60), digits(160, 400)
    watched = {"validation": digits(60, 160), "patience": 5, "validate_every": 20}
    stopped = ez.fit("vae", rows, **watched, **OVERFITTING)
    on = ez.fit("vae", rows, **OVERFITTING)
    assert stopped.converged and len(stopped.trajectory) < 300
    assert len(on.trajectory) == 400

    def worse(fit: ez.Fit, than: ez.Fit) -> bool:
        """Whether the ELBO of the test rows is lower by a nat per datum; its standard error is about 0.003."""
        return fit.elbo(test) < than.elbo(test) - len(test)

    assert worse(on, than=stopped)
    assert not worse(stopped, than=on)
    # The other way round on the rows of the fit, which is what overfitting is.
    assert on.elbo() > stopped.elbo()
    # Few steps are no remedy by themselves: it is the validation rows that tell how many.
    assert worse(ez.fit("vae", rows, **OVERFITTING | {"steps": 3}), than=stopped)


def test_the_best_parameters_are_kept() -> None:
    """They are those of a fit of just as many steps, bit for bit; the last ones are others."""
    options = QUICK | {"learning_rate": 0.3, "particles": 1}
    fit = ez.fit("ppca", wine(0, 20), validation=wine(20, 60), steps=80, patience=3, validate_every=5, **options)
    assert fit.validation is not None
    best = int(fit.validation.loc[fit.validation["objective"].idxmax(), "step"])
    last = int(fit.validation["step"].iloc[-1])
    assert 0 < best < last == len(fit.trajectory)
    assert same(fit, ez.fit("ppca", wine(0, 20), steps=best, **options))
    assert not same(fit, ez.fit("ppca", wine(0, 20), steps=last, **options))
    assert f"the parameters are those after {best} of {last} steps" in fit.notes[0]


def test_patience_counts_evaluations_without_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up curve: 1, 3, 2, 3, 2 stops at the patience of 3 after the first 3, which is the best."""
    values = [1.0, 3.0, 2.0, 3.0, 2.0, 9.0]
    seen: list[int] = []

    def evaluate(self: Validation, steps: int) -> None:
        from elbozoo.inference.validation import Point

        seen.append(steps)
        self.points.append(Point(steps, values[len(self.points)]))
        if self._best_at() == len(self.points) - 1:
            self._best = {"model/kept": torch.tensor(float(steps))}

    monkeypatch.setattr(Validation, "_evaluate", evaluate)
    monkeypatch.setattr(Validation, "_recall_best", lambda self: None)
    options = QUICK | {"steps": 60, "validate_every": 10}
    fit = ez.fit("ppca", wine(0, 20), validation=wine(20, 40), patience=3, **options)
    assert seen == [10, 20, 30, 40, 50] and fit.converged and len(fit.trajectory) == 50
    assert "after 20 of 50 steps, where the validation rows were best: 3.0000 nats per datum" in fit.notes[0]
    seen.clear()
    patient = ez.fit("ppca", wine(0, 20), validation=wine(20, 40), patience=4, **options)
    assert seen == [10, 20, 30, 40, 50, 60] and len(patient.trajectory) == 60 and not patient.converged


def test_a_figure_that_is_no_number_is_never_the_best() -> None:
    fit = ez.fit("ppca", wine(0, 20), steps=1, **QUICK)
    watch = Validation(fit.entry, fit.guide, wine(20, 40), TrainingOptions(patience=1), 0)
    from elbozoo.inference.validation import Point

    watch.points = [Point(1, float("nan")), Point(2, -5.0), Point(3, float("nan")), Point(4, -4.0)]
    assert watch._best_at() == 3
    watch.points = watch.points[:1]
    assert watch._best_at() == 0


# ---- the curve -------------------------------------------------------------------------------------------------------


def test_the_curve_is_the_elbo_of_the_validation_rows() -> None:
    """Its last value is that of the finished fit by the same noise, and near the closed form that needs no draws."""
    fit = ez.fit("ppca", wine(0, 40), validation=wine(40, 90), steps=50, validate_every=20, **QUICK)
    assert fit.validation is not None
    assert list(fit.validation.columns) == ["step", "objective", "elbo"]
    assert fit.validation["step"].tolist() == [20, 40, 50]
    weights = importance_weights(fit.entry, fit.guide, Batch.full(wine(40, 90)), PARTICLES, STREAM)
    # Absolute, nats per datum: the fit is in float64, and so is this; sums of a few hundred terms of order 1.
    assert abs(fit.validation["elbo"].iloc[-1] - elbo_estimate(weights)[0] / 50) < 1e-10
    assert abs(fit.validation["elbo"].iloc[0] - elbo_estimate(weights)[0] / 50) > 1e-3
    assert fit.notes == []  # without patience no parameters are put back


def test_a_point_mass_has_an_objective_and_no_elbo() -> None:
    fit = ez.fit(
        "ppca", wine(0, 40), validation=wine(40, 90), steps=20, patience=1, **QUICK | {"guide": "amortized-delta"}
    )
    assert fit.validation is not None
    assert fit.validation["objective"].notna().all() and fit.validation["elbo"].isna().all()


def test_a_discrete_latent_is_summed_out() -> None:
    """The bound of enumerated components by the exact posterior is log p(x) itself."""
    options = {"components": 2, "steps": 4, "validate_every": 2, "progress": False}
    fit = ez.fit("gaussian-mixture", wine(0, 60), guide="exact", validation=wine(60, 120), **options)
    evidence = fit.log_evidence(wine(60, 120))
    assert fit.validation is not None and evidence is not None
    # Absolute, nats per datum: the bound is tight for every draw, up to rounding in float64.
    assert abs(fit.validation["elbo"].iloc[-1] - evidence.value / 60) < 1e-10
    assert abs(fit.validation["elbo"].iloc[0] - evidence.value / 60) > 1e-6


def test_the_curve_comes_back_from_disk(tmp_path: Path) -> None:
    fit = ez.fit("ppca", wine(0, 20), validation=wine(20, 40), steps=10, validate_every=5, **QUICK)
    loaded = ez.load_fit(fit.save(tmp_path / "fit"))
    assert loaded.validation is not None and fit.validation is not None
    # Relative: decimal text of 17 digits gives every float64 back.
    assert (loaded.validation - fit.validation).abs().to_numpy().max() <= 1e-15
    plain = ez.fit("ppca", wine(0, 20), steps=10, **QUICK)
    assert ez.load_fit(plain.save(tmp_path / "fit")).validation is None


# ---- what it may not disturb -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["ppca", "vae"])
def test_a_watched_fit_is_the_fit_itself(model: str) -> None:
    """Minibatches, draws and steps are those without validation rows, bit for bit."""
    rows = (wine if model == "ppca" else digits)(0, 30), (wine if model == "ppca" else digits)(30, 60)
    options = QUICK | {"steps": 12, "batch_size": 8}
    plain = ez.fit(model, rows[0], **options)
    watched = ez.fit(model, rows[0], validation=rows[1], validate_every=1, **options)
    assert watched.validation is not None and len(watched.validation) == 12
    assert same(plain, watched)
    assert torch.equal(torch.tensor(plain.trajectory["objective"]), torch.tensor(watched.trajectory["objective"]))
    assert not same(plain, ez.fit(model, rows[0], seed=1, **options))


def test_an_interrupted_fit_keeps_its_best_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    step, taken = PyroStep.__call__, 0

    def interrupted(self: PyroStep, batch: Batch) -> float:
        nonlocal taken
        taken += 1
        if taken == 8:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(PyroStep, "__call__", interrupted)
    fit = ez.fit("ppca", wine(0, 20), validation=wine(20, 40), steps=50, patience=2, validate_every=5, **QUICK)
    assert fit.interrupted and fit.validation is not None
    assert fit.validation["step"].tolist() == [5, 7]


def test_a_resumed_fit_remembers_what_was_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the best evaluation and resumed, it ends with the same curve and the same parameters."""
    options = QUICK | {"learning_rate": 0.3, "particles": 1, "steps": 80, "patience": 3, "validate_every": 5}
    options |= {"engine": "eager"}  # whose steps can be counted from outside
    whole = ez.fit("ppca", wine(0, 20), validation=wine(20, 60), **options)
    assert whole.validation is not None
    best = int(whole.validation.loc[whole.validation["objective"].idxmax(), "step"])
    step, taken = PyroStep.__call__, 0

    def killed(self: PyroStep, batch: Batch) -> float:
        nonlocal taken
        taken += 1
        if taken == best + 7:
            raise RuntimeError("killed")
        return step(self, batch)

    kept = {"checkpoint": tmp_path, "checkpoint_every": 1, **options}
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(PyroStep, "__call__", killed)
        ez.fit("ppca", wine(0, 20), validation=wine(20, 60), **kept)
    resumed = ez.fit("ppca", wine(0, 20), validation=wine(20, 60), **kept)
    assert resumed.validation is not None and resumed.validation.equals(whole.validation)
    assert same(resumed, whole)
    with pytest.raises(InvalidInput, match="found a checkpoint of data"):
        ez.fit("ppca", wine(0, 20), validation=wine(30, 70), **kept)


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"patience": 5}, "option patience: found 5 without validation rows, expected some to measure by; give"),
    "no rows for a curve": ({"validate_every": 5}, "option validate_every: found 5 without validation rows"),
    "free": (
        {"patience": 5, "guide": "mean-field", "validation": 0.3},
        "found 5 with guide 'free-diagonal-normal', expected one with a q for validation rows: it has a q of its own",
    ),
    "too small": ({"patience": 0, "validation": 0.3}, "option patience: found 0, expected int . none >= 1"),
}


@pytest.mark.parametrize(("options", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_validated_is_refused(options: dict[str, Any], match: str) -> None:
    good = QUICK | {"steps": 1, "validation": 0.3, "patience": 5}
    ez.fit("ppca", wine(0, 40), **good)
    with pytest.raises(InvalidInput, match=match) as error:
        ez.fit("ppca", wine(0, 40), **QUICK | {"steps": 1} | options)
    assert len(str(error.value).splitlines()) == 1


def test_a_global_latent_has_no_q_for_other_rows() -> None:
    options = {"guide": "mean-field", "progress": False, "steps": 1}
    assert ez.fit("normal-mean", wine(0, 40), validation=0.3, **options).validation is None
    with pytest.raises(InvalidInput, match="its q is about latents of the whole data set"):
        ez.fit("normal-mean", wine(0, 40), validation=0.3, patience=2, **options)


def test_methods_without_steps_do_not_read_patience(caplog: pytest.LogCaptureFixture) -> None:
    ez.fit("ppca", wine(0, 40), method="em", validation=0.3, patience=2, latent_dim=1, progress=False)
    assert caplog.messages == ["option 'patience' is not read by em"]


def test_parameters_of_a_moving_objective_are_no_rivals() -> None:
    """While β rises from 0 the ELBO may fall, and patience waits until β is at rest; with β at rest it does not."""
    rising = {"objective": "beta", "kl_weight": 20.0, "kl_schedule": "annealed", "kl_steps": 200, "steps": 260}
    options = {"latent_dim": 1, "hidden": 4, "patience": 2, "validate_every": 10, "progress": False}
    fit = ez.fit("vae", digits(0, 60), guide="amortized", validation=digits(60, 90), **options, **rising)
    best = int(re.search(r"after (\d+) of", " ".join(fit.notes)).group(1))
    assert best >= 200
    # The best of all evaluations came while β was on its way.
    assert fit.validation["objective"].idxmax() < 200 // 10
