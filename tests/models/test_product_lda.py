"""Topic models: SciPy's multinomial, quadrature, scikit-learn's LDA on documents whose topics are known, bad counts."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats

import elbozoo as ez
from elbozoo.inference.evidence import log_evidence
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.product_lda import ProductLDA, WordCounts, log_coefficient


def study() -> ModuleType:
    """Return ``benchmarks/study_topics.py``, which is no part of the package."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "study_topics.py"
    spec = importlib.util.spec_from_file_location("study_topics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


STUDY = study()
MIXINGS = ["product", "mixture"]


def example(**options: object) -> ProductLDA:
    return ProductLDA.example(seed=1, **options).double()


def probabilities(entry: ProductLDA, z: np.ndarray) -> np.ndarray:
    """Probabilities of the words at one ``z`` (K,), written from the definition."""
    share = np.exp(z) / np.exp(z).sum()
    beta = entry.word_logits.detach().numpy()
    topics = np.exp(beta) / np.exp(beta).sum(-1, keepdims=True)
    if entry.options.mixing == "mixture":
        return share @ topics
    experts = np.prod(topics ** share[:, None], 0)
    return experts / experts.sum()


def test_is_in_the_registry() -> None:
    assert get_entry("product-lda") is ProductLDA


@pytest.mark.parametrize("mixing", MIXINGS)
def test_likelihood_is_scipys_multinomial(mixing: str) -> None:
    """With a total of each row's own and the coefficient kept, in the program and in the matrix product (1e-9 nats)."""
    entry = example(topics=3, mixing=mixing)
    x, _ = entry.simulate(6, seed=2)
    assert len(set(x.sum(-1).tolist())) > 2
    z = torch.randn(4, 3, dtype=torch.float64)
    truth = np.array(
        [[stats.multinomial(row.sum(), probabilities(entry, at)).logpmf(row) for at in z.numpy()] for row in x.numpy()]
    )
    with isolated(0), torch.no_grad():
        found = entry.log_likelihood(x, z).numpy()
        program = poutine.condition(entry, {"z": z[:1].expand(6, -1)})
        node = poutine.trace(program).get_trace(Batch.full(x)).nodes["x"]
        traced = node["fn"].log_prob(node["value"]).numpy()
    assert np.abs(found - truth).max() < 1e-9
    assert np.abs(traced - truth[:, 0]).max() < 1e-9
    # Negative controls: without the coefficient, and with the other way to combine topics.
    assert np.abs(found - log_coefficient(x).numpy()[:, None] - truth).max() > 1.0
    other = example(topics=3, mixing=MIXINGS[1 - MIXINGS.index(mixing)])
    with torch.no_grad():
        assert np.abs(other.log_likelihood(x, z).numpy() - truth).max() > 0.1


def test_pyros_multinomial_takes_no_totals_of_rows() -> None:
    """The reason for a distribution of its own; when this fails, it may go."""
    with pytest.raises(NotImplementedError, match="inhomogeneous total_count"):
        pyro.distributions.Multinomial(torch.tensor([3, 4]), torch.ones(2, 5))


def test_one_topic_alone_has_its_own_words_under_both_mixings() -> None:
    """At a corner of the simplex product and mixture agree (1e-8), and between corners they do not."""
    entries = [example(topics=3, mixing=mixing) for mixing in MIXINGS]
    corner = torch.tensor([[40.0, 0.0, 0.0], [0.0, 0.0, 40.0]], dtype=torch.float64)
    with torch.no_grad():
        product, mixture = (entry.decode(corner) for entry in entries)
        assert (product - mixture).abs().max() < 1e-8
        assert (product - entries[0].topic_words()[[0, 2]]).abs().max() < 1e-8
        inside = torch.zeros(1, 3, dtype=torch.float64)
        between = [entry.decode(inside) for entry in entries]
    assert (between[0] - between[1]).abs().max() > 0.01
    # A product of experts is no less sharp than their mixture here.
    assert between[0].max() > between[1].max()


def test_prior_is_the_diagonal_of_laplaces_in_the_basis_of_the_softmax() -> None:
    """The Hessian of the log density of Dirichlet(α) over softmax(z), off the direction of ones (1e-6 relative).

    In that basis the density of z is proportional to Π θ_k^α (MacKay 1998, section 3), with its mode at z = 0.
    """
    for topics, concentration in ((2, 1.0), (5, 0.1), (4, 3.0)):
        entry = example(topics=topics, concentration=concentration)
        z = torch.zeros(topics, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lambda z, a=concentration: a * z.log_softmax(-1).sum(), z)
        values = np.linalg.eigvalsh(-hessian.numpy())
        assert abs(values[0]) < 1e-9
        laplace = np.linalg.pinv(-hessian.numpy(), rcond=1e-6)
        # Its diagonal, which the prior has, is (1 - 1/K) / α.
        assert np.abs(np.diag(laplace) / entry.prior_scale**2 - 1).max() < 1e-6
        # In every direction off that of ones it is 1/α, which the diagonal alone does not have.
        assert np.abs(np.linalg.eigvalsh(laplace)[1:] * concentration - 1).max() < 1e-6
        assert abs(1 / concentration / entry.prior_scale**2 - 1) > 0.1


@pytest.mark.parametrize("mixing", MIXINGS)
def test_evidence_of_two_topics_is_an_integral_over_a_line(mixing: str) -> None:
    """Only z_1 - z_2 ~ N(0, 2 s²) matters: SciPy's one-dimensional rule against quadrature of the plane (1e-5 nats)."""
    entry = example(topics=2, mixing=mixing)
    x, _ = entry.simulate(4, seed=3)
    evidence = log_evidence(entry, x)
    assert evidence is not None and evidence.kind == "quadrature" and evidence.per_datum is not None
    scale = math.sqrt(2) * entry.prior_scale

    def of_row(row: np.ndarray, width: float) -> float:
        def integrand(difference: float) -> float:
            words = probabilities(entry, np.array([difference, 0.0]))
            return stats.multinomial(row.sum(), words).pmf(row) * stats.norm(0, width).pdf(difference)

        value, _ = integrate.quad(integrand, -12 * width, 12 * width, epsabs=0, epsrel=1e-8, limit=200)
        return math.log(value)

    found = evidence.per_datum.numpy()
    assert np.abs(found - [of_row(row, scale) for row in x.numpy()]).max() < 1e-5
    assert np.abs(found - [of_row(row, entry.prior_scale) for row in x.numpy()]).max() > 1e-3  # negative control


def test_counts_are_drawn_as_scipy_counts_them() -> None:
    """χ² of 20,000 draws against every outcome of 3 words out of 3 kinds; false alarms 1e-6.

    Draws of another distribution are the negative control.
    """
    words = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    total = torch.tensor([3.0, 2.0], dtype=torch.float64)
    with isolated(4):
        draws = WordCounts(total, words.log()).sample((20_000,))
    assert draws.shape == (20_000, 2, 3)
    assert torch.equal(draws.sum(-1), total.expand(20_000, 2))
    outcomes = [(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)]
    counts = np.array([int((draws[:, 0] == torch.tensor(each)).all(-1).sum()) for each in outcomes])

    def p_value(probs: list[float]) -> float:
        expected = 20_000 * np.array([stats.multinomial(3, probs).pmf(each) for each in outcomes])
        return float(stats.chisquare(counts, expected).pvalue)

    assert p_value([0.5, 0.3, 0.2]) > 1e-6
    assert p_value([0.48, 0.32, 0.2]) < 1e-6


def test_simulated_documents_have_the_lengths_of_the_data() -> None:
    """Poisson about the mean length within 5 standard errors (false alarms 6e-7), and what is kept is their total."""
    entry = example()
    x, _ = entry.simulate(400, seed=0)
    fitted = ProductLDA.from_data(3 * x)
    again, _ = fitted.simulate(400, seed=1)
    mean = float(3 * x.sum(-1).mean())
    error = math.sqrt(mean / 400)
    lengths = again.sum(-1)
    assert abs(float(lengths.mean()) - mean) < 5 * error
    assert abs(float(x.sum(-1).mean()) - mean) > 5 * error  # negative control
    assert torch.equal(fitted.constant_data(again)["total"], lengths)


def test_top_words_have_the_names_of_the_columns() -> None:
    table = pd.DataFrame([[9, 0, 1], [8, 1, 0], [0, 7, 2], [1, 9, 1]], columns=["cat", "dog", "fish"])
    fit = ez.fit("product-lda", table, guide="amortized", topics=2, steps=5, progress=False)
    with torch.no_grad():
        fit.entry.word_logits.copy_(torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0]]))
    assert fit.entry.top_words(2) == [["dog", "fish"], ["cat", "fish"]]
    assert torch.allclose(fit.entry.topic_words().sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        (0.5, {}, r"found the value 0\.5 in column 2, row 3 \(counted from 1\), expected counts of words 0, 1, 2"),
        (-1.0, {}, r"found the value -1 in column 2, row 3 .*leave that column or row out"),
        (2.0, {"topics": 9}, "option topics: found 9 for 8 rows, expected at most one topic per row"),
        (2.0, {"topics": 1}, "option topics: found 1, expected int >= 2"),
        (2.0, {"mixing": "sum"}, r"option mixing: found 'sum', expected product \| mixture"),
    ],
)
def test_bad_counts_get_one_line(cell: float, options: dict[str, object], message: str) -> None:
    x = torch.arange(24, dtype=torch.float64).reshape(8, 3)
    x[2, 1] = cell
    with pytest.raises(InvalidInput, match=message) as caught:
        ProductLDA.from_data(x, **options)
    assert "\n" not in str(caught.value)


