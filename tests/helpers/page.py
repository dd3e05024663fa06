"""What the page shows, and what it should show."""

from itertools import pairwise

import numpy as np
from axe_playwright_python.sync_playwright import Axe

from vca import drawing

READ = """() => {
    const root = document.querySelector(".vx");
    const rows = Object.fromEntries(Object.entries(root.explorer.rows).map(([name, row]) => [name, [...row]]));
    return { rows, words: root.querySelector(".vx-query").textContent, ms: Number(root.dataset.drawMs) };
}"""


PIXELS = """([stream, points]) => {
    const canvas = document.querySelector(`.vx figure[data-stream=${stream}] canvas`);
    const context = canvas.getContext("2d");
    return points.map(([x, y]) => [...context.getImageData(
        Math.floor(x * canvas.width), Math.floor(canvas.height - (1 - y) * canvas.width * ASPECT), 1, 1).data]);
}"""


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """The patches that adaptive pooling averages into each of `count` cells."""
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def borders(count: int, size: int) -> list[float]:
    """Where `count` cells begin, in patches: where two overlap, they meet in the middle."""
    return [0, *((left[1] + right[0]) / 2 for left, right in pairwise(spans(count, size)))]


def cell(position: float, count: int, size: int) -> int:
    """The cell at a position from 0 to 1."""
    return int(np.searchsorted(borders(count, size), position * size, side="right")) - 1


def points_in_cells(count: int, size: int) -> list[float]:
    """A position from 0 to 1 inside every cell, where no frame around a patch or a cell is drawn."""
    return [(start + (0.5 if start == int(start) else 0.25)) / size for start in borders(count, size)]


def signed_colors(values: np.ndarray, limit: float) -> np.ndarray:
    """Colours of the light theme: (n,) -> (n, 3), from 0 to 255."""
    size = np.abs(values) / limit
    ramps = [np.stack([drawing.rgb(color) for color in drawing.PALETTE["light"][s]]) for s in ("positive", "negative")]
    colors = [np.stack([np.interp(size, np.linspace(0, 1, 5), r[:, i]) for i in range(3)], -1) for r in ramps]
    return np.where((values >= 0)[:, None], *colors)


def expected_rows(layer, mode: str, head: int | None, query: int) -> dict[str, np.ndarray]:
    """The three rows on show, from the record alone; `head` None is the mean of all heads."""
    heads = slice(None) if head is None else slice(head, head + 1)
    if mode == "effective":
        row = layer.effective[0, heads, query].mean(0).numpy()
        return dict(positive=np.maximum(row, 0), negative=np.maximum(-row, 0), differential=row)
    stage = getattr(layer, mode)
    return {s: getattr(stage, s)[0, heads, query].mean(0).numpy() for s in ("positive", "negative", "differential")}


# What an empty gr.Blocks with the same components breaks as well: rule -> texts in the elements.
GRADIO_FAULTS = {
    "button-name": ["image-frame"],  # the picture of gr.Image has no name
    "image-redundant-alt": ['alt="Settings"'],  # the footer's icon repeats its text
}


def our_faults(page) -> list[str]:
    """The accessibility rules that the page breaks, each with its element, without Gradio's own."""
    return [
        f"{fault['id']}: {node['html']} at {' '.join(node['target'])}"
        for fault in Axe().run(page).response["violations"]
        for node in fault["nodes"]
        if not any(text in node["html"] for text in GRADIO_FAULTS.get(fault["id"], []))
    ]
