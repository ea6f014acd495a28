"""The order in which the rows of a data set come to a fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Protocol, Self

import torch
from torch import Tensor

from elbozoo.inference.memory import Memory, Remembers
from elbozoo.inference.rows import Part, Rows
from elbozoo.models.contract.batch import Batch

OPEN_BLOCKS = 4  # that are read side by side, so that neighbours in a file are rarely neighbours in a minibatch
WINDOW = 2**22  # numbers that are shuffled together
EPOCH_SEEDS = 2**62


class Order(Remembers, Protocol):
    """Minibatches of so many rows without end, which remember where in an epoch they stand."""

    size: int

    def __next__(self) -> Batch:
        """Return the next minibatch."""
        ...


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


class StreamedMinibatches:
    """Whole minibatches without end from rows that are read when they are needed, in another order each epoch.

    Blocks come in random order, some of them side by side, and fill a window whose rows are shuffled. Each row comes
    once in an epoch, but for those left over at its end. Rows of one block meet more often than others, which leaves
    the expectation of a gradient over an epoch as it is.

    Parameters
    ----------
    rows : Rows
        The whole data set.
    like : Tensor
        Minibatches are of its type and on its device.
    size : int
        Rows in a minibatch, at most all.
    generator : torch.Generator, optional
        Source of the order; torch's global random state by default.

    Attributes
    ----------
    seed : int
        That of the order of the present epoch.
    taken : int
        Number of the present epoch's minibatches that have been taken.
    """

    def __init__(self, rows: Rows, like: Tensor, size: int, generator: torch.Generator | None = None) -> None:
        self.rows, self.like, self.size, self.generator = rows, like, size, generator
        self.window = max(WINDOW // max(1, like[0].numel()), size)
        self.seed, self.taken = 0, 0
        self._epoch: Iterator[Batch] = iter(())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = next(self._epoch, None)
        if batch is None:
            self.seed, self.taken = int(torch.randint(EPOCH_SEEDS, (), generator=self.generator)), 0
            self._epoch = self._minibatches()
            batch = next(self._epoch)
        self.taken += 1
        return batch

    def memory(self) -> Memory:
        """Return where the present epoch stands."""
        return Memory({}, {"seed": self.seed, "taken": self.taken})

    def recall(self, memory: Memory) -> None:
        """Go on in the middle of an epoch, whose rows so far are read once more."""
        self.seed, self.taken = memory.values["seed"], memory.values["taken"]
        self._epoch = islice(self._minibatches(), self.taken, None) if self.taken else iter(())

    def _minibatches(self) -> Iterator[Batch]:
        """Yield the minibatches of the present epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        left, left_index = self.like.new_empty(0, *self.like.shape[1:]), torch.empty(0, dtype=torch.int64)
        for parts in self._windows(generator):
            x = torch.cat([left, *(part.x.to(self.like) for part in parts)])
            index = torch.cat([left_index, *(torch.arange(part.start, part.start + len(part.x)) for part in parts)])
            order = torch.randperm(len(x), generator=generator)
            whole = len(x) // self.size * self.size
            for some in order[:whole].reshape(-1, self.size):
                yield Batch(x[some], index[some].to(x.device), len(self.rows))
            left, left_index = x[order[whole:]], index[order[whole:]]

    def _windows(self, generator: torch.Generator) -> Iterator[list[Part]]:
        """Yield parts of blocks in random order, as many at once as fill the window."""
        held: list[Part] = []
        for part in self._side_by_side(generator):
            held.append(part)
            if sum(len(each.x) for each in held) >= self.window:
                yield held
                held = []
        if held:
            yield held

    def _side_by_side(self, generator: torch.Generator) -> Iterator[Part]:
        """Yield parts of some blocks in turn, until all blocks have been read."""
        chunk = max(1, self.window // OPEN_BLOCKS)
        order = iter(torch.randperm(len(self.rows.blocks), generator=generator).tolist())
        blocks = (self.rows.parts_of_block(i, chunk) for i in order)
        being_read = list(islice(blocks, OPEN_BLOCKS))
        while being_read:
            for block in list(being_read):
                part = next(block, None)
                if part is not None:
                    yield part
                    continue
                being_read.remove(block)
                being_read.extend(islice(blocks, 1))
