"""Methods x seeds on one data set, side by side."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import pandas as pd
from torch import Tensor

from elbozoo.guides.registry import refusal_of
from elbozoo.inference.finished import FinishedFits, holds
from elbozoo.inference.fit import Fit
from elbozoo.inference.heldout import ALONE, Companions, HeldOut
from elbozoo.inference.ledger import Ledger
from elbozoo.inference.method import (
    Plan,
    plan,
    refuse_without_records,
    schemas_of_method,
    valid_seed,
    warn_of_unread,
)
from elbozoo.inference.records import NO_RECORDS, Records
from elbozoo.inference.rows import Rows
from elbozoo.inference.storage import writable_directory
from elbozoo.inference.tasks import Book, Failure, Shared, Task, runner
from elbozoo.inference.training import TrainingOptions
from elbozoo.models.contract.entry import Program, SupportsEM
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.options import plain

logger = logging.getLogger(__name__)

EVERY_WAY = "all"
FITS, LEARNED = "fits", "model"  # folders of the fits, and of those that learned the one model of all ways to q
WAYS_TO_Q = ("shared", "free", "amortized", "semi-amortized", "exact")

ROW = (
    "method",
    "guide",
    "seed",
    "elbo",
    "elbo_se",
    "log_evidence",
    "log_evidence_se",
    "log_evidence_kind",
    "gap",
    "approximation_gap",
    "amortization_gap",
    "learning_gap",
    "kl",
    "khat_max",
    "seconds",
    "steps",
    "parameters",
    "converged",
)
TABLE_ONLY = (
    "objective",
    "is_bound",
    "denoising_elbo",
    "denoising_elbo_se",
    "khat_share",
    "best_member_converged",
)
SUMMARISED = ("elbo", "log_evidence", "gap", "approximation_gap", "amortization_gap", "learning_gap", "kl", "seconds")
HELDOUT = HeldOut._fields
HELDOUT_SUMMARISED = ("heldout_elbo", "heldout_log_evidence")


@dataclass(frozen=True)
class Comparison:
    """Fits of several methods from several seeds on the same rows.

    Attributes
    ----------
    model : str
        Name of the entry.
    data : dict
        ``name``, ``rows`` and ``columns`` of the data, and ``arguments`` where more than the name makes them.
    fits : list of Fit
        One per method and seed, in the order of :attr:`table`.
    table : DataFrame
        A row per fit; nats, totals over the rows. ``objective`` is the last value of what was optimised,
        smoothed over the last hundred steps; it and the ELBO are two columns, never one. ``is_bound`` is False
        where there is no ELBO, because q has no density. ``denoising_elbo`` is that of corrupted rows. Where rows
        were held out, columns that begin with ``heldout_`` are about those, see
        :class:`~elbozoo.inference.heldout.HeldOut`; all others are about the rows of the fits.
    options : dict
        Options that were given, by name.
    heldout : dict or None
        Where rows were held out: ``part``, test or validation, its number of ``rows``, and ``validation_rows``.
    failures : list of Failure
        Fits that broke down, which have no row: ``method``, ``seed`` and ``cause``.
    """

    model: str
    data: dict[str, Any]
    fits: list[Fit]
    table: pd.DataFrame
    options: dict[str, Any]
    heldout: dict[str, Any] | None = None
    failures: list[Failure] = field(default_factory=list)

    @property
    def summary(self) -> pd.DataFrame:
        """Mean and standard deviation over the seeds, per method, best evidence first: nats, totals."""
        columns = [*SUMMARISED, *(HELDOUT_SUMMARISED if self.heldout else ())]
        groups = self.table.groupby("method", sort=False)[columns]
        summary = groups.agg(["mean", "std"])
        return summary.sort_values(("log_evidence", "mean"), ascending=False, na_position="last")

    @property
    def trajectories(self) -> pd.DataFrame:
        """All trajectories in one table, with the columns method and seed in front."""
        frames = [fit.trajectory.assign(method=fit.method, seed=fit.seed) for fit in self.fits]
        together = pd.concat(frames, ignore_index=True)
        return together[["method", "seed", *[c for c in together.columns if c not in ("method", "seed")]]]

    def document(self) -> dict[str, Any]:
        """Return the comparison as plain values in the schema of ``--json``.

        None, ``null`` in JSON, stands where a figure does not apply.

        Returns
        -------
        dict
            ``model``, ``data``, ``rows``, and ``heldout`` and ``failures`` where there are any.

        Examples
        --------
        >>> import elbozoo as ez
        >>> document = ez.compare("ppca", "iris", methods=["closed-form"], seeds=1, progress=False).document()
        >>> document["data"], document["rows"][0]["log_evidence_kind"]
        ({'name': 'iris', 'rows': 150, 'columns': 4}, 'exact')
        """
        records = self.table.to_dict("records")
        document: dict[str, Any] = {
            "model": self.model,
            "data": self.data,
            "rows": [{key: _plain(row[key]) for key in ROW} for row in records],
        }
        if self.heldout:
            keys = ("method", "seed", *HELDOUT)
            fits = [{key.removeprefix("heldout_"): _plain(row[key]) for key in keys} for row in records]
            document["heldout"] = {**self.heldout, "fits": fits}
        if self.failures:
            document["failures"] = [failure._asdict() for failure in self.failures]
        return document

    def save(self, directory: str | Path) -> Path:
        """Write the table, the JSON document, the trajectories and every fit.

        Fits that are there already stay as they are.

        Parameters
        ----------
        directory : str or path
            Folder for the files; it is made where there is none.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        InvalidInput
            If it cannot be written.
        """
        folder = writable_directory(directory)
        self.table.to_csv(folder / "comparison.csv", index=False)
        document = {**self.document(), "options": self.options}
        (folder / "comparison.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        self.trajectories.to_csv(folder / "trajectories.csv", index=False)
        for fit in self.fits:
            place = folder / FITS / f"{fit.method}-{fit.seed}"
            if not isinstance(fit.entry, Program) and not holds(place, fit):
                fit.save(place)
        return folder

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read a comparison that :meth:`save` wrote.

        Parameters
        ----------
        directory : str or path
            Folder that :meth:`save` wrote.

        Returns
        -------
        Comparison
            Its fits carry no data.

        Raises
        ------
        InvalidInput
            If there is no comparison in it.
        """
        folder = Path(directory)
        try:
            document = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
            table = pd.read_csv(folder / "comparison.csv")
        except (FileNotFoundError, json.JSONDecodeError, pd.errors.ParserError) as error:
            raise InvalidInput(f"{folder}: expected a directory written by Comparison.save ({error})") from None
        fits = [Fit.load(folder / FITS / f"{row.method}-{row.seed}") for row in table.itertuples()]
        heldout = document.get("heldout")
        about = {key: value for key, value in heldout.items() if key != "fits"} if heldout else None
        failures = [Failure(**failure) for failure in document.get("failures", [])]
        return cls(document["model"], document["data"], fits, table, document["options"], about, failures)


