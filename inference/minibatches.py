"""The order in which the rows of a data set come to a fit."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from elbozoo.inference.memory import Memory
from elbozoo.models.contract.batch import Batch


class Minibatches:
    """Whole minibatches without end, in another order each epoch; the data set itself where it is one minibatch.

    The order is drawn on the CPU wherever the rows are.

    Parameters
    ----------
    batch : Batch
        The whole data set.
    size : int
        Rows in a minibatch, at most all.
    generator : torch.Generator, optional
        Source of the order; torch's global random state by default.

    Attributes
    ----------
    order : Tensor of int64
        Rows of the present epoch; the rows left over come up in another order next time.
    taken : int
        Number of the present epoch's minibatches that have been taken.
    """

    def __init__(self, batch: Batch, size: int, generator: torch.Generator | None = None) -> None:
        self.batch, self.size, self.generator = batch, size, generator
        self.order: Tensor = torch.empty(0, dtype=torch.int64)
        self.taken = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        x, _, total = self.batch
        if self.size == total:
            return self.batch
        if self.taken * self.size == len(self.order):
            order = torch.randperm(total, generator=self.generator)
            self.order, self.taken = order[: total // self.size * self.size], 0
        index = self.order[self.taken * self.size : (self.taken + 1) * self.size].to(x.device)
        self.taken += 1
        return Batch(x[index], index, total)

    def memory(self) -> Memory:
        """Return where the present epoch stands."""
        return Memory({"order": self.order}, {"taken": self.taken})

    def recall(self, memory: Memory) -> None:
        """Go on in the middle of an epoch."""
        self.order, self.taken = memory.tensors["order"], memory.values["taken"]
