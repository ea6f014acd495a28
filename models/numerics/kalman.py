"""Kalman filter and Rauch-Tung-Striebel smoother of linear Gaussian chains, batched over sequences.

The chain is z_1 ~ N(m, P) or flat, z_t = A z_{t-1} + N(0, Q), and it is seen through x_t = C z_t + loc + N(0, diag(r)).
What is NaN in x has not been observed and is marginalised.

Covariances are updated in Joseph's form, as sums of positive semidefinite terms: nothing is subtracted, so they stay
positive definite over any number of steps. The same holds backwards: the smoother is written as the marginal
moments of the chain that runs from the last step to the first.

A flat start (exact diffuse initial state) is treated as an unknown z_1: the filter runs with z_1 fixed, and carries
how every mean depends on z_1 as further columns of the mean (Rosenberg 1973; de Jong 1991). The density of x given
z_1 is then normal in z_1, and is integrated in closed form: no large variance stands in for infinity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


class StateSpace(NamedTuple):
    """A linear Gaussian chain and how it is seen; every covariance is one, not a standard deviation.

    Attributes
    ----------
    initial_mean : Tensor (K,) or (S, K)
        Mean of z_1; under a flat start the point from which z_1 is measured, of which nothing depends but rounding.
    initial_covariance : Tensor (K, K)
        Covariance of z_1; not used under a flat start.
    transition, process : Tensor (K, K)
        A, and the covariance Q of the steps, which must be positive definite.
    loading : Tensor (D, K)
        C.
    loc, noise : Tensor (D,)
        Offset of x, and the variances of its noise.
    diffuse : bool
        Whether z_1 is flat: its prior has density 1 everywhere.
    """

    initial_mean: Tensor
    initial_covariance: Tensor
    transition: Tensor
    process: Tensor
    loading: Tensor
    loc: Tensor
    noise: Tensor
    diffuse: bool


class Filtered(NamedTuple):
    """What the Kalman filter knows of z_t after x_1, ..., x_t; under a flat start, all given z_1.

    Attributes
    ----------
    log_density : Tensor (S,)
        log p(x_1, ..., x_T), nats; under a flat start integrated over z_1.
    mean : Tensor (S, T, K, 1 + r)
        Mean; with a flat start (r = K) the mean at z_1 = initial_mean, then its derivative by z_1.
    covariance : Tensor (S, T, K, K)
        Covariance.
    start_mean, start_covariance : Tensor (S, r), (S, r, r)
        Posterior moments of z_1 - initial_mean given all of x, where the start is flat.
    """

    log_density: Tensor
    mean: Tensor
    covariance: Tensor
    start_mean: Tensor
    start_covariance: Tensor


class BackwardKernels(NamedTuple):
    """The posterior as a chain from the last step to the first: z_t = J z_{t+1} + H z_1 + shift + N(0, L Lᵀ).

    H is zero but under a flat start, where z_1 is drawn first, with J = H = 0. J is zero at the last step too.

    Attributes
    ----------
    gain, anchor : Tensor (S, T, K, K)
        J, the smoother's gain, and H.
    shift : Tensor (S, T, K)
        What is added.
    scale_tril : Tensor (S, T, K, K)
        L; the identity at padded steps.
    anchored : bool
        Whether the start is flat, so that H counts.
    """

    gain: Tensor
    anchor: Tensor
    shift: Tensor
    scale_tril: Tensor
    anchored: bool


class Smoothed(NamedTuple):
    """Moments of the chain given all of x.

    Attributes
    ----------
    mean : Tensor (S, T, K)
        E[z_t].
    covariance : Tensor (S, T, K, K)
        Cov[z_t].
    lag_one : Tensor (S, T - 1, K, K)
        Cov[z_{t+1}, z_t].
    covariance_given_start : Tensor (S, T, K, K)
        Cov[z_t given z_1] under a flat start; otherwise the covariance.
    response : Tensor (S, T, K, K)
        Derivative of E[z_t given z_1] by z_1 under a flat start; otherwise zero.
    """

    mean: Tensor
    covariance: Tensor
    lag_one: Tensor
    covariance_given_start: Tensor
    response: Tensor


class Disturbances(NamedTuple):
    """Moments given all of x of the steps w_t = z_{t+1} - A z_t, t = 1, ..., T - 1.

    Attributes
    ----------
    mean : Tensor (S, T - 1, K)
        E[w_t].
    covariance, past : Tensor (S, T - 1, K, K)
        Cov[w_t], and Cov[w_t, z_t].
    """

    mean: Tensor
    covariance: Tensor
    past: Tensor


def kalman_filter(x: Float[Tensor, "s t d"], model: StateSpace, mask: Bool[Tensor, "s t"]) -> Filtered:
    """Filter all sequences at once (Durbin & Koopman 2012, section 4.3; Joseph's form of the update).

    Parameters
    ----------
    x : Tensor (S, T, D)
        Observations; NaN where there is none, and at padding.
    model : StateSpace
        The chain.
    mask : Tensor (S, T) of bool
        Whether a step belongs to its sequence: at padding, which stands at the end only, the chain stands still.
    """
    observed = ~x.isnan()
    centred = torch.where(observed, x - model.loc, torch.zeros_like(x))
    # A value that is missing is replaced by noise of variance one that is independent of everything: its row of the
    # loading and its residual are zero, and it adds log 1 to the determinant. Only its log 2π must not be counted.
    noise = torch.where(observed, model.noise, torch.ones_like(x))
    mean, covariance = _start(x, model)
    identity = torch.eye(model.transition.shape[0], dtype=x.dtype, device=x.device)
    moves = mask[..., None, None]
    transition, process = torch.where(moves, model.transition, identity), model.process * moves
    means, covariances = [], []
    log_determinant = -LOG_2PI * observed.sum((1, 2)).to(x.dtype)
    gram = mean.new_zeros(len(x), mean.shape[-1], mean.shape[-1])
    for t in range(x.shape[1]):
        if t > 0:
            mean = transition[:, t] @ mean
            covariance = _symmetric(transition[:, t] @ covariance @ transition[:, t].mT + process[:, t])
        loading = model.loading * observed[:, t, :, None]
        cross = covariance @ loading.mT
        factor = torch.linalg.cholesky(loading @ cross + torch.diag_embed(noise[:, t]))
        gain = torch.cholesky_solve(cross.mT, factor).mT
        innovation = _first_column(centred[:, t], mean.shape[-1]) - loading @ mean
        whitened = torch.linalg.solve_triangular(factor, innovation, upper=False)
        gram = gram + whitened.mT @ whitened
        log_determinant = log_determinant - 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        mean = mean + gain @ innovation
        kept = identity - gain @ loading
        covariance = _symmetric(kept @ covariance @ kept.mT + (gain * noise[:, t, None, :]) @ gain.mT)
        means.append(mean)
        covariances.append(covariance)
    log_density, start_mean, start_covariance = _integrate_start(0.5 * log_determinant, gram)
    return Filtered(log_density, torch.stack(means, 1), torch.stack(covariances, 1), start_mean, start_covariance)


def backward_kernels(filtered: Filtered, model: StateSpace, mask: Bool[Tensor, "s t"]) -> BackwardKernels:
    """Turn the filter's moments into the posterior's chain (Rauch, Tung & Striebel 1965), all steps at once.

    Parameters
    ----------
    mask : Tensor (S, T) of bool
        Whether a step belongs to its sequence; padding stands at the end only.
    """
    transition, process = model.transition, model.process
    identity = torch.eye(transition.shape[0], dtype=process.dtype, device=process.device)
    # The last step of a sequence has no successor: its kernel is the filter's own distribution.
    follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)[..., None, None]
    forward = transition @ filtered.covariance
    predicted = torch.linalg.cholesky(_symmetric(forward @ transition.mT + process))
    gain = torch.cholesky_solve(forward, predicted).mT * follows
    kept = identity - gain @ transition
    means = kept @ filtered.mean
    covariance = _symmetric(kept @ filtered.covariance @ kept.mT + gain @ process @ gain.mT)
    if model.diffuse:
        means, covariance = _anchor_at_start(means, covariance, filtered, model)
    covariance = torch.where(mask[..., None, None], covariance, identity)
    shift, anchor = means[..., 0], means[..., 1:] if model.diffuse else torch.zeros_like(gain)
    return BackwardKernels(
        gain, anchor, shift * mask[..., None], torch.linalg.cholesky(covariance), anchored=model.diffuse
    )


def rts_smoother(kernels: BackwardKernels) -> Smoothed:
    """Moments given all of x: the recursion of Rauch, Tung & Striebel (1965) in Joseph's form.

    The covariance is L Lᵀ + J V Jᵀ, a sum, where the usual form P + J (V - P') Jᵀ subtracts.
    """
    gain, anchor = kernels.gain, kernels.anchor
    own = kernels.scale_tril @ kernels.scale_tril.mT
    first = 1 if kernels.anchored else 0
    mean, covariance, response = kernels.shift[:, -1], own[:, -1], anchor[:, -1]
    moments = [(mean, covariance, response)]
    for t in range(gain.shape[1] - 2, first - 1, -1):
        mean = kernels.shift[:, t] + (gain[:, t] @ mean[..., None])[..., 0]
        covariance = own[:, t] + _symmetric(gain[:, t] @ covariance @ gain[:, t].mT)
        response = anchor[:, t] + gain[:, t] @ response
        moments.append((mean, covariance, response))
    if kernels.anchored:
        # z_1 given itself; the loop may have nothing before it where the sequence is one step long.
        identity = torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device).expand_as(own[:, 0])
        moments = moments[: gain.shape[1] - 1]
        moments.append((torch.zeros_like(mean), torch.zeros_like(covariance), identity))
    intercepts, given_start, responses = (torch.stack(parts[::-1], 1) for parts in zip(*moments, strict=True))
    lag_one = given_start[:, 1:] @ gain[:, :-1].mT
    if not kernels.anchored:
        return Smoothed(intercepts, given_start, lag_one, given_start, responses)
    start = own[:, :1]
    return Smoothed(
        intercepts + (responses @ kernels.shift[:, :1, :, None])[..., 0],
        given_start + _symmetric(responses @ start @ responses.mT),
        lag_one + responses[:, 1:] @ start @ responses[:, :-1].mT,
        given_start,
        responses,
    )


def smoothed_disturbances(
    kernels: BackwardKernels, smoothed: Smoothed, transition: Float[Tensor, "k k"]
) -> Disturbances:
    """Moments of the steps of the chain, which EM needs, without subtracting covariances of the states.

    By z_t = J z_{t+1} + N(shift, L Lᵀ), w_t = (I - A J) z_{t+1} - A N(shift, L Lᵀ).
    """
    gain = kernels.gain[:, :-1]
    own = kernels.scale_tril[:, :-1] @ kernels.scale_tril[:, :-1].mT
    if kernels.anchored:
        own = torch.cat([torch.zeros_like(own[:, :1]), own[:, 1:]], 1)  # z_1 given itself
    later = smoothed.covariance_given_start[:, 1:]
    kept = torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device) - transition @ gain
    mean = smoothed.mean[:, 1:] - smoothed.mean[:, :-1] @ transition.mT
    covariance = kept @ later @ kept.mT + transition @ own @ transition.mT
    past = kept @ later @ gain.mT - transition @ own
    if kernels.anchored:
        start = kernels.scale_tril[:, :1] @ kernels.scale_tril[:, :1].mT
        response = smoothed.response[:, 1:] - transition @ smoothed.response[:, :-1]
        covariance = covariance + response @ start @ response.mT
        past = past + response @ start @ smoothed.response[:, :-1].mT
    return Disturbances(mean, _symmetric(covariance), past)


def _start(x: Tensor, model: StateSpace) -> tuple[Tensor, Tensor]:
    states = model.transition.shape[0]
    mean = model.initial_mean.expand(len(x), states)[..., None]
    if not model.diffuse:
        return mean, model.initial_covariance.expand(len(x), -1, -1)
    identity = torch.eye(states, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    return torch.cat([mean, identity], -1), torch.zeros_like(identity)


def _integrate_start(log_determinant: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # gram is the quadratic form of x - (means at initial_mean) and of minus their derivatives by z_1.
    precision, projection = gram[:, 1:, 1:], -gram[:, 1:, 0]
    factor = torch.linalg.cholesky(precision)
    whitened = torch.linalg.solve_triangular(factor, projection[..., None], upper=False)[..., 0]
    quadratic = gram[:, 0, 0] - whitened.square().sum(-1)
    log_density = log_determinant - 0.5 * quadratic + 0.5 * precision.shape[-1] * LOG_2PI
    log_density = log_density - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    start_mean = torch.linalg.solve_triangular(factor.mT, whitened[..., None], upper=True)[..., 0]
    return log_density, start_mean, torch.cholesky_inverse(factor) if precision.numel() else precision


def _anchor_at_start(means: Tensor, covariance: Tensor, filtered: Filtered, model: StateSpace) -> tuple[Tensor, Tensor]:
    """Measure the means from z_1 = 0, and let z_1 itself come from its posterior."""
    origin = model.initial_mean.expand(len(means), means.shape[-2])
    at_zero = means[..., :1] - means[..., 1:] @ origin[:, None, :, None]
    start = torch.cat([(origin + filtered.start_mean)[..., None], torch.zeros_like(means[:, 0, :, 1:])], -1)
    means = torch.cat([start[:, None], torch.cat([at_zero, means[..., 1:]], -1)[:, 1:]], 1)
    return means, torch.cat([filtered.start_covariance[:, None], covariance[:, 1:]], 1)


def _first_column(vectors: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(vectors[..., None], (0, columns - 1))


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2
