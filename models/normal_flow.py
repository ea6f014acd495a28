r"""Normalising flow: a density made by bending a normal, and evaluated exactly.

An invertible network carries independent normal numbers to the rows. There is no latent to infer: x determines the
numbers that it came from, and the change of variables gives log p(x) itself. So a flow is the baseline
beside models with latents: its likelihood needs no bound.

$$
x = f(u), \quad u \sim \mathcal N(0, I_D), \qquad
\log p(x) = \log \mathcal N\bigl(f^{-1}(x); 0, I\bigr) + \log \left| \det \frac{\partial f^{-1}}{\partial x} \right|
$$

Here $f = A \circ T_M \circ P \circ \dots \circ P \circ T_1$, where each $T$ is a coupling: half of the numbers
pass unchanged and say how the others are moved, by $u_2 \mapsto e^{s(u_1)} u_2 + t(u_1)$ (`affine-coupling`,
Dinh et al. 2017) or by monotonic rational splines (`spline-coupling`, Durkan et al. 2019). $P$ turns
the order round, and $A$ gives the columns their mean and standard deviation, which are fixed at the start and no
part of θ. The couplings start at the identity, so that the flow begins as independent normals.

A program without latents has nothing for a q to say: the only guide is `exact`, the posterior of no latent, under
which the ELBO is log p(x) and its gradient that of the likelihood. Fitting it is maximum likelihood.

What goes wrong:

*Densities without bound.* Rows that repeat, whole numbers, or columns that are functions of others lie on sets without
volume, where the likelihood grows for ever. Here the third column is the sum of the first two, and log p(x)
rises for as long as the fit goes on:

```python
draw = torch.Generator().manual_seed(0)
x = torch.randn(300, 2, generator=draw)
x = torch.cat([x, x.sum(1, keepdim=True)], 1)
settings = {"hidden": 16, "learning_rate": 0.003, "steps": 800, "progress": False}
fit = ez.fit("normal-flow", x, guide="exact", seed=0, **settings)
quarters = fit.trajectory.elbo.to_numpy().reshape(4, 200) / len(x)
means = quarters.mean(1)
for quarter, mean in enumerate(means, start=1):
    print(f"quarter {quarter} of the fit: log p(x) {mean:.2f} nats a row")
assert means[3] > means[0] + 0.5
```

*Overfitting.* Nothing regularises the networks. A training likelihood that keeps rising while that of rows held back
falls is the sign of it, and `patience` stops in time. The failure above shows no such sign where new rows lie on the
same set.

```python
x, new = torch.randn(1060, 3, generator=draw).split([60, 1000])
settings = {"validation": new, "validate_every": 10, "steps": 300, "progress": False}
fit = ez.fit("normal-flow", x, guide="exact", seed=0, **settings)
held_back = fit.validation.set_index("step").elbo
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(fit.trajectory.step, fit.trajectory.elbo / 60, label="rows of the fit")
axes.plot(held_back, label="rows held back")
axes.set(xlabel="step", ylabel="log p(x), nats a row", ylim=(-12, -2))
axes.legend()
lost = held_back.max() - held_back.iloc[-1]
print(f"rows held back: {held_back.max():.2f} nats a row at best,", end=" ")
print(f"{lost:.2f} less at the end")
assert lost > 1
```

*Topology.* f is continuous, so clusters stay joined by thin bridges: of what is drawn from the flow some rows lie where
there were none.

```python
ends = 0.5 * torch.randn(400, 2, generator=draw)
ends[:, 0] += torch.tensor([-3.0, 3.0]).repeat(200)
fit = ez.fit("normal-flow", ends, guide="exact", steps=400, seed=0, progress=False)
drawn = fit.sample(2000)
of_data, of_drawn = (int((rows[:, 0].abs() < 1).sum()) for rows in (ends, drawn))
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.scatter(*drawn.T.numpy(), s=3, label="drawn from the flow")
axes.scatter(*ends.T.numpy(), s=3, label="data")
axes.set(xlabel="first column", ylabel="second column")
axes.legend(loc="upper center")
print(f"between the clusters: {of_data} of 400 rows, {of_drawn} of 2000 drawn")
assert of_data == 0 and of_drawn > 5
```

*Tails*: splines are the identity outside three standard deviations, so heavy tails cost them more than affine
couplings.

References
----------
```bibtex
@inproceedings{dinh2017density,
  author = {Dinh, Laurent and Sohl-Dickstein, Jascha and Bengio, Samy},
  title = {Density Estimation using Real {NVP}},
  booktitle = {International Conference on Learning Representations}, year = {2017}
}
@inproceedings{durkan2019neural,
  author = {Durkan, Conor and Bekasov, Artur and Murray, Iain and Papamakarios, George},
  title = {Neural Spline Flows},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {32}, year = {2019}
}
@article{papamakarios2021normalizing,
  author = {Papamakarios, George and Nalisnick, Eric and Rezende, Danilo Jimenez and Mohamed, Shakir
    and Lakshminarayanan, Balaji},
  title = {Normalizing Flows for Probabilistic Modeling and Inference},
  journal = {Journal of Machine Learning Research},
  volume = {22}, number = {57}, pages = {1--64}, year = {2021}
}
```
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import transforms
from pyro.nn import DenseNN
from torch import Tensor, nn
from torch.distributions import Transform

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.joint import Joint
from elbozoo.models.contract.options import Field, Options
from elbozoo.models.contract.sites import LatentSite

SMALL_WEIGHT, BEND = 0.01, 0.3
SLOPE_ONE = math.log(math.exp(0.999) - 1)  # Pyro's splines have the slope 0.001 + softplus of this


class NormalFlowOptions(Options):
    """Options of :class:`NormalFlow`."""

    transform: Literal["affine-coupling", "spline-coupling"] = Field(
        "affine-coupling", description="how half of the numbers move the others"
    )
    transforms: int = Field(4, ge=1, description="number M of couplings; with one alone half of the columns are normal")
    hidden: int = Field(64, ge=1, description="width of the hidden layer of each coupling's network")
    bins: int = Field(8, ge=2, description="number of pieces of each spline, of spline-coupling")


class NormalFlow(Entry):
    """Normalising flow: x = f(u), u ~ N(0, I), with f made of Pyro's couplings; no latent.

    Attributes
    ----------
    couplings : nn.ModuleList
        T_1, ..., T_M: couplings, Pyro's transforms with a network each.
    location : buffer (D,)
        m, mean of each column of the data; A adds it, and it is no part of θ.
    unit : buffer (D,)
        s, standard deviation of each column of the data; A multiplies by it, and it is no part of θ.
    """

    Options = NormalFlowOptions
    options: NormalFlowOptions
    dtype = torch.float32
    example_columns = 3
    location: Tensor
    unit: Tensor

    def __init__(self, options: NormalFlowOptions, columns: int) -> None:
        super().__init__(options, columns)
        if columns < 2:
            raise InvalidInput(f"found {columns} column, expected at least 2: a coupling needs numbers to couple")
        self.couplings = nn.ModuleList(_coupling(options, columns) for _ in range(options.transforms))
        self.register_buffer("location", torch.zeros(columns))
        self.register_buffer("unit", torch.ones(columns))

    @classmethod
    def check_data(cls, x: Tensor, options: NormalFlowOptions) -> None:
        """Refuse constant columns, on which a density has no bound."""
        constant = torch.nonzero(x.var(0, correction=0) == 0).flatten().tolist()
        if constant:
            raise InvalidInput(
                f"columns {[c + 1 for c in constant]} (counted from 1) are constant, expected columns that vary: "
                "a density on them has no bound; leave them out with --columns"
            )

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start near the identity, as independent normals with the columns' moments."""
        with torch.no_grad():
            for coupling in self.couplings:
                _start_at_identity(coupling)
            self.location.copy_(x.mean(0))
            self.unit.copy_(x.std(0, correction=0))

    def randomize(self) -> None:
        """Draw networks and splines that bend the normal well, without the sharp peaks of steep ones."""
        with torch.no_grad():
            for coupling in self.couplings:
                _start_at_identity(coupling)
                for parameter in coupling.parameters():
                    parameter.add_(BEND * torch.randn_like(parameter))

    def latent_sites(self, x: Tensor | None = None) -> list[LatentSite]:
        """Return no site: x determines the numbers that it was made of."""
        return []

    def forward(self, batch: Batch) -> Tensor:
        """x (B, D) ~ f(u), u ~ N(0, I)."""
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", self.distribution(), obs=batch.x)

    def distribution(self) -> dist.TransformedDistribution:
        """p(x) of one row: batch shape (), event shape (D,)."""
        base = dist.Normal(torch.zeros_like(self.location), 1.0).to_event(1)
        return dist.TransformedDistribution(base, self._transforms())

    def normal_numbers(self, x: Tensor) -> Tensor:
        """The numbers u = f⁻¹(x) that rows ``x`` (N, D) were made of, (N, D): independent normals at the true flow."""
        for transform in reversed(self._transforms()):
            x = transform.inv(x)
        return x

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x), (N,), nats, by the change of variables."""
        result: Tensor = self.distribution().log_prob(x)
        return result

    def posterior(self, x: Tensor) -> Joint:
        """Posterior of no latent: an empty product, whose density is one."""
        return Joint({})

    def _transforms(self) -> list[Transform]:
        """Return f, first step first.

        Pyro's couplings keep what they computed last, with its gradient. These are copies that share the parameters,
        so that the entry itself keeps nothing that outlives a change of them.
        """
        turned = torch.arange(self.columns - 1, -1, -1, device=self.location.device)
        steps: list[Transform] = []
        for number, coupling in enumerate(self.couplings):
            if number > 0:
                steps.append(transforms.Permute(turned))
            steps.append(_without_cache(coupling))
        return [*steps, transforms.AffineTransform(self.location, self.unit, event_dim=1)]


def _coupling(options: NormalFlowOptions, columns: int) -> nn.Module:
    """Return one coupling, in which the first half of the numbers moves the second."""
    first = columns // 2
    second = columns - first
    if options.transform == "affine-coupling":
        network = DenseNN(first, [options.hidden], [second, second], nn.Tanh())
        coupling: nn.Module = transforms.AffineCoupling(first, network)
        return coupling
    sizes = [second * options.bins, second * options.bins, second * (options.bins - 1), second * options.bins]
    network = DenseNN(first, [options.hidden], sizes, nn.Tanh())
    coupling = transforms.SplineCoupling(columns, first, network, options.bins)
    return coupling


def _start_at_identity(coupling: Any) -> None:
    """Draw the network of a coupling anew, so that it moves nothing far: pieces of one length, slopes of one."""
    is_affine = isinstance(coupling, transforms.AffineCoupling)
    network = coupling.nn if is_affine else coupling.upper_spline.nn
    for layer in network.layers:
        layer.reset_parameters()
    head = network.layers[-1]
    head.weight.mul_(SMALL_WEIGHT)
    head.bias.zero_()
    if is_affine:
        return
    head.bias[network.param_slices[2]] = SLOPE_ONE
    lower = coupling.lower_spline
    for lengths in (lower.unnormalized_widths, lower.unnormalized_heights, lower.unnormalized_lambdas):
        lengths.zero_()
    lower.unnormalized_derivatives.fill_(SLOPE_ONE)


def _without_cache(coupling: nn.Module) -> Transform:
    """Return a copy of ``coupling`` that shares its parameters but not what it remembers of its last call."""
    twin: Any = copy.copy(coupling)
    twin._modules = {name: copy.copy(module) for name, module in coupling._modules.items()}
    result: Transform = twin
    return result
