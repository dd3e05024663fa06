"""The part of the Compare tab where two classifiers see one image."""

import json

import gradio as gr
from PIL import Image
from torch import nn

from app.components import image_input, show_examples
from app.context import Context
from app.runtime import cost, loading, packing, records
from app.runtime.images import ImageError, uploaded_file
from app.runtime.limits import heavy_work
from app.runtime.records import Recorded
from vca import drawing, preprocessing


class Classifiers:
    """The inputs for an image and two classifiers, and the answer that the page draws.

    Attributes:
        inputs: the components whose values `compare` takes; `build` makes them.
    """

    def __init__(self, context: Context):
        self.context = context
        self.inputs: list[gr.Image | gr.Dropdown] = []

    def build(self) -> None:
        """Makes the inputs."""
        choice = self.context.choice
        image = image_input(height=240)
        first, second = choice.dropdown("First model"), choice.dropdown("Second model", first=1)
        choice.loader(second)
        show_examples(self.context.examples, image)
        self.inputs = [image, first, second]

    def connect(self, view: gr.HTML) -> None:
        """Registers the events: `view` shows the comparison whenever an input changes."""
        gr.on(
            [*(component.change for component in self.inputs), view.submit],
            self.compare,
            self.inputs,
            view,
            preprocess=False,
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )

    def compare(self, upload: dict | None, first: str, second: str) -> str:
        """The answer that the page draws, as JSON."""
        if upload is None:
            return ""
        networks = {name: self.context.checkpoints.load(name) for name in (first, second)}
        try:
            path = uploaded_file(upload)
            with heavy_work():
                recorded = {name: self.context.recordings.get(network, path) for name, network in networks.items()}
                sides = [self._side(name, networks[name], recorded[name]) for name in (first, second)]
        except ImageError as error:
            return json.dumps(dict(problem=error.message))
        return packing.pair_of(sides, film={})

    def _side(self, name: str, model: nn.Module, recorded: Recorded) -> dict:
        """What the page needs of one classifier, as JSON values."""
        picture = drawing.muted(preprocessing.center_crop(model, recorded.image))
        names = records.prefix_names(model)
        run = packing.run_of(self.context.maps, recorded.maps, picture, ("", ""), names)
        uploaded = name.startswith(loading.UPLOADED)
        return run | dict(
            model=name,
            name=f"{model.pretrained_cfg['architecture']} (uploaded)" if uploaded else name,
            top=list(records.top_labels(model, recorded.probabilities, 5).items()),
            box=_part_seen(model, recorded.image),
            facts=_facts(model, recorded),
        )


def _part_seen(model: nn.Module, image: Image.Image) -> list[float]:
    """Left, top, right and bottom of what the model sees, as fractions of the image's width and height."""
    sides = (image.width, image.height) * 2
    return [edge / side for edge, side in zip(preprocessing.crop_box(model, image), sides, strict=True)]


def _facts(model: nn.Module, recorded: Recorded) -> dict[str, str]:
    card, (rows, cols) = model.card, recorded.x.shape[2:]
    return {
        "Architecture": model.pretrained_cfg["architecture"],
        "Attention": ", ".join(sorted({layer.kind for layer in recorded.maps})),
        "Trained on": card.trained_on or "not said",
        "Top-1, by its card": "not said" if card.top1 is None else f"{card.top1:.2f} %",
        "Classes": f"{model.num_classes:,}",
        "Input": f"{cols} × {rows} px",
        **cost.size_facts(model),
        "Latency, one image": "measuring …",
    }
