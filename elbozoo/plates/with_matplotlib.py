"""Plate diagrams drawn by matplotlib alone, for machines without Graphviz."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from matplotlib.textpath import TextPath

from elbozoo.notation.structure import DETERMINISTIC, GIVEN, OBSERVED, PARAMETER, PARTLY, Node, Structure
from elbozoo.plates.layout import Box, Layout, lay_out
from elbozoo.plates.style import FAINT, INK, SHADE, small_print
from elbozoo.plots import Floats, Picture

SYMBOL, PRINT = 14.0, 8.0  # points
MATH = "stix"
LINE = 0.155  # inches from one line of small print to the next
HEAD = 0.30  # inches for the symbol
MARGIN = 0.15
DOT = 0.035  # radius of a parameter's dot, inches
BENDS = tuple(side * bend / 100 for bend in range(0, 100, 10) for side in (1, -1))


def draw(structure: Structure) -> Picture:
    """Draw ``structure``; artists have the ids ``node NAME``, ``edge SOURCE TARGET`` and ``plate NAME``."""
    layout = lay_out(structure, _sizes(structure), {p.name: _width(p.label, PRINT) for p in structure.plates.values()})
    bends = {edge: _bend(*edge, structure, layout) for edge in structure.edges}
    ends = {edge: [_anchor(structure.nodes[name], layout) for name in edge] for edge in structure.edges}
    left, bottom, right, top = _extent(layout, [_curve(ends[edge], bends[edge]) for edge in structure.edges])
    width, height = right - left + 2 * MARGIN, top - bottom + 2 * MARGIN
    picture = Picture(figsize=(width, height), facecolor="white")
    ax = picture.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set_xlim(left - MARGIN, right + MARGIN)
    ax.set_ylim(bottom - MARGIN, top + MARGIN)
    _draw_plates(ax, structure, layout)
    shapes = {node.name: _draw_node(ax, node, layout) for node in structure.nodes.values()}
    for source, target in structure.edges:
        start, end = ends[source, target]
        arrow = FancyArrowPatch(
            tuple(start), tuple(end), connectionstyle=f"arc3,rad={bends[source, target]}",
            patchA=shapes[source], patchB=shapes[target], shrinkA=0, shrinkB=0,
            gid=f"edge {source} {target}", arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.1, zorder=2,
        )  # fmt: skip
        ax.add_patch(arrow)
    return picture


def _sizes(structure: Structure) -> dict[str, tuple[float, float]]:
    return {node.name: _size(node) for node in structure.nodes.values()}


def _size(node: Node) -> tuple[float, float]:
    symbol, lines = _width(f"${node.symbol}$", SYMBOL), small_print(node)
    if node.kind == PARAMETER:
        return symbol + 4 * DOT, HEAD
    height = HEAD + LINE * len(lines) + 0.2
    if node.kind == GIVEN:
        return max(symbol, *[_width(line, PRINT) for line in lines]) + 0.2, height
    top = LINE * len(lines) / 2
    bottoms = [HEAD / 2 - top, *[HEAD / 2 + LINE * (place + 1) - top for place in range(len(lines))]]
    widths = [symbol, *[_width(line, PRINT) for line in lines]]
    # The ellipse goes round the lower corners of each line.
    around = [(w + 0.08) / (1 - (2 * y / height) ** 2) ** 0.5 for w, y in zip(widths, bottoms, strict=True)]
    return max(height, *around), height


def _width(text: str, size: float) -> float:
    """Width of ``text`` in inches."""
    properties = FontProperties(size=size, math_fontfamily=MATH)
    return float(TextPath((0, 0), text, prop=properties).get_extents().width) / 72


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _draw_plates(ax: Axes, structure: Structure, layout: Layout) -> None:
    for plate in structure.plates.values():
        box = layout.plates[plate.name]
        left, bottom = box.x - box.width / 2, box.y - box.height / 2
        frame = FancyBboxPatch(
            (left + 0.08, bottom + 0.08), box.width - 0.16, box.height - 0.16, boxstyle="round,pad=0.08",
            facecolor="none", edgecolor=FAINT, linewidth=1.0, gid=f"plate {plate.name}", zorder=1,
        )  # fmt: skip
        ax.add_patch(frame)
        words: dict[str, Any] = {"size": PRINT, "color": FAINT, "ha": "right", "va": "bottom", "parse_math": False}
        ax.text(left + box.width - 0.1, bottom + 0.07, plate.label, **words)


def _draw_node(ax: Axes, node: Node, layout: Layout) -> Patch:
    box = layout.nodes[node.name]
    if node.kind == PARAMETER:
        return _draw_parameter(ax, node, layout)
    lines = small_print(node)
    shape = _shape(node, box)
    ax.add_patch(shape)
    if node.kind == PARTLY:
        half = Ellipse((box.x, box.y), box.width, box.height, facecolor=SHADE, zorder=3)
        ax.add_patch(half)
        half.set_clip_path(
            Rectangle((box.x - box.width, box.y - box.height), 2 * box.width, box.height, transform=ax.transData)
        )
    top = box.y + LINE * len(lines) / 2
    _write(ax, box.x, top, f"${node.symbol}$", SYMBOL, INK)
    for place, line in enumerate(lines):
        _write(ax, box.x, top - HEAD / 2 - LINE * (place + 0.5), line, PRINT, FAINT)
    return shape


def _shape(node: Node, box: Box) -> Patch:
    looks: dict[str, Any] = {
        "facecolor": SHADE if node.kind in (OBSERVED, GIVEN) else "white",
        "edgecolor": INK,
        "linewidth": 1.1,
        "linestyle": (0, (4, 2.5)) if node.kind == DETERMINISTIC else "solid",
        "zorder": 3,
        "gid": f"node {node.name}",
    }
    if node.kind == GIVEN:
        return Rectangle((box.x - box.width / 2, box.y - box.height / 2), box.width, box.height, **looks)
    return Ellipse((box.x, box.y), box.width, box.height, **looks)


def _draw_parameter(ax: Axes, node: Node, layout: Layout) -> Patch:
    x, y = _anchor(node, layout)
    dot = Ellipse((x, y), 2 * DOT, 2 * DOT, facecolor=INK, edgecolor=INK, zorder=3, gid=f"node {node.name}")
    ax.add_patch(dot)
    side, ha = (1, "left") if layout.nodes[node.name].x > 0 else (-1, "right")
    _write(ax, x + side * 3 * DOT, y, f"${node.symbol}$", SYMBOL - 1, INK, ha)
    return dot


def _write(ax: Axes, x: float, y: float, text: str, size: float, colour: str, ha: str = "center") -> None:
    is_math = text.startswith("$")
    ax.text(
        x, y, text, size=size, color=colour, ha=ha, va="center_baseline" if is_math else "center", zorder=4,
        math_fontfamily=MATH, parse_math=is_math,
    )  # fmt: skip


# ---- edges -----------------------------------------------------------------------------------------------------------


def _bend(source: str, target: str, structure: Structure, layout: Layout) -> float:
    """Return the least bend of a curve that runs through the fewest other nodes."""
    ends = [_anchor(structure.nodes[name], layout) for name in (source, target)]
    others = [
        layout.nodes[name]
        for name, node in structure.nodes.items()
        if name not in (source, target) and node.kind != PARAMETER
    ]
    return min(BENDS, key=lambda bend: _crossed(_curve(ends, bend), others))


def _anchor(node: Node, layout: Layout) -> Floats:
    """Return where edges of ``node`` begin and end: its centre, of a parameter its dot's."""
    box = layout.nodes[node.name]
    side = 1 if box.x > 0 else -1
    return np.array([box.x - side * (box.width / 2 - DOT) if node.kind == PARAMETER else box.x, box.y])


def _curve(ends: list[Floats], bend: float) -> Floats:
    """Return points of the quadratic curve that matplotlib draws for ``arc3``, its control point off the middle."""
    start, end = ends
    control = (start + end) / 2 + bend * np.array([1, -1]) * (end - start)[::-1]
    t = np.linspace(0, 1, 60)[:, None]
    points: Floats = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    return points


def _extent(layout: Layout, curves: list[Floats]) -> tuple[float, float, float, float]:
    left, bottom, right, top = layout.extent()
    points = np.concatenate([[(left, bottom), (right, top)], *curves])
    (left, bottom), (right, top) = points.min(0), points.max(0)
    return left, bottom, right, top


def _crossed(points: Floats, boxes: list[Box]) -> int:
    """Return how many of the ellipses in ``boxes``, with some room, the points run through."""
    room = 0.05
    inside = [
        ((points[:, 0] - box.x) / (box.width / 2 + room)) ** 2 + ((points[:, 1] - box.y) / (box.height / 2 + room)) ** 2
        < 1
        for box in boxes
    ]
    return sum(bool(points.any()) for points in inside)
