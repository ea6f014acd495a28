"""The generated pages of the documentation say all that the registries hold, and come from runs."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
from PIL import Image

import elbozoo as ez
from elbozoo.cli import app
from elbozoo.guides.autoguides import AUTOGUIDES
from elbozoo.guides.families import FAMILIES
from elbozoo.guides.registry import WHOLE_GUIDES
from elbozoo.guides.sources import SOURCES
from elbozoo.inference.comparison import ROW
from elbozoo.inference.method import SPECIAL
from elbozoo.models import entry_names, get_entry
from elbozoo.schema import Document, Row, json_schema

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def stub(name: str, page: Path) -> None:
    """A tutorial with one picture, in place of a run of half a minute."""
    picture = io.BytesIO()
    Image.new("RGB", (600, 300), "navy").save(picture, format="PNG")
    output = {"output_type": "display_data", "metadata": {}, "data": {"image/png": _encoded(picture.getvalue())}}
    cells = [_text(f"# {name}"), _text("## q against the exact posterior"), _code([output], alt="points on a line")]
    page.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def stub_example(kind: str, name: str, page: Path) -> None:
    """An example without a picture."""
    page.write_text(json.dumps({"cells": [_text(f"an example of {kind}, {name}")], "metadata": {}, "nbformat": 4}))


def broken(name: str, page: Path) -> None:
    """A tutorial of which one breaks down."""
    if name == "ppca":
        raise ValueError("the bound exceeds the truth")
    stub(name, page)


def _text(source: str) -> dict[str, object]:
    return {"cell_type": "markdown", "id": "a", "metadata": {}, "source": source}


def _code(outputs: list[object], alt: str) -> dict[str, object]:
    settings = {"mystnb": {"image": {"alt": alt}}}
    return {"cell_type": "code", "id": "b", "metadata": settings, "source": "1", "outputs": outputs}


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        patch.syspath_prepend(str(ROOT / "tests"))  # the processes that run pages find the stubs by it
        import generate

        yield generate


@pytest.fixture(scope="module")
def made(generate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Generated pages and the runs behind them."""
    folder, cache = tmp_path_factory.mktemp("generated"), tmp_path_factory.mktemp("runs")
    (folder / "models").mkdir()
    (folder / "models" / "gone.md").write_text("an entry that is no more")
    generate.write_pages(folder, cache, task=stub, example=stub_example, processes=0, report=str)
    return folder, cache


@pytest.fixture(scope="module")
def pages(made: tuple[Path, Path]) -> Path:
    return made[0]


def _said(page: Path) -> str:
    """All Markdown of a notebook."""
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")


# ---- the zoo ---------------------------------------------------------------------------------------------------------


def test_every_entry_has_a_page_a_card_and_a_picture(pages: Path) -> None:
    gallery = (pages / "zoo.md").read_text(encoding="utf-8")
    assert sorted(path.stem for path in (pages / "models").iterdir()) == entry_names()
    assert sorted(re.findall(r":link: models/(\S+)", gallery)) == entry_names()
    assert sorted(re.findall(r"^models/(\S+)$", gallery, flags=re.MULTILINE)) == entry_names()
    for name in entry_names():
        text = _said(pages / "models" / f"{name}.ipynb")
        assert text.startswith(f"# {name}\n")
        assert all(f"`{option}`" in text for option in get_entry(name).Options.model_fields)
        assert f"<../notebooks/{name}.ipynb>" in text and (pages / "notebooks" / f"{name}.ipynb").exists()
        with Image.open(pages / "thumbnails" / f"{name}.png") as picture:
            assert picture.size == (480, 360)
    assert gallery.count(":img-alt: points on a line") == len(entry_names())


def test_groups_of_the_gallery_follow_from_the_latents(generate: ModuleType) -> None:
    zoo = generate.zoo
    expected = {
        "ppca": zoo.REAL,
        "gaussian-mixture": zoo.FINITE,
        "mixture-of-factor-analyzers": zoo.FINITE,
        "eight-schools": zoo.GLOBAL,
        "bayesian-gaussian-mixture": zoo.GLOBAL,
        "hidden-markov-model": zoo.STACKED,
        "multi-level-vae": zoo.STACKED,
        "vae": zoo.NETWORKS,
        "normal-flow": zoo.NONE,
    }
    assert {name: zoo.group_of(get_entry(name).example()) for name in expected} == expected


def test_the_picture_of_a_page_is_of_the_posterior_else_of_the_data(generate: ModuleType) -> None:
    def page(*headings: str) -> dict[str, object]:
        cells = []
        for heading in headings:
            picture = {"data": {"image/png": _encoded(heading.encode())}}
            cells += [_text(f"## {heading}"), _code([picture], alt=heading)]
        return {"cells": cells}

    picture_of = generate.notebooks.picture_of
    assert picture_of(page("Data", "Ledger", "q and the posterior")).content == b"q and the posterior"
    assert picture_of(page("Ledger", "Data")).content == b"Data"
    assert picture_of(page("Ledger")).alt == "Ledger"
    assert picture_of(page()) is None


