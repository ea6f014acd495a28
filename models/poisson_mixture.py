r"""Mixture of Poissons.

Counts that vary more than a Poisson's, because each datum comes from one of $K$ regimes with rates of their own. Within
a regime the $D$ counts are independent.

$$
z_n \sim \operatorname{Categorical}(\pi), \qquad x_{nd} \mid z_n = k \sim \operatorname{Poisson}(\lambda_{kd})
$$

$\log p(x) = \log \sum_k \pi_k \prod_d \operatorname{Poisson}(x_d; \lambda_{kd})$, the posterior's probabilities are the
responsibilities $r_{nk}$, and the M step is $\lambda_{kd} = \sum_n r_{nk} x_{nd} / \sum_n r_{nk}$.

In a regime without any event the rate is zero, and one new event would have probability zero. So a floor is part of
the model: no rate is below `floor` events per row. The likelihood in each $\lambda_{kd}$ has one hump, so raising the
rate to the floor is the exact maximiser under it and EM stays monotone. The likelihood of counts is bounded: unlike in
a mixture of normals no component can collapse.

What goes wrong:

*Local maxima.* Where EM ends depends on where it starts; `restarts` keeps the best of several starts. Counts of ink in
300 digits, ten components, one start each from six seeds, and then the best of ten:

```python
x = ez.load_data("digits").x[:300]
settings = {"method": "em", "components": 10, "progress": False}
fits = [ez.fit("poisson-mixture", x, restarts=1, seed=s, **settings) for s in range(6)]
ends = [fit.log_evidence().value for fit in fits]
best = ez.fit("poisson-mixture", x, restarts=10, seed=0, **settings)
best = best.log_evidence().value
print("log p(x) of single starts, nats:", ", ".join(f"{end:.0f}" for end in ends))
print(f"best of ten: {best:.0f}")
assert max(ends) - min(ends) > 100 and best > min(ends) + 100
```

*Regimes that overlap.* EM crawls where the responsibilities are undecided, and the maximum itself may be far from the
truth:

```python
draw = torch.Generator().manual_seed(0)
iterations = {}
for other in (30, 9, 4):
    x = torch.poisson(torch.tensor([[3.0], [other]]).repeat(200, 1), generator=draw)
    settings = {"components": 2, "restarts": 1, "progress": False}
    fit = ez.fit("poisson-mixture", x, method="em", seed=0, **settings)
    iterations[other] = len(fit.trajectory)
    rates = " and ".join(f"{rate:.1f}" for rate in fit.entry.rates.flatten().tolist())
    print(f"rates 3 and {other}: {iterations[other]} iterations, to {rates} events")
assert iterations[4] > 3 * iterations[9] > 3 * iterations[30]
```

*More components than the data can tell apart* end with equal rates or without rows. There is one regime here, and what
four components add for the rows of the fit is taken from new ones:

```python
x, new = torch.poisson(torch.full((2100, 3), 5.0), generator=draw).split([100, 2000])
means = {}
for components in (1, 4):
    settings = {"components": components, "restarts": 3, "progress": False}
    fit = ez.fit("poisson-mixture", x, method="em", seed=0, **settings)
    means[components] = [float(fit.score_samples(of).mean()) for of in (x, new)]
    print(f"{components}: log p(x) {means[components][0]:.3f} nats a row,", end=" ")
    print(f"of new rows {means[components][1]:.3f}")
print("rates of the four:", *fit.entry.rates.detach().round(decimals=1).tolist())
assert means[4][0] > means[1][0] + 0.003 and means[4][1] < means[1][1] - 0.003
```

*Labels carry no order*: there are $K!$ names for the same mixture.

References
----------
```bibtex
@article{hasselblad1969estimation,
  author = {Hasselblad, Victor},
  title = {Estimation of Finite Mixtures of Distributions from the Exponential Family},
  journal = {Journal of the American Statistical Association},
  volume = {64}, number = {328}, pages = {1459--1471}, year = {1969}
}
@book{titterington1985statistical,
  author = {Titterington, D. M. and Smith, A. F. M. and Makov, U. E.},
  title = {Statistical Analysis of Finite Mixture Distributions},
  publisher = {Wiley}, year = {1985}
}
@book{lange2003applied,
  author = {Lange, Kenneth}, title = {Applied Probability}, publisher = {Springer}, year = {2003},
  note = {section 2, problem 8}
}
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.mixtures import (
    MixtureEntry,
    MixtureOptions,
    WeightedSums,
    lost_components,
    starting_assignments,
    starting_sums,
)
from elbozoo.models.contract.options import Field
from elbozoo.models.numerics import linear_mixtures


class PoissonMixtureOptions(MixtureOptions):
    """Options of :class:`PoissonMixture`."""

    floor: float = Field(1e-6, gt=0, description="least rate of a component, in events per row")


class PoissonMixture(MixtureEntry):
    """Mixture of Poissons: z ~ Categorical(π), x ~ Poisson(λ_z).

    Attributes
    ----------
    weights : PyroParam (K,)
        π, share of each component.
    log_excess : Parameter (K, D)
        λ, rate of each component, events per row, as the log of what it has above the floor.
    """

    Options = PoissonMixtureOptions
    options: PoissonMixtureOptions
    example_columns = 2

    def __init__(self, options: PoissonMixtureOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.log_excess = torch.nn.Parameter(torch.zeros(options.components, columns))

    @classmethod
    def check_data(cls, x: Tensor, options: PoissonMixtureOptions) -> None:
        """Refuse more components than rows, and what are no counts."""
        super().check_data(x, options)
        wrong = torch.nonzero(~((x >= 0) & (x == x.round()) & x.isfinite()))
        if len(wrong):
            row, column = wrong[0].tolist()
            raise InvalidInput(
                f"found the value {x[row, column]:g} in column {column + 1} (counted from 1), expected counts "
                "0, 1, 2, ...: leave the column out with --columns, or use gaussian-mixture"
            )

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start from k-means (even restarts) or from random rows as centres (odd restarts), on the scale of roots."""
        with torch.no_grad():
            # The root of a Poisson has the same variance whatever its rate.
            self.maximize(starting_sums(x, starting_assignments(x.sqrt(), self.options.components, restart)))

    def randomize(self) -> None:
        """Draw weights about equal and rates about 3, from below 1 to above 10."""
        with torch.no_grad():
            self.weights = torch.distributions.Dirichlet(torch.full_like(self.weights, 5.0)).sample()
            self.log_excess.normal_().add_(1.0)

    def forward(self, batch: Batch) -> Tensor:
        """z (B,) ~ Categorical(π); x (B, D) ~ Poisson(λ_z)."""
        rates = self.rates
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Categorical(logits=self.weights.log()))
            return pyro.sample("x", dist.Poisson(rates[z]).to_event(1), obs=batch.x)

    @property
    def rates(self) -> Tensor:
        """λ, (K, D), events per row, never below the floor."""
        return self.options.floor + self.log_excess.exp()

    def component_log_density(self, x: Tensor) -> Tensor:
        """Log p(x given z = k) of each row under each component, (N, K), nats."""
        rates = self.rates
        return x @ rates.log().mT - rates.sum(-1) - torch.lgamma(x + 1).sum(-1, keepdim=True)

    def expected_statistics(self, x: Tensor) -> WeightedSums:
        """E step: responsibilities, and the counts of events that they weigh (Hasselblad 1969)."""
        return self.expected_statistics_together([self], x)[0]

    @classmethod
    def expected_statistics_together(cls, entries: Sequence[Self], x: Tensor) -> list[WeightedSums]:
        """E steps of several mixtures of the same options and data, in one pass over the rows."""
        with torch.no_grad():
            rates = torch.stack([entry.rates for entry in entries])
            constants = torch.stack([entry.weights for entry in entries]).log() - rates.sum(-1)
            log_evidence, counts, sums = linear_mixtures.expected_statistics(x, rates.log(), constants)
            together = log_evidence - torch.lgamma(x + 1).sum(), counts, sums
        return [WeightedSums(*each) for each in zip(*together, strict=True)]

    def maximize(self, statistics: WeightedSums) -> None:
        """M step: the weighted mean of the counts under the floor (Hasselblad 1969)."""
        with torch.no_grad():
            self._set_rates(statistics.means(otherwise=self.rates))
            self.set_weights(statistics.counts)

    def degeneracy(self, statistics: WeightedSums) -> str | None:
        """Say which components have lost their rows."""
        return lost_components(statistics.counts)

    def _set_rates(self, rates: Tensor) -> None:
        excess = rates - self.options.floor
        self.log_excess.copy_(excess.clamp(min=torch.finfo(excess.dtype).tiny).log())
