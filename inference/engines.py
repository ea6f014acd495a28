"""What runs a step of SVI: Pyro as it is, the step captured as a graph, or that graph compiled to machine code.

Which of them ``auto`` takes follows from the number of operations in a step, the numbers that they write and the steps
to come, never from a clock: a seed gives the same bits each time.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from elbozoo.guides.base import Guide
from elbozoo.inference.capture import (
    NotCapturable,
    Programs,
    StepGraph,
    capture,
    is_in_order,
    is_view,
    numbers_of_step,
    reason_of,
    with_narrow_products_as_sums,
)
from elbozoo.inference.memory import Memory
from elbozoo.inference.objectives import Objective
from elbozoo.inference.steps import PyroStep, Step
from elbozoo.inference.training import PLATEAUS, WINDOW, TrainingOptions
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry

logger = logging.getLogger(__name__)

LEAST_STEPS = WINDOW * (PLATEAUS + 2)  # before which no fit that waits for plateaus ends
STEPS_OF_CAPTURE = 200  # which capturing a step pays for itself in
# What the parts of a step take, seconds: measured on two machines, and needed to within a factor of two.
PER_OPERATION, PER_NUMBER = 4e-6, 5e-10
COMPILED_SHARE = 0.3
COMPILATION, COMPILATION_PER_OPERATION = 3.0, 0.01
MOMENTS = ("exp_avg", "exp_avg_sq")
StepFunction = Callable[..., Sequence[Tensor]]
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-8}


def captures(options: TrainingOptions) -> bool:
    """Whether steps are to be captured under these options; on accelerators only where that was asked for."""
    if options.engine == "auto":
        return options.steps >= STEPS_OF_CAPTURE and options.device == "cpu"
    return options.engine != "eager"


def make_step(entry: Entry, guide: Guide, objective: Objective, particles: int, options: TrainingOptions) -> Step:
    """Return what takes the steps of a fit under ``options.engine``."""
    step = CapturedStep if captures(options) else PyroStep
    return step(entry, guide, objective, particles, options)


def step_of_compilation(graph: fx.GraphModule, options: TrainingOptions, since: int = 1) -> int | None:
    """Return the number of steps, ``since`` or later, after which ``graph`` is compiled, or None for never.

    Under ``auto`` that is as soon as the steps to come are expected to save more than compilation takes. As many are
    expected again as were taken, where a fit ends at a plateau; so it is thought of each time that they have doubled.
    """
    if options.engine != "auto":
        return since if options.engine == "compiled" else None
    operations = len(_operations(graph))
    saved = (1 - COMPILED_SHARE) * (PER_OPERATION * operations + PER_NUMBER * numbers_written(graph))
    compilation = COMPILATION + COMPILATION_PER_OPERATION * operations
    powers = (2**power for power in itertools.count() if 2**power > since)
    counts = itertools.takewhile(lambda count: count < options.steps, itertools.chain([since], powers))
    return next((count for count in counts if _steps_to_come(count, options) * saved > compilation), None)


def _operations(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def numbers_written(graph: fx.GraphModule) -> int:
    """Return the number of elements that all operations of a graph write together; views write none."""
    values = [node.meta.get("val") for node in _operations(graph) if not is_view(node)]
    return sum(value.numel() for value in values if isinstance(value, Tensor))


def _steps_to_come(count: int, options: TrainingOptions) -> int:
    left = options.steps - count
    return left if options.schedule == "cosine" else min(left, max(count, LEAST_STEPS - count))


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest difference between two lists of tensors, each as a share of its tensor's largest number."""
    pairs = zip(ours, theirs, strict=True)
    shares = [(one - other).abs().max() / other.abs().max().clamp(min=1e-30) for one, other in pairs if one.numel()]
    return float(torch.stack(shares).max())


def is_filling(graph: fx.GraphModule) -> bool:
    """Whether the numbers that a step writes take longer than its operations take to be called."""
    return PER_NUMBER * numbers_written(graph) > 4 * PER_OPERATION * len(_operations(graph))


