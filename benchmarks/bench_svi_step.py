"""One SVI step on a linear-Gaussian model, with one normal q per datum, the full batch, one draw and Adam.

Ours is ``run_svi`` on the entry ``ppca`` as it stands, timed over its whole loop, but for the exact log p(x) along the
way, which no peer computes. Pyro's model is written out as its users write it, with Pyro as it comes and once more with
its validation off. NumPyro's loop is one compiled call (``lax.scan``, as in its own ``SVI.run``), and compilation is
left out of its time as it is out of ours.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from harness import Agreement, Contest, Job, Outcome, Side, Ticks, main, mean_of_last

COLUMNS, LATENT_DIM, LEARNING_RATE, WARM_STEPS = 10, 2, 0.01, 10
STEPS = {"small": {2_000: 400, 100_000: 60}, "full": {2_000: 580, 100_000: 300}, "tiny": {200: 40}}
TARGETS = {"pyro-ppl": {2_000: 10.0, 100_000: 3.0}, "numpyro": {2_000: 1.0, 100_000: 1.2}}
NAMES = {"pyro-ppl": "Pyro SVI", "pyro-unvalidated": "Pyro SVI without validation", "numpyro": "NumPyro, jitted loop"}
PACKAGES = {"pyro-ppl": ("pyro-ppl",), "pyro-unvalidated": ("pyro-ppl",), "numpyro": ("numpyro", "jaxlib")}
AGREEMENT = Agreement(
    "means of the last quarter of the losses, whose noise is that of one draw per datum; from the same start the two "
    "fits take other draws, which moves the mean by less than a part in a thousand",
    relative=1e-3,
    z=5.0,
)


class Start(NamedTuple):
    """Data and starting values, the same for all sides, as arrays of the precision of the contest."""

    x: Any
    parameters: dict[str, Any]


def contests(size: str, device: str) -> list[Contest]:
    """Return each peer at each number of rows and in each precision."""
    return [
        _contest(peer, rows, steps, precision, engine="captured" if size == "tiny" else "compiled")
        for rows, steps in STEPS[size].items()
        for peer in NAMES
        for precision in (("float64",) if size == "tiny" else ("float64", "float32"))
    ]


def _contest(peer: str, rows: int, steps: int, precision: str, engine: str) -> Contest:
    def sides() -> tuple[Side, Side]:
        start = starting_values(rows, precision)
        return ours(start, steps, engine), PEERS[peer](start, steps)

    return Contest(
        name=f"{peer}-{rows}-{precision}",
        peer=f"{NAMES[peer]}, {precision}",
        packages=PACKAGES[peer],
        sizes={"rows": rows, "columns": COLUMNS, "latent_dim": LATENT_DIM, "steps": steps, "precision": precision},
        target=TARGETS.get(peer, {}).get(rows),
        sides=sides,
        agreement=AGREEMENT,
        unit="SVI step",
    )


def starting_values(rows: int, precision: str, seed: int = 0) -> Start:
    """Draw data from the model, and take the starting values that the entry and its guide give themselves."""
    entry, guide, x = program(rows, precision, seed)
    parameters = {name: value.detach().numpy().copy() for name, value in entry.named_parameters()}
    parameters["q"] = guide.sources["z"].values.detach().numpy().copy()
    return Start(x.numpy(), parameters)


def program(rows: int, precision: str, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return the entry, its guide and the data, as any fit of ours from ``seed`` begins with them."""
    import torch

    from elbozoo.guides import build_guide
    from elbozoo.models import get_entry
    from elbozoo.models.contract.isolation import isolated

    kind = getattr(torch, precision)
    x, _ = get_entry("ppca").example(COLUMNS, seed=0, latent_dim=LATENT_DIM).simulate(rows, seed=1)
    entry, x = get_entry("ppca").from_data(x, latent_dim=LATENT_DIM, seed=seed).to(kind), x.to(kind)
    with isolated(seed):
        return entry, build_guide("mean-field", entry, x), x


