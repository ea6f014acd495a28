"""Fair races against other libraries: the same data, work and threads, in turn, and a JSON record of all.

A script has one :class:`Job`, a job has contests, and a contest has two sides that do the same work. Each contest runs
in a process of its own, which begins with the number of threads that was asked for. Both sides warm up once, which is
where they compile; then they take turns, and must reach the same objective each time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = ("small", "full", "tiny")  # tiny is for tests, and says nothing about speed
LEAST_REPEATS = 5
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
PACKAGES = ("elbozoo", "torch", "numpy", "scipy")
CLOCK_TRIES = 5
PAGE = 2**-8  # MiB


class Outcome(NamedTuple):
    """What one side did in one turn.

    Attributes
    ----------
    cost : float
        Seconds for one unit of work, or MiB.
    reached : float
        The objective that the work ended at.
    error : float
        Standard error of ``reached``, where it is a mean of draws.
    notes : mapping
        What else there is to know, by name.
    """

    cost: float
    reached: float
    error: float = 0.0
    notes: Mapping[str, float | str] = {}


Side = Callable[[], Outcome]


class Agreement(NamedTuple):
    """How far apart the objectives of the two sides may be: ``absolute + relative * |peer's| + z * error``.

    Attributes
    ----------
    reason : str
        What these allow for.
    one_sided : bool
        Whether ours may be better than the peer's by any amount; larger objectives are better.
    """

    reason: str
    absolute: float = 0.0
    relative: float = 0.0
    z: float = 0.0
    one_sided: bool = False

    def check(self, ours: Outcome, peer: Outcome) -> tuple[float, float]:
        """Return the difference of the objectives and what is allowed.

        Raises
        ------
        Disagreement
            If they differ by more, or are not finite.
        """
        allowed = self.absolute + self.relative * abs(peer.reached) + self.z * math.hypot(ours.error, peer.error)
        difference = ours.reached - peer.reached
        if not (difference >= -allowed and (self.one_sided or difference <= allowed)):
            raise Disagreement(
                f"ours reached {ours.reached!r} and the peer {peer.reached!r}, expected a difference of at most "
                f"{allowed:.3g}: {self.reason}"
            )
        return difference, allowed


class Disagreement(Exception):
    """The two sides did not reach the same objective, so that their times cannot be compared."""


class Died(Exception):
    """A contest did not come to its end in the process that it was given; the message is the last line that it said."""


@dataclass(frozen=True)
class Contest:
    """Two sides at the same work.

    Attributes
    ----------
    name : str
        Its name within the job.
    peer : str
        The other side, for readers.
    packages : tuple of str
        Distributions that the other side needs; the first one is the peer, and what ``--only`` asks for.
    sizes : mapping
        What says how large the work is.
    target : float or None
        Least ratio of the peer's cost to ours.
    sides : callable
        Makes data and starting values, and returns our side and the peer's; heavy imports belong in it.
    agreement : Agreement
        When both count as having reached the same.
    measure : str
        ``seconds`` or ``MiB``.
    unit : str
        Of what that is the cost.
    """

    name: str
    peer: str
    packages: tuple[str, ...]
    sizes: Mapping[str, int | str]
    target: float | None
    sides: Callable[[], tuple[Side, Side]]
    agreement: Agreement
    measure: str = "seconds"
    unit: str = "run"

    def missing(self) -> str | None:
        """Return the name of the first package that is not installed, or None."""
        return next((name for name in self.packages if _version(name) is None), None)


@dataclass(frozen=True)
class Settings:
    """How contests are run.

    Attributes
    ----------
    size : str
        ``small`` or ``full``.
    threads, repeats : int
        Threads of each side, and turns of each.
    only : str or None
        Package of the peer to run against; None runs against all.
    out : Path
        Folder of the JSON documents.
    device : str
        Where both sides compute, for jobs that leave the choice.
    in_process : bool
        Whether contests share this process: quick, and only good for tests.
    """

    size: str = "small"
    threads: int = 0
    repeats: int = LEAST_REPEATS
    only: str | None = None
    out: Path = RESULTS
    device: str = "cpu"
    in_process: bool = False


@dataclass(frozen=True)
class Job:
    """What one script measures.

    Attributes
    ----------
    name : str
        Name of its JSON document.
    title : str
        What it is, in a few words.
    contests : callable
        From size and device to the contests.
    """

    name: str
    title: str
    contests: Callable[[str, str], list[Contest]]


@dataclass
class Report:
    """What came of a job: records of the contests that were run, and a line for each of the others."""

    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[Contest, str]] = field(default_factory=list)
    failed: list[tuple[Contest, str]] = field(default_factory=list)


# ---- the sides' clocks -----------------------------------------------------------------------------------------------


def whole(run: Callable[[], float], units: int = 1) -> Side:
    """Return a side whose cost is the time of the whole of ``run``, which returns what it reached, by ``units``."""

    def side() -> Outcome:
        before = time.perf_counter()
        reached = run()
        return Outcome((time.perf_counter() - before) / units, reached)

    return side


def marginal(run: Callable[[int], float], units: int) -> Side:
    """Return a side whose cost is that of one more unit: time(2n) - time(n) over n, which leaves out what is done once.

    Raises
    ------
    RuntimeError
        If twice the work takes no longer, time after time: it is too little for the clock.
    """

    def side() -> Outcome:
        for _ in range(CLOCK_TRIES):  # other work on the machine may slow the shorter run
            times = [time.perf_counter()]
            for factor in (1, 2):
                reached = run(factor * units)
                times.append(time.perf_counter())
            once, twice = times[1] - times[0], times[2] - times[1]
            if twice > once:
                return Outcome((twice - once) / units, reached, notes={"whole_seconds": twice})
        raise RuntimeError(f"2 x {units} units took no longer than {units}; give more work to the clock")

    return side


class Ticks:
    """A clock that is told of every step, so that a loop can be timed from within, after its first steps.

    Attributes
    ----------
    times : list of float
        When each step ended.
    engine : str
        What ran the last step, where the loop is ours and says so.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.engine = ""

    def tick(self, state: Any = None) -> bool:
        """Note the time, as an observer of a fit may; the False that it returns lets the fit go on."""
        self.times.append(time.perf_counter())
        self.engine = getattr(getattr(state, "step", None), "engine", "eager")
        return False

    def seconds_per_step(self, after: int) -> float:
        """Wall-clock seconds per step of the loop, counted from the end of step ``after``."""
        return (self.times[-1] - self.times[after - 1]) / (len(self.times) - after)


