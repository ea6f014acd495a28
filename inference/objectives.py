"""What is maximised: Pyro's own ELBOs under our names, and two closed forms for sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor

from elbozoo.guides.base import Guide
from elbozoo.guides.local import ExactGuide
from elbozoo.guides.sequences import SequenceGuide
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasExpectedLogJoint
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.sequences import steps_mask
from elbozoo.models.contract.sites import MAX_PLATE_NESTING


class ClosedELBO(ELBO):
    """A loss that draws nothing, in the form of Pyro's."""

    def _get_trace(self, *args: Any) -> Any:
        raise NotImplementedError("a closed form has no trace")

    def loss(self, model: Any, guide: Guide, batch: Batch) -> float:
        """Minus the ELBO, nats over the whole data set, without a gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, batch))

    def loss_and_grads(self, model: Any, guide: Guide, batch: Batch) -> float:
        """Minus the ELBO, nats over the whole data set; adds to the gradients."""
        loss = self.differentiable_loss(model, guide, batch)
        loss.backward()
        return float(loss.detach())

    def differentiable_loss(self, model: Any, guide: Any, batch: Batch) -> Tensor:
        """Minus the ELBO, nats over the whole data set."""
        raise NotImplementedError


class ExpectedELBO(ClosedELBO):
    """The ELBO of a factorised q over paths of states, with its expectation in closed form."""

    def differentiable_loss(self, model: Entry, guide: SequenceGuide, batch: Batch) -> Tensor:
        """Minus the ELBO, nats over the whole data set."""
        return -expected_elbo(model, guide, batch).sum() * (batch.total / len(batch.x))


class EvidenceELBO(ClosedELBO):
    """The ELBO of the exact posterior, which is log p(x) for every draw."""

    def differentiable_loss(self, model: Any, guide: Guide, batch: Batch) -> Tensor:
        """Minus log p(x), nats over the whole data set."""
        evidence: Tensor = model.log_evidence(batch.x).sum()
        return -evidence * (batch.total / len(batch.x))


def expected_elbo(entry: Entry, guide: SequenceGuide, batch: Batch) -> Tensor:
    """ELBO of each sequence, (B,), nats, for states that are independent across time under q."""
    assert isinstance(entry, HasExpectedLogJoint)
    steps = guide.steps(batch)
    entropy = torch.where(steps_mask(batch.x), steps.entropy(), torch.zeros_like(steps.entropy()))
    return entry.expected_log_joint(batch.x, steps.probs) + entropy.sum(-1)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Objective:
    """An objective of SVI.

    Attributes
    ----------
    name : str
        ``elbo``, ``elbo-analytic`` or ``elbo-enumerated``.
    loss : type
        Pyro's ELBO that computes it.
    meaning : str
        One line on how the expectation under q is taken.
    """

    name: str
    loss: type[ELBO]
    meaning: str

    def build(self, particles: int, guide: Guide) -> ELBO:
        """Return the loss with ``particles`` draws, vectorised where there is more than one.

        Paths of states are too many to enumerate one by one, and draws of them have no gradient but a noisy one:
        a path's closed forms take the place of both.
        """
        loss = self.loss
        if isinstance(guide, SequenceGuide) and self.name == "elbo-enumerated":
            loss = ExpectedELBO
        elif isinstance(guide, ExactGuide) and guide.is_path:
            loss = EvidenceELBO
        return loss(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=MAX_PLATE_NESTING)

    def refusal(self, guide: Guide) -> str | None:
        """Say why this objective does not suit ``guide``, or return None."""
        if self.name == "elbo-enumerated" and not guide.has_discrete:
            return "its latent is continuous and cannot be enumerated; use elbo or elbo-analytic"
        if self.name == "elbo-analytic" and guide.family in ("delta", "flow", "laplace"):
            return f"KL({guide.family} ‖ prior) has no closed form; use elbo"
        return None


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("elbo", Trace_ELBO, "draws from q throughout"),
        Objective("elbo-analytic", TraceMeanField_ELBO, "KL(q ‖ prior) in closed form, draws for the likelihood"),
        Objective("elbo-enumerated", TraceEnum_ELBO, "sums over the values of a discrete latent"),
    )
}


def resolve_objective(name: str, guide: Guide) -> Objective:
    """Return the objective called ``name``; ``"auto"`` sums over finite latents and samples any other.

    Raises
    ------
    InvalidInput
        For an unknown name, or an objective that does not suit the guide.
    """
    if name == "auto":
        return OBJECTIVES["elbo-enumerated" if guide.has_discrete else "elbo"]
    if name not in OBJECTIVES:
        raise unknown_name("objective", name, [*OBJECTIVES, "auto"])
    objective = OBJECTIVES[name]
    if reason := objective.refusal(guide):
        raise InvalidInput(f"objective {name!r} does not suit guide {guide.name!r}: {reason}")
    return objective
