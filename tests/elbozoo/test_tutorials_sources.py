"""Tutorials about data and programs that the user brings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import elbozoo as ez
from elbozoo import tutorials
from elbozoo.notebook.cells import Code, Text
from elbozoo.programs import load_program, place_of
from elbozoo.tutorials import tutorial_cells, write_tutorial
from elbozoo.tutorials.subject import Effort, Subject

SHORT = Effort(rows=30, seeds=1, steps=30, draws=50)
PROGRAMS = '''
"""Programs of mine."""

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule

import beside


def sizes(batch):
    """Sizes of people.

    Behind both numbers lies one, $z \\\\sim \\\\mathcal N(0, 1)$.
    """
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], beside.COLUMNS), 0.5).to_event(1), obs=batch.x)


class Line(PyroModule):
    """Rows along a line."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, batch):
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z * self.slope, 1.0).to_event(1), obs=batch.x)


class Needy:
    def __init__(self, wanted):
        self.wanted = wanted


def single(batch):
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=batch.x)


def blind(batch):
    with pyro.plate("data", batch.total, subsample=batch.index):
        return pyro.sample("y", dist.Normal(0.0, 1.0), obs=batch.x[:, 0])


line = Line()
number = 3
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of programs that imports what lies beside it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "beside.py").write_text("COLUMNS = 2\n")
    (folder / "programs.py").write_text(PROGRAMS)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    return folder / "programs.py"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tutorials, "EFFORT", SHORT)


def cells_of(model: Any, page: Path, **given: Any) -> tuple[str, str]:
    """Return text and code of a page that is not run."""
    options = {name: given.pop(name) for name in list(given) if name not in ("data", "guide")}
    cells = tutorial_cells(Subject.of(model, page, options=options, effort=SHORT, **given))
    text = "\n".join(c.source for c in cells if isinstance(c, Text) and isinstance(c.source, str))
    return text, "\n".join(c.source for c in cells if isinstance(c, Code))


# ---- programs --------------------------------------------------------------------------------------------------------


def test_page_about_a_program_shows_what_can_be_derived(file: Path, tmp_path: Path) -> None:
    page = write_tutorial(f"{file}:sizes", tmp_path / "pages" / "sizes.ipynb")
    document = json.loads(page.read_text(encoding="utf-8"))
    text = "\n\n".join(cell["source"] for cell in document["cells"] if cell["cell_type"] == "markdown")
    code = "\n\n".join(cell["source"] for cell in document["cells"] if cell["cell_type"] == "code")
    assert text.startswith("# Sizes of people\n")
    assert "Behind both numbers lies one" in text and 'z = pyro.sample("z"' in text
    assert 'program = ez.load_program("../mine/programs.py:sizes")' in code
    assert "computed on a grid" in text  # one latent number for each row
    assert "the rows are drawn from the program itself" in text
    for absent in ("## References", "## What goes wrong", "nan"):
        assert absent not in text
    drawn = [o for c in document["cells"] for o in c.get("outputs", []) if "image/png" in str(o.get("data", {}).keys())]
    assert len(drawn) >= 5

    for source in code.split("\n\n")[:2]:
        assert "/tmp" not in source  # the page may be moved together with its program


def test_module_and_entry_of_a_file_have_pages_too(file: Path, tmp_path: Path) -> None:
    text, code = cells_of(f"{file}:line", tmp_path / "page.md", data="iris")
    assert text.startswith("# Rows along a line") and "self.slope = torch.nn.Parameter" in text
    assert 'data = ez.load_data("iris")' in code
    made, _ = cells_of(f"{file}:Line", tmp_path / "page.md", data="iris")
    assert "class Line(PyroModule)" in made


