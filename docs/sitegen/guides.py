"""Pages about guides: each family, source, automatic guide and guide of all sites together."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributions import constraints

from elbozoo.api import guide_overview
from elbozoo.guides.autoguides import AUTOGUIDES, GlobalGuide
from elbozoo.guides.base import GuideOptions
from elbozoo.guides.families import FAMILIES, Family
from elbozoo.guides.grouped import OfMembers
from elbozoo.guides.local import ExactGuide
from elbozoo.guides.registry import LOCAL_NAMES, WHOLE_GUIDES, guide_cards
from elbozoo.guides.sources import SOURCES
from elbozoo.models.contract.entry import Entry, HasPosterior
from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.models.contract.sites import LatentSite
from elbozoo.pages import code_block, markdown_table
from sitegen.markdown import definitions, first_paragraph, names, page, prose, source_of, toctree

ROWS = 20
CONTAINED = 1e-8  # nats per datum: rounding of a KL between members in float64 stays below 1e-12

# q of one datum: λ are its parameters, f the networks of a flow, c its context, S the latent's support.
FORMULAS = {
    "delta": r"q_\lambda(z) = \delta(z - \lambda)",
    "diagonal-normal": r"q_\lambda(z) = \mathcal N\bigl(z \mid m, \mathrm{diag}(s^2)\bigr), \qquad "
    r"\lambda = (m, \log s)",
    "full-rank-normal": r"q_\lambda(z) = \mathcal N(z \mid m, L L^\top), \qquad \lambda = (m, \log \mathrm{diag}\,L, "
    r"\text{rows of } L \text{ below it})",
    "low-rank-normal": r"q_\lambda(z) = \mathcal N\bigl(z \mid m, F F^\top + \mathrm{diag}(s^2)\bigr), \qquad "
    r"\lambda = (m, \log s, F)",
    "flow": r"z = m + s \odot f_c(\varepsilon), \quad \varepsilon \sim \mathcal N(0, I), \qquad "
    r"\log q_\lambda(z) = \log \mathcal N(\varepsilon \mid 0, I) - \log\Bigl|\det \frac{\partial z}{\partial "
    r"\varepsilon}\Bigr|, \quad \lambda = (m, \log s, c)",
    "categorical": r"q_\lambda(z = k) = \frac{e^{\lambda_k}}{\sum_j e^{\lambda_j}}",
}
SOURCE_FORMULAS = {
    "shared": r"\lambda_n = \lambda",
    "free": r"\lambda_1, \dots, \lambda_N \text{ each a parameter of its own}",
    "amortized": r"\lambda_n = g_\varphi(x_n), \qquad g_\varphi \text{ an encoder}",
    "semi-amortized": r"\lambda_n^{(0)} = g_\varphi(x_n), \qquad \lambda_n^{(t+1)} = \lambda_n^{(t)} + "
    r"\rho_t \tilde\nabla_\lambda \mathrm{ELBO}_n(\lambda_n^{(t)})",
}
GLOBAL_FORMULAS = {
    **FORMULAS,
    "laplace": r"q(z) = \mathcal N\bigl(z \mid \hat z, (-\nabla^2 \log p(x, \hat z))^{-1}\bigr)",
}
# Names of the options that a family or a source reads, beside those of the fit.
FAMILY_OPTIONS = {
    "delta": [],
    "diagonal-normal": ["initial_scale"],
    "full-rank-normal": ["initial_scale"],
    "low-rank-normal": ["initial_scale", "rank"],
    "flow": ["initial_scale", "flow", "flow_layers"],
    "categorical": [],
}
ENCODER = ["encoder", "encoder_input", "hidden", "layers", "channels", "image_shape"]
SOURCE_OPTIONS = {
    "shared": [],
    "free": [],
    "amortized": ENCODER,
    "semi-amortized": [*ENCODER, "refinements", "refinement_rate", "refinement_gradient"],
}


def example_runs() -> list[tuple[str, str]]:
    """Return kind and name of each page about guides that shows a run."""
    return [
        *(("families", name) for name in FAMILIES),
        *(("sources", name) for name in SOURCES),
        *(("autoguides", name) for name in AUTOGUIDES),
        *(("whole", guide.NAME) for guide in WHOLE_GUIDES),
    ]


def texts(examples: Mapping[str, Entry]) -> dict[str, str]:
    """Return the text of every page about guides by kind and name, without its run."""
    models = models_by_guide(examples)
    return {
        **{f"guides/families/{name}": _family(name, models, examples) for name in FAMILIES},
        **{f"guides/sources/{name}": _source(name, models) for name in SOURCES},
        **{f"guides/autoguides/{name}": _autoguide(name, models) for name in AUTOGUIDES},
        **{f"guides/whole/{guide.NAME}": _whole(guide, models) for guide in WHOLE_GUIDES},
    }


def models_by_guide(examples: Mapping[str, Entry]) -> dict[str, list[str]]:
    """Return the entries that each guide fits, by the guide's name."""
    fitting: dict[str, list[str]] = {}
    for model, entry in examples.items():
        for card in guide_cards(entry):
            fitting.setdefault(card.name, []).extend([] if card.refusal else [model])
    return fitting


