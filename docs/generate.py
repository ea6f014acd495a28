"""Pages that say what the zoo holds, made from its registries, so that an entry needs no second home in the docs."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import typer

import elbozoo as ez
from elbozoo.api import guide_overview
from elbozoo.cli import app
from elbozoo.guides.autoguides import AUTOGUIDES
from elbozoo.guides.families import FAMILIES
from elbozoo.guides.local import ExactGuide
from elbozoo.guides.registry import WHOLE_GUIDES
from elbozoo.guides.sources import SOURCES
from elbozoo.inference.comparison import ROW
from elbozoo.inference.em import EMOptions
from elbozoo.inference.method import SCHEMA_TITLES, SPECIAL, default_methods, method_names
from elbozoo.inference.monte_carlo_em import MonteCarloEMOptions
from elbozoo.inference.objectives import OBJECTIVES
from elbozoo.models import Entry, capabilities, entry_names, get_entry
from elbozoo.pages import attributes_table, code_block, markdown_table, options_table, page_parts

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
JSON_FIELDS = {
    "method": "name by which the method was asked for",
    "guide": "canonical name of the guide that the figures are about",
    "seed": "seed of the fit",
    "elbo": "ELBO at β = 1; null for a q without a density",
    "elbo_se": "its Monte Carlo standard error; 0 where nothing was drawn",
    "log_evidence": "log p(x) at the θ of the fit",
    "log_evidence_se": "its error: 0 if exact, an upper estimate if by quadrature, a standard error if estimated",
    "log_evidence_kind": "`exact`, `quadrature` or `estimate`",
    "gap": "`log_evidence - elbo`",
    "approximation_gap": "from log p(x) down to the best member of the family",
    "amortization_gap": "from there down to the ELBO",
    "learning_gap": "from the best log p(x) known on these rows down to this one",
    "kl": "KL(q ‖ posterior), found without the evidence; null where the posterior is not known",
    "khat_max": "largest Pareto k-hat of a datum; above 0.7 importance weights cannot correct q",
    "seconds": "wall-clock time of the fit, its evaluation left out",
    "steps": "gradient steps or EM iterations",
    "parameters": "number of parameters that were fitted, of model and guide",
    "converged": "whether the convergence test was met",
}


def write_pages(folder: Path) -> None:
    """Write every generated page under ``folder``; pages that have not changed keep their date, others go."""
    pages = {
        "zoo.md": _zoo(),
        **{f"models/{name}.md": _model(name) for name in entry_names()},
        "guides.md": _guides(),
        "methods.md": _methods(),
        "datasets.md": _datasets(),
        "commands.inc": _commands(),
        "json.inc": _json(),
        "benchmarks.inc": _benchmarks(BENCHMARKS),
    }
    for stale in {path for path in folder.rglob("*") if path.is_file()} - {folder / name for name in pages}:
        stale.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _page(*blocks: str) -> str:
    return "\n\n".join(block for block in blocks if block) + "\n"


def _frame_table(frame: pd.DataFrame, columns: Iterable[str]) -> str:
    plain = frame.reset_index()[list(columns)]
    return markdown_table(plain.columns, plain.to_numpy().tolist())


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _first_paragraph(documented: Any) -> str:
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())


# ---- models ----------------------------------------------------------------------------------------------------------


def _zoo() -> str:
    table = ez.list_models()
    rows = [
        [f"[{entry.summary}](models/{name}.md)", f"`{name}`", entry.latent, entry.capabilities]
        for name, entry in zip(table.index, table.itertuples(), strict=True)
    ]
    toctree = "\n".join(["```{toctree}", ":hidden:", "", *(f"models/{name}" for name in table.index), "```"])
    return _page(
        "# The zoo",
        "Each entry is a generative program with what is known about it. Its capabilities are not declared: they "
        "follow from the methods that the entry has. See [capabilities](../concepts.md#capabilities).",
        markdown_table(["entry", "name", "latent", "capabilities"], rows),
        toctree,
    )


def _model(name: str) -> str:
    entry, cls = get_entry(name).example(), get_entry(name)
    parts = page_parts(cls.page())
    return _page(
        f"# {parts.title}",
        _card(name, entry),
        parts.story,
        "## The program",
        code_block(textwrap.dedent(inspect.getsource(cls.forward)).strip(), "python"),
        attributes_table(cls),
        *(["## Options", options_table(cls.Options)] if cls.Options.model_fields else []),
        *(["## What goes wrong", parts.failures] if parts.failures else []),
        "## Try it",
        code_block(f"elbozoo tutorial {name} --out {name}.ipynb\nelbozoo compare {name} --data simulate:{name}", "sh"),
        *(["## References", parts.references] if parts.references else []),
    )


def _card(name: str, entry: Entry) -> str:
    guides = [guide for guide in method_names(entry) if guide not in SPECIAL]
    facts = {
        "name": f"`{name}`",
        "capabilities": ", ".join(capabilities(entry)),
        "compared by default": _names(default_methods(entry)),
        "guides that fit": _names(guides),
    }
    return "\n\n".join(f"{fact}\n: {value}" for fact, value in facts.items())


# ---- guides and methods ----------------------------------------------------------------------------------------------


def _guides() -> str:
    families = [[f"`{name}`", _first_paragraph(family)] for name, family in FAMILIES.items()]
    sources = [[f"`{name}`", _first_paragraph(source)] for name, source in SOURCES.items()]
    table = guide_overview().itertuples()
    rows = [[f"`{g.Index}`", f"`{g.family}`", f"`{g.source}`", _names(g.models.split(", "))] for g in table]
    return _page(
        "# Guides",
        "A guide is a *family* of distributions fed by a *source* of its parameters. The approximation gap belongs to "
        "the family, the amortization gap to the source. `mean-field` and `amortized` alone mean the family that suits "
        "the latent.",
        "## Families",
        markdown_table(["family", "what it is"], families),
        "## Sources",
        markdown_table(["source", "where the parameters of each datum's q come from"], sources),
        f"`exact`: {_first_paragraph(ExactGuide)}",
        "## All sites together",
        "Guides that are no product of one family, for programs whose latents depend on each other:",
        markdown_table(["guide", "what it is"], [[f"`{g.NAME}`", _first_paragraph(g)] for g in WHOLE_GUIDES]),
        "## Global latents",
        f"`global`: one latent for the whole data set takes one of Pyro's automatic guides, {_names(AUTOGUIDES)}.",
        "## Which guide fits which model",
        "A pair that makes no sense is refused with the reason, which `elbozoo guides MODEL` shows.",
        markdown_table(["guide", "family", "source", "models"], rows),
    )


def _methods() -> str:
    rows = [
        ["`em`", "expectation maximisation, in closed form where the entry has it, otherwise with Monte Carlo draws"],
        ["`closed-form`", "the global maximum of the likelihood, where it is known; the exact posterior without θ"],
        ["`cavi`", "coordinate ascent on a mean-field q, each factor set in turn to its optimum"],
        ["`nuts`", "the reference posterior of global latents: Pyro's NUTS, with r-hat, ESS and divergences"],
        ["a guide's name", "stochastic variational inference with this guide"],
    ]
    examples = {name: get_entry(name).example() for name in entry_names()}
    applies = [
        [f"[{name}](models/{name}.md)", *_marks(entry, *SPECIAL), _names(default_methods(entry))]
        for name, entry in examples.items()
    ]
    objectives = [[f"`{name}`", objective.meaning] for name, objective in OBJECTIVES.items()]
    explained = {EMOptions: "For entries with both steps in closed form.", MonteCarloEMOptions: "For the others."}
    options = [
        block
        for schema, title in SCHEMA_TITLES.items()
        for block in (f"### {title}", explained.get(schema, ""), options_table(schema))
    ]
    return _page(
        "# Methods",
        "A method turns a model, data, options and a seed into a fit.",
        markdown_table(["method", "what it does"], rows),
        "## Which method applies to which model",
        markdown_table(["model", *SPECIAL, "compared by default"], applies),
        "## Objectives",
        "What stochastic variational inference maximises. `objective=auto` takes `elbo-enumerated` for a discrete "
        "latent and `elbo` for any other. The ELBO that is reported is evaluated afresh, whatever was maximised.",
        markdown_table(["objective", "how the expectation under q is taken"], objectives),
        "## Options",
        "Every option has one name wherever it is read: `--set NAME=VALUE` on the command line, a keyword in Python.",
        *options,
    )


def _marks(entry: Entry, *methods: str) -> list[str]:
    found = method_names(entry)
    return ["yes" if method in found else "" for method in methods]


# ---- data and command line -------------------------------------------------------------------------------------------


def _datasets() -> str:
    return _page(
        "# Data sets",
        "Beside these names, data may be `simulate:MODEL`, which draws from an entry, the path of a CSV or Parquet "
        "file with a header or of a NPY or NPZ file, or in Python a DataFrame, an array or a tensor.",
        _frame_table(ez.list_datasets(), ["name", "rows", "columns", "kind", "description", "source"]),
    )


def _commands() -> str:
    group: Any = typer.main.get_command(app)
    blocks = []
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        usage = " ".join(["elbozoo", name, *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]"])
        rows = [[f"`{_spelling(p)}`", p.help or "", "yes" if p.required else ""] for p in shown]
        summary = (command.help or "").partition("\n")[0]
        table = markdown_table(["argument or option", "meaning", "required"], rows)
        blocks += [f"## {name}", summary, code_block(usage, "text"), table]
    return _page(*blocks)


def _spelling(parameter: Any) -> str:
    value = str(parameter.metavar or parameter.name.upper())
    if parameter.param_type_name == "argument":
        return value
    return ", ".join(parameter.opts) + ("" if parameter.is_flag else f" {value}")


def _json() -> str:
    example = ez.compare("ppca", "iris", methods=["closed-form"], seeds=1, progress=False).document()
    return _page(
        markdown_table(["field of a row", "meaning"], [[f"`{name}`", JSON_FIELDS[name]] for name in ROW]),
        "What `elbozoo compare ppca --data iris --methods closed-form --seeds 1 --json` prints:",
        code_block(json.dumps(example, indent=2), "json"),
    )


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def _benchmarks(folder: Path) -> str:
    scripts = sorted(folder.glob("bench_*.py"))
    return _page(*(block for script in scripts for block in _benchmark(script, folder / "results")))


def _benchmark(script: Path, results: Path) -> list[str]:
    """Return the part about one script: what it says of itself, then what was measured, by machine."""
    summary, _, story = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n\n")
    name = script.stem.removeprefix("bench_").replace("_", "-")
    document = results / f"{name}.json"
    head = [f"## `{name}`", *(" ".join(text.replace("``", "`").split()) for text in (summary, story))]
    if not document.exists():
        return [*head, f"Not measured yet: `python benchmarks/{script.name}` does."]
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in _largest(json.loads(document.read_text(encoding="utf-8"))["records"]):
        groups.setdefault(_machine(record), []).append(record)
    return [*head, *(block for where, records in groups.items() for block in (where, _ratios(records)))]


def _largest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what was measured at the small size on a machine where the full one was, too."""
    full = {_machine(record) for record in records if record["size"] == "full"}
    return [record for record in records if record["size"] == "full" or _machine(record) not in full]


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = "" if machine["device"] == "cpu" else f", {machine['device']}"
    cores = f"{machine['threads']} of {machine['cores']} cores, {machine['ram_gib']:g} GiB"
    return f"{machine['cpu']}{where}, {cores}, {machine['system']}:"


def _ratios(records: list[dict[str, Any]]) -> str:
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
