"""Images of which no label is asked."""

import hashlib
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from training.data.errors import DataError
from training.data.folders import find_images
from training.data.seeding import seed_everything
from vca.images import upright_rgb


class UnlabeledImages(Dataset):
    """All images below a folder, sorted by path. An item is a tuple of one image."""

    class_folders = ()

    def __init__(self, folder: Path, transform=None):
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}.")
        self.folder, self.transform = folder, transform
        self.files = sorted(folder / name for name in find_images(folder)[0])
        if not self.files:
            raise DataError(f"{folder} holds no images.")

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when an image is renamed."""
        names = [str(file.relative_to(self.folder)) for file in self.files]
        return hashlib.sha256(repr(names).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int, int, int]) -> tuple[Tensor]:
        if isinstance(key, tuple):
            seed_everything(*key)
            key = key[-1]
        try:
            with Image.open(self.files[key]) as image:
                return (self.transform(upright_rgb(image)),)
        except Exception as error:
            raise DataError(f"{self.files[key]} is not a readable image ({error}).") from None
