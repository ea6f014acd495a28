"""The generated pages of the documentation say all that the registries hold."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from elbozoo.cli import app
from elbozoo.inference.comparison import ROW
from elbozoo.models import entry_names, get_entry

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    (folder / "models").mkdir()
    (folder / "models" / "gone.md").write_text("an entry that is no more")
    generate.write_pages(folder)
    return folder


def test_every_entry_has_a_page_with_its_options(pages: Path) -> None:
    assert sorted(path.stem for path in (pages / "models").iterdir()) == entry_names()
    for name in entry_names():
        text = (pages / "models" / f"{name}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {get_entry(name).summary()}\n")
        assert all(f"`{option}`" in text for option in get_entry(name).Options.model_fields)
        assert f"(models/{name}.md)" in (pages / "zoo.md").read_text(encoding="utf-8")


def test_every_command_is_described(pages: Path) -> None:
    text = (pages / "commands.inc").read_text(encoding="utf-8")
    names = [command.name for command in app.registered_commands]
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == names
    assert "`--set NAME=VALUE`" in text


def test_json_example_has_the_fields_that_are_described(generate: ModuleType, pages: Path) -> None:
    text = (pages / "json.inc").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```json\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    (row,) = json.loads(example)["rows"]
    assert list(row) == list(ROW) == list(generate.JSON_FIELDS)


def test_unchanged_pages_keep_their_date(generate: ModuleType, pages: Path) -> None:
    """Sphinx reads again what is newer; only the example of a run tells the time."""
    before = {path: path.stat().st_mtime_ns for path in pages.rglob("*.md")}
    generate.write_pages(pages)
    assert {path: path.stat().st_mtime_ns for path in pages.rglob("*.md")} == before
