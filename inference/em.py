"""Expectation maximisation: one loop over statistics that add up.

Several starts go on side by side where the entry takes their E steps in one pass over the rows, and one after the other
where it does not; their results are the same but for rounding.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from elbozoo.inference.acceleration import Squarem
from elbozoo.inference.convergence import MonotoneMonitor
from elbozoo.inference.progress import Report, progress_bar
from elbozoo.inference.rows import Part, Rows, sample_rows
from elbozoo.inference.trajectory import Trajectory
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.options import Field, Options
from elbozoo.models.contract.passes import SharesPasses, SummarizesRows

RESTARTS_OF_MIXTURES = 10
RESTART_STREAM = 1_000_003  # keeps the starts of seeds that follow one another apart
NUMBERS_SIDE_BY_SIDE = 2**20  # in the parameters of all starts that share a pass
TIE = 1e-9  # relative: log-likelihoods that differ by less are those of the same maximum

START_ROWS = 2**16  # that starting values are taken from where the rows are not in memory

T = TypeVar("T")
Expectations = Callable[[Sequence[Any]], list[Any]]


class EMOptions(Options):
    """Options of EM."""

    restarts: int | None = Field(
        None, ge=1, description="starts, of which the best is kept; none takes 10 for discrete latents, else 1"
    )
    iterations: int = Field(10_000, ge=1, description="most iterations of each start")
    tolerance: float = Field(1e-6, gt=0, description="gain still to come, nats per datum, at which EM has converged")
    chunk: int = Field(65_536, ge=1, description="rows in a chunk of the E step")
    acceleration: Literal["none", "squarem"] = Field(
        "none", description="extrapolation of EM's steps, which never lowers the log-likelihood"
    )


class EMRun(NamedTuple):
    """One start of EM: the parameters it ended with, its record, how it ended, what is wrong or left to do."""

    state: dict[str, Tensor]
    log_evidence: float
    trajectory: Trajectory
    converged: bool
    interrupted: bool
    degeneracy: str | None
    unfinished: str | None

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures should know."""
        return [note for note in (self.degeneracy, self.unfinished) if note]


def run_em(
    entry: Entry,
    rows: Tensor | Rows,
    options: EMOptions,
    *,
    seed: int,
    start: Tensor | None = None,
    progress: bool = True,
) -> EMRun:
    """Set θ of ``entry`` to the best of several starts of EM.

    A start without a collapsed component is preferred to one with, and of equals the earlier; the first start is from
    the parameters that ``entry`` has.

    Parameters
    ----------
    rows : Tensor (N, D), or Rows
        The data, wherever they are.
    start : Tensor (M, D), optional
        Rows that the other starts take their values from; by default all that are in memory, and else a sample.

    Raises
    ------
    NumericalFailure
        If the log-likelihood falls by more than rounding, or is not finite.
    """
    data = _Data.of(entry, rows, start, seed, options.chunk)
    restarts = options.restarts or (RESTARTS_OF_MIXTURES if entry.latent_sites()[0].is_discrete else 1)
    best: EMRun | None = None
    cut_short = False
    with progress_bar(f"{entry.name()} em", restarts, progress) as report:
        for run in _runs(entry, data, options, restarts, seed, report):
            if best is None or _is_better(run, best):
                best = run
            # Also where a start that had its time is the best: the search was cut short.
            cut_short |= run.interrupted
    assert best is not None
    entry.load_state_dict(best.state)
    return best._replace(interrupted=cut_short)


class _Data(NamedTuple):
    """The data of a fit: all rows, those that starts take their values from, and how many data there are."""

    rows: Rows
    start: Tensor
    total: int

    @classmethod
    def of(cls, entry: Entry, rows: Tensor | Rows, start: Tensor | None, seed: int, chunk: int) -> _Data:
        if isinstance(rows, Tensor):
            return cls(Rows.in_memory(rows), rows if start is None else start, entry.count(rows))
        return cls(rows, sample_rows(rows, START_ROWS, seed, chunk) if start is None else start, len(rows))


def expected_statistics(entry: Any, rows: Tensor | Rows, chunk: int) -> Any:
    """E step over chunks of rows: the sum of the statistics of an entry that supports EM."""
    (total,) = _total(rows, partial(_statistics, [entry]), _all_added, chunk)
    return total


def summary_of(entry: SummarizesRows, rows: Tensor | Rows, chunk: int) -> Any:
    """Return the entry's summary of the rows, merged over chunks."""
    return _total(rows, partial(_summary, entry), _merged, chunk)


def _total(rows: Tensor | Rows, of_part: Callable[[Part], T], merge: Callable[[T, T], T], chunk: int) -> T:
    return (Rows.in_memory(rows) if isinstance(rows, Tensor) else rows).total(of_part, merge, chunk)


# What is asked of a part may be asked on another machine, so these are functions of the module, which pickle knows.


def _statistics(entries: Sequence[Any], part: Part) -> list[Any]:
    with torch.no_grad():
        return [entry.expected_statistics(part.x) for entry in entries]


def _statistics_together(entries: Sequence[Any], part: Part) -> list[Any]:
    with torch.no_grad():
        return list(entries[0].expected_statistics_together(entries, part.x))


def _summary(entry: SummarizesRows, part: Part) -> Any:
    with torch.no_grad():
        return entry.summarize(part.x)


