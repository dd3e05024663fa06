"""What the tabs are built with: `build(context)` is the one interface of all of them."""

from dataclasses import dataclass, field

import gradio as gr

from app.components import ModelChoice
from app.runtime.checkpoints import Checkpoints
from app.runtime.packing import MapStore
from app.runtime.records import Recordings


@dataclass(frozen=True)
class ClassifyTab:
    """What other tabs use of Classify. Setting `image` and `model` classifies; `explore` asks to explore them."""

    image: gr.Image
    model: gr.Dropdown
    explore: gr.Button


@dataclass(frozen=True)
class ExploreTab:
    """What other tabs use of Explore.

    Setting `image` and `model` explores that image. Setting `view` to the JSON of what `packing.run_of` returns shows
    maps that were recorded elsewhere. Set it to a plain string: an update like `gr.skip()` makes gradio drop its other
    properties.
    """

    image: gr.Image
    model: gr.Dropdown
    view: gr.HTML


@dataclass
class Context:
    """What the tabs have in common.

    Attributes:
        page: the whole app.
        tabs: to select another tab, by its id.
        checkpoints: the models.
        choice: the choice of a classifier, the same in all tabs.
        examples: paths of example images.
        recordings: what classifiers made of photos.
        maps: the maps that the page may fetch.
        classify, explore: these tabs, once they are built.
    """

    page: gr.Blocks
    tabs: gr.Tabs
    checkpoints: Checkpoints
    choice: ModelChoice
    examples: list[str]
    recordings: Recordings = field(default_factory=Recordings)
    maps: MapStore = field(default_factory=MapStore)
    classify: ClassifyTab | None = None
    explore: ExploreTab | None = None
