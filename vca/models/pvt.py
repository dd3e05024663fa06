"""Pyramid Vision Transformer (arXiv 2102.12122) with spatial-reduction or Visual-Contrast Attention.

`pvt_*` is PVT v1 without its class token: features are averaged. `vca_pvt_*` attends over the whole grid in all four
stages, so the convolutions and norms of the spatial reduction are gone.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vca import functional as VF
from vca.layers.change import UNCHANGED, Change
from vca.layers.factory import AttentionConfig
from vca.layers.grid import OnGrid
from vca.layers.layer_maps import LayerMaps, ReducedMaps, StageMaps
from vca.models.common import create_classifier, imagenet_cfg
from vca.models.pyramid import Pyramid

TOKEN_GRIDS = [(3, 3), (4, 4), (7, 7), (7, 7)]


@register_notrace_module
class SpatialReductionAttention(OnGrid, nn.Module):
    """Self-attention whose keys and values are a grid `ratio` times coarser than the queries, by a strided convolution.

    Args:
        dim: channels C; divisible by `num_heads`.
        num_heads: heads H, each with d = C / H channels.
        grid_size: rows and columns (Hg, Wg) of the patch grid.
        qkv_bias: bias in the projections to queries, keys and values.
        proj_drop: dropout after the output projection.
        ratio: side of the cells that are reduced to a key each; 1 leaves the grid as it is.
    """

    def __init__(self, dim: int, num_heads: int, *, grid_size, ratio: int, qkv_bias: bool, proj_drop: float):
        super().__init__()
        self.grid_size = to_2tuple(grid_size)
        self.num_heads, self.ratio = num_heads, ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, ratio, ratio) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if ratio > 1 else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, change: Change = UNCHANGED) -> Tensor:
        """Attends over (B, N, C) and returns the same shape; `change` is that of `vca.intervene`."""
        return self._attend(x, grid_size, keep_maps=False, change=change)[0]

    def forward_with_maps(self, x: Tensor, grid_size: tuple[int, int] | None = None, change: Change = UNCHANGED):
        """Like `forward`, and also returns the maps: `stage1` has one, (B, H, N, N / ratio^2)."""
        return self._attend(x, grid_size, keep_maps=True, change=change)

    def _attend(self, x: Tensor, grid_size: tuple[int, int] | None, keep_maps: bool, change: Change):
        x, grid_size = self.checked(x, grid_size)
        key_grid = grid_size[0] // self.ratio, grid_size[1] // self.ratio
        reduced = x
        if self.sr is not None and self.norm is not None:
            reduced = self.norm(self.sr(VF.as_image(x, grid_size)).permute(0, 2, 3, 1).flatten(1, 2))  # (B, keys, C)
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, d)
        k, v = self.kv(reduced).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, keys, d)
        maps: LayerMaps | None = None
        if keep_maps:
            attention = change.heads(VF.softmax_map(q, k))  # (B, H, N, keys)
            out = attention.to(v.dtype) @ v
            stage1 = StageMaps(attention)
            maps = ReducedMaps(kind="sr", grid_size=grid_size, key_grid=key_grid, stage1=stage1, values=v, gathered=out)
        else:
            out = change.heads(F.scaled_dot_product_attention(q, k, v))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))), maps


class PyramidVisionTransformer(Pyramid):
    """PVT v1 with mean pooling, or the same with another attention over the whole grid of every stage.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and hidden channels of an MLP over its
            channels; one for each stage.
        sr_ratios: side of the cells that are reduced to a key each; one for each stage, for `attention="sr"`.
        qkv_bias: bias in the projections to queries, keys and values.
        proj_drop_rate: dropout after projections.
        **kwargs: `img_size`, `in_chans`, `num_classes`, `global_pool`, `drop_rate` and `drop_path_rate` of `Pyramid`;
            and the options of attention, by the names of `vca.layers.factory.AttentionConfig`: `attention` ("sr", the
            default, for spatial reduction), `token_grid` or `num_tokens`, for all stages or one for each (default
            `TOKEN_GRIDS`), `tokens`, `dwc`, `stage2_softmax` and `pooling`.
    """

    def __init__(
        self,
        *,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        **kwargs,
    ):
        config = AttentionConfig.pop_from(kwargs, default="sr", more=("sr",))
        grids = config.token_grids(TOKEN_GRIDS[: len(depths)])
        shared: dict[str, Any] = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate)

        def create_layer(stage: int, depth: int, dim: int, heads: int, grid_size: tuple[int, int]) -> nn.Module:
            if config.attention == "sr":
                return SpatialReductionAttention(dim, heads, grid_size=grid_size, ratio=sr_ratios[stage], **shared)
            if config.token_grid is config.num_tokens is None:  # the paper's contrast tokens, whatever the image size
                grid_size = to_2tuple(map(max, grid_size, grids[stage]))
            return config.create(dim, heads, grid_size=grid_size, token_grid=grids[stage], depth=depth, **shared)

        super().__init__(
            create_layer,
            stem=(4, 4, 0),
            merge=(2, 2, 0),
            positions=True,
            final_norm=False,
            eps=1e-6,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            proj_drop_rate=proj_drop_rate,
            **kwargs,
        )


FEATURES = dict(out_indices=(0, 1, 2, 3), feature_cls="getter")
DEPTHS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3)}
default_cfgs = generate_default_cfgs(
    {f"{prefix}pvt_{size}": imagenet_cfg() for prefix in ("", "vca_") for size in DEPTHS}
)
MODELS = tuple(default_cfgs)


def _create(size: str, attention: str, pretrained: bool, arguments: dict) -> nn.Module:
    name = f"pvt_{size}" if attention == "sr" else f"{attention}_pvt_{size}"
    spec = dict(attention=attention, depths=DEPTHS[size])
    return create_classifier(PyramidVisionTransformer, name, pretrained, FEATURES, spec, arguments)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """PVT-Tiny, 224 px, with spatial reduction 8-4-2-1."""
    return _create("tiny", "sr", pretrained, kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """PVT-Small, 224 px, with spatial reduction 8-4-2-1."""
    return _create("small", "sr", pretrained, kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs) -> nn.Module:
    """PVT-Medium, 224 px, with spatial reduction 8-4-2-1."""
    return _create("medium", "sr", pretrained, kwargs)


@register_model
def vca_pvt_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """PVT-Tiny, 224 px, with 3x3, 4x4, 7x7 and 7x7 contrast tokens."""
    return _create("tiny", "vca", pretrained, kwargs)


@register_model
def vca_pvt_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """PVT-Small, 224 px, with 3x3, 4x4, 7x7 and 7x7 contrast tokens."""
    return _create("small", "vca", pretrained, kwargs)


@register_model
def vca_pvt_medium(pretrained: bool = False, **kwargs) -> nn.Module:
    """PVT-Medium, 224 px, with 3x3, 4x4, 7x7 and 7x7 contrast tokens."""
    return _create("medium", "vca", pretrained, kwargs)
