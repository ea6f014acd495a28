"""The denoising autoencoder: its corruptions, its closed form if it is linear, its bound if its prior is normal."""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt
import pyro
import pytest
import torch
from torch import Tensor

import elbozoo as ez
from elbozoo.guides.registry import guide_names, resolve_guide
from elbozoo.inference.method import default_methods, method_names, resolve_method
from elbozoo.models import capabilities, get_entry
from elbozoo.models.contract.entry import Corrupts
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.denoising_autoencoder import DenoisingAutoencoder
from elbozoo.models.vae import VAE

Matrix = npt.NDArray[np.float64]

Z = 5.0  # standard errors: two-sided false-alarm rate 6e-7 per comparison
LINEAR = {"decoder": "linear", "encoder": "linear", "likelihood": "normal", "schedule": "cosine"}


def test_is_in_the_registry() -> None:
    assert get_entry("denoising-autoencoder") is DenoisingAutoencoder


# ---- corruptions -----------------------------------------------------------------------------------------------------


def corrupted(entry: DenoisingAutoencoder, row: Tensor, draws: int) -> Tensor:
    with isolated(3):
        return entry.corrupt(row.expand(draws, -1))


def entry_on(x: Tensor, **options: object) -> DenoisingAutoencoder:
    entry: DenoisingAutoencoder = DenoisingAutoencoder.from_data(x, **{"latent_dim": 1, "hidden": 2, **options})
    return entry.double()


def numbers() -> Tensor:
    """Rows of three columns in different units, the last one constant."""
    with isolated(0):
        scaled = torch.randn(50, 2, dtype=torch.float64) * torch.tensor([3.0, 0.1]).double() + 5
    return torch.cat([scaled, torch.full((50, 1), 2.0, dtype=torch.float64)], 1)


def test_gaussian_noise_is_in_units_of_the_columns() -> None:
    """N(x, (ν s)²): mean and variance of 20,000 draws within 5 standard errors; a constant column stays as it is."""
    x, draws, level = numbers(), 20_000, 0.5
    found = corrupted(entry_on(x, likelihood="normal", corruption="gaussian", corruption_level=level), x[0], draws)
    assert torch.equal(found[:, 2], x[0, 2].expand(draws))
    noise = (found - x[0])[:, :2]
    scale = level * x.std(0, correction=0)[:2]

    def fits(noise: Tensor, scale: Tensor) -> bool:
        mean_is_right = (noise.mean(0).abs() < Z * scale / math.sqrt(draws)).all()
        ratio = noise.square().mean(0) / scale.square()
        return bool(mean_is_right and ((ratio - 1).abs() < Z * math.sqrt(2 / draws)).all())

    assert fits(noise, scale)
    assert not fits(noise, 1.1 * scale) and not fits(noise + 0.1 * scale, scale)  # negative controls
    together = float((noise[:, 0] * noise[:, 1]).mean() / (scale[0] * scale[1]))
    assert abs(together) < Z / math.sqrt(draws)  # independent between cells


@pytest.mark.parametrize(
    ("likelihood", "corruption", "chances"),
    [
        # Chances that a cell is 0 and 1, or the mean, the least and the largest of its column, where it was 0.
        ("bernoulli", "masking", {0.0: 1.0}),
        ("bernoulli", "salt-and-pepper", {0.0: 0.85, 1.0: 0.15}),
        ("normal", "masking", {"mean": 0.3, "own": 0.7}),
        ("normal", "salt-and-pepper", {"least": 0.15, "largest": 0.15, "own": 0.7}),
    ],
)
def test_cells_are_hit_as_often_as_stated(likelihood: str, corruption: str, chances: dict[float | str, float]) -> None:
    """With ν = 0.3, frequencies over 20,000 draws of each cell within 5 standard errors, and nothing else seen."""
    draws = 20_000
    x = numbers()[:, :2] if likelihood == "normal" else torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]).double()
    entry = entry_on(x, likelihood=likelihood, corruption=corruption, corruption_level=0.3)
    found = corrupted(entry, x[0], draws)
    named = {"mean": x.float().mean(0), "least": x.float().amin(0), "largest": x.float().amax(0), "own": x[0]}
    for column in range(2):
        left = draws
        for value, chance in chances.items():
            target = float(named[value][column]) if isinstance(value, str) else value
            # The entry's own statistics are of float32.
            count = int(((found[:, column] - target).abs() < 1e-6 * max(1.0, abs(target))).sum())
            left -= count
            error = math.sqrt(draws * chance * (1 - chance))
            assert abs(count - draws * chance) <= Z * error
            if 0 < chance < 1:
                assert abs(count - draws * (chance + 0.05)) > Z * error  # negative control
        assert left == 0
    hits = (found != x[0]).double()
    if corruption == "salt-and-pepper":
        spread = float(hits[:, 0].std() * hits[:, 1].std())
        covariance = float((hits[:, 0] * hits[:, 1]).mean() - hits[:, 0].mean() * hits[:, 1].mean())
        assert abs(covariance) < Z * spread / math.sqrt(draws)  # independent between cells


