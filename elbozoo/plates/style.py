"""Colours and words that plate diagrams share, whoever draws them."""

from __future__ import annotations

from elbozoo.notation.structure import PARAMETER, Node
from elbozoo.notation.symbols import symbol_of

INK, FAINT, SHADE = "#222222", "#5A5A5A", "#D0D4D8"


def small_print(node: Node) -> list[str]:
    """Return the lines below the symbol of ``node``: its distribution, behind its name where that is not the symbol."""
    is_word = node.kind != PARAMETER and not node.symbol.startswith(symbol_of(node.name, words=False))
    law = " ~ ".join(part for part in (node.name if is_word else "", node.distribution) if part)
    return [line for line in (law, node.note) if line]
