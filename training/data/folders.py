"""Folders of images: which files are images, which class each belongs to, and how one folder becomes train and val.

The class of an image is the first folder below the split, however deep the image lies in it. Labels are the places of
the classes in natural order (`2` before `10`, whatever the case), names that this takes for equal in the order of their
characters. Names that begin with a dot are left out everywhere.
"""

import hashlib
import os
import re
from pathlib import Path

from training.data.errors import DataError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
VAL_SHARE = 0.2


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A key to sort names by: numbers by their value, letters whatever their case, and what is then equal by name."""
    parts: list[str | int] = re.split("([0-9]+)", name.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def find_images(folder: str | Path) -> tuple[list[str], list[str]]:
    """The image files below a folder, and its other files, as paths relative to it, in natural order.

    Links to folders are followed, but each folder is entered once, and those that hold this one never.
    """
    seen = {_identity(parent) for path in (Path(folder).absolute(), Path(folder).resolve()) for parent in path.parents}
    images, others, waiting = [], [], [""]
    while waiting:
        inside = waiting.pop()
        path = os.path.join(folder, inside)
        if _identity(path) in seen:
            continue
        seen.add(_identity(path))
        with os.scandir(path) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
        for entry in reversed(visible):
            name = os.path.join(inside, entry.name)
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                waiting.append(name)
            elif is_image(entry.name) and (os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()):
                images.append(name)
            else:
                others.append(name)
    return sorted(images, key=natural_key), sorted(others, key=natural_key)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(SUFFIXES)


def class_folders(folder: str | Path) -> list[str]:
    """The visible folders in a folder, in the order of their labels."""
    try:
        found = [entry.name for entry in os.scandir(folder) if os.path.isdir(entry.path)]
    except OSError:
        return []
    return sorted((name for name in found if not name.startswith(".")), key=natural_key)


def is_unsplit(folder: str | Path) -> bool:
    """Whether a folder holds classes, and neither it nor one of them holds train, val and the like."""
    classes = class_folders(folder)
    inside = {name.lower() for name in classes}
    inside |= {name.lower() for one in classes for name in class_folders(Path(folder) / one)}
    return len(classes) > 1 and not inside & SPLIT_NAMES


class FolderReader:
    """The images of a folder of classes, as timm's readers give theirs: (stream, label).

    Args:
        root: the folder CLASS/IMAGE.
        part: "train" or "val" for that part of a folder that is not split: of every class the fifth whose names hash
            lowest is for validation, so that the parts depend on nothing but the names.

    Attributes:
        part: as given.
        class_to_idx: the label of every class.
        samples: (path relative to `root`, label) of every image.
        left_out: the files that are not images of a class.
        empty: the class folders without a file.

    Raises:
        DataError: there are no images, a class folder holds files but no image, or a class is too small to be split.
    """

    def __init__(self, root: str | Path, part: str = ""):
        self.root, self.part = Path(root), part
        found = {name: find_images(self.root / name) for name in class_folders(self.root)}
        loose = [entry.name for entry in os.scandir(self.root) if not entry.name.startswith(".")]
        loose = sorted((name for name in loose if name not in found), key=natural_key)
        self.left_out = loose + [f"{name}/{file}" for name, (_, others) in found.items() for file in others]
        self.empty = [name for name, files in found.items() if not any(files)]
        for name, (images, others) in found.items():
            if not name.isprintable():  # as bytes that are no UTF-8 are not
                raise DataError(f"{self.root}: {name!r} is no name for a class; rename the folder.")
            if others and not images:
                raise DataError(
                    f"{self.root / name} holds {counted(len(others), 'file')}, but no image; images end in "
                    f"{', '.join(SUFFIXES)}. Convert the files, or move the folder away."
                )
        classes = [name for name, (images, _) in found.items() if images]
        if not classes:
            why = "images, but no folders of classes" if any(map(is_image, loose)) else "no images"
            raise DataError(f"{self.root} holds {why}; expected {self.root}/CLASS/IMAGE for each class.")
        self.class_to_idx = {name: label for label, name in enumerate(classes)}
        samples = []
        for name, label in self.class_to_idx.items():
            files = [f"{name}/{file}" for file in found[name][0]]
            if part:
                files = self._choose(files)
            samples += [(file, label) for file in files]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))

    def _choose(self, files: list[str]) -> list[str]:
        if len(files) < 2:
            raise DataError(f"{self.root}: {files[0]} is alone in its class; two images are needed to train and judge.")
        ranked = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file)).digest())
        held_out = set(ranked[: max(1, round(VAL_SHARE * len(files)))])
        return [file for file in files if (file in held_out) == (self.part == "val")]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        file, label = self.samples[index]
        return open(self.root / file, "rb"), label

    def names(self) -> list[str]:
        """What every image is called."""
        return [file for file, _ in self.samples]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        file = self.samples[index][0]
        return os.path.basename(file) if basename else str(self.root / file) if absolute else file


def counted(number: int, word: str) -> str:
    """ "1 file", "2 files", "2 classes"."""
    plural = "es" if word.endswith("s") else "s"
    return f"{number:,} {word}{'' if number == 1 else plural}"
