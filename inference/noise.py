"""Random draws as functions of noise that is given, so that a step of SVI is a function of its inputs alone.

A draw of PyTorch's is a transformation of a few kinds of noise that depend on no parameter. Here the kinds are drawn
in PyTorch's own order and put through its own transformations, so that a seed gives the same draws, bit for bit,
whether the noise is drawn inside or outside.

Samplers that look at their parameters before they know how much noise they need, those of gamma, Poisson and
binomial distributions and what is made of them, cannot take it from outside and are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Kind = Literal["normal", "uniform", "exponential"]


class Noise(NamedTuple):
    """Noise that a step asks for: standard normal, uniform on [0, 1), or standard exponential numbers."""

    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def draw(self, generator: torch.Generator | None = None, out: Tensor | None = None) -> Tensor:
        """Draw it from ``generator``, by default the global one, into ``out`` where that is given."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device) if out is None else out
        if self.kind == "normal":
            return out.normal_(generator=generator)
        return out.uniform_(generator=generator) if self.kind == "uniform" else out.exponential_(generator=generator)


class OutsideNoise(TorchFunctionMode):
    """Runs a program on noise from outside.

    Parameters
    ----------
    given : sequence of Tensor, optional
        What to use, in the order in which the program asks; drawn where it is needed if left out.

    Attributes
    ----------
    asked : list of Noise
        What the program has asked for.
    values : list of Tensor
        What it got.
    calls : int
        Number of functions of PyTorch's that the program has called.
    is_all : bool
        Whether every sampler that the program has called takes its noise from here.
    """

    def __init__(self, given: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.asked: list[Noise] = []
        self.values: list[Tensor] = []
        self.calls = 0
        self.is_all = True
        self._given: Iterator[Tensor] | None = None if given is None else iter(given)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer a sampler of ours; leave everything else to PyTorch."""
        self.calls += 1
        draw = _SAMPLERS.get(func)
        result = None if draw is None else draw(self, *args, **(kwargs or {}))
        if result is not None:
            return result
        self.is_all &= draw is None and func not in _INSIDE
        return func(*args, **(kwargs or {}))

    def take(self, kind: Kind, like: Tensor) -> Tensor:
        """Return noise of the shape, type and device of ``like``."""
        noise = Noise(kind, like.shape, like.dtype, like.device)
        self.asked.append(noise)
        self.values.append(noise.draw() if self._given is None else next(self._given))
        return self.values[-1]


# Each sampler gives None for arguments that it does not know, and PyTorch answers then.


def _normal_in_place(noise: OutsideNoise, x: Tensor, mean: float = 0.0, std: float = 1.0, **rest: Any) -> Tensor | None:
    if rest or not x.is_contiguous():
        return None
    drawn = noise.take("normal", x)
    return x.copy_(drawn if (mean, std) == (0.0, 1.0) else drawn * std + mean)


def _uniform_in_place(
    noise: OutsideNoise, x: Tensor, low: float = 0.0, high: float = 1.0, **rest: Any
) -> Tensor | None:
    if rest or not x.is_contiguous():
        return None
    drawn = noise.take("uniform", x)
    return x.copy_(drawn if (low, high) == (0.0, 1.0) else drawn * (high - low) + low)


def _exponential_in_place(noise: OutsideNoise, x: Tensor, rate: float = 1.0, **rest: Any) -> Tensor | None:
    if rest or rate != 1.0 or not x.is_contiguous():
        return None
    return x.copy_(noise.take("exponential", x))


def _factory(kind: Kind) -> Callable[..., Tensor | None]:
    def sample(noise: OutsideNoise, *size: Any, **form: Any) -> Tensor | None:
        return None if form.keys() - {"dtype", "device"} else noise.take(kind, torch.empty(*size, **form))

    return sample


def _factory_like(kind: Kind) -> Callable[..., Tensor | None]:
    def sample(noise: OutsideNoise, input: Tensor, **form: Any) -> Tensor | None:
        if form.keys() - {"dtype", "device"} or not input.is_contiguous():  # PyTorch fills in the order of memory
            return None
        return noise.take(kind, torch.empty_like(input, **form))

    return sample


def _normal(noise: OutsideNoise, mean: Any, std: Any = 1.0, *rest: Any, **form: Any) -> Tensor | None:
    if rest or form or not (isinstance(mean, Tensor) and isinstance(std, Tensor) and mean.shape == std.shape):
        return None
    # As PyTorch's, without a gradient.
    drawn = noise.take("normal", torch.empty_like(mean, memory_format=torch.contiguous_format))
    return drawn * std.detach() + mean.detach()


def _bernoulli(noise: OutsideNoise, input: Tensor, *rest: Any, **form: Any) -> Tensor | None:
    if rest or form:
        return None
    uniform = noise.take("uniform", torch.empty(input.shape, dtype=input.dtype, device=input.device))
    return (uniform < input).to(input.dtype)


def _multinomial(noise: OutsideNoise, input: Tensor, num_samples: int, *rest: Any, **form: Any) -> Tensor | None:
    if num_samples != 1 or form.keys() - {"replacement"}:
        return None
    race = noise.take("exponential", torch.empty(input.shape, dtype=input.dtype, device=input.device))
    return (input / race).argmax(-1, keepdim=True)


_INSIDE = {
    torch._standard_gamma,
    torch._sample_dirichlet,
    torch.poisson,
    torch.binomial,
    torch.Tensor.cauchy_,
    torch.Tensor.geometric_,
    torch.Tensor.log_normal_,
    torch.Tensor.bernoulli_,
    torch.randint,
    torch.randperm,
    torch.nn.functional.dropout,
}

_SAMPLERS: dict[Any, Callable[..., Tensor | None]] = {
    torch.Tensor.normal_: _normal_in_place,
    torch.Tensor.uniform_: _uniform_in_place,
    torch.Tensor.exponential_: _exponential_in_place,
    torch.randn: _factory("normal"),
    torch.rand: _factory("uniform"),
    torch.randn_like: _factory_like("normal"),
    torch.rand_like: _factory_like("uniform"),
    torch.normal: _normal,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.multinomial: _multinomial,
    torch.Tensor.multinomial: _multinomial,
}
