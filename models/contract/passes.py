"""How an entry may make the E steps of EM cheaper than one pass over the rows each: optional capabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor


class Summary(Protocol):
    """All that an E step needs of some rows, whatever θ."""

    def merge(self, other: Any) -> Any:
        """Return the summary of the rows of both; the order in which summaries are merged does not matter."""
        ...


@runtime_checkable
class SummarizesRows(Protocol):
    """An entry whose E step sees the rows only through a summary that does not depend on θ.

    The rows are then passed over once, and not once for each iteration.
    """

    def summary_pays(self, rows: int) -> bool:
        """Whether EM on so many rows in memory is cheaper from their summary."""
        ...

    def summarize(self, x: Tensor) -> Summary:
        """Return the summary of the rows ``x`` (N, D)."""
        ...

    def expected_statistics_from(self, summary: Any) -> NamedTuple:
        """E step: the same statistics as ``expected_statistics`` of the rows."""
        ...


@runtime_checkable
class SharesPasses(Protocol):
    """An entry that can take the E steps of several parameter values in one pass over the rows."""

    @classmethod
    def expected_statistics_together(cls, entries: Sequence[Self], x: Tensor) -> Sequence[NamedTuple]:
        """E steps of ``entries``, of the same options and data, at the θ of each."""
        ...
