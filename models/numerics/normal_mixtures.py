"""E step of mixtures of normals by matrix products: constant memory in the number of rows.

The log density of a normal is linear in products of the columns,

    log N(x; μ, Σ) = φ(y) · θ,    φ(y) = (y_i y_j for i <= j, y, 1),    y = (x - origin) / unit,

so that all components at all rows are one matrix product, and the sums that the M step needs are another, φᵀ times the
responsibilities. Both take a chunk of rows that stays in the cache.

The price is cancellation where a component is narrow against its distance from the origin. By Cauchy and Schwarz
|y_i - m_i| <= √q s_i, with q the squared Mahalanobis distance of y from the component's mean m, s_i its standard
deviation and P its precision. So the terms of the sum are together at most

    |y|ᵀ |P| |y| <= 2 (1 + q) b,    b = aᵀ |P| a,    a_i² = m_i² + s_i²,

and rounding errs by no more than about 2 b ε (1 + q) (Higham 2002, section 3.1), whatever the row. b says the same of
the covariance that comes out, with its own moments. Where b is above :data:`MOST_CANCELLATION`, before or after, that
component takes the direct form: residuals, triangular solves and sums of squares.

References
----------
Higham, N. J. (2002). Accuracy and Stability of Numerical Algorithms. SIAM, 2nd edition.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from elbozoo.models.numerics.counts import positive
from elbozoo.models.numerics.covariances import LOG_2PI, CovarianceKind, Diagonal, Full
from elbozoo.models.numerics.linear_mixtures import normalise

MOST_CANCELLATION = 1e5  # errors of about 1e-11 (1 + q) nats, in double precision
FEW_ELEMENTS = 2**16  # numbers in all residuals, rows x components x columns
CHUNK_ELEMENTS = 2**19  # numbers in the features of a chunk: 4 MiB, which stay in the cache


class NormalMixtureStatistics(NamedTuple):
    """Expected sufficient statistics, summed over rows, about the means that made them.

    Several mixtures evaluated together have a leading dimension more.

    Attributes
    ----------
    log_evidence : Tensor ()
        Sum of log p(x), nats.
    counts : Tensor (K,)
        Sum of the responsibilities.
    shift : Tensor (K, D)
        Sum of r (x - μ).
    scatter : Tensor
        Sum of r (x - μ)(x - μ)ᵀ, in the shape of the kind of covariance.
    """

    log_evidence: Tensor
    counts: Tensor
    shift: Tensor
    scatter: Tensor


class NormalMixtures(NamedTuple):
    """R mixtures of K normals each.

    Attributes
    ----------
    log_weights : Tensor (R, K)
        Log of the weights.
    means : Tensor (R, K, D)
        Means.
    scale : Tensor (R, K or 1, D, D) or (R, K, D)
        Cholesky factors of the covariances, or standard deviations.
    unit : Tensor (D,)
        Standard deviation of each column of the data.
    floor : float
        Least variance, in any direction, that the M step allows, in squares of ``unit``.
    """

    log_weights: Tensor
    means: Tensor
    scale: Tensor
    unit: Tensor
    floor: float


class _Sums(NamedTuple):
    """Sums over rows for C components about their means, in the data's units, and about the origin in ``unit``."""

    log_evidence: Tensor  # (R,)
    counts: Tensor  # (C,)
    shift: Tensor  # (C, D)
    scatter: Tensor  # (C, D, D) or (C, D)
    squares: Tensor  # (C, D), sums of r y²


