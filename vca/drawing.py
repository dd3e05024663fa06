"""Arrays as pictures. Positive values are orange and negative ones blue, everywhere."""

import base64
import io

import numpy as np
from PIL import Image

# Five colours from zero to the maximum, for each theme; ColorBrewer's Oranges and Blues. A signed map joins the two at
# zero. `overlay` is the colour laid over an image, with an opacity that grows with the value.
OVERLAY = {"positive": "#ff6a00", "negative": "#0a63ff"}
PALETTE = {
    "light": {
        "positive": ["#f7f7f8", "#fdd0a2", "#fd8d3c", "#d94801", "#7f2704"],
        "negative": ["#f7f7f8", "#c6dbef", "#6baed6", "#2171b5", "#08306b"],
    },
    "dark": {
        "positive": ["#212126", "#6b2c08", "#c2500a", "#fd8d3c", "#fee6ce"],
        "negative": ["#212126", "#123a66", "#2171b5", "#6baed6", "#deebf7"],
    },
    "overlay": OVERLAY,
}


def rgb(color: str) -> np.ndarray:
    """The colour '#rrggbb' as three values from 0 to 255."""
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)


def overlay(values: np.ndarray) -> Image.Image:
    """A signed map (rows, cols) as an RGBA picture to lay over an image.

    Each cell is one pixel. Its opacity grows with its magnitude, up to 90 % at the largest value of the map.
    """
    limit = np.abs(values).max() or 1
    colors = np.where((values >= 0)[..., None], *(rgb(OVERLAY[side]) for side in ("positive", "negative")))
    alpha = 230 * np.abs(values) / limit
    return Image.fromarray(np.concatenate([colors, alpha[..., None]], -1).round().astype(np.uint8), "RGBA")


def muted(image: Image.Image) -> Image.Image:
    """The image in grey, so that colour means the map."""
    return image.convert("L")


def data_url(image: Image.Image, format: str) -> str:
    """The image as a `data:` URL; `format` is "PNG" or "JPEG"."""
    stream = io.BytesIO()
    image.save(stream, format, quality=88)
    return f"data:image/{format.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
