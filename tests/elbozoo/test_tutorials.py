"""Tutorials: both formats, the numbers in their sentences, and nothing written where something is wrong."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from elbozoo import notebook, tutorials
from elbozoo.inference.method import default_guide
from elbozoo.models import entry_names, get_entry
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.notebook import Code, Text, execute
from elbozoo.pages import attributes_table, code_block, options_table, page_parts
from elbozoo.plots import number
from elbozoo.tutorials import write_tutorial

MODEL, GUIDE = "ppca", "mean-field"
CODE_CELL = re.compile(r"^```\{code-cell\} ipython3\n(?::tags:[^\n]*\n\n)?(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[(.+)\]\((.+)\)")
PNG = b"\x89PNG\r\n"


@contextmanager
def short_runs() -> Iterator[None]:
    """A page in a second: what it says is another matter, that it says what was computed is tested."""
    with pytest.MonkeyPatch.context() as patch:
        short = {"ROWS": 30, "SEEDS": 1, "STEPS": 40, "DRAWS": 50, "EM_SETTINGS": {"iterations": 5, "restarts": 1}}
        for name, value in short.items():
            patch.setattr(tutorials, name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the same page in both formats."""
    path = tmp_path_factory.mktemp("tutorials")
    with short_runs():
        for suffix in (".md", ".ipynb"):
            assert write_tutorial(MODEL, path / f"page{suffix}", guide=GUIDE) == path / f"page{suffix}"
    return path


def notebook_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "page.ipynb").read_text(encoding="utf-8"))
    return document


def code_of(document: dict[str, Any]) -> list[str]:
    return [cell["source"] for cell in document["cells"] if cell["cell_type"] == "code"]


def text_of(document: dict[str, Any]) -> str:
    return "\n\n".join(cell["source"] for cell in document["cells"] if cell["cell_type"] == "markdown")


def run_again(sources: list[str]) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    with plt.rc_context():
        for source in sources:
            exec(source, namespace)
        plt.close("all")
    return namespace


# ---- the page --------------------------------------------------------------------------------------------------------


def test_both_formats_hold_the_same_code_and_text(folder: Path) -> None:
    markdown, document = (folder / "page.md").read_text(encoding="utf-8"), notebook_of(folder)
    assert [source.strip() for source in CODE_CELL.findall(markdown)] == code_of(document)
    for cell in document["cells"]:
        assert cell["source"] in markdown


def test_nothing_unfinished_is_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["page.ipynb", "page.md", "page_files"]


def test_every_picture_of_the_markdown_is_there(folder: Path) -> None:
    found = PICTURE.findall((folder / "page.md").read_text(encoding="utf-8"))
    assert len(found) == 3
    for alternative_text, path in found:
        assert len(alternative_text) > 10
        assert (folder / path).read_bytes().startswith(PNG)
    assert len(list((folder / "page_files").iterdir())) == len(found)


def test_notebook_shows_what_its_run_gave(folder: Path) -> None:
    outputs = [cell["outputs"] for cell in notebook_of(folder)["cells"] if cell["cell_type"] == "code"]
    kinds = [(output["output_type"], *sorted(output.get("data", {}))) for cell in outputs for output in cell]
    assert kinds == [
        ("stream",),
        ("display_data", "image/png", "text/plain"),
        ("execute_result", "text/plain"),
        ("display_data", "image/png", "text/plain"),
        ("execute_result", "text/html", "text/plain"),
        ("execute_result", "image/png", "text/plain"),
    ]


def test_notebook_is_valid(folder: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(folder / "page.ipynb", as_version=4))


def test_numbers_in_the_text_are_those_of_a_new_run(folder: Path) -> None:
    """The code of the page alone, run afresh, gives every figure of its sentences; another seed does not."""
    document = notebook_of(folder)
    text, sources = text_of(document), code_of(document)
    run = run_again(sources)

    def figures(ledger: pd.Series) -> list[str]:
        names = ("elbo", "log_evidence", "gap", "approximation_gap", "amortization_gap", "kl", "learning_gap")
        return [f"{number(ledger[name], 2)} nats" for name in names]

    def of_methods(table: pd.DataFrame) -> list[str]:
        return [f"{number(value, 2)} nats below log p(x)" for value in table["gap"] if value > 1]

    ledger, table = run["ledger"], run["comparison"].table
    assert ledger["gap"] > 1, "two decimals are expected of gaps above one nat"
    expected = [*figures(ledger), *of_methods(table), number(ledger["gap"] / ledger["rows"], 6)]
    assert [figure for figure in expected if figure not in text] == []
    assert len(of_methods(table)) >= 2

    other = run_again([source.replace("seed=0, **settings", "seed=1, **settings") for source in sources])
    assert all(figure not in text for figure in figures(other["ledger"])[:3])


