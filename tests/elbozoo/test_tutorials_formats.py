"""Pages as MyST Markdown, Jupyter notebook and HTML: the same cells, complete, and runnable as they are."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from rich.console import Console

import elbozoo
from elbozoo import notebook, tutorials
from elbozoo.citations import reference_lines
from elbozoo.models import entry_names, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.notebook.cells import Code, Executed, Output, Text, execute
from elbozoo.notebook.html import formula, html_files
from elbozoo.pages import code_block, page_parts
from elbozoo.tutorials import progress, tutorial_cells
from elbozoo.tutorials.subject import Effort, Subject

MODEL = "normal-mean"
SHORT = Effort(rows=30, seeds=1, steps=40, draws=60)
CODE_CELL = re.compile(r"^```\{code-cell\} ipython3\n(?::tags:[^\n]*\n\n)?(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"^```\{figure\} (\S+)\n:alt: ([^\n]+)\n\n(.*?)\n```$", flags=re.MULTILINE | re.DOTALL)
PNG = b"\x89PNG\r\n"
SPHINX = 'project = "page"\nextensions = ["myst_nb"]\nmyst_enable_extensions = ["dollarmath", "amsmath"]\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the same page in all formats."""
    path = tmp_path_factory.mktemp("formats")
    executed = execute(tutorial_cells(Subject.of(MODEL, path / "page.md", effort=SHORT)), path)
    for suffix in (".md", ".ipynb", ".html"):
        assert notebook.write_page(executed, path / f"page{suffix}") == path / f"page{suffix}"
    return path


def notebook_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "page.ipynb").read_text(encoding="utf-8"))
    return document


def code_of(document: dict[str, Any]) -> list[str]:
    return [cell["source"] for cell in document["cells"] if cell["cell_type"] == "code"]


# ---- Markdown and notebooks ------------------------------------------------------------------------------------------


def test_both_formats_hold_the_same_code_and_text(folder: Path) -> None:
    markdown, document = (folder / "page.md").read_text(encoding="utf-8"), notebook_of(folder)
    assert [source.strip() for source in CODE_CELL.findall(markdown)] == code_of(document)
    for cell in document["cells"]:
        assert cell["source"] in markdown


def test_nothing_unfinished_is_left(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} - {"_build", "site"}
    assert names == {"page.html", "page.ipynb", "page.md", "page_files"}


def test_every_picture_of_the_markdown_is_there(folder: Path) -> None:
    found = FIGURE.findall((folder / "page.md").read_text(encoding="utf-8"))
    assert len(found) >= 6
    for path, alt, caption in found:
        assert len(alt) > 15 and caption
        content = (folder / path).read_bytes()
        assert content.startswith(PNG) if path.endswith(".png") else b"<svg" in content
    assert len(list((folder / "page_files").iterdir())) == markdown_pictures(folder) >= len(found)


def markdown_pictures(folder: Path) -> int:
    return (folder / "page.md").read_text(encoding="utf-8").count("```{figure} ")


