"""A rate-distortion curve with its picture: what the inference layer computes, ready to be looked at."""

from __future__ import annotations

from dataclasses import dataclass, fields

from matplotlib.figure import Figure

from elbozoo import plots
from elbozoo.inference.rate_distortion import RateDistortion as Results


@dataclass(frozen=True)
class RateDistortion(Results):
    """Fits of one model by one guide at several β, from several seeds each, with table and plot."""

    def plot(self) -> Figure:
        """Draw distortion against rate, nats per datum, a point for each fit.

        Returns
        -------
        Figure
            Of Matplotlib.
        """
        return plots.rate_distortion(self)


def curve_from_results(results: Results) -> RateDistortion:
    """Give the results of the inference layer their picture."""
    return RateDistortion(**{field.name: getattr(results, field.name) for field in fields(results)})
