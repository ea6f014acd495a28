r"""Categorical columns with a Dirichlet prior on each vector of probabilities.

Every column holds one of the categories $0, \dots, C-1$ in each row, with probabilities of its own, unknown and the
same for all rows. It is `beta-bernoulli` for more than two outcomes, and add-one smoothing for $\alpha = 1$.

$$
\pi_d \sim \mathrm{Dirichlet}(\alpha, \dots, \alpha), \qquad x_{nd} \mid \pi_d \sim \mathrm{Categorical}(\pi_d)
$$

With counts $n_{dc}$ of category $c$ in column $d$ the posterior is $\mathrm{Dirichlet}(\alpha + n_d)$, the next row has
category $c$ with probability $(\alpha + n_{dc})/(C\alpha + N)$, and

$$
\log p(x) = \sum_d \Bigl[ \log \frac{\Gamma(C\alpha)}{\Gamma(C\alpha + N)}
 + \sum_c \log \frac{\Gamma(\alpha + n_{dc})}{\Gamma(\alpha)} \Bigr].
$$

The evidence is that of the rows in their order: the multinomial coefficient of the Dirichlet-multinomial
distribution, which counts the orders, is no part of it. A category that no row has costs evidence too, because
the prior gave it room; so the number of categories is part of the model. It is read off the data, the largest value
of any column plus one, unless the option `categories` states it.

Normal guides break the stick: $\pi_0 = v_0$, $\pi_1 = v_1 (1 - v_0)$, and so on. Under a Dirichlet the fractions
$v_c$ are independent betas, so a mean-field normal on their log odds loses nothing against a full-rank one, and its
gap is the sum of the gaps of the fractions.

What goes wrong:

*Numbers that code no category*. Codes with holes, such as years, give a category to each number below the largest.
The evidence falls by what the prior has put on numbers that stand for nothing, and so does the probability that the
next row has a value that was seen. Three years of ten rows each, as they stand and numbered afresh:

```python
years = torch.tensor([[2019.0], [2020.0], [2021.0]]).repeat(10, 1)
seen = {}
for name, rows in {"as they stand": years, "numbered": years - 2019}.items():
    options = {"method": "closed-form", "progress": False}
    entry = ez.fit("dirichlet-categorical", rows, **options).entry
    seen[name] = float(entry.predictive(rows).log_prob(rows[:3]).exp().sum())
    nats = float(entry.log_evidence(rows))
    print(f"{name}: {entry.categories} categories, log p(x) {nats:.0f} nats, total;")
    print(f"    the next row is one of the three with probability {seen[name]:.3f}")
assert seen["as they stand"] < 0.05 and seen["numbered"] > 0.99
```

*Numbers that are no codes at all* are refused.

```python
amounts = torch.tensor([[0.0], [1.5], [2.0]])
try:
    ez.fit("dirichlet-categorical", amounts, progress=False)
    refused = False
except ez.InvalidInput as error:
    refused = "expected categories" in str(error)
    print(error)
assert refused
```

References
----------
```bibtex
@book{gelman2013bayesian,
  author = {Gelman, Andrew and Carlin, John B. and Stern, Hal S. and Dunson, David B. and Vehtari, Aki and
            Rubin, Donald B.},
  title = {Bayesian Data Analysis}, publisher = {CRC Press}, year = {2013}, edition = {3},
  note = {section 3.4}
}
@techreport{minka2000estimating,
  author = {Minka, Thomas P.}, title = {Estimating a {D}irichlet distribution},
  institution = {Massachusetts Institute of Technology}, year = {2000}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import ParameterFreeEntry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field, Options

EXAMPLE_CATEGORIES = 3
MOST_CATEGORIES = 10_000  # codes with holes, such as dates, would ask for more memory than there is


class DirichletCategoricalOptions(Options):
    """Options of :class:`DirichletCategorical`."""

    categories: int | None = Field(
        None, ge=2, le=MOST_CATEGORIES, description="number C of categories; none takes the largest in the data plus 1"
    )
    concentration: float = Field(1.0, gt=0, description="prior α of every category: rows seen before the data")


class DirichletCategorical(ParameterFreeEntry):
    """Independent categorical columns with Dirichlet priors: π ~ Dirichlet(α), x ~ Categorical(π); no θ to learn.

    Attributes
    ----------
    categories : int
        C, number of categories. Where the options leave it open, those of the entry state what the data had, so that
        a saved fit knows it.
    """

    Options = DirichletCategoricalOptions
    options: DirichletCategoricalOptions
    example_columns = 2
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {"probs": ("column", "category")}

    def __init__(self, options: DirichletCategoricalOptions, columns: int) -> None:
        categories = options.categories or EXAMPLE_CATEGORIES
        super().__init__(options.model_copy(update={"categories": categories}), columns)
        self.categories = categories

    @classmethod
    def from_data(cls, x: Tensor, *, seed: int = 0, names: Sequence[str] | None = None, **options: Any) -> Self:
        """Build the entry for the rows ``x`` (N, D), with as many categories as they have unless told.

        Raises
        ------
        InvalidInput
            For options or data that do not fit this entry.
        """
        if options.get("categories") is None:
            cls.check_data(x, cls.Options.parse(options))
            options["categories"] = _categories_in(x)
        return super().from_data(x, seed=seed, names=names, **options)

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse what are no categories, more of them than there may be, and a single one."""
        wrong = x[(x < 0) | (x != x.round())]
        if len(wrong):
            raise InvalidInput(
                f"found the value {wrong[0]:g}, expected categories 0, 1, 2, ...: "
                "leave that column out with --columns, or number its categories"
            )
        found, allowed = _categories_in(x), options.categories or MOST_CATEGORIES
        if found > allowed:
            raise InvalidInput(
                f"option categories: found the category {found - 1}, expected 0 to {allowed - 1}: "
                f"number the categories without holes, or set categories={found}"
            )
        if found == 1 and options.categories is None:
            raise InvalidInput(
                "found the category 0 in every row, expected two categories at least: "
                "set categories=2 or more to say how many there might have been"
            )

    def coords(self) -> dict[str, Sequence[Any]]:
        """Names of the columns and numbers of the categories, for the probabilities."""
        return {"column": list(self.names), "category": list(range(self.categories))}

    def forward(self, batch: Batch) -> Tensor:
        """π (D, C) ~ Dirichlet(α), outside the plate; x (B, D) ~ Categorical(π)."""
        concentration = batch.x.new_full((self.columns, self.categories), self.options.concentration)
        probs = pyro.sample("probs", dist.Dirichlet(concentration).to_event(1))
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Categorical(probs).to_event(1), obs=batch.x)

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Return the drawn categories as numbers of the table."""
        return observed.to(template.dtype)

    def posterior(self, x: Tensor) -> dist.Distribution:
        """Exact p(π given x): batch shape (), event shape (D, C) (Gelman et al. 2013, section 3.4)."""
        return dist.Dirichlet(self._concentration(x)).to_event(1)

    def predictive(self, x: Tensor) -> dist.Distribution:
        """Exact p(next row given x), event shape (D,): the posterior mean of the probabilities."""
        return dist.Categorical(self._concentration(x)).to_event(1)

    def fit_exact(self, x: Tensor) -> None:
        """Do nothing: with no θ to learn, every θ is at the maximum and the posterior is the whole answer."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of all rows together and in their order, (), nats; -inf for a category beyond the last.

        Minka (2000), the Pólya distribution without its multinomial coefficient.
        """
        concentration = self._concentration(x)
        prior, total = self.options.concentration, self.categories * self.options.concentration
        of_totals = math.lgamma(total) - math.lgamma(total + len(x))
        of_categories = torch.lgamma(concentration) - math.lgamma(prior)
        log_evidence = self.columns * of_totals + of_categories.sum()
        return torch.where(self._is_category(x).all(), log_evidence, -math.inf)

    def _concentration(self, x: Tensor) -> Tensor:
        """α plus the number of rows with each category, (D, C)."""
        counts = x.new_zeros(self.columns, self.categories)
        category = x.clamp(0, self.categories - 1).long()
        return self.options.concentration + counts.scatter_add(1, category.mT, self._is_category(x).to(x.dtype).mT)

    def _is_category(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x < self.categories) & (x == x.round())


def _categories_in(x: Tensor) -> int:
    """Largest category of any column plus one; 1 of no rows."""
    return int(x.max()) + 1 if x.numel() else 1
