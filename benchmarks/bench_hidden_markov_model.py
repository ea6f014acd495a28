"""An EM iteration of a hidden Markov model with normal emissions, beside hmmlearn's and dynamax's, from one start.

All maximise the likelihood: the peers' priors are off, but for what dynamax's mode divides by. hmmlearn runs in both of
its implementations, of which scaling is the faster and not the default. dynamax runs its own E and M steps in one
compiled ``lax.scan``, as in its ``fit_em``, which would compile anew at each call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from harness import Agreement, Contest, Job, Side, em_iterations, main, marginal

STATES, COLUMNS = 5, 4
SHAPES = {"small": [(1, 10_000), (100, 1_000)], "full": [(1, 10_000), (100, 1_000)], "tiny": [(3, 200)]}
ITERATIONS = {"small": 4, "full": 10, "tiny": 3}
FLAT = 1 + 1e-6  # at 1 the mode that dynamax takes is not a number once a state has no count
TARGETS = {"hmmlearn": 5.0, "dynamax": 1.0}
EXACT = Agreement(
    "log p(x) per step after as many iterations from one start; sums in another order, magnified by EM", absolute=1e-6
)


class Start(NamedTuple):
    """Sequences (S, T, D) and the starting values, as float64 arrays."""

    x: Any
    arranged: Any
    state: dict[str, Any]
    initial: Any
    transition: Any
    means: Any
    covariances: Any


def contests(size: str, device: str) -> list[Contest]:
    """Return each peer on each shape of data."""
    return [
        _contest(peer, *shape, ITERATIONS[size]) for shape in SHAPES[size] for peer in ("scaling", "log", "dynamax")
    ]


def _contest(peer: str, sequences: int, steps: int, iterations: int) -> Contest:
    package = "dynamax" if peer == "dynamax" else "hmmlearn"

    def sides() -> tuple[Side, Side]:
        start = starting_values(sequences, steps)
        other = by_dynamax(start) if peer == "dynamax" else by_hmmlearn(start, peer)
        return marginal(ours(start), iterations), marginal(other, iterations)

    return Contest(
        name=f"{peer}-{sequences}x{steps}",
        peer="dynamax, jitted" if peer == "dynamax" else f"hmmlearn, {peer}",
        packages=(package, "jaxlib") if peer == "dynamax" else (package,),
        sizes={"sequences": sequences, "steps": steps, "states": STATES, "columns": COLUMNS},
        target=TARGETS[package],
        sides=sides,
        agreement=_nearly(sequences * steps) if peer == "dynamax" else EXACT,
        unit="EM iteration",
    )


def _nearly(steps: int) -> Agreement:
    """Return what is allowed to dynamax, whose M step is the mode under an improper prior."""
    reason = (
        "log p(x) per step after as many iterations from one start; dynamax divides scatter matrices by 2 D + 2 more "
        "than the steps of a state, which costs a few nats in all"
    )
    return Agreement(reason, absolute=10.0 / steps)


@cache
def starting_values(sequences: int, steps: int) -> Start:
    """Draw sequences from the model, and let the entry find a start on one of them."""
    import torch

    from elbozoo.models import get_entry
    from elbozoo.models.contract.isolation import isolated

    kind = get_entry("hidden-markov-model")
    truth = kind.example(COLUMNS, seed=0, states=STATES, emission="multivariate-normal")
    with isolated(1), torch.no_grad():
        arranged, _ = truth._simulate(truth.template(sequences, steps))
    entry = kind.from_data(arranged[:1], states=STATES, emission="multivariate-normal", seed=3)
    with torch.no_grad():
        covariances = entry.emission.covariances
        return Start(
            arranged[..., 1:].numpy(),
            arranged,
            {name: value.clone() for name, value in entry.state_dict().items()},
            entry.chain.log_initial.exp().numpy(),
            entry.chain.log_transition.exp().numpy(),
            entry.emission.means.numpy().copy(),
            covariances.numpy().copy(),
        )


def ours(start: Start) -> Callable[[int], float]:
    """Return what runs our EM, and log p(x) per step at the θ of the last E step."""
    from elbozoo.models import get_entry

    entry = get_entry("hidden-markov-model").example(COLUMNS, states=STATES, emission="multivariate-normal")

    def run(iterations: int) -> float:
        entry.load_state_dict(start.state)
        return em_iterations(entry, start.arranged, iterations) / start.x[..., 0].size

    return run


def by_hmmlearn(start: Start, implementation: str) -> Callable[[int], float]:
    """Return what runs hmmlearn's EM, without its prior on the covariances, and log p(x) of its last E step."""
    import numpy as np
    from hmmlearn.base import ConvergenceMonitor
    from hmmlearn.hmm import GaussianHMM

    rows = np.ascontiguousarray(start.x.reshape(-1, COLUMNS))
    lengths = [start.x.shape[1]] * len(start.x)

    def run(iterations: int) -> float:
        model = GaussianHMM(
            STATES, "full", n_iter=iterations, init_params="", covars_prior=0.0, implementation=implementation
        )
        model.monitor_ = ConvergenceMonitor(tol=-np.inf, n_iter=iterations, verbose=False)
        model.startprob_, model.transmat_ = start.initial, start.transition
        model.means_, model.covars_ = start.means, start.covariances
        model.fit(rows, lengths)
        assert model.monitor_.iter == iterations
        return float(model.monitor_.history[-1]) / len(rows)

    return run


def by_dynamax(start: Start) -> Callable[[int], float]:
    """Return what runs dynamax's EM, all iterations in one compiled call, and log p(x) of its last E step."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from dynamax.hidden_markov_model import GaussianHMM
    from jax import numpy as jnp

    x = jnp.asarray(start.x)
    model = GaussianHMM(
        STATES,
        COLUMNS,
        initial_probs_concentration=FLAT,
        transition_matrix_concentration=FLAT,
    )
    first, properties = model.initialize(
        initial_probs=jnp.asarray(start.initial),
        transition_matrix=jnp.asarray(start.transition),
        emission_means=jnp.asarray(start.means),
        emission_covariances=jnp.asarray(start.covariances),
    )
    carry = (first, model.initialize_m_step_state(first, properties))

    def step(carry: Any, _: Any) -> Any:
        parameters, state = carry
        statistics, log_evidence = jax.vmap(lambda one: model.e_step(parameters, one))(x)
        return model.m_step(parameters, properties, statistics, state), log_evidence.sum()

    loop = jax.jit(lambda carry, length: jax.lax.scan(step, carry, None, length=length), static_argnums=1)

    def run(iterations: int) -> float:
        _, path = jax.block_until_ready(loop(carry, iterations))
        return float(path[-1]) / start.x[..., 0].size

    return run


JOB = Job("hidden-markov-model", "EM of a hidden Markov model", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
