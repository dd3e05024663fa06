"""The model of a recipe, with random weights or with those it starts from."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import vca
from training.core.recipe import BaseRecipe, RecipeError
from training.core.teacher import FROM_TIMM, open_timm
from vca.checkpoint import place


def place_of(source: str | None) -> str | None:
    """How a checkpoint names the one it came from, without where that lies on this machine."""
    if source and source.startswith(FROM_TIMM) and "=" in source:
        name, _, file = source.partition("=")
        return f"{name}={Path(file).name}"
    return place(source) if source and Path(source).is_absolute() else source


def build_model(recipe: BaseRecipe, class_names: list[str], init: str | None, **args) -> tuple[nn.Module, list[dict]]:
    """The model of a recipe, drawn from its seed, and what trained the weights it starts from (oldest run first).

    Args:
        init: a checkpoint whose weights it takes; of one with other classes all but those of the classes. A checkpoint
            of the recipe's model for another image size keeps that size. Or `timm:NAME`, a pretrained model of timm:
            what a layer of the recipe's attention does not share with self-attention is then drawn, as by
            `vca.replace_attention`.
        **args: more arguments of `vca.create_model`.

    Raises:
        RecipeError: no such model can be built.
        vca.CheckpointError: `init` cannot be read, or is of another architecture.
    """
    source = vca.load(init) if init and not init.startswith(FROM_TIMM) else None
    if source and getattr(source, "pretrained_cfg", {}).get("architecture") == recipe.model:
        args = {key: value for key, value in source.model_args.items() if key == "img_size"} | args
    torch.manual_seed(recipe.seed)
    try:
        model = vca.create_model(recipe.model, num_classes=len(class_names), **args, **recipe.model_args())
    except (TypeError, ValueError) as error:
        raise RecipeError(f"cannot build {recipe.model}: {error}") from error
    if not init:
        return model, []
    if not source:
        fill_converted(model, open_timm(init, img_size=model.patch_embed.img_size), init)
        return model, []
    tensors = source.state_dict()
    same_classes = source.label_names == list(class_names)
    if not same_classes or getattr(recipe, "reset_head", False):
        drawn = _class_tensors(model)
        tensors = {key: value for key, value in tensors.items() if key not in drawn} | drawn
        if model.task == "generation":  # the null class stays
            for table in drawn.values():
                table[-1] = source.y_embedder.embedding_table.weight[-1].detach()
        why = "" if same_classes else f" knows {len(source.label_names)} other classes"
        _say(f"{init}{why}; drawn anew: {', '.join(drawn)}.")
    _fill(model, tensors, init)
    return model, source.training_history


def _class_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that belong to its classes."""
    part = model.get_classifier() if hasattr(model, "get_classifier") else model.y_embedder
    prefix = next(name for name, module in model.named_modules() if module is part)
    return {key: value for key, value in model.state_dict().items() if key.startswith(f"{prefix}.")}


def fill_converted(model: nn.Module, source: nn.Module, name: str) -> None:
    """Gives `model` the weights of `source`, which differs from it in its attention, and perhaps in its classes.

    What the attention layers do not share, and the head of other classes, stays as it was drawn; a note says so.

    Args:
        name: of the source, for the note and the error.

    Raises:
        vca.CheckpointError: the two differ in more than that.
    """
    given, own = source.state_dict(), model.state_dict()
    drawn = set(_class_tensors(model)) if source.num_classes != model.num_classes else set()
    drawn |= {key for key in own.keys() - given.keys() if ".attn." in key}
    left = {key for key in given.keys() - own.keys() if ".attn." in key}
    if source.num_classes != model.num_classes:
        left |= set(_class_tensors(source))
    taken = {key: value for key, value in given.items() if key not in drawn | left}
    _fill(model, taken | {key: own[key] for key in drawn}, name)
    kinds = sorted({key.rpartition(".attn.")[2] or key for key in drawn})
    _say(f"{name}; drawn anew: {', '.join(kinds) or 'nothing'}.")


def _fill(model: nn.Module, tensors: dict[str, Tensor], init: str) -> None:
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:4])[:300]
        raise vca.CheckpointError(f"{init} is no {type(model).__name__} of this size: {reason}") from None


def _say(text: str) -> None:
    print(f"NOTE: {text}", file=sys.stderr)
