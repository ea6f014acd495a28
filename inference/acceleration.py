"""Extrapolation of fixed-point iterations that converge slowly, such as EM's.

SQUAREM (Varadhan & Roland 2008, scheme S3): from θ₀ and two steps of EM, θ₁ = F(θ₀) and θ₂ = F(θ₁), with
r = θ₁ - θ₀ and v = (θ₂ - θ₁) - r,

    θ' = θ₀ - 2 α r + α² v,    α = -|r| / |v|,

which is θ₂ at α = -1 and the limit if the error shrinks by the same factor each step. θ' is on trial: where the
log-likelihood is below the last one, θ₂ takes its place. How far α may go grows where the bound is reached and
shrinks where a trial fails. F(θ') begins the next cycle.

References
----------
Varadhan, R. and Roland, C. (2008). Simple and Globally Convergent Methods for Accelerating the Convergence of Any EM
Algorithm. Scandinavian Journal of Statistics 35(2), 335-353.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from elbozoo.models.contract.entry import Entry

WIDEN = 4.0  # factor of the bound on the step, as in the authors' own program
RATES_KEPT = 10  # cycles of which the slowest rate counts


class Squarem:
    """SQUAREM on the unconstrained parameters of an entry.

    Attributes
    ----------
    has_jumped : bool
        Whether the present θ is an extrapolation that has not been judged yet.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.has_jumped = False
        self._iterates = [self._vector()]
        self._fallback: Tensor | None = None
        self._longest = 1.0
        self._steps: deque[float] = deque(maxlen=RATES_KEPT)

    def after_step(self) -> float:
        """Take note of a step of EM, and extrapolate after the second; return EM's slowest rate, as far as is known.

        The rate is that by which the gains in log-likelihood shrink from one step of EM to the next.
        """
        theta = self._vector()
        if self.has_jumped:
            # A step after an extrapolation begins the next cycle.
            self.has_jumped, self._iterates = False, [theta]
        else:
            self._iterates.append(theta)
        if len(self._iterates) == 3:
            self._extrapolate(*self._iterates)
        return max(((1 - 1 / step) ** 2 for step in self._steps), default=0.0)

    def take_back(self) -> None:
        """Return from an extrapolation that has failed to where EM itself had come."""
        assert self._fallback is not None
        self._set(self._fallback)
        self.has_jumped, self._iterates = False, [self._fallback]
        self._longest = max(1.0, self._longest / WIDEN)

    def _extrapolate(self, start: Tensor, once: Tensor, twice: Tensor) -> None:
        r = once - start
        v = twice - once - r
        length, bend = float(r.norm()), float(v.norm())
        self._iterates, self._fallback = [twice], twice
        if bend == 0 or length <= bend:
            return  # at rest, or no slower than halving its error: EM itself does as well
        self._steps.append(length / bend)
        step = min(length / bend, self._longest)
        if step == self._longest:
            self._longest *= WIDEN
        if step == 1.0:
            return
        self._set(start + 2 * step * r + step**2 * v)
        self.has_jumped = True

    def _vector(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.entry.parameters()])

    def _set(self, theta: Tensor) -> None:
        parameters = list(self.entry.parameters())
        parts = theta.split([parameter.numel() for parameter in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part.view_as(parameter))
