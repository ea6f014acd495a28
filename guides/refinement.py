"""Semi-amortized inference: from an encoder's q, a few gradient steps on the ELBO of each datum.

Kim et al. (2018), "Semi-amortized variational autoencoders", algorithm 1; Cremer et al. (2018), "Inference
suboptimality in variational autoencoders", whose amortization gap the steps shrink. The steps here are natural
gradients on noise that is the same for all data and at all times, and a step that does not raise the ELBO there is
taken back and tried again at half the length. So q is a function of x, more steps are never worse on that noise, and
one length serves sharp and wide posteriors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elbozoo.guides.base import GuideOptions
from elbozoo.guides.bound import Parameters, noise_dim, row_elbo, whitened_noise
from elbozoo.guides.families import Family
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry

DRAWS = 16
LONGEST = 2.0  # length of a step in the metric of q: standard deviations of the mean
SHORTER, LONGER = 0.5, 1.5
CHUNK_ELEMENTS = 2**24


class Refinement:
    """Steps of each datum's parameters uphill, at the present θ.

    Parameters
    ----------
    entry : Entry
        The model, whose log p(x, z) the steps follow.
    families : dict of Family
        The family of each latent site.
    options : GuideOptions
        ``refinements``, ``refinement_rate`` and ``refinement_gradient``.
    """

    def __init__(self, entry: Entry, families: dict[str, Family], options: GuideOptions) -> None:
        self.entry, self.families, self.options = entry, families, options

    def __call__(self, batch: Batch, start: Parameters) -> Parameters:
        """Return the parameters (B, P) of each site after the steps from ``start``.

        With first-order gradients what comes back has the gradient of ``start``: the encoder follows the slope of
        the ELBO where the steps ended. With full ones it follows that of the ELBO as a function of where they
        started, through every step, and so does θ.
        """
        if self.options.refinement_gradient == "full" and torch.is_grad_enabled():
            return self._climb(batch, start, differentiable=True)
        parts = []
        for rows in self._spans(batch):
            detached = {site: values[rows].detach() for site, values in start.items()}
            part = Batch(batch.x[rows], batch.index[rows], batch.total)
            parts.append(self._climb(part, detached, differentiable=False))
        refined = {site: torch.cat([part[site] for part in parts]).detach() for site in start}
        return {site: values + (refined[site] - values).detach() for site, values in start.items()}

    def _spans(self, batch: Batch) -> list[slice]:
        cases = max([family.size for family in self.families.values() if family.discrete], default=1)
        rows = max(1, CHUNK_ELEMENTS // (DRAWS * cases * self.entry.elements(batch.x)))
        return [slice(i, i + rows) for i in range(0, len(batch.x), rows)]

    def _climb(self, batch: Batch, start: Parameters, *, differentiable: bool) -> Parameters:
        noise = whitened_noise(DRAWS, noise_dim(self.families), seed=0, like=batch.x)
        with torch.enable_grad():
            now, elbo, step = self._evaluate(batch, start, noise, differentiable)
            rate = torch.full_like(elbo, self.options.refinement_rate).detach()
            for _ in range(self.options.refinements):
                moved = {site: values + rate[:, None] * step[site] for site, values in now.items()}
                proposal, value, next_step = self._evaluate(batch, moved, noise, differentiable)
                better = (value > elbo).detach()
                now = _choose(better, proposal, now)
                step = _choose(better, next_step, step)
                elbo = torch.where(better, value, elbo)
                rate = torch.where(better, (LONGER * rate).clamp(max=1.0), SHORTER * rate)
        return now

    def _evaluate(
        self, batch: Batch, parameters: Parameters, noise: Tensor, differentiable: bool
    ) -> tuple[Parameters, Tensor, Parameters]:
        """Return the parameters as the graph holds them, the ELBO of each row, and the natural step uphill."""
        if not differentiable:
            parameters = {site: values.detach().requires_grad_() for site, values in parameters.items()}
        elbo = row_elbo(self.entry, self.families, batch, parameters, noise)
        slopes = torch.autograd.grad(elbo.sum(), list(parameters.values()), create_graph=differentiable)
        step, squared = {}, torch.zeros_like(elbo)
        for (site, values), slope in zip(parameters.items(), slopes, strict=True):
            step[site] = self.families[site].natural_gradient(values, slope)
            squared = squared + (slope * step[site]).sum(-1)
        shrink = (LONGEST / squared.clamp(min=LONGEST**2).sqrt())[:, None]
        return parameters, elbo, {site: shrink * move for site, move in step.items()}


def _choose(mask: Tensor, one: Parameters, other: Parameters) -> Parameters:
    return {site: torch.where(mask[:, None], values, other[site]) for site, values in one.items()}
