"""The gallery of entries and their pages: each a tutorial from a run, with the entry's card at its head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from elbozoo.guides.registry import GuideCard, guide_cards
from elbozoo.inference.method import SPECIAL, default_methods, method_names
from elbozoo.models import Entry, capabilities
from elbozoo.models.contract.groups import GroupEntry
from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.pages import options_table
from elbozoo.tutorials import write_tutorial
from sitegen import notebooks
from sitegen.markdown import definitions, names, page, toctree

GLOBAL, FINITE, REAL, STACKED, NETWORKS, NONE = (
    "One latent for the whole data set",
    "A component for each datum",
    "A vector for each datum",
    "A path or a group",
    "A vector for each datum, read by a network",
    "No latent",
)
GROUPS = (REAL, FINITE, GLOBAL, STACKED, NETWORKS, NONE)


def write_page_of(name: str, path: Path) -> None:
    """Run the tutorial of an entry with its default guide."""
    write_tutorial(name, path)


def group_of(entry: Entry) -> str:
    """Return the heading under which an entry stands in the gallery, from its latents and its networks."""
    sites = entry.latent_sites()
    if not sites:
        return NONE
    if isinstance(entry, SequenceEntry | GroupEntry):
        return STACKED
    if any(not site.is_local for site in sites):
        return GLOBAL
    if any(isinstance(part, nn.Linear | nn.ConvTranspose2d) for part in entry.modules()):
        return NETWORKS
    return FINITE if any(site.is_discrete for site in sites) else REAL


def gallery(examples: Mapping[str, Entry], pictures: Mapping[str, notebooks.Shown | None]) -> str:
    """Return the page of all entries: a card for each, under the kind of its latents."""
    grouped = {group: [name for name, entry in examples.items() if group_of(entry) == group] for group in GROUPS}
    return page(
        "# The zoo",
        "Each entry is a generative program with what is known about it. Its capabilities are not declared: they "
        "follow from the methods that the entry has; see [capabilities](../concepts.md#capabilities). Behind each card "
        "is a tutorial that comes from a run.",
        *(
            block
            for group, members in grouped.items()
            if members
            for block in _group(group, members, examples, pictures)
        ),
        *(toctree([f"models/{name}" for name in members], group) for group, members in grouped.items() if members),
    )


def _group(
    group: str,
    members: list[str],
    examples: Mapping[str, Entry],
    pictures: Mapping[str, notebooks.Shown | None],
) -> list[str]:
    cards = "\n".join(_card(name, examples[name], pictures[name]) for name in members)
    return [f"## {group}", f"::::{{grid}} 1 2 3 3\n:gutter: 3\n\n{cards}\n::::"]


def _card(name: str, entry: Entry, picture: notebooks.Shown | None) -> str:
    alt = " ".join((picture.alt if picture else "").split())
    image = [f":img-top: thumbnails/{name}.png", f":img-alt: {alt or name}"] if picture else []
    return "\n".join(
        [
            f":::{{grid-item-card}} {name}",
            f":link: models/{name}",
            ":link-type: doc",
            ":class-card: zoo-card",
            *image,
            "",
            f"{type(entry).summary()}.",
            "",
            " ".join(f"{{bdg-secondary-line}}`{each}`" for each in capabilities(entry)),
            ":::",
        ]
    )


def entry_page(document: dict[str, Any], name: str, entry: Entry) -> dict[str, Any]:
    """Return the tutorial of an entry with its card below the introduction, and its options unless it lists them."""
    headed = notebooks.with_text(document, 1, _head(name, entry))
    said = "\n".join(notebooks.markdown_cells(document))
    fields = type(entry).Options.model_fields
    if not fields or all(f"`{option}`" in said for option in fields):
        return headed
    table = page("## Options", options_table(type(entry).Options)).strip()
    return notebooks.with_text(headed, len(headed["cells"]), table)


def _head(name: str, entry: Entry) -> str:
    cards = [card for card in guide_cards(entry) if card.refusal is None]
    special = [method for method in method_names(entry) if method in SPECIAL]
    facts = {
        "name": f"`{name}`",
        "capabilities": ", ".join(capabilities(entry)),
        "compared by default": names(default_methods(entry)),
        "methods": ", ".join(f"[`{method}`](../methods/{method}.ipynb)" for method in [*special, "svi"]),
        "guides that fit": "; ".join(_guides(cards)),
    }
    download = f"The page as a notebook: {{download}}`{name}.ipynb <../notebooks/{name}.ipynb>`"
    return page(definitions(facts), download).strip()


def _guides(cards: list[GuideCard]) -> Iterator[str]:
    """Yield links: families under their sources, then the guides that stand alone."""
    for source in dict.fromkeys(card.source for card in cards):
        members = [card for card in cards if card.source == source]
        if source == "exact":
            yield "[`exact`](../guides.md)"
        elif source == "global":
            yield from (f"[`{card.name}`](../guides/autoguides/{card.name}.ipynb)" for card in members)
        else:
            of_families = [card for card in members if card.name != card.family]
            families = ", ".join(f"[`{card.family}`](../guides/families/{card.family}.ipynb)" for card in of_families)
            if families:
                yield f"[`{source}`](../guides/sources/{source}.ipynb) with {families}"
            yield from (f"[`{c.name}`](../guides/whole/{c.name}.ipynb)" for c in members if c not in of_families)
