"""Checkpoints: a fit that was stopped, however, ends with the bits of one that was not.

Equal here means equal to the last bit, with no tolerance: the same seed, the same machine, the same arithmetic. Only
the seconds of a trajectory may differ.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import elbozoo as ez
from elbozoo.inference import checkpoints as module
from elbozoo.inference.checkpoints import FILE, read_checkpoint, write_checkpoint
from elbozoo.inference.fit import Fit
from elbozoo.inference.memory import Memory, RandomStates
from elbozoo.inference.method import plan
from elbozoo.inference.records import Records
from elbozoo.inference.svi import TrainingState
from elbozoo.inference.trajectory import Trajectory
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

STEPS = 24
FIGURES = ["step", "objective", "elbo", "log_evidence"]
NETWORK = {"latent_dim": 2, "hidden": 4, "batch_size": 8}
LONGER = ("enumerated", "semi-amortized", "flow", "plateau", "Monte Carlo EM", "importance EM")
PLATEAU = 215  # the first window cannot be flat, the second ends at step 200
BETA = {"objective": "beta", "kl_weight": 2.0, "kl_schedule": "annealed", "kl_steps": STEPS - 4}

# Each with a state of its own: nothing but Adam; the place in an epoch; β and its step; weighed draws; enumeration;
# steps within a step; a flow's networks; a window in which the objective went flat, and the lower step size after it;
# a global latent; random chains; proposals that follow them.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full batch": ("ppca", "mean-field", {"latent_dim": 1}),
    "minibatches": ("vae", "amortized", NETWORK),
    "annealed beta": ("vae", "amortized", {**NETWORK, **BETA}),
    "iwae": ("vae", "amortized", {**NETWORK, "objective": "iwae", "particles": 3}),
    "enumerated": ("gaussian-mixture", "free-categorical", {"components": 2}),
    "semi-amortized": ("vae", "semi-amortized", {**NETWORK, "refinements": 1}),
    "flow": ("vae", "amortized-flow", {**NETWORK, "flow_layers": 1}),
    "plateau": ("normal-mean", "diagonal-normal", {"tolerance": 1e6, "particles": 1, "steps": PLATEAU}),
    "global": ("normal-mean", "full-rank", {}),
    "Monte Carlo EM": ("vae", "em", {"latent_dim": 2, "hidden": 4, "iterations": 12}),
    "importance EM": (
        "vae",
        "em",
        {"latent_dim": 2, "hidden": 4, "iterations": 12, "expectation": "importance", "importance_draws": 10},
    ),
}


def rows(model: str) -> torch.Tensor:
    return get_entry(model).example(seed=1).simulate(20, seed=2)[0].double()


def run(kind: str, folder: Path | None = None, every: int = 7, **options: Any) -> Fit:
    """A fit of ``kind``; with checkpoints in ``folder``, where it also goes on from."""
    model, method, given = KINDS[kind]
    asked = {"steps": STEPS} | given | options
    if method == "em":
        asked.pop("steps")
    return ez.fit(model, rows(model), method=method, checkpoint=folder, checkpoint_every=every, progress=False, **asked)


@cache
def undisturbed(kind: str) -> Fit:
    """A fit of ``kind`` that nothing stopped."""
    return run(kind)


def difference(one: Fit, other: Fit) -> str | None:
    """What differs between two fits, in bits."""
    if not one.trajectory[FIGURES].equals(other.trajectory[FIGURES]):
        return f"trajectories of {len(one.trajectory)} and {len(other.trajectory)} steps"
    for name, module_, twin in (("model", one.entry, other.entry), ("guide", one.guide, other.guide)):
        state, expected = module_.state_dict(), twin.state_dict()
        if list(state) != list(expected):
            return f"names of the {name}'s parameters"
        for key, value in state.items():
            if not torch.equal(value, expected[key]):
                return f"{name} {key}"
    return None if one.converged == other.converged else "converged"


@pytest.fixture(autouse=True)
def control_c() -> Iterator[None]:
    """Control-C as in a terminal: a process that a shell runs in the background ignores it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@contextmanager
