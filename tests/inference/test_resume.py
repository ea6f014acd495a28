"""Comparisons that were stopped go on from the fits that are finished, and end as if nothing had stopped them.

Equal here means equal to the last bit, with no tolerance: the same seeds, the same machine, the same arithmetic. Only
seconds may differ.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import distributions as dist
from typer.testing import CliRunner

import elbozoo as ez
from elbozoo.cli import app
from elbozoo.inference import finished, many_seeds, tasks
from elbozoo.inference import method as methods_module
from elbozoo.inference.finished import FinishedFits
from elbozoo.inference.fit import Fit
from elbozoo.inference.steps import PyroStep
from elbozoo.inference.storage import FINISHED
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure

pytestmark = pytest.mark.xdist_group("resume")

METHODS = ["em", "mean-field", "amortized"]
OPTIONS = {"latent_dim": 1, "steps": 12, "iterations": 5, "hidden": 3, "particles": 2, "restarts": 1, "engine": "eager"}
HUGE = 1e300  # a step size after which nothing is finite


def rows() -> torch.Tensor:
    return get_entry("ppca").example(seed=1).simulate(20, seed=2)[0].double()


def compare(out: Path | None = None, seeds: Any = 2, methods: Any = METHODS, data: Any = None, **options: Any) -> Any:
    """A small comparison; with ``out``, one that goes on from there."""
    given = {**OPTIONS, **options}
    data = rows() if data is None else data
    return ez.compare("ppca", data, methods=methods, seeds=seeds, out=out, progress=False, **given)


@pytest.fixture(scope="module")
def whole() -> ez.Comparison:
    """The comparison that nothing stopped, and that wrote nothing."""
    return compare()


@pytest.fixture(autouse=True)
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and reports take longer than these fits, and are none of the matter here."""
    monkeypatch.setattr("elbozoo.comparison.plots.figures", lambda comparison: {})
    monkeypatch.setattr("elbozoo.comparison.report.write", lambda comparison, path: Path(path))


def without_seconds(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="seconds")


def difference(one: Any, other: Any) -> str | None:
    """What differs between two comparisons, in bits."""
    for what in ("table", "trajectories"):
        if not without_seconds(getattr(one, what)).equals(without_seconds(getattr(other, what))):
            return what
    for fit, twin in zip(one.fits, other.fits, strict=True):
        if [fit.notes, fit.converged, fit.shape] != [twin.notes, twin.converged, twin.shape]:
            return f"notes of {fit.method}, seed {fit.seed}"
        if fit.x is None or not torch.equal(fit.x, twin.x):
            return f"data of {fit.method}, seed {fit.seed}"
        for module, expected in ((fit.entry, twin.entry), (fit.guide, twin.guide)):
            state, wanted = module.state_dict(), expected.state_dict()
            if list(state) != list(wanted) or not all(torch.equal(state[name], wanted[name]) for name in state):
                return f"parameters of {fit.method}, seed {fit.seed}"
    return None


def finished_fits(out: Path) -> dict[str, tuple[int, int]]:
    """Which fits are finished, and the file in which each has its parameters: its number and when it was written."""
    of_fits = {path.parent.name: (path.parent / "model.safetensors").stat() for path in out.glob(f"fits/*/{FINISHED}")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in of_fits.items()}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fits that began, in their order."""
    names: list[str] = []
    run = methods_module.Plan.run

    def running(self: Any, seed: int, **given: Any) -> Fit:
        names.append(f"{self.label}-{seed}")
        return run(self, seed, **given)

    monkeypatch.setattr(methods_module.Plan, "run", running)
    return names


# ---- whatever stops it -----------------------------------------------------------------------------------------------


def in_a_copy(run: Any) -> int:
    """Run a function in a copy of this process, whose number is returned; it ends with status 0 if all went well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    return child


