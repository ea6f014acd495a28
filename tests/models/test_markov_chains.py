"""Algebra of hidden chains and their distributions against the sum over all paths, K = 3 and T = 6, in NumPy."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions.kl import kl_divergence

from elbozoo.models.distributions.markov_chain import MarkovChain, PaddedSteps, SmoothedMarkovChain
from elbozoo.models.numerics.markov_chains import (
    forward_filter,
    log_stationary,
    most_likely_path,
    pair_probabilities,
    smooth,
)

STATES, LENGTHS = 3, (6, 4, 1)
LONGEST = max(LENGTHS)

# Sums of at most 729 terms of order one in float64 err below 1e-13.
ROUNDING = 1e-11

# z-bound of each Monte Carlo comparison below: two-sided false-alarm rate 2e-9.
Z = 6.0


class Chain(NamedTuple):
    log_initial: Tensor
    log_transition: Tensor
    log_emission: Tensor
    steps: Tensor


def random_chain(seed: int = 0) -> Chain:
    """Three sequences of 6, 4 and 1 steps; what stands at padding is noise, which nothing may look at."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    steps = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    transition = (2 * draw(STATES, STATES)).log_softmax(-1)
    return Chain(draw(STATES).log_softmax(-1), transition, 3 * draw(len(LENGTHS), LONGEST, STATES), steps)


def left_to_right() -> Chain:
    """A chain that starts in state 0 and never goes back: half of its probabilities are zero."""
    initial = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    transition = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.6, 0.4], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return random_chain()._replace(log_initial=initial.log(), log_transition=transition.log())


class Enumerated(NamedTuple):
    """Every path of one sequence with its probability given the observations."""

    paths: np.ndarray
    log_prior: np.ndarray
    log_joint: np.ndarray
    log_evidence: float

    @property
    def probs(self) -> np.ndarray:
        return np.exp(self.log_joint - self.log_evidence)


def enumerate_paths(chain: Chain, sequence: int) -> Enumerated:
    initial, transition = chain.log_initial.exp().numpy(), chain.log_transition.exp().numpy()
    density = chain.log_emission[sequence].exp().numpy()
    paths = np.array(list(itertools.product(range(STATES), repeat=LENGTHS[sequence])))
    prior, joint = np.ones(len(paths)), np.ones(len(paths))
    for row, path in enumerate(paths):
        for t, state in enumerate(path):
            prior[row] *= initial[state] if t == 0 else transition[path[t - 1], state]
            joint[row] *= density[t, state]
    with np.errstate(divide="ignore"):
        return Enumerated(paths, np.log(prior), np.log(prior * joint), math.log((prior * joint).sum()))


def padded(paths: np.ndarray) -> Tensor:
    blank = np.zeros((len(paths), LONGEST - paths.shape[1]), dtype=np.int64)
    return torch.from_numpy(np.concatenate([paths, blank], 1))


def posterior(chain: Chain) -> SmoothedMarkovChain:
    return SmoothedMarkovChain(forward_filter(*chain).log_filtered, chain.log_transition, chain.steps)


def one(chain: Chain, sequence: int) -> Chain:
    rows = slice(sequence, sequence + 1)
    return chain._replace(log_emission=chain.log_emission[rows], steps=chain.steps[rows])


chains = pytest.mark.parametrize("chain", [random_chain(0), random_chain(1), left_to_right()])


@chains
def test_evidence_is_the_sum_over_all_paths(chain: Chain) -> None:
    """Of each sequence, whatever stands at padding; the transposed transitions give another number."""
    found = forward_filter(*chain).log_evidence
    truth = [enumerate_paths(chain, s).log_evidence for s in range(len(LENGTHS))]
    assert found.tolist() == pytest.approx(truth, abs=ROUNDING)
    transposed = chain._replace(log_transition=chain.log_transition.mT)
    wrong = forward_filter(*transposed).log_evidence.tolist()
    assert wrong[:2] != pytest.approx(truth[:2], abs=1e-3)
    assert wrong[2] == pytest.approx(truth[2], abs=ROUNDING)  # one step has no transition


