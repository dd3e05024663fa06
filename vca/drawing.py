"""Arrays as pictures. Positive values are orange and negative ones blue, everywhere."""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vca.diffusion.sampling import to_bytes
from vca.images import of_user, read_image

TILE, GAP = 72, 4  # pixels: the width of a small picture, and the space between two
LARGEST = 640  # pixels, the longer side of an image below a map

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


def overlay(values: np.ndarray, limit: float | None = None) -> Image.Image:
    """A signed map (rows, cols) as an RGBA picture to lay over an image; NaN is clear.

    Each cell is one pixel. Its opacity grows with its magnitude, up to 90 % at `limit`, by default the largest value.
    """
    values = np.nan_to_num(values)
    limit = np.abs(values).max() if limit is None else limit
    colors = np.where((values >= 0)[..., None], *(rgb(OVERLAY[side]) for side in ("positive", "negative")))
    alpha = 230 * np.minimum(np.abs(values) / (limit or 1), 1)
    return Image.fromarray(np.concatenate([colors, alpha[..., None]], -1).round().astype(np.uint8), "RGBA")


def laid_over(photo: Image.Image, values: np.ndarray, limit: float | None = None, smooth: bool = False) -> Image.Image:
    """A photo, in grey, with a signed map (rows, cols) laid over it; `limit` as in `overlay`."""
    if smooth:
        values = np.asarray(Image.fromarray(values.astype(np.float32)).resize(photo.size, Image.Resampling.BICUBIC))
    veil = overlay(values, limit).resize(photo.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(muted(photo).convert("RGBA"), veil).convert("RGB")


def tiles(columns: Sequence[np.ndarray], photo: Image.Image | None = None) -> Image.Image:
    """Small pictures of signed maps, each over the photo and on a scale of its own.

    Args:
        columns: of each column the maps of its rows, (rows, Hg, Wg).
        photo: the image below every map; default nearly white.
    """
    width, height = photo.size if photo else columns[0].shape[:0:-1]
    size = (TILE, max(1, round(TILE * height / width)))
    below = photo.resize(size, Image.Resampling.BICUBIC) if photo else Image.new("L", size, 255)
    across, down = size[0] + GAP, size[1] + GAP
    canvas = Image.new("RGB", (len(columns) * across - GAP, max(map(len, columns)) * down - GAP), "white")
    for column, maps in enumerate(columns):
        for row, values in enumerate(maps):
            canvas.paste(laid_over(below, values), (column * across, row * down))
    return canvas


def to_pil(images: Tensor) -> list[Image.Image]:
    """Generated images (B, 3, H, W) in [0, 1] as pictures, rounded as DiT does."""
    return [Image.fromarray(pixels) for pixels in to_bytes(images).movedim(1, -1).cpu().numpy()]


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images (N, 3, H, W) in [0, 1] as one picture, row by row; the last row may be filled up with black."""
    missing = -len(images) % columns
    filled = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]).unflatten(0, (-1, columns))
    return to_pil(filled.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[None])[0]


def backdrop(image: Any, grid: Sequence[int], sample: int = 0) -> Image.Image:
    """What a map over a grid (rows, columns) is laid over, cropped at its centre to the aspect of the grid.

    Args:
        image: a PIL image; a tensor (3, H, W) or (B, 3, H, W), of which the darkest value becomes black and the
            brightest white; an array (H, W, 3) of bytes; or the path of a file.
        grid: rows and columns.
        sample: index of the image in a batch.

    Raises:
        ValueError: it is none of these; OSError: the file cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        image = read_image(image)
    if isinstance(image, Tensor):
        image = image[sample] if image.ndim == 4 else image
        pixels = image.detach().float().cpu()
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
        image = (255 * pixels).round().byte().movedim(0, -1).numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3:
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError("image must be a PIL image, a tensor (3, H, W), an array (H, W, 3) of bytes, or a file.")
    image = of_user(image)
    aspect = grid[1] / grid[0]
    width, height = min(image.width, image.height * aspect), min(image.height, image.width / aspect)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    shrink = min(1, LARGEST / max(width, height))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    return image.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))


def muted(image: Image.Image) -> Image.Image:
    """The image in greys from dark grey to nearly white: colour means the map, and shows on the darkest photo, too."""
    return image.convert("L").point(lambda value: 64 + 0.7 * value)


def data_url(image: Image.Image, format: str) -> str:
    """The image as a `data:` URL; `format` is "PNG" or "JPEG"."""
    stream = io.BytesIO()
    image.save(stream, format, quality=88)
    return f"data:image/{format.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
