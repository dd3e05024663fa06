"""Files that come with the app: scripts, styles and templates of the page, and example images."""

import tempfile
from pathlib import Path

import skimage.data
from PIL import Image

MAP_SCRIPTS = ("maps.js", "map_drawing.js", "map_figure.js", "map_words.js")  # what all pages that draw maps share
EXPLORER_SCRIPTS = (*MAP_SCRIPTS, "explorer.js", "explorer_controls.js", "explorer_saving.js")
COMPARE_SCRIPTS = (*MAP_SCRIPTS, "compare.js", "compare_drawing.js", "compare_controls.js")
STATIC = Path(__file__).parents[1] / "static"
PHOTOS = {
    "cat": skimage.data.cat,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "rocket": skimage.data.rocket,
    "coffee": skimage.data.coffee,
    "astronaut": skimage.data.astronaut,
}


# The first picture of each class by `python -m training.sample weights/vca_sit_xs_4_cifar10 --count 10 --guidance 3`.
GENERATED = sorted(map(str, (STATIC / "examples").glob("*.png")))


def example_files() -> list[str]:
    """Paths of the photos, then of the generated pictures."""
    return [*_write_photos(), *GENERATED]


def _write_photos() -> list[str]:
    """Writes scikit-image's bundled pictures as small JPEG files into a new temporary folder; returns their paths."""
    folder = Path(tempfile.mkdtemp(prefix="vca-examples-"))
    paths = []
    for name, load in PHOTOS.items():
        image = Image.fromarray(load())
        image.thumbnail((640, 640))
        paths.append(str(folder / f"{name}.jpg"))
        image.save(paths[-1], quality=92)
    return paths


def text(*names: str) -> str:
    """The text of files of `app/static/`, one after another."""
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in names)
