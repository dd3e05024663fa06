"""A headless Chromium for the browser tests and the README's pictures."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NO_BROWSER = "no Chromium is installed"


def chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts Chromium, and stops it again."""
    if not chromium():
        raise FileNotFoundError(NO_BROWSER)
    with sync_playwright() as playwright:
        yield (running := playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS))
        running.close()
