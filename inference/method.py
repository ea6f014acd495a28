"""Methods: from (entry, data, options, seed) to a fit."""

from __future__ import annotations

import copy
import hashlib
import logging
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.conjugate import ConjugateGuide
from elbozoo.guides.registry import ALL_NAMES, GLOBAL_NAMES, build_guide, guide_names, refusal_of, resolve_guide
from elbozoo.inference.cavi import CAVIOptions, run_cavi
from elbozoo.inference.checkpoints import Checkpoints, fingerprint
from elbozoo.inference.data_parallel import check_processes, run_in_processes
from elbozoo.inference.devices import resolve_device
from elbozoo.inference.em import EMOptions, run_em
from elbozoo.inference.engines import captures
from elbozoo.inference.event_log import event_log
from elbozoo.inference.fit import Fit, provenance
from elbozoo.inference.heldout import ALONE, Companions, check_new_rows
from elbozoo.inference.ledger import holds_posterior
from elbozoo.inference.losses import Weighting
from elbozoo.inference.many_seeds import NotTogether, SeededFit, graph_of_seeds, run_together, seeds_at_once
from elbozoo.inference.monte_carlo_em import MonteCarloEMOptions, run_monte_carlo_em
from elbozoo.inference.nuts import NUTSOptions, run_nuts
from elbozoo.inference.objectives import Objective, resolve_objective
from elbozoo.inference.posterior_guide import posterior_guide, refusal_of_posterior_guide
from elbozoo.inference.records import NO_RECORDS, Records
from elbozoo.inference.resampling import PixelDraws
from elbozoo.inference.row_density import refusal_of_density
from elbozoo.inference.rows import Part, Rows
from elbozoo.inference.steps import unique_parameters
from elbozoo.inference.svi import Observer, SVIResult, begin, check_training, refuse_lost_parameters, run_svi
from elbozoo.inference.training import TrainingOptions
from elbozoo.inference.trajectory import Trajectory
from elbozoo.inference.validation import Validation, check_validation, validation_for
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import (
    Entry,
    HasClosedForm,
    HasOracle,
    HasPosterior,
    Program,
    SupportsCAVI,
    SupportsEM,
)
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure, unknown_name
from elbozoo.models.contract.isolation import SEEDS, isolated
from elbozoo.models.contract.options import Options, plain
from elbozoo.models.contract.programs import check_program
from elbozoo.models.contract.registry import get_entry
from elbozoo.models.contract.sequences import StackedEntry
from elbozoo.models.contract.sites import LatentSite

logger = logging.getLogger(__name__)

BREAKDOWNS = (NumericalFailure, torch.linalg.LinAlgError)  # of a fit, which are no end of other fits
SCHEMA_TITLES: dict[type[Options], str] = {
    GuideOptions: "guide",
    TrainingOptions: "SVI",
    EMOptions: "EM",
    MonteCarloEMOptions: "Monte Carlo EM",
    CAVIOptions: "CAVI",
    NUTSOptions: "NUTS",
}
SCHEMAS: tuple[type[Options], ...] = tuple(SCHEMA_TITLES)
SPECIAL = ("em", "closed-form", "cavi", "nuts")
DEFAULTS = ("em", "mean-field", "amortized")
CHECKED_AT_ONCE = 2**16  # rows
NOT_DIVIDED = (
    "the gap is not divided: the best member of the family was not searched for over data that are not in memory; "
    "fit.ledger(x) divides it on some rows x"
)


