"""Monitors that watch a fit and say when to stop; kept apart from the loops that they watch."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, stdev

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


@dataclass
class MonotoneMonitor:
    """Watches the log-likelihood of EM: it may never fall, and stops when what is left to gain is small.

    What is left is Aitken's extrapolation of the geometric tail (Böhning et al. 1994), so that slow
    convergence is not taken for convergence.

    Parameters
    ----------
    tolerance : float
        Remaining gain, in nats per datum, below which EM has converged.
    rows : int
        Number of data.
    """

    tolerance: float
    rows: int
    history: list[float] = field(default_factory=list)

    def update(self, log_evidence: float) -> bool:
        """Take the total log-likelihood of one iteration, nats; return whether EM has converged.

        Raises
        ------
        NumericalFailure
            If it is not finite, or fell by more than rounding.
        """
        step = len(self.history)
        if not abs(log_evidence) < float("inf"):
            raise NumericalFailure(
                f"EM iteration {step}: log p(x) is {log_evidence}; standardise the columns or use fewer components"
            )
        if self.history and log_evidence < self.history[-1] - MONOTONE_SLACK * max(self.rows, abs(log_evidence)):
            raise NumericalFailure(
                f"EM iteration {step}: log p(x) fell from {self.history[-1]!r} to {log_evidence!r}, which EM never "
                "does: the E or M step of this entry is wrong or has lost its precision; standardise the columns"
            )
        self.history.append(log_evidence)
        return len(self.history) >= 3 and self.remaining() < self.tolerance * self.rows

    def remaining(self) -> float:
        """Estimated gain still to come, nats over all data."""
        before, middle, now = self.history[-3:]
        gain, previous = now - middle, middle - before
        if gain <= 0:
            return 0.0
        rate = gain / previous if previous > 0 else 1.0
        return gain * rate / (1 - rate) if rate < 1 else float("inf")
