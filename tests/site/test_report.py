"""The report of a comparison in a browser: as a file that is opened, and as a page that is served."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import browser
import pandas as pd
import pytest
from browser import DESKTOP, PHONE, Visit, served, visiting

import elbozoo as ez

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.site

DRAWN = "html[data-charts=drawn]"  # the policy of a report lets no predicate of ours poll in it
DARK, BRIGHT = 0.2, 0.8
ROWS = 150  # of iris


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a report with curves, tables and latents, and of one about images."""
    folder = tmp_path_factory.mktemp("reports")
    settings = {"latent_dim": 2, "progress": False}
    linear = ez.compare("ppca", "iris", methods=["em", "mean-field", "amortized"], seeds=2, steps=200, **settings)
    linear.report(folder / "ppca.html")
    linear.trajectories.to_csv(folder / "trajectories.csv", index=False)
    ez.compare("vae", "digits-binary", methods=["amortized"], seeds=1, steps=40, hidden=8, **settings).report(
        folder / "vae.html"
    )
    return folder


@contextmanager
def looking(chrome: Browser, folder: Path, name: str, *, width: int = DESKTOP, dark: bool = False) -> Iterator[Visit]:
    """Open a report as the file that it is, and wait until its charts are drawn."""
    with visiting(chrome, (folder / name).as_uri(), width=width, dark=dark) as visit:
        visit.page.wait_for_selector(DRAWN)
        visit.settle()
        yield visit


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["ppca.html", "vae.html"])
def test_report_is_whole_and_can_be_read(chrome: Browser, reports: Path, name: str, dark: bool, width: int) -> None:
    with looking(chrome, reports, name, width=width, dark=dark) as visit:
        found = {
            "browser": visit.complaints,
            "network": visit.foreign,
            "images": browser.missing_images(visit.page),
            "words": browser.images_without_words(visit.page),
            "mathematics": browser.unset_mathematics(visit.page),
            "width": browser.too_wide(visit.page),
            "contrast": browser.hard_to_read(visit.page),
        }
        brightness = browser.brightness(visit.page)
        assert visit.page.locator("#curves .main-svg").count() and visit.page.locator("#ledger .main-svg").count()
    assert not any(found.values()), {check: said for check, said in found.items() if said}
    assert brightness < DARK if dark else brightness > BRIGHT


def test_a_served_report_asks_for_nothing_but_itself(chrome: Browser, reports: Path) -> None:
    requested: list[str] = []
    with served(reports) as address, visiting(chrome, f"{address}ppca.html", address) as visit:
        visit.page.on("request", lambda request: requested.append(request.url))
        visit.page.reload()
        visit.page.wait_for_selector(DRAWN)
        assert not [*visit.complaints, *visit.foreign]
    assert [url for url in requested if not url.startswith("data:")] == [f"{address}ppca.html"]


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("table", ["#summary", "#fits"])
def test_tables_sort(chrome: Browser, reports: Path, table: str, by_key: bool) -> None:
    """By the first column whose numbers all differ, as the mouse or the keyboard asks for it."""
    with looking(chrome, reports, "ppca.html") as visit:
        heads = visit.page.locator(f"{table} thead tr:last-child > *")
        columns = {i: browser.column(visit.page, table, i) for i in range(1, heads.count())}
        position = next(i for i, numbers in columns.items() if len(set(numbers)) == len(numbers) > 1)
        assert browser.unsorted(visit.page, table, position, by_key=by_key) == []
        assert not visit.complaints


def test_curves_tell_where_the_pointer_is(chrome: Browser, reports: Path) -> None:
    """Step, seconds, ELBO and evidence: log p(x) is that of the fit at that step, per datum, as it is rounded."""
    with looking(chrome, reports, "ppca.html") as visit:
        said = browser.hovered(visit.page, "#curves").replace("−", "-")
        assert not visit.complaints
    found = re.match(
        r"(?P<method>[\w-]+), seed (?P<seed>\d+)\nstep (?P<step>\d+)\n[\d.]+ seconds\nELBO.* -?[\d.]+\n"
        r"log p\(x\) (?P<evidence>-?[\d.]+)$",
        said,
    )
    assert found is not None, said
    steps = pd.read_csv(reports / "trajectories.csv").set_index(["method", "seed", "step"]).sort_index()
    evidence = steps.loc[(found["method"], int(found["seed"])), "log_evidence"] / ROWS
    rounding = 0.51 * 10.0 ** -len(found["evidence"].partition(".")[2])
    # Steps count from 1 here and from 0 there; between those at which it is computed, the last one stands.
    assert abs(evidence.ffill().iloc[int(found["step"]) - 1] - float(found["evidence"])) <= rounding
    # No step far from there has that figure; EM and all fits begin well below where they end.
    assert abs(evidence.iloc[0] - float(found["evidence"])) > rounding


def test_images_are_shown_for_images_alone(chrome: Browser, reports: Path) -> None:
    for name, is_there in (("vae.html", True), ("ppca.html", False)):
        with looking(chrome, reports, name) as visit:
            assert bool(visit.page.locator("#images img").count()) is is_there


def test_without_scripts_tables_and_words_are_there(chrome: Browser, reports: Path) -> None:
    context = chrome.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto((reports / "ppca.html").as_uri())
        assert page.locator("#summary tbody tr").count() == 3
        assert page.locator("#fits tbody tr").count() == 6
        assert page.locator("#curves noscript, #curves p, #curves img").count()
    finally:
        context.close()
