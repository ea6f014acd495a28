r"""Unknown mean of a normal distribution whose scale is known.

The smallest latent-variable model: one global latent $\mu$ for the whole data set, with a conjugate prior.
Every quantity has a closed form, so it is the first place to see that the ELBO of the right family touches
the evidence, and that the wrong one does not.

$$
\mu_d \sim \mathcal N(m_0, s_0^2), \qquad x_{nd} \mid \mu_d \sim \mathcal N(\mu_d, \sigma^2)
$$

With $\lambda = 1/s_0^2 + N/\sigma^2$ the posterior is
$\mathcal N\bigl((m_0/s_0^2 + \sum_n x_n/\sigma^2)/\lambda,\ 1/\lambda\bigr)$ in each column, and
$\log p(x) = \log p(x \mid \mu) + \log p(\mu) - \log p(\mu \mid x)$ for any $\mu$.

What goes wrong:

*A wrong scale.* Nothing is learned here, so a scale far from the data's makes a sharp and wrong posterior that no
diagnostic of the bound can see: the gap is zero all the same. The rows below have a standard deviation of 5. Told that
it is 0.5, the posterior is ten times too narrow and excludes the mean that the rows were drawn about. What gives it
away is log p(x), beside that of another scale:

```python
x = 3 + 5 * torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
evidence, away = {}, {}
for scale in (0.5, 5.0):
    fit = ez.fit("normal-mean", x, guide="exact", scale=scale, progress=False)
    posterior, ledger = fit.entry.posterior(fit.x), fit.ledger()
    evidence[scale] = ledger.log_evidence
    mean, deviation = float(posterior.mean), float(posterior.stddev)
    away[scale] = abs(3 - mean) / deviation
    print(f"scale {scale}: μ is {mean:.2f} ± {deviation:.2f},", end=" ")
    print(f"gap {abs(ledger.gap):.1f}, log p(x) {ledger.log_evidence:.0f} nats")
assert evidence[5.0] > evidence[0.5] + 1000 and away[0.5] > 3 > 2 > away[5.0]
```

References
----------
```bibtex
@techreport{murphy2007conjugate,
  author = {Murphy, Kevin P.},
  title = {Conjugate {B}ayesian analysis of the {G}aussian distribution},
  institution = {University of British Columbia}, year = {2007}
}
```
"""

from __future__ import annotations

import math

import pyro
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import ParameterFreeEntry
from elbozoo.models.contract.options import Field, Options


class NormalMeanOptions(Options):
    """Options of :class:`NormalMean`."""

    scale: float = Field(1.0, gt=0, description="known standard deviation σ of x about its mean")
    prior_mean: float = Field(0.0, description="prior mean m₀ of every column's mean")
    prior_scale: float = Field(10.0, gt=0, description="prior standard deviation s₀ of every column's mean")


class NormalMean(ParameterFreeEntry):
    """Known-scale normal with a normal prior on its mean: μ ~ N(m₀, s₀²), x ~ N(μ, σ²); no θ to learn."""

    Options = NormalMeanOptions
    options: NormalMeanOptions
    example_columns = 1

    def forward(self, batch: Batch) -> Tensor:
        """μ (D,) ~ N(m₀, s₀²), outside the plate; x (B, D) ~ N(μ, σ²)."""
        options = self.options
        prior_mean = batch.x.new_full((self.columns,), options.prior_mean)
        mu = pyro.sample("mu", dist.Normal(prior_mean, options.prior_scale).to_event(1))
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Normal(mu, options.scale).to_event(1), obs=batch.x)

    def posterior(self, x: Tensor) -> dist.Distribution:
        """Exact p(μ given x): batch shape (), event shape (D,) (Murphy 2007, equations 20 and 24)."""
        options = self.options
        precision = 1 / options.prior_scale**2 + len(x) / options.scale**2
        mean = (options.prior_mean / options.prior_scale**2 + x.sum(0) / options.scale**2) / precision
        return dist.Normal(mean, 1 / math.sqrt(precision)).to_event(1)

    def fit_exact(self, x: Tensor) -> None:
        """Do nothing: with no θ to learn, every θ is at the maximum and the posterior is the whole answer."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of all rows together, (), nats (Murphy 2007, equation 55).

        Written with squares about the column means, so that an offset of the data does not cancel.
        """
        options = self.options
        n, mean = len(x), x.mean(0)
        noise, prior = options.scale**2, options.prior_scale**2
        within = (x - mean).square().sum() / noise
        between = n * (mean - options.prior_mean).square().sum() / (noise + n * prior)
        log_determinant = n * math.log(noise) + math.log1p(n * prior / noise)
        return -0.5 * (within + between + self.columns * (log_determinant + n * math.log(2 * math.pi)))
