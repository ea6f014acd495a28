"""A set of draws as q: what a sampler leaves behind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Self
from urllib.parse import unquote

import pyro
import torch
from pyro import distributions as dist
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn

from elbozoo.guides.base import Guide
from elbozoo.models.contract.batch import Batch

DRAWS, STATISTICS, SUMMED_OUT = "site_draws", "site_statistics", "left_out"


class DrawsGuide(Guide):
    """Draws of the global latents, such as those of NUTS, each as probable as any other.

    It can be sampled from, and the expectation of anything under it is a mean over the draws; but it has no density
    and bounds nothing.

    Parameters
    ----------
    draws : mapping of Tensor (chains, draws, *event)
        Draws of each global latent site, on its support.
    statistics : mapping of Tensor (chains, draws), optional
        What the sampler says of each draw, such as whether its path diverged.
    summed_out : collection of str
        Finite local sites of the model that the sampler summed out.
    """

    NAME = "draws"

    def __init__(
        self,
        draws: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor] | None = None,
        summed_out: Collection[str] = (),
    ) -> None:
        super().__init__(self.NAME, "draws", "global", summed_out=summed_out)
        setattr(self, DRAWS, _store(draws))
        setattr(self, STATISTICS, _store(statistics or {}))
        # Names are all there is to keep of these sites; as buffers they are saved with the rest.
        setattr(self, SUMMED_OUT, _store({name: torch.zeros(1) for name in summed_out}))

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild the guide from its ``state_dict``, which has all that it is."""
        parts: dict[str, dict[str, Tensor]] = {DRAWS: {}, STATISTICS: {}, SUMMED_OUT: {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][unquote(name)] = value
        return cls(parts[DRAWS], parts[STATISTICS], tuple(parts[SUMMED_OUT]))

    @property
    def is_bound(self) -> bool:
        """False: draws have no density."""
        return False

    @property
    def draws(self) -> dict[str, Tensor]:
        """Draws of each site: (chains, draws, *event)."""
        return _stored(getattr(self, DRAWS))

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What the sampler says of each draw: (chains, draws)."""
        return _stored(getattr(self, STATISTICS))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Pick a draw at random, one for each particle, and take every site from it."""
        draws = {name: values.flatten(0, 1) for name, values in self.draws.items()}
        picked = torch.randint(len(next(iter(draws.values()))), _shape_of_plates())
        return {
            name: pyro.sample(name, dist.Delta(values[picked], event_dim=values.ndim - 1))
            for name, values in draws.items()
        }


def _shape_of_plates() -> torch.Size:
    """Shape of one batch of values inside the plates that are open here, such as (S, 1) for S particles."""
    frames = [frame for frame in get_plates() if frame.vectorized]
    return torch.broadcast_shapes(*((frame.size, *[1] * (-frame.dim - 1)) for frame in frames))


def _store(tensors: Mapping[str, Tensor]) -> nn.Module:
    store = nn.Module()
    for name, value in tensors.items():
        # Sites of modules have dots in their names, which the names of buffers may not have.
        store.register_buffer(name.replace("%", "%25").replace(".", "%2E"), value.detach().clone())
    return store


def _stored(store: nn.Module) -> dict[str, Tensor]:
    return {unquote(name): value for name, value in store.named_buffers()}
