"""Fits as ArviZ's InferenceData, with named dimensions; the one place that converts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import arviz
import numpy as np
import numpy.typing as npt
import pyro
import torch
from pyro import poutine
from torch import Tensor

from elbozoo.guides.base import Guide
from elbozoo.guides.draws import DrawsGuide
from elbozoo.inference.weights import CHUNK_ELEMENTS
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import EVIDENCE_SITE, PARTICLE_DIM, collapsed
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sequences import StackedEntry, observations, steps_mask
from elbozoo.models.contract.sites import OBSERVED_SITE, LatentSite, is_local_node, log_density, stochastic_nodes

Array = npt.NDArray[Any]
NO_STATE = -1  # stands for the state of a padded step, where a number can be no NaN


def inference_data(entry: Entry, guide: Guide, x: Tensor, draws: int, seed: int) -> arviz.InferenceData:
    """Return what a fit says about data, in the groups that ArviZ knows.

    ``posterior``
        Draws of z from q, with whatever the program computes from them by ``pyro.deterministic``.
    ``posterior_predictive``
        Data drawn at those z, on the same rows.
    ``log_likelihood``
        log p(x_n given z) of each row, or sequence, in nats. Beside global latents, a finite latent of each row is
        summed out here and absent from the posterior, whatever the guide, so that all fits of an entry compare.
    ``sample_stats``
        What NUTS says of each draw: ``diverging``, ``lp``, ``n_steps``, ``step_size``.
    ``prior``, ``prior_predictive``
        Draws of z from the prior, and of data at those z; not under a flat prior, which has none.
    ``observed_data``, ``constant_data``
        The observed site, and what the entry conditions on, such as covariates.

    Draws of NUTS keep their chains, all of them. Any other q has one chain: its draws are independent, so that
    r-hat and ESS, which are about chains, say nothing about them.

    Dimensions are ``row`` and ``column``, or ``sequence`` and ``step`` for sequences, ``group`` and ``row`` for groups,
    and those that the entry names in ``site_dims``. Steps that are padding hold NaN, or -1 where the latent is a state.

    Parameters
    ----------
    x : Tensor
        Rows (N, D), or sequences as arranged data.
    draws : int
        Number of draws of q and of the prior.
    seed : int
        Seed of every draw.
    """
    batch = Batch.full(x)
    summed_out = _summed_out(entry.latent_sites(x))
    with isolated(seed), torch.no_grad():
        values = _draws_of(entry, guide, batch, draws)
        values = {name: value for name, value in values.items() if name not in summed_out}
        sizes = _chunks(entry, batch, len(next(iter(values.values()))) if values else draws)
        parts = list(zip(_split(values, sizes), sizes, strict=True))
        posterior = _Runs.joined([_runs(entry, summed_out, batch, part, size) for part, size in parts])
        likelihood = torch.cat([_log_likelihood(entry, summed_out, batch, part, size) for part, size in parts])
        # From a flat prior there is nothing to draw.
        is_proper = all(site.is_proper for site in entry.latent_sites(x))
        prior = _Runs.joined([_runs(entry, summed_out, batch, {}, size) for size in _chunks(entry, batch, draws)])
    chains = len(next(iter(guide.draws.values()))) if isinstance(guide, DrawsGuide) else 1
    statistics = guide.statistics if isinstance(guide, DrawsGuide) else {}
    names = _Names(entry, x, posterior)

    def in_chains(values: Array, chains: int) -> Array:
        return values.reshape(chains, -1, *values.shape[1:])

    def group(sites: Mapping[str, _Site], chains: int = 1) -> dict[str, Array]:
        return {name: in_chains(names.blank(name, site.values.numpy()), chains) for name, site in sites.items()}

    return arviz.from_dict(
        posterior=group(posterior.latents, chains) or None,
        posterior_predictive=group({OBSERVED_SITE: posterior.data}, chains),
        log_likelihood={OBSERVED_SITE: in_chains(likelihood.numpy(), chains)},
        sample_stats={name: each.numpy() for name, each in statistics.items()} or None,
        prior=(group(prior.latents) or None) if is_proper else None,
        prior_predictive=group({OBSERVED_SITE: prior.data}) if is_proper else None,
        observed_data={OBSERVED_SITE: names.blank(OBSERVED_SITE, _observed(entry, x, posterior))},
        constant_data={name: value.numpy() for name, value in entry.constant_data(x).items()} or None,
        dims=names.dims,
        coords=names.coords,
        attrs={"model": entry.name(), "guide": guide.name, "inference_library": "elbozoo"},
    )


class _Site(NamedTuple):
    """Values of one site, one for each draw.

    Attributes
    ----------
    values : Tensor (S, N, *event) or (S, *event)
        Of a site inside the data plate, or outside it.
    is_local : bool
        Whether it is inside.
    """

    values: Tensor
    is_local: bool

    @classmethod
    def of_node(cls, node: dict[str, Any], draws: int, rows: int) -> _Site:
        """Read the site off a trace under ``draws`` particles."""
        is_local, event = is_local_node(node), node["fn"].event_shape
        values = node["value"].expand(draws, rows if is_local else 1, *event)
        return cls(values if is_local else values[:, 0], is_local)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one draw, of one datum for a local site."""
        return self.values.shape[2 if self.is_local else 1 :]


