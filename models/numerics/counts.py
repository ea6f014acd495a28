"""Expected counts, which may be zero."""

from __future__ import annotations

import torch
from torch import Tensor


def positive(counts: Tensor) -> Tensor:
    """Return the counts, zeros among them as the least positive number: no quotient or logarithm is infinite."""
    return counts.clamp(min=torch.finfo(counts.dtype).tiny)
