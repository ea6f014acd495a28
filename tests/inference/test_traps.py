"""Each known trap: it is there, in Pyro, PyTorch or ArviZ, and elbozoo does not fall into it.

The first half of a test shows the trap itself, so that it also tells when a new version has closed it. Monte Carlo
statements are z-bounds: beyond 4.5 standard errors on one side, which chance does in fewer than 4 of a million runs;
seeds are fixed, so a run that passes passes again on the same machine.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pytest
import torch
from packaging.version import Version
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.importance import psis_diagnostic
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import elbozoo as ez
from elbozoo.guides import Guide, GuideOptions, build_guide
from elbozoo.guides.autoguides import AUTOGUIDES
from elbozoo.inference.best_member import best_member
from elbozoo.inference.comparison import ROW, TABLE_ONLY
from elbozoo.inference.diagnostics import THRESHOLD, k_hat
from elbozoo.inference.divergence import kl_to_posterior
from elbozoo.inference.evidence import estimate_evidence, log_evidence
from elbozoo.inference.fit import Fit
from elbozoo.inference.objectives import OBJECTIVES
from elbozoo.inference.svi import TrainingOptions, run_svi
from elbozoo.inference.weights import importance_weights, iwae, log_joint
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.entry import Program
from elbozoo.models.contract.isolation import isolated

Z = 4.5
ROOT = Path(__file__).resolve().parents[2]


def z_score(values: Tensor, expected: float = 0.0) -> float:
    """Distance of the mean of independent ``values`` from ``expected``, in standard errors."""
    return float((values.mean() - expected) / (values.std() / len(values) ** 0.5))


def simulated(model: str, rows: int, **options: Any) -> tuple[Entry, Tensor, Tensor]:
    entry = get_entry(model).example(seed=0, **options)
    x, z = entry.simulate(rows, seed=1)
    assert isinstance(z, Tensor)
    return entry, x, z


@pytest.fixture
def store_of_its_own() -> Iterator[None]:
    """Let Pyro's own way of working fill a parameter store that is thrown away."""
    with pyro.get_param_store().scope():
        yield


# ---- importance-weighted bounds on a subsampled plate ----------------------------------------------------------------


def minibatches(x: Tensor, size: int, count: int) -> list[Batch]:
    order = torch.stack([torch.randperm(len(x))[:size] for _ in range(count)])
    return [Batch(x[index], index, len(x)) for index in order]


