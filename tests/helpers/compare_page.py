"""What the Compare tab shows."""

import numpy as np

from tests.helpers.generate_tab import (
    choose,  # noqa: F401
    save_generator,  # noqa: F401
)
from vca.diffusion.sampling import to_bytes

READ = """() => document.querySelector(".vc").compare.sides.map(({ rows }) =>
    Object.fromEntries(Object.entries(rows).map(([name, row]) => [name, [...row]])))"""


def panel_of(page, tab: str):
    page.get_by_role("tab", name=tab).click()
    return page.get_by_role("tabpanel").locator("visible=true")


def load_another(page, tab: str, reference: str) -> str:
    """Loads a model: in Compare as the second one, elsewhere as the page's; returns what the page then says."""
    panel = panel_of(page, tab)
    if tab != "Compare":
        panel = page.locator(".vca-choice")
    panel.get_by_text("Load another model").click()
    panel.get_by_label("Hub id, or a folder").fill(reference)
    panel.get_by_role("button", name="Load", exact=True).click()
    said = panel.locator(".vca-loader .vca-problem, .vca-loader .vca-hint:has-text('is loaded')")
    said.wait_for()
    return said.inner_text()


def send(page, path) -> None:
    """Uploads a photo. What the tabs showed before is no longer called complete."""
    page.evaluate("() => document.querySelectorAll('.vt, .vx, .vc').forEach((root) => (root.dataset.state = 'before'))")
    page.locator(".vca-photo input[type=file]").first.set_input_files(path)


def pair(page, path, first: str, second: str) -> None:
    """Compares two models with a photo."""
    panel_of(page, "Compare")
    for label, name in (("Model", first), ("Second model", second)):
        page.get_by_label(label, exact=True).click()
        page.get_by_role("option", name=name, exact=True).last.click()
    send(page, path)
    page.wait_for_selector(".vc[data-state=complete]")


def facts_of(page, side: int) -> dict[str, str]:
    """What the page's table says of one of the models."""
    rows = page.locator(".vc-facts tbody tr").all()
    return {row.locator("th").inner_text(): row.locator("td").nth(side).inner_text() for row in rows}


STEPS, COUNT, LABEL = 6, 4, "right"


PICTURES = """() => [...document.querySelectorAll(".vc-pictures")].map(
    (side) => [...side.querySelectorAll("canvas")].map((canvas) => [
        ...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]))"""


def complete(page) -> None:
    page.wait_for_selector(".vc[data-state=complete]")


def pixels(images) -> np.ndarray:
    return to_bytes(images).permute(0, 2, 3, 1).numpy()


def shown(page) -> list[np.ndarray]:
    """The pictures of both sides, (B, H * W, 3)."""
    return [np.array(side, np.uint8).reshape(COUNT, -1, 4)[..., :3] for side in page.evaluate(PICTURES)]
