"""q against the posterior: the exact one, one by quadrature, or draws of NUTS, whichever there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from elbozoo.inference.method import method_names
from elbozoo.models.contract.entry import HasPosterior, supports_quadrature
from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.notebook.cells import Code, Run, Text
from elbozoo.plots import number
from elbozoo.tutorials import posterior_code as code
from elbozoo.tutorials.subject import Subject
from elbozoo.words import count

GRID_ROWS, PANELS = 12, 4
NUTS_DIM = 10  # beyond, its draws take longer than a page may


class _Way(NamedTuple):
    """How q is held against a posterior: what is said before, the code, the sentence after it, what the code draws."""

    says: str
    source: str
    text: Callable[[Run], str]
    shows: str


def posterior(s: Subject) -> list[Text | Code]:
    """Return the picture of q and the posterior, or why there is none."""
    if not s.sites:
        return []
    title = "## q against the exact posterior"
    way = _way(s)
    if way is None:
        return [Text(f"{title}\n\n{_why_not(s)}")]
    alt = f"q of {s.guide} against {way.shows}"
    return [
        Text(f"{title}\n\n{way.says}"),
        Code(way.source, alt=alt, caption=f"q of `{s.guide}` against {way.shows}."),
        Text(way.text),
    ]


def _why_not(s: Subject) -> str:
    if s.is_bare:
        return "The posterior of this program is not known, so q is held against log p(x) alone."
    if not s.has_evidence:
        return "Under a flat prior p(x) does not exist, and neither does the posterior of a model."
    if not all(site.is_local for site in s.sites):
        return (
            "The posterior of this model has no formula here, and draws of a reference sampler would take longer "
            "than the rest of this page. The ledger holds q against log p(x) instead."
        )
    return "The posterior of this model is not known, so q is held against log p(x) alone."


def _way(s: Subject) -> _Way | None:
    if isinstance(s.entry, HasPosterior):
        return _known(s)
    if supports_quadrature(s.sites):
        return _grid(s)
    is_small = all(not site.is_local for site in s.sites) and s.latent_numbers <= NUTS_DIM
    if is_small and "nuts" in method_names(s.entry):
        return _nuts(s)
    return None


def _known(s: Subject) -> _Way:
    first, says = s.sites[0], "This model's posterior is known."
    names = {"model": s.call, "site": first.name, "draws": s.effort.draws}
    if not first.is_local:
        source = code.EXACT_FIT.format(**names) + code.DENSITIES.format(**names, panels=len(s.sites))
        return _Way(says, source, densities_text, "draws of the exact posterior, the first number of each latent")
    if len(s.sites) > 1:
        kinds = {site.name: site.cardinality for site in s.sites}
        source = code.SITES.format(**names, values=kinds)
        return _Way(says, source, sites_text, "the exact posterior, both by draws, a panel for each latent")
    if isinstance(s.entry, SequenceEntry):
        if first.is_discrete:
            return _Way(says, code.STATES, probabilities_text, "the exact posterior of state 0, row by row")
        shown = "the exact posterior: mean and two standard deviations, step by step"
        return _Way(says, code.PATH.format(**names), moments_text, shown)
    if first.is_discrete:
        shown = "the exact posterior: a point for each row and value, on the line where both agree"
        return _Way(says, code.PROBABILITIES, probabilities_text, shown)
    shown = "the exact posterior: mean and standard deviation, a point for each row and dimension"
    return _Way(says, code.MOMENTS.format(**names), moments_text, shown)


def _grid(s: Subject) -> _Way:
    real = [site for site in s.sites if not site.is_enumerable]
    dim = sum(site.dim for site in real)
    source = code.GRID.format(draws=s.effort.draws, rows=GRID_ROWS, names=[site.name for site in real])
    source += (code.CONTOURS if dim == 2 else code.LINES).format(panels=PANELS)
    says = (
        f"No formula for this posterior is known, but with {count(dim, 'latent number')} for each row it can be "
        "computed on a grid, at the θ of the fit."
    )
    shown = "the posterior of single rows by quadrature: lines of equal density, and dots drawn from q"
    return _Way(says, source, grid_text, shown if dim == 2 else "the posterior of single rows by quadrature")


def _nuts(s: Subject) -> _Way:
    names = {"model": s.call, "draws": s.effort.draws, "names": [site.name for site in s.sites]}
    source = code.NUTS_FIT.format(**names, chain=s.effort.draws // 10, warmup=s.effort.draws // 10)
    source += code.DENSITIES.format(**names, panels=len(s.sites)).replace("exact posterior", "NUTS")
    says = "No formula for this posterior is known. Long runs of NUTS draw from it, and stand for it here."
    return _Way(says, source, densities_text, "draws of NUTS, the first number of each latent")


# ---- sentences -------------------------------------------------------------------------------------------------------


def probabilities_text(run: Run) -> str:
    """Say how far the probabilities of a finite latent are apart."""
    difference = (run["q"] - run["exact"]).abs()
    mean, most = number(float(difference.mean()), 4), number(float(difference.max()), 4)
    return f"The probabilities of q differ from the posterior's by {mean} on average, and by {most} at most."


def densities_text(run: Run) -> str:
    """Say how far the moments of global latents are apart, a line for each."""
    lines = []
    for name in run["exact"].data_vars:
        exact, q = (_flat(torch.tensor(run[which][name].values)) for which in ("exact", "q"))
        lines.append(f"- `{name}`: {_moments_apart(exact.mean(0), exact.std(0), q.mean(0), q.std(0))}")
    return "\n".join(["On average over the numbers of each latent, by draws of both:", "", *lines])


def sites_text(run: Run) -> str:
    """Say how far several local latents are apart, a line for each."""
    lines = []
    for name, (exact, q) in run["sites"].items():
        if run["values"][name] is None:
            clause = _moments_apart(exact.mean(0), exact.std(0), q.mean(0), q.std(0))
        else:
            drawn = [shares(draws, run["values"][name]) for draws in (exact, q)]
            difference = number(float((drawn[1] - drawn[0]).abs().mean()), 4)
            clause = f"the probabilities of q differ from the posterior's by {difference}."
        lines.append(f"- `{name}`: {clause}")
    return "\n".join(["On average, by draws of both:", "", *lines])


def moments_text(run: Run) -> str:
    """Say how far the moments of a local latent are apart."""
    (mean, q_mean), (deviation, q_deviation) = run["means"], run["deviations"]
    said = _moments_apart(mean, deviation, q_mean, q_deviation).rstrip(".")
    return f"On average {said}, both measured on {len(run['draws'])} draws of q."


def grid_text(run: Run) -> str:
    """Say how far q is from the posterior on a grid."""
    grid, q = run["grid"], run["q"]
    said = _moments_apart(grid.mean, grid.sd, q.mean(0), q.std(0)).rstrip(".")
    return f"On average over the first {len(grid.mean)} rows {said}, measured on {len(q)} draws of q."


def shares(draws: Tensor, values: int) -> Tensor:
    """Return how often each of ``values`` values is drawn: (rows, values)."""
    return torch.stack([(draws == value).double().mean(0) for value in range(values)], -1)


def _moments_apart(mean: Tensor, deviation: Tensor, q_mean: Tensor, q_deviation: Tensor) -> str:
    # What a program masks, such as padding, has no spread.
    real = (deviation > 0) & q_mean.isfinite()
    distance = number(float(((q_mean - mean)[real] / deviation[real]).abs().mean()), 3)
    ratio = number(float((q_deviation[real] / deviation[real]).mean()), 3)
    return (
        f"the mean of q is {distance} posterior standard deviations away from the posterior's, and the "
        f"standard deviation of q is {ratio} times the posterior's."
    )


def _flat(draws: Tensor) -> Tensor:
    """Return draws of several chains as those of one, each a row of numbers."""
    return draws.reshape(draws.shape[0] * draws.shape[1], -1).double()
