"""What stands under each picture of a report, and what is said of it to who cannot see it."""

from __future__ import annotations

from elbozoo.inference.comparison import Comparison
from elbozoo.series import ledger, number

CURVES = (
    "Nats per datum. Solid: the ELBO as the optimiser saw it, averaged over a window that grows with the steps; a "
    "line per seed. Dashed: log p(x) at the θ of the moment, where the model has an exact one. Filled and hollow "
    "marks: ELBO and log p(x), evaluated once more at the end. Dotted: the best log p(x) known on these rows. The "
    "first third of the steps may lie below the picture. An objective that is no ELBO is not drawn. Seconds are "
    "those of the steps; where EM was started several times, those of the start that was kept."
)
OBJECTIVES = (
    "Nats per datum, a line per seed. No method here has an ELBO or an exact log p(x): what each maximised bounds "
    "nothing, and lines of different methods cannot be compared."
)
POINTED_AT = " The pointer shows the figures of a step, with the latest log p(x) that was computed."
BY_POINTER = (
    " A click on a name shows or hides it; a rectangle drawn with the pointer is enlarged, and a double click undoes "
    "that."
)
LEDGER = (
    "Nats per datum, means over the seeds. Each bar leads from the ELBO through amortization gap, approximation "
    "gap and learning gap to the best log p(x) known on these rows; the ticks are the ELBOs of single seeds. The "
    "axis begins where the differences do, not at 0, so that lengths of the grey parts mean nothing. A gap below 0 "
    "is Monte Carlo noise, or a search for the best q that stopped early; it is drawn with no width. “not a bound” "
    "marks a q without a density."
)
ONE_LATENT = (
    " Here one q stands for the whole data set: there is nothing to amortize, and what the family cannot "
    "express and what optimisation left are one gap, which the tables call approximation gap."
)
CLASSES = (
    "Every row where its values put it, coloured by the class that is most probable under q; first seed of each "
    "method. Classes of different methods need not be numbered alike."
)
AGREEMENT = (
    "Every point is one figure of the posterior of one row, exact and of q, at the θ of its fit; first seed of each "
    "method. On the line q agrees with the posterior."
)
INTERVALS = (
    "Mean and central 90 % of each number of the latent, from 4,000 draws of q; first seed of each method. The exact "
    "posterior is drawn in grey where the model has one."
)
THINNED = " Of many rows, evenly spaced ones are drawn."


def curves_alt(comparison: Comparison) -> str:
    """Say where each method ends."""
    ends = "; ".join(
        f"{bar.method} ends at ELBO {number(bar.elbo, 4)} and log p(x) {number(bar.log_evidence, 4)}"
        for bar in ledger(comparison)
    )
    return f"Line chart of ELBO and log p(x) along the fits, nats per datum, means over the seeds: {ends}."


def ledger_alt(comparison: Comparison) -> str:
    """Say how long each part of each bar is."""
    parts = "; ".join(
        f"{bar.method}: ELBO {number(bar.elbo, 4)}, amortization gap {number(bar.amortization_gap, 4)}, "
        f"approximation gap {number(bar.approximation_gap, 4)}, learning gap {number(bar.learning_gap, 4)}"
        for bar in ledger(comparison)
    )
    return f"Stacked bars, nats per datum, means over the seeds: {parts}."


def ledger_caption(comparison: Comparison) -> str:
    """Say how to read the bars."""
    return LEDGER + (ONE_LATENT if any(not fit.guide.is_local for fit in comparison.fits) else "")


def latent_caption(has_labels: bool) -> str:
    """Say how to read the latent space."""
    return (
        "The mean of q(z given x) for every row, first seed of each method."
        + (" Colours and marks are the labels of the data, which no method saw." if has_labels else "")
        + " Axes of different methods need not agree: many models are the same after a rotation or reflection of z."
    )
