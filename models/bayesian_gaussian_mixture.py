r"""Mixture of Gaussians with priors on its weights, means and precisions.

The mixture of Gaussians with nothing left to maximise: weights, means and precisions are latents too, one for all
data, so that the number of components in use is part of the answer, a component cannot collapse onto a datum, and
the bound can rank numbers of components. Every conditional is conjugate, which makes it the standard example of
coordinate-ascent variational inference.

$$
\pi \sim \operatorname{Dirichlet}(\alpha_0, \dots, \alpha_0), \qquad
\Lambda_k \sim \mathcal W(W_0, \nu_0), \qquad
\mu_k \mid \Lambda_k \sim \mathcal N\bigl(m_0, (\beta_0 \Lambda_k)^{-1}\bigr)
$$
$$
z_n \mid \pi \sim \operatorname{Categorical}(\pi), \qquad
x_n \mid z_n = k \sim \mathcal N(\mu_k, \Lambda_k^{-1})
$$

Under $q(z)\, q(\pi) \prod_k q(\mu_k, \Lambda_k)$ each factor has its optimum in closed form: responsibilities, a
Dirichlet, and a normal–Wishart per component. CAVI sets them in turn, and its bound is the sum of seven expectations
(Bishop, equations 10.70 to 10.77), constants kept. With `covariance=diagonal` each column has a precision of its own,
$\lambda_{kd} \sim \mathrm{Gamma}(\nu_0 / 2, w_{0d} / 2)$. The evidence is a sum over all assignments of the
data to components, which can be carried out for a few rows: there the gap of CAVI is known exactly.

What the options do not state is taken from the data, as scikit-learn's `BayesianGaussianMixture` does: $m_0$ is their
mean, $W_0^{-1}$ their covariance, $\nu_0$ the number of columns and $\alpha_0 = 1/K$. Such a prior has seen the data
once already, so state it where evidence is compared between data sets.

What goes wrong:

*One mode of many*. The same mixture has $K!$ names, and so the posterior has $K!$ equal modes, of which q holds one.
That alone costs $\ln K!$ nats where the modes lie far apart, however good q is about its own. For so few rows the
evidence is exact, and the gap of CAVI is nearly this number:

```python
from math import lgamma

torch.manual_seed(0)
prior = {"prior_mean": 20.0, "prior_scale": 1.0, "mean_precision": 0.01}
for components, rows in {1: 10, 2: 5, 3: 3}.items():
    centres = 20.0 * torch.arange(components).repeat(rows)[:, None]
    clusters = centres + torch.randn(rows * components, 1)
    options = {"components": components, "method": "cavi", "seed": 0, **prior}
    options |= {"progress": False}
    mixture = ez.fit("bayesian-gaussian-mixture", clusters, **options)
    gap = mixture.log_evidence().value - mixture.elbo()
    names = lgamma(components + 1)
    print(f"K = {components}: gap {gap:.3f} nats, ln K! {names:.3f} nats")
    assert abs(gap - names) < 0.2
```

*Independent factors*. The factors are independent under q, so that its posteriors are too narrow. Where components
overlap, which datum belongs to which hangs together with where they lie, and the gap is more than the names cost:

```python
torch.manual_seed(0)
halves = torch.tensor([[-0.5], [0.5]]).repeat(6, 1)
points = torch.randn(12, 1)
prior = {"prior_mean": 0.0, "prior_scale": 1.0, "mean_precision": 0.01}
gaps = {}
for distance in (20, 1):
    options = {"components": 2, "method": "cavi", "seed": 0, **prior}
    clusters = distance * halves + points
    options |= {"progress": False}
    mixture = ez.fit("bayesian-gaussian-mixture", clusters, **options)
    gaps[distance] = mixture.log_evidence().value - mixture.elbo()
    print(f"distance {distance}: gap {gaps[distance]:.3f} nats")
assert gaps[1] > gaps[20] + 0.1
```

*Local maxima*. CAVI stops at the nearest, and from one start that may be a poor one; `restarts` takes the best of
several.

```python
options = {"components": 6, "method": "cavi", "progress": False}
elbos = []
for seed in range(6):
    one = ez.fit("bayesian-gaussian-mixture", "iris", restarts=1, seed=seed, **options)
    elbos.append(one.elbo())
ten = ez.fit("bayesian-gaussian-mixture", "iris", restarts=10, seed=0, **options)
print("one start each:", *(f"{elbo:.0f}" for elbo in elbos), "nats, total")
print(f"best of ten starts: {ten.elbo():.0f} nats, total")
assert ten.elbo() - min(elbos) > 5
```

References
----------
```bibtex
@book{bishop2006pattern,
  author = {Bishop, Christopher M.}, title = {Pattern Recognition and Machine Learning},
  publisher = {Springer}, year = {2006}, note = {section 10.2}
}
@inproceedings{attias1999inferring,
  author = {Attias, Hagai},
  title = {Inferring Parameters and Structure of Latent Variable Models by Variational {B}ayes},
  booktitle = {Uncertainty in Artificial Intelligence}, pages = {21--30}, year = {1999}
}
@techreport{murphy2007conjugate,
  author = {Murphy, Kevin P.},
  title = {Conjugate {B}ayesian analysis of the {G}aussian distribution},
  institution = {University of British Columbia}, year = {2007}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.joint import Conditional
from elbozoo.models.contract.mixtures import MixtureOptions, starting_assignments
from elbozoo.models.contract.options import Field
from elbozoo.models.distributions.wishart import Wishart
from elbozoo.models.numerics import normal_wishart
from elbozoo.models.numerics.normal_wishart import KINDS, NormalWishart

MOST_ASSIGNMENTS = 2**16
CHUNK_ELEMENTS = 2**22


class BayesianGaussianMixtureOptions(MixtureOptions):
    """Options of :class:`BayesianGaussianMixture`."""

    covariance: Literal["full", "diagonal"] = Field("full", description="shape of the precisions and covariances")
    concentration: float | None = Field(
        None, gt=0, description="α₀ of the Dirichlet prior on the weights; none takes 1 / components"
    )
    mean_precision: float = Field(1.0, gt=0, description="β₀, the number of data that the prior mean is worth")
    degrees_of_freedom: float | None = Field(
        None, gt=0, description="ν₀ of the Wishart prior on the precisions; none takes the number of columns"
    )
    prior_mean: float | None = Field(None, description="m₀, the same in every column; none takes the data's mean")
    prior_scale: float | None = Field(
        None, gt=0, description="s with W₀⁻¹ = s² I, in units of the data; none takes the data's covariance"
    )


class MixtureFactors(NamedTuple):
    """Parameters of q: Dirichlet over the weights, normal–Wishart over each component (see :class:`NormalWishart`).

    The responsibilities follow from them.

    Attributes
    ----------
    concentration : Tensor (K,)
        α.
    mean_precision : Tensor (K,)
        β.
    mean : Tensor (K, D)
        m.
    degrees_of_freedom : Tensor (K,)
        ν.
    inverse_scale : Tensor (K, D, D), or (K, D) for diagonal covariances
        W⁻¹.
    """

    concentration: Tensor
    mean_precision: Tensor
    mean: Tensor
    degrees_of_freedom: Tensor
    inverse_scale: Tensor

    @property
    def components(self) -> NormalWishart:
        """The factors of the components."""
        return NormalWishart(self.mean_precision, self.mean, self.degrees_of_freedom, self.inverse_scale)

    @property
    def log_weights(self) -> Tensor:
        """E[ln π], (K,), Bishop (2006), equation 10.66."""
        return torch.digamma(self.concentration) - torch.digamma(self.concentration.sum())


class BayesianGaussianMixture(Entry):
    """Bayesian mixture of Gaussians: π, μ and Λ are global latents, z ~ Categorical(π), x ~ N(μ_z, Λ_z⁻¹); no θ.

    Attributes
    ----------
    prior_mean : buffer (D,)
        m₀, prior mean of the means.
    prior_inverse_scale : buffer (D, D), or (D,) for diagonal covariances
        W₀⁻¹, inverse scale matrix of the prior of the precisions, or its diagonal; squared units of the data.
    """

    Options = BayesianGaussianMixtureOptions
    options: BayesianGaussianMixtureOptions
    example_columns = 2
    prior_mean: Tensor
    prior_inverse_scale: Tensor

    def __init__(self, options: BayesianGaussianMixtureOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.kind = KINDS[options.covariance]
        self.concentration = options.concentration or 1 / options.components
        self.degrees_of_freedom = options.degrees_of_freedom or float(columns)
        least = self.kind.width(columns) - 1
        if self.degrees_of_freedom <= least:
            raise InvalidInput(
                f"option degrees_of_freedom: found {self.degrees_of_freedom:g} for {columns} columns, expected more "
                f"than {least}: a Wishart with fewer has no density; leave the option out to take {columns}"
            )
        # In the entry's dtype from the start: what the options state is not to be rounded to another on the way.
        mean = torch.full((columns,), options.prior_mean or 0.0, dtype=self.dtype)
        self.register_buffer("prior_mean", mean)
        self.register_buffer("prior_inverse_scale", self.kind.isotropic((options.prior_scale or 1.0) ** 2, mean))
        pair = ("component", "column", "other_column") if options.covariance == "full" else ("component", "column")
        dims = {"weights": ("component",), "precisions": pair, "means": ("component", "column")}
        self.site_dims = dims  # type: ignore[misc]  # the covariance decides how many dimensions precisions have

    @classmethod
    def check_data(cls, x: Tensor, options: BayesianGaussianMixtureOptions) -> None:
        """Refuse data whose covariance is singular where it is to be the prior's scale."""
        if options.prior_scale is not None:
            return
        instead = "or state the prior by prior_scale"
        if len(x) < 2:
            raise InvalidInput(f"found {len(x)} row, expected at least 2 to take the prior's scale from: {instead[3:]}")
        constant = torch.nonzero(x.var(0, correction=0) == 0).flatten().tolist()
        if constant:
            raise InvalidInput(
                f"columns {[c + 1 for c in constant]} (counted from 1) are constant, expected columns that vary, whose "
                f"covariance is the prior's scale: leave them out with --columns, {instead}"
            )
        rank = int(torch.linalg.matrix_rank((x - x.mean(0)) / x.std(0)))
        if options.covariance == "full" and rank < x.shape[1]:
            raise InvalidInput(
                f"the {x.shape[1]} columns of {len(x)} rows have centred rank {rank}, expected full rank, since their "
                f"covariance is the prior's scale: leave out columns that others determine, use covariance=diagonal, "
                f"{instead}"
            )

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Take from the data what the options do not state about the prior; there is no θ to start."""
        with torch.no_grad():
            if self.options.prior_mean is None:
                self.prior_mean.copy_(x.mean(0))
            if self.options.prior_scale is None:
                self.prior_inverse_scale.copy_(self.kind.covariance(x))

    def randomize(self) -> None:
        """Do nothing: the program has no parameters, and its prior stays at what the options say, or the unit."""

    def forward(self, batch: Batch) -> Tensor:
        """π (K,), Λ (K, D, D) or (K, D) and μ (K, D), outside the plate; z (B,) ~ Categorical(π); x ~ N(μ_z, Λ_z⁻¹)."""
        prior, components = self.prior, self.options.components
        weights = pyro.sample("weights", dist.Dirichlet(self._concentration(prior.mean)))
        precisions = pyro.sample("precisions", self._precisions(_repeated(prior, components)))
        scale = self._scale(precisions)
        means = pyro.sample("means", self._means(_repeated(prior, components), scale))
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            return pyro.sample("x", self._component(means, scale, z), obs=batch.x)

    @property
    def prior(self) -> NormalWishart:
        """Prior of one component's mean and precision, K = 1."""
        mean = self.prior_mean[None]
        mean_precision, degrees_of_freedom = mean.new_tensor([[self.options.mean_precision], [self.degrees_of_freedom]])
        return NormalWishart(mean_precision, mean, degrees_of_freedom, self.prior_inverse_scale[None])

    def coords(self) -> dict[str, Sequence[Any]]:
        """Labels of the dimensions of the sites."""
        return {"component": range(self.options.components), "other_column": self.names}

    def starting_latents(self, x: Tensor) -> dict[str, Tensor]:
        """Values of the global sites from which optimisers and samplers start: the means of q at CAVI's first start.

        Elsewhere the components would start as copies of one another, and no gradient ever tells those apart.
        """
        factors = self.initial_factors(x, restart=0)
        precisions = self._precisions(factors.components).mean
        return {
            "weights": factors.concentration / factors.concentration.sum(),
            "precisions": precisions,
            "means": factors.mean,
        }

    def initial_factors(self, x: Tensor, restart: int) -> MixtureFactors:
        """Return the factors of hard assignments: k-means (even restarts) or nearest of random rows (odd restarts)."""
        spread = x.std(0, correction=0)
        scaled = x / torch.where(spread > 0, spread, torch.ones_like(spread))
        assigned = starting_assignments(scaled, min(self.options.components, len(x)), restart)
        # Components beyond the number of rows begin at the prior.
        empty = assigned.new_zeros(len(x), self.options.components - assigned.shape[1])
        return self.factors(x, torch.cat([assigned, empty], 1))

    def update_factors(self, x: Tensor, factors: MixtureFactors) -> MixtureFactors:
        """Set q(z), then q(π) and q(μ, Λ), each to its optimum given the others."""
        return self.factors(x, self.log_responsibilities(x, factors).exp())

    def log_responsibilities(self, x: Tensor, factors: MixtureFactors) -> Tensor:
        """Optimal ln q(z_n = k), (N, K), nats: Bishop (2006), equations 10.46 to 10.49."""
        density = normal_wishart.expected_log_density(self.kind, factors.components, x)
        return torch.log_softmax(factors.log_weights + density, -1)

    def factors(self, x: Tensor, responsibilities: Tensor) -> MixtureFactors:
        """Optimal q(π) and q(μ, Λ) given the responsibilities (N, K): equations 10.57 to 10.63.

        The book's first printings have ν₀ + N_k + 1 in equation 10.63; the right value is ν₀ + N_k.
        """
        components = normal_wishart.updated(self.kind, self.prior, x, responsibilities)
        return MixtureFactors(self.concentration + responsibilities.sum(0), *components)

    def bound(self, x: Tensor, factors: MixtureFactors) -> Tensor:
        """ELBO of the factors with the responsibilities that follow from them, (), nats: equations 10.70 to 10.77."""
        log_weights, components = factors.log_weights, factors.components
        density = normal_wishart.expected_log_density(self.kind, components, x)
        responsibilities = torch.softmax(log_weights + density, -1)
        log_x = (responsibilities * density).sum()  # 10.71
        log_z = (responsibilities.sum(0) * log_weights).sum()  # 10.72
        log_pi = _expected_log_dirichlet(self._concentration(x), log_weights)  # 10.73
        log_components = normal_wishart.expected_log_prior(self.kind, self.prior, components).sum()  # 10.74
        entropy_z = torch.special.entr(responsibilities).sum()  # minus 10.75
        entropy_pi = -_expected_log_dirichlet(factors.concentration, log_weights)  # minus 10.76
        entropy_components = normal_wishart.entropy(self.kind, components).sum()  # minus 10.77
        return log_x + log_z + log_pi + log_components + entropy_z + entropy_pi + entropy_components

    def factor_distributions(self, x: Tensor, factors: MixtureFactors) -> Mapping[str, Conditional]:
        """q of each site: the means given the precisions, and z of the rows ``x`` with batch shape (N,)."""
        components = factors.components
        return {
            "weights": dist.Dirichlet(factors.concentration),
            "precisions": self._precisions(components),
            "means": lambda values: self._means(components, self._scale(values["precisions"])),
            "z": dist.Categorical(logits=self.log_responsibilities(x, factors)),
        }

    def enumerated_log_evidence(self, x: Tensor) -> Tensor | None:
        """Exact log p(x), (), nats, by a sum over all assignments; None where there are more than 65,536, K^N.

        Weights, means and precisions are integrated out of each term. Assignments that differ in the names of the
        components alone have equal terms, so that the sum is over partitions of the rows.
        """
        rows, components = len(x), self.options.components
        if rows * math.log(components) > math.log(MOST_ASSIGNMENTS) + 1e-9:
            return None
        labels = _partitions(rows, components)
        blocks = torch.arange(int(labels.max()) + 1)
        members = (labels[:, None, :] == blocks[:, None]).to(x.dtype)
        distinct, position = torch.unique(members.flatten(0, 1), dim=0, return_inverse=True)
        chunks = distinct.split(max(1, CHUNK_ELEMENTS // x.numel()))
        log_marginals = torch.cat([normal_wishart.log_marginal(self.kind, self.prior, x, c.mT) for c in chunks])
        counts, alpha = members.sum(-1), self._concentration(x)
        used = (counts > 0).sum(-1).to(x.dtype)
        log_names = math.lgamma(components + 1) - torch.lgamma(components + 1 - used)
        log_prior = torch.lgamma(alpha.sum()) - torch.lgamma(alpha.sum() + rows)
        log_prior = log_prior + (torch.lgamma(alpha[0] + counts) - torch.lgamma(alpha[0])).sum(-1)
        log_likelihood = log_marginals[position].reshape(counts.shape).sum(-1)
        return torch.logsumexp(log_names + log_prior + log_likelihood, 0)

    def _concentration(self, like: Tensor) -> Tensor:
        return like.new_full((self.options.components,), self.concentration)

    def _precisions(self, components: NormalWishart) -> Distribution:
        if self.options.covariance == "full":
            return Wishart(components.degrees_of_freedom, components.inverse_scale).to_event(1)
        return dist.Gamma(components.degrees_of_freedom[:, None] / 2, components.inverse_scale / 2).to_event(2)

    def _scale(self, precisions: Tensor) -> Tensor:
        """Cholesky factors (..., K, D, D) of the covariances, or standard deviations (..., K, D)."""
        if self.options.covariance == "diagonal":
            return precisions.rsqrt()
        zeros = precisions.new_zeros(self.columns)
        return dist.MultivariateNormal(zeros, precision_matrix=precisions).scale_tril

    def _means(self, components: NormalWishart, scale: Tensor) -> Distribution:
        root = components.mean_precision[:, None].sqrt()
        if self.options.covariance == "diagonal":
            return dist.Normal(components.mean, scale / root).to_event(2)
        return dist.MultivariateNormal(components.mean, scale_tril=scale / root[..., None]).to_event(1)

    def _component(self, means: Tensor, scale: Tensor, z: Tensor) -> Distribution:
        mean = Vindex(means)[..., z, :]
        if self.options.covariance == "diagonal":
            return dist.Normal(mean, Vindex(scale)[..., z, :]).to_event(1)
        return dist.MultivariateNormal(mean, scale_tril=Vindex(scale)[..., z, :, :])


def _repeated(prior: NormalWishart, components: int) -> NormalWishart:
    return NormalWishart(*(field.expand(components, *field.shape[1:]) for field in prior))


def _expected_log_dirichlet(concentration: Tensor, log_weights: Tensor) -> Tensor:
    """E[ln Dirichlet(π; α)] for the given E[ln π]: equations 10.73 and 10.76, with B.23 for ln C(α)."""
    log_normalizer = torch.lgamma(concentration.sum()) - torch.lgamma(concentration).sum()
    return log_normalizer + ((concentration - 1) * log_weights).sum()


def _partitions(rows: int, blocks: int) -> Tensor:
    """Every partition of the rows into at most that many blocks, one a line, (P, N): row n is in block label n.

    Blocks are numbered in the order of their first rows, so that each partition comes once.
    """
    if blocks == 1:
        return torch.zeros(1, rows, dtype=torch.int64)
    labels = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(rows - 1):
        choices = torch.arange(min(blocks, labels.shape[1] + 1)).expand(len(labels), -1)
        allowed = choices <= labels.amax(1, keepdim=True) + 1
        parents = torch.nonzero(allowed)[:, 0]
        labels = torch.cat([labels[parents], choices[allowed][:, None]], 1)
    return labels
