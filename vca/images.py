"""From an opened image file to the upright 8-bit sRGB image that models are trained on and shown."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # of other modes: 4
BAND_PIXELS = 4_000_000
LARGEST_PROFILE = 4_000_000
ORIENTATION = 0x0112
BITS, COMPRESSION, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 259, 262, 284, 339  # tags of TIFF, and values of them:
UNCOMPRESSED, SEPARATE_PLANES, UNSIGNED, SIGNED = 1, 2, 1, 2
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, YCBCR = 0, 1, 2, 5, 6
SRGB = ImageCms.createProfile("sRGB")


class UnreadableImage(ValueError):
    """A kind of image that cannot be read. The message is a sentence."""


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file as `upright_rgb` gives it.

    Raises:
        UnreadableImage: it is no image, damaged, or too large for Pillow.
        OSError: there is no such file, or it must not be read.
    """
    try:
        with Image.open(path) as file:
            return upright_rgb(file)
    except UnreadableImage as error:
        raise UnreadableImage(f"{os.fspath(path)}: {error}") from None
    except Exception as error:  # the decoders have no error of their own for what a damaged file may hold
        if getattr(error, "errno", None) is not None:
            raise
        raise UnreadableImage(f"{os.fspath(path)}: not an image that can be read ({error}).") from None


def of_user(image: Image.Image) -> Image.Image:
    """An image that somebody opened or made as `upright_rgb` gives it; plain RGB that is of no file stays as it is."""
    return upright_rgb(image) if image.format or image.mode != "RGB" else image


def bytes_of(file: Image.Image) -> int:
    """Bytes that the pixels of an opened image file take once it is decoded."""
    return file.width * file.height * BYTES_PER_PIXEL.get(file.mode, 4)


def upright_rgb(file: Image.Image, reduce: int = 1) -> Image.Image:
    """An image as upright 8-bit sRGB; one that is that already keeps its bytes.

    EXIF rotation is applied; the colours of an embedded profile, or of a PNG's gamma, are converted to sRGB;
    transparency is flattened on white; of several frames or pages the first is taken. Samples of 16 bits keep their
    scale; greys of more bits, and floats, have no agreed white: the darkest pixel is black, the brightest white.

    Args:
        file: as `PIL.Image.open` gives it.
        reduce: both sides become so many times smaller, each pixel the mean of a square.

    Raises:
        UnreadableImage: a TIFF file with more than 8 bits a channel of a kind that would be read wrongly.
    """
    source = _deep_tiff(file) if file.format == "TIFF" else file
    small = _reduced(source, _to_eight_bits(source), reduce)
    image = _flattened(_to_srgb(small, file.info))
    if (turned := _orientation(file)) in range(2, 9):
        image.getexif()[ORIENTATION] = turned
        image = ImageOps.exif_transpose(image)
    return image


def _orientation(file: Image.Image) -> int | None:
    try:
        return file.getexif().get(ORIENTATION)
    except Exception:  # damaged metadata is no reason to refuse a picture
        return None


# ---- Samples to 8 bits, in bands: what is large is never copied as a whole


