"""The graph that a program's trace draws: its sites, what each depends on, and the plates they stand in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, Program
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.groups import ROW_SITE, GroupEntry
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.regression import RegressionEntry
from elbozoo.models.contract.sequences import SequenceEntry, StackedEntry
from elbozoo.models.contract.sites import DATA_PLATE, OBSERVED_SITE, stochastic_nodes
from elbozoo.models.distributions.markov_chain import PaddedSteps
from elbozoo.notation.symbols import indexed, symbol_of

LATENT, OBSERVED, PARTLY, DETERMINISTIC, GIVEN, PARAMETER = (
    "latent",
    "observed",
    "partly observed",
    "deterministic",
    "given",
    "parameter",
)
FLAT = "flat"  # in place of the distribution of a site that has no density of its own
ROWS_PLATE = "rows"  # of a group: the entry lays them along a dimension of its sites
COMPONENTS_PLATE = "components"  # of a mixture whose components are latent: likewise


@dataclass(frozen=True)
class Node:
    """A site of a program, a parameter, or what the program conditions on.

    Attributes
    ----------
    name : str
        Name in the code.
    symbol : str
        In TeX.
    kind : str
        ``latent``, ``observed``, ``partly observed``, ``deterministic``, ``given`` or ``parameter``.
    distribution : str
        Name of the distribution's class; empty for the last three kinds.
    plate : str or None
        The innermost plate that it stands in.
    note : str
        What the picture says about it beside that.
    """

    name: str
    symbol: str
    kind: str
    distribution: str = ""
    plate: str | None = None
    note: str = ""


class Plate(NamedTuple):
    """A plate: how often it repeats what is in it, in words, and the plate around it."""

    name: str
    label: str
    parent: str | None


@dataclass(frozen=True)
class Structure:
    """Nodes by name in the order of the program, edges from cause to effect, and plates by name."""

    nodes: dict[str, Node]
    edges: list[tuple[str, str]]
    plates: dict[str, Plate] = field(default_factory=dict)

    def parents(self, name: str) -> list[str]:
        """Return the names of what the node ``name`` depends on, parameters last."""
        found = [source for source, target in self.edges if target == name]
        return sorted(found, key=lambda source: self.nodes[source].kind == PARAMETER)


def structure_of(entry: Entry, x: Tensor, parameters: Mapping[str, str], rows: int | None = None) -> Structure:
    """Return the graph of ``entry``, read off its trace on the rows ``x``.

    Parameters
    ----------
    entry : Entry
        The program. Its parameters, Pyro's parameter store and the random state stay as they were.
    x : Tensor (N, D)
        Arranged rows.
    parameters : mapping of str to str
        Symbols in TeX of the parameters to show, by the name of the entry's attribute that holds them.
    rows : int, optional
        Number of data for the label of the plate; where it is missing the label says N.

    Raises
    ------
    InvalidInput
        For a program without an observed site ``"x"``.
    """
    batch = Batch.full(x)
    relations = _relations(entry, batch)
    merged = _merged(list(relations["sample_dist"]))
    trace = _trace_at_fixed_latents(entry, batch)
    sites = _sites(entry, relations, merged, trace)
    given = [] if any(node.kind == PARTLY for node in sites) else _given(entry, x)
    links = _parameter_links(trace, entry, list(parameters), merged)
    acting = {name for name, _ in links}
    shown = [Node(name, symbol, PARAMETER) for name, symbol in parameters.items() if name in acting]
    edges = [*links, *[(node.name, OBSERVED_SITE) for node in given], *_edges(relations, merged)]
    return Structure(
        {node.name: node for node in [*shown, *given, *sites]},
        list(dict.fromkeys(edges)),
        _plates(entry, relations, _plate_sizes(trace), rows),
    )


# ---- what Pyro says --------------------------------------------------------------------------------------------------


def _relations(entry: Entry, batch: Batch) -> dict[str, Any]:
    # Pyro cannot describe a deterministic site that is not masked; what depends on it depends on what it is made of.
    program = poutine.block(entry, hide_fn=_is_bare_deterministic)
    with isolated(0), pyro.settings.context(validate_poutine=False):
        relations: dict[str, Any] = get_model_relations(program, (batch,), include_deterministic=True)
    if OBSERVED_SITE not in relations["observed"]:
        raise InvalidInput(
            f"the program observes {relations['observed']}, expected an observed site {OBSERVED_SITE!r}; "
            f'write pyro.sample("{OBSERVED_SITE}", ..., obs=batch.x)'
        )
    return relations


def _is_bare_deterministic(site: dict[str, Any]) -> bool:
    is_deterministic = site["type"] == "sample" and site["infer"].get("_deterministic", False)
    return is_deterministic and not hasattr(site["fn"], "base_dist")


def _merged(names: list[str]) -> dict[str, str]:
    """Return the node that each site is shown as: Pyro's ``obs_mask`` makes two sites of a partly observed one."""
    halves = {
        half: name.removesuffix("_observed")
        for name in names
        if name.endswith("_observed") and f"{name.removesuffix('_observed')}_unobserved" in names
        for half in (name, f"{name.removesuffix('_observed')}_unobserved")
    }
    return {name: halves.get(name, name) for name in names}


