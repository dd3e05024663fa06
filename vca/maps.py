"""Recording attention maps: `with vca.record(model) as maps: model(x)`, then `maps[i].effective` and its parts."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType

from timm.layers import Attention, DiffAttention
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from vca import functional as VF
from vca.layers.grid import GridBlock
from vca.layers.stage_maps import StageMaps


@dataclass(frozen=True)
class LayerMaps:
    """The attention maps of one layer for one forward pass; T = P + N tokens, n contrast tokens.

    A picture can be drawn from this record alone. `kind` says what there is:

    - "vca", "vca_stage1", "vca_stage2", "agent": `stage1` (B, H, n, T) and `stage2` (B, H, T, n);
    - "diff": `stage1` (B, H, T, T), three maps; "mhsa", "mhsa_dwc": the same, one map;
    - "sr": one map (B, H, N, N / r^2) to keys on the coarser `key_grid`;
    - "window", "stripes": one map (B, windows, H, M, M); `window_patches` says which patches a window holds.

    All but windows and stripes have `values` (B, H, keys, d), which are v, times g1 for the VCA kinds, and `gathered`,
    `effective` times `values` (B, H, queries, d), a part of the graph of the forward pass: the gradient of a score with
    respect to the effective map is its gradient with respect to `gathered`, times `values` transposed.
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
    values: Tensor | None = None
    gathered: Tensor | None = None
    key_grid: tuple[int, int] | None = None
    window_size: tuple[int, int] | None = None
    shift_size: tuple[int, int] | None = None

    @property
    def effective(self) -> Tensor:
        """The exact map from every token (row) to every token it draws from, computed on demand.

        The heads' output before the depthwise convolution and `proj` is E v, times the gains of the layer's norms:
        (E v) * g1 * g2 for the VCA kinds, (E v) * g for "diff". To rounding.
        """
        if self.stage2 is None:
            return VF.effective_map(self.stage1.applied, self.row_scale1)
        return VF.effective_map(self.stage1.applied, self.row_scale1, self.stage2.applied, self.row_scale2)

    @property
    def window_patches(self) -> Tensor | None:
        """Indices (windows, M) into the row-major grid, -1 where a window is padded; None without windows."""
        if self.window_size is None or self.grid_size is None:
            return None
        return VF.window_patches(self.grid_size, self.window_size, self.shift_size)


