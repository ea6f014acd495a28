"""Semi-amortized guides: the ELBO that the steps climb, what they gain, their gradients, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import Tensor

import elbozoo as ez
from elbozoo.guides import Guide, GuideOptions, build_guide, resolve_guide
from elbozoo.guides.bound import noise_dim, row_elbo, whitened_noise
from elbozoo.guides.families import FAMILIES, Family
from elbozoo.guides.local import LocalGuide
from elbozoo.inference.best_member import best_member
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.method import plan
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.entry import Program
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

Z = 6.0  # two-sided false-alarm rate 2e-9 for each comparison
NORMALS = ["diagonal-normal", "full-rank-normal", "low-rank-normal"]


def example(name: str, rows: int = 20, **options: object) -> tuple[Entry, Tensor]:
    entry = get_entry(name).example(seed=1, **options).double()
    return entry, entry.simulate(rows, seed=2)[0]


def guide_with(entry: Entry, x: Tensor, family: str, **options: object) -> LocalGuide:
    """An untrained semi-amortized guide of float64, with a tiny encoder."""
    with isolated(0):
        built = build_guide(f"semi-amortized-{family}", entry, x, GuideOptions(encoder="linear", **options))
    assert isinstance(built, LocalGuide)
    return built.double()


def elbo(entry: Entry, guide: Guide, x: Tensor) -> tuple[float, float]:
    draws = importance_weights(entry, guide, Batch.full(x), 1000, seed=1).elbo()
    error = float((draws.var(0) / len(draws)).sum().sqrt()) if len(draws) > 1 else 0.0
    return float(draws.mean(0).sum()), error


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *[(name, family) for name in ("vae", "mixture-of-factor-analyzers") for family in [*NORMALS, "flow"]],
        ("gaussian-mixture", "categorical"),
    ],
)
def test_the_elbo_on_given_noise_is_the_elbo(name: str, family: str) -> None:
    """Against the importance weights, which share no code with it; the q of other rows has another."""
    entry, x = example(name, 12)
    guide = guide_with(entry, x, family, refinements=3)
    batch = Batch.full(x)
    with torch.no_grad():
        parameters = guide.parameters_of(batch)
        noise = whitened_noise(2048, noise_dim(guide.families), seed=5, like=x)
        found = row_elbo(entry, guide.families, batch, parameters, noise)
        wrong = row_elbo(entry, guide.families, batch, {s: p.roll(1, 0) for s, p in parameters.items()}, noise)
    draws = importance_weights(entry, guide, batch, 4000, seed=1).elbo()
    # Draws of the weights have an error of this size; those of the noise spread evenly and have a smaller one.
    error = Z * math.sqrt(2) * draws.std(0) / math.sqrt(len(draws)) if len(draws) > 1 else torch.zeros(len(x))
    assert ((found - draws.mean(0)).abs() <= error + 1e-9).all()
    assert ((wrong - draws.mean(0)).abs() > error + 1e-9).any()


@pytest.mark.parametrize("family", [*NORMALS, "flow", "delta"])
@pytest.mark.parametrize("name", ["vae", "ppca"])
def test_more_steps_are_never_worse_for_any_row(name: str, family: str) -> None:
    """On the noise that the steps climb: a step that does not gain is taken back (1e-9 nats)."""
    entry, x = example(name, 12)
    batch, values = Batch.full(x), []
    for steps in (0, 1, 2, 5, 20):
        guide = guide_with(entry, x, family, refinements=steps)
        noise = whitened_noise(16, noise_dim(guide.families), seed=0, like=x)
        with torch.no_grad():
            values.append(row_elbo(entry, guide.families, batch, guide.parameters_of(batch), noise))
    rises = torch.stack(values).diff(dim=0)
    assert (rises >= -1e-9).all()
    assert float(rises.sum()) > 1.0
    assert not (-rises >= -1e-9).all()


@pytest.mark.parametrize("name", ["vae", "ppca"])
def test_the_amortization_gap_shrinks_with_the_steps(name: str) -> None:
    """From an encoder that knows nothing: 0, 2 and 20 steps, each by more than six standard errors; never above log p.

    With 20 steps less than a hundredth of the gap is left beside the best diagonal normal.
    """
    entry, x = example(name)
    evidence = log_evidence(entry, x)
    assert evidence is not None and evidence.kind != "estimate"
    best = best_member(entry, "diagonal-normal", x, GuideOptions())
    assert best is not None
    top, top_error = elbo(entry, best.guide, x)
    gaps, errors = [], []
    for steps in (0, 2, 20):
        value, error = elbo(entry, guide_with(entry, x, "diagonal-normal", refinements=steps), x)
        assert value <= evidence.value + Z * error + evidence.standard_error
        gaps.append(top - value)
        errors.append(Z * math.hypot(error, top_error))
    assert gaps[0] > gaps[1] + errors[0] + errors[1] and gaps[1] > gaps[2] + errors[1] + errors[2]
    assert gaps[2] < 0.01 * gaps[0] + errors[2]
    assert not gaps[1] < 0.01 * gaps[0] + errors[1]


def test_steps_of_a_finite_latent_end_at_the_posterior() -> None:
    """Natural steps of whole length are Bayes' theorem; 1e-6 in each probability after 20 of half of it, growing."""
    entry, x = example("gaussian-mixture")
    with torch.no_grad():
        exact = entry.posterior(x).probs  # type: ignore[operator]

        def distance(steps: int) -> float:
            q = guide_with(entry, x, "categorical", refinements=steps).distributions(Batch.full(x))["z"]
            return float((q.probs - exact).abs().max())  # type: ignore[attr-defined]

        assert distance(20) < 1e-6
        assert distance(1) > 1e-6


