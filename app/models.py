"""The models that the app serves, and what they make of an image."""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from threading import Lock

import gradio as gr
import numpy as np
import timm.data
import torch
from PIL import Image
from torch import nn

import vca
from app import opening
from vca.checkpoint import read_config
from vca.hub import fetch
from vca.models import CLASSIFIERS, GENERATORS
from vca.models.dit import DiffusionTransformer

CROP_SIDE = 640
CACHE_BYTES = 4 * 2**30
TOKEN_PARAMETERS = {"class": "cls_token", "distillation": "dist_token"}
NO_MAPS = "The attention of this model cannot be drawn: none of it spans the whole image."


class ModelCache:
    """The models used last, at most `limit` bytes of parameters in all; each is opened once, however many ask."""

    def __init__(self, limit: int):
        self.limit = limit
        self._models: OrderedDict[str, nn.Module] = OrderedDict()
        self._opening = Lock()
        self._lock = Lock()

    def get(self, key: str, open_model: Callable[[], nn.Module]) -> nn.Module:
        """The model under `key`; opened if it is not there."""
        if (model := self._find(key)) is None:
            with self._opening:
                if (model := self._find(key)) is None:
                    self.put(key, model := open_model())
        return model

    def put(self, key: str, model: nn.Module) -> None:
        """Keeps a model, and forgets the longest unused others as needed."""
        with self._lock:
            self._models[key] = model
            while self.size() > self.limit and len(self._models) > 1:
                self._models.popitem(last=False)

    def _find(self, key: str) -> nn.Module | None:
        with self._lock:
            if key in self._models:
                self._models.move_to_end(key)
            return self._models.get(key)

    def size(self) -> int:
        """Bytes held."""
        return sum(p.numel() * p.element_size() for model in self._models.values() for p in model.parameters())


class Checkpoints:
    """The models in `folder`, those of Hub repositories, and whatever else a visitor asks for.

    Each is loaded when it is first asked for.

    Args:
        repositories: Hub ids; downloaded now, unless the cache has them.
        limit: bytes of models that are kept loaded.

    Attributes:
        classifiers, generators: their names, those with VCA first, then by number of classes; the first is the default.
        configs: the `config.json` of each.
        problems: what is wrong with each checkpoint that cannot be used.
    """

    def __init__(self, folder: Path, repositories: Sequence[str] = (), limit: int = CACHE_BYTES):
        self.folders = {file.parent.name: file.parent for file in folder.glob("*/config.json")}
        self.configs: dict[str, dict] = {}
        self.problems: list[str] = []
        for repository in repositories:
            try:
                self.folders[repository] = fetch(f"hf-hub:{repository}")
            except vca.CheckpointError as error:
                self.problems.append(str(error))
        for name, place in self.folders.items():
            try:
                self.configs[name] = read_config(place)
            except vca.CheckpointError as error:
                self.problems.append(str(error))
        self.classifiers = self._names_of(CLASSIFIERS)
        self.generators = self._names_of(GENERATORS)
        self._models = ModelCache(limit)

    def _names_of(self, architectures: Container[str]) -> list[str]:
        names = [name for name, config in self.configs.items() if config["architecture"] in architectures]

        def rank(name: str) -> tuple:
            return not name.split("/")[-1].startswith("vca"), -self.configs[name]["num_classes"], name

        return sorted(names, key=rank)

    def load(self, name: str) -> nn.Module:
        """A classifier in evaluation mode: by its name here, by a folder or Hub id, or by what `keep` returned.

        Raises:
            gr.Error: there is none, or it is damaged; the message says which there are, or what is wrong.
        """
        if name in self.classifiers:
            folder = self.folders[name]
            return self._get(name, lambda: opening.open_folder(folder, str(folder)))
        if not isinstance(name, str) or "/" not in name:
            known = ", ".join(self.classifiers) or "none yet"
            raise gr.Error(f"model must be one of: {known}; or a Hub id such as user/name.", print_exception=False)
        return self._get(name, lambda: opening.open_model(name))

    def load_generator(self, name: str) -> DiffusionTransformer:
        """The generator of a checkpoint, in evaluation mode.

        Raises:
            gr.Error: as `load`.
        """
        if name not in self.generators:
            known = ", ".join(self.generators) or "none yet"
            raise gr.Error(f"model must be one of: {known}.", print_exception=False)
        return self._get(name, lambda: vca.load(self.folders[name]))

    def keep(self, model: nn.Module) -> str:
        """Keeps a visitor's own model for a while; `load` finds it by what this returns, which nobody can guess."""
        name = opening.UPLOADED + secrets.token_urlsafe(24)
        self._models.put(name, model)
        return name

    def _get(self, name: str, open_model: Callable[[], nn.Module]) -> nn.Module:
        try:
            return self._models.get(name, open_model)
        except vca.CheckpointError as error:
            raise gr.Error(str(error), print_exception=False) from error


