"""Compiled recursions against the same in plain torch, well-behaved and hostile; and what no short chain can show."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from elbozoo.models import get_entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.distributions.markov_chain import MarkovChain, SmoothedMarkovChain
from elbozoo.models.numerics import compiled, kalman, markov_chains, normals
from elbozoo.models.numerics.covariances import KINDS
from elbozoo.models.numerics.kalman import StateSpace

pytest.importorskip("numba")

# Relative to the largest entry: what is promised of every fast path. Both sides keep ten digits or more.
EQUAL = 1e-8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def distance(one: Tensor, other: Tensor, least: float = 1e-300) -> float:
    """Largest difference, relative to the largest finite entry or ``least``; infinite where one alone is not finite."""
    one, other = one.detach().double(), other.detach().double()
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()) or not torch.equal(one[~finite], other[~finite]):
        return math.inf
    scale = float(one[finite].abs().max()) if finite.any() else 1.0
    return float((one - other)[finite].abs().max()) / max(scale, least) if finite.any() else 0.0


def furthest(ones: Any, others: Any, least: float = 1e-300) -> float:
    return max(distance(one, other, least) for one, other in zip(ones, others, strict=True))


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Without the compiled loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "is_available", lambda: False)
        yield


# Hidden Markov chains ------------------------------------------------------------------------------------------------

Chain = tuple[Tensor, Tensor, Tensor, Tensor]


def chain(states: int = 4, lengths: tuple[int, ...] = (40, 23, 1), scale: float = 3.0, seed: int = 0) -> Chain:
    """A chain that stays for a while, and log emissions with noise at padding."""
    transition = (draw(states, states, seed=seed) + 2 * torch.eye(states)).log_softmax(-1)
    steps = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    emission = scale * draw(len(lengths), max(lengths), states, seed=seed + 1)
    return draw(states, seed=seed + 2).log_softmax(-1), transition, emission, steps


def with_transition(transition: Tensor) -> Chain:
    initial, _, emission, steps = chain(len(transition))
    return initial, transition.double(), emission, steps


def rare(least: float) -> Chain:
    """Two groups of states, between which a move has log probability ``least``; the data demand one."""
    transition = torch.full((4, 4), least).double()
    transition[:2, :2] = transition[2:, 2:] = math.log(0.5)
    initial, transition, emission, steps = with_transition(transition)
    emission = emission.clone()
    emission[:, :5, 2:] -= 5000
    emission[:, 5:, :2] -= 5000
    return initial, transition, emission, steps


FORWARD = [[0.5, 0.25, 0.25], [0, 0.75, 0.25], [0, 0, 1]]
UNUSED = [[0.75, 0.25, 0], [0.25, 0.75, 0], [0.5, 0.5, 0]]


def left_to_right() -> Chain:
    _, transition, emission, steps = with_transition(torch.tensor(FORWARD).double().log())
    return torch.tensor([0.0, -math.inf, -math.inf]).double(), transition, emission, steps


def with_emission(change: Callable[[Tensor], Any]) -> Chain:
    initial, transition, emission, steps = chain()
    change(emission)
    return initial, transition, emission, steps


def barred(emission: Tensor) -> None:
    emission[0, 7, :3] = -math.inf
    emission[1, :, 2] = -math.inf


def impossible(emission: Tensor) -> None:
    emission[1, 5] = -math.inf


CHAINS = {
    "ordinary": chain(),
    "one state": chain(1),
    "many states": chain(17, (9, 4)),
    "one step": chain(3, (1,)),
    "ragged, some empty": chain(3, (12, 0, 5)),
    "sharp emissions": chain(scale=3e4),
    "flat emissions": chain(scale=0.0),
    "far outlier": with_emission(lambda emission: emission[:, 3].sub_(1e12)),
    "large offset": with_emission(lambda emission: emission.add_(1e6)),
    "barred states": with_emission(barred),
    "impossible": with_emission(impossible),
    "never back": left_to_right(),
    "nearly deterministic": rare(-30.0),
    "rarer than any number": rare(-2000.0),
    "certain": with_transition(torch.eye(4).log()),
    "an unused state": with_transition(torch.tensor(UNUSED).double().log()),
}
chains = pytest.mark.parametrize("case", CHAINS)

# Plain torch's gradient is not a number at minus infinity.
WITHOUT_PLAIN_GRADIENT = {"impossible", "certain", "never back", "barred states", "an unused state"}


def observed(emission: Tensor, steps: Tensor) -> Tensor:
    return torch.where(steps[..., None], emission, 0.0)


def everything(case: Chain) -> list[Tensor]:
    """Filter, evidence, smoother and E step: logs and probabilities, which are of order one or larger."""
    _, transition, _, steps = case
    filtered = markov_chains.forward_filter(*case)
    smoothed = markov_chains.smooth(filtered.log_filtered, transition, steps)
    return [*filtered, filtered.log_evidence, smoothed, *markov_chains.expect(*case)]


@chains
def test_hidden_chains_are_those_of_plain_torch(case: str) -> None:
    """Sequence by sequence and step by step; and the likeliest path, but where paths tie.

    Negative control: log emissions that are turned by one state give other figures, where there is a second state.
    """
    initial, transition, emission, steps = CHAINS[case]
    with plain_torch():
        reference, path = everything(CHAINS[case]), markov_chains.most_likely_path(*CHAINS[case])
    assert furthest(everything(CHAINS[case]), reference, 1.0) <= EQUAL
    if len(initial) > 1 and case != "flat emissions":
        turned = everything((initial, transition, emission.roll(1, -1), steps))
        assert furthest(turned, reference, 1.0) > EQUAL
    found = markov_chains.most_likely_path(*CHAINS[case])
    assert torch.equal(found, path) or case in ("impossible", "flat emissions")
    assert not found[~steps].any()


@pytest.mark.parametrize("case", sorted(CHAINS.keys() - WITHOUT_PLAIN_GRADIENT))
def test_gradients_of_hidden_chains_are_those_of_plain_torch(case: str) -> None:
    """Of the evidence alone, and of it with the filtered log probabilities, as the exact posterior needs them."""
    initial, transition, emission, steps = CHAINS[case]

    def slopes(weight: float) -> tuple[Tensor, ...]:
        leaves = [v.clone().requires_grad_() for v in (initial, transition, emission)]
        found = markov_chains.forward_filter(*leaves, steps)
        by_filtered = weight * draw(*emission.shape, seed=5) * steps[..., None]
        value = found.log_evidence.sum() + (by_filtered * found.log_filtered).sum()
        return torch.autograd.grad(value, leaves, materialize_grads=True)

    for weight in (0.0, 1.0):
        with plain_torch():
            reference = slopes(weight)
        assert furthest(slopes(weight), reference, 1.0) <= EQUAL
    if len(initial) > 1 and case != "flat emissions":
        assert furthest(slopes(0.9), reference, 1.0) > EQUAL


def test_gradients_at_minus_infinity_are_numbers() -> None:
    """The marginals of the posterior, Fisher's identity, in a chain whose transitions are partly zero (1e-12)."""
    for case in ("never back", "certain", "barred states"):
        initial, transition, emission, steps = CHAINS[case]
        leaf = emission.clone().requires_grad_()
        evidence = markov_chains.forward_filter(initial, transition, leaf, steps).log_evidence
        (slope,) = torch.autograd.grad(evidence.sum(), leaf)
        with plain_torch():
            marginals = markov_chains.expect(*CHAINS[case]).marginals
        assert float((slope - marginals).abs().max()) <= 1e-12
        assert float((slope - 1.001 * marginals).abs().max()) > 1e-12


