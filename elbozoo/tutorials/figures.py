"""Figures of a ledger as sentences write them."""

from __future__ import annotations

import math

import pandas as pd

from elbozoo.plots import number

KINDS = {
    "exact": "exact",
    "quadrature": "by quadrature",
    "estimate": "estimated by importance sampling, on average below the truth",
    None: "not known",
}


def nats(figures: pd.Series, name: str) -> str:
    """Return a figure with its unit."""
    return f"{number(figures[name], decimals(figures))} nats"


def decimals(figures: pd.Series) -> int:
    """Decimals that show three digits of the gap, so that the parts of a ledger add up before the reader's eyes."""
    gap = abs(figures["gap"])
    return 2 if math.isnan(gap) else min(4, max(2, 2 - math.floor(math.log10(max(gap, 1e-9)))))


def touches(figures: pd.Series) -> bool:
    """Whether the gap is zero as far as rounding and the standard error of the ELBO can tell."""
    return bool(abs(figures["gap"]) <= max(1e-6, 2 * figures["elbo_se"]))
