"""Noise on what an encoder sees: the corruptions of denoising autoencoders."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field, Options

SIDES = 0.5  # probability of the largest value, rather than the least, of a cell that salt and pepper hits


class CorruptionOptions(Options):
    """Options of entries whose encoder is trained on corrupted rows."""

    corruption: Literal["gaussian", "masking", "salt-and-pepper"] = Field(
        "masking",
        description="what is done to each cell that the encoder sees: noise is added, it is blanked, or it is set to "
        "the least or the largest value of its column",
    )
    corruption_level: float = Field(
        0.25,
        ge=0,
        description="standard deviation of gaussian noise, in those of the columns; else the probability that a cell "
        "is hit",
    )


class Corruption(nn.Module):
    """A random map x to x̃ of rows, independent between cells; draws come from the global random state.

    With the level ν, and of column d the standard deviation s, the mean m, the least value a and the largest b:

    - ``gaussian``: x̃ ~ N(x, (ν s)²);
    - ``masking``: x̃ is blank with probability ν, else x. Blank is 0 where cells are zeros and ones, which have the 0
      for "not there", and m where they are numbers, for which 0 may lie far from all data;
    - ``salt-and-pepper``: x̃ is a or b with probability ν / 2 each, else x.

    Parameters
    ----------
    columns : int
        Number D of columns.
    options : CorruptionOptions
        Which corruption, and its level.
    is_binary : bool
        Whether the cells are zeros and ones.

    Attributes
    ----------
    spread : buffer (D,)
        s, standard deviation of each column of the rows that the entry was started on; 0 where it is constant.
    blank : buffer (D,)
        m, what a blank cell holds: the mean of its column, or 0 where the cells are zeros and ones.
    least : buffer (D,)
        a, least value of each column.
    largest : buffer (D,)
        b, largest value of each column.
    """

    spread: Tensor
    blank: Tensor
    least: Tensor
    largest: Tensor

    def __init__(self, columns: int, options: CorruptionOptions, *, is_binary: bool) -> None:
        super().__init__()
        self.kind, self.level, self.is_binary = options.corruption, options.corruption_level, is_binary
        self.register_buffer("spread", torch.ones(columns))
        self.register_buffer("blank", torch.zeros(columns))
        self.register_buffer("least", torch.zeros(columns) if is_binary else -torch.ones(columns))
        self.register_buffer("largest", torch.ones(columns))

    @staticmethod
    def check(options: CorruptionOptions) -> None:
        """Refuse a probability above 1.

        Raises
        ------
        InvalidInput
            With what was found, and what to do.
        """
        if options.corruption != "gaussian" and options.corruption_level > 1:
            raise InvalidInput(
                f"option corruption_level: found {options.corruption_level:g} with corruption={options.corruption}, "
                "expected the probability that a cell is hit, at most 1; only gaussian noise has a scale without a "
                "limit"
            )

    def initialize(self, x: Tensor) -> None:
        """Take the columns' statistics from the rows ``x`` (N, D)."""
        with torch.no_grad():
            self.spread.copy_(x.std(0, correction=0))
            self.blank.copy_(torch.zeros_like(self.blank) if self.is_binary else x.mean(0))
            self.least.copy_(torch.zeros_like(self.least) if self.is_binary else x.amin(0))
            self.largest.copy_(torch.ones_like(self.largest) if self.is_binary else x.amax(0))

    def forward(self, x: Tensor) -> Tensor:
        """Return x̃ of rows ``x`` (..., D), drawn anew."""
        if self.kind == "gaussian":
            return x + self.level * self.spread * torch.randn_like(x)
        is_hit = torch.rand_like(x) < self.level
        if self.kind == "masking":
            return torch.where(is_hit, self.blank, x)
        extreme = torch.where(torch.rand_like(x) < SIDES, self.largest, self.least)
        return torch.where(is_hit, extreme, x)
