"""The semi-supervised VAE: evidence on a grid, the models it reduces to, bounds by hand, labels of any kind."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import elbozoo as ez
from elbozoo.guides import build_guide, resolve_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.guides.labelled import LabelThenLatentGuide
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.method import plan
from elbozoo.inference.objectives import ObjectiveOptions, resolve_objective
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, get_entry
from elbozoo.models.conditional_vae import ConditionalVAE
from elbozoo.models.contract.entry import capabilities
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.semi_supervised_vae import SemiSupervisedVAE

LIKELIHOODS = ["bernoulli", "normal"]


def example(**options: object) -> SemiSupervisedVAE:
    entry = SemiSupervisedVAE.example(hidden=8, seed=1, **options).double()
    if not entry.likelihood.is_binary:
        entry.likelihood.set_noise_scale(0.5)
    return entry


def shares(entry: SemiSupervisedVAE) -> np.ndarray:
    """π in NumPy."""
    weights = np.exp(entry.class_logits.detach().numpy())
    return weights / weights.sum()


def log_likelihoods(entry: SemiSupervisedVAE, x: Tensor, z: np.ndarray) -> np.ndarray:
    """log p(x_n given y, z_g), (N, C, G), in NumPy from the decoder's matrices alone."""
    numbers = {name: value.detach().numpy() for name, value in entry.state_dict().items()}
    rows = x[:, entry.explained].numpy()[:, None]
    found = []
    for code in range(entry.classes):
        told = np.concatenate([z, np.tile(np.eye(entry.classes)[code], (len(z), 1))], 1)
        hidden = np.tanh(told @ numbers["decoder.0.weight"].T + numbers["decoder.0.bias"])
        output = hidden @ numbers["decoder.2.weight"].T + numbers["decoder.2.bias"]
        if entry.likelihood.is_binary:
            terms = rows * output - np.logaddexp(0, output)
        else:
            location, unit = numbers["likelihood.location"], numbers["likelihood.unit"]
            scale = unit * (entry.options.noise_floor + np.exp(numbers["likelihood.log_excess"]))
            terms = -0.5 * ((rows - location - unit * output) / scale) ** 2 - np.log(scale * math.sqrt(2 * math.pi))
        found.append(terms.sum(-1))
    return np.stack(found, 1)


def joint_on_grid(entry: SemiSupervisedVAE, x: Tensor) -> np.ndarray:
    """log p(x_n, y), (N, C), by a grid of 241² points."""
    axis = np.linspace(-7, 7, 241)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    log_prior = -0.5 * (grid**2).sum(-1) - math.log(2 * math.pi) + 2 * math.log(axis[1] - axis[0])
    return np.logaddexp.reduce(log_likelihoods(entry, x, grid) + log_prior, -1) + np.log(shares(entry))