def test_markdown_can_be_run_again(folder: Path) -> None:
    sources = CODE_CELL.findall((folder / "page.md").read_text(encoding="utf-8"))
    run = run_again(sources[:3])
    assert f"{number(run['ledger']['elbo'], 2)} nats" in text_of(notebook_of(folder))


def test_page_teaches_the_pair(folder: Path) -> None:
    text = text_of(notebook_of(folder))
    entry = get_entry(MODEL)
    parts = page_parts(entry.page())
    program = 'z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))'
    for part in (*parts, program, attributes_table(entry), options_table(entry.Options), "`free`", "`diagonal-normal`"):
        assert part
        assert part in text
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings[-3:] == ["What goes wrong", "Exercises", "References"]


OTHER_PAIRS = (
    ("ppca", "exact"),
    ("ppca", "free-delta"),
    ("ppca", "shared-full-rank-normal"),
    ("gaussian-mixture", "amortized-categorical"),
    ("normal-mean", "delta"),
    ("normal-gamma", "exact"),
    ("beta-bernoulli", "laplace"),
    ("hidden-markov-model", "exact"),
    ("linear-gaussian-state-space", "exact"),
)


def pairs() -> Iterator[Any]:
    """Every entry with the default guide, and one pair of each kind that differs from it."""
    yield from ((model, default_guide(get_entry(model).example())) for model in entry_names())
    yield from (pytest.param(model, guide, marks=pytest.mark.slow) for model, guide in OTHER_PAIRS)


@pytest.mark.parametrize(("model", "guide"), list(pairs()))
def test_any_pair_makes_a_page(tmp_path: Path, model: str, guide: str) -> None:
    with short_runs():
        text = write_tutorial(model, tmp_path / "page.md", guide=guide).read_text(encoding="utf-8")
    assert f"the guide `{guide}`" in text
    prose = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", prose)


# The classical entries whose pages take longest, and one that stands for the others.
LONGEST = (
    "bayesian-gaussian-mixture",
    "eight-schools",
    "hidden-markov-model",
    "linear-gaussian-state-space",
    "mixture-of-factor-analyzers",
    "ppca",
)


@pytest.mark.slow
@pytest.mark.parametrize("model", LONGEST)
def test_page_takes_under_a_minute_of_one_core(tmp_path: Path, model: str) -> None:
    before = time.process_time()
    write_tutorial(model, tmp_path / "page.ipynb")
    assert time.process_time() - before < 60


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "guide", "path", "message"),
    [
        ("pcca", None, "page.md", "unknown model 'pcca'; did you mean 'ppca'"),
        ("ppca", "meanfield", "page.md", "unknown guide 'meanfield'; did you mean 'mean-field'"),
        ("ppca", "em", "page.md", "unknown guide 'em'"),
        ("ppca", "free-categorical", "page.md", "does not fit ppca"),
        ("normal-mean", "amortized", "page.md", "does not fit normal-mean"),
        ("ppca", None, "page.txt", "found the suffix '.txt', expected .md or .ipynb"),
        ("ppca", None, "page", "found the suffix '', expected .md or .ipynb"),
        ("ppca", None, "folder.md", "found a directory, expected the path of a file"),
        ("ppca", None, "file/page.md", "choose one that can be written to"),
        ("ppca", None, "file/deeper/page.ipynb", "choose one that can be written to"),
        ("ppca", None, "taken.md", "choose one that can be written to"),
    ],
)
def test_bad_input_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, guide: str | None, path: str, message: str
) -> None:
    def run(cells: object) -> None:
        raise AssertionError("the run began")

    monkeypatch.setattr(tutorials, "execute", run)
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "taken_files").write_text("not a folder")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput) as caught:
        write_tutorial(model, tmp_path / path, guide=guide)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before

    with pytest.raises(AssertionError, match="the run began"):
        write_tutorial("ppca", tmp_path / "good.md")


