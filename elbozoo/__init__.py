"""elbozoo: latent-variable models on Pyro whose bounds are held against the truth.

``import elbozoo as ez`` is light: nothing heavy is loaded before something is built.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from elbozoo.api import (  # noqa: F401
        compare,
        describe,
        fit,
        list_datasets,
        list_guides,
        list_models,
        load_comparison,
        load_data,
        load_fit,
        load_program,
        rate_distortion,
        tutorial,
    )
    from elbozoo.comparison import Comparison  # noqa: F401
    from elbozoo.inference.fit import Fit  # noqa: F401
    from elbozoo.models.contract.errors import InvalidInput, NumericalFailure  # noqa: F401
    from elbozoo.plates import render_model  # noqa: F401
    from elbozoo.rate_curve import RateDistortion  # noqa: F401
    from elbozoo.stored import StoredData  # noqa: F401
    from elbozoo.tables import Dataset  # noqa: F401

_HOMES = {
    **dict.fromkeys(
        (
            "compare",
            "describe",
            "fit",
            "list_datasets",
            "list_guides",
            "list_models",
            "load_comparison",
            "load_data",
            "load_fit",
            "load_program",
            "rate_distortion",
            "tutorial",
        ),
        "elbozoo.api",
    ),
    "Comparison": "elbozoo.comparison",
    "Dataset": "elbozoo.tables",
    "Fit": "elbozoo.inference.fit",
    "InvalidInput": "elbozoo.models.contract.errors",
    "NumericalFailure": "elbozoo.models.contract.errors",
    "RateDistortion": "elbozoo.rate_curve",
    "StoredData": "elbozoo.stored",
    "render_model": "elbozoo.plates",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'elbozoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
