"""Rows that are images: their shape, and networks of convolutions that read and write them.

Both networks walk over the same feature maps: both sides of the image are halved, rounded up, until they are small,
each step a convolution of stride 2 on the way in and a transposed one on the way out, with dense layers at the small
end. That is the form of the networks in Burgess et al. (2018), "Understanding disentangling in β-VAE", appendix A.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elbozoo.models.contract.errors import InvalidInput

LEAST_SIDE = 4  # of an image: below, one convolution sees all of it
COARSEST = 7  # side of a feature map at which halving ends: 28 pixels are halved twice, as usual
FORM = "HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH"


class ImageShape(NamedTuple):
    """Shape of an image whose pixels lie in a row: channel by channel, line by line."""

    channels: int
    height: int
    width: int

    @property
    def size(self) -> int:
        """Number of columns that the image takes."""
        return self.channels * self.height * self.width

    def __str__(self) -> str:
        return "x".join(str(part) for part in (self if self.channels > 1 else self[1:]))


def image_shape(text: str | None, columns: int) -> ImageShape:
    """Return the shape that an option states, of rows of ``columns``; a square of one channel if it states none.

    Raises
    ------
    InvalidInput
        For a text that states no shape, one of another size, or none where the columns form no square.
    """
    if text is None:
        side = math.isqrt(columns)
        if side * side != columns:
            raise InvalidInput(
                f"option image_shape: found none for rows of {columns} columns, which form no square; set "
                f"image_shape={FORM}, or for rows that are no images take mlp as architecture or encoder"
            )
        return ImageShape(1, side, side)
    parts = [part.strip() for part in text.lower().split("x")]
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInput(
            f"option image_shape: found {text!r}, expected {FORM} in whole numbers above 0, such as 8x8 or 3x32x32"
        )
    shape = ImageShape(*[1, *map(int, parts)][-3:])
    if shape.size != columns:
        raise InvalidInput(
            f"option image_shape: found {shape}, which is {shape.size} columns, expected a shape for the {columns} "
            "columns of the data; set another shape, or leave out the columns that are no pixels"
        )
    return shape


def halvings(shape: ImageShape) -> list[tuple[int, int]]:
    """Height and width of the feature maps, from the image inwards: halved at least once, and until both are small.

    Raises
    ------
    InvalidInput
        For an image too small for convolutions.
    """
    sides = [(shape.height, shape.width)]
    if min(sides[0]) < LEAST_SIDE:
        raise InvalidInput(
            f"option image_shape: found images of {shape}, expected sides of at least {LEAST_SIDE} for convolutions; "
            "take mlp as architecture or encoder"
        )
    while len(sides) == 1 or max(sides[-1]) > COARSEST:
        height, width = sides[-1]
        sides.append((-(-height // 2), -(-width // 2)))
    return sides


class Doubling(nn.ConvTranspose2d):
    """A transposed convolution that doubles both sides of a feature map.

    Its kernel of 4 is a multiple of its stride of 2, so that every output has as many inputs as its neighbours and no
    checkerboard shows (Odena et al. 2016, "Deconvolution and checkerboard artifacts").
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=bias)

    @property
    def fan_in(self) -> int:
        """Number of inputs that one output has."""
        return 4 * self.in_channels

    def reset_parameters(self) -> None:
        """Draw weights as those of a dense layer of as many inputs; torch would count outputs in their place."""
        bound = 1 / math.sqrt(self.fan_in)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)


class ConvDecoder(nn.Module):
    """A network from (..., inputs) to some numbers for each pixel, pixel by pixel: (..., pixels * numbers).

    Two dense layers make the smallest feature maps, which are doubled and cropped until they have the image's sides:
    an odd side is no double, so that the last line of what is one too large falls away. The last layer has a bias for
    each output, as a dense one has, so that a fit can start at the mean of each pixel.

    Parameters
    ----------
    inputs : int
        Number of inputs.
    shape : ImageShape
        Shape of the images.
    numbers : int
        How many numbers each pixel gets.
    hidden : int
        Width of the first dense layer.
    channels : int
        Channels of each feature map.
    activation : type
        Nonlinearity between layers.
    """

    def __init__(
        self, inputs: int, shape: ImageShape, numbers: int, hidden: int, channels: int, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        *self.larger, (height, width) = halvings(shape)
        self.split = (shape.channels, numbers)
        self.dense = nn.Sequential(
            nn.Linear(inputs, hidden),
            activation(),
            nn.Linear(hidden, channels * height * width),
            nn.Unflatten(-1, (channels, height, width)),
        )
        self.activation = activation()
        widths = [channels] * len(self.larger) + [shape.channels * numbers]
        self.doublings = nn.ModuleList(
            Doubling(before, after, bias=stage > 1)
            for stage, before, after in zip(range(len(self.larger), 0, -1), widths, widths[1:], strict=False)
        )
        self.bias = nn.Parameter(torch.zeros(shape.size * numbers))

    def forward(self, z: Tensor) -> Tensor:
        """Outputs (..., pixels * numbers) at ``z`` (..., inputs)."""
        lead = z.shape[:-1]
        maps = self.dense(z.reshape(lead.numel(), z.shape[-1]))
        for doubling, (height, width) in zip(self.doublings, reversed(self.larger), strict=True):
            maps = doubling(self.activation(maps))[..., :height, :width]
        by_pixel = maps.unflatten(1, self.split).movedim(2, -1)
        result: Tensor = by_pixel.flatten(1) + self.bias
        return result.reshape(*lead, result.shape[-1])


class ConvFeatures(nn.Module):
    """A network from rows (..., D) of images to features (..., F): convolutions that halve both sides.

    The kernel of 3 with one line of zeros around it gives a side of n the half of n, rounded up.

    Parameters
    ----------
    shape : ImageShape
        Shape of the images.
    channels : int
        Channels of each feature map.
    activation : type
        Nonlinearity after each convolution.

    Attributes
    ----------
    size : int
        F.
    """

    def __init__(self, shape: ImageShape, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        sides = halvings(shape)
        self.size = channels * math.prod(sides[-1])
        parts: list[nn.Module] = [nn.Unflatten(-1, tuple(shape))]
        for inputs in [shape.channels, *[channels] * (len(sides) - 2)]:
            parts += [nn.Conv2d(inputs, channels, kernel_size=3, stride=2, padding=1), activation()]
        self.network = nn.Sequential(*parts, nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., F) of ``x`` (..., D)."""
        features: Tensor = self.network(x.reshape(-1, x.shape[-1]))
        return features.reshape(*x.shape[:-1], self.size)
