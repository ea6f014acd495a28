"""Stochastic variational inference: one loop over a replaceable step."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import pyro
import torch
from pyro import poutine

from elbozoo.guides.base import Guide
from elbozoo.inference.checkpoints import Checkpoints
from elbozoo.inference.convergence import PlateauMonitor
from elbozoo.inference.engines import captures, make_step
from elbozoo.inference.memory import Memory, RandomStates, Remembers, Weights
from elbozoo.inference.minibatches import Minibatches, Order, StreamedMinibatches
from elbozoo.inference.objectives import WEIGHED_PARTICLES, Objective
from elbozoo.inference.progress import progress_bar
from elbozoo.inference.rows import Rows
from elbozoo.inference.steps import Step, unique_parameters
from elbozoo.inference.training import DECAY, PLATEAUS, WINDOW, TrainingOptions
from elbozoo.inference.trajectory import Trajectory
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Corrupts, Entry, HasOracle
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure

FULL_BATCH_ROWS = 4096
MANY_PARTICLES, MANY_CELLS = 10, 20_000  # draws per step; cells of a batch above which one draw has to do
MINIBATCH_ROWS = 256


@dataclass
class TrainingState:
    """What an observer of a fit sees after each step.

    Attributes
    ----------
    entry, guide : Entry, Guide
        As they are after the step.
    batch : Batch
        The whole data set of the fit, or a sample of streamed rows under the size of the whole.
    options : TrainingOptions
        Options of the fit.
    step : Step
        What takes the steps, with the state of the optimiser.
    schedule : Schedule
        When the step size falls and the fit ends.
    trajectory : Trajectory
        The record so far.
    minibatches : Order
        The rows that are still to come.
    """

    entry: Entry
    guide: Guide
    batch: Batch
    options: TrainingOptions
    step: Step
    schedule: Schedule
    trajectory: Trajectory
    minibatches: Order

    @property
    def count(self) -> int:
        """Number of data by which totals become figures per datum: rows of the table."""
        return self.batch.total if _is_sample(self.batch) else self.entry.count(self.batch.x)

    def take_in(self, loss: float, seconds: float, log_evidence: float, observers: Sequence[Observer]) -> bool:
        """Record a step that took so long, show it to the observers, and return whether the fit ends here."""
        count = len(self.trajectory.rows)
        self.trajectory.record(seconds, -loss, log_evidence)
        per_datum = -loss / self.count
        # Every observer sees every step, whatever the others say.
        return any([self.schedule.is_done(self.step, per_datum, count), *[see(self) for see in observers]])

    def parts(self, observers: Sequence[Observer]) -> dict[str, Remembers]:
        """Return all that the next step depends on, by name.

        Raises
        ------
        InvalidInput
            For a step that keeps its memory to itself.
        """
        if not isinstance(self.step, Remembers):
            raise InvalidInput(
                f"found a {type(self.step).__name__} with checkpoints, expected a step with the methods memory and "
                "recall; leave checkpoint out, or give it those"
            )
        return {
            "model": Weights(self.entry),
            "guide": Weights(self.guide),
            "step": self.step,
            "schedule": self.schedule,
            "trajectory": self.trajectory,
            "minibatches": self.minibatches,
            **{f"observer {i}": each for i, each in enumerate(o for o in observers if isinstance(o, Remembers))},
            "random": RandomStates(),
        }


class Observer(Protocol):
    """What looks at a fit after each step: it writes a log, or stops the fit in time.

    One that carries something from step to step has the methods of
    :class:`~elbozoo.inference.memory.Remembers` too, for the sake of checkpoints.
    """

    def __call__(self, state: TrainingState) -> bool:
        """Look at the fit after a step; return whether to end it here, as converged."""
        ...


class SVIResult(NamedTuple):
    """How a run of SVI ended: its record, whether it converged, whether it was interrupted."""

    trajectory: Trajectory
    converged: bool
    interrupted: bool


def run_svi(
    entry: Entry,
    guide: Guide,
    objective: Objective,
    batch: Batch,
    options: TrainingOptions,
    *,
    progress: bool = True,
    observers: Sequence[Observer] = (),
    rows: Rows | None = None,
    resample: Callable[[Batch], Batch] | None = None,
    checkpoints: Checkpoints | None = None,
    make_step: Callable[[Entry, Guide, Objective, int, TrainingOptions], Step] = make_step,
) -> SVIResult:
    """Maximise ``objective`` over the parameters of ``entry`` and ``guide``, in place.

    Must be called inside :func:`~elbozoo.models.contract.isolation.isolated`, which gives the seed. With
    ``checkpoints`` it goes on where they stand, and ends with the bits of a run that was never stopped.

    Where ``rows`` are given, minibatches are read from them, and ``batch`` holds a sample of them under the size of the
    whole. Where ``resample`` is given it makes the rows of each minibatch anew, and ``batch`` holds one such draw: the
    evidence along the way, which would be that of other rows than the objective's, is then left out.

    Raises
    ------
    InvalidInput
        For options that the objective, the guide and the data do not allow together, or checkpoints of another fit.
    NumericalFailure
        When the objective is no longer finite: with the step, the site and what to try.
    """
    if checkpoints is not None and options.engine == "auto":
        # What is compiled depends on the number of steps, which may grow before the fit goes on.
        options = options.model_copy(update={"engine": "captured" if captures(options) else "eager"})
    check_training(objective, guide, options, batch.total)
    if not unique_parameters(entry, guide):
        return SVIResult(Trajectory(is_elbo=True), converged=True, interrupted=False)
    state = begin(
        entry, guide, objective, batch, options, rows=rows, resample=resample is not None, make_step=make_step
    )
    trajectory = state.trajectory
    if checkpoints is not None:
        standing = checkpoints.resume(state.parts(observers), options.steps)
        if standing is not None and standing.converged:
            return SVIResult(trajectory, converged=True, interrupted=False)
    try:
        with (
            progress_bar(f"{entry.name()} {guide.name}", options.steps, progress) as report,
            checkpoints.holding_interrupts() if checkpoints else nullcontext(),
            without_warnings_of_nan(),
        ):
            done = False
            for count in range(len(trajectory.rows), options.steps):
                log_evidence = trajectory.evidence()
                before = time.perf_counter()
                part = next(state.minibatches) if resample is None else resample(next(state.minibatches))
                loss = guarded_step(state, part)
                done = state.take_in(loss, time.perf_counter() - before, log_evidence, observers)
                report(count + 1, f"{objective.name} {-loss:.2f}")
                if done:
                    break
                if checkpoints is not None:
                    checkpoints.after_step(count + 1)
            if checkpoints is not None:
                checkpoints.end(len(trajectory.rows), converged=done)
    except KeyboardInterrupt:
        return SVIResult(trajectory, converged=False, interrupted=True)
    return SVIResult(trajectory, converged=done or options.schedule == "cosine", interrupted=False)


def begin(
    entry: Entry,
    guide: Guide,
    objective: Objective,
    batch: Batch,
    options: TrainingOptions,
    *,
    rows: Rows | None = None,
    resample: bool = False,
    generator: torch.Generator | None = None,
    make_step: Callable[[Entry, Guide, Objective, int, TrainingOptions], Step] = make_step,
) -> TrainingState:
    """Return a fit before its first step; its minibatches come in an order drawn from ``generator``."""
    is_elbo = objective.is_elbo and guide.is_bound and not isinstance(entry, Corrupts)
    trajectory = Trajectory(is_elbo, None if resample or _is_sample(batch) else _oracle(entry, batch))
    size = _batch_size(objective, guide, batch, options)
    schedule = Schedule(options, epoch=batch.total // size, moving=objective.moving_steps(options))
    minibatches: Order = Minibatches(batch, size, generator)
    if rows is not None:
        minibatches = StreamedMinibatches(rows, batch.x, size, generator)
    step = make_step(entry, guide, objective, _particles(objective, guide, batch, options), options)
    return TrainingState(entry, guide, batch, options, step, schedule, trajectory, minibatches)


@contextmanager
def without_warnings_of_nan() -> Iterator[None]:
    """Silence Pyro's warnings of a loss that is not finite: here it ends the fit, with more to say."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered", category=UserWarning)
        yield


