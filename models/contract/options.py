"""Validated options: typed, bounded, and with errors of one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from elbozoo.models.contract.errors import InvalidInput, unknown_name

__all__ = ["Column", "Field", "KeyColumn", "LabelColumn", "Options"]


@dataclass(frozen=True)
class ColumnRole:
    """Marks an option that names a column of the data.

    Attributes
    ----------
    is_key : bool
        Whether the column holds labels, such as the names of sequences, rather than numbers.
    may_be_blank : bool
        Whether a row may have no label there.
    """

    is_key: bool
    may_be_blank: bool = False


Column = Annotated[int | str, ColumnRole(is_key=False)]
KeyColumn = Annotated[int | str, ColumnRole(is_key=True)]
LabelColumn = Annotated[int | str, ColumnRole(is_key=True, may_be_blank=True)]


class Options(BaseModel):
    """Base of all options: unknown names are refused, values are frozen once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate values by name; strings as they come from a command line are converted.

        Parameters
        ----------
        values : mapping
            Values by name of the option.

        Returns
        -------
        Options
            Of the class that was asked, with defaults for what was not given.

        Raises
        ------
        InvalidInput
            For an unknown name (with close matches), a wrong type or a value out of range.
        """
        for name in values:
            if name not in cls.model_fields:
                raise unknown_name("option", name, cls.model_fields)
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InvalidInput(_one_line(cls, error)) from None

    def at_positions(self, names: Sequence[str]) -> Self:
        """Return the options with every column that is named replaced by its position.

        Parameters
        ----------
        names : sequence of str
            Names of the columns of the data.

        Returns
        -------
        Options
            A copy.

        Raises
        ------
        InvalidInput
            For a name or a position that is not there, or one column in two roles.
        """
        found = {option: _position(option, value, names) for option, value in self.columns_named().items()}
        taken: dict[int, str] = {}
        for option, position in found.items():
            other = taken.setdefault(position % len(names), option)
            if other != option:
                raise InvalidInput(
                    f"options {other} and {option}: found column {names[position]!r} for both, expected two columns"
                )
        return self.model_copy(update=found)

    def columns_named(self) -> dict[str, int | str]:
        """Return the columns that the options name, by option.

        Returns
        -------
        dict of int or str
            By option: a position or a name.
        """
        roles = type(self).column_roles()
        return {option: getattr(self, option) for option in roles if getattr(self, option) is not None}

    @classmethod
    def column_roles(cls) -> dict[str, ColumnRole]:
        """Return the options that name columns, with what those hold.

        Returns
        -------
        dict of ColumnRole
            By option.
        """
        roles = {name: _role(field) for name, field in cls.model_fields.items()}
        return {name: role for name, role in roles.items() if role is not None}

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """Return name, type, default, bounds and description of each option, as plain values.

        Returns
        -------
        list of dict
            With the keys ``option``, ``type``, ``default``, ``bounds`` and ``description``.
        """
        return [
            {
                "option": name,
                "type": type_name(field),
                "default": field.default,
                "bounds": bounds(field),
                "description": field.description or "",
            }
            for name, field in cls.model_fields.items()
        ]


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with NumPy's numbers as Python's, which can be written down."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def type_name(field: FieldInfo) -> str:
    """Readable type of an option: ``int``, ``float`` or its choices as ``a | b``."""
    annotation = field.annotation
    choices = getattr(annotation, "__args__", None)
    if _role(field) is not None:
        return "column | none" if type(None) in (choices or ()) else "column"
    if choices is None:
        return getattr(annotation, "__name__", str(annotation))
    return " | ".join("none" if c is type(None) else getattr(c, "__name__", str(c)) for c in choices)


def bounds(field: FieldInfo) -> str:
    """Readable bounds of an option, such as ``>= 1``; empty where it has none."""
    symbols = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{symbol} {getattr(m, key)}" for m in field.metadata for key, symbol in symbols.items() if hasattr(m, key)
    ]
    return ", ".join(found)


def _role(field: FieldInfo) -> ColumnRole | None:
    # Pydantic takes the marks of a plain annotation apart and leaves those inside a union where they are.
    inside = [mark for part in get_args(field.annotation) for mark in getattr(part, "__metadata__", ())]
    return next((mark for mark in [*field.metadata, *inside] if isinstance(mark, ColumnRole)), None)


def is_position(text: str) -> bool:
    """Whether ``text`` spells a position, as a command line gives it."""
    return text.removeprefix("-").isdecimal()


def _position(option: str, value: int | str, names: Sequence[str]) -> int:
    if isinstance(value, str):
        if value in names:
            return list(names).index(value)
        if not is_position(value):
            raise unknown_name(f"column in option {option}", value, names)
        value = int(value)
    if not -len(names) <= value < len(names):
        raise InvalidInput(
            f"option {option}: found position {value}, expected a column's name or a position "
            f"from {-len(names)} to {len(names) - 1}"
        )
    return value


def _one_line(cls: type[Options], error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "options"
    field = cls.model_fields.get(name)
    expected = " ".join(filter(None, [type_name(field), bounds(field)])) if field else first["msg"]
    return f"option {name}: found {first['input']!r}, expected {expected}"
