r"""The Wishart distribution over precision matrices, with a support that guides and samplers can unconstrain.

PyTorch's own Wishart cannot stand in a program here: its support has no bijection to real vectors with a Jacobian
(Pyro's autoguides, NUTS and Laplace's approximation all need one), and its sampler takes matrices inside the support
for singular ones, warns, and draws them again (torch 2.13).

References
----------
```bibtex
@article{smith1972wishart,
  author = {Smith, W. B. and Hocking, R. R.},
  title = {Algorithm {AS} 53: {W}ishart Variate Generator},
  journal = {Journal of the Royal Statistical Society C}, volume = {21}, number = {3}, pages = {341--345}, year = {1972}
}
```
"""

from __future__ import annotations

import math

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

LOG_2 = math.log(2)


class _PositiveDefinite(type(constraints.positive_definite)):  # type: ignore[misc]
    """PyTorch's constraint under a type of its own, so that a bijection can be registered for it."""


positive_definite = _PositiveDefinite()


class LogCholesky(Transform):
    """From D (D + 1) / 2 reals to positive-definite D x D matrices: L Lᵀ, with the logarithms of L's diagonal first.

    Densities over matrices are with respect to their lower triangle.
    """

    domain = constraints.real_vector
    codomain = positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogCholesky)

    def __hash__(self) -> int:
        return hash(LogCholesky)

    def _call(self, x: Tensor) -> Tensor:
        columns = _columns(x.shape[-1])
        rows_below, columns_below = torch.tril_indices(columns, columns, -1)
        # By a look-up instead of an assignment, which function transforms refuse. The last element is the zero.
        place = torch.full((columns, columns), x.shape[-1])
        place.diagonal().copy_(torch.arange(columns))
        place[rows_below, columns_below] = torch.arange(columns, x.shape[-1])
        elements = torch.cat([x[..., :columns].exp(), x[..., columns:], torch.zeros_like(x[..., :1])], -1)
        lower = elements[..., place]
        return lower @ lower.mT

    def _inverse(self, y: Tensor) -> Tensor:
        lower = torch.linalg.cholesky(y)
        rows_below, columns_below = torch.tril_indices(y.shape[-1], y.shape[-1], -1)
        log_diagonal = lower.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([log_diagonal, lower[..., rows_below, columns_below]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log of 2^D times the product over i = 1..D of L_ii^(D - i + 2) (Muirhead 1982, theorem 2.1.9)."""
        columns = y.shape[-1]
        powers = torch.arange(columns + 1, 1, -1, dtype=x.dtype, device=x.device)
        return columns * LOG_2 + (powers * x[..., :columns]).sum(-1)

    def forward_shape(self, shape: tuple[int, ...]) -> torch.Size:
        """Shape of the matrices."""
        columns = _columns(shape[-1])
        return torch.Size((*shape[:-1], columns, columns))

    def inverse_shape(self, shape: tuple[int, ...]) -> torch.Size:
        """Shape of the vectors."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


@biject_to.register(_PositiveDefinite)
@transform_to.register(_PositiveDefinite)
def _log_cholesky(constraint: constraints.Constraint) -> LogCholesky:
    return LogCholesky()


class Wishart(TorchDistribution):
    """Λ ~ Wishart(W, ν), by its inverse scale W⁻¹; E[Λ] = ν W (Bishop 2006, appendix B).

    Parameters
    ----------
    degrees_of_freedom : Tensor (...)
        ν > D - 1.
    inverse_scale : Tensor (..., D, D)
        W⁻¹, symmetric and positive definite.
    """

    arg_constraints = {  # noqa: RUF012  # as every distribution of PyTorch has them
        "degrees_of_freedom": constraints.positive,
        "inverse_scale": constraints.positive_definite,
    }
    support = positive_definite
    has_rsample = True

    def __init__(self, degrees_of_freedom: Tensor, inverse_scale: Tensor, validate_args: bool | None = None) -> None:
        batch_shape = torch.broadcast_shapes(degrees_of_freedom.shape, inverse_scale.shape[:-2])
        event_shape = inverse_scale.shape[-2:]
        self.degrees_of_freedom = degrees_of_freedom.expand(batch_shape)
        self.inverse_scale = inverse_scale.expand(*batch_shape, *event_shape)
        self._factor = torch.linalg.cholesky(inverse_scale).expand_as(self.inverse_scale)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if self._validate_args and not (degrees_of_freedom > event_shape[-1] - 1).all():
            least = float(degrees_of_freedom.min())
            raise ValueError(f"found {least:g} degrees of freedom, expected more than {event_shape[-1] - 1}")

    def expand(self, batch_shape: torch.Size, _instance: Wishart | None = None) -> Wishart:
        """Return it with another batch shape."""
        new: Wishart = self._get_checked_instance(Wishart, _instance)
        new.degrees_of_freedom = self.degrees_of_freedom.expand(batch_shape)
        new.inverse_scale = self.inverse_scale.expand(*batch_shape, *self.event_shape)
        new._factor = self._factor.expand(*batch_shape, *self.event_shape)
        super(Wishart, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """ν W."""
        return self.degrees_of_freedom[..., None, None] * torch.cholesky_inverse(self._factor)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draw matrices by Bartlett's decomposition (Smith & Hocking 1972)."""
        columns = self.event_shape[-1]
        shape = self._extended_shape(torch.Size(sample_shape))
        steps = torch.arange(columns, dtype=self._factor.dtype, device=self._factor.device)
        halves = ((self.degrees_of_freedom[..., None] - steps) / 2).expand(shape[:-1])
        chi_squares = 2 * torch._standard_gamma(halves)
        # A chi-square that underflows would make a singular matrix.
        diagonal = chi_squares.clamp(min=torch.finfo(chi_squares.dtype).tiny).sqrt()
        below = torch.randn(shape, dtype=steps.dtype, device=steps.device).tril(-1)
        root = torch.linalg.solve_triangular(self._factor.mT, below + diagonal.diag_embed(), upper=True)
        return root @ root.mT

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the lower triangle, nats: Bishop (2006), equation B.78."""
        if self._validate_args:
            self._validate_sample(value)
        columns, nu = self.event_shape[-1], self.degrees_of_freedom
        lower = torch.linalg.cholesky(value)
        log_determinant = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        trace = (self._factor.mT @ lower).square().sum((-2, -1))
        log_inverse_scale = 2 * self._factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_normalizer = nu / 2 * (log_inverse_scale - columns * LOG_2) - torch.mvlgamma(nu / 2, columns)
        return log_normalizer + (nu - columns - 1) / 2 * log_determinant - trace / 2


def _columns(size: int) -> int:
    columns = (math.isqrt(8 * size + 1) - 1) // 2
    assert columns * (columns + 1) // 2 == size
    return columns
