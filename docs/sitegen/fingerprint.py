"""What a run depends on, as a digest: the sources it can reach, the versions of what they stand on, and its task."""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import elbozoo

HOME = Path(elbozoo.__file__).parent
STANDS_ON = ("torch", "pyro-ppl", "numpy", "scipy", "pandas", "matplotlib", "arviz")


def digest(modules: Iterable[str], *task: object) -> str:
    """Return 16 hexadecimal digits that change with ``task`` and with all that importing ``modules`` may load.

    Parameters
    ----------
    modules : iterable of str
        Names of modules of elbozoo from which the others are found, by the imports in their sources.
    *task : object
        What else decides the result; told apart by ``repr``.
    """
    hashed = hashlib.sha256(repr((platform.python_version(), *map(version, STANDS_ON), *task)).encode())
    for name, content in sorted(_reachable(modules).items()):
        hashed.update(name.encode())
        hashed.update(content)
    return hashed.hexdigest()[:16]


def _reachable(modules: Iterable[str]) -> dict[str, bytes]:
    """Return the sources of ``modules`` and of all that they import from elbozoo, by module name."""
    found: dict[str, bytes] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        path = _file(name)
        if path is None or name in found:
            continue
        found[name], imported = _read(path)
        todo += imported
        # A module is loaded through the packages that it lies in.
        todo += [name.rpartition(".")[0]] if "." in name else []
    return found


@functools.cache
def _read(path: Path) -> tuple[bytes, tuple[str, ...]]:
    """Return a source and what it may import."""
    content = path.read_bytes()
    return content, tuple(dict.fromkeys(_names(ast.parse(content))))


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield what may be a module: what is imported from a package may be one or a name in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(name: str) -> Path | None:
    """Return the source of a module of elbozoo, or None for anything else."""
    first, *rest = name.split(".")
    if first != "elbozoo":
        return None
    folder = HOME.joinpath(*rest)
    candidates = (folder / "__init__.py", folder.with_suffix(".py")) if rest else (HOME / "__init__.py",)
    return next((path for path in candidates if path.exists()), None)
