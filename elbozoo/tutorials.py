"""Tutorials: pages whose text, pictures and numbers come from one run of a model and a guide.

A page is a list of cells made by the small functions below. Sentences with numbers are functions of what the code
cells before them have computed, so that the page cannot disagree with its code.
"""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from elbozoo.guides.autoguides import AUTOGUIDES
from elbozoo.guides.families import FAMILIES
from elbozoo.guides.registry import WHOLE_GUIDES, GuideCard, guide_cards, guide_names, resolve_guide
from elbozoo.guides.sources import SOURCES
from elbozoo.inference.comparison import Comparison
from elbozoo.inference.fit import Fit
from elbozoo.inference.method import default_guide, default_methods, resolve_method
from elbozoo.models.contract.entry import Entry, HasPosterior, SupportsEM
from elbozoo.models.contract.registry import get_entry
from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.notebook import Code, Text, check_destination, execute, write_page
from elbozoo.pages import PageParts, attributes_table, code_block, options_table, page_parts
from elbozoo.plots import number

ROWS = 200
SEEDS = 2
STEPS = 1000
# A step of a sequence model runs over time, which takes as much longer.
SEQUENCE_ROWS, SEQUENCE_STEPS = 60, 300
EM_SETTINGS = {"iterations": 200, "restarts": 3}
DRAWS = 4000

Run = Mapping[str, Any]


def write_tutorial(model: str, path: str | Path, *, guide: str | None = None) -> Path:
    """Write a page that teaches ``model`` with ``guide`` from a run, and return its path.

    The page can be executed: MyST Markdown, with its pictures in ``PAGE_files`` beside it, or a Jupyter notebook.

    Parameters
    ----------
    model : str
        Name of an entry.
    path : path
        Page to write, ending in ``.md`` or ``.ipynb``; nothing is written before the run has ended.
    guide : str, optional
        Guide that the page is about; ``"mean-field"`` by default, ``"exact"`` where there is no latent, and
        ``"amortized"`` where a q must see its row.

    Raises
    ------
    InvalidInput
        For an unknown model, a guide that is unknown or does not fit, or a path that cannot be written; before the run.
    """
    page, subject = Path(path), Subject.of(model, guide)
    check_destination(page)
    return write_page(execute(tutorial_cells(subject)), page)


