"""What a fit carries from one step to the next, as tensors and plain values: what a checkpoint has to hold.

Whatever takes part in a fit and remembers something, such as an optimiser or a monitor, can give its memory away and
take it back. Tensors and JSON say it all, so that nothing is ever pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from elbozoo.models.contract.isolation import random_state, set_random_state


@dataclass(frozen=True)
class Memory:
    """The memory of one part of a fit.

    Attributes
    ----------
    tensors : dict of Tensor
        By name; the part's own, so they are copied or written before the next step.
    values : dict
        What JSON can say, by name: numbers, texts, None, and lists of them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Remembers(Protocol):
    """A part of a fit that carries something from step to step.

    A part that is made anew and recalls a memory goes on, bit for bit, as the part that gave it would have.
    """

    def memory(self) -> Memory:
        """Return what is carried, as it is between two steps."""
        ...

    def recall(self, memory: Memory) -> None:
        """Take back what :meth:`memory` gave."""
        ...


class Weights:
    """Parameters and buffers of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def memory(self) -> Memory:
        """Return the module's state."""
        return Memory(dict(self.module.state_dict()))

    def recall(self, memory: Memory) -> None:
        """Copy the state into the module, whose parameters stay the same objects."""
        self.module.load_state_dict(memory.tensors)


class Adam:
    """The running moments of an Adam optimiser, its numbers of steps and its step size."""

    def __init__(self, optimizer: torch.optim.Adam) -> None:
        self.optimizer = optimizer

    def memory(self) -> Memory:
        """Return the moments of each parameter by its position, and the step size."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{position}.{name}": value for position, of in state.items() for name, value in of.items()}
        return Memory(tensors, {"learning_rates": [group["lr"] for group in self.optimizer.param_groups]})

    def recall(self, memory: Memory) -> None:
        """Take them back."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in memory.tensors.items():
            position, _, name = key.partition(".")
            state.setdefault(int(position), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for group, rate in zip(self.optimizer.param_groups, memory.values["learning_rates"], strict=True):
            group["lr"] = rate


class RandomStates:
    """The state of every source of random numbers: of torch on each device, of NumPy and of Python."""

    def memory(self) -> Memory:
        """Return the states."""
        state = random_state()
        version, words, gauss = state["random"]
        algorithm, keys, position, has_gauss, cached = state["numpy"]
        tensors = {
            "python": torch.tensor(words, dtype=torch.int64),
            "numpy": torch.tensor(keys.astype("int64")),
            **{f"torch.{device}": value for device, value in state["torch"].items()},
        }
        values = {
            "python": [version, gauss],
            "numpy": [algorithm, int(position), int(has_gauss), float(cached)],
        }
        return Memory(tensors, values)

    def recall(self, memory: Memory) -> None:
        """Take them back."""
        version, gauss = memory.values["python"]
        algorithm, position, has_gauss, cached = memory.values["numpy"]
        keys = memory.tensors["numpy"].numpy().astype("uint32")
        # Of the devices, those that this process uses: another one may have more of them.
        devices = {name: memory.tensors[f"torch.{name}"] for name in random_state()["torch"]}
        set_random_state(
            {
                "random": (version, tuple(memory.tensors["python"].tolist()), gauss),
                "numpy": (algorithm, keys, position, has_gauss, cached),
                "torch": devices,
            }
        )
