"""Recursions of hidden Markov chains over time, compiled; what they mean stands in ``markov_chains.py``.

Probabilities of the present step are kept as logarithms, and as numbers beside them. A sum over states is taken over
the numbers, where it is a row of multiplications, and once more over the logarithms where it comes out so small that
its terms may have underflowed. So nothing is lost that the logarithms hold, and almost no step pays for it.

Arrays are float64 with the shapes S, T, K of that module; ``start`` and ``stop`` choose sequences.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from elbozoo.models.numerics.compiled import compiled

# Terms that underflowed are below 2.3e-308 each, and count for nothing beside a sum of this size.
SMALL = 1e-280
BLOCK = 4096  # steps of one sequence that are joined at once


@compiled
@no_type_check
def log_sum(one, other):
    """Log of the sum of exp(one + other)."""
    largest = -math.inf
    for i in range(len(one)):
        largest = max(largest, one[i] + other[i])
    if largest == -math.inf:
        return largest
    total = 0.0
    for i in range(len(one)):
        total += math.exp(one[i] + other[i] - largest)
    return largest + math.log(total)


@compiled
@no_type_check
def predict(probs, transition, predicted):
    """Next state's probabilities as numbers."""
    predicted[:] = 0.0
    for i in range(len(probs)):
        weight = probs[i]
        if weight != 0.0:
            for j in range(len(predicted)):
                predicted[j] += weight * transition[i, j]


@compiled
@no_type_check
def condition(log_predicted, log_emission, log_filtered, probs):
    """Weigh what was predicted by an observation: the filtered logs and numbers; return log p(x_t given the past)."""
    largest = -math.inf
    total = 0.0
    for k in range(len(probs)):
        log_filtered[k] = log_predicted[k] + log_emission[k]
        total += log_filtered[k]
        largest = max(largest, log_filtered[k])
    if largest == -math.inf:
        # Nothing is possible: minus infinity for good. What is no number stays so.
        log_filtered[:] = total
        probs[:] = math.exp(total)
        return total
    total = 0.0
    for k in range(len(probs)):
        probs[k] = math.exp(log_filtered[k] - largest)
        total += probs[k]
    increment = largest + math.log(total)
    for k in range(len(probs)):
        probs[k] /= total
        log_filtered[k] -= increment
    return increment


@compiled
@no_type_check
def forward(start, stop, log_initial, log_transition, log_emission, log_filtered, log_increments):
    """Filter sequences; fills ``log_filtered`` and ``log_increments``."""
    states = len(log_initial)
    transition = np.exp(log_transition)
    into = log_transition.T.copy()
    probs, predicted, log_predicted = np.empty(states), np.empty(states), np.empty(states)
    for s in range(start, stop):
        log_predicted[:] = log_initial
        for t in range(log_emission.shape[1]):
            if t > 0:
                predict(probs, transition, predicted)
                for j in range(states):
                    if predicted[j] >= SMALL:
                        log_predicted[j] = math.log(predicted[j])
                    else:
                        log_predicted[j] = log_sum(log_filtered[s, t - 1], into[j])
            log_increments[s, t] = condition(log_predicted, log_emission[s, t], log_filtered[s, t], probs)


@compiled
@no_type_check
def step_back(log_filtered, probs, transition, into, predicted, later, earlier, pairs):
    """Spread ``later`` (K,) over the states before, by p(z_t given z_t+1, x_1..x_t); add the pairs' weights."""
    predict(probs, transition, predicted)
    for j in range(len(later)):
        if predicted[j] >= SMALL:
            predicted[j] = later[j] / predicted[j]
        elif later[j] != 0.0:
            into_here = log_sum(log_filtered, into[j])
            predicted[j] = 0.0
            if into_here > -math.inf:
                for i in range(len(later)):
                    weight = later[j] * math.exp(log_filtered[i] + into[j, i] - into_here)
                    earlier[i] += weight
                    pairs[i, j] += weight
        else:
            predicted[j] = 0.0
    for i in range(len(later)):
        total = 0.0
        for j in range(len(later)):
            weight = probs[i] * (transition[i, j] * predicted[j])
            pairs[i, j] += weight
            total += weight
        earlier[i] += total


@compiled
@no_type_check
def smooth(start, stop, lengths, log_transition, log_filtered, marginals, pairs):
    """Marginals of all steps and, summed over them, of neighbours; both are zero at first."""
    transition = np.exp(log_transition)
    into = log_transition.T.copy()
    probs, predicted = np.empty(len(transition)), np.empty(len(transition))
    for s in range(start, stop):
        last = lengths[s] - 1
        if last >= 0:
            marginals[s, last] = np.exp(log_filtered[s, last])
        for t in range(last - 1, -1, -1):
            logs = log_filtered[s, t]
            for k in range(len(probs)):
                probs[k] = math.exp(logs[k])
            later, earlier = marginals[s, t + 1], marginals[s, t]
            step_back(logs, probs, transition, into, predicted, later, earlier, pairs[s])


