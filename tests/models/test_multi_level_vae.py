"""The multi-level VAE: groups of a table, exact evidence of the linear case, what belongs to a group counted once."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from scipy.stats import chi2, multivariate_normal
from torch import Tensor

import elbozoo as ez
from elbozoo.cli import main
from elbozoo.guides import build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.inference.estimators import estimate_log_evidence
from elbozoo.inference.evidence import evidence_or_estimate
from elbozoo.inference.fit import Fit
from elbozoo.inference.ledger import compute_ledger
from elbozoo.inference.objectives import OBJECTIVES
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, capabilities, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sequences import lengths, observations, steps_mask
from elbozoo.models.multi_level_vae import MultiLevelVAE

Z = 6.0  # two-sided false-alarm rate 2e-9 per comparison of a normal estimate


def example(columns: int = 5, **options: object) -> MultiLevelVAE:
    entry = MultiLevelVAE.example(columns, seed=1, hidden=6, **options).double()
    if not entry.likelihood.is_binary:
        with torch.no_grad():
            entry.likelihood.location.copy_(torch.linspace(-3, 4, columns))
            entry.likelihood.unit.copy_(torch.linspace(0.5, 2, columns))
    return entry


def linear(group_dim: int = 2, row_dim: int = 3, columns: int = 5) -> MultiLevelVAE:
    entry = example(columns, decoder="linear", group_dim=group_dim, row_dim=row_dim)
    with torch.no_grad():
        entry.decoder.bias.normal_()
    return entry


def member_rows(x: Tensor, group: int) -> np.ndarray:
    return observations(x)[group, : int(lengths(x)[group])].numpy()


def dense(entry: MultiLevelVAE, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all rows of a group, one after another: mean (nD,), loading (nD, Ku + n Kv) of (u, v_1, ...), noise (nD,)."""
    numbers = {name: value.detach().numpy() for name, value in entry.state_dict().items()}
    unit, split = numbers["likelihood.unit"], entry.options.group_dim
    weight = unit[:, None] * numbers["decoder.weight"]
    loading = np.hstack([np.kron(np.ones((rows, 1)), weight[:, :split]), np.kron(np.eye(rows), weight[:, split:])])
    noise = unit * (entry.options.noise_floor + np.exp(numbers["likelihood.log_excess"]))
    mean = numbers["likelihood.location"] + unit * numbers["decoder.bias"]
    return np.tile(mean, rows), loading, np.tile(noise**2, rows)


def dense_log_evidence(entry: MultiLevelVAE, x: Tensor) -> np.ndarray:
    values = []
    for group in range(len(x)):
        rows = member_rows(x, group)
        mean, loading, noise = dense(entry, len(rows))
        covariance = loading @ loading.T + np.diag(noise)
        values.append(multivariate_normal(mean, covariance).logpdf(rows.ravel()))
    return np.array(values)


def precise_log_density(mean: np.ndarray, loading: np.ndarray, noise: np.ndarray, rows: np.ndarray) -> float:
    """Log density of the dense joint normal in numbers of 50 digits."""
    with mpmath.workdps(50):
        wide = mpmath.matrix(loading.tolist())
        covariance = wide * wide.T + mpmath.diag([mpmath.mpf(float(variance)) for variance in noise])
        residual = mpmath.matrix(rows.ravel().tolist()) - mpmath.matrix(mean.tolist())
        quadratic = (residual.T * mpmath.lu_solve(covariance, residual))[0]
        return float(-(quadratic + mpmath.log(mpmath.det(covariance)) + len(mean) * mpmath.log(2 * mpmath.pi)) / 2)


