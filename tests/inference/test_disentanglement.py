"""MIG, SAP and DCI: codes whose measures are known, tables counted by hand, and every threshold tried."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import elbozoo as ez
from elbozoo.inference.disentanglement import (
    Disentanglement,
    disentanglement,
    mutual_informations,
    predictabilities,
)
from elbozoo.models.contract.errors import InvalidInput

ROUNDING = 1e-12  # sums of some hundred float64 terms of size one
SIZES = (3, 4, 8)
GRID = np.array(list(itertools.product(*map(range, SIZES))) * 3, dtype=np.int64)  # 288 rows, factors independent
LARGEST_SAP = float(np.mean([1 - 1 / size for size in SIZES]))


def measured(codes: np.ndarray) -> Disentanglement:
    return disentanglement(codes, GRID, trees=50)


def noise(columns: int, rows: int = len(GRID), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns))


# ---- known truths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codes",
    [GRID, GRID[:, ::-1], np.array([-3.0, 1e-6, 1e6]) * GRID + 5.0],
    ids=["aligned", "permuted", "scaled"],
)
def test_codes_that_are_the_factors_have_every_measure_at_its_largest(codes: np.ndarray) -> None:
    """One-to-one bins of independent factors: 1, and 1 - 1/C for SAP, to rounding (1e-12)."""
    found = measured(codes)
    expected = {"mig": 1.0, "sap": LARGEST_SAP, "disentanglement": 1.0, "completeness": 1.0, "informativeness": 1.0}
    assert found.as_dict() == pytest.approx(expected, rel=0, abs=ROUNDING)
    # Negative control: a small share of another factor in one dimension is seen by the gap of information.
    mixed = codes + 0.2 * codes[:, [1, 0, 2]] * (np.ptp(codes, axis=0) / np.ptp(codes[:, [1, 0, 2]], axis=0))
    assert measured(mixed).mig < 1 - 1e-3


def test_a_monotone_scale_matters_to_the_bins_alone() -> None:
    """Thresholds and trees see the order of values; exp(7) leaves the five smallest of eight in the first bin."""
    codes = GRID.astype(float)
    codes[:, 2] = np.exp(codes[:, 2])
    found = measured(codes)
    assert found.sap == pytest.approx(LARGEST_SAP, rel=0, abs=ROUNDING)
    assert found.disentanglement == pytest.approx(1.0, rel=0, abs=ROUNDING)
    # exp(0), ..., exp(4) are below 1 + 1096 / 20, and the other three are in bins of their own.
    known = -(5 / 8 * math.log(5 / 8) + 3 / 8 * math.log(1 / 8))
    assert found.mig == pytest.approx((2 + known / math.log(8)) / 3, rel=0, abs=ROUNDING)
    assert found.mig < 0.9


def test_two_dimensions_with_the_same_factor_have_no_gap_and_are_not_complete() -> None:
    """Each holds one factor only, so that they are disentangled all the same."""
    found = measured(np.hstack([GRID, GRID]))
    assert found.mig == pytest.approx(0.0, abs=ROUNDING)
    assert found.sap == pytest.approx(0.0, abs=ROUNDING)
    assert found.disentanglement == pytest.approx(1.0, rel=0, abs=ROUNDING)
    # Were every importance shared in half, it would be 1 - log 2 / log 6; a forest shares it less evenly.
    assert 1 - math.log(2) / math.log(6) - ROUNDING <= found.completeness < 0.95
    assert measured(np.hstack([GRID, np.zeros_like(GRID)])).completeness > 0.95  # negative control: three dead ones


def test_one_dimension_with_all_factors_is_complete_and_not_disentangled() -> None:
    """A dimension that numbers the rows of the grid, and one that is constant."""
    factors = np.repeat(GRID, 5, axis=0)  # enough rows for leaves of one value each
    number = (factors * np.array([32, 8, 1])).sum(1, keepdims=True)
    found = disentanglement(np.hstack([number, np.zeros_like(number)]), factors, trees=50)
    assert found.completeness == pytest.approx(1.0, rel=0, abs=ROUNDING)
    assert found.disentanglement == pytest.approx(0.0, abs=ROUNDING)
    assert found.informativeness > 0.95


def test_rotated_codes_know_as_much_and_are_less_disentangled() -> None:
    """Turned by 45 degrees in each plane, in units of the factors' standard deviations."""
    standardised = (GRID - GRID.mean(0)) / GRID.std(0)
    c = s = math.sqrt(0.5)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    aligned, rotated = measured(standardised), measured(standardised @ turn)
    assert rotated.informativeness > 0.9
    for name in ("mig", "sap", "disentanglement", "completeness"):
        assert getattr(rotated, name) < getattr(aligned, name) - 0.25, name


