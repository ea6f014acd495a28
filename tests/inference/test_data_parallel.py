"""Steps that processes share are those of one process with the rows of all.

Rows come in other sums, so what differs is rounding: float64 of losses and gradients that are sums of some hundred
numbers, carried through 32 steps of Adam, stays below 1e-10 relative. In float32, whose rounding is 1e-7, Adam divides
gradients near zero by their own size, and 1e-4 leaves room for that.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from contract import example_data
from pyro import distributions as dist
from torch import Tensor, nn

import elbozoo as ez
from elbozoo.guides.base import GuideOptions
from elbozoo.guides.registry import build_guide
from elbozoo.inference import data_parallel, method, processes
from elbozoo.inference.data_parallel import noise_of_rows, run_in_processes
from elbozoo.inference.method import plan
from elbozoo.inference.noise import Kind, Noise
from elbozoo.inference.objectives import resolve_objective
from elbozoo.inference.processes import LostProcess, launch
from elbozoo.inference.records import Records
from elbozoo.inference.svi import run_svi
from elbozoo.inference.training import TrainingOptions
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.models.contract.isolation import isolated

# One worker starts the processes of all tests: what they have in common is imported once.
pytestmark = pytest.mark.xdist_group("processes")

STEPS = 32
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


class Ended:
    """A fit as it ended: its record, its parameters, and the next numbers of the random state."""

    def __init__(self, name: str, guide: str, seed: int = 3, *, rows: int = 24, **given: Any) -> None:
        prepared = plan(name, example_data(name)[:rows], guide, {"steps": STEPS, "engine": "eager", **given})
        options = prepared.schema(TrainingOptions)
        with isolated(seed):
            self.entry = prepared.model_of(seed, None)
            x = prepared.x.to(self.entry.dtype)
            self.guide = build_guide(prepared.method, self.entry, x, prepared.schema(GuideOptions))
            objective = resolve_objective(options.objective, self.guide, options)
            run = run_svi if options.processes == 1 else run_in_processes
            result = run(self.entry, self.guide, objective, Batch.full(x), options, progress=False)
            self.next_draws = [torch.rand(3), torch.from_numpy(np.random.rand(3))]
        self.objectives = [row[2] for row in result.trajectory.rows]
        self.is_elbo = result.trajectory.is_elbo
        self.parameters = [p.detach().clone() for of in (self.entry, self.guide) for p in of.parameters()]

    def difference(self, other: Ended) -> float:
        """Largest difference of objectives and of parameters, as a share of the largest number of each."""
        parameters = list(zip(self.parameters, other.parameters, strict=True))
        return largest([(numbers(self.objectives), numbers(other.objectives)), *parameters])


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def largest(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Largest difference of two tensors, as a share of the largest number of the second."""
    return max(float((one - two).abs().max() / two.abs().max().clamp(min=1e-3)) for one, two in pairs)


CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "encoder": ("factor-analysis", "amortized", 2, {"batch_size": 8}),
    "network": ("vae", "amortized", 2, {"batch_size": 8}),
    "global": ("logistic-regression", "mean-field", 2, {"batch_size": 8}),
    "enumerated": ("gaussian-mixture", "amortized", 2, {"batch_size": 8}),
    "a q for each row": ("ppca", "mean-field", 2, {"batch_size": 8}),
    "unequal slices of all rows, clipped": ("factor-analysis", "amortized", 3, {"rows": 23, "clip_norm": 0.01}),
    "unequal slices, global": ("logistic-regression", "full-rank", 3, {"rows": 23}),
    "score of a class": ("gaussian-mixture", "amortized", 2, {"objective": "elbo", "gradient": "score"}),
    "corrupted": ("denoising-autoencoder", "amortized", 2, {"batch_size": 8}),
    "weighed, annealed, as many draws as rows": ("vae", "amortized", 2, {"objective": "iwae", "particles": 24}),
    "annealed": ("vae", "amortized", 2, {"objective": "beta", "kl_schedule": "annealed", "kl_steps": 20}),
    "sequences": ("hidden-markov-model", "amortized", 2, {"batch_size": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(case: str) -> None:
    """One with the rows of all; not one with those of a single process, or another seed (negative controls)."""
    name, guide, processes, options = CASES[case]
    size = options.get("batch_size")
    shared = Ended(name, guide, **{**options, "processes": processes, **({"batch_size": size // 2} if size else {})})
    alone = Ended(name, guide, **options)
    tolerance = TOLERANCE[alone.entry.dtype]
    assert len(shared.objectives) == len(alone.objectives) == STEPS
    assert shared.difference(alone) <= tolerance
    assert shared.is_elbo == alone.is_elbo
    for ours, theirs in zip(shared.next_draws, alone.next_draws, strict=True):
        assert torch.equal(ours, theirs)

    few = 4 if size else options.get("kl_steps", 1)
    control = {**options, "steps": few, "schedule": "constant"}
    other = Ended(name, guide, **{**control, "batch_size": size // 2}) if size else Ended(name, guide, 4, **control)
    assert largest([(numbers(other.objectives), numbers(alone.objectives[:few]))]) > 100 * tolerance


def test_the_front_door_stops_early_logs_and_judges_as_one_process_does(tmp_path: Path) -> None:
    x = example_data("ppca").numpy()
    common = {"guide": "amortized", "steps": 60, "validation": 0.25, "validate_every": 5, "patience": 2, "seed": 1}
    common |= {"learning_rate": 0.3, "progress": False}
    shared = ez.fit("ppca", x, **common, batch_size=3, processes=2, tensorboard=tmp_path)
    alone = ez.fit("ppca", x, **common, batch_size=6, engine="eager")
    assert 0 < len(shared.trajectory) == len(alone.trajectory) < 60
    assert shared.converged
    assert shared.notes == alone.notes
    assert "where the validation rows were best" in " ".join(shared.notes)
    assert shared.validation is not None and alone.validation is not None
    # Relative, as above: evaluations of a few rows at parameters that differ by rounding.
    ours, theirs = shared.validation["objective"].to_numpy(), alone.validation["objective"].to_numpy()
    assert np.abs(ours - theirs).max() <= 1e-8 * np.abs(theirs).max()
    assert np.abs(ours[1:] - theirs[:-1]).max() > 1e-4 * np.abs(theirs).max()  # negative control: another step's
    pairs = zip(shared.guide.parameters(), alone.guide.parameters(), strict=True)
    assert largest([(one.detach(), two.detach()) for one, two in pairs]) <= 1e-8

    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = {path.parent for path in tmp_path.rglob("*tfevents*")}
    assert len(list(folder.iterdir())) == 1  # of one process
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    assert events.Scalars("objective")[-1].step == len(alone.trajectory) - 1


def test_pixels_that_are_drawn_at_each_step_are_those_of_one_process() -> None:
    x = torch.rand(24, 9, generator=torch.Generator().manual_seed(0)).numpy()
    common = {"guide": "amortized", "steps": 10, "binarise": "stochastic", "progress": False}
    shared = ez.fit("vae", x, **common, batch_size=6, processes=2).trajectory["objective"].to_numpy()
    alone = ez.fit("vae", x, **common, batch_size=12, engine="eager").trajectory["objective"].to_numpy()
    difference = np.abs(shared - alone) / np.abs(alone)
    assert difference.max() <= TOLERANCE[torch.float32]
    assert np.abs(shared[1:] - alone[:-1]).max() > 0.01  # negative control: each step has pixels of its own


# ---- noise and its rows ----------------------------------------------------------------------------------------------


def asked(*shapes: tuple[int, ...], kind: Kind = "normal") -> list[Noise]:
    return [Noise(kind, torch.Size(shape), torch.float64, torch.device("cpu")) for shape in shapes]


@pytest.mark.parametrize(
    ("whole", "part", "particles", "unfolded", "dim"),
    [
        ((8, 3), (5, 3), 1, (8, 3), 0),
        ((8,), (5,), 8, (8,), 0),
        ((8, 8, 3), (8, 5, 3), 8, (8, 8, 3), 1),  # as many draws as rows
        ((2, 8, 5), (2, 5, 5), 2, (2, 8, 5), 1),
        ((24, 4), (15, 4), 3, (3, 8, 4), 1),  # as categoricals fold theirs
        ((16, 4), (10, 4), 1, (8, 2, 4), 0),
        ((48, 4), (30, 4), 3, (3, 8, 2, 4), 1),
    ],
)
def test_rows_of_noise_are_found_by_how_it_grows_with_them(
    whole: tuple[int, ...], part: tuple[int, ...], particles: int, unfolded: tuple[int, ...], dim: int
) -> None:
    (found,) = noise_of_rows(asked(whole), asked(part), 8, 5, particles)
    drawn = torch.rand(whole)
    expected = drawn.reshape(unfolded).index_select(dim, torch.arange(3, 8)).reshape(part)
    assert torch.equal(found.of(slice(3, 8), drawn), expected)
    assert not torch.equal(found.of(slice(2, 7), drawn), expected)  # negative control: other rows


@pytest.mark.parametrize("shape", [(3, 2), (8, 3), ()])
def test_noise_that_does_not_grow_with_the_rows_is_for_all(shape: tuple[int, ...]) -> None:
    """Even where it is as long as there are rows."""
    (found,) = noise_of_rows(asked(shape), asked(shape), 8, 5, 1)
    drawn = torch.rand(shape)
    assert found.of(slice(3, 8), drawn) is drawn


@pytest.mark.parametrize(
    ("whole", "part", "particles"),
    [
        ((8, 8), (5, 5), 1),
        ((16,), (10,), 3),
        ((8, 3), (5, 2), 1),
        ((8, 1), (5,), 1),
        ((8,), (6,), 1),
        ((9, 3), (5, 3), 1),
        ((4,), (5,), 1),
    ],
)
def test_noise_that_does_not_grow_with_its_rows_alone_is_refused(
    whole: tuple[int, ...], part: tuple[int, ...], particles: int
) -> None:
    with pytest.raises(InvalidInput, match=r"rows cannot be shared.*its noise has the shape"):
        noise_of_rows(asked(whole), asked(part), 8, 5, particles)


def test_other_kinds_of_noise_for_other_rows_are_refused() -> None:
    with pytest.raises(InvalidInput, match="it draws other noise for other rows; use processes=1"):
        noise_of_rows(asked((8,)), asked((5,), kind="uniform"), 8, 5, 1)
    with pytest.raises(InvalidInput, match="it draws other noise for other rows"):
        noise_of_rows(asked((8,), (8,)), asked((5,)), 8, 5, 1)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "guide", "options", "message"),
    [
        ("ppca", "amortized", {"engine": "compiled"}, "found 2 with engine=compiled, expected engine=auto or eager"),
        ("ppca", "amortized", {"engine": "captured"}, "found 2 with engine=captured"),
        ("ppca", "amortized", {"device": "cuda"}, "found 2 with device=cuda, expected device=cpu"),
        ("ppca", "amortized", {"batch_size": 13}, "found 2 with batch_size=13 in each for 24 rows, expected at most"),
        ("ppca", "amortized", {"processes": 25}, "found 25 for 24 rows, expected at most 24"),
        ("logistic-regression", "mean-field", {"objective": "iwae"}, "objective 'iwae' and a latent of the whole data"),
        ("normal-gamma", "exact", {}, "exact posterior of a latent of the whole data set"),
        ("vae", "amortized", {"objective": "beta", "free_bits": 0.1}, "free_bits=0.1, expected 0"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_it_runs(
    name: str, guide: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan(name, example_data(name), guide, {"processes": 2, **options})
    plan(name, example_data(name), guide, {**options, "processes": 1, "device": "cpu"})


def test_checkpoints_and_streams_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="found 2 with checkpoints, expected none"):
        plan("ppca", example_data("ppca"), "amortized", {"processes": 2}, records=Records.parse(tmp_path))
    prepared = plan("ppca", example_data("ppca"), "amortized", {"processes": 2})
    options = prepared.schema(TrainingOptions)
    guide = build_guide("amortized-diagonal-normal", prepared.entry, prepared.x, GuideOptions())
    objective = resolve_objective("elbo", guide, options)
    with pytest.raises(InvalidInput, match="found 2 with data that are not in memory"):
        data_parallel.check_processes(objective, guide, options, 24, is_streamed=True)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(InvalidInput, match=r'no package lightning-fabric.*pip install "elbozoo\[scale\]"'):
        plan("ppca", example_data("ppca"), "amortized", {"processes": 2})


def test_a_worker_of_a_cluster_starts_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput, match="in a process that must start none"):
        plan("ppca", example_data("ppca"), "amortized", {"processes": 2})


def test_seeds_that_share_rows_run_one_by_one() -> None:
    prepared = plan("ppca", example_data("ppca"), "amortized", {"processes": 2})
    assert method._refusal_to_run_together(prepared) == "its rows are shared among processes"
    assert method._refusal_to_run_together(plan("ppca", example_data("ppca"), "amortized", {})) is None


# Programs are made inside of functions: so they travel by value, and the processes need not find this file.


def program_that(acts: Callable[[Any, Batch], Any]) -> nn.Module:
    """A normal with a normal latent for each row, which first does something else, and adds what comes of it."""

    class Acting(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
            self.calls = 0

        def forward(self, batch: Batch) -> Tensor:
            added = acts(self, batch)
            with pyro.plate("data", batch.total, subsample=batch.index):
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
                mean = self.loc + z[..., None] + (0.0 if added is None else added)
                return pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=batch.x)

    return Acting()


ROWS = np.random.default_rng(0).normal(size=(24, 2))


def fit_of(acts: Callable[[Any, Batch], Any], x: np.ndarray = ROWS, **options: Any) -> ez.Fit:
    given = {"guide": "mean-field", "processes": 2, "steps": 20, "progress": False, **options}
    return ez.fit(program_that(acts), x, **given)


def standardise(program: Any, batch: Batch) -> Tensor:
    return batch.x.mean(0)


def count_steps(program: Any, batch: Batch) -> None:
    program.seen += 1.0


def draw_poisson(program: Any, batch: Batch) -> Tensor:
    return torch.poisson(torch.ones(2, dtype=torch.float64))


def draw_pairs(program: Any, batch: Batch) -> Tensor:
    return torch.randn(len(batch.x), len(batch.x), dtype=torch.float64).mean()


def seed_itself(program: Any, batch: Batch) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, dtype=torch.float64)


def draw_more_later(program: Any, batch: Batch) -> Tensor:
    program.calls += 1
    return torch.randn(2 if program.calls < 8 else 3, dtype=torch.float64).mean()


@pytest.mark.parametrize(
    ("acts", "message"),
    [
        (standardise, "the loss or its gradient changes by .* of its size where rows are apart"),
        (count_steps, "it changes its own buffers"),
        (draw_poisson, "gamma and Poisson"),
        (draw_pairs, r"its noise has the shape \(24, 24\) for 24 rows and \(12, 12\) for 12"),
        (seed_itself, "it sets the state of the random generator itself"),
        (draw_more_later, "that it did not ask for at first"),
    ],
)
def test_programs_that_tie_rows_together_are_refused(acts: Callable[[Any, Batch], Any], message: str) -> None:
    def by_value(program: Any, batch: Batch) -> Any:
        return acts(program, batch)

    with pytest.raises(InvalidInput, match=f"found a program whose rows cannot be shared.*{message}.*use processes=1"):
        fit_of(by_value if acts.__module__ != __name__ else _by_value(acts))


def test_a_program_that_does_nothing_of_that_is_shared() -> None:
    """Negative control of the refusals, whose programs differ by one line."""
    assert len(fit_of(lambda program, batch: None).trajectory) == 20


def _by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function of this file that the processes need not import."""
    copied = type(function)(function.__code__, {"torch": torch, "len": len}, function.__name__)
    copied.__module__ = "__main__"
    return copied


# ---- how processes end -----------------------------------------------------------------------------------------------

MARK = 77.0
MARKED = np.concatenate([ROWS[:-1], [[MARK, MARK]]])  # the row that only the second process sees in its slice


def test_the_error_of_one_process_ends_all_and_comes_back() -> None:
    def fails_later(program: Any, batch: Batch) -> None:
        program.calls += 1
        if program.calls > 8 and len(batch.x) == 12 and bool((batch.x == 77.0).any()):
            raise ZeroDivisionError("the marked row went wrong")

    with pytest.raises(ZeroDivisionError, match="the marked row went wrong") as caught:
        fit_of(fails_later, MARKED)
    assert "in process 1 of those that share the fit" in "".join(caught.value.__notes__)
    assert len(fit_of(fails_later, ROWS).trajectory) == 20  # negative control: nothing is marked
    assert not multiprocessing.active_children()


def test_a_loss_that_is_not_finite_is_reported_as_in_one_process() -> None:
    messages = []
    for options in ({"processes": 2, "batch_size": 6}, {"batch_size": 12, "engine": "eager"}):
        with pytest.raises(NumericalFailure) as caught:
            ez.fit("vae", example_data("vae"), guide="amortized", learning_rate=1e20, progress=False, **options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("step ")


def test_a_process_that_is_killed_is_missed() -> None:
    def is_killed(program: Any, batch: Batch) -> None:
        program.calls += 1
        if program.calls > 8 and len(batch.x) == 12 and bool((batch.x == 77.0).any()):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(LostProcess, match=r"processes: (one was ended by SIGKILL|another one does not answer)"):
        fit_of(is_killed, MARKED)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_processes_end_with_the_one_that_asked_for_them(tmp_path: Path) -> None:
    """Killed by a signal that nothing can catch, it leaves none behind, though a server of processes started them."""
    script = tmp_path / "fit.py"
    script.write_text(
        "import elbozoo as ez\n"
        'if __name__ == "__main__":\n'
        '    ez.fit("ppca", "iris", guide="amortized", latent_dim=1, processes=2, batch_size=20, steps=10**7,\n'
        '           schedule="constant", progress=False)\n'
    )

    def started() -> list[int]:
        return [int(text) for path in tmp_path.glob("elbozoo-*/up-*") if (text := path.read_text())]

    caller = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        within(120, lambda: len(started()) == 2)
        numbers = started()
        assert all(map(runs, numbers))
    finally:
        caller.kill()
        caller.wait()
    within(60, lambda: not any(map(runs, numbers)))


def runs(number: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def within(seconds: float, is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.05)


def test_an_interrupt_ends_the_fit_after_a_step() -> None:
    """Of the terminal's, which all processes get, the parent says when it counts: in all after the same step."""
    parent = os.getpid()

    def interrupts(program: Any, batch: Batch) -> None:
        program.calls += 1
        if program.calls == 20:
            os.kill(os.getpid(), signal.SIGINT)
            if len(batch.x) == 12 and bool((batch.x == 77.0).any()):
                os.kill(parent, signal.SIGINT)

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        fit = fit_of(interrupts, MARKED, steps=1_000_000, schedule="constant")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)
    assert fit.interrupted and not fit.converged
    assert 5 < len(fit.trajectory) < 1_000_000
    assert all(torch.isfinite(p).all() for p in fit.guide.parameters())


def test_a_port_that_is_taken_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_fabric.plugins.environments import lightning

    free, tried = lightning.find_free_network_port, []
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()

        def port() -> int:
            tried.append(free() if tried else taken.getsockname()[1])
            return int(tried[-1])

        monkeypatch.setattr(lightning, "find_free_network_port", port)
        monkeypatch.setattr(processes, "GRACE", 0.1)
        work: Any = lambda processes, x: float(processes.total(x).sum())  # noqa: E731
        assert launch(2, work, torch.ones(3)) == 6.0
        assert len(tried) == 2


def test_a_script_without_a_guard_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    asks = "launch(2, lambda processes, x: None, torch.zeros(1))"
    script.write_text(f"import torch\nfrom elbozoo.inference.processes import launch\n{asks}\n")
    # New processes import what this one was started from.
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    expected = r'found 2, and they did not come up.*expected its calls under `if __name__ == "__main__":`'
    with pytest.raises(InvalidInput, match=expected):
        launch(2, lambda processes, x: None, torch.zeros(1))
    assert "Traceback" not in capfd.readouterr().err

    script.write_text(script.read_text().replace(asks, f"if __name__ == '__main__':\n    {asks}"))
    assert launch(2, lambda processes, x: len(x), torch.zeros(7)) == 7  # negative control: a guard
