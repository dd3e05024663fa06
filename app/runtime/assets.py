"""Files that come with the app: scripts, styles and templates of its tabs, and example images."""

import atexit
import shutil
from functools import cache, partial
from pathlib import Path

import skimage.data
from PIL import Image

from app.runtime.folders import new_folder
from app.runtime.gradio_adapter import bundled_image
from vca.explorer import assets

STATIC = Path(__file__).parents[1] / "static"
FOLDERS = (STATIC, assets.STATIC)
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


text = partial(assets.text, folders=FOLDERS)
script = partial(assets.script, folders=FOLDERS)
