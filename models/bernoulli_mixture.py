r"""Mixture of Bernoullis: latent classes.

Each datum belongs to one of $K$ classes, and within a class its $D$ binary answers are independent. Whatever makes
answers go together is thereby put down to the class: this is latent class analysis.

$$
z_n \sim \operatorname{Categorical}(\pi), \qquad x_{nd} \mid z_n = k \sim \operatorname{Bernoulli}(\theta_{kd})
$$

$\log p(x) = \log \sum_k \pi_k \prod_d \theta_{kd}^{x_d} (1 - \theta_{kd})^{1 - x_d}$, the posterior's probabilities
are the responsibilities $r_{nk}$, and the M step is $\theta_{kd} = \sum_n r_{nk} x_{nd} / \sum_n r_{nk}$.

A class in which everybody gives the same answer has $\theta = 0$ or $1$, and one new datum with the other answer would
have probability zero. So a floor is part of the model: $\theta$ stays within `floor` of neither end. The likelihood
in each $\theta_{kd}$ has one hump, so clipping is the exact maximiser under the floor and EM stays monotone.

What goes wrong:

*Local maxima*. EM climbs to the nearest, and from one start that may be a poor one; `restarts` takes the best of
several. Each number of the first line is EM from one start:

```python
options = {"components": 10, "method": "em", "progress": False}
nats = []
for seed in range(6):
    one = ez.fit("bernoulli-mixture", "digits-binary", restarts=1, seed=seed, **options)
    nats.append(one.log_evidence().value)
ten = ez.fit("bernoulli-mixture", "digits-binary", restarts=10, seed=0, **options)
best = ten.log_evidence().value
print("one start each:", *(f"{value:.0f}" for value in nats), "nats, total")
print(f"best of ten starts: {best:.0f} nats, total")
assert best - min(nats) > 20
```

*Classes that the data cannot tell apart*. With $D < 2 \lceil \log_2 K \rceil + 1$ columns different parameters may
give the same likelihood. Two columns and two classes are such a case: two fits, kept apart by their floors, explain
the same answers equally well and tell different stories.

```python
answers = ez.load_data("role-conflict").x[:, :2]
nats, probs = [], []
for floor in (0.001, 0.05):
    options = {"components": 2, "floor": floor, "method": "em", "seed": 0}
    classes = ez.fit("bernoulli-mixture", answers, **options, progress=False)
    nats.append(classes.log_evidence().value)
    probs.append(classes.entry.probs.detach())
    print(f"log p(x) {nats[-1]:.2f} nats, total, θ", *probs[-1].numpy().round(2))
for names in (probs[1], probs[1].flip(0)):
    assert (probs[0] - names).abs().max() > 0.1
assert abs(nats[0] - nats[1]) < 0.01
```

One column never says more than its mean: any number of classes has the likelihood of one.

*Labels that carry no order*. The same mixture has $K!$ names, and another seed may choose another.

References
----------
```bibtex
@article{goodman1974exploratory,
  author = {Goodman, Leo A.},
  title = {Exploratory Latent Structure Analysis Using Both Identifiable and Unidentifiable Models},
  journal = {Biometrika}, volume = {61}, number = {2}, pages = {215--231}, year = {1974}
}
@article{allman2009identifiability,
  author = {Allman, Elizabeth S. and Matias, Catherine and Rhodes, John A.},
  title = {Identifiability of Parameters in Latent Structure Models with Many Observed Variables},
  journal = {The Annals of Statistics}, volume = {37}, number = {6A}, pages = {3099--3132}, year = {2009}
}
@book{bishop2006pattern,
  author = {Bishop, Christopher M.}, title = {Pattern Recognition and Machine Learning},
  publisher = {Springer}, year = {2006}, note = {section 9.3.3}
}
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

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


class BernoulliMixtureOptions(MixtureOptions):
    """Options of :class:`BernoulliMixture`."""

    # Below 1e-12 rounding would blur 1 - floor.
    floor: float = Field(1e-6, ge=1e-12, lt=0.5, description="least probability of either answer in a class")


class BernoulliMixture(MixtureEntry):
    """Mixture of Bernoullis: z ~ Categorical(π), x ~ Bernoulli(θ_z).

    Attributes
    ----------
    weights : PyroParam (K,)
        π, share of each class.
    probs : PyroParam (K, D)
        θ, probability of a 1 in each class, within the floor of neither 0 nor 1.
    """

    Options = BernoulliMixtureOptions
    options: BernoulliMixtureOptions

    def __init__(self, options: BernoulliMixtureOptions, columns: int) -> None:
        super().__init__(options, columns)
        bounds = constraints.interval(options.floor, 1 - options.floor)
        self.probs = PyroParam(torch.full((options.components, columns), 0.5), bounds)

    @classmethod
    def check_data(cls, x: Tensor, options: BernoulliMixtureOptions) -> None:
        """Refuse more components than rows, and what is neither 0 nor 1."""
        super().check_data(x, options)
        wrong = torch.nonzero((x != 0) & (x != 1))
        if len(wrong):
            row, column = wrong[0].tolist()
            raise InvalidInput(
                f"found the value {x[row, column]:g} in column {column + 1} (counted from 1), expected 0 or 1: "
                "code the column as 0 and 1, or leave it out with --columns"
            )

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start from k-means (even restarts) or from random rows as centres (odd restarts)."""
        with torch.no_grad():
            self.maximize(starting_sums(x, starting_assignments(x, self.options.components, restart)))

    def randomize(self) -> None:
        """Draw weights about equal and probabilities from 0.05 to 0.95."""
        with torch.no_grad():
            self.weights = torch.distributions.Dirichlet(torch.full_like(self.weights, 5.0)).sample()
            self.probs = (0.05 + 0.9 * torch.rand_like(self.probs)).clamp(self.options.floor, 1 - self.options.floor)

    def forward(self, batch: Batch) -> Tensor:
        """z (B,) ~ Categorical(π); x (B, D) ~ Bernoulli(θ_z)."""
        logits = self.logits
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Categorical(logits=self.weights.log()))
            return pyro.sample("x", dist.Bernoulli(logits=logits[z]).to_event(1), obs=batch.x)

    @property
    def logits(self) -> Tensor:
        """log θ - log(1 - θ), (K, D)."""
        return self.probs.log() - torch.log1p(-self.probs)

    def component_log_density(self, x: Tensor) -> Tensor:
        """Log p(x given z = k) of each row in each class, (N, K), nats."""
        none = torch.log1p(-self.probs)
        return x @ (self.probs.log() - none).mT + none.sum(-1)

    def expected_statistics(self, x: Tensor) -> WeightedSums:
        """E step: Bishop (2006), equations 9.56 to 9.58, summed over the rows."""
        return self.expected_statistics_together([self], x)[0]

    @classmethod
    def expected_statistics_together(cls, entries: Sequence[Self], x: Tensor) -> list[WeightedSums]:
        """E steps of several mixtures of the same options and data, in one pass over the rows."""
        with torch.no_grad():
            slopes = torch.stack([entry.logits for entry in entries])
            constants = torch.stack([entry.weights.log() + torch.log1p(-entry.probs).sum(-1) for entry in entries])
            together = linear_mixtures.expected_statistics(x, slopes, constants)
        return [WeightedSums(*sums) for sums in zip(*together, strict=True)]

    def maximize(self, statistics: WeightedSums) -> None:
        """M step: Bishop (2006), equations 9.59 and 9.60, under the floor."""
        with torch.no_grad():
            means = statistics.means(otherwise=self.probs)
            self.probs = means.clamp(self.options.floor, 1 - self.options.floor)
            self.set_weights(statistics.counts)

    def degeneracy(self, statistics: WeightedSums) -> str | None:
        """Say which classes have lost their rows."""
        return lost_components(statistics.counts)
