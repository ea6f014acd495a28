r"""Factor analysis.

A few common factors explain how the columns vary together, and every column has a noise of its own. Unlike
in PPCA the answer does not depend on the units of the columns, and the maximum of the likelihood has no
closed form: EM has to look for it.

$$
z_n \sim \mathcal N(0, I_K), \qquad x_n \mid z_n \sim \mathcal N(W z_n + \mu,\ \Psi), \quad
\Psi = \operatorname{diag}(\psi_1, \dots, \psi_D)
$$

The evidence is $p(x) = \mathcal N(\mu, W W^\top + \Psi)$, and the posterior is
$p(z \mid x) = \mathcal N\bigl(M^{-1} W^\top \Psi^{-1} (x - \mu),\ M^{-1}\bigr)$ with
$M = I + W^\top \Psi^{-1} W$. As in PPCA, rotations of $W$ leave the likelihood unchanged and change the gap of a
mean-field guide.

What goes wrong:

*A Heywood case*: one factor reproduces a column so that its noise tends to zero. The option `floor` states how far it
may go, as a share of the column's variance. The correlations below ask a single factor for the loading
$\sqrt{0.8 \cdot 0.8 / 0.4} > 1$ on the first column, which no noise variance above zero allows:

```python
torch.manual_seed(0)
wanted = torch.tensor([[1, 0.8, 0.8], [0.8, 1, 0.4], [0.8, 0.4, 1]]).double()
draws = torch.randn(200, 3).double()
white = torch.linalg.qr(draws - draws.mean(0)).Q * 200**0.5
rows = white @ torch.linalg.cholesky(wanted).T
for floor in (0.1, 0.01, 0.001):
    options = {"latent_dim": 1, "floor": floor, "method": "em", "seed": 0}
    factor = ez.fit("factor-analysis", rows, **options, progress=False)
    noise = factor.entry.variance.detach()
    print(f"floor {floor}: noise variances", *(f"{value:.3f}" for value in noise))
    assert noise[0] < 1.01 * floor and noise[1:].min() > 0.2
```

*A slow climb*. EM is slow where noise is small against signal; `acceleration=squarem` helps.

```python
torch.manual_seed(0)
signal = torch.randn(300, 2) @ torch.randn(2, 6)
counts = {}
for scale in (0.3, 0.1):
    noisy = signal + scale * torch.randn(300, 6)
    for how in ("none", "squarem"):
        options = {"latent_dim": 2, "method": "em", "acceleration": how, "seed": 0}
        factor = ez.fit("factor-analysis", noisy, **options, progress=False)
        counts[scale, how] = len(factor.trajectory)
        print(f"noise {scale}, {how}: {counts[scale, how]} iterations")
assert counts[0.1, "none"] > 1.5 * counts[0.3, "none"]
assert counts[0.1, "squarem"] < 0.5 * counts[0.1, "none"]
```

References
----------
```bibtex
@article{rubin1982em,
  author = {Rubin, Donald B. and Thayer, Dorothy T.},
  title = {{EM} algorithms for {ML} factor analysis},
  journal = {Psychometrika}, volume = {47}, number = {1}, pages = {69--76}, year = {1982}
}
@book{bartholomew2011latent,
  author = {Bartholomew, David J. and Knott, Martin and Moustaki, Irini},
  title = {Latent Variable Models and Factor Analysis: A Unified Approach},
  publisher = {Wiley}, year = {2011}, edition = {3}
}
```
"""

from __future__ import annotations

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.factors import refuse_unbounded_factors
from elbozoo.models.contract.options import Field, Options
from elbozoo.models.numerics import linear_gaussian
from elbozoo.models.numerics.linear_gaussian import LinearGaussianStatistics
from elbozoo.models.numerics.second_moments import SecondMoments, means_and_deviations, second_moments


class FactorAnalysisOptions(Options):
    """Options of :class:`FactorAnalysis`."""

    latent_dim: int = Field(2, ge=1, description="number K of factors")
    floor: float = Field(1e-6, gt=0, lt=1, description="least noise variance of a column, as a share of its variance")


