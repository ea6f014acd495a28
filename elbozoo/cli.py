"""The command line: ``elbozoo models | guides | datasets | show | fit | compare | tutorial``.

Results go to standard output, progress and errors to standard error. Exit status: 0 done, 2 wrong usage
or data, 1 otherwise. Heavy libraries are imported inside the commands, so that help is immediate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from elbozoo.inference.comparison import Comparison

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="A zoo of latent-variable models on Pyro in which every bound is held against the exact log p(x).",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of an entry, as in 'elbozoo models'.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
Data = Annotated[
    str,
    typer.Option(
        "--data", "-d", metavar="D", help="Name of a data set, simulate:MODEL, or a CSV or Parquet file with a header."
    ),
]
Columns = Annotated[
    str | None, typer.Option("--columns", metavar="A,B", help="Columns of the file to use, separated by commas.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Option of the model, guide or method; repeatable. See 'elbozoo show'."
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Directory for what the run leaves behind.")
]

TABLE_WIDTH = 200
COMMAND_NAMES = ("model", "data", "methods", "seeds", "columns", "out", "progress")


def main() -> None:
    """Run the command line and end the process with its exit status."""
    try:
        app()
    except ArithmeticError as error:
        _stop(error, status=1)
    except ValueError as error:
        from elbozoo.models.contract.errors import InvalidInput

        if not isinstance(error, InvalidInput):
            raise
        _stop(error, status=2)


def _stop(error: Exception, status: int) -> None:
    typer.echo(f"elbozoo: {error}", err=True)
    raise SystemExit(status)


@app.command("models")
def models_command(as_json: Json = False) -> None:
    """List the models of the zoo with their capabilities."""
    from elbozoo.api import list_models

    _print_table(list_models(), as_json)


@app.command("guides")
def guides_command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Show which guides fit this model, and why others do not.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the guides, for one model or of all of them."""
    from elbozoo.api import guide_overview, list_guides

    _print_table(list_guides(model) if model else guide_overview(), as_json)


@app.command("datasets")
def datasets_command(as_json: Json = False) -> None:
    """List the data sets that come with the zoo."""
    from elbozoo.api import list_datasets

    _print_table(list_datasets(), as_json)


@app.command("show")
def show_command(model: Model, as_json: Json = False) -> None:
    """Show a model: its page, options with types and bounds, capabilities, guides and methods."""
    from elbozoo.api import describe

    card = describe(model)
    if as_json:
        _print_json(card)
        return
    console = _console()
    console.print(card["page"], markup=False, highlight=False)
    console.print(f"capabilities: {', '.join(card['capabilities'])}", markup=False)
    console.print(f"methods:      {', '.join(card['methods'])}", markup=False)
    for title, options in card["options"].items():
        console.print(
            _table(
                f"options of {title}",
                ["option", "type", "default", "bounds", "description"],
                [list(o.values()) for o in options],
            )
        )


