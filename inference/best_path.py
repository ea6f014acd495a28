"""The best member of a family that is independent across time, for each sequence, at fixed θ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical

from elbozoo.guides.base import GuideOptions
from elbozoo.guides.sequences import SequenceGuide
from elbozoo.guides.sources import Free
from elbozoo.inference.best_member import BestMember
from elbozoo.inference.losses import expected_elbo
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasExpectedLogJoint, HasPosterior
from elbozoo.models.contract.isolation import isolated

SWEEPS = 1000
SETTLED = 1e-10  # nats per sequence


def best_path_member(entry: Entry, guide: SequenceGuide, x: Tensor, options: GuideOptions) -> BestMember | None:
    """Return the free guide of ``guide``'s family with the largest ELBO for the sequences ``x`` (S, T, 1 + D).

    In closed form where the posterior is normal. For states it is a maximum of coordinate ascent, the better one
    of those from the posterior's marginals and from ``guide`` itself, so that it bounds the best one from below.

    Returns None where neither applies.
    """
    with isolated(0):
        best = SequenceGuide(f"free-{guide.family}", guide.family, "free", entry.latent_sites(x), x, options)
    if isinstance(entry, HasExpectedLogJoint) and isinstance(entry, HasPosterior):
        with torch.no_grad():
            starts = [entry.posterior(x).probs, guide.steps(Batch.full(x)).probs]  # type: ignore[attr-defined]
        ends = [coordinate_ascent(entry, x, start) for start in starts]
        return _better(entry, best, x, ends)
    if not isinstance(entry, HasPosterior):
        return None
    with torch.no_grad():
        closest = best.step_family.closest(entry.posterior(x).factorised())
    return None if closest is None else BestMember(_with_values(best, closest), True, "closed form")


def coordinate_ascent(entry: HasExpectedLogJoint, x: Tensor, probs: Tensor) -> tuple[Tensor, bool]:
    """Raise the ELBO of independent states from ``probs`` (S, T, K): even steps at once, then odd ones.

    Steps of one parity do not meet in the log joint of a chain, so that each half sweep is an exact coordinate
    step: q_t is proportional to exp E[log p(x, z)], and the expectation is the derivative by q_t, since the log
    joint is linear in each. Returns the probabilities and whether the ascent has settled.
    """
    value = torch.full((len(x),), -torch.inf, dtype=x.dtype)
    for _ in range(SWEEPS):
        for parity in (0, 1):
            point = probs.detach().requires_grad_()
            with torch.enable_grad():
                expected = entry.expected_log_joint(x, point)
                (slope,) = torch.autograd.grad(expected.sum(), point)
            probs = probs.clone()
            probs[:, parity::2] = slope[:, parity::2].softmax(-1)
        with torch.no_grad():
            new = entry.expected_log_joint(x, probs) + Categorical(probs=probs).entropy().sum(-1)
        if bool((new - value < SETTLED * (1 + value.abs())).all()):
            return probs, True
        value = new
    return probs, False


def _better(entry: Entry, guide: SequenceGuide, x: Tensor, ends: list[tuple[Tensor, bool]]) -> BestMember:
    batch = Batch.full(x)
    logits = [probs.clamp(min=torch.finfo(probs.dtype).tiny).log() for probs, _ in ends]
    with torch.no_grad():
        values = [expected_elbo(entry, _with_values(guide, member), batch) for member in logits]
    is_first = (values[0] >= values[1])[:, None, None]
    return BestMember(
        _with_values(guide, torch.where(is_first, logits[0], logits[1])),
        all(converged for _, converged in ends),
        "coordinate ascent",
    )


def _with_values(guide: SequenceGuide, values: Tensor) -> SequenceGuide:
    assert isinstance(guide.parameters_of, Free)
    with torch.no_grad():
        guide.parameters_of.values.copy_(values)
    return guide