def preprocess(model: nn.Module, image: Image.Image) -> torch.Tensor:
    """The model's input (1, 3, H, W): resized, centre-cropped and normalised as its checkpoint says."""
    config = timm.data.resolve_data_config(model=model)
    width, height = image.size
    limit = 4 * min(width, height)  # what the centre crop drops of a panorama need not be resized first
    if config["crop_mode"] == "center":
        left, top = max(0, width - limit) // 2, max(0, height - limit) // 2
        image = image.crop((left, top, width - left, height - top))
    return timm.data.create_transform(**config)(image)[None]


def centre_crop(model: nn.Module, image: Image.Image) -> Image.Image:
    """The part of `image` that reaches the model, in the image's own resolution, at most 640 px a side."""
    left, top, right, bottom = crop_box(model, image)
    rows, cols = timm.data.resolve_data_config(model=model)["input_size"][1:]
    scale = max((right - left) / cols, (bottom - top) / rows)
    shrink = min(1, CROP_SIDE / (max(rows, cols) * scale))
    size = (max(1, round(cols * scale * shrink)), max(1, round(rows * scale * shrink)))
    if left < -1 or top < -1:  # padded
        return image.crop(tuple(map(round, (left, top, right, bottom)))).resize(size, Image.Resampling.BICUBIC)
    box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    return image.resize(size, Image.Resampling.BICUBIC, box)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes."""
    return tuple(timm.data.resolve_data_config(model=model)["input_size"])


def crop_box(model: nn.Module, image: Image.Image) -> tuple[float, float, float, float]:
    """The part of `image` that reaches the model, in its pixels: left, top, right, bottom; outside it where padded."""
    config = timm.data.resolve_data_config(model=model)
    rows, cols = config["input_size"][1:]
    across, down = image.width / floor(cols / config["crop_pct"]), image.height / floor(rows / config["crop_pct"])
    if config["crop_mode"] != "squash":
        across = down = max(across, down) if config["crop_mode"] == "border" else min(across, down)
    left, top = (image.width - cols * across) / 2, (image.height - rows * down) / 2
    return left, top, left + cols * across, top + rows * down


def input_picture(model: nn.Module, x: torch.Tensor) -> Image.Image:
    """The model's input (1, 3, H, W) as the picture it is: H x W pixels, normalisation undone."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = ((x[0] * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@torch.inference_mode()
def record(model: nn.Module, x: torch.Tensor) -> tuple[np.ndarray, list[vca.LayerMaps]]:
    """Classifies one input (1, 3, H, W): its probabilities (classes,), and the maps of all its attention layers."""
    with vca.record(model) as maps:
        logits = model(x)
    return logits[0].softmax(0).numpy(), maps


def run(model: nn.Module, x: torch.Tensor) -> tuple[np.ndarray, list[vca.LayerMaps]]:
    """As `record`, without the layers whose maps do not join every two places of one grid.

    Left out are windows, stripes and reduced keys.
    """
    probabilities, maps = record(model, x)
    return probabilities, [m for m in maps if m.window_size is None and m.key_grid is None]


def top_labels(model: nn.Module, probabilities: np.ndarray, count: int) -> dict[str, float]:
    """The `count` likeliest labels and their probabilities, likeliest first."""
    return {model.label_names[i]: float(probabilities[i]) for i in np.argsort(-probabilities)[:count]}


