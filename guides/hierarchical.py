"""Inference from the bottom up: an encoder for the layer next to the data, and one from each layer to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributions import Distribution

from elbozoo.guides.base import GuideOptions
from elbozoo.guides.families import DiagonalNormal
from elbozoo.guides.sources import Amortized, encoder
from elbozoo.guides.whole import WholeGuide
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.joint import Conditional, Values
from elbozoo.models.contract.sites import LatentSite


class BottomUpGuide(WholeGuide):
    """q(z_1 given x) q(z_2 given z_1) ... of independent normals, for programs with a chain of layers.

    Where x depends on the bottom layer alone, the posterior has this factorisation too, so that this q can say what
    the layers tell about each other; one that is independent between sites cannot.

    The model draws the top layer first. The encoders of all layers have the same form.
    """

    NAME = "bottom-up"

    def __init__(self, entry: Entry, sites: Sequence[LatentSite], x: Tensor, options: GuideOptions) -> None:
        super().__init__(entry, sites, x, options)
        upward = list(reversed(sites))
        self.families = {site.name: DiagonalNormal(site, options) for site in upward}
        starts = [family.initial().to(x.dtype) for family in self.families.values()]
        self.bottom = Amortized(starts[0], x, options)
        self.above = nn.ModuleList(
            encoder(site.dim, start, options) for site, start in zip(upward[:-1], starts[1:], strict=True)
        )

    @staticmethod
    def refusal(entry: Entry, sites: Sequence[LatentSite]) -> str | None:
        """Say why this guide cannot serve ``entry`` with the latent ``sites``, or return None."""
        for site in sites:
            if not site.is_local:
                return f"the latent {site.name!r} is one for the whole data set, and bottom-up is about each datum's"
            if site.is_discrete:
                return f"the latent {site.name!r} takes {site.cardinality} values, and every layer of bottom-up is real"
        if len(sites) < 2:
            return "it has one layer of latents, which an amortized guide serves"
        return None

    def conditionals(self, batch: Batch) -> dict[str, Conditional]:
        """q of the bottom layer, batch shape (B,), and for each above the function that gives it from the one below."""
        names = list(self.families)
        found: dict[str, Conditional] = {names[0]: self.families[names[0]].distribution(self.bottom(batch))}
        for below, name, network in zip(names, names[1:], self.above, strict=False):
            found[name] = self._given(below, name, network)
        return found

    def _given(self, below: str, name: str, network: nn.Module) -> Callable[[Values], Distribution]:
        dim = self.families[below].site.dim
        lead = len(self.families[below].site.event_shape)

        def given(values: Values) -> Distribution:
            value = values[below]
            vectors = value.reshape(*value.shape[: value.ndim - lead], dim)
            return self.families[name].distribution(network(vectors))

        return given