def mean_of_last(losses: Sequence[float], share: float = 0.25) -> tuple[float, float]:
    """Minus the mean of the last losses of a noisy loop, and its standard error.

    The noise is taken from the differences of neighbours, which a loss that still falls changes little (von Neumann
    1941); that of one step is independent of that of the next.
    """
    last = [-float(loss) for loss in losses[-max(3, int(share * len(losses))) :]]
    noise = math.sqrt(statistics.fmean((b - a) ** 2 for a, b in itertools.pairwise(last)) / 2)
    return statistics.fmean(last), noise / math.sqrt(len(last))


def peak_memory(run: Callable[..., float], *arguments: Any) -> Side:
    """Return a side whose cost is the peak memory of ``run`` in a process of its own, less that before it, in MiB.

    ``run(*arguments)`` prepares, and returns the work itself as a callable that returns what it reached. Both must
    be importable by name.
    """

    def side() -> Outcome:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return Outcome(*pool.apply(_peak, (run, arguments)))

    return side


def _peak(prepare: Callable[..., Callable[[], float]], arguments: tuple[Any, ...]) -> tuple[float, float]:
    work = prepare(*arguments)
    gc.collect()
    before = _peak_from_now()
    reached = work()
    return max(_largest() - before, PAGE), reached


def _peak_from_now() -> float:
    """Forget what was larger before, where the system allows it, and return the size of this process, MiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _largest()


def _largest() -> float:
    """Largest resident size of this process, MiB; elsewhere than on Linux since it began."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # and there in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def em_iterations(entry: Any, x: Any, iterations: int) -> float:
    """Run so many iterations of EM from the θ of ``entry``; return log p(x) of all at the θ of the last E step.

    Raises
    ------
    RuntimeError
        If EM had converged to rounding before that, so that less was done than was asked for.
    """
    from elbozoo.inference.em import EMOptions, run_em

    options = EMOptions(restarts=1, iterations=iterations, tolerance=1e-300)
    run = run_em(entry, x, options, seed=0, progress=False)
    if len(run.trajectory.rows) != iterations:
        raise RuntimeError(f"EM ended after {len(run.trajectory.rows)} iterations of {iterations}; use slower data")
    return run.log_evidence


