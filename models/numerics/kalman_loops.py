"""Recursions of linear Gaussian chains over time, compiled; what they mean stands in ``kalman.py``.

Without gaps in the data the covariances of filter and smoother settle down. In the end they repeat themselves to the
last bit: a covariance that is there for the second time has the same successors as the first time. With many states the
cycle of rounding can be long; then they have settled if over the last :data:`WINDOW` steps together none has moved by
more than :data:`ROUNDING` of its standard deviations. The whole computation would not move them either: what a step
adds is lost to rounding. From there on covariances and gains are copied, until a value is missing or the sequence ends.

Arrays are float64 with the shapes of that module: S sequences, T steps, K states, D columns, and C = 1 + r columns of
the mean. ``start`` and ``stop`` choose sequences.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from elbozoo.models.numerics.compiled import compiled

WINDOW = 32
ROUNDING = 4 * 2.0**-52


@compiled
@no_type_check
def copy_matrix(source, target):
    """Copy a matrix; assignments to slices would take numba far longer to compile, and so would sums of arrays."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]


@compiled
@no_type_check
def add_multiple(source, factor, target):
    """Add a multiple of a matrix to another."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] += factor * source[i, j]


@compiled
@no_type_check
def times(one, other, product):
    """Product = one @ other."""
    for i in range(one.shape[0]):
        for j in range(other.shape[1]):
            total = 0.0
            for k in range(one.shape[1]):
                total += one[i, k] * other[k, j]
            product[i, j] = total


@compiled
@no_type_check
def times_transposed(one, other, product):
    """Product = one @ otherᵀ."""
    for i in range(one.shape[0]):
        for j in range(other.shape[0]):
            total = 0.0
            for k in range(one.shape[1]):
                total += one[i, k] * other[j, k]
            product[i, j] = total


@compiled
@no_type_check
def transposed_times(one, other, product):
    """Product = oneᵀ @ other."""
    for i in range(one.shape[1]):
        for j in range(other.shape[1]):
            total = 0.0
            for k in range(one.shape[0]):
                total += one[k, i] * other[k, j]
            product[i, j] = total


@compiled
@no_type_check
def sandwich(outer, inner, added, work, result):
    """Result = outer @ inner @ outerᵀ + added, of symmetric matrices, symmetric to the last bit."""
    times(outer, inner, work)
    for i in range(outer.shape[0]):
        for j in range(i + 1):
            total = 0.0
            for k in range(outer.shape[1]):
                total += work[i, k] * outer[j, k]
            total += added[i, j]
            result[i, j] = total
            result[j, i] = total


@compiled
@no_type_check
def symmetrise(matrix):
    """Replace a matrix by the mean of it and its transpose."""
    for i in range(matrix.shape[0]):
        for j in range(i):
            mean = 0.5 * (matrix[i, j] + matrix[j, i])
            matrix[i, j] = mean
            matrix[j, i] = mean


@compiled
@no_type_check
def cholesky(matrix, factor):
    """Lower factor; return the sum of the logs of its diagonal, or NaN where there is no such factor."""
    total = 0.0
    for j in range(matrix.shape[0]):
        pivot = matrix[j, j]
        for k in range(j):
            pivot -= factor[j, k] * factor[j, k]
        if not 0.0 < pivot < math.inf:
            return math.nan
        root = math.sqrt(pivot)
        total += math.log(root)
        factor[j, j] = root
        for i in range(j + 1, matrix.shape[0]):
            entry = matrix[i, j]
            for k in range(j):
                entry -= factor[i, k] * factor[j, k]
            factor[i, j] = entry / root
        for i in range(j):
            factor[i, j] = 0.0
    return total


@compiled
@no_type_check
def solve_rows(factor, rows):
    """Replace rows by rows @ (factor @ factorᵀ)⁻¹."""
    size = rows.shape[1]
    for r in range(rows.shape[0]):
        for i in range(size):
            entry = rows[r, i]
            for k in range(i):
                entry -= factor[i, k] * rows[r, k]
            rows[r, i] = entry / factor[i, i]
        for i in range(size - 1, -1, -1):
            entry = rows[r, i]
            for k in range(i + 1, size):
                entry -= factor[k, i] * rows[r, k]
            rows[r, i] = entry / factor[i, i]


@compiled
@no_type_check
def repeats(matrices, s, source, t):
    """Whether the matrices of two steps of a sequence agree to the last bit."""
    for i in range(matrices.shape[2]):
        for j in range(matrices.shape[3]):
            if matrices[s, t, i, j] != matrices[s, source, i, j]:
                return False
    return True


@compiled
@no_type_check
def is_near(one, other):
    """Whether two covariances agree to rounding."""
    for i in range(one.shape[0]):
        for j in range(i + 1):
            # Written so that what is no number is not near.
            if not abs(one[i, j] - other[i, j]) <= ROUNDING * (math.sqrt(one[i, i]) * math.sqrt(one[j, j])):
                return False
    return True


@compiled
@no_type_check
def one_less(gain, loading, kept):
    """Kept = 1 - gain @ loading."""
    times(gain, loading, kept)
    for i in range(kept.shape[0]):
        for j in range(kept.shape[1]):
            kept[i, j] = (1.0 if i == j else 0.0) - kept[i, j]


@compiled
@no_type_check
def choose_observed(observed, loading, noise, seen_loading, seen_noise):
    """Take a missing value for noise of variance one that depends on nothing."""
    for d in range(len(noise)):
        seen_noise[d] = noise[d] if observed[d] else 1.0
        for k in range(loading.shape[1]):
            seen_loading[d, k] = loading[d, k] if observed[d] else 0.0


@compiled
@no_type_check
def gain_of(predicted, loading, noise, seen, factor, gain):
    """Gain P Cᵀ S⁻¹ and factor of S = C P Cᵀ + R; return the sum of the logs of the factor's diagonal."""
    times_transposed(predicted, loading, gain)
    times(loading, gain, seen)
    for d in range(len(noise)):
        seen[d, d] += noise[d]
    half_log_determinant = cholesky(seen, factor)
    solve_rows(factor, gain)
    return half_log_determinant


