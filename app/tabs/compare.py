"""The Compare tab: two models side by side. It shows what each makes, where it looks, and what it costs.

Both models' maps are of one query. The page (compare.html, compare.css, compare*.js) draws them, as in the explorer.
"""

import json
import time

import gradio as gr
from torch import nn

from app.components import page_part
from app.context import STALE, Context
from app.runtime import cost, packing
from app.runtime.checkpoints import Checkpoints
from app.runtime.limits import heavy_work
from app.runtime.validation import page_request
from app.tabs.compare_classifiers import CLASSIFIERS, GENERATORS, PHOTOS, Classifiers
from app.tabs.compare_generators import ASK, Generators
from vca import drawing

TITLE = "Compare"


def build(context: Context) -> None:
    """Builds the tab."""
    checkpoints = context.checkpoints
    classifiers, generators = Classifiers(context), Generators(context)

    @page_request
    def fetch_maps(request: dict) -> dict:
        return packing.fetched(context.maps, request)

    def measure(names: list[str]) -> dict:
        """The latency of both models in milliseconds, or `busy` while another visitor's are measured."""
        try:
            first, second = names
            models = [_load(checkpoints, first), _load(checkpoints, second)]
        except (gr.Error, TypeError, ValueError):  # forgotten, or not a request of our page
            return dict(failed=True)
        with heavy_work():
            return cost.measure(models)

    @page_request
    def look(request: dict) -> dict:
        return generators.look(request)  # gradio takes functions only, no methods

    def switch(what: str) -> tuple:
        value = json.dumps(dict(note=ASK) if what == GENERATORS else dict(stale=time.monotonic()))  # never as before
        return *(gr.Column(visible=what == each) for each in (CLASSIFIERS, PHOTOS, GENERATORS)), value

    known = [CLASSIFIERS, PHOTOS, *[GENERATORS] * bool(checkpoints.generators)]
    what = gr.Radio(known, value=CLASSIFIERS, label="Compare")
    classifiers.build()
    with gr.Column(visible=False) as of_generators:
        generators.build()
    view = page_part(
        "compare.html",
        "compare.js",
        ("view.css", "compare.css"),
        STALE,
        server_functions=[fetch_maps, measure, look],
        palette=drawing.PALETTE,
        elem_id="compare",
    )
    classifiers.connect(view, what)
    generators.connect(view)
    quiet = dict(preprocess=False, show_progress="hidden", api_visibility="private")
    what.change(switch, what, [classifiers.of_models, classifiers.of_photos, of_generators, view], **quiet)


def _load(checkpoints: Checkpoints, name: str) -> nn.Module:
    return checkpoints.load_generator(name) if name in checkpoints.generators else checkpoints.load(name, cnn=True)
