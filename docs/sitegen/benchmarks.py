"""Tables and pictures of what was measured, from the records that the benchmarks leave."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from elbozoo import plots
from elbozoo.pages import markdown_table
from sitegen.markdown import page

Record = dict[str, Any]
WIDTH, HEAD, ROW = 6.4, 1.25, 0.62  # inches of a picture, of all but its rows, and of a row


def page_and_pictures(folder: Path) -> tuple[str, dict[str, bytes]]:
    """Return the part of the page about every benchmark script in ``folder``, and its pictures by file name."""
    blocks, pictures = [], {}
    for script in sorted(folder.glob("bench_*.py")):
        text, found = _benchmark(script, folder / "results")
        blocks += text
        pictures |= found
    return page(*blocks), pictures


def _benchmark(script: Path, results: Path) -> tuple[list[str], dict[str, bytes]]:
    """Return what a script says of itself, then what was measured, by machine, as pictures and tables."""
    summary, _, story = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n\n")
    name = script.stem.removeprefix("bench_").replace("_", "-")
    document = results / f"{name}.json"
    head = [f"## `{name}`", *(" ".join(text.replace("``", "`").split()) for text in (summary, story))]
    if not document.exists():
        return [*head, f"Not measured yet: `python benchmarks/{script.name}` does."], {}
    pictures = {}
    for position, (where, records) in enumerate(by_machine(document)):
        file = f"{name}-{position + 1}.png"
        pictures[f"benchmarks/{file}"] = plots.png(picture(records))
        head += [_figure(f"_generated/benchmarks/{file}", name, where, records), table(records)]
    return head, pictures


def by_machine(document: Path) -> Iterator[tuple[str, list[Record]]]:
    """Yield the machine and its records, without those at the small size where the full one was measured, too."""
    records: list[Record] = json.loads(document.read_text(encoding="utf-8"))["records"]
    full = {_machine(record) for record in records if record["size"] == "full"}
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["size"] == "full" or _machine(record) not in full:
            groups.setdefault(_machine(record), []).append(record)
    yield from groups.items()


def _machine(record: Record) -> str:
    machine = record["machine"]
    where = "" if machine["device"] == "cpu" else f", {machine['device']}"
    cores = f"{machine['threads']} of {machine['cores']} cores, {machine['ram_gib']:g} GiB"
    return f"{machine['cpu']}{where}, {cores}, {machine['system']}"


# ---- pictures --------------------------------------------------------------------------------------------------------


def picture(records: list[Record]) -> Figure:
    """Draw the ratio of each contest with its range on a logarithmic axis, our own cost at one, and the targets."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(WIDTH, HEAD + ROW * len(records)), layout="constrained")
        axes = figure.add_subplot()
        for height, record in enumerate(reversed(records)):
            _draw(axes, height, record)
        axes.axvline(1, color=plots.INK, linewidth=1.2, label="ours = 1")
        axes.set_xscale("log")
        axes.set(yticks=[], ylim=(-0.6, len(records) - 0.4), xlabel="cost of the other side / ours")
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axes.set_xlim(*_limits(records))
        figure.legend(*_once(axes), loc="outside lower center", ncols=4, columnspacing=1.2, handlelength=1.4)
    return figure


def _draw(axes: Any, height: int, record: Record) -> None:
    low, high = record["ratio_range"]
    axes.plot(
        [low, high], [height, height], color=plots.PALETTE[0], linewidth=3, alpha=0.5, label="range over the turns"
    )
    axes.plot(record["ratio"], height, "o", color=plots.PALETTE[0], markersize=7, label="ratio of medians")
    if record["target"] is not None:
        axes.plot(
            [record["target"]] * 2, [height - 0.3, height + 0.3], color=plots.PALETTE[1], linewidth=2.5, label="target"
        )
    axes.annotate(
        f"{record['peer']}: {record['ratio']:.3g} times",
        (0, height + 0.3),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
    )


def _limits(records: list[Record]) -> tuple[float, float]:
    """Return limits that hold one, every range and every target, with room at the sides."""
    targets = [record["target"] for record in records if record["target"]]
    ends = [1.0, *targets, *(end for record in records for end in record["ratio_range"])]
    return min(ends) / 1.6, max(ends) * 1.6


def _once(axes: Any) -> tuple[list[Any], list[str]]:
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return list(handles.values()), list(handles)


def _figure(file: str, name: str, where: str, records: list[Record]) -> str:
    """Return the directive of a picture with its caption, and an alternative text that says the ratios."""
    ratios = "; ".join(f"{record['peer']}: {record['ratio']:.3g}" for record in records)
    return "\n".join(
        [
            f":::{{figure}} {file}",
            f":alt: Ratios of {name} on a logarithmic axis. {ratios}",
            ":width: 100%",
            "",
            f"{where}. Ratios above one: ours is the cheaper.",
            ":::",
        ]
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(records: list[Record]) -> str:
    """Return the records of one machine as a table."""
    rows = [
        [
            f"{record['peer']} ({record['versions'].get(record['packages'][0]) or '–'})",
            ", ".join(f"{name} {_plain(value)}" for name, value in record["sizes"].items()),
            f"{_quantity(record['median']['ours'], record['measure'])} a {record['unit']}",
            f"{record['ratio']:.2f} ({record['ratio_range'][0]:.2f} to {record['ratio_range'][1]:.2f})",
            "–" if record["target"] is None else f"{record['target']:.3g}",
            record["verdict"],
        ]
        for record in records
    ]
    return markdown_table(["beside", "size", "ours", "ratio (range)", "target", "verdict"], rows)


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _quantity(value: float, measure: str) -> str:
    if measure != "seconds":
        return f"{value:.3g} {measure}"
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "μs")) if value >= s), (1e-9, "ns"))
    return f"{value / scale:.3g} {unit}"
