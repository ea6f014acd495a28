"""The documentation as it was built, at an address of this machine, and a browser to look at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import browsing, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BUILT = Path(__file__).resolve().parent.parent.parent / "docs" / "_build" / "html"


@pytest.fixture(scope="session")
def built() -> Path:
    """Folder of the site; a test of it fails where it was not built."""
    assert (BUILT / "index.html").exists(), f"found no site in {BUILT}, expected one; `make docs` builds it"
    return BUILT


@pytest.fixture(scope="session")
def site(built: Path) -> Iterator[str]:
    """Address of the site, with a slash at the end."""
    with served(built) as address:
        yield address


@pytest.fixture(scope="session")
def chrome() -> Iterator[Browser]:
    """One browser for all tests of a process; each visit has a profile of its own."""
    with browsing() as browser:
        yield browser
