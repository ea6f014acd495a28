"""What factor models with a noise variance for each column ask of their data."""

from __future__ import annotations

import torch
from torch import Tensor

from elbozoo.models.contract.errors import InvalidInput


def refuse_unbounded_factors(x: Tensor, latent_dim: int) -> None:
    """Refuse constant columns of ``x`` (N, D), and more factors than its rows or columns allow.

    Raises
    ------
    InvalidInput
        With what was found, what was expected and what to do.
    """
    constant = torch.nonzero(x.var(0, correction=0) == 0).flatten().tolist()
    if constant:
        raise InvalidInput(
            f"columns {[c + 1 for c in constant]} (counted from 1) are constant, expected columns that vary: "
            "without variance a column's noise is zero and the likelihood unbounded; leave them out with --columns"
        )
    most = min(x.shape[1], len(x)) - 1
    if latent_dim > most:
        raise InvalidInput(
            f"option latent_dim: found {latent_dim} for {len(x)} rows x {x.shape[1]} columns, expected "
            f"at most {most}: fewer factors than columns and rows"
        )
