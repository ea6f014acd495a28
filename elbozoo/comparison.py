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
    image_shape : tuple of int, or None
        Shape of a row where the data say that it is an image: (height, width), or with the channels in front.
    """

    labels: Tensor | None = None
    image_shape: tuple[int, ...] | None = None

    def plot(self) -> Figure:
        """Draw objective and evidence against steps beside the ledger as stacked bars.

        Returns
        -------
        Figure
            Of Matplotlib.
        """
        return plots.overview(self)

    def report(self, path: str | Path) -> Path:
        """Write tables, charts and words as one HTML page that needs nothing else, or as Markdown for a README.

        Parameters
        ----------
        path : path
            Page to write, ending in ``.html`` or ``.md``; beside the latter the pictures lie in ``PAGE_files``.

        Returns
        -------
        Path
            The page.

        Raises
        ------
        InvalidInput
            For another ending, or if the page cannot be written.
        """
        return report.write(self, path)

    def save(self, directory: str | Path) -> Path:
        """Write tables, fits, plots, ``report.html`` and ``report.md``.

        Parameters
        ----------
        directory : str or path
            Folder for the files; it is made where there is none.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        InvalidInput
            If it cannot be written.
        """
        folder = super().save(directory)
        for name, figure in plots.figures(self).items():
            plots.save(figure, folder / f"{name}.png")
        for name in ("report.html", "report.md"):
            self.report(folder / name)
        return folder


def from_results(
    results: Results, labels: Tensor | None = None, image_shape: tuple[int, ...] | None = None
) -> Comparison:
    """Give the results of the inference layer their pictures."""
    of_results = {field.name: getattr(results, field.name) for field in fields(results)}
    return Comparison(**of_results, labels=labels, image_shape=image_shape)
