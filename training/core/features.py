"""What a frozen pretrained model sees in images, as a distance to train by."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.core.recipe import RecipeError
from training.core.teacher import open_teacher, resize
from training.data.images import normalize


class FrozenFeatures:
    """Patch features of a pretrained model; `at_side` and `on_grid` open one.

    Args:
        model: frozen, for images of `side`.
        side: at which the model sees the images, in pixels.
        layers: whose outputs are taken, from 0; None for the last one's, normalized.
    """

    def __init__(self, model: nn.Module, side: int, layers: list[int] | None):
        self.model, self.side, self.layers = model, side, layers

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> features of each layer (B, T, C), T patches in rows."""
        pixels = normalize(resize(images.float() / 2 + 0.5, self.side), self.model.pretrained_cfg)
        last = self.layers is None
        maps = self.model.forward_intermediates(
            pixels, indices=1 if last else self.layers, norm=last, stop_early=True, intermediates_only=True
        )
        return [features.flatten(2).transpose(1, 2) for features in maps]


def at_side(teacher: str, side: int, layers: list[int], device: torch.device) -> FrozenFeatures:
    """The features of some layers of a model that sees images of this side.

    Args:
        teacher: as `training.core.teacher.open_teacher` takes it.

    Raises:
        vca.CheckpointError: the teacher is not to be had.
        RecipeError: it has no such layers, or no patch features.
    """
    features = FrozenFeatures(open_teacher(teacher, img_size=side).to(device), side, layers)
    _check(teacher, features, device)
    return features


def on_grid(teacher: str, grid_size: int, device: torch.device) -> FrozenFeatures:
    """The last features of a model, which sees images as large as it takes for a grid of this side.

    Arguments and errors are those of `at_side`.
    """
    model = open_teacher(teacher).to(device)
    if not hasattr(model, "set_input_size"):
        raise RecipeError(f"{teacher}: a {type(model).__name__} has no patch features; a timm ViT, DeiT or Swin has.")
    side = grid_size * model.feature_info[-1]["reduction"]
    model.set_input_size(img_size=(side, side))
    features = FrozenFeatures(model, side, None)
    if (found := _check(teacher, features, device)) != grid_size**2:
        raise RecipeError(f"{teacher} has {found} features at {side} px instead of {grid_size} x {grid_size}.")
    return features


@torch.no_grad()
def _check(teacher: str, features: FrozenFeatures, device: torch.device) -> int:
    """The number of patches, of a model that has such features."""
    try:
        return features(torch.zeros(1, 3, features.side, features.side, device=device))[0].shape[1]
    except (AttributeError, AssertionError, IndexError, ValueError) as error:
        raise RecipeError(f"{teacher} has no features of layers {features.layers}: {error}") from None


def misalignment(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 - the cosine of the angle between two features (B, T, C) of each patch, mean over the patches, (B,)."""
    return 1 - F.cosine_similarity(ours.float(), theirs.float(), dim=2).mean(1)
