"""Pyro's automatic guides for global latents, under the names of our families."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import collapsed
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import NumericalFailure

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
        """Replace the mode that ``laplace`` found by the normal with the curvature there.

        Raises
        ------
        NumericalFailure
            If the log density has no maximum that can be reached, or is flat there.
        """
        if not isinstance(self.auto, autoguide.AutoLaplaceApproximation):
            return
        self._climb(batch)
        try:
            self.auto = self.auto.laplace_approximation(batch)
        except torch.linalg.LinAlgError:
            raise NumericalFailure(
                "laplace: the log density of the latents is not curved downwards where the search for its maximum "
                "ended, expected a mode; try another guide, such as full-rank-normal"
            ) from None

    def prepare_to_load(self, batch: Batch) -> None:
        """Take the form that :meth:`finalize` leaves: ``laplace`` is a normal that learns no more."""
        if not isinstance(self.auto, autoguide.AutoLaplaceApproximation):
            return
        normal = autoguide.AutoMultivariateNormal(self.auto.model)
        normal(batch)
        for name in ("loc", "scale", "scale_tril"):
            value = getattr(normal, name).detach()
            delattr(normal, name)
            normal.register_buffer(name, value)
        self.auto = normal.to(batch.x.dtype)

    def _climb(self, batch: Batch) -> None:
        """Go on from where the optimiser stopped to the mode itself: elsewhere the curvature says nothing."""
        loc = self.auto.loc
        optimizer = torch.optim.LBFGS(
            [loc], max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            guide_trace = poutine.trace(self.auto).get_trace(batch)
            model_trace = poutine.trace(poutine.replay(self.auto.model, trace=guide_trace)).get_trace(batch)
            value = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
            (loc.grad,) = torch.autograd.grad(value, [loc])
            return value.detach()

        optimizer.step(loss)
