"""Small runs that show what a family can and cannot express, what a source costs, and what a method does.

Each function returns the cells of a page; sentences with figures are made from what the cells before them computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elbozoo.notebook import write_page
from elbozoo.notebook.cells import Code, Text, execute
from elbozoo.plots import number

Cells = list[Text | Code]
Names = Mapping[str, Any]

SETUP = """
import matplotlib.pyplot as plt
import torch

import elbozoo as ez
from elbozoo import plots

plt.rcParams.update(plots.STYLE)
"""


def write_example(kind: str, name: str, page: Path) -> None:
    """Run the example of ``kind`` about ``name``, and write it as a notebook."""
    opening, *cells = EXAMPLES[kind](name)
    write_page(execute([opening, Code(SETUP), *cells]), page)


# ---- families --------------------------------------------------------------------------------------------------------


def of_family(name: str) -> Cells:
    """Two posteriors over two numbers, a correlated normal one and a bent one, each with the family's closest q."""
    if name == "categorical":
        return _finite_family()
    program = f"""
import pyro
from pyro import distributions as dist


def linear(batch, curve=lambda z: z[..., :1] + z[..., 1:]):
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(curve(z), 0.4).to_event(1), obs=batch.x)


def bent(batch):
    return linear(batch, lambda z: z[..., :1] + z[..., 1:] ** 2)


x = torch.ones(2, 1).double()  # the same datum twice: a data set has two rows at least
settings = dict(steps=1500, learning_rate=0.05, schedule="cosine", particles=8, seed=0)
fits = {{program.__name__: ez.fit(program, x, guide="free-{name}", **settings) for program in (linear, bent)}}
"""
    grid = """
axis = torch.linspace(-3, 3, 241).double()
z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
means = {"linear": z.sum(-1), "bent": z[..., 0] + z[..., 1] ** 2}
logs, evidence = {}, {}
for which, mean in means.items():
    joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(mean, 0.4).log_prob(x[0, 0])
    evidence[which] = float(joint.flatten().logsumexp(0) + 2 * (axis[1] - axis[0]).log())
    logs[which] = joint - evidence[which]
"""
    draw = """
figure, panels = plt.subplots(2, 1, figsize=(4.2, 7.6))
for axes, (which, fit) in zip(panels, fits.items()):
    draws = fit.to_inferencedata(draws=400).posterior["z"].values[0, :, 0]
    axes.contourf(axis, axis, logs[which].exp(), levels=8, cmap="Greys")
    axes.plot(*draws.T, ".", color=plots.PALETTE[0], markersize=3, alpha=0.6)
    axes.set(title=f"{which}: posterior grey, draws of q blue", xlabel="first number of z", ylabel="second")
figure.tight_layout()
"""
    return [
        Text(
            "## What it can express\n\nTwo programs over two numbers, and one datum. The posterior of the first is a "
            "normal in which the numbers depend on each other; that of the second is bent. A grid gives "
            "$\\log p(x)$ and the posterior."
        ),
        Code(program),
        Code(grid),
        Code(
            draw,
            alt=f"Two posteriors over two numbers in grey, and draws of the closest q of {name} in blue",
            caption="Each posterior in grey, and 400 draws of the q that was fitted to it.",
        ),
        Text(lambda run: _family_text(name, run)),
    ]


def _family_text(name: str, run: Names) -> str:
    if not run["fits"]["linear"].guide.is_bound:
        return (
            f"A `{name}` puts all its mass on one point. It has no density, so there is no ELBO to hold against "
            "$\\log p(x)$: what was raised is the height of $\\log p(x, z)$."
        )
    gaps = {which: run["evidence"][which] - fit.elbo() / 2 for which, fit in run["fits"].items()}
    figures = ", and ".join(f"{number(max(gap, 0.0), 3)} nats for the {which} program" for which, gap in gaps.items())
    return f"What is left of the gap $\\log p(x) - \\mathrm{{ELBO}}$: {figures}."


