"""Held-out rows: what a fit says about data that it has not seen.

The ELBO of new rows needs a q for them, which an encoder, a shared q and the exact posterior have. A free q has none:
its parameters are those of the rows of the fit. The evidence of new rows needs no q where it is exact or an integral.

Where one latent serves the whole data set the held-out rows depend on those of the fit through it, and what is held
out is log p(x' given x) = log p(x, x') - log p(x) with x' the new rows (Geisser and Eddy, A predictive approach to
model selection, 1979). It is reported where both terms are exact: the difference of two estimates would carry both
errors, and an ELBO of the new rows alone would be about another posterior.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from elbozoo.guides.base import Guide
from elbozoo.inference.evidence import PARTICLES, Evidence, estimate_evidence, log_evidence
from elbozoo.inference.ledger import check_bound, elbo_of
from elbozoo.inference.weights import importance_weights
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.sequences import StackedEntry


class Companions(NamedTuple):
    """Data beside those of a fit, as tables of the same columns.

    Attributes
    ----------
    validation : Tensor (M, D) or None
        Rows that say when to stop.
    test : Tensor (T, D) or None
        Rows that nothing sees before the end.
    intensities : Tensor (N, D) or None
        Probabilities from which each step draws the binary pixels of the fit's own rows anew; NaN where a column is
        no pixel.
    """

    validation: Tensor | None = None
    test: Tensor | None = None
    intensities: Tensor | None = None

    @property
    def part(self) -> str | None:
        """The part that held-out figures are about: test where there is one, else validation."""
        return "test" if self.test is not None else "validation" if self.validation is not None else None

    @property
    def heldout(self) -> Tensor | None:
        """The rows of :attr:`part`."""
        return self.validation if self.test is None else self.test

    def while_fitting(self) -> dict[str, Tensor]:
        """Return by name what a fit depends on while it runs."""
        given = {"validation": self.validation, "intensities": self.intensities}
        return {name: value for name, value in given.items() if value is not None}


ALONE = Companions()


class HeldOut(NamedTuple):
    """Figures of held-out rows: totals over them, nats; NaN and None where a figure does not apply.

    Attributes
    ----------
    heldout_rows : int
        Number of the rows.
    heldout_elbo, heldout_elbo_se : float
        ELBO at β = 1 and its Monte Carlo standard error; NaN without a q for new rows.
    heldout_log_evidence, heldout_log_evidence_se, heldout_log_evidence_kind : float, float, str
        log p(x'), or log p(x' given x) where a latent is global; see :class:`~elbozoo.inference.evidence.Evidence`.
    """

    heldout_rows: int
    heldout_elbo: float
    heldout_elbo_se: float
    heldout_log_evidence: float
    heldout_log_evidence_se: float
    heldout_log_evidence_kind: str | None


def refusal_of_new_rows(guide: Guide) -> str | None:
    """Say why ``guide`` has no q for rows that it was not fitted to, or return None."""
    if not guide.is_local:
        return "its q is about latents of the whole data set, whose posterior new rows would change"
    if guide.source == "free":
        return "it has a q of its own for each row of the fit and none for others; use an amortized guide"
    return None


def heldout_figures(entry: Entry, guide: Guide, x: Tensor | None, new: Tensor, seed: int) -> HeldOut:
    """Return the figures of the rows ``new`` for a fit to the rows ``x``, both arranged, float64.

    Raises
    ------
    InvalidInput
        Without ``x`` where a latent is global, so that the new rows depend on those.
    NumericalFailure
        If the ELBO of the new rows exceeds their evidence beyond the errors of both.
    """
    elbo, elbo_se = math.nan, math.nan
    evidence = _evidence(entry, x, new)
    if refusal_of_new_rows(guide) is None and guide.is_bound:
        weights = importance_weights(entry, guide, Batch.full(new), PARTICLES, seed)
        elbo, elbo_se = elbo_of(entry, guide, new, weights)
        evidence = evidence or estimate_evidence(weights)
        check_bound(elbo, elbo_se, evidence)
    return HeldOut(
        heldout_rows=entry.count(new),
        heldout_elbo=elbo,
        heldout_elbo_se=elbo_se,
        heldout_log_evidence=evidence.value if evidence else math.nan,
        heldout_log_evidence_se=evidence.standard_error if evidence else math.nan,
        heldout_log_evidence_kind=evidence.kind if evidence else None,
    )


def joined(entry: Entry, x: Tensor, new: Tensor) -> Tensor:
    """Return arranged data of the fit with new ones after them; stacks are padded to the longest."""
    if not isinstance(entry, StackedEntry):
        return torch.cat([x, new])
    # Row numbers go on, as they would had both come from one table.
    later = new.clone()
    later[..., 0] = torch.where(new[..., 0] > 0, new[..., 0] + entry.count(x), new[..., 0])
    steps = max(x.shape[1], new.shape[1])
    return torch.cat([torch.nn.functional.pad(each, (0, 0, 0, steps - each.shape[1])) for each in (x, later)])


def check_new_rows(entry: Entry, x: Tensor, new: Tensor, part: str) -> None:
    """Refuse arranged rows that ``entry`` could not have been fitted to.

    Raises
    ------
    InvalidInput
        With what the entry says of them.
    """
    try:
        # Together with those of the fit, since few rows alone may be too few for a fit.
        entry.check_data(joined(entry, x, new), entry.options)
    except InvalidInput as error:
        count = entry.count(x)
        raise InvalidInput(f"{part} rows, which stand after the {count} of the fit: {error}") from None


def _evidence(entry: Entry, x: Tensor | None, new: Tensor) -> Evidence | None:
    if all(site.is_local for site in entry.latent_sites(new)):
        return log_evidence(entry, new)
    if x is None:
        raise InvalidInput(
            f"found no rows of the fit, expected them: {entry.name()} has a latent of the whole data set, and new rows "
            "depend on those through it; fit again, since a loaded fit does not carry its data"
        )
    together, alone = log_evidence(entry, joined(entry, x, new)), log_evidence(entry, x)
    if together is None or alone is None or (together.kind, alone.kind) != ("exact", "exact"):
        return None
    return Evidence(together.value - alone.value, 0.0, "exact", None)
