"""Every model of the project by name. Importing this package registers the classifiers with timm.

The generators are not registered: timm's registry is for image encoders.
"""

import difflib

import timm
from torch import nn

from vca.models import cswin, deit, dit, pvt, swin, vit
from vca.models.common import note_arguments

BASELINES = ("deit_tiny_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224")
CLASSIFIERS = vit.MODELS + deit.MODELS + pvt.MODELS + swin.MODELS + cswin.MODELS + BASELINES
GENERATORS = dit.MODELS


def list_models() -> list[str]:
    """Names that `create_model` knows, sorted."""
    return sorted([*CLASSIFIERS, *GENERATORS])


def create_model(name: str, **overrides) -> nn.Module:
    """Builds an untrained model; `vca.load` gives a trained one.

    Args:
        name: one of `list_models()`; those of `BASELINES` are timm's own.
        **overrides: arguments of the model, such as `num_classes`, `attention` or `drop_path_rate`.

    Raises:
        ValueError: the name is unknown; the message proposes similar ones.
    """
    if name in GENERATORS:
        return dit.create_generator(name, **overrides)
    if name not in CLASSIFIERS:
        similar = difflib.get_close_matches(name, list_models(), n=3) or list_models()[:3]
        raise ValueError(
            f"unknown model {name!r}; did you mean {', '.join(similar)}? vca.list_models() names them all."
        )
    model = timm.create_model(name, **overrides)
    if name in BASELINES and not overrides.get("features_only"):
        note_arguments(model, overrides)
    return model