def was_killed(child: int) -> bool:
    """Wait for a process, which either was killed or ended well."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of this process, which need os.fork")


@needs_fork
def test_killed_at_random_moments_it_repeats_no_finished_fit(tmp_path: Path) -> None:
    """One process after the other until one ends: none touches what another finished, and the result is the same.

    Each has an alarm clock, which counts its own time on the processor and ends it like any kill, in the middle of
    whatever it does; the later ones live longer, so that one ends.
    """
    given = {"methods": ["em", "free-delta"], "steps": 30}
    undisturbed = compare(**given)
    before = time.process_time()
    compare(**given)
    duration = time.process_time() - before
    moments, kills = random.Random(1), 0
    kept: dict[str, tuple[int, int]] = {}
    log = tmp_path / "ended"
    for _ in range(60):
        alarm = moments.uniform(0.0, 0.3 + 0.3 * kills) * duration

        def run(alarm: float = alarm) -> None:
            logging.disable()
            fitted = methods_module._fit

            def logged(plan: Any, entry: Any, guide: Any, seed: int, *rest: Any) -> Fit:
                with log.open("a") as file:
                    file.write(f"{plan.label}-{seed}\n")
                return fitted(plan, entry, guide, seed, *rest)

            methods_module._fit = logged
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, alarm)
            compare(tmp_path / "out", **given)

        log.write_text("")
        killed = was_killed(in_a_copy(run))
        assert not set(log.read_text().split()) & set(kept), "a finished fit was run again"
        now = finished_fits(tmp_path / "out")
        assert {name: now.get(name) for name in kept} == kept
        kept = now
        kills += killed
        if not killed:
            break
    assert not killed and kills >= 2 and len(kept) == 4
    assert difference(compare(tmp_path / "out", **given), undisturbed) is None
    assert finished_fits(tmp_path / "out") == kept
    assert not list((tmp_path / "out").rglob(".*"))


def dies_before(write: int) -> None:
    """Let this process be killed before so many-eth writing, renaming or removal."""
    left = [write]

    def deadly(function: Any) -> Any:
        def one_less(*arguments: Any, **given: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **given)

        return one_less

    Path.rename, Path.rmdir = deadly(Path.rename), deadly(Path.rmdir)
    os.replace, shutil.rmtree = deadly(os.replace), deadly(shutil.rmtree)
    finished.write_packed = deadly(finished.write_packed)


@needs_fork
def test_fits_that_ended_together_are_kept_together(whole: ez.Comparison, tmp_path: Path) -> None:
    """All or none, wherever the process dies: the bits of seeds that run as one batch depend on their company."""
    new = {f"{fit.method}-{fit.seed}": (tasks.pack_fit(fit), {"seed": 1}) for fit in whole.fits[:3]}
    old = {name: (packed, {"seed": 0}) for name, (packed, _) in new.items()}
    counts, killed, write = [], True, 0
    while killed:
        write, folder = write + 1, tmp_path / str(write + 1)
        FinishedFits(folder).keep(old)

        def run(write: int = write, folder: Path = folder) -> None:
            dies_before(write)
            FinishedFits(folder).keep(new)

        killed = was_killed(in_a_copy(run))
        found = FinishedFits(folder)
        counts.append(sum(found.find(name, {"seed": 1}) is not None for name in new))
        assert counts[-1] == len(new) or all(found.find(name, {"seed": 0}) for name in new)
    assert set(counts) == {0, 3} and counts == sorted(counts) and write > 10


@needs_fork
def test_killed_between_any_two_writes_it_goes_on(tmp_path: Path) -> None:
    """Dead before the first, second, ... writing, renaming or removal, over fits of other options at first."""
    given = {"methods": ["em", "free-delta", "mean-field"], "seeds": 1}
    undisturbed = compare(**given)
    compare(tmp_path, **{**given, "latent_dim": 2, "steps": 2})
    moments, ended, stale = random.Random(0), False, finished_fits(tmp_path)
    kept: dict[str, tuple[int, int]] = {}
    for _ in range(80):
        last = moments.randrange(1, 6)

        def run(last: int = last) -> None:
            logging.disable()
            dies_before(last)
            compare(tmp_path, **given)

        killed = was_killed(in_a_copy(run))
        now = {name: stat for name, stat in finished_fits(tmp_path).items() if stat != stale.get(name)}
        assert {name: now.get(name) for name in kept} == kept
        kept = now
        if not killed:
            ended = True
            break
    assert ended and len(kept) == 3
    assert difference(compare(tmp_path, **given), undisturbed) is None and finished_fits(tmp_path) == kept
    assert not list(tmp_path.rglob(".*"))


def test_the_comparisons_above_can_fail() -> None:
    """One more step, another seed or the last bit of one parameter is another result."""
    given = {"methods": ["free-delta"], "seeds": [1]}
    one, again = compare(**given), compare(**given)
    assert difference(compare(**given, steps=13), one) == "table"
    assert difference(compare(**{**given, "seeds": [2]}), one) == "table"
    assert difference(again, one) is None
    parameter = next(again.fits[0].guide.parameters())
    parameter.data.view(-1)[0] *= 1 + 2**-52
    assert difference(again, one) == "parameters of free-delta, seed 1"


@pytest.fixture
def control_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Press Control-C in the sixth step of the third fit by steps, which is amortized with seed 0."""
    step, count = PyroStep.__call__, 0

    def pressed(self: PyroStep, batch: Any) -> float:
        nonlocal count
        count += 1
        if count == 2 * OPTIONS["steps"] + 6:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PyroStep, "__call__", pressed)
        yield


