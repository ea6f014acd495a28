"""What is maximised: Pyro's own ELBOs under our names, and losses of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.distributions.transforms import AffineAutoregressive, ConditionalAffineAutoregressive
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from elbozoo.guides.base import Guide
from elbozoo.guides.labelled import LabelThenLatentGuide
from elbozoo.guides.local import ExactGuide
from elbozoo.guides.sequences import SequenceGuide
from elbozoo.inference.losses import (
    BetaELBO,
    DrawnELBO,
    ELBOAndLabels,
    EvidenceELBO,
    ExpectedELBO,
    Gradient,
    ImportanceWeightedELBO,
    ReweightedWakeSleepELBO,
    Weighting,
)
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.options import Field, Options
from elbozoo.models.contract.sites import MAX_PLATE_NESTING

WEIGHED_PARTICLES = 10


class ObjectiveOptions(Options):
    """Options of what stochastic variational inference maximises."""

    objective: str = Field(
        "auto",
        description="elbo, elbo-analytic, elbo-enumerated, elbo-and-labels, iwae, beta, reweighted-wake-sleep; "
        "auto enumerates a discrete latent",
    )
    particles: int | None = Field(
        None,
        ge=1,
        description="draws of z per step, K of iwae and reweighted-wake-sleep; none takes 10 for these and on small "
        "data, where they cost little, else 1",
    )
    gradient: Gradient = Field(
        "auto",
        description="how a draw of z tells the guide what to change; auto goes through the draw where it can, and "
        "scores it where not",
    )
    kl: Literal["sampled", "analytic"] = Field(
        "sampled", description="how elbo and beta take KL(q ‖ prior): by draws or in closed form"
    )
    kl_weight: float = Field(1.0, ge=0, description="β of the objective beta, at the end of its schedule")
    kl_schedule: Literal["constant", "annealed", "cyclical"] = Field(
        "constant", description="how β comes there: at once, by one rise from 0, or by several"
    )
    kl_steps: int = Field(2000, ge=1, description="steps until an annealed or cyclical β stays where it is")
    kl_cycles: int = Field(4, ge=1, description="rises of a cyclical β")
    free_bits: float = Field(
        0.0, ge=0, description="nats of each latent dimension that the objective beta does not ask to save"
    )
    sleep: float = Field(
        0.0, ge=0, le=1, description="share of dreamt data in what the guide learns by reweighted-wake-sleep"
    )

    label_weight: float = Field(
        1.0, ge=0, description="how many times elbo-and-labels counts the label of a row in what the classifier learns"
    )

    @property
    def weighting(self) -> Weighting:
        """β along the fit."""
        return Weighting(self.kl_weight, self.kl_schedule, self.kl_steps, self.kl_cycles)


DEFAULTS = ObjectiveOptions()
Loss = Callable[[int, ObjectiveOptions], ELBO]


@dataclass(frozen=True)
class Objective:
    """An objective of SVI.

    Attributes
    ----------
    name : str
        Key of :data:`OBJECTIVES`.
    loss : callable
        Makes the loss, minus the objective, from the number of draws and the options.
    meaning : str
        One line on what it is and how the expectation under q is taken.
    is_elbo : bool
        Whether it is the ELBO, or an estimate of it.
    is_weighed : bool
        Whether the draws of a datum are weighed against one another, so that q must have a density, and a latent of
        the whole data set needs all rows.
    gradients : tuple of str
        What ``gradient`` may be, beside ``auto``.
    reads : tuple of str
        Options of :class:`ObjectiveOptions` that it reads, beside ``particles`` and ``gradient``.
    """

    name: str
    loss: Loss
    meaning: str
    is_elbo: bool = True
    is_weighed: bool = False
    gradients: tuple[str, ...] = ("reparameterised",)
    reads: tuple[str, ...] = ()

    def build(self, particles: int, guide: Guide, options: ObjectiveOptions = DEFAULTS) -> ELBO:
        """Return the loss with ``particles`` draws.

        Paths of states are too many to enumerate one by one, and draws of them have no gradient but a noisy one:
        a path's closed forms take the place of both.
        """
        if isinstance(guide, SequenceGuide) and self.name == "elbo-enumerated":
            return ExpectedELBO()
        if isinstance(guide, ExactGuide) and guide.is_path and (self.is_elbo or self.name == "iwae"):
            return EvidenceELBO()
        return self.loss(particles, options)

    def moving_steps(self, options: ObjectiveOptions) -> int:
        """Return for how many steps the objective itself changes, so that its values cannot be compared."""
        return options.weighting.moving_steps if "kl_schedule" in self.reads else 0

    def refusal(self, guide: Guide, options: ObjectiveOptions = DEFAULTS) -> str | None:
        """Say why this objective does not suit ``guide``, or return None."""
        if self.name == "elbo-enumerated" and not guide.has_discrete:
            return "its latent is continuous and cannot be enumerated; use elbo or elbo-analytic"
        if self.name == "elbo-and-labels" and not isinstance(guide, LabelThenLatentGuide):
            return "it has no classifier that could learn from labels; use elbo-enumerated"
        if self.name == "elbo-analytic" and guide.family in ("delta", "flow", "laplace"):
            return f"KL({guide.family} ‖ prior) has no closed form; use elbo"
        if self.name == "elbo-analytic" and guide.has_discrete:
            return "its latent is discrete, and draws of it carry no gradient; use elbo-enumerated"
        if self.is_weighed and not guide.is_bound:
            return "its q is a point without a density, and weights are p(x, z) / q(z); use elbo"
        if self._asks_for_densities(options) and _inverts_in_single_precision_alone(guide):
            return (
                "it needs the density of an affine autoregressive flow where the flow did not draw, which Pyro "
                "computes in single precision alone; use gradient=auto with elbo, iwae or beta"
            )
        if self.name == "reweighted-wake-sleep":
            return _wake_sleep_refusal(guide, options)
        return _divergence_refusal(guide, options) if self.name == "beta" else None

    def _asks_for_densities(self, options: ObjectiveOptions) -> bool:
        return self.name == "reweighted-wake-sleep" or options.gradient in ("score", "doubly-reparameterised")

    def check(self, guide: Guide, options: ObjectiveOptions) -> None:
        """Refuse a guide or options that do not suit this objective.

        Raises
        ------
        InvalidInput
            With what was found, the reason and what to do.
        """
        if reason := self.refusal(guide, options):
            raise InvalidInput(f"objective {self.name!r} does not suit guide {guide.name!r}: {reason}")
        for name in _unread(self, options):
            readers = " or ".join(o.name for o in OBJECTIVES.values() if name in o.reads)
            raise InvalidInput(
                f"option {name}: found {getattr(options, name)!r} with objective {self.name!r}, which does not read "
                f"it; set objective={readers}"
            )
        if options.gradient != "auto" and options.gradient not in self.gradients:
            allowed = ", ".join(("auto", *self.gradients))
            raise InvalidInput(
                f"option gradient: found {options.gradient!r} with objective {self.name!r}, expected one of: {allowed}"
            )
        if options.gradient in ("reparameterised", "doubly-reparameterised") and guide.has_discrete:
            raise InvalidInput(
                f"option gradient: found {options.gradient!r} with a discrete latent, whose draws carry no gradient; "
                "set gradient=score or gradient=auto"
            )
        if self.name == "reweighted-wake-sleep" and options.particles == 1:
            raise InvalidInput(
                "option particles: found 1 with objective 'reweighted-wake-sleep', expected at least 2: the weight "
                "of a single draw is always one"
            )


def _elbo(loss: Callable[..., ELBO]) -> Loss:
    return lambda particles, options: loss(
        num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=MAX_PLATE_NESTING
    )


def _drawn(particles: int, options: ObjectiveOptions) -> ELBO:
    if options.gradient == "score":
        return DrawnELBO(particles, "score")
    return _elbo(Trace_ELBO)(particles, options)


def _beta(particles: int, options: ObjectiveOptions) -> ELBO:
    return BetaELBO(particles, options.gradient, options.weighting, options.kl, options.free_bits)


KL_OPTIONS = ("kl", "kl_weight", "kl_schedule", "kl_steps", "kl_cycles", "free_bits")

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            "elbo",
            _drawn,
            "draws from q throughout",
            gradients=("reparameterised", "score"),
        ),
        Objective(
            "elbo-analytic",
            _elbo(TraceMeanField_ELBO),
            "KL(q ‖ prior) in closed form, draws for the likelihood",
            reads=("kl",),
        ),
        Objective("elbo-enumerated", _elbo(TraceEnum_ELBO), "sums over the values of a discrete latent", gradients=()),
        Objective(
            "elbo-and-labels",
            lambda particles, options: ELBOAndLabels(particles, options.label_weight),
            "elbo-enumerated, and the log probability that the classifier gives to the labels that are known",
            is_elbo=False,
            gradients=(),
            reads=("label_weight",),
        ),
        Objective(
            "iwae",
            lambda particles, options: ImportanceWeightedELBO(particles, options.gradient),
            "the importance-weighted bound of K draws for each datum, a finite latent drawn like any other",
            is_elbo=False,
            is_weighed=True,
            gradients=("reparameterised", "score", "doubly-reparameterised"),
        ),
        Objective(
            "beta",
            _beta,
            "KL(q ‖ prior) counts β times, along a schedule, or from its free bits upwards; no bound below β = 1",
            is_elbo=False,
            gradients=("reparameterised", "score"),
            reads=KL_OPTIONS,
        ),
        Objective(
            "reweighted-wake-sleep",
            lambda particles, options: ReweightedWakeSleepELBO(particles, options.sleep),
            "θ climbs the importance-weighted bound; q lowers KL(p(z given x) ‖ q) by weighted draws or by dreams",
            is_elbo=False,
            is_weighed=True,
            gradients=(),
            reads=("sleep",),
        ),
    )
}


def resolve_objective(name: str, guide: Guide, options: ObjectiveOptions = DEFAULTS) -> Objective:
    """Return the objective called ``name``; ``"auto"`` sums over finite latents and samples any other.

    Raises
    ------
    InvalidInput
        For an unknown name, or an objective that does not suit the guide or the options.
    """
    if name == "auto":
        name = "elbo-enumerated" if guide.has_discrete and options.gradient == "auto" else "elbo"
    if name not in OBJECTIVES:
        raise unknown_name("objective", name, [*OBJECTIVES, "auto"])
    if name == "elbo" and options.kl == "analytic":
        name = "elbo-analytic"
    objective = OBJECTIVES[name]
    objective.check(guide, options)
    return objective


def _unread(objective: Objective, options: ObjectiveOptions) -> list[str]:
    """Names of the options that were set and that only other objectives read."""
    default: dict[str, Any] = DEFAULTS.model_dump()
    return [
        name
        for name in (*KL_OPTIONS, "sleep", "label_weight")
        if name not in objective.reads and getattr(options, name) != default[name]
    ]


def _inverts_in_single_precision_alone(guide: Guide) -> bool:
    flows = (AffineAutoregressive, ConditionalAffineAutoregressive)
    return any(isinstance(module, flows) for module in guide.modules()) and any(
        parameter.dtype == torch.float64 for parameter in guide.parameters()
    )


def _wake_sleep_refusal(guide: Guide, options: ObjectiveOptions) -> str | None:
    if guide.family == "posterior":
        return "its q is the model's own posterior, which has nothing to learn but θ; use elbo or iwae"
    if options.sleep > 0 and not guide.source.endswith("amortized"):
        return f"a {guide.source} q has no parameters for dreamt data; use an amortized guide or sleep=0"
    return None


def _divergence_refusal(guide: Guide, options: ObjectiveOptions) -> str | None:
    if options.kl == "analytic" and (guide.family in ("delta", "flow") or not guide.is_local):
        return "its KL(q ‖ prior) has no closed form; use kl=sampled"
    if options.free_bits > 0 and (guide.family == "delta" or not guide.is_local):
        return "free bits are nats of each datum's own latents under a q with a density; use free_bits=0"
    return None
