"""Generating pictures for a visitor: the checks of a request, the run, and the states that it keeps for Explore."""

import io
from collections.abc import Iterator
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from textwrap import shorten
from threading import Event, Thread

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vca
from app import settings
from app.runtime.validation import number, one_of, refused, whole
from vca.diffusion.sampling import Callback, at_time, silent, to_bytes
from vca.models.dit import DiffusionTransformer

MAX_COUNT, MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 16, 250, 10, 2**32 - 1
MAX_WORK = 1600  # pictures times steps; a step of Heun's method is two
KEPT_STATES = 50
EXPLORED_SIDE = 384
TOO_LARGE = "These pictures are too large to be generated here."
FRAMES_PER_SECOND, DECODED_PER_SECOND = 12, 2  # shown while they grow; of latents, which have to be decoded
COLUMNS, TILE = 4, 128  # pictures in a row of a saved grid, and how high one is at least
FILM_MS, LAST_MS = 80, 2000  # milliseconds of a frame of a film, and of the last
QUEUE = dict(concurrency_limit=1, concurrency_id="generate")  # gradio's: one at a time, of all visitors together


def defaults_of(config: dict) -> tuple[int, float]:
    """Steps and guidance scale that suit the generator of a `config.json` best, as its quality was measured."""
    best = config.get("sampling", {})
    return min(best.get("steps", 50), MAX_STEPS), min(max(best.get("guidance_scale", 3), 1), MAX_GUIDANCE)


@dataclass(frozen=True)
class Request:
    """Pictures to generate. The i-th depends on everything here but `count`."""

    label: str
    count: int
    steps: int
    guidance: float
    seed: int
    sampler: str


def check_request(model: DiffusionTransformer, label, count, steps, guidance, seed, sampler) -> Request:
    """Checks every part of a request.

    Raises:
        gr.Error: an argument is wrong; the message says which, and what is allowed.
    """
    samplers = list(model.objective.SAMPLERS)
    request = Request(
        label=one_of("label", label, model.label_names),
        count=whole("count", count, 1, MAX_COUNT),
        steps=whole("steps", steps, 1, MAX_STEPS),
        guidance=number("guidance", guidance, 1, MAX_GUIDANCE),
        seed=whole("seed", seed, 0, MAX_SEED),
        sampler=samplers[0] if sampler is None else one_of("sampler", sampler, samplers),
    )
    limit = MAX_WORK // 2 if request.sampler == "heun" else MAX_WORK
    if request.count * request.steps > limit:
        raise refused(f"count times steps may be at most {limit} with {request.sampler}.")
    return request


class Stopped(Exception):
    """Raised within the sampler to end it."""