def check_training(objective: Objective, guide: Guide, options: TrainingOptions, rows: int) -> None:
    """Refuse options that ``objective``, ``guide`` and a number of ``rows`` do not allow together.

    Raises
    ------
    InvalidInput
        With what was found, what was expected and why.
    """
    objective.check(guide, options)
    moving = objective.moving_steps(options)
    if moving > options.steps:
        raise InvalidInput(
            f"option kl_steps: found {moving} with steps={options.steps}, expected at most {options.steps}: β would "
            "not come to rest"
        )
    if _needs_all_rows(objective, guide) and (options.batch_size or rows) < rows:
        raise InvalidInput(
            f"option batch_size: found {options.batch_size} with objective {objective.name!r} and a latent of the "
            f"whole data set, expected all {rows} rows: the log of a mean of weights is no sum over rows, and from "
            "some of them its estimate may exceed log p(x); use objective=elbo"
        )


class Schedule:
    """The step size along a fit, and when the fit has converged."""

    def __init__(self, options: TrainingOptions, epoch: int, moving: int) -> None:
        self.options = options
        self.moving = moving
        whole = epoch if epoch <= WINDOW // 4 else 1
        self.monitor = PlateauMonitor(options.tolerance, window=math.ceil(WINDOW / whole) * whole, epoch=whole)
        self.plateaus = 0
        self.factor = 1.0

    @property
    def learning_rate(self) -> float:
        """Step size that the next step will have."""
        return self.options.learning_rate * self.factor

    def is_done(self, step: Step, objective: float, count: int) -> bool:
        """Take the objective per datum; lower the step size when it is time, and say when to stop."""
        # While the objective itself moves, its values say nothing about progress.
        flat = count >= self.moving and self.monitor.update(objective)
        if self.options.schedule == "cosine":
            self._scale(step, 0.5 * (1 + math.cos(math.pi * count / self.options.steps)))
            return False
        if not flat:
            return False
        self.plateaus += 1
        if self.options.schedule == "plateau":
            self._scale(step, DECAY**self.plateaus)
        return self.plateaus > PLATEAUS

    def _scale(self, step: Step, factor: float) -> None:
        self.factor = factor
        step.scale_learning_rate(factor)

    def memory(self) -> Memory:
        """Return what the monitor has seen, and how often the objective has been flat."""
        own = {"plateaus": self.plateaus, "factor": self.factor}
        return Memory(values={**self.monitor.memory().values, **own})

    def recall(self, memory: Memory) -> None:
        """Go on watching."""
        self.monitor.recall(memory)
        self.plateaus, self.factor = memory.values["plateaus"], memory.values["factor"]


