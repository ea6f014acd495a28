"""The contract of entries, over the whole registry. Each clause says why it is there."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch
from contract import ROWS, changed, entry_for, every_entry, example_data, joint_trace, prior_draw
from torch import Tensor

from elbozoo.inference.convergence import MONOTONE_SLACK
from elbozoo.inference.em import EMOptions, expected_statistics, run_em
from elbozoo.models import Batch, Entry, capabilities, get_entry, list_models
from elbozoo.models.contract.entry import (
    HasOracle,
    HasPosterior,
    HasPredictive,
    HasRowLikelihoods,
    SupportsEM,
    joint_posterior,
)
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.isolation import isolated

entries = pytest.mark.parametrize("name", every_entry())
oracles = pytest.mark.parametrize("name", [n for n in every_entry() if isinstance(get_entry(n).example(), HasOracle)])
posteriors = pytest.mark.parametrize(
    "name", [n for n in every_entry() if isinstance(get_entry(n).example(), HasPosterior)]
)
em_entries = pytest.mark.parametrize(
    "name", [n for n in every_entry() if isinstance(get_entry(n).example(), SupportsEM)]
)


@entries
def test_page_and_options_are_written_for_readers(name: str) -> None:
    """Pages and command-line help are made from them."""
    entry = get_entry(name)
    page = entry.page()
    assert entry.name() == name
    assert "$$" in page and "```bibtex" in page and "What goes wrong" in page
    assert len(entry.summary()) <= 100
    for option in entry.Options.describe():
        assert option["description"], option


@entries
def test_simulation_replays_its_seed_and_leaves_the_callers_random_state(name: str) -> None:
    """A result that cannot be repeated cannot be checked."""
    entry = get_entry(name).example(seed=1)
    before = torch.random.get_rng_state()
    x, z = entry.simulate(7, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    again, z_again = entry.simulate(7, seed=3)
    other, _ = entry.simulate(7, seed=4)
    assert len(x) == 7 and entry.width(x) == entry.columns
    assert torch.equal(x, again) and not torch.equal(x, other)
    latents, latents_again = (v if isinstance(v, dict) else {"z": v} for v in (z, z_again))
    assert all(torch.equal(value, latents_again[site]) for site, value in latents.items())
    table, classes = entry.simulate_table(7, seed=3)
    assert len(table) == 7 and (classes is None or classes.shape == (7,))


@entries
def test_starting_values_replay_their_seed(name: str) -> None:
    """Seeds of a comparison mean different starts, and each can be run again alone."""
    first, again = entry_for(name).state_dict(), entry_for(name).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


@entries
def test_unknown_and_ill_typed_options_are_refused_in_one_line(name: str) -> None:
    """A misspelt option that is ignored gives the answer to another question."""
    x = example_data(name)
    with pytest.raises(InvalidInput, match="unknown option 'no_such_option'") as caught:
        get_entry(name).from_data(x, no_such_option=1)
    assert "\n" not in str(caught.value)


@entries
def test_minibatch_log_joint_is_unbiased(name: str) -> None:
    """The mean over a partition into equal minibatches is the full log joint, to rounding (1e-9 relative)."""
    entry, x = entry_for(name), example_data(name)
    full = Batch.full(x)
    values = prior_draw(entry, full, seed=5)
    local = {site.name for site in entry.latent_sites() if site.is_local}
    whole = float(joint_trace(entry, full, values).log_prob_sum())

    def of_minibatch(index: Tensor, key: str) -> float:
        part = {name: value[index] if name in local else value for name, value in values.items()}
        trace = joint_trace(entry, Batch(x[index], index, ROWS), part)
        return float(sum(node[key].sum() for node in trace.nodes.values() if key in node))

    parts = torch.arange(ROWS).split(ROWS // 3)
    mean = sum(of_minibatch(index, "log_prob") for index in parts) / len(parts)
    assert mean == pytest.approx(whole, rel=1e-9, abs=1e-9)
    # Negative control: without the plate's scale the same mean is wrong.
    unscaled = sum(of_minibatch(index, "unscaled_log_prob") for index in parts) / len(parts)
    assert unscaled != pytest.approx(whole, rel=1e-3)


@posteriors
def test_joint_minus_posterior_is_the_evidence_for_every_latent(name: str) -> None:
    """log p(x, z) - log p(z given x) = log p(x) whatever z is: oracle checks posterior (1e-8 relative)."""
    entry, x = entry_for(name), example_data(name)
    assert isinstance(entry, HasPosterior) and isinstance(entry, HasOracle)
    batch = Batch.full(x)
    sites = entry.latent_sites(x)
    with torch.no_grad():
        truth = float(entry.log_evidence(x).sum())
        differences = []
        for seed in range(5):
            values = prior_draw(entry, batch, seed)
            joint = float(joint_trace(entry, batch, values).log_prob_sum())
            differences.append(joint - float(joint_posterior(entry, x, sites).log_prob(values).sum()))
        assert differences == pytest.approx([truth] * 5, rel=1e-8, abs=1e-8)
        if not sites:
            return
        # Negative control: the posterior of other data is not constant in the same way.
        values = prior_draw(entry, batch, 0)
        wrong = float(joint_posterior(entry, changed(x), sites).log_prob(values).sum())
        joint = float(joint_trace(entry, batch, values).log_prob_sum())
        assert joint - wrong != pytest.approx(truth, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("name", [n for n in every_entry() if isinstance(get_entry(n).example(), HasPredictive)])
def test_predictive_is_the_ratio_of_evidences(name: str) -> None:
    """p(new given x) = p(x, new) / p(x): the chain rule ties predictive and oracle (1e-8 nats)."""
    entry, x = entry_for(name), example_data(name)
    assert isinstance(entry, HasPredictive) and isinstance(entry, HasOracle)
    with torch.no_grad():
        for n in (0, 1, 10):
            seen, new = x[n + 1 :], x[n]
            ratio = float(entry.log_evidence(torch.cat([seen, new[None]])) - entry.log_evidence(seen))
            assert float(entry.predictive(seen).log_prob(new)) == pytest.approx(ratio, abs=1e-8)
            assert float(entry.predictive(seen[: len(seen) // 2]).log_prob(new)) != pytest.approx(ratio, abs=1e-8)


@entries
def test_gradients_agree_with_finite_differences(name: str) -> None:
    """Along a random direction, to 1e-5 relative: a detached or misplaced parameter shows here."""
    entry, x = entry_for(name), example_data(name)
    parameters = [p for p in entry.parameters() if p.requires_grad]
    batch = Batch.full(x)
    values = prior_draw(entry, batch, seed=1)
    objectives = [lambda: joint_trace(entry, batch, values).log_prob_sum()]
    if isinstance(entry, HasOracle):
        objectives.append(lambda: entry.log_evidence(x).sum())
    if not parameters:
        return
    for objective in objectives:
        gradient = torch.autograd.grad(objective(), parameters)
        direction = [torch.randn_like(p) / math.sqrt(p.numel()) for p in parameters]
        slope = float(sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)))
        numeric = _central_difference(objective, parameters, direction)
        assert slope == pytest.approx(numeric, rel=1e-5, abs=1e-5)
        assert 1.01 * slope + 0.01 != pytest.approx(numeric, rel=1e-5, abs=1e-5)


def _central_difference(objective, parameters: list[Tensor], direction: list[Tensor], step: float = 1e-5) -> float:  # type: ignore[no-untyped-def]
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(sign * step * d)
        ends.append(float(objective()))
    return (ends[0] - ends[1]) / (2 * step)


@em_entries
def test_statistics_add_up_over_chunks(name: str) -> None:
    """So that EM runs on chunks, on streams and on clusters, unchanged (1e-10 relative)."""
    entry, x = entry_for(name), example_data(name)
    with torch.no_grad():
        whole, chunked = expected_statistics(entry, x, ROWS), expected_statistics(entry, x, 5)
    for field, one, other in zip(whole._fields, whole, chunked, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10 * float(one.abs().max())), field
        assert not torch.allclose(one, 1.001 * other, rtol=1e-10, atol=1e-10 * float(one.abs().max())) or not one.any()


@em_entries
@pytest.mark.parametrize("seed", range(20))
def test_em_never_decreases_at_any_step(name: str, seed: int) -> None:
    """From 20 random starts; the monitor raises on a fall beyond 1e-9 relative."""
    x = example_data(name)
    entry = entry_for(name, seed)
    with isolated(seed):
        entry.initialize(x, restart=seed)
    run = run_em(entry, x, EMOptions(restarts=1, iterations=100), seed=seed, progress=False)
    history = run.trajectory.frame()["log_evidence"]
    slack = MONOTONE_SLACK * history.abs().clip(lower=ROWS)
    assert (history.diff().dropna() >= -slack.iloc[1:]).all()
    assert history.iloc[-1] > history.iloc[0]


@em_entries
def test_a_wrong_m_step_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the monitor: an M step that overshoots makes the log-likelihood fall, and raises."""
    entry, x = entry_for(name), example_data(name)
    right = type(entry).maximize

    def overshooting(self: Entry, statistics: object) -> None:
        right(self, statistics)  # type: ignore[arg-type]
        with torch.no_grad():
            next(p for key, p in self.named_parameters() if "lo" in key or "means" in key or "probs" in key).mul_(1.5)

    monkeypatch.setattr(type(entry), "maximize", overshooting)
    with pytest.raises(NumericalFailure, match="fell from"):
        run_em(entry, x, EMOptions(restarts=1), seed=0, progress=False)