def test_empty_documents_and_single_words_are_refused() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    x[1] = 0
    with pytest.raises(InvalidInput, match=r"found no word in row 2 \(counted from 1\).*leave that row out"):
        ProductLDA.from_data(x)
    with pytest.raises(InvalidInput, match="found one column, expected a column for each of two or more words"):
        ProductLDA.from_data(x[[0, 2, 3], :1])


def test_the_topics_own_terms_of_scikit_learns_bound_are_a_divergence() -> None:
    """KL between Dirichlets by torch (1e-9), which the study takes out of the score."""
    parameters = np.array([[0.3, 2.0, 5.0], [1.0, 1.5, 0.2]])
    posterior = torch.distributions.Dirichlet(torch.from_numpy(parameters))
    prior = torch.distributions.Dirichlet(torch.full((2, 3), 0.5, dtype=torch.float64))
    truth = float(torch.distributions.kl_divergence(posterior, prior).sum())
    assert STUDY.topic_divergence(parameters, 0.5) == pytest.approx(truth, abs=1e-9)
    assert STUDY.topic_divergence(parameters, 0.6) != pytest.approx(truth, abs=1e-3)  # negative control


@pytest.mark.slow
def test_topics_of_simulated_documents_are_recovered_as_by_scikit_learn() -> None:
    """Plain LDA with an encoder finds the topics, and bounds held-out documents as well.

    Every true topic has a cosine above 0.95 with the one matched to it, as under scikit-learn; held out, log p(x) is
    within 0.02 nats per word of that of scikit-learn's topics, and the bound of the encoder within 0.05 of
    scikit-learn's own. An untrained model is the negative control of each.
    """
    corpus = STUDY.simulated_corpus(400, words=30, topics=4, length=80.0, seed=1)
    lda = STUDY.fitted_lda(corpus.train, 4, 1.0, seed=0)
    reference = STUDY.entry_of(lda, corpus.train, 1.0)
    options = {"topics": 4, "mixing": "mixture", "schedule": "cosine", "progress": False}
    fit = ez.fit("product-lda", corpus.train, guide="amortized", steps=1000, **options)
    untrained = ez.fit("product-lda", corpus.train, guide="amortized", steps=1, **options)
    assert corpus.topics is not None
    cosines = [
        float(STUDY.matched_cosines(entry.topic_words(), corpus.topics).min())
        for entry in (reference, fit.entry, untrained.entry)
    ]
    assert min(cosines[:2]) > 0.95 > cosines[2]
    words = float(corpus.heldout.sum())
    ours, theirs, none = (
        STUDY.best_bounds(e, corpus.heldout)[1] / words for e in (fit.entry, reference, untrained.entry)
    )
    assert abs(ours - theirs) < 0.02 < abs(none - theirs)

    def bound(of: ez.Fit) -> float:
        return (of.elbo(corpus.heldout) - float(log_coefficient(corpus.heldout).sum())) / words

    own = STUDY.document_bound(lda, corpus.heldout) / words
    assert abs(bound(fit) - own) < 0.05 < abs(bound(untrained) - own)


