"""The report says what the table says, needs nothing but itself, and lets nobody's name become markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from elbozoo import plots, report
from elbozoo.data import load_data
from elbozoo.inference.comparison import Comparison, run_comparison
from elbozoo.inference.tasks import Failure
from elbozoo.models.contract.entry import Program
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Options
from elbozoo.report import markup
from elbozoo.report import page as page_module

IRIS = load_data("iris")
METHODS = ["closed-form", "amortized", "mean-field", "free-delta"]
HOSTILE = """<script>alert("1")</script> & 'x' $\\frac$ <img src=https://evil.example/a.png>"""
VOID = {"meta", "link", "img", "br", "hr", "input"}
OWN_SCRIPTS = {page_module._plotly(), page_module._asset("report.js")}
LOADS = {"src", "href", "srcset", "action", "formaction", "poster", "data", "background", "cite", "ping", "style"}


class Page(HTMLParser):
    """Collects tags, attributes and text of a page, and refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.styles = ""
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        # Data that a script reads is none.
        self.in_script = tag == "script" and ("type", "application/json") not in attrs
        if self.in_script:
            self.scripts.append("")
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.styles += data
        elif self.open[-1:] == ["script"]:
            if self.in_script:
                self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def values(self, tag: str, attribute: str) -> list[str]:
        return [value for t, name, value in self.attributes if (t, name) == (tag, attribute)]


def network_references(html: str) -> list[str]:
    """Return everything in the page that a browser would fetch from elsewhere."""
    page = Page(html)
    found = [f"{name}={value[:60]}" for _, name, value in page.attributes if name in LOADS and "//" in value[:200]]
    found += re.findall(r"url\([^)]*\)|@import[^;]*", page.styles)
    found += [tag for tag in ("iframe", "object", "embed", "base") if page.tags[tag]]
    return found + [script[:60] for script in page.scripts if script not in OWN_SCRIPTS]


@pytest.fixture(scope="module")
def ppca() -> Comparison:
    options = {"steps": 60, "latent_dim": 2}
    return run_comparison("ppca", IRIS.x, METHODS, 2, options, name="iris", progress=False)


def test_fits_that_broke_down_are_named(ppca: Comparison) -> None:
    """With method, seed and cause, which is no markup; a comparison without them has no such line."""
    failed = replace(ppca, failures=[Failure("mean-field", 7, HOSTILE)])
    assert f"mean-field, seed 7 broke down: {HOSTILE}" in Page(report.html(failed)).text
    assert "broke down" not in Page(report.html(ppca)).text


@pytest.fixture(scope="module")
def html(ppca: Comparison) -> str:
    return report.html(ppca)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "png", lambda figure: b"")


def changed(comparison: Comparison, method: str, **figures: Any) -> Comparison:
    table = comparison.table.copy()
    for name, value in figures.items():
        table.loc[table["method"] == method, name] = value
    return replace(comparison, table=table)


def only(comparison: Comparison, *methods: str) -> Comparison:
    table = comparison.table[comparison.table["method"].isin(methods)].reset_index(drop=True)
    return replace(comparison, table=table, fits=[fit for fit in comparison.fits if fit.method in methods])


def words(comparison: Comparison) -> str:
    return " ".join(report.headline(comparison))


# ---- the file --------------------------------------------------------------------------------------------------------


def test_page_parses_and_loads_nothing(html: str) -> None:
    page = Page(html)
    assert page.tags["html"] == page.tags["main"] == page.tags["h1"] == 1
    assert network_references(html) == []


@pytest.mark.parametrize(
    "markup",
    [
        '<img src="https://example.org/a.png" alt="">',
        '<a href="//example.org">x</a>',
        "<script>fetch('a')</script>",
        '<script src="a.js"></script>',
        "<style>@import 'a.css';</style>",
        "<style>p { background: url(a.png) }</style>",
    ],
)
def test_references_to_the_network_are_found(html: str, markup: str) -> None:
    """The negative control."""
    assert len(network_references(html.replace("</main>", f"{markup}</main>"))) == 1


def test_unclosed_tags_are_found(html: str) -> None:
    with pytest.raises(AssertionError):
        Page(html.replace("</section>", "", 1))


def test_page_suits_dark_screens_phones_and_readers(html: str) -> None:
    page = Page(html)
    assert "prefers-color-scheme: dark" in page.styles
    assert any("width=device-width" in value for value in page.values("meta", "content"))
    assert page.values("html", "lang") == ["en"]
    # Whatever may be wider than a phone stands in a box of its own that scrolls.
    assert html.count('<div class="scroll"') == page.tags["table"] + page.tags["img"]
    assert page.tags["img"] == 1


def test_every_chart_has_a_label_a_caption_and_something_instead(html: str) -> None:
    """Where scripts do not run there is the picture of the ledger, and words in the place of other charts."""
    page = Page(html)
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("div", "aria-label")]
    charts = page.values("div", "data-chart")
    assert len(charts) == 8 and sum(label not in ("Table", "Table, scrolls sideways") for label in labels) == 9
    assert page.values("figure", "id") == ["curves", "ledger", "latent", "posterior"]
    assert page.tags["figcaption"] == page.tags["noscript"] == 4
    assert html.count(page_module.WITHOUT_SCRIPTS) == 1 and html.count(page_module.NO_CHART) == 2
    (alt,), (source,) = page.values("img", "alt"), page.values("img", "src")
    assert len(alt) > 60
    head, _, content = source.partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")


def test_policy_lets_these_scripts_run_and_no_other(html: str) -> None:
    (policy,) = [value for value in Page(html).values("meta", "content") if "default-src" in value]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-inline'; img-src data:" in policy
    assert "unsafe" not in policy.partition("style-src")[0]
    hashes = set(re.findall(r"'sha256-([^']+)'", policy))
    assert hashes == {sha256(script) for script in Page(html).scripts}
    assert sha256("fetch('a')") not in hashes


def sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def test_data_of_charts_cannot_end_their_element() -> None:
    value = {"</script><script>alert(1)</script>": ["<!--", "&lt;", "\u2028"]}
    found = markup.data("charts", value)
    assert found.count("<") == 2 and Page(found).scripts == []
    assert json.loads(found.partition(">")[2].removesuffix("</script>")) == value


def test_tables_sort_by_figures(ppca: Comparison, html: str) -> None:
    """What a cell is sorted by is the figure itself, and nothing where there is none."""
    summary = html[html.index('id="summary"') : html.index("</table>")]
    assert 'class="sortable"' in summary
    orders = re.findall(r'data-sort="([^"]*)"', summary)
    by_row = [orders[i : i + 11] for i in range(0, len(orders), 11)]
    for order in by_row:
        mean = ppca.table[ppca.table["method"] == order[0]].mean(numeric_only=True)
        assert float(order[1]) == pytest.approx(mean["log_evidence"], rel=1e-12)
        assert order[2] == ("" if order[0] == "free-delta" else str(mean["elbo"]))
    assert [order[0] for order in by_row] == list(ppca.summary.index)
    assert 'id="fits" class="sortable"' in html


def test_page_holds_methods_numbers_and_settings(ppca: Comparison, html: str) -> None:
    text = Page(html).text
    for method in METHODS:
        assert method in text
    for name in ("elbo", "log_evidence", "approximation_gap", "amortization_gap"):
        for value in ppca.table[name].dropna():
            if abs(value) >= 1e-4:
                assert plots.number(value, 4) in text  # the full table
        for total in ppca.summary[name, "mean"].dropna():
            assert plots.number(total, 2) in text  # the summary
            assert plots.number(total / 150, 4) in text
    assert "steps = 60, latent_dim = 2" in text
    assert ppca.fits[0].provenance["torch"] in text
    assert "Probabilistic principal component analysis" in text
    for term in ("exact", "quadrature", "estimate", "objective", "ELBO"):
        assert f"<dt>{term}</dt>" in html


def test_a_number_of_another_table_is_missed(ppca: Comparison, html: str) -> None:
    """The negative control of the numbers."""
    other = ppca.table["elbo"].dropna() + 0.01
    assert not any(plots.number(value, 4) in Page(html).text for value in other)


def test_hostile_names_stay_text(ppca: Comparison, no_pictures: None) -> None:
    fits = [replace(fit, notes=[HOSTILE], provenance={HOSTILE: HOSTILE}) for fit in ppca.fits]
    table = ppca.table.assign(guide=HOSTILE)
    hostile = replace(ppca, data={**ppca.data, "name": HOSTILE}, options={"steps": HOSTILE}, fits=fits, table=table)
    page = Page(report.html(hostile))
    assert set(page.scripts) == OWN_SCRIPTS
    assert page.tags["img"] == 1
    assert page.text.count(HOSTILE) > 10
    assert network_references(report.html(hostile)) == []


def test_unescaped_names_would_be_found(ppca: Comparison, no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without escaping, the name is markup."""
    monkeypatch.setattr(page_module, "escape", lambda text, quote=True: text)
    hostile = replace(ppca, data={**ppca.data, "name": HOSTILE})
    assert 'alert("1")' in network_references(report.html(hostile))


