"""The command line: what each command prints, its JSON to the letter, and every bad input beside a good one.

Most commands run in this process, through ``main`` as the console script calls it; some run in one of their own.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import elbozoo as ez
from elbozoo.cli import main
from elbozoo.inference import method
from elbozoo.inference.comparison import ROW
from elbozoo.models import entry_names

FIGURES = [
    "method",
    "guide",
    "seed",
    "elbo",
    "elbo_se",
    "log_evidence",
    "log_evidence_se",
    "log_evidence_kind",
    "gap",
    "approximation_gap",
    "amortization_gap",
    "learning_gap",
    "kl",
    "khat_max",
    "seconds",
    "steps",
    "parameters",
    "converged",
]
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(FIGURES, (float, type(None))),
    **dict.fromkeys(("method", "guide"), str),
    **dict.fromkeys(("seed", "steps", "parameters"), int),
    "seconds": float,
    "converged": bool,
    "log_evidence_kind": (str, type(None)),
}
ROOT = Path(__file__).resolve().parents[2]
CONSOLE_SCRIPT = "from elbozoo.cli import main; main()"


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["elbozoo", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return call


def run_apart(*arguments: str | Path) -> Outcome:
    """Run the command line in a process of its own."""
    return run_code(CONSOLE_SCRIPT, *map(str, arguments))


def run_code(code: str, *arguments: str) -> Outcome:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return Outcome(result.returncode, result.stdout, result.stderr)


def strict_json(text: str) -> Any:
    """Parse a document that is JSON and no more: no NaN, no Infinity, nothing after it, no name twice."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=once)


# ---- data files ------------------------------------------------------------------------------------------------------

TABLE = "\n".join(f"{i * 0.37 % 1:.3f},{i * 0.73 % 1 + i / 10:.3f},{i * i * 0.11 % 1:.3f}" for i in range(24))
BITS = "\n".join(f"{i % 2},{i % 3 % 2},{i % 5 % 2}" for i in range(24))
FILES = {
    "good.csv": f"a,b,c\n{TABLE}\n",
    "bits.csv": f"a,b,c\n{BITS}\n",
    "empty.csv": "",
    "header.csv": "a,b,c\n",
    "one.csv": "a,b,c\n1,2,3\n",
    "words.csv": "a,b\nx,y\nz,w\n",
    "cell.csv": f"a,b,c\n{TABLE}\n0.5,oops,0.5\n",
    "nan.csv": f"a,b,c\n{TABLE}\n0.5,,0.5\n",
    "inf.csv": f"a,b,c\n{TABLE}\n0.5,inf,0.5\n",
    "constant.csv": "a,b,c\n" + "\n".join(f"{row.rpartition(',')[0]},7" for row in TABLE.splitlines()) + "\n",
    "negative.csv": f"a,b,c\n{BITS}\n0,-1,1\n",
    "fraction.csv": f"a,b,c\n{BITS}\n0,0.5,1\n",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "binary.csv").write_bytes(bytes(range(256)))
    return folder


def resolved(arguments: list[str], files: Path) -> list[str]:
    """Put the folder of the data files in the place of ``@``."""
    return [argument.replace("@", f"{files}/") for argument in arguments]


# ---- bad input -------------------------------------------------------------------------------------------------------


