"""What was computed once of every image, plain and flipped, and stored: written in chunks, read by index."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from training.data.errors import DataError
from training.data.images import Images, eval_transform, generator_cfg
from training.data.loading import open_loader, read_batches
from vca.checkpoint import write_atomically

CHUNK = 1024


class Kind(NamedTuple):
    """One sort of stored arrays.

    Attributes:
        name: what they are, in the plural.
        file: the file of a split's array (N, 2, ...): of each image plain and flipped.
        command: the module that makes them.
        dtype, ndim: of the array.
    """

    name: str
    file: str
    command: str
    dtype: type
    ndim: int


class Stored:
    """The stored array of one split.

    Attributes:
        array: (N, 2, ...).
        index: what `index.json` says.
        labels: (N,).
        class_folders, class_names: as `training.data.images.Images` has them.

    Raises:
        DataError: the folder is missing, unfinished or damaged.
    """

    kind: Kind

    def __init__(self, root: str | Path, split: str):
        self.folder, kind = Path(root) / split, self.kind
        try:
            self.index = index = read_index(self.folder / "index.json", kind)
            self.array = open_array(self.folder, len(index["labels"]), kind)
        except OSError as error:
            how = f"make them with python -m {kind.command}"
            raise DataError(f"{self.folder}: no {kind.name}; {how} ({error}).") from None
        if len(index["checksums"]) < -(-len(self.array) // CHUNK):
            raise DataError(f"{self.folder} is unfinished; run python -m {kind.command} again.")
        self.checksums = index["checksums"]
        self.labels = torch.tensor(index["labels"])
        self.class_folders, self.class_names = index["class_folders"], index["class_names"]

    def __len__(self) -> int:
        return len(self.array)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the labels and the stored values."""
        content = (self.class_folders, self.labels.tolist(), self.checksums)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def names(self) -> list[str]:
        """The file of every image, below its split."""
        return [source[0] for source in read_sources(self.folder / "images.json")]

    def read(self, indices: Tensor, flipped: Tensor) -> Tensor:
        """What is stored (B, ...) of the images `indices`, flipped where `flipped` (B,) is true."""
        return torch.from_numpy(self.array[indices.cpu().numpy(), flipped.long().cpu().numpy()])


def read_index(file: Path, kind: Kind) -> dict:
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
    raise DataError(f"{file} is damaged; delete {file.parent} and run python -m {kind.command} again.")


def open_array(folder: Path, count: int, kind: Kind, mode: str = "r") -> np.memmap:
    """The stored array of `count` images.

    Raises:
        DataError: the file is damaged, or of another number of images.
    """
    file = folder / kind.file
    try:
        array = np.load(file, mmap_mode=mode)
    except (ValueError, EOFError) as error:
        raise DataError(f"{file} is damaged ({error}); delete {folder} and run python -m {kind.command}.") from None
    if array.ndim != kind.ndim or array.dtype != kind.dtype or len(array) != count:
        raise DataError(f"{file}: {array.dtype} {array.shape} are not the {kind.name} of {count} images.")
    return array


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
    return [list(source) for source in zip(images.file_names(), sizes, sums, strict=True)]


def read_sources(file: Path) -> list[list]:
    """The `images.json` of a split, as `sources` gave it.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return [list(source) for source in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        raise DataError(f"{file} is missing or damaged; delete {file.parent} to compute it anew.") from None


def store(
    kind: Kind, images: Images, folder: Path, compute: Callable[[Tensor], Tensor], about: dict, size: int,
    batch_size: int, workers: int, device: torch.device,
) -> None:  # fmt: skip
    """Computes and stores something of a split, a chunk at a time; finished chunks of an earlier call are kept.

    Args:
        kind: what.
        images: the split, N images.
        folder: gets the array (N, 2, ...); `index.json`; and `images.json`, the images' names with the size and
            checksum of their files.
        compute: images (B, 3, size, size) in [-1, 1] on `device` -> what is stored of them (B, ...).
        about: what it was computed by, for `index.json`: a later call must say the same.
        size: side of the images in pixels, after resizing and center crop.
        batch_size: images that are computed at once.
        workers: processes that read the images.
        device: where to compute.

    Raises:
        DataError: `folder` holds what was computed of other images or otherwise, a finished chunk is damaged, an image
            cannot be read, or there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = about | dict(
        image_size=size, class_folders=images.class_folders, class_names=images.class_names, labels=images.labels(),
        checksums=[],
    )  # fmt: skip
    file, sources_file, found = folder / "index.json", folder / "images.json", sources(images, workers)
    if file.exists():
        old = read_index(file, kind)
        if changed := [key for key in index if key != "checksums" and index[key] != old.get(key)]:
            raise DataError(f"{folder} holds {kind.name} with another {', '.join(changed)}; choose another --out.")
        _check_sources(sources_file, found, kind)
        index["checksums"] = old["checksums"]
    images.transform = eval_transform(generator_cfg(size))
    if index["checksums"]:
        array = open_array(folder, len(images), kind, "r+")
    else:
        shape = compute(torch.zeros(1, 3, size, size, device=device)).shape[1:]
        write_atomically(sources_file, json.dumps(found).encode())
        array = _reserve(folder, (len(images), 2, *shape), kind)
    for number, start in enumerate(tqdm(range(0, len(images), CHUNK), unit="chunk", desc=folder.name)):
        rows = range(start, min(start + CHUNK, len(images)))
        if number < len(index["checksums"]):
            if zlib.crc32(array[rows.start : rows.stop].tobytes()) != index["checksums"][number]:
                last = rows.stop - 1
                raise DataError(f"{folder / kind.file}: images {start} to {last} are damaged; delete {folder}.")
            continue
        done = start
        for x, _ in read_batches(open_loader(Subset(images, rows), batch_size, num_workers=workers)):
            both = torch.stack([compute(view.to(device)) for view in (x, x.flip(-1))], dim=1)
            array[done : done + len(x)] = both.float().cpu().numpy()
            done += len(x)
        array.flush()
        index["checksums"].append(zlib.crc32(array[rows.start : rows.stop].tobytes()))
        write_atomically(file, json.dumps(index).encode())


def _check_sources(file: Path, found: list[list], kind: Kind) -> None:
    """Refuses to go on with what was computed of images that have changed since."""
    if (known := read_sources(file)) != found:
        before = {tuple(source) for source in known}
        name = next((source[0] for source in found if tuple(source) not in before), found[0][0])
        raise DataError(
            f"{file.parent} holds the {kind.name} of other images: {name} has changed since; choose another --out, or "
            f"delete {file.parent} to compute them anew."
        )


def _reserve(folder: Path, shape: tuple[int, ...], kind: Kind) -> np.memmap:
    """A file with its room on the disk taken: writing to a map of more than the disk holds is a crash."""
    file = folder / kind.file
    array = np.lib.format.open_memmap(file, "w+", kind.dtype, shape)
    try:
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    except OSError as error:
        size = file.stat().st_size / 1e9
        file.unlink()
        raise DataError(f"{file}: there is no room for {size:.1f} GB of {kind.name} ({error.strerror}).") from None
    return array