class _Runs(NamedTuple):
    """Runs of the program without its data, one for each draw.

    Attributes
    ----------
    latents : dict
        Latent sites that are not summed out, and what the program computes from them.
    data : _Site
        The observed site, drawn anew.
    observed : Tensor
        What was observed there.
    """

    latents: dict[str, _Site]
    data: _Site
    observed: Tensor

    @classmethod
    def joined(cls, parts: list[_Runs]) -> _Runs:
        """Return the runs of several chunks of draws as one."""
        latents = {name: _joined([part.latents[name] for part in parts]) for name in parts[0].latents}
        return cls(latents, _joined([part.data for part in parts]), parts[0].observed)


def _joined(parts: list[_Site]) -> _Site:
    return _Site(torch.cat([part.values for part in parts]), parts[0].is_local)


def _summed_out(sites: Sequence[LatentSite]) -> list[str]:
    """Names of the finite latents of a row, in a program that has global latents as well."""
    if all(site.is_local for site in sites):
        return []
    return [site.name for site in sites if site.is_local and site.is_enumerable]


def _draws_of(entry: Entry, guide: Guide, batch: Batch, draws: int) -> dict[str, Tensor]:
    """Draws of q at each latent site that the guide samples: (S, N, *event), or (S, 1, *event) of a global one."""
    if isinstance(guide, DrawsGuide):
        return {name: values.flatten(0, 1)[:, None] for name, values in guide.draws.items()}
    with pyro.plate("particles", draws, dim=PARTICLE_DIM):
        trace = poutine.trace(guide).get_trace(batch)
    # Autoguides draw from a site of their own as well, which the program does not know.
    names = {site.name for site in entry.latent_sites(batch.x)}
    return {
        name: node["value"].expand(draws, len(batch.x) if is_local_node(node) else 1, *node["fn"].event_shape)
        for name, node in stochastic_nodes(trace)
        if name in names
    }


