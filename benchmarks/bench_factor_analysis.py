"""EM of factor analysis beside scikit-learn's ``FactorAnalysis``, and the closed form of PPCA beside its ``PCA``.

Whole fits are timed, from the data to the parameters, starting values included; what checks the data is not. An
iteration of scikit-learn's maximises the loading exactly, which gains more than an iteration of EM: ours, which is EM
accelerated by SQUAREM, makes at least as many, and as many more as it takes to come as high. What SQUAREM gains is
measured beside EM without it, both from one start to a maximum.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from harness import Agreement, Contest, Job, Outcome, Side, main, whole

SHAPES = {"small": (20_000, 100, 10), "full": (100_000, 100, 10), "tiny": (500, 8, 2)}  # rows, columns, latent_dim
ITERATIONS = 20
SLACK = 1e-4  # nats per datum
MOST_ITERATIONS = 20_000
EM_TARGET, PCA_TARGET = 50.0, 1.0
EM_AGREEMENT = Agreement(
    "log p(x) per datum; EM goes on until it is no more than this below the peer's", absolute=SLACK, one_sided=True
)
PCA_AGREEMENT = Agreement("log p(x) per datum at a global maximum, which is found in closed form", absolute=1e-6)


def contests(size: str, device: str) -> list[Contest]:
    """Return both ways of scikit-learn's factor analysis, PCA, and what SQUAREM gains over EM as it is."""
    shape = SHAPES[size]
    peers = [_factor_analysis(method, shape) for method in ("randomized", "lapack")]
    return [*peers, _pca(shape), _acceleration(shape)]


def _sizes(shape: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("rows", "columns", "latent_dim"), shape, strict=True))


def _factor_analysis(method: str, shape: tuple[int, int, int]) -> Contest:
    def sides() -> tuple[Side, Side]:
        peer, goal = by_factor_analysis(method, shape)
        return by_em(shape, goal), peer

    return Contest(
        name=f"em-{method}",
        peer=f"scikit-learn FactorAnalysis, {method}",
        packages=("scikit-learn",),
        sizes={**_sizes(shape), "iterations": ITERATIONS},
        target=EM_TARGET,
        sides=sides,
        agreement=EM_AGREEMENT,
        unit="fit",
    )


def _pca(shape: tuple[int, int, int]) -> Contest:
    return Contest(
        name="closed-form",
        peer="scikit-learn PCA",
        packages=("scikit-learn",),
        sizes=_sizes(shape),
        target=PCA_TARGET,
        sides=lambda: (by_closed_form(shape), by_pca(shape)),
        agreement=PCA_AGREEMENT,
        unit="fit",
    )


def _acceleration(shape: tuple[int, int, int]) -> Contest:
    def sides() -> tuple[Side, Side]:
        goal = _maximum(shape)
        return by_em(shape, goal), by_em(shape, goal, acceleration="none")

    return Contest(
        name="squarem",
        peer="itself without acceleration",
        packages=("elbozoo",),
        sizes=_sizes(shape),
        target=None,
        sides=sides,
        agreement=Agreement("log p(x) per datum; each goes on until it is no more than this below a maximum", SLACK),
        unit="fit",
    )


@cache
def _data(shape: tuple[int, int, int]) -> Any:
    from elbozoo.models import get_entry

    rows, columns, latent_dim = shape
    x, _ = get_entry("factor-analysis").example(columns, seed=0, latent_dim=latent_dim).simulate(rows, seed=1)
    return x


def by_em(shape: tuple[int, int, int], goal: float, acceleration: str = "squarem") -> Side:
    """Return our side: EM from the entry's own start, by so many iterations that it reaches ``goal``."""
    x = _data(shape)
    climb = _climb(shape, acceleration)
    needed = _needed(lambda iterations: [row[2] / len(x) for row in climb(iterations).trajectory.rows], goal)

    def side() -> Outcome:
        outcome = whole(lambda: climb(needed).trajectory.rows[-1][2] / len(x))()
        return outcome._replace(notes={"iterations": needed})

    return side


def _climb(shape: tuple[int, int, int], acceleration: str) -> Callable[..., Any]:
    """Return what runs EM from the entry's own start."""
    from elbozoo.inference.em import EMOptions, run_em
    from elbozoo.models import get_entry
    from elbozoo.models.contract.isolation import isolated

    x = _data(shape)
    entry = get_entry("factor-analysis").from_data(x, latent_dim=shape[2])

    def climb(iterations: int, tolerance: float = 1e-300) -> Any:
        with isolated(0):
            entry.initialize(x)
        options = EMOptions(restarts=1, iterations=iterations, tolerance=tolerance, acceleration=acceleration)
        return run_em(entry, x, options, seed=0, progress=False)

    return climb


def _maximum(shape: tuple[int, int, int]) -> float:
    """Log p(x) per datum where EM has converged."""
    return float(_climb(shape, "squarem")(MOST_ITERATIONS, tolerance=1e-7).log_evidence) / shape[0]


def _needed(fit: Callable[[int], list[float]], goal: float) -> int:
    """Return the number of iterations after which a fit is as high as ``goal``, and at least the peer's."""
    most = ITERATIONS
    while max(path := fit(most)) < goal - SLACK / 2:  # the last one may be a trial that fails
        if most > MOST_ITERATIONS:
            raise RuntimeError(f"EM is at {path[-1]} after {most} iterations, and the peer at {goal}")
        most *= 2
    first = next(i for i, value in enumerate(path, 1) if value >= goal - SLACK / 2)
    return max(ITERATIONS, first)


def by_factor_analysis(method: str, shape: tuple[int, int, int]) -> tuple[Side, float]:
    """Return scikit-learn's side, and log p(x) per datum that it reaches."""
    from sklearn.decomposition import FactorAnalysis
    from sklearn.exceptions import ConvergenceWarning

    data = _data(shape).numpy()
    found: dict[str, Any] = {}

    def fit() -> float:
        model = FactorAnalysis(shape[2], svd_method=method, max_iter=ITERATIONS, tol=0.0, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found["model"] = model.fit(data)
        return found.setdefault("score", 0.0)

    fit()
    found["score"] = float(found["model"].score(data))  # not a part of the work
    return whole(fit), found["score"]


def by_closed_form(shape: tuple[int, int, int]) -> Side:
    """Return our side: the global maximum of PPCA's likelihood."""
    from elbozoo.models import get_entry

    x = _data(shape)
    entry = get_entry("ppca").from_data(x, latent_dim=shape[2])

    def fit() -> Outcome:
        outcome = whole(lambda: entry.fit_exact(x) or 0.0)()  # type: ignore[func-returns-value]
        return outcome._replace(reached=float(entry.log_evidence(x).detach().mean()))

    return fit


def by_pca(shape: tuple[int, int, int]) -> Side:
    """Return scikit-learn's side, whose solver is its own choice; its score is that of PPCA (Tipping & Bishop 1999)."""
    from sklearn.decomposition import PCA

    data = _data(shape).numpy()

    def fit() -> Outcome:
        model = PCA(shape[2])
        outcome = whole(lambda: float(model.fit(data).n_components_))()
        return outcome._replace(reached=_score(model, data))

    return fit


def _score(model: Any, data: Any) -> float:
    """Log p(x) per datum of the fitted PCA, with variances over N as the maximum of the likelihood has them."""
    model.explained_variance_ *= (len(data) - 1) / len(data)
    model.noise_variance_ *= (len(data) - 1) / len(data)
    return float(model.score(data))


JOB = Job("factor-analysis", "EM of factor analysis, and PPCA in closed form", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
