"""The Explore tab: click a patch or a contrast token, and see every map of it.

The server runs the model once and keeps the maps; the page (explorer*.html, .css, .js, and map*.js, which other tabs
share) fetches those of each block once and draws every click by itself.
"""

import base64
import json

import gradio as gr

from app import links
from app.components import page_part
from app.context import STALE, STALE_NOW, Context, subject_of
from app.runtime import export, records
from app.runtime.images import ImageError, uploaded_file
from app.runtime.limits import heavy_work
from app.runtime.packing import fetched, run_of
from app.runtime.validation import page_request
from vca import drawing, preprocessing
from vca.explorer.packing import arrays_of

TITLE = "Explore"


def build(context: Context) -> None:
    """Builds the tab and sets `context.explored`."""
    checkpoints, store, image, model = context.checkpoints, context.maps, context.image, context.model

    def explore(upload: dict | None, name: str) -> str:
        if upload is None:
            return ""
        network = checkpoints.load(name)
        try:
            path = uploaded_file(upload)
            recorded = context.recordings.get(network, path)
        except ImageError as error:
            return json.dumps(dict(problem=error.message))
        [(label, probability)] = records.top_labels(network, recorded.probabilities, 1).items()
        crop = drawing.muted(preprocessing.center_crop(network, recorded.image))
        says = ("The model says", f"{label} {probability:.0%}")
        run = run_of(store, recorded.maps, crop, says, records.prefix_names(network))
        base = links.base_of(name, path)
        named = dict(model=name, title=checkpoints.title(name)) if base else {}
        about = dict(repeatable=True, base=base, path=str(path), subject=subject_of(upload, name))
        return json.dumps(run | named | about)

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

    view = page_part(
        "explorer.html",
        "explorer.js",
        ("view.css", "explorer.css"),
        STALE,
        server_functions=[fetch_maps, export_numbers, export_page],
        palette=drawing.PALETTE,
        view={},
        offline=False,
        elem_id="explorer",
    )
    quiet = dict(show_progress="hidden", trigger_mode="always_last", api_visibility="private")
    gr.on([image.change, model.change], None, [image, model], view, js=STALE_NOW, **quiet)
    view.submit(explore, [image, model], view, preprocess=False, **quiet)
    context.explored = view