def known(joint: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log p(x_n, y_n) of rows with a label, log p(x_n) of those with -1, from log p(x_n, y) (N, C)."""
    chosen = np.take_along_axis(joint, np.maximum(labels, 0)[:, None], 1)[:, 0]
    return np.where(labels >= 0, chosen, np.logaddexp.reduce(joint, 1))


def digits(rows: int, labels: int) -> tuple[Tensor, Tensor]:
    """Binary digits with the first ``labels`` of them labelled, (rows, 65), and the digit that each shows."""
    data = ez.load_data("digits-binary")
    assert data.labels is not None
    truth = data.labels[:rows]
    seen = torch.where(torch.arange(rows) < labels, truth, torch.full_like(truth, -1))
    return torch.cat([data.x[:rows], seen[:, None].double()], 1), truth


def test_is_in_the_registry_with_its_guide_and_its_evidence() -> None:
    assert get_entry("semi-supervised-vae") is SemiSupervisedVAE
    assert "quadrature" in capabilities(example()) and "quadrature" not in capabilities(example(latent_dim=3))
    assert resolve_guide("amortized", example()) == LabelThenLatentGuide.NAME
    assert resolve_guide("mean-field", example()) == "free-diagonal-normal"
    for name in ("vae", "gaussian-mixture", "mixture-of-factor-analyzers"):
        entry = get_entry(name).example()
        assert "known for some rows" in str(LabelThenLatentGuide.refusal(entry, entry.latent_sites()))


# ---- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("label", [-1, 0, 3])
def test_log_likelihood_sums_over_classes_where_there_is_no_label(likelihood: str, label: int) -> None:
    """Of every row at every latent value, 1e-10 relative, by NumPy; with the labels of other rows it is another."""
    entry = example(likelihood=likelihood, label=label)
    x, _ = entry.simulate(12, seed=2)
    labels = x[:, label].long().numpy()
    assert (labels >= 0).any() and (labels < 0).any()
    z = np.random.default_rng(0).normal(size=(5, 2))
    joint = log_likelihoods(entry, x, z) + np.log(shares(entry))[:, None]
    expected = np.stack([known(joint[..., g], labels) for g in range(5)], 1)
    with torch.no_grad():
        found = entry.log_likelihood(x, torch.from_numpy(z)).numpy()
    assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()
    others = np.stack([known(joint[..., g], np.roll(labels, 1)) for g in range(5)], 1)
    assert np.abs(found - others).max() > 0.1


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_evidence_is_that_of_the_row_and_of_its_label_if_it_has_one(likelihood: str) -> None:
    """By quadrature against a grid in NumPy, 1e-5 nats per datum (both rules); other labels are further away."""
    entry = example(likelihood=likelihood)
    x, _ = entry.simulate(8, seed=3)
    labels = x[:, -1].long().numpy()
    joint = joint_on_grid(entry, x)
    evidence = log_evidence(entry, x)
    assert evidence is not None and evidence.kind == "quadrature" and evidence.per_datum is not None
    found = evidence.per_datum.numpy()
    assert np.abs(found - known(joint, labels)).max() <= 1e-5
    assert np.abs(found - known(joint, np.roll(labels, 1))).max() > 0.1
    assert np.abs(found - known(joint, np.full_like(labels, -1))).max() > 1e-3  # without what the label is worth


def test_bayes_rule_over_labels_gives_the_class_of_a_row() -> None:
    """Summed over its labels, the evidence of a row is that without one, 2e-5 nats; and p(y given x) is the grid's."""
    entry = example()
    x, _ = entry.simulate(6, seed=4)
    bare = entry.labelled(x, -1)
    terms = []
    for code in range(3):
        evidence = log_evidence(entry, entry.labelled(x, code))
        assert evidence is not None and evidence.per_datum is not None
        terms.append(evidence.per_datum)
    whole = log_evidence(entry, bare)
    assert whole is not None and whole.per_datum is not None
    joint = torch.stack(terms, -1)
    assert (joint.logsumexp(-1) - whole.per_datum).abs().max() <= 2e-5
    assert (joint[:, :2].logsumexp(-1) - whole.per_datum).abs().max() > 1e-3  # negative control: a class left out
    grid = torch.from_numpy(joint_on_grid(entry, x))
    assert (joint.softmax(-1) - grid.softmax(-1)).abs().max() <= 2e-5
    assert (joint.softmax(-1) - grid.roll(1, 0).softmax(-1)).abs().max() > 0.01


def test_with_all_labels_it_is_the_conditional_vae() -> None:
    """log p(x, y) = log p(x given y) + log π_y with the same decoder, 1e-5 nats per datum; another π is not it."""
    entry = example()
    x, _ = entry.simulate(10, seed=5)
    x[:, -1] = torch.arange(10) % 3
    peer = ConditionalVAE.example(columns=7, hidden=8).double()
    peer.decoder.load_state_dict(entry.decoder.state_dict())
    mine, theirs = log_evidence(entry, x), log_evidence(peer, x)
    assert mine is not None and mine.per_datum is not None and theirs is not None and theirs.per_datum is not None
    prior = np.log(shares(entry))[x[:, -1].long()]
    assert np.abs((mine.per_datum - theirs.per_datum).numpy() - prior).max() <= 1e-5
    assert np.abs((mine.per_datum - theirs.per_datum).numpy() + math.log(3)).max() > 0.05


def test_simulated_rows_keep_their_labels_and_tables_know_every_class() -> None:
    """Half of 4000 rows have a label, which is their class; shares within 5 standard errors (6e-7 each) of π."""
    entry = example()
    x, classes = entry.simulate_table(4000, seed=0)
    labels = x[:, -1].long()
    assert classes is not None
    has_label = labels >= 0
    assert torch.equal(labels[has_label], classes[has_label])
    assert abs(float(has_label.double().mean()) - 0.5) <= 5 * math.sqrt(0.25 / 4000)
    for part in (classes[has_label], classes[~has_label]):
        found = np.bincount(part.numpy(), minlength=3) / len(part)
        bound = 5 * np.sqrt(shares(entry) * (1 - shares(entry)) / len(part))
        assert (np.abs(found - shares(entry)) <= bound).all()
        assert (np.abs(found - np.roll(shares(entry), 1)) > bound).any()  # negative control


# ---- bounds ----------------------------------------------------------------------------------------------------------


def without_latent(x: Tensor, likelihood: str = "bernoulli") -> tuple[SemiSupervisedVAE, LabelThenLatentGuide]:
    """An entry whose decoder does not look at z, with q(z given x, y) = p(z) and an untrained, uneven classifier."""
    entry = example(likelihood=likelihood)
    with isolated(3):
        guide = build_guide("label-then-latent", entry, x, GuideOptions(hidden=4, initial_scale=1.0)).double()
    assert isinstance(guide, LabelThenLatentGuide)
    with torch.no_grad():
        entry.decoder[0].weight[:, :2] = 0.0
        for parameter in guide.encoder[-1].parameters():
            parameter.zero_()
        guide.classifier.network[-1].weight.normal_().mul_(0.5)
    return entry, guide


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_bounds_of_both_kinds_of_rows_are_those_of_the_paper(likelihood: str) -> None:
    """Where z plays no part every draw has the bound itself: equations 6 and 7 of Kingma et al. by hand, 1e-9 nats.

    The objective that is trained on agrees, and with labels it has w log q(label given x) besides (equation 9), below
    the ELBO. Negative controls: a classifier of other rows, and labels left away.
    """
    x, _ = example(likelihood=likelihood).simulate(9, seed=6)
    labels = x[:, -1].long().numpy()
    entry, guide = without_latent(x, likelihood)
    joint = log_likelihoods(entry, x, np.zeros((1, 2)))[..., 0] + np.log(shares(entry))
    q = guide.classify(x).numpy()
    bound = np.where(labels >= 0, known(joint, labels), (q * (joint - np.log(q))).sum(1))
    weights = importance_weights(entry, guide, Batch.full(x), 4, seed=0)
    assert weights.log_weight.shape == (3, 4, 9)
    elbo = weights.elbo().numpy()
    assert np.abs(elbo - bound).max() <= 1e-9
    other = np.where(labels >= 0, known(joint, labels), (np.roll(q, 1, 0) * (joint - np.log(np.roll(q, 1, 0)))).sum(1))
    assert np.abs(elbo - other).max() > 1e-2
    assert np.abs(weights.marginal().numpy() - known(joint, labels)).max() <= 1e-9

    def objective(name: str, **options: float) -> float:
        loss = resolve_objective(name, guide, ObjectiveOptions(**options)).build(3, guide, ObjectiveOptions(**options))
        with isolated(0):
            return -float(loss.loss(entry, guide, Batch.full(x)))

    taught = np.log(q[labels >= 0, labels[labels >= 0]]).sum()
    assert objective("auto") == pytest.approx(bound.sum(), abs=1e-9)
    assert objective("elbo-and-labels", label_weight=2.5) == pytest.approx(bound.sum() + 2.5 * taught, abs=1e-9)
    assert taught < -0.1 and objective("elbo-and-labels", label_weight=0.0) == pytest.approx(bound.sum(), abs=1e-9)
    bare = Batch.full(entry.labelled(x, -1))
    assert abs(float(importance_weights(entry, guide, bare, 4, seed=0).elbo()[0].sum()) - bound.sum()) > 0.1


def test_minibatches_scale_what_labels_teach() -> None:
    """Objectives of a partition into minibatches have the whole one as their mean (1e-9 relative)."""
    x, _ = example().simulate(12, seed=7)
    entry, guide = without_latent(x)
    loss = resolve_objective("elbo-and-labels", guide).build(1, guide)
    with isolated(0):
        whole = float(loss.loss(entry, guide, Batch.full(x)))
        parts = [float(loss.loss(entry, guide, Batch(x[i], i, 12))) for i in torch.arange(12).split(4)]
    assert sum(parts) / 3 == pytest.approx(whole, rel=1e-9)
    assert sum(parts) != pytest.approx(whole, rel=1e-3)


def test_the_prior_of_what_was_left_aside_learns_from_labels_without_noise() -> None:
    """The gradient for π in rows with a label is that of Σ log π_y, 1e-9, whatever else is drawn; z is drawn here."""
    entry = example()
    x, _ = entry.simulate(8, seed=8)
    x[:, -1] = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1])
    with isolated(3):
        guide = build_guide("label-then-latent", entry, x, GuideOptions(hidden=4)).double()
    with isolated(5):
        resolve_objective("auto", guide).build(1, guide).loss_and_grads(entry, guide, Batch.full(x))
    expected = 8 * shares(entry) - np.array([4, 3, 1])
    found = entry.class_logits.grad.numpy()
    assert np.abs(found - expected).max() <= 1e-9
    assert np.abs(found - (8 * shares(entry) - np.array([3, 4, 1]))).max() > 0.5


