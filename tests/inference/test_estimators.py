"""Estimators of log p(x) beside the exact answer: each covers it where it says so, and says so where it cannot."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import distributions as dist
from scipy import stats

import elbozoo as ez
from elbozoo.guides import Guide, build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.inference.best_member import best_member
from elbozoo.inference.estimators import ESTIMATORS, EvidenceEstimate, estimate_log_evidence, list_estimators
from elbozoo.inference.evidence import estimate_evidence, log_evidence
from elbozoo.inference.row_annealing import (
    RowProgram,
    at_constant_speed,
    forward_log_weights,
    pilot_path,
    reverse_log_weights,
)
from elbozoo.inference.weights import importance_weights, iwae
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.entry import Program
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.isolation import isolated

Z_BOUND = 5.0  # two-sided, normal: a false alarm of 6e-7 for each number compared
QUICK = {
    "prior": {"draws": 2000},
    "importance": {"draws": 1000},
    "iwae": {"draws": 2000, "particles": 100},
    "annealed": {"draws": 32, "temperatures": 40},
    "bidirectional": {"draws": 32, "temperatures": 40},
    "quadrature": {},
}


def load_study() -> Any:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "study_evidence.py"
    spec = importlib.util.spec_from_file_location("study_evidence", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def records() -> dict[tuple[int, str], dict[str, Any]]:
    """The study at 2 and 20 latent dimensions, eight rows."""
    found = load_study().evidence_study((2, 20), 8, QUICK)
    return {(r["latent_dim"], r["estimator"]): r for r in found}


def covers(record: dict[str, Any], truth: float) -> bool:
    """Whether ``truth`` is between the value and its shortfall, within five standard errors and rounding."""
    allowed = Z_BOUND * record["standard_error"] + 1e-9
    return bool(-allowed <= truth - record["value"] <= record["shortfall"] + allowed)


def test_each_covers_the_truth_at_its_stated_error(records: dict[tuple[int, str], dict[str, Any]]) -> None:
    """All six in two dimensions, and importance sampling in twenty; none covers a truth that is 5 nats away."""
    reliable = [r for r in records.values() if r["reliable"]]
    assert {r["estimator"] for r in reliable if r["latent_dim"] == 2} == set(ESTIMATORS)
    assert "importance" in {r["estimator"] for r in reliable if r["latent_dim"] == 20}
    for record in reliable:
        assert covers(record, record["truth"]), record
        assert not covers(record, record["truth"] + 10.0), record
        assert not covers(record, record["truth"] - 10.0), record
    assert json.loads(json.dumps(list(records.values())))


def test_the_naive_estimator_fails_in_twenty_dimensions_and_says_so(
    records: dict[tuple[int, str], dict[str, Any]],
) -> None:
    """Tens of standard errors below the truth, with about one effective draw, and a reason that says what to do."""
    naive = records[20, "prior"]
    assert not covers(naive, naive["truth"])
    assert naive["error"] < -10 * naive["standard_error"]
    assert not naive["reliable"]
    assert "effective draws of 2000, below 10" in naive["reason"] and "estimator='importance'" in naive["reason"]
    assert records[2, "prior"]["reliable"] and not records[2, "prior"]["reason"]
    assert abs(records[20, "importance"]["error"]) < 0.1 * abs(naive["error"])


def ppca(latent_dim: int, rows: int) -> tuple[Entry, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Model, rows, their latents, and the exact log p(x) of each row."""
    entry = get_entry("ppca").example(6, seed=latent_dim, latent_dim=latent_dim)
    x, z = entry.simulate(rows, seed=1)
    with torch.no_grad():
        return entry, x, z, entry.log_evidence(x)  # type: ignore[operator]


def diagonal_guide(entry: Entry, x: torch.Tensor) -> Guide:
    best = best_member(entry, "diagonal-normal", x, GuideOptions())
    assert best is not None
    return best.guide


