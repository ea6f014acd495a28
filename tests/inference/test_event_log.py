"""The log for TensorBoard: it says what the trajectory says, and nothing of it is needed by those who want none."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import elbozoo as ez
from elbozoo.inference.event_log import EVERY
from elbozoo.models.contract.errors import InvalidInput

FIGURES = ("objective", "elbo", "log_evidence")
SMALL = {"latent_dim": 1, "hidden": 4, "batch_size": 20, "progress": False}


def events(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads in a run: tag by tag, a figure by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def fit(folder: Path, model: str = "ppca", steps: int = 35, **options: Any) -> Any:
    x = ez.load_data("iris").x[:60]
    return ez.fit(model, x, tensorboard=folder, steps=steps, **(SMALL if model == "vae" else {}), **options)


def test_what_tensorboard_reads_is_the_trajectory(tmp_path: Path) -> None:
    """Every tenth step, those at which the evidence was computed, and the last; in single precision, as it keeps."""
    trajectory = fit(tmp_path, guide="mean-field").trajectory
    read = events(tmp_path / "free-diagonal-normal-0")
    assert set(read) == {*FIGURES, "learning_rate"}
    known = trajectory["log_evidence"].notna()
    due = trajectory[(trajectory["step"] % EVERY == 0) | known | (trajectory["step"] == 34)]
    assert len(due) < len(trajectory)
    assert list(read["objective"]) == due["step"].tolist()
    for name in FIGURES:
        values = due.set_index("step")[name].dropna()
        # Rounding to single precision is a relative 6e-8; the figures of two steps are further apart.
        assert read[name] == pytest.approx(values.to_dict(), rel=1e-7)
        shifted = dict(zip(values.index, values.shift(1).bfill(), strict=True))
        assert read[name] != pytest.approx(shifted, rel=1e-7)


def test_step_size_and_a_moving_beta_are_logged(tmp_path: Path) -> None:
    """β rises to its end, as asked for; the cosine falls; an objective that is no ELBO logs none."""
    fit(
        tmp_path,
        "vae",
        guide="amortized",
        likelihood="normal",
        objective="beta",
        kl_weight=2.0,
        kl_schedule="annealed",
        kl_steps=20,
        schedule="cosine",
        learning_rate=0.02,
    )
    read = events(tmp_path / "amortized-diagonal-normal-0")
    assert set(read) == {"objective", "learning_rate", "kl_weight"}
    assert read["kl_weight"] == pytest.approx(
        {step: 2.0 * min(1.0, step / 20) for step in (0, 10, 20, 30, 34)}, rel=1e-7
    )
    expected = {step: 0.01 * (1 + math.cos(math.pi * step / 35)) for step in (0, 10, 20, 30, 34)}
    assert read["learning_rate"] == pytest.approx(expected, rel=1e-6)
    assert read["learning_rate"] != pytest.approx(dict.fromkeys(expected, 0.02), rel=1e-6)


def test_a_fixed_beta_is_an_option_and_no_curve(tmp_path: Path) -> None:
    """Under a constant schedule there is nothing to draw."""
    fit(tmp_path, "vae", guide="amortized", likelihood="normal", objective="beta", kl_weight=2.0)
    assert "kl_weight" not in events(tmp_path / "amortized-diagonal-normal-0")


def test_monte_carlo_em_is_logged_too(tmp_path: Path) -> None:
    """Its objective, iteration by iteration; there is no ELBO in it."""
    x = ez.load_data("iris").x[:20]
    run = ez.fit("vae", x, method="em", likelihood="normal", iterations=12, tensorboard=tmp_path, **SMALL)
    read = events(tmp_path / "em-0")
    assert set(read) == {"objective", "learning_rate"}
    assert read["objective"] == pytest.approx(run.trajectory["objective"].iloc[[0, 10, 11]].to_dict(), rel=1e-7)


def test_a_fit_is_the_same_with_a_log_and_without(tmp_path: Path) -> None:
    """Watching changes nothing, to the last bit; another seed does."""
    logged = fit(tmp_path, guide="mean-field")
    plain = ez.fit("ppca", ez.load_data("iris").x[:60], guide="mean-field", steps=35, progress=False)
    other = ez.fit("ppca", ez.load_data("iris").x[:60], guide="mean-field", steps=35, seed=1, progress=False)
    values = [each.guide.state_dict()["sources.z.values"] for each in (logged, plain, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_a_resumed_fit_hides_what_it_goes_back_on(tmp_path: Path) -> None:
    """A process that died at step 35 had its last checkpoint at 20: from there TensorBoard shows the later run."""
    board, kept = tmp_path / "board", tmp_path / "kept"
    fit(board, guide="mean-field", steps=20, checkpoint=kept)
    fit(board, guide="mean-field", steps=35, seed=0)  # it left no checkpoint of steps 20 to 35
    run = fit(board, guide="mean-field", steps=60, checkpoint=kept)
    read = events(board / "free-diagonal-normal-0")["objective"]
    assert list(read) == sorted(set(read)) and max(read) == 59
    assert read == pytest.approx(run.trajectory["objective"].iloc[list(read)].to_dict(), rel=1e-7)


def test_a_log_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the command, before any work and before any directory; without a log nobody misses it."""
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InvalidInput, match=r'pip install "elbozoo\[tensorboard\]"') as caught:
        fit(tmp_path / "new", guide="mean-field")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
    ez.fit("ppca", ez.load_data("iris").x[:60], steps=2, progress=False)


def test_methods_without_a_log_are_refused(tmp_path: Path) -> None:
    """EM in closed form has no steps of a gradient; beside a guide it is simply not logged."""
    with pytest.raises(InvalidInput, match="tensorboard: found with em, expected a guide or Monte Carlo EM"):
        fit(tmp_path, method="em")
    ez.compare("ppca", "iris", methods=["em", "mean-field"], seeds=1, steps=2, tensorboard=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["free-diagonal-normal-0"]
