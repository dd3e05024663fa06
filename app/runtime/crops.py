"""A part of a photo that its visitor chose: a file of its own, which says of which photo it is a part."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from torch import nn

from app.runtime.gradio_adapter import kept_file, upload_folder
from app.runtime.images import ImageError, read_image, uploaded_file
from app.runtime.validation import refused
from vca import preprocessing

UNITS = 1000  # into which a photo's width and height are divided
SMALLEST = 20  # units
WHOLE = 0, 0, UNITS, UNITS
MARK = b"part of "  # how the comment of such a file begins

Box = tuple[int, int, int, int]  # left, top, right, bottom, in UNITS


def part_of(path: Path, box: Box) -> Path:
    """The file of a part of a photo; the photo's own, if the part is the whole.

    Raises:
        ImageError: as `read_image`.
    """
    if not path.resolve().is_relative_to(upload_folder()):  # an example
        path = Path(kept_file(path.read_bytes(), path.name))
    if box == WHOLE:
        return path
    image = read_image(path)
    left, top, right, bottom = (edge * side / UNITS for edge, side in zip(box, image.size * 2, strict=True))
    part = image.crop((round(left), round(top), max(round(left) + 1, round(right)), max(round(top) + 1, round(bottom))))
    origin = path.resolve().relative_to(upload_folder()).as_posix()
    stream = io.BytesIO()
    part.save(stream, "JPEG", quality=95, subsampling=0, comment=MARK + json.dumps([origin, box]).encode())
    return Path(kept_file(stream.getvalue(), "part.jpg"))


def origin_of(path: Path) -> tuple[Path, Box]:
    """The photo that a file is a part of, and which; the file itself, if it is no part or the photo is gone."""
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            comment = image.info.get("comment", b"")
        if not comment.startswith(MARK):
            return path, WHOLE
        name, box = json.loads(comment.removeprefix(MARK))
        origin = uploaded_file(dict(path=str(upload_folder() / name)))
        return (origin, box_of(box)) if origin.is_file() else (path, WHOLE)
    except (OSError, ValueError, TypeError, SyntaxError, ImageError, RecursionError, Image.DecompressionBombError):
        return path, WHOLE


def box_of(values) -> Box:
    """A box of whole numbers. Raises a ValueError or a TypeError if it is none, or too small."""
    left, top, right, bottom = box = tuple(map(int, values))
    if not (0 <= left <= right - SMALLEST and right <= UNITS and 0 <= top <= bottom - SMALLEST and bottom <= UNITS):
        raise ValueError(f"no box: {box}")
    return box


def seen_in(model: nn.Module, size: tuple[int, int], box: Box) -> list[float]:
    """What a model sees of a part of a photo of this size: left, top, right and bottom, from 0 to 1 of the photo."""
    width, height = size
    left, top, right, bottom = (edge / UNITS for edge in box)
    part = SimpleNamespace(width=(right - left) * width, height=(bottom - top) * height)
    edges = preprocessing.crop_box(model, part)
    start, sides = (left, top) * 2, (width, height) * 2
    return [min(1.0, max(0.0, s + edge / side)) for s, edge, side in zip(start, edges, sides, strict=True)]


def box_seen_as(model: nn.Module, size: tuple[int, int], wanted) -> Box:
    """The part of a photo of which a model sees what is `wanted`, as far as the photo reaches.

    Args:
        model: a classifier.
        size: the photo's width and height.
        wanted: left, top, right and bottom, from 0 to 1.

    Raises:
        gr.Error: that is no part of a photo, or too small.
    """
    try:
        edges = [float(edge) for edge in wanted]
        if len(edges) != 4 or not all(map(math.isfinite, edges)):
            raise ValueError
        box = box_of(round(UNITS * edge) for edge in edges)
    except (TypeError, ValueError, OverflowError):
        raise refused("This is not a part of the photo, or it is too small.") from None
    seen = seen_in(model, size, box)
    found = [0, 0, 0, 0]
    for axis in (0, 1):
        start, end = box[axis] / UNITS, box[axis + 2] / UNITS
        more = (end - start) / max(seen[axis + 2] - seen[axis], 1 / UNITS)  # a model may see the middle alone
        half = min(1.0, (end - start) * more) / 2
        middle = min(max((start + end) / 2, half), 1 - half)
        found[axis], found[axis + 2] = round(UNITS * (middle - half)), round(UNITS * (middle + half))
    return box_of(found)
