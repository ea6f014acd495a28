"""Negative controls: each check of a page finds the one fault of a small page, and nothing in a page without any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import browser
import pytest
from browser import PHONE, served, visiting

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.site

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
HEAD = '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,"><title>t</title>'
SOUND = f"""<style>body {{ margin: 0; background: #fff; color: #222 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #ddd }} }}</style></head>
<body><main><h1>Title</h1><p>Some text, worth <code>\\(1 \\$$</code>.</p><img src="{PIXEL}" alt="one pixel">
<div class="math"><math><mi>x</mi></math></div></main></body></html>"""

SORTING = """<table id="t"><thead><tr><th>name</th><th>nats</th></tr></thead>
<tbody><tr><td>a</td><td>2.5</td></tr><tr><td>b</td><td>−3</td></tr>
<tr><td>c</td><td>10</td></tr><tr><td>d</td><td>9</td></tr></tbody></table>
<script>
let sign = -1;
const head = document.querySelectorAll('th')[1], body = document.querySelector('tbody');
const value = row => SORT_KEY;
const sort = () => {
  sign = -sign;
  [...body.rows].sort((a, b) => sign * (value(a) < value(b) ? -1 : 1)).forEach(row => body.append(row));
  if (ARIA) head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
};
head.tabIndex = 0;
head.addEventListener('click', sort);
head.addEventListener('keydown', event => { if (KEYBOARD && event.key === 'Enter') sort(); });
</script>"""
NUMBER = "parseFloat(row.cells[1].textContent.replace('−', '-'))"

CHART = """<div id="chart" style="width: 400px; height: 300px"><div class="hoverlayer"></div></div><script>
document.getElementById('chart').addEventListener('mousemove', event => {
  if (event.offsetY > 200) document.querySelector('.hoverlayer').textContent = 'step 3';
});
</script>"""


def page(head: str = "", body: str = "") -> str:
    return HEAD + head + SOUND.replace("</main>", body + "</main>")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[str]:
    with served(tmp_path) as address:
        yield address


def complaints(chrome: Browser, folder: Path, address: str, text: str, **settings: int) -> dict[str, list[str]]:
    """Return what each check says about one page."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    with visiting(chrome, f"{address}page.html", address, **settings) as visit:
        return {
            "browser": visit.complaints,
            "foreign": visit.foreign,
            "images": browser.missing_images(visit.page),
            "words": browser.images_without_words(visit.page),
            "mathematics": browser.unset_mathematics(visit.page),
            "width": browser.too_wide(visit.page),
            "contrast": browser.hard_to_read(visit.page),
        }


def test_a_sound_page_passes_every_check(chrome: Browser, tmp_path: Path, here: str) -> None:
    for settings in ({}, {"width": PHONE}, {"dark": True}):
        found = complaints(chrome, tmp_path, here, page(), **settings)
        assert not any(found.values()), (settings, found)


@pytest.mark.parametrize(
    ("check", "expected", "fault"),
    [
        ("browser", "console: wrong", page(body="<script>console.error('wrong')</script>")),
        ("browser", "uncaught: broken", page(body="<script>throw Error('broken')</script>")),
        ("browser", "404: ", page("<link rel=stylesheet href=gone.css>")),
        ("foreign", "https://cdn.example/a.js", page("<script src=https://cdn.example/a.js></script>")),
        ("foreign", "https://fonts.example/", page("<style>h1 { background: url(https://fonts.example/) }</style>")),
        ("images", "gone.png", page(body='<img src="gone.png" alt="gone" loading="lazy">')),
        ("words", PIXEL[-20:], page(body=f'<img src="{PIXEL}" alt=" ">')),
        ("mathematics", "raw: as in", page(body=r"<p>as in \(z_n\)</p>")),
        ("mathematics", "raw: so $$", page(body="<p>so $$x$$</p>")),
        ("mathematics", "not set: x+1", page(body='<span class="math">x+1</span>')),
        ("mathematics", "error: Undefined", page(body='<i data-mjx-error="Undefined control sequence">?</i>')),
        ("mathematics", "font: ", page("<style>@font-face{font-family:M;src:url(no.woff)} p{font-family:M}</style>")),
        ("width", "DIV wide", page(body='<div class="wide" style="width: 900px">wide</div>')),
        ("contrast", "faint", page(body='<p style="color: #888; background: #777">faint</p>')),
        ("contrast", "through", page(body='<p style="color: rgb(34 34 34 / .4)">through</p>')),
    ],
)
def test_each_check_finds_its_fault(
    chrome: Browser, tmp_path: Path, here: str, check: str, expected: str, fault: str
) -> None:
    found = complaints(chrome, tmp_path, here, fault, width=PHONE)
    assert any(expected in complaint for complaint in found[check]), found


def test_what_scrolls_in_its_own_box_is_not_too_wide(chrome: Browser, tmp_path: Path, here: str) -> None:
    box = '<div style="overflow-x: auto"><div style="width: 900px">wide</div></div>'
    assert complaints(chrome, tmp_path, here, page(body=box), width=PHONE)["width"] == []


def test_dark_pages_are_told_from_bright_ones(chrome: Browser, tmp_path: Path, here: str) -> None:
    """By a page that follows what the reader prefers, and one that does not and cannot be read."""
    always = page("<style>p { color: #ddd !important }</style>")
    (tmp_path / "page.html").write_text(page(), encoding="utf-8")
    for dark in (True, False):
        with visiting(chrome, f"{here}page.html", here, dark=dark) as visit:
            assert (browser.brightness(visit.page) < 0.5) is dark
    assert not complaints(chrome, tmp_path, here, always, dark=True)["contrast"]
    assert complaints(chrome, tmp_path, here, always, dark=False)["contrast"]


def sorting(key: str = NUMBER, *, aria: bool = True, keyboard: bool = True) -> str:
    script = SORTING.replace("SORT_KEY", key).replace("ARIA", str(aria).lower())
    return page(body=script.replace("KEYBOARD", str(keyboard).lower()))


def test_a_table_that_does_not_sort_is_found(chrome: Browser, tmp_path: Path, here: str) -> None:
    """Sorted by number; by text; not at all; without a word to those who do not see it; by the mouse alone."""
    cases = [
        (sorting(), False, ""),
        (sorting(), True, ""),
        (sorting("row.cells[1].textContent"), False, "no click put"),
        (sorting("0"), False, "no click put"),
        (sorting(aria=False), False, "never says"),
        (sorting(keyboard=False), True, "no click put"),
    ]
    for text, by_key, expected in cases:
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        with visiting(chrome, f"{here}page.html", here) as visit:
            found = browser.unsorted(visit.page, "#t", 1, by_key=by_key)
        assert all(expected in each for each in found) and bool(found) is bool(expected), (text, found)


def test_a_chart_that_says_nothing_is_found(chrome: Browser, tmp_path: Path, here: str) -> None:
    for text, expected in ((page(body=CHART), "step 3"), (page(body=CHART.replace("mousemove", "never")), "")):
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        with visiting(chrome, f"{here}page.html", here) as visit:
            assert browser.hovered(visit.page, "#chart") == expected


def test_without_a_browser_the_tests_fail_and_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert browser.chromium()
    monkeypatch.setenv("CHROMIUM", "/no/such/browser")
    with pytest.raises(RuntimeError, match=r"found no browser \(/no/such/browser\).*apt-get install chromium"):
        browser.chromium()
