"""The named endpoints, reachable with `gradio_client`. They raise gr.Error in one line when an argument is wrong."""

import io
from collections.abc import Iterable
from typing import Literal

import gradio as gr
import numpy as np
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from torch import Tensor

import vca
from app import models
from app.images import read_image, uploaded_file

STAGES = ("stage1", "stage2", "effective")
MODELS = """The checkpoints served here: name, architecture, classes, input size, and heads and grids of every block;
of a damaged one its name and problem."""
CLASSIFY = "The top_k likeliest labels of an image, as {label: probability}."
ATTENTION = """The maps of one query of one head, as .npz. All counts start at 0; tokens are the prefix tokens, then the
patches, row by row. stage1: the query is a contrast token, the maps cover all tokens. stage2: the query is a token, the
maps cover the contrast tokens. effective: from token to tokens. Arrays: positive, negative and differential (those that
the stage has), or effective; grid_size, token_grid, num_prefix_tokens, lambdas."""


def build(checkpoints: models.Checkpoints) -> None:
    """Registers /models, /classify and /attention."""

    def list_models() -> list[dict]:
        return [describe(name) for name in checkpoints.classifiers]

    def describe(name: str) -> dict:
        try:
            return models.describe(name, checkpoints.load(name))
        except gr.Error as error:  # a damaged one is no reason to hide the others
            return dict(name=name, problem=error.message)

    def classify(image: gr.FileData, model: str, top_k: int = 5) -> dict[str, float]:
        network = checkpoints.load(model)
        count = _whole("top_k", top_k, 1, network.num_classes)
        probabilities, _ = models.run(network, models.preprocess(network, read_image(uploaded_file(image))))
        return models.top_labels(network, probabilities, count)

    def attention(
        image: gr.FileData,
        model: str,
        block: int,
        head: int,
        stage: Literal["stage1", "stage2", "effective"],
        query: int,
    ) -> gr.FileData:
        network = checkpoints.load(model)
        picture = read_image(uploaded_file(image))
        if stage not in STAGES:
            raise gr.Error(f"stage must be one of: {_list(STAGES)}.", print_exception=False)
        _, maps = models.run(network, models.preprocess(network, picture))
        layer = next((layer for layer in maps if layer.block == block), None)
        if layer is None:
            raise gr.Error(f"block must be one of: {_list(layer.block for layer in maps)}.", print_exception=False)
        head = _whole("head", head, 0, layer.stage1.positive.shape[1] - 1)
        arrays = query_rows(layer, stage, head, query)
        place = dict(grid_size=layer.grid_size, num_prefix_tokens=layer.num_prefix_tokens)
        if layer.token_grid is not None:
            place["token_grid"] = layer.token_grid
        if lambdas := [float(value) for value in (layer.lambda1, layer.lambda2) if value is not None]:
            place["lambdas"] = lambdas
        content = io.BytesIO()
        np.savez(content, **arrays, **place)
        return gr.FileData(path=save_bytes_to_cache(content.getvalue(), f"{stage}.npz", get_upload_folder()))

    gr.api(list_models, api_name="models", api_description=MODELS)
    gr.api(classify, api_name="classify", api_description=CLASSIFY)
    gr.api(attention, api_name="attention", api_description=ATTENTION)


def query_rows(layer: vca.LayerMaps, stage: str, head: int, query: int) -> dict[str, np.ndarray]:
    """The maps of one query as arrays: positive, negative, differential of a stage, or effective.

    Raises:
        gr.Error: the layer has no such stage, or `query` is out of range; the message names what is allowed.
    """

    def row(maps: Tensor) -> np.ndarray:
        return maps[0, head, _whole("query", query, 0, maps.shape[2] - 1)].numpy()

    if stage == "effective":
        return dict(effective=row(layer.effective))
    maps = getattr(layer, stage)
    if maps is None:
        raise gr.Error("stage must be one of: stage1, effective. This attention has one stage.", print_exception=False)
    return {name: row(stream) for name, stream in vars(maps).items() if stream is not None}


def _list(values: Iterable) -> str:
    return ", ".join(map(str, values))


def _whole(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or not low <= value <= high:
        raise gr.Error(f"{name} must be a whole number from {low} to {high}.", print_exception=False)
    return int(value)
