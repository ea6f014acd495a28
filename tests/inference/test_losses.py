"""Losses of our own: importance-weighted bounds, weighed divergences, reweighted wake-sleep, and their gradients.

Gradients are judged on many copies of one row, each with a q of its own: their gradients are independent draws of one
estimator. Monte Carlo statements are z-bounds: beyond 4.5 standard errors, which chance does in 7 of a million
two-sided comparisons; each test makes fewer than 50 and its seeds are fixed.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import elbozoo as ez
from elbozoo.guides import Guide, build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.inference.losses import BetaELBO, DrawnELBO, ImportanceWeightedELBO, Weighting, draw
from elbozoo.inference.method import program_entry
from elbozoo.inference.objectives import OBJECTIVES, ObjectiveOptions, resolve_objective
from elbozoo.inference.svi import TrainingOptions, run_svi
from elbozoo.inference.weights import importance_weights, iwae
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

Z = 4.5
COPIES = 4000


def pair(model: str, guide: str, x: Tensor | None = None, **options: Any) -> tuple[Entry, Guide, Batch]:
    x = ez.load_data("iris").x[::5] if x is None else x
    entry = get_entry(model).from_data(x, seed=0, **options)
    rows = entry.arrange(x, entry.options).to(entry.dtype)
    with isolated(0):
        return entry, build_guide(guide, entry, rows, GuideOptions(initial_scale=0.5)), Batch.full(rows)


def loss_of(objective: str, particles: int, guide: Guide, **options: Any) -> Any:
    return OBJECTIVES[objective].build(particles, guide, ObjectiveOptions(**options))


def value(loss: Any, entry: Entry, guide: Guide, batch: Batch, seed: int = 1) -> float:
    with isolated(seed):
        return -float(loss.loss(entry, guide, batch))


def gradients(loss: Any, entry: Entry, guide: Guide, batch: Batch, seed: int = 1) -> dict[str, Tensor]:
    """Gradient of the objective, by parameter of the model and of the guide."""
    entry.zero_grad(), guide.zero_grad()
    with isolated(seed):
        loss.loss_and_grads(entry, guide, batch)
    named = [*entry.named_parameters(prefix="model"), *guide.named_parameters(prefix="guide")]
    return {name: -p.grad.clone() for name, p in named if p.grad is not None}


def largest_z(draws: Tensor, expected: Tensor | float = 0.0) -> float:
    """Largest distance of the mean of independent rows from what is expected, in standard errors."""
    return float(((draws.mean(0) - expected) / (draws.std(0) / math.sqrt(len(draws)))).abs().max())


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Noise that belongs to a row, whatever minibatch the row comes in."""

    def give(rows: int, particles: int, dim: int) -> list[Tensor]:
        noise = torch.randn(particles, rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        index = [torch.arange(rows)]
        monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda shape, **_: noise[:, index[0]])
        return [noise, index]

    return give


def parts_of(batch: Batch, size: int) -> list[Batch]:
    return [Batch(batch.x[i], i, batch.total) for i in torch.arange(batch.total).split(size)]


@pytest.mark.parametrize("objective", ["iwae", "reweighted-wake-sleep"])
def test_minibatches_are_unbiased(objective: str, same_noise: Any) -> None:
    """Value and gradients over a partition average to the full ones on the same noise (1e-10 relative); RenyiELBO and
    Pyro's way of weighing a whole minibatch do not."""
    entry, guide, batch = pair("ppca", "shared-diagonal-normal")
    noise, index = same_noise(batch.total, 5, 2)
    loss = loss_of(objective, 5, guide)
    full, full_gradient = value(loss, entry, guide, batch), gradients(loss, entry, guide, batch)

    def over_parts(other: Any) -> tuple[float, dict[str, Tensor]]:
        values, slopes = [], []
        for part in parts_of(batch, 6):
            index[0] = part.index
            values.append(value(other, entry, guide, part))
            slopes.append(gradients(other, entry, guide, part))
        return sum(values) / len(values), {name: sum(s[name] for s in slopes) / len(slopes) for name in slopes[0]}

    parts, parts_gradient = over_parts(loss)
    assert parts == pytest.approx(full, rel=1e-10)
    for name, slope in full_gradient.items():
        torch.testing.assert_close(parts_gradient[name], slope, rtol=1e-10, atol=1e-8)
    assert full == pytest.approx(by_hand(entry, guide, batch, noise), rel=1e-10)

    renyi = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    assert over_parts(renyi)[0] != pytest.approx(full, rel=1e-3)
    index[0] = batch.index
    log_weight = log_weights_by_hand(entry, guide, batch, noise)
    one_datum = float(torch.logsumexp(log_weight.sum(-1), 0)) - math.log(5)
    assert one_datum != pytest.approx(full, rel=1e-3)