def run_comparison(
    model: Any,
    x: Tensor,
    methods: Iterable[str | None],
    seeds: int | Iterable[int],
    options: Mapping[str, Any],
    *,
    name: str = "data",
    names: Sequence[str] | None = None,
    records: Records = NO_RECORDS,
    companions: Companions = ALONE,
    arguments: Mapping[str, Any] | None = None,
    levels: Mapping[str, list[str]] | None = None,
    rows: Rows | None = None,
    out: str | Path | None = None,
    scheduler: Any = None,
    progress: bool = True,
    on_fit: Callable[[Fit], None] = lambda fit: None,
) -> Comparison:
    """Fit every method from every seed and put their ledgers side by side.

    Parameters
    ----------
    model : str, type or callable
        See :func:`~elbozoo.inference.method.plan`.
    x : Tensor (N, D)
        Data, float64.
    methods : iterable of str
        Methods, None for the guide that a model takes by default; all are checked before the first one runs.
        ``all`` alone learns one model, by EM in closed form or amortized, and fits every way to a q of each datum to
        it: shared, free, amortized, semi-amortized, exact.
    seeds : int or iterable of int
        Number of seeds, counted from 0, or the seeds themselves.
    options : mapping
        Options by name, given to every method that reads them.
    name : str
        Name of the data in the results.
    names : sequence of str, optional
        Names of the columns.
    records : Records
        What the fits leave on disk while they run. One that was stopped goes on from its checkpoint, and one that
        had ended comes back without a step.
    companions : Companions
        Data beside these: to stop by, to report held-out figures of, to draw binary pixels from.
    arguments : mapping, optional
        What makes these data from the name, which the results keep.
    levels : mapping of list of str, optional
        For columns of labels, what their codes stand for.
    rows : Rows, optional
        All rows where they are not in memory, and ``x`` is a sample of them.
    out : path, optional
        Directory in which every finished fit is left at once, with its figures, in the folder fits/METHOD-SEED. A fit
        that is there already is taken as it is, if it is of the same model, data, method, options, seed and versions.
    scheduler : str or distributed.Client, optional
        Where fits run, each as a task of its own, see :func:`~elbozoo.inference.cluster.connected`; in this process by
        default.
    on_fit : callable
        Called with each fit as it ends; with those of seeds that run as one when all of them have.

    Raises
    ------
    InvalidInput
        Before anything runs, for anything that does not fit.
    NumericalFailure
        If every fit breaks down, or has a bound that exceeds the truth. Those that do while others do not are named in
        ``failures``.
    """
    chosen, asked = seed_list(seeds), _unique(methods)
    prepare = functools.partial(
        plan, model, x, options=options, names=names, records=records, companions=companions, rows=rows
    )
    if EVERY_WAY in asked:
        teacher, plans = _ways_to_q(asked, prepare)
    else:
        teacher, plans = None, _unlike([prepare(method) for method in asked])
    warn_of_unread([*plans, *([teacher] if teacher else [])])
    refuse_without_records(plans)
    if scheduler is not None:
        _refuse_processes([*plans, *([teacher] if teacher else [])])
    shared = Shared(plans[0])
    book = functools.partial(Book, levels=levels or {})
    with runner(scheduler, len(chosen) * (len(plans) + bool(teacher)), progress) as run:
        first = book(_kept(out if teacher else None, LEARNED), judges=False)
        run.run([Task(teacher, seed) for seed in chosen] if teacher else [], first, shared)
        tasks = _tasks(plans, chosen, teacher, first)
        results = book(_kept(out, FITS), on_fit=on_fit)
        if not first.stopped:
            run.run(tasks, results, shared)
    keys = [task.key for task in tasks if task.key in results.figures]
    order = {task.key: position for position, task in enumerate(tasks)}
    failures = [*first.failures, *sorted(results.failures, key=lambda failure: order[failure[:2]])]
    if not keys:
        raise KeyboardInterrupt if first.stopped or results.stopped else _nothing(failures)
    fits = [results.fits[key] for key in keys]
    ledgers = _with_learning_gaps([results.figures[key].ledger for key in keys], shared.closed_form)
    table = pd.DataFrame([_row(fit, ledger) for fit, ledger in zip(fits, ledgers, strict=True)])
    data: dict[str, Any] = {"name": name, "rows": x.shape[0] if rows is None else len(rows), "columns": x.shape[1]}
    if teacher:
        data["methods"] = EVERY_WAY
    if arguments:
        data["arguments"] = dict(arguments)
    if companions.heldout is None:
        return Comparison(fits[0].model, data, fits, table, plain(options), failures=failures)
    heldout = [results.figures[key].heldout for key in keys]
    # From plain values, which have a type by column; a Series of them has none.
    table = pd.concat([table, pd.DataFrame([each._asdict() for each in heldout if each is not None])], axis=1)
    return Comparison(fits[0].model, data, fits, table, plain(options), _about(companions), failures)


