"""Paths of a linear Gaussian chain, before and after its observations.

A path is an event of shape (T, K); ``steps`` (S, T) marks the steps of each of S sequences that are real. Padding
stands at the end of a sequence. There, draws are zero and log densities are zero whatever the value is.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, constraints, register_kl

from elbozoo.models.numerics import kalman
from elbozoo.models.numerics.kalman import BackwardKernels, Smoothed

LOG_2PI = math.log(2 * math.pi)


class GaussianChain(TorchDistribution):
    """Paths z_1..z_T of a chain: z_1 ~ N(m, P) or flat, z_t ~ N(A z_t-1, Q).

    A flat start has the constant log density ``log_flat`` in place of the normal's. Its chain is a measure and no
    probability: :meth:`log_prob` is right, and no draw is. :meth:`sample` then begins at N(m, P) nevertheless, which
    says where series that are drawn from it begin and counts in no density.

    Parameters
    ----------
    initial_mean : Tensor (K,)
        m.
    initial_scale_tril : Tensor (K, K)
        Cholesky factor of P.
    transition : Tensor (K, K)
        A.
    process_scale_tril : Tensor (K, K)
        Cholesky factor of Q, which must be positive definite: a path without noise has no density.
    steps : Tensor (*batch, T) of bool
        Which steps are real.
    log_flat : float, optional
        Log density of a flat start, nats.
    """

    arg_constraints: ClassVar = {
        "initial_mean": constraints.real_vector,
        "initial_scale_tril": constraints.lower_cholesky,
        "transition": constraints.independent(constraints.real, 2),
        "process_scale_tril": constraints.lower_cholesky,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        initial_mean: Tensor,
        initial_scale_tril: Tensor,
        transition: Tensor,
        process_scale_tril: Tensor,
        steps: Tensor,
        log_flat: float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.initial_mean = initial_mean
        self.initial_scale_tril = initial_scale_tril
        self.transition = transition
        self.process_scale_tril = process_scale_tril
        self.steps = steps
        self.log_flat = log_flat
        event_shape = torch.Size((steps.shape[-1], len(initial_mean)))
        super().__init__(steps.shape[:-1], event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: None = None) -> GaussianChain:
        """Return it with another batch shape."""
        return GaussianChain(
            self.initial_mean,
            self.initial_scale_tril,
            self.transition,
            self.process_scale_tril,
            self.steps.expand(torch.Size(batch_shape) + self.steps.shape[-1:]),
            self.log_flat,
            validate_args=False,
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw paths: (*sample_shape, *batch, T, K)."""
        noise = _standard_normal(self._extended_shape(sample_shape), self.transition)
        path = [self.initial_mean + noise[..., 0, :] @ self.initial_scale_tril.mT]
        for step in noise[..., 1:, :].unbind(-2):
            path.append(path[-1] @ self.transition.mT + step @ self.process_scale_tril.mT)
        return torch.where(self.steps[..., None], torch.stack(path, -2), 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(z) of each path, nats: all steps at once."""
        if self._validate_args:
            self._validate_sample(value)
        if self.log_flat is None:
            first = _log_normal(value[..., :1, :] - self.initial_mean, self.initial_scale_tril)
        else:
            first = torch.full_like(value[..., :1, 0], self.log_flat)
        moves = value[..., 1:, :] - value[..., :-1, :] @ self.transition.mT
        later = _log_normal(moves, self.process_scale_tril)
        return torch.where(self.steps, torch.cat([first, later], -1), 0.0).sum(-1)


class SmoothedGaussianChain(TorchDistribution):
    """Paths of a hidden chain given its observations, p(z given x): a Gaussian chain in reverse time.

    z_t ~ N(J_t z_t+1 + H_t z_1 + shift_t, L_t L_tᵀ), where H is zero but under a flat start. Every kernel is made from
    the filter's moments alone; the evidence enters nowhere.

    Parameters
    ----------
    kernels : BackwardKernels
        Of :func:`elbozoo.models.numerics.kalman.backward_kernels`.
    steps : Tensor (*batch, T) of bool
        Which steps are real.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, kernels: BackwardKernels, steps: Tensor, validate_args: bool | None = None) -> None:
        self.kernels = kernels
        self.steps = steps
        super().__init__(steps.shape[:-1], kernels.shift.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: None = None) -> SmoothedGaussianChain:
        """Return it with another batch shape."""
        shape = torch.Size(batch_shape)
        gain, anchor, shift, scale_tril, anchored = self.kernels
        matrices = shape + gain.shape[-3:]
        kernels = BackwardKernels(
            gain.expand(matrices),
            anchor.expand(matrices),
            shift.expand(shape + shift.shape[-2:]),
            scale_tril.expand(matrices),
            anchored,
        )
        return SmoothedGaussianChain(kernels, self.steps.expand(shape + self.steps.shape[-1:]), validate_args=False)

    def smoothed(self) -> Smoothed:
        """Moments of all steps, by the Rauch-Tung-Striebel recursion; those at padding have no meaning."""
        gain, anchor, shift, scale_tril, anchored = self.kernels
        matrices, vectors = (-1, *gain.shape[-3:]), (-1, *shift.shape[-2:])
        moments = kalman.rts_smoother(
            BackwardKernels(
                gain.reshape(matrices),
                anchor.reshape(matrices),
                shift.reshape(vectors),
                scale_tril.reshape(matrices),
                anchored,
            )
        )
        return Smoothed(*(v.reshape(*self.batch_shape, *v.shape[1:]) for v in moments))

    @property
    def mean(self) -> Tensor:
        """Mean of each step, (*batch, T, K), zero at padding."""
        return torch.where(self.steps[..., None], self.smoothed().mean, 0)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each number of each step, (*batch, T, K), zero at padding."""
        return torch.where(self.steps[..., None], self.smoothed().covariance.diagonal(dim1=-2, dim2=-1), 0)

    @property
    def precision_blocks(self) -> Tensor:
        """Blocks on the diagonal of the precision of the whole path, (*batch, T, K, K); identities at padding."""
        gain, anchor, _, scale_tril, anchored = self.kernels
        real = self.steps[..., None, None]
        own = torch.where(real, torch.cholesky_inverse(scale_tril), 0)
        blocks = own.clone()
        blocks[..., 1:, :, :] += (gain.mT @ own @ gain)[..., :-1, :, :]
        if anchored:
            blocks[..., 0, :, :] += (anchor.mT @ own @ anchor).sum(-3)
        return torch.where(real, blocks, torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device))

    def factorised(self) -> MultivariateNormal:
        """Return the closest q with independent steps: batch shape (*batch, T), event shape (K,).

        KL(q ‖ p(z given x)) is least at the posterior's own means and the blocks of its precision (Bishop 2006,
        section 10.1.2).
        """
        return MultivariateNormal(self.mean, precision_matrix=self.precision_blocks)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw paths, the last step first (Carter & Kohn 1994): (*sample_shape, *batch, T, K)."""
        gain, anchor, shift, scale_tril, anchored = self.kernels
        noise = _standard_normal(self._extended_shape(sample_shape), shift)
        own = shift + (scale_tril @ noise[..., None])[..., 0]
        if anchored:
            own = torch.cat([own[..., :1, :], own[..., 1:, :] + _apply(anchor[..., 1:, :, :], own[..., :1, :])], -2)
        path = [own[..., -1, :]]
        for t in range(own.shape[-2] - 2, -1, -1):
            path.append(own[..., t, :] + _apply(gain[..., t, :, :], path[-1]))
        return torch.where(self.steps[..., None], torch.stack(path[::-1], -2), 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(z given x) of each path, nats: all steps at once."""
        if self._validate_args:
            self._validate_sample(value)
        gain, anchor, shift, scale_tril, anchored = self.kernels
        next_value = torch.cat([value[..., 1:, :], torch.zeros_like(value[..., :1, :])], -2)
        residual = value - shift - _apply(gain, next_value)
        if anchored:
            residual = residual - _apply(anchor, value[..., :1, :])
        return torch.where(self.steps, _log_normal(residual, scale_tril), 0.0).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy of each sequence's path, nats: that of the kernels."""
        log_scales = self.kernels.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        terms = log_scales + 0.5 * self.event_shape[-1] * (1 + LOG_2PI)
        return torch.where(self.steps, terms, 0.0).sum(-1)

    def expected_log_prob(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """E_q[log p(z given x)] in nats under a q with independent steps.

        Parameters
        ----------
        mean, covariance : Tensor (*batch, T, K), (*batch, T, K, K)
            Moments of q at each step.
        """
        spread = (self.precision_blocks * covariance).sum((-2, -1))
        return self.log_prob(mean) - 0.5 * torch.where(self.steps, spread, 0.0).sum(-1)


@register_kl(Independent, SmoothedGaussianChain)
def _kl_independent_steps(q: Independent, posterior: SmoothedGaussianChain) -> Tensor:
    """KL of a q whose steps are independent normals, padded ones masked out or not."""
    steps: Distribution = q.base_dist
    if isinstance(steps, MaskedDistribution):
        steps = steps.base_dist
    if q.reinterpreted_batch_ndims == 1 and isinstance(steps, Independent) and isinstance(steps.base_dist, Normal):
        covariance = torch.diag_embed(steps.variance)
    elif q.reinterpreted_batch_ndims == 1 and hasattr(steps, "covariance_matrix"):
        covariance = steps.covariance_matrix
    else:
        raise NotImplementedError
    entropy = torch.where(posterior.steps, steps.entropy(), 0.0).sum(-1)
    return -entropy - posterior.expected_log_prob(steps.mean, covariance)


def _log_normal(residual: Tensor, scale_tril: Tensor) -> Tensor:
    """Log N(residual; 0, L Lᵀ), nats, of residuals (..., T, K)."""
    whitened = torch.linalg.solve_triangular(scale_tril, residual[..., None], upper=False)[..., 0]
    log_scale = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * whitened.square().sum(-1) - log_scale - 0.5 * residual.shape[-1] * LOG_2PI


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]


def _standard_normal(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)
