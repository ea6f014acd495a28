"""Engines of SVI: on the same noise the captured and the compiled step give the losses of Pyro's own.

Captured graphs hold the operations of the eager step, so that what differs is rounding: 1e-5 relative over 20 steps, in
single precision where an entry has networks.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from contract import every_pair, example_data
from pyro import distributions as dist
from pyro.infer import SVI
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from elbozoo.guides import build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.inference import engines
from elbozoo.inference.capture import capture, with_narrow_products_as_sums
from elbozoo.inference.checkpoints import Checkpoints
from elbozoo.inference.engines import CapturedStep, make_step
from elbozoo.inference.method import plan
from elbozoo.inference.objectives import resolve_objective
from elbozoo.inference.records import Records
from elbozoo.inference.steps import PyroStep, Step
from elbozoo.inference.svi import _particles, run_svi
from elbozoo.inference.training import TrainingOptions
from elbozoo.models import Batch
from elbozoo.models.contract.isolation import isolated

STEPS = 20
TOLERANCE = 1e-5  # relative, over STEPS steps
# Steps that decide by the values of tensors: packed sequences of unequal length, and Pyro's splines.
UNCAPTURED = {
    ("hidden-markov-model", "amortized-categorical"),
    ("linear-gaussian-state-space", "amortized-delta"),
    ("linear-gaussian-state-space", "amortized-diagonal-normal"),
    ("linear-gaussian-state-space", "amortized-full-rank-normal"),
}


def losses(name: Any, guide: str, engine: str, x: Tensor | None = None, **options: Any) -> tuple[list[float], Any]:
    """Loss of each of ``STEPS`` steps under ``engine``, and the step itself (None where nothing is learned)."""
    rows = example_data(name) if x is None else x
    prepared = plan(name, rows, guide, {"steps": STEPS, "engine": engine, **options})
    entry, steps = prepared.build(0), []
    x = prepared.x.to(entry.dtype)
    with isolated(0):
        training = prepared.schema(TrainingOptions)
        q = build_guide(prepared.method, entry, x, prepared.schema(GuideOptions))

        def kept(*arguments: Any) -> Step:
            steps.append(make_step(*arguments))
            return steps[-1]

        objective = resolve_objective(training.objective, q, training)
        result = run_svi(entry, q, objective, Batch.full(x), training, progress=False, make_step=kept)
    return [-row[2] for row in result.trajectory.rows], steps[0] if result.trajectory.rows else None


def difference(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference between two records of losses."""
    assert len(ours) == len(theirs)
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))


# ---- every entry x guide ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "guide"), every_pair())
def test_the_captured_step_is_the_eager_one(name: str, guide: str) -> None:
    """20 steps, same seed; all but the steps listed are captured."""
    eager, _ = losses(name, guide, "eager")
    captured, step = losses(name, guide, "captured")
    if step is None:
        assert eager == []
        return
    is_spline = guide.endswith("-flow") and name == "hierarchical-vae"
    assert (step.engine == "eager") == ((name, guide) in UNCAPTURED or is_spline), step.refused
    assert difference(captured, eager) <= TOLERANCE


