"""Fits on another device: what they need of it, where they end, and what a machine without it says.

No accelerator is needed here: `elsewhere` plays one, whose tensors hold the CPU's numbers and refuse, as those of an
accelerator do, to meet tensors of the CPU. A fit there is the fit here but for the order in which sums of gradients
are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import elsewhere
import pyro
import pytest
import torch
from contract import entry_for, every_entry, example_data, guide_for
from pyro import distributions as dist
from pyro.nn import PyroModule

import elbozoo as ez
from elbozoo.guides import guide_names
from elbozoo.guides.registry import WHOLE_GUIDES
from elbozoo.inference import method
from elbozoo.inference.devices import available_devices, resolve_device
from elbozoo.inference.memory import RandomStates
from elbozoo.inference.objectives import resolve_objective
from elbozoo.inference.svi import TrainingOptions, run_svi
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

STEPS = 2
# Relative, on what is computed in double precision: sums of some hundred terms, rounded in another order, differ
# by 1e-13 or less; steps of Adam that are longer by 1e-4 of themselves, or 1e-6, end elsewhere by that.
TOLERANCE = 1e-9
PREFERRED = (
    *(guide.NAME for guide in WHOLE_GUIDES),
    "amortized-diagonal-normal",
    "amortized-categorical",
    "amortized-delta",
    "full-rank-normal",
)

CPU = torch.device("cpu")

Numbers = list[float]


def trained(name: str, guide: str, there: bool, **options: Any) -> Numbers:
    """Objectives of two steps, then all numbers of model and guide, fitted here or there."""
    entry, x = entry_for(name), example_data(name)
    q = guide_for(entry, guide, x)
    chosen = TrainingOptions(steps=STEPS, **options)
    objective = resolve_objective(chosen.objective, q, chosen)

    def fit(device: torch.device) -> Numbers:
        batch = Batch.full(x.to(device))
        entry.to(device)
        q.to(device)
        with isolated(0):
            found = run_svi(entry, q, objective, batch, chosen, progress=False).trajectory
        entry.cpu()
        q.cpu()
        return found.frame()["objective"].tolist()

    if there:
        with elsewhere.device() as device:
            objectives = fit(device)
    else:
        objectives = fit(torch.device("cpu"))
    state = [*entry.state_dict().values(), *q.state_dict().values()]
    return objectives + torch.cat([value.double().flatten() for value in state]).tolist()


def guide_of(name: str) -> str:
    """The guide that stands for the entry: that of new data where there is one."""
    fitting = guide_names(get_entry(name).example())
    return next(iter([each for each in PREFERRED if each in fitting] or fitting))


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The pretended device, under the name of cuda."""
    monkeypatch.setattr(method, "resolve_device", lambda name, dtype: elsewhere.DEVICE if name == "cuda" else CPU)
    with elsewhere.device() as device:
        yield device


@pytest.mark.slow
@pytest.mark.parametrize("name", every_entry())
def test_every_entry_is_fitted_where_it_is(name: str) -> None:
    """Neither the program nor its guide makes a tensor on the CPU whatever the device; a longer step is another."""
    guide = guide_of(name)
    here = trained(name, guide, False)
    assert trained(name, guide, True) == pytest.approx(here, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True)
    if guide != "exact":
        longer = trained(name, guide, False, learning_rate=0.010001)
        assert longer != pytest.approx(here, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "guide", "options"),
    [
        ("vae", "amortized-diagonal-normal", {"batch_size": 5}),
        ("vae", "amortized-diagonal-normal", {"objective": "iwae", "gradient": "doubly-reparameterised"}),
        ("vae", "amortized-diagonal-normal", {"objective": "beta", "kl": "analytic", "free_bits": 0.1}),
        ("vae", "amortized-diagonal-normal", {"objective": "reweighted-wake-sleep", "sleep": 0.5}),
        ("vae", "amortized-flow", {}),
        ("vae", "semi-amortized-full-rank-normal", {}),
        ("ppca", "free-low-rank-normal", {"gradient": "score"}),
        ("gaussian-mixture", "free-categorical", {}),
        ("hidden-markov-model", "amortized-categorical", {}),
        ("normal-mean", "low-rank-normal", {}),
    ],
)
def test_objectives_and_guides_are_fitted_where_they_are(name: str, guide: str, options: dict[str, Any]) -> None:
    """Every kind of loss and of q, minibatches, and their draws."""
    here = trained(name, guide, False, **options)
    assert trained(name, guide, True, **options) == pytest.approx(here, rel=TOLERANCE, abs=TOLERANCE)


def test_the_pretended_device_refuses_what_a_real_one_refuses() -> None:
    """The control of all above: a program with one tensor on the CPU does not run there, and does here."""

    class Careless(PyroModule):
        def __init__(self, careful: bool) -> None:
            super().__init__()
            self.careful = careful

        def forward(self, batch: Batch) -> torch.Tensor:
            prior = batch.x.new_zeros(2) if self.careful else torch.zeros(2, dtype=batch.x.dtype)
            with pyro.plate("data", batch.total, subsample=batch.index):
                z = pyro.sample("z", dist.Normal(prior, 1.0).to_event(1))
                return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=batch.x)

    x = torch.ones(4, 2, dtype=torch.float64)
    for careful in (True, False):
        ez.fit(Careless(careful), x, guide="free-diagonal-normal", steps=1, progress=False)
    with elsewhere.device() as device, isolated(0):
        batch = Batch.full(x.to(device))
        pyro.poutine.trace(Careless(True)).get_trace(batch).compute_log_prob()
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            pyro.poutine.trace(Careless(False)).get_trace(batch).compute_log_prob()


