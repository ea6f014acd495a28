"""The report as Markdown says what the table says, has its pictures beside it, and lets no name become markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from elbozoo import plots, report
from elbozoo.data import load_data
from elbozoo.inference.comparison import Comparison, run_comparison
from elbozoo.inference.tasks import Failure
from elbozoo.report.markdown import fenced, markdown, plain

IRIS = load_data("iris")
METHODS = ["closed-form", "mean-field", "free-delta"]
HOSTILE = "<script>alert(1)</script> | **b** `c` ![x](https://evil.example/a.png) $a$ &amp;\n# d"


@pytest.fixture(scope="module")
def ppca() -> Comparison:
    options = {"steps": 20, "latent_dim": 2}
    return run_comparison("ppca", IRIS.x, METHODS, 2, options, name="iris", progress=False)


class Words(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def set_in_html(text: str) -> Words:
    """Set Markdown as GitHub does: tables, and HTML as it stands."""
    return Words(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of the first table by their method."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0].partition("<br>")[0]: line for line in lines[2:]}


def test_numbers_are_the_tables(ppca: Comparison) -> None:
    text = markdown(ppca, [])
    found = rows_of(text)
    assert list(found) == list(ppca.summary.index)
    for method, cells in found.items():
        mean = ppca.summary.loc[method]
        assert cells[1].startswith(plots.number(mean["log_evidence", "mean"], 2))
        assert plots.number(mean["log_evidence", "mean"] / 150, 4) in cells[1]
    assert found["free-delta"][2] == "not a bound"
    changed = ppca.table.assign(log_evidence=ppca.table["log_evidence"] - 1)  # the negative control
    assert rows_of(markdown(replace(ppca, table=changed), []))["mean-field"][1] != found["mean-field"][1]


def test_words_and_command_are_those_of_the_page(ppca: Comparison) -> None:
    text = set_in_html(markdown(ppca, [])).text
    for sentence in report.headline(ppca):
        assert " ".join(sentence.split()) in text
    assert report.reproduction(ppca)[1] in markdown(ppca, [])


def test_pictures_lie_beside_the_page(ppca: Comparison, tmp_path: Path) -> None:
    page = report.write(ppca, tmp_path / "REPORT of mine.md")
    links = re.findall(r"^!\[(.+)\]\((.+)\)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [link for _, link in links] == [
        f"REPORT%20of%20mine_files/{name}.png" for name in ("curves", "ledger", "latent_space")
    ]
    assert all(len(alt) > 60 for alt, _ in links)
    files = sorted((tmp_path / "REPORT of mine_files").iterdir())
    assert [file.name for file in files] == ["curves.png", "latent_space.png", "ledger.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_hostile_names_stay_text(ppca: Comparison) -> None:
    hostile = replace(ppca, data={**ppca.data, "name": HOSTILE}, failures=[Failure("em", 7, HOSTILE)])
    page = set_in_html(markdown(hostile, []))
    assert {"script", "img", "strong"} & page.tags == set()
    assert page.text.count(" ".join(HOSTILE.split())) >= 2
    unescaped = set_in_html(markdown(hostile, []).replace("\\", ""))  # the negative control
    assert {"script", "img", "strong"} <= unescaped.tags


def test_text_is_one_line_and_code_keeps_its_fence() -> None:
    assert plain("a\n b") == "a b"
    assert fenced("x", "sh") == "```sh\nx\n```"
    assert fenced("````", "sh") == "`````sh\n````\n`````"
