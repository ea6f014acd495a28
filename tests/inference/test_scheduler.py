"""Comparisons on a cluster: what comes back is what this process would have made, whatever happens to workers.

Relative tolerance 1e-9: the arithmetic is the same, and sums of it may be taken in another order, by other threads or
with other fits beside, which moves the last of sixteen digits; the steps of a fit may raise that by some powers of ten.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule

import elbozoo as ez
from elbozoo.inference import tasks
from elbozoo.inference.comparison import run_comparison
from elbozoo.inference.finished import FinishedFits
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure

distributed = pytest.importorskip("distributed")
pytestmark = [pytest.mark.xdist_group("scheduler"), pytest.mark.slow]

METHODS = ["em", "mean-field", "amortized"]
OPTIONS = {"latent_dim": 1, "steps": 12, "iterations": 5, "hidden": 3, "particles": 2, "restarts": 1, "engine": "eager"}
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two processes of one thread each."""
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", worker_dashboard_address=":0", memory_limit=0
    )
    with cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture(scope="module")
def threads() -> Iterator[Any]:
    """A worker of two threads in this process, which starts at once."""
    given = {"processes": False, "n_workers": 1, "threads_per_worker": 2}
    with distributed.Client(**given, dashboard_address=":0") as client:
        yield client


def rows(count: int = 20) -> torch.Tensor:
    return get_entry("ppca").example(seed=1).simulate(count, seed=2)[0].double()


def compare(scheduler: Any = None, methods: Any = METHODS, seeds: Any = 2, x: Any = None, **given: Any) -> Any:
    """A small comparison, here or on a cluster."""
    own = {name: given.pop(name) for name in ("out", "on_fit", "companions") if name in given}
    x = rows() if x is None else x
    return run_comparison("ppca", x, methods, seeds, {**OPTIONS, **given}, scheduler=scheduler, progress=False, **own)


def largest_difference(one: Any, other: Any) -> float:
    """The largest relative difference between figures of two comparisons; infinite where they are of other kinds."""
    tables = [[each.table, each.trajectories] for each in (one, other)]
    worst = 0.0
    for left, right in zip(*([table.drop(columns="seconds") for table in of_one] for of_one in tables), strict=True):
        texts = left.select_dtypes(exclude="number")
        if list(left) != list(right) or len(left) != len(right) or not texts.equals(right[list(texts)]):
            return float("inf")
        numbers, expected = left.select_dtypes("number"), right[list(left.select_dtypes("number"))]
        if not numbers.isna().equals(expected.isna()):
            return float("inf")
        difference = (numbers - expected).abs() / expected.abs().clip(lower=1.0)
        worst = max(worst, float(difference.max().max()))
    for fit, twin in zip(one.fits, other.fits, strict=True):
        for module, wanted in ((fit.entry, twin.entry), (fit.guide, twin.guide)):
            state, target = module.state_dict(), wanted.state_dict()
            if list(state) != list(target):
                return float("inf")
            worst = max([worst, *(float((state[n] - target[n]).abs().max()) for n in state if state[n].numel())])
    return worst


@pytest.fixture(scope="module")
def here() -> Any:
    """The comparison in this process."""
    return compare()


def test_a_cluster_gives_what_this_process_gives(client: Any, here: Any) -> None:
    """Figures, trajectories, parameters; the fits have their data, and say what they would say."""
    there = compare(client)
    assert largest_difference(there, here) <= TOLERANCE and not there.failures
    assert [fit.notes for fit in there.fits] == [fit.notes for fit in here.fits]
    x = there.fits[0].x
    assert x is not None and torch.equal(x, rows())
    wanted = here.fits[2].score_samples()
    assert float((there.fits[2].score_samples() - wanted).abs().max()) <= TOLERANCE
    # Each ran on a worker, with one thread, as it says.
    assert {fit.provenance["threads"] for fit in there.fits} == {"1"}


def test_the_difference_is_seen(here: Any) -> None:
    """One step more, or a datum that is moved by a millionth, is more than rounding."""
    assert largest_difference(compare(steps=13), here) == float("inf")
    moved = rows()
    moved[0, 0] *= 1 + 1e-6
    assert largest_difference(compare(x=moved), here) > TOLERANCE


def test_threads_of_one_process_take_turns(threads: Any, here: Any) -> None:
    """Pyro's handlers and torch's random state are those of the process: two fits at once would spoil both."""
    before = torch.get_rng_state()
    assert largest_difference(compare(threads), here) <= TOLERANCE
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == 1


