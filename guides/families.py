"""Families of distributions, each a map from a flat vector of real parameters to a distribution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to
from torch.distributions.transforms import AffineTransform, ReshapeTransform

from elbozoo.guides.base import GuideOptions
from elbozoo.guides.flows import FLOWS
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.sites import LatentSite

CONTEXT = 8  # numbers by which one datum's flow differs from another's


class Reshaped(dist.TransformedDistribution):
    """A distribution over real vectors as one over arrays of another shape, such as scalars.

    Parameters
    ----------
    base : Distribution
        Event shape (dim,).
    event_shape : torch.Size
        Shape of one draw, dim numbers in all.
    """

    def __init__(self, base: Distribution, event_shape: torch.Size) -> None:
        self.shape_of_draw = event_shape
        super().__init__(base, [ReshapeTransform(base.event_shape, event_shape, cache_size=1)])

    @property
    def mean(self) -> Tensor:
        """Mean, in the shape of a draw."""
        return self._shaped(self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of each number, in the shape of a draw."""
        return self._shaped(self.base_dist.variance)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Reshaped:
        """Return it with another batch shape; torch's own needs every subclass to say how."""
        return Reshaped(self.base_dist.expand(batch_shape), self.shape_of_draw)

    def _shaped(self, vectors: Tensor) -> Tensor:
        return vectors.reshape(vectors.shape[:-1] + self.shape_of_draw)


class Family(nn.Module, ABC):
    """A family over one latent site; what its members have in common, such as networks, are its parameters.

    Attributes
    ----------
    name : str
        The family's name.
    discrete : bool
        Whether it is a family over finitely many values.
    size : int
        Number of real parameters P of one member.
    """

    name: ClassVar[str]
    discrete: ClassVar[bool] = False
    size: int

    def __init__(self, site: LatentSite, options: GuideOptions) -> None:
        super().__init__()
        self.site = site
        self.options = options

    @classmethod
    def refusal(cls, site: LatentSite) -> str | None:
        """Say why this family cannot serve ``site``, or return None."""
        if cls.discrete == site.is_discrete:
            return None
        kind = f"takes {site.cardinality} values" if site.is_discrete else "is continuous"
        return f"the latent {site.name!r} {kind}, and {cls.name} is a family over {_space(cls.discrete)}"

    @abstractmethod
    def distribution(self, parameters: Tensor) -> Distribution:
        """Member with ``parameters`` (..., P): batch shape (...), event shape the site's."""

    @abstractmethod
    def initial(self) -> Tensor:
        """Parameters (P,) at which optimisation starts."""

    def closest(self, posterior: Distribution) -> Tensor | None:
        """Parameters (..., P) of the member with the least KL(q ‖ posterior), where a closed form exists."""
        return None

    def natural_gradient(self, parameters: Tensor, gradient: Tensor) -> Tensor:
        """Return ``gradient`` (..., P) of a function of the member in the metric of the family's own divergence.

        A step along it is the same for a sharp and a wide member (Amari 1998). Where the metric has no simple
        form the gradient comes back as it is, or scaled by the metric's main part.
        """
        return gradient

    def on_support(self, base: Distribution) -> Distribution:
        """Carry ``base`` over real vectors (..., dim) to the site's event shape and support."""
        if self.site.event_shape != (self.site.dim,):
            base = Reshaped(base, self.site.event_shape)
        if self.site.is_real:
            return base
        # The cache spares a flow the way back from the support for what it has drawn itself.
        return dist.TransformedDistribution(base, [biject_to(self.site.support).with_cache()])


class Delta(Family):
    """A point mass: maximum a posteriori. Its ELBO is a log density at a point, which is not a bound."""

    name = "delta"

    def __init__(self, site: LatentSite, options: GuideOptions) -> None:
        super().__init__(site, options)
        self.size = site.dim

    def distribution(self, parameters: Tensor) -> Distribution:
        """Point mass at the parameters, carried to the support."""
        value = parameters.reshape(parameters.shape[:-1] + self.site.event_shape)
        if not self.site.is_real:
            value = biject_to(self.site.support)(value)
        return dist.Delta(value, event_dim=len(self.site.event_shape))

    def initial(self) -> Tensor:
        """Zeros."""
        return torch.zeros(self.size)


