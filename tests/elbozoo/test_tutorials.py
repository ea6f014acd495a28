"""Tutorials: what a page teaches, and that every figure of its sentences is that of its run."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from elbozoo import tutorials
from elbozoo.inference.method import default_guide
from elbozoo.models import entry_names, get_entry
from elbozoo.models.contract.errors import InvalidInput, NumericalFailure
from elbozoo.notation import notation_table
from elbozoo.notebook.cells import Code, Executed, Text, execute
from elbozoo.pages import options_table, page_parts
from elbozoo.tutorials import tutorial_cells, write_tutorial
from elbozoo.tutorials.subject import Effort, Subject

# A page in seconds: what it says is another matter, that it says what was computed is tested.
SHORT = Effort(
    rows=30, seeds=1, steps=40, sequence_rows=30, sequence_steps=40, draws=60, em_iterations=5, em_restarts=1
)
NUMBER = r"(−?[\d,]+(?:\.\d+)?)"


class Page(NamedTuple):
    """A page that has been run: its cells as they were made, as they stand, and the names its code defined."""

    cells: list[Text | Code]
    executed: list[Executed]
    run: dict[str, Any]

    @property
    def text(self) -> str:
        """All Markdown of the page."""
        return "\n\n".join(cell.source for cell in self.executed if cell.outputs is None)

    @property
    def said(self) -> str:
        """What the page says of its run: sentences, captions and alternative texts that depend on it."""
        found = []
        for cell, done in zip(self.cells, self.executed, strict=True):
            if isinstance(cell, Text):
                found += [done.source] * callable(cell.source)
            else:
                found += [done.alt] * callable(cell.alt) + [done.caption] * callable(cell.caption)
        return "\n\n".join(found)


def make(folder: Path, model: str, guide: str | None = None, **given: Any) -> Page:
    subject = Subject.of(model, folder / "page.md", guide=guide, effort=SHORT, **given)
    cells, run = tutorial_cells(subject), {}

    def keep(namespace: Any) -> str:
        run.update(namespace)
        return ""

    # What goes wrong comes last of all code, and may use the same names for other things.
    end = cells.index(Text("## What goes wrong"))
    executed = execute([*cells[:end], Text(keep), *cells[end:]], folder)
    del executed[end]
    return Page(cells, executed, run)


# ---- figures ---------------------------------------------------------------------------------------------------------


def claims(run: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """Yield what sentences may say, with the figures that the run has there."""
    fit, ledger, data = run["fit"], run["ledger"], run["data"]
    yield f"The {NUMBER} rows of {NUMBER} column", [data.rows, data.width]
    yield from ledger_claims(ledger, ledger["log_evidence"] - ledger["elbo"])
    yield from climb_claims(fit, ledger)
    yield from method_claims(run["comparison"])
    yield from posterior_claims(run)


def ledger_claims(ledger: pd.Series, gap: float) -> Iterator[tuple[str, list[float]]]:
    yield rf"lies \*\*{NUMBER} nats\*\* below the truth, {NUMBER} per (?:datum|step)", [gap, gap / ledger["rows"]]
    yield f"Of this, {NUMBER} nats is what the best", [ledger["approximation_gap"]]
    yield f"as well, and {NUMBER} nats is", [gap - ledger["approximation_gap"]]
    yield f"standard error of {NUMBER} nats", [ledger["elbo_se"]]
    yield rf"KL\(q ‖ posterior\), found without log p\(x\), is {NUMBER} nats", [ledger["kl"]]
    yield f"above 0.7 for {NUMBER} %", [100 * ledger["khat_share"]]
    yield f"The learned θ lies {NUMBER} nats", [ledger["learning_gap"]]
    for name in ("amortization", "approximation", "learning"):
        yield f"{name} gap {NUMBER} nats", [ledger[f"{name}_gap"]]
    yield f"Stacked bar of [^:]*: ELBO {NUMBER} nats, gap {NUMBER} nats", [ledger["elbo"], gap]
    yield f"(?:ELBO is|ending at|: ELBO) {NUMBER} nats", [ledger["elbo"]]
    truth = rf"log p\(x\)(?:, which)? is {NUMBER} nats|log p\(x\) at the end, {NUMBER} nats"
    yield truth, [ledger["log_evidence"], ledger["log_evidence"]]


def climb_claims(fit: Any, ledger: pd.Series) -> Iterator[tuple[str, list[float]]]:
    known = fit.trajectory[fit.trajectory["elbo"].notna() & fit.trajectory["log_evidence"].notna()]
    if len(known):
        first = known.iloc[0]
        climbed = [first["elbo"], ledger["elbo"] - first["elbo"]]
        yield f"saw an ELBO of {NUMBER} nats; at the end it was {NUMBER} higher", climbed
        gain = ledger["log_evidence"] - first["log_evidence"]
        yield rf"log p\(x\) {'fell' if gain < 0 else 'rose'} by {NUMBER}", [abs(gain)]


def method_claims(comparison: Any) -> Iterator[tuple[str, list[float]]]:
    for name, rows in comparison.table.groupby("method"):
        mean = {figure: rows[figure].mean() for figure in ("elbo", "log_evidence", "learning_gap")}
        gap, approximation = (rows["log_evidence"] - rows["elbo"]).mean(), rows["approximation_gap"].mean()
        line, rest = rf"- `{name}`: ", r"(?=[,.])"
        reaches = rf"log p\(x\) reaches {NUMBER} nats"
        below = rf"(?:, {NUMBER} nats below the best known)?"
        lies = rf"the bound lies {NUMBER} nats below log p\(x\)"
        parts = rf"(?:, of which {NUMBER} nats is approximation and {NUMBER} nats amortization)?"
        split = [approximation, gap - approximation]
        yield f"{line}(?:{reaches}{below}, )?{lies}{parts}", [mean["log_evidence"], mean["learning_gap"], gap, *split]
        yield f"{line}{reaches}{below}{rest}", [mean["log_evidence"], mean["learning_gap"]]
        yield f"{line}the ELBO ends at {NUMBER} nats", [mean["elbo"]]
        yield f"(?:ledgers: |; ){name}, gap {NUMBER} nats", [gap]
        steps = {fit.method: len(fit.trajectory) for fit in comparison.fits}
        yield f"`{name}` {NUMBER}{rest}", [steps[name]]


APART = (
    f"the mean of q is {NUMBER} posterior standard deviations away from the posterior's, and the standard deviation of "
    f"q is {NUMBER} times the posterior's"
)


def posterior_claims(run: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """Yield the distances of q and the posterior, computed with NumPy from what the cells have left."""
    if "grid" in run:
        grid, q = run["grid"], np.asarray(run["q"])
        yield APART, apart(grid.mean.numpy(), grid.sd.numpy(), q)
        yield f"over the first {NUMBER} rows", [len(grid.mean)]
        yield f"measured on {NUMBER} draws", [len(q)]
    elif "sites" in run:
        for name, draws in run["sites"].items():
            exact, q = (np.asarray(each) for each in draws)
            if run["values"][name] is None:
                yield f"- `{name}`: {APART}", apart(exact.mean(0), exact.std(0, ddof=1), q)
            else:
                shares = [[(each == v).mean(0) for v in range(run["values"][name])] for each in (exact, q)]
                yield (
                    f"- `{name}`: the probabilities of q differ from the posterior's by {NUMBER}",
                    [float(np.abs(np.subtract(*shares)).mean())],
                )
    elif "means" in run:
        mean, deviation = np.asarray(run["means"][0]), np.asarray(run["deviations"][0])
        yield APART, apart(mean, deviation, np.asarray(run["draws"]))
        yield f"measured on {NUMBER} draws", [len(run["draws"])]
    elif "reference" in run:
        for name in run["exact"].data_vars:
            exact, q = (np.concatenate(run[which][name].values) for which in ("exact", "q"))
            yield f"- `{name}`: {APART}", apart(exact.mean(0), exact.std(0, ddof=1), q)
    elif "exact" in run:
        difference = np.abs(np.asarray(run["q"]) - np.asarray(run["exact"]))
        yield f"posterior's by {NUMBER} on average, and by {NUMBER} at most", [difference.mean(), difference.max()]


def apart(mean: Any, deviation: Any, draws: Any) -> list[float]:
    real = deviation > 0
    distance = np.abs(draws.mean(0) - mean)[real] / deviation[real]
    return [float(distance.mean()), float((draws.std(0, ddof=1)[real] / deviation[real]).mean())]


def check(said: str, run: dict[str, Any]) -> int:
    """Hold every number of ``said`` against the run; return how many there are."""
    count = 0
    for pattern, values in claims(run):
        for found in re.finditer(pattern, said):
            for text, value in zip(found.groups(), values, strict=True):
                if text is not None:
                    digits = len(text.partition(".")[2])
                    # Half a unit in the last digit is rounding; a part in 1e6 of it is left to floating point.
                    within = 0.5 * 10.0**-digits * (1 + 1e-6) + 1e-9 * abs(value)
                    assert abs(float(text.replace("−", "-")) - value) <= within, (found.group(), value)
                    count += 1
        said = re.sub(pattern, " ", said)
    rest = re.sub(r"`[^`]*`|first column|k-hat is above 0\.7|log p\(x\)", "", said)
    assert not re.search(r"\d", rest), f"figures that nothing accounts for: {rest}"
    return count


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
def test_every_figure_of_a_page_is_that_of_its_run(tmp_path: Path, model: str, guide: str) -> None:
    page = make(tmp_path, model, guide)
    assert f"the guide `{guide}`" in page.text
    prose = re.sub(r"^(`{3,}).*?^\1$", "", page.text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", page.said + prose.partition("## What goes wrong")[0])
    assert check(page.said, page.run) >= 4

    for figure in ("elbo", "log_evidence"):
        if math.isnan(page.run["ledger"][figure]):
            continue
        other = page.run["ledger"].copy()
        other[figure] += 0.5 + abs(other[figure])
        with pytest.raises(AssertionError):
            check(page.said, page.run | {"ledger": other})
    with pytest.raises(AssertionError, match="nothing accounts for"):
        check(f"{page.said} It is 17 nats.", page.run)


@pytest.mark.parametrize("model", entry_names())
def test_blocks_of_what_goes_wrong_are_cells(tmp_path: Path, model: str) -> None:
    failures = page_parts(get_entry(model).page()).failures
    cells = tutorial_cells(Subject.of(model, tmp_path / "page.md", effort=SHORT))
    sources = [cell.source.strip() for cell in cells if isinstance(cell, Code)]
    blocks = re.findall(r"^```python\n(.*?)\n```$", failures, flags=re.MULTILINE | re.DOTALL)
    assert [block for block in blocks if block.strip() not in sources] == []
    texts = "\n".join(cell.source for cell in cells if isinstance(cell, Text) and isinstance(cell.source, str))
    assert "```python\nez." not in texts
    prose = re.sub(r"^```python\n.*?^```$", "", failures, flags=re.MULTILINE | re.DOTALL)
    assert [part for part in prose.split("\n\n") if part.strip() not in texts] == []


# ---- the page --------------------------------------------------------------------------------------------------------


def test_page_teaches_the_pair(tmp_path: Path) -> None:
    subject = Subject.of("ppca", tmp_path / "page.md", effort=SHORT)
    cells = tutorial_cells(subject)
    text = "\n\n".join(cell.source for cell in cells if isinstance(cell, Text) and isinstance(cell.source, str))
    entry = get_entry("ppca")
    program = 'z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))'
    parts = page_parts(entry.page())
    table = notation_table(subject.entry)
    for part in (parts.title, parts.story, parts.references, program, table, options_table(entry.Options), "`free`"):
        assert part
        assert part in text
    assert "Tipping, M. E. and Bishop, C. M. (1999)" in text
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == [
        "The model as a picture",
        "Notation",
        "The program",
        "The guide",
        "Data",
        "Fit",
        "q against the exact posterior",
        "The ELBO climbs",
        "The ledger as a bar",
        "Methods side by side",
        "What goes wrong",
        "Exercises",
        "References",
    ]


def test_code_alone_gives_the_figures_again(tmp_path: Path) -> None:
    """The code of a page, run afresh in one namespace, gives the sentences again; another seed does not."""
    page = make(tmp_path, "gaussian-mixture")
    sources = [cell.source for cell in page.executed if cell.outputs is not None]
    until = next(i for i, source in enumerate(sources) if "ez.compare" in source)
    said = next(cell.source for cell in page.executed if cell.source.startswith("The ELBO is"))
    again: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for source in sources[:until]:
        exec(source, again)
        exec(source.replace("seed=0, **settings", "seed=1, **settings"), other)
    assert said.startswith(f"The ELBO is {number_of(again['ledger'], 'elbo')}")
    assert not said.startswith(f"The ELBO is {number_of(other['ledger'], 'elbo')}")


def number_of(ledger: pd.Series, name: str) -> str:
    return f"{ledger[name]:.2f}"[:-1].replace("-", "−")  # one digit fewer than any page shows, cut and not rounded


def test_posterior_without_formula_is_compared_by_quadrature_or_nuts(tmp_path: Path) -> None:
    kinds = {
        "vae": "posterior_on_grid",
        "logistic-regression": 'method="nuts"',
        "mixture-of-factor-analyzers": ".sample((60,))",
        "linear-regression": 'guide="exact"',
    }
    for model, expected in kinds.items():
        cells = tutorial_cells(Subject.of(model, tmp_path / "page.md", effort=SHORT))
        assert any(isinstance(cell, Code) and expected in cell.source for cell in cells), model
    cells = tutorial_cells(Subject.of("autoencoder", tmp_path / "page.md", effort=SHORT))
    texts = [cell.source for cell in cells if isinstance(cell, Text) and isinstance(cell.source, str)]
    assert any("Under a flat prior p(x) does not exist" in text for text in texts)


def test_every_picture_says_what_it_shows(tmp_path: Path) -> None:
    page = make(tmp_path, "ppca")
    drawn = [cell for cell in page.executed if cell.outputs and any(output.picture for output in cell.outputs)]
    assert len(drawn) >= 7
    failures = {part.strip() for part in re.findall(r"```python\n(.*?)```", get_entry("ppca").page(), flags=re.DOTALL)}
    for cell in drawn:
        assert len(cell.alt) > 15 and "\n" not in cell.alt
        assert cell.caption or cell.source in failures


@pytest.mark.slow
def test_page_takes_under_a_minute_of_one_core(tmp_path: Path) -> None:
    """As long as any page; of the others those of the documentation are timed where they are made."""
    before = time.process_time()
    write_tutorial("bayesian-gaussian-mixture", tmp_path / "page.ipynb")
    assert time.process_time() - before < 60


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "path", "given", "message"),
    [
        ("pcca", "page.md", {}, "unknown model 'pcca'; did you mean 'ppca'"),
        ("ppca", "page.md", {"guide": "meanfield"}, "unknown guide 'meanfield'; did you mean 'mean-field'"),
        ("ppca", "page.md", {"guide": "em"}, "unknown guide 'em'"),
        ("ppca", "page.md", {"guide": "free-categorical"}, "does not fit ppca"),
        ("normal-mean", "page.md", {"guide": "amortized"}, "does not fit normal-mean"),
        ("ppca", "page.md", {"latent_dims": 2}, "unknown option 'latent_dims'; did you mean 'latent_dim'"),
        ("ppca", "page.md", {"latent_dim": 0}, "option latent_dim: found 0"),
        ("ppca", "page.md", {"data": "iri"}, "unknown data set 'iri'; did you mean 'iris'"),
        ("ppca", "page.txt", {}, "found the suffix '.txt', expected .md, .ipynb or .html"),
        ("ppca", "page", {}, "found the suffix '', expected .md, .ipynb or .html"),
        ("ppca", "folder.md", {}, "found a directory, expected the path of a file"),
        ("ppca", "file/page.md", {}, "choose one that can be written to"),
        ("ppca", "taken.md", {}, "choose one that can be written to"),
    ],
)
def test_bad_input_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, path: str, given: dict[str, Any], message: str
) -> None:
    def run(cells: object, *_: object) -> None:
        raise AssertionError("the run began")

    monkeypatch.setattr(tutorials, "execute", run)
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "taken_files").write_text("not a folder")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput) as caught:
        write_tutorial(model, tmp_path / path, **given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before

    with pytest.raises(AssertionError, match="the run began"):
        write_tutorial("ppca", tmp_path / "good.md")


def test_failure_leaves_the_old_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(cells: object, *_: object) -> None:
        raise NumericalFailure("step 3: the objective is nan")

    page = tmp_path / "page.md"
    page.write_text("an older page")
    monkeypatch.setattr(tutorials, "execute", fail)
    with pytest.raises(NumericalFailure):
        write_tutorial("ppca", page, data=torch.randn(20, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert page.read_text() == "an older page"


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


def test_options_become_a_table() -> None:
    assert r"full \| tied \| diagonal \| spherical" in options_table(get_entry("gaussian-mixture").Options)
