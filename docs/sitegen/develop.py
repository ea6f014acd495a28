"""What the page for developers shows of the repository itself: its layers, and the contract that tests hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from elbozoo import plots
from elbozoo.pages import markdown_table
from sitegen.markdown import page

CONTRACTS = {
    "Entries": "tests/models/test_entry_contract.py",
    "Fits": "tests/inference/test_fit_contract.py",
}


class Clause(NamedTuple):
    """A clause of a contract: what must hold, as its test is called, and the reason or the tolerance that it states."""

    text: str
    reason: str


def contract(root: Path) -> str:
    """Return the clauses of the contracts, as the tests state them."""
    blocks = []
    for title, path in CONTRACTS.items():
        table = markdown_table(["what must hold", "why, and how closely"], clauses((root / path).read_text("utf-8")))
        blocks += [f"### {title}", f"In `{path}`:", table]
    return page(*blocks)


def clauses(source: str) -> Iterator[Clause]:
    """Yield the tests of a file that run over every entry, in order."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and _is_of_entries(node):
            sentence = node.name.removeprefix("test_").replace("_", " ")
            yield Clause(sentence[0].upper() + sentence[1:], " ".join((ast.get_docstring(node) or "").split()))


def _is_of_entries(node: ast.FunctionDef) -> bool:
    return any(argument.arg == "name" for argument in node.args.args)


LAYERS = (
    ("models/numerics", "pure tensor algebra"),
    ("models", "p(x, z): one file per entry"),
    ("guides", "q(z given x): families, sources, encoders"),
    ("inference", "fits, EM, evidence, ledger, comparison"),
    ("elbozoo", "API, command line, data, pictures, pages"),
)


def layers() -> bytes:
    """Return the layers as a PNG: each box imports from those below it."""
    figure = Figure(figsize=(5.2, 4.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(-0.5, len(LAYERS) - 0.5))
    axes.axis("off")
    for height, (name, what) in enumerate(LAYERS):
        box = FancyBboxPatch(
            (0.04, height - 0.27),
            0.92,
            0.54,
            boxstyle="round,pad=0.02",
            facecolor="#E8F1F8",
            edgecolor=plots.PALETTE[0],
        )
        axes.add_patch(box)
        axes.text(0.5, height + 0.11, f"{name}/", ha="center", va="center", fontweight="bold", color=plots.INK)
        axes.text(0.5, height - 0.13, what, ha="center", va="center", color=plots.INK)
        if height:
            arrow = {"arrowstyle": "-|>", "color": plots.FAINT}
            axes.annotate("", (0.5, height - 0.71), (0.5, height - 0.29), arrowprops=arrow)
    return plots.png(figure)