def test_weights_are_unbiased_in_both_directions() -> None:
    """One row 2000 times, at sixteen temperatures: E[w] = p(x) forward, E[1/w] = 1/p(x) from draws of the posterior.

    The weights of so few temperatures spread; a path that lost or gained a fifth of a nat would fail.
    """
    entry, x, _, _ = ppca(2, 1)
    with torch.no_grad():  # less information, so that the weights have moments to test
        entry.loading.mul_(0.4)
        truth = entry.log_evidence(x)  # type: ignore[operator]
    x = x.expand(2000, -1)
    with isolated(0):
        program = RowProgram(entry, entry.latent_sites(x), Batch.full(x))
        path = pilot_path(program, 16)
        # One path for all, so that the copies are draws of one and the same weight.
        path = path._replace(powers=path.powers[:, :1].expand(-1, 2000), step_sizes=path.step_sizes[:, :1])
        forward = forward_log_weights(program, path, 1)[0] - truth
        with torch.no_grad():
            posterior_draw = entry.posterior(x).sample()[None]  # type: ignore[operator]
        reverse = truth - reverse_log_weights(program, path, posterior_draw, 1)[0]
    assert forward.std() > 0.2 and reverse.std() > 0.2  # or there were nothing to average
    for log_ratio in (forward, reverse):
        for lost, passes in ((0.0, True), (0.2, False), (-0.2, False)):
            ratio = (log_ratio + lost).exp()
            assert (abs(float(ratio.mean()) - 1) <= Z_BOUND * float(ratio.std()) / math.sqrt(2000)) is passes


def test_bidirectional_ends_close_in_on_the_truth() -> None:
    """Five temperatures leave the truth between two far ends, 150 bring them together; the wrong z breaks the upper."""
    entry, x, z, truth = ppca(4, 12)
    total = float(truth.sum())

    def ends(temperatures: int, latents: torch.Tensor) -> EvidenceEstimate:
        return estimate_log_evidence(
            entry, x, "bidirectional", latents=latents, draws=16, temperatures=temperatures, seed=2
        )

    far, near = ends(5, z), ends(150, z)
    assert far.upper is not None and near.upper is not None and near.upper.per_datum is not None
    assert far.value < total - 2.0 and far.upper.value > total + 2.0 and not far.reliable
    assert near.upper.value - near.value < 0.2 * (far.upper.value - far.value)
    low, high = near.interval(Z_BOUND)
    assert low <= total <= high
    assert near.upper.per_datum.shape == (12,)
    wrong = ends(5, z.roll(1, 0))
    assert wrong.upper is not None and wrong.upper.value < total - 2.0


def test_path_has_constant_speed() -> None:
    """A speed of 1/sqrt(β) puts β at the squares of equally spaced numbers; a constant one leaves them equal."""
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None] ** 4
    path = at_constant_speed(grid, grid.clamp(min=1e-12) ** -0.5 * (grid > 0), 1 + grid)
    expected = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None] ** 2
    # Absolute: the floor under the speed, 2 % of its mean, moves no β by more than that.
    assert (path.powers - expected).abs().max() <= 0.02
    assert (path.powers - expected.sqrt()).abs().max() > 0.02
    assert (path.step_sizes - 1 - path.powers).abs().max() <= 1e-12  # a linear step is interpolated exactly
    flat = at_constant_speed(grid, torch.zeros_like(grid), grid)
    assert (flat.powers - expected.sqrt()).abs().max() <= 1e-9
    assert (path.powers.diff(dim=0) >= 0).all() and path.powers[0] == 0.0 and path.powers[-1] == 1.0


