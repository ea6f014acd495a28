r"""Bayesian linear regression.

One column of the table is the target, the others are the design. The coefficients are one latent vector for the whole
data set, and the precision of the noise is a second one unless it is known. Everything has a closed form, so this is
the place to see what a factorised guide loses when the columns of a design are correlated.

With `noise=unknown`, the normal-inverse-gamma form, prior scales are in units of the noise, which makes the prior
conjugate. The latent is the precision $\tau = 1/\sigma^2$, as in Bishop's book and in Pyro's gamma distribution; the
inverse-gamma distribution is that of $\sigma^2$.

$$
\tau \sim \operatorname{Gamma}(a, b), \qquad \beta \mid \tau \sim \mathcal N(0, S^2 / \tau), \qquad
y_n \mid \beta, \tau \sim \mathcal N(\phi_n^\top \beta, 1 / \tau)
$$

$S$ is diagonal: `prior_scale` for slopes, `intercept_scale` for the intercept. With
$\Lambda = S^{-2} + \Phi^\top \Phi$, $m = \Lambda^{-1} \Phi^\top y$ and $Q = y^\top (I + \Phi S^2 \Phi^\top)^{-1} y$
the posterior is

$$
\tau \mid y \sim \operatorname{Gamma}\bigl(a_N = a + \tfrac N2,\ b_N = b + \tfrac Q2\bigr), \qquad
\beta \mid \tau, y \sim \mathcal N\bigl(m, (\tau \Lambda)^{-1}\bigr),
$$

the evidence is a multivariate Student-t and so is the prediction at a new row. With `noise=known` the prior is
$\beta \sim \mathcal N(0, S^2)$ in the units of the target, evidence and posterior are normal, and
$\Lambda = S^{-2} + \Phi^\top \Phi / \sigma^2$.

A mean-field guide over the coefficients of the known-noise form ends at a gap of

$$
\tfrac12 \Bigl(\sum_i \log \Lambda_{ii} - \log\det \Lambda\Bigr)
$$

nats, which is 0 for an orthogonal design and grows with the correlation of its columns, up to a limit that the prior
sets. CAVI assumes independence between the two latents alone, $q(\beta)\, q(\tau)$. Its optimum has the right mean of
both, and with $P$ coefficients and $\tilde a = a_N + P/2$ a gap of
$\log\Gamma(a_N) - \log\Gamma(\tilde a) + \tilde a \log \tilde a - a_N \log a_N - P/2$, whatever the design.

What goes wrong:

*Units.* The prior is centred on zero and has the same scale for every slope, so columns in very different units are
shrunk by very different amounts, and a target far from zero needs an intercept with a scale that reaches it:
standardise, or set `prior_scale` and `intercept_scale`. Here the same distances are given in kilometres and in
thousands of them, where the slope would have to be far outside the prior:

```python
draw = torch.Generator().manual_seed(0)
km = torch.randn(50, 1, generator=draw)
y = 2 * km + torch.randn(50, 1, generator=draw)
slopes = {}
for size in (1, 1000):
    x = torch.cat([km / size, y], 1)
    fit = ez.fit("linear-regression", x, guide="exact", noise="known", progress=False)
    slopes[size] = float(fit.entry.posterior(fit.x).mean[1]) / size
    print(f"unit {size} km: slope {slopes[size]:.4f} a km,", end=" ")
    print(f"log p(y) {fit.log_evidence().value:.1f} nats")
assert slopes[1] > 1 and slopes[1000] < 0.1
```

*Collinear columns* are no error, since the prior is proper: their sum is learnt, their difference stays as wide as the
prior, which is $10 \sqrt 2$ here. A guide that takes the coefficients for independent cannot say both, and pays for it
by its gap.

```python
a = torch.randn(50, generator=draw)
b = a + 0.001 * torch.randn(50, generator=draw)
x = torch.stack([a, b, a + b + torch.randn(50, generator=draw)], 1)
fit = ez.fit("linear-regression", x, guide="mean-field", noise="known", progress=False)
covariance = fit.entry.posterior(fit.x).covariance_matrix
signs = torch.tensor([[0.0, 1, 1], [0, 1, -1]], dtype=torch.float64)
spread, wide = (signs @ covariance @ signs.T).diagonal().sqrt().tolist()
gap = fit.ledger().gap
print(f"posterior: sum ± {spread:.2f}, difference ± {wide:.2f}", end="; ")
print(f"mean-field's gap {gap:.2f} nats")
assert spread < 0.5 and wide > 12 and gap > 3
```

References
----------
```bibtex
@book{bishop2006pattern,
  author = {Bishop, Christopher M.}, title = {Pattern Recognition and Machine Learning},
  publisher = {Springer}, year = {2006}, note = {sections 3.3, 3.5 and 10.1.3}
}
```
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.joint import Joint
from elbozoo.models.contract.options import Field
from elbozoo.models.contract.regression import RegressionEntry, RegressionOptions
from elbozoo.models.numerics.regression import Regression, regression

LOG_2PI = math.log(2 * math.pi)


class LinearRegressionOptions(RegressionOptions):
    """Options of :class:`LinearRegression`."""

    noise: Literal["unknown", "known"] = Field(
        "unknown", description="unknown: a latent precision with a gamma prior; known: noise_scale"
    )
    noise_scale: float = Field(1.0, gt=0, description="standard deviation σ of the noise, where it is known")
    prior_scale: float = Field(
        10.0, gt=0, description="prior standard deviation of every slope; in units of the noise where that is unknown"
    )
    intercept_scale: float = Field(
        100.0, gt=0, description="prior standard deviation of the intercept, in the same units as prior_scale"
    )
    shape: float = Field(1.0, gt=0, description="shape a of the gamma prior of the precision")
    rate: float = Field(1.0, gt=0, description="rate b of the gamma prior of the precision, in the target's units²")


class CoefficientFactors(NamedTuple):
    """q(β) = N(mean, scale_tril scale_trilᵀ): all of q where the noise is known.

    Attributes
    ----------
    mean : Tensor (P,)
        Mean of the coefficients.
    scale_tril : Tensor (P, P)
        Cholesky factor of their covariance.
    """

    mean: Tensor
    scale_tril: Tensor


class RegressionFactors(NamedTuple):
    """q(β) q(τ) = N(mean, scale_tril scale_trilᵀ) Gamma(shape, rate).

    Attributes
    ----------
    mean : Tensor (P,)
        Mean of the coefficients.
    scale_tril : Tensor (P, P)
        Cholesky factor of their covariance.
    shape, rate : Tensor ()
        Of the precision.
    """

    mean: Tensor
    scale_tril: Tensor
    shape: Tensor
    rate: Tensor


class LinearRegression(RegressionEntry):
    """Linear regression: τ ~ Gamma(a, b), β ~ N(0, S²/τ), y ~ N(Φβ, 1/τ), or with σ known; no θ to learn."""

    Options = LinearRegressionOptions
    options: LinearRegressionOptions

    def forward(self, batch: Batch) -> Tensor:
        """τ () ~ Gamma(a, b) unless σ is known and β (P,), outside the plate; x (B,), the target, ~ N(Φβ, σ²)."""
        scale = self.prior_scale(batch.x)
        noise = torch.full_like(scale[0], self.options.noise_scale)
        if self.options.noise == "unknown":
            noise = pyro.sample("precision", self._prior_of_precision(batch.x)).rsqrt()
            scale = scale * noise[..., None]
        coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
        mean = self.linear_predictor(batch.x, coefficients)
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Normal(mean, noise), obs=self.response(batch.x))

    def starting_latents(self, x: Tensor) -> dict[str, Tensor]:
        """Start gradient methods and samplers at the ridge regression: far from it the log joint is not concave."""
        solved = self._solve(x)
        coefficients = {"coefficients": self._coefficients(x, solved)[0]}
        if self.options.noise == "known":
            return coefficients
        return {"precision": self._posterior_of_precision(x, solved).mean, **coefficients}

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(y given Φ) of all rows together, (), nats.

        A multivariate normal or Student-t density (Bishop 2006, equation 3.86 and exercise 3.23).
        """
        n, options, solved = len(x), self.options, self._solve(x)
        if options.noise == "known":
            normalizer = n * (LOG_2PI + 2 * math.log(options.noise_scale))
            return -0.5 * (normalizer + solved.log_determinant + solved.quadratic)
        posterior = self._posterior_of_precision(x, solved)
        shape, rate = posterior.concentration, posterior.rate
        gammas = torch.lgamma(shape) - math.lgamma(options.shape)
        rates = options.shape * math.log(options.rate) - shape * rate.log()
        return gammas + rates - 0.5 * (n * LOG_2PI + solved.log_determinant)

    def posterior(self, x: Tensor) -> dist.Distribution | Joint:
        """Exact posterior of β, or of τ and then β given τ: batch shape () (Bishop 2006, 3.49 and exercise 3.12)."""
        solved = self._solve(x)
        mean, scale_tril = self._coefficients(x, solved)
        if self.options.noise == "known":
            return dist.MultivariateNormal(mean, scale_tril=scale_tril)
        return Joint(
            {
                "precision": self._posterior_of_precision(x, solved),
                "coefficients": lambda values: dist.MultivariateNormal(
                    mean, scale_tril=scale_tril * values["precision"].rsqrt()[..., None, None]
                ),
            }
        )

    def predict(self, x: Tensor, new: Tensor) -> dist.Distribution:
        """Exact p(y given the rows ``x``) at each of the rows ``new`` (M, D), whose target is not read.

        Batch shape (M,). Normal, or Student-t where the noise is unknown (Bishop 2006, 3.58 and exercise 3.13).
        """
        solved = self._solve(x)
        mean, scale_tril = self._coefficients(x, solved)
        design = self.design(new)
        spread = (design @ scale_tril).square().sum(-1)
        if self.options.noise == "known":
            return dist.Normal(design @ mean, (self.options.noise_scale**2 + spread).sqrt())
        precision = self._posterior_of_precision(x, solved)
        scale = ((1 + spread) * precision.rate / precision.concentration).sqrt()
        return dist.StudentT(2 * precision.concentration, design @ mean, scale)

    def fit_exact(self, x: Tensor) -> None:
        """Do nothing: with no θ to learn, every θ is at the maximum and the posterior is the whole answer."""

    def initial_factors(self, x: Tensor, restart: int) -> NamedTuple:
        """Start at the prior: its mean of the precision at first, a draw of it at restarts."""
        zeros = torch.zeros_like(self.prior_scale(x))
        scale_tril = torch.diag(self.prior_scale(x))
        if self.options.noise == "known":
            return CoefficientFactors(zeros, scale_tril)
        prior = self._prior_of_precision(x)
        precision = prior.mean if restart == 0 else prior.sample()
        return RegressionFactors(
            zeros, scale_tril * precision.rsqrt(), prior.concentration, prior.concentration / precision
        )

    def update_factors(self, x: Tensor, factors: Any) -> NamedTuple:
        """Set q(β), then q(τ), to its optimum (as Bishop 2006, equations 10.26 to 10.30, for more than a mean)."""
        mean, scale_tril = self._coefficients(x, self._solve(x))
        if self.options.noise == "known":
            return CoefficientFactors(mean, scale_tril)
        scale_tril = scale_tril * (factors.rate / factors.shape).sqrt()
        residual, shrinkage = self._expected_squares(x, mean, scale_tril)
        shape = torch.full_like(residual, self.options.shape + 0.5 * (len(x) + len(mean)))
        return RegressionFactors(mean, scale_tril, shape, self.options.rate + 0.5 * (residual + shrinkage))

    def bound(self, x: Tensor, factors: Any) -> Tensor:
        """ELBO of the factors in closed form, (), total nats: E[log p(y, β, τ)] + H(q(β)) + H(q(τ))."""
        n, p, options = len(x), len(factors.mean), self.options
        residual, shrinkage = self._expected_squares(x, factors.mean, factors.scale_tril)
        # Of q(β) the entropy, and of log p(y given β) + log p(β) what does not depend on the noise.
        constant = 0.5 * (p - n * LOG_2PI) + factors.scale_tril.diagonal().log().sum() - self.prior_scale(x).log().sum()
        if options.noise == "known":
            return constant - n * math.log(options.noise_scale) - 0.5 * (residual / options.noise_scale**2 + shrinkage)
        precision = factors.shape / factors.rate
        log_precision = torch.digamma(factors.shape) - factors.rate.log()
        likelihood = 0.5 * ((n + p) * log_precision - precision * (residual + shrinkage))
        prior = options.shape * math.log(options.rate) - math.lgamma(options.shape)
        prior = prior + (options.shape - 1) * log_precision - options.rate * precision
        return constant + likelihood + prior + dist.Gamma(factors.shape, factors.rate).entropy()

    def factor_distributions(self, x: Tensor, factors: Any) -> dict[str, dist.Distribution]:
        """q of the precision, unless the noise is known, and of the coefficients."""
        coefficients = {"coefficients": dist.MultivariateNormal(factors.mean, scale_tril=factors.scale_tril)}
        if self.options.noise == "known":
            return coefficients
        return {"precision": dist.Gamma(factors.shape, factors.rate), **coefficients}

    def _prior_of_precision(self, x: Tensor) -> dist.Gamma:
        return dist.Gamma(x.new_tensor(self.options.shape), x.new_tensor(self.options.rate))

    def _posterior_of_precision(self, x: Tensor, solved: Regression) -> dist.Gamma:
        shape = torch.full_like(solved.quadratic, self.options.shape + 0.5 * len(x))
        return dist.Gamma(shape, self.options.rate + 0.5 * solved.quadratic)

    def _noise_unit(self) -> float:
        """Standard deviation of the noise in the units of the prior scales."""
        return self.options.noise_scale if self.options.noise == "known" else 1.0

    def _solve(self, x: Tensor) -> Regression:
        """Regression in units of prior and noise."""
        unit = self._noise_unit()
        return regression(self.design(x) * self.prior_scale(x) / unit, self.response(x) / unit)

    def _coefficients(self, x: Tensor, solved: Regression) -> tuple[Tensor, Tensor]:
        """Mean (P,) and Cholesky factor (P, P) of the covariance of β, at τ = 1 where the noise is unknown."""
        scale = self.prior_scale(x)
        return scale * solved.mean, scale[:, None] * solved.scale_tril

    def _expected_squares(self, x: Tensor, mean: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """E|y - Φβ|² and E|S⁻¹β|² under q(β), both ()."""
        design, scale = self.design(x), self.prior_scale(x)
        residual = (self.response(x) - design @ mean).square().sum() + (design @ scale_tril).square().sum()
        return residual, (mean / scale).square().sum() + (scale_tril / scale[:, None]).square().sum()
