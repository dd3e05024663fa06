"""What this library uses of timm beyond its public API, in one place: a new version of timm is checked here.

The maps of timm's own layers are here too, under a change if one is given. They are those that the layer itself
computes; only `DiffAttention`'s forward pass is restated.
"""

import copy
from collections.abc import Callable

from timm.layers import Attention, AttentionRope, DiffAttention
from timm.layers.trace_utils import _assert
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn, TalkingHeadAttn
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vca import functional as VF
from vca.layers.change import UNCHANGED, Change
from vca.layers.layer_maps import DifferentialMaps, GlobalMaps, LayerMaps, StageMaps, WindowMaps

__all__ = [
    "FORWARD_OF_ATTENTION", "GRID_BLOCKS", "creation_arguments", "feature_take_indices", "timm_maps", "trace_assert",
    "update_model_args", "update_model_input_size", "window_sizes",
]  # fmt: skip

GRID_BLOCKS = SwinTransformerBlock | SwinTransformerV2Block
FORWARD_OF_ATTENTION = "_attn"  # the method of `GRID_BLOCKS` that runs their attention over (B, Hg, Wg, C)
trace_assert = _assert


def creation_arguments(model: nn.Module) -> dict:
    """The arguments that timm made a model with, or changed it to since."""
    return getattr(model, "_model_args", {})


def window_sizes(model: SwinTransformer) -> list[tuple[int, int]]:
    """Rows and columns of the windows of every stage, as given and not as cut to the grid."""
    return model._ref_window_sizes


class _Kept(nn.Module):
    """Stands for the attention dropout of a layer, the last that timm's layers do with their map, and keeps the map."""

    def __init__(self, dropout: nn.Module, change: Change):
        super().__init__()
        self.dropout, self.change = dropout, change

    def forward(self, attention: Tensor) -> Tensor:
        self.map = self.change.heads(attention)
        self.given = self.dropout(self.map)
        return self.given


class _Product(TorchFunctionMode):
    """Sees what the kept map is multiplied with."""

    def __init__(self, kept: _Kept):
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if len(args) == 2 and args[0] is getattr(self.kept, "given", None) and "matmul" in func.__name__:
            self.values, self.gathered = args[1], out
        return out


def _run_explicitly(layer: nn.Module, change: Change, *args, **kwargs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass of one of timm's layers itself, without fused attention.

    Returns:
        The output; the map (B, H, T, S) under the change, without attention dropout; the values (B, H, S, d); and the
        product of the two.
    """
    kept = _Kept(layer.attn_drop, change)
    twin = copy.copy(layer)  # with the same parameters; other threads run `layer`
    twin._modules = dict(layer._modules, attn_drop=kept)
    twin.fused_attn = False
    with _Product(kept) as product:
        y = type(layer).forward(twin, *args, **kwargs)
    return y, VF.upcast(kept.map), product.values, product.gathered


def _global_maps(layer: nn.Module, *args, change: Change = UNCHANGED, **kwargs) -> tuple[Tensor, LayerMaps]:
    y, attention, values, gathered = _run_explicitly(layer, change, *args, **kwargs)
    kind = KINDS_OF_TIMM.get(type(layer), "mhsa")
    return y, GlobalMaps(kind=kind, stage1=StageMaps(attention), values=values, gathered=gathered)


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


def _window_maps(layer: nn.Module, *args, change: Change = UNCHANGED, **kwargs) -> tuple[Tensor, LayerMaps]:
    """The layer does not know how many windows an image has: its map is (1, B * windows, H, M, M), by images."""
    y, attention, _, _ = _run_explicitly(layer, change, *args, **kwargs)
    return y, WindowMaps(kind="window", window_size=layer.window_size, stage1=StageMaps(attention[None]))


KINDS_OF_TIMM = {TalkingHeadAttn: "talking_heads", ClassAttn: "class"}  # of `LayerMaps.kind`; all others are "mhsa"


TIMM_MAPS: dict[type[nn.Module], Callable[..., tuple[Tensor, LayerMaps]]] = {
    Attention: _global_maps,
    AttentionRope: _global_maps,
    BeitAttention: _global_maps,
    ClassAttn: _global_maps,
    DiffAttention: _diff_maps,
    EvaAttention: _global_maps,
    TalkingHeadAttn: _global_maps,
    WindowAttention: _window_maps,
    WindowAttentionV2: _window_maps,
}


def timm_maps(layer: nn.Module) -> Callable[..., tuple[Tensor, LayerMaps]] | None:
    """What gives the maps of a layer whose forward pass is that of one of timm's; None for all other modules."""
    cls = next((cls for cls in type(layer).__mro__ if cls in TIMM_MAPS), None)
    return TIMM_MAPS[cls] if cls and type(layer).forward is cls.forward else None
