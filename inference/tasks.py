"""The tasks of a comparison: fits and their figures, run here or on the workers of a cluster.

Each task is one method from one seed. What comes of it is entered in a book, which keeps finished fits on disk where
that is asked for and finds them there again. A task that breaks down is entered with its cause, and is no end of the
others.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyro
import torch
from pyro import poutine
from torch import Tensor

from elbozoo.guides.base import GuideOptions
from elbozoo.inference.checkpoints import fingerprint
from elbozoo.inference.devices import resolve_device
from elbozoo.inference.evidence import Evidence, log_evidence
from elbozoo.inference.finished import Figures, FinishedFits
from elbozoo.inference.fit import Fit, closed_form_evidence
from elbozoo.inference.heldout import HeldOut
from elbozoo.inference.method import BREAKDOWNS, Plan, checksum_of, identity_of, schemas_of_method
from elbozoo.inference.progress import Report, progress_bar
from elbozoo.inference.storage import Packed, contiguous, pack_fit, unpack_fit
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, Program
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import stochastic_nodes

if TYPE_CHECKING:
    from distributed import Client, Future

logger = logging.getLogger(__name__)

OWN_MODELS = "elbozoo.models."
CONSTRAINT = "to satisfy the constraint"  # how torch says what a parameter is not


class Task(NamedTuple):
    """A fit with its figures that is still to do.

    Attributes
    ----------
    plan : Plan
        The fit, ready to run.
    seed : int
        Where it starts.
    learned : Fit or None
        The fit that learned θ, where the model keeps that one and q alone is fitted.
    fit : Fit or None
        The fit itself, where it has run before and its figures alone are missing.
    """

    plan: Plan
    seed: int
    learned: Fit | None = None
    fit: Fit | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Method and seed."""
        return self.plan.label, self.seed

    @property
    def name(self) -> str:
        """Name of the folder of the fit."""
        return f"{self.plan.label}-{self.seed}"

    @property
    def theta(self) -> Entry | None:
        """The model whose parameters stay as they are, where there is one."""
        return None if self.learned is None else self.learned.entry


class Failure(NamedTuple):
    """A fit that broke down: its method, its seed and what broke it."""

    method: str
    seed: int
    cause: str

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed} broke down: {self.cause}"


@dataclass
class Book:
    """What has come of tasks so far.

    Attributes
    ----------
    kept : FinishedFits or None
        Where finished fits are kept.
    judges : bool
        Whether the figures of each fit are wanted.
    levels : mapping of list of str
        For columns of labels, what their codes stand for.
    on_fit : callable
        Called with each fit as it comes.
    fits, figures : dict
        Fits and their figures by method and seed.
    failures : list of Failure
        In the order in which they came.
    stopped : bool
        Whether the user asked to stop.
    """

    kept: FinishedFits | None = None
    judges: bool = True
    levels: Mapping[str, list[str]] = field(default_factory=dict)
    on_fit: Callable[[Fit], None] = lambda fit: None
    fits: dict[tuple[str, int], Fit] = field(default_factory=dict)
    figures: dict[tuple[str, int], Figures] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    stopped: bool = False
    _fingerprints: dict[str, _Fingerprints] = field(default_factory=dict)

    def take_up(self, tasks: Sequence[Task]) -> list[Task]:
        """Enter what is on disk already, and return what is still to do."""
        if self.kept is None:
            return list(tasks)
        todo = []
        for task in tasks:
            stored = self.kept.find(task.name, self._identity(task))
            if stored is None:
                todo.append(task)
                continue
            fit = restored(task.plan, stored.packed, task.theta)
            self.fits[task.key] = fit
            self.on_fit(fit)
            if stored.figures is not None:
                self.figures[task.key] = stored.figures
            elif self.judges:
                todo.append(task._replace(fit=fit))
        return todo

    def fitted(self, ended: Sequence[tuple[Task, Fit]]) -> None:
        """Enter fits that ended together; those that the user interrupted are not finished, and not kept."""
        for task, fit in ended:
            contiguous(fit.entry)
            contiguous(fit.guide)
            fit.entry.levels = dict(self.levels)
            if task.learned is not None and not task.learned.converged:
                fit.notes.append(f"θ was learned by {task.learned.method}, which did not converge")
            self.fits[task.key] = fit
            self.on_fit(fit)
        finished = {task.name: (pack_fit(fit), self._identity(task)) for task, fit in ended if self._is_kept(fit)}
        if self.kept is not None and finished:
            self.kept.keep(finished)

    def judged(self, task: Task, figures: Figures) -> None:
        """Enter the figures of a fit."""
        self.figures[task.key] = figures
        if self.kept is not None and self._is_kept(self.fits[task.key]):
            self.kept.keep_figures(task.name, self._identity(task), figures)

    def failed(self, task: Task, cause: str) -> None:
        """Enter a fit that broke down, and say so."""
        self.failures.append(Failure(*task.key, cause))
        logger.error("%s", self.failures[-1])

    def _is_kept(self, fit: Fit) -> bool:
        return self.kept is not None and not fit.interrupted

    def _identity(self, task: Task) -> dict[str, Any]:
        if task.plan.label not in self._fingerprints:  # which go over all the data, and are the same for every seed
            self._fingerprints[task.plan.label] = _Fingerprints.of(task.plan)
        return _identity(task, self._fingerprints[task.plan.label], self.levels)


