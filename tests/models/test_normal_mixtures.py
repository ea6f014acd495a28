"""The E step by matrix products against sums in extended precision, on data that make products of columns cancel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elbozoo.models import get_entry
from elbozoo.models.numerics import normal_mixtures

COVARIANCES = ["full", "tied", "diagonal", "spherical"]
ROWS, COLUMNS, COMPONENTS = 2000, 4, 3

# Relative to the size of each statistic. Measured errors are below 1e-10; what the extended precision leaves is 1e-17.
TOLERANCE = 1e-8


def hostile(kind: str) -> Tensor:
    """Three overlapping clusters of correlated columns, and what befalls them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    x[: ROWS // 3] += 4
    x[ROWS // 3 : ROWS // 2] *= 0.2
    if kind == "offset":
        x = 1e-3 * x + 1e6
    if kind == "narrow":  # a cluster tiny against the spread of the data
        x[: ROWS // 4] = 30 + 1e-6 * x[: ROWS // 4]
    if kind == "outlier":
        x[7] = 1e6
    if kind == "duplicates":
        x[: ROWS // 2] = x[0]
    if kind == "units":  # squares of the first column are below the least float
        x = x * torch.tensor([1e-150, 1e-8, 1.0, 1e100], dtype=torch.float64)
    if kind == "collinear":
        x[:, 1] = x[:, 0] + 1e-6 * x[:, 1]
    return x


KINDS = ["plain", "offset", "narrow", "outlier", "duplicates", "units", "collinear", "empty"]


def started(kind: str, covariance: str, iterations: int) -> tuple[Any, Tensor]:
    """A mixture after some iterations of EM on such data; ``empty`` moves one component away from all rows."""
    x = hostile(kind)
    entry = get_entry("gaussian-mixture").from_data(x, components=COMPONENTS, covariance=covariance, floor=1e-12)
    for _ in range(iterations):
        entry.maximize(entry.expected_statistics(x))  # type: ignore[attr-defined]
    if kind == "empty":
        with torch.no_grad():
            entry.means[1] += 1e3
    return entry, x


def extended(entry: Any, x: Tensor) -> list[np.ndarray]:
    """The statistics by NumPy's long double: residuals, forward substitution, sums of squares."""
    wide = np.longdouble
    data, weights = x.numpy().astype(wide), entry.weights.detach().numpy().astype(wide)
    means, scales = entry.means.detach().numpy().astype(wide), entry.scale.detach().numpy().astype(wide)
    log_joint = np.empty((len(data), len(weights)), wide)
    for k, mean in enumerate(means):
        scale, residual = scales[min(k, len(scales) - 1)], data - mean
        whitened = np.empty_like(residual)
        for i in range(COLUMNS):
            if scale.ndim == 1:
                whitened[:, i] = residual[:, i] / scale[i]
            else:
                whitened[:, i] = (residual[:, i] - whitened[:, :i] @ scale[i, :i]) / scale[i, i]
        diagonal = scale if scale.ndim == 1 else np.diag(scale)
        log_joint[:, k] = np.log(weights[k]) - 0.5 * (whitened**2).sum(1) - np.log(diagonal).sum()
    log_joint -= COLUMNS / 2 * np.log(2 * wide(np.pi))
    largest = log_joint.max(1, keepdims=True)
    log_evidence = largest + np.log(np.exp(log_joint - largest).sum(1, keepdims=True))
    probs = np.exp(log_joint - log_evidence)
    shift = np.stack([probs[:, k] @ (data - mean) for k, mean in enumerate(means)])
    if scales.ndim == 2:
        scatter = np.stack([probs[:, k] @ (data - mean) ** 2 for k, mean in enumerate(means)])
    else:
        scatter = np.stack([((data - mean).T * probs[:, k]) @ (data - mean) for k, mean in enumerate(means)])
    if entry.options.covariance == "tied":
        scatter = scatter.sum(0, keepdims=True)
    return [log_evidence.sum(), probs.sum(0), shift, scatter]


def errors(entry: Any, found: Any, x: Tensor) -> list[float]:
    """Relative errors: of counts to rows, of shifts to counts times deviations, of a scatter to its diagonal."""
    truth = extended(entry, x)
    squares = truth[3] if truth[3].ndim == 2 else np.diagonal(truth[3], axis1=1, axis2=2)
    deviation = np.sqrt(np.maximum(squares, 1e-300))
    if entry.options.covariance == "spherical":  # only its mean over columns counts
        deviation = np.broadcast_to(np.sqrt((deviation**2).sum(-1, keepdims=True)), deviation.shape)
    sizes = [abs(truth[0]), len(x), np.sqrt(truth[1])[:, None] * deviation, deviation**2]
    if truth[3].ndim == 3:
        sizes[3] = deviation[:, :, None] * deviation[:, None, :]
    difference = [np.abs(np.asarray(f.numpy(), np.longdouble) - t) for f, t in zip(found, truth, strict=True)]
    return [float(np.max(d / np.maximum(s, 1e-300))) for d, s in zip(difference, sizes, strict=True)]


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_equal_extended_precision(kind: str, covariance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-8, at the start and after ten iterations; weights off by one in a million do not pass."""
    monkeypatch.setattr(normal_mixtures, "FEW_ELEMENTS", 0)
    for iterations in (0, 10):
        entry, x = started(kind, covariance, iterations)
        found = entry.expected_statistics(x)
        assert max(errors(entry, found, x)) <= TOLERANCE
    with torch.no_grad():
        entry.weights = torch.softmax(entry.weights.log() + 1e-6 * torch.arange(COMPONENTS), 0)
        entry.means += 1e-6 * entry.unit
    assert max(errors(entry, found, x)) > TOLERANCE


@pytest.mark.parametrize(
    ("kind", "covariance"), [("narrow", "full"), ("narrow", "diagonal"), ("outlier", "diagonal"), ("collinear", "full")]
)
def test_products_alone_would_lose_what_the_direct_form_keeps(
    kind: str, covariance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the bound on cancellation: without it the same data fail the same tolerance."""
    monkeypatch.setattr(normal_mixtures, "FEW_ELEMENTS", 0)
    entry, x = started(kind, covariance, 10)
    monkeypatch.setattr(normal_mixtures, "MOST_CANCELLATION", float("inf"))
    assert max(errors(entry, entry.expected_statistics(x), x)) > TOLERANCE


def test_clusters_apart_need_no_direct_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is no looser than it must be: ten clusters 50 deviations apart in ten columns are all products."""
    generator = torch.Generator().manual_seed(1)
    means = 20 * torch.randn(10, 10, generator=generator, dtype=torch.float64)
    x = means.repeat(300, 1) + torch.randn(3000, 10, generator=generator, dtype=torch.float64)
    asked: list[int] = []
    taken = normal_mixtures._Pass.sums
    monkeypatch.setattr(
        normal_mixtures._Pass,
        "sums",
        lambda self, by_residuals: asked.append(int(by_residuals.sum())) or taken(self, by_residuals),
    )
    entry = get_entry("gaussian-mixture").from_data(x, components=10)
    entry.expected_statistics(x)  # type: ignore[attr-defined]
    assert asked == [0]
    entry.expected_statistics(torch.cat([x, x.new_full((1, 10), 1e9)]))  # type: ignore[attr-defined]
    assert asked != [0, 0]  # whichever component gets a row so far away has a covariance that products cannot hold


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("few", [0, 10**9])
def test_several_mixtures_in_one_pass_are_as_one_by_one(
    covariance: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-12 relative, what sums in another order leave; statistics of different starts differ by more."""
    monkeypatch.setattr(normal_mixtures, "FEW_ELEMENTS", few)
    x = hostile("plain")
    cls = get_entry("gaussian-mixture")
    entries = [cls.from_data(x, components=COMPONENTS, covariance=covariance, seed=seed) for seed in range(3)]
    for seed, entry in enumerate(entries):
        entry.initialize(x, restart=2 * seed + 1)
    together = cls.expected_statistics_together(entries, x)  # type: ignore[attr-defined]
    alone = [entry.expected_statistics(x) for entry in entries]  # type: ignore[attr-defined]

    def distance(one: Any, other: Any) -> float:
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))

    assert max(map(distance, together, alone)) <= 1e-12
    assert distance(together[0], alone[1]) > 1e-12


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation has made, in bytes; views do not count."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.bytes = x.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() != self.x:
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_memory_does_not_grow_with_the_rows(covariance: str) -> None:
    """Twice the rows take the same memory, 8 MiB at most; densities of all rows at once would not."""
    cls = get_entry("gaussian-mixture")
    x, _ = cls.example(10, seed=0, components=8).simulate(80_000, seed=1)
    entry = cls.from_data(x[:1000], components=8, covariance=covariance)
    largest = []
    for rows in (x[:40_000], x):
        with LargestTensor(x) as seen:
            entry.expected_statistics(rows)  # type: ignore[attr-defined]
        largest.append(seen.bytes)
    assert largest[0] == largest[1] <= 2**23
    with LargestTensor(x) as seen, torch.no_grad():
        entry.log_joint(x)  # type: ignore[operator]
    assert seen.bytes > 2**23
