r"""Variational autoencoder: a neural decoder of a normal latent.

A point in a low-dimensional latent space passes through a small neural network that says what each column
looks like. It is PPCA with a bent loading: the first member of the zoo whose posterior has no formula, and
therefore the one in which the approximation and the amortization gap are both at work.

$$
z_n \sim \mathcal N(0, I_K), \qquad y = W_2\, a(W_1 z_n + b_1) + b_2, \qquad
x_n \mid z_n \sim \prod_d \mathrm{Bernoulli}\bigl(\mathrm{sigmoid}(y_d)\bigr)
\quad\text{or}\quad \prod_d \mathcal N\bigl(m_d + s_d\, y_d,\ (s_d\, \sigma)^2\bigr)
$$

Under `likelihood = normal` the column means $m_d$ and standard deviations $s_d$ of the data are fixed at
the start and are no part of θ: the network works in units of the columns, so raw data of any units
will do, and the one learned noise scale $\sigma$ is a share of each column's standard deviation (a constant column
has $s_d = 1$). The densities are those of the raw columns.

The evidence $p(x) = \int p(x \mid z)\, \mathcal N(z; 0, I)\, dz$ has no closed form, but with $K \le 2$ it is an
integral over a line or a plane, which quadrature does to many digits with an error estimate. The trapezoid rule
converges faster than any power of its spacing for smooth integrands, hence the default `activation = tanh`; `relu` has
kinks and costs more nodes for fewer digits.

What goes wrong: *posterior collapse*, where latent dimensions are left unused, so that $q(z \mid x)$ is the prior,
because a local maximum of the ELBO says so or because the noise explains the rest
(Lucas et al. 2019, under `ppca`). *Unbounded likelihood*: a decoder that passes through every datum wants
$\sigma = 0$; `noise_floor` bounds it, and is part of the model. A fit whose `noise_scale` sits at the floor has
memorised its data. *Sharp posteriors*: their width is of the order of $\sigma$, so a small noise makes q harder to
learn and the integral harder to do.

References
----------
```bibtex
@inproceedings{kingma2014auto,
  author = {Kingma, Diederik P. and Welling, Max},
  title = {Auto-Encoding Variational {B}ayes},
  booktitle = {International Conference on Learning Representations}, year = {2014}
}
@inproceedings{rezende2014stochastic,
  author = {Rezende, Danilo Jimenez and Mohamed, Shakir and Wierstra, Daan},
  title = {Stochastic Backpropagation and Approximate Inference in Deep Generative Models},
  booktitle = {International Conference on Machine Learning}, pages = {1278--1286}, year = {2014}
}
```
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.networks import ACTIVATIONS, refuse_rows, spread, squared_distances
from elbozoo.models.contract.options import Field, Options


class VAEOptions(Options):
    """Options of :class:`VAE`."""

    latent_dim: int = Field(2, ge=1, description="dimension K of the latent space")
    hidden: int = Field(64, ge=1, description="width of the hidden layer")
    activation: Literal["tanh", "relu", "softplus"] = Field("tanh", description="nonlinearity of the hidden layer")
    likelihood: Literal["bernoulli", "normal"] = Field(
        "bernoulli", description="of each column: of zeros and ones, or of numbers with a learned noise scale"
    )
    noise_floor: float = Field(
        0.01, ge=0, lt=1, description="least noise scale under likelihood=normal, in standard deviations of the columns"
    )


class VAE(Entry):
    """Variational autoencoder: z ~ N(0, I), x ~ Bernoulli(sigmoid(y)) or N(m + s y, (s σ)²) with y = decoder(z).

    Attributes
    ----------
    decoder : nn.Sequential
        The network z (..., K) to y (..., D), one hidden layer.
    noise_scale : PyroParam ()
        σ, a share of each column's standard deviation, above ``noise_floor``; only under ``likelihood=normal``.
    location, unit : buffers (D,)
        m and s, mean and standard deviation of the columns, not learned; only under ``likelihood=normal``.
    """

    Options = VAEOptions
    options: VAEOptions
    dtype = torch.float32
    example_columns = 8
    location: Tensor
    unit: Tensor

    def __init__(self, options: VAEOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.decoder = nn.Sequential(
            nn.Linear(options.latent_dim, options.hidden),
            ACTIVATIONS[options.activation](),
            nn.Linear(options.hidden, columns),
        )
        if options.likelihood == "normal":
            self.register_buffer("location", torch.zeros(columns))
            self.register_buffer("unit", torch.ones(columns))
            self.noise_scale = PyroParam(torch.tensor(1.0), constraints.greater_than(options.noise_floor))

    @classmethod
    def check_data(cls, x: Tensor, options: VAEOptions) -> None:
        """Refuse more latent dimensions than rows or columns allow, and under Bernoulli all but zeros and ones."""
        rows, columns = x.shape
        if options.latent_dim > min(rows - 1, columns):
            raise InvalidInput(
                f"option latent_dim: found {options.latent_dim} for {rows} rows x {columns} columns, expected at most "
                f"{min(rows - 1, columns)}: data of fewer columns or rows fill no more dimensions"
            )
        refuse_rows(x, list(range(columns)), is_binary=options.likelihood == "bernoulli")

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start with fresh random weights about the columns' means, so that only the structure is left to learn."""
        for layer in self._linear_layers():
            layer.reset_parameters()
        with torch.no_grad():
            if self.options.likelihood == "bernoulli":
                smallest = 0.5 / len(x)
                self._linear_layers()[-1].bias.copy_(x.mean(0).clamp(smallest, 1 - smallest).logit())
            else:
                self._linear_layers()[-1].bias.zero_()
                self.location.copy_(x.mean(0))
                self.unit.copy_(spread(x))
                self._set_noise_scale(math.sqrt(0.5))

    def randomize(self) -> None:
        """Draw weights large enough that the rows show the latent's structure; the noise has a quarter of its scale."""
        first, last = self._linear_layers()
        gain = 6.0 if self.options.likelihood == "bernoulli" else 1.5
        with torch.no_grad():
            first.weight.normal_().mul_(1.5 / math.sqrt(self.options.latent_dim))
            first.bias.normal_()
            last.weight.normal_().mul_(gain / math.sqrt(self.options.hidden))
            last.bias.zero_()
            if self.options.likelihood == "normal":
                self._set_noise_scale(0.25)

    def forward(self, batch: Batch) -> Tensor:
        """z (B, K) ~ N(0, I); x (B, D) ~ the likelihood at decoder(z)."""
        zeros = self._linear_layers()[0].weight.new_zeros(self.options.latent_dim)
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            return pyro.sample("x", self._columns_given(z).to_event(1), obs=batch.x)

    def decode(self, z: Tensor) -> Tensor:
        """Mean of x given ``z`` (..., K): (..., D), probabilities under Bernoulli."""
        return self._columns_given(z).mean

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x_n given z_g) in nats, (N, G), for rows ``x`` (N, D) and latent values ``z`` (G, K).

        A matrix product: neither likelihood needs a tensor of shape (N, G, D).
        """
        output = self.decoder(z)
        if self.options.likelihood == "bernoulli":
            return x @ output.mT - functional.softplus(output).sum(-1)
        scaled = (x - self.location) / self.unit
        log_volume = self.unit.log().sum() + self.columns * (self.noise_scale.log() + 0.5 * math.log(2 * math.pi))
        return -0.5 * squared_distances(scaled, output) / self.noise_scale.square() - log_volume

    def _columns_given(self, z: Tensor) -> dist.Distribution:
        output = self.decoder(z)
        if self.options.likelihood == "bernoulli":
            return dist.Bernoulli(logits=output)
        return dist.Normal(self.location + self.unit * output, self.unit * self.noise_scale)

    def _linear_layers(self) -> tuple[nn.Linear, nn.Linear]:
        return self.decoder[0], self.decoder[2]  # type: ignore[return-value]

    def _set_noise_scale(self, share: float) -> None:
        """Set σ that far on the way from its floor to 1."""
        floor = self.options.noise_floor
        self.noise_scale = torch.full_like(self.noise_scale, floor + (1 - floor) * share)
