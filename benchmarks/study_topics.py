"""Topic models by an encoder beside plain LDA by scikit-learn: bounds per word of held-out documents, and the topics.

Two corpora: one simulated from LDA, whose topics are known, and the images of digits, each pixel a word and its
brightness a count. scikit-learn fits LDA by coordinate ascent on a bound that is Bayesian in the topics too
(Hoffman et al. 2010), and bounds the probability of texts, not of counts. To compare like with like, the multinomial
coefficient is taken out of log p(x), the topics' own terms are taken out of scikit-learn's bound, and its mean topics
are put into ``product-lda`` with ``mixing=mixture`` as well. Run as a script, it writes ``results/topics.json``.

References
----------
```bibtex
@inproceedings{hoffman2010online,
  author = {Hoffman, Matthew D. and Blei, David M. and Bach, Francis},
  title = {Online Learning for Latent {D}irichlet Allocation},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {23}, pages = {856--864}, year = {2010}
}
```
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln, psi
from sklearn.decomposition import LatentDirichletAllocation
from torch import Tensor

import elbozoo as ez
from elbozoo.guides.base import GuideOptions
from elbozoo.inference.best_member import best_member
from elbozoo.inference.evidence import estimate_evidence
from elbozoo.inference.fit import provenance
from elbozoo.inference.ledger import elbo_estimate
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch
from elbozoo.models.product_lda import ProductLDA, log_coefficient

RESULTS = Path(__file__).resolve().parent / "results"
PARTICLES = 1000
MIXINGS = ("product", "mixture")


class Corpus(NamedTuple):
    """Documents to fit and to hold out, (N, V), and the topics (K, V) that they were made from where known."""

    name: str
    train: Tensor
    heldout: Tensor
    topics: Tensor | None


def simulated_corpus(
    documents: int, *, words: int = 40, topics: int = 5, length: float = 80.0, concentration: float = 1.0, seed: int = 0
) -> Corpus:
    """Return documents of LDA with topics of Dirichlet(0.1) and Poisson lengths, and half as many to hold out."""
    rng = np.random.default_rng(seed)
    of_topics = rng.dirichlet(np.full(words, 0.1), topics)
    count = documents + documents // 2
    shares = rng.dirichlet(np.full(topics, concentration), count)
    lengths = np.maximum(1, rng.poisson(length, count))
    rows = np.stack([rng.multinomial(n, p / p.sum()) for n, p in zip(lengths, shares @ of_topics, strict=True)])
    x = torch.from_numpy(rows).double()
    return Corpus("simulated", x[:documents], x[documents:], torch.from_numpy(of_topics))


def digits_corpus() -> Corpus:
    """Return the digits, every third one held out."""
    x = ez.load_data("digits").x
    last = torch.arange(len(x)) % 3 == 2
    return Corpus("digits", x[~last], x[last], None)


def topics_study(corpus: Corpus, topics: int, *, steps: int, concentration: float = 1.0, seed: int = 0) -> list[Any]:
    """Return a record for each method: nats per word of held-out documents, without the multinomial coefficient."""
    words = float(corpus.heldout.sum())
    coefficient = float(log_coefficient(corpus.heldout).sum())
    records = []
    before = time.perf_counter()
    lda = fitted_lda(corpus.train, topics, concentration, seed)
    seconds = time.perf_counter() - before
    bound = document_bound(lda, corpus.heldout)
    as_entry = entry_of(lda, corpus.train, concentration)
    elbo, evidence = best_bounds(as_entry, corpus.heldout)
    records.append(
        {
            "method": "scikit-learn",
            "bound": bound / words,
            "score": float(lda.score(corpus.heldout.numpy())) / words,
            "elbo": (elbo - coefficient) / words,
            "evidence": (evidence - coefficient) / words,
            **recovered(as_entry.topic_words(), corpus.topics),
            "seconds": seconds,
        }
    )
    for mixing in MIXINGS:
        fit = ez.fit(
            "product-lda",
            corpus.train,
            guide="amortized",
            topics=topics,
            mixing=mixing,
            concentration=concentration,
            steps=steps,
            schedule="cosine",
            seed=seed,
            progress=False,
        )
        elbo, evidence = best_bounds(fit.entry, corpus.heldout)
        records.append(
            {
                "method": mixing,
                "bound": (fit.elbo(corpus.heldout) - coefficient) / words,
                "score": None,
                "elbo": (elbo - coefficient) / words,
                "evidence": (evidence - coefficient) / words,
                **recovered(fit.entry.topic_words(), corpus.topics),
                "seconds": fit.seconds,
            }
        )
    return [{"corpus": corpus.name, "topics": topics, "words": words, **record} for record in records]


def fitted_lda(x: Tensor, topics: int, concentration: float, seed: int) -> LatentDirichletAllocation:
    """Return scikit-learn's LDA, fitted in batches of all documents until its perplexity stands."""
    lda = LatentDirichletAllocation(
        topics,
        doc_topic_prior=concentration,
        learning_method="batch",
        max_iter=300,
        evaluate_every=5,
        perp_tol=1e-3,
        max_doc_update_iter=500,
        mean_change_tol=1e-4,
        random_state=seed,
    )
    return lda.fit(x.numpy())


