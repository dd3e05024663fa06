"""How a thread watches or changes the modules that it runs, without disturbing others that run the same model."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from types import MethodType

import torch
from torch import Tensor, nn

from vca.layers.change import UNCHANGED, Change
from vca.layers.layer_maps import LayerMaps
from vca.timm_internals import timm_maps


class Watcher:
    """What a thread asks of modules while it runs inside a `tapped` block.

    Attributes:
        watched: the modules.
        change: what the attention layers among them do differently.
        keeps_maps: whether `add` is to be called with their maps.
    """

    keeps_maps = False

    def __init__(self, watched: set[nn.Module], change: Change = UNCHANGED):
        self.watched = watched
        self.change = change

    def add(self, layer: nn.Module, maps: LayerMaps) -> None:
        raise NotImplementedError


Tap = tuple[nn.Module, str, Callable]  # a module, its method, and what takes the method's place


def attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of all layers of `model` that can be watched, in order. `model` may be one itself."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if timm_maps(module) or hasattr(module, "forward_with_maps")
    ]


def chosen_layers(model: nn.Module, blocks: Sequence[int] | None) -> list[tuple[int, str, nn.Module]]:
    """Block, name and module of the attention layers with these indices, in order; default all.

    Raises:
        ValueError: `model` has no such layer, or an index is out of range.
    """
    found = attention_layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layer that can be recorded or changed.")
    chosen = range(len(found)) if blocks is None else sorted({b + len(found) if b < 0 else b for b in blocks})
    if any(not 0 <= b < len(found) for b in chosen):
        raise ValueError(f"blocks={list(blocks or ())} is out of range: the model has {len(found)} attention layers.")
    return [(block, *found[block]) for block in chosen]


def run_layer(watchers: list[Watcher], layer: nn.Module, *args, **kwargs) -> Tensor:
    """The forward pass of an attention layer for those that watch it; a change that came later is made later."""
    change = reduce(Change.then, (watcher.change for watcher in watchers))
    if change != UNCHANGED:
        kwargs["change"] = change
    recording = [watcher for watcher in watchers if watcher.keeps_maps]
    if (maps_of := timm_maps(layer)) is not None:
        y, maps = maps_of(layer, *args, **kwargs)
    elif recording:
        y, maps = layer.forward_with_maps(*args, **kwargs)
    else:
        return type(layer).forward(layer, *args, **kwargs)
    for watcher in recording:
        watcher.add(layer, maps)
    return y


_in_this_thread = threading.local()
_taps: dict[tuple[nn.Module, str], int] = {}
_taps_lock = threading.Lock()


def _tap(module: nn.Module, method: str, watch: Callable) -> None:
    """Puts `method` on the instance: `watch` for threads that watch the module, the class's own for all others."""
    fast = getattr(type(module), method)

    @torch.compiler.disable  # whoever compiled the model: the graph breaks here while it is tapped
    def watched(module, *args, **kwargs):
        watchers = [w for w in getattr(_in_this_thread, "watchers", ()) if module in w.watched]
        return watch(watchers, module, *args, **kwargs) if watchers else fast(module, *args, **kwargs)

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
def tapped(watcher: Watcher, taps: Sequence[Tap]) -> Iterator[None]:
    """Lets the methods do something else in forward passes that this thread runs inside the block.

    What takes a method's place is called with the watchers of the module, the module, and the arguments. It must be the
    same for all that tap this method.
    """
    active = _in_this_thread.__dict__.setdefault("watchers", [])
    for tap in taps:
        _tap(*tap)
    active.append(watcher)
    try:
        yield
    finally:
        active.remove(watcher)
        for module, method, _ in taps:
            _untap(module, method)
