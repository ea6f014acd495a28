"""An entry of the zoo: a generative program with the capabilities that its methods give it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated, private_parameters
from elbozoo.models.contract.options import Options as BaseOptions
from elbozoo.models.contract.sites import OBSERVED_SITE, LatentSite, latent_sites, stochastic_nodes


class Entry(PyroModule):
    """Base of all entries: a program p(x, z), its options and its starting values.

    A subclass gives ``Options``, ``__init__(options, columns)``, ``initialize``, ``randomize`` and
    ``forward``. Whatever else it can do is derived from the optional methods that it defines, see
    :func:`capabilities`.

    Attributes
    ----------
    Options : type
        The validated options of this entry.
    dtype : torch.dtype
        Floating-point type in which the entry is fitted: float64 where an oracle exists, float32 for
        networks. Everything is evaluated in float64.
    example_columns : int
        Number of columns of simulated data sets.
    """

    Options: ClassVar[type[BaseOptions]] = BaseOptions
    dtype: ClassVar[torch.dtype] = torch.float64
    example_columns: ClassVar[int] = 5

    def __init__(self, options: BaseOptions, columns: int) -> None:
        with private_parameters():
            super().__init__()
        self.options = options
        self.columns = columns

    @classmethod
    def name(cls) -> str:
        """Name of the entry: its file's name with dashes."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def summary(cls) -> str:
        """One line that says what the entry is: the first line of its page."""
        return cls.page().partition("\n")[0].rstrip(".")

    @classmethod
    def page(cls) -> str:
        """The entry's page: story, equations and references, from its file's docstring (Markdown)."""
        return inspect.getdoc(inspect.getmodule(cls)) or ""

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse data that this entry cannot be fitted to.

        Raises
        ------
        InvalidInput
            With what was found, what was expected and what to do.
        """

    @classmethod
    def from_data(cls, x: Tensor, *, seed: int = 0, **options: Any) -> Self:
        """Build the entry for the rows ``x`` (N, D), with validated options and sensible starting values.

        Raises
        ------
        InvalidInput
            For options or data that do not fit this entry.
        """
        parsed = cls.Options.parse(options)
        cls.check_data(x, parsed)
        with isolated(seed):
            entry = cls(parsed, x.shape[1]).to(cls.dtype)
            entry.initialize(x.to(cls.dtype))
        return entry

    @classmethod
    def example(cls, columns: int | None = None, *, seed: int = 0, **options: Any) -> Self:
        """Build the entry with parameters drawn at random, to simulate data from."""
        parsed = cls.Options.parse(options)
        with isolated(seed):
            entry = cls(parsed, columns or cls.example_columns).to(cls.dtype)
            entry.randomize()
        return entry

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Set the starting values of θ for the rows ``x`` (N, D); ``restart`` counts the attempts from 0."""
        raise NotImplementedError(f"{type(self).__name__} gives no starting values; define initialize(x, restart)")

    def randomize(self) -> None:
        """Draw θ at random, of the size that makes an interesting simulated data set."""
        raise NotImplementedError(f"{type(self).__name__} cannot draw its parameters; define randomize()")

    def forward(self, batch: Batch) -> Tensor:
        """Run the generative program on ``batch``; the observed site is ``"x"``."""
        raise NotImplementedError(f"{type(self).__name__} has no program; define forward(batch)")

    def latent_sites(self) -> list[LatentSite]:
        """Return the latent sites of the program, read off its trace."""
        x, _ = self.simulate(2, seed=0)
        return latent_sites(self, Batch.full(x))

    def simulate(self, n: int, seed: int) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        """Draw ``n`` rows from the program at the present θ.

        Returns
        -------
        x : Tensor (n, D)
            Observations.
        z : Tensor, or dict of Tensor by site where there are several
            The latents they were drawn from.
        """
        parameter = next(self.parameters(), torch.empty(0, dtype=self.dtype))
        template = torch.zeros(n, self.columns, dtype=parameter.dtype, device=parameter.device)
        with isolated(seed), torch.no_grad(), pyro.validation_enabled(False):
            trace = poutine.trace(poutine.uncondition(self)).get_trace(Batch.full(template))
        values = {name: node["value"] for name, node in stochastic_nodes(trace)}
        if OBSERVED_SITE not in values:
            raise InvalidInput(f"the program samples {list(values)}, expected an observed site {OBSERVED_SITE!r}")
        x = values.pop(OBSERVED_SITE)
        return x, next(iter(values.values())) if len(values) == 1 else values


