"""Faithfulness: does the model rely on what an attribution says? Curves and measures for any map over the image.

Deletion replaces the cells of an image one after another, those of the largest attribution first, by the image's mean
colour; insertion starts from the blurred image and puts the cells back in that order (Petsiuk et al., arXiv
1806.07421). A faithful map makes the probability of the class fall fast and rise fast: small area under the first
curve, large area under the second. Both mean little without the same for a random order, a centre prior and an edge
map. Cells are the model's patches, `vca.attribution.cell_size`; the value of a cell is its mean over pixels.

`pixel_flipping` and `road` are two more of that kind, which remove cells in other ways. Numbers of this module compare
with each other, and not with those of other software: RISE removes single pixels, 224 in a step, and blurs by 5 pixels;
pytorch-grad-cam's ROAD removes single pixels by percentiles of the map and takes half of the difference of both orders.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attribution import BATCH, Method, cell_size, in_cells, over_pixels
from vca.extras import import_extra
from vca.imputation import impute

STEPS = 32
BLUR = 1 / 8  # standard deviation of the blur, as a part of the image's shorter side
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the cells, for `road`
RADIUS = 0.02  # of the noise for `sensitivity`, in normalised pixels


@dataclass(frozen=True)
class Curves:
    """Probabilities of the class along both curves, (B, S + 1); `fractions` (S + 1) of the cells are exchanged."""

    fractions: Tensor
    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> Tensor:
        """Area under each deletion curve (B,), from 0 to 1; smaller is more faithful."""
        return torch.trapezoid(self.deletion, self.fractions)

    @property
    def insertion_area(self) -> Tensor:
        """Area under each insertion curve (B,), from 0 to 1; larger is more faithful."""
        return torch.trapezoid(self.insertion, self.fractions)


def mean_color(images: Tensor) -> Tensor:
    """Each image's mean colour, (B, C, 1, 1)."""
    return images.mean((2, 3), keepdim=True)


def blurred(images: Tensor) -> Tensor:
    """The images under a Gaussian of standard deviation 1/8 of the shorter side, edges repeated."""
    sigma = BLUR * min(images.shape[-2:])
    reach = int(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), 0).expand(images.shape[1], 1, -1)
    padded = F.pad(images, [reach] * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[..., None, :], groups=images.shape[1])
    return F.conv2d(rows, kernel[..., None], groups=images.shape[1])


def ranks(cells: Tensor) -> Tensor:
    """The rank of every cell, 0 for the largest value: (B, rows, cols). Equal cells are ranked row by row."""
    order = cells.flatten(1).argsort(dim=1, descending=True, stable=True)
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions).view(cells.shape)


