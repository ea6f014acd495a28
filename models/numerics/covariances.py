"""Four kinds of covariance for a set of normal components: full, tied, diagonal, spherical.

Each kind writes its covariance as ``unit * (floor + L Lᵀ) * unit`` with an unconstrained factor L, so that no
covariance is ever smaller than ``floor * unit²`` in any direction; ``unit`` is a standard deviation per column.
The M step of each kind is the exact maximiser under that constraint, so EM stays monotone.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


class CovarianceKind(Protocol):
    """How K components in D columns share, and shape, their covariances."""

    has_scale_tril: bool
    """Whether ``scale`` is a Cholesky factor (full, tied) or standard deviations (diagonal, spherical)."""

    def factor_shape(self, components: int, columns: int) -> tuple[int, ...]:
        """Shape of the unconstrained factor L."""
        ...

    def scale(self, factor: Tensor, unit: Tensor, floor: float) -> Tensor:
        """Cholesky factors (K or 1, D, D), or standard deviations (K, D)."""
        ...

    def log_density(self, x: Tensor, means: Tensor, scale: Tensor) -> Tensor:
        """Log density of every row under every component, (N, K), nats."""
        ...

    def scatter(self, x: Tensor, means: Tensor, responsibilities: Tensor) -> Tensor:
        """Weighted squares about ``means``, summed over rows: additive over chunks of rows."""
        ...

    def maximize(self, scatter: Tensor, shift: Tensor, counts: Tensor, unit: Tensor, floor: float) -> Tensor:
        """Factor L of the likeliest covariances; ``shift`` (K, D) is how far the means move in this M step."""
        ...

    def parameter_count(self, components: int, columns: int) -> int:
        """Number of free parameters of the covariances."""
        ...


class Full:
    """A covariance matrix of its own for each component."""

    has_scale_tril = True

    def factor_shape(self, components: int, columns: int) -> tuple[int, ...]:
        """Shape (K, D, D)."""
        return components, columns, columns

    def scale(self, factor: Float[Tensor, "k d d"], unit: Float[Tensor, " d"], floor: float) -> Float[Tensor, "k d d"]:
        """Cholesky factor of each covariance."""
        lower = factor.tril()
        identity = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        return unit[:, None] * torch.linalg.cholesky(floor * identity + lower @ lower.mT)

    def log_density(
        self, x: Float[Tensor, "n d"], means: Float[Tensor, "k d"], scale: Float[Tensor, "c d d"]
    ) -> Float[Tensor, "n k"]:
        """Log density of every row under every component, nats, by triangular solves."""
        residual = (x - means[:, None, :]).mT
        whitened = torch.linalg.solve_triangular(scale.expand(len(means), -1, -1), residual, upper=False)
        log_determinant = 2 * scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (whitened.square().sum(-2).mT + log_determinant + x.shape[1] * LOG_2PI)

    def scatter(
        self, x: Float[Tensor, "n d"], means: Float[Tensor, "k d"], responsibilities: Float[Tensor, "n k"]
    ) -> Float[Tensor, "k d d"]:
        """Sum over rows of r (x - μ)(x - μ)ᵀ."""
        residual = x - means[:, None, :]
        return (residual * responsibilities.mT[..., None]).mT @ residual

    def maximize(
        self,
        scatter: Float[Tensor, "k d d"],
        shift: Float[Tensor, "k d"],
        counts: Float[Tensor, " k"],
        unit: Float[Tensor, " d"],
        floor: float,
    ) -> Float[Tensor, "k d d"]:
        """Factor of each component's covariance, its eigenvalues (in units of ``unit``) no less than ``floor``."""
        covariance = scatter / counts[:, None, None] - shift[:, :, None] * shift[:, None, :]
        return _floored_factor(covariance, unit, floor)

    def parameter_count(self, components: int, columns: int) -> int:
        """K D (D + 1) / 2."""
        return components * columns * (columns + 1) // 2


