"""What a classifier answers once a part of its attention is changed or patches of the image are painted out."""

import numpy as np
from torch import Tensor, nn

import vca
from app.runtime import records
from app.runtime.sampling import one_line
from app.runtime.validation import number, one_of, refused, whole
from vca.interventions import OFF

LAMBDAS = -10, 10  # the lambdas that may be set; learned ones are a little below 1


def answer(
    model: nn.Module,
    x: Tensor,
    block: int | str = "all",
    head: int | None = None,
    lambda1: float | None = None,
    lambda2: float | None = None,
    off: list[str] | None = None,
    patches: list[int] | None = None,
) -> np.ndarray:
    """The probabilities (classes,) of one input (1, 3, H, W), see `vca.intervene` and `vca.replace_patches`.

    Args:
        block: index of an attention layer, or "all".
        head: one to mute.
        lambda1, lambda2: None leaves the learned ones.
        off: streams and stages.
        patches: those to paint with the mean color.

    Raises:
        gr.Error: an argument is impossible, or the block does not have what is to be changed.
    """
    layers = [layer for _, layer in vca.maps.attention_layers(model)]
    if not layers:
        raise refused("This model has no attention that can be changed.")
    if block != "all":
        if isinstance(block, str):
            raise refused(f'block must be "all" or a whole number from 0 to {len(layers) - 1}.')
        block = whole("block", block, 0, len(layers) - 1)
        layers = [layers[block]]
    heads = min(layer.num_heads for layer in layers)
    lambdas = dict(lambda1=lambda1, lambda2=lambda2)
    change = {name: number(name, value, *LAMBDAS) for name, value in lambdas.items() if value is not None}
    change["mute"] = [] if head is None else [whole("head", head, 0, heads - 1)]
    change["off"] = [one_of("off", name, OFF) for name in _a_list("off", off)]
    try:
        x = vca.replace_patches(model, x, _a_list("patches", patches))
        with vca.intervene(model, None if block == "all" else [block], **change):
            return records.classify(model, x)
    except ValueError as error:
        raise refused(one_line(error)) from None


def _a_list(name: str, value: list | None) -> list:
    if not isinstance(value, list | None):
        raise refused(f"{name} must be a list.")
    return value or []
