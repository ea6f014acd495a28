r"""The No-U-Turn sampler: draws from the posterior of global latents, as a reference for every other method.

The transitions are Pyro's (:class:`pyro.infer.NUTS`): multinomial sampling along the path (Betancourt 2017) in the
unconstrained space, with step size and mass matrix adapted in the warm-up, which begins with the curvature at the mode
where there is one. Finite local latents are summed out first. Chains run one after the other, each with a seed of its
own, from a random start, or from the entry's own ``starting_latents`` where the components of a mixture would
otherwise have another name in every chain.

Whether the draws can be trusted is read off the chains alone: the rank-normalised split r-hat, which sees chains
that disagree in location or in spread, and the effective sample sizes in the bulk and in the tails (Vehtari et
al. 2021). Their recommendation is the verdict here: r-hat below 1.01 and an effective sample size of at least 100 per
chain, both for every scalar. A divergence is a path that the step size could not follow, so the draws may miss the
place where it was; a reference with divergences is none, and the verdict says so.

References
----------
```bibtex
@article{hoffman2014no,
  author = {Hoffman, Matthew D. and Gelman, Andrew},
  title = {The {No-U-Turn} Sampler: Adaptively Setting Path Lengths in {H}amiltonian {M}onte {C}arlo},
  journal = {Journal of Machine Learning Research}, volume = {15}, pages = {1593--1623}, year = {2014}
}
@article{betancourt2017conceptual,
  author = {Betancourt, Michael},
  title = {A Conceptual Introduction to {H}amiltonian {M}onte {C}arlo},
  journal = {arXiv:1701.02434}, year = {2017}
}
@article{vehtari2021rank,
  author = {Vehtari, Aki and Gelman, Andrew and Simpson, Daniel and Carpenter, Bob and B{\"u}rkner, Paul-Christian},
  title = {Rank-Normalization, Folding, and Localization: An Improved {R}-hat for Assessing Convergence of {MCMC}},
  journal = {Bayesian Analysis}, volume = {16}, number = {2}, pages = {667--718}, year = {2021}
}
```
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import arviz
import numpy as np
import pyro
import torch
from pyro.infer import NUTS
from pyro.infer.autoguide import init_to_uniform, init_to_value
from torch import Tensor

from elbozoo.guides.autoguides import find_mode, starting_point
from elbozoo.guides.draws import DrawsGuide
from elbozoo.inference.progress import progress_bar
from elbozoo.inference.trajectory import Trajectory
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import collapsed
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.options import Field, Options
from elbozoo.models.contract.sites import MAX_PLATE_NESTING, LatentSite

DENSE_DIM = 100  # latents up to which the mass matrix is dense
R_HAT = 1.01
ESS_PER_CHAIN = 100
CHAIN_STREAM = 15_485_863  # keeps the chains' seeds apart from one another and from those of the fits beside
STATISTICS = {"lp": torch.float64, "diverging": torch.bool, "n_steps": torch.int64, "step_size": torch.float64}


class NUTSOptions(Options):
    """Options of NUTS."""

    chains: int = Field(4, ge=1, description="number of chains, each from a start of its own; r-hat needs 2")
    warmup: int = Field(500, ge=1, description="transitions of each chain that adapt step size and scales")
    draws: int = Field(500, ge=4, description="draws of each chain that are kept, after the warm-up")
    target_acceptance: float = Field(
        0.8, gt=0, lt=1, description="mean acceptance that the step size aims at; closer to 1 is slower and safer"
    )


class NUTSRun(NamedTuple):
    """Draws, and what they say about themselves.

    Attributes
    ----------
    draws : dict of Tensor (chains, draws, *event)
        Draws of each global site on its support.
    statistics : dict of Tensor (chains, draws)
        ``lp``: log p(x, z) at the draw in unconstrained coordinates, nats; ``diverging``: whether its path
        diverged; ``n_steps``: gradients that it took; ``step_size``.
    summed_out : tuple of str
        Finite local sites, which were summed out.
    r_hat : float
        Largest rank-normalised split r-hat over all scalars; NaN for a single chain.
    ess : float
        Smallest effective sample size, bulk or tail, over all scalars.
    trajectory : Trajectory
        A row for each transition, those of the warm-up included; chain after chain.
    converged : bool
        Whether r-hat < 1.01, ESS >= 100 per chain, and no draw diverged.
    interrupted : bool
        Whether the user stopped it; only finished chains are kept, or what the first one had.
    notes : list of str
        r-hat, ESS and divergences in words, and what to do about them.
    """

    draws: dict[str, Tensor]
    statistics: dict[str, Tensor]
    summed_out: tuple[str, ...]
    r_hat: float
    ess: float
    trajectory: Trajectory
    converged: bool
    interrupted: bool
    notes: list[str]

    @property
    def divergences(self) -> int:
        """Number of draws whose path diverged."""
        return int(self.statistics["diverging"].sum())

    def guide(self) -> DrawsGuide:
        """Return the draws as a guide."""
        return DrawsGuide(self.draws, self.statistics, self.summed_out)


def run_nuts(entry: Entry, x: Tensor, options: NUTSOptions, *, seed: int, progress: bool = True) -> NUTSRun:
    """Draw from the posterior of the global latents of ``entry`` given the data ``x``, in float64.

    θ stays as it is. An interrupt keeps the chains that are finished, or what the first one has drawn so far.

    Raises
    ------
    InvalidInput
        If the latents are not global and continuous, beside finite local ones.
    NumericalFailure
        If no chain can start.
    """
    entry = entry.double()
    x = x.double()
    summed_out = _summed_out(entry, entry.latent_sites(x))
    model, batch = collapsed(entry, summed_out), Batch.full(x)
    start = init_to_value(values=entry.starting_latents(x), fallback=init_to_uniform)
    with isolated(seed), pyro.validation_enabled(False):
        scales = _Scales.at_mode(entry, model, batch)
    trajectory = Trajectory(is_elbo=False)
    chains: list[_Chain] = []
    interrupted = False
    with progress_bar(f"{entry.name()} nuts", options.chains * (options.warmup + options.draws), progress) as report:
        try:
            for number in range(options.chains):
                chains.append(_Chain())
                with isolated(seed + CHAIN_STREAM * (number + 1)), pyro.validation_enabled(False):
                    chains[-1].run(model, batch, options, start, scales, trajectory, report)
        except KeyboardInterrupt:
            chains = chains[: max(1, len(chains) - 1)]
            if not chains[0].values:
                raise
            interrupted = True
    return _summary(chains, summed_out, trajectory, interrupted)


class _Chain:
    """One chain: its draws on the support, one dict of sites each, and what is said of them."""

    def __init__(self) -> None:
        self.values: list[dict[str, Tensor]] = []
        self.statistics: list[dict[str, float]] = []

    def run(
        self,
        model: Callable[[Batch], Any],
        batch: Batch,
        options: NUTSOptions,
        start: Callable[..., Any],
        scales: _Scales | None,
        trajectory: Trajectory,
        report: Callable[[int, str], None],
    ) -> None:
        """Warm up and draw."""
        kernel = NUTS(
            model,
            target_accept_prob=options.target_acceptance,
            full_mass=scales is not None and len(scales.covariance) <= DENSE_DIM,
            max_plate_nesting=MAX_PLATE_NESTING,
            init_strategy=start,
        )
        _set_up(kernel, batch, options.warmup)
        if scales is not None:
            scales.give_to(kernel)
        steps = _count_calls(kernel)
        position = kernel.initial_params
        for transition in range(options.warmup + options.draws):
            before, steps_before = time.perf_counter(), steps()
            position = kernel.sample(position)
            taken = steps() - steps_before
            with torch.no_grad():
                lp = -float(kernel.potential_fn(position))
            trajectory.record(time.perf_counter() - before, lp)
            if transition >= options.warmup:
                self.values.append({name: kernel.transforms[name].inv(z).detach() for name, z in position.items()})
                drawn = len(self.values)
                # Pyro lists the divergent draws by their number, counted from 0 after the warm-up.
                diverging = drawn - 1 in kernel.diagnostics()["divergences"][-1:]
                self.statistics.append(
                    {"lp": lp, "diverging": diverging, "n_steps": taken, "step_size": float(kernel.step_size)}
                )
            report(len(trajectory.rows), f"step size {kernel.step_size:.2g}")


class _Scales(NamedTuple):
    """Covariance of the normal with the curvature at the mode, (P, P), and the positions of each site in it.

    Warm-up from a unit mass matrix takes leapfrog steps as short as the narrowest direction is, until it has learnt
    the scales; on columns in large units or close to collinear that is most of a run.
    """

    covariance: Tensor
    positions: dict[str, Tensor]

    @classmethod
    def at_mode(cls, entry: Entry, model: Callable[[Batch], Any], batch: Batch) -> _Scales | None:
        """Return those of the program, or None where it has no mode that can be reached."""
        mode = find_mode(model, batch, starting_point(entry, batch.x))
        if mode is None:
            return None
        order = torch.arange(len(mode.loc))
        positions = {site["name"]: part.flatten() for site, part in mode.guide._unpack_latent(order)}
        return cls(torch.cholesky_inverse(torch.linalg.cholesky(mode.precision)), positions)

    def give_to(self, kernel: NUTS) -> None:
        """Let the adaptation of ``kernel`` begin with these scales."""
        ((names, matrix),) = kernel.inverse_mass_matrix.items()
        order = torch.cat([self.positions[name] for name in names])
        covariance = self.covariance[order][:, order]
        scales = covariance if matrix.ndim == 2 else covariance.diagonal()
        kernel.mass_matrix_adapter.inverse_mass_matrix = {names: scales}
        kernel._adapter.reset_step_size_adaptation(kernel.initial_params)


def _summed_out(entry: Entry, sites: list[LatentSite]) -> tuple[str, ...]:
    for site in sites:
        if site.is_local and not site.is_enumerable:
            raise InvalidInput(
                f"the latent {site.name!r} of {entry.name()} is local, one per datum, expected global ones for nuts; "
                "use em or a guide with free or amortized parameters"
            )
        if site.is_discrete and not site.is_local:
            raise InvalidInput(
                f"the latent {site.name!r} of {entry.name()} takes {site.cardinality} values, expected a continuous "
                "one for nuts, which follows gradients; sum it out of the program"
            )
    local = tuple(site.name for site in sites if site.is_local)
    if len(local) == len(sites):
        raise InvalidInput(
            f"the latents of {entry.name()} are local, one per datum, expected global ones for nuts; "
            "use em or a guide with free or amortized parameters"
        )
    return local


def _set_up(kernel: NUTS, batch: Batch, warmup: int) -> None:
    try:
        kernel.setup(warmup, batch)
    except ValueError as error:
        if "initial params" not in str(error):
            raise
        raise NumericalFailure(
            "nuts cannot start: log p(x, z) or its gradient is not finite at 100 starts near the centre of the "
            "unconstrained space; check the data and the priors for values far from 1, and rescale the columns"
        ) from None


def _count_calls(kernel: NUTS) -> Callable[[], int]:
    """Count the evaluations of the kernel's potential from here on."""
    potential, calls = kernel.potential_fn, 0

    def counted(position: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return potential(position)

    kernel.potential_fn = counted
    return lambda: calls


def _summary(chains: list[_Chain], summed_out: tuple[str, ...], trajectory: Trajectory, interrupted: bool) -> NUTSRun:
    draws = {
        name: torch.stack([torch.stack([value[name] for value in chain.values]) for chain in chains])
        for name in chains[0].values[0]
    }
    statistics = {
        name: torch.tensor([[each[name] for each in chain.statistics] for chain in chains], dtype=dtype)
        for name, dtype in STATISTICS.items()
    }
    r_hat, ess = diagnostics(draws)
    divergences = int(statistics["diverging"].sum())
    converged = r_hat < R_HAT and ess >= ESS_PER_CHAIN * len(chains) and divergences == 0
    notes = _notes(r_hat, ess, divergences, len(chains), len(chains[0].values))
    return NUTSRun(
        draws, statistics, summed_out, r_hat, ess, trajectory, converged and not interrupted, interrupted, notes
    )


def diagnostics(draws: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the largest r-hat and the smallest ESS, bulk or tail, over all scalars of the draws.

    Both are those of Vehtari et al. (2021), as ArviZ computes them. Scalars that are the same in every draw, such as
    the diagonal of a correlation matrix, are left out. NaN where there are fewer than two chains or four draws.

    Parameters
    ----------
    draws : mapping of Tensor (chains, draws, *event)
        Draws of each site.
    """
    flat = torch.cat([values.flatten(2) if values.ndim > 2 else values[..., None] for values in draws.values()], -1)
    chains, length, _ = flat.shape
    moving = flat[..., (flat != flat[:1, :1]).any(0).any(0)]
    if chains < 2 or length < 4 or not moving.shape[-1]:
        return math.nan, math.nan
    together = arviz.convert_to_dataset({"z": moving.numpy()})
    r_hat = arviz.rhat(together, method="rank")["z"].to_numpy()
    sizes = [arviz.ess(together, method=method)["z"].to_numpy() for method in ("bulk", "tail")]
    # A NaN is the answer to a scalar that some chain never moves, and must not hide behind those that do.
    return float(np.max(r_hat)), float(np.min(sizes))


def _notes(r_hat: float, ess: float, divergences: int, chains: int, length: int) -> list[str]:
    notes = [f"r-hat {r_hat:.3f}, ESS {ess:.0f} from {chains} chains of {length} draws"]
    if chains < 2:
        notes = [f"one chain of {length} draws: r-hat and ESS need at least 2; run with chains=4"]
    elif not (r_hat < R_HAT and ess >= ESS_PER_CHAIN * chains):
        notes.append(
            f"expected r-hat below {R_HAT} and an ESS of at least {ESS_PER_CHAIN * chains}: raise warmup and draws"
        )
    if divergences:
        many = "1 divergence" if divergences == 1 else f"{divergences} divergences"
        notes.append(
            f"{many}: the draws may miss a narrow part of the posterior; raise target_acceptance toward 1, "
            "or try the non-centred form of the model"
        )
    return notes