COMPILED = [
    ("ppca", "free-diagonal-normal", {}),
    ("gaussian-mixture", "amortized-categorical", {}),
    ("eight-schools", "diagonal-normal", {}),
    ("vae", "amortized-diagonal-normal", {"batch_size": 8, "objective": "iwae"}),
    ("beta-vae", "amortized-diagonal-normal", {"kl": "analytic"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guide", "options"), COMPILED)
def test_the_compiled_step_is_the_eager_one(name: str, guide: str, options: dict[str, Any]) -> None:
    """20 steps of machine code, same seed."""
    eager, _ = losses(name, guide, "eager", **options)
    compiled, step = losses(name, guide, "compiled", **options)
    assert step.engine == "compiled"
    assert difference(compiled, eager) <= TOLERANCE


def test_other_noise_gives_other_losses() -> None:
    """Negative control of all the comparisons here: a seed later they fail."""
    eager, _ = losses("ppca", "free-diagonal-normal", "eager")
    prepared = plan("ppca", example_data("ppca"), "free-diagonal-normal", {"steps": STEPS, "engine": "captured"})
    assert difference([-v for v in prepared.run(1, progress=False).trajectory["objective"]], eager) > TOLERANCE


# ---- every objective -------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "sampled": ("vae", {"objective": "elbo"}),
    "analytic": ("vae", {"objective": "elbo-analytic"}),
    "iwae": ("vae", {"objective": "iwae", "particles": 5}),
    "doubly reparameterised": ("vae", {"objective": "iwae", "gradient": "doubly-reparameterised"}),
    "score": ("vae", {"objective": "elbo", "gradient": "score"}),
    "annealed": ("vae", {"objective": "beta", "kl_schedule": "annealed", "kl_steps": 15, "kl_weight": 4.0}),
    "free bits": ("vae", {"objective": "beta", "free_bits": 0.1, "kl": "analytic"}),
    "wake and sleep": ("vae", {"objective": "reweighted-wake-sleep", "sleep": 0.5}),
    "wake-sleep of a class": ("gaussian-mixture", {"objective": "reweighted-wake-sleep"}),
    "enumerated": ("gaussian-mixture", {"objective": "elbo-enumerated"}),
    "score of a class": ("gaussian-mixture", {"objective": "elbo", "gradient": "score"}),
    "particles": ("ppca", {"particles": 3}),
    "clipped": ("ppca", {"clip_norm": 0.5}),
    "corrupted": ("denoising-autoencoder", {}),
    "minibatches": ("vae", {"batch_size": 7}),
    "cosine": ("ppca", {"schedule": "cosine"}),
}


@pytest.mark.parametrize("what", OBJECTIVES)
def test_every_objective_is_captured(what: str) -> None:
    """Objectives, gradients, schedules, clipping, corruption and minibatches: 20 steps, same seed."""
    name, options = OBJECTIVES[what]
    eager, _ = losses(name, "amortized", "eager", **options)
    captured, step = losses(name, "amortized", "captured", **options)
    assert step.engine == "captured", step.refused
    assert difference(captured, eager) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "guide"),
    [("ppca", "mean-field"), ("gaussian-mixture", "amortized"), ("vae", "amortized"), ("eight-schools", "full-rank")],
)
def test_pyros_own_svi_takes_the_same_steps(name: str, guide: str) -> None:
    """``pyro.infer.SVI`` with Pyro's optimiser and ELBO on the same noise, whole batches."""
    prepared = plan(name, example_data(name), guide, {"steps": STEPS, "engine": "captured"})
    ours = [-value for value in prepared.run(0, progress=False).trajectory["objective"]]
    entry = prepared.build(0)
    x = prepared.x.to(entry.dtype)
    with isolated(0):
        training = prepared.schema(TrainingOptions)
        q = build_guide(prepared.method, entry, x, prepared.schema(GuideOptions))
        random_state = torch.get_rng_state()
    objective = resolve_objective(training.objective, q, training)
    elbo = objective.build(_particles(objective, q, Batch.full(x), training), q, training)
    with pyro.get_param_store().scope():
        torch.set_rng_state(random_state)
        svi = SVI(entry, q, pyro.optim.Adam({"lr": training.learning_rate}), elbo)
        theirs = [svi.step(Batch.full(x)) for _ in range(STEPS)]
    assert difference(ours, theirs) <= TOLERANCE


# ---- forms of batches, moments, interruptions ------------------------------------------------------------------------


def a_step(engine: str = "captured", rows: int = 24, **options: Any) -> tuple[CapturedStep, Tensor]:
    x = example_data("vae")[:rows].float()
    entry = plan("vae", x.double(), "amortized", {}).build(0)
    with isolated(0):
        q = build_guide("amortized", entry, x)
    training = TrainingOptions(engine=engine, **options)
    return CapturedStep(entry, q, resolve_objective("elbo", q), 1, training), x


def test_a_batch_of_another_shape_is_captured_anew_and_a_short_last_one_taken() -> None:
    """Three forms, three graphs, one optimiser: the steps of PyTorch's own Adam, count and moments included."""
    ours, x = a_step()
    theirs, _ = a_step()
    full = Batch.full(x)
    batches = [full, full.rows(0, 10), full.rows(10, 20), full.rows(20, 24), full.rows(0, 10), full]
    with isolated(0):
        captured = [ours(batch) for batch in batches]
    with isolated(0):
        eager = [PyroStep.__call__(theirs, batch) for batch in batches]
    assert difference(captured, eager) <= TOLERANCE and len(ours.runners) == 3
    for name, tensor in ours.memory().tensors.items():
        other = theirs.memory().tensors[name]
        assert float((tensor - other).abs().max()) <= 1e-5 * (1e-3 + float(other.abs().max())), name