@compiled
@no_type_check
def update(predicted, gain, loading, noise, kept, spread, work, filtered):
    """Joseph's form: filtered = (1 - G C) P (1 - G C)ᵀ + G R Gᵀ."""
    one_less(gain, loading, kept)
    for i in range(len(spread)):
        for j in range(i + 1):
            total = 0.0
            for d in range(len(noise)):
                total += gain[i, d] * noise[d] * gain[j, d]
            spread[i, j] = total
    sandwich(kept, predicted, spread, work, filtered)


@compiled
@no_type_check
def repeat(matrices, s, source, t):
    """Copy the matrix of one step of a sequence to another: by numbers, as slices cost more than the copy."""
    for i in range(matrices.shape[2]):
        for j in range(matrices.shape[3]):
            matrices[s, t, i, j] = matrices[s, source, i, j]


@compiled
@no_type_check
def move_mean(s, t, predicted, centred, loading, factors, gains, slot, innovation, gram, means):
    """Add to a mean what the observations say; add the squares of their errors, whitened, to ``gram``."""
    (columns, states), width = loading.shape, predicted.shape[1]
    for c in range(width):
        for d in range(columns):
            error = centred[s, t, d] if c == 0 else 0.0
            for k in range(states):
                error -= loading[d, k] * predicted[k, c]
            innovation[d, c] = error
        for i in range(states):
            total = predicted[i, c]
            for d in range(columns):
                total += gains[slot, i, d] * innovation[d, c]
            means[s, t, i, c] = total
        for d in range(columns):
            error = innovation[d, c]
            for k in range(d):
                error -= factors[slot, d, k] * innovation[k, c]
            innovation[d, c] = error / factors[slot, d, d]
    for c in range(width):
        for e in range(width):
            for d in range(columns):
                gram[s, c, e] += innovation[d, c] * innovation[d, e]


