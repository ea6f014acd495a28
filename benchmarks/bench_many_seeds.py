"""Fits from 32 seeds on a linear-Gaussian model, all at once, beside as many of Pyro's one after the other.

Every fit begins at its own seed's starting values, takes as many steps with one draw and Adam, and both sides' clocks
leave out the first steps, in which ours is captured and compiled.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys

from bench_svi_step import LEARNING_RATE, WARM_STEPS, by_pyro, program, starting_values
from harness import Agreement, Contest, Job, Outcome, Side, Ticks, main, mean_of_last

SEEDS = {"small": 32, "full": 32, "tiny": 2}
ROWS = {"small": 1_000, "full": 1_000, "tiny": 100}
STEPS = {"small": 60, "full": 300, "tiny": 30}
TARGET = 20.0
AGREEMENT = Agreement(
    "mean over the seeds of the last quarter of the losses, whose noise is that of one draw per datum; the same seed "
    "starts both sides and draws otherwise in each",
    relative=1e-3,
    z=5.0,
)


def contests(size: str, device: str) -> list[Contest]:
    """Return the one contest, in double precision as the entry has it."""
    seeds, rows, steps = range(SEEDS[size]), ROWS[size], STEPS[size]
    engine = "captured" if size == "tiny" else "compiled"
    return [
        Contest(
            name=f"pyro-ppl-{len(seeds)}",
            peer=f"{len(seeds)} fits by Pyro SVI",
            packages=("pyro-ppl",),
            sizes={"seeds": len(seeds), "rows": rows, "steps": steps, "precision": "float64"},
            target=TARGET,
            sides=lambda: (ours(seeds, rows, steps, engine), one_by_one(seeds, rows, steps)),
            agreement=AGREEMENT,
            unit=f"step of {len(seeds)} fits",
        )
    ]


def ours(seeds: range, rows: int, steps: int, engine: str) -> Side:
    """Return our side: all seeds in one run, as ``compare`` makes it."""
    import torch

    from elbozoo.inference.many_seeds import SeededFit, graph_of_seeds, run_together
    from elbozoo.inference.objectives import OBJECTIVES
    from elbozoo.inference.svi import begin
    from elbozoo.inference.training import TrainingOptions
    from elbozoo.models import Batch
    from elbozoo.models.contract.isolation import isolated

    options = TrainingOptions(
        steps=steps + WARM_STEPS, particles=1, learning_rate=LEARNING_RATE, schedule="constant", engine=engine
    )
    starts = [program(rows, "float64", seed) for seed in seeds]

    def begun(seed: int) -> SeededFit:
        entry, guide, x = copy.deepcopy(starts[seed])
        generator = torch.Generator().manual_seed(seed)
        state = begin(entry, guide, OBJECTIVES["elbo"], Batch.full(x), options, generator=generator)
        state.trajectory.oracle = None  # log p(x) along the way is no work of Pyro's
        return SeededFit(state, generator)

    def side() -> Outcome:
        with isolated(0):
            fits, clock = [begun(seed) for seed in seeds], Ticks()
            # The last seed's observer sees the end of each step; it asks for nothing that the fits would not do.
            fits[-1].observers = [clock.tick]
            results = run_together(fits, graph_of_seeds(fits[0]), "seeds", progress=False)
        reached = [mean_of_last([-row[2] for row in result.trajectory.rows]) for result in results]
        return _mean(clock.seconds_per_step(WARM_STEPS), reached)

    return side


def one_by_one(seeds: range, rows: int, steps: int) -> Side:
    """Return Pyro's side: a fit from each seed after the other."""
    sides = [by_pyro(starting_values(rows, "float64", seed), steps, seed) for seed in seeds]

    def side() -> Outcome:
        fits = [each() for each in sides]
        return _mean(sum(fit.cost for fit in fits), [(fit.reached, fit.error) for fit in fits])

    return side


def _mean(cost: float, reached: list[tuple[float, float]]) -> Outcome:
    """Return what a step of all fits costs, and the mean of what they reached with its standard error."""
    values, errors = zip(*reached, strict=True)
    return Outcome(cost, statistics.fmean(values), math.hypot(*errors) / len(values))


JOB = Job("many-seeds", "Fits from 32 seeds", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
