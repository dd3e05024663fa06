"""The named endpoints, reachable with `gradio_client`. They raise gr.Error in one line when an argument is wrong."""

import io
from collections.abc import Callable
from typing import Literal

import gradio as gr
import numpy as np
from torch import Tensor

import vca
from app.runtime import interventions, records, sampling
from app.runtime.checkpoints import Checkpoints
from app.runtime.gradio_adapter import kept_file, png_file
from app.runtime.images import read_image, uploaded_file
from app.runtime.limits import heavy_work
from app.runtime.sampling import MAX_COUNT, MAX_GUIDANCE, MAX_STEPS, Run, check_request, one_line
from app.runtime.validation import listed, one_of, refused, whole
from vca import preprocessing
from vca.diffusion.sampling import silent
from vca.diffusion.vae import DecoderError

STAGES = ("stage1", "stage2", "effective")
MODELS = """The checkpoints served here: name, task (classify or generate), architecture and classes; of a classifier
its input size, and heads and grids of every block; of a generator the shape of its pictures or latents, its samplers,
and the autoencoder that it needs; of a damaged one its problem."""
CLASSIFY = "The top_k likeliest labels of an image, as {label: probability}."
ATTENTION = """The maps of one query of one head, as .npz. All counts start at 0; tokens are the prefix tokens, then the
patches, row by row. stage1: the query is a contrast token, the maps cover all tokens. stage2: the query is a token, the
maps cover the contrast tokens. effective: from token to tokens. Arrays: positive, negative and differential (those that
the stage has), or effective; grid_size, token_grid, num_prefix_tokens, lambdas."""

INTERVENE = """What a classifier answers before and after a part of its attention is changed or patches are painted out:
{"before": {label: probability}, "after": {label: probability}}, both of the labels that are among the top_k of either,
likeliest first. All counts start at 0. block: a number, or "all". head: one to mute; its effective map is then zero.
lambda1, lambda2: numbers in the place of the learned lambdas. off: a list of "positive" and "negative", streams whose
maps are then zero, and of "stage1" and "stage2", stages that then look everywhere alike. patches: a list of patches to
paint with the mean color, counted row by row. What is left out or null stays as it is; what a block does not have is
refused."""

GENERATE = f"""Pictures of a class as PNG files. A picture depends on its number and all arguments but count. count is
from 1 to {MAX_COUNT}, steps from 1 to {MAX_STEPS}, guidance from 1 (none) to {MAX_GUIDANCE}, seed from 0; sampler is
one of those in /models, by default the first. One request is served at a time."""


def build(checkpoints: Checkpoints) -> None:
    """Registers /models, /classify, /attention, /intervene and /generate."""

    def list_models() -> list[dict]:
        tasks = (
            ("classify", checkpoints.classifiers, checkpoints.load, records.describe),
            ("generate", checkpoints.generators, checkpoints.load_generator, sampling.describe),
        )
        return [dict(task=task) | described(name, load, facts) for task, names, load, facts in tasks for name in names]

    def described(name: str, load: Callable, facts: Callable) -> dict:
        try:
            return facts(name, load(name))
        except gr.Error as error:  # a damaged one is no reason to hide the others
            return dict(name=name, problem=error.message)

    def classify(image: gr.FileData, model: str, top_k: int = 5) -> dict[str, float]:
        network = checkpoints.load(model)
        count = whole("top_k", top_k, 1, network.num_classes)
        with heavy_work():
            x = preprocessing.preprocess(network, read_image(uploaded_file(image)))
            probabilities = records.classify(network, x)
        return records.top_labels(network, probabilities, count)

    def attention(
        image: gr.FileData,
        model: str,
        block: int,
        head: int,
        stage: Literal["stage1", "stage2", "effective"],
        query: int,
    ) -> gr.FileData:
        network = checkpoints.load(model)
        one_of("stage", stage, STAGES)
        with heavy_work():
            picture = read_image(uploaded_file(image))
            _, maps = records.record(network, preprocessing.preprocess(network, picture))
            return attention_of(records.whole_grid(maps), block, head, stage, query)

    def attention_of(maps: list[vca.LayerMaps], block: int, head: int, stage: str, query: int) -> gr.FileData:
        layer = next((layer for layer in maps if layer.block == block), None)
        if layer is None:
            raise refused(f"block must be one of: {listed(layer.block for layer in maps)}.")
        head = whole("head", head, 0, layer.stage1.positive.shape[1] - 1)
        arrays = query_rows(layer, stage, head, query)
        geometry = dict(grid_size=layer.grid_size, num_prefix_tokens=layer.num_prefix_tokens)
        if layer.token_grid is not None:
            geometry["token_grid"] = layer.token_grid
        if lambdas := [float(value) for value in (layer.lambda1, layer.lambda2) if value is not None]:
            geometry["lambdas"] = lambdas
        content = io.BytesIO()
        np.savez(content, **arrays, **geometry)
        return gr.FileData(path=kept_file(content.getvalue(), f"{stage}.npz"))

    def intervene(
        image: gr.FileData,
        model: str,
        block: int | str = "all",
        head: int | None = None,
        lambda1: float | None = None,
        lambda2: float | None = None,
        off: list[str] | None = None,
        patches: list[int] | None = None,
        top_k: int = 5,
    ) -> dict[str, dict[str, float]]:
        network = checkpoints.load(model)
        count = whole("top_k", top_k, 1, network.num_classes)
        x = preprocessing.preprocess(network, read_image(uploaded_file(image)))
        after = interventions.answer(network, x, block, head, lambda1, lambda2, off, patches)
        before = records.classify(network, x)
        shown = records.top_labels(network, before, count) | records.top_labels(network, after, count)
        return {
            name: {label: p for label, p in records.top_labels(network, found, len(found)).items() if label in shown}
            for name, found in (("before", before), ("after", after))
        }

    def generate(
        label: str,
        model: str,
        count: int = 4,
        steps: int = 50,
        guidance: float = 2.0,
        seed: int = 0,
        sampler: str | None = None,
    ) -> list[gr.FileData]:
        network = checkpoints.load_generator(model)
        run = Run(network, check_request(network, label, count, steps, guidance, seed, sampler))
        try:
            run.sample(silent)
        except DecoderError as error:
            raise refused(one_line(error)) from None
        pictures = [run.picture(run.request.steps, index) for index in range(run.request.count)]
        return [gr.FileData(path=png_file(image, f"{i:02d}.png")) for i, image in enumerate(pictures)]

    gr.api(list_models, api_name="models", api_description=MODELS)
    gr.api(classify, api_name="classify", api_description=CLASSIFY)
    gr.api(attention, api_name="attention", api_description=ATTENTION)
    gr.api(intervene, api_name="intervene", api_description=INTERVENE)
    gr.api(generate, api_name="generate", api_description=GENERATE, **sampling.QUEUE)


def query_rows(layer: vca.LayerMaps, stage: str, head: int, query: int) -> dict[str, np.ndarray]:
    """The maps of one query as arrays: positive, negative, differential of a stage, or effective.

    Raises:
        gr.Error: the layer has no such stage, or `query` is out of range; the message names what is allowed.
    """

    def row(maps: Tensor) -> np.ndarray:
        return maps[0, head, whole("query", query, 0, maps.shape[2] - 1)].numpy()

    if stage == "effective":
        return dict(effective=row(layer.effective))
    maps = getattr(layer, stage)
    if maps is None:
        raise refused("stage must be one of: stage1, effective. This attention has one stage.")
    return {name: row(stream) for name, stream in vars(maps).items() if stream is not None}
