"""Programs of the user's, by the file that holds them: ``path/to/file.py:function``."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.words import flat

Program = type[Entry] | Callable[..., Any]
# A package of no file, so that a program called random.py does not stand in the way of Python's own.
PACKAGE = "elbozoo_programs"
SPELLING = "path/to/file.py:function"
_RUNNING: set[Path] = set()  # files that are being imported


class Place(NamedTuple):
    """Where a program is: a file, and the name that it has there."""

    path: Path
    name: str

    def seen_from(self, folder: Path) -> str:
        """Return the place as one reads it off from ``folder``."""
        return f"{relative(self.path, folder)}:{self.name}"


def spelled(value: Any) -> str:
    """Return a value as Python spells it, strings and lists of them between double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | list) else repr(value)


def relative(path: Path, folder: Path) -> str:
    """Return ``path`` as it is spelled from ``folder``, with slashes; whole where no way leads there."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # on another drive
        return path.resolve().as_posix()


def is_place(model: object) -> bool:
    """Whether ``model`` spells the place of a program rather than the name of an entry."""
    return isinstance(model, str) and (".py:" in model or model.endswith(".py") or "/" in model)


def load_program(spelled: str) -> Program:
    """Return the program at ``path/to/file.py:function``.

    Parameters
    ----------
    spelled : str
        File and name: of a function ``program(batch)``, of a module that can be called so, of a class of such modules
        that takes no arguments, or of a subclass of ``Entry``. The file is executed, its folder on the path of imports.

    Returns
    -------
    callable or type
        What :func:`fit` and :func:`compare` take as a model.

    Raises
    ------
    InvalidInput
        If there is no such file or name, if it cannot be called, or if the file raises an exception.

    Examples
    --------
    >>> import pathlib
    >>> import tempfile
    >>> import elbozoo as ez
    >>> code = '''
    ... import pyro
    ... from pyro import distributions as dist
    ...
    ... def program(batch):
    ...     with pyro.plate("data", batch.total, subsample=batch.index):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         return pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=batch.x)
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "mine.py")
    ...     length = file.write_text(code)
    ...     program = ez.load_program(f"{file}:program")
    >>> program.__name__
    'program'
    """
    place = parse(spelled)
    module = _executed(place.path)
    if not hasattr(module, place.name):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise unknown_name(f"function of {flat(place.path.name)}", place.name, names)
    return _program(getattr(module, place.name), spelled)


def parse(spelled: str) -> Place:
    """Take ``path/to/file.py:function`` apart.

    Raises
    ------
    InvalidInput
        If it is spelled in another way, or there is no such file.
    """
    path, colon, name = spelled.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise InvalidInput(f"model {flat(spelled)}: expected {SPELLING}; name the function after a colon")
    file = Path(path).expanduser()
    if not file.is_file():
        raise InvalidInput(f"model {flat(spelled)}: found no file {flat(path)}, expected one; mind the folder")
    return Place(file, name)


def place_of(program: Program) -> Place:
    """Return where ``program`` is, so that a page can load it.

    Raises
    ------
    InvalidInput
        If it is not at the top of a file.
    """
    name = getattr(program, "__qualname__", "")
    module = inspect.getmodule(program)
    file = None if module is None else getattr(module, "__file__", None)
    if file is None or getattr(module, name, None) is not program:
        raise InvalidInput(
            f"found the program {name or type(program).__name__!r}, expected one at the top of a file, since a page "
            f"has to load it; save it in a file and pass {SPELLING!r}"
        )
    return Place(Path(file), name)


def _program(found: Any, spelled: str) -> Program:
    if inspect.isclass(found) and not issubclass(found, Entry):
        try:
            found = found()
        except TypeError as error:
            raise InvalidInput(
                f"model {flat(spelled)}: found a class that cannot be called without arguments ({flat(error)}), "
                "expected a program; name an instance of it in the file"
            ) from None
    if not callable(found):
        raise InvalidInput(f"model {flat(spelled)}: found a {type(found).__name__}, expected a callable program(batch)")
    program: Program = found
    return program


def _executed(path: Path) -> ModuleType:
    """Return the file as a module.

    Raises
    ------
    InvalidInput
        With the first line of what the file raises.
    """
    file = path.resolve()
    if file in _RUNNING:
        raise InvalidInput(
            f"{flat(path)}: found a file that loads itself while it is imported, expected definitions; put what it "
            'does under if __name__ == "__main__":'
        )
    name = f"{PACKAGE}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # What defines classes looks its own module up.
    sys.modules[name] = module
    with _importing_from(path.resolve().parent):
        _RUNNING.add(file)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            sys.modules.pop(name, None)
            raise InvalidInput(
                f"{flat(path)}: found {type(error).__name__}: {flat(error)} while it was imported; expected a "
                "file that Python can run; mend it and try again"
            ) from error
        finally:
            _RUNNING.discard(file)
    return module


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let the file import what lies beside it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