@pytest.mark.parametrize("family", [*NORMALS, "categorical"])
def test_a_natural_gradient_is_the_gradient_in_the_metric_of_the_divergence(family: str) -> None:
    """Hessian of KL(q ‖ q + d) at d = 0 times it gives the gradient back (1e-8 relative).

    For a low rank only where the factor is zero and by the parts that have a metric of their own.
    """
    name = "gaussian-mixture" if family == "categorical" else "ppca"
    entry, x = example(name, latent_dim=3) if name == "ppca" else example(name)
    (site,) = entry.latent_sites(x)
    member: Family = FAMILIES[family](site, GuideOptions(rank=1 if family == "low-rank-normal" else None))
    torch.manual_seed(6)
    at = torch.randn(member.size, dtype=torch.float64)
    gradient = torch.randn_like(at)
    kept = slice(None)
    if family == "low-rank-normal":
        at[2 * site.dim :] = 0.0
        kept = slice(0, 2 * site.dim)
        gradient[2 * site.dim :] = 0.0
    if family == "categorical":
        gradient = gradient - gradient.mean()  # logits have one number too many

    def divergence(other: Tensor) -> Tensor:
        q, p = member.distribution(at), member.distribution(other)
        if family == "low-rank-normal":
            q, p = (dist.MultivariateNormal(d.mean, d.covariance_matrix) for d in (q, p))  # type: ignore[attr-defined]
        return torch.distributions.kl_divergence(q, p)

    metric = torch.autograd.functional.hessian(divergence, at)
    natural = member.natural_gradient(at, gradient)
    found = (metric @ natural)[kept]
    expected = gradient[kept]
    assert float((found - expected).norm()) < 1e-8 * float(expected.norm())
    assert float(((metric @ (1.1 * natural))[kept] - expected).norm()) > 1e-2 * float(expected.norm())
    assert float(((metric @ gradient)[kept] - expected).norm()) > 1e-2 * float(expected.norm())