def test_rows_in_another_order_are_not_taken_for_the_data_set() -> None:
    """A free guide's rows are looked up by position, unless the batch is all of them in their own order."""
    x = example_data("ppca")
    entry = plan("ppca", x, "mean-field", {}).build(0)
    with isolated(0):
        q = build_guide("mean-field", entry, x)
    step = CapturedStep(entry, q, resolve_objective("elbo", q), 1, TrainingOptions(engine="captured"))
    other = PyroStep(entry, q, resolve_objective("elbo", q), 1, TrainingOptions())
    turned = Batch(x.flip(0), torch.arange(len(x)).flip(0), len(x))
    with isolated(0):
        step(Batch.full(x))
        step(Batch.full(x))
    with isolated(1):
        expected = float(other.loss(turned).detach())
    with isolated(1):
        wrong = float(other.loss(Batch.full(x)).detach())
    with isolated(1):
        assert step(turned) == pytest.approx(expected, rel=1e-10)
    assert abs(wrong - expected) > 1e-6 * abs(expected)


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    """Parameters, moments and the count stay for a look at the culprit."""
    step, x = a_step()
    with isolated(0):
        for _ in range(3):
            step(Batch.full(x))
        before = {name: p.detach().clone() for name, p in step.guide.named_parameters()}
        assert not math.isfinite(step(Batch.full(torch.full_like(x, math.nan))))
    assert step.count == 3
    assert all(torch.equal(before[name], p) for name, p in step.guide.named_parameters())


def test_checkpoints_go_on_with_the_same_bits(tmp_path: Any) -> None:
    """Captured steps give their moments to the checkpoint, and take them back."""
    options = {"steps": 60, "engine": "captured", "batch_size": 10}
    whole = plan("vae", example_data("vae"), "amortized", options).run(0, progress=False)
    real, count = Checkpoints.after_step, 0

    def stop(self: Checkpoints, step: int) -> None:
        nonlocal count
        real(self, step)
        count += 1
        if count == 37:
            raise RuntimeError("killed")

    records = Records(checkpoint=tmp_path, checkpoint_every=5)
    kept = plan("vae", example_data("vae"), "amortized", options, records=records)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Checkpoints, "after_step", stop)
        kept.run(0, progress=False)
    resumed = kept.run(0, progress=False)
    assert resumed.trajectory["objective"].tolist() == whole.trajectory["objective"].tolist()


# ---- which engine, and what is said ----------------------------------------------------------------------------------


def of_form(x: Tensor) -> Tensor:
    """Latent scale of a program that looks at values."""
    return torch.ones(()) if float(x.mean()) > 1e9 else torch.tensor(2.0)


class Looking(pyro.nn.PyroModule):
    """A program of the user's that decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(0.0 * batch.x.mean(), of_form(batch.x)))
            if float(self.loc.sum()) > 1e9:
                z = z + 1.0
            return pyro.sample("x", dist.Normal(self.loc + z[..., None], 1.0).to_event(1), obs=batch.x)


class Plain(Looking):
    """A normal about a learned place, to which its children add something that no graph holds."""

    def added(self, batch: Batch) -> Any:
        return 0.0

    def forward(self, batch: Batch) -> Tensor:
        added = self.added(batch)
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            return pyro.sample("x", dist.Normal(self.loc + z[..., None] + added, 1.0).to_event(1), obs=batch.x)


class Counting(Plain):
    """It changes a buffer of its own, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def added(self, batch: Batch) -> Any:
        self.calls.add_(1)
        return 0.1 * self.calls


class Rebinding(Counting):
    """It puts another buffer in the place of its own."""

    def added(self, batch: Batch) -> Any:
        self.calls = 0.9 * self.calls + 0.1 * batch.x.mean()
        return self.calls


class Remembering(Plain):
    """It counts its runs in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def added(self, batch: Batch) -> Any:
        self.runs += 1
        return 1.0 if self.runs > 1000 else 0.0


class TakingOut(Plain):
    """It takes values out of tensors in a way that tracing does not see."""

    def added(self, batch: Batch) -> Any:
        return torch.tensor(self.loc.detach().mean(0).reshape(1).tolist(), dtype=torch.float64)


class Aliased(Plain):
    """Half of its gradient goes through another name of the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.others = [self.loc]

    def added(self, batch: Batch) -> Any:
        return self.others[0] - self.loc.detach()


class Seeding(Plain):
    """It draws a fixed projection from a seed of its own."""

    def added(self, batch: Batch) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.randn(5, dtype=torch.float64)


class FromNumPy(Plain):
    """It draws from another generator."""

    def added(self, batch: Batch) -> Any:
        return 0.0 if np.random.random() < 2.0 else 1.0


