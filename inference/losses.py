"""Losses of our own, in the form of Pyro's: first the bound of each datum, then the scale of the plate.

A minibatch of B of N data estimates a sum over the data by N/B times the sum over its own. That is unbiased for a sum
of bounds and not for a bound of the sum, so whatever is nonlinear, such as the log of a mean of weights, is
taken datum by datum. A latent of the whole data set makes all rows one datum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from elbozoo.guides.base import Guide
from elbozoo.guides.families import Reshaped
from elbozoo.guides.sequences import SequenceGuide
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import PARTICLE_DIM
from elbozoo.models.contract.entry import Entry, HasExpectedLogJoint
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.sequences import steps_mask
from elbozoo.models.contract.sites import (
    MAX_PLATE_NESTING,
    OBSERVED_SITE,
    is_local_node,
    log_density,
    stochastic_nodes,
)

Gradient = Literal["auto", "reparameterised", "score", "doubly-reparameterised"]
Program = Callable[[Batch], Any]
Node = dict[str, Any]

RISING_SHARE = 0.5  # of a cycle, after which its β stays at the top (Fu et al. 2019, R)


class OwnELBO(ELBO):
    """A loss that is one differentiable number, in the form of Pyro's.

    Attributes
    ----------
    beta : float or Tensor ()
        Weight of the divergence, which changes along a fit: set before each step to what :meth:`beta_at` says.
    """

    beta: float | Tensor = 1.0

    def beta_at(self, step: int) -> float:
        """Return β after so many steps."""
        return 1.0

    def _get_trace(self, *args: Any) -> Any:
        raise NotImplementedError("it takes its traces itself, if any")

    def loss(self, model: Program, guide: Guide, batch: Batch) -> float:
        """Minus the objective, nats over the whole data set; leaves no gradients."""
        return float(self.differentiable_loss(model, guide, batch).detach())

    def loss_and_grads(self, model: Program, guide: Guide, batch: Batch) -> float:
        """Minus the objective, nats over the whole data set; adds to the gradients."""
        loss = self.differentiable_loss(model, guide, batch)
        loss.backward()
        return float(loss.detach())

    def differentiable_loss(self, model: Any, guide: Any, batch: Batch) -> Tensor:
        """Minus the objective, nats over the whole data set, with the gradient that descends it."""
        raise NotImplementedError


class ExpectedELBO(OwnELBO):
    """The ELBO of a factorised q over paths of states, with its expectation in closed form."""

    def differentiable_loss(self, model: Entry, guide: SequenceGuide, batch: Batch) -> Tensor:
        """Minus the ELBO, nats over the whole data set."""
        return -expected_elbo(model, guide, batch).sum() * (batch.total / len(batch.x))


class EvidenceELBO(OwnELBO):
    """The bound of the exact posterior, which is log p(x) for every draw and every number of them."""

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


# ---- draws and what they weigh ---------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """S draws of the latents of a batch, with the model and the guide traced on them.

    Attributes
    ----------
    model, guide : Trace
        Log probabilities computed, without the plates' own sites.
    batch : Batch
        The rows.
    particles : int
        S.
    """

    model: poutine.Trace
    guide: poutine.Trace
    batch: Batch
    particles: int

    @property
    def is_one_datum(self) -> bool:
        """Whether a latent belongs to the whole data set, so that no row has a bound of its own."""
        return any(not is_local_node(node) for _, node in stochastic_nodes(self.guide))

    @property
    def scale(self) -> float:
        """Number of data that each datum of the batch stands for."""
        return 1.0 if self.is_one_datum else self.batch.total / len(self.batch.x)

    def log_joint(self) -> Tensor:
        """Log p(x, z) of each draw and datum, (S, n), nats."""
        return self.per_datum((node, log_density(node)) for node in samples(self.model))

    def log_likelihood(self) -> Tensor:
        """Log p(x given z) of each draw and datum, (S, n), nats."""
        return self.per_datum((node, log_density(node)) for node in samples(self.model) if node["is_observed"])

    def log_guide(self, keep: Callable[[Node], bool] = lambda node: True) -> Tensor:
        """Log q(z) of each draw and datum, (S, n), nats, over the sites that ``keep`` keeps."""
        return self.per_datum((node, log_density(node)) for node in samples(self.guide) if keep(node))

    def per_datum(self, terms: Iterable[tuple[Node, Tensor]]) -> Tensor:
        """Sum terms of sites into (S, n): n = B rows, or 1 where all rows are one datum, scaled to the data set."""
        rows = len(self.batch.x)
        local, common = self.batch.x.new_zeros(self.particles, rows), self.batch.x.new_zeros(self.particles, 1)
        for node, term in terms:
            if is_local_node(node):
                local = local + term
            else:
                common = common + term
        if self.is_one_datum:
            return common + local.sum(-1, keepdim=True) * (self.batch.total / rows)
        # What stands outside the plate without a latent there, such as a prior on θ, is shared among the data.
        return local + common / self.batch.total


def samples(trace: poutine.Trace) -> Iterator[Node]:
    """Yield the sample nodes of a pruned trace."""
    return (node for node in trace.nodes.values() if node["type"] == "sample")


def draw(model: Program, guide: Guide, batch: Batch, particles: int, *, through: bool = True) -> Draws:
    """Draw latents from the guide and run both programs on them.

    Parameters
    ----------
    through : bool
        Whether gradients pass through the draws to the guide, where its distributions allow it.
    """
    if through:
        return _paired(model, _guide_trace(guide, batch, particles), batch, particles)
    with torch.no_grad():
        values = _guide_trace(guide, batch, particles)
    return replayed(model, guide, batch, particles, cut(values))


def replayed(model: Program, guide: Guide, batch: Batch, particles: int, values: poutine.Trace) -> Draws:
    """Run both programs on the latents of the trace ``values``, with gradients."""
    return _paired(model, _guide_trace(guide, batch, particles, values), batch, particles)


def cut(values: poutine.Trace) -> poutine.Trace:
    """Return the trace with its latents cut off from how they were drawn.

    As copies: a flow remembers, by identity, what its last draw came from, and would answer for it without a gradient.
    """
    result = values.copy()
    for name, node in stochastic_nodes(values):
        result.nodes[name] = {**node, "value": node["value"].detach().clone()}
    return result


def _guide_trace(guide: Guide, batch: Batch, particles: int, values: poutine.Trace | None = None) -> poutine.Trace:
    known = poutine.Trace() if values is None else values
    return poutine.trace(poutine.replay(_repeated(guide, particles), trace=known)).get_trace(batch)


def _paired(model: Program, guide_trace: poutine.Trace, batch: Batch, particles: int) -> Draws:
    model_trace = poutine.trace(poutine.replay(_repeated(model, particles), trace=guide_trace)).get_trace(batch)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, MAX_PLATE_NESTING + 1)
    model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    return Draws(model_trace, guide_trace, batch, particles)


def _repeated(program: Program, particles: int) -> Program:
    # The plate goes inside: a site that a replay outside it has answered is still given the plate's shape.
    return pyro.plate("particles", particles, dim=PARTICLE_DIM)(program)


# ---- bounds by draws -------------------------------------------------------------------------------------------------


class DrawnELBO(OwnELBO):
    """The ELBO by S draws, with the gradient of one's choice.

    A draw that is a function of the guide's parameters and of noise lets the gradient pass through it
    (reparameterised; Kingma & Welling 2014). Any draw lets log q(z) be raised by what the draw was worth (score
    function, or REINFORCE; Williams 1992). There the worth is measured from the mean of the other draws, which leaves
    the expectation as it is (Kool et al. 2019); a single draw has no other to be measured from.

    Parameters
    ----------
    particles : int
        S, the number of draws of each datum.
    gradient : str
        ``auto`` takes the score function for those latents alone whose draws carry no gradient.
    """

    def __init__(self, particles: int, gradient: Gradient = "auto") -> None:
        super().__init__(num_particles=particles, max_plate_nesting=MAX_PLATE_NESTING)
        self.gradient = gradient

    def differentiable_loss(self, model: Program, guide: Guide, batch: Batch) -> Tensor:
        """Minus the objective, nats over the whole data set."""
        draws = draw(model, guide, batch, self.num_particles, through=self.gradient != "score")
        if self.gradient == "reparameterised":
            _with_gradient(draws.guide)
        worth, scored = self.worth(draws), self.scored(draws)
        objective = self.together(worth)
        if scored.requires_grad:
            objective = objective + (self.credit(worth.detach()) * (scored - scored.detach())).sum(0)
        return -draws.scale * objective.sum()

    def worth(self, draws: Draws) -> Tensor:
        """What each draw is worth to its datum, (S, n), nats: log p(x, z) - log q(z)."""
        return draws.log_joint() - self.surprise(draws)

    def scored(self, draws: Draws) -> Tensor:
        """Log q(z), (S, n), nats, of the latents that take the score function."""
        return draws.log_guide(lambda node: self.gradient == "score" or not node["fn"].has_rsample)

    def surprise(self, draws: Draws) -> Tensor:
        """Log q(z), (S, n), nats, without the gradient of the scored latents' part, which is zero in expectation."""
        scored = self.scored(draws)
        return draws.log_guide() - (scored - scored.detach())

    def together(self, worth: Tensor) -> Tensor:
        """Objective (n,) of draws that are worth so much (S, n): their mean."""
        return worth.mean(0)

    def credit(self, worth: Tensor) -> Tensor:
        """How much each draw (S, n) raises the objective over what the other draws let expect."""
        count = len(worth)
        others = (worth.sum(0) - worth) / (count - 1) if count > 1 else torch.zeros_like(worth)
        return (worth - others) / count


