"""Guides of latent paths: a family for each step, independent across time, with padded steps masked out."""

from __future__ import annotations

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from elbozoo.guides.base import Guide, GuideOptions, mean_of
from elbozoo.guides.families import FAMILIES
from elbozoo.guides.sources import Free
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.sequences import lengths, observations, steps_mask
from elbozoo.models.contract.sites import DATA_PLATE, LatentSite


class RecurrentEncoder(nn.Module):
    """A bidirectional GRU from a sequence to the parameters of each step; what is missing enters as zero and a flag."""

    def __init__(self, start: Tensor, x: Tensor, options: GuideOptions) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        seen = observations(x)[steps_mask(x)]
        mean = seen.nanmean(0)
        scale = (seen - mean).square().nanmean(0).sqrt()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))
        columns = x.shape[-1] - 1
        self.recurrent = nn.GRU(
            2 * columns, options.hidden, options.layers, batch_first=True, bidirectional=True, dtype=start.dtype
        )
        self.head = nn.Linear(2 * options.hidden, len(start), dtype=start.dtype)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(start)

    def forward(self, batch: Batch) -> Tensor:
        """Return the parameters (B, T, P) that the encoder gives to the steps."""
        standard = (observations(batch.x) - self.mean) / self.scale
        missing = standard.isnan()
        inputs = torch.cat([standard.masked_fill(missing, 0.0), missing.to(standard.dtype)], -1)
        # Packed, so that the backward direction begins at the last real step of each sequence.
        packed = pack_padded_sequence(inputs, lengths(batch.x).cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=batch.x.shape[1])
        result: Tensor = self.head(hidden)
        return result


STEP_SOURCES: dict[str, type[nn.Module]] = {"free": Free, "amortized": RecurrentEncoder}


class SequenceGuide(Guide):
    """q(z given x) that is independent across the steps of a sequence, of one family at each step.

    Parameters
    ----------
    name, family, source : str
        See :class:`Guide`.
    sites : list of LatentSite
        The one latent site of the model, whose event shape is (T,) or (T, K).
    x : Tensor (S, T, 1 + D)
        The sequences.
    options : GuideOptions
        Options.
    """

    def __init__(
        self, name: str, family: str, source: str, sites: list[LatentSite], x: Tensor, options: GuideOptions
    ) -> None:
        (site,) = sites
        super().__init__(name, family, source, has_discrete=site.is_discrete)
        self.site = site.name
        step = LatentSite(site.name, site.event_shape[1:], _of_step(site), True, site.cardinality)
        self.step_family = FAMILIES[family](step, options)
        self.parameters_of = STEP_SOURCES[source](self.step_family.initial().to(x.dtype), x, options)

    def steps(self, batch: Batch) -> Distribution:
        """q of each step: batch shape (B, T), those at padding without a meaning."""
        return self.step_family.distribution(self.parameters_of(batch))

    def distributions(self, batch: Batch) -> dict[str, Distribution]:
        """q of the whole path: batch shape (B,); padded steps count for nothing."""
        steps: dist.TorchDistribution = self.steps(batch)
        return {self.site: steps.mask(steps_mask(batch.x)).to_event(1)}

    def means(self, batch: Batch) -> Tensor:
        """Mean of q at each step, (B, T, K), or probabilities where the states are finite."""
        mean = mean_of(self.steps(batch))
        return mean.reshape(*batch.x.shape[:2], -1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the path inside the data plate."""
        with pyro.plate(DATA_PLATE, batch.total, subsample=batch.index):
            return {name: pyro.sample(name, q) for name, q in self.distributions(batch).items()}


def _of_step(site: LatentSite) -> torch.distributions.constraints.Constraint:
    support = site.support
    if isinstance(support, torch.distributions.constraints.independent):
        inner = len(site.event_shape) - 1
        while isinstance(support, torch.distributions.constraints.independent):
            support = support.base_constraint
        return torch.distributions.constraints.independent(support, inner) if inner else support
    return support
