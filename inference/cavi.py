"""Coordinate-ascent variational inference: each factor of q is set in turn to its optimum, in closed form."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elbozoo.inference.convergence import MonotoneMonitor
from elbozoo.inference.em import RESTARTS_OF_MIXTURES
from elbozoo.inference.progress import progress_bar
from elbozoo.inference.trajectory import Trajectory
from elbozoo.models.contract.entry import Entry, SupportsCAVI
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.options import Field, Options

RESTART_STREAM = 1_000_003  # keeps the starts of seeds that follow one another apart


class CAVIOptions(Options):
    """Options of CAVI."""

    restarts: int | None = Field(
        None, ge=1, description="starts, of which the best is kept; none takes 10 for discrete latents, else 1"
    )
    iterations: int = Field(10_000, ge=1, description="most sweeps of each start")
    tolerance: float = Field(1e-6, gt=0, description="gain still to come, nats per datum, at which CAVI has converged")


class CAVIRun(NamedTuple):
    """How CAVI ended.

    Attributes
    ----------
    factors : NamedTuple of Tensor
        Parameters of q, as the entry names them.
    bound : float
        Their ELBO in closed form, total nats.
    trajectory : Trajectory
        The bound along the best start.
    converged, interrupted : bool
        Whether what was left to gain fell below the tolerance; whether the user stopped it.
    notes : list of str
        What a reader of the figures should know.
    """

    factors: Any
    bound: float
    trajectory: Trajectory
    converged: bool
    interrupted: bool
    notes: list[str]


def run_cavi(entry: Entry, x: Tensor, options: CAVIOptions, *, seed: int, progress: bool = True) -> CAVIRun:
    """Return the best of several starts of CAVI on the data ``x``, by the bound; the entry stays as it is.

    Raises
    ------
    NumericalFailure
        If the bound falls by more than rounding, or is not finite.
    """
    is_mixture = any(site.is_discrete for site in entry.latent_sites(x))
    restarts = options.restarts or (RESTARTS_OF_MIXTURES if is_mixture else 1)
    best: CAVIRun | None = None
    with progress_bar(f"{entry.name()} cavi", restarts, progress) as report:
        for restart in range(restarts):
            with isolated(seed + RESTART_STREAM * restart):
                run = _one_start(entry, x, options, restart)
            if best is None or run.bound > best.bound:
                best = run
            report(restart + 1, f"ELBO {best.bound:.2f}")
            if run.interrupted:
                # Also where an earlier start is the best: the search was cut short.
                best = best._replace(interrupted=True)
                break
    assert best is not None
    return best


def _one_start(entry: Entry, x: Tensor, options: CAVIOptions, restart: int) -> CAVIRun:
    assert isinstance(entry, SupportsCAVI)
    monitor = MonotoneMonitor(options.tolerance, entry.count(x), "CAVI", "the bound", "an update or the bound")
    trajectory = Trajectory(is_elbo=True)
    converged = interrupted = False
    with torch.no_grad():
        factors = entry.initial_factors(x, restart)
        try:
            for _ in range(options.iterations):
                before = time.perf_counter()
                updated = entry.update_factors(x, factors)
                bound = float(entry.bound(x, updated))
                converged = monitor.update(bound)
                factors = updated
                trajectory.record(time.perf_counter() - before, bound)
                if converged:
                    break
        except KeyboardInterrupt:
            interrupted = True
    notes = [] if converged or interrupted else [monitor.unfinished()]
    bound = monitor.history[-1] if monitor.history else -math.inf
    return CAVIRun(factors, bound, trajectory, converged, interrupted, notes)