class FactorAnalysis(Entry):
    """Factor analysis: z ~ N(0, I), x ~ N(W z + μ, diag(ψ)).

    Attributes
    ----------
    loading : Parameter (D, K)
        W, the loadings.
    loc : Parameter (D,)
        μ, mean of each column.
    log_excess : Parameter (D,)
        ψ, noise variance of each column, as the log of what it has above the floor, in units of the column's variance.
    unit : buffer (D,)
        s, standard deviation of each column of the data, in whose square the floor is measured; no part of θ.
    """

    Options = FactorAnalysisOptions
    options: FactorAnalysisOptions
    unit: Tensor

    def __init__(self, options: FactorAnalysisOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.loading = torch.nn.Parameter(torch.zeros(columns, options.latent_dim))
        self.loc = torch.nn.Parameter(torch.zeros(columns))
        self.log_excess = torch.nn.Parameter(torch.zeros(columns))
        self.register_buffer("unit", torch.ones(columns))

    @classmethod
    def check_data(cls, x: Tensor, options: FactorAnalysisOptions) -> None:
        """Refuse constant columns, and more factors than rows or columns allow."""
        refuse_unbounded_factors(x, options.latent_dim)

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start at the data's mean, a random loading of half each column's variance and noise of the other half."""
        with torch.no_grad():
            mean, deviation = means_and_deviations(x)
            self.unit.copy_(deviation)
            self.loc.copy_(mean)
            self.loading.normal_().mul_(self.unit[:, None] / (2 * self.options.latent_dim) ** 0.5)
            self._set_variance(0.5 * self.unit.square())

    def randomize(self) -> None:
        """Draw a loading of unit variance and noise scales from 0.3 to 1."""
        with torch.no_grad():
            self.loading.normal_()
            self.loc.normal_()
            self._set_variance((0.3 + 0.7 * torch.rand_like(self.loc)).square())

    def forward(self, batch: Batch) -> Tensor:
        """z (B, K) ~ N(0, I); x (B, D) ~ N(W z + μ, diag(ψ))."""
        zeros = self.loading.new_zeros(self.options.latent_dim)
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            mean = z @ self.loading.mT + self.loc
            return pyro.sample("x", dist.Normal(mean, self.variance.sqrt()).to_event(1), obs=batch.x)

    @property
    def variance(self) -> Tensor:
        """ψ of each column, (D,), never below the floor."""
        return self.unit.square() * (self.options.floor + self.log_excess.exp())

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x), (N,), nats, through the K x K matrix M."""
        return linear_gaussian.log_density(x, self.loc, self.loading, self.variance)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Exact p(z given x): batch shape (N,), event shape (K,)."""
        mean, scale_tril = linear_gaussian.posterior(x, self.loc, self.loading, self.variance)
        return dist.MultivariateNormal(mean, scale_tril=scale_tril)

    def expected_statistics(self, x: Tensor) -> LinearGaussianStatistics:
        """E step (Rubin & Thayer 1982), summed over the rows."""
        return linear_gaussian.expected_statistics(x, self.loc, self.loading, self.variance)

    def summary_pays(self, rows: int) -> bool:
        """Whether EM on so many rows is cheaper from their second moments."""
        return linear_gaussian.summary_pays(rows, self.columns, self.options.latent_dim)

    def summarize(self, x: Tensor) -> SecondMoments:
        """Second moments of the rows, which are all that the E step needs of them."""
        return second_moments(x)

    def expected_statistics_from(self, summary: SecondMoments) -> LinearGaussianStatistics:
        """E step from the second moments: the same sums, at a cost that does not depend on the number of rows."""
        return linear_gaussian.expected_statistics_from(summary, self.loc, self.loading, self.variance)

    def maximize(self, statistics: LinearGaussianStatistics) -> None:
        """M step (Rubin & Thayer 1982), μ maximised jointly; the floor is the exact maximiser under it."""
        with torch.no_grad():
            loc, loading, variance = linear_gaussian.maximize(statistics, self.loc)
            self.loc.copy_(loc)
            self.loading.copy_(loading)
            self._set_variance(variance)

    def _set_variance(self, variance: Tensor) -> None:
        excess = variance / self.unit.square() - self.options.floor
        self.log_excess.copy_(excess.clamp(min=torch.finfo(excess.dtype).tiny).log())