def test_notebook_is_valid_and_describes_its_pictures(folder: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(folder / "page.ipynb", as_version=4))
    outputs = [(cell, o) for cell in notebook_of(folder)["cells"] for o in cell.get("outputs", [])]
    drawn = [(cell, o) for cell, o in outputs if {"image/png", "image/svg+xml"} & set(o.get("data", {}))]
    assert len(drawn) >= 6
    for cell, output in drawn:
        alt = cell["metadata"]["mystnb"]["image"]["alt"]
        assert [each["alt"] for each in output["metadata"].values()] == [alt]


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes find the package wherever they run, installed or not."""
    monkeypatch.setenv("PYTHONPATH", str(Path(elbozoo.__file__).resolve().parent.parent))


@pytest.mark.usefixtures("importable")
def test_notebook_runs_in_jupyter_with_no_edits(folder: Path) -> None:
    """A real kernel, in the folder of the page; what it prints first is what the page shows."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    document = nbformat.read(folder / "page.ipynb", as_version=4)
    ran = nbclient.NotebookClient(
        nbformat.from_dict(document), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for before, after in zip(document.cells, ran.cells, strict=True):
        shown = [o["text"] for o in before.get("outputs", []) if o["output_type"] == "stream"]
        printed = [o["text"] for o in after.get("outputs", []) if o.get("name") == "stdout"]
        assert shown == printed
    ledgers = [
        next(
            o["data"]["text/plain"] for c in each.cells for o in c.get("outputs", []) if "elbo_se" in str(o.get("data"))
        )
        for each in (document, ran)
    ]
    assert ledgers[0] == ledgers[1]


@pytest.mark.usefixtures("importable")
def test_markdown_goes_through_myst_nb(folder: Path) -> None:
    """Sphinx builds the page, warnings being errors, executes it again, and shows each output once."""
    pytest.importorskip("myst_nb")
    source = folder / "site"
    source.mkdir()
    (source / "conf.py").write_text(SPHINX + 'nb_execution_mode = "force"\nnb_execution_raise_on_error = True\n')
    (source / "index.md").write_text((folder / "page.md").read_text(encoding="utf-8"), encoding="utf-8")
    (source / "page_files").symlink_to(folder / "page_files")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(source), str(folder / "_build")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    html = (folder / "_build" / "index.html").read_text(encoding="utf-8")
    assert html.count("<figure") == markdown_pictures(folder)
    assert html.count("best_member_converged") == 1
    assert "<figcaption>" in html and "cell_output" not in html


# ---- HTML ------------------------------------------------------------------------------------------------------------


def test_html_needs_no_network(folder: Path) -> None:
    html = (folder / "page.html").read_text(encoding="utf-8")
    loaded = re.findall(r'(?:src|<link[^>]*href)="([^"]*)"|url\(([^)]*)\)|@import', html)
    assert loaded and all((a or b).startswith("data:") for a, b in loaded)
    assert "<script" not in html
    pictures = re.findall(r'<img src="data:image/[^"]*" alt="([^"]*)">', html)
    assert len(pictures) == html.count("<img ") >= 6 and all(len(alt) > 15 for alt in pictures)
    assert html.count("<figcaption>") >= 6
    assert "<math" in html and "$" not in re.sub(r"<(pre|code|math)\b.*?</\1>|<style>.*?</style>", "", html, flags=re.S)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


@pytest.mark.parametrize("name", entry_names())
def test_every_formula_becomes_mathml(name: str) -> None:
    (content,) = html_files([Executed(get_entry(name).page())], Path("page.html")).values()
    body = content.decode().partition("<main>")[2]
    assert body.count("<math") >= 1
    prose = re.sub(r"<(pre|code)\b.*?</\1>", "", body, flags=re.DOTALL)
    assert not re.search(r"\\[a-zA-Z]+", prose), "a command of LaTeX was left as it is"
    assert "$" not in prose and 'mathvariant="script"' not in prose


def test_mathml_has_letters_and_words_that_browsers_know() -> None:
    made = formula(r"z \sim \mathcal N(0, 1),\ \mathbb R,\ \mathrm{Gamma}")
    assert all(f"<mi>{letter}</mi>" in made for letter in ("𝒩", "ℝ", "Gamma"))
    assert "<mo>&#x0223C;</mo>" in made and "0007E" not in made


def test_html_escapes_what_programs_print() -> None:
    cells = execute([Text("# A < b"), Code("print('<b>bold</b>')"), Code("'<i>'")])
    (content,) = html_files(cells, Path("page.html")).values()
    assert b"&lt;b&gt;bold" in content and b"<b>bold" not in content and b"<title>A &lt; b</title>" in content


# ---- the executor ----------------------------------------------------------------------------------------------------


def test_cells_share_one_namespace_and_give_outputs() -> None:
    cells = [
        Code("print('one')\nvalue = 2"),
        Text(lambda run: f"The value is {run['value']}."),
        Code("import pandas as pd\npd.DataFrame({'a': [value]})"),
        Code("import matplotlib.pyplot as plt\nfigure, axes = plt.subplots()\naxes.plot([1, 2])\nNone", alt="a line"),
        Code("value += 1"),
        Code("figure", alt=lambda run: f"again, {run['value']}"),
        Code("plt.subplots()[1].plot([1, 2])"),
    ]
    printed, text, frame, drawn, silent, figure, lines = execute(cells)
    assert printed.outputs == [Output("stream", {"text/plain": "one\n"})]
    assert (text.source, text.outputs) == ("The value is 2.", None)
    assert frame.outputs is not None and drawn.outputs is not None and figure.outputs is not None
    assert "<td>2</td>" in str(frame.outputs[0].data["text/html"])
    assert [output.kind for output in drawn.outputs] == ["display_data"]
    assert silent.outputs == []
    assert [output.kind for output in figure.outputs] == ["execute_result"]
    assert (drawn.alt, figure.alt) == ("a line", "again, 3")
    assert figure.outputs[0].data["image/png"] == drawn.outputs[0].data["image/png"]
    assert lines.outputs is not None and [output.kind for output in lines.outputs] == ["display_data"]


def test_pictures_without_words_are_described_by_their_axes() -> None:
    source = (
        "import matplotlib.pyplot as plt\nfigure, axes = plt.subplots()\naxes.set(title='T', xlabel='x', ylabel='y')"
    )
    (cell,) = execute([Code(source + "\nNone")])
    assert cell.alt == "T: y against x"


def test_execution_leaves_no_trace(tmp_path: Path) -> None:
    state, settings, figures = torch.get_rng_state(), dict(plt.rcParams), plt.get_fignums()
    here = Path.cwd()
    execute([Code("import torch\ntorch.manual_seed(5)"), Code("import matplotlib.pyplot as plt\nplt.figure()")])
    execute([Code("import matplotlib.pyplot as plt\nplt.rcParams['font.size'] = 30")])
    (cell,) = execute([Code("from pathlib import Path\nprint(Path.cwd().name)")], tmp_path)
    assert cell.outputs == [Output("stream", {"text/plain": f"{tmp_path.name}\n"})]
    assert Path.cwd() == here
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(plt.rcParams) == settings
    assert plt.get_fignums() == figures


def test_error_in_a_cell_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        execute([Code("1 / 0")])


def test_progress_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def console(file: Any) -> Console:
        return Console(file=file, force_terminal=True, width=120)

    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress, "Console", console)
    with progress.page_progress("page.md", 2, shown=True) as report:
        execute([Code("import sys\nsys.stderr.write('a bar of its own')"), Code("1 + 1")], report=report)
    assert "page.md" in shown.getvalue() and "bar of its own" not in shown.getvalue()
    assert sys.stderr is shown

    silent = io.StringIO()
    monkeypatch.setattr(sys, "stderr", silent)
    with progress.page_progress("page.md", 2, shown=False) as report:
        report("import sys")
    assert silent.getvalue() == ""


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".md", ".ipynb", ".html"])
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


