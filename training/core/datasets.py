"""The data sets that recipes are for, and how a recipe is fitted to the data that are there."""

import hashlib
import sys
from dataclasses import replace
from typing import NamedTuple

from training.core.distributed import World
from training.core.recipe import BaseRecipe, RecipeError


class KnownDataset(NamedTuple):
    """A data set by its name.

    Attributes:
        train, val, classes: its numbers of training images, validation images and classes; no classes: unlabeled.
        val_split: what its authors call the images that validation takes.
        hub: the same data on the Hugging Face Hub; empty if it is not there.
        folders: `digest_of` its class folders.
    """

    train: int
    val: int
    classes: int
    val_split: str
    hub: str
    folders: str


DATASETS = {
    "ImageNet-1K": KnownDataset(1_281_167, 50_000, 1000, "validation", "ILSVRC/imagenet-1k", "385e0240499426c0"),
    "CIFAR-10": KnownDataset(50_000, 10_000, 10, "test", "uoft-cs/cifar10", "bb3914949cecedee"),
    "Tiny-ImageNet-100": KnownDataset(50_000, 5_000, 100, "validation", "", "704165a0135ce585"),
    "Everyday photos (212 classes)": KnownDataset(67_000, 5_998, 212, "validation", "", "1d5fb23b93030f65"),
    "Photos (145 classes)": KnownDataset(12_747, 1_767, 145, "validation", "", "f8ef5106a4fec233"),
    "Scenes (six landscapes)": KnownDataset(15_037, 1_673, 6, "validation", "", "0df8d67908c0fcef"),
    "photos, Tiny-ImageNet-100, scenes, CIFAR-10": KnownDataset(127_784, 18_440, 0, "validation", "", ""),
}


def digest_of(class_folders: list[str]) -> str:
    """16 hexadecimal digits that tell one set of class folders from another."""
    return hashlib.sha256("\n".join(sorted(class_folders)).encode()).hexdigest()[:16]


def is_dataset(name: str, class_folders: list[str], train_images: int) -> bool:
    """Whether data may be called so: one of `DATASETS` is recognised by its class folders or by its exact size.

    Any other name is the user's own and taken at their word.
    """
    if (known := DATASETS.get(name)) is None:
        return True
    if not class_folders:  # images without labels
        return train_images == known.train
    sizes = (known.classes, known.train)
    return digest_of(class_folders) == known.folders or (len(class_folders), train_images) == sizes


def fit(
    recipe: BaseRecipe, class_folders: list[str], train_images: int, world: World, fit_batch: bool = False
) -> BaseRecipe:
    """A recipe as it is run on the data that are there; what it changes it says.

    The recipe's data set, with its licence, is left out if the data are not it, so that no card calls own images by the
    name of a public set.

    Args:
        fit_batch: halve a batch that is larger than the data until it is not.

    Raises:
        RecipeError: the batch is larger than the data, and shall not be halved.
    """
    changes = {}
    if recipe.batch_size > train_images:
        batch = recipe.batch_size
        while batch > max(train_images, world.size):
            batch //= 2
        if not fit_batch:
            raise RecipeError(
                f"{train_images} training images are fewer than one batch of {recipe.batch_size}; "
                f"give --batch-size {batch} or less."
            )
        changes |= dict(batch_size=batch)
        if getattr(recipe, "mix_group", 0) > batch:
            changes |= dict(mix_group=0)
        _say(
            f"{train_images} training images are fewer than a batch of {recipe.batch_size}: --batch-size {batch}.",
            world,
        )
    if not is_dataset(recipe.dataset, class_folders, train_images):
        changes |= dict(dataset="", license="")
        _say(f"these are not the images of {recipe.dataset}: own data; --dataset and --license name them.", world)
    return replace(recipe, **changes)


def _say(text: str, world: World) -> None:
    if world.first:
        print(f"NOTE: {text}", file=sys.stderr)
