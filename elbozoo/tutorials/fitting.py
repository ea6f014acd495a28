"""The fit of a page, its climb and its ledger."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from elbozoo.guides.registry import GuideCard
from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.notebook.cells import Code, Run, Text
from elbozoo.plots import number
from elbozoo.programs import spelled
from elbozoo.tutorials.figures import KINDS, nats, touches
from elbozoo.tutorials.subject import Subject


def fit(s: Subject) -> list[Text | Code]:
    """Return the fit, and what its ledger says."""
    source = f"""
settings = {literal(s.settings)}
fit = ez.fit({s.call}, data, guide="{s.guide}", seed=0, **settings)
ledger = fit.ledger()
ledger
"""
    over = "θ and q together" if s.learns else "q; there is no θ to learn"
    text = (
        f"The ELBO is raised over {over}. The settings keep this page short; without them a fit goes on until the ELBO "
        "no longer rises. The ledger says how far the bound is from the truth, and why, in nats over all rows."
    )
    if s.card.family == "delta":
        text = (
            f"What is raised over {over} is log p(x, z) with z at the point of q, in nats over all rows. The settings "
            "keep this page short; without them a fit goes on until it no longer rises."
        )
    return [Text(f"## Fit\n\n{text}"), Code(source), Text(lambda run: " ".join(ledger_sentences(s, run["ledger"])))]


def climb(s: Subject) -> list[Text | Code]:
    """Return the picture of the bound that climbs to the truth."""
    source = "from elbozoo import page_plots\n\npage_plots.climb(fit, ledger)"
    return [
        Text(f"## {'The objective climbs' if s.card.family == 'delta' else 'The ELBO climbs'}"),
        Code(source, alt=_climb_alt, caption=_climb_caption),
        Text(lambda run: climb_text(s, run)),
    ]


def ledger(s: Subject) -> list[Text | Code]:
    """Return the ledger as a stacked bar."""
    if not s.has_evidence:
        return [
            Text(
                "## The ledger\n\nThe prior of this model is flat, so p(x) does not exist, and no ledger can be drawn."
            )
        ]
    return [
        Text("## The ledger as a bar"),
        Code("page_plots.ledger_bar(ledger)", alt=_bar_alt, caption=_bar_caption),
    ]


def literal(settings: dict[str, Any]) -> str:
    """Return settings as Python spells them."""
    return "{" + ", ".join(f"{spelled(name)}: {spelled(value)}" for name, value in settings.items()) + "}"


def ledger_sentences(s: Subject, ledger: pd.Series) -> Iterator[str]:
    """Say what a ledger says."""
    evidence = f"{nats(ledger, 'log_evidence')} ({KINDS[ledger.log_evidence_kind]})"
    if not ledger.is_bound:
        yield f"A `{s.card.family}` has no density over a continuous latent, so there is no ELBO: it bounds nothing."
        if math.isnan(ledger.log_evidence):
            yield "Nor is there a log p(x) that it could be held against."
        else:
            yield f"At the θ that was learned log p(x) is {evidence}."
        return
    if math.isnan(ledger.log_evidence):
        yield f"The ELBO is {nats(ledger, 'elbo')}; log p(x) is not known, nor how far the bound is below it."
    else:
        yield f"The ELBO is {nats(ledger, 'elbo')}, and log p(x) is {evidence}."
        yield from _gap_sentences(s, ledger)
    if ledger.elbo_se > 0:
        yield f"The ELBO is a mean over draws of q, with a standard error of {number(ledger.elbo_se, 4)} nats."
    if not math.isnan(ledger.kl):
        yield f"KL(q ‖ posterior), found without log p(x), is {nats(ledger, 'kl')}: the gap, by another road."
    if ledger.khat_share > 0:
        share = number(100 * ledger.khat_share, 1)
        yield f"Pareto k-hat is above 0.7 for {share} % of the data: importance weights cannot correct q there."
    if s.learns and not math.isnan(ledger.learning_gap):
        yield f"The learned θ lies {nats(ledger, 'learning_gap')} of log p(x) below the best one: the learning gap."


def _gap_sentences(s: Subject, ledger: pd.Series) -> Iterator[str]:
    if touches(ledger):
        yield "The bound touches the truth."
        return
    per_datum = number(ledger.gap / ledger.rows, 6)
    unit = "step" if isinstance(s.entry, SequenceEntry) else "datum"
    yield f"The bound lies **{nats(ledger, 'gap')}** below the truth, {per_datum} per {unit}."
    yield from _parts_of_the_gap(s.card, ledger)
    if ledger.log_evidence_kind == "estimate":
        yield "This model has no exact log p(x) here, so the estimate stands for it; the gap may be larger."


def _parts_of_the_gap(card: GuideCard, ledger: pd.Series) -> Iterator[str]:
    if card.source == "global":
        yield "With one q for the whole data set it is the family's, and what the optimiser has left undone."
    elif not math.isnan(ledger.approximation_gap):
        yield f"Of this, {nats(ledger, 'approximation_gap')} is what the best `{card.family}` would leave as well,"
        yield f"and {nats(ledger, 'amortization_gap')} is {_SOURCE_COST.get(card.source, 'the rest')}."


_SOURCE_COST = {
    "shared": "what it costs that all data share one q",
    "free": "what the optimiser has left undone for each datum's own q",
    "amortized": "what it costs that an encoder gives q instead of a search for each datum",
}


# ---- the climb -------------------------------------------------------------------------------------------------------


def _climb_alt(run: Run) -> str:
    ledger = run["ledger"]
    if not ledger.is_bound:
        return f"The objective of {run['fit'].method} against the step"
    alt = f"The ELBO of {run['fit'].method} against the step, ending at {nats(ledger, 'elbo')}"
    if math.isnan(ledger.log_evidence):
        return alt
    return f"{alt}; above it, dashed, log p(x), which is {nats(ledger, 'log_evidence')} at the end"


def _climb_caption(run: Run) -> str:
    fit, ledger = run["fit"], run["ledger"]
    if not ledger.is_bound:
        return f"What `{fit.method}` maximises, step by step. It is no bound."
    noise = ", smoothed over the noise of its draws, which is faint behind it" if ledger.elbo_se > 0 else ""
    caption = f"The ELBO of `{fit.method}` step by step{noise}."
    if fit.trajectory["log_evidence"].notna().any():
        return f"{caption} The dashed line is log p(x) at the θ of each step, and what is shaded is the gap."
    if math.isnan(ledger.log_evidence):
        return caption
    return f"{caption} The dotted line is log p(x) at the end, {nats(ledger, 'log_evidence')}."


def climb_text(s: Subject, run: Run) -> str:
    """Say how far the bound came, and what lifted it."""
    fit, ledger = run["fit"], run["ledger"]
    known = fit.trajectory.dropna(subset=["elbo", "log_evidence"])
    if known.empty or math.isnan(ledger.gap):
        return "The end is evaluated afresh, with many more draws than a step takes."
    first = known.iloc[0]
    if first.elbo > ledger.elbo:
        return "By chance the draws of the first step put it above where the bound ends: look at the smoothed line."
    climb = (
        f"The first step of `{fit.method}` saw an ELBO of {number(first.elbo, 2)} nats; at the end it was "
        f"{number(ledger.elbo - first.elbo, 2)} higher"
    )
    if not s.learns:
        return f"{climb}. There is no θ to learn, so a better q did all of it."
    gain = ledger.log_evidence - first.log_evidence
    if gain < 0:
        lesson = "the bound rose because the gap closed by more than that, not because θ explains the data better"
    else:
        lesson = "a better θ lifts both, a better q closes the gap between them"
    return f"{climb}. Meanwhile log p(x) {'fell' if gain < 0 else 'rose'} by {number(abs(gain), 2)}: {lesson}."


# ---- the bar ---------------------------------------------------------------------------------------------------------


def _bar_alt(run: Run) -> str:
    ledger = run["ledger"]
    parts = [f"ELBO {nats(ledger, 'elbo')}"] if ledger.is_bound else ["no ELBO"]
    for name in ("amortization_gap", "approximation_gap"):
        if not math.isnan(ledger[name]):
            parts.append(f"{name.replace('_', ' ')} {nats(ledger, name)}")
    if math.isnan(ledger.approximation_gap) and not math.isnan(ledger.gap):
        parts.append(f"gap {nats(ledger, 'gap')}")
    if not math.isnan(ledger.learning_gap):
        parts.append(f"learning gap {nats(ledger, 'learning_gap')}")
    return f"Stacked bar of {run['fit'].method}: {', '.join(parts)}"


def _bar_caption(run: Run) -> str:
    ledger = run["ledger"]
    if math.isnan(ledger.gap):
        return "There is no bound and a truth to hold side by side, so the bar has no gaps."
    ends = "log p(x)" if math.isnan(ledger.learning_gap) else "the best log p(x) that is known on these rows"
    return f"From the ELBO of `{run['fit'].method}` through its gaps to {ends}."
