"""Runs whose pages are kept: made in two processes, and made again when what they depend on has changed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

PROCESSES = 2
THREADS = "OMP_NUM_THREADS"
SECONDS = "seconds"


class PageFailed(RuntimeError):
    """A page whose run broke down, by name, with the cause."""


class Run(NamedTuple):
    """A page that a run makes.

    Attributes
    ----------
    name : str
        Path of the page below the folder of pages, without a suffix.
    key : str
        Digest of all that it depends on.
    task : callable
        Makes the page: called with ``arguments`` and then the path of a notebook to write. It goes to another process
        by its name.
    arguments : tuple
        Plain values.
    """

    name: str
    key: str
    task: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


def pages_of(
    runs: Sequence[Run], cache: Path, *, processes: int = PROCESSES, report: Callable[[str], None] = print
) -> dict[str, Path]:
    """Return the notebook of each run by its name, from ``cache`` or made now; what is out of date goes.

    Runs are shared out to ``processes``, or made in this one if there are none.

    Raises
    ------
    PageFailed
        For the first run that broke down; those that had not begun are not run, and finished ones are kept.
    """
    places = {run.name: cache / run.name / run.key / "page.ipynb" for run in runs}
    missing = [run for run in runs if not places[run.name].exists()]
    if missing:
        report(f"{len(runs) - len(missing)} of {len(runs)} pages are as they were, {len(missing)} to run")
        _run_all(missing, places, processes, report)
    for place in places.values():
        for other in place.parent.parent.iterdir():
            if other != place.parent:
                shutil.rmtree(other)
    return places


def _run_all(runs: Sequence[Run], places: dict[str, Path], processes: int, report: Callable[[str], None]) -> None:
    if processes == 0:
        for run in runs:
            _make(run, places[run.name])
        return
    context = multiprocessing.get_context("spawn")
    with _one_thread_each(), ProcessPoolExecutor(min(processes, len(runs)), mp_context=context) as pool:
        started: dict[Future[float], Run] = {pool.submit(_make, run, places[run.name]): run for run in runs}
        for position, done in enumerate(as_completed(started), start=1):
            name, error = started[done].name, done.exception()
            if error is not None:
                pool.shutdown(wait=True, cancel_futures=True)
                raise PageFailed(f"{name}: {type(error).__name__}: {error}") from error
            report(f"[{position}/{len(runs)}] {name}, {done.result():.0f} s")


def _make(run: Run, place: Path) -> float:
    """Make a page in a folder beside its place, so that what is in its place is whole.

    Return the seconds of one core that it took, which stand in the file SECONDS beside the page as well.
    """
    before = _used()
    unfinished = place.parent.with_name(f"{place.parent.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    run.task(*run.arguments, unfinished / place.name)
    seconds = _used() - before
    (unfinished / SECONDS).write_text(f"{seconds:.1f}\n", encoding="utf-8")
    os.replace(unfinished, place.parent)
    return seconds


def _used() -> float:
    """Seconds of all cores that this process has used, and the kernels that it has seen to their end."""
    return sum(os.times()[:4])


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Have the processes that are started meanwhile compute on one thread."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before
