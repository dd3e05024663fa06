"""The equations of Visual-Contrast Attention as pure tensor functions (arXiv 2511.00833, section 3).

Shapes: B batch, H heads, d channels per head, C = H * d, T = P + N tokens (P prefix tokens, then N patches of an
`Hg x Wg` grid, row-major), n = h * w contrast tokens. The stream axis of size 2 is (positive, negative).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-5


def lambda_init(depth: int) -> float:
    """Initial lambda of the block with 0-based index `depth`: 0.8 - 0.6 exp(-0.3 depth)."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def upcast(x: Tensor) -> Tensor:
    """Half-precision tensors as float32; float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def contrast_lambda(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, init: float) -> Tensor:
    """lambda = exp(q1 . k1) - exp(q2 . k2) + init, a scalar, in at least float32. Vectors have shape (d,)."""
    q1, k1, q2, k2 = (upcast(p) for p in (q1, k1, q2, k2))
    return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + init


def as_image(tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Patch tokens (B, N, C) as a channels-last view (B, C, Hg, Wg), without a copy."""
    return tokens.unflatten(1, grid_size).permute(0, 3, 1, 2)


def pool_queries(q: Tensor, grid_size: tuple[int, int], token_grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of the patch queries: (B, N, C) -> (B, n, C)."""
    return F.adaptive_avg_pool2d(as_image(q, grid_size), token_grid).flatten(2).transpose(1, 2)


def contrast_tokens(pooled: Tensor | None, embed: Tensor | None, num_heads: int) -> Tensor:
    """The two streams t+- = pool + e+-, scaled by d^-1/2 for both stages.

    Args:
        pooled: pooled queries (B, n, C), or None for streams made of their embeddings alone.
        embed: positive and negative embedding (2, n, C), or None for streams made of the pooled queries alone.
        num_heads: H.

    Returns:
        (B, H, 2, n, d); B is 1 if `pooled` is None.
    """
    if embed is None:
        tokens = pooled[:, None].expand(-1, 2, -1, -1)
    elif pooled is None:
        tokens = embed[None]
    else:
        tokens = pooled[:, None] + embed
    tokens = tokens.unflatten(-1, (num_heads, -1))
    return tokens.permute(0, 3, 1, 2, 4) * tokens.shape[-1] ** -0.5


def softmax(scores: Tensor, dim: int, in_place: bool) -> Tensor:
    """Softmax in at least float32. `in_place` reuses the memory of `scores` (inference only)."""
    if in_place and scores.dtype in (torch.float32, torch.float64):
        return torch.softmax(scores, dim, out=scores)
    return torch.softmax(scores, dim, dtype=torch.promote_types(scores.dtype, torch.float32))


def stage1_streams(tokens: Tensor, k: Tensor, in_place: bool = False) -> Tensor:
    """A1+- = softmax(t+- k^T / sqrt d): (B, H, 2, n, d), (B, H, T, d) -> (B, H, 2, n, T); rows sum to 1."""
    scores = tokens.flatten(2, 3) @ k.transpose(-2, -1)
    return softmax(scores, -1, in_place).unflatten(2, tokens.shape[2:4])


def stage2_streams(tokens: Tensor, q: Tensor, joint: bool = False, in_place: bool = False) -> Tensor:
    """A2+- = softmax(q t+-^T / sqrt d), *transposed*: (B, H, 2, n, d), (B, H, T, d) -> (B, H, 2, n, T).

    Every query's column sums to 1 in each stream, or over both streams together if `joint`.
    """
    streams = tokens.shape[2:4]
    scores = tokens.flatten(2, 3) @ q.transpose(-2, -1)
    if joint:
        return softmax(scores, 2, in_place).unflatten(2, streams)
    return softmax(scores.unflatten(2, streams), 3, in_place)


def subtract_streams(streams: Tensor, lam: Tensor, in_place: bool = False) -> Tensor:
    """D = A+ - lambda A-: (B, H, 2, n, T) -> (B, H, n, T). `in_place` overwrites the positive stream."""
    positive, negative = streams.unbind(2)
    if in_place:
        return positive.sub_(negative.mul_(lam))
    return positive - lam * negative


def rms_scale(x: Tensor, gain: float, eps: float = RMS_EPS) -> Tensor:
    """The row factor of RMSNorm times `gain`: gain / sqrt(mean(x^2) + eps), (..., d) -> (..., 1)."""
    x = upcast(x)
    return gain * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)


def effective_map(d1: Tensor, r1: Tensor, d2: Tensor, r2: Tensor) -> Tensor:
    """The exact map from patches to patches, E = diag(r2) D2 diag(r1) D1.

    The attention output before the depthwise convolution and `proj` is (E v) * g1 * g2.

    Args:
        d1: Stage I differential map (B, H, n, T).
        r1: Stage I row factors (B, H, n, 1), `rms_scale` of D1 v.
        d2: Stage II differential map (B, H, T, n).
        r2: Stage II row factors (B, H, T, 1), `rms_scale` of D2 vhat.

    Returns:
        (B, H, T, T), of rank at most n.
    """
    return (r2 * d2) @ (r1 * d1)
