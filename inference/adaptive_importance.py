"""Where the mass of a density in few dimensions lies: a cloud of Cauchy distributions, moved by importance sampling.

Points of the cloud are weighed by the density, and a step of EM moves the parts of the cloud toward the mixture of
Student-t distributions that is closest to the weighted points (adaptive importance sampling: Cappé et al. 2008,
section 4.2). As long as too few weights are effective they are flattened by a power below one (Koblents & Míguez
2015). This needs no gradient, different parts follow different modes, and as the points have Cauchy's tails, no
density with lighter ones has weights without bound.

What goes wrong: a mode that no point has come near while the weights were flat is missed.

References
----------
```bibtex
@article{cappe2008adaptive,
  author = {Cappé, Olivier and Douc, Randal and Guillin, Arnaud and Marin, Jean-Michel and Robert, Christian P.},
  title = {Adaptive importance sampling in general mixture classes},
  journal = {Statistics and Computing}, volume = {18}, pages = {447--459}, year = {2008}
}
@article{koblents2015population,
  author = {Koblents, Eugenia and Míguez, Joaquín},
  title = {A population {Monte Carlo} scheme with transformed weights and its application to stochastic kinetic models},
  journal = {Statistics and Computing}, volume = {25}, pages = {407--425}, year = {2015}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from elbozoo.models.contract.errors import NumericalFailure
from elbozoo.models.numerics.effective_size import effective_size, flattening_power

LogDensity = Callable[[Tensor], Tensor]

PARTS = 8  # of the cloud
POINTS = 4000  # of the cloud
SPREAD = 0.2  # share of the points that go to all parts alike, however little those weigh
EFFECTIVE = 0.3  # share of the points that stays effective when their weights are flattened
FREEDOM = 3.0  # degrees of freedom of the Student-t distributions toward which the parts move
MOVES = 60  # of the cloud, at most
SETTLED = 5  # moves in a row that flatten no less, after which the cloud stands
JITTER = 1e-9  # relative, on the diagonals of the scale matrices
SEPARATION = 8.0  # common standard deviations between centres beyond which two parts are two modes
NEGLIGIBLE = 1e-7  # share of the mass below which a part is dropped


class Cloud(NamedTuple):
    """Parts of a mixture.

    Attributes
    ----------
    share : Tensor (J,)
        Share of the mass that each part stands for; they add up to one.
    loc : Tensor (J, K)
        Centres.
    scale_tril : Tensor (J, K, K)
        Cholesky factors of the scale matrices.
    """

    share: Tensor
    loc: Tensor
    scale_tril: Tensor

    def standardized(self, u: Tensor) -> Tensor:
        """Return ``u`` (G, K) in the coordinates of every part, (J, G, K)."""
        centred = u - self.loc[:, None]
        return torch.linalg.solve_triangular(self.scale_tril, centred.mT, upper=False).mT

    def log_terms(self, u: Tensor, log_standard: LogDensity) -> Tensor:
        """Log of share times density of every part at ``u`` (G, K), (J, G), for a density in its coordinates."""
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (self.share.log() - log_volume)[:, None] + log_standard(self.standardized(u))


class Located(NamedTuple):
    """Where the mass is, and how much of it.

    Attributes
    ----------
    modes : Cloud
        One part for each group of parts that overlap.
    log_value : float
        Estimate of the log integral, nats.
    standard_error : float
        Its standard error, by the delta method.
    """

    modes: Cloud
    log_value: float
    standard_error: float


def around(points: Tensor) -> Cloud:
    """Return a cloud whose parts stand at some of the points (S, K), each as wide as the middle of them all."""
    lower, upper = points.quantile(points.new_tensor([0.16, 0.84]), 0)
    scale = (0.5 * (upper - lower)).clamp(min=1e-3)
    chosen = torch.randperm(len(points))[:PARTS]
    share = points.new_full((len(chosen),), 1 / len(chosen))
    return Cloud(share, points[chosen], torch.diag(scale).expand(len(chosen), -1, -1))


def locate(log_density: LogDensity, cloud: Cloud) -> Located:
    """Move the cloud onto the mass of the density, from the global random state.

    Parameters
    ----------
    log_density : callable
        Log density at the points (G, K): (G,), nats; -inf where there is no mass.
    cloud : Cloud
        Where to begin.

    Raises
    ------
    NumericalFailure
        If the density is zero at all points of the cloud.
    """
    idle, best_power = 0, 0.0
    for _ in range(MOVES):
        u, log_weight = _weighed(log_density, cloud)
        power = flattening_power(log_weight, EFFECTIVE)
        cloud = _moved(cloud, u, (power * log_weight).softmax(0))
        idle = idle + 1 if power <= best_power or power == 1 else 0
        best_power = max(best_power, power)
        if idle == SETTLED:
            break
    _, log_weight = _weighed(log_density, cloud)
    log_value = float(log_weight.logsumexp(0)) - math.log(len(log_weight))
    relative = (log_weight - log_value).exp()
    return Located(_joined(cloud), log_value, float(relative.std()) / math.sqrt(len(relative)))


def log_normal(standard: Tensor) -> Tensor:
    """Log density of the standard normal distribution at points (..., K), nats."""
    return -0.5 * standard.square().sum(-1) - 0.5 * standard.shape[-1] * math.log(2 * math.pi)


def log_student(standard: Tensor, freedom: float) -> Tensor:
    """Log density of the standard multivariate Student-t distribution at points (..., K), nats."""
    dim = standard.shape[-1]
    log_norm = math.lgamma((freedom + dim) / 2) - math.lgamma(freedom / 2) - 0.5 * dim * math.log(freedom * math.pi)
    return log_norm - 0.5 * (freedom + dim) * torch.log1p(standard.square().sum(-1) / freedom)


def _weighed(log_density: LogDensity, cloud: Cloud) -> tuple[Tensor, Tensor]:
    """Draw points (G, K) from Cauchy distributions at the parts of the cloud and weigh them, (G,)."""
    parts, dim = cloud.loc.shape
    even = cloud._replace(share=(1 - SPREAD) * cloud.share + SPREAD / parts)
    which = torch.multinomial(even.share, POINTS, replacement=True)
    normal, other = (torch.randn(POINTS, size, dtype=cloud.loc.dtype) for size in (dim, 1))
    u = cloud.loc[which] + (cloud.scale_tril[which] @ (normal / other)[..., None])[..., 0]
    log_weight = log_density(u) - even.log_terms(u, lambda z: log_student(z, 1.0)).logsumexp(0)
    if not log_weight.isfinite().any():
        raise NumericalFailure(
            f"cubature cannot start: the density is zero at {POINTS} points about {cloud.loc.mean(0).tolist()}; check "
            "that the priors reach values at which the data are possible"
        )
    return u, log_weight


def _moved(cloud: Cloud, u: Tensor, probability: Tensor) -> Cloud:
    """Take a step of EM for the points ``u`` (G, K) with their probabilities (G,)."""
    dim = u.shape[1]
    standard = cloud.standardized(u)
    log_terms = cloud.log_terms(u, lambda z: log_student(z, FREEDOM))
    belongs = log_terms.softmax(0) * probability
    # Points far out count less, as the E step for Student-t distributions has it.
    weight = belongs * (FREEDOM + dim) / (FREEDOM + standard.square().sum(-1))
    total = weight.sum(-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    shift = (weight[..., None] * standard).sum(1) / total
    centred = standard - shift[:, None]
    share = belongs.sum(-1)
    scale = (weight[..., None] * centred).mT @ centred / share.clamp(min=torch.finfo(u.dtype).tiny)[:, None, None]
    scale.diagonal(dim1=-2, dim2=-1).mul_(1 + JITTER)
    factor, failure = torch.linalg.cholesky_ex(scale)
    enough = torch.tensor([effective_size(part.log()) > 2 * dim + 2 for part in belongs]) & (failure == 0)
    loc = cloud.loc + (cloud.scale_tril @ shift[..., None])[..., 0]
    return Cloud(
        share / share.sum(),
        torch.where(enough[:, None], loc, cloud.loc),
        torch.where(enough[:, None, None], cloud.scale_tril @ factor, cloud.scale_tril),
    )


def _joined(cloud: Cloud) -> Cloud:
    """Join parts that overlap, and drop those that weigh nothing."""
    keep = cloud.share > NEGLIGIBLE
    groups = [
        (share, loc, scale_tril @ scale_tril.mT)
        for share, loc, scale_tril in zip(*(field[keep] for field in cloud), strict=True)
    ]
    while (pair := _overlapping(groups)) is not None:
        first, second = pair
        other = groups.pop(second)
        groups[first] = _together(groups[first], other)
    share, loc, covariance = (torch.stack(fields) for fields in zip(*groups, strict=True))
    return Cloud(share / share.sum(), loc, torch.linalg.cholesky(covariance))


_Group = tuple[Tensor, Tensor, Tensor]  # share, centre, scale matrix


def _overlapping(groups: list[_Group]) -> tuple[int, int] | None:
    for second in range(len(groups)):
        for first in range(second):
            distance = groups[first][1] - groups[second][1]
            common = 0.5 * (groups[first][2] + groups[second][2])
            if distance @ torch.linalg.solve(common, distance) < SEPARATION**2:
                return first, second
    return None


def _together(first: _Group, second: _Group) -> _Group:
    share = first[0] + second[0]
    near, far = first[0] / share, second[0] / share
    distance = first[1] - second[1]
    scale = near * first[2] + far * second[2] + near * far * torch.outer(distance, distance)
    return share, near * first[1] + far * second[1], scale
