"""What a comparison says in words: a headline made from its figures, notes of single fits, and a glossary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from elbozoo.inference.comparison import Comparison
from elbozoo.series import number
from elbozoo.words import NOT_A_BOUND

LEVEL = 1e-3  # nats per datum; figures closer than this are called level

MOSTLY = 0.995

KHAT_LIMIT = 0.7

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
    kinds = kinds_of(comparison, level)
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
    if "estimate" in kinds_of(comparison, means.index):
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


def kinds_of(comparison: Comparison, methods: Iterable[str]) -> list[str]:
    """Return of which kinds the evidence of ``methods`` is."""
    table = comparison.table
    return sorted(table[table["method"].isin(list(methods))]["log_evidence_kind"].dropna().unique())


def _both(total: float, rows: int) -> str:
    """A total with its value per datum."""
    return f"{_total(total)} nats ({number(total / rows, 4)} per datum)"


def _total(value: float) -> str:
    return number(value, 2 if abs(value) >= 0.1 else 4)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def subtitle(comparison: Comparison) -> str:
    """Return the sizes of a comparison in words."""
    data = comparison.data
    sizes = [
        counted(data["rows"], "row"),
        counted(data["columns"], "column"),
        counted(len(methods_of(comparison)), "method"),
    ]
    return f"{', '.join(sizes)}, {_seed_words(comparison)}"


def seeds_of(comparison: Comparison) -> list[int]:
    """Return the seeds, in the order of the table."""
    return [int(seed) for seed in comparison.table["seed"].unique()]


def _seed_words(comparison: Comparison) -> str:
    seeds = seeds_of(comparison)
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def counted(n: int, noun: str) -> str:
    """Return ``n`` with thousands set apart and ``noun`` in the singular or plural."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def methods_of(comparison: Comparison) -> list[str]:
    """Return the methods, in the order of the table."""
    return [str(method) for method in comparison.table["method"].unique()]