def log_weights_by_hand(entry: Any, guide: Any, batch: Batch, noise: Tensor) -> Tensor:
    """Log p(x, z) - log q(z), (K, N), from the parameters and torch's normals alone."""
    with torch.no_grad():
        mean, log_scale = guide.sources["z"].values.expand(batch.total, -1).chunk(2, -1)
        z = mean + log_scale.exp() * noise
        log_q = Normal(mean, log_scale.exp()).log_prob(z).sum(-1)
        log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        x = Normal(z @ entry.loading.mT + entry.loc, entry.noise_scale)
        return log_prior + x.log_prob(batch.x).sum(-1) - log_q


def by_hand(entry: Any, guide: Any, batch: Batch, noise: Tensor) -> float:
    log_weight = log_weights_by_hand(entry, guide, batch, noise)
    return float((torch.logsumexp(log_weight, 0) - math.log(len(noise))).sum())


@pytest.mark.parametrize("objective", ["iwae", "beta"])
def test_one_draw_at_beta_one_is_pyros_elbo(objective: str) -> None:
    """Value and gradients at K = 1, or β = 1, are those of Trace_ELBO on the same noise (1e-10); at K = 2 not."""
    entry, guide, batch = pair("ppca", "amortized")
    pyros = Trace_ELBO(max_plate_nesting=1)
    ours = loss_of(objective, 1, guide)
    assert value(ours, entry, guide, batch) == pytest.approx(value(pyros, entry, guide, batch), rel=1e-10)
    with isolated(1):
        entry.zero_grad(), guide.zero_grad()
        pyros.differentiable_loss(entry, guide, batch).backward()
    expected = [p.grad.clone() for p in (*entry.parameters(), *guide.parameters())]
    for ours_slope, slope in zip(gradients(ours, entry, guide, batch).values(), expected, strict=True):
        torch.testing.assert_close(ours_slope, -slope, rtol=1e-10, atol=1e-8)
    two = loss_of("iwae", 2, guide)
    assert value(two, entry, guide, batch) != pytest.approx(value(pyros, entry, guide, batch), rel=1e-6)


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        ("ppca", "free-full-rank-normal"),
        ("hidden-markov-model", "free-categorical"),
        ("linear-gaussian-state-space", "amortized-diagonal-normal"),
        ("normal-mean", "diagonal-normal"),
    ],
)
def test_the_loss_is_the_bound_that_is_reported(model: str, guide: str) -> None:
    """On the same draws the loss and the summary of the weights are one number (1e-9 relative); on others two."""
    entry, q, batch = pair(model, guide)
    loss = loss_of("iwae", 8, q)
    weighed = float(iwae(importance_weights(entry, q, batch, 8, seed=1), 8).sum())
    assert value(loss, entry, q, batch) == pytest.approx(weighed, rel=1e-9)
    assert value(loss, entry, q, batch, seed=2) != pytest.approx(weighed, rel=1e-9)


def test_finite_latents_are_weighed_and_not_summed() -> None:
    """The mean weight of drawn components is p(x) of the row within 4.5 errors, and not half as much again."""
    entry, guide, batch, *_ = finite_case()
    with isolated(1), torch.no_grad():
        draws = draw(entry, guide, batch, 2)
        truth = float(entry.log_evidence(batch.x[:1]).exp())
        weights = (draws.log_joint() - draws.log_guide()).exp().mean(0)[:, None]
    assert largest_z(weights, truth) < Z < largest_z(weights, 1.5 * truth)


