"""Every link inside the built documentation leads somewhere, down to the heading that it names."""

from __future__ import annotations

import csv
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from browser import served

pytestmark = pytest.mark.site

SETTINGS = "[checking]\nmaxrequestspersecond=1000\n"  # the server is ours and need not be spared
SITE_SECONDS, SMALL_SECONDS = 900, 240  # far more than it takes
HERE = "http://site.invalid/"
HEAD = '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>t</title></head><body>'


def dead_links(address: str, folder: Path, seconds: int) -> list[str]:
    """Return the addresses below one that lead nowhere: the page, what it links to, and why.

    LinkChecker follows links to pages, pictures, styles and scripts; other sites are left alone.
    """
    settings = folder / "linkcheckerrc"
    settings.write_text(SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "linkcheck", "--config", str(settings), "--no-status", "--threads", "4"]
    # What each line of a module's code links to stands on the pages that it is shown for.
    command += ["--no-follow-url", "/_modules/", "--output", "csv/utf-8", address]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert run.returncode in (0, 1), run.stderr
    assert "# Stopped checking" in run.stdout, run.stdout[-500:] + run.stderr[-500:]
    rows = csv.DictReader((line for line in run.stdout.splitlines() if not line.startswith("#")), delimiter=";")
    return [f"{row['parentname']} to {row['urlname']}: {row['warningstring'] or row['result']}"[:300] for row in rows]


class Anchors(HTMLParser):
    """Collects what a page can be entered at, and the links that name such a place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "#" in given.get("href", ""):
            self.links.add(given["href"])


def dead_headings(folder: Path) -> list[str]:
    """Return the links to places that the pages of a site do not have; LinkChecker reads a page anew for each link."""
    pages = {path.relative_to(folder).as_posix(): Anchors(path.read_text("utf-8")) for path in folder.rglob("*.html")}
    found = []
    for name, page in pages.items():
        for link in page.links:
            target, place = urldefrag(urljoin(f"{HERE}{name}", link))
            other = pages.get(unquote(target.removeprefix(HERE)))
            if place and other is not None and unquote(place) not in other.places:
                found.append(f"{name} to {link}")
    return sorted(found)


@pytest.mark.timeout(SITE_SECONDS + 60)
def test_no_link_of_the_site_is_dead(site: str, tmp_path: Path) -> None:
    assert dead_links(site, tmp_path, SITE_SECONDS) == []


def test_no_link_names_a_heading_that_is_not_there(built: Path) -> None:
    assert dead_headings(built) == []


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A site with links to a page that is there, to two of its headings that are not, and to two files that are not."""
    links = ["good.html", "good.html#there", "good.html#gone", "#top", "missing.html", "#lost"]
    body = "".join(f'<a href="{link}">{link}</a>' for link in links) + '<img src="missing.png" alt="" id="top">'
    outside = '<a href="https://elsewhere.invalid/#x">not followed</a>'
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "index.html").write_text(HEAD + body + outside, encoding="utf-8")
    (folder / "good.html").write_text(f'{HEAD}<h1 id="there">There</h1><a href="index.html">back</a>', encoding="utf-8")
    return folder


@pytest.mark.timeout(SMALL_SECONDS + 60)
def test_dead_links_are_found(small: Path, tmp_path: Path) -> None:
    with served(small) as address:
        found = dead_links(address, tmp_path, SMALL_SECONDS)
    assert sorted(line.split(": ")[0].split(" to ")[1] for line in found) == ["missing.html", "missing.png"]


def test_dead_headings_are_found(small: Path) -> None:
    assert dead_headings(small) == ["index.html to #lost", "index.html to good.html#gone"]
