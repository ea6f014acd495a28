"""The VAE: likelihoods of all pairs, convolutions, levels, starting values, bad data, simulation, gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from sklearn.datasets import load_wine
from torch import Tensor

import elbozoo as ez
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.ledger import elbo_estimate
from elbozoo.inference.weights import importance_weights
from elbozoo.models import vae
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import capabilities
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.registry import get_entry
from elbozoo.models.vae import VAE

LIKELIHOODS = ["bernoulli", "normal", "categorical"]
ACTIVATIONS = ["tanh", "relu", "softplus"]
Z_BOUND = 5.0  # a two-sided false alarm of 6e-7 per number compared


LEVELS = {"likelihood": "categorical"}
IMAGES = {"architecture": "conv", "image_shape": "2x5x7", "channels": 3}


def example(columns: int | None = None, **options: object) -> VAE:
    return VAE.example(columns, hidden=8, seed=1, **options).double()


def conv_example(**options: object) -> VAE:
    return example(70, **IMAGES, **options)


def traced_log_likelihood(entry: VAE, x: Tensor, z: Tensor) -> Tensor:
    """Log p(x_n given z_g) of every pair, (N, G), one traced program per latent value."""
    columns = []
    for value in z:
        fixed = poutine.condition(entry, {"z": value.expand(len(x), -1)})
        with isolated(0):
            node = poutine.trace(fixed).get_trace(Batch.full(x)).nodes["x"]
        columns.append(node["fn"].log_prob(node["value"]))
    return torch.stack(columns, -1)


def test_is_in_the_registry() -> None:
    assert get_entry("vae") is VAE
    assert "quadrature" in capabilities(VAE.example())
    assert "quadrature" not in capabilities(VAE.example(latent_dim=3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_log_likelihood_is_that_of_the_program(
    architecture: str, likelihood: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every row at every latent value, in chunks too; 1e-11 relative: other orders of sums of some hundred terms."""
    build = example if architecture == "mlp" else conv_example
    entry = build(likelihood=likelihood, activation=activation)
    x, _ = entry.simulate(6, seed=2)
    z = torch.randn(5, 2, dtype=torch.float64)
    traced = traced_log_likelihood(entry, x, z)
    found = entry.log_likelihood(x, z)
    assert found.shape == (6, 5)
    bound = 1e-11 * traced.abs().max()
    assert (found - traced).abs().max() < bound
    assert (entry.log_likelihood(x, z.flip(0)) - traced).abs().max() > 0.1  # negative control
    monkeypatch.setattr(vae, "CHUNK_ELEMENTS", 2 * entry.likelihood.outputs)
    assert (entry.log_likelihood(x, z) - traced).abs().max() < bound
    with torch.no_grad():
        next(weight for weight in entry.decoder.parameters() if weight.ndim == 2).mul_(1.001)
    assert (entry.log_likelihood(x, z) - traced).abs().max() > bound  # negative control


def test_log_likelihood_of_sharp_noise_far_from_zero_does_not_cancel() -> None:
    entry = example(likelihood="normal", noise_floor=1e-4)
    with torch.no_grad():
        entry.likelihood.log_excess.fill_(math.log(1e-4))
    x, z = entry.simulate(6, seed=2)
    with torch.no_grad():
        entry.decoder[2].bias += 1e4
    moved = x + 1e4
    unit = entry.likelihood.unit
    direct = dist.Normal(entry.decode(z), unit * entry.likelihood.noise_scale).log_prob(moved[:, None]).sum(-1)
    error = (entry.log_likelihood(moved, z) - direct).abs() / direct.abs()
    assert error.max() < 1e-9
    y = moved[:, None] / unit
    uncentred = y.square().sum(-1) + entry.decoder(z).square().sum(-1) - 2 * (y[:, 0] @ entry.decoder(z).mT)
    centred = (y - entry.decoder(z)).square().sum(-1)
    assert ((uncentred - centred).abs() / centred).max() > 1e-9  # negative control: without centring digits are lost