@pytest.mark.slow
def test_products_explain_digits_better_than_mixtures() -> None:
    """Strokes multiply: at 10 topics ProdLDA's log p(x) is above plain LDA's by more than 2 nats an image, held out.

    The study of 1198 images finds 14 nats. By estimates whose standard errors are below 0.1 nats an image.
    """
    x = ez.load_data("digits").x[:500]
    train, heldout = x[:400], x[400:]

    def evidence(mixing: str, steps: int) -> float:
        options = {"topics": 10, "mixing": mixing, "steps": steps, "schedule": "cosine", "progress": False}
        return STUDY.best_bounds(ez.fit("product-lda", train, guide="amortized", **options).entry, heldout)[1] / len(
            heldout
        )

    mixture = evidence("mixture", 600)
    assert evidence("product", 600) > mixture + 2.0
    assert evidence("product", 1) < mixture + 2.0  # negative control


def test_table_of_files_and_saved_fits(tmp_path: Path) -> None:
    """Counts from a CSV file; a saved fit simulates the same documents."""
    x, _ = example().simulate(20, seed=1)
    names = [f"w{column}" for column in range(x.shape[1])]
    pd.DataFrame(x.numpy().astype(int), columns=names).to_csv(tmp_path / "counts.csv", index=False)
    fit = ez.fit("product-lda", tmp_path / "counts.csv", guide="amortized", steps=5, progress=False)
    loaded = type(fit).load(fit.save(tmp_path / "fit"))
    assert torch.equal(loaded.sample(7), fit.sample(7))
    assert loaded.entry.top_words(1) == fit.entry.top_words(1)
    assert {word for topic in loaded.entry.top_words(3) for word in topic} <= set(names)


def test_a_document_without_words_has_probability_one() -> None:
    """An empty document says nothing: log p is 0 under any z; one word already says something."""
    entry = example()
    x = torch.zeros(1, entry.columns, dtype=torch.float64)
    z = torch.randn(3, 2, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(entry.log_likelihood(x, z), torch.zeros(1, 3, dtype=torch.float64))
        x[0, 3] = 1.0
        assert (entry.log_likelihood(x, z) < 0).all()
