r"""Normal columns with unknown mean and unknown precision.

Two global latents per column, and the smallest model in which mean-field is wrong: given the data, a small
precision leaves room for the mean, so the two depend on each other and no product of factors is the posterior.

$$
\tau_d \sim \mathrm{Gamma}(a_0, b_0), \qquad \mu_d \mid \tau_d \sim \mathcal N\bigl(m_0,\ 1/(k_0 \tau_d)\bigr), \qquad
x_{nd} \mid \mu_d, \tau_d \sim \mathcal N(\mu_d,\ 1/\tau_d)
$$

with shape $a_0$ and rate $b_0$. The posterior has the same form. In each column, with mean $\bar x$ and
$S = \sum_n (x_n - \bar x)^2$,

$$
k_N = k_0 + N, \quad m_N = \frac{k_0 m_0 + N \bar x}{k_N}, \quad a_N = a_0 + \tfrac N2, \quad
b_N = b_0 + \tfrac12 S + \frac{k_0 N (\bar x - m_0)^2}{2 k_N},
$$

the next row is Student-t with $2 a_N$ degrees of freedom, location $m_N$ and scale
$\sqrt{b_N (k_N + 1) / (a_N k_N)}$, and

$$
\log p(x) = \log \frac{\Gamma(a_N)}{\Gamma(a_0)} + a_0 \log b_0 - a_N \log b_N + \tfrac12 \log \frac{k_0}{k_N}
 - \tfrac N2 \log 2\pi .
$$

Coordinate ascent (method `cavi`) finds the best $q(\mu)\, q(\tau)$. Its fixed point is known:
$q(\tau) = \mathrm{Gamma}\bigl(a_N + \tfrac12,\ b_N (a_N + \tfrac12)/a_N\bigr)$, which has the right mean $a_N/b_N$, and
$q(\mu) = \mathcal N\bigl(m_N,\ b_N/(a_N k_N)\bigr)$. So the gap per column is

$$
\bigl(a_N + \tfrac12\bigr) \log \bigl(a_N + \tfrac12\bigr) - a_N \log a_N - \tfrac12
 + \log \frac{\Gamma(a_N)}{\Gamma(a_N + \tfrac12)} \approx \frac{1}{4 a_N},
$$

whatever the data. A mean-field normal guide, which lives on $\mu$ and $\log \tau$, comes to
$\log \Gamma(a_N) - a_N \log a_N + a_N - \tfrac12 \log 2\pi + \tfrac12 \log(a_N + \tfrac12) \approx 1/(3 a_N)$.

What goes wrong:

*A prior far from the data.* The prior's spread of the mean is measured in the data's own noise, $1/\sqrt{k_0 \tau}$, so
data far from $m_0$ on the scale of their noise make the precision look small; state `prior_mean`, or lower
`prior_count`. No diagnostic of the bound sees it, since the posterior is exact: only another prior's log p(x) does.

```python
draw = torch.Generator().manual_seed(0)
x = 100 + torch.randn(50, 1, generator=draw)
spreads = {}
for prior_mean in (0.0, 100.0):
    settings = {"prior_mean": prior_mean, "progress": False}
    fit = ez.fit("normal-gamma", x, guide="exact", **settings)
    spreads[prior_mean] = float(fit.entry.predictive(fit.x).stddev)
    ledger = fit.ledger()
    print(f"prior mean {prior_mean:.0f}: the next row ± {spreads[prior_mean]:.1f}")
    print(f"  gap {abs(ledger.gap):.1f}, log p(x) {ledger.log_evidence:.1f} nats")
assert spreads[0.0] > 3 * spreads[100.0]
```

*Few rows under mean-field.* The gap of $q(\mu)\, q(\tau)$ depends on the number of rows alone. It is largest where
there are few, which is where a posterior is most needed:

```python
gaps = {}
for rows in (2, 20, 200):
    copies = x[:2].repeat(rows // 2, 1)
    fit = ez.fit("normal-gamma", copies, method="cavi", progress=False)
    gaps[rows] = fit.log_evidence().value - fit.trajectory.elbo.iloc[-1]
    formula = 1 / (4 + 2 * rows)
    print(f"{rows} rows: gap {gaps[rows]:.4f} nats, 1/(4 a_N) = {formula:.4f}")
assert gaps[2] > 5 * gaps[20] > 25 * gaps[200] > 0
```

References
----------
```bibtex
@techreport{murphy2007conjugate,
  author = {Murphy, Kevin P.},
  title = {Conjugate {B}ayesian analysis of the {G}aussian distribution},
  institution = {University of British Columbia}, year = {2007}, note = {section 3}
}
@book{bishop2006pattern,
  author = {Bishop, Christopher M.}, title = {Pattern Recognition and Machine Learning},
  publisher = {Springer}, year = {2006}, note = {section 10.1.3}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import ParameterFreeEntry
from elbozoo.models.contract.joint import Joint
from elbozoo.models.contract.options import Field, Options


class NormalGammaOptions(Options):
    """Options of :class:`NormalGamma`."""

    prior_mean: float = Field(0.0, description="prior mean m₀ of every column's mean")
    prior_count: float = Field(0.1, gt=0, description="number k₀ of rows that the prior mean is worth")
    shape: float = Field(1.0, gt=0, description="shape a₀ of the gamma prior of every column's precision")
    rate: float = Field(1.0, gt=0, description="rate b₀ of the gamma prior of every column's precision")


class NormalGammaParameters(NamedTuple):
    """Parameters of a normal-gamma distribution of each column.

    Attributes
    ----------
    mean : Tensor (D,)
        m: location of the mean.
    weight : Tensor (D,)
        k: precision of the mean in units of the precision.
    shape, rate : Tensor (D,)
        a and b of the precision.
    """

    mean: Tensor
    weight: Tensor
    shape: Tensor
    rate: Tensor


class MeanFieldFactors(NamedTuple):
    """The factors q(μ) = N(m, 1/λ) and q(τ) = Gamma(a, b) of each column.

    Attributes
    ----------
    mean : Tensor (D,)
        m.
    mean_precision : Tensor (D,)
        λ.
    shape, rate : Tensor (D,)
        a and b.
    """

    mean: Tensor
    mean_precision: Tensor
    shape: Tensor
    rate: Tensor


class NormalGamma(ParameterFreeEntry):
    """Normal columns, unknown mean and precision: τ ~ Gamma(a₀, b₀), μ ~ N(m₀, 1/(k₀ τ)), x ~ N(μ, 1/τ); no θ."""

    Options = NormalGammaOptions
    options: NormalGammaOptions
    example_columns = 2
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {"precision": ("column",), "mean": ("column",)}

    def coords(self) -> dict[str, Sequence[Any]]:
        """Names of the columns, for means and precisions."""
        return {"column": list(self.names)}

    def forward(self, batch: Batch) -> Tensor:
        """τ, μ (D,) outside the plate; x (B, D) ~ N(μ, 1/τ)."""
        options = self.options
        shape = batch.x.new_full((self.columns,), options.shape)
        precision = pyro.sample("precision", dist.Gamma(shape, options.rate).to_event(1))
        prior_scale = (options.prior_count * precision).rsqrt()
        mean = pyro.sample("mean", dist.Normal(options.prior_mean, prior_scale).to_event(1))
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Normal(mean, precision.rsqrt()).to_event(1), obs=batch.x)

    def posterior(self, x: Tensor) -> Joint:
        """Exact p(τ, μ given x): batch shape (), event shapes (D,) (Murphy 2007, section 3.3)."""
        p = self._posterior_parameters(x)
        return Joint(
            {
                "precision": dist.Gamma(p.shape, p.rate).to_event(1),
                "mean": lambda values: dist.Normal(p.mean, (p.weight * values["precision"]).rsqrt()).to_event(1),
            }
        )

    def predictive(self, x: Tensor) -> Distribution:
        """Exact p(next row given x), event shape (D,): Student-t (Murphy 2007, section 3.6)."""
        p = self._posterior_parameters(x)
        scale = (p.rate * (p.weight + 1) / (p.shape * p.weight)).sqrt()
        return dist.StudentT(2 * p.shape, p.mean, scale).to_event(1)

    def fit_exact(self, x: Tensor) -> None:
        """Do nothing: with no θ to learn, every θ is at the maximum and the posterior is the whole answer."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of all rows together, (), nats (Murphy 2007, section 3.5)."""
        options = self.options
        p = self._posterior_parameters(x)
        per_column = (
            torch.lgamma(p.shape)
            - math.lgamma(options.shape)
            + options.shape * math.log(options.rate)
            - p.shape * p.rate.log()
            + 0.5 * (math.log(options.prior_count) - p.weight.log() - len(x) * math.log(2 * math.pi))
        )
        return per_column.sum()

    def initial_factors(self, x: Tensor, restart: int = 0) -> MeanFieldFactors:
        """Factors at the prior's own location; from the second start on, with a precision drawn at random."""
        options = self.options
        start = x.new_full((self.columns,), options.shape / options.rate)
        if restart > 0:
            start = start * (2 * torch.randn_like(start)).exp()
        shape = torch.full_like(start, options.shape)
        mean = torch.full_like(start, options.prior_mean)
        return MeanFieldFactors(mean, options.prior_count * start, shape, shape / start)

    def update_factors(self, x: Tensor, factors: MeanFieldFactors) -> MeanFieldFactors:
        """One sweep: q(μ), then q(τ) (Bishop 2006, equations 10.26 to 10.30).

        The shape of q(τ) is a₀ + (N + 1)/2: the prior of μ depends on τ as one more row does.
        """
        p = self._posterior_parameters(x)
        mean_precision = p.weight * factors.shape / factors.rate
        # The mean is settled, so all that q(τ) sees of q(μ) is its variance.
        return MeanFieldFactors(p.mean, mean_precision, p.shape + 0.5, p.rate + 0.5 * p.weight / mean_precision)

    def bound(self, x: Tensor, factors: MeanFieldFactors) -> Tensor:
        """ELBO of the factors in closed form, (), nats: E_q[log p(x, μ, τ)] plus the entropies of the factors."""
        options, n = self.options, len(x)
        centre, scatter = _moments(x)
        mean, mean_precision, shape, rate = factors
        precision, log_precision = shape / rate, torch.digamma(shape) - rate.log()
        variance = 1 / mean_precision
        # E_q of the squares of rows about μ, and of μ about its prior mean.
        squares = scatter + n * ((centre - mean).square() + variance)
        squares_of_mean = (mean - options.prior_mean).square() + variance
        likelihood = 0.5 * n * (log_precision - math.log(2 * math.pi)) - 0.5 * precision * squares
        prior_of_mean = 0.5 * (
            math.log(options.prior_count / (2 * math.pi))
            + log_precision
            - options.prior_count * precision * squares_of_mean
        )
        prior_of_precision = (
            options.shape * math.log(options.rate)
            - math.lgamma(options.shape)
            + (options.shape - 1) * log_precision
            - options.rate * precision
        )
        entropy_of_mean = 0.5 * (math.log(2 * math.pi) + 1 - mean_precision.log())
        entropy_of_precision = shape - rate.log() + torch.lgamma(shape) + (1 - shape) * torch.digamma(shape)
        return (likelihood + prior_of_mean + prior_of_precision + entropy_of_mean + entropy_of_precision).sum()

    def factor_distributions(self, x: Tensor, factors: MeanFieldFactors) -> dict[str, Distribution]:
        """q of each latent: batch shape (), event shape (D,)."""
        return {
            "precision": dist.Gamma(factors.shape, factors.rate).to_event(1),
            "mean": dist.Normal(factors.mean, factors.mean_precision.rsqrt()).to_event(1),
        }

    def _posterior_parameters(self, x: Tensor) -> NormalGammaParameters:
        """Murphy (2007), section 3.3, written about the column means, so that an offset of the data does not cancel."""
        options, n = self.options, len(x)
        centre, scatter = _moments(x)
        weight = options.prior_count + n
        away = options.prior_mean - centre
        rate = options.rate + 0.5 * scatter + 0.5 * options.prior_count * n / weight * away.square()
        return NormalGammaParameters(
            centre + options.prior_count / weight * away,
            torch.full_like(rate, weight),
            torch.full_like(rate, options.shape + 0.5 * n),
            rate,
        )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each column and the sum of squares about it, (D,) both; zeros of no rows."""
    centre = x.sum(0) / max(len(x), 1)
    deviations = x - centre
    # The mean of numbers far from zero is rounded; its second pass takes that error out of the squares.
    correction = deviations.sum(0) / max(len(x), 1)
    return centre + correction, (deviations - correction).square().sum(0)
