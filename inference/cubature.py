"""Log-integrals over one to three real dimensions, with an error estimate.

The evidence of a program with few global latents is one such integral. Three stages:

1. *Location*: a cloud of points is moved onto the mass, see :mod:`elbozoo.inference.adaptive_importance`. Where it
   falls into modes far apart, the density is cut into one part for each by smooth weights that add up to one.
2. *Lattices*: the directions of a mode are mapped onto (-1, 1) by u = s t / (1 - t²), under which densities with tails
   down to 1/u² stay bounded, and the midpoint rule is taken on lattices of growing density. For smooth densities
   with lighter tails its error falls faster than any power of the spacing (Trefethen & Weideman 2014, section 8).
3. *Cubature*: where the lattices do not show that, SciPy's adaptive cubature with Gauss-Kronrod rules refines where
   the rule and the one inside it differ.

The error of the lattices is how far the last two are from each other, that of the cubature twice the sum of such
differences over its cells, and no less than the tolerance: a hundred times too large where the rules converge. The
cloud is a second opinion: where it contradicts the integral by more than six of its standard errors, the error is
raised to the difference.

What goes wrong: a mode is missed that neither a cloud of thousands of points nor the first rules touch. Along kinks,
where rules converge slowly and may agree by luck, about one integral in a hundred has more error than it reports.

References
----------
```bibtex
@article{trefethen2014exponentially,
  author = {Trefethen, Lloyd N. and Weideman, J. A. C.},
  title = {The Exponentially Convergent Trapezoidal Rule},
  journal = {SIAM Review}, volume = {56}, number = {3}, pages = {385--458}, year = {2014}
}
```
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import cubature
from torch import Tensor

from elbozoo.inference.adaptive_importance import Cloud, Located, LogDensity, around, locate, log_normal
from elbozoo.models.contract.errors import NumericalFailure

LARGEST_DIM = 3
TOLERANCE = 1e-5  # nats
EVALUATIONS = 2**21  # of the density in one cubature, at most
LATTICES = (18, 27, 40, 60)  # points per dimension of one lattice after the other
DECAY = 0.5  # ratio of the differences between lattices that shows convergence
LUCK = 0.05  # share of a difference that the next one may fall short of by chance
SAFETY = 2.0  # times the error that cubature estimates
STRETCH = 5.0  # s in u = s t / (1 - t²)
ATTEMPTS = 3
MISSED = 3.0  # nats above all that the cloud has seen, beyond which the cloud has missed the mass
Z_BOUND = 6.0  # a false alarm of 2e-9
ROUNDING = 1e-12  # relative to max(1, |log value|)


class Cubature(NamedTuple):
    """Logarithm of an integral.

    Attributes
    ----------
    log_value : float
        Nats.
    error : float
        Estimate of its absolute error, nats.
    evaluations : int
        Evaluations of the density.
    """

    log_value: float
    error: float
    evaluations: int


class _Sum(NamedTuple):
    """An integral and its absolute error, as shares of what the cloud makes of the whole integral."""

    value: float
    error: float


@torch.no_grad()
def log_cubature(
    log_density: LogDensity, starts: Tensor, *, tolerance: float = TOLERANCE, evaluations: int = EVALUATIONS
) -> Cubature:
    """Return log ∫ exp f(u) du over all of R^K, K <= 3, with an error estimate.

    Draws from torch's global random state, which the caller seeds.

    Parameters
    ----------
    log_density : callable
        f at the points (G, K): (G,), nats; -inf where there is no mass.
    starts : Tensor (S, K)
        Points, float64, about which the mass may lie, such as draws of the prior.
    tolerance : float
        Error in nats at which to stop.
    evaluations : int
        Most evaluations of the density in a cubature; what has not reached the tolerance by then reports the error
        that it has.

    Raises
    ------
    NumericalFailure
        If the density is zero wherever it was evaluated, or has no finite integral.
    """
    if not 1 <= starts.shape[1] <= LARGEST_DIM or starts.dtype != torch.float64:
        raise ValueError(
            f"found starts of {starts.shape[1]} dimensions in {starts.dtype}, expected one to three in float64"
        )
    density = _Counted(log_density)
    cloud = around(starts)
    for _ in range(ATTEMPTS):
        located = locate(density, cloud)
        before = density.best_value
        found = _integrated(density, located, tolerance, evaluations)
        if math.isfinite(found.value) and found.value > 0 and density.best_value <= before + MISSED:
            return _with_second_opinion(found, located)._replace(evaluations=density.evaluations)
        # The rule came upon mass that the cloud had missed: begin there.
        cloud = Cloud(torch.ones_like(located.modes.share[:1]), density.best[None], 0.1 * located.modes.scale_tril[:1])
    raise NumericalFailure(
        f"cubature found no finite integral: the log density is {density.best_value:.6g} at {density.best.tolist()} "
        "and does not fall off around it; check that the priors are proper"
    )


class _Counted:
    """A log density that counts its evaluations and remembers its largest value."""

    def __init__(self, log_density: LogDensity) -> None:
        self.log_density = log_density
        self.evaluations = 0
        self.best_value = -math.inf
        self.best = torch.empty(0)

    def __call__(self, u: Tensor) -> Tensor:
        value = self.log_density(u).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        self.evaluations += len(u)
        top = int(value.argmax())
        if float(value[top]) > self.best_value:
            self.best_value, self.best = float(value[top]), u[top].clone()
        return value


def _integrated(density: _Counted, located: Located, tolerance: float, evaluations: int) -> _Sum:
    """Add up the integrals of the modes."""
    total = [_Sum(0.0, 0.0)]
    for mode in range(len(located.modes.share)):
        part = _Part(density, located, mode)
        total.append(_on_lattices(part, tolerance) or _by_cubature(part, tolerance, evaluations))
    return _Sum(sum(part.value for part in total), sum(part.error for part in total))


class _Part:
    """The density of one mode over the cube (-1, 1)^K, as a share of what the cloud makes of the whole integral."""

    def __init__(self, density: _Counted, located: Located, mode: int) -> None:
        self.density, self.modes, self.mode = density, located.modes, mode
        self.loc, self.scale_tril = located.modes.loc[mode], located.modes.scale_tril[mode]
        log_volume = float(self.scale_tril.diagonal().log().sum()) + self.dim * math.log(STRETCH)
        self.log_factor = log_volume - located.log_value

    @property
    def dim(self) -> int:
        """Number K of dimensions."""
        return len(self.loc)

    def __call__(self, t: Tensor) -> Tensor:
        """Values at the points ``t`` (G, K): (G,)."""
        gap = 1 - t.square()
        u = self.loc + STRETCH * (t / gap) @ self.scale_tril.mT
        log_jacobian = (torch.log1p(t.square()) - 2 * gap.log()).sum(-1)
        log_value = self.density(u) + log_jacobian + self.log_factor
        if len(self.modes.share) > 1:
            log_value = log_value + self.modes.log_terms(u, log_normal).log_softmax(0)[self.mode]
        return log_value.nan_to_num(nan=-math.inf).exp()


def _on_lattices(part: _Part, tolerance: float) -> _Sum | None:
    """Integrate on lattices; None unless their differences fall below the tolerance and show convergence."""
    values: list[float] = []
    for points in LATTICES:
        axis = (torch.arange(points, dtype=part.loc.dtype) + 0.5) * (2 / points) - 1
        t = torch.cartesian_prod(*[axis] * part.dim).reshape(-1, part.dim)
        values.append(float(part(t).sum()) * (2 / points) ** part.dim)
        if len(values) > 2:
            before, last = abs(values[-2] - values[-3]), abs(values[-1] - values[-2])
            if last <= max(DECAY * before, ROUNDING) and max(last, LUCK * before) <= tolerance:
                return _Sum(values[-1], max(last, LUCK * before))
    return None


def _by_cubature(part: _Part, tolerance: float, evaluations: int) -> _Sum:
    """Integrate by adaptive cubature."""
    # Where few cells hold all of the error, at kinks and most of all in one dimension, rules may agree by luck.
    wanted = tolerance * (LUCK if part.dim == 1 else 1 / SAFETY)
    per_split = 2**part.dim * (2 * 21**part.dim + 10**part.dim)  # value and error of each part
    with np.errstate(all="ignore"):
        found = cubature(
            lambda t: part(torch.from_numpy(np.ascontiguousarray(t))).numpy(),
            np.full(part.dim, -1.0),
            np.full(part.dim, 1.0),
            rule="gk21",
            rtol=0,
            atol=wanted,
            max_subdivisions=max(1, evaluations // per_split),
        )
    return _Sum(float(found.estimate), max(SAFETY * float(found.error), tolerance))


def _with_second_opinion(found: _Sum, located: Located) -> Cubature:
    """Take logarithms, and raise the error to the distance from the cloud's estimate where that is beyond chance."""
    distance = math.log(found.value)
    log_value = located.log_value + distance
    # An error as large as the integral leaves its logarithm without a lower bound.
    error = -math.log1p(-found.error / found.value) if found.error < found.value else math.inf
    error += ROUNDING * max(1.0, abs(log_value))
    contradicted = abs(distance) > Z_BOUND * located.standard_error + error
    return Cubature(log_value, abs(distance) if contradicted else error, 0)