# ---- a race ----------------------------------------------------------------------------------------------------------


def race(job: Job, contest: Contest, settings: Settings) -> dict[str, Any]:
    """Run one contest and return its record; the ratio is the peer's cost by ours.

    Raises
    ------
    Disagreement
        If the sides did not reach the same objective.
    """
    _use_threads(settings.threads)
    sides = dict(zip(("ours", "peer"), contest.sides(), strict=True))
    warm_up = {name: _warm_up(side) for name, side in sides.items()}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in sides}
    agreements = []
    for turn in range(settings.repeats):
        for name in sorted(sides, reverse=bool(turn % 2)):  # who goes first changes, too
            if not settings.in_process:
                gc.collect()
            outcomes[name].append(sides[name]())
        agreements.append(contest.agreement.check(outcomes["ours"][-1], outcomes["peer"][-1]))
    return _record(job, contest, settings, outcomes, warm_up, max(agreements, key=lambda pair: abs(pair[0])))


def _warm_up(side: Side) -> float:
    before = time.perf_counter()
    side()
    return time.perf_counter() - before


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _record(
    job: Job,
    contest: Contest,
    settings: Settings,
    outcomes: dict[str, list[Outcome]],
    warm_up: dict[str, float],
    agreement: tuple[float, float],
) -> dict[str, Any]:
    costs = {name: [outcome.cost for outcome in each] for name, each in outcomes.items()}
    medians = {name: statistics.median(each) for name, each in costs.items()}
    ratio = medians["peer"] / medians["ours"]
    pairs = [peer / ours for ours, peer in zip(costs["ours"], costs["peer"], strict=True)]
    return {
        "job": job.name,
        "title": job.title,
        "contest": contest.name,
        "peer": contest.peer,
        "packages": list(contest.packages),
        "size": settings.size,
        "sizes": dict(contest.sizes),
        "measure": contest.measure,
        "unit": contest.unit,
        "costs": costs,
        "median": medians,
        "least": {name: min(each) for name, each in costs.items()},
        "ratio": ratio,
        "ratio_range": [min(pairs), max(pairs)],
        "target": contest.target,
        "verdict": verdict(ratio, contest.target),
        "warm_up_seconds": warm_up,
        "reached": {name: [outcome.reached for outcome in each] for name, each in outcomes.items()},
        "agreement": {"difference": agreement[0], "allowed": agreement[1], "reason": contest.agreement.reason},
        "notes": {name: [dict(outcome.notes) for outcome in each] for name, each in outcomes.items()},
        "repeats": settings.repeats,
        "versions": {name: _version(name) for name in dict.fromkeys((*PACKAGES, *contest.packages))},
        "machine": machine(settings),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(job, settings),
    }


def verdict(ratio: float, target: float | None) -> str:
    """Say whether the target was met."""
    if target is None:
        return "no target"
    return "met" if ratio >= target else "missed"


def command(job: Job, settings: Settings) -> str:
    """Return the line by which the record can be made again."""
    parts = ["python", f"benchmarks/bench_{job.name.replace('-', '_')}.py", "--size", settings.size]
    parts += ["--threads", str(settings.threads), "--repeats", str(settings.repeats)]
    return shlex.join(parts if settings.device == "cpu" else [*parts, "--device", settings.device])


