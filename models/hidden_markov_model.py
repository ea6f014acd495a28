r"""Hidden Markov model.

A sequence is driven by a state that nobody sees: it moves among $K$ values by a Markov chain, and each
observation is drawn given the state of its step. The evidence is a sum over $K^T$ paths, which the forward
algorithm carries out in $T K^2$ operations; EM is the algorithm of Baum and Welch.

$$
z_1 \sim \operatorname{Categorical}(\pi), \qquad z_{t+1} \mid z_t = k \sim \operatorname{Categorical}(A_k), \qquad
x_t \mid z_t = k \sim p_k
$$

`emission` chooses $p_k$: `normal`, independent in each column; `multivariate-normal`, with a covariance matrix of
its own for each state; `poisson`, a rate for each column; `categorical`, a column of codes 0, 1, 2, .... `initial`
chooses $\pi$: `free` learns it; `uniform` keeps all states equally likely; `stationary` ties it to $A$ as its
stationary distribution, $\pi A = \pi$, the choice for one long series, in which a free $\pi$ becomes certain of the
first state.

A datum is a sequence. Name the column of a table that says which row belongs to which by `sequence`; the order of
rows is the order of steps. Without it the table is one sequence. Lengths may differ.

The posterior is a Markov chain too, with transitions that change from step to step. A guide that is independent
across time lacks them: it has the right states and too little doubt about where one ends and the next begins, and
its gap grows with the length of the series.

Under `stationary` the M step of $A$ has no closed form, because $\pi$ depends on $A$: it is then a numerical
maximum (L-BFGS) that is taken only where it does not lower the expected log joint, so EM stays monotone.

What goes wrong:

*Local maxima*. EM climbs to the nearest, and from one start that may be a poor one; `restarts` takes the best of
several. The wines stand in the order of their cultivars, so that their rows are a sequence. Each number of the first
line is EM from one start:

```python
options = {"states": 5, "method": "em", "progress": False}
nats = []
for seed in range(6):
    options |= {"restarts": 1, "seed": seed}
    one = ez.fit("hidden-markov-model", "wine-standardised", **options)
    nats.append(one.log_evidence().value)
options |= {"restarts": 10, "seed": 0}
ten = ez.fit("hidden-markov-model", "wine-standardised", **options)
print("one start each:", *(f"{value:.0f}" for value in nats), "nats, total")
print(f"best of ten starts: {ten.log_evidence().value:.0f} nats, total")
assert ten.log_evidence().value - min(nats) > 5
```

*Collapsed states*. The likelihood of normal emissions is unbounded, as a state can shrink onto one observation; so a
floor is part of the model: in units of the data's standard deviation per column, no state's variance is below `floor`
in any direction. A rate is never below $10^{-12}$ counts a step. States on the floor, or without steps, are reported as
collapsed, and among restarts a fit without one is preferred. Of independent noise twelve states make far too much:

```python
torch.manual_seed(0)
noise, new = torch.randn(40, 1), torch.randn(400, 1)
for states in (1, 12):
    options = {"states": states, "method": "em", "restarts": 3, "seed": 0}
    chain = ez.fit("hidden-markov-model", noise, **options, progress=False)
    own, other = chain.log_evidence().value / 40, chain.log_evidence(new).value / 400
    print(f"{states} states:", *chain.notes)
    print(f"    log p(x) {own:.2f} nats per step, of a new series {other:.2f}")
assert own > other + 1 and chain.notes
```

*A q without time*. A guide that is independent across time has a gap that grows with the length of the series:

```python
walk = ez.load_data("simulate:hidden-markov-model", rows=200, seed=3).x
gaps = {}
for steps in (50, 200):
    options = {"guide": "free-categorical", "steps": 200, "seed": 0}
    apart = ez.fit("hidden-markov-model", walk[:steps], **options, progress=False)
    gaps[steps] = apart.log_evidence().value - apart.elbo()
    print(f"{steps} steps: gap {gaps[steps]:.2f} nats, total")
assert gaps[200] > 2 * gaps[50] > 0
```

*Labels that carry no order*. The same model has $K!$ names.

References
----------
```bibtex
@article{baum1970maximization,
  author = {Baum, Leonard E. and Petrie, Ted and Soules, George and Weiss, Norman},
  title = {A Maximization Technique Occurring in the Statistical Analysis of Probabilistic Functions of {M}arkov
    Chains},
  journal = {The Annals of Mathematical Statistics}, volume = {41}, number = {1}, pages = {164--171}, year = {1970}
}
@article{rabiner1989tutorial,
  author = {Rabiner, Lawrence R.},
  title = {A Tutorial on Hidden {M}arkov Models and Selected Applications in Speech Recognition},
  journal = {Proceedings of the IEEE}, volume = {77}, number = {2}, pages = {257--286}, year = {1989}
}
@book{zucchini2016hidden,
  author = {Zucchini, Walter and MacDonald, Iain L. and Langrock, Roland},
  title = {Hidden {M}arkov Models for Time Series: An Introduction Using {R}},
  publisher = {CRC Press}, edition = {2}, year = {2016}
}
```
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from scipy.optimize import minimize
from torch import Tensor, nn

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field
from elbozoo.models.contract.sequences import SequenceEntry, observations, steps_mask
from elbozoo.models.distributions.emissions import EMISSIONS, CategoricalEmission, Emission, EmissionOptions, log_shares
from elbozoo.models.distributions.markov_chain import MarkovChain, PaddedSteps, SmoothedMarkovChain
from elbozoo.models.numerics import markov_chains

STAY = 0.8
M_STEP = {"maxiter": 20, "ftol": 1e-12, "gtol": 1e-9}  # of a mean over moves, nats


class HiddenMarkovModelOptions(EmissionOptions):
    """Options of :class:`HiddenMarkovModel`."""

    initial: Literal["free", "stationary", "uniform"] = Field(
        "free", description="distribution of the first state: learned, that of the chain in the long run, or equal"
    )


class BaumWelchStatistics(NamedTuple):
    """Expected sufficient statistics, summed over the steps of all sequences.

    Attributes
    ----------
    log_evidence : Tensor ()
        Sum of log p(x), nats.
    first : Tensor (K,)
        Expected number of sequences that begin in each state.
    transitions : Tensor (K, K)
        Expected number of moves from each state to each.
    counts : Tensor (K,)
        Expected number of steps in each state.
    sums : Tensor (K, ...)
        Weighted sums of the emission: of x - μ (normal), of x (Poisson), of each code (categorical).
    squares : Tensor
        Weighted squares of x - μ in the shape of the covariances; a zero where the emission has none.
    """

    log_evidence: Tensor
    first: Tensor
    transitions: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor


class HiddenMarkovModel(SequenceEntry):
    """Hidden Markov model: z_1 ~ Categorical(π), z_t+1 ~ Categorical(A_z_t), x_t ~ p_z_t.

    Attributes
    ----------
    emission : Emission
        The parameters of p_k, with K as their first dimension: ``means`` and ``factor``, ``log_rates``, or ``logits``.
    chain : StateChain
        π and A: ``log_initial`` (K,) and ``log_transition`` (K, K).
    """

    Options = HiddenMarkovModelOptions
    options: HiddenMarkovModelOptions
    example_columns = 1
    site_dims: ClassVar = {"z": ("step",)}

    def __init__(self, options: HiddenMarkovModelOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.emission: Emission = EMISSIONS[options.emission](options, columns)
        self.chain = StateChain(options.states, options.initial)

    @classmethod
    def check_data(cls, x: Tensor, options: HiddenMarkovModelOptions) -> None:
        """Refuse more states than steps, and observations that the emission cannot have."""
        rows = observations(x)[steps_mask(x)]
        if options.states > len(rows):
            raise InvalidInput(
                f"option states: found {options.states} for {len(rows)} rows, expected at most one state per row"
            )
        EMISSIONS[options.emission].check(rows, options)

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start from k-means of all steps (even restarts) or random steps (odd restarts), with states that last."""
        rows = observations(x)[steps_mask(x)]
        if isinstance(self.emission, CategoricalEmission) and self.options.categories is None:
            # Among the options, so that a saved model knows its size.
            self.options = self.options.model_copy(update={"categories": int(rows.max()) + 1})
            self.emission = CategoricalEmission(self.options, self.columns).to(x.dtype)
        self.emission.initialize(rows, restart)
        self.chain.initialize()

    def randomize(self) -> None:
        """Draw emissions that tell the states apart, and states that last for a few steps."""
        self.emission.randomize()
        self.chain.randomize()

    def forward(self, batch: Batch) -> Tensor:
        """z (B, T) ~ the chain; x (B, T, D) ~ the emission of each step's state."""
        steps = steps_mask(batch.x)
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", MarkovChain(self.chain.log_initial, self.chain.log_transition, steps))
            observed = self.emission.values(observations(batch.x))
            return pyro.sample("x", PaddedSteps(self.emission.given(z), steps), obs=observed)

    def step_by_step(self, batch: Batch) -> None:
        """Run the same program with a site for each step, ``z_1``, ``x_1``, ``z_2``, ..., that Pyro can enumerate.

        Its evidence by Pyro's own variable elimination shares nothing with the forward algorithm. Observations at
        padding are masked; the states there are left in, and sum to one.
        """
        steps, observed = steps_mask(batch.x), self.emission.values(observations(batch.x))
        log_initial, log_transition = self.chain.log_initial, self.chain.log_transition
        with pyro.plate("data", batch.total, subsample=batch.index):
            z: Tensor | None = None
            for t in pyro.markov(range(batch.x.shape[1])):
                logits = log_initial if z is None else log_transition[z]
                z = pyro.sample(f"z_{t + 1}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                with poutine.mask(mask=steps[:, t]):
                    pyro.sample(f"x_{t + 1}", self.emission.given(z), obs=observed[:, t])

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of each sequence, (S,), nats, by the forward algorithm (Rabiner 1989, section III.A)."""
        return self._filtered(x).log_evidence

    def posterior(self, x: Tensor) -> SmoothedMarkovChain:
        """Exact p(z given x): batch shape (S,), event shape (T,)."""
        return SmoothedMarkovChain(self._filtered(x).log_filtered, self.chain.log_transition, steps_mask(x))

    def most_likely_path(self, x: Tensor) -> Tensor:
        """Return the path with the largest p(z given x) of each sequence, (S, T), by Viterbi's algorithm."""
        return markov_chains.most_likely_path(*self._log_factors(x))

    def expected_log_joint(self, x: Tensor, probs: Tensor) -> Tensor:
        """E_q[log p(x, z)] of each sequence, (S,), nats, if the steps of q are independent with ``probs`` (S, T, K)."""
        log_initial, log_transition, log_emission, steps = self._log_factors(x)
        prior = MarkovChain(log_initial, log_transition, steps).expected_log_prob(probs)
        return prior + torch.where(steps, (probs * log_emission).sum(-1), 0.0).sum(-1)

    def expected_statistics(self, x: Tensor) -> BaumWelchStatistics:
        """E step: marginals and transitions of the posterior, and the moments that they weigh (Rabiner 1989, III.C)."""
        # Side by side in memory, once for all loops that read them.
        steps, rows = steps_mask(x), observations(x).flatten(0, 1).contiguous()
        log_emission = self.emission.log_density(rows).unflatten(0, x.shape[:2])
        expected = markov_chains.expect(self.chain.log_initial, self.chain.log_transition, log_emission, steps)
        kept, weights = steps.flatten(), expected.marginals.flatten(0, 1)
        if not kept.all():
            weights, rows = weights[kept], rows[kept]
        sums, squares = self.emission.statistics(rows, weights)
        log_evidence, first = expected.log_evidence.sum(), expected.marginals[:, 0].sum(0)
        return BaumWelchStatistics(log_evidence, first, expected.transitions, weights.sum(0), sums, squares)

    def maximize(self, statistics: BaumWelchStatistics) -> None:
        """M step: Rabiner (1989), equations 40, 52 and 53, under the floors; ``stationary`` see the page."""
        with torch.no_grad():
            self.chain.maximize(statistics.first, statistics.transitions)
            self.emission.maximize(statistics.counts, statistics.sums, statistics.squares)

    def degeneracy(self, statistics: BaumWelchStatistics) -> str | None:
        """Say which states have collapsed: on the floor, or left with too few steps."""
        with torch.no_grad():
            collapsed = self.emission.collapsed(statistics.counts)
        if not collapsed.any():
            return None
        states = torch.nonzero(collapsed).flatten().tolist()
        return f"states {states} collapsed ({self.emission.collapse})"

    def _log_factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_emission = self.emission.log_density(observations(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.chain.log_initial, self.chain.log_transition, log_emission, steps_mask(x)

    def _filtered(self, x: Tensor) -> markov_chains.Filtered:
        return markov_chains.forward_filter(*self._log_factors(x))


class StateChain(nn.Module):
    """The Markov chain of the states.

    Attributes
    ----------
    initial_logits : Parameter (K,)
        π, probabilities of the first state, as unnormalised logarithms; only where it is free.
    transition_logits : Parameter (K, K)
        A, probabilities of the moves, as unnormalised logarithms of its rows.
    """

    def __init__(self, states: int, initial: str) -> None:
        super().__init__()
        self.initial = initial
        if initial == "free":
            self.initial_logits = nn.Parameter(torch.zeros(states))
        self.transition_logits = nn.Parameter(torch.zeros(states, states))

    @property
    def log_initial(self) -> Tensor:
        """Log π, (K,)."""
        if self.initial == "free":
            return self.initial_logits.log_softmax(-1)
        if self.initial == "stationary":
            return markov_chains.log_stationary(self.log_transition)
        return torch.zeros_like(self.transition_logits[0]).log_softmax(-1)

    @property
    def log_transition(self) -> Tensor:
        """Log A, (K, K), rows sum to one."""
        return self.transition_logits.log_softmax(-1)

    def initialize(self) -> None:
        """Start in any state, and draw it anew after one step in five."""
        states = len(self.transition_logits)
        with torch.no_grad():
            stay = STAY * torch.eye(states).to(self.transition_logits) + (1 - STAY) / states
            self.transition_logits.copy_(stay.log())
            if self.initial == "free":
                self.initial_logits.zero_()

    def randomize(self) -> None:
        """Draw a chain that stays more often than not."""
        with torch.no_grad():
            self.transition_logits.normal_().mul_(0.7)
            self.transition_logits.diagonal().add_(2.0)
            if self.initial == "free":
                self.initial_logits.normal_()

    def maximize(self, first: Tensor, transitions: Tensor) -> None:
        """Set π and A to the maximum of the expected log probability of the paths."""
        closed_form = log_shares(transitions)
        if self.initial == "stationary":
            closed_form = _stationary_maximum(first, transitions, [self.log_transition, closed_form])
        elif self.initial == "free":
            self.initial_logits.copy_(log_shares(first))
        self.transition_logits.copy_(closed_form)


def _stationary_maximum(first: Tensor, transitions: Tensor, starts: list[Tensor]) -> Tensor:
    """Log transition probabilities that raise E[log p(z)] from the best of ``starts``, the first of them the present.

    E[log p(z)] = Σ first log π(A) + Σ transitions log A has no maximum in closed form, as π depends on A.
    """
    first, transitions = first.detach(), transitions.detach()
    total = first.sum() + transitions.sum()

    def expected(logits: Tensor) -> Tensor:
        log_transition = logits.log_softmax(-1)
        log_initial = markov_chains.log_stationary(log_transition)
        return ((first * log_initial).sum() + (transitions * log_transition).sum()) / total

    def loss_and_slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.enable_grad():
            logits = torch.from_numpy(flat).to(transitions).reshape(transitions.shape).requires_grad_()
            loss = -expected(logits)
            (slope,) = torch.autograd.grad(loss, logits)
        return float(loss.detach()), slope.flatten().double().numpy()

    best = max(starts, key=lambda start: float(expected(start)))
    result = minimize(loss_and_slope, best.flatten().double().numpy(), jac=True, method="L-BFGS-B", options=M_STEP)
    found = torch.from_numpy(result.x).to(best).reshape(best.shape).log_softmax(-1)
    # False for what is not a number, too.
    return found if bool(expected(found) > expected(best)) else best