class Shared:
    """What the figures of all fits have in common, computed once and not before it is asked for.

    Parameters
    ----------
    plan : Plan
        Any of those that are compared: they share the model and the rows.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cached_property
    def closed_form(self) -> float:
        """log p(x) at the closed-form maximum, total nats; NaN where none is known."""
        return math.nan if self.plan.rows is not None else closed_form_evidence(self.plan.entry, self.plan.x)

    @cached_property
    def evidence(self) -> Evidence | None:
        """log p(x) where it is the same for all fits, since the model has nothing to learn."""
        if list(self.plan.entry.parameters()) or self.plan.rows is not None:
            return None
        return log_evidence(_blank(self.plan, None), self.plan.x.double())


class Runner(Protocol):
    """What runs tasks."""

    def run(self, tasks: Sequence[Task], book: Book, shared: Shared) -> None:
        """Run those of ``tasks`` that are not in the book yet, and enter what comes of them."""
        ...


@contextmanager
def runner(scheduler: Any, total: int, progress: bool) -> Iterator[Runner]:
    """Give what runs tasks: this process, or the workers of a cluster under one bar of ``total`` tasks.

    Raises
    ------
    InvalidInput
        For a scheduler that is none or does not answer.
    """
    if scheduler is None:
        yield Here(progress)
        return
    from elbozoo.inference.cluster import connected

    with connected(scheduler) as client, progress_bar("comparison", total, progress) as report:
        yield OnCluster(client, report)


class Here:
    """Runs tasks in this process, one after the other; seeds of one method as one batch where that can be."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress

    def run(self, tasks: Sequence[Task], book: Book, shared: Shared) -> None:
        """Run tasks until they are done or the user interrupts them."""
        try:
            for _, of_plan in groupby(book.take_up(tasks), key=lambda task: task.plan.label):
                self._run(list(of_plan), book, shared)
                if book.stopped:
                    return
        except KeyboardInterrupt:
            book.stopped = True  # the user wants what there is
            missing = [task.name for task in tasks if task.key not in book.figures]
            logger.warning("stopped; not shown: %s", ", ".join(missing) or "nothing")

    def _run(self, tasks: list[Task], book: Book, shared: Shared) -> None:
        for task in tasks:
            if task.fit is not None:
                self._judge(task, book, shared)
        todo = {task.seed: task for task in tasks if task.fit is None}
        thetas = {seed: task.theta for seed, task in todo.items() if task.theta is not None}
        for ended in tasks[0].plan.attempts(list(todo), thetas=thetas, progress=self.progress) if todo else ():
            fits = [(todo[seed], each) for seed, each in ended.items() if isinstance(each, Fit)]
            for seed, error in ended.items():
                if isinstance(error, NumericalFailure):
                    book.failed(todo[seed], str(error))
            book.fitted(fits)
            book.stopped = any(fit.interrupted for _, fit in fits)
            for task, _ in fits:
                self._judge(task, book, shared)

    def _judge(self, task: Task, book: Book, shared: Shared) -> None:
        if not book.judges:
            return
        try:
            with progress_bar(f"ledger of {task.plan.label}, seed {task.seed}", 1, self.progress):
                book.judged(task, figures_of(book.fits[task.key], shared.closed_form, shared.evidence))
        except BREAKDOWNS as error:
            book.failed(task, str(error))


