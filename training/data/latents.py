"""The stored moments of an autoencoder: written once, read as training batches."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from training.core.distributed import ALONE, World
from training.data.batches import epoch_order
from training.data.errors import DataError
from training.data.images import Images, check_classes, check_ranks, eval_transform, generator_cfg
from training.data.loading import open_loader, read_batches
from training.data.seeding import derive_seed
from vca.checkpoint import write_atomically
from vca.diffusion.vae import LatentDecoder, sample_latents

CHUNK = 1024


class Latents:
    """The stored moments of one split.

    Attributes:
        labels: (N,).
        shape: of the latents of one image, (C, H, W).
        class_folders, class_names: as `training.data.images.Images` has them.

    Raises:
        DataError: the folder is missing, unfinished or damaged.
    """

    def __init__(self, root: str | Path, split: str):
        folder = Path(root) / split
        try:
            index = read_index(folder / "index.json")
            self.moments = open_moments(folder, len(index["labels"]))
        except OSError as error:
            raise DataError(f"{folder}: no latents; make them with python -m training.latents ({error}).") from None
        if len(index["checksums"]) < -(-len(self.moments) // CHUNK):
            raise DataError(f"{folder} is unfinished; run python -m training.latents again.")
        self.checksums = index["checksums"]
        self.labels = torch.tensor(index["labels"])
        self.class_folders, self.class_names = index["class_folders"], index["class_names"]
        _, _, channels, height, width = self.moments.shape
        self.shape = (channels // 2, height, width)

    def __len__(self) -> int:
        return len(self.moments)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the labels and the stored moments."""
        content = (self.class_folders, self.labels.tolist(), self.checksums)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def read(self, indices: Tensor, flipped: Tensor) -> Tensor:
        """Moments (B, 2C, H, W) of the images `indices`, flipped where `flipped` (B,) is true."""
        return torch.from_numpy(self.moments[indices.numpy(), flipped.long().numpy()])

    def means(self, indices: Tensor) -> Tensor:
        """Scaled mean latents (B, C, H, W) of images, not flipped."""
        moments = self.read(indices, torch.zeros(len(indices)))
        return sample_latents(moments, torch.zeros(len(indices), *self.shape))


def open_latents(data: str, world: World = ALONE, device: torch.device | str = "cpu") -> tuple[Latents, Latents]:
    """The training and the validation latents of a folder; `synthetic:IMAGESxCLASSES` are noise of 256 px images.

    Raises:
        DataError: as `Latents`, the two do not hold the same classes, or other processes see other latents.
    """
    if data.startswith("synthetic:"):
        return tuple(SyntheticLatents(Images(data, split)) for split in ("train", "val"))
    train, val = Latents(data, "train"), Latents(data, "val")
    check_classes(data, train.class_folders, val.class_folders)
    check_ranks(data, [train, val], world, device)
    return train, val


class SyntheticLatents(Latents):
    """Moments of noise, one and the same for all images."""

    def __init__(self, images: Images, shape: tuple[int, int, int] = (4, 32, 32)):
        self.labels, self.shape = torch.tensor(images.labels()), shape
        self.class_folders, self.class_names, self.checksums = images.class_folders, images.class_names, []
        moments = np.random.default_rng(0).normal(size=(1, 2, 2 * shape[0], *shape[1:])).astype(np.float32)
        self.moments = np.broadcast_to(moments, (len(images), *moments.shape[1:]))


class LatentBatches:
    """Training batches of latents, drawn anew from the moments in each epoch."""

    def __init__(
        self, latents: Latents, *, batch_size: int, seed: int, device: torch.device, rows: slice = slice(None)
    ):
        self.latents, self.batch_size, self.seed, self.device, self.rows = latents, batch_size, seed, device, rows
        self.steps_per_epoch = len(latents) // batch_size

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `first`, `first + 1`, ... of an epoch: scaled latents (B, C, H, W) and labels (B,)."""
        batches = epoch_order(len(self.latents), self.seed, epoch).split(self.batch_size)
        for number in range(first, self.steps_per_epoch):
            batch, rows = batches[number], self.rows
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, number, 3))
            flipped = torch.rand(len(batch), generator=generator) < 0.5
            normal = torch.randn(len(batch), *self.latents.shape, generator=generator)
            latents = sample_latents(self.latents.read(batch[rows], flipped[rows]), normal[rows])
            yield latents.to(self.device), self.latents.labels[batch[rows]].to(self.device)


def read_index(file: Path) -> dict:
    """The `index.json` of a split.

    Raises:
        DataError: it is damaged.
    """
    lists = ("labels", "class_folders", "class_names", "checksums")
    try:
        index = json.loads(file.read_text())
        if all(isinstance(index[key], list) for key in lists) and all(type(label) is int for label in index["labels"]):
            return index
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DataError(f"{file} is damaged; delete {file.parent} and run python -m training.latents again.")


def open_moments(folder: Path, count: int, mode: str = "r") -> np.memmap:
    """The stored moments of `count` images.

    Raises:
        DataError: the file is damaged, or of another number of images.
    """
    file = folder / "moments.npy"
    try:
        moments = np.load(file, mmap_mode=mode)
    except (ValueError, EOFError) as error:
        raise DataError(f"{file} is damaged ({error}); delete {folder} and run python -m training.latents.") from None
    if moments.ndim != 5 or moments.dtype != np.float32 or len(moments) != count:
        raise DataError(f"{file}: {moments.dtype} {moments.shape} are not the moments of {count} images.")
    return moments


class _Sources(Dataset):
    """What tells the file of one image from another: size and CRC-32."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, int]:
        try:
            stream, _ = self.images.reader[index]
            with stream:
                content = stream.read()
        except OSError as error:
            file = self.images.reader.filename(index, absolute=True)
            raise DataError(f"{file} cannot be read ({error.strerror}).") from None
        return len(content), zlib.crc32(content)