def test_importance_and_iwae_are_summaries_of_the_same_weights() -> None:
    """They equal what the ledger's functions give for the same seed, to 1e-12 relative, and other seeds do not."""
    entry, x, _, truth = ppca(3, 20)
    guide = diagonal_guide(entry, x)
    weights = importance_weights(entry, guide, Batch.full(x), 1000, seed=4)
    found = estimate_log_evidence(entry, x, "importance", guide=guide, seed=4)
    assert found[:2] == pytest.approx(estimate_evidence(weights)[:2], rel=1e-12)
    bounds = [estimate_log_evidence(entry, x, "iwae", guide=guide, seed=4, particles=k).value for k in (1, 5, 50, 500)]
    assert bounds == pytest.approx([float(iwae(weights, k).sum()) for k in (1, 5, 50, 500)], rel=1e-12)
    assert bounds == sorted(bounds) and bounds[0] < float(truth.sum())
    other = estimate_log_evidence(entry, x, "importance", guide=guide, seed=5)
    assert other.value != pytest.approx(found.value, rel=1e-12)
    few = estimate_log_evidence(entry, x, "iwae", guide=guide, seed=4, particles=5)
    assert not few.reliable and "of 5, below 10" in few.reason
    assert few.interval() == (few.value - 2 * few.standard_error, math.inf)


def test_seeds_repeat_and_chunks_only_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit for a seed; in chunks of rows the values agree within five standard errors of both."""
    from elbozoo.inference import estimators as module

    entry, x, z, _ = ppca(2, 12)

    def run(name: str) -> EvidenceEstimate:
        latents = z if name == "bidirectional" else None
        options = {"temperatures": 30} if name != "prior" else {}
        return estimate_log_evidence(entry, x, name, draws=32, latents=latents, seed=3, **options)

    for name in ("prior", "annealed"):
        whole, again = run(name), run(name)
        assert torch.equal(whole.per_datum, again.per_datum)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(module, "CHUNK_ELEMENTS", 32 * 6 * 5)
            parts = run(name)
        assert parts.value != whole.value
        assert abs(parts.value - whole.value) <= Z_BOUND * math.hypot(parts.standard_error, whole.standard_error)


def waiting_times(batch: Batch) -> torch.Tensor:
    """Exponential times whose rates are gamma: a latent that is not real, with the evidence of a Lomax."""
    with pyro.plate("data", batch.total, subsample=batch.index):
        rate = pyro.sample("rate", dist.Gamma(batch.x.new_tensor([3.0]), batch.x.new_tensor([2.0])).to_event(1))
        return pyro.sample("x", dist.Exponential(rate).to_event(1), obs=batch.x)


def test_latents_that_are_not_real() -> None:
    """Annealing and both ends in the coordinates of a positive latent, against SciPy's Lomax distribution."""
    entry = Program(waiting_times, 1).double()
    x, z = entry.simulate(30, seed=0)
    truth = float(stats.lomax.logpdf(x.numpy(), 3.0, scale=2.0).sum())
    found = estimate_log_evidence(entry, x, "bidirectional", latents=z, temperatures=40, seed=1)
    assert found.reliable and found.upper is not None
    low, high = found.interval(Z_BOUND)
    assert low <= truth <= high and high - low < 5.0
    wrong = float(stats.lomax.logpdf(x.numpy(), 3.0, scale=0.8).sum())
    assert not low <= wrong <= high


@pytest.mark.parametrize("name", ["prior", "annealed", "quadrature"])
def test_one_latent_for_all_data(name: str) -> None:
    """Four rows of the conjugate normal: three estimators of a global latent cover the exact evidence of the set."""
    x = 0.5 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entry = get_entry("normal-mean").from_data(x)
    with torch.no_grad():
        truth = float(entry.log_evidence(x))  # type: ignore[operator]
    options = {"draws": 50_000} if name == "prior" else {}
    found = estimate_log_evidence(entry, x, name, seed=1, **options)
    assert found.per_datum is None and found.reliable
    assert found.kind == ("quadrature" if name == "quadrature" else "estimate")
    low, high = found.interval(Z_BOUND)
    assert low <= truth <= high
    assert not low <= truth - 1.0 <= high