def test_means_are_labels_where_they_are_known_and_q_where_not() -> None:
    """Probabilities and then Σ_y q(y) m(x, y), 1e-12; without labels the first rows change, the others do not."""
    entry = example()
    x, _ = entry.simulate(10, seed=9)
    with isolated(3), torch.no_grad():
        guide = build_guide("label-then-latent", entry, x, GuideOptions(hidden=4)).double()
        for parameter in guide.parameters():
            parameter.normal_()
        assert isinstance(guide, LabelThenLatentGuide)
        means, q = guide.means(Batch.full(x)), guide.classify(x)
        of_class = [guide.means(Batch.full(entry.labelled(x, code)))[:, 3:] for code in range(3)]
        bare = guide.means(Batch.full(entry.labelled(x, -1)))
    has_label = x[:, -1] >= 0
    assert means.shape == (10, 5)
    assert torch.equal(means[has_label, :3].argmax(1), x[has_label, -1].long())
    assert (means[has_label, :3].max(1).values == 1).all()
    assert (means[~has_label, :3] - q[~has_label]).abs().max() <= 1e-12
    mixed = (q[:, :, None] * torch.stack(of_class, 1)).sum(1)
    assert (means[~has_label, 3:] - mixed[~has_label]).abs().max() <= 1e-12
    assert (means[has_label, 3:] - mixed[has_label]).abs().max() > 1e-3  # negative control
    assert torch.equal(bare[~has_label], means[~has_label]) and not torch.equal(bare[has_label], means[has_label])