def dense_posterior(entry: MultiLevelVAE, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (u, v_1, ..., v_n), by the joint covariance with the rows."""
    mean, loading, noise = dense(entry, len(rows))
    gain = loading.T @ np.linalg.inv(loading @ loading.T + np.diag(noise))
    return gain @ (rows.ravel() - mean), np.eye(loading.shape[1]) - gain @ loading


def test_is_in_the_registry_and_knows_when_it_has_an_oracle() -> None:
    assert get_entry("multi-level-vae") is MultiLevelVAE
    assert {"oracle", "posterior"} <= set(capabilities(linear()))
    for options in ({}, {"decoder": "linear", "likelihood": "bernoulli"}, {"likelihood": "bernoulli"}):
        assert not {"oracle", "posterior"} & set(capabilities(example(**options)))


# ---- the linear case -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group_dim", "row_dim"), [(1, 1), (2, 3), (5, 2), (3, 7)])
def test_linear_evidence_is_that_of_the_dense_joint_normal(group_dim: int, row_dim: int) -> None:
    """To 1e-9 nats per group (rounding of two factorisations); another noise, or another grouping, is further away."""
    entry = linear(group_dim, row_dim)
    x, _ = entry.simulate(6, seed=2, steps=5)
    assert lengths(x).tolist() == [5, 4, 3, 5, 4, 3]
    truth = dense_log_evidence(entry, x)
    with torch.no_grad():
        assert np.abs(entry.log_evidence(x).numpy() - truth).max() <= 1e-9
        swapped = x.clone()
        swapped[0, 0], swapped[1, 0] = x[1, 0], x[0, 0]
        assert np.abs(entry.log_evidence(swapped).numpy() - truth).max() > 1e-3
        entry.likelihood.log_excess += 0.01
        assert np.abs(entry.log_evidence(x).numpy() - truth).max() > 1e-9


def test_linear_evidence_keeps_its_digits_where_the_noise_is_small() -> None:
    """At a noise of 1e-4 units, against the dense joint in 50 digits: 1e-10 relative; SciPy's is off by more.

    Numbers of the size of one over the variance, 1e8, meet in the quadratic form, so that differences would show.
    """
    entry = example(3, decoder="linear", group_dim=1, row_dim=1, noise_floor=0.0)
    with torch.no_grad():
        entry.likelihood.log_excess.fill_(math.log(1e-4))
    x, _ = entry.simulate(3, seed=3)
    x = torch.where(steps_mask(x)[..., None], x + 1e-3 * torch.tensor([0.0, 1, -1, 1]), x)
    truth = np.array([precise_log_density(*dense(entry, int(lengths(x)[g])), member_rows(x, g)) for g in range(3)])
    with torch.no_grad():
        assert np.abs(entry.log_evidence(x).numpy() / truth - 1).max() <= 1e-10
    assert np.abs(dense_log_evidence(entry, x) / truth - 1).max() > 1e-10


def test_linear_posterior_is_the_dense_one() -> None:
    """Log density of u and all v of a group at draws of the prior, 1e-8 relative; at another group it is another."""
    entry = linear()
    x, values = entry.simulate(6, seed=2)
    assert isinstance(values, dict)
    with torch.no_grad():
        found = entry.posterior(x).log_prob(values).numpy()

    def truth(group: int, of: int) -> float:
        rows = member_rows(x, group)
        point = np.concatenate([values["u"][group].numpy(), values["v"][group, : len(rows)].numpy().ravel()])
        return float(multivariate_normal(*dense_posterior(entry, member_rows(x, of)[: len(rows)])).logpdf(point))

    right = np.array([truth(group, group) for group in range(6)])
    wrong = np.array([truth(group, 3 - group if group in (0, 3) else group) for group in range(6)])
    assert np.abs(found - right).max() <= 1e-8 * np.abs(right).max()
    assert np.abs(found - wrong).max() > 1e-3


def test_posterior_means_and_the_nearest_product_are_those_of_the_dense_posterior() -> None:
    """Means, and blocks on the diagonal of the inverse covariance, to 1e-9; those of the covariance are others."""
    entry = linear()
    x, _ = entry.simulate(5, seed=4)
    with torch.no_grad():
        means, nearest = entry.posterior_means(x).numpy(), entry.nearest_product(x)
    for group in range(5):
        n = int(lengths(x)[group])
        mean, covariance = dense_posterior(entry, member_rows(x, group))
        by_row = np.hstack([np.tile(mean[:2], (n, 1)), mean[2:].reshape(n, 3)])
        precision = np.linalg.inv(covariance)
        assert np.abs(means[group, :n] - by_row).max() <= 1e-9
        assert np.abs(means[group - 1, :2] - by_row[:2]).max() > 1e-3
        of_group = nearest["u"].precision_matrix[group].numpy()
        of_row = nearest["v"].precision_matrix.expand(5, x.shape[1], 3, 3)[group, n - 1].numpy()
        assert np.abs(of_group - precision[:2, :2]).max() <= 1e-8 * np.abs(precision).max()
        assert np.abs(of_row - precision[-3:, -3:]).max() <= 1e-8 * np.abs(precision).max()
        assert np.abs(np.linalg.inv(of_group) - covariance[:2, :2]).max() > 1e-3
        assert np.abs(nearest["u"].mean[group].numpy() - mean[:2]).max() <= 1e-9


def test_a_group_of_one_row_is_factor_analysis_with_both_latents_as_one() -> None:
    """With T = 1 the evidence is that of factor analysis with K = Ku + Kv (1e-9 per row); with T = 2 it is not."""
    entry = linear(1, 2, columns=4)
    x, _ = entry.simulate(9, seed=2, steps=1)
    rows = observations(x)[:, 0]
    mean, loading, noise = dense(entry, 1)
    peer = get_entry("factor-analysis").from_data(rows, latent_dim=2)
    peer = type(peer)(peer.options.model_copy(update={"latent_dim": 3}), 4).double()
    with torch.no_grad():
        peer.loc.copy_(torch.from_numpy(mean))
        peer.loading.copy_(torch.from_numpy(loading))
        peer._set_variance(torch.from_numpy(noise))
        truth = peer.log_evidence(rows)
        assert (entry.log_evidence(x) - truth).abs().max() <= 1e-9
        pairs = x[:8].reshape(4, 2, -1)
        assert (entry.log_evidence(pairs) - truth[:8].reshape(4, 2).sum(1)).abs().max() > 1e-3


# ---- what belongs to a group is counted once -------------------------------------------------------------------------


def divergence_of_groups(entry: MultiLevelVAE, x: Tensor, draws: int) -> Tensor:
    """Log q(u) - log p(u) of draws from the posterior, (S, G), nats: one draw of each group's KL."""
    posterior = entry.posterior(x)
    u = posterior.sample((draws,))["u"]
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(-1)
    return posterior.conditionals["u"].log_prob(u) - prior


def test_exact_guide_has_the_evidence_as_its_bound_and_kl_per_row_or_per_batch_misses_it() -> None:
    """ELBO = log p(x) to 1e-9 relative with q the posterior and KL(q(u) ‖ p(u)) counted once for each group.

    Counted for each row it is too low, and once for a whole batch too high, above the evidence itself.
    """
    entry = linear()
    x, _ = entry.simulate(7, seed=3)
    with torch.no_grad():
        elbo = importance_weights(entry, build_guide("exact", entry, x), Batch.full(x), 50, seed=0).elbo().sum(-1)
        truth = float(entry.log_evidence(x).sum())
        with isolated(0):
            kl = divergence_of_groups(entry, x, 2000)
    tolerance = 1e-9 * abs(truth)
    assert float((elbo - truth).abs().max()) <= tolerance
    error = Z * float(kl.std(0).sum()) / math.sqrt(len(kl))
    for_each_row = float(elbo.mean()) - float(((lengths(x) - 1) * kl.mean(0)).sum())
    for_the_batch = float(elbo.mean()) + float(kl.mean(0).sum() - kl.mean())
    assert for_each_row < truth - 1.0 - error < truth - tolerance
    assert for_the_batch > truth + 1.0 + error > truth + tolerance


def test_minibatches_are_of_groups_and_unbiased() -> None:
    """The mean over a partition into minibatches of groups is the bound of all, to 1e-9; scaled by rows it is not."""
    entry = linear()
    x, _ = entry.simulate(6, seed=3)
    guide = build_guide("exact", entry, x)
    loss = OBJECTIVES["elbo"].build(1, guide)
    with torch.no_grad(), isolated(0):
        whole = loss.loss(entry, guide, Batch.full(x))
        parts = [loss.loss(entry, guide, Batch(x[i], i, 6)) for i in torch.arange(6).split(2)]
        rows = int(steps_mask(x).sum())
        by_rows = [loss.loss(entry, guide, Batch(x[i], i, rows)) for i in torch.arange(6).split(2)]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-9)
    assert whole == pytest.approx(-float(entry.log_evidence(x).sum().detach()), rel=1e-9)
    assert np.mean(by_rows) != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("decoder", ["linear", "mlp"])
