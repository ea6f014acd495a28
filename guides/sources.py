"""Sources: where each datum's parameters of q come from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elbozoo.guides.base import GuideOptions
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.checks import values_are_checked
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.images import ConvFeatures, image_shape


class Shared(nn.Module):
    """One parameter vector for all data."""

    def __init__(self, start: Tensor, x: Tensor, options: GuideOptions) -> None:
        super().__init__()
        self.values = nn.Parameter(start.clone())

    def forward(self, batch: Batch) -> Tensor:
        """Return the parameters (B, P), the same for every row."""
        return self.values.expand(len(batch.x), -1)


class Free(nn.Module):
    """A parameter vector of its own for each datum, and each step or row in it: mean-field variational inference."""

    def __init__(self, start: Tensor, x: Tensor, options: GuideOptions) -> None:
        super().__init__()
        # A little noise, so that no symmetry of the model keeps the optimiser on a saddle.
        self.values = nn.Parameter(start + 0.01 * torch.randn(*x.shape[:-1], len(start), dtype=start.dtype))

    def forward(self, batch: Batch) -> Tensor:
        """Return the parameters of the batch's rows, (B, P), or (B, T, P) of its sequences.

        Raises
        ------
        InvalidInput
            For a batch of another data set.
        """
        if batch.total != len(self.values):
            what = "rows" if batch.x.ndim == 2 else "sequences"
            raise InvalidInput(
                f"found {batch.total} {what}, expected the {len(self.values)} {what} of the fit: a free guide has one "
                "q for each of those and none for others; use an amortized guide for new data"
            )
        return self.values[batch.index]


class Amortized(nn.Module):
    """An encoder from a datum to its parameters; it standardises the columns by the data it was built for."""

    def __init__(self, start: Tensor, x: Tensor, options: GuideOptions) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.takes_logarithms = options.encoder_input == "log1p"
        if self.takes_logarithms and float(x.min()) < 0:
            raise InvalidInput(
                f"option encoder_input: found 'log1p' with the value {float(x.min()):g} in the data, expected counts "
                "or other values of 0 or more; set encoder_input=values"
            )
        x = self._seen(x)
        scale = x.std(0, correction=0)
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))
        self.network = row_encoder(x.shape[1], start, options)

    def forward(self, batch: Batch) -> Tensor:
        """Return the parameters (B, P) that the encoder gives to the rows."""
        result: Tensor = self.network(self.standardised(batch.x))
        return result

    def standardised(self, x: Tensor) -> Tensor:
        """Return what the network sees of the rows ``x`` (B, D)."""
        return (self._seen(x) - self.mean) / self.scale

    def _seen(self, x: Tensor) -> Tensor:
        if not self.takes_logarithms:
            return x
        if values_are_checked() and bool((x <= -1).any()):
            raise InvalidInput(
                f"option encoder_input: found 'log1p' with the value {float(x.min()):g} in rows that the encoder sees, "
                "expected counts or other values of 0 or more; set encoder_input=values"
            )
        return x.log1p()


class SemiAmortized(Amortized):
    """An encoder, then a few gradient steps on the ELBO of each datum, which follow the model at its present θ.

    This is the encoder; the steps are those of :class:`~elbozoo.guides.refinement.Refinement`, for all sites at once.
    """


SOURCES: dict[str, type[nn.Module]] = {
    "shared": Shared,
    "free": Free,
    "amortized": Amortized,
    "semi-amortized": SemiAmortized,
}


def row_encoder(columns: int, start: Tensor, options: GuideOptions) -> nn.Sequential:
    """Build an :func:`encoder` of rows, (..., columns) to (..., P), behind convolutions where they are images.

    Raises
    ------
    InvalidInput
        Under ``encoder=conv`` for rows that are no images.
    """
    if options.encoder != "conv":
        return encoder(columns, start, options)
    features = ConvFeatures(image_shape(options.image_shape, columns), options.channels, nn.SiLU)
    return nn.Sequential(features, *encoder(features.size, start, options)).to(start.dtype)


def encoder(columns: int, start: Tensor, options: GuideOptions) -> nn.Sequential:
    """Build a linear or multilayer encoder of vectors whose output is near ``start`` (P,) for every input."""
    widths = [] if options.encoder == "linear" else [options.hidden] * options.layers
    parts: list[nn.Module] = []
    for inputs, outputs in zip([columns, *widths], widths, strict=False):
        parts += [nn.Linear(inputs, outputs), nn.SiLU()]
    head = nn.Linear([columns, *widths][-1], len(start))
    with torch.no_grad():
        head.weight.mul_(0.1)
        head.bias.copy_(start)
    return nn.Sequential(*parts, head).to(start.dtype)
