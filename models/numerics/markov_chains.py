"""Algebra of hidden Markov chains: filter, smoother, likeliest path and stationary distribution, in log space.

A chain has K states, log initial probabilities (K,) and log transition probabilities (K, K), rows summing to one. Its
observations enter as log p(x_t given z_t = k), shape (S, T, K) for S sequences of T steps; ``steps`` (S, T) marks the
real ones, and padding stands at the end of a sequence. A padded step is a step without observation: it changes nothing
that comes before it.

The filter keeps p(z_t given x_1..x_t) normalised and adds up log p(x_t given x_1..x_t-1), so that nothing underflows,
nor loses digits to a sum that grows with t, however long the sequence is. Given its data a hidden chain is a Markov
chain in reverse time too, with the kernels of :func:`backward_kernels`; everything about the posterior follows
from the filter and them, without a second pass over the observations (Frühwirth-Schnatter 2006, section 11.2).

On the CPU the recursions over time are the compiled ones of ``markov_chain_loops.py``; the functions ``*_by_torch``
are the same in plain torch, for other devices and for derivatives of derivatives.

References
----------
Hassan, S., Särkkä, S. and García-Fernández, Á. F. (2021). Temporal Parallelization of Inference in Hidden Markov
Models. IEEE Transactions on Signal Processing 69, 4875-4887.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from elbozoo.models.numerics import compiled

# Powers of it down to the third stay far from where numbers underflow, 1e-308.
RARE = 1e-80
# Multiplications, and states, from which on two threads that share one sequence save more than it costs to start them
# and to join what they find: 1.3 times as fast with 20 states and 1.5 with 40 on 100,000 steps, and slower with 10.
WORK_FROM_BOTH_ENDS = 4_000_000
STATES_FROM_BOTH_ENDS = 16


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


class Expected(NamedTuple):
    """What EM needs to know of the posterior.

    Attributes
    ----------
    log_evidence : Tensor (S,)
        Log p(x) of each sequence, nats.
    marginals : Tensor (S, T, K)
        p(z_t = k given x), zero at padding.
    transitions : Tensor (K, K)
        Expected number of moves from each state to each, over all sequences.
    """

    log_evidence: Tensor
    marginals: Tensor
    transitions: Tensor


def forward_filter(
    log_initial: Float[Tensor, " k"],
    log_transition: Float[Tensor, "k k"],
    log_emission: Float[Tensor, "*s t k"],
    steps: Bool[Tensor, "*s t"],
) -> Filtered:
    """Forward algorithm (Rabiner 1989, equations 19 to 21, with the scaling of his section V.A, in logarithms)."""
    observed = torch.where(steps[..., None], log_emission, 0.0)
    # Measured from the largest of its step, which joins the evidence in the end: an outlier's log density would swallow
    # the digits of the states' log probabilities.
    largest = finite(observed.detach().amax(-1, keepdim=True))
    relative = observed - largest
    if compiled.suits(relative):
        log_filtered, increments = _filter(log_initial, log_transition, relative.reshape(-1, *relative.shape[-2:]))
        log_filtered, increments = log_filtered.reshape(relative.shape), increments.reshape(relative.shape[:-1])
    else:
        log_filtered, increments = filter_by_torch(log_initial, log_transition, relative)
    return Filtered(log_filtered, torch.where(steps, increments + largest[..., 0], 0.0))


def filter_by_torch(
    log_initial: Float[Tensor, " k"], log_transition: Float[Tensor, "k k"], log_emission: Float[Tensor, "*s t k"]
) -> tuple[Float[Tensor, "*s t k"], Float[Tensor, "*s t"]]:
    """Filter in operations of torch: on any device, and differentiable any number of times.

    Returns
    -------
    log_filtered : Tensor (S, T, K)
        As in :class:`Filtered`.
    log_increments : Tensor (S, T)
        Likewise, and at padding, where ``log_emission`` is zero, zero but for rounding.
    """
    filtered: list[Tensor] = []
    increments: list[Tensor] = []
    predicted = log_initial.expand(log_emission[..., 0, :].shape)
    # Unbound once: to index step by step would make the gradient quadratic in T.
    for t, emission in enumerate(log_emission.unbind(-2)):
        if t > 0:
            predicted = torch.logsumexp(filtered[-1][..., :, None] + log_transition, -2)
        joint = predicted + emission
        increment = torch.logsumexp(joint, -1, keepdim=True)
        filtered.append(joint - finite(increment))
        increments.append(increment)
    return torch.stack(filtered, -2), torch.cat(increments, -1)


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
    if not compiled.suits(log_filtered):
        return smooth_by_torch(log_filtered, log_transition, steps)
    shape = log_filtered.shape
    marginals: Tensor = _smooth(log_filtered.reshape(-1, *shape[-2:]), log_transition, _rows(steps, shape))[0]
    return marginals.reshape(shape)


def smooth_by_torch(
    log_filtered: Float[Tensor, "*s t k"],
    log_transition: Float[Tensor, "k k"],
    steps: Bool[Tensor, "*s t"],
) -> Float[Tensor, "*s t k"]:
    """Smooth as :func:`smooth` does, in operations of torch: on any device, and differentiable any number of times."""
    kernels = backward_kernels(log_filtered, log_transition).exp().unbind(-3)
    marginals = [log_filtered[..., -1, :].exp()]
    for kernel in reversed(kernels):
        marginals.append((kernel @ marginals[-1][..., None])[..., 0])
    return torch.where(steps[..., None], torch.stack(marginals[::-1], -2), 0.0)


def expect(
    log_initial: Float[Tensor, " k"],
    log_transition: Float[Tensor, "k k"],
    log_emission: Float[Tensor, "s t k"],
    steps: Bool[Tensor, "s t"],
) -> Expected:
    """E step of Baum and Welch: both passes in one (Rabiner 1989, section III.C), and no gradients.

    Where every transition is at least :data:`RARE`, plain numbers lose nothing; elsewhere logarithms are kept.
    """
    log_initial, log_transition, log_emission = (v.detach() for v in (log_initial, log_transition, log_emission))
    if compiled.suits(log_emission) and float(log_transition.min()) >= math.log(RARE):
        observed = log_emission if bool(steps.all()) else torch.where(steps[..., None], log_emission, 0.0)
        log_evidence, marginals, pairs = _count(log_initial, log_transition, observed, steps)
        return Expected(log_evidence, marginals, pairs.sum(0))
    log_filtered, increments = forward_filter(log_initial, log_transition, log_emission, steps)
    if compiled.suits(log_emission):
        marginals, pairs = _smooth(log_filtered, log_transition, steps)
        return Expected(increments.sum(-1), marginals, pairs.sum(0))
    marginals = smooth_by_torch(log_filtered, log_transition, steps)
    pairs = pair_probabilities(log_filtered, log_transition, marginals)
    return Expected(increments.sum(-1), marginals, pairs.sum((0, 1)))


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
    if not compiled.suits(log_emission):
        return path_by_torch(log_initial, log_transition, log_emission, steps)
    shape = log_emission.shape
    path: Tensor = _viterbi(log_initial, log_transition, log_emission.reshape(-1, *shape[-2:]), _rows(steps, shape))
    return path.reshape(shape[:-1])


def path_by_torch(
    log_initial: Float[Tensor, " k"],
    log_transition: Float[Tensor, "k k"],
    log_emission: Float[Tensor, "*s t k"],
    steps: Bool[Tensor, "*s t"],
) -> Int[Tensor, "*s t"]:
    """Find the path as :func:`most_likely_path` does, in operations of torch: on any device."""
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


def draw_path(
    initial: Float[Tensor, " k"], transition: Float[Tensor, "k k"], uniform: Float[Tensor, "*s t"]
) -> Int[Tensor, "*s t"]:
    """Draw paths of a chain with these probabilities, by inversion of numbers from 0 to 1, one for each step."""
    if compiled.suits(uniform):
        path: Tensor = _draw(initial.detach(), transition.detach(), uniform.reshape(-1, uniform.shape[-1]))
        return path.reshape(uniform.shape)
    states: list[Tensor] = []
    for number in uniform.unbind(-1):
        states.append(_inverted(transition[states[-1]] if states else initial, number))
    return torch.stack(states, -1)


def draw_path_back(
    log_filtered: Float[Tensor, "*s t k"], log_transition: Float[Tensor, "k k"], uniform: Float[Tensor, "*r t"]
) -> Int[Tensor, "*r t"]:
    """Draw paths given the data, the last state first (Frühwirth-Schnatter 2006, algorithm 11.5).

    Parameters
    ----------
    uniform : Tensor (*R, T)
        Numbers from 0 to 1 that are inverted; the last dimensions of ``R`` are ``S``.
    """
    if compiled.suits(uniform):
        filtered, numbers = log_filtered.reshape(-1, *log_filtered.shape[-2:]), uniform.reshape(-1, uniform.shape[-1])
        path: Tensor = _draw_back(filtered.detach(), log_transition.detach(), numbers)
        return path.reshape(uniform.shape)
    into = log_transition.mT
    states: list[Tensor] = []
    for filtered, number in zip(log_filtered.unbind(-2)[::-1], uniform.unbind(-1)[::-1], strict=True):
        logits = filtered + into[states[-1]] if states else filtered
        states.append(_inverted(logits.softmax(-1), number))
    return torch.stack(states[::-1], -1)


def _inverted(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw states (...) from ``probs`` (..., K): how many of the first K - 1 cumulative sums lie below."""
    return (uniform[..., None] >= probs.cumsum(-1)[..., :-1]).sum(-1)


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


