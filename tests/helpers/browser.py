"""A headless Chromium for the browser tests and the README's pictures."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

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
ABANDONED = "AbortError: signal is aborted without reason"  # Gradio's own streams, when a page closes


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


def note_faults(page: Page, allowed: tuple[str, ...], faults: list[str]) -> None:
    """Notes what a page must not do: log an error, or ask anything of another machine.

    Args:
        page: the page.
        allowed: how the addresses begin that it may ask.
        faults: the list to note it in.
    """

    def note(text: str) -> None:
        if ABANDONED not in text:
            faults.append(text)

    page.on("console", lambda message: message.type == "error" and note(message.text))
    page.on("pageerror", lambda error: note(str(error)))
    page.on("request", lambda r: r.url.startswith((*allowed, "data:", "blob:")) or note(f"asked for {r.url}"))