class ImportanceWeightedELBO(DrawnELBO):
    """The importance-weighted bound E[log 1/K Σ p(x, z_k) / q(z_k)] of each datum (Burda et al. 2016, equation 8).

    Its reparameterised gradient for the guide fades into noise as K grows (Rainforth et al. 2018); the doubly
    reparameterised one has the same expectation and does not (Tucker et al. 2019; at K = 1 the ELBO's
    gradient without the score of Roeder et al. 2017). The score function takes as baseline the bound with
    a draw's weight replaced by the geometric mean of the others' (VIMCO; Mnih & Rezende 2016).
    """

    def differentiable_loss(self, model: Program, guide: Guide, batch: Batch) -> Tensor:
        """Minus the objective, nats over the whole data set."""
        if self.gradient == "doubly-reparameterised":
            return self._doubly_reparameterised(model, guide, batch)
        return super().differentiable_loss(model, guide, batch)

    def worth(self, draws: Draws) -> Tensor:
        """Log weight of each draw, (S, n), nats."""
        # Weighed by their shares, the gradients of log q(z) do not vanish in expectation.
        return draws.log_joint() - draws.log_guide()

    def together(self, worth: Tensor) -> Tensor:
        """Objective (n,) of draws with log weights (S, n): the log of their mean weight."""
        return torch.logsumexp(worth, 0) - math.log(len(worth))

    def credit(self, worth: Tensor) -> Tensor:
        """How much each draw (S, n) raises the objective over what the other draws let expect."""
        count, bound = len(worth), self.together(worth)
        if count == 1:
            return bound[None]
        others = (worth.sum(0) - worth) / (count - 1)
        own = torch.eye(count, dtype=torch.bool, device=worth.device)[..., None]
        without = torch.where(own, others, worth)  # (k, S, n): the weights with that of draw k replaced
        return bound - (torch.logsumexp(without, 1) - math.log(count))

    def _doubly_reparameterised(self, model: Program, guide: Guide, batch: Batch) -> Tensor:
        values = _guide_trace(guide, batch, self.num_particles)
        # Cut where they were drawn, so that what the guide's parameters do to log q(z) at a fixed z stays out.
        leaves = cut(values)
        at = {name: node["value"].requires_grad_() for name, node in _with_gradient(leaves)}
        draws = replayed(model, guide, batch, self.num_particles, leaves)
        log_joint = draws.log_joint()
        log_weight = log_joint - draws.log_guide()
        share = log_weight.detach().softmax(0)
        slopes = torch.autograd.grad(
            (share.square() * log_weight).sum(), list(at.values()), retain_graph=True, allow_unused=True
        )
        terms = [(share * log_joint).sum()]
        terms += [
            (slope * values.nodes[name]["value"]).sum()
            for name, slope in zip(at, slopes, strict=True)
            if slope is not None
        ]
        gradient = torch.stack(terms).sum()
        return -draws.scale * (self.together(log_weight).sum().detach() + gradient - gradient.detach())


