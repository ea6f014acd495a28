"""Every name of the public interface is described: what it is, what goes in, what comes out, what is refused."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numpydoc.docscrape import get_doc_object
from numpydoc.validate import validate

import elbozoo
from elbozoo.models.contract.errors import InvalidInput, unknown_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("elbozoo", "elbozoo.models", "elbozoo.guides")
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception):: ([\w.]+)$", flags=re.MULTILINE)
REFUSALS = {unknown_name.__name__: InvalidInput.__name__}  # functions that make an error, and of which kind

# Codes of numpydoc's validation; the others are about form alone, which ruff's rules D look after.
CHECKS = {
    "GL07": "sections stand in their usual order",
    "GL08": "there is a docstring",
    "SS01": "it has a summary",
    "PR01": "every parameter is described",
    "PR02": "nothing else is described as one",
    "PR03": "in the order of the signature",
    "PR04": "with its type",
    "PR07": "in words",
    "RT01": "what is returned is described",
    "RT03": "in words",
    "YD01": "so is what is yielded",
}


def public_names() -> list[str]:
    """Names that the packages export, and those that the reference shows."""
    exported = {f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__}
    shown = DIRECTIVE.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert len(shown) > 10
    return sorted(exported | {name if name.startswith("elbozoo.") else f"elbozoo.{name}" for name in shown})


def of_name(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield public methods and properties of a class, its own and inherited ones, as far as they are elbozoo's."""
    for name in dir(cls):
        home = next(base for base in cls.__mro__ if name in vars(base)) if hasattr(cls, name) else None
        is_ours = home is not None and home.__module__.startswith(("elbozoo", __name__))
        value = getattr(cls, name, None)
        if is_ours and not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
            yield name, value


def fields(cls: type) -> set[str]:
    """Parameters of a class; its attributes describe those of a record, and descriptions those of options."""
    if "__init__" not in {name for base in cls.__mro__ if base.__module__ != "builtins" for name in vars(base)}:
        return set()
    found = {
        name for name, p in inspect.signature(cls).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    described = {name for name, field in getattr(cls, "model_fields", {}).items() if field.description}
    return found - described


def described(cls: type) -> set[str]:
    docs = [get_doc_object(base) for base in cls.__mro__ if base.__module__.startswith(("elbozoo", __name__))]
    sections = [doc[section] for doc in docs for section in ("Parameters", "Attributes")]
    entries = [entry.name for section in sections for entry in section if entry.desc]
    return {name.strip().lstrip("*") for entry in entries for name in entry.split(",")}


def raised(function: Any) -> set[str]:
    """Kinds of errors that a function raises by itself, as far as they are the user's."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = [node.exc.func for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    return {REFUSALS.get(name, name) for name in names} & {"InvalidInput", "NumericalFailure"}


def complaints(documented: Any) -> list[str]:
    """Say what a docstring lacks."""
    result = validate(get_doc_object(documented))
    found = [f"{code} {message}" for code, message in result["errors"] if code in CHECKS]
    if inspect.isclass(documented):
        found = [complaint for complaint in found if not complaint.startswith("PR01")]
        return found + [f"PR01 {name}" for name in sorted(fields(documented) - described(documented))]
    function = documented.fget if isinstance(documented, property) else documented
    sections = {entry.type for entry in get_doc_object(documented)["Raises"]}
    return found + [f"raises {name}" for name in sorted(raised(function) - sections)]


def every_public() -> dict[str, Any]:
    found = {name: of_name(name) for name in public_names()}
    classes = [(name, value) for name, value in found.items() if inspect.isclass(value)]
    return found | {f"{name}.{member}": value for name, cls in classes for member, value in members(cls)}


@pytest.mark.parametrize("name", PUBLIC := every_public())
def test_public_name_is_described(name: str) -> None:
    assert complaints(PUBLIC[name]) == []


def test_the_public_names_are_those_that_are_exported() -> None:
    assert {f"elbozoo.{name}" for name in elbozoo.__all__} <= set(PUBLIC)
    assert {
        "elbozoo.Fit.ledger",
        "elbozoo.Fit.parameters",
        "elbozoo.Comparison.summary",
        "elbozoo.guides.Guide.means",
    } <= set(PUBLIC)


# ---- negative controls -----------------------------------------------------------------------------------------------


def nothing(x):
    return x


def no_parameter(x: int) -> int:
    """Return x.

    Returns
    -------
    int
        The same.
    """
    return x


def no_words(x: int) -> int:
    """Return x.

    Parameters
    ----------
    x : int

    Returns
    -------
    int
    """
    return x


def another(x: int) -> None:
    """Do nothing.

    Parameters
    ----------
    y : int
        Another.
    """


def no_return(x: int) -> int:
    """Return x.

    Parameters
    ----------
    x : int
        A number.
    """
    return x


def no_refusal() -> None:
    """Refuse."""
    raise unknown_name("thing", "x", ["y"])


class Record:
    """A record.

    Attributes
    ----------
    one : int
        A number.
    """

    def __init__(self, one: int, two: int) -> None:
        self.one, self.two = one, two

    @property
    def total(self) -> int:
        return self.one + self.two


@pytest.mark.parametrize(
    ("documented", "codes"),
    [
        (nothing, {"GL08"}),
        (no_parameter, {"PR01"}),
        (no_words, {"PR07", "RT03"}),
        (another, {"PR01", "PR02"}),
        (no_return, {"RT01"}),
        (no_refusal, {"raises"}),
        (Record, {"PR01"}),
        (Record.total, {"GL08"}),
    ],
)
def test_what_is_lacking_is_found(documented: Any, codes: set[str]) -> None:
    assert {complaint.split()[0] for complaint in complaints(documented)} == codes


def test_members_of_a_class_are_found() -> None:
    assert [name for name, _ in members(Record)] == ["total"]