@dataclass(frozen=True)
class Plan:
    """A fit that is ready to run: everything about it has been checked.

    Attributes
    ----------
    method : str
        Name of the method, canonical for guides.
    label : str
        Name by which it was asked for.
    entry : Entry
        A model built for the data, at the starting values of seed 0.
    records : Records
        What its fits leave on disk while they run.
    table : Tensor (N, D)
        The rows as they came, before they were arranged.
    companions : Companions
        Data beside these rows: to stop by, to test with, to draw binary pixels from.
    rows : Rows or None
        All rows where they are not in memory; ``x`` is then a sample of them, from which everything starts.
    """

    method: str
    label: str
    entry: Entry
    x: Tensor
    options: dict[str, Any]
    build: Callable[[int], Entry]
    table: Tensor
    records: Records = NO_RECORDS
    companions: Companions = ALONE
    rows: Rows | None = None

    @property
    def total(self) -> int:
        """Number of data, of which some may be out of memory."""
        return len(self.x) if self.rows is None else len(self.rows)

    def run(self, seed: int, *, theta: Entry | None = None, progress: bool = True) -> Fit:
        """Fit from ``seed``, which decides the starting values and every draw.

        Where ``theta`` is given, the model keeps its parameters, and q alone is fitted.
        """
        seed = valid_seed(seed)
        entry = self.model_of(seed, theta)
        x = self.x.to(entry.dtype)
        with isolated(seed):
            return _RUNNERS.get(self.method, _run_guide)(self, entry, x, seed, progress)

    def run_all(
        self, seeds: Sequence[int], *, thetas: Mapping[int, Entry] | None = None, progress: bool = True
    ) -> Iterator[Fit]:
        """Fit from each of ``seeds``, by SVI as one batch where that can be; see :meth:`run`.

        Fits that run as one share their time by their numbers of steps. Where it cannot be, one log line says why.

        Raises
        ------
        NumericalFailure
            At the first fit that breaks down.
        """
        for ended in self.attempts(seeds, thetas=thetas, progress=progress):
            for outcome in ended.values():
                if isinstance(outcome, NumericalFailure):
                    raise outcome
                yield outcome

    def attempts(
        self, seeds: Sequence[int], *, thetas: Mapping[int, Entry] | None = None, progress: bool = True
    ) -> Iterator[dict[int, Fit | NumericalFailure]]:
        """Yield what :meth:`run_all` does, by seed and those that ran as one together, or the error that ended a fit.

        An interrupted fit is the last.
        """
        todo, thetas = [valid_seed(seed) for seed in seeds], thetas or {}
        reason = _refusal_to_run_together(self)
        try:
            while len(todo) > 1 and reason is None:
                done = _run_together(self, todo, thetas, progress)
                todo = todo[len(done) :]
                yield done
                if any(isinstance(each, Fit) and each.interrupted for each in done.values()):
                    return
        except (NotTogether, *BREAKDOWNS) as refusal:  # of whichever seed it may be
            reason = str(refusal)
        if len(todo) > 1 and self.method not in SPECIAL:
            logger.info("%s %s: %d seeds run one by one: %s", self.entry.name(), self.label, len(todo), reason)
        for seed in todo:
            try:
                fit = self.run(seed, theta=thetas.get(seed), progress=progress)
            except BREAKDOWNS as error:
                yield {seed: NumericalFailure(str(error))}
                continue
            yield {seed: fit}
            if fit.interrupted:
                return

    def model_of(self, seed: int, theta: Entry | None) -> Entry:
        """Return the model at the starting values of ``seed``, or fixed at the parameters of ``theta``."""
        entry = self.build(seed)
        if theta is not None:
            entry.load_state_dict(theta.state_dict())
            entry.requires_grad_(False)
        return entry

    @property
    def keeps_records(self) -> bool:
        """Whether its fits can go on from a checkpoint and write a log: those by SVI and by Monte Carlo EM."""
        return self.method not in SPECIAL or (self.method == "em" and not isinstance(self.entry, SupportsEM))

    def reads(self) -> set[str]:
        """Return the names of the options that this fit reads."""
        schemas = (type(self.entry.options), *schemas_of_method(self.method, self.entry))
        return {name for schema in schemas for name in schema.model_fields}

    def schema(self, cls: type[Options]) -> Any:
        """Return the options of this plan that ``cls`` declares, validated; the entry's own where none are given."""
        given = {**_suggested(self.entry, self.options), **self.options}
        return cls.parse({k: v for k, v in given.items() if k in cls.model_fields})


