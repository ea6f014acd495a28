"""The report of a comparison: one HTML file with words, tables and pictures that needs nothing else."""

from __future__ import annotations

import base64
import inspect
import math
import os
import shlex
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from elbozoo import plots
from elbozoo.data import FILE_SUFFIXES, SIMULATE, SIMULATED_ROWS, list_datasets
from elbozoo.inference.comparison import Comparison
from elbozoo.inference.fit import Fit
from elbozoo.inference.storage import writable_directory
from elbozoo.models.contract.entry import Corrupts, Program
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.plots import number
from elbozoo.preparation import OWN
from elbozoo.words import NOT_A_BOUND

LEVEL = 1e-3  # nats per datum; figures closer than this are called level
MOSTLY = 0.995
KHAT_LIMIT = 0.7

SUMMARY_COLUMNS = {
    "log_evidence": "log p(x)",
    "elbo": "ELBO",
    "gap": "gap",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
    "learning_gap": "learning gap",
    "kl": "KL(q ‖ posterior)",
}

LOADING = ("root", "split", "key", "stream")  # arguments of load_data; the others are those of compare, too
HELDOUT_COLUMNS = {"heldout_elbo": "ELBO", "heldout_log_evidence": "log p(x)"}

AMORTIZATION_REASONS = {
    "free": "its family holds a closer q for the data, and optimisation stopped short of it",
    "amortized": "its encoder does not give every datum the best q of the family",
    "semi-amortized": "its encoder and the few steps after it do not give every datum the best q of the family",
    "shared": "all data share one q",
}

KIND_WORDS = {"exact": "exact", "quadrature": "by quadrature", "estimate": "an estimate"}

GLOSSARY = {
    "nat": "The unit of a natural logarithm. Totals are sums over all rows of the data; per datum, they are divided by "
    "the number of rows.",
    "log p(x)": "The evidence: the log-likelihood of the data at the θ of the fit, with the latents integrated out and "
    "all constants kept.",
    "exact": "The evidence comes from a formula of the model. Nothing is left out but rounding.",
    "quadrature": "The evidence is a numerical integral over few dimensions. Its error, in the column "
    "log_evidence_se, is estimated and small, but it is not a formula.",
    "estimate": "The evidence is estimated by importance sampling, from draws of q or, where one latent serves all "
    "rows, by annealing from the prior. In expectation it lies below the truth, so gaps to it are too small rather "
    "than too large; the standard error covers chance only, not this bias.",
    "ELBO": "E_q[log p(x, z) − log q(z)], a lower bound of log p(x), evaluated once more at the end from fresh draws, "
    "always for the plain bound.",
    NOT_A_BOUND: "Stands for the ELBO of a q without a density, such as the point that an autoencoder makes of a row. "
    "What such a method maximises bounds nothing and cannot be compared with an ELBO.",
    "denoising ELBO": "E over corrupted rows x̃ and z from q(z given x̃) of log p(x, z) − log q(z given x̃), where q is "
    "trained on corrupted rows: a lower bound of log p(x) as well. The ELBO beside it has q see the rows as they are.",
    "objective": "What the method maximised, averaged over its last hundred steps (for EM, its iterations). It is not "
    "the ELBO column: it may be another quantity altogether, and where it is the ELBO it is a noisy value along "
    "the way, not at the end.",
    "gap": "log p(x) − ELBO at the same θ. It equals KL(q ‖ posterior), which is computed without it where the "
    "posterior is known.",
    "approximation gap": "From log p(x) down to the ELBO of the best q of the family: what the family cannot express. "
    "For one latent of the whole data set it is the whole gap, optimisation included.",
    "amortization gap": "From that best q to the q of the fit: what an encoder, sharing, or optimisation that stopped "
    "early has cost.",
    "learning gap": "From the best log p(x) known on these rows (of all fits here, and of the closed form where there "
    "is one) to that of this θ.",
    "k-hat": "Shape of the tail of the importance weights of a datum (Pareto). Above 0.7, what importance sampling "
    "says of that datum should not be relied on.",
    "±": "Standard deviation over the seeds, with n − 1 in the denominator. It says how much the start matters; it is "
    "not an error of the mean.",
    "converged": "Whether the fit met its own convergence test before it ran out of steps.",
}

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1f23; --faint: #5b626b; --line: #d9dde2; --box: #f4f6f8;
  --accent: #00588c; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e6e8eb; --faint: #a3abb5; --line: #363c44;
  --box: #1f242a; --accent: #7cc4f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p, li, dd, figcaption, caption { max-width: 46rem; overflow-wrap: anywhere; }