def _refuse_processes(plans: list[Plan]) -> None:
    """Refuse fits that several processes share where workers, which start none, are to run them."""
    for each in plans:
        read = schemas_of_method(each.method, each.entry)
        if TrainingOptions in read and each.schema(TrainingOptions).processes > 1:
            raise InvalidInput(
                f"option processes: found {each.schema(TrainingOptions).processes} with a scheduler, expected 1: its "
                "workers start no processes; leave one of the two out"
            )


def _tasks(plans: list[Plan], seeds: list[int], teacher: Plan | None, first: Book) -> list[Task]:
    """Return the fits to compare; where θ is learned first, those to the models that were learned."""
    if teacher is None:
        return [Task(each, seed) for each in plans for seed in seeds]
    learned = {seed: first.fits[teacher.label, seed] for seed in seeds if (teacher.label, seed) in first.fits}
    return [Task(each, seed, fit) for each in plans for seed, fit in learned.items()]


def _kept(out: str | Path | None, name: str) -> FinishedFits | None:
    return None if out is None else FinishedFits(Path(out) / name)


def _nothing(failures: list[Failure]) -> BaseException:
    """Return the error of a comparison that no fit has come of."""
    if not failures:
        return KeyboardInterrupt()
    if len(failures) == 1:
        return NumericalFailure(failures[0].cause)
    return NumericalFailure(f"all {len(failures)} fits broke down; {failures[0]}")


