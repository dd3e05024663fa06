"""The photo and the model of the page, which all tabs share, and the examples that belong to the model."""

import json
from pathlib import Path

import gradio as gr

from app.components import ModelChoice, page_part
from app.cropping import CropBox
from app.runtime.checkpoints import Checkpoints
from app.runtime.examples import Answer, Chosen, Example, ask, chosen_for, examples, kept
from app.runtime.images import read_image
from app.runtime.validation import refused, told
from vca import drawing

TILE = 200  # pixels
OTHERS = 4  # examples shown of each other model, at most


class Gallery:
    """The examples of every model of `weights/`; those of another model are found when it is chosen."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self._chosen: dict[str, Chosen] = {}

    def chosen(self, name: str | None) -> Chosen:
        """The examples that a model gets right, and its mistake."""
        if name is None:
            return Chosen()
        if name not in self._chosen:
            answers = kept(self.checkpoints.folders[name]) if name in self.checkpoints.folders else {}
            try:
                chosen = chosen_for(
                    self._labels(name), lambda e: answers.get(e.name) or ask(self.checkpoints.load(name), e)
                )
            except gr.Error:  # a damaged checkpoint: the tabs say so
                return Chosen()
            if name not in (*self.checkpoints.classifiers, *self.checkpoints.finer):  # a visitor's own: not kept
                return chosen
            self._chosen[name] = chosen
        return self._chosen[name]

    def first(self, name: str | None) -> Example | None:
        """The example that the page opens on: the surest answer of a model."""
        right = self.chosen(name).right
        return right[0].example if right else None

    def tiles(self, name: str | None) -> str:
        """What the page draws, as JSON: the tiles of a model, and those of others."""
        if name is not None and not isinstance(name, str):
            raise refused("model must be a text.")
        chosen = self.chosen(name)
        mine = [self._tile(a.example, name, _says(a)) for a in chosen.right]
        if chosen.mistake:
            mine.append(
                self._tile(chosen.mistake.example, name, _says(chosen.mistake), self._why(name, chosen.mistake))
            )
        if not mine:
            mine = [self._tile(example, name, "") for example in examples().values() if example.path.suffix == ".jpg"]
        shown = {tile["name"] for tile in mine}
        others = []
        for other in self.checkpoints.classifiers:
            if other != name and "/" not in other:
                new = [a for a in self.chosen(other).right if a.example.name not in shown][:OTHERS]
                shown |= {a.example.name for a in new}
                others += [self._tile(a.example, other, _says(a)) for a in new]
        return json.dumps(dict(mine=mine, others=others, isKnown=bool(chosen.right)))

    def _labels(self, name: str) -> list[str]:
        configs = self.checkpoints.configs
        return configs[name]["label_names"] if name in configs else self.checkpoints.load(name).label_names

    def _tile(self, example: Example, model: str | None, says: str, why: str = "") -> dict:
        of = self.checkpoints.title(model) if model else ""
        shown = dict(title=example.title, says=says, why=why, of=of, url=_thumbnail(example.path))
        return shown | dict(name=example.name, model=model)

    def _why(self, name: str, mistake: Answer) -> str:
        labels = self._labels(name)
        title = mistake.example.title
        if any(map(mistake.example.fits, labels)):
            return f"A mistake: it knows what {title} looks like from other photos, and is wrong about this one."
        said = f"{mistake.label} {mistake.probability:.0%}"
        return f"A mistake: none of its {len(labels)} classes is right for {title}, and it must name one: {said}."


def build(checkpoints: Checkpoints, choice: ModelChoice) -> tuple[gr.Image, gr.Dropdown, CropBox]:
    """Builds the photo, its crop box, its examples and the choice of model."""
    gallery = Gallery(checkpoints)
    name = next(iter(checkpoints.classifiers), None)
    first = gallery.first(name)

    def pick(event: gr.EventData, model: str) -> tuple:
        example, wanted = told(event, "name"), told(event, "model")
        if not isinstance(example, str) or example not in examples():
            raise refused("This is not an example of this page.")
        other = isinstance(wanted, str) and wanted != model
        return examples()[example].path, wanted if other else gr.skip()

    image = image_input(str(first.path) if first else None)
    crop = CropBox(checkpoints)
    crop.build(image.value, name)
    shown = page_part(
        "examples.html",
        "examples.js",
        ("examples.css",),
        gallery.tiles(name),
        elem_id="examples",
    )
    with gr.Column(elem_classes="vca-choice", min_width=0):
        model = choice.dropdown("Model", name)
        choice.loader(model)
    crop.connect(image, model)
    quiet = dict(preprocess=False, show_progress="hidden", api_visibility="private")
    shown.select(pick, model, [image, model], **quiet)
    model.change(gallery.tiles, model, shown, trigger_mode="always_last", **quiet)
    return image, model, crop


def image_input(value: str | None, label: str = "Photo") -> gr.Image:
    """An image that is uploaded, taken with a camera or pasted.

    Functions that take the image should be registered with `preprocess=False`, so that they get the uploaded file and
    gradio does not decode it first; `images.uploaded_file` and `images.read_image` read it.
    """
    return gr.Image(
        value,
        type="filepath",
        image_mode=None,
        label=label,
        sources=["upload", "webcam", "clipboard"],
        buttons=[],
        height=240,
        elem_classes="vca-photo",
    )


def _says(answer: Answer) -> str:
    return f"{answer.label} {answer.probability:.0%}"


def _thumbnail(path: Path) -> str:
    image = read_image(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    small = image.resize((TILE, TILE), box=(left, top, left + side, top + side))
    return drawing.data_url(small, "JPEG")
