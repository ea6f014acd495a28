"""Binary pixels: what each way makes of intensities, and that each step of training sees draws of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor

import elbozoo as ez
from elbozoo.cli import main
from elbozoo.data import Dataset, load_data
from elbozoo.inference.resampling import PixelDraws
from elbozoo.inference.steps import PyroStep
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

# False-alarm rate of every test of draws here; the draws have fixed seeds, so that a test that passes always does.
ALARM = 1e-6
TINY = {"guide": "amortized", "hidden": 2, "progress": False}


def are_draws(draws: np.ndarray, p: np.ndarray) -> bool:
    """Whether the means of independent ``draws`` (S, N, D) of 0 and 1 agree with probabilities ``p`` (N, D).

    Cells are added up over the rows, which leaves a normal figure for each column, and their squares over the columns.
    """
    certain = (p == 0) | (p == 1)
    if not (draws[:, certain] == p[certain]).all():
        return False
    variance = len(draws) * (p * (1 - p)).sum(0)
    z = (draws.sum(0) - len(draws) * p).sum(0)[variance > 0] / np.sqrt(variance[variance > 0])
    return bool((z**2).sum() < stats.chi2.isf(ALARM, len(z)))


# ---- what is made of intensities -------------------------------------------------------------------------------------


def test_the_threshold_is_at_half_of_the_range() -> None:
    data = load_data("digits", binarise="threshold")
    assert torch.equal(data.x, load_data("digits-binary").x)
    assert not torch.equal(data.x, (load_data("digits").x > 8).double())
    assert (data.image_shape, data.top, data.intensities) == ((8, 8), 1.0, None)
    assert data.description.endswith("binary pixels: threshold")


def test_a_static_draw_has_the_intensities_as_its_means() -> None:
    intensities = load_data("digits").x.numpy() / 16
    data = load_data("digits", binarise="static", seed=3)
    assert set(data.x.unique().tolist()) == {0.0, 1.0}
    assert are_draws(data.x.numpy()[None], intensities)
    # Another column's intensities, or a threshold in the place of a draw, are found out.
    assert not are_draws(data.x.numpy()[None], intensities[:, ::-1])
    assert not are_draws(load_data("digits", binarise="threshold").x.numpy()[None], intensities)
    assert data.intensities is None


def test_a_static_draw_is_one_draw_for_each_seed() -> None:
    first, again, other = (load_data("digits", binarise="static", seed=seed).x for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_draw_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    load_data("digits", binarise="static")
    assert torch.equal(torch.rand(1), before)


def test_stochastic_pixels_are_a_draw_and_their_intensities() -> None:
    data = load_data("digits", binarise="stochastic", seed=3)
    assert torch.equal(data.x, load_data("digits", binarise="static", seed=3).x)
    assert data.intensities is not None
    assert torch.equal(data.intensities, load_data("digits").x / 16)
    assert data.arguments == {"binarise": "stochastic", "seed": 3}


@pytest.mark.parametrize(
    ("source", "top"),
    [
        (np.array([[0.0, 0.5], [0.25, 0.75]]), 1.0),
        (np.array([[0.0, 0.5], [0.25, 4.0]]), 4.0),
        (np.array([[0, 1], [2, 3]], dtype=np.uint8), 255.0),
        (np.array([[False, True], [True, True]]), 1.0),
    ],
    ids=["below one", "above one", "bytes", "booleans"],
)
def test_where_the_range_ends(source: np.ndarray, top: float) -> None:
    intensities = load_data(source, binarise="stochastic").intensities
    assert intensities is not None
    assert intensities.tolist() == (source.astype(float) / top).tolist()


def test_columns_of_labels_are_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("who,a,b\nzoe,0.5,1\nadam,0.25,0\nzoe,0.5,0.5\n")
    data = load_data(path, keys=["who"], binarise="stochastic")
    assert data.intensities is not None
    assert data.x[:, 0].tolist() == [0, 1, 0]
    assert data.intensities[:, 0].isnan().all()
    assert data.intensities[:, 1:].tolist() == [[0.5, 1.0], [0.25, 0.0], [0.5, 0.5]]
    # Intensities follow their rows and columns.
    assert load_data(data, ["b"], keys=["who"]).intensities[:, 1].tolist() == [1.0, 0.0, 0.5]  # type: ignore[index]
    late = load_data(load_data(path, ["a", "b"], binarise="stochastic"), keys=["b"]).intensities
    assert late is not None and late[:, 1].isnan().all() and late[:, 0].tolist() == [0.5, 0.25, 0.5]


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown way": (np.eye(3), {"binarise": "statik"}, "unknown value of binarise 'statik'; did you mean 'static'"),
    "negative": (-np.eye(3), {}, r"array: found -1 in column 'x0', row 1; expected intensities from 0 to 1 to make"),
    "measurements": ("wine-standardised", {}, "expected intensities from 0 to .* rescale the columns, or pick others"),
    "missing": (
        np.where(np.eye(3) > 0, np.nan, 1.0),
        {"missing": True},
        "found nan in column 'x0', row 1; expected",
    ),
    "seed": (np.eye(3), {"seed": -1}, "found seed=-1; expected an integer from 0"),
    "twice": (load_data("digits", binarise="stochastic"), {}, "found binary pixels already; expected intensities"),
    "labels alone": (np.eye(3), {"leave": ["x0", "x1", "x2"]}, "found no column of pixels"),
}


@pytest.mark.parametrize(("source", "arguments", "match"), BAD.values(), ids=BAD.keys())
def test_what_is_no_intensity_is_refused(source: Any, arguments: dict[str, Any], match: str) -> None:
    assert load_data(np.eye(3), binarise="static").rows == 3
    leave = arguments.get("leave", [])
    rest = {name: value for name, value in arguments.items() if name != "leave"}
    with pytest.raises(InvalidInput, match=match) as error:
        if leave:
            load_data(source).binarised("static", leave=leave)
        else:
            load_data(source, **({"binarise": "static"} | rest))
    assert len(str(error.value).splitlines()) == 1


def test_intensities_that_are_no_probabilities_are_refused() -> None:
    x = torch.eye(2, dtype=torch.float64)
    Dataset("mine", x, ["a", "b"], intensities=x / 2)
    for wrong in (x * 2, -x, x[:1]):
        with pytest.raises(InvalidInput, match=r"mine: found intensities of shape .*; expected \(2, 2\), from 0 to 1"):
            Dataset("mine", x, ["a", "b"], intensities=wrong)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that a fit steps on."""
    batches: list[Batch] = []
    step = PyroStep.__call__

    def recorded(self: PyroStep, batch: Batch) -> float:
        batches.append(batch)
        return step(self, batch)

    monkeypatch.setattr(PyroStep, "__call__", recorded)
    return batches


