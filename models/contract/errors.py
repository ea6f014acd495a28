"""Errors that name what was found, what was expected and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InvalidInput(ValueError):
    """A mistake in what the user asked for or brought; its message is one line.

    The command line turns it into that line on standard error and exit status 2.

    Parameters
    ----------
    message : str
        What was found, what was expected, and what to do; all after its first line is dropped.
    """

    def __init__(self, message: str) -> None:
        # Pyro adds a table of shapes to the message of every ValueError that leaves a traced program.
        super().__init__(message.partition("\n")[0])


class NumericalFailure(ArithmeticError):
    """A computation left the finite numbers, or broke an inequality that must hold.

    The message names the step, the site and what to try.
    """


def unknown_name(what: str, found: str, known: Iterable[str]) -> InvalidInput:
    """Error for an unknown name, listing close matches first and otherwise every known name.

    Parameters
    ----------
    what : str
        What the name was meant to name, such as ``"model"``.
    found : str
        The name that was given.
    known : iterable of str
        The names that exist.
    """
    names = sorted(known)
    close = difflib.get_close_matches(found.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in close)}?" if close else f"known: {', '.join(names)}"
    return InvalidInput(f"unknown {what} {found!r}; {hint}")