def plan(
    model: Any,
    x: Tensor,
    method: str | None,
    options: Mapping[str, Any],
    names: Sequence[str] | None = None,
    records: Records = NO_RECORDS,
    companions: Companions = ALONE,
    rows: Rows | None = None,
) -> Plan:
    """Check everything about a fit before it runs.

    Parameters
    ----------
    model : str, type or callable
        Name of an entry, an entry class, or a program of the user's.
    x : Tensor (N, D)
        Data, float64.
    method : str or None
        ``em``, ``closed-form``, ``cavi``, ``nuts`` or a guide's name; None takes ``mean-field``, or the first guide
        among the default methods where that does not fit.
    options : mapping
        Options of the model, the guide and the method, by name; one name is one option wherever it is read.
    names : sequence of str, optional
        Names of the columns of ``x``.
    records : Records
        What the fits leave on disk while they run.
    companions : Companions
        Data beside ``x``: to stop by, to test with, to draw binary pixels from.
    rows : Rows, optional
        All rows where they are not in memory, and ``x`` is a sample of them.

    Raises
    ------
    InvalidInput
        For anything unknown, out of range, or that does not fit together.
    """
    options = plain(options)
    build, entry_options = _builder(model, x, options, names)
    rest = {k: v for k, v in options.items() if k not in entry_options.model_fields}
    _check_names(rest, entry_options)
    entry = build(0)
    if isinstance(entry, Program):
        check_program(entry, Batch.full(x.to(entry.dtype)))
    method = default_guide(entry) if method is None else method
    canonical = resolve_method(method, entry)
    arranged = entry.arrange(x, entry.options)
    _check_companions(entry, arranged, companions)
    reason = None if rows is None else refusal_of_stream(canonical, entry)
    if reason is not None:
        raise _needs_memory(canonical, reason)
    is_all_local = rows is None or all(site.is_local for site in entry.latent_sites(arranged))
    if companions.heldout is not None and not is_all_local:
        raise InvalidInput(
            f"{companions.part}: found it with data that are not in memory and a latent of the whole data set, "
            "expected one of the two: new rows depend on all others through it; leave it out, or the stream"
        )
    result = Plan(canonical, method, entry, arranged, dict(options), build, x, records, companions, rows)
    for schema in SCHEMAS:
        result.schema(schema)
    if canonical not in SPECIAL:
        _check_objective(result)
    for schema in schemas_of_method(canonical, entry):
        if "device" in schema.model_fields:
            resolve_device(result.schema(schema).device, entry.dtype)
    return result


def refuse_without_records(plans: Sequence[Plan]) -> None:
    """Refuse records that none of ``plans`` keeps.

    Raises
    ------
    InvalidInput
        With the methods that do keep some.
    """
    records = plans[0].records
    asked = [name for name in ("checkpoint", "tensorboard") if getattr(records, name) is not None]
    if asked and not any(each.keeps_records for each in plans):
        raise InvalidInput(
            f"{asked[0]}: found with {', '.join(each.label for each in plans)}, expected a guide or Monte Carlo EM: "
            "other methods keep no checkpoint and no log, and are run again from the start; leave it out"
        )


def warn_of_unread(plans: Sequence[Plan]) -> None:
    """Log a warning for each option that none of ``plans`` reads, since it changes nothing."""
    read = set().union(*(each.reads() for each in plans))
    for name in plans[0].options:
        if name not in read:
            logger.warning("option %r is not read by %s", name, ", ".join(each.label for each in plans))


def _needs_memory(method: str, reason: str) -> InvalidInput:
    return InvalidInput(
        f"found {method} with data that are not in memory, expected a method that streams them: {reason}; load them "
        "with load_data(..., stream=False) or --no-stream if they fit, or take another method"
    )


def refusal_of_stream(method: str, entry: Entry) -> str | None:
    """Say why a fit of ``entry`` by ``method``, a canonical name, needs all rows in memory, or return None."""
    if isinstance(entry, StackedEntry):
        return f"the rows of {entry.name()} belong together, and are looked at together"
    if entry.key_columns():
        return f"{entry.name()} has a column of labels, which have to be known before the first step"
    if method in SPECIAL:
        streams = method == "em" and isinstance(entry, SupportsEM)
        return None if streams else f"{method} for {entry.name()} goes over all rows at each step, in memory"
    if method.startswith("free-"):
        return "its q has parameters of its own for each row"
    sites = entry.latent_sites()
    if not sites:
        return f"{entry.name()} has no latent"
    if any(site.is_local for site in sites) and method not in GLOBAL_NAMES:
        return None
    if method in ("exact", "laplace"):
        return "it is about all rows at once"
    shapes = [[site.event_shape for site in entry.latent_sites(entry.simulate(n, seed=0)[0])] for n in (2, 3)]
    return None if shapes[0] == shapes[1] else f"a latent of {entry.name()} has as many values as there are rows"


