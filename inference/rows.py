"""Rows of a data set, wherever they are: in memory, in files, or on the workers of a cluster.

What adds up over rows is asked for by :meth:`Rows.total`, so that the same code runs on a chunk, on a stream and on a
cluster; what needs the rows themselves, one chunk after the other, takes :meth:`Rows.parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class Part(NamedTuple):
    """Some rows that follow one another.

    Attributes
    ----------
    x : Tensor (B, D)
        The rows, float64.
    start : int
        Position of the first of them in the data set.
    """

    x: Tensor
    start: int


class Block(Protocol):
    """Rows that are stored together, such as a stretch of a file; it is pickled by what it takes to find them."""

    def __len__(self) -> int:
        """Return the number of rows, without reading them."""
        ...

    def parts(self, chunk: int) -> Iterator[Tensor]:
        """Yield the rows in order, float64, at most ``chunk`` at once (B, D); holds few more than that in memory."""
        ...


@dataclass(frozen=True)
class TensorBlock:
    """Rows in memory."""

    x: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def parts(self, chunk: int) -> Iterator[Tensor]:
        """Yield views of the rows."""
        yield from self.x.split(chunk)


class Rows:
    """The rows of a data set, block after block.

    Parameters
    ----------
    blocks : sequence of Block
        What holds the rows, in their order.
    names : sequence of str
        Names of the columns.
    """

    def __init__(self, blocks: Sequence[Block], names: Sequence[str]) -> None:
        self.blocks, self.names = list(blocks), tuple(names)
        *self.starts, self._length = accumulate(map(len, self.blocks), initial=0)

    @classmethod
    def in_memory(cls, x: Tensor) -> Rows:
        """Return the rows of a tensor (N, D), or what was arranged from one."""
        return cls([TensorBlock(x)], [])

    def __len__(self) -> int:
        return self._length

    def parts(self, chunk: int) -> Iterator[Part]:
        """Yield the rows in order, at most ``chunk`` at once."""
        for position in range(len(self.blocks)):
            yield from self.parts_of_block(position, chunk)

    def parts_of_block(self, position: int, chunk: int) -> Iterator[Part]:
        """Yield the rows of one of the blocks in order, at most ``chunk`` at once."""
        return parts_of(self.blocks[position], self.starts[position], chunk)

    def total(self, of_part: Callable[[Part], T], merge: Callable[[T, T], T], chunk: int) -> T:
        """Return ``of_part`` of each part of at most ``chunk`` rows, merged two by two.

        Both are called wherever the rows are, so they hold nothing but what pickle can carry. ``merge`` takes what came
        of neighbours, the earlier rows first, and may begin anywhere: it must be associative.
        """
        return merged(map(of_part, self.parts(chunk)), merge)


def parts_of(block: Block, start: int, chunk: int) -> Iterator[Part]:
    """Yield the rows of a block whose first one is at the position ``start``."""
    for x in block.parts(chunk):
        yield Part(x, start)
        start += len(x)


def merged(results: Iterator[T], merge: Callable[[T, T], T]) -> T:
    """Merge results from left to right, holding no more than two."""
    total = next(results)
    for result in results:
        total = merge(total, result)
    return total


def sample_rows(rows: Rows, count: int, seed: int, chunk: int) -> Tensor:
    """Draw ``count`` different rows uniformly, in their order, (count, D); all of them if there are no more."""
    # A permutation of all positions would take more memory than the sample.
    drawn = np.random.default_rng(seed).choice(len(rows), min(count, len(rows)), replace=False, shuffle=False)
    wanted = torch.from_numpy(drawn).sort().values
    return torch.cat(rows.total(partial(_wanted, wanted), _side_by_side, chunk))


def _wanted(positions: Tensor, part: Part) -> list[Tensor]:
    """Return the rows of a part at some positions in the data set, in ascending order."""
    ends = torch.tensor([part.start, part.start + len(part.x)])
    first, last = torch.searchsorted(positions, ends).tolist()
    return [part.x[positions[first:last] - part.start]]


def _side_by_side(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    return [*left, *right]