def test_second_derivatives() -> None:
    """Through the backward pass, by finite differences (torch's gradgradcheck, 1e-5), and of the smoother once."""
    initial, transition, emission, steps = chain(2, (4, 2))
    everywhere = torch.ones_like(steps)
    leaves = [v.requires_grad_() for v in (initial, transition, emission)]

    def log_evidence(*values: Tensor) -> Tensor:
        return markov_chains.forward_filter(*values, everywhere).log_evidence

    assert torch.autograd.gradgradcheck(log_evidence, leaves)

    def marginals(first: Tensor, second: Tensor) -> Tensor:
        return markov_chains.smooth(first.log_softmax(-1), second.log_softmax(-1), everywhere)

    assert torch.autograd.gradcheck(marginals, (emission, transition))
    space, x, mask = SPACES["gaps"]

    def by_noise(noise: Tensor, transition: Tensor) -> Tensor:
        moved = space._replace(noise=noise, transition=transition)
        return kalman.kalman_filter(x[:, :4], moved, mask[:, :4]).log_density

    assert torch.autograd.gradgradcheck(
        by_noise, (space.noise.clone().requires_grad_(), space.transition.clone().requires_grad_())
    )


def test_nothing_underflows_over_a_million_steps() -> None:
    """Evidence of 1000 times the same 1000 steps, from powers of the product of their matrices in NumPy.

    1e-9 relative: a million increments, each right to 1e-16, and twenty squarings. Marginals sum to one (1e-9) and
    are those of 100,000 steps later (1e-9); transitions sum to a million less one. By
    numbers, and where a transition is barred by logarithms.
    """
    period, repeats = 1000, 1000
    for back in (0.0, 0.05):
        # Rows and columns sum to one: the uniform distribution is stationary.
        first_row = [0.875, 0.125 - back, back]
        transition = torch.tensor([first_row, first_row[-1:] + first_row[:2], first_row[1:] + first_row[:1]]).double()
        transition = (transition / transition.sum(-1, keepdim=True)).log()
        initial, emission = torch.full((3,), 1 / 3).double().log(), 4 * draw(1, period, 3) - 7
        product, log_scale = np.eye(3), 0.0
        for row in emission[0].numpy():
            product = product @ (transition.exp().numpy() * np.exp(row))
            log_scale += math.log(product.sum())
            product /= product.sum()
        power, log_power = np.eye(3), 0.0
        for digit in bin(repeats)[2:]:
            power, log_power = power @ power, 2 * log_power
            if digit == "1":
                power, log_power = power @ product, log_power + log_scale
            log_power += math.log(power.sum())
            power /= power.sum()
        # From a stationary start the first step may take a transition like all others.
        truth = log_power + math.log((initial.exp().numpy() @ power).sum())
        x, steps = emission.repeat(1, repeats, 1), torch.ones(1, period * repeats, dtype=torch.bool)
        log_evidence, marginals, transitions = markov_chains.expect(initial, transition, x, steps)
        increments = markov_chains.forward_filter(initial, transition, x, steps).log_increments
        for found in (log_evidence, increments.sum(-1)):
            assert abs(float(found) / truth - 1) <= 1e-9
            assert abs(float(found) / (truth + 1e-2) - 1) > 1e-9
        assert float((marginals.sum(-1) - 1).abs().max()) <= 1e-9
        assert abs(float(transitions.sum()) / (period * repeats - 1) - 1) <= 1e-9
        middle = marginals[0, 400_000:401_000]
        assert float((middle - marginals[0, 500_000:501_000]).abs().max()) <= 1e-9
        assert float((middle - marginals[0, 500_001:501_001]).abs().max()) > 1e-9
        assert math.exp(truth) == 0.0


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """As on a machine with so many cores, of which torch uses all, and with threads that cost nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "WORK_OF_A_THREAD", 1)
        patch.setattr(torch, "get_num_threads", lambda: number)
        patch.setattr(compiled.os, "cpu_count", lambda: number)
        yield


def from_both_ends(case: Chain, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], int]:
    """E step of one sequence with two threads, and how often both passes were taken at the same time."""
    calls: list[int] = []
    taken = compiled.at_the_same_time
    with monkeypatch.context() as patch, threads(2):
        patch.setattr(markov_chains, "WORK_FROM_BOTH_ENDS", 0)
        patch.setattr(markov_chains, "STATES_FROM_BOTH_ENDS", 1)
        patch.setattr(compiled, "at_the_same_time", lambda *both: calls.append(len(both)) or taken(*both))
        found = list(markov_chains.expect(*case))
    return found, len(calls)


@pytest.mark.parametrize("case", sorted(CHAINS.keys() - {"never back", "rarer than any number", "certain"}))
def test_one_sequence_from_both_ends(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes at the same time give what one after the other gives: to 1e-10, as sums are taken in another order.

    Negative control: log emissions that are turned by one state, where there is a second one that can tell.
    """
    initial, transition, emission, steps = CHAINS[case]
    for s in range(len(emission)):
        one = initial, transition, emission[s : s + 1], steps[s : s + 1]
        reference = list(markov_chains.expect(*one))
        found, taken = from_both_ends(one, monkeypatch)
        assert taken == int(bool(steps[s].any()) and float(transition.min()) >= math.log(markov_chains.RARE))
        assert furthest(found, reference, 1.0) <= 1e-10
        if len(initial) > 1 and case != "flat emissions" and steps[s].any() and reference[0].isfinite().all():
            turned, _ = from_both_ends((initial, transition, emission[s : s + 1].roll(1, -1), one[3]), monkeypatch)
            assert furthest(turned, reference, 1.0) > 1e-10