def test_another_ending_is_refused(ppca: Comparison, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"found 'report.pdf', expected a name that ends in .html or .md"):
        report.write(ppca, tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == []


def test_the_same_comparison_gives_the_same_page(ppca: Comparison, html: str) -> None:
    assert report.html(ppca) == html


def test_a_loaded_comparison_has_a_report_too(ppca: Comparison, html: str, tmp_path: Path) -> None:
    ppca.save(tmp_path / "run")
    loaded = Comparison.load(tmp_path / "run")
    page = Page(report.html(loaded))
    # Without its rows there is no latent space and no posterior.
    assert page.values("figure", "id") == ["curves", "ledger"]
    assert report.headline(loaded) == report.headline(ppca)
    assert report.reproduction(loaded) == report.reproduction(ppca)
    assert report.notes(loaded) == report.notes(ppca)


def test_file_is_written_whole(ppca: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "html", lambda comparison: "page Ä\n")
    path = report.write(ppca, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == "page Ä\n"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]

    monkeypatch.setattr(report, "html", lambda comparison: "a half page \ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        report.write(ppca, path)
    assert path.read_text(encoding="utf-8") == "page Ä\n"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_paths_that_cannot_be_written_are_refused(ppca: Comparison, tmp_path: Path, no_pictures: None) -> None:
    (tmp_path / "file").write_text("")
    for path, match in ((tmp_path, "directory"), (tmp_path / "file" / "report.html", "output directory")):
        with pytest.raises(InvalidInput, match=match) as error:
            report.write(ppca, path)
        assert len(str(error.value).splitlines()) == 1
    assert report.write(ppca, tmp_path / "report.html").exists()


# ---- the words -------------------------------------------------------------------------------------------------------


def test_headline_names_the_best_evidence(ppca: Comparison) -> None:
    found = words(ppca)
    means = ppca.table.groupby("method")["log_evidence"].mean()
    assert means.idxmax() == "closed-form"
    ahead = means["closed-form"] - means["amortized"]
    assert f"closed-form has the best evidence, log p(x) = {plots.number(means.max(), 2)} nats" in found
    assert f"{plots.number(ahead, 2)} nats ({plots.number(ahead / 150, 4)} per datum) more than amortized" in found
    # The negative control: with other numbers, another method.
    better = changed(ppca, "mean-field", log_evidence=means.max() + 1)
    assert "mean-field has the best evidence" in words(better)


def test_headline_explains_the_largest_gap(ppca: Comparison) -> None:
    of_method = ppca.table[ppca.table["method"] == "mean-field"].mean(numeric_only=True)
    assert ppca.table.groupby("method")["gap"].mean().idxmax() == "mean-field"
    share = 100 * of_method["amortization_gap"] / of_method["gap"]
    found = words(ppca)
    gap = plots.number(of_method["gap"], 2)
    assert f"The largest gap is that of mean-field: its ELBO lies {gap} nats" in found
    assert f"{share:.0f} % is amortization gap (its family holds a closer q" in found
    assert "no q of the family diagonal-normal comes closer" in found


@pytest.mark.parametrize(
    ("approximation", "amortization", "said", "not_said"),
    [
        (0.0, 40.0, "Nearly all of it is amortization gap: its encoder", "comes closer"),
        (40.0, 0.0, "Nearly all of it is approximation gap: no q of the family", "encoder"),
        (math.nan, math.nan, "could not be split", "encoder"),
    ],
)
def test_reason_of_a_gap_follows_its_parts(
    ppca: Comparison, approximation: float, amortization: float, said: str, not_said: str
) -> None:
    two = only(ppca, "closed-form", "amortized")
    case = changed(two, "amortized", gap=40.0, approximation_gap=approximation, amortization_gap=amortization)
    assert said in words(case)
    assert not_said not in words(case)


def test_gaps_of_a_global_latent_are_not_blamed_on_the_family() -> None:
    options = {"steps": 30}
    one = run_comparison("normal-mean", IRIS.x, ["laplace"], 1, options, name="iris", progress=False)
    far = changed(one, "laplace", gap=50.0, approximation_gap=50.0)
    assert "One q stands for the whole data set" in words(far)
    assert "no q of the family" not in words(far)


def test_bounds_that_touch_are_said_to(ppca: Comparison) -> None:
    assert "Every ELBO here touches log p(x)" in words(only(ppca, "closed-form"))
    assert "touches" not in words(ppca)


def test_level_methods_are_not_ranked(ppca: Comparison) -> None:
    best = ppca.table["log_evidence"].max()
    level = changed(ppca, "amortized", log_evidence=best - 0.1)
    assert "closed-form and amortized have the best evidence, level within 0.001 nats per datum" in words(level)
    assert "closed-form has the best evidence" in words(changed(ppca, "amortized", log_evidence=best - 0.2))
    two = only(level, "closed-form", "amortized")
    assert "Both methods are level" in words(two)
    assert "closed-form reaches log p(x)" in words(only(ppca, "closed-form"))


def test_what_is_no_bound_is_named(ppca: Comparison) -> None:
    assert "free-delta has a q without a density" in words(ppca)
    assert "density" not in words(only(ppca, "closed-form", "amortized"))


def test_estimates_are_called_estimates(ppca: Comparison) -> None:
    assert "exact" in words(ppca) and "estimate" not in words(ppca)
    estimated = replace(ppca, table=ppca.table.assign(log_evidence_kind="estimate"))
    assert "an estimate" in words(estimated) and "no proof" in words(estimated)
    assert "exact" not in report.headline(estimated)[0]


def test_a_choice_by_elbo_that_would_differ_is_told(ppca: Comparison) -> None:
    assert "The ELBO alone" not in words(ppca)
    other = changed(ppca, "closed-form", elbo=-5000.0)
    assert "The ELBO alone would have chosen amortized" in words(other)


def test_a_better_known_maximum_is_told(ppca: Comparison) -> None:
    assert "better still" not in words(ppca)
    nearest = only(ppca, "amortized", "mean-field")
    gap = plots.number(nearest.table["learning_gap"].min(), 2)
    assert f"nearest fit ends {gap} nats" in words(nearest)


def test_fits_that_did_not_converge_are_counted(ppca: Comparison) -> None:
    assert "amortized 0 of 2" in words(ppca) and "closed-form 2 of 2" not in words(ppca)
    assert "convergence" not in words(replace(ppca, table=ppca.table.assign(converged=True)))


def test_a_table_without_evidence_has_words(ppca: Comparison) -> None:
    names = ("elbo", "log_evidence", "gap", "approximation_gap", "amortization_gap", "learning_gap")
    empty = replace(ppca, table=ppca.table.assign(**dict.fromkeys(names, math.nan), log_evidence_kind=None))
    assert report.headline(empty)[0] == "No method gave a figure of log p(x) on these data."


def test_notes_warn_of_single_fits(ppca: Comparison) -> None:
    calm = only(ppca, "closed-form")
    assert report.notes(calm) == ["None."]
    fits = [replace(calm.fits[0], notes=["component 2 collapsed"], interrupted=True), calm.fits[1]]
    table = calm.table.assign(best_member_converged=[True, False], khat_max=[0.71, 0.69], khat_share=[0.25, 0.0])
    found = report.notes(replace(calm, fits=fits, table=table))
    assert [note.partition(":")[0] for note in found] == ["closed-form, seed 0"] * 3 + ["closed-form, seed 1"]
    assert "component 2 collapsed" in found[0]
    assert "interrupted" in found[1]
    assert "0.71" in found[2] and "25 %" in found[2]
    assert "did not converge" in found[3]


# ---- to reproduce ----------------------------------------------------------------------------------------------------


def test_command_of_a_named_data_set(ppca: Comparison, html: str) -> None:
    _, command = report.reproduction(ppca)
    assert command == (
        "elbozoo compare ppca --data iris --methods closed-form,amortized,mean-field,free-delta --seeds 2 "
        "--set steps=60 --set latent_dim=2"
    )
    assert command in Page(html).text


def test_command_of_a_file_is_quoted(ppca: Comparison) -> None:
    name = "my data; rm -rf $HOME.csv"
    explained, command = report.reproduction(replace(ppca, data={**ppca.data, "name": name}))
    arguments = shlex.split(command)
    assert arguments[arguments.index("--data") + 1] == name
    assert "path" in " ".join(explained)


def test_command_of_simulated_data_and_picked_columns(ppca: Comparison) -> None:
    simulated = {"name": "simulate:ppca", "rows": 500, "columns": 5}
    explained, command = report.reproduction(replace(ppca, data=simulated))
    assert "--data simulate:ppca" in command and "seed 0" in " ".join(explained)
    _, code = report.reproduction(replace(ppca, data={**simulated, "rows": 70}))
    assert "ez.compare('ppca', ez.load_data('simulate:ppca', rows=70), " in code
    compile(code, "code", "exec")
    explained, _ = report.reproduction(replace(ppca, data={"name": "iris", "rows": 150, "columns": 2}))
    assert "--columns" in " ".join(explained)


def test_options_are_written_as_the_command_line_reads_them(ppca: Comparison) -> None:
    class Some(Options):
        rank: int | None = 3
        tied: bool = False
        learning_rate: float = 0.1

    given = {"rank": None, "tied": True, "learning_rate": 1e-3}
    _, command = report.reproduction(replace(ppca, options=given))
    arguments = shlex.split(command)
    pairs = dict(arguments[i + 1].split("=") for i, word in enumerate(arguments) if word == "--set")
    read = {name: None if value == "none" else value for name, value in pairs.items()}
    assert Some.parse(read).model_dump() == given


@pytest.mark.parametrize("name", ["tensor", "array", "DataFrame"])
def test_data_from_memory_has_no_command(ppca: Comparison, name: str) -> None:
    explained, code = report.reproduction(replace(ppca, data={**ppca.data, "name": name}))
    assert "elbozoo compare" not in code
    assert "memory" in " ".join(explained)
    assert "ez.compare('ppca', x, " in code
    compile(code, "code", "exec")


def test_seeds_that_are_not_counted_from_zero_need_python(ppca: Comparison) -> None:
    table = ppca.table.assign(seed=ppca.table["seed"].map({0: 3, 1: 11}))
    fits = [replace(fit, seed={0: 3, 1: 11}[fit.seed]) for fit in ppca.fits]
    _, code = report.reproduction(replace(ppca, table=table, fits=fits))
    assert "seeds=[3, 11]" in code and "ez.compare('ppca', 'iris', " in code
    compile(code, "code", "exec")


def test_a_program_of_the_users_has_a_report(ppca: Comparison, no_pictures: None) -> None:
    program = Program(lambda batch: batch.x, 4)
    one = only(ppca, "amortized")
    fits = [replace(fit, entry=program, model="program", x=None) for fit in one.fits]
    own = replace(one, model="program", fits=fits)
    text = Page(report.html(own)).text
    assert "program of your own" in text
    assert "ez.compare(program, 'iris', " in text


def test_every_figure_of_the_document_stands_in_the_page(ppca: Comparison, html: str) -> None:
    """What `--json` gives stands in the full table too, figure for figure."""
    text = Page(html).text
    for row in ppca.document()["rows"]:
        for value in row.values():
            if isinstance(value, float) and abs(value) >= 1e-4:
                assert plots.number(value, 4) in text
            elif isinstance(value, str | int) and not isinstance(value, bool):
                assert str(value) in text


def test_the_model_of_all_ways_to_q_is_learned_again(tmp_path: Path) -> None:
    """The methods as they were asked for, since each alone would learn a model of its own."""
    options = {"steps": 5, "iterations": 3, "latent_dim": 1, "refinements": 1}
    comparison = run_comparison("linear-vae", IRIS.x, ["all"], 1, options, name="iris", progress=False)
    _, code = report.reproduction(comparison)
    assert "--methods all " in code and "shared" not in code
    assert all("θ was learned by em, which did not converge" in fit.notes for fit in comparison.fits)


def test_rows_that_were_picked_have_no_command(ppca: Comparison) -> None:
    fewer = replace(ppca, data={**ppca.data, "rows": 100})
    words, code = report.reproduction(fewer)
    assert "Of the rows of iris, 100 were picked" in " ".join(words) and "ez.compare('ppca', x," in code
