"""A headless Chromium for the browser tests and the README's pictures."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

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
REQUIRED = os.environ.get("VCA_REQUIRE_BROWSER") == "1"
PATIENCE = 60_000  # milliseconds
# What Gradio logs first, before it asks for the next document: it ends its streams, and calls their events broken.
ABANDONED = "AbortError: signal is aborted without reason"


def chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


needs_browser = pytest.mark.skipif(not chromium() and not REQUIRED, reason=NO_BROWSER)


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts Chromium, and stops it again."""
    if not chromium():
        raise FileNotFoundError(NO_BROWSER)
    with sync_playwright() as playwright:
        yield (running := playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS))
        running.close()


@contextmanager
def open_page(running: Browser, *allowed: str, **options) -> Iterator[Page]:
    """A new page, which must neither log an error nor ask anything of another machine.

    What a document says of requests that end with it, when another takes its place or the page closes, is no fault.

    Args:
        running: the browser.
        allowed: how the addresses begin that the page may ask.
        options: of the page's own context, as of `Browser.new_page`.
    """
    page = running.new_page(**options)
    page.set_default_timeout(PATIENCE)
    faults, leaves = [], False

    def note(text: str) -> None:
        nonlocal leaves
        leaves = leaves or ABANDONED in text
        if not leaves:
            faults.append(text)

    def asked(request: Request) -> None:
        nonlocal leaves
        if request.is_navigation_request() and page.url != "about:blank":
            leaves = True
        if not request.url.startswith((*allowed, "data:", "blob:")):
            faults.append(f"asked for {request.url}")

    def arrived() -> None:
        nonlocal leaves
        leaves = False

    page.on("console", lambda message: message.type == "error" and note(message.text))
    page.on("pageerror", lambda error: note(str(error)))
    page.on("request", asked)
    page.on("domcontentloaded", arrived)
    try:
        yield page
        if not page.is_closed():
            page.evaluate("0")  # brings what it has logged
        leaves = True
    finally:
        page.close()
    assert not faults, faults
