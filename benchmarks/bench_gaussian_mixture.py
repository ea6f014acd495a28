"""An EM iteration of a Gaussian mixture beside scikit-learn's, from the same start, and the peak memory of both.

Neither stops early and neither adds to the covariances, so that after as many iterations both are at the same maximum
on their way. The start is given to both; what looks for one takes no part.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harness import Agreement, Contest, Job, Side, em_iterations, main, marginal, peak_memory

COLUMNS, COMPONENTS = 10, 10
ROWS = {"small": 100_000, "full": 1_000_000, "tiny": 2_000}
ITERATIONS = {"small": 3, "full": 2, "tiny": 4}
KINDS = {"full": ("full", 5.0), "diagonal": ("diag", 2.0)}  # scikit-learn's name, and the least ratio
LEAST_MEMORY = 2.0
AGREEMENT = Agreement(
    "log p(x) per datum after as many iterations from one start; sums of so many rows in another order", absolute=1e-6
)


class Work(NamedTuple):
    """Where the data and the start are, and how many iterations are made of them."""

    folder: str
    covariance: str
    iterations: int


def contests(size: str, device: str) -> list[Contest]:
    """Return time and memory of each kind of covariance."""
    measures = ("seconds",) if size == "tiny" else ("seconds", "MiB")  # what is tiny takes no memory
    return [_contest(kind, ROWS[size], ITERATIONS[size], measure) for kind in KINDS for measure in measures]


def _contest(covariance: str, rows: int, iterations: int, measure: str) -> Contest:
    # The folder goes when the last side is forgotten.
    def sides() -> tuple[Side, Side]:
        folder = tempfile.TemporaryDirectory()
        work = Work(folder.name, covariance, iterations)
        _prepare(work, rows)
        makers = (_ours, _by_scikit_learn)
        if measure == "MiB":
            ours, peer = (_holding(folder, peak_memory(_whole_fit, maker.__name__, work)) for maker in makers)
        else:
            ours, peer = (_holding(folder, marginal(maker(work), iterations)) for maker in makers)
        return ours, peer

    return Contest(
        name=f"{covariance}-{'memory' if measure == 'MiB' else 'time'}",
        peer="scikit-learn",
        packages=("scikit-learn",),
        sizes={
            "rows": rows,
            "columns": COLUMNS,
            "components": COMPONENTS,
            "covariance": covariance,
            "iterations": 2 * iterations,
        },
        target=LEAST_MEMORY if measure == "MiB" else KINDS[covariance][1],
        sides=sides,
        agreement=AGREEMENT,
        measure=measure,
        unit="fit" if measure == "MiB" else "EM iteration",
    )


def _holding(folder: Any, side: Side) -> Side:
    def held() -> Any:
        assert folder is not None
        return side()

    return held


def _prepare(work: Work, rows: int) -> None:
    """Draw the data from a mixture, and let the entry find a start on some of the rows; write both."""
    import numpy as np
    import torch

    from elbozoo.models import get_entry

    entry = get_entry("gaussian-mixture")
    options = {"components": COMPONENTS, "covariance": work.covariance}
    x, _ = entry.example(COLUMNS, seed=0, **options).simulate(rows, seed=1)
    start = entry.from_data(x[:1_000], **options)
    np.save(Path(work.folder) / "x.npy", x.numpy())
    torch.save(start.state_dict(), Path(work.folder) / "start.pt")


def _read(work: Work) -> tuple[Any, Any]:
    """Return the entry at the start, and the data."""
    import numpy as np
    import torch

    from elbozoo.models import get_entry

    entry = get_entry("gaussian-mixture").example(COLUMNS, components=COMPONENTS, covariance=work.covariance)
    entry.load_state_dict(torch.load(Path(work.folder) / "start.pt"))
    return entry, torch.from_numpy(np.load(Path(work.folder) / "x.npy"))


def _ours(work: Work) -> Callable[[int], float]:
    entry, x = _read(work)
    start = {name: value.clone() for name, value in entry.state_dict().items()}

    def run(iterations: int) -> float:
        entry.load_state_dict(start)
        return em_iterations(entry, x, iterations) / len(x)

    return run


def _by_scikit_learn(work: Work) -> Callable[[int], float]:
    import torch
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    entry, x = _read(work)
    with torch.no_grad():
        covariances = entry.covariances
        precisions = torch.linalg.inv(covariances)
        if work.covariance == "diagonal":
            precisions = precisions.diagonal(dim1=-2, dim2=-1)
        weights, means = entry.weights.numpy().copy(), entry.means.numpy().copy()
    data = x.numpy()

    def run(iterations: int) -> float:
        mixture = GaussianMixture(
            COMPONENTS,
            covariance_type=KINDS[work.covariance][0],
            weights_init=weights,
            means_init=means,
            precisions_init=precisions.numpy(),
            max_iter=iterations,
            tol=0.0,
            reg_covar=0.0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(data)
        assert mixture.n_iter_ == iterations
        return float(mixture.lower_bound_)

    return run


def _whole_fit(maker: str, work: Work) -> Callable[[], float]:
    """Return what is done in a process of its own, for its memory."""
    run = {each.__name__: each for each in (_ours, _by_scikit_learn)}[maker](work)
    return lambda: run(2 * work.iterations)


JOB = Job("gaussian-mixture", "EM of a Gaussian mixture", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