def test_both_ends_of_a_million_steps_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing underflows, and every figure is that of one pass after the other, to 1e-10; blocks of steps all count."""
    case = chain(3, (1_000_000,))
    reference = list(markov_chains.expect(*case))
    found, taken = from_both_ends(case, monkeypatch)
    assert taken == 1
    assert furthest(found, reference, 1.0) <= 1e-10
    assert float((found[1].sum(-1) - 1).abs().max()) <= 1e-10
    # Negative control: one step of a million that says something else.
    case[2][0, 500_000] = case[2][0, 500_000].roll(1)
    assert furthest(from_both_ends(case, monkeypatch)[0], reference, 1.0) > 1e-10


def paths(case: Chain, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Three draws of each sequence's path before the data and after them."""
    initial, transition, _, steps = case
    log_filtered = markov_chains.forward_filter(*case).log_filtered.to(dtype)
    before = MarkovChain(initial.to(dtype), transition.to(dtype), steps, validate_args=False)
    after = SmoothedMarkovChain(log_filtered, transition.to(dtype), steps, validate_args=False)
    with isolated(seed):
        return [chain.sample((3,)) for chain in (before, after)]


@chains
def test_paths_are_those_of_plain_torch(case: str) -> None:
    """The same seed draws the same path, whatever runs the steps; another seed draws another one."""
    with plain_torch():
        reference = paths(CHAINS[case], 0)
    assert all(torch.equal(one, two) for one, two in zip(paths(CHAINS[case], 0), reference, strict=True))
    with threads(3):
        assert all(torch.equal(one, two) for one, two in zip(paths(CHAINS[case], 0), reference, strict=True))
    if case in ("ordinary", "many states", "flat emissions"):
        assert not torch.equal(paths(CHAINS[case], 1)[0], reference[0])
        assert not torch.equal(paths(CHAINS["flat emissions"], 1)[1], paths(CHAINS["flat emissions"], 0)[1])