.faint, figcaption, caption, small { color: var(--faint); }
.headline { max-width: 50rem; padding: .9rem 1.1rem .9rem 2rem; margin: 1.2rem 0 0; background: var(--box);
  border-left: 4px solid var(--accent); border-radius: 4px; }
.headline li + li { margin-top: .35rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding: .6rem 0; }
th, td { padding: .35rem .55rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line); }
th:first-child, td.text, th.text { text-align: left; }
td.wrap { white-space: normal; text-align: left; overflow-wrap: anywhere; }
td small, th small { display: block; font-weight: normal; min-height: 1lh; }
thead th { white-space: normal; }
th small { white-space: normal; max-width: 10rem; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); }
figcaption { font-size: .9rem; padding-top: .5rem; }
pre { background: var(--box); padding: .8rem 1rem; border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .88rem; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dt { font-weight: 600; margin-top: .7rem; }
dd { margin: 0; }
"""


def write_html(comparison: Comparison, path: str | Path) -> Path:
    """Write the report of ``comparison`` to ``path`` as one HTML file and return the path.

    The file holds its pictures and its style and loads nothing. It appears whole or not at all.

    Raises
    ------
    InvalidInput
        If the file cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise InvalidInput(
            f"report: found a directory at {target}, expected a file's path, such as {target / 'report.html'}"
        )
    writable_directory(target.parent)
    text = html(comparison)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)
    except OSError as error:
        raise InvalidInput(
            f"report {target}: {error.strerror or error}; choose a path that can be written to"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def html(comparison: Comparison) -> str:
    """Return the report of ``comparison`` as the text of an HTML page."""
    title = f"{comparison.model} on {comparison.data['name']}"
    sections = [
        _section("In words", _list(headline(comparison), "headline")),
        _section("Summary", _summary_table(comparison) + _failures(comparison)),
        _section("Held-out rows", _heldout_table(comparison)),
        _section("Along the fits", _curves_figure(comparison)),
        _section("Where the nats go", _ledger_figure(comparison)),
        _section("Latent space", _latent_figure(comparison)),
        _section("Every fit", _full_table(comparison)),
        _section("Notes of the fits", _list(notes(comparison))),
        _section("The model", _paragraphs(_about_model(comparison))),
        _section("Data, options, seeds", _pairs_table(_settings(comparison))),
        _section("To reproduce", _reproduction(comparison)),
        _section("Versions", _pairs_table(_versions(comparison.fits))),
        _section("Glossary", _definitions(GLOSSARY)),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)} · elbozoo</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{CSS}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escape(title)}</h1>",
            f'<p class="faint">{escape(_subtitle(comparison))}</p></header>',
            "<main>",
            *filter(None, sections),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


# ---- words -----------------------------------------------------------------------------------------------------------


