"""SVI whose steps are shared by several processes of one machine, each with rows of its own, by Lightning Fabric.

Every process holds the model, the guide and Adam. A minibatch is cut into as many slices as there are processes; each
process takes the loss and the gradient of its slice, these are added up by Fabric, and all take the same step.

The loss of a minibatch of B of N rows is L = G + N/B Σ l_n: what depends on no single row, such as the divergence of a
global latent, and the terms of the rows at the scale of the data plate. A slice of b_r rows has, by the scale of its
own plate, L_r = G + N/b_r Σ l_n over its rows, so that L = Σ b_r/B L_r whatever the b_r, and likewise the gradients.
That needs l_n to depend on the rows of other slices in no way, and the noise of a row to be what it would be in
one process. So each process draws the noise of the whole minibatch from the same random state and uses the part of its
rows; the first step is held against the whole minibatch in one process.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elbozoo.guides.base import Guide
from elbozoo.inference.event_log import EventLog
from elbozoo.inference.losses import OwnELBO
from elbozoo.inference.memory import Memory, RandomStates, Remembers, Weights
from elbozoo.inference.noise import Kind, Noise, OutsideNoise
from elbozoo.inference.objectives import Objective
from elbozoo.inference.processes import Processes, launch
from elbozoo.inference.steps import PyroStep, unique_parameters
from elbozoo.inference.svi import MINIBATCH_ROWS, Observer, SVIResult, run_svi
from elbozoo.inference.training import TrainingOptions
from elbozoo.inference.trajectory import Trajectory
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-8}  # of the first step with that of one process, relative


# ---- what can be shared ----------------------------------------------------------------------------------------------


def check_processes(
    objective: Objective,
    guide: Guide,
    options: TrainingOptions,
    rows: int,
    *,
    is_streamed: bool = False,
    keeps_checkpoints: bool = False,
) -> None:
    """Refuse ``processes`` above one where the steps of a fit to so many ``rows`` cannot be shared.

    Parameters
    ----------
    is_streamed : bool
        Whether the rows are not in memory.
    keeps_checkpoints : bool
        Whether the fit is to go on from checkpoints.

    Raises
    ------
    InvalidInput
        With the reason and what to do.
    """
    if options.processes == 1:
        return
    reason = (
        _refusal_of_run(options, is_streamed, keeps_checkpoints)
        or _refusal_of_objective(objective, guide, options)
        or _refusal_of_rows(options, rows)
    )
    if reason is not None:
        raise InvalidInput(f"option processes: found {options.processes} {reason}")
    _check_libraries()


def _refusal_of_run(options: TrainingOptions, is_streamed: bool, keeps_checkpoints: bool) -> str | None:
    if options.engine not in ("auto", "eager"):
        return (
            f"with engine={options.engine}, expected engine=auto or eager: steps that processes share run as they are; "
            "leave one of the two out"
        )
    if options.device != "cpu":
        return f"with device={options.device}, expected device=cpu, whose cores they share; leave one of the two out"
    if keeps_checkpoints:
        return "with checkpoints, expected none, which are of a fit in one process; leave one of the two out"
    if is_streamed:
        return (
            "with data that are not in memory, expected data that are: streamed rows come in an order of their own; "
            "use processes=1"
        )
    if multiprocessing.current_process().daemon:
        return "in a process that must start none, such as a worker of a cluster, expected 1; use processes=1 there"
    return None


def _refusal_of_objective(objective: Objective, guide: Guide, options: TrainingOptions) -> str | None:
    if objective.is_weighed and not guide.is_local:
        return (
            f"with objective {objective.name!r} and a latent of the whole data set, expected terms that add up over "
            "rows, which the log of a mean of weights does not; use objective=elbo or processes=1"
        )
    if guide.family == "posterior" and not guide.is_local:
        return (
            "with the exact posterior of a latent of the whole data set, expected a guide that does not need all rows "
            "at once; use processes=1"
        )
    if options.free_bits > 0:
        return (
            f"with free_bits={options.free_bits:g}, expected 0: they are nats of the mean over a whole minibatch; "
            "use processes=1"
        )
    return None


def _refusal_of_rows(options: TrainingOptions, rows: int) -> str | None:
    most = min(rows, MINIBATCH_ROWS) if options.batch_size is None else rows // options.batch_size
    if options.processes <= most:
        return None
    if options.batch_size is None:
        return f"for {rows} rows, expected at most {most}, so that each has rows of its own; use fewer"
    return (
        f"with batch_size={options.batch_size} in each for {rows} rows, expected at most {rows} rows in a step of all; "
        "use fewer, or a smaller batch_size"
    )


def _check_libraries() -> None:
    try:
        import cloudpickle  # noqa: F401
        import lightning_fabric  # noqa: F401
    except ImportError:
        raise InvalidInput(
            "option processes: found no package lightning-fabric, expected it for more than one; run "
            'pip install "elbozoo[scale]"'
        ) from None


# ---- a step ----------------------------------------------------------------------------------------------------------


class RowNoise(NamedTuple):
    """Noise of a minibatch, and where its rows are in it.

    Attributes
    ----------
    noise : Noise
        Of the whole minibatch.
    dim : int or None
        The dimension that runs over rows; None where the noise belongs to none of them.
    form : tuple of int
        How long what that dimension runs over is: draws, rows, and what each draw of a row has, the last one fastest.
        A draw of a categorical has a flat noise like that, any other the rows alone.
    """

    noise: Noise
    dim: int | None = None
    form: tuple[int, int, int] = (1, 1, 1)

    def of(self, rows: slice, drawn: Tensor) -> Tensor:
        """Return the part of what was ``drawn`` that belongs to some rows; all of it where none belongs to any."""
        if self.dim is None:
            return drawn
        unfolded = drawn.unflatten(self.dim, self.form)
        part = unfolded.narrow(self.dim + 1, rows.start, rows.stop - rows.start)
        return part.flatten(self.dim, self.dim + 2).contiguous()


def noise_of_rows(
    whole: Sequence[Noise], part: Sequence[Noise], rows: int, of_part: int, particles: int
) -> list[RowNoise]:
    """Return where rows are in noise, from what a loss asks for at two numbers of rows.

    Parameters
    ----------
    whole, part : sequence of Noise
        What it asks for with so many ``rows``, and with ``of_part`` of them.
    particles : int
        Draws of each row, whose plate stands left of that of the rows, as everything of a single row stands right.

    Raises
    ------
    InvalidInput
        Where no single dimension is as many times as long as there are rows each time, and the others as they were.
    """
    if [each.kind for each in whole] != [each.kind for each in part]:
        raise _not_shared("it draws other noise for other rows")
    return [_row_noise(*pair, rows, of_part, particles) for pair in zip(whole, part, strict=True)]


def _row_noise(whole: Noise, part: Noise, rows: int, of_part: int, particles: int) -> RowNoise:
    long, short = tuple(whole.shape), tuple(part.shape)
    if long == short:
        return RowNoise(whole)
    moved = [dim for dim, sizes in enumerate(zip(long, short, strict=False)) if sizes[0] != sizes[1]]
    if len(long) == len(short) and len(moved) == 1:
        (dim,) = moved
        times = long[dim] // rows
        draws = 1 if times == 1 else particles
        if (long[dim], short[dim]) == (times * rows, times * of_part) and times % draws == 0:
            return RowNoise(whole, dim, (draws, rows, times // draws))
    raise _not_shared(f"its noise has the shape {long} for {rows} rows and {short} for {of_part}")


def _not_shared(reason: str) -> InvalidInput:
    return InvalidInput(
        f"option processes: found a program whose rows cannot be shared, expected one that draws and weighs each row "
        f"by itself: {reason}; use processes=1"
    )


class GivenNoise(OutsideNoise):
    """Noise from outside for a program that must ask for just that."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__(given)
        self.shapes = [each.shape for each in given]

    def take(self, kind: Kind, like: Tensor) -> Tensor:
        """Return the next noise, which must be of the shape of ``like``."""
        position = len(self.asked)
        if position >= len(self.shapes) or self.shapes[position] != like.shape:
            raise _not_shared(f"it asks for noise of the shape {tuple(like.shape)} that it did not ask for at first")
        return super().take(kind, like)

    def check_end(self) -> None:
        """Refuse a program that has asked for less than is there."""
        if len(self.asked) != len(self.shapes):
            raise _not_shared(f"it asks {len(self.asked)} times for noise and asked {len(self.shapes)} times at first")


