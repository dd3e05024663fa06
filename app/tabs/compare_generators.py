"""The part of the Compare tab where two generators start from the same noise. The maps of every step can be seen."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import gradio as gr

from app.components import model_dropdown, sampling_settings
from app.context import Context
from app.runtime import cost, loading, packing, sampling
from app.runtime.checkpoints import Checkpoints
from app.runtime.gradio_adapter import nobody_listens
from app.runtime.limits import heavy_work
from app.runtime.sampling import Run
from app.runtime.store import Store
from app.runtime.validation import one_of, whole
from vca import drawing
from vca.diffusion.vae import DecoderError
from vca.models.dit import DiffusionTransformer

PAIR_BYTES = 128 * 2**20
PICTURES = 4
ASK = """Choose a class and press Generate: both models start from the same noise, and the same step of both is shown
side by side."""
STARTING = '() => JSON.stringify({ working: "Starting …" })'
FAILED = '() => JSON.stringify({ failed: true, problem: "The server did not answer. Please try again in a minute." })'


class Pair(NamedTuple):
    """Two runs from the same noise, and the names of their models."""

    names: tuple[str, str]
    runs: tuple[Run, Run]


class Generators:
    """The inputs for two generators, a class and a seed, and the answers that the page draws."""

    def __init__(self, context: Context):
        self.context = context
        self.checkpoints = context.checkpoints
        self._pairs: Store[Pair] = Store(
            PAIR_BYTES, lambda pair: sum(run.size for run in pair.runs), sampling.TOO_LARGE
        )

    def build(self) -> None:
        """Makes the inputs."""
        names = self.checkpoints.generators

        def dropdown(label: str, value: str | None) -> gr.Dropdown:
            return model_dropdown(label, self.checkpoints.choices(names), value)

        self._models = [
            dropdown("First generator", next(iter(names), None)),
            dropdown("Second generator", next(reversed(names[:2]), None)),
        ]
        labels = shared_labels(self.checkpoints, *(model.value for model in self._models))
        self._label = gr.Dropdown(labels, label="Class", value=next(iter(labels), None))
        first = self.checkpoints.configs[names[0]] if names else {}
        self._settings = sampling_settings(*sampling.defaults_of(first))
        self._button = gr.Button("Generate", variant="primary")

    def connect(self, view: gr.HTML) -> None:
        """Registers the events: the button generates, and `view` shows the progress and the result."""
        quiet = dict(show_progress="hidden", api_visibility="private")
        changed = [model.change for model in self._models]
        gr.on(changed, self.choose_label, [*self._models, self._label], self._label, **quiet)
        self._button.click(None, outputs=view, js=STARTING, **quiet)
        seed, steps, guidance = self._settings
        asked = [*self._models, self._label, steps, guidance, seed]
        running = self._button.click(self.generate, asked, view, preprocess=False, **sampling.QUEUE, **quiet)
        running.failure(None, outputs=view, js=FAILED, **quiet)
        view.stop(None, cancels=[running], **quiet)

    def choose_label(self, first: str, second: str, label: str | None) -> gr.Dropdown:
        """After another choice of generators: their common labels. The chosen label stays if it is one of them."""
        for name in (first, second):
            one_of("model", name, self.checkpoints.generators)
        labels = shared_labels(self.checkpoints, first, second)
        return gr.Dropdown(labels, value=label if label in labels else next(iter(labels), None))

    def generate(
        self, request: gr.Request, first: str, second: str, label: str, steps, guidance, seed
    ) -> Iterator[str]:
        """Runs both models, one after the other. Yields the progress, and at the end the answer, as JSON."""
        names = (first, second)
        try:
            runs = [_run(self.checkpoints.load_generator(name), label, steps, guidance, seed) for name in names]
            token = self._pairs.put(pair := Pair(names, tuple(runs)))
            sent = 0
            for name, run in zip(names, runs, strict=True):
                for step, _ in run.progress():
                    sent += 1
                    if nobody_listens(self.context.page, request, sent):
                        return
                    yield json.dumps(dict(working=self.checkpoints.title(name), step=step, steps=run.request.steps))
        except gr.Error as error:
            yield json.dumps(dict(problem=error.message))
        except DecoderError as error:
            yield json.dumps(dict(problem=sampling.one_line(error)))
        else:
            request = runs[0].request
            kept = sorted({*runs[0].states, request.steps})
            film = dict(token=token, steps=kept, count=PICTURES, label=request.label, guided=request.guidance != 1)
            sides = self._sides(pair, request.steps, 0, without_class=False)
            yield packing.pair_of([side | dict(facts=self._facts(side)) for side in sides], film)

    def look(self, request: dict) -> dict:
        """Both sides at a step of a picture, for the page. The request names token, step, picture and withoutClass."""
        pair = self._pairs.get(request["token"])
        step, picture = request["step"], whole("picture", request["picture"], 0, PICTURES - 1)
        if step not in {*pair.runs[0].states, pair.runs[0].request.steps}:
            return dict(expired=True)
        with heavy_work():
            return dict(sides=self._sides(pair, step, picture, bool(request["withoutClass"])))

    def _sides(self, pair: Pair, step: int, picture: int, without_class: bool) -> list[dict]:
        """What the page needs of two generators at a step, as JSON values.

        The network never saw the finished pictures: there, the maps are those of the last step.
        """
        sides = []
        for name, run in zip(*pair, strict=True):
            seen = step if step in run.states else max(run.states)
            large = drawing.muted(sampling.enlarged(run.picture(step, picture)))
            maps = run.record(seen, picture, without_class)
            caption = ("", run.caption(seen, picture, without_class))
            side = packing.run_of(self.context.maps, maps, large, caption, [])
            frame = drawing.data_url(run.frame(step), "PNG")
            sides.append(side | dict(model=name, name=self.checkpoints.title(name), box=[0, 0, 1, 1], frame=frame))
        return sides

    def _facts(self, side: dict) -> dict[str, str]:
        name = side["model"]
        model = self.checkpoints.load_generator(name)
        card = loading.read_card(self.checkpoints.folders[name], model.training_history)
        loss = model.training_history[-1]["results"].get("val_loss") if model.training_history else None
        channels, height, width = model.sample_shape
        return {
            "Id": name,
            "Architecture": model.architecture,
            "Attention": ", ".join(sorted({block["kind"] for block in side.get("blocks", [])})),
            "Trained on": card.trained_on or "not said",
            "Validation loss, by its card": "not said" if loss is None else f"{loss:.4f}",
            "Classes": f"{model.num_classes:,}",
            "Works on": f"{width} × {height} {'latents' if model.latent_decoder else 'px'}, {channels} channels",
            **cost.size_facts(model),
            "Latency, one forward pass": "measuring …",
        }


def shared_labels(checkpoints: Checkpoints, *names: str | None) -> list[str]:
    """The labels that all these generators know, in the order of the first."""
    known = [checkpoints.configs[name]["label_names"] for name in names if name]
    return [label for label in known[0] if all(label in labels for labels in known)] if known else []


def _run(model: DiffusionTransformer, label, steps, guidance, seed) -> Run:
    return Run(model, sampling.check_request(model, label, PICTURES, steps, guidance, seed, sampler=None))
