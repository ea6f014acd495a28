"""Guides of global latents start at the mode with its curvature, where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import elbozoo as ez
from elbozoo.guides import GuideOptions, build_guide
from elbozoo.guides.autoguides import find_mode, starting_point
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.isolation import isolated

KNOWN = {"noise": "known", "noise_scale": 0.5}


def houses() -> Tensor:
    """Columns in the hundreds that are nearly collinear, and a target."""
    torch.manual_seed(1)
    area = 100 + 20 * torch.randn(60, dtype=torch.float64)
    rooms = 0.05 * area + 0.1 * torch.randn(60, dtype=torch.float64)
    return torch.stack([area, rooms, 3 * area - rooms + 0.5 * torch.randn(60, dtype=torch.float64)], -1)


def test_the_mode_of_a_normal_posterior_is_its_mean_and_the_curvature_its_precision() -> None:
    """Relative 1e-6 of a posterior standard deviation, and of the precision; another row moves both."""
    entry = get_entry("linear-regression").from_data(houses(), **KNOWN)
    with isolated(0):
        mode = find_mode(entry, Batch.full(houses()), starting_point(entry, houses()))
    assert mode is not None

    def distances(x: Tensor) -> tuple[float, float]:
        exact = entry.posterior(x)
        off = (mode.loc - exact.mean).abs() / exact.variance.sqrt()  # type: ignore[union-attr]
        ratio = mode.precision / exact.precision_matrix - 1  # type: ignore[union-attr]
        return float(off.max()), float(ratio.abs().max())

    assert max(distances(houses())) < 1e-6
    assert min(distances(houses()[1:])) > 1e-6


@pytest.mark.parametrize(("guide", "gap"), [("full-rank", 0.1), ("low-rank", 1.0), ("laplace", 1e-6)])
def test_correlated_columns_in_large_units_are_no_obstacle(guide: str, gap: float) -> None:
    """From a standard deviation of 0.1 about zero the same steps are far from enough (`laplace` needs none)."""
    fitted = ez.fit("linear-regression", houses(), guide=guide, steps=600, **KNOWN).full_ledger()
    assert -6 * fitted.elbo_se - 1e-6 <= fitted.gap < gap
    other = "full-rank" if guide == "laplace" else guide
    plain = ez.fit("linear-regression", houses(), guide=other, steps=600, initial_scale=0.1, **KNOWN).full_ledger()
    assert plain.gap > 10 * max(gap, 0.1)


def test_a_density_without_bound_has_no_mode_to_start_from() -> None:
    """Centred, the density of eight schools rises without end as τ goes to 0; non-centred it does not."""
    x = ez.load_data("eight-schools").x
    for parameterization, has_mode in (("centred", False), ("non-centred", True)):
        entry = get_entry("eight-schools").from_data(x, parameterization=parameterization)
        with isolated(0):
            mode = find_mode(entry, Batch.full(x), starting_point(entry, x))
            guide = build_guide("mean-field", entry, x)
        assert (mode is not None) is has_mode
        assert all(torch.isfinite(p).all() for p in guide.parameters())


def test_a_stated_scale_is_taken() -> None:
    entry = get_entry("linear-regression").from_data(houses(), **KNOWN)
    with isolated(0):
        stated = build_guide("full-rank", entry, houses(), GuideOptions(initial_scale=0.3))
        found = build_guide("full-rank", entry, houses())
    assert stated.auto.scale.tolist() == pytest.approx([0.3] * 3)
    assert found.auto.scale.tolist() != pytest.approx([0.3] * 3)
