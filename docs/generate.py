"""Pages that say what the zoo holds, from its registries and from runs: an entry needs no second home in the docs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sitegen import benchmarks, develop, examples, guides, learn, methods, notebooks, reference, runs, zoo
from sitegen.fingerprint import digest

from elbozoo.inference.storage import writable_directory
from elbozoo.models import Entry, entry_names, get_entry

ROOT = Path(__file__).resolve().parent.parent
API = ("elbozoo", "elbozoo.api")
Report = Callable[[str], None]


def write_pages(
    folder: Path,
    cache: Path,
    *,
    entries: list[str] | None = None,
    task: Callable[..., Any] = zoo.write_page_of,
    example: Callable[..., Any] = examples.write_example,
    processes: int = runs.PROCESSES,
    report: Report = print,
) -> None:
    """Write every generated page under ``folder``; pages that have not changed keep their date, others go.

    Parameters
    ----------
    folder, cache : path
        Where pages lie, and the runs that they are made from.
    entries : list of str, optional
        Entries that the zoo shows, all by default.
    task, example : callable
        Makers of the runs: of an entry's tutorial, called with its name and the path of a notebook, and of an example,
        called with its kind, its name and such a path.
    processes : int
        Processes that the runs are shared out to; none for this one.
    report : callable
        Takes a line for each run.

    Raises
    ------
    PageFailed
        If a run breaks down, with the name of its page.
    """
    shown = {name: get_entry(name).example() for name in (entries or entry_names())}
    made = runs.pages_of(
        [*_entry_runs(shown, task), *_example_runs(example)], cache, processes=processes, report=report
    )
    documents = {name: notebooks.read(path) for name, path in made.items()}
    _write_all(folder, {**_registry_pages(shown), **_run_pages(shown, documents)})


def _entry_runs(entries: Mapping[str, Entry], task: Callable[..., Any]) -> list[runs.Run]:
    return [
        runs.Run(f"models/{name}", digest([*API, type(entry).__module__], task.__qualname__, name), task, (name,))
        for name, entry in entries.items()
    ]


def _example_runs(example: Callable[..., Any]) -> list[runs.Run]:
    wanted = [*guides.example_runs(), *(("methods", name) for name in methods.METHODS)]
    source = Path(examples.__file__).read_bytes()
    used = ["elbozoo.models.ppca", "elbozoo.models.gaussian_mixture"]
    found = []
    for kind, name in wanted:
        place = f"methods/{name}" if kind == "methods" else f"guides/{kind}/{name}"
        key = digest([*API, *used, *_entries_of_example(kind, name)], example.__qualname__, source)
        found.append(runs.Run(place, key, example, (kind, name)))
    return found


def _entries_of_example(kind: str, name: str) -> list[str]:
    """Return the modules of the entries that an example fits, beside those that many do."""
    if kind == "whole":
        return [f"elbozoo.models.{examples.WHOLE[name][0].replace('-', '_')}"]
    if kind == "autoguides":
        return ["elbozoo.models.logistic_regression"]
    return ["elbozoo.models.bayesian_gaussian_mixture", "elbozoo.models.linear_regression"]


# ---- pages -----------------------------------------------------------------------------------------------------------


def _registry_pages(entries: Mapping[str, Entry]) -> dict[str, str | bytes]:
    """Return what comes from registries and files alone."""
    benchmarks_text, pictures = benchmarks.page_and_pictures(ROOT / "benchmarks")
    return {
        "guides.md": guides.overview(),
        "methods.md": methods.overview(entries),
        "datasets.md": reference.datasets(),
        "commands.inc": reference.commands(),
        "json.md": reference.json_page(),
        reference.SCHEMA_FILE: reference.schema_text(),
        "benchmarks.inc": benchmarks_text,
        **pictures,
        "contract.inc": develop.contract(ROOT),
        "layers.png": develop.layers(),
    }


def _run_pages(entries: Mapping[str, Entry], documents: Mapping[str, dict[str, Any]]) -> dict[str, str | bytes]:
    """Return what holds runs: tutorials and examples, and the gallery with their pictures."""
    pages: dict[str, str | bytes] = {}
    pictures = {name: notebooks.picture_of(documents[f"models/{name}"]) for name in entries}
    for name, entry in entries.items():
        document = documents[f"models/{name}"]
        pages[f"models/{name}.ipynb"] = notebooks.text_of(zoo.entry_page(document, name, entry))
        pages[f"notebooks/{name}.ipynb"] = notebooks.text_of(document)
        picture = pictures[name]
        if picture is not None:
            pages[f"thumbnails/{name}.png"] = notebooks.thumbnail(picture.content)
    for name, text in {**guides.texts(entries), **methods.texts(entries)}.items():
        document = notebooks.with_text(documents[name], 0, text)
        if name.startswith("methods/"):
            document = notebooks.with_text(document, len(document["cells"]), methods.references(Path(name).name))
        pages[f"{name}.ipynb"] = notebooks.text_of(document)
    return {"zoo.md": zoo.gallery(entries, pictures), **pages}


def _write_all(folder: Path, pages: Mapping[str, str | bytes]) -> None:
    for stale in {path for path in folder.rglob("*") if path.is_file()} - {folder / name for name in pages}:
        stale.unlink()
    for name, content in pages.items():
        path = folder / name
        written = content.encode() if isinstance(content, str) else content
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != written:
            path.write_bytes(written)


# ---- pages that are written by hand and run --------------------------------------------------------------------------


def run_written_pages(docs: Path, cache: Path, jupyter_cache: Path, *, report: Report = print) -> None:
    """Execute the hand-written pages with code in two processes, each code once, and hand MyST-NB the outputs.

    Raises
    ------
    PageFailed
        If a page breaks down, with its name.
    """
    pages = [docs / "index.md", *sorted((docs / "learn").glob("*.md")), *sorted((docs / "learn" / "zh").glob("*.md"))]
    opened = learn.open_cache(writable_directory(jupyter_cache))
    made = runs.pages_of(learn.runs_of(pages, opened), cache, report=report)
    learn.fill(opened, list(made.values()))


def wanted_entries() -> list[str] | None:
    """Return the entries that ``ELBOZOO_DOCS_ENTRIES`` names with commas between, None where it is not set.

    A page can then be looked at while its entry is written, without the runs of all others.
    """
    found = os.environ.get("ELBOZOO_DOCS_ENTRIES")
    return found.split(",") if found else None
