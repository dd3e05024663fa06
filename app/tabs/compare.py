"""The Compare tab: two models side by side, under one query; what each makes, where it looks, and what it costs.

Two classifiers look at one image. Two generators start from the same noise and make pictures of the same class; every
step can be looked into. The page (compare*.html, .css, .js, and map*.js) draws both models' maps of the same place by
itself, as the explorer does.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from threading import Lock
from typing import NamedTuple

import gradio as gr
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from app.components import ModelChoice, image_input, sampling_settings, show_examples
from app.runtime import assets, drawing, loading, packing, preprocessing, records, sampling
from app.runtime.checkpoints import Checkpoints
from app.runtime.images import ImageError, read_image, uploaded_file
from app.runtime.sampling import Run
from app.runtime.store import Store
from vca.diffusion.sampling import at_time
from vca.diffusion.vae import DecoderError
from vca.models.dit import DiffusionTransformer

ROUNDS, SECONDS = 21, 2.0  # of the interleaved measurement, whichever ends first; at least three rounds
PAIR_BYTES = 128 * 2**20
PICTURES = 4
CLASSIFIERS, GENERATORS = "Classifiers", "Generators"
STARTING = '() => JSON.stringify({ working: "Starting …" })'
FAILED = '() => JSON.stringify({ problem: "The server did not answer. Please try again in a minute." })'
ASK = """Choose a class and press Generate: both models start from the same noise, and the same step of both is shown
side by side."""
_measuring = Lock()


class Pair(NamedTuple):
    """Two runs from the same noise, and the names of their models."""

    names: tuple[str, str]
    runs: tuple[Run, Run]


def build(choice: ModelChoice, examples: list[str], store: packing.MapStore) -> None:
    """Builds the tab. `store` keeps the maps."""
    checkpoints = choice.checkpoints
    pairs: Store[Pair] = Store(PAIR_BYTES, lambda pair: sum(run.size for run in pair.runs), sampling.TOO_LARGE)

    def compare(upload: dict | None, first: str, second: str) -> str:
        if upload is None:
            return ""
        networks = {name: checkpoints.load(name) for name in (first, second)}
        try:
            image = read_image(uploaded_file(upload))
        except ImageError as error:
            return json.dumps(dict(problem=error.message))
        sides = [_classified(store, image, name, networks[name]) for name in (first, second)]
        return _sides(sides, {})

    def generate(first: str, second: str, label: str, steps, guidance, seed) -> Iterator[str]:
        names = (first, second)
        try:
            runs = [_run(checkpoints.load_generator(name), label, steps, guidance, seed) for name in names]
            token = pairs.put(pair := Pair(names, tuple(runs)))
            for name, run in zip(names, runs, strict=True):
                for step, _ in run.progress():
                    yield json.dumps(dict(working=name, step=step, steps=run.request.steps))
        except gr.Error as error:
            yield json.dumps(dict(problem=error.message))
        except DecoderError as error:
            yield json.dumps(dict(problem=sampling.one_line(error)))
        else:
            shown = runs[0].request
            steps_kept = sorted({*runs[0].states, shown.steps})
            film = dict(token=token, steps=steps_kept, count=PICTURES, label=shown.label, guided=shown.guidance != 1)
            sides = _generated(store, pair, shown.steps, 0, without_class=False)
            yield _sides([side | dict(facts=_facts_of_generator(checkpoints, side)) for side in sides], film)

    def look(request: dict) -> dict:
        """Both sides at a step of a picture, for the page. The request names token, step, picture and withoutClass."""
        try:
            pair = pairs.get(request["token"])
            step, picture = request["step"], request["picture"]
            if step not in {*pair.runs[0].states, pair.runs[0].request.steps} or picture not in range(PICTURES):
                return dict(expired=True)
            return dict(sides=_generated(store, pair, step, picture, bool(request["withoutClass"])))
        except (LookupError, TypeError):  # forgotten, or not a request of our page
            return dict(expired=True)

    def fetch_maps(request: dict) -> dict:
        return packing.fetched(store, request)

    def measure(names: list[str]) -> dict:
        """The latency of both models in milliseconds, or `busy` while another visitor's are measured."""
        try:
            first, second = (_forward(checkpoints, name) for name in names)
        except (gr.Error, TypeError, ValueError):  # forgotten, or not a request of our page
            return dict(failed=True)
        if not _measuring.acquire(blocking=False):
            return dict(busy=True)
        try:
            return dict(milliseconds=latencies([first, second]), threads=torch.get_num_threads())
        finally:
            _measuring.release()

    def switch(what: str, *arguments) -> tuple:
        generators = what == GENERATORS
        value = json.dumps(dict(note=ASK)) if generators else compare(*arguments)
        return gr.Column(visible=not generators), gr.Column(visible=generators), value

    def choose_generators(first: str, second: str, label: str | None) -> gr.Dropdown:
        labels = shared_labels(checkpoints, first, second)
        return gr.Dropdown(labels, value=label if label in labels else next(iter(labels), None))

    names = checkpoints.generators
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            what = gr.Radio([CLASSIFIERS, GENERATORS], value=CLASSIFIERS, label="Compare", visible=bool(names))
            with gr.Column() as classifiers:
                image = image_input(height=240)
                first, second = choice.dropdown("First model"), choice.dropdown("Second model", first=1)
                choice.loader(second)
                show_examples(examples, image)
            with gr.Column(visible=False) as generators:
                pair = [
                    gr.Dropdown(
                        names, label="First generator", value=next(iter(names), None), elem_classes="vca-model"
                    ),
                    gr.Dropdown(
                        names, label="Second generator", value=next(reversed(names[:2]), None), elem_classes="vca-model"
                    ),
                ]
                labels = shared_labels(checkpoints, *(dropdown.value for dropdown in pair))
                label = gr.Dropdown(labels, label="Class", value=next(iter(labels), None))
                seed, steps, guidance = sampling_settings()
                button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=7, min_width=320):
            view = gr.HTML(
                "",
                html_template=assets.text("compare.html"),
                css_template=assets.text("view.css", "compare.css"),
                js_on_load=assets.text(*assets.COMPARE_SCRIPTS),
                apply_default_css=False,
                server_functions=[fetch_maps, measure, look],
                palette=drawing.PALETTE,
                elem_id="compare",
            )
    quiet = dict(show_progress="hidden", api_visibility="private")
    asked = [image, first, second]
    gr.on(
        [image.change, first.change, second.change, view.submit],
        compare,
        asked,
        view,
        preprocess=False,
        trigger_mode="always_last",
        **quiet,
    )
    what.change(switch, [what, *asked], [classifiers, generators, view], preprocess=False, **quiet)
    gr.on([dropdown.change for dropdown in pair], choose_generators, [*pair, label], label, **quiet)
    button.click(None, outputs=view, js=STARTING, **quiet)
    running = button.click(
        generate, [*pair, label, steps, guidance, seed], view, preprocess=False, **sampling.QUEUE, **quiet
    )
    running.failure(None, outputs=view, js=FAILED, **quiet)
    view.stop(None, cancels=[running], **quiet)