def named_tensors(step: PyroStep) -> dict[str, Tensor]:
    """Return the parameters and buffers of a step's model and guide, by the names of its captured graph."""
    return Programs(step).tensors()


def replace(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter its new value, without a copy where it is a tensor of PyTorch's own kinds."""
    if type(value) is Tensor:
        parameter.data = value
    else:
        with torch.no_grad():
            parameter.copy_(value)


def has_compiler(device: torch.device) -> bool:
    """Whether graphs can be compiled for ``device``: on the CPU with a C++ compiler, elsewhere as PyTorch can."""
    if device.type == "cpu":
        return any(map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "clang++", "c++"])))
    return device.type == "cuda"


class NotCompilable(Exception):
    """A graph that stays as it is; the message says why."""


def compiled(graph: fx.GraphModule, inputs: Sequence[Tensor], samplers: Sequence[str] = ()) -> StepFunction:
    """Return ``graph`` as machine code, which has been held against the graph on ``inputs``.

    Raises
    ------
    NotCompilable
        For a graph that draws by itself, without a compiler, where the compiler fails, or where its code is wrong.
    """
    if samplers:
        raise NotCompilable(f"{', '.join(samplers)} cannot take noise from outside")
    if not has_compiler(inputs[0].device):
        raise NotCompilable("found no C++ compiler; install g++ or clang++, or name one by CXX")
    try:
        function = torch.compile(with_narrow_products_as_sums(graph), fullgraph=True, dynamic=False)
        with torch.no_grad():
            difference = largest_difference(function(*inputs), graph(*inputs))
    except Exception as error:
        raise NotCompilable(reason_of(error)) from error
    if not difference <= AGREEMENT.get(inputs[0].dtype, 1e-3):
        raise NotCompilable(f"its code gives numbers that differ from the graph's by {difference:.1g} of their size")
    return function


class Runner:
    """A captured step with the tensors that it goes from and to.

    Parameters are given their new values after each step. Adam's moments are kept here until they are asked for.

    Attributes
    ----------
    graph : StepGraph
        The step as a function of tensors.
    compile_at : int or None
        Number of steps after which it is compiled.
    is_compiled : bool
        Whether it was.
    """

    def __init__(self, step: CapturedStep, batch: Batch) -> None:
        before = time.perf_counter()
        self.graph: StepGraph = capture(step, batch)
        self.step = step
        self.function: StepFunction = self.graph.graph
        self.compile_at = step_of_compilation(self.graph.graph, step.options)
        self.is_compiled = False
        self.numbers = [torch.zeros((), dtype=torch.float64, device=batch.x.device) for _ in range(3)]
        tensors = named_tensors(step)
        self.trained = [tensors[name] for name in self.graph.trained]
        self.constants = [tensors[name].detach() for name in self.graph.constants]
        self.moments: Sequence[Tensor] = []
        step.say(logging.INFO, f"captured in {time.perf_counter() - before:.1f} s")

    def __call__(self, batch: Batch) -> float:
        """Take a step on ``batch`` and return the loss before it; without a finite loss nothing changes."""
        if self.compile_at is not None and self.step.count >= self.compile_at:
            self._compile(batch)
        noise = [each.draw() for each in self.graph.noise]
        with torch.no_grad():
            loss, *state = self.function(*self._inputs(batch), *noise)
        value = float(loss)
        if math.isfinite(value):
            for parameter, moved in zip(self.trained, state, strict=False):
                replace(parameter, moved)
            self.moments = state[len(self.trained) :]
        return value

    def take_moments(self) -> None:
        """Take over Adam's moments from the optimiser, unless they are here already."""
        if not self.moments:
            state = self.step.optimizer.state
            self.moments = [state[p][key] for key in MOMENTS for p in self.trained]

    def give_moments(self) -> None:
        """Give them back."""
        names = [(key, parameter) for key in MOMENTS for parameter in self.trained]
        for (key, parameter), moment in zip(names, self.moments, strict=False):
            self.step.optimizer.state[parameter][key] = moment
        self.moments = []

    def _inputs(self, batch: Batch) -> list[Tensor]:
        """Return all but the noise."""
        self.take_moments()
        for number, value in zip(self.numbers, numbers_of_step(self.step), strict=True):
            number.fill_(value)
        parameters = [parameter.detach() for parameter in self.trained]
        return [*parameters, *self.moments, *self.constants, *self.numbers, batch.x, batch.index]

    def _compile(self, batch: Batch) -> None:
        """Put compiled code in the place of the graph, or say why not."""
        self.compile_at = None
        generator = torch.Generator(device=batch.x.device).manual_seed(0)  # no draw of the fit's
        noise = [each.draw(generator) for each in self.graph.noise]
        try:
            before = time.perf_counter()
            self.function = compiled(self.graph.graph, [*self._inputs(batch), *noise], self.graph.samplers)
            self.is_compiled = True
            self.step.say(logging.INFO, f"compiled in {time.perf_counter() - before:.1f} s")
        except NotCompilable as reason:
            self.step.say(self.step.gravity, f"captured and not compiled: {reason}")


