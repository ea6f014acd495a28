"""Factor analysis against a dense normal and against scikit-learn's maximum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.decomposition import FactorAnalysis as SklearnFactorAnalysis

import elbozoo as ez
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput


def test_evidence_is_the_dense_normal() -> None:
    """Against SciPy's multivariate normal, to 1e-9 nats per datum."""
    entry = get_entry("factor-analysis").example(7, seed=0, latent_dim=3)
    x, _ = entry.simulate(11, seed=1)
    with torch.no_grad():
        loading = entry.loading.numpy()
        dense = multivariate_normal(entry.loc.numpy(), loading @ loading.T + np.diag(entry.variance.numpy()))
        assert np.allclose(entry.log_evidence(x).numpy(), dense.logpdf(x.numpy()), rtol=0, atol=1e-9)
        assert not np.allclose(entry.log_evidence(x + 0.01).numpy(), dense.logpdf(x.numpy()), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("source", "latent_dim"),
    [("wine-standardised", 2), ("wine-standardised", 4), ("breast-cancer-standardised", 3), ("iris", 1)],
)
def test_em_matches_scikit_learns_maximum(source: str, latent_dim: int) -> None:
    """To 1e-3 nats per datum; ours may be higher, where scikit-learn stops early."""
    x = ez.load_data(source).x
    peer = SklearnFactorAnalysis(latent_dim, tol=1e-10, max_iter=20_000, svd_method="lapack").fit(x.numpy())
    fit = ez.fit("factor-analysis", x, method="em", latent_dim=latent_dim)
    ours = fit.log_evidence().value / len(x)
    # Where a column's noise tends to zero, EM nears the maximum like 1 / iterations: it says what is left.
    assert fit.converged or "still to gain" in fit.notes[0]
    assert ours >= peer.score(x.numpy()) - 1e-3
    # The same parameters have the same likelihood in both, so that the comparison above means something.
    peer.components_, peer.noise_variance_ = fit.entry.loading.detach().numpy().T, fit.entry.variance.detach().numpy()
    peer.mean_ = fit.entry.loc.detach().numpy()
    assert peer.score(x.numpy()) == pytest.approx(ours, abs=1e-7)
    assert fit.trajectory["log_evidence"].iloc[0] / len(x) < ours - 1e-3


def test_equal_noise_reduces_to_ppca() -> None:
    """With ψ the same in every column the evidence is PPCA's (1e-9 relative)."""
    x = ez.load_data("iris").x
    ppca = get_entry("ppca").from_data(x, latent_dim=2)
    ppca.fit_exact(x)
    entry = get_entry("factor-analysis").from_data(x, latent_dim=2)
    with torch.no_grad():
        entry.loading.copy_(ppca.loading)
        entry.loc.copy_(ppca.loc)
        entry._set_variance(ppca.variance)
        assert torch.allclose(entry.log_evidence(x), ppca.log_evidence(x), rtol=1e-9)
        entry._set_variance(1.1 * ppca.variance)
        assert not torch.allclose(entry.log_evidence(x), ppca.log_evidence(x), rtol=1e-9)


def test_a_heywood_case_stops_at_the_stated_floor() -> None:
    """A column that is a factor itself loses its noise down to `floor` times its variance, and no further."""
    z = torch.randn(200, 1, dtype=torch.float64)
    x = torch.cat([z, z + 0.5 * torch.randn(200, 3, dtype=torch.float64)], 1)
    fit = ez.fit("factor-analysis", x, method="em", latent_dim=1, floor=1e-4)
    share = fit.entry.variance.detach() / x.var(0, correction=0)
    assert float(share.min()) >= 0.99e-4
    assert torch.isfinite(fit.score_samples()).all()


def test_constant_columns_and_too_many_factors_are_refused() -> None:
    """One clear line each; the data without them are taken."""
    x = ez.load_data("iris").x
    with pytest.raises(InvalidInput, match=r"columns \[5\] .* constant"):
        ez.fit("factor-analysis", torch.cat([x, torch.ones(150, 1)], 1))
    with pytest.raises(InvalidInput, match="at most 3"):
        ez.fit("factor-analysis", x, latent_dim=4)
    get_entry("factor-analysis").from_data(x, latent_dim=3)