def test_noise_says_nothing() -> None:
    """Five dimensions of noise beside 1440 rows: what is left is the bias of counting, for MIG within a stated bound.

    Information of B = 20 bins and C values is above zero by about a chi-square variable with (B - 1)(C - 1) degrees of
    freedom over 2N, and a gap is below the largest of them. With C = 8 the chance that one of five is
    above 220 / 2N is below 1e-4 (the mean is 133, the standard deviation 16).
    """
    factors = np.repeat(GRID, 5, axis=0)
    rows = len(factors)
    found = disentanglement(noise(5, rows), factors, trees=50)
    assert (found.information.to_numpy() <= 220 / (2 * rows)).all()
    assert 0 <= found.mig <= 220 / (2 * rows) / math.log(3)
    assert found.sap < 0.05 and found.disentanglement < 0.05 and found.completeness < 0.05
    # Accuracy of guesses among C values, five standard errors of a proportion (two-sided, 6e-7 each).
    for size, accuracy in zip(SIZES, found.accuracy, strict=True):
        chance = 1 / size
        assert abs(accuracy - chance) < 5 * math.sqrt(chance * (1 - chance) / rows)
    # Negative control: noise that is added to the factors leaves them readable.
    seen = disentanglement(np.hstack([factors + 0.3 * noise(3, rows), noise(2, rows)]), factors, trees=50)
    assert seen.mig > 0.2 and seen.sap > 0.2 and seen.disentanglement > 0.2 and seen.completeness > 0.2


# ---- other code for the same figures ---------------------------------------------------------------------------------


def test_information_is_that_of_a_table_counted_by_hand() -> None:
    """Six rows and two bins. The factor 0 0 0 1 1 2 meets the bins 0 0 1 1 1 0: log 2 and log 3 by hand."""
    level = np.array([0, 0, 0, 1, 1, 2])
    codes = np.array([[0.0, 0.1, 0.9, 1.0, 0.8, 0.2]]).T
    # Cells (bin, value): (0,0): 2, (0,2): 1, (1,0): 1, (1,1): 2; margins 3 and 3, 3, 2 and 1.
    by_hand = (2 * math.log(2 * 6 / 9) + math.log(6 / 3) + math.log(6 / 9) + 2 * math.log(2 * 6 / 6)) / 6
    assert mutual_informations(codes, level, bins=2)[0] == pytest.approx(by_hand, rel=0, abs=ROUNDING)
    assert mutual_informations(codes, level[::-1].copy(), bins=2)[0] != pytest.approx(by_hand, abs=1e-3)


def test_figures_from_their_definitions() -> None:
    """MIG and DCI of noisy codes from their tables, in plain loops over the papers' formulas."""
    found = measured(np.hstack([GRID + 0.4 * noise(3), noise(1)]))
    gaps = []
    for name in found.information.columns:
        ordered = sorted(found.information[name], reverse=True)
        gaps.append((ordered[0] - ordered[1]) / found.entropy[name])
    assert found.mig == pytest.approx(sum(gaps) / 3, rel=0, abs=ROUNDING)
    assert list(found.entropy) == pytest.approx([math.log(size) for size in SIZES], rel=0, abs=ROUNDING)
    table = found.importance.to_numpy()

    def score(of: np.ndarray) -> float:
        total = 0.0
        for row in of:
            shares = [value / sum(row) for value in row if value > 0]
            total += sum(row) / of.sum() * (1 + sum(p * math.log(p, len(row)) for p in shares))
        return total

    assert found.disentanglement == pytest.approx(score(table), rel=0, abs=ROUNDING)
    assert found.completeness == pytest.approx(score(table.T), rel=0, abs=ROUNDING)
    assert found.completeness != pytest.approx(score(table), abs=1e-3)  # negative control
    assert found.informativeness == pytest.approx(found.accuracy.mean(), rel=0, abs=ROUNDING)


