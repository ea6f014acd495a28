"""What a guide sees while it is trained, where that is not the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elbozoo.guides.base import Guide
from elbozoo.models.contract.entry import Corrupts, Entry


def seeing(guide: Guide, entry: Entry) -> Callable[..., Any]:
    """Return ``guide`` as it is trained: on rows that the entry has corrupted, where it does that."""
    if not isinstance(entry, Corrupts):
        return guide
    raise NotImplementedError
