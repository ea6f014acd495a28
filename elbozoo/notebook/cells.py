"""Cells of a page: Markdown, or Python that is run once in order, all in one namespace."""

from __future__ import annotations

import ast
import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from elbozoo.models.contract.isolation import isolated

DPI = 110
WIDTH = 100  # of printed tables, in characters
Run = Mapping[str, Any]
Words = str | Callable[[Run], str]
Content = str | bytes


@dataclass(frozen=True)
class Text:
    """Markdown, or a function that makes it from the names that the code before it has defined."""

    source: Words


@dataclass(frozen=True)
class Code:
    """Python source that draws one picture at most.

    Attributes
    ----------
    source : str
        The code.
    alt : str or callable
        What the picture shows, for those who do not see it; by default its titles and axes.
    caption : str or callable
        Markdown below the picture.
    """

    source: str
    alt: Words = ""
    caption: Words = ""


class Output(NamedTuple):
    """What a code cell gave: its kind, and its content by MIME type as in the notebook format."""

    kind: Literal["stream", "execute_result", "display_data"]
    data: dict[str, Content]

    @property
    def picture(self) -> tuple[str, bytes] | None:
        """The MIME type and the content of the picture that this is, None if it is none."""
        for kind in ("image/svg+xml", "image/png"):
            if kind in self.data:
                content = self.data[kind]
                return kind, content if isinstance(content, bytes) else content.encode()
        return None


class Executed(NamedTuple):
    """A cell as it stands on the page; ``outputs`` is None for text."""

    source: str
    outputs: list[Output] | None = None
    alt: str = ""
    caption: str = ""


def execute(
    cells: Iterable[Text | Code], folder: Path | None = None, report: Callable[[str], None] | None = None
) -> list[Executed]:
    """Run the code of ``cells`` in one namespace and write the texts that depend on it.

    Random state, matplotlib's settings, the working directory and Pyro's parameter store are afterwards as they were.

    Parameters
    ----------
    cells : iterable of Text and Code
        The page.
    folder : Path, optional
        Working directory of the code: that of the page, as a notebook has it.
    report : callable, optional
        Called with the first line of each code cell before it runs.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    done = []
    with _untouched(folder):
        for cell in cells:
            if report is not None and isinstance(cell, Code):
                report(cell.source.strip().splitlines()[0])
            done.append(_executed(cell, namespace))
    return done


@contextmanager
def _untouched(folder: Path | None) -> Iterator[None]:
    there = contextlib.nullcontext() if folder is None else contextlib.chdir(folder)
    quiet = warnings.catch_warnings()
    with isolated(0), matplotlib.rc_context(), plt.ioff(), pd.option_context("display.width", WIDTH), there, quiet:
        # Warnings go to standard error, where they would break the bar of progress and reach no page.
        warnings.simplefilter("ignore")
        yield


def _executed(cell: Text | Code, namespace: dict[str, Any]) -> Executed:
    if isinstance(cell, Text):
        return Executed(_said(cell.source, namespace))
    outputs, titles = _run(cell.source, namespace)
    return Executed(cell.source.strip(), outputs, _said(cell.alt, namespace) or titles, _said(cell.caption, namespace))


def _said(words: Words, run: Run) -> str:
    return (words if isinstance(words, str) else words(run)).strip()


def _run(source: str, namespace: dict[str, Any]) -> tuple[list[Output], str]:
    """Execute ``source`` as a notebook would.

    Returns
    -------
    outputs : list of Output
        What it prints, the value of a last expression, the figures it opened.
    titles : str
        What the last picture says of itself.
    """
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    opened_before = set(plt.get_fignums())
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "<page>", "exec"), namespace)
        value = eval(compile(last, "<page>", "eval"), namespace) if last else None
    outputs = [Output("stream", {"text/plain": printed.getvalue()})] if printed.getvalue() else []
    titles = _titles(value)
    opened = [plt.figure(number) for number in sorted(set(plt.get_fignums()) - opened_before)]
    # What drawing returns, such as the lines of a plot, is of no use beside the picture itself.
    if value is not None and not (opened and not isinstance(value, Figure) and _is_of_a_drawing(value)):
        outputs.append(Output("execute_result", _representations(value)))
    for figure in opened:
        titles = _titles(figure)
        if figure is not value:
            outputs.append(Output("display_data", _representations(figure)))
        plt.close(figure)
    return outputs, titles


def _is_of_a_drawing(value: Any) -> bool:
    first = value[0] if isinstance(value, list | tuple) and value else value
    return type(first).__module__.startswith("matplotlib.")


def _titles(value: Any) -> str:
    if not isinstance(value, Figure):
        return ""
    parts = [value.get_suptitle()]
    for axes in value.axes:
        # The title may stand at the left as well.
        title = axes.get_title() or axes.get_title("left")
        against = " against ".join(filter(None, [axes.get_ylabel(), axes.get_xlabel()]))
        parts.append(": ".join(filter(None, [title, against])))
    return "; ".join(filter(None, parts)).replace("\n", " ")


def _representations(value: Any) -> dict[str, Content]:
    found: dict[str, Content] = {"text/plain": repr(value)}
    if isinstance(value, Figure):
        found["image/png"] = _png(value)
    elif hasattr(value, "_repr_mimebundle_"):
        bundle = value._repr_mimebundle_(include=None, exclude=None) or {}
        found |= {kind: content for kind, content in bundle.items() if isinstance(content, str | bytes)}
    elif hasattr(value, "_repr_html_"):
        found["text/html"] = value._repr_html_()
    return found


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    return picture.getvalue()
