"""Examples say what happens: those of docstrings, and the Python of the README."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elbozoo

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("elbozoo", "models", "guides", "inference")
IMAGES = 60
STEPS = 30  # instead of thousands: how well the README's fits come out is no part of what it promises


def modules_with_examples() -> list[str]:
    """Modules in whose text an example begins."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if ">>> " in path.read_text("utf-8")]
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    names = [".".join(part if part[0] == "elbozoo" else ("elbozoo", *part)) for part in parts]
    return sorted({name.removesuffix(".__init__") for name in names if name.count("elbozoo") == 1})


def examples() -> list[doctest.DocTest]:
    finder, names = doctest.DocTestFinder(exclude_empty=True), modules_with_examples()
    found = [example for name in names for example in finder.find(importlib.import_module(name), name)]
    return [example for example in found if example.examples]


def failures(example: doctest.DocTest) -> tuple[int, str]:
    """Run an example; return how many of its lines say what does not happen, and what does."""
    said: list[str] = []
    found = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    return found.failed, "".join(said)


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_example_says_what_happens(example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, said = failures(example)
    assert not failed, said
    assert os.listdir(tmp_path) == [], "an example leaves nothing where the reader happens to be"


def test_every_public_function_has_an_example() -> None:
    functions = {name for name in elbozoo.__all__ if inspect.isfunction(getattr(elbozoo, name))}
    shown = {name for name in functions if ">>> " in (getattr(elbozoo, name).__doc__ or "")}
    assert len(functions) > 10
    assert functions == shown


def test_an_example_that_is_wrong_fails() -> None:
    """And one that is right does not."""
    for text, expected in ((">>> 1 + 1\n3\n", 1), (">>> 1 + 1\n2\n", 0)):
        example = doctest.DocTestParser().get_doctest(text, {}, "example", None, None)
        assert failures(example)[0] == expected


def test_no_example_is_skipped() -> None:
    lines = [line for example in examples() for line in example.examples]
    assert lines and not any(line.options.get(doctest.SKIP) for line in lines)


def fewer(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the public interface that takes fewer steps, and of images fewer rows."""

    def called(model: str, data: str, **settings: Any) -> Any:
        rows = elbozoo.load_data(data).x[:IMAGES] if data.startswith("digits") else data
        return function(model, rows, **settings, steps=STEPS, progress=False)

    return called


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, with fewer steps, on a file of the kind that it names."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), flags=re.M | re.S)
    for name in ("fit", "compare", "rate_distortion"):
        assert f"ez.{name}(" in block
        monkeypatch.setattr(elbozoo, name, fewer(getattr(elbozoo, name)))
    rows = elbozoo.load_data("simulate:factor-analysis", rows=60).x[:, :3].tolist()
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text("\n".join(["a,b,c", *(",".join(map(str, row)) for row in rows)]), encoding="utf-8")
    exec(block, {})
    assert {path.name for path in tmp_path.iterdir()} >= {"my.csv", "mixture.html"}
    Path("my.csv").unlink()
    with pytest.raises(ValueError, match=r"my\.csv"):
        exec(block[block.rindex("ez.compare(") :], {"ez": elbozoo})
