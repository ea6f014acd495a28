"""A comparison with its pictures: what the inference layer computes, ready to be looked at."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from elbozoo import plots, report
from elbozoo.inference.comparison import Comparison as Results


@dataclass(frozen=True)
class Comparison(Results):
    """Fits of several methods from several seeds on the same rows, with plot and report.

    Attributes
    ----------
    labels : Tensor (N,) or None
        Class of each row where the data have classes; they colour pictures, and no method sees them.
    """

    labels: Tensor | None = None

    def plot(self) -> Figure:
        """Draw objective and evidence against steps beside the ledger as stacked bars."""
        return plots.overview(self)

    def report(self, path: str | Path) -> Path:
        """Write a self-contained HTML page with table, curves, ledger and latent space, and return its path."""
        return report.write_html(self, path)

    def save(self, directory: str | Path) -> Path:
        """Write tables, fits, plots and ``report.html`` to ``directory`` and return it."""
        folder = super().save(directory)
        for name, figure in plots.figures(self).items():
            plots.save(figure, folder / f"{name}.png")
        self.report(folder / "report.html")
        return folder


def from_results(results: Results, labels: Tensor | None = None) -> Comparison:
    """Give the results of the inference layer their pictures."""
    return Comparison(**{field.name: getattr(results, field.name) for field in fields(results)}, labels=labels)
