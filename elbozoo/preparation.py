"""From data and what is asked of them to rows to fit to, rows to stop by, rows to test with, and binary pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elbozoo.binarisation import largest
from elbozoo.inference.heldout import Companions
from elbozoo.inference.rows import Part, Rows, sample_rows
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.sequences import StackedEntry
from elbozoo.stored import StoredData
from elbozoo.tables import Dataset, Split

PARTS = ("validation", "test")
OWN = "rows of their own"
SAMPLE_ROWS = 2**16  # that starting values and scales are taken from where the rows are not in memory
FEW = 2**12  # of those, that stand for all others where a part is looked at
READ_AT_ONCE = 2**16


class Request(NamedTuple):
    """What is asked of the data beside their columns.

    Attributes
    ----------
    binarise : str or None
        How to make pixels binary, see :meth:`~elbozoo.tables.Dataset.binarised`.
    validation, test : float, data or None
        A share of the rows, or data of their own.
    seed : int
        Seed of the split and of the draw of pixels.
    """

    binarise: str | None = None
    validation: Any = None
    test: Any = None
    seed: int = 0

    def shares(self) -> dict[str, float]:
        """Return the parts that are shares of the rows."""
        given = {part: getattr(self, part) for part in PARTS}
        return {part: float(value) for part, value in given.items() if isinstance(value, Real)}

    def others(self) -> dict[str, Any]:
        """Return the parts that are data of their own."""
        return {p: getattr(self, p) for p in PARTS if getattr(self, p) is not None and p not in self.shares()}


class Prepared(NamedTuple):
    """Rows to fit to, what stands beside them, and what makes them again, by name.

    Attributes
    ----------
    rows : Dataset
        The rows, or a sample of them where they are not in memory.
    stream : Rows or None
        All rows where they are not in memory.
    """

    rows: Dataset
    companions: Companions
    arguments: dict[str, Any]
    stream: Rows | None = None


def prepare(
    cls: type[Entry] | None,
    rows: Dataset,
    options: dict[str, Any],
    request: Request,
    load: Callable[[Any, Dataset], Dataset],
) -> Prepared:
    """Make the pixels binary and set rows aside, as ``request`` says.

    Parameters
    ----------
    cls : type or None
        The entry, which says which columns have a role and what a datum is; None for a program of the user's.
    rows : Dataset
        All rows.
    options : dict
        Options of the entry, among others.
    request : Request
        What is asked.
    load : callable
        Loads data of their own with the columns of a data set.

    Raises
    ------
    InvalidInput
        For shares or data that do not fit, or labels that only rows that are set aside have.
    """
    positions = _positions(cls, rows, options)
    leave = [rows.columns[position] for position in positions.values()]
    top = rows.top
    if request.binarise is not None:
        is_pixel = torch.tensor([name not in leave and name not in rows.levels for name in rows.columns])
        top = largest(rows.x[:, is_pixel]) if top is None and is_pixel.any() else top
        rows = replace(rows, top=top).binarised(request.binarise, request.seed, leave=leave)
    unit = _unit(cls, rows, positions, request)
    split = rows.split(**request.shares(), seed=request.seed, by=unit) if request.shares() else Split(rows, None, None)
    parts = {"validation": split.validation, "test": split.test}
    for number, (part, source) in enumerate(request.others().items(), start=1):
        other = _with_codes_of(rows, load(source, rows))
        if request.binarise is not None:
            # Another seed than that of the rows: two draws by one noise would not be independent.
            other = replace(other, top=top).binarised(request.binarise, request.seed + number, leave=leave)
        parts[part] = other
    for part, data in parts.items():
        if data is not None:
            _refuse_new_labels(part, split.train, data, [name for name in rows.levels if name != unit])
    tables = {part: None if data is None else data.x for part, data in parts.items()}
    return Prepared(split.train, Companions(**tables, intensities=split.train.intensities), _arguments(rows, request))


def prepare_stream(
    cls: type[Entry] | None,
    data: StoredData,
    options: dict[str, Any],
    request: Request,
    load: Callable[[Any, Dataset], Dataset],
) -> Prepared:
    """Take a sample of rows that are not in memory, and hold every one of them against what the model accepts.

    Raises
    ------
    InvalidInput
        For rows that do not fit the model, and for what is done to rows in memory alone: a share of them set aside,
        binary pixels drawn of them.
    """
    shares = {name: share for name, share in request.shares().items() if share}
    if shares or request.binarise is not None:
        found, instead = "binarise", "write binary pixels to the file"
        if shares:
            found, instead = next(iter(shares)), "give data of their own, such as the path of another file"
        raise InvalidInput(
            f"{data.name}: found {found}={shares.get(found, request.binarise)} with data that are not in memory, "
            f"expected data that are; {instead}, or load them with load_data(..., stream=False) or --no-stream"
        )
    some = sample_rows(data.rows, SAMPLE_ROWS, request.seed, READ_AT_ONCE)
    sample = Dataset(data.name, some, data.columns, description=data.description)
    prepared = prepare(cls, sample, options, request, load)
    if cls is not None:
        parsed = cls.Options.parse({name: v for name, v in options.items() if name in cls.Options.model_fields})
        parsed = parsed.at_positions(sample.columns)
        _check(cls, parsed, some, f"a sample of {len(some)} rows")
        data.rows.total(partial(_refuse_rows, cls, parsed, some), max, READ_AT_ONCE)
    return prepared._replace(arguments={**data.arguments, **prepared.arguments}, stream=data.rows)


def _refuse_rows(cls: type[Entry], options: Any, some: Tensor, part: Part) -> int:
    """Hold a part against what the entry accepts; good rows of the sample beside it stand for the others."""
    end = part.start + len(part.x)
    try:
        _check(cls, options, torch.cat([some[:: max(1, len(some) // FEW)], part.x]), "")
    except InvalidInput:  # rows of a sorted file may be alike; what is still wrong beside the whole sample is theirs
        _check(cls, options, torch.cat([some, part.x]), f"rows {part.start + 1} to {end}")
    return end


def _check(cls: type[Entry], options: Any, x: Tensor, where: str) -> None:
    try:
        cls.check_data(cls.arrange(x, options), options)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def _positions(cls: type[Entry] | None, rows: Dataset, options: dict[str, Any]) -> dict[str, int]:
    """Return the positions of the columns that have a role, by option."""
    if cls is None:
        return {}
    given = {name: value for name, value in options.items() if name in cls.Options.model_fields}
    found = cls.Options.parse(given).at_positions(rows.columns).columns_named()
    return {option: int(position) % rows.width for option, position in found.items()}


def _unit(cls: type[Entry] | None, rows: Dataset, positions: dict[str, int], request: Request) -> str | None:
    """Return the column whose rows are one datum, which is never cut, or None where each row is one."""
    if cls is None or not issubclass(cls, StackedEntry):
        return None
    if cls.key in positions:
        return rows.columns[positions[cls.key]]
    if request.shares():
        part, share = next(iter(request.shares().items()))
        raise InvalidInput(
            f"{part}: found {share:g} with a table that is one {cls.key}, expected several to choose from, since a "
            f"{cls.key} is never cut; name them with {cls.key}=COLUMN, or give rows of your own as {part}"
        )
    return None


def _with_codes_of(rows: Dataset, other: Dataset) -> Dataset:
    """Return ``other`` with the codes that its labels have in ``rows``; new labels come after those."""
    x, levels = other.x.clone(), dict(other.levels)
    for name in rows.levels.keys() & other.levels.keys():
        levels[name] = list(dict.fromkeys([*rows.levels[name], *other.levels[name]]))
        codes = torch.tensor([levels[name].index(label) for label in other.levels[name]], dtype=x.dtype)
        column = x[:, other.columns.index(name)]
        known = ~column.isnan()
        column[known] = codes[column[known].long()]
    return replace(other, x=x, levels=levels)


def _refuse_new_labels(part: str, train: Dataset, data: Dataset, keys: Iterable[str]) -> None:
    for name in keys:
        known = train.x[:, train.columns.index(name)]
        codes = data.x[:, data.columns.index(name)]
        new = codes[~torch.isin(codes, known) & ~codes.isnan()]
        if len(new):
            label = data.levels[name][int(new[0])]
            raise InvalidInput(
                f"{part}: found the label {label!r} in column {name!r}, which no row of the fit has, expected labels "
                "that the model can learn; choose other shares or another data_seed, or leave those rows out"
            )


def _arguments(rows: Dataset, request: Request) -> dict[str, Any]:
    given = dict(rows.arguments)
    shares = {part: share for part, share in request.shares().items() if share}
    others = {p: str(s) if isinstance(s, str | os.PathLike) else OWN for p, s in request.others().items()}
    if shares and given.get("seed", request.seed) != request.seed:
        # The pixels were drawn by another seed before, which stays that of load_data.
        return given | shares | others | {"data_seed": request.seed}
    seed = request.seed if shares else given.pop("seed", None)
    given.pop("seed", None)
    given |= shares | others
    return given if seed is None else given | {"data_seed": seed}