class OnCluster:
    """Runs each task on a worker of a cluster, under one bar.

    A worker has one task at a time, so that one that ends its worker takes no other with it. It is run again elsewhere,
    as often as ``distributed.scheduler.allowed-failures`` says.

    Parameters
    ----------
    client : distributed.Client
        What connects to the cluster.
    report : Report
        Takes the number of tasks done.
    """

    def __init__(self, client: Client, report: Report) -> None:
        self.client, self.report, self.done = client, report, 0

    def run(self, tasks: Sequence[Task], book: Book, shared: Shared) -> None:
        """Run tasks until they are done or the user interrupts them."""
        from distributed import as_completed

        todo = book.take_up(tasks)
        self._advance(len(tasks) - len(todo), "")
        if not todo:
            return
        submit, running = self._common(todo, book.judges, shared), _Running()
        try:
            completed = as_completed(self._fill(todo, running, submit))
            for future in completed:
                task = running.end(future)
                self._enter(task, future, book)
                if future.cancelled():  # and so will all others be
                    for left in [*running.tasks, *todo]:
                        book.failed(left, str(_cause(future)))
                    return
                self._advance(1, f"{task.plan.label}, seed {task.seed}")
                for following in self._fill(todo, running, submit):
                    completed.add(following)
        except KeyboardInterrupt:
            book.stopped = True  # the user wants what there is
            logger.warning("stopped with %d tasks done", self.done)
        finally:
            if self.client.status == "running":
                self.client.cancel(running.futures)

    def _advance(self, count: int, text: str) -> None:
        self.done += count
        self.report(self.done, text)

    def _common(self, tasks: Sequence[Task], judges: bool, shared: Shared) -> Callable[..., Future]:
        """Send what tasks have in common, and return what submits one of them to a worker."""
        import dask

        plans = list({id(task.plan): task.plan for task in tasks}.values())
        sent = _sent(_Work(plans, shared.closed_form if judges else math.nan, judges))
        # As a task of its own: what is scattered to workers goes with the last that has it, and this is made again.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": len(sent) + 2**20}):
            held = self.client.submit(pickle.loads, sent, pure=False)
            evidence = self.client.submit(_shared_evidence, held, pure=False)

        def submit(task: Task, worker: str | None) -> Future:
            where = {} if worker is None else {"workers": [worker], "allow_other_workers": True}
            common = held, evidence, plans.index(task.plan)
            return self.client.submit(_run_on_worker, *common, task.seed, _parts_of(task), pure=False, **where)

        return submit

    def _fill(self, todo: list[Task], running: _Running, submit: Callable[..., Future]) -> list[Future]:
        """Give each idle worker a task; where there is no worker yet, the first that comes gets one."""
        idle: list[str | None] = [address for address in self.client.nthreads() if address not in running.workers]
        if not idle and not running.futures:
            idle = [None]
        return [running.begin(submit(task := todo.pop(0), worker), task, worker) for worker in idle[: len(todo)]]

    def _enter(self, task: Task, future: Future, book: Book) -> None:
        cause = _cause(future)
        if cause is not None:
            book.failed(task, cause)
            return
        packed, figures, cause = pickle.loads(future.result())
        if task.fit is None:
            with _ONE_AT_A_TIME:  # workers may be threads of this process
                fit = restored(task.plan, packed, task.theta)
            book.fitted([(task, fit)])
        if cause is not None:
            book.failed(task, cause)
        elif figures is not None:
            book.judged(task, figures)