@runtime_checkable
class HasOracle(Protocol):
    """An entry with the exact evidence."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, constants kept: (N,) for local latents, () for global ones."""
        ...


@runtime_checkable
class HasPosterior(Protocol):
    """An entry with the exact posterior."""

    def posterior(self, x: Tensor) -> Distribution:
        """p(z given x): batch shape (N,) for local latents, () for global ones."""
        ...


@runtime_checkable
class SupportsEM(Protocol):
    """An entry with closed-form E and M steps.

    The statistics are a named tuple of tensors that add up over chunks of rows; its field
    ``log_evidence`` is the sum of log p(x) over the rows, in nats, at the θ that made it.
    """

    def expected_statistics(self, x: Tensor) -> NamedTuple:
        """E step: expected sufficient statistics of the rows ``x`` (N, D), summed over them."""
        ...

    def maximize(self, statistics: NamedTuple) -> None:
        """M step: set θ to the maximum of the expected complete-data log-likelihood."""
        ...


@runtime_checkable
class HasClosedForm(Protocol):
    """An entry whose global maximum of the likelihood is known in closed form."""

    def fit_exact(self, x: Tensor) -> None:
        """Set θ to the global maximum of the likelihood of the rows ``x`` (N, D)."""
        ...


@runtime_checkable
class HasRowLikelihoods(Protocol):
    """An entry that evaluates every row at every latent value at once, which quadrature uses."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x_n given z_g) in nats, (N, G), for rows ``x`` (N, D) and latent values ``z`` (G, K)."""
        ...


QUADRATURE_DIM = 2

CAPABILITIES: dict[str, Callable[[Any], bool]] = {
    "oracle": lambda entry: isinstance(entry, HasOracle),
    "posterior": lambda entry: isinstance(entry, HasPosterior),
    "EM": lambda entry: isinstance(entry, SupportsEM),
    "closed form": lambda entry: isinstance(entry, HasClosedForm),
    "quadrature": lambda entry: supports_quadrature(entry.latent_sites()),
    "simulation": lambda entry: True,
}


def supports_quadrature(sites: list[LatentSite]) -> bool:
    """Whether the evidence is an integral over at most two real dimensions for each datum."""
    return all(s.is_local and s.is_real for s in sites) and sum(s.dim for s in sites) <= QUADRATURE_DIM


def capabilities(entry: Entry) -> list[str]:
    """Return the names of what ``entry`` can do, derived from the methods that it has."""
    return [name for name, has in CAPABILITIES.items() if has(entry)]


class Program(Entry):
    """A program that the user brings: an entry with no capability beyond ``forward``.

    Parameters
    ----------
    program : callable
        Called as ``program(batch)`` inside :class:`Batch`'s contract. Its parameters must be
        ``torch.nn.Parameter`` or ``PyroParam`` of a module; ``pyro.param`` statements are refused,
        because they live in Pyro's global store.
    columns : int
        Number of columns of its data.
    """

    def __init__(self, program: Callable[[Batch], Any], columns: int) -> None:
        super().__init__(BaseOptions(), columns)
        if not callable(program):
            raise InvalidInput(
                f"found a {type(program).__name__} as model; expected an entry's name or a callable model(batch)"
            )
        self.program = program

    @classmethod
    def name(cls) -> str:
        """Name under which results show a program of the user's."""
        return "program"

    def forward(self, batch: Batch) -> Tensor:
        """Run the user's program."""
        result: Tensor = self.program(batch)
        return result
