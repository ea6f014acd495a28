"""Validation rows while a fit runs: a curve of their ELBO, and a fit that ends where it stops to rise.

Early stopping as in Prechelt, Early stopping - but when?, 1998: the fit ends after so many evaluations without a gain,
and goes back to the parameters of the best one. Those rows have then had their say about the fit, and what it
is worth is for other rows to tell.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
import pyro
from torch import Tensor

from elbozoo.guides.base import Guide
from elbozoo.inference.heldout import refusal_of_new_rows
from elbozoo.inference.ledger import elbo_of
from elbozoo.inference.memory import Memory, Weights
from elbozoo.inference.svi import TrainingOptions, TrainingState
from elbozoo.inference.weights import importance_weights
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput

PARTICLES = 10
EVERY = 100
STREAM = 104_729  # keeps the draws of validation apart from those of the fit with the same seed
COLUMNS = ["step", "objective", "elbo"]


class Point(NamedTuple):
    """One evaluation: after how many steps, and the objective per datum, nats."""

    step: int
    objective: float


class Validation:
    """Watches a fit by rows that it does not learn from.

    Every evaluation has the same noise, so that two of them differ by the parameters and not by luck, and leaves the
    random state of the fit as it was.

    Parameters
    ----------
    entry, guide : Entry, Guide
        The model and the guide while they are fitted.
    x : Tensor (M, D)
        The validation rows, arranged, in the type and on the device of the fit.
    options : TrainingOptions
        ``patience`` and ``validate_every``.
    seed : int
        Seed of the fit.

    moving : int
        Steps in which the objective itself changes.

    Attributes
    ----------
    points : list of Point
        The evaluations so far.
    """

    def __init__(
        self, entry: Entry, guide: Guide, x: Tensor, options: TrainingOptions, seed: int, moving: int = 0
    ) -> None:
        self.moving = moving
        self.entry, self.guide, self.x = entry, guide, x
        self.patience = options.patience
        self.every = options.validate_every or EVERY
        self.seed = seed + STREAM
        self.points: list[Point] = []
        self._best: dict[str, Tensor] = {}

    def __call__(self, state: TrainingState) -> bool:
        """Evaluate if it is due after this step; return whether the patience is at its end."""
        steps = len(state.trajectory.rows)
        if steps % self.every:
            return False
        self._evaluate(steps)
        if self.patience is None or steps < self.moving:
            return False
        return len(self.points) - 1 - self._best_at() >= self.patience

    def finish(self, steps: int) -> list[str]:
        """Evaluate the last parameters, go back to the best ones if there is a patience, and say so in notes."""
        if not self.points or self.points[-1].step != steps:
            self._evaluate(steps)
        if self.patience is None or steps < self.moving:
            return []
        self._recall_best()
        best = self.points[self._best_at()]
        return [
            f"the parameters are those after {best.step} of {steps} steps, where the validation rows were best: "
            f"{best.objective:.4f} nats per datum"
        ]

    def frame(self) -> pd.DataFrame:
        """Return the curve: step, objective and ELBO of the validation rows, nats per datum.

        The objective here is E_q[log p(x, z) - log q(z)], whatever is maximised; where q has no density it is no ELBO.
        """
        rows = [(p.step, p.objective, p.objective if self.guide.is_bound else math.nan) for p in self.points]
        return pd.DataFrame(rows, columns=COLUMNS)

    def memory(self) -> Memory:
        """Return the evaluations and the best parameters so far."""
        return Memory(dict(self._best), {"points": [list(point) for point in self.points]})

    def recall(self, memory: Memory) -> None:
        """Go on watching."""
        self.points = [Point(int(step), float(objective)) for step, objective in memory.values["points"]]
        self._best = {name: value.clone() for name, value in memory.tensors.items()}

    def _evaluate(self, steps: int) -> None:
        # Every distribution has been validated in the fit itself, by the same shapes.
        with pyro.validation_enabled(False):
            weights = importance_weights(self.entry, self.guide, Batch.full(self.x), PARTICLES, self.seed)
            total, _ = elbo_of(self.entry, self.guide, self.x, weights)
        self.points.append(Point(steps, total / self.entry.count(self.x)))
        if self.patience is not None and self._best_at() == len(self.points) - 1:
            self._best = {
                f"{what}/{name}": value.detach().clone()
                for what, module in self._modules().items()
                for name, value in Weights(module).memory().tensors.items()
            }

    def _best_at(self) -> int:
        """Position of the best evaluation, the first of equals; a figure that is no number is never the best.

        While β moves, parameters were fitted to other objectives than the one asked for, and are no rivals.
        """
        values = [
            p.objective if math.isfinite(p.objective) and p.step >= self.moving else -math.inf for p in self.points
        ]
        return values.index(max(values))

    def _recall_best(self) -> None:
        for what, module in self._modules().items():
            own = {k.removeprefix(f"{what}/"): v for k, v in self._best.items() if k.startswith(f"{what}/")}
            Weights(module).recall(Memory(own))

    def _modules(self) -> dict[str, Entry | Guide]:
        return {"model": self.entry, "guide": self.guide}


def validation_for(
    entry: Entry, guide: Guide, x: Tensor | None, options: TrainingOptions, seed: int, moving: int = 0
) -> Validation | None:
    """Return what watches a fit by the table ``x`` of validation rows, or None if nobody asked for it.

    In the first ``moving`` steps the objective itself changes, and no parameters are the best ones.
    """
    if not _is_asked_for(options):
        return None
    assert x is not None
    like = next(guide.parameters(), next(entry.parameters(), x))
    arranged = entry.arrange(x, entry.options).to(device=like.device, dtype=entry.dtype)
    return Validation(entry, guide, arranged, options, seed, moving)


def check_validation(guide: Guide, x: Tensor | None, options: TrainingOptions) -> None:
    """Refuse patience, or a curve, without rows to measure by or a q for them.

    Raises
    ------
    InvalidInput
        With the option, the reason and what to do.
    """
    if not _is_asked_for(options):
        return
    name = "patience" if options.patience is not None else "validate_every"
    found = f"option {name}: found {getattr(options, name)}"
    if x is None:
        raise InvalidInput(
            f"{found} without validation rows, expected some to measure by; give validation=0.1 or --validation 0.1, "
            "or rows of your own"
        )
    if reason := refusal_of_new_rows(guide):
        raise InvalidInput(f"{found} with guide {guide.name!r}, expected one with a q for validation rows: {reason}")


def _is_asked_for(options: TrainingOptions) -> bool:
    return options.patience is not None or options.validate_every is not None
