"""Families of distributions, each a map from a flat vector of real parameters to a distribution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import Distribution, biject_to
from torch.distributions.transforms import ReshapeTransform

from elbozoo.guides.base import GuideOptions
from elbozoo.models.contract.sites import LatentSite


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
        super().__init__(base, [ReshapeTransform(base.event_shape, event_shape)])

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


class Family(ABC):
    """A family over one latent site.

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

    def on_support(self, base: Distribution) -> Distribution:
        """Carry ``base`` over real vectors (..., dim) to the site's event shape and support."""
        if self.site.event_shape != (self.site.dim,):
            base = Reshaped(base, self.site.event_shape)
        return base if self.site.is_real else dist.TransformedDistribution(base, [biject_to(self.site.support)])


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
        dim = self.site.dim
        mean, log_diagonal, below = parameters.split([dim, dim, self.size - 2 * dim], -1)
        rows, columns = torch.tril_indices(dim, dim, -1)
        scale_tril = torch.diag_embed(log_diagonal.exp())
        scale_tril[..., rows, columns] = below
        return self.on_support(dist.MultivariateNormal(mean, scale_tril=scale_tril))

    def initial(self) -> Tensor:
        """Mean zero, covariance ``initial_scale``² times the identity."""
        start = torch.zeros(self.size)
        start[self.site.dim : 2 * self.site.dim] = _log_scales(self.site.dim, self.options)
        return start

    def closest(self, posterior: Distribution) -> Tensor | None:
        """The posterior itself, where it is normal."""
        normal = _as_normal(posterior, self.site)
        if normal is None:
            return None
        rows, columns = torch.tril_indices(self.site.dim, self.site.dim, -1)
        scale_tril = normal.scale_tril
        log_diagonal = scale_tril.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([normal.mean, log_diagonal, scale_tril[..., rows, columns]], -1)


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

    def near_diagonal(self, normal: torch.distributions.MultivariateNormal) -> Tensor:
        """Parameters (..., P) with the mean and scales of a diagonal ``normal``, and a factor a tenth of them."""
        scale = normal.stddev
        signs = torch.tensor([1.0, -1.0], dtype=scale.dtype).repeat(self.size)[: self.rank]
        factor = 0.1 * scale[..., None] * signs * torch.ones_like(scale)[..., None].cumsum(-2) / self.site.dim
        return torch.cat([normal.mean, scale.log(), factor.flatten(-2)], -1)


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

    def closest(self, posterior: Distribution) -> Tensor | None:
        """The posterior's own logits."""
        return posterior.logits if isinstance(posterior, torch.distributions.Categorical) else None


FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (Delta, DiagonalNormal, FullRankNormal, LowRankNormal, Categorical)
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
