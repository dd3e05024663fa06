"""Images for training and evaluation: read from disk or held in memory.

Data is named by one text: a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, a folder of WebDataset shards
(`training.shards`), `hfds:NAME` for a Hugging Face data set, or `synthetic:IMAGESxCLASSES` for noise.

Order and augmentation are functions of (seed, epoch, sample index), so they depend neither on the number of workers and
processes nor on where a run was interrupted.
"""

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from training import augment
from training.shards import ShardError, ShardReader, find_shards
from vca.images import upright_rgb


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
    """The images of one split of a data set.

    An item is asked for by its index, or by (seed, epoch, copy, index) for a transform whose randomness these decide.

    Attributes:
        class_folders: what the data set calls its classes, in label order.
        class_names: the same; `classes.txt` beside the splits of a folder gives readable ones.

    Raises:
        DataError: there is no such split, it holds no images, or fewer than two classes.
    """

    def __init__(self, data: str | Path, split: str, transform: Callable | None = None):
        self.reader = open_reader(str(data), split)
        self.transform = transform
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

    def __getitem__(self, key: int | tuple[int, int, int, int]):
        if isinstance(key, tuple):
            seed_everything(*key)
            key = key[-1]
        stream, label = self.reader[key]
        try:
            with stream:
                image = upright_rgb(Image.open(stream))
        except Exception as error:
            raise DataError(f"{self.reader.filename(key, absolute=True)} is not a readable image ({error}).") from None
        return (self.transform(image) if self.transform else image), label


def open_splits(data: str) -> tuple[Images, Images]:
    """The training and the validation images of a data set.

    Raises:
        DataError: as `Images`, or the two do not hold the same classes.
    """
    train, val = Images(data, "train"), Images(data, "val")
    if val.class_folders != train.class_folders:
        raise DataError(f"{data}: train and val do not hold the same class folders.")
    return train, val


