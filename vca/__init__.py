"""Visual-Contrast Attention: the layer, its maps, its models and their checkpoints."""

from vca import attribution, faithfulness
from vca.checkpoint import CheckpointError, save
from vca.hub import PushError, load, push
from vca.interventions import intervene, replace_patches
from vca.layers.factory import create_attention
from vca.layers.layer_maps import LayerMaps, StageMaps
from vca.layers.visual_contrast import VisualContrastAttention
from vca.lens import logit_lens
from vca.maps import record
from vca.models import create_model, list_models
from vca.replace import replace_attention

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "LayerMaps",
    "PushError",
    "StageMaps",
    "VisualContrastAttention",
    "attribution",
    "create_attention",
    "create_model",
    "faithfulness",
    "intervene",
    "list_models",
    "load",
    "logit_lens",
    "push",
    "record",
    "replace_attention",
    "replace_patches",
    "save",
]