def _sites(entry: Entry, relations: dict[str, Any], merged: dict[str, str], trace: poutine.Trace) -> list[Node]:
    # A half stands for the whole: of the whole the program's trace knows no more than that it is computed.
    whole = {shown for name, shown in merged.items() if shown != name}
    drawn = {shown: name for name, shown in merged.items() if name not in whole}
    return [_site(entry, name, shown, relations, _law(trace.nodes[name]["fn"])) for shown, name in drawn.items()]


def _edges(relations: dict[str, Any], merged: dict[str, str]) -> list[tuple[str, str]]:
    causes = relations["sample_sample"]
    edges = [(merged[source], merged[site]) for site, sources in causes.items() for source in sources]
    return [(source, target) for source, target in edges if source != target]


def _site(entry: Entry, name: str, shown: str, relations: dict[str, Any], law: str) -> Node:
    kind = OBSERVED if name in relations["observed"] else LATENT
    if shown != name:
        kind = PARTLY
    if relations["sample_dist"][name] == "Deterministic":
        kind, law = DETERMINISTIC, ""
    inside = {plate: len(sites) for plate, sites in relations["plate_sample"].items() if name in sites}
    innermost = min(reversed(inside), key=lambda plate: inside[plate]) if inside else None
    plate = ROWS_PLATE if _is_of_rows(entry, shown) else innermost or _plate_by_dimension(entry, shown)
    return Node(shown, _symbol(entry, shown, plate), kind, law, plate, _note(entry, kind, shown))


def _plate_by_dimension(entry: Entry, name: str) -> str | None:
    """Return the plate of a site that has its copies along its first dimension and not in a plate of the program."""
    dims = entry.site_dims.get(name, ())
    if len(dims) > 1 and dims[0] == "component":
        return COMPONENTS_PLATE
    return DATA_PLATE if dims == ("school",) else None