def valid_seed(seed: Any) -> int:
    """Return ``seed`` as an int.

    Raises
    ------
    InvalidInput
        For anything but an integer from 0 to 2**32 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < SEEDS:
        raise InvalidInput(f"option seed: found {seed!r}, expected int >= 0, < 2**32")
    return int(seed)


def program_entry(program: Any, x: Tensor) -> Entry:
    """Return a copy of the user's ``program`` as an entry for the rows ``x``; the user's own stays as it was."""
    return Program(copy.deepcopy(program), x.shape[1]).to(x.dtype)


def method_names(entry: Entry) -> list[str]:
    """Return the names of all methods that apply to ``entry``."""
    special = [name for name, refusal in _refusals(entry).items() if refusal is None]
    return [*special, *guide_names(entry)]


def schemas_of_method(method: str, entry: Entry) -> tuple[type[Options], ...]:
    """Return the options that ``method`` reads, beside those of ``entry``."""
    em: type[Options] = EMOptions if isinstance(entry, SupportsEM) else MonteCarloEMOptions
    of_method: dict[str, tuple[type[Options], ...]] = {
        "em": (em,),
        "closed-form": (),
        "cavi": (CAVIOptions,),
        "nuts": (NUTSOptions,),
    }
    return of_method.get(method, (GuideOptions, TrainingOptions))


def schemas_of(entry: Entry) -> list[type[Options]]:
    """Return the options of all methods that apply to ``entry``, each once, in the order of :data:`SCHEMAS`."""
    found = {schema for method in method_names(entry) for schema in schemas_of_method(method, entry)}
    return [schema for schema in SCHEMAS if schema in found]


def default_methods(entry: Entry) -> list[str]:
    """Return the methods that are compared when none are named."""
    sites = entry.latent_sites()
    if not sites:
        return ["exact"]
    if any(not site.is_local for site in sites):
        return ["mean-field", "full-rank", "laplace"]
    special = _refusals(entry)
    reasons = {name: special.get(name) or (None if name in special else refusal_of(name, entry)) for name in DEFAULTS}
    return [name for name, reason in reasons.items() if reason is None]


def default_methods_of_streams(entry: Entry) -> list[str]:
    """Return those of the default methods that take rows which are not in memory.

    Raises
    ------
    InvalidInput
        If none of them does, with the reasons.
    """
    methods = default_methods(entry)
    reasons = {name: refusal_of_stream(resolve_method(name, entry), entry) for name in methods}
    for name, reason in reasons.items():
        if reason is not None:
            logger.info("left out %s, since the data are not in memory: %s", name, reason)
    streaming = [name for name in methods if reasons[name] is None]
    if not streaming:
        raise _needs_memory(methods[0], str(reasons[methods[0]]))
    return streaming


def default_guide(entry: Entry) -> str:
    """Return the guide that is meant when none is named: mean-field where it fits."""
    return next((name for name in default_methods(entry) if name not in SPECIAL), "mean-field")


def resolve_method(name: str, entry: Entry) -> str:
    """Return the canonical name of a method.

    Raises
    ------
    InvalidInput
        For an unknown method, or one that does not apply, with the reason.
    """
    refusals = _refusals(entry)
    if name in refusals:
        if refusals[name] is not None:
            raise InvalidInput(
                f"method {name!r} does not apply to {entry.name()}: {refusals[name]}; "
                f"methods that do: {', '.join(method_names(entry))}"
            )
        return name
    if name not in ALL_NAMES:
        raise unknown_name("method", name, [*refusals, *ALL_NAMES])
    return resolve_guide(name, entry)


def _refusals(entry: Entry) -> dict[str, str | None]:
    sites = entry.latent_sites()
    learns = bool(list(entry.parameters()))
    em = closed = cavi = nuts = None
    if not isinstance(entry, SupportsEM):
        em = _monte_carlo_em_refusal(entry, sites)
    if not sites:
        em = "it has no latent, and its likelihood is exact: fit it with the guide exact"
    if not isinstance(entry, HasClosedForm):
        closed = "no closed form of its maximum is known"
    if not isinstance(entry, SupportsCAVI):
        cavi = "it is not known to be conditionally conjugate"
    if learns:
        nuts = "it has parameters to learn, and NUTS samples latents alone"
    elif any(site.is_local and not site.is_enumerable for site in sites):
        nuts = "its latents are local, one per datum, and NUTS is the reference for global ones"
    elif any(site.is_discrete and not site.is_local for site in sites):
        nuts = "a latent is discrete, and NUTS follows gradients"
    return {"em": em, "closed-form": closed, "cavi": cavi, "nuts": nuts}


def _monte_carlo_em_refusal(entry: Entry, sites: list[LatentSite]) -> str | None:
    if not sites:
        return None
    if not list(entry.parameters()):
        return "it has no parameters to learn, and EM learns nothing else"
    reason = refusal_of_density(entry, sites) or refusal_of_posterior_guide(entry)
    return reason and f"it has no E and M step in closed form, and for Monte Carlo EM {reason}"


def _builder(
    model: Any, x: Tensor, options: Mapping[str, Any], names: Sequence[str] | None
) -> tuple[Callable[[int], Entry], type[Options]]:
    if isinstance(model, str):
        model = get_entry(model)
    if isinstance(model, type) and issubclass(model, Entry):
        given = {k: v for k, v in options.items() if k in model.Options.model_fields}
        return lambda seed: model.from_data(x, seed=seed, names=names, **given), model.Options
    return lambda seed: program_entry(model, x), Options


def _suggested(entry: Entry, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the entry suggests to its methods; nothing where the user asks for another objective."""
    suggested = entry.method_options
    same = options.get("objective", suggested.get("objective")) == suggested.get("objective")
    return suggested if same else {}


