"""The stored moments of an autoencoder: written once, read as training batches."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from training.data.batches import epoch_order
from training.data.images import DataError, Images, eval_transform, generator_cfg
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
            index = json.loads((folder / "index.json").read_text())
            self.moments = np.load(folder / "moments.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: no latents; make them with python -m training.latents ({error}).") from None
        if len(index["checksums"]) < -(-len(self.moments) // CHUNK):
            raise DataError(f"{folder} is unfinished; run python -m training.latents again.")
        self.labels = torch.tensor(index["labels"])
        self.class_folders, self.class_names = index["class_folders"], index["class_names"]
        _, _, channels, height, width = self.moments.shape
        self.shape = (channels // 2, height, width)

    def __len__(self) -> int:
        return len(self.moments)

    def read(self, indices: Tensor, flipped: Tensor) -> Tensor:
        """Moments (B, 2C, H, W) of the images `indices`, flipped where `flipped` (B,) is true."""
        return torch.from_numpy(self.moments[indices.numpy(), flipped.long().numpy()])

    def means(self, indices: Tensor) -> Tensor:
        """Scaled mean latents (B, C, H, W) of images, not flipped."""
        moments = self.read(indices, torch.zeros(len(indices)))
        return sample_latents(moments, torch.zeros(len(indices), *self.shape))


def open_latents(data: str) -> tuple[Latents, Latents]:
    """The training and the validation latents of a folder; `synthetic:IMAGESxCLASSES` are noise of 256 px images.

    Raises:
        DataError: as `Latents`, or the two do not hold the same classes.
    """
    if data.startswith("synthetic:"):
        return tuple(SyntheticLatents(Images(data, split)) for split in ("train", "val"))
    train, val = Latents(data, "train"), Latents(data, "val")
    if val.class_folders != train.class_folders:
        raise DataError(f"{data}: train and val do not hold the same class folders.")
    return train, val


class SyntheticLatents(Latents):
    """Moments of noise, one and the same for all images."""

    def __init__(self, images: Images, shape: tuple[int, int, int] = (4, 32, 32)):
        self.labels, self.shape = torch.tensor(images.labels()), shape
        self.class_folders, self.class_names = images.class_folders, images.class_names
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


def encode(images: Images, folder: Path, vae: LatentDecoder, size: int, batch_size: int, workers: int, device) -> None:
    """Encodes a split into `folder`, a chunk at a time; finished chunks of an earlier call are checked and kept.

    Args:
        images: the split, N images.
        folder: gets `moments.npy`, float32 (N, 2, 2C, H, W): mean and log-variance of the image plain and flipped,
            unscaled; and `index.json`.
        vae: the autoencoder; its latents are 8 times smaller than the image in each direction.
        size: side of the images in pixels, after resizing and center crop.
        batch_size: images that are encoded at once.
        workers: processes that read the images.
        device: where to encode.

    Raises:
        DataError: `folder` holds the latents of other images or another autoencoder, or a finished chunk is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = images.labels()
    index = dict(vae=vae.source, image_size=size, class_folders=images.class_folders, class_names=images.class_names,
                 labels=labels, checksums=[])  # fmt: skip
    file, array_file = folder / "index.json", folder / "moments.npy"
    if file.exists():
        old = json.loads(file.read_text())
        if changed := [key for key in index if key != "checksums" and index[key] != old[key]]:
            raise DataError(f"{folder} holds latents with another {', '.join(changed)}; choose another --out.")
        index["checksums"] = old["checksums"]
    images.transform = eval_transform(generator_cfg(size))
    if index["checksums"]:
        moments = np.load(array_file, mmap_mode="r+")
    else:
        shape = vae.moments(torch.zeros(1, 3, size, size, device=device)).shape[1:]
        moments = np.lib.format.open_memmap(array_file, "w+", np.float32, (len(images), 2, *shape))
    for number, start in enumerate(tqdm(range(0, len(images), CHUNK), unit="chunk", desc=folder.name)):
        rows = range(start, min(start + CHUNK, len(images)))
        if number < len(index["checksums"]):
            if zlib.crc32(moments[rows.start : rows.stop].tobytes()) != index["checksums"][number]:
                raise DataError(f"{array_file}: images {rows.start} to {rows.stop - 1} are damaged; delete {folder}.")
            continue
        done = start
        for x, _ in DataLoader(Subset(images, rows), batch_size, num_workers=workers):
            both = torch.stack([vae.moments(view.to(device)) for view in (x, x.flip(-1))], dim=1)
            moments[done : done + len(x)] = both.float().cpu().numpy()
            done += len(x)
        moments.flush()
        index["checksums"].append(zlib.crc32(moments[rows.start : rows.stop].tobytes()))
        write_atomically(file, json.dumps(index).encode())
