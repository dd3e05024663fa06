"""Agent attention: two stages through pooled queries, without contrast."""

import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple
from torch import Tensor, nn

from vca import functional as VF
from vca.layers.change import UNCHANGED, Change
from vca.layers.depthwise import add_local, depthwise_conv3x3
from vca.layers.grid import OnGrid, check_token_grid
from vca.layers.layer_maps import LayerMaps, StageMaps, TwoStageMaps


@register_notrace_module
class AgentAttention(OnGrid, nn.Module):
    """Softmax attention in two stages through n pooled queries, without contrast (Agent Attention, arXiv 2312.08874).

    The same pooling, token count and depthwise convolution as in `VisualContrastAttention`, but one stream, no
    embedding, no lambda and no norm: o = softmax(q t^T / sqrt d) softmax(t k^T / sqrt d) v. The position biases of the
    published layer are left out.

    Args:
        dim: channels C; divisible by `num_heads`.
        num_heads: heads H, each with d = C / H channels.
        grid_size: rows and columns (Hg, Wg) of the patch grid.
        token_grid: rows and columns (h, w) of the pooled queries, n = h * w; at most `grid_size` in each direction.
        num_prefix_tokens: class, register and distillation tokens before the patches; they are not pooled and get no
            depthwise convolution.
        qkv_bias: bias in the qkv projection.
        proj_drop: dropout after the output projection.
        dwc: add a depthwise 3x3 convolution of the values.

    Raises:
        ValueError: the arguments contradict one another; the message says how.
    """

    token_grid: tuple[int, int]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        grid_size: tuple[int, int],
        token_grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        dwc: bool = True,
    ):
        super().__init__()
        self.grid_size, self.token_grid = to_2tuple(grid_size), to_2tuple(token_grid)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}.")
        check_token_grid(self.token_grid, self.grid_size)
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.dwc = depthwise_conv3x3(dim) if dwc else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_mask: None = None, is_causal: bool = False, grid_size=None, change: Change = UNCHANGED
    ) -> Tensor:
        """Attends over (B, P + N, C) and returns the same shape; `change` is that of `vca.intervene`."""
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=False, change=change)[0]

    def forward_with_maps(
        self, x: Tensor, attn_mask: None = None, is_causal: bool = False, grid_size=None, change: Change = UNCHANGED
    ):
        """Like `forward`, and also returns the maps: `stage1` (B, H, n, T), `stage2` (B, H, T, n)."""
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=True, change=change)

    def _attend(self, x: Tensor, attn_mask: None, is_causal: bool, grid_size, keep_maps: bool, change: Change):
        x, grid_size = self.checked(x, grid_size, attn_mask, is_causal)
        prefix = self.num_prefix_tokens
        qkv = self.qkv(x)  # (B, T, 3C)
        pooled = VF.pool_queries(qkv[:, prefix:, : x.shape[2]], grid_size, self.token_grid)  # (B, n, C)
        agents = pooled.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, n, d)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        q, k = change.scored(2, q), change.scored(1, k)
        maps: LayerMaps | None = None
        if keep_maps:
            first = VF.softmax_map(agents, k)  # (B, H, n, T)
            second = change.heads(VF.softmax_map(q, agents))  # (B, H, T, n)
            out = second.to(v.dtype) @ (first.to(v.dtype) @ v)
            maps = TwoStageMaps(
                kind="agent",
                grid_size=grid_size,
                token_grid=self.token_grid,
                num_prefix_tokens=prefix,
                stage1=StageMaps(first),
                stage2=StageMaps(second),
                values=v,
                gathered=out,
            )
        else:
            out = change.heads(F.scaled_dot_product_attention(q, agents, F.scaled_dot_product_attention(agents, k, v)))
        out = add_local(out.transpose(1, 2).flatten(2), self.dwc, v, grid_size, prefix)  # (B, T, C)
        return self.proj_drop(self.proj(out)), maps
