"""Monitors that watch a fit and say when to stop; kept apart from the loops that they watch."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, stdev

from elbozoo.inference.memory import Memory
from elbozoo.models.contract.errors import NumericalFailure

MONOTONE_SLACK = 1e-9
SETTLED = 6  # steps of its own after which a method's gains tell its rate whatever jump came before


@dataclass
class PlateauMonitor:
    """Finds plateaus of a noisy objective by the means of successive windows.

    A plateau is a window whose mean is above the best one so far by less than ``tolerance``, or by less
    than the noise of the two means allows to tell.

    Parameters
    ----------
    tolerance : float
        Gain per window, in nats per datum, below which the objective counts as flat.
    window : int
        Number of steps in a window.
    epoch : int
        Steps in which every row is seen once. The noise is taken between epochs: within one, which rows came
        together makes the steps differ far more than their mean.
    """

    tolerance: float
    window: int
    epoch: int = 1
    _values: list[float] = field(default_factory=list)
    _best: float = float("-inf")

    def update(self, objective: float) -> bool:
        """Take the objective of one step, nats per datum; return whether a window ended on a plateau."""
        self._values.append(objective)
        if len(self._values) < self.window:
            return False
        epochs = [fmean(self._values[i : i + self.epoch]) for i in range(0, self.window, self.epoch)]
        mean, noise = fmean(epochs), stdev(epochs) / len(epochs) ** 0.5
        self._values.clear()
        flat = mean < self._best + max(self.tolerance, noise)
        self._best = max(self._best, mean)
        return flat

    def memory(self) -> Memory:
        """Return the window so far and the best mean before it."""
        return Memory(values={"window": self._values, "best": self._best})

    def recall(self, memory: Memory) -> None:
        """Go on in the middle of a window."""
        self._values, self._best = list(memory.values["window"]), memory.values["best"]


@dataclass
class MonotoneMonitor:
    """Watches what may never fall, the log-likelihood of EM or the bound of CAVI; stops when little is left to gain.

    What is left is Aitken's extrapolation of the geometric tail (Böhning et al. 1994), so that slow
    convergence is not taken for convergence.

    Parameters
    ----------
    tolerance : float
        Remaining gain, in nats per datum, below which the method has converged.
    rows : int
        Number of data.
    method, quantity, updates : str
        What is watched, for messages: the method, what it raises, and the steps by which it does.
    slowest : float
        Rate of the method's slowest direction where it is known from elsewhere; the tail shrinks no faster.
    """

    tolerance: float
    rows: int
    method: str = "EM"
    quantity: str = "log p(x)"
    updates: str = "the E or M step"
    history: list[float] = field(default_factory=list)
    slowest: float = 0.0
    _since_jump: int = -1
    _has_jumped: bool = False

    def update(self, value: float, *, jumped: bool = False) -> bool:
        """Take the total log-likelihood or bound of one iteration, nats; return whether the method has converged.

        Parameters
        ----------
        value : float
            Of this iteration.
        jumped : bool
            Whether it was reached by an extrapolation: gains across it are not the method's own and say nothing of
            its rate.

        Raises
        ------
        NumericalFailure
            If it is not finite, or fell by more than rounding.
        """
        step = len(self.history)
        if not abs(value) < float("inf"):
            raise NumericalFailure(
                f"{self.method} iteration {step}: {self.quantity} is {value}; "
                "standardise the columns or use fewer components"
            )
        if self.history and value < self.history[-1] - MONOTONE_SLACK * max(self.rows, abs(value)):
            raise NumericalFailure(
                f"{self.method} iteration {step}: {self.quantity} fell from {self.history[-1]!r} to {value!r}, which "
                f"{self.method} never does: {self.updates} of this entry is wrong or has lost its precision; "
                "standardise the columns"
            )
        self._has_jumped |= jumped
        self.history.append(value)
        self._since_jump = 0 if jumped else self._since_jump + 1
        enough = self.tolerance * self.rows
        return self._since_jump >= 2 and self.remaining() < enough and self._gained_lately() < enough

    def _gained_lately(self) -> float:
        """Gain over the last third of the run and the last jump, nats over all data; 0 where there was no jump.

        An extrapolation may still raise what the method's own steps no longer do. A third of the run, and not the last
        few: where the distance to the maximum falls like 1 / iterations, that gain is half of what is left.
        """
        if not self._has_jumped:
            return 0.0
        third = 2 * len(self.history) // 3
        before_jump = len(self.history) - 2 - self._since_jump
        return self.history[-1] - self.history[min(third, before_jump) if self._since_jump < SETTLED else third]

    def unfinished(self) -> str:
        """Say how much was left to gain when the iterations ran out."""
        left = self.remaining() / self.rows if len(self.history) >= 3 else float("inf")
        return (
            f"{self.method} stopped after {len(self.history)} iterations with about {left:.1g} nats per datum "
            "still to gain"
        )

    def remaining(self) -> float:
        """Estimated gain still to come, nats over all data."""
        before, middle, now = self.history[-3:]
        gain, previous = now - middle, middle - before
        if gain <= 0:
            return 0.0
        rate = max(gain / previous if previous > 0 else 1.0, self.slowest)
        return gain * rate / (1 - rate) if rate < 1 else float("inf")
