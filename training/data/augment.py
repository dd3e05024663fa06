"""Augmentation of whole batches on their device; what happens to an image is a function of its own uniform numbers.

Images are float (B, 3, H, W) in [0, 1], draws uniform numbers in [0, 1), a row for each image.
"""

import math
import random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ASPECT = (3 / 4, 4 / 3)  # of a crop, as in torchvision's RandomResizedCrop
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 10 / 3)  # as in timm's RandomErasing

WARP_DRAWS, JITTER_DRAWS, ERASE_DRAWS = 5, 3, 5  # numbers that each function takes for an image


def between(draws: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draws


def log_between(draws: Tensor, low: float, high: float) -> Tensor:
    return between(draws, math.log(low), math.log(high)).exp()


def warp(images: Tensor, draws: Tensor, smallest_area: float, degrees: float) -> Tensor:
    """A crop of a random area, aspect, position and rotation, resized to the whole; beyond the border it is mirrored.

    Args:
        images, draws: see above; draws (B, 5): area, aspect, vertical and horizontal position, angle.
        smallest_area: of the crop, as a share of the image; the largest is 1.
        degrees: largest angle to either side.
    """
    area, aspect, vertical, horizontal, angle = draws.unbind(1)
    area, aspect = between(area, smallest_area, 1), log_between(aspect, *ASPECT)
    height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    y, x = between(vertical, -1, 1) * (1 - height), between(horizontal, -1, 1) * (1 - width)
    angle = between(angle, -1, 1) * math.radians(degrees)
    rows = [width * angle.cos(), -height * angle.sin(), x], [width * angle.sin(), height * angle.cos(), y]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def jitter(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Brightness, contrast and saturation times factors of [1 - strength, 1 + strength]; draws (B, 3) in this order."""
    factors = between(draws, 1 - strength, 1 + strength).to(images.dtype)
    brightness, contrast, saturation = factors[..., None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 1)
    gray = images.mean((1, 2, 3), keepdim=True)
    images = (gray + (images - gray) * contrast).clamp(0, 1)
    gray = images.mean(1, keepdim=True)
    return (gray + (images - gray) * saturation).clamp(0, 1)


def erase(images: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Sets a rectangle of some images to zero, the mean colour of normalised ones.

    Args:
        images: normalised (B, 3, H, W).
        draws: (B, 5): whether, area, aspect, vertical and horizontal position.
        probability: share of the images that get one.
    """
    height, width = images.shape[-2:]
    chosen, area, aspect, vertical, horizontal = draws[..., None].unbind(1)
    area, aspect = between(area, *ERASED_AREA), log_between(aspect, *ERASED_ASPECT)

    def inside(offset: Tensor, share: Tensor, size: int) -> Tensor:
        length = (share.clamp(max=1) * size).round().clamp(min=1)
        start = (offset * (size - length + 1)).floor()
        position = torch.arange(size, device=images.device)
        return (position >= start) & (position < start + length)

    rows, cols = inside(vertical, (area / aspect).sqrt(), height), inside(horizontal, (area * aspect).sqrt(), width)
    erased = (chosen < probability)[..., None] & rows[:, :, None] & cols[:, None, :]
    return images.masked_fill(erased[:, None], 0)


def pad_crop_flip(pixels: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Shifts each image by up to `padding` pixels (zero border) and flips half of them.

    Args:
        pixels: (B, C, H, W) of any type.
        draws: uniform numbers in [0, 1), (B, 3): vertical shift, horizontal shift, flip.
        padding: largest shift in pixels.
    """
    batch, _, height, width = pixels.shape
    top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(height, device=pixels.device)
    cols = left[:, None] + torch.arange(width, device=pixels.device)
    cols = torch.where(flips(draws)[:, None], cols.flip(1), cols)
    padded = F.pad(pixels, [padding] * 4).permute(0, 2, 3, 1)
    index = torch.arange(batch, device=pixels.device)[:, None, None]
    return padded[index, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def flips(draws: Tensor) -> Tensor:
    """Which images (B,) `pad_crop_flip` flips, by its draws (B, 3)."""
    return draws[:, 2] < 0.5


class RandomDownscale:
    """Reduces half of the images (Pillow's) to a shorter side, so that sharpness does not tell where they come from.

    Args:
        side: the shorter side in pixels; smaller images stay as they are.
    """

    def __init__(self, side: int):
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        if min(image.size) <= self.side or random.random() < 0.5:
            return image
        scale = self.side / min(image.size)
        return image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
