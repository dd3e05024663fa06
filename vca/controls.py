"""What Visual-Contrast Attention is compared with, and the one factory for every kind of attention."""

import math

import torch.nn.functional as F
from timm.layers import Attention, DiffAttention, register_notrace_module
from torch import Tensor, nn

from vca import functional as VF
from vca.attention import StageMaps, VisualContrastAttention, depthwise_conv3x3, local_term
from vca.grid import OnGrid, check_token_grid

KINDS = ("vca", "mhsa", "mhsa_dwc", "vca_stage1", "vca_stage2", "diff", "agent")


def refuse_mask(attn_mask: None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal are not supported by this attention.")


@register_notrace_module
class AgentAttention(OnGrid, nn.Module):
    """Softmax attention in two stages through n pooled queries, without contrast (Agent Attention, arXiv 2312.08874).

    The same pooling, token count and depthwise convolution as in `VisualContrastAttention`, but one stream, no
    embedding, no lambda and no norm: o = softmax(q t^T / sqrt d) softmax(t k^T / sqrt d) v. The position biases of the
    published layer are left out.

    Args:
        dim, num_heads, grid_size, token_grid, num_prefix_tokens, qkv_bias, proj_drop, dwc: see
            `VisualContrastAttention`.
    """

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
        self.grid_size, self.token_grid = tuple(grid_size), tuple(token_grid)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}.")
        check_token_grid(self.token_grid, self.grid_size)
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.dwc = depthwise_conv3x3(dim) if dwc else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False, grid_size=None) -> Tensor:
        """Attends over (B, P + N, C) and returns the same shape."""
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=False)[0]

    def forward_with_maps(self, x: Tensor, attn_mask: None = None, is_causal: bool = False, grid_size=None):
        """Like `forward`, and also gives fields of `vca.LayerMaps`: `stage1` (B, H, n, T), `stage2` (B, H, T, n)."""
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=True)

    def _attend(self, x: Tensor, attn_mask: None, is_causal: bool, grid_size, keep_maps: bool) -> tuple[Tensor, dict]:
        refuse_mask(attn_mask, is_causal)
        grid_size = self.checked_grid(x.shape[1], grid_size)
        qkv = self.qkv(x)
        pooled = VF.pool_queries(qkv[:, self.num_prefix_tokens :, : x.shape[2]], grid_size, self.token_grid)
        agents = pooled.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if keep_maps:
            first, second = VF.softmax_map(agents, k), VF.softmax_map(q, agents)
            out = second.to(v.dtype) @ (first.to(v.dtype) @ v)
            fields = dict(stage1=StageMaps(first), stage2=StageMaps(second), values=v, gathered=out)
        else:
            out = F.scaled_dot_product_attention(q, agents, F.scaled_dot_product_attention(agents, k, v))
            fields = {}
        out = add_local(out.transpose(1, 2).flatten(2), self.dwc, v, grid_size, self.num_prefix_tokens)
        place = dict(kind="agent", grid_size=grid_size, num_prefix_tokens=self.num_prefix_tokens)
        return self.proj_drop(self.proj(out)), place | dict(token_grid=self.token_grid) | fields


