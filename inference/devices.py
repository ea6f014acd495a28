"""Where a fit runs: the CPU, a CUDA device or Apple's GPU.

The random numbers of two devices differ, and so do the last digits of their sums: a seed gives the same fit again on
the same machine and the same device. Whatever was fitted is judged on the CPU in float64.
"""

from __future__ import annotations

import re

import torch

from elbozoo.models.contract.errors import InvalidInput

AUTO = "auto"


def available_devices() -> list[str]:
    """Return the names of the devices that this machine and this build of torch have."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cuda"] if cuda else []
    names += [f"cuda:{n}" for n in range(cuda)]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return [*names, "cpu"]


def resolve_device(name: str, dtype: torch.dtype) -> torch.device:
    """Return the device called ``name``; ``auto`` is the fastest that there is and that knows ``dtype``.

    Raises
    ------
    InvalidInput
        For a device that is not there, or one without ``dtype``.
    """
    available = available_devices()
    if name == AUTO:
        return torch.device(next(each for each in available if _knows(each, dtype)))
    if name not in available:
        known = re.fullmatch(r"cpu|mps|cuda(:\d+)?", name)
        lacks = ", which this machine or this build of torch does not have" if known else ""
        raise InvalidInput(f"option device: found {name!r}{lacks}, expected one of: {', '.join([AUTO, *available])}")
    if not _knows(name, dtype):
        raise InvalidInput(
            f"option device: found {name!r} with a model that is fitted in float64, which that device does not have; "
            "use device=cpu, or device=auto to choose by the model"
        )
    return torch.device(name)


def _knows(device: str, dtype: torch.dtype) -> bool:
    return device != "mps" or dtype != torch.float64
