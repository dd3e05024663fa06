"""Batches for training and evaluation, read from disk or held in memory.

Order and augmentation are functions of (seed, epoch, sample index), so they depend neither on the number of workers and
processes nor on where a run was interrupted.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from training.data import augment
from training.data.augment import pad_crop_flip
from training.data.images import Images, eval_transform, normalize
from training.data.loading import open_loader, read_batches
from training.data.seeding import derive_seed


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch `epoch` visits the samples."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(derive_seed(seed, epoch, 0)))


def repeated_order(order: Tensor, repeats: int, groups: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Repeated augmentation: as many samples as before, of which each comes `repeats` times, in the same batch.

    Copies go to different groups of a batch, as the sampler of DeiT (timm's `RepeatAugSampler`) sends them to different
    GPUs: a batch is made of `groups` parts of neighbouring rows, within which images are mixed.

    Args:
        order: indices of the samples (N,), as an epoch visits them.
        repeats: how often each of them comes; the last ones of `order` do not come, to keep the epoch's length.
        groups: parts of a batch; a divisor of `batch_size`.
        batch_size: rows of a batch.

    Returns:
        Sample indices and copy numbers, from 0 to repeats - 1, each (M,) for the M samples of the whole batches.
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
        beside: gives what a batch has as its third part, by the indices of its images (B,) and whether each of them is
            flipped (B,); None for batches of two parts.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, *, batch_size: int, seed: int, padding: int, cfg: dict, device,
        smallest_crop: float = 1.0, rotation: float = 0.0, color_jitter: float = 0.0, erasing: float = 0.0,
        rows: slice = slice(None), beside: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):  # fmt: skip
        self.pixels, self.labels = pixels.to(device), labels.to(device)
        self.batch_size, self.seed, self.padding, self.cfg, self.rows = batch_size, seed, padding, cfg, rows
        self.smallest_crop, self.rotation = smallest_crop, rotation
        self.color_jitter, self.erasing, self.beside = color_jitter, erasing, beside
        self.steps_per_epoch = len(labels) // batch_size

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, ...]]:
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
            parts = images, self.labels[chosen]
            if self.beside:
                parts = *parts, self.beside(chosen, augment.flips(shift[chosen])).to(images.device)
            yield parts

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
        parts = read_batches(open_loader(self.images, batch_sampler=chunks, num_workers=self.workers, pin_memory=pin))
        for _ in range(first, self.steps_per_epoch):
            whole = [[t.to(self.device, non_blocking=True) for t in next(parts)] for _ in range(per_step)]
            yield tuple(torch.cat(tensors) for tensors in zip(*whole, strict=True))


class MemoryEvaluation:
    """Batches of decoded images for evaluation, in order: uint8 (B, 3, H, W) and labels (B,); can be repeated."""

    def __init__(self, pixels: Tensor, labels: Tensor, batch_size: int = 500, share: slice = slice(None)):
        self.pixels, self.labels, self.batch_size = pixels[share], labels[share], batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.pixels[rows], self.labels[rows]


def evenly(total: int, count: int) -> slice:
    """About `count` of `total` images, spread evenly; 0 for all."""
    return slice(None, None, max(1, total // count) if count else 1)


class FolderEvaluation:
    """As `MemoryEvaluation`, read from disk each time."""

    def __init__(self, images: Images, cfg: dict, workers: int, batch_size: int = 50, share: slice = slice(None)):
        images.transform = eval_transform(cfg, as_bytes=True)
        self.images = Subset(images, range(len(images))[share])
        self.workers, self.batch_size = workers, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in read_batches(open_loader(self.images, self.batch_size, num_workers=self.workers)):
            yield pixels.permute(0, 3, 1, 2), labels
