r"""Hierarchical variational autoencoder: several layers of latents, each drawn given the one above.

A short code at the top says roughly what a datum is, the layers below fill in what it leaves open, and the last one
is decoded into the columns. Depth buys a prior: the bottom layer need not be a round normal, its distribution is itself
learned.

$$
z_L \sim \mathcal N(0, I), \qquad
z_l \mid z_{l+1} \sim \mathcal N\bigl(\mu_l(z_{l+1}),\ \operatorname{diag} s_l(z_{l+1})^2\bigr), \qquad
x \mid z_1 \sim \prod_d \mathrm{Bernoulli}\bigl(\mathrm{sigmoid}(y_d)\bigr)
\quad\text{or}\quad \prod_d \mathcal N\bigl(m_d + s_d\, y_d,\ (s_d\, \sigma)^2\bigr)
$$

with $y$ the decoder's output at $z_1$. Since $x$ depends on $z_1$ alone, the posterior factorises from the bottom up,

$$
p(z_1, \dots, z_L \mid x) = p(z_1 \mid x)\, p(z_2 \mid z_1) \cdots p(z_L \mid z_{L-1})
$$

and a q that takes the layers for independent given $x$, as the guides `amortized` and `mean-field` do, pays at least
what they tell about each other: its approximation gap contains their mutual information under q's own target.

With `decoder=linear` the means are linear and the scales $s_l$ constant; under `likelihood=normal` the program is then
one joint normal, and evidence and posterior are exact. The layers above the first add nothing to such a model: it is
factor analysis with noise of one scale in the units of the columns.

The guide `bottom-up` has that factorisation; `ladder` draws from the top down, with the model's own normals as a part
of q (Sønderby et al. 2016), and wants warm-up: `objective=beta` with `kl_schedule=annealed`.

Quadrature gives the evidence where the layers have at most two dimensions in all, as by default; of larger ones it is
an estimate.

What goes wrong:

*Collapse from the top*. Early in training a layer that says nothing costs nothing, and where the bottom layer alone
explains the data the ones above never wake (Sønderby et al. 2016); `decoder=linear` shows it in its purest form, since
there the likelihood has nothing to gain from them. Two numbers at the bottom, one above:

```python
options = {"likelihood": "normal", "latent_dims": "2,1", "steps": 400, "seed": 0}
for decoder in ("linear", "mlp"):
    options |= {"decoder": decoder, "guide": "amortized"}
    layers = ez.fit("hierarchical-vae", "wine-standardised", **options, progress=False)
    top, *bottom = layers.anatomy().unit_variances
    print(f"{decoder}: variance over the rows of the mean of q, top {top:.3f},")
    print("    bottom", *(f"{variance:.3f}" for variance in bottom))
    assert top < 0.1 * min(bottom)
```

Everything that goes wrong for `vae`.

References
----------
```bibtex
@inproceedings{rezende2014stochastic,
  author = {Rezende, Danilo Jimenez and Mohamed, Shakir and Wierstra, Daan},
  title = {Stochastic Backpropagation and Approximate Inference in Deep Generative Models},
  booktitle = {International Conference on Machine Learning}, pages = {1278--1286}, year = {2014}
}
@inproceedings{sonderby2016ladder,
  author = {S{\o}nderby, Casper Kaae and Raiko, Tapani and Maal{\o}e, Lars and S{\o}nderby, S{\o}ren Kaae
    and Winther, Ole},
  title = {Ladder Variational Autoencoders},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {29}, year = {2016}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.joint import Conditional, Joint, Values
from elbozoo.models.contract.networks import NetworkOptions, RowLikelihood, multilayer, refuse_rows
from elbozoo.models.contract.options import Field
from elbozoo.models.numerics import linear_gaussian


class HierarchicalVAEOptions(NetworkOptions):
    """Options of :class:`HierarchicalVAE`."""

    latent_dims: str = Field("1,1", description="dimensions of the layers from the bottom to the top, such as 8,4,2")
    decoder: Literal["mlp", "linear"] = Field(
        "mlp", description="of each layer from the one above, and of the columns from the bottom layer"
    )


class Moments(NamedTuple):
    """Marginal of one layer in the linear case: ``mean`` (K,) and ``covariance`` (K, K)."""

    mean: Tensor
    covariance: Tensor


class HierarchicalVAE(Entry):
    """Hierarchical VAE: z_L ~ N(0, I), z_l ~ N(μ_l(z_{l+1}), s_l(z_{l+1})²), x ~ the likelihood at decoder(z_1).

    With ``decoder=linear`` and ``likelihood=normal`` an entry has the methods ``log_evidence`` and ``posterior`` too.

    Attributes
    ----------
    latent_dims : tuple of int
        K_1, ..., K_L: the bottom layer first.
    layers : nn.ModuleList
        μ_l and s_l: for each layer but the top, bottom first, its normal given the layer above.
    decoder : nn.Module
        W_1, b_1, W_2, b_2: the network z_1 (..., K_1) to y (..., D); W and b where it is linear.
    likelihood : RowLikelihood
        p(x given y), with σ, m and s.
    """

    Options = HierarchicalVAEOptions
    options: HierarchicalVAEOptions
    dtype = torch.float32
    example_columns = 8
    log_evidence: Callable[[Tensor], Tensor]
    posterior: Callable[[Tensor], Joint]

    def __init__(self, options: HierarchicalVAEOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.latent_dims = _latent_dims(options)
        below_above = zip(self.latent_dims, self.latent_dims[1:], strict=False)
        is_linear = options.decoder == "linear"
        if is_linear:
            self.layers = nn.ModuleList(LinearLayer(above, below) for below, above in below_above)
            self.decoder: nn.Module = nn.Linear(self.latent_dims[0], columns)
        else:
            self.layers = nn.ModuleList(NetworkLayer(above, below, options) for below, above in below_above)
            self.decoder = multilayer(self.latent_dims[0], columns, options)
        self.likelihood = RowLikelihood(columns, options)
        if is_linear and not self.likelihood.is_binary:
            # Capabilities are methods that are there, and these hold for this case alone.
            self.log_evidence = self._normal_log_evidence
            self.posterior = self._normal_posterior

    @classmethod
    def check_data(cls, x: Tensor, options: HierarchicalVAEOptions) -> None:
        """Refuse more latent dimensions than rows or columns allow, and under Bernoulli all but zeros and ones."""
        rows, columns = x.shape
        bottom = _latent_dims(options)[0]
        if bottom > min(rows - 1, columns):
            raise InvalidInput(
                f"option latent_dims: found {bottom} at the bottom for {rows} rows x {columns} columns, expected at "
                f"most {min(rows - 1, columns)}: data of fewer columns or rows fill no more dimensions"
            )
        refuse_rows(x, list(range(columns)), is_binary=options.likelihood == "bernoulli")

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start with fresh random weights about the columns' means; every layer has a scale near one."""
        for layer in self._linear_layers():
            layer.reset_parameters()
        for level in self._levels():
            level.set_scale(1.0)
        self.likelihood.initialize(x, self._linear_layers()[-1])

    def randomize(self) -> None:
        """Draw weights large enough that rows show the layers; each layer's noise has half the scale of its mean."""
        gain = 4.0 if self.likelihood.is_binary else 1.5
        with torch.no_grad():
            for layer in self._linear_layers():
                layer.weight.normal_().mul_(1.5 / math.sqrt(layer.in_features))
                layer.bias.normal_().mul_(0.5)
            self._linear_layers()[-1].weight.mul_(gain / 1.5)
            for level in self._levels():
                level.set_scale(0.5)
            if not self.likelihood.is_binary:
                self.likelihood.set_noise_scale(0.25)

    def forward(self, batch: Batch) -> Tensor:
        """z_L (B, K_L) ~ N(0, I), z_l (B, K_l) ~ N(μ_l, s_l²) down to z_1; x (B, D) ~ likelihood at decoder(z_1)."""
        values: dict[str, Tensor] = {}
        with pyro.plate("data", batch.total, subsample=batch.index):
            for level in range(len(self.latent_dims), 0, -1):
                values[_site(level)] = pyro.sample(_site(level), self.prior_of(_site(level), values))
            return pyro.sample("x", self.likelihood.distribution(self.decoder(values[_site(1)])), obs=batch.x)

    def prior_of(self, site: str, values: Values) -> dist.Distribution:
        """p(z_l given z_{l+1}) of the layer ``site`` at the ``values`` above it (..., K_{l+1}): event shape (K_l,)."""
        level = int(site.removeprefix("z"))
        if level == len(self.latent_dims):
            zeros = self._linear_layers()[0].weight.new_zeros(self.latent_dims[-1])
            return dist.Normal(zeros, 1.0).to_event(1)
        mean, scale = self.layers[level - 1](values[_site(level + 1)])
        return dist.Normal(mean, scale).to_event(1)

    def decode(self, z: Tensor) -> Tensor:
        """Mean of x given the bottom layer ``z`` (..., K_1): (..., D), probabilities under Bernoulli."""
        mean: Tensor = self.likelihood.distribution(self.decoder(z)).mean
        return mean

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x_n given z_g) in nats, (N, G), for rows ``x`` (N, D) and latent values ``z`` (G, K_L + ... + K_1).

        The layers stand side by side in the order in which they are drawn, the top first; only the bottom one counts.
        """
        return self.likelihood.log_likelihood(x, self.decoder(z[..., -self.latent_dims[0] :]))

    def _normal_log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x), (N,), nats, where all is linear and normal: through the marginal of the bottom layer."""
        return linear_gaussian.log_density(x, *self._as_factor_analysis())

    def _normal_posterior(self, x: Tensor) -> Joint:
        """Exact p(z_1 given x) p(z_2 given z_1) ..., where all is linear and normal: batch shape (N,)."""
        moments = self._moments()
        factor = torch.linalg.cholesky(moments[0].covariance)
        mean, scale_tril = linear_gaussian.posterior(x, *self._as_factor_analysis())
        bottom = dist.MultivariateNormal(moments[0].mean + mean @ factor.mT, scale_tril=factor @ scale_tril)
        conditionals: dict[str, Conditional] = {_site(1): bottom}
        for level in range(1, len(self.latent_dims)):
            conditionals[_site(level + 1)] = self._upward(level, moments)
        return Joint(conditionals)

    def _upward(self, level: int, moments: list[Moments]) -> Callable[[Values], dist.MultivariateNormal]:
        """Return p(z_{l+1} given z_l) at l = ``level``, a normal with linear mean (Bishop 2006, equation 2.116)."""
        below, above = moments[level - 1], moments[level]
        weight = self._levels()[level - 1].mean.weight
        gain = torch.linalg.solve(below.covariance, weight @ above.covariance).mT
        covariance = above.covariance - gain @ weight @ above.covariance
        scale_tril = torch.linalg.cholesky((covariance + covariance.mT) / 2)

        def given(values: Values) -> dist.MultivariateNormal:
            mean = above.mean + (values[_site(level)] - below.mean) @ gain.mT
            return dist.MultivariateNormal(mean, scale_tril=scale_tril)

        return given

    def _moments(self) -> list[Moments]:
        """Marginal mean and covariance of each layer, the bottom first."""
        like = self._linear_layers()[0].weight
        top = self.latent_dims[-1]
        found = [Moments(like.new_zeros(top), torch.eye(top, dtype=like.dtype, device=like.device))]
        for level in reversed(self._levels()):
            weight, bias, above = level.mean.weight, level.mean.bias, found[0]
            noise = torch.diag_embed((2 * level.log_scale).exp())
            found.insert(0, Moments(weight @ above.mean + bias, weight @ above.covariance @ weight.mT + noise))
        return found

    def _as_factor_analysis(self) -> tuple[Tensor, Tensor, Tensor]:
        """Location (D,), loading (D, K_1) and noise variance (D,) of x, with z_1 = its mean + its Cholesky factor u."""
        bottom = self._moments()[0]
        unit, noise_scale = self.likelihood.unit, self.likelihood.noise_scale
        factor = torch.linalg.cholesky(bottom.covariance)
        loading = unit[:, None] * (self._linear_layers()[-1].weight @ factor)
        return self.decode(bottom.mean), loading, (unit * noise_scale).square()

    def _linear_layers(self) -> list[nn.Linear]:
        """All matrices, in order from the bottom layer's to the last of the decoder."""
        parts = (self.layers, self.decoder)
        return [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]

    def _levels(self) -> list[Any]:
        """The normals of all layers but the top, bottom first; of one kind, which ``decoder`` says."""
        return list(self.layers)


