"""Checks of values inside programs, which can be left out where the values are known to be right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_checking: ContextVar[bool] = ContextVar("checking", default=True)


def values_are_checked() -> bool:
    """Whether programs look at the values of their rows and refuse wrong ones."""
    return _checking.get()


@contextmanager
def unchecked() -> Iterator[None]:
    """Run programs on rows that were checked before, without looking at their values again.

    A decision by the values of a tensor has no place in a graph of tensor operations.
    """
    token = _checking.set(False)
    try:
        yield
    finally:
        _checking.reset(token)
