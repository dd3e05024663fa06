"""The Classify tab: the answer, where every head looks, and what would change the answer.

The page (think*.html, .css, .js) asks for more by the functions below. What it sends names the photo's uploaded file
and the model, so that nothing has to be kept for it.
"""

import json
from html import escape

import gradio as gr
from torch import nn

from app import links
from app.components import page_part
from app.context import Context
from app.runtime import thinking, tour
from app.runtime.images import ImageError, uploaded_file
from app.runtime.records import Recorded
from app.runtime.validation import page_request
from app.tabs import attribution
from vca import drawing

TITLE = "Classify"


def build(context: Context) -> None:
    """Builds the tab and sets `context.asking`."""
    checkpoints, image, model = context.checkpoints, context.image, context.model

    def recorded_of(name: str, path: str) -> tuple[nn.Module, Recorded]:
        network = checkpoints.load(name)
        return network, context.recordings.get(network, uploaded_file(dict(path=path)))

    def classify(upload: dict | None, name: str) -> tuple[str, str, str]:
        if upload is None:
            return "", _classes(checkpoints.load(name).label_names if name else []), ""
        network = checkpoints.load(name)
        try:
            path = uploaded_file(upload)
            seen = thinking.look(network, context.recordings.get(network, path))
            seen |= dict(model=name, path=str(path), base=links.base_of(name, path))
        except ImageError as error:
            seen = dict(problem=error.message)
        return json.dumps(seen), _classes(network.label_names), context.crop.show(upload, name)

    @page_request
    def look_inside(request: dict) -> dict:
        return thinking.look_inside(*recorded_of(request["model"], request["path"]))

    @page_request
    def what_if(request: dict) -> dict:
        change = {key: request[key] for key in ("block", "head", "lambda_scale", "off")}
        return thinking.what_if(*recorded_of(request["model"], request["path"]), change, request["patches"])

    @page_request
    def take_tour(request: dict) -> dict:
        network, recorded = recorded_of(request["model"], request["path"])
        return dict(scenes=tour.scenes(network, recorded, request["block"], request["head"]))

    @page_request
    def reduce(request: dict) -> dict:
        return dict(photo=links.reduced(uploaded_file(dict(path=request["path"]))))

    known = checkpoints.configs[model.value]["label_names"] if model.value else []
    opened, *_ = classify(image.value, model.value) if image.value else [""]
    view = page_part(
        "think.html",
        "think.js",
        ("view.css", "think.css"),
        opened,  # what the page opens on is there without a request
        server_functions=[look_inside, what_if, take_tour, reduce],
        palette=drawing.PALETTE,
        elem_id="think",
    )
    attribution.build(context, image, model)
    classes = gr.HTML(_classes(known))
    quiet = dict(preprocess=False, show_progress="hidden", trigger_mode="always_last", api_visibility="private")
    gr.on([image.change, model.change], classify, [image, model], [view, classes, context.crop.view], **quiet)
    context.asking = view


def _classes(labels: list[str]) -> str:
    if not labels:
        return ""
    chips = "<ul>" + "".join(f"<li>{escape(label)}</li>" for label in labels) + "</ul>"
    if len(labels) > 100:
        chips = f"<details><summary>Show them all</summary>{chips}</details>"
    return f"""<section class='vca-classes'><h3>The {len(labels):,} classes this model knows</h3>{chips}
        <p>A photo of anything else is still given one of these labels.</p></section>"""
