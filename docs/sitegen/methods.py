"""Pages about methods: what turns a model, data and a seed into a fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from elbozoo.guides.base import GuideOptions
from elbozoo.inference.cavi import CAVIOptions
from elbozoo.inference.em import EMOptions
from elbozoo.inference.method import SPECIAL, default_methods, method_names
from elbozoo.inference.monte_carlo_em import MonteCarloEMOptions
from elbozoo.inference.nuts import NUTSOptions
from elbozoo.inference.objectives import OBJECTIVES
from elbozoo.inference.training import TrainingOptions
from elbozoo.models.contract.entry import Entry, SupportsEM
from elbozoo.models.contract.options import Options
from elbozoo.pages import code_block, markdown_table, options_table
from sitegen.markdown import definitions, names, page, toctree

METHODS = (*SPECIAL, "svi")
SUMMARIES = {
    "em": "expectation maximisation, in closed form where the entry has it, otherwise with Monte Carlo draws",
    "closed-form": "the global maximum of the likelihood, where it is known; the exact posterior without θ",
    "cavi": "coordinate ascent on a mean-field q, each factor set in turn to its optimum",
    "nuts": "the reference posterior of global latents: Pyro's NUTS, with r-hat, ESS and divergences",
    "svi": "stochastic variational inference with the guide whose name stands for the method",
}
STORIES = {
    "em": r"""
The E step sets q to the posterior at the present θ, which closes the gap; the M step raises the bound over θ. So the
bound touches $\log p_\theta(x)$ after each E step, and neither ever falls (Dempster, Laird & Rubin 1977; Neal & Hinton
1998):

$$
q^{(t)} = p_{\theta^{(t)}}(z \mid x), \qquad
\theta^{(t+1)} = \operatorname*{arg\,max}_\theta\, E_{q^{(t)}}[\log p_\theta(x, z)]
$$

Where a posterior is not known, draws by importance sampling or Markov chains take its place (Wei & Tanner 1990).""",
    "closed-form": r"""
Where the likelihood has a global maximum that can be written down, it is taken:
$\theta^* = \operatorname{arg\,max}_\theta \log p_\theta(x)$. Against it the ledger measures the learning gap of every
other method. An entry without θ has nothing to maximise, and its fit is the exact posterior.""",
    "cavi": r"""
q is a product of factors, and each in turn is set to the best one given the others (Bishop 2006, equation 10.9):

$$
\log q_j(z_j) = E_{q_{i \ne j}}[\log p(x, z)] + \text{const}
$$

In conjugate programs the factors keep the family of their priors, every step is in closed form, and the bound never
falls.""",
    "nuts": r"""
Several chains of the No-U-Turn sampler (Hoffman & Gelman 2014) draw from the posterior of the global latents. There is
no q and no ELBO: the draws are a reference that a variational posterior can be held against, as far as r-hat and the
effective sample size say that they have converged.""",
    "svi": r"""
Stochastic gradients of the ELBO, over θ and the parameters of the guide together (Hoffman et al. 2013; Kingma & Welling
2014):

$$
\nabla_{\theta, \varphi}\; E_{q_\varphi}[\log p_\theta(x, z) - \log q_\varphi(z \mid x)]
$$

