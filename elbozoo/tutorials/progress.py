"""Progress of a page on standard error: a bar of its cells, where it is a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

WORDS = 48  # of a cell's code, in characters


@contextmanager
def page_progress(title: str, cells: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """Show a bar of ``cells`` code cells while the block runs.

    Fits inside have bars of their own, of which a terminal can show one at a time: what they write goes nowhere.
    """
    console = Console(file=sys.stderr)
    if not (shown and console.is_terminal):
        with redirect_stderr(io.StringIO()):
            yield lambda text: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with (
        Progress(*columns, console=console, transient=True, redirect_stderr=False, redirect_stdout=False) as bar,
        redirect_stderr(io.StringIO()),
    ):
        task = bar.add_task(title, total=cells, completed=-1, text="")
        yield lambda text: bar.update(task, advance=1, text=text[:WORDS])
