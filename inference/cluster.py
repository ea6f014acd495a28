"""Rows on the workers of a Dask cluster, and the way to one.

What is asked of the rows goes to the workers that hold them, one task per block, and what comes of the blocks is merged
there too, in a tree, so that a single result returns. The tree is the same however many workers there are: sums of the
same blocks are the same to the last bit, also where a worker was lost on the way and its blocks were taken up again.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from elbozoo.inference.rows import Block, Part, Rows, TensorBlock, merged, parts_of
from elbozoo.models.contract.entry import default_names
from elbozoo.models.contract.errors import InvalidInput, unknown_name

if TYPE_CHECKING:
    import pandas as pd
    from dask.delayed import Delayed
    from distributed import Client, Future

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOCAL = "local"
CONNECT_SECONDS, WORKER_SECONDS = 5.0, 120.0  # to wait for a scheduler, and for its first worker
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
SPLIT = 8  # results that are merged in one task
# A task costs the scheduler about 1 ms, and a block of so many rows takes a worker tens of them.
PIECE_ROWS, LEAST_PIECE_ROWS = 2**16, 2**12
PIECES, MOST_PIECES = 16, 256
LARGE_WORK = 2**20  # bytes from which what is asked goes to every worker at once, and not from one to the next
LARGE_GRAPH = 10 * 2**20  # bytes of a collection's description, from which it must hold numbers
SHARE_OF_MEMORY = 0.5  # of the workers, that a collection may take
LOSSES = 4  # of the workers that hold the rows of a tensor, one after the other, until it is given up
INEXACT_INTEGER = 2**53  # from here on float64 skips integers
SCHEDULERS = "'local', the address of a scheduler such as 'tcp://HOST:8786', or a distributed.Client"


# ---- the way to a cluster --------------------------------------------------------------------------------------------


@contextmanager
def connected(scheduler: str | Client | None = LOCAL) -> Iterator[Client]:
    """Give a client of a Dask cluster while the block runs; it is the current one, which ``.compute()`` uses.

    Parameters
    ----------
    scheduler : str, distributed.Client or None
        ``"local"`` starts a process of one thread for each core of this machine, and ends them with the block; the
        address of a scheduler is connected to; a client is used and left open. None takes the client that is current,
        and ``"local"`` where there is none.

    Raises
    ------
    InvalidInput
        If nothing answers at the address, a client is closed or asynchronous, there are no workers, or Dask is not
        installed.
    """
    distributed = import_distributed()
    if scheduler is None:
        scheduler = _current_client() or LOCAL
    if isinstance(scheduler, distributed.Client):
        _refuse_unusable(scheduler)
        _await_worker(scheduler)
        with scheduler.as_current():
            yield scheduler
    elif scheduler == LOCAL:
        from dask.system import CPU_COUNT

        refuse_unguarded_script()
        with (
            local_cluster(CPU_COUNT) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
            client.as_current(),
        ):
            yield client
    elif isinstance(scheduler, str):
        with _client_at(scheduler) as client:
            _await_worker(client)
            yield client
    else:
        raise InvalidInput(
            f"found a {type(scheduler).__name__} as scheduler; expected {SCHEDULERS}; leave it out to compute here"
        )


def import_distributed() -> Any:
    """Return the package ``distributed``.

    Raises
    ------
    InvalidInput
        Where it is not installed.
    """
    try:
        import distributed
    except ImportError:
        raise InvalidInput(
            "scheduler: found no package dask.distributed, expected one to spread the work with; run "
            'pip install "elbozoo[scale]"'
        ) from None
    return distributed


def _current_client() -> Client | None:
    from distributed import get_client

    try:
        return get_client()
    except ValueError:
        return None


def _refuse_unusable(client: Client) -> None:
    if client.asynchronous:
        raise InvalidInput("found an asynchronous client; expected one that waits; make it with Client(...) alone")
    if client.status != "running":
        raise InvalidInput(f"found a client that is {client.status}; expected an open one; connect it again")


def _await_worker(client: Client) -> None:
    """Wait for the first worker, for which some clusters wait for work."""
    if client.nthreads():
        return
    address = client.scheduler_info(n_workers=0)["address"]
    logger.warning("the scheduler at %s has no workers yet; waiting for the first", address)
    try:
        client.submit(os.getpid, pure=False).result(WORKER_SECONDS)
    except TimeoutError:
        raise InvalidInput(
            f"found no worker at the scheduler {address} within {WORKER_SECONDS:g} s, expected at least 1; start one "
            f"with `dask worker {address}`"
        ) from None


@contextmanager
def _client_at(scheduler: Any) -> Iterator[Client]:
    from distributed import Client

    try:
        _greet(scheduler)
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"found no scheduler at {scheduler!r} within {CONNECT_SECONDS:g} s ({type(error).__name__}); expected the "
            "address that `dask scheduler` prints; check it, and that this machine may connect to it"
        ) from None
    with client, client.as_current():
        yield client


def _greet(address: str) -> None:
    """Exchange a greeting with a scheduler, for which a client would wait without end.

    Raises
    ------
    OSError, ValueError
        If it does not answer in time, or the address is none.
    """
    from distributed import Security
    from distributed.comm import connect

    async def greet() -> None:
        comm = await connect(address, CONNECT_SECONDS, **Security().get_connection_args("client"))
        await comm.close()

    # In a thread of its own: that of a notebook has a loop already.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, asyncio.wait_for(greet(), CONNECT_SECONDS)).result()


@contextmanager
def local_cluster(processes: int) -> Iterator[Any]:
    """Start so many processes of one thread; what Dask logs of their start and end is not shown.

    Raises
    ------
    InvalidInput
        If they do not start.
    """
    import dask
    from distributed import LocalCluster

    # Under this setting of Dask's, workers give freed memory back at once, and taking it anew costs half of an E step.
    keeping_memory = dask.config.set({"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None})
    try:
        cluster = LocalCluster(
            n_workers=processes,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # of its metrics; without one it is a fixed port
            silence_logs=logging.CRITICAL,
            env=dict.fromkeys(THREAD_VARIABLES, "1"),
        )
    except (OSError, RuntimeError) as error:
        raise InvalidInput(
            f"a local cluster: found {' '.join(str(error).split())}, expected {processes} processes to start; start "
            "`dask scheduler` and `dask worker` by hand, and give the address"
        ) from error
    with keeping_memory, cluster:
        yield cluster


def refuse_unguarded_script() -> None:
    """Refuse to start processes from the body of a script, which each of them would begin by running again.

    Raises
    ------
    InvalidInput
        If the line that is being run is not below ``if __name__ == "__main__":``.
    """
    main = sys.modules["__main__"]
    path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    body = _frame_of_body(vars(main))
    if path is None or body is None or (spec is not None and spec.name.endswith("__main__")):
        return  # such a main module is not run again
    try:
        statements = ast.parse(Path(path).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return
    running = [each for each in statements if each.lineno <= body.f_lineno <= (each.end_lineno or each.lineno)]
    if running and not any(isinstance(each, ast.If) and "__name__" in ast.unparse(each.test) for each in running):
        raise InvalidInput(
            f"{Path(path).name}, line {body.f_lineno}: found a call that starts processes in the body of a script, "
            'which each of them runs again; expected it below if __name__ == "__main__":; move it there'
        )


def _frame_of_body(names: dict[str, Any]) -> FrameType | None:
    """Return the frame that runs the body of the module with these names, if this is called from there."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not (frame.f_globals is names and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    return frame


