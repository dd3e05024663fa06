"""Recording attention maps: `with vca.record(model) as maps: model(x)`, then `maps[i].effective` and its parts."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from timm.layers import Attention
from torch import Tensor, nn

from vca import functional as VF
from vca.attention import StageMaps, VisualContrastAttention


@dataclass(frozen=True)
class LayerMaps:
    """The attention maps of one layer for one forward pass; T = P + N tokens, n contrast tokens.

    A picture can be drawn from this record alone. A two-stage kind has `stage1` (B, H, n, T) and `stage2` (B, H, T, n);
    plain self-attention has only `stage1.positive` (B, H, T, T).
    """

    kind: str
    block: int
    name: str
    grid_size: tuple[int, int] | None
    token_grid: tuple[int, int] | None
    num_prefix_tokens: int
    stage1: StageMaps
    stage2: StageMaps | None = None
    row_scale1: Tensor | None = None
    row_scale2: Tensor | None = None
    lambda1: Tensor | None = None
    lambda2: Tensor | None = None

    @property
    def effective(self) -> Tensor:
        """The exact map (B, H, T, T) from every token (row) to every token it draws from, computed on demand.

        For VCA the heads' output before the depthwise convolution and `proj` is (E v) * g1 * g2, to rounding.
        """
        if self.stage2 is None:
            return self.stage1.positive
        return VF.effective_map(self.stage1.differential, self.row_scale1, self.stage2.differential, self.row_scale2)


def _vca_maps(layer: VisualContrastAttention, x: Tensor, attn_mask=None, is_causal=False) -> tuple[Tensor, dict]:
    y, maps = layer.forward_with_maps(x, attn_mask, is_causal)
    place = dict(
        grid_size=layer.grid_size, token_grid=layer.token_grid, num_prefix_tokens=layer.num_prefix_tokens, kind="vca"
    )
    return y, place | maps


def _mhsa_maps(layer: Attention, x: Tensor, attn_mask=None, is_causal=False) -> tuple[Tensor, dict]:
    """timm's `Attention.forward` with an explicit softmax. Its map leaves out attention dropout."""
    if attn_mask is not None or is_causal:
        raise ValueError("maps of masked self-attention cannot be recorded.")
    batch, length, _ = x.shape
    qkv = layer.qkv(x).view(batch, length, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = layer.q_norm(q) * layer.scale, layer.k_norm(k)
    attention = VF.softmax(q @ k.transpose(-2, -1), -1, in_place=False)
    out = layer.attn_drop(attention).to(v.dtype) @ v
    out = layer.norm(out.transpose(1, 2).reshape(batch, length, layer.attn_dim))
    if layer.gate is not None:
        out = out * layer.gate(x).sigmoid()
    return layer.proj_drop(layer.proj(out)), dict(kind="mhsa", stage1=StageMaps(attention))


EXPLICIT: dict[type[nn.Module], Callable] = {VisualContrastAttention: _vca_maps, Attention: _mhsa_maps}


def attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of all layers of `model` whose maps can be recorded, in order. `model` may be one itself."""
    return [(name, module) for name, module in model.named_modules() if type(module) in EXPLICIT]


class _Recording:
    """One `record` block: which layers it wants, and what they gave in the newest forward pass."""

    def __init__(self, layers: dict[nn.Module, dict]):
        self.layers = layers
        self.maps: list[LayerMaps] = []

    def add(self, layer: nn.Module, fields: dict) -> None:
        new = LayerMaps(**{**self.layers[layer], **fields})
        self.maps[:] = sorted([m for m in self.maps if m.block != new.block] + [new], key=lambda m: m.block)


_in_this_thread = threading.local()
_taps: dict[nn.Module, int] = {}
_taps_lock = threading.Lock()


def _tap(layer: nn.Module) -> None:
    """Puts a forward on the instance that records for threads that ask for it and is the class's own for all others."""
    fast = type(layer).forward

    def forward(x, *args, **kwargs):
        recordings = [r for r in getattr(_in_this_thread, "recordings", ()) if layer in r.layers]
        if not recordings:
            return fast(layer, x, *args, **kwargs)
        y, fields = EXPLICIT[type(layer)](layer, x, *args, **kwargs)
        for recording in recordings:
            recording.add(layer, fields)
        return y

    with _taps_lock:
        _taps[layer] = _taps.get(layer, 0) + 1
        layer.forward = forward


def _untap(layer: nn.Module) -> None:
    with _taps_lock:
        _taps[layer] -= 1
        if not _taps[layer]:
            del _taps[layer], layer.forward


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
        kinds = ", ".join(kind.__name__ for kind in EXPLICIT)
        raise ValueError(f"{type(model).__name__} has no attention layer that can be recorded ({kinds}).")
    chosen = range(len(found)) if blocks is None else sorted({b + len(found) if b < 0 else b for b in blocks})
    if any(not 0 <= b < len(found) for b in chosen):
        raise ValueError(f"blocks={list(blocks)} is out of range: the model has {len(found)} attention layers.")
    patch_embed = getattr(model, "patch_embed", None)
    shared = dict(
        grid_size=getattr(patch_embed, "grid_size", None),
        token_grid=None,
        num_prefix_tokens=getattr(model, "num_prefix_tokens", 0),
    )
    layers = {found[b][1]: dict(block=b, name=found[b][0], **shared) for b in chosen}
    recording = _Recording(layers)
    active = _in_this_thread.__dict__.setdefault("recordings", [])
    for layer in layers:
        _tap(layer)
    active.append(recording)
    try:
        yield recording.maps
    finally:
        active.remove(recording)
        for layer in layers:
            _untap(layer)