@compiled
@no_type_check
def forward_slopes(
    start, stop, log_transition, log_filtered, by_filtered, by_increments, by_initial, by_transition, by_emission
):
    """Adjoint of :func:`forward`: from slopes by its results to those by its arguments, the last three arrays.

    A step is j = log predicted + log emission, increment = log Σ exp j, filtered = j - increment; and the slope of
    log predicted by the filtered log probabilities before is the kernel of :func:`step_back`. With slopes of one by the
    increments and zero by the rest this is the smoother: Fisher's identity.
    """
    transition = np.exp(log_transition)
    into = log_transition.T.copy()
    states = len(transition)
    probs, before, predicted = np.empty(states), np.empty(states), np.empty(states)
    carried = np.empty(states)
    for s in range(start, stop):
        carried[:] = 0.0
        last = log_filtered.shape[1] - 1
        before[:] = np.exp(log_filtered[s, last])
        for t in range(last, -1, -1):
            probs[:] = before
            carried += by_filtered[s, t]
            excess = by_increments[s, t] - carried.sum()
            for k in range(states):
                by_emission[s, t, k] = carried[k] + probs[k] * excess
            carried[:] = 0.0
            if t > 0:
                logs = log_filtered[s, t - 1]
                for k in range(states):
                    before[k] = math.exp(logs[k])
                later = by_emission[s, t]
                step_back(logs, before, transition, into, predicted, later, carried, by_transition[s])
        by_initial[s] = by_emission[s, 0]


@compiled
@no_type_check
def viterbi(start, stop, lengths, log_initial, log_transition, log_emission, path):
    """Likeliest paths into ``path``, which is zero at first; of equals the state with the lower number."""
    states, steps = len(log_initial), log_emission.shape[1]
    into = log_transition.T.copy()
    origin = np.empty((steps, states), np.int64)
    score, moved = np.empty(states), np.empty(states)
    for s in range(start, stop):
        if lengths[s] == 0:
            continue
        score[:] = log_initial + log_emission[s, 0]
        for t in range(1, lengths[s]):
            highest = -math.inf
            for j in range(states):
                best, best_from = score[0] + into[j, 0], 0
                for i in range(1, states):
                    if score[i] + into[j, i] > best:
                        best, best_from = score[i] + into[j, i], i
                origin[t, j] = best_from
                moved[j] = best + log_emission[s, t, j]
                highest = max(highest, moved[j])
            # Shifted, so that scores stay small.
            score[:] = moved if highest == -math.inf else moved - highest
        state = np.argmax(score)
        for t in range(lengths[s] - 1, -1, -1):
            path[s, t] = state
            state = origin[t, state]


@compiled
@no_type_check
def count(start, stop, lengths, log_initial, transition, opening, relative, log_opening, scale, marginals, pairs):
    """Both passes of Baum and Welch over plain numbers (Rabiner 1989, section V.A); right where no transition is rare.

    Then every state is reached at every step, by at least the least transition; so what underflows among filtered
    probabilities is nothing beside it. The first step alone is taken in logarithms, as a state may be barred there.

    Parameters
    ----------
    opening : array (S, K)
        Log emission of the first step.
    relative : array (S, T, K)
        Emission of each step, over the largest of its step.
    log_opening : array (S,)
        Becomes log p(x_1).
    scale : array (S, T)
        Becomes p(x_t given the past) over the largest emission of the step, from the second step on; left at padding.
    marginals, pairs : array (S, T, K), (S, K, K)
        Become the marginals, and the sums over steps of pairs, which are zero at first.
    """
    states = len(transition)
    into = transition.T.copy()
    logs, weight, ahead, behind = np.empty(states), np.empty(states), np.empty(states), np.empty(states)
    for s in range(start, stop):
        marginals[s, lengths[s] :] = 0.0
        if lengths[s] == 0:
            continue
        log_opening[s] = condition(log_initial, opening[s], logs, weight)
        marginals[s, 0] = weight
        for t in range(1, lengths[s]):
            total = 0.0
            for k in range(states):
                ahead[k] = 0.0
                for i in range(states):
                    ahead[k] += weight[i] * into[k, i]
                ahead[k] *= relative[s, t, k]
                total += ahead[k]
            scale[s, t] = total
            inverse = 1 / total if total != 0.0 else 0.0
            for k in range(states):
                weight[k] = ahead[k] * inverse
                marginals[s, t, k] = weight[k]
        behind[:] = 1.0
        for t in range(lengths[s] - 1, 0, -1):
            inverse = 1 / scale[s, t] if scale[s, t] != 0.0 else 0.0
            for k in range(states):
                weight[k] = relative[s, t, k] * behind[k] * inverse
            for i in range(states):
                filtered, total = marginals[s, t - 1, i], 0.0
                for j in range(states):
                    total += transition[i, j] * weight[j]
                    pairs[s, i, j] += filtered * weight[j]
                behind[i] = total
                marginals[s, t - 1, i] = filtered * total
        pairs[s] *= transition


