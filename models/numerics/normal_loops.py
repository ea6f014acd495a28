"""Log densities and weighted moments of rows under a few normals in few columns, compiled.

Written directly, as sums over the columns of each row's residual: nothing is expanded, so nothing cancels however far
the data are from zero, and no array of N x K x D numbers is made. Rows are taken in blocks, turned on their side, so
that the innermost loops run over rows.

Arrays are float64: ``rows`` (N, D), ``means`` (K, D), ``scale`` (K, D, D) Cholesky factors or (K, D) standard
deviations, ``weights`` (N, K). ``start`` and ``stop`` count blocks.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from elbozoo.models.numerics.compiled import compiled, summing

BLOCK = 256
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@compiled
@no_type_check
def diagonal_log_density(start, stop, rows, means, scale, log_density):
    """Fill ``log_density`` (N, K), nats."""
    (states, columns), count = means.shape, len(rows)
    square = np.empty(BLOCK)
    for block in range(start, stop):
        first, size = block * BLOCK, min(BLOCK, count - block * BLOCK)
        for k in range(states):
            square[:] = 0.0
            constant = -columns * HALF_LOG_2PI
            for d in range(columns):
                mean, precision = means[k, d], 1 / scale[k, d]
                constant -= math.log(scale[k, d])
                for r in range(size):
                    whitened = (rows[first + r, d] - mean) * precision
                    square[r] += whitened * whitened
            for r in range(size):
                log_density[first + r, k] = constant - 0.5 * square[r]


@compiled
@no_type_check
def full_log_density(start, stop, rows, means, scale, log_density):
    """Fill ``log_density`` (N, K), nats, by forward substitution."""
    (states, columns), count = means.shape, len(rows)
    square, whitened = np.empty(BLOCK), np.empty((columns, BLOCK))
    for block in range(start, stop):
        first, size = block * BLOCK, min(BLOCK, count - block * BLOCK)
        for k in range(states):
            square[:] = 0.0
            constant = -columns * HALF_LOG_2PI
            for i in range(columns):
                mean, precision = means[k, i], 1 / scale[k, i, i]
                constant -= math.log(scale[k, i, i])
                for r in range(size):
                    whitened[i, r] = rows[first + r, i] - mean
                for j in range(i):
                    factor = scale[k, i, j]
                    for r in range(size):
                        whitened[i, r] -= factor * whitened[j, r]
                for r in range(size):
                    whitened[i, r] *= precision
                    square[r] += whitened[i, r] * whitened[i, r]
            for r in range(size):
                log_density[first + r, k] = constant - 0.5 * square[r]


@compiled
@no_type_check
def diagonal_moments(start, stop, rows, means, weights, sums, squares):
    """Sums over a block's rows of w (x - μ) and of w (x - μ)², each (blocks, K, D), zero at first."""
    (states, columns), count = means.shape, len(rows)
    for block in range(start, stop):
        first, size = block * BLOCK, min(BLOCK, count - block * BLOCK)
        for r in range(first, first + size):
            for k in range(states):
                weight = weights[r, k]
                for d in range(columns):
                    residual = rows[r, d] - means[k, d]
                    sums[block, k, d] += weight * residual
                    squares[block, k, d] += weight * residual * residual


@summing
@no_type_check
def full_moments(start, stop, rows, means, weights, sums, squares):
    """Sums over a block's rows of w (x - μ), (blocks, K, D), and w (x - μ)(x - μ)ᵀ, (blocks, K, D, D): zero first."""
    (states, columns), count = means.shape, len(rows)
    residual, weighed = np.empty((columns, BLOCK)), np.empty(BLOCK)
    for block in range(start, stop):
        first, size = block * BLOCK, min(BLOCK, count - block * BLOCK)
        for k in range(states):
            for i in range(columns):
                here, total = residual[i], 0.0
                for r in range(size):
                    here[r] = rows[first + r, i] - means[k, i]
                    weighed[r] = weights[first + r, k] * here[r]
                    total += weighed[r]
                sums[block, k, i] = total
                for j in range(i + 1):
                    there, total = residual[j], 0.0
                    for r in range(size):
                        total += weighed[r] * there[r]
                    squares[block, k, i, j] = total
                    squares[block, k, j, i] = total