class _Running:
    """The tasks that workers have."""

    def __init__(self) -> None:
        self._of_futures: dict[Future, tuple[Task, str | None]] = {}

    @property
    def futures(self) -> list[Future]:
        """What they are waited for by."""
        return list(self._of_futures)

    @property
    def tasks(self) -> list[Task]:
        """What they are."""
        return [task for task, _ in self._of_futures.values()]

    @property
    def workers(self) -> set[str | None]:
        """Addresses of the workers that they were given to."""
        return {worker for _, worker in self._of_futures.values()}

    def begin(self, future: Future, task: Task, worker: str | None) -> Future:
        """Note that a worker has a task."""
        self._of_futures[future] = task, worker
        return future

    def end(self, future: Future) -> Task:
        """Note that it has it no longer."""
        return self._of_futures.pop(future)[0]


def figures_of(fit: Fit, closed_form: float, evidence: Evidence | None) -> Figures:
    """Return the ledger of a fit and its figures of held-out rows.

    Raises
    ------
    NumericalFailure
        If a bound exceeds the truth, or the fit has left parameters that no distribution can have.
    """
    try:
        ledger = fit.full_ledger(best_known=closed_form, evidence=evidence)
        heldout = None if fit.companions.heldout is None else HeldOut(**fit.heldout().to_dict())
    except ValueError as error:
        if CONSTRAINT not in str(error):
            raise
        raise NumericalFailure(f"the fit ended where no distribution is: {str(error).partition(chr(10))[0]}") from None
    return Figures(ledger, heldout)


def restored(plan: Plan, packed: Packed, theta: Entry | None) -> Fit:
    """Return the fit of a plan from what is kept of it, with its data."""
    x = plan.x.double()
    fields = unpack_fit(packed, _blank(plan, theta), x)
    return Fit(**fields, x=x if plan.rows is None else None, rows=plan.rows, companions=plan.companions)


def _blank(plan: Plan, theta: Entry | None) -> Entry:
    """Return a model to give parameters to, float64; where θ is given, q alone is fitted."""
    entry = copy.deepcopy(plan.entry).double()
    return entry if theta is None else entry.requires_grad_(False)


# ---- what a fit is known by ------------------------------------------------------------------------------------------


class _Fingerprints(NamedTuple):
    """Checksums of what the fits of a plan have in common.

    Attributes
    ----------
    data : str
        Of all rows, and of those beside them.
    program : str or None
        Of what the model does, where it is not of the zoo, whose version says it.
    """

    data: str
    program: str | None

    @classmethod
    def of(cls, plan: Plan) -> _Fingerprints:
        companions = {part: rows for part, rows in plan.companions._asdict().items() if rows is not None}
        is_own = isinstance(plan.entry, Program) or not type(plan.entry).__module__.startswith(OWN_MODELS)
        return cls(checksum_of(plan, companions), _behaviour(plan) if is_own else None)


def _behaviour(plan: Plan) -> str:
    """Return a checksum of what a program draws from seed 0, and of the densities that it says it draws from.

    Its code may stay the same while numbers that it refers to change, and may change without doing anything else.
    """
    x = plan.x.to(plan.entry.dtype)
    with isolated(0), torch.no_grad(), pyro.validation_enabled(False):
        trace = poutine.trace(plan.entry).get_trace(Batch.full(x)._replace(total=plan.total))
        trace.compute_log_prob()
    nodes = [*stochastic_nodes(trace)]
    of_sites = {f"{name} {what}": torch.as_tensor(node[what]) for name, node in nodes for what in ("value", "log_prob")}
    return fingerprint({**plan.entry.state_dict(), **of_sites})[:16]