def _run_filter(log_initial: Tensor, log_transition: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    from elbozoo.models.numerics import markov_chain_loops as loops

    sequences, steps, states = observed.shape
    log_filtered, increments = np.empty((sequences, steps, states)), np.empty((sequences, steps))
    arrays = (*map(compiled.as_array, (log_initial, log_transition, observed)), log_filtered, increments)
    compiled.over_sequences(loops.forward, sequences, _work(observed), *arrays)
    return compiled.as_tensor(log_filtered, observed), compiled.as_tensor(increments, observed)


def _run_filter_slopes(
    log_transition: Tensor, log_filtered: Tensor, by_filtered: Tensor, by_increments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from elbozoo.models.numerics import markov_chain_loops as loops

    sequences, _, states = log_filtered.shape
    slopes = (np.empty((sequences, states)), np.zeros((sequences, states, states)), np.empty(log_filtered.shape))
    arrays = (*map(compiled.as_array, (log_transition, log_filtered, by_filtered, by_increments)), *slopes)
    compiled.over_sequences(loops.forward_slopes, sequences, _work(log_filtered), *arrays)
    by_initial, by_transition, by_emission = slopes
    found = (by_initial.sum(0), by_transition.sum(0), by_emission)
    first, second, third = (compiled.as_tensor(array, log_filtered) for array in found)
    return first, second, third


def _run_smooth(log_filtered: Tensor, log_transition: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    from elbozoo.models.numerics import markov_chain_loops as loops

    sequences, _, states = log_filtered.shape
    marginals, pairs = np.zeros(log_filtered.shape), np.zeros((sequences, states, states))
    arrays = (_lengths(steps), *map(compiled.as_array, (log_transition, log_filtered)), marginals, pairs)
    compiled.over_sequences(loops.smooth, sequences, _work(log_filtered), *arrays)
    return compiled.as_tensor(marginals, log_filtered), compiled.as_tensor(pairs, log_filtered)


def _run_count(
    log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from elbozoo.models.numerics import markov_chain_loops as loops

    sequences, _, states = log_emission.shape
    emission = log_emission.double()
    largest = emission.amax(-1)
    relative = (emission - finite(largest)[..., None]).exp_()
    scale, opening = compiled.blank(largest).fill_(1), compiled.blank(largest[:, 0]).zero_()
    marginals, pairs = compiled.blank(relative), emission.new_zeros(sequences, states, states)
    given = (log_initial, log_transition.double().exp(), emission[:, 0], relative)
    # Freshly made, contiguous and of float64, so that the arrays of the results are the tensors' own memory.
    arrays = [compiled.as_array(v) for v in (*given, opening, scale, marginals, pairs)]
    lengths, work = _lengths(steps), _work(log_emission)
    is_large = work >= WORK_FROM_BOTH_ENDS and log_emission.shape[-1] >= STATES_FROM_BOTH_ENDS
    if sequences == 1 and lengths[0] > 0 and is_large and compiled.threads_for(2, work) > 1:
        _count_from_both_ends(lengths, work, *arrays)
    else:
        compiled.over_sequences(loops.count, sequences, work, lengths, *arrays)
    later = torch.where(steps, scale.log_() + largest, 0.0)[:, 1:]
    log_evidence = opening + later.sum(-1)
    return log_evidence.to(log_emission), marginals.to(log_emission), pairs.to(log_emission)


def _count_from_both_ends(
    lengths: compiled.Array,
    work: int,
    log_initial: compiled.Array,
    transition: compiled.Array,
    opening: compiled.Array,
    relative: compiled.Array,
    log_opening: compiled.Array,
    scale: compiled.Array,
    marginals: compiled.Array,
    pairs: compiled.Array,
) -> None:
    """Count in one long sequence: both passes at the same time, each in a thread, and blocks of steps to join them.

    For two states it takes half as much work again as one pass after the other, for twenty no more. More threads than
    two would have to carry K x K matrices over blocks of steps, at K times the work (Hassan et al. 2021).
    """
    from elbozoo.models.numerics import markov_chain_loops as loops

    filtered = np.empty_like(marginals)
    marginals[0, lengths[0] :] = 0.0
    compiled.at_the_same_time(
        partial(loops.count_ahead, lengths, log_initial, transition, opening, relative, log_opening, scale, filtered),
        partial(loops.count_behind, lengths, transition, relative, marginals),
    )
    blocks = -(-int(lengths[0]) // loops.BLOCK)
    by_block = np.empty((blocks, *transition.shape))
    arrays = (lengths, transition, relative, scale, filtered, marginals, by_block)
    compiled.over_sequences(loops.count_joined, blocks, work, *arrays)
    pairs[0] = by_block.sum(0)


def _run_draw(initial: Tensor, transition: Tensor, uniform: Tensor) -> Tensor:
    from elbozoo.models.numerics import markov_chain_loops as loops

    path = np.empty(uniform.shape, np.int64)
    # Cumulative in their own precision, so that a draw of float32 is that of plain torch.
    arrays = (compiled.as_array(table.cumsum(-1)[..., :-1]) for table in (initial, transition))
    compiled.over_sequences(
        loops.draw, len(path), uniform.numel() * len(initial), *arrays, compiled.as_array(uniform), path
    )
    return torch.from_numpy(path)


def _run_draw_back(log_filtered: Tensor, log_transition: Tensor, uniform: Tensor) -> Tensor:
    from elbozoo.models.numerics import markov_chain_loops as loops

    path = np.empty(uniform.shape, np.int64)
    work = uniform.numel() * log_filtered.shape[-1] * 20
    arrays = (*map(compiled.as_array, (log_filtered, log_transition, uniform)), path)
    compiled.over_sequences(loops.draw_back, len(path), work, *arrays)
    return torch.from_numpy(path)


def _run_viterbi(log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, steps: Tensor) -> Tensor:
    from elbozoo.models.numerics import markov_chain_loops as loops

    path = np.zeros(log_emission.shape[:2], np.int64)
    arrays = (_lengths(steps), *map(compiled.as_array, (log_initial, log_transition, log_emission)), path)
    compiled.over_sequences(loops.viterbi, len(path), _work(log_emission), *arrays)
    return torch.from_numpy(path).to(log_emission.device)


_filter = compiled.operation(
    "markov_filter(Tensor log_initial, Tensor log_transition, Tensor observed) -> (Tensor, Tensor)",
    _run_filter,
    lambda log_initial, log_transition, observed: (compiled.blank(observed), compiled.blank(observed[..., 0])),
)
_filter_slopes = compiled.operation(
    "markov_filter_slopes(Tensor log_transition, Tensor log_filtered, Tensor by_filtered, Tensor by_increments)"
    " -> (Tensor, Tensor, Tensor)",
    _run_filter_slopes,
    lambda log_transition, log_filtered, by_filtered, by_increments: (
        compiled.blank(log_transition[0]),
        compiled.blank(log_transition),
        compiled.blank(log_filtered),
    ),
)
_smooth = compiled.operation(
    "markov_smooth(Tensor log_filtered, Tensor log_transition, Tensor steps) -> (Tensor, Tensor)",
    _run_smooth,
    lambda log_filtered, log_transition, steps: (
        compiled.blank(log_filtered),
        log_transition.new_empty(len(log_filtered), *log_transition.shape),
    ),
)
_count = compiled.operation(
    "markov_count(Tensor log_initial, Tensor log_transition, Tensor log_emission, Tensor steps)"
    " -> (Tensor, Tensor, Tensor)",
    _run_count,
    lambda log_initial, log_transition, log_emission, steps: (
        compiled.blank(log_emission[:, 0, 0]),
        compiled.blank(log_emission),
        log_transition.new_empty(len(log_emission), *log_transition.shape),
    ),
)
_draw = compiled.operation(
    "markov_draw(Tensor initial, Tensor transition, Tensor uniform) -> Tensor",
    _run_draw,
    lambda initial, transition, uniform: compiled.blank(uniform).long(),
)
_draw_back = compiled.operation(
    "markov_draw_back(Tensor log_filtered, Tensor log_transition, Tensor uniform) -> Tensor",
    _run_draw_back,
    lambda log_filtered, log_transition, uniform: compiled.blank(uniform).long(),
)
_viterbi = compiled.operation(
    "markov_viterbi(Tensor log_initial, Tensor log_transition, Tensor log_emission, Tensor steps) -> Tensor",
    _run_viterbi,
    lambda log_initial, log_transition, log_emission, steps: compiled.blank(steps).long(),
)


def _keep_filter(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _filter_backward(ctx: Any, by_filtered: Tensor, by_increments: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, log_filtered = ctx.saved_tensors
    if not torch.is_grad_enabled():
        slopes: tuple[Tensor, ...] = _filter_slopes(inputs[1], log_filtered, by_filtered, by_increments)
        return slopes
    return compiled.slopes_by_torch(filter_by_torch, inputs, (by_filtered, by_increments))


def _keep_smooth(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _smooth_backward(ctx: Any, by_marginals: Tensor, by_pairs: Tensor) -> tuple[Tensor | None, ...]:
    log_filtered, log_transition, steps = ctx.saved_tensors

    def again(filtered: Tensor, transition: Tensor) -> tuple[Tensor, Tensor]:
        marginals = smooth_by_torch(filtered, transition, steps)
        return marginals, pair_probabilities(filtered, transition, marginals).sum(1)

    slopes = compiled.slopes_by_torch(again, (log_filtered, log_transition), (by_marginals, by_pairs))
    return *slopes, None


_filter.register_autograd(_filter_backward, setup_context=_keep_filter)
_smooth.register_autograd(_smooth_backward, setup_context=_keep_smooth)


def _rows(steps: Tensor, shape: torch.Size) -> Tensor:
    """Mask of the steps of values with ``shape`` (*S, T, K) as rows: (sequences, T)."""
    return steps.expand(shape[:-1]).reshape(-1, shape[-2])


def _lengths(steps: Tensor) -> compiled.Array:
    """Position of the last real step of each sequence, counted from one; zero where there is none."""
    count = torch.arange(1, steps.shape[1] + 1, device=steps.device)
    return compiled.as_array((steps * count).amax(1))


def _work(values: Tensor) -> int:
    """About how many multiplications a recursion over ``values`` (S, T, K) takes; a logarithm counts as ten."""
    return values.numel() * (values.shape[-1] + 20)
