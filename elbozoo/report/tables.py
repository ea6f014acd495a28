"""The tables of a report as cells, which pages set in HTML or in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from elbozoo.inference.comparison import Comparison
from elbozoo.report.words import counted, kinds_of, seeds_of
from elbozoo.series import number
from elbozoo.words import NOT_A_BOUND

SUMMARY_COLUMNS = {
    "log_evidence": "log p(x)",
    "elbo": "ELBO",
    "gap": "gap",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
    "learning_gap": "learning gap",
    "kl": "KL(q ‖ posterior)",
}
HELDOUT_COLUMNS = {"heldout_elbo": "ELBO", "heldout_log_evidence": "log p(x)"}
TEXTS = ("method", "guide", "log_evidence_kind", "heldout_log_evidence_kind")


class Cell(NamedTuple):
    """One cell: its text, what stands below it in small type, and the value that it is sorted by.

    Attributes
    ----------
    order : float, str or None
        None where there is no figure; such cells come last.
    """

    text: str
    small: str = ""
    order: float | str | None = None


class Table(NamedTuple):
    """A table with a head, whose first column names the rows.

    Attributes
    ----------
    name : str
        Identifies the table on a page.
    head : list of str
        Names of the columns.
    rows : list of list of Cell
        Cells, row by row.
    caption : str
        What the figures are.
    texts : tuple of str
        Columns that hold words and no figures.
    """

    name: str
    head: list[str]
    rows: list[list[Cell]]
    caption: str
    texts: tuple[str, ...] = ("method",)


def summary_table(comparison: Comparison) -> Table:
    """Return mean and standard deviation over the seeds of every figure, a row per method, best evidence first."""
    rows = comparison.data["rows"]
    names = dict(SUMMARY_COLUMNS)
    if comparison.table["denoising_elbo"].notna().any():
        names = _inserted_after(names, "elbo", "denoising_elbo", "denoising ELBO")
    body = []
    for method in map(str, comparison.summary.index):
        of_method = comparison.table[comparison.table["method"] == method]
        kind = ", ".join(kinds_of(comparison, [method]))
        khat = float(of_method["khat_max"].max())
        converged = int(of_method["converged"].sum())
        body.append(
            [
                Cell(method, str(of_method["guide"].iloc[0]), method),
                *(_over_seeds(of_method, name, rows, kind if name == "log_evidence" else "") for name in names),
                Cell(number(khat, 2), order=_known(khat)),
                _over_seeds(of_method, "seconds"),
                Cell(f"{converged} of {len(of_method)}", order=converged / len(of_method)),
            ]
        )
    caption = (
        f"Nats, totals over {counted(rows, 'row')}, mean ± standard deviation over "
        f"{counted(len(seeds_of(comparison)), 'seed')}; in small type the guide, the figure per datum, and of which "
        "kind log p(x) is. Best evidence first. An en dash stands where a figure does not apply. "
        "Seconds are those of fitting, without the evaluation. "
        "approximation gap + amortization gap = gap = log p(x) − ELBO."
    )
    return Table("summary", ["method", *names.values(), "largest k-hat", "seconds", "converged"], body, caption)


def heldout_table(comparison: Comparison) -> Table | None:
    """Return the figures of held-out rows, a row per method; None where no rows were held out."""
    about = comparison.heldout
    if about is None:
        return None
    body = []
    for method in map(str, comparison.summary.index):
        of_method = comparison.table[comparison.table["method"] == method]
        kind = ", ".join(of_method["heldout_log_evidence_kind"].dropna().unique())
        cells = [_over_seeds(of_method, n, about["rows"], kind if "evidence" in n else "") for n in HELDOUT_COLUMNS]
        body.append([Cell(method, order=method), *cells])
    part = f"{about['part']} row"
    what = "no fit saw them" if about["part"] == "test" else "no fit learned from them, but they may have ended one"
    caption = (
        f"Nats, totals over {counted(about['rows'], part)}, mean ± standard deviation over the seeds; in small type "
        f"the figure per datum, and of which kind log p(x) is. These rows are not among those of the fits: {what}. "
        "An en dash stands where a method has no q for other rows than its own, and where one latent serves the whole "
        "data set and log p of new rows given those of the fit is not exact."
    )
    return Table("heldout", ["method", *HELDOUT_COLUMNS.values()], body, caption)


def full_table(comparison: Comparison) -> Table:
    """Return every figure of every fit."""
    head = list(comparison.table.columns)
    body = [_full_row(row) for row in comparison.table.to_dict("records")]
    caption = (
        "A row per method and seed; nats, totals over the rows. _se is a standard error; for quadrature the error of "
        "the integral. elbo is the bound evaluated at the end; objective is what the method maximised, averaged over "
        "its last hundred steps: two columns, two quantities."
    )
    return Table("fits", head, body, caption, TEXTS)


def _full_row(row: Mapping[Any, Any]) -> list[Cell]:
    cells = {name: Cell(_shown(value), order=_known(value)) for name, value in row.items()}
    if not row["is_bound"]:
        cells |= {name: Cell(NOT_A_BOUND) for name in ("elbo", "heldout_elbo") if name in cells}
    return list(cells.values())


def _over_seeds(of_method: pd.DataFrame, name: str, rows: int | None = None, kind: str = "") -> Cell:
    """Mean ± standard deviation of a column, with the mean per datum where ``rows`` are given."""
    if name in ("elbo", "heldout_elbo") and not of_method["is_bound"].any():
        return Cell(NOT_A_BOUND)
    mean, deviation = float(of_method[name].mean()), float(of_method[name].std())
    if not math.isfinite(mean):
        return Cell(number(mean, 2))
    spread = f" ± {number(deviation, 2)}" if math.isfinite(deviation) else ""
    small = [] if rows is None else [number(mean / rows, 4), kind]
    return Cell(number(mean, 2) + spread, ", ".join(filter(None, small)), mean)


def _inserted_after(names: Mapping[str, str], place: str, key: str, value: str) -> dict[str, str]:
    items = list(names.items())
    items.insert(list(names).index(place) + 1, (key, value))
    return dict(items)


def _known(value: Any) -> float | str | None:
    """Return what a figure is sorted by; None where there is none."""
    if value is None or value != value:
        return None
    return value if isinstance(value, str) else float(value)


def _shown(value: Any) -> str:
    """A figure of the table as text: small ones with an exponent, so that none is rounded to nothing."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or type(value).__name__ == "bool":
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}".replace("-", "−")
    return number(value, 4)
