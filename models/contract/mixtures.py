"""What mixtures share: weights, the sum over components, responsibilities, starting labels."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from pyro.nn import PyroParam
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.distributions import Distribution, constraints

from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.joint import Joint
from elbozoo.models.contract.options import Field, Options
from elbozoo.models.numerics.counts import positive

LEAST_ROWS = 0.5


class MixtureOptions(Options):
    """Options of every mixture."""

    components: int = Field(3, ge=1, description="number K of components")


class Responsibilities(NamedTuple):
    """An E step: ``probs`` (N, K) are p(z given x), and ``log_evidence`` () the sum of log p(x) in nats."""

    probs: Tensor
    log_evidence: Tensor


class WeightedSums(NamedTuple):
    """Expected sufficient statistics of components whose mean says all, summed over rows.

    Attributes
    ----------
    log_evidence : Tensor ()
        Sum of log p(x), nats.
    counts : Tensor (K,)
        Sum of the responsibilities.
    sums : Tensor (K, D)
        Sum of r x.
    """

    log_evidence: Tensor
    counts: Tensor
    sums: Tensor

    def means(self, otherwise: Tensor) -> Tensor:
        """Weighted mean of the rows of each component, (K, D); ``otherwise`` of those that have lost all rows."""
        counts = self.counts[:, None]
        return torch.where(counts > 0, self.sums / positive(counts), otherwise)


class MixtureEntry(Entry):
    """Base of mixtures: z ~ Categorical(π) picks the component that x is drawn from.

    A subclass gives ``component_log_density``; the evidence and the posterior follow from it.

    Attributes
    ----------
    weights : PyroParam (K,)
        π, share of each component.
    """

    options: MixtureOptions

    def __init__(self, options: MixtureOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.weights = PyroParam(torch.full((options.components,), 1 / options.components), constraints.simplex)

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse more components than rows."""
        if options.components > len(x):
            raise InvalidInput(
                f"option components: found {options.components} for {len(x)} rows, "
                "expected at most one component per row"
            )

    def component_log_density(self, x: Tensor) -> Tensor:
        """Log p(x given z = k) of each row under each component, (N, K), nats."""
        raise NotImplementedError(f"{type(self).__name__} has no components; define component_log_density(x)")

    def log_joint(self, x: Tensor) -> Tensor:
        """Log p(x, z = k) of each row with each component, (N, K), nats."""
        return self.weights.log() + self.component_log_density(x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x), (N,), nats: the sum over components, Bishop (2006), equation 9.7."""
        return torch.logsumexp(self.log_joint(x), -1)

    def posterior(self, x: Tensor) -> Distribution | Joint:
        """Responsibilities p(z given x): batch shape (N,), Bishop (2006), equation 9.13."""
        return dist.Categorical(logits=self.log_joint(x))

    def responsibilities(self, x: Tensor) -> Responsibilities:
        """Responsibilities of the components for each row, and the evidence of all rows."""
        log_joint = self.log_joint(x)
        log_evidence = torch.logsumexp(log_joint, -1, keepdim=True)
        return Responsibilities((log_joint - log_evidence).exp(), log_evidence.sum())

    def expected_statistics(self, x: Tensor) -> Any:
        """E step: a named tuple of sums over the rows, the ``counts`` (K,) of responsibilities among them."""
        raise NotImplementedError(f"{type(self).__name__} has no E step; define expected_statistics(x)")

    def set_weights(self, counts: Tensor) -> None:
        """M step of π: the share of each component in the rows, Bishop (2006), equation 9.26."""
        counts = positive(counts)
        self.weights = counts / counts.sum()


def weighted_sums(x: Tensor, responsibilities: Responsibilities) -> WeightedSums:
    """Weigh the rows ``x`` (N, D) by the responsibilities of each component and add them up."""
    probs, log_evidence = responsibilities
    return WeightedSums(log_evidence, probs.sum(0), probs.mT @ x)


def lost_components(counts: Tensor) -> str | None:
    """Say which components have lost their rows, by the expected number of each (K,): a mixture of fewer is left."""
    lost = counts < LEAST_ROWS
    if not lost.any():
        return None
    return f"components {lost.nonzero().flatten().tolist()} lost their rows (fewer than {LEAST_ROWS} expected rows)"


def starting_assignments(x: Tensor, components: int, restart: int) -> Tensor:
    """Assign the rows by k-means (even restarts), or to the nearest of random rows (odd restarts): 0 or 1, (N, K)."""
    labels = _nearest_random_rows(x, components) if restart % 2 == 1 else _kmeans_labels(x, components)
    return x.new_zeros(len(x), components).scatter_(1, labels[:, None], 1.0)


def starting_sums(x: Tensor, assignments: Tensor) -> WeightedSums:
    """Statistics of rows assigned to components, and to each component one row more, of halves.

    So no component begins without rows, and no mean at zero or one, where EM would stay.
    """
    sums = weighted_sums(x, Responsibilities(assignments, x.new_zeros(())))
    return sums._replace(counts=sums.counts + 1, sums=sums.sums + 0.5)


def _nearest_random_rows(x: Tensor, components: int) -> Tensor:
    centres = x[torch.randperm(len(x))[:components]]
    return torch.cdist(x, centres).argmin(1)


def _kmeans_labels(x: Tensor, components: int) -> Tensor:
    seed = int(torch.randint(2**31 - 1, ()))
    with warnings.catch_warnings():
        # Fewer different rows than components are an answer here, not a failure to converge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = KMeans(components, n_init=1, random_state=seed).fit(x.numpy()).labels_
    return torch.from_numpy(labels).long()