@chains
def test_marginals_and_pairs_are_sums_over_paths(chain: Chain) -> None:
    """Smoothed probabilities of states and of neighbours; the filtered ones, which see no future, differ."""
    filtered = forward_filter(*chain).log_filtered
    marginals = smooth(filtered, chain.log_transition, chain.steps)
    pairs = pair_probabilities(filtered, chain.log_transition, marginals)
    for s, length in enumerate(LENGTHS):
        truth = enumerate_paths(chain, s)
        one_hot = np.eye(STATES)[truth.paths]
        expected = np.einsum("p,ptk->tk", truth.probs, one_hot)
        expected_pairs = np.einsum("p,pti,ptj->tij", truth.probs, one_hot[:, :-1], one_hot[:, 1:])
        assert np.allclose(marginals[s, :length], expected, rtol=0, atol=ROUNDING)
        assert np.allclose(pairs[s, : length - 1], expected_pairs, rtol=0, atol=ROUNDING)
        assert not marginals[s, length:].any() and not pairs[s, length - 1 :].any()
        assert np.allclose(filtered[s, length - 1].exp(), expected[-1], rtol=0, atol=ROUNDING)
        if length > 1:
            assert not np.allclose(filtered[s, :length].exp(), expected, rtol=0, atol=1e-3)


@chains
def test_viterbi_finds_the_likeliest_path(chain: Chain) -> None:
    """At padding too, where a likely transition could choose the last state; a maximum per step is no path's."""
    found = most_likely_path(*chain)
    for s, length in enumerate(LENGTHS):
        truth = enumerate_paths(chain, s)
        assert found[s, :length].tolist() == truth.paths[truth.log_joint.argmax()].tolist()
        assert not found[s, length:].any()
    step_by_step = (chain.log_emission.argmax(-1) * chain.steps)[0]
    assert found[0].tolist() != step_by_step.tolist()


@chains
def test_probability_of_a_path_before_and_after_the_observations(chain: Chain) -> None:
    """Every one of the paths, of all sequences, and values at padding change nothing."""
    prior, q = MarkovChain(chain.log_initial, chain.log_transition, chain.steps), posterior(chain)
    for s, length in enumerate(LENGTHS):
        truth = enumerate_paths(chain, s)
        value = padded(truth.paths)[:, None].expand(-1, len(LENGTHS), -1)
        possible = np.isfinite(truth.log_joint)
        found, found_prior = q.log_prob(value)[:, s].numpy(), prior.log_prob(value)[:, s].numpy()
        assert np.allclose(found_prior[possible], truth.log_prior[possible], rtol=0, atol=ROUNDING)
        log_probs = truth.log_joint - truth.log_evidence
        assert np.allclose(found[possible], log_probs[possible], rtol=0, atol=ROUNDING)
        assert (np.exp(found[~possible]) == 0).all() and (np.exp(found_prior[~possible]) == 0).all()
        if possible.sum() > 1:
            assert not np.allclose(found[possible], truth.log_prior[possible], rtol=0, atol=1e-3)
        other = torch.where(torch.arange(LONGEST) < length, value, STATES - 1)
        assert np.array_equal(found[possible], q.log_prob(other)[:, s].numpy()[possible])


@chains
def test_entropy_and_expectations_are_sums_over_paths(chain: Chain) -> None:
    """Entropy of the posterior; its KL to another one; KL and expected log prior of independent steps."""
    q, prior = posterior(chain), MarkovChain(chain.log_initial, chain.log_transition, chain.steps)
    # The same zeros, so that the divergence is finite.
    other = chain._replace(log_emission=0.5 * chain.log_emission + 0.3)
    steps = dist.Categorical(logits=random_chain(7).log_emission)
    independent = steps.mask(chain.steps).to_event(1)
    for s in range(len(LENGTHS)):
        truth, also = enumerate_paths(chain, s), enumerate_paths(other, s)
        probs = truth.probs
        seen = probs > 0
        # Paths without probability left out: the other chain has the same.
        log_probs, log_other = (each.log_joint[seen] - each.log_evidence for each in (truth, also))
        entropy = -(probs[seen] * log_probs).sum()
        assert float(q.entropy()[s]) == pytest.approx(entropy, abs=ROUNDING)
        divergence = (probs[seen] * (log_probs - log_other)).sum()
        assert float(kl_divergence(q, posterior(other))[s]) == pytest.approx(divergence, abs=ROUNDING)
        assert float(kl_divergence(q, q)[s]) == pytest.approx(0, abs=ROUNDING)
        if not seen.all():
            continue  # independent steps put mass on paths that cannot be: infinite, see below
        weights = np.prod([steps.probs[s, t].numpy()[truth.paths[:, t]] for t in range(LENGTHS[s])], 0)
        gap = (weights * (np.log(weights) - log_probs)).sum()
        assert float(kl_divergence(independent, q)[s]) == pytest.approx(gap, abs=ROUNDING)
        assert float(prior.expected_log_prob(steps.probs)[s]) == pytest.approx(
            (weights * truth.log_prior).sum(), abs=ROUNDING
        )
        assert gap > 1e-3 or LENGTHS[s] == 1