# ---- guides and methods ----------------------------------------------------------------------------------------------


def test_every_family_source_guide_and_method_has_a_page_with_its_run(generate: ModuleType, pages: Path) -> None:
    kinds = {
        "guides/families": list(FAMILIES),
        "guides/sources": list(SOURCES),
        "guides/autoguides": list(AUTOGUIDES),
        "guides/whole": [guide.NAME for guide in WHOLE_GUIDES],
        "methods": [*SPECIAL, "svi"],
    }
    for folder, names in kinds.items():
        assert {path.stem for path in (pages / folder).iterdir()} == set(names)
        listed = (pages / f"{folder.partition('/')[0]}.md").read_text(encoding="utf-8")
        for name in names:
            kind = folder.rpartition("/")[2]
            assert f"an example of {kind}, {name}" in _said(pages / folder / f"{name}.ipynb")
            assert f"({folder}/{name}.ipynb)" in listed
    assert "(../../models/ppca.ipynb)" in _said(pages / "guides" / "families" / "full-rank-normal.ipynb")


def test_which_posteriors_a_family_contains(generate: ModuleType) -> None:
    """A posterior with correlations is in the full-rank family and in no diagonal one."""
    contains = generate.guides.contains_posterior
    ppca, mixture = get_entry("factor-analysis").example(seed=1), get_entry("gaussian-mixture").example()
    assert contains(FAMILIES["full-rank-normal"], ppca)
    assert not contains(FAMILIES["diagonal-normal"], ppca)
    assert contains(FAMILIES["categorical"], mixture)
    assert not contains(FAMILIES["full-rank-normal"], get_entry("vae").example())


def test_options_that_pages_name_exist(generate: ModuleType) -> None:
    from elbozoo.guides.base import GuideOptions

    named = {**generate.guides.FAMILY_OPTIONS, **generate.guides.SOURCE_OPTIONS}
    assert {option for options in named.values() for option in options} == set(GuideOptions.model_fields)


def test_an_example_runs(generate: ModuleType, tmp_path: Path) -> None:
    """The sentence below the run says the figure of the run: a family that contains the posterior leaves no gap."""
    generate.examples.write_example("methods", "closed-form", tmp_path / "page.ipynb")
    fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2)
    # Three decimals are shown, and the bound is exact to rounding.
    assert f"The ELBO is −{-fit.elbo():.3f}" in _said(tmp_path / "page.ipynb")
    assert f"The ELBO is −{-fit.elbo() + 0.01:.3f}" not in _said(tmp_path / "page.ipynb")


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_unchanged_pages_keep_their_date_and_run_once(generate: ModuleType, made: tuple[Path, Path]) -> None:
    """Sphinx reads again what is newer."""
    folder, cache = made
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    lines: list[str] = []
    generate.write_pages(folder, cache, task=stub, example=stub_example, processes=0, report=lines.append)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert lines == []


