"""Images of a data set, and their preprocessing.

Data is named by one text: a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, a folder CLASS/IMAGE that is then split
in two (`training.data.folders`), a folder of WebDataset shards (`training.data.shards`), `hfds:NAME` for a Hugging Face
data set, or `synthetic:IMAGESxCLASSES` for noise.
"""

import hashlib
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import Dataset

from training.core.distributed import ALONE, World
from training.data.errors import DataError
from training.data.folders import FolderReader, class_folders, counted, is_unsplit
from training.data.loading import open_loader, read_batches
from training.data.seeding import seed_everything
from training.data.shards import ShardReader, find_shards
from vca.images import upright_rgb

FEW_CLASSES = 20


class Images(Dataset):
    """The images of one split of a data set.

    An item is asked for by its index, or by (seed, epoch, copy, index) for a transform whose randomness these decide.

    Attributes:
        class_folders: what the data set calls its classes, in label order.
        class_names: the same; `classes.txt` beside the splits of a folder gives readable ones.
        sources: index of every image's source (N,), which an item then has as its third part; None for none.

    Raises:
        DataError: there is no such split, it holds no images, or fewer than two classes.
    """

    def __init__(self, data: str | Path, split: str, transform: Callable | None = None):
        self.reader = open_reader(str(data), split)
        self.transform = transform
        self.sources: Tensor | None = None
        folders = sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.get)
        if len(folders) < 2:
            raise DataError(f"{data}/{split} has {len(folders)} class folder(s); classification needs at least two.")
        self.class_folders = folders
        self.class_names = folders
        names = Path(data) / "classes.txt"
        if names.is_file():
            self.class_names = names.read_text(encoding="utf-8", errors="replace").split("\n")[: len(folders)]
            if len(self.class_names) != len(folders) or not all(self.class_names):
                raise DataError(f"{names} must name {len(folders)} classes, one a line, in the order of the folders.")

    def __len__(self) -> int:
        return len(self.reader)

    def labels(self) -> list[int]:
        """The label of every image, without reading the images."""
        if hasattr(self.reader, "iter_targets"):
            return list(self.reader.iter_targets())
        return [sample[-1] for sample in self.reader.samples]

    def file_names(self) -> list[str]:
        """The file of every image, below its split."""
        return [self.reader.filename(index) for index in range(len(self))]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when an image is renamed or gets another label."""
        names = self.reader.names() if hasattr(self.reader, "names") else []
        return hashlib.sha256(repr((self.class_folders, self.labels(), names)).encode()).hexdigest()[:16]

    def summary(self) -> str:
        """ "24 images of 3 classes (8, 8, 8); 2 files left out, such as notes.txt"."""
        found = Counter(self.labels())
        counts = [found[label] for label in range(len(self.class_folders))]
        sizes = ", ".join(map(str, counts)) if len(counts) <= FEW_CLASSES else f"{min(counts)} to {max(counts)} each"
        text = f"{counted(len(self), 'image')} of {counted(len(counts), 'class')} ({sizes})"
        if left_out := getattr(self.reader, "left_out", []):
            text += f"; {counted(len(left_out), 'file')} left out, such as {left_out[0]}"
        if empty := getattr(self.reader, "empty", []):
            text += f"; {counted(len(empty), 'empty folder')} left out, such as {empty[0]}"
        return text

    def __getitem__(self, key: int | tuple[int, int, int, int]):
        if isinstance(key, tuple):
            seed_everything(*key)
            key = key[-1]
        try:
            stream, label = self.reader[key]
            with stream:
                image = upright_rgb(Image.open(stream))
        except Exception as error:
            raise DataError(f"{self.reader.filename(key, absolute=True)} is not a readable image ({error}).") from None
        item = (self.transform(image) if self.transform else image), label
        return item if self.sources is None else (*item, self.sources[key])


def open_splits(data: str, world: World = ALONE, device: torch.device | str = "cpu") -> tuple[Images, Images]:
    """The training and the validation images of a data set; the first process says what they are.

    Args:
        device: on which the processes talk to each other.

    Raises:
        DataError: as `Images`, the two do not hold the same classes, or other processes see other images.
    """
    train, val = Images(data, "train"), Images(data, "val")
    check_classes(data, train.class_folders, val.class_folders)
    if world.first:
        if getattr(train.reader, "part", ""):
            print(f"{data} has no train and val: a fifth of each class, chosen by name, is val.", file=sys.stderr)
        print(f"train: {train.summary()}\nval: {val.summary()}", file=sys.stderr)
    check_ranks(data, [train, val], world, device)
    return train, val


def check_classes(data: str, train: list[str], val: list[str]) -> None:
    """Refuses a data set whose splits do not hold the same classes, by their folders."""
    if train != val:
        alone = sorted(set(train) ^ set(val))[0]
        where = "train" if alone in train else "val"
        raise DataError(f"{data}: train and val do not hold the same class folders; {alone} is in {where} alone.")


def check_ranks(data: str, splits: list, world: World, device: torch.device | str) -> None:
    """Refuses data that are not the same for every process, by their `fingerprint`."""
    if world.size == 1:
        return
    mine = [split.fingerprint() for split in splits]
    differ = world.share(mine) != mine
    if world.sum([float(differ)], device)[0]:
        raise DataError(f"{data}: not all processes see the same images, or under the same names.")


def describe(train, val) -> dict:
    """What tells one data set from another: it belongs to a run as its recipe does."""
    return dict(
        classes=list(train.class_folders), train_images=len(train), val_images=len(val),
        train_names=train.fingerprint(), val_names=val.fingerprint(),
    )  # fmt: skip


def open_reader(data: str, split: str):
    """timm's way to read a split: a sequence of (stream, label) with `class_to_idx` and `filename(index)`."""
    kind, _, name = data.partition(":")
    if kind == "synthetic":
        count, classes = (int(number) for number in name.split("x"))
        return SyntheticReader(count if split == "train" else min(count, SyntheticReader.VALIDATION), classes)
    if kind == "hfds":
        return _open_hugging_face(name, split)
    folder = Path(data) / split
    if class_folders(folder):  # an archive beside them is what they were unpacked from
        return FolderReader(folder)
    if shards := find_shards(data, split):
        return ShardReader(shards)
    if split in ("train", "val") and not folder.exists() and is_unsplit(data):
        return FolderReader(data, part=split)
    if not folder.is_dir():
        raise DataError(
            f"{data} has no folder {split!r}; expected {data}/{split}/CLASS/IMAGE, or {data}/CLASS/IMAGE, which is "
            "then split into train and val."
        )
    return FolderReader(folder)