def _check_names(options: Mapping[str, Any], entry_options: type[Options]) -> None:
    known = {name for schema in (*SCHEMAS, entry_options) for name in schema.model_fields}
    for name in options:
        if name not in known:
            raise unknown_name("option", name, known)


def _check_companions(entry: Entry, x: Tensor, companions: Companions) -> None:
    """Refuse other rows that the entry could not have been fitted to."""
    for part in ("validation", "test"):
        table = getattr(companions, part)
        if table is None:
            continue
        new = entry.arrange(table, entry.options)
        if new.shape[-1] != x.shape[-1]:
            raise InvalidInput(
                f"{part}: found {table.shape[1]} columns, expected those of the fit: {', '.join(entry.table_names)}"
            )
        check_new_rows(entry, x, new, part)


def _check_objective(plan: Plan) -> None:
    with isolated(0):
        x = plan.x[:2].to(plan.entry.dtype)
        guide = build_guide(plan.method, plan.entry, x, plan.schema(GuideOptions).without_search())
    options = plan.schema(TrainingOptions)
    objective = resolve_objective(options.objective, guide, options)
    check_training(objective, guide, options, plan.total)
    is_streamed, keeps_checkpoints = plan.rows is not None, plan.records.checkpoint is not None
    check_processes(objective, guide, options, plan.total, is_streamed=is_streamed, keeps_checkpoints=keeps_checkpoints)
    check_validation(guide, plan.companions.validation, options)


@dataclass(frozen=True)
class _Prepared:
    """A fit by SVI, built and on its device, before its first step."""

    entry: Entry
    guide: Guide
    objective: Objective
    options: TrainingOptions
    batch: Batch
    x: Tensor
    seed: int
    watch: Validation | None

    @property
    def observers(self) -> list[Observer]:
        """What looks at it after each step, beside a log."""
        return [self.watch] if self.watch else []

    @property
    def weighting(self) -> Weighting | None:
        """β along the fit, where it moves."""
        return self.options.weighting if self.objective.moving_steps(self.options) else None


def _prepare(plan: Plan, entry: Entry, x: Tensor, seed: int) -> _Prepared:
    options = plan.schema(TrainingOptions)
    guide = build_guide(plan.method, entry, x, plan.schema(GuideOptions))
    objective = resolve_objective(options.objective, guide, options)
    device = resolve_device(options.device, entry.dtype)
    entry.to(device)
    guide.to(device)
    rows = plan.companions.validation
    watch = validation_for(entry, guide, rows, options, seed, objective.moving_steps(options))
    batch = Batch.full(x.to(device))._replace(total=plan.total)
    return _Prepared(entry, guide, objective, options, batch, x, seed, watch)


