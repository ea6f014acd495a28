"""Importance weights p(x, z) / q(z given x): every estimate of a bound is a summary of them.

Densities are masked and not scaled: a mask says which elements there are, while the batch is the whole data set and a
β of the objective's is no part of the ELBO.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from elbozoo.guides.base import Guide
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import PARTICLE_DIM, collapsed
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import is_local_node, log_density, stochastic_nodes

CHUNK_ELEMENTS = 2**23


class Weights(NamedTuple):
    """Log weights of S draws of z, for each of B rows, or (B = 1) for all data where the latent is global.

    A finite latent is not drawn but enumerated: E counts its values, and is 1 otherwise.

    Attributes
    ----------
    log_weight : Tensor (E, S, B)
        log p(x, z) - log q(z given x), nats.
    log_probability : Tensor (E, S, B)
        Log probability under q of the enumerated value; zero where E is 1.
    common : Tensor (S,) or None
        Log weight of the global latents where there are global and local ones: then no row has a weight of its
        own, and all rows count as one datum.
    """

    log_weight: Tensor
    log_probability: Tensor
    common: Tensor | None = None

    @property
    def is_enumerated(self) -> bool:
        """Whether the latent was enumerated, so that expectations are exact."""
        return self.log_weight.shape[0] > 1

    def elbo(self) -> Tensor:
        """ELBO of each draw and row, (S, B), nats: expectation over the enumerated values."""
        probability = self.log_probability.exp()
        # 0 log 0 = 0: a value without probability adds nothing, whatever its weight.
        terms = torch.where(probability > 0, probability * self.log_weight, torch.zeros_like(probability))
        return self._together(terms.sum(0))

    def marginal(self) -> Tensor:
        """Log weight of each draw and row with the enumerated values summed out, (S, B), nats."""
        return self._together(torch.logsumexp(self.log_weight + self.log_probability, 0))

    def _together(self, rows: Tensor) -> Tensor:
        return rows if self.common is None else (self.common + rows.sum(-1))[:, None]


def importance_weights(entry: Entry, guide: Guide, batch: Batch, particles: int, seed: int) -> Weights:
    """Draw ``particles`` latents from the guide and weigh them against the model.

    Rows, and draws of a row that is a long sequence, are treated in chunks that bound the memory; the draws depend
    on ``seed`` alone.
    """
    with isolated(seed), torch.no_grad():
        particles = 1 if guide.is_discrete else particles
        if not guide.is_local:
            return _global_weights(entry, guide, batch, particles)
        elements = entry.elements(batch.x)
        at_once = max(1, min(particles, CHUNK_ELEMENTS // elements))
        rows = max(1, CHUNK_ELEMENTS // (at_once * elements))
        parts = [
            [
                _local_weights(entry, guide, batch.rows(i, i + rows), min(at_once, particles - drawn))
                for drawn in range(0, particles, at_once)
            ]
            for i in range(0, len(batch.x), rows)
        ]
    columns = [[torch.cat(tensors, 1) for tensors in zip(*(p[:2] for p in draws), strict=True)] for draws in parts]
    return Weights(*(torch.cat(tensors, -1) for tensors in zip(*columns, strict=True)))


def log_joint(entry: Entry, batch: Batch, values: Mapping[str, Tensor], summed_out: Collection[str] = ()) -> Tensor:
    """Log p(x, z) of each particle and row, (S, B), nats, for local latents given by site.

    Parameters
    ----------
    values : mapping of Tensor (S, B, ...)
        Value of each latent site that is not summed out.
    summed_out : collection of str
        Finite local sites to sum over.
    """
    particles = next(iter(values.values())).shape[0]
    program = collapsed(poutine.condition(entry, data=dict(values)), summed_out)
    with pyro.plate("particles", particles, dim=PARTICLE_DIM):
        trace = poutine.trace(program).get_trace(batch)
    trace.compute_log_prob()
    terms = [log_density(node) for node in trace.nodes.values() if _is_weighed(node)]
    return sum(terms, batch.x.new_zeros(())).expand(particles, len(batch.x))


def _local_weights(entry: Entry, guide: Guide, batch: Batch, particles: int) -> Weights:
    guide_trace, model_trace = _traces(entry, guide, batch, particles)
    nothing = batch.x.new_zeros(())
    log_model = sum((log_density(node) for node in model_trace.nodes.values() if _is_weighed(node)), nothing)
    log_guide = sum((log_density(node) for _, node in stochastic_nodes(guide_trace)), nothing)
    log_weight = log_model - log_guide
    shape = log_weight.shape[-2:]
    log_weight = log_weight.reshape(-1, *shape)
    log_probability = _log_probability(guide_trace, log_weight).reshape(-1, *shape)
    return Weights(log_weight, log_probability)


def _global_weights(entry: Entry, guide: Guide, batch: Batch, particles: int) -> Weights:
    guide_trace, model_trace = _traces(entry, guide, batch, particles)
    common = batch.x.new_zeros(particles)
    local = batch.x.new_zeros(1, particles, len(batch.x))
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        for node in trace.nodes.values():
            if _is_weighed(node) and is_local_node(node):
                local = local + sign * log_density(node)
            elif _is_weighed(node):
                common = common + sign * log_density(node).expand(particles, 1)[:, 0]
    local = local.reshape(-1, *local.shape[-2:])
    log_probability = _log_probability(guide_trace, local).reshape(local.shape)
    return Weights(local, log_probability, common)


def _log_probability(guide_trace: poutine.Trace, like: Tensor) -> Tensor:
    """Log probability under q of the values that were enumerated, nats."""
    # Not masked: a mask takes a site out of the densities and not out of q, which draws it all the same.
    terms = [n["unscaled_log_prob"] for _, n in stochastic_nodes(guide_trace) if "_enumerate_dim" in n["infer"]]
    return sum(terms, torch.zeros_like(like))


def _traces(entry: Entry, guide: Guide, batch: Batch, particles: int) -> tuple[poutine.Trace, poutine.Trace]:
    enumerating = poutine.enum(guide, first_available_dim=PARTICLE_DIM - 1)
    with pyro.plate("particles", particles, dim=PARTICLE_DIM):
        guide_trace = poutine.trace(enumerating).get_trace(batch)
        program = collapsed(entry, guide.summed_out)
        model_trace = poutine.trace(poutine.replay(program, trace=guide_trace)).get_trace(batch)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return guide_trace, model_trace


def _is_weighed(node: dict[str, object]) -> bool:
    return "unscaled_log_prob" in node


def iwae(weights: Weights, particles: int) -> Tensor:
    """Importance-weighted bound with ``particles`` draws, per row, (B,), nats (Burda et al. 2016, equation 8).

    The S draws are cut into S // particles independent bounds, which are averaged.
    """
    marginal = weights.marginal()
    blocks = marginal[: len(marginal) // particles * particles].reshape(-1, particles, marginal.shape[-1])
    return (torch.logsumexp(blocks, 1) - math.log(particles)).mean(0)
