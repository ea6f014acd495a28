"""One gradient step of an optimiser on an objective, as Pyro takes it."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from elbozoo.guides.base import Guide
from elbozoo.inference.corruption import renew, seeing
from elbozoo.inference.losses import OwnELBO
from elbozoo.inference.memory import Adam, Memory
from elbozoo.inference.objectives import Objective
from elbozoo.inference.training import TrainingOptions
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import collapsed
from elbozoo.models.contract.entry import Entry


class Step(Protocol):
    """One gradient step of an optimiser on an objective; another engine may take the place of Pyro's."""

    def __call__(self, batch: Batch) -> float:
        """Take a step on ``batch`` and return the loss before it, nats over the whole data set."""
        ...

    def scale_learning_rate(self, factor: float) -> None:
        """Set the step size to ``factor`` times the one at the start."""
        ...


class PyroStep:
    """Pyro's differentiable ELBO, or one of ours, and PyTorch's Adam.

    Attributes
    ----------
    count : int
        Number of steps taken, which a scheduled objective depends on.
    """

    def __init__(
        self, entry: Entry, guide: Guide, objective: Objective, particles: int, options: TrainingOptions
    ) -> None:
        self.elbo = objective.build(particles, guide, options)
        self.entry, self.guide = entry, guide
        self.program, self.seeing_guide = collapsed(entry, guide.summed_out), seeing(guide, entry)
        self.count = 0
        self.parameters = unique_parameters(entry, guide)
        self.clip_norm = options.clip_norm
        self.learning_rate = options.learning_rate
        self.optimizer = torch.optim.Adam(self.parameters, lr=options.learning_rate)

    def loss(self, batch: Batch) -> Tensor:
        """Minus the objective of ``batch``, nats over the whole data set, on fresh draws."""
        renew(self.seeing_guide)
        loss: Tensor = self.elbo.differentiable_loss(self.program, self.seeing_guide, batch)
        return loss

    def __call__(self, batch: Batch) -> float:
        """Take one step; where the loss is not finite, leave the parameters as they are for a look at them."""
        if isinstance(self.elbo, OwnELBO):
            self.elbo.beta = self.elbo.beta_at(self.count)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm * batch.total)
        self.optimizer.step()
        self.count += 1
        return value

    def scale_learning_rate(self, factor: float) -> None:
        """Set the step size of every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.learning_rate

    def memory(self) -> Memory:
        """Return the number of steps and the state of Adam."""
        adam = Adam(self.optimizer).memory()
        return Memory(adam.tensors, {**adam.values, "count": self.count})

    def recall(self, memory: Memory) -> None:
        """Go on after so many steps."""
        Adam(self.optimizer).recall(memory)
        self.count = memory.values["count"]


def unique_parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of ``modules`` that are optimised, each once."""
    return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())