def test_ones_are_blanked_and_kept_as_stated() -> None:
    """Masking turns a 1 into a 0 with probability ν, salt and pepper with ν / 2: 20,000 draws, 5 standard errors."""
    x = torch.tensor([[1.0], [0.0], [1.0]]).double()
    for corruption, chance in (("masking", 0.3), ("salt-and-pepper", 0.15)):
        found = corrupted(entry_on(x, corruption=corruption, corruption_level=0.3), x[0], 20_000)
        error = math.sqrt(chance * (1 - chance) / 20_000)
        assert abs(float((found == 0).double().mean()) - chance) < Z * error
        assert abs(float((found == 0).double().mean()) - 0.225) > Z * error  # negative control


@pytest.mark.parametrize("corruption", ["gaussian", "masking", "salt-and-pepper"])
def test_corruption_follows_the_seed_and_spares_its_input(corruption: str) -> None:
    x = numbers()
    before = x.clone()
    entry = entry_on(x, likelihood="normal", corruption=corruption, corruption_level=0.5)
    assert isinstance(entry, Corrupts)
    with isolated(1):
        first, second = entry.corrupt(x), entry.corrupt(x)
    with isolated(1):
        again = entry.corrupt(x)
    assert torch.equal(first, again) and not torch.equal(first, second) and torch.equal(x, before)
    still = entry_on(x, likelihood="normal", corruption=corruption, corruption_level=0.0)
    assert torch.equal(still.corrupt(x), x)


def test_units_of_the_noise_are_saved_with_the_model(tmp_path: object) -> None:
    options = {"likelihood": "normal", "hidden": 4, "steps": 2, "progress": False, "corruption": "salt-and-pepper"}
    fit = ez.fit("denoising-autoencoder", "wine", guide="amortized", **options)
    loaded = ez.load_fit(fit.save(f"{tmp_path}/fit"))
    for entry in (fit.entry, loaded.entry):
        assert entry.corruption.largest[0] == pytest.approx(float(fit.x[:, 0].max()), rel=1e-6)
    with isolated(2):
        one = fit.entry.corrupt(fit.x)
    with isolated(2):
        assert torch.equal(loaded.entry.corrupt(fit.x), one)


# ---- the linear case -------------------------------------------------------------------------------------------------


class Risk:
    """E |x - A x̃|² per row of centred rows in units of their columns, and the map of rank K that has the least."""

    def __init__(self, covariance: Matrix, of_corrupted: Matrix, cross: Matrix) -> None:
        self.covariance, self.of_corrupted, self.cross = covariance, of_corrupted, cross

    @classmethod
    def of(cls, rows: Matrix, corruption: str, level: float) -> Risk:
        """Moments of the corruptions by hand."""
        covariance = rows.T @ rows / len(rows)
        if corruption == "gaussian":
            return cls(covariance, covariance + level**2 * np.eye(len(covariance)), covariance)
        kept = 1 - level
        blanked = kept**2 * covariance + kept * level * np.diag(np.diag(covariance))
        return cls(covariance, blanked, kept * covariance)

    def __call__(self, linear: Matrix) -> float:
        """Risk of the map A."""
        return float(
            np.trace(self.covariance)
            - 2 * np.trace(linear @ self.cross.T)
            + np.trace(linear @ self.of_corrupted @ linear.T)
        )

    def least(self, rank: int) -> Matrix:
        """[R C^-1/2]_K C^-1/2."""
        values, vectors = np.linalg.eigh(self.of_corrupted)
        root = (vectors / np.sqrt(values)) @ vectors.T
        left, singular, right = np.linalg.svd(self.cross @ root)
        best: Matrix = (left[:, :rank] * singular[:rank]) @ right[:rank] @ root
        return best


def map_of(fit: ez.Fit, x: Tensor) -> tuple[Matrix, Matrix]:
    """The linear map and the offset of a linear fit, in units of the columns."""
    mean, scale = x.mean(0), x.std(0, correction=0)
    offset = (fit.reconstruct(mean[None]) - mean) / scale
    columns = (fit.reconstruct(mean + torch.diag(scale)) - mean) / scale - offset
    return columns.T.numpy(), offset[0].numpy()


