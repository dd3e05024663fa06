"""Pictures and files that nobody expects."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from tests.helpers.app import photo

NOT_AN_IMAGE = "This file is not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image."


DAMAGED = "This image file is damaged or incomplete."


TRANSPOSED = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def assert_one_line(text: str, words: str) -> None:
    assert words in text
    assert "Traceback" not in text and "\n" not in text.strip() and len(text) < 1000, text


PHOTO = photo(120, 90, seed=1)


GRAY = PHOTO.convert("L")


RAMP = Image.fromarray(np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1)))


DEEP = Image.fromarray(np.asarray(RAMP).astype(np.uint16) * 257)


FEW = PHOTO.quantize(255).convert("RGB")


LEFT = Image.new("L", PHOTO.size, 0)


LEFT.paste(255, (0, 0, 60, 90))  # opaque on the left


ON_WHITE, FEW_ON_WHITE = (Image.composite(i, Image.new("RGB", i.size, "white"), LEFT) for i in (PHOTO, FEW))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def animated(format: str, **options) -> bytes:
    frames = [Image.new("RGB", PHOTO.size, color) for color in ("red", "lime")]
    return encoded(PHOTO, format, save_all=True, append_images=frames, **options)


def turned(orientation: int) -> bytes:
    """The photo as a camera held another way stores it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    way = TRANSPOSED[orientation]
    stored = PHOTO if way is None else PHOTO.transpose(way)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(stored, "PNG", exif=exif)))).size == PHOTO.size
    return encoded(stored, "JPEG", exif=exif, quality=95)


def translucent() -> Image.Image:
    image = PHOTO.convert("RGBA")
    image.putalpha(LEFT)
    return image


def palette() -> Image.Image:
    """The photo in palette colours, and a last one, to be transparent, on the right half."""
    image = PHOTO.quantize(255)
    image.putpalette([*image.getpalette(), 255, 0, 255])
    image.paste(255, (60, 0, 120, 90))
    return image


def header_bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


PICTURES: dict[str, tuple[Callable[[], bytes], Image.Image | str]] = {
    "photo.png": (lambda: encoded(PHOTO, "PNG"), PHOTO),
    "photo.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95), PHOTO),
    "progressive.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95, progressive=True), PHOTO),
    "photo.webp": (lambda: encoded(PHOTO, "WEBP", lossless=True), PHOTO),
    "photo.bmp": (lambda: encoded(PHOTO, "BMP"), PHOTO),
    "photo.tiff": (lambda: encoded(PHOTO, "TIFF"), PHOTO),
    "a png named.jpg": (lambda: encoded(PHOTO, "PNG"), PHOTO),
    "no extension": (lambda: encoded(PHOTO, "PNG"), PHOTO),
    "größe <b>&amp; 'ä'.png": (lambda: encoded(PHOTO, "PNG"), PHOTO),
    "damaged profile.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95, icc_profile=b"no profile"), PHOTO),
    "damaged exif.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), PHOTO),
    "animated.gif": (lambda: animated("GIF"), FEW),
    "animated.webp": (lambda: animated("WEBP", lossless=True), PHOTO),
    "animated.png": (lambda: animated("PNG"), PHOTO),
    "cmyk.jpg": (lambda: encoded(PHOTO.convert("CMYK"), "JPEG", quality=95), PHOTO),
    "cmyk.tiff": (lambda: encoded(PHOTO.convert("CMYK"), "TIFF"), PHOTO),
    "grey.jpg": (lambda: encoded(GRAY, "JPEG", quality=95), GRAY),
    "grey with alpha.png": (lambda: encoded(Image.merge("LA", (GRAY, LEFT)), "PNG"), ON_WHITE.convert("L")),
    "black and white.tiff": (lambda: encoded(LEFT.convert("1"), "TIFF"), LEFT),
    "16 bit.png": (lambda: encoded(DEEP, "PNG"), RAMP),
    "16 bit.tiff": (lambda: encoded(DEEP, "TIFF"), RAMP),
    "16 bit with a transparent tone.png": (lambda: encoded(DEEP, "PNG", transparency=7), RAMP),
    "32 bit.tiff": (lambda: encoded(Image.fromarray(np.asarray(RAMP).astype(np.int32) * 9000), "TIFF"), RAMP),
    "floats.tiff": (lambda: encoded(Image.fromarray(np.asarray(RAMP) / np.float32(999)), "TIFF"), RAMP),
    "palette.png": (lambda: encoded(PHOTO.quantize(255), "PNG"), FEW),
    "transparent palette.png": (lambda: encoded(palette(), "PNG", transparency=255), FEW_ON_WHITE),
    "transparent palette.gif": (lambda: encoded(palette(), "GIF", transparency=255), FEW_ON_WHITE),
    "transparent.png": (lambda: encoded(translucent(), "PNG"), ON_WHITE),
    "transparent.webp": (lambda: encoded(translucent(), "WEBP", lossless=True), ON_WHITE),
    **{f"exif {way}.jpg": (lambda way=way: turned(way), PHOTO) for way in TRANSPOSED},
    "1x1.png": (lambda: encoded(Image.new("RGB", (1, 1), "teal"), "PNG"), Image.new("RGB", (1, 1), "teal")),
    "wide.png": (lambda: encoded(photo(20_000, 3), "PNG"), photo(20_000, 3)),
    "tall.png": (lambda: encoded(photo(1, 20_000), "PNG"), photo(1, 20_000)),
    "30 MB.bmp": (lambda: encoded(photo(3200, 3200), "BMP"), photo(3200, 3200)),
    "30 MB behind the picture.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95) + bytes(30_000_000), PHOTO),
    "empty.png": (lambda: b"", "This file is empty."),
    "text.png": (lambda: b"hello, I am not a picture", NOT_AN_IMAGE),
    "zeros.jpg": (lambda: bytes(4096), NOT_AN_IMAGE),
    "page.html": (lambda: b"<!doctype html><img src=x onerror=alert(1)>", NOT_AN_IMAGE),
    "drawing.svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", NOT_AN_IMAGE),
    "drawing.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", NOT_AN_IMAGE),
    "script.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", NOT_AN_IMAGE),
    "paper.pdf": (lambda: encoded(PHOTO, "PDF"), NOT_AN_IMAGE),
    "icon.ico": (lambda: encoded(PHOTO, "ICO"), NOT_AN_IMAGE),
    "archive.webp": (lambda: b"PK\x03\x04" + bytes(100), NOT_AN_IMAGE),
    "header only.gif": (lambda: b"GIF89a", NOT_AN_IMAGE),
    "truncated.jpg": (lambda: encoded(photo(400, 300), "JPEG")[:4000], DAMAGED),
    "truncated.png": (lambda: encoded(photo(400, 300), "PNG")[:4000], DAMAGED),
    "truncated.webp": (lambda: encoded(photo(400, 300), "WEBP", lossless=True)[:4000], DAMAGED),
    "truncated.bmp": (lambda: encoded(photo(400, 300), "BMP")[:4000], DAMAGED),
    "bomb.png": (lambda: header_bomb(20_000, 20_000), "This image is too large: the limit is 100 megapixels."),
    "small bomb.png": (lambda: header_bomb(13_000, 13_000), "it has 169 megapixels, the limit is 100."),
    "1 bit bomb.png": (lambda: encoded(Image.new("1", (10_001, 10_000)), "PNG"), "megapixels, the limit is 100."),
}
