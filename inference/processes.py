"""Processes of one machine that do one piece of work together, started here and connected by Lightning Fabric.

What is raised in one of them ends all and is raised by the process that started them; Control-C is a word that they
hear between two steps.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes

from elbozoo.inference.checkpoints import fingerprint
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure

LONGEST_WAIT = timedelta(minutes=30)  # of one process for the others in a step
WATCH = 0.5  # seconds from one look at the processes to the next
GRACE = 5.0  # seconds that the others have to end by themselves once one has failed
PORTS = 3  # that are tried: one that was free may be taken before the processes come to listen there
TAKEN = "EADDRINUSE"
STOP = "stop"
PRELOADED = ["elbozoo.inference.svi", "lightning_fabric"]


class LostProcess(NumericalFailure):
    """A process that shares a fit has ended without a word; the message says what is known."""


@dataclass(frozen=True)
class Processes:
    """The process that this runs in, among those that share a fit.

    Attributes
    ----------
    fabric : Fabric
        Lightning's, launched.
    folder : Path
        Where the process that started them speaks to them.
    """

    fabric: Any
    folder: Path

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        rank: int = self.fabric.global_rank
        return rank

    def slice_of(self, rows: int) -> slice:
        """Return which of so many rows are this process's; slices differ by one row at most."""
        count = self.fabric.world_size
        return slice(rows * self.rank // count, rows * (self.rank + 1) // count)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, with the same bits in each.

        Raises
        ------
        LostProcess
            Where another one does not answer.
        """
        try:
            total: Tensor = self.fabric.all_reduce(values, reduce_op="sum")
        except RuntimeError as error:
            raise LostProcess(f"another one does not answer: {error}") from error
        return total

    def is_told_to_stop(self) -> bool:
        """Whether the user has interrupted the fit, as far as this process knows."""
        return self.rank == 0 and (self.folder / STOP).exists()

    def check_agreement(self, tensors: dict[str, Tensor]) -> None:
        """Make sure that all processes hold the same bits.

        Raises
        ------
        RuntimeError
            Where they do not.
        """
        own = fingerprint(tensors)
        if self.fabric.broadcast(own) != own:
            raise RuntimeError("processes of one fit ended at different parameters; run it with processes=1")


class _Outcome(NamedTuple):
    """What became of a process: the value of its work, or the error that ended it, and when (seconds)."""

    value: Any = None
    error: Exception | None = None
    at: float = 0.0


Work = Callable[[Processes, Tensor], Any]


def launch(count: int, work: Work, x: Tensor) -> Any:
    """Run ``work`` in ``count`` new processes and return what it returns in the first.

    What is raised in one of them ends all, and is raised here. Control-C is a word to the processes, see
    :meth:`Processes.is_told_to_stop`; a second one ends them.

    Parameters
    ----------
    count : int
        Number of processes, which share this one's threads.
    work : callable
        Called with the :class:`Processes` and the rows; takes with it what it refers to.
    x : Tensor (N, ...)
        Rows, which the processes read from one file and share in memory.

    Raises
    ------
    InvalidInput
        Where processes cannot be started from here, or ``work`` cannot be sent to them.
    LostProcess
        Where one of them ends without a word.
    """
    _leave_if_imported_by_a_process()
    with TemporaryDirectory(prefix="elbozoo-") as place:
        folder = Path(place)
        (folder / "work").write_bytes(_pickled(work))
        np.save(folder / "x.npy", x.numpy())
        with _interrupt_as(folder / STOP):
            return _run(count, folder)


def _run(count: int, folder: Path) -> Any:
    """Run the work in ``folder`` and return its value; where someone else was quicker to take the port, try another."""
    for left in reversed(range(PORTS)):
        try:
            return _attempt(count, folder)
        except RuntimeError as error:
            if TAKEN not in str(error) or not left:
                raise
            for word in (*folder.glob("outcome-*"), *folder.glob("up-*")):
                word.unlink()
    raise AssertionError("the last attempt returns or raises")


def _attempt(count: int, folder: Path) -> Any:
    from lightning_fabric.plugins.environments.lightning import find_free_network_port

    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        # One process imports everything once, and all others are copies of it: seconds less for each.
        multiprocessing.get_context(method).set_forkserver_preload(PRELOADED)
    threads = max(1, torch.get_num_threads() // count)
    arguments = folder, count, find_free_network_port(), threads
    context = start_processes(_serve, arguments, count, join=False, start_method=method)
    try:
        _wait(context, folder)
    except (ProcessException, LostProcess) as error:
        raise _cause(count, folder, error) from None
    finally:
        _end(context)
    return _read(folder, 0).value


def _wait(context: ProcessContext, folder: Path) -> None:
    """Wait until all processes have ended well; one that ends otherwise takes the others with it."""
    while not context.join(timeout=WATCH, grace_period=GRACE):
        for rank, process in enumerate(context.processes):
            # An interrupt before it listens ends a process as if its work were done, and others would wait for it.
            if process.exitcode == 0 and not (folder / f"outcome-{rank}").exists():
                raise LostProcess("one of them ended before it began")


def _end(context: ProcessContext) -> None:
    for process in context.processes:
        if process.is_alive():
            process.kill()
        process.join()


def _cause(count: int, folder: Path, error: Exception) -> BaseException:
    """Return the error that ended the processes: the first one that is no consequence of another one's."""
    outcomes = [_read(folder, rank) for rank in range(count) if (folder / f"outcome-{rank}").exists()]
    errors = [each.error for each in sorted(outcomes, key=lambda each: each.at) if each.error is not None]
    own = [each for each in errors if not isinstance(each, LostProcess)]
    if own:
        return own[0]
    if (folder / STOP).exists():
        return KeyboardInterrupt()
    if not all((folder / f"up-{rank}").exists() for rank in range(count)):
        return InvalidInput(
            f"option processes: found {count}, and they did not come up: each imports the script that asks for them, "
            'expected its calls under `if __name__ == "__main__":`; put them there'
        )
    signal_name = getattr(error, "signal_name", None)
    known = f"one was ended by {signal_name}" if signal_name else str([*errors, error][0])
    return LostProcess(
        f"processes: {known}; a machine that runs out of memory ends them so: use fewer, or a smaller batch_size"
    )


def _leave_if_imported_by_a_process() -> None:
    """End a new process that comes here while it imports the script that asked for it, before it asks for more."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)


def _pickled(work: Work) -> bytes:
    import cloudpickle

    try:
        pickled: bytes = cloudpickle.dumps(work)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInput(
            "option processes: found a program that cannot be sent to other processes, expected one that pickle can "
            f"carry ({reason}); use processes=1"
        ) from error
    return pickled


@contextmanager
def _interrupt_as(stop: Path) -> Iterator[None]:
    """Let Control-C leave the file ``stop`` while the block runs; a second one is raised."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # someone else decides what an interrupt is
        return

    def leave_word(number: int, frame: Any) -> None:
        if stop.exists():
            raise KeyboardInterrupt
        stop.touch()

    signal.signal(signal.SIGINT, leave_word)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


# ---- in each process -------------------------------------------------------------------------------------------------


def _serve(rank: int, folder: Path, count: int, port: int, threads: int) -> None:
    """Do this process's part of the work in ``folder``, and leave there what became of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of which the process that asked says when to stop
    threading.Thread(target=_end_with_caller, daemon=True).start()
    (folder / f"up-{rank}").write_text(str(os.getpid()))
    if rank > 0:  # all have the same to say
        warnings.simplefilter("ignore")
        logging.disable()
    try:
        processes = Processes(_joined(rank, count, port), folder)
        torch.set_num_threads(threads)
        work: Work = pickle.loads((folder / "work").read_bytes())
        # Copied on write: a program that writes into its rows writes into its own.
        x = torch.from_numpy(np.load(folder / "x.npy", mmap_mode="c"))
        value = work(processes, x)
        outcome = _Outcome(value if rank == 0 else None)
    except Exception as error:
        outcome = _Outcome(error=_portable(error, rank), at=time.monotonic())
    _write(folder, rank, outcome)
    if outcome.error is not None:
        sys.exit(1)


def _joined(rank: int, count: int, port: int) -> Any:
    """Return Lightning's Fabric, connected with the other processes of this machine."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    for name in ("GROUP_RANK", "WORLD_SIZE"):  # of a cluster's, which this fit is none of the business of
        os.environ.pop(name, None)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    os.environ.update(address)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=LONGEST_WAIT)
    fabric = Fabric(accelerator="cpu", devices=count, strategy=strategy, plugins=[LightningEnvironment()])
    fabric.launch()
    return fabric


def _end_with_caller() -> None:
    """End this process when the one that asked for it has ended, which a server of processes may outlive."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)


def _portable(error: Exception, rank: int) -> Exception:
    """Return an error that another process can raise, with a note on where it comes from."""
    trace = "".join(traceback.format_exception(error))
    try:
        result: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        result = RuntimeError(f"{type(error).__name__}: {error}")
    result.add_note(f"in process {rank} of those that share the fit:\n{trace}")
    return result


def _write(folder: Path, rank: int, outcome: _Outcome) -> None:
    # Under its name it is whole: whoever wrote it may be ended at any time.
    draft = folder / f"draft-{rank}"
    draft.write_bytes(pickle.dumps(outcome))
    draft.replace(folder / f"outcome-{rank}")


def _read(folder: Path, rank: int) -> _Outcome:
    outcome: _Outcome = pickle.loads((folder / f"outcome-{rank}").read_bytes())
    return outcome
