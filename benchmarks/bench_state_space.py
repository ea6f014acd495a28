"""Log-likelihood and smoother of a linear-Gaussian state space, beside statsmodels and dynamax, at one θ.

statsmodels runs its compiled filter with its own defaults (the steady state is used once it has set in), without what
the answer does not need: the likelihood keeps no moments, and the smoother gives means and covariances of the states
alone. dynamax is compiled before the clock starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from harness import Agreement, Contest, Job, Side, main, whole

STATES, COLUMNS = 4, 3
STEPS = {"small": 10_000, "full": 10_000, "tiny": 60}
CALLS = {"small": 5, "full": 20, "tiny": 1}
TARGETS = {"statsmodels": 1.0, "dynamax": 5.0}
AGREEMENTS = {
    "log-likelihood": Agreement("log p(x), the same sum in another order", relative=1e-8),
    "smoother": Agreement(
        "sum of all means and variances of the states, which has both signs", relative=1e-6, absolute=1e-6
    ),
}


class Start(NamedTuple):
    """One series, the entry at its θ, and the same θ as float64 arrays by name."""

    x: Any
    arranged: Any
    entry: Any
    theta: dict[str, Any]


def contests(size: str, device: str) -> list[Contest]:
    """Return both jobs beside each peer."""
    return [_contest(peer, what, STEPS[size], CALLS[size]) for what in AGREEMENTS for peer in TARGETS]


def _contest(peer: str, what: str, steps: int, calls: int) -> Contest:
    def sides() -> tuple[Side, Side]:
        start = at_theta(steps)
        other = {"statsmodels": by_statsmodels, "dynamax": by_dynamax}[peer]
        return _repeated(ours(start, what), calls), _repeated(other(start, what), calls)

    return Contest(
        name=f"{what}-{peer}",
        peer="dynamax, jitted" if peer == "dynamax" else peer,
        packages=(peer, "jaxlib") if peer == "dynamax" else (peer,),
        sizes={"steps": steps, "states": STATES, "outputs": COLUMNS, "precision": "float64"},
        target=TARGETS[peer],
        sides=sides,
        agreement=AGREEMENTS[what],
        unit="call",
    )


def _repeated(run: Callable[[], float], calls: int) -> Side:
    return whole(lambda: [run() for _ in range(calls)][-1], calls)


@cache
def at_theta(steps: int) -> Start:
    """Draw a series from the model; θ is what it was drawn from."""
    import torch

    from elbozoo.models import get_entry
    from elbozoo.models.contract.isolation import isolated

    entry = get_entry("linear-gaussian-state-space").example(COLUMNS, seed=0, latent_dim=STATES)
    with isolated(1), torch.no_grad():
        arranged, _ = entry._simulate(entry.template(1, steps))
    with torch.no_grad():
        initial = entry.initial_scale_tril
        theta = {
            "transition": entry.transition,
            "process": entry.process,
            "loading": entry.loading,
            "loc": entry.loc,
            "noise": torch.diag(entry.noise),
            "initial_mean": entry.initial_mean,
            "initial_covariance": initial @ initial.mT,
        }
    return Start(
        arranged[0, :, 1:].numpy(),
        arranged,
        entry,
        {name: value.detach().numpy().copy() for name, value in theta.items()},
    )


def ours(start: Start, what: str) -> Callable[[], float]:
    """Return our call: ``log_evidence``, or the moments of ``posterior``."""
    import torch

    entry, x = start.entry, start.arranged

    def log_likelihood() -> float:
        with torch.no_grad():
            return float(entry.log_evidence(x))

    def smoother() -> float:
        with torch.no_grad():
            moments = entry.posterior(x).smoothed()
        return float(moments.mean.sum() + moments.covariance.diagonal(dim1=-2, dim2=-1).sum())

    return log_likelihood if what == "log-likelihood" else smoother


def by_statsmodels(start: Start, what: str) -> Callable[[], float]:
    """Return the call of statsmodels."""
    import numpy as np
    from statsmodels.tsa.statespace.kalman_smoother import SMOOTHER_STATE, SMOOTHER_STATE_COV, KalmanSmoother

    theta = start.theta
    model = KalmanSmoother(k_endog=COLUMNS, k_states=STATES)
    model.bind(np.asfortranarray(start.x.T))
    model["design"], model["obs_intercept"] = theta["loading"], theta["loc"][:, None]
    model["obs_cov"], model["state_cov"] = theta["noise"], theta["process"]
    model["transition"], model["selection"] = theta["transition"], np.eye(STATES)
    model.initialize_known(theta["initial_mean"], theta["initial_covariance"])

    def smoother() -> float:
        smoothed = model.smooth(smoother_output=SMOOTHER_STATE | SMOOTHER_STATE_COV)
        variances = np.einsum("iit->", smoothed.smoothed_state_cov)
        return float(smoothed.smoothed_state.sum() + variances)

    return (lambda: float(model.loglike())) if what == "log-likelihood" else smoother


def by_dynamax(start: Start, what: str) -> Callable[[], float]:
    """Return the compiled call of dynamax."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM, lgssm_filter, lgssm_smoother
    from jax import numpy as jnp

    theta = {name: jnp.asarray(value) for name, value in start.theta.items()}
    parameters, _ = LinearGaussianSSM(STATES, COLUMNS, has_dynamics_bias=False, has_emissions_bias=True).initialize(
        initial_mean=theta["initial_mean"],
        initial_covariance=theta["initial_covariance"],
        dynamics_weights=theta["transition"],
        dynamics_covariance=theta["process"],
        emission_weights=theta["loading"],
        emission_bias=theta["loc"],
        emission_covariance=theta["noise"],
    )
    x = jnp.asarray(start.x)
    log_density = jax.jit(lambda parameters, x: lgssm_filter(parameters, x).marginal_loglik)

    @jax.jit
    def smooth(parameters: Any, x: Any) -> Any:
        found = lgssm_smoother(parameters, x)
        return found.smoothed_means, found.smoothed_covariances  # what else it finds is not computed

    def smoother() -> float:
        means, covariances = jax.block_until_ready(smooth(parameters, x))
        return float(means.sum() + jnp.trace(covariances, axis1=1, axis2=2).sum())

    return (lambda: float(log_density(parameters, x))) if what == "log-likelihood" else smoother


JOB = Job("state-space", "Log-likelihood and smoother of a linear-Gaussian state space", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
