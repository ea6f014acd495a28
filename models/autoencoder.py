r"""Autoencoder: one code for each row, without a distribution, and a decoder that gives the row back.

An encoder squeezes a row into a few numbers and a decoder unfolds them again; both learn from what is lost on the
way. There is no prior on the code and no noise in it. It is the VAE's ancestor, and here it stands beside it: the same
decoders and likelihoods, so that what the distribution adds can be seen.

$$
z_n = e(x_n) \in \mathbb R^K, \qquad y_n = W_2\, a(W_1 z_n + b_1) + b_2, \qquad
x_n \mid z_n \sim \prod_d \mathrm{Bernoulli}\bigl(\mathrm{sigmoid}(y_{nd})\bigr)
\quad\text{or}\quad \prod_d \mathcal N\bigl(m_d + s_d\, y_{nd},\ (s_d\, \sigma)^2\bigr)
$$

As a program the code has a *flat* prior, of log density 0 everywhere, and $q(z \mid x_n)$ is a point mass at
$e(x_n)$. What is maximised is the log-likelihood of the rows at their codes,

$$
\sum_n \log p\bigl(x_n \mid e(x_n)\bigr),
$$

minus the cross-entropy under `likelihood = bernoulli`. Under `likelihood = normal` it is, at its best
$\sigma^2 = \tfrac{1}{ND} \sum_{nd} (x_{nd} - m_d - s_d y_{nd})^2 / s_d^2$, a falling function of the squared error in
units of the columns.

*This is not a bound.* A flat prior has no integral, so that $p(x) = \int p(x \mid z)\, dz$ is no density: a bounded
decoder makes it infinite, and a linear one finite for each $x$ but infinite in sum over all. With no evidence there is
nothing to bound, no gap and no posterior. So the ELBO reads "not a bound" and log p(x) is empty, and guides with a
density are refused, as is Monte Carlo EM. A program must be run to be simulated, all the same: codes are then drawn
from $\mathcal N(0, I)$, which is a convention and not a prior. Where an encoder has put its codes is its own affair, so
that drawn rows say little; `transform`, `decode` and `reconstruct` are what an autoencoder is for.

With `decoder = linear` and an `encoder = linear` of an amortized guide it is principal component analysis in units of
the columns. The squared error is least where $y$ is the projection of the row on the plane of the first $K$ principal
axes, and every other stationary point is a saddle (Baldi & Hornik 1989): gradients arrive. The codes are the
components only up to an invertible matrix, which flows from encoder to decoder without a trace in the error.

What goes wrong:

*The identity map*. With $K \ge D$ a code can be the row itself; the error goes to zero, $\sigma$ to `noise_floor`, and
nothing has been learned. Four columns of independent noise hold nothing to learn. A code of four numbers gives back
even rows that are like none of the fit, and so says nothing about what rows are like. A code smaller than the row, or
corruption as in `denoising-autoencoder`, makes it learn.

```python
torch.manual_seed(0)
noise = torch.randn(200, 4).double()
strange = 5 + torch.randn(200, 4).double()
options = {"guide": "amortized-delta", "likelihood": "normal", "steps": 1000, "seed": 0}
options |= {"decoder": "linear", "encoder": "linear", "progress": False}
errors = {}
for size in (2, 4):
    coder = ez.fit("autoencoder", noise, latent_dim=size, **options)
    errors[size] = (coder.reconstruct(strange) - strange).square().mean()
    scale = coder.entry.likelihood.noise_scale
    print(f"K = {size}: squared error {errors[size]:.4f} on them, σ {scale:.3f}")
assert errors[4] < 0.01 * errors[2]
```

*Memory*. A free code for each row with a wide decoder, or a wide encoder on few rows, can learn the rows by heart;
compare the objective, or the error, on rows held back. Here 25 wines are learned and the other 153 are new:

```python
wine = ez.load_data("wine-standardised").x
shuffled = wine[torch.randperm(178, generator=torch.Generator().manual_seed(0))]
known, new = shuffled[:25], shuffled[25:]
options = {"latent_dim": 3, "likelihood": "normal", "steps": 600, "seed": 0}
wide = ez.fit("autoencoder", known, guide="amortized-delta", **options, progress=False)
of_known, of_new = [(wide.reconstruct(x) - x).square().mean() for x in (known, new)]
print(f"squared error of known rows {of_known:.4f}, of new ones {of_new:.4f}")
assert of_new > 10 * of_known
```

*Holes*. Between and beyond the codes of the data the decoder has never been asked for anything, and what it gives there
need not look like data; a VAE's noise is what fills them. Three clusters have a code of one number each. The line is
what the decoder makes of all codes from the least to the largest:

```python
torch.manual_seed(0)
corners = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 5.0]]).repeat(100, 1)
rows = (corners + 0.4 * torch.randn(300, 2)).double()
options = {"latent_dim": 1, "likelihood": "normal", "steps": 600, "seed": 0}
line = ez.fit("autoencoder", rows, guide="amortized-delta", **options, progress=False)
codes = line.transform()
grid = torch.linspace(codes.min(), codes.max(), 200).double()
decoded = line.entry.decode(grid[:, None]).detach()
figure, axes = plt.subplots(figsize=(5, 4))
axes.plot(*rows.T, ".", color="0.6", label="rows")
axes.plot(*decoded.T, ".-", color="C1", label="decoded codes")
axes.set(xlabel="first column", ylabel="second column")
axes.legend()
assert (torch.cdist(decoded, rows).min(1).values > 1).double().mean() > 0.05
```

*Dead codes*. A dimension whose outgoing weights have shrunk, or whose units all saturate (`tanh`) or are off (`relu`),
has no gradient and stays unused; its codes do not vary.

References
----------
```bibtex
@article{baldi1989neural,
  author = {Baldi, Pierre and Hornik, Kurt},
  title = {Neural networks and principal component analysis: Learning from examples without local minima},
  journal = {Neural Networks}, volume = {2}, number = {1}, pages = {53--58}, year = {1989}
}
@article{bourlard1988auto,
  author = {Bourlard, Herv{\'e} and Kamp, Yves},
  title = {Auto-association by multilayer perceptrons and singular value decomposition},
  journal = {Biological Cybernetics}, volume = {59}, pages = {291--294}, year = {1988}
}
@article{hinton2006reducing,
  author = {Hinton, Geoffrey E. and Salakhutdinov, Ruslan R.},
  title = {Reducing the Dimensionality of Data with Neural Networks},
  journal = {Science}, volume = {313}, number = {5786}, pages = {504--507}, year = {2006}
}
```
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.networks import NetworkOptions, RowLikelihood, draw_weights, multilayer, refuse_rows
from elbozoo.models.contract.options import Field

NO_DENSITY = "the prior of its code is flat, so that p(x) does not exist and a q with a density has nothing to bound"
ONE_CODE = "one code for all rows gives them all the same reconstruction"


class AutoencoderOptions(NetworkOptions):
    """Options of :class:`Autoencoder`."""

    latent_dim: int = Field(2, ge=1, description="dimension K of the code")
    decoder: Literal["mlp", "linear"] = Field("mlp", description="decoder: one hidden layer, or a matrix and a bias")


class Autoencoder(Entry):
    """Autoencoder: z flat, x ~ Bernoulli(sigmoid(y)) or N(m + s y, (s σ)²) with y = decoder(z).

    Attributes
    ----------
    decoder : nn.Sequential
        W_1, b_1, W_2, b_2: the network z (..., K) to y (..., D); W and b where it is linear.
    likelihood : RowLikelihood
        p(x given y), with σ, m and s.
    """

    Options = AutoencoderOptions
    options: AutoencoderOptions
    dtype = torch.float32
    example_columns = 6

    def __init__(self, options: AutoencoderOptions, columns: int) -> None:
        super().__init__(options, columns)
        is_linear = options.decoder == "linear"
        self.decoder = (
            nn.Sequential(nn.Linear(options.latent_dim, columns))
            if is_linear
            else multilayer(options.latent_dim, columns, options)
        )
        self.likelihood = RowLikelihood(columns, options)

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse cells that are neither 0 nor 1 where the likelihood is Bernoulli."""
        refuse_rows(x, list(range(x.shape[1])), is_binary=options.likelihood == "bernoulli")

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start with fresh random weights about the columns' means."""
        for layer in self._linear_layers():
            layer.reset_parameters()
        self.likelihood.initialize(x, self._linear_layers()[-1])

    def randomize(self) -> None:
        """Draw weights large enough that the rows show their codes; the noise has a quarter of their scale."""
        draw_weights(self._linear_layers(), self.likelihood)

    def guide_refusal(self, family: str, source: str) -> str | None:
        """Refuse what needs a prior, and what reads nothing off the rows."""
        if family != "delta":
            return NO_DENSITY
        return ONE_CODE if source == "shared" else None

    def forward(self, batch: Batch) -> Tensor:
        """z (B, K) flat; x (B, D) ~ the likelihood at decoder(z)."""
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood.distribution(self.decoder(z)), obs=batch.x)

    def prior(self) -> dist.TorchDistribution:
        """Flat p(z), of log density 0, event shape (K,); its draws are standard normal, by convention."""
        return self._standard_normal().mask(False)

    def decode(self, z: Tensor) -> Tensor:
        """Mean of x given codes ``z`` (..., K): (..., D), probabilities under Bernoulli."""
        mean: Tensor = self.likelihood.distribution(self.decoder(z)).mean
        return mean

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x_n given z_g) in nats, (N, G), for rows ``x`` (N, D) and codes ``z`` (G, K)."""
        return self.likelihood.log_likelihood(x, self.decoder(z))

    def _standard_normal(self) -> dist.TorchDistribution:
        zeros = self._linear_layers()[0].weight.new_zeros(self.options.latent_dim)
        normal: dist.TorchDistribution = dist.Normal(zeros, 1.0).to_event(1)
        return normal

    def _linear_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.decoder if isinstance(layer, nn.Linear)]
