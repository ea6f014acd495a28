"""A hundred SVI steps on PPCA with one q per datum: ours beside pyro.infer.SVI, same noise, same loss."""

from __future__ import annotations

import pyro
from harness import alternate, record

from elbozoo.guides import build_guide
from elbozoo.inference.objectives import OBJECTIVES
from elbozoo.inference.svi import TrainingOptions, run_svi
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.isolation import isolated

ROWS, COLUMNS, LATENT_DIM, STEPS = 2000, 10, 2, 100
OPTIONS = TrainingOptions(steps=STEPS, particles=1, schedule="constant")
X, _ = get_entry("ppca").example(COLUMNS, seed=0, latent_dim=LATENT_DIM).simulate(ROWS, seed=1)


def _pair():  # type: ignore[no-untyped-def]
    entry = get_entry("ppca").from_data(X, latent_dim=LATENT_DIM)
    with isolated(0):
        return entry, build_guide("mean-field", entry, X)


def ours() -> float:
    """Return the last loss."""
    entry, guide = _pair()
    with isolated(0):
        result = run_svi(entry, guide, OBJECTIVES["elbo"], Batch.full(X), OPTIONS, progress=False)
    return -result.trajectory.rows[-1][2]


def by_pyro() -> float:
    """Return the last loss."""
    entry, guide = _pair()
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        optimizer = pyro.optim.Adam({"lr": OPTIONS.learning_rate})
        svi = pyro.infer.SVI(entry, guide, optimizer, OBJECTIVES["elbo"].build(1, guide))
        return [svi.step(Batch.full(X)) for _ in range(STEPS)][-1]


if __name__ == "__main__":
    outcome = alternate(ours, by_pyro)
    assert abs(outcome["reached"]["ours"] - outcome["reached"]["peer"]) <= 1e-6 * abs(outcome["reached"]["peer"])
    record("svi_step", "pyro.infer.SVI", {"rows": ROWS, "columns": COLUMNS, "steps": STEPS}, outcome)