def shared_labels(checkpoints: Checkpoints, *names: str | None) -> list[str]:
    """The labels that all these generators know, as the first orders them."""
    known = [checkpoints.configs[name]["label_names"] for name in names if name]
    return [label for label in known[0] if all(label in labels for labels in known)] if known else []


def _sides(sides: list[dict], film: dict) -> str:
    problem = next((f"{side['name']}: {side['problem']}" for side in sides if "problem" in side), None)
    return json.dumps(dict(problem=problem) if problem else dict(sides=sides, film=film))


# ---- Classifiers


def _classified(store: packing.MapStore, image: Image.Image, name: str, model: nn.Module) -> dict:
    """What the page needs of one classifier, as JSON values."""
    x = preprocessing.preprocess(model, image)
    probabilities, maps = records.record(model, x)
    left, top, right, bottom = preprocessing.crop_box(model, image)
    uploaded = name.startswith(loading.UPLOADED)
    run = packing.run_of(
        store, maps, drawing.muted(preprocessing.center_crop(model, image)), ("", ""), records.prefix_names(model)
    )
    card = model.card
    return run | dict(
        model=name,
        name=f"{model.pretrained_cfg['architecture']} (uploaded)" if uploaded else name,
        top=list(records.top_labels(model, probabilities, 5).items()),
        box=[left / image.width, top / image.height, right / image.width, bottom / image.height],
        facts={
            "Architecture": model.pretrained_cfg["architecture"],
            "Attention": ", ".join(sorted({layer.kind for layer in maps})),
            "Trained on": card.trained_on or "not said",
            "Top-1, by its card": "not said" if card.top1 is None else f"{card.top1:.2f} %",
            "Classes": f"{model.num_classes:,}",
            "Input": f"{x.shape[3]} × {x.shape[2]} px",
            **_size(model, partial(model, x)),
            "Latency, one image": "measuring …",
        },
    )