class DiagonalNormal(Family):
    """Independent normals: means, then log standard deviations."""

    name = "diagonal-normal"

    def __init__(self, site: LatentSite, options: GuideOptions) -> None:
        super().__init__(site, options)
        self.size = 2 * site.dim

    def distribution(self, parameters: Tensor) -> Distribution:
        """N(mean, diag(scale²))."""
        mean, log_scale = parameters.split(self.site.dim, -1)
        return self.on_support(dist.Normal(mean, log_scale.exp()).to_event(1))

    def initial(self) -> Tensor:
        """Mean zero, standard deviation ``initial_scale``."""
        return torch.cat([torch.zeros(self.site.dim), _log_scales(self.site.dim, self.options)])

    def natural_gradient(self, parameters: Tensor, gradient: Tensor) -> Tensor:
        """Times the variance for the mean, half for the log scale."""
        log_scale = parameters[..., self.site.dim :]
        of_mean, of_scale = gradient.split(self.site.dim, -1)
        return torch.cat([(2 * log_scale).exp() * of_mean, 0.5 * of_scale], -1)

    def closest(self, posterior: Distribution) -> Tensor | None:
        """Same mean, and the diagonal of the posterior's precision (Bishop 2006, section 10.1.2)."""
        normal = _as_normal(posterior, self.site)
        if normal is None:
            return None
        log_precision = normal.precision_matrix.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([normal.mean, -0.5 * log_precision], -1)


class FullRankNormal(Family):
    """A normal with any covariance: means, log diagonal and rows below the diagonal of its Cholesky factor."""

    name = "full-rank-normal"

    def __init__(self, site: LatentSite, options: GuideOptions) -> None:
        super().__init__(site, options)
        self.size = 2 * site.dim + site.dim * (site.dim - 1) // 2

    def distribution(self, parameters: Tensor) -> Distribution:
        """N(mean, L Lᵀ)."""
        mean = parameters[..., : self.site.dim]
        return self.on_support(dist.MultivariateNormal(mean, scale_tril=self._scale_tril(parameters)))

    def initial(self) -> Tensor:
        """Mean zero, covariance ``initial_scale``² times the identity."""
        start = torch.zeros(self.size)
        start[self.site.dim : 2 * self.site.dim] = _log_scales(self.site.dim, self.options)
        return start

    def natural_gradient(self, parameters: Tensor, gradient: Tensor) -> Tensor:
        """Times the covariance for the mean; for the factor L that of L A, with A lower triangular, at A = I."""
        dim = self.site.dim
        rows, columns = torch.tril_indices(dim, dim, -1)
        scale_tril = self._scale_tril(parameters)
        of_mean, of_diagonal, of_below = gradient.split([dim, dim, self.size - 2 * dim], -1)
        slope = torch.diag_embed(of_diagonal * (-parameters[..., dim : 2 * dim]).exp())
        slope[..., rows, columns] = of_below
        along = (scale_tril.mT @ slope).tril()
        along = along - 0.5 * torch.diag_embed(along.diagonal(dim1=-2, dim2=-1))
        of_factor = scale_tril @ along
        mean = (scale_tril @ (scale_tril.mT @ of_mean[..., None]))[..., 0]
        log_diagonal = along.diagonal(dim1=-2, dim2=-1)
        return torch.cat([mean, log_diagonal, of_factor[..., rows, columns]], -1)

    def closest(self, posterior: Distribution) -> Tensor | None:
        """The posterior itself, where it is normal."""
        normal = _as_normal(posterior, self.site)
        if normal is None:
            return None
        rows, columns = torch.tril_indices(self.site.dim, self.site.dim, -1)
        scale_tril = normal.scale_tril
        log_diagonal = scale_tril.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([normal.mean, log_diagonal, scale_tril[..., rows, columns]], -1)

    def _scale_tril(self, parameters: Tensor) -> Tensor:
        """Cholesky factor L (..., dim, dim)."""
        dim = self.site.dim
        _, log_diagonal, below = parameters.split([dim, dim, self.size - 2 * dim], -1)
        rows, columns = torch.tril_indices(dim, dim, -1)
        scale_tril = torch.diag_embed(log_diagonal.exp())
        scale_tril[..., rows, columns] = below
        return scale_tril