def pixels(rows: int) -> Dataset:
    data = load_data("digits")
    return load_data(data.x[:rows] / 16)


def by_row(batches: list[Batch], rows: int) -> np.ndarray:
    """Draws (S, N, D) from minibatches that held each row equally often in the first S epochs."""
    found: list[list[Tensor]] = [[] for _ in range(rows)]
    for batch in batches:
        for position, x in zip(batch.index.tolist(), batch.x, strict=True):
            found[position].append(x)
    shortest = min(map(len, found))
    return torch.stack([torch.stack(draws[:shortest]) for draws in found], 1).double().numpy()


@pytest.mark.parametrize("batch_size", [20, 8])
def test_each_step_sees_a_draw_of_its_own(seen: list[Batch], batch_size: int) -> None:
    """Their means converge to the intensities, as the draw that the fit is judged on does not."""
    data = pixels(20)
    fit = ez.fit("vae", data, binarise="stochastic", steps=100, batch_size=batch_size, schedule="constant", **TINY)
    draws = by_row(seen, 20)
    assert len(seen) == 100 and len(draws) >= 30
    assert are_draws(draws, data.x.numpy())
    assert fit.x is not None
    assert torch.equal(fit.x, data.binarised("static", 0).x)
    assert not are_draws(np.repeat(fit.x.numpy()[None], len(draws), 0), data.x.numpy())
    assert not are_draws(draws, data.x.numpy()[:, ::-1])


