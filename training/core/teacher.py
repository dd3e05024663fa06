"""Teachers: pretrained models that a student learns from, and what both see of a batch."""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vca
from training.core.recipe import RecipeError

FROM_TIMM = "timm:"


def open_teacher(name: str, **args) -> nn.Module:
    """A pretrained model, frozen and in evaluation mode.

    Args:
        name: `timm:NAME`, with timm's own weights; `timm:NAME=FILE.safetensors`, with those of a file; or a checkpoint
            of this project, a folder or a Hub id.
        **args: more arguments of `timm.create_model`.

    Raises:
        vca.CheckpointError: the model or its weights are not to be had.
    """
    if name.startswith(FROM_TIMM):
        model = open_timm(name, **args)
    else:
        stored = vca.load(name)
        if "img_size" in args:  # resamples the position table, as timm does for its own
            stored.set_input_size(img_size=args["img_size"])
        config = stored.model_args | args
        model = vca.create_model(stored.pretrained_cfg["architecture"], num_classes=stored.num_classes, **config)
        model.load_state_dict(stored.state_dict())
        model.pretrained_cfg.update(stored.pretrained_cfg)
        model.label_names, model.training_history = stored.label_names, stored.training_history
    return model.eval().requires_grad_(False)


def open_timm(name: str, **args) -> nn.Module:
    """The pretrained model of timm that `timm:NAME` or `timm:NAME=FILE.safetensors` means; errors as `open_teacher`.

    A file without a head gives a model without one.
    """
    architecture, _, file = name.removeprefix(FROM_TIMM).partition("=")
    if not file:
        try:
            return timm.create_model(architecture, pretrained=True, **args)
        except Exception as error:  # whatever the name, the network or the file does
            raise vca.CheckpointError(f"{name}: {error}") from None
    if not Path(file).is_file():
        raise vca.CheckpointError(f"{file}: file not found.")
    try:
        head = timm.models.get_pretrained_cfg(architecture).classifier
        heads = [head] if isinstance(head, str) else list(head or [])
        with safe_open(file, framework="pt") as stored:
            classes = [stored.get_slice(f"{h}.weight").get_shape()[0] for h in heads if f"{h}.weight" in stored.keys()]  # noqa: SIM118
        count = dict(num_classes=classes[0] if classes else 0)
        overlay = dict(file=file) | count
        return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **count, **args)
    except Exception as error:  # timm and safetensors raise what they meet
        reason = " ".join(str(error).split())[:300]
        raise vca.CheckpointError(f"{file} does not hold the weights of {architecture}: {reason}") from None


def resize(images: Tensor, side: int) -> Tensor:
    """Square images (B, 3, S, S) at another size, as Pillow would: bicubic, with antialiasing."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True)


def attention_input_and_output(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules of a timm block whose output and whose input are what its attention reads and gives.

    Raises:
        RecipeError: the block is not pre-norm with `norm1`, attention and a scale or drop path of its own.
    """
    if not all(hasattr(block, part) for part in ("norm1", "attn", "drop_path1")):
        raise RecipeError(f"a {type(block).__name__} has no attention that can be taught layer by layer.")
    return block.norm1, getattr(block, "ls1", block.drop_path1)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a ViT, DeiT or Swin, from the first to the last.

    Raises:
        RecipeError: the model is of another kind.
    """
    if not isinstance(model, VisionTransformer | SwinTransformer):
        raise RecipeError(f"a {type(model).__name__} cannot teach its attention; a timm ViT, DeiT or Swin can.")
    return [b for stage in model.layers for b in stage.blocks] if hasattr(model, "layers") else list(model.blocks)


@torch.no_grad()
def attention_pairs(teacher: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What every attention layer of the teacher reads and gives on these images, from its own stream."""
    read, given, handles = [], [], []
    for block in blocks(teacher):
        first, last = attention_input_and_output(block)
        handles.append(first.register_forward_hook(lambda _, __, out: read.append(out)))
        handles.append(last.register_forward_pre_hook(lambda _, args: given.append(args[0])))
    try:
        teacher.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(read, given, strict=True))


def hidden_states(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What every block of a model gives, and its final features."""
    states = []
    handles = [block.register_forward_hook(lambda _, __, out: states.append(out)) for block in blocks(model)]
    try:
        features = model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    return [*states, features]


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|^2 / |target|^2 over all elements, in float32."""
    output, target = output.float(), target.float()
    return (output - target).square().sum() / target.square().sum()
