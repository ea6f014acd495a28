"""Rows on a cluster of two processes: the same statistics, the same EM, and what happens when things go wrong."""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import elbozoo as ez
from elbozoo.inference import cluster as module
from elbozoo.inference.cluster import ClusterRows, DaskBlock, collection_rows, connected, dask_rows, is_collection
from elbozoo.inference.em import EMOptions, EMRun, run_em
from elbozoo.inference.minibatches import StreamedMinibatches
from elbozoo.inference.rows import Part, Rows
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
dd = pytest.importorskip("dask.dataframe")
distributed = pytest.importorskip("distributed")
sizeof = pytest.importorskip("dask.sizeof").sizeof

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster")]

ROWS, COLUMNS = 2_000, 3
ITERATIONS = 6
# Relative: sums of 2,000 float64 terms in another order differ by 1e-13, and six steps of EM carry that on.
REORDERED = 1e-9


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with module.local_cluster(2) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen blocks where there would be one, which is more than are merged in one task."""
    monkeypatch.setattr(module, "LEAST_PIECE_ROWS", 2)


def table(seed: int = 0) -> Tensor:
    """Two groups that overlap, so that EM goes on for long."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[: ROWS // 3] += 1.5
    return x


class Stretch(NamedTuple):
    """A block that stands for a stretch of a file."""

    path: str
    first: int
    rows: int

    def __len__(self) -> int:
        return self.rows

    def parts(self, chunk: int) -> Iterator[Tensor]:
        x = np.load(self.path)[self.first : self.first + self.rows]
        yield from torch.from_numpy(x).split(chunk)


def in_tensor(x: Tensor, client: Any, folder: Path) -> ClusterRows:
    return ClusterRows(Rows.in_memory(x).blocks, [], client)


def in_array(x: Tensor, client: Any, folder: Path) -> ClusterRows:
    return collection_rows(da.from_array(x.numpy(), chunks=(700, 2)), None, client)


def in_array_of_unknown_length(x: Tensor, client: Any, folder: Path) -> ClusterRows:
    """Every row is kept, which Dask cannot know, but for a block without any."""
    array = da.from_array(np.concatenate([x.numpy(), np.full((100, COLUMNS), -99.0)]), chunks=(100, COLUMNS))
    return collection_rows(array[array[:, 0] > -99.0], None, client)


def in_frame(x: Tensor, client: Any, folder: Path) -> ClusterRows:
    frame = pd.DataFrame(x.numpy(), columns=list("abc")).assign(name="text")
    return collection_rows(dd.from_pandas(frame, npartitions=5), None, client)


def in_files(x: Tensor, client: Any, folder: Path) -> ClusterRows:
    path = folder / "x.npy"
    np.save(path, x.numpy())
    return ClusterRows([Stretch(str(path), first, 500) for first in range(0, ROWS, 500)], [], client)


def fitted(model: str, x: Tensor, rows: Rows, **options: Any) -> EMRun:
    entry = get_entry(model).from_data(x[:300], **options)
    em = EMOptions(restarts=1, iterations=ITERATIONS, tolerance=1e-300, chunk=90)
    return run_em(entry, rows, em, seed=0, start=x[:300], progress=False)


def history(run: EMRun) -> np.ndarray:
    return run.trajectory.frame()["log_evidence"].to_numpy()


def apart(one: EMRun, other: EMRun) -> float:
    """Largest relative difference of their log-likelihoods and of their parameters."""
    values = [np.abs(history(one) / history(other) - 1).max()]
    values += [float((v - other.state[k]).abs().max() / other.state[k].abs().max()) for k, v in one.state.items()]
    return max(values)


PLACES: list[Callable[[Tensor, Any, Path], ClusterRows]] = [
    in_tensor,
    in_array,
    in_array_of_unknown_length,
    in_frame,
    in_files,
]


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_em_on_a_cluster_is_em_in_memory(place: Any, client: Any, tmp_path: Path) -> None:
    x = table()
    rows = place(x, client, tmp_path)
    assert len(rows) == ROWS and len(rows.blocks) > 1
    assert torch.equal(in_order(rows), x)
    options = {"components": 2, "covariance": "full"}
    ours, plain = (fitted("gaussian-mixture", x, each, **options) for each in (rows, Rows.in_memory(x)))
    assert len(history(ours)) == ITERATIONS
    assert apart(ours, plain) <= REORDERED
    moved = x.clone()
    moved[-1, -1] += 1e-3  # one number of the last block
    assert apart(ours, fitted("gaussian-mixture", x, Rows.in_memory(moved), **options)) > REORDERED


