r"""Poisson columns with a gamma prior on each rate.

Every column of counts has a rate of its own, unknown and the same for all rows: accidents per year, goals per
match, deaths by horse kick.

$$
\lambda_d \sim \mathrm{Gamma}(a, b), \qquad x_{nd} \mid \lambda_d \sim \mathrm{Poisson}(\lambda_d)
$$

with shape $a$ and rate $b$. With $s_d = \sum_n x_{nd}$ the posterior is $\mathrm{Gamma}(a + s_d,\ b + N)$, the next
count of a column is negative binomial, and

$$
\log p(x) = \sum_d \Bigl[ \log \frac{\Gamma(a + s_d)}{\Gamma(a)} + a \log \frac{b}{b + N} - s_d \log(b + N)
 - \sum_n \log x_{nd}! \Bigr].
$$

A normal guide lives on the log rate. The best one has variance $1/a_N$ for $a_N = a + s_d$, and its gap per column is
the remainder of Stirling's series,

$$
\log \Gamma(a_N) - \bigl(a_N - \tfrac12\bigr) \log a_N + a_N - \tfrac12 \log 2\pi \approx \frac{1}{12\, a_N},
$$

which vanishes as counts pile up. A fit can be held against it.

What goes wrong:

*Counts that vary more than a Poisson's*. The posterior is then far too sharp, and no diagnostic of the bound can see
it, since the gap is next to nothing as ever. Below each of 200 columns is a study of 20 counts with mean 5. They are
Poisson, or the rate of each is itself drawn from a gamma distribution. Two posterior standard deviations either way
should hold the truth in some 19 of 20 studies.

```python
torch.manual_seed(0)
rate = torch.distributions.Gamma(1.0, 0.2).sample((20, 200))
for name, rates in {"Poisson": torch.full_like(rate, 5), "spread": rate}.items():
    counts = torch.poisson(rates)
    study = ez.fit("gamma-poisson", counts, steps=300, seed=0, progress=False)
    posterior = study.entry.posterior(study.x)
    error = (posterior.mean - 5).abs() / posterior.variance.sqrt()
    held = float((error < 2).double().mean())
    gap = float(study.log_evidence().value - study.elbo()) / 200
    print(f"{name}: {held:.0%} hold the truth, gap {gap:.4f} nats per column")
assert held < 0.8 and gap < 0.02
```

The data say so themselves: under one rate the variance of a column is about its mean.

```python
for name, rates in {"Poisson": torch.full_like(rate, 5), "spread": rate}.items():
    counts = torch.poisson(rates)
    ratio = float((counts.var(0) / counts.mean(0)).mean())
    print(f"{name}: variance over mean {ratio:.2f} on average")
assert ratio > 3
```

References
----------
```bibtex
@book{gelman2013bayesian,
  author = {Gelman, Andrew and Carlin, John B. and Stern, Hal S. and Dunson, David B. and Vehtari, Aki and
            Rubin, Donald B.},
  title = {Bayesian Data Analysis}, publisher = {CRC Press}, year = {2013}, edition = {3},
  note = {section 2.6}
}
@book{bortkewitsch1898gesetz,
  author = {von Bortkewitsch, Ladislaus}, title = {Das Gesetz der kleinen Zahlen},
  publisher = {Teubner}, address = {Leipzig}, year = {1898}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import ParameterFreeEntry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field, Options


class GammaPoissonOptions(Options):
    """Options of :class:`GammaPoisson`."""

    shape: float = Field(1.0, gt=0, description="shape a of the gamma prior of every column's rate")
    rate: float = Field(0.1, gt=0, description="rate b of the gamma prior of every column's rate; its mean is a/b")


class GammaPoisson(ParameterFreeEntry):
    """Independent Poisson columns with gamma priors: λ ~ Gamma(a, b), x ~ Poisson(λ); no θ to learn."""

    Options = GammaPoissonOptions
    options: GammaPoissonOptions
    example_columns = 3
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {"rate": ("column",)}

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse what are no counts."""
        wrong = x[(x < 0) | (x != x.round())]
        if len(wrong):
            raise InvalidInput(
                f"found the value {wrong[0]:g}, expected counts 0, 1, 2, ...: leave that column out with --columns, "
                "or round it"
            )

    def coords(self) -> dict[str, Sequence[Any]]:
        """Names of the columns, for the rates."""
        return {"column": list(self.names)}

    def forward(self, batch: Batch) -> Tensor:
        """λ (D,) ~ Gamma(a, b), outside the plate; x (B, D) ~ Poisson(λ)."""
        shape = batch.x.new_full((self.columns,), self.options.shape)
        rate = pyro.sample("rate", dist.Gamma(shape, self.options.rate).to_event(1))
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Poisson(rate).to_event(1), obs=batch.x)

    def posterior(self, x: Tensor) -> dist.Distribution:
        """Exact p(λ given x): batch shape (), event shape (D,) (Gelman et al. 2013, section 2.6)."""
        return dist.Gamma(*self._shape_and_rate(x)).to_event(1)

    def predictive(self, x: Tensor) -> dist.Distribution:
        """Exact p(next row given x), event shape (D,): negative binomial (Gelman et al. 2013, section 2.6)."""
        return dist.GammaPoisson(*self._shape_and_rate(x)).to_event(1)

    def fit_exact(self, x: Tensor) -> None:
        """Do nothing: with no θ to learn, every θ is at the maximum and the posterior is the whole answer."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of all rows together, (), nats: log p(x given λ) + log p(λ) - log p(λ given x)."""
        shape, rate = self._shape_and_rate(x)
        prior_shape, prior_rate = self.options.shape, self.options.rate
        per_column = (
            torch.lgamma(shape)
            - math.lgamma(prior_shape)
            - prior_shape * math.log1p(len(x) / prior_rate)
            - x.sum(0) * rate.log()
        )
        return per_column.sum() - torch.lgamma(x + 1).sum()

    def _shape_and_rate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shape and rate of the posterior of each column, (D,) both."""
        shape = self.options.shape + x.sum(0)
        return shape, torch.full_like(shape, self.options.rate + len(x))
