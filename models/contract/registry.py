"""The registry is the folder: every module directly in ``elbozoo/models`` is an entry."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import pandas as pd

from elbozoo.models.contract.entry import Entry, capabilities
from elbozoo.models.contract.errors import unknown_name
from elbozoo.models.contract.sites import LatentSite

PACKAGE = "elbozoo.models"
FOLDER = Path(__file__).resolve().parent.parent


def entry_names() -> list[str]:
    """Return the names of all entries, sorted; reads the folder and imports nothing.

    Returns
    -------
    list of str
        Names of the files with dashes, such as ``"gaussian-mixture"``.

    Examples
    --------
    >>> from elbozoo.models import entry_names
    >>> "ppca" in entry_names()
    True
    """
    modules = (m.name for m in pkgutil.iter_modules([str(FOLDER)]) if not m.ispkg)
    return sorted(name.replace("_", "-") for name in modules)


@functools.cache
def get_entry(name: str) -> type[Entry]:
    """Return the entry class called ``name``.

    Parameters
    ----------
    name : str
        Name of the entry, as :func:`entry_names` lists it.

    Returns
    -------
    type
        A subclass of :class:`Entry`; the same one for the same name.

    Raises
    ------
    InvalidInput
        For an unknown name, with close matches.
    ImportError
        If the entry's file does not hold exactly one entry of the file's name.

    Examples
    --------
    >>> from elbozoo.models import get_entry
    >>> get_entry("ppca").__name__
    'PPCA'
    """
    if name not in entry_names():
        raise unknown_name("model", name, entry_names())
    stem = name.replace("-", "_")
    module = importlib.import_module(f"{PACKAGE}.{stem}")
    return entry_of(module.__name__, vars(module))


def entry_of(module_name: str, namespace: dict[str, object]) -> type[Entry]:
    """Return the one entry that the module defines, or refuse to load it."""
    stem = module_name.rpartition(".")[2]
    found = [
        value
        for value in namespace.values()
        if inspect.isclass(value) and issubclass(value, Entry) and value.__module__ == module_name
    ]
    wanted = stem.replace("_", "")
    if len(found) != 1 or found[0].__name__.lower() != wanted:
        names = [cls.__name__ for cls in found]
        raise ImportError(
            f"{module_name} defines the entries {names}; expected exactly one, named like its file {stem}.py"
        )
    if not (namespace.get("__doc__") or "").strip():  # type: ignore[attr-defined]
        raise ImportError(f"{module_name} has no docstring; expected the entry's page: story, equations, references")
    return found[0]


def list_models() -> pd.DataFrame:
    """Return a table of all entries: name, summary, latent variable, capabilities.

    Returns
    -------
    DataFrame
        Indexed by ``model``, with ``summary``, ``latent`` (local or global, continuous or discrete) and
        ``capabilities``.

    Examples
    --------
    >>> import elbozoo as ez
    >>> models = ez.list_models()
    >>> models.loc["gaussian-mixture", "latent"]
    'local discrete'
    >>> models.loc["ppca", "capabilities"]
    'oracle, posterior, EM, closed form, quadrature, simulation'
    """
    rows = []
    for name in entry_names():
        entry = get_entry(name)
        example = entry.example()
        sites = example.latent_sites()
        rows.append(
            {
                "model": name,
                "summary": entry.summary(),
                "latent": ", ".join(dict.fromkeys(_kind(site) for site in sites)) or "none",
                "capabilities": ", ".join(capabilities(example)),
            }
        )
    return pd.DataFrame(rows).set_index("model")


def _kind(site: LatentSite) -> str:
    return f"{'local' if site.is_local else 'global'} {'discrete' if site.is_discrete else 'continuous'}"
