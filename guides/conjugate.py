"""The q of coordinate ascent: the factors that an entry has updates for, as a guide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.guides.base import Guide, mean_of
from elbozoo.guides.local import sample_enumerable
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, SupportsCAVI
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.joint import Conditional, Joint
from elbozoo.models.contract.sites import DATA_PLATE

PREFIX = "factor_"
ROWS = 16


class ConjugateGuide(Guide):
    """A mean-field q of conjugate factors, which nothing is left to optimise in.

    Global sites are drawn outside the data plate. A finite site of a row stands inside it, with the optimum that the
    global factors give it, and is summed over where that is asked for; it is there for new rows too.

    Parameters
    ----------
    entry : Entry
        The model, which says what the factors mean.
    factors : NamedTuple of Tensor
        Parameters of q, see :class:`~elbozoo.models.contract.entry.SupportsCAVI`; held as buffers.
    """

    NAME: ClassVar[str] = "conjugate"

    def __init__(self, entry: Entry, factors: Any) -> None:
        sites = entry.latent_sites()
        is_local = all(site.is_local for site in sites)
        enumerable = [site.is_enumerable for site in sites]
        super().__init__(
            self.NAME,
            self.NAME,
            "free" if is_local else "global",
            is_discrete=all(enumerable),
            has_discrete=any(enumerable),
        )
        # In a tuple, so that the model's parameters are not registered a second time as the guide's.
        self._entry = (entry,)
        self._local = {site.name for site in sites if site.is_local}
        self._type: type[NamedTuple] = type(factors)
        for name, value in zip(factors._fields, factors, strict=True):
            self.register_buffer(PREFIX + name, value.detach().clone())

    @classmethod
    def from_state(cls, entry: Entry, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild the guide of ``entry`` from the tensors of its ``state_dict``.

        Raises
        ------
        InvalidInput
            If they are not those of this entry's factors.
        """
        assert isinstance(entry, SupportsCAVI)
        # Any rows show which factors the entry has.
        with isolated(0), torch.no_grad():
            like = entry.initial_factors(entry.simulate(ROWS, 0)[0], 0)
        expected = [PREFIX + name for name in like._fields]
        if sorted(expected) != sorted(tensors):
            raise InvalidInput(
                f"found the factors {sorted(tensors)}, expected those of {entry.name()}, {sorted(expected)}; fit again"
            )
        return cls(entry, type(like)(*(tensors[name] for name in expected)))

    @property
    def factors(self) -> Any:
        """The factors, as the entry names them."""
        return self._type(*(getattr(self, PREFIX + name) for name in self._type._fields))

    def conditionals(self, batch: Batch) -> dict[str, Conditional]:
        """q of each site, or the function that gives it from the values of the sites before it."""
        entry = self._entry[0]
        assert isinstance(entry, SupportsCAVI)
        return dict(entry.factor_distributions(batch.x, self.factors))

    def distributions(self, batch: Batch) -> dict[str, Distribution]:
        """q of each site that depends on no other under q; local ones with batch shape (B,)."""
        return {name: q for name, q in self.conditionals(batch).items() if isinstance(q, Distribution)}

    @property
    def has_rows(self) -> bool:
        """Whether some latents are local."""
        return bool(self._local)

    def means(self, batch: Batch) -> Tensor:
        """Means of the local latents of each row, or their probabilities, (B, K)."""
        means = [mean_of(q) for name, q in self.distributions(batch).items() if name in self._local]
        return torch.cat([mean.reshape(len(batch.x), -1) for mean in means], -1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the global sites, then those of the rows inside the data plate."""
        conditionals = self.conditionals(batch)
        values = Joint({name: q for name, q in conditionals.items() if name not in self._local}).draw(pyro.sample)
        with pyro.plate(DATA_PLATE, batch.total, subsample=batch.index):
            for name in conditionals:
                if name in self._local:
                    q = conditionals[name]
                    values[name] = sample_enumerable(name, q if isinstance(q, Distribution) else q(values))
        return values