def _to_eight_bits(source: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """A function that gives any part of an image in one of the modes L, RGB, RGBA, CMYK and LAB."""
    mode, info = source.mode, source.info
    if mode.startswith("I;16"):
        return lambda part: Image.fromarray((np.asarray(part) >> 8).astype(np.uint8))
    if mode in ("I", "F"):
        low, high = _extremes(source)
        return lambda part: Image.fromarray(_stretched(np.asarray(part), low, high))
    if mode in ("L", "RGB", "RGBA", "CMYK", "LAB") and "transparency" not in info:
        return lambda part: part
    if mode == "1":
        return lambda part: part.convert("L")
    return lambda part: part.convert("RGBA" if source.has_transparency_data else "RGB")


def _extremes(source: Image.Image) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for part in _bands(source, 1):
        values = np.nan_to_num(np.asarray(part, dtype=np.float64))
        low, high = min(low, values.min()), max(high, values.max())
    return low, high


def _stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return ((np.nan_to_num(values.astype(np.float64)) - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8)


def _bands(source: Image.Image, reduce: int) -> Iterator[Image.Image]:
    """The image from top to bottom in parts whose heights, but for the last, are multiples of `reduce`."""
    rows = max(1, BAND_PIXELS // (source.width * reduce)) * reduce
    for top in range(0, source.height, rows):
        part = source.crop((0, top, source.width, min(top + rows, source.height)))
        part.info = source.info
        yield part


def _reduced(source: Image.Image, prepare: Callable[[Image.Image], Image.Image], reduce: int) -> Image.Image:
    size = (-(-source.width // reduce), -(-source.height // reduce))
    parts = (prepare(band) for band in _bands(source, reduce))
    parts = (part.reduce(reduce) if reduce > 1 else part for part in parts)
    whole = next(parts)
    if whole.size == size:
        return whole
    top = whole.height
    whole = whole.crop((0, 0, *size))
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


# ---- Colours


def _to_srgb(image: Image.Image, info: dict) -> Image.Image:
    """An image of the mode L, RGB, RGBA, CMYK or LAB in sRGB; transparency stays."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colors = image.convert("RGB") if alpha else image
    profile = info.get("icc_profile")
    converted = None
    if image.mode == "LAB":
        converted = ImageCms.profileToProfile(colors, ImageCms.createProfile("LAB"), SRGB, outputMode="RGB")
    elif profile and len(profile) <= LARGEST_PROFILE:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a damaged profile says nothing
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                colors, given, SRGB, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
            )
    elif "srgb" not in info and 0.1 < (gamma := info.get("gamma") or 0) < 10 and abs(gamma * 2.2 - 1) > 0.02:
        converted = colors.convert("RGB").point(3 * _srgb_of_gamma(gamma))
    colors = (colors if converted is None else converted).convert("RGB")
    if alpha:
        colors.putalpha(alpha)
    return colors


def _srgb_of_gamma(gamma: float) -> list[int]:
    """The sRGB levels of the levels 0 to 255 of a PNG file with this gamma."""
    light = (np.arange(256) / 255) ** (1 / gamma)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * levels).round().astype(int).tolist()


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# ---- TIFF of which Pillow reads some wrongly and others not at all: deep or signed samples, floats, YCbCr


def _deep_tiff(file: Any) -> Image.Image:
    """A TIFF file's image with 8 bits, if Pillow does not read it as 8-bit samples that mean what they say."""
    tags = file.tag_v2
    bits, formats = (max(np.atleast_1d(tags.get(tag, 1))) for tag in (BITS, SAMPLE_FORMAT))
    uncompressed = tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
    if bits <= 8 and formats == UNSIGNED and not (uncompressed and tags.get(PHOTOMETRIC) == YCBCR):
        return file
    if uncompressed:
        file.fp.seek(0)
        return read_tiff(file.fp, bytes_of(file))
    if len(file.getbands()) > 1 and tags.get(PLANAR) == SEPARATE_PLANES:
        raise UnreadableImage("A compressed TIFF image with more than 8 bits in separate planes cannot be read.")
    kind = tags.get(PHOTOMETRIC)
    if file.mode == "L" and formats == SIGNED:
        return Image.fromarray(_toned(np.asarray(file).view(np.int8), BLACK_IS_ZERO))  # Pillow has inverted it
    if file.mode == "I" and formats == UNSIGNED and bits == 32:
        return Image.fromarray(_toned(np.asarray(file).view(np.uint32), kind))
    if file.mode in ("I", "F", "I;16", "I;16B") and kind == WHITE_IS_ZERO:
        return Image.fromarray(_toned(np.asarray(file), kind))
    return file


def read_tiff(file: Any, most_bytes: int) -> Image.Image:
    """The first page of an uncompressed TIFF file with 8 bits, whatever samples it has.

    Raises:
        UnreadableImage: it is compressed, takes more than `most_bytes`, or is neither grey, RGB, YCbCr nor CMYK.
    """
    from tifffile import TiffFile

    with TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        kind, channels = page.photometric, page.samplesperpixel
        known = {WHITE_IS_ZERO: (1, 2), BLACK_IS_ZERO: (1, 2), RGB: (3, 4), CMYK: (4,), YCBCR: (3,)}
        if page.compression != UNCOMPRESSED or channels not in known.get(kind, ()) or page.nbytes > 4 * most_bytes:
            raise UnreadableImage("This kind of TIFF image cannot be read.")
        samples = page.asarray()
    if channels > 1 and page.planarconfig == SEPARATE_PLANES:
        samples = np.moveaxis(samples, 0, -1)
    mode = {CMYK: "CMYK", YCBCR: "YCbCr"}.get(kind) or {2: "LA", 4: "RGBA"}.get(channels)
    return Image.fromarray(_toned(samples, kind), mode)


def _toned(samples: np.ndarray, kind: int) -> np.ndarray:
    """Samples of a photometric kind as 8 bits from black to white."""
    rows = max(1, BAND_PIXELS // samples[0].size)
    bands = [samples[top : top + rows] for top in range(0, len(samples), rows)]
    if samples.dtype.kind in "iu" and samples.dtype.itemsize <= 2:
        levels = [_scaled(band) for band in bands]
    else:
        low, high = min(np.nan_to_num(band).min() for band in bands), max(np.nan_to_num(band).max() for band in bands)
        if samples.ndim == 3 and low >= 0 and high <= 1:  # colours are from 0 to 1
            low, high = 0, 1
        levels = [_stretched(band, float(low), float(high)) for band in bands]
    toned = np.concatenate(levels)
    return 255 - toned if kind == WHITE_IS_ZERO else toned


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Integers of 8 or 16 bits as unsigned ones of 8 bits."""
    bits = 8 * samples.dtype.itemsize
    return (samples.astype(np.int32) + (1 << bits - 1 if samples.dtype.kind == "i" else 0) >> bits - 8).astype(np.uint8)