def ours(start: Start, steps: int, engine: str) -> Side:
    """Return our side: a fit from the start, timed from the end of its first steps."""
    from elbozoo.inference.objectives import OBJECTIVES
    from elbozoo.inference.svi import TrainingOptions, run_svi
    from elbozoo.models import Batch
    from elbozoo.models.contract.isolation import isolated

    # Fewer than 600 steps: the constant schedule looks for an end after that many.
    options = TrainingOptions(
        steps=steps + WARM_STEPS,
        batch_size=len(start.x),
        particles=1,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        engine=engine,
    )

    def side() -> Outcome:
        entry, guide, x = program(len(start.x), str(start.x.dtype))
        clock = Ticks()
        with isolated(2):
            result = run_svi(
                entry,
                guide,
                OBJECTIVES["elbo"],
                Batch.full(x),
                options,
                progress=False,
                observers=[clock.tick],
                resample=lambda batch: batch,  # the rows as they are; no log p(x) is then computed along the way
            )
        rows = result.trajectory.rows
        inside = sum(row[1] for row in rows[WARM_STEPS:]) / (len(rows) - WARM_STEPS)
        notes = {
            "engine": clock.engine,
            "seconds_inside_steps": inside,
            "steps": len(rows),
            "seconds_of_first_step": rows[0][1],
        }
        return Outcome(clock.seconds_per_step(WARM_STEPS), *mean_of_last([-row[2] for row in rows]), notes)

    return side


def by_pyro(start: Start, steps: int, seed: int = 1, *, validated: bool = True) -> Side:
    """Return Pyro's side: ``SVI.step`` on a model and a guide that are functions."""
    import pyro
    import torch
    from pyro import distributions as dist
    from torch.distributions import constraints

    x, values = torch.from_numpy(start.x), {name: torch.from_numpy(v) for name, v in start.parameters.items()}
    zeros = torch.zeros(LATENT_DIM, dtype=x.dtype)

    def model(x: Any) -> None:
        loading = pyro.param("loading", values["loading"].clone)
        loc = pyro.param("loc", values["loc"].clone)
        noise = pyro.param("noise", values["noise_scale_unconstrained"].exp, constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loading.mT + loc, noise).to_event(1), obs=x)

    def guide(x: Any) -> None:
        mean, log_scale = pyro.param("q", values["q"].clone).split(LATENT_DIM, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    def side() -> Outcome:
        with pyro.get_param_store().scope(), pyro.validation_enabled(validated):
            pyro.set_rng_seed(seed)
            svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), pyro.infer.Trace_ELBO())
            clock, losses = Ticks(), []
            for _ in range(steps + WARM_STEPS):
                losses.append(svi.step(x))
                clock.tick()
        return Outcome(clock.seconds_per_step(WARM_STEPS), *mean_of_last(losses))

    return side


def by_numpyro(start: Start, steps: int) -> Side:
    """Return NumPyro's side: all steps in one compiled call, which the warm-up compiles."""
    import jax

    jax.config.update("jax_enable_x64", start.x.dtype == "float64")
    svi, state, x = _numpyro_svi(start)

    def loop(state: Any, x: Any, length: int) -> Any:
        return jax.lax.scan(lambda now, _: svi.update(now, x), state, None, length=length)

    compiled = jax.jit(loop, static_argnums=2)

    def side() -> Outcome:
        clock = Ticks()
        warm, first = jax.block_until_ready(compiled(state, x, WARM_STEPS))
        clock.tick()
        _, losses = jax.block_until_ready(compiled(warm, x, steps))
        clock.tick()
        return Outcome(clock.seconds_per_step(1) / steps, *mean_of_last([*first.tolist(), *losses.tolist()]))

    return side


def _numpyro_svi(start: Start) -> tuple[Any, Any, Any]:
    """Return NumPyro's SVI on the same model and guide, its first state, and the data."""
    import jax
    import numpyro
    from jax import numpy as jnp
    from numpyro import distributions as dist

    x, values = jnp.asarray(start.x), {name: jnp.asarray(value) for name, value in start.parameters.items()}
    zeros, positive = jnp.zeros(LATENT_DIM, x.dtype), dist.constraints.positive

    def model(x: Any) -> None:
        loading, loc = numpyro.param("loading", values["loading"]), numpyro.param("loc", values["loc"])
        noise = numpyro.param("noise", jnp.exp(values["noise_scale_unconstrained"]), constraint=positive)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z @ loading.T + loc, noise).to_event(1), obs=x)

    def guide(x: Any) -> None:
        mean, log_scale = jnp.split(numpyro.param("q", values["q"]), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(mean, jnp.exp(log_scale)).to_event(1))

    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), numpyro.infer.Trace_ELBO())
    return svi, svi.init(jax.random.PRNGKey(1), x), x


PEERS: dict[str, Callable[[Start, int], Side]] = {
    "pyro-ppl": by_pyro,
    "pyro-unvalidated": functools.partial(by_pyro, validated=False),
    "numpyro": by_numpyro,
}
JOB = Job("svi-step", "SVI step of a linear-Gaussian model", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
