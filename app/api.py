"""The named endpoints, reachable with `gradio_client`. They raise gr.Error in one line when an argument is wrong."""

import io
from collections.abc import Callable
from typing import Literal

import gradio as gr
import numpy as np
import torch
from torch import Tensor, nn

import vca
from app.runtime import cost, interventions, records, sampling
from app.runtime.checkpoints import Checkpoints
from app.runtime.gradio_adapter import kept_file, png_file
from app.runtime.images import read_image, uploaded_file
from app.runtime.limits import heavy_work
from app.runtime.sampling import Run, check_request, one_line
from app.runtime.validation import listed, one_of, refused, whole
from vca import drawing, preprocessing
from vca.attribution import METHODS
from vca.diffusion.sampling import silent
from vca.diffusion.vae import DecoderError
from vca.faithfulness import BASELINES, curves, random_map

STAGES = ("stage1", "stage2", "effective")
METHOD = next(iter(METHODS))
TOP = 5  # labels, where there are so many
PICTURE = 384  # pixels, the width of the picture of an attribution
ORDERS, STEPS = 3, 16  # random orders that a faithful one is compared with, and steps of a curve


def build(checkpoints: Checkpoints) -> None:
    """Registers the endpoints. Their docstrings are what a caller, or an assistant through MCP, is told of them."""
    first = next(iter(checkpoints.classifiers), "")
    second = next(iter(checkpoints.classifiers[1:]), first)
    first_generator = next(iter(checkpoints.generators), "")

    def models() -> list[dict]:
        """The checkpoints served here: name, task (classify or generate), architecture and classes.

        Of a classifier also its input size, and heads and grids of every block; of a generator the shape of its
        pictures or latents, its samplers, and the autoencoder that it needs; of a damaged one its problem.
        """
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

    def classify(image: gr.FileData, model: str = first, top_k: int | None = None) -> dict[str, float]:
        """The likeliest labels of an image, as {label: probability}.

        Args:
            image: a photo: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.
            model: a classifier of /models, or a Hub id such as user/name; default the first one served.
            top_k: how many labels; default 5, or as many as there are.
        """
        network = checkpoints.load(model)
        count = label_count(network, top_k)
        with heavy_work():
            x = preprocessing.preprocess(network, read_image(uploaded_file(image)))
            probabilities = records.classify(network, x)
        return records.top_labels(network, probabilities, count)

    def attention(
        image: gr.FileData,
        model: str = first,
        block: int | None = None,
        head: int = 0,
        stage: Literal["stage1", "stage2", "effective"] = "effective",
        query: int = 0,
    ) -> gr.FileData:
        """The attention maps of one query of one head, as .npz. All counts start at 0.

        Arrays: positive, negative and differential (those that the stage has), or effective; grid_size, token_grid,
        num_prefix_tokens, lambdas. Tokens are the prefix tokens, then the patches, row by row. stage1 is the map from
        a contrast token to all tokens, stage2 from a token to the contrast tokens, effective from token to tokens.

        Args:
            image: a photo.
            model: a classifier of /models, or a Hub id such as user/name; default the first one served.
            block: index of the block; default the last one.
            head: index of the head.
            stage: stage1, stage2 or effective.
            query: index of the contrast token or token.
        """
        network = checkpoints.load(model)
        one_of("stage", stage, STAGES)
        with heavy_work():
            picture = read_image(uploaded_file(image))
            _, maps = records.record(network, preprocessing.preprocess(network, picture))
            return attention_of(records.whole_grid(maps), block, head, stage, query)

    def attention_of(maps: list[vca.LayerMaps], block: int | None, head: int, stage: str, query: int) -> gr.FileData:
        layer = maps[-1] if block is None and maps else next((m for m in maps if m.block == block), None)
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
        model: str = first,
        block: int | str = "all",
        head: int | list[int] | None = None,
        lambda1: float | None = None,
        lambda2: float | None = None,
        lambda_scale: float | None = None,
        off: list[str] | None = None,
        patches: list[int] | None = None,
        top_k: int | None = None,
    ) -> dict[str, dict[str, float]]:
        """What a classifier answers before and after a part of its attention is changed or patches are painted out.

        {"before": {label: probability}, "after": {label: probability}}, both of the labels that are among the top_k of
        either, likeliest first. All counts start at 0. What a block does not have is refused. A stream that is off has
        a map of zeros, a stage that is off looks everywhere alike.

        Args:
            image: a photo.
            model: a classifier of /models, or a Hub id such as user/name; default the first one served.
            block: a number, or "all".
            head: one to mute, or a list of them; their effective maps are then zero. null for none.
            lambda1: a number in the place of the learned lambda of Stage I; null leaves it.
            lambda2: a number in the place of the learned lambda of Stage II; null leaves it.
            lambda_scale: what all lambdas of the block are multiplied with; null for nothing.
            off: a list of streams, "positive" and "negative", and of stages, "stage1" and "stage2".
            patches: a list of patches to paint with the mean color, counted row by row.
            top_k: how many labels; default 5, or as many as there are.
        """
        network = checkpoints.load(model)
        count = label_count(network, top_k)
        x = preprocessing.preprocess(network, read_image(uploaded_file(image)))
        lambdas = dict(lambda1=lambda1, lambda2=lambda2, lambda_scale=lambda_scale)
        after = interventions.answer(network, x, block=block, head=head, off=off, patches=patches, **lambdas)
        before = records.classify(network, x)
        shown = records.top_labels(network, before, count) | records.top_labels(network, after, count)
        return {
            name: {label: p for label, p in records.top_labels(network, found, len(found)).items() if label in shown}
            for name, found in (("before", before), ("after", after))
        }

    def attribution(
        image: gr.FileData, model: str = first, method: str = METHOD, label: str | None = None
    ) -> list[gr.FileData]:
        """What in an image speaks for a class, and what against it: a PNG over the image, and the numbers as .npz.

        In the picture orange speaks for the class and blue against it. Arrays: values, one a pixel of the model's
        input; label; probability. The methods are gradient-weighted effective map, effective-map rollout, relevance
        (AttnLRP), integrated gradients, gradient x input, and occlusion.

        Args:
            image: a photo.
            model: a classifier of /models, or a Hub id such as user/name; default the first one served.
            method: the name of a method.
            label: the class; default the likeliest one.
        """
        network, x, index, probabilities = asked(image, model, label)
        values = explained(network, x, index, method)[0].numpy()
        below = preprocessing.input_picture(network, x).resize((PICTURE, PICTURE * x.shape[2] // x.shape[3]))
        content = io.BytesIO()
        named = dict(label=network.label_names[index], probability=probabilities[index])
        np.savez(content, values=values, **named)
        picture = png_file(drawing.laid_over(below, values), "attribution.png")
        return [gr.FileData(path=picture), gr.FileData(path=kept_file(content.getvalue(), "attribution.npz"))]

    def faithfulness(
        image: gr.FileData, model: str = first, method: str = METHOD, label: str | None = None
    ) -> dict[str, dict[str, float]]:
        """Whether a classifier relies on what an attribution marks: areas under deletion and insertion curves.

        {order: {"deletion": area, "insertion": area}} for the order of the attribution, random orders, a centre prior
        and an edge map. Deletion paints over the most important cells first: small is faithful. Insertion brings them
        back to a blurred image: large is faithful. An area means little without those of the other orders.

        Args:
            image: a photo.
            model: a classifier of /models, or a Hub id such as user/name; default the first one served.
            method: as in /attribution.
            label: the class; default the likeliest one.
        """
        network, x, index, _ = asked(image, model, label)
        orders = {method: explained(network, x, index, method)}
        orders |= {f"random {i + 1}": random_map(x, i) for i in range(ORDERS)}
        orders |= {name: baseline(x) for name, baseline in BASELINES.items()}
        with heavy_work():
            found = curves(network, x, torch.tensor([index]), orders, STEPS)
        return {
            name: dict(deletion=curve.deletion_area.item(), insertion=curve.insertion_area.item())
            for name, curve in found.items()
        }

    def compare(
        image: gr.FileData, model: str = first, other: str = second, top_k: int | None = None
    ) -> dict[str, dict[str, str | dict[str, float]]]:
        """What two classifiers say of the same image, and what each costs.

        {name: {"answers": {label: probability}, "Parameters": ..., "Multiply-adds, one image": ...}}

        Args:
            image: a photo.
            model: a classifier of /models, or a Hub id such as user/name; default the first one served.
            other: another one, or a CNN of timm's; default the second one served.
            top_k: how many labels of each; default 5, or as many as there are.
        """
        networks = {model: checkpoints.load(model), other: checkpoints.load(other, cnn=True)}
        picture = read_image(uploaded_file(image))
        sides = {}
        for name, network in networks.items():
            count = label_count(network, top_k)
            with heavy_work():
                probabilities = records.classify(network, preprocessing.preprocess(network, picture))
                answers = records.top_labels(network, probabilities, count)
                sides[name] = dict(answers=answers) | cost.size_facts(network)
        return sides

    def asked(image: dict, model: str, label: str | None) -> tuple[nn.Module, Tensor, int, np.ndarray]:
        """The network, its input, the index of the class, by default the likeliest one, and all probabilities."""
        network = checkpoints.load(model)
        if label is not None:
            one_of("label", label, network.label_names)
        with heavy_work():
            x = preprocessing.preprocess(network, read_image(uploaded_file(image)))
            probabilities = records.classify(network, x)
        index = int(probabilities.argmax()) if label is None else network.label_names.index(label)
        return network, x, index, probabilities

    def explained(network: nn.Module, x: Tensor, index: int, method: str) -> Tensor:
        one_of("method", method, list(METHODS))
        try:
            with heavy_work():
                return METHODS[method](network, x, torch.tensor([index]))
        except ValueError as error:
            raise refused(f"{method} is not defined here: {error}") from None

    def generate(
        label: str | None = None,
        model: str = first_generator,
        count: int = 4,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        sampler: str | None = None,
    ) -> list[gr.FileData]:
        """Pictures of a class as PNG files. One request is served at a time.

        A picture depends on its number and all arguments but count. What is too much is answered with the limits.

        Args:
            label: a class of the model; default its first one.
            model: a generator of /models; default the first one served.
            count: how many pictures.
            steps: steps of the sampler; default as many as suit the model best, or 50 where that was not measured.
            guidance: guidance scale, 1 for none; default the one that suits the model best, or 3.
            seed: a whole number from 0.
            sampler: one of those in /models; default the first.
        """
        network = checkpoints.load_generator(model)
        label = network.label_names[0] if label is None else label
        best_steps, best_guidance = sampling.defaults_of(checkpoints.configs[model])
        steps = best_steps if steps is None else steps
        guidance = best_guidance if guidance is None else guidance
        run = Run(network, check_request(network, label, count, steps, guidance, seed, sampler))
        try:
            run.sample(silent)
        except DecoderError as error:
            raise refused(one_line(error)) from None
        pictures = [run.picture(run.request.steps, index) for index in range(run.request.count)]
        return [gr.FileData(path=png_file(image, f"{i:02d}.png")) for i, image in enumerate(pictures)]

    gr.api(models, api_name="models")
    gr.api(classify, api_name="classify")
    gr.api(attention, api_name="attention")
    gr.api(attribution, api_name="attribution")
    gr.api(faithfulness, api_name="faithfulness")
    gr.api(compare, api_name="compare")
    gr.api(intervene, api_name="intervene")
    gr.api(generate, api_name="generate", **sampling.QUEUE)


def label_count(network: nn.Module, top_k: int | None) -> int:
    """How many labels to answer with."""
    return min(TOP, network.num_classes) if top_k is None else whole("top_k", top_k, 1, network.num_classes)


def query_rows(layer: vca.LayerMaps, stage: str, head: int, query: int) -> dict[str, np.ndarray]:
    """The maps of one query as arrays: positive, negative, differential of a stage, or effective.

    Raises:
        gr.Error: the layer has no such stage, or `query` is out of range; the message names what is allowed.
    """

    maps = (layer.stage2 or layer.stage1) if stage == "effective" else getattr(layer, stage)
    if maps is None:
        raise refused("stage must be one of: stage1, effective. This attention has one stage.")
    at = whole("query", query, 0, maps.positive.shape[2] - 1)
    if stage == "effective":
        return dict(effective=layer.effective_rows(slice(at, at + 1))[0, head, 0].numpy())
    return {name: stream[0, head, at].numpy() for name, stream in vars(maps).items() if stream is not None}