def test_data_go_once_and_do_not_come_back(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is sent and of what comes back, one piece is as large as the data."""
    x, sent, returned = rows(2000), [], []
    submit, result = distributed.Client.submit, distributed.Future.result

    def submitting(self: Any, function: Any, *given: Any, **named: Any) -> Any:
        sent.append(sum(len(each) for each in given if isinstance(each, bytes)))
        return submit(self, function, *given, **named)

    def resulting(self: Any, *given: Any, **named: Any) -> Any:
        value = result(self, *given, **named)
        returned.append(len(value) if isinstance(value, bytes) else 0)
        return value

    monkeypatch.setattr(distributed.Client, "submit", submitting)
    monkeypatch.setattr(distributed.Future, "result", resulting)
    compare(threads, methods=["em"], seeds=3, x=x)
    size = 8 * x.numel()
    assert [each > size / 2 for each in sent].count(True) == 1 and size <= max(sent) <= 1.5 * size
    assert len(returned) == 3 and max(returned) < size / 4


def test_one_bar_is_over_all_tasks(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that learn θ included; it ends where it is full."""
    bars: list[tuple[str, int, list[int]]] = []

    class Bar:
        def __init__(self, title: str, total: int, shown: bool) -> None:
            bars.append((title, total, []))

        def __enter__(self) -> Any:
            return lambda done, text="": bars[-1][2].append(done)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(tasks, "progress_bar", Bar)
    options = {"steps": 3, "iterations": 2, "latent_dim": 1, "hidden": 3, "refinements": 1}
    there = run_comparison("linear-vae", rows(), ["all"], 1, options, scheduler=threads)
    ((title, total, done),) = bars
    assert (title, total) == ("comparison", 6) and done == sorted(done) and done[-1] == 6
    here = run_comparison("linear-vae", rows(), ["all"], 1, options, progress=False)
    assert largest_difference(there, here) <= TOLERANCE
    assert there.table["parameters"].tolist() == here.table["parameters"].tolist()
    assert [fit.notes for fit in there.fits] == [fit.notes for fit in here.fits]


def test_a_failed_task_is_named_while_the_others_finish(threads: Any) -> None:
    """In the order of the table and with the causes that there are without a cluster."""
    given = {"learning_rate": 1e300, "methods": ["mean-field", "em", "amortized"]}
    there, here = compare(threads, **given), compare(**given)
    assert [failure[:2] for failure in there.failures] == [(m, s) for m in ("mean-field", "amortized") for s in (0, 1)]
    assert there.failures == here.failures
    assert largest_difference(there, here) <= TOLERANCE
    with pytest.raises(NumericalFailure, match="all 2 fits broke down; mean-field, seed 0 broke down: step"):
        compare(threads, learning_rate=1e300, methods=["mean-field"])


def test_finished_fits_are_kept_and_taken_up(threads: Any, here: Any, tmp_path: Path) -> None:
    """With a cluster and without: what one finished the other does not repeat; figures alone are made up for."""
    compare(threads, methods=["em", "mean-field"], out=tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert len(times) == 4
    marker = tmp_path / "fits" / "em-1" / "finished.json"
    text = marker.read_text()
    marker.write_text(text[: text.index('"figures"')] + '"figures": null}')
    again = compare(threads, out=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert largest_difference(again, here) <= TOLERANCE
    assert '"log_evidence"' in marker.read_text()

    class Unused:
        def submit(self, *given: object) -> None:
            raise AssertionError("nothing was left to do")

        cancel = submit

    book = tasks.Book(FinishedFits(tmp_path / "fits"))
    runner = tasks.OnCluster(Unused(), lambda done, text="": None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unused, "cancel", lambda self, futures: None)
        runner.run([tasks.Task(_plan("em"), 0)], book, tasks.Shared(_plan("em")))
    assert list(book.figures) == [("em", 0)]
    assert largest_difference(compare(out=tmp_path), here) <= TOLERANCE  # and in this process


def _plan(method: str) -> Any:
    from elbozoo.inference.method import plan

    return plan("ppca", rows(), method, OPTIONS)


def test_figures_of_held_out_rows_come_along(threads: Any) -> None:
    """As without a cluster."""
    given = {"methods": ["em", "amortized"], "seeds": 1, "test": 0.2, "progress": False, **OPTIONS}
    there, here = ez.compare("ppca", rows(), scheduler=threads, **given), ez.compare("ppca", rows(), **given)
    columns = ["heldout_rows", "heldout_elbo", "heldout_log_evidence"]
    assert float((there.table[columns] - here.table[columns]).abs().max().max()) <= TOLERANCE
    assert isinstance(there.table, pd.DataFrame) and there.table["heldout_rows"].tolist() == [4, 4]


def test_control_c_shows_what_there_is(threads: Any) -> None:
    """The tasks that are done have their rows; with none there is nothing to show."""

    came: list[Any] = []

    def pressed(fit: Any) -> None:
        came.append(fit)
        if len(came) > 1:
            raise KeyboardInterrupt

    part = compare(threads, methods=["em"], on_fit=pressed, seeds=3)
    assert part.table["seed"].tolist() == [came[0].seed] and not part.failures
    with pytest.raises(KeyboardInterrupt):
        compare(threads, methods=["em"], on_fit=pressed, seeds=1)


def test_what_is_no_scheduler_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """In one line; and no fit is begun."""
    for scheduler in ("nowhere", 3):
        with pytest.raises(InvalidInput) as caught:
            compare(scheduler, out=tmp_path)
        assert "\n" not in str(caught.value) and "scheduler" in str(caught.value)
    assert not list(tmp_path.rglob("*"))


class Line(PyroModule):
    """A program of the user's: one factor."""

    def __init__(self, deadly: bool = False) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.process = os.getpid() if deadly else None

    def forward(self, batch: Any) -> Any:
        if self.process not in (None, os.getpid()) and torch.initial_seed() == 1:
            os._exit(1)  # as a worker that runs out of memory: with seed 1, in another process
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(batch.x.new_zeros(()), 1.0))
            return pyro.sample("x", dist.Normal(z[..., None] * self.slope, 1.0).to_event(1), obs=batch.x)


def of_program(scheduler: Any, program: Any, **given: Any) -> Any:
    options = {"steps": 4, "particles": 2, "engine": "eager"}
    return run_comparison(
        program, rows()[:, :1], ["mean-field"], 2, options, scheduler=scheduler, progress=False, **given
    )


def test_programs_of_the_users_travel_or_are_refused(threads: Any) -> None:
    """By value, where the workers do not have them; one that cannot travel says why."""
    by_value = type("Elsewhere", (Line,), {"__module__": "__main__"})()
    assert largest_difference(of_program(threads, by_value), of_program(None, by_value)) <= TOLERANCE
    program = Line()
    program.lock = _Unpicklable()
    with pytest.raises(InvalidInput, match=r"^scheduler: found a model or data that cannot be sent to workers"):
        of_program(threads, program)


class _Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a lock")

    def __deepcopy__(self, memo: Any) -> Any:
        return self


# ---- workers that are lost; last, since the cluster is not the same afterwards ---------------------------------------


def test_a_worker_that_is_killed_has_its_tasks_run_elsewhere(client: Any, here: Any) -> None:
    """Killed while it runs a task, once the first fit is there."""
    lost: list[int] = []

    def kill(fit: Any) -> None:
        busy = {address for address, running in client.processing().items() if running}
        if lost or not busy:
            return
        pids = client.run(os.getpid, workers=list(busy))
        lost.append(next(iter(pids.values())))
        os.kill(lost[0], signal.SIGKILL)

    there = compare(client, on_fit=kill)
    assert lost and not there.failures
    assert largest_difference(there, here) <= TOLERANCE
    assert lost[0] not in client.run(os.getpid).values()


def test_a_task_that_loses_every_worker_is_named(client: Any) -> None:
    """It would be tried for ever otherwise; the other seed has its row."""

    def set_allowed(count: int, dask_scheduler: Any = None) -> int:
        before, dask_scheduler.allowed_failures = dask_scheduler.allowed_failures, count
        return before

    client.wait_for_workers(2, timeout=60)
    usual = client.run_on_scheduler(set_allowed, 0)
    try:
        found = of_program(client, Line(deadly=True))
    finally:
        client.run_on_scheduler(set_allowed, usual)
    assert [failure[:2] for failure in found.failures] == [("mean-field", 1)]
    assert found.failures[0].cause == "each of 1 workers was lost while it ran; give them more memory"
    assert found.table["seed"].tolist() == [0]
