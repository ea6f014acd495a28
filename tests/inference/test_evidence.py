"""Evidence by quadrature and by importance sampling, against the oracle of PPCA."""

from __future__ import annotations

import math

import pytest
import torch

import elbozoo as ez
from elbozoo.guides import build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.inference.best_member import best_member
from elbozoo.inference.evidence import Evidence, estimate_evidence, log_evidence
from elbozoo.inference.ledger import check_bound
from elbozoo.inference.weights import importance_weights, iwae
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.entry import Program
from elbozoo.models.contract.errors import NumericalFailure
from elbozoo.models.contract.isolation import isolated


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_quadrature_of_a_hidden_oracle(latent_dim: int) -> None:
    """A program without its oracle gets the evidence by quadrature, within the error it states, and says so."""
    x = ez.load_data("iris").x[::5]
    entry = get_entry("ppca").from_data(x, latent_dim=latent_dim)
    entry.fit_exact(x)
    truth = float(entry.log_evidence(x).sum())
    found = log_evidence(Program(entry, 4), x)
    assert found is not None and found.kind == "quadrature"
    assert 0 < found.standard_error <= 1e-4 * len(x)
    assert abs(found.value - truth) <= found.standard_error
    assert abs(found.value - truth - 1e-4 * len(x)) > found.standard_error


def test_importance_sampling_covers_the_truth_and_is_called_an_estimate() -> None:
    """Three dimensions have no quadrature: the estimate is within six standard errors, and low with few draws."""
    x = ez.load_data("iris").x[::5]
    entry = get_entry("ppca").from_data(x, latent_dim=3)
    entry.fit_exact(x)
    truth = float(entry.log_evidence(x).sum())
    assert log_evidence(Program(entry, 4), x) is None
    with torch.no_grad():  # a turned loading, so that the diagonal family misses the posterior
        entry.loading.copy_(entry.loading @ torch.linalg.qr(torch.randn(3, 3).double()).Q)
    best = best_member(entry, "diagonal-normal", x, GuideOptions())
    assert best is not None
    weights = importance_weights(entry, best.guide, Batch.full(x), 4000, seed=0)
    found = estimate_evidence(weights)
    assert found.kind == "estimate" and found.standard_error > 0
    assert abs(found.value - truth) <= 6 * found.standard_error + 0.01 * len(x)
    bounds = [float(iwae(weights, k).sum()) for k in (1, 5, 50, 500)]
    assert bounds == sorted(bounds)
    assert bounds[0] < truth - 6 * found.standard_error


def test_a_bound_above_the_truth_is_an_error() -> None:
    """Not a row of a table; an estimate, being a bound itself, accuses nobody."""
    truth = Evidence(-100.0, 0.0, "exact", None)
    check_bound(-100.5, 0.1, truth)
    check_bound(-99.9, 0.1, truth)
    with pytest.raises(NumericalFailure, match="exceeds log p"):
        check_bound(-99.0, 0.1, truth)
    check_bound(-99.0, 0.1, truth._replace(kind="estimate"))


def test_a_wrong_guide_density_is_caught() -> None:
    """A q whose log density is off by one nat per datum would lift the bound above the evidence: the ledger refuses."""
    x = ez.load_data("iris").x[:30]
    fit = ez.fit("ppca", x, method="closed-form")

    class Wrong(type(fit.guide)):  # type: ignore[misc]
        def posterior(self, batch: Batch):  # type: ignore[no-untyped-def]
            joint = super().posterior(batch)
            q = joint.conditionals["z"]

            class Off(type(q)):  # type: ignore[misc]
                def log_prob(self, value: torch.Tensor) -> torch.Tensor:
                    return super().log_prob(value) - 1.0

            q.__class__ = Off
            return joint

    fit.guide.__class__ = Wrong
    with pytest.raises(NumericalFailure, match="exceeds log p"):
        fit.ledger()


def test_weights_do_not_depend_on_how_rows_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by chunks of rows; the ELBO they give agrees within six standard errors."""
    from elbozoo.inference import weights as module

    x = ez.load_data("iris").x
    entry = get_entry("ppca").from_data(x)
    with isolated(0):
        guide = build_guide("mean-field", entry, x)
    whole = importance_weights(entry, guide, Batch.full(x), 500, seed=0).elbo()
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 500 * 4 * 7)
    parts = importance_weights(entry, guide, Batch.full(x), 500, seed=0).elbo()
    assert parts.shape == whole.shape
    error = 6 * math.sqrt(2 * float((whole.var(0) / 500).sum()))
    assert abs(float(parts.mean(0).sum() - whole.mean(0).sum())) <= error