def test_paths_in_single_precision_are_those_of_plain_torch() -> None:
    """Before the data to the bit; after them, where float32 rounds, in all but 1 of 1000 of the steps."""
    case = chain(4, (3000,), scale=1.0)
    with plain_torch():
        reference = paths(case, 0, torch.float32)
    before, after = paths(case, 0, torch.float32)
    assert torch.equal(before, reference[0])
    assert float((after != reference[1]).double().mean()) <= 1e-3
    assert float((paths(case, 1, torch.float32)[1] != reference[1]).double().mean()) > 1e-3


# State spaces --------------------------------------------------------------------------------------------------------

Space = tuple[StateSpace, Tensor, Tensor]


def space(
    states: int = 3,
    columns: int = 2,
    lengths: tuple[int, ...] = (60, 31, 1),
    missing: float = 0.0,
    diffuse: bool = False,
    **changes: Any,
) -> Space:
    """A stable chain, standard normal data, and gaps; ``changes`` replace fields of the chain."""

    def covariance(size: int, seed: int) -> Tensor:
        factor = draw(size, size, seed=seed)
        return factor @ factor.mT / size + 0.3 * torch.eye(size)

    turn = torch.linalg.qr(draw(states, states, seed=3)).Q
    chain = StateSpace(
        draw(states, seed=4),
        covariance(states, 5),
        0.6 * turn + 0.3 * torch.eye(states),
        covariance(states, 6),
        draw(columns, states, seed=7),
        draw(columns, seed=8),
        draw(columns, seed=9).exp(),
        diffuse,
    )
    steps = max(lengths)
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]
    x = 2 * draw(len(lengths), steps, columns, seed=10)
    gaps = torch.from_numpy(np.random.default_rng(11).random(x.shape) < missing)
    return chain._replace(**changes), x.masked_fill(gaps | ~mask[..., None], math.nan), mask


def moved(case: Space, offset: float, scale: float) -> Space:
    """The same data and model in other units."""
    chain, x, mask = case
    return (
        chain._replace(loading=scale * chain.loading, loc=scale * chain.loc + offset, noise=scale**2 * chain.noise),
        scale * x + offset,
        mask,
    )


def outlier(case: Space) -> Space:
    x = case[1].clone()
    x[0, 20] = 1e8
    return case[0], x, case[2]


def constant(case: Space) -> Space:
    return case[0], torch.where(case[1].isnan(), case[1], 1.0), case[2]


SPACES = {
    "ordinary": space(),
    "gaps": space(missing=0.3),
    "flat start": space(2, 3, diffuse=True),
    "flat start, gaps": space(2, 3, missing=0.3, diffuse=True),
    "one state": space(1, 1, (50, 2), diffuse=True),
    "one step": space(lengths=(1,)),
    "more states than columns": space(8, 1, (90,)),
    "offset and tiny scale": moved(space(), 1e6, 1e-3),
    "huge scale": moved(space(), 0.0, 1e9),
    "far outlier": outlier(space()),
    "constant data": constant(space()),
    "nearly no noise": space(noise=torch.tensor([1e-8, 1e-6]).double()),
    "a wide start": space(initial_covariance=1e6 * torch.eye(3).double()),
    "hardly moves": space(transition=torch.eye(3).double(), process=1e-8 * torch.eye(3).double()),
    "nothing seen": space(missing=1.1),
}
spaces = pytest.mark.parametrize("case", SPACES)


