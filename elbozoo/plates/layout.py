"""Where the parts of a plate diagram stand when Graphviz is not there to say it, in inches.

What stands in a plate is laid in layers, causes above effects (Sugiyama et al. 1981, "Methods for visual understanding
of hierarchical system structures"); a plate with what is in it is one part of the layer of the plate around it.
Parameters stand beside the plates, at the height of what they act on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from elbozoo.notation.structure import GIVEN, PARAMETER, Node, Structure

GAP, ROW_GAP, PADDING, LABEL = 0.3, 0.42, 0.2, 0.2
SIDE_GAP, SPACING = 0.5, 0.42
SWEEPS = 8
MOST_ON_ONE_SIDE, OFF_CENTRE = 3, 0.2


class Box(NamedTuple):
    """A rectangle: its centre, width and height."""

    x: float
    y: float
    width: float
    height: float

    def moved(self, dx: float, dy: float) -> Box:
        """Return the box moved by (dx, dy)."""
        return self._replace(x=self.x + dx, y=self.y + dy)


@dataclass
class Layout:
    """Boxes of nodes and plates by name; y grows upwards."""

    nodes: dict[str, Box]
    plates: dict[str, Box]

    def moved(self, dx: float, dy: float) -> Layout:
        """Return everything moved by (dx, dy)."""
        return Layout(*[{name: box.moved(dx, dy) for name, box in part.items()} for part in (self.nodes, self.plates)])

    def with_(self, other: Layout) -> Layout:
        """Return the parts of both."""
        return Layout({**self.nodes, **other.nodes}, {**self.plates, **other.plates})

    def extent(self) -> tuple[float, float, float, float]:
        """Return left, bottom, right and top of everything."""
        boxes = [*self.nodes.values(), *self.plates.values()]
        return (
            min(box.x - box.width / 2 for box in boxes),
            min(box.y - box.height / 2 for box in boxes),
            max(box.x + box.width / 2 for box in boxes),
            max(box.y + box.height / 2 for box in boxes),
        )


def lay_out(structure: Structure, sizes: Mapping[str, tuple[float, float]], labels: Mapping[str, float]) -> Layout:
    """Return where the parts of ``structure`` stand.

    Parameters
    ----------
    structure : Structure
        The graph.
    sizes : mapping of str to (float, float)
        Width and height of each node, inches; a parameter's are those of its dot and label together.
    labels : mapping of str to float
        Width of each plate's label, inches.
    """
    inside, _ = _of_plate(structure, None, sizes, labels)
    return inside.with_(Layout(_beside(structure, inside, sizes), {}))


# ---- one plate -------------------------------------------------------------------------------------------------------


def _of_plate(
    structure: Structure, plate: str | None, sizes: Mapping[str, tuple[float, float]], labels: Mapping[str, float]
) -> tuple[Layout, tuple[float, float]]:
    """Return what is in ``plate``, about the origin, and the width and height that it takes."""
    parts = {node.name: Layout({node.name: Box(0, 0, *sizes[node.name])}, {}) for node in _nodes_in(structure, plate)}
    for inner in structure.plates.values():
        if inner.parent == plate:
            content, (width, height) = _of_plate(structure, inner.name, sizes, labels)
            width, height = max(width, labels[inner.name]) + 2 * PADDING, height + 2 * PADDING + LABEL
            frame = Layout({}, {inner.name: Box(0, 0, width, height)})
            parts[f"plate {inner.name}"] = frame.with_(content.moved(0, LABEL / 2))
    rows = _rows(list(parts), _edges_between(structure, plate, list(parts)), _given(structure))
    return _stacked([_in_line([parts[name] for name in row]) for row in rows], structure.edges)


def _nodes_in(structure: Structure, plate: str | None) -> list[Node]:
    return [node for node in structure.nodes.values() if node.plate == plate and node.kind != PARAMETER]


def _given(structure: Structure) -> set[str]:
    return {node.name for node in structure.nodes.values() if node.kind == GIVEN}


def _in_line(parts: list[Layout]) -> Layout:
    """Return the parts of a row beside each other about the origin; nodes beside a plate are level with its top."""
    extents = [part.extent() for part in parts]
    width = sum(right - left for left, _, right, _ in extents) + GAP * (len(parts) - 1)
    highest = max(top - bottom for _, bottom, _, top in extents) if any(part.plates for part in parts) else None
    row, x = Layout({}, {}), -width / 2
    for part, (left, _, right, top) in zip(parts, extents, strict=True):
        row = row.with_(part.moved(x - left, 0.0 if highest is None else highest / 2 - top))
        x += right - left + GAP
    return row


def _stacked(rows: list[Layout], edges: list[tuple[str, str]]) -> tuple[Layout, tuple[float, float]]:
    """Return the rows below each other, each moved to where its edges to the others are steep, about the origin."""
    offsets = [0.0] * len(rows)
    for _ in range(SWEEPS):
        for place, row in enumerate(rows):
            slants = _slants(place, rows, offsets, edges)
            # The widest row stays, or all of them would drift.
            if slants and row is not max(rows, key=_width_of):
                offsets[place] += fmean(slants)
    placed, y = Layout({}, {}), 0.0
    for row, offset in zip(rows, offsets, strict=True):
        _, bottom, _, top = row.extent()
        placed = placed.with_(row.moved(offset, y - top))
        y -= top - bottom + ROW_GAP
    left, bottom, right, top = placed.extent()
    return placed.moved(-(left + right) / 2, -(bottom + top) / 2), (right - left, top - bottom)


def _slants(place: int, rows: list[Layout], offsets: list[float], edges: list[tuple[str, str]]) -> list[float]:
    x = {name: box.x + offset for row, offset in zip(rows, offsets, strict=True) for name, box in row.nodes.items()}
    own = rows[place].nodes
    pairs = [(a, b) if a in own else (b, a) for a, b in edges if a in x and b in x and (a in own) != (b in own)]
    return [x[other] - x[mine] for mine, other in pairs]


def _width_of(row: Layout) -> float:
    left, _, right, _ = row.extent()
    return right - left


def _edges_between(structure: Structure, plate: str | None, parts: list[str]) -> set[tuple[str, str]]:
    """Return the edges between the parts of ``plate``, those from and to what is in an inner plate as the plate's."""
    owner = {name: _part_of(structure, name, plate) for name in structure.nodes}
    ends = {(owner[source], owner[target]) for source, target in structure.edges}
    return {(a, b) for a, b in ends if a in parts and b in parts and a != b}


