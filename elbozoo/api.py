"""The public functions: list, load, fit, compare, write a tutorial."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from elbozoo.comparison import Comparison, from_results
from elbozoo.data import Dataset, list_datasets, load_data
from elbozoo.files import TABLE_SUFFIXES
from elbozoo.guides import registry as guides
from elbozoo.inference.checkpoints import EVERY
from elbozoo.inference.cluster import ClusterRows, connected, is_collection
from elbozoo.inference.comparison import run_comparison
from elbozoo.inference.fit import Fit
from elbozoo.inference.method import (
    SCHEMA_TITLES,
    default_methods,
    default_methods_of_streams,
    method_names,
    plan,
    program_entry,
    refuse_without_records,
    schemas_of,
    warn_of_unread,
)
from elbozoo.inference.rate_distortion import WEIGHTS, run_rate_distortion
from elbozoo.inference.records import Records
from elbozoo.inference.rows import Rows
from elbozoo.inference.storage import writable_directory
from elbozoo.models.contract.entry import Entry, capabilities
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.options import Options, is_position
from elbozoo.models.contract.registry import entry_names, get_entry, list_models
from elbozoo.preparation import Prepared, Request, prepare, prepare_stream
from elbozoo.programs import load_program
from elbozoo.rate_curve import RateDistortion, curve_from_results
from elbozoo.stored import StoredData
from elbozoo.tutorials import write_tutorial

__all__ = [
    "compare",
    "describe",
    "fit",
    "guide_overview",
    "list_datasets",
    "list_guides",
    "list_models",
    "load_comparison",
    "load_data",
    "load_fit",
    "load_program",
    "rate_distortion",
    "tutorial",
]

Model = str | type[Entry] | Callable[..., Any]


def list_guides(model: str) -> pd.DataFrame:
    """Return a table of all guides: family, source, whether each fits a model, and why not.

    Parameters
    ----------
    model : str
        Name of an entry.

    Returns
    -------
    DataFrame
        Indexed by ``guide``, with ``family``, ``source``, ``fits`` and ``reason``; those that fit come first.

    Raises
    ------
    InvalidInput
        For an unknown model.

    Examples
    --------
    >>> import elbozoo as ez
    >>> guides = ez.list_guides("eight-schools")
    >>> guides.index[guides["fits"]].tolist()[:3]
    ['delta', 'diagonal-normal', 'full-rank-normal']
    >>> guides.loc["free-diagonal-normal", "reason"]
    "the latent 'mu' is one for the whole data set, so there is no q per datum to be free"
    """
    return guides.list_guides(get_entry(model).example())


def guide_overview() -> pd.DataFrame:
    """Return a table of all guides: family and source, and the models that each fits.

    Returns
    -------
    DataFrame
        Indexed by ``guide``, with ``family``, ``source`` and ``models``.
    """
    fitting: dict[str, list[str]] = {}
    cards = {}
    for model in entry_names():
        for card in guides.guide_cards(get_entry(model).example()):
            cards[card.name] = card
            fitting.setdefault(card.name, []).extend([model] if card.refusal is None else [])
    rows = [
        {"guide": name, "family": card.family, "source": card.source, "models": ", ".join(fitting[name])}
        for name, card in cards.items()
    ]
    return pd.DataFrame(rows).set_index("guide")


def describe(model: str) -> dict[str, Any]:
    """Return a model's page, capabilities, methods, guides and options as plain values.

    Parameters
    ----------
    model : str
        Name of an entry.

    Returns
    -------
    dict
        ``model``, ``summary``, ``page``, ``capabilities``, ``methods``, ``default_methods``, ``guides``, ``options``.

    Raises
    ------
    InvalidInput
        For an unknown model.

    Examples
    --------
    >>> import elbozoo as ez
    >>> ez.describe("ppca")["default_methods"]
    ['em', 'mean-field', 'amortized']
    """
    cls = get_entry(model)
    example = cls.example()
    schemas: dict[str, type[Options]] = {
        model: cls.Options,
        **{SCHEMA_TITLES[schema]: schema for schema in schemas_of(example)},
    }
    return {
        "model": model,
        "summary": cls.summary(),
        "page": cls.page(),
        "capabilities": capabilities(example),
        "methods": method_names(example),
        "default_methods": default_methods(example),
        "guides": guides.guide_names(example),
        "options": {title: schema.describe() for title, schema in schemas.items()},
    }


def fit(
    model: Model,
    data: Any,
    *,
    guide: str | None = None,
    method: str | None = None,
    seed: int = 0,
    columns: list[str] | None = None,
    binarise: str | None = None,
    validation: Any = None,
    test: Any = None,
    data_seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = EVERY,
    tensorboard: str | Path | None = None,
    scheduler: Any = None,
    progress: bool = True,
    **options: Any,
) -> Fit:
    """Fit one model to data by one method.

    Parameters
    ----------
    model : str, type or callable
        Name of an entry, or a program ``model(batch)`` of your own with an observed site ``"x"``.
    data : str, path, DataFrame, array or tensor
        Whatever :func:`load_data` takes: the name of a data set, a file, rows (N, D), or a data set that it returned.
    guide : str, optional
        Guide to fit by stochastic variational inference; if neither this nor ``method`` is given,
        ``"mean-field"`` where it fits the model.
    method : str, optional
        ``"em"``, ``"closed-form"``, ``"cavi"``, ``"nuts"`` or a guide's name, instead of ``guide``.
    seed : int
        Seed of everything random.
    columns : list of str, optional
        Columns of a file or DataFrame to use; those that an option names, such as ``target``, are used too.
    binarise : str, optional
        ``threshold``, ``static`` or ``stochastic``: make binary pixels of the columns that no option names, see
        :meth:`~elbozoo.tables.Dataset.binarised`. Stochastic ones are drawn anew at each step of variational inference,
        and held fixed for all that is reported.
    validation : float or data, optional
        Rows that the fit does not learn from, as a share of the rows or as data of their own. Options ``patience`` and
        ``validate_every`` measure by them along the fit.
    test : float or data, optional
        Rows that nothing sees before the end, likewise. Shares are of data: of sequences or groups where a datum is
        one.
    data_seed : int
        Seed of the split and of the draw of binary pixels, which are the same for every ``seed``.
    checkpoint : path, optional
        Directory in which the fit leaves where it stands, in the folder METHOD-SEED. The same call goes on from there
        and ends with the bits of a fit that was never stopped; another fit is refused and overwrites nothing. By
        stochastic variational inference and Monte Carlo EM alone.
    checkpoint_every : int
        Steps from one checkpoint to the next; Control-C writes one too.
    tensorboard : path, optional
        Directory for a log of the fit, in the folder METHOD-SEED; needs ``pip install "elbozoo[tensorboard]"``.
    scheduler : str or distributed.Client, optional
        ``"local"``, the address of a Dask scheduler such as ``"tcp://HOST:8786"``, or a client: each pass of EM over a
        Dask collection, or over files that are streamed, goes to its workers; needs ``pip install "elbozoo[scale]"``.
        A Dask collection without one takes the client that is current, and else a local cluster.
    progress : bool
        Show a bar on standard error where that is a terminal.
    **options
        Options of the model, the guide and the method, such as ``latent_dim=5`` or ``steps=2000``.

    Returns
    -------
    Fit
        In float64, with its model, its guide and its trajectory.

    Raises
    ------
    InvalidInput
        For anything unknown, out of range, or that does not fit together.
    NumericalFailure
        If the fit breaks down.

    Examples
    --------
    >>> import elbozoo as ez
    >>> fit = ez.fit("ppca", "iris", guide="amortized", latent_dim=2, steps=200, seed=0, progress=False)
    >>> fit.guide.name, len(fit.trajectory)
    ('amortized-diagonal-normal', 200)
    >>> fit.elbo() < fit.log_evidence().value
    True
    """
    chosen = one_method(guide, method)
    records = Records.parse(checkpoint, checkpoint_every, tensorboard)
    request = Request(binarise, validation, test, data_seed)
    with _prepared(model, data, columns, options, request, scheduler) as (prepared, options):
        rows = prepared.rows
        if scheduler is not None and prepared.stream is None:
            raise InvalidInput(
                f"scheduler: found it with {rows.name} in memory, expected a Dask collection, or files loaded with "
                "load_data(..., stream=True); leave it out, or use compare, which spreads whole fits"
            )
        ready = plan(model, rows.x, chosen, options, rows.columns, records, prepared.companions, prepared.stream)
        warn_of_unread([ready])
        refuse_without_records([ready])
        fitted = ready.run(seed, progress=progress)
        fitted.entry.levels = dict(rows.levels)
    return _off_cluster(fitted, scheduler)


def one_method(guide: str | None, method: str | None) -> str | None:
    """Return the method that ``guide`` or ``method`` names, None if neither does.

    Parameters
    ----------
    guide : str, optional
        Name of a guide.
    method : str, optional
        Name of a method.

    Returns
    -------
    str or None
        The one that is given.

    Raises
    ------
    InvalidInput
        For both at once, or an unknown guide.
    """
    if guide is None:
        return method
    if method is not None:
        raise InvalidInput(f"found guide {guide!r} and method {method!r}, expected one of the two")
    if guide not in guides.ALL_NAMES:
        raise unknown_name("guide", guide, guides.ALL_NAMES)
    return guide


def compare(
    model: Model,
    data: Any,
    *,
    methods: Iterable[str | None] | None = None,
    seeds: int | Iterable[int] = 3,
    columns: list[str] | None = None,
    binarise: str | None = None,
    validation: Any = None,
    test: Any = None,
    data_seed: int = 0,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = EVERY,
    tensorboard: str | Path | None = None,
    scheduler: Any = None,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Fit one model by several methods from several seeds, and hold every bound against the evidence.

    Parameters
    ----------
    model : str, type or callable
        See :func:`fit`.
    data : str, path, DataFrame, array or tensor
        See :func:`fit`.
    methods : iterable of str, optional
        Methods; by default those of em, mean-field and amortized that apply, and for a global latent
        mean-field, full-rank and laplace. ``"all"`` fits the five ways to a q of each datum to one model.
    seeds : int or iterable of int
        Number of seeds, or the seeds themselves.
    columns : list of str, optional
        See :func:`fit`.
    binarise : str, optional
        See :func:`fit`.
    validation, test : float or data, optional
        See :func:`fit`. With rows held out, the table has columns about them: those of ``test``, or of ``validation``
        where there is no test. They say NaN where a guide has no q for new rows, and where a latent is global and
        log p(x' given x) is not exact.
    data_seed : int
        See :func:`fit`.
    out : path, optional
        Directory for tables, fits, plots and report; it is checked before the work starts. Each fit is left there as
        soon as it and its ledger are finished, and the same call takes it up instead of repeating it: after whatever
        ended the one before, and with more methods or seeds. A fit of other options or data is run again and replaced.
    checkpoint : path, optional
        See :func:`fit`.
    checkpoint_every : int
        See :func:`fit`.
    tensorboard : path, optional
        See :func:`fit`.
    scheduler : str or distributed.Client, optional
        ``"local"``, the address of a Dask scheduler such as ``"tcp://HOST:8786"``, or a client: spreads methods and
        seeds over its workers, each as a task; needs ``pip install "elbozoo[scale]"``.
    progress : bool
        See :func:`fit`.
    **options
        See :func:`fit`; an option goes to every method that reads it.

    Returns
    -------
    Comparison
        Its ``table`` has a row for each fit, and ``summary`` one for each method.

    Raises
    ------
    InvalidInput
        For anything unknown, out of range, or that does not fit together.
    NumericalFailure
        If every fit breaks down, or has a bound that exceeds the truth. Where some do not, the others are named in
        ``failures`` and have no row.

    Examples
    --------
    The closed form is the global maximum of PPCA's likelihood, and EM comes to it:

    >>> import elbozoo as ez
    >>> comparison = ez.compare("ppca", "iris", methods=["em", "closed-form"], seeds=2, latent_dim=2, progress=False)
    >>> comparison.summary["learning_gap"]["mean"].round(2).abs().to_dict()
    {'closed-form': 0.0, 'em': 0.0}
    >>> len(comparison.fits)
    4
    """
    records = Records.parse(checkpoint, checkpoint_every, tensorboard)
    request = Request(binarise, validation, test, data_seed)
    with _prepared(model, data, columns, options, request, scheduler) as (prepared, options):
        rows = prepared.rows
        if methods is None:
            entry = _entry_for(model, rows, options)
            methods = default_methods(entry) if prepared.stream is None else default_methods_of_streams(entry)
        chosen = [methods] if isinstance(methods, str) else list(methods)
        if out is not None:
            writable_directory(out)
        computed = run_comparison(
            model,
            rows.x,
            chosen,
            seeds,
            options,
            name=rows.name,
            names=rows.columns,
            records=records,
            companions=prepared.companions,
            arguments=prepared.arguments,
            levels=rows.levels,
            rows=prepared.stream,
            out=out,
            # The rows of a stream are on the cluster themselves, where each fit in turn goes over them.
            scheduler=scheduler if prepared.stream is None else None,
            progress=progress,
        )
    computed.fits[:] = [_off_cluster(fitted, scheduler) for fitted in computed.fits]
    results = from_results(computed, rows.labels, rows.image_shape)
    if out is not None:
        results.save(out)
    return results


