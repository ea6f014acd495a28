"""Inference through layers of latents: from the bottom up by draws, or up by numbers alone and down by draws.

References stand under :mod:`elbozoo.models.hierarchical_vae`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution

from elbozoo.guides.base import GuideOptions
from elbozoo.guides.families import DiagonalNormal
from elbozoo.guides.sources import Amortized, encoder
from elbozoo.guides.whole import WholeGuide
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasLayers
from elbozoo.models.contract.joint import Conditional, Values
from elbozoo.models.contract.sequences import StackedEntry
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
        return _refusal_of_layers(entry, sites, BottomUpGuide.NAME)

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


class LadderGuide(WholeGuide):
    """q(z_L given x) q(z_{L-1} given z_L, x) ...: what the data say of each layer times the model's own normal of it.

    On the way up, which is deterministic, each layer gets a normal N(m_l(x), v_l(x)), an approximate likelihood. On the
    way down, q of a layer is the product of that normal and the model's p(z_l given z_{l+1}) at the draw of the layer
    above: precisions add, and means are weighed by them (Sønderby et al. 2016, section 2). So an encoder needs to
    learn only what the data add, θ and q move together, and a layer about which the data say nothing has its prior.

    Where x depends on the bottom layer alone, p(z_l given z_{l+1}, x) is the product of p(z_l given z_{l+1}) and
    p(x given z_l). In a linear normal program the latter is a normal in z_l with a mean linear in x and a constant
    precision matrix. So with linear encoders the family contains the posterior where all these matrices are
    diagonal, whatever the layers tell about each other. One thing differs from the paper: the top layer is no
    exception, its normal is multiplied by the prior too.

    What goes wrong: a layer that says nothing costs nothing and is easily had here, by an approximate likelihood as
    wide as can be, from which no gradient leads back. So it needs warm-up, as the paper says: ``objective=beta`` with
    ``kl_schedule=annealed``.
    """

    NAME = "ladder"

    def __init__(self, entry: Entry, sites: Sequence[LatentSite], x: Tensor, options: GuideOptions) -> None:
        super().__init__(entry, sites, x, options)
        assert isinstance(entry, HasLayers)
        # In a tuple, so that the model's parameters are not registered a second time as the guide's.
        self._entry: tuple[HasLayers] = (entry,)
        self.families = {site.name: DiagonalNormal(site, options) for site in sites}
        starts = [family.initial().to(x.dtype) for family in reversed(self.families.values())]
        self.bottom = Amortized(starts[0], x, options)
        width = _head(self.bottom.network).in_features
        above = []
        for start in starts[1:]:
            above.append(encoder(width, start, options))
            width = _head(above[-1]).in_features
        self.above = nn.ModuleList(above)

    @staticmethod
    def refusal(entry: Entry, sites: Sequence[LatentSite]) -> str | None:
        """Say why this guide cannot serve ``entry`` with the latent ``sites``, or return None."""
        if reason := _refusal_of_layers(entry, sites, LadderGuide.NAME):
            return reason
        if not isinstance(entry, HasLayers):
            return "it does not tell the normal of a layer given those above, by a method prior_of(site, values)"
        return None

    def conditionals(self, batch: Batch) -> dict[str, Conditional]:
        """q of the top layer, batch shape (B,), and for each below the function that gives it from those above."""
        parameters = reversed(self._upward(batch))
        given = {name: self._given(name, of_layer) for name, of_layer in zip(self.families, parameters, strict=True)}
        top = next(iter(given))
        return {**given, top: given[top]({})}

    def _upward(self, batch: Batch) -> list[Tensor]:
        """Parameters (B, P) of the approximate likelihood of each layer, the bottom first."""
        hidden = self.bottom.standardised(batch.x)
        found = []
        for network in (self.bottom.network, *self.above):
            hidden = network[:-1](hidden)
            found.append(network[-1](hidden))
        return found

    def _given(self, name: str, parameters: Tensor) -> Callable[[Values], Distribution]:
        site = self.families[name].site
        likelihood = self.families[name].distribution(parameters)

        def given(values: Values) -> Distribution:
            prior = self._entry[0].prior_of(name, values)
            weight, prior_weight = 1 / likelihood.variance, 1 / prior.variance
            variance = 1 / (weight + prior_weight)
            mean = variance * (weight * likelihood.mean + prior_weight * prior.mean)
            return dist.Normal(mean, variance.sqrt()).to_event(len(site.event_shape))

        return given


def _head(network: nn.Sequential) -> nn.Linear:
    head = network[-1]
    assert isinstance(head, nn.Linear)
    return head


def _refusal_of_layers(entry: Entry, sites: Sequence[LatentSite], guide: str) -> str | None:
    if isinstance(entry, StackedEntry):
        return f"a datum is a {entry.stack_dims[0]}, which no encoder of a single row reads"
    for site in sites:
        if not site.is_local:
            return f"the latent {site.name!r} is one for the whole data set, and {guide} is about each datum's"
        if site.is_discrete:
            return f"the latent {site.name!r} takes {site.cardinality} values, and every layer of {guide} is real"
    if len(sites) < 2:
        return "it has one layer of latents, which an amortized guide serves"
    return None