class _Products:
    """Covariance matrices: the features of second order are products of columns."""

    kind: CovarianceKind = Full()

    def count(self, columns: int) -> int:
        """Return the number of features of second order."""
        return columns * (columns + 1) // 2

    def fill(self, y: Tensor, out: Tensor) -> None:
        """Write the features of second order of the rows ``y`` (D, n) to ``out`` (F, n)."""
        for i, (row, place) in enumerate(zip(y, out.split(list(range(len(y), 0, -1))), strict=True)):
            torch.mul(row, y[i:], out=place)

    def precision(self, scale: Tensor) -> Tensor:
        """Return the inverse covariances."""
        return torch.cholesky_inverse(scale)

    def coefficients(self, precision: Tensor) -> Tensor:
        """Return what multiplies those features in the log density, (C, F)."""
        rows, columns = _upper(precision.shape[-1], precision.device)
        return precision[:, rows, columns] * torch.where(rows == columns, -0.5, -1.0)

    def times(self, precision: Tensor, vectors: Tensor) -> Tensor:
        """Return P v of each component, (C, D)."""
        return (precision @ vectors[..., None])[..., 0]

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a bᵀ of each component, in the shape of the covariances."""
        return a[:, :, None] * b[:, None, :]

    def unpack(self, totals: Tensor, columns: int) -> Tensor:
        """Return sums of the features (C, F) in the shape of the covariances."""
        i, j = _upper(columns, totals.device)
        full = totals.new_empty(len(totals), columns, columns)
        full[:, i, j] = totals
        full[:, j, i] = totals
        return full

    def variances(self, covariance: Tensor) -> Tensor:
        """Return the variance of each column, (C, D)."""
        return covariance.diagonal(dim1=-2, dim2=-1)

    def inverse(self, covariance: Tensor, floor: float) -> Tensor:
        """Return the inverse of the covariance with ``floor`` added; NaN where it has none."""
        identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        factor, info = torch.linalg.cholesky_ex(covariance + floor * identity)
        return torch.where(info[:, None, None] == 0, torch.cholesky_inverse(factor), torch.nan)


class _Squares:
    """Variances of columns: the features of second order are squares; methods as those of :class:`_Products`."""

    kind: CovarianceKind = Diagonal()

    def count(self, columns: int) -> int:
        return columns

    def fill(self, y: Tensor, out: Tensor) -> None:
        torch.mul(y, y, out=out)

    def precision(self, scale: Tensor) -> Tensor:
        return scale.square().reciprocal()

    def coefficients(self, precision: Tensor) -> Tensor:
        return -0.5 * precision

    def times(self, precision: Tensor, vectors: Tensor) -> Tensor:
        return precision * vectors

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def unpack(self, totals: Tensor, columns: int) -> Tensor:
        return totals

    def variances(self, covariance: Tensor) -> Tensor:
        return covariance

    def inverse(self, covariance: Tensor, floor: float) -> Tensor:
        return (covariance + floor).reciprocal()


def expected_statistics(x: Float[Tensor, "n d"], mixtures: NormalMixtures) -> NormalMixtureStatistics:
    """E step of R mixtures of one shape in one pass over the rows (Bishop 2006, equations 9.23 to 9.27).

    The direct form is taken for the components that need it, see above; a second pass is made where that is
    known only from the covariances that come out.
    """
    form = _Squares() if mixtures.scale.ndim == mixtures.means.ndim else _Products()
    if x.numel() * mixtures.log_weights.numel() <= FEW_ELEMENTS:
        return _of_few_rows(x, mixtures, form)
    work = _Pass(x, mixtures, form)
    most = MOST_CANCELLATION * torch.finfo(torch.float64).eps / torch.finfo(x.dtype).eps
    cancel_now = ~(work.cancellation() <= most)
    sums = work.sums(by_residuals=cancel_now)
    cancel_after = ~(work.cancellation_of(sums) <= most) & ~cancel_now
    if cancel_after.any():
        sums = work.sums(by_residuals=cancel_now | cancel_after)
    return _by_mixture(mixtures, sums.log_evidence, sums.counts, sums.shift, sums.scatter)


def _of_few_rows(x: Tensor, mixtures: NormalMixtures, form: _Products | _Squares) -> NormalMixtureStatistics:
    """Take the direct form of everything: where there is little to multiply, to prepare the products costs more."""
    flat = _Flat.of(mixtures)
    exact = _Exact(form, flat.means, flat.scale, flat.log_weights)
    log_joint = exact.log_joint(x)
    log_evidence = normalise(log_joint.view(*mixtures.log_weights.shape, len(x)))
    exact.take_in(x, log_joint)
    return _by_mixture(mixtures, log_evidence, log_joint.sum(-1), exact.shift, exact.scatter)


class _Flat(NamedTuple):
    """The components of all mixtures side by side: C = R K of them."""

    log_weights: Tensor
    means: Tensor
    scale: Tensor

    @classmethod
    def of(cls, mixtures: NormalMixtures) -> _Flat:
        """Return them, a shared covariance repeated for each component."""
        each = (*mixtures.log_weights.shape, *mixtures.scale.shape[2:])
        scale = mixtures.scale.expand(each).flatten(0, 1)
        return cls(mixtures.log_weights.flatten(), mixtures.means.flatten(0, 1), scale)


def _by_mixture(
    mixtures: NormalMixtures, log_evidence: Tensor, counts: Tensor, shift: Tensor, scatter: Tensor
) -> NormalMixtureStatistics:
    """Return the sums by mixture, the scatter pooled where the covariance is shared."""
    shape = mixtures.log_weights.shape
    scatter = scatter.unflatten(0, shape)
    if mixtures.scale.shape[1] < shape[1]:
        scatter = scatter.sum(1, keepdim=True)
    return NormalMixtureStatistics(log_evidence, counts.unflatten(0, shape), shift.unflatten(0, shape), scatter)


class _Pass:
    """One pass over rows for the components of several mixtures, C = R K of them side by side."""

    def __init__(self, x: Tensor, mixtures: NormalMixtures, form: _Products | _Squares) -> None:
        self.x, self.form, self.floor = x, form, mixtures.floor
        self.repeats, self.components, self.columns = mixtures.means.shape
        self.shares_covariance = form.kind.has_scale_tril and mixtures.scale.shape[1] < self.components
        self.unit = mixtures.unit
        self.log_weights, self.means, self.scale = _Flat.of(mixtures)
        # The mean of the mixtures: near the rows however few components are far from them.
        self.origin = (mixtures.log_weights.exp()[..., None] * mixtures.means).sum(1).mean(0)
        self.mean = (self.means - self.origin) / self.unit
        self.factor = self.scale / (self.unit[:, None] if form.kind.has_scale_tril else self.unit)
        self.precision = form.precision(self.factor)

    def cancellation(self) -> Float[Tensor, " c"]:
        """Return b of each component as it is."""
        variances = self.factor.square().sum(-1) if self.form.kind.has_scale_tril else self.factor.square()
        return self._bound(self.precision, (variances + self.mean.square()).sqrt())

    def cancellation_of(self, sums: _Sums) -> Float[Tensor, " c"]:
        """Return b of each component as the M step will make it; 0 for those without rows."""
        counts, shift, scatter, squares = (
            sums.counts,
            sums.shift / self.unit,
            self._in_units(sums.scatter),
            sums.squares,
        )
        if self.shares_covariance:
            between = self.form.outer(shift, shift) / positive(counts)[:, None, None]
            scatter = self._pooled(scatter - between, repeat=True)
            counts, squares = self._pooled(counts, repeat=True), self._pooled(squares, repeat=True)
            shift = torch.zeros_like(shift)
        counts = positive(counts)
        shape = (-1, *[1] * (scatter.ndim - 1))
        moved = shift / counts[:, None]
        covariance = scatter / counts.reshape(shape) - self.form.outer(moved, moved)
        found = self._bound(self.form.inverse(covariance, self.floor), (squares / counts[:, None]).sqrt())
        return torch.where(sums.counts > torch.finfo(counts.dtype).tiny, found, 0.0)

    def sums(self, by_residuals: Bool[Tensor, " c"]) -> _Sums:
        """Sum over all rows, with the direct form for the components that ``by_residuals`` marks."""
        indices = by_residuals.nonzero().flatten()
        coefficients = self._coefficients()
        width = coefficients.shape[1]
        residuals = len(indices) * self.columns
        rows = min(len(self.x), max(64, CHUNK_ELEMENTS // max(width, len(coefficients), residuals)))
        features = self.x.new_empty(width, rows)
        features[-1] = 1
        totals, log_evidence = torch.zeros_like(coefficients), self.x.new_zeros(self.repeats)
        exact = _Exact(self.form, self.means[indices], self.scale[indices], self.log_weights[indices])
        for part in self.x.split(rows):
            phi = features[:, : len(part)]
            self._fill(part, phi)
            log_joint = coefficients @ phi
            if len(indices):
                log_joint[indices] = exact.log_joint(part)
            log_evidence += normalise(log_joint.view(self.repeats, self.components, -1))
            totals.addmm_(log_joint, phi.mT)
            if len(indices):
                exact.take_in(part, log_joint[indices])
        return self._about_means(log_evidence, totals, indices, exact)

    def _fill(self, part: Tensor, phi: Tensor) -> None:
        second = self.form.count(self.columns)
        y = phi[second : second + self.columns]
        torch.sub(part.mT, self.origin[:, None], out=y)
        y.div_(self.unit[:, None])
        self.form.fill(y, phi[:second])

    def _coefficients(self) -> Tensor:
        linear = self.form.times(self.precision, self.mean)
        scales = self.scale.diagonal(dim1=-2, dim2=-1) if self.form.kind.has_scale_tril else self.scale
        constant = self.log_weights - scales.log().sum(-1) - 0.5 * (linear * self.mean).sum(-1)
        constant = constant - 0.5 * self.columns * LOG_2PI
        return torch.cat([self.form.coefficients(self.precision), linear, constant[:, None]], -1)

    def _about_means(self, log_evidence: Tensor, totals: Tensor, indices: Tensor, exact: _Exact) -> _Sums:
        counts, first = totals[:, -1], totals[:, -1 - self.columns : -1]
        second = self.form.unpack(totals[:, : self.form.count(self.columns)], self.columns)
        shift = first - counts[:, None] * self.mean
        scatter = second - self.form.outer(first, self.mean) - self.form.outer(self.mean, shift)
        squares = self.form.variances(second).clamp(min=0)
        scatter, shift = self._in_units(scatter, inverse=True), shift * self.unit
        shift[indices], scatter[indices] = exact.shift, exact.scatter
        return _Sums(log_evidence, counts, shift, scatter, squares)

    def _bound(self, precision: Tensor, size: Tensor) -> Tensor:
        return (self.form.times(precision.abs(), size) * size).sum(-1)

    def _in_units(self, scatter: Tensor, inverse: bool = False) -> Tensor:
        area = self.form.outer(self.unit[None], self.unit[None])
        return scatter * area if inverse else scatter / area

    def _pooled(self, sums: Tensor, repeat: bool) -> Tensor:
        """Sum over the components of each mixture, repeated for each of them."""
        pooled = sums.unflatten(0, (self.repeats, self.components)).sum(1, keepdim=True)
        return pooled.expand(-1, self.components, *pooled.shape[2:]).flatten(0, 1) if repeat else pooled


class _Exact:
    """The direct form: log densities by triangular solves, moments by sums of squares about the means."""

    def __init__(self, form: _Products | _Squares, means: Tensor, scale: Tensor, log_weights: Tensor) -> None:
        self.kind, self.means, self.scale, self.log_weights = form.kind, means, scale, log_weights
        self.shift, self.scatter = torch.zeros_like(means), torch.zeros_like(scale)

    def log_joint(self, part: Tensor) -> Tensor:
        """Log p(x, z = k) of the rows, (U, n)."""
        return self.kind.log_density(part, self.means, self.scale).mT + self.log_weights[:, None]

    def take_in(self, part: Tensor, responsibilities: Tensor) -> None:
        """Add up the rows ``part`` (n, D) by their ``responsibilities`` (U, n)."""
        residual = part - self.means[:, None, :]
        self.shift += (responsibilities[:, None, :] @ residual)[:, 0]
        self.scatter += self.kind.scatter(part, self.means, responsibilities.mT)


@cache
def _upper(columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, cols = torch.triu_indices(columns, columns, device=device)
    return rows, cols
