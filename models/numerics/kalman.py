"""Kalman filter and Rauch-Tung-Striebel smoother of linear Gaussian chains, batched over sequences.

The chain is z_1 ~ N(m, P) or flat, z_t = A z_{t-1} + N(0, Q), and it is seen through x_t = C z_t + loc + N(0, diag(r)).
What is NaN in x has not been observed and is marginalised.

Covariances are updated in Joseph's form, as sums of positive semidefinite terms: nothing is subtracted, so they stay
positive definite over any number of steps. The same holds backwards: the smoother is written as the marginal
moments of the chain that runs from the last step to the first.

A flat start (exact diffuse initial state) is treated as an unknown z_1: the filter runs with z_1 fixed, and carries
how every mean depends on z_1 as further columns of the mean (Rosenberg 1973; de Jong 1991). The density of x given
z_1 is then normal in z_1, and is integrated in closed form: no large variance stands in for infinity.

On the CPU the recursions over time are the compiled ones of ``kalman_loops.py``; the functions ``*_by_torch`` are the
same in plain torch, for other devices and for derivatives that no loop computes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from elbozoo.models.numerics import compiled

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

    Raises
    ------
    torch.linalg.LinAlgError
        If a covariance has no Cholesky factor, as of a chain that explodes.
    """
    observed = ~x.isnan()
    centred = torch.where(observed, x - model.loc, torch.zeros_like(x))
    chain = (*_start(x, model), model.transition, model.process, model.loading, model.noise)
    run = _kalman if compiled.suits(x) else filter_by_torch
    log_determinant, gram, means, covariances = run(centred, observed, mask, *chain)
    log_determinant = log_determinant - LOG_2PI * observed.sum((1, 2)).to(x.dtype)
    log_density, start_mean, start_covariance = _integrate_start(0.5 * log_determinant, gram)
    return Filtered(log_density, means, covariances, start_mean, start_covariance)


def filter_by_torch(
    centred: Float[Tensor, "s t d"],
    observed: Bool[Tensor, "s t d"],
    mask: Bool[Tensor, "s t"],
    first_mean: Float[Tensor, "s k c"],
    first_covariance: Float[Tensor, "s k k"],
    transition: Float[Tensor, "k k"],
    process: Float[Tensor, "k k"],
    loading: Float[Tensor, "d k"],
    noise: Float[Tensor, " d"],
) -> tuple[Float[Tensor, " s"], Float[Tensor, "s c c"], Float[Tensor, "s t k c"], Float[Tensor, "s t k k"]]:
    """Filter in operations of torch: on any device, and differentiable any number of times.

    Returns
    -------
    log_determinant : Tensor (S,)
        Minus the sum of log |Cov[x_t given the past]|.
    gram : Tensor (S, C, C)
        Sum of squares of the whitened errors of the prediction, and of their derivatives by z_1.
    means, covariances : Tensor (S, T, K, C), (S, T, K, K)
        As in :class:`Filtered`.
    """
    # A value that is missing is replaced by noise of variance one that is independent of everything: its row of the
    # loading and its residual are zero, and it adds log 1 to the determinant. Only its log 2π must not be counted.
    variance = torch.where(observed, noise, torch.ones_like(centred))
    mean, covariance = first_mean, first_covariance
    identity = torch.eye(len(transition), dtype=centred.dtype, device=centred.device)
    moves = mask[..., None, None]
    transitions, processes = torch.where(moves, transition, identity), process * moves
    means, covariances = [], []
    log_determinant = centred.new_zeros(len(centred))
    gram = mean.new_zeros(len(centred), mean.shape[-1], mean.shape[-1])
    for t in range(centred.shape[1]):
        if t > 0:
            mean = transitions[:, t] @ mean
            covariance = _symmetric(transitions[:, t] @ covariance @ transitions[:, t].mT + processes[:, t])
        seen = loading * observed[:, t, :, None]
        cross = covariance @ seen.mT
        factor = torch.linalg.cholesky(seen @ cross + torch.diag_embed(variance[:, t]))
        gain = torch.cholesky_solve(cross.mT, factor).mT
        innovation = _first_column(centred[:, t], mean.shape[-1]) - seen @ mean
        whitened = torch.linalg.solve_triangular(factor, innovation, upper=False)
        gram = gram + whitened.mT @ whitened
        log_determinant = log_determinant - 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        mean = mean + gain @ innovation
        kept = identity - gain @ seen
        covariance = _symmetric(kept @ covariance @ kept.mT + (gain * variance[:, t, None, :]) @ gain.mT)
        means.append(mean)
        covariances.append(covariance)
    return log_determinant, gram, torch.stack(means, 1), torch.stack(covariances, 1)