# ---- rows on a cluster -----------------------------------------------------------------------------------------------


class HeldBlock(TensorBlock):
    """Rows in the memory of a process, which Dask is told the size of."""

    def __sizeof__(self) -> int:
        return self.x.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        # An array travels without a copy, which the storage of a tensor does not.
        return _held, (self.x.numpy(force=True),)


def _held(values: np.ndarray) -> HeldBlock:
    return HeldBlock(torch.from_numpy(values))


@dataclass(frozen=True)
class DaskBlock:
    """Rows that Dask computes: a block of a collection.

    Attributes
    ----------
    source : Delayed
        What a :class:`HeldBlock` of them comes from.
    rows, columns : int
        How many there are.
    """

    source: Delayed
    rows: int
    columns: int

    def __len__(self) -> int:
        return self.rows

    def parts(self, chunk: int) -> Iterator[torch.Tensor]:
        """Compute the block with the current client, or in this process where there is none, and yield its rows."""
        yield from self.source.compute().parts(chunk)

    def pick(self, positions: Sequence[int]) -> DaskBlock:
        """Return the same rows with the columns at ``positions``."""
        from dask.delayed import delayed

        pick = delayed(partial(_with_columns, list(positions)), pure=False)
        return DaskBlock(pick(self.source), self.rows, len(positions))