def test_an_interrupted_fit_is_shown_and_is_not_finished(
    whole: ez.Comparison, tmp_path: Path, control_c: None, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    """Control-C ends the comparison; the next one runs the fit anew, and those that never began."""
    part = compare(tmp_path)
    assert [fit.interrupted for fit in part.fits] == [False] * 4 + [True]
    assert set(finished_fits(tmp_path)) == {"em-0", "em-1", "mean-field-0", "mean-field-1"}
    assert ez.load_comparison(tmp_path).fits[-1].interrupted
    started.clear()
    assert difference(compare(tmp_path), whole) is None
    assert started == ["amortized-0", "amortized-1"] and difference(part, whole) == "table"


def test_control_c_in_a_ledger_loses_the_ledger_alone(
    whole: ez.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str], caplog: Any
) -> None:
    """What has figures is shown, the fit without them is kept, and the next comparison does not repeat it."""
    ledger, count = Fit.full_ledger, 0

    def pressed(self: Fit, *given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return ledger(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "full_ledger", pressed)
        part = compare(tmp_path)
    assert [(fit.method, fit.seed) for fit in part.fits] == [("em", 0), ("em", 1), ("mean-field", 0)]
    assert "stopped; not shown: mean-field-1, amortized-0, amortized-1" in caplog.text
    assert "mean-field-1" in finished_fits(tmp_path)
    started.clear()
    assert difference(compare(tmp_path), whole) is None
    assert started == ["amortized-0", "amortized-1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count = 3
        patch.setattr(Fit, "full_ledger", pressed)
        compare(seeds=1, methods=["em"])  # nothing to show


def test_control_c_while_the_model_is_learned_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    """No way to a q begins after it."""

    def pressed(self: Any, seed: int, **given: Any) -> Any:
        started.append(f"{self.label}-{seed}")
        raise KeyboardInterrupt

    monkeypatch.setattr(methods_module.Plan, "run", pressed)
    with pytest.raises(KeyboardInterrupt):
        ez.compare("linear-vae", rows(), methods="all", seeds=2, progress=False, latent_dim=1)
    assert started == ["em-0"]


# ---- what is there already -------------------------------------------------------------------------------------------


@pytest.fixture
def out(whole: ez.Comparison, tmp_path: Path, _kept: Path) -> Path:
    """A directory with the whole comparison."""
    return Path(shutil.copytree(_kept, tmp_path / "out"))


@pytest.fixture(scope="module")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    compare(folder)
    return folder


def test_the_same_comparison_again_takes_no_step(out: Path, whole: ez.Comparison, started: list[str]) -> None:
    """No fit, no ledger, no file of a fit written; with another order of methods as well."""
    before = finished_fits(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "full_ledger", None)  # cannot be called
        assert difference(compare(out), whole) is None
        turned = compare(out, methods=["amortized", "em"])
    assert not started and finished_fits(out) == before
    assert turned.table["method"].tolist() == ["amortized"] * 2 + ["em"] * 2
    assert ez.load_comparison(out).document() == turned.document()


def test_more_seeds_and_methods_run_what_is_missing(tmp_path: Path, whole: ez.Comparison, started: list[str]) -> None:
    """Learning gaps are measured from the best of all, however many comparisons they came of."""
    first = compare(tmp_path, seeds=1, methods=["amortized", "em"])
    before = finished_fits(tmp_path)
    started.clear()
    assert difference(compare(tmp_path), whole) is None
    assert started == ["em-1", "mean-field-0", "mean-field-1", "amortized-1"]
    now = finished_fits(tmp_path)
    assert {name: now[name] for name in before} == before and len(now) == 6
    assert difference(compare(tmp_path, seeds=1, methods=["amortized", "em"]), first) is None


@pytest.mark.parametrize(
    ("change", "message", "again"),
    [
        ({"steps": 13}, "found a fit of option steps 12, expected 13", ["mean-field-0", "amortized-0"]),
        ({"iterations": 6}, "found a fit of option iterations 5, expected 6", ["em-0"]),
        ({"latent_dim": 2}, "found a fit of model option latent_dim 1, expected 2", None),
        ({"hidden": 4}, "found a fit of guide option hidden 3, expected 4", None),
        ({"test": 0.1}, "expected data of shape (18, 5) with the checksum", None),
    ],
)
def test_a_fit_of_other_options_is_run_again_and_replaced(
    change: dict[str, Any], message: str, again: list[str] | None, out: Path, started: list[str], caplog: Any
) -> None:
    """With one line for each that says what differs; a fit that does not read the option stays."""
    before, again = finished_fits(out), again or ["em-0", "mean-field-0", "amortized-0"]
    found = compare(out, seeds=1, **change)
    assert started == again
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == len(again) and all(message in line and "run again and replaced" in line for line in lines)
    now = finished_fits(out)
    assert {name for name in before if now[name] != before[name]} == set(again)
    assert difference(found, compare(seeds=1, **change)) is None
    caplog.clear()
    compare(out, seeds=1, **change)
    assert not caplog.messages


def test_other_data_names_labels_and_versions_are_run_again(
    out: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest change of one cell; a column by another name, which the fit would be asked by."""
    changed = rows()
    changed[3, 1] += 1e-12
    own = methods_module.provenance()

    def only_line(**given: Any) -> str:
        caplog.clear()
        compare(out, seeds=1, methods=["em"], **given)
        (line,) = [line for line in caplog.messages if "run again" in line]
        return line

    assert "found a fit of data of shape (20, 5) with the checksum" in only_line(data=changed)
    assert "found a fit of data of shape (20, 5) with the checksum" in only_line()
    renamed = pd.DataFrame(rows().numpy(), columns=list("abcde"))
    assert "found a fit of columns ['x0', 'x1', 'x2', 'x3', 'x4'], expected ['a', 'b', 'c'" in only_line(data=renamed)
    monkeypatch.setattr(methods_module, "provenance", lambda: {**own, "torch": "1.0"})
    assert f"found a fit of version torch '{own['torch']}', expected '1.0'" in only_line(data=renamed)


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    """Change one bit in the middle of a parameter, which every reader would take for another number."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, tuple[str, Any]] = {
    "half a file": ("model.safetensors", _shorten),
    "a bit": ("guide.safetensors", _flip),
    "a missing file": ("trajectory.csv", Path.unlink),
    "another card": ("fit.json", lambda path: path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))),
    "no JSON": (FINISHED, lambda path: path.write_text("{")),
    "another JSON": (FINISHED, lambda path: path.write_text('{"identity": [], "files": {}}')),
    "a ledger of other figures": (
        FINISHED,
        lambda path: path.write_text(path.read_text().replace('"kl_se"', '"kl_ze"')),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_fit_is_run_again(
    damage: str, out: Path, whole: ez.Comparison, started: list[str], caplog: Any
) -> None:
    """With a line that says so, and the same result."""
    file, harm = DAMAGES[damage]
    harm(out / "fits" / "mean-field-0" / file)
    assert difference(compare(out), whole) is None
    assert started == ["mean-field-0"]
    (line,) = caplog.messages
    assert "mean-field-0: the finished fit is damaged (" in line and line.endswith("it is run again and replaced")
    started.clear()
    compare(out)
    assert not started


def test_what_fit_save_wrote_is_not_a_finished_fit(out: Path, whole: ez.Comparison, started: list[str]) -> None:
    """A fit that was put there by hand is not vouched for by the marker of the one before."""
    other = compare(seeds=1, methods=["mean-field"], steps=3)
    other.fits[0].save(out / "fits" / "mean-field-0")
    started.clear()
    assert difference(compare(out), whole) is None and started == ["mean-field-0"]


def test_a_comparison_is_written_elsewhere_in_full(out: Path, tmp_path: Path, whole: ez.Comparison) -> None:
    """Where its fits are not yet, or are not whole, they are written."""
    resumed = compare(out)
    resumed.save(tmp_path / "copy")
    copy = ez.load_comparison(tmp_path / "copy")
    assert copy.document() == resumed.document() and len(copy.fits) == 6
    _flip(out / "fits" / "em-0" / "model.safetensors")
    before = finished_fits(out)
    resumed.save(out)
    now = finished_fits(out)
    assert {name for name in before if now.get(name) != before[name]} == {"em-0"}
    assert torch.equal(ez.load_comparison(out).fits[0].score_samples(rows()), whole.fits[0].score_samples())


def test_a_full_disk_costs_the_copy_and_no_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The user is told, and the comparison goes on."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finished, "write_packed", full)
    found = compare(tmp_path / "out", methods=["em"], seeds=1)
    monkeypatch.undo()
    assert difference(found, compare(methods=["em"], seeds=1)) is None
    assert "em-0 not written: No space left on device" in caplog.text
    assert not list((tmp_path / "out" / "fits").rglob(".*"))


def test_a_full_disk_of_the_writer_of_tensors_is_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Which has an error of its own."""
    from safetensors import SafetensorError

    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    monkeypatch.setattr(finished, "write_packed", full)
    fits = FinishedFits(tmp_path / "fits")
    fits.keep({"em-0": (None, {})})  # type: ignore[dict-item]
    assert "em-0 not written: Error while serializing" in caplog.text


def test_figures_are_never_left_beside_another_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    """A fit that could not be written leaves the earlier one of other options as it is, with its own figures."""
    first = compare(tmp_path, methods=["em"], seeds=1)
    write = finished.write_packed

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finished, "write_packed", full)
    monkeypatch.setattr("elbozoo.inference.comparison.Comparison.save", lambda self, folder: Path(folder))
    assert difference(compare(tmp_path, methods=["em"], seeds=1, iterations=2), first) == "table"
    monkeypatch.setattr(finished, "write_packed", write)
    started.clear()
    assert difference(compare(tmp_path, methods=["em"], seeds=1), first) is None
    assert started == []


def test_a_file_in_the_place_of_a_fit_is_replaced(tmp_path: Path, whole: ez.Comparison) -> None:
    """And stands in nobody's way."""
    (tmp_path / "fits").mkdir()
    (tmp_path / "fits" / "em-0").write_text("a note")
    assert difference(compare(tmp_path), whole) is None
    assert len(finished_fits(tmp_path)) == 6 and not list((tmp_path / "fits").glob(".*"))


def test_held_out_figures_and_labels_come_back(tmp_path: Path, started: list[str]) -> None:
    """Those of a label's codes, of validation rows and of test rows; NaN and None stay what they are."""
    x = pd.DataFrame(rows().numpy(), columns=list("abcde"))
    table = x.assign(group=[f"g{i // 4}" for i in range(len(x))])
    given: dict[str, Any] = {"methods": ["mean-field", "amortized"], "seeds": 1, "progress": False, "steps": 4}
    given |= {"group": "group", "row_dim": 1, "group_dim": 1, "hidden": 3, "validation": 0.2, "test": 0.2}
    first = ez.compare("multi-level-vae", table, out=tmp_path, **given)
    started.clear()
    again = ez.compare("multi-level-vae", table, out=tmp_path, **given)
    assert not started and difference(again, first) is None
    assert again.table["heldout_elbo"].notna().any() and again.heldout == first.heldout
    for fit, twin in zip(again.fits, first.fits, strict=True):
        assert fit.entry.levels == twin.entry.levels and set(fit.entry.levels) == {"group"}
        assert (fit.validation is None) == (twin.validation is None)
        assert ez.load_fit(tmp_path / "fits" / f"{fit.method}-0").entry.levels == fit.entry.levels
        assert torch.equal(fit.companions.test, twin.companions.test)


def test_the_ways_to_one_q_resume_with_the_model(tmp_path: Path, started: list[str]) -> None:
    """The fit that learned θ is kept apart, and another θ is another fit."""
    given: dict[str, Any] = {"methods": "all", "seeds": 1, "progress": False, "steps": 5, "iterations": 3, "hidden": 3}
    given |= {"latent_dim": 1, "refinements": 1}
    first = ez.compare("linear-vae", rows(), **given)
    (tmp_path / "fits").mkdir()
    ez.compare("linear-vae", rows(), out=tmp_path, **given)
    shutil.rmtree(tmp_path / "fits" / "amortized-0")
    started.clear()
    again = ez.compare("linear-vae", rows(), out=tmp_path, **given)
    assert started == ["amortized-0"] and difference(again, first) is None
    assert again.table["parameters"].tolist() == first.table["parameters"].tolist()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["em-0"]
    ez.compare("linear-vae", rows(), out=tmp_path, **{**given, "iterations": 4})
    assert started == ["amortized-0", "em-0", "shared-0", "free-0", "amortized-0", "semi-amortized-0", "exact-0"]


def test_a_program_of_the_users_is_known_by_what_it_does(tmp_path: Path, started: list[str], caplog: Any) -> None:
    """Its fits come back; with another number in it, though by the same code, they do not."""

    def program(scale: float) -> Any:
        def model(batch: Any) -> Any:
            with pyro.plate("data", batch.total, subsample=batch.index):
                z = pyro.sample("z", dist.Normal(batch.x.new_zeros(()), scale))
                return pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=batch.x)

        return model

    def fits(scale: float, out: Path | None = tmp_path) -> Any:
        given = {"methods": ["mean-field", "amortized"], "seeds": 1, "progress": False, "steps": 5, "hidden": 3}
        return ez.compare(program(scale), rows()[:, :1], out=out, **given)

    undisturbed = fits(1.0, None)
    fits(1.0)
    started.clear()
    assert difference(fits(1.0), undisturbed) is None and not started
    other = fits(1.5)
    assert started == ["mean-field-0", "amortized-0"] and "found a fit of program" in caplog.text
    assert difference(other, undisturbed) == "table"


def test_left_over_folders_are_put_in_place_or_removed(tmp_path: Path) -> None:
    """Those that were said to be ready are fits; those that were not are nothing."""
    (tmp_path / ".ready-1" / "em-0").mkdir(parents=True)
    (tmp_path / ".ready-1" / "em-0" / "new").touch()
    (tmp_path / "em-0").mkdir()
    (tmp_path / "em-0" / "old").touch()
    (tmp_path / ".partial-2" / "em-1").mkdir(parents=True)
    FinishedFits(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["em-0", "em-0/new"]


# ---- fits that break down --------------------------------------------------------------------------------------------


def test_a_fit_that_breaks_down_does_not_take_the_others(tmp_path: Path, caplog: Any) -> None:
    """It is named with its cause; the others have the rows that they would have without it."""
    found = compare(tmp_path, learning_rate=HUGE)
    assert [failure[:2] for failure in found.failures] == [(m, s) for m in METHODS[1:] for s in (0, 1)]
    assert all("try a smaller learning_rate" in failure.cause for failure in found.failures)
    assert difference(found, compare(methods=["em"])) is None
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == [str(failure) for failure in found.failures]
    document = found.document()
    assert document["failures"][1] == {"method": "mean-field", "seed": 1, "cause": found.failures[1].cause}
    assert "failures" not in compare(methods=["em"]).document()
    loaded = ez.load_comparison(tmp_path)
    assert loaded.failures == found.failures and loaded.document() == json.loads(json.dumps(document))
    assert set(finished_fits(tmp_path)) == {"em-0", "em-1"}
    mended = compare(tmp_path)
    assert not mended.failures and len(mended.fits) == 6


def test_where_all_break_down_there_is_nothing_to_show() -> None:
    """One failure says its cause as it would alone; several say how many there were."""
    with pytest.raises(NumericalFailure, match=r"^step \d+: the objective is"):
        compare(seeds=1, methods=["mean-field"], learning_rate=HUGE)
    with pytest.raises(NumericalFailure, match=r"^all 4 fits broke down; mean-field, seed 0 broke down: step \d"):
        compare(methods=METHODS[1:], learning_rate=HUGE)


def test_a_bound_above_the_truth_is_a_failure_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit is kept, its ledger is tried again."""
    ledger = Fit.full_ledger

    def wrong(self: Fit, *given: Any, **named: Any) -> Any:
        if (self.method, self.seed) == ("mean-field", 1):
            raise NumericalFailure("the ELBO exceeds log p(x)")
        return ledger(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "full_ledger", wrong)
        found = compare(tmp_path, methods=["em", "mean-field"])
        assert found.failures == [("mean-field", 1, "the ELBO exceeds log p(x)")] and len(found.table) == 3
        assert set(finished_fits(tmp_path)) == {"em-0", "em-1", "mean-field-0", "mean-field-1"}
        assert compare(tmp_path, methods=["em", "mean-field"]).failures == found.failures
    mended = compare(tmp_path, methods=["em", "mean-field"])
    assert not mended.failures and difference(mended, compare(methods=["em", "mean-field"])) is None


def test_a_last_step_into_the_void_is_a_failure(caplog: Any) -> None:
    """Parameters that are not finite after the last step, or none that a scale can have, break a fit down."""
    for rate, cause in (
        (1e308, "is not finite; try a smaller learning_rate"),
        (HUGE, "ended where no distribution is"),
    ):
        found = compare(methods=["em", "mean-field"], seeds=1, steps=1, learning_rate=rate)
        assert [failure[:2] for failure in found.failures] == [("mean-field", 0)]
        assert cause in found.failures[0].cause and "\n" not in found.failures[0].cause
        assert found.table["method"].tolist() == ["em"]


def test_matrices_that_break_down_in_a_ledger_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of that fit alone."""
    ledger = Fit.full_ledger

    def broken(self: Fit, *given: Any, **named: Any) -> Any:
        if self.method == "mean-field":
            raise torch.linalg.LinAlgError("not positive definite")
        return ledger(self, *given, **named)

    monkeypatch.setattr(Fit, "full_ledger", broken)
    found = compare(seeds=1)
    assert [failure[:2] for failure in found.failures] == [("mean-field", 0)]
    assert found.table["method"].tolist() == ["em", "amortized"]


def test_several_processes_are_refused_on_workers() -> None:
    """Before a cluster is started; without a scheduler or with one process it is none of the matter."""
    with pytest.raises(InvalidInput, match=r"option processes: found 2 with a scheduler, expected 1"):
        compare(methods=["em", "amortized"], processes=2, scheduler="tcp://127.0.0.1:1")


def test_one_seed_of_a_batch_breaks_down_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on in their batch and end with the bits that they have beside a healthy one."""
    given: dict[str, Any] = {"methods": ["free-delta"], "seeds": 3, "engine": "captured", "steps": 12}
    healthy = compare(**given)
    advance, count = many_seeds._SeedBatch._advance, 0

    def poisoned(self: Any, running: Any) -> Any:
        nonlocal count
        count += 1
        if count == 8:
            self.state[0][1] = torch.nan
        return advance(self, running)

    monkeypatch.setattr(many_seeds._SeedBatch, "_advance", poisoned)
    found = compare(**given)
    assert [failure[:2] for failure in found.failures] == [("free-delta", 1)]
    assert "step 8: the objective is nan" in found.failures[0].cause
    left_out = healthy.table["seed"] != 1
    figures = ["method", "seed", "log_evidence", "objective", "steps"]
    assert found.table[figures].equals(healthy.table[left_out][figures].reset_index(drop=True))
    assert not found.table[figures].equals(healthy.table[~left_out][figures].reset_index(drop=True))


def test_the_command_line_names_failures_after_the_table(tmp_path: Path) -> None:
    """Exit status 1, with what there is on standard output; 0 without a failure."""
    command = ["compare", "ppca", "--data", "iris", "--seeds", "1", "--methods", "em,mean-field", "--json"]
    command += [word for name, value in {**OPTIONS, "steps": 3}.items() for word in ("--set", f"{name}={value}")]
    broken = CliRunner().invoke(app, [*command, "--set", f"learning_rate={HUGE}", "--out", str(tmp_path)])
    assert broken.exit_code == 1
    document = json.loads(broken.stdout)
    assert [row["method"] for row in document["rows"]] == ["em"] and len(document["failures"]) == 1
    assert "elbozoo: mean-field, seed 0 broke down: step" in broken.stderr
    well = CliRunner().invoke(app, command)
    assert well.exit_code == 0 and "failures" not in json.loads(well.stdout)


def test_a_method_asked_for_twice_runs_once(started: list[str]) -> None:
    """None means a method that may be named beside it."""
    found = compare(methods=[None, "mean-field"], seeds=1)
    assert started == ["mean-field-0"] and len(found.table) == 1


def test_what_all_fits_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form, and the evidence of a model with nothing to learn."""
    calls: list[str] = []
    for name in ("closed_form_evidence", "log_evidence"):
        own = getattr(tasks, name)

        def counted(*given: Any, name: str = name, own: Any = own) -> Any:
            calls.append(name)
            return own(*given)

        monkeypatch.setattr(tasks, name, counted)
    given = {"methods": ["mean-field", "full-rank"], "seeds": 2, "steps": 3, "progress": False}
    table = ez.compare("normal-mean", rows()[:, :1], **given).table
    assert sorted(calls) == ["closed_form_evidence", "log_evidence"]
    assert table["log_evidence"].nunique() == 1


def test_data_out_of_memory_are_known_by_every_row(tmp_path: Path, started: list[str], caplog: Any) -> None:
    """Fits start from a sample of them; a row that is in none of the samples makes other data all the same."""
    x = rows().numpy().repeat(2, 0)
    np.save(tmp_path / "x.npy", x)

    def stream() -> Any:
        given = {**OPTIONS, "methods": ["em", "amortized"], "seeds": 1, "batch_size": 8, "progress": False}
        return ez.compare("ppca", ez.load_data(tmp_path / "x.npy", stream=True), out=tmp_path / "out", **given)

    first = stream()
    started.clear()
    again = stream()
    assert not started and again.table.drop(columns="seconds").equals(first.table.drop(columns="seconds"))
    assert again.fits[0].rows is not None and again.fits[0].x is None
    own = tasks._Fingerprints.of(_streamed(tmp_path))
    x[-1, 0] += 1e-12
    np.save(tmp_path / "x.npy", x)
    assert tasks._Fingerprints.of(_streamed(tmp_path)) != own
    stream()
    assert started == ["em-0", "amortized-0"] and "found a fit of data of shape (40, 5)" in caplog.text


def _streamed(folder: Path) -> Any:
    """A plan whose sample leaves out the last rows."""
    data = ez.load_data(folder / "x.npy", stream=True)
    return methods_module.plan("ppca", rows()[:10], "em", {"latent_dim": 1}, rows=data.rows)