def overview() -> str:
    """Return the page of all guides."""
    rows = [[f"`{g.Index}`", g.family, g.source, names(g.models.split(", "))] for g in guide_overview().itertuples()]
    kinds = {
        "Families": ("families", FAMILIES),
        "Sources": ("sources", SOURCES),
        "All sites together": ("whole", {guide.NAME: guide for guide in WHOLE_GUIDES}),
    }
    tables = [
        block
        for title, (kind, members) in kinds.items()
        for block in (f"## {title}", INTRODUCTIONS[kind], _linked(kind, members))
    ]
    autoguides = [[_link("autoguides", name), _of_pyro(name)] for name in AUTOGUIDES]
    return page(
        "# Guides",
        "A guide is a *family* of distributions fed by a *source* of its parameters. The approximation gap belongs to "
        "the family, the amortization gap to the source. `mean-field` and `amortized` alone mean the family that suits "
        "the latent.",
        *tables,
        f"`exact`: {first_paragraph(ExactGuide)}",
        "## Global latents",
        "One latent for the whole data set takes one of Pyro's automatic guides; there is one q and nothing to "
        "amortize, so the source is `global`.",
        markdown_table(["guide", "class of Pyro"], autoguides),
        "## Which guide fits which model",
        "A pair that makes no sense is refused with the reason, which `elbozoo guides MODEL` shows.",
        markdown_table(["guide", "family", "source", "models"], rows),
        *(
            toctree([f"guides/{kind}/{name}" for name in members], title)
            for title, (kind, members) in {**kinds, "Global latents": ("autoguides", AUTOGUIDES)}.items()
        ),
    )


INTRODUCTIONS = {
    "families": "What q can be at best.",
    "sources": "Where the parameters of each datum's q come from.",
    "whole": "Guides that are no product of one family, for programs whose latents depend on each other.",
}


def _linked(kind: str, members: Mapping[str, Any]) -> str:
    rows = [[_link(kind, name), first_paragraph(member)] for name, member in members.items()]
    return markdown_table(["name", "what it is"], rows)


def _link(kind: str, name: str) -> str:
    return f"[`{name}`](guides/{kind}/{name}.ipynb)"


# ---- families and sources --------------------------------------------------------------------------------------------


def _family(name: str, models: Mapping[str, list[str]], examples: Mapping[str, Entry]) -> str:
    family = FAMILIES[name]
    guides = [guide for guide, (which, _) in LOCAL_NAMES.items() if which == name]
    fitting = [model for model in examples if any(model in models[guide] for guide in guides)]
    contained = [model for model in fitting if contains_posterior(family, examples[model])]
    facts = {
        "guides": names(guides),
        "parameters of one q": _sizes(family),
        "options": names(FAMILY_OPTIONS[name]) or "none of its own",
        "gap": "the approximation gap: what the best member leaves of $\\log p(x) - \\mathrm{ELBO}$"
        + (", for a point mass not defined" if name == "delta" else ""),
        "contains the posterior of": _contained(family, contained),
        "models": _models(fitting),
    }
    return page(
        f"# The family `{name}`",
        *prose(family),
        f"$$\n{FORMULAS[name]}\n$$",
        definitions(facts),
        "The posterior counts as contained where the member that is closest to it, in closed form, has KL zero to it "
        f"on {ROWS} rows drawn from the entry, with parameters drawn at random."
        if contained
        else "",
        "## In the code",
        source_of(family.distribution),
    )


