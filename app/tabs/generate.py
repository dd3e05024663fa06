"""The Generate tab: pictures of a class appear step by step, and each step can be sent to Explore.

The page (generate.html, .css and .js) shows the frames that stream in. The server keeps the states of the newest runs,
for the timeline and for "Explore this step".
"""

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
from html import escape
from os.path import isdir

import gradio as gr
import torch
from PIL import Image

from app.components import model_dropdown, page_part, sampling_settings
from app.context import Context
from app.runtime import sampling
from app.runtime.checkpoints import Checkpoints
from app.runtime.gradio_adapter import nobody_listens, png_file
from app.runtime.limits import heavy_work
from app.runtime.packing import run_of
from app.runtime.sampling import Run
from app.runtime.store import Store
from app.runtime.validation import one_of, page_request, refused, told, whole
from vca import drawing
from vca.checkpoint import AUTOENCODER_FOLDER
from vca.diffusion.vae import DecoderError, described
from vca.models import GENERATORS, autoencoder_of
from vca.models.dit import OBJECTIVES

TITLE = "Generate"
STORE_BYTES = 256 * 2**20
NO_GENERATOR = """<p class="vca-empty">There is no generator yet. Train one with
<code>python -m training.generate cifar10_sit_vca --data FOLDER</code>, copy
<code>runs/cifar10_sit_vca/checkpoint</code> to <code>weights/NAME</code>, and start the app again.</p>"""
LATENTS = """<p class="vca-hint">This model makes latents. {decoder} turns them into pictures.</p>"""
FORGOTTEN = "These pictures are no longer kept on the server. Please generate them again."
FIT_STEPS = f"""(count, sampler, steps) => {{
    const work = {sampling.MAX_WORK} / (sampler === "heun" ? 2 : 1);
    const maximum = Math.min({sampling.MAX_STEPS}, Math.floor(work / count));
    return {{ __type__: "update", maximum, value: Math.min(steps, maximum) }};
}}"""
WAITING = '() => JSON.stringify({ state: "waiting" })'
FAILED = '() => JSON.stringify({ state: "failed" })'


def build(context: Context) -> None:
    """Builds the tab and connects its pictures to Explore and Classify."""
    checkpoints = context.checkpoints
    if not checkpoints.generators:
        gr.HTML(NO_GENERATOR)
        return
    store = Store(STORE_BYTES, lambda run: run.size, sampling.TOO_LARGE)

    def generate(request: gr.Request, name, *arguments) -> Iterator[str]:
        try:
            model = checkpoints.load_generator(name)
            run = Run(model, sampling.check_request(model, *arguments))
            about = _facts(run) | dict(token=store.put(run))
            for frames, (step, x) in enumerate(run.progress()):
                if nobody_listens(context.page, request, frames):
                    return
                frame = sampling.strip(sampling.preview(model, x))
                yield json.dumps(about | dict(state="running", step=step, image=drawing.data_url(frame, "PNG")))
        except gr.Error as error:
            yield json.dumps(dict(problem=error.message))
        except DecoderError as error:
            yield json.dumps(dict(problem=sampling.one_line(error)))
        else:
            yield json.dumps(about | _ended(run))

    def choose_model(name: str):
        one_of("model", name, checkpoints.generators)
        config = checkpoints.configs[name]
        labels, samplers, note = _choices(config)
        steps, guidance = sampling.defaults_of(config)
        return (
            gr.Dropdown(labels, value=_first(config)),
            gr.Dropdown(samplers, value=samplers[0]),
            gr.HTML(note, visible=bool(note)),
            gr.Slider(value=steps),
            gr.Slider(value=guidance),
        )

    @page_request
    def fetch_frame(request: dict) -> dict:
        """A frame of a run, for the page. The request names the run's token and the step."""
        return dict(image=drawing.data_url(store.get(request["token"]).frame(request["step"]), "PNG"))

    @page_request
    def fetch_predicted(request: dict) -> dict:
        """The final pictures that the network expected at a step. The request names the run's token and the step."""
        run = store.get(request["token"])
        with heavy_work():
            return dict(image=drawing.data_url(run.predicted(request["step"]), "PNG"))

    @page_request
    def fetch_run(request: dict) -> dict:
        """What `generate` sent at the end of a run that is still kept, for a page that was reloaded."""
        return _ended(store.get(request["token"])) | dict(token=request["token"])

    @page_request
    def save_run(request: dict) -> dict:
        """The pictures of a run as a file: a grid, or a film of their growing."""
        run = store.get(request["token"])
        with heavy_work():
            if request["form"] == "gif":
                return dict(url=f"data:image/gif;base64,{base64.b64encode(run.film()).decode()}")
            return dict(url=drawing.data_url(run.grid(), "PNG"))

    @page_request
    def stop_run(request: dict) -> dict:
        """Ends a run at its next step, for the page. The request names the run's token."""
        store.get(request["token"]).stop.set()
        return {}

    def chosen(event: gr.EventData) -> tuple[Run, int, int, Image.Image]:
        """The run, the step, the index of the picture and the picture that a button of the page was pressed for."""
        try:
            run, step = store.get(event.token), event.step
            picture = whole("picture", event.picture, 0, run.request.count - 1)
            return run, step, picture, run.picture(step, picture)
        except (LookupError, TypeError, AttributeError):  # forgotten, or not an event of our page
            raise refused(FORGOTTEN) from None

    def explore_step(event: gr.EventData):
        run, step, number, picture = chosen(event)
        without_class = bool(told(event, "withoutClass"))
        if step not in run.states:
            raise refused(FORGOTTEN)
        with heavy_work():
            maps = run.record(step, number, without_class)
        caption = ("This step", run.caption(step, number, without_class))
        view = run_of(context.maps, maps, drawing.muted(sampling.enlarged(picture)), caption, [])
        return json.dumps(view), gr.Tabs(selected="explore")

    def classify_picture(event: gr.EventData):
        return png_file(chosen(event)[-1], "generated.png"), gr.Tabs(selected="classify")

    first = checkpoints.configs[checkpoints.generators[0]]
    labels, samplers, about_first = _choices(first)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            name = model_dropdown("Generator", checkpoints.choices(checkpoints.generators), checkpoints.generators[0])
            note = gr.HTML(about_first, visible=bool(about_first))
            label = gr.Dropdown(labels, label="Class", value=_first(first))
            count = gr.Slider(1, sampling.MAX_COUNT, 8, step=1, label="Pictures", buttons=[])
            seed, steps, guidance = sampling_settings(*sampling.defaults_of(first))
            sampler = gr.Dropdown(samplers, label="Sampler", value=samplers[0])
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=7, min_width=320):
            viewer = page_part(
                "generate.html",
                "generate.js",
                ("view.css", "generate.css"),
                "",
                server_functions=[fetch_frame, fetch_predicted, fetch_run, save_run, stop_run],
                elem_id="generated",
            )

    quiet = dict(show_progress="hidden", api_visibility="private")
    button.click(None, outputs=viewer, js=WAITING, **quiet)
    running = button.click(
        generate,
        [name, label, count, steps, guidance, seed, sampler],
        viewer,
        preprocess=False,
        **sampling.QUEUE,
        **quiet,
    )
    running.failure(None, outputs=viewer, js=FAILED, **quiet)
    viewer.stop(None, cancels=[running], **quiet)
    gr.on([count.release, sampler.input], None, [count, sampler, steps], steps, js=FIT_STEPS, **quiet)
    name.change(choose_model, name, [label, sampler, note, steps, guidance], **quiet)
    viewer.select(explore_step, outputs=[context.explored, context.tabs], **quiet)
    viewer.submit(classify_picture, outputs=[context.image, context.tabs], **quiet)