def test_failure_leaves_the_old_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(cells: object) -> None:
        raise NumericalFailure("step 3: the objective is nan")

    page = tmp_path / "page.md"
    page.write_text("an older page")
    monkeypatch.setattr(tutorials, "execute", fail)
    with pytest.raises(NumericalFailure):
        write_tutorial("ppca", page)
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert page.read_text() == "an older page"


@pytest.mark.parametrize("suffix", [".md", ".ipynb"])
def test_broken_write_leaves_the_old_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    page = tmp_path / f"page{suffix}"
    page.write_text("an older page")
    monkeypatch.setattr(notebook.os, "replace", full)
    with pytest.raises(InvalidInput, match="No space left on device"):
        notebook.write_page(execute([Text("# Title"), Code("1 + 1")]), page)
    assert [path.name for path in tmp_path.iterdir()] == [page.name]
    assert page.read_text() == "an older page"


# ---- the executor ----------------------------------------------------------------------------------------------------


def test_cells_share_one_namespace_and_give_outputs() -> None:
    cells = [
        Code("print('one')\nvalue = 2"),
        Text(lambda run: f"The value is {run['value']}."),
        Code("import pandas as pd\npd.DataFrame({'a': [value]})"),
        Code("import matplotlib.pyplot as plt\nfigure, axes = plt.subplots()\naxes.plot([1, 2])\nNone", alt="a line"),
        Code("value += 1"),
        Code("figure"),
    ]
    printed, text, frame, drawn, silent, figure = execute(cells)
    assert printed.outputs == [notebook.Output("stream", {"text/plain": "one\n"})]
    assert (text.source, text.outputs) == ("The value is 2.", None)
    assert frame.outputs is not None and drawn.outputs is not None and figure.outputs is not None
    assert "<td>2</td>" in str(frame.outputs[0].data["text/html"])
    assert [output.kind for output in drawn.outputs] == ["display_data"]
    assert silent.outputs == []
    assert [output.kind for output in figure.outputs] == ["execute_result"]
    assert figure.outputs[0].data["image/png"] == drawn.outputs[0].data["image/png"]


def test_execution_leaves_no_trace() -> None:
    state, settings, figures = torch.get_rng_state(), dict(plt.rcParams), plt.get_fignums()
    execute([Code("import torch\ntorch.manual_seed(5)"), Code("import matplotlib.pyplot as plt\nplt.figure()")])
    execute([Code("import matplotlib.pyplot as plt\nplt.rcParams['font.size'] = 30")])
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(plt.rcParams) == settings
    assert plt.get_fignums() == figures


def test_error_in_a_cell_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        execute([Code("1 / 0")])


def test_links_to_pictures_need_no_quotes(tmp_path: Path) -> None:
    cells = execute([Code("import matplotlib.pyplot as plt\nfigure = plt.figure()", alt="an empty picture")])
    page = notebook.write_page(cells, tmp_path / "a page, 第一.md")
    ((_, path),) = PICTURE.findall(page.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[\w./-]+", path, flags=re.ASCII)
    assert (tmp_path / path).read_bytes().startswith(PNG)


def test_fences_hold_what_contains_fences() -> None:
    assert code_block("a", "text") == "```text\na\n```"
    assert code_block("```\na\n```", "text").splitlines()[0] == "````text"


# ---- what an entry says about itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", entry_names())
def test_pages_of_entries_come_apart_and_lose_nothing(name: str) -> None:
    entry = get_entry(name)
    parts = page_parts(entry.page())
    assert all(parts)
    assert parts.title == entry.summary()
    assert "```bibtex" in parts.references and "bibtex" not in parts.story
    together = re.sub(r"\s+|What goes wrong:|References|-{5,}|\.", "", entry.page()).lower()
    assert re.sub(r"\s+|-{5,}|\.", "", "".join(parts)).lower() == together


def test_parts_that_are_missing_are_empty() -> None:
    assert page_parts("A title.\n\nA story.") == ("A title", "A story.", "", "")


def test_attributes_become_a_table() -> None:
    table = attributes_table(get_entry("ppca")).splitlines()
    assert table[2:] == [
        "| `loading` | Parameter (D, K) | W. |",
        "| `loc` | Parameter (D,) | μ. |",
        "| `noise_scale` | PyroParam () | σ, a standard deviation. |",
    ]
    assert attributes_table(get_entry("normal-mean")) == ""


def test_options_become_a_table() -> None:
    assert r"full \| tied \| diagonal \| spherical" in options_table(get_entry("gaussian-mixture").Options)