def test_decode_is_the_mean_of_the_program() -> None:
    for likelihood in LIKELIHOODS:
        entry = example(likelihood=likelihood)
        with torch.no_grad():
            entry.decoder[2].weight *= 0.3  # no probability so near 0 or 1 that its count is far from normal
        z = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
        draws = 20_000
        with isolated(3), torch.no_grad(), pyro.validation_enabled(False):
            fixed = poutine.condition(poutine.uncondition(entry), {"z": z.expand(draws, -1)})
            trace = poutine.trace(fixed).get_trace(Batch.full(torch.zeros(draws, 8).double()))
        x = trace.nodes["x"]["value"].double()
        standard_error = x.std(0) / math.sqrt(draws)
        assert ((x.mean(0) - entry.decode(z)[0]).abs() < Z_BOUND * standard_error).all()
        assert ((x.mean(0) - entry.decode(-z)[0]).abs() > Z_BOUND * standard_error).any()  # negative control


def test_latents_may_carry_a_particle_dimension() -> None:
    entry = example()
    x, _ = entry.simulate(4, seed=0)
    with isolated(0), pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(entry).get_trace(Batch.full(x))
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (3, 4, 2)
    assert trace.nodes["x"]["log_prob"].shape == (3, 4)


def test_starts_at_the_mean_of_binary_columns() -> None:
    x = (torch.rand(400, 6, dtype=torch.float64) < torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0, 0.0])).double()
    entry = VAE.from_data(x)
    start = entry.decoder[2].bias.sigmoid().double()
    assert (start - x.mean(0)).abs().max() < 1.5e-3  # the last two columns are constant: half a count away
    assert start.max() < 1
    assert start.min() > 0


def test_raw_columns_of_any_unit_start_at_the_same_footing() -> None:
    x = torch.tensor(load_wine().data)
    entry = VAE.from_data(x, likelihood="normal").double()
    _, z = entry.simulate(2000, seed=0)
    assert x.std(0).max() / x.std(0).min() > 1000
    residual = (x - entry.decode(z).mean(0)).square().mean(0).sqrt() / x.std(0)
    assert ((residual > 0.7) & (residual < 1.5)).all()
    standardised = VAE.from_data((x - x.mean(0)) / x.std(0, correction=0), likelihood="normal").double()
    zs = torch.randn(4, 2, dtype=torch.float64)
    jacobian = x.std(0, correction=0).log().sum()
    expected = standardised.log_likelihood((x - x.mean(0)) / x.std(0, correction=0), zs) - jacobian
    assert (entry.log_likelihood(x, zs) - expected).abs().max() < 1e-3  # the buffers of both were rounded to float32


def test_constant_columns_have_the_unit_one() -> None:
    x = torch.cat([torch.randn(50, 2), torch.full((50, 1), 0.1)], 1).double()
    entry = VAE.from_data(x, likelihood="normal")
    assert entry.likelihood.unit[2] == 1
    assert entry.log_likelihood(x.float(), torch.zeros(1, 2)).isfinite().all()