def machine(settings: Settings) -> dict[str, Any]:
    """Describe the machine: its processor, cores and memory, and what of it was used."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "ram_gib": round(pages / 2**30, 1),
        "device": _device_name(settings.device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return torch.cuda.get_device_name(device)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---- all contests of a job -------------------------------------------------------------------------------------------


def run_job(job: Job, settings: Settings) -> Report:
    """Run the contests of ``job``, say one line about each, and write their records to its JSON document."""
    report = Report()
    for contest in job.contests(settings.size, settings.device):
        if settings.only is not None and settings.only not in contest.packages:
            continue
        missing = contest.missing()
        if missing is not None:
            reason = f"{missing} is not installed; pip install 'elbozoo[bench]'"
            report.skipped.append((contest, reason))
            print(f"{job.name} {contest.name}: skipped, {reason}", flush=True)
            continue
        try:
            record = (race if settings.in_process else _in_a_process)(job, contest, settings)
        except Exception as error:  # the others run all the same
            report.failed.append((contest, f"{type(error).__name__}: {error}"))
            print(f"{job.name} {contest.name}: FAILED, {report.failed[-1][1]}", flush=True)
            continue
        report.records.append(record)
        print(_line(record), flush=True)
    _store(job, report.records, settings.out)
    return report


def _in_a_process(job: Job, contest: Contest, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        script = Path(sys.modules[job.contests.__module__].__file__ or "")
        arguments = ["--size", settings.size, "--threads", str(settings.threads), "--repeats", str(settings.repeats)]
        arguments += ["--device", settings.device, "--contest", contest.name, "--record", str(record)]
        threads = dict.fromkeys(THREAD_VARIABLES, str(settings.threads))
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **threads, "JAX_PLATFORMS": settings.device},
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            preexec_fn=lambda: _keep_to(settings.threads),
        )
        if done.returncode:
            raise Died(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}")
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found


def _keep_to(threads: int) -> None:
    """Keep this process to as many cores as threads, for libraries that take as many threads as there are cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _store(job: Job, records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Put the records in the place of those of the same contest, size and machine."""
    if not records:
        return
    path = folder / f"{job.name}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
    new = {_identity(record) for record in records}
    kept = [record for record in before if _identity(record) not in new]
    document = {"job": job.name, "title": job.title, "records": [*kept, *records]}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    kind = record["machine"]
    return record["contest"], record["size"], kind["cpu"], kind["cores"], kind["threads"], kind["device"]


def _line(record: dict[str, Any]) -> str:
    medians, measure = record["median"], record["measure"]
    return (
        f"{record['job']} {record['contest']}: ours {medians['ours']:.3g} {measure} per {record['unit']}, "
        f"{record['peer']} {medians['peer']:.3g}, ratio {record['ratio']:.2f} ({record['verdict']})"
    )


def table(reports: Mapping[Job, Report]) -> str:
    """Return one table of all contests: job, size, peer, ratio, target, verdict."""
    rows = [("job", "contest", "peer", "ratio", "target", "verdict")]
    for job, report in reports.items():
        for record in report.records:
            target = "–" if record["target"] is None else f"{record['target']:g}"
            found = (f"{record['ratio']:.2f}", target, record["verdict"])
            rows.append((job.name, record["contest"], record["peer"], *found))
        for contest, reason in (*report.skipped, *report.failed):
            rows.append((job.name, contest.name, contest.peer, "–", "–", reason.partition(";")[0][:60]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


# ---- command line ----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None, description: str = "") -> argparse.Namespace:
    """Read the command line of a script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=SIZES, default="small", help="small, or full as the targets are stated")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of each side; all cores by default")
    parser.add_argument("--repeats", type=int, default=LEAST_REPEATS, help="turns of each side")
    parser.add_argument("--only", help="package of the peer, such as numpyro")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where the job has it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON documents")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--contest", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def settings_of(found: argparse.Namespace) -> Settings:
    """Return the settings that a command line asks for."""
    return Settings(
        found.size, found.threads, found.repeats, found.only, found.out.resolve(), found.device, found.in_process
    )


def main(job: Job, arguments: Sequence[str] | None = None) -> int:
    """Run a script: all of its contests, or the one that a process was started for."""
    found = parse(arguments, job.title)
    settings = settings_of(found)
    if found.contest is None:
        report = run_job(job, settings)
        return 1 if report.failed else 0
    (contest,) = [c for c in job.contests(found.size, found.device) if c.name == found.contest]
    found.record.write_text(json.dumps(race(job, contest, settings)), encoding="utf-8")
    return 0
