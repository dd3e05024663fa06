"""The part of the Compare tab where two classifiers see one image."""

import json

import gradio as gr
from PIL import Image
from torch import nn

from app import links
from app.context import STALE_NOW, Context, subject_of
from app.inputs import image_input
from app.runtime import cams, cost, loading, packing, records
from app.runtime.images import ImageError, uploaded_file
from app.runtime.limits import heavy_work
from app.runtime.records import Recorded
from vca import drawing, preprocessing

CLASSIFIERS, PHOTOS, GENERATORS = "Classifiers", "One model, two photos", "Generators"
SECOND_PHOTO = "Choose a second photo: the model sees both, and shows the same place of each side by side."


class Classifiers:
    """The choice of a second classifier beside the page's, and the answer that the page draws."""

    def __init__(self, context: Context):
        self.context = context

    def build(self) -> None:
        """Makes the inputs."""
        choice, first = self.context.choice, self.context.model
        with gr.Column() as self.of_models:
            twin = twin_of(first.value, self.context.checkpoints.classifiers)
            self._second = choice.dropdown("Second model", twin, cnns=True)
            choice.loader(self._second)
        with gr.Column(visible=False) as self.of_photos:
            self._photo = image_input(None, "Second photo")
        self.context.second = self._second

    def connect(self, view: gr.HTML, what: gr.Radio) -> None:
        """Registers the events: `view` shows the comparison of the photo and the models on the page.

        What it shows of generators stays, as long as `what` says so.
        """
        image, first, second, photo = self.context.image, self.context.model, self._second, self._photo
        quiet = dict(show_progress="hidden", trigger_mode="always_last", api_visibility="private")
        asked = [image, first, second, what, photo]
        stays = f"(shown, ...asked) => asked[3] === '{GENERATORS}' ? shown : ({STALE_NOW})(...asked)"
        changed = [image.change, first.change, second.change, photo.change]
        gr.on(changed, None, [view, *asked], view, js=stays, **quiet)
        view.submit(self.compare, asked, view, preprocess=False, **quiet)
        first.change(self.choose_twin, [first, second], second, preprocess=False, **quiet)

    def choose_twin(self, first: str, second: str):
        """After another choice of the first model: a model is not compared with itself, but with its twin."""
        names = self.context.checkpoints.classifiers
        return twin_of(first, names) if first == second and isinstance(first, str) else gr.skip()

    def compare(self, upload: dict | None, first: str, second: str, what: str = CLASSIFIERS, other=None) -> str:
        """The answer that the page draws, as JSON; `other` is the second photo, if `what` asks for one."""
        if upload is None:
            return ""
        subject = subject_of(upload, first, second, what, other)
        if what == PHOTOS:
            if not other:
                return json.dumps(dict(note=SECOND_PHOTO))
            return self._compare_photos(first, [upload, other], subject)
        load = self.context.checkpoints.load
        networks = {second: load(second, cnn=True), first: load(first)}
        try:
            path = uploaded_file(upload)
            with heavy_work():
                recorded = {name: self.context.recordings.get(network, path) for name, network in networks.items()}
                sides = [self._side(name, networks[name], recorded[name]) for name in (first, second)]
        except ImageError as error:
            return json.dumps(dict(problem=error.message))
        together = None if second.startswith(loading.UPLOADED) else links.base_of(first, path)
        link = together and together | {"with": second}
        return packing.pair_of(sides, film={}, base=link, path=str(path), subject=subject)

    def _compare_photos(self, name: str, uploads: list[dict], subject: list) -> str:
        """One model on two photos, at the same place of what it sees of each. No link leads to a second photo."""
        network = self.context.checkpoints.load(name)
        sides = []
        try:
            with heavy_work():
                for upload, title in zip(uploads, ("First photo", "Second photo"), strict=True):
                    recorded = self.context.recordings.get(network, uploaded_file(upload))
                    sides.append(self._side(name, network, recorded) | dict(name=title, box=[0, 0, 1, 1]))
        except ImageError as error:
            return json.dumps(dict(problem=error.message))
        return packing.pair_of(sides, film={}, base=None, isOneModel=True, subject=subject)

    def _side(self, name: str, model: nn.Module, recorded: Recorded) -> dict:
        """What the page needs of one classifier, as JSON values."""
        picture = drawing.muted(preprocessing.center_crop(model, recorded.image))
        top = records.top_labels(model, recorded.probabilities, 5)
        if loading.is_cnn(model):
            says = f"Grad-CAM of {next(iter(top))}: a CNN has no attention to ask"
            values = cams.grad_cam(model, recorded.x, int(recorded.probabilities.argmax()))
            run = packing.fixed_of(self.context.maps, values, picture, says)
        else:
            names = records.prefix_names(model)
            run = packing.run_of(self.context.maps, recorded.maps, picture, ("", ""), names)
        uploaded = name.startswith(loading.UPLOADED)
        title = (
            f"{model.pretrained_cfg['architecture']} (uploaded)" if uploaded else self.context.checkpoints.title(name)
        )
        return run | dict(
            model=name,
            name=title,
            top=list(top.items()),
            box=_part_seen(model, recorded.image),
            facts=dict(Id="none" if uploaded else name) | _facts(model, recorded),
        )


def twin_of(name: str | None, names: list[str]) -> str | None:
    """The model to set beside a model: the one that differs from it in the attention alone, if there is one.

    Our names begin with the attention: vca_vit_pico_patch4_32_cifar10 has the twin mhsa_vit_pico_patch4_32_cifar10.
    """
    others = [other for other in names if other != name]
    same = (other for other in others if name and other.partition("_")[2] == name.partition("_")[2])
    return next(same, next(iter(others), name))


def _part_seen(model: nn.Module, image: Image.Image) -> list[float]:
    """Left, top, right and bottom of what the model sees, as fractions of the image's width and height."""
    sides = (image.width, image.height) * 2
    return [edge / side for edge, side in zip(preprocessing.crop_box(model, image), sides, strict=True)]


def _facts(model: nn.Module, recorded: Recorded) -> dict[str, str]:
    card, (rows, cols) = model.card, recorded.x.shape[2:]
    return {
        "Architecture": model.pretrained_cfg["architecture"],
        "Attention": ", ".join(sorted({layer.kind for layer in recorded.maps})) or "none",
        "Trained on": card.trained_on or "not said",
        "Images seen in training": "not said" if card.images_seen is None else f"{card.images_seen:,}",
        "Top-1, by its card": "not said" if card.top1 is None else f"{card.top1:.2f} %",
        "Classes": f"{model.num_classes:,}",
        "Input": f"{cols} × {rows} px",
        **cost.size_facts(model),
        "Latency, one image": "measuring …",
    }