def test_the_bound_rises_with_the_number_of_draws_and_stays_below_the_evidence() -> None:
    """E[IWAE-1] < E[IWAE-5] < E[IWAE-50] <= log p(x), by z-bounds over 60 seeds; weights off by a third are above."""
    entry, guide, batch = pair("ppca", "free-diagonal-normal")
    truth = float(entry.log_evidence(batch.x).sum().detach())
    found = {
        k: torch.tensor([value(loss_of("iwae", k, guide), entry, guide, batch, s) for s in range(60)])
        for k in (1, 5, 50)
    }
    for few, many in ((1, 5), (5, 50)):
        assert z_below(found[few] - found[many]) > Z
    assert z_below(found[50] - truth) > Z
    assert z_below(0.66 * found[50] - truth) < -Z


def z_below(differences: Tensor) -> float:
    """Distance of the mean below zero, in standard errors."""
    return -float(differences.mean() / (differences.std() / math.sqrt(len(differences))))


# ---- gradients -------------------------------------------------------------------------------------------------------


def copies(offset: float, widening: float = 1.2) -> tuple[Entry, Any, Batch, MultivariateNormal]:
    """One row many times over, each with its own q: off the best diagonal normal by so much, and wider than it."""
    entry = get_entry("ppca").example(seed=0)
    row = entry.simulate(1, seed=3)[0]
    x = row.repeat(COPIES, 1)
    with isolated(0):
        guide: Any = build_guide("free-diagonal-normal", entry, x)
    posterior = entry.posterior(row)
    precision = posterior.precision_matrix[0].diagonal()
    start = torch.cat([posterior.mean[0] + offset, (widening * precision.rsqrt()).log()])
    with torch.no_grad():
        guide.sources["z"].values.copy_(start.detach().expand(COPIES, -1))
    return entry, guide, Batch.full(x), posterior


def copy_gradients(loss: Any, entry: Entry, guide: Any, batch: Batch, seed: int = 1) -> Tensor:
    """Gradient of each copy's own objective, (copies, P): independent draws."""
    return gradients(loss, entry, guide, batch, seed)["guide.sources.z.values"]


@pytest.mark.parametrize("gradient", ["reparameterised", "score"])
@pytest.mark.parametrize("particles", [1, 5])
def test_gradients_of_the_elbo_are_right_in_expectation(gradient: str, particles: int) -> None:
    """Both agree with the gradient of the closed-form KL to the posterior; without a draw's credit it is wrong."""
    entry, guide, batch, posterior = copies(offset=0.2)
    loss = loss_of("elbo", particles, guide, gradient=gradient)
    values = guide.sources["z"].values[:1].detach().clone().requires_grad_()
    mean, log_scale = values.chunk(2, -1)
    q = MultivariateNormal(mean, scale_tril=torch.diag_embed(log_scale.exp()))
    (exact,) = torch.autograd.grad(-kl_divergence(q, posterior).sum(), values)
    assert largest_z(copy_gradients(loss, entry, guide, batch), exact[0]) < Z

    class WithoutCredit(DrawnELBO):
        def credit(self, worth: Tensor) -> Tensor:
            return 0.1 * super().credit(worth)

    wrong = copy_gradients(WithoutCredit(particles, "score"), entry, guide, batch)
    assert largest_z(wrong, exact[0]) > Z


def test_a_score_is_noisier_than_a_path() -> None:
    """The reason for reparameterisation: plain scores have over ten times the variance, and a baseline helps them.

    Measured here: 20 to 25 times for one draw, and 2.9 to 4.6 times for five with the others' mean as baseline.
    """
    ratios = {}
    for particles in (1, 5):
        entry, guide, batch, _ = copies(offset=0.2)
        variances = [
            copy_gradients(loss_of("elbo", particles, guide, gradient=g), entry, guide, batch).var(0)
            for g in ("score", "reparameterised")
        ]
        ratios[particles] = variances[0] / variances[1]
    assert ratios[1].min() > 10
    assert ratios[5].mean() > 2
    assert ratios[5].max() < ratios[1].min()


