"""Every model of the project by name. Importing this package registers the classifiers with timm."""

import difflib

import timm
from torch import nn

from vca.models import vit

CLASSIFIERS = vit.MODELS


def list_models() -> list[str]:
    """Names that `create_model` knows, sorted."""
    return sorted(CLASSIFIERS)


def create_model(name: str, **overrides) -> nn.Module:
    """Builds an untrained model; `vca.load` gives a trained one.

    Args:
        name: one of `list_models()`.
        **overrides: arguments of the model, such as `num_classes`, `token_grid` or `drop_path_rate`.

    Raises:
        ValueError: the name is unknown; the message proposes similar ones.
    """
    if name not in CLASSIFIERS:
        similar = difflib.get_close_matches(name, CLASSIFIERS, n=3) or list_models()[:3]
        raise ValueError(
            f"unknown model {name!r}; did you mean {', '.join(similar)}? vca.list_models() names them all."
        )
    return timm.create_model(name, **overrides)