def open_reader(data: str, split: str):
    """timm's way to read a split: a sequence of (stream, label) with `class_to_idx` and `filename(index)`."""
    kind, _, name = data.partition(":")
    if kind == "synthetic":
        count, classes = (int(number) for number in name.split("x"))
        return SyntheticReader(count if split == "train" else min(count, SyntheticReader.VALIDATION), classes)
    if kind == "hfds":
        return _open_hugging_face(name, split)
    if shards := find_shards(data, split):
        try:
            return ShardReader(shards)
        except ShardError as error:
            raise DataError(str(error)) from None
    if not (Path(data) / split).is_dir():
        raise DataError(f"{data} has no folder {split!r}; expected {data}/{split}/CLASS/IMAGE for each class.")
    try:
        return create_dataset("", root=data, split=split).reader
    except RuntimeError:
        raise DataError(f"{data}/{split} holds no images; expected {data}/{split}/CLASS/IMAGE.") from None


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
    """uint8 (B, 3, H, W), or floats in [0, 1] -> float32, (pixels - mean) / std of pixels in [0, 1]."""
    mean, std = (torch.tensor(pretrained_cfg[key], device=pixels.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = pixels if pixels.is_floating_point() else pixels.float() / 255
    return (images - mean) / std


def denormalize(images: Tensor, pretrained_cfg: dict) -> Tensor:
    """Normalised images (B, 3, H, W) -> the same in [0, 1]."""
    mean, std = (torch.tensor(pretrained_cfg[key], device=images.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)


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


def repeated_order(order: Tensor, repeats: int, groups: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Repeated augmentation: as many samples as before, of which each comes `repeats` times, in the same batch.

    Copies go to different groups of a batch, as the sampler of DeiT (timm's `RepeatAugSampler`) sends them to different
    GPUs: a batch is made of `groups` parts of neighbouring rows, within which images are mixed.

    Returns:
        Sample indices and copy numbers, both as long as the whole batches of `order`.
    """
    whole = len(order) // batch_size * batch_size
    indices = order.repeat_interleave(repeats)[:whole]
    copies = torch.arange(whole) % repeats
    return tuple(x.view(-1, batch_size // groups, groups).transpose(1, 2).flatten() for x in (indices, copies))


class MemoryBatches:
    """Training batches from decoded images, augmented in batches on the training device.

    Args:
        pixels, labels: what `decode` returns.
        padding: largest shift of the random crop in pixels.
        smallest_crop, rotation, color_jitter, erasing: see `training.augment`; 1 and 0 for none.
        rows: the rows of each batch that are wanted; default all.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, *, batch_size: int, seed: int, padding: int, cfg: dict, device,
        smallest_crop: float = 1.0, rotation: float = 0.0, color_jitter: float = 0.0, erasing: float = 0.0,
        rows: slice = slice(None),
    ):  # fmt: skip
        self.pixels, self.labels = pixels.to(device), labels.to(device)
        self.batch_size, self.seed, self.padding, self.cfg, self.rows = batch_size, seed, padding, cfg, rows
        self.smallest_crop, self.rotation = smallest_crop, rotation
        self.color_jitter, self.erasing = color_jitter, erasing
        self.steps_per_epoch = len(labels) // batch_size

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `first`, `first + 1`, ... of an epoch: normalised images (B, 3, H, W) and labels (B,)."""
        order = epoch_order(len(self.labels), self.seed, epoch).to(self.pixels.device)
        shift = self._draws(3, epoch, 1)
        warp, jitter = self._draws(augment.WARP_DRAWS, epoch, 2), self._draws(augment.JITTER_DRAWS, epoch, 3)
        erase = self._draws(augment.ERASE_DRAWS, epoch, 4)
        for batch in order.split(self.batch_size)[first : self.steps_per_epoch]:
            chosen = batch[self.rows]
            images = pad_crop_flip(self.pixels[chosen], shift[chosen], self.padding).float() / 255
            if self.smallest_crop < 1 or self.rotation:
                images = augment.warp(images, warp[chosen], self.smallest_crop, self.rotation)
            if self.color_jitter:
                images = augment.jitter(images, jitter[chosen], self.color_jitter)
            images = normalize(images, self.cfg)
            if self.erasing:
                images = augment.erase(images, erase[chosen], self.erasing)
            yield images, self.labels[chosen]

    def _draws(self, count: int, epoch: int, purpose: int) -> Tensor:
        """Uniform numbers (N, count), a row for each image of the data set."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, purpose))
        return torch.rand(len(self.labels), count, generator=generator).to(self.pixels.device)


class FolderBatches:
    """Training batches read and augmented image by image in worker processes, for data too large for memory.

    Args:
        repeats: how often an image comes in a batch, each time augmented anew.
        groups: parts of a batch over which these copies are spread.
        rows: the rows of each batch that are wanted; default all.
    """

    CHUNK = 128

    def __init__(
        self, images: Dataset, *, batch_size: int, seed: int, workers: int, device, repeats: int = 1, groups: int = 1,
        rows: slice = slice(None),
    ):  # fmt: skip
        self.images, self.batch_size, self.seed, self.rows = images, batch_size, seed, rows
        self.workers, self.device = workers, device
        self.repeats, self.groups = repeats, groups
        self.steps_per_epoch = len(images) // batch_size

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `MemoryBatches.epoch`. A worker reads at most `CHUNK` images at a time, not a whole batch."""
        order = epoch_order(len(self.images), self.seed, epoch)
        indices, copies = (x.tolist() for x in repeated_order(order, self.repeats, self.groups, self.batch_size))
        keys = [(self.seed, epoch, copy, index) for index, copy in zip(indices, copies, strict=True)]
        chunks, per_step = [], 0
        for start in range(first * self.batch_size, len(keys), self.batch_size):
            mine = keys[start : start + self.batch_size][self.rows]
            parts = [mine[i : i + self.CHUNK] for i in range(0, len(mine), self.CHUNK)]
            chunks, per_step = chunks + parts, len(parts)
        pin = torch.device(self.device).type == "cuda"
        parts = _read(DataLoader(self.images, batch_sampler=chunks, num_workers=self.workers, pin_memory=pin))
        for _ in range(first, self.steps_per_epoch):
            whole = [[t.to(self.device, non_blocking=True) for t in next(parts)] for _ in range(per_step)]
            yield tuple(torch.cat(tensors) for tensors in zip(*whole, strict=True))


class MemoryEvaluation:
    """Batches of decoded images for evaluation, in order: uint8 (B, 3, H, W) and labels (B,); can be repeated."""

    def __init__(self, pixels: Tensor, labels: Tensor, batch_size: int = 500, share: slice = slice(None)):
        self.pixels, self.labels, self.batch_size = pixels[share], labels[share], batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True)


class FolderEvaluation:
    """As `MemoryEvaluation`, read from disk each time."""

    def __init__(self, images: Images, cfg: dict, workers: int, batch_size: int = 250, share: slice = slice(None)):
        images.transform = eval_transform(cfg, as_bytes=True)
        self.images = Subset(images, range(len(images))[share])
        self.workers, self.batch_size = workers, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in _read(DataLoader(self.images, self.batch_size, num_workers=self.workers)):
            yield pixels.permute(0, 3, 1, 2), labels
