"""Checkpoints and pictures for the app."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import vca
from app.runtime import records
from app.runtime.images import read_image
from vca import preprocessing

LABELS = ["left", "right", "up", "down"]


PLAIN, PREFIXED, MHSA = "vca_small", "vca_with_prefix", "mhsa_small"


def save_checkpoints(folder) -> None:
    """Three small models: a plain one; one with prefix tokens and overlapping cells; self-attention."""
    torch.manual_seed(7)
    small = dict(num_classes=len(LABELS), embed_dim=24, depth=3, num_heads=3)
    variants = {
        PLAIN: ("vca_vit_pico_patch4_32", {}),
        PREFIXED: (
            "vca_vit_pico_patch4_32",
            dict(class_token=True, global_pool="token", reg_tokens=1, img_size=(16, 20), token_grid=(3, 2)),
        ),
        MHSA: ("mhsa_vit_pico_patch4_32", {}),
    }
    for name, (architecture, options) in variants.items():
        model = vca.create_model(architecture, **small, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        model.pretrained_cfg["input_size"] = (3, *options.get("img_size", (32, 32)))
        vca.save(model, folder / name, label_names=LABELS)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with structure at every scale."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def recorded(weights, name: str, path):
    model = vca.load(weights / name)
    return model, *records.record(model, preprocessing.preprocess(model, read_image(path)))


SMALL_PYRAMID = dict(img_size=32, num_classes=4, embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1))


TIMM = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5)),
    "deit": ("deit_tiny_distilled_patch16_224", dict(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5)),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=32, embed_dim=12, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5),
    ),
}


def save_cnn(folder: Path) -> torch.nn.Module:
    """A small ResNet for 64 px as timm saves it, with random weights; its last stage has 2x2 cells."""
    arguments = dict(num_classes=5, layers=(1, 1, 1, 1))
    torch.manual_seed(11)
    model = timm.create_model("resnet18", **arguments).eval()
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


def save_timm(folder: Path, name: str, **config) -> torch.nn.Module:
    """A small model as timm saves it, with random weights that no builder would give."""
    architecture, arguments = TIMM[name]
    model = timm.create_model(architecture, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    save_for_hf(model, folder, model_config=config, model_args=arguments, safe_serialization=True)
    return model
