"""Programs run with a seed of their own and leave nothing behind: no random state, no global parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.settings
import torch
from pyro.util import get_rng_state, set_rng_state

SEEDS = 2**32  # NumPy takes no others; seeds derived from one another wrap around


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run Pyro programs inside the block from ``seed``, with parameters that stay in their modules.

    The caller's random state and Pyro's global parameter store are as before when the block ends.
    """
    state = random_state()
    with pyro.get_param_store().scope(), private_parameters():
        pyro.set_rng_seed(seed % SEEDS)
        try:
            yield
        finally:
            set_random_state(state)


def random_state() -> dict[str, Any]:
    """Return the state of every source of random numbers: ``random``, ``numpy``, and ``torch`` by device.

    Pyro's own function leaves out accelerators, whose generators a seed sets as well. One that nothing has used yet
    has no state to keep.
    """
    state = get_rng_state()
    devices = {"cpu": state["torch"]}
    if torch.cuda.is_initialized():
        devices |= {f"cuda:{n}": value for n, value in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        devices["mps"] = torch.mps.get_rng_state()
    return {**state, "torch": devices}


def set_random_state(state: dict[str, Any]) -> None:
    """Set what :func:`random_state` returned."""
    devices = state["torch"]
    set_rng_state({**state, "torch": devices["cpu"]})
    for device, value in devices.items():
        if device == "mps":
            torch.mps.set_rng_state(value)
        elif device != "cpu":
            torch.cuda.set_rng_state(value, device)


def private_parameters() -> Any:
    """Context in which a PyroModule is made so that its parameters can stay its own; see ``pyro.settings``."""
    return pyro.settings.context(module_local_params=True)
