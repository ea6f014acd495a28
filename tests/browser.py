"""Pages as a reader's browser shows them: what it complains of, what is missing, and what can be read.

Each check returns a list of complaints, empty where there is nothing to complain of.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # of the extra `site`, which the other tests go without
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, Route

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
DESKTOP, PHONE = 1280, 390  # CSS pixels
PATIENCE = 60_000  # milliseconds; no check waits that long unless something is broken
LEAST_CONTRAST = 4.5  # WCAG 2.2, success criterion 1.4.3: text of ordinary size
SCRIPT = Path(__file__).with_suffix(".js")


def chromium() -> str:
    """Return the path of the Chromium of this machine: that of $CHROMIUM, or the first one that is found.

    Raises
    ------
    RuntimeError
        Without one, with how to install it. A test that needs one fails by this and is never skipped.
    """
    given = os.environ.get("CHROMIUM")
    path = shutil.which(given) if given else next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise RuntimeError(
            f"found no browser ({given or ', '.join(NAMES)}), expected a Chromium; install one with "
            "`apt-get install chromium`, or set CHROMIUM to its path"
        )
    return path


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is missing is for the browser to notice."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder at a free port of this machine while the block runs; yields its address, with a slash."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join(10)


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser without a window while the block runs."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """A page that is open, with what the browser had to complain of.

    Attributes
    ----------
    page : Page
        The page of Playwright.
    home : str
        Beginning of the addresses that the page may ask for.
    complaints : list of str
        Errors on the console, uncaught errors, requests that failed, answers of 400 or more.
    foreign : list of str
        Addresses elsewhere that the page asked for, and did not get.
    """

    page: Page
    home: str
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Listen to the page, and keep it from the network."""
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("response", self._response)
        self.page.route("**/*", self._route)

    def open(self, address: str) -> None:
        """Go to an address and wait until its pictures, fonts and formulas are there."""
        self.page.goto(address, wait_until="load", timeout=PATIENCE)
        self.settle()

    def settle(self) -> None:
        """Wait until pictures, fonts and formulas of the present page are there."""
        self.page.evaluate("checks.settle()")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(f"console: {message.text}")

    def _failed(self, request: Request) -> None:
        if request.url not in self.foreign:
            self.complaints.append(f"failed: {request.url}")

    def _response(self, response: Response) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status}: {response.url}")

    def _route(self, route: Route) -> None:
        if route.request.url.startswith((self.home, "data:", "blob:")):
            route.continue_()
        else:
            self.foreign.append(route.request.url)
            route.abort()


@contextmanager
def visiting(
    browser: Browser, address: str, home: str = "", *, width: int = DESKTOP, dark: bool = False
) -> Iterator[Visit]:
    """Open a page as a new reader would, and watch it while the block runs.

    Parameters
    ----------
    browser : Browser
        Of :func:`browsing`.
    address : str
        Of the page: ``http:`` or ``file:``.
    home : str
        Beginning of the addresses that it may ask for; by default its own.
    width : int
        Of the window, CSS pixels.
    dark : bool
        Whether the reader prefers dark pages.
    """
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", service_workers="block"
    )
    context.set_default_timeout(PATIENCE)
    context.add_init_script(path=SCRIPT)
    try:
        visit = Visit(context.new_page(), home or address)
        visit.watch()
        visit.open(address)
        yield visit
    finally:
        context.close()


# ---- checks ----------------------------------------------------------------------------------------------------------


def missing_images(page: Page) -> list[str]:
    """Images that could not be shown."""
    return list(page.evaluate("checks.missingImages()"))


def images_without_words(page: Page) -> list[str]:
    """Images of the content that say nothing to a reader who does not see them."""
    return list(page.evaluate("checks.imagesWithoutWords()"))


def unset_mathematics(page: Page) -> list[str]:
    """Formulas that stand there as they were typed, that are wrong, or whose letters are missing."""
    return list(page.evaluate("checks.unsetMathematics()"))


def formulas(page: Page) -> int:
    """Number of formulas that are set."""
    return int(page.evaluate("checks.formulas()"))


def formula_fonts(page: Page) -> int:
    """Number of MathJax's fonts that were loaded and are in use."""
    return int(page.evaluate("checks.formulaFonts()"))


def too_wide(page: Page) -> list[str]:
    """What makes the page itself scroll sideways; tables and code in boxes that scroll do not."""
    return list(page.evaluate("checks.tooWide()"))


def hard_to_read(page: Page, least: float = LEAST_CONTRAST) -> list[str]:
    """Visible text of the content with less contrast to what is behind it than WCAG asks for."""
    found = page.evaluate("checks.contrasts()")
    if not found:
        return ["no text was found"]
    return [f"{each['contrast']:.2f}: {each['text']}" for each in found if each["contrast"] < least]


def brightness(page: Page) -> float:
    """Brightness of the page's background, 0 for black to 1 for white."""
    return float(page.evaluate("checks.brightness()"))


def column(page: Page, table: str, position: int) -> list[float]:
    """Numbers of a column of a table as they stand, from the top; cells without one left out."""
    found = page.evaluate("([table, position]) => checks.column(table, position)", [table, position])
    return [number for number in found if number is not None]


def unsorted(page: Page, table: str, position: int, *, by_key: bool = False) -> list[str]:
    """Say what is wrong with a table that a click on a column's head, or the Enter key there, ought to sort.

    Parameters
    ----------
    page : Page
        The page with the table.
    table : str
        Selector of the table.
    position : int
        Of the column, from 0; its numbers are not all the same.
    by_key : bool
        Use the keyboard instead of the mouse.
    """
    head = page.locator(f"{table} thead tr:last-child > *").nth(position)
    inner = head.locator("button, [role=button], [tabindex='0']")
    target = inner.first if inner.count() else head
    seen = []
    for _ in range(3):  # a third click may return to the order of the page
        if by_key:
            target.focus()
            page.keyboard.press("Enter")
        else:
            target.click()
        numbers = column(page, table, position)
        if len(numbers) < 2:
            return [f"{len(numbers)} numbers in column {position} of {table}"]
        seen.append((numbers, head.get_attribute("aria-sort")))
    found = []
    for direction, sign in (("ascending", 1), ("descending", -1)):
        orders = [said for numbers, said in seen if numbers == sorted(numbers, key=lambda n, s=sign: s * n)]
        if not orders:
            found.append(f"no click put column {position} of {table} in {direction} order")
        elif direction not in orders:
            found.append(f"aria-sort of column {position} of {table} never says {direction}")
    return found


def hovered(page: Page, chart: str, bubble: str = ".hoverlayer") -> str:
    """Words, by lines, that a chart shows as the pointer comes to one of its curves; empty if it never shows any.

    Parameters
    ----------
    page : Page
        The page with the chart.
    chart : str
        Selector of the chart's place.
    bubble : str
        Selector, inside it, of what shows the words.
    """
    place = page.locator(chart).first
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    assert box is not None, f"{chart} is not on the page"
    for across in (0.3, 0.2, 0.45, 0.6, 0.8):
        for down in range(2, 50):
            page.mouse.move(box["x"] + across * box["width"], box["y"] + box["height"] * down / 50)
            if text := str(page.evaluate("selector => checks.words(selector)", f"{chart} {bubble}")):
                return text
    return ""
