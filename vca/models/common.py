"""What the model families share: building with timm, the arguments that rebuild a model, parameters not to decay."""

import copy
from contextlib import nullcontext

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

from vca.timm_internals import creation_arguments, update_model_args, update_model_input_size

CLASSIFICATION, GENERATION = "classification", "generation"  # what `model.task` is
NOT_OF_A_CHECKPOINT = (
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir", "num_classes", "features_only",
    "out_indices", "feature_cls", "device", "dtype",
)  # fmt: skip
UNDECAYED = (
    "positive_embed", "negative_embed", "pool_query", "pos_embed", "cls_token", "reg_token", "dist_token",
    "relative_position_bias_table",
)  # fmt: skip


def undecayed(model: nn.Module) -> set[str]:
    """Names of all embeddings, prefix tokens, position tables, pooling vectors and lambdas: not to be decayed."""
    named = ((name, name.rsplit(".", 1)[-1]) for name, _ in model.named_parameters())
    return {name for name, last in named if last in UNDECAYED or last.startswith("lambda_")}


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images a model takes."""
    return model.patch_embed.proj.in_channels, *model.patch_embed.img_size


def of_a_checkpoint(arguments: dict) -> dict:
    """The arguments of a model that a checkpoint needs, without those of training and of building."""
    rates = ("drop_rate", "drop_path_rate")
    return {k: v for k, v in arguments.items() if k not in NOT_OF_A_CHECKPOINT and not k.endswith(rates)}


def note_arguments(model: nn.Module, arguments: dict) -> None:
    """Notes the task, the arguments that a checkpoint is rebuilt from, and the input size."""
    model.task = CLASSIFICATION
    model.model_args = of_a_checkpoint(arguments)
    update_model_args(model, **model.model_args)
    model.pretrained_cfg["input_size"] = input_size(model)


def note_input_size(model: nn.Module, **arguments) -> None:
    """Lets the preprocessing, and the arguments that a checkpoint is rebuilt from, follow a new input size."""
    arguments = arguments | dict(img_size=tuple(model.patch_embed.img_size))
    update_model_input_size(model, **arguments)
    if hasattr(model, "model_args"):
        model.model_args |= arguments
        model.pretrained_cfg["input_size"] = input_size(model)


def resized(model: nn.Module, side: int) -> nn.Module:
    """A copy of a ViT for square images of that side, in pixels; its preprocessing follows."""
    copied = copy.deepcopy(model)
    copied.set_input_size(img_size=(side, side))
    follow_input_size(copied)
    return copied


def follow_input_size(model: nn.Module) -> None:
    """`note_input_size` for timm's own models, whose `set_input_size` notes the new arguments in timm's way."""
    if tuple(model.pretrained_cfg["input_size"]) != input_size(model):
        note_input_size(model, **of_a_checkpoint(creation_arguments(model)))


def create_classifier(
    cls: type[nn.Module], name: str, pretrained: bool, feature_cfg: dict, spec: dict, arguments: dict
) -> nn.Module:
    """Builds the registered model `name` with timm: what every entry point does.

    Args:
        cls: its class.
        pretrained: as timm's registry calls the entry point.
        feature_cfg: how timm takes features out of this family.
        spec: the arguments that make it this model.
        arguments: those of the caller, which come first and are noted for checkpoints. `device` and `dtype` are
            those of the weights, as in timm.
    """
    arguments = dict(arguments)
    device, dtype = arguments.pop("device", None), arguments.pop("dtype", None)
    replaced = {"token_grid"} if arguments.get("num_tokens") is not None else set()
    defaults = {key: value for key, value in spec.items() if key not in replaced}
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            cls,
            name,
            pretrained,
            feature_cfg=dict(feature_cfg),
            pretrained_filter_fn=cls.filter_checkpoint,
            **(defaults | arguments),
        )
    if dtype is not None:
        model.to(dtype)
    if not arguments.get("features_only"):
        note_arguments(model, arguments)
    return model


def imagenet_cfg(**more) -> dict:
    """timm's preprocessing of the paper's classifiers, trained on ImageNet-1K at 224 px."""
    return (
        dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.9,
            crop_mode="center",
            interpolation="bicubic",
            fixed_input_size=True,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="patch_embed.proj",
            classifier="head",
        )
        | more
    )