@pytest.mark.parametrize("particles", [1, 5, 20])
def test_doubly_reparameterised_gradients_have_the_same_mean_and_less_noise(particles: int) -> None:
    """Means over copies agree within 4.5 errors and those of another bound do not; θ's gradient is the same (1e-9).

    The advantage grows with K (Tucker et al. 2019): measured variance ratios from 2 to 10, 14 to 35, and
    over 250 at K = 1, 5 and 20.
    """
    entry, guide, batch, _ = copies(offset=0.2)

    def found(gradient: str, count: int = particles, seed: int = 1) -> dict[str, Tensor]:
        return gradients(loss_of("iwae", count, guide, gradient=gradient), entry, guide, batch, seed)

    single, doubly = found("reparameterised"), found("doubly-reparameterised")
    q = "guide.sources.z.values"
    for name in (name for name in single if name != q):
        torch.testing.assert_close(single[name], doubly[name], rtol=1e-9, atol=1e-7)
    fresh = found("doubly-reparameterised", seed=2)[q]
    assert largest_z(single[q], fresh.mean(0)) < Z
    assert largest_z(found("doubly-reparameterised", count=particles + 1, seed=2)[q], single[q].mean(0)) > Z
    assert (single[q].var(0) / doubly[q].var(0)).min() > {1: 1.5, 5: 8, 20: 100}[particles]


def test_the_score_of_a_weighted_bound_is_right_in_expectation() -> None:
    """VIMCO's gradient agrees with the doubly reparameterised one; with the ELBO's credit it does not."""
    entry, guide, batch, _ = copies(offset=0.2)
    doubly = copy_gradients(ImportanceWeightedELBO(5, "doubly-reparameterised"), entry, guide, batch, seed=2)
    scored = copy_gradients(ImportanceWeightedELBO(5, "score"), entry, guide, batch)
    assert largest_z(scored, doubly.mean(0)) < Z

    class Wrong(ImportanceWeightedELBO):
        def credit(self, worth: Tensor) -> Tensor:
            return DrawnELBO.credit(self, worth)

    assert largest_z(copy_gradients(Wrong(5, "score"), entry, guide, batch), doubly.mean(0)) > Z


def finite_case() -> tuple[Entry, Any, Batch, Tensor, Tensor]:
    """A row of a mixture of three, its log p(x, c), and copies of it with one and the same wrong q."""
    entry = get_entry("gaussian-mixture").example(seed=0, components=3)
    row = entry.simulate(40, seed=1)[0]
    probs = entry.posterior(row).probs
    row = row[probs.amax(-1).argmin()][None]  # the row whose component is least certain
    x = row.repeat(COPIES, 1)
    with isolated(0):
        guide: Any = build_guide("free-categorical", entry, x)
    logits = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64)
    with torch.no_grad():
        guide.sources["z"].values.copy_(logits.expand(COPIES, -1))
    log_joint = (entry.posterior(row).logits + entry.log_evidence(row)[:, None])[0].detach()
    return entry, guide, Batch.full(x), log_joint, logits.requires_grad_()


def by_pairs(objective: str, log_joint: Tensor, logits: Tensor) -> Tensor:
    """Exact expected gradient at K = 2, every pair of values enumerated."""
    log_q = logits.log_softmax(-1)
    log_w = log_joint - log_q
    first, second = log_w[:, None], log_w[None, :]
    probability = (log_q[:, None] + log_q[None, :]).exp()
    if objective == "iwae":
        bound = torch.logaddexp(first, second) - math.log(2)
        return torch.autograd.grad((probability * bound).sum(), logits)[0]
    share = torch.softmax(torch.stack(torch.broadcast_tensors(first, second)), 0).detach()
    lesson = share[0] * log_q[:, None] + share[1] * log_q[None, :]
    return torch.autograd.grad((probability.detach() * lesson).sum(), logits)[0]


