"""The Explore tab: click a patch or a contrast token, and see every map of it.

The server runs the model once and keeps the maps; the page (explorer*.html, .css, .js, and map*.js, which other tabs
share) fetches those of each block once and draws every click by itself.
"""

import base64
import filecmp
import json
from pathlib import Path
from urllib.parse import parse_qsl

import gradio as gr

from app.components import image_and_model
from app.context import Context, ExploreTab
from app.runtime import assets, export, loading, records
from app.runtime.images import ImageError, uploaded_file
from app.runtime.limits import heavy_work
from app.runtime.packing import fetched, run_of
from app.runtime.validation import page_request, plain
from vca import drawing, preprocessing
from vca.explorer.packing import arrays_of

TITLE = "Explore"
LINK = "#explore?"
HASH = f"() => location.hash.startsWith('{LINK}') ? location.hash : ''"


def build(context: Context) -> None:
    """Builds the tab, connects Classify and the page's address to it, and sets `context.explore`."""
    checkpoints, store = context.checkpoints, context.maps

    def explore(upload: dict | None, name: str) -> str:
        if upload is None:
            return ""
        model = checkpoints.load(name)
        try:
            recorded = context.recordings.get(model, uploaded_file(upload))
        except ImageError as error:
            return json.dumps(dict(problem=error.message))
        [(label, probability)] = records.top_labels(model, recorded.probabilities, 1).items()
        crop = drawing.muted(preprocessing.center_crop(model, recorded.image))
        says = ("The model says", f"{label} {probability:.0%}")
        run = run_of(store, recorded.maps, crop, says, records.prefix_names(model))
        public_name = None if name.startswith(loading.UPLOADED) else name  # a visitor's own model is in no link
        return json.dumps(run | dict(repeatable=True, model=public_name, example=example_of(uploaded_file(upload))))

    def example_of(path: Path) -> str | None:
        """The name of the example with the same content as an uploaded file, or None."""
        return next((name for name, example in by_name.items() if filecmp.cmp(path, example, shallow=False)), None)

    @page_request
    def fetch_maps(request: dict) -> dict:
        return fetched(store, request)

    @page_request
    def export_numbers(request: dict) -> dict:
        """The numbers of a view as an .npz file in base64."""
        layer = store.get(request["token"])[request["block"]]
        row = (request[key] for key in ("mode", "head", "query", "lambda"))
        with heavy_work():
            return dict(data=base64.b64encode(export.numbers(layer, *row, request["view"])).decode())

    @page_request
    def export_page(request: dict) -> dict:
        """All maps of a run as the text of a web page."""
        maps = map(arrays_of, store.get(request["token"]))
        with heavy_work():
            return dict(text=export.page(json.loads(request["run"]), maps, request["view"]))

    def restore(link: str) -> tuple:
        """The image and the model that a link names. An input that it does not name keeps its value."""
        if not isinstance(link, str) or not link.startswith(LINK):
            return gr.skip(), gr.skip()
        asked = dict(parse_qsl(link.removeprefix(LINK)))
        name, picture = asked.get("model"), by_name.get(asked.get("image"), gr.skip())
        if name not in (*checkpoints.classifiers, *checkpoints.finer):
            said = plain(f"The model of this link is not here: {name}", 120)
            gr.Warning(f"{said}. Load it on the left.", title="Link")
            name = gr.skip()
        return picture, name

    def follow(link: str) -> tuple:
        return *restore(link), gr.Tabs(selected="explore") if link else gr.skip()

    def carry(upload: dict | None, name: str) -> tuple:
        return uploaded_file(upload), name, gr.Tabs(selected="explore")

    by_name = {Path(example).stem: example for example in context.examples}
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image, model = image_and_model(context.choice, context.examples, height=240)
        with gr.Column(scale=7, min_width=320):
            view = gr.HTML(
                "",
                html_template=assets.text("explorer.html"),
                css_template=assets.text("view.css", "explorer.css"),
                js_on_load=assets.script("explorer.js"),
                apply_default_css=False,
                server_functions=[fetch_maps, export_numbers, export_page],
                palette=drawing.PALETTE,
                view={},
                offline=False,
                elem_id="explorer",
            )
    quiet = dict(show_progress="hidden", api_visibility="private")
    asked = [image.change, model.change, view.submit]
    gr.on(asked, explore, [image, model], view, preprocess=False, trigger_mode="always_last", **quiet)
    shown = [image, model, context.tabs]
    gr.on([context.page.load, view.select], follow, view, shown, js=HASH, **quiet)
    if classify := context.classify:
        classify.explore.click(carry, [classify.image, classify.model], shown, preprocess=False, **quiet)
    context.explore = ExploreTab(image, model, view)
