"""Run every benchmark script in turn and print one table: ``python benchmarks --size small``."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

from harness import Job, Report, parse, run_job, settings_of, table


def jobs() -> list[Job]:
    """Return the job of each script, in order of their names."""
    scripts = sorted(Path(__file__).resolve().parent.glob("bench_*.py"))
    return [importlib.import_module(script.stem).JOB for script in scripts]


def run_all() -> int:
    """Run all, print the table, and say by the exit status whether some contest failed."""
    settings = settings_of(parse(description=__doc__ or ""))
    before = time.perf_counter()
    reports: dict[Job, Report] = {job: run_job(job, settings) for job in jobs()}
    minutes = (time.perf_counter() - before) / 60
    print(
        f"\nsize {settings.size}, {settings.threads} threads, {minutes:.1f} minutes; ratio = cost of the peer by ours"
    )
    print(table(reports))
    return 1 if any(report.failed for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(run_all())
