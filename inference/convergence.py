"""Monitors that watch a fit and say when to stop; kept apart from the loops that they watch."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, stdev

from elbozoo.inference.memory import Memory
from elbozoo.models.contract.errors import NumericalFailure

MONOTONE_SLACK = 1e-9


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
    """

    tolerance: float
    rows: int
    method: str = "EM"
    quantity: str = "log p(x)"
    updates: str = "the E or M step"
    history: list[float] = field(default_factory=list)

    def update(self, value: float) -> bool:
        """Take the total log-likelihood or bound of one iteration, nats; return whether the method has converged.

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
        self.history.append(value)
        return len(self.history) >= 3 and self.remaining() < self.tolerance * self.rows

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
        rate = gain / previous if previous > 0 else 1.0
        return gain * rate / (1 - rate) if rate < 1 else float("inf")