@compiled
@no_type_check
def kalman(
    start,
    stop,
    centred,
    observed,
    moves,
    first_mean,
    first_covariance,
    transition,
    process,
    loading,
    noise,
    log_determinant,
    gram,
    means,
    covariances,
    failed,
):
    """Filter sequences; fills the last five arrays, of which the first two are zero at first.

    ``centred`` (S, T, D) is zero where ``observed`` is not; at padding ``moves`` (S, T) is not, and the chain stands
    still. ``failed`` (S,) counts the steps up to the one whose covariance has no factor, and is zero if all have.
    """
    steps, (columns, states), width = centred.shape[1], loading.shape, first_mean.shape[2]
    predicted, kept = np.empty((states, states)), np.empty((states, states))
    spread, work = np.empty((states, states)), np.empty((states, states))
    seen_loading, seen_noise, seen = np.empty((columns, states)), np.empty(columns), np.empty((columns, columns))
    mean, innovation = np.empty((states, width)), np.empty((columns, width))
    factors, gains = np.empty((WINDOW, columns, columns)), np.empty((WINDOW, states, columns))
    half_log_determinants = np.empty(WINDOW)
    for s in range(start, stop):
        mark, period = 0, 0
        for t in range(steps):
            renewed = t == 0 or moves[s, t] != moves[s, t - 1]
            for d in range(columns):
                renewed = renewed or observed[s, t, d] != observed[s, t - 1, d]
            if renewed:
                choose_observed(observed[s, t], loading, noise, seen_loading, seen_noise)
                mark, period = t, 0
            before = t - 1
            for i in range(states):
                for c in range(width):
                    if t > 0 and moves[s, t]:
                        mean[i, c] = 0.0
                        for k in range(states):
                            mean[i, c] += transition[i, k] * means[s, before, k, c]
                    else:
                        mean[i, c] = means[s, before, i, c] if t > 0 else first_mean[s, i, c]
            if period > 0:
                # The slots of the cycle are not written any more.
                slot = (mark + (t - mark) % period) % WINDOW
                repeat(covariances, s, t - period, t)
            else:
                slot = t % WINDOW
                if t > 0 and moves[s, t]:
                    sandwich(transition, covariances[s, before], process, work, predicted)
                elif t > 0:
                    copy_matrix(covariances[s, before], predicted)
                else:
                    copy_matrix(first_covariance[s], predicted)
                half = gain_of(predicted, seen_loading, seen_noise, seen, factors[slot], gains[slot])
                if math.isnan(half):
                    failed[s] = t + 1
                    break
                half_log_determinants[slot] = half
                update(predicted, gains[slot], seen_loading, seen_noise, kept, spread, work, covariances[s, t])
                if t > mark and repeats(covariances, s, mark, t):
                    # This step's slot and the mark's hold gains of different steps; what follows the one, follows
                    # the other: the cycle is the steps after the mark.
                    period = t - mark
                    mark += 1
                elif t - mark == WINDOW - 1:
                    period = 1 if is_near(covariances[s, t], covariances[s, mark]) else 0
                    mark = t
            log_determinant[s] -= 2 * half_log_determinants[slot]
            move_mean(s, t, mean, centred, seen_loading, factors, gains, slot, innovation, gram, means)


