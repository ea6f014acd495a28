"""Guides of local latents: a family and a source for each site, inside the data plate."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from elbozoo.guides.base import DRAWS, Guide, GuideOptions, mean_of
from elbozoo.guides.bound import Parameters
from elbozoo.guides.families import FAMILIES, Family
from elbozoo.guides.refinement import Refinement
from elbozoo.guides.sources import SOURCES
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, joint_posterior
from elbozoo.models.contract.groups import GroupEntry
from elbozoo.models.contract.joint import Joint
from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.models.contract.sites import DATA_PLATE, LatentSite


class LocalGuide(Guide):
    """q(z given x) of one family, with parameters from one source, independent between sites.

    A family over real vectors serves the finite sites of a mixed program by a categorical.

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
    entry : Entry, optional
        The model, which the steps of the source ``semi-amortized`` follow.
    """

    def __init__(
        self,
        name: str,
        family: str,
        source: str,
        sites: list[LatentSite],
        x: Tensor,
        options: GuideOptions,
        entry: Entry | None = None,
    ) -> None:
        discrete = [site.is_discrete for site in sites]
        super().__init__(name, family, source, is_discrete=all(discrete), has_discrete=any(discrete))
        self.families = {site.name: family_of(site, family)(site, options) for site in sites}
        # The dict above is typed; this registers what the members of a family share.
        self.networks = nn.ModuleDict(self.families).to(x.dtype)
        self.sources = nn.ModuleDict(
            {site: SOURCES[source](member.initial().to(x.dtype), x, options) for site, member in self.families.items()}
        )
        if source == "semi-amortized":
            assert entry is not None
            # No module, so that the model's parameters are not registered a second time as the guide's.
            self.refinement = Refinement(entry, self.families, options)

    def parameters_of(self, batch: Batch) -> Parameters:
        """Parameters (B, P) of q of each site."""
        found = {site: source(batch) for site, source in self.sources.items()}
        return self.refinement(batch, found) if self.source == "semi-amortized" else found

    def distributions(self, batch: Batch) -> dict[str, Distribution]:
        """q of each site: batch shape (B,)."""
        parameters = self.parameters_of(batch)
        return {site: family.distribution(parameters[site]) for site, family in self.families.items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample each latent site inside the data plate."""
        return _sample_in_plate(self.distributions(batch), batch)


class ExactGuide(Guide):
    """The entry's own posterior as q: the bound touches the evidence.

    Its parameters are the model's: a gradient of its ELBO is the gradient of log p(x) itself.
    """

    def __init__(self, entry: Entry, sites: list[LatentSite]) -> None:
        source = "exact" if all(site.is_local for site in sites) else "global"
        enumerable = [site.is_enumerable for site in sites]
        super().__init__("exact", "posterior", source, is_discrete=all(enumerable))
        self.has_discrete = any(enumerable)  # without any latent nothing is drawn, and nothing enumerated
        # In a tuple, so that the model's parameters are not registered a second time as the guide's.
        self._entry = (entry,)
        self._sites = sites
        self.is_path = isinstance(entry, SequenceEntry)

    def posterior(self, batch: Batch) -> Joint:
        """p(z given x): batch shape (B,) for local latents; a global latent needs the full batch."""
        if not self.is_local and len(batch.x) != batch.total:
            raise ValueError(
                f"the exact posterior of a global latent needs all {batch.total} rows, found {len(batch.x)}"
            )
        return joint_posterior(self._entry[0], batch.x, self._sites)

    def distributions(self, batch: Batch) -> dict[str, Distribution]:
        """p(z given x) of each site; one of several is that of its site given no other, where that is one."""
        conditionals = self.posterior(batch).conditionals
        if any(not isinstance(conditional, Distribution) for conditional in conditionals.values()):
            raise NotImplementedError(f"the exact posterior ties the sites {list(conditionals)} together")
        return conditionals  # type: ignore[return-value]

    def means(self, batch: Batch) -> Tensor:
        """Mean of the posterior of each row; by draws where its sites depend on one another."""
        posterior = self.posterior(batch)
        if not self._sites:
            return batch.x.new_zeros(len(batch.x), 0)
        if self.is_path:
            (path,) = self.distributions(batch).values()
            return mean_of(path).reshape(*batch.x.shape[:2], -1)
        if isinstance(self._entry[0], GroupEntry):
            return self._entry[0].posterior_means(batch.x)
        if len(posterior.conditionals) == 1:
            return super().means(batch)
        draws = posterior.sample((DRAWS,))
        means = []
        for name, conditional in posterior.items():
            exact = isinstance(conditional, Categorical)
            mean = conditional.probs if exact else draws[name].mean(0)  # type: ignore[union-attr]
            means.append(mean.reshape(len(batch.x), -1))
        return torch.cat(means, -1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the latent sites from the posterior."""
        posterior = self.posterior(batch)
        if not self.is_local:
            return posterior.draw(pyro.sample)
        with pyro.plate(DATA_PLATE, batch.total, subsample=batch.index):
            return posterior.draw(sample_enumerable)


def family_of(site: LatentSite, family: str) -> type[Family]:
    """Return the family that serves ``site`` where ``family`` was asked for."""
    return FAMILIES["categorical"] if site.is_discrete else FAMILIES[family]


def sample_enumerable(name: str, q: Distribution) -> Tensor:
    """Sample a site of a guide so that an enumerated objective sums over it where it is finite.

    Other objectives ignore the tag and draw.
    """
    value: Tensor = pyro.sample(name, q, infer={"enumerate": "parallel"} if q.has_enumerate_support else {})
    return value


def _sample_in_plate(distributions: dict[str, Distribution], batch: Batch) -> dict[str, Tensor]:
    with pyro.plate(DATA_PLATE, batch.total, subsample=batch.index):
        return {name: sample_enumerable(name, q) for name, q in distributions.items()}