class LinearLayer(nn.Module):
    """A layer's normal given the one above, with a linear mean and a constant scale."""

    def __init__(self, above: int, below: int) -> None:
        super().__init__()
        self.mean = nn.Linear(above, below)
        self.log_scale = nn.Parameter(torch.zeros(below))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale (..., K_l) at ``z`` (..., K_{l+1})."""
        mean = self.mean(z)
        return mean, self.log_scale.exp().expand_as(mean)

    def set_scale(self, scale: float) -> None:
        """Set all scales to one number."""
        with torch.no_grad():
            self.log_scale.fill_(math.log(scale))


class NetworkLayer(nn.Module):
    """A layer's normal given the one above: a network with mean and log scale as its outputs."""

    def __init__(self, above: int, below: int, options: NetworkOptions) -> None:
        super().__init__()
        self.network = multilayer(above, 2 * below, options)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale (..., K_l) at ``z`` (..., K_{l+1})."""
        mean, log_scale = self.network(z).chunk(2, -1)
        return mean, log_scale.exp()

    def set_scale(self, scale: float) -> None:
        """Bring all scales near one number: the network's part in them shrinks to a tenth."""
        head = self.network[-1]
        assert isinstance(head, nn.Linear)
        half = head.out_features // 2
        with torch.no_grad():
            head.weight[half:] *= 0.1
            head.bias[half:] = math.log(scale)


def _site(level: int) -> str:
    """Name of the latent site of a layer, counted from 1 at the bottom."""
    return f"z{level}"


def _latent_dims(options: HierarchicalVAEOptions) -> tuple[int, ...]:
    parts = [part.strip() for part in options.latent_dims.split(",")]
    if len(parts) < 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInput(
            f"option latent_dims: found {options.latent_dims!r}, expected at least two whole numbers above 0, the "
            "dimension of the bottom layer first, such as 8,2; for one layer take the model vae"
        )
    return tuple(int(part) for part in parts)
