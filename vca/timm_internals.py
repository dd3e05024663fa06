"""What this library uses of timm beyond its public API, in one place: a new version of timm is checked here.

The maps of timm's own layers are here too, since they restate the forward passes of these layers, under a change if
one is given.
"""

from collections.abc import Callable

from timm.layers import Attention, DiffAttention
from timm.layers.trace_utils import _assert
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor, nn

from vca import functional as VF
from vca.layers.change import UNCHANGED, Change
from vca.layers.layer_maps import DifferentialMaps, GlobalMaps, LayerMaps, StageMaps, WindowMaps

__all__ = [
    "FORWARD_OF_ATTENTION", "TIMM_MAPS", "creation_arguments", "feature_take_indices", "trace_assert", "window_sizes",
]  # fmt: skip

FORWARD_OF_ATTENTION = "_attn"  # the method of `SwinTransformerBlock` that runs its attention over (B, Hg, Wg, C)
trace_assert = _assert


def creation_arguments(model: nn.Module) -> dict:
    """The arguments that timm made a model with, or changed it to since."""
    return getattr(model, "_model_args", {})


def window_sizes(model: SwinTransformer) -> list[tuple[int, int]]:
    """Rows and columns of the windows of every stage, as given and not as cut to the grid."""
    return model._ref_window_sizes


def _mhsa_maps(layer: Attention, x: Tensor, attn_mask=None, is_causal=False, change: Change = UNCHANGED):
    """timm's `Attention.forward` with an explicit softmax. Its map leaves out attention dropout."""
    if attn_mask is not None or is_causal:
        raise ValueError("masked self-attention can be neither recorded nor changed.")
    batch, length, _ = x.shape
    qkv = layer.qkv(x).view(batch, length, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B, H, T, d)
    q, k = layer.q_norm(q) * layer.scale, layer.k_norm(k)
    attention = change.heads(VF.softmax(q @ k.transpose(-2, -1), -1, in_place=False))  # (B, H, T, T)
    gathered = layer.attn_drop(attention).to(v.dtype) @ v
    out = layer.norm(gathered.transpose(1, 2).reshape(batch, length, layer.attn_dim))
    if layer.gate is not None:
        out = out * layer.gate(x).sigmoid()
    maps = GlobalMaps(kind="mhsa", stage1=StageMaps(attention), values=v, gathered=gathered)
    return layer.proj_drop(layer.proj(out)), maps


def _diff_maps(layer: DiffAttention, x: Tensor, attn_mask=None, is_causal=False, change: Change = UNCHANGED):
    """timm's `DiffAttention.forward` with explicit softmaxes. Its maps leave out attention dropout."""
    if attn_mask is not None or is_causal:
        raise ValueError("masked self-attention can be neither recorded nor changed.")
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    q, k = (norm(p.unflatten(-1, (layer.num_heads, 2, -1))) for norm, p in ((layer.q_norm, q), (layer.k_norm, k)))
    v = v.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)  # (B, H, T, d)
    streams = VF.softmax_map(q.permute(0, 2, 3, 1, 4), k.permute(0, 2, 3, 1, 4))  # (B, H, 2, T, T)
    streams = change.streams(streams, dim=2)
    lam = change.contrast_lambda(1, layer._compute_lambda())
    difference = change.heads(VF.subtract_streams(streams, lam))
    out = layer.attn_drop(difference).to(v.dtype) @ v
    row_scale = VF.rms_scale(out, 1 - layer.lambda_init, layer.sub_norm.eps)
    gathered = out * row_scale
    out = (gathered * layer.sub_norm.weight).to(v.dtype)
    y = layer.proj_drop(layer.proj(layer.norm(out.transpose(1, 2).flatten(2))))
    stage1 = StageMaps(streams[:, :, 0], streams[:, :, 1], difference)
    maps = DifferentialMaps(kind="diff", stage1=stage1, row_scale1=row_scale, lambda1=lam, values=v, gathered=gathered)
    return y, maps


def _window_maps(layer: WindowAttention, x: Tensor, mask: Tensor | None = None, change: Change = UNCHANGED):
    """timm's `WindowAttention.forward` with an explicit softmax.

    The layer does not know how many windows an image has: its map is (1, B * windows, H, M, M), image after image.
    """
    count, length, _ = x.shape
    q, k, v = layer.qkv(x).view(count, length, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q * layer.scale @ k.transpose(-2, -1) + layer._get_rel_pos_bias()
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    attention = change.heads(VF.softmax(scores, -1, in_place=False))
    out = (layer.attn_drop(attention).to(v.dtype) @ v).transpose(1, 2).flatten(2)
    maps = WindowMaps(kind="window", window_size=layer.window_size, stage1=StageMaps(attention[None]))
    return layer.proj_drop(layer.proj(out)), maps


TIMM_MAPS: dict[type[nn.Module], Callable[..., tuple[Tensor, LayerMaps]]] = {
    Attention: _mhsa_maps,
    DiffAttention: _diff_maps,
    WindowAttention: _window_maps,
}
