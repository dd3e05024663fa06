"""Every kind of attention: its options, and the one factory that builds its layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from timm.layers import Attention, DiffAttention, to_2tuple
from torch import nn

from vca.layers.agent import AgentAttention
from vca.layers.depthwise import DepthwiseConvAttention
from vca.layers.visual_contrast import VisualContrastAttention

KINDS = ("vca", "mhsa", "mhsa_dwc", "vca_stage1", "vca_stage2", "diff", "agent")

Grid = tuple[int, int]


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of a model, as its arguments, its checkpoints and the recipes name it.

    Attributes:
        attention: "vca"; "vca_stage1" and "vca_stage2", with contrast in one stage only; "agent", `AgentAttention`;
            "diff", timm's `DiffAttention` over all tokens; "mhsa", timm's `Attention`; "mhsa_dwc",
            `DepthwiseConvAttention`. Models may have kinds of their own beside these `KINDS`.
        token_grid: rows and columns of the contrast tokens, for all stages of a network or one for each. If neither
            this nor `num_tokens` is given, the model chooses.
        num_tokens: their number, a square, instead of `token_grid`; for all stages or one for each.
        tokens, stage2_softmax, pooling: of the VCA kinds, see `VisualContrastAttention`.
        dwc: of the VCA kinds and of "agent": add a depthwise 3x3 convolution of the values.
    """

    attention: str = "vca"
    token_grid: Grid | Sequence[Grid] | None = None
    num_tokens: int | Sequence[int] | None = None
    tokens: str = "pool+emb"
    dwc: bool = True
    stage2_softmax: str = "separate"
    pooling: str = "avg"

    @classmethod
    def pop_from(cls, arguments: dict, *, default: str, more: tuple[str, ...] = ()) -> "AttentionConfig":
        """Takes the options of attention out of the keyword arguments of a model.

        Args:
            arguments: the keyword arguments; what is taken is removed.
            default: the kind of attention if there is no `attention` among them.
            more: kinds that the model knows beside `KINDS`.

        Raises:
            ValueError: the kind is unknown; the message names those there are.
        """
        taken = {field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments}
        config = cls(**{"attention": default} | taken)
        config.check_kind(more)
        return config

    def check_kind(self, more: tuple[str, ...] = ()) -> None:
        """Raises a ValueError that names the kinds of attention, if this is neither one of them nor among `more`."""
        if self.attention not in KINDS + more:
            raise ValueError(f"attention={self.attention!r} is unknown; choose one of {', '.join(KINDS + more)}.")

    def token_grids(self, default: Sequence[Grid]) -> list[Grid]:
        """The contrast token grid of every stage of a network; `default` if neither grid nor number is given.

        Raises:
            ValueError: both are given, a number is not a square, or there are not as many as stages.
        """
        return token_grids(self.token_grid, self.num_tokens, default)

    def create(
        self,
        dim: int,
        num_heads: int,
        *,
        grid_size: Grid,
        token_grid: Grid,
        num_prefix_tokens: int = 0,
        depth: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> nn.Module:
        """Builds a layer of this kind; what a kind does not have is ignored, so that kinds can be exchanged.

        Args:
            dim, num_heads, grid_size, num_prefix_tokens, qkv_bias, proj_drop: see `VisualContrastAttention`.
            token_grid: that of the layer; of the VCA kinds and of "agent".
            depth: 0-based index of the block in the whole network; of the VCA kinds and of "diff".

        Raises:
            ValueError: the kind is unknown, or its arguments contradict one another.
        """
        self.check_kind()
        kind = self.attention
        shared: dict[str, Any] = dict(qkv_bias=qkv_bias, proj_drop=proj_drop)
        geometry: dict[str, Any] = dict(grid_size=grid_size, num_prefix_tokens=num_prefix_tokens)
        if kind == "mhsa":
            return Attention(dim, num_heads, **shared)
        if kind == "diff":
            if dim % (2 * num_heads):
                raise ValueError(f"attention='diff' halves the heads: dim={dim} is not divisible by 2 * {num_heads}.")
            return DiffAttention(dim, num_heads, depth=depth, **shared)
        if kind == "mhsa_dwc":
            return DepthwiseConvAttention(dim, num_heads, **geometry, **shared)
        if kind == "agent":
            return AgentAttention(dim, num_heads, token_grid=token_grid, dwc=self.dwc, **geometry, **shared)
        return VisualContrastAttention(
            dim,
            num_heads,
            token_grid=token_grid,
            depth=depth,
            dwc=self.dwc,
            tokens=self.tokens,
            stage2_softmax=self.stage2_softmax,
            pooling=self.pooling,
            stage1_differential=kind != "vca_stage2",
            stage2_differential=kind != "vca_stage1",
            **geometry,
            **shared,
        )


def create_attention(
    kind: str,
    dim: int,
    num_heads: int,
    *,
    grid_size: Grid,
    token_grid: Grid,
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
        kind: one of `KINDS`, see `AttentionConfig`.
        dim: channels C; divisible by `num_heads`.
        num_heads: heads H, each with d = C / H channels.
        grid_size: rows and columns (Hg, Wg) of the patch grid.
        token_grid: rows and columns (h, w) of the contrast tokens, at most `grid_size` in each direction; of the VCA
            kinds and of "agent".
        num_prefix_tokens: class, register and distillation tokens before the patches.
        depth: 0-based index of the block in the whole network; of the VCA kinds and of "diff".
        qkv_bias: bias in the projection to queries, keys and values.
        proj_drop: dropout after the output projection.
        dwc: add a depthwise 3x3 convolution of the values; of the VCA kinds and of "agent".
        tokens, stage2_softmax, pooling: of the VCA kinds, see `VisualContrastAttention`.

    Raises:
        ValueError: the kind is unknown, or its arguments contradict one another.
    """
    config = AttentionConfig(kind, tokens=tokens, dwc=dwc, stage2_softmax=stage2_softmax, pooling=pooling)
    return config.create(
        dim,
        num_heads,
        grid_size=grid_size,
        token_grid=token_grid,
        num_prefix_tokens=num_prefix_tokens,
        depth=depth,
        qkv_bias=qkv_bias,
        proj_drop=proj_drop,
    )


def token_grids(
    token_grid: Grid | Sequence[Grid] | None, num_tokens: int | Sequence[int] | None, default: Sequence[Grid]
) -> list[Grid]:
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
        grids: list[Any] = [(side, side) for side in sides]
    elif token_grid is None:
        grids = list(default)
    elif isinstance(token_grid[0], int):
        grids = [token_grid] * stages
    else:
        grids = list(token_grid)
    if len(grids) != stages:
        raise ValueError(f"{len(grids)} token grids are given for {stages} stages.")
    return [to_2tuple(grid) for grid in grids]
