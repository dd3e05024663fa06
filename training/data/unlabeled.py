"""Images of which no label is asked."""

from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from training.data.images import DataError
from training.data.seeding import seed_everything
from vca.images import upright_rgb

SUFFIXES = frozenset(Image.registered_extensions())


class UnlabeledImages(Dataset):
    """All images below a folder, sorted by path. An item is a tuple of one image."""

    def __init__(self, folder: Path, transform):
        files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
        self.files, self.transform = sorted(files), transform
        if not self.files:
            raise DataError(f"{folder} holds no images.")

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