def test_a_static_draw_is_what_every_step_sees(seen: list[Batch]) -> None:
    fit = ez.fit("vae", pixels(20), binarise="static", steps=5, batch_size=8, **TINY)
    assert fit.x is not None
    assert all(torch.equal(batch.x.double(), fit.x[batch.index]) for batch in seen)


def test_draws_are_those_of_the_seed(seen: list[Batch]) -> None:
    data = pixels(12)
    for seed in (0, 0, 1):
        ez.fit("vae", data, binarise="stochastic", steps=3, seed=seed, **TINY)
    runs = [torch.stack([batch.x for batch in seen[i : i + 3]]) for i in (0, 3, 6)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_data_that_carry_intensities_are_drawn_anew_too(seen: list[Batch]) -> None:
    data = pixels(12).binarised("stochastic", 4)
    fit = ez.fit("vae", data, steps=2, **TINY)
    assert fit.x is not None and torch.equal(fit.x, data.x)
    assert not torch.equal(seen[0].x, seen[1].x)


def test_columns_that_an_option_names_stay_as_they_are(seen: list[Batch]) -> None:
    """Classes of a conditional model are no pixels; nor is the evidence recorded along draws of other rows."""
    digits = load_data("digits")
    assert digits.labels is not None
    frame = pd.DataFrame(digits.x[:40, 20:26].numpy() / 16).add_prefix("p").assign(digit=digits.labels[:40].numpy() % 2)
    fit = ez.fit("conditional-vae", frame, binarise="stochastic", condition="digit", steps=3, latent_dim=1, **TINY)
    assert fit.x is not None
    for batch in seen:
        assert torch.equal(batch.x[:, -1].double(), fit.x[batch.index, -1])
        assert set(batch.x[:, :-1].unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(seen[0].x, seen[1].x)


def test_rows_of_sequences_are_drawn_in_their_places() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(11, 2, generator=generator, dtype=torch.float64)
    names = torch.tensor([0.0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0], dtype=torch.float64)
    x = torch.cat([names[:, None], torch.bernoulli(p, generator=generator)], 1)
    intensities = torch.cat([torch.full((11, 1), torch.nan, dtype=torch.float64), p], 1)
    entry = get_entry("hidden-markov-model").from_data(x, sequence=0, states=2, emission="normal")
    whole = entry.arrange(x, entry.options)
    draw = PixelDraws(entry, x, intensities)
    second = Batch(whole[1:], torch.tensor([1]), 2)
    with isolated(0):
        draws = torch.stack([draw(second).x[0] for _ in range(500)])
    assert torch.equal(draws[..., 0], whole[1:, :, 0].expand(500, -1))
    assert (draws[:, 4:] == 0).all()
    of_second = p[names == 1].numpy()
    assert are_draws(draws[:, :4, 1:].numpy(), of_second)
    assert not are_draws(draws[:, :4, 1:].numpy(), p[names == 0][:4].numpy())


def test_a_fit_says_what_its_pixels_are() -> None:
    data = pixels(30)
    options: dict[str, Any] = {"binarise": "stochastic", "steps": 2, "progress": False, "components": 2}
    drawn = ez.fit("bernoulli-mixture", data, guide="amortized", hidden=2, **options)
    figures = "figures are of one draw of the binary pixels; the fit was to"
    assert drawn.notes == [f"{figures} new draws of the pixels at each step"]
    assert drawn.trajectory["log_evidence"].isna().all()
    fixed = ez.fit("bernoulli-mixture", data, method="em", iterations=2, restarts=1, **options)
    assert fixed.notes[-1] == f"{figures} that one draw alone"
    plain = ez.fit("bernoulli-mixture", data, guide="amortized", hidden=2, **options | {"binarise": "static"})
    assert plain.notes == [] and plain.trajectory["log_evidence"].notna().any()


def test_from_the_shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``--binarise`` is the argument of that name, and the document says what was done."""
    command = "elbozoo fit bernoulli-mixture --data digits --method em --set components=2 --set iterations=2 --json"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--binarise", "static", "--data-seed", "7"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert '"arguments": {\n      "binarise": "static",\n      "data_seed": 7\n    }' in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command.split(), "--binarise", "static!"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert (
        capsys.readouterr().err
        == "elbozoo: unknown value of binarise 'static!'; did you mean 'static' or 'stochastic'?\n"
    )