def test_rows_drawn_anew_keep_their_labels() -> None:
    """Posterior predictive rows of one label differ from those of another; the class in the draws is the label."""
    entry = example(likelihood="normal")
    x, _ = entry.simulate(2, seed=1)
    with isolated(0), torch.no_grad(), pyro.validation_enabled(False):
        fixed = poutine.condition(poutine.uncondition(entry), {"z": torch.zeros(400, 2, dtype=torch.float64)})
        nodes = [
            poutine.trace(fixed).get_trace(Batch.full(entry.labelled(x[:1].expand(400, -1), code))).nodes
            for code in (0, 1)
        ]
    assert [set(each["y"]["value"].tolist()) for each in nodes] == [{0.0}, {1.0}]
    rows = [each["x"]["value"] for each in nodes]
    with torch.no_grad():
        means = [entry.decode(torch.zeros(1, 2).double(), torch.tensor([code]))[0] for code in (0, 1)]
    bound = 5 * rows[0].std(0) / math.sqrt(400)  # false alarms 6e-7 per column
    assert ((rows[0].mean(0) - means[0]).abs() < bound).all()
    assert ((rows[0].mean(0) - means[1]).abs() > bound).any()


# ---- labels from anywhere --------------------------------------------------------------------------------------------


def test_labels_may_be_words_and_cells_may_be_empty(tmp_path: Path) -> None:
    """From a CSV file, a frame and a frame with -1: the same rows, in which -1 stands for no label; a fit remembers."""
    iris = ez.load_data("iris")
    assert iris.labels is not None
    words = np.array(["setosa", "versicolor", "virginica"], dtype=object)[iris.labels.numpy()]
    words[np.arange(150) % 3 > 0] = None
    table = pd.DataFrame(iris.x.numpy(), columns=iris.columns)
    table.insert(1, "species", words)
    table.to_csv(tmp_path / "iris.csv", index=False)
    options = {"label": "species", "likelihood": "normal", "latent_dim": 1, "hidden": 4, "steps": 3}
    fits = [
        ez.fit("semi-supervised-vae", source, guide="amortized", **options)
        for source in (str(tmp_path / "iris.csv"), table, table.assign(species=table["species"].fillna("-1")))
    ]
    expected = np.where(np.arange(150) % 3 > 0, -1, iris.labels.numpy())
    for fit in fits:
        assert fit.entry.classes == 3 and fit.guide.name == "label-then-latent"
        assert np.array_equal(fit.entry.codes(fit.x).numpy(), expected)
        assert fit.entry.coords()["explained"] == iris.columns
    fit = fits[0]
    data = fit.to_inferencedata(draws=5)
    has_label = expected >= 0
    assert (data.posterior["y"].to_numpy()[0][:, has_label] == expected[has_label]).all()
    assert np.array_equal(data.constant_data["label"].values, expected)
    assert list(data.observed_data["explained"].values) == iris.columns
    assert fit.sample(4).shape == (4, 5) and fit.transform().shape == (150, 4)
    loaded = type(fit).load(fit.save(tmp_path / "fit"))
    assert loaded.entry.classes == 3 and loaded.elbo(fit.x) == fit.elbo()
    assert torch.equal(loaded.guide.classify(fit.x), fit.guide.classify(fit.x))
    with pytest.raises(InvalidInput, match="holds no label; expected one in every row"):
        ez.fit("conditional-vae", table, condition="species", likelihood="normal", steps=1)