def given(case: Space) -> list[Tensor]:
    """Arguments of the filter's operation."""
    chain, x, mask = case
    seen = ~x.isnan()
    centred = torch.where(seen, x - chain.loc, 0.0)
    return [centred, seen, mask, *kalman._start(x, chain), chain.transition, chain.process, chain.loading, chain.noise]


@spaces
def test_state_spaces_are_those_of_plain_torch(case: str) -> None:
    """Filter, posterior chain and smoother, array by array; moved data are another matter."""
    chain, x, mask = SPACES[case]
    reference = kalman.filter_by_torch(*given(SPACES[case]))
    assert furthest(kalman._kalman(*given(SPACES[case])), reference) <= EQUAL
    if case != "nothing seen":
        other = given(SPACES[case])
        other[0] = other[0] * 1.001
        assert furthest(kalman._kalman(*other), reference) > EQUAL
    filtered = kalman.kalman_filter(x, chain, mask)
    gain, means, scale_tril = kalman._kernels_by_torch(filtered, chain, mask)
    kernels = kalman.backward_kernels(filtered, chain, mask)
    real = mask[..., None, None]
    for fast, slow in ((kernels.gain, gain), (kernels.scale_tril, scale_tril)):
        assert distance(fast * real, slow * real) <= EQUAL
    if not chain.diffuse:
        assert distance(kernels.shift, means[..., 0] * mask[..., None]) <= EQUAL
    first = 1 if chain.diffuse else 0
    moments, slow = (run(*kernels[:4], first) for run in (kalman._smooth, kalman._smooth_by_torch))
    for one, other in list(zip(moments, slow, strict=True))[: 4 if first else 2]:
        if one.shape[1] > first:
            assert distance(one[:, first:], other[:, first:]) <= EQUAL
    if not first and x.shape[1] > 1:
        assert distance(moments[3], slow[3]) <= EQUAL


@spaces
def test_gradients_of_state_spaces_are_those_of_plain_torch(case: str) -> None:
    """By every argument, for slopes by every result."""
    arguments = given(SPACES[case])

    def slopes(run: Callable[..., Any], factor: float = 1.0) -> list[Tensor]:
        leaves = [v.clone().requires_grad_() if v.is_floating_point() else v for v in arguments]
        results = run(*leaves)
        value = sum((factor * draw(*r.shape, seed=s) * r).sum() for s, r in enumerate(results))
        found = torch.autograd.grad(value, [v for v in leaves if v.requires_grad], materialize_grads=True)
        # Of what is symmetric only the symmetric part of a slope counts.
        return [(v + v.mT) / 2 if n in (2, 4) else v for n, v in enumerate(found)]

    reference = slopes(kalman.filter_by_torch)
    assert furthest(slopes(kalman._kalman), reference) <= EQUAL
    assert furthest(slopes(kalman._kalman, 1.001), reference) > EQUAL


@pytest.mark.parametrize(("states", "columns"), [(2, 2), (4, 3), (8, 3)])
def test_a_settled_covariance_is_the_computed_one_until_a_value_is_missing(states: int, columns: int) -> None:
    """Two gaps after the chain has settled: the covariances move, settle again, and are plain torch's throughout."""
    case = space(states, columns, (700,))
    case[1][0, 400, 0] = case[1][0, 405] = math.nan
    reference = kalman.filter_by_torch(*given(case))
    found = kalman._kalman(*given(case))
    assert furthest(found, reference) <= EQUAL
    covariance = found[3][0]
    for before in (399, 699):
        earlier = covariance[before - 32 : before]
        assert any(torch.equal(covariance[before], one) for one in earlier)
    assert distance(covariance[400], covariance[399]) > 1e-3 and distance(covariance[405], covariance[404]) > 1e-3
    assert distance(covariance[450], covariance[399]) <= EQUAL
    kernels = kalman.backward_kernels(kalman.kalman_filter(case[1], case[0], case[2]), case[0], case[2])
    moments, slow = kalman._smooth(*kernels[:4], 0), kalman._smooth_by_torch(*kernels[:4], 0)
    assert furthest((moments[0], moments[1], moments[3]), (slow[0], slow[1], slow[3])) <= EQUAL


