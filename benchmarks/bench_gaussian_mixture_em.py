"""Ten EM iterations of a Gaussian mixture with full covariances: ours beside scikit-learn, from the same start."""

from __future__ import annotations

import warnings

import torch
from harness import alternate, record
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from elbozoo.inference.em import expected_statistics
from elbozoo.models import get_entry

ROWS, COLUMNS, COMPONENTS, ITERATIONS = 20_000, 10, 5, 10
ENTRY = get_entry("gaussian-mixture")
X, _ = ENTRY.example(COLUMNS, seed=0, components=COMPONENTS).simulate(ROWS, seed=1)
START = ENTRY.from_data(X, components=COMPONENTS).state_dict()


def ours() -> float:
    """Return log p(x) per datum after the last iteration."""
    entry = ENTRY.example(COLUMNS, components=COMPONENTS)
    entry.load_state_dict(START)
    with torch.no_grad():
        for _ in range(ITERATIONS):
            entry.maximize(expected_statistics(entry, X, 65_536))
        return float(entry.log_evidence(X).mean())


def by_scikit_learn() -> float:
    """Return log p(x) per datum after the last iteration."""
    start = ENTRY.example(COLUMNS, components=COMPONENTS)
    start.load_state_dict(START)
    with torch.no_grad():
        mixture = GaussianMixture(
            COMPONENTS,
            weights_init=start.weights.numpy(),
            means_init=start.means.numpy(),
            precisions_init=torch.linalg.inv(start.covariances).numpy(),
            max_iter=ITERATIONS,
            tol=0.0,
            reg_covar=0.0,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(mixture.fit(X.numpy()).score(X.numpy()))


if __name__ == "__main__":
    outcome = alternate(ours, by_scikit_learn)
    assert abs(outcome["reached"]["ours"] - outcome["reached"]["peer"]) <= 1e-6
    sizes = {"rows": ROWS, "columns": COLUMNS, "components": COMPONENTS, "iterations": ITERATIONS}
    record("gaussian_mixture_em", "scikit-learn", sizes, outcome)
