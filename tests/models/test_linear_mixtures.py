"""The E step of Bernoulli and Poisson mixtures against sums in extended precision; several mixtures in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from torch import Tensor

from elbozoo.inference.em import EMOptions, run_em
from elbozoo.models import get_entry
from elbozoo.models.numerics import linear_mixtures

NAMES = ["bernoulli-mixture", "poisson-mixture"]
ROWS, COLUMNS, COMPONENTS = 1500, 5, 3

# Relative to the size of each statistic. Measured errors are below 1e-12; what the extended precision leaves is 1e-17,
# and SciPy's log of the factorial 1e-15.
TOLERANCE = 1e-8


def hostile(name: str, kind: str) -> tuple[Any, Tensor]:
    """Rows, what befalls them, and a mixture that has begun on them; ``empty`` leaves a component hardly any weight."""
    cls: Any = get_entry(name)
    x, _ = cls.example(COLUMNS, seed=0, components=COMPONENTS).simulate(ROWS, seed=1)
    is_count = name == "poisson-mixture"
    if kind == "scales":  # columns that are all but always 0, and all but always 1 or far up
        x[:, 0] = 0.0
        x[0, 0] = 1.0
        x[:, 1] = (1e9 * (1 + x[:, 1])).round() if is_count else 1.0
        x[0, 1] = 0.0
    if kind == "outlier":
        x[7] = 1e6 if is_count else 1 - x[7].round()
    if kind == "duplicates":
        x[: ROWS // 2] = x[0]
    entry = cls.from_data(x, components=COMPONENTS)
    if kind == "empty":
        with torch.no_grad():
            entry.weights = torch.tensor([0.5, 1e-300, 0.5], dtype=x.dtype)
    return entry, x


def extended(entry: Any, x: Tensor) -> list[np.ndarray]:
    """The statistics by NumPy's long double, from the definitions."""
    wide = np.longdouble
    data, weights = x.numpy().astype(wide), entry.weights.detach().numpy().astype(wide)
    if entry.name() == "bernoulli-mixture":
        probs = entry.probs.detach().numpy().astype(wide)
        log_density = np.stack([np.log(np.where(data == 1, p, 1 - p)).sum(1) for p in probs], 1)
    else:
        rates, factorial = entry.rates.detach().numpy().astype(wide), gammaln(x.numpy() + 1)
        log_density = np.stack([(data * np.log(rate) - rate - factorial).sum(1) for rate in rates], 1)
    log_joint = np.log(weights) + log_density
    largest = log_joint.max(1, keepdims=True)
    log_evidence = largest + np.log(np.exp(log_joint - largest).sum(1, keepdims=True))
    responsibilities = np.exp(log_joint - log_evidence)
    return [log_evidence.sum(), responsibilities.sum(0), responsibilities.T @ data]


def error(found: Any, truth: list[np.ndarray]) -> float:
    """Largest error, relative to the evidence, to the rows, and to the sum of each column over all rows."""
    sizes = [abs(truth[0]), ROWS, np.maximum(truth[2].sum(0), 1.0)]
    return max(
        float(np.max(np.abs(f.numpy().astype(np.longdouble) - t) / size))
        for f, t, size in zip(found, truth, sizes, strict=True)
    )


@pytest.mark.parametrize("kind", ["plain", "scales", "outlier", "duplicates", "empty"])
@pytest.mark.parametrize("name", NAMES)
def test_statistics_equal_extended_precision(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-8, in one chunk and in many; weights off by one in a million do not pass."""
    entry, x = hostile(name, kind)
    truth = extended(entry, x)
    for elements in (linear_mixtures.CHUNK_ELEMENTS, 1):
        monkeypatch.setattr(linear_mixtures, "CHUNK_ELEMENTS", elements)
        assert error(entry.expected_statistics(x), truth) <= TOLERANCE
    with torch.no_grad():
        entry.weights = torch.softmax(entry.weights.log() + 1e-6 * torch.arange(COMPONENTS), 0)
        factor = 1 + 1e-6 * torch.arange(COMPONENTS)[:, None]
        if name == "bernoulli-mixture":
            entry.probs = (entry.probs * factor).clamp(max=1 - 1e-6)
        else:
            entry.log_excess.add_(factor.log())
    assert error(entry.expected_statistics(x), truth) > TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_several_mixtures_in_one_pass_are_as_one_by_one(name: str) -> None:
    """To 1e-12 relative, what sums in another order leave; statistics of different starts differ by more."""
    _, x = hostile(name, "plain")
    cls: Any = get_entry(name)
    entries = [cls.from_data(x, components=COMPONENTS) for _ in range(3)]
    for seed, entry in enumerate(entries):
        torch.manual_seed(seed)
        entry.initialize(x, restart=2 * seed + 1)
    together = cls.expected_statistics_together(entries, x)
    alone = [entry.expected_statistics(x) for entry in entries]

    def distance(one: Any, other: Any) -> float:
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))

    assert max(map(distance, together, alone)) <= 1e-12
    assert distance(together[0], alone[1]) > 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_restarts_share_the_passes_over_the_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four starts take as many passes as the longest of them, and not the sum."""
    _, x = hostile(name, "plain")
    cls: Any = get_entry(name)
    sizes: list[int] = []
    taken = linear_mixtures.expected_statistics
    monkeypatch.setattr(
        linear_mixtures,
        "expected_statistics",
        lambda rows, slopes, constants: sizes.append(len(slopes)) or taken(rows, slopes, constants),
    )
    entry = cls.from_data(x, components=COMPONENTS)
    run_em(entry, x, EMOptions(restarts=4, iterations=5, tolerance=1e-300), seed=0, progress=False)
    assert sizes[0] == 4 and sum(sizes) <= 4 * 5
    assert len(sizes) == 5