def _with_columns(positions: list[int], block: HeldBlock) -> HeldBlock:
    return HeldBlock(block.x[:, positions])


class ClusterRows(Rows):
    """Rows that the workers of a cluster go over.

    Rows in memory are cut and sent to the workers once. Blocks in files must be in reach of every worker under the same
    path, and are read by whichever has time. What Dask computes is kept by the workers where it fits into half of their
    memory together, and computed again in each pass where it does not.

    Parameters
    ----------
    blocks : sequence of Block
        What holds the rows, in their order.
    names : sequence of str
        Names of the columns.
    client : distributed.Client
        The way to the workers, which must be open as long as rows are asked for.
    """

    def __init__(self, blocks: Sequence[Block], names: Sequence[str], client: Client) -> None:
        super().__init__([piece for block in blocks if len(block) for piece in _pieces(block)], names)
        if not self.blocks:
            raise InvalidInput("found no row to send to a cluster; expected at least 1; bring more data")
        self.client = client
        self._sources: list[Future | Delayed] = self._placed(self.blocks)

    def parts_of_block(self, position: int, chunk: int) -> Iterator[Part]:
        """Yield the rows of a block in order, at most ``chunk`` at once; all of it is in the memory of this process."""
        block = self.blocks[position]
        here = self._result(self._sources[position]) if isinstance(block, DaskBlock) else block
        yield from parts_of(here, self.starts[position], chunk)

    def total(self, of_part: Callable[[Part], T], merge: Callable[[T, T], T], chunk: int) -> T:
        """Return ``of_part`` of each part of at most ``chunk`` rows, merged on the workers.

        Raises
        ------
        InvalidInput
            If one block after the other loses its worker, or a worker has not the packages that are needed; errors of
            ``of_part`` and ``merge`` come as they are.
        """
        import cloudpickle

        work = cloudpickle.dumps(_Work(of_part, merge, chunk, os.getpid()))
        for _ in range(LOSSES):
            try:
                return self._result(self._tree(work))
            except CancelledError:  # rows that were sent have gone with their worker
                self._send_again()
        raise InvalidInput(
            f"found rows lost with their worker {LOSSES} times in one pass; expected workers that stay; see their logs "
            "for why they end, or give them more memory"
        )

    def _tree(self, work: bytes) -> Delayed:
        """Return the tasks of a pass: one for each block, and one for each few results, down to one result."""
        import dask
        from dask.delayed import delayed

        if len(work) < LARGE_WORK:
            asked = delayed(work, pure=False)
        else:
            asked = self.client.scatter(work, broadcast=True, hash=False)
        of_block, of_results = delayed(_total_of_block, pure=False), delayed(_total_of_results, pure=False)
        results = []
        for source, start, home in zip(self._sources, self.starts, self._homes(), strict=True):
            with dask.annotate(**({} if home is None else {"workers": home, "allow_other_workers": True})):
                results.append(of_block(asked, source, start))
        while len(results) > 1:
            results = [of_results(asked, results[first : first + SPLIT]) for first in range(0, len(results), SPLIT)]
        return results[0]

    def _homes(self) -> list[str | None]:
        """Return the worker that each block goes to: one that has it, unless that has more to do than its share."""
        from distributed import Future, wait

        kept = [source for source in self._sources if isinstance(source, Future)]
        threads = self.client.nthreads()
        if len(kept) < len(self._sources) or not threads:
            return [None] * len(self._sources)
        with self.client.as_current():
            wait(kept)
        holders = self.client.who_has(kept)
        share = sum(map(len, self.blocks)) / sum(threads.values())  # rows for each thread
        load = dict.fromkeys(threads, 0.0)
        homes = []
        for block, source in zip(self.blocks, kept, strict=True):
            here = [worker for worker in holders.get(source.key, ()) if load.get(worker, share) < share]
            home = min(here or threads, key=lambda worker: (load[worker], worker))
            load[home] += len(block) / threads[home]
            homes.append(home)
        return homes

    def _result(self, wanted: Future | Delayed) -> Any:
        """Wait for what was asked for; nobody works for it any longer if this is interrupted."""
        from distributed import Future, KilledWorker

        future = wanted if isinstance(wanted, Future) else self.client.compute(wanted, optimize_graph=False)
        try:
            return future.result()
        except KilledWorker as error:
            raise InvalidInput(
                f"found a task that lost its worker time after time, at last {error.last_worker.address}; expected "
                "workers with room for a block of rows; give them more memory, or the rows in smaller blocks"
            ) from None
        except ModuleNotFoundError as error:
            raise InvalidInput(
                f"a worker found no module {error.name!r}, expected the packages that are installed here; install them "
                "on the workers too"
            ) from None
        finally:
            if future is not wanted:
                future.release()

    def _placed(self, blocks: Sequence[Block]) -> list[Future | Delayed]:
        """Send blocks to the workers, or let them compute what they can keep."""
        computed = [block for block in blocks if isinstance(block, DaskBlock)]
        others = [block for block in blocks if not isinstance(block, DaskBlock)]
        sources: list[Any] = [block.source for block in computed]
        if computed and self._are_kept(computed):
            sources = self._shared_out(self.client.compute(sources))
        sent = iter(self.client.scatter(others, hash=False) if others else ())
        ours = iter(sources)
        return [next(ours if isinstance(block, DaskBlock) else sent) for block in blocks]

    def _shared_out(self, futures: list[Future]) -> list[Future]:
        """Let each worker keep as many blocks as its threads call for, since it goes over those that it has.

        Dask computes a block where there is time, which leaves more of them with whoever was faster then.
        """
        threads = [address for address, count in self.client.nthreads().items() for _ in range(count)]
        places = [threads[i * len(threads) // len(futures) :][:1] for i in range(len(futures))]
        return [
            self.client.submit(_kept, future, workers=place or None, allow_other_workers=bool(place), pure=False)
            for future, place in zip(futures, places, strict=True)
        ]

    def _are_kept(self, blocks: Sequence[DaskBlock]) -> bool:
        """Whether the workers keep what they compute: where there is room, or where computing means sending it again.

        What there is no room for, the workers put on their disks.
        """
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        # A worker without a limit says 0.
        room = sum(worker["memory_limit"] or math.inf for worker in workers) if workers else math.inf
        needed = sum(8 * block.rows * block.columns for block in blocks)
        return needed <= SHARE_OF_MEMORY * room or _pickled_size([block.source for block in blocks]) > LARGE_GRAPH

    def _send_again(self) -> None:
        """Send once more the rows that were lost with their worker."""
        lost = [i for i, source in enumerate(self._sources) if getattr(source, "status", "") in ("cancelled", "lost")]
        for i, source in zip(lost, self._placed([self.blocks[i] for i in lost]), strict=True):
            self._sources[i] = source


def _kept(block: HeldBlock) -> HeldBlock:
    return block


class _Work(NamedTuple):
    """What is asked of each block, and by which process."""

    of_part: Callable[[Part], Any]
    merge: Callable[[Any, Any], Any]
    chunk: int
    process: int


def _total_of_block(asked: bytes, block: Block, start: int) -> Any:
    """Take what was asked of the parts of a block, one at a time; runs on a worker."""
    work = pickle.loads(asked)
    # The threads of a worker share its cores; but those of a cluster within the caller's process are the caller's.
    if work.process != os.getpid() and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    return merged(map(work.of_part, parts_of(block, start, work.chunk)), work.merge)


def _total_of_results(asked: bytes, results: Sequence[Any]) -> Any:
    """Merge what came of neighbours; runs on a worker."""
    return merged(iter(results), pickle.loads(asked).merge)


def _pieces(block: Block) -> Iterator[Block]:
    """Cut rows in memory into blocks that can be shared out; leave others as they are stored."""
    if isinstance(block, TensorBlock):
        yield from map(HeldBlock, block.x.split(_rows_of_piece(len(block))))
    else:
        yield block


def _rows_of_piece(rows: int) -> int:
    """Return how many rows go into a block, whatever the number of workers, so that the sums are always the same."""
    pieces = min(max(rows // PIECE_ROWS, PIECES), MOST_PIECES)
    return max(math.ceil(rows / pieces), LEAST_PIECE_ROWS)


def _pickled_size(value: Any) -> int:
    """Return the number of bytes that ``value`` takes on its way to a scheduler, without making them."""
    import cloudpickle

    counter = _Counter()
    cloudpickle.Pickler(counter, protocol=5, buffer_callback=lambda buffer: counter.write(buffer.raw())).dump(value)
    return counter.size


class _Counter:
    """A file that only counts."""

    size = 0

    def write(self, data: Any) -> None:
        self.size += memoryview(data).nbytes


# ---- collections -----------------------------------------------------------------------------------------------------


def collection_rows(collection: Any, columns: Sequence[str] | None, client: Client) -> ClusterRows:
    """Return the rows of a Dask collection on the cluster of ``client``; see :func:`dask_rows`."""
    with client.as_current():
        rows = dask_rows(collection, columns)
    return ClusterRows(rows.blocks, rows.names, client)


def dask_rows(collection: Any, columns: Sequence[str] | None = None) -> Rows:
    """Return the rows of a Dask collection, which Dask computes whenever they are asked for.

    Where their number is not known it is counted by one pass over the collection, with the current client if there is
    one: open the cluster first. Here a block is computed by itself, with all that it depends on;
    :class:`ClusterRows` computes what blocks share once.

    Parameters
    ----------
    collection : dask.array.Array (N, D) or (N,), dask.dataframe.DataFrame or Series
        The rows; of a frame, the columns of numbers, the others being left out, which is logged.
    columns : sequence of str, optional
        The columns to keep, in this order. Those of an array are called ``x0``, ``x1``, ....

    Raises
    ------
    InvalidInput
        If the collection holds no numbers or no rows. What is not finite is refused where it is read.
    """
    import_distributed()
    found = _table_of(collection, columns)
    lengths = _lengths(found)
    if not sum(lengths):
        raise InvalidInput(f"{found.where}: found no row; expected at least 1; bring more data")
    blocks: list[Block] = []
    start = 0
    for part, length in zip(found.parts, lengths, strict=True):
        if length:
            blocks.append(_block(part, found, start, length))
        start += length
    return Rows(blocks, found.names)


def is_collection(source: Any) -> bool:
    """Whether ``source`` is something that Dask computes; loads no Dask to find out."""
    return hasattr(type(source), "__dask_graph__")


class _Table(NamedTuple):
    """A collection of numbers: its name in messages, its columns, and its parts, with their lengths if known."""

    where: str
    names: list[str]
    parts: list[Any]
    lengths: list[int] | None


def _table_of(collection: Any, columns: Sequence[str] | None) -> _Table:
    import dask.array
    import dask.dataframe

    if isinstance(collection, dask.array.Array):
        return _table_of_array(collection, columns)
    if isinstance(collection, dask.dataframe.Series):
        collection = collection.to_frame("x0" if collection.name is None else collection.name)
    if isinstance(collection, dask.dataframe.DataFrame):
        return _table_of_frame(collection, columns)
    raise InvalidInput(
        f"found a Dask {type(collection).__name__}; expected a Dask array (N, D) or DataFrame; turn it into one"
    )


def _table_of_array(array: Any, columns: Sequence[str] | None) -> _Table:
    where = "Dask array"
    if array.dtype.kind not in "biuf":
        raise InvalidInput(f"{where}: found dtype {array.dtype}; expected real numbers; convert with x.astype(float)")
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or math.isnan(array.shape[1]):
        raise InvalidInput(
            f"{where}: found shape {array.shape}; expected rows (N, D) or (N,) with D known; reshape it, or call its "
            "compute_chunk_sizes()"
        )
    known = list(default_names(array.shape[1]))
    names = known if columns is None else _picked(columns, known, where)
    if names != known:
        array = array[:, [known.index(name) for name in names]]
    if not array.shape[0]:
        raise InvalidInput(f"{where}: found no row; expected at least 1; bring more data")
    array = array.rechunk({1: -1})
    lengths = list(array.chunks[0])
    if any(map(math.isnan, lengths)):
        return _Table(where, names, list(array.to_delayed().ravel()), None)
    if len(lengths) < PIECES:
        most = _rows_of_piece(sum(lengths))
        lengths = [length for whole in lengths for length in _cut(whole, most)]
        array = array.rechunk({0: tuple(lengths)})
    return _Table(where, names, list(array.to_delayed().ravel()), lengths)


def _cut(length: int, most: int) -> list[int]:
    return [min(most, length - first) for first in range(0, length, most)]


def _table_of_frame(frame: Any, columns: Sequence[str] | None) -> _Table:
    where = "Dask DataFrame"
    known = [str(name) for name in frame.columns]
    if len(set(known)) < len(known):
        twice = next(name for name in known if known.count(name) > 1)
        raise InvalidInput(f"{where}: found the column name {twice!r} twice; expected different names; rename one")
    dtypes = dict(zip(known, frame.dtypes, strict=True))
    left_out = [name for name in known if not _holds_numbers(dtypes[name])]
    names = [name for name in known if name not in left_out] if columns is None else _picked(columns, known, where)
    wrong = next((name for name in names if name in left_out), None)
    if wrong is not None:
        raise InvalidInput(
            f"{where}: column {wrong!r} holds {dtypes[wrong]}; expected numbers; convert it, or pick other columns"
        )
    if not names:
        raise InvalidInput(f"{where}: found no numeric column; expected at least 1; convert some with astype(float)")
    if columns is None and left_out:
        logger.warning("%s: columns left out, no numbers: %s", where, ", ".join(map(repr, left_out)))
    labels = dict(zip(known, frame.columns, strict=True))
    return _Table(where, names, frame[[labels[name] for name in names]].to_delayed(), None)


def _holds_numbers(dtype: Any) -> bool:
    from pandas.api import types

    is_real = types.is_numeric_dtype(dtype) and not types.is_complex_dtype(dtype)
    return is_real or types.is_bool_dtype(dtype)


def _picked(columns: Sequence[str], known: list[str], where: str) -> list[str]:
    names = [columns] if isinstance(columns, str) else list(columns)
    for name in names:
        if name not in known:
            raise unknown_name(f"column of the {where}", name, known)
    if not names or len(set(names)) < len(names):
        raise InvalidInput(f"{where}: found columns {names}; expected different ones, at least 1; name each once")
    return names


def _lengths(table: _Table) -> list[int]:
    import dask
    from dask.delayed import delayed

    if table.lengths is not None:
        return table.lengths
    return list(dask.compute(*map(delayed(len, pure=False), table.parts)))


def _block(part: Delayed, table: _Table, start: int, rows: int) -> DaskBlock:
    from dask.delayed import delayed

    # What a partial holds is not searched for collections.
    read = partial(_read, expected=_Expected(table.where, table.names, start, rows))
    return DaskBlock(delayed(read, pure=False)(part), rows, len(table.names))


class _Expected(NamedTuple):
    """What a part of a collection should be."""

    where: str
    names: list[str]
    start: int
    rows: int


def _read(part: np.ndarray | pd.DataFrame, expected: _Expected) -> HeldBlock:
    """Return the numbers of a part of a collection, float64.

    Raises
    ------
    InvalidInput
        If a number is missing, infinite or an integer that float64 does not hold, or there are fewer or more of them
        than before.
    """
    where, names, start, rows = expected
    if isinstance(part, np.ndarray):
        values, kinds = part, [part.dtype.kind] * len(names)
    else:
        values, kinds = part.to_numpy(dtype=np.float64, na_value=np.nan), [dtype.kind for dtype in part.dtypes]
    if values.shape != (rows, len(names)):
        raise InvalidInput(
            f"{where}: found a block of shape {values.shape} where it had {(rows, len(names))}; expected the same rows "
            "in each pass; persist the collection first"
        )
    x = np.require(values, np.float64, ["C", "W"])
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise InvalidInput(
            f"{where}: found {x[row, column]} in column {names[column]!r}, row {start + row + 1}; expected finite "
            "numbers; remove such rows, or fill them in"
        )
    whole = np.isin(kinds, ["i", "u"])
    if whole.any() and (np.abs(x[:, whole]) >= INEXACT_INTEGER).any():
        row, column = np.argwhere((np.abs(x) >= INEXACT_INTEGER) & whole)[0]
        raise InvalidInput(
            f"{where}: column {names[column]!r}, row {start + row + 1} holds an integer of about {x[row, column]:.3g}; "
            "expected less than 2**53 in size, which float64 holds exactly; rescale it, or pick the other columns"
        )
    return _held(x)