def random_map(images: Tensor, seed: int) -> Tensor:
    """A random order of the pixels, the same for the same seed and number of images: (B, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(images), *images.shape[-2:], generator=generator).to(images.device)


def center_prior(images: Tensor) -> Tensor:
    """Minus the squared distance from the centre, in half sides: (B, H, W)."""
    rows, cols = (torch.linspace(-1, 1, side, device=images.device) ** 2 for side in images.shape[-2:])
    return -(rows[:, None] + cols).expand(len(images), -1, -1)


def edge_map(images: Tensor) -> Tensor:
    """The magnitude of the Sobel gradient of the mean over the colours: (B, H, W)."""
    gray = F.pad(images.mean(1, keepdim=True), [1] * 4, mode="replicate")
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(images)
    gradient = F.conv2d(gray, torch.stack([sobel, sobel.T])[:, None])
    return torch.linalg.vector_norm(gradient, dim=1)


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {"centre prior": center_prior, "edge map": edge_map}


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def exchange_curve(
    model: nn.Module,
    before: Tensor,
    after: Tensor,
    ranking: Tensor,
    cell: tuple[int, int],
    classes: Tensor,
    steps: int,
    progress: Callable[[int], None] | None = None,
    output: Callable[[Tensor], Tensor] = _probabilities,
) -> Tensor:
    """Probability of the class while the cells of one image are exchanged for those of another: (B, S + 1).

    Args:
        model: a classifier in evaluation mode.
        before, after: the images at the start and at the end, (B, C, H, W) or broadcastable to it.
        ranking: the rank of every cell in the order of exchange, (B, rows, cols).
        cell: rows and columns of pixels of a cell.
        classes: (B,).
        steps: S; after step s, round(s / S * cells) are exchanged.
        progress: called with the number of images of every forward pass.
        output: what of the logits (B, classes) is noted; default their probabilities.
    """
    size = torch.broadcast_shapes(before.shape, after.shape)[-2:]
    counts = _counts(ranking, steps)
    ranking = over_pixels(ranking, cell, size)
    picks = [(image, step) for image in range(len(ranking)) for step in range(steps + 1)]
    before, after = (images.expand(-1, -1, *size) for images in (before, after))
    result = []
    with torch.inference_mode():
        for batch in torch.tensor(picks).split(BATCH):
            image, step = batch.unbind(1)
            exchanged = (ranking[image] < counts[step, None, None])[:, None]
            logits = model(torch.where(exchanged, after[image], before[image]))
            result.append(output(logits).gather(1, classes[image, None])[:, 0])
            if progress:
                progress(len(batch))
    return torch.cat(result).view(len(ranking), steps + 1).clone()


def _counts(ranking: Tensor, steps: int) -> Tensor:
    cells = ranking[0].numel()
    return (torch.arange(steps + 1, device=ranking.device) * (cells / steps)).round().long()


def curves(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    attributions: Mapping[str, Tensor],
    steps: int = STEPS,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Curves]:
    """Deletion and insertion for several attributions of the same images.

    Args:
        model: a classifier in evaluation mode.
        images: normalised, (B, 3, H, W).
        classes: (B,).
        attributions: name -> (B, H, W), or any other map over the image.
        steps: S, of each curve; no more than there are cells are taken.
        progress: called with the finished part, from 0 to 1, after every forward pass.
    """
    cell = cell_size(model, images)
    done, result = 0, {}

    def count(forwards: int) -> None:
        nonlocal done
        done += forwards
        if progress:
            progress(done / (2 * len(attributions) * len(images) * (steps + 1)))

    color, blur = mean_color(images), blurred(images)
    for name, attribution in attributions.items():
        ranking = ranks(in_cells(attribution, cell))
        steps = min(steps, ranking[0].numel())
        deletion, insertion = (
            exchange_curve(model, before, after, ranking, cell, classes, steps, count)
            for before, after in ((images, color), (blur, images))
        )
        result[name] = Curves(_counts(ranking, steps) / ranking[0].numel(), deletion, insertion)
    return result


@dataclass(frozen=True)
class Flipping:
    """The logit of the class, (B, S + 1), while `fractions` (S + 1) of the cells are flipped."""

    fractions: Tensor
    logits: Tensor

    @property
    def aopc(self) -> Tensor:
        """Area over the perturbation curve (B,): the mean fall of the logit over all S + 1 steps; larger is better."""
        return (self.logits[:, :1] - self.logits).mean(1)


def pixel_flipping(
    model: nn.Module, images: Tensor, classes: Tensor, attribution: Tensor, steps: int = STEPS, seed: int = 0
) -> Flipping:
    """Pixel flipping (Samek et al., arXiv 1509.06321): cells become noise, those of the largest attribution first.

    Every pixel of a flipped cell is drawn uniformly from between the smallest and the largest value of its image and
    channel. What is noted is the logit of the class. The paper flips regions of 9x9 pixels, here they are cells.

    Args:
        model, images, classes, steps: as in `curves`.
        attribution: (B, H, W).
        seed: of the noise, the same for every attribution.
    """
    cell = cell_size(model, images)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    noise = low + (high - low) * torch.rand(images.shape, generator=generator, dtype=torch.float32).to(images)
    ranking = ranks(in_cells(attribution, cell))
    steps = min(steps, ranking[0].numel())
    logits = exchange_curve(model, images, noise, ranking, cell, classes, steps, output=lambda logits: logits)
    return Flipping(_counts(ranking, steps) / ranking[0].numel(), logits)


@dataclass(frozen=True)
class Road:
    """Probabilities of the class (B, S) with `fractions` (S) of the cells removed and imputed.

    Attributes:
        most_first: those of the largest attribution were removed ("MoRF"); smaller is more faithful.
        least_first: those of the smallest attribution were removed ("LeRF"); larger is more faithful.
    """

    fractions: Tensor
    most_first: Tensor
    least_first: Tensor

    @property
    def score(self) -> Tensor:
        """Mean over the fractions of the difference of both, (B,), from -1 to 1; larger is more faithful."""
        return (self.least_first - self.most_first).mean(1)


@torch.inference_mode()
def road(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    attribution: Tensor,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> Road:
    """Remove and debias (ROAD, Rong et al., arXiv 2202.00449): what is removed is imputed from what stays.

    A patch of one colour tells a model the shape of what was removed; `vca.imputation.impute` tells it little. The
    paper counts how often the prediction stays, here it is the probability of the class.

    Args:
        model, images, classes: as in `curves`.
        attribution: (B, H, W).
        fractions: of the cells to remove, above 0 and below 1.
        seed: of the imputation's noise.

    Raises:
        ValueError: a fraction leaves no cell or removes none. ImportError: SciPy is missing.
    """
    cell = cell_size(model, images)
    ranking = ranks(in_cells(attribution, cell))
    cells = ranking[0].numel()
    counts = [round(fraction * cells) for fraction in fractions]
    if not all(0 < count < cells for count in counts):
        raise ValueError(f"fractions={list(fractions)} must remove some of the {cells} cells, and not all of them.")
    found = []
    for order in (ranking, cells - 1 - ranking):
        places = over_pixels(order, cell, images.shape[-2:])
        columns = []
        for count in counts:
            imputed = [impute(*pair, seed) for pair in zip(images, places < count, strict=True)]
            columns.append(model(torch.stack(imputed)).softmax(-1).gather(1, classes[:, None])[:, 0])
        found.append(torch.stack(columns, 1))
    return Road(torch.tensor(counts) / cells, *found)


def infidelity(
    model: nn.Module, images: Tensor, classes: Tensor, attribution: Tensor, samples: int = 32, seed: int = 0
) -> Tensor:
    """Captum's infidelity (arXiv 1901.09392) of a map; smaller is more faithful.

    Half of the cells, drawn at random, are replaced by the image's mean color, `samples` times. Infidelity is the mean
    squared difference between the attribution of the removed cells and the fall of the logit. The attribution is first
    scaled by the factor that fits best, so that maps in any unit compare.

    Args:
        model: a classifier in evaluation mode.
        images: normalised, (B, 3, H, W).
        classes: the explained class of each image, (B,).
        attribution: the map (B, H, W), in any unit.
        samples: random choices of cells for each image.
        seed: of these choices; the same seed draws the same cells.

    Returns:
        (B,), in squared logits.

    Raises:
        ImportError: Captum is not installed; the message names the extra.
    """
    metrics = import_extra("captum.metrics", "explain")
    cell = cell_size(model, images)
    values = in_cells(attribution, cell)
    generator = torch.Generator().manual_seed(seed)

    def remove(kept: Tensor) -> tuple[Tensor, Tensor]:
        removed = (torch.rand(kept.shape, generator=generator) < 0.5).to(kept)
        return removed, kept - removed

    def logits(kept: Tensor, images: Tensor) -> Tensor:
        color = mean_color(images)
        return model(color + over_pixels(kept, cell, images.shape[-2:])[:, None] * (images - color))

    return metrics.infidelity(
        logits,
        remove,
        torch.ones_like(values),
        values,
        additional_forward_args=images,
        target=classes,
        n_perturb_samples=samples,
        max_examples_per_batch=min(max(BATCH, len(images)), samples * len(images)),
        normalize=True,
    )


def sensitivity(
    model: nn.Module, images: Tensor, classes: Tensor, method: Method, samples: int = 10, seed: int = 0
) -> Tensor:
    """Captum's maximum sensitivity (arXiv 1901.09392) of a method; smaller is more stable.

    It is the largest relative change of the map, in Euclidean norm, under uniform noise of +-0.02 in every normalised
    pixel.

    Args:
        model: a classifier in evaluation mode.
        images: normalised, (B, 3, H, W).
        classes: the explained class of each image, (B,).
        method: one of `vca.attribution.METHODS`, or another function of (model, images, classes).
        samples: draws of noise for each image.
        seed: of the noise.

    Returns:
        (B,), without a unit.

    Raises:
        ImportError: Captum is not installed; the message names the extra.
    """
    metrics = import_extra("captum.metrics", "explain")
    generator = torch.Generator().manual_seed(seed)

    def noisy(images: Tensor) -> Tensor:
        noise = torch.rand(images.shape, generator=generator).to(images)
        return images + RADIUS * (2 * noise - 1)

    def explain(images: Tensor | tuple[Tensor], target: Tensor) -> tuple[Tensor]:
        images = images[0] if isinstance(images, tuple) else images
        return (method(model, images, target.expand(len(images))),)  # Captum leaves a single target as it is

    return metrics.sensitivity_max(
        explain,
        images,
        noisy,
        n_perturb_samples=samples,
        max_examples_per_batch=min(max(BATCH, len(images)), samples * len(images)),
        target=classes,
    )