def test_q_of_a_row_does_not_depend_on_the_batch_nor_on_the_random_state() -> None:
    """So minibatches see the q of the whole, and a fit evaluates to one number (1e-9 in the parameters)."""
    entry, x = example("vae")
    guide = guide_with(entry, x, "diagonal-normal", refinements=8)
    with torch.no_grad():
        whole = guide.parameters_of(Batch.full(x))["z"]
        torch.manual_seed(99)
        index = torch.tensor([7, 3, 19])
        part = guide.parameters_of(Batch(x[index], index, len(x)))["z"]
    assert float((whole[index] - part).abs().max()) < 1e-9
    assert float((whole[index.flip(0)] - part).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["diagonal-normal", "full-rank-normal"])
def test_full_gradients_agree_with_finite_differences_and_first_order_ones_do_not(family: str) -> None:
    """Of the ELBO as a function of the encoder and of θ, through three steps, along a direction (1e-5 relative)."""
    entry, x = example("vae", 6)
    batch, errors = Batch.full(x), {}
    for kind in ("full", "first-order"):
        guide = guide_with(entry, x, family, refinements=3, refinement_gradient=kind, initial_scale=0.5)
        parameters = [*entry.parameters(), *guide.parameters()]
        noise = whitened_noise(64, 2, seed=9, like=x)

        def objective(guide: LocalGuide = guide, noise: Tensor = noise) -> Tensor:
            return row_elbo(entry, guide.families, batch, guide.parameters_of(batch), noise).sum()

        torch.manual_seed(7)
        direction = [torch.randn_like(p) / math.sqrt(p.numel()) for p in parameters]
        slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(objective(), parameters), direction, strict=True))
        ends = []
        for sign in (1e-6, -2e-6):
            with torch.no_grad():
                for parameter, along in zip(parameters, direction, strict=True):
                    parameter.add_(sign * along)
                ends.append(float(objective()))
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(1e-6 * along)
        numeric = (ends[0] - ends[1]) / 2e-6
        errors[kind] = abs(float(slope) / numeric - 1)
    assert errors["full"] < 1e-5 < errors["first-order"]


def test_a_first_order_gradient_is_that_of_the_end_of_the_steps() -> None:
    """The encoder's output receives the slope at the refined parameters, and θ the slope with those held (1e-12)."""
    entry, x = example("vae", 6)
    guide = guide_with(entry, x, "diagonal-normal", refinements=3)
    batch, noise = Batch.full(x), whitened_noise(16, 2, seed=9, like=x)
    start = {site: source(batch).detach().requires_grad_() for site, source in guide.sources.items()}
    refined = guide.refinement(batch, start)
    value = row_elbo(entry, guide.families, batch, refined, noise).sum()
    found = torch.autograd.grad(value, [start["z"], *entry.parameters()])
    held = {site: values.detach().requires_grad_() for site, values in refined.items()}
    value = row_elbo(entry, guide.families, batch, held, noise).sum()
    expected = torch.autograd.grad(value, [held["z"], *entry.parameters()])
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-12 * (1 + float(other.abs().max()))
    value = row_elbo(entry, guide.families, batch, start, noise).sum()
    (at_start,) = torch.autograd.grad(value, [start["z"]])
    assert float((at_start - expected[0]).abs().max()) > 1e-3


def test_training_learns_an_encoder_from_which_the_steps_start_better() -> None:
    """PPCA by SVI on a few rows: the ELBO ends above that of the steps from an untrained encoder, below log p(x)."""
    x = ez.load_data("wine-standardised").x[:25]
    options = {"steps": 30, "latent_dim": 2, "refinements": 2, "learning_rate": 0.03}
    fit = plan("ppca", x, "semi-amortized", options).run(0, progress=False)
    assert fit.guide.name == "semi-amortized-diagonal-normal"
    trained, error = elbo(fit.entry, fit.guide, x)
    untrained, _ = elbo(fit.entry, guide_with(fit.entry, x, "diagonal-normal", refinements=2), x)
    assert trained > untrained + Z * error
    assert trained <= fit.log_evidence().value + Z * error  # type: ignore[union-attr]
    ledger = fit.full_ledger()
    parts = ledger.elbo + ledger.approximation_gap + ledger.amortization_gap
    assert parts == pytest.approx(ledger.log_evidence, rel=1e-9)