@pytest.mark.parametrize(
    ("chosen", "options"),
    [("amortized", {"steps": 3, "batch_size": 8}), ("em", {"iterations": 2}), ("free-delta", {"steps": 3})],
)
def test_a_fit_comes_back_to_the_cpu(chosen: str, options: dict[str, Any], there: torch.device) -> None:
    """There while it runs, here and in float64 when it is judged: the fit of the CPU, by SVI and by Monte Carlo EM."""
    x = example_data("vae")
    fits = [
        ez.fit("vae", x, method=chosen, hidden=4, device=device, progress=False, **options)
        for device in ("cuda", "cpu")
    ]
    for fit in fits:
        for value in [*fit.entry.state_dict().values(), *fit.guide.state_dict().values()]:
            assert type(value) is torch.Tensor and value.device == CPU and value.dtype == torch.float64
    # Relative, single precision: three steps of rounding in another order.
    objectives = [fit.trajectory["objective"].tolist() for fit in fits]
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-5)
    other = ez.fit("vae", x, method=chosen, hidden=4, seed=1, progress=False, **options)
    assert objectives[0] != pytest.approx(other.trajectory["objective"].tolist(), rel=1e-5)


def test_laplace_takes_its_curvature_on_the_cpu(there: torch.device) -> None:
    """What is left to do after the last step is done where Hessians are cheap and in double precision."""
    x = example_data("logistic-regression")
    fits = [ez.fit("logistic-regression", x, guide="laplace", device=d, progress=False) for d in ("cuda", "cpu")]
    locations = [fit.guide.state_dict()["auto.loc"].tolist() for fit in fits]
    # The mode is found to 1e-9 of its gradient.
    assert locations[0] == pytest.approx(locations[1], rel=1e-6)


def test_a_checkpoint_goes_to_the_device_and_back(there: torch.device, tmp_path: Any) -> None:
    """Written from there, it is read there; on another device it is refused, since the noise is another."""
    x = example_data("vae")

    def fit(steps: int, folder: Any = tmp_path, device: str = "cuda") -> Any:
        return ez.fit(
            "vae", x, guide="amortized", hidden=4, batch_size=8, steps=steps, device=device, checkpoint=folder,
            progress=False,
        )  # fmt: skip

    fit(3)
    resumed, whole = fit(6), fit(6, None)
    assert resumed.trajectory["objective"].tolist() == whole.trajectory["objective"].tolist()
    with pytest.raises(InvalidInput, match="found a checkpoint of device 'meta', expected 'cpu'"):
        fit(6, device="cpu")


# ---- names of devices ------------------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "single", "double"),
    [(0, False, "cpu", "cpu"), (2, False, "cuda", "cuda"), (0, True, "mps", "cpu"), (1, True, "cuda", "cuda")],
)
def test_auto_is_the_fastest_that_knows_the_type(
    cuda: int, mps: bool, single: str, double: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's GPU has no float64, in which entries with an oracle are fitted."""
    pretend(monkeypatch, cuda, mps)
    assert resolve_device("auto", torch.float32) == torch.device(single)
    assert resolve_device("auto", torch.float64) == torch.device(double)
    for name in available_devices():
        assert resolve_device(name, torch.float32) == torch.device(name)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("cuda", torch.float32, "found 'cuda', which this machine or this build of torch does not have, expected one "
         "of: auto, mps, cpu"),
        ("cuda:1", torch.float32, "found 'cuda:1', which this machine .* expected one of: auto, mps, cpu"),
        ("gpu", torch.float32, "found 'gpu', expected one of: auto, mps, cpu"),
        ("meta", torch.float32, "found 'meta', expected one of"),
        ("mps", torch.float64, "found 'mps' with a model that is fitted in float64.*use device=cpu"),
    ],
)  # fmt: skip
def test_devices_that_are_not_there_are_refused(
    name: str, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what there is, in one line."""
    pretend(monkeypatch, cuda=0, mps=True)
    with pytest.raises(InvalidInput, match=f"option device: {message}") as caught:
        resolve_device(name, dtype)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("model", "chosen"), [("ppca", "mean-field"), ("vae", "em")])
def test_a_missing_device_is_refused_before_the_work(model: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every method that reads the option."""
    pretend(monkeypatch, cuda=0, mps=False)
    with pytest.raises(InvalidInput, match=r"found 'cuda:0', which this machine .*, expected one of: auto, cpu"):
        method.plan(model, example_data(model), chosen, {"device": "cuda:0"})
    method.plan(model, example_data(model), chosen, {"device": "auto"})


def test_isolated_programs_leave_an_accelerators_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed sets the generators of all devices, so each is given back; and a checkpoint holds them."""
    states = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3, 4], dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in states])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, name: states[int(name[-1])].copy_(value))
    with isolated(0):
        memory = RandomStates().memory()
        for state in states:
            state.zero_()
    assert [state.tolist() for state in states] == [[1, 2], [3, 4]]
    for state in states:
        state.zero_()
    with isolated(0):
        RandomStates().recall(memory)
        assert [state.tolist() for state in states] == [[1, 2], [3, 4]]
    assert [state.tolist() for state in states] == [[0, 0], [0, 0]]
