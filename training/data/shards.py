"""Images in WebDataset shards, read at random: `train-*.tar` and `val-*.tar`, or `train/*.tar` and `val/*.tar`.

A sample is the files of a shard that share a name before the first dot: an image and its label, `NAME.cls` (a number)
or `NAME.json` with `label`. Shards are indexed once at the start (headers only); after that an image is a seek and a
read, so that order and augmentation are those of a folder with the same images (timm's own reader of shards streams
them in an order that depends on workers and processes). `classes.txt` in the folder names the classes.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")


class ShardError(ValueError):
    """Shards that cannot be used; the message names the shard and the sample."""


class _Sample(NamedTuple):
    shard: Path
    name: str
    offset: int
    size: int
    label: int


def find_shards(data: str, split: str) -> list[Path]:
    """The shards of a split, sorted; none if this is no folder of shards."""
    return sorted(Path(data).glob(f"{split}-*.tar")) or sorted(Path(data).glob(f"{split}/*.tar"))


class ShardReader:
    """What `training.data.images.Images` needs of a reader of timm's.

    Raises:
        ShardError: a shard is damaged, or a sample lacks its image or its label.
    """

    def __init__(self, shards: list[Path]):
        self.samples = [sample for shard in shards for sample in _index(shard)]
        highest = max(sample.label for sample in self.samples)
        self.class_to_idx = {f"{label:04d}": label for label in range(highest + 1)}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        sample = self.samples[index]
        with open(sample.shard, "rb") as stream:
            stream.seek(sample.offset)
            return io.BytesIO(stream.read(sample.size)), sample.label

    def filename(self, index: int, **_) -> str:
        return f"{self.samples[index].shard}:{self.samples[index].name}"


def _index(shard: Path) -> list[_Sample]:
    images, labels = {}, {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                name = f"{folder}/{stem}"
                if suffix.lower() in IMAGE_SUFFIXES:
                    images[name] = (member.name, member.offset_data, member.size)
                elif suffix == "cls":
                    labels[name] = int(archive.extractfile(member).read())
                elif suffix == "json":
                    labels.setdefault(name, json.load(archive.extractfile(member)).get("label"))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ShardError(f"{shard} is not a readable shard ({error}).") from None
    for name, (file, *_) in images.items():
        if type(labels.get(name)) is not int or labels[name] < 0:
            raise ShardError(f"{shard}: {file} has no label; expected a .cls or .json file of the same name.")
    if not images:
        raise ShardError(f"{shard} holds no images.")
    return [_Sample(shard, *image, labels[name]) for name, image in images.items()]
