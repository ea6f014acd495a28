r"""Multi-level variational autoencoder: one latent for each group of rows, and one for each row in it.

Rows come in groups, such as several photographs of one person or several visits of one patient. What the rows of a
group share is its content $u$, drawn once; what tells them apart is their style $v$, drawn for each row. No label says
what the content is: it is whatever stays while the group stays. Afterwards the style of one row can be put on the
content of another group, `decode(u, v)`.

$$
u_g \sim \mathcal N(0, I), \qquad v_n \sim \mathcal N(0, I), \qquad
x_n \mid u_{g(n)}, v_n \sim \prod_d \mathcal N\bigl(m_d + s_d\, y_d,\ (s_d\, \sigma)^2\bigr)
\quad\text{or}\quad \prod_d \mathrm{Bernoulli}\bigl(\mathrm{sigmoid}(y_d)\bigr)
$$

with $y$ the decoder's output at $(u_{g(n)}, v_n)$. A datum is a group, and the bound of one with $n$ rows counts what
is told about its content once,

$$
\mathrm{ELBO}_g = \sum_{n \in g} \mathbb E_q\bigl[\log p(x_n \mid u_g, v_n)\bigr]
- \sum_{n \in g} \mathrm{KL}\bigl(q(v_n)\,\|\,p(v_n)\bigr) - \mathrm{KL}\bigl(q(u_g)\,\|\,p(u_g)\bigr)
$$

so that minibatches are of groups, not of rows. The guide `product-of-normals` reads $q(u_g)$ off all rows of a group:
each gives a normal, and their product is $q$, so that evidence accumulates and the order of rows means nothing.

With `decoder=linear` and `likelihood=normal` the rows of a group are jointly normal, and evidence and posterior are
exact. There $u_g$ and $v_n$ are dependent given the rows: where both could explain what is seen, more of the one means
less of the other. A q that takes them for independent, as all guides but `exact` do, has an approximation gap above
zero. Of other decoders the evidence is an estimate.

What goes wrong:

*Content in the style.* Nothing but its price keeps a row's latent from saying again what the group's says: a wide $v$
beside a flexible decoder may take over all of it, and then $q(u)$ falls back on the prior. It takes over for certain
where $u$ is too narrow. Here groups differ in two numbers. With one dimension for them the other goes to the style,
which the rows of a group then share, though the prior says that they do not:

```python
draw = torch.Generator().manual_seed(0)
group = torch.arange(100).repeat_interleave(4)
content = torch.randn(100, 2, generator=draw)[group]
style, noise = torch.randn(400, 4, generator=draw).split([1, 3], 1)
x = torch.cat([torch.cat([content, style], 1) + 0.3 * noise, group[:, None]], 1)
settings = {"decoder": "linear", "steps": 400, "seed": 0, "progress": False}
alike = {}
for dim in (1, 2):
    fit = ez.fit("multi-level-vae", x, group_dim=dim, row_dim=2, **settings)
    v = fit.transform()[:, dim:].reshape(100, 4, 2)
    alike[dim] = float(v.mean(1).var(0).sum() / v.var((0, 1)).sum())
    print(f"group_dim {dim}: {alike[dim]:.0%} of the styles between groups,", end=" ")
    print(f"log p(x) {fit.log_evidence().value:.0f} nats")
assert alike[1] > alike[2] + 0.1
```

*Groups of many sizes.* The product of $n$ normals without the prior has $n$ times the precision of one, while the
posterior's grows as that of the prior plus $n$ times a row's; the encoder can be right for one size alone. One that has
learned on pairs is too sure of larger groups:

```python
tables = {}
for groups, size in ((200, 2), (50, 20)):
    names = torch.arange(groups).repeat_interleave(size)
    shared = 0.7 * torch.randn(groups, 1, generator=draw)[names]
    rows = shared + torch.randn(groups * size, 2, generator=draw)
    tables[size] = torch.cat([rows, names[:, None]], 1)
pairs = {"guide": "product-of-normals", "group_dim": 1, "row_dim": 1, **settings}
fit = ez.fit("multi-level-vae", tables[2], **pairs)
gaps = {n: fit.ledger(x).amortization_gap for n, x in tables.items()}
print(f"amortization gap of groups of 2: {gaps[2] / 200:.3f} nats each,", end=" ")
print(f"of groups of 20: {gaps[20] / 50:.3f}")
assert gaps[20] / 50 > 0.1 > 5 * gaps[2] / 200
```

*Groups of one row* cannot tell content from style and are refused unless `allow_single=true` lets them stand among
larger ones:

```python
refused = False
try:
    rows = torch.tensor([[1.0, 2, 0], [2, 1, 0], [3, 4, 1]])
    ez.fit("multi-level-vae", rows, progress=False)
except ez.InvalidInput as error:
    refused = True
    print(error)
assert refused
```

Everything that goes wrong for `vae`.

References
----------
```bibtex
@inproceedings{bouchacourt2018multilevel,
  author = {Bouchacourt, Diane and Tomioka, Ryota and Nowozin, Sebastian},
  title = {Multi-Level Variational Autoencoder: Learning Disentangled Representations from Grouped Observations},
  booktitle = {AAAI Conference on Artificial Intelligence}, volume = {32}, year = {2018}
}
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.groups import GROUP_SITE, ROW_SITE, GroupEntry, GroupOptions, in_table
from elbozoo.models.contract.joint import Joint, Values
from elbozoo.models.contract.networks import NetworkOptions, RowLikelihood, draw_weights, multilayer, refuse_rows
from elbozoo.models.contract.options import Field
from elbozoo.models.contract.sequences import observations, steps_mask
from elbozoo.models.numerics import grouped_gaussian
from elbozoo.models.numerics.grouped_gaussian import GroupedPosterior, Loadings


class MultiLevelVAEOptions(GroupOptions, NetworkOptions):
    """Options of :class:`MultiLevelVAE`."""

    group_dim: int = Field(2, ge=1, description="dimension of the latent that the rows of a group share")
    row_dim: int = Field(2, ge=1, description="dimension of the latent of each row")
    decoder: Literal["mlp", "linear"] = Field("mlp", description="from both latents to the columns")
    likelihood: Literal["bernoulli", "normal"] = Field(
        "normal", description="of each column: of zeros and ones, or of numbers with a learned noise scale"
    )


class MultiLevelVAE(GroupEntry):
    """Multi-level VAE: u ~ N(0, I) for each group, v ~ N(0, I) for each row, x ~ the likelihood at decoder(u, v).

    With ``decoder=linear`` and ``likelihood=normal`` an entry has the methods ``log_evidence`` and ``posterior`` too.

    Attributes
    ----------
    decoder : nn.Module
        W_1, b_1, W_2, b_2: the network (u, v) (..., Ku + Kv) to y (..., D); W and b where it is linear.
    likelihood : RowLikelihood
        p(x given y), with σ, m and s.
    """

    Options = MultiLevelVAEOptions
    options: MultiLevelVAEOptions
    dtype = torch.float32
    example_columns = 5
    log_evidence: Callable[[Tensor], Tensor]
    posterior: Callable[[Tensor], Joint]

    def __init__(self, options: MultiLevelVAEOptions, columns: int) -> None:
        super().__init__(options, columns)
        dims = options.group_dim + options.row_dim
        is_linear = options.decoder == "linear"
        self.decoder: nn.Module = nn.Linear(dims, columns) if is_linear else multilayer(dims, columns, options)
        self.likelihood = RowLikelihood(columns, options)
        if is_linear and not self.likelihood.is_binary:
            # Capabilities are methods that are there, and these hold for this case alone.
            self.log_evidence = self._normal_log_evidence
            self.posterior = self._normal_posterior

    @classmethod
    def check_data(cls, x: Tensor, options: MultiLevelVAEOptions) -> None:
        """Refuse groups of one row, more dimensions than data can fill, and under Bernoulli all but zeros and ones."""
        groups, columns, rows = len(x), cls.width(x), cls.count(x)
        if columns < 1:
            raise InvalidInput("found no column beside the groups, expected at least one to explain: add columns")
        cls.refuse_groups(x, options)
        _refuse_dim("group_dim", options.group_dim, groups, "groups", columns)
        _refuse_dim("row_dim", options.row_dim, rows, "rows", columns)
        refuse_rows(*in_table(x, options), is_binary=options.likelihood == "bernoulli")

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start with fresh random weights about the columns' means."""
        for layer in self._linear_layers():
            layer.reset_parameters()
        self.likelihood.initialize(observations(x)[steps_mask(x)], self._linear_layers()[-1])

    def randomize(self) -> None:
        """Draw weights large enough that rows show both latents; the noise has a quarter of their scale."""
        layers = self._linear_layers()
        draw_weights([layers[0], layers[-1]], self.likelihood, binary_gain=4.0)

    def forward(self, batch: Batch) -> Tensor:
        """u (B, Ku) ~ N(0, I), v (B, T, Kv) ~ N(0, I); x (B, T, D) ~ the likelihood at decoder(u, v)."""
        real = steps_mask(batch.x)
        zeros = batch.x.new_zeros
        with pyro.plate("data", batch.total, subsample=batch.index):
            u = pyro.sample(GROUP_SITE, dist.Normal(zeros(self.options.group_dim), 1.0).to_event(1))
            of_rows = dist.Normal(zeros(*real.shape, self.options.row_dim), 1.0).to_event(1)
            v = pyro.sample(ROW_SITE, of_rows.mask(real).to_event(1))
            rows = self.likelihood.distribution(self._output(u[..., None, :], v))
            return pyro.sample("x", rows.mask(real).to_event(1), obs=observations(batch.x))  # type: ignore[attr-defined]

    def decode(self, u: Tensor, v: Tensor) -> Tensor:
        """Mean of x (..., D) at content ``u`` (..., Ku) and style ``v`` (..., Kv): probabilities under Bernoulli."""
        mean: Tensor = self.likelihood.distribution(self._output(u, v)).mean
        return mean

    def posterior_means(self, x: Tensor) -> Tensor:
        """Exact posterior mean of u, then of v, for each row, (S, T, Ku + Kv), where all is linear and normal."""
        found = self._normal_moments(x)
        content = found.mean[:, None].expand(-1, x.shape[1], -1)
        return torch.cat([content, found.row_mean], -1)

    def nearest_product(self, x: Tensor) -> dict[str, Distribution]:
        """Nearest q to the posterior in which u and the v are independent, where all is linear and normal."""
        found = self._normal_moments(x)
        of_group, of_row = grouped_gaussian.precision_blocks(steps_mask(x).sum(-1).to(x.dtype), self._loadings())
        return {
            GROUP_SITE: dist.MultivariateNormal(found.mean, precision_matrix=of_group),
            ROW_SITE: dist.MultivariateNormal(found.row_mean, precision_matrix=of_row),
        }

    def _normal_log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of each group, (S,), nats, where all is linear and normal."""
        return grouped_gaussian.log_density(observations(x), steps_mask(x), self._loadings())

    def _normal_posterior(self, x: Tensor) -> Joint:
        """Exact p(u given x) p(v given u, x), where all is linear and normal: batch shape (S,)."""
        found, real = self._normal_moments(x), steps_mask(x)

        def style(values: Values) -> dist.TorchDistribution:
            shift = (values[GROUP_SITE] - found.mean) @ found.row_slope.mT
            rows = dist.MultivariateNormal(found.row_mean - shift[..., None, :], scale_tril=found.row_scale_tril)
            return rows.mask(real).to_event(1)

        return Joint({GROUP_SITE: dist.MultivariateNormal(found.mean, scale_tril=found.scale_tril), ROW_SITE: style})

    def _normal_moments(self, x: Tensor) -> GroupedPosterior:
        return grouped_gaussian.posterior(observations(x), steps_mask(x), self._loadings())

    def _loadings(self) -> Loadings:
        """The linear decoder in the units of the columns."""
        unit, weight = self.likelihood.unit, self._linear_layers()[-1].weight
        of_group, of_row = (unit[:, None] * weight).split([self.options.group_dim, self.options.row_dim], -1)
        loc = self.likelihood.location + unit * self._linear_layers()[-1].bias
        return Loadings(loc, of_group, of_row, (unit * self.likelihood.noise_scale).square())

    def _output(self, u: Tensor, v: Tensor) -> Tensor:
        lead = torch.broadcast_shapes(u.shape[:-1], v.shape[:-1])
        output: Tensor = self.decoder(torch.cat([u.expand(*lead, -1), v.expand(*lead, -1)], -1))
        return output

    def _linear_layers(self) -> list[nn.Linear]:
        return [module for module in self.decoder.modules() if isinstance(module, nn.Linear)]


def _refuse_dim(option: str, dim: int, count: int, of: str, columns: int) -> None:
    most = min(count - 1, columns)
    if dim > most:
        raise InvalidInput(
            f"option {option}: found {dim} for {count} {of} x {columns} columns, expected at most {most}: data of "
            f"fewer columns or {of} fill no more dimensions"
        )