def prepare(checkpoints: Checkpoints) -> None:
    """Loads the generator that the tab opens on, with an autoencoder that comes with it: the first pictures then come
    sooner by some seconds. What fails is said when pictures are asked for."""
    with suppress(IndexError, gr.Error, DecoderError):
        decoder = checkpoints.load_generator(checkpoints.generators[0]).latent_decoder
        if decoder and isdir(decoder.source):
            decoder.load(torch.device("cpu"))


def _choices(config: dict) -> tuple[list[str], list[str], str]:
    """Labels and samplers of the generator with this `config.json`, and a note about its autoencoder as HTML."""
    spec = GENERATORS[config["architecture"]]
    vae = autoencoder_of(config)
    note = LATENTS.format(decoder=_decoder(vae)) if vae else ""
    return config["label_names"], list(OBJECTIVES[spec["family"]].SAMPLERS), note


def _decoder(vae: str) -> str:
    if vae == AUTOENCODER_FOLDER:
        return "An autoencoder that comes with it"
    fetched = "" if isdir(str(vae)) else ", fetched when it is first used,"
    return f"The autoencoder {escape(described(str(vae)))}{fetched}"


def _first(config: dict) -> str:
    """The class that is chosen at first: the one that was recognized most often, where that was measured."""
    labels = config["label_names"]
    try:
        quality = config["training"][-1]["results"]["quality"]
        best = next(row for row in quality["guidance"] if row["guidance"] == quality["best_guidance"])
        shares = [float(share) for share in best["recognised_by_class"]]
        return labels[shares.index(max(shares))]
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
        return labels[0]


def _ended(run: Run) -> dict:
    """What the page is told at the end of a run: its newest pictures, and its timeline."""
    step = max(run.states) if run.images is None else run.request.steps
    state = "stopped" if run.images is None else "complete"
    frame = drawing.data_url(run.frame(step), "PNG")
    return _facts(run) | dict(state=state, step=step, image=frame, timeline=_timeline(run))


def _facts(run: Run) -> dict:
    """Facts of a run for the page, as JSON values."""
    request = run.request
    return dict(label=request.label, count=request.count, steps=request.steps, guided=request.guidance != 1)


def _timeline(run: Run) -> list[dict]:
    """The frames of a finished run: the number of steps, and the time t at which the network saw that state."""
    frames = [dict(step=step, t=run.time(step)) for step in sorted(run.states)]
    return frames if run.images is None else [*frames, dict(step=run.request.steps)]
