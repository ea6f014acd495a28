"""A log of a fit for TensorBoard, which ``pip install "elbozoo[tensorboard]"`` brings along.

The tags are the columns of a trajectory, in nats over all rows, with ``learning_rate`` and, where it moves,
``kl_weight``: β.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elbozoo.inference.losses import Weighting
from elbozoo.inference.trajectory import COLUMNS, Trajectory
from elbozoo.models.contract.errors import InvalidInput

if TYPE_CHECKING:
    from elbozoo.inference.svi import TrainingState

EVERY = 10  # steps between two entries; the evidence is logged whenever it was computed


class EventLog:
    """An observer that writes what a trajectory holds to TensorBoard's event files.

    Parameters
    ----------
    folder : Path
        The fit's own folder: a run, in the words of TensorBoard.
    weighting : Weighting or None
        β along the fit, where the objective has one that moves.
    """

    def __init__(self, folder: Path, weighting: Weighting | None = None) -> None:
        self.folder = folder
        self.weighting = weighting
        self._writer: Any = None
        self._last: tuple[int, dict[str, float]] | None = None

    def __call__(self, state: TrainingState) -> bool:
        """Log the step where it is due; never ends a fit."""
        self.record(state.trajectory, state.schedule.learning_rate)
        return False

    def record(self, trajectory: Trajectory, learning_rate: float) -> None:
        """Log the last step of ``trajectory`` where it is due, and the step size that the next one will have."""
        step, _, *values = trajectory.rows[-1]
        figures = dict(zip(COLUMNS[2:], values, strict=True)) | {"learning_rate": learning_rate}
        if self.weighting is not None:
            figures["kl_weight"] = self.weighting.at(step)
        self._last = step, figures
        if step % EVERY == 0 or not math.isnan(figures["log_evidence"]):
            self._write()

    def close(self) -> None:
        """Log the last step and close the files."""
        self._write()
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        if self._last is None:
            return
        (step, figures), self._last = self._last, None
        if self._writer is None:
            # What an earlier process logged from this step on is hidden: the fit went back to a checkpoint.
            self._writer = summary_writer()(str(self.folder), purge_step=step)
        for tag, value in figures.items():
            if not math.isnan(value):
                self._writer.add_scalar(tag, value, step)


@contextmanager
def event_log(folder: Path | None, weighting: Weighting | None = None) -> Iterator[list[EventLog]]:
    """Open a log in ``folder`` for the duration of a fit: one observer, or none without a folder."""
    if folder is None:
        yield []
        return
    log = EventLog(folder, weighting)
    try:
        yield [log]
    finally:
        log.close()


def summary_writer() -> Any:
    """Return PyTorch's writer of event files.

    Raises
    ------
    InvalidInput
        Where TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InvalidInput(
            "tensorboard: found no package of that name, expected one to write its log with; run "
            'pip install "elbozoo[tensorboard]"'
        ) from None
    return SummaryWriter