class Tied(Full):
    """One covariance matrix for all components."""

    def factor_shape(self, components: int, columns: int) -> tuple[int, ...]:
        """Shape (1, D, D)."""
        return 1, columns, columns

    def scatter(
        self, x: Float[Tensor, "n d"], means: Float[Tensor, "k d"], responsibilities: Float[Tensor, "n k"]
    ) -> Float[Tensor, "1 d d"]:
        """Sum over rows and components of r (x - μ)(x - μ)ᵀ."""
        return super().scatter(x, means, responsibilities).sum(0, keepdim=True)

    def maximize(
        self,
        scatter: Float[Tensor, "1 d d"],
        shift: Float[Tensor, "k d"],
        counts: Float[Tensor, " k"],
        unit: Float[Tensor, " d"],
        floor: float,
    ) -> Float[Tensor, "1 d d"]:
        """Factor of the pooled covariance."""
        between = (shift * counts[:, None]).mT @ shift
        return _floored_factor((scatter - between) / counts.sum(), unit, floor)

    def parameter_count(self, components: int, columns: int) -> int:
        """D (D + 1) / 2."""
        return columns * (columns + 1) // 2


class Diagonal:
    """A variance per component and column."""

    has_scale_tril = False

    def factor_shape(self, components: int, columns: int) -> tuple[int, ...]:
        """Shape (K, D)."""
        return components, columns

    def scale(self, factor: Float[Tensor, "k c"], unit: Float[Tensor, " d"], floor: float) -> Float[Tensor, "k d"]:
        """Standard deviations."""
        return unit * (floor + factor.square()).sqrt()

    def log_density(
        self, x: Float[Tensor, "n d"], means: Float[Tensor, "k d"], scale: Float[Tensor, "k d"]
    ) -> Float[Tensor, "n k"]:
        """Log density of every row under every component, nats."""
        whitened = (x[:, None, :] - means) / scale
        return -0.5 * (whitened.square().sum(-1) + 2 * scale.log().sum(-1) + x.shape[1] * LOG_2PI)

    def scatter(
        self, x: Float[Tensor, "n d"], means: Float[Tensor, "k d"], responsibilities: Float[Tensor, "n k"]
    ) -> Float[Tensor, "k d"]:
        """Sum over rows of r (x - μ)², per column."""
        return (responsibilities[..., None] * (x[:, None, :] - means).square()).sum(0)

    def maximize(
        self,
        scatter: Float[Tensor, "k d"],
        shift: Float[Tensor, "k d"],
        counts: Float[Tensor, " k"],
        unit: Float[Tensor, " d"],
        floor: float,
    ) -> Float[Tensor, "k c"]:
        """Square root of what each variance has above the floor."""
        variance = (scatter / counts[:, None] - shift.square()) / unit.square()
        return (variance - floor).clamp(min=0).sqrt()

    def parameter_count(self, components: int, columns: int) -> int:
        """K D."""
        return components * columns


class Spherical(Diagonal):
    """One variance per component, the same in every column."""

    def factor_shape(self, components: int, columns: int) -> tuple[int, ...]:
        """Shape (K, 1)."""
        return components, 1

    def maximize(
        self,
        scatter: Float[Tensor, "k d"],
        shift: Float[Tensor, "k d"],
        counts: Float[Tensor, " k"],
        unit: Float[Tensor, " d"],
        floor: float,
    ) -> Float[Tensor, "k 1"]:
        """Square root of what each component's mean variance has above the floor."""
        variance = ((scatter / counts[:, None] - shift.square()) / unit.square()).mean(-1, keepdim=True)
        return (variance - floor).clamp(min=0).sqrt()

    def parameter_count(self, components: int, columns: int) -> int:
        """K."""
        return components


KINDS: dict[str, CovarianceKind] = {
    "full": Full(),
    "tied": Tied(),
    "diagonal": Diagonal(),
    "spherical": Spherical(),
}


def _floored_factor(covariance: Tensor, unit: Tensor, floor: float) -> Tensor:
    # Clipping the eigenvalues is the exact maximiser of the expected log-likelihood over all covariances that
    # are at least the floor in every direction; adding the floor to the diagonal would not be.
    scaled = covariance / (unit[:, None] * unit)
    eigenvalues, eigenvectors = torch.linalg.eigh((scaled + scaled.mT) / 2)
    root = eigenvectors * (eigenvalues - floor).clamp(min=0).sqrt()[..., None, :]
    upper = torch.linalg.qr(root.mT, mode="r").R
    # Eigenvectors have no sign of their own, and a factor that jumped from one to the other could not be extrapolated.
    return (upper * torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None]).mT