def every_threshold(column: np.ndarray, level: np.ndarray) -> float:
    """Largest balanced accuracy over all sets of C - 1 thresholds and all values predicted between them."""
    classes = level.max() + 1
    middles = (np.unique(column)[1:] + np.unique(column)[:-1]) / 2
    best = 0.0
    for count in range(min(classes - 1, len(middles)) + 1):
        for thresholds in itertools.combinations(middles, count):
            interval = np.searchsorted(thresholds, column)
            for values in itertools.product(range(classes), repeat=count + 1):
                hits = np.array(values)[interval] == level
                best = max(best, np.mean([hits[level == value].mean() for value in range(classes)]))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_thresholds_are_the_best_there_are(seed: int) -> None:
    """Against every choice of thresholds and predictions, with ties among the codes (1e-12)."""
    generator = np.random.default_rng(seed)
    codes = np.round(generator.normal(size=(14, 2)), 0 if seed % 2 else 3)
    level = np.append(generator.integers(0, 3, 11), [0, 1, 2])
    found = predictabilities(codes, level)
    expected = [every_threshold(column, level) for column in codes.T]
    assert list(found) == pytest.approx(expected, rel=0, abs=ROUNDING)
    assert predictabilities(np.zeros((14, 2)), level)[0] == pytest.approx(1 / 3, rel=0, abs=ROUNDING)
    assert min(expected) > 1 / 3 + 0.05  # negative control: a constant is no help, the codes are


# ---- what may be brought ---------------------------------------------------------------------------------------------


def test_a_fit_is_compared_with_the_factors_of_its_data() -> None:
    """By data set, tensor and frame alike; other rows take their own factors; a loaded fit needs its rows."""
    data = ez.load_data("sprites")
    assert data.factors is not None
    fit = ez.fit("ppca", data, method="closed-form", latent_dim=3, progress=False)
    found = fit.disentanglement(data, trees=50)
    frame = pd.DataFrame(data.factors.numpy(), columns=list(data.factor_names)).astype(str)
    for factors in (data.factors, frame, data.factors.numpy().astype(float)):
        assert fit.disentanglement(factors, trees=50).as_dict() == found.as_dict()
    assert list(found.information.columns) == ["shape", "scale", "x", "y"]
    assert list(found.information.index) == ["z0", "z1", "z2"]
    assert repr(found).startswith("Disentanglement(mig=0.")
    rows = torch.arange(0, 768, 3)
    some = fit.disentanglement(data.factors[rows], data.x[rows], trees=50)
    assert some.as_dict() != found.as_dict()
    assert some.entropy["factor 2"] == pytest.approx(math.log(8), abs=1e-3)
    # The principal components of moving blobs are waves over places: they know much, mixed.
    assert found.informativeness > 0.4 > found.mig


@pytest.mark.parametrize(
    ("codes", "factors", "options", "message"),
    [
        (GRID[:, :1], GRID, {}, r"found codes of shape \(288, 1\), expected .* at least 2 dimensions.*; raise latent"),
        (GRID * math.nan, GRID, {}, "found NaN or infinity in the codes"),
        (GRID, GRID[:, 0], {}, r"found factors of shape \(288,\), expected \(rows, factors\) with at least 2 factors"),
        (GRID, GRID[1:], {}, "found 287 rows of factors for 288 rows of codes, expected as many; take the factors"),
        (GRID, GRID * [1, 0, 1], {}, "factor 'factor 1': found one value in all 288 rows, expected at least 2; leave"),
        (GRID, np.c_[GRID, noise(1)], {}, "factor 'factor 3': found 288 values in 288 rows, .*; bin it first"),
        (GRID, GRID, {"bins": 1}, "found bins=1, expected at least 2"),
        (GRID, GRID, {"trees": 9}, "found trees=9, expected at least 50: every row needs some that have not seen it"),
        (GRID, ez.load_data("iris"), {}, "iris: found no factors, expected a data set that carries them, such as spri"),
        (
            GRID,
            pd.DataFrame(GRID, columns=["a", "b", "c"]).replace({"b": {2: math.nan}}),
            {},
            "factor 'b': found a missing value in row 17, expected one in every row; leave that row out",
        ),
    ],
)
def test_bad_input_gets_one_line(codes: object, factors: object, options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        disentanglement(codes, factors, **options)
    assert "\n" not in str(caught.value)


def test_importance_of_nothing_learnt_is_nothing() -> None:
    """Constant codes have no importance anywhere: zero, and not the 0/0 of its definition."""
    found = measured(np.zeros((288, 2)))
    assert found.as_dict() == pytest.approx(
        {"mig": 0.0, "sap": 0.0, "disentanglement": 0.0, "completeness": 0.0, "informativeness": found.informativeness}
    )
    learnt = replace(found, importance=pd.DataFrame(np.eye(3)[:2]))
    assert learnt.disentanglement == pytest.approx(1.0, rel=0, abs=ROUNDING)  # negative control
