"""Visual-Contrast Attention: the layer, its maps, its models and their checkpoints."""

from vca.attention import VisualContrastAttention
from vca.hub import CheckpointError, load, save
from vca.maps import LayerMaps, StageMaps, record
from vca.models import create_model, list_models

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "LayerMaps",
    "StageMaps",
    "VisualContrastAttention",
    "create_model",
    "list_models",
    "load",
    "record",
    "save",
]