class ReweightedWakeSleepELBO(OwnELBO):
    """Reweighted wake-sleep: each draw counts by its weight among the K of its datum, and no gradient passes it.

    The model climbs the importance-weighted bound (wake-θ). The guide lowers KL(p(z given x) ‖ q), the other way round
    from the ELBO: where the data are, by the weighted draws (wake-φ), or on data dreamt by the model (sleep-φ;
    Bornschein & Bengio 2015; Le et al. 2019). So latents of any kind have a gradient without the score
    function's noise. Pyro's own weighs a whole minibatch by one number, and says that it does not support minibatches.

    Parameters
    ----------
    particles : int
        K, at least 2: a single draw always has the weight 1.
    sleep : float
        Share of sleep-φ in the guide's gradient, the rest is wake-φ.
    """

    def __init__(self, particles: int, sleep: float = 0.0) -> None:
        super().__init__(num_particles=particles, max_plate_nesting=MAX_PLATE_NESTING)
        self.sleep = sleep

    def differentiable_loss(self, model: Program, guide: Guide, batch: Batch) -> Tensor:
        """Minus the importance-weighted bound, nats over the whole data set."""
        draws = draw(model, guide, batch, self.num_particles, through=False)
        log_guide = draws.log_guide()
        log_weight = draws.log_joint() - log_guide.detach()
        bound = torch.logsumexp(log_weight, 0) - math.log(self.num_particles)
        lesson = (1 - self.sleep) * (log_weight.detach().softmax(0) * log_guide).sum(0)
        if self.sleep > 0:
            lesson = lesson + self.sleep * dreamt_log_guide(model, guide, batch)
        return -draws.scale * (bound + lesson - lesson.detach()).sum()


