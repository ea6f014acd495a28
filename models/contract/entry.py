"""An entry of the zoo: a generative program with the capabilities that its methods give it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.images import ImageShape
from elbozoo.models.contract.isolation import isolated, private_parameters
from elbozoo.models.contract.joint import Conditional, Joint
from elbozoo.models.contract.options import ColumnRole
from elbozoo.models.contract.options import Options as BaseOptions
from elbozoo.models.contract.sites import OBSERVED_SITE, LatentSite, latent_sites, stochastic_nodes


class Entry(PyroModule):
    """Base of all entries: a program p(x, z), its options and its starting values.

    A subclass gives ``Options``, ``__init__(options, columns)``, ``initialize``, ``randomize`` and
    ``forward``. Whatever else it can do is derived from the optional methods that it defines, see
    :func:`capabilities`.

    Parameters
    ----------
    options : Options
        Validated options, those of the class attribute ``Options``.
    columns : int
        Number D of columns of the data.

    Attributes
    ----------
    Options : type
        The validated options of this entry.
    dtype : torch.dtype
        Floating-point type in which the entry is fitted: float64 where an oracle exists, float32 for
        networks. Everything is evaluated in float64.
    example_columns : int
        Number of columns of simulated data sets.
    allows_missing : bool
        Whether NaN may stand in the data for what was not observed.
    site_dims : dict
        Names of the dimensions of one draw of a site, where they have a meaning.
    table_names : tuple of str
        Names of the columns of the table that the entry was built for.
    levels : dict of list of str
        For columns of labels, where they are known, what the codes 0, 1, 2, ... in the table stand for.
    method_options : dict
        Options of guides and of training that suit this entry where the user gives none; all of them fall away when
        another objective than theirs is asked for.
    amortized_guide : str or None
        Guide that the name ``amortized`` means, where it is none of family and source.
    image_shape : ImageShape or None
        Shape of a row where the program takes it for an image; encoders are convolutional there by default.
    encoder_input : str
        What an encoder sees of a value x by default: ``values`` for x, ``log1p`` for log(1 + x), which suits counts
        of rows of different size.
    """

    Options: ClassVar[type[BaseOptions]] = BaseOptions
    dtype: ClassVar[torch.dtype] = torch.float64
    example_columns: ClassVar[int] = 5
    allows_missing: ClassVar[bool] = False
    site_dims: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    method_options: ClassVar[Mapping[str, Any]] = {}
    amortized_guide: ClassVar[str | None] = None
    image_shape: ImageShape | None = None
    encoder_input: ClassVar[Literal["values", "log1p"]] = "values"

    def __init__(self, options: BaseOptions, columns: int) -> None:
        with private_parameters():
            super().__init__()
        self.options = options
        self.columns = columns
        self.table_names = default_names(columns)
        self.levels: dict[str, list[str]] = {}

    @classmethod
    def name(cls) -> str:
        """Name of the entry: its file's name with dashes.

        Returns
        -------
        str
            Such as ``"gaussian-mixture"``.
        """
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def summary(cls) -> str:
        """One line that says what the entry is: the first line of its page.

        Returns
        -------
        str
            Without the full stop.
        """
        return cls.page().partition("\n")[0].rstrip(".")

    @classmethod
    def page(cls) -> str:
        """The entry's page: story, equations and references, from its file's docstring (Markdown).

        Returns
        -------
        str
            Markdown with formulas between dollars.
        """
        return inspect.getdoc(inspect.getmodule(cls)) or ""

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse data that this entry cannot be fitted to.

        Parameters
        ----------
        x : Tensor (N, D)
            Data, arranged.
        options : Options
            Validated options of the entry.

        Raises
        ------
        InvalidInput
            With what was found, what was expected and what to do.
        """

    @classmethod
    def arrange(cls, x: Tensor, options: Any) -> Tensor:
        """Put the rows of a table into the form that the program takes; they stay as they are unless an entry differs.

        What is arranged already comes back unchanged.

        Parameters
        ----------
        x : Tensor (N, D)
            Rows of a table.
        options : Options
            Validated options of the entry, which may name columns.

        Returns
        -------
        Tensor
            (N, D) unless an entry differs.
        """
        return x

    @classmethod
    def width(cls, x: Tensor) -> int:
        """Return the number of columns that arranged data stand for.

        Parameters
        ----------
        x : Tensor
            Data, arranged.

        Returns
        -------
        int
            Number D.
        """
        return x.shape[-1]

    @classmethod
    def count(cls, x: Tensor) -> int:
        """Return the number of rows of the table that arranged data came from.

        Parameters
        ----------
        x : Tensor
            Data, arranged.

        Returns
        -------
        int
            Number N.
        """
        return len(x)

    @classmethod
    def from_data(cls, x: Tensor, *, seed: int = 0, names: Sequence[str] | None = None, **options: Any) -> Self:
        """Build the entry for the rows ``x`` (N, D), with validated options and sensible starting values.

        Parameters
        ----------
        x : Tensor (N, D)
            Data, as a table or arranged.
        seed : int
            Seed of the starting values.
        names : sequence of str, optional
            Names of the columns; x0, x1, ... by default.
        **options
            Options of the entry. Those that name a column take its name or its position.

        Returns
        -------
        Entry
            With starting values and the names of its columns, in its own dtype.

        Raises
        ------
        InvalidInput
            For options or data that do not fit this entry.
        """
        names = default_names(x.shape[1] if x.ndim == 2 else cls.width(x)) if names is None else tuple(names)
        parsed = cls.Options.parse(options).at_positions(names)
        arranged = cls.arrange(x, parsed)
        cls.check_data(arranged, parsed)
        with isolated(seed):
            entry = cls(parsed, cls.width(arranged)).to(cls.dtype)
            entry.table_names = names
            entry.initialize(arranged.to(cls.dtype))
        return entry

    @classmethod
    def example(cls, columns: int | None = None, *, seed: int = 0, **options: Any) -> Self:
        """Build the entry with parameters drawn at random, to simulate data from.

        Parameters
        ----------
        columns : int, optional
            Number D of columns; the class attribute ``example_columns`` by default.
        seed : int
            Seed of the parameters.
        **options
            Options of the entry.

        Returns
        -------
        Entry
            In its own dtype.

        Raises
        ------
        InvalidInput
            For options that do not fit this entry.

        Examples
        --------
        >>> from elbozoo.models import get_entry
        >>> entry = get_entry("ppca").example(columns=3, latent_dim=1)
        >>> x, z = entry.simulate(4, seed=0)
        >>> tuple(x.shape), tuple(z.shape)
        ((4, 3), (4, 1))
        """
        columns = columns or cls.example_columns
        parsed = cls.Options.parse(options).at_positions(default_names(columns))
        with isolated(seed):
            entry = cls(parsed, columns).to(cls.dtype)
            entry.randomize()
        return entry

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns that arranged data still have."""
        return self.table_names

    def key_columns(self) -> dict[str, ColumnRole]:
        """Return the columns of the table that hold labels, by name, with their roles.

        Returns
        -------
        dict of ColumnRole
            By name of the column; empty where no column holds labels.
        """
        roles = type(self.options).column_roles()
        named = self.options.columns_named()
        return {self.table_names[c]: roles[o] for o, c in named.items() if roles[o].is_key}  # type: ignore[index]

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Set the starting values of θ for some rows.

        Parameters
        ----------
        x : Tensor (N, D)
            Rows, arranged, in the dtype of the entry.
        restart : int
            Attempt, counted from 0; a later one starts elsewhere.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no starting values; define initialize(x, restart)")

    def randomize(self) -> None:
        """Draw θ at random, of the size that makes an interesting simulated data set."""
        raise NotImplementedError(f"{type(self).__name__} cannot draw its parameters; define randomize()")

    def forward(self, batch: Batch) -> Tensor:
        """Run the generative program on a batch; the observed site is ``"x"``.

        Parameters
        ----------
        batch : Batch
            Rows with their positions in the data set.

        Returns
        -------
        Tensor (B, D)
            Value of the observed site.
        """
        raise NotImplementedError(f"{type(self).__name__} has no program; define forward(batch)")

    def latent_sites(self, x: Tensor | None = None) -> list[LatentSite]:
        """Return the latent sites of the program, read off its trace.

        Parameters
        ----------
        x : Tensor, optional
            Data, arranged; two rows that the entry simulates by default.

        Returns
        -------
        list of LatentSite
            In the order in which the program samples them: name, shape, support, and whether each row has its own.
        """
        if x is None:
            return latent_sites(self, Batch.full(self.simulate(2, seed=0)[0]))
        return latent_sites(self, Batch.full(x)._replace(x=x[:2], index=torch.arange(min(2, len(x)))))

    def guide_refusal(self, family: str, source: str) -> str | None:
        """Say why local guides of a family and a source do not suit this program, or return None.

        Parameters
        ----------
        family : str
            Family of a local guide, such as ``"diagonal-normal"``.
        source : str
            Where the parameters of q come from, such as ``"amortized"``.

        Returns
        -------
        str or None
            The reason, which completes the sentence "guide G does not fit M: ...".
        """
        return None

    def elements(self, x: Tensor) -> int:
        """Return how many numbers the program holds for one draw of one datum, by which chunks are sized.

        Parameters
        ----------
        x : Tensor
            Data, arranged.

        Returns
        -------
        int
            At least 1.
        """
        return max(1, x[0].numel())

    def template(self, n: int) -> Tensor:
        """Return rows to simulate on: zeros, with whatever is conditioned on filled in.

        Parameters
        ----------
        n : int
            Number of rows.

        Returns
        -------
        Tensor (n, D)
            In the dtype and on the device of the parameters.
        """
        parameter = next(self.parameters(), torch.empty(0, dtype=self.dtype))
        return torch.zeros(n, self.columns, dtype=parameter.dtype, device=parameter.device)

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Return the rows of ``template`` with the value of the observed site put in its place.

        Parameters
        ----------
        template : Tensor (n, D)
            What :meth:`template` returned.
        observed : Tensor
            Value of the observed site.

        Returns
        -------
        Tensor (n, D)
            Whole rows.
        """
        return observed

    def starting_latents(self, x: Tensor) -> dict[str, Tensor]:
        """Return values of global latents at which gradient methods and samplers start; none by default.

        Parameters
        ----------
        x : Tensor
            Data, arranged.

        Returns
        -------
        dict of Tensor
            Values by site, of the shape of one draw.
        """
        return {}

    def constant_data(self, x: Tensor) -> dict[str, Tensor]:
        """Return what the program conditions on, such as covariates, by name.

        Parameters
        ----------
        x : Tensor
            Data, arranged.

        Returns
        -------
        dict of Tensor
            Empty where the program conditions on nothing.
        """
        return {}

    def coords(self) -> dict[str, Sequence[Any]]:
        """Return labels of the dimensions in ``site_dims``, where they have some.

        Returns
        -------
        dict of sequence
            Labels by name of the dimension.
        """
        return {}

    def simulate(self, n: int, seed: int) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        """Draw rows from the program at the present θ.

        Parameters
        ----------
        n : int
            Number of rows.
        seed : int
            Seed of latents and rows.

        Returns
        -------
        x : Tensor (n, D)
            Observations.
        z : Tensor, or dict of Tensor by site where there are several
            The latents they were drawn from.

        Raises
        ------
        InvalidInput
            For a program without the observed site ``"x"``.
        """
        with isolated(seed), torch.no_grad(), pyro.validation_enabled(False):
            return self._simulate(self.template(n))

    def simulate_table(self, n: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Draw a table of rows, with the class of each row where the latents are one class per row.

        Parameters
        ----------
        n : int
            Number of rows.
        seed : int
            Seed of latents and rows.

        Returns
        -------
        x : Tensor (n, D)
            The rows.
        labels : Tensor (n,) of int64, or None
            Their classes.
        """
        x, z = self.simulate(n, seed)
        is_class = isinstance(z, Tensor) and z.shape == (n,) and not z.is_floating_point()
        return x, z.long() if isinstance(z, Tensor) and is_class else None

    def _simulate(self, template: Tensor) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        trace = poutine.trace(poutine.uncondition(self)).get_trace(Batch.full(template))
        values = {name: node["value"] for name, node in stochastic_nodes(trace)}
        if OBSERVED_SITE not in values:
            raise InvalidInput(f"the program samples {list(values)}, expected an observed site {OBSERVED_SITE!r}")
        x = self.complete(template, values.pop(OBSERVED_SITE))
        return x, next(iter(values.values())) if len(values) == 1 else values


class ParameterFreeEntry(Entry):
    """Base of entries in which everything unknown is latent: there is no θ to start or to draw."""

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Do nothing: the program has no parameters."""

    def randomize(self) -> None:
        """Do nothing: the program has no parameters."""


def default_names(columns: int) -> tuple[str, ...]:
    """Return the names of columns that have none of their own: x0, x1, ...."""
    return tuple(f"x{position}" for position in range(columns))


def joint_posterior(entry: HasPosterior, x: Tensor, sites: Sequence[LatentSite]) -> Joint:
    """Return the exact posterior over the latent ``sites``, in one form however many there are."""
    posterior = entry.posterior(x)
    return posterior if isinstance(posterior, Joint) else Joint({sites[0].name: posterior})


@runtime_checkable
class HasOracle(Protocol):
    """An entry with the exact evidence."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, constants kept: (N,) for local latents, () for global ones."""
        ...


@runtime_checkable
class HasPosterior(Protocol):
    """An entry with the exact posterior."""

    def posterior(self, x: Tensor) -> Distribution | Joint:
        """p(z given x): batch shape (N,) for local latents, () for global ones; a Joint for several sites."""
        ...


@runtime_checkable
class HasPredictive(Protocol):
    """An entry with the exact posterior predictive."""

    def predictive(self, x: Tensor) -> Distribution:
        """p(new row given the rows x): batch shape (), event shape that of the observed site of one row."""
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
class SupportsCAVI(Protocol):
    """A conditionally conjugate entry: each factor of a mean-field q has its optimum in closed form.

    The factors are a named tuple of tensors, the parameters of q.
    """

    def initial_factors(self, x: Tensor, restart: int) -> NamedTuple:
        """Return the factors to start from; ``restart`` counts the attempts from 0."""
        ...

    def update_factors(self, x: Tensor, factors: Any) -> NamedTuple:
        """Return the factors after one sweep, each set in turn to its optimum given the others."""
        ...

    def bound(self, x: Tensor, factors: Any) -> Tensor:
        """Closed-form ELBO of the factors, (), total nats."""
        ...

    def factor_distributions(self, x: Tensor, factors: Any) -> Mapping[str, Conditional]:
        """q of each latent site, or a function of the sites before it; local ones with batch shape (N,)."""
        ...


@runtime_checkable
class HasReducedJoint(Protocol):
    """An entry whose evidence is an integral over at most three dimensions once the rest is integrated out.

    Attributes
    ----------
    reduced_dim : int
        Number K of the dimensions that are left.
    """

    reduced_dim: int

    def reduced_log_joint(self, x: Tensor, u: Tensor) -> Tensor:
        """Log density in nats, (G,), of x and the remaining latents at unconstrained points ``u`` (G, K)."""
        ...


@runtime_checkable
class HasEnumeratedEvidence(Protocol):
    """An entry whose evidence is a finite sum that can be carried out for few rows."""

    def enumerated_log_evidence(self, x: Tensor) -> Tensor | None:
        """Exact log p(x) in nats, (), or None where there are too many terms."""
        ...


@runtime_checkable
class HasExpectedLogJoint(Protocol):
    """An entry with discrete latents whose expectations under a factorised q are closed."""

    def expected_log_joint(self, x: Tensor, probs: Tensor) -> Tensor:
        """E_q[log p(x, z)] of each datum in nats, (B,), for independent categoricals ``probs`` (B, T, K)."""
        ...


@runtime_checkable
class HasRowLikelihoods(Protocol):
    """An entry that evaluates every row at every latent value at once, which quadrature uses."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x_n given z_g) in nats, (N, G), for rows ``x`` (N, D) and values ``z`` (G, K) of the real latents.

        Finite latents are summed out, and whatever else a row has that is observed counts with it.
        """
        ...


@runtime_checkable
class Corrupts(Protocol):
    """An entry whose guide sees corrupted rows while it is trained."""

    def corrupt(self, x: Tensor) -> Tensor:
        """Return the rows ``x`` (B, D) with fresh noise, of the same shape."""
        ...


@runtime_checkable
class HasLayers(Protocol):
    """An entry whose latents of a datum are layers of independent normals, each given those drawn before it."""

    def prior_of(self, site: str, values: Mapping[str, Tensor]) -> Distribution:
        """p(the layer ``site`` given the ``values`` of those before it): independent normals, batch shape theirs."""
        ...


QUADRATURE_DIM = 2
QUADRATURE_VALUES = 1000  # of finite latents, which are summed over at each point
CUBATURE_DIM = 3

CAPABILITIES: dict[str, Callable[[Any], bool]] = {
    "oracle": lambda entry: isinstance(entry, HasOracle),
    "posterior": lambda entry: isinstance(entry, HasPosterior),
    "predictive": lambda entry: isinstance(entry, HasPredictive),
    "EM": lambda entry: isinstance(entry, SupportsEM),
    "CAVI": lambda entry: isinstance(entry, SupportsCAVI),
    "closed form": lambda entry: isinstance(entry, HasClosedForm),
    "quadrature": lambda entry: supports_quadrature(entry.latent_sites()) or supports_cubature(entry),
    "simulation": lambda entry: True,
}


def supports_quadrature(sites: list[LatentSite]) -> bool:
    """Whether the evidence is an integral over at most two real dimensions for each datum.

    Finite latents beside them are summed over, if they do not have too many values together.
    """
    real = [site for site in sites if not site.is_enumerable]
    values = math.prod(site.cardinality or 1 for site in sites if site.is_enumerable)
    return (
        all(site.is_local and site.is_proper for site in sites)
        and all(site.is_real for site in real)
        and 0 < sum(site.dim for site in real) <= QUADRATURE_DIM
        and values <= QUADRATURE_VALUES
    )


def supports_cubature(entry: Entry, x: Tensor | None = None) -> bool:
    """Whether the evidence is one integral over at most three dimensions for the whole data set."""
    if isinstance(entry, HasReducedJoint):
        return True
    sites = entry.latent_sites(x)
    if any(site.is_local or site.support.is_discrete or not site.is_proper for site in sites):
        return False
    return 0 < sum(site.real_dim for site in sites) <= CUBATURE_DIM


def capabilities(entry: Entry) -> list[str]:
    """Return the names of what ``entry`` can do, derived from the methods that it has.

    Parameters
    ----------
    entry : Entry
        An entry with its θ; what it can do may depend on its options.

    Returns
    -------
    list of str
        Of ``oracle``, ``posterior``, ``predictive``, ``EM``, ``CAVI``, ``closed form``, ``quadrature``, ``simulation``.

    Examples
    --------
    >>> from elbozoo.models import capabilities, get_entry
    >>> capabilities(get_entry("vae").example(latent_dim=2))
    ['quadrature', 'simulation']
    """
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