@pytest.mark.parametrize("objective", ["iwae", "reweighted-wake-sleep"])
def test_finite_latents_are_drawn_and_their_gradients_right_in_expectation(objective: str) -> None:
    """VIMCO and wake-φ agree with the enumeration of all pairs of draws; each other's expectation is refuted."""
    entry, guide, batch, log_joint, logits = finite_case()
    found = copy_gradients(loss_of(objective, 2, guide), entry, guide, batch)
    other = "reweighted-wake-sleep" if objective == "iwae" else "iwae"
    assert largest_z(found, by_pairs(objective, log_joint, logits)) < Z
    assert largest_z(found, by_pairs(other, log_joint, logits)) > Z


def test_wake_theta_is_the_weighted_bounds_own_gradient() -> None:
    """θ's gradient is that of iwae on the same draws (1e-9 relative); the guide's is another."""
    entry, guide, batch = pair("ppca", "amortized")
    wake = gradients(loss_of("reweighted-wake-sleep", 5, guide), entry, guide, batch)
    bound = gradients(loss_of("iwae", 5, guide), entry, guide, batch)
    for name in bound:
        close = torch.allclose(wake[name], bound[name], rtol=1e-9, atol=1e-9)
        assert close == name.startswith("model")


def test_sleep_has_nothing_to_teach_the_exact_posterior() -> None:
    """E[∇ log q(z given x)] over dreams vanishes where q is the posterior, within 4.5 errors; off it it does not.

    The encoder is linear and the posterior's covariance the same for every row, so that the exact one is among them.
    """
    x = ez.load_data("iris").x[:60]
    entry: Any = get_entry("ppca").from_data(x, seed=0)
    options = GuideOptions(encoder="linear", initial_scale=0.5)
    with isolated(0):
        guide: Any = build_guide("amortized-full-rank-normal", entry, x, options)
    batch, (head,) = Batch.full(x), guide.sources["z"].network
    source = guide.sources["z"]
    target = guide.families["z"].closest(entry.posterior(x)).detach()
    inputs = torch.cat([(x - source.mean) / source.scale, torch.ones(len(x), 1, dtype=x.dtype)], -1)
    solution = torch.linalg.lstsq(inputs, target).solution
    with torch.no_grad():
        head.weight.copy_(solution[:-1].mT)
        head.bias.copy_(solution[-1])
    loss = loss_of("reweighted-wake-sleep", 2, guide, sleep=1.0)

    def lessons() -> Tensor:
        draws = [gradients(loss, entry, guide, batch, seed) for seed in range(80)]
        return torch.stack([torch.cat([d[n].flatten() for n in d if n.startswith("guide")]) for d in draws])

    assert largest_z(lessons()) < Z
    with torch.no_grad():
        head.bias.add_(0.1)
    assert largest_z(lessons()) > Z


# ---- β and free bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["free-diagonal-normal", "free-full-rank-normal", "free-categorical"])
def test_closed_and_sampled_divergences_agree(guide: str) -> None:
    """Means over 2000 draws of each row's KL agree with its closed form within 4.5 errors; with another row's not.

    The closed form is Kingma & Welling's (2014, appendix B) for the diagonal normal, to 1e-10.
    """
    model = "gaussian-mixture" if guide == "free-categorical" else "ppca"
    entry, q, batch = pair(model, guide)
    with torch.no_grad():
        q.sources["z"].values.add_(torch.randn(q.sources["z"].values.shape, generator=torch.Generator().manual_seed(0)))
    with isolated(1), torch.no_grad():
        draws = draw(entry, q, batch, 2000)
    sampled = BetaELBO(2000).divergence(draws)
    closed = BetaELBO(2000, kl="analytic").divergence(draws)
    torch.testing.assert_close(closed, closed[:1].expand_as(closed), rtol=1e-10, atol=1e-10)
    assert largest_z(sampled, closed[0]) < Z
    assert largest_z(sampled, closed[0].roll(1)) > Z
    if guide == "free-diagonal-normal":
        mean, log_scale = q.sources["z"].values.detach().chunk(2, -1)
        formula = 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1)
        torch.testing.assert_close(closed[0], formula, rtol=1e-10, atol=1e-10)