def dreamt_log_guide(model: Any, guide: Guide, batch: Batch) -> Tensor:
    """Log q(z given x) of a dream (x, z) of the model for each row, (B,), nats; no gradient passes the dream."""
    with torch.no_grad():
        dream = poutine.trace(poutine.uncondition(model)).get_trace(batch)
        dreamt = batch._replace(x=model.complete(batch.x, dream.nodes[OBSERVED_SITE]["value"]))
    guide_trace = prune_subsample_sites(poutine.trace(poutine.replay(guide, trace=dream)).get_trace(dreamt))
    guide_trace.compute_log_prob()
    return torch.stack([log_density(node).expand(len(batch.x)) for node in samples(guide_trace)]).sum(0)


def _with_gradient(trace: poutine.Trace) -> list[tuple[str, Node]]:
    """Return the latent sites of a guide's trace, all of which must give draws with a gradient."""
    for name, node in stochastic_nodes(trace):
        if not node["fn"].has_rsample:
            raise InvalidInput(
                f"option gradient: the latent {name!r} is drawn from {type(node['fn']).__name__}, whose draws carry "
                "no gradient; set gradient=score or gradient=auto"
            )
    return list(stochastic_nodes(trace))


class ELBOAndLabels(OwnELBO):
    """The enumerated ELBO, and the log probability that the guide's classifier gives to the labels that are known.

    The ELBO asks nothing of q(y given x) where the class is known, so that a classifier learns from the other rows
    alone; this is equation 9 of Kingma et al. (2014). Their α counts the mean over the rows with labels, and so is
    ``weight`` times the number of those. No log probability exceeds zero, and the objective never the ELBO.

    Parameters
    ----------
    particles : int
        Draws of each datum of what is not enumerated.
    weight : float
        How many times the label of a row counts.
    """

    def __init__(self, particles: int, weight: float) -> None:
        super().__init__(num_particles=particles, max_plate_nesting=MAX_PLATE_NESTING)
        self.weight = weight
        self.elbo = TraceEnum_ELBO(
            num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=MAX_PLATE_NESTING
        )

    def differentiable_loss(self, model: Program, guide: Any, batch: Batch) -> Tensor:
        """Minus the objective, nats over the whole data set."""
        loss: Tensor = self.elbo.differentiable_loss(model, guide, batch)
        labels: Tensor = guide.log_probability_of_labels(batch).sum()
        return loss - self.weight * labels * (batch.total / len(batch.x))


