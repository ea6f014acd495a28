"""What entries with networks share: small networks, and the likelihood of a row given a network's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional

from elbozoo.models.contract.checks import values_are_checked
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field, Options

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "softplus": nn.Softplus}
STARTING_NOISE = math.sqrt(0.5)
LOG_2PI = math.log(2 * math.pi)
MOST_LEVELS = 2**16  # those of images with 16 bits


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


class Head(Protocol):
    """The end of a network: a number that is added to each of its outputs."""

    bias: nn.Parameter


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
    outputs : int
        Size of y.
    is_binary, has_noise : bool
        Whether columns are zeros and ones; whether they are numbers with a noise scale.
    log_excess : Parameter ()
        σ, noise scale as a share of each column's standard deviation, as the log of what it has above ``noise_floor``;
        only under ``likelihood=normal``.
    location : buffer (D,)
        m, mean of each column of the data; no part of θ.
    unit : buffer (D,)
        s, standard deviation of each column of the data; no part of θ.
    """

    location: Tensor
    unit: Tensor

    def __init__(self, columns: int, options: NetworkOptions) -> None:
        super().__init__()
        self.columns = self.outputs = columns
        self.is_binary = options.likelihood == "bernoulli"
        self.has_noise = options.likelihood == "normal"
        self.floor = options.noise_floor
        if self.has_noise:
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

    def initialize(self, x: Tensor, head: Head) -> None:
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

    def mean(self, output: Tensor) -> Tensor:
        """Mean of x at ``output``, (..., D): probabilities of a one under Bernoulli."""
        mean: Tensor = self.distribution(output).mean
        return mean

    def checked(self, x: Tensor) -> Tensor:
        """Return the rows ``x``, refused where the likelihood has no value for them."""
        return x

    def log_likelihood(self, x: Tensor, output: Tensor) -> Tensor:
        """Log p(x_n given y_g) in nats, (N, G), for rows ``x`` (N, D) and outputs (G, D).

        A matrix product: neither likelihood needs a tensor of shape (N, G, D).
        """
        if self.is_binary:
            # Not softplus, which torch cuts off at 20 and so gets wrong by up to 2e-9.
            return x @ output.mT + functional.logsigmoid(-output).sum(-1)
        scaled = (x - self.location) / self.unit
        log_volume = self.unit.log().sum() + self.columns * (self.noise_scale.log() + 0.5 * LOG_2PI)
        return -0.5 * squared_distances(scaled, output) / self.noise_scale.square() - log_volume


class LevelLikelihood(RowLikelihood):
    """p(x given y) of one row: independent columns, each one of the levels 0, ..., L - 1 with a probability of its own.

    Categorical(softmax(y_d)), where the output holds the L numbers y_d of the first column, then those of the next:
    pixels as discrete variables (van den Oord et al. 2016, "Pixel recurrent neural networks"). It does not know that
    one level is next to another.

    Parameters
    ----------
    columns : int
        Number D of columns.
    levels : int
        L.
    options : NetworkOptions
        Options of the entry.
    """

    def __init__(self, columns: int, levels: int, options: NetworkOptions) -> None:
        super().__init__(columns, options)
        self.levels = levels
        self.outputs = columns * levels

    def initialize(self, x: Tensor, head: Head) -> None:
        """Set the bias of the last layer so that y gives the frequencies of levels in each column of ``x`` (N, D).

        One more row is counted, spread evenly over the levels, so that no probability is zero.
        """
        with torch.no_grad():
            for column, bias in zip(x.mT, head.bias.view(self.columns, self.levels), strict=True):
                counts = torch.bincount(column.long(), minlength=self.levels)
                bias.copy_(((counts + 1 / self.levels) / (len(x) + 1)).log())

    def distribution(self, output: Tensor) -> Distribution:
        """p(x given y) at ``output`` (..., D * L): batch shape (...), event shape (D,)."""
        return dist.Categorical(logits=self._by_column(output)).to_event(1)

    def mean(self, output: Tensor) -> Tensor:
        """Mean level of each column at ``output``, (..., D)."""
        levels = torch.arange(self.levels, dtype=output.dtype, device=output.device)
        return self._by_column(output).softmax(-1) @ levels

    def checked(self, x: Tensor) -> Tensor:
        """Return the rows ``x``.

        Raises
        ------
        InvalidInput
            For a value that is none of the levels.
        """
        if values_are_checked():
            refuse_levels(x, self.levels)
        return x

    def log_likelihood(self, x: Tensor, output: Tensor) -> Tensor:
        """Log p(x_n given y_g) in nats, (N, G), for rows ``x`` (N, D) and outputs (G, D * L).

        The sum over columns of the rows of one table, picked by level: no tensor of shape (N, G, D).
        """
        table = self._by_column(output).log_softmax(-1).flatten(-2).mT.contiguous()
        offsets = self.levels * torch.arange(self.columns, device=x.device)
        return functional.embedding_bag(self.checked(x).long() + offsets, table, mode="sum")

    def _by_column(self, output: Tensor) -> Tensor:
        return output.unflatten(-1, (self.columns, self.levels))


def count_levels(x: Tensor) -> int:
    """Return the largest value in ``x`` and one more, at least 2, and at most ``MOST_LEVELS`` whatever is there."""
    largest = float(x.max())
    return max(2, int(largest) + 1) if largest < MOST_LEVELS else MOST_LEVELS


def refuse_levels(x: Tensor, levels: int) -> None:
    """Refuse the first cell of ``x`` that is none of the levels 0, ..., ``levels`` - 1.

    Raises
    ------
    InvalidInput
        With the cell, and what to do.
    """
    strange = (~((x >= 0) & (x < levels) & (x == x.floor()))).nonzero()
    if not len(strange):
        return
    row, column = strange[0].tolist()
    value = x[row, column].item()
    is_count = 0 <= value < MOST_LEVELS and value == math.floor(value)
    advice = f"set levels={int(value) + 1} or more" if is_count else "set likelihood=normal, or number the values"
    raise InvalidInput(
        f"likelihood=categorical: found {value:g} in column {column + 1}, row {row + 1} (counted from 1), expected "
        f"whole numbers from 0 to {levels - 1}; {advice}"
    )


def draw_weights(
    layers: Sequence[nn.Linear], likelihood: RowLikelihood, *, binary_gain: float = 6.0, inputs: int | None = None
) -> None:
    """Draw weights with which rows show their latents; the noise, where there is one, has a quarter of their scale.

    Parameters
    ----------
    layers : sequence of nn.Linear
        From the latents to the columns.
    likelihood : RowLikelihood
        p(x given the output).
    binary_gain : float
        Scale of the logits of zeros and ones; that of numbers is 1.5 of their units.
    inputs : int, optional
        Number of inputs of the first layer that vary, all of them by default.
    """
    *hidden, last = layers
    with torch.no_grad():
        for layer in hidden:
            layer.weight.normal_().mul_(1.5 / math.sqrt(inputs or layer.in_features))
            layer.bias.normal_()
        gain = binary_gain if likelihood.is_binary else 1.5
        last.weight.normal_().mul_(gain / math.sqrt(last.in_features))
        last.bias.zero_()
        if not likelihood.is_binary:
            likelihood.set_noise_scale(0.25)


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
