"""Fair timing: ours and a peer's in turn on the same data, medians, and a JSON record of machine and versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
REPEATS = 5


def alternate(ours: Callable[[], float], peer: Callable[[], float], repeats: int = REPEATS) -> dict[str, Any]:
    """Time both in turn, after a warm-up; a callable returns what it reached, so that both can be held equal."""
    reached = {"ours": ours(), "peer": peer()}
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        for name, run in (("ours", ours), ("peer", peer)):
            before = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - before)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": seconds, "median": medians, "ratio": medians["peer"] / medians["ours"], "reached": reached}


def record(job: str, peer: str, sizes: dict[str, int], result: dict[str, Any]) -> None:
    """Write the result as JSON to ``benchmarks/results`` and print one line; ratio = peer's time / ours."""
    document = {
        "job": job,
        "peer": peer,
        "sizes": sizes,
        **result,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: metadata.version(name) for name in ("torch", "pyro-ppl", "numpy", "scikit-learn")},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{job}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    size = ", ".join(f"{key} = {value:,}" for key, value in sizes.items())
    medians = result["median"]
    print(f"{job} ({size}): ours {medians['ours']:.4f} s, {peer} {medians['peer']:.4f} s, ratio {result['ratio']:.2f}")
