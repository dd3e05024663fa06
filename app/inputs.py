"""The inputs that tabs have in common: an image with examples, and a choice of checkpoint."""

import tempfile
from pathlib import Path

import gradio as gr
import skimage.data
from PIL import Image

from app.models import Checkpoints

EXAMPLES = {
    "cat": skimage.data.cat,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "rocket": skimage.data.rocket,
    "coffee": skimage.data.coffee,
    "astronaut": skimage.data.astronaut,
}


def write_examples() -> list[str]:
    """Writes scikit-image's bundled pictures as small JPEG files into a new temporary folder; returns their paths."""
    folder = Path(tempfile.mkdtemp(prefix="vca-examples-"))
    paths = []
    for name, load in EXAMPLES.items():
        image = Image.fromarray(load())
        image.thumbnail((640, 640))
        paths.append(str(folder / f"{name}.jpg"))
        image.save(paths[-1], quality=92)
    return paths


def image_and_model(checkpoints: Checkpoints, examples: list[str], height: int) -> tuple[gr.Image, gr.Dropdown]:
    """An image with examples, and a choice of checkpoint.

    Functions that take the image should be registered with `preprocess=False`, so that they get the uploaded file and
    gradio does not decode it first; `images.uploaded_file` and `images.read_image` read it.
    """
    image = gr.Image(
        type="filepath",
        image_mode=None,
        label="Image",
        sources=["upload", "webcam", "clipboard"],
        buttons=[],
        height=height,
    )
    first = checkpoints.classifiers[0] if checkpoints.classifiers else None
    model = gr.Dropdown(checkpoints.classifiers, label="Model", value=first, elem_classes="vca-model")
    gr.Examples(examples, image, label="Examples", api_visibility="private")
    return image, model
