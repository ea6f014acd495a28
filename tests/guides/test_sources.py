"""Encoders of rows that are images: their formula, what they see, when they are taken, and what they refuse."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import elbozoo as ez
from elbozoo.guides import Guide, build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.guides.sources import encoder, row_encoder
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.images import ConvFeatures
from elbozoo.models.contract.isolation import isolated


def convolution(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Kernel 3, stride 2, one line of zeros around it, by its definition."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    sides = [range(0, side, 2) for side in image.shape[1:]]
    found = np.zeros((len(weight), *map(len, sides)))
    for (i, top), (j, left) in itertools.product(*map(enumerate, sides)):
        found[:, i, j] = np.tensordot(weight, padded[:, top : top + 3, left : left + 3], 3)
    return found + bias[:, None, None]


def silu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-values))


def images(shape: str, rows: int = 6) -> tuple[Entry, Tensor]:
    """A VAE of images of that shape, and rows drawn from it; its decoder is an mlp."""
    columns = int(np.prod([int(side) for side in shape.split("x")]))
    entry = get_entry("vae").example(columns, seed=1, hidden=4, image_shape=shape).double()
    return entry, entry.simulate(rows, seed=2)[0]


def guide_of(entry: Entry, x: Tensor, name: str = "amortized-diagonal-normal", **options: object) -> Guide:
    with isolated(0):
        return build_guide(name, entry, x, GuideOptions(**options)).double()


def network_of(guide: Guide) -> nn.Module:
    return guide.sources["z"].network


@pytest.mark.parametrize("shape", ["5x7", "2x8x9"])
def test_conv_encoder_is_its_formula(shape: str) -> None:
    """Windows of standardised pixels, a dense layer and the head, in NumPy (1e-12 relative: sums of some dozens)."""
    entry, x = images(shape)
    guide = guide_of(entry, x, hidden=5, channels=3)
    weights = {name: value.detach().numpy() for name, value in network_of(guide).named_parameters()}
    kernels = [name for name in weights if weights[name].ndim == 4]
    dense = [name for name in weights if weights[name].ndim == 2]
    rows = x.numpy()
    scale = rows.std(0)
    standard = (rows - rows.mean(0)) / np.where(scale > 0, scale, 1.0)

    def of_row(row: np.ndarray) -> np.ndarray:
        maps = row.reshape(entry.image_shape)
        for name in kernels:
            maps = silu(convolution(maps, weights[name], weights[name.replace("weight", "bias")]))
        values = maps.reshape(-1)
        for name in dense[:-1]:
            values = silu(weights[name] @ values + weights[name.replace("weight", "bias")])
        return weights[dense[-1]] @ values + weights[dense[-1].replace("weight", "bias")]

    found = guide.sources["z"](Batch.full(x)).detach().numpy()
    bound = 1e-12 * np.abs(found).max()
    assert np.abs(found - np.array([of_row(row) for row in standard])).max() < bound
    assert np.abs(found - np.array([of_row(row) for row in rows])).max() > bound  # negative control: raw pixels
    transposed = [row.reshape(entry.image_shape).transpose(0, 2, 1).reshape(-1) for row in standard]
    assert np.abs(found - np.array([of_row(row) for row in transposed])).max() > bound  # negative control


def test_auto_is_conv_where_rows_are_known_to_be_images() -> None:
    """By the model's shape or an option's; else an mlp, whose starting weights are those that it always had."""
    entry, x = images("5x7")
    plain = get_entry("vae").example(35, seed=1, hidden=4).double()

    def is_conv(guide: Guide) -> bool:
        return any(isinstance(module, ConvFeatures) for module in guide.modules())

    assert is_conv(guide_of(entry, x)) and is_conv(guide_of(plain, x, image_shape="7x5"))
    assert not is_conv(guide_of(plain, x)) and not is_conv(guide_of(entry, x, encoder="mlp"))
    assert not is_conv(guide_of(entry, x, encoder="linear"))
    for name in ("shared-diagonal-normal", "free-full-rank-normal"):
        assert not is_conv(guide_of(entry, x, name))
    assert is_conv(guide_of(entry, x, "semi-amortized-flow"))
    auto, mlp = guide_of(plain, x).state_dict(), guide_of(plain, x, encoder="mlp").state_dict()
    assert all(torch.equal(auto[key], mlp[key]) for key in mlp)
    square = get_entry("vae").example(16, architecture="conv", hidden=4).double()
    assert is_conv(guide_of(square, square.simulate(4, seed=0)[0]))


def test_any_model_of_images_takes_a_conv_encoder() -> None:
    """PPCA on 3 x 4 x 4: an image_shape that is no option of the model reaches the encoder, and is saved with it."""
    x, _ = get_entry("ppca").example(48, seed=0).simulate(20, seed=0)
    options = {"image_shape": "3x4x4", "encoder": "conv", "channels": 2, "hidden": 4, "steps": 3, "progress": False}
    fit = ez.fit("ppca", x, guide="amortized", **options)
    features = next(module for module in fit.guide.modules() if isinstance(module, ConvFeatures))
    assert features.size == 2 * 2 * 2 and fit.guide_options.image_shape == "3x4x4"


def test_upper_layers_have_encoders_of_vectors() -> None:
    """A chain of layers: convolutions read the image, and a dense encoder each layer above it."""
    entry = get_entry("hierarchical-vae").example(16, hidden=4).double()
    x, _ = entry.simulate(5, seed=0)
    guide = guide_of(entry, x, "bottom-up", encoder="conv", channels=2)
    assert sum(isinstance(module, ConvFeatures) for module in guide.modules()) == 1
    assert guide.means(Batch.full(x)).shape == (5, 2)


def test_leading_dimensions_and_the_start_are_kept() -> None:
    """Every row of (2, 3, 35) gets what it gets alone (1e-12), near the parameters at which a family starts."""
    torch.manual_seed(0)
    start = torch.tensor([0.0, -2.3]).double()
    network = row_encoder(35, start, GuideOptions(encoder="conv", image_shape="5x7", hidden=4))
    x = torch.randn(2, 3, 35).double()
    assert (network(x)[1, 2] - network(x[1, 2])).abs().max() < 1e-12
    assert (network(x)[1, 2] - network(x[0, 0])).abs().max() > 1e-12  # negative control
    assert (network(x) - start).abs().max() < 0.2
    vectors = encoder(35, start, GuideOptions(encoder="conv", image_shape="5x7"))
    assert isinstance(vectors[0], nn.Linear)


@pytest.mark.parametrize(
    ("model", "columns", "options", "message"),
    [
        ("ppca", 12, {}, "image_shape: found none for rows of 12 columns, which form no square; set image_shape="),
        ("ppca", 9, {}, "found images of 3x3, expected sides of at least 4 for convolutions; take mlp"),
        ("ppca", 16, {"image_shape": "4x5"}, "found 4x5, which is 20 columns, expected a shape for the 16 columns"),
        ("ppca", 16, {"image_shape": "4x"}, "found '4x', expected HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH"),
        ("conditional-vae", 17, {}, "found none for rows of 17 columns"),
    ],
)
def test_rows_that_are_no_images_are_refused(
    model: str, columns: int, options: dict[str, object], message: str
) -> None:
    """Before anything is fitted, in one line."""
    x, _ = get_entry(model).example(columns, seed=0).simulate(20, seed=0)
    with pytest.raises(InvalidInput, match=re.escape(message)) as caught:
        ez.fit(model, x, guide="amortized", encoder="conv", latent_dim=1, steps=1, **options)
    assert "\n" not in str(caught.value)