@pytest.mark.parametrize("family", ["diagonal-normal", "flow", "categorical"])
def test_a_saved_fit_comes_back(family: str, tmp_path: Path) -> None:
    """With the steps that its options say: the same ELBO to the last bit, and another with other options."""
    name = "gaussian-mixture" if family == "categorical" else "vae"
    _, x = example(name)
    fit = plan(name, x, f"semi-amortized-{family}", {"steps": 3, "refinements": 2}).run(0, progress=False)
    loaded = type(fit).load(fit.save(tmp_path / "fit"))
    assert loaded.elbo(x) == fit.elbo(x)
    assert isinstance(loaded.guide, LocalGuide)
    loaded.guide.refinement.options = GuideOptions(refinements=0)
    assert loaded.elbo(x) != fit.elbo(x)


def test_nothing_is_left_in_the_callers_trace() -> None:
    """The program runs inside the guide, and its sites stay its own, under particles and enumeration too."""
    entry, x = example("mixture-of-factor-analyzers", 6)
    guide = guide_with(entry, x, "diagonal-normal", refinements=2)
    with isolated(0), pyro.plate("particles", 5, dim=-2):
        trace = pyro.poutine.trace(pyro.poutine.enum(guide, first_available_dim=-3)).get_trace(Batch.full(x))
    sampled = {name for name, node in trace.nodes.items() if node["type"] == "sample"}
    assert sampled == {site.name for site in entry.latent_sites(x)} | {"data"}
    assert all(parameter.grad is None for parameter in entry.parameters())


def test_what_has_no_steps_is_refused_in_one_line() -> None:
    def two_classes(batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            a = pyro.sample("a", dist.Categorical(torch.ones(2).double()))
            b = pyro.sample("b", dist.Categorical(torch.ones(3).double()))
            mean = (a + b).double()[..., None]
            return pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=batch.x)

    program = Program(two_classes, 1)
    with pytest.raises(InvalidInput, match="the latents 'a', 'b' are finite, and the sum") as caught:
        resolve_guide("semi-amortized-categorical", program, program.latent_sites(torch.zeros(3, 1).double()))
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidInput, match="one for the whole data set"):
        resolve_guide("semi-amortized", get_entry("normal-mean").example())
    with pytest.raises(InvalidInput, match="no semi-amortized q"):
        resolve_guide("semi-amortized", get_entry("hidden-markov-model").example())


@pytest.mark.slow
def test_on_digits_a_tiny_encoders_amortization_gap_shrinks_with_the_steps() -> None:
    """A VAE trained with a linear encoder; then 0, 1, 5 and 20 steps from that encoder: each gap below the last.

    Every one by more than six standard errors until a tenth of the first is left, where they may stand still.
    """
    x = ez.load_data("digits-binary").x[:300]
    fit = plan("vae", x, "amortized", {"steps": 600, "encoder": "linear", "latent_dim": 2}).run(0, progress=False)
    evidence = log_evidence(fit.entry, x)
    best = best_member(fit.entry, "diagonal-normal", x, GuideOptions())
    assert best is not None and evidence is not None and evidence.kind == "quadrature"
    top, top_error = elbo(fit.entry, best.guide, x)
    gaps, errors = [], []
    for steps in (0, 1, 5, 20):
        guide = guide_with(fit.entry, x, "diagonal-normal", refinements=steps)
        guide.sources.load_state_dict(fit.guide.sources.state_dict())  # type: ignore[union-attr, operator]
        value, error = elbo(fit.entry, guide, x)
        assert value <= evidence.value + Z * error + evidence.standard_error
        gaps.append(top - value)
        errors.append(Z * math.hypot(error, top_error))
    assert gaps[0] > gaps[1] + errors[0] + errors[1] and gaps[1] > gaps[2] + errors[1] + errors[2]
    assert gaps[3] < gaps[2] + errors[2] and gaps[3] < 0.1 * gaps[0] + errors[3]
    assert not gaps[1] < 0.1 * gaps[0] + errors[1]