ONE = torch.tensor(1.0, dtype=torch.float64)


@pytest.mark.parametrize("prior", [dist.Normal(ONE, 2 * ONE), dist.StudentT(3 * ONE)], ids=["normal", "student"])
def test_a_latent_number_has_a_closed_divergence_from_a_normal_prior_alone(prior: Any) -> None:
    """KL(N(0, 0.5²) ‖ N(1, 2²)) of a scalar by torch's formula (1e-10); a Student's prior is refused, and sampled."""

    class Scalar(PyroModule):
        def forward(self, batch: Batch) -> Tensor:
            with pyro.plate("data", batch.total, subsample=batch.index):
                z = pyro.sample("z", prior)
                return pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=batch.x)

    x = torch.zeros(3, 1, dtype=torch.float64)
    entry = program_entry(Scalar(), x)
    with isolated(0):
        guide: Any = build_guide("free-diagonal-normal", entry, x, GuideOptions(initial_scale=0.5))
        values = guide.sources["z"].values.detach()
        draws = draw(entry, guide, Batch.full(x), 2)
    assert torch.isfinite(BetaELBO(2, free_bits=0.1).divergence(draws)).all()
    closed = BetaELBO(2, kl="analytic")
    if isinstance(prior, dist.StudentT):
        with pytest.raises(InvalidInput, match="from Normal to StudentT, has no closed form; set kl=sampled"):
            closed.divergence(draws)
        return
    exact = kl_divergence(Normal(values[:, 0], values[:, 1].exp()), prior)
    torch.testing.assert_close(closed.divergence(draws)[0].detach(), exact, rtol=1e-10, atol=1e-10)


def test_the_objective_is_linear_in_beta() -> None:
    """At β it is reconstruction - β KL on the same draws (1e-10 relative), with either KL; at twice β another."""
    entry, guide, batch = pair("ppca", "mean-field")
    for kl in ("sampled", "analytic"):
        at = {b: value(loss_of("beta", 3, guide, kl_weight=b, kl=kl), entry, guide, batch) for b in (0.0, 1.0, 4.0)}
        assert at[4.0] == pytest.approx(at[0.0] + 4 * (at[1.0] - at[0.0]), rel=1e-10)
        assert at[4.0] != pytest.approx(at[0.0] + 8 * (at[1.0] - at[0.0]), rel=1e-3)