def test_renyi_elbo_of_a_minibatch_is_above_the_evidence_and_ours_is_not(store_of_its_own: None) -> None:
    """pyro#2220: the plate's scale ends up inside the logsumexp. Each minibatch is held against its own evidence."""
    entry, x, _ = simulated("ppca", 1000)
    guide = diagonal_normal(entry, x)
    exact = log_evidence(entry, x)
    assert exact is not None and exact.kind == "exact" and exact.per_datum is not None
    renyi = RenyiELBO(alpha=0, num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    above_renyi, above_ours = [], []
    with torch.no_grad():
        for number, batch in enumerate(minibatches(x, 100, 30)):
            truth = 10 * exact.per_datum[batch.index].sum()
            above_renyi.append(-renyi.loss(entry, guide, batch) - truth)
            above_ours.append(10 * iwae(importance_weights(entry, guide, batch, 20, seed=number), 20).sum() - truth)
        full_renyi = torch.tensor([-renyi.loss(entry, guide, Batch.full(x)) for _ in range(10)])

    assert z_score(torch.tensor(above_renyi)) > Z, "the trap is closed: RenyiELBO respects the plate's scale"
    assert z_score(full_renyi, exact.value) < Z, "without subsampling RenyiELBO is a bound"
    ours = torch.tensor(above_ours)
    assert z_score(ours) < Z
    assert ours.mean() > -10, "a bound 10 nats below, where the ELBO is 3 below, would be below for another reason"


def test_our_bounds_are_ordered() -> None:
    """ELBO < IWAE-10 < IWAE-100 < evidence on 1000 rows, by the same draws; a log weight off by 1% is above it."""
    entry, x, _ = simulated("ppca", 1000)
    exact = log_evidence(entry, x)
    assert exact is not None
    weights = importance_weights(entry, diagonal_normal(entry, x), Batch.full(x), 1000, seed=0)
    bounds = [float(iwae(weights, particles).sum()) for particles in (1, 10, 100, 1000)]
    error = estimate_evidence(weights).standard_error
    assert bounds[0] == pytest.approx(float(weights.elbo().mean(0).sum()), rel=1e-12)
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(estimate_evidence(weights).value, rel=1e-12)
    assert -2 < bounds[-1] - exact.value < Z * error
    wrong = weights._replace(log_weight=0.99 * weights.log_weight)
    assert float(iwae(wrong, 1000).sum()) - exact.value > Z * error


def diagonal_normal(entry: Entry, x: Tensor) -> Guide:
    """Return the best q that ignores correlation: good, and not exact."""
    best = best_member(entry, "diagonal-normal", x, GuideOptions())
    assert best is not None
    return best.guide


# ---- one q per datum under minibatches -------------------------------------------------------------------------------


def test_autonormal_on_a_subsampled_plate_learns_no_row_and_ours_learns_each() -> None:
    """pyro#3468. Over 100 rows chance correlates two unrelated columns beyond 0.5 in one of 10 million runs."""
    entry, x, z = simulated("ppca", 100, latent_dim=1)
    entry.requires_grad_(False)

    def correlation(guide: Any) -> float:
        options = TrainingOptions(batch_size=20, steps=250, learning_rate=0.05, schedule="constant", particles=2)
        run_svi(entry, guide, OBJECTIVES["elbo"], Batch.full(x), options, progress=False)
        mean = guide.locs.z if isinstance(guide, AutoNormal) else guide.distributions(Batch.full(x))["z"].mean
        return float(np.corrcoef(mean.detach().flatten(), z.flatten())[0, 1])

    with isolated(0):
        assert abs(correlation(auto_normal(entry, x))) < 0.5, "the trap is closed: AutoNormal follows the subsample"
    with isolated(0):
        plates = auto_normal(entry, x, create_plates=lambda b: pyro.plate("data", b.total, subsample=b.index))
        assert correlation(plates) > 0.9
    with isolated(0):
        assert correlation(build_guide("mean-field", entry, x)) > 0.9


def auto_normal(entry: Entry, x: Tensor, **arguments: Any) -> Any:
    """Return Pyro's guide, set up on a first minibatch, with the attributes that our loop reads."""
    guide = AutoNormal(entry, **arguments)
    guide(Batch(x[:20], torch.arange(20), len(x)))
    guide.double()
    guide.is_discrete, guide.is_bound, guide.source, guide.name = False, True, "free", "AutoNormal"
    guide.summed_out = ()
    return guide


# ---- k-hat -----------------------------------------------------------------------------------------------------------


def test_khat_over_a_whole_data_set_condemns_a_good_q_and_ours_does_not() -> None:
    """A q a tenth wider than the posterior has bounded weights for every datum: a k-hat below 0 in the limit."""
    entry = get_entry("ppca").example(seed=0)
    whole, per_datum = {}, {}
    for rows in (10, 1000):
        x, _ = entry.simulate(rows, seed=1)
        with isolated(0):
            guide = scaled_posterior(entry, x, 1.1)
            whole[rows] = psis_diagnostic(entry, guide, Batch.full(x), num_particles=1000)
        per_datum[rows] = k_hat(importance_weights(entry, guide, Batch.full(x), 1000, seed=0))
    assert whole[10] < THRESHOLD < 1 < whole[1000], "the same q, only on more rows"
    for found in per_datum.values():
        assert found is not None and found.maximum < THRESHOLD and found.share_above == 0


def test_our_khat_condemns_a_bad_q() -> None:
    """The negative control: a q of a third of the posterior's width has weights of infinite variance, k = 0.89."""
    entry, x, _ = simulated("ppca", 100)
    found = k_hat(importance_weights(entry, scaled_posterior(entry, x, 1 / 3), Batch.full(x), 1000, seed=0))
    assert found is not None and found.maximum > THRESHOLD and found.share_above > 0.2


def scaled_posterior(entry: Entry, x: Tensor, factor: float) -> Guide:
    """Return the exact posterior with its standard deviations times ``factor``."""
    best = best_member(entry, "full-rank-normal", x, GuideOptions())
    assert best is not None
    (source,) = best.guide.sources.values()
    dim = entry.latent_sites()[0].dim
    with torch.no_grad():
        source.values[:, dim : 2 * dim] += math.log(factor)
        source.values[:, 2 * dim :] *= factor
    return best.guide


# ---- objective and ELBO ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_scaled_prior_is_no_elbo_and_ours_is_at_beta_1(beta: float) -> None:
    """z ~ N(0, 1), x ~ N(z, 1/2): with q the posterior the ELBO is log N(x; 0, 5/4), and no more at any β."""

    def program(batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=batch.x)

    x = 1.25**0.5 * torch.randn(200, 1, dtype=torch.float64)
    exact = float(dist.Normal(torch.zeros_like(x), 1.25**0.5).log_prob(x).sum())
    entry, batch = Program(program, 1), Batch.full(x)
    guide = build_guide("mean-field", entry, x)
    with torch.no_grad():
        guide.sources["z"].values.copy_(torch.cat([x / 1.25, torch.full_like(x, 0.5 * math.log(0.2))], 1))
        loss = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
        with isolated(0):
            reported = -loss.loss(entry, poutine.scale(guide, beta), batch)
    # KL(q ‖ prior) is about half a nat per datum: the report is too high by (1 - β) times 200 of those.
    assert (reported > exact + 20) == (beta < 1)
    ours = importance_weights(entry, guide, batch, 100, seed=0).elbo()
    # At the posterior the weight is constant, so there is no Monte Carlo error but rounding.
    assert float(ours.mean(0).sum()) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "delta"), [("normal-mean", "delta"), ("ppca", "free-delta"), ("vae", "amortized-delta")]
)
def test_a_point_mass_has_an_objective_and_no_elbo(model: str, delta: str) -> None:
    x = get_entry(model).example().simulate(20, seed=1)[0]
    result = ez.compare(model, x, methods=[delta, "mean-field"], seeds=1, steps=5, progress=False)
    point, normal = result.document()["rows"]
    for figure in ("elbo", "elbo_se", "gap", "approximation_gap", "amortization_gap", "kl", "khat_max"):
        assert point[figure] is None
        assert normal[figure] is not None or (model, figure) == ("vae", "kl"), "the VAE's posterior is not known"
    assert point["log_evidence"] is not None
    assert result.table["objective"].notna().all()
    assert result.fits[0].trajectory["elbo"].isna().all()
    assert result.fits[1].trajectory["elbo"].notna().all()


