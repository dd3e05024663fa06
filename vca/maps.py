"""Recording attention maps: `with vca.record(model) as maps: model(x)`, then `maps[i].effective` and its parts."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from vca.layers.grid import GridBlock
from vca.layers.layer_maps import LayerMaps, StageMaps, WindowMaps
from vca.timm_internals import FORWARD_OF_ATTENTION, TIMM_MAPS


def attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of all layers of `model` whose maps can be recorded, in order. `model` may be one itself."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in TIMM_MAPS or hasattr(module, "forward_with_maps")
    ]


def _forward_with_maps(layer: nn.Module, *args, **kwargs) -> tuple[Tensor, LayerMaps]:
    if type(layer) in TIMM_MAPS:
        return TIMM_MAPS[type(layer)](layer, *args, **kwargs)
    return layer.forward_with_maps(*args, **kwargs)


class _Recording:
    """One `record` block: which layers it wants, where they stand, and what they gave in the newest forward pass.

    Args:
        layers: the layers, each with `block` and `name` of its `LayerMaps`.
        model: `grid_size` and `num_prefix_tokens` of the layers that do not know theirs.
        watched: all modules that this recording taps.
    """

    def __init__(self, layers: dict[nn.Module, dict], model: dict, watched: set[nn.Module]):
        self.layers = layers
        self.model = model
        self.watched = watched
        self.located: dict[nn.Module | None, dict] = {}
        self.maps: list[LayerMaps] = []

    def add(self, layer: nn.Module, maps: LayerMaps) -> None:
        new = replace(maps, **self.layers[layer])
        if maps.grid_size is None:  # a layer of timm, which does not know where it stands
            found = self.model | (self.located.get(layer) or self.located.get(None, {}))
            shift_size = found.pop("shift_size", (0, 0))
            new = replace(new, **found)
            if isinstance(new, WindowMaps):
                new = replace(new, shift_size=shift_size)
                if (patches := new.window_patches) is not None:
                    attention = new.stage1.positive[0].unflatten(0, (-1, len(patches)))  # (B, windows, H, M, M)
                    new = replace(new, stage1=StageMaps(attention))
        self.maps[:] = sorted([m for m in self.maps if m.block != new.block] + [new], key=lambda m: m.block)


def _record_layer(recordings: list[_Recording], layer: nn.Module, *args, **kwargs) -> Tensor:
    y, maps = _forward_with_maps(layer, *args, **kwargs)
    for recording in recordings:
        recording.add(layer, maps)
    return y


def _note_block(recordings: list[_Recording], block: nn.Module, x: Tensor) -> Tensor:
    """A block over a grid (B, Hg, Wg, C) knows where its attention stands."""
    for recording in recordings:
        recording.located[block.attn] = dict(
            grid_size=tuple(x.shape[1:3]), shift_size=getattr(block, "shift_size", (0, 0))
        )
    return getattr(type(block), FORWARD_OF_ATTENTION)(block, x)


def _note_image(recordings: list[_Recording], patch_embed: nn.Module, x: Tensor) -> Tensor:
    """The patch embedding of a ViT knows the grid of all its layers."""
    for recording in recordings:
        recording.located[None] = dict(grid_size=tuple(patch_embed.dynamic_feat_size(x.shape[-2:])))
    return type(patch_embed).forward(patch_embed, x)


_in_this_thread = threading.local()
_taps: dict[tuple[nn.Module, str], int] = {}
_taps_lock = threading.Lock()


def _tap(module: nn.Module, method: str, watch: Callable) -> None:
    """Puts `method` on the instance: `watch` for threads that record the module, the class's own for all others."""
    fast = getattr(type(module), method)

    def watched(module, *args, **kwargs):
        recordings = [r for r in getattr(_in_this_thread, "recordings", ()) if module in r.watched]
        return watch(recordings, module, *args, **kwargs) if recordings else fast(module, *args, **kwargs)

    with _taps_lock:
        _taps[module, method] = _taps.get((module, method), 0) + 1
        setattr(module, method, MethodType(watched, module))  # a bound method, so that a deep copy runs its own weights


def _untap(module: nn.Module, method: str) -> None:
    with _taps_lock:
        _taps[module, method] -= 1
        if not _taps[module, method]:
            del _taps[module, method]
            delattr(module, method)


@contextmanager
def record(model: nn.Module, blocks: Sequence[int] | None = None) -> Iterator[list[LayerMaps]]:
    """Records the attention maps of the forward passes that this thread runs inside the `with` block.

    The chosen layers take the path that materialises maps, and the fast path again on exit. Other threads that run or
    record the same model are not disturbed. A later forward pass replaces the maps of an earlier one.

    Args:
        model: a model or a single attention layer.
        blocks: indices of the attention layers to record, counted through the whole network; default all.

    Yields:
        A list that holds one `LayerMaps` per recorded layer, in order, once the model has run.

    Raises:
        ValueError: `model` has no attention layer that can be recorded, or a block index is out of range.
    """
    found = attention_layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layer that can be recorded.")
    chosen = range(len(found)) if blocks is None else sorted({b + len(found) if b < 0 else b for b in blocks})
    if any(not 0 <= b < len(found) for b in chosen):
        raise ValueError(f"blocks={list(blocks or ())} is out of range: the model has {len(found)} attention layers.")
    owner = next((m for m in model.modules() if hasattr(m, "patch_embed")), None)
    patch_embed = getattr(owner, "patch_embed", None)
    whole = dict(
        grid_size=getattr(patch_embed, "grid_size", None), num_prefix_tokens=getattr(owner, "num_prefix_tokens", 0)
    )
    layers = {found[b][1]: dict(block=b, name=found[b][0]) for b in chosen}
    taps: list[tuple[nn.Module, str, Callable]] = [(layer, "forward", _record_layer) for layer in layers]
    taps += [
        (m, FORWARD_OF_ATTENTION, _note_block)
        for m in model.modules()
        if isinstance(m, SwinTransformerBlock | GridBlock) and m.attn in layers
    ]
    if patch_embed is not None and hasattr(patch_embed, "dynamic_feat_size"):
        taps.append((patch_embed, "forward", _note_image))
    recording = _Recording(layers, whole, {module for module, _, _ in taps})
    active = _in_this_thread.__dict__.setdefault("recordings", [])
    for tap in taps:
        _tap(*tap)
    active.append(recording)
    try:
        yield recording.maps
    finally:
        active.remove(recording)
        for module, method, _ in taps:
            _untap(module, method)