@pytest.mark.parametrize(("corruption", "level"), [("gaussian", 0.8), ("masking", 0.4)])
def test_closed_form_is_what_simulated_corruption_says(corruption: str, level: float) -> None:
    """Risk of three maps on 400 corruptions of wine, within 5 standard errors; shrunken PCA for gaussian noise."""
    x = ez.load_data("wine").x
    rows = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    risk = Risk.of(rows, corruption, level)
    entry = entry_on(torch.from_numpy(rows), likelihood="normal", corruption=corruption, corruption_level=level)
    pca = Risk.of(rows, "gaussian", 1e-9).least(2)
    with isolated(4):
        noisy = entry.corrupt(torch.from_numpy(rows).expand(400, -1, -1)).numpy()
    for linear in (risk.least(2), pca, np.eye(13)):
        errors = np.square(rows - noisy @ linear.T).sum(-1).mean(-1)
        error = errors.std() / math.sqrt(len(errors))
        assert abs(errors.mean() - risk(linear)) < Z * error
        assert abs(errors.mean() - 0.9 * risk(linear)) > Z * error  # negative control
    assert risk(risk.least(2)) < min(risk(pca), risk(1.01 * risk.least(2)))
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    first, axes = values[::-1][:2], vectors[:, ::-1][:, :2]
    shrunken = (axes * first / (first + level**2)) @ axes.T
    # To 1e-9, of numbers below one; under masking the rows that are left are smaller, and the map is another.
    assert bool(np.abs(risk.least(2) - shrunken).max() < 1e-9) is (corruption == "gaussian")


@pytest.mark.slow
@pytest.mark.parametrize(("corruption", "level"), [("gaussian", 1.0), ("masking", 0.3)])
def test_linear_denoising_autoencoder_learns_the_closed_form(corruption: str, level: float) -> None:
    """On digits: its risk is the least of rank 3 to 0.1 %, never less; what noise in the gradient leaves is 0.02 %.

    Negative controls: the plain autoencoder, which is PCA, and an untrained one.
    """
    data = ez.load_data("digits").x[:200]
    x = data[:, data.std(0) > 0.5]
    rows = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    risk = Risk.of(rows, corruption, level)
    least = risk(risk.least(3))

    def excess(model: str, steps: int, **more: object) -> float:
        options = {**LINEAR, "latent_dim": 3, "batch_size": len(x), "steps": steps, "learning_rate": 0.02, **more}
        fit = ez.fit(model, x, guide="amortized", progress=False, **options)
        linear, offset = map_of(fit, x)
        return (risk(linear) + float(np.square(offset).sum())) / least - 1

    noise = {"corruption": corruption, "corruption_level": level}
    assert -1e-9 < excess("denoising-autoencoder", 800, **noise) < 1e-3
    assert excess("autoencoder", 400) > 1e-2 and excess("denoising-autoencoder", 1, **noise) > 1e-2


# ---- digits ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_denoises_digits_that_it_has_not_seen() -> None:
    """A code of 40 numbers for 64 pixels, a quarter of which are hit: half the error of the autoencoder's, or less.

    That one passes the noise on, and is no better than the corrupted digit itself: the negative control.
    """
    data = ez.load_data("digits-binary").x
    x, unseen = data[:800], data[800:1100]
    options = {"latent_dim": 40, "hidden": 64, "steps": 800, "schedule": "cosine", "progress": False}
    noise = {"corruption": "salt-and-pepper", "corruption_level": 0.25}
    denoising = ez.fit("denoising-autoencoder", x, guide="amortized", **options, **noise)
    plain = ez.fit("autoencoder", x, guide="amortized", **options)
    with isolated(5):
        noisy = denoising.entry.corrupt(unseen)

    def wrong_pixels(fit: ez.Fit) -> float:
        return float(((fit.reconstruct(noisy) > 0.5) != (unseen > 0.5)).double().mean())

    assert wrong_pixels(denoising) < 0.5 * wrong_pixels(plain)
    hit = float((noisy != unseen).double().mean())
    assert wrong_pixels(denoising) < 0.8 * hit < hit < wrong_pixels(plain)


@pytest.mark.slow
def test_the_denoising_criterion_bounds_the_evidence_of_digits() -> None:
    """Under a normal prior, K = 2, by quadrature: both ELBOs are below log p(x), by more than 5 standard errors.

    Trained on corrupted rows, the encoder is better on those than the encoder of a fit without corruption is.
    """
    x = ez.load_data("digits-binary").x[:150]
    options = {"prior": "normal", "hidden": 16, "steps": 400, "schedule": "cosine", "particles": 1, "progress": False}
    noise = {"corruption": "masking", "corruption_level": 0.3}
    fit = ez.fit("denoising-autoencoder", x, guide="amortized", **options, **noise)
    clean = ez.fit("denoising-autoencoder", x, guide="amortized", **options, corruption_level=0.0)
    found, evidence = fit.denoising_elbo(), fit.log_evidence()
    assert evidence.kind == "quadrature"
    slack = Z * math.hypot(found.standard_error, evidence.standard_error)
    assert found.value < evidence.value - 5.0  # a gap of nats, far above the errors
    assert slack < 5.0 and fit.elbo() < evidence.value + slack
    # Negative control: the likelihood alone, for which nothing is paid, is above log p(x).
    assert float(fit.anatomy().reconstruction.sum()) > evidence.value + slack
    # The same corruption for an encoder that has not been trained on it.
    clean.entry.corruption.level = 0.3
    other = clean.denoising_elbo()
    assert found.value - other.value > Z * math.hypot(found.standard_error, other.standard_error)


