"""What a program of the user's must do before anything is fitted to it: run, in its plate, in its rows' precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import stochastic_nodes


def check_program(program: Callable[[Batch], Any], batch: Batch) -> None:
    """Run ``program`` once on ``batch``.

    Raises
    ------
    InvalidInput
        If it raises, or draws in another precision than its rows have: the evidence is computed in theirs.
    """
    try:
        with isolated(0), torch.no_grad(), pyro.validation_enabled(False):
            trace = poutine.trace(program).get_trace(batch)
    except InvalidInput:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise InvalidInput(
            f"the program raised {type(error).__name__} on {len(batch.x)} rows: {said}; expected it to run as "
            "program(batch)"
        ) from error
    for name, node in stochastic_nodes(trace):
        if node["value"].is_floating_point() and node["value"].dtype != batch.x.dtype:
            raise InvalidInput(
                f"site {name!r} of the program: found draws in {node['value'].dtype}, expected {batch.x.dtype} as the "
                "rows are; make its numbers from those of the batch, as in dist.Normal(batch.x.new_zeros(2), 1.0)"
            )
