"""The few rows that stand for all: moments in extended precision, ranks, merges; EM from them as from the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elbozoo.inference.em import EMOptions, run_em
from elbozoo.models import get_entry
from elbozoo.models.numerics import second_moments as module
from elbozoo.models.numerics.second_moments import SecondMoments, means_and_deviations, second_moments

COLUMNS = 6


def hostile(kind: str, rows: int = 3000) -> Tensor:
    """Rows of two factors and noise, and what befalls them."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    loading = torch.randn(2, COLUMNS, generator=generator, dtype=torch.float64)
    x = z @ loading + 0.5 * torch.randn(rows, COLUMNS, generator=generator, dtype=torch.float64)
    if kind == "offset":
        x = 1e-3 * x + 1e6
    if kind == "units":
        x = x * torch.tensor([1e-100, 1e-8, 1.0, 1.0, 1e8, 1e100], dtype=torch.float64)
    if kind == "outlier":
        x[7] = 1e3  # from 1e4 on, EM from the rows themselves depends on their chunks by more than 1e-8
    if kind == "duplicates":
        x[: rows // 2] = x[0]
    if kind == "sorted":
        x = x[x[:, 0].argsort()]
    if kind == "collinear":
        x[:, 1] = x[:, 0] + 1e-7 * x[:, 1]
    if kind == "heywood":  # a column that is a factor itself
        x[:, 0] = z[:, 0]
    return x


KINDS = ["plain", "offset", "units", "outlier", "duplicates", "sorted", "collinear", "heywood"]


def centred_in_extended_precision(x: Tensor) -> np.ndarray:
    data = x.numpy().astype(np.longdouble)
    return data - data.mean(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 3])
def test_moments_equal_extended_precision(kind: str, parts: int) -> None:
    """Means to 1e-9 standard deviations, scatters to 1e-9 of them, whole and merged; a lost row shows."""
    x = hostile(kind)
    pieces = [second_moments(part) for part in x.chunk(parts)]
    found = pieces[-1]
    for piece in pieces[:-1]:
        found = found.merge(piece)
    centred = centred_in_extended_precision(x)
    scatter, deviation = centred.T @ centred, np.sqrt((centred**2).mean(0))
    assert float(found.rows) == len(x) and len(found.factor) <= COLUMNS + 1

    def distance(moments: SecondMoments) -> float:
        rows = moments.centred().numpy().astype(np.longdouble)
        size = len(x) * deviation[:, None] * deviation
        mean = x.numpy().astype(np.longdouble).mean(0)
        # A mean is rounded to a float: at an offset of 1e6 by 1e-10, which is 1e-7 deviations of 1e-3.
        allowed = deviation + 1e9 * np.spacing(np.abs(mean).astype(float))
        off = np.abs(moments.mean().numpy() - mean) / allowed
        return float(max(np.abs((rows.T @ rows - scatter) / size).max(), off.max()))

    assert distance(found) <= 1e-9
    assert distance(second_moments(x[1:])) > 1e-9 or kind in ("duplicates", "outlier")


def test_a_column_that_others_determine_keeps_its_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least singular value to 1e-6 relative, by QR; by products of columns it would be lost."""
    x = hostile("collinear")
    truth = np.linalg.svd(centred_in_extended_precision(x).astype(float), compute_uv=False)[-1]
    least = float(torch.linalg.svdvals(second_moments(x).centred())[-1])
    assert abs(least / truth - 1) <= 1e-6
    monkeypatch.setattr(module, "MOST_INFLATION", float("inf"))
    least = float(torch.linalg.svdvals(second_moments(x).centred())[-1])
    assert abs(least / truth - 1) > 1e-6


@pytest.mark.parametrize("rows", [3, 6, 7, 8, 40])
@pytest.mark.parametrize("of_correlations", [False, True])
def test_rank_is_that_of_rows_less_their_mean(rows: int, of_correlations: bool) -> None:
    """One less than the rows where they are few; also where a rounded mean looks like a rank."""
    for kind, columns in (("plain", COLUMNS), ("offset", COLUMNS), ("twice", COLUMNS - 1)):
        x = hostile("offset" if kind == "offset" else "plain")[:rows].clone()
        if kind == "twice":
            x[:, 2] = x[:, 0] + x[:, 1]
        assert second_moments(x).rank(of_correlations) == min(rows - 1, columns)
    x[:, 2] += 1e-6 * torch.randn(rows, dtype=torch.float64)
    assert second_moments(x).rank(of_correlations) == min(rows - 1, COLUMNS)


class _Plain:
    """An entry that is asked for a summary and says that it does not pay."""

    def summary_pays(self, rows: int) -> bool:
        return False


def histories(name: str, x: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[np.ndarray]:
    """Log-likelihoods of EM from the summary, in chunks, and row by row; and again from a start a little off."""
    cls: Any = get_entry(name)
    start = cls.from_data(x, latent_dim=2, **options)
    settings = EMOptions(iterations=60, tolerance=1e-12, chunk=700)

    def climb() -> np.ndarray:
        entry = cls.from_data(x, latent_dim=2, **options)
        entry.load_state_dict(state)
        return run_em(entry, x, settings, seed=0, progress=False).trajectory.frame()["log_evidence"].to_numpy()

    state = {key: value.clone() for key, value in start.state_dict().items()}
    found = [climb()]
    monkeypatch.setattr(cls, "summary_pays", _Plain.summary_pays)
    found.append(climb())
    state["loading"] = state["loading"] * 1.001
    return [*found, climb()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["factor-analysis", "ppca"])
def test_em_from_the_moments_is_em_from_the_rows(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every log-likelihood on the way to 1e-8 relative; a start that is off by a thousandth is told apart."""
    x = hostile(kind)
    if name == "ppca" and kind in ("units", "outlier"):
        x = (x - x.mean(0)) / x.std(0)  # columns of one size, as PPCA needs them
    short, plain, moved = histories(name, x, monkeypatch)
    steps = min(len(short), len(plain))
    assert abs(len(short) - len(plain)) <= 1  # rounding may end one a step before the other
    size = np.maximum(np.abs(plain[:steps]), len(x))
    assert (np.abs(short[:steps] - plain[:steps]) <= 1e-8 * size).all()
    assert abs(moved[0] - plain[0]) > 1e-8 * size[0]


