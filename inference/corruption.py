"""What a guide sees while it is trained, where that is not the data, and the ELBO of what it is trained for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elbozoo.guides.base import Guide
from elbozoo.inference.weights import CHUNK_ELEMENTS, importance_weights
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Corrupts, Entry

DRAWS = 1000


class Corrupted:
    """A guide that is given corrupted rows in place of those that it is called with.

    One evaluation of a loss may call the guide several times on a batch, once to draw and once more for the density
    of the draws. Both must be about one q, and so about one corruption: it is kept until :meth:`renew`, which each
    step begins with.

    Everything else about the guide is as it was, so that losses can ask it what they need to know.

    Parameters
    ----------
    guide : Guide
        Called as ``guide(batch)``.
    corrupt : callable
        Draws corrupted rows (B, D) for rows (B, D).
    """

    def __init__(self, guide: Guide, corrupt: Callable[[Tensor], Tensor]) -> None:
        self.guide, self.corrupt = guide, corrupt
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the latent sites of ``batch`` given its corrupted rows."""
        values: dict[str, Tensor] = self.guide(batch._replace(x=self.seen(batch.x)))
        return values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guide, name)

    def seen(self, x: Tensor) -> Tensor:
        """Return what the guide sees of the rows ``x`` (B, D): the same for the same tensor, until renewed."""
        for rows, corrupted in self._seen:
            if rows is x:
                return corrupted
        with torch.no_grad():
            corrupted = self.corrupt(x)
        # With the rows themselves, so that no other tensor can take their place in memory.
        self._seen.append((x, corrupted))
        return corrupted

    def renew(self) -> None:
        """Forget what was seen: the next call draws a fresh corruption."""
        self._seen.clear()


def seeing(guide: Guide, entry: Entry) -> Guide | Corrupted:
    """Return ``guide`` as it is trained: on rows that the entry has corrupted, where it does that."""
    return Corrupted(guide, entry.corrupt) if isinstance(entry, Corrupts) else guide


def renew(guide: Guide | Corrupted) -> None:
    """Let a guide that sees corrupted rows see fresh ones from now on."""
    if isinstance(guide, Corrupted):
        guide.renew()


class DenoisingELBO(NamedTuple):
    """ELBO of the denoising criterion, total, nats, with its Monte Carlo standard error; NaN where there is none."""

    value: float
    standard_error: float


def denoising_elbo(entry: Entry, guide: Guide, x: Tensor, seed: int, draws: int = DRAWS) -> DenoisingELBO:
    """Estimate the ELBO of the denoising criterion of the rows ``x`` (N, D).

    E_c(x̃ given x) E_q(z given x̃)[log p(x, z) - log q(z given x̃)], at most log p(x) (Im et al. 2017). Each draw has a
    corruption of its own, so that the error is that of both. NaN where nothing is corrupted, or q has no density.

    Parameters
    ----------
    draws : int
        Number of draws (x̃, z) of each row.
    """
    if not isinstance(entry, Corrupts) or not guide.is_bound:
        return DenoisingELBO(math.nan, math.nan)
    at_once = max(1, min(draws, CHUNK_ELEMENTS // (len(x) * entry.elements(x))))
    parts = []
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        # Every copy of the rows is corrupted anew; each has one draw of z.
        copies = Batch.full(x.repeat(count, 1))
        seen = Corrupted(guide, entry.corrupt)
        weights = importance_weights(entry, seen, copies, 1, seed + start)  # type: ignore[arg-type]
        parts.append(weights.elbo().reshape(count, len(x)))
    terms = torch.cat(parts)
    error = float((terms.var(0) / draws).sum().sqrt()) if draws > 1 else math.nan
    return DenoisingELBO(float(terms.mean(0).sum()), error)