def _finish(plan: Plan, prepared: _Prepared, result: SVIResult, seconds: float, notes: Sequence[str] = ()) -> Fit:
    """Return the fit; ``seconds`` are those before it is finished."""
    before = time.perf_counter()
    entry, guide, watch = prepared.entry, prepared.guide, prepared.watch
    of_watch = watch.finish(len(result.trajectory.rows)) if watch else []
    refuse_lost_parameters(entry, guide)
    entry.cpu()
    guide.cpu()
    guide.finalize(Batch.full(prepared.x))
    return _fit(
        plan,
        entry,
        guide,
        prepared.seed,
        prepared.objective.name,
        result.trajectory,
        seconds + time.perf_counter() - before,
        result.converged,
        result.interrupted,
        [*notes, *of_watch],
        watch,
    )


def _run_guide(plan: Plan, entry: Entry, x: Tensor, seed: int, progress: bool) -> Fit:
    prepared = _prepare(plan, entry, x, seed)
    records = plan.records.under(f"{plan.method}-{seed}")
    device = prepared.batch.x.device
    checkpoints = _checkpoints(plan, records, entry, seed, prepared.options, device, ("steps",))
    before = time.perf_counter()
    fit = (entry, prepared.guide, prepared.objective, prepared.batch, prepared.options)
    resample = _pixel_draws(plan, entry)
    with event_log(records.tensorboard, prepared.weighting) as log:
        if prepared.options.processes > 1:
            result = run_in_processes(
                *fit, progress=progress, observers=prepared.observers, logs=log, resample=resample
            )
        else:
            result = run_svi(
                *fit,
                progress=progress,
                observers=[*log, *prepared.observers],
                rows=plan.rows,
                resample=resample,
                checkpoints=checkpoints,
            )
    seconds = time.perf_counter() - before + (checkpoints.seconds if checkpoints else 0.0)
    return _finish(plan, prepared, result, seconds)


def _refusal_to_run_together(plan: Plan) -> str | None:
    """Say why fits from several seeds run one by one, or return None."""
    if plan.method in SPECIAL:
        return "it is no SVI"
    options = plan.schema(TrainingOptions)
    if options.processes > 1:
        return "its rows are shared among processes"
    if not captures(options):
        return "its steps are not captured"
    if plan.rows is not None:
        return "each reads its rows in an order of its own"
    if plan.records.checkpoint is not None:
        return "each has checkpoints of its own"
    if resolve_device(options.device, plan.entry.dtype).type != "cpu":
        return "noise of each seed's own is drawn on the CPU"
    return None


def _seeded(
    plan: Plan, seed: int, theta: Entry | None, x: Tensor, resample: PixelDraws | None, logs: ExitStack
) -> tuple[_Prepared, SeededFit]:
    """Build the fit of a seed with a generator of its own, which stands where the global one would."""
    entry, generator = plan.model_of(seed, theta), torch.Generator()
    with isolated(seed):
        prepared = _prepare(plan, entry, x, seed)
        generator.set_state(torch.get_rng_state())
    if not unique_parameters(entry, prepared.guide):
        raise NotTogether("nothing is learned")
    state = begin(
        entry,
        prepared.guide,
        prepared.objective,
        prepared.batch,
        prepared.options,
        resample=resample is not None,
        generator=generator,
    )
    folder = plan.records.under(f"{plan.method}-{seed}").tensorboard
    log = logs.enter_context(event_log(folder, prepared.weighting))
    return prepared, SeededFit(state, generator, [*log, *prepared.observers], resample)


def _run_together(
    plan: Plan, seeds: Sequence[int], thetas: Mapping[int, Entry], progress: bool
) -> dict[int, Fit | NumericalFailure]:
    """Return the fits from as many of the ``seeds`` as one batch may hold, and the errors of those that broke down.

    Raises
    ------
    NotTogether
        Where they cannot be run as one.
    """
    # One copy of the data for all seeds.
    rows = plan.x.to(plan.entry.dtype), _pixel_draws(plan, plan.entry)
    with ExitStack() as stack:
        pairs = [_seeded(plan, seeds[0], thetas.get(seeds[0]), *rows, stack)]
        with isolated(seeds[0]):
            graph = graph_of_seeds(pairs[0][1])
        seeds = seeds[: seeds_at_once(graph)]
        pairs += [_seeded(plan, seed, thetas.get(seed), *rows, stack) for seed in seeds[1:]]
        first, fits = pairs[0][0], [fit for _, fit in pairs]
        before = time.perf_counter()
        with isolated(seeds[0]):
            title = f"{first.entry.name()} {first.guide.name}, {len(seeds)} seeds"
            results = run_together(fits, graph, title, progress=progress)
        total = time.perf_counter() - before
    steps = max(1, sum(len(fit.state.trajectory.rows) for fit in fits))
    done: dict[int, Fit | NumericalFailure] = {}
    for (prepared, fit), result in zip(pairs, results, strict=True):
        if isinstance(result, NumericalFailure):
            done[prepared.seed] = result
            continue
        with isolated(prepared.seed):
            torch.set_rng_state(fit.generator.get_state())
            done[prepared.seed] = _finish(plan, prepared, result, total * len(result.trajectory.rows) / steps)
    return done