# ---- what fits -------------------------------------------------------------------------------------------------------


def test_capabilities_follow_the_prior() -> None:
    """A normal prior can be integrated; a flat one cannot."""
    flat, normal = (DenoisingAutoencoder.example(prior=prior) for prior in ("flat", "normal"))
    assert capabilities(flat) == ["simulation"]
    assert capabilities(normal) == ["quadrature", "simulation"]
    assert guide_names(flat) == ["amortized-delta"]
    assert set(guide_names(normal)) == {
        f"amortized-{f}" for f in ("delta", "diagonal-normal", "full-rank-normal", "low-rank-normal", "flow")
    }
    assert [resolve_guide("amortized", entry) for entry in (flat, normal)] == [
        "amortized-delta",
        "amortized-diagonal-normal",
    ]
    assert default_methods(flat) == default_methods(normal) == ["amortized"]
    assert "em" not in method_names(normal) and "em" in method_names(VAE.example())


def test_under_a_normal_prior_it_is_the_vae() -> None:
    """The same program: equal log p(x given z) and prior at equal weights, to 1e-10 relative; another weight is not."""
    entry = DenoisingAutoencoder.example(hidden=5, prior="normal", seed=1).double()
    vae = VAE.example(columns=entry.columns, hidden=5, seed=2).double()
    x, _ = entry.simulate(6, seed=0)
    z = torch.randn(4, 2, dtype=torch.float64)
    with torch.no_grad():
        assert (entry.log_likelihood(x, z) - vae.log_likelihood(x, z)).abs().max() > 0.1  # negative control
        for mine, other in zip(vae.parameters(), entry.parameters(), strict=True):
            mine.copy_(other)
        found, expected = entry.log_likelihood(x, z), vae.log_likelihood(x, z)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
    (site,), (of_vae,) = entry.latent_sites(), vae.latent_sites()
    assert (site.name, site.event_shape, site.is_proper) == (of_vae.name, of_vae.event_shape, of_vae.is_proper)
    with isolated(0), pyro.validation_enabled(False):
        assert torch.equal(entry.prior().log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1))


@pytest.mark.parametrize(
    ("prior", "method", "message"),
    [
        ("flat", "amortized-diagonal-normal", "the prior of its code is flat"),
        ("flat", "mean-field", "a free q sees no row, so that corrupting rows changes nothing"),
        ("normal", "mean-field", "a free q sees no row, so that corrupting rows changes nothing"),
        ("normal", "shared-flow", "a shared q sees no row"),
        ("normal", "semi-amortized", "its steps would follow the likelihood of the corrupted row"),
        ("flat", "em", "there is no log p(x) for EM to climb"),
        ("normal", "em", "a free q sees no row"),
        ("normal", "exact", "denoising-autoencoder has no exact posterior"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(prior: str, method: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)) as caught:
        resolve_method(method, DenoisingAutoencoder.example(prior=prior))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruption_level": 1.5}, "option corruption_level: found 1.5 with corruption=masking, expected the prob"),
        ({"corruption_level": 2, "corruption": "salt-and-pepper"}, "found 2 with corruption=salt-and-pepper"),
        ({"corruption_level": -0.1}, "option corruption_level: found -0.1, expected float >= 0"),
        ({"corruption": "blur"}, "option corruption: found 'blur', expected gaussian | masking | salt-and-pepper"),
        ({"prior": "cauchy"}, "option prior: found 'cauchy', expected flat | normal"),
        ({"likelihood": "bernoulli"}, "likelihood=bernoulli: found 0.5 in column 2, row 1"),
    ],
)
def test_bad_input_gets_one_line(options: dict[str, object], message: str) -> None:
    x = torch.tensor([[0.0, 0.5], [1.0, 0.2], [1.0, 0.7]], dtype=torch.float64)
    with pytest.raises(InvalidInput, match=re.escape(message)) as caught:
        DenoisingAutoencoder.from_data(x, **{"likelihood": "normal", **options})
    assert "\n" not in str(caught.value)
    DenoisingAutoencoder.from_data(x, likelihood="normal", corruption="gaussian", corruption_level=1.5)
