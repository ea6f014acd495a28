"""What networks of entries share: shapes of images, feature maps, starting weights, likelihoods and their means."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.images import ConvDecoder, ConvFeatures, Doubling, ImageShape, halvings, image_shape
from elbozoo.models.contract.networks import LevelLikelihood, NetworkOptions, RowLikelihood, count_levels

SHAPES = [(1, 4, 4), (1, 5, 7), (3, 8, 8), (2, 4, 31), (1, 28, 28), (1, 9, 64)]


@pytest.mark.parametrize(
    ("text", "columns", "shape"),
    [
        ("8x8", 64, (1, 8, 8)),
        ("3x8x8", 192, (3, 8, 8)),
        (" 5 X 7 ", 35, (1, 5, 7)),
        ("1x5x7", 35, (1, 5, 7)),
        (None, 784, (1, 28, 28)),
    ],
)
def test_shapes_are_read(text: str | None, columns: int, shape: tuple[int, int, int]) -> None:
    found = image_shape(text, columns)
    assert found == shape and found.size == columns
    assert image_shape(str(found), columns) == found


@pytest.mark.parametrize("text", ["", "x", "8", "8x", "x8", "0x4", "8x-8", "8x8x", "2x2x2x2", "8.0x8", "8*8", "ax8"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"option image_shape: found .*such as 8x8 or 3x32x32") as caught:
        image_shape(text, 64)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "columns"), [("8x8", 63), ("3x8x8", 64), (None, 63), (None, 2)])
def test_a_shape_of_another_size_is_refused(text: str | None, columns: int) -> None:
    with pytest.raises(InvalidInput, match=f"option image_shape: found .*{columns} columns"):
        image_shape(text, columns)


def test_sides_are_halved_and_rounded_up() -> None:
    assert halvings(ImageShape(1, 28, 28)) == [(28, 28), (14, 14), (7, 7)]
    assert halvings(ImageShape(3, 5, 7)) == [(5, 7), (3, 4)]
    assert halvings(ImageShape(1, 4, 31)) == [(4, 31), (2, 16), (1, 8), (1, 4)]
    with pytest.raises(InvalidInput, match="found images of 3x9, expected sides of at least 4"):
        halvings(ImageShape(1, 3, 9))


@pytest.mark.parametrize("shape", SHAPES)
def test_networks_keep_leading_dimensions_and_treat_images_apart(shape: tuple[int, int, int]) -> None:
    """One image alone or among others gets the same numbers (1e-12 relative), and other images other ones."""
    image = ImageShape(*shape)
    networks = (
        (ConvFeatures(image, 3, nn.SiLU).double(), image.size),
        (ConvDecoder(2, image, 4, 5, 3, nn.Tanh).double(), 2),
    )
    for network, inputs in networks:
        x = torch.randn(2, 3, inputs, dtype=torch.float64)
        together, alone, swapped = network(x), network(x[1, 2]), network(x.flip(1))
        assert together.shape[:2] == (2, 3) and alone.shape == together.shape[2:]
        assert (together[1, 2] - alone).abs().max() < 1e-12 * alone.abs().max()
        assert (swapped[1, 2] - alone).abs().max() > 1e-6 * alone.abs().max()  # negative control
        assert network(x[:0]).shape == (0, 3, *alone.shape)
    assert networks[0][0](torch.zeros(1, image.size).double()).shape == (1, networks[0][0].size)
    assert networks[1][0](torch.zeros(1, 2).double()).shape == (1, 4 * image.size)


def test_doubling_starts_at_the_scale_of_a_dense_layer() -> None:
    """Of inputs with unit variance each inner output has variance 1/3, as after ``nn.Linear``."""
    torch.manual_seed(0)

    def variance(make: type[nn.ConvTranspose2d] | type[Doubling]) -> float:
        total = 0.0
        for _ in range(40):
            if make is Doubling:
                layer: nn.ConvTranspose2d = Doubling(8, 16, bias=False)
            else:
                layer = nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1, bias=False)
            with torch.no_grad():
                total += float(layer(torch.randn(1, 8, 8, 8))[..., 1:-1, 1:-1].square().mean()) / 40
        return total

    assert abs(variance(Doubling) - 1 / 3) < 0.1 / 3
    assert abs(variance(nn.ConvTranspose2d) - 1 / 3) > 0.1 / 3  # negative control: torch's own start


@pytest.mark.parametrize("kind", ["bernoulli", "normal", "categorical"])
def test_mean_is_the_sum_over_values(kind: str) -> None:
    """By the densities themselves: summed over all values, or on a fine grid (1e-6; the rule converges faster)."""
    if kind == "categorical":
        likelihood: RowLikelihood = LevelLikelihood(1, 5, NetworkOptions())
        values, output = torch.arange(5.0).double(), torch.randn(5).double()
    else:
        likelihood = RowLikelihood(1, NetworkOptions(likelihood=kind)).double()
        grid = torch.linspace(-12, 12, 2001, dtype=torch.float64)
        values = torch.arange(2.0).double() if kind == "bernoulli" else grid
        output = torch.tensor([0.7]).double()
    if kind == "normal":
        with torch.no_grad():
            likelihood.location.fill_(0.4)
            likelihood.unit.fill_(1.3)
    with torch.no_grad():
        density = likelihood.log_likelihood(values[:, None], output[None])[:, 0].exp()
        step = values[1] - values[0]
        mean = likelihood.mean(output)
    assert mean.shape == (1,)
    assert abs(float(density.sum() * step) - 1) < 1e-6
    assert abs(float((density * values).sum() * step) - float(mean)) < 1e-6
    assert abs(float((density * values).sum() * step) - float(likelihood.mean(-output))) > 1e-3  # negative control


def test_levels_are_one_more_than_the_largest_value() -> None:
    assert count_levels(torch.tensor([[0.0, 16.0], [3.0, 2.0]])) == 17
    assert count_levels(torch.tensor([[0.0]])) == 2  # a constant column could be another one
    assert count_levels(torch.tensor([[math.inf], [math.nan]])) == count_levels(torch.tensor([[1e12]])) == 65_536