def test_arrays_take_nan_or_minus_one_and_all_labels_or_none(caplog: pytest.LogCaptureFixture) -> None:
    """The same fit from both; with every label, and with none where the number of classes is given, which is logged."""
    x, _ = example().simulate(20, seed=1)
    numbers = x.numpy().copy()
    numbers[numbers[:, -1] < 0, -1] = np.nan
    options = {"hidden": 4, "steps": 2}
    first, again = (ez.fit("semi-supervised-vae", rows, **options) for rows in (x, numbers))
    assert torch.equal(first.x, again.x) and first.elbo() == again.elbo()
    assert torch.equal(first.score_samples(numbers), first.score_samples(x))
    labelled = example().labelled(x, 1)
    assert ez.fit("semi-supervised-vae", labelled, classes=3, **options).entry.classes == 3
    assert "no row has a label" not in caplog.text
    with caplog.at_level(logging.WARNING):
        fit = ez.fit("semi-supervised-vae", example().labelled(x, -1), classes=2, **options)
    assert "no row has a label, so that classes are clusters" in caplog.text
    assert fit.transform().shape == (20, 4)
    with pytest.raises(InvalidInput, match=r"option label: found no label in 20 rows, .* set classes"):
        ez.fit("semi-supervised-vae", example().labelled(x, -1), **options)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        ([0, 1, 1.5, 2], {}, "option label: found 1.5 in column 3"),
        ([0, -2, 1, 2], {}, "found -2 in column 3 .* or -1 for none; name the column, as in --set label=COLUMN"),
        ([0, 1, 2, 1900], {}, "found 1900 in column 3 .*from 0 to 3"),
        ([0, 1, -1, 2], {"classes": 2}, "found 2 in column 3 .*from 0 to 1"),
        ([0, 1, -1, -1], {"latent_dim": 3}, "latent_dim: found 3 for 4 rows x 2 columns beside the label"),
        ([0, 1, 0, 1], {"label": 0, "likelihood": "bernoulli"}, "found 0.5 in column 2, row 1"),
        ([math.nan, 1, 0, 1], {"label": 1}, r"found no number in column 3, row 1 .*: labels alone may be missing"),
    ],
)
def test_bad_input_gets_one_line(codes: list[float], options: dict[str, object], message: str) -> None:
    x = torch.tensor([[0.0, 0.5], [1.0, 0.2], [1.0, 0.7], [0.0, 1.0]], dtype=torch.float64)
    x = torch.cat([x, torch.tensor(codes, dtype=torch.float64)[:, None]], 1)
    with pytest.raises(InvalidInput, match=message) as caught:
        SemiSupervisedVAE.from_data(x, **{"likelihood": "normal", "latent_dim": 1} | options)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_later_and_elsewhere() -> None:
    """A class that was not fitted, a table of labels alone, and objectives without their guide."""
    entry = example()
    x, _ = entry.simulate(6, seed=0)
    with pytest.raises(InvalidInput, match="found the label 7, expected 0 to 2, the classes of the fit, or -1"):
        entry.log_likelihood(entry.labelled(x, 7), torch.zeros(1, 2).double())
    with pytest.raises(InvalidInput, match="no column beside the label"):
        SemiSupervisedVAE.from_data(torch.zeros(4, 1).double(), latent_dim=1)
    with pytest.raises(InvalidInput, match="does not suit guide 'free-diagonal-normal': it has no classifier"):
        plan("semi-supervised-vae", x, "mean-field", {"objective": "elbo-and-labels"})
    with pytest.raises(InvalidInput, match=r"option label_weight: found 2\.0 .* set objective=elbo-and-labels"):
        plan("semi-supervised-vae", x, "amortized", {"label_weight": 2.0})


