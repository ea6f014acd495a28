"""What a program's own trace says about its latent sites: names, shapes, supports, local or global."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.settings
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

DATA_PLATE = "data"
OBSERVED_SITE = "x"
MAX_PLATE_NESTING = 1


@dataclass(frozen=True)
class LatentSite:
    """One latent site of a program.

    Attributes
    ----------
    name : str
        Name of the site.
    event_shape : torch.Size
        Shape of one draw; of one datum's draw for a local site.
    support : Constraint
        Support of its distribution.
    is_local : bool
        Whether it stands inside the data plate: one latent per datum.
    cardinality : int or None
        Number of values of each element of a finite discrete site, otherwise None.
    is_proper : bool
        Whether its distribution has a density that integrates to one. Pyro's ``ImproperUniform`` has none, nor has
        any distribution under ``mask(False)``, which is flat where densities are asked for and can still be drawn
        from; under either p(x) does not exist.
    """

    name: str
    event_shape: torch.Size
    support: constraints.Constraint
    is_local: bool
    cardinality: int | None
    is_proper: bool = True

    @property
    def is_discrete(self) -> bool:
        """Whether each element of the site takes finitely many values."""
        return self.cardinality is not None

    @property
    def is_enumerable(self) -> bool:
        """Whether the site is one finite value, so that a sum over its values is short."""
        return self.is_discrete and self.event_shape == ()

    @property
    def is_real(self) -> bool:
        """Whether the support is all real vectors."""
        support = self.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        return support is constraints.real or support is constraints.real_vector

    @property
    def dim(self) -> int:
        """Number of scalars in one draw."""
        return self.event_shape.numel()

    @property
    def real_dim(self) -> int:
        """Number of real numbers that one draw of a continuous site is made from."""
        return torch.Size(biject_to(self.support).inverse_shape(self.event_shape)).numel()


def latent_sites(program: Callable[[Batch], Any], batch: Batch) -> list[LatentSite]:
    """Return the latent sites of ``program``, read off one trace of it on ``batch``.

    Raises
    ------
    InvalidInput
        If the program observes nothing, or has no latent site.
    """
    # Pyro would answer pyro.param in a module with an error of its own, which does not say what to do.
    with isolated(0), torch.no_grad(), pyro.settings.context(validate_poutine=False):
        trace = poutine.trace(program).get_trace(batch)
        stored = [*pyro.get_param_store().keys(), *_stored_in_module(program)]
    if stored:
        raise InvalidInput(
            f"the program declares pyro.param {stored}, which lives in Pyro's global store; "
            "expected torch.nn.Parameter or PyroParam attributes of a PyroModule"
        )
    if OBSERVED_SITE not in trace.observation_nodes:
        raise InvalidInput(
            f"the program observes {trace.observation_nodes}, expected an observed site {OBSERVED_SITE!r}"
        )
    sites = [_latent_site(name, node) for name, node in stochastic_nodes(trace)]
    if not sites:
        raise InvalidInput("the program has no latent site; expected at least one pyro.sample without obs=")
    return sites


def stochastic_nodes(trace: poutine.Trace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the unobserved sample nodes of a trace, without the plates' own."""
    for name, node in trace.nodes.items():
        is_drawn = node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
        if is_drawn and not node["infer"].get("_deterministic"):
            yield name, node


def is_local_node(node: dict[str, Any]) -> bool:
    """Whether a traced sample node stands inside the data plate."""
    return any(frame.name == DATA_PLATE for frame in node["cond_indep_stack"])


def log_density(node: dict[str, Any]) -> Tensor:
    """Log probability of a traced sample node in nats, masked and not scaled.

    A mask says which elements there are, so whatever weighs a program's densities must respect it. The scale of the
    plate, and a β of an objective's, come after what is nonlinear. Pyro's ``log_prob`` has both, and its
    ``unscaled_log_prob`` neither.
    """
    result: Tensor = scale_and_mask(node["unscaled_log_prob"], mask=node["mask"])
    return result


def _stored_in_module(program: Callable[[Batch], Any]) -> list[str]:
    context = getattr(program, "_pyro_context", None)
    return list(getattr(context, "param_state", {"params": {}})["params"])


def _latent_site(name: str, node: dict[str, Any]) -> LatentSite:
    distribution = node["fn"]
    return LatentSite(
        name,
        distribution.event_shape,
        distribution.support,
        is_local_node(node),
        _cardinality(distribution),
        _is_proper(distribution),
    )


def _is_proper(distribution: Any) -> bool:
    while distribution is not None:
        if isinstance(distribution, dist.ImproperUniform) or getattr(distribution, "_mask", None) is False:
            return False
        distribution = getattr(distribution, "base_dist", None)
    return True


def _cardinality(distribution: Any) -> int | None:
    if distribution.has_enumerate_support:
        return len(distribution.enumerate_support(expand=False))
    support = distribution.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.integer_interval(0, 1))):
        return int(support.upper_bound - support.lower_bound) + 1
    return None