# ---- Pyro's global parameter store -----------------------------------------------------------------------------------


def test_a_fresh_autoguide_finds_the_last_ones_parameters_and_ours_does_not(store_of_its_own: None) -> None:
    entry, x, _ = simulated("normal-mean", 50)
    batch = Batch.full(x)

    def fresh_guide() -> AutoNormal:
        guide = AutoNormal(entry, init_scale=5.0)
        guide(batch)
        return guide

    first = fresh_guide()
    assert first.scales.mu.item() == pytest.approx(5.0, rel=1e-6)
    svi = SVI(entry, first, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(20):
        svi.step(batch)
    learned = first.scales.mu.item()
    assert learned < 4.5
    assert fresh_guide().scales.mu.item() == learned, "the trap is closed: a fresh guide starts where it was asked to"

    kept = {name: value.item() for name, value in pyro.get_param_store().items()}
    polluted = ez.fit("normal-mean", x, guide="mean-field", steps=5, progress=False)
    assert {name: value.item() for name, value in pyro.get_param_store().items()} == kept
    pyro.clear_param_store()
    clean = ez.fit("normal-mean", x, guide="mean-field", steps=5, progress=False)
    assert list(polluted.trajectory["objective"]) == list(clean.trajectory["objective"])
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [
        ("normal-mean", "laplace", {"steps": 3}),
        ("gaussian-mixture", "em", {"restarts": 2, "iterations": 3}),
        ("gaussian-mixture", "amortized", {"steps": 3}),
        ("ppca", "closed-form", {}),
        ("ppca", "free-full-rank-normal", {"steps": 3}),
        ("vae", "amortized", {"steps": 3, "hidden": 4}),
    ],
)
def test_no_fit_leaves_anything_in_the_store(model: str, method: str, options: dict[str, Any]) -> None:
    """Nor does evaluating, drawing from or converting it; the random state of the caller stays as it was too."""
    x = get_entry(model).example(seed=0).simulate(20, seed=1)[0]
    before = torch.get_rng_state()
    fit = ez.fit(model, x, method=method, progress=False, **options)
    fit.elbo()
    fit.log_evidence()
    fit.sample(3)
    fit.to_inferencedata(draws=5)
    assert not list(pyro.get_param_store().keys())
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_program_does_outside_a_fit_does_fill_the_store(store_of_its_own: None) -> None:
    """The negative control of the test above."""
    entry, x, _ = simulated("ppca", 5)
    entry(Batch.full(x))
    assert list(pyro.get_param_store().keys())


