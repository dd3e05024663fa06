"""Images for training and evaluation: folders of classes, read from disk or held in memory.

Order and augmentation are functions of (seed, epoch, sample index), so they depend neither on the number of workers nor
on where a run was interrupted.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class DataError(ValueError):
    """Images that cannot be used; the message says which and why."""


def derive_seed(*parts: int) -> int:
    """A 32-bit seed for any tuple of non-negative integers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(*parts: int) -> None:
    """Seeds Python, NumPy and PyTorch (all devices): timm's augmentations draw from each of them."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Images(Dataset):
    """The images of one split of a data folder, or of anything else `timm.data.create_dataset` opens.

    An item is asked for by its index, or by (seed, epoch, index) for a transform whose randomness these decide.

    Attributes:
        class_names: folder names in label order; `classes.txt` beside the splits gives readable ones.
    """

    def __init__(self, root: str | Path, split: str, transform: Callable | None = None):
        if not (Path(root) / split).is_dir():
            raise DataError(f"{root} has no folder {split!r}; expected {root}/{split}/CLASS/IMAGE for each class.")
        try:
            self.reader = create_dataset("", root=str(root), split=split).reader
        except RuntimeError:
            raise DataError(f"{root}/{split} holds no images; expected {root}/{split}/CLASS/IMAGE.") from None
        self.transform = transform
        folders = sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.get)
        if len(folders) < 2:
            raise DataError(f"{root}/{split} has {len(folders)} class folder(s); classification needs at least two.")
        self.class_folders = folders
        self.class_names = folders
        names = Path(root) / "classes.txt"
        if names.is_file():
            self.class_names = names.read_text(encoding="utf-8", errors="replace").split("\n")[: len(folders)]
            if len(self.class_names) != len(folders) or not all(self.class_names):
                raise DataError(f"{names} must name {len(folders)} classes, one a line, in the order of the folders.")

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: int | tuple[int, int, int]):
        if isinstance(key, tuple):
            seed_everything(*key)
            key = key[-1]
        stream, label = self.reader[key]
        try:
            with stream:
                image = Image.open(stream).convert("RGB")
        except Exception as error:
            raise DataError(f"{self.reader.filename(key, absolute=True)} is not a readable image ({error}).") from None
        return (self.transform(image) if self.transform else image), label


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
    loader = DataLoader(images, batch_size=256, num_workers=workers)
    pixels, labels = zip(*_read(loader), strict=True)
    return torch.cat(pixels).permute(0, 3, 1, 2).contiguous(), torch.cat(labels)


def _read(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader. A worker process wraps its error in a traceback; here it is what it was."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None


def normalize(pixels: Tensor, pretrained_cfg: dict) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, (pixels / 255 - mean) / std."""
    mean, std = (torch.tensor(pretrained_cfg[key], device=pixels.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def pad_crop_flip(pixels: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Shifts each image by up to `padding` pixels (zero border) and flips half of them.

    Args:
        pixels: (B, C, H, W) of any type.
        draws: uniform numbers in [0, 1), (B, 3): vertical shift, horizontal shift, flip.
        padding: largest shift in pixels.
    """
    batch, _, height, width = pixels.shape
    top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(height, device=pixels.device)
    cols = left[:, None] + torch.arange(width, device=pixels.device)
    cols = torch.where(draws[:, 2:] < 0.5, cols.flip(1), cols)
    padded = F.pad(pixels, [padding] * 4).permute(0, 2, 3, 1)
    index = torch.arange(batch, device=pixels.device)[:, None, None]
    return padded[index, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch `epoch` visits the samples."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(derive_seed(seed, epoch, 0)))


class MemoryBatches:
    """Training batches from decoded images, augmented in batches on the training device.

    Args:
        pixels, labels: what `decode` returns.
        padding: largest shift of the random crop in pixels.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, *, batch_size: int, seed: int, padding: int, cfg: dict, device):
        self.pixels, self.labels = pixels.to(device), labels.to(device)
        self.batch_size, self.seed, self.padding, self.cfg = batch_size, seed, padding, cfg
        self.steps_per_epoch = len(labels) // batch_size

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `first`, `first + 1`, ... of an epoch: normalised images (B, 3, H, W) and labels (B,)."""
        order = epoch_order(len(self.labels), self.seed, epoch).to(self.pixels.device)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, 1))
        draws = torch.rand(len(self.labels), 3, generator=generator).to(self.pixels.device)
        for batch in order.split(self.batch_size)[first : self.steps_per_epoch]:
            pixels = pad_crop_flip(self.pixels[batch], draws[batch], self.padding)
            yield normalize(pixels, self.cfg), self.labels[batch]


class FolderBatches:
    """Training batches read and augmented image by image in worker processes, for data too large for memory."""

    def __init__(self, images: Images, *, batch_size: int, seed: int, workers: int, device):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.workers, self.device = workers, device
        self.steps_per_epoch = len(images) // batch_size

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `MemoryBatches.epoch`."""
        order = epoch_order(len(self.images), self.seed, epoch).tolist()
        keys = [(self.seed, epoch, index) for index in order]
        batches = [keys[i * self.batch_size : (i + 1) * self.batch_size] for i in range(first, self.steps_per_epoch)]
        pin = torch.device(self.device).type == "cuda"
        for x, y in _read(DataLoader(self.images, batch_sampler=batches, num_workers=self.workers, pin_memory=pin)):
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