def test_finite_latents_are_enumerated() -> None:
    """Of a mixture, importance sampling and IWAE are exact sums, and draws from the prior cover them."""
    x = ez.load_data("iris").x[::5]
    entry = get_entry("gaussian-mixture").from_data(x, components=2)
    with torch.no_grad():
        truth = float(entry.log_evidence(x).sum())  # type: ignore[operator]
    with isolated(0):
        guide = build_guide("mean-field", entry, x)
    for name in ("importance", "iwae"):
        found = estimate_log_evidence(entry, x, name, guide=guide)
        assert (found.kind, found.standard_error, found.reliable) == ("exact", 0.0, True)
        assert found.value == pytest.approx(truth, rel=1e-12)
    prior = estimate_log_evidence(entry, x, "prior")
    low, high = prior.interval(Z_BOUND)
    assert prior.reliable and low <= truth <= high and not low <= truth + 5.0 <= high


def test_quadrature_by_name_does_not_ask_the_oracle() -> None:
    """It integrates, though the entry knows the answer, and agrees within its error."""
    entry, x, _, truth = ppca(1, 10)
    found = estimate_log_evidence(entry, x, "quadrature")
    assert found.kind == "quadrature" and 0 < found.standard_error <= 1e-3
    assert abs(found.value - float(truth.sum())) <= found.standard_error
    assert abs(found.value - float(truth.sum()) - 0.01) > found.standard_error


def bounds_of_a_vae(rows: int, steps: int, evaluated: int, temperatures: int) -> None:
    fit = ez.fit(
        "vae", ez.load_data("digits-binary").x[:rows], guide="amortized", latent_dim=2, steps=steps, progress=False
    )
    x = fit.x[:evaluated]  # type: ignore[index]

    def of(name: str, **options: int) -> EvidenceEstimate:
        return estimate_log_evidence(fit.entry, x, name, guide=fit.guide, seed=1, **options)

    exact = log_evidence(fit.entry, x)
    assert exact is not None and exact.kind == "quadrature"
    ladder = [of("iwae", particles=k, draws=2000) for k in (1, 5, 50)]  # IWAE-1 is the ELBO
    for lower, upper in zip(ladder, [*ladder[1:], of("quadrature")], strict=True):
        assert lower.value <= upper.value + Z_BOUND * math.hypot(lower.standard_error, upper.standard_error)
    assert ladder[0].value < exact.value - Z_BOUND * ladder[0].standard_error  # and not all the same
    annealed = of("annealed", temperatures=temperatures)
    assert annealed.reliable and annealed.per_datum is not None and exact.per_datum is not None
    assert abs(annealed.value - exact.value) <= 0.05 * evaluated
    assert abs(annealed.value - exact.value) <= annealed.shortfall + Z_BOUND * annealed.standard_error
    assert abs(ladder[0].value - exact.value) > 0.05 * evaluated  # the ELBO would not pass for it


def test_bounds_of_a_small_vae_are_ordered() -> None:
    """ELBO <= IWAE-5 <= IWAE-50 <= exact within errors, and annealing within 0.05 nats per datum of it."""
    bounds_of_a_vae(rows=200, steps=150, evaluated=24, temperatures=80)


@pytest.mark.slow
def test_bounds_of_a_vae_on_all_digits_are_ordered() -> None:
    """The same after a longer training on all 1,797 digits."""
    bounds_of_a_vae(rows=1797, steps=2000, evaluated=200, temperatures=500)


