"""Programs with their finite local latents summed out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.sites import DATA_PLATE, MAX_PLATE_NESTING, is_local_node, log_density

PARTICLE_DIM = -1 - MAX_PLATE_NESTING
EVIDENCE_SITE = "x_evidence"


def collapsed(program: Callable[[Batch], Any], summed_out: Collection[str]) -> Callable[[Batch], Any]:
    """Return ``program`` without the finite local sites ``summed_out``.

    Instead of them and of the observed site it has the factor ``"x_evidence"``, log p(x_n given the global
    latents) in nats, inside the data plate. So whatever draws from q or differentiates log p(x, z) need not know
    of enumeration. Without anything to sum out, the program comes back as it is.
    """
    if not summed_out:
        return program

    def marginal_program(batch: Batch) -> Tensor:
        enumerated = poutine.enum(config_enumerate(program), first_available_dim=PARTICLE_DIM - 1)
        # Global sites are shown to the handlers outside; those of a row are only summed over.
        with poutine.block(hide_fn=is_local_message):
            trace = poutine.trace(enumerated).get_trace(batch)
        trace.compute_log_prob()
        weighed = [node for node in trace.nodes.values() if "unscaled_log_prob" in node and is_local_node(node)]
        terms = [_share(node) for node in weighed]
        joint = torch.stack(torch.broadcast_tensors(*terms)).sum(0)
        # Enumerated values stand in front; the dimension of particles is 1 where there are none.
        evidence = torch.logsumexp(joint.reshape(-1, *joint.shape[PARTICLE_DIM:]), 0).squeeze(PARTICLE_DIM)
        with pyro.plate(DATA_PLATE, batch.total, subsample=batch.index):
            pyro.factor(EVIDENCE_SITE, evidence)
        return evidence

    return marginal_program


def _share(node: dict[str, Any]) -> Tensor:
    """Log probability of a node as its part of the sum, nats."""
    # A mask takes an observation out of the sum. An enumerated value keeps its probability: without it each of the
    # values would count as one, and the sum be as many times too large.
    value: Tensor = node["unscaled_log_prob"] if "_enumerate_dim" in node["infer"] else log_density(node)
    return value


def is_local_message(message: dict[str, Any]) -> bool:
    """Whether a message of Pyro's is about the data plate or stands inside it."""
    inside = any(frame.name == DATA_PLATE for frame in message["cond_indep_stack"])
    return inside or message["name"] == DATA_PLATE