# ---- the weight of the divergence ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighting:
    """β along a fit.

    Attributes
    ----------
    weight : float
        β at the end.
    schedule : str
        ``constant``; ``annealed``, a straight rise from 0 over ``steps`` (Bowman et al. 2016); ``cyclical``, ``cycles``
        such rises in ``steps``, each over the first half of its cycle (Fu et al. 2019).
    steps : int
        Steps until β stays at ``weight``.
    cycles : int
        Number of rises of ``cyclical``.
    """

    weight: float = 1.0
    schedule: Literal["constant", "annealed", "cyclical"] = "constant"
    steps: int = 2000
    cycles: int = 4

    @property
    def moving_steps(self) -> int:
        """Number of steps in which β changes."""
        return 0 if self.schedule == "constant" else self.steps

    def at(self, step: int) -> float:
        """β after so many steps."""
        if step >= self.moving_steps:
            return self.weight
        if self.schedule == "annealed":
            return self.weight * step / self.steps
        cycle = self.steps / self.cycles
        return self.weight * min(1.0, (step % cycle) / cycle / RISING_SHARE)


CONSTANT = Weighting()


class BetaELBO(DrawnELBO):
    """E_q[log p(x given z)] - β KL(q ‖ prior) (Higgins et al. 2017), which below β = 1 bounds nothing.

    With free bits a latent dimension whose KL, averaged over the batch, is below λ nats counts as λ and has no
    gradient, so that the objective gains nothing from emptying it (Kingma et al. 2016, appendix C.8). A site whose
    q or prior does not fall apart into dimensions counts as one.

    Parameters
    ----------
    particles, gradient
        See :class:`DrawnELBO`.
    weighting : Weighting
        β along the fit.
    kl : str
        ``sampled`` or ``analytic``.
    free_bits : float
        λ, nats.
    """

    def __init__(
        self,
        particles: int,
        gradient: Gradient = "auto",
        weighting: Weighting = CONSTANT,
        kl: Literal["sampled", "analytic"] = "sampled",
        free_bits: float = 0.0,
    ) -> None:
        super().__init__(particles, gradient)
        self.weighting, self.kl, self.free_bits = weighting, kl, free_bits
        self.beta = weighting.at(0)

    def beta_at(self, step: int) -> float:
        """Return β after so many steps."""
        return self.weighting.at(step)

    def worth(self, draws: Draws) -> Tensor:
        """What each draw is worth to its datum, (S, n), nats."""
        return draws.log_likelihood() - self.beta * self.divergence(draws)

    def divergence(self, draws: Draws) -> Tensor:
        """KL(q ‖ prior) of each draw and datum, (S, n), nats, with its expectation taken or not."""
        if self.kl == "sampled" and self.free_bits == 0:
            prior = (node for _, node in stochastic_nodes(draws.model))
            return self.surprise(draws) - draws.per_datum((node, log_density(node)) for node in prior)
        if self.kl == "analytic":
            _refuse_another_order(draws)
        return draws.per_datum(
            (node, self._of_site(name, draws.guide.nodes[name], node)) for name, node in stochastic_nodes(draws.model)
        )

    def _of_site(self, name: str, guide: Node, model: Node) -> Tensor:
        by_dimension = (analytic_kl if self.kl == "analytic" else sampled_kl)(name, guide, model)
        counts = by_dimension.detach().flatten(0, -2).mean(0) > self.free_bits
        floored = torch.where(counts, by_dimension, torch.full_like(by_dimension, self.free_bits))
        total: Tensor = scale_and_mask((floored if self.free_bits > 0 else by_dimension).sum(-1), mask=guide["mask"])
        return total


