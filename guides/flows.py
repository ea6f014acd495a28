"""Normalising flows of one latent vector: Pyro's transforms, conditional on a context of each datum.

Every flow starts as the identity, so that q starts as the normal beneath it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.distributions import transforms
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.nn import ConditionalAutoRegressiveNN, DenseNN
from torch import Tensor, nn
from torch.distributions import Transform, constraints

HIDDEN = 32
BINS, REACH = 8, 4.0  # of a spline, which is the identity beyond that many standard deviations
LEAST_SLOPE = 1e-3  # that Pyro adds to the slopes of a spline


class Coupling(Transform):
    """The first numbers of a vector stay, and bend each of the others by a spline (Durkan et al. 2019).

    Parameters
    ----------
    spline : ConditionalSpline
        Splines of the numbers that are bent, given those that stay and the context.
    stay : int
        How many numbers stay; 0 bends each number by the context alone.
    context : Tensor (..., C)
        The context.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, spline: transforms.ConditionalSpline, stay: int, context: Tensor) -> None:
        super().__init__(cache_size=1)
        self.spline, self.stay, self.context = spline, stay, context

    def _call(self, x: Tensor) -> Tensor:
        spline, kept, before = self._parts(x)
        after = spline(before)
        self._slopes = spline.log_abs_det_jacobian(before, after)
        return torch.cat([kept, after], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        spline, kept, after = self._parts(y)
        before = spline.inv(after)
        self._slopes = spline.log_abs_det_jacobian(before, after)
        return torch.cat([kept, before], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the logarithms of the splines' slopes."""
        cached: tuple[Tensor | None, Tensor | None] = self._cached_x_y
        if cached[0] is not x or cached[1] is not y:
            self(x)
        return self._slopes.sum(-1)

    def _parts(self, vectors: Tensor) -> tuple[Transform, Tensor, Tensor]:
        kept, bent = vectors[..., : self.stay], vectors[..., self.stay :]
        context = self.context.expand(*kept.shape[:-1], -1)
        return self.spline.condition(torch.cat([kept, context], -1)), kept, bent


class ConditionalCoupling(ConditionalTransformModule):
    """The network of a :class:`Coupling`, over vectors of ``dim`` numbers and contexts of ``context`` numbers."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, dim: int, context: int) -> None:
        super().__init__()
        self.stay = dim // 2
        bent = dim - self.stay
        sizes = [bent * BINS, bent * BINS, bent * (BINS - 1)]
        network = DenseNN(self.stay + context, [HIDDEN], sizes, nonlinearity=nn.SiLU())
        self.spline = transforms.ConditionalSpline(network, bent, BINS, REACH, order="quadratic")
        slopes = torch.full((sizes[-1],), math.log(math.expm1(1 - LEAST_SLOPE)))
        _silence(network.layers[-1], torch.cat([torch.zeros(sum(sizes[:-1])), slopes]))

    def condition(self, context: Tensor) -> Transform:
        """Return the coupling for ``context`` (..., C)."""
        return Coupling(self.spline, self.stay, context)


def spline_coupling(dim: int, context: int, layers: int) -> list[ConditionalTransformModule]:
    """Return couplings with the order of the numbers reversed between them, so that each is bent by some layer."""
    backwards = torch.arange(dim).flip(0)
    flow: list[ConditionalTransformModule] = []
    for layer in range(layers):
        if layer:
            flow.append(Reversal(backwards))
        flow.append(ConditionalCoupling(dim, context))
    return flow


class Reversal(ConditionalTransformModule):
    """The numbers in another ``order``, whatever the context."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order: Tensor
        self.register_buffer("order", order, persistent=False)

    def condition(self, context: Tensor) -> Transform:
        """Return the permutation."""
        permutation: Transform = transforms.Permute(self.order, cache_size=1)
        return permutation


def affine_autoregressive(dim: int, context: int, layers: int) -> list[ConditionalTransformModule]:
    """Return inverse autoregressive layers (Kingma et al. 2016, section 3), each the other way round.

    Each number is shifted and scaled by a network of those before it and of the context: drawing is one pass,
    the density at a point drawn elsewhere takes one pass for each number.
    """
    flow: list[ConditionalTransformModule] = []
    for layer in range(layers):
        order = torch.arange(dim) if layer % 2 == 0 else torch.arange(dim).flip(0)
        network = ConditionalAutoRegressiveNN(
            dim, context, [max(HIDDEN, dim)], permutation=order, nonlinearity=nn.SiLU()
        )
        _silence(network.layers[-1], torch.zeros(2 * dim))
        flow.append(transforms.ConditionalAffineAutoregressive(network))
    return flow


FLOWS: dict[str, Callable[[int, int, int], list[ConditionalTransformModule]]] = {
    "affine-autoregressive": affine_autoregressive,
    "spline-coupling": spline_coupling,
}


def _silence(head: nn.Linear, output: Tensor) -> None:
    """Make a network's last layer give ``output``, at which the flow is the identity, for every input."""
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(output)
