"""From an uploaded file to an upright RGB image: the one place where a visitor's file is opened."""

from pathlib import Path

import gradio as gr
from PIL import Image

from app.runtime.gradio_adapter import upload_folder
from vca.images import upright_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 100_000_000
WORKING_SIDE = 1024


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
    if not Path(path).resolve().is_relative_to(upload_folder()):
        raise ImageError("This file was not uploaded.")
    return Path(path)


def read_image(path: Path) -> Image.Image:
    """Reads an image file as upright 8-bit RGB; very large ones at a reduced size (shorter side 1024 px or more).

    EXIF rotation is applied, transparency flattened on white, of an animation the first frame taken. The size is
    checked in the header, before anything is decoded.

    Raises:
        ImageError: the file is empty, of an unknown format, damaged, or larger than 100 megapixels.
    """
    if not path.is_file() or not path.stat().st_size:
        raise ImageError("This file is empty.")
    try:
        file = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError("This image is too large: the limit is 100 megapixels.") from None
    except Exception:
        raise ImageError("This file is not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image.") from None
    with file:
        if file.width * file.height > MAX_PIXELS:
            megapixels = file.width * file.height / 1e6
            raise ImageError(f"This image is too large: it has {megapixels:.0f} megapixels, the limit is 100.")
        try:
            shrink = WORKING_SIDE / min(file.size)
            if shrink < 1:  # a JPEG is then decoded at a half, a quarter or an eighth of its size
                file.draft(None, (round(file.width * shrink), round(file.height * shrink)))
            file.load()
            image = upright_rgb(file)
        except Exception:
            raise ImageError("This image file is damaged or incomplete.") from None
    return image.reduce(max(1, min(image.size) // WORKING_SIDE))