def _law(distribution: Any) -> str:
    """Return the name of a distribution's class, that of a step where steps are laid along a dimension."""
    if getattr(distribution, "_mask", None) is False:
        return FLAT
    if isinstance(distribution, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        return _law(distribution.base_dist)
    if isinstance(distribution, PaddedSteps):
        return _law(distribution.base)
    if type(distribution) is dist.TransformedDistribution:
        return f"{_law(distribution.base_dist)}, transformed"
    return type(distribution).__name__


def _note(entry: Entry, kind: str, name: str) -> str:
    if kind == PARTLY:
        return "observed in some rows"
    return "a chain over the steps" if isinstance(entry, SequenceEntry) and name != OBSERVED_SITE else ""


def _symbol(entry: Entry, name: str, plate: str | None) -> str:
    if isinstance(entry, RegressionEntry) and name == OBSERVED_SITE:
        return indexed("y", "n")
    symbol = symbol_of(name, words=not isinstance(entry, Program))
    if plate == COMPONENTS_PLATE:
        return indexed(symbol, "k")
    if plate not in (DATA_PLATE, ROWS_PLATE):
        return symbol
    if isinstance(entry, SequenceEntry):
        return indexed(symbol, "1{:}T")
    return indexed(symbol, "g" if isinstance(entry, GroupEntry) and plate == DATA_PLATE else "n")


def _given(entry: Entry, x: Tensor) -> list[Node]:
    return [
        Node(name, indexed(symbol_of(name), "n"), GIVEN, plate=DATA_PLATE, note="given")
        for name in entry.constant_data(x)
    ]


# ---- plates ----------------------------------------------------------------------------------------------------------


def _plates(entry: Entry, relations: dict[str, Any], sizes: dict[str, int], rows: int | None) -> dict[str, Plate]:
    inside = {name: set(sites) for name, sites in relations["plate_sample"].items()}
    found = {
        name: Plate(name, _plate_label(entry, name, sizes, rows), _smallest_around(name, inside)) for name in inside
    }
    if isinstance(entry, GroupEntry):
        found[ROWS_PLATE] = Plate(ROWS_PLATE, "the rows of a group", DATA_PLATE)
    if any(_plate_by_dimension(entry, name) == COMPONENTS_PLATE for name in entry.site_dims):
        found[COMPONENTS_PLATE] = Plate(COMPONENTS_PLATE, "K components", None)
    return found


def _smallest_around(name: str, inside: dict[str, set[str]]) -> str | None:
    order = list(inside)
    larger = [
        other
        for other, sites in inside.items()
        if inside[name] < sites or (inside[name] == sites and order.index(other) < order.index(name))
    ]
    # Of plates with the same sites Pyro lists the outer one first.
    return min(reversed(larger), key=lambda other: len(inside[other])) if larger else None


def _plate_label(entry: Entry, name: str, sizes: dict[str, int], rows: int | None) -> str:
    if name != DATA_PLATE:
        original = name.partition("__CLONE")[0]
        return f"{original}: {sizes[original]}"
    letter, noun = ("S", f"{entry.stack_dims[0]}s") if isinstance(entry, StackedEntry) else ("N", "rows")
    return f"data: {letter} {noun}" if rows is None else f"data: {letter} = {rows} {noun}"


def _plate_sizes(trace: poutine.Trace) -> dict[str, int]:
    frames = [frame for node in trace.nodes.values() if node["type"] == "sample" for frame in node["cond_indep_stack"]]
    return {frame.name: frame.size for frame in frames}


def _is_of_rows(entry: Entry, name: str) -> bool:
    return isinstance(entry, GroupEntry) and name in (ROW_SITE, OBSERVED_SITE)


# ---- parameters ------------------------------------------------------------------------------------------------------


def _parameter_links(
    trace: poutine.Trace, entry: Entry, names: list[str], merged: dict[str, str]
) -> list[tuple[str, str]]:
    """Return the pairs (parameter, site) where the site's density, at values that are held fixed, has a gradient."""
    owners = {pyro_name: owner for pyro_name, _ in entry.named_parameters() if (owner := _owner(pyro_name, names))}
    parameters = [parameter for name, parameter in entry.named_parameters() if name in owners]
    links = []
    for site, shown in merged.items():
        node = trace.nodes[site]
        is_deterministic = node["infer"].get("_deterministic", False)
        total = (node["value"] if is_deterministic else node["fn"].log_prob(node["value"].detach())).sum()
        if parameters and total.requires_grad:
            gradients = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
            reached = [name for name, gradient in zip(owners, gradients, strict=True) if gradient is not None]
            links += [(owners[name], shown) for name in reached]
    return list(dict.fromkeys(links))


def _owner(parameter: str, names: list[str]) -> str | None:
    plain = parameter.removesuffix("_unconstrained")
    return next((name for name in names if plain == name or plain.startswith(f"{name}.")), None)


def _trace_at_fixed_latents(entry: Entry, batch: Batch) -> poutine.Trace:
    """Trace the program at latents drawn once, so that no density depends on a parameter by way of another's draw."""
    with isolated(0), pyro.settings.context(validate_poutine=False):
        with torch.no_grad():
            drawn = poutine.trace(entry).get_trace(batch)
        with torch.enable_grad():
            fixed = {name: node["value"].detach() for name, node in stochastic_nodes(drawn)}
            return poutine.trace(poutine.condition(entry, data=fixed)).get_trace(batch)
