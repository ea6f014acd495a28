"""Plate diagrams of programs: what is drawn from what, what is observed, and what repeats."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from elbozoo.inference.method import program_entry
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, Program
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.sites import latent_sites
from elbozoo.notation import entry_of, parameter_symbols
from elbozoo.notation.structure import Structure, structure_of

if TYPE_CHECKING:
    import graphviz  # type: ignore[import-untyped]

    from elbozoo.plots import Picture

Engine = Literal["auto", "graphviz", "matplotlib"]

ROWS = 4  # of an entry that is drawn without data


def render_model(
    model: str | Entry | type[Entry] | Callable[[Batch], Any], data: Any = None, *, engine: Engine = "auto"
) -> graphviz.Digraph | Picture:
    """Draw the plate diagram of a program, read off its trace.

    An ellipse is a random variable, shaded where it is observed, half-shaded where it is observed in some rows, dashed
    where it is computed from others; a box is given and not explained, and a dot is a parameter. A plate repeats what
    is in it. The small print is the distribution, behind the site's name where its symbol is another.

    Parameters
    ----------
    model : str, Entry, type or callable
        Name of an entry, its class, an entry, or a program ``model(batch)`` of your own.
    data : optional
        Whatever :func:`elbozoo.load_data` takes. A program of your own needs it; of an entry it sets the options that
        the data decide, and the number at the plate.
    engine : str
        ``graphviz`` lays the picture out by Graphviz, ``matplotlib`` without; ``auto`` takes Graphviz where its program
        ``dot`` and its Python package are there.

    Returns
    -------
    graphviz.Digraph or Picture
        Both show themselves in a notebook. The first writes files by ``render``, the second by ``savefig``.

    Raises
    ------
    InvalidInput
        For an unknown model, a program without data or without an observed site ``"x"``, or Graphviz where it is not.

    Examples
    --------
    >>> import elbozoo as ez
    >>> diagram = ez.render_model("ppca", engine="matplotlib")
    >>> type(diagram).__name__
    'Picture'
    """
    structure = structure_for(model, data)
    if _by_graphviz(engine):
        from elbozoo.plates.with_graphviz import digraph

        return digraph(structure)
    from elbozoo.plates.with_matplotlib import draw

    return draw(structure)


def structure_for(model: Any, data: Any = None) -> Structure:
    """Return the graph that :func:`render_model` draws."""
    x = None if data is None else _rows_of(data)
    entry = _entry(model, x)
    arranged = entry.simulate(ROWS, seed=0)[0] if x is None else type(entry).arrange(x.to(entry.dtype), entry.options)
    rows = None if x is None else len(arranged)
    shown = arranged if isinstance(entry, Program) else arranged[:ROWS]
    return structure_of(entry, shown, parameter_symbols(entry), rows)


def _rows_of(data: Any) -> Tensor:
    from elbozoo.data import Dataset, load_data

    loaded = load_data(data)
    if not isinstance(loaded, Dataset):
        raise InvalidInput("found a data set that stays on disk, expected rows in memory; a few of them are enough")
    return loaded.x


def _entry(model: Any, x: Tensor | None) -> Entry:
    is_class = isinstance(model, type) and issubclass(model, Entry)
    if isinstance(model, str) or is_class:
        example = entry_of(model)
        return example if x is None else type(example).from_data(x)
    if isinstance(model, Entry):
        return model
    if x is None:
        raise InvalidInput("found a program of your own and no data, expected both; give render_model(model, data)")
    entry = program_entry(model, x)
    latent_sites(entry, Batch.full(x))  # says what is wrong with a program that is none
    return entry


def _by_graphviz(engine: str) -> bool:
    if engine not in ("auto", "graphviz", "matplotlib"):
        raise InvalidInput(f"engine: found {engine!r}, expected auto, graphviz or matplotlib")
    missing = [
        what
        for what, found in (
            ("the program dot", shutil.which("dot")),
            ("the Python package graphviz", importlib.util.find_spec("graphviz")),
        )
        if not found
    ]
    if engine == "graphviz" and missing:
        raise InvalidInput(
            f"engine=graphviz: found no {' and no '.join(what.removeprefix('the ') for what in missing)}, expected "
            "Graphviz; install it, or leave engine out for a picture by matplotlib"
        )
    return engine != "matplotlib" and not missing
