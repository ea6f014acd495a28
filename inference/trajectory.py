"""The record of a fit, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import torch

from elbozoo.inference.memory import Memory

COLUMNS = ["step", "seconds", "objective", "elbo", "log_evidence"]
DENSE_STEPS = 20
RATIO = 1.1


@dataclass
class Trajectory:
    """Objective, ELBO and exact evidence along a fit, in nats over all rows, against steps and seconds.

    The objective is recorded at every step. The evidence is recorded where an oracle exists, at steps that
    grow geometrically, and what it costs is left out of ``seconds``.

    Parameters
    ----------
    is_elbo : bool
        Whether the objective is the ELBO, or an estimate of it.
    oracle : callable or None
        Returns the total log p(x) at the present θ.
    """

    is_elbo: bool
    oracle: Callable[[], float] | None = None
    rows: list[tuple[int, float, float, float, float]] = field(default_factory=list)
    _next: int = 0

    @property
    def is_due(self) -> bool:
        """Whether log p(x) is asked for at this step."""
        return self.oracle is not None and len(self.rows) >= self._next

    def evidence(self) -> float:
        """Return log p(x) at the present θ where it is due, otherwise NaN.

        Asked for before a step, because the step's objective is the one at the θ before it.
        """
        step = len(self.rows)
        if self.oracle is None or not self.is_due:
            return math.nan
        self._next = step + 1 if step < DENSE_STEPS else math.ceil(step * RATIO)
        return self.oracle()

    def record(self, seconds: float, objective: float, log_evidence: float = math.nan) -> None:
        """Add one step: its objective, and log p(x) at the same θ."""
        elbo = objective if self.is_elbo else math.nan
        self.rows.append((len(self.rows), seconds, objective, elbo, log_evidence))

    def record_exact(self, seconds: float, log_evidence: float) -> None:
        """Add one step after which the bound touches the evidence: objective, ELBO and log p(x) are one number."""
        self.rows.append((len(self.rows), seconds, log_evidence, log_evidence, log_evidence))

    def memory(self) -> Memory:
        """Return the record, and the step at which the evidence is due again."""
        rows = torch.tensor(self.rows, dtype=torch.float64).reshape(-1, len(COLUMNS))
        return Memory({"rows": rows}, {"next": self._next})

    def recall(self, memory: Memory) -> None:
        """Go on with the record."""
        self.rows = [(int(step), *figures) for step, *figures in memory.tensors["rows"].tolist()]
        self._next = memory.values["next"]

    def frame(self) -> pd.DataFrame:
        """Return the record as a table with the columns step, seconds, objective, elbo, log_evidence."""
        return pd.DataFrame(self.rows, columns=COLUMNS)