def signals(step: int, count: int = 1) -> Iterator[None]:
    """Press Control-C, ``count`` times, in the middle of the step that is the last of ``step`` steps."""
    record = Trajectory.record

    def recording(self: Trajectory, *figures: float) -> None:
        record(self, *figures)
        if len(self.rows) == step:
            for _ in range(count):
                signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trajectory, "record", recording)
        yield


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in LONGER else ()) for kind in KINDS]
)
def test_a_fit_in_three_parts_is_the_fit_in_one(kind: str, tmp_path: Path) -> None:
    """Stopped within an epoch and again later; what it was then is another fit."""
    whole = undisturbed(kind)
    steps = len(whole.trajectory)
    for stop in (steps // 3, steps - 3):
        with signals(stop):
            part = run(kind, tmp_path)
        assert part.interrupted and len(part.trajectory) == stop
        assert difference(part, whole) is not None
    assert difference(run(kind, tmp_path), whole) is None
    # A fit that has ended comes back as it was, without a step.
    with signals(steps):
        assert difference(run(kind, tmp_path), whole) is None
    if kind == "plateau":  # what the kind is for: the step size has fallen, and another window has begun
        (path,) = tmp_path.rglob(FILE)
        schedule = read_checkpoint(path)[0]["values"]["schedule"]
        assert schedule["plateaus"] == 1 and len(schedule["window"]) == PLATEAU % 100


@pytest.mark.parametrize(
    "forgotten",
    ["random", "step", "minibatches", "model", "guide", pytest.param("schedule", marks=pytest.mark.slow)],
)
def test_every_part_is_needed(forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that leaves one part out leads elsewhere: the comparison above can fail."""
    kind, stop = ("plateau", 150) if forgotten == "schedule" else ("minibatches", 13)
    whole = undisturbed(kind)
    parts = TrainingState.parts

    def without(state: TrainingState, observers: Any) -> dict[str, Any]:
        return {name: part for name, part in parts(state, observers).items() if name != forgotten}

    monkeypatch.setattr(TrainingState, "parts", without)
    with signals(stop):
        run(kind, tmp_path)
    assert difference(run(kind, tmp_path), whole) is not None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process, which this system cannot make")
@pytest.mark.parametrize("kind", ["full batch", "minibatches", "annealed beta", "iwae", "flow", "Monte Carlo EM"])
def test_a_killed_process_loses_nothing_but_time(kind: str, tmp_path: Path) -> None:
    """Killed three times at random, once it has gone on by a few checkpoints; the fourth process ends as if alone."""
    length = {"iterations": 50} if kind == "Monte Carlo EM" else {"steps": 80}
    if kind == "annealed beta":
        length["kl_steps"] = 70
    whole = run(kind, **length)
    moments = random.Random(0)
    reached = []
    for _ in range(3):
        before = _written(tmp_path)
        child = os.fork()
        if child == 0:
            try:
                run(kind, tmp_path, every=2, **length)
            finally:
                os._exit(0)
        wanted, deadline = moments.randrange(1, 5), time.monotonic() + 60
        while wanted and time.monotonic() < deadline:
            now = _written(tmp_path)
            wanted, before = wanted - (now != before), now
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        (path,) = tmp_path.rglob(FILE)
        reached.append(read_checkpoint(path)[0]["steps"])
    assert 0 < reached[0] < reached[1] < reached[2] < max(length.values())
    assert difference(run(kind, tmp_path, **length), whole) is None
    assert not list(tmp_path.rglob("*.partial"))


def _written(directory: Path) -> int | None:
    """When the checkpoint of the one fit in ``directory`` was written."""
    return next((path.stat().st_mtime_ns for path in directory.glob(f"*/{FILE}")), None)


@pytest.mark.slow
def test_the_command_line_goes_on_after_a_kill(tmp_path: Path) -> None:
    """The same command, killed and given again, writes the fit that an undisturbed one would have written."""
    options = ["--set", "latent_dim=1", "--set", "hidden=4", "--set", "steps=300", "--set", "batch_size=32"]
    program = [sys.executable, "-c", "from elbozoo.cli import main; main()", "fit", "ppca", "--data", "iris", *options]
    program += ["--guide", "amortized", "--out", str(tmp_path / "out")]
    program += ["--checkpoint", str(tmp_path / "kept"), "--checkpoint-every", "5"]
    kept = tmp_path / "kept" / "amortized-diagonal-normal-0" / FILE
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    steps = read_checkpoint(kept)[0]["steps"]
    assert steps < 300 and not (tmp_path / "out" / "fit.json").exists()
    subprocess.run(program, check=True, capture_output=True, timeout=250)
    whole = ez.fit("ppca", "iris", guide="amortized", latent_dim=1, hidden=4, steps=300, batch_size=32, progress=False)
    again = Fit.load(tmp_path / "out")
    assert difference(again, whole) is None


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file under another name is no harm; half a file under the right one would be."""
    path = tmp_path / FILE
    write_checkpoint(path, {"steps": 1}, {"a": torch.ones(3)})

    class Killed(BaseException):
        pass

    def half(tensors: Any, header: Any) -> bytes:
        raise Killed

    monkeypatch.setattr(module, "save", half)
    with pytest.raises(Killed):
        write_checkpoint(path, {"steps": 2}, {"a": torch.zeros(3)})
    card, tensors = read_checkpoint(path)
    assert card == {"steps": 1} and torch.equal(tensors["a"], torch.ones(3))

    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        write_checkpoint(path, {"steps": 2}, {"a": torch.zeros(3)})
    assert read_checkpoint(path)[0] == {"steps": 1}
    monkeypatch.undo()
    write_checkpoint(path, {"steps": 2}, {"a": torch.zeros(3)})
    assert read_checkpoint(path)[0] == {"steps": 2}


def test_a_full_disk_costs_a_checkpoint_and_no_fit(
    kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The user is told, the fit goes on, and the checkpoint before stays."""
    path = kept / "free-diagonal-normal-0" / FILE

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    fit = run("full batch", kept)
    assert len(fit.trajectory) == STEPS
    assert f"no checkpoint written to {path}: No space left on device" in caplog.text
    assert read_checkpoint(path)[0]["steps"] == 10 and not list(kept.rglob("*.partial"))


@pytest.mark.parametrize("kind", ["minibatches", "full batch"])
def test_control_c_ends_the_step_and_writes_a_checkpoint(kind: str, tmp_path: Path) -> None:
    """At step 17, where none was due: the fit so far comes back, and the same call goes on from it."""
    whole = undisturbed(kind)
    with signals(17):
        fit = run(kind, tmp_path, every=1000)
    assert fit.interrupted and not fit.converged and len(fit.trajectory) == 17
    (path,) = tmp_path.rglob(FILE)
    assert read_checkpoint(path)[0]["steps"] == 17
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert difference(run(kind, tmp_path), whole) is None


def test_control_c_in_the_last_step_is_not_lost(tmp_path: Path) -> None:
    """The fit says that it was interrupted, so that a comparison goes no further, and comes back as it ended."""
    whole = undisturbed("full batch")
    with signals(len(whole.trajectory)):
        assert run("full batch", tmp_path).interrupted
    again = run("full batch", tmp_path)
    assert not again.interrupted and difference(again, whole) is None


def test_a_second_control_c_does_not_wait(tmp_path: Path) -> None:
    """In the middle of a step there is nothing to go on from, so the checkpoint before is the one that counts."""
    with signals(17, count=2):
        fit = run("minibatches", tmp_path, every=5)
    assert fit.interrupted
    (path,) = tmp_path.rglob(FILE)
    assert read_checkpoint(path)[0]["steps"] == 15


def test_the_cosine_remembers_its_length(tmp_path: Path) -> None:
    """Its step size depends on the number of steps, so that may not grow; under the other schedules it may."""
    whole = run("full batch", schedule="cosine")
    with signals(17):
        run("full batch", tmp_path, schedule="cosine")
    with pytest.raises(InvalidInput, match="found a checkpoint of option steps 24, expected 25"):
        run("full batch", tmp_path, schedule="cosine", steps=25)
    resumed = run("full batch", tmp_path, schedule="cosine")
    assert resumed.converged and difference(resumed, whole) is None


def test_seconds_are_those_of_all_processes(tmp_path: Path) -> None:
    """The time before the checkpoint counts; a fit that comes back without a step has at least as much."""
    first = run("semi-amortized", tmp_path)
    again = run("semi-amortized", tmp_path)
    assert again.seconds >= 0.9 * first.trajectory["seconds"].sum()
    assert run("semi-amortized", tmp_path / "new", steps=1).seconds < again.seconds


def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Fits that had ended take no step again; EM is run anew; the table is the same but for the seconds."""

    def compare(folder: Path | None) -> Any:
        given = {"latent_dim": 1, "steps": 10, "progress": False, "checkpoint": folder}
        found = ez.compare("ppca", rows("ppca"), methods=["em", "mean-field"], seeds=2, **given)
        return found.table.drop(columns="seconds")

    whole = compare(None)
    with signals(7):
        part = compare(tmp_path)
    assert part["method"].tolist() == ["em", "em", "mean-field"] and part["steps"].iloc[-1] == 7
    assert compare(tmp_path).equals(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free-diagonal-normal-0", "free-diagonal-normal-1"]


@pytest.mark.slow
def test_the_ways_to_one_q_keep_apart_from_the_model(tmp_path: Path) -> None:
    """``methods="all"`` learns θ by a method that comes again as a way to q: two fits, two folders, one answer."""
    given = {"methods": "all", "seeds": 1, "steps": 6, "progress": False, **NETWORK, "refinements": 1}
    first = ez.compare("vae", rows("vae"), checkpoint=tmp_path, **given)
    again = ez.compare("vae", rows("vae"), checkpoint=tmp_path, **given)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["amortized-diagonal-normal-0"]
    assert (tmp_path / "amortized-diagonal-normal-0").is_dir()
    assert first.table.drop(columns="seconds").equals(again.table.drop(columns="seconds"))


# ---- what is refused, in one line, with nothing lost ----------------------------------------------------------------


@cache
def _ten_steps() -> bytes:
    with TemporaryDirectory() as folder:
        run("full batch", Path(folder), steps=10)
        (path,) = Path(folder).rglob(FILE)
        return path.read_bytes()


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A directory with the checkpoint of ten steps over the full batch."""
    folder = tmp_path / "kept" / "free-diagonal-normal-0"
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(_ten_steps())
    return folder.parent


def refused(folder: Path, message: str, again: Callable[[], Any]) -> None:
    """``again`` is refused with ``message`` in one line, and the checkpoint stays as it is."""
    (path,) = folder.rglob(FILE)
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match=message) as caught:
        again()
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and "delete that file to start over" in text
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.02}, "found a checkpoint of option learning_rate 0.01, expected 0.02"),
        ({"latent_dim": 2}, "found a checkpoint of model option latent_dim 1, expected 2"),
        ({"initial_scale": 0.2}, "found a checkpoint of guide option initial_scale None, expected 0.2"),
        ({"objective": "iwae"}, "found a checkpoint of option objective 'auto', expected 'iwae'"),
        ({"steps": 5}, "found a checkpoint of 10 steps, expected at most the 5 that this fit is allowed"),
    ],
)
def test_other_options_are_refused(change: dict[str, Any], message: str, kept: Path) -> None:
    """Each by its name, with both values."""
    refused(kept, message, lambda: run("full batch", kept, **{"steps": 10, **change}))


def test_another_model_method_seed_and_data_are_refused(kept: Path) -> None:
    """Where a folder is renamed or shared; each named with what was found."""
    x = rows("ppca")

    def fit(model: Any = "ppca", data: Any = x, method: str = "mean-field", seed: int = 0) -> Any:
        return lambda: ez.fit(
            model, data, method=method, seed=seed, checkpoint=kept, latent_dim=1, steps=10, progress=False
        )

    refused(kept, "found a checkpoint of model 'ppca', expected 'factor-analysis'", fit("factor-analysis"))
    changed = x.clone()
    changed[3, 1] += 1e-12
    shape = r"data of shape \(20, 5\) with the checksum [0-9a-f]{8}"
    refused(kept, f"found a checkpoint of {shape}, expected {shape}", fit(data=changed))
    refused(kept, rf"found a checkpoint of {shape}, expected data of shape \(19, 5\)", fit(data=x[1:]))
    folder = kept / "free-diagonal-normal-0"
    for name, message, again in (
        ("free-delta-0", "method 'free-diagonal-normal', expected 'free-delta'", fit(method="free-delta")),
        ("free-diagonal-normal-1", "seed 0, expected 1", fit(seed=1)),
    ):
        folder = folder.rename(kept / name)
        refused(kept, f"found a checkpoint of {message}", again)


def test_another_version_is_refused_and_another_machine_is_told(
    kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other code may go on to other numbers; other hardware may differ in last digits, which is worth a warning."""
    from elbozoo.inference import method

    own = method.provenance()
    monkeypatch.setattr(method, "provenance", lambda: {**own, "torch": "1.0"})
    refused(
        kept,
        f"found a checkpoint of version torch '{own['torch']}', expected '1.0'".replace("+", r"\+"),
        lambda: run("full batch", kept, steps=10),
    )
    monkeypatch.setattr(method, "provenance", lambda: {**own, "threads": "many"})
    assert "threads" not in caplog.text
    run("full batch", kept, steps=10)
    assert "goes on with many: the last digits may come out otherwise" in caplog.text


def test_a_program_of_the_users_keeps_checkpoints_too(tmp_path: Path) -> None:
    """It is known by its class and its parameters; another one is refused."""
    import pyro
    from pyro import distributions as dist
    from pyro.nn import PyroModule

    class Line(PyroModule):
        def __init__(self, size: int = 1) -> None:
            super().__init__()
            self.slope = torch.nn.Parameter(torch.ones(size, dtype=torch.float64))

        def forward(self, batch: Any) -> Any:
            with pyro.plate("data", batch.total, subsample=batch.index):
                z = pyro.sample("z", dist.Normal(batch.x.new_zeros(()), 1.0))
                mean = (z[..., None] * self.slope).sum(-1, keepdim=True)
                return pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=batch.x)

    class Other(Line):
        pass

    x = rows("ppca")[:, :1]

    def fit(program: Any, steps: int = 20, folder: Path | None = tmp_path) -> Fit:
        return ez.fit(program, x, guide="free-diagonal-normal", checkpoint=folder, steps=steps, progress=False)

    fit(Line(), steps=9)
    assert difference(fit(Line()), fit(Line(), folder=None)) is None
    refused(tmp_path, "found a checkpoint of model 'program .*Line', expected 'program .*Other'", lambda: fit(Other()))
    refused(tmp_path, "does not fit this model and guide", lambda: fit(Line(2)))


@pytest.mark.parametrize("damage", ["truncated", "cut to nothing", "one bit", "one bit of the card", "another file"])
def test_a_damaged_checkpoint_is_refused_and_kept(damage: str, kept: Path) -> None:
    """Whatever happened to the file; undamaged, it goes on."""
    (path,) = kept.rglob(FILE)
    whole = path.read_bytes()
    header = whole.index(b"learning_rate")
    broken = {
        "truncated": whole[: len(whole) // 2],
        "cut to nothing": b"",
        "one bit": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "one bit of the card": whole[:header] + b"k" + whole[header + 1 :],
        "another file": b"some text that is no checkpoint, and long enough to be read as one",
    }[damage]
    path.write_bytes(broken)
    refused(kept, "the checkpoint is damaged", lambda: run("full batch", kept, steps=10))
    path.write_bytes(whole)
    assert len(run("full batch", kept, steps=11).trajectory) == 11


def test_other_formats_are_refused(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later format, and tensors that are nobody's checkpoint."""
    (path,) = kept.rglob(FILE)
    monkeypatch.setattr(module, "FORMAT", 2)
    refused(kept, "found a checkpoint of format 1, expected 2", lambda: run("full batch", kept, steps=10))
    monkeypatch.undo()
    save_file(load_file(path), path)
    refused(kept, "found no checkpoint of elbozoo", lambda: run("full batch", kept, steps=10))


def test_a_checkpoint_is_no_pickle(kept: Path) -> None:
    """JSON in the header of safetensors, which cannot run what it reads."""
    (path,) = (path for path in kept.rglob("*") if path.is_file())
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    card = json.loads(header["__metadata__"]["card"])
    assert card["identity"]["model"] == "ppca" and card["steps"] == 10
    assert {key.partition("/")[0] for key in header if key != "__metadata__"} >= {"model", "guide", "step", "random"}


def test_methods_without_checkpoints_and_wrong_intervals_are_refused(tmp_path: Path) -> None:
    """With the reason and before any work; a directory that cannot be written too."""
    with pytest.raises(InvalidInput, match="checkpoint: found with em, expected a guide or Monte Carlo EM"):
        ez.fit("ppca", "iris", method="em", checkpoint=tmp_path)
    with pytest.raises(InvalidInput, match="checkpoint: found with closed-form"):
        ez.compare("ppca", "iris", methods=["closed-form"], checkpoint=tmp_path)
    for wrong in (0, 1.5, True):
        with pytest.raises(InvalidInput, match=f"checkpoint_every: found {wrong!r}, expected int >= 1"):
            ez.fit("ppca", "iris", checkpoint=tmp_path, checkpoint_every=wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="choose one that can be written to"):
        ez.fit("ppca", "iris", checkpoint=tmp_path / "file")


def test_the_random_state_goes_through_a_file_unchanged(tmp_path: Path) -> None:
    """Torch, NumPy and Python draw on as if nothing had been; a seed alone does not give those draws."""
    import numpy as np

    def draw() -> tuple[Any, ...]:
        return torch.randn(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()

    with isolated(5):
        draw()  # leaves half a pair of normal numbers behind in NumPy and in Python
        memory = RandomStates().memory()
        write_checkpoint(tmp_path / FILE, {"values": memory.values}, memory.tensors)
        expected = draw()
        assert draw() != expected
        card, tensors = read_checkpoint(tmp_path / FILE)
        RandomStates().recall(Memory(tensors, card["values"]))
        assert draw() == expected


def test_the_command_line_and_the_library_have_one_interval() -> None:
    """The command line states it again, so that a page of help imports no torch."""
    from elbozoo.cli import CHECKPOINT_STEPS

    assert CHECKPOINT_STEPS == module.EVERY == Records().checkpoint_every
    assert plan("ppca", rows("ppca"), "mean-field", {}).keeps_records