def _contained(family: type[Family], found: list[str]) -> str:
    if family.name == "delta":
        return "no entry: a point mass has no density"
    if family.closest is Family.closest:
        return "not to be said in closed form; the runs below measure what is left of the gap"
    return _models(found) or "no entry"


def _source(name: str, models: Mapping[str, list[str]]) -> str:
    source = SOURCES[name]
    guides = [guide for guide, (_, which) in LOCAL_NAMES.items() if which == name]
    fitting = sorted({model for guide in guides for model in models[guide]})
    facts = {
        "guides": names(guides),
        "options": names(SOURCE_OPTIONS[name]) or "none of its own",
        "gap": "the amortization gap: from the best member of the family down to this q",
        "q of new rows": "none: it knows no datum but those of the fit" if name == "free" else "yes",
        "models": _models(fitting),
    }
    return page(
        f"# The source `{name}`",
        *prose(source),
        f"$$\n{SOURCE_FORMULAS[name]}\n$$",
        definitions(facts),
        "## In the code",
        source_of(source.forward),
    )


def _sizes(family: type[Family]) -> str:
    if family.discrete:
        return "as many as there are values"
    counts = [f"{_size(family, dim)} for {dim} numbers" for dim in (2, 10)]
    return ", ".join(counts) + (", and networks that all data share" if family.name == "flow" else "")


def _size(family: type[Family], dim: int) -> int:
    site = LatentSite("z", torch.Size([dim]), constraints.real_vector, is_local=True, cardinality=None)
    return family(site, GuideOptions()).size


def contains_posterior(family: type[Family], entry: Entry) -> bool:
    """Whether the posterior of every datum is a member, by the KL of the closest one, on rows drawn from the entry."""
    if not isinstance(entry, HasPosterior) or isinstance(entry, SequenceEntry):
        return False
    x = entry.simulate(ROWS, seed=0)[0].to(entry.dtype)
    sites = entry.latent_sites(x)
    if len(sites) != 1 or not sites[0].is_local:
        return False
    posterior = entry.posterior(x)
    closest = family(sites[0], GuideOptions()).closest(posterior)
    if closest is None:
        return False
    member = family(sites[0], GuideOptions()).distribution(closest)
    return bool(torch.distributions.kl_divergence(member, posterior).max() < CONTAINED)


def _models(found: Iterable[str]) -> str:
    return ", ".join(f"[`{name}`](../../models/{name}.ipynb)" for name in found)


# ---- guides of all latents at once -----------------------------------------------------------------------------------


def _autoguide(name: str, models: Mapping[str, list[str]]) -> str:
    facts = {
        "made by": _of_pyro(name),
        "gap": "of the family, and what the optimiser has left undone; there is nothing to amortize",
        "models": _models(models[name]),
    }
    return page(
        f"# The guide `{name}` of global latents",
        *prose(GlobalGuide),
        f"$$\n{GLOBAL_FORMULAS[name]}\n$$",
        "Here $z$ are all global latents side by side, each carried to the real numbers by the bijection of its "
        "support.",
        definitions(facts),
        "## In the code",
        code_block(inspect.getsource(AUTOGUIDES[name]).strip().rstrip(","), "python"),
    )


def _of_pyro(name: str) -> str:
    source = inspect.getsource(AUTOGUIDES[name])
    return "`" + source.partition("autoguide.")[2].partition("(")[0] + "`"


def _whole(guide: Any, models: Mapping[str, list[str]]) -> str:
    facts = {
        "gap": "both: what no member of its form can say, and what its encoder says amiss",
        "options": names(ENCODER),
        "models": _models(models[guide.NAME]),
    }
    q = guide.members if issubclass(guide, OfMembers) else guide.conditionals
    return page(f"# The guide `{guide.NAME}`", *prose(guide), definitions(facts), "## In the code", source_of(q))