def test_summaries_are_merged_on_the_cluster(client: Any, tmp_path: Path) -> None:
    """Factor analysis passes over the rows once."""
    x = table()
    ours = fitted("factor-analysis", x, in_tensor(x, client, tmp_path), latent_dim=1)
    assert apart(ours, fitted("factor-analysis", x, Rows.in_memory(x), latent_dim=1)) <= REORDERED
    other = fitted("factor-analysis", x, Rows.in_memory(table(seed=1)), latent_dim=1)
    assert apart(ours, other) > REORDERED


def whereabouts(part: Part) -> tuple[list[tuple[int, int]], set[int], int]:
    return [(part.start, len(part.x))], {os.getpid()}, 0


def joined(left: Any, right: Any) -> Any:
    """Merge in order, note who merged, and how often the earlier of the two had been merged before."""
    return left[0] + right[0], left[1] | right[1] | {os.getpid()}, left[2] + 1


def test_results_are_merged_in_a_tree_on_the_workers(client: Any) -> None:
    """600 blocks become 75, 10, 2 and one, in order."""
    x = torch.arange(1_200, dtype=torch.float64)[:, None]
    blocks = [block for first in range(0, 1_200, 2) for block in Rows.in_memory(x[first : first + 2]).blocks]
    rows = ClusterRows(blocks[:70], [], client)
    parts, processes, merges = rows.total(whereabouts, joined, chunk=1)
    assert parts == [(start, 1) for start in range(140)]
    assert os.getpid() not in processes and len(processes) == 2
    assert merges == 1 + 3 * (module.SPLIT - 1) - (module.SPLIT - 2)  # along the left edge: a block, 8, 8, and 2
    (_, here, flat) = Rows(blocks[:70], []).total(whereabouts, joined, chunk=1)
    assert here == {os.getpid()} and flat == 139


def summed(part: Part) -> Tensor:
    return part.x.sin().sum(0)


def test_sums_do_not_depend_on_the_number_of_workers(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit; a cut elsewhere is another order of the sums."""
    x = table()

    def total(workers: int) -> Tensor:
        addresses = list(client.nthreads())[:workers]
        with dask.annotate(workers=addresses):
            return ClusterRows(Rows.in_memory(x).blocks, [], client).total(summed, torch.add, 64)

    found = total(2)
    assert torch.equal(found, total(1))
    monkeypatch.setattr(module, "PIECES", 3)
    assert not torch.equal(found, total(2))


@pytest.mark.parametrize("large", [0, 2**30], ids=["to every worker", "from one to the next"])
def test_what_is_asked_arrives_however_large(large: int, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_WORK", large)
    rows = in_tensor(table(), client, Path())
    assert rows.total(lambda part: len(part.x), lambda a, b: a + b, 64) == ROWS
    assert rows.total(lambda part: len(part.x) - 1, lambda a, b: a + b, 64) != ROWS


def test_worker_tasks_take_one_thread(client: Any) -> None:
    client.run(torch.set_num_threads, 2)
    assert in_tensor(table(), client, Path()).total(lambda part: torch.get_num_threads(), max, 64) == 1


# ---- what is kept, and what is computed again ------------------------------------------------------------------------


def noted(log: str, position: int) -> np.ndarray:
    """Return a block, and leave a line whenever it is computed."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{position}\n")
    return np.full((50, 2), float(position))


