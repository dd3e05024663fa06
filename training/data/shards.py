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

from training.data.errors import DataError
from training.data.folders import is_image

MOST_CLASSES = 1_000_000


class _Sample(NamedTuple):
    shard: Path
    name: str
    offset: int
    size: int
    label: int


def find_shards(data: str, split: str) -> list[Path]:
    """The shards of a split, sorted; none if this is no folder of shards."""
    found = sorted(Path(data).glob(f"{split}-*.tar")) or sorted(Path(data).glob(f"{split}/*.tar"))
    return [shard for shard in found if not shard.name.startswith(".")]


class ShardReader:
    """What `training.data.images.Images` needs of a reader of timm's.

    Raises:
        DataError: a shard is damaged, a sample lacks its image or its label, or two images share a name.
    """

    def __init__(self, shards: list[Path]):
        self.samples = [sample for shard in shards for sample in _index(shard)]
        last = max(self.samples, key=lambda sample: sample.label)
        if (highest := last.label) >= MOST_CLASSES:
            raise DataError(f"{last.shard}: {last.name} has the label {highest}; labels count the classes from 0.")
        self.class_to_idx = {f"{label:04d}": label for label in range(highest + 1)}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        sample = self.samples[index]
        with open(sample.shard, "rb") as stream:
            stream.seek(sample.offset)
            return io.BytesIO(stream.read(sample.size)), sample.label

    def names(self) -> list[str]:
        """What every image is called."""
        return [f"{sample.shard.name}:{sample.name}" for sample in self.samples]

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
                if not (member.isfile() and stem):
                    continue
                if is_image(f".{suffix}"):
                    if name in images:
                        raise DataError(f"{shard}: {images[name][0]} and {member.name} are two images of one name.")
                    images[name] = (member.name, member.offset_data, member.size)
                elif suffix == "cls":
                    labels[name] = int(archive.extractfile(member).read())
                elif suffix == "json":
                    labels.setdefault(name, _label(json.load(archive.extractfile(member))))
    except DataError:
        raise
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{shard} is not a readable shard ({error}).") from None
    for name, (file, *_) in images.items():
        if type(labels.get(name)) is not int or labels[name] < 0:
            raise DataError(f"{shard}: {file} has no label; expected a .cls or .json file of the same name.")
    if alone := [name.removeprefix("/") for name, label in labels.items() if label is not None and name not in images]:
        raise DataError(f"{shard}: {alone[0]} has a label, but no image.")
    if not images:
        raise DataError(f"{shard} holds no images.")
    return [_Sample(shard, *image, labels[name]) for name, image in images.items()]


def _label(description):
    """The label in a sample's JSON file; None if it has none."""
    return description.get("label") if isinstance(description, dict) else None
