"""What a guide sees while it is trained: one corruption in each step under every loss; and the ELBO of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, logsumexp
from torch import Tensor

import elbozoo as ez
from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.registry import build_guide
from elbozoo.inference.corruption import Corrupted, denoising_elbo, renew, seeing
from elbozoo.inference.objectives import OBJECTIVES, ObjectiveOptions
from elbozoo.inference.steps import PyroStep
from elbozoo.inference.training import TrainingOptions
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.entry import Corrupts, Entry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.denoising_autoencoder import DenoisingAutoencoder

Z = 5.0  # standard errors: two-sided false-alarm rate 6e-7 per comparison


def denoising_vae(columns: int = 6, **options: object) -> DenoisingAutoencoder:
    """Entry with random parameters and a normal prior, float64."""
    options = {"prior": "normal", "hidden": 5, "corruption": "masking", "corruption_level": 0.6, **options}
    return DenoisingAutoencoder.example(columns, seed=1, **options).double()


def eager_guide(entry: Entry, x: Tensor, name: str = "amortized-diagonal-normal", weight: float = 0.6) -> Guide:
    """Encoder with large random weights, so that what it says depends on what it sees."""
    with isolated(2):
        guide = build_guide(name, entry, x, GuideOptions(hidden=8, initial_scale=0.1)).double()
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(weight * torch.randn_like(parameter))
    return guide


def ones_more(x: Tensor) -> Tensor:
    return x + 1


# ---- what it sees ----------------------------------------------------------------------------------------------------


def test_one_evaluation_sees_one_corruption() -> None:
    """The same for the same tensor until renewed, another for other rows; all else about the guide is as it was."""
    entry = denoising_vae()
    x, _ = entry.simulate(9, seed=0)
    guide = eager_guide(entry, x)
    assert isinstance(entry, Corrupts)
    seen = seeing(guide, entry)
    assert isinstance(seen, Corrupted)
    first = seen.seen(x)
    assert seen.seen(x) is first and not torch.equal(first, x)
    assert not torch.equal(seen.seen(x.clone()), first)  # other rows, if of equal values
    assert seen.seen(x) is first
    renew(seen)
    assert not torch.equal(seen.seen(x), first)
    assert (seen.name, seen.family, seen.is_bound, seen.summed_out) == (guide.name, guide.family, True, ())
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = seen.no_such_thing


def test_entries_that_corrupt_nothing_have_their_guide_as_it_is() -> None:
    entry = get_entry("vae").example().double()
    x, _ = entry.simulate(9, seed=0)
    guide = eager_guide(entry, x)
    assert not isinstance(entry, Corrupts)
    assert seeing(guide, entry) is guide
    renew(guide)
    assert math.isnan(denoising_elbo(entry, guide, x, seed=0).value)


@pytest.mark.parametrize(
    ("options", "draws_per_step"),
    [
        ({}, 1),
        ({"gradient": "score"}, 1),
        ({"kl": "analytic"}, 1),
        ({"objective": "beta", "kl_weight": 2.0}, 1),
        ({"objective": "iwae", "gradient": "doubly-reparameterised"}, 1),
        ({"objective": "reweighted-wake-sleep", "sleep": 0.5}, 2),  # the rows, and what the model dreams
    ],
)
def test_every_step_draws_afresh_and_once(options: dict[str, object], draws_per_step: int) -> None:
    """Although a loss may call the guide several times, and a full batch is the same tensor at every step."""
    entry = denoising_vae()
    entry = entry.float()
    x = entry.simulate(12, seed=0)[0].float()
    with isolated(3):
        guide = build_guide("amortized-diagonal-normal", entry, x, GuideOptions(hidden=4))
        parsed = TrainingOptions(**options)
        name = "elbo-analytic" if parsed.kl == "analytic" else parsed.objective.replace("auto", "elbo")
        step = PyroStep(entry, guide, OBJECTIVES[name], 3, parsed)
        corrupt, drawn = step.seeing_guide.corrupt, []

        def counted(rows: Tensor) -> Tensor:
            drawn.append(corrupt(rows))
            return drawn[-1]

        step.seeing_guide.corrupt = counted
        batch = Batch.full(x)
        before = [parameter.detach().clone() for parameter in guide.parameters()]
        for _ in range(3):
            assert math.isfinite(step(batch))
    assert len(drawn) == 3 * draws_per_step
    assert not torch.equal(drawn[0], drawn[draws_per_step])
    assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


# ---- every loss is that of the denoising criterion -------------------------------------------------------------------

LOSSES: list[tuple[str, ObjectiveOptions]] = [
    ("elbo", ObjectiveOptions()),
    ("elbo", ObjectiveOptions(gradient="score")),
    ("elbo-analytic", ObjectiveOptions()),
    ("beta", ObjectiveOptions(kl="analytic")),
]


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_losses_have_the_denoising_elbo_as_expectation(name: str, options: ObjectiveOptions) -> None:
    """Within 5 standard errors over 150 corruptions of 12 rows; the guide on clean rows is not."""
    entry = denoising_vae()
    x, _ = entry.simulate(12, seed=0)
    guide, batch = eager_guide(entry, x), Batch.full(x)
    expected = denoising_elbo(entry, guide, x, seed=4, draws=3000)

    def mean(seen: Guide | Corrupted) -> tuple[float, float]:
        values = []
        with isolated(5), torch.no_grad():
            loss = OBJECTIVES[name].build(5, guide, options)(entry, seen)
            for _ in range(150):
                renew(seen)
                values.append(-float(loss(batch)))
        return float(np.mean(values)), float(np.std(values) / math.sqrt(len(values)))

    def differs(found: tuple[float, float]) -> bool:
        return abs(found[0] - expected.value) > Z * math.hypot(found[1], expected.standard_error)

    assert not differs(mean(seeing(guide, entry)))
    assert differs(mean(guide))  # negative control: clean rows


def test_density_and_draws_are_of_one_corruption() -> None:
    """Where a loss draws first and weighs later, two corruptions would give the density of a q that was not drawn from.

    Negative control: a wrapper that forgets between calls is off by far more than 5 standard errors.
    """
    entry = denoising_vae()
    x, _ = entry.simulate(12, seed=0)
    guide, batch = eager_guide(entry, x), Batch.full(x)
    expected = denoising_elbo(entry, guide, x, seed=4, draws=3000)

    class Forgetful(Corrupted):
        def seen(self, x: Tensor) -> Tensor:
            return self.corrupt(x)

    def error_in_z(seen: Corrupted) -> float:
        with isolated(5), torch.no_grad():
            loss = OBJECTIVES["elbo"].build(5, guide, ObjectiveOptions(gradient="score"))(entry, seen)
            values = []
            for _ in range(100):
                seen.renew()
                values.append(-float(loss(batch)))
        spread = math.hypot(float(np.std(values)) / math.sqrt(len(values)), expected.standard_error)
        return abs(float(np.mean(values)) - expected.value) / spread

    assert error_in_z(Corrupted(guide, entry.corrupt)) < Z
    assert error_in_z(Forgetful(guide, entry.corrupt)) > Z


def test_an_enumerated_loss_sums_over_q_of_the_corrupted_rows() -> None:
    """A mixture by SciPy: Σ_k q(k given x̃) (log p(x, k) - log q(k given x̃)), to 1e-9 relative; clean rows are not."""
    entry = get_entry("gaussian-mixture").example(seed=1)
    x, _ = entry.simulate(10, seed=2)
    guide, batch = eager_guide(entry, x, "amortized-categorical"), Batch.full(x)
    noise = torch.randn(10, entry.columns, dtype=x.dtype)
    with torch.no_grad():
        means, covariances, weights = entry.means.numpy(), entry.covariances.numpy(), entry.weights.numpy()
        log_joint = np.stack(
            [
                stats.multivariate_normal(mean, covariance).logpdf(x.numpy()) + np.log(weight)
                for mean, covariance, weight in zip(means, covariances, weights, strict=True)
            ],
            -1,
        )

        def expected(rows: Tensor) -> float:
            (q,) = guide.distributions(Batch.full(rows)).values()
            return float((q.probs.numpy() * (log_joint - np.log(q.probs.numpy()))).sum())

    with isolated(0):
        loss = OBJECTIVES["elbo-enumerated"].build(1, guide)(entry, Corrupted(guide, lambda rows: rows + noise))
        found = -float(loss(batch).detach())
    with torch.no_grad():
        assert found == pytest.approx(expected(x + noise), rel=1e-9)
        assert found != pytest.approx(expected(x), rel=1e-3)


@pytest.mark.parametrize("guide_name", ["amortized-delta", "amortized-full-rank-normal"])
def test_minibatches_see_their_own_rows_corrupted(guide_name: str) -> None:
    """With a corruption that is no chance: the mean over thirds is the whole to 1e-9 relative, if nothing is drawn."""
    entry = denoising_vae(likelihood="normal")
    x, _ = entry.simulate(12, seed=0)
    guide = eager_guide(entry, x, guide_name)

    def loss(batch: Batch, corrupt: Callable[[Tensor], Tensor]) -> float:
        with isolated(7), torch.no_grad():
            return float(OBJECTIVES["elbo"].build(1, guide)(entry, Corrupted(guide, corrupt))(batch))

    whole = loss(Batch.full(x), ones_more)
    parts = [loss(Batch(x[index], index, 12), ones_more) for index in torch.arange(12).split(4)]
    clean = loss(Batch.full(x), lambda rows: rows)
    if guide_name == "amortized-delta":
        assert sum(parts) / 3 == pytest.approx(whole, rel=1e-9)
    assert all(math.isfinite(part) for part in parts)
    assert clean != pytest.approx(whole, rel=1e-3)  # negative control: the clean rows


# ---- the ELBO of the denoising criterion -----------------------------------------------------------------------------


def on_a_grid(entry: DenoisingAutoencoder, guide: Guide, row: Tensor) -> dict[str, float]:
    """Figures of one row of zeros and ones by enumerating all masks, with integrals over one z by a grid, in NumPy."""
    z = np.linspace(-12.0, 12.0, 4001)
    step, level = z[1] - z[0], entry.options.corruption_level
    first, last = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (entry.decoder[0], entry.decoder[2])
    )
    probability = expit(np.tanh(z[:, None] @ first[0].T + first[1]) @ last[0].T + last[1])
    x = row.numpy()
    log_joint = stats.bernoulli.logpmf(x.astype(int), probability).sum(-1) + stats.norm.logpdf(z)
    denoising, information, densities = 0.0, 0.0, []
    for mask in itertools.product([0.0, 1.0], repeat=len(x)):
        share = np.prod([level if hit else 1 - level for hit in mask])
        seen = row * (1 - torch.tensor(mask, dtype=row.dtype))
        with torch.no_grad():
            (q,) = guide.distributions(Batch.full(seen[None])).values()
        log_q = stats.norm.logpdf(z, float(q.mean), float(q.stddev))
        densities.append((share, log_q))
        denoising += share * float(np.exp(log_q) @ (log_joint - log_q)) * step
    log_mixture = logsumexp([math.log(share) + log_q for share, log_q in densities], axis=0)
    for share, log_q in densities:
        information += share * float(np.exp(log_q) @ (log_q - log_mixture)) * step
    with torch.no_grad():
        (clean,) = guide.distributions(Batch.full(row[None])).values()
    log_clean = stats.norm.logpdf(z, float(clean.mean), float(clean.stddev))
    return {
        "denoising": denoising,
        "information": information,
        "mixture": float(np.exp(log_mixture) @ (log_joint - log_mixture)) * step,
        "elbo": float(np.exp(log_clean) @ (log_joint - log_clean)) * step,
        "evidence": float(logsumexp(log_joint) + math.log(step)),
    }


def test_denoising_elbo_is_the_mean_over_all_corruptions_and_a_bound() -> None:
    """Four cells have 16 masks: L = Σ p(mask) ELBO(mask) by NumPy, within 5 standard errors of 4000 draws.

    On the grid, to 1e-7 nats (trapezia of analytic functions that vanish at its ends): log p(x) is at least the
    ELBO of the mixture of all q, which is L plus the information that z has about the mask.
    """
    entry = denoising_vae(4, latent_dim=1, corruption_level=0.4)
    x, _ = entry.simulate(5, seed=0)
    guide = eager_guide(entry, x, weight=0.2)
    figures = [on_a_grid(entry, guide, row) for row in x]
    total = {key: sum(figure[key] for figure in figures) for key in figures[0]}
    found = denoising_elbo(entry, guide, x, seed=1, draws=4000)
    assert abs(found.value - total["denoising"]) < Z * found.standard_error
    assert abs(found.value - total["elbo"]) > Z * found.standard_error  # negative control: the clean rows
    for each in figures:
        assert each["information"] > 1e-3
        assert each["mixture"] == pytest.approx(each["denoising"] + each["information"], abs=1e-7)
        assert each["mixture"] != pytest.approx(each["denoising"], abs=1e-7)  # negative control
        assert each["denoising"] < each["mixture"] <= each["evidence"] + 1e-7
    weights = importance_weights(entry, guide, Batch.full(x), 4000, 1).elbo()
    error = float((weights.var(0) / 4000).sum().sqrt())
    assert abs(float(weights.mean(0).sum()) - total["elbo"]) < Z * error


def test_standard_error_counts_corruption_and_draw() -> None:
    """Over 60 seeds the values scatter as much as the error says: the ratio of variances within a z-bound of 5.

    A variance of 60 normal values has a relative standard error of sqrt(2 / 59); draws of z alone would be less.
    """
    entry = denoising_vae()
    x, _ = entry.simulate(8, seed=0)
    guide = eager_guide(entry, x)
    found = [denoising_elbo(entry, guide, x, seed=seed, draws=100) for seed in range(60)]
    ratio = np.var([f.value for f in found], ddof=1) / np.mean([f.standard_error**2 for f in found])
    bound = 5 * math.sqrt(2 / 59)
    assert abs(ratio - 1) < bound
    assert abs(ratio / 0.3 - 1) > bound  # negative control: an error that counts a third of the variance
    again = denoising_elbo(entry, guide, x, seed=0, draws=100)
    assert again == found[0] and again != found[1]


def test_draws_in_several_blocks_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large data set is corrupted piece by piece: another estimate of the same number, with the same error."""
    entry = denoising_vae(likelihood="normal")
    x, _ = entry.simulate(8, seed=0)
    guide = eager_guide(entry, x)
    whole = denoising_elbo(entry, guide, x, seed=0, draws=500)
    monkeypatch.setattr("elbozoo.inference.corruption.CHUNK_ELEMENTS", 48 * 7)
    parts = denoising_elbo(entry, guide, x, seed=0, draws=500)
    assert parts.value != whole.value
    assert abs(parts.value - whole.value) < Z * math.hypot(parts.standard_error, whole.standard_error)
    assert parts.standard_error == pytest.approx(whole.standard_error, rel=0.2)