It applies to every entry, with each guide that fits: `elbozoo guides MODEL` lists them.""",
}
REFERENCES = {
    "em": [
        "Dempster, Laird & Rubin (1977). Maximum likelihood from incomplete data via the EM algorithm. *JRSS B* 39, "
        "1–38.",
        "Neal & Hinton (1998). A view of the EM algorithm that justifies incremental, sparse, and other variants. In "
        "*Learning in Graphical Models*, 355–368.",
        "Wei & Tanner (1990). A Monte Carlo implementation of the EM algorithm. *JASA* 85, 699–704.",
    ],
    "closed-form": [
        "Tipping & Bishop (1999). Probabilistic principal component analysis. *JRSS B* 61, 611–622.",
    ],
    "cavi": [
        "Bishop (2006). *Pattern Recognition and Machine Learning*, chapter 10. Springer.",
        "Blei, Kucukelbir & McAuliffe (2017). Variational inference: a review for statisticians. *JASA* 112, 859–877.",
    ],
    "nuts": [
        "Hoffman & Gelman (2014). The No-U-Turn sampler. *JMLR* 15, 1593–1623.",
        "Vehtari et al. (2021). Rank-normalization, folding, and localization: an improved R̂. *Bayesian Analysis* 16, "
        "667–718.",
    ],
    "svi": [
        "Hoffman, Blei, Wang & Paisley (2013). Stochastic variational inference. *JMLR* 14, 1303–1347.",
        "Kingma & Welling (2014). Auto-encoding variational Bayes. *ICLR*.",
    ],
}
OPTIONS: dict[str, dict[str, type[Options]]] = {
    "em": {"In closed form": EMOptions, "With Monte Carlo draws": MonteCarloEMOptions},
    "closed-form": {},
    "cavi": {"Options": CAVIOptions},
    "nuts": {"Options": NUTSOptions},
    "svi": {"Options": TrainingOptions},
}


def overview(examples: Mapping[str, Entry]) -> str:
    """Return the page of all methods."""
    rows = [[f"[`{name}`](methods/{name}.ipynb)", SUMMARIES[name]] for name in METHODS]
    applies = [
        [f"[`{name}`](models/{name}.ipynb)", *_marks(entry), names(default_methods(entry))]
        for name, entry in examples.items()
    ]
    objectives = [[f"`{name}`", objective.meaning] for name, objective in OBJECTIVES.items()]
    return page(
        "# Methods",
        "A method turns a model, data, options and a seed into a fit. The name of a guide means `svi` with it.",
        markdown_table(["method", "what it does"], rows),
        "## Which method applies to which model",
        markdown_table(["model", *SPECIAL, "compared by default"], applies),
        "## Objectives",
        "What stochastic variational inference maximises. `objective=auto` takes `elbo-enumerated` for a discrete "
        "latent and `elbo` for any other. The ELBO that is reported is evaluated afresh, whatever was maximised.",
        markdown_table(["objective", "how the expectation under q is taken"], objectives),
        "## Options",
        "Every option has one name wherever it is read: `--set NAME=VALUE` on the command line, a keyword in Python. "
        "The page of each method lists its own; those of guides:",
        options_table(GuideOptions),
        toctree([f"methods/{name}" for name in METHODS]),
    )


def texts(examples: Mapping[str, Entry]) -> dict[str, str]:
    """Return the text of the page of each method by name, without its run."""
    return {f"methods/{name}": _method(name, examples) for name in METHODS}


def _method(name: str, examples: Mapping[str, Entry]) -> str:
    fitting = [model for model, entry in examples.items() if name == "svi" or name in method_names(entry)]
    shown = {"models": _models(fitting)}
    if name == "em":
        closed = [model for model in fitting if isinstance(examples[model], SupportsEM)]
        shown = {
            "in closed form": _models(closed),
            "with Monte Carlo draws": _models(model for model in fitting if model not in closed),
        }
    how = "guide=GUIDE" if name == "svi" else f'method="{name}"'
    tables = [block for title, schema in OPTIONS[name].items() for block in (f"### {title}", options_table(schema))]
    return page(
        f"# The method `{name}`",
        SUMMARIES[name][0].upper() + SUMMARIES[name][1:] + ".",
        STORIES[name].strip(),
        definitions(shown),
        code_block(f"ez.fit(MODEL, data, {how}, **options)", "python"),
        *(["## Options", *tables] if len(tables) > 2 else ["## Options", *tables[1:]] if tables else []),
    )


def references(name: str) -> str:
    """Return what to read about a method."""
    return "\n".join(["## References", "", *(f"- {reference}" for reference in REFERENCES[name])])


def _models(found: Iterable[str]) -> str:
    return ", ".join(f"[`{name}`](../models/{name}.ipynb)" for name in found)


def _marks(entry: Entry) -> list[str]:
    found = method_names(entry)
    return ["yes" if method in found else "" for method in SPECIAL]
