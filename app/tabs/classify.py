"""The Classify tab: it shows the likeliest classes of an image and a map of every head."""

from html import escape

import gradio as gr
from PIL import Image
from torch import Tensor, nn

import vca
from app.components import image_and_model
from app.context import ClassifyTab, Context
from app.runtime import records
from app.runtime.images import ImageError, uploaded_file
from app.runtime.limits import heavy_work
from app.tabs import attribution
from vca import drawing, preprocessing
from vca.attribution import readout

TITLE = "Classify"

EMPTY = "<p class='vca-empty'>Drop an image, take a photo or pick an example: it is classified right away.</p>"


def build(context: Context) -> None:
    """Builds the tab and sets `context.classify`."""
    checkpoints = context.checkpoints

    def classify(upload: dict | None, name: str):
        explore_button = gr.Button(interactive=False)
        if upload is None:
            labels = checkpoints.load(name).label_names if name else []
            return None, None, EMPTY, _classes(labels), explore_button
        model = checkpoints.load(name)
        try:
            with heavy_work():
                recorded = context.recordings.get(model, uploaded_file(upload))
                crop = preprocessing.center_crop(model, recorded.image)
                shown = strip(model, records.whole_grid(recorded.maps), crop)
        except ImageError as error:
            problem = f"<p class='vca-problem' role='alert'>{escape(error.message)}</p>"
            return None, None, problem, _classes(model.label_names), explore_button
        return (
            records.top_labels(model, recorded.probabilities, 5),
            input_picture(model, recorded.x),
            shown,
            _classes(model.label_names),
            gr.Button(interactive=True),
        )

    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            image, model = image_and_model(context.choice, context.examples, height=320)
            explore_button = gr.Button("Explore this", variant="primary", interactive=False)
        with gr.Column(scale=7, min_width=320):
            with gr.Row(equal_height=True):
                labels = gr.Label(label="The model says", num_top_classes=5, scale=5, min_width=240)
                seen = gr.Image(
                    label="What it sees",
                    interactive=False,
                    buttons=[],
                    height=300,
                    scale=4,
                    min_width=200,
                    format="png",
                    elem_classes="vca-pixels",
                )
            maps = gr.HTML(EMPTY)
            attribution.build(context, image, model)
            classes = gr.HTML(_classes(checkpoints.configs[model.value]["label_names"] if model.value else []))
    gr.on(
        [image.change, model.change],
        classify,
        [image, model],
        [labels, seen, maps, classes, explore_button],
        preprocess=False,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )
    context.classify = ClassifyTab(image, model, explore_button)


def input_picture(model: nn.Module, x: Tensor) -> Image.Image:
    """The model's input (1, 3, H, W) as a picture 256 pixels high, every pixel a square."""
    size = (256 * x.shape[3] // x.shape[2], 256)
    return preprocessing.input_picture(model, x).resize(size, Image.Resampling.NEAREST)


def strip(model: nn.Module, maps: list[vca.LayerMaps], crop: Image.Image) -> str:
    """HTML with one small map for each head of each block, over the image: what the decision draws in from where.

    The query is what the classifier reads, see `vca.attribution.readout`.
    """
    if not maps:
        return f"<p class='vca-empty'>{records.NO_MAPS}</p>"
    try:
        readouts = [readout(model, layer) for layer in maps]
    except ValueError as error:
        return f"<p class='vca-empty'>No maps of the decision: {escape(str(error))}</p>"
    rows = [reads.rows(layer.effective[0]).numpy() for reads, layer in zip(readouts, maps, strict=True)]
    heads = max(layer.stage1.positive.shape[1] for layer in maps)
    cells = ["<span></span>", *(f"<span>{layer.block + 1}</span>" for layer in maps)]
    for head in range(heads):
        cells.append(f"<span>{head + 1}</span>")
        for layer, grid_rows in zip(maps, rows, strict=True):
            if head >= len(grid_rows):
                cells.append("<span></span>")
                continue
            values = grid_rows[head]
            title = f"Block {layer.block + 1}, head {head + 1}: {values.min():+.3g} to {values.max():+.3g}"
            cells.append(
                f"<img src='{drawing.data_url(drawing.overlay(values), 'PNG')}' title='{title}' alt='{title}'>"
            )
    photo = drawing.data_url(drawing.muted(crop.resize((96 * crop.width // crop.height, 96))), "JPEG")
    signed = any(stage and stage.negative is not None for layer in maps for stage in (layer.stage1, layer.stage2))
    legend = "<b class='vca-positive'>draws in</b>" + (" and <b class='vca-negative'>pushes away</b>" if signed else "")
    return f"""<section class='vca-strip'>
        <h3>Where every head looks</h3>
        <p>What {readouts[0].name} {legend}: the effective map of each head (row) in each block (column), each on a
        scale of its own.</p>
        <div class='vca-strip-grid' style="--blocks:{len(maps)}; --aspect:{crop.width / crop.height:.4f};
        --photo:url({photo})">{"".join(cells)}</div></section>"""


def _classes(labels: list[str]) -> str:
    if not labels:
        return ""
    chips = "<ul>" + "".join(f"<li>{escape(label)}</li>" for label in labels) + "</ul>"
    if len(labels) > 100:
        chips = f"<details><summary>Show them all</summary>{chips}</details>"
    return f"""<section class='vca-classes'><h3>The {len(labels):,} classes this model knows</h3>{chips}
        <p>A photo of anything else is still given one of these labels.</p></section>"""
