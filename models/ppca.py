r"""Probabilistic principal component analysis.

A point in a low-dimensional latent space is mapped linearly into the data space and blurred by isotropic
noise. It is the linear member of the zoo in which everything is known: the evidence, the posterior and
the global maximum of the likelihood, so each way of fitting can be held against the truth.

$$
z_n \sim \mathcal N(0, I_K), \qquad x_n \mid z_n \sim \mathcal N(W z_n + \mu,\ \sigma^2 I_D)
$$

The evidence is Gaussian, $p(x) = \mathcal N(\mu, W W^\top + \sigma^2 I)$, and so is the posterior,
$p(z \mid x) = \mathcal N\bigl(M^{-1} W^\top (x - \mu) / \sigma^2,\ M^{-1}\bigr)$ with
$M = I + W^\top W / \sigma^2$. The likelihood is invariant under rotations of $W$, the ELBO of a
mean-field guide is not: its gap is $\tfrac12 (\sum_i \log M_{ii} - \log\det M)$ nats per datum, and
vanishes where the columns of $W$ are orthogonal.

What goes wrong:

*No noise left.* With $K \ge \operatorname{rank}(x)$ the noise vanishes, and where the rank is below $D$ the
likelihood is unbounded. The rank is that of the centred rows, so a column that is the sum of others counts for nothing:

```python
x = ez.load_data("iris").x
refused = False
try:
    total = x.sum(1, keepdim=True)
    ez.fit("ppca", torch.cat([x, total], 1), latent_dim=4, progress=False)
except ez.InvalidInput as error:
    refused = True
    print(error)
assert refused
```

*Columns in different units* are weighed by their variance, so standardise them first. In the raw wine table the first
direction is little else than the column of the largest numbers:

```python
shares = {}
for name in ("wine", "wine-standardised"):
    fit = ez.fit("ppca", name, method="closed-form", latent_dim=1, progress=False)
    weight = fit.entry.loading.detach()[:, 0].square()
    shares[name] = float(weight.max() / weight.sum())
    column = fit.entry.names[int(weight.argmax())]
    print(f"{name}: {column} has {shares[name]:.1%} of the direction")
assert shares["wine"] > 0.99 and shares["wine-standardised"] < 0.3
```

*A rotation that mean-field sees.* The likelihood cannot tell $W$ from $W R$, so a maximum of it has a whole orbit, and
loadings are not to be read column by column. A q with independent dimensions can tell: at the same log p(x) its best
bound falls as $W$ turns away from orthogonal columns, by the formula above.

```python
wine = ez.load_data("wine-standardised").x
fit = ez.fit("ppca", wine, method="closed-form", progress=False)
loading, variance = fit.entry.loading.detach().clone(), fit.entry.variance[0].detach()
evidence, gaps = [], []
for cos, sin in ((1.0, 0.0), (0.8, 0.6), (0.5**0.5, 0.5**0.5)):
    turned = loading @ torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    fit.entry.loading.data = turned
    m = torch.eye(2) + turned.T @ turned / variance
    least = 0.5 * (m.diagonal().log().sum() - m.logdet())
    gaps.append(float(least) * len(wine))
    evidence.append(fit.log_evidence().value)
    print(f"log p(x) {evidence[-1]:.2f} nats,", end=" ")
    print(f"least gap of mean-field {gaps[-1]:.2f} nats")
assert max(evidence) - min(evidence) < 1e-6 and gaps[0] < 1e-6 < gaps[1] < gaps[2]
```

References
----------
```bibtex
@article{tipping1999probabilistic,
  author = {Tipping, Michael E. and Bishop, Christopher M.},
  title = {Probabilistic Principal Component Analysis},
  journal = {Journal of the Royal Statistical Society B},
  volume = {61}, number = {3}, pages = {611--622}, year = {1999}
}
@inproceedings{lucas2019dont,
  author = {Lucas, James and Tucker, George and Grosse, Roger and Norouzi, Mohammad},
  title = {Don't Blame the {ELBO}! A Linear {VAE} Perspective on Posterior Collapse},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {32}, year = {2019}
}
```
"""

from __future__ import annotations

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field, Options
from elbozoo.models.numerics import linear_gaussian
from elbozoo.models.numerics.linear_gaussian import LinearGaussianStatistics
from elbozoo.models.numerics.second_moments import SecondMoments, second_moments


class PPCAOptions(Options):
    """Options of :class:`PPCA`."""

    latent_dim: int = Field(2, ge=1, description="dimension K of the latent space")


