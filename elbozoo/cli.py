"""The command line: ``elbozoo models | guides | datasets | show | fit | compare | tutorial``.

Results go to standard output, progress and errors to standard error. Exit status: 0 done, 2 wrong usage
or data, 1 otherwise. Heavy libraries are imported inside the commands, so that help is immediate.
"""

from __future__ import annotations

import json
import math
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
AnyModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Name of an entry, as in 'elbozoo models', or a program of yours, path/to/file.py:function.",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The same as the argument MODEL, of which one is needed.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        metavar="D",
        help="Name of a data set, simulate:MODEL, a CSV or Parquet file with a header, a folder of Parquet files, or a "
        "NPY or NPZ file.",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option("--root", metavar="DIR", help="Folder with your IDX files, for --data mnist and fashion-mnist."),
]
Subset = Annotated[
    str | None,
    typer.Option(
        "--split", metavar="PART", help="Of mnist and fashion-mnist: train, which is the default, test or all."
    ),
]
Key = Annotated[
    str | None,
    typer.Option("--key", metavar="NAME", help="Array of a NPZ file that holds the rows, if it holds several."),
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Leave the rows of a NPY file, or of Parquet files, where they are and read them part by part; by default "
        "from 512 MiB on.",
    ),
]
Binarise = Annotated[
    str | None,
    typer.Option(
        "--binarise",
        metavar="HOW",
        help="Make binary pixels: threshold, static (one draw) or stochastic (drawn anew at each step).",
    ),
]
ValidationRows = Annotated[
    str | None,
    typer.Option(
        "--validation",
        metavar="SHARE",
        help="Share of the rows to stop by, as in --set patience=5, or data of their own.",
    ),
]
TestRows = Annotated[
    str | None,
    typer.Option(
        "--test", metavar="SHARE", help="Share of the rows to report held-out figures of, or data of their own."
    ),
]
DataSeed = Annotated[
    int, typer.Option("--data-seed", min=0, metavar="SEED", help="Seed of the split and of the draw of binary pixels.")
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
Resumable = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Directory for what the run leaves behind; the same command goes on from fits that are finished there.",
    ),
]

Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="DIR",
        help="Directory in which fits leave where they stand; the same command goes on from there.",
    ),
]
CheckpointEvery = Annotated[
    int, typer.Option("--checkpoint-every", min=1, metavar="N", help="Steps from one checkpoint to the next.")
]
TensorBoard = Annotated[
    Path | None,
    typer.Option("--tensorboard", metavar="DIR", help="Directory for logs of the fits; needs elbozoo[tensorboard]."),
]

Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Spread the work over a Dask cluster, fits or the rows of a stream: local, or an address such as "
        "tcp://HOST:8786; needs elbozoo[scale].",
    ),
]

CHECKPOINT_STEPS = 500  # that of inference/checkpoints.py, which is not imported for a page of help
TABLE_WIDTH = 200
COMMAND_NAMES = (
    "model",
    "data",
    "methods",
    "seeds",
    "columns",
    "binarise",
    "validation",
    "test",
    "data_seed",
    "out",
    "checkpoint",
    "checkpoint_every",
    "tensorboard",
    "scheduler",
    "progress",
)


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
    data: Data,
    model: AnyModel = None,
    named: ModelOption = None,
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
    root: Root = None,
    split: Subset = None,
    key: Key = None,
    stream: Stream = None,
    binarise: Binarise = None,
    validation: ValidationRows = None,
    test: TestRows = None,
    data_seed: DataSeed = 0,
    out: Out = None,
    checkpoint: Checkpoint = None,
    checkpoint_every: CheckpointEvery = CHECKPOINT_STEPS,
    tensorboard: TensorBoard = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
) -> None:
    """Fit one model by one method and print its ledger."""
    from elbozoo.api import compare, one_method
    from elbozoo.inference.storage import writable_directory
    from elbozoo.words import NOT_A_BOUND

    model = _model(model, named)
    chosen = one_method(guide, method)
    if out is not None:
        writable_directory(out)
    result = compare(
        _program_or_name(model),
        _source(data, root, split, key, stream),
        methods=[chosen],
        seeds=[seed],
        columns=_names(columns),
        binarise=binarise,
        validation=_share(validation),
        test=_share(test),
        data_seed=data_seed,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        scheduler=scheduler,
        **_settings(settings),
    )
    (fit,) = result.fits
    if out is not None:
        fit.save(out)
    _print_notes(result)
    if as_json:
        _print_json(result.document())
        return
    figures = result.table.iloc[0]
    if math.isnan(figures["denoising_elbo"]):  # of few models, and no part of every page
        figures = figures.drop(["denoising_elbo", "denoising_elbo_se"])
    rows = [[name, _cell(value)] for name, value in figures.items()]
    if not figures["is_bound"]:
        rows = [[name, NOT_A_BOUND if name in ("elbo", "heldout_elbo") else cell] for name, cell in rows]
    _console().print(
        _table(
            f"{model} on {result.data['name']} by {fit.method} (nats, totals over {result.data['rows']} rows)",
            ["figure", "value"],
            rows,
        )
    )


