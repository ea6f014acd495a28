"""The one argument of every model and guide."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Some rows of a data set, with their positions and the size of the whole.

    Every program opens ``pyro.plate("data", batch.total, subsample=batch.index)``, so that the ELBO of a
    minibatch is an unbiased estimate for the full data and a per-datum guide can look up its own rows.

    Attributes
    ----------
    x : Tensor (B, D)
        The rows.
    index : Tensor (B,) of int64
        Position of each row in the data set.
    total : int
        Number of rows N of the data set, B <= N.
    """

    x: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's own index() is not needed here
    total: int

    @classmethod
    def full(cls, x: Tensor) -> Batch:
        """Return a whole data set as one batch.

        Parameters
        ----------
        x : Tensor (N, D)
            All rows.

        Returns
        -------
        Batch
            With the positions 0 to N - 1.

        Examples
        --------
        >>> import torch
        >>> from elbozoo.models import Batch
        >>> batch = Batch.full(torch.zeros(5, 2)).rows(1, 3)
        >>> batch.index.tolist(), batch.total
        ([1, 2], 5)
        """
        return cls(x, torch.arange(len(x), device=x.device), len(x))

    def rows(self, start: int, stop: int) -> Batch:
        """Return some rows of this batch; ``total`` stays the size of the data set.

        Parameters
        ----------
        start, stop : int
            First of the rows, and the one after the last, counted within this batch.

        Returns
        -------
        Batch
            B = stop - start rows.
        """
        return Batch(self.x[start:stop], self.index[start:stop], self.total)
