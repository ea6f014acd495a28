"""Guides of all latent sites of a program together: one q in which sites depend on each other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyro
import torch
from torch import Tensor

from elbozoo.guides.base import DRAWS, Guide, GuideOptions
from elbozoo.guides.local import sample_enumerable
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.joint import Conditional, Joint
from elbozoo.models.contract.sites import DATA_PLATE, LatentSite


class WholeGuide(Guide):
    """Base of guides that give the q of each datum as a chain: the first site, then each given those before it.

    A subclass gives ``NAME``, ``refusal``, ``__init__`` and ``conditionals``, and stands in the registry's
    ``WHOLE_GUIDES``.

    Parameters
    ----------
    entry : Entry
        The model, whose own conditionals some guides use.
    sites : sequence of LatentSite
        Local latent sites of the model in the order in which it draws them.
    x : Tensor (N, D)
        The data set, for the encoder's standardisation.
    options : GuideOptions
        Options.
    """

    NAME: ClassVar[str]

    def __init__(self, entry: Entry, sites: Sequence[LatentSite], x: Tensor, options: GuideOptions) -> None:
        discrete = [site.is_discrete for site in sites]
        super().__init__(self.NAME, self.NAME, "amortized", is_discrete=all(discrete), has_discrete=any(discrete))

    @staticmethod
    def refusal(entry: Entry, sites: Sequence[LatentSite]) -> str | None:
        """Say why this guide cannot serve ``entry`` with the latent ``sites``, or return None."""
        raise NotImplementedError

    @abstractmethod
    def conditionals(self, batch: Batch) -> Mapping[str, Conditional]:
        """q of each site in the order of drawing: batch shape (B,), or a function of the values before it."""

    def means(self, batch: Batch) -> Tensor:
        """Mean of q of each row, sites side by side in the order of drawing: (B, K); by draws."""
        draws = Joint(self.conditionals(batch)).sample((DRAWS,))
        return torch.cat([value.mean(0).reshape(len(batch.x), -1) for value in draws.values()], -1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the sites in their order inside the data plate."""
        with pyro.plate(DATA_PLATE, batch.total, subsample=batch.index):
            return Joint(self.conditionals(batch)).draw(sample_enumerable)