class PPCA(Entry):
    """Probabilistic PCA: z ~ N(0, I), x ~ N(W z + μ, σ² I).

    Attributes
    ----------
    loading : Parameter (D, K)
        W, the loadings.
    loc : Parameter (D,)
        μ, mean of each column.
    noise_scale : PyroParam ()
        σ, standard deviation of the noise.
    """

    Options = PPCAOptions
    options: PPCAOptions

    def __init__(self, options: PPCAOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.loading = torch.nn.Parameter(torch.zeros(columns, options.latent_dim))
        self.loc = torch.nn.Parameter(torch.zeros(columns))
        self.noise_scale = PyroParam(torch.tensor(1.0), constraints.positive)

    @classmethod
    def check_data(cls, x: Tensor, options: PPCAOptions) -> None:
        """Refuse more latent dimensions than the data's rank allows."""
        rank = second_moments(x).rank()
        if options.latent_dim >= rank:
            raise InvalidInput(
                f"option latent_dim: found {options.latent_dim} for {len(x)} rows x {x.shape[1]} columns "
                f"whose centred rank is {rank}, expected at most {rank - 1}: with more the noise vanishes and the "
                "likelihood is unbounded"
            )

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start at the data's mean, in the plane of random mixtures of rows, with the best scales for that plane.

        EM turns the plane quickly and changes scales slowly, by about σ² an iteration, so that scales far off
        would take it λ/σ² iterations (the plane: range finder of Halko et al. 2011, algorithm 4.1).
        """
        with torch.no_grad():
            centred = x - x.mean(0)
            mixtures = torch.randn(len(x), self.options.latent_dim, dtype=x.dtype)
            basis = torch.linalg.qr(centred.mT @ mixtures).Q
            inside = centred @ basis
            noise = (centred.square().sum() - inside.square().sum()) / (len(x) * (self.columns - basis.shape[1]))
            variances, axes = torch.linalg.eigh(inside.mT @ inside / len(x))
            self.loc.copy_(x.mean(0))
            self.loading.copy_(basis @ axes * torch.maximum(variances - noise, 0.1 * noise).sqrt())
            self.noise_scale = noise.sqrt()

    def randomize(self) -> None:
        """Draw a loading of unit variance; the noise has half that scale."""
        with torch.no_grad():
            self.loading.normal_()
            self.loc.normal_()
            self.noise_scale = torch.full_like(self.noise_scale, 0.5)

    def forward(self, batch: Batch) -> Tensor:
        """z (B, K) ~ N(0, I); x (B, D) ~ N(W z + μ, σ² I)."""
        zeros = self.loading.new_zeros(self.options.latent_dim)
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            mean = z @ self.loading.mT + self.loc
            return pyro.sample("x", dist.Normal(mean, self.noise_scale).to_event(1), obs=batch.x)

    @property
    def variance(self) -> Tensor:
        """σ² of each column, (D,)."""
        return self.noise_scale.square().expand(self.columns)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x), (N,), nats: Tipping & Bishop (1999), equation 4, through the K x K matrix M."""
        return linear_gaussian.log_density(x, self.loc, self.loading, self.variance)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Exact p(z given x): batch shape (N,), event shape (K,)."""
        mean, scale_tril = linear_gaussian.posterior(x, self.loc, self.loading, self.variance)
        return dist.MultivariateNormal(mean, scale_tril=scale_tril)

    def expected_statistics(self, x: Tensor) -> LinearGaussianStatistics:
        """E step: Tipping & Bishop (1999), equations 25 and 26, summed over the rows."""
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
        """M step: Tipping & Bishop (1999), equations 27 and 28, with μ maximised jointly."""
        with torch.no_grad():
            loc, loading, variance = linear_gaussian.maximize(statistics, self.loc)
            self.loc.copy_(loc)
            self.loading.copy_(loading)
            self.noise_scale = variance.mean().sqrt()

    def fit_exact(self, x: Tensor) -> None:
        """Set θ to the global maximum: Tipping & Bishop (1999), equations 7 and 8, with R = I."""
        k = self.options.latent_dim
        with torch.no_grad():
            moments = second_moments(x)
            _, singular, directions = torch.linalg.svd(moments.centred(), full_matrices=False)
            eigenvalues = singular.square() / len(x)
            noise = eigenvalues[k:].sum() / (self.columns - k)
            self.loc.copy_(moments.mean())
            self.loading.copy_(directions[:k].mT * (eigenvalues[:k] - noise).clamp(min=0).sqrt())
            self.noise_scale = noise.sqrt()