def test_restarts_differ_and_seeds_repeat() -> None:
    x, _ = VAE.example().simulate(50, seed=0)
    first, again, other = (VAE.from_data(x, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.decoder[0].weight, again.decoder[0].weight)
    assert not torch.equal(first.decoder[0].weight, other.decoder[0].weight)
    before = first.decoder[0].weight.clone()
    first.initialize(x, restart=1)
    assert not torch.equal(first.decoder[0].weight, before)


def test_noise_scale_stays_above_its_floor() -> None:
    entry = VAE.example(likelihood="normal", noise_floor=0.05)
    with torch.no_grad():
        entry.likelihood.log_excess.fill_(-80.0)
    assert entry.likelihood.noise_scale.item() == pytest.approx(0.05, rel=1e-6)
    assert VAE.example(likelihood="normal", noise_floor=0.9).likelihood.noise_scale > 0.9


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_simulates_structured_rows_and_repeats_a_seed(likelihood: str) -> None:
    entry = VAE.example(likelihood=likelihood, columns=7)
    x, z = entry.simulate(500, seed=4)
    assert x.shape == (500, 7)
    assert z.shape == (500, 2)
    assert x.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip((x, z), entry.simulate(500, seed=4), strict=True))
    assert not torch.equal(x, entry.simulate(500, seed=5)[0])
    if likelihood != "normal":
        assert x.unique().tolist() == list(range(2 if likelihood == "bernoulli" else vae.EXAMPLE_LEVELS))
    largest = torch.linalg.eigvalsh(torch.corrcoef(x.mT))[-1]
    shuffled = torch.stack([column[torch.randperm(500)] for column in x.mT])
    assert largest > 1.7
    assert torch.linalg.eigvalsh(torch.corrcoef(shuffled))[-1] < 1.5  # negative control: no structure left


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("build", [example, conv_example])
def test_gradients_agree_with_finite_differences(build: Callable[..., VAE], likelihood: str) -> None:
    entry = build(likelihood=likelihood)
    x, _ = entry.simulate(5, seed=0)
    z = torch.randn(4, 2, dtype=torch.float64)
    parameters = list(entry.parameters())

    def objective() -> Tensor:
        return entry.log_likelihood(x, z).logsumexp(-1).sum()

    direction = [torch.randn_like(p) for p in parameters]
    gradient = torch.autograd.grad(objective(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=step)
            ends.append(float(objective()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
    assert -slope != pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)  # negative control


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, -2.0]]), {}, "found -2 in column 2, row 3.*likelihood=normal"),
        (torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.0, 1.0]]), {}, "found 0.5 in column 1, row 2.*digits-binary"),
        (torch.zeros(9, 2), {"latent_dim": 3}, "latent_dim: found 3 for 9 rows x 2 columns, expected at most 2"),
        (torch.zeros(3, 8), {"latent_dim": 3}, "latent_dim: found 3 for 3 rows x 8 columns, expected at most 2"),
        (torch.zeros(9, 2), {"latent_dim": 0}, "latent_dim: found 0, expected int >= 1"),
        (torch.zeros(9, 2), {"activation": "tan"}, r"activation: found 'tan', expected tanh \| relu \| softplus"),
        (torch.zeros(9, 2), {"likelihod": "normal"}, "did you mean 'likelihood'"),
        (torch.zeros(9, 12), {"architecture": "conv"}, "image_shape: found none for rows of 12 columns.*image_shape="),
        (torch.zeros(9, 9), {"architecture": "conv"}, "found images of 3x3, expected sides of at least 4.*take mlp"),
        (torch.zeros(9, 12), {**IMAGES, "image_shape": "2x6"}, "found images of 2x6, expected sides of at least 4"),
        (torch.zeros(9, 64), {"image_shape": "8x9"}, "found 8x9, which is 72 columns, expected a shape for the 64"),
        (torch.zeros(9, 64), {"image_shape": "8x"}, "image_shape: found '8x', expected HEIGHTxWIDTH or CHANNELSx"),
        (torch.zeros(9, 64), {"image_shape": "0x4"}, "image_shape: found '0x4', expected HEIGHTxWIDTH"),
        (torch.zeros(9, 64), {"image_shape": "1x1x8x8"}, "image_shape: found '1x1x8x8', expected HEIGHTxWIDTH"),
        (torch.zeros(9, 64), {"image_shape": 8}, r"image_shape: found 8, expected str \| none"),
        (
            torch.tensor([[0, 2], [1, 1], [0, 2.5]]),
            LEVELS,
            "found 2.5 in column 2, row 3.*0 to 2; set likelihood=normal",
        ),
        (torch.tensor([[0, 2], [1, 1], [-1.0, 2]]), LEVELS, "found -1 in column 1, row 3 .*whole numbers from 0 to 2"),
        (torch.tensor([[0, 2], [1, 7.0], [1, 2]]), LEVELS | {"levels": 3}, "found 7 in column 2.*0 to 2; set levels=8"),
        (
            torch.tensor([[0, 2], [1, 1e9], [1, 2]]),
            LEVELS,
            r"found 1e\+09 in column 2.*from 0 to 65535; set likelihood",
        ),
        (torch.zeros(9, 2), LEVELS | {"levels": 1}, r"levels: found 1, expected int \| none >= 2, <= 65536"),
    ],
)
def test_bad_input_gets_one_line(x: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        VAE.from_data(x.double(), **options)
    assert "\n" not in str(error.value)


def test_numbers_are_welcome_under_the_normal_likelihood() -> None:
    assert VAE.from_data(torch.randn(9, 2).double(), likelihood="normal").dtype == torch.float32


def transposed_convolution(maps: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Stride 2, kernel 4, one line cropped all round, by its definition: each input stamps the kernel on the output."""
    (_, outputs, _, _), (_, height, width) = weight.shape, maps.shape
    canvas = np.zeros((outputs, 2 * height + 2, 2 * width + 2))
    for i, j in itertools.product(range(height), range(width)):
        canvas[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("c,cokl->okl", maps[:, i, j], weight)
    return canvas[:, 1:-1, 1:-1]


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical"])
@pytest.mark.parametrize(("shape", "smallest"), [("5x7", (3, 4)), ("3x8x8", (4, 4)), ("4x17", (1, 5))])
def test_conv_decoder_is_its_formula(shape: str, smallest: tuple[int, int], likelihood: str) -> None:
    """Dense layers, then stamps cropped to the sides before halving, in NumPy (1e-12 relative: sums of some dozens)."""
    channels, height, width = [1, *map(int, shape.split("x"))][-3:]
    columns = channels * height * width
    options = {"architecture": "conv", "image_shape": shape, "channels": 3, "likelihood": likelihood}
    entry = example(columns, **options)
    with torch.no_grad():
        entry.decoder.bias.normal_()
    weights = {name: value.detach().numpy() for name, value in entry.decoder.named_parameters()}
    z = np.array([0.3, -1.2])
    levels = vae.EXAMPLE_LEVELS if likelihood == "categorical" else 1

    def outputs(cropped_first: bool = False) -> np.ndarray:
        hidden = np.tanh(weights["dense.0.weight"] @ z + weights["dense.0.bias"])
        maps = (weights["dense.2.weight"] @ hidden + weights["dense.2.bias"]).reshape(3, *smallest)
        stages = sum(name.startswith("doublings") and "weight" in name for name in weights)
        sides = [(height, width)]
        while len(sides) < stages:
            sides.append(tuple((side + 1) // 2 for side in sides[-1]))
        for stage, (h, w) in enumerate(reversed(sides)):
            grown = transposed_convolution(np.tanh(maps), weights[f"doublings.{stage}.weight"])
            maps = grown[:, -h:, -w:] if cropped_first else grown[:, :h, :w]
            bias = weights.get(f"doublings.{stage}.bias")
            maps = maps if bias is None else maps + bias[:, None, None]
        by_pixel = maps.reshape(channels, levels, height, width).transpose(0, 2, 3, 1)
        return by_pixel.reshape(-1) + weights["bias"]

    found = entry.decoder(torch.tensor(z)).detach().numpy()
    bound = 1e-12 * np.abs(found).max()
    assert found.shape == (columns * levels,)
    assert np.abs(found - outputs()).max() < bound
    is_odd = bool(height % 2 or width % 2)
    assert (np.abs(found - outputs(cropped_first=True)).max() > bound) == is_odd  # negative control: the other end cut
    weights["bias"] = weights["bias"] + 1e-9
    assert np.abs(found - outputs()).max() > bound  # negative control


def test_probabilities_of_levels_sum_to_one_over_all_rows() -> None:
    """Over the 4³ rows that three columns can be, at any z (1e-12: sums of 64 terms); raw outputs do not."""
    entry = example(3, likelihood="categorical")
    rows = torch.cartesian_prod(*[torch.arange(4.0)] * 3).double()
    z = torch.randn(5, 2, dtype=torch.float64)
    with torch.no_grad():
        total = entry.log_likelihood(rows, z).exp().sum(0)
        logits = entry.decoder(z).reshape(5, 3, 4)
        raw = torch.stack([logits[:, range(3), row].sum(-1) for row in rows.long()]).exp().sum(0)
    assert (total - 1).abs().max() < 1e-12
    assert (raw - 1).abs().max() > 1e-3  # negative control: not normalised


def test_evidence_of_levels_is_an_integral() -> None:
    """log p(x) by quadrature equals 401² points in NumPy (1e-6 nats per datum beside its own error)."""
    entry = example(3, likelihood="categorical", levels=3)
    x, _ = entry.simulate(5, seed=3)
    found = log_evidence(entry, x)
    assert found is not None and found.kind == "quadrature" and found.per_datum is not None
    axis = np.linspace(-7, 7, 401)
    nodes = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    first, last = entry.decoder[0], entry.decoder[2]
    w1, b1, w2, b2 = (p.detach().numpy() for p in (first.weight, first.bias, last.weight, last.bias))
    logits = (np.tanh(nodes @ w1.T + b1) @ w2.T + b2).reshape(-1, 3, 3)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    prior = np.exp(-0.5 * (nodes**2).sum(-1)) / (2 * np.pi) * (axis[1] - axis[0]) ** 2

    def expected(rows: np.ndarray) -> np.ndarray:
        return np.array([np.log((probabilities[:, range(3), row].prod(-1) * prior).sum()) for row in rows])

    rows, bound = x.numpy().astype(int), found.standard_error + 5e-6
    assert np.abs(found.per_datum.numpy() - expected(rows)).sum() < bound
    assert np.abs(found.per_datum.numpy() - expected((rows + 1) % 3)).sum() > bound  # negative control


def test_levels_are_counted_and_start_at_their_frequencies() -> None:
    """One row more, spread over the levels: at z = 0 with no weights y gives just that (float32)."""
    x = torch.tensor([[0, 3], [0, 1], [2, 1], [0, 1]]).double()
    entry = VAE.from_data(x, likelihood="categorical")
    assert entry.options.levels == 4
    probabilities = entry.decoder[2].bias.detach().reshape(2, 4).softmax(-1)
    counts = torch.tensor([[3, 0, 1, 0], [0, 3, 0, 1]])
    assert (probabilities - (counts + 0.25) / 5).abs().max() < 1e-6
    assert (probabilities - counts / 4).abs().max() > 1e-6  # negative control
    assert VAE.from_data(x, likelihood="categorical", levels=9).likelihood.outputs == 18


def test_conv_starts_at_the_mean_of_every_pixel() -> None:
    """The last bias is one for each pixel, so that the start explains what an mlp's does (half a count, float32)."""
    x = (torch.rand(50, 35) < torch.linspace(0.1, 0.9, 35)).double()
    entry = VAE.from_data(x, architecture="conv", image_shape="5x7")
    assert (entry.decoder.bias.sigmoid().double() - x.mean(0).clamp(0.01, 0.99)).abs().max() < 1e-6
    assert (entry.decoder.bias.sigmoid().double() - x.mean()).abs().max() > 1e-6  # negative control
    numbers = VAE.from_data(torch.randn(50, 36).double(), architecture="conv", likelihood="normal")
    assert numbers.decoder.bias.abs().max() == 0 and numbers.image_shape == (1, 6, 6)


def test_rows_with_other_levels_are_refused_after_the_fit() -> None:
    x, _ = example(likelihood="categorical", levels=3).simulate(6, seed=0)
    fit = ez.fit("vae", x, guide="amortized", likelihood="categorical", steps=2, hidden=4, progress=False)
    for ask in (fit.score_samples, fit.elbo):
        for value in (3.0, 0.5, -1.0):
            other = x.clone()
            other[4, 2] = value
            with pytest.raises(
                InvalidInput, match=r"found .* in column 3, row 11 .*whole numbers from 0 to 2"
            ) as caught:
                ask(other)
            assert "\n" not in str(caught.value)
    fit.elbo(x)  # negative control: the levels of the fit are welcome


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_saved_fit_of_images_answers_as_before(likelihood: str, tmp_path: Path) -> None:
    """Architecture, shape, levels and encoder come back with it: the same ELBO to the last bit."""
    x, _ = conv_example(likelihood=likelihood).simulate(6, seed=0)
    fit = ez.fit("vae", x, guide="amortized", **IMAGES, likelihood=likelihood, steps=3, hidden=4, progress=False)
    loaded = ez.Fit.load(fit.save(tmp_path / "fit"))
    assert loaded.entry.image_shape == (2, 5, 7) and loaded.entry.options == fit.entry.options
    assert loaded.elbo(x) == fit.elbo()
    assert loaded.elbo(x[:5]) != fit.elbo()  # negative control
    assert torch.equal(loaded.sample(5), fit.sample(5)) and fit.sample(5).shape == (5, 70)


@pytest.mark.slow
def test_a_convolutional_vae_learns_digits_and_stays_below_its_evidence() -> None:
    """On 300 binary digits of 8 x 8: more than 5 nats per image above the untrained one, in 200 steps.

    And the ELBO is below log p(x) by quadrature on 30 images, within six standard errors.
    """
    x = ez.load_data("digits-binary").x[:300]
    options = {"architecture": "conv", "hidden": 16, "channels": 6, "learning_rate": 0.02, "progress": False}
    untrained, trained = (ez.fit("vae", x, guide="amortized", steps=steps, **options) for steps in (1, 200))
    part = x[:30]
    before, now = (
        elbo_estimate(importance_weights(fit.entry, fit.guide, Batch.full(part), 1000, seed=1))
        for fit in (untrained, trained)
    )
    assert now[0] > before[0] + 5.0 * len(part)
    evidence = trained.log_evidence(part)
    assert evidence.kind == "quadrature"
    assert now[0] <= evidence.value + 6 * now[1] + evidence.standard_error
    assert evidence.value < now[0] + 2.0 * len(part)  # negative control: that bound is not far away
