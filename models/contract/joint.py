"""Distributions over several latent sites, each given those before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributions import Distribution

Values = Mapping[str, Tensor]
Conditional = Distribution | Callable[[Values], Distribution]


class Joint:
    """A distribution over several latent sites as an ordered product of conditionals.

    Parameters
    ----------
    conditionals : mapping of Distribution or callable, by site
        In the order in which sites are drawn. A function takes the values of the sites before it, which may
        come with leading sample dimensions, and returns the site's distribution given them.
    """

    def __init__(self, conditionals: Mapping[str, Conditional]) -> None:
        self.conditionals = dict(conditionals)

    def draw(self, sample: Callable[[str, Distribution], Tensor]) -> dict[str, Tensor]:
        """Draw every site in order by ``sample(name, distribution)`` and return the values."""
        values: dict[str, Tensor] = {}
        for name, conditional in self.conditionals.items():
            values[name] = sample(name, self._given(conditional, values))
        return values

    def sample(self, shape: torch.Size | tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Draw every site with leading dimensions ``shape``."""
        values: dict[str, Tensor] = {}
        for name, conditional in self.conditionals.items():
            # What depends on sites before it has their leading dimensions already.
            is_plain = isinstance(conditional, Distribution)
            values[name] = self._given(conditional, values).sample(torch.Size(shape if is_plain else ()))
        return values

    def log_prob(self, values: Values) -> Tensor:
        """Log density of ``values`` in nats: batch shape of the conditionals, with leading dimensions of the values."""
        if not self.conditionals:
            return torch.zeros(())  # no site: the empty product
        terms = [self._given(conditional, values).log_prob(values[name]) for name, conditional in self.items()]
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def items(self) -> list[tuple[str, Conditional]]:
        """Return the sites and their conditionals, in order."""
        return list(self.conditionals.items())

    @staticmethod
    def _given(conditional: Conditional, values: Values) -> Distribution:
        return conditional if isinstance(conditional, Distribution) else conditional(values)