class Picking(Counting):
    """A program with a shape that depends on values."""

    def forward(self, batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.factor("some", batch.x[batch.x > 0].sum() * self.loc.sum() * torch.zeros(len(batch.x)))
            return pyro.sample("x", dist.Normal(self.loc + z[..., None], 1.0).to_event(1), obs=batch.x)


REASONS = {
    Looking: "trying to get value out of a tracing tensor",
    Counting: "the program changes its own entry.program.calls",
    Rebinding: "the program changes its own entry.program.calls",
    Remembering: "the program changes its own entry.program.runs",
    TakingOut: "the program takes values out of tensors by tolist",
    Aliased: "its graph gives another gradient of entry.program.loc than the program",
    Seeding: "the program sets the state of the random generator itself",
    FromNumPy: "the program draws from NumPy",
    Picking: "index has a shape that depends on values; use torch.where or a mask",
}


@pytest.mark.parametrize("program", REASONS)
@pytest.mark.parametrize(("engine", "level"), [("captured", logging.WARNING), ("auto", logging.INFO)])
def test_what_cannot_be_captured_runs_as_it_is_and_one_line_says_why(
    program: type[Looking], engine: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning where capture was asked for; the losses are the eager ones."""
    x = example_data("ppca")
    eager, _ = losses(program(), "mean-field", "eager", x)
    caplog.clear()
    with caplog.at_level(logging.INFO, "elbozoo"):
        ours, step = losses(program(), "mean-field", engine, x, steps=engines.STEPS_OF_CAPTURE, tolerance=1e-300)
    assert step.engine == "eager"
    assert difference(ours[:STEPS], eager) <= TOLERANCE
    (line,) = [record for record in caplog.records if "not captured" in record.message]
    assert line.levelno == level and REASONS[program] in line.message


def test_without_a_compiler_the_step_is_captured_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "has_compiler", lambda device: False)
    _, step = losses("ppca", "mean-field", "compiled")
    assert step.engine == "captured"
    (line,) = [record for record in caplog.records if "not compiled" in record.message]
    assert line.levelno == logging.WARNING and "found no C++ compiler; install g++ or clang++" in line.message


def test_wrong_machine_code_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Compiled code is held against the graph: here one number of a parameter is wrong by a hundredth."""

    def broken(graph: Any, **kwargs: Any) -> Any:
        def run(*inputs: Tensor) -> list[Tensor]:
            loss, first, *rest = graph(*inputs)
            return [loss, first * 1.01, *rest]

        return run

    monkeypatch.setattr(torch, "compile", broken)
    ours, step = losses("ppca", "mean-field", "compiled")
    assert step.engine == "captured" and "differ from the graph's" in caplog.text
    assert difference(ours, losses("ppca", "mean-field", "eager")[0]) <= TOLERANCE


def test_auto_chooses_by_steps_and_size_and_not_by_the_clock() -> None:
    """Few steps stay eager; a big step of a long fit is compiled, a small one later or never."""
    short, _ = losses("ppca", "mean-field", "auto")
    assert len(short) == STEPS
    step, x = a_step("auto")
    with isolated(0):
        graph = capture(step, Batch.full(x)).graph

    def at(**options: Any) -> int | None:
        return engines.step_of_compilation(graph, TrainingOptions(**options))

    assert at(steps=500) is None  # a small step, over before its code would be there
    late, known = at(steps=100_000), at(steps=100_000, schedule="cosine")
    assert known == 1  # all steps of a cosine will be taken
    assert late is not None and 1 < late < 100_000  # a plateau may come at any time
    assert at(steps=500, engine="compiled") == 1 and at(steps=100_000, engine="captured") is None


def test_gamma_draws_stay_inside_the_graph_and_come_in_the_eager_order() -> None:
    """Their sampler cannot take noise from outside: the graph draws, is not compiled, and gives the same losses."""
    x, options = example_data("gamma-poisson"), {"objective": "reweighted-wake-sleep", "sleep": 0.5}
    eager, _ = losses(GammaProgram(), "amortized", "eager", x, **options)
    ours, step = losses(GammaProgram(), "amortized", "compiled", x, **options)
    assert step.engine == "captured" and difference(ours, eager) <= TOLERANCE


class GammaProgram(pyro.nn.PyroModule):
    """A rate for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Gamma(2.0, self.log_rate.exp()))
            rate = z[..., None].expand(*z.shape, batch.x.shape[-1])
            return pyro.sample("x", dist.Poisson(rate).to_event(1), obs=batch.x)


def test_thin_products_are_sums_of_products() -> None:
    """What is compiled in place of thin matrix products gives their numbers: 1e-12 relative, in double precision."""
    aten = torch.ops.aten

    def products(a: Tensor, b: Tensor, c: Tensor, wide: Tensor) -> list[Tensor]:
        several = torch.bmm(a.expand(3, -1, -1), b.expand(3, -1, -1))
        return [torch.addmm(c, a, b), a.mT @ a, several, wide @ wide, a @ b @ b.mT]

    with isolated(0):
        inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((40, 3), (3, 5), (5,), (20, 20))]
    graph = make_fx(products)(*inputs)
    sums = with_narrow_products_as_sums(graph)
    for one, other in zip(sums(*inputs), graph(*inputs), strict=True):
        assert float((one - other).abs().max()) <= 1e-12 * float(other.abs().max())
    kinds = {aten.mm.default, aten.bmm.default, aten.addmm.default}
    left = [n.target for n in sums.graph.nodes if n.target in kinds]
    assert left == [aten.bmm.default, aten.mm.default]  # those of many seeds, and the wide one
