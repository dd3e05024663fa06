"""From an opened image file to the upright 8-bit RGB image that models are trained on and shown."""

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(file: Image.Image) -> Image.Image:
    """An image as upright 8-bit RGB; one that is plain 8-bit RGB already keeps its bytes.

    EXIF rotation is applied, transparency flattened on white, of an animation the first frame taken.
    """
    return _to_rgb(_upright(file))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata is no reason to refuse a picture
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):  # no agreed white: the brightest pixel is white
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        values -= values.min()
        image = Image.fromarray((values * (255 / max(values.max(), 1e-12))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
