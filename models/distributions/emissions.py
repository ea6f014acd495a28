"""What a step of a sequence looks like given its finite state: distributions with starting values and an M step."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.mixtures import starting_assignments
from elbozoo.models.contract.options import Field
from elbozoo.models.contract.sequences import SequenceOptions
from elbozoo.models.numerics import normals
from elbozoo.models.numerics.counts import positive
from elbozoo.models.numerics.covariances import KINDS

LEAST_RATE = 1e-12
LEAST_STEPS = 0.5
OWN_SHARE = 0.9
MOST_CATEGORIES = 10_000


class EmissionOptions(SequenceOptions):
    """Options of models whose steps have finite states."""

    states: int = Field(2, ge=1, description="number K of states")
    emission: Literal["normal", "multivariate-normal", "poisson", "categorical"] = Field(
        "normal", description="distribution of an observation given its state"
    )
    floor: float = Field(
        1e-6,
        gt=0,
        lt=1,
        description="least variance of a state under the normal emissions, in any direction, "
        "as a share of the columns' variance",
    )
    categories: int | None = Field(
        None,
        ge=1,
        le=MOST_CATEGORIES,
        description="number of codes under emission=categorical; none takes the largest code of the data, plus one",
    )


class Emission(Protocol):
    """What p(x_t given z_t) has to offer; the parameters' first dimension is the state."""

    @property
    def collapse(self) -> str:
        """Why a state counts as collapsed."""
        ...

    @staticmethod
    def check(rows: Tensor, options: EmissionOptions) -> None:
        """Refuse rows (N, D) that the emission cannot have."""
        ...

    def initialize(self, rows: Tensor, restart: int) -> None:
        """Set the starting values for the rows (N, D)."""
        ...

    def randomize(self) -> None:
        """Draw the parameters at random."""
        ...

    def values(self, x: Tensor) -> Tensor:
        """Return observations (..., D) in the shape of the emission's event."""
        ...

    def given(self, z: Tensor) -> Any:
        """Return the distribution of an observation given states of any shape, which is its batch shape."""
        ...

    def log_density(self, rows: Tensor) -> Tensor:
        """Log density of each row under each state, (N, K), nats."""
        ...

    def statistics(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the rows by the states' probabilities (N, K): sums and squares."""
        ...

    def maximize(self, counts: Tensor, sums: Tensor, squares: Tensor) -> None:
        """Set the parameters to the maximum of the expected log density."""
        ...

    def collapsed(self, counts: Tensor) -> Tensor:
        """Mask (K,) of the states that have collapsed, with ``counts`` (K,) expected steps in each."""
        ...


class NormalEmission(nn.Module):
    """Normal observations: independent columns, or a covariance matrix for each state.

    Attributes
    ----------
    means : Parameter (K, D)
        μ, mean in each state.
    factor : Parameter (K, D) or (K, D, D)
        Σ, covariance in each state, as its unconstrained factor, see ``models/numerics/covariances.py``.
    unit : buffer (D,)
        s, standard deviation of each column of the data, in which the floor is measured; no part of θ.
    """

    unit: Tensor

    def __init__(self, options: EmissionOptions, columns: int) -> None:
        super().__init__()
        self.floor = options.floor
        self.kind = KINDS["full" if options.emission == "multivariate-normal" else "diagonal"]
        # Fewer steps leave a covariance singular, or a variance of zero.
        self.needed = columns + 1 if self.kind.has_scale_tril else 2
        self.means = nn.Parameter(torch.zeros(options.states, columns))
        self.factor = nn.Parameter(torch.zeros(self.kind.factor_shape(options.states, columns)))
        self.register_buffer("unit", torch.ones(columns))

    @property
    def collapse(self) -> str:
        """Why a state counts as collapsed."""
        return f"on the floor, or fewer than {self.needed} steps"

    @staticmethod
    def check(rows: Tensor, options: EmissionOptions) -> None:
        """Refuse columns in which every covariance would be singular."""
        constant = torch.nonzero(rows.var(0, correction=0) == 0).flatten().tolist()
        if constant:
            raise InvalidInput(
                f"columns {[c + 1 for c in constant]} (counted from 1, without the sequence's) are constant over "
                f"{len(rows)} rows, expected columns that vary: leave them out with --columns"
            )
        if options.emission == "normal":
            return
        rank = int(torch.linalg.matrix_rank((rows - rows.mean(0)) / rows.std(0, correction=0)))
        if rank < rows.shape[1]:
            raise InvalidInput(
                f"the {rows.shape[1]} columns of {len(rows)} rows have centred rank {rank}, expected full rank for "
                "emission=multivariate-normal: leave out columns that others determine, or use emission=normal"
            )

    def initialize(self, rows: Tensor, restart: int) -> None:
        """Match the moments of groups of rows."""
        with torch.no_grad():
            self.unit.copy_(rows.std(0, correction=0))
            self.means.copy_(rows.mean(0).expand_as(self.means))
            # About the mean: far from zero, distances between rows would lose their digits.
            weights = _starting_weights((rows - rows.mean(0)) / self.unit, len(self.means), restart)
            self.maximize(weights.sum(0), *self.statistics(rows, weights))

    def randomize(self) -> None:
        """Draw means three standard deviations wide and covariances about the unit."""
        with torch.no_grad():
            self.means.normal_().mul_(3)
            self.factor.normal_().mul_(0.3)
            self.factor.add_(torch.eye(self.means.shape[1]) if self.kind.has_scale_tril else 1.0)

    @property
    def scale(self) -> Tensor:
        """Standard deviations (K, D), or Cholesky factors (K, D, D) of the covariances, in the data's units."""
        return self.kind.scale(self.factor, self.unit, self.floor)

    @property
    def covariances(self) -> Tensor:
        """Covariance matrices (K, D, D), in the data's units squared."""
        scale = self.scale
        return scale @ scale.mT if self.kind.has_scale_tril else torch.diag_embed(scale.square())

    def values(self, x: Tensor) -> Tensor:
        """Return the observations as they are."""
        return x

    def given(self, z: Tensor) -> Any:
        """N(μ_z, Σ_z)."""
        if self.kind.has_scale_tril:
            return dist.MultivariateNormal(self.means[z], scale_tril=self.scale[z])
        return dist.Normal(self.means[z], self.scale[z]).to_event(1)

    def log_density(self, rows: Tensor) -> Tensor:
        """Log density of each row under each state, (N, K), nats."""
        scale = self.scale
        if normals.suits(rows, self.means, scale):
            return normals.log_density(rows, self.means, scale)
        return self.kind.log_density(rows, self.means, scale)

    def statistics(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums of x - μ and of its squares: raw moments would cancel far from zero."""
        if normals.suits(rows, self.means, weights):
            return normals.moments(rows, self.means, weights, self.kind.has_scale_tril)
        origin = self.means.mean(0)
        shift = weights.mT @ (rows - origin) - weights.sum(0)[:, None] * (self.means - origin)
        return shift, self.kind.scatter(rows, self.means, weights)

    def maximize(self, counts: Tensor, sums: Tensor, squares: Tensor) -> None:
        """Weighted means and covariances, under the floor."""
        counts = positive(counts)
        shift = sums / counts[:, None]
        self.factor.copy_(self.kind.maximize(squares, shift, counts, self.unit, self.floor))
        self.means.add_(shift)

    def collapsed(self, counts: Tensor) -> Tensor:
        """Mask of the states on the floor, or with too few steps for a covariance."""
        relative = self.covariances / (self.unit[:, None] * self.unit)
        return (torch.linalg.eigvalsh(relative)[:, 0] < 2 * self.floor) | (counts < self.needed)


class PoissonEmission(nn.Module):
    """Counts, independent in each column given the state.

    Attributes
    ----------
    log_rates : Parameter (K, D)
        λ, expected count of a step in each state, as its logarithm.
    """

    collapse = f"fewer than {LEAST_STEPS} expected steps"

    def __init__(self, options: EmissionOptions, columns: int) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(torch.zeros(options.states, columns))

    @property
    def rates(self) -> Tensor:
        """Expected count of a step, (K, D)."""
        return self.log_rates.exp()

    @staticmethod
    def check(rows: Tensor, options: EmissionOptions) -> None:
        """Refuse what are no counts."""
        wrong = rows[(rows < 0) | (rows != rows.round())]
        if len(wrong):
            raise InvalidInput(
                f"emission=poisson: found the value {wrong[0]:g}, expected counts 0, 1, 2, ...; "
                "leave that column out with --columns, or use emission=normal"
            )

    def initialize(self, rows: Tensor, restart: int) -> None:
        """Match the means of groups of rows."""
        with torch.no_grad():
            # The square root of a count has about the same variance whatever its rate.
            weights = _starting_weights(rows.sqrt(), len(self.log_rates), restart)
            self.maximize(weights.sum(0), *self.statistics(rows, weights))

    def randomize(self) -> None:
        """Draw rates about 4 counts a step that differ by a factor of 2 or more."""
        with torch.no_grad():
            self.log_rates.normal_().add_(1.4)

    def values(self, x: Tensor) -> Tensor:
        """Return the counts as they are."""
        return x

    def given(self, z: Tensor) -> Any:
        """Poisson(λ_z) in each column."""
        return dist.Poisson(self.rates[z]).to_event(1)

    def log_density(self, rows: Tensor) -> Tensor:
        """Log probability of each row under each state, (N, K), nats."""
        constant = torch.lgamma(rows + 1).sum(-1, keepdim=True)
        return rows @ self.log_rates.mT - self.rates.sum(-1) - constant

    def statistics(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums of the counts."""
        return weights.mT @ rows, rows.new_zeros(())

    def maximize(self, counts: Tensor, sums: Tensor, squares: Tensor) -> None:
        """Weighted means of the counts; a state without steps keeps its rates."""
        log_rates = (sums / positive(counts)[:, None]).clamp(min=LEAST_RATE).log()
        self.log_rates.copy_(torch.where(counts[:, None] > 0, log_rates, self.log_rates))

    def collapsed(self, counts: Tensor) -> Tensor:
        """Mask of the states that no step is likely to be in."""
        return counts < LEAST_STEPS


class CategoricalEmission(nn.Module):
    """One column of codes 0, 1, 2, ... without an order.

    Attributes
    ----------
    logits : Parameter (K, C)
        p, probability of each code in each state, as an unnormalised logarithm.
    """

    collapse = f"fewer than {LEAST_STEPS} expected steps"

    def __init__(self, options: EmissionOptions, columns: int) -> None:
        super().__init__()
        _check_one_column(columns)
        # Before any data are seen: enough for a simulated example.
        self.logits = nn.Parameter(torch.zeros(options.states, options.categories or 2 * options.states))

    @property
    def log_probs(self) -> Tensor:
        """Log probability of each code in each state, (K, C)."""
        return self.logits.log_softmax(-1)

    @staticmethod
    def check(rows: Tensor, options: EmissionOptions) -> None:
        """Refuse what is no code, and more than one column of codes."""
        _check_one_column(rows.shape[1])
        limit = options.categories or MOST_CATEGORIES
        wrong = rows[(rows < 0) | (rows != rows.round()) | (rows >= limit)]
        if len(wrong):
            raise InvalidInput(
                f"emission=categorical: found the value {wrong[0]:g}, expected codes 0, 1, 2, ... below {limit}: "
                "number the categories from 0"
            )

    def initialize(self, rows: Tensor, restart: int) -> None:
        """Perturb the frequencies of all steps at random."""
        with torch.no_grad():
            counts = torch.bincount(rows[:, 0].long(), minlength=self.logits.shape[1])
            self.logits.normal_().add_((counts + 0.5).log())

    def randomize(self) -> None:
        """Draw probabilities that differ between the states."""
        with torch.no_grad():
            self.logits.normal_().mul_(1.5)

    def values(self, x: Tensor) -> Tensor:
        """Return the one column of codes."""
        return x[..., 0]

    def given(self, z: Tensor) -> Any:
        """Categorical(b_z)."""
        return dist.Categorical(logits=self.logits[z])

    def log_density(self, rows: Tensor) -> Tensor:
        """Log probability of each row's code under each state, (N, K), nats."""
        return self.log_probs.mT[rows[:, 0].long()]

    def statistics(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted number of each code."""
        numbers = torch.zeros_like(self.logits.mT).index_add(0, rows[:, 0].long(), weights).mT
        return numbers, rows.new_zeros(())

    def maximize(self, counts: Tensor, sums: Tensor, squares: Tensor) -> None:
        """Weighted shares of the codes; a state without steps keeps its own."""
        self.logits.copy_(torch.where(counts[:, None] > 0, log_shares(sums), self.logits))

    def collapsed(self, counts: Tensor) -> Tensor:
        """Mask of the states that no step is likely to be in."""
        return counts < LEAST_STEPS


EMISSIONS: dict[str, type[NormalEmission] | type[PoissonEmission] | type[CategoricalEmission]] = {
    "normal": NormalEmission,
    "multivariate-normal": NormalEmission,
    "poisson": PoissonEmission,
    "categorical": CategoricalEmission,
}


def _check_one_column(columns: int) -> None:
    if columns != 1:
        raise InvalidInput(
            f"emission=categorical: found {columns} columns of observations, expected one column of codes: "
            "choose it with --columns"
        )


def _starting_weights(rows: Tensor, states: int, restart: int) -> Tensor:
    """Weights (N, K) near the assignment of rows to groups, with a share of every row in every state.

    So no state starts without steps, nor any rate at zero, where EM would stay.
    """
    return OWN_SHARE * starting_assignments(rows, states, restart) + (1 - OWN_SHARE) / states


def log_shares(counts: Tensor) -> Tensor:
    """Log of the shares of ``counts`` (..., K) in their sum; equal shares where all are zero."""
    return positive(counts).log().log_softmax(-1)