def rate_distortion(
    model: Model,
    data: Any,
    weights: float | Iterable[float] = WEIGHTS,
    seeds: int | Iterable[int] = 1,
    *,
    guide: str = "amortized",
    columns: list[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> RateDistortion:
    """Fit one model by the objective ``beta`` at several β, and hold rate against distortion.

    Parameters
    ----------
    model : str, type or callable
        See :func:`fit`.
    data : str, path, DataFrame, array or tensor
        See :func:`fit`.
    weights : float or iterable of float
        Values of β, above 0.
    seeds : int or iterable of int
        Number of seeds, or the seeds themselves.
    guide : str
        A guide whose q has a density, for latents that belong to the rows.
    columns : list of str, optional
        See :func:`fit`.
    progress : bool
        See :func:`fit`.
    **options
        See :func:`fit`; ``objective`` and ``kl_weight`` are given by ``weights``.

    Returns
    -------
    RateDistortion
        With a row of its ``table`` for each β and seed.

    Raises
    ------
    InvalidInput
        For anything unknown, out of range, or that does not fit together.
    NumericalFailure
        If a fit breaks down, or an ELBO exceeds the evidence.

    Examples
    --------
    Rate and distortion add up to the negative ELBO, at every β:

    >>> import elbozoo as ez
    >>> curve = ez.rate_distortion("ppca", "iris", weights=(0.5, 2.0), latent_dim=1, steps=100, progress=False)
    >>> table = curve.table
    >>> table["weight"].tolist(), (table["rate"] + table["distortion"] + table["elbo"]).round(6).abs().tolist()
    ([0.5, 2.0], [0.0, 0.0])
    """
    loaded, options = _load(model, data, columns, options)
    rows = _in_memory(loaded)
    computed = run_rate_distortion(
        model, rows.x, guide, weights, seeds, options, name=rows.name, names=rows.columns, progress=progress
    )
    return curve_from_results(computed)


def load_fit(directory: str | Path) -> Fit:
    """Read a fit that ``Fit.save`` wrote.

    Parameters
    ----------
    directory : str or path
        Folder that :meth:`Fit.save` wrote.

    Returns
    -------
    Fit
        Without data; pass rows to its methods.

    Raises
    ------
    InvalidInput
        If there is no fit in it.

    Examples
    --------
    >>> import tempfile
    >>> import elbozoo as ez
    >>> fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loaded = ez.load_fit(fit.save(folder))
    >>> loaded.elbo(ez.load_data("iris")) == fit.elbo()
    True
    """
    return Fit.load(directory)


def load_comparison(directory: str | Path) -> Comparison:
    """Read a comparison that ``Comparison.save`` wrote.

    Parameters
    ----------
    directory : str or path
        Folder that :meth:`Comparison.save` wrote, such as that of ``compare(..., out=folder)``.

    Returns
    -------
    Comparison
        Its fits carry no data.

    Raises
    ------
    InvalidInput
        If there is no comparison in it.

    Examples
    --------
    >>> import tempfile
    >>> import elbozoo as ez
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = ez.compare("normal-mean", "iris", methods=["closed-form"], seeds=1, out=folder, progress=False)
    ...     loaded = ez.load_comparison(folder)
    >>> loaded.document() == made.document()
    True
    """
    return Comparison.load(directory)


def tutorial(
    model: Any,
    path: str | Path,
    *,
    guide: str | None = None,
    data: Any = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write a page that teaches ``model`` with ``guide`` from a run.

    A page as Markdown for MyST-NB or as a Jupyter notebook can be run again as it is; one as HTML is a single file
    to be read, without a network.

    Parameters
    ----------
    model : str or callable
        Name of an entry, a program of your own as ``path/to/file.py:function``, or such a function itself, if it stands
        at the top of a file.
    path : str or path
        Page to write, ending in ``.md``, ``.ipynb`` or ``.html``; an older one stays until the run has ended.
    guide : str, optional
        Guide that the page is about; by default the one that :func:`fit` takes.
    data : str, path, DataFrame, array or tensor, optional
        Whatever :func:`load_data` takes; by default rows that the model draws. What is in memory alone is written to
        ``PAGE_data.csv`` beside the page, whose code reads it from there.
    progress : bool
        Show a bar on standard error where that is a terminal.
    **options
        Options of the model, the guide and the methods, such as ``latent_dim=3``; the page's code shows them.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InvalidInput
        For anything unknown, out of range, or that does not fit together, and for a page that cannot be written.
    NumericalFailure
        If a fit of the page breaks down.

    Examples
    --------
    >>> import tempfile
    >>> import elbozoo as ez
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = ez.tutorial("normal-mean", f"{folder}/page.md", steps=50, progress=False)
    ...     next(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    '# Unknown mean of a normal distribution whose scale is known'
    """
    return write_tutorial(model, path, guide=guide, data=data, progress=progress, **options)


@contextmanager
def _prepared(
    model: Model,
    data: Any,
    columns: Sequence[str] | str | None,
    options: dict[str, Any],
    request: Request,
    scheduler: Any,
) -> Iterator[tuple[Prepared, dict[str, Any]]]:
    """Load the data in the form that the model takes, with binary pixels and rows set aside where that is asked for.

    Rows that are not in memory are on the workers of a cluster while the block runs, where one is asked for or they
    are what Dask computes.
    """

    def load(source: Any, like: Dataset) -> Dataset:
        # What has no names has its columns in order, and all of them, so that another width is noticed.
        has_names = columns is not None or isinstance(source, str | os.PathLike | pd.DataFrame | Dataset)
        return _in_memory(_load(model, source, like.columns if has_names else None, options)[0])

    with ExitStack() as stack:
        client = stack.enter_context(connected(scheduler)) if is_collection(data) else None
        rows, options = _load(model, data, columns, options)
        if not isinstance(rows, StoredData):
            yield prepare(_entry_class(model), rows, options, request, load), options
            return
        if client is None and (scheduler is not None or rows.is_computed):
            client = stack.enter_context(connected(scheduler))
        if client is not None:
            rows = replace(rows, rows=ClusterRows(rows.rows.blocks, rows.rows.names, client))
        yield prepare_stream(_entry_class(model), rows, options, request, load), options


def _off_cluster(fitted: Fit, scheduler: Any) -> Fit:
    """Return a fit whose data are read without the cluster that they were on, which has ended, unless it is open."""
    if not isinstance(fitted.rows, ClusterRows) or not (scheduler is None or isinstance(scheduler, str)):
        return fitted
    return replace(fitted, rows=Rows(fitted.rows.blocks, fitted.rows.names))


def _load(
    model: Model, data: Any, columns: Sequence[str] | str | None, options: dict[str, Any]
) -> tuple[Dataset | StoredData, dict[str, Any]]:
    """Load the data in the form that the model takes: with the columns that its options name, and NaN if it may.

    The options come back with columns of labels by name, since their positions may change as others are left out.
    """
    cls = _entry_class(model)
    if cls is None:
        return load_data(data, columns), options
    parsed, roles = cls.Options.parse(_options_of(cls, options)), cls.Options.column_roles()
    # In a table with names the labels may be text, and where no option says which column has them it is the default.
    given = {
        option: column
        for option, column in parsed.columns_named().items()
        if option in options or (roles[option].is_key and _is_table(data))
    }
    keys = {option: column for option, column in given.items() if roles[option].is_key}
    named = [c for c in given.values() if isinstance(c, str) and not is_position(c) and c not in keys.values()]
    if columns is not None:
        picked = [columns] if isinstance(columns, str) else list(columns)
        columns = [*picked, *(column for column in named if column not in picked)]
    rows = load_data(
        data,
        columns,
        keys=list(keys.values()),
        missing=cls.allows_missing,
        missing_labels=any(roles[option].may_be_blank for option in keys),
    )
    for column in named:
        if column not in rows.columns:
            load_data(data, [column])  # says why it was left out
    if isinstance(rows, StoredData):
        return rows, options
    options = options | dict(zip(keys, rows.levels, strict=False))
    is_conv = "conv" in (options.get("architecture"), options.get("encoder"))
    if is_conv and rows.image_shape is not None and options.get("image_shape") is None:
        options["image_shape"] = "x".join(map(str, rows.image_shape))
    return rows, options


def _in_memory(rows: Dataset | StoredData) -> Dataset:
    """Return data that are in memory.

    Raises
    ------
    InvalidInput
        For any that are not, with how to read them.
    """
    if isinstance(rows, StoredData):
        instead = "bring what its compute() returns" if rows.is_computed else "load them with stream=False"
        raise InvalidInput(
            f"{rows.name}: found {len(rows.rows)} rows that are not in memory, expected rows that are, since all are "
            f"looked at together; {instead}"
        )
    return rows


def _is_table(data: Any) -> bool:
    """Whether data are a frame or a file with a header."""
    if isinstance(data, str | os.PathLike):
        return Path(data).is_dir() or Path(data).suffix.lower() in TABLE_SUFFIXES
    return isinstance(data, pd.DataFrame)


def _entry_class(model: Model) -> type[Entry] | None:
    if isinstance(model, str):
        return get_entry(model)
    return model if isinstance(model, type) and issubclass(model, Entry) else None


def _options_of(cls: type[Entry], options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in cls.Options.model_fields}


def _entry_for(model: Model, rows: Dataset, options: dict[str, Any]) -> Entry:
    cls = _entry_class(model)
    if cls is None:
        return program_entry(model, rows.x)
    roles = cls.Options.column_roles()
    return cls.example(
        rows.x.shape[1], **{name: v for name, v in _options_of(cls, options).items() if name not in roles}
    )
