"""CSwin Transformer (arXiv 2107.00652) with cross-shaped windows, or Visual-Contrast Attention in its early stages.

`cswin_*` has cross-shaped attention everywhere; `cswin_tiny` has the depths 2-4-18-1. `vca_cswin_*` attends over the
whole grid in stages 1 and 2; there the depthwise convolution of the layer is what LePE is in a stripe.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vca import functional as VF
from vca.layers.change import UNCHANGED, Change
from vca.layers.depthwise import depthwise_conv3x3, local_term
from vca.layers.factory import AttentionConfig
from vca.layers.grid import OnGrid
from vca.layers.layer_maps import LayerMaps, StageMaps, WindowMaps
from vca.models.common import create_classifier, imagenet_cfg
from vca.models.pyramid import Pyramid

TOKEN_GRIDS = [(3, 3), (4, 4)]


@register_notrace_module
class StripeAttention(OnGrid, nn.Module):
    """Self-attention within the stripes of a grid, plus LePE: a depthwise convolution of the values in each stripe.

    Args:
        dim: channels C; divisible by `num_heads`.
        num_heads: heads H, each with d = C / H channels.
        grid_size: rows and columns (Hg, Wg) of the patch grid.
        width: rows of a horizontal or columns of a vertical stripe; None for one window, the whole grid.
        vertical: whether stripes run from top to bottom.
    """

    def __init__(self, dim: int, num_heads: int, *, grid_size, width: int | None, vertical: bool):
        super().__init__()
        self.grid_size = to_2tuple(grid_size)
        self.num_heads, self.width, self.vertical = num_heads, width, vertical
        self.lepe = depthwise_conv3x3(dim)
        self.window_size(self.grid_size)

    def window_size(self, grid_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a stripe.

        Raises:
            ValueError: stripes of this width do not fill the grid.
        """
        rows, cols = grid_size
        if self.width is None:
            return rows, cols
        if (cols if self.vertical else rows) % self.width:
            raise ValueError(
                f"stripes {self.width} wide do not fill a {rows}x{cols} grid; choose another img_size or split_sizes."
            )
        return (rows, self.width) if self.vertical else (self.width, cols)

    def forward(self, qkv: Tensor, grid_size: tuple[int, int] | None = None, change: Change = UNCHANGED) -> Tensor:
        """Attends with queries, keys and values (B, N, 3, C), and returns (B, N, C); `change`: see `vca.intervene`."""
        return self._attend(qkv, grid_size, keep_maps=False, change=change)[0]

    def forward_with_maps(self, qkv: Tensor, grid_size: tuple[int, int] | None = None, change: Change = UNCHANGED):
        """Like `forward`, and also returns the maps: `stage1` has one, (B, stripes, H, M, M)."""
        return self._attend(qkv, grid_size, keep_maps=True, change=change)

    def _attend(self, qkv: Tensor, grid_size: tuple[int, int] | None, keep_maps: bool, change: Change):
        qkv, grid_size = self.checked(qkv, grid_size)
        window = self.window_size(grid_size)
        dim = qkv.shape[-1]
        stripes = VF.split_windows(qkv.flatten(2).unflatten(1, grid_size), window)  # (B, stripes, M, 3C)
        heads = stripes.flatten(0, 1).unflatten(-1, (3, self.num_heads, -1))  # (B * stripes, M, 3, H, d)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B * stripes, H, M, d)
        maps: LayerMaps | None = None
        if keep_maps:
            attention = change.heads(VF.softmax_map(q, k))  # (B * stripes, H, M, M)
            out = attention.to(v.dtype) @ v
            stage1 = StageMaps(attention.unflatten(0, stripes.shape[:2]))
            maps = WindowMaps(kind="stripes", grid_size=grid_size, window_size=window, stage1=stage1)
        else:
            out = change.heads(F.scaled_dot_product_attention(q, k, v))
        out = out.transpose(1, 2).flatten(2) + local_term(self.lepe, stripes.flatten(0, 1)[..., 2 * dim :], window)
        return VF.join_windows(out.unflatten(0, stripes.shape[:2]), window, grid_size).flatten(1, 2), maps