# ---- autoguides on disk ----------------------------------------------------------------------------------------------


def test_an_autoguide_that_never_ran_loads_nothing() -> None:
    entry, x, _ = simulated("normal-mean", 20)
    with isolated(0):
        trained = AutoMultivariateNormal(entry)
        trained(Batch.full(x))
        with pytest.raises(RuntimeError, match="Unexpected key"):
            AutoMultivariateNormal(entry).load_state_dict(trained.state_dict())


@pytest.mark.filterwarnings("ignore:ConditionalAutoRegressiveNN input_dim = 1")
@pytest.mark.parametrize("guide", sorted(AUTOGUIDES))
def test_our_autoguides_come_back_from_disk(guide: str, tmp_path: Path) -> None:
    x = get_entry("normal-mean").example(columns=2).simulate(20, seed=1)[0]
    fit = ez.fit("normal-mean", x, guide=guide, steps=10, progress=False)
    back = Fit.load(fit.save(tmp_path / "fit"))
    before, after = (draws(each, x) for each in (fit, back))
    assert torch.equal(before, after)
    assert torch.equal(before, draws(fit, x)), "the same seed gives the same draws"
    other = ez.fit("normal-mean", 2 * x, guide=guide, steps=10, progress=False)
    assert not torch.equal(before, draws(other, x)), "other data have another guide"


def draws(fit: Fit, x: Tensor) -> Tensor:
    with isolated(3), torch.no_grad():
        return torch.stack([fit.guide(Batch.full(x))["mu"] for _ in range(3)])


# ---- enumeration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_enumeration_with_an_empty_guide_is_a_second_oracle(covariance: str) -> None:
    """TraceEnum_ELBO sums z out of the program itself: its value is -log p(x), its gradient that of the oracle."""
    entry, x, _ = simulated("gaussian-mixture", 40, covariance=covariance)

    def enumerated() -> Tensor:
        loss = TraceEnum_ELBO(max_plate_nesting=1)
        return -loss.differentiable_loss(config_enumerate(entry), lambda batch: None, Batch.full(x))

    parameters = list(entry.parameters())
    with isolated(0):
        second = enumerated()
        slopes = torch.autograd.grad(second, parameters)
        oracle = entry.log_evidence(x).sum()  # type: ignore[operator]
        expected = torch.autograd.grad(oracle, parameters)
        assert second.item() == pytest.approx(oracle.item(), rel=1e-12)
        for slope, wanted in zip(slopes, expected, strict=True):
            torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            entry.means.add_(0.01)
        assert enumerated().item() != pytest.approx(oracle.item(), rel=1e-6), "another θ has another evidence"


