"""The conditional VAE: the VAE it reduces to, its evidence on a grid, labels of any kind, what a condition is worth."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

import elbozoo as ez
from elbozoo.inference.evidence import log_evidence
from elbozoo.models import Batch, get_entry
from elbozoo.models.conditional_vae import ConditionalVAE
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.vae import VAE

LIKELIHOODS = ["bernoulli", "normal"]


def example(**options: object) -> ConditionalVAE:
    return ConditionalVAE.example(hidden=8, seed=1, **options).double()


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Binary digits with the digit that each shows: rows (count, 65) and digits."""
    data = ez.load_data("digits-binary")
    assert data.labels is not None
    x, labels = data.x[:count], data.labels[:count]
    return torch.cat([x, labels[:, None].double()], 1), labels


def test_is_in_the_registry() -> None:
    assert get_entry("conditional-vae") is ConditionalVAE


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("condition", [-1, 0, 3])
def test_log_likelihood_is_that_of_the_program(likelihood: str, condition: int) -> None:
    """Of every row at every latent value, 1e-11 relative (one matrix product against sums)."""
    entry = example(likelihood=likelihood, condition=condition)
    x, _ = entry.simulate(7, seed=2)
    z = torch.randn(5, 2, dtype=torch.float64)
    columns = []
    for value in z:
        with isolated(0):
            node = poutine.trace(poutine.condition(entry, {"z": value.expand(7, -1)})).get_trace(Batch.full(x)).nodes
        columns.append(node["x"]["fn"].log_prob(node["x"]["value"]))
    traced = torch.stack(columns, -1)
    assert (entry.log_likelihood(x, z) - traced).abs().max() < 1e-11 * traced.abs().max()
    other = x.clone()
    other[:, condition] = (x[:, condition] + 1) % 3
    assert (entry.log_likelihood(other, z) - traced).abs().max() > 0.1  # negative control: another class


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_each_class_is_a_vae_of_its_own(likelihood: str) -> None:
    """With c fixed, V e_c is a part of the first bias: the same likelihoods as that VAE's (1e-10 relative)."""
    entry = example(likelihood=likelihood)
    x, _ = entry.simulate(30, seed=2)
    z = torch.randn(6, 2, dtype=torch.float64)
    first, last = entry.decoder[0], entry.decoder[2]
    for code in range(3):
        vae = VAE.example(columns=8, hidden=8, likelihood=likelihood).double()
        with torch.no_grad():
            vae.decoder[0].weight.copy_(first.weight[:, :2])
            vae.decoder[0].bias.copy_(first.bias + first.weight[:, 2 + code])
            vae.decoder[2].load_state_dict(last.state_dict())
            if likelihood == "normal":
                vae.likelihood.log_excess.copy_(entry.likelihood.log_excess)
        rows = x[x[:, -1] == code]
        assert len(rows) > 3
        same, own = vae.log_likelihood(rows[:, :-1], z), entry.log_likelihood(rows, z)
        assert (same - own).abs().max() < 1e-10 * own.abs().max()
        rows[:, -1] = (code + 1) % 3
        assert (same - entry.log_likelihood(rows, z)).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_evidence_is_an_integral_of_the_columns_beside_the_condition(likelihood: str) -> None:
    """log p(x given c) by quadrature equals a grid of 301² points in NumPy, to 1e-5 nats per datum (both rules)."""
    entry = example(likelihood=likelihood)
    if likelihood == "normal":
        entry.likelihood.set_noise_scale(0.5)
    x, _ = entry.simulate(6, seed=3)
    axis = np.linspace(-7, 7, 301)
    grid = torch.from_numpy(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    log_prior = -0.5 * grid.square().sum(-1) - math.log(2 * math.pi) + 2 * math.log(axis[1] - axis[0])

    def of_row(row: Tensor, code: int) -> float:
        with torch.no_grad():
            mean = entry.decode(grid, torch.full((len(grid),), code))
            if likelihood == "bernoulli":
                terms = row[:-1] * mean.log() + (1 - row[:-1]) * (1 - mean).log()
            else:
                scale = entry.likelihood.unit * entry.likelihood.noise_scale
                terms = -0.5 * ((row[:-1] - mean) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
        return float((terms.sum(-1) + log_prior).logsumexp(0))

    evidence = log_evidence(entry, x)
    assert evidence is not None and evidence.kind == "quadrature" and evidence.per_datum is not None
    found = evidence.per_datum.numpy()
    expected = np.array([of_row(row, int(row[-1])) for row in x])
    assert np.abs(found - expected).max() <= 1e-5
    wrong = np.array([of_row(row, (int(row[-1]) + 1) % 3) for row in x])
    assert np.abs(found - wrong).max() > 1e-5


def test_simulation_draws_classes_and_decode_is_the_mean() -> None:
    """Means of 20,000 draws of one class within 5 standard errors (false alarms 6e-7 per column)."""
    entry = example(likelihood="normal")
    draws = 20_000
    z = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    rows = torch.zeros(draws, 9, dtype=torch.float64)
    rows[:, -1] = 2
    with isolated(3), torch.no_grad(), pyro.validation_enabled(False):
        fixed = poutine.condition(poutine.uncondition(entry), {"z": z.expand(draws, -1)})
        x = poutine.trace(fixed).get_trace(Batch.full(rows)).nodes["x"]["value"]
    bound = 5 * x.std(0) / math.sqrt(draws)
    with torch.no_grad():
        assert ((x.mean(0) - entry.decode(z, torch.tensor([2]))[0]).abs() < bound).all()
        assert ((x.mean(0) - entry.decode(z, torch.tensor([1]))[0]).abs() > bound).any()  # negative control
    simulated, _ = entry.simulate(300, seed=0)
    assert set(simulated[:, -1].tolist()) == {0.0, 1.0, 2.0}


def test_labels_may_be_words_and_the_column_anywhere(tmp_path: object) -> None:
    """A named condition is numbered; the other columns are explained, under their names, and a saved fit knows them."""
    iris = ez.load_data("iris")
    assert iris.labels is not None
    table = pd.DataFrame(iris.x.numpy(), columns=iris.columns)
    table.insert(1, "species", np.array(["setosa", "versicolor", "virginica"])[iris.labels.numpy()])
    options = {"condition": "species", "likelihood": "normal", "latent_dim": 1, "hidden": 4, "steps": 20}
    fit = ez.fit("conditional-vae", table, guide="amortized", **options)
    assert fit.entry.classes == 3 and fit.entry.options.classes == 3
    assert fit.entry.coords()["explained"] == iris.columns
    data = fit.to_inferencedata(draws=5)
    assert data.observed_data["x"].shape == (150, 4)
    assert list(data.observed_data["explained"].values) == iris.columns
    assert np.array_equal(data.constant_data["condition"].values, iris.labels.numpy())
    assert fit.sample(4).shape == (4, 5)
    loaded = type(fit).load(fit.save(f"{tmp_path}/fit"))
    assert loaded.entry.classes == 3 and loaded.elbo(fit.x) == fit.elbo()


def test_a_class_that_was_not_fitted_is_refused_later() -> None:
    entry = example()
    x, z = entry.simulate(4, seed=0)
    x[0, -1] = 7
    with pytest.raises(InvalidInput, match="found the class 7, expected 0 to 2"):
        entry.log_likelihood(x, z)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        ([0, 1, 1.5, 2], {}, "option condition: found 1.5 in column 3"),
        ([0, -1, 1, 2], {}, "found -1 in column 3 .* name the column, as in --set condition=COLUMN"),
        ([0, 1, 2, 1900], {}, "found 1900 in column 3 .*from 0 to 3"),
        ([0, 1, 2, 2], {"classes": 2}, "found 2 in column 3 .*from 0 to 1"),
        ([0, 1, 0, 1], {"latent_dim": 3}, "latent_dim: found 3 for 4 rows x 2 columns beside the condition"),
        ([0, 1, 0, 1], {"condition": 0, "likelihood": "bernoulli"}, "found 0.5 in column 2, row 1"),
    ],
)
def test_bad_input_gets_one_line(codes: list[float], options: dict[str, object], message: str) -> None:
    x = torch.tensor([[0.0, 0.5], [1.0, 0.2], [1.0, 0.7], [0.0, 1.0]], dtype=torch.float64)
    x = torch.cat([x, torch.tensor(codes, dtype=torch.float64)[:, None]], 1)
    with pytest.raises(InvalidInput, match=message) as caught:
        ConditionalVAE.from_data(x, **{"likelihood": "normal", "latent_dim": 1} | options)
    assert "\n" not in str(caught.value)


