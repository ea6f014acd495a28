"""Splits: rows are parted exactly and by the seed, data stay whole, and what is held out reaches tables and pages."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import elbozoo as ez
from elbozoo import report
from elbozoo.cli import main
from elbozoo.inference.comparison import HELDOUT, ROW, TABLE_ONLY
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.series import number
from elbozoo.tables import Dataset, Split

pytestmark = pytest.mark.xdist_group("splits")

ALARM = 1e-6
EM: dict[str, Any] = {"latent_dim": 1, "progress": False}


def numbered(rows: int, **fields: Any) -> Dataset:
    """Rows that say which they are."""
    x = torch.arange(rows, dtype=torch.float64)[:, None].expand(-1, 2) + torch.tensor([0.0, 0.5], dtype=torch.float64)
    return Dataset("mine", x, ["a", "b"], **fields)


def which(part: Dataset | None) -> list[int]:
    return [] if part is None else part.x[:, 0].long().tolist()


# ---- parting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [{"test": 0.2}, {"validation": 0.3}, {"validation": 0.1, "test": 0.25}])
def test_rows_are_parted_exactly_and_keep_their_order(shares: dict[str, float]) -> None:
    split = numbered(40).split(**shares)
    parts = [which(part) for part in split]
    assert sorted(row for part in parts for row in part) == list(range(40))
    assert all(part == sorted(part) for part in parts)
    assert [len(part) for part in parts[1:]] == [round(40 * shares.get(part, 0)) for part in ("validation", "test")]
    assert (split.validation is None, split.test is None) == ("validation" not in shares, "test" not in shares)


def test_a_split_is_that_of_its_seed() -> None:
    first, again, other = (numbered(40).split(0.2, 0.2, seed=seed) for seed in (0, 0, 1))
    assert [which(part) for part in first] == [which(part) for part in again]
    assert which(first.test) != which(other.test)
    assert which(first.train) != list(range(24))


def is_uniform(times: np.ndarray, seeds: int, share: float) -> bool:
    """Whether rows that were drawn so many ``times`` were equally likely.

    Draws without replacement are negatively correlated, and the statistic is chi-square with one degree less.
    """
    rows = len(times)
    variance = seeds * share * (1 - share) * rows / (rows - 1)
    return bool(((times - seeds * share) ** 2 / variance).sum() < stats.chi2.isf(ALARM, rows - 1))


def test_every_row_is_equally_likely_to_be_held_out() -> None:
    data = numbered(20)
    drawn = [row for seed in range(400) for row in which(data.split(test=0.25, seed=seed).test)]
    times = np.bincount(drawn, minlength=20)
    assert is_uniform(times, 400, 0.25)
    assert not is_uniform(np.array([400] * 5 + [0] * 15), 400, 0.25)
    assert not is_uniform(times + 40 * (np.arange(20) < 10) - 40 * (np.arange(20) >= 10), 400, 0.25)


def test_what_belongs_to_a_row_goes_with_it() -> None:
    data = numbered(
        20,
        labels=torch.arange(20),
        factors=torch.arange(40).reshape(20, 2),
        factor_names=("f", "g"),
        intensities=torch.arange(40, dtype=torch.float64).reshape(20, 2) / 40,
        description="numbers",
    )
    for part in data.split(0.2, 0.2):
        assert part is not None and part.labels is not None and part.factors is not None
        assert part.labels.tolist() == which(part)
        assert (part.factors[:, 0] // 2).tolist() == which(part)
        assert part.intensities is not None and (part.intensities[:, 0] * 20).round().tolist() == which(part)
    assert data.split(0.2, 0.2).train.description == "numbers; train: 12 of 20 rows"


def grouped(sizes: list[int]) -> Dataset:
    """Rows of several groups, those of each spread over the table."""
    names = np.concatenate([np.full(size, group) for group, size in enumerate(sizes)])
    names = np.random.default_rng(0).permutation(names)
    frame = pd.DataFrame({"a": np.arange(len(names)), "b": np.arange(len(names)), "who": [f"g{n}" for n in names]})
    return ez.load_data(frame, keys=["who"])


def groups(part: Dataset | None) -> set[str]:
    assert part is not None
    return {part.levels["who"][int(code)] for code in part.x[:, part.columns.index("who")]}


def test_rows_of_one_label_are_never_parted() -> None:
    data = grouped([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    split = data.split(validation=0.2, test=0.3)
    found = [groups(part) for part in split]
    assert [len(each) for each in found] == [5, 2, 3]
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]
    assert sum(part.rows for part in split if part is not None) == 39
    # Row by row they would be.
    apart = data.split(test=0.3, by=None)
    assert groups(apart.train) & groups(apart.test)


BAD: dict[str, tuple[Dataset, dict[str, Any], str]] = {
    "all": (numbered(20), {"test": 1.0}, "mine: found test=1.0; expected a share from 0 to below 1"),
    "negative": (numbered(20), {"validation": -0.1}, "found validation=-0.1; expected a share"),
    "text": (numbered(20), {"test": "a fifth"}, "found test='a fifth'; expected a share"),
    "NaN": (numbered(20), {"test": math.nan}, "found test=nan; expected a share"),
    "too much": (
        numbered(20),
        {"validation": 0.5, "test": 0.5},
        "validation=0.5 and test=0.5; expected shares that leave",
    ),
    "no row": (numbered(20), {"test": 0.01}, "found 0 rows for test with .* of 20 rows; expected at least 2"),
    "one row": (numbered(20), {"test": 0.05}, "found 1 row for test"),
    "one to fit": (numbered(20), {"test": 0.96}, "found 1 row for train"),
    "one group": (grouped([3, 3]), {"test": 0.1}, "found 0 rows of 2 different whos for test"),
    "no such column": (numbered(20), {"test": 0.2, "by": "c"}, "found by='c'; expected a column of labels"),
    "seed": (numbered(20), {"test": 0.2, "seed": 0.5}, "found seed=0.5; expected an integer"),
}


@pytest.mark.parametrize(("data", "arguments", "match"), BAD.values(), ids=BAD.keys())
def test_senseless_splits_are_refused(data: Dataset, arguments: dict[str, Any], match: str) -> None:
    assert isinstance(data.split(test=0.5), Split)
    with pytest.raises(InvalidInput, match=match) as error:
        data.split(**arguments)
    assert len(str(error.value).splitlines()) == 1


# ---- through the stack -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared() -> ez.Comparison:
    methods = ["em", "amortized", "mean-field"]
    options: dict[str, Any] = {"columns": ["alcohol", "hue", "ash"], "seeds": 2, "steps": 40, **EM}
    return ez.compare("ppca", "wine-standardised", methods=methods, validation=0.1, test=0.25, **options)


def test_the_table_has_columns_about_held_out_rows(compared: ez.Comparison) -> None:
    assert list(compared.table.columns) == [*ROW, *TABLE_ONLY, *HELDOUT]
    assert HELDOUT == (
        "heldout_rows",
        "heldout_elbo",
        "heldout_elbo_se",
        "heldout_log_evidence",
        "heldout_log_evidence_se",
        "heldout_log_evidence_kind",
    )
    assert compared.table["heldout_rows"].unique().tolist() == [round(178 * 0.25)]
    assert compared.table["heldout_elbo"].dtype == compared.table["heldout_log_evidence"].dtype == np.float64
    has_elbo = compared.table.groupby("method")["heldout_elbo"].apply(lambda column: column.notna().all())
    assert has_elbo.to_dict() == {"em": True, "amortized": True, "mean-field": False}
    assert compared.table["heldout_log_evidence"].notna().all()
    for figure in ("heldout_elbo", "heldout_log_evidence"):
        assert (figure, "mean") in compared.summary.columns
    of_em = compared.table[compared.table["method"] == "em"]
    assert compared.summary.loc["em", ("heldout_elbo", "mean")] == pytest.approx(of_em["heldout_elbo"].mean())


def test_fits_learn_from_the_other_rows_alone(compared: ez.Comparison) -> None:
    data = ez.load_data("wine-standardised", ["alcohol", "hue", "ash"])
    split = data.split(0.1, 0.25)
    assert split.test is not None and split.validation is not None
    assert all(fit.x is not None and torch.equal(fit.x, split.train.x) for fit in compared.fits)
    assert compared.data["rows"] == split.train.rows
    assert compared.labels is not None and torch.equal(compared.labels, split.train.labels)  # type: ignore[arg-type]
    fit = compared.fits[0]
    evidence = fit.log_evidence(split.test.x)
    assert evidence is not None and compared.table["heldout_log_evidence"].iloc[0] == evidence.value
    other = fit.log_evidence(split.validation.x)
    assert other is not None and compared.table["heldout_log_evidence"].iloc[0] != other.value


def test_the_document_keeps_its_rows_and_gains_a_part(compared: ez.Comparison) -> None:
    document = json.loads(json.dumps(compared.document(), allow_nan=False))
    assert list(document) == ["model", "data", "rows", "heldout"]
    assert all(tuple(row) == ROW for row in document["rows"])
    held = document["heldout"]
    assert {key: held[key] for key in ("part", "rows", "validation_rows")} == {
        "part": "test",
        "rows": 44,
        "validation_rows": 18,
    }
    keys = ["method", "seed", "rows", "elbo", "elbo_se", "log_evidence", "log_evidence_se", "log_evidence_kind"]
    assert [list(fit) for fit in held["fits"]] == [keys] * 6
    assert held["fits"][-1]["method"] == "mean-field" and held["fits"][-1]["elbo"] is None
    assert document["data"]["arguments"] == {"validation": 0.1, "test": 0.25, "data_seed": 0}
    plain = ez.compare("ppca", "iris", methods=["em"], seeds=1, **EM)
    assert set(plain.document()) == {"model", "data", "rows"}
    assert set(plain.data) == {"name", "rows", "columns"}
    assert not set(HELDOUT) & set(plain.table.columns)


def test_a_comparison_with_held_out_rows_comes_back(compared: ez.Comparison, tmp_path: Path) -> None:
    loaded = ez.load_comparison(compared.save(tmp_path / "run"))
    assert loaded.document() == compared.document()
    # Relative: the mean and deviation of figures that were written with all their digits.
    before, after = compared.summary["heldout_elbo"], loaded.summary["heldout_elbo"]
    assert (before - after).abs().max().max() <= 1e-9


def test_data_of_their_own_take_the_place_of_shares() -> None:
    """The same rows give the same figures, whichever way they come."""
    data = ez.load_data("iris")
    split = data.split(validation=0.2, test=0.2)
    by_share = ez.compare("ppca", data, methods=["em"], seeds=1, validation=0.2, test=0.2, **EM)
    by_data = ez.compare(
        "ppca", split.train, methods=["em"], seeds=1, validation=split.validation, test=split.test, **EM
    )
    frame = ["seconds"]
    pd.testing.assert_frame_equal(by_share.table.drop(columns=frame), by_data.table.drop(columns=frame), rtol=0, atol=0)
    assert by_data.data["arguments"] == {"validation": "rows of their own", "test": "rows of their own"}
    swapped = ez.compare("ppca", split.train, methods=["em"], seeds=1, test=split.validation, **EM)
    assert swapped.table["heldout_elbo"].iloc[0] != by_data.table["heldout_elbo"].iloc[0]


def test_without_test_rows_the_validation_rows_are_reported() -> None:
    result = ez.compare("ppca", "iris", methods=["em"], seeds=1, validation=0.2, **EM)
    assert result.heldout == {"part": "validation", "rows": 30, "validation_rows": 30}
    assert "no fit learned from them, but they may have ended one" in report.html(result)


@pytest.fixture
def visits(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    patients = np.repeat([f"p{i}" for i in range(10)], generator.integers(2, 6, 10))
    frame = pd.DataFrame({"patient": patients, "dose": generator.normal(size=len(patients))})
    frame = frame.iloc[generator.permutation(len(frame))]
    frame.to_csv(tmp_path / "visits.csv", index=False)
    return tmp_path / "visits.csv"


HMM: dict[str, Any] = {"states": 2, "method": "em", "iterations": 2, "restarts": 1, "progress": False}


def test_sequences_go_to_one_side_whole(visits: Path) -> None:
    table = pd.read_csv(visits)
    fit = ez.fit("hidden-markov-model", visits, sequence="patient", test=0.3, **HMM)
    test = fit.companions.test
    assert test is not None and fit.x is not None
    assert len(fit.x) == 7 and test[:, 0].unique().numel() == 3
    sizes = table.groupby("patient")["dose"].apply(sorted).tolist()
    for code in test[:, 0].unique():
        assert sorted(test[test[:, 0] == code, 1].tolist()) in sizes
    assert fit.heldout()["heldout_rows"] == len(test)


def test_a_single_sequence_is_not_cut(visits: Path) -> None:
    match = r"test: found 0\.2 with a table that is one sequence, expected several .* a sequence is never cut; name"
    with pytest.raises(InvalidInput, match=match):
        ez.fit("hidden-markov-model", visits, columns=["dose"], test=0.2, **HMM)
    nile = ez.load_data("nile").x
    options: dict[str, Any] = {"structure": "local-level", "guide": "exact", "steps": 1, "progress": False}
    fit = ez.fit("linear-gaussian-state-space", nile[:80], test=nile[80:], **options)
    assert fit.heldout()["heldout_rows"] == 20


def test_labels_that_only_held_out_rows_have_are_refused() -> None:
    frame = pd.DataFrame({"a": [0, 1] * 15, "b": [0, 1, 1] * 10, "digit": ["x", "y"] * 15})
    options: dict[str, Any] = {"guide": "amortized", "condition": "digit", "latent_dim": 1, "hidden": 2, "steps": 1}
    later = pd.DataFrame({"digit": ["y", "x", "y", "y"], "a": [0, 1, 0, 1], "b": [1, 1, 1, 0]})
    fit = ez.fit("conditional-vae", frame, test=later, progress=False, **options)
    # Its labels have the codes of the fit's, whatever comes first, and its columns their order.
    assert fit.companions.test is not None
    assert fit.companions.test.tolist() == [[0, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]
    with pytest.raises(InvalidInput, match="test: found the label 'z' in column 'digit', which no row of the fit has"):
        ez.fit("conditional-vae", frame, test=later.replace("x", "z"), progress=False, **options)


def test_rows_that_do_not_fit_are_refused_before_the_work() -> None:
    bits = ez.load_data("digits-binary").x[:, 18:22]
    options: dict[str, Any] = {"guide": "amortized", "latent_dim": 1, "hidden": 2, "steps": 1, "progress": False}
    assert ez.fit("vae", bits[:30], test=bits[30:34], **options).heldout()["heldout_rows"] == 4
    match = r"test rows, which stand after the 30 of the fit: .*found [23] in column 1, row 31"
    with pytest.raises(InvalidInput, match=match):
        ez.fit("vae", bits[:30], test=bits[30:34] + 2, **options)
    with pytest.raises(InvalidInput, match="test: found 3 columns, expected those of the fit"):
        ez.fit("vae", bits[:30], test=bits[30:34, :3], **options)
    with pytest.raises(InvalidInput, match=r"found no file 'no\.csv'"):
        ez.fit("vae", bits[:30], validation="no.csv", **options)


# ---- pages and the shell ---------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["elbozoo", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_report_shows_held_out_rows(compared: ez.Comparison) -> None:
    page = report.html(compared)
    assert "<h2>Held-out rows</h2>" in page
    assert "44 test rows" in page and "no fit saw them" in page
    figure = number(float(compared.summary.loc["em", ("heldout_elbo", "mean")]) / 44, 4)
    assert figure in page.partition("<h2>Held-out rows</h2>")[2].partition("</section>")[0]
    plain = ez.compare("ppca", "iris", methods=["em"], seeds=1, **EM)
    assert "Held-out rows" not in report.html(plain)


def test_the_command_of_the_report_makes_the_same_split(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"data_seed": 3, "binarise": "static", "components": 2, "iterations": 3, "restarts": 1}
    result = ez.compare("bernoulli-mixture", "digits", methods=["em"], seeds=1, test=0.5, progress=False, **options)
    _, command = report.reproduction(result)
    assert command.startswith(
        "elbozoo compare bernoulli-mixture --data digits --binarise static --test 0.5 --data-seed 3"
    )
    assert run(monkeypatch, *shlex.split(command)[1:], "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["heldout"] == result.document()["heldout"]
    assert run(monkeypatch, *shlex.split(command.replace("--data-seed 3", "--data-seed 4"))[1:], "--json") == 0
    assert json.loads(capsys.readouterr().out)["heldout"] != result.document()["heldout"]


def test_python_that_makes_the_same_split_where_no_command_does() -> None:
    data = ez.load_data("simulate:ppca", rows=60)
    result = ez.compare("ppca", data, methods=["em"], seeds=1, test=0.25, **EM)
    _, code = report.reproduction(result)
    assert "ez.load_data('simulate:ppca', rows=60), " in code and "test=0.25, data_seed=0" in code
    words, code = report.reproduction(
        ez.compare("ppca", "iris", methods=["em"], seeds=1, test=ez.load_data("iris").split(test=0.2).test, **EM)
    )
    assert "Its test rows came from memory: pass the same rows as test." in words
    assert "ez.compare('ppca', 'iris', methods=['em'], seeds=1, test=test, latent_dim=1)" in code


def test_from_the_shell(
    visits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shares and files; figures for people, with a dash where there is no q for new rows."""
    figures = ["--methods", "em,mean-field", "--seeds", "1", "--set", "latent_dim=1", "--set", "steps=5"]
    command = ["compare", "ppca", "--data", "iris", *figures]
    assert run(monkeypatch, *command, "--test", "0.2", "--validation", "0.1") == 0
    shown = capsys.readouterr().out
    assert "held out: nats, totals over 30 test rows and per datum" in shown
    row = next(line for line in shown.partition("held out")[2].splitlines() if "mean-field" in line)
    assert row.split()[1] == "-" and "exact" in row

    ez_rows = ez.load_data("iris")
    pd.DataFrame(ez_rows.x.numpy()[:20], columns=ez_rows.columns).to_csv(tmp_path / "new.csv", index=False)
    assert run(monkeypatch, *command, "--test", str(tmp_path / "new.csv"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["heldout"]["rows"] == 20
    few = ["--set", "states=2", "--set", "iterations=2", "--set", "restarts=1"]
    fit = ["fit", "hidden-markov-model", "--method", "em", *few, "--test", "0.3"]
    assert run(monkeypatch, *fit, "--data", str(visits), "--set", "sequence=patient") == 0
    assert "heldout_log_evidence" in capsys.readouterr().out
    for wrong, says in (("1.5", "found test=1.5; expected a share"), ("no.csv", "found no file 'no.csv'")):
        assert run(monkeypatch, *command, "--test", wrong) == 2
        message = capsys.readouterr().err
        assert says in message and len(message.splitlines()) == 1
    assert run(monkeypatch, *command, "--set", "test=0.2") == 2
    assert "--set: found 'test', which belongs to the command" in capsys.readouterr().err