def headline(comparison: Comparison) -> list[str]:
    """Return what the figures say, in sentences made from them."""
    found = [
        _evidence_sentence(comparison),
        _better_known_sentence(comparison),
        _gap_sentence(comparison),
        _other_order_sentence(comparison),
        _no_bound_sentence(comparison),
        _convergence_sentence(comparison),
    ]
    return [sentence for sentence in found if sentence]


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader of the figures should know of single fits: their own notes, and what the table warns of."""
    found = []
    for fit, row in zip(comparison.fits, comparison.table.to_dict("records"), strict=True):
        of_fit = list(fit.notes)
        if fit.interrupted:
            of_fit.append("interrupted; these are the figures so far")
        if not row["best_member_converged"]:
            of_fit.append(
                "the search for the best q of the family did not converge, so the approximation gap may be too large "
                "and the amortization gap too small by as much"
            )
        if row["khat_max"] > KHAT_LIMIT:
            share = f"{100 * row['khat_share']:.0f} % of the data" if row["khat_share"] < 1 else "all data"
            of_fit.append(
                f"k-hat is up to {number(row['khat_max'], 2)}, above {KHAT_LIMIT} for {share}: importance weights of "
                "its q are unreliable there"
            )
        found += [f"{fit.method}, seed {fit.seed}: {note}" for note in of_fit]
    return found or ["None."]


def _evidence_sentence(comparison: Comparison) -> str:
    means = _means(comparison, "log_evidence")
    if means.empty:
        return "No method gave a figure of log p(x) on these data."
    best, rows = float(means.max()), comparison.data["rows"]
    level = list(means.index[means >= best - LEVEL * rows])
    kinds = _kinds(comparison, level)
    figure = f"log p(x) = {_both(best, rows)}, {' and '.join(KIND_WORDS[kind] for kind in kinds)}"
    if len(means) == 1:
        sentence = f"{level[0]} reaches {figure}."
    elif len(level) == 1:
        second = means.index[1]
        ahead = _both(best - float(means[second]), rows)
        sentence = f"{level[0]} has the best evidence, {figure}: {ahead} more than {second}, which is next."
    elif len(level) == len(means):
        which = "Both" if len(means) == 2 else f"All {len(means)}"
        sentence = f"{which} methods are level within {LEVEL:g} nats per datum: {figure}."
    else:
        sentence = f"{_and(level)} have the best evidence, level within {LEVEL:g} nats per datum: {figure}."
    if "estimate" in _kinds(comparison, means.index):
        sentence += (
            " An estimate lies below the truth in expectation, by more where q is poor: a ranking by it is no proof."
        )
    return sentence


def _better_known_sentence(comparison: Comparison) -> str:
    gaps = _means(comparison, "learning_gap")
    rows = comparison.data["rows"]
    nearest = comparison.table["learning_gap"].min()
    if gaps.empty or not nearest > LEVEL * rows:
        return ""
    return (
        f"The closed form of the maximum is better still: the nearest fit ends {_both(float(nearest), rows)} below it."
    )


def _gap_sentence(comparison: Comparison) -> str:
    gaps, rows = _means(comparison, "gap"), comparison.data["rows"]
    if gaps.empty:
        return ""
    if float(gaps.abs().max()) < LEVEL * rows:
        return f"Every ELBO here touches log p(x) at its own θ within {LEVEL:g} nats per datum."
    method = str(gaps.idxmax())
    gap = float(gaps[method])
    whose = f"The largest gap is that of {method}" if len(gaps) > 1 else f"The gap of {method} is not zero"
    return (
        f"{whose}: its ELBO lies {_both(gap, rows)} below log p(x) at its own θ. {_gap_reason(comparison, method, gap)}"
    )


def _gap_reason(comparison: Comparison, method: str, gap: float) -> str:
    guide = next(fit.guide for fit in comparison.fits if fit.method == method)
    amortization = _means(comparison, "amortization_gap").get(method, math.nan)
    if not guide.is_local:
        return (
            "One q stands for the whole data set, so that what its family cannot express and what optimisation left "
            "are not told apart."
        )
    if not math.isfinite(amortization):
        return "It could not be split, as the best q of its family is not known."
    family = f"no q of the family {guide.family} comes closer at this θ"
    reason = AMORTIZATION_REASONS.get(guide.source, "the family holds a closer q")
    share = amortization / gap
    if share >= MOSTLY:
        return f"Nearly all of it is amortization gap: {reason}."
    if share <= 1 - MOSTLY:
        return f"Nearly all of it is approximation gap: {family}."
    return f"Of it {100 * share:.0f} % is amortization gap ({reason}) and the rest approximation gap ({family})."


def _other_order_sentence(comparison: Comparison) -> str:
    """Say so where the ELBO would have picked another method than the evidence does."""
    evidence, elbo, rows = _means(comparison, "log_evidence"), _means(comparison, "elbo"), comparison.data["rows"]
    evidence = evidence[evidence.index.isin(elbo.index)]
    if elbo.empty or evidence.empty:
        return ""
    by_evidence, by_elbo = str(evidence.idxmax()), str(elbo.idxmax())
    lost = float(evidence[by_evidence] - evidence.get(by_elbo, math.nan))
    if by_evidence == by_elbo or not lost > LEVEL * rows:
        return ""
    less = f"{_both(lost, rows)} less evidence than that of {by_evidence}"
    return f"The ELBO alone would have chosen {by_elbo}, whose θ has {less}."


def _no_bound_sentence(comparison: Comparison) -> str:
    without = list(dict.fromkeys(fit.method for fit in comparison.fits if not fit.guide.is_bound))
    if not without:
        return ""
    have = "has" if len(without) == 1 else "have"
    return f"{_and(without)} {have} a q without a density: no ELBO, no gap, and an objective that bounds nothing."


def _convergence_sentence(comparison: Comparison) -> str:
    counts = comparison.table.groupby("method", sort=False)["converged"].agg(["sum", "count"])
    short = [
        f"{method} {int(row['sum'])} of {row['count']}"
        for method, row in counts.iterrows()
        if row["sum"] < row["count"]
    ]
    if not short:
        return ""
    return (
        f"Not every fit met its convergence test: {_and(short)} did. The figures of the others are where they stopped, "
        "not what the method can reach."
    )


def _means(comparison: Comparison, column: str) -> pd.Series:
    """Mean over the seeds per method, totals, best evidence first, without the methods that have no such figure."""
    return comparison.summary[column, "mean"].dropna()


def _kinds(comparison: Comparison, methods: Iterable[str]) -> list[str]:
    table = comparison.table
    return sorted(table[table["method"].isin(list(methods))]["log_evidence_kind"].dropna().unique())


def _both(total: float, rows: int) -> str:
    """A total with its value per datum."""
    return f"{_total(total)} nats ({number(total / rows, 4)} per datum)"


def _total(value: float) -> str:
    return number(value, 2 if abs(value) >= 0.1 else 4)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _subtitle(comparison: Comparison) -> str:
    data = comparison.data
    sizes = [
        _count(data["rows"], "row"),
        _count(data["columns"], "column"),
        _count(len(_methods(comparison)), "method"),
    ]
    return f"{', '.join(sizes)}, {_seed_words(comparison)}"


def _seeds(comparison: Comparison) -> list[int]:
    return [int(seed) for seed in comparison.table["seed"].unique()]


def _seed_words(comparison: Comparison) -> str:
    seeds = _seeds(comparison)
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


# ---- tables ----------------------------------------------------------------------------------------------------------


def _failures(comparison: Comparison) -> str:
    return "".join(f"<p>{escape(str(failure))}</p>" for failure in comparison.failures)


def _summary_table(comparison: Comparison) -> str:
    rows = comparison.data["rows"]
    is_denoising = bool(comparison.table["denoising_elbo"].notna().any())
    columns = list(SUMMARY_COLUMNS)
    if is_denoising:
        columns.insert(columns.index("elbo") + 1, "denoising_elbo")
    names = {**SUMMARY_COLUMNS, "denoising_elbo": "denoising ELBO"}
    head = ["method", *(names[column] for column in columns), "largest k-hat", "seconds", "converged"]
    body = []
    for method, figures in comparison.summary.iterrows():
        of_method = comparison.table[comparison.table["method"] == method]
        guide, kind = of_method["guide"].iloc[0], ", ".join(_kinds(comparison, [str(method)]))
        cells = [f'<th scope="row">{escape(str(method))}<small>{escape(str(guide))}</small></th>']
        for name in columns:
            if name == "elbo" and not of_method["is_bound"].any():
                cells.append(f"<td>{NOT_A_BOUND}</td>")
                continue
            if name == "denoising_elbo":  # of one model alone, and no part of every summary
                mean, deviation = float(of_method[name].mean()), float(of_method[name].std())
            else:
                mean, deviation = float(figures[name, "mean"]), float(figures[name, "std"])
            small = [number(mean / rows, 4), kind if name == "log_evidence" else ""] if math.isfinite(mean) else []
            cells.append(
                f"<td>{_mean_and_deviation(mean, deviation, 2)}<small>{', '.join(filter(None, small))}</small></td>"
            )
        cells.append(f"<td>{number(of_method['khat_max'].max(), 2)}</td>")
        cells.append(
            f"<td>{_mean_and_deviation(float(figures['seconds', 'mean']), float(figures['seconds', 'std']), 2)}</td>"
        )
        cells.append(f"<td>{int(of_method['converged'].sum())} of {len(of_method)}</td>")
        body.append(cells)
    caption = (
        f"Nats, totals over {_count(rows, 'row')}, mean ± standard deviation over "
        f"{_count(len(_seeds(comparison)), 'seed')}; in small type the guide, the figure per datum, and of which kind "
        "log p(x) is. Best evidence first. An en dash stands where a figure does not apply. "
        "Seconds are those of fitting, without the evaluation. "
        "approximation gap + amortization gap = gap = log p(x) − ELBO."
    )
    return _table(head, body, caption)


def _heldout_table(comparison: Comparison) -> str:
    about = comparison.heldout
    if about is None:
        return ""
    rows = about["rows"]
    body = []
    for method, figures in comparison.summary.iterrows():
        of_method = comparison.table[comparison.table["method"] == method]
        kind = ", ".join(of_method["heldout_log_evidence_kind"].dropna().unique())
        cells = [f'<th scope="row">{escape(str(method))}</th>']
        for name in HELDOUT_COLUMNS:
            if name == "heldout_elbo" and not of_method["is_bound"].any():
                cells.append(f"<td>{NOT_A_BOUND}</td>")
                continue
            mean, deviation = float(figures[name, "mean"]), float(figures[name, "std"])
            small = [number(mean / rows, 4), kind if "evidence" in name else ""] if math.isfinite(mean) else []
            cells.append(
                f"<td>{_mean_and_deviation(mean, deviation, 2)}<small>{', '.join(filter(None, small))}</small></td>"
            )
        body.append(cells)
    part = f"{about['part']} row"
    what = "no fit saw them" if about["part"] == "test" else "no fit learned from them, but they may have ended one"
    caption = (
        f"Nats, totals over {_count(rows, part)}, mean ± standard deviation over the seeds; in small type the figure "
        f"per datum, and of which kind log p(x) is. These rows are not among those of the fits: {what}. "
        "An en dash stands where a method has no q for other rows than its own, and where one latent serves the whole "
        "data set and log p of new rows given those of the fit is not exact."
    )
    return _table(["method", *HELDOUT_COLUMNS.values()], body, caption)


def _full_table(comparison: Comparison) -> str:
    columns = list(comparison.table.columns)
    texts = {"method", "guide", "log_evidence_kind", "heldout_log_evidence_kind"}
    body = []
    for row in comparison.table.to_dict("records"):
        shown = {name: _cell(value) for name, value in row.items()}
        if not row["is_bound"]:
            shown |= dict.fromkeys({"elbo", "heldout_elbo"} & set(shown), NOT_A_BOUND)
        body.append(
            [f'<td class="text">{escape(shown[n])}</td>' if n in texts else f"<td>{shown[n]}</td>" for n in columns]
        )
    caption = (
        "A row per method and seed; nats, totals over the rows. _se is a standard error; for quadrature the error of "
        "the integral. elbo is the bound evaluated at the end; objective is what the method maximised, averaged over "
        "its last hundred steps: two columns, two quantities."
    )
    return _table(columns, body, caption, texts)


def _table(head: Sequence[str], body: Iterable[Sequence[str]], caption: str, texts: Collection[str] = ()) -> str:
    classes = [' class="text"' if name in texts else "" for name in head]
    header = "".join(f'<th scope="col"{c}>{escape(name)}</th>' for name, c in zip(head, classes, strict=True))
    lines = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in body)
    table = f"<table><thead><tr>{header}</tr></thead>\n<tbody>\n{lines}\n</tbody></table>"
    # The caption stands outside the box, so that it does not scroll away with a wide table.
    return f'{_scroll(table, "Table, scrolls sideways")}\n<p class="faint"><small>{escape(caption)}</small></p>'


def _pairs_table(pairs: dict[str, str]) -> str:
    lines = "\n".join(
        f'<tr><th scope="row">{escape(k)}</th><td class="wrap">{escape(v)}</td></tr>' for k, v in pairs.items()
    )
    return _scroll(f"<table><tbody>\n{lines}\n</tbody></table>", "Table")


def _mean_and_deviation(mean: float, deviation: float, decimals: int) -> str:
    if not math.isfinite(mean) or not math.isfinite(deviation):
        return number(mean, decimals)
    return f"{number(mean, decimals)} ± {number(deviation, decimals)}"


def _cell(value: Any) -> str:
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


# ---- pictures --------------------------------------------------------------------------------------------------------


def _curves_figure(comparison: Comparison) -> str:
    ends = "; ".join(
        f"{bar.method} ends at ELBO {number(bar.elbo, 4)} and log p(x) {number(bar.log_evidence, 4)}"
        for bar in plots.ledger(comparison)
    )
    alt = f"Two line charts, against steps and against seconds, in nats per datum, means over the seeds: {ends}."
    caption = (
        "Nats per datum. Solid: the ELBO as the optimiser saw it, averaged over a window that grows with the steps; a "
        "line per seed. Dashed: log p(x) at the θ of the moment, where the model has an exact one. Filled and hollow "
        "marks: ELBO and log p(x), evaluated once more at the end. Dotted: the best log p(x) known on these rows. The "
        "first third of the steps may lie below the picture. An objective that is no ELBO is not drawn. Seconds are "
        "those of the steps; where EM was started several times, those of the start that was kept."
    )
    return _figure(plots.curves(comparison), alt, caption)


def _ledger_figure(comparison: Comparison) -> str:
    parts = "; ".join(
        f"{bar.method}: ELBO {number(bar.elbo, 4)}, amortization gap {number(bar.amortization_gap, 4)}, "
        f"approximation gap {number(bar.approximation_gap, 4)}, learning gap {number(bar.learning_gap, 4)}"
        for bar in plots.ledger(comparison)
    )
    alt = f"Stacked bars, nats per datum, means over the seeds: {parts}."
    caption = (
        "Nats per datum, means over the seeds. Each bar leads from the ELBO through amortization gap, approximation "
        "gap and learning gap to the best log p(x) known on these rows; the ticks are the ELBOs of single seeds. The "
        "axis begins where the differences do, not at 0, so that lengths of the grey parts mean nothing. A gap below 0 "
        "is Monte Carlo noise, or a search for the best q that stopped early; it is drawn with no width. “not a bound” "
        "marks a q without a density."
    )
    if any(not fit.guide.is_local for fit in comparison.fits):
        caption += (
            " Here one q stands for the whole data set: there is nothing to amortize, and what the family cannot "
            "express and what optimisation left are one gap, which the tables call approximation gap."
        )
    return _figure(plots.ledger_bars(comparison), alt, caption)


def _latent_figure(comparison: Comparison) -> str:
    figure = plots.latent_space(comparison)
    if figure is None:
        return ""
    labelled = getattr(comparison, "labels", None) is not None
    alt = "Scatter plots of the mean of q for every datum in the two-dimensional latent space, a panel for each method."
    caption = (
        "The mean of q(z given x) for every row, first seed of each method."
        + (" Colours and marks are the labels of the data, which no method saw." if labelled else "")
        + " Axes of different methods need not agree: many models are the same after a rotation or reflection of z."
    )
    return _figure(figure, alt, caption)


def _figure(figure: Figure, alt: str, caption: str) -> str:
    picture = base64.b64encode(plots.png(figure)).decode("ascii")
    # Narrower than this its letters could not be read; it scrolls instead.
    inches = figure.get_figwidth()
    style = f"min-width: {4 * inches:.1f}rem; max-width: {7 * inches:.1f}rem"
    image = f'<img alt="{escape(alt)}" style="{style}" src="data:image/png;base64,{picture}">'
    return f"<figure>{_scroll(image, 'Picture, scrolls sideways')}<figcaption>{escape(caption)}</figcaption></figure>"


# ---- model, data, options, versions ----------------------------------------------------------------------------------


def _about_model(comparison: Comparison) -> list[str]:
    entry = comparison.fits[0].entry
    if isinstance(entry, Program):
        return ["A program of your own, with no capability beyond its forward pass."]
    parts = [f"{comparison.model}: {entry.summary()}."]
    page = inspect.cleandoc(getattr(inspect.getmodule(type(entry)), "__doc__", None) or "")
    prose = [" ".join(paragraph.split()) for paragraph in page.split("\n\n")[1:2]]
    return parts + [paragraph for paragraph in prose if "$" not in paragraph]  # no formulas: nothing here sets them


def _settings(comparison: Comparison) -> dict[str, str]:
    data = comparison.data
    found = {"data": f"{data['name']}: {_count(data['rows'], 'row')}, {_count(data['columns'], 'column')}"}
    named = list_datasets()
    if data["name"] in named.index:
        facts = named.loc[data["name"]]
        found |= {"description": facts["description"], "source": facts["source"]}
    arguments = data.get("arguments", {})
    if arguments:
        found["what was done to the data"] = _options_text(arguments)
    if comparison.heldout is not None:
        found["held out"] = f"{_count(comparison.heldout['rows'], 'row')} to {comparison.heldout['part']} with"
    found["methods"] = ", ".join(_methods(comparison))
    found["seeds"] = ", ".join(map(str, _seeds(comparison)))
    found["options given"] = _options_text(comparison.options) or "none: all are at their defaults"
    found["options of the model"] = _options_text(comparison.fits[0].entry.options.model_dump()) or "it has none"
    found["options of the guides"] = _options_text(comparison.fits[0].guide_options.model_dump())
    found["objectives"] = ", ".join(dict.fromkeys(f"{fit.method}: {_objective(fit)}" for fit in comparison.fits))
    return found


def _objective(fit: Fit) -> str:
    objective = f"{fit.objective} on corrupted rows" if isinstance(fit.entry, Corrupts) else fit.objective
    return objective if fit.guide.is_bound else f"{objective} ({NOT_A_BOUND}, as q has no density)"


def _options_text(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in options.items())


def _value(value: Any) -> str:
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _methods(comparison: Comparison) -> list[str]:
    return [str(method) for method in comparison.table["method"].unique()]


def _asked(comparison: Comparison) -> list[str]:
    """Methods as they were asked for: all ways to q share a model that was learned before."""
    asked = comparison.data.get("methods")
    return [str(asked)] if asked else _methods(comparison)


def _reproduction(comparison: Comparison) -> str:
    words, code = reproduction(comparison)
    return f"{_paragraphs(words)}\n<pre><code>{escape(code)}</code></pre>"


def reproduction(comparison: Comparison) -> tuple[list[str], str]:
    """Return what to know, and the command that makes this comparison again; Python where there is no command."""
    words = ["On the same machine with the same versions every figure but the seconds comes out the same."]
    source, about_source = _data_source(comparison.data, _rows_in_all(comparison))
    is_program = isinstance(comparison.fits[0].entry, Program)
    if is_program:
        words.append("The model is a program of your own, so Python runs it and the command line cannot.")
    words += about_source
    seeds = _seeds(comparison)
    is_counted = seeds == list(range(len(seeds)))
    loading, preparing = _arguments(comparison.data)
    own = [name for name, value in preparing.items() if value == OWN]
    words += [f"Its {name} rows came from memory: pass the same rows as {name}." for name in own]
    in_one_call = "seed" not in comparison.data.get("arguments", {})
    if not is_program and is_counted and not own and in_one_call and source == repr(comparison.data["name"]):
        return words, _command(comparison)
    if loading:
        source = f"ez.load_data({source}, {_keywords(loading)})"
    arguments = [
        "program" if is_program else repr(comparison.model),
        source,
        f"methods={_asked(comparison)!r}",
        f"seeds={len(seeds) if is_counted else seeds!r}",
        *([_keywords(preparing)] if preparing else []),
        *(f"{option}={value!r}" for option, value in comparison.options.items()),
    ]
    return words, f"import elbozoo as ez\n\nez.compare({', '.join(arguments)}).report('report.html')"


def _arguments(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what loads the data beside their name, and what was done to them after that."""
    given = data.get("arguments", {})
    at_loading = (*LOADING, "binarise", "seed") if "seed" in given else LOADING
    loading = {name: value for name, value in given.items() if name in at_loading}
    return loading, {name: value for name, value in given.items() if name not in loading}