def test_free_bits_are_a_floor_of_each_dimension_averaged_over_the_batch() -> None:
    """Below λ a dimension counts as λ and has no gradient; above it, and where the mean over rows is, nothing changes.

    On the same draws, so to 1e-9.
    """
    entry, guide, batch = pair("ppca", "free-diagonal-normal")
    values: Tensor = guide.sources["z"].values  # type: ignore[assignment, index, union-attr]

    def at(free_bits: float, weight: float = 1.0) -> tuple[float, Tensor]:
        loss = loss_of("beta", 2, guide, kl="analytic", free_bits=free_bits, kl_weight=weight)
        slopes = gradients(loss, entry, guide, batch)
        return value(loss, entry, guide, batch), slopes["guide.sources.z.values"]

    with torch.no_grad():
        values.zero_()  # q is the prior, KL is nothing
    reconstruction = at(0.0, weight=0.0)
    floored = at(0.5)
    assert floored[0] == pytest.approx(reconstruction[0] - 0.5 * 2 * batch.total, rel=1e-9)
    with torch.no_grad():
        values[:, 0] = 1.5  # KL of the first dimension is 1.125 of each row, of the second nothing
    first_alone, slope = at(0.5)
    without, reconstruction_slope = at(0.0), at(0.0, weight=0.0)[1]
    assert first_alone == pytest.approx(without[0] - 0.5 * batch.total, rel=1e-9)
    torch.testing.assert_close(slope[:, [0, 2]], without[1][:, [0, 2]])
    torch.testing.assert_close(slope[:, [1, 3]], reconstruction_slope[:, [1, 3]])
    with torch.no_grad():
        values[:, 1] = 1.5
        values[: batch.total // 3, :2] = 0.0  # some rows below the floor, their mean above it
    assert at(0.5)[0] == pytest.approx(at(0.0)[0], rel=1e-9)
    assert at(1.0)[0] < at(0.0)[0] - 1.0


def test_schedules_have_the_published_values() -> None:
    """A rise to β and rest; four rises, each over half of its cycle (Fu et al. 2019); a constant."""
    annealed = Weighting(4.0, "annealed", steps=100)
    assert [annealed.at(s) for s in (0, 25, 50, 99, 100, 5000)] == pytest.approx([0, 1, 2, 3.96, 4, 4])
    cyclical = Weighting(1.0, "cyclical", steps=400, cycles=4)
    expected = {0: 0.0, 25: 0.5, 50: 1.0, 99: 1.0, 100: 0.0, 125: 0.5, 399: 1.0, 400: 1.0, 425: 1.0}
    assert [cyclical.at(s) for s in expected] == pytest.approx(list(expected.values()))
    assert [Weighting(0.3).at(s) for s in (0, 10_000)] == [0.3, 0.3]
    assert Weighting(0.3).moving_steps == 0 and cyclical.moving_steps == 400


def test_a_small_beta_prints_no_elbo_above_the_evidence() -> None:
    """The objective at β = 0.1 is above log p(x); the trajectory calls it no ELBO, and the ledger's stays below."""
    fit = ez.fit("ppca", "iris", guide="mean-field", objective="beta", kl_weight=0.1, steps=300, progress=False)
    ledger = fit.full_ledger()
    assert fit.objective == "beta" and fit.trajectory["elbo"].isna().all()
    assert fit.trajectory["objective"].iloc[-1] > ledger.log_evidence
    assert ledger.elbo < ledger.log_evidence - 6 * ledger.elbo_se
    plain = ez.fit("ppca", "iris", guide="mean-field", steps=5, progress=False)
    assert plain.trajectory["elbo"].notna().all()


# ---- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"objective": "iwae", "particles": 5},
        {"objective": "iwae", "particles": 5, "gradient": "doubly-reparameterised"},
        {"objective": "reweighted-wake-sleep", "particles": 20},
        {"objective": "reweighted-wake-sleep", "particles": 20, "sleep": 0.5},
        {"objective": "beta", "kl": "analytic", "kl_schedule": "annealed", "kl_steps": 300},
        {"objective": "elbo", "gradient": "score", "particles": 10},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_each_objective_reaches_the_maximum(options: dict[str, Any]) -> None:
    """log p(x) ends within 0.05 nats per datum of PPCA's closed-form maximum, where it starts over 0.3 below."""
    common = {"guide": "amortized", "latent_dim": 1, "progress": False}
    fit = ez.fit("ppca", "iris", steps=2500, **common, **options)
    ledger = fit.full_ledger()
    assert ledger.learning_gap < 0.05 * ledger.rows
    assert ledger.elbo <= ledger.log_evidence + 6 * ledger.elbo_se
    start = ez.fit("ppca", "iris", steps=1, **common)
    assert ledger.log_evidence - start.full_ledger().elbo > 0.3 * ledger.rows


@pytest.mark.slow
def test_free_bits_keep_what_the_elbo_empties() -> None:
    """On noise without structure the ELBO's KL falls to nothing; with 0.5 free nats a dimension keeps about those."""
    x = torch.randn(100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = {}
    for free_bits in (0.0, 0.5):
        options = {"objective": "beta", "kl": "analytic", "free_bits": free_bits}
        fit = ez.fit("ppca", x, guide="amortized", steps=1500, progress=False, **options)
        with isolated(1), torch.no_grad():
            draws = draw(fit.entry, fit.guide, Batch.full(x), 1)
        kept[free_bits] = float(BetaELBO(1, kl="analytic").divergence(draws).mean())
    assert kept[0.0] < 0.5 < 2 * 0.4 < kept[0.5]


def test_networks_in_single_precision_train_by_every_objective() -> None:
    """Ten steps each on binary digits: the objective is finite and rises; minibatches of 50."""
    x = ez.load_data("digits-binary").x[:200]
    for options in (
        {"objective": "iwae", "gradient": "doubly-reparameterised"},
        {"objective": "reweighted-wake-sleep", "sleep": 0.5},
        {"objective": "beta", "kl_weight": 4.0, "free_bits": 0.1, "kl": "analytic"},
        {"objective": "elbo", "gradient": "score"},
    ):
        fit = ez.fit("vae", x, guide="amortized", batch_size=50, steps=40, progress=False, **options)
        objective = fit.trajectory["objective"]
        assert objective.notna().all() and objective.tail(8).mean() > objective.head(8).mean()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "guide", "options", "message"),
    [
        ("ppca", "free-delta", {"objective": "iwae"}, "a point without a density.*use elbo"),
        ("ppca", "exact", {"objective": "reweighted-wake-sleep"}, "nothing to learn but θ"),
        ("ppca", "free-diagonal-normal", {"objective": "reweighted-wake-sleep", "sleep": 0.5}, "use an amortized"),
        ("ppca", "amortized", {"objective": "reweighted-wake-sleep", "particles": 1}, "at least 2"),
        ("ppca", "amortized", {"objective": "elbo", "kl_weight": 4.0}, "set objective=beta"),
        ("ppca", "amortized", {"objective": "iwae", "kl": "analytic"}, "set objective=elbo-analytic or beta"),
        ("ppca", "amortized", {"objective": "elbo", "sleep": 0.1}, "set objective=reweighted-wake-sleep"),
        ("ppca", "amortized", {"gradient": "doubly-reparameterised"}, "expected one of: auto, reparameterised, score"),
        ("gaussian-mixture", "free-categorical", {"objective": "iwae", "gradient": "reparameterised"}, "discrete"),
        ("gaussian-mixture", "free-categorical", {"objective": "elbo-analytic"}, "use elbo-enumerated"),
        ("normal-mean", "full-rank", {"objective": "beta", "free_bits": 1.0}, "each datum's own latents"),
        ("normal-mean", "flow", {"objective": "iwae", "gradient": "score"}, "single precision alone"),
        ("ppca", "mean-field", {"objective": "beta", "kl_schedule": "annealed"}, "kl_steps: found 2000 with steps=5"),
        ("normal-mean", "full-rank", {"objective": "iwae", "batch_size": 10}, "expected all 30 rows"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(
    model: str, guide: str, options: dict[str, Any], message: str
) -> None:
    """Before a step is taken, with the reason and what to do; the same objective on its own is taken."""
    entry, q, batch = pair(model, guide)
    training = TrainingOptions(steps=5, **options)
    with pytest.raises(InvalidInput, match=message) as caught, isolated(0):
        objective = resolve_objective(training.objective, q, training)
        run_svi(entry, q, objective, batch, training, progress=False)
    assert "\n" not in str(caught.value)
    amortized = pair("ppca", "amortized")[1]
    name = options.get("objective", "iwae")
    assert resolve_objective(name, amortized).name == name


def test_a_latent_of_the_whole_data_set_is_weighed_on_all_rows() -> None:
    """However many there are: minibatches would put their scale into the logarithm."""
    x = torch.randn(5000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    entry, guide, batch = pair("normal-mean", "diagonal-normal", x)
    seen: list[int] = []

    class Recording:
        def __init__(self, *_: Any) -> None:
            self.scale_learning_rate = lambda factor: None

        def __call__(self, batch: Batch) -> float:
            seen.append(len(batch.x))
            return 0.0

    options = TrainingOptions(steps=1)
    for name in ("iwae", "elbo"):
        with isolated(0):
            run_svi(entry, guide, OBJECTIVES[name], batch, options, progress=False, make_step=Recording)
    assert seen == [5000, 4096]
