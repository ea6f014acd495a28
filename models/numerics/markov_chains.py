"""Algebra of hidden Markov chains: filter, smoother, likeliest path and stationary distribution, in log space.

A chain has K states, log initial probabilities (K,) and log transition probabilities (K, K), rows summing to one. Its
observations enter as log p(x_t given z_t = k), shape (S, T, K) for S sequences of T steps; ``steps`` (S, T) marks the
real ones, and padding stands at the end of a sequence. A padded step is a step without observation: it changes nothing
that comes before it.

The filter keeps p(z_t given x_1..x_t) normalised and adds up log p(x_t given x_1..x_t-1), so that nothing underflows,
nor loses digits to a sum that grows with t, however long the sequence is. Given its data a hidden chain is a Markov
chain in reverse time too, with the kernels of :func:`backward_kernels`; everything about the posterior follows
from the filter and them, without a second pass over the observations (Frühwirth-Schnatter 2006, section 11.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Filtered(NamedTuple):
    """What the forward pass finds.

    Attributes
    ----------
    log_filtered : Tensor (S, T, K)
        Log p(z_t given x_1..x_t); at padding log p(z_t given all x).
    log_increments : Tensor (S, T)
        Log p(x_t given x_1..x_t-1), nats; zero at padding.
    """

    log_filtered: Tensor
    log_increments: Tensor

    @property
    def log_evidence(self) -> Tensor:
        """Log p(x) of each sequence, (S,), nats."""
        return self.log_increments.sum(-1)


def forward_filter(
    log_initial: Float[Tensor, " k"],
    log_transition: Float[Tensor, "k k"],
    log_emission: Float[Tensor, "*s t k"],
    steps: Bool[Tensor, "*s t"],
) -> Filtered:
    """Forward algorithm (Rabiner 1989, equations 19 to 21, with the scaling of his section V.A, in logarithms)."""
    # Unbound once: to index step by step would make the gradient quadratic in T.
    observed = torch.where(steps[..., None], log_emission, 0.0).unbind(-2)
    filtered: list[Tensor] = []
    increments: list[Tensor] = []
    predicted = log_initial.expand(observed[0].shape)
    for t, emission in enumerate(observed):
        if t > 0:
            predicted = torch.logsumexp(filtered[-1][..., :, None] + log_transition, -2)
        joint = predicted + emission
        increment = torch.logsumexp(joint, -1, keepdim=True)
        filtered.append(joint - finite(increment))
        increments.append(increment)
    return Filtered(torch.stack(filtered, -2), torch.where(steps, torch.cat(increments, -1), 0.0))


def backward_kernels(
    log_filtered: Float[Tensor, "*s t k"], log_transition: Float[Tensor, "k k"]
) -> Float[Tensor, "*s u k k"]:
    """Log p(z_t = i given z_t+1 = j, x) at [..., t, i, j], for the T - 1 pairs of neighbours.

    A column of minus infinity belongs to a state that cannot be reached at step t + 1.
    """
    joint = log_filtered[..., :-1, :, None] + log_transition
    return joint - finite(torch.logsumexp(joint, -2, keepdim=True))


def smooth(
    log_filtered: Float[Tensor, "*s t k"],
    log_transition: Float[Tensor, "k k"],
    steps: Bool[Tensor, "*s t"],
) -> Float[Tensor, "*s t k"]:
    """Return p(z_t = k given x), zero at padding (Kim 1994: the filter, run back through the reverse kernels)."""
    kernels = backward_kernels(log_filtered, log_transition).exp().unbind(-3)
    marginals = [log_filtered[..., -1, :].exp()]
    for kernel in reversed(kernels):
        marginals.append((kernel @ marginals[-1][..., None])[..., 0])
    return torch.where(steps[..., None], torch.stack(marginals[::-1], -2), 0.0)


def pair_probabilities(
    log_filtered: Float[Tensor, "*s t k"],
    log_transition: Float[Tensor, "k k"],
    marginals: Float[Tensor, "*s t k"],
) -> Float[Tensor, "*s u k k"]:
    """Return p(z_t = i, z_t+1 = j given x) at [..., t, i, j], zero where step t + 1 is padding.

    ``marginals`` are those of :func:`smooth`. Sums over t are the expected numbers of transitions.
    """
    return backward_kernels(log_filtered, log_transition).exp() * marginals[..., 1:, None, :]


def most_likely_path(
    log_initial: Float[Tensor, " k"],
    log_transition: Float[Tensor, "k k"],
    log_emission: Float[Tensor, "*s t k"],
    steps: Bool[Tensor, "*s t"],
) -> Int[Tensor, "*s t"]:
    """Viterbi algorithm (Rabiner 1989, equations 33 to 35): argmax over z of p(z given x), zero at padding.

    Ties go to the state with the lower number. Each step's best is shifted to zero, so that scores stay small.
    """
    stay = torch.arange(len(log_initial), device=log_emission.device)
    observed, real = log_emission.unbind(-2), steps.unbind(-1)
    score = log_initial + torch.where(real[0][..., None], observed[0], 0.0)
    origins = []
    for emission, is_real in zip(observed[1:], real[1:], strict=True):
        best = (score[..., :, None] + log_transition).max(-2)
        moved = best.values + emission
        moved = moved - finite(moved.amax(-1, keepdim=True))
        # Past the end nothing moves: a likely transition there must not choose the last state.
        score = torch.where(is_real[..., None], moved, score)
        origins.append(torch.where(is_real[..., None], best.indices, stay))
    path = [score.argmax(-1)]
    for origin in reversed(origins):
        path.append(origin.gather(-1, path[-1][..., None])[..., 0])
    return torch.where(steps, torch.stack(path[::-1], -1), 0)


def log_stationary(log_transition: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
    """Log stationary distribution of an irreducible chain, by the elimination of Grassmann, Taksar and Heyman (1985).

    States are taken out one by one and the paths through them added to the transitions of the others. Nothing is
    ever subtracted, so every probability is right to rounding, in chains too that hardly ever leave a state.
    """
    reduced = log_transition
    into_last = []
    while len(reduced) > 1:
        leave, rest = reduced[-1, :-1], reduced[:-1, :-1]
        into = reduced[:-1, -1] - torch.logsumexp(leave, -1)
        into_last.append(into)
        reduced = torch.logaddexp(rest, into[:, None] + leave)
    log_weight = log_transition.new_zeros(1)
    for into in reversed(into_last):
        log_weight = torch.cat([log_weight, torch.logsumexp(log_weight + into, -1, keepdim=True)])
    return log_weight - torch.logsumexp(log_weight, -1)


def finite(logs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Lift minus infinity to the least finite number, so that nothing impossible times or less itself is NaN."""
    return logs.clamp(min=torch.finfo(logs.dtype).min)
