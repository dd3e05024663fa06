"""Recorded maps that the page may fetch: arrays of each layer, kept under a token."""

import json

from PIL import Image
from torch import Tensor

from app.runtime.store import Store
from vca.explorer.packing import Layer, arrays_of, pack_all, run_facts

STORE_BYTES = 512 * 2**20
NO_GRID = "The attention of this model cannot be drawn: it works on no grid of patches."


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
        picture, caption, prefix_names: as in `run_facts`.
        sample: index of the image in the recorded batch.

    Returns:
        Facts of all blocks and a token to fetch their maps with, or the problem in words.

    Raises:
        gr.Error: the maps are larger than the store.
    """
    layers = pack_all(maps, sample)
    if not layers:
        return dict(problem=NO_GRID)
    return dict(token=store.put(layers)) | run_facts(layers, picture, caption, prefix_names)


def fixed_of(store: MapStore, values: Tensor, picture: Image.Image, says: str) -> dict:
    """Keeps a map that no query changes, as the one block and the one head of a run.

    Args:
        store: where the map is kept.
        values: (rows, columns), none negative.
        picture: as in `run_facts`.
        says: what the page calls it.

    Returns:
        What `run_of` returns, with `fixed`: what `says` says.
    """
    layer = Layer(
        kind="fixed",
        block=0,
        heads=1,
        grid=tuple(values.shape),
        tokens=None,
        prefix=0,
        lambda1=None,
        lambda2=None,
        streams=(1, 0),
        arrays=dict(positive1=values.float().reshape(1, 1, -1).numpy()),
    )
    return dict(token=store.put([layer]), fixed=says) | run_facts([layer], picture, ("", ""), [])


def pair_of(sides: list[dict], film: dict, **more) -> str:
    """The answer of the Compare tab, as JSON: two runs, or the problem of one in words.

    Args:
        sides: what `run_of` returns of each model, and its `name`.
        film: of generators, the steps and pictures that can be looked into.
        more: what else the page needs.
    """
    problem = next((f"{side['name']}: {side['problem']}" for side in sides if "problem" in side), None)
    return json.dumps(dict(problem=problem) if problem else dict(sides=sides, film=film, **more))


def fetched(store: MapStore, request: dict) -> dict:
    """The arrays of one block, for a request of the page with `token` and `block`: see `arrays_of`."""
    return arrays_of(store.get(request["token"])[request["block"]])