@register_notrace_module
class CrossShapedAttention(OnGrid, nn.Module):
    """Half the heads attend in vertical stripes, the other half in horizontal ones; or all over the whole grid.

    Args:
        dim: channels C; divisible by `num_heads`.
        num_heads: heads H, each with d = C / H channels.
        grid_size: rows and columns (Hg, Wg) of the patch grid.
        qkv_bias: bias in the qkv projection.
        proj_drop: dropout after the output projection.
        width: of the stripes; None for attention over the whole grid.
    """

    def __init__(self, dim: int, num_heads: int, *, grid_size, width: int | None, qkv_bias: bool, proj_drop: float):
        super().__init__()
        self.grid_size = to_2tuple(grid_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if width is None:
            branches = [StripeAttention(dim, num_heads, grid_size=grid_size, width=None, vertical=False)]
        elif num_heads % 2:
            raise ValueError(f"num_heads={num_heads} cannot be halved between vertical and horizontal stripes.")
        else:
            branches = [
                StripeAttention(dim // 2, num_heads // 2, grid_size=grid_size, width=width, vertical=vertical)
                for vertical in (True, False)
            ]
        self.branches = nn.ModuleList(branches)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Attends over (B, N, C) and returns the same shape."""
        x, grid_size = self.checked(x, grid_size)
        parts = self.qkv(x).unflatten(-1, (3, -1)).chunk(len(self.branches), dim=-1)
        out = [branch(part, grid_size=grid_size) for branch, part in zip(self.branches, parts, strict=True)]
        return self.proj_drop(self.proj(torch.cat(out, dim=-1)))


class CSwinTransformer(Pyramid):
    """CSwin Transformer, or the same with another attention over the whole grid of the first stages.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and hidden channels of an MLP over its
            channels; one for each stage.
        split_sizes: width of the stripes in each stage; None for attention over the whole grid.
        qkv_bias: bias in the projection to queries, keys and values.
        proj_drop_rate: dropout after projections.
        **kwargs: `img_size`, `in_chans`, `num_classes`, `global_pool`, `drop_rate` and `drop_path_rate` of `Pyramid`;
            and the options of attention in stages 1 and 2, by the names of `vca.layers.factory.AttentionConfig`:
            `attention` ("cross", the default, for cross-shaped windows), `token_grid` or `num_tokens`, for both stages
            or one for each (default 3x3, 4x4), `tokens`, `dwc`, `stage2_softmax` and `pooling`.
    """

    def __init__(
        self,
        *,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        split_sizes: Sequence[int | None] = (1, 2, 7, None),
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        **kwargs,
    ):
        config = AttentionConfig.pop_from(kwargs, default="cross", more=("cross",))
        grids = config.token_grids(TOKEN_GRIDS)
        shared: dict[str, Any] = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate)

        def create_layer(stage: int, depth: int, dim: int, heads: int, grid_size: tuple[int, int]) -> nn.Module:
            if config.attention == "cross" or stage >= len(grids):
                return CrossShapedAttention(dim, heads, grid_size=grid_size, width=split_sizes[stage], **shared)
            return config.create(dim, heads, grid_size=grid_size, token_grid=grids[stage], depth=depth, **shared)

        super().__init__(
            create_layer,
            stem=(7, 4, 2),
            merge=(3, 2, 1),
            positions=False,
            final_norm=True,
            eps=1e-5,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            proj_drop_rate=proj_drop_rate,
            **kwargs,
        )

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """As `Pyramid.set_input_size`; refused, before anything is changed, if stripes do not fill a new grid."""
        for stage, grid_size in zip(self.stages, self.grids(img_size), strict=True):
            for layer in stage.modules():
                if isinstance(layer, StripeAttention):
                    layer.window_size(grid_size)
        super().set_input_size(img_size)


FEATURES = dict(out_indices=(0, 1, 2, 3), feature_cls="getter")
DEPTHS = {"tiny": (2, 4, 18, 1), "small": (2, 4, 32, 2)}
default_cfgs = generate_default_cfgs(
    {f"{prefix}cswin_{size}": imagenet_cfg() for prefix in ("", "vca_") for size in DEPTHS}
)
MODELS = tuple(default_cfgs)


def _create(size: str, attention: str, pretrained: bool, arguments: dict) -> nn.Module:
    name = f"cswin_{size}" if attention == "cross" else f"{attention}_cswin_{size}"
    spec = dict(attention=attention, depths=DEPTHS[size])
    return create_classifier(CSwinTransformer, name, pretrained, FEATURES, spec, arguments)


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """CSwin-Tiny, 224 px, with stripes 1-2-7 wide and whole-grid attention."""
    return _create("tiny", "cross", pretrained, kwargs)


@register_model
def cswin_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """CSwin-Small, 224 px, with stripes 1-2-7 wide and whole-grid attention."""
    return _create("small", "cross", pretrained, kwargs)


@register_model
def vca_cswin_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """CSwin-Tiny, 224 px, with 3x3 and 4x4 contrast tokens in stages 1 and 2."""
    return _create("tiny", "vca", pretrained, kwargs)


@register_model
def vca_cswin_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """CSwin-Small, 224 px, with 3x3 and 4x4 contrast tokens in stages 1 and 2."""
    return _create("small", "vca", pretrained, kwargs)
