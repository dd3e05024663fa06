"""The one factory for every kind of attention."""

import math

from timm.layers import Attention, DiffAttention
from torch import nn

from vca.layers.agent import AgentAttention
from vca.layers.depthwise import DepthwiseConvAttention
from vca.layers.visual_contrast import VisualContrastAttention

KINDS = ("vca", "mhsa", "mhsa_dwc", "vca_stage1", "vca_stage2", "diff", "agent")


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