def _identity(task: Task, fingerprints: _Fingerprints, levels: Mapping[str, list[str]]) -> dict[str, Any]:
    plan, theta = task.plan, task.theta
    option: dict[str, Any] = {}
    device = torch.device("cpu")
    for schema in schemas_of_method(plan.method, plan.entry):
        if schema is GuideOptions:
            continue
        options = plan.schema(schema)
        option |= options.model_dump(mode="json", exclude={"device"})
        device = resolve_device(getattr(options, "device", "cpu"), plan.entry.dtype)
    frozen: dict[str, Tensor] = dict((theta or plan.entry).named_parameters())
    if theta is None:
        frozen = {name: value for name, value in frozen.items() if not value.requires_grad}
    common = identity_of(plan, task.seed, frozen=frozen, option=option, checksum=fingerprints.data, device=device)
    return {**common, "columns": list(plan.entry.table_names), "labels": dict(levels), "program": fingerprints.program}


# ---- on a worker -----------------------------------------------------------------------------------------------------

_ONE_AT_A_TIME = threading.Lock()  # Pyro's handlers and torch's random state are those of the process


class _Work(NamedTuple):
    """What all tasks on workers have in common.

    Attributes
    ----------
    plans : list of Plan
        The plans, with the data.
    closed_form : float
        log p(x) at the closed-form maximum.
    judges : bool
        Whether figures are wanted.
    """

    plans: list[Plan]
    closed_form: float
    judges: bool


class _Parts(NamedTuple):
    """What a task has beside: the parameters of the model that learned θ, and the fit where it has run before."""

    theta: dict[str, Tensor] | None
    packed: Packed | None


def _sent(work: _Work) -> bytes:
    import cloudpickle

    try:
        sent: bytes = cloudpickle.dumps(work)
    except (AttributeError, RuntimeError, TypeError, ValueError, pickle.PicklingError) as error:
        raise InvalidInput(
            f"scheduler: found a model or data that cannot be sent to workers ({str(error).partition(chr(10))[0]}), "
            "expected what pickle can carry; define the program in a module of its own, or leave the scheduler out"
        ) from None
    return sent


def _parts_of(task: Task) -> bytes:
    theta = None if task.learned is None else pack_fit(task.learned).model
    return pickle.dumps(_Parts(theta, None if task.fit is None else pack_fit(task.fit)))


def _shared_evidence(work: _Work) -> Evidence | None:
    with _alone():
        return Shared(work.plans[0]).evidence if work.judges else None


def _run_on_worker(work: _Work, evidence: Evidence | None, position: int, seed: int, parts: bytes) -> bytes:
    """Run a task and return the fit, its figures, and what broke down in computing those."""
    given: _Parts = pickle.loads(parts)
    plan, theta, figures, cause = work.plans[position], None, None, None
    with _alone():
        if given.theta is not None:
            theta = _blank(plan, None)
            theta.load_state_dict(given.theta)
        if given.packed is None:
            fit = plan.run(seed, theta=theta, progress=False)
            contiguous(fit.entry)
            contiguous(fit.guide)
        else:
            fit = restored(plan, given.packed, theta)
        packed = pack_fit(fit)
        if work.judges:
            try:
                figures = figures_of(fit, work.closed_form, evidence)
            except BREAKDOWNS as error:
                cause = str(error)
    return pickle.dumps((packed, figures, cause))


@contextmanager
def _alone() -> Iterator[None]:
    """Run alone in this process, on as many threads as the worker has."""
    from distributed import get_worker

    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(get_worker().state.nthreads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _cause(future: Future) -> str | None:
    """Say what broke a task, or return None."""
    from distributed import KilledWorker

    if future.cancelled():
        return "the connection to the scheduler was lost"
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, KilledWorker):
        return f"each of {error.allowed_failures + 1} workers was lost while it ran; give them more memory"
    if isinstance(error, InvalidInput | NumericalFailure):
        return str(error)
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
