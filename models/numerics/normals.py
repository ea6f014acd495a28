"""Log densities and weighted moments of rows under a few normals in few columns, in one compiled pass each.

The same figures as the kinds of ``covariances.py`` give in operations of torch, for sequences, whose every step is
weighed by every state in every iteration of EM. No gradient passes through them: see :func:`suits`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from elbozoo.models.numerics import compiled

# Beyond, products of whole matrices take over from loops.
MOST_COLUMNS = 16


def suits(rows: Tensor, *parameters: Tensor) -> bool:
    """Whether the loops serve these rows (N, D): few columns, on the CPU, and nobody asks for a gradient."""
    return rows.shape[1] <= MOST_COLUMNS and compiled.suits_without_gradient(rows, *parameters)


def log_density(
    rows: Float[Tensor, "n d"], means: Float[Tensor, "k d"], scale: Float[Tensor, "k d"] | Float[Tensor, "k d d"]
) -> Float[Tensor, "n k"]:
    """Log density of every row under every normal, nats.

    Parameters
    ----------
    scale : Tensor (K, D) or (K, D, D)
        Standard deviations, or Cholesky factors of the covariances.
    """
    found: Tensor = _log_density(rows, means, scale)
    return found


def moments(
    rows: Float[Tensor, "n d"], means: Float[Tensor, "k d"], weights: Float[Tensor, "n k"], full: bool
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k d"] | Float[Tensor, "k d d"]]:
    """Sums over rows of w (x - μ), and of w (x - μ)² or, if ``full``, of w (x - μ)(x - μ)ᵀ."""
    sums, squares = _moments(rows, means, weights, full)
    return sums, squares


def _run_log_density(rows: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    from elbozoo.models.numerics import normal_loops as loops

    loop = loops.full_log_density if scale.ndim == 3 else loops.diagonal_log_density
    found = np.empty((len(rows), len(means)))
    arrays = (*map(compiled.as_array, (rows, means, scale)), found)
    compiled.over_sequences(loop, -(-len(rows) // loops.BLOCK), rows.shape[0] * scale.numel(), *arrays)
    return compiled.as_tensor(found, rows)


def _run_moments(rows: Tensor, means: Tensor, weights: Tensor, full: bool) -> tuple[Tensor, Tensor]:
    from elbozoo.models.numerics import normal_loops as loops

    states, columns = means.shape
    blocks = -(-len(rows) // loops.BLOCK)
    sums = np.zeros((blocks, states, columns))
    squares = np.zeros((blocks, states, columns, columns) if full else sums.shape)
    arrays = (*map(compiled.as_array, (rows, means, weights)), sums, squares)
    loop = loops.full_moments if full else loops.diagonal_moments
    compiled.over_sequences(loop, blocks, len(rows) * squares[:1].size, *arrays)
    return compiled.as_tensor(sums.sum(0), rows), compiled.as_tensor(squares.sum(0), rows)


_log_density = compiled.operation(
    "normal_log_density(Tensor rows, Tensor means, Tensor scale) -> Tensor",
    _run_log_density,
    lambda rows, means, scale: rows.new_empty(len(rows), len(means)),
)
_moments = compiled.operation(
    "normal_moments(Tensor rows, Tensor means, Tensor weights, bool full) -> (Tensor, Tensor)",
    _run_moments,
    lambda rows, means, weights, full: (
        compiled.blank(means),
        means.new_empty(*means.shape, means.shape[1]) if full else compiled.blank(means),
    ),
)