def sources(images: Images, workers: int) -> list[list]:
    """[name, size, CRC-32] of the file of every image."""
    sizes, sums = [], []
    for some_sizes, some_sums in read_batches(open_loader(_Sources(images), 256, num_workers=workers)):
        sizes += some_sizes.tolist()
        sums += some_sums.tolist()
    names = [images.reader.filename(index) for index in range(len(images))]
    return [list(source) for source in zip(names, sizes, sums, strict=True)]


def encode(images: Images, folder: Path, vae: LatentDecoder, size: int, batch_size: int, workers: int, device) -> None:
    """Encodes a split into `folder`, a chunk at a time; finished chunks of an earlier call are checked and kept.

    Args:
        images: the split, N images.
        folder: gets `moments.npy`, float32 (N, 2, 2C, H, W): mean and log-variance of the image plain and flipped,
            unscaled; `index.json`; and `images.json`, the images' names with the size and checksum of their files.
        vae: the autoencoder; its latents are 8 times smaller than the image in each direction.
        size: side of the images in pixels, after resizing and center crop.
        batch_size: images that are encoded at once.
        workers: processes that read the images.
        device: where to encode.

    Raises:
        DataError: `folder` holds the latents of other images or another autoencoder, a finished chunk is damaged, an
            image cannot be read, or there is no room for the latents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = images.labels()
    index = dict(vae=vae.source, image_size=size, class_folders=images.class_folders, class_names=images.class_names,
                 labels=labels, checksums=[])  # fmt: skip
    file, sources_file, found = folder / "index.json", folder / "images.json", sources(images, workers)
    if file.exists():
        old = read_index(file)
        if changed := [key for key in index if key != "checksums" and index[key] != old.get(key)]:
            raise DataError(f"{folder} holds latents with another {', '.join(changed)}; choose another --out.")
        _check_sources(sources_file, found)
        index["checksums"] = old["checksums"]
    images.transform = eval_transform(generator_cfg(size))
    if index["checksums"]:
        moments = open_moments(folder, len(images), "r+")
    else:
        shape = vae.moments(torch.zeros(1, 3, size, size, device=device)).shape[1:]
        write_atomically(sources_file, json.dumps(found).encode())
        moments = _reserve(folder / "moments.npy", (len(images), 2, *shape))
    for number, start in enumerate(tqdm(range(0, len(images), CHUNK), unit="chunk", desc=folder.name)):
        rows = range(start, min(start + CHUNK, len(images)))
        if number < len(index["checksums"]):
            if zlib.crc32(moments[rows.start : rows.stop].tobytes()) != index["checksums"][number]:
                last = rows.stop - 1
                raise DataError(f"{folder / 'moments.npy'}: images {start} to {last} are damaged; delete {folder}.")
            continue
        done = start
        for x, _ in read_batches(open_loader(Subset(images, rows), batch_size, num_workers=workers)):
            both = torch.stack([vae.moments(view.to(device)) for view in (x, x.flip(-1))], dim=1)
            moments[done : done + len(x)] = both.float().cpu().numpy()
            done += len(x)
        moments.flush()
        index["checksums"].append(zlib.crc32(moments[rows.start : rows.stop].tobytes()))
        write_atomically(file, json.dumps(index).encode())


def _check_sources(file: Path, found: list[list]) -> None:
    """Refuses to go on with the latents of images that have changed since."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        raise DataError(f"{file} is missing or damaged; delete {file.parent} to encode the images anew.") from None
    if known != found:
        before = {tuple(source) for source in known}
        name = next((source[0] for source in found if tuple(source) not in before), found[0][0])
        raise DataError(
            f"{file.parent} holds the latents of other images: {name} has changed since; choose another --out, or "
            f"delete {file.parent} to encode them anew."
        )


def _reserve(file: Path, shape: tuple[int, ...]) -> np.memmap:
    """A file of moments with its room on the disk taken: writing to a map of more than the disk holds is a crash."""
    moments = np.lib.format.open_memmap(file, "w+", np.float32, shape)
    try:
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    except OSError as error:
        size = file.stat().st_size / 1e9
        file.unlink()
        raise DataError(f"{file}: there is no room for {size:.1f} GB of latents ({error.strerror}).") from None
    return moments
