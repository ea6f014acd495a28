"""Entries whose datum is a sequence: one latent path for each series, steps in the order of the table's rows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.options import Field, KeyColumn, Options


class SequenceOptions(Options):
    """Options that all sequence entries share."""

    sequence: KeyColumn | None = Field(
        None, description="column that names the sequence of each row; none takes the table as one sequence"
    )


class SequenceEntry(Entry):
    """Base of entries whose datum is a sequence.

    Arranged data are (S, T, 1 + D): S sequences, padded to T steps at their ends. Channel 0 holds the row number
    of each step in the table, counted from 1, and 0 at padding; the other channels hold the D observed columns,
    0 at padding.

    Attributes
    ----------
    example_steps : int
        Length of simulated sequences.
    """

    Options = SequenceOptions
    example_steps: ClassVar[int] = 12

    @classmethod
    def arrange(cls, x: Tensor, options: Any) -> Tensor:
        """Return the rows of a table (N, D or D + 1) as sequences (S, T, 1 + D), in order of first appearance."""
        if x.ndim == 3:
            return x
        numbers = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
        if options.sequence is None:
            return torch.cat([numbers[:, None], x], -1)[None]
        keys = x[:, options.sequence]
        observed = x[:, [c for c in range(x.shape[1]) if c != options.sequence % x.shape[1]]]
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
        """Return the number of steps of all sequences together."""
        return int(steps_mask(x).sum())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the observed columns."""
        keys = self.key_names() if len(self.table_names) > self.columns else []
        return tuple(name for name in self.table_names if name not in keys)

    def template(self, n: int, steps: int | None = None) -> Tensor:
        """Return ``n`` sequences of zeros with ``steps`` steps."""
        steps = steps or self.example_steps
        blank = super().template(n)[:, None].expand(-1, steps, -1)
        numbers = torch.arange(1, n * steps + 1, dtype=blank.dtype, device=blank.device)
        return torch.cat([numbers.reshape(n, steps, 1), blank], -1)

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Put the simulated observations (n, T) or (n, T, D) behind the row numbers of the template."""
        return torch.cat([template[..., :1], observed.reshape(*template.shape[:2], -1).to(template.dtype)], -1)

    def simulate(self, n: int, seed: int, steps: int | None = None) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        """Draw ``n`` sequences of ``steps`` steps: x (n, steps, 1 + D) and their latent paths."""
        with isolated(seed), torch.no_grad():
            return self._simulate(self.template(n, steps))

    def simulate_table(self, n: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Draw one sequence of ``n`` steps as a table, with the state of each step where the states are finite."""
        x, z = self.simulate(1, seed, steps=n)
        is_class = isinstance(z, Tensor) and z.shape == (1, n) and not z.is_floating_point()
        return observations(x)[0], z[0].long() if isinstance(z, Tensor) and is_class else None

    def latent_sites(self, x: Tensor | None = None) -> list[Any]:
        """Return the latent sites, whose event shape begins with the number of steps."""
        return super().latent_sites(self.template(2) if x is None else x)


def steps_mask(x: Tensor) -> Tensor:
    """Return which steps of arranged data (S, T, 1 + D) are real and not padding: (S, T) of bool."""
    return x[..., 0] > 0


def observations(x: Tensor) -> Tensor:
    """Return the observed columns of arranged data: (S, T, D), zero at padding."""
    return x[..., 1:]


def lengths(x: Tensor) -> Tensor:
    """Return the number of steps of each sequence: (S,) of int64."""
    return steps_mask(x).sum(-1)


def by_row(x: Tensor, values: Tensor) -> Tensor:
    """Return ``values`` (S, T, ...) of the steps in the order of the table's rows: (N, ...)."""
    mask = steps_mask(x)
    return values[mask][x[..., 0][mask].argsort()]