@pytest.mark.parametrize(("share", "computations"), [(0.5, 1), (0.0, 3)], ids=["room", "no room"])
def test_collection_is_kept_where_there_is_room(
    share: float, computations: int, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What several blocks need, here the least number, which is 0, is computed once in a pass."""
    monkeypatch.setattr(module, "SHARE_OF_MEMORY", share)
    log = tmp_path / "log"
    blocks = [
        da.from_delayed(dask.delayed(noted, pure=False)(str(log), position), (50, 2), np.float64)
        for position in range(20)
    ]
    whole = da.concatenate(blocks)
    rows = collection_rows(whole - whole.min(0), None, client)
    for _ in range(3):
        assert rows.total(summed_up, lambda a, b: a + b, 30) == 50 * 2 * sum(range(20))
    assert sorted(map(int, log.read_text().split())) == sorted([*range(20)] * computations)
    if computations == 1:  # then the workers have as much to do, wherever the blocks were computed
        homes = [address for addresses in client.who_has(rows._sources).values() for address in addresses]
        assert min(homes.count(address) for address in client.nthreads()) >= 10


def relative(one: float, two: float) -> float:
    return abs(one - two) / abs(two)


def summed_up(part: Part) -> float:
    return float(part.x.sum())


def test_minibatches_take_what_the_workers_keep(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs ask for no block to be computed anew, which those of plain rows are."""
    x = table()
    rows = collection_rows(da.from_array(x.numpy(), chunks=(50, COLUMNS)), None, client)
    computed = 0
    parts = DaskBlock.parts

    def counting(self: DaskBlock, chunk: int) -> Iterator[Tensor]:
        nonlocal computed
        computed += 1
        yield from parts(self, chunk)

    monkeypatch.setattr(DaskBlock, "parts", counting)
    minibatches = StreamedMinibatches(rows, x[:1], ROWS // 2, torch.Generator().manual_seed(0))
    index = torch.cat([next(minibatches).index for _ in range(4)])
    assert computed == 0 and len(index.unique()) == ROWS // 2 * 2
    with client.as_current():
        next(StreamedMinibatches(Rows(rows.blocks, rows.names), x[:1], ROWS // 2))
    assert computed > 0


def test_fits_and_comparisons_take_a_collection(client: Any) -> None:
    """As they take its numbers: the same log p(x) to 1e-9; afterwards their figures need no cluster."""
    x = table()
    collection = da.from_array(x.numpy(), chunks=(50, COLUMNS))
    given: dict[str, Any] = {"components": 2, "restarts": 1, "iterations": 5, "progress": False}
    memory = ez.fit("gaussian-mixture", x, method="em", **given).log_evidence().value
    fit = ez.fit("gaussian-mixture", collection, method="em", scheduler=client, **given)
    assert isinstance(fit.rows, ClusterRows) and relative(fit.log_evidence().value, memory) < REORDERED
    found = ez.compare("gaussian-mixture", collection, seeds=1, steps=5, scheduler=client.scheduler.address, **given)
    assert found.table["method"].tolist() == ["em", "amortized"] and found.data["rows"] == ROWS
    assert relative(float(found.table["log_evidence"][0]), memory) < REORDERED
    assert relative(found.fits[0].log_evidence().value, memory) < REORDERED  # of a client that has gone
    other = ez.fit("gaussian-mixture", x[: ROWS // 2], method="em", **given)
    assert relative(other.log_evidence().value, memory) > 1e-3


def test_a_scheduler_for_rows_in_memory_is_refused(client: Any) -> None:
    """One fit of them has nothing to spread."""
    with pytest.raises(InvalidInput, match=r"scheduler: found it with tensor in memory, .*use compare"):
        ez.fit("gaussian-mixture", table(), method="em", scheduler=client)


def test_numbers_in_a_collection_are_sent_once(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the room, where computing it again would mean sending it again."""
    monkeypatch.setattr(module, "SHARE_OF_MEMORY", 0.0)
    monkeypatch.setattr(module, "LARGE_GRAPH", 20_000)
    sent = collection_rows(da.from_array(table().numpy(), chunks=(500, COLUMNS)), None, client)
    made = collection_rows(da.random.default_rng(0).normal(size=(ROWS, COLUMNS), chunks=(500, COLUMNS)), None, client)
    assert all(isinstance(source, distributed.Future) for source in sent._sources)
    assert not any(isinstance(source, distributed.Future) for source in made._sources)
    # And Dask is told how large the blocks are; some bytes for each array itself.
    assert 0 <= sizeof(module.HeldBlock(table())) - 8 * table().numel() < 1_000
    x = table().numpy()
    assert 0 <= module._pickled_size([x, x[::2]]) - 8 * x.size * 3 / 2 < 1_000


# ---- errors ----------------------------------------------------------------------------------------------------------


class Fails(NamedTuple):
    error: Exception

    def __call__(self, part: Part) -> Any:
        if part.start:
            raise self.error
        return part.x.sum()


@pytest.mark.parametrize(
    "error", [InvalidInput("a, b; c"), NumericalFailure("step 3"), torch.linalg.LinAlgError("not positive-definite")]
)
def test_error_of_a_task_comes_back_as_it_is(error: Exception, client: Any) -> None:
    rows = in_tensor(table(), client, Path())
    with pytest.raises(type(error)) as caught:
        rows.total(Fails(error), torch.add, 64)
    assert type(caught.value) is type(error) and str(caught.value) == str(error)
    assert rows.total(lambda part: part.start >= 0, max, 64)  # the workers go on


def test_module_that_workers_lack_is_named(client: Any) -> None:
    lacking = Fails(ModuleNotFoundError("No module named 'mine'", name="mine"))
    with pytest.raises(InvalidInput, match="a worker found no module 'mine', expected the packages that are installed"):
        in_tensor(table(), client, Path()).total(lacking, torch.add, 64)


def frame_of(**columns: Any) -> Any:
    return dd.from_pandas(pd.DataFrame(columns), npartitions=2)


@pytest.mark.parametrize(
    ("collection", "columns", "message"),
    [
        (lambda: da.zeros((4, 2, 2)), None, r"Dask array: found shape \(4, 2, 2\); expected rows \(N, D\) or \(N,\)"),
        (lambda: da.zeros((4, 2), dtype=complex), None, "Dask array: found dtype complex128; expected real numbers"),
        (lambda: da.zeros((0, 2)), None, "Dask array: found no row; expected at least 1"),
        (lambda: da.zeros((4, 2)), ["x2"], "unknown column of the Dask array 'x2'; did you mean"),
        (lambda: da.zeros((4, 2)), ["x1", "x1"], r"found columns \['x1', 'x1'\]; expected different ones"),
        (lambda: frame_of(a=["u", "v"]), None, "Dask DataFrame: found no numeric column; expected at least 1"),
        (lambda: frame_of(a=["u", "v"], b=[1, 2]), ["a"], r"column 'a' holds (str|string|object); expected numbers"),
        (lambda: dask.delayed(1), None, "found a Dask DelayedLeaf; expected a Dask array"),
    ],
)
def test_collection_without_numbers_is_refused(collection: Any, columns: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        dask_rows(collection(), columns)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "Dask DataFrame: found nan in column 'b', row 6; expected finite numbers; remove such rows"),
        (-np.inf, "Dask DataFrame: found -inf in column 'b', row 6; expected finite numbers"),
        (pd.NA, "Dask DataFrame: found nan in column 'b', row 6; expected finite numbers"),
        (2**53, "column 'b', row 6 holds an integer of about 9.01e[+]15; expected less than 2[*][*]53 in size"),
        (7, None),
    ],
)
def test_value_that_cannot_be_fitted_is_named_where_it_is_read(value: Any, message: str | None) -> None:
    numbers = pd.Series([0, 1, 2, 3, 4, value, 5], dtype="Int64" if isinstance(value, int) or value is pd.NA else float)
    rows = dask_rows(frame_of(a=np.arange(7.0), b=numbers))
    if message is None:
        assert sum(len(part.x) for part in rows.parts(2)) == 7
        return
    with pytest.raises(InvalidInput, match=message):
        list(rows.parts(2))


def in_order(rows: Rows) -> Tensor:
    return torch.cat([part.x for part in rows.parts(1)])


def test_columns_of_a_collection(caplog: pytest.LogCaptureFixture) -> None:
    """In this process: booleans are numbers, text is left out, columns come in the order that is asked for."""
    frame = frame_of(a=[1.5, 2.5, 3.5], t=["u", "v", "w"], b=[True, False, True], c=[1, 2, 3])
    rows = dask_rows(frame)
    assert rows.names == ("a", "b", "c")
    assert in_order(rows).tolist() == [[1.5, 1, 1], [2.5, 0, 2], [3.5, 1, 3]]
    assert [record.message for record in caplog.records] == ["Dask DataFrame: columns left out, no numbers: 't'"]
    picked = dask_rows(frame, ["c", "a"])
    assert in_order(picked).tolist() == [[1, 1.5], [2, 2.5], [3, 3.5]]
    assert torch.equal(torch.cat([block.pick([2, 0]).source.compute().x for block in rows.blocks]), in_order(picked))
    array = da.arange(6, chunks=4).reshape(3, 2)
    assert in_order(dask_rows(array, ["x1"])).tolist() == [[1], [3], [5]]
    assert len(dask_rows(da.arange(6, chunks=4))) == 6 and len(dask_rows(frame["c"])) == 3
    assert len(caplog.records) == 1


def test_collection_that_changes_is_refused(tmp_path: Path) -> None:
    """A source that had three rows when they were counted, and has two when they are read."""
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((3, 2)))
    part = da.from_delayed(dask.delayed(np.load)(str(path)), (np.nan, 2), np.float64)
    rows = dask_rows(part)
    assert len(list(rows.parts(9))) == 1
    np.save(path, np.zeros((2, 2)))
    with pytest.raises(InvalidInput, match=r"found a block of shape \(2, 2\) where it had \(3, 2\)"):
        list(rows.parts(9))


def test_collections_are_known_without_dask() -> None:
    assert all(map(is_collection, [da.ones(3), frame_of(a=[1, 2]), frame_of(a=[1, 2])["a"], dask.delayed(1)]))
    assert not any(map(is_collection, [np.ones(3), pd.DataFrame(), torch.ones(3), [1], "iris"]))


def test_nothing_to_send_is_refused(client: Any) -> None:
    with pytest.raises(InvalidInput, match="found no row to send to a cluster"):
        ClusterRows(Rows.in_memory(torch.zeros(0, 2)).blocks, [], client)


# ---- the way to a cluster --------------------------------------------------------------------------------------------


def test_client_is_used_and_left_open(client: Any) -> None:
    with connected(client) as found:
        assert found is client
        with connected(None) as current:
            assert current is client
    assert client.status == "running"
    assert module._current_client() is None


def test_address_is_connected_to_and_left_again(client: Any) -> None:
    address = client.scheduler.address
    with connected(address) as found:
        assert found is not client and set(found.nthreads()) == set(client.nthreads())
        assert da.ones(10, chunks=5).sum().compute() == 10.0
    assert found.status == "closed" and client.status == "running"
    with pytest.raises(InvalidInput, match="found a client that is closed; expected an open one"), connected(found):
        pass


@pytest.fixture(params=["refused", "silent"])
def nobody(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address where nothing listens, or where what listens says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def test_address_without_a_scheduler_is_named(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)
    message = f"found no scheduler at '{nobody}' within 0.5 s.*; expected the address that `dask scheduler` prints"
    with pytest.raises(InvalidInput, match=message), connected(nobody):
        pass


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("nonsense://here", "found no scheduler at 'nonsense://here' within"),
        (3, "found a int as scheduler; expected 'local', the address of a scheduler such as"),
        (object(), "found a object as scheduler; expected 'local'"),
    ],
)
def test_other_schedulers_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message), connected(scheduler):
        pass


def test_asynchronous_client_is_refused(client: Any) -> None:
    async def refused() -> None:
        async with distributed.Client(client.scheduler.address, asynchronous=True, set_as_default=False) as found:
            with pytest.raises(InvalidInput, match="found an asynchronous client; expected one"), connected(found):
                pass

    asyncio.run(refused())


def test_scheduler_without_workers_is_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKER_SECONDS", 0.2)
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as empty,
        distributed.Client(empty, set_as_default=False) as idle,
    ):
        message = "found no worker at the scheduler inproc://.* within 0.2 s, expected at least 1; start one with"
        with pytest.raises(InvalidInput, match=message), connected(idle):
            pass
    assert [record.message for record in caplog.records if record.name == module.__name__] == [
        f"the scheduler at {empty.scheduler_address} has no workers yet; waiting for the first"
    ]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InvalidInput, match=r'pip install "elbozoo\[scale\]"'), connected("local"):
        pass


SCRIPT = """
from elbozoo.inference.cluster import refuse_unguarded_script

def main():
    refuse_unguarded_script()

{line}
"""


@pytest.mark.parametrize("line", ["main()", "for _ in range(1):\n    main()"])
def test_script_that_would_run_in_every_process_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(line=line), encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"script\.py, line \d: found a call that starts processes in the body of"):
        runpy.run_path(str(path), run_name="__main__")
    guarded = SCRIPT.format(line='if __name__ == "__main__":\n    ' + line.replace("\n", "\n    "))
    path.write_text(guarded, encoding="utf-8")
    runpy.run_path(str(path), run_name="__main__")


LOCAL = """
if __name__ == "__main__":  # what is imported here is not imported by the workers
    from elbozoo.inference.cluster import connected

    with connected("local") as client:
        threads = client.nthreads().values()
        found = client.submit(pow, 2, 5).result()
    print(found, set(threads), client.status)
"""


def test_local_cluster_starts_and_ends_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(LOCAL, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "32 {1} closed\n", "")


# ---- workers that are lost: these come last, since a process that is started again takes seconds ---------------------


def test_rows_that_were_lost_are_sent_again(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = in_tensor(table(), client, Path())
    found = rows.total(summed, torch.add, 64)
    client.cancel(rows._sources[:5], force=True)
    assert torch.equal(rows.total(summed, torch.add, 64), found)
    client.cancel(rows._sources[3:], force=True)
    monkeypatch.setattr(rows, "_send_again", lambda: None)
    with pytest.raises(InvalidInput, match="found rows lost with their worker 4 times in one pass; expected workers"):
        rows.total(summed, torch.add, 64)


class KillsItsWorker(NamedTuple):
    """Asks the same, but ends the process that it runs in at one part, if there is no file at ``marker`` yet."""

    asked: Callable[[Part], Any]
    start: int
    marker: str

    def __call__(self, part: Part) -> Any:
        if part.start == self.start and not os.path.exists(self.marker):
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.asked(part)


class Attacked(Rows):
    """Rows that lose a worker in their third pass."""

    def __init__(self, rows: ClusterRows, marker: Path) -> None:
        super().__init__(rows.blocks, rows.names)
        self.rows, self.marker, self.passes = rows, marker, 0

    def total(self, of_part: Any, merge: Any, chunk: int) -> Any:
        self.passes += 1
        asked = KillsItsWorker(of_part, self.starts[3], str(self.marker)) if self.passes == 3 else of_part
        return self.rows.total(asked, merge, chunk)


def test_lost_worker_changes_nothing(client: Any, tmp_path: Path) -> None:
    """To the last bit, where half of the rows were sent and half were computed by the workers themselves."""
    x = table()
    options = {"components": 2, "covariance": "full"}
    array = da.from_array(x[ROWS // 2 :].numpy(), chunks=(200, COLUMNS))
    rows = ClusterRows([*Rows.in_memory(x[: ROWS // 2]).blocks, *dask_rows(array).blocks], [], client)
    undisturbed = fitted("gaussian-mixture", x, rows, **options)
    before = set(client.run(os.getpid).values())
    attacked = Attacked(rows, tmp_path / "marker")
    survived = fitted("gaussian-mixture", x, attacked, **options)
    assert attacked.marker.exists() and attacked.passes == ITERATIONS
    assert before - set(client.run(os.getpid).values()), "no worker was lost"
    assert apart(survived, undisturbed) == 0.0
    without = torch.cat([x[: rows.starts[3]], x[rows.starts[4] :]])
    assert apart(survived, fitted("gaussian-mixture", x, Rows.in_memory(without), **options)) > REORDERED


def test_block_that_ends_its_workers_is_given_up(client: Any, tmp_path: Path) -> None:
    """One loss is allowed here, where Dask allows three."""

    def allow(losses: int, dask_scheduler: Any = None) -> None:
        dask_scheduler.allowed_failures = losses

    client.run_on_scheduler(allow, 0)
    rows = collection_rows(da.from_array(table().numpy(), chunks=(500, COLUMNS)), None, client)
    assert rows.total(summed, torch.add, 64).isfinite().all()
    killer = KillsItsWorker(summed, 0, str(tmp_path / "marker"))
    with pytest.raises(InvalidInput, match=r"a task that lost its worker time after time, at last tcp://.*; expected"):
        rows.total(killer, torch.add, 64)