@compiled
@no_type_check
def kalman_slopes(
    start,
    stop,
    centred,
    observed,
    moves,
    first_mean,
    first_covariance,
    transition,
    process,
    loading,
    noise,
    means,
    covariances,
    by_log_determinant,
    by_gram,
    by_means,
    by_covariances,
    by_centred,
    by_mean,
    by_covariance,
    by_transition,
    by_process,
    by_loading,
    by_noise,
):
    """Adjoint of :func:`kalman`: from slopes by its results to those by its arguments, the last seven, zero at first.

    Each step is m = m' + G v, P = (1 - G C) P' (1 - G C)ᵀ + G R Gᵀ with v = x - C m', S = C P' Cᵀ + R, G = P' Cᵀ S⁻¹,
    and log |S| and vᵀ S⁻¹ v beside. The gain is where P is least, so that P does not depend on it to first order.
    """
    steps, (columns, states), width = centred.shape[1], loading.shape, first_mean.shape[2]
    predicted, kept, covariance = np.empty((states, states)), np.empty((states, states)), np.empty((states, states))
    work, square = np.empty((states, states)), np.empty((states, states))
    seen_loading, by_seen_loading = np.empty((columns, states)), np.empty((columns, states))
    slope, seen_noise = np.empty((columns, states)), np.empty(columns)
    factor, seen = np.empty((columns, columns)), np.empty((columns, columns))
    inverse, by_seen = np.empty((columns, columns)), np.empty((columns, columns))
    mean, carried = np.empty((states, width)), np.empty((states, width))
    innovation, by_innovation = np.empty((columns, width)), np.empty((columns, width))
    solved, weighed = np.empty((columns, width)), np.empty((columns, width))
    gain, by_gain, two_sided = np.empty((states, columns)), np.empty((states, columns)), np.empty((width, width))
    for s in range(start, stop):
        for c in range(width):
            for e in range(width):
                two_sided[c, e] = by_gram[s, c, e] + by_gram[s, e, c]
        for t in range(steps - 1, -1, -1):
            add_multiple(by_means[s, t], 1.0, by_mean[s])
            add_multiple(by_covariances[s, t], 1.0, by_covariance[s])
            symmetrise(by_covariance[s])
            choose_observed(observed[s, t], loading, noise, seen_loading, seen_noise)
            # The step once more.
            moved = t > 0 and moves[s, t]
            if moved:
                times(transition, means[s, t - 1], mean)
                sandwich(transition, covariances[s, t - 1], process, work, predicted)
            elif t > 0:
                copy_matrix(means[s, t - 1], mean)
                copy_matrix(covariances[s, t - 1], predicted)
            else:
                copy_matrix(first_mean[s], mean)
                copy_matrix(first_covariance[s], predicted)
            gain_of(predicted, seen_loading, seen_noise, seen, factor, gain)
            one_less(gain, seen_loading, kept)
            times(seen_loading, mean, innovation)
            for d in range(columns):
                for c in range(width):
                    innovation[d, c] = (centred[s, t, d] if c == 0 else 0.0) - innovation[d, c]
                for e in range(columns):
                    inverse[d, e] = 1.0 if d == e else 0.0
            solve_rows(factor, inverse)
            times(inverse, innovation, solved)
            # By S, from its log determinant and the squared errors; by v.
            times(solved, two_sided, by_innovation)
            times_transposed(by_innovation, solved, by_seen)
            for d in range(columns):
                for e in range(columns):
                    by_seen[d, e] = -0.5 * by_seen[d, e] - by_log_determinant[s] * inverse[d, e]
            transposed_times(gain, by_mean[s], weighed)
            add_multiple(weighed, 1.0, by_innovation)
            # By G = P' Cᵀ S⁻¹.
            times_transposed(by_mean[s], innovation, by_gain)
            solve_rows(factor, by_gain)
            transposed_times(gain, by_gain, seen)
            symmetrise(seen)
            add_multiple(seen, -1.0, by_seen)
            transposed_times(by_gain, predicted, by_seen_loading)
            # By P = (1 - G C) P' (1 - G C)ᵀ + G R Gᵀ at a fixed gain.
            times(by_covariance[s], kept, work)
            transposed_times(kept, work, covariance)
            times(work, predicted, square)
            transposed_times(gain, square, slope)
            for d in range(columns):
                for k in range(states):
                    by_seen_loading[d, k] -= 2 * slope[d, k]
            for d in range(columns):
                total = 0.0
                for i in range(states):
                    for j in range(states):
                        total += gain[i, d] * by_covariance[s, i, j] * gain[j, d]
                if observed[s, t, d]:
                    by_noise[s, d] += total + by_seen[d, d]
            times(by_gain, seen_loading, work)
            symmetrise(work)
            add_multiple(work, 1.0, covariance)
            # By S = C P' Cᵀ + R.
            times(by_seen, seen_loading, slope)
            transposed_times(seen_loading, slope, work)
            add_multiple(work, 1.0, covariance)
            for d in range(columns):
                for k in range(states):
                    total = 0.0
                    for j in range(states):
                        total += slope[d, j] * predicted[j, k]
                    by_seen_loading[d, k] += 2 * total
            # By v = x - C m'.
            transposed_times(seen_loading, by_innovation, carried)
            for i in range(states):
                for c in range(width):
                    carried[i, c] = by_mean[s, i, c] - carried[i, c]
            for d in range(columns):
                by_centred[s, t, d] = by_innovation[d, 0]
                if observed[s, t, d]:
                    for k in range(states):
                        total = by_seen_loading[d, k]
                        for c in range(width):
                            total -= by_innovation[d, c] * mean[k, c]
                        by_loading[s, d, k] += total
            # By m' = A m, P' = A P Aᵀ + Q.
            if moved:
                times_transposed(carried, means[s, t - 1], work)
                add_multiple(work, 1.0, by_transition[s])
                times(covariance, transition, work)
                times(work, covariances[s, t - 1], square)
                add_multiple(square, 2.0, by_transition[s])
                add_multiple(covariance, 1.0, by_process[s])
                transposed_times(transition, work, by_covariance[s])
                transposed_times(transition, carried, by_mean[s])
            else:
                copy_matrix(covariance, by_covariance[s])
                copy_matrix(carried, by_mean[s])


