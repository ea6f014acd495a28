"""Every test begins in the same state of Pyro and torch, and must leave that state as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Start with an empty parameter store, validation on and seed 0; fail if the test leaves a trace."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    dtype = torch.get_default_dtype()
    with pyro.validation_enabled(True):
        yield
    left_over = sorted(pyro.get_param_store().keys())
    changed_dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    assert not left_over, f"the test left {left_over} in Pyro's global parameter store; expected it empty"
    assert changed_dtype == dtype, f"the test left the default dtype {changed_dtype}; expected {dtype}"