@dataclass
class Run:
    """One request, running or finished.

    Attributes:
        states: the state (B, C, H, W) after so many steps, for at most about `KEPT_STATES` steps, and where it stopped.
        images: the finished pictures (B, 3, H, W) in [0, 1], or None.
        stop: set it to end the run at its next step.
    """

    model: DiffusionTransformer
    request: Request
    states: dict[int, Tensor] = field(default_factory=dict)
    images: Tensor | None = None
    stop: Event = field(default_factory=Event)

    @property
    def schedule(self) -> dict:
        """When guidance applies and where the steps lie: what suits the model best, arguments of its `sample`."""
        best = self.model.sampling
        return {name: best[name] for name in ("guidance_interval", "time_shift") if name in best}

    @property
    def size(self) -> int:
        """Bytes of the states that this run may come to hold."""
        kept = min(self.request.steps, KEPT_STATES + 1) + 1
        return 4 * kept * self.request.count * int(np.prod(self.model.sample_shape))

    def sample(self, callback: Callback) -> None:
        """Generates the pictures; `callback` sees every state. Ends early, without pictures, once `stop` is set.

        On a lent GPU, which is another process, there is no callback and no end before the last step.

        Raises:
            vca.diffusion.vae.DecoderError: the model needs a VAE that is not here.
        """
        if settings.lends_gpu():
            if self.model.latent_decoder:
                self.model.latent_decoder.load(torch.device("cpu"))
            self.states, self.images = on_lent_gpu(self.model, self.request)
        else:
            self.sample_here(callback)

    def sample_here(self, callback: Callback) -> None:
        """Does what `sample` says in this process."""
        request = self.request
        kept = {step * request.steps // KEPT_STATES for step in range(KEPT_STATES)} | {request.steps - 1}

        def keep(step: int, total: int, x: Tensor) -> None:
            if self.stop.is_set() and step < total:
                self.states[step] = x
                raise Stopped
            if step in kept:
                self.states[step] = x
            callback(step, total, x)

        label = self.model.label_names.index(request.label)
        with suppress(Stopped):
            self.images = self.model.sample(
                [label] * request.count,
                steps=request.steps,
                guidance_scale=request.guidance,
                seed=request.seed,
                sampler=request.sampler,
                callback=keep,
                **self.schedule,
            )

    def progress(self) -> Iterator[tuple[int, Tensor]]:
        """Samples in a thread of its own; yields the newest step and state, a few times a second.

        Closing the iterator stops the run. Raises what `sample` raises.
        """
        news, ended, faults = Event(), Event(), []
        newest = (0, None)

        def note(step: int, total: int, x: Tensor) -> None:
            nonlocal newest
            newest = (step, x)
            news.set()

        def work() -> None:
            try:
                self.sample(note)
            except Exception as error:  # raised again where the run was asked for
                faults.append(error)
            ended.set()
            news.set()

        Thread(target=copy_context().run, args=(work,), daemon=True).start()  # the visitor's share of a lent GPU
        try:
            while news.wait() and not ended.is_set():
                news.clear()
                yield newest
                ended.wait(1 / (DECODED_PER_SECOND if decodes(self.model) else FRAMES_PER_SECOND))
        finally:
            self.stop.set()
        if faults:
            raise faults[0]

    def time(self, step: int) -> float:
        """The time t at which the network saw the state after `step` steps."""
        shift = self.schedule.get("time_shift", 1.0)
        return self.model.times(self.request.steps, self.request.sampler, shift)[step]

    @torch.inference_mode()
    def record(self, step: int, picture: int, without_class: bool) -> list[vca.LayerMaps]:
        """The maps of one picture at a kept state, from another forward pass with the same input.

        Args:
            step: a key of `states`.
            picture: index of the picture.
            without_class: the branch of guidance that is told no class.
        """
        label = self.model.num_classes if without_class else self.model.label_names.index(self.request.label)
        x = self.states[step][picture : picture + 1]
        with vca.record(self.model) as maps:
            self.model(x, at_time(self.time(step), x), torch.tensor([label], device=x.device))
        return maps

    def caption(self, step: int, picture: int, without_class: bool) -> str:
        """Describes in words what `record` returns."""
        request, t = self.request, self.time(step)
        branch = "told no class" if without_class else "told the class"
        guidance = f", guidance {request.guidance:g}" if request.guidance != 1 else ""
        if guidance and (interval := self.schedule.get("guidance_interval")):
            guidance += f" from {interval[0]:g} to {interval[1]:g} of the way"
        return (
            f"{self.model.architecture}: {request.label}, picture {picture + 1}, seed {request.seed}, "
            f"after {step} of {request.steps} steps of {request.sampler}{guidance}: what the network looked at next, "
            f"at t = {t:.4g}, {branch}"
        )

    def frame(self, step: int) -> Image.Image:
        """All pictures after so many steps, one below another: of a kept state, or the finished ones.

        Raises:
            KeyError: that state is not kept.
        """
        if step == self.request.steps and self.images is not None:
            return strip(self.images)
        return strip(preview(self.model, self.states[step]))

    @torch.inference_mode()
    def predicted(self, step: int) -> Image.Image:
        """The final pictures that the network expects on seeing a kept state: another pass with the same guidance.

        Raises:
            KeyError: that state is not kept.
        """
        request, x = self.request, self.states[step]
        labels = torch.full((request.count,), self.model.label_names.index(request.label), device=x.device)
        interval = self.schedule.get("guidance_interval", (0.0, 1.0))
        network = self.model.conditioned(labels, request.guidance, guidance_interval=interval)
        return strip(preview(self.model, self.model.objective.predicted(network, x, self.time(step))))

    def grid(self) -> Image.Image:
        """The newest pictures, `COLUMNS` in a row, small ones enlarged."""
        step = max(self.states) if self.images is None else self.request.steps
        return tiled(self.frame(step), self.request.count)

    def film(self) -> bytes:
        """A GIF of the pictures growing out of noise, which stays on the last for a while."""
        steps = sorted(self.states) + ([] if self.images is None else [self.request.steps])
        frames = [tiled(self.frame(step), self.request.count) for step in steps]
        stream = io.BytesIO()
        lengths = [FILM_MS] * (len(frames) - 1) + [LAST_MS]
        frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=lengths, loop=0)
        return stream.getvalue()

    def picture(self, step: int, index: int) -> Image.Image:
        """One picture of a frame."""
        frame = self.frame(step)
        rows = frame.height // self.request.count
        return frame.crop((0, index * rows, frame.width, (index + 1) * rows))