@compiled
@no_type_check
def kernels(
    start, stop, real, means, covariances, transition, process, start_covariance, anchored, gain, moved, tril, failed
):
    """Chains from the last step to the first: ``gain``, ``moved`` (what means become) and ``tril``, zero at first.

    With a flat start (``anchored``) z_1 itself has ``start_covariance``. ``failed`` as in :func:`kalman`.
    """
    steps, states, width = means.shape[1:]
    forward, predicted, factor = np.empty((states, states)), np.empty((states, states)), np.empty((states, states))
    kept, spread, work = np.empty((states, states)), np.empty((states, states)), np.empty((states, states))
    seen = np.empty(states)
    for s in range(start, stop):
        # After the first step, which a flat start sets apart.
        mark, period = 1, 0
        for t in range(steps):
            if not real[s, t]:
                for k in range(states):
                    tril[s, t, k, k] = 1.0
                continue
            follows = t + 1 < steps and real[s, t + 1]
            if period == 0 and t > mark and repeats(covariances, s, mark, t):
                period = t - mark
            elif t - mark == WINDOW:
                mark, period = t, 0
            if period > 0 and follows and repeats(covariances, s, t - period, t):
                mark = t
                repeat(gain, s, t - period, t)
                repeat(tril, s, t - period, t)
            else:
                period = 0
                if follows:
                    times(transition, covariances[s, t], forward)
                    sandwich(transition, covariances[s, t], process, work, predicted)
                    if math.isnan(cholesky(predicted, factor)):
                        failed[s] = t + 1
                        break
                    for i in range(states):
                        for k in range(states):
                            gain[s, t, i, k] = forward[k, i]
                    solve_rows(factor, gain[s, t])
                    one_less(gain[s, t], transition, kept)
                    times(gain[s, t], process, work)
                    times_transposed(work, gain[s, t], spread)
                    symmetrise(spread)
                    sandwich(kept, covariances[s, t], spread, work, predicted)
                elif not (anchored and t == 0):
                    copy_matrix(covariances[s, t], predicted)
                if anchored and t == 0:
                    copy_matrix(start_covariance[s], predicted)
                if math.isnan(cholesky(predicted, tril[s, t])):
                    failed[s] = t + 1
                    break
            for c in range(width):
                for i in range(states):
                    seen[i] = 0.0
                    for k in range(states):
                        seen[i] += transition[i, k] * means[s, t, k, c]
                for i in range(states):
                    total = 0.0
                    for k in range(states):
                        total += gain[s, t, i, k] * seen[k]
                    moved[s, t, i, c] = means[s, t, i, c] - total


@compiled
@no_type_check
def smooth(start, stop, gain, anchor, shift, tril, first, means, covariances, responses, lags):
    """Moments of chains that run from the last step to the first (Rauch, Tung & Striebel 1965, in Joseph's form).

    Steps before ``first`` are left alone, but for their covariance with the next; fills the last four arrays.
    """
    steps, states = shift.shape[1], shift.shape[2]
    own, work = np.empty((states, states)), np.empty((states, states))
    for s in range(start, stop):
        last = steps - 1
        mark, period = last, 0
        for t in range(last, first - 1, -1):
            same = period > 0 and repeats(gain, s, t + period, t)
            if same and repeats(tril, s, t + period, t):
                repeat(covariances, s, t + period, t)
            else:
                period = 0
                times_transposed(tril[s, t], tril[s, t], own)
                if t == last:
                    copy_matrix(own, covariances[s, t])
                else:
                    sandwich(gain[s, t], covariances[s, t + 1], own, work, covariances[s, t])
                lag = mark - t
                settled = lag == WINDOW and is_near(covariances[s, t], covariances[s, mark])
                if settled and repeats(gain, s, t + 1, t):
                    period = 1
                elif lag > 0 and (settled or repeats(covariances, s, mark, t)):
                    period = lag
                if lag == WINDOW or period > 0:
                    mark = t
            for i in range(states):
                total = shift[s, t, i]
                if t < last:
                    for k in range(states):
                        total += gain[s, t, i, k] * means[s, t + 1, k]
                means[s, t, i] = total
            if first > 0:
                copy_matrix(anchor[s, t], responses[s, t])
                if t < last:
                    times(gain[s, t], responses[s, t + 1], work)
                    add_multiple(work, 1.0, responses[s, t])
        for t in range(last):
            for i in range(states):
                for j in range(states):
                    total = 0.0
                    for k in range(states):
                        total += covariances[s, t + 1, i, k] * gain[s, t, j, k]
                    lags[s, t, i, j] = total