def test_what_cannot_be_is_minus_infinity_and_never_nan() -> None:
    """Independent steps against a chain that never goes back; observations that no state can have."""
    chain = left_to_right()
    steps = dist.Categorical(logits=torch.zeros_like(chain.log_emission)).to_event(1)
    assert float(kl_divergence(steps, posterior(chain))[0]) > 1e300
    impossible = chain.log_emission.clone()
    impossible[0, 2] = -math.inf
    found = forward_filter(*chain._replace(log_emission=impossible)).log_evidence
    assert float(found[0]) == -math.inf
    assert torch.isfinite(found[1:]).all()


@pytest.mark.parametrize("after", [False, True])
def test_draws_have_the_paths_probabilities(after: bool) -> None:
    """States and neighbours of 20,000 draws within six standard errors, in 105 comparisons (false alarms 2e-7 in all).

    The draws of the prior fail the test of the posterior's, and the other way round.
    """
    chain, draws = random_chain(), 20_000
    q, prior = posterior(chain), MarkovChain(chain.log_initial, chain.log_transition, chain.steps)
    value = (q if after else prior).sample((draws,))
    assert value.shape == (draws, len(LENGTHS), LONGEST) and value.dtype == torch.int64
    assert not value[:, ~chain.steps].any()
    scores = {"right": 0.0, "wrong": 0.0}
    for s, length in enumerate(LENGTHS):
        truth = enumerate_paths(chain, s)
        one_hot = np.eye(STATES)[truth.paths]
        drawn = np.eye(STATES)[value[:, s, :length].numpy()]
        for kind, log_weights in (("after", truth.log_joint - truth.log_evidence), ("before", truth.log_prior)):
            key = "right" if (kind == "after") == after else "wrong"
            weights = np.exp(log_weights)
            for formula, arguments, means in (
                ("p,ptk->tk", (one_hot,), drawn.mean(0)),
                (
                    "p,pti,ptj->tij",
                    (one_hot[:, :-1], one_hot[:, 1:]),
                    np.einsum("pti,ptj->tij", drawn[:, :-1], drawn[:, 1:]) / draws,
                ),
            ):
                expected = np.einsum(formula, weights, *arguments)
                error = np.sqrt((expected * (1 - expected)).clip(1 / draws) / draws)
                scores[key] = max(scores[key], np.abs((means - expected) / error).max(initial=0.0))
    assert scores["right"] <= Z < scores["wrong"]


def test_distributions_grow_particle_dimensions_inside_plates() -> None:
    """Expanded by a plate of particles, draws and log probabilities have its dimension, and a replay agrees."""
    chain = random_chain()
    base = [MarkovChain(chain.log_initial, chain.log_transition, chain.steps), posterior(chain)]
    base.append(PaddedSteps(dist.Poisson(chain.log_emission.exp()).to_event(1), chain.steps))
    for fn in base:
        with pyro.plate("particles", 5, dim=-2), pyro.plate("data", len(LENGTHS), dim=-1):
            value = pyro.sample("z", fn)
        assert value.shape == (5, len(LENGTHS), *fn.event_shape)
        expanded = fn.expand(torch.Size([5, len(LENGTHS)]))
        assert expanded.batch_shape == (5, len(LENGTHS)) and expanded.event_shape == fn.event_shape
        assert torch.allclose(expanded.log_prob(value), fn.log_prob(value), rtol=1e-12)
        assert expanded.sample().shape == value.shape
    for fn in base[:2]:
        with pytest.raises(ValueError, match="support"):
            fn.log_prob(torch.full((len(LENGTHS), LONGEST), STATES))


def test_padded_steps_are_zero_and_count_for_nothing() -> None:
    """Draws, means and log densities; without the mask the sum is another."""
    chain = random_chain()
    steps = dist.Normal(chain.log_emission, 1.0).to_event(1)
    fn = PaddedSteps(steps, chain.steps)
    value = fn.rsample((4,))
    assert not value[:, ~chain.steps].any() and not fn.mean[~chain.steps].any() and not fn.variance[~chain.steps].any()
    per_step = -0.5 * ((value - chain.log_emission).square() + math.log(2 * math.pi)).sum(-1)
    assert torch.allclose(fn.log_prob(value), (per_step * chain.steps).sum(-1), rtol=1e-12)
    assert not torch.allclose(fn.log_prob(value), per_step.sum(-1), rtol=1e-3)