class CapturedStep(PyroStep):
    """A step that runs as a captured graph, compiled or not, and as Pyro's own wherever that cannot be.

    The first step is Pyro's own, with all its checks. Adam's moments and the parameters stay where they are, so that
    engines can follow one another within a fit.

    Attributes
    ----------
    runners : dict of Runner
        A captured step for each form of a batch: its shape, the size of the data, whether it is all rows in order.
    refused : str or None
        Why the step was not captured.
    """

    def __init__(
        self, entry: Entry, guide: Guide, objective: Objective, particles: int, options: TrainingOptions
    ) -> None:
        super().__init__(entry, guide, objective, particles, options)
        self.options = options
        self.runners: dict[tuple[torch.Size, int, bool], Runner] = {}
        self.refused: str | None = None
        self._current: Runner | None = None
        self._in_order: Tensor | None = None

    @property
    def engine(self) -> str:
        """What runs the steps now: eager, captured or compiled."""
        if not self.runners:
            return "eager"
        return "compiled" if any(runner.is_compiled for runner in self.runners.values()) else "captured"

    @property
    def gravity(self) -> int:
        """Level of a log line about what is not done: a warning where it was asked for."""
        return logging.INFO if self.options.engine == "auto" else logging.WARNING

    def __call__(self, batch: Batch) -> float:
        """Take one step; where the loss is not finite, leave the parameters as they are for a look at them."""
        runner = self._runner(batch) if self.optimizer.state else None
        if runner is not self._current:
            self._rest()
        if runner is None:
            return super().__call__(batch)
        self._current = runner
        value = runner(batch)
        if math.isfinite(value):
            self.count += 1
        return value

    def say(self, level: int, what: str) -> None:
        """Log one line on how the steps run."""
        logger.log(level, "%s %s: the step is %s", self.entry.name(), self.guide.name, what)

    def memory(self) -> Memory:
        """Return the number of steps and the state of Adam."""
        self._rest()
        return super().memory()

    def recall(self, memory: Memory) -> None:
        """Go on after so many steps."""
        self._rest()
        super().recall(memory)

    def _runner(self, batch: Batch) -> Runner | None:
        if self.refused:
            return None
        form = (batch.x.shape, batch.total, self._is_in_order(batch))
        if form not in self.runners:
            try:
                self.runners[form] = Runner(self, batch)
            except NotCapturable as error:
                self.refused = str(error)
                self.say(self.gravity, f"not captured and runs as it is: {error}")
                return None
        return self.runners[form]

    def _is_in_order(self, batch: Batch) -> bool:
        """Whether the batch is the whole data set in its own order."""
        if batch.index is not self._in_order and is_in_order(batch):
            self._in_order = batch.index
        return batch.index is self._in_order

    def _rest(self) -> None:
        """Give the optimiser what captured steps have kept from it."""
        if self._current is not None:
            self._current.give_moments()
            for of_parameter in self.optimizer.state.values():
                of_parameter["step"].fill_(self.count)
        self._current = None
