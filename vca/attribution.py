"""Attributions: what in an image speaks for a class, and what against it.

    classes = model(images).argmax(-1)
    attribution = vca.attribution.METHODS["integrated gradients"](model, images, classes)  # (B, H, W)

Every method has the same first three arguments and the same result, a signed map (B, H, W) that is positive where the
image speaks for the class:

- `model`: a classifier in evaluation mode;
- `images`: (B, 3, H, W), normalised as the model takes them;
- `classes`: (B,), the index of any class for each image.

The score that is explained is the logit of the class, and a map is in units of it, or of attention for the effective
maps. What a method finds for a patch is spread evenly over the patch's pixels. A method that is not defined for a model
raises a ValueError that says why. Three methods are Captum's, of the extra [explain].
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.extras import import_extra
from vca.layers.layer_maps import GlobalMaps, LayerMaps, readout
from vca.maps import record
from vca.relevance import relevance
from vca.taps import attention_layers

CELLS = 16
BATCH = 64
IG_STEPS = 32


def cell_size(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of pixels of a cell: a patch of the model, or several, so that there are at most 16x16 cells.

    For a model without patches, such as a CNN, a cell is so many pixels.
    """
    embeds = (getattr(getattr(module, "patch_embed", None), "proj", None) for module in model.modules())
    patch = next((proj.stride for proj in embeds if isinstance(proj, nn.Conv2d)), (1, 1))
    merged = max(ceil(ceil(side / p) / CELLS) for side, p in zip(images.shape[-2:], patch, strict=True))
    return patch[0] * merged, patch[1] * merged


def in_cells(values: Tensor, cell: tuple[int, int]) -> Tensor:
    """Means over cells of pixels: (B, H, W) -> (B, rows, cols). The last row and column may be cut."""
    return F.avg_pool2d(values[:, None], cell, ceil_mode=True, count_include_pad=False)[:, 0]


