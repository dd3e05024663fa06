"""What a pretrained model sees in training images: stored once, or computed as it is asked."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.core.features import FrozenFeatures, on_grid
from training.core.precision import autocast
from training.core.recipe import RecipeError
from training.data.errors import DataError
from training.data.images import Images, generator_cfg, normalize
from training.data.latents import Latents, flip
from training.data.stored import Kind, Stored, store

FEATURES = Kind("features", "features.npy", "training.features", np.float16, 4)


class Features(Stored):
    """The stored features of one split.

    Attributes:
        shape: patches and channels of the features of one image.

    Raises:
        DataError: as `Stored`.
    """

    kind = FEATURES

    def __init__(self, root: str | Path, split: str):
        super().__init__(root, split)
        self.shape = self.array.shape[2:]


class OnlineFeatures:
    """As `Features`, of images in memory, uint8 (N, 3, H, W), computed whenever they are read."""

    def __init__(self, pixels: Tensor, teacher: FrozenFeatures, precision: str, device: torch.device):
        self.pixels, self.teacher, self.device = pixels, teacher, device
        self.context = autocast(device, precision)
        self.cfg = generator_cfg(pixels.shape[-1])
        self.shape = self.read(torch.zeros(1).long(), torch.zeros(1)).shape[1:]

    def read(self, indices: Tensor, flipped: Tensor) -> Tensor:
        images = normalize(self.pixels[indices.cpu()], self.cfg)
        return last_features(self.teacher, flip(images, flipped.cpu()).to(self.device), self.context)


def last_features(teacher: FrozenFeatures, images: Tensor, context: torch.autocast) -> Tensor:
    """The features (B, T, C) of images (B, 3, H, W) in [-1, 1]."""
    with torch.no_grad(), context:
        return teacher(images)[0]


def is_stored(teacher: str) -> bool:
    """Whether this is a folder of features, and no model."""
    return (Path(teacher) / "train" / FEATURES.file).exists()


def seen_by(teacher: str) -> str:
    """The pretrained model by its name: of a folder of features, the one that made them.

    Raises:
        DataError: as `Features`.
    """
    return Features(teacher, "train").index["teacher"] if is_stored(teacher) else teacher


def open_features(
    teacher: str, images: Images | Latents, pixels: Tensor | None, grid_size: int, precision: str, device: torch.device
) -> Features | OnlineFeatures:
    """The features of the training images.

    Args:
        teacher: a folder of features, or a model as `training.core.teacher.open_teacher` takes it.
        images: the training split.
        pixels: its images, uint8 (N, 3, H, W); None if there are only latents.
        grid_size: patches of the generator in a row.
        precision: in which the model computes.

    Raises:
        DataError, RecipeError, vca.CheckpointError: the features are not to be had, or those of other images.
    """
    if not is_stored(teacher):
        if pixels is None:
            raise RecipeError(
                "cached latents have no images for --teacher to see; give it the folder that "
                "python -m training.features made of the same images."
            )
        return OnlineFeatures(pixels, on_grid(teacher, grid_size, device), precision, device)
    stored = Features(teacher, "train")
    same = stored.labels.tolist() == list(images.labels if isinstance(images, Latents) else images.labels())
    names = images.names() if isinstance(images, Latents) else images.file_names()
    if not same or stored.class_folders != images.class_folders or stored.names() != names:
        raise DataError(f"{teacher} holds the features of other images than --data.")
    if stored.shape[0] != grid_size**2:
        raise DataError(
            f"{teacher} holds {stored.shape[0]} features an image; the model has {grid_size} x {grid_size}."
        )
    return stored


def compute(
    images: Images, folder: Path, name: str, teacher: FrozenFeatures, size: int, batch_size: int, workers: int,
    precision: str, device: torch.device,
) -> None:  # fmt: skip
    """Stores the features of a split, float16 (N, 2, T, C), of each image plain and flipped.

    Args:
        name: of the teacher, for `index.json`.
        teacher: the features on some grid.
        precision: in which it computes.

    Further arguments and errors are those of `training.data.stored.store`.
    """
    about = dict(teacher=name, side=teacher.side, precision=precision)
    context = autocast(device, precision)
    store(
        FEATURES, images, folder, lambda x: last_features(teacher, x, context), about, size, batch_size, workers, device
    )
