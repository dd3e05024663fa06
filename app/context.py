"""What the tabs are built with: `build(context)` is the one interface of all of them."""

from dataclasses import dataclass, field

import gradio as gr

from app.components import ModelChoice
from app.cropping import CropBox
from app.runtime.checkpoints import Checkpoints
from app.runtime.packing import MapStore
from app.runtime.records import Recordings

# Another photo or model is not worked on until the visitor looks: a view that gets this asks for the new one then.
STALE = '{"stale": true}'
STALE_NOW = "(...inputs) => JSON.stringify({ stale: inputs.map((each) => each?.path ?? each) })"


def subject_of(*inputs) -> list:
    """What an answer is about, as `STALE_NOW` names it: the view that has it is not asked about the same once more."""
    return [each.get("path") if isinstance(each, dict) else each for each in inputs]


@dataclass
class Context:
    """What the tabs have in common.

    Attributes:
        page: the whole app.
        tabs: to select another tab, by its id.
        checkpoints: the models.
        choice: the choice of a classifier, the same wherever there is one.
        image, model: the photo and the classifier of the page, which all tabs show; see `app.inputs`.
        crop: the crop box of the photo.
        second: the classifier to set beside `model`, in Compare.
        asking: the view that asks to follow a link, by its event `input`; see `app.links`.
        recordings: what classifiers made of photos.
        maps: the maps that the page may fetch.
        explored: what Explore shows. Set to the JSON of what `packing.run_of` returns, it shows maps that were recorded
            elsewhere. Set it to a plain string: an update like `gr.skip()` makes gradio drop its other properties.
    """

    page: gr.Blocks
    tabs: gr.Tabs
    checkpoints: Checkpoints
    choice: ModelChoice
    image: gr.Image
    model: gr.Dropdown
    crop: CropBox
    recordings: Recordings = field(default_factory=Recordings)
    maps: MapStore = field(default_factory=MapStore)
    second: gr.Dropdown | None = None
    asking: gr.HTML | None = None
    explored: gr.HTML | None = None
