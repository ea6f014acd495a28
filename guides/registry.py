"""Names of guides, which of them fit a model, and why the others do not."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from torch import Tensor

from elbozoo.guides.autoguides import AUTOGUIDES, GlobalGuide
from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.bound import refusal_of_sum
from elbozoo.guides.families import FAMILIES
from elbozoo.guides.grouped import GroupGuide, ProductOfNormals, ProductOfNormalsAndPrior
from elbozoo.guides.hierarchical import BottomUpGuide, LadderGuide
from elbozoo.guides.labelled import LabelThenLatentGuide
from elbozoo.guides.local import ExactGuide, LocalGuide
from elbozoo.guides.sequences import STEP_SOURCES, SequenceGuide
from elbozoo.guides.sources import SOURCES
from elbozoo.guides.whole import WholeGuide
from elbozoo.models.contract.entry import Entry, HasPosterior
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.groups import GroupEntry
from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.models.contract.sites import LatentSite


class GuideCard(NamedTuple):
    """A guide's name, its family, its source, and why it does not fit the model (None where it does)."""

    name: str
    family: str
    source: str
    refusal: str | None


LOCAL_NAMES = {f"{source}-{family}": (family, source) for source in SOURCES for family in FAMILIES}
GLOBAL_NAMES = list(AUTOGUIDES)
WHOLE_GUIDES: tuple[type[WholeGuide], ...] = (
    BottomUpGuide,
    LadderGuide,
    LabelThenLatentGuide,
    ProductOfNormals,
    ProductOfNormalsAndPrior,
)
ALIASES = ("mean-field", "amortized", "semi-amortized", "shared", "free", "full-rank", "low-rank")
NO_LATENT = "it has no latent, so there is nothing for a q to say"
ALL_NAMES = sorted({*LOCAL_NAMES, *GLOBAL_NAMES, *ALIASES, *(guide.NAME for guide in WHOLE_GUIDES), "exact"})


def guide_cards(entry: Entry, sites: list[LatentSite] | None = None) -> list[GuideCard]:
    """Return a card for every guide there is, with the reason where it does not fit ``entry``."""
    sites = sites if sites is not None else entry.latent_sites()
    cards = [
        GuideCard(name, family, source, _local_refusal(entry, sites, family, source))
        for name, (family, source) in LOCAL_NAMES.items()
    ]
    cards += [GuideCard(name, name, "global", _global_refusal(sites, name)) for name in GLOBAL_NAMES]
    cards += [GuideCard(g.NAME, g.NAME, "amortized", _whole_refusal(g, entry, sites)) for g in WHOLE_GUIDES]
    return [*cards, GuideCard("exact", "posterior", "exact", _exact_refusal(entry))]


def guide_names(entry: Entry) -> list[str]:
    """Return the canonical names of all guides that fit ``entry``.

    Parameters
    ----------
    entry : Entry
        The model.

    Returns
    -------
    list of str
        In the order of :func:`list_guides`.

    Examples
    --------
    >>> from elbozoo.guides import guide_names
    >>> from elbozoo.models import get_entry
    >>> guide_names(get_entry("gaussian-mixture").example())[:3]
    ['shared-categorical', 'free-categorical', 'amortized-categorical']
    """
    return [card.name for card in guide_cards(entry) if card.refusal is None]


def list_guides(entry: Entry) -> pd.DataFrame:
    """Return a table of all guides for ``entry``: family, source, whether it fits, and why not.

    Parameters
    ----------
    entry : Entry
        The model.

    Returns
    -------
    DataFrame
        Indexed by ``guide``, with ``family``, ``source``, ``fits`` and ``reason``; those that fit come first.
    """
    rows = [
        {"guide": c.name, "family": c.family, "source": c.source, "fits": c.refusal is None, "reason": c.refusal or ""}
        for c in guide_cards(entry)
    ]
    return pd.DataFrame(rows).sort_values("fits", ascending=False, kind="stable").set_index("guide")


def resolve_guide(name: str, entry: Entry, sites: list[LatentSite] | None = None) -> str:
    """Return the canonical name of a guide for an entry.

    ``"mean-field"`` and ``"amortized"`` mean the family that suits the latent's support.

    Parameters
    ----------
    name : str
        Name of a guide, or an alias such as ``"mean-field"``.
    entry : Entry
        The model.
    sites : list of LatentSite, optional
        Latent sites of the entry where they are at hand already.

    Returns
    -------
    str
        Such as ``"free-diagonal-normal"``.

    Raises
    ------
    InvalidInput
        For an unknown name, or a guide that does not fit, with the reason and what would work.

    Examples
    --------
    >>> from elbozoo.guides import resolve_guide
    >>> from elbozoo.models import get_entry
    >>> resolve_guide("amortized", get_entry("ppca").example())
    'amortized-diagonal-normal'
    """
    sites = sites if sites is not None else entry.latent_sites()
    canonical = _expand_alias(name, entry, sites)
    cards = {card.name: card for card in guide_cards(entry, sites)}
    if canonical not in cards:
        raise unknown_name("guide", name, ALL_NAMES)
    refusal = cards[canonical].refusal
    if refusal is not None:
        fitting = ", ".join(c.name for c in cards.values() if c.refusal is None) or "none"
        raise InvalidInput(f"guide {name!r} does not fit {entry.name()}: {refusal}; guides that fit: {fitting}")
    return canonical


