"""The q of a fit that had draws of the posterior instead: the closest one to it at the θ that was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.registry import build_guide, refusal_of
from elbozoo.inference.best_member import best_member
from elbozoo.inference.objectives import resolve_objective
from elbozoo.inference.svi import TrainingOptions, run_svi
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasPosterior

FAMILY = "full-rank-normal"
NAME = f"free-{FAMILY}"
STEPS = 2000  # of gradients at most, where no search knows the program
RATE = 0.02


class PosteriorGuide(NamedTuple):
    """A guide, and how it was found."""

    guide: Guide
    note: str


def refusal_of_posterior_guide(entry: Entry) -> str | None:
    """Say why :func:`posterior_guide` has no q for ``entry``, or return None."""
    if isinstance(entry, HasPosterior):
        return None
    reason = refusal_of(NAME, entry)
    return None if reason is None else f"its q would be one of each datum, and {reason}"


def posterior_guide(entry: Entry, x: Tensor, options: GuideOptions) -> PosteriorGuide:
    """Return a q of the rows ``x`` at the θ of ``entry``: the exact posterior, or the closest normal of each datum.

    Natural gradients find that normal for latents over the real vectors, and at most one finite one beside them. For
    other programs gradients of the ELBO do, at fixed θ. Several latents of a datum have normals independent of one
    another, and a finite one has a categorical beside them. Must be called inside ``isolated``.
    """
    if isinstance(entry, HasPosterior):
        return PosteriorGuide(build_guide("exact", entry, x), "q is the exact posterior")
    best = best_member(entry, FAMILY, x, options) if x.ndim == 2 else None
    if best is not None:
        return PosteriorGuide(best.guide, "q is the full-rank normal of each datum that is closest to its posterior")
    guide = build_guide(NAME, entry, x, options)
    training = TrainingOptions(steps=STEPS, learning_rate=RATE)
    with _fixed(entry):
        objective = resolve_objective(training.objective, guide, training)
        run_svi(entry, guide, objective, Batch.full(x), training, progress=False)
    return PosteriorGuide(guide, "q is a full-rank normal of each datum, brought close to its posterior by gradients")


@contextmanager
def _fixed(entry: Entry) -> Iterator[None]:
    """Keep θ where it is."""
    learned = [parameter for parameter in entry.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
