"""The built documentation in a browser: whole, readable, in both languages, and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import browser
import pytest
from browser import DESKTOP, PHONE, visiting

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.site

BUILT = Path(__file__).resolve().parent.parent.parent / "docs" / "_build" / "html"
PAGES = {
    "home": "index.html",
    "gallery": "_generated/zoo.html",
    "entry": "_generated/models/ppca.html",
    "Learn": "learn/the-elbo-three-ways.html",
    "Chinese home": "learn/zh/index.html",
    "Chinese Learn": "learn/zh/the-elbo-three-ways.html",
}
TWINS = [("home", "Chinese home"), ("Learn", "Chinese Learn")]
SWITCH = "a[hreflang]:visible"
DARK, BRIGHT = 0.2, 0.8


def every_page() -> list[str]:
    """All pages but those that show modules as code, whose lines are as long as they are."""
    found = [path.relative_to(BUILT) for path in sorted(BUILT.rglob("*.html"))]
    return [path.as_posix() for path in found if path.parts[0] not in ("_modules", "_static")]


def test_the_site_holds_a_page_for_every_entry(built: Path) -> None:
    """So that the tests below, which take the pages that they find, cannot pass for want of pages."""
    from elbozoo.models import entry_names

    pages = every_page()
    assert set(PAGES.values()) <= set(pages)
    assert {name for name in entry_names() if f"_generated/models/{name}.html" in pages} == set(entry_names())


def test_pages_of_classical_entries_took_under_a_minute_of_one_core(built: Path) -> None:
    """Those without a network; what each took was noted when it was made."""
    from torch import nn

    from elbozoo.models import entry_names, get_entry

    networks = nn.Linear | nn.ConvTranspose2d
    examples = {name: get_entry(name).example() for name in entry_names()}
    classical = [name for name, entry in examples.items() if not any(isinstance(m, networks) for m in entry.modules())]
    notes = {name: list((built.parent / "runs" / "models" / name).glob("*/seconds")) for name in classical}
    assert [name for name, found in notes.items() if len(found) != 1] == []
    assert {name: note.read_text() for name, (note,) in notes.items() if float(note.read_text()) >= 60} == {}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", every_page())
def test_every_page_is_whole_on_a_phone(chrome: Browser, site: str, path: str) -> None:
    with visiting(chrome, site + path, site, width=PHONE) as visit:
        found = {
            "browser": visit.complaints,
            "network": visit.foreign,
            "images": browser.missing_images(visit.page),
            "words": browser.images_without_words(visit.page),
            "mathematics": browser.unset_mathematics(visit.page),
            "width": browser.too_wide(visit.page),
        }
    assert not any(found.values()), {check: said for check, said in found.items() if said}


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", PAGES)
def test_page_can_be_read(chrome: Browser, site: str, name: str, dark: bool, width: int) -> None:
    with visiting(chrome, site + PAGES[name], site, width=width, dark=dark) as visit:
        found = {
            "browser": visit.complaints,
            "network": visit.foreign,
            "width": browser.too_wide(visit.page),
            "contrast": browser.hard_to_read(visit.page),
        }
        brightness = browser.brightness(visit.page)
    assert not any(found.values()), {check: said for check, said in found.items() if said}
    assert brightness < DARK if dark else brightness > BRIGHT


@pytest.mark.parametrize("name", ["home", "entry", "Learn", "Chinese home", "Chinese Learn"])
def test_formulas_are_set_in_their_own_fonts(chrome: Browser, site: str, name: str) -> None:
    """Set by MathJax, with letters from the site; that none are left as they were typed is tested of every page."""
    with visiting(chrome, site + PAGES[name], site) as visit:
        assert browser.formulas(visit.page) > 0
        assert browser.formula_fonts(visit.page) > 0


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize(("english", "chinese"), TWINS)
def test_the_switch_leads_to_the_other_language_and_back(
    chrome: Browser, site: str, english: str, chinese: str, width: int
) -> None:
    with visiting(chrome, site + PAGES[english], site, width=width) as visit:
        for expected, spoken in ((chinese, "zh"), (english, "en")):
            visit.page.locator(SWITCH).first.click()
            visit.page.wait_for_url(site + PAGES[expected])
            visit.settle()
            assert (visit.page.locator("html").get_attribute("lang") or "").startswith(spoken)
            assert not [*visit.complaints, *visit.foreign]


def test_pages_of_one_language_have_no_switch(chrome: Browser, site: str) -> None:
    with visiting(chrome, site + PAGES["gallery"], site) as visit:
        assert visit.page.locator(SWITCH).count() == 0
        assert not visit.complaints


def test_search_finds_an_entry(chrome: Browser, site: str) -> None:
    """The index is part of the site, and words that are nowhere are found nowhere."""
    for words, is_found in (("probabilistic principal components", True), ("xyzzyplugh", False)):
        with visiting(chrome, f"{site}search.html?q={words.replace(' ', '+')}", site) as visit:
            visit.page.wait_for_function("document.querySelector('#search-results .search-summary, #search-results p')")
            links = visit.page.locator("#search-results ul.search a")
            if is_found:
                links.first.wait_for()
            assert bool(links.count()) is is_found
            assert not [*visit.complaints, *visit.foreign]