class SharedStep(PyroStep):
    """A step of which each process takes the rows of its slice.

    Attributes
    ----------
    noise : list of RowNoise or None
        What the loss of a whole minibatch asks for, once the first step has told.
    """

    def __init__(
        self,
        entry: Entry,
        guide: Guide,
        objective: Objective,
        particles: int,
        options: TrainingOptions,
        *,
        processes: Processes,
    ) -> None:
        super().__init__(entry, guide, objective, particles, options)
        self.processes = processes
        self.noise: list[RowNoise] | None = None

    def __call__(self, batch: Batch) -> float:
        """Take one step with the other processes on the whole minibatch ``batch``, which all of them know.

        Raises
        ------
        InvalidInput
            At the first step, for a program whose rows cannot be shared.
        KeyboardInterrupt
            In all processes alike, where the user asks to stop; the step is not taken.
        """
        if isinstance(self.elbo, OwnELBO):
            self.elbo.beta = self.elbo.beta_at(self.count)
        rows = self.processes.slice_of(len(batch.x))
        if self.noise is not None:
            return self._take(self._total(batch, rows, [each.noise.draw() for each in self.noise]), batch.total)
        expected, drawn = self._learn(batch, rows)
        total = self._total(batch, rows, drawn)
        _check(total[: -len(self.parameters)], expected[: -len(self.parameters)], batch.x.dtype)
        return self._take(total, batch.total)

    def _learn(self, batch: Batch, rows: slice) -> tuple[Tensor, list[Tensor]]:
        """Return the slope of the whole minibatch in this process, and its noise; note where the rows are in that."""
        with torch.random.fork_rng(devices=()), OutsideNoise() as of_part:
            self.loss(batch.rows(rows.start, rows.stop))
        state, held = torch.get_rng_state(), self._buffers()
        with OutsideNoise() as of_whole:
            expected = slope(self.parameters, self.loss(batch))
        if not of_whole.is_all:
            raise _not_shared("samplers such as those of gamma and Poisson distributions take no noise from outside")
        if self._buffers() != held:
            raise _not_shared("it changes its own buffers from step to step")
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        drawn = [noise.draw() for noise in of_whole.asked]  # anew: programs may write into what they got
        if not torch.equal(torch.get_rng_state(), after):
            raise _not_shared("it sets the state of the random generator itself")
        numbers = len(batch.x), rows.stop - rows.start, self.elbo.num_particles
        self.noise = noise_of_rows(of_whole.asked, of_part.asked, *numbers)
        return expected, drawn

    def _total(self, batch: Batch, rows: slice, drawn: Sequence[Tensor]) -> Tensor:
        """Return the slope of the whole minibatch, of which each process takes its rows."""
        assert self.noise is not None
        part = batch.rows(rows.start, rows.stop)
        with GivenNoise([each.of(rows, value) for each, value in zip(self.noise, drawn, strict=True)]) as noise:
            loss = self.loss(part)
        noise.check_end()
        own = slope(self.parameters, loss) * (len(part.x) / len(batch.x))
        word = own.new_tensor([self.processes.is_told_to_stop()])
        total = self.processes.total(torch.cat([own, word]))
        if total[-1] > 0:
            raise KeyboardInterrupt
        return total[:-1]

    def _take(self, total: Tensor, rows: int) -> float:
        """Take the step down a slope and return the loss; where that is not finite, leave the parameters alone."""
        *gradients, loss, is_there = total.split([*(p.numel() for p in self.parameters), 1, len(self.parameters)])
        value = float(loss)
        if not math.isfinite(value):
            return value
        for parameter, gradient, there in zip(self.parameters, gradients, is_there.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if there else None
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm * rows)
        self.optimizer.step()
        self.count += 1
        return value

    def _buffers(self) -> list[tuple[int, int]]:
        modules = (self.entry, self.guide)
        return [(id(buffer), buffer._version) for module in modules for buffer in module.buffers()]


