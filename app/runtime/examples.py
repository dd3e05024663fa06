"""Example images, and which of them belong to a model: those that it gets right, and one that it gets wrong.

What a model of `weights/` says of them is kept beside it, so that the app need not ask it at its start. A kept answer
holds for the weights and the image file that it was given for, by their sha256, and for no others.
"""

import atexit
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import skimage.data
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import nn

from app.runtime import records
from app.runtime.assets import STATIC
from app.runtime.folders import new_folder
from app.runtime.gradio_adapter import bundled_image
from app.runtime.images import read_image
from app.runtime.limits import heavy_work
from app.runtime.loading import WEIGHTS
from vca import preprocessing
from vca.checkpoint import sha256, write_atomically

KEPT = "examples.json"
SHOWN = 8  # examples that a model gets right, at most
SIDE = 640


@dataclass(frozen=True)
class Example:
    """An image that comes with the app.

    Attributes:
        name: how links call it.
        title: what it shows, in words.
        path: its file.
        right: the names that a class of this image may have, in lower case.
    """

    name: str
    title: str
    path: Path
    right: frozenset[str]

    def fits(self, label: str) -> bool:
        """Whether a label, such as "lion" or ImageNet's "lion, king of beasts", is right for this image."""
        return not self.right.isdisjoint(label.lower().split(", "))


@dataclass(frozen=True)
class Answer:
    """What a model says of an example: its label and probability, and whether that is right."""

    example: Example
    label: str
    probability: float
    is_right: bool


@dataclass(frozen=True)
class Chosen:
    """The examples of a model: those it gets right, surest first, and one mistake, if it makes it."""

    right: list[Answer] = field(default_factory=list)
    mistake: Answer | None = None


def _photos() -> dict[str, tuple[str, Image.Image, set[str]]]:
    """Pictures of scikit-image, gradio and matplotlib: what they show, and the labels that are right."""
    return {
        "lion": ("a lion", Image.open(bundled_image("lion.jpg")), {"lion"}),
        "cat": (
            "a cat",
            Image.fromarray(skimage.data.cat()),
            {"cat", "tabby", "tabby cat", "tiger cat", "egyptian cat"},
        ),
        "motorcycle": (
            "a motorcycle",
            Image.fromarray(skimage.data.stereo_motorcycle()[0]),
            {"motorcycle", "motor scooter", "moped"},
        ),
        "coffee": ("a cup of espresso", Image.fromarray(skimage.data.coffee()), {"espresso", "cup"}),
        "hopper": (
            "Grace Hopper",
            Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)),
            {"person", "military uniform"},
        ),
        "galaxies": ("galaxies", Image.fromarray(skimage.data.hubble_deep_field()), {"galaxies", "galaxy"}),
        "rocket": ("a rocket", Image.fromarray(skimage.data.rocket()), {"rocket", "missile", "projectile"}),
    }


MISTAKES = ("galaxies", "rocket")  # those that may be shown as one, in this order
GENERATED = sorted((STATIC / "examples").glob("*.png"))
# The first picture of each class of `training.sample CHECKPOINT --count 10 --guidance 3`, by a cifar10_sit_vca.
SAME = {"airplane": {"airliner"}, "automobile": {"car"}}  # other names of these classes


@cache
def examples() -> dict[str, Example]:
    """All examples by name: the photos, written as JPEG files into a temporary folder, then generated pictures."""
    folder = new_folder("examples")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = {}
    for name, (title, image, right) in _photos().items():
        image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE))
        path = folder / f"{name}.jpg"
        image.save(path, quality=92)
        found[name] = Example(name, title, path, frozenset(right))
    for path in GENERATED:
        label = path.stem.removeprefix("generated-")
        found[path.stem] = Example(path.stem, f"a generated {label}", path, frozenset({label} | SAME.get(label, set())))
    return found


def chosen_for(label_names: list[str], answer: Callable[[Example], Answer]) -> Chosen:
    """What `answer` says of the examples whose class a model knows, and of those that may be a mistake."""
    known = [e for e in examples().values() if any(map(e.fits, label_names))]
    right = sorted((a for a in map(answer, known) if a.is_right), key=lambda a: -a.probability)
    if not right:
        return Chosen()
    candidates = (answer(examples()[name]) for name in MISTAKES)
    return Chosen(right[:SHOWN], next((a for a in candidates if not a.is_right), None))


def ask(model: nn.Module, example: Example) -> Answer:
    """Runs a classifier on an example."""
    with heavy_work():
        x = preprocessing.preprocess(model, read_image(example.path))
        probabilities = records.classify(model, x)
    best = int(np.argmax(probabilities))
    return _answer(example, model.label_names[best], float(probabilities[best]))


def kept(folder: Path) -> dict[str, Answer]:
    """The answers that are kept in a checkpoint folder, by example, as far as they are of its weights and our files."""
    try:
        content = json.loads((folder / KEPT).read_text(encoding="utf-8"))
        if content["weights_sha256"] != sha256(folder / WEIGHTS):
            return {}
        found = {
            name: _answer(examples()[name], str(answer["label"]), float(answer["probability"]))
            for name, answer in content["answers"].items()
            if name in examples() and answer["sha256"] == sha256(examples()[name].path)
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return found


def keep(folder: Path, model: nn.Module) -> None:
    """Asks a classifier about all examples, and keeps its answers in its folder."""
    answers = {name: ask(model, example) for name, example in examples().items()}
    described = {
        name: dict(label=a.label, probability=round(a.probability, 6), sha256=sha256(a.example.path))
        for name, a in answers.items()
    }
    content = dict(weights_sha256=sha256(folder / WEIGHTS), answers=described)
    write_atomically(folder / KEPT, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def _answer(example: Example, label: str, probability: float) -> Answer:
    return Answer(example, label, probability, example.fits(label))