class WorkStartedError(Exception):
    """Raised in the place of a fit: everything had been checked."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise WorkStartedError

    monkeypatch.setattr(method.Plan, "run", stop)


@dataclass(frozen=True)
class Case:
    """Arguments with ``*`` for what is wrong, that, what would be right in its place, and what is said about it."""

    name: str
    arguments: str
    bad: str
    good: str
    says: str

    def with_slot(self, filling: str) -> list[str]:
        return [
            part
            for word in self.arguments.split()
            for part in (filling.split() if word == "*" else [word.replace("*", filling)])
        ]


PPCA = "fit ppca --data @good.csv *"
SET = "fit ppca --data @good.csv --set *"
GUIDE = "fit ppca --data @good.csv --guide *"
DATA = "fit ppca --data *"
SET_MIXTURE = "fit gaussian-mixture --data @good.csv --set *"

CASES = [
    # unknown names
    Case("model", "fit * --data @good.csv", "pcca", "ppca", r"unknown model 'pcca'; did you mean 'ppca'\?"),
    Case("model no match", "fit * --data @good.csv", "qqqq", "ppca", "unknown model 'qqqq'; known: autoencoder"),
    Case(
        "model of compare", "compare * --data @good.csv", "pcca", "ppca", r"unknown model 'pcca'; did you mean 'ppca'\?"
    ),
    Case("guide", PPCA, "-g men-field", "-g mean-field", r"unknown guide 'men-field'; did you mean 'mean-field'"),
    Case("guide that is none", PPCA, "--guide em", "--method em", "unknown guide 'em'"),
    Case("method", "fit ppca --data @good.csv --method *", "emm", "em", r"unknown method 'emm'; did you mean 'em'\?"),
    Case(
        "one of the methods",
        "compare ppca --data @good.csv --methods *",
        "em,amortised",
        "em,amortized",
        r"'amortised'; did you mean 'amortized",
    ),
    Case(
        "no method", "compare ppca --data @good.csv --methods *", ",", "em,", "found no method, expected at least one"
    ),
    Case("data set", DATA, "irris", "iris", r"unknown data set 'irris'; did you mean 'iris'"),
    Case("simulated model", DATA, "simulate:pcca", "simulate:ppca", r"unknown model 'pcca'; did you mean 'ppca'\?"),
    Case(
        "column",
        "fit ppca --data @good.csv --set latent_dim=1 --columns *",
        "a,bb",
        "a,b",
        "unknown column of good.csv 'bb'",
    ),
    Case("option", SET, "latent_dims=1", "latent_dim=1", r"unknown option 'latent_dims'; did you mean 'latent_dim'\?"),
    Case("option of another model", SET, "components=2", "latent_dim=2", "unknown option 'components'"),
    Case("objective", SET, "objective=elbow", "objective=elbo", r"unknown objective 'elbow'; did you mean 'elbo'"),
    # options of the wrong type or range
    Case("word for int", SET, "latent_dim=two", "latent_dim=2", "option latent_dim: found 'two', expected int >= 1"),
    Case("fraction for int", SET, "steps=2.5", "steps=2", "option steps: found '2.5', expected int >= 1"),
    Case("too small", SET, "latent_dim=0", "latent_dim=1", "option latent_dim: found '0', expected int >= 1"),
    Case(
        "negative", SET, "learning_rate=-1", "learning_rate=1", "option learning_rate: found '-1', expected float > 0"
    ),
    Case("not a number", SET, "tolerance=nan", "tolerance=1", "option tolerance: found 'nan', expected float > 0"),
    Case(
        "no choice", SET_MIXTURE, "covariance=round", "covariance=full", "expected full . tied . diagonal . spherical"
    ),
    Case("nothing", SET, "latent_dim=", "latent_dim=1", "option latent_dim: found '', expected int"),
    Case("none for int", SET, "latent_dim=none", "batch_size=none", "option latent_dim: found None, expected int"),
    Case("no equals", SET, "latent_dim", "latent_dim=1", "--set: found 'latent_dim', expected NAME=VALUE"),
    Case("no name", SET, "=1", "latent_dim=1", "--set: found '=1', expected NAME=VALUE"),
    Case("command's own", SET, "seeds=2", "steps=2", "--set: found 'seeds', which belongs to the command"),
    Case(
        "seed beyond NumPy",
        "fit ppca --data @good.csv --seed *",
        "4294967296",
        "4294967295",
        "option seed: found 4294967296, expected int",
    ),
    # data
    Case("missing file", DATA, "@no.csv", "@good.csv", r"found no file '.*no\.csv'"),
    Case("directory", DATA, "@", "@good.csv", "found a directory at"),
    Case("empty file", DATA, "@empty.csv", "@good.csv", r"empty\.csv is empty"),
    Case("binary file", DATA, "@binary.csv", "@good.csv", r"binary\.csv"),
    Case("header only", DATA, "@header.csv", "@good.csv", "found 3 columns and 0 rows"),
    Case("one row", DATA, "@one.csv", "@good.csv", "found 1 row; expected at least 2"),
    Case("no numeric column", DATA, "@words.csv", "@good.csv", r"words\.csv: found no numeric column"),
    Case("no number in a cell", DATA, "@cell.csv", "@good.csv", r"column 'b', row 25 holds 'oops'; expected a number"),
    Case("NaN", DATA, "@nan.csv", "@good.csv", r"found 1 missing \(NaN\) or infinite value.*column 'b', row 25"),
    Case("infinity", DATA, "@inf.csv", "@good.csv", r"first inf in column 'b', row 25"),
    Case(
        "constant column, factors",
        "fit factor-analysis --data @constant.csv --set latent_dim=1 --columns *",
        "a,b,c",
        "a,b",
        r"columns \[3\] .*constant",
    ),
    Case(
        "constant column, mixture",
        "fit gaussian-mixture --data @constant.csv --method em --set *",
        "covariance=full",
        "covariance=spherical",
        r"columns \[3\] .*constant",
    ),
    Case(
        "negative under Bernoulli",
        "fit vae --data *",
        "@negative.csv",
        "@bits.csv",
        r"likelihood=bernoulli: found -1 in column 2, row 25 .*expected only 0 and 1",
    ),
    Case(
        "fraction under Bernoulli",
        "fit vae --data @fraction.csv --set likelihood=*",
        "bernoulli",
        "normal",
        "likelihood=bernoulli: found 0.5 in column 2, row 25",
    ),
    # sizes
    Case("components", SET_MIXTURE, "components=25", "components=24", "option components: found 25 for 24 rows"),
    Case(
        "dimensions of PPCA", SET, "latent_dim=3", "latent_dim=2", "option latent_dim: found 3 for 24 rows x 3 columns"
    ),
    Case(
        "dimensions of factors",
        "fit factor-analysis --data @good.csv --set *",
        "latent_dim=3",
        "latent_dim=2",
        "option latent_dim: found 3 for 24 rows",
    ),
    Case(
        "dimensions of VAE",
        "fit vae --data @bits.csv --set *",
        "latent_dim=4",
        "latent_dim=3",
        "option latent_dim: found 4 for 24 rows x 3 columns",
    ),
    # what does not go together
    Case(
        "categorical on a normal",
        GUIDE,
        "free-categorical",
        "free-diagonal-normal",
        "guide 'free-categorical' does not fit ppca: the latent 'z' is continuous.*that fit: .*free-diagonal-normal",
    ),
    Case(
        "normal on a categorical",
        "fit gaussian-mixture --data @good.csv -g *",
        "free-diagonal-normal",
        "free-categorical",
        "does not fit gaussian-mixture: the latent 'z' takes 3 values",
    ),
    Case(
        "global guide",
        GUIDE,
        "laplace",
        "amortized",
        "does not fit ppca: the latent 'z' is local.*amortized-diagonal-normal",
    ),
    Case(
        "local guide",
        "compare normal-mean --data @good.csv --methods *",
        "laplace,amortized",
        "laplace,mean-field",
        "does not fit normal-mean: the latent 'mu' is one for the whole data set",
    ),
    Case(
        "posterior of a VAE",
        "fit vae --data @bits.csv --guide *",
        "exact",
        "amortized",
        "does not fit vae: vae has no exact posterior",
    ),
    Case(
        "EM without latents per row",
        "fit normal-mean --data @good.csv --method *",
        "em",
        "closed-form",
        "method 'em' does not apply to normal-mean.*closed-form",
    ),
    Case(
        "closed form of a mixture",
        "fit gaussian-mixture --data @good.csv --method *",
        "closed-form",
        "em",
        "method 'closed-form' does not apply to gaussian-mixture: no closed form",
    ),
    Case(
        "objective of a normal",
        "fit ppca --data @good.csv --set objective=*",
        "elbo-enumerated",
        "elbo-analytic",
        "objective 'elbo-enumerated' does not suit guide 'free-diagonal-normal'",
    ),
    Case(
        "guide and method",
        "fit ppca --data @good.csv --guide mean-field *",
        "--method em",
        "",
        "found guide 'mean-field' and method 'em', expected one",
    ),
]


def ids(cases: list[Case]) -> list[str]:
    return [case.name.replace(" ", "-") for case in cases]


def refused(outcome: Outcome, says: str) -> None:
    """Assert status 2, nothing on standard output, and on standard error one line that says what is expected of it."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.endswith("\n")
    assert re.match(f"elbozoo: .*{says}", outcome.err), outcome.err
    hints = ("expected", "did you mean", "known:", "guides that fit", "methods that do", "use ", "choose", "belongs")
    assert any(hint in outcome.err for hint in hints), f"what to do is not said: {outcome.err}"


