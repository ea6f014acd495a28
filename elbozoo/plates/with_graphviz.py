"""Plate diagrams laid out by Graphviz."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING
from urllib.parse import quote

from elbozoo.notation.structure import DETERMINISTIC, GIVEN, LATENT, OBSERVED, PARAMETER, PARTLY, Node, Structure
from elbozoo.notation.symbols import as_cells
from elbozoo.plates.style import FAINT, INK, SHADE, small_print

if TYPE_CHECKING:
    import graphviz  # type: ignore[import-untyped]

FONT = "Helvetica,Arial,sans-serif"
_LOOKS = {
    LATENT: {"fillcolor": "white"},
    OBSERVED: {"fillcolor": SHADE},
    PARTLY: {"fillcolor": f"white;0.5:{SHADE}", "gradientangle": "270"},
    DETERMINISTIC: {"fillcolor": "white", "style": "filled,dashed"},
    GIVEN: {"fillcolor": SHADE, "shape": "box", "margin": "0.1,0.05"},
}


def digraph(structure: Structure) -> graphviz.Digraph:
    """Return ``structure`` as a graph of Graphviz, white behind it so that it reads in dark mode too."""
    import graphviz

    graph = graphviz.Digraph(
        graph_attr={"bgcolor": "white", "pad": "0.15", "nodesep": "0.35", "ranksep": "0.45", "fontname": FONT},
        node_attr={"fontname": FONT, "fontcolor": INK, "color": INK, "penwidth": "1.1", "margin": "0.01,0"},
        edge_attr={"color": INK, "penwidth": "1.1", "arrowsize": "0.75"},
    )
    _fill(graph, structure, None)
    for source, target in structure.edges:
        is_parameter = structure.nodes[source].kind == PARAMETER
        graph.edge(_id(source), _id(target), **({"tailport": "s", "tailclip": "false"} if is_parameter else {}))
    return graph


def _fill(graph: graphviz.Digraph, structure: Structure, plate: str | None) -> None:
    """Put what stands in ``plate`` itself into ``graph``, then the plates in it, each with what is in them."""
    for node in structure.nodes.values():
        if node.plate == plate:
            _add(graph, node)
    for inner in structure.plates.values():
        if inner.parent == plate:
            with graph.subgraph(name=f"cluster_{inner.name}") as box:
                box.attr(
                    label=inner.label, labeljust="r", labelloc="b", fontsize="10", fontcolor=FAINT, color=FAINT,
                    style="rounded", margin="12",
                )  # fmt: skip
                _fill(box, structure, inner.name)


def _add(graph: graphviz.Digraph, node: Node) -> None:
    symbol = as_cells(node.symbol)
    if node.kind == PARAMETER:
        graph.node(_id(node.name), label=_stack([symbol, '<FONT POINT-SIZE="7">●</FONT>']), shape="plain")
        return
    lines = [f'<FONT POINT-SIZE="9" COLOR="{FAINT}">{escape(line)}</FONT>' for line in small_print(node)]
    looks = {"shape": "ellipse", "style": "filled", **_LOOKS[node.kind]}
    graph.node(_id(node.name), label=_stack([symbol, *lines]), **looks)


def _stack(cells: list[str]) -> str:
    """Return cells below each other."""
    rows = "".join(f"<TR><TD>{cell}</TD></TR>" for cell in cells)
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0">{rows}</TABLE>>'


def _id(name: str) -> str:
    # To Graphviz what follows a colon is a port.
    return quote(name, safe="")