def _finite_family() -> Cells:
    fit = """
fit = ez.fit("gaussian-mixture", "iris", guide="free-categorical", components=3, steps=800, learning_rate=0.1, seed=0)
with torch.no_grad():
    exact, q = fit.entry.posterior(fit.x).probs, fit.transform()
"""
    draw = """
figure, axes = plt.subplots(figsize=(4.2, 3.8))
for component in range(3):
    axes.plot(exact[:, component], q[:, component], plots.MARKERS[component], label=f"component {component + 1}")
axes.axline((0, 0), slope=1, color=plots.FAINT, linewidth=1)
axes.set(xlabel="probability, exact posterior", ylabel="probability, q")
axes.legend()
figure.tight_layout()
"""
    return [
        Text(
            "## What it can express\n\nEvery distribution over finitely many values, the posterior among them. The "
            "component of each iris:"
        ),
        Code(fit),
        Code(
            draw,
            alt="Probabilities of three components under q against those of the exact posterior",
            caption="Each point is a component of an iris; on the line q is right.",
        ),
        Text(
            lambda run: (
                f"The two differ by {number(float((run['q'] - run['exact']).abs().max()), 4)} at most, which is what "
                "the optimiser has left undone."
            )
        ),
    ]


# ---- sources ---------------------------------------------------------------------------------------------------------


def of_source(name: str) -> Cells:
    """Five ways to a q on one θ, so that the rows differ in q alone."""
    fit = """
comparison = ez.compare("ppca", "iris", methods="all", latent_dim=2, steps=1000, seeds=1, progress=False)
shown = ["elbo", "log_evidence", "gap", "approximation_gap", "amortization_gap"]
comparison.table.set_index("method")[shown].astype(float).round(3)
"""
    draw = f"""
fit = next(each for each in comparison.fits if each.method == "{name}")
with torch.no_grad():
    exact = fit.entry.posterior(fit.x).mean
q = fit.transform()

figure, panels = plt.subplots(2, 1, figsize=(4.2, 7.2))
for dimension, axes in enumerate(panels):
    axes.plot(exact[:, dimension], q[:, dimension], ".", color=plots.PALETTE[0])
    axes.axline((0, 0), slope=1, color=plots.FAINT, linewidth=1)
    axes.set(xlabel=f"mean of z, number {{dimension + 1}}, exact posterior", ylabel="mean of z, q")
figure.tight_layout()
"""
    return [
        Text(
            "## What it costs\n\nPPCA of the irises, θ learned once, and then every way to a q fitted to it: the rows "
            "differ in q alone. Totals over 150 rows, in nats."
        ),
        Code(fit),
        Code(
            draw,
            alt=f"Mean of q of each row under {name} against the mean of the exact posterior",
            caption="Each point is an iris; on the line q has the mean of the posterior.",
        ),
        Text(lambda run: _source_text(name, run["comparison"].table.set_index("method").loc[name])),
    ]


def _source_text(name: str, row: Any) -> str:
    return (
        f"With `{name}` the bound lies {number(row.gap, 2)} nats below $\\log p(x)$: {number(row.amortization_gap, 2)} "
        f"of amortization, which belong to the source, and {number(row.approximation_gap, 2)} of approximation, which "
        "belong to the family."
    )


# ---- global latents --------------------------------------------------------------------------------------------------


def of_autoguide(name: str) -> Cells:
    """Two coefficients of a logistic regression on few rows, the posterior by a grid."""
    fit = f"""
data = ez.load_data("simulate:logistic-regression", rows=25, seed=3)
fit = ez.fit("logistic-regression", data, guide="{name}", steps=800, learning_rate=0.02, schedule="cosine", seed=0)
draws = fit.to_inferencedata(draws=1000).posterior["coefficients"].values.reshape(-1, 2)
"""
    draw = """
reference = ez.fit("logistic-regression", data, method="nuts", chains=1, warmup=100, draws=500, seed=0)
exact = reference.to_inferencedata(draws=500).posterior["coefficients"].values.reshape(-1, 2)

figure, axes = plt.subplots(figsize=(4.2, 3.8))
axes.plot(*exact.T, ".", color=plots.FAINT, markersize=3, alpha=0.5, label="posterior, by NUTS")
axes.plot(*draws.T, ".", color=plots.PALETTE[1], markersize=3, alpha=0.5, label="q")
axes.set(xlabel="first coefficient", ylabel="second coefficient")
axes.legend(markerscale=4)
figure.tight_layout()
"""
    return [
        Text(
            "## A posterior that is no normal\n\nTwo coefficients of a logistic regression on 25 rows, for which "
            "quadrature knows $\\log p(x)$."
        ),
        Code(fit),
        Code(
            draw,
            alt=f"Draws of two coefficients by NUTS, and of q by {name}",
            caption="Draws of the posterior, and of q.",
        ),
        Text(_autoguide_text),
    ]


