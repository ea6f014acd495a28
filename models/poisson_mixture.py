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

What goes wrong: local maxima (use `restarts`); labels that carry no order, $K!$ names for the same mixture; EM that
crawls where the regimes overlap; and more components than the data can tell apart, which end with equal rates or
without rows.

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
        π.
    log_excess : Parameter (K, D)
        Log of what each rate has above the floor, events per row.
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
