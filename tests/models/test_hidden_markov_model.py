"""Hidden Markov model against all paths, Pyro's enumeration, hmmlearn, a mixture, and published fits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

import elbozoo as ez
from elbozoo.inference.em import EMOptions, run_em
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sequences import lengths, observations, steps_mask

NAME = "hidden-markov-model"
EMISSIONS = ["normal", "multivariate-normal", "poisson", "categorical"]
INITIALS = ["free", "stationary", "uniform"]

emissions = pytest.mark.parametrize("emission", EMISSIONS)


def example(emission: str = "normal", seed: int = 1, columns: int = 2, **options: Any) -> Entry:
    columns = 1 if emission == "categorical" else columns
    return get_entry(NAME).example(columns, seed=seed, emission=emission, **{"states": 3, **options})


def cut(x: Tensor, *kept: int) -> Tensor:
    """Sequences with only so many steps left; the rest is padding."""
    steps = torch.arange(x.shape[1]) < torch.tensor(kept)[:, None]
    return x * steps[..., None]


def fitted(x: Tensor, seed: int = 0, **options: Any) -> tuple[Entry, Tensor]:
    """Entry at its starting values for a table or arranged data, and the arranged data."""
    entry = get_entry(NAME).from_data(x, seed=seed, **options)
    return entry, entry.arrange(x, entry.options)


def climb(entry: Entry, x: Tensor, iterations: int, gain: float = 0.0) -> float:
    """Run EM until it gains less than ``gain`` nats; no step may lower the likelihood by more than 1e-9 relative."""
    history = [-math.inf]
    with torch.no_grad():
        for _ in range(iterations):
            statistics = entry.expected_statistics(x)
            history.append(float(statistics.log_evidence))
            assert history[-1] >= history[-2] - 1e-9 * max(abs(history[-1]), 1.0), len(history)
            if history[-1] - history[-2] < gain:
                break
            entry.maximize(statistics)
    return history[-1]


def scipy_log_density(entry: Entry, x: Tensor) -> np.ndarray:
    """Log density (T, K) of the steps of one sequence (T, D), from SciPy's distributions."""
    emission, kind, rows = entry.emission, entry.options.emission, x.numpy()
    with torch.no_grad():
        if kind in ("normal", "multivariate-normal"):
            normals = zip(emission.means.numpy(), emission.covariances.numpy(), strict=True)
            columns = [stats.multivariate_normal(mean, cov).logpdf(rows) for mean, cov in normals]
        elif kind == "poisson":
            columns = [stats.poisson(rate).logpmf(rows).sum(-1) for rate in emission.rates.numpy()]
        else:
            table = emission.logits.softmax(-1).numpy()
            columns = [np.log(probs[rows[:, 0].astype(int)]) for probs in table]
    return np.stack([np.reshape(column, len(rows)) for column in columns], -1)


