r"""Bernoulli columns with a beta prior on each probability.

Every column of zeros and ones has a probability of its own, unknown and the same for all rows. The oldest
Bayesian calculation there is: Bayes's billiard table, and Laplace's rule of succession.

$$
p_d \sim \mathrm{Beta}(\alpha, \beta), \qquad x_{nd} \mid p_d \sim \mathrm{Bernoulli}(p_d)
$$

With $s_d = \sum_n x_{nd}$ ones in $N$ rows the posterior is $\mathrm{Beta}(\alpha + s_d,\ \beta + N - s_d)$. Its mean
is the probability that the next row has a one, and the evidence is a ratio of beta functions,

$$
\log p(x) = \sum_d \log \frac{\mathrm B(\alpha + s_d,\ \beta + N - s_d)}{\mathrm B(\alpha, \beta)}.
$$

The evidence is that of the rows in their order: the binomial coefficient of the beta-binomial distribution, which
counts the orders, is no part of it.

A normal guide lives on the log odds, where the posterior $\mathrm{Beta}(a, b)$ is skewed unless ones and zeros are
equally many. Its gap per column is about $(a - b)^2 / \bigl(12\, a b (a + b)\bigr)$ nats, which is $1/(12 a)$ for a
column of few ones.

What goes wrong:

*Rows that depend on each other*, such as answers of one person. They count as independent evidence, the posterior is
too sharp, and no diagnostic of the bound can see it. Below each of 200 columns is a study in which the truth is 0.3:
ten people answer once, or the same ten give the same answer six times. Two posterior standard deviations either way
should hold the truth in some 19 of 20 studies.

```python
torch.manual_seed(1)
once = (torch.rand(10, 200) < 0.3).double()
for name, answers in {"once": once, "six times": once.repeat(6, 1)}.items():
    study = ez.fit("beta-bernoulli", answers, steps=300, seed=0, progress=False)
    posterior = study.entry.posterior(study.x)
    error = (posterior.mean - 0.3).abs() / posterior.variance.sqrt()
    held = float((error < 2).double().mean())
    gap = float(study.log_evidence().value - study.elbo()) / 200
    print(f"{name}: {held:.0%} hold the truth, gap {gap:.3f} nats per column")
assert held < 0.85 and gap < 0.03
```

*A prior that expects certainty*. With $\alpha$ and $\beta$ far below one the prior expects columns that are all zeros
or all ones, and charges any other column for it. Here half of the rows are ones:

```python
rows = torch.tensor([[0.0], [1.0]]).repeat(10, 1)
nats = {}
for prior in (1, 0.01, 0.0001):
    options = {"alpha": prior, "beta": prior, "method": "closed-form"}
    study = ez.fit("beta-bernoulli", rows, **options, progress=False)
    nats[prior] = study.log_evidence().value
    print(f"alpha = beta = {prior:g}: log p(x) = {nats[prior]:.1f} nats, total")
assert nats[1] - nats[0.01] > 3 and nats[0.01] - nats[0.0001] > 4
```

References
----------
```bibtex
@book{gelman2013bayesian,
  author = {Gelman, Andrew and Carlin, John B. and Stern, Hal S. and Dunson, David B. and Vehtari, Aki and
            Rubin, Donald B.},
  title = {Bayesian Data Analysis}, publisher = {CRC Press}, year = {2013}, edition = {3},
  note = {chapter 2}
}
@article{bayes1763essay,
  author = {Bayes, Thomas},
  title = {An Essay towards Solving a Problem in the Doctrine of Chances},
  journal = {Philosophical Transactions of the Royal Society}, volume = {53}, pages = {370--418}, year = {1763}
}
```
"""

from __future__ import annotations

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


class BetaBernoulliOptions(Options):
    """Options of :class:`BetaBernoulli`."""

    alpha: float = Field(1.0, gt=0, description="prior α of every column's probability: ones seen before the data")
    beta: float = Field(1.0, gt=0, description="prior β of every column's probability: zeros seen before the data")


class BetaBernoulli(ParameterFreeEntry):
    """Independent Bernoulli columns with beta priors: p ~ Beta(α, β), x ~ Bernoulli(p); no θ to learn."""

    Options = BetaBernoulliOptions
    options: BetaBernoulliOptions
    example_columns = 3
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {"p": ("column",)}

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse anything but zeros and ones."""
        wrong = x[(x != 0) & (x != 1)]
        if len(wrong):
            raise InvalidInput(
                f"found the value {wrong[0]:g}, expected 0 or 1 everywhere: leave that column out with --columns, "
                "or cut it at a threshold"
            )

    def coords(self) -> dict[str, Sequence[Any]]:
        """Names of the columns, for the probabilities."""
        return {"column": list(self.names)}

    def forward(self, batch: Batch) -> Tensor:
        """p (D,) ~ Beta(α, β), outside the plate; x (B, D) ~ Bernoulli(p)."""
        alpha = batch.x.new_full((self.columns,), self.options.alpha)
        p = pyro.sample("p", dist.Beta(alpha, self.options.beta).to_event(1))
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Bernoulli(p).to_event(1), obs=batch.x)

    def posterior(self, x: Tensor) -> dist.Distribution:
        """Exact p(p given x): batch shape (), event shape (D,) (Gelman et al. 2013, section 2.4)."""
        alpha, beta = self._counts(x)
        return dist.Beta(alpha, beta).to_event(1)

    def predictive(self, x: Tensor) -> dist.Distribution:
        """Exact p(next row given x), event shape (D,): the posterior mean, Laplace's rule for α = β = 1."""
        alpha, beta = self._counts(x)
        return dist.Bernoulli(alpha / (alpha + beta)).to_event(1)

    def fit_exact(self, x: Tensor) -> None:
        """Do nothing: with no θ to learn, every θ is at the maximum and the posterior is the whole answer."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of all rows together and in their order, (), nats: a ratio of beta functions."""
        return (_log_beta(*self._counts(x)) - _log_beta(*self._counts(x[:0]))).sum()

    def _counts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """α + ones and β + zeros of each column, (D,) both."""
        ones = x.sum(0)
        return self.options.alpha + ones, self.options.beta + (len(x) - ones)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