def test_a_fit_has_both_figures_in_two_columns() -> None:
    """The ELBO sees clean rows, the other corrupted ones; without corruption they agree; the trajectory has neither."""
    options = {"likelihood": "normal", "hidden": 8, "latent_dim": 1, "steps": 60, "progress": False}
    model = "denoising-autoencoder"

    def compared(**more: object) -> ez.Comparison:
        return ez.compare(model, "iris", methods=["amortized"], seeds=1, **options, **more)

    noisy = compared(prior="normal", corruption="gaussian", corruption_level=1.5)
    row, (fit,) = noisy.table.iloc[0], noisy.fits
    assert row["denoising_elbo"] == fit.denoising_elbo().value and row["elbo"] == fit.elbo()
    spread = math.hypot(row["denoising_elbo_se"], row["elbo_se"])
    assert row["denoising_elbo"] < row["elbo"] - Z * spread
    assert row["denoising_elbo"] < row["log_evidence"] and row["log_evidence_kind"] == "quadrature"
    assert fit.trajectory["elbo"].isna().all() and fit.trajectory["objective"].notna().all()
    assert "denoising_elbo" not in noisy.document()["rows"][0]  # the schema is fixed
    other = fit.denoising_elbo(seed=99)
    assert other != fit.denoising_elbo()
    assert abs(other.value - row["denoising_elbo"]) < Z * math.hypot(other.standard_error, row["denoising_elbo_se"])

    clean = compared(prior="normal", corruption_level=0.0).table.iloc[0]
    spread = math.hypot(clean["denoising_elbo_se"], clean["elbo_se"])
    assert abs(clean["denoising_elbo"] - clean["elbo"]) < Z * spread
    flat = compared().table.iloc[0]
    assert math.isnan(flat["denoising_elbo"]) and math.isnan(flat["elbo"]) and not flat["is_bound"]
