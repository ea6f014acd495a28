"""Fits as ArviZ's InferenceData, with named dimensions; the one place that converts."""

from __future__ import annotations

import arviz
import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from elbozoo.guides.base import Guide
from elbozoo.inference.weights import PARTICLE_DIM
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import OBSERVED_SITE, LatentSite


def inference_data(entry: Entry, guide: Guide, x: Tensor, draws: int, seed: int) -> arviz.InferenceData:
    """Return draws from q and from the prior, replicated data and the log-likelihood of each row.

    Groups: ``posterior`` (draws of z from q), ``posterior_predictive`` (x drawn at those z), ``log_likelihood``
    (log p(x_n given z), nats), ``prior``, ``observed_data``. One chain: draws of q are independent, so that
    r-hat and ESS, which are about chains, say nothing about them.

    Parameters
    ----------
    x : Tensor (N, D)
        Rows.
    draws : int
        Number of draws.
    """
    sites = entry.latent_sites()
    batch = Batch.full(x)
    with isolated(seed), torch.no_grad(), pyro.plate("particles", draws, dim=PARTICLE_DIM):
        guide_trace = poutine.trace(guide).get_trace(batch)
        conditioned = poutine.trace(poutine.replay(entry, trace=guide_trace)).get_trace(batch)
        replicated = poutine.trace(poutine.replay(poutine.uncondition(entry), trace=guide_trace)).get_trace(batch)
        prior = poutine.trace(entry).get_trace(batch)
        conditioned.compute_log_prob()
    log_likelihood = conditioned.nodes[OBSERVED_SITE]["unscaled_log_prob"].expand(draws, len(x))
    dims = {site.name: _dims(site) for site in sites}
    return arviz.from_dict(
        posterior={site.name: _chain(guide_trace.nodes[site.name]["value"], site, draws, len(x)) for site in sites},
        posterior_predictive={
            OBSERVED_SITE: replicated.nodes[OBSERVED_SITE]["value"].expand(draws, *x.shape).numpy()[None]
        },
        log_likelihood={OBSERVED_SITE: log_likelihood.numpy()[None]},
        prior={site.name: _chain(prior.nodes[site.name]["value"], site, draws, len(x)) for site in sites},
        observed_data={OBSERVED_SITE: x.numpy()},
        dims={**dims, OBSERVED_SITE: ["row", "column"]},
        coords={"row": np.arange(len(x)), "column": np.arange(x.shape[1])},
    )


def _dims(site: LatentSite) -> list[str]:
    names = [f"{site.name}_dim_{i}" for i in range(len(site.event_shape))]
    return ["row", *names] if site.is_local else names


def _chain(value: Tensor, site: LatentSite, draws: int, rows: int) -> np.ndarray:
    shape = (draws, rows, *site.event_shape) if site.is_local else (draws, *site.event_shape)
    kept = value if site.is_local else value.reshape(draws, *site.event_shape)
    result: np.ndarray = kept.expand(shape).detach().numpy()[None]
    return result