def _keywords(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={name if value == OWN else repr(value)}" for name, value in arguments.items())


def _rows_in_all(comparison: Comparison) -> int:
    """Number of rows before shares of them were held out."""
    rows, about = int(comparison.data["rows"]), comparison.heldout or {}
    shares = {part for part, value in comparison.data.get("arguments", {}).items() if isinstance(value, float)}
    if "validation" in shares:
        rows += about["validation_rows"]
    return rows + (about["rows"] if "test" in shares else 0)


def _data_source(data: dict[str, Any], rows: int) -> tuple[str, list[str]]:
    """Return the data as Python that loads them, and what to know about that."""
    name, named = str(data["name"]), list_datasets()
    if name.startswith(SIMULATE):
        seed = "The data were simulated with seed 0, unless another was given."
        return (repr(name) if rows == SIMULATED_ROWS else f"ez.load_data({name!r}, rows={rows})"), [seed]
    if name in named.index:
        if rows != named.loc[name, "rows"] and "split" not in data.get("arguments", {}):
            return "x", [f"Of the rows of {name}, {rows} were picked: pass the same rows as x."]
        picked = data["columns"] != named.loc[name, "columns"]
        words = f"Of the columns of {name}, {data['columns']} were picked: name them with --columns or columns=[...]."
        return repr(name), [words] if picked else []
    if Path(name).suffix.lower() in FILE_SUFFIXES or "stream" in data.get("arguments", {}):
        what = "file" if Path(name).suffix else "folder"
        return repr(name), [f"The data came from a {what}: give its path, and the same columns if some were picked."]
    return "x", ["The data came from memory, a folder or Dask, not from a name or a file: pass the same rows as x."]


def _command(comparison: Comparison) -> str:
    methods, seeds = ",".join(_asked(comparison)), str(len(_seeds(comparison)))
    command = ["elbozoo", "compare", comparison.model, "--data", str(comparison.data["name"])]
    for name, value in comparison.data.get("arguments", {}).items():
        flag = name.replace("_", "-")
        command += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    command += ["--methods", methods, "--seeds", seeds]
    for option, value in comparison.options.items():
        command += ["--set", f"{option}={_value(value)}"]
    return shlex.join(command)


def _versions(fits: Sequence[Fit]) -> dict[str, str]:
    names = dict.fromkeys(name for fit in fits for name in fit.provenance)
    return {n: ", ".join(dict.fromkeys(fit.provenance[n] for fit in fits if n in fit.provenance)) for n in names}


# ---- pieces of HTML --------------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _scroll(content: str, label: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>'


def _list(items: Iterable[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<ul{attribute}>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"


def _paragraphs(texts: Iterable[str]) -> str:
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)


def _definitions(terms: dict[str, str]) -> str:
    return "<dl>\n" + "\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in terms.items()) + "\n</dl>"
