"""Mixture of Gaussians against scikit-learn, enumeration by Pyro, and the known optimum on iris."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from sklearn.mixture import GaussianMixture as SklearnMixture

import elbozoo as ez
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

COVARIANCES = ["full", "tied", "diagonal", "spherical"]
SKLEARN_NAME = {"diagonal": "diag"}


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_evidence_equals_scikit_learns_score_at_the_same_parameters(covariance: str) -> None:
    """To 1e-9 nats per datum, with every kind of covariance."""
    x = ez.load_data("iris").x
    fit = ez.fit("gaussian-mixture", x, method="em", components=3, covariance=covariance, restarts=2)
    entry = fit.entry
    with torch.no_grad():
        covariances = entry.covariances.numpy()
        peer = SklearnMixture(3, covariance_type=SKLEARN_NAME.get(covariance, covariance))
        peer.weights_, peer.means_ = entry.weights.numpy(), entry.means.numpy()
        peer.covariances_ = {
            "full": covariances,
            "tied": covariances[0],
            "diagonal": np.stack([np.diag(c) for c in covariances]),
            "spherical": covariances[:, 0, 0],
        }[covariance]
        inverse = np.linalg.inv(covariances)
        peer.precisions_cholesky_ = {
            "full": np.stack([np.linalg.cholesky(p) for p in inverse]),
            "tied": np.linalg.cholesky(inverse[0]),
            "diagonal": np.stack([np.sqrt(np.diag(p)) for p in inverse]),
            "spherical": np.sqrt(inverse[:, 0, 0]),
        }[covariance]
    assert abs(fit.log_evidence().value / len(x) - peer.score(x.numpy())) <= 1e-9
    assert abs(fit.log_evidence().value / len(x) - peer.score(1.001 * x.numpy())) > 1e-9
    assert np.allclose(fit.transform().numpy(), peer.predict_proba(x.numpy()), atol=1e-9)


def test_iris_reaches_the_known_optimum_without_a_collapsed_component() -> None:
    """The best of 20 restarts of three full components is at -180.19 nats or better (scikit-learn finds -180.186)."""
    x = ez.load_data("iris").x
    fit = ez.fit("gaussian-mixture", x, method="em", components=3, restarts=20)
    assert fit.log_evidence().value >= -180.19
    assert fit.converged and not fit.notes
    eigenvalues = torch.linalg.eigvalsh(fit.entry.covariances.detach())
    assert float(eigenvalues.min()) > 1e-3
    assert float(fit.entry.weights.detach().min()) > 0.2
    one = ez.fit("gaussian-mixture", x, method="em", components=1)
    assert one.log_evidence().value < -180.19


def test_collapsed_components_are_said_and_passed_over() -> None:
    """A component on a repeated point sinks to the floor: its likelihood is higher, and it is not what is kept."""
    x = torch.cat([ez.load_data("iris").x[:40], torch.full((6, 4), 9.0, dtype=torch.float64)])
    fit = ez.fit("gaussian-mixture", x, method="em", components=2, restarts=4)
    assert len(fit.notes) == 1 and "collapsed" in fit.notes[0]
    assert torch.isfinite(fit.entry.covariances).all()


def test_enumeration_by_pyro_is_a_second_oracle() -> None:
    """TraceEnum_ELBO with an empty guide sums out the component: -log p(x), to 1e-9 relative."""
    entry = get_entry("gaussian-mixture").example(seed=2)
    x, _ = entry.simulate(30, seed=3)
    with isolated(0), torch.no_grad():
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(entry), lambda batch: None, Batch.full(x))
        truth = float(entry.log_evidence(x).sum())
        assert -loss == pytest.approx(truth, rel=1e-9)
        pyro.get_param_store().clear()
        assert -loss != pytest.approx(float(entry.log_evidence(x + 0.01).sum()), rel=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_offset_and_scale_of_the_data_change_nothing(covariance: str) -> None:
    """At offset 1e6 and scale 1e-3 responsibilities are those of the plain data (1e-4); raw moments would cancel."""
    x = ez.load_data("iris").x
    plain = ez.fit("gaussian-mixture", x, method="em", covariance=covariance, restarts=1)
    moved = ez.fit("gaussian-mixture", 1e-3 * x + 1e6, method="em", covariance=covariance, restarts=1)
    # At 1e6 a float64 carries 1e-10, which is 1e-7 of the columns' spread.
    assert torch.allclose(plain.transform(), moved.transform(), atol=1e-4)
    second_moment = ((1e-3 * x + 1e6).square().mean(0) - (1e-3 * x + 1e6).mean(0).square()) * 1e6
    assert not torch.allclose(second_moment, x.var(0, correction=0), rtol=0.1)


def test_free_and_exact_guides_reach_em() -> None:
    """With q free per datum and enumerated, SVI climbs to where EM ends (0.01 nats per datum); shared cannot."""
    x = ez.load_data("iris").x
    em = ez.fit("gaussian-mixture", x, method="em", restarts=4)
    exact = ez.fit("gaussian-mixture", x, guide="exact")
    assert abs(exact.elbo() - em.elbo()) <= 0.01 * len(x)
    shared = ez.fit("gaussian-mixture", x, guide="shared", steps=500)
    assert shared.elbo() < em.elbo() - 0.5 * len(x)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x, {"components": 151}, "expected at most one component per row"),
        (lambda x: torch.cat([x, torch.ones(150, 1, dtype=x.dtype)], 1), {}, "constant"),
        (lambda x: torch.cat([x, x[:, :1]], 1), {}, "centred rank 4"),
        (lambda x: x[50:54], {"components": 2}, "centred rank 3"),
    ],
)
def test_data_on_which_the_likelihood_is_unbounded_are_refused(change, options, message) -> None:  # type: ignore[no-untyped-def]
    """One clear line; a spherical covariance takes the same data."""
    x = change(ez.load_data("iris").x)
    with pytest.raises(InvalidInput, match=message):
        ez.fit("gaussian-mixture", x, method="em", **options)
    if options.get("components", 3) <= len(x):
        ez.fit("gaussian-mixture", x, method="em", covariance="spherical", restarts=1, **options)


def test_components_that_lose_their_rows_stay_finite() -> None:
    """More components than clusters, duplicates and a far outlier: every figure is finite."""
    x = torch.cat([torch.zeros(10, 2), torch.ones(10, 2), torch.full((1, 2), 1e4)]).double()
    x = x + 1e-3 * torch.randn_like(x)
    for covariance in COVARIANCES:
        fit = ez.fit("gaussian-mixture", x, method="em", components=6, covariance=covariance, restarts=3)
        assert torch.isfinite(fit.score_samples()).all()
        assert float(fit.entry.weights.detach().sum()) == pytest.approx(1.0)
