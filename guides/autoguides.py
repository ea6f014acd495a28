"""Pyro's automatic guides for global latents, under the names of our families."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, autoguide
from pyro.infer.autoguide.utils import deep_setattr
from torch import Tensor

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import collapsed
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import NumericalFailure
from elbozoo.models.contract.sites import MAX_PLATE_NESTING

PARTICLES = 100  # of the ELBO at which a start is judged
REACHED = 1e-3  # posterior standard deviations
WALL = 1e100  # nats
SMALL_FACTOR = 1e-4  # a factor of zero has no gradient

Program = Callable[[Batch], Any]
Start = Callable[[Any], Tensor]
Constructor = Callable[[Program, GuideOptions, Start], autoguide.AutoGuide]

AUTOGUIDES: dict[str, Constructor] = {
    "delta": lambda model, options, start: autoguide.AutoDelta(model, init_loc_fn=start),
    "diagonal-normal": lambda model, options, start: autoguide.AutoNormal(
        model, init_loc_fn=start, init_scale=options.scale
    ),
    "full-rank-normal": lambda model, options, start: autoguide.AutoMultivariateNormal(
        model, init_loc_fn=start, init_scale=options.scale
    ),
    "low-rank-normal": lambda model, options, start: autoguide.AutoLowRankMultivariateNormal(
        model, init_loc_fn=start, init_scale=options.scale, rank=options.rank
    ),
    "flow": lambda model, options, start: autoguide.AutoIAFNormal(model),
    "laplace": lambda model, options, start: autoguide.AutoLaplaceApproximation(model, init_loc_fn=start),
}


class GlobalGuide(Guide):
    """One of Pyro's autoguides over the global latents of a model.

    Normal families start at the mode with the curvature there, unless ``initial_scale`` is given or there is no
    mode: from elsewhere a posterior of unequal scales or strong correlations takes gradient steps very long.

    Parameters
    ----------
    name : str
        Key of :data:`AUTOGUIDES`.
    model : Entry
        The model; the guide reads its latent sites.
    x : Tensor (N, D)
        The data, on which the guide is run once: an autoguide has no parameters before that.
    options : GuideOptions
        Options.
    summed_out : collection of str
        Finite local sites of the model, which the guide does not sample.
    """

    def __init__(
        self, name: str, model: Entry, x: Tensor, options: GuideOptions, summed_out: Collection[str] = ()
    ) -> None:
        family = "full-rank-normal" if name == "laplace" else name
        super().__init__(name, family, "global", summed_out=summed_out)
        program, start = collapsed(model, summed_out), starting_point(model, x)
        self.auto = AUTOGUIDES[name](program, options, start)
        self.auto(Batch.full(x))
        self.auto.to(x.dtype)
        if name in STARTS and options.initial_scale is None:
            mode = find_mode(program, Batch.full(x), start)
            if mode is not None:
                self._start_at(mode, program, Batch.full(x))
                # With the mode found and no θ beside it, nothing is left for a gradient step to do.
                self.auto.requires_grad_(name != "laplace" or bool(list(model.parameters())))

    def _start_at(self, mode: Mode, program: Program, batch: Batch) -> None:
        """Move to the mode and its curvature, unless the ELBO is lower there: a ridge is not told by its top."""
        before = {key: value.clone() for key, value in self.auto.state_dict().items()}
        elbo = _elbo(program, self.auto, batch)
        STARTS[self.name](self.auto, mode)
        if self.is_bound and not _elbo(program, self.auto, batch) >= elbo:
            self.auto.load_state_dict(before)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the global latents."""
        result: dict[str, Tensor] = self.auto(batch)
        return result

    @property
    def is_bound(self) -> bool:
        """False while the guide is a point mass: ``delta``, and ``laplace`` before its curvature is taken."""
        return not isinstance(self.auto, autoguide.AutoDelta | autoguide.AutoLaplaceApproximation)

    def finalize(self, batch: Batch) -> None:
        """Replace the mode that ``laplace`` found by the normal with the curvature there.

        Raises
        ------
        NumericalFailure
            If the log density has no maximum that can be reached, or is flat there.
        """
        if not isinstance(self.auto, autoguide.AutoLaplaceApproximation):
            return
        self.auto.requires_grad_(True)
        try:
            climb(self.auto, batch)
            if not torch.isfinite(self.auto.loc).all():
                raise torch.linalg.LinAlgError
            self.auto = self.auto.laplace_approximation(batch)
            # In the order of a loaded one: products of matrices differ in their last digits by it.
            self.auto.scale_tril = self.auto.scale_tril.contiguous()
        except (torch.linalg.LinAlgError, ValueError):
            raise NumericalFailure(
                "laplace: the log density of the latents is not curved downwards where the search for its maximum "
                "ended, expected a mode; try another guide, such as full-rank-normal"
            ) from None

    def prepare_to_load(self, batch: Batch) -> None:
        """Take the form that :meth:`finalize` leaves: ``laplace`` is a normal that learns no more."""
        if not isinstance(self.auto, autoguide.AutoLaplaceApproximation):
            return
        normal = autoguide.AutoMultivariateNormal(self.auto.model)
        normal(batch)
        for name in ("loc", "scale", "scale_tril"):
            value = getattr(normal, name).detach()
            delattr(normal, name)
            normal.register_buffer(name, value)
        self.auto = normal.to(batch.x.dtype)