def _part_of(structure: Structure, name: str, plate: str | None) -> str | None:
    """Return the part of ``plate`` in which the node ``name`` stands, None if it stands outside."""
    part, around = name, structure.nodes[name].plate
    while around != plate:
        if around is None:
            return None
        part, around = f"plate {around}", structure.plates[around].parent
    return part


# ---- layers ----------------------------------------------------------------------------------------------------------


def _rows(parts: list[str], edges: set[tuple[str, str]], given: set[str]) -> list[list[str]]:
    ranks = _ranks(parts, {(source, target) for source, target in edges if source not in given})
    # What is given stands beside what it is given for, out of the way of what comes from above.
    ranks |= {source: ranks[target] for source, target in edges if source in given}
    rows: list[list[str]] = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
    for part in parts:
        rows[ranks[part]].append(part)
    neighbours = {part: [b for a, b in edges if a == part] + [a for a, b in edges if b == part] for part in parts}
    for _ in range(SWEEPS):
        places = {part: place - (len(row) - 1) / 2 for row in rows for place, part in enumerate(row)}
        for row in rows:
            row.sort(key=lambda part: fmean([places[other] for other in neighbours[part]] or [places[part]]))
    return rows


def _ranks(parts: list[str], edges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Return the layer of each part: behind all its causes, and right before its first effect if it has no cause."""
    order = {part: place for place, part in enumerate(parts)}
    # A plate that is both before and after another part makes a circle, which is cut where the program's order says.
    forward = sorted(edges, key=lambda edge: (order[edge[0]], order[edge[1]]))
    ranks = dict.fromkeys(parts, 0)
    for _ in parts:
        for source, target in forward:
            ranks[target] = min(max(ranks[target], ranks[source] + 1), len(parts) - 1)
    for part in parts:
        effects = [ranks[target] for source, target in forward if source == part]
        if effects and not any(target == part for _, target in forward):
            ranks[part] = max(min(effects) - 1, 0)
    used = sorted(set(ranks.values()))
    return {part: used.index(rank) for part, rank in ranks.items()}


# ---- parameters ------------------------------------------------------------------------------------------------------


def _beside(structure: Structure, inside: Layout, sizes: Mapping[str, tuple[float, float]]) -> dict[str, Box]:
    """Stack the parameters at the side of their effects and at their height; many in the middle go to both sides."""
    names = [node.name for node in structure.nodes.values() if node.kind == PARAMETER]
    effects = {n: [inside.nodes[target] for source, target in structure.edges if source == n] for n in names}
    left, _, right, _ = inside.extent()
    aside = {n: fmean(box.x for box in boxes) - (left + right) / 2 for n, boxes in effects.items()}
    central = [n for n in names if abs(aside[n]) < OFF_CENTRE]
    to_left = {n for n in names if aside[n] <= -OFF_CENTRE}
    to_left |= set(central[1::2]) if len(central) > MOST_ON_ONE_SIDE else set()
    boxes = {}
    for side, edge in ((1, right + SIDE_GAP), (-1, left - SIDE_GAP)):
        heights = {n: fmean(box.y for box in effects[n]) for n in names if (n in to_left) == (side == -1)}
        stack = sorted(heights, key=lambda n: -heights[n])
        for name, y in zip(stack, _spread([heights[n] for n in stack]), strict=True):
            width, height = sizes[name]
            boxes[name] = Box(edge + side * width / 2, y, width, height)
    return boxes


def _spread(heights: list[float]) -> list[float]:
    """Return heights, falling, at least ``SPACING`` apart and with the same mean in each cluster."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and _bottom(clusters[-2]) - SPACING < _top(clusters[-1]):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [_top(cluster) - SPACING * place for cluster in clusters for place in range(len(cluster))]


def _top(cluster: list[float]) -> float:
    return fmean(cluster) + SPACING * (len(cluster) - 1) / 2


def _bottom(cluster: list[float]) -> float:
    return fmean(cluster) - SPACING * (len(cluster) - 1) / 2
