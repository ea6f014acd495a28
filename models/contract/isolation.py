"""Programs run with a seed of their own and leave nothing behind: no random state, no global parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.settings
from pyro.util import get_rng_state, set_rng_state

SEEDS = 2**32  # NumPy takes no others; seeds derived from one another wrap around


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run Pyro programs inside the block from ``seed``, with parameters that stay in their modules.

    The caller's random state and Pyro's global parameter store are as before when the block ends.
    """
    state = get_rng_state()
    with pyro.get_param_store().scope(), private_parameters():
        pyro.set_rng_seed(seed % SEEDS)
        try:
            yield
        finally:
            set_rng_state(state)


def private_parameters() -> Any:
    """Context in which a PyroModule is made so that its parameters can stay its own; see ``pyro.settings``."""
    return pyro.settings.context(module_local_params=True)
