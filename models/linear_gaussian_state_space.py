r"""Linear Gaussian state space.

A state moves linearly with normal noise and is seen linearly with normal noise: factor analysis with a memory.
Local levels and trends, autoregressions behind noise and dynamic factors are all of this form, and everything
that is asked of them has a closed form, by recursion over the steps.

$$
z_1 \sim \mathcal N(m_1, P_1), \qquad z_t \mid z_{t-1} \sim \mathcal N(A z_{t-1}, Q), \qquad
x_t \mid z_t \sim \mathcal N(C z_t + d,\ R), \quad R = \operatorname{diag}(r_1, \dots, r_D)
$$

`structure=general` learns $A$, $Q$, $C$, $d$ and $R$. `local-level` gives each column a level $\mu$ of its own
that is a random walk, and `local-linear-trend` a slope $\beta$ besides, which is one too:

$$
x_t = \mu_t + \varepsilon_t, \qquad \mu_{t+1} = \mu_t + \beta_t + \eta_t, \qquad \beta_{t+1} = \beta_t + \zeta_t
$$

There only the variances of $\varepsilon$, $\eta$ and $\zeta$ are learned. The state holds levels and slopes in
standard deviations of their columns, levels measured from the columns' means, so that no guide depends on units.

The evidence comes from the Kalman filter, and the posterior, again a Gaussian chain, from the Rauch–Tung–Striebel
smoother. A guide that is independent across time has, at its best, the posterior's means and variances that are too
small: its gap is $\tfrac12(\sum_i \log J_{ii} - \log\det J)$ nats, with $J$ the precision of the whole path.
Values that are missing (NaN) are marginalised.

The first state: `initial=stated` takes $z_1 \sim \mathcal N(m, s^2 I)$ from the options; `free` learns $m_1$ and
$P_1$; `diffuse` gives $z_1$ a flat prior, exactly and not by a large variance. A flat prior is no probability, so
$p(x)$ is a density up to a constant that somebody has to choose. `likelihood_convention=durbin-koopman`, the
default, takes the prior density 1 for levels and slopes in the data's units, and `statsmodels` takes
$(2\pi)^{-1/2}$ for each of them, which is lower by $\tfrac12\log 2\pi = 0.919$ nats each: on the flow of the Nile
the maxima are −632.5456 and −633.4646. Under both, $p(x) = \int p(x, z)\,dz$ with the very $p(x, z)$ of the program,
and the posterior is proper, so that log p(x) = ELBO + KL holds and no bound exceeds log p(x). Such evidence can be
compared between models with the same flat prior only. Series cannot be drawn from a flat prior: simulation begins
about the first values of the data.

What goes wrong:

*Mean-field learns another θ.* A q that is independent across time draws $\theta$ to where its gap is small, which is
where the state moves much and the noise is little (Turner and Sahani 2011). EM, whose E step is exact, raises the
likelihood itself. On the flow of the Nile the two disagree about what a flood is, and the likelihood is on EM's side:

```python
nile = {"model": "linear-gaussian-state-space", "data": "nile", "progress": False}
em = ez.fit(**nile, method="em", structure="local-level")
independent = ez.fit(**nile, guide="mean-field", structure="local-level", steps=800)
moves, evidence = [], []
for fit in (em, independent):
    moves.append(float(fit.entry.innovation_variance.sqrt().detach()))
    noise = float(fit.entry.noise.sqrt().detach())
    evidence.append(fit.log_evidence().value)
    print(f"{fit.method}: level moves by {moves[-1]:.0f} a year,", end=" ")
    print(f"noise {noise:.0f}, log p(x) {evidence[-1]:.2f} nats")
assert moves[1] > 1.5 * moves[0] and evidence[1] < evidence[0] - 1
```

*Variances of zero.* A maximum at which a variance is zero is common in trends. EM approaches it slowly and would end at
the `floor`, without which a path would have no density. The slope of the Nile is such a case: its noise goes on falling
while the likelihood hardly moves, so that a fit that stops early shows a trend that wanders.

```python
slopes, evidence = [], []
trend = {"method": "em", "structure": "local-linear-trend"}
for iterations in (20, 200):
    fit = ez.fit(**nile, **trend, iterations=iterations)
    slopes.append(float(fit.entry.innovation_variance[1].sqrt().detach()))
    evidence.append(fit.log_evidence().value)
    print(f"{iterations} iterations: slope moves by {slopes[-1]:.2f} a year,", end=" ")
    print(f"log p(x) {evidence[-1]:.2f} nats")
assert slopes[1] < 0.5 * slopes[0] and evidence[1] - evidence[0] < 5
```

*The first state is seen once.* With `initial=free`, $P_1$ cannot be learned from one series: the likelihood is largest
where the first state is a constant, so that its spread shrinks to the floor for as long as EM goes on.

```python
spreads = []
general = {"method": "em", "latent_dim": 1, "initial": "free"}
for iterations in (2, 20, 200):
    fit = ez.fit(**nile, **general, iterations=iterations)
    spreads.append(float(fit.entry.initial_scale_tril.detach().squeeze()))
    print(f"{iterations} iterations: the first state spreads by {spreads[-1]:.3f}")
assert spreads[2] < 0.5 * spreads[1] < 0.5 * spreads[0]
```

*A state without units.* In the general structure the state is known up to an invertible map only: compare what it says
of the data, not loadings.

References
----------
```bibtex
@article{kalman1960new,
  author = {Kalman, Rudolf E.},
  title = {A New Approach to Linear Filtering and Prediction Problems},
  journal = {Journal of Basic Engineering}, volume = {82}, number = {1}, pages = {35--45}, year = {1960}
}
@article{rauch1965maximum,
  author = {Rauch, Herbert E. and Tung, F. and Striebel, Charlotte T.},
  title = {Maximum Likelihood Estimates of Linear Dynamic Systems},
  journal = {AIAA Journal}, volume = {3}, number = {8}, pages = {1445--1450}, year = {1965}
}
@article{shumway1982approach,
  author = {Shumway, Robert H. and Stoffer, David S.},
  title = {An Approach to Time Series Smoothing and Forecasting Using the {EM} Algorithm},
  journal = {Journal of Time Series Analysis}, volume = {3}, number = {4}, pages = {253--264}, year = {1982}
}
@article{dejong1991diffuse,
  author = {de Jong, Piet},
  title = {The Diffuse {K}alman Filter},
  journal = {The Annals of Statistics}, volume = {19}, number = {2}, pages = {1073--1083}, year = {1991}
}
@incollection{turner2011two,
  author = {Turner, Richard E. and Sahani, Maneesh},
  title = {Two Problems with Variational Expectation Maximisation for Time Series Models},
  booktitle = {Bayesian Time Series Models}, publisher = {Cambridge University Press}, pages = {104--124}, year = {2011}
}
@book{durbin2012time,
  author = {Durbin, James and Koopman, Siem Jan},
  title = {Time Series Analysis by State Space Methods},
  publisher = {Oxford University Press}, edition = {2}, year = {2012}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field
from elbozoo.models.contract.sequences import SequenceEntry, SequenceOptions, lengths, observations, steps_mask
from elbozoo.models.distributions.gaussian_chain import GaussianChain, SmoothedGaussianChain
from elbozoo.models.numerics import kalman
from elbozoo.models.numerics.covariances import KINDS, CovarianceKind
from elbozoo.models.numerics.kalman import Filtered, StateSpace

FLAT_LOG_DENSITY = {"durbin-koopman": 0.0, "statsmodels": -0.5 * math.log(2 * math.pi)}


class LinearGaussianStateSpaceOptions(SequenceOptions):
    """Options of :class:`LinearGaussianStateSpace`."""

    structure: Literal["general", "local-level", "local-linear-trend"] = Field(
        "general", description="what moves: a state with learned dynamics, or a level, or a level and slope, per column"
    )
    latent_dim: int = Field(2, ge=1, description="dimension K of the state under structure=general")
    initial: Literal["stated", "free", "diffuse"] | None = Field(
        None,
        description="distribution of the first state: that of the options, learned, or flat; none takes stated for "
        "structure=general and diffuse otherwise",
    )
    initial_mean: float = Field(
        0.0,
        description="mean of every element of the first state (level, slope: in the data's units) under initial=stated",
    )
    initial_scale: float = Field(
        1.0,
        gt=0,
        description="standard deviation of every element of the first state (in the same units) under initial=stated",
    )
    likelihood_convention: Literal["durbin-koopman", "statsmodels"] = Field(
        "durbin-koopman",
        description="constant of the evidence under initial=diffuse: statsmodels' is lower by half of log 2π, 0.919 "
        "nats, for each element of the state",
    )
    floor: float = Field(
        1e-8,
        gt=0,
        lt=1,
        description="least variance of every noise, as a share of the column's variance; of 1 for a general state",
    )


class StateSpaceStatistics(NamedTuple):
    """Expected sufficient statistics, summed over steps of all sequences, at the θ of the E step.

    w_t = z_t+1 - A z_t, e_t = x_t - C z_t - d, z̃ = (z, 1).

    Attributes
    ----------
    log_evidence : Tensor ()
        Sum of log p(x), nats.
    starts, moves : Tensor ()
        Number of sequences, and of pairs of neighbouring steps.
    start, start_scatter : Tensor (K,), (K, K)
        Sums of E[z_1 - m_1] and of E[(z_1 - m_1) (z_1 - m_1)ᵀ].
    past, move_past, move_scatter : Tensor (K, K)
        Sums of E[z_t z_tᵀ], E[w_t z_tᵀ] and E[w_t w_tᵀ] over pairs.
    seen, error_scatter : Tensor (D,)
        Number of observed values of each column, and the sum of E[e²] over them.
    error_state, state : Tensor (D, K + 1), (D, K + 1, K + 1)
        Sums of E[e z̃] and E[z̃ z̃ᵀ] over the steps at which the column was observed.
    """

    log_evidence: Tensor
    starts: Tensor
    start: Tensor
    start_scatter: Tensor
    moves: Tensor
    past: Tensor
    move_past: Tensor
    move_scatter: Tensor
    seen: Tensor
    error_scatter: Tensor
    error_state: Tensor
    state: Tensor


class Forecast(NamedTuple):
    """What is expected after the last step of each sequence: mean and variance of x, (S, steps, D)."""

    mean: Tensor
    variance: Tensor


class LinearGaussianStateSpace(SequenceEntry):
    """Linear Gaussian state space: z_t ~ N(A z_t-1, Q), x_t ~ N(C z_t + d, diag(r)).

    Under a fixed structure A, C and d are known. The state holds the levels of all columns, then their slopes, in
    standard deviations of the columns, and levels are measured from the columns' means.

    Attributes
    ----------
    transition : Parameter or buffer (K, K)
        A, the dynamics.
    loading : Parameter or buffer (D, K)
        C, what each column sees of the state.
    loc : Parameter or buffer (D,)
        d, offset of each column.
    process_factor : Parameter (1, K, K) or (1, K)
        Q, covariance of the noise of the dynamics, as its unconstrained factor, see
        ``models/numerics/covariances.py``.
    noise_factor : Parameter (1, D)
        R, variances of the noise of the columns, as their unconstrained factor.
    initial_mean : Parameter or buffer (K,)
        m_1, mean of the first state; where simulation begins under a diffuse start.
    initial_factor : Parameter (1, K, K)
        P_1, covariance of the first state, as its unconstrained factor; only where it is free.
    initial_scale : buffer (K,)
        P_1, as standard deviations of the first state; where it is not free.
    unit : buffer (D,)
        s, standard deviation of each column of the data, in which the floor is measured; no part of θ.
    """

    Options = LinearGaussianStateSpaceOptions
    options: LinearGaussianStateSpaceOptions
    example_columns = 3
    allows_missing = True
    site_dims: ClassVar = {"z": ("step", "state")}
    initial_mean: Tensor
    initial_scale: Tensor
    unit: Tensor

    def __init__(self, options: LinearGaussianStateSpaceOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.initial = options.initial or ("stated" if self.is_general else "diffuse")
        if self.is_general and self.initial == "diffuse":
            raise InvalidInput(
                "option initial: found diffuse with structure=general, expected stated or free: in the units of a "
                "learned state a flat prior has no scale, and the likelihood no maximum; or use "
                "structure=local-level or local-linear-trend"
            )
        transition, loading = _structure(options, columns)
        self.states = states = len(transition)
        hold = self._learn if self.is_general else self.register_buffer
        hold("transition", transition)
        hold("loading", loading)
        hold("loc", torch.zeros(columns))
        self.process_kind = KINDS["full" if self.is_general else "diagonal"]
        self.noise_kind = KINDS["diagonal"]
        self.process_factor = torch.nn.Parameter(torch.zeros(self.process_kind.factor_shape(1, states)))
        self.noise_factor = torch.nn.Parameter(torch.zeros(self.noise_kind.factor_shape(1, columns)))
        hold = self._learn if self.initial == "free" else self.register_buffer
        hold("initial_mean", torch.full((states,), options.initial_mean))
        if self.initial == "free":
            self.initial_factor = torch.nn.Parameter(torch.zeros(KINDS["full"].factor_shape(1, states)))
        else:
            self.register_buffer("initial_scale", torch.full((states,), options.initial_scale))
        self.register_buffer("unit", torch.ones(columns))

    @property
    def is_general(self) -> bool:
        """Whether the dynamics and the loading are learned."""
        return self.options.structure == "general"

    @classmethod
    def check_data(cls, x: Tensor, options: LinearGaussianStateSpaceOptions) -> None:
        """Refuse columns without variation, too many states, and series too short for a diffuse start."""
        values = observations(x)[steps_mask(x)]
        empty = torch.nonzero(values.isnan().all(0)).flatten().tolist()
        if empty:
            raise InvalidInput(
                f"columns {[c + 1 for c in empty]} (counted from 1) hold no value, expected some in each column: "
                "leave them out with --columns"
            )
        varies = [bool((column[~column.isnan()] != column[~column.isnan()][0]).any()) for column in values.unbind(1)]
        constant = [c + 1 for c, does in enumerate(varies) if not does]
        if constant:
            raise InvalidInput(
                f"columns {constant} (counted from 1) are constant, expected columns that vary: without variance the "
                "noise is zero and the likelihood unbounded; leave them out with --columns"
            )
        if options.structure == "general":
            if options.latent_dim >= len(values):
                raise InvalidInput(
                    f"option latent_dim: found {options.latent_dim} for {len(values)} steps, expected fewer than steps"
                )
        elif options.initial in (None, "diffuse"):
            _refuse_undetermined(x, options.structure)

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start from a random loading and random memories of each state, or from the variance of the differences."""
        values, seen = _values(x), _seen(x)
        count = seen.sum((0, 1))
        mean = values.sum((0, 1)) / count
        variance = ((values - mean) * seen).square().sum((0, 1)) / count
        with torch.no_grad():
            self.unit.copy_(variance.sqrt())
            self.loc.copy_(mean)
            if self.is_general:
                memory = 0.3 + 0.6 * torch.rand(self.states, dtype=x.dtype)
                self.transition.copy_(torch.diag(memory))
                self.loading.normal_().mul_(self.unit[:, None] / (2 * self.states) ** 0.5)
                process, noise = 1 - memory.square(), 0.5 * variance
            else:
                self.loading[:, : self.columns] = torch.diag(self.unit)
                process, noise = self._starting_variances(values, seen, variance)
                if restart > 0:
                    process, noise = process * torch.randn_like(process).exp(), noise * torch.randn_like(noise).exp()
            self._set_process(torch.diag(process))
            self._set_noise(noise)
            self._set_start(x)

    def randomize(self) -> None:
        """Draw a loading of unit variance and a slowly turning state of unit size; noise of half that scale."""
        with torch.no_grad():
            if self.is_general:
                turn = torch.linalg.qr(torch.randn_like(self.transition)).Q
                self.transition.copy_(0.5 * turn + 0.3 * torch.eye(self.states))
                self.loading.normal_()
                self.loc.normal_()
                process = torch.full((self.states,), 0.4, dtype=self.unit.dtype)
            else:
                process = 0.5 ** (2 + 4 * (torch.arange(self.states) // self.columns).to(self.unit.dtype))
            self._set_process(torch.diag(process))
            self._set_noise(torch.full_like(self.unit, 0.25))

    def forward(self, batch: Batch) -> Tensor:
        """z (B, T, K), a Gaussian chain; x (B, T, D) ~ N(C z + d, diag(r)) where it was observed."""
        states = self.chain(steps_mask(batch.x))
        scale = self.noise.sqrt()
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", states)
            seen = dist.Normal(z @ self.loading.mT + self.loc, scale).mask(_seen(batch.x)).to_event(2)
            return pyro.sample("x", seen, obs=_values(batch.x))

    @property
    def state_unit(self) -> Tensor:
        """What one is in each element of the state, (K,), in the data's units; ones for a general state."""
        if self.is_general:
            return torch.ones_like(self.initial_mean)
        return self.unit.repeat(self.states // self.columns)

    @property
    def innovation_variance(self) -> Tensor:
        """Variances (K,) of the noise of each element of the state: of levels, then slopes, in the data's units."""
        return self.process.diagonal() * self.state_unit.square()

    @property
    def process_scale_tril(self) -> Tensor:
        """Cholesky factor (K, K) of Q."""
        scale = self.process_kind.scale(self.process_factor, self._ones(), self.options.floor)[0]
        return scale if self.is_general else torch.diag_embed(scale)

    @property
    def process(self) -> Tensor:
        """Q, (K, K), a covariance."""
        scale_tril = self.process_scale_tril
        return scale_tril @ scale_tril.mT

    @property
    def noise(self) -> Tensor:
        """Variance r of each column's noise, (D,), never below the floor."""
        return self.noise_kind.scale(self.noise_factor, self.unit, self.options.floor)[0].square()

    @property
    def initial_scale_tril(self) -> Tensor:
        """Cholesky factor (K, K) of P_1; of where simulation begins under a diffuse start."""
        if self.initial == "free":
            return KINDS["full"].scale(self.initial_factor, self._ones(), self.options.floor)[0]
        return torch.diag_embed(self.initial_scale)

    @property
    def log_flat(self) -> float | None:
        """Log density of z_1 under a diffuse start, nats; None where the start has a distribution.

        The convention is for levels and slopes in the data's units; the units are the Jacobian.
        """
        if self.initial != "diffuse":
            return None
        jacobian = float(self.state_unit.log().sum())
        return jacobian + self.states * FLAT_LOG_DENSITY[self.options.likelihood_convention]

    def chain(self, steps: Tensor) -> GaussianChain:
        """p(z), the prior of the paths with the steps (S, T) of bool: batch shape (S,), event shape (T, K)."""
        return GaussianChain(
            self.initial_mean,
            self.initial_scale_tril,
            self.transition,
            self.process_scale_tril,
            steps,
            self.log_flat,
        )

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of each sequence, (S,), nats: the Kalman filter's prediction errors."""
        _, filtered = self._filter(x)
        return filtered.log_density + (self.log_flat or 0.0)

    def posterior(self, x: Tensor) -> SmoothedGaussianChain:
        """Exact p(z given x): batch shape (S,), event shape (T, K)."""
        space, filtered = self._filter(x)
        steps = steps_mask(x)
        return SmoothedGaussianChain(kalman.backward_kernels(filtered, space, steps), steps)

    def forecast(self, x: Tensor, steps: int) -> Forecast:
        """Mean and variance of the next ``steps`` observations after the last step of each sequence."""
        with torch.no_grad():
            last = lengths(x) - 1
            rows = torch.arange(len(x))
            moments = self.posterior(x).smoothed()
            mean, covariance = moments.mean[rows, last], moments.covariance[rows, last]
            means, variances = [], []
            for _ in range(steps):
                mean = mean @ self.transition.mT
                covariance = self.transition @ covariance @ self.transition.mT + self.process
                means.append(mean @ self.loading.mT + self.loc)
                variances.append(((self.loading @ covariance) * self.loading).sum(-1) + self.noise)
            return Forecast(torch.stack(means, 1), torch.stack(variances, 1))

    def expected_statistics(self, x: Tensor) -> StateSpaceStatistics:
        """E step: Shumway & Stoffer (1982), with moments of the noises in place of differences of large moments."""
        space, filtered = self._filter(x)
        steps = steps_mask(x)
        kernels = kalman.backward_kernels(filtered, space, steps)
        smoothed = kalman.rts_smoother(kernels)
        moves = kalman.smoothed_disturbances(kernels, smoothed, space.transition)
        mean, covariance = smoothed.mean, smoothed.covariance
        first, pairs, seen = mean[:, 0] - self.initial_mean, steps[:, 1:].to(x.dtype), _seen(x).to(x.dtype)
        past = mean[:, :-1]

        def over_pairs(one: Tensor, other: Tensor, spread: Tensor) -> Tensor:
            weighed = (one * pairs[..., None]).flatten(0, 1)
            return weighed.mT @ other.flatten(0, 1) + (spread * pairs[..., None, None]).sum((0, 1))

        augmented = torch.nn.functional.pad(mean, (0, 1), value=1.0)
        spread = torch.nn.functional.pad(covariance, (0, 1, 0, 1))
        error = (_values(x) - mean @ self.loading.mT - self.loc) * seen
        cross = covariance @ self.loading.mT  # (S, T, K, D)
        error_variance = (self.loading.mT * cross).sum(-2)
        return StateSpaceStatistics(
            filtered.log_density.sum() + len(x) * (self.log_flat or 0.0),
            torch.tensor(len(x), dtype=x.dtype),
            first.sum(0),
            first.mT @ first + covariance[:, 0].sum(0),
            pairs.sum(),
            over_pairs(past, past, covariance[:, :-1]),
            over_pairs(moves.mean, past, moves.past),
            over_pairs(moves.mean, moves.mean, moves.covariance),
            seen.sum((0, 1)),
            (error.square() + seen * error_variance).sum((0, 1)),
            torch.einsum("std,stk->dk", error, augmented)
            - torch.nn.functional.pad(torch.einsum("std,stkd->dk", seen, cross), (0, 1)),
            torch.einsum("std,stij->dij", seen, augmented[..., None] * augmented[..., None, :] + spread),
        )

    def maximize(self, statistics: StateSpaceStatistics) -> None:
        """M step: regressions of the steps on the state and of x on the state, under the floor; then the variances.

        Shumway & Stoffer (1982); a variance below the floor is best at the floor. Sequences of one step each say
        nothing about how the state moves, and leave A and Q as they are.
        """
        s = statistics
        with torch.no_grad():
            move_scatter, error_scatter = s.move_scatter, s.error_scatter
            if self.is_general:
                if s.moves > 0:
                    change = torch.linalg.solve(s.past, s.move_past.mT).mT
                    self.transition.add_(change)
                    move_scatter = move_scatter - change @ s.move_past.mT
                coefficients = torch.linalg.solve(s.state, s.error_state[..., None])[..., 0]
                self.loading.add_(coefficients[:, :-1])
                self.loc.add_(coefficients[:, -1])
                error_scatter = error_scatter - (coefficients * s.error_state).sum(-1)
            if s.moves > 0:
                self._set_process(move_scatter / s.moves)
            self._set_noise(error_scatter / s.seen)
            if self.initial == "free":
                shift = s.start / s.starts
                self._set_initial(s.start_scatter / s.starts - shift[:, None] * shift)
                self.initial_mean.add_(shift)

    def degeneracy(self, statistics: StateSpaceStatistics) -> str | None:
        """Say which columns have lost their noise."""
        with torch.no_grad():
            share = self.noise / self.unit.square()
        names = [self.names[c] for c in torch.nonzero(share < 2 * self.options.floor).flatten().tolist()]
        return f"the noise of columns {names} is on the floor: the state reproduces them" if names else None

    def coords(self) -> dict[str, Sequence[str]]:
        """Label the states of a fixed structure by what they are of which column."""
        parts = ("level", "slope")[: self.states // self.columns]
        return {} if self.is_general else {"state": [f"{part} of {name}" for part in parts for name in self.names]}

    def _filter(self, x: Tensor) -> tuple[StateSpace, Filtered]:
        if self.initial == "diffuse":
            _refuse_undetermined(x, self.options.structure)
        values = torch.where(_seen(x), observations(x), math.nan)
        scale_tril = self.initial_scale_tril
        diffuse = self.initial == "diffuse"
        space = StateSpace(
            self._in_state_units(_first_values(x)) if diffuse else self.initial_mean,
            scale_tril @ scale_tril.mT,
            self.transition,
            self.process,
            self.loading,
            self.loc,
            self.noise,
            diffuse,
        )
        return space, kalman.kalman_filter(values, space, steps_mask(x))

    def _learn(self, name: str, start: Tensor) -> None:
        setattr(self, name, torch.nn.Parameter(start))

    def _starting_variances(self, values: Tensor, seen: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Split the variance of the differences of neighbours, σ²_η + 2 σ²_ε, evenly; slopes move a hundredth of it."""
        pairs = seen[:, 1:] & seen[:, :-1]
        count = pairs.sum((0, 1))
        squares = (values.diff(dim=1).square() * pairs).sum((0, 1)) / count.clamp(min=1)
        noise = torch.where(squares > 0, squares, variance) / 3
        share = noise / self.unit.square()
        return torch.cat([share, 0.01 * share])[: self.states], noise

    def _set_start(self, x: Tensor) -> None:
        """Set the first state: as stated, or about the first values of the sequences."""
        if self.initial == "stated":
            levels = torch.full_like(self.initial_mean, self.options.initial_mean)
            if not self.is_general:
                levels[: self.columns] -= self.loc
            self.initial_mean.copy_(levels / self.state_unit)
            self.initial_scale.copy_(self.options.initial_scale / self.state_unit)
            return
        if not self.is_general:
            seen_ever = _seen(x).any(1).to(x.dtype)
            mean = (_first_values(x) * seen_ever).sum(0, keepdim=True) / seen_ever.sum(0)
            self.initial_mean.copy_(self._in_state_units(mean)[0])
        if self.initial == "free":
            self._set_initial(torch.eye(self.states, dtype=x.dtype))
        else:
            self.initial_scale.fill_(1.0)

    def _in_state_units(self, levels: Tensor) -> Tensor:
        """Levels (S, D) in the data's units as states (S, K) without slope."""
        return torch.nn.functional.pad((levels - self.loc) / self.unit, (0, self.states - self.columns))

    def _ones(self) -> Tensor:
        return torch.ones_like(self.initial_mean)

    def _set_process(self, covariance: Tensor) -> None:
        scatter = covariance if self.is_general else covariance.diagonal()
        self.process_factor.copy_(_factor(self.process_kind, scatter, self._ones(), self.options.floor))

    def _set_noise(self, variance: Tensor) -> None:
        self.noise_factor.copy_(_factor(self.noise_kind, variance, self.unit, self.options.floor))

    def _set_initial(self, covariance: Tensor) -> None:
        if self.initial == "free":
            self.initial_factor.copy_(_factor(KINDS["full"], covariance, self._ones(), self.options.floor))


def _structure(options: LinearGaussianStateSpaceOptions, columns: int) -> tuple[Tensor, Tensor]:
    """Return A (K, K) and C (D, K): of the structure, or zeros of the right shape where they are learned."""
    identity = torch.eye(columns)
    if options.structure == "general":
        return torch.zeros(options.latent_dim, options.latent_dim), torch.zeros(columns, options.latent_dim)
    if options.structure == "local-level":
        return identity, identity
    transition = torch.cat([torch.cat([identity, identity], 1), torch.cat([torch.zeros_like(identity), identity], 1)])
    return transition, torch.cat([identity, torch.zeros_like(identity)], 1)


def _refuse_undetermined(x: Tensor, structure: str) -> None:
    """Refuse sequences in which a flat first state stays flat: its evidence would be infinite."""
    needed = 1 if structure == "local-level" else 2
    count = _seen(x).sum(1)
    short = torch.nonzero(count < needed).tolist()
    if short:
        sequence, column = short[0]
        raise InvalidInput(
            f"sequence {sequence + 1}, column {column + 1} (counted from 1): found {int(count[sequence, column])} "
            f"values, expected at least {needed} for structure={structure} with initial=diffuse; leave the sequence "
            "out, or use initial=stated"
        )


def _seen(x: Tensor) -> Tensor:
    """Which values were observed, (S, T, D) of bool."""
    return ~observations(x).isnan() & steps_mask(x)[..., None]


def _values(x: Tensor) -> Tensor:
    """Observations (S, T, D), zero where there is none: NaN times zero would be NaN, in gradients too."""
    return torch.where(_seen(x), observations(x), 0)


def _first_values(x: Tensor) -> Tensor:
    """First observed value of each column of each sequence, (S, D); zero where there is none."""
    seen = _seen(x)
    return _values(x).gather(1, seen.to(torch.uint8).argmax(1, keepdim=True))[:, 0]


def _factor(kind: CovarianceKind, covariance: Tensor, unit: Tensor, floor: float) -> Tensor:
    """Factor of the likeliest covariance above the floor, for the one ``covariance``, or diagonal of one."""
    one, no_shift = torch.ones(1, dtype=unit.dtype), torch.zeros(1, len(unit), dtype=unit.dtype)
    return kind.maximize(covariance[None], no_shift, one, unit, floor)
