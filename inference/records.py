"""What a fit leaves on disk while it runs: checkpoints, and a log for TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Self

from elbozoo.inference.checkpoints import EVERY
from elbozoo.inference.event_log import summary_writer
from elbozoo.inference.storage import writable_directory
from elbozoo.models.contract.errors import InvalidInput


@dataclass(frozen=True)
class Records:
    """Where fits leave what they write while they run; each in a folder of its own, METHOD-SEED.

    Attributes
    ----------
    checkpoint : Path or None
        Directory of checkpoints, from which the same fit goes on.
    checkpoint_every : int
        Steps from one checkpoint to the next.
    tensorboard : Path or None
        Directory of logs, for ``tensorboard --logdir``.
    """

    checkpoint: Path | None = None
    checkpoint_every: int = EVERY
    tensorboard: Path | None = None

    @classmethod
    def parse(
        cls, checkpoint: str | Path | None = None, checkpoint_every: Any = EVERY, tensorboard: str | Path | None = None
    ) -> Self:
        """Check what a user asks for, and make the directories.

        Raises
        ------
        InvalidInput
            For a number below 1, a directory that cannot be written, or a log without TensorBoard.
        """
        if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, Integral) or checkpoint_every < 1:
            raise InvalidInput(f"checkpoint_every: found {checkpoint_every!r}, expected int >= 1")
        if tensorboard is not None:
            summary_writer()
        folders = [None if place is None else writable_directory(place) for place in (checkpoint, tensorboard)]
        return cls(folders[0], int(checkpoint_every), folders[1])

    def under(self, name: str) -> Self:
        """Return the records in the folders called ``name`` within these directories, which are made."""
        return replace(self, checkpoint=_within(self.checkpoint, name), tensorboard=_within(self.tensorboard, name))


NO_RECORDS = Records()


def _within(directory: Path | None, name: str) -> Path | None:
    return None if directory is None else writable_directory(directory / name)
