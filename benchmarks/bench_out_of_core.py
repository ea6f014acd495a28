"""An EM iteration of a Gaussian mixture on rows that stay in a file beside the same on rows in memory, and peak memory.

Both sides are ours and run the same code on the same rows in the same chunks; one holds them, and the other reads them
anew at each iteration, from a NPY file or from a Parquet file with a million rows in a row group. The files were just
written, so that they come from the system's cache and not from a disk. Memory is that which the fit adds to a process
that has imported everything; the size of the whole process is noted beside it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness import Agreement, Contest, Job, Outcome, Side, em_iterations, main, marginal, peak_memory

COLUMNS, COMPONENTS = 20, 10
ROWS = {"small": 1_000_000, "full": 10_000_000, "tiny": 4_000}
ITERATIONS = {"small": 1, "full": 1, "tiny": 4}
ROWS_AT_ONCE = 2**18  # that are drawn and written
ROWS_OF_GROUP = 2**20
FORMATS = ("npy", "parquet")
LEAST_SPEED, LEAST_MEMORY = 1 / 1.3, 5.0
WHOLE = "whole_process_mib"
AGREEMENT = Agreement("log p(x) per datum after as many iterations from one start; rounding of sums", absolute=1e-9)


class Work(NamedTuple):
    """Where the data and the start are, in which format they are streamed, and how many iterations are made of them."""

    folder: str
    format: str
    iterations: int

    def path(self, name: str) -> Path:
        """Return the path of one of the files."""
        return Path(self.folder) / name


def contests(size: str, device: str) -> list[Contest]:
    """Return time and memory for each format."""
    measures = ("seconds",) if size == "tiny" else ("seconds", "MiB")  # what is tiny takes no memory
    return [_contest(format, ROWS[size], ITERATIONS[size], measure) for format in FORMATS for measure in measures]


def _contest(format: str, rows: int, iterations: int, measure: str) -> Contest:
    # The folder goes when the last side is forgotten.
    def sides() -> tuple[Side, Side]:
        folder = tempfile.TemporaryDirectory()
        work = Work(folder.name, format, iterations)
        _prepare(work, rows)
        makers = (_streamed, _in_memory)
        if measure == "MiB":
            ours, peer = (_holding(folder, _memory(work, maker.__name__)) for maker in makers)
        else:
            ours, peer = (_holding(folder, marginal(_fit(work, maker(work)), iterations)) for maker in makers)
        return ours, peer

    return Contest(
        name=f"{format}-{'memory' if measure == 'MiB' else 'time'}",
        peer="ours in memory",
        packages=("elbozoo", "pyarrow"),
        sizes={"rows": rows, "columns": COLUMNS, "components": COMPONENTS, "iterations": 2 * iterations},
        target=LEAST_MEMORY if measure == "MiB" else LEAST_SPEED,
        sides=sides,
        agreement=AGREEMENT,
        measure=measure,
        unit="fit" if measure == "MiB" else "EM iteration",
    )


def _holding(folder: Any, side: Side) -> Side:
    def held() -> Outcome:
        assert folder is not None
        return side()

    return held


# ---- the data --------------------------------------------------------------------------------------------------------


def _prepare(work: Work, rows: int) -> None:
    """Draw the data from a mixture, and let the entry find a start on some of the rows; write both."""
    import torch

    from elbozoo.models import get_entry

    options = {"components": COMPONENTS}
    drawn = get_entry("gaussian-mixture").example(COLUMNS, seed=0, **options)
    _write(work, rows, lambda count, seed: drawn.simulate(count, seed=seed)[0])
    some, _ = drawn.simulate(2_000, seed=0)
    torch.save(get_entry("gaussian-mixture").from_data(some, **options).state_dict(), work.path("start.pt"))


def _write(work: Work, rows: int, draw: Callable[[int, int], Any]) -> None:
    """Write the rows as NPY, which both sides of one format need, and as Parquet where that is asked for."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    array = np.lib.format.open_memmap(work.path("x.npy"), "w+", np.float64, (rows, COLUMNS))
    for seed, start in enumerate(range(0, rows, ROWS_AT_ONCE)):
        stop = min(start + ROWS_AT_ONCE, rows)
        array[start:stop] = draw(stop - start, seed + 1).numpy()
    if work.format == "parquet":
        names = [f"x{column}" for column in range(COLUMNS)]
        with parquet.ParquetWriter(work.path("x.parquet"), pa.schema([(name, pa.float64()) for name in names])) as file:
            for start in range(0, rows, ROWS_OF_GROUP):
                some = array[start : start + ROWS_OF_GROUP]
                file.write_table(pa.table({name: some[:, column] for column, name in enumerate(names)}))


# ---- the sides -------------------------------------------------------------------------------------------------------


def _streamed(work: Work) -> Any:
    """Return the rows, which stay in the file."""
    from elbozoo.stored import stored_rows

    return stored_rows(work.path(f"x.{work.format}"))


def _in_memory(work: Work) -> Any:
    """Return the rows, read from the NPY file whatever the format is: nothing reads them with less memory."""
    import numpy as np
    import torch

    return torch.from_numpy(np.load(work.path("x.npy")))


def _entry(work: Work) -> Any:
    """Return the entry at the start."""
    import torch

    from elbozoo.models import get_entry

    entry = get_entry("gaussian-mixture").example(COLUMNS, components=COMPONENTS)
    entry.load_state_dict(torch.load(work.path("start.pt")))
    return entry


def _fit(work: Work, rows: Any) -> Callable[[int], float]:
    entry = _entry(work)
    start = {name: value.clone() for name, value in entry.state_dict().items()}

    def run(iterations: int) -> float:
        entry.load_state_dict(start)
        return em_iterations(entry, rows, iterations) / len(rows)

    return run


def _memory(work: Work, maker: str) -> Side:
    """Return a side that fits in a process of its own, whose whole size it notes."""
    measured = peak_memory(_whole_fit, maker, work)

    def side() -> Outcome:
        outcome = measured()
        return outcome._replace(notes={WHOLE: float(work.path(WHOLE).read_text(encoding="ascii"))})

    return side


def _whole_fit(maker: str, work: Work) -> Callable[[], float]:
    """Import what a fit needs, and return what counts: to open or read the rows, and to fit to them."""
    import elbozoo.inference.em
    import elbozoo.stored  # noqa: F401

    rows_of = {each.__name__: each for each in (_streamed, _in_memory)}[maker]
    _entry(work)

    def whole() -> float:
        reached = _fit(work, rows_of(work))(2 * work.iterations)
        work.path(WHOLE).write_text(str(next(_peaks(), float("nan"))), encoding="ascii")
        return reached

    return whole


def _peaks() -> Iterator[float]:
    """Yield the largest size of this process so far, MiB, where the system tells it."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    yield from (int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))


JOB = Job("out-of-core", "EM on rows that stay in their files", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
