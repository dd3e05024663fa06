"""Takes the README's pictures of the app: every tab, light and dark, wide and on a phone.

python -m scripts.screenshots FOLDER [WEIGHTS]
"""

import sys
from pathlib import Path

import torch
from playwright.sync_api import Page

from app.ui import LAUNCH, WEIGHTS, build
from tests.helpers.browser import browser

TOUR = 5  # the scene of the subtraction
WIDE, PHONE = dict(width=1400, height=900), dict(width=390, height=844)


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_role("tabpanel").locator("visible=true").get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def take(url: str, folder: Path) -> None:
    """Writes a picture of every tab, each as -light, -dark and -phone .png."""
    with browser() as chromium:
        for name, theme, size in (("light", "light", WIDE), ("dark", "dark", WIDE), ("phone", "light", PHONE)):
            page = chromium.new_page(viewport=size)
            page.goto(f"{url}?__theme={theme}")
            page.wait_for_selector(".vt[data-state=complete]")
            page.wait_for_selector(".vca-attribution-figure")
            page.wait_for_timeout(500)
            page.screenshot(path=folder / f"classify-{name}.png", full_page=True)
            page.get_by_role("button", name="See it think").click()
            for _ in range(TOUR - 1):
                page.get_by_role("button", name="Next", exact=True).click()
            page.wait_for_timeout(500)
            page.screenshot(path=folder / f"tour-{name}.png", full_page=True)
            page.get_by_role("button", name="Leave the tour").click()
            page.get_by_role("button", name="Explore this head").click()
            page.wait_for_selector(".vx[data-state=complete]")
            page.wait_for_timeout(500)
            page.screenshot(path=folder / f"explore-{name}.png", full_page=True)
            for tab in ("Generate", "Compare", "About"):
                page.get_by_role("tab", name=tab).click()
                if tab == "Compare":
                    page.wait_for_selector(".vc-facts tr:last-child td:has-text(' ms')")
                elif tab == "Generate":
                    choose(page, "Class", "mountain")
                    page.get_by_role("button", name="Generate", exact=True).locator("visible=true").click()
                    page.wait_for_selector(".vg[data-film=complete]", timeout=300_000)
                page.wait_for_timeout(1000)
                page.screenshot(path=folder / f"{tab.lower()}-{name}.png", full_page=True)
            page.close()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    demo = build(Path(sys.argv[2]) if len(sys.argv) == 3 else WEIGHTS)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    take(address, output)
    demo.close()
