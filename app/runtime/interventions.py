"""What a classifier answers once a part of its attention is changed or patches of the image are painted out."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from torch import Tensor, nn

import vca
from app.runtime import records
from app.runtime.sampling import one_line
from app.runtime.validation import number, one_of, refused, whole
from vca.interventions import OFF, changeable

LAMBDAS = -10, 10  # the lambdas that may be set; learned ones are a little below 1


def answer(model: nn.Module, x: Tensor, *, patches: list[int] | None = None, **change) -> np.ndarray:
    """The probabilities (classes,) of one input (1, 3, H, W), see `changed` and `vca.replace_patches`.

    Raises:
        gr.Error: as `changed`, or there is no such patch.
    """
    with changed(model, **change):
        return records.classify(model, painted(model, x, patches))


@contextmanager
def changed(
    model: nn.Module,
    block: int | str = "all",
    head: int | list[int] | None = None,
    lambda1: float | None = None,
    lambda2: float | None = None,
    lambda_scale: float | None = None,
    off: list[str] | None = None,
) -> Iterator[None]:
    """`vca.intervene` with what a visitor asks for.

    Args:
        block: index of an attention layer, or "all".
        head: one to mute, or several.
        lambda1, lambda2: None leaves the learned ones.
        lambda_scale: what to multiply all lambdas of the block with.
        off: streams and stages.

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
    if lambda_scale is not None:
        scale = number("lambda_scale", lambda_scale, *LAMBDAS)
        change |= {f"{name}_scale": scale for name in lambdas if all(name in changeable(layer) for layer in layers)}
    muted = head if isinstance(head, list) else [] if head is None else [head]
    change["mute"] = [whole("head", value, 0, heads - 1) for value in muted]
    change["off"] = [one_of("off", name, OFF) for name in _a_list("off", off)]
    with ExitStack() as stack:
        try:
            stack.enter_context(vca.intervene(model, None if block == "all" else [block], **change))
        except ValueError as error:
            raise refused(one_line(error)) from None
        yield


def painted(model: nn.Module, x: Tensor, patches: list[int] | None) -> Tensor:
    """An input (1, 3, H, W) with these patches painted with its mean color.

    Raises:
        gr.Error: there is no such patch.
    """
    try:
        return vca.replace_patches(model, x, _a_list("patches", patches))
    except ValueError as error:
        raise refused(one_line(error)) from None


def _a_list(name: str, value: list | None) -> list:
    if not isinstance(value, list | None):
        raise refused(f"{name} must be a list.")
    return value or []
