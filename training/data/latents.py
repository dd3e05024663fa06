"""Latents of an autoencoder as training batches: from moments that were stored once, or encoded as they are asked."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.core.distributed import ALONE, World
from training.data.batches import epoch_order
from training.data.errors import DataError
from training.data.images import Images, check_classes, check_ranks, decode, generator_cfg, normalize, open_splits
from training.data.seeding import derive_seed
from training.data.stored import Kind, Stored, store
from vca.checkpoint import sha256
from vca.diffusion.vae import SD_SCALING, STRIDE, LatentDecoder, Scaling, sample_latents

MOMENTS = Kind("latents", "moments.npy", "training.latents", np.float32, 5)


class Latents(Stored):
    """The stored moments of one split.

    Attributes:
        shape: of the latents of one image, (C, H, W).
        scaling: how a generator sees them.

    Raises:
        DataError: as `Stored`.
    """

    kind = MOMENTS

    def __init__(self, root: str | Path, split: str):
        super().__init__(root, split)
        _, _, channels, height, width = self.array.shape
        self.shape = (channels // 2, height, width)
        self.scaling = Scaling(*self.index.get("scaling", SD_SCALING))

    def means(self, indices: Tensor) -> Tensor:
        """Mean latents (B, C, H, W) of images, not flipped, as a generator sees them."""
        moments = self.read(indices, torch.zeros(len(indices)))
        return sample_latents(moments, torch.zeros(len(indices), *self.shape), self.scaling)


class OnlineLatents(Latents):
    """As `Latents`, of images that are held in memory and encoded whenever they are read.

    Args:
        images: of one split.
        vae: the autoencoder.
        side: of the latents.
        workers: processes that read the images.
        device: where to encode.
    """

    def __init__(self, images: Images, vae: LatentDecoder, side: int, workers: int, device: torch.device):
        self.class_folders, self.class_names = images.class_folders, images.class_names
        self.fingerprint, self.names = images.fingerprint, images.file_names
        self.vae, self.device, self.scaling = vae, device, vae.scaling
        self.cfg = generator_cfg(side * vae.stride)
        self.pixels, self.labels = decode(images, self.cfg, workers)
        channels, height, width = self.read(torch.zeros(1).long(), torch.zeros(1)).shape[1:]
        self.shape = (channels // 2, height, width)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Tensor, flipped: Tensor) -> Tensor:
        images = flip(normalize(self.pixels[indices], self.cfg), flipped)
        return self.vae.moments(images.to(self.device)).cpu()


class SyntheticLatents(Latents):
    """Moments of noise, one and the same for all images, which are gray."""

    def __init__(self, images: Images, shape: tuple[int, int, int] = (4, 32, 32)):
        self.labels, self.shape, self.scaling = torch.tensor(images.labels()), shape, SD_SCALING
        self.class_folders, self.class_names, self.checksums = images.class_folders, images.class_names, []
        moments = np.random.default_rng(0).normal(size=(1, 2, 2 * shape[0], *shape[1:])).astype(np.float32)
        self.array = np.broadcast_to(moments, (len(images), *moments.shape[1:]))
        side = STRIDE * shape[-1]
        self.pixels = torch.full((1, 3, side, side), 128, dtype=torch.uint8).expand(len(images), -1, -1, -1)


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Images (B, C, H, W), mirrored where `flipped` (B,) is true."""
    return torch.where(flipped.bool().view(-1, 1, 1, 1), images.flip(-1), images)


def are_stored(data: str | Path) -> bool:
    """Whether a folder holds latents, and not images."""
    return any((Path(data) / "train" / name).exists() for name in ("index.json", MOMENTS.file))


def open_latents(
    data: str, vae: LatentDecoder, shape: tuple[int, int, int], workers: int, world: World = ALONE,
    device: torch.device | str = "cpu",
) -> tuple[Latents, Latents]:  # fmt: skip
    """The training and the validation latents of a folder that holds latents, or images, which are then encoded online.

    Args:
        data: the folder; `synthetic:IMAGESxCLASSES` are latents of noise.
        vae: the autoencoder; loaded for images alone.
        shape: of the latents of one image, (C, H, W).
        workers: processes that read images.

    Raises:
        DataError: as `Latents`, the latents have another shape, the two do not hold the same classes, or other
            processes see other latents.
        vca.diffusion.vae.DecoderError: the autoencoder is not to be had.
    """
    if data.startswith("synthetic:"):
        return tuple(SyntheticLatents(Images(data, split), shape) for split in ("train", "val"))
    if are_stored(data):
        train, val = Latents(data, "train"), Latents(data, "val")
        check_classes(data, train.class_folders, val.class_folders)
        check_ranks(data, [train, val], world, device)
        known = train.index.get("vae_sha256")
        if known and known != (digest_of(vae) or known):
            raise DataError(f"{data} holds latents of another autoencoder than vae = {vae.source}.")
    else:
        images = open_splits(data, world, device)
        train, val = (OnlineLatents(split, vae, shape[-1], workers, device) for split in images)
    (channels, *_), side = train.shape, train.shape[-1]
    if side != shape[-1]:
        raise DataError(f"the latents have side {side}; the recipe has input_size = {shape[-1]}.")
    if channels != shape[0]:
        raise DataError(f"the latents have {channels} channels; the recipe's model takes {shape[0]} (in_channels).")
    return train, val


class LatentBatches:
    """Training batches of latents, drawn anew from the moments in each epoch.

    Args:
        beside: gives what a batch has as its third part, by the indices of its images (B,) and whether each of them is
            flipped (B,); None for batches of two parts.
        rows: the rows of each batch that are wanted; default all.
    """

    def __init__(
        self, latents: Latents, *, batch_size: int, seed: int, device: torch.device, rows: slice = slice(None),
        beside: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):  # fmt: skip
        self.latents, self.batch_size, self.seed, self.device, self.rows = latents, batch_size, seed, device, rows
        self.beside = beside
        self.steps_per_epoch = len(latents) // batch_size

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, ...]]:
        """Batches `first`, `first + 1`, ... of an epoch: latents (B, C, H, W) as a generator sees them, labels (B,)."""
        batches = epoch_order(len(self.latents), self.seed, epoch).split(self.batch_size)
        for number in range(first, self.steps_per_epoch):
            batch, rows = batches[number], self.rows
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, number, 3))
            flipped = torch.rand(len(batch), generator=generator) < 0.5
            normal = torch.randn(len(batch), *self.latents.shape, generator=generator)
            moments = self.latents.read(batch[rows], flipped[rows])
            latents = sample_latents(moments, normal[rows], self.latents.scaling)
            parts = latents, self.latents.labels[batch[rows]]
            if self.beside:
                parts = *parts, self.beside(batch[rows], flipped[rows])
            yield tuple(part.to(self.device) for part in parts)


def encode(images: Images, folder: Path, vae: LatentDecoder, size: int, batch_size: int, workers: int, device) -> None:
    """Stores the moments of a split, float32 (N, 2, 2C, H, W): mean and log-variance, plain and flipped, unscaled.

    Arguments and errors are those of `training.data.stored.store`.
    """
    about = dict(vae=vae.source, scaling=[list(part) for part in vae.scaling])
    if digest := digest_of(vae):
        about |= dict(vae_sha256=digest)
    store(MOMENTS, images, folder, vae.moments, about, size, batch_size, workers, device)


def digest_of(vae: LatentDecoder) -> str:
    """sha256 of the weights of an autoencoder in a folder; empty for one of the Hub."""
    file = Path(vae.source) / "diffusion_pytorch_model.safetensors"
    return sha256(file) if file.is_file() else ""
