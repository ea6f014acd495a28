"""Comparisons: what the table holds, what the document says, and that both come back from disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import elbozoo as ez
from elbozoo.inference.comparison import ROW, SUMMARISED
from elbozoo.models.contract.errors import InvalidInput

pytestmark = pytest.mark.xdist_group("comparison")


@pytest.fixture(scope="module")
def comparison() -> ez.Comparison:
    """Four methods and two seeds of factor analysis on wine."""
    methods = ["em", "mean-field", "amortized", "free-delta"]
    return ez.compare("factor-analysis", "wine-standardised", methods=methods, seeds=2, steps=300, progress=False)


def test_table_has_a_row_for_each_method_and_seed(comparison: ez.Comparison) -> None:
    """In the order asked for, with the columns of the schema first."""
    table = comparison.table
    assert list(zip(table["method"], table["seed"], strict=True)) == [
        (m, s) for m in ("em", "mean-field", "amortized", "free-delta") for s in (0, 1)
    ]
    assert tuple(table.columns[: len(ROW)]) == ROW
    assert {"objective", "khat_share"} <= set(table.columns)


def test_learning_gap_is_measured_from_the_best_evidence(comparison: ez.Comparison) -> None:
    """The best row has none, and no row has less."""
    table = comparison.table
    best = table["log_evidence"].max()
    assert (table["learning_gap"] - (best - table["log_evidence"])).abs().max() < 1e-9
    assert table["learning_gap"].min() == 0.0
    assert table["learning_gap"].max() > 1.0


def test_objective_and_elbo_are_two_columns(comparison: ez.Comparison) -> None:
    """A point mass has an objective and no ELBO; the document says null."""
    delta = comparison.table[comparison.table["method"] == "free-delta"]
    assert delta["elbo"].isna().all() and delta["gap"].isna().all() and delta["objective"].notna().all()
    rows = [row for row in comparison.document()["rows"] if row["method"] == "free-delta"]
    assert all(row["elbo"] is None and row["log_evidence"] is not None for row in rows)


def test_document_is_the_schema_and_valid_json(comparison: ez.Comparison) -> None:
    """Keys exactly as promised; NaN would not be JSON."""
    document = comparison.document()
    assert set(document) == {"model", "data", "rows"}
    assert document["data"] == {"name": "wine-standardised", "rows": 178, "columns": 13}
    assert all(tuple(row) == ROW for row in document["rows"])
    json.dumps(document, allow_nan=False)


def test_summary_is_mean_and_deviation_over_seeds(comparison: ez.Comparison) -> None:
    """Of every figure, per method."""
    summary = comparison.summary
    of_em = comparison.table[comparison.table["method"] == "em"]
    assert set(summary.columns.get_level_values(0)) == set(SUMMARISED)
    assert summary.loc["em", ("elbo", "mean")] == pytest.approx(of_em["elbo"].mean())
    assert summary.loc["em", ("seconds", "std")] == pytest.approx(of_em["seconds"].std())


def test_saved_comparison_comes_back(comparison: ez.Comparison, tmp_path: Path) -> None:
    """Same table, same fits, nothing pickled; the report and the plots are there."""
    folder = comparison.save(tmp_path / "run")
    loaded = ez.load_comparison(folder)
    assert loaded.document() == comparison.document()
    x = ez.load_data("wine-standardised").x
    for before, after in zip(comparison.fits, loaded.fits, strict=True):
        assert before.elbo() == after.elbo(x) or math.isnan(before.elbo())
        assert torch.equal(before.score_samples(), after.score_samples(x))
    names = {path.name for path in folder.iterdir()}
    assert {"comparison.csv", "comparison.json", "trajectories.csv", "report.html", "fits"} <= names
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]


def test_damaged_and_missing_runs_are_refused_in_one_line(comparison: ez.Comparison, tmp_path: Path) -> None:
    """With what was found and what was expected."""
    with pytest.raises(InvalidInput, match=r"expected a directory written by Comparison\.save"):
        ez.load_comparison(tmp_path)
    folder = comparison.fits[0].save(tmp_path / "fit")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InvalidInput, match="damaged"):
        ez.load_fit(folder)
    (folder / "fit.json").write_text("{")
    with pytest.raises(InvalidInput, match="damaged"):
        ez.load_fit(folder)
    with pytest.raises(InvalidInput, match=r"expected a directory written by Fit\.save"):
        ez.load_fit(tmp_path / "nothing")


def test_everything_is_checked_before_anything_runs(tmp_path: Path) -> None:
    """A misspelt last method costs no fit, and leaves nothing behind."""
    out = tmp_path / "run"
    with pytest.raises(InvalidInput, match="did you mean"):
        ez.compare("ppca", "iris", methods=["em", "mean-feild"], out=out, progress=False)
    assert not out.exists() or not list(out.iterdir())
    with pytest.raises(InvalidInput, match="output directory"):
        ez.compare("ppca", "iris", methods=["em"], out=__file__, progress=False)


def test_an_interrupted_fit_ends_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C during the second fit gives a table of two: the first whole, the second marked."""
    from elbozoo.inference.steps import PyroStep

    steps = 0

    def interrupted(self: PyroStep, batch: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return -1.0

    monkeypatch.setattr(PyroStep, "__call__", interrupted)
    result = ez.compare("ppca", "iris", methods=["mean-field", "amortized"], seeds=3, steps=5, progress=False)
    assert [fit.interrupted for fit in result.fits] == [False, True]
    assert len(result.table) == 2 and not result.table["converged"].iloc[1]


def test_an_option_that_no_method_reads_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """It changes nothing, and whoever gave it should know; one that any method reads is not spoken of."""
    ez.compare("ppca", "iris", methods=["em", "mean-field"], seeds=1, steps=2, iterations=2, restarts=1, progress=False)
    assert not caplog.messages
    ez.fit("ppca", "iris", method="em", steps=2)
    assert caplog.messages == ["option 'steps' is not read by em"]
