"""Every model of the project by name. Importing this package registers the classifiers with timm.

The generators are not registered: timm's registry is for image encoders.
"""

import difflib
from dataclasses import fields

import timm
from torch import nn

from vca.layers.factory import AttentionConfig
from vca.models import cswin, deit, dit, pvt, swin, vit
from vca.models.common import CLASSIFICATION, GENERATION, input_size, note_arguments
from vca.models.replace import replace_attention

BASELINES = (
    "deit_tiny_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
)  # fmt: skip
CLASSIFIERS = vit.MODELS + deit.MODELS + pvt.MODELS + swin.MODELS + cswin.MODELS + BASELINES
GENERATORS = dit.MODELS
CONVERTIBLE = {"vision_transformer", "deit", "swin_transformer"}  # modules of timm


def list_models() -> list[str]:
    """Names that `create_model` knows, sorted."""
    return sorted([*CLASSIFIERS, *GENERATORS])


def is_classifier(name: str) -> bool:
    """Whether `create_model` builds a classifier of that name: one of ours, or timm's with another attention."""
    return name in CLASSIFIERS or timm.models.is_model_in_modules(str(name).partition(".")[0], CONVERTIBLE)


def task_of(name: str) -> str:
    """What a model does, by its name: "classification" or "generation". A model itself says so as `model.task`.

    Raises:
        ValueError: the name is unknown; the message proposes similar ones.
    """
    if name in GENERATORS:
        return GENERATION
    if is_classifier(name):
        return CLASSIFICATION
    similar = difflib.get_close_matches(name, list_models(), n=3) or list_models()[:3]
    raise ValueError(f"unknown model {name!r}; did you mean {', '.join(similar)}? vca.list_models() names them all.")


def autoencoder_of(config: dict) -> str | None:
    """Hub id or folder of the autoencoder whose latents the generator with a `config.json` makes; None without one."""
    return config["model_args"].get("vae", GENERATORS.get(config["architecture"], {}).get("vae"))


def describe(model: nn.Module) -> dict:
    """The facts of a model of `create_model`, of either task, as JSON values.

    Returns:
        `architecture`, its name; `task`; `num_classes`; `parameters`, their number, frozen ones included; and
        `input_shape`, channels, height and width of the images or latents that it takes.
    """
    generates = model.task == GENERATION
    return dict(
        architecture=model.architecture if generates else model.pretrained_cfg["architecture"],
        task=model.task,
        num_classes=model.num_classes,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        input_shape=list(model.sample_shape if generates else input_size(model)),
    )


def create_model(name: str, **overrides) -> nn.Module:
    """Builds an untrained model; `vca.load` gives a trained one.

    Args:
        name: one of `list_models()`, of which those of `BASELINES` are timm's own; or any ViT, DeiT or Swin of timm,
            of which `attention` must then be given, and is exchanged by `replace_attention`.
        **overrides: arguments of the model, such as `num_classes`, `attention` or `drop_path_rate`.

    Raises:
        ValueError: the name is unknown; the message proposes similar ones. Or the attention of timm's model cannot be
            exchanged.
    """
    if task_of(name) == GENERATION:
        return dit.create_generator(name, **overrides)
    if name not in CLASSIFIERS or (name in BASELINES and overrides.get("attention")):
        return _converted(name, overrides)
    model = timm.create_model(name, **overrides)
    if name in BASELINES and not overrides.get("features_only"):
        note_arguments(model, overrides)
    return model


def _converted(name: str, overrides: dict) -> nn.Module:
    """A model of timm with its attention exchanged."""
    if not (kind := overrides.get("attention")):
        raise ValueError(f"{name} is a model of timm; say which attention it shall have, such as attention='vca'.")
    options = {field.name for field in fields(AttentionConfig)} | {"stages", "blocks"}
    model = timm.create_model(name, **{key: value for key, value in overrides.items() if key not in options})
    chosen = {key: value for key, value in overrides.items() if key in options - {"attention"}}
    replace_attention(model, kind, **chosen)
    note_arguments(model, dict(img_size=tuple(model.patch_embed.img_size)) | overrides)
    return model
