"""Paths, the built site and the browser that the tests of the book share."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

SITE = ROOT / "_build" / "html"


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built site."""
    if not (SITE / "index.html").exists():
        pytest.fail("the site is not built: run `make test`, or `make book` first")
    return SITE


NO_BROWSER = "no browser: install Chromium or Chrome, or name one in CHROMIUM"


@pytest.fixture(scope="session")
def browser():
    """A headless browser: the machine's Chromium or Chrome, or the one Playwright installed."""
    from playwright.sync_api import Error, sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = (os.environ.get("CHROMIUM"), *map(shutil.which, names))
    path = next((path for path in found if path), None)
    args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    args += ["--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path, args=args)
        except Error:
            pytest.skip(NO_BROWSER)
        yield started
        started.close()


def pytest_terminal_summary(terminalreporter):
    skipped = [
        r for r in terminalreporter.stats.get("skipped", []) if NO_BROWSER in str(r.longrepr)
    ]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests of the site were skipped, {NO_BROWSER}.")
