r"""Variational autoencoder: a neural decoder of a normal latent.

A point in a low-dimensional latent space passes through a small neural network that says what each column
looks like. It is PPCA with a bent loading: the first member of the zoo whose posterior has no formula, and
therefore the one in which the approximation and the amortization gap are both at work.

$$
z_n \sim \mathcal N(0, I_K), \qquad y = W_2\, a(W_1 z_n + b_1) + b_2
$$

$$
x_n \mid z_n \sim \prod_d \mathrm{Bernoulli}\bigl(\mathrm{sigmoid}(y_d)\bigr)
\quad\text{or}\quad \prod_d \mathcal N\bigl(m_d + s_d\, y_d,\ (s_d\, \sigma)^2\bigr)
\quad\text{or}\quad \prod_d \mathrm{Categorical}\bigl(\mathrm{softmax}(y_{d1}, \dots, y_{dL})\bigr)
$$

Under `likelihood = normal` the column means $m_d$ and standard deviations $s_d$ of the data are fixed at
the start and are no part of θ: the network works in units of the columns, so raw data of any units
will do, and the one learned noise scale $\sigma$ is a share of each column's standard deviation (a constant column
has $s_d = 1$). The densities are those of the raw columns. Under `likelihood = categorical` each column takes one of
$L$ `levels` 0, ..., L - 1, such as the grey values of a pixel, with a probability of its own for every level: it can be
multimodal, and says of no level that it is next to another.

With `architecture = conv` rows are images, of `image_shape`, and y comes from two dense layers and transposed
convolutions that double the sides of feature maps up to the image's: a stroke is learned once for all places. Encoders
are then convolutional too, unless `encoder` says otherwise.

The evidence $p(x) = \int p(x \mid z)\, \mathcal N(z; 0, I)\, dz$ has no closed form, but with $K \le 2$ it is an
integral over a line or a plane, which quadrature does to many digits with an error estimate. The trapezoid rule
converges faster than any power of its spacing for smooth integrands, hence the default `activation = tanh`; `relu` has
kinks and costs more nodes for fewer digits.

What goes wrong:

*Posterior collapse*, where latent dimensions are left unused, so that $q(z \mid x)$ is the prior, because a local
maximum of the ELBO says so or because the noise explains the rest (Lucas et al. 2019, under `ppca`). A dimension that
is used has means of q that differ from row to row; one that is not has the mean 0 for every row:

```python
settings = {"guide": "amortized", "likelihood": "normal", "seed": 0, "progress": False}
fit = ez.fit("vae", "wine-standardised", latent_dim=8, hidden=16, steps=400, **settings)
spread = fit.transform().var(0).sort(descending=True).values
figure, axes = plt.subplots(figsize=(5, 2.5), layout="constrained")
axes.bar(range(1, 9), spread.tolist())
axes.set(xlabel="latent dimension", ylabel="variance of the means of q")
used = int((spread > 0.01).sum())
print(f"used: {used} of 8 dimensions")
assert 2 <= used <= 7
```

*Unbounded likelihood*: a decoder that passes through every datum wants $\sigma = 0$; `noise_floor` bounds it, and is
part of the model. A fit whose `noise_scale` is far below the noise of its data has memorised them, and new rows are
what it cannot explain:

```python
draw = torch.Generator().manual_seed(0)
z = torch.randn(80, 2, generator=draw)
rows = torch.cat([z.sin(), z.prod(1, keepdim=True), z], 1)
x, new = (rows + 0.3 * torch.randn(80, 5, generator=draw)).split([20, 60])
means = {}
for floor in (0.01, 0.3):
    fit = ez.fit("vae", x, noise_floor=floor, hidden=32, steps=600, **settings)
    means[floor] = [float(fit.score_samples(of).mean()) for of in (x, new)]
    noise = float(fit.entry.likelihood.noise_scale.detach())
    print(f"floor {floor}: σ {noise:.3f},", end=" ")
    print(f"log p(x) {means[floor][0]:.1f} nats a row,", end=" ")
    print(f"of new rows {means[floor][1]:.1f}")
assert means[0.01][0] > means[0.3][0] + 3 and means[0.01][1] < means[0.3][1] - 10
```

*Sharp posteriors*: their width is of the order of $\sigma$, so a small noise makes q harder to learn and the integral
harder to do. The same curve, seen through more noise and through less:

```python
z = torch.randn(100, 1, generator=draw)
curve = torch.cat([z, z.sin(), z.cos()], 1)
noise = torch.randn(100, 3, generator=draw)
gaps, small = {}, {"hidden": 16, "steps": 600}
for scale in (0.2, 0.02):
    fit = ez.fit("vae", curve + scale * noise, latent_dim=1, **small, **settings)
    gaps[scale] = (fit.log_evidence().value - fit.elbo()) / 100
    print(f"noise {scale}: gap {gaps[scale]:.3f} nats a row")
assert gaps[0.02] > 2 * gaps[0.2]
```

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
@inproceedings{vandenoord2016pixel,
  author = {van den Oord, A{\"a}ron and Kalchbrenner, Nal and Kavukcuoglu, Koray},
  title = {Pixel Recurrent Neural Networks},
  booktitle = {International Conference on Machine Learning}, pages = {1747--1756}, year = {2016}
}
@article{burgess2018understanding,
  author = {Burgess, Christopher P. and Higgins, Irina and Pal, Arka and Matthey, Loic and Watters, Nick and
    Desjardins, Guillaume and Lerchner, Alexander},
  title = {Understanding disentangling in {$\beta$-VAE}},
  journal = {arXiv preprint arXiv:1804.03599}, year = {2018}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.images import ConvDecoder, Doubling, image_shape
from elbozoo.models.contract.networks import (
    ACTIVATIONS,
    MOST_LEVELS,
    LevelLikelihood,
    NetworkOptions,
    RowLikelihood,
    count_levels,
    multilayer,
    refuse_levels,
    refuse_rows,
)
from elbozoo.models.contract.options import Field

EXAMPLE_LEVELS = 4
CHUNK_ELEMENTS = 2**23  # numbers that the decoder gives at once where it meets many latent values
GAINS = {"bernoulli": 6.0, "normal": 1.5, "categorical": 3.0}  # size of y in simulated data


class VAEOptions(NetworkOptions):
    """Options of :class:`VAE`."""

    likelihood: Literal["bernoulli", "normal", "categorical"] = Field(  # type: ignore[assignment]  # one more choice
        "bernoulli",
        description="of each column: of zeros and ones, of numbers with a learned noise scale, or of whole numbers "
        "from 0 with a probability each",
    )
    latent_dim: int = Field(2, ge=1, description="dimension K of the latent space")
    levels: int | None = Field(
        None,
        ge=2,
        le=MOST_LEVELS,
        description="number L of values that a column takes under likelihood=categorical; none counts the largest one",
    )
    architecture: Literal["mlp", "conv"] = Field(
        "mlp", description="of the decoder: one hidden layer, or convolutions for rows that are images"
    )
    channels: int = Field(16, ge=1, description="channels of the feature maps under architecture=conv")
    image_shape: str | None = Field(
        None, description="shape of a row that is an image, such as 8x8 or 3x32x32; none takes a square where it must"
    )


class VAE(Entry):
    """Variational autoencoder: z ~ N(0, I), x ~ the likelihood of each column at y = decoder(z).

    Attributes
    ----------
    decoder : nn.Sequential or ConvDecoder
        W_1, b_1, W_2, b_2: the network z (..., K) to y (..., D), or to (..., D * L) under ``likelihood=categorical``.
    likelihood : RowLikelihood
        p(x given y), with σ, m and s under ``likelihood=normal``.
    """

    Options = VAEOptions
    options: VAEOptions
    dtype = torch.float32
    example_columns = 8

    def __init__(self, options: VAEOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.likelihood: RowLikelihood
        if options.likelihood == "categorical":
            self.likelihood = LevelLikelihood(columns, options.levels or EXAMPLE_LEVELS, options)
        else:
            self.likelihood = RowLikelihood(columns, options)
        if options.architecture == "conv" or options.image_shape is not None:
            self.image_shape = image_shape(options.image_shape, columns)
        self.decoder = self._decoder()

    @classmethod
    def from_data(cls, x: Tensor, *, seed: int = 0, names: Sequence[str] | None = None, **options: Any) -> Self:
        """Build the entry as every other, with as many levels as the data have, unless they are given."""
        parsed = cls.Options.parse(options)
        if parsed.likelihood == "categorical" and parsed.levels is None:
            options["levels"] = count_levels(x)
        return super().from_data(x, seed=seed, names=names, **options)

    @classmethod
    def check_data(cls, x: Tensor, options: VAEOptions) -> None:
        """Refuse more latent dimensions than rows or columns allow, and cells that the likelihood has no value for."""
        rows, columns = x.shape
        if options.latent_dim > min(rows - 1, columns):
            raise InvalidInput(
                f"option latent_dim: found {options.latent_dim} for {rows} rows x {columns} columns, expected at most "
                f"{min(rows - 1, columns)}: data of fewer columns or rows fill no more dimensions"
            )
        refuse_rows(x, list(range(columns)), is_binary=options.likelihood == "bernoulli")
        if options.likelihood == "categorical":
            refuse_levels(x, options.levels or EXAMPLE_LEVELS)

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start with fresh random weights about the columns' means, so that only the structure is left to learn."""
        for layer in self._layers():
            layer.reset_parameters()
        self.likelihood.initialize(x, self._head())

    def randomize(self) -> None:
        """Draw weights large enough that the rows show the latent's structure; the noise has a quarter of its scale."""
        *hidden, last = self._layers()
        with torch.no_grad():
            for layer in hidden:
                layer.weight.normal_().mul_(1.5 / math.sqrt(_fan_in(layer)))
                layer.bias.normal_()  # type: ignore[union-attr]  # the last layer alone may have none
            last.weight.normal_().mul_(GAINS[self.options.likelihood] / math.sqrt(_fan_in(last)))
            self._head().bias.zero_()
            if self.likelihood.has_noise:
                self.likelihood.set_noise_scale(0.25)

    def forward(self, batch: Batch) -> Tensor:
        """z (B, K) ~ N(0, I); x (B, D) ~ the likelihood at decoder(z)."""
        zeros = self._head().bias.new_zeros(self.options.latent_dim)
        observed = self.likelihood.checked(batch.x)
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            return pyro.sample("x", self.likelihood.distribution(self.decoder(z)), obs=observed)

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Return simulated rows in the dtype of all others: levels are drawn as integers."""
        return observed.to(template.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Mean of x given ``z`` (..., K): (..., D), probabilities under Bernoulli, mean levels under categorical."""
        return self.likelihood.mean(self.decoder(z))

    def elements(self, x: Tensor) -> int:
        """Return the number of outputs of the decoder: that of columns, times the levels of each."""
        return self.likelihood.outputs

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x_n given z_g) in nats, (N, G), for rows ``x`` (N, D) and latent values ``z`` (G, K)."""
        at_once = max(1, CHUNK_ELEMENTS // self.likelihood.outputs)
        parts = [self.likelihood.log_likelihood(x, self.decoder(part)) for part in z.split(at_once)]
        return torch.cat(parts, -1)

    def _decoder(self) -> nn.Module:
        options, outputs = self.options, self.likelihood.outputs
        if options.architecture == "mlp":
            return multilayer(options.latent_dim, outputs, options)
        assert self.image_shape is not None
        numbers, activation = outputs // self.columns, ACTIVATIONS[options.activation]
        return ConvDecoder(options.latent_dim, self.image_shape, numbers, options.hidden, options.channels, activation)

    def _layers(self) -> list[nn.Linear | Doubling]:
        """All layers with weights, in order."""
        return [module for module in self.decoder.modules() if isinstance(module, nn.Linear | Doubling)]

    def _head(self) -> Any:
        """Where the bias of y is."""
        return self.decoder if isinstance(self.decoder, ConvDecoder) else self._layers()[-1]


def _fan_in(layer: nn.Linear | Doubling) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.fan_in
