"""Entries whose datum is a group of rows: what they share is one latent, and their order means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.models.contract.entry import default_names
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.options import Field, KeyColumn, Options
from elbozoo.models.contract.sequences import StackedEntry, by_row, lengths, observations, steps_mask

GROUP_SITE, ROW_SITE = "u", "v"
GUIDED_FAMILIES = ("delta", "diagonal-normal", "full-rank-normal")
EXAMPLE_SIZES = 3  # different sizes of simulated groups, so that some have padding


class GroupOptions(Options):
    """Options that all entries of groups share."""

    group: KeyColumn = Field(-1, description="column that names the group of each row; the others are explained")
    allow_single: bool = Field(False, description="whether groups of a single row may be among the others")


class GroupEntry(StackedEntry):
    """Base of entries whose datum is a group of rows, arranged as :class:`StackedEntry` says.

    Its latent sites are ``"u"`` (Ku,), one for the group, and ``"v"`` (T, Kv), one for each of its rows, both standard
    normal under the prior; at padding ``"v"`` and ``"x"`` are masked, so that they add nothing to log p. A minibatch is
    one of groups, so that what belongs to a group is counted once for each group, however its rows are spread over the
    table.
    """

    Options = GroupOptions
    options: GroupOptions
    amortized_guide = "product-of-normals"
    key = "group"
    stack_dims = ("group", "row")
    site_dims: ClassVar[Mapping[str, tuple[str, ...]]] = {GROUP_SITE: ("content",), ROW_SITE: ("row", "style")}
    example_steps: ClassVar[int] = 4

    def __init__(self, options: GroupOptions, columns: int) -> None:
        super().__init__(options, columns)
        names = list(default_names(columns))
        names.insert(self._position, "group")
        self.table_names = tuple(names)

    def guide_refusal(self, family: str, source: str) -> str | None:
        """Say why a guide that knows nothing of groups does not suit, or return None."""
        if source != "free":
            return f"a datum is a group, and groups of different sizes have no {source} q but {self.amortized_guide}"
        if family not in GUIDED_FAMILIES:
            return "q has a member for each row, of few dimensions, which full-rank-normal serves"
        return None

    def posterior_means(self, x: Tensor) -> Tensor:
        """Exact posterior mean of u, then of v, for each row: (S, T, Ku + Kv)."""
        raise NotImplementedError(f"{type(self).__name__} knows no exact posterior")

    def nearest_product(self, x: Tensor) -> dict[str, Distribution]:
        """q with the least KL(q ‖ posterior) among products of a q for u, batch (S,), and one for each v, (S, T)."""
        raise NotImplementedError(f"{type(self).__name__} knows no exact posterior")

    @classmethod
    def refuse_groups(cls, x: Tensor, options: GroupOptions) -> None:
        """Refuse arranged data of a single group, and groups of a single row unless they are allowed.

        Raises
        ------
        InvalidInput
            With the row of the table in which such a group stands, and what to do.
        """
        if len(x) < 2:
            raise InvalidInput(
                f"option group: found one group of {int(lengths(x).sum())} rows, expected at least 2 groups: what the "
                "rows of a group share shows between groups; name the column that tells them apart"
            )
        single = lengths(x) == 1
        if single.all() or (single.any() and not options.allow_single):
            count, row = int(single.sum()), int(x[single][0, 0, 0])
            what = "only groups" if single.all() else "1 group" if count == 1 else f"{count} groups"
            where = f"row {row} is alone in its group" if count == 1 else f"the first is row {row}"
            instead = "" if single.all() else ", or set allow_single=true"
            raise InvalidInput(
                f"option group: found {what} of a single row ({where}, counted from 1), expected at least 2 rows in "
                f"each, since one row does not tell what its group shares; drop or merge such groups{instead}"
            )

    def template(self, n: int, steps: int | None = None) -> Tensor:
        """Return ``n`` groups of zeros with at most ``steps`` rows, some with fewer, but none with a single one."""
        steps = steps or self.example_steps
        sizes = [max(min(2, steps), steps - position % EXAMPLE_SIZES) for position in range(n)]
        return self._blank(sizes)

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Put the simulated rows (n, T, D) behind the row numbers of the template, and zeros where it is padded."""
        x = super().complete(template, observed)
        return x.masked_fill(~steps_mask(x)[..., None], 0.0)

    def simulate_table(self, n: int, seed: int) -> tuple[Tensor, None]:
        """Draw a table of ``n`` rows in groups of ``example_steps``, the last ones larger, with a column of codes."""
        count = max(1, n // self.example_steps)
        sizes = [n // count + (position >= count - n % count) for position in range(count)]
        with isolated(seed), torch.no_grad():
            x, _ = self._simulate(self._blank(sizes))
        return self.table(x), None

    def table(self, x: Tensor) -> Tensor:
        """Return arranged data as a table (N, D + 1), its rows in order and the code of its group in each."""
        codes = torch.arange(len(x), dtype=x.dtype, device=x.device)[:, None].expand(x.shape[:2])
        return with_column(by_row(x, observations(x)), by_row(x, codes), self._position)

    @property
    def _position(self) -> int:
        """Position of the column of groups in the table, from the left."""
        assert isinstance(self.options.group, int)
        return self.options.group % (self.columns + 1)

    def _blank(self, sizes: list[int]) -> Tensor:
        blank = super().template(len(sizes), max(sizes))
        blank[..., 0] = 0.0
        start = 1
        for group, size in zip(blank, sizes, strict=True):
            group[:size, 0] = torch.arange(start, start + size, dtype=blank.dtype, device=blank.device)
            start += size
        return blank


def with_column(rows: Tensor, column: Tensor, position: int) -> Tensor:
    """Return ``rows`` (N, D) with ``column`` (N,) put in at ``position``: (N, D + 1)."""
    return torch.cat([rows[:, :position], column[:, None], rows[:, position:]], -1)


def in_table(x: Tensor, options: Any) -> tuple[Tensor, list[int]]:
    """Return arranged data as rows with a blank where the groups stood, and the positions of the other columns."""
    rows = by_row(x, observations(x))
    width = rows.shape[1] + 1
    position = options.group % width
    return with_column(rows, rows.new_zeros(len(rows)), position), [c for c in range(width) if c != position]