def _autoguide_text(run: Names) -> str:
    ledger = run["fit"].ledger()
    if not ledger.is_bound:
        return "All draws of q are one point. It has no density, so there is no ELBO and no gap."
    return (
        f"The ELBO is {number(ledger.elbo, 3)} nats and $\\log p(x)$ {number(ledger.log_evidence, 3)}, by quadrature: "
        f"a gap of {number(ledger.gap, 3)}."
    )


# ---- all sites together ----------------------------------------------------------------------------------------------

WHOLE = {
    "bottom-up": ("hierarchical-vae", "amortized-diagonal-normal"),
    "ladder": ("hierarchical-vae", "amortized-diagonal-normal"),
    "label-then-latent": ("semi-supervised-vae", "amortized-diagonal-normal"),
    "product-of-normals": ("multi-level-vae", "free-diagonal-normal"),
    "product-of-normals-and-prior": ("multi-level-vae", "free-diagonal-normal"),
}


def of_whole(name: str) -> Cells:
    """The guide beside one that treats the sites as independent, on data of the model's own."""
    model, other = WHOLE[name]
    compare = f"""
methods = ["{name}", "{other}"]
settings = dict(seeds=1, steps=300, learning_rate=0.02, schedule="cosine")
data = ez.load_data("simulate:{model}", rows=80, seed=0)
comparison = ez.compare("{model}", data, methods=methods, progress=False, **settings)
comparison.table.set_index("method")[["elbo", "log_evidence", "log_evidence_se", "gap", "seconds"]].round(2)
"""
    draw = """
figure, axes = plt.subplots(figsize=(4.6, 3.4))
smoothed = [fit.trajectory["elbo"].rolling(20, min_periods=1).mean() for fit in comparison.fits]
for fit, elbo, colour in zip(comparison.fits, smoothed, plots.PALETTE):
    axes.plot(fit.trajectory["step"], elbo, color=colour, label=fit.method)
axes.set(xlabel="step", ylabel="ELBO, nats, total")
axes.set_ylim(bottom=min(elbo.quantile(0.1) for elbo in smoothed))
axes.legend()
figure.tight_layout()
"""
    return [
        Text(
            f"## Beside sites that do not know of each other\n\nThe same rows of `{model}` "
            f"by this guide and by `{other}`; totals, in nats."
        ),
        Code(compare),
        Code(
            draw,
            alt=f"ELBO against steps of {name} and of {other}, smoothed over 20 steps",
            caption="ELBO against steps, smoothed over 20 of them.",
        ),
    ]


# ---- methods ---------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[str, str, str]] = {
    "em": (
        "Three components for the irises. Each E step puts the bound on $\\log p(x)$, each M step lifts both.",
        'fit = ez.fit("gaussian-mixture", "iris", method="em", components=3, restarts=3, seed=0)',
        "log_evidence",
    ),
    "closed-form": (
        "The global maximum of PPCA's likelihood is an eigendecomposition (Tipping & Bishop 1999): one step.",
        'fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2)',
        "",
    ),
    "cavi": (
        "A mean-field q over the weights, means and precisions of a mixture, each factor in turn set to its optimum.",
        'fit = ez.fit("bayesian-gaussian-mixture", "iris", method="cavi", components=3, restarts=3, seed=0)',
        "elbo",
    ),
    "nuts": (
        "Coefficients of a regression, whose posterior is known as well: draws of two chains.",
        'data = ez.load_data("simulate:linear-regression", rows=60, seed=0)\n'
        'fit = ez.fit("linear-regression", data, method="nuts", chains=2, warmup=100, draws=200, seed=0)',
        "",
    ),
    "svi": (
        "Mean-field variational inference of PPCA, by gradients of the ELBO.",
        'fit = ez.fit("ppca", "iris", guide="mean-field", latent_dim=2, steps=1500, learning_rate=0.05, seed=0)',
        "elbo",
    ),
}