def document_bound(lda: LatentDirichletAllocation, x: Tensor) -> float:
    """Bound of the documents given q of the topics, nats: the score without KL of the topics (Hoffman et al. 2010)."""
    return float(lda.score(x.numpy())) + topic_divergence(lda.components_, lda.topic_word_prior_)


def topic_divergence(parameters: np.ndarray, prior: float) -> float:
    """KL in nats from Dirichlet(``prior``) to Dirichlet(``parameters`` (K, V)), summed over the topics."""
    total = parameters.sum(-1)
    words = parameters.shape[-1]
    slope = psi(parameters) - psi(total)[:, None]
    normaliser = gammaln(total) - gammaln(parameters).sum(-1) - gammaln(words * prior) + words * gammaln(prior)
    return float((normaliser + ((parameters - prior) * slope).sum(-1)).sum())


def entry_of(lda: LatentDirichletAllocation, x: Tensor, concentration: float) -> ProductLDA:
    """Return scikit-learn's mean topics as an entry, to be judged by the same estimator as the others."""
    topics = len(lda.components_)
    entry = ProductLDA.from_data(x, topics=topics, mixing="mixture", concentration=concentration).double()
    with torch.no_grad():
        entry.word_logits.copy_(torch.from_numpy(lda.components_).log())
    return entry


def best_bounds(entry: ProductLDA, x: Tensor) -> tuple[float, float]:
    """ELBO of the best full-rank normal of each document, and the importance-weighted estimate of log p(x), nats."""
    best = best_member(entry, "full-rank-normal", x, GuideOptions())
    assert best is not None
    weights = importance_weights(entry, best.guide, Batch.full(x), PARTICLES, seed=11)
    return elbo_estimate(weights)[0], estimate_evidence(weights).value


def recovered(found: Tensor, truth: Tensor | None) -> dict[str, Any]:
    """Cosines of the true topics with those found, matched one to one so that their sum is largest."""
    if truth is None:
        return {"cosine_min": None, "cosine_mean": None}
    cosines = matched_cosines(found, truth)
    return {"cosine_min": float(cosines.min()), "cosine_mean": float(cosines.mean())}


def matched_cosines(found: Tensor, truth: Tensor) -> Tensor:
    """Cosine of each true topic (K, V) with the one found (K, V) that the best matching gives it, (K,)."""
    units = [topics.double() / topics.double().norm(dim=-1, keepdim=True) for topics in (truth, found)]
    cosines = units[0] @ units[1].mT
    rows, columns = linear_sum_assignment(-cosines.numpy())
    return cosines[torch.from_numpy(rows), torch.from_numpy(columns)]


if __name__ == "__main__":
    studies = [(simulated_corpus(1000), 5), (digits_corpus(), 10)]
    found = [record for corpus, topics in studies for record in topics_study(corpus, topics, steps=3000)]
    document = {"study": "topics", "particles": PARTICLES, "provenance": provenance(), "records": found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "topics.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for r in found:
        cosine = "" if r["cosine_min"] is None else f", topics recovered to {r['cosine_min']:.3f}"
        print(
            f"{r['corpus']:10s} {r['method']:13s} bound {r['bound']:.4f}, best ELBO {r['elbo']:.4f}, "
            f"log p(x) {r['evidence']:.4f} nats per word{cosine}, {r['seconds']:.1f} s"
        )
