"""Visual-Contrast Attention as a drop-in replacement for the self-attention layer of a vision transformer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vca import functional as VF

TOKENS = ("pool+emb", "emb", "pool")
STAGE2_SOFTMAX = ("separate", "joint")


@dataclass(frozen=True)
class StageMaps:
    """The maps of one stage. Rows are queries, columns keys; streams an attention kind lacks are None."""

    positive: Tensor
    negative: Tensor | None = None
    differential: Tensor | None = None


class ContrastStage(nn.Module):
    """The learned parts of one stage: the lambda vectors and the gain of the RMSNorm, all of length d."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.lambda_q1 = nn.Parameter(torch.empty(head_dim))
        self.lambda_k1 = nn.Parameter(torch.empty(head_dim))
        self.lambda_q2 = nn.Parameter(torch.empty(head_dim))
        self.lambda_k2 = nn.Parameter(torch.empty(head_dim))
        self.norm = nn.RMSNorm(head_dim, eps=VF.RMS_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)
        self.norm.reset_parameters()

    def contrast_lambda(self, init: float) -> Tensor:
        return VF.contrast_lambda(self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2, init)


class VisualContrastAttention(nn.Module):
    """Two-stage differential attention through n pooled contrast tokens (arXiv 2511.00833, section 3).

    Stage I lets n positive and n negative contrast tokens, pooled from the queries, attend to all tokens; Stage II lets
    all tokens attend to the contrast tokens. Each stage uses the difference of its two softmax maps, so the cost is
    linear in the number of tokens.

    Args:
        dim: channels C; divisible by `num_heads`.
        num_heads: heads H, each with d = C / H channels.
        grid_size: rows and columns (Hg, Wg) of the patch grid.
        token_grid: rows and columns (h, w) of the contrast tokens, n = h * w; at most `grid_size` in each direction.
        num_prefix_tokens: class, register and distillation tokens before the patches. They attend and are attended to,
            but are not pooled and get no depthwise convolution.
        depth: 0-based index of the block in the whole network; sets `lambda_init`.
        qkv_bias: bias in the qkv projection.
        proj_drop: dropout after the output projection.
        dwc: add a depthwise 3x3 convolution of the values.
        tokens: what a contrast token is made of: the pooled query, a learned embedding, or their sum.
        stage2_softmax: one softmax per stream, or one over the tokens of both.

    Raises:
        ValueError: the arguments contradict one another; the message says how.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
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
    ):
        super().__init__()
        grid_size, token_grid = tuple(grid_size), tuple(token_grid)
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}.")
        if any(t > g or t < 1 for t, g in zip(token_grid, grid_size, strict=True)):
            raise ValueError(f"token_grid={token_grid} must lie between 1x1 and the patch grid {grid_size}.")
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens={num_prefix_tokens} is negative.")
        if tokens not in TOKENS:
            raise ValueError(f"tokens={tokens!r} is unknown; choose one of {', '.join(TOKENS)}.")
        if stage2_softmax not in STAGE2_SOFTMAX:
            raise ValueError(
                f"stage2_softmax={stage2_softmax!r} is unknown; choose one of {', '.join(STAGE2_SOFTMAX)}."
            )
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.token_grid = token_grid
        self.num_prefix_tokens = num_prefix_tokens
        self.tokens = tokens
        self.stage2_softmax = stage2_softmax
        self.lambda_init = VF.lambda_init(depth)

        num_tokens = token_grid[0] * token_grid[1]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        with_embed = tokens != "pool"
        self.positive_embed = nn.Parameter(torch.empty(num_tokens, dim)) if with_embed else None
        self.negative_embed = nn.Parameter(torch.empty(num_tokens, dim)) if with_embed else None
        self.stage1 = ContrastStage(dim // num_heads)
        self.stage2 = ContrastStage(dim // num_heads)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if dwc else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws e+- from a standard normal; every submodule initialises itself."""
        if self.positive_embed is not None:
            nn.init.normal_(self.positive_embed)
            nn.init.normal_(self.negative_embed)

    def no_weight_decay(self) -> set[str]:
        """The two-dimensional parameters that are embeddings rather than weights."""
        return {"positive_embed", "negative_embed"}

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, grid_size={self.grid_size}, token_grid={self.token_grid}, "
            f"num_prefix_tokens={self.num_prefix_tokens}, tokens={self.tokens!r}, "
            f"stage2_softmax={self.stage2_softmax!r}"
        )

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Attends over (B, P + N, C) and returns the same shape.

        Raises:
            ValueError: the number of tokens is not P + Hg * Wg, or a mask is given: VCA has no masked form.
        """
        return self._attend(x, attn_mask, is_causal, keep_maps=False)[0]

    def forward_with_maps(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> tuple[Tensor, dict]:
        """Like `forward`, and also returns the maps of both stages; `vca.record` is the comfortable way to them.

        Returns:
            The output (B, P + N, C), and `stage1` with maps (B, H, n, P + N), `stage2` with maps (B, H, P + N, n),
            their row factors `row_scale1`, `row_scale2` and the scalars `lambda1`, `lambda2`.
        """
        return self._attend(x, attn_mask, is_causal, keep_maps=True)

    def _attend(self, x: Tensor, attn_mask: None, is_causal: bool, keep_maps: bool) -> tuple[Tensor, dict]:
        if attn_mask is not None or is_causal:
            raise ValueError("Visual-Contrast Attention has no masked form: attn_mask and is_causal are not supported.")
        batch, length, dim = x.shape
        prefix, (rows, cols) = self.num_prefix_tokens, self.grid_size
        if length != prefix + rows * cols:
            raise ValueError(
                f"got {length} tokens, but this layer is set to {prefix} prefix tokens and a {rows}x{cols} grid "
                f"({prefix + rows * cols} tokens); set its grid_size to the grid of the input."
            )
        in_place = not keep_maps and not torch.is_grad_enabled()

        qkv = self.qkv(x)
        q_tokens, _, v_tokens = qkv[:, prefix:].split(dim, dim=-1)
        q, k, v = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

        pooled = None if self.tokens == "emb" else VF.pool_queries(q_tokens, self.grid_size, self.token_grid)
        embed = None if self.tokens == "pool" else torch.stack([self.positive_embed, self.negative_embed])
        tokens = VF.contrast_tokens(pooled, embed, self.num_heads).to(q.dtype)
        gain = 1 - self.lambda_init

        lambda1 = self.stage1.contrast_lambda(self.lambda_init)
        streams1 = VF.stage1_streams(tokens, k, in_place)
        d1 = VF.subtract_streams(streams1, lambda1, in_place)
        v_contrast = d1.to(v.dtype) @ v
        row_scale1 = VF.rms_scale(v_contrast, gain)
        v_hat = (v_contrast * (row_scale1 * self.stage1.norm.weight)).to(v.dtype)

        lambda2 = self.stage2.contrast_lambda(self.lambda_init)
        streams2 = VF.stage2_streams(tokens, q, self.stage2_softmax == "joint", in_place)
        d2 = VF.subtract_streams(streams2, lambda2, in_place).transpose(-2, -1)
        out = d2.to(v.dtype) @ v_hat
        row_scale2 = VF.rms_scale(out, gain)

        out, scale = out.transpose(1, 2), (row_scale2 * self.stage2.norm.weight).to(out.dtype).transpose(1, 2)
        if self.dwc is None:
            out = out * scale
        else:
            local = self.dwc(VF.as_image(v_tokens, self.grid_size)).permute(0, 2, 3, 1)
            local = local.reshape(batch, rows * cols, self.num_heads, -1)
            patches = torch.addcmul(local, out[:, prefix:], scale[:, prefix:])
            out = torch.cat([out[:, :prefix] * scale[:, :prefix], patches], dim=1) if prefix else patches
        out = self.proj_drop(self.proj(out.reshape(batch, length, dim)))

        if not keep_maps:
            return out, {}
        streams2 = streams2.transpose(-2, -1)
        return out, dict(
            stage1=StageMaps(streams1[:, :, 0], streams1[:, :, 1], d1),
            stage2=StageMaps(streams2[:, :, 0], streams2[:, :, 1], d2),
            row_scale1=row_scale1,
            row_scale2=row_scale2,
            lambda1=lambda1,
            lambda2=lambda2,
        )