def test_enumeration_does_not_go_through_functional_gradients() -> None:
    """torch.func.grad refuses Pyro's autograd function; our steps use backward(), which works (test above)."""
    x = torch.randn(10, 1)

    def loss(means: Tensor) -> Tensor:
        def program() -> None:
            with pyro.plate("data", 10):
                z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(means[z], 1.0).to_event(1), obs=x)

        return TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(program, lambda: None)

    means = torch.tensor([[-1.0], [1.0]], requires_grad=True)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(means)
    (slope,) = torch.autograd.grad(loss(means), means)
    assert slope.abs().min() > 0


# ---- graphs, compilers, random numbers -------------------------------------------------------------------------------


def test_pyros_loss_cannot_be_captured_and_the_log_joint_can() -> None:
    entry, x, z = simulated("ppca", 10)
    guide = build_guide("mean-field", entry, x)
    index = torch.arange(10)
    with isolated(0), pyro.validation_enabled(False):
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            make_fx(lambda rows: Trace_ELBO().differentiable_loss(entry, guide, Batch(rows, index, 10)))(x)
        captured = make_fx(lambda rows: log_joint(entry, Batch(rows, index, 10), {"z": z[None]}))(x)
        # Captured on x, the graph must follow other rows: a constant would not.
        other = x.flip(0)
        torch.testing.assert_close(captured(other), log_joint(entry, Batch(other, index, 10), {"z": z[None]}))
        assert not torch.allclose(captured(other), captured(x))


def test_tracing_is_deprecated_and_nothing_here_uses_it() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        torch.jit.trace(torch.neg, torch.zeros(1))
    assert set(jit_names("torch.jit.trace(f, x)\nfrom pyro.infer import JitTrace_ELBO")) == {"jit", "JitTrace_ELBO"}
    for folder in ("models", "guides", "inference", "elbozoo"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not list(jit_names(path.read_text(encoding="utf-8"))), path


def jit_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None) or ""
        if name == "jit" or str(name).startswith("Jit"):
            yield str(name)


def test_noise_in_place_does_not_vectorise_and_our_particles_differ() -> None:
    """vmap refuses the in-place noise of rsample; particles are drawn by a plate instead."""
    with pytest.raises(RuntimeError, match="inplace randomness"):
        torch.vmap(lambda mean: dist.Normal(mean, 1.0).rsample(), randomness="different")(torch.zeros(3, 2))
    allowed = torch.vmap(lambda mean: mean + torch.randn(2), randomness="different")(torch.zeros(3, 2))
    assert len(allowed.unique()) == 6
    entry, x, _ = simulated("ppca", 4)
    weights = importance_weights(entry, build_guide("mean-field", entry, x), Batch.full(x), 3, seed=0)
    assert len(weights.log_weight.unique()) == 12


# ---- the rotation of PPCA --------------------------------------------------------------------------------------------


def test_the_closed_form_of_ppca_is_the_rotation_without_a_mean_field_gap() -> None:
    """There W has orthogonal columns and the posterior no correlation; turned by 30 degrees it has, at equal p(x)."""
    x = ez.load_data("iris").x
    entry = get_entry("ppca").from_data(x, latent_dim=2)
    entry.fit_exact(x)  # type: ignore[operator]
    kl, evidence, expected = mean_field_gap(entry, x)
    assert abs(kl) < 1e-9 * len(x)
    assert abs(expected) < 1e-9 * len(x)

    angle = math.pi / 6
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    with torch.no_grad():
        entry.loading.copy_(entry.loading @ turn)
    turned_kl, turned_evidence, turned_expected = mean_field_gap(entry, x)
    assert turned_evidence == pytest.approx(evidence, rel=1e-12)
    assert turned_expected > 0.1 * len(x)
    assert turned_kl == pytest.approx(turned_expected, rel=1e-9)