def _particles(objective: Objective, guide: Guide, batch: Batch, options: TrainingOptions) -> int:
    if options.particles is not None:
        return options.particles
    if objective.is_weighed:
        return WEIGHED_PARTICLES
    if guide.family == "delta" and not guide.has_discrete:  # all draws of a point are the same
        return 1
    many = batch.x.numel() <= MANY_CELLS and (not guide.is_discrete or options.gradient == "score")
    return MANY_PARTICLES if many else 1


def _is_sample(batch: Batch) -> bool:
    """Whether a batch stands for more rows than it holds."""
    return len(batch.x) < batch.total


def _needs_all_rows(objective: Objective, guide: Guide) -> bool:
    return objective.is_weighed and not guide.is_local


def _batch_size(objective: Objective, guide: Guide, batch: Batch, options: TrainingOptions) -> int:
    if _needs_all_rows(objective, guide):
        return batch.total
    if options.batch_size is not None:
        return min(options.batch_size, batch.total)
    if batch.x.ndim > 2:  # sequences, of which there are few
        return min(MINIBATCH_ROWS, batch.total)
    is_network = batch.x.dtype == torch.float32 and guide.source in ("amortized", "semi-amortized")
    if is_network or batch.total > FULL_BATCH_ROWS:
        return min(MINIBATCH_ROWS if is_network else FULL_BATCH_ROWS, batch.total)
    return batch.total


def _oracle(entry: Entry, batch: Batch) -> Callable[[], float] | None:
    if not isinstance(entry, HasOracle):
        return None

    def oracle() -> float:
        with torch.no_grad():
            return float(entry.log_evidence(batch.x).sum())

    return oracle


def guarded_step(state: TrainingState, batch: Batch) -> float:
    """Take a step on ``batch`` and return the loss before it.

    Raises
    ------
    NumericalFailure
        Where it is not finite.
    """
    # Pyro's validation of every distribution costs a third of a step; the first one sees the same shapes.
    with pyro.validation_enabled(not state.trajectory.rows):
        loss = state.step(batch)
    if not math.isfinite(loss):
        raise failure(state, batch, loss)
    return loss


def failure(state: TrainingState, batch: Batch, loss: float) -> NumericalFailure:
    """Return the error of a loss that is not finite: the step, the culprit and what to try."""
    return NumericalFailure(
        f"step {len(state.trajectory.rows)}: the objective is {-loss} {_culprit(state.entry, state.guide, batch)}; try "
        "a smaller learning_rate, clip_norm=10, or standardised columns"
    )


def refuse_lost_parameters(entry: Entry, guide: Guide) -> None:
    """Refuse parameters that are not finite, as the last step may leave them.

    Raises
    ------
    NumericalFailure
        With the first of them.
    """
    lost = _lost_parameter(entry, guide)
    if lost is not None:
        raise NumericalFailure(
            f"the last step: {lost}; try a smaller learning_rate, clip_norm=10, or standardised columns"
        )


def _lost_parameter(entry: Entry, guide: Guide) -> str | None:
    for module, what in ((guide, "guide"), (entry, "model")):
        for name, parameter in module.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the {what}'s parameter {name} is not finite"
    return None


def _culprit(entry: Entry, guide: Guide, batch: Batch) -> str:
    lost = _lost_parameter(entry, guide)
    if lost is not None:
        return f"and {lost}"
    with torch.no_grad(), pyro.validation_enabled(False):
        guide_trace = poutine.trace(guide).get_trace(batch)
        model_trace = poutine.trace(poutine.replay(entry, trace=guide_trace)).get_trace(batch)
        for trace, what in ((guide_trace, "guide"), (model_trace, "model")):
            trace.compute_log_prob()
            for name, node in trace.nodes.items():
                if "log_prob" in node and not torch.isfinite(node["log_prob"]).all():
                    return f"and the log probability of site {name!r} of the {what} is not finite"
    return "although every site is finite"