def all_paths(entry: Entry, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Every path of one sequence (T, D), and its log joint with the observations."""
    density = scipy_log_density(entry, x)
    with torch.no_grad():
        initial, transition = entry.chain.log_initial.numpy(), entry.chain.log_transition.numpy()
    paths = np.array(list(itertools.product(range(density.shape[1]), repeat=len(x))))
    log_joint = initial[paths[:, 0]] + transition[paths[:, :-1], paths[:, 1:]].sum(-1)
    return paths, log_joint + np.take_along_axis(density[None], paths[..., None], -1)[..., 0].sum(-1)


@pytest.mark.parametrize("initial", INITIALS)
@emissions
def test_evidence_is_the_sum_over_all_paths(emission: str, initial: str) -> None:
    """K = 3, T = 6, and sequences of 4 and 1 steps (1e-10 nats: 729 terms in float64); the posterior's too."""
    entry = example(emission, initial=initial)
    x = cut(entry.simulate(3, seed=2, steps=6)[0], 6, 4, 1)
    with torch.no_grad():
        found, posterior, likeliest = entry.log_evidence(x), entry.posterior(x), entry.most_likely_path(x)
        other = example(emission, seed=5, initial=initial).log_evidence(x)
        marginals = posterior.probs
    for s, length in enumerate(lengths(x).tolist()):
        paths, log_joint = all_paths(entry, observations(x)[s, :length])
        truth = logsumexp(log_joint)
        assert float(found[s]) == pytest.approx(truth, abs=1e-10)
        probs = np.exp(log_joint - truth)
        states = np.einsum("p,ptk->tk", probs, np.eye(3)[paths])
        assert np.allclose(marginals[s, :length].numpy(), states, rtol=0, atol=1e-10)
        assert likeliest[s, :length].tolist() == paths[log_joint.argmax()].tolist()
        assert float(other[s]) != pytest.approx(truth, abs=1e-3)


@emissions
def test_enumeration_by_pyro_is_a_second_oracle(emission: str) -> None:
    """TraceEnum_ELBO on the program with a site per step and an empty guide: -log p(x), to 1e-9 relative."""
    entry = example(emission, seed=2)
    x = cut(entry.simulate(4, seed=3, steps=8)[0], 8, 5, 8, 1)
    with isolated(0), torch.no_grad():
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(entry.step_by_step, lambda batch: None, Batch.full(x))
        truth = float(entry.log_evidence(x).sum())
        assert -loss == pytest.approx(truth, rel=1e-9)
        assert -loss != pytest.approx(float(entry.log_evidence(cut(x, 8, 4, 8, 1)).sum()), rel=1e-3)


def hmmlearn_model(entry: Entry, **options: Any) -> Any:
    """The model of hmmlearn with the parameters of ``entry``."""
    from hmmlearn import hmm

    states, kind, emission = entry.options.states, entry.options.emission, entry.emission
    with torch.no_grad():
        if kind == "poisson":
            peer = hmm.PoissonHMM(states, **options)
            peer.lambdas_ = emission.rates.numpy()
        elif kind == "categorical":
            peer = hmm.CategoricalHMM(states, **options)
            peer.emissionprob_ = emission.log_probs.exp().numpy()
        else:
            covariance_type = "diag" if kind == "normal" else "full"
            # Priors off: by default hmmlearn's add to the variances.
            priors = {"covars_prior": 0.0, "min_covar": 0.0}
            peer = hmm.GaussianHMM(states, covariance_type=covariance_type, **priors, **options)
            peer.n_features = entry.columns
            peer.means_ = emission.means.numpy()
            covariances = emission.covariances.numpy()
            peer.covars_ = np.stack([np.diag(c) for c in covariances]) if kind == "normal" else covariances
        peer.startprob_ = entry.chain.log_initial.exp().numpy()
        peer.transmat_ = entry.chain.log_transition.exp().numpy()
    return peer


def as_hmmlearn(entry: Entry, x: Tensor) -> tuple[np.ndarray, list[int]]:
    """All steps below one another, with the lengths of the sequences."""
    rows = observations(x)[steps_mask(x)].numpy()
    counts = entry.options.emission in ("poisson", "categorical")
    return rows.astype(int) if counts else rows, lengths(x).tolist()


@pytest.mark.peers
@emissions
def test_scores_equal_hmmlearns(emission: str) -> None:
    """Evidence 1e-8 nats per step, smoothed states 1e-8 and the likeliest path, over five sequences of 200 steps."""
    entry = example(emission)
    x = cut(entry.simulate(5, seed=4, steps=200)[0], 200, 150, 200, 1, 77)
    peer, (rows, sizes) = hmmlearn_model(entry), as_hmmlearn(entry, x)
    score, states = peer.score_samples(rows, sizes)
    with torch.no_grad():
        found = float(entry.log_evidence(x).sum())
        marginals = entry.posterior(x).probs[steps_mask(x)]
        likeliest = entry.most_likely_path(x)[steps_mask(x)]
    assert abs(found - score) <= 1e-8 * len(rows)
    assert np.allclose(marginals.numpy(), states, rtol=0, atol=1e-8)
    assert np.array_equal(likeliest.numpy(), peer.predict(rows, sizes))
    # Negative control: as one sequence, the score is another.
    assert abs(found - peer.score(rows)) > 1e-8 * len(rows)


@pytest.mark.peers
@emissions
def test_baum_welch_takes_hmmlearns_steps(emission: str) -> None:
    """Ten iterations from the same start end at the same parameters, to 1e-7; nine do not."""
    entry = example(emission)
    x = cut(entry.simulate(4, seed=5, steps=80)[0], 80, 60, 80, 33)
    entry, _ = fitted(x, emission=emission, states=3)
    peer = hmmlearn_model(entry, n_iter=10, tol=-math.inf, init_params="")
    peer.fit(*as_hmmlearn(entry, x))

    def distance() -> float:
        ours = hmmlearn_model(entry)
        names = ["startprob_", "transmat_"]
        names += {"poisson": ["lambdas_"], "categorical": ["emissionprob_"]}.get(emission, ["means_", "covars_"])
        return max(float(np.abs(getattr(ours, name) - getattr(peer, name)).max()) for name in names)

    climb(entry, x, 9)
    assert distance() > 1e-7
    climb(entry, x, 1)
    assert distance() <= 1e-7


def test_equal_rows_of_the_transitions_give_a_mixture() -> None:
    """Steps are then independent draws of the gaussian-mixture entry, 1e-9 nats; with other rows they are not."""
    entry = example("multivariate-normal")
    x, _ = entry.simulate(4, seed=6)
    mixture = get_entry("gaussian-mixture").from_data(observations(x).flatten(0, 1), components=3)
    with torch.no_grad():
        before = entry.log_evidence(x)
        entry.chain.transition_logits.copy_(entry.chain.log_initial.expand(3, -1))
        mixture.weights = entry.chain.log_initial.exp()
        mixture.means.copy_(entry.emission.means)
        mixture.unit.copy_(entry.emission.unit)
        mixture.factor.copy_(entry.emission.factor)
        expected = mixture.log_evidence(observations(x).flatten(0, 1)).reshape(4, -1).sum(-1)
        assert torch.allclose(entry.log_evidence(x), expected, rtol=0, atol=1e-9)
        assert not torch.allclose(before, expected, rtol=0, atol=1e-3)
        single = cut(x, 1, 1, 1, 1)[:, :1]
        expected = mixture.log_evidence(observations(single)[:, 0])
        assert torch.allclose(entry.log_evidence(single), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("emission", "initial"),
    [
        ("multivariate-normal", "free"),
        ("poisson", "free"),
        ("categorical", "uniform"),
        pytest.param("normal", "stationary", marks=pytest.mark.slow),
        pytest.param("poisson", "stationary", marks=pytest.mark.slow),
    ],
)
def test_em_never_decreases(emission: str, initial: str) -> None:
    """From 20 random starts, 1e-9 relative, also where the M step is a numerical maximum."""
    x = cut(example(emission, initial=initial).simulate(6, seed=7, steps=10)[0], 10, 10, 3, 10, 1, 7)
    for seed in range(20):
        entry, _ = fitted(x, seed=seed, emission=emission, initial=initial, states=3)
        with isolated(seed):
            entry.initialize(x, restart=seed)
        start = float(entry.log_evidence(x).sum().detach())
        assert climb(entry, x, 15) > start


def test_a_stationary_start_takes_part_in_the_m_step() -> None:
    """With many short sequences the closed form for a free start lowers the expected log joint; the M step does not.

    It is at a maximum: 200 perturbations of its transitions all lower E[log p(z)].
    """
    entry = example("poisson", initial="stationary")
    x, _ = entry.simulate(40, seed=8, steps=2)
    entry, _ = fitted(x, emission="poisson", initial="stationary", states=3)
    climb(entry, x, 3)
    with torch.no_grad():
        statistics = entry.expected_statistics(x)

        def expected(log_transition: Tensor) -> float:
            # The stationary distribution as the limit of the chain, which shares nothing with the entry.
            long_run = torch.linalg.matrix_power(log_transition.exp(), 4096)[0]
            return float((statistics.first * long_run.log()).sum() + (statistics.transitions * log_transition).sum())

        closed_form = statistics.transitions / statistics.transitions.sum(-1, keepdim=True)
        entry.maximize(statistics)
        found = entry.chain.log_transition
        assert expected(found) > expected(closed_form.log()) + 1e-4
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            noise = 0.03 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
            assert expected((found + noise).log_softmax(-1)) < expected(found)


# Zucchini, MacDonald & Langrock (2016), chapters 1 to 3: minus log L and rates of stationary models of the yearly
# numbers of major earthquakes. One state is a single Poisson distribution, whose figure checks the data.
EARTHQUAKES = {
    1: (391.9189, [19.364]),
    2: (342.3183, [15.472, 26.125]),
    3: (329.4603, [13.146, 19.721, 29.714]),
    4: (327.8316, [11.283, 13.853, 19.695, 29.700]),
}


@pytest.mark.parametrize("states", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_published_fits_of_the_earthquakes(states: int) -> None:
    """Minus log L and rates to the digits printed."""
    published, rates = EARTHQUAKES[states]
    x = ez.load_data("earthquakes").x
    entry, arranged = fitted(x, emission="poisson", states=states, initial="stationary")
    found = climb(entry, arranged, 500, gain=1e-7)
    assert -found == pytest.approx(published, abs=6e-5)
    assert sorted(entry.emission.rates.detach().flatten().tolist()) == pytest.approx(rates, abs=6e-4)
    # Negative control: a free start is another model, with another maximum.
    if states > 1:
        free, arranged = fitted(x, emission="poisson", states=states)
        assert -climb(free, arranged, 500, gain=1e-7) < published - 0.3


def test_em_of_the_library_finds_the_published_maximum() -> None:
    """Through the library's own EM, with its restarts and its stopping rule (1e-3 nats)."""
    x = ez.load_data("earthquakes").x
    entry, arranged = fitted(x, emission="poisson", states=2, initial="stationary")
    run = run_em(entry, arranged, EMOptions(restarts=2), seed=0, progress=False)
    assert run.converged and run.degeneracy is None
    assert run.log_evidence == pytest.approx(-342.3183, abs=1e-3)


@emissions
def test_elbo_of_independent_steps(emission: str) -> None:
    """E_q[log p(x, z)] and the gap of a q that is independent across time, as sums over paths (1e-10 nats)."""
    entry = example(emission)
    x = cut(entry.simulate(2, seed=9, steps=5)[0], 5, 3)
    probs = torch.randn(2, 5, 3, dtype=torch.float64).softmax(-1)
    with torch.no_grad():
        found, evidence = entry.expected_log_joint(x, probs), entry.log_evidence(x)
        against_posterior = entry.posterior(x).expected_log_prob(probs)
    for s, length in enumerate((5, 3)):
        paths, log_joint = all_paths(entry, observations(x)[s, :length])
        weights = np.prod([probs[s, t].numpy()[paths[:, t]] for t in range(length)], 0)
        assert float(found[s]) == pytest.approx((weights * log_joint).sum(), abs=1e-10)
        entropy = -(weights * np.log(weights)).sum()
        gap = -entropy - float(against_posterior[s])
        assert float(evidence[s]) - float(found[s]) - entropy == pytest.approx(gap, abs=1e-10)
        assert gap > 1e-3
        uniform = np.full(len(paths), 1 / len(paths))
        assert float(found[s]) != pytest.approx((uniform * log_joint).sum(), abs=1e-3)


@emissions
def test_what_was_learned_is_recovered_from_a_saved_state(emission: str) -> None:
    """The options carry the number of categories that the data had."""
    x = cut(example(emission).simulate(3, seed=10)[0], 12, 12, 4)
    entry, _ = fitted(x, emission=emission, states=2)
    again = type(entry)(entry.options, entry.columns).double()
    again.load_state_dict(entry.state_dict())
    assert torch.equal(again.log_evidence(x), entry.log_evidence(x))
    assert not torch.equal(again.log_evidence(x[:1]), entry.log_evidence(x[1:2]))
    if emission == "categorical":
        assert entry.options.categories == int(observations(x).max()) + 1
        with pytest.raises(InvalidInput, match="below"):
            type(entry).check_data(x + 1, entry.options)


@pytest.mark.parametrize("emission", ["normal", "multivariate-normal"])
def test_offset_and_scale_of_the_data_change_nothing(emission: str) -> None:
    """At offset 1e6 and scale 1e-3 smoothed states are those of the plain data (1e-4); raw moments would cancel."""
    x, _ = example(emission).simulate(4, seed=11, steps=40)
    moved = torch.cat([x[..., :1], 1e-3 * x[..., 1:] + 1e6], -1)
    (plain, _), (other, _) = (fitted(rows, emission=emission, states=3) for rows in (x, moved))
    climb(plain, x, 20)
    with torch.no_grad():
        for _ in range(20):  # rounding of the data makes the likelihood waver in the last digits here
            other.maximize(other.expected_statistics(moved))
        # At 1e6 a float64 carries 1e-10, which is 1e-7 of the columns' spread.
        assert torch.allclose(plain.posterior(x).probs, other.posterior(moved).probs, atol=1e-4)
        assert not torch.allclose(plain.posterior(x).probs, plain.posterior(moved).probs, atol=1e-4)


def test_a_sequence_of_one_step() -> None:
    """Has an answer among others, and alone where its distribution can be told from one count; else one line."""
    counts = torch.tensor([[4.0]], dtype=torch.float64)
    entry, x = fitted(counts, emission="poisson", states=1)
    assert climb(entry, x, 5) == pytest.approx(stats.poisson(4).logpmf(4), abs=1e-12)
    with pytest.raises(InvalidInput, match="constant over 1 rows"):
        fitted(counts, emission="normal", states=1)
    with pytest.raises(InvalidInput, match="at most one state per row"):
        fitted(counts, emission="poisson", states=2)


def test_all_zero_counts_and_a_single_category_are_certain() -> None:
    """Their log p(x) is 0, to 1e-9; one other value makes it less."""
    zeros = torch.zeros(30, 1, dtype=torch.float64)
    for emission in ("poisson", "categorical"):
        entry, x = fitted(zeros, emission=emission, states=2)
        assert climb(entry, x, 20) == pytest.approx(0.0, abs=1e-9)
        assert torch.isfinite(torch.cat([p.flatten() for p in entry.parameters()])).all()
        one = zeros.clone()
        one[7] = 1.0
        entry, x = fitted(one, emission=emission, states=2)
        assert climb(entry, x, 20) < -1.0


@emissions
def test_states_that_lose_their_steps_stay_finite_and_are_said(emission: str) -> None:
    """More states than different rows: every figure is finite."""
    rows = torch.tensor([0.0, 1.0] * 4 + [1.0, 0.0] * 3, dtype=torch.float64)[:, None]
    rows = torch.cat([rows, rows.roll(3)], -1) if emission == "multivariate-normal" else rows
    entry, x = fitted(rows, emission=emission, states=5)
    climb(entry, x, 60)
    assert torch.isfinite(torch.cat([p.detach().flatten() for p in entry.parameters()])).all()
    assert torch.isfinite(entry.posterior(x).probs).all() and torch.isfinite(entry.log_evidence(x)).all()
    with torch.no_grad():
        empty = entry.expected_statistics(x)._replace(log_evidence=x.new_zeros(()))
        counts = empty.counts.clone()
        counts[0] = 0.0
        sums, squares = empty.sums.clone(), empty.squares.clone()
        sums[0] = 0.0
        if squares.ndim:
            squares[0] = 0.0
        entry.maximize(empty._replace(counts=counts, sums=sums, squares=squares))
        assert torch.isfinite(entry.log_evidence(x)).all()
        assert "collapsed" in (entry.degeneracy(entry.expected_statistics(x[:, :1])) or "")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[0.5], [1.0], [2.0]], {"emission": "poisson"}, "found the value 0.5, expected counts"),
        ([[-1.0], [1.0], [2.0]], {"emission": "categorical"}, "found the value -1, expected codes"),
        ([[0.0], [1.0], [7.0]], {"emission": "categorical", "categories": 3}, "below 3"),
        ([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], {"emission": "categorical"}, "expected one column of codes"),
        ([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]], {}, "constant"),
        ([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]], {"emission": "multivariate-normal"}, "centred rank 1"),
        ([[0.0], [1.0]], {"states": 3}, "at most one state per row"),
    ],
)
def test_data_that_an_emission_cannot_have_are_refused(rows: Any, options: dict[str, Any], message: str) -> None:
    """One clear line that says what to do."""
    with pytest.raises(InvalidInput, match=message) as caught:
        fitted(torch.tensor(rows, dtype=torch.float64), **options)
    assert "\n" not in str(caught.value)


def test_a_table_with_a_column_of_sequences_is_read_row_by_row() -> None:
    """Interleaved rows of two sequences give the evidence of each alone."""
    whole, _ = example("poisson", columns=1).simulate(2, seed=12, steps=5)
    table = torch.stack([torch.arange(2.0).repeat(5), observations(whole)[..., 0].T.flatten()], -1).double()
    entry, x = fitted(table, emission="poisson", states=2, sequence="x0")
    assert torch.equal(observations(x), observations(whole)) and entry.names == ("x1",)
    as_one = entry.options.model_copy(update={"sequence": None})
    with torch.no_grad():
        found = entry.log_evidence(x)
        alone = torch.cat([entry.log_evidence(entry.arrange(rows, as_one)) for rows in observations(whole)])
        joined = entry.log_evidence(entry.arrange(table[:, 1:], as_one))
    assert torch.allclose(found, alone, rtol=1e-12)
    assert not torch.allclose(found.sum(), joined, rtol=1e-6)