def slope(parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
    """Return one vector of the gradients of all parameters, the loss, and whether each parameter has a gradient.

    Gradients are zero where there are none, and all of them where the loss is not finite.
    """
    is_finite = bool(torch.isfinite(loss))
    found = torch.autograd.grad(loss, parameters, allow_unused=True) if is_finite else [None] * len(parameters)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    is_there = loss.new_tensor([gradient is not None for gradient in found])
    return torch.cat([*(each.reshape(-1) for each in flat), loss.detach().reshape(1), is_there])


def _check(total: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Hold what came together from the processes against the same of the whole minibatch in one."""
    if not torch.isfinite(expected).all():
        return  # the step says what is wrong with it
    # By the loss as well, whose rounding a gradient near zero has too.
    difference = float((total - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not difference <= AGREEMENT.get(dtype, 1e-3):
        raise _not_shared(f"the loss or its gradient changes by {difference:.1g} of its size where rows are apart")


# ---- a fit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedFit:
    """A fit as it is sent to the processes, but for its rows.

    Attributes
    ----------
    entry, guide : Entry, Guide
        At their starting values.
    objective : Objective
        What is maximised.
    options : TrainingOptions
        Options, whose ``batch_size`` is each process's.
    random : Memory
        State of the random numbers at the start.
    observers : sequence of Observer
        What looks at the fit in every process, and decides the same in each.
    logs : sequence of EventLog
        What looks at it in the first alone.
    resample : callable or None
        Makes the rows of a minibatch anew.
    progress : bool
        Whether the first process shows a bar.
    """

    entry: Entry
    guide: Guide
    objective: Objective
    options: TrainingOptions
    random: Memory
    observers: Sequence[Observer] = ()
    logs: Sequence[EventLog] = ()
    resample: Callable[[Batch], Batch] | None = None
    progress: bool = False

    @property
    def of_minibatch(self) -> TrainingOptions:
        """Options of whole minibatches, to which the processes bring their rows."""
        size = self.options.batch_size and self.options.batch_size * self.options.processes
        return self.options.model_copy(update={"batch_size": size, "engine": "eager"})

    def run(self, processes: Processes, x: Tensor) -> Ended:
        """Run it with the other processes on the rows ``x`` (N, ...)."""
        is_first = processes.rank == 0
        logs = self.logs if is_first else ()
        with isolated(0), ExitStack() as stack:
            for log in logs:
                stack.callback(log.close)
            RandomStates().recall(self.random)
            result = run_svi(
                self.entry,
                self.guide,
                self.objective,
                Batch.full(x),
                self.of_minibatch,
                progress=self.progress and is_first,
                observers=[*logs, *self.observers],
                resample=self.resample,
                make_step=partial(SharedStep, processes=processes),
            )
            parts = {name: part.memory() for name, part in self.parts(result.trajectory).items()}
            parts["random"] = RandomStates().memory()
        weights = (parts[name].tensors.items() for name in ("model", "guide"))
        processes.check_agreement({f"{i} {name}": value for i, of in enumerate(weights) for name, value in of})
        return Ended(parts, result.trajectory.is_elbo, result.converged, result.interrupted)

    def parts(self, trajectory: Trajectory) -> dict[str, Remembers]:
        """Return what a fit changes, by name."""
        remembering = (observer for observer in self.observers if isinstance(observer, Remembers))
        return {
            "model": Weights(self.entry),
            "guide": Weights(self.guide),
            "trajectory": trajectory,
            **{f"observer {i}": each for i, each in enumerate(remembering)},
        }


class Ended(NamedTuple):
    """How a fit ended in a process: the memory of its parts, and what its trajectory and its end were."""

    parts: dict[str, Memory]
    is_elbo: bool
    converged: bool
    interrupted: bool


def run_in_processes(
    entry: Entry,
    guide: Guide,
    objective: Objective,
    batch: Batch,
    options: TrainingOptions,
    *,
    progress: bool = True,
    observers: Sequence[Observer] = (),
    logs: Sequence[EventLog] = (),
    resample: Callable[[Batch], Batch] | None = None,
) -> SVIResult:
    """Maximise ``objective`` over the parameters of ``entry`` and ``guide``, in place, by ``options.processes``.

    It ends where :func:`~elbozoo.inference.svi.run_svi` ends with minibatches as large as those of all processes
    together, up to rounding, and leaves the random state that it leaves. Interrupted by Control-C, it ends after a
    step like that. Must be called inside :func:`~elbozoo.models.contract.isolation.isolated`, which gives the seed.

    Parameters
    ----------
    observers : sequence of Observer
        What looks at the fit in every process. What they remember comes back; they must decide alike in all.
    logs : sequence of EventLog
        What looks at it in one process alone, which closes them.

    Raises
    ------
    InvalidInput
        For a fit whose rows cannot be shared, or where processes cannot be started.
    NumericalFailure
        When the objective is no longer finite.
    LostProcess
        When a process ends without a word.
    """
    check_processes(objective, guide, options, batch.total)
    if not unique_parameters(entry, guide):
        return SVIResult(Trajectory(is_elbo=True), converged=True, interrupted=False)
    random = RandomStates().memory()
    fit = SharedFit(entry, guide, objective, options, random, observers, logs, resample, progress)
    ended: Ended = launch(options.processes, fit.run, batch.x)
    trajectory = Trajectory(ended.is_elbo)
    for name, part in fit.parts(trajectory).items():
        part.recall(ended.parts[name])
    # A device that this process alone has used stays as it is.
    drawn = ended.parts["random"]
    RandomStates().recall(Memory({**random.tensors, **drawn.tensors}, drawn.values))
    return SVIResult(trajectory, ended.converged, ended.interrupted)