def mean_field_gap(entry: Entry, x: Tensor) -> tuple[float, float, float]:
    """Return KL of the best mean-field q, log p(x), and N/2 (Σ log M_ii - log det M), M = WᵀW + σ² I."""
    divergence = kl_to_posterior(entry, diagonal_normal(entry, x), x, seed=0)
    evidence = log_evidence(entry, x)
    assert divergence is not None and divergence.standard_error == 0 and evidence is not None
    with torch.no_grad():
        m = entry.loading.mT @ entry.loading + entry.noise_scale.square() * torch.eye(2, dtype=x.dtype)
        expected = 0.5 * (m.diagonal().log().sum() - torch.logdet(m))
    return divergence.value, evidence.value, len(x) * float(expected)


# ---- ArviZ -----------------------------------------------------------------------------------------------------------


def test_arviz_is_the_one_we_know() -> None:
    assert Version("0.23.4") <= Version(arviz.__version__) < Version("1")
    assert not Version("0.23.4") <= Version("1.0.0") < Version("1")


def test_arviz_takes_no_guide_from_pyro_and_our_fits_convert_themselves() -> None:
    x = get_entry("ppca").example().simulate(12, seed=1)[0]
    fit = ez.fit("ppca", x, guide="mean-field", steps=3, progress=False)
    with pytest.raises(AttributeError, match="num_chains"):
        arviz.from_pyro(fit.guide)
    data = fit.to_inferencedata(draws=7)
    assert {"posterior", "posterior_predictive", "log_likelihood", "prior", "observed_data"} <= set(data.groups())
    assert data.posterior["z"].shape == (1, 7, 12, 2)


def test_chain_diagnostics_mean_nothing_for_draws_of_q_and_are_not_reported() -> None:
    one_chain = arviz.from_dict(posterior={"z": np.random.default_rng(0).normal(size=(1, 200))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert math.isnan(float(arviz.rhat(one_chain)["z"]))
    two_chains = arviz.from_dict(posterior={"z": np.random.default_rng(0).normal(size=(2, 200))})
    assert float(arviz.rhat(two_chains)["z"]) < 1.1
    assert not [column for column in (*ROW, *TABLE_ONLY) if "rhat" in column or "r_hat" in column or "ess" in column]


# ---- installation ----------------------------------------------------------------------------------------------------


def test_torch_is_pinned_where_we_install_it() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in lines


# ---- quadrature ------------------------------------------------------------------------------------------------------


def test_a_plain_grid_is_a_second_oracle_of_the_vae() -> None:
    """The trapezoid rule on 201² points of [-6, 6]², written out here, agrees within the error that ours states.

    It has an error of its own, far below 1e-6 nats per datum for so smooth an integrand.
    """
    entry, x, _ = simulated("vae", 6, latent_dim=2)
    entry, x = entry.double(), x.double()
    ours = log_evidence(entry, x)
    assert ours is not None and ours.kind == "quadrature" and ours.per_datum is not None
    axis = torch.linspace(-6, 6, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        likelihood = dist.Bernoulli(logits=entry.decoder(grid)[:, None]).log_prob(x).sum(-1)
    prior = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1, keepdim=True)
    second = torch.logsumexp(likelihood + prior, 0) + 2 * math.log(12 / 200)
    assert ours.standard_error < 1e-4 * len(x)
    assert (ours.per_datum - second).abs().sum() < ours.standard_error + 1e-6 * len(x)
    coarse = torch.logsumexp((likelihood + prior).reshape(201, 201, -1)[::40, ::40].flatten(0, 1), 0) + 2 * math.log(
        12 / 5
    )
    assert (ours.per_datum - coarse).abs().sum() > ours.standard_error + 1e-6 * len(x), (
        "a grid of 6 points is not enough"
    )