@app.command("fit")
def fit_command(
    model: Model,
    data: Data,
    guide: Annotated[
        str | None,
        typer.Option(
            "--guide",
            "-g",
            metavar="G",
            help="Guide to fit by SVI, as in 'elbozoo guides MODEL'; mean-field by default.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="M", help="Instead of a guide: em, closed-form, cavi or nuts."),
    ] = None,
    settings: Settings = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    columns: Columns = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Fit one model by one method and print its ledger."""
    from elbozoo.api import compare, one_method
    from elbozoo.inference.storage import writable_directory

    chosen = one_method(guide, method)
    if out is not None:
        writable_directory(out)
    result = compare(model, data, methods=[chosen], seeds=[seed], columns=_names(columns), **_settings(settings))
    (fit,) = result.fits
    if out is not None:
        fit.save(out)
    _print_notes(result)
    if as_json:
        _print_json(result.document())
        return
    rows = [[name, _cell(value)] for name, value in result.table.iloc[0].items()]
    _console().print(
        _table(
            f"{model} on {result.data['name']} by {chosen} (nats, totals over {result.data['rows']} rows)",
            ["figure", "value"],
            rows,
        )
    )


@app.command("compare")
def compare_command(
    model: Model,
    data: Data,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="M,M",
            help="Methods separated by commas; by default those of em, mean-field, amortized that apply.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds, counted from 0.")] = 3,
    settings: Settings = None,
    columns: Columns = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Fit one model by several methods and hold every bound against the exact log p(x)."""
    from elbozoo.api import compare

    result = compare(
        model, data, methods=_names(methods), seeds=seeds, columns=_names(columns), out=out, **_settings(settings)
    )
    _print_notes(result)
    if as_json:
        _print_json(result.document())
        return
    _print_summary(result)
    if out is not None:
        typer.echo(
            f"written to {out}: comparison.csv, comparison.json, trajectories.csv, fits, plots, report.html", err=True
        )


@app.command("tutorial")
def tutorial_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PAGE", help="Page to write, ending in .md or .ipynb.")],
    guide: Annotated[
        str | None, typer.Option("--guide", "-g", metavar="G", help="Guide that the page is about.")
    ] = None,
) -> None:
    """Write a page that teaches a model and a guide, with text, plots and numbers from a run."""
    from elbozoo.api import tutorial

    typer.echo(f"written to {tutorial(model, out, guide=guide)}", err=True)


def _settings(settings: list[str] | None) -> dict[str, Any]:
    from elbozoo.models.contract.errors import InvalidInput

    parsed: dict[str, Any] = {}
    for item in settings or []:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise InvalidInput(f"--set: found {item!r}, expected NAME=VALUE, such as --set latent_dim=5")
        if name.strip() in COMMAND_NAMES:
            raise InvalidInput(
                f"--set: found {name.strip()!r}, which belongs to the command; expected an option of the model, guide "
                "or method, as in 'elbozoo show MODEL'"
            )
        parsed[name.strip()] = None if value.strip().lower() == "none" else value.strip()
    return parsed


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


def _console() -> Any:
    from rich.console import Console

    # A pipe has no width of its own, and a table cut to 80 columns would lose figures.
    return Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)


def _table(title: str, header: list[str], rows: list[list[Any]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*[escape(str(cell)) for cell in row])
    # A title of the table's own would be broken to the table's width.
    return Group(Text(title, style="bold"), table) if title else table


def _print_table(frame: pd.DataFrame, as_json: bool) -> None:
    plain = frame.reset_index()
    if as_json:
        _print_json(json.loads(plain.to_json(orient="records")))
        return
    _console().print(_table("", list(plain.columns), plain.astype(object).values.tolist()))


def _print_summary(result: Comparison) -> None:
    shown = {
        "elbo": "ELBO",
        "log_evidence": "log p(x)",
        "gap": "gap",
        "approximation_gap": "= approximation",
        "amortization_gap": "+ amortization",
        "learning_gap": "learning gap",
        "seconds": "seconds",
    }
    rows = []
    for method, figures in result.summary.iterrows():
        of_method = result.table[result.table["method"] == method]
        kind = _cell(of_method["log_evidence_kind"].iloc[0])
        converged = f"{int(of_method['converged'].sum())}/{len(of_method)}"
        cells = [_mean_and_deviation(figures[name, "mean"], figures[name, "std"]) for name in shown]
        rows.append([method, *cells, kind, _cell(of_method["khat_max"].max()), converged])
    title = (
        f"{result.model} on {result.data['name']}: nats, totals over {result.data['rows']} rows, mean ± sd over seeds"
    )
    _console().print(_table(title, ["method", *shown.values(), "evidence", "k-hat", "converged"], rows))


def _print_notes(result: Comparison) -> None:
    for fit in result.fits:
        for note in fit.notes:
            typer.echo(f"note: {fit.method}, seed {fit.seed}: {note}", err=True)
        if fit.interrupted:
            typer.echo(f"note: {fit.method}, seed {fit.seed}: interrupted; these are the figures so far", err=True)


def _mean_and_deviation(mean: float, deviation: float) -> str:
    if mean != mean:
        return "-"
    return f"{mean:.2f}" if deviation != deviation else f"{mean:.2f} ± {deviation:.2f}"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