def test_links_to_pictures_need_no_quotes(tmp_path: Path) -> None:
    source = "import matplotlib.pyplot as plt\nfigure = plt.figure()"
    cells = execute([Code(source, alt="an empty picture", caption="Nothing.")])
    page = notebook.write_page(cells, tmp_path / "a page, 第一.md")
    ((path, alt, caption),) = FIGURE.findall(page.read_text(encoding="utf-8"))
    assert (alt, caption) == ("an empty picture", "Nothing.")
    assert re.fullmatch(r"[\w./-]+", path, flags=re.ASCII)
    assert (tmp_path / path).read_bytes().startswith(PNG)


def test_fences_hold_what_contains_fences() -> None:
    assert code_block("a", "text") == "```text\na\n```"
    assert code_block("```\na\n```", "text").splitlines()[0] == "````text"


# ---- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", entry_names())
def test_references_are_readable(name: str) -> None:
    bibtex = page_parts(get_entry(name).page()).references
    lines = reference_lines(bibtex)
    assert len(lines) == bibtex.count("\n@")
    for line in lines:
        assert re.match(r"[^{}\\]+ \(\d{4}\)\. [^{}]+\.", line), line


def test_bibtex_is_spelled_out() -> None:
    entry = r"""@article{a, author = {M{\"u}ller, Anna-Lena and S{\o}rensen, C. and others},
        title = {The {EM} Algorithm \& More}, journal = "J. Stat.", volume = 3, number = {2}, pages = {1--9},
        year = 1999}"""
    assert reference_lines(entry) == ["Müller, A.-L. et al. (1999). The EM Algorithm & More. *J. Stat.*, 3(2), 1–9."]
    with pytest.raises(InvalidInput, match="reference a: found no year, expected one"):
        reference_lines("@book{a, author = {B, C}, title = {D}}")
    with pytest.raises(InvalidInput, match="close its braces"):
        reference_lines("@book{a, author = {B")


def test_tables_of_pandas_lose_their_style(tmp_path: Path) -> None:
    cells = execute([Code("import pandas as pd\npd.DataFrame({'a': [1.5]})")])
    text = notebook.write_page(cells, tmp_path / "page.md").read_text()
    assert "<td>1.5</td>" in text and "<style" not in text and "border=" not in text
    table = text.partition("<div")[2].partition("</div>")[0]
    assert "\n\n" not in table
    assert pd.__version__ and Effort() == tutorials.EFFORT
