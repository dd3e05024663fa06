"""What a classifier makes of an image: probabilities, the maps of its layers, the names of its tokens."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from weakref import ref

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

import vca
from app.runtime.images import read_image
from app.runtime.limits import heavy_work
from app.runtime.loading import is_cnn
from app.runtime.store import Store
from vca import preprocessing
from vca.explorer.packing import prefix_names

RECORDED_BYTES = 256 * 2**20
NO_MAPS = "The attention of this model cannot be drawn: none of it spans the whole image."


@dataclass(frozen=True)
class Recorded:
    """A photo as a classifier saw it.

    Attributes:
        image: the photo, upright RGB.
        x: the model's input (1, 3, H, W).
        probabilities: of each class, (classes,).
        energy: log of the sum of the exponentials of all logits.
        maps: of all attention layers, in order.
    """

    image: Image.Image
    x: Tensor
    probabilities: np.ndarray
    energy: float
    maps: list[vca.LayerMaps]

    @property
    def size(self) -> int:
        """Bytes held."""
        held = 3 * self.image.width * self.image.height + self.x.nbytes
        return held + sum(tensor.nbytes for layer in self.maps for tensor in _tensors(layer))


class Recordings:
    """The newest recordings. A photo is decoded and recorded once for each model, whatever is then asked of it."""

    def __init__(self, limit: int = RECORDED_BYTES):
        self._store: Store[Recorded] = Store(limit, lambda recorded: recorded.size)

    def get(self, model: nn.Module, path: Path) -> Recorded:
        """The recording of the photo in a file.

        Args:
            model: a classifier; it is not kept alive by its recordings.
            path: an uploaded file. Its content never changes, because gradio names it by its content.

        Raises:
            ImageError: as `read_image`.
        """

        def make() -> Recorded:
            image = read_image(path)
            x = preprocessing.preprocess(model, image)
            logits, maps = record_logits(model, x)
            return Recorded(image, x, logits.softmax(0).numpy(), float(logits.logsumexp(0)), maps)

        with heavy_work():
            return self._store.get_or_make((ref(model), path), make)


def _tensors(layer: vca.LayerMaps) -> Iterator[Tensor]:
    for stage in (layer.stage1, layer.stage2):
        yield from (value for value in vars(stage).values() if isinstance(value, Tensor)) if stage else ()
    yield from (value for value in vars(layer).values() if isinstance(value, Tensor))


@torch.inference_mode()
def classify(model: nn.Module, x: Tensor) -> np.ndarray:
    """The probabilities (classes,) of one input (1, 3, H, W)."""
    return model(x)[0].softmax(0).numpy()


def record(model: nn.Module, x: Tensor) -> tuple[np.ndarray, list[vca.LayerMaps]]:
    """As `classify`, and the maps of all attention layers."""
    logits, maps = record_logits(model, x)
    return logits.softmax(0).numpy(), maps


@torch.inference_mode()
def record_logits(model: nn.Module, x: Tensor) -> tuple[Tensor, list[vca.LayerMaps]]:
    """The logits (classes,) of one input, and the maps of all attention layers; of a CNN none."""
    with nullcontext([]) if is_cnn(model) else vca.record(model) as maps:
        logits = model(x)[0]
    return logits, maps


def whole_grid(maps: list[vca.LayerMaps]) -> list[vca.LayerMaps]:
    """The maps that join every two places of one grid, without those of windows, stripes and reduced keys."""
    return [layer for layer in maps if layer.window_size is None and layer.key_grid is None]


def top_labels(model: nn.Module, probabilities: np.ndarray, count: int) -> dict[str, float]:
    """The `count` likeliest labels and their probabilities, likeliest first."""
    return {model.label_names[i]: float(probabilities[i]) for i in np.argsort(-probabilities)[:count]}


def describe(name: str, model: nn.Module) -> dict:
    """A model's facts as JSON values: architecture, classes, input size, and heads and grids of blocks with maps."""
    config = timm.data.resolve_data_config(model=model)
    with heavy_work():
        _, maps = record(model, torch.zeros(1, *config["input_size"]))
    blocks = [
        dict(
            block=layer.block,
            kind=layer.kind,
            heads=layer.stage1.positive.shape[1],
            grid_size=layer.grid_size,
            token_grid=layer.token_grid,
        )
        for layer in whole_grid(maps)
    ]
    return dict(
        name=name,
        architecture=model.pretrained_cfg["architecture"],
        classes=model.label_names,
        input_size=list(config["input_size"]),
        prefix_tokens=prefix_names(model),
        blocks=blocks,
    )