def _unlike(plans: list[Plan]) -> list[Plan]:
    """Return the plans without those of a method that is there already, by whichever name it was asked for."""
    return list({each.label: each for each in plans}.values())


def _ways_to_q(methods: list[str | None], prepare: Callable[[str], Plan]) -> tuple[Plan, list[Plan]]:
    """Return the method that learns θ, and one for each way in which a datum may come by its q.

    Raises
    ------
    InvalidInput
        For other methods beside ``all``, or a model without a q for each datum.
    """
    if len(methods) > 1:
        others = ", ".join(str(method) for method in methods if method != EVERY_WAY)
        raise InvalidInput(f"found {EVERY_WAY} beside {others}, expected it alone: it fits every q to one model")
    entry = prepare("mean-field").entry
    reasons = {way: refusal_of(way, entry) for way in WAYS_TO_Q}
    fitting = [way for way, reason in reasons.items() if reason is None]
    if len(fitting) < 2:
        raise InvalidInput(
            f"method {EVERY_WAY!r} compares ways in which each datum comes by its q, and {entry.name()} has "
            f"{len(fitting)} of them ({next(filter(None, reasons.values()))}); name the methods to compare"
        )
    for way in WAYS_TO_Q:
        if way not in fitting:
            logger.info("left out %s: %s", way, reasons[way])
    # Monte Carlo EM asks nothing of q, and may learn a latent space in which no q finds its way.
    learner = prepare("em" if isinstance(entry, SupportsEM) else "amortized")
    # In a folder apart, since the same method may come again as a way to q.
    return replace(learner, records=learner.records.under("model")), [prepare(way) for way in fitting]


def _unique(methods: Iterable[str | None]) -> list[str | None]:
    names = list(dict.fromkeys(methods))
    if not names:
        raise InvalidInput("found no method, expected at least one, such as em or mean-field")
    return names


def seed_list(seeds: int | Iterable[int]) -> list[int]:
    """Return the seeds that ``seeds`` stands for: so many from 0 on, or each of those given once.

    Raises
    ------
    InvalidInput
        For none at all, or anything that is no seed.
    """
    if isinstance(seeds, Iterable):
        chosen = [valid_seed(seed) for seed in dict.fromkeys(seeds)]
    else:
        chosen = list(range(valid_seed(seeds)))
    if not chosen:
        raise InvalidInput(f"option seeds: found {seeds!r}, expected at least 1")
    return chosen


def _with_learning_gaps(ledgers: list[Ledger], closed_form: float) -> list[Ledger]:
    known = [value for value in (closed_form, *(ledger.log_evidence for ledger in ledgers)) if math.isfinite(value)]
    best = max(known, default=math.nan)
    return [replace(ledger, learning_gap=best - ledger.log_evidence) for ledger in ledgers]


def _row(fit: Fit, ledger: Ledger) -> dict[str, Any]:
    figures = {
        **ledger.as_dict(),
        "method": fit.method,
        "guide": fit.guide.name,
        "seed": fit.seed,
        "seconds": fit.seconds,
        "steps": len(fit.trajectory),
        "parameters": fit.parameters,
        "converged": fit.converged,
        "objective": float(fit.trajectory["objective"].tail(100).mean()) if len(fit.trajectory) else math.nan,
    }
    return {key: figures[key] for key in (*ROW, *TABLE_ONLY)}


def _about(companions: Companions) -> dict[str, Any]:
    lengths = {part: None if rows is None else len(rows) for part, rows in companions._asdict().items()}
    return {"part": companions.part, "rows": lengths[str(companions.part)], "validation_rows": lengths["validation"]}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value