def test_a_table_of_the_condition_alone_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no column beside the condition"):
        ConditionalVAE.from_data(torch.zeros(4, 1).double(), latent_dim=1)


@pytest.mark.slow
def test_the_digit_is_worth_what_it_says_about_the_image() -> None:
    """Trained on 800 binary digits: evidence by quadrature, against the same images with shuffled digits.

    The true digit must raise log p(x given c) by more than half a nat per image and, turned round by Bayes' rule,
    name the digit of most images; the entropy of the digit, 2.3 nats, is the most that it can be worth at a given p(x).
    """
    x, labels = digits(800)
    with isolated(0):
        shuffled = torch.cat([x[:, :-1], labels[torch.randperm(len(x)), None].double()], 1)
    options = {"latent_dim": 2, "hidden": 32, "steps": 1500, "schedule": "cosine", "seed": 0}

    def fitted(rows: Tensor) -> ez.Fit:
        return ez.fit("conditional-vae", rows, guide="amortized", **options)

    def accuracy(entry: ConditionalVAE) -> float:
        grid = torch.randn(400, 2, dtype=torch.float64)
        scores = []
        for code in range(10):
            rows = x[:300].clone()
            rows[:, -1] = code
            with torch.no_grad():
                scores.append(entry.log_likelihood(rows, grid).logsumexp(-1))
        return float((torch.stack(scores).argmax(0) == labels[:300]).double().mean())

    right, wrong = fitted(x), fitted(shuffled)
    evidence, other = right.log_evidence(), wrong.log_evidence()
    assert evidence.kind == other.kind == "quadrature"
    assert evidence.value - other.value > 0.5 * len(x) + evidence.standard_error + other.standard_error
    assert accuracy(right.entry) > 0.75
    assert accuracy(wrong.entry) < 0.3  # negative control
    ledger = right.full_ledger()
    assert ledger.elbo <= ledger.log_evidence + 6 * ledger.elbo_se
    assert ledger.amortization_gap > 0