@compiled
@no_type_check
def count_ahead(lengths, log_initial, transition, opening, relative, log_opening, scale, filtered):
    """Take the forward pass of :func:`count` alone, for one sequence: fills ``filtered`` (1, T, K) and ``scale``."""
    states = len(transition)
    into = transition.T.copy()
    logs, weight, ahead = np.empty(states), np.empty(states), np.empty(states)
    log_opening[0] = condition(log_initial, opening[0], logs, weight)
    filtered[0, 0] = weight
    for t in range(1, lengths[0]):
        total = 0.0
        for k in range(states):
            mass = 0.0
            for i in range(states):
                mass += weight[i] * into[k, i]
            ahead[k] = mass * relative[0, t, k]
            total += ahead[k]
        scale[0, t] = total
        inverse = 1 / total if total != 0.0 else 0.0
        for k in range(states):
            weight[k] = ahead[k] * inverse
            filtered[0, t, k] = weight[k]


@compiled
@no_type_check
def count_behind(lengths, transition, relative, behind):
    """Fill ``behind`` (1, T, K) with p(x_t+1..x_T given z_t), which sums to one at each step but the last."""
    states = len(transition)
    weight, mass = np.empty(states), np.empty(states)
    last = lengths[0] - 1
    behind[0, last] = 1.0
    weight[:] = relative[0, last]
    for t in range(last, 0, -1):
        total = 0.0
        for i in range(states):
            mass[i] = 0.0
            for j in range(states):
                mass[i] += transition[i, j] * weight[j]
            total += mass[i]
        inverse = 1 / total if total != 0.0 else 0.0
        for i in range(states):
            here = mass[i] * inverse
            behind[0, t - 1, i] = here
            weight[i] = here * relative[0, t - 1, i]


@compiled
@no_type_check
def count_joined(start, stop, lengths, transition, relative, scale, filtered, behind, pairs):
    """Join both passes over one sequence, in blocks of steps that ``start`` and ``stop`` count.

    The two times what was seen at t and after is p(z_t = k given x) but for its sum; and as ``scale`` says how likely
    x_t was given the past, the same sum is that of the pairs at t - 1 and t.

    Parameters
    ----------
    behind : array (1, T, K)
        Becomes the marginals.
    pairs : array (blocks, K, K)
        Become the sums of the pairs over the steps of each block.
    """
    states = len(transition)
    rate = np.empty(states)
    for block in range(start, stop):
        pairs[block] = 0.0
        for t in range(block * BLOCK, min((block + 1) * BLOCK, lengths[0])):
            total = 0.0
            for k in range(states):
                total += filtered[0, t, k] * behind[0, t, k]
            inverse = 1 / total if total != 0.0 else 0.0
            if t > 0:
                by_scale = inverse / scale[0, t] if scale[0, t] != 0.0 else 0.0
                for k in range(states):
                    rate[k] = relative[0, t, k] * behind[0, t, k] * by_scale
                for i in range(states):
                    before = filtered[0, t - 1, i]
                    for j in range(states):
                        pairs[block, i, j] += before * rate[j]
            for k in range(states):
                behind[0, t, k] *= filtered[0, t, k] * inverse
        pairs[block] *= transition


@compiled
@no_type_check
def draw(start, stop, first, moves, uniform, path):
    """Draw paths of a chain by inversion of ``uniform`` (S, T).

    Parameters
    ----------
    first, moves : array (K - 1,), (K, K - 1)
        Cumulative probabilities of the first state, and of the next one given each.
    path : array (S, T)
        Becomes the paths.
    """
    for s in range(start, stop):
        state = 0
        for t in range(uniform.shape[1]):
            drawn = 0
            for k in range(len(first)):
                if uniform[s, t] >= (first[k] if t == 0 else moves[state, k]):
                    drawn += 1
            state = drawn
            path[s, t] = state


@compiled
@no_type_check
def draw_back(start, stop, log_filtered, log_transition, uniform, path):
    """Draw paths of a chain given its data, the last state first, by inversion of ``uniform`` (R, T).

    Row r is a draw for the sequence r modulo S of ``log_filtered`` (S, T, K).
    """
    sequences, steps, states = log_filtered.shape
    into = log_transition.T.copy()
    weight = np.empty(states)
    for r in range(start, stop):
        s, state = r % sequences, 0
        for t in range(steps - 1, -1, -1):
            largest, total = -math.inf, 0.0
            for i in range(states):
                weight[i] = log_filtered[s, t, i] + (into[state, i] if t < steps - 1 else 0.0)
                largest = max(largest, weight[i])
            for i in range(states):
                weight[i] = math.exp(weight[i] - largest)
                total += weight[i]
            drawn, below = 0, 0.0
            for i in range(states - 1):
                below += weight[i] / total
                if uniform[r, t] >= below:
                    drawn += 1
            state = drawn
            path[r, t] = state
