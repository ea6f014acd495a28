r"""Monte Carlo EM, for a program whose E step has no closed form.

E: draws from the posterior of each datum. M: gradient steps on the weighted mean of log p(x, z) over the draws (Wei &
Tanner 1990). Under ``expectation=hmc`` the draws are the ends of Hamiltonian Monte Carlo chains, which go on from one
iteration to the next, and have equal weights. Under ``expectation=importance`` they come from a distribution q_n of
each datum's own, a multivariate Student-t with five degrees of freedom, and have self-normalised weights
p(x_n, z) / q_n(z). Location and scale of q_n follow the weighted moments of its draws along the run (Bugallo et al.
2017), with the weights flattened by a power below one as long as too few of them are effective (Koblents & Míguez
2015).

With importance weights of S draws the gradient of the M step is that of the importance-weighted bound with S particles
(Burda et al. 2016, equation 14), so that θ ends where this bound is largest: short of the maximum of log p(x) by about
half the relative variance of the weights over S. The bound is recorded. Chains have no such limit, but lag behind θ,
and record the mean of log p(x, z), which is no bound. Finite latents are summed out in both.

References
----------
```bibtex
@article{wei1990monte,
  author = {Wei, Greg C. G. and Tanner, Martin A.},
  title = {A {M}onte {C}arlo Implementation of the {EM} Algorithm and the Poor Man's Data Augmentation Algorithms},
  journal = {Journal of the American Statistical Association},
  volume = {85}, number = {411}, pages = {699--704}, year = {1990}
}
@inproceedings{burda2016importance,
  author = {Burda, Yuri and Grosse, Roger and Salakhutdinov, Ruslan},
  title = {Importance Weighted Autoencoders},
  booktitle = {International Conference on Learning Representations}, year = {2016}
}
@article{bugallo2017adaptive,
  author = {Bugallo, M{\'o}nica F. and Elvira, V{\'i}ctor and Martino, Luca and Luengo, David and
    M{\'i}guez, Joaqu{\'i}n and Djuri{\'c}, Petar M.},
  title = {Adaptive Importance Sampling: The Past, the Present, and the Future},
  journal = {IEEE Signal Processing Magazine}, volume = {34}, number = {4}, pages = {60--79}, year = {2017}
}
@article{koblents2015population,
  author = {Koblents, Eugenia and M{\'i}guez, Joaqu{\'i}n},
  title = {A population {Monte Carlo} scheme with transformed weights and its application to stochastic kinetic models},
  journal = {Statistics and Computing}, volume = {25}, pages = {407--425}, year = {2015}
}
```
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple, Protocol

import pyro
import torch
from torch import Tensor

from elbozoo.inference.adaptive_importance import log_student
from elbozoo.inference.checkpoints import Checkpoints
from elbozoo.inference.convergence import PlateauMonitor
from elbozoo.inference.diagnostics import THRESHOLD, k_hat
from elbozoo.inference.event_log import EventLog
from elbozoo.inference.hmc import HMCState, initial_state, transition
from elbozoo.inference.memory import Adam, Memory, RandomStates, Remembers
from elbozoo.inference.memory import Weights as ModuleWeights
from elbozoo.inference.progress import progress_bar
from elbozoo.inference.row_density import RowDensity
from elbozoo.inference.training import DECAY, PLATEAUS
from elbozoo.inference.trajectory import Trajectory
from elbozoo.inference.weights import Weights
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import NumericalFailure
from elbozoo.models.contract.options import Field, Options

WINDOW = 50
CHUNK_ELEMENTS = 2**23  # draws times numbers in the data that are held at once
FREEDOM = 5.0  # degrees of freedom of q: where the posterior has tails no heavier than a normal's, weights are bounded
EFFECTIVE = 0.3  # share of the draws that stays effective when their weights are flattened
POWERS = tuple(0.5**i for i in range(1, 12))  # by which weights are flattened, the mildest that is enough
WARM_UP = 100  # moves of q, at most, before θ first moves
BOLD, STEADY = 0.5, 0.1  # share of the way to the moments of its draws that q goes in one of those, and later
SETTLED = 0.99  # share of the rows whose weights need no flattening at which the warm-up ends
JITTER = 1e-6  # relative, on the diagonals of the covariances
DIAGNOSED = 1000  # draws of each datum from which k-hat and effective size are taken at the end
FEW = 0.1  # share of effective draws below which the fit says so


class MonteCarloEMOptions(Options):
    """Options of Monte Carlo EM."""

    expectation: Literal["hmc", "importance"] = Field(
        "hmc", description="draws of an E step: ends of Hamiltonian chains, or weighted draws of a fitted q"
    )
    chains: int = Field(2, ge=1, description="chains of each datum under expectation=hmc, one draw from each")
    transitions: int = Field(1, ge=1, description="Hamiltonian transitions of each chain in an E step")
    importance_draws: int = Field(
        50, ge=2, description="weighted draws of each datum in an E step under expectation=importance"
    )
    gradient_steps: int = Field(3, ge=1, description="Adam steps in an M step")
    iterations: int = Field(10_000, ge=1, description="most EM iterations")
    learning_rate: float = Field(0.01, gt=0, description="Adam's step size at the start")
    tolerance: float = Field(1e-4, gt=0, description="gain per 50 iterations, nats per datum, that counts as a plateau")
    device: str = Field(
        "cpu", description="where the fit runs: cpu, cuda, cuda:N, mps, or auto; it is judged on the CPU all the same"
    )


class MonteCarloEMRun(NamedTuple):
    """How a run of Monte Carlo EM ended.

    Attributes
    ----------
    objective : str
        What the trajectory records.
    notes : list of str
        What a reader should know about the draws.
    """

    trajectory: Trajectory
    converged: bool
    interrupted: bool
    objective: str
    notes: list[str]


class Draws(NamedTuple):
    """An E step: points ``u`` (S, B, K), their weights (S, B) that add up to one, and the objective (B,) in nats."""

    u: Tensor
    weight: Tensor
    objective: Tensor


class Expectation(Remembers, Protocol):
    """What makes the draws of some rows."""

    density: RowDensity

    def draw(self) -> Draws:
        """Draw at the present θ."""
        ...


class Chains:
    """Hamiltonian chains, S for each row, from draws of the prior."""

    objective = "E[log p(x, z)]"

    def __init__(self, density: RowDensity, options: MonteCarloEMOptions) -> None:
        self.density, self.transitions = density, options.transitions
        self.state = initial_state(density.log_joint, density.prior_draws(options.chains))

    def draw(self) -> Draws:
        """Move every chain on, and return where they are."""
        for _ in range(self.transitions):
            self.state = transition(self.density.log_joint, self.state)
        log_joint = self.state.log_joint
        return Draws(self.state.z, torch.full_like(log_joint, 1 / len(log_joint)), log_joint.mean(0))

    def memory(self) -> Memory:
        """Return where the chains are, and their steps."""
        tensors = {name: value for name, value in self.state._asdict().items() if isinstance(value, Tensor)}
        return Memory(tensors, {"transitions": self.state.transitions})

    def recall(self, memory: Memory) -> None:
        """Go on from there."""
        tensors = {name: value.to(self.state.z.device) for name, value in memory.tensors.items()}
        self.state = HMCState(**tensors, transitions=memory.values["transitions"])


class Proposals:
    """Student-t distributions, one for each row, that follow the posterior by importance sampling.

    Attributes
    ----------
    loc : Tensor (B, K)
        Their locations.
    covariance : Tensor (B, K, K)
        Their scale matrices: estimates of the covariance of the posterior.
    """

    objective = "importance-weighted bound"

    def __init__(self, density: RowDensity, options: MonteCarloEMOptions) -> None:
        self.density, self.draws = density, options.importance_draws
        start = density.prior_draws(max(self.draws, 4 * density.dim))
        self.loc = start.mean(0)
        self.covariance = torch.diag_embed(start.var(0).clamp(min=JITTER))
        for _ in range(WARM_UP):
            if self._move(*self._weighed(), BOLD) >= SETTLED:
                break

    def draw(self) -> Draws:
        """Draw from the present q, then move q toward the posterior."""
        u, log_weight = self._weighed()
        self._move(u, log_weight, STEADY)
        # A row without any density has an objective of minus infinity, which ends the fit.
        return Draws(u, log_weight.softmax(0), log_weight.logsumexp(0) - math.log(self.draws))

    def memory(self) -> Memory:
        """Return where q is."""
        return Memory({"loc": self.loc, "covariance": self.covariance})

    def recall(self, memory: Memory) -> None:
        """Go on from there."""
        self.loc = memory.tensors["loc"].to(self.loc.device)
        self.covariance = memory.tensors["covariance"].to(self.loc.device)

    def log_weights(self, count: int) -> Tensor:
        """Log weights (S, B), nats, of at least ``count`` fresh draws of each row."""
        return torch.cat([self._weighed()[1] for _ in range(math.ceil(count / self.draws))])

    def _weighed(self) -> tuple[Tensor, Tensor]:
        """Draws (S, B, K) and their log weights (S, B)."""
        factor = torch.linalg.cholesky(self.covariance)
        normal = torch.randn(self.draws, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        half = torch.full_like(normal[..., 0], FREEDOM / 2)
        standard = normal / (torch._standard_gamma(half) / half).sqrt()[..., None]
        u = self.loc + torch.einsum("bij,sbj->sbi", factor, standard)
        log_volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        with torch.no_grad():
            log_weight = self.density.log_joint(u) - log_student(standard, FREEDOM) + log_volume
        return u, log_weight.nan_to_num(nan=-torch.inf, posinf=-torch.inf)

    def _move(self, u: Tensor, log_weight: Tensor, share: float) -> float:
        """Go that share of the way to the moments of the weighted draws; say for how many rows no weight was flattened.

        What results has the moments of a mixture of the old q and the draws.
        """
        power = mildest_powers(log_weight)
        probability = (power * log_weight).softmax(0)
        mean = torch.einsum("sb,sbk->bk", probability, u)
        centred = u - mean
        covariance = torch.einsum("sb,sbi,sbj->bij", probability, centred, centred)
        step = mean - self.loc
        between = share * (1 - share) * step[..., :, None] * step[..., None, :]
        covariance = (1 - share) * self.covariance + share * covariance + between
        covariance.diagonal(dim1=-2, dim2=-1).mul_(1 + JITTER)
        usable = covariance.isfinite().all(-1).all(-1) & mean.isfinite().all(-1)
        self.loc = torch.where(usable[:, None], self.loc + share * step, self.loc)
        self.covariance = torch.where(usable[:, None, None], covariance, self.covariance)
        return float((power == 1).double().mean())


EXPECTATIONS: dict[str, type[Chains | Proposals]] = {"hmc": Chains, "importance": Proposals}


class Plateaus:
    """Counts how often the objective has been flat, and lowers the step size each time."""

    def __init__(self, optimizer: torch.optim.Adam, options: MonteCarloEMOptions) -> None:
        self.optimizer, self.options = optimizer, options
        self.monitor = PlateauMonitor(options.tolerance, window=WINDOW)
        self.count = 0

    @property
    def learning_rate(self) -> float:
        """Step size that the next step will have."""
        return self.options.learning_rate * DECAY**self.count

    @property
    def is_done(self) -> bool:
        """Whether the fit has converged."""
        return self.count > PLATEAUS

    def update(self, objective: float) -> None:
        """Take the objective of one iteration, nats per datum."""
        if self.monitor.update(objective):
            self.count += 1
            self.optimizer.param_groups[0]["lr"] = self.learning_rate

    def memory(self) -> Memory:
        """Return what the monitor has seen, and the count."""
        return Memory(values={**self.monitor.memory().values, "count": self.count})

    def recall(self, memory: Memory) -> None:
        """Go on watching."""
        self.monitor.recall(memory)
        self.count = memory.values["count"]


def run_monte_carlo_em(
    entry: Entry,
    batch: Batch,
    options: MonteCarloEMOptions,
    *,
    progress: bool = True,
    logs: Sequence[EventLog] = (),
    checkpoints: Checkpoints | None = None,
) -> MonteCarloEMRun:
    """Fit θ of ``entry`` in place; must be called inside ``isolated``, which gives the seed.

    With ``checkpoints`` it goes on where they stand, and ends with the bits of a run that was never stopped.

    The recorded objective is, in nats over all rows, the mean of log p(x, z) over the draws under ``expectation=hmc``,
    which is no bound, and the importance-weighted bound under ``expectation=importance``.

    Raises
    ------
    NumericalFailure
        If the objective is no longer finite.
    """
    kind = EXPECTATIONS[options.expectation]
    with pyro.validation_enabled(False):
        parts: list[Expectation] = [kind(RowDensity(entry, part), options) for part in _parts(entry, batch, options)]
    optimizer = torch.optim.Adam(entry.parameters(), lr=options.learning_rate)
    plateaus, trajectory = Plateaus(optimizer, options), Trajectory(is_elbo=False)
    if checkpoints is not None:
        memories: dict[str, Remembers] = {
            "model": ModuleWeights(entry),
            "optimizer": Adam(optimizer),
            "plateaus": plateaus,
            "trajectory": trajectory,
            **{f"draws {i}": part for i, part in enumerate(parts)},
            "random": RandomStates(),
        }
        checkpoints.resume(memories, options.iterations)
    interrupted = False
    try:
        with (
            progress_bar(f"{entry.name()} em", options.iterations, progress) as report,
            checkpoints.holding_interrupts() if checkpoints else nullcontext(),
            pyro.validation_enabled(False),
        ):
            for iteration in range(len(trajectory.rows), options.iterations):
                if plateaus.is_done:
                    break
                before = time.perf_counter()
                draws = [part.draw() for part in parts]
                objective = float(sum(each.objective.sum() for each in draws))
                if not math.isfinite(objective):
                    raise NumericalFailure(
                        f"Monte Carlo EM iteration {iteration}: the objective is {objective}, expected a finite "
                        "number; try a smaller learning_rate, or standardised columns"
                    )
                _maximize(parts, draws, optimizer, options.gradient_steps)
                trajectory.record(time.perf_counter() - before, objective)
                report(iteration + 1, f"{kind.objective} {objective:.2f}")
                plateaus.update(objective / entry.count(batch.x))
                for log in logs:
                    log.record(trajectory, plateaus.learning_rate)
                if checkpoints is not None:
                    checkpoints.after_step(iteration + 1)
            if checkpoints is not None:
                checkpoints.end(len(trajectory.rows), converged=plateaus.is_done)
    except KeyboardInterrupt:
        interrupted = True
    converged = plateaus.is_done and not interrupted
    return MonteCarloEMRun(trajectory, converged, interrupted, kind.objective, draw_notes(parts))


def mildest_powers(log_weight: Tensor) -> Tensor:
    """Return for each row the largest of some powers that leaves enough of its weights (S, B) effective, (B,).

    The effective sample size is (Σ w)² / Σ w² (Kong et al. 1994).
    """
    found = torch.ones_like(log_weight[0])
    enough = effective_share(log_weight) >= EFFECTIVE
    for power in POWERS:
        if enough.all():
            break
        found = torch.where(enough, found, power)
        enough = enough | (effective_share(power * log_weight) >= EFFECTIVE)
    return found


def effective_share(log_weight: Tensor) -> Tensor:
    """Effective sample size of the weights (S, B) of each row as a share of their number, (B,)."""
    return 1 / (log_weight.softmax(0).square().sum(0) * len(log_weight))


def draw_notes(parts: Sequence[Expectation]) -> list[str]:
    """Say for which rows importance draws stand for the posterior badly; nothing of chains."""
    proposals = [part for part in parts if isinstance(part, Proposals)]
    if not proposals:
        return []
    with pyro.validation_enabled(False):
        log_weight = torch.cat([part.log_weights(DIAGNOSED).cpu().double() for part in proposals], -1)
    found = k_hat(Weights(log_weight[None], torch.zeros_like(log_weight)[None]))
    effective = effective_share(log_weight)
    assert found is not None
    if found.maximum <= THRESHOLD and float(effective.min()) >= FEW:
        return []
    return [
        f"importance draws stand badly for the posterior: k-hat is above {THRESHOLD} for {found.share_above:.0%} of "
        f"the rows and {found.maximum:.2f} at most, and of a row's draws {float(effective.min()):.1%} are effective at "
        f"least, {float(effective.median()):.0%} in the median; take expectation=hmc, or more importance_draws"
    ]


def _parts(entry: Entry, batch: Batch, options: MonteCarloEMOptions) -> list[Batch]:
    """Cut the data into parts that bound the memory of all draws of their rows."""
    draws = options.chains if options.expectation == "hmc" else options.importance_draws
    rows = max(1, CHUNK_ELEMENTS // (draws * entry.elements(batch.x)))
    return [batch.rows(start, start + rows) for start in range(0, batch.total, rows)]


def _maximize(
    parts: Sequence[Expectation], draws: Sequence[Draws], optimizer: torch.optim.Optimizer, steps: int
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        for part, each in zip(parts, draws, strict=True):
            loss = -(each.weight * part.density.log_joint(each.u)).sum()
            loss.backward()
        optimizer.step()