def gpu_seconds(model: DiffusionTransformer, request: Request) -> int:
    """An upper bound on the seconds of a request on a lent GPU: its start, and the steps of a large model."""
    return 20 + request.count * request.steps // 40


@settings.on_lent_gpu(gpu_seconds)
def on_lent_gpu(model: DiffusionTransformer, request: Request) -> tuple[dict[int, Tensor], Tensor]:
    """The states that a run of this request keeps, and its pictures."""
    run = Run(model.to("cuda" if torch.cuda.is_available() else "cpu"), request)
    run.sample_here(silent)
    return {step: x.cpu() for step, x in run.states.items()}, run.images.cpu()


def decodes(model: DiffusionTransformer) -> bool:
    """Whether the states that are shown are latents, and decoded."""
    return bool(model.latent_decoder and model.latent_decoder.is_small)


def preview(model: DiffusionTransformer, x: Tensor) -> Tensor:
    """States (B, C, H, W) as pictures (B, 3, H, W) in [0, 1]: three channels of latents that are slow to decode."""
    if model.latent_decoder and not decodes(model):
        return (x[:, :3] / 4 + 0.5).clamp(0, 1)
    return model.decode(x)


def strip(images: Tensor) -> Image.Image:
    """Images (B, 3, H, W) in [0, 1] as one picture of B * H rows."""
    return Image.fromarray(to_bytes(images).permute(0, 2, 3, 1).flatten(0, 1).cpu().numpy())


def tiled(frame: Image.Image, count: int) -> Image.Image:
    """A frame's pictures, which stand one below another, as a grid; small ones are enlarged."""
    height = frame.height // count
    scale = max(1, TILE // height)
    columns = min(count, COLUMNS)
    size = (scale * frame.width, scale * height)
    grid = Image.new("RGB", (columns * size[0], -(-count // columns) * size[1]), "white")
    for i in range(count):
        one = frame.crop((0, i * height, frame.width, (i + 1) * height)).resize(size, Image.Resampling.BICUBIC)
        grid.paste(one, (i % columns * size[0], i // columns * size[1]))
    return grid


def enlarged(picture: Image.Image) -> Image.Image:
    """Enlarges a small picture to a height of `EXPLORED_SIDE` pixels, smoothly."""
    size = (EXPLORED_SIDE * picture.width // picture.height, EXPLORED_SIDE)
    return picture.resize(size, Image.Resampling.BICUBIC)


def one_line(error: Exception, limit: int = 400) -> str:
    """The message of an error on one line, cut off after `limit` characters."""
    return shorten(str(error), limit, placeholder=" ...")


def describe(name: str, model: DiffusionTransformer) -> dict:
    """A generator's facts as JSON values."""
    return dict(
        name=name,
        architecture=model.architecture,
        classes=model.label_names,
        sample_shape=list(model.sample_shape),
        samplers=list(model.objective.SAMPLERS),
        vae=model.latent_decoder.source if model.latent_decoder else None,
        blocks=len(model.blocks),
        grid_size=model.grid_size,
    )
