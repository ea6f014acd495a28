"""Entries whose datum is several rows of the table: a sequence, whose rows are its steps, or any other stack of them.

What is said of steps here holds for the rows of any stack; that their order means something is for sequences to say.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.options import Field, KeyColumn, Options


class StackedEntry(Entry):
    """Base of entries whose datum is several rows of the table, which a column of labels tells apart.

    Arranged data are (S, T, 1 + D): S stacks, padded to T steps at their ends. Channel 0 holds the row number
    of each step in the table, counted from 1, and 0 at padding; the other channels hold the D observed columns,
    0 at padding.

    Attributes
    ----------
    key : str
        Option that names the column of labels.
    stack_dims : tuple of str
        Names of the dimensions of a stack and of its steps.
    example_steps : int
        Largest number of steps of a simulated stack.
    """

    key: ClassVar[str]
    stack_dims: ClassVar[tuple[str, str]]
    example_steps: ClassVar[int] = 12

    @classmethod
    def arrange(cls, x: Tensor, options: Any) -> Tensor:
        """Return the rows of a table (N, D or D + 1) as stacks (S, T, 1 + D), in order of first appearance."""
        if x.ndim == 3:
            return x
        numbers = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
        position = getattr(options, cls.key)
        if position is None:
            return torch.cat([numbers[:, None], x], -1)[None]
        keys = x[:, position]
        observed = x[:, [c for c in range(x.shape[1]) if c != position % x.shape[1]]]
        rows = torch.cat([numbers[:, None], observed], -1)
        _, which, steps = torch.unique(keys, return_inverse=True, return_counts=True)
        groups = rows[which.argsort(stable=True)].split(steps.tolist())
        in_order = sorted(groups, key=lambda group: float(group[0, 0]))
        return torch.nn.utils.rnn.pad_sequence(in_order, batch_first=True)

    @classmethod
    def width(cls, x: Tensor) -> int:
        """Return the number of observed columns D."""
        return x.shape[-1] - 1

    @classmethod
    def count(cls, x: Tensor) -> int:
        """Return the number of steps of all stacks together."""
        return int(steps_mask(x).sum())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the observed columns."""
        keys = self.key_columns() if len(self.table_names) > self.columns else []
        return tuple(name for name in self.table_names if name not in keys)

    def template(self, n: int, steps: int | None = None) -> Tensor:
        """Return ``n`` stacks of zeros with ``steps`` steps."""
        steps = steps or self.example_steps
        blank = super().template(n)[:, None].expand(-1, steps, -1)
        numbers = torch.arange(1, n * steps + 1, dtype=blank.dtype, device=blank.device)
        return torch.cat([numbers.reshape(n, steps, 1), blank], -1)

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Put the simulated observations (n, T) or (n, T, D) behind the row numbers of the template."""
        return torch.cat([template[..., :1], observed.reshape(*template.shape[:2], -1).to(template.dtype)], -1)

    def simulate(self, n: int, seed: int, steps: int | None = None) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        """Draw ``n`` stacks of ``steps`` steps: x (n, steps, 1 + D) and their latents."""
        with isolated(seed), torch.no_grad():
            return self._simulate(self.template(n, steps))

    def latent_sites(self, x: Tensor | None = None) -> list[Any]:
        """Return the latent sites, as of a simulated stack where there are no data to tell the number of steps."""
        return super().latent_sites(self.template(2) if x is None else x)


class SequenceOptions(Options):
    """Options that all sequence entries share."""

    sequence: KeyColumn | None = Field(
        None, description="column that names the sequence of each row; none takes the table as one sequence"
    )


class SequenceEntry(StackedEntry):
    """Base of entries whose datum is a sequence: one latent path for each, steps in the order of the table's rows."""

    Options = SequenceOptions
    key = "sequence"
    stack_dims = ("sequence", "step")

    def simulate_table(self, n: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Draw one sequence of ``n`` steps as a table, with the state of each step where the states are finite."""
        x, z = self.simulate(1, seed, steps=n)
        is_class = isinstance(z, Tensor) and z.shape == (1, n) and not z.is_floating_point()
        return observations(x)[0], z[0].long() if isinstance(z, Tensor) and is_class else None


def steps_mask(x: Tensor) -> Tensor:
    """Return which steps of arranged data (S, T, 1 + D) are real and not padding: (S, T) of bool."""
    return x[..., 0] > 0


def observations(x: Tensor) -> Tensor:
    """Return the observed columns of arranged data: (S, T, D), zero at padding."""
    return x[..., 1:]


def lengths(x: Tensor) -> Tensor:
    """Return the number of steps of each stack: (S,) of int64."""
    return steps_mask(x).sum(-1)


def by_row(x: Tensor, values: Tensor) -> Tensor:
    """Return ``values`` (S, T, ...) of the steps in the order of the table's rows: (N, ...)."""
    mask = steps_mask(x)
    return values[mask][x[..., 0][mask].argsort()]
