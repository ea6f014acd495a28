"""Pyro's automatic guides for global latents, under the names of our families."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from pyro.infer import autoguide
from torch import Tensor

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import collapsed
from elbozoo.models.contract.entry import Entry

Constructor = Callable[[Callable[[Batch], Any], GuideOptions], autoguide.AutoGuide]

AUTOGUIDES: dict[str, Constructor] = {
    "delta": lambda model, options: autoguide.AutoDelta(model),
    "diagonal-normal": lambda model, options: autoguide.AutoNormal(model, init_scale=options.initial_scale),
    "full-rank-normal": lambda model, options: autoguide.AutoMultivariateNormal(
        model, init_scale=options.initial_scale
    ),
    "low-rank-normal": lambda model, options: autoguide.AutoLowRankMultivariateNormal(
        model, init_scale=options.initial_scale, rank=options.rank
    ),
    "flow": lambda model, options: autoguide.AutoIAFNormal(model),
    "laplace": lambda model, options: autoguide.AutoLaplaceApproximation(model),
}


class GlobalGuide(Guide):
    """One of Pyro's autoguides over the global latents of a model.

    Parameters
    ----------
    name : str
        Key of :data:`AUTOGUIDES`.
    model : Entry
        The model; the guide reads its latent sites.
    x : Tensor (N, D)
        The data, on which the guide is run once: an autoguide has no parameters before that.
    options : GuideOptions
        Options.
    summed_out : collection of str
        Finite local sites of the model, which the guide does not sample.
    """

    def __init__(
        self, name: str, model: Entry, x: Tensor, options: GuideOptions, summed_out: Collection[str] = ()
    ) -> None:
        family = "full-rank-normal" if name == "laplace" else name
        super().__init__(name, family, "global", summed_out=summed_out)
        self.auto = AUTOGUIDES[name](collapsed(model, summed_out), options)
        self.auto(Batch.full(x))
        self.auto.to(x.dtype)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the global latents."""
        result: dict[str, Tensor] = self.auto(batch)
        return result

    @property
    def is_bound(self) -> bool:
        """False while the guide is a point mass: ``delta``, and ``laplace`` before its curvature is taken."""
        return not isinstance(self.auto, autoguide.AutoDelta | autoguide.AutoLaplaceApproximation)

    def finalize(self, batch: Batch) -> None:
        """Replace the mode that ``laplace`` found by the normal with the curvature there."""
        if isinstance(self.auto, autoguide.AutoLaplaceApproximation):
            self.auto = self.auto.laplace_approximation(batch)
