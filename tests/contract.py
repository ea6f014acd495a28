"""What the contract tests run over: every entry of the registry, on data simulated from itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from elbozoo.guides import Guide, build_guide, guide_names
from elbozoo.guides.base import GuideOptions
from elbozoo.models import Batch, Entry, entry_names, get_entry
from elbozoo.models.contract.isolation import isolated

ROWS = 24


@cache
def example_data(name: str) -> Tensor:
    """Rows simulated from the entry ``name`` with random parameters."""
    return get_entry(name).example(seed=1).simulate(ROWS, seed=2)[0].double()


def entry_for(name: str, seed: int = 0) -> Entry:
    """Entry ``name`` at its starting values for :func:`example_data`, in float64."""
    entry = get_entry(name)
    return entry.from_data(example_data(name), seed=seed).double()


def guide_for(entry: Entry, guide: str, x: Tensor, seed: int = 0) -> Guide:
    """Build an untrained guide in float64, which starts with no knowledge of the posterior."""
    with isolated(seed):
        return build_guide(guide, entry, x, GuideOptions(initial_scale=0.1)).double()


def every_entry() -> list[str]:
    """Names of all entries."""
    return entry_names()


# Guides whose searches take seconds, on entries that stand for the others of their kind.
COSTLY = ("semi-amortized", "-flow", "-low-rank-normal")
REPRESENTATIVES = ("ppca", "gaussian-mixture", "vae")


@cache
def every_pair() -> list[tuple[str, str]]:
    """Name of every entry with every guide that fits it; costly guides with few entries."""
    pairs = [(name, guide) for name in entry_names() for guide in guide_names(get_entry(name).example())]
    return [pair for pair in pairs if pair[0] in REPRESENTATIVES or not any(word in pair[1] for word in COSTLY)]


def joint_trace(program: Any, batch: Batch, values: dict[str, Tensor] | None = None) -> poutine.Trace:
    """Trace of ``program`` on ``batch`` with its latents fixed to ``values``, log probabilities computed."""
    conditioned = poutine.condition(program, data=values) if values else program
    with isolated(0):
        trace = poutine.trace(conditioned).get_trace(batch)
        trace.compute_log_prob()
    return trace


def prior_draw(entry: Entry, batch: Batch, seed: int) -> dict[str, Tensor]:
    """One draw of every latent site from the prior."""
    names = [site.name for site in entry.latent_sites(batch.x)]
    with isolated(seed), torch.no_grad(), pyro.validation_enabled(True):
        trace = poutine.trace(entry).get_trace(batch)
    return {name: trace.nodes[name]["value"].detach() for name in names}


def changed(x: Tensor) -> Tensor:
    """Other data of the same kind: the first half of the rows are copies of the first, so that counts stay counts."""
    other = x.clone()
    other[: len(x) // 2] = x[0]
    if x.ndim == 3:  # each step keeps its row number
        other[..., 0] = x[..., 0]
    return other
