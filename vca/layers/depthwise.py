"""The depthwise convolution of the values, and self-attention with it."""

import torch.nn.functional as F
from timm.layers import Attention, register_notrace_module, to_2tuple
from torch import Tensor, nn

from vca import functional as VF
from vca.layers.change import UNCHANGED, Change
from vca.layers.grid import OnGrid
from vca.layers.layer_maps import GlobalMaps, LayerMaps, StageMaps


def local_term(convolution: nn.Conv2d, v: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Depthwise convolution of the patch values on their grid: (B, N, C) -> (B, N, C)."""
    return convolution(VF.as_image(v, grid_size)).permute(0, 2, 3, 1).flatten(1, 2)


def depthwise_conv3x3(dim: int) -> nn.Conv2d:
    """The 3x3 convolution with bias of each of `dim` channels on its own; it keeps the grid's size."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


@register_notrace_module
class DepthwiseConvAttention(OnGrid, Attention):
    """timm's self-attention plus the depthwise convolution of the values that comes with Visual-Contrast Attention.

    Args:
        dim: channels C; divisible by `num_heads`.
        num_heads: heads H, each with d = C / H channels.
        grid_size: rows and columns (Hg, Wg) of the patch grid.
        num_prefix_tokens: class, register and distillation tokens before the patches; they get no convolution.
        qkv_bias: bias in the qkv projection.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        grid_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop)
        self.grid_size = to_2tuple(grid_size)
        self.num_prefix_tokens = num_prefix_tokens
        self.dwc = depthwise_conv3x3(dim)

    def forward(
        self, x: Tensor, attn_mask: None = None, is_causal: bool = False, grid_size=None, change: Change = UNCHANGED
    ) -> Tensor:
        """Attends over (B, P + N, C) and returns the same shape; `change` is that of `vca.intervene`."""
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=False, change=change)[0]

    def forward_with_maps(
        self, x: Tensor, attn_mask: None = None, is_causal: bool = False, grid_size=None, change: Change = UNCHANGED
    ):
        """Like `forward`, and also returns the maps: `stage1` has one, (B, H, T, T)."""
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=True, change=change)

    def _attend(self, x: Tensor, attn_mask: None, is_causal: bool, grid_size, keep_maps: bool, change: Change):
        x, grid_size = self.checked(x, grid_size, attn_mask, is_causal)
        prefix = self.num_prefix_tokens
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        maps: LayerMaps | None = None
        if keep_maps:
            attention = change.heads(VF.softmax_map(q, k))  # (B, H, T, T)
            out = attention.to(v.dtype) @ v
            maps = GlobalMaps(
                kind="mhsa_dwc",
                grid_size=grid_size,
                num_prefix_tokens=prefix,
                stage1=StageMaps(attention),
                values=v,
                gathered=out,
            )
        else:
            out = change.heads(F.scaled_dot_product_attention(q, k, v))
        out = add_local(out.transpose(1, 2).flatten(2), self.dwc, v, grid_size, prefix)  # (B, T, C)
        return self.proj_drop(self.proj(out)), maps


def add_local(out: Tensor, convolution: nn.Conv2d | None, v: Tensor, grid_size: tuple[int, int], prefix: int) -> Tensor:
    """Adds the depthwise convolution of the values (B, H, T, d) to the patches of `out` (B, T, C)."""
    if convolution is None:
        return out
    local = local_term(convolution, v.transpose(1, 2).flatten(2)[:, prefix:], grid_size)
    return out + F.pad(local, (0, 0, prefix, 0))