def _all_added(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    return [type(one)(*map(torch.add, one, other)) for one, other in zip(left, right, strict=True)]


def _merged(left: Any, right: Any) -> Any:
    return left.merge(right)


def _runs(entry: Entry, data: _Data, options: EMOptions, restarts: int, seed: int, report: Report) -> Iterator[EMRun]:
    """Yield the starts, group by group; none after one that the user has interrupted."""
    numbers = sum(parameter.numel() for parameter in entry.parameters())
    at_once = max(1, NUMBERS_SIDE_BY_SIDE // numbers) if isinstance(entry, SharesPasses) else 1
    expectations = _expectations(entry, data.rows, options.chunk)
    for first in range(0, restarts, at_once):
        group = range(first, min(first + at_once, restarts))
        starts = [_started(entry, data, options, seed, restart) for restart in group]
        _climb(starts, expectations, options.iterations, first, report)
        for each in starts:
            yield each.ended()
        if any(each.interrupted for each in starts):
            return


def _started(entry: Entry, data: _Data, options: EMOptions, seed: int, restart: int) -> _Start:
    own = copy.deepcopy(entry)
    if restart > 0:
        with isolated(seed + RESTART_STREAM * restart):
            own.initialize(data.start, restart)
    squarem = Squarem(own) if options.acceleration == "squarem" else None
    monitor = MonotoneMonitor(options.tolerance, data.total)
    return _Start(own, monitor, Trajectory(is_elbo=True), squarem)


def _expectations(entry: Entry, rows: Rows, chunk: int) -> Expectations:
    """Return how E steps of several entries are taken: from a summary, in one pass, or one by one."""
    if isinstance(entry, SummarizesRows) and entry.summary_pays(len(rows)):
        summary = summary_of(entry, rows, chunk)
        return lambda entries: [each.expected_statistics_from(summary) for each in entries]
    of_part = _statistics_together if isinstance(entry, SharesPasses) else _statistics
    return lambda entries: rows.total(partial(of_part, entries), _all_added, chunk)


def _climb(
    starts: Sequence[_Start], expectations: Expectations, iterations: int, before_them: int, report: Report
) -> None:
    """Take EM steps from all ``starts`` until each has converged or has had ``iterations``."""
    active = list(starts)
    with torch.no_grad():
        try:
            while active:
                before = time.perf_counter()
                judged = _one_round(active, expectations)
                seconds = (time.perf_counter() - before) / len(judged)
                for start in judged:
                    start.trajectory.record_exact(seconds, start.monitor.history[-1])
                active = [start for start in active if not start.converged and start.steps < iterations]
                report(before_them + len(starts) - len(active), f"log p(x) {max(s.log_evidence for s in starts):.2f}")
        except KeyboardInterrupt:
            for start in active:
                start.interrupted = True


def _one_round(active: Sequence[_Start], expectations: Expectations) -> Sequence[_Start]:
    """Take an E step and an M step for each start; return those that had theirs."""
    try:
        found = expectations([start.entry for start in active])
    except torch.linalg.LinAlgError:
        jumped = [start for start in active if start.squarem is not None and start.squarem.has_jumped]
        if not jumped:
            raise
        # An extrapolation has left the numbers that can be computed with; where EM had come has not.
        for start in jumped:
            start.take_back()
        return jumped
    for start, statistics in zip(active, found, strict=True):
        start.step(statistics)
    return active


@dataclass
class _Start:
    """One start of EM on its way; ``entry`` holds its θ."""

    entry: Any  # an Entry that SupportsEM
    monitor: MonotoneMonitor
    trajectory: Trajectory
    squarem: Squarem | None
    converged: bool = False
    interrupted: bool = False
    statistics: Any = None  # of the last E step that was kept

    @property
    def log_evidence(self) -> float:
        """Total log p(x) at the last E step that was kept, nats."""
        return self.monitor.history[-1] if self.monitor.history else -math.inf

    @property
    def steps(self) -> int:
        """Number of E steps so far."""
        return len(self.trajectory.rows)

    def step(self, statistics: Any) -> None:
        """Take the statistics of an E step at the present θ: judge them, and take the M step."""
        log_evidence = float(statistics.log_evidence)
        jumped = self.squarem is not None and self.squarem.has_jumped
        if jumped and not log_evidence >= self.monitor.history[-1]:
            self.take_back()
            return
        self.converged = self.monitor.update(log_evidence, jumped=jumped)
        self.statistics = statistics
        if not self.converged:
            self.entry.maximize(statistics)
            if self.squarem is not None:
                self.monitor.slowest = self.squarem.after_step()

    def take_back(self) -> None:
        """Return from an extrapolation to where EM itself had come."""
        assert self.squarem is not None
        self.squarem.take_back()

    def ended(self) -> EMRun:
        """Return how it ended, at parameters that an E step has judged."""
        if self.squarem is not None and self.squarem.has_jumped:
            self.take_back()
        state = {name: value.clone() for name, value in self.entry.state_dict().items()}
        is_judged = self.statistics is not None and hasattr(self.entry, "degeneracy")
        degeneracy = self.entry.degeneracy(self.statistics) if is_judged else None
        unfinished = None if self.converged or self.interrupted else self.monitor.unfinished()
        return EMRun(
            state, self.log_evidence, self.trajectory, self.converged, self.interrupted, degeneracy, unfinished
        )


def _is_better(run: EMRun, best: EMRun) -> bool:
    if (run.degeneracy is None) != (best.degeneracy is None):
        return run.degeneracy is None
    return run.log_evidence > best.log_evidence + TIE * abs(best.log_evidence)
