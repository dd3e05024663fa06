"""Recorded maps as the page draws them: arrays of each layer, kept under a token."""

import base64
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image

import vca
from app.runtime import drawing
from app.runtime.store import Store

STORE_BYTES = 512 * 2**20
NO_GRID = "The attention of this model cannot be drawn: it works on no grid of patches."


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
    """A recorded layer as the explorer draws it, for one image of the batch."""
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
    """All recorded layers that have a grid. The two branches of cross-shaped attention get the label of one block."""
    owners = [layer.name.partition(".branches.")[0] for layer in maps]
    numbers = {owner: number + 1 for number, owner in enumerate(dict.fromkeys(owners))}
    return [
        pack(layer, sample, f"{numbers[owner]}{_direction(layer) if owners.count(owner) > 1 else ''}")
        for layer, owner in zip(maps, owners, strict=True)
        if layer.grid_size is not None
    ]


def _direction(layer: vca.LayerMaps) -> str:
    return "↕" if layer.window_size[0] == layer.grid_size[0] else "↔"


class MapStore(Store[list[Layer]]):
    """The maps of the newest runs."""

    def __init__(self, limit: int = STORE_BYTES):
        super().__init__(limit, _size, "The maps of this model are too large to explore here.")


def _size(layers: list[Layer]) -> int:
    return sum(array.nbytes for layer in layers for array in layer.arrays.values())


def run_of(store: MapStore, maps, picture: Image.Image, caption, prefix_names: list[str], sample: int = 0) -> dict:
    """Keeps recorded maps and describes them to the page, as JSON values.

    Args:
        store: where the maps are kept.
        maps: what `vca.record` gave. Layers without a grid are left out.
        picture: the image to draw below the maps. It has the aspect of the patch grid.
        caption: a term and its description, such as ("Sample", "airplane, step 12 of 50").
        prefix_names: a name for each prefix token of the model.
        sample: index of the image in the recorded batch.

    Returns:
        Facts of all blocks and a token to fetch their maps with, or the problem in words.

    Raises:
        gr.Error: the maps are larger than the store.
    """
    layers = pack_all(maps, sample)
    if not layers:
        return dict(problem=NO_GRID)
    return dict(
        token=store.put(layers),
        image=drawing.data_url(picture, "JPEG"),
        caption=caption,
        prefixNames=prefix_names,
        blocks=[layer.facts() for layer in layers],
    )


def pair_of(sides: list[dict], film: dict) -> str:
    """The answer of the Compare tab, as JSON: two runs, or the problem of one in words.

    Args:
        sides: what `run_of` returns of each model, and its `name`.
        film: of generators, the steps and pictures that can be looked into.
    """
    problem = next((f"{side['name']}: {side['problem']}" for side in sides if "problem" in side), None)
    return json.dumps(dict(problem=problem) if problem else dict(sides=sides, film=film))


def fetched(store: MapStore, request: dict) -> dict:
    """The arrays of one block, for a request of the page with `token` and `block`: see `arrays_of`."""
    return arrays_of(store.get(request["token"])[request["block"]])


def arrays_of(layer: Layer) -> dict:
    """The arrays of a layer as JSON values: name -> shape, type and base64 bytes."""
    return {
        name: dict(shape=array.shape, type=array.dtype.name, data=base64.b64encode(array.tobytes()).decode())
        for name, array in layer.arrays.items()
    }
