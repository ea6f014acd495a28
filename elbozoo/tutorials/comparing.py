"""EM, mean-field and amortized inference side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pandas as pd

from elbozoo.inference.comparison import Comparison
from elbozoo.inference.fit import Fit
from elbozoo.notebook.cells import Code, Run, Text
from elbozoo.plots import number
from elbozoo.tutorials.figures import nats, touches
from elbozoo.tutorials.subject import Subject

COLUMNS = ("elbo", "log_evidence", "gap", "approximation_gap", "amortization_gap", "learning_gap", "seconds")


def comparison(s: Subject) -> list[Text | Code]:
    """Return the comparison of methods: table, bars and curves."""
    of_em = "".join(f", {name}={value!r}" for name, value in s.em_settings.items())
    compare = f"""
methods = {json.dumps(s.methods)}
comparison = ez.compare({s.call}, data, methods=methods, seeds={s.effort.seeds}{of_em}, **settings)
comparison.summary[{json.dumps(list(COLUMNS))}].T.round(3)
"""
    cells: list[Text | Code] = [
        Text("## Methods side by side\n\nThe same rows by several methods: means and standard deviations over seeds."),
        Code(compare),
        Text(lambda run: methods_text(run["comparison"])),
    ]
    if s.has_evidence:
        cells.append(Code("page_plots.method_bars(comparison)", alt=_bars_alt, caption=_BARS))
    cells.append(Code("page_plots.method_curves(comparison)", alt=_curves_alt, caption=_curves_caption))
    return cells


def methods_text(comparison: Comparison) -> str:
    """Say where each method ended, a line for each."""
    means = comparison.table.groupby("method").mean(numeric_only=True)
    fits = {fit.method: fit for fit in comparison.fits}
    lines = [", ".join(_method_clauses(fits[name], means.loc[name])) for name in comparison.summary.index]
    return "\n".join(f"- `{name}`: {line}." for name, line in zip(comparison.summary.index, lines, strict=True))


def _method_clauses(fit: Fit, figures: pd.Series) -> Iterator[str]:
    learns = any(parameter.requires_grad for parameter in fit.entry.parameters())
    if learns and not math.isnan(figures.log_evidence):
        yield f"log p(x) reaches {nats(figures, 'log_evidence')}"
        if not math.isnan(figures.learning_gap):
            yield f"{nats(figures, 'learning_gap')} below the best known"
    if math.isnan(figures.gap):
        yield _without_gap(figures)
    elif touches(figures):
        yield "the bound touches log p(x)"
    else:
        yield f"the bound lies {nats(figures, 'gap')} below log p(x)"
        if fit.guide.is_local and not math.isnan(figures.approximation_gap):
            approximation, amortization = nats(figures, "approximation_gap"), nats(figures, "amortization_gap")
            yield f"of which {approximation} is approximation and {amortization} amortization"


def _without_gap(figures: pd.Series) -> str:
    if not math.isnan(figures.elbo):
        return f"the ELBO ends at {number(figures.elbo, 2)} nats, and log p(x) is not known"
    return "there is no bound" if not math.isnan(figures.log_evidence) else "neither a log p(x) nor a bound"


_BARS = (
    "Each method from its ELBO through the gaps to the best log p(x) that is known, mean over the seeds; a stroke is "
    "the ELBO of one seed."
)


def _bars_alt(run: Run) -> str:
    means = run["comparison"].table.groupby("method").mean(numeric_only=True)
    parts = [
        f"{name}, gap {nats(means.loc[name], 'gap')}" if not math.isnan(means.loc[name]["gap"]) else f"{name}, no gap"
        for name in run["comparison"].summary.index
    ]
    return f"Stacked bars of the ledgers: {'; '.join(parts)}"


def _curves_alt(run: Run) -> str:
    return f"The ELBO of {', '.join(run['comparison'].summary.index)} along the fits, and log p(x) above each, dashed"


def _curves_caption(run: Run) -> str:
    steps = {fit.method: len(fit.trajectory) for fit in run["comparison"].fits}
    told = ", ".join(f"`{name}` {steps[name]}" for name in run["comparison"].summary.index)
    return (
        "The ELBO of each method, and dashed log p(x) at its θ where that is followed, for the first seed. Steps: "
        f"{told}. At the end a dot is the ELBO and a square log p(x), both evaluated afresh."
    )