def test_padding_adds_nothing_to_either_density(decoder: str) -> None:
    """Whatever stands in padded cells of x and v, log p and log q are the same bit for bit; real cells move them."""
    entry = example(decoder=decoder)
    x, values = entry.simulate(6, seed=2)
    assert isinstance(values, dict)
    real = steps_mask(x)
    assert not real.all()
    guides = [build_guide(name, entry, x).double() for name in ("free-diagonal-normal", "product-of-normals")]
    guides += [build_guide("exact", entry, x)] if decoder == "linear" else []

    def densities(x: Tensor, values: dict[str, Tensor]) -> list[Tensor]:
        batch = Batch.full(x)
        with isolated(0), torch.no_grad():
            traces = [
                poutine.trace(poutine.condition(program, values)).get_trace(batch) for program in (entry, *guides)
            ]
        for trace in traces:
            trace.compute_log_prob()
        return [sum(node["log_prob"] for node in trace.nodes.values() if "log_prob" in node) for trace in traces]  # type: ignore[misc]

    plain = densities(x, values)
    hidden = x.clone()
    hidden[..., 1:][~real] = 7.0
    noise = {**values, "v": torch.where(real[..., None], values["v"], values["v"] + 5.0)}
    assert all(torch.equal(one, other) for one, other in zip(plain, densities(hidden, noise), strict=True))
    moved = {**values, "v": values["v"] + 0.1 * real[..., None]}
    assert all((one != other).all() for one, other in zip(plain, densities(x, moved), strict=True))
    longer = torch.nn.functional.pad(x, (0, 0, 0, 2))
    if decoder == "linear":
        assert (entry.log_evidence(longer) - entry.log_evidence(x)).abs().max() <= 1e-10


