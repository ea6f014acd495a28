"""Paths of a finite Markov chain, before and after its observations, and what is observed step by step.

A path is an event of shape (T,); ``steps`` (S, T) marks the steps of each of S sequences that are real. Padding stands
at the end of a sequence. There, draws are zero and log probabilities are zero whatever the value is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import Categorical, Independent, constraints, register_kl

from elbozoo.models.numerics import markov_chains


class MarkovChain(TorchDistribution):
    """Paths z_1..z_T of a chain: p(z) = p(z_1) p(z_2 given z_1) ... p(z_T given z_T-1).

    Parameters
    ----------
    initial_logits : Tensor (K,)
        Unnormalised log probabilities of z_1.
    transition_logits : Tensor (K, K)
        Unnormalised log probabilities of z_t+1, in row z_t.
    steps : Tensor (*batch, T) of bool
        Which steps are real.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "initial_logits": constraints.real_vector,
        "transition_logits": constraints.independent(constraints.real, 2),
    }

    def __init__(
        self, initial_logits: Tensor, transition_logits: Tensor, steps: Tensor, validate_args: bool | None = None
    ) -> None:
        self.initial_logits = initial_logits.log_softmax(-1)
        self.transition_logits = transition_logits.log_softmax(-1)
        self.steps = steps
        super().__init__(steps.shape[:-1], steps.shape[-1:], validate_args=validate_args)

    @property
    def states(self) -> int:
        """Number K of states."""
        return len(self.initial_logits)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Paths of states 0 to K - 1."""
        return _paths(self.states)

    def expand(self, batch_shape: Any, _instance: None = None) -> MarkovChain:
        """Return it with another batch shape."""
        steps = self.steps.expand(torch.Size(batch_shape) + self.event_shape)
        return MarkovChain(self.initial_logits, self.transition_logits, steps, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw paths: (*sample_shape, *batch, T) of int64."""
        with torch.no_grad():
            uniform = _uniform(self._extended_shape(sample_shape), self.initial_logits)
            path = markov_chains.draw_path(self.initial_logits.exp(), self.transition_logits.exp(), uniform)
            return torch.where(self.steps, path, 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(z) of each path, nats."""
        if self._validate_args:
            self._validate_sample(value)
        first = self.initial_logits[value[..., 0]]
        moves = self.transition_logits[value[..., :-1], value[..., 1:]]
        return torch.where(self.steps, torch.cat([first[..., None], moves], -1), 0.0).sum(-1)

    def expected_log_prob(self, probs: Tensor) -> Tensor:
        """E_q[log p(z)] in nats under a q whose steps are independent, with probabilities ``probs`` (..., T, K)."""
        first = (probs[..., 0, :] * markov_chains.finite(self.initial_logits)).sum(-1)
        moves = ((probs[..., :-1, :] @ markov_chains.finite(self.transition_logits)) * probs[..., 1:, :]).sum(-1)
        return torch.where(self.steps, torch.cat([first[..., None], moves], -1), 0.0).sum(-1)


class SmoothedMarkovChain(TorchDistribution):
    """Paths of a hidden chain given its observations, p(z given x): a Markov chain in reverse time.

    p(z given x) = p(z_T given x) p(z_T-1 given z_T, x) ... p(z_1 given z_2, x), where each kernel needs the
    filtered probabilities and the transitions alone. The evidence enters nowhere.

    Parameters
    ----------
    log_filtered : Tensor (*batch, T, K)
        Log p(z_t given x_1..x_t), of ``markov_chains.forward_filter``.
    transition_logits : Tensor (K, K)
        Unnormalised log probabilities of z_t+1, in row z_t.
    steps : Tensor (*batch, T) of bool
        Which steps are real.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "log_filtered": constraints.independent(constraints.real, 2),
        "transition_logits": constraints.independent(constraints.real, 2),
    }

    def __init__(
        self, log_filtered: Tensor, transition_logits: Tensor, steps: Tensor, validate_args: bool | None = None
    ) -> None:
        self.log_filtered = log_filtered
        self.transition_logits = transition_logits.log_softmax(-1)
        self.steps = steps
        super().__init__(steps.shape[:-1], steps.shape[-1:], validate_args=validate_args)

    @property
    def states(self) -> int:
        """Number K of states."""
        return self.log_filtered.shape[-1]

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Paths of states 0 to K - 1."""
        return _paths(self.states)

    @property
    def probs(self) -> Tensor:
        """Marginals p(z_t = k given x), (*batch, T, K), zero at padding."""
        return markov_chains.smooth(self.log_filtered, self.transition_logits, self.steps)

    def expand(self, batch_shape: Any, _instance: None = None) -> SmoothedMarkovChain:
        """Return it with another batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        filtered = self.log_filtered.expand(*shape, self.states)
        return SmoothedMarkovChain(filtered, self.transition_logits, self.steps.expand(shape), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw paths, the last state first (Frühwirth-Schnatter 2006, algorithm 11.5): (*sample_shape, *batch, T)."""
        with torch.no_grad():
            uniform = _uniform(self._extended_shape(sample_shape), self.log_filtered)
            path = markov_chains.draw_path_back(self.log_filtered, self.transition_logits, uniform)
            return torch.where(self.steps, path, 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(z given x) of each path, nats."""
        if self._validate_args:
            self._validate_sample(value)
        last = _at_states(self.log_filtered, value)
        joint = self.log_filtered[..., :-1, :, None] + self.transition_logits
        predicted = markov_chains.finite(torch.logsumexp(joint, -2))
        moves = self.transition_logits[value[..., :-1], value[..., 1:]]
        kernels = last[..., :-1] + moves - _at_states(predicted, value[..., 1:])
        return self._over_steps(kernels, last)

    def expected_log_prob(self, probs: Tensor) -> Tensor:
        """E_q[log p(z given x)] in nats under a q whose steps are independent, with ``probs`` (..., T, K)."""
        weights = probs[..., :-1, :, None] * probs[..., 1:, None, :]
        last = (probs * markov_chains.finite(self.log_filtered)).sum(-1)
        return self._over_steps((weights * self._log_kernels()).sum((-2, -1)), last)

    def entropy(self) -> Tensor:
        """Entropy of each sequence's path, nats."""
        return -self._expected_log_prob_of(self)

    def divergence(self, other: SmoothedMarkovChain) -> Tensor:
        """KL(self ‖ other) of each sequence, nats, in closed form: kernel by kernel."""
        return self._expected_log_prob_of(self) - self._expected_log_prob_of(other)

    def _expected_log_prob_of(self, other: SmoothedMarkovChain) -> Tensor:
        """E of log p(z) of ``other`` under this chain, nats."""
        pairs = markov_chains.pair_probabilities(self.log_filtered, self.transition_logits, self.probs)
        last = (self.log_filtered.exp() * markov_chains.finite(other.log_filtered)).sum(-1)
        return self._over_steps((pairs * other._log_kernels()).sum((-2, -1)), last)

    def _log_kernels(self) -> Tensor:
        return markov_chains.finite(markov_chains.backward_kernels(self.log_filtered, self.transition_logits))

    def _over_steps(self, kernels: Tensor, last: Tensor) -> Tensor:
        """Sum terms (..., T - 1) of the kernels and the term of the last real step among ``last`` (..., T)."""
        beyond = torch.cat([self.steps[..., 1:], torch.zeros_like(self.steps[..., :1])], -1)
        total = torch.where(self.steps & ~beyond, last, 0.0).sum(-1)
        return total + torch.where(beyond[..., :-1], kernels, 0.0).sum(-1)


class PaddedSteps(TorchDistribution):
    """A sequence whose steps are independent given what stands in ``base``: steps become part of the event.

    Parameters
    ----------
    base : Distribution
        One distribution for each step: batch shape (*batch, T).
    steps : Tensor (*batch, T) of bool
        Which steps are real; padded observations are zero and add nothing.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, base: TorchDistribution, steps: Tensor, validate_args: bool | None = None) -> None:
        shape = torch.broadcast_shapes(base.batch_shape, steps.shape)
        self.base = base.expand(shape)
        self.steps = steps.expand(shape)
        super().__init__(shape[:-1], shape[-1:] + base.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients: as the steps' do."""
        return bool(self.base.has_rsample)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Support of the steps."""
        return constraints.independent(self.base.support, 1)

    @property
    def mean(self) -> Tensor:
        """Mean of each step, zero at padding."""
        return self._without_padding(self.base.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of each step, zero at padding."""
        return self._without_padding(self.base.variance)

    def expand(self, batch_shape: Any, _instance: None = None) -> PaddedSteps:
        """Return it with another batch shape."""
        shape = torch.Size(batch_shape) + self.steps.shape[-1:]
        return PaddedSteps(self.base.expand(shape), self.steps.expand(shape), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw sequences: (*sample_shape, *batch, T, *event)."""
        return self._without_padding(self.base.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw sequences whose gradients reach the parameters of the steps."""
        return self._without_padding(self.base.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of each sequence, nats."""
        if self._validate_args:
            self._validate_sample(value)
        return torch.where(self.steps, self.base.log_prob(value), 0.0).sum(-1)

    def _without_padding(self, value: Tensor) -> Tensor:
        steps = self.steps.reshape(self.steps.shape + (1,) * len(self.base.event_shape))
        return torch.where(steps, value, 0)


@register_kl(Independent, SmoothedMarkovChain)
def _kl_independent_steps(q: Independent, posterior: SmoothedMarkovChain) -> Tensor:
    """KL of a q whose steps are independent, one categorical each, masked or not at padding."""
    steps = q.base_dist.base_dist if isinstance(q.base_dist, MaskedDistribution) else q.base_dist
    if not isinstance(steps, Categorical) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError(f"KL of independent {type(steps).__name__} to a path: expected Categorical steps")
    entropy = torch.where(posterior.steps, steps.entropy(), 0.0).sum(-1)
    return -entropy - posterior.expected_log_prob(steps.probs)


@register_kl(SmoothedMarkovChain, SmoothedMarkovChain)
def _kl_smoothed(q: SmoothedMarkovChain, posterior: SmoothedMarkovChain) -> Tensor:
    return q.divergence(posterior)


def _paths(states: int) -> constraints.Constraint:
    return constraints.independent(constraints.integer_interval(0, states - 1), 1)


def _at_states(table: Tensor, value: Tensor) -> Tensor:
    """Entries of ``table`` (..., T, K) at the states ``value`` (..., T), which may have more leading dimensions."""
    shape = torch.broadcast_shapes(table.shape[:-1], value.shape)
    return table.expand(*shape, -1).gather(-1, value.expand(shape)[..., None])[..., 0]


def _uniform(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.rand(shape, dtype=like.dtype, device=like.device)
