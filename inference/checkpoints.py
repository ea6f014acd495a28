"""Checkpoints: where a fit stands, on disk while it runs, so that it can go on after whatever ended it.

A fit has a folder of its own with one file, which each new checkpoint replaces as a whole: a process that is killed
while it writes leaves the one before. The file holds all that the next step depends on, so a fit that goes on ends
with the same bits as one that was never stopped. What the fit is a fit of, the identity, stands beside it, and
another fit is refused rather than continued.

The format is safetensors, with JSON in its header; never pickle, which runs what it reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from elbozoo.inference.memory import Memory, Remembers
from elbozoo.models.contract.errors import InvalidInput

logger = logging.getLogger(__name__)

FORMAT = 1
FILE, PARTIAL = "checkpoint.safetensors", ".partial"
EVERY = 500
REMEDY = "name another directory for this fit, or delete that file to start over"

Parts = Mapping[str, Remembers]


@dataclass(frozen=True)
class Standing:
    """Where a checkpoint found its fit.

    Attributes
    ----------
    steps : int
        Number of steps, or of iterations, taken.
    converged : bool
        Whether the fit has ended because it converged.
    """

    steps: int
    converged: bool


class Checkpoints:
    """The checkpoints of one fit.

    Parameters
    ----------
    folder : Path
        The fit's own folder.
    every : int
        Steps from one checkpoint to the next.
    identity : mapping
        What the fit is a fit of: plain values by name, see :func:`compare`.
    machine : mapping of str
        What may differ without being refused although it may change last digits, such as the number of threads.

    Attributes
    ----------
    seconds : float
        Wall-clock time that the fit had taken before this process took it up.
    """

    def __init__(
        self, folder: Path, every: int, identity: Mapping[str, Any], machine: Mapping[str, str] | None = None
    ) -> None:
        self.path = folder / FILE
        self.every = every
        self.identity = json.loads(json.dumps(identity))  # as it comes back: lists for tuples
        self.machine = dict(machine or {})
        self.seconds = 0.0
        self._since = time.perf_counter()
        self._parts: Parts = {}
        self._interrupted = False

    def resume(self, parts: Parts, most_steps: int) -> Standing | None:
        """Bring ``parts`` to where the last checkpoint left them, and say where that is; None without a checkpoint.

        Raises
        ------
        InvalidInput
            For a file that is damaged, of another format, of another fit, or further on than ``most_steps``.
        """
        self._parts = parts
        for left_over in self.path.parent.glob(f"{FILE}.*{PARTIAL}"):
            left_over.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        card, tensors = read_checkpoint(self.path)
        refuse_other_fit(self.path, card["identity"], self.identity)
        standing = Standing(card["steps"], card["converged"])
        if standing.steps > most_steps:
            raise InvalidInput(
                f"{self.path}: found a checkpoint of {standing.steps} steps, expected at most the {most_steps} that "
                f"this fit is allowed; allow more steps, or {REMEDY}"
            )
        for name, value in self.machine.items():
            if card["machine"].get(name) != value:
                logger.warning(
                    "%s was written with %s %s and goes on with %s: the last digits may come out otherwise",
                    self.path,
                    name,
                    card["machine"].get(name),
                    value,
                )
        self._recall(card["values"], tensors)
        self.seconds = card["seconds"]
        return standing

    @contextmanager
    def holding_interrupts(self) -> Iterator[None]:
        """Let Control-C wait for the end of a step while the block runs; a second one does not wait.

        In the middle of a step there is nothing that a fit could go on from.
        """
        usual = signal.getsignal(signal.SIGINT)
        if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
            yield  # someone else decides what an interrupt is
            return

        def hold(number: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        signal.signal(signal.SIGINT, hold)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)
            self._interrupted = False

    def after_step(self, steps: int) -> None:
        """Write a checkpoint where one is due after so many steps.

        Raises
        ------
        KeyboardInterrupt
            If the user asked to stop; a checkpoint has been written.
        """
        if self._interrupted or steps % self.every == 0:
            self._write(Standing(steps, converged=False))
        if self._interrupted:
            raise KeyboardInterrupt

    def end(self, steps: int, *, converged: bool) -> None:
        """Write the last checkpoint of a fit that has ended, from which it comes back without a step.

        Raises
        ------
        KeyboardInterrupt
            If the user asked to stop during the last step: whatever would come next does not.
        """
        self._write(Standing(steps, converged))
        if self._interrupted:
            raise KeyboardInterrupt

    def _write(self, standing: Standing) -> None:
        memories = {name: part.memory() for name, part in self._parts.items()}
        tensors = {f"{part}/{name}": value for part, of in memories.items() for name, value in of.tensors.items()}
        card = {
            "identity": self.identity,
            "machine": self.machine,
            "steps": standing.steps,
            "converged": standing.converged,
            "seconds": self.seconds + time.perf_counter() - self._since,
            "values": {name: memory.values for name, memory in memories.items()},
        }
        try:
            write_checkpoint(self.path, card, tensors)
        except OSError as error:
            # A fit of hours is worth more than its checkpoint, and the one before is still there.
            logger.warning("no checkpoint written to %s: %s", self.path, error.strerror or error)

    def _recall(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        try:
            if set(values) != set(self._parts):
                raise ValueError(f"it has the parts {', '.join(values)}")
            for name, part in self._parts.items():
                own = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
                part.recall(Memory(own, values[name]))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InvalidInput(
                f"{self.path}: the checkpoint does not fit this model and guide ({_first_line(error)}); {REMEDY}"
            ) from None


def write_checkpoint(path: Path, card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint to ``path`` as a whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written; what was there before still is.
    """
    # Copies, because safetensors takes no two names for one piece of memory.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(card)
    header = {"format": str(FORMAT), "card": text, "sha256": _digest(text, plain)}
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(save(plain, header))
            file.flush()
            os.fsync(file.fileno())  # a name must not outlive, in a power cut, what it stands for
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_checkpoint` wrote: the card and the tensors.

    Raises
    ------
    InvalidInput
        If the file is no checkpoint, damaged, or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if "format" not in header:
                raise InvalidInput(f"{path}: found no checkpoint of elbozoo, expected one; {REMEDY}")
            if header["format"] != str(FORMAT):
                raise InvalidInput(
                    f"{path}: found a checkpoint of format {header['format']}, expected {FORMAT}: another version of "
                    f"elbozoo wrote it; {REMEDY}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(header["card"], tensors) != header["sha256"]:
            raise ValueError("its checksum is another")
        card: dict[str, Any] = json.loads(header["card"])
    except InvalidInput:
        raise
    except OSError as error:
        raise InvalidInput(f"{path}: the checkpoint cannot be read ({error.strerror or error}); {REMEDY}") from None
    except (KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path}: the checkpoint is damaged ({_first_line(error)}); {REMEDY}") from None
    return card, tensors


def refuse_other_fit(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another fit, by the first difference between two identities.

    A value is a text or a number, or a mapping of options; that of ``data`` is what :func:`fingerprint` returns.

    Raises
    ------
    InvalidInput
        With what differs.
    """
    difference = first_difference(found, expected)
    if difference is not None:
        raise InvalidInput(f"{path}: found a checkpoint of {difference}; {REMEDY}")


def first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Say how two identities differ first, as "FOUND, expected EXPECTED"; None where they are one."""
    for name, value in expected.items():
        if found.get(name) != value:
            return _difference(name, found.get(name), value)
    return None


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of named tensors: their names, types, shapes and bits."""
    return _digest("", {name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _difference(name: str, found: Any, expected: Any) -> str:
    if name == "data":
        return f"{_data(found)}, expected {_data(expected)}"
    if isinstance(expected, dict):
        found = found if isinstance(found, dict) else {}
        keys = [*expected, *found]
        key = next(k for k in keys if (k in found) != (k in expected) or found.get(k) != expected.get(k))
        name, found, expected = f"{name} {key}", found.get(key), expected.get(key)
    return f"{name} {found!r}, expected {expected!r}"


def _data(found: Any) -> str:
    if not isinstance(found, dict):
        return "no data"
    return f"data of shape {tuple(found['shape'])} with the checksum {found['sha256'][:8]}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
