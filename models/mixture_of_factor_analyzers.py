r"""Mixture of factor analyzers.

Each datum picks one of $K$ components and a point on that component's own plane of $L$ factors, and is blurred by
noise: clustering and dimension reduction at once. Two latents stand behind each datum, a discrete and a continuous one.

$$
z_n \sim \operatorname{Categorical}(\pi), \qquad f_n \sim \mathcal N(0, I_L), \qquad
x_n \mid z_n = k, f_n \sim \mathcal N(W_k f_n + \mu_k,\ \Psi_k), \quad
\Psi_k = \operatorname{diag}(\psi_{k1}, \dots, \psi_{kD})
$$

The factors integrate out: $x$ is a mixture of normals with covariances $W_k W_k^\top + \Psi_k$, which lie between
diagonal ($W = 0$) and full ($L = D - 1$) and cost $D (L + 1)$ numbers instead of $D (D + 1) / 2$. Given $z$ the
posterior of $f$ is that of factor analysis, with precision $M_k = I + W_k^\top \Psi_k^{-1} W_k$; with $z$ unknown it is
a mixture of $K$ normals, so a mean-field q has a gap for two reasons: f depends on z, and the factors on each other.

With `noise=shared` one $\Psi$ serves all components (Ghahramani & Hinton), with `noise=own` each has its own
(McLachlan & Peel). As in every mixture of normals the likelihood may be unbounded: a component on a few rows fits them
exactly. So a floor is part of the model: no noise variance is below `floor` as a share of its column's variance. The
M step regresses on the factors first, whatever the noise, so raising the noise to the floor is the exact maximiser.

What goes wrong:

*Local maxima.* Where EM ends depends on where it starts; `restarts` keeps the best of several starts. One start each,
from five seeds:

```python
x = ez.load_data("simulate:mixture-of-factor-analyzers", rows=300, seed=3).x
settings = {"components": 4, "latent_dim": 1, "iterations": 300, "progress": False}
model = "mixture-of-factor-analyzers"
fits = [ez.fit(model, x, method="em", restarts=1, seed=s, **settings) for s in range(5)]
ends = [fit.log_evidence().value for fit in fits]
print("log p(x) from five starts, nats:", ", ".join(f"{end:.0f}" for end in ends))
assert max(ends) - min(ends) > 10
```

*Collapsed components.* With few rows for each, a component puts its plane through its rows and its noise on the floor.
Such components are reported and passed over among restarts; a higher `floor`, fewer components or `noise=shared` avoid
them. The likelihood of new rows shows that the gain is none:

```python
rows = ez.load_data("iris").x
old, new = rows[::3], rows[1::3]
settings = {"latent_dim": 1, "restarts": 1, "iterations": 300, "progress": False}
means = []
for noise, components in {"shared": 1, "own": 10}.items():
    options = {"noise": noise, "components": components, **settings}
    fit = ez.fit(model, old, method="em", seed=0, **options)
    means.append([float(fit.score_samples(x).mean()) for x in (old, new)])
    print(f"{components} components: log p(x) {means[-1][0]:.2f} nats a row,", end=" ")
    print(f"of new rows {means[-1][1]:.2f}")
print(fit.notes[0])
assert "collapsed" in fit.notes[0]
assert means[1][0] > means[0][0] + 1 and means[1][1] < means[0][1] - 0.5
```

*What the data cannot tell.* There are $K!$ names for the same mixture, and the loadings are known only up to a rotation
in each component. Turning the factors about changes θ, and log p(x) by rounding alone:

```python
settings = {"components": 2, "latent_dim": 2, "restarts": 1, "iterations": 100}
fit = ez.fit(model, "iris", method="em", progress=False, **settings)
before, loadings = fit.score_samples(), fit.entry.loadings.detach().clone()
turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
with torch.no_grad():
    fit.entry.loadings.copy_(loadings @ turn)
moved = float((loadings @ turn - loadings).abs().max())
change = float((fit.score_samples() - before).abs().max())
print(f"loadings moved by up to {moved:.2f}, log p of a row by up to {change:.0e} nats")
assert moved > 0.1 and change < 1e-8
```

*Slow EM*, where noise is small against signal.

References
----------
```bibtex
@techreport{ghahramani1996em,
  author = {Ghahramani, Zoubin and Hinton, Geoffrey E.},
  title = {The {EM} Algorithm for Mixtures of Factor Analyzers},
  institution = {University of Toronto}, number = {CRG-TR-96-1}, year = {1996}
}
@inproceedings{mclachlan2000mixtures,
  author = {McLachlan, Geoffrey J. and Peel, David},
  title = {Mixtures of Factor Analyzers},
  booktitle = {Proceedings of the Seventeenth International Conference on Machine Learning},
  pages = {599--606}, year = {2000}
}
@article{mclachlan2003modelling,
  author = {McLachlan, G. J. and Peel, D. and Bean, R. W.},
  title = {Modelling High-Dimensional Data by Mixtures of Factor Analyzers},
  journal = {Computational Statistics \& Data Analysis},
  volume = {41}, number = {3--4}, pages = {379--388}, year = {2003}
}
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import pyro
import torch
from pyro import distributions as dist
from pyro.ops.indexing import Vindex
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.factors import refuse_unbounded_factors
from elbozoo.models.contract.joint import Joint
from elbozoo.models.contract.mixtures import MixtureEntry, MixtureOptions, starting_assignments
from elbozoo.models.contract.options import Field
from elbozoo.models.numerics import factor_mixtures
from elbozoo.models.numerics.factor_mixtures import FactorMixtureStatistics

NARROWEST_START = 0.01


class MixtureOfFactorAnalyzersOptions(MixtureOptions):
    """Options of :class:`MixtureOfFactorAnalyzers`."""

    latent_dim: int = Field(2, ge=1, description="number L of factors of each component")
    noise: Literal["shared", "own"] = Field("shared", description="one noise for all components, or one each")
    floor: float = Field(1e-6, gt=0, lt=1, description="least noise variance of a column, as a share of its variance")


class MixtureOfFactorAnalyzers(MixtureEntry):
    """Mixture of factor analyzers: z ~ Categorical(π), f ~ N(0, I), x ~ N(W_z f + μ_z, Ψ_z).

    Attributes
    ----------
    weights : PyroParam (K,)
        π, share of each component.
    means : Parameter (K, D)
        μ, mean of each component.
    loadings : Parameter (K, D, L)
        W, loadings of each component.
    log_excess : Parameter (1, D) or (K, D)
        Ψ, noise variance of each column, as the log of what it has above the floor, in units of the column's variance.
    unit : buffer (D,)
        s, standard deviation of each column of the data, in whose square the floor is measured; no part of θ.
    """

    Options = MixtureOfFactorAnalyzersOptions
    options: MixtureOfFactorAnalyzersOptions
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {"f": ("factor",)}
    unit: Tensor

    def __init__(self, options: MixtureOfFactorAnalyzersOptions, columns: int) -> None:
        super().__init__(options, columns)
        components = options.components
        self.means = torch.nn.Parameter(torch.zeros(components, columns))
        self.loadings = torch.nn.Parameter(torch.zeros(components, columns, options.latent_dim))
        self.log_excess = torch.nn.Parameter(torch.zeros(components if options.noise == "own" else 1, columns))
        self.register_buffer("unit", torch.ones(columns))

    @classmethod
    def check_data(cls, x: Tensor, options: MixtureOfFactorAnalyzersOptions) -> None:
        """Refuse more components than rows, constant columns, and more factors than rows or columns allow."""
        super().check_data(x, options)
        refuse_unbounded_factors(x, options.latent_dim)

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start from k-means (even restarts) or from random rows as centres (odd restarts), with random loadings."""
        with torch.no_grad():
            self.unit.copy_(x.std(0, correction=0))
            self._start_from(x, starting_assignments((x - x.mean(0)) / self.unit, self.options.components, restart))

    def _start_from(self, x: Tensor, assignments: Tensor) -> None:
        """Take means and variances from assigned rows; random loadings get half of the variance, noise the other."""
        origin = x.mean(0)  # of a component without rows, and one row more of each
        counts = assignments.sum(0) + 1
        self.set_weights(counts)
        self.means.copy_(origin + assignments.mT @ (x - origin) / counts[:, None])
        squares = (assignments[..., None] * (x[:, None, :] - self.means).square()).sum(0)
        variance = torch.maximum(self._pooled(squares, counts), NARROWEST_START * self.unit.square())
        self.loadings.normal_().mul_((variance / (2 * self.options.latent_dim)).sqrt()[..., None])
        self._set_variance(0.5 * variance)

    def randomize(self) -> None:
        """Draw means three standard deviations wide, loadings of unit variance and noise scales from 0.3 to 1."""
        with torch.no_grad():
            self.weights = torch.distributions.Dirichlet(torch.full_like(self.weights, 5.0)).sample()
            self.means.normal_().mul_(3)
            self.loadings.normal_()
            self._set_variance((0.3 + 0.7 * torch.rand_like(self.log_excess)).square())

    def forward(self, batch: Batch) -> Tensor:
        """z (B,) ~ Categorical(π); f (B, L) ~ N(0, I); x (B, D) ~ N(W_z f + μ_z, Ψ_z)."""
        zeros = self.loadings.new_zeros(self.options.latent_dim)
        scale = self.variance.sqrt()
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Categorical(logits=self.weights.log()))
            f = pyro.sample("f", dist.Normal(zeros, 1.0).to_event(1))
            # One contraction, so that an enumerated z (K, 1, 1) and draws of f (S, B, L) meet in x's shape only.
            mean = torch.einsum("...dl,...l->...d", self.loadings[z], f) + self.means[z]
            return pyro.sample("x", dist.Normal(mean, scale[z]).to_event(1), obs=batch.x)

    @property
    def variance(self) -> Tensor:
        """ψ of each component and column, (K, D), never below the floor."""
        variance = self.unit.square() * (self.options.floor + self.log_excess.exp())
        return variance.expand(self.options.components, -1)

    @property
    def covariances(self) -> Tensor:
        """Covariance matrices W Wᵀ + Ψ of the components, (K, D, D), in the data's units squared."""
        return self.loadings @ self.loadings.mT + torch.diag_embed(self.variance)

    def component_log_density(self, x: Tensor) -> Tensor:
        """Log N(x; μ_k, W_k W_kᵀ + Ψ_k) of each row, (N, K), nats, through the L x L matrices M."""
        return factor_mixtures.log_density(x, self.means, self.loadings, self.variance)

    def posterior(self, x: Tensor) -> Joint:
        """Exact p(z given x) p(f given x, z): batch shape (N,) (Ghahramani & Hinton 1996, section 3)."""
        mean, scale_tril = factor_mixtures.posterior(x, self.means, self.loadings, self.variance)
        rows = torch.arange(len(x), device=x.device)

        def factors(values: Mapping[str, Tensor]) -> dist.MultivariateNormal:
            z = values["z"]
            return dist.MultivariateNormal(Vindex(mean)[z, rows], scale_tril=scale_tril[z])

        return Joint({"z": dist.Categorical(logits=self.log_joint(x)), "f": factors})

    def expected_statistics(self, x: Tensor) -> FactorMixtureStatistics:
        """E step: Ghahramani & Hinton (1996), section 3, summed over the rows."""
        weights = self.weights.log()
        return factor_mixtures.expected_statistics(x, weights, self.means, self.loadings, self.variance)

    def maximize(self, statistics: FactorMixtureStatistics) -> None:
        """M step: Ghahramani & Hinton (1996), section 3, under the floor."""
        with torch.no_grad():
            means, loadings, squares = factor_mixtures.maximize(statistics, self.means)
            self.means.copy_(means)
            self.loadings.copy_(loadings)
            self._set_variance(self._pooled(squares, statistics.counts))
            self.set_weights(statistics.counts)

    def degeneracy(self, statistics: FactorMixtureStatistics) -> str | None:
        """Say which components have collapsed: flat in some direction, or on too few rows to span their plane."""
        with torch.no_grad():
            # L loadings can fill the gap of L columns without noise, a Heywood case, but not of more.
            on_floor = self.variance < 2 * self.options.floor * self.unit.square()
            needed = self.options.latent_dim + 2
            collapsed = (on_floor.sum(-1) > self.options.latent_dim) | (statistics.counts < needed)
        if not collapsed.any():
            return None
        names = torch.nonzero(collapsed).flatten().tolist()
        return f"components {names} collapsed (noise on the floor, or fewer than {needed} rows)"

    def _pooled(self, squares: Tensor, counts: Tensor) -> Tensor:
        """Mean of the weighed squares (K, D): of each component, or over all of them, (1, D)."""
        if self.options.noise == "shared":
            return squares.sum(0, keepdim=True) / counts.sum()
        return squares / counts.clamp(min=torch.finfo(counts.dtype).tiny)[:, None]

    def _set_variance(self, variance: Tensor) -> None:
        excess = variance / self.unit.square() - self.options.floor
        self.log_excess.copy_(excess.clamp(min=torch.finfo(excess.dtype).tiny).log())