class LowRankNormal(Family):
    """A normal with covariance F Fᵀ + diag(scale²): means, log scales, then the factor F (dim, rank)."""

    name = "low-rank-normal"

    def __init__(self, site: LatentSite, options: GuideOptions) -> None:
        super().__init__(site, options)
        self.rank = min(options.rank or math.ceil(math.sqrt(site.dim)), site.dim)
        self.size = (2 + self.rank) * site.dim

    def distribution(self, parameters: Tensor) -> Distribution:
        """N(mean, F Fᵀ + diag(scale²))."""
        dim = self.site.dim
        mean, log_scale, factor = parameters.split([dim, dim, dim * self.rank], -1)
        factor = factor.reshape(*factor.shape[:-1], dim, self.rank)
        return self.on_support(dist.LowRankMultivariateNormal(mean, factor, (2 * log_scale).exp()))

    def initial(self) -> Tensor:
        """Mean zero, covariance about ``initial_scale``²; the factor starts off zero, where its gradient vanishes."""
        dim = self.site.dim
        factor = 0.1 * self.options.scale * torch.randn(dim * self.rank)
        return torch.cat([torch.zeros(dim), _log_scales(dim, self.options), factor])

    def natural_gradient(self, parameters: Tensor, gradient: Tensor) -> Tensor:
        """Times each number's variance for mean and factor, half for the log scale, as if there were no factor."""
        dim = self.site.dim
        _, log_scale, _ = parameters.split([dim, dim, dim * self.rank], -1)
        of_mean, of_scale, of_factor = gradient.split([dim, dim, dim * self.rank], -1)
        variance = (2 * log_scale).exp()
        of_factor = variance.repeat_interleave(self.rank, -1) * of_factor
        return torch.cat([variance * of_mean, 0.5 * of_scale, of_factor], -1)

    def near_diagonal(self, normal: torch.distributions.MultivariateNormal) -> Tensor:
        """Parameters (..., P) with the mean and scales of a diagonal ``normal``, and a factor a tenth of them."""
        scale = normal.stddev
        signs = torch.tensor([1.0, -1.0], dtype=scale.dtype).repeat(self.size)[: self.rank]
        factor = 0.1 * scale[..., None] * signs * torch.ones_like(scale)[..., None].cumsum(-2) / self.site.dim
        return torch.cat([normal.mean, scale.log(), factor.flatten(-2)], -1)


