"""Images of several sources, each of which labels only some of the classes.

`sources.json` beside the splits of a folder holds, for each source, the classes that it labels: {SOURCE: [CLASS, ...]}.
The file of every training image is called SOURCE-... An image of a class that its source does not label is unlabeled.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.errors import DataError
from training.data.images import Images


class Sources(NamedTuple):
    """Which source every image is from, and what each source labels.

    Attributes:
        of_images: index of the source of every image (N,).
        labeled: whether a source labels a class (sources, classes).
    """

    of_images: Tensor
    labeled: Tensor

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with what the sources label."""
        return hashlib.sha256(repr(self.labeled.tolist()).encode()).hexdigest()[:16]


def read_sources(data: str, images: Images) -> Sources | None:
    """The sources of the training images of a folder; None if it has no `sources.json`.

    Raises:
        DataError: the file is damaged, names an unknown class, or an image is of none of its sources.
    """
    file = Path(data) / "sources.json"
    if not file.is_file():
        return None
    try:
        stored = {source: set(classes) for source, classes in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, TypeError):
        raise DataError(f"{file} must hold {{SOURCE: [CLASS, ...]}} in JSON.") from None
    if unknown := sorted(set().union(*stored.values()) - set(images.class_folders)):
        raise DataError(f"{file} names a class {unknown[0]!r} that has no folder in {data}/train.")
    names = [Path(name).name.partition("-")[0] for name in images.reader.names()]
    if (stray := next((place for place, name in enumerate(names) if name not in stored), None)) is not None:
        raise DataError(f"{images.reader.filename(stray, absolute=True)} is of none of the sources of {file}.")
    order = {source: index for index, source in enumerate(stored)}
    labeled = [[name in classes for name in images.class_folders] for classes in stored.values()]
    return Sources(torch.tensor([order[name] for name in names]), torch.tensor(labeled))