def refusal_of(name: str, entry: Entry) -> str | None:
    """Say why the guide called ``name``, or by one of the aliases, does not fit ``entry``; None where it does."""
    sites = entry.latent_sites()
    canonical = _expand_alias(name, entry, sites)
    return next(card.refusal for card in guide_cards(entry, sites) if card.name == canonical)


def build_guide(name: str, entry: Entry, x: Tensor, options: GuideOptions | None = None) -> Guide:
    """Build a guide for an entry and its rows.

    Parameters
    ----------
    name : str
        Name of a guide, or an alias such as ``"mean-field"``.
    entry : Entry
        The model.
    x : Tensor (N, D)
        Rows, arranged.
    options : GuideOptions, optional
        Options of the guide; their defaults if none are given.

    Returns
    -------
    Guide
        In the entry's dtype, with starting values.

    Raises
    ------
    InvalidInput
        See :func:`resolve_guide`.
    """
    options = (options or GuideOptions()).suited_to(entry)
    sites = entry.latent_sites(x)
    canonical = resolve_guide(name, entry, sites)
    if canonical == "exact":
        return ExactGuide(entry, sites)
    for whole in WHOLE_GUIDES:
        if canonical == whole.NAME:
            return whole(entry, sites, x, options)
    if canonical in LOCAL_NAMES:
        family, source = LOCAL_NAMES[canonical]
        if isinstance(entry, SequenceEntry):
            return SequenceGuide(canonical, family, source, sites, x, options)
        if isinstance(entry, GroupEntry):
            return GroupGuide(canonical, family, source, sites, x, options)
        return LocalGuide(canonical, family, source, sites, x, options, entry)
    return GlobalGuide(canonical, entry, x, options, summed_out=[site.name for site in sites if site.is_local])


def _expand_alias(name: str, entry: Entry, sites: list[LatentSite]) -> str:
    if name not in ALIASES:
        return name
    if name == "amortized" and entry.amortized_guide is not None:
        return entry.amortized_guide
    default = "categorical" if all(site.is_discrete for site in sites) else "diagonal-normal"
    family = {"full-rank": "full-rank-normal", "low-rank": "low-rank-normal"}.get(name, default)
    if _has_global(sites) and name in ("mean-field", "full-rank", "low-rank"):
        return family
    source = name if name in SOURCES else "free"
    if family == default and entry.guide_refusal(family, source) is not None:
        family = "delta"
    return f"{source}-{family}"


def _has_global(sites: list[LatentSite]) -> bool:
    return any(not site.is_local for site in sites)


def _local_refusal(entry: Entry, sites: list[LatentSite], family: str, source: str) -> str | None:
    if not sites:
        return NO_LATENT
    for site in sites:
        if not site.is_local:
            return f"the latent {site.name!r} is one for the whole data set, so there is no q per datum to be {source}"
    if isinstance(entry, SequenceEntry) and source not in STEP_SOURCES:
        return f"a datum is a sequence, and sequences of different lengths have no {source} q"
    if isinstance(entry, SequenceEntry) and family in ("low-rank-normal", "flow"):
        return "q is independent across time, and a step has few dimensions, which full-rank-normal serves"
    if source == "semi-amortized" and (reason := refusal_of_sum([site.name for site in sites if site.is_discrete])):
        return reason
    if reason := entry.guide_refusal(family, source):
        return reason
    # A program with both kinds of latents has a family for the continuous ones and a categorical for the others.
    fitting = [site for site in sites if FAMILIES[family].refusal(site) is None]
    refused = [site for site in sites if site not in fitting]
    if not fitting or (family == "categorical" and refused):
        return FAMILIES[family].refusal(refused[0])
    return None


def _whole_refusal(guide: type[WholeGuide], entry: Entry, sites: list[LatentSite]) -> str | None:
    return guide.refusal(entry, sites) if sites else NO_LATENT


def _global_refusal(sites: list[LatentSite], name: str) -> str | None:
    if not sites:
        return NO_LATENT
    for site in sites:
        if site.is_local and not (site.is_enumerable and _has_global(sites)):
            instead = name if name in FAMILIES else "diagonal-normal"
            return (
                f"the latent {site.name!r} is local, one per datum, so say whose parameters, "
                f"as in free-{instead} or amortized-{instead}"
            )
        if site.is_discrete and not site.is_local:
            return f"the latent {site.name!r} takes {site.cardinality} values, and {name} is a family over real vectors"
    return None


def _exact_refusal(entry: Entry) -> str | None:
    return None if isinstance(entry, HasPosterior) else f"{entry.name()} has no exact posterior"
