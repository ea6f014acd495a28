"""Fits of one method from many seeds, run as one: a captured step mapped over the seeds.

Each seed has its own parameters, moments, rows, noise, step size and end. Its noise comes from its own generator, in
the order in which it would draw alone, so that it ends where it would end alone, up to rounding. Those that have ended
leave the batch as soon as they are half of it, and so do those that break down, which is no end of the others.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from elbozoo.inference.capture import (
    NotCapturable,
    StepGraph,
    capture,
    for_many_seeds,
    loss_on_noise,
    numbers_of_step,
)
from elbozoo.inference.engines import (
    AGREEMENT,
    MOMENTS,
    CapturedStep,
    NotCompilable,
    StepFunction,
    compiled,
    is_filling,
    named_tensors,
    numbers_written,
    step_of_compilation,
)
from elbozoo.inference.progress import progress_bar
from elbozoo.inference.svi import (
    Observer,
    SVIResult,
    TrainingState,
    failure,
    guarded_step,
    without_warnings_of_nan,
)
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import NumericalFailure

logger = logging.getLogger(__name__)

NUMBERS_AT_ONCE = 2**28  # that the operations of one step may write together, over all seeds


class NotTogether(Exception):
    """Fits that cannot be run as one; the message says why."""


@dataclass(eq=False)
class SeededFit:
    """A fit before its first step, with what is its own.

    Attributes
    ----------
    state : TrainingState
        The fit; its step is a :class:`~elbozoo.inference.engines.CapturedStep`.
    generator : torch.Generator
        Where all its noise and the order of its minibatches come from.
    observers : sequence of Observer
        What looks at it after each step.
    resample : callable or None
        Makes the rows of a minibatch anew.
    """

    state: TrainingState
    generator: torch.Generator
    observers: Sequence[Observer] = ()
    resample: Callable[[Batch], Batch] | None = None
    result: SVIResult | NumericalFailure | None = field(default=None, init=False)

    @property
    def step(self) -> CapturedStep:
        """What would take its steps if it were alone."""
        assert isinstance(self.state.step, CapturedStep)
        return self.state.step

    def next_batch(self) -> Batch:
        """Return the rows of its next step."""
        batch = next(self.state.minibatches)
        if self.resample is None:
            return batch
        with drawing_from(self.generator):
            return self.resample(batch)

    def end(self, *, converged: bool, interrupted: bool = False) -> None:
        """Note how it ended."""
        self.result = SVIResult(self.state.trajectory, converged, interrupted)

    def fail(self, error: NumericalFailure) -> None:
        """Note that it broke down."""
        self.result = error


def run_together(
    fits: Sequence[SeededFit], graph: StepGraph, title: str, *, progress: bool = True
) -> list[SVIResult | NumericalFailure]:
    """Run fits of one model, guide and objective on the same rows from several seeds, as one batch.

    Must be called inside :func:`~elbozoo.models.contract.isolation.isolated`.

    Parameters
    ----------
    fits : sequence of SeededFit
        Fits before their first step.
    graph : StepGraph
        What :func:`graph_of_seeds` gives for one of them.
    title : str
        What the bar of progress is called.

    Returns
    -------
    list of SVIResult or NumericalFailure
        How each fit ended; the error where its objective was no longer finite.

    Raises
    ------
    NotTogether
        Where the step cannot be mapped over seeds, when the parameters have moved already.
    """
    options = fits[0].state.options
    running, batch, interrupted = list(fits), None, False
    try:
        with progress_bar(title, options.steps, progress) as report, without_warnings_of_nan():
            running = _first_steps(running)
            batch = _SeedBatch(graph, running) if running else None
            for count in range(1, options.steps):
                if batch is None or not running:
                    break
                running = batch.step(running)
                report(count + 1, f"{len(running)} of {len(fits)} seeds still running")
    except KeyboardInterrupt:
        interrupted = True
    for fit in fits:
        if fit.result is None:
            if batch is not None:
                batch.publish([fit])
            fit.end(converged=options.schedule == "cosine" and not interrupted, interrupted=interrupted)
    return [fit.result for fit in fits if fit.result is not None]


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Let torch's global random state be that of ``generator``, which goes on from where the block ends."""
    state = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(state)


