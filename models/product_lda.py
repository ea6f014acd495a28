r"""Topic model: words from a product or a mixture of topics, with a logistic-normal prior.

A row counts how often each of $V$ words is in a document. Each document has proportions $\theta$ of $K$ topics, and
a topic is a distribution over words. *Latent Dirichlet allocation* (Blei et al. 2003) mixes the topics; here
inference is by an encoder, or any other guide, and the topics may be multiplied instead (Srivastava & Sutton 2017).

$$
z_n \sim \mathcal N\Bigl(0,\ \tfrac{1}{\alpha}\bigl(1 - \tfrac{1}{K}\bigr)\, I_K\Bigr), \qquad
\theta_n = \mathrm{softmax}(z_n), \qquad
x_n \mid z_n \sim \mathrm{Multinomial}\bigl(T_n,\ p(\theta_n)\bigr), \qquad T_n = \sum_v x_{nv}
$$

With `mixing = product` (ProdLDA) the words are a weighted product of experts, sharper than any of them, and with
`mixing = mixture` (plain LDA) an average:

$$
p(\theta) = \mathrm{softmax}\Bigl(\sum_k \theta_k \beta_k\Bigr) \propto \prod_k \mathrm{softmax}(\beta_k)^{\theta_k}
\qquad\text{or}\qquad p(\theta) = \sum_k \theta_k\, \mathrm{softmax}(\beta_k)
$$

The prior is the diagonal of Laplace's approximation to a symmetric Dirichlet of concentration $\alpha$, as Srivastava &
Sutton take it: not on the simplex, where it would have no mode for $\alpha \le 1$, but in the basis of the softmax
(MacKay 1998). What the diagonal leaves out, covariances of $-1/(K\alpha)$, matters for few topics: in every direction
that changes the $\theta_k$ the approximation's variance is $1/\alpha$ and this prior's $(1 - 1/K)/\alpha$, which is
that of the concentration $\alpha K / (K - 1)$. So everything is real, and a normal q can be reparameterised. Adding a
number to all $z_k$ changes nothing: along that direction the posterior is the prior. No bias is needed: since the
$\theta_k$ add up to one, it would be a part of every $\beta_k$.

What is measured is $p(x \mid T)$: the length $T_n$ of a document is not explained, and simulated documents have lengths
drawn from a Poisson distribution about the mean of the data. The densities are those of the counts and keep the
multinomial coefficient $T!\, /\, \prod_v x_v!$, the number of texts with the same counts. A bound per word of *texts*,
which is what a perplexity is made of, lacks it: subtract `log_coefficient(x)` from log p(x) before comparing. With two
topics the evidence is an integral over a plane, which quadrature does.

What goes wrong:

*Component collapse*, where all topics become the corpus's mean and q the prior. Early in training topics hardly differ,
so that θ says nothing and what it costs is saved; then nothing drives the topics apart. Srivastava & Sutton answer with
batch normalisation, dropout and a high learning rate. A decoder with batch normalisation has no density of one
document, so that its ELBO bounds nothing; here topics start apart instead, each from documents of its own, and the
learning rate of 0.01 is already high.

*Long documents*: their posterior is sharp, since it narrows with the root of $T$, so that an encoder has to be precise;
`semi-amortized` refines it. The same documents, with every word once and a hundred times:

```python
x = ez.load_data("simulate:product-lda", rows=100, seed=0).x
settings = {"guide": "amortized", "steps": 300, "seed": 0, "progress": False}
gaps = {}
for times in (1, 100):
    fit = ez.fit("product-lda", times * x, topics=2, **settings)
    gaps[times] = fit.ledger().amortization_gap / len(x)
    print(f"{times} times: amortization gap {gaps[times]:.2f} nats a document")
assert gaps[100] > 5 * gaps[1]
```

*Documents of very different lengths*: in units of the standard deviation of the counts long ones lie far out, and an
encoder that sees those may end at numbers that are not finite. So encoders see $\log(1 + x)$ here, with
`encoder_input=values` the counts themselves:

```python
torch.manual_seed(0)
words = torch.distributions.Dirichlet(torch.full((3, 20), 0.2)).sample()
share = torch.distributions.Dirichlet(torch.full((200, 3), 0.3)).sample()
lengths = [20000] * 10 + [20] * 190
texts = zip(lengths, share @ words)
x = torch.stack([torch.distributions.Multinomial(n, p).sample() for n, p in texts])
bounds = {}
for seen in ("log1p", "values"):
    fit = ez.fit("product-lda", x, topics=3, encoder_input=seen, **settings)
    bounds[seen] = fit.elbo() / 200
    print(f"encoder sees {seen}: ELBO {bounds[seen]:.2f} nats a document")
assert bounds["log1p"] > bounds["values"] + 0.1
```

*Topics by number*: no topic is the first, so that two fits agree up to an order; a matching, such as by SciPy's
`linear_sum_assignment`, comes before a comparison.

```python
from scipy.optimize import linear_sum_assignment

x = torch.distributions.Multinomial(60, share @ words).sample()
options = {"guide": "amortized", "topics": 3, "steps": 300, "progress": False}
fits = [ez.fit("product-lda", x, seed=seed, **options) for seed in (0, 1)]
one, other = (fit.entry.topic_words() for fit in fits)
distances = (one[:, None] - other).abs().sum(-1) / 2
order = linear_sum_assignment(distances)[1]
by_number, matched = distances.diagonal().mean(), distances[range(3), order].mean()
print(f"distance of topics, 0 to 1: by number {by_number:.2f}, matched {matched:.2f}")
assert matched < 0.1
```

*Products are not parts*: under `product` a document of two topics emphasises the words that both like, so that
`topic_words` says what a document of that topic alone has, not what the topic adds.

References
----------
```bibtex
@inproceedings{srivastava2017autoencoding,
  author = {Srivastava, Akash and Sutton, Charles},
  title = {Autoencoding Variational Inference for Topic Models},
  booktitle = {International Conference on Learning Representations}, year = {2017}
}
@article{blei2003latent,
  author = {Blei, David M. and Ng, Andrew Y. and Jordan, Michael I.},
  title = {Latent {D}irichlet Allocation},
  journal = {Journal of Machine Learning Research}, volume = {3}, pages = {993--1022}, year = {2003}
}
@article{mackay1998choice,
  author = {MacKay, David J. C.},
  title = {Choice of Basis for {L}aplace Approximation},
  journal = {Machine Learning}, volume = {33}, pages = {77--86}, year = {1998}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.checks import values_are_checked
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field, Options

EXAMPLE_LENGTH = 40.0  # mean number of words of simulated documents before there are data
EXAMPLE_CONTRAST = 2.0  # standard deviation of the logits of simulated topics
SMOOTHING = 0.5  # added to each count from which a topic starts (Jeffreys' prior)


class ProductLDAOptions(Options):
    """Options of :class:`ProductLDA`."""

    topics: int = Field(2, ge=2, description="number K of topics")
    mixing: Literal["product", "mixture"] = Field(
        "product", description="how topics combine: a weighted product of experts, or the mixture of plain LDA"
    )
    concentration: float = Field(
        1.0, gt=0, description="concentration α of the Dirichlet over topics that the prior approximates"
    )


class ProductLDA(Entry):
    """Topic model: z ~ N(0, (1 - 1/K)/α I), x ~ Multinomial(T, p), p a product or mixture of topics by softmax(z).

    Attributes
    ----------
    word_logits : Parameter (K, V)
        β, of which the words of topic k have probabilities softmax(β_k).
    mean_length : buffer ()
        m, mean number of words in a document, for simulation; no part of θ.
    """

    Options = ProductLDAOptions
    options: ProductLDAOptions
    dtype = torch.float32
    example_columns = 10
    encoder_input = "log1p"
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {"z": ("topic",)}
    mean_length: Tensor

    def __init__(self, options: ProductLDAOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.word_logits = torch.nn.Parameter(torch.zeros(options.topics, columns))
        self.register_buffer("mean_length", torch.tensor(EXAMPLE_LENGTH))

    @classmethod
    def check_data(cls, x: Tensor, options: ProductLDAOptions) -> None:
        """Refuse what are no counts, empty documents, a single word, and more topics than documents."""
        rows, columns = x.shape
        refuse_no_counts(x)
        if columns < 2:
            raise InvalidInput("found one column, expected a column for each of two or more words; add columns")
        empty = torch.nonzero(x.sum(-1) == 0)
        if len(empty):
            raise InvalidInput(
                f"found no word in row {int(empty[0]) + 1} (counted from 1), expected documents of at least one; "
                "an empty one says nothing about topics, so leave that row out"
            )
        if options.topics > rows:
            raise InvalidInput(
                f"option topics: found {options.topics} for {rows} rows, expected at most one topic per row"
            )

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start each topic from the words of documents of its own, dealt at random, about the corpus's frequencies."""
        topics = self.options.topics
        share = torch.distributions.Dirichlet(torch.full((topics,), 1 / topics, dtype=x.dtype)).sample((len(x),))
        counts = share.mT @ x
        with torch.no_grad():
            corpus = x.mean(0) + SMOOTHING / len(x)
            expected = corpus / corpus.sum() * SMOOTHING * self.columns
            self.word_logits.copy_(((counts + expected) / (counts + expected).sum(-1, keepdim=True)).log())
            self.mean_length.copy_(x.sum(-1).mean())

    def randomize(self) -> None:
        """Draw topics whose words have probabilities of different orders."""
        with torch.no_grad():
            self.word_logits.normal_().mul_(EXAMPLE_CONTRAST)

    def template(self, n: int) -> Tensor:
        """Documents (n, V) of random length, with all their words in the first column: the program keeps lengths."""
        rows = super().template(n)
        rows[:, 0] = torch.poisson(self.mean_length.expand(n)).clamp(min=1)
        return rows

    def constant_data(self, x: Tensor) -> dict[str, Tensor]:
        """Return the length of each document, (N,)."""
        return {"total": x.sum(-1)}

    def coords(self) -> dict[str, Sequence[Any]]:
        """Numbers of the topics."""
        return {"topic": range(self.options.topics)}

    def forward(self, batch: Batch) -> Tensor:
        """z (B, K) ~ N(0, s² I); x (B, V) ~ Multinomial(T, p(softmax(z)))."""
        if values_are_checked():
            refuse_no_counts(batch.x)
        zeros = self.word_logits.new_zeros(self.options.topics)
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(zeros, self.prior_scale).to_event(1))
            return pyro.sample("x", WordCounts(batch.x.sum(-1), self.log_words(z)), obs=batch.x)

    @property
    def prior_scale(self) -> float:
        """Standard deviation s of z: MacKay (1998), as Srivastava & Sutton (2017, section 3.2) write it."""
        return math.sqrt((1 - 1 / self.options.topics) / self.options.concentration)

    def log_words(self, z: Tensor) -> Tensor:
        """Log probabilities of the words given ``z`` (..., K): (..., V), nats."""
        share = z.softmax(-1)
        if self.options.mixing == "product":
            return (share @ self.word_logits).log_softmax(-1)
        log_topics = self.word_logits.log_softmax(-1)
        # Relative to the topic that likes a word most, so that no rare word has probability zero.
        most = log_topics.amax(0)
        return (share @ (log_topics - most).exp()).log() + most

    def decode(self, z: Tensor) -> Tensor:
        """Probabilities of the words given ``z`` (..., K): (..., V)."""
        return self.log_words(z).exp()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x_n given z_g, T_n) in nats, (N, G), for rows ``x`` (N, V) and latent values ``z`` (G, K).

        A matrix product: no tensor of shape (N, G, V) is needed.
        """
        refuse_no_counts(x)
        return x @ self.log_words(z).mT + log_coefficient(x)[:, None]

    def topic_words(self) -> Tensor:
        """Probabilities of the words in a document of one topic alone, (K, V)."""
        return self.word_logits.detach().softmax(-1)

    def top_words(self, count: int = 10) -> list[list[str]]:
        """Names of the ``count`` likeliest words of each topic, the likeliest first."""
        order = self.topic_words().argsort(-1, descending=True)[:, :count]
        return [[self.names[word] for word in topic] for topic in order.tolist()]


class WordCounts(dist.TorchDistribution):
    """Multinomial counts with a total of its own for each row, which neither Pyro's nor PyTorch's Multinomial takes.

    Parameters
    ----------
    total : Tensor (...)
        Numbers of words, as floating-point numbers.
    log_words : Tensor (..., V)
        Log probabilities of the words.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "total": constraints.nonnegative_integer,
        "log_words": constraints.real_vector,
    }

    def __init__(self, total: Tensor, log_words: Tensor, validate_args: bool | None = None) -> None:
        shape = torch.broadcast_shapes(total.shape, log_words.shape[:-1])
        self.total = total.expand(shape)
        self.log_words = log_words.expand(*shape, -1)
        super().__init__(shape, log_words.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Counts that add up to the total."""
        return constraints.multinomial(self.total)

    @property
    def mean(self) -> Tensor:
        """Mean counts, (..., V)."""
        return self.total[..., None] * self.log_words.exp()

    @property
    def variance(self) -> Tensor:
        """Variance of each count, (..., V)."""
        return self.mean * (1 - self.log_words.exp())

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> WordCounts:
        """Return it with another batch shape."""
        shape = torch.Size(batch_shape)
        return WordCounts(self.total.expand(shape), self.log_words.expand(*shape, -1), validate_args=False)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draw counts word by word, each binomial given those before it."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            words = self.log_words.exp().expand(shape)
            rest = words.flip(-1).cumsum(-1).flip(-1)
            left = self.total.to(words.dtype).expand(shape[:-1]).clone()
            counts = torch.empty_like(words)
            for word in range(shape[-1] - 1):
                share = (words[..., word] / rest[..., word]).nan_to_num(0.0).clamp(0.0, 1.0)
                counts[..., word] = torch.binomial(left, share)
                left -= counts[..., word]
            counts[..., -1] = left
        return counts

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts (..., V), nats, with the multinomial coefficient."""
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.log_words).sum(-1) + log_coefficient(value)


def refuse_no_counts(x: Tensor) -> None:
    """Refuse rows (N, V) that hold anything but counts.

    Raises
    ------
    InvalidInput
        With the first cell that is none.
    """
    wrong = torch.nonzero(~((x >= 0) & (x == x.round()) & x.isfinite()))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise InvalidInput(
            f"found the value {x[row, column].item():g} in column {column + 1}, row {row + 1} (counted from 1), "
            "expected counts of words 0, 1, 2, ...; leave that column or row out"
        )


def log_coefficient(x: Tensor) -> Tensor:
    """Log number of texts with the counts ``x`` (..., V): log T! - Σ log x_v!, (...), nats."""
    return torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1)
