r"""Conditional variational autoencoder: a decoder that is told the class of each row.

One column of the table is a condition, such as the digit that an image shows or the site a sample comes from. The
decoder takes it beside the latent, so that the latent is left with what the condition does not say: the style of a
digit rather than the digit. Rows of any class can then be drawn, and one row can be drawn again in every class.

$$
z_n \sim \mathcal N(0, I_K), \qquad y_n = W_2\, a(W_1 z_n + V e_{c_n} + b_1) + b_2, \qquad
x_n \mid z_n, c_n \sim \prod_d \mathrm{Bernoulli}\bigl(\mathrm{sigmoid}(y_{nd})\bigr)
\quad\text{or}\quad \prod_d \mathcal N\bigl(m_d + s_d\, y_{nd},\ (s_d\, \sigma)^2\bigr)
$$

with $e_c$ the unit vector of class $c$. What is measured is the conditional evidence
$p(x \mid c) = \int p(x \mid z, c)\, \mathcal N(z; 0, I)\, dz$: the condition itself is not explained, and its column
adds nothing to log p(x). An encoder sees the whole row, with the condition. As for `vae`, quadrature gives the
evidence where $K \le 2$, and under `likelihood = normal` the units $m_d$ and $s_d$ of the columns are fixed at the
start.

What goes wrong:

Everything that does for `vae`.

*A latent that carries the class*. Under the program $z$ is independent of $c$, and a good fit makes it so under the
aggregated posterior, but nothing forces it. Where the code is nearly free, $z$ tells the class once more, and a row
drawn again in another class takes something of its own class along:

```python
iris = ez.load_data("iris-standardised")
species = torch.as_tensor(iris.labels)
rows = torch.cat([iris.x, species[:, None]], 1)
options = {"guide": "amortized", "likelihood": "normal", "objective": "beta"}
shares = {}
for weight in (1, 0.01):
    options |= {"kl_weight": weight, "steps": 300, "seed": 0}
    z = ez.fit("conditional-vae", rows, **options, progress=False).transform()
    means = torch.stack([z[species == c].mean(0) for c in range(3)])
    shares[weight] = means.var(0, correction=0).sum() / z.var(0, correction=0).sum()
    print(f"β = {weight}: {shares[weight]:.1%} of the variance of z is between classes")
assert shares[1] < 0.05 < shares[0.01]
```

*Classes never seen*. A class without rows keeps its random starting column in $V$, and what is drawn from it means
nothing. Each fit has made room for a fourth class. About those with rows two seeds agree, in units of the columns:

```python
options = {"classes": 4, "guide": "amortized", "likelihood": "normal", "steps": 300}
drawn = []
for seed in range(2):
    four = ez.fit("conditional-vae", rows, seed=seed, **options, progress=False)
    with torch.no_grad():
        zeros = torch.zeros(4, 2, dtype=torch.float64)
        drawn.append(four.entry.decode(zeros, torch.arange(4)))
apart = (drawn[0] - drawn[1]).abs().mean(1)
for c in range(4):
    print(f"class {c}: the seeds differ by {apart[c]:.2f} standard deviations")
assert apart[3] > 2 * apart[:3].max()
```

Without `classes` a row of a new class is refused.

References
----------
```bibtex
@inproceedings{sohn2015learning,
  author = {Sohn, Kihyuk and Lee, Honglak and Yan, Xinchen},
  title = {Learning Structured Output Representation using Deep Conditional Generative Models},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {28}, year = {2015}
}
@inproceedings{kingma2014semi,
  author = {Kingma, Diederik P. and Mohamed, Shakir and Rezende, Danilo Jimenez and Welling, Max},
  title = {Semi-supervised Learning with Deep Generative Models},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {27}, year = {2014}
}
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.checks import values_are_checked
from elbozoo.models.contract.classes import beside, count_classes, refuse_classes, unit_vectors
from elbozoo.models.contract.entry import Entry, default_names
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.networks import NetworkOptions, RowLikelihood, draw_weights, multilayer, refuse_rows
from elbozoo.models.contract.options import Field, KeyColumn

EXAMPLE_CLASSES = 3


class ConditionalVAEOptions(NetworkOptions):
    """Options of :class:`ConditionalVAE`."""

    latent_dim: int = Field(2, ge=1, description="dimension K of the latent space")
    condition: KeyColumn = Field(-1, description="column that names the class of each row; the others are explained")
    classes: int | None = Field(None, ge=1, description="number C of classes; none counts those in the data")


class ConditionalVAE(Entry):
    """Conditional VAE: z ~ N(0, I), x ~ Bernoulli(sigmoid(y)) or N(m + s y, (s σ)²) with y = decoder(z, c).

    Attributes
    ----------
    classes : int
        C, number of classes.
    decoder : nn.Sequential
        W_1, b_1, W_2, b_2: the network (z, e_c) (..., K + C) to y (..., D), for the D columns beside the
        condition; V is the last C columns of the first matrix.
    likelihood : RowLikelihood
        p(x given y), with σ, m and s.
    """

    Options = ConditionalVAEOptions
    options: ConditionalVAEOptions
    dtype = torch.float32
    example_columns = 9
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {"x": ("explained",)}

    def __init__(self, options: ConditionalVAEOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.classes = options.classes or EXAMPLE_CLASSES
        self.explained = _explained(options, columns)
        self.decoder = multilayer(options.latent_dim + self.classes, len(self.explained), options)
        self.likelihood = RowLikelihood(len(self.explained), options)

    @classmethod
    def from_data(cls, x: Tensor, *, seed: int = 0, names: Sequence[str] | None = None, **options: Any) -> Self:
        """Build the entry as every other, with as many classes as the condition has, unless they are given."""
        parsed = cls.Options.parse(options).at_positions(default_names(x.shape[1]) if names is None else names)
        if parsed.classes is None:
            options["classes"] = count_classes(x[:, _condition(parsed)])
        return super().from_data(x, seed=seed, names=names, **options)

    @classmethod
    def check_data(cls, x: Tensor, options: ConditionalVAEOptions) -> None:
        """Refuse a condition that is no class, more latent dimensions than rows or columns, and wrong cells."""
        classes = options.classes or EXAMPLE_CLASSES
        refuse_classes(x, _condition(options), "condition", classes, options.latent_dim)
        refuse_rows(x, _explained(options, x.shape[1]), is_binary=options.likelihood == "bernoulli")

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start with fresh random weights about the columns' means over all classes."""
        for layer in self._linear_layers():
            layer.reset_parameters()
        self.likelihood.initialize(x[:, self.explained], self._linear_layers()[-1])

    def randomize(self) -> None:
        """Draw weights large enough that rows show both latent and class; the noise has a quarter of their scale."""
        draw_weights(self._linear_layers(), self.likelihood, inputs=self.options.latent_dim)

    def template(self, n: int) -> Tensor:
        """Rows (n, columns) with a class drawn at random, and zeros for what is explained."""
        rows = super().template(n)
        rows[:, _condition(self.options)] = torch.randint(self.classes, (n,)).to(rows.dtype)
        return rows

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Put simulated columns (n, D) beside the condition of the template."""
        rows = template.clone()
        rows[:, self.explained] = observed
        return rows

    def constant_data(self, x: Tensor) -> dict[str, Tensor]:
        """Return the class of each row, (N,)."""
        return {"condition": self.codes(x)}

    def coords(self) -> dict[str, Sequence[Any]]:
        """Names of the columns that are explained."""
        return {"explained": [self.names[column] for column in self.explained]}

    def forward(self, batch: Batch) -> Tensor:
        """z (B, K) ~ N(0, I); x (B, D) ~ the likelihood at decoder(z, c)."""
        zeros = self._linear_layers()[0].weight.new_zeros(self.options.latent_dim)
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            output = self._output(z, self.codes(batch.x))
            return pyro.sample("x", self.likelihood.distribution(output), obs=batch.x[:, self.explained])

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Mean of x given ``z`` (..., K) and classes ``condition`` (...): (..., D), probabilities under Bernoulli."""
        mean: Tensor = self.likelihood.distribution(self._output(z, condition)).mean
        return mean

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x_n given z_g, c_n) in nats, (N, G), for rows ``x`` (N, columns) and latent values ``z`` (G, K)."""
        codes, rows = self.codes(x), x[:, self.explained]
        result = rows.new_empty(len(x), len(z))
        # One pass through the decoder for each class that is there.
        for condition in codes.unique():
            members = codes == condition
            output = self._output(z, condition.expand(len(z)))
            result = result.index_put((members,), self.likelihood.log_likelihood(rows[members], output))
        return result

    def codes(self, x: Tensor) -> Tensor:
        """Class of each row, (N,) of int64.

        Raises
        ------
        InvalidInput
            For a class that the entry was not built for.
        """
        codes = x[:, _condition(self.options)].long()
        if values_are_checked() and len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < self.classes:
            wrong = codes[(codes < 0) | (codes >= self.classes)][0]
            raise InvalidInput(
                f"found the class {int(wrong)}, expected 0 to {self.classes - 1}, those of the fit; fit again with "
                "rows of all classes, or set classes"
            )
        return codes

    def _output(self, z: Tensor, condition: Tensor) -> Tensor:
        of_class = unit_vectors(condition, self.classes, z.dtype)
        joined = torch.cat([z, of_class.expand(*z.shape[:-1], -1)], -1)
        output: Tensor = self.decoder(joined)
        return output

    def _linear_layers(self) -> tuple[nn.Linear, nn.Linear]:
        return self.decoder[0], self.decoder[2]  # type: ignore[return-value]


def _condition(options: ConditionalVAEOptions) -> int:
    """Position of the column that is conditioned on; an entry's options name columns by position."""
    assert isinstance(options.condition, int)
    return options.condition


def _explained(options: ConditionalVAEOptions, columns: int) -> list[int]:
    """Positions of the columns beside the condition."""
    return beside(_condition(options), columns)