def test_what_does_not_apply_is_refused() -> None:
    """One line each: what was found, what was expected, and which estimators there are instead."""
    entry, x, z, _ = ppca(3, 5)
    with pytest.raises(InvalidInput, match=r"unknown estimator 'anealed'; did you mean 'annealed'"):
        estimate_log_evidence(entry, x, "anealed")
    with pytest.raises(InvalidInput, match="option temperatures: found it for estimator 'prior', expected draws"):
        estimate_log_evidence(entry, x, "prior", temperatures=10)
    with pytest.raises(InvalidInput, match="option draws: found 1, expected"):
        estimate_log_evidence(entry, x, "prior", draws=1)
    with pytest.raises(InvalidInput, match=r"there is no guide; estimators that do: prior, annealed, bidirectional$"):
        estimate_log_evidence(entry, x, "importance")
    with isolated(0):
        delta, guide = build_guide("free-delta", entry, x), build_guide("mean-field", entry, x)
    with pytest.raises(InvalidInput, match="guide 'free-delta' has no density"):
        estimate_log_evidence(entry, x, "iwae", guide=delta)
    with pytest.raises(InvalidInput, match=r"found 20 for bounds of 50 particles, expected at least 100"):
        estimate_log_evidence(entry, x, "iwae", guide=guide, draws=20)
    with pytest.raises(InvalidInput, match="more real dimensions than an integral"):
        estimate_log_evidence(entry, x, "quadrature")
    with pytest.raises(InvalidInput, match=r"found rows without their latents, expected latents=z"):
        estimate_log_evidence(entry, x, "bidirectional")
    with pytest.raises(InvalidInput, match=r"found latents of shape \(4, 3\) for 'z', expected \(5, 3\)"):
        estimate_log_evidence(entry, x, "bidirectional", latents=z[:4])
    mixture = get_entry("gaussian-mixture").from_data(x, components=2, covariance="spherical")
    with pytest.raises(InvalidInput, match="the latent 'z' is discrete, and its chains follow gradients"):
        estimate_log_evidence(mixture, x, "annealed")
    mean = get_entry("normal-mean").from_data(x)
    with pytest.raises(InvalidInput, match="only latents of rows have chains back"):
        estimate_log_evidence(mean, x, "bidirectional", latents=z)
    table = list_estimators(entry)
    assert table.index.tolist() == list(ESTIMATORS)
    assert table.index[table["fits"]].tolist() == ["prior", "annealed", "bidirectional"]


def far_away(batch: Batch) -> torch.Tensor:
    """Uniform about a normal latent: no draw of the prior can have made 100."""
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False).to_event(1), obs=batch.x)


@pytest.mark.parametrize("name", ["prior", "annealed"])
def test_weights_that_are_all_zero_are_a_clear_failure(name: str) -> None:
    """Never NaN or minus infinity in a table."""
    entry = Program(far_away, 1).double()
    x = torch.tensor([[0.0], [100.0]], dtype=torch.float64)
    with pytest.raises(NumericalFailure, match=r"row 2 are zero|cannot start: the log joint is -inf"):
        estimate_log_evidence(entry, x, name, draws=20)


def test_a_fit_answers_by_any_estimator_and_shows_the_anatomy_of_its_bound() -> None:
    """Within five standard errors and the shortfall of the truth; rate + distortion = −ELBO within six errors."""
    fit = ez.fit("ppca", "iris", guide="mean-field", steps=200)
    truth = fit.log_evidence()
    assert truth is not None and truth.kind == "exact"
    found = fit.log_evidence(estimator="importance", draws=2000)
    assert isinstance(found, EvidenceEstimate) and found.estimator == "importance"
    assert abs(found.value - truth.value) <= 5 * found.standard_error + found.shortfall
    assert abs(found.value - truth.value - 20) > 5 * found.standard_error + found.shortfall
    with pytest.raises(InvalidInput, match="unknown estimator 'importence'; did you mean 'importance'"):
        fit.log_evidence(estimator="importence")
    parts = fit.anatomy()
    error = math.hypot(parts.elbo_se, fit.full_ledger().elbo_se)
    assert abs(parts.rate.total + parts.distortion.total + fit.elbo()) <= 6 * error
    assert abs(parts.rate.total + parts.distortion.total + fit.elbo() + 20) > 6 * error
