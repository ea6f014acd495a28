"""N rows as the few that have the same second moments: all that a normal likelihood needs of them.

With X̃ the rows (1, x - origin), every sum over rows of products of two columns is an entry of X̃ᵀX̃ = FᵀF for any
factor F of as many rows as X̃ has columns. F stands in for the data: an algorithm that is written for rows, with the
column of ones as one column of F, gives the same sums from it, and never sees the squares of what was small. F comes
from the Cholesky factor of X̃ᵀX̃ where that has lost nothing, and from a QR decomposition otherwise: both go over chunks
of rows, and factors merge in any order (Demmel et al. 2012, section 2).

References
----------
Demmel, J., Grigori, L., Hoemmen, M. and Langou, J. (2012). Communication-optimal Parallel and Sequential QR and LU
Factorizations. SIAM Journal on Scientific Computing 34(1), A206-A239.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Of a column's variance given the others, the part that squaring may lose is this many times the rounding of doubles.
MOST_INFLATION = 1e5
CHUNK_ELEMENTS = 2**18  # numbers in a chunk of rows: 2 MiB, which stay in the cache


class SecondMoments(NamedTuple):
    """Sums of products of the columns (1, x - origin) over rows.

    Attributes
    ----------
    rows : Tensor ()
        Number of rows.
    origin : Tensor (D,)
        What was taken from the rows.
    factor : Tensor (M, D + 1)
        F, with FᵀF the sums of products; M <= D + 1 rows that stand for all.
    """

    rows: Tensor
    origin: Tensor
    factor: Tensor

    def merge(self, other: SecondMoments) -> SecondMoments:
        """Return the moments of the rows of both, about the origin of this one."""
        ones, residual = other.about(self.origin)
        factor = _shortened(torch.cat([self.factor, torch.cat([ones[:, None], residual], -1)]))
        return SecondMoments(self.rows + other.rows, self.origin, factor)

    def about(self, loc: Float[Tensor, " d"]) -> tuple[Float[Tensor, " m"], Float[Tensor, "m d"]]:
        """Return what stands for the column of ones, and for the rows x - loc."""
        ones = self.factor[:, 0]
        return ones, self.factor[:, 1:] + ones[:, None] * (self.origin - loc)

    def mean(self) -> Float[Tensor, " d"]:
        """Return the mean of the rows."""
        ones, residual = self.about(self.origin)
        return self.origin + ones @ residual / self.rows

    def centred(self) -> Float[Tensor, "m d"]:
        """Return rows that stand for x - mean: their sums of products are those."""
        is_triangular = not self.factor.tril(-1).any()
        return (self.factor if is_triangular else torch.linalg.qr(self.factor, mode="r").R)[1:, 1:]

    def rank(self, of_correlations: bool = False) -> int:
        """Return the rank of the centred rows, or of the rows in units of each column's standard deviation."""
        centred = self.centred()
        if of_correlations:
            centred = centred / centred.norm(dim=0).clamp(min=torch.finfo(centred.dtype).tiny)
        singular = torch.linalg.svdvals(centred)
        # As NumPy's matrix_rank of all rows, whose rounding is theirs.
        relative = max(float(self.rows), centred.shape[1]) * torch.finfo(centred.dtype).eps
        return int((singular > relative * singular.max()).sum()) if len(singular) else 0


def second_moments(x: Float[Tensor, "n d"]) -> SecondMoments:
    """Return the second moments of the rows ``x``, in one pass and in memory that does not grow with N.

    The origin is the mean of the first chunk of rows, so that an offset of the data does not cancel.
    """
    columns = x.shape[1] + 1
    size = max(4 * columns, CHUNK_ELEMENTS // columns)
    origin = x[:size].mean(0)
    rows = torch.tensor(len(x), dtype=x.dtype, device=x.device)
    if len(x) <= columns:
        return SecondMoments(rows, origin, _with_ones(x - origin))
    factor = _by_cholesky(x, origin, size)
    return SecondMoments(rows, origin, _by_qr(x, origin, size) if factor is None else factor)


def means_and_deviations(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Return the mean and the standard deviation over N of each column.

    In two passes, the second one chunk by chunk: as accurate as torch's ``std``, and several times as fast.
    """
    mean, squares = x.mean(0), torch.zeros_like(x[0])
    for rows in _shifted(x, mean, max(1, CHUNK_ELEMENTS // x.shape[1])):
        squares += rows.square_().sum(0)
    return mean, (squares / len(x)).sqrt()


def _shifted(x: Tensor, origin: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the rows x - origin chunk by chunk, all in one place."""
    held = torch.empty_like(x[:size], memory_format=torch.contiguous_format)
    for part in x.split(size):
        yield torch.sub(part, origin, out=held[: len(part)])


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(rows[:, :1]), rows], -1)


def _by_cholesky(x: Tensor, origin: Tensor, size: int) -> Tensor | None:
    """Factor by the sums of products, or None where some column is all but determined by the others."""
    gram = _sums_of_products(x, origin, size)
    lengths = gram.diagonal().sqrt()
    correlations = gram / (lengths[:, None] * lengths)
    factor, info = torch.linalg.cholesky_ex(correlations)
    most = MOST_INFLATION * torch.finfo(torch.float64).eps / torch.finfo(x.dtype).eps
    if int(info) or not bool(torch.cholesky_inverse(factor).diagonal().max() <= most):
        return None
    return factor.mT * lengths


def _sums_of_products(x: Tensor, origin: Tensor, size: int) -> Tensor:
    """Return X̃ᵀX̃; the column of ones is summed by itself, which costs less than a column more in the products."""
    sums, products = (_of_arrays if x.device.type == "cpu" else _of_tensors)(x, origin, size)
    above = torch.cat([sums.new_full((1,), len(x)), sums])
    return torch.cat([above[None], torch.cat([sums[:, None], products], -1)])


def _of_tensors(x: Tensor, origin: Tensor, size: int) -> tuple[Tensor, Tensor]:
    sums, products = torch.zeros_like(origin), x.new_zeros(x.shape[1], x.shape[1])
    for rows in _shifted(x, origin, size):
        sums += rows.sum(0)
        products += rows.mT @ rows
    return sums, products


def _of_arrays(x: Tensor, origin: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the sums of the rows x - origin, and of their products; NumPy has AᵀA done by BLAS at half the work.

    All of the loop is NumPy's: its threads and torch's wait busily for one another where both have work in turn.
    """
    values, shift = x.numpy(), origin.numpy()
    held = np.empty((min(size, len(values)), values.shape[1]), dtype=values.dtype)
    sums, products = np.zeros_like(shift), np.zeros((values.shape[1], values.shape[1]), dtype=values.dtype)
    for first in range(0, len(values), size):
        part = values[first : first + size]
        rows = np.subtract(part, shift, out=held[: len(part)])
        sums += rows.sum(0)
        products += rows.T @ rows
    return torch.from_numpy(sums), torch.from_numpy(products)


def _by_qr(x: Tensor, origin: Tensor, size: int) -> Tensor:
    factor = x.new_zeros(0, x.shape[1] + 1)
    for rows in _shifted(x, origin, size):
        factor = torch.linalg.qr(torch.cat([factor, _with_ones(rows)]), mode="r").R
    return factor


def _shortened(factor: Tensor) -> Tensor:
    return factor if len(factor) <= factor.shape[1] else torch.linalg.qr(factor, mode="r").R
