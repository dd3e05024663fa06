"""How attention layers are told the patch grid they work on, and the block that tells them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

_in_this_thread = threading.local()


@contextmanager
def running_on(grid_size: tuple[int, int]) -> Iterator[None]:
    """Tells the layers with `dynamic_grid` that this thread runs inside the block which grid their tokens form."""
    outer = getattr(_in_this_thread, "grid_size", None)
    _in_this_thread.grid_size = grid_size
    try:
        yield
    finally:
        _in_this_thread.grid_size = outer


def check_token_grid(token_grid: tuple[int, int] | None, grid_size: tuple[int, int]) -> None:
    """Raises a ValueError if a grid of pooled tokens is finer than the patch grid; None stands for no pooling."""
    if token_grid and any(t > g or t < 1 for t, g in zip(token_grid, grid_size, strict=True)):
        raise ValueError(f"token_grid={token_grid} must lie between 1x1 and the patch grid {grid_size}.")


class OnGrid:
    """A layer over P prefix tokens and an `Hg x Wg` grid of patches, row-major. It never guesses the grid.

    A call brings its grid along; if not, a layer with `dynamic_grid` takes that of `running_on`, and every other layer
    its own `grid_size`. A layer may be told any grid, also one coarser than its `token_grid`, whose cells then overlap.
    """

    grid_size: tuple[int, int]
    token_grid: tuple[int, int] | None = None
    num_prefix_tokens: int = 0
    dynamic_grid: bool = False

    def checked(
        self, x: Tensor, grid_size: tuple[int, int] | None, attn_mask: None = None, is_causal: bool = False
    ) -> tuple[Tensor, tuple[int, int]]:
        """The tokens x (B, T, ...) of a call, and their grid.

        Raises:
            ValueError: T is not P + Hg * Wg, or a mask is given.
        """
        if grid_size is None and self.dynamic_grid:
            grid_size = getattr(_in_this_thread, "grid_size", None)
        rows, cols = self.grid_size if grid_size is None else grid_size
        return checked_tokens(x, self.num_prefix_tokens, (rows, cols), attn_mask, is_causal), (rows, cols)


@register_notrace_function
@torch.fx.wrap
def checked_tokens(
    x: Tensor, prefix: int, grid_size: tuple[int, int], attn_mask: None = None, is_causal: bool = False
) -> Tensor:
    """x itself, so that the check stays in a traced graph; see `OnGrid.checked`."""
    if attn_mask is not None or is_causal:
        raise ValueError("this attention has no masked form: attn_mask and is_causal are not supported.")
    length, (rows, cols) = x.shape[1], grid_size
    if length != prefix + rows * cols:
        raise ValueError(
            f"got {length} tokens, but this layer is set to {prefix} prefix tokens and a {rows}x{cols} grid "
            f"({prefix + rows * cols} tokens); set its grid_size to the grid of the input."
        )
    return x


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    """Runs an attention layer over all patches of a grid: (B, Hg, Wg, C) -> (B, Hg, Wg, C)."""
    batch, rows, cols, dim = x.shape
    tokens = x.reshape(batch, rows * cols, dim)
    y = layer(tokens, **(dict(grid_size=(rows, cols)) if isinstance(layer, OnGrid) else {}))
    return y.reshape(batch, rows, cols, dim)


class GridBlock(nn.Module):
    """Pre-norm transformer block over a grid (B, Hg, Wg, C), with attention over all of it.

    Its parts have the names of timm's `SwinTransformerBlock`, whose place it takes.
    """

    def __init__(
        self,
        norm1: nn.Module,
        attn: nn.Module,
        drop_path1: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        drop_path2: nn.Module,
    ):
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = norm1, attn, drop_path1
        self.norm2, self.mlp, self.drop_path2 = norm2, mlp, drop_path2

    def _attn(self, x: Tensor) -> Tensor:
        return attend(self.attn, x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def set_input_size(self, feat_size: tuple[int, int], window_size=None, always_partition=None) -> None:
        """Tells the attention its new grid. The window arguments of Swin's stages have no meaning here."""
        if isinstance(self.attn, OnGrid):
            self.attn.grid_size = feat_size[0], feat_size[1]