def test_a_program_of_groups_says_what_its_plain_rows_would() -> None:
    """Log p(x, u, v) equals that of rows written out one by one in NumPy (1e-9); u of another group changes it."""
    entry = example(group_dim=1, row_dim=2)
    x, values = entry.simulate(4, seed=2)
    assert isinstance(values, dict)
    with isolated(0), torch.no_grad():
        trace = poutine.trace(poutine.condition(entry, values)).get_trace(Batch.full(x))
    trace.compute_log_prob()
    found = sum(trace.nodes[name]["log_prob"] for name in ("u", "v", "x")).numpy()
    first, last = entry.decoder[0], entry.decoder[2]
    w1, b1, w2, b2 = (t.detach().numpy() for t in (first.weight, first.bias, last.weight, last.bias))
    scale = (entry.likelihood.unit * entry.likelihood.noise_scale).detach().numpy()

    def log_normal(value: np.ndarray, mean: np.ndarray | float, deviation: np.ndarray | float) -> float:
        terms = -0.5 * ((value - mean) / deviation) ** 2 - np.log(deviation) - 0.5 * np.log(2 * np.pi)
        return float(np.sum(terms))

    def of_group(group: int, content: int) -> float:
        u, total = values["u"][content].numpy(), log_normal(values["u"][content].numpy(), 0.0, 1.0)
        for position, row in enumerate(member_rows(x, group)):
            v = values["v"][group, position].numpy()
            y = w2 @ np.tanh(w1 @ np.concatenate([u, v]) + b1) + b2
            mean = entry.likelihood.location.numpy() + entry.likelihood.unit.numpy() * y
            total += log_normal(v, 0.0, 1.0) + log_normal(row, mean, scale)
        return total

    assert np.abs(found - [of_group(group, group) for group in range(4)]).max() <= 1e-9 * np.abs(found).max()
    assert np.abs(found - [of_group(group, group - 1) for group in range(4)]).min() > 1e-3


# ---- tables ----------------------------------------------------------------------------------------------------------


def labelled_table(rows: int = 40, seed: int = 5) -> pd.DataFrame:
    """Rows of the linear case with words for groups, shuffled so that groups are interleaved."""
    table = linear().simulate_table(rows, seed)[0].numpy()
    frame = pd.DataFrame(table[:, :-1], columns=["a", "b", "c", "d", "e"])
    frame.insert(2, "patient", [f"patient {int(code)}" for code in table[:, -1]])
    return frame.sample(frac=1.0, random_state=0).reset_index(drop=True)


def test_rows_come_back_in_the_order_of_the_table_and_their_order_means_nothing() -> None:
    """Evidence, transform and q of a shuffled table are those of the table (1e-10); another grouping has others."""
    frame = labelled_table()
    options = {"decoder": "linear", "group": "patient", "steps": 3, "row_dim": 1}
    fit = ez.fit("multi-level-vae", frame, guide="product-of-normals", **options)
    order = np.random.default_rng(1).permutation(len(frame))
    shuffled = frame.iloc[order].reset_index(drop=True)
    assert fit.log_evidence(shuffled).value == pytest.approx(fit.log_evidence(frame).value, rel=1e-10)
    codes, again = fit.transform(frame), fit.transform(shuffled)
    assert codes.shape == (40, 3)
    assert float((codes[torch.from_numpy(order)] - again).abs().max()) <= 1e-10
    assert float((codes - again).abs().max()) > 1e-3
    same = (frame["patient"] == frame["patient"][0]).to_numpy()
    assert float((codes[same, :2] - codes[0, :2]).abs().max()) == 0.0
    assert float((codes[~same, :2] - codes[0, :2]).abs().min()) > 0.0
    moved = frame.assign(patient=np.roll(frame["patient"], 1))
    assert fit.log_evidence(moved).value != pytest.approx(fit.log_evidence(frame).value, rel=1e-3)