def test_gradient_of_the_evidence_is_the_expected_counts() -> None:
    """Fisher's identity: ∂ log p(x) / ∂ log p(x_t given z_t = k) = p(z_t = k given x); so too for transitions."""
    chain = random_chain()
    leaves = [tensor.clone().requires_grad_() for tensor in chain[:3]]
    forward_filter(*leaves, chain.steps).log_evidence.sum().backward()  # type: ignore[no-untyped-call]
    filtered = forward_filter(*chain).log_filtered
    marginals = smooth(filtered, chain.log_transition, chain.steps)
    counts = pair_probabilities(filtered, chain.log_transition, marginals).sum((0, 1))
    for leaf, expected in zip(leaves, (marginals[:, 0].sum(0), counts, marginals), strict=True):
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, expected, rtol=0, atol=ROUNDING)
        assert not torch.allclose(leaf.grad, 1.001 * expected, rtol=0, atol=ROUNDING)


def test_stationary_distribution_stays_under_the_transitions() -> None:
    """Against the null space that NumPy finds; and a chain that leaves its states once in 1e200 steps.

    There rates a and b between two states give (b, a) / (a + b), while I - A is zero in float64.
    """
    for states in (1, 2, 5):
        transition = torch.randn(states, states, dtype=torch.float64).log_softmax(-1)
        found = log_stationary(transition).exp().numpy()
        matrix = transition.exp().numpy()
        _, _, null = np.linalg.svd(matrix.T - np.eye(states))
        assert np.allclose(found, null[-1] / null[-1].sum(), rtol=0, atol=ROUNDING)
        assert states == 1 or not np.allclose(found, 1 / states, rtol=0, atol=1e-3)
    rare = torch.tensor([[0.0, -460.0], [-461.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([-1.0, 0.0], dtype=torch.float64).softmax(-1)
    assert torch.allclose(log_stationary(rare).exp(), expected, rtol=ROUNDING, atol=0)
    assert not (torch.eye(2, dtype=torch.float64) - rare.exp()).diagonal().any()


@pytest.mark.slow
def test_nothing_underflows_over_a_hundred_thousand_steps() -> None:
    """Against a scaled recursion in extended precision, 1e-11 nats per step; plain products are zero after 2,000."""
    length = 100_000
    generator = torch.Generator().manual_seed(3)
    emission = torch.randn(1, length, STATES, generator=generator, dtype=torch.float64) * 3 - 5
    chain = random_chain()._replace(log_emission=emission, steps=torch.ones(1, length, dtype=torch.bool))
    filtered = forward_filter(*chain)
    density, transition = np.exp(emission[0].numpy().astype(np.longdouble)), chain.log_transition.exp().numpy()
    alpha, total, product = chain.log_initial.exp().numpy().astype(np.longdouble), np.longdouble(0), 1.0
    for t in range(length):
        alpha = (alpha @ transition if t else alpha) * density[t]
        total += np.log(alpha.sum())
        product *= float(alpha.sum()) if t < 2000 else 1.0
        alpha = alpha / alpha.sum()
    assert abs(float(filtered.log_evidence[0]) - float(total)) <= 1e-11 * length
    assert product == 0.0
    q = SmoothedMarkovChain(filtered.log_filtered, chain.log_transition, chain.steps)
    marginals = q.probs
    assert torch.allclose(marginals.sum(-1), torch.ones(1, length, dtype=torch.float64), rtol=0, atol=1e-9)
    # The chain forgets: marginals in the middle are those of the 200 steps about them, to 1e-9.
    middle = slice(50_000, 50_200)
    part = chain._replace(log_emission=emission[:, middle], steps=chain.steps[:, middle])
    alone = smooth(forward_filter(*part).log_filtered, chain.log_transition, part.steps)
    assert torch.allclose(marginals[0, 50_100], alone[0, 100], rtol=0, atol=1e-9)
    assert not torch.allclose(marginals[0, 50_101], alone[0, 100], rtol=0, atol=1e-9)
    likeliest, drawn = most_likely_path(*chain), q.sample()
    assert float(q.log_prob(likeliest)) > float(q.log_prob(drawn)) > -length