def _pixel_draws(plan: Plan, entry: Entry) -> PixelDraws | None:
    intensities = plan.companions.intensities
    return None if intensities is None else PixelDraws(entry, plan.table, intensities)


def _run_em(plan: Plan, entry: Entry, x: Tensor, seed: int, progress: bool) -> Fit:
    if not isinstance(entry, SupportsEM):
        return _run_monte_carlo_em(plan, entry, x, seed, progress)
    before = time.perf_counter()
    rows = x if plan.rows is None else plan.rows
    run = run_em(entry, rows, plan.schema(EMOptions), seed=seed, start=x, progress=progress)
    seconds = time.perf_counter() - before
    guide = build_guide("exact", entry, x)
    return _fit(
        plan, entry, guide, seed, "log p(x)", run.trajectory, seconds, run.converged, run.interrupted, run.notes
    )


def _run_monte_carlo_em(plan: Plan, entry: Entry, x: Tensor, seed: int, progress: bool) -> Fit:
    options = plan.schema(MonteCarloEMOptions)
    device = resolve_device(options.device, entry.dtype)
    records = plan.records.under(f"{plan.method}-{seed}")
    checkpoints = _checkpoints(plan, records, entry, seed, options, device, ("iterations",))
    entry.to(device)
    before = time.perf_counter()
    with event_log(records.tensorboard) as log:
        batch = Batch.full(x.to(device))
        run = run_monte_carlo_em(entry, batch, options, progress=progress, logs=log, checkpoints=checkpoints)
    # Draws have no density, so the q of the fit is the closest to the posterior they came from.
    entry = entry.cpu().double()
    found = posterior_guide(entry, x.double(), plan.schema(GuideOptions))
    seconds = time.perf_counter() - before + (checkpoints.seconds if checkpoints else 0.0)
    notes = [found.note, *run.notes]
    return _fit(
        plan, entry, found.guide, seed, run.objective, run.trajectory, seconds, run.converged, run.interrupted, notes
    )


def _checkpoints(
    plan: Plan,
    records: Records,
    entry: Entry,
    seed: int,
    options: Options,
    device: torch.device,
    lengths: tuple[str, ...],
) -> Checkpoints | None:
    """Return the checkpoints of a fit; options in ``lengths`` may grow, since they change nothing before the end."""
    if records.checkpoint is None:
        return None
    free = () if getattr(options, "schedule", None) == "cosine" else lengths
    identity = identity_of(
        plan,
        seed,
        frozen={name: value for name, value in entry.named_parameters() if not value.requires_grad},
        option=options.model_dump(mode="json", exclude={*free, "device"}),
        checksum=checksum_of(plan, plan.companions.while_fitting()),
        device=device,
    )
    versions = provenance()
    machine = {name: versions[name] for name in ("threads", "platform")}
    return Checkpoints(records.checkpoint, records.checkpoint_every, identity, machine)


def checksum_of(plan: Plan, beside: Mapping[str, Tensor]) -> str:
    """Return a checksum of all rows of a fit and of the data ``beside`` them; one pass where they are not in memory."""
    checksum = fingerprint({"x": plan.x, **beside})
    if plan.rows is None:
        return checksum
    of_parts = plan.rows.total(_checksum_of_part, operator.add, CHECKED_AT_ONCE)
    return hashlib.sha256("".join([checksum, *of_parts]).encode()).hexdigest()


def _checksum_of_part(part: Part) -> list[str]:
    return [fingerprint({"x": part.x})]