@pytest.mark.slow
def test_few_labels_and_many_rows_name_digits_better_than_the_labels_alone() -> None:
    """On 500 binary digits with 100 labels, against scikit-learn's logistic regression on those hundred.

    Objective and ELBO are two columns, and the ELBO stays below the evidence. Without the labels' own part the
    classifier learns only from rows without labels, and does worse; an untrained one guesses.
    """
    x, truth = digits(500, 100)
    options = {"guide": "amortized", "hidden": 32, "steps": 400, "schedule": "cosine", "particles": 1, "seed": 0}
    options["learning_rate"] = 0.02
    fit = ez.fit("semi-supervised-vae", x, objective="elbo-and-labels", label_weight=10.0, **options)
    alone = LogisticRegression(max_iter=2000).fit(x[:100, :-1].numpy(), truth[:100].numpy())
    baseline = alone.score(x[100:, :-1].numpy(), truth[100:].numpy())

    def accuracy(fit: ez.Fit) -> float:
        assert isinstance(fit.guide, LabelThenLatentGuide)
        return float((fit.guide.classify(fit.x).argmax(1) == truth)[100:].double().mean())

    untrained = ez.fit("semi-supervised-vae", x, **options | {"steps": 1})
    assert accuracy(fit) > baseline
    assert accuracy(untrained) < 0.3
    assert fit.trajectory["elbo"].isna().all() and fit.trajectory["objective"].notna().all()
    some = torch.arange(80, 120)
    evidence = fit.log_evidence(fit.x[some])
    assert evidence is not None and evidence.kind == "quadrature"
    assert fit.elbo(fit.x[some]) <= evidence.value + evidence.standard_error + 0.05 * len(some)
    assert evidence.value > untrained.log_evidence(fit.x[some]).value + 2 * len(some)
