"""Files that the explorer saves: the numbers of a view as .npz, and all maps of a run as a web page for offline use."""

import io
import json
from collections.abc import Iterable

import numpy as np

from app.runtime.validation import refused
from vca.explorer import page as offline
from vca.explorer.packing import Layer

MODES = ("effective", "stage1", "stage2")
STREAMS = ("positive", "negative", "differential")


def rows(layer: Layer, mode: str, head: int, query: int, lam: float | None = None) -> dict[str, np.ndarray]:
    """The rows of one query as the page draws them, float32 (keys,); NaN for the patches outside its window.

    Args:
        layer: one layer of a run.
        mode: "effective", "stage1" or "stage2".
        head: its index, or -1 for the mean of all heads.
        query: index among the prefix tokens and patches; of Stage I among the contrast tokens, where there are any.
        lam: another lambda for the differential row of a stage than the layer's own.

    Returns:
        positive, negative and differential; only positive if the map has no negative part.

    Raises:
        LookupError: the layer has no such map, head or query.
    """
    if mode not in MODES or not -1 <= head < layer.heads or query < 0:
        raise LookupError("there is no such map.")
    heads = range(layer.heads) if head < 0 else [head]
    if mode == "effective":
        row = np.mean([_effective(layer, h, query) for h in heads], axis=0, dtype=np.float32)
        if max(layer.streams) < 2:
            return dict(positive=row)
        return dict(positive=np.maximum(row, 0), negative=np.maximum(-row, 0), differential=row)
    number = int(mode[-1])
    named = dict(positive=_array(layer, f"positive{number}"), negative=_array(layer, f"negative{number}"))
    streams = {
        name: np.mean([array[h, query] for h in heads], axis=0, dtype=np.float32)
        for name, array in named.items()
        if array is not None
    }
    if "positive" not in streams:
        raise LookupError("this attention has one stage.")
    if "negative" in streams:
        own = getattr(layer, f"lambda{number}")
        streams["differential"] = streams["positive"] - np.float32(own if lam is None else lam) * streams["negative"]
    return streams


def _array(layer: Layer, name: str) -> np.ndarray | None:
    array = layer.arrays.get(name)
    return None if array is None else array.astype(np.float32)


def _differential(layer: Layer, number: int, head: int) -> np.ndarray:
    """diag(r) D of one head and stage, in full."""
    positive, negative, scale = (layer.arrays.get(f"{name}{number}") for name in ("positive", "negative", "scale"))
    applied = positive[head].astype(np.float32)
    if negative is not None:
        applied -= np.float32(getattr(layer, f"lambda{number}")) * negative[head]
    return applied if scale is None else scale[head][:, None] * applied


def _effective(layer: Layer, head: int, query: int) -> np.ndarray:
    if "patches" in layer.arrays:
        patches = layer.arrays["patches"]
        slot = int(np.flatnonzero(patches == query)[0])
        row = layer.arrays["positive1"][head, slot].astype(np.float32)
        keys = patches[slot // row.size * row.size :][: row.size]
        spread = np.full(layer.grid[0] * layer.grid[1], np.nan, np.float32)
        spread[keys[keys >= 0]] = row[keys >= 0]
        return spread
    first = _differential(layer, 1, head)
    if not layer.streams[1]:
        return first[query]
    return _differential(layer, 2, head)[query] @ first


def numbers(layer: Layer, mode: str, head: int, query: int, lam: float | None, view: dict) -> bytes:
    """An .npz file: the rows on show, all maps of the block as `block_*` (see `packing.Layer`), and JSON `settings`."""
    settings = dict(
        layer.facts(),
        map=mode,
        head="mean" if head < 0 else head,
        query=query,
        what_if_lambda=lam,
        view=view,
        rows="a value for each key: the prefix tokens, then the cells, row by row",
    )
    content = io.BytesIO()
    block = {f"block_{name}": array for name, array in layer.arrays.items()}
    np.savez_compressed(content, **rows(layer, mode, head, query, lam), **block, settings=json.dumps(settings))
    return content.getvalue()


def page(run: dict, maps: Iterable[dict], view: dict) -> str:
    """`vca.explorer.page.page`; that it would be too large is answered to the visitor."""
    try:
        return offline.page(run, maps, view)
    except offline.TooLarge as error:
        raise refused(str(error)) from None