def test_function_at_the_top_of_a_file_may_be_given_itself(file: Path, tmp_path: Path) -> None:
    program = load_program(f"{file}:sizes")
    assert place_of(program) == (file.resolve(), "sizes")
    _, code = cells_of(program, file.parent / "page.md")
    assert 'ez.load_program("programs.py:sizes")' in code
    with pytest.raises(ez.InvalidInput, match="expected one at the top of a file"):
        ez.tutorial(lambda batch: None, tmp_path / "page.md")


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("nothing.py:sizes", "found no file nothing.py, expected one"),
        ("programs.py:size", r"unknown function of programs.py 'size'; did you mean 'sizes'"),
        ("programs.py:number", "found a int, expected a callable program"),
        ("programs.py:Needy", "found a class that cannot be called without arguments"),
        ("programs.py", "expected path/to/file.py:function; name the function after a colon"),
        ("raises.py:f", "raises.py: found ZeroDivisionError: division by zero while it was imported"),
        ("broken.py:f", "broken.py: found SyntaxError: .*line 1"),
        ("programs.py:single", "site 'z' of the program: found draws in torch.float32, expected torch.float64"),
        ("programs.py:blind", "expected an observed site 'x'"),
        ("programs.py:line", r"cannot be drawn from without any|unknown"),
    ],
)
def test_programs_that_cannot_be_used_say_why(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str, message: str
) -> None:
    (file.parent / "raises.py").write_text("1 / 0\n")
    (file.parent / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(file.parent)
    before = sys.path[:]
    if spelled == "programs.py:line":
        # Its four slopes say how many columns there are, so that it needs no data.
        assert "drawn from the program itself" in cells_of(spelled, tmp_path / "page.md")[0]
        return
    with pytest.raises(ez.InvalidInput, match=message) as caught:
        write_tutorial(spelled, tmp_path / "page.md")
    assert "\n" not in str(caught.value)
    assert sys.path == before
    assert not (tmp_path / "page.md").exists()


# ---- data ------------------------------------------------------------------------------------------------------------


def test_named_data_and_options_stand_in_the_code(tmp_path: Path) -> None:
    text, code = cells_of("ppca", tmp_path / "page.md", data="iris", latent_dim=3, steps=50, iterations=7)
    assert 'data = ez.load_data("iris")' in code
    assert '"steps": 50' in code and '"latent_dim": 3' in code and "iterations=7" in code
    assert "The rows are those of `iris`" in text


def test_a_file_is_read_from_where_the_page_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 3)), columns=["a", "b", "c"])
    frame.to_csv(tmp_path / "data" / "rows.csv", index=False)
    _, code = cells_of("ppca", tmp_path / "pages" / "page.md", data=tmp_path / "data" / "rows.csv")
    assert 'ez.load_data("../data/rows.csv"' in code


@pytest.mark.parametrize("kind", ["frame", "tensor"])
def test_rows_in_memory_lie_beside_the_page(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(20, 3))
    data = {"frame": pd.DataFrame(values, columns=["a", "b", "c"]), "tensor": torch.tensor(values)}
    page = write_tutorial("normal-mean", tmp_path / "page.md", data=data[kind], guide="exact")
    assert 'ez.load_data("page_data.csv"' in page.read_text()
    again = ez.load_data(tmp_path / "page_data.csv")
    # To the last bit, since pandas writes the shortest text that reads back as the same number.
    assert np.array_equal(again.x.numpy(), values)
    assert not np.array_equal(again.x.numpy(), values + 1e-12)


def test_labels_are_read_as_labels(tmp_path: Path) -> None:
    frame = pd.DataFrame({"who": ["a"] * 10 + ["b"] * 10, "y": np.random.default_rng(0).normal(size=20)})
    frame.to_csv(tmp_path / "visits.csv", index=False)
    _, code = cells_of("hidden-markov-model", tmp_path / "page.md", data=tmp_path / "visits.csv", sequence="who")
    assert 'keys=["who"]' in code and '"sequence": "who"' in code
    write_tutorial("hidden-markov-model", tmp_path / "page.md", data=frame, sequence="who", states=2)
    assert pd.read_csv(tmp_path / "page_data.csv")["who"].tolist() == frame["who"].tolist()


def test_rows_out_of_memory_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(20, 3)))
    stored = ez.load_data(tmp_path / "rows.npy", stream=True)
    with pytest.raises(ez.InvalidInput, match="expected rows that a page can draw"):
        write_tutorial("ppca", tmp_path / "page.md", data=stored)