def graph_of_seeds(fit: SeededFit) -> StepGraph:
    """Capture the step that seeds have in common; nothing of the fit is drawn or moved.

    Raises
    ------
    NotTogether
        Where it cannot be captured, draws by itself, or fills the machine with one seed alone.
    """
    whole, size = fit.state.batch, fit.state.minibatches.size
    try:
        graph = capture(fit.step, whole.rows(0, size) if size < whole.total else whole)
    except NotCapturable as error:
        raise NotTogether(f"its step cannot be captured: {error}") from error
    if graph.samplers:
        raise NotTogether(f"{', '.join(graph.samplers)} cannot take noise from outside")
    if is_filling(graph.graph):
        raise NotTogether("the step of one seed fills the machine")
    return graph


def seeds_at_once(graph: StepGraph) -> int:
    """Return how many seeds one batch may hold, so that what it writes in a step stays in memory."""
    return max(2, NUMBERS_AT_ONCE // max(1, numbers_written(graph.graph)))


def _first_steps(fits: Sequence[SeededFit]) -> list[SeededFit]:
    """Take the first step of each fit as Pyro does, with all its checks; return those that go on."""
    going_on = []
    for fit in fits:
        log_evidence, before = fit.state.trajectory.evidence(), time.perf_counter()
        part = fit.next_batch()
        try:
            with drawing_from(fit.generator):
                loss = guarded_step(fit.state, part)
        except NumericalFailure as error:
            fit.fail(error)
            continue
        if fit.state.take_in(loss, time.perf_counter() - before, log_evidence, fit.observers):
            fit.end(converged=True)
        else:
            going_on.append(fit)
    return going_on


class _SeedBatch:
    """The captured step of several fits, with their tensors side by side."""

    def __init__(self, graph: StepGraph, fits: Sequence[SeededFit]) -> None:
        self.graph, self.slots = graph, list(fits)
        self.tensors = [named_tensors(fit.step) for fit in fits]
        trained = [[tensors[name].detach() for name in graph.trained] for tensors in self.tensors]
        states = [fit.step.optimizer.state for fit in fits]
        moments = [
            [state[tensors[name]][key] for key in MOMENTS for name in graph.trained]
            for state, tensors in zip(states, self.tensors, strict=True)
        ]
        self.state = _side_by_side([p + m for p, m in zip(trained, moments, strict=True)])
        constants = [[tensors[name].detach() for name in graph.constants] for tensors in self.tensors]
        pairs = [_own_or_shared(of_seeds) for of_seeds in zip(*constants, strict=True)]
        self.constants, self.own_constants = [tensor for tensor, _ in pairs], [own for _, own in pairs]
        self.has_own_rows = fits[0].resample is not None or fits[0].state.minibatches.size < fits[0].state.batch.total
        self.noise = [torch.zeros(len(fits), *n.shape, dtype=n.dtype, device=n.device) for n in graph.noise]
        self.function: StepFunction | None = None
        self.compile_at: int | None = None
        self.is_checked = False

    def step(self, running: Sequence[SeededFit]) -> list[SeededFit]:
        """Take a step of each of the ``running`` fits; return those that go on."""
        if 2 * len(running) <= len(self.slots):
            self._shrink(running)
        evidence = self._evidence(running)
        before = time.perf_counter()
        losses = self._advance(running)
        seconds = (time.perf_counter() - before) / len(running)
        self.publish([fit for fit in running if fit.observers])
        going_on = []
        for fit, log_evidence in zip(running, evidence, strict=True):
            if fit.result is not None:  # it broke down
                continue
            loss = losses[self.slots.index(fit)]
            if fit.state.take_in(loss, seconds, log_evidence, fit.observers):
                self.publish([fit])
                fit.end(converged=True)
            else:
                going_on.append(fit)
        return going_on

    def publish(self, fits: Sequence[SeededFit]) -> None:
        """Give the parameters of ``fits`` their present values."""
        for fit in fits:
            slot = self.slots.index(fit)
            for name, values in zip(self.graph.trained, self.state, strict=False):
                self.tensors[slot][name].data = values[slot].clone()

    def _evidence(self, running: Sequence[SeededFit]) -> list[float]:
        if running[0].state.trajectory.is_due:
            self.publish(running)
        return [fit.state.trajectory.evidence() for fit in running]

    def _advance(self, running: Sequence[SeededFit]) -> list[float]:
        batches = {self.slots.index(fit): fit.next_batch() for fit in running}
        for fit in running:
            for noise, of_slots in zip(self.graph.noise, self.noise, strict=True):
                noise.draw(fit.generator, out=of_slots[self.slots.index(fit)])
        inputs = self._inputs(batches)
        count = running[0].step.count
        if self.function is None:
            self._map(inputs)
        if self.compile_at is not None and count >= self.compile_at:
            self._compile(inputs, len(running))
        assert self.function is not None
        with torch.no_grad():
            losses, *state = self.function(*inputs)
        values: list[float] = losses.tolist()
        if not self.is_checked:
            self._check(running, batches, values)
        for fit in running:
            slot = self.slots.index(fit)
            if not math.isfinite(values[slot]):
                self.publish([fit])
                fit.fail(failure(fit.state, batches[slot], values[slot]))
            fit.step.count += 1
        self.state = state
        return values

    def _inputs(self, batches: dict[int, Batch]) -> list[Tensor]:
        """Return the inputs of all slots; those that have ended get what any other one has."""
        any_slot = next(iter(batches))
        batch = batches[any_slot]
        numbers = [numbers_of_step(fit.step) for fit in self.slots]
        _, correction, beta = numbers[any_slot]
        step_sizes = torch.tensor([step_size for step_size, _, _ in numbers], dtype=torch.float64)
        shared = torch.tensor([correction, beta], dtype=torch.float64)
        given = [step_sizes.to(batch.x.device), *shared.to(batch.x.device).unbind()]
        rows, index = batch.x, batch.index
        if self.has_own_rows:
            of_slots = [batches.get(slot, batch) for slot in range(len(self.slots))]
            rows, index = torch.stack([b.x for b in of_slots]), torch.stack([b.index for b in of_slots])
        return [*self.state, *self.constants, *given, rows, index, *self.noise]

    def _map(self, inputs: Sequence[Tensor]) -> None:
        rows = [self.has_own_rows] * 2
        own = [*[True] * len(self.state), *self.own_constants, True, False, False, *rows, *[True] * len(self.noise)]
        try:
            mapped: fx.GraphModule = for_many_seeds(self.graph.graph, own, inputs)
        except NotCapturable as error:
            raise NotTogether(f"its step cannot be mapped over seeds: {error}") from error
        self.function = mapped
        options = self.slots[0].state.options
        self.compile_at = step_of_compilation(mapped, options, since=max(1, self.slots[0].step.count))

    def _compile(self, inputs: Sequence[Tensor], seeds: int) -> None:
        self.compile_at = None
        step = self.slots[0].step
        before = time.perf_counter()
        try:
            assert isinstance(self.function, fx.GraphModule)
            self.function = compiled(self.function, inputs)
            step.say(logging.INFO, f"compiled for {seeds} seeds in {time.perf_counter() - before:.1f} s")
        except NotCompilable as reason:
            step.say(step.gravity, f"captured for {seeds} seeds and not compiled: {reason}")

    def _check(self, running: Sequence[SeededFit], batches: dict[int, Batch], losses: Sequence[float]) -> None:
        """Hold the loss of each seed against that of its own program on the same noise."""
        self.is_checked = True
        self.publish(running)
        for fit in running:
            slot = self.slots.index(fit)
            alone = loss_on_noise(fit.step, batches[slot], [values[slot] for values in self.noise])
            if not (math.isfinite(alone) or math.isfinite(losses[slot])):  # it breaks down, with others and alone
                continue
            if not abs(losses[slot] - alone) <= AGREEMENT[batches[slot].x.dtype] * max(1.0, abs(alone)):
                raise NotTogether(f"a seed has the loss {losses[slot]!r} with others and {alone!r} alone")

    def _shrink(self, running: Sequence[SeededFit]) -> None:
        """Leave out the fits that have ended."""
        keep = torch.tensor([self.slots.index(fit) for fit in running], device=self.state[0].device)
        self.tensors = [self.tensors[slot] for slot in keep.tolist()]
        self.state = [values[keep] for values in self.state]
        self.constants = [c[keep] if own else c for c, own in zip(self.constants, self.own_constants, strict=True)]
        self.noise = [values[keep] for values in self.noise]
        self.slots, self.function = list(running), None


def _side_by_side(of_seeds: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(tensors) for tensors in zip(*of_seeds, strict=True)]


def _own_or_shared(of_seeds: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Return one tensor for all seeds where they agree, otherwise theirs side by side, and whether each has its own."""
    if all(torch.equal(tensor, of_seeds[0]) for tensor in of_seeds):
        return of_seeds[0], False
    return torch.stack(list(of_seeds)), True