def test_a_run_that_breaks_down_ends_the_build_with_its_name(
    generate: ModuleType, made: tuple[Path, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "runs"
    shutil.copytree(made[1], cache)
    with pytest.raises(generate.runs.PageFailed, match=r"^models/ppca: ValueError: the bound exceeds the truth$"):
        generate.write_pages(
            tmp_path / "pages",
            cache,
            entries=["normal-mean", "ppca"],
            task=broken,
            example=stub_example,
            processes=1,
            report=str,
        )
    assert not (tmp_path / "pages").exists()


def test_what_a_run_depends_on(generate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An entry's file counts for its own page and for those of entries that are built on it, and for no other."""
    from sitegen import fingerprint

    home = tmp_path / "elbozoo"
    shutil.copytree(ROOT / "elbozoo", home, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "HOME", home)

    def digests() -> dict[str, str]:
        fingerprint._read.cache_clear()
        roots = ["vae", "beta_vae", "ppca"]
        return {name: fingerprint.digest(["elbozoo.api", f"elbozoo.models.{name}"], name) for name in roots}

    before = digests()
    with (home / "models" / "vae.py").open("a") as file:
        file.write("# changed\n")
    changed = {name for name, digest in digests().items() if digest != before[name]}
    assert changed == {"vae", "beta_vae"}
    with (home / "inference" / "svi.py").open("a") as file:
        file.write("# changed\n")
    assert all(digest != before[name] for name, digest in digests().items())
    assert fingerprint.digest(["elbozoo.api"], "one") != fingerprint.digest(["elbozoo.api"], "another")


def test_pages_with_the_same_code_share_a_run(generate: ModuleType, tmp_path: Path) -> None:
    """English and Chinese come from one run, which the cache of MyST-NB then has for both."""
    head = "---\nkernelspec:\n  name: python3\njupytext:\n  text_representation:\n    format_name: myst\n---\n\n"
    texts = {"english": "# One\n", "chinese": "# 一\n", "other": "# Two\n"}
    codes = {"english": "1 + 1", "chinese": "1 + 1", "other": "1 + 2"}
    for name, text in texts.items():
        (tmp_path / f"{name}.md").write_text(f"{head}{text}\n```{{code-cell}} ipython3\n{codes[name]}\n```\n", "utf-8")
    (tmp_path / "plain.md").write_text("# No code\n", "utf-8")
    learn, cache = generate.learn, generate.learn.open_cache(tmp_path / "cache")
    pages = [tmp_path / f"{name}.md" for name in ("english", "chinese", "other", "plain")]
    found = learn.runs_of(pages, cache)
    assert [run.name for run in found] == ["learn/english", "learn/other"]

    learn.run_page(str(pages[0]), tmp_path / "page.ipynb")
    learn.fill(cache, [tmp_path / "page.ipynb"])
    chinese = learn.notebook_of(pages[1])
    _, merged = cache.merge_match_into_notebook(chinese)
    assert merged.cells[-1].outputs[0]["data"]["text/plain"] == "2"
    with pytest.raises(KeyError):
        cache.match_cache_notebook(learn.notebook_of(pages[2]))


# ---- reference -------------------------------------------------------------------------------------------------------


def test_every_command_is_described(pages: Path) -> None:
    text = (pages / "commands.inc").read_text(encoding="utf-8")
    names = [command.name for command in app.registered_commands]
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == names
    assert "`--set NAME=VALUE`" in text


def test_the_schema_describes_what_is_printed(pages: Path) -> None:
    """The JSON Schema on the site takes real documents, with held-out rows and without, and refuses broken ones."""
    schema = json.loads((pages / "elbozoo-comparison.schema.json").read_text(encoding="utf-8"))
    assert schema == json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert list(Row.model_fields) == list(ROW)
    settings = {"methods": ["em", "mean-field"], "seeds": 1, "steps": 5, "iterations": 3, "progress": False}
    plain = ez.compare("ppca", "iris", **settings).document()
    heldout = ez.compare("ppca", "iris", test=0.2, **settings).document()
    for document in (plain, heldout):
        jsonschema.validate(json.loads(json.dumps(document)), schema)
        Document.model_validate(document)
    row = plain["rows"][0]
    wrong = [
        {**row, "log_evidence_kind": "guessed"},
        {**row, "elbo": "-400"},
        {**row, "nats": 1.0},
        {key: value for key, value in row.items() if key != "gap"},
    ]
    for each in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**plain, "rows": [each]}, schema)


def test_json_example_is_one_of_the_schema(pages: Path) -> None:
    text = (pages / "json.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```json\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    jsonschema.validate(json.loads(example), json_schema())
    assert all(f"| `{name}` |" in text for name in ROW)


def test_the_api_page_has_all_public_names() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)$", text, flags=re.MULTILINE))
    assert documented == set(ez.__all__)


# ---- benchmarks and development --------------------------------------------------------------------------------------


def test_every_benchmark_has_a_picture_that_says_its_ratios(generate: ModuleType, pages: Path) -> None:
    text = (pages / "benchmarks.inc").read_text(encoding="utf-8")
    for script in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        name = script.stem.removeprefix("bench_").replace("_", "-")
        assert f"## `{name}`" in text
        results = ROOT / "benchmarks" / "results" / f"{name}.json"
        if results.exists():
            for _, records in generate.benchmarks.by_machine(results):
                assert all(f"{record['peer']}: {record['ratio']:.3g}" in text for record in records)
            assert (pages / "benchmarks" / f"{name}-1.png").exists()


def test_a_benchmark_is_drawn_as_it_was_measured(generate: ModuleType) -> None:
    record = {"peer": "another", "ratio": 4.0, "ratio_range": [3.0, 6.0], "target": 5.0}
    (axes,) = generate.benchmarks.picture([record]).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    ratio = {"range over the turns": [3.0, 6.0], "ratio of medians": [4.0]}
    assert drawn == {**ratio, "target": [5.0, 5.0], "ours = 1": [1, 1]}
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < 1 and high > 6


def test_clauses_of_the_contract_are_those_of_the_tests(generate: ModuleType) -> None:
    source = '''
def test_a_bound_is_a_bound(name: str) -> None:
    """To rounding."""


def test_of_one_entry() -> None:
    """Not of all."""


def helper(name: str) -> None: ...
'''
    assert list(generate.develop.clauses(source)) == [("A bound is a bound", "To rounding.")]
    text = generate.develop.contract(ROOT)
    assert "| Em never decreases at any step |" in text