@app.command("compare")
def compare_command(
    data: Data,
    model: AnyModel = None,
    named: ModelOption = None,
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
    root: Root = None,
    split: Subset = None,
    key: Key = None,
    stream: Stream = None,
    binarise: Binarise = None,
    validation: ValidationRows = None,
    test: TestRows = None,
    data_seed: DataSeed = 0,
    out: Resumable = None,
    checkpoint: Checkpoint = None,
    checkpoint_every: CheckpointEvery = CHECKPOINT_STEPS,
    tensorboard: TensorBoard = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
) -> None:
    """Fit one model by several methods and hold every bound against the exact log p(x)."""
    from elbozoo.api import compare

    model = _model(model, named)
    result = compare(
        _program_or_name(model),
        _source(data, root, split, key, stream),
        methods=_names(methods),
        seeds=seeds,
        columns=_names(columns),
        binarise=binarise,
        validation=_share(validation),
        test=_share(test),
        data_seed=data_seed,
        out=out,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        scheduler=scheduler,
        **_settings(settings),
    )
    _print_notes(result)
    if as_json:
        _print_json(result.document())
    else:
        _print_summary(result)
        if out is not None:
            written = "comparison.csv, comparison.json, trajectories.csv, fits, plots, report.html, report.md"
            typer.echo(f"written to {out}: {written}", err=True)
    for failure in result.failures:
        typer.echo(f"elbozoo: {failure}", err=True)
    if result.failures:
        raise typer.Exit(1)


@app.command("tutorial")
def tutorial_command(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PAGE", help="Page to write, ending in .md, .ipynb or .html.")
    ],
    model: AnyModel = None,
    named: ModelOption = None,
    guide: Annotated[
        str | None, typer.Option("--guide", "-g", metavar="G", help="Guide that the page is about.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", metavar="D", help="Data as in 'elbozoo fit'; by default rows that the model draws."
        ),
    ] = None,
    settings: Settings = None,
) -> None:
    """Write a page that teaches a model and a guide, with text, plots and numbers from a run."""
    from elbozoo.api import tutorial

    page = tutorial(_model(model, named), out, guide=guide, data=data, **_settings(settings))
    typer.echo(f"written to {page}", err=True)


def _model(argument: str | None, option: str | None) -> str:
    """Return the model that the argument or the option names.

    Raises
    ------
    BadParameter
        For neither.
    InvalidInput
        For two of them.
    """
    from elbozoo.models.contract.errors import InvalidInput

    if argument is None and option is None:
        raise typer.BadParameter("it is missing; name one of 'elbozoo models'", param_hint="'MODEL'")
    if argument is not None and option is not None and argument != option:
        raise InvalidInput(
            f"found the models {argument!r} and --model {option!r}, expected one of the two; leave one out"
        )
    return str(argument if option is None else option)


def _program_or_name(model: str) -> Any:
    """Return the program of the user's that ``model`` spells, and else the name of an entry as it is."""
    from elbozoo.programs import is_place, load_program

    return load_program(model) if is_place(model) else model


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


def _source(data: str, root: Path | None, split: str | None, key: str | None, stream: bool | None) -> Any:
    """Return the data set where more than its name is needed, and else its name."""
    if (root, split, key, stream) == (None, None, None, None) and data not in ("mnist", "fashion-mnist"):
        return data
    from elbozoo.api import load_data

    return load_data(data, root=root, split=split, key=key, stream=stream)


def _share(text: str | None) -> float | str | None:
    """Return a number as one, and anything else as the data that it names."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


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
    from elbozoo.words import NOT_A_BOUND

    shown = {
        "elbo": "ELBO",
        "log_evidence": "log p(x)",
        "gap": "gap",
        "approximation_gap": "= approximation",
        "amortization_gap": "+ amortization",
        "learning_gap": "learning gap",
        "seconds": "seconds",
    }
    # Beside the ELBO, where q is trained on corrupted rows.
    is_denoising = bool(result.table["denoising_elbo"].notna().any())
    header = list(shown.values())
    if is_denoising:
        header.insert(1, "denoising ELBO")
    rows = []
    for method, figures in result.summary.iterrows():
        of_method = result.table[result.table["method"] == method]
        kind = _cell(of_method["log_evidence_kind"].iloc[0])
        converged = f"{int(of_method['converged'].sum())}/{len(of_method)}"
        cells = [_mean_and_deviation(figures[name, "mean"], figures[name, "std"]) for name in shown]
        if not of_method["is_bound"].any():
            cells[0] = NOT_A_BOUND
        if is_denoising:
            denoising = of_method["denoising_elbo"]
            cells.insert(1, _mean_and_deviation(denoising.mean(), denoising.std()))
        rows.append([method, *cells, kind, _cell(of_method["khat_max"].max()), converged])
    title = (
        f"{result.model} on {result.data['name']}: nats, totals over {result.data['rows']} rows, mean ± sd over seeds"
    )
    _console().print(_table(title, ["method", *header, "evidence", "k-hat", "converged"], rows))
    if result.heldout:
        _print_heldout(result, result.heldout["part"], result.heldout["rows"])


def _print_heldout(result: Comparison, part: str, count: int) -> None:
    from elbozoo.inference.comparison import HELDOUT_SUMMARISED
    from elbozoo.words import NOT_A_BOUND

    rows = []
    for method, figures in result.summary.iterrows():
        of_method = result.table[result.table["method"] == method]
        moments = [(figures[name, "mean"], figures[name, "std"]) for name in HELDOUT_SUMMARISED]
        totals = [_mean_and_deviation(mean, deviation) for mean, deviation in moments]
        per_datum = [_cell(float(mean) / count) for mean, _ in moments]
        if not of_method["is_bound"].any():
            totals[0] = per_datum[0] = NOT_A_BOUND
        rows.append([method, *totals, *per_datum, _cell(of_method["heldout_log_evidence_kind"].iloc[0])])
    title = f"held out: nats, totals over {count} {part} rows and per datum; - where there is no q for new rows"
    _console().print(
        _table(title, ["method", "ELBO", "log p(x)", "ELBO per datum", "log p(x) per datum", "evidence"], rows)
    )


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
