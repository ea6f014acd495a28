"""What is maximised: Pyro's own ELBOs under our names."""

from __future__ import annotations

from dataclasses import dataclass

from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from elbozoo.guides.base import Guide
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.sites import MAX_PLATE_NESTING


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

    def build(self, particles: int) -> ELBO:
        """Return Pyro's loss with ``particles`` draws, vectorised where there is more than one."""
        return self.loss(
            num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=MAX_PLATE_NESTING
        )

    def refusal(self, guide: Guide) -> str | None:
        """Say why this objective does not suit ``guide``, or return None."""
        if self.name == "elbo-enumerated" and not guide.is_discrete:
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
    """Return the objective called ``name``; ``"auto"`` enumerates a discrete latent and samples any other.

    Raises
    ------
    InvalidInput
        For an unknown name, or an objective that does not suit the guide.
    """
    if name == "auto":
        return OBJECTIVES["elbo-enumerated" if guide.is_discrete else "elbo"]
    if name not in OBJECTIVES:
        raise unknown_name("objective", name, [*OBJECTIVES, "auto"])
    objective = OBJECTIVES[name]
    if reason := objective.refusal(guide):
        raise InvalidInput(f"objective {name!r} does not suit guide {guide.name!r}: {reason}")
    return objective
