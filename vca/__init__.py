"""Visual-Contrast Attention: the layer, its maps, its models and their checkpoints."""

from importlib import import_module
from typing import Any

from vca import attribution, faithfulness, fused
from vca.checkpoint import CheckpointError, save
from vca.drawing import to_pil
from vca.hub import PushError, load, push
from vca.interventions import intervene, replace_patches
from vca.layers.factory import create_attention
from vca.layers.layer_maps import LayerMaps, StageMaps
from vca.layers.visual_contrast import VisualContrastAttention
from vca.lens import logit_lens
from vca.maps import record
from vca.models import create_model, list_models
from vca.models.replace import replace_attention
from vca.preprocessing import preprocess
from vca.recorded import Maps

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`vca.plot`, which needs matplotlib, is imported when it is first used."""
    if name == "plot":
        return import_module("vca.plot")
    raise AttributeError(f"module 'vca' has no attribute {name!r}")


__all__ = [
    "CheckpointError",
    "LayerMaps",
    "Maps",
    "PushError",
    "StageMaps",
    "VisualContrastAttention",
    "attribution",
    "create_attention",
    "create_model",
    "faithfulness",
    "fused",
    "intervene",
    "list_models",
    "load",
    "logit_lens",
    "preprocess",
    "push",
    "record",
    "replace_attention",
    "replace_patches",
    "save",
    "to_pil",
]