@pytest.mark.parametrize("name", ["factor-analysis", "ppca"])
def test_rows_are_passed_over_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many iterations; and where rows are few or columns many the E step takes the rows themselves."""
    cls: Any = get_entry(name)
    seen: list[str] = []
    for method in ("summarize", "expected_statistics"):
        inner = getattr(cls, method)
        monkeypatch.setattr(
            cls, method, lambda self, x, inner=inner, method=method: seen.append(method) or inner(self, x)
        )
    x = hostile("plain")
    for rows, expected in ((x, {"summarize"}), (x[:10], {"expected_statistics"})):
        seen.clear()
        run_em(cls.from_data(rows, latent_dim=2), rows, EMOptions(iterations=5), seed=0, progress=False)
        assert set(seen) == expected
        assert len(seen) == (1 if rows is x else 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["factor-analysis", "ppca"])
def test_statistics_from_the_moments_are_those_of_the_rows(name: str, kind: str) -> None:
    """Sums and evidence to 1e-8 of the largest of each, in the columns' units; a row less is another figure."""
    if name == "ppca" and kind == "units":
        return  # one noise for columns of 1e-100 and 1e100
    x = hostile(kind)
    entry: Any = get_entry(name).from_data(x, latent_dim=2)
    deviation = means_and_deviations(x)[1]

    def distance(found: Any, truth: Any) -> float:
        units = [1.0, 1.0, deviation.square(), deviation[:, None], 1.0]
        pairs = [(f / u, t / u) for f, t, u in zip(found, truth, units, strict=True)]
        return max(float((f - t).abs().max() / t.abs().max()) for f, t in pairs)

    with torch.no_grad():
        truth = entry.expected_statistics(x)
        merged = entry.summarize(x[:1000]).merge(entry.summarize(x[1000:]))
        for summary in (entry.summarize(x), merged):
            assert distance(entry.expected_statistics_from(summary), truth) <= 1e-8
        assert distance(entry.expected_statistics_from(entry.summarize(x[1:])), truth) > 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_means_and_deviations_equal_extended_precision(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deviations to 1e-9 relative, in chunks of any size; those over N - 1 do not pass."""
    x = hostile(kind)
    centred = centred_in_extended_precision(x)
    truth = np.sqrt((centred**2).mean(0))
    for elements in (module.CHUNK_ELEMENTS, 100):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        mean, deviation = means_and_deviations(x)
        assert torch.equal(mean, x.mean(0))
        assert float(np.abs(deviation.numpy() / truth - 1).max()) <= 1e-9
        assert float(np.abs(x.std(0).numpy() / truth - 1).max()) > 1e-9


def test_closed_form_at_an_offset_is_that_of_the_plain_data() -> None:
    """At offset 1e6 and scale 1e-3 the noise is to 1e-6 relative the plain one times 1e-3; raw moments would not be."""
    x = hostile("plain")
    moved = 1e-3 * x + 1e6
    noises = []
    for rows in (x, moved):
        entry: Any = get_entry("ppca").from_data(rows, latent_dim=2)
        entry.fit_exact(rows)
        noises.append(float(entry.noise_scale.detach()))
    assert abs(1e3 * noises[1] / noises[0] - 1) <= 1e-6
    raw = (moved.mT @ moved) / len(moved) - moved.mean(0)[:, None] * moved.mean(0)
    assert abs(1e6 * float(torch.linalg.eigvalsh(raw)[:-2].mean()) / noises[0] ** 2 - 1) > 1e-6
