"""CSwin Transformer (arXiv 2107.00652) with cross-shaped windows, or Visual-Contrast Attention in its early stages.

`cswin_tiny` has the depths 2-4-18-1 and cross-shaped attention everywhere. `vca_cswin_tiny` attends over the whole grid
in stages 1 and 2; there the depthwise convolution of the layer is what LePE is in a stripe.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vca import functional as VF
from vca.layers.depthwise import depthwise_conv3x3, local_term
from vca.layers.factory import check_kind, create_attention, token_grids
from vca.layers.grid import OnGrid
from vca.layers.stage_maps import StageMaps
from vca.models.common import entry_point, imagenet_cfg
from vca.models.pyramid import Pyramid

TOKEN_GRIDS = [(3, 3), (4, 4)]


@register_notrace_module
class StripeAttention(OnGrid, nn.Module):
    """Self-attention within the stripes of a grid, plus LePE: a depthwise convolution of the values in each stripe.

    Args:
        dim, num_heads, grid_size: see `vca.VisualContrastAttention`.
        width: rows of a horizontal or columns of a vertical stripe; None for one window, the whole grid.
        vertical: whether stripes run from top to bottom.
    """

    def __init__(self, dim: int, num_heads: int, *, grid_size, width: int | None, vertical: bool):
        super().__init__()
        self.grid_size = tuple(grid_size)
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

    def forward(self, qkv: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Attends with queries, keys and values (B, N, 3, C) and returns (B, N, C)."""
        return self._attend(qkv, grid_size, keep_maps=False)[0]

    def forward_with_maps(self, qkv: Tensor, grid_size: tuple[int, int] | None = None) -> tuple[Tensor, dict]:
        """Like `forward`, and also gives fields of `vca.LayerMaps`: `stage1` with one map (B, stripes, H, M, M)."""
        return self._attend(qkv, grid_size, keep_maps=True)

    def _attend(self, qkv: Tensor, grid_size: tuple[int, int] | None, keep_maps: bool) -> tuple[Tensor, dict]:
        grid_size = self.checked_grid(qkv.shape[1], grid_size)
        window = self.window_size(grid_size)
        batch, dim = len(qkv), qkv.shape[-1]
        stripes = VF.split_windows(qkv.flatten(2).unflatten(1, grid_size), window)
        heads = stripes.flatten(0, 1).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        fields = dict(kind="stripes", grid_size=grid_size, window_size=window, shift_size=(0, 0))
        if keep_maps:
            attention = VF.softmax_map(q, k)
            out = attention.to(v.dtype) @ v
            fields["stage1"] = StageMaps(attention.unflatten(0, (batch, -1)))
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).flatten(2) + local_term(self.lepe, stripes.flatten(0, 1)[..., 2 * dim :], window)
        return VF.join_windows(out.unflatten(0, (batch, -1)), window, grid_size).flatten(1, 2), fields


@register_notrace_module
class CrossShapedAttention(OnGrid, nn.Module):
    """Half the heads attend in vertical stripes, the other half in horizontal ones; or all over the whole grid.

    Args:
        dim, num_heads, grid_size, qkv_bias, proj_drop: see `vca.VisualContrastAttention`.
        width: of the stripes; None for attention over the whole grid.
    """

    def __init__(self, dim: int, num_heads: int, *, grid_size, width: int | None, qkv_bias: bool, proj_drop: float):
        super().__init__()
        self.grid_size = tuple(grid_size)
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
        grid_size = self.checked_grid(x.shape[1], grid_size)
        parts = self.qkv(x).unflatten(-1, (3, -1)).chunk(len(self.branches), dim=-1)
        out = [branch(part, grid_size=grid_size) for branch, part in zip(self.branches, parts, strict=True)]
        return self.proj_drop(self.proj(torch.cat(out, dim=-1)))


class CSwinTransformer(Pyramid):
    """CSwin Transformer, or the same with another attention over the whole grid of the first stages.

    Args:
        attention: of stages 1 and 2, "cross" for cross-shaped windows, or one of `vca.layers.factory.KINDS`.
        split_sizes: width of the stripes in each stage; None for attention over the whole grid.
        qkv_bias: bias in the projection to queries, keys and values.
        token_grid: rows and columns of the contrast tokens, for both stages or one for each; default 3x3, 4x4.
        num_tokens: their number, a square, instead of `token_grid`; for both stages or one for each.
        tokens, dwc, stage2_softmax, pooling: see `vca.VisualContrastAttention`.
        The others: see `Pyramid`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        split_sizes: Sequence[int | None] = (1, 2, 7, None),
        qkv_bias: bool = True,
        attention: str = "cross",
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
        check_kind(attention, more=("cross",))
        grids = token_grids(token_grid, num_tokens, TOKEN_GRIDS)
        shared = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate)
        options = dict(tokens=tokens, dwc=dwc, stage2_softmax=stage2_softmax, pooling=pooling)

        def create_layer(stage, depth, dim, heads, grid_size):
            if attention == "cross" or stage >= len(grids):
                return CrossShapedAttention(dim, heads, grid_size=grid_size, width=split_sizes[stage], **shared)
            place = dict(grid_size=grid_size, token_grid=grids[stage], depth=depth)
            return create_attention(attention, dim, heads, **place, **shared, **options)

        super().__init__(
            create_layer,
            stem=(7, 4, 2),
            merge=(3, 2, 1),
            positions=False,
            final_norm=True,
            eps=1e-5,
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

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """As `Pyramid.set_input_size`; refused, before anything is changed, if stripes do not fill a new grid."""
        for stage, grid_size in zip(self.stages, self.grids(img_size), strict=True):
            for layer in stage.modules():
                if isinstance(layer, StripeAttention):
                    layer.window_size(grid_size)
        super().set_input_size(img_size)


SPECS = {
    "cswin_tiny": (dict(attention="cross"), "CSwin-Tiny, 224 px, with stripes 1-2-7 wide and whole-grid attention."),
    "vca_cswin_tiny": (
        dict(attention="vca"),
        "CSwin-Tiny, 224 px, with 3x3 and 4x4 contrast tokens in stages 1 and 2.",
    ),
}
FEATURES = dict(out_indices=(0, 1, 2, 3), feature_cls="getter")
MODELS = tuple(SPECS)
default_cfgs = generate_default_cfgs({name: imagenet_cfg() for name in MODELS})

for _name, (_spec, _doc) in SPECS.items():
    _create = entry_point(__name__, _name, CSwinTransformer, _spec, FEATURES, _doc)
    globals()[_name] = register_model(_create)