def identity_of(
    plan: Plan,
    seed: int,
    *,
    frozen: Mapping[str, Tensor],
    option: Mapping[str, Any],
    checksum: str,
    device: torch.device,
) -> dict[str, Any]:
    """Return what a fit is a fit of: plain values by name, so that what it left on disk is known again.

    Parameters
    ----------
    frozen : mapping of Tensor
        Parameters of the model that stay as they are.
    option : mapping
        Options of the method that matter.
    checksum : str
        What :func:`checksum_of` returns for the data that matter.
    """
    entry, versions = plan.entry, provenance()
    program = type(entry.program).__qualname__ if isinstance(entry, Program) else None
    return {
        "version": {name: versions[name] for name in ("elbozoo", "torch", "pyro-ppl")},
        "model": entry.name() if program is None else f"{entry.name()} {program}",
        "method": plan.method,
        "seed": seed,
        "model option": entry.options.model_dump(mode="json"),
        "guide option": plan.schema(GuideOptions).model_dump(mode="json"),
        "option": dict(option),
        "data": {"shape": [plan.total, *plan.x.shape[1:]], "sha256": checksum},
        "fixed parameters": fingerprint(frozen) if frozen else None,
        "device": str(device),
    }


def _run_closed_form(plan: Plan, entry: Entry, x: Tensor, seed: int, progress: bool) -> Fit:
    assert isinstance(entry, HasClosedForm) and isinstance(entry, HasOracle) and isinstance(entry, HasPosterior)
    before = time.perf_counter()
    entry.fit_exact(x)
    seconds = time.perf_counter() - before
    trajectory = Trajectory(is_elbo=True)
    with torch.no_grad():
        trajectory.record_exact(seconds, float(entry.log_evidence(x).sum()))
    return _fit(plan, entry, build_guide("exact", entry, x), seed, "log p(x)", trajectory, seconds, True, False)


def _run_cavi(plan: Plan, entry: Entry, x: Tensor, seed: int, progress: bool) -> Fit:
    before = time.perf_counter()
    run = run_cavi(entry, x, plan.schema(CAVIOptions), seed=seed, progress=progress)
    seconds = time.perf_counter() - before
    guide = ConjugateGuide(entry, run.factors)
    return _fit(plan, entry, guide, seed, "elbo", run.trajectory, seconds, run.converged, run.interrupted, run.notes)


def _run_nuts(plan: Plan, entry: Entry, x: Tensor, seed: int, progress: bool) -> Fit:
    before = time.perf_counter()
    run = run_nuts(entry, x, plan.schema(NUTSOptions), seed=seed, progress=progress)
    seconds, guide = time.perf_counter() - before, run.guide()
    return _fit(
        plan, entry, guide, seed, "log p(x, z)", run.trajectory, seconds, run.converged, run.interrupted, run.notes
    )


_RUNNERS = {"em": _run_em, "closed-form": _run_closed_form, "cavi": _run_cavi, "nuts": _run_nuts}


def _fit(
    plan: Plan,
    entry: Entry,
    guide: Guide,
    seed: int,
    objective: str,
    trajectory: Trajectory,
    seconds: float,
    converged: bool,
    interrupted: bool,
    notes: list[str] | None = None,
    watch: Validation | None = None,
) -> Fit:
    if plan.companions.intensities is not None:
        how = "to new draws of the pixels at each step" if plan.method not in SPECIAL else "to that one draw alone"
        notes = [*(notes or []), f"figures are of one draw of the binary pixels; the fit was {how}"]
    if plan.rows is not None and guide.is_local and guide.is_bound and not holds_posterior(guide, entry, plan.x):
        notes = [*(notes or []), NOT_DIVIDED]
    # The run built both for itself, so the fit owns them; everything is judged in float64.
    return Fit(
        model=entry.name(),
        method=plan.label,
        seed=seed,
        entry=entry.double(),
        guide=guide.double(),
        objective=objective,
        trajectory=trajectory.frame(),
        seconds=seconds,
        converged=converged and not interrupted,
        interrupted=interrupted,
        options=plan.options,
        guide_options=plan.schema(GuideOptions),
        shape=tuple(plan.x.shape),
        notes=notes or [],
        x=plan.x.double() if plan.rows is None else None,
        rows=plan.rows,
        validation=watch.frame() if watch else None,
        companions=plan.companions,
    )