def test_the_exact_guide_transforms_rows_into_posterior_means() -> None:
    """Of each row in the table's order, as the dense posterior of its group has them (1e-6: trained in float32)."""
    frame = labelled_table(20)
    fit = ez.fit("multi-level-vae", frame, guide="exact", decoder="linear", group="patient", steps=3, row_dim=1)
    assert fit.objective == "elbo"
    codes = fit.transform().numpy()
    for patient, rows in frame.groupby("patient"):
        mean, _ = dense_posterior(fit.entry, rows.drop(columns="patient").to_numpy())
        expected = np.hstack([np.tile(mean[:2], (len(rows), 1)), mean[2:, None]])
        assert np.abs(codes[rows.index] - expected).max() <= 1e-6, patient
    assert np.abs(codes[::-1] - codes).max() > 1e-2


def test_style_is_put_on_the_content_of_another_group() -> None:
    """In the linear case decode(u, v) is the sum of its parts, 1e-10; content and style are no multiples of each."""
    entry = linear()
    u, v = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        both, swapped = entry.decode(u, v), entry.decode(u, v.flip(0))
        assert ((both.sum(0) - swapped.sum(0)).abs() <= 1e-10).all()
        assert (both - swapped).abs().max() > 0.1
        assert entry.decode(u[:, None], v).shape == (2, 2, 5)


def test_simulated_tables_carry_their_groups_and_are_fitted_as_they_are() -> None:
    """No group has a single row, the last column names them, and new rows of a fit keep the column's place."""
    data = ez.load_data("simulate:multi-level-vae", rows=31, seed=2)
    assert data.columns == ["x0", "x1", "x2", "x3", "x4", "group"]
    counts = torch.unique(data.x[:, -1], return_counts=True)[1]
    assert int(counts.sum()) == 31 and 4 <= int(counts.min()) <= int(counts.max()) <= 5
    fit = ez.fit("multi-level-vae", data, guide="amortized", steps=3, hidden=4)
    assert fit.guide.name == "product-of-normals" and fit.x.shape == (7, 5, 6)
    frame = labelled_table(16)
    fit = ez.fit("multi-level-vae", frame, guide="amortized", group="patient", steps=3, hidden=4)
    rows = fit.sample(9)
    assert rows.shape == (9, 6)
    assert rows[:, 2].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert fit.entry.names == ("a", "b", "c", "d", "e")


def test_a_fit_of_words_is_saved_and_loaded(tmp_path: Path) -> None:
    """A loaded fit answers about a frame with words as the fit did, to the last bit; about other rows otherwise."""
    frame = labelled_table()
    fit = ez.fit("multi-level-vae", frame, guide="mean-field", group="patient", steps=3, hidden=4)
    loaded = Fit.load(fit.save(tmp_path / "fit"))
    assert fit.guide.name == "free-diagonal-normal"
    assert loaded.elbo(frame) == fit.elbo() and torch.equal(loaded.transform(frame), fit.transform())
    assert loaded.elbo(frame.assign(a=frame["a"] + 1)) != fit.elbo()
    with pytest.raises(InvalidInput, match="found 5 groups, expected the 10 groups of the fit"):
        loaded.elbo(frame[frame["patient"].isin([f"patient {i}" for i in range(5)])])


def test_inferencedata_names_groups_and_rows() -> None:
    """Padded rows hold NaN, real ones do not, and u has no dimension of rows."""
    fit = ez.fit("multi-level-vae", labelled_table(14), guide="amortized", group="patient", steps=3, hidden=4)
    data = fit.to_inferencedata(draws=20)
    assert data.posterior["u"].dims == ("chain", "draw", "group", "content")
    assert data.posterior["v"].dims == ("chain", "draw", "group", "row", "style")
    assert data.observed_data["x"].dims == ("group", "row", "column")
    real = steps_mask(fit.x).numpy()
    assert not real.all()
    assert np.array_equal(np.isfinite(data.posterior["v"].values[0, 0, ..., 0]), real)
    assert np.array_equal(np.isfinite(data.observed_data["x"].values[..., 0]), real)