def _chunks(entry: Entry, batch: Batch, draws: int) -> list[int]:
    """Sizes of the chunks of draws in which the program is run, so that memory stays bounded."""
    size = max(1, CHUNK_ELEMENTS // (len(batch.x) * entry.elements(batch.x)))
    return [min(size, draws - start) for start in range(0, draws, size)]


def _split(values: Mapping[str, Tensor], sizes: list[int]) -> Iterator[dict[str, Tensor]]:
    parts = {name: value.split(sizes) for name, value in values.items()}
    return ({name: part[i] for name, part in parts.items()} for i in range(len(sizes)))


def _runs(entry: Entry, summed_out: Collection[str], batch: Batch, values: Mapping[str, Tensor], draws: int) -> _Runs:
    """Run the program with its latents at ``values`` (drawn where there are none) and its data drawn anew."""
    with pyro.plate("particles", draws, dim=PARTICLE_DIM):
        program = poutine.condition(poutine.uncondition(entry), data=dict(values))
        nodes = poutine.trace(program).get_trace(batch).nodes
    # The program's other observed sites and factors have no value to show. What is computed from a site that is
    # summed out is no more in q than the site itself.
    latent = {site.name for site in entry.latent_sites(batch.x)} - set(summed_out)
    shown = {
        name: node
        for name, node in nodes.items()
        if name in latent or (_is_computed(node) and not (summed_out and is_local_node(node)))
    }
    sites = {name: _Site.of_node(node, draws, len(batch.x)) for name, node in shown.items()}
    data = nodes[OBSERVED_SITE]
    return _Runs(sites, _Site.of_node(data, draws, len(batch.x)), data["infer"]["obs"])


def _is_computed(node: Mapping[str, Any]) -> bool:
    return node["type"] == "sample" and bool(node["infer"].get("_deterministic"))


def _observed(entry: Entry, x: Tensor, runs: _Runs) -> Array:
    """Return the data at the observed site, NaN where a sequence has none."""
    shape = runs.data.values.shape[1:]
    if isinstance(entry, StackedEntry):
        observed = observations(x).reshape(shape)
    else:  # a program may draw one number that stands for all columns
        observed = runs.observed.expand(torch.broadcast_shapes(shape, runs.observed.shape))
    result: Array = observed.numpy()
    return result


def _log_likelihood(
    entry: Entry, summed_out: Collection[str], batch: Batch, values: Mapping[str, Tensor], draws: int
) -> Tensor:
    """Log p(x_n given z) of each draw and row, (S, N), nats."""
    with pyro.plate("particles", draws, dim=PARTICLE_DIM):
        program = poutine.condition(collapsed(entry, summed_out), data=dict(values))
        trace = poutine.trace(program).get_trace(batch)
    site = EVIDENCE_SITE if summed_out else OBSERVED_SITE
    trace.compute_log_prob(site_filter=lambda name, node: name == site)
    return log_density(trace.nodes[site]).expand(draws, len(batch.x))


class _Names:
    """Names and labels of the dimensions of everything that is converted, and the steps that are padding."""

    def __init__(self, entry: Entry, x: Tensor, runs: _Runs) -> None:
        self.entry = entry
        self.padding = ~steps_mask(x) if isinstance(entry, StackedEntry) else None
        self.stack = entry.stack_dims if isinstance(entry, StackedEntry) else ("row",)
        self.rows = self.stack[0]
        sites = {**runs.latents, OBSERVED_SITE: runs.data}
        constants = {name: _Site(value[None], is_local=True) for name, value in entry.constant_data(x).items()}
        self.dims = {name: self._dims(name, site) for name, site in {**sites, **constants}.items()}
        self.coords: dict[str, Sequence[Any]] = {self.rows: range(len(x)), "column": entry.names, **entry.coords()}
        if len(entry.names) != entry.columns:
            self.coords["column"] = range(entry.columns)

    def blank(self, name: str, values: Array) -> Array:
        """Put NaN, or -1 for a whole number, where a step is padding."""
        dims = self.dims[name]
        if self.padding is None or not self.padding.any() or tuple(dims[:2]) != self.stack:
            return values
        where = self.padding.numpy().reshape(self.padding.shape + (1,) * (len(dims) - 2))
        return np.where(where, np.nan if values.dtype.kind == "f" else NO_STATE, values)

    def _dims(self, name: str, site: _Site) -> list[str]:
        shape = site.event_shape
        given = list(self.entry.site_dims.get(name, ()))
        event = given if len(given) == len(shape) else self._default(name, site)
        return [self.rows, *event] if site.is_local else event

    def _default(self, name: str, site: _Site) -> list[str]:
        shape = site.event_shape
        steps = list(self.stack[1:]) if site.is_local and len(shape) else []
        rest = shape[len(steps) :]
        if name == OBSERVED_SITE and rest == (self.entry.columns,):
            return [*steps, "column"]
        return [*steps, *(f"{name}_dim_{i}" for i in range(len(rest)))]