def over_pixels(cells: Tensor, cell: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Every cell's value at each of its pixels: (..., rows, cols) -> (..., H, W)."""
    pixels = cells.repeat_interleave(cell[0], -2).repeat_interleave(cell[1], -1)
    return pixels[..., : size[0], : size[1]]


def spread(values: Tensor, size: Sequence[int]) -> Tensor:
    """Values of the patches of a grid, (B, Hg, Wg), spread over the pixels of an image: (B, H, W) with the same sum."""
    pixels = F.interpolate(values[:, None], tuple(size), mode="nearest-exact")[:, 0]
    return pixels * (values[0].numel() / pixels[0].numel())


def rollout(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Effective-map rollout: attention rollout (arXiv 2005.00928) with the signed effective maps E of all blocks.

        R = M_L ... M_1,    M_l = (I + A_l) / 2,    A_l = mean of E_l over the heads, each row divided by its sum of |.|

    The attribution is the row of R that the classifier reads, see `readout`. For
    self-attention, whose rows sum to 1, this is the published method; with a negative E, paths that push away twice
    count as drawing in. Dropped are the values and gains, the depthwise convolution, the MLPs and the prefix tokens'
    columns. It is the same for every class.
    """
    maps = _whole_grid_maps(model, images)
    reads = readout(model, maps[-1])
    row = None  # of R, (B, 1, T): the last block's comes first
    for layer in reversed(maps):
        mean = layer.effective.mean(1)
        step = mean / mean.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        if row is None:
            row = torch.zeros_like(step[:, :1])
            row[..., reads.tokens] = 1 / row[..., reads.tokens].shape[-1]
        row = (row + row @ step) / 2
    assert row is not None
    return spread(row[:, 0, reads.num_prefix_tokens :].unflatten(-1, reads.grid_size), images.shape[-2:])


def head_map(model: nn.Module, images: Tensor, classes: Tensor, *, block: int, head: int) -> Tensor:
    """The effective map of one head, from what the classifier reads to the patches; it is the same for every class."""
    (layer,) = _whole_grid_maps(model, images, [block])
    return spread(readout(model, layer).effective(layer)[:, head], images.shape[-2:])


def gradient_weighted(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Gradient-weighted effective map: the attention to each patch where more of it would raise the logit.

        sum over blocks, heads and queries i of  E_ij max(0, d logit / d E_ij)      for every patch j

    This is Grad-SAM (arXiv 2204.11073) with the effective map E in the place of a softmax. The derivative takes E as
    the variable and the values as given: with o = E v it is (d logit / d o) v^T. To first order each term is what it
    adds to the logit; negative is what E pushes away although it speaks for the class. Each block counts on its own
    grid. The depthwise convolutions and MLPs are left out, except that the gradient passes through them.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad(), record(model) as maps:
        logits = model(images)
        layers = _without_windows(maps)
        gathered = [layer.gathered for layer in layers]
        gradients = torch.autograd.grad(_scores(logits, classes).sum(), gathered)
    total = torch.zeros((), dtype=images.dtype, device=images.device)
    for layer, gradient in zip(layers, gradients, strict=True):
        products = layer.effective * (gradient @ layer.values.transpose(-2, -1)).clamp(min=0)
        patches = products.sum((1, 2))[:, layer.num_prefix_tokens :]
        total = total + spread(patches.unflatten(-1, layer.key_grid or layer.grid_size), images.shape[-2:])
    return total.detach()


def head_relevance(model: nn.Module, images: Tensor, classes: Tensor) -> list[Tensor]:
    """How much each head adds to the logit of a class, to first order.

        sum over queries i and keys j of  E_ij d logit / d E_ij  =  sum of  o * d logit / d o,    o = E v

    It is the derivative of the logit along the size of the head's attention, with v as given; its magnitude is the
    importance of Michel et al. (arXiv 1905.10650), to sort heads by what muting them would change. The depthwise
    convolution, which a muted head keeps, is left out.

    Returns:
        (B, H) for each attention layer, in order, in units of the logit. Positive speaks for the class.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad(), record(model) as maps:
        logits = model(images)
        gathered = [layer.gathered for layer in _without_windows(maps)]
        gradients = torch.autograd.grad(_scores(logits, classes).sum(), gathered)
    return [(o * gradient).sum((2, 3)).detach() for o, gradient in zip(gathered, gradients, strict=True)]


def integrated_gradients(model: nn.Module, images: Tensor, classes: Tensor, *, steps: int = IG_STEPS) -> Tensor:
    """Captum's integrated gradients (arXiv 1703.01365) along the line from a plain image of value 0.

    Zero is the mean colour that the checkpoint's normalisation subtracts. The integral is taken at `steps`
    Gauss-Legendre points; the more there are, the nearer the sum over a map comes to logit(image) - logit(plain image).
    """
    method = import_extra("captum.attr", "explain").IntegratedGradients(model)
    batch = max(BATCH, len(images))
    values = method.attribute(images, target=classes, n_steps=steps, internal_batch_size=batch)
    return values.sum(1).detach()


def gradient_x_input(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Captum's gradient x input: the gradient of the logit times the normalised pixel, summed over the colours."""
    method = import_extra("captum.attr", "explain").InputXGradient(model)
    return method.attribute(images.detach().clone().requires_grad_(), target=classes).sum(1).detach()


def attn_lrp(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """AttnLRP (arXiv 2402.05602), see `vca.relevance.relevance`: each pixel has the mean over its cell of `cell_size`.

    The map has the sum that it has over pixels. What that sum lacks of the logit is exactly what biases and other
    constants take and what softmaxes keep, in VCA as in self-attention.
    """
    cell = cell_size(model, images)
    rows, cols = images.shape[2:]
    return over_pixels(in_cells(relevance(model, images, classes), cell), cell, (rows, cols))


@torch.no_grad()
def occlusion(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Captum's occlusion (arXiv 1311.2901): how far the logit falls when a window has the value 0.

    Zero is the mean colour, as in `integrated_gradients`. The window is 2x2 cells of `cell_size` and moves by one cell;
    a pixel takes the mean over the windows on it.
    """
    method = import_extra("captum.attr", "explain").Occlusion(model)
    rows, cols = cell_size(model, images)
    channels = images.shape[1]
    values = method.attribute(
        images,
        target=classes,
        sliding_window_shapes=(channels, 2 * rows, 2 * cols),
        strides=(channels, rows, cols),
        perturbations_per_eval=max(1, BATCH // len(images)),
    )
    return values.mean(1)


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor, *, layer: nn.Module | None = None) -> Tensor:
    """Captum's Grad-CAM (arXiv 1610.02391) of a convolutional network, to compare a transformer's maps with.

    The channels of a layer are weighted by the mean gradient of the logit and added; what is negative is left out. The
    map is enlarged bilinearly.

    Args:
        layer: whose output (B, C, h, w) is explained; default the last stage that the model's `feature_info` names.

    Raises:
        ValueError: the model has no such layer. ImportError: Captum is missing.
    """
    if layer is None:
        stages = getattr(model, "feature_info", None)
        if not stages or attention_layers(model):
            raise ValueError("this model has no convolutional stages: Grad-CAM is for convolutional networks.")
        layer = model.get_submodule(stages[-1]["module"])
    method = import_extra("captum.attr", "explain").LayerGradCam(model, layer)
    values = method.attribute(images.detach().clone().requires_grad_(), target=classes, relu_attributions=True)
    return F.interpolate(values.sum(1, keepdim=True), images.shape[-2:], mode="bilinear")[:, 0].detach()


Method = Callable[[nn.Module, Tensor, Tensor], Tensor]
METHODS: dict[str, Method] = {
    "gradient-weighted effective map": gradient_weighted,
    "effective-map rollout": rollout,
    "relevance (AttnLRP)": attn_lrp,
    "integrated gradients": integrated_gradients,
    "gradient x input": gradient_x_input,
    "occlusion": occlusion,
}


def _scores(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


@torch.no_grad()
def _whole_grid_maps(model: nn.Module, images: Tensor, blocks: Sequence[int] | None = None) -> list[GlobalMaps]:
    """The maps of the chosen blocks, if each joins every two patches of the one grid that all blocks share."""
    with record(model, blocks) as maps:
        model(images)
    layers = _without_windows(maps)
    if any(layer.key_grid for layer in layers):
        raise ValueError("this model's keys lie on a coarser grid than its queries: its maps cannot be multiplied.")
    if len({layer.grid_size for layer in layers}) > 1:
        raise ValueError("this model's blocks work on grids of different sizes: their maps cannot be multiplied.")
    if len({tokens.shape[2] for layer in layers for tokens in (layer.values, layer.gathered)}) > 1:
        raise ValueError("this model's blocks do not all work on the same tokens: their maps cannot be multiplied.")
    return layers


def _without_windows(maps: list[LayerMaps]) -> list[GlobalMaps]:
    """The maps, if all of them join every two places of a grid."""
    layers = [layer for layer in maps if isinstance(layer, GlobalMaps)]
    if len(layers) < len(maps):
        raise ValueError("this model attends within windows: it has no effective map over the whole image.")
    return layers


def plot(
    values: Tensor, image: Any = None, *, sample: int = 0, title: str = "", smooth: bool = False, figure: Any = None
) -> Any:
    """Draws an attribution over the image: orange speaks for the class, blue against it. Needs matplotlib.

    Args:
        values: (H, W) or (B, H, W), as a method gives them.
        image, smooth, figure: as in `vca.LayerMaps.plot`.
        sample: index of the image in a batch.
        title: above the picture.

    Returns:
        The figure.
    """
    from vca import drawing, plot

    shown = (values[sample] if values.ndim == 3 else values).detach().float().cpu().numpy()
    limit = float(abs(shown).max())
    photo = drawing.backdrop(image, shown.shape, sample) if image is not None else None
    return plot.panels([plot.Panel("", shown, -limit, limit)], photo, title=title, smooth=smooth, figure=figure)