def of_method(name: str) -> Cells:
    """A fit, its figures, and its way there."""
    text, fit, climbs = METHODS[name]
    shown = '["elbo", "elbo_se", "log_evidence", "gap"]'
    cells: Cells = [
        Text(f"## An example\n\n{text}"),
        Code(f'{fit}\nledger = fit.ledger()\nledger[{shown}].to_frame("nats, total").astype(float).round(3)'),
    ]
    if name == "nuts":
        return [*cells, *_chains()]
    if climbs:
        cells += [
            Code(
                f"""
way = fit.trajectory.dropna(subset=["{climbs}"])
figure, axes = plt.subplots(figsize=(4.6, 3.4))
axes.plot(way["step"], way["{climbs}"], color=plots.PALETTE[0])
axes.axhline(ledger.log_evidence, color=plots.INK, linestyle="--", linewidth=1)
axes.set(xlabel="step", ylabel="nats, total", title="{climbs.replace("log_evidence", "log p(x)")} along the fit")
axes.set_ylim(*way["{climbs}"].quantile([0.1, 1.0]) + [0, 5])
figure.tight_layout()
""",
                alt=f"What {name} raises against its steps; the dashed line is the evidence at the end",
                caption="The dashed line is $\\log p(x)$ at the end.",
            )
        ]
    return [*cells, Text(_method_text)]


def _method_text(run: Names) -> str:
    ledger, fit = run["ledger"], run["fit"]
    steps = int(fit.trajectory["step"].max())
    ended = "and converged" if fit.converged else "and stopped there"
    known = {"exact": "exactly", "quadrature": "by quadrature", "estimate": "estimated"}.get(ledger.log_evidence_kind)
    evidence = f", and $\\log p(x)$ {number(ledger.log_evidence, 3)}, known {known}" if known else ""
    return f"It took {steps} step{'' if steps == 1 else 's'} {ended}. The ELBO is {number(ledger.elbo, 3)}{evidence}."


def _chains() -> Cells:
    compare = """
exact = ez.fit("linear-regression", data, guide="exact").to_inferencedata(draws=400).posterior
chains = fit.to_inferencedata(draws=400).posterior
figure, axes = plt.subplots(figsize=(4.6, 3.4))
for label, each, colour in [("exact", exact, plots.FAINT), ("NUTS", chains, plots.PALETTE[1])]:
    first = each["coefficients"].values.reshape(-1, each["coefficients"].shape[-1])[:, 0]
    axes.hist(first, bins=40, density=True, histtype="step", color=colour, label=label)
axes.set(xlabel="first coefficient", ylabel="density")
axes.legend()
figure.tight_layout()
"""
    return [
        Code(
            compare,
            alt="Histograms of the first coefficient: exact posterior and draws of NUTS",
            caption="The first coefficient: draws of the exact posterior and of two chains.",
        ),
        Text(_agreement),
    ]


def _agreement(run: Names) -> str:
    first = {which: run[which]["coefficients"].values[..., 0] for which in ("exact", "chains")}
    distance = abs(first["chains"].mean() - first["exact"].mean()) / first["exact"].std()
    return f"The two means of it are {number(float(distance), 3)} posterior standard deviations apart."


EXAMPLES: dict[str, Callable[[str], Cells]] = {
    "families": of_family,
    "sources": of_source,
    "autoguides": of_autoguide,
    "whole": of_whole,
    "methods": of_method,
}
