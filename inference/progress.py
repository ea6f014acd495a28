"""Progress on standard error: a bar where it is a terminal, silence where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Report(Protocol):
    """Takes the number of steps done and a short text about where the fit stands."""

    def __call__(self, done: int, text: str = "") -> None:
        """Show the state of the work."""
        ...


@contextmanager
def progress_bar(title: str, total: int, shown: bool = True) -> Iterator[Report]:
    """Show a bar of ``total`` steps on standard error while the block runs.

    Nothing is written where ``shown`` is false or standard error is not a terminal.
    """
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda done, text="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, text="")

        def report(done: int, text: str = "") -> None:
            progress.update(task, completed=done, text=text)

        yield report