@dataclass(frozen=True)
class Layer:
    """The attention of one layer for one image, as the explorer draws it: H heads, T = P + N tokens, n contrast tokens.

    `arrays` holds the float16 maps `positive1`, `negative1` (H, n, T), `positive2`, `negative2` (H, T, n) and the
    float32 row factors `scale1` (H, n), `scale2` (H, T), as far as this kind of attention has them. Attention of a
    single stage has one query for each token, and no `tokens`: maps (H, T, T); (H, N, h * w) where the `keys` are the
    cells of a coarser grid (h, w); and (H, windows * M, M) where there are windows of M slots, whose patches the int32
    `patches` (windows * M) names, -1 for padding. `streams` is the number of streams in each stage: 0, 1 or 2.

    `block` is the index of the layer in the model, `label` the number of its block, counted from 1.
    """

    kind: str
    block: int
    heads: int
    grid: tuple[int, int]
    tokens: tuple[int, int] | None
    prefix: int
    lambda1: float | None
    lambda2: float | None
    streams: tuple[int, int]
    arrays: dict[str, np.ndarray]
    label: str = ""
    keys: tuple[int, int] | None = None
    window: tuple[int, int] | None = None

    def facts(self) -> dict:
        """All but the arrays, as JSON values."""
        return {key: value for key, value in vars(self).items() if key != "arrays"}


def pack(maps: vca.LayerMaps, sample: int = 0, label: str = "") -> Layer:
    """What the explorer needs of a recorded layer, for one image of the batch."""
    stages = (maps.stage1, maps.stage2)
    tensors = {}
    for number, stage, scale in ((1, maps.stage1, maps.row_scale1), (2, maps.stage2, maps.row_scale2)):
        tensors[f"positive{number}"] = stage and stage.positive
        tensors[f"negative{number}"] = stage and stage.negative
        tensors[f"scale{number}"] = None if scale is None else scale[..., 0]
    arrays = {
        name: tensor[sample].float().cpu().numpy().astype(np.float32 if name.startswith("scale") else np.float16)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    if maps.window_size is not None:
        windows, heads, slots, _ = arrays["positive1"].shape
        arrays["positive1"] = arrays["positive1"].swapaxes(0, 1).reshape(heads, windows * slots, slots)
        arrays["patches"] = maps.window_patches.flatten().numpy().astype(np.int32)
    return Layer(
        kind=maps.kind,
        block=maps.block,
        heads=arrays["positive1"].shape[0],
        grid=maps.grid_size,
        tokens=maps.token_grid,
        prefix=maps.num_prefix_tokens,
        lambda1=None if maps.lambda1 is None else float(maps.lambda1),
        lambda2=None if maps.lambda2 is None else float(maps.lambda2),
        streams=tuple(0 if stage is None else 1 if stage.negative is None else 2 for stage in stages),
        arrays=arrays,
        label=label or str(maps.block + 1),
        keys=maps.key_grid,
        window=maps.window_size,
    )


def pack_all(maps: list[vca.LayerMaps], sample: int = 0) -> list[Layer]:
    """All recorded layers for one image of the batch; the two branches of cross-shaped attention share a block."""
    owners = [layer.name.partition(".branches.")[0] for layer in maps]
    numbers = {owner: number + 1 for number, owner in enumerate(dict.fromkeys(owners))}
    return [
        pack(layer, sample, f"{numbers[owner]}{_direction(layer) if owners.count(owner) > 1 else ''}")
        for layer, owner in zip(maps, owners, strict=True)
        if layer.grid_size is not None
    ]


def _direction(layer: vca.LayerMaps) -> str:
    return "↕" if layer.window_size[0] == layer.grid_size[0] else "↔"


def prefix_names(model: nn.Module) -> list[str]:
    """What each prefix token is: the class token first, then the distillation token, then the registers."""
    names = [name for name in ("class", "distillation") if getattr(model, TOKEN_PARAMETERS[name], None) is not None]
    return names + [f"register {i + 1}" for i in range(getattr(model, "num_prefix_tokens", 0) - len(names))]


def describe(name: str, model: nn.Module) -> dict:
    """A model's facts as JSON values: architecture, classes, input size, and heads and grids of blocks with maps."""
    config = timm.data.resolve_data_config(model=model)
    _, maps = run(model, torch.zeros(1, *config["input_size"]))
    blocks = [
        dict(
            block=layer.block,
            kind=layer.kind,
            heads=layer.stage1.positive.shape[1],
            grid_size=layer.grid_size,
            token_grid=layer.token_grid,
        )
        for layer in maps
    ]
    return dict(
        name=name,
        architecture=model.pretrained_cfg["architecture"],
        classes=model.label_names,
        input_size=list(config["input_size"]),
        prefix_tokens=prefix_names(model),
        blocks=blocks,
    )
