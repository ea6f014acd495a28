"""Importance weights p(x, z) / q(z given x): every estimate of a bound is a summary of them.

Densities are masked and not scaled: a mask says which elements there are, while the batch is the whole data set and a
β of the objective's is no part of the ELBO.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

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
MODEL_ELEMENTS = 2**20  # that a program holds at once: what fits into the cache takes half the time of what does not


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
    on ``seed`` alone. The model, which holds more numbers for a draw than q does, meets fewer of them at a time.
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
    guide_trace = _guide_trace(guide, batch, particles)
    model_nodes = _model_nodes(entry, guide, guide_trace, batch, particles)
    log_model = torch.cat([_total(nodes, batch.x.new_zeros(draws, 1)) for draws, nodes in model_nodes], -2)
    log_weight = log_model - _total([node for _, node in stochastic_nodes(guide_trace)], batch.x.new_zeros(()))
    shape = log_weight.shape[-2:]
    log_weight = log_weight.reshape(-1, *shape)
    log_probability = _log_probability(guide_trace, log_weight).reshape(-1, *shape)
    return Weights(log_weight, log_probability)


def _global_weights(entry: Entry, guide: Guide, batch: Batch, particles: int) -> Weights:
    guide_trace = _guide_trace(guide, batch, particles)
    of_guide = [node for node in guide_trace.nodes.values() if _is_weighed(node)]
    nothing = batch.x.new_zeros(particles, len(batch.x))
    local, common = -_total(filter(is_local_node, of_guide), nothing), -_common(of_guide, nothing[:, :1])
    locals_of_model, commons_of_model = [], []
    for draws, nodes in _model_nodes(entry, guide, guide_trace, batch, particles):
        locals_of_model.append(_total(filter(is_local_node, nodes), nothing[:draws]))
        commons_of_model.append(_common(nodes, nothing[:draws, :1]))
    local, common = local + torch.cat(locals_of_model, -2), common + torch.cat(commons_of_model)
    local = local.reshape(-1, *local.shape[-2:])
    log_probability = _log_probability(guide_trace, local).reshape(local.shape)
    return Weights(local, log_probability, common[:, 0])


def _total(nodes: Iterable[dict[str, Any]], nothing: Tensor) -> Tensor:
    """Sum of the log densities of traced nodes, nats; of the shape of ``nothing`` at least."""
    return sum((log_density(node) for node in nodes), nothing)


def _common(nodes: Iterable[dict[str, Any]], nothing: Tensor) -> Tensor:
    """Sum of the log densities of the nodes outside the data plate, (S, 1), nats."""
    return _total((node for node in nodes if not is_local_node(node)), nothing)


def _log_probability(guide_trace: poutine.Trace, like: Tensor) -> Tensor:
    """Log probability under q of the values that were enumerated, nats."""
    # Not masked: a mask takes a site out of the densities and not out of q, which draws it all the same.
    terms = [n["unscaled_log_prob"] for _, n in stochastic_nodes(guide_trace) if "_enumerate_dim" in n["infer"]]
    return sum(terms, torch.zeros_like(like))


def _guide_trace(guide: Guide, batch: Batch, particles: int) -> poutine.Trace:
    with pyro.plate("particles", particles, dim=PARTICLE_DIM):
        trace = poutine.trace(poutine.enum(guide, first_available_dim=PARTICLE_DIM - 1)).get_trace(batch)
    trace.compute_log_prob()
    return trace


def _model_nodes(
    entry: Entry, guide: Guide, guide_trace: poutine.Trace, batch: Batch, particles: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield numbers of draws, some after the others, and the nodes of the model at them, with their densities."""
    program = collapsed(entry, guide.summed_out)
    at_once = max(1, MODEL_ELEMENTS // (len(batch.x) * entry.elements(batch.x)))
    for start in range(0, particles, at_once):
        draws = min(at_once, particles - start)
        drawn = _some_draws(guide_trace, particles, slice(start, start + draws))
        with pyro.plate("particles", draws, dim=PARTICLE_DIM):
            trace = poutine.trace(poutine.replay(program, trace=drawn)).get_trace(batch)
        trace.compute_log_prob()
        yield draws, [node for node in trace.nodes.values() if _is_weighed(node)]


def _some_draws(guide_trace: poutine.Trace, particles: int, draws: slice) -> poutine.Trace:
    """Return the trace of those draws alone, without the plates, whose sizes were those of all."""
    some = poutine.Trace()
    for name, node in stochastic_nodes(guide_trace):
        value, along = node["value"], PARTICLE_DIM - node["fn"].event_dim
        if value.ndim >= -along and value.shape[along] == particles:
            value = value.movedim(along, 0)[draws].movedim(0, along)
        some.add_node(name, **{**node, "value": value})
    return some


def _is_weighed(node: dict[str, object]) -> bool:
    return "unscaled_log_prob" in node


def iwae(weights: Weights, particles: int) -> Tensor:
    """Importance-weighted bound with ``particles`` draws, per row, (B,), nats (Burda et al. 2016, equation 8).

    The S draws are cut into S // particles independent bounds, which are averaged.
    """
    marginal = weights.marginal()
    blocks = marginal[: len(marginal) // particles * particles].reshape(-1, particles, marginal.shape[-1])
    return (torch.logsumexp(blocks, 1) - math.log(particles)).mean(0)
