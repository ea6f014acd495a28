"""Where the data of a page come from, as code that a reader can run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from elbozoo.data import Dataset, load_data
from elbozoo.datasets import NAMED
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.entry import Program as UserProgram
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import is_position
from elbozoo.models.contract.registry import get_entry
from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.programs import Place, relative, spelled
from elbozoo.words import flat

SIMULATE = "simulate:"


class Source(NamedTuple):
    """Data and how a page gets them.

    Attributes
    ----------
    rows : Dataset
        The data.
    code : str
        Code that makes them, and calls them ``data``.
    text : str
        What the page says of them.
    file : (Path, bytes) or None
        A file that has to lie beside the page, and its content.
    """

    rows: Dataset
    code: str
    text: str
    file: tuple[Path, bytes] | None = None


def source_of(
    model: Any, place: Place | None, data: Any, page: Path, options: Mapping[str, Any], effort: Any
) -> Source:
    """Return the data of a page: those that are given, or draws from the model.

    Raises
    ------
    InvalidInput
        For data that cannot be loaded into memory, or a program that cannot be drawn from.
    """
    if data is not None:
        return _brought(model, data, page, options)
    if place is None:
        return _simulated_entry(model, effort, options)
    return _simulated_program(model, effort.rows)


# ---- simulated -------------------------------------------------------------------------------------------------------


def _simulated_entry(model: str, effort: Any, options: Mapping[str, Any]) -> Source:
    cls = get_entry(model)
    is_sequence = issubclass(cls, SequenceEntry)
    is_itself = not set(options) & set(cls.Options.model_fields)
    rows = min(effort.rows, effort.sequence_rows) if is_sequence else effort.rows
    name = f"{SIMULATE}{model}"
    return Source(
        _in_memory(load_data(name, rows=rows, seed=0)),
        f'data = ez.load_data("{name}", rows={rows}, seed=0)',
        "The rows are drawn from the model itself: only the inference can go wrong."
        if is_itself
        else "The rows are drawn from the model with its default options, which are not those of the fit.",
    )


def _simulated_program(program: Any, rows: int) -> Source:
    """Draw from a program that says by itself how many columns it has."""
    if isinstance(program, type) and issubclass(program, Entry):
        x, _ = program.example().simulate_table(rows, seed=0)
        code = f"x, _ = program.example().simulate_table({rows}, seed=0)\ndata = ez.load_data(x)"
        return Source(_in_memory(load_data(x)), code, "The rows are drawn from the program itself.")
    try:
        x, _ = UserProgram(program, columns=1).simulate(rows, seed=0)
        x = x.detach().double().reshape(rows, -1)
    except Exception as error:
        raise InvalidInput(
            f"found no data, and the program cannot be drawn from without any ({type(error).__name__}: {flat(error)}); "
            "expected data; pass data= or --data"
        ) from None
    code = (
        "from elbozoo.models.contract.entry import Program\n\n"
        f"x, _ = Program(program, columns=1).simulate({rows}, seed=0)\ndata = ez.load_data(x.reshape({rows}, -1))"
    )
    text = "No data were given, so the rows are drawn from the program itself, at the parameters with which it starts."
    return Source(_in_memory(load_data(x)), code, text)


# ---- brought ---------------------------------------------------------------------------------------------------------


def _brought(model: Any, data: Any, page: Path, options: Mapping[str, Any]) -> Source:
    arguments = _arguments(model, data, options)
    rows = _in_memory(load_data(data, **arguments))
    if rows.missing and not rows.x.isnan().any():
        arguments.pop("missing", None)
    if isinstance(data, str) and (data in NAMED or data.startswith(SIMULATE)):
        return Source(rows, _call(data, arguments), f"The rows are those of `{data}`.")
    if isinstance(data, str | os.PathLike):
        path = relative(Path(data).expanduser(), page.parent)
        return Source(rows, _call(path, arguments), f"The rows are those of the file `{Path(data).name}`.")
    # The code of a page cannot reach what is in the caller's memory.
    file = page.with_name(f"{page.stem}_data.csv")
    content = _frame(rows).to_csv(index=False).encode()
    if file.exists() and not page.exists() and file.read_bytes() != content:
        raise InvalidInput(
            f"{file}: found a file of that name which no page here has written, expected none, since the rows of the "
            "page go there; move it, pass its path as data, or choose another name for the page"
        )
    return Source(
        rows, _call(file.name, arguments), f"The rows lie in `{file.name}` beside this page.", (file, content)
    )


def _arguments(model: Any, data: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what :func:`load_data` has to be told so that ``model`` can be fitted: labels, and missing values."""
    cls = get_entry(model) if isinstance(model, str) else model
    if not (isinstance(cls, type) and issubclass(cls, Entry)):
        return {}
    roles = cls.Options.column_roles()
    given = {name: value for name, value in options.items() if name in cls.Options.model_fields}
    named = cls.Options.parse(given).columns_named()
    keys = [
        column
        for option, column in named.items()
        if roles[option].is_key and option in options and isinstance(column, str) and not is_position(column)
    ]
    found: dict[str, Any] = {"keys": keys} if keys else {}
    if cls.allows_missing and not isinstance(data, str):
        found["missing"] = True
    if any(roles[option].may_be_blank for option in named if option in options):
        found["missing_labels"] = True
    return found


def _call(source: str, arguments: Mapping[str, Any]) -> str:
    told = "".join(f", {name}={spelled(value)}" for name, value in arguments.items())
    return f"data = ez.load_data({spelled(source)}{told})"


def _in_memory(rows: Any) -> Dataset:
    if not isinstance(rows, Dataset):
        raise InvalidInput(
            f"{rows.name}: found rows that are not in memory, expected rows that a page can draw; "
            "take some of them, or load them with stream=False"
        )
    return rows


def _frame(rows: Dataset) -> pd.DataFrame:
    """Return the rows as a table that a file can hold, labels spelled out."""
    frame = pd.DataFrame(rows.x.numpy(), columns=rows.columns)
    for name, levels in rows.levels.items():
        frame[name] = [levels[int(code)] if code == code else None for code in frame[name]]
    return frame