def backward_kernels(filtered: Filtered, model: StateSpace, mask: Bool[Tensor, "s t"]) -> BackwardKernels:
    """Turn the filter's moments into the posterior's chain (Rauch, Tung & Striebel 1965), all steps at once.

    Parameters
    ----------
    mask : Tensor (S, T) of bool
        Whether a step belongs to its sequence; padding stands at the end only.
    """
    if compiled.suits_without_gradient(*filtered, model.transition, model.process):
        start = filtered.start_covariance if model.diffuse else torch.zeros_like(filtered.covariance[:, 0])
        given = (mask, filtered.mean, filtered.covariance, model.transition, model.process, start)
        gain, means, scale_tril = _kernels(*given, model.diffuse)
    else:
        gain, means, scale_tril = _kernels_by_torch(filtered, model, mask)
    if model.diffuse:
        means = _anchor_at_start(means, filtered, model)
    shift, anchor = means[..., 0], means[..., 1:] if model.diffuse else torch.zeros_like(gain)
    return BackwardKernels(gain, anchor, shift * mask[..., None], scale_tril, anchored=model.diffuse)


def _kernels_by_torch(filtered: Filtered, model: StateSpace, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gains, what the means become, and factors; differentiable."""
    transition, process = model.transition, model.process
    identity = torch.eye(transition.shape[0], dtype=process.dtype, device=process.device)
    # The last step of a sequence has no successor: its kernel is the filter's own distribution.
    follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)[..., None, None]
    forward = transition @ filtered.covariance
    predicted = torch.linalg.cholesky(_symmetric(forward @ transition.mT + process))
    gain = torch.cholesky_solve(forward, predicted).mT * follows
    kept = identity - gain @ transition
    covariance = _symmetric(kept @ filtered.covariance @ kept.mT + gain @ process @ gain.mT)
    if model.diffuse:
        covariance = torch.cat([filtered.start_covariance[:, None], covariance[:, 1:]], 1)
    covariance = torch.where(mask[..., None, None], covariance, identity)
    means = (kept @ filtered.mean) * mask[..., None, None]
    return gain, means, torch.linalg.cholesky(covariance)


def rts_smoother(kernels: BackwardKernels) -> Smoothed:
    """Moments given all of x: the recursion of Rauch, Tung & Striebel (1965) in Joseph's form.

    The covariance is L Lᵀ + J V Jᵀ, a sum, where the usual form P + J (V - P') Jᵀ subtracts.
    """
    run = _smooth if compiled.suits_without_gradient(*kernels[:4]) else _smooth_by_torch
    gain, first = kernels.gain, 1 if kernels.anchored else 0
    intercepts, given_start, responses, lag_one = run(*kernels[:4], first)
    if not kernels.anchored:
        return Smoothed(intercepts, given_start, lag_one, given_start, responses)
    # z_1 given itself.
    identity = torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device).expand_as(gain[:, :1])
    intercepts, given_start, responses = (
        torch.cat([start, later[:, 1:]], 1)
        for start, later in (
            (torch.zeros_like(intercepts[:, :1]), intercepts),
            (torch.zeros_like(identity), given_start),
            (identity, responses),
        )
    )
    start = kernels.scale_tril[:, :1] @ kernels.scale_tril[:, :1].mT
    return Smoothed(
        intercepts + (responses @ kernels.shift[:, :1, :, None])[..., 0],
        given_start + _symmetric(responses @ start @ responses.mT),
        lag_one + responses[:, 1:] @ start @ responses[:, :-1].mT,
        given_start,
        responses,
    )


def _smooth_by_torch(
    gain: Tensor, anchor: Tensor, shift: Tensor, scale_tril: Tensor, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means, covariances, responses and covariances of neighbours from the last step to ``first``; differentiable."""
    own = scale_tril @ scale_tril.mT
    moments = [(shift[:, -1], own[:, -1], anchor[:, -1])]
    for t in range(gain.shape[1] - 2, first - 1, -1):
        mean, covariance, response = moments[-1]
        moments.append(
            (
                shift[:, t] + (gain[:, t] @ mean[..., None])[..., 0],
                own[:, t] + _symmetric(gain[:, t] @ covariance @ gain[:, t].mT),
                anchor[:, t] + gain[:, t] @ response,
            )
        )
    moments += moments[-1:] * (gain.shape[1] - len(moments))
    means, covariances, responses = (torch.stack(parts[::-1], 1) for parts in zip(*moments, strict=True))
    return means, covariances, responses, covariances[:, 1:] @ gain[:, :-1].mT


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


def _anchor_at_start(means: Tensor, filtered: Filtered, model: StateSpace) -> Tensor:
    """Measure the means from z_1 = 0, and let z_1 itself come from its posterior."""
    origin = model.initial_mean.expand(len(means), means.shape[-2])
    at_zero = means[..., :1] - means[..., 1:] @ origin[:, None, :, None]
    start = torch.cat([(origin + filtered.start_mean)[..., None], torch.zeros_like(means[:, 0, :, 1:])], -1)
    return torch.cat([start[:, None], torch.cat([at_zero, means[..., 1:]], -1)[:, 1:]], 1)


def _first_column(vectors: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(vectors[..., None], (0, columns - 1))


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2


def _run_kalman(centred: Tensor, observed: Tensor, mask: Tensor, *chain: Tensor) -> tuple[Tensor, ...]:
    from elbozoo.models.numerics import kalman_loops as loops

    (sequences, steps), (states, width) = mask.shape, chain[0].shape[1:]
    found = [np.zeros(sequences), np.zeros((sequences, width, width))]
    found += [np.empty((sequences, steps, states, width)), np.empty((sequences, steps, states, states))]
    failed = np.zeros(sequences, np.int64)
    arrays = (*map(compiled.as_array, (centred, observed, mask, *chain)), *found, failed)
    compiled.over_sequences(loops.kalman, sequences, _work(centred, states), *arrays)
    _refuse_failures(failed)
    return tuple(compiled.as_tensor(array, centred) for array in found)


def _run_kalman_slopes(*given: Tensor) -> tuple[Tensor, ...]:
    from elbozoo.models.numerics import kalman_loops as loops

    centred, (first_mean, first_covariance, *shared) = given[0], given[3:9]
    sequences = len(centred)
    slopes = [np.zeros(v.shape) for v in (centred, first_mean, first_covariance)]
    slopes += [np.zeros((sequences, *v.shape)) for v in shared]
    work = 10 * _work(centred, first_mean.shape[1])
    compiled.over_sequences(loops.kalman_slopes, sequences, work, *map(compiled.as_array, given), *slopes)
    summed = slopes[:3] + [slope.sum(0) for slope in slopes[3:]]
    return tuple(compiled.as_tensor(array, centred) for array in summed)


def _run_kernels(
    mask: Tensor, mean: Tensor, covariance: Tensor, transition: Tensor, process: Tensor, start: Tensor, anchored: bool
) -> tuple[Tensor, ...]:
    from elbozoo.models.numerics import kalman_loops as loops

    found = [np.zeros(covariance.shape), np.zeros(mean.shape), np.zeros(covariance.shape)]
    failed = np.zeros(len(mean), np.int64)
    given = map(compiled.as_array, (mask, mean, covariance, transition, process, start))
    work = 10 * covariance.numel() * len(transition)
    compiled.over_sequences(loops.kernels, len(mean), work, *given, anchored, *found, failed)
    _refuse_failures(failed)
    return tuple(compiled.as_tensor(array, mean) for array in found)


def _run_smooth(gain: Tensor, anchor: Tensor, shift: Tensor, scale_tril: Tensor, first: int) -> tuple[Tensor, ...]:
    from elbozoo.models.numerics import kalman_loops as loops

    shape = gain.shape
    found = [np.zeros(shift.shape), np.zeros(shape), np.zeros(shape if first else (1, 1, 1, 1))]
    found.append(np.zeros((shape[0], shape[1] - 1, *shape[2:])))
    given = map(compiled.as_array, (gain, anchor, shift, scale_tril))
    compiled.over_sequences(loops.smooth, len(gain), 4 * gain.numel() * shape[-1], *given, first, *found)
    found[2] = found[2] if first else np.zeros(shape)
    return tuple(compiled.as_tensor(array, gain) for array in found)


CHAIN = "Tensor first_mean, Tensor first_covariance, Tensor transition, Tensor process, Tensor loading, Tensor noise"
DATA = "Tensor centred, Tensor observed, Tensor mask"


def _empty_filtered(centred: Tensor, observed: Tensor, mask: Tensor, *chain: Tensor) -> tuple[Tensor, ...]:
    sequences, (states, width) = len(mask), chain[0].shape[1:]
    shapes = ((sequences,), (sequences, width, width), (*mask.shape, states, width), (*mask.shape, states, states))
    return tuple(centred.new_empty(shape) for shape in shapes)


_kalman = compiled.operation(
    f"kalman_filter({DATA}, {CHAIN}) -> (Tensor, Tensor, Tensor, Tensor)", _run_kalman, _empty_filtered
)
_kalman_slopes = compiled.operation(
    f"kalman_filter_slopes({DATA}, {CHAIN}, Tensor means, Tensor covariances, Tensor by_log_determinant, "
    "Tensor by_gram, Tensor by_means, Tensor by_covariances)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_kalman_slopes,
    lambda *given: tuple(compiled.blank(v) for v in (given[0], *given[3:9])),
)
_kernels = compiled.operation(
    "kalman_kernels(Tensor mask, Tensor mean, Tensor covariance, Tensor transition, Tensor process, Tensor start, "
    "bool anchored) -> (Tensor, Tensor, Tensor)",
    _run_kernels,
    lambda mask, mean, covariance, transition, process, start, anchored: (
        compiled.blank(covariance),
        compiled.blank(mean),
        compiled.blank(covariance),
    ),
)
_smooth = compiled.operation(
    "kalman_smooth(Tensor gain, Tensor anchor, Tensor shift, Tensor scale_tril, int first)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_smooth,
    lambda gain, anchor, shift, scale_tril, first: (
        compiled.blank(shift),
        compiled.blank(gain),
        compiled.blank(gain),
        compiled.blank(gain[:, 1:]),
    ),
)


def _keep_filter(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[2:])


def _filter_backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
    inputs, found = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    if not torch.is_grad_enabled():
        by_centred, *by_chain = _kalman_slopes(*inputs, *found, *slopes)
        return by_centred, None, None, *by_chain
    observed, mask = inputs[1:3]
    by_centred, *by_chain = compiled.slopes_by_torch(
        lambda centred, *chain: filter_by_torch(centred, observed, mask, *chain), (inputs[0], *inputs[3:]), slopes
    )
    return by_centred, None, None, *by_chain


_kalman.register_autograd(_filter_backward, setup_context=_keep_filter)


def _refuse_failures(failed: compiled.Array) -> None:
    if failed.any():
        sequence = int(failed.argmax())
        raise torch.linalg.LinAlgError(
            f"sequence {sequence + 1}, step {failed[sequence]} (counted from 1): found a covariance that is not "
            "positive definite, expected one that is; the chain explodes, or a variance has underflowed"
        )


def _work(values: Tensor, states: int) -> int:
    """About how many multiplications a filter over ``values`` (S, T, D) with K states takes."""
    columns = values.shape[-1]
    return values.shape[0] * values.shape[1] * (3 * states**3 + 4 * states * columns * (states + columns) + 50)
