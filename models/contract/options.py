"""Validated options: typed, bounded, and with errors of one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from elbozoo.models.contract.errors import InvalidInput, unknown_name

__all__ = ["Field", "Options"]


class Options(BaseModel):
    """Base of all options: unknown names are refused, values are frozen once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate ``values``; strings as they come from a command line are converted.

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

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """Return name, type, default, bounds and description of each option, as plain values."""
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


def type_name(field: FieldInfo) -> str:
    """Readable type of an option: ``int``, ``float`` or its choices as ``a | b``."""
    annotation = field.annotation
    choices = getattr(annotation, "__args__", None)
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


def _one_line(cls: type[Options], error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "options"
    field = cls.model_fields.get(name)
    expected = " ".join(filter(None, [type_name(field), bounds(field)])) if field else first["msg"]
    return f"option {name}: found {first['input']!r}, expected {expected}"
