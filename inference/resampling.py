"""Binary pixels that are drawn anew for every step of training, so that no one draw is learned by heart."""

from __future__ import annotations

import torch
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry


class PixelDraws:
    """Takes the rows of a minibatch and returns them with their pixels drawn anew; model and guide see the same draw.

    The draws come from torch's global random state.

    Parameters
    ----------
    entry : Entry
        The model, which says how a table is arranged.
    x : Tensor (N, D)
        The table, with one draw of its pixels.
    intensities : Tensor (N, D)
        Probability of a 1; NaN in columns that are no pixels, which stay as they are in ``x``.
    """

    def __init__(self, entry: Entry, x: Tensor, intensities: Tensor) -> None:
        self.entry = entry
        self.x = x.to(entry.dtype)
        self.intensities = intensities.to(entry.dtype)
        # Where a datum is a row, the rows of a minibatch are enough; stacks of rows are made from the whole table.
        self.is_by_row = entry.arrange(x, entry.options) is x

    def __call__(self, batch: Batch) -> Batch:
        """Return ``batch`` with new pixels."""
        index = batch.index.cpu()
        if self.is_by_row:
            rows = _drawn(self.x[index], self.intensities[index])
        else:
            rows = self.entry.arrange(_drawn(self.x, self.intensities), self.entry.options)[index]
        return batch._replace(x=rows.to(batch.x))


def _drawn(x: Tensor, intensities: Tensor) -> Tensor:
    is_pixel = ~intensities.isnan()
    return torch.where(is_pixel, torch.bernoulli(intensities.nan_to_num()), x)
