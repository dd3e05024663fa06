"""The Compare tab: two models, one image, one query; what each says, where it looks, and what it costs.

The page (compare.html, .css, .js, and maps.js) draws both models' maps of the same place by itself, as
the explorer does.
"""

import json
import statistics
import time
from threading import Lock

import gradio as gr
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from app import draw, explore, export, models, opening
from app.images import ImageError, read_image, uploaded_file
from app.inputs import ModelChoice, image_input

ROUNDS, SECONDS = 21, 2.0  # of the interleaved measurement, whichever ends first; at least three rounds
_measuring = Lock()


def build(choice: ModelChoice, examples: list[str], store: explore.MapStore) -> None:
    """Builds the tab. `store` keeps the maps."""
    load = choice.checkpoints.load

    def compare(upload: dict | None, first: str, second: str) -> str:
        if upload is None:
            return ""
        networks = {name: load(name) for name in (first, second)}
        try:
            image = read_image(uploaded_file(upload))
        except ImageError as error:
            return json.dumps(dict(problem=error.message))
        sides = [_side(store, image, name, networks[name]) for name in (first, second)]
        problem = next((f"{side['name']}: {side['problem']}" for side in sides if "problem" in side), None)
        return json.dumps(dict(problem=problem) if problem else dict(sides=sides))

    def fetch_maps(request: dict) -> dict:
        return explore.fetched(store, request)

    def measure(names: list[str]) -> dict:
        """The latency of both models in milliseconds, or `busy` while another visitor's are measured."""
        try:
            first, second = (load(name) for name in names)
        except (gr.Error, TypeError, ValueError):  # forgotten, or not a request of our page
            return dict(failed=True)
        if not _measuring.acquire(blocking=False):
            return dict(busy=True)
        try:
            return dict(milliseconds=latencies([first, second]), threads=torch.get_num_threads())
        finally:
            _measuring.release()

    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = image_input(height=240)
            first, second = choice.dropdown("First model"), choice.dropdown("Second model", first=1)
            choice.loader(second)
            gr.Examples(examples, image, label="Examples", api_visibility="private")
        with gr.Column(scale=7, min_width=320):
            view = gr.HTML(
                "",
                html_template=export.text("compare.html"),
                css_template=export.text("compare.css"),
                js_on_load=export.text("maps.js", "compare.js"),
                apply_default_css=False,
                server_functions=[fetch_maps, measure],
                palette=draw.PALETTE,
                elem_id="compare",
            )
    gr.on(
        [image.change, first.change, second.change, view.submit],
        compare,
        [image, first, second],
        view,
        preprocess=False,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )


def _side(store: explore.MapStore, image: Image.Image, name: str, model: nn.Module) -> dict:
    """What the page needs of one model, as JSON values."""
    x = models.preprocess(model, image)
    probabilities, maps = models.record(model, x)
    left, top, right, bottom = models.crop_box(model, image)
    uploaded = name.startswith(opening.UPLOADED)
    run = explore.run_of(
        store, maps, draw.muted(models.centre_crop(model, image)), ("", ""), models.prefix_names(model)
    )
    return run | dict(
        model=name,
        name=f"{model.pretrained_cfg['architecture']} (uploaded)" if uploaded else name,
        top=list(models.top_labels(model, probabilities, 5).items()),
        box=[left / image.width, top / image.height, right / image.width, bottom / image.height],
        facts=facts(model, x, sorted({layer.kind for layer in maps})),
    )


def facts(model: nn.Module, x: torch.Tensor, kinds: list[str]) -> dict:
    """A model's card and size, as JSON values; multiply-adds are counted for one image, x (1, 3, H, W)."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(x)
    return dict(
        architecture=model.pretrained_cfg["architecture"],
        attention=", ".join(kinds),
        trained_on=model.card.trained_on,
        top1=model.card.top1,
        classes=model.num_classes,
        input=list(x.shape[2:]),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        gmacs=counter.get_total_flops() / 2e9,
    )


@torch.inference_mode()
def latencies(pair: list[nn.Module]) -> list[float]:
    """Milliseconds of one forward pass of each model with one image: medians of passes that take turns."""
    inputs = [torch.zeros(1, *models.input_size(model)) for model in pair]
    taken: list[list[float]] = [[] for _ in pair]
    for model, x in zip(pair, inputs, strict=True):
        model(x)
    end = time.perf_counter() + SECONDS
    while len(taken[0]) < 3 or (len(taken[0]) < ROUNDS and time.perf_counter() < end):
        for times, model, x in zip(taken, pair, inputs, strict=True):
            start = time.perf_counter()
            model(x)
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]