def analytic_kl(name: str, guide: Node, model: Node) -> Tensor:
    """KL(q ‖ prior) of a site in closed form, (..., J), nats, for each of its J dimensions that have one.

    Raises
    ------
    InvalidInput
        Where no closed form is known.
    """
    q, prior = as_columns(guide["fn"]), model["fn"]
    try:
        if _fall_apart(q, prior):
            apart: Tensor = kl_divergence(q.base_dist, prior.base_dist)  # type: ignore[attr-defined]
            return apart.flatten(len(q.batch_shape))
        return kl_divergence(q, as_multivariate(prior))[..., None]
    except NotImplementedError:
        raise InvalidInput(
            f"option kl: found analytic, and the divergence of the latent {name!r}, from {type(q).__name__} to "
            f"{type(prior).__name__}, has no closed form; set kl=sampled"
        ) from None


def sampled_kl(name: str, guide: Node, model: Node) -> Tensor:
    """Log q(z) - log p(z) of a site, (..., J), nats, for each of its J dimensions."""
    q, prior, value = as_columns(guide["fn"]), model["fn"], guide["value"]
    if _fall_apart(q, prior):
        apart: Tensor = q.base_dist.log_prob(value) - prior.base_dist.log_prob(value)  # type: ignore[attr-defined]
        return apart.flatten(len(q.batch_shape))
    # By the traces' own figures, for distributions that know the density of their draws alone.
    difference: Tensor = guide["unscaled_log_prob"] - model["unscaled_log_prob"]
    return difference[..., None]


def as_columns(q: Distribution) -> Distribution:
    """Return independent normals over a reshaped vector as what they are; any other q as it is."""
    if not isinstance(q, Reshaped) or not isinstance(q.base_dist, Independent):
        return q
    normals: Distribution = dist.Normal(q.mean, q.variance.sqrt()).to_event(len(q.event_shape))
    return normals


def as_multivariate(prior: Distribution) -> Distribution:
    """Return a vector of independent normals as a multivariate normal, whose divergences are known; others as is."""
    base = prior.base_dist if isinstance(prior, Independent) else None
    if not isinstance(base, torch.distributions.Normal) or len(prior.event_shape) != 1:
        return prior
    return torch.distributions.MultivariateNormal(base.loc, scale_tril=torch.diag_embed(base.scale))


def _fall_apart(q: Distribution, prior: Distribution) -> bool:
    """Whether both are products over the numbers of one draw."""
    return all(isinstance(p, Independent) and not p.base_dist.event_shape for p in (q, prior))


def _refuse_another_order(draws: Draws) -> None:
    """Refuse a guide that draws in another order than the model, whose expectations need not be separate ones."""
    orders = [[name for name, _ in stochastic_nodes(trace)] for trace in (draws.model, draws.guide)]
    if orders[0] != orders[1]:
        raise InvalidInput(
            f"option kl: found analytic with a guide that draws {orders[1]} where the model draws {orders[0]}, "
            "expected one order, in which the divergence is a sum over sites; set kl=sampled"
        )
