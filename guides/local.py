"""Guides of local latents: a family and a source for each site, inside the data plate."""

from __future__ import annotations

import pyro
from torch import Tensor, nn
from torch.distributions import Distribution

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.families import FAMILIES
from elbozoo.guides.sources import SOURCES
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.sites import DATA_PLATE, LatentSite


class LocalGuide(Guide):
    """q(z given x) of one family, with parameters from one source, independent between sites.

    Parameters
    ----------
    name, family, source : str
        See :class:`Guide`.
    sites : list of LatentSite
        Local latent sites of the model.
    x : Tensor (N, D)
        The data set, for the number of rows and the encoder's standardisation.
    options : GuideOptions
        Options.
    """

    def __init__(
        self, name: str, family: str, source: str, sites: list[LatentSite], x: Tensor, options: GuideOptions
    ) -> None:
        super().__init__(name, family, source, FAMILIES[family].discrete)
        self.families = {site.name: FAMILIES[family](site, options) for site in sites}
        self.sources = nn.ModuleDict(
            {site: SOURCES[source](member.initial().to(x.dtype), x, options) for site, member in self.families.items()}
        )

    def distributions(self, batch: Batch) -> dict[str, Distribution]:
        """q of each site: batch shape (B,)."""
        sources = self.sources
        return {site: family.distribution(sources[site](batch)) for site, family in self.families.items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample each latent site inside the data plate."""
        return _sample_in_plate(self.distributions(batch), batch)


class ExactGuide(Guide):
    """The entry's own posterior as q: the bound touches the evidence.

    Its parameters are the model's: a gradient of its ELBO is the gradient of log p(x) itself.
    """

    def __init__(self, entry: Entry, sites: list[LatentSite]) -> None:
        super().__init__("exact", "posterior", "exact" if sites[0].is_local else "global", sites[0].is_discrete)
        # In a tuple, so that the model's parameters are not registered a second time as the guide's.
        self._entry = (entry,)
        self._site = sites[0]

    def distributions(self, batch: Batch) -> dict[str, Distribution]:
        """p(z given x): batch shape (B,) for local latents; a global latent needs the full batch."""
        if not self._site.is_local and len(batch.x) != batch.total:
            raise ValueError(
                f"the exact posterior of a global latent needs all {batch.total} rows, found {len(batch.x)}"
            )
        return {self._site.name: self._entry[0].posterior(batch.x)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the latent site from the posterior."""
        if self._site.is_local:
            return _sample_in_plate(self.distributions(batch), batch)
        return {name: pyro.sample(name, q) for name, q in self.distributions(batch).items()}


def _sample_in_plate(distributions: dict[str, Distribution], batch: Batch) -> dict[str, Tensor]:
    # The tag lets an enumerated objective sum over a discrete q; other objectives ignore it and sample.
    with pyro.plate(DATA_PLATE, batch.total, subsample=batch.index):
        return {
            name: pyro.sample(name, q, infer={"enumerate": "parallel"} if q.has_enumerate_support else {})
            for name, q in distributions.items()
        }