def test_a_chain_that_settles_slowly_is_not_cut_short() -> None:
    """A state that forgets in 10,000 steps: the stationary covariance after 60,000 of them, by its closed form.

    With a = 1 - 1e-4 and all values missing, P = a² P + q ends at q / (1 - a²); after t steps a²ᵗ of the way is left,
    6e-6 of it here. To 1e-10 relative: rounding of 1e-16 a step, of which 5000 are remembered.
    """
    forget, process, steps = 1 - 1e-4, 1e-3, 60_000
    one = torch.ones(1, 1).double()
    chain = StateSpace(
        torch.zeros(1).double(), 1e-6 * one, forget * one, process * one, one, torch.zeros(1).double(), one[0], False
    )
    x = torch.full((1, steps, 1), math.nan).double()
    found = kalman.kalman_filter(x, chain, torch.ones(1, steps, dtype=torch.bool)).covariance[0, -1, 0, 0]
    limit = process / (1 - forget**2)
    truth = limit + forget ** (2 * (steps - 1)) * (1e-6 - limit)
    assert abs(float(found) / truth - 1) <= 1e-10
    assert abs(limit / truth - 1) > 1e-10


def test_a_chain_that_explodes_is_refused() -> None:
    chain, x, mask = space(1, 1, (800,), missing=1.1, transition=torch.full((1, 1), 3.0).double())
    with pytest.raises(torch.linalg.LinAlgError, match=r"sequence 1, step 3\d\d .*not positive definite"):
        kalman.kalman_filter(x, chain, mask)
    assert kalman.kalman_filter(x[:, :200], chain, mask[:, :200]).log_density.isfinite().all()


# Normals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1e6, 1e-3), (0.0, 1e-9), (0.0, 1e9)])
@pytest.mark.parametrize("full", [False, True])
def test_densities_and_moments_of_rows(full: bool, offset: float, scale: float) -> None:
    """SciPy's densities (1e-8), and moments in NumPy's extended precision; 1000 rows, an outlier, one empty state."""
    rows = offset + scale * draw(1000, 3)
    rows[17] = offset + 1e4 * scale
    rows[40:60] = rows[39]
    means, weights = offset + scale * draw(4, 3, seed=1), draw(1000, 4, seed=2).softmax(-1)
    weights[:, 3] = 0.0
    factors = scale * (torch.linalg.qr(draw(4, 3, 3, seed=3)).R.mT + 0.0)
    factors = factors * factors.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    spread = factors if full else scale * draw(4, 3, seed=4).exp()
    found = normals.log_density(rows, means, spread).numpy()
    covariances = factors @ factors.mT if full else torch.diag_embed(spread.square())
    kind = KINDS["full" if full else "diagonal"]
    assert distance(torch.from_numpy(found), kind.log_density(rows, means, spread)) <= EQUAL
    for k in range(4):
        # Absolute below 1: SciPy works through eigenvalues, 1e-8 of the largest squares.
        normal = stats.multivariate_normal((means[k] - offset) / scale, covariances[k] / scale**2)
        truth = normal.logpdf((rows.numpy() - offset) / scale) - 3 * math.log(scale)
        room = 1e-6 if offset else EQUAL  # at 1e6 a float64 carries 1e-10, 1e-7 of the spread
        assert np.abs(found[:, k] / truth - 1).max() <= room
        assert np.abs(found[:, k] / (truth + 0.01) - 1).max() > room
    sums, squares = normals.moments(rows, means, weights, full)
    residual = rows.numpy().astype(np.longdouble)[:, None] - means.numpy()
    weighed = weights.numpy()[..., None] * residual
    truth = np.einsum("nki,nkj->kij", weighed, residual) if full else (weighed * residual).sum(0)
    for one, exact in ((sums, weighed.sum(0)), (squares, truth)):
        other = torch.from_numpy(exact.astype(float))
        assert distance(one, other) <= EQUAL < distance(one, 1.001 * other)
        assert not one[3].any()


def sequences(kind: str, emission: str) -> tuple[Tensor, Any]:
    """Four sequences of three states, what befalls their rows, and a model that starts on them."""
    entry = get_entry("hidden-markov-model")
    x, _ = entry.example(2, seed=1, states=3, emission=emission).simulate(4, seed=2, steps=50)
    rows = x[..., 1:]
    if kind == "offset":
        rows = 1e-3 * rows + 1e6
    if kind == "tiny and huge":
        rows = rows * torch.tensor([1e-100, 1e100], dtype=torch.float64)
    if kind == "outlier":
        rows[0, 7] = 1e4
    if kind == "duplicates":
        rows[1:3] = rows[0, 0]
    x = torch.cat([x[..., :1], rows], -1)
    model = entry.from_data(x, states=3, emission=emission)
    if kind == "empty":
        with torch.no_grad():
            model.emission.means[1] += 1e3 * model.emission.unit
    return x, model


