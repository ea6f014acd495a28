r"""Semi-supervised variational autoencoder: a class that is known for some rows and latent in the rest.

A few rows have a label, as where somebody looked at a hundred images out of thousands. The class is a part of the
program that is observed where there is a label and summed over where there is none, so that all rows teach the
decoder, and what they teach it says which class a row without a label is of. It is model M2 of Kingma et al. (2014):

$$
y_n \sim \mathrm{Categorical}(\pi), \qquad z_n \sim \mathcal N(0, I_K), \qquad
x_n \mid y_n, z_n \sim \prod_d \mathrm{Bernoulli}\bigl(\mathrm{sigmoid}(u_{nd})\bigr)
\quad\text{or}\quad \prod_d \mathcal N\bigl(m_d + s_d\, u_{nd},\ (s_d\, \sigma)^2\bigr)
$$

with $u_n = W_2\, a(W_1 z_n + V e_{y_n} + b_1) + b_2$ and $e_y$ the unit vector of class $y$. One column of the table
holds the labels. A row without one has an empty cell there, or NaN, or $-1$ as scikit-learn has it. The evidence of a
row is that of all that is known of it,

$$
\log p(x_n, y_n) = \log \pi_{y_n} + \log \int p(x_n \mid y_n, z)\, \mathcal N(z; 0, I)\, dz
\qquad\text{or}\qquad
\log p(x_n) = \log \sum_y \pi_y \int p(x_n \mid y, z)\, \mathcal N(z; 0, I)\, dz ,
$$

by quadrature where $K \le 2$. So the class of a row has a posterior that needs no q: with `entry.labelled(x, c)`, the
rows with class $c$ as their label, $\log p(y = c \mid x_n)$ is `score_samples(entry.labelled(x, c))` minus
`score_samples(x)`.

*How a class comes to be partly observed.* Pyro's `obs_mask` splits such a site in two, `y_observed` and
`y_unobserved`, and masks each half where the other one counts. That is right as long as q has the same mask. A q that
does not know of it gains its entropy in every row with a label, and the "bound" passes the evidence. And a q that is
certain of the label, over an unmasked class, weighs the other classes as $0 \cdot \infty$. So the program here draws
`y_unobserved` in *every* row and leaves it aside where there is a label: every q is a bound. What was left aside has
its prior as posterior, and a q that says so pays nothing for it.

The guide `label-then-latent`, q(y given x) q(z given x, y), is that of the paper: a classifier, and an encoder that is
told the class. With the objective `elbo-and-labels` the classifier learns from the labels as well
(equation 9 there). The bound alone gives it no reason to: it asks nothing of q(y given x) where the class is known.

What goes wrong:

*Classes of its own.* Nothing says that what the rows fall into most readily is what the labels mean: with few labels a
class may take over the rows of another, or none. Rows below differ a little by class and much by style, and in the few
that have a label the two go together. The class that is learned is the style:

```python
draw = torch.Generator().manual_seed(0)
n = torch.arange(200)
y, style = n % 2, torch.where(n < 6, n % 2, torch.randint(0, 2, (200,), generator=draw))
x = torch.stack([y, 4 * style], 1) + 0.4 * torch.randn(200, 2, generator=draw)
rows = torch.cat([x, torch.where(n < 6, y, -1)[:, None]], 1)
settings = {"likelihood": "normal", "latent_dim": 1, "steps": 250, "progress": False}
fit = ez.fit("semi-supervised-vae", rows, guide="amortized", hidden=16, **settings)
log_p = [fit.score_samples(fit.entry.labelled(fit.x, c)) for c in (0, 1)]
found = (log_p[1] > log_p[0])[6:]
as_class, as_style = (float((found == of[6:]).double().mean()) for of in (y, style))
print(f"the class that was found is that of {as_class:.0%} of the rows,", end=" ")
print(f"and the style of {as_style:.0%}")
assert as_style > 0.9 and as_class < 0.7
```

*A classifier that nobody taught.* The bound asks nothing of q(y given x) where the class is known. With a label in
every row the objective `elbo-enumerated`, which is the bound alone, leaves the classifier as it was drawn, and rows
without labels show it:

```python
rows = torch.cat([x, y[:, None]], 1)
gaps = {}
for objective in ("elbo-enumerated", "elbo-and-labels"):
    options = {"objective": objective, "hidden": 16, "seed": 0, **settings}
    fit = ez.fit("semi-supervised-vae", rows, guide="label-then-latent", **options)
    without = fit.entry.labelled(fit.x, -1)
    gaps[objective] = (fit.log_evidence(without).value - fit.elbo(without)) / 200
    right = float((fit.transform(without)[:, 1] > 0.5).eq(y).double().mean())
    print(f"{objective}: q names the class of {right:.0%},", end=" ")
    print(f"gap without labels {gaps[objective]:.2f} nats a row")
assert gaps["elbo-enumerated"] > 2 * gaps["elbo-and-labels"]
```

*A latent that carries the class*, as for `conditional-vae`. *Without any label* the program is a mixture of decoders:
`classes` says of how many, and their order is arbitrary. *Labels that are missing for a reason*: the program takes it
that a label is missing by chance, whatever the class.

References
----------
```bibtex
@inproceedings{kingma2014semi,
  author = {Kingma, Diederik P. and Mohamed, Shakir and Rezende, Danilo Jimenez and Welling, Max},
  title = {Semi-supervised Learning with Deep Generative Models},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {27}, year = {2014}
}
```
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.checks import values_are_checked
from elbozoo.models.contract.classes import beside, count_classes, refuse_classes, unit_vectors
from elbozoo.models.contract.entry import Entry, default_names
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.networks import NetworkOptions, RowLikelihood, draw_weights, multilayer, refuse_rows
from elbozoo.models.contract.options import Field, LabelColumn

logger = logging.getLogger(__name__)

EXAMPLE_CLASSES = 3
UNLABELLED = -1
DRAWN, KNOWN, CLASS = "y_unobserved", "y_observed", "y"  # as Pyro names the parts of a site with obs_mask


class SemiSupervisedVAEOptions(NetworkOptions):
    """Options of :class:`SemiSupervisedVAE`."""

    latent_dim: int = Field(2, ge=1, description="dimension K of the latent space")
    label: LabelColumn = Field(
        -1, description="column of the labels; an empty cell, NaN or -1 where a row has none; the others are explained"
    )
    classes: int | None = Field(None, ge=1, description="number C of classes; none counts those of the labels")


class SemiSupervisedVAE(Entry):
    """Semi-supervised VAE: y ~ Categorical(π), z ~ N(0, I), x ~ the likelihood at decoder(z, y); y seen in some rows.

    Attributes
    ----------
    classes : int
        C, number of classes.
    class_logits : Parameter (C,)
        π, share of each class, as its log up to a constant.
    decoder : nn.Sequential
        W_1, b_1, W_2, b_2: the network (z, e_y) (..., K + C) to u (..., D), for the D columns beside the label; V is
        the last C columns of the first matrix.
    likelihood : RowLikelihood
        p(x given u), with σ, m and s.
    """

    Options = SemiSupervisedVAEOptions
    options: SemiSupervisedVAEOptions
    dtype = torch.float32
    example_columns = 7
    allows_missing = True
    amortized_guide = "label-then-latent"
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {"x": ("explained",)}

    def __init__(self, options: SemiSupervisedVAEOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.classes = options.classes or EXAMPLE_CLASSES
        self.explained = _explained(options, columns)
        self.class_logits = nn.Parameter(torch.zeros(self.classes))
        self.decoder = multilayer(options.latent_dim + self.classes, len(self.explained), options)
        self.likelihood = RowLikelihood(len(self.explained), options)

    @classmethod
    def from_data(cls, x: Tensor, *, seed: int = 0, names: Sequence[str] | None = None, **options: Any) -> Self:
        """Build the entry as every other, with as many classes as the labels have, unless they are given.

        Raises
        ------
        InvalidInput
            For options or data that do not fit, and where neither labels nor options say how many classes there are.
        """
        parsed = cls.Options.parse(options).at_positions(default_names(x.shape[1]) if names is None else names)
        codes = cls.arrange(x, parsed)[:, _label(parsed)]
        is_unlabelled = bool((codes == UNLABELLED).all())
        if parsed.classes is None and is_unlabelled:
            raise InvalidInput(
                f"option label: found no label in {len(x)} rows, expected some, or the number of classes that they "
                "would have; set classes"
            )
        if parsed.classes is None:
            options["classes"] = count_classes(codes)
        if is_unlabelled:
            logger.warning("%s: no row has a label, so that classes are clusters, in no order", cls.name())
        return super().from_data(x, seed=seed, names=names, **options)

    @classmethod
    def arrange(cls, x: Tensor, options: SemiSupervisedVAEOptions) -> Tensor:
        """Return the rows with -1 in the place of a missing label.

        Raises
        ------
        InvalidInput
            For a cell beside the labels that is missing.
        """
        absent = x.isnan()
        if not absent.any():
            return x
        wrong = absent[:, _explained(options, x.shape[1])].nonzero()
        if len(wrong):
            row, position = wrong[0].tolist()
            raise InvalidInput(
                f"found no number in column {_explained(options, x.shape[1])[position] + 1}, row {row + 1} (counted "
                "from 1), expected one: labels alone may be missing; fill it in, or leave the row out"
            )
        return x.masked_fill(absent, UNLABELLED)

    @classmethod
    def check_data(cls, x: Tensor, options: SemiSupervisedVAEOptions) -> None:
        """Refuse labels that are no class, more latent dimensions than rows or columns, and wrong cells."""
        classes = options.classes or EXAMPLE_CLASSES
        refuse_classes(x, _label(options), "label", classes, options.latent_dim, blank=UNLABELLED)
        refuse_rows(x, _explained(options, x.shape[1]), is_binary=options.likelihood == "bernoulli")

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start with fresh random weights about the columns' means, and π at the labels' counts plus one each."""
        for layer in self._linear_layers():
            layer.reset_parameters()
        codes = self.codes(x)
        counts = torch.bincount(codes[codes != UNLABELLED], minlength=self.classes)
        with torch.no_grad():
            self.class_logits.copy_((counts + 1.0).log().log_softmax(0))
        self.likelihood.initialize(x[:, self.explained], self._linear_layers()[-1])

    def randomize(self) -> None:
        """Draw weights large enough that rows show both latent and class; the noise has a quarter of their scale."""
        with torch.no_grad():
            self.class_logits.normal_().mul_(0.5)
        draw_weights(self._linear_layers(), self.likelihood, inputs=self.options.latent_dim)

    def template(self, n: int) -> Tensor:
        """Rows (n, columns) of zeros, every other one of them on average with a label drawn from π."""
        rows = super().template(n)
        drawn = dist.Categorical(logits=self.class_logits.detach()).sample((n,))
        is_known = torch.rand(n) < 0.5
        rows[:, _label(self.options)] = torch.where(is_known, drawn, torch.full_like(drawn, UNLABELLED)).to(rows.dtype)
        return rows

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Put simulated columns (n, D) beside the label of the template."""
        rows = template.clone()
        rows[:, self.explained] = observed
        return rows

    def simulate_table(self, n: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Draw a table of ``n`` rows, some with their labels, and the class of each."""
        x, z = self.simulate(n, seed)
        assert isinstance(z, dict)
        return x, self._classes(self.codes(x), z[DRAWN])

    def _simulate(self, template: Tensor) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        x, z = super()._simulate(template)
        assert isinstance(z, dict)
        return x, {name: value for name, value in z.items() if name != KNOWN}

    def constant_data(self, x: Tensor) -> dict[str, Tensor]:
        """Return the label of each row, (N,), -1 where it has none; data that are drawn anew keep them."""
        return {"label": self.codes(x)}

    def coords(self) -> dict[str, Sequence[Any]]:
        """Names of the columns that are explained."""
        return {"explained": [self.names[column] for column in self.explained]}

    def forward(self, batch: Batch) -> Tensor:
        """y (B,) ~ Categorical(π), seen in some rows; z (B, K) ~ N(0, I); x (B, D) ~ likelihood at decoder(z, y)."""
        zeros = self._linear_layers()[0].weight.new_zeros(self.options.latent_dim)
        classes = dist.Categorical(logits=self.class_logits)
        labels = self.codes(batch.x)
        with pyro.plate("data", batch.total, subsample=batch.index):
            drawn = pyro.sample(DRAWN, classes)
            with poutine.mask(mask=labels != UNLABELLED):
                # What stands in the table is the label, also where a handler draws this site anew.
                pyro.sample(KNOWN, classes, obs=labels.clamp(min=0))
            y = self._classes(labels, drawn).to(zeros.dtype)
            # As pyro.deterministic, whose density is of single precision whatever the program's, which enumeration
            # refuses to multiply with ours.
            pyro.sample(CLASS, dist.Delta(y), obs=y, infer={"_deterministic": True})
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            return pyro.sample("x", self.likelihood.distribution(self._output(z, y)), obs=self.features(batch.x))

    def features(self, x: Tensor) -> Tensor:
        """Columns (N, D) beside the label."""
        return x[:, self.explained]

    def codes(self, x: Tensor) -> Tensor:
        """Label of each row, (N,) of int64, -1 where it has none.

        Raises
        ------
        InvalidInput
            For a class that the entry was not built for.
        """
        labels = x[:, _label(self.options)]
        codes = labels.long()
        if not values_are_checked():
            return codes
        wrong = labels[(codes != labels) | (codes < UNLABELLED) | (codes >= self.classes)]
        if len(wrong):
            raise InvalidInput(
                f"found the label {wrong[0].item():g}, expected 0 to {self.classes - 1}, the classes of the fit, or "
                f"{UNLABELLED} for none; fit again with rows of all classes, or set classes"
            )
        return codes

    def labelled(self, x: Tensor, code: int) -> Tensor:
        """Return the rows ``x`` (N, columns) with the class ``code`` as their label; -1 takes their labels off."""
        rows = x.clone()
        rows[:, _label(self.options)] = code
        return rows

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean of x given ``z`` (..., K) and classes ``y`` (...): (..., D), probabilities under Bernoulli."""
        mean: Tensor = self.likelihood.distribution(self._output(z, y)).mean
        return mean

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x_n, y_n given z_g), or log p(x_n given z_g) without a label: (N, G), nats.

        For rows ``x`` (N, columns) and latent values ``z`` (G, K); one pass through the decoder for each class.
        """
        labels, rows = self.codes(x), self.features(x)
        log_shares = self.class_logits.log_softmax(0)
        result = rows.new_full((len(x), len(z)), -math.inf)
        for code in range(self.classes):
            members = (labels == code) | (labels == UNLABELLED)
            if not members.any():
                continue
            output = self._output(z, labels.new_full((len(z),), code))
            terms = log_shares[code] + self.likelihood.log_likelihood(rows[members], output)
            result = result.index_put((members,), torch.logaddexp(result[members], terms))
        return result

    @staticmethod
    def _classes(labels: Tensor, drawn: Tensor) -> Tensor:
        """Label where there is one, otherwise the class that was drawn."""
        return torch.where(labels == UNLABELLED, drawn.long(), labels)

    def _output(self, z: Tensor, y: Tensor) -> Tensor:
        of_class = unit_vectors(y.long(), self.classes, z.dtype)
        shape = torch.broadcast_shapes(z.shape[:-1], y.shape)
        output: Tensor = self.decoder(torch.cat([z.expand(*shape, -1), of_class.expand(*shape, -1)], -1))
        return output

    def _linear_layers(self) -> tuple[nn.Linear, nn.Linear]:
        return self.decoder[0], self.decoder[2]  # type: ignore[return-value]


def _label(options: SemiSupervisedVAEOptions) -> int:
    """Position of the column of labels; an entry's options name columns by position."""
    assert isinstance(options.label, int)
    return options.label


def _explained(options: SemiSupervisedVAEOptions, columns: int) -> list[int]:
    """Positions of the columns beside the label."""
    return beside(_label(options), columns)