class Flow(Family):
    """A normalising flow: normal noise, bent by networks that all data share, in each datum's units and context.

    The parameters are the mean and the log standard deviation of each number, which carry the bent noise to its
    place as the last step, then a context that the networks read, as the encoder's of Kingma et al. (2016) do. So
    the data share what is costly to learn, and no two need have posteriors of one shape. It begins as a diagonal
    normal and contains that family.
    """

    name = "flow"

    def __init__(self, site: LatentSite, options: GuideOptions) -> None:
        super().__init__(site, options)
        self.size = 2 * site.dim + CONTEXT
        kind = options.flow
        if kind == "auto":
            kind = "affine-autoregressive" if site.dim > 1 else "spline-coupling"
        elif kind == "affine-autoregressive" and site.dim == 1:
            raise InvalidInput(
                f"option flow: found {kind!r} for the latent {site.name!r} of one dimension, where that flow is a "
                "normal, expected 'spline-coupling'; or choose a diagonal-normal guide"
            )
        self.layers = nn.ModuleList(FLOWS[kind](site.dim, CONTEXT, options.flow_layers))

    def distribution(self, parameters: Tensor) -> Distribution:
        """mean + scale * flow(noise given context)."""
        mean, log_scale, context = parameters.split([self.site.dim, self.site.dim, CONTEXT], -1)
        noise = dist.Normal(torch.zeros_like(mean), torch.ones_like(mean)).to_event(1)
        bent = [layer.condition(context) for layer in self.layers]  # type: ignore[operator]
        placed = AffineTransform(mean, log_scale.exp(), event_dim=1, cache_size=1)
        return self.on_support(dist.TransformedDistribution(noise, [*bent, placed]))

    def initial(self) -> Tensor:
        """Mean zero, standard deviation ``initial_scale``, and a context of zeros."""
        return self.from_diagonal(torch.cat([torch.zeros(self.site.dim), _log_scales(self.site.dim, self.options)]))

    def from_diagonal(self, parameters: Tensor) -> Tensor:
        """Parameters (..., P) with the means and log scales of a diagonal normal's, and a context of zeros."""
        return torch.cat([parameters, parameters.new_zeros(*parameters.shape[:-1], CONTEXT)], -1)

    def natural_gradient(self, parameters: Tensor, gradient: Tensor) -> Tensor:
        """As of a diagonal normal for mean and log scale; as it is for the context."""
        dim = self.site.dim
        of_mean, of_scale, of_context = gradient.split([dim, dim, CONTEXT], -1)
        variance = (2 * parameters[..., dim : 2 * dim]).exp()
        return torch.cat([variance * of_mean, 0.5 * of_scale, of_context], -1)


class Categorical(Family):
    """Any distribution over finitely many values: its logits."""

    name = "categorical"
    discrete = True

    def __init__(self, site: LatentSite, options: GuideOptions) -> None:
        super().__init__(site, options)
        assert site.cardinality is not None
        self.size = site.cardinality

    def distribution(self, parameters: Tensor) -> Distribution:
        """Categorical with logits."""
        return dist.Categorical(logits=parameters)

    def initial(self) -> Tensor:
        """Equal probabilities."""
        return torch.zeros(self.size)

    def natural_gradient(self, parameters: Tensor, gradient: Tensor) -> Tensor:
        """Divided by the probabilities: a whole step of the ELBO's ends at the posterior."""
        probability = parameters.softmax(-1)
        return gradient / probability.clamp(min=torch.finfo(probability.dtype).eps)

    def closest(self, posterior: Distribution) -> Tensor | None:
        """The posterior's own logits."""
        return posterior.logits if isinstance(posterior, torch.distributions.Categorical) else None


FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (Delta, DiagonalNormal, FullRankNormal, LowRankNormal, Flow, Categorical)
}


def _space(discrete: bool) -> str:
    return "finitely many values" if discrete else "real vectors"


def _as_normal(posterior: Distribution, site: LatentSite) -> torch.distributions.MultivariateNormal | None:
    """Return a normal ``posterior`` of the site as one over real vectors (dim,), or None if it is no normal."""
    if not site.is_real:
        return None
    if isinstance(posterior, torch.distributions.MultivariateNormal):
        return posterior
    base = posterior.base_dist if isinstance(posterior, torch.distributions.Independent) else posterior
    if not isinstance(base, torch.distributions.Normal) or posterior.event_shape != site.event_shape:
        return None
    mean, scale = (value.reshape(*posterior.batch_shape, site.dim) for value in (posterior.mean, posterior.stddev))
    return torch.distributions.MultivariateNormal(mean, scale_tril=torch.diag_embed(scale))


def _log_scales(dim: int, options: GuideOptions) -> Tensor:
    return torch.full((dim,), math.log(options.scale))
