"""From an uploaded file to an upright RGB image: the one place where a visitor's file is opened."""

import io
import re
from math import ceil, sqrt
from pathlib import Path

import gradio as gr
from PIL import Image

from app.runtime.gradio_adapter import upload_folder
from app.runtime.limits import heavy_work
from vca.images import UnreadableImage, bytes_of, read_tiff, upright_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 100_000_000
MAX_BYTES = 400_000_000  # while it is decoded
WORKING_SIDE = 1024
COPIES = {"TIFF": 2, "WEBP": 3, "AVIF": 3}  # that the decoder of a format makes of all pixels
WORKING_PIXELS, LONGEST_SIDE = 16_000_000, 60_000
NO_IMAGE = "This file is not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image."
DAMAGED = "This image file is damaged or incomplete."
HEIC = "This is an HEIC image, which cannot be read here. Please save it as JPEG; phones do so when they share a photo."
TIFF = "This kind of TIFF image cannot be read here, or the file is damaged. Please save it with 8 bits a channel."
BEGINNINGS = {  # of files that cannot be opened, and what is said of them
    rb"II\*\0|MM\0\*": TIFF,
    rb"RIFF....WEBP|\xff\xd8\xff|\x89PNG\r\n": DAMAGED,
    rb"....ftypavi[fs]": DAMAGED,
    rb"....ftyp(hei|hev|mif1|msf1)": HEIC,
}
END_OF_JPEG = b"\xff\xd9"


class ImageError(gr.Error):
    """A file that is not a usable image. The message is a sentence for the visitor."""

    def __init__(self, message: str):
        super().__init__(message, title="Image", print_exception=False)


def uploaded_file(upload: dict | None) -> Path:
    """The path of what a visitor uploaded: of the file record that gradio hands to a function with `preprocess=False`.

    Raises:
        ImageError: there is no upload, or the path is not one of gradio's uploaded files.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    if not isinstance(path, str):
        raise ImageError("No image was uploaded. From Python, pass gradio_client.handle_file(path).")
    try:
        inside = Path(path).resolve().is_relative_to(upload_folder())
    except (ValueError, OSError, RuntimeError):  # no path that a system could have
        inside = False
    if not inside:
        raise ImageError("This file was not uploaded.")
    return Path(path)


def read_image(path: Path) -> Image.Image:
    """Reads an image file as upright 8-bit sRGB; large ones at a reduced size (shorter side 1024 px or more).

    The colours are those of `vca.images.upright_rgb`. What decoding takes is known from the header, and what takes too
    much is refused before anything is decoded.

    Raises:
        ImageError: the file is empty, of an unknown format, damaged, larger than 100 megapixels, or takes more than
            400 MB to decode.
    """
    if not path.is_file() or not path.stat().st_size:
        raise ImageError("This file is empty.")
    with heavy_work():
        try:
            return _read(path)
        except UnreadableImage:
            raise ImageError(TIFF) from None
        except Image.DecompressionBombError:
            raise ImageError("This image is too large: the limit is 100 megapixels.") from None


def _read(path: Path) -> Image.Image:
    try:
        file = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise
    except Exception:
        return _read_unopened(path)
    with file:
        if file.width * file.height > MAX_PIXELS:
            megapixels = file.width * file.height / 1e6
            raise ImageError(f"This image is too large: it has {megapixels:.0f} megapixels, the limit is 100.")
        reduce = _draft(file)
        try:
            return upright_rgb(file, reduce)
        except UnreadableImage:
            raise
        except Exception:
            if file.format == "JPEG" and (image := _whole_jpeg(path)):
                return image
            raise ImageError(DAMAGED) from None


def _draft(file: Image.Image) -> int:
    """By how much an image is to be reduced; a JPEG is told to decode at a half, a quarter or an eighth of its size.

    Raises:
        ImageError: decoding would take too much.
    """
    progressive = file.width * file.height * 6 if "progressive" in file.info else 0  # its coefficients
    if (shrink := WORKING_SIDE / min(file.size)) < 1:
        file.draft(None, (round(file.width * shrink), round(file.height * shrink)))
    if (needed := bytes_of(file) * COPIES.get(file.format, 1) + progressive) > MAX_BYTES:
        raise ImageError(f"This image is too large: decoding it takes {needed / 1e6:.0f} MB, the limit is 400 MB.")
    pixels = file.width * file.height
    return max(
        1, min(file.size) // WORKING_SIDE, ceil(sqrt(pixels / WORKING_PIXELS)), ceil(max(file.size) / LONGEST_SIDE)
    )


def _read_unopened(path: Path) -> Image.Image:
    """A file that Pillow does not open: an unusual TIFF file, or else a refusal that says what it is."""
    with open(path, "rb") as stream:
        start = stream.read(32)
    said = next((words for pattern, words in BEGINNINGS.items() if re.match(pattern, start, re.DOTALL)), NO_IMAGE)
    if said == TIFF:
        try:
            image = read_tiff(path, MAX_BYTES // 16)
            return upright_rgb(image, max(1, min(image.size) // WORKING_SIDE))
        except Exception:
            raise ImageError(TIFF) from None
    raise ImageError(said)


def _whole_jpeg(path: Path) -> Image.Image | None:
    """A JPEG that lacks nothing but the marker at its end, or None.

    The decoder fills what is missing by what follows: where nothing is, the image does not depend on that.
    """
    content = path.read_bytes()
    images = []
    for tail in (b"", bytes(64), b"\x5a" * 64):
        try:
            with Image.open(io.BytesIO(content + tail + END_OF_JPEG), formats=["JPEG"]) as file:
                images.append(upright_rgb(file, _draft(file)))
        except Exception:
            return None
    return images[0] if all(image.tobytes() == images[0].tobytes() for image in images) else None