@register_notrace_module
class DepthwiseConvAttention(OnGrid, Attention):
    """timm's self-attention plus the depthwise convolution of the values that comes with Visual-Contrast Attention.

    Args:
        dim, num_heads, grid_size, num_prefix_tokens, qkv_bias, proj_drop: see `VisualContrastAttention`.
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
        self.grid_size = tuple(grid_size)
        self.num_prefix_tokens = num_prefix_tokens
        self.dwc = depthwise_conv3x3(dim)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False, grid_size=None) -> Tensor:
        """Attends over (B, P + N, C) and returns the same shape."""
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=False)[0]

    def forward_with_maps(self, x: Tensor, attn_mask: None = None, is_causal: bool = False, grid_size=None):
        """Like `forward`, and also returns the fields of `vca.LayerMaps`: `stage1` with one map (B, H, T, T)."""
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=True)

    def _attend(self, x: Tensor, attn_mask: None, is_causal: bool, grid_size, keep_maps: bool) -> tuple[Tensor, dict]:
        refuse_mask(attn_mask, is_causal)
        grid_size = self.checked_grid(x.shape[1], grid_size)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if keep_maps:
            attention = VF.softmax_map(q, k)
            out = attention.to(v.dtype) @ v
            fields = dict(stage1=StageMaps(attention), values=v, gathered=out)
        else:
            out, fields = F.scaled_dot_product_attention(q, k, v), {}
        out = add_local(out.transpose(1, 2).flatten(2), self.dwc, v, grid_size, self.num_prefix_tokens)
        place = dict(kind="mhsa_dwc", grid_size=grid_size, num_prefix_tokens=self.num_prefix_tokens)
        return self.proj_drop(self.proj(out)), place | fields


def add_local(out: Tensor, convolution: nn.Conv2d | None, v: Tensor, grid_size: tuple[int, int], prefix: int) -> Tensor:
    """Adds the depthwise convolution of the values (B, H, T, d) to the patches of `out` (B, T, C)."""
    if convolution is None:
        return out
    local = local_term(convolution, v.transpose(1, 2).flatten(2)[:, prefix:], grid_size)
    return out + F.pad(local, (0, 0, prefix, 0))


def create_attention(
    kind: str,
    dim: int,
    num_heads: int,
    *,
    grid_size: tuple[int, int],
    token_grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    depth: int = 0,
    qkv_bias: bool = True,
    proj_drop: float = 0.0,
    dwc: bool = True,
    tokens: str = "pool+emb",
    stage2_softmax: str = "separate",
    pooling: str = "avg",
) -> nn.Module:
    """Builds an attention layer of any kind; what a kind does not have is ignored, so that kinds can be exchanged.

    Args:
        kind: "vca"; "vca_stage1" and "vca_stage2", with contrast in one stage only; "agent", `AgentAttention`; "diff",
            timm's `DiffAttention` over all tokens; "mhsa", timm's `Attention`; "mhsa_dwc", `DepthwiseConvAttention`.
        dim, num_heads, grid_size, num_prefix_tokens, qkv_bias, proj_drop: see `VisualContrastAttention`.
        token_grid, dwc: of the VCA kinds and of "agent".
        depth: of the VCA kinds and of "diff".
        tokens, stage2_softmax, pooling: of the VCA kinds.

    Raises:
        ValueError: the kind is unknown, or its arguments contradict one another.
    """
    check_kind(kind)
    shared = dict(qkv_bias=qkv_bias, proj_drop=proj_drop)
    place = dict(grid_size=grid_size, num_prefix_tokens=num_prefix_tokens)
    if kind == "mhsa":
        return Attention(dim, num_heads, **shared)
    if kind == "diff":
        if dim % (2 * num_heads):
            raise ValueError(f"attention='diff' halves the heads: dim={dim} is not divisible by 2 * {num_heads}.")
        return DiffAttention(dim, num_heads, depth=depth, **shared)
    if kind == "mhsa_dwc":
        return DepthwiseConvAttention(dim, num_heads, **place, **shared)
    if kind == "agent":
        return AgentAttention(dim, num_heads, token_grid=token_grid, dwc=dwc, **place, **shared)
    return VisualContrastAttention(
        dim,
        num_heads,
        token_grid=token_grid,
        depth=depth,
        dwc=dwc,
        tokens=tokens,
        stage2_softmax=stage2_softmax,
        pooling=pooling,
        stage1_differential=kind != "vca_stage2",
        stage2_differential=kind != "vca_stage1",
        **place,
        **shared,
    )


def check_kind(kind: str, more: tuple[str, ...] = ()) -> None:
    """Raises a ValueError that names the kinds of attention, if `kind` is neither one of them nor among `more`."""
    if kind not in KINDS + more:
        raise ValueError(f"attention={kind!r} is unknown; choose one of {', '.join(KINDS + more)}.")


def token_grids(
    token_grid: tuple[int, int] | list[tuple[int, int]] | None,
    num_tokens: int | list[int] | None,
    default: list[tuple[int, int]],
) -> list[tuple[int, int]]:
    """The contrast token grid of every stage, from one for all or one for each, as rows and columns or as a square n.

    Raises:
        ValueError: both are given, a number is not a square, or there are not as many as stages.
    """
    stages = len(default)
    if num_tokens is not None:
        if token_grid is not None:
            raise ValueError(f"num_tokens={num_tokens} and token_grid={token_grid} are both given; give one.")
        numbers = [num_tokens] * stages if isinstance(num_tokens, int) else num_tokens
        sides = [math.isqrt(max(number, 0)) for number in numbers]
        if any(side * side != number or not side for side, number in zip(sides, numbers, strict=True)):
            raise ValueError(f"num_tokens={num_tokens} is not a square; give token_grid=(rows, columns).")
        grids = [(side, side) for side in sides]
    elif token_grid is None:
        grids = default
    elif isinstance(token_grid[0], int):
        grids = [token_grid] * stages
    else:
        grids = token_grid
    if len(grids) != stages:
        raise ValueError(f"{len(grids)} token grids are given for {stages} stages.")
    return [tuple(grid) for grid in grids]
