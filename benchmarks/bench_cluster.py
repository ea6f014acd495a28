"""EM of a Gaussian mixture on two workers of a Dask cluster beside the same on one, each of one thread.

The workers make the rows and keep them, the same blocks on both sides, so that their sums are equal to the last bit.
The scheduler and the loop of EM run beside the workers on the same machine: it needs two cores, and better three.
"""

from __future__ import annotations

import sys
import weakref
from contextlib import ExitStack
from typing import Any

from harness import Agreement, Contest, Job, Side, em_iterations, main, marginal

COLUMNS, COMPONENTS = 10, 10
ROWS = {"small": 200_000, "full": 1_000_000, "tiny": 2_000}
ITERATIONS = {"small": 10, "full": 5, "tiny": 4}
BLOCK = {"small": 12_500, "full": 62_500, "tiny": 500}
WORKERS = 2
TARGET = 1.7
AGREEMENT = Agreement("log p(x) per datum: the same sums of the same blocks", absolute=1e-12)


def contests(size: str, device: str) -> list[Contest]:
    """Return the only contest."""
    return [
        Contest(
            name=f"{WORKERS}-workers",
            peer="one worker",
            packages=("distributed", "dask"),
            sizes={"rows": ROWS[size], "columns": COLUMNS, "components": COMPONENTS, "covariance": "full"},
            target=TARGET,
            sides=lambda: (_side(size, WORKERS), _side(size, 1)),
            agreement=AGREEMENT,
            unit="EM iteration",
        )
    ]


def _side(size: str, workers: int) -> Side:
    import dask.array
    from distributed import Client, wait

    from elbozoo.inference.cluster import collection_rows
    from elbozoo.models import get_entry

    rows, block = ROWS[size], BLOCK[size]
    with ExitStack() as stack:
        client = stack.enter_context(Client(stack.enter_context(_cluster(size, workers)), set_as_default=False))
        # In noise without groups EM goes on for long.
        noise = dask.array.random.default_rng(0).normal(size=(rows, COLUMNS), chunks=(block, COLUMNS))
        with client.as_current():
            kept = client.persist(noise)
            wait(kept)
        data = collection_rows(kept, None, client)
        entry = get_entry("gaussian-mixture").from_data(
            next(data.parts(500)).x, components=COMPONENTS, covariance="full"
        )
        start = {name: value.clone() for name, value in entry.state_dict().items()}

        def run(count: int) -> float:
            entry.load_state_dict(start)
            return em_iterations(entry, data, count) / rows

        side = marginal(run, ITERATIONS[size])
        # The cluster ends when the side is forgotten.
        weakref.finalize(side, stack.pop_all().close)
    return side


def _cluster(size: str, workers: int) -> Any:
    """Return a cluster of processes, or of threads of this one where nothing is measured."""
    from distributed import LocalCluster

    from elbozoo.inference.cluster import local_cluster

    if size != "tiny":
        return local_cluster(workers)
    return LocalCluster(workers, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0")


JOB = Job("cluster", "EM on two workers of a cluster", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
