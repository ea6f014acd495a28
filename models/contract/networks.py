"""What entries with networks share: small networks, and the likelihood of a row given a network's output."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional

from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field, Options

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "softplus": nn.Softplus}
STARTING_NOISE = math.sqrt(0.5)
LOG_2PI = math.log(2 * math.pi)


class NetworkOptions(Options):
    """Options of entries whose rows are drawn at the output of a network."""

    hidden: int = Field(64, ge=1, description="width of each hidden layer")
    activation: Literal["tanh", "relu", "softplus"] = Field("tanh", description="nonlinearity of the hidden layers")
    likelihood: Literal["bernoulli", "normal"] = Field(
        "bernoulli", description="of each column: of zeros and ones, or of numbers with a learned noise scale"
    )
    noise_floor: float = Field(
        0.01, ge=0, lt=1, description="least noise scale under likelihood=normal, in standard deviations of the columns"
    )


def multilayer(inputs: int, outputs: int, options: NetworkOptions) -> nn.Sequential:
    """Return a network of one hidden layer from (..., inputs) to (..., outputs)."""
    hidden, activation = options.hidden, ACTIVATIONS[options.activation]
    return nn.Sequential(nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, outputs))


class RowLikelihood(nn.Module):
    """p(x given y) of one row: independent columns, whose parameters are the output y of a network.

    Bernoulli(sigmoid(y)) for zeros and ones, or N(m + s y, (s σ)²) for numbers. There m and s are the mean and the
    standard deviation of the columns, fixed when fitting starts and no part of θ, so that networks work in units
    of the columns; densities are those of the raw columns.

    Parameters
    ----------
    columns : int
        Number D of columns.
    options : NetworkOptions
        Which likelihood, and the floor of its noise.

    Attributes
    ----------
    log_excess : Parameter ()
        Log of what σ has above ``noise_floor``; only under ``likelihood=normal``.
    location, unit : buffers (D,)
        m and s.
    """

    location: Tensor
    unit: Tensor

    def __init__(self, columns: int, options: NetworkOptions) -> None:
        super().__init__()
        self.columns = columns
        self.is_binary = options.likelihood == "bernoulli"
        self.floor = options.noise_floor
        if not self.is_binary:
            self.register_buffer("location", torch.zeros(columns))
            self.register_buffer("unit", torch.ones(columns))
            self.log_excess = nn.Parameter(torch.zeros(()))

    @property
    def noise_scale(self) -> Tensor:
        """σ, a share of each column's standard deviation, (); only under ``likelihood=normal``."""
        return self.floor + self.log_excess.exp()

    def set_noise_scale(self, share: float) -> None:
        """Set σ that far on the way from its floor to 1."""
        with torch.no_grad():
            self.log_excess.fill_(math.log((1 - self.floor) * share))

    def initialize(self, x: Tensor, head: nn.Linear) -> None:
        """Take units from the rows ``x`` (N, D), and set the bias of the last layer so that y gives their means."""
        with torch.no_grad():
            if self.is_binary:
                smallest = 0.5 / len(x)
                head.bias.copy_(x.mean(0).clamp(smallest, 1 - smallest).logit())
                return
            head.bias.zero_()
            self.location.copy_(x.mean(0))
            self.unit.copy_(spread(x))
            self.set_noise_scale(STARTING_NOISE)

    def distribution(self, output: Tensor) -> Distribution:
        """p(x given y) at ``output`` (..., D): batch shape (...), event shape (D,)."""
        if self.is_binary:
            return dist.Bernoulli(logits=output).to_event(1)
        return dist.Normal(self.location + self.unit * output, self.unit * self.noise_scale).to_event(1)

    def log_likelihood(self, x: Tensor, output: Tensor) -> Tensor:
        """Log p(x_n given y_g) in nats, (N, G), for rows ``x`` (N, D) and outputs (G, D).

        A matrix product: neither likelihood needs a tensor of shape (N, G, D).
        """
        if self.is_binary:
            return x @ output.mT - functional.softplus(output).sum(-1)
        scaled = (x - self.location) / self.unit
        log_volume = self.unit.log().sum() + self.columns * (self.noise_scale.log() + 0.5 * LOG_2PI)
        return -0.5 * squared_distances(scaled, output) / self.noise_scale.square() - log_volume


def refuse_rows(x: Tensor, columns: list[int], *, is_binary: bool) -> None:
    """Refuse the first cell among ``columns`` of ``x`` that is neither 0 nor 1, where the likelihood is Bernoulli.

    Raises
    ------
    InvalidInput
        With the cell, and what to do.
    """
    if not is_binary:
        return
    values = x[:, columns]
    strange = ((values != 0) & (values != 1)).nonzero()
    if len(strange):
        row, position = strange[0].tolist()
        raise InvalidInput(
            f"likelihood=bernoulli: found {values[row, position].item():g} in column {columns[position] + 1}, "
            f"row {row + 1} (counted from 1), expected only 0 and 1; set likelihood=normal, or bring data of zeros "
            "and ones such as digits-binary"
        )


def spread(x: Tensor) -> Tensor:
    """Return the standard deviation of each column, (D,), 1 where the column is constant."""
    deviation = x.std(0, correction=0)
    constant = deviation <= 8 * torch.finfo(x.dtype).eps * x.abs().amax(0)
    return torch.where(constant, torch.ones_like(deviation), deviation)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_n - b_g|², (N, G), by a matrix product about the mean of ``a``, so that no common offset cancels."""
    centre = a.mean(0)
    a, b = a - centre, b - centre
    return a.square().sum(-1)[:, None] + b.square().sum(-1) - 2 * a @ b.mT