class Mode(NamedTuple):
    """A maximum of log p(x, z) over unconstrained latents.

    Attributes
    ----------
    guide : AutoLaplaceApproximation
        Pyro's guide, which knows how the latents lie in one vector.
    loc : Tensor (P,)
        Where it is.
    precision : Tensor (P, P)
        Minus the Hessian there, positive definite.
    """

    guide: autoguide.AutoLaplaceApproximation
    loc: Tensor
    precision: Tensor


def starting_point(model: Entry, x: Tensor) -> Start:
    """Return where gradients start: at the entry's own values if it has some, else at the medians of the priors."""
    start: Start = autoguide.init_to_value(values=model.starting_latents(x))
    return start


def find_mode(program: Program, batch: Batch, start: Start) -> Mode | None:
    """Return the mode that the climb from ``start`` reaches, or None where it reaches none.

    A hierarchical prior in its centred form, for one, has a density without bound.
    """
    guide = autoguide.AutoLaplaceApproximation(program, init_loc_fn=start)
    guide(batch)
    guide.to(batch.x.dtype)
    climb(guide, batch)
    slope, hessian = _derivatives(guide, batch)
    precision = -hessian
    factor, failed = torch.linalg.cholesky_ex(precision)
    if failed:
        return None
    # The step that Newton's method would still take, in posterior standard deviations.
    step = torch.linalg.solve_triangular(factor, slope[:, None], upper=False).norm()
    return Mode(guide, guide.loc.detach(), precision) if float(step) < REACHED else None


def climb(guide: autoguide.AutoLaplaceApproximation, batch: Batch) -> None:
    """Go on from where ``guide`` stands to the mode itself: elsewhere the curvature says nothing."""
    loc = guide.loc
    optimizer = torch.optim.LBFGS(
        [loc], max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        value = _loss(guide, batch)
        (slope,) = torch.autograd.grad(value, [loc])
        # A trial step may overflow; a wall there makes the line search turn back.
        is_finite = bool(torch.isfinite(value) & torch.isfinite(slope).all())
        loc.grad = slope if is_finite else torch.zeros_like(slope)
        return value.detach() if is_finite else value.new_tensor(WALL)

    with pyro.validation_enabled(False):
        optimizer.step(loss)


def _loss(guide: autoguide.AutoLaplaceApproximation, batch: Batch) -> Tensor:
    guide_trace = poutine.trace(guide).get_trace(batch)
    model_trace = poutine.trace(poutine.replay(guide.model, trace=guide_trace)).get_trace(batch)
    value: Tensor = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
    return value


def _elbo(program: Program, guide: autoguide.AutoGuide, batch: Batch) -> float:
    loss = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=MAX_PLATE_NESTING)
    with torch.no_grad(), pyro.validation_enabled(False):
        return -float(loss.differentiable_loss(program, guide, batch))


def _derivatives(guide: autoguide.AutoLaplaceApproximation, batch: Batch) -> tuple[Tensor, Tensor]:
    """Slope (P,) and Hessian (P, P) of log p(x, z) over unconstrained latents."""
    loc = guide.loc
    (slope,) = torch.autograd.grad(-_loss(guide, batch), [loc], create_graph=True)
    rows = [torch.autograd.grad(each, [loc], retain_graph=True)[0] for each in slope]
    return slope.detach(), torch.stack(rows)


def _start_diagonal(auto: autoguide.AutoNormal, mode: Mode) -> None:
    parts = {"locs": mode.loc, "scales": mode.precision.diagonal().rsqrt()}
    for part, values in parts.items():
        for site, value in mode.guide._unpack_latent(values):
            deep_setattr(getattr(auto, part), site["name"], value.clone())


def _start_laplace(auto: autoguide.AutoLaplaceApproximation, mode: Mode) -> None:
    with torch.no_grad():
        auto.loc.copy_(mode.loc)


def _start_full(auto: autoguide.AutoMultivariateNormal, mode: Mode) -> None:
    scale_tril = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(mode.precision)))
    diagonal = scale_tril.diagonal()
    with torch.no_grad():
        auto.loc.copy_(mode.loc)
    auto.scale = diagonal.clone()
    auto.scale_tril = scale_tril / diagonal[:, None]


def _start_low_rank(auto: autoguide.AutoLowRankMultivariateNormal, mode: Mode) -> None:
    # Σ = S (I + F Fᵀ) S with S the scales given all others, and F then the likeliest (Jöreskog 1967, equation 20).
    scale = mode.precision.diagonal().rsqrt()
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(mode.precision))
    values, axes = torch.linalg.eigh(covariance / scale / scale[:, None])
    rank = auto.cov_factor.shape[-1]
    with torch.no_grad():
        auto.loc.copy_(mode.loc)
        auto.cov_factor.copy_(axes[:, -rank:] * (values[-rank:] - 1).clamp(min=SMALL_FACTOR).sqrt())
    auto.scale = scale


STARTS: dict[str, Callable[[Any, Mode], None]] = {
    "diagonal-normal": _start_diagonal,
    "full-rank-normal": _start_full,
    "low-rank-normal": _start_low_rank,
    "laplace": _start_laplace,
}