@dataclass(frozen=True)
class Subject:
    """A model and a guide, with what the page can show of them.

    Attributes
    ----------
    model, guide : str
        Names, the guide's as it was asked for.
    entry : Entry
        The model with parameters drawn at random: the one that the page's data come from.
    card : GuideCard
        Canonical name, family and source of the guide.
    methods : list of str
        Methods that the page compares, the guide among them.
    """

    model: str
    guide: str
    entry: Entry
    card: GuideCard
    methods: list[str]

    @classmethod
    def of(cls, model: str, guide: str | None) -> Subject:
        """Look up both.

        Raises
        ------
        InvalidInput
            For an unknown model, or a guide that is unknown or does not fit.
        """
        entry = get_entry(model).example()
        guide = guide or default_guide(entry)
        canonical = resolve_guide(guide, entry)
        (card,) = [card for card in guide_cards(entry) if card.name == canonical]
        methods = default_methods(entry)
        if canonical not in [resolve_method(method, entry) for method in methods]:
            methods.append(guide)
        return cls(model, guide, entry, card, methods)

    @property
    def parts(self) -> PageParts:
        """The entry's page."""
        return page_parts(self.entry.page())

    @property
    def settings(self) -> dict[str, Any]:
        """Options with which the page runs in under a minute."""
        steps = min(STEPS, SEQUENCE_STEPS) if isinstance(self.entry, SequenceEntry) else STEPS
        return {"steps": steps, "learning_rate": self._learning_rate(), "schedule": "cosine"}

    @property
    def rows(self) -> int:
        """Rows of the page's data."""
        return min(ROWS, SEQUENCE_ROWS) if isinstance(self.entry, SequenceEntry) else ROWS

    @property
    def em_settings(self) -> dict[str, int]:
        """Options with which EM, if the page compares it, ends in time."""
        if "em" not in self.methods:
            return {}
        if isinstance(self.entry, SupportsEM):
            return EM_SETTINGS
        # A step of Monte Carlo EM costs more where there are several latents.
        return {"iterations": STEPS // (10 if len(self.entry.latent_sites()) == 1 else 40)}

    def _learning_rate(self) -> float:
        """Return the step size that gets far in so few steps: small for networks, large for a single q."""
        if isinstance(self.entry, SequenceEntry):
            return 0.02
        if self.entry.dtype == torch.float32:
            return 0.02
        site = self.entry.latent_sites()[0]
        if not site.is_local:
            return 0.2
        return 0.1 if site.is_discrete else 0.05


def tutorial_cells(subject: Subject) -> list[Text | Code]:
    """Return the page as cells, in order."""
    return [
        *_introduction(subject),
        *_data(subject),
        *_fit(subject),
        *_posterior(subject),
        *_comparison(subject),
        *_ending(subject),
    ]


# ---- before the run --------------------------------------------------------------------------------------------------


def _introduction(s: Subject) -> list[Text | Code]:
    cls = type(s.entry)
    note = (
        f"This page is about the model `{s.model}` with the guide `{s.guide}`. Its numbers and pictures, those in its "
        "sentences too, come from a run of its own code."
    )
    tables = {"Its parameters:": attributes_table(cls), "Its options:": options_table(cls.Options)}
    notation = [f"{title}\n\n{table}" for title, table in tables.items() if table]
    program = [f"The same as a Pyro program, a method of `{cls.__name__}`:", _source_of(cls.forward), *notation]
    return [
        Text(f"# {s.parts.title}\n\n{note}\n\n{s.parts.story}"),
        Text("\n\n".join(["## The program", *program])),
        Text("\n\n".join(["## The guide", *_guide_texts(s)])),
    ]


def _guide_texts(s: Subject) -> list[str]:
    name, family, source = f"`{s.card.name}`", s.card.family, s.card.source
    if isinstance(s.entry, HasPosterior) and source == "exact":
        return [
            f"The guide {name} is the posterior itself, which this model knows: its bound is the evidence.",
            _source_of(s.entry.posterior),
        ]
    if source == "global":
        return [
            f"There is one latent for the whole data set, so there is one q, and nothing to amortize. Pyro makes the "
            f"guide {name} from the program:",
            code_block(inspect.getsource(AUTOGUIDES[s.card.name]).strip().rstrip(","), "python"),
        ]
    whole = next((guide for guide in WHOLE_GUIDES if s.card.name == guide.NAME), None)
    if whole is not None:
        return [
            f"The guide {name} is not a product of one family: {_summary_of(whole)}",
            _source_of(whole.conditionals),
        ]
    return [
        f"The guide {name} is a family fed by a source. The family, `{family}`, decides how close q can come to the "
        f"posterior at best: that is the approximation gap. The source, `{source}`, decides where the q of each datum "
        "has its parameters from: that is the amortization gap.",
        f"Family `{family}`: {_summary_of(FAMILIES[family])}",
        _source_of(FAMILIES[family].distribution),
        f"Source `{source}`: {_summary_of(SOURCES[source])}",
        _source_of(SOURCES[source].forward),
    ]


def _source_of(function: Any) -> str:
    return code_block(textwrap.dedent(inspect.getsource(function)).strip(), "python")


def _summary_of(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


# ---- data ------------------------------------------------------------------------------------------------------------


def _data(s: Subject) -> list[Text | Code]:
    load = f"""
import matplotlib.pyplot as plt
import torch

import elbozoo as ez

plt.style.use("tableau-colorblind10")
data = ez.load_data("simulate:{s.model}", rows={s.rows}, seed=0)
print(data.description)
"""
    return [
        Text("## Data\n\nThe rows are drawn from the model itself: only the inference can go wrong."),
        Code(load),
        Code(_picture_of(s.entry), alt=f"The {s.rows} simulated rows"),
    ]


def _picture_of(entry: Entry) -> str:
    x, classes = entry.simulate_table(20, seed=0)
    if isinstance(entry, SequenceEntry):
        return _SERIES
    if ((x == 0) | (x == 1)).all():
        return _BINARY
    if x.shape[1] == 1:
        return _HISTOGRAM
    return _SCATTER.format(colour="" if classes is None else "c=data.labels, ")


_SCATTER = """
figure, axes = plt.subplots(figsize=(5, 4))
axes.scatter(data.x[:, 0], data.x[:, 1], {colour}s=12)
axes.set(xlabel=data.columns[0], ylabel=data.columns[1], title="the first two columns")
figure.tight_layout()
"""
_HISTOGRAM = """
figure, axes = plt.subplots(figsize=(5, 4))
axes.hist(data.x[:, 0], bins=30)
axes.set(xlabel=data.columns[0], ylabel="rows")
figure.tight_layout()
"""
_SERIES = """
figure, axes = plt.subplots(figsize=(9, 3))
axes.plot(data.x, marker=".", linewidth=0.8)
axes.set(xlabel="step", ylabel=", ".join(data.columns))
figure.tight_layout()
"""
_BINARY = """
figure, axes = plt.subplots(figsize=(9, 2.5))
axes.imshow(data.x.T.numpy(), aspect="auto", cmap="Greys", interpolation="nearest")
axes.set(xlabel="row", ylabel="column", title="ones are black")
figure.tight_layout()
"""


# ---- fit and ledger --------------------------------------------------------------------------------------------------


def _fit(s: Subject) -> list[Text | Code]:
    fit = f"""
settings = {json.dumps(s.settings)}
fit = ez.fit("{s.model}", data, guide="{s.guide}", seed=0, **settings)
ledger = fit.ledger()
ledger
"""
    over = "θ and q together" if _learns(s.entry) else "q; there is no θ to learn"
    text = (
        f"The ELBO is raised over {over}. The settings keep this page short; without them a fit goes on until the ELBO "
        "no longer rises. The ledger says how far the bound is from the truth, and why, in nats over all rows."
    )
    if s.card.family == "delta":
        text = (
            f"What is raised over {over} is log p(x, z) with z at the point of q, in nats over all rows. The settings "
            "keep this page short; without them a fit goes on until it no longer rises."
        )
    return [
        Text(f"## Fit\n\n{text}"),
        Code(fit),
        Text(lambda run: " ".join(_ledger_sentences(s, run["fit"], run["ledger"]))),
    ]


def _ledger_sentences(s: Subject, fit: Fit, ledger: pd.Series) -> Iterator[str]:
    evidence = f"{_nats(ledger, 'log_evidence')} ({_KINDS[ledger.log_evidence_kind]})"
    if not ledger.is_bound:
        yield f"A `{s.card.family}` has no density over a continuous latent, so there is no ELBO: it bounds nothing."
        if math.isnan(ledger.log_evidence):
            yield "Nor is there a log p(x) that it could be held against."
        else:
            yield f"At the θ that was learned log p(x) is {evidence}."
        return
    yield f"The ELBO is {_nats(ledger, 'elbo')}, and log p(x) is {evidence}."
    if _touches(ledger):
        yield "The bound touches the truth."
    else:
        per_datum = number(ledger.gap / ledger.rows, 6)
        yield f"The bound lies **{_nats(ledger, 'gap')}** below the truth, {per_datum} per datum."
        yield from _parts_of_the_gap(s.card, ledger)
    if ledger.elbo_se > 0:
        yield f"The ELBO is a mean over draws of q, with a standard error of {number(ledger.elbo_se, 4)} nats."
    if not math.isnan(ledger.kl):
        yield f"KL(q ‖ posterior), found without log p(x), is {_nats(ledger, 'kl')}: the gap, by another road."
    if ledger.khat_share > 0:
        share = number(100 * ledger.khat_share, 1)
        yield f"Pareto k-hat is above 0.7 for {share} % of the data: importance weights cannot correct q there."
    if _learns(fit.entry) and not math.isnan(ledger.learning_gap):
        yield f"The learned θ lies {_nats(ledger, 'learning_gap')} of log p(x) below the best one: the learning gap."


def _parts_of_the_gap(card: GuideCard, ledger: pd.Series) -> Iterator[str]:
    if card.source == "global":
        yield "With one q for the whole data set it is the family's, and what the optimiser has left undone."
    elif not math.isnan(ledger.approximation_gap):
        yield f"Of this, {_nats(ledger, 'approximation_gap')} is what the best `{card.family}` would leave as well,"
        yield f"and {_nats(ledger, 'amortization_gap')} is {_SOURCE_COST[card.source]}."


_KINDS = {
    "exact": "exact",
    "quadrature": "by quadrature",
    "estimate": "estimated by importance sampling, on average below the truth",
    None: "not known",
}
_SOURCE_COST = {
    "shared": "what it costs that all data share one q",
    "free": "what the optimiser has left undone for each datum's own q",
    "amortized": "what it costs that an encoder gives q instead of a search for each datum",
}


def _nats(figures: pd.Series, name: str) -> str:
    return f"{number(figures[name], _decimals(figures))} nats"


def _decimals(figures: pd.Series) -> int:
    """Decimals that show three digits of the gap, so that the parts of a ledger add up before the reader's eyes."""
    gap = abs(figures["gap"])
    return 2 if math.isnan(gap) else min(4, max(2, 2 - math.floor(math.log10(max(gap, 1e-9)))))


def _touches(figures: pd.Series) -> bool:
    """Whether the gap is zero as far as rounding and the standard error of the ELBO can tell."""
    return bool(abs(figures["gap"]) <= max(1e-6, 2 * figures["elbo_se"]))


def _learns(entry: Entry) -> bool:
    """Whether there is a θ to learn."""
    return any(parameter.requires_grad for parameter in entry.parameters())


# ---- posterior -------------------------------------------------------------------------------------------------------


def _posterior(s: Subject) -> list[Text | Code]:
    if not isinstance(s.entry, HasPosterior):
        return []
    sites = s.entry.latent_sites()
    if not sites:
        return []
    if not sites[0].is_local:
        source, text = _DENSITIES, _densities_text
    elif len(sites) > 1:
        return []
    elif isinstance(s.entry, SequenceEntry):
        source, text = (_STATES, _probabilities_text) if sites[0].is_discrete else (_PATH, _moments_text)
    elif sites[0].is_discrete:
        source, text = _PROBABILITIES, _probabilities_text
    else:
        source, text = _MOMENTS, _moments_text
    return [
        Text("## q against the exact posterior\n\nThis model's posterior is known."),
        Code(
            source.format(model=s.model, site=sites[0].name, draws=DRAWS),
            alt=f"q of {s.guide} against the exact posterior",
        ),
        Text(text),
    ]


_PROBABILITIES = """
exact = fit.entry.posterior(data.x).probs.detach()
q = fit.transform()

figure, axes = plt.subplots(figsize=(5, 4))
axes.scatter(exact.flatten(), q.flatten(), s=12)
axes.axline((0, 0), slope=1, color="0.5", linewidth=1)
axes.set(xlabel="probability, exact posterior", ylabel="probability, q")
figure.tight_layout()
"""
_MOMENTS = """
with torch.no_grad():
    posterior = fit.entry.posterior(data.x)
    draws = torch.tensor(fit.to_inferencedata(draws={draws}).posterior["{site}"].values[0])  # draw, row, dimension
means = posterior.mean, draws.mean(0)
deviations = posterior.stddev, draws.std(0)

figure, panels = plt.subplots(1, 2, figsize=(9, 4))
for axes, what, (exact, q) in zip(panels, ["mean", "standard deviation"], [means, deviations]):
    axes.scatter(exact.flatten(), q.flatten(), s=12)
    axes.axline((float(exact.mean()), float(exact.mean())), slope=1, color="0.5", linewidth=1)
    axes.set(xlabel=f"{{what}}, exact posterior", ylabel=f"{{what}}, q")
figure.tight_layout()
"""
_DENSITIES = """
reference = ez.fit("{model}", data, guide="exact", seed=0)
exact, q = (each.to_inferencedata(draws={draws}).posterior for each in (reference, fit))

figure, panels = plt.subplots(1, len(exact.data_vars), figsize=(4.5 * len(exact.data_vars), 4), squeeze=False)
for axes, name in zip(panels[0], exact.data_vars):
    for label, draws in {{"exact posterior": exact, "q": q}}.items():
        first = draws[name].values.reshape({draws}, -1)[:, 0]
        axes.hist(first, bins=60, density=True, histtype="step", label=label)
    axes.set(xlabel=f"{{name}}, first number", ylabel="density")
panels[0][0].legend()
figure.tight_layout()
"""
_STATES = """
with torch.no_grad():
    exact = fit.entry.posterior(fit.x).probs[0]
q = fit.transform()

figure, axes = plt.subplots(figsize=(9, 3))
axes.plot(exact[:, 0], label="exact posterior")
axes.plot(q[:, 0], "--", label="q")
axes.set(xlabel="step", ylabel="probability of state 0")
axes.legend()
figure.tight_layout()
"""
_PATH = """
with torch.no_grad():
    posterior = fit.entry.posterior(fit.x)
    draws = torch.tensor(fit.to_inferencedata(draws={draws}).posterior["{site}"].values[0])[:, 0]  # of the one sequence
means = posterior.mean[0], draws.mean(0)
deviations = posterior.variance[0].sqrt(), draws.std(0)

figure, axes = plt.subplots(figsize=(9, 3))
for label, mean, deviation in zip(["exact posterior", "q"], means, deviations):
    (line,) = axes.plot(mean[:, 0], label=f"{{label}}, mean and two standard deviations")
    low, high = mean[:, 0] - 2 * deviation[:, 0], mean[:, 0] + 2 * deviation[:, 0]
    axes.fill_between(range(len(mean)), low, high, color=line.get_color(), alpha=0.25, linewidth=0)
axes.set(xlabel="step", ylabel="{site}, first dimension")
axes.legend()
figure.tight_layout()
"""


def _probabilities_text(run: Run) -> str:
    difference = (run["q"] - run["exact"]).abs()
    mean, most = number(float(difference.mean()), 4), number(float(difference.max()), 4)
    return f"The probabilities of q differ from the posterior's by {mean} on average, and by {most} at most."


def _densities_text(run: Run) -> str:
    lines = []
    for name in run["exact"].data_vars:
        exact, q = (run[which][name].values[0].reshape(DRAWS, -1) for which in ("exact", "q"))
        distance = number(float((abs(q.mean(0) - exact.mean(0)) / exact.std(0)).mean()), 3)
        ratio = number(float((q.std(0) / exact.std(0)).mean()), 3)
        lines.append(
            f"- `{name}`: the mean of q is {distance} posterior standard deviations away from the posterior's, and its "
            f"standard deviation is {ratio} times the posterior's."
        )
    return "\n".join(["On average over the numbers of each latent, by draws of both:", "", *lines])


def _moments_text(run: Run) -> str:
    (mean, q_mean), (deviation, q_deviation) = run["means"], run["deviations"]
    distance = number(float(((q_mean - mean) / deviation).abs().mean()), 3)
    ratio = number(float((q_deviation / deviation).mean()), 3)
    return (
        f"On average the mean of q is {distance} posterior standard deviations away from the posterior's, and the "
        f"standard deviation of q is {ratio} times the posterior's, both measured on {len(run['draws'])} draws of q."
    )


# ---- comparison ------------------------------------------------------------------------------------------------------


def _comparison(s: Subject) -> list[Text | Code]:
    of_em = "".join(f", {name}={value}" for name, value in s.em_settings.items())
    compare = f"""
methods = {json.dumps(s.methods)}
comparison = ez.compare("{s.model}", data, methods=methods, seeds={SEEDS}{of_em}, **settings)
comparison.summary.T.round(3)
"""
    return [
        Text("## Methods side by side\n\nThe same rows by several methods: means and standard deviations over seeds."),
        Code(compare),
        Text(lambda run: _methods_text(run["comparison"])),
        Code("comparison.plot()", alt=f"ELBO and log p(x) along the fits, and the ledgers: {', '.join(s.methods)}"),
        Text(lambda run: _climb_text(run["fit"], run["ledger"])),
    ]


def _methods_text(comparison: Comparison) -> str:
    means = comparison.table.groupby("method").mean(numeric_only=True)
    fits = {fit.method: fit for fit in comparison.fits}
    lines = [", ".join(_method_clauses(fits[name], means.loc[name])) for name in comparison.summary.index]
    return "\n".join(f"- `{name}`: {line}." for name, line in zip(comparison.summary.index, lines, strict=True))


def _method_clauses(fit: Fit, figures: pd.Series) -> Iterator[str]:
    if _learns(fit.entry) and not math.isnan(figures.log_evidence):
        yield f"log p(x) reaches {_nats(figures, 'log_evidence')}"
        if not math.isnan(figures.learning_gap):
            yield f"{_nats(figures, 'learning_gap')} below the best known"
    if math.isnan(figures.gap):
        yield "there is no bound" if not math.isnan(figures.log_evidence) else "neither a log p(x) nor a bound"
    elif _touches(figures):
        yield "the bound touches log p(x)"
    else:
        yield f"the bound lies {_nats(figures, 'gap')} below log p(x)"
        if fit.guide.is_local and not math.isnan(figures.approximation_gap):
            approximation, amortization = _nats(figures, "approximation_gap"), _nats(figures, "amortization_gap")
            yield f"of which {approximation} is approximation and {amortization} amortization"


def _climb_text(fit: Fit, ledger: pd.Series) -> str:
    known = fit.trajectory.dropna(subset=["elbo", "log_evidence"])
    if known.empty or math.isnan(ledger.gap):
        return "Lines are smoothed; their ends are evaluated afresh, with many more draws than a step takes."
    first = known.iloc[0]
    climb = (
        f"The first step of `{fit.method}` saw an ELBO of {number(first.elbo, 2)} nats; at the end it was "
        f"{number(ledger.elbo - first.elbo, 2)} higher"
    )
    if not _learns(fit.entry):
        return f"{climb}. There is no θ to learn, so a better q did all of it."
    gain = ledger.log_evidence - first.log_evidence
    if gain < 0:
        lesson = "the ELBO prefers a θ whose posterior this q can follow to one that explains the data"
    else:
        lesson = "a better θ lifts both, a better q closes the gap between them"
    return f"{climb}. Meanwhile log p(x) {'fell' if gain < 0 else 'rose'} by {number(abs(gain), 2)}: {lesson}."


# ---- after the run ---------------------------------------------------------------------------------------------------


def _ending(s: Subject) -> list[Text | Code]:
    exercises = "\n".join(f"{i}. {text}" for i, text in enumerate(_exercises(s), start=1))
    sections = {"What goes wrong": s.parts.failures, "Exercises": exercises, "References": s.parts.references}
    return [*(Text(f"## {title}\n\n{text}") for title, text in sections.items() if text), Text(_provenance_text)]


def _exercises(s: Subject) -> Iterator[str]:
    yield (
        f"`ez.list_guides('{s.model}')` says which guides fit. Give some of them to `ez.compare(..., methods=[...])`: "
        "which gap changes with the family, and which with the source?"
    )
    if any(name.startswith("amortized") for name in guide_names(s.entry)):
        yield "Give `guide='amortized'` an encoder of `hidden=2` units, then one of 64: which gap pays for the first?"
    if isinstance(s.entry, HasPosterior):
        yield "Show that log p(x) − ELBO = KL(q ‖ posterior), and find the two figures of the ledger that must agree."
    sizes = [option["option"] for option in type(s.entry).Options.describe() if option["type"] == "int"]
    if sizes:
        yield (
            f"Fit `{sizes[0]}=1`, and then more. Can log p(x) of the rows of the fit fall, and that of new rows, "
            "`fit.log_evidence(x)`?"
        )
    yield "Fit ten times as many rows with the same settings: which figures per datum stay as they are, and why?"


def _provenance_text(run: Run) -> str:
    versions = run["fit"].provenance
    made_with = ", ".join(f"{name} {versions[name]}" for name in ("elbozoo", "torch", "pyro-ppl", "numpy", "python"))
    return f"---\n\nMade with {made_with}; with these versions the run repeats to the last digit on the same machine."