def run_command(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    monkeypatch.setattr("sys.argv", ["elbozoo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_compare_runs_from_the_shell_on_a_column_of_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of the defaults and of the exact guide, with figures per fit; an unknown column is one line."""
    path = tmp_path / "visits.csv"
    labelled_table(24).to_csv(path, index=False)
    arguments = ["compare", "multi-level-vae", "--data", str(path), "--set", "group=patient", "--set", "steps=20"]
    arguments += ["--set", "decoder=linear", "--methods", "exact,mean-field,amortized", "--seeds", "1", "--json"]
    assert run_command(monkeypatch, arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["guide"] for row in rows] == ["exact", "free-diagonal-normal", "product-of-normals"]
    assert all(row["log_evidence_kind"] == "exact" for row in rows)
    assert abs(rows[0]["gap"]) <= 1e-6 * abs(rows[0]["elbo"]) < rows[1]["gap"]
    for row in rows[1:]:
        assert row["approximation_gap"] > 0
        assert row["gap"] == pytest.approx(row["approximation_gap"] + row["amortization_gap"], rel=1e-9)
    assert run_command(monkeypatch, [a.replace("group=patient", "group=person") for a in arguments]) == 2
    assert "patient" in capsys.readouterr().err


# ---- evidence without an oracle --------------------------------------------------------------------------------------


def grid_log_evidence(entry: MultiLevelVAE, x: Tensor) -> np.ndarray:
    """log ∫ N(u) Π_n ∫ N(v) p(x_n given u, v) dv du of each group, on a grid of 161² points, for Ku = Kv = 1."""
    axis = np.linspace(-6, 6, 161)
    log_prior = torch.from_numpy(-0.5 * axis**2 - 0.5 * math.log(2 * math.pi) + math.log(axis[1] - axis[0]))
    grid = torch.from_numpy(axis)[:, None]
    with torch.no_grad():
        mean = entry.decode(grid[:, None], grid[None])
    values = []
    for group in range(len(x)):
        rows = torch.from_numpy(member_rows(x, group))[:, None, None]
        if entry.likelihood.is_binary:
            terms = rows * mean.log() + (1 - rows) * (1 - mean).log()
        else:
            scale = (entry.likelihood.unit * entry.likelihood.noise_scale).detach()
            terms = -0.5 * ((rows - mean) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
        of_rows = (terms.sum(-1) + log_prior).logsumexp(-1)
        values.append(float((of_rows.sum(0) + log_prior).logsumexp(0)))
    return np.array(values)


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_estimates_of_the_evidence_agree_with_a_grid(likelihood: str) -> None:
    """Importance sampling from q and annealing, over groups with padding, within six standard errors and 0.05 nats.

    The errors are of the delta method, and the values low by half their square (0.05 leaves room for it, and 0.5 for
    the fewer draws of what a fit reports). The evidence of other rows is further away.
    """
    entry = example(likelihood=likelihood, group_dim=1, row_dim=1)
    if likelihood == "normal":
        entry.likelihood.set_noise_scale(0.9)
    x, _ = entry.simulate(4, seed=3)
    assert not steps_mask(x).all()
    truth = grid_log_evidence(entry, x).sum()
    other = grid_log_evidence(entry, torch.cat([x[..., :1], 1 - x[..., 1:]], -1)).sum()
    guide = build_guide("free-diagonal-normal", entry, x, GuideOptions(initial_scale=1.0)).double()
    drawn = estimate_log_evidence(entry, x, "importance", guide=guide, draws=20_000)
    annealed = estimate_log_evidence(entry, x, "annealed", draws=16, temperatures=40)
    for estimate in (drawn, annealed):
        allowed = Z * estimate.standard_error + 0.05
        assert abs(estimate.value - truth) <= allowed
        assert abs(estimate.value - other) > allowed
    found = evidence_or_estimate(entry, guide, x, seed=0)
    assert found is not None and found.kind == "estimate" and found.per_datum is not None
    assert abs(found.value - truth) <= Z * found.standard_error + 0.5


# ---- the ledger and learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["free-diagonal-normal", "free-full-rank-normal", "product-of-normals"])
def test_the_ledger_sees_that_u_and_v_are_taken_for_independent(guide: str) -> None:
    """Approximation gap = ½ (Σ log det of the blocks - log det) of the dense precision, within six standard errors.

    Of the blocks that q may have: single numbers, or the latent of the group and that of each row. The other blocks,
    or none, give another number.
    """
    entry = linear(2, 2)
    entry.likelihood.set_noise_scale(0.5)
    x, _ = entry.simulate(30, seed=4)
    gaps = {"numbers": 0.0, "sites": 0.0}
    for group in range(len(x)):
        precision = np.linalg.inv(dense_posterior(entry, member_rows(x, group))[1])
        whole = np.linalg.slogdet(precision)[1]
        blocks = [precision[i : i + 2, i : i + 2] for i in range(0, len(precision), 2)]
        gaps["numbers"] += 0.5 * (np.log(np.diag(precision)).sum() - whole)
        gaps["sites"] += 0.5 * (sum(np.linalg.slogdet(block)[1] for block in blocks) - whole)
    q = build_guide(guide, entry, x).double()
    ledger = compute_ledger(entry, q, x, GuideOptions(), seed=0)
    # The error of the best member's own ELBO: its weights vary by about the square root of its gap.
    error = Z * math.sqrt(2 * gaps["numbers"] / 1000)
    right, wrong = ("sites", "numbers") if "full-rank" in guide else ("numbers", "sites")
    assert ledger.best_member_converged
    assert abs(ledger.approximation_gap - gaps[right]) <= error
    assert abs(ledger.approximation_gap - gaps[wrong]) > error and gaps["sites"] > error
    assert ledger.gap == pytest.approx(ledger.approximation_gap + ledger.amortization_gap, rel=1e-9)


@pytest.mark.slow
def test_learning_reaches_the_parameters_that_made_the_data() -> None:
    """Fitted with the exact guide to 400 groups, log p(x) lies where the maximum of the likelihood must.

    At least at the parameters that made the data, with noise in proportion to the columns' deviations as the fit has
    it, less the 0.5 nats that the optimiser may leave undone. At most above the truth by half a χ² with as many degrees
    of freedom as there are parameters when every column has a noise of its own (Wilks 1938), at its quantile of 1e-6.
    """
    entry = linear(1, 1)
    with torch.no_grad():
        entry.likelihood.set_noise_scale(0.4)
        angle = torch.linspace(0.2, 1.4, 5)
        share = math.sqrt(1 - float(entry.likelihood.noise_scale) ** 2)
        entry.decoder.weight.copy_(share * torch.stack([angle.cos(), angle.sin()], -1))
        x, _ = entry.simulate(400, seed=7)
        truth = float(entry.log_evidence(x).sum())
        made, spread = entry.likelihood.unit.clone(), observations(x)[steps_mask(x)].std(0, correction=0)
        entry.likelihood.unit.copy_(spread)
        entry.decoder.weight *= (made / spread)[:, None]
        entry.decoder.bias *= made / spread
        within = float(entry.log_evidence(x).sum())
    options = {"decoder": "linear", "group_dim": 1, "row_dim": 1, "learning_rate": 0.05, "schedule": "cosine"}
    rows = entry.table(x)
    fit = ez.fit("multi-level-vae", rows, guide="exact", steps=300, particles=1, **options).log_evidence()
    early = ez.fit("multi-level-vae", rows, guide="exact", steps=20, particles=1, **options).log_evidence()
    assert fit.kind == "exact"
    assert within - 0.5 <= fit.value <= truth + 0.5 * float(chi2.isf(1e-6, 5 * 4))
    assert early.value < within - 0.5


@pytest.mark.slow
def test_on_digits_the_content_of_a_group_knows_its_digit_and_the_style_of_a_row_does_not() -> None:
    """Groups of four to six images of one digit each: nearest class means by the codes of held-out groups.

    The content tells the ten classes apart for 90 % of the rows at least, none of which was trained on; the style of a
    row for 40 % at most. Chance is 10 %, and 120 held-out groups leave an error below 5 %.
    """
    digits = ez.load_data("digits-binary")
    assert digits.labels is not None
    generator = np.random.default_rng(0)
    groups = np.full(len(digits.x), -1)
    classes: list[int] = []
    for digit in range(10):
        members = generator.permutation(np.flatnonzero(digits.labels.numpy() == digit))
        cuts = np.cumsum(generator.integers(4, 7, size=len(members)))
        for part in np.split(members, cuts[cuts < len(members) - 3]):
            groups[part] = len(classes)
            classes.append(digit)
    order = generator.permutation(len(classes))
    held_out = np.isin(groups, order[: len(order) // 3])
    table = np.column_stack([digits.x.numpy(), groups])
    options = {"likelihood": "bernoulli", "group_dim": 6, "row_dim": 2, "hidden": 32, "schedule": "cosine"}
    fit = ez.fit("multi-level-vae", table[~held_out], guide="amortized", steps=400, particles=1, **options)
    evidence = fit.log_evidence()
    assert evidence.kind == "estimate"
    assert fit.elbo() <= evidence.value + 0.01 * int((~held_out).sum())
    train, test = (fit.transform(table[rows]).numpy() for rows in (~held_out, held_out))
    labels = digits.labels.numpy()

    def share(columns: slice) -> float:
        means = np.stack([train[labels[~held_out] == digit][:, columns].mean(0) for digit in range(10)])
        nearest = ((test[:, None, columns] - means) ** 2).sum(-1).argmin(1)
        return float((nearest == labels[held_out]).mean())

    assert share(slice(0, 6)) >= 0.9
    assert share(slice(6, 8)) <= 0.4


# ---- bad input -------------------------------------------------------------------------------------------------------


TABLE = np.column_stack([np.random.default_rng(0).normal(size=(8, 3)), [0, 0, 1, 1, 2, 2, 3, 3]])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({5: 4}, {}, "found 2 groups of a single row .the first is row 5, counted from 1., expected at least 2 rows"),
        ({7: 2}, {}, "found 1 group of a single row .row 7 is alone in its group, counted from 1."),
        ({1: 5, 3: 6, 5: 7, 7: 8}, {"allow_single": True}, "found only groups of a single row"),
        ({2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 7: 0}, {}, "found one group of 8 rows, expected at least 2 groups"),
        ({}, {"group_dim": 4}, "option group_dim: found 4 for 4 groups x 3 columns, expected at most 3"),
        ({}, {"row_dim": 4}, "option row_dim: found 4 for 8 rows x 3 columns, expected at most 3"),
        ({}, {"decoder": "cubic"}, r"option decoder: found 'cubic', expected mlp \| linear"),
        ({}, {"group": 7}, "option group: found position 7"),
        ({}, {"likelihood": "bernoulli"}, "likelihood=bernoulli: found .* in column 1, row 1 "),
    ],
)
def test_bad_input_gets_one_line(change: dict[int, int], options: dict[str, object], message: str) -> None:
    table = torch.from_numpy(TABLE.copy())
    for row, group in change.items():
        table[row, -1] = group
    with pytest.raises(InvalidInput, match=message) as caught:
        MultiLevelVAE.from_data(table, **options)
    assert "\n" not in str(caught.value)
    MultiLevelVAE.from_data(torch.from_numpy(TABLE), group_dim=3, row_dim=3)


def test_single_rows_may_stand_among_groups_where_they_are_allowed() -> None:
    table = torch.from_numpy(TABLE.copy())
    table[7, -1] = 4
    with pytest.raises(InvalidInput, match="set allow_single=true"):
        MultiLevelVAE.from_data(table)
    fit = ez.fit("multi-level-vae", table, guide="amortized", steps=2, hidden=4, allow_single=True)
    assert lengths(fit.x).tolist() == [2, 2, 2, 1, 1]
    assert math.isfinite(fit.elbo())


def test_cells_that_are_refused_are_found_where_they_stand_in_the_table() -> None:
    """Row and column count the column of groups and the rows as they stand, interleaved."""
    table = torch.zeros(8, 4, dtype=torch.float64)
    table[:, 1] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    table[5, 2] = 0.5
    with pytest.raises(InvalidInput, match=r"found 0\.5 in column 3, row 6"):
        MultiLevelVAE.from_data(table, group=1, likelihood="bernoulli")


def test_a_copy_keeps_its_own_methods() -> None:
    entry = linear()
    x, _ = entry.simulate(3, seed=0)
    other = copy.deepcopy(entry)
    with torch.no_grad():
        before = entry.log_evidence(x)
        other.decoder.weight *= 1.1
        assert (other.log_evidence(x) - before).abs().max() > 1e-6
        assert torch.equal(entry.log_evidence(x), before)


def test_an_anatomy_of_groups_is_refused() -> None:
    fit = ez.fit("multi-level-vae", torch.from_numpy(TABLE), guide="amortized", steps=2, hidden=4)
    with pytest.raises(InvalidInput, match="a datum is a group"):
        fit.anatomy()