# ---- Generators


def _run(model: DiffusionTransformer, label, steps, guidance, seed) -> Run:
    return Run(model, sampling.check_request(model, label, PICTURES, steps, guidance, seed, sampler=None))


def _generated(store: packing.MapStore, pair: Pair, step: int, picture: int, without_class: bool) -> list[dict]:
    """What the page needs of two generators at a step, as JSON values.

    The network never saw the finished pictures: there, the maps are those of the last step.
    """
    sides = []
    for name, run in zip(*pair, strict=True):
        seen = step if step in run.states else max(run.states)
        large = sampling.enlarged(run.picture(step, picture))
        maps = run.record(seen, picture, without_class)
        side = packing.run_of(store, maps, drawing.muted(large), ("", run.caption(seen, picture, without_class)), [])
        frame = drawing.data_url(run.frame(step), "PNG")
        sides.append(side | dict(model=name, name=name, box=[0, 0, 1, 1], frame=frame))
    return sides


def _facts_of_generator(checkpoints: Checkpoints, side: dict) -> dict[str, str]:
    name = side["model"]
    model = checkpoints.load_generator(name)
    card = loading.read_card(checkpoints.folders[name], model.training_history)
    loss = model.training_history[-1]["results"].get("val_loss") if model.training_history else None
    channels, height, width = model.sample_shape
    return {
        "Architecture": model.architecture,
        "Attention": ", ".join(sorted({block["kind"] for block in side.get("blocks", [])})),
        "Trained on": card.trained_on or "not said",
        "Validation loss, by its card": "not said" if loss is None else f"{loss:.4f}",
        "Classes": f"{model.num_classes:,}",
        "Works on": f"{width} × {height} {'latents' if model.latent_decoder else 'px'}, {channels} channels",
        **_size(model, _forward(checkpoints, name)),
        "Latency, one forward pass": "measuring …",
    }


# ---- Cost


def _forward(checkpoints: Checkpoints, name: str) -> Callable[[], object]:
    """One forward pass of a model with one image."""
    if name in checkpoints.generators:
        model = checkpoints.load_generator(name)
        x = torch.zeros(1, *model.sample_shape)
        return partial(model, x, at_time(model.times(1)[0], x), torch.tensor([0]))
    model = checkpoints.load(name)
    return partial(model, torch.zeros(1, *preprocessing.input_size(model)))


def _size(model: nn.Module, forward: Callable[[], object]) -> dict[str, str]:
    """Parameters, and the multiply-adds of a forward pass with one image."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        forward()
    return {
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "Multiply-adds, one image": f"{counter.get_total_flops() / 2e9:.3g} G",
    }


@torch.inference_mode()
def latencies(pair: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of each of two forward passes: medians of passes that take turns."""
    taken: list[list[float]] = [[] for _ in pair]
    for forward in pair:
        forward()
    end = time.perf_counter() + SECONDS
    while len(taken[0]) < 3 or (len(taken[0]) < ROUNDS and time.perf_counter() < end):
        for times, forward in zip(taken, pair, strict=True):
            start = time.perf_counter()
            forward()
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]
