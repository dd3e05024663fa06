"""Files that come with the app: scripts, styles and templates of the page, and example images."""

import atexit
import json
import re
import shutil
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import skimage.data
from PIL import Image

from app.runtime.folders import new_folder
from app.runtime.gradio_adapter import bundled_image

IMPORT = re.compile(r'^import .* from "\./([\w.]+)";$', re.MULTILINE)
STATIC = Path(__file__).parents[1] / "static"
PHOTOS = {  # of classes that the photo model knows
    "cat": lambda: Image.fromarray(skimage.data.cat()),
    "lion": lambda: Image.open(bundled_image("lion.jpg")),
    "motorcycle": lambda: Image.fromarray(skimage.data.stereo_motorcycle()[0]),
    "coffee": lambda: Image.fromarray(skimage.data.coffee()),
}

# The first picture of each class by `python -m training.sample weights/vca_sit_xs_4_cifar10 --count 10 --guidance 3`.
GENERATED = sorted(map(str, (STATIC / "examples").glob("*.png")))


def example_files() -> list[str]:
    """Paths of the photos, then of the generated pictures."""
    return [*_write_photos(), *GENERATED]


@cache
def _write_photos() -> tuple[str, ...]:
    """Writes pictures that come with scikit-image and gradio as small JPEG files into a temporary folder."""
    folder = new_folder("examples")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = []
    for name, load in PHOTOS.items():
        image = load().convert("RGB")
        image.thumbnail((640, 640))
        paths.append(str(folder / f"{name}.jpg"))
        image.save(paths[-1], quality=92)
    return tuple(paths)


def text(*names: str) -> str:
    """The text of files of `app/static/`, one after another."""
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in names)


def modules(entry: str) -> list[tuple[str, str]]:
    """Name and source of an ES module of `app/static/` and of all that it imports; imported ones come first.

    Raises:
        graphlib.CycleError: modules import each other in a circle.
    """
    sources: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        if (name := waiting.pop()) not in sources:
            sources[name] = text(name)
            waiting += IMPORT.findall(sources[name])
    order = TopologicalSorter({name: IMPORT.findall(source) for name, source in sources.items()}).static_order()
    return [(name, sources[name]) for name in order]


def script(entry: str) -> str:
    """JavaScript that mounts an ES module of `app/static/`: the body of a function of gr.HTML's `js_on_load`."""
    sources = json.dumps(modules(entry)).replace("<", "\\u003c")  # it may stand in a <script> of a page
    return f"const MODULES = {sources};\n{text('load.js')}"
