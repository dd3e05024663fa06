"""Pyramid Vision Transformer (arXiv 2102.12122) with spatial-reduction or Visual-Contrast Attention.

`pvt_tiny` is PVT v1 without its class token: features are averaged. `vca_pvt_tiny` attends over the whole grid in all
four stages, so the convolutions and norms of the spatial reduction are gone.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vca import functional as VF
from vca.layers.factory import check_kind, create_attention, token_grids
from vca.layers.grid import OnGrid
from vca.layers.stage_maps import StageMaps
from vca.models.common import entry_point, imagenet_cfg
from vca.models.pyramid import Pyramid

TOKEN_GRIDS = [(3, 3), (4, 4), (7, 7), (7, 7)]


@register_notrace_module
class SpatialReductionAttention(OnGrid, nn.Module):
    """Self-attention whose keys and values are a grid `ratio` times coarser than the queries, by a strided convolution.

    Args:
        dim, num_heads, grid_size, qkv_bias, proj_drop: see `vca.VisualContrastAttention`.
        ratio: side of the cells that are reduced to a key each; 1 leaves the grid as it is.
    """

    def __init__(self, dim: int, num_heads: int, *, grid_size, ratio: int, qkv_bias: bool, proj_drop: float):
        super().__init__()
        self.grid_size = tuple(grid_size)
        self.num_heads, self.ratio = num_heads, ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, ratio, ratio) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if ratio > 1 else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Attends over (B, N, C) and returns the same shape."""
        return self._attend(x, grid_size, keep_maps=False)[0]

    def forward_with_maps(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> tuple[Tensor, dict]:
        """Like `forward`, and also gives fields of `vca.LayerMaps`: `stage1` with one map (B, H, N, N / ratio^2)."""
        return self._attend(x, grid_size, keep_maps=True)

    def _attend(self, x: Tensor, grid_size: tuple[int, int] | None, keep_maps: bool) -> tuple[Tensor, dict]:
        grid_size = self.checked_grid(x.shape[1], grid_size)
        key_grid = tuple(side // self.ratio for side in grid_size)
        reduced = x
        if self.sr is not None:
            reduced = self.norm(self.sr(VF.as_image(x, grid_size)).permute(0, 2, 3, 1).flatten(1, 2))
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(reduced).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        fields = dict(kind="sr", grid_size=grid_size, key_grid=key_grid)
        if keep_maps:
            attention = VF.softmax_map(q, k)
            out = attention.to(v.dtype) @ v
            fields |= dict(stage1=StageMaps(attention), values=v, gathered=out)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))), fields


class PyramidVisionTransformer(Pyramid):
    """PVT v1 with mean pooling, or the same with another attention over the whole grid of every stage.

    Args:
        attention: "sr" for spatial reduction, or one of `vca.layers.factory.KINDS`.
        sr_ratios: of each stage, for "sr".
        qkv_bias: bias in the projections to queries, keys and values.
        token_grid: rows and columns of the contrast tokens, for all stages or one for each; default `TOKEN_GRIDS`.
        num_tokens: their number, a square, instead of `token_grid`; for all stages or one for each.
        tokens, dwc, stage2_softmax, pooling: see `vca.VisualContrastAttention`.
        The others: see `Pyramid`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        attention: str = "sr",
        token_grid: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        tokens: str = "pool+emb",
        dwc: bool = True,
        stage2_softmax: str = "separate",
        pooling: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        check_kind(attention, more=("sr",))
        grids = token_grids(token_grid, num_tokens, TOKEN_GRIDS[: len(depths)])
        shared = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate)
        options = dict(tokens=tokens, dwc=dwc, stage2_softmax=stage2_softmax, pooling=pooling)

        def create_layer(stage, depth, dim, heads, grid_size):
            if attention == "sr":
                return SpatialReductionAttention(dim, heads, grid_size=grid_size, ratio=sr_ratios[stage], **shared)
            if token_grid is num_tokens is None:  # the paper's contrast tokens, whatever the image size
                grid_size = tuple(map(max, grid_size, grids[stage]))
            place = dict(grid_size=grid_size, token_grid=grids[stage], depth=depth)
            return create_attention(attention, dim, heads, **place, **shared, **options)

        super().__init__(
            create_layer,
            stem=(4, 4, 0),
            merge=(2, 2, 0),
            positions=True,
            final_norm=False,
            eps=1e-6,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
        )


SPECS = {
    "pvt_tiny": (dict(attention="sr"), "PVT-Tiny, 224 px, with spatial reduction 8-4-2-1."),
    "vca_pvt_tiny": (dict(attention="vca"), "PVT-Tiny, 224 px, with 3x3, 4x4, 7x7 and 7x7 contrast tokens."),
}
FEATURES = dict(out_indices=(0, 1, 2, 3), feature_cls="getter")
MODELS = tuple(SPECS)
default_cfgs = generate_default_cfgs({name: imagenet_cfg() for name in MODELS})

for _name, (_spec, _doc) in SPECS.items():
    _create = entry_point(__name__, _name, PyramidVisionTransformer, _spec, FEATURES, _doc)
    globals()[_name] = register_model(_create)