def nothing_written(out: Path) -> bool:
    return not out.exists() or not list(out.iterdir())


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_bad_input_is_one_line_and_no_work(case: Case, run: Run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run(*resolved(case.with_slot(case.bad), files), "--out", out), case.says)
    assert nothing_written(out)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_the_good_input_beside_it_is_accepted(case: Case, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the same command with the right thing in the same place gets as far as the work."""
    monkeypatch.setattr(sys, "argv", ["elbozoo", *resolved(case.with_slot(case.good), files)])
    with pytest.raises(WorkStartedError):
        main()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "pcca"], r"unknown model 'pcca'; did you mean 'ppca'\?"),
        (["guides", "pcca"], r"unknown model 'pcca'; did you mean 'ppca'\?"),
        (["show", "pcca", "--json"], r"unknown model 'pcca'"),
        (["tutorial", "pcca", "--out", "page.md"], r"unknown model 'pcca'; did you mean 'ppca'\?"),
        (["tutorial", "ppca", "--out", "page.txt"], r".*\.txt.*\.md.*\.ipynb"),
        (["tutorial", "ppca", "--out", "page"], r".*\.md.*\.ipynb"),
        (["tutorial", "ppca", "--guide", "men-field", "--out", "page.md"], r"unknown guide 'men-field'; did you mean"),
        (
            ["tutorial", "ppca", "--guide", "free-categorical", "--out", "page.md"],
            "'free-categorical' does not fit ppca",
        ),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_bad_input_of_the_other_commands(
    arguments: list[str], says: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*arguments), says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit", "compare"])
@pytest.mark.parametrize("place", ["good.csv", "good.csv/below", "good.csv/far/below"])
@pytest.mark.usefixtures("no_work")
def test_an_output_directory_that_cannot_be_is_refused_before_the_work(
    command: str, place: str, run: Run, files: Path
) -> None:
    """Below a regular file, where even root cannot make one."""
    outcome = run(command, "ppca", "--data", files / "good.csv", "--out", files / place)
    refused(outcome, f"output directory {re.escape(str(files / place))}: ")
    assert (files / "good.csv").read_text(encoding="utf-8") == FILES["good.csv"]


@pytest.mark.usefixtures("no_work")
def test_a_page_in_a_place_that_cannot_be_is_refused_before_the_work(run: Run, files: Path) -> None:
    refused(run("tutorial", "ppca", "--out", files / "good.csv" / "page.md"), "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare", "ppca", "--data", "iris", "--seeds", "0"], "--seeds"),
        (["compare", "ppca", "--data", "iris", "--seeds", "many"], "--seeds"),
        (["fit", "ppca", "--data", "iris", "--seed", "-1"], "--seed"),
        (["fit", "ppca", "--data", "iris", "--seed", "1.5"], "--seed"),
        (["fit", "ppca"], "--data"),
        (["fit", "--data", "iris"], "MODEL"),
        (["fit", "ppca", "--dta", "iris"], "--dta"),
        (["tutorial", "ppca"], "--out"),
        (["modells"], "modells"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_wrong_usage_is_explained_by_the_parser(arguments: list[str], says: str, run: Run) -> None:
    outcome = run(*arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("Usage: ")
    assert says in outcome.err
    assert "Traceback" not in outcome.err


def test_a_fit_that_breaks_down_is_one_line_and_status_1(run: Run, files: Path, tmp_path: Path) -> None:
    """Adam with steps of 1e300 leaves the finite numbers at once."""
    out = tmp_path / "out"
    arguments = ("fit", "ppca", "--data", files / "good.csv", "--out", out, "--json", "--set", "steps=5")
    outcome = run(*arguments, "--set", "learning_rate=1e300")
    assert outcome.status == 1
    assert outcome.out == ""
    assert re.fullmatch(
        r"elbozoo: step \d: the objective is nan .*try a smaller learning_rate.*", outcome.err.splitlines()[-1]
    )
    assert nothing_written(out)
    assert run(*arguments).status == 0


def test_a_mistake_of_our_own_is_not_dressed_up_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only InvalidInput is status 2: any other ValueError keeps its traceback."""

    def broken(*arguments: Any, **options: Any) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(method.Plan, "run", broken)
    monkeypatch.setattr(sys, "argv", ["elbozoo", "fit", "ppca", "--data", "iris"])
    with pytest.raises(ValueError, match="a defect"):
        main()


# ---- good input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "keys", "some"),
    [
        (["models"], ["model", "summary", "latent", "capabilities"], "gaussian-mixture"),
        (["guides"], ["guide", "family", "source", "models"], "amortized-diagonal-normal"),
        (["guides", "ppca"], ["guide", "family", "source", "fits", "reason"], "free-full-rank-normal"),
        (["datasets"], ["name", "rows", "columns", "kind", "description", "source"], "digits-binary"),
    ],
)
def test_lists(arguments: list[str], keys: list[str], some: str, run: Run) -> None:
    outcome = run(*arguments, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    rows = strict_json(outcome.out)
    assert all(list(row) == keys for row in rows)
    assert some in [row[keys[0]] for row in rows]
    plain = run(*arguments)
    assert (plain.status, plain.err) == (0, "")
    for row in rows:
        assert re.search(rf"^ *{re.escape(row[keys[0]])} ", plain.out, flags=re.MULTILINE), row
    assert [key for key in keys if key in plain.out] == keys


def test_models_lists_every_entry(run: Run) -> None:
    assert [row["model"] for row in strict_json(run("models", "--json").out)] == entry_names()


def test_guides_of_a_model_give_a_reason_where_they_do_not_fit(run: Run) -> None:
    rows = strict_json(run("guides", "ppca", "--json").out)
    assert {row["fits"] for row in rows} == {True, False}
    assert all(bool(row["reason"]) is not row["fits"] for row in rows)


@pytest.mark.parametrize("model", entry_names())
def test_show(model: str, run: Run) -> None:
    outcome = run("show", model, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    card = strict_json(outcome.out)
    assert list(card) == ["model", "summary", "page", "capabilities", "methods", "default_methods", "guides", "options"]
    assert card["model"] == model
    # Those of the methods that apply, and of no other.
    em = "EM" if "EM" in card["capabilities"] else "Monte Carlo EM"
    titles = {"em": em, "cavi": "CAVI", "nuts": "NUTS"}
    found = [title for method, title in titles.items() if method in card["methods"]]
    assert list(card["options"]) == [model, "guide", "SVI", *found]
    for options in card["options"].values():
        assert all(list(option) == ["option", "type", "default", "bounds", "description"] for option in options)
    plain = run("show", model)
    assert (plain.status, plain.err) == (0, "")
    assert card["summary"] in plain.out
    for option in card["options"][model]:
        assert option["option"] in plain.out
    assert ", ".join(card["capabilities"]) in plain.out


def few_steps(*names: str) -> list[str]:
    values = {"steps": 5, "iterations": 4, "restarts": 1, "hidden": 4}
    return [part for name in names for part in ("--set", f"{name}={values[name]}")]


def check_document(document: Any, model: str, name: str, methods: list[str], seeds: int) -> list[dict[str, Any]]:
    assert list(document) == ["model", "data", "rows"]
    assert document["model"] == model
    assert document["data"] == {"name": name, "rows": 24, "columns": 3}
    rows: list[dict[str, Any]] = document["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [(m, seed) for m in methods for seed in range(seeds)]
    for row in rows:
        assert list(row) == FIGURES == list(ROW)
        for key, value in row.items():
            assert isinstance(value, TYPES[key]), (key, value)
            assert (type(value) is bool) == (key == "converged"), (key, value)
    return rows


DOCUMENTS = [
    ("ppca", "good.csv", "em,mean-field,amortized", "exact"),
    ("factor-analysis", "good.csv", "em,mean-field,amortized", "exact"),
    ("gaussian-mixture", "good.csv", "em,mean-field,amortized", "exact"),
    ("normal-mean", "good.csv", "mean-field,full-rank,laplace", "exact"),
    ("vae", "bits.csv", "em,mean-field,amortized", "quadrature"),
]


@pytest.mark.parametrize(("model", "data", "methods", "kind"), DOCUMENTS, ids=[d[0] for d in DOCUMENTS])
def test_compare_json_of_the_default_methods(
    model: str, data: str, methods: str, kind: str, run: Run, files: Path
) -> None:
    options = few_steps("steps", "iterations", "restarts", *(["hidden"] if model == "vae" else []))
    outcome = run("compare", model, "--data", files / data, "--seeds", "1", "--json", *options)
    assert outcome.status == 0, outcome.err
    rows = check_document(strict_json(outcome.out), model, data, methods.split(","), 1)
    for row in rows:
        assert row["log_evidence_kind"] == kind
        assert row["gap"] == pytest.approx(row["log_evidence"] - row["elbo"], abs=1e-9)
        assert row["gap"] == pytest.approx(row["approximation_gap"] + row["amortization_gap"], abs=1e-9)
        assert (row["kl"] is None) == (model == "vae"), "the VAE's posterior is not known"
        assert (row["khat_max"] is None) == (model == "gaussian-mixture"), (
            "an enumerated latent has no weights to judge"
        )
        assert row["learning_gap"] >= -1e-9


def test_figures_that_do_not_apply_are_null(run: Run, files: Path) -> None:
    arguments = ["compare", "normal-mean", "--data", str(files / "good.csv"), "--methods", "delta,mean-field"]
    outcome = run(*arguments, "--seeds", "1", "--json", *few_steps("steps"))
    point, normal = check_document(strict_json(outcome.out), "normal-mean", "good.csv", ["delta", "mean-field"], 1)
    null = {key for key, value in point.items() if value is None}
    assert null == {"elbo", "elbo_se", "gap", "approximation_gap", "amortization_gap", "kl", "khat_max"}
    assert not [key for key, value in normal.items() if value is None]


def test_an_evidence_that_is_only_estimated_says_so(run: Run, files: Path) -> None:
    options = [*few_steps("steps", "hidden"), "--set", "latent_dim=3", "--guide", "amortized"]
    outcome = run("fit", "vae", "--data", files / "bits.csv", "--json", *options)
    (row,) = check_document(strict_json(outcome.out), "vae", "bits.csv", ["amortized"], 1)
    assert row["log_evidence_kind"] == "estimate"
    assert row["log_evidence_se"] > 0


@pytest.mark.parametrize(
    ("choice", "label"),
    [
        ([], "mean-field"),
        (["--guide", "amortized"], "amortized"),
        (["-g", "exact"], "exact"),
        (["--method", "em"], "em"),
    ],
)
def test_fit_json(choice: list[str], label: str, run: Run, files: Path) -> None:
    arguments = ["fit", "ppca", "--data", str(files / "good.csv"), *choice, *few_steps("steps", "iterations")]
    outcome = run(*arguments, "--json")
    assert outcome.status == 0
    assert all(line.startswith("note: ") for line in outcome.err.splitlines())
    (row,) = check_document(strict_json(outcome.out), "ppca", "good.csv", [label], 1)
    plain = run(*arguments)
    assert plain.status == 0
    for key in FIGURES:
        assert re.search(rf"^ *{key} ", plain.out, flags=re.MULTILINE), key
    assert f"{row['elbo']:.4f}" in plain.out
    assert f"ppca on good.csv by {label} (nats, totals over 24 rows)" in plain.out


def test_the_command_and_the_function_give_the_same_figures(run: Run, files: Path) -> None:
    arguments = ["compare", "ppca", "--data", str(files / "good.csv"), "--methods", "amortized,em", "--seeds", "2"]
    options = ["--set", "latent_dim=1", "--columns", "c,a", *few_steps("steps", "iterations")]
    rows = strict_json(run(*arguments, *options, "--json").out)["rows"]
    frame = ez.load_data(files / "good.csv", ["c", "a"])
    result = ez.compare("ppca", frame, methods=["amortized", "em"], seeds=2, latent_dim=1, steps=5, iterations=4)
    for row, expected in zip(rows, result.document()["rows"], strict=True):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    other = ez.compare("ppca", frame, methods=["amortized", "em"], seeds=2, latent_dim=1, steps=6, iterations=4)
    assert rows[0]["elbo"] != other.document()["rows"][0]["elbo"]


def test_compare_for_people(run: Run, files: Path) -> None:
    arguments = [
        "compare",
        "ppca",
        "--data",
        str(files / "good.csv"),
        "--seeds",
        "2",
        *few_steps("steps", "iterations"),
    ]
    outcome = run(*arguments)
    rows = strict_json(run(*arguments, "--json").out)["rows"]
    assert outcome.status == 0
    for heading in ("method", "ELBO", "log p(x)", "gap", "= approximation", "+ amortization", "learning gap", "k-hat"):
        assert heading in outcome.out, heading
    for name in ("em", "mean-field", "amortized"):
        elbos = [row["elbo"] for row in rows if row["method"] == name]
        mean, deviation = sum(elbos) / 2, abs(elbos[0] - elbos[1]) / math.sqrt(2)
        assert re.search(rf"^ *{name} +{mean:.2f} ± {deviation:.2f} ", outcome.out, flags=re.MULTILINE), outcome.out


def test_notes_go_to_standard_error(run: Run, files: Path) -> None:
    """With as many components as rows every one collapses; the JSON stays clean. Of a plain fit there is no note."""
    arguments = ["fit", "gaussian-mixture", "--data", str(files / "good.csv"), "--method", "em"]
    options = ["--set", "components=24", *few_steps("restarts")]
    outcome = run(*arguments, *options, "--json")
    assert outcome.status == 0
    check_document(strict_json(outcome.out), "gaussian-mixture", "good.csv", ["em"], 1)
    note = r"note: em, seed 0: components \[.*\] collapsed.*\n"
    assert re.fullmatch(note, outcome.err)
    assert re.fullmatch(note, run(*arguments, *options).err)
    assert run(*arguments, "--set", "components=1").err == ""


def test_what_fit_leaves_in_its_directory_is_the_fit(run: Run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    arguments = [
        "fit",
        "ppca",
        "--data",
        str(files / "good.csv"),
        "--guide",
        "amortized",
        "--seed",
        "3",
        "--out",
        str(out),
    ]
    (row,) = strict_json(run(*arguments, "--json", *few_steps("steps")).out)["rows"]
    assert sorted(path.name for path in out.iterdir()) == [
        "fit.json",
        "guide.safetensors",
        "model.safetensors",
        "trajectory.csv",
    ]
    fit = ez.load_fit(out)
    assert (fit.seed, fit.method, fit.guide.name) == (3, "amortized", row["guide"])
    assert fit.elbo(ez.load_data(files / "good.csv")) == row["elbo"]


def test_what_compare_leaves_in_its_directory(run: Run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "ppca", "--data", str(files / "good.csv"), "--methods", "em,mean-field", "--seeds", "1"]
    outcome = run(*arguments, "--out", out, "--json", *few_steps("steps", "iterations"))
    assert outcome.status == 0, outcome.err
    document = strict_json(outcome.out)
    assert {"comparison.csv", "comparison.json", "trajectories.csv", "fits", "report.html"} <= {
        p.name for p in out.iterdir()
    }
    saved = strict_json((out / "comparison.json").read_text(encoding="utf-8"))
    assert {key: saved[key] for key in document} == document
    assert sorted(path.name for path in (out / "fits").iterdir()) == ["em-0", "mean-field-0"]
    assert ez.load_comparison(out).document() == document


def test_help_names_every_command(run: Run) -> None:
    outcome = run("--help")
    assert outcome.status == 0
    for command in ("models", "guides", "datasets", "show", "fit", "compare", "tutorial"):
        assert command in outcome.out
        assert run(command, "--help").status == 0


# ---- in a process of its own -----------------------------------------------------------------------------------------


def test_json_alone_on_standard_output(files: Path) -> None:
    data = str(files / "good.csv")
    outcome = run_apart("compare", "ppca", "--data", data, "--seeds", "1", "--json", *few_steps("steps", "iterations"))
    assert outcome.status == 0, outcome.err
    check_document(strict_json(outcome.out), "ppca", "good.csv", ["em", "mean-field", "amortized"], 1)
    assert all(line.startswith("note: em, seed 0: EM stopped after 4") for line in outcome.err.splitlines()), (
        outcome.err
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("fit ppca --data @nan.csv --json", r"nan\.csv: found 1 missing"),
        ("compare gaussian-mixture --data @good.csv --set components=99", "option components: found 99"),
    ],
)
def test_bad_input_ends_the_process_with_status_2(arguments: str, says: str, files: Path) -> None:
    refused(run_apart(*resolved(arguments.split(), files)), says)


def test_a_defect_ends_the_process_with_status_1_and_a_traceback() -> None:
    """The negative control of the test above."""
    outcome = run_code(f"import elbozoo.api; elbozoo.api.list_models = lambda: len(3); {CONSOLE_SCRIPT}", "models")
    assert outcome.status == 1
    assert "Traceback" in outcome.err


# ---- columns in roles, sequences, missing values ---------------------------------------------------------------------

# Three patients of unequal length, interleaved, with text for names; the second column is no measurement.
VISITS = [("zoe", 20), ("adam", 12), ("eve", 1)]
SERIES = [
    (who, t, round((t * 0.37 + len(who) * 0.21) % 1 + 2 * (t // 5 % 2), 3))
    for who, steps in VISITS
    for t in range(steps)
]
ROUNDS = sorted(SERIES, key=lambda visit: visit[1])
CODED = {"zoe": 3, "adam": 1, "eve": 2}
HOUSES = "\n".join(f"h{i},{i * 0.37 % 1:.3f},{i * 0.73 % 1:.3f},{1 + 2 * (i * 0.37 % 1):.3f}" for i in range(24))


def csv_text(header: str, rows: list[tuple[object, ...]]) -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


ROLE_FILES = {
    "visits.csv": csv_text("patient,t,dose", ROUNDS),
    "sorted.csv": csv_text("patient,t,dose", SERIES),
    "numbered.csv": csv_text("t,dose,patient", [(t, dose, CODED[who]) for who, t, dose in ROUNDS]),
    "gaps.csv": csv_text("patient,t,dose", [(who, t, "" if t == 3 else dose) for who, t, dose in ROUNDS]),
    "left_out.csv": csv_text("patient,t,dose", [visit for visit in ROUNDS if visit[1] != 3]),
    "lost.csv": csv_text("patient,t,dose", [("" if t == 3 else who, t, dose) for who, t, dose in ROUNDS]),
    "inf.csv": csv_text("patient,t,dose", [(who, t, "inf" if t == 3 else dose) for who, t, dose in ROUNDS]),
    "unmeasured.csv": csv_text("patient,t,dose", [(who, t, "") for who, t, _ in ROUNDS]),
    "houses.csv": f"name,rooms,age,price\n{HOUSES}\n",
}


@pytest.fixture(scope="module")
def role_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roles")
    for name, text in ROLE_FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


REGRESSION = "fit linear-regression --data @houses.csv --method closed-form --set *"
STATES = "fit hidden-markov-model --data @visits.csv --method em --set *"
STATE_SPACE = "fit linear-gaussian-state-space --data * --method em --columns dose --set sequence=patient"

ROLE_CASES = [
    Case("no such target", REGRESSION, "target=cost", "target=price", "unknown column .*'cost'"),
    Case("target without a name", REGRESSION, "target=none", "target=price", "option target: found None, expected col"),
    Case(
        "target of words", REGRESSION, "target=name", "target=rooms", "column 'name', row 1 holds 'h0'; expected a num"
    ),
    Case("no such position", REGRESSION, "target=7", "target=-1", "found position 7, expected .* from -3 to 2"),
    Case("no such position of labels", STATES, "sequence=9", "sequence=0", "found 9 as a column of labels"),
    Case("target elsewhere", STATES, "target=dose", "sequence=patient", "unknown option 'target'"),
    Case("no such sequence", STATES, "sequence=patients", "sequence=patient", "did you mean 'patient'"),
    Case(
        "target beside no such column",
        "fit linear-regression --data @houses.csv --method closed-form --set target=price --columns *",
        "room",
        "rooms",
        "unknown column of houses.csv 'room'; did you mean 'rooms'",
    ),
    Case(
        "labels alone",
        "fit hidden-markov-model --data @visits.csv --method em --set sequence=patient --columns *",
        "patient",
        "patient,dose",
        "no numeric column beside the labels in 'patient'",
    ),
    Case(
        "missing values in a model of complete data",
        "fit * --data @gaps.csv --method em --columns dose --set sequence=patient",
        "hidden-markov-model",
        "linear-gaussian-state-space",
        r"found 2 missing \(NaN\) or infinite values, first nan in column 'dose', row 8",
    ),
    Case(
        "missing label", STATE_SPACE, "@lost.csv", "@gaps.csv", "column 'patient', row .* holds no label; expected one"
    ),
    Case("infinity", STATE_SPACE, "@inf.csv", "@gaps.csv", r"found 2 infinite values, .* finite or missing \(NaN\)"),
    Case(
        "nothing measured", STATE_SPACE, "@unmeasured.csv", "@gaps.csv", "found no number in column 'dose', all of it"
    ),
]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", ROLE_CASES, ids=ids(ROLE_CASES))
def test_bad_roles_are_one_line_and_no_work(case: Case, run: Run, role_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run(*resolved(case.with_slot(case.bad), role_files), "--out", out), case.says)
    assert nothing_written(out)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", ROLE_CASES, ids=ids(ROLE_CASES))
def test_the_good_role_beside_it_is_accepted(case: Case, role_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["elbozoo", *resolved(case.with_slot(case.good), role_files)])
    with pytest.raises(WorkStartedError):
        main()


def document_of(run: Run, *arguments: str | Path) -> dict[str, Any]:
    outcome = run(*arguments, "--json")
    assert outcome.status == 0, outcome.err
    document: dict[str, Any] = strict_json(outcome.out)
    return document


def evidence_of_states(run: Run, path: Path, *more: str) -> float:
    document = document_of(
        run,
        *("fit", "hidden-markov-model", "--data", path, "--method", "em", "--columns", "dose"),
        *("--set", "states=2", "--set", "iterations=3", "--set", "restarts=1", *more),
    )
    assert document["data"]["rows"] == len(SERIES)
    return float(document["rows"][0]["log_evidence"])


def test_sequences_are_told_apart_by_their_labels(run: Run, role_files: Path) -> None:
    by_patient = ["--set", "sequence=patient"]
    interleaved = evidence_of_states(run, role_files / "visits.csv", *by_patient)
    # Absolute, nats: the same numbers are added in another order, 33 steps of a few nats each.
    for name in ("sorted.csv", "numbered.csv"):
        assert abs(evidence_of_states(run, role_files / name, *by_patient) - interleaved) < 1e-9

    assert abs(evidence_of_states(run, role_files / "visits.csv") - interleaved) > 1e-3


def test_positions_of_labels_are_those_of_the_file(run: Run, role_files: Path) -> None:
    by_name = evidence_of_states(run, role_files / "numbered.csv", "--set", "sequence=patient")
    # The label stands third in the file and first among the columns that are kept.
    assert evidence_of_states(run, role_files / "numbered.csv", "--set", "sequence=2") == by_name
    assert evidence_of_states(run, role_files / "numbered.csv", "--set", "sequence=0") != by_name


def test_a_target_is_kept_though_it_is_not_picked(run: Run, role_files: Path) -> None:
    command = ["fit", "linear-regression", "--data", role_files / "houses.csv", "--method", "closed-form"]
    picked = document_of(run, *command, "--columns", "rooms", "--set", "target=price")
    assert picked["data"]["columns"] == 2
    # The price is 1 + 2 rooms, so that age explains nothing of it and rooms everything.
    by_rooms = picked["rows"][0]["log_evidence"]
    by_age = document_of(run, *command, "--columns", "age", "--set", "target=price")["rows"][0]["log_evidence"]
    assert by_rooms > by_age + 10
    swapped = document_of(run, *command, "--columns", "price", "--set", "target=rooms")["rows"][0]["log_evidence"]
    assert abs(swapped - by_rooms) > 1e-3


def test_missing_steps_are_marginalised(run: Run, role_files: Path) -> None:
    command = ["fit", "linear-gaussian-state-space", "--method", "em", "--columns", "dose"]
    command += ["--set", "sequence=patient", "--set", "structure=local-level", "--set", "iterations=3"]
    evidence = {
        name: document_of(run, *command, "--data", role_files / name)["rows"][0]["log_evidence"]
        for name in ("gaps.csv", "visits.csv", "left_out.csv")
    }
    assert all(map(math.isfinite, evidence.values()))
    # A step without a value is a step all the same: the level moves on, which a row that is left out does not let it.
    assert abs(evidence["gaps.csv"] - evidence["left_out.csv"]) > 1e-3
    assert abs(evidence["gaps.csv"] - evidence["visits.csv"]) > 1e-3