def _mhsa_maps(layer: Attention, x: Tensor, attn_mask=None, is_causal=False) -> tuple[Tensor, dict]:
    """timm's `Attention.forward` with an explicit softmax. Its map leaves out attention dropout."""
    if attn_mask is not None or is_causal:
        raise ValueError("maps of masked self-attention cannot be recorded.")
    batch, length, _ = x.shape
    qkv = layer.qkv(x).view(batch, length, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = layer.q_norm(q) * layer.scale, layer.k_norm(k)
    attention = VF.softmax(q @ k.transpose(-2, -1), -1, in_place=False)
    gathered = layer.attn_drop(attention).to(v.dtype) @ v
    out = layer.norm(gathered.transpose(1, 2).reshape(batch, length, layer.attn_dim))
    if layer.gate is not None:
        out = out * layer.gate(x).sigmoid()
    fields = dict(kind="mhsa", stage1=StageMaps(attention), values=v, gathered=gathered)
    return layer.proj_drop(layer.proj(out)), fields


def _diff_maps(layer: DiffAttention, x: Tensor, attn_mask=None, is_causal=False) -> tuple[Tensor, dict]:
    """timm's `DiffAttention.forward` with explicit softmaxes. Its maps leave out attention dropout."""
    if attn_mask is not None or is_causal:
        raise ValueError("maps of masked self-attention cannot be recorded.")
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    q, k = (norm(p.unflatten(-1, (layer.num_heads, 2, -1))) for norm, p in ((layer.q_norm, q), (layer.k_norm, k)))
    v = v.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
    streams = VF.softmax_map(q.permute(0, 2, 3, 1, 4), k.permute(0, 2, 3, 1, 4))
    lam = layer._compute_lambda()
    difference = VF.subtract_streams(streams, lam)
    out = layer.attn_drop(difference).to(v.dtype) @ v
    row_scale = VF.rms_scale(out, 1 - layer.lambda_init, layer.sub_norm.eps)
    gathered = out * row_scale
    out = (gathered * layer.sub_norm.weight).to(v.dtype)
    y = layer.proj_drop(layer.proj(layer.norm(out.transpose(1, 2).flatten(2))))
    stage1 = StageMaps(streams[:, :, 0], streams[:, :, 1], difference)
    fields = dict(kind="diff", stage1=stage1, row_scale1=row_scale, lambda1=lam, values=v, gathered=gathered)
    return y, fields


def _window_maps(layer: WindowAttention, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict]:
    """timm's `WindowAttention.forward` with an explicit softmax; its windows are those of one image after another."""
    count, length, _ = x.shape
    q, k, v = layer.qkv(x).view(count, length, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q * layer.scale @ k.transpose(-2, -1) + layer._get_rel_pos_bias()
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    attention = VF.softmax(scores, -1, in_place=False)
    out = (layer.attn_drop(attention).to(v.dtype) @ v).transpose(1, 2).flatten(2)
    fields = dict(kind="window", window_size=layer.window_size, stage1=StageMaps(attention[None]))
    return layer.proj_drop(layer.proj(out)), fields


TIMM: dict[type[nn.Module], Callable] = {
    Attention: _mhsa_maps,
    DiffAttention: _diff_maps,
    WindowAttention: _window_maps,
}


def attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of all layers of `model` whose maps can be recorded, in order. `model` may be one itself."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in TIMM or hasattr(module, "forward_with_maps")
    ]


def _forward_with_maps(layer: nn.Module, *args, **kwargs) -> tuple[Tensor, dict]:
    if type(layer) in TIMM:
        return TIMM[type(layer)](layer, *args, **kwargs)
    return layer.forward_with_maps(*args, **kwargs)


class _Recording:
    """One `record` block: which layers it wants, where they stand, and what they gave in the newest forward pass."""

    def __init__(self, layers: dict[nn.Module, dict], watched: set[nn.Module]):
        self.layers = layers
        self.watched = watched
        self.places: dict[nn.Module | None, dict] = {}
        self.maps: list[LayerMaps] = []

    def add(self, layer: nn.Module, fields: dict) -> None:
        place = self.places.get(layer) or self.places.get(None, {})
        new = LayerMaps(**{**self.layers[layer], **place, **fields})
        if new.kind == "window" and new.grid_size is not None:
            attention = new.stage1.positive[0].unflatten(0, (-1, len(new.window_patches)))
            new = replace(new, stage1=StageMaps(attention))
        self.maps[:] = sorted([m for m in self.maps if m.block != new.block] + [new], key=lambda m: m.block)


def _record_layer(recordings: list[_Recording], layer: nn.Module, *args, **kwargs) -> Tensor:
    y, fields = _forward_with_maps(layer, *args, **kwargs)
    for recording in recordings:
        recording.add(layer, fields)
    return y


def _note_block(recordings: list[_Recording], block: nn.Module, x: Tensor) -> Tensor:
    """A block over a grid (B, Hg, Wg, C) knows where its attention stands."""
    for recording in recordings:
        recording.places[block.attn] = dict(
            grid_size=tuple(x.shape[1:3]), shift_size=getattr(block, "shift_size", None)
        )
    return type(block)._attn(block, x)


def _note_image(recordings: list[_Recording], patch_embed: nn.Module, x: Tensor) -> Tensor:
    """The patch embedding of a ViT knows the grid of all its layers."""
    for recording in recordings:
        recording.places[None] = dict(grid_size=tuple(patch_embed.dynamic_feat_size(x.shape[-2:])))
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
        raise ValueError(f"blocks={list(blocks)} is out of range: the model has {len(found)} attention layers.")
    owner = next((m for m in model.modules() if hasattr(m, "patch_embed")), None)
    patch_embed = getattr(owner, "patch_embed", None)
    shared = dict(
        grid_size=getattr(patch_embed, "grid_size", None),
        token_grid=None,
        num_prefix_tokens=getattr(owner, "num_prefix_tokens", 0),
    )
    layers = {found[b][1]: dict(block=b, name=found[b][0], **shared) for b in chosen}
    taps = [(layer, "forward", _record_layer) for layer in layers]
    taps += [
        (m, "_attn", _note_block)
        for m in model.modules()
        if isinstance(m, SwinTransformerBlock | GridBlock) and m.attn in layers
    ]
    if hasattr(patch_embed, "dynamic_feat_size"):
        taps.append((patch_embed, "forward", _note_image))
    recording = _Recording(layers, {module for module, _, _ in taps})
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
