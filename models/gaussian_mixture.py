r"""Mixture of Gaussians.

Each datum picks one of $K$ components and is drawn from that component's normal distribution. The latent
takes finitely many values, so the evidence is a sum that can be carried out exactly, and EM has both of its
steps in closed form.

$$
z_n \sim \operatorname{Categorical}(\pi), \qquad x_n \mid z_n = k \sim \mathcal N(\mu_k, \Sigma_k)
$$

$\log p(x) = \log \sum_k \pi_k \mathcal N(x; \mu_k, \Sigma_k)$, and the posterior's probabilities are the
responsibilities $r_{nk} \propto \pi_k \mathcal N(x_n; \mu_k, \Sigma_k)$.

The likelihood of a mixture is unbounded: a component that sits on one datum, or on a few that lie in a
plane, can shrink without end. So a floor is part of the model: in units of the data's standard deviation
per column, no component's variance is below `floor` in any direction. A component that rests on the floor,
or on too few rows to span the space, is reported as collapsed, and among restarts a fit without one is
preferred.

What goes wrong:

*Local maxima*. EM climbs to the nearest, and from one start that may be a poor one; `restarts` takes the best of
several. Each number of the first line is EM from one start:

```python
options = {"components": 5, "method": "em", "progress": False}
nats = []
for seed in range(8):
    one = ez.fit("gaussian-mixture", "iris", restarts=1, seed=seed, **options)
    nats.append(one.log_evidence().value)
best = ez.fit("gaussian-mixture", "iris", restarts=20, seed=2, **options)
print("one start each:", *(f"{value:.1f}" for value in nats), "nats, total")
print(f"best of twenty starts: {best.log_evidence().value:.1f} nats, total")
assert best.log_evidence().value > max(nats)
assert best.log_evidence().value - min(nats) > 3
```

*Collapsed components*. Ask for more components than the rows can carry, and some come to rest on the floor. The
likelihood rewards it, of the rows of the fit, the first figure, and not of new ones, the second:

```python
torch.manual_seed(0)
few, new = torch.randn(30, 2), torch.randn(1000, 2)
scores = {}
for components in (1, 10):
    options = {"components": components, "method": "em", "restarts": 3, "seed": 0}
    mixture = ez.fit("gaussian-mixture", few, **options, progress=False)
    scores[components] = [float(mixture.score_samples(x).mean()) for x in (few, new)]
    print(f"{components} components:", *mixture.notes)
    print(*(f"    {score:.2f} nats per row" for score in scores[components]))
assert scores[10][0] > scores[1][0] + 1 and scores[10][1] < scores[1][1] - 1
```

*Labels that carry no order*. The same mixture has $K!$ names, and another seed may choose another:

```python
options = {"components": 3, "method": "em", "restarts": 1, "progress": False}
firsts = []
for seed in range(6):
    entry = ez.fit("gaussian-mixture", "iris", seed=seed, **options).entry
    lengths = entry.means[:, 2].tolist()
    firsts.append(lengths[0])
    print(f"seed {seed}: mean petal lengths", *(f"{cm:.1f}" for cm in lengths), "cm")
assert max(firsts) - min(firsts) > 1
```

References
----------
```bibtex
@article{dempster1977maximum,
  author = {Dempster, A. P. and Laird, N. M. and Rubin, D. B.},
  title = {Maximum Likelihood from Incomplete Data via the {EM} Algorithm},
  journal = {Journal of the Royal Statistical Society B},
  volume = {39}, number = {1}, pages = {1--38}, year = {1977}
}
@book{bishop2006pattern,
  author = {Bishop, Christopher M.}, title = {Pattern Recognition and Machine Learning},
  publisher = {Springer}, year = {2006}, note = {chapter 9}
}
@article{hathaway1985constrained,
  author = {Hathaway, Richard J.},
  title = {A Constrained Formulation of Maximum-Likelihood Estimation for Normal Mixture Distributions},
  journal = {The Annals of Statistics}, volume = {13}, number = {2}, pages = {795--800}, year = {1985}
}
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.mixtures import MixtureEntry, MixtureOptions, starting_assignments
from elbozoo.models.contract.options import Field
from elbozoo.models.numerics.covariances import KINDS
from elbozoo.models.numerics.normal_mixtures import NormalMixtures, NormalMixtureStatistics, expected_statistics
from elbozoo.models.numerics.second_moments import means_and_deviations, second_moments

STARTING_ROWS = 4096  # in a chunk of the first M step, whose sums are taken in the direct form


class GaussianMixtureOptions(MixtureOptions):
    """Options of :class:`GaussianMixture`."""

    covariance: Literal["full", "tied", "diagonal", "spherical"] = Field("full", description="shape of the covariances")
    floor: float = Field(
        1e-6,
        gt=0,
        lt=1,
        description="least variance of a component, in any direction, as a share of the columns' variance",
    )


class GaussianMixture(MixtureEntry):
    """Mixture of Gaussians: z ~ Categorical(π), x ~ N(μ_z, Σ_z).

    Attributes
    ----------
    weights : PyroParam (K,)
        π, share of each component.
    means : Parameter (K, D)
        μ, mean of each component.
    factor : Parameter (K, D, D), (1, D, D), (K, D) or (K, 1)
        Σ, covariance of each component, as its unconstrained factor, see ``models/numerics/covariances.py``.
    unit : buffer (D,)
        s, standard deviation of each column of the data, in which the floor is measured; no part of θ.
    """

    Options = GaussianMixtureOptions
    options: GaussianMixtureOptions
    example_columns = 2
    unit: Tensor

    def __init__(self, options: GaussianMixtureOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.kind = KINDS[options.covariance]
        components = options.components
        self.means = torch.nn.Parameter(torch.zeros(components, columns))
        self.factor = torch.nn.Parameter(torch.zeros(self.kind.factor_shape(components, columns)))
        self.register_buffer("unit", torch.ones(columns))

    @classmethod
    def check_data(cls, x: Tensor, options: GaussianMixtureOptions) -> None:
        """Refuse more components than rows, and columns in which every covariance would be singular."""
        super().check_data(x, options)
        constant = torch.nonzero(x.var(0, correction=0) == 0).flatten().tolist()
        if constant and (options.covariance != "spherical" or len(constant) == x.shape[1]):
            raise InvalidInput(
                f"columns {[c + 1 for c in constant]} (counted from 1) are constant, expected columns that vary: "
                "leave them out with --columns, or use covariance=spherical"
            )
        if options.covariance not in ("full", "tied"):
            return
        rank = second_moments(x).rank(of_correlations=True)
        if rank < x.shape[1]:
            raise InvalidInput(
                f"the {x.shape[1]} columns of {len(x)} rows have centred rank {rank}, expected full rank for "
                f"covariance={options.covariance}: leave out columns that others determine, or use covariance=diagonal"
            )

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start from k-means (even restarts) or from random rows as means (odd restarts)."""
        with torch.no_grad():
            mean, spread = means_and_deviations(x)
            self.unit.copy_(spread.square().mean().sqrt() if self.options.covariance == "spherical" else spread)
            probs = starting_assignments((x - mean) / self.unit, self.options.components, restart)
            self.means.copy_(mean.expand_as(self.means))
            self.maximize(self._assigned_statistics(x, probs))

    def randomize(self) -> None:
        """Draw means three standard deviations wide and covariances about the unit."""
        with torch.no_grad():
            self.weights = torch.distributions.Dirichlet(torch.full_like(self.weights, 5.0)).sample()
            self.means.normal_().mul_(3)
            self.factor.normal_().mul_(0.3)
            self.factor.add_(torch.eye(self.columns) if self.kind.has_scale_tril else 1.0)

    def forward(self, batch: Batch) -> Tensor:
        """z (B,) ~ Categorical(π); x (B, D) ~ N(μ_z, Σ_z)."""
        scale = self.scale
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Categorical(logits=self.weights.log()))
            return pyro.sample("x", self._component(self.means[z], scale, z), obs=batch.x)

    @property
    def scale(self) -> Tensor:
        """Cholesky factors (K or 1, D, D) of the covariances, or standard deviations (K, D)."""
        return self.kind.scale(self.factor, self.unit, self.options.floor)

    @property
    def covariances(self) -> Tensor:
        """Covariance matrices (K, D, D) of the components, in the data's units squared."""
        scale = self.scale
        matrices = scale @ scale.mT if self.kind.has_scale_tril else torch.diag_embed(scale.square())
        return matrices.expand(self.options.components, -1, -1)

    def component_log_density(self, x: Tensor) -> Tensor:
        """Log N(x; μ_k, Σ_k) of each row under each component, (N, K), nats."""
        return self.kind.log_density(x, self.means, self.scale)

    def expected_statistics(self, x: Tensor) -> NormalMixtureStatistics:
        """E step: responsibilities, and the counts and moments that they weigh."""
        return self.expected_statistics_together([self], x)[0]

    @classmethod
    def expected_statistics_together(cls, entries: Sequence[Self], x: Tensor) -> list[NormalMixtureStatistics]:
        """E steps of several mixtures of the same options and data, in one pass over the rows."""
        with torch.no_grad():
            first = entries[0]
            mixtures = NormalMixtures(
                torch.stack([entry.weights for entry in entries]).log(),
                torch.stack([entry.means for entry in entries]),
                torch.stack([entry.scale for entry in entries]),
                first.unit,
                first.options.floor,
            )
            together = expected_statistics(x, mixtures)
        return [NormalMixtureStatistics(*sums) for sums in zip(*together, strict=True)]

    def maximize(self, statistics: NormalMixtureStatistics) -> None:
        """M step: Bishop (2006), equations 9.24 to 9.26, under the floor."""
        with torch.no_grad():
            # A component that has lost all its rows keeps its mean and falls to the floor.
            counts = statistics.counts.clamp(min=torch.finfo(statistics.counts.dtype).tiny)
            shift = statistics.shift / counts[:, None]
            self.factor.copy_(self.kind.maximize(statistics.scatter, shift, counts, self.unit, self.options.floor))
            self.means.add_(shift)
            self.set_weights(counts)

    def degeneracy(self, statistics: NormalMixtureStatistics) -> str | None:
        """Say which components have collapsed: on the floor, or on too few rows to span the columns."""
        with torch.no_grad():
            relative = self.covariances / (self.unit[:, None] * self.unit)
            least = torch.linalg.eigvalsh(relative)[:, 0]
            needed = self.columns + 1 if self.options.covariance == "full" else 2
            collapsed = (least < 2 * self.options.floor) | (statistics.counts < needed)
        if not collapsed.any():
            return None
        names = torch.nonzero(collapsed).flatten().tolist()
        return f"components {names} collapsed (on the floor, or fewer than {needed} rows)"

    def _component(self, mean: Tensor, scale: Tensor, z: Tensor) -> dist.Distribution:
        if self.kind.has_scale_tril:
            return dist.MultivariateNormal(mean, scale_tril=scale[z] if len(scale) > 1 else scale[0])
        return dist.Normal(mean, scale[z]).to_event(1)

    def _assigned_statistics(self, x: Tensor, probs: Tensor) -> NormalMixtureStatistics:
        """Statistics of rows that are assigned to components by ``probs`` (N, K), about the one mean that all have."""
        shift, scatter = torch.zeros_like(self.means), torch.zeros_like(self.scale)
        for rows, assigned in zip(x.split(STARTING_ROWS), probs.split(STARTING_ROWS), strict=True):
            shift += assigned.mT @ (rows - self.means[0])
            scatter += self.kind.scatter(rows, self.means, assigned)
        return NormalMixtureStatistics(x.new_zeros(()), probs.sum(0), shift, scatter)
