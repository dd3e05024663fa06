"""From an image to the input of a model, and back to the part of the image that it sees."""

from math import floor

import timm.data
import torch
from PIL import Image
from torch import nn

from vca.images import of_user

CROP_SIDE = 640


def preprocess(model: nn.Module, image: Image.Image) -> torch.Tensor:
    """The model's input (1, 3, H, W): resized, centre-cropped and normalised as its checkpoint says.

    The image is first turned upright, and its colours are converted to sRGB, as `vca.images.upright_rgb` does it.
    """
    image = of_user(image)
    config = timm.data.resolve_data_config(model=model)
    width, height = image.size
    limit = 4 * min(width, height)  # what the centre crop drops of a panorama need not be resized first
    if config["crop_mode"] == "center":
        left, top = max(0, width - limit) // 2, max(0, height - limit) // 2
        image = image.crop((left, top, width - left, height - top))
    return timm.data.create_transform(**config)(image)[None]


def center_crop(model: nn.Module, image: Image.Image) -> Image.Image:
    """The part of `image` that reaches the model, in the image's own resolution, at most 640 px a side."""
    image = of_user(image)
    left, top, right, bottom = crop_box(model, image)
    rows, cols = timm.data.resolve_data_config(model=model)["input_size"][1:]
    scale = max((right - left) / cols, (bottom - top) / rows)
    shrink = min(1, CROP_SIDE / (max(rows, cols) * scale))
    size = (max(1, round(cols * scale * shrink)), max(1, round(rows * scale * shrink)))
    if left < -1 or top < -1:  # padded
        padded = round(left), round(top), round(right), round(bottom)
        return image.crop(padded).resize(size, Image.Resampling.BICUBIC)
    box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    return image.resize(size, Image.Resampling.BICUBIC, box)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes."""
    return tuple(timm.data.resolve_data_config(model=model)["input_size"])


def crop_box(model: nn.Module, image: Image.Image) -> tuple[float, float, float, float]:
    """The part of `image` that reaches the model, in its pixels: left, top, right, bottom; outside it where padded."""
    config = timm.data.resolve_data_config(model=model)
    rows, cols = config["input_size"][1:]
    across, down = image.width / floor(cols / config["crop_pct"]), image.height / floor(rows / config["crop_pct"])
    if config["crop_mode"] != "squash":
        across = down = max(across, down) if config["crop_mode"] == "border" else min(across, down)
    left, top = (image.width - cols * across) / 2, (image.height - rows * down) / 2
    return left, top, left + cols * across, top + rows * down


def input_picture(model: nn.Module, x: torch.Tensor) -> Image.Image:
    """The model's input (1, 3, H, W) as the picture it is: H x W pixels, normalisation undone."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = ((x[0] * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