@entries
def test_row_likelihoods_equal_the_program(name: str) -> None:
    """The fast path of quadrature is the program's own likelihood, finite latents summed out (1e-9 relative)."""
    entry, x = entry_for(name), example_data(name)
    if not isinstance(entry, HasRowLikelihoods):
        return
    values = prior_draw(entry, Batch.full(x), seed=2)
    finite = [site for site in entry.latent_sites(x) if site.is_enumerable]
    real = [site.name for site in entry.latent_sites(x) if not site.is_enumerable]

    def beside_the_real_latents(chosen: tuple[int, ...]) -> Tensor:
        fixed = {site.name: torch.full((ROWS,), value) for site, value in zip(finite, chosen, strict=True)}
        nodes = joint_trace(entry, Batch.full(x), values | fixed).nodes
        terms = [node["log_prob"] for name, node in nodes.items() if "log_prob" in node and name not in real]
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    with torch.no_grad():
        # Several latents stand side by side, in the order in which they are drawn.
        fast = entry.log_likelihood(x, torch.cat([values[name] for name in real], -1))
        cases = itertools.product(*(range(site.cardinality or 0) for site in finite))
        slow = torch.stack([beside_the_real_latents(case) for case in cases]).logsumexp(0)
    assert torch.allclose(fast.diagonal(), slow, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(fast.roll(1, 0).diagonal(), slow, rtol=1e-9, atol=1e-9)


@entries
def test_capabilities_are_derived(name: str) -> None:
    """A flag beside a method would one day disagree with it."""
    example = get_entry(name).example()
    found = capabilities(example)
    assert "simulation" in found
    assert ("oracle" in found) == hasattr(example, "log_evidence")
    assert ("EM" in found) == hasattr(example, "maximize")
    assert list_models().loc[name, "capabilities"] == ", ".join(found)


def test_registry_lists_close_matches() -> None:
    """The next step after a misspelt name is the right name."""
    with pytest.raises(InvalidInput, match="did you mean 'gaussian-mixture'"):
        get_entry("gausian-mixture")


def test_an_entry_unlike_its_file_refuses_to_load() -> None:
    """The folder is the registry, so a file must hold what its name says."""
    from elbozoo.models.contract.registry import entry_of

    cls = type("Other", (Entry,), {"__module__": "elbozoo.models.made_up"})
    with pytest.raises(ImportError, match=r"named like its file made_up\.py"):
        entry_of("elbozoo.models.made_up", {"Other": cls, "__doc__": "A page."})
    right = type("MadeUp", (Entry,), {"__module__": "elbozoo.models.made_up"})
    assert entry_of("elbozoo.models.made_up", {"MadeUp": right, "__doc__": "A page."}) is right
    with pytest.raises(ImportError, match="no docstring"):
        entry_of("elbozoo.models.made_up", {"MadeUp": right, "__doc__": None})


def test_validation_stays_on() -> None:
    """Simulation turns Pyro's validation off for its own block alone."""
    get_entry("ppca").example().simulate(3, seed=0)
    assert pyro.settings.get("validate_distributions_pyro") or torch.distributions.Distribution._validate_args
