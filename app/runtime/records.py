"""What a model makes of an image: probabilities, maps of its layers, names of its tokens."""

import numpy as np
import timm.data
import torch
from torch import nn

import vca

TOKEN_PARAMETERS = {"class": "cls_token", "distillation": "dist_token"}


NO_MAPS = "The attention of this model cannot be drawn: none of it spans the whole image."


@torch.inference_mode()
def record(model: nn.Module, x: torch.Tensor) -> tuple[np.ndarray, list[vca.LayerMaps]]:
    """Classifies one input (1, 3, H, W): its probabilities (classes,), and the maps of all its attention layers."""
    with vca.record(model) as maps:
        logits = model(x)
    return logits[0].softmax(0).numpy(), maps


def run(model: nn.Module, x: torch.Tensor) -> tuple[np.ndarray, list[vca.LayerMaps]]:
    """As `record`, without the layers whose maps do not join every two places of one grid.

    Left out are windows, stripes and reduced keys.
    """
    probabilities, maps = record(model, x)
    return probabilities, [m for m in maps if m.window_size is None and m.key_grid is None]


def top_labels(model: nn.Module, probabilities: np.ndarray, count: int) -> dict[str, float]:
    """The `count` likeliest labels and their probabilities, likeliest first."""
    return {model.label_names[i]: float(probabilities[i]) for i in np.argsort(-probabilities)[:count]}


def prefix_names(model: nn.Module) -> list[str]:
    """What each prefix token is: the class token first, then the distillation token, then the registers."""
    names = [name for name in ("class", "distillation") if getattr(model, TOKEN_PARAMETERS[name], None) is not None]
    return names + [f"register {i + 1}" for i in range(getattr(model, "num_prefix_tokens", 0) - len(names))]


def describe(name: str, model: nn.Module) -> dict:
    """A model's facts as JSON values: architecture, classes, input size, and heads and grids of blocks with maps."""
    config = timm.data.resolve_data_config(model=model)
    _, maps = run(model, torch.zeros(1, *config["input_size"]))
    blocks = [
        dict(
            block=layer.block,
            kind=layer.kind,
            heads=layer.stage1.positive.shape[1],
            grid_size=layer.grid_size,
            token_grid=layer.token_grid,
        )
        for layer in maps
    ]
    return dict(
        name=name,
        architecture=model.pretrained_cfg["architecture"],
        classes=model.label_names,
        input_size=list(config["input_size"]),
        prefix_tokens=prefix_names(model),
        blocks=blocks,
    )
