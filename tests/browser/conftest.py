"""The browser that the tests of this folder drive."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium():
    """The machine's own Chromium, headless; skips where it or playwright is not installed."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    path = next(filter(_works, filter(None, map(shutil.which, NAMES))), None)
    if path is None:
        pytest.skip("no Chromium is installed (on Debian: apt-get install chromium)")
    root = os.geteuid() == 0  # Chromium's sandbox refuses to run as root
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if root else []
        )
        yield browser
        browser.close()


def _works(path: str) -> bool:
    """Some systems have the command and, instead of the browser, a hint how to install it."""
    return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0
