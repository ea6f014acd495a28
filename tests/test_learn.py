"""Home and Learn: both languages share their runs, pictures are described, and pages stay short and narrow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
LEARN = sorted(path.stem for path in (DOCS / "learn").glob("*.md") if path.stem != "index")
TWINS = [(DOCS / "learn" / f"{stem}.md", DOCS / "learn" / "zh" / f"{stem}.md") for stem in LEARN]
TWINS.append((DOCS / "index.md", DOCS / "learn" / "zh" / "index.md"))
PAGES = [page for pair in TWINS for page in pair]

CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"^```\{glue:figure\} (\S+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
CHINESE = r"[\u4e00-\u9fff]"

WIDTH = 88  # columns of code that a reader sees without much scrolling
# Ten minutes: 800 words at 160 a minute are five, 95 lines of code at three seconds each are the other five.
MOST_WORDS, MOST_LINES = 800, 95


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def cells(text: str) -> list[str]:
    return CELL.findall(text)


def prose(text: str) -> str:
    """Return what is read: no code, formulas, front matter or references."""
    body = CELL.sub("", re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))
    body = re.split(r"^## (?:References|参考文献)$", body, flags=re.MULTILINE)[0]
    return re.sub(r"\$\$.*?\$\$", "", body, flags=re.DOTALL)


def visible_lines(text: str) -> list[str]:
    shown = [cell for cell in cells(text) if not re.match(r":tags: \[(hide-|remove-c)", cell)]
    return [line for cell in shown for line in cell.splitlines() if line.strip()]


def misplaced_punctuation(text: str) -> list[str]:
    """Return half-width punctuation beside a Chinese character, outside formulas and names in code."""
    plain = re.sub(r"\$[^$]*\$|`[^`]*`|\]\([^)]*\)", "M", prose(text))
    return re.findall(f"{CHINESE}[,;:?!()]|[,;:?!(]{CHINESE}", plain)


def test_eight_pages_in_both_languages() -> None:
    assert len(LEARN) == 8
    chinese = {path.stem for path in (DOCS / "learn" / "zh").glob("*.md")} - {"index"}
    assert chinese == set(LEARN)
    for index in (DOCS / "learn" / "index.md", DOCS / "learn" / "zh" / "index.md"):
        assert all(re.search(f"^{stem}$", text_of(index), flags=re.MULTILINE) for stem in LEARN)


@pytest.mark.parametrize(("english", "chinese"), TWINS, ids=lambda path: path.stem)
def test_both_languages_show_one_run(english: Path, chinese: Path) -> None:
    """The cache of runs is keyed by the code, so equal code is one run; one letter more would be a second."""
    assert cells(text_of(english)) == cells(text_of(chinese))
    assert cells(text_of(english)) != cells(text_of(chinese).replace("import elbozoo", "import  elbozoo", 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_picture_is_described_and_every_number_is_from_the_run(page: Path) -> None:
    text = text_of(page)
    code = "\n".join(cells(text))
    pictures = dict(PICTURE.findall(text))
    drawn = re.findall(r'^ *show\("(\S+?)",|^glue\("(\S+?)", figure\)', code, flags=re.MULTILINE)
    assert pictures and sorted(pictures) == sorted(a or b for a, b in drawn)
    for name, body in pictures.items():
        alternative, _, caption = body.partition("\n\n")
        assert re.search(r"^:alt: .{20,}", alternative, flags=re.MULTILINE), name
        assert len(caption.strip()) > 30, name
        if "zh" in page.parts:
            assert re.search(CHINESE, alternative) and re.search(CHINESE, caption), name
    for name in re.findall(r"\{glue:text\}`(\S+?)`", text):
        assert f'glue("{name}"' in code or "glue(name" in code, name
    assert "plt.show()" not in code  # it would stand without a caption


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_claims_are_assertions_and_code_fits_a_phone(page: Path) -> None:
    code = "\n".join(cells(text_of(page)))
    assert len(re.findall(r"^\s*assert ", code, flags=re.MULTILINE)) >= 3
    assert not [line for line in code.splitlines() if len(line) > WIDTH]


@pytest.mark.parametrize("page", [english for english, _ in TWINS], ids=lambda path: path.stem)
def test_a_page_is_read_in_ten_minutes(page: Path) -> None:
    text = text_of(page)
    assert len(prose(text).split()) <= MOST_WORDS
    assert len(visible_lines(text)) <= MOST_LINES


@pytest.mark.parametrize("page", [chinese for _, chinese in TWINS], ids=lambda path: path.stem)
def test_chinese_is_set_as_chinese(page: Path) -> None:
    text = text_of(page)
    assert misplaced_punctuation(text) == []
    assert misplaced_punctuation(text.replace("，", ",", 1)) != []
    # A line that ends within a sentence would put a blank between two characters.
    assert not re.search(f"{CHINESE}\n{CHINESE}", prose(text))