def statistics_of(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Statistics of an E step, in the columns' units."""
    unit = model.emission.unit
    with torch.no_grad():
        found = model.expected_statistics(x)._asdict()
    found["sums"] = found["sums"] / unit
    found["squares"] = found["squares"] / (unit.square() if found["squares"].ndim == 2 else unit[:, None] * unit)
    return found


@pytest.mark.parametrize("kind", ["plain", "offset", "tiny and huge", "outlier", "duplicates", "empty"])
@pytest.mark.parametrize("emission", ["normal", "multivariate-normal"])
def test_statistics_of_hostile_sequences_are_those_of_plain_torch(emission: str, kind: str) -> None:
    """Each relative to its largest entry: to 1e-8. Means that are off by a thousandth of a deviation do not pass."""
    x, model = sequences(kind, emission)
    with plain_torch():
        reference = statistics_of(model, x)
    found = statistics_of(model, x)
    assert max(distance(found[name], reference[name]) for name in found) <= EQUAL
    with torch.no_grad():
        model.emission.means += 1e-3 * model.emission.unit
    wrong = statistics_of(model, x)
    assert max(distance(wrong[name], reference[name]) for name in found) > EQUAL


@pytest.mark.parametrize("kind", ["normal", "multivariate-normal", "poisson"])
def test_em_takes_the_steps_of_plain_torch(kind: str) -> None:
    """Eight iterations from one start: log p(x) at each to 1e-8 relative, on data far from zero with an outlier.

    One iteration more is another figure.
    """
    entry = get_entry("hidden-markov-model")
    x, _ = entry.example(2, seed=1, states=3, emission=kind).simulate(4, seed=2, steps=50)
    if kind != "poisson":
        x = torch.cat([x[..., :1], 1e4 + 1e-2 * x[..., 1:]], -1)
        x[0, 7, 1:] += 3.0
        x[1, 10:20] = torch.cat([x[1, 10:20, :1], x[1, 9:10, 1:].expand(10, -1)], -1)
    histories = []
    for engine in (contextlib.nullcontext, plain_torch):
        model, history = entry.from_data(x, states=3, emission=kind), []
        with engine(), torch.no_grad():
            for _ in range(8):
                statistics = model.expected_statistics(x)
                history.append(float(statistics.log_evidence))
                model.maximize(statistics)
        histories.append(np.array(history))
    fast, slow = histories
    assert np.abs(fast / slow - 1).max() <= EQUAL
    assert np.abs(fast[1:] / slow[:-1] - 1).min() > EQUAL


# Machinery -----------------------------------------------------------------------------------------------------------


def evidence(initial: Tensor, transition: Tensor, emission: Tensor) -> Tensor:
    steps = torch.ones(emission.shape[:2], dtype=torch.bool)
    return markov_chains.forward_filter(initial, transition, emission, steps).log_evidence.sum()


def test_a_captured_graph_runs_the_loop_anew() -> None:
    """Captured on one chain and run on another; under vmap, with gradients too: every figure to the last bit."""
    first, other = chain(3, (9, 9))[:3], chain(3, (9, 9), seed=5)[:3]

    def step(*values: Tensor) -> list[Tensor]:
        leaves = [v.detach().requires_grad_() for v in values]
        value = evidence(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    graph = make_fx(torch.func.functionalize(make_fx(step)(*first)))(*first)
    for values in (first, other):
        assert all(torch.equal(one, two) for one, two in zip(graph(*values), step(*values), strict=True))
    assert not torch.equal(graph(*first)[0], graph(*other)[0])
    both = [torch.stack(pair) for pair in zip(first, other, strict=True)]
    mapped = torch.func.vmap(graph)(*both)
    for one, two in zip(mapped, zip(step(*first), step(*other), strict=True), strict=True):
        assert torch.equal(one, torch.stack(two))


def operations() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every operation with arguments."""
    initial, transition, emission, steps = chain(3, (5, 3))
    emission = observed(emission, steps)
    filtered = markov_chains.forward_filter(initial, transition, emission, steps)
    yield markov_chains._filter, (initial, transition, emission)
    yield markov_chains._filter_slopes, (transition, *filtered[:1], filtered.log_filtered, filtered.log_increments)
    yield markov_chains._smooth, (filtered.log_filtered, transition, steps)
    yield markov_chains._count, (initial, transition, emission, steps)
    yield markov_chains._viterbi, (initial, transition, emission, steps)
    uniform = emission[..., 0].sigmoid()
    yield markov_chains._draw, (initial.exp(), transition.exp(), uniform)
    yield markov_chains._draw_back, (filtered.log_filtered, transition, uniform)
    case = space(2, 1, (5, 3))
    arguments = given(case)
    found = kalman._kalman(*arguments)
    yield kalman._kalman, tuple(arguments)
    yield kalman._kalman_slopes, (*arguments, *found[2:], *found)
    shared = (case[0].transition, case[0].process)
    yield kalman._kernels, (case[2], *found[2:], *shared, found[3][:, 0].clone(), False)
    filtered_space = kalman.kalman_filter(case[1], case[0], case[2])
    yield kalman._smooth, (*kalman.backward_kernels(filtered_space, case[0], case[2])[:4], 0)
    rows, means = draw(7, 2), draw(3, 2, seed=1)
    yield normals._log_density, (rows, means, means.exp())
    yield normals._moments, (rows, means, draw(7, 3), True)


def test_operations_keep_what_they_say_to_torch() -> None:
    """Shapes, and that nothing is changed in place nor shared, by torch's own check; it finds a wrong shape."""
    for operation, arguments in operations():
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
    wrong = compiled.operation(
        "wrong_for_a_test(Tensor values) -> Tensor",
        lambda values: values + 1,
        lambda values: torch.empty_like(values[0]),
    )
    with pytest.raises(torch.testing._internal.optests.OpCheckError):
        torch.library.opcheck(wrong, (draw(2, 3),), test_utils=("test_faketensor",))


def test_threads_change_no_bit() -> None:
    """Of torch's, by which sequences are shared out, and of the caller's."""
    arguments = chain(3, tuple(range(1, 30)))
    alone = markov_chains.expect(*arguments)
    with threads(3):
        shared = markov_chains.expect(*arguments)
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(lambda _: markov_chains.expect(*arguments), range(8)))
    for found in (shared, *others):
        assert all(torch.equal(one, two) for one, two in zip(alone, found, strict=True))
    assert not torch.equal(alone.marginals, markov_chains.expect(*chain(3, tuple(range(1, 30)), seed=1)).marginals)


def test_other_kinds_of_numbers() -> None:
    """Values in float32 are computed in float64, and come back as float32; without numba plain torch takes over."""
    arguments = chain()
    single = markov_chains.forward_filter(*(v.float() for v in arguments[:3]), arguments[3])
    double = markov_chains.forward_filter(*arguments)
    assert single.log_filtered.dtype == torch.float32
    assert 1e-12 < distance(single.log_evidence, double.log_evidence) <= 1e-6
    with plain_torch():
        without = markov_chains.expect(*arguments)
    assert furthest(without, markov_chains.expect(*arguments)) <= EQUAL
    assert not torch.equal(without.marginals, markov_chains.expect(*arguments).marginals)


def test_a_loop_without_a_place_for_its_machine_code_runs() -> None:
    """A function without a file cannot be kept; it is compiled for this process."""
    made: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", made)
    double = compiled.compiled(made["double"])
    assert double(21) == 42 and double is not made["double"]


def test_numba_is_loaded_by_the_first_loop_and_not_before() -> None:
    code = (
        "import sys, torch\nfrom elbozoo.models import hidden_markov_model, linear_gaussian_state_space\n"
        "from elbozoo.models.numerics import normals\nprint('numba' in sys.modules)\n"
        "normals.log_density(torch.zeros(2, 1), torch.zeros(3, 1), torch.ones(3, 1))\nprint('numba' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.split() == ["False", "True"]


def test_emissions_in_any_layout_give_the_same_moments() -> None:
    """Log densities whose steps are not contiguous in memory, as those of many columns are: equal to the bit."""
    with isolated(0):
        emission = torch.randn(2, 40, 3, dtype=torch.float64)
        transition = torch.randn(3, 3, dtype=torch.float64).log_softmax(-1)
    turned = emission.transpose(-1, -2).contiguous().transpose(-1, -2)
    initial, steps = transition[0], torch.ones(2, 40, dtype=torch.bool)
    assert turned.stride() != emission.stride()
    one, other = (markov_chains.expect(initial, transition, each, steps) for each in (emission, turned))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert float((one.marginals.sum(-1) - 1).abs().max()) <= 1e-12
