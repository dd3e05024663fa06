"""Recorded maps as the page draws them: arrays of each layer."""

import base64
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor, nn

from vca import drawing
from vca.layers.layer_maps import LayerMaps, StageMaps

TOKEN_PARAMETERS = {"class": "cls_token", "distillation": "dist_token"}


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


def pack(maps: LayerMaps, sample: int = 0, label: str = "") -> Layer:
    """A recorded layer that has a grid, as the explorer draws it, for one image of the batch."""
    assert maps.grid_size is not None
    tensors: dict[str, Tensor | None] = {}
    for number, stage, scale in ((1, maps.stage1, maps.row_scale1), (2, maps.stage2, maps.row_scale2)):
        tensors[f"positive{number}"] = stage and stage.positive
        tensors[f"negative{number}"] = stage and stage.negative
        tensors[f"scale{number}"] = None if scale is None else scale[..., 0]
    arrays = {
        name: tensor[sample].float().cpu().numpy().astype(np.float32 if name.startswith("scale") else np.float16)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    if (patches := maps.window_patches) is not None:
        windows, heads, slots, _ = arrays["positive1"].shape
        arrays["positive1"] = arrays["positive1"].swapaxes(0, 1).reshape(heads, windows * slots, slots)
        arrays["patches"] = patches.flatten().numpy().astype(np.int32)
    return Layer(
        kind=maps.kind,
        block=maps.block,
        heads=arrays["positive1"].shape[0],
        grid=maps.grid_size,
        tokens=maps.token_grid,
        prefix=maps.num_prefix_tokens,
        lambda1=None if maps.lambda1 is None else float(maps.lambda1),
        lambda2=None if maps.lambda2 is None else float(maps.lambda2),
        streams=(_streams(maps.stage1), _streams(maps.stage2)),
        arrays=arrays,
        label=label or str(maps.block + 1),
        keys=maps.key_grid,
        window=maps.window_size,
    )


def _streams(stage: StageMaps | None) -> int:
    return 0 if stage is None else 1 if stage.negative is None else 2


def pack_all(maps: list[LayerMaps], sample: int = 0) -> list[Layer]:
    """All recorded layers that have a grid. The two branches of cross-shaped attention get the label of one block."""
    owners = [layer.name.partition(".branches.")[0] for layer in maps]
    numbers = {owner: number + 1 for number, owner in enumerate(dict.fromkeys(owners))}
    return [
        pack(layer, sample, f"{numbers[owner]}{_direction(layer) if owners.count(owner) > 1 else ''}")
        for layer, owner in zip(maps, owners, strict=True)
        if layer.grid_size is not None
    ]


def _direction(layer: LayerMaps) -> str:
    upright = layer.window_size and layer.grid_size and layer.window_size[0] == layer.grid_size[0]
    return "↕" if upright else "↔"


def run_facts(layers: list[Layer], picture: Image.Image, caption: tuple[str, str], prefix_names: list[str]) -> dict:
    """A run as the page takes it, JSON values, but for the arrays, which it fetches block by block.

    Args:
        layers: the recorded layers.
        picture: the image to draw below the maps. It has the aspect of the patch grid.
        caption: a term and its description, such as ("Sample", "airplane, step 12 of 50").
        prefix_names: a name for each prefix token of the model.
    """
    return dict(
        image=drawing.data_url(picture, "JPEG"),
        caption=caption,
        prefixNames=prefix_names,
        blocks=[layer.facts() for layer in layers],
    )


def prefix_names(model: nn.Module) -> list[str]:
    """What each prefix token is: the class token first, then the distillation token, then the registers."""
    names = [name for name in ("class", "distillation") if getattr(model, TOKEN_PARAMETERS[name], None) is not None]
    return names + [f"register {i + 1}" for i in range(getattr(model, "num_prefix_tokens", 0) - len(names))]


def arrays_of(layer: Layer) -> dict:
    """The arrays of a layer as JSON values: name -> shape, type and base64 bytes."""
    return {
        name: dict(shape=array.shape, type=array.dtype.name, data=base64.b64encode(array.tobytes()).decode())
        for name, array in layer.arrays.items()
    }
