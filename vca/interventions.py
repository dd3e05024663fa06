"""What if: running a model with a part of its attention turned off or changed, or with patches of its images replaced.

    with vca.intervene(model, blocks=[3], off=["negative"]):
        changed = model(images)
    without_a_patch = model(vca.replace_patches(model, images, [27]))

docs/interventions.md has the equations.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.layers import DiffAttention
from torch import Tensor, nn

from vca.faithfulness import mean_color, over_pixels
from vca.layers.agent import AgentAttention
from vca.layers.change import STAGES, STREAMS, UNCHANGED, Change
from vca.layers.visual_contrast import VisualContrastAttention
from vca.taps import Watcher, chosen_layers, run_layer, tapped

OFF = STREAMS + STAGES


@contextmanager
def intervene(
    model: nn.Module,
    blocks: Sequence[int] | None = None,
    *,
    lambda1: float | None = None,
    lambda2: float | None = None,
    lambda1_scale: float = 1.0,
    lambda2_scale: float = 1.0,
    mute: Collection[int] = (),
    off: str | Collection[str] = (),
) -> Iterator[None]:
    """Changes the attention of chosen blocks in the forward passes that this thread runs inside the `with` block.

    The weights are not touched, so that nothing needs to be restored: after the block, also after an exception, the
    model is as before, and other threads that run, record or change it are not disturbed. `vca.record` sees the maps of
    the changed model. Interventions nest: an inner one sets a lambda anew, and adds to all else.

    The changed equations of a block, per stage s, in the names of `VisualContrastAttention`:

    - `lambda1`, `lambda2`: lambda_s is this number; `lambda1_scale`, `lambda2_scale`: lambda_s, learned or set, is
      multiplied by it;
    - `off="negative"`: A1- = A2- = 0; `off="positive"`: A1+ = A2+ = 0;
    - `off="stage1"`: the scores t+- k^T of Stage I are 0, so that all entries of A1+- are 1 / (P + N): a contrast token
      takes from all tokens alike. `off="stage2"`: the scores q t+-^T are 0, and all entries of A2+- are 1 / n, or
      1 / 2n with the joint softmax;
    - `mute`: the last map of these heads is 0: D2 with two stages, the only map with one. So the effective map is 0,
      and the head's output is that of the depthwise convolution alone, if the layer has one.

    A call that changes nothing leaves every bit as it is, and so does setting the learned lambda of a VCA layer.

    Args:
        model: a model or a single attention layer.
        blocks: indices of the attention layers to change, as in `vca.record`; default all.
        lambda1, lambda2, lambda1_scale, lambda2_scale: of layers with such a lambda; "diff" has the first.
        mute: heads, of any layer.
        off: one or several of "positive" and "negative", of the VCA kinds and "diff", and "stage1" and "stage2", of the
            VCA kinds and "agent". "vca_stage1" and "vca_stage2" lack "positive": one of their stages has nothing else.

    Raises:
        ValueError: a number is not finite; a block or head is out of range; or a chosen layer does not have what is to
            be changed.
    """
    off = {off} if isinstance(off, str) else set(off)
    if unknown := off - set(OFF):
        raise ValueError(f"off={min(unknown)!r} is unknown; choose of {', '.join(OFF)}.")
    given = dict(lambda1=lambda1, lambda2=lambda2, lambda1_scale=lambda1_scale, lambda2_scale=lambda2_scale)
    for name, value in given.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name}={value} is not a finite number.")
    change = Change(
        lambdas=(lambda1, lambda2),
        scales=(lambda1_scale, lambda2_scale),
        muted=frozenset(mute),
        off=frozenset(off),
    )
    layers = chosen_layers(model, blocks)
    for block, _, layer in layers:
        _check(change, block, layer)
    if change == UNCHANGED:
        yield
        return
    modules = {layer for _, _, layer in layers}
    with tapped(Watcher(modules, change), [(module, "forward", run_layer) for module in modules]):
        yield


def changeable(layer: nn.Module) -> frozenset[str]:
    """What `intervene` can change of an attention layer beside its heads: "lambda1", "lambda2" and names for `off`."""
    if isinstance(layer, VisualContrastAttention):
        lambdas = [f"lambda{i}" for i, s in enumerate((layer.stage1, layer.stage2), start=1) if s.differential]
        return frozenset((*lambdas, *STAGES, "negative", *(["positive"] if len(lambdas) == 2 else [])))
    if isinstance(layer, AgentAttention):
        return frozenset(STAGES)
    if isinstance(layer, DiffAttention):
        return frozenset(("lambda1", *STREAMS))
    return frozenset()


def _check(change: Change, block: int, layer: nn.Module) -> None:
    lacking = [part for part in change.parts() if part not in changeable(layer)]
    if lacking:
        has = ", ".join(sorted(changeable(layer))) or "no lambda, stream or stage"
        kind = getattr(layer, "kind", type(layer).__name__)
        raise ValueError(
            f"block {block} ({kind}) has no {lacking[0]} to change: beside its heads it has {has}; choose other blocks."
        )
    if wrong := [head for head in change.muted if head not in range(layer.num_heads)]:
        raise ValueError(f"mute={wrong[0]} is out of range: block {block} has heads 0 to {layer.num_heads - 1}.")


def replace_patches(
    model: nn.Module, images: Tensor, patches: Sequence[int], replacement: Tensor | None = None
) -> Tensor:
    """The images with some patches painted out, or with those of other images in their place.

    Args:
        model: whose patches; in a network of several stages those of the patch embedding.
        images: (B, C, H, W), normalised as the model takes them.
        patches: indices into the grid of patches, row by row.
        replacement: images of the same shape, or one for all (1, C, H, W), to take the patches from; default each
            image's mean color.

    Returns:
        New images (B, C, H, W); the same bits outside the patches.

    Raises:
        ValueError: the model has no patch embedding, a patch is out of range, or the replacement does not fit.
    """
    embedding = getattr(model, "patch_embed", None)
    if embedding is None:
        raise ValueError(f"{type(model).__name__} has no patch_embed, so its patches are not known.")
    cell, size = embedding.proj.stride, images.shape[-2:]
    rows, cols = (math.ceil(side / patch) for side, patch in zip(size, cell, strict=True))
    if wrong := [patch for patch in patches if patch not in range(rows * cols)]:
        raise ValueError(f"patch {wrong[0]} is out of range: {rows}x{cols} patches are 0 to {rows * cols - 1}.")
    if replacement is None:
        replacement = mean_color(images)
    elif replacement.shape not in (images.shape, (1, *images.shape[1:])):
        raise ValueError(f"replacement has shape {tuple(replacement.shape)}, the images have {tuple(images.shape)}.")
    chosen = torch.zeros(rows * cols, dtype=torch.bool, device=images.device)
    chosen[[int(patch) for patch in patches]] = True
    pixels = over_pixels(chosen.view(rows, cols), (cell[0], cell[1]), (size[0], size[1]))  # (H, W)
    return torch.where(pixels, replacement, images)