def _open_hugging_face(name: str, split: str):
    """A data set of the Hub, or a local folder in its layout. Its validation split may have any usual name."""
    splits = ["validation", "val", "valid", "test"] if split == "val" else [split]
    errors = []
    for own_name in splits:
        try:
            return create_dataset(f"hfds/{name}", root=None, split=own_name).reader
        except ImportError:
            raise DataError("Hugging Face data sets need the package: pip install datasets.") from None
        except Exception as error:  # whatever the name, the network or the files do
            errors.append(f"{own_name}: {error}")
    raise DataError(f"hfds:{name} cannot be read: {'; '.join(errors)}")


class SyntheticReader:
    """Images of noise, for trying a recipe out: JPEG files of the size that photos of ImageNet have."""

    SIZE = (500, 375)
    DIFFERENT = 8
    VALIDATION = 8

    def __init__(self, count: int, classes: int):
        self.class_to_idx = {f"class{label:04d}": label for label in range(classes)}
        self.count = count
        self.files = []
        for seed in range(self.DIFFERENT):
            noise = np.random.default_rng(seed).integers(0, 256, (*self.SIZE[::-1], 3), dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(noise).save(stream, format="JPEG")
            self.files.append(stream.getvalue())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return io.BytesIO(self.files[index % self.DIFFERENT]), index % len(self.class_to_idx)

    def iter_targets(self) -> Iterator[int]:
        return (index % len(self.class_to_idx) for index in range(self.count))

    def filename(self, index: int, **_) -> str:
        return f"synthetic image {index}"


def eval_transform(pretrained_cfg: dict, as_bytes: bool = False):
    """The checkpoint's own preprocessing: shorter side resized, centre crop; floats, or uint8 before `normalize`."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    transform = create_transform(**{key: pretrained_cfg[key] for key in keys}, is_training=False)
    if not as_bytes:
        return transform
    geometry = transform.transforms[:-2]
    return lambda image: torch.from_numpy(np.array(_apply(geometry, image)))


def generator_cfg(side: int) -> dict:
    """The preprocessing of all generators: shorter side resized to `side`, centre crop, pixels in [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    size = (3, side, side)
    return dict(input_size=size, interpolation="bicubic", crop_pct=1.0, crop_mode="center", mean=half, std=half)


def _apply(transforms: list[Callable], image):
    for transform in transforms:
        image = transform(image)
    return image


def decode(images: Images, pretrained_cfg: dict, workers: int = 0) -> tuple[Tensor, Tensor]:
    """A whole split, resized and cropped, as uint8 (N, 3, H, W) and labels (N,)."""
    images.transform = eval_transform(pretrained_cfg, as_bytes=True)
    loader = open_loader(images, batch_size=256, num_workers=workers)
    pixels, labels = zip(*read_batches(loader), strict=True)
    return torch.cat(pixels).permute(0, 3, 1, 2).contiguous(), torch.cat(labels)


def normalize(pixels: Tensor, pretrained_cfg: dict) -> Tensor:
    """uint8 (B, 3, H, W), or floats in [0, 1] -> float32, (pixels - mean) / std of pixels in [0, 1]."""
    mean, std = (torch.tensor(pretrained_cfg[key], device=pixels.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = pixels if pixels.is_floating_point() else pixels.float() / 255
    return (images - mean) / std


def denormalize(images: Tensor, pretrained_cfg: dict) -> Tensor:
    """Normalised images (B, 3, H, W) -> the same in [0, 1]."""
    mean, std = (torch.tensor(pretrained_cfg[key], device=images.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)
