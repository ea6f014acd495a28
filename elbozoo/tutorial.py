"""Tutorials: pages whose text, plots and numbers come from a run."""

from __future__ import annotations

from pathlib import Path


def write_tutorial(model: str, path: str | Path, *, guide: str | None = None) -> Path:
    raise NotImplementedError
