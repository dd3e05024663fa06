"""The equations of Visual-Contrast Attention as pure tensor functions (arXiv 2511.00833, section 3).

Those that ask for a type, a size or the grad mode are leaves of the graphs that torch.fx traces.

Shapes: B batch, H heads, BH = B * H, d channels per head, C = H * d, T = P + N tokens (P prefix tokens, then N patches
of an `Hg x Wg` grid, row-major), n = h * w contrast tokens, S streams: 2, (positive, negative), or the positive alone.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor

RMS_EPS = 1e-5
IN_PLACE_FROM = 2**19  # elements; below, a softmax on the CPU is faster into new memory, as the caches hold both
STAGE1, STAGE2, STAGE2_JOINT = (3,), (2,), (1, 2)  # the axes of (BH, S, n, T) that the softmax of a stage runs over


def lambda_init(depth: int) -> float:
    """Initial lambda of the block with 0-based index `depth`: 0.8 - 0.6 exp(-0.3 depth)."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def upcast(x: Tensor) -> Tensor:
    """Half-precision tensors as float32; float32 and float64 unchanged."""
    return x.float() if x.dtype.itemsize < 4 else x


@register_notrace_function
@torch.fx.wrap
def contrast_lambda(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, init: float) -> Tensor:
    """lambda = exp(q1 . k1) - exp(q2 . k2) + init, a scalar, in at least float32. Vectors have shape (d,)."""
    return torch.dot(upcast(q1), upcast(k1)).exp() - torch.dot(upcast(q2), upcast(k2)).exp() + init


def as_image(tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Patch tokens (B, N, C) as a channels-last view (B, C, Hg, Wg), without a copy."""
    batch, _, dim = tokens.shape
    return tokens.view(batch, *grid_size, dim).permute(0, 3, 1, 2)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) -> (BH, T, d), without a copy if B is 1."""
    batch, length, dim = tokens.shape
    return tokens.view(batch, length, num_heads, dim // num_heads).transpose(1, 2).flatten(0, 1)


@register_notrace_function
@torch.fx.wrap
def pool_queries(
    q: Tensor, grid_size: tuple[int, int], token_grid: tuple[int, int], query: Tensor | None = None
) -> Tensor:
    """Adaptive average pooling of the patch queries, weighted within each cell if `query` is given.

    The learned weights of a cell are softmax(a . q_i) over its patches, for one vector a per head, as the quotient of
    two average poolings. A score more than 60 below the largest of its head counts as 60 below.

    Args:
        q: patch queries (B, N, C).
        grid_size: rows and columns of the patches.
        token_grid: rows and columns (h, w) of the cells; they may overlap.
        query: the vectors a, (H, d); zero gives exactly the average.

    Returns:
        (B, n, C), in at least float32 if `query` is given.
    """
    if query is not None:
        heads = upcast(q).unflatten(-1, query.shape)
        scores = (heads * upcast(query)).sum(-1, keepdim=True)
        weights = (scores - scores.amax(1, keepdim=True)).clamp(min=-60).exp()
        weighted = pool_queries((heads * weights).flatten(2), grid_size, token_grid).unflatten(-1, query.shape)
        return (weighted / pool_queries(weights.flatten(2), grid_size, token_grid)[..., None]).flatten(2)
    image, (rows, cols), (h, w) = as_image(q, grid_size), grid_size, token_grid
    if rows % h or cols % w:
        pooled = F.adaptive_avg_pool2d(image, token_grid)
    else:
        pooled = F.avg_pool2d(image, (rows // h, cols // w))  # the same, faster
    return pooled.permute(0, 2, 3, 1).flatten(1, 2)


@register_notrace_function
@torch.fx.wrap
def contrast_tokens(pooled: Tensor | None, embeds: tuple[Tensor, Tensor] | None, num_heads: int, batch: int) -> Tensor:
    """The two streams t+- = pool + e+-, one after the other, scaled by d^-1/2 for both stages.

    Args:
        pooled: pooled queries (B, n, C), or None for streams made of their embeddings alone.
        embeds: positive and negative embedding (n, C), or None for streams made of the pooled queries alone.
        num_heads: H.
        batch: B.

    Returns:
        (BH, 2 * n, d).
    """
    if pooled is not None:
        streams = [pooled, pooled] if embeds is None else [pooled + embed for embed in embeds]
    elif embeds is not None:
        streams = [embed.expand(batch, -1, -1) for embed in embeds]
    else:
        raise ValueError("contrast tokens need pooled queries, embeddings or both.")
    tokens = torch.cat(streams, dim=1).mul_((streams[0].shape[-1] // num_heads) ** -0.5)
    return split_heads(tokens, num_heads)


def softmax(scores: Tensor, dim: int, in_place: bool) -> Tensor:
    """Softmax in at least float32. `in_place` reuses the memory of `scores` if they are large (inference only)."""
    if in_place and scores.dtype in (torch.float32, torch.float64) and scores.numel() >= IN_PLACE_FROM:
        return torch.softmax(scores, dim, out=scores)
    return torch.softmax(scores, dim, dtype=torch.promote_types(scores.dtype, torch.float32))


def softmax_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt d) in at least float32: (..., T, d), (..., S, d) -> (..., T, S); rows sum to 1."""
    return softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1), -1, in_place=False)


def stream_maps(tokens: Tensor, x: Tensor, axes: tuple[int, ...], both: bool = True, in_place: bool = False) -> Tensor:
    """The maps A+- of one stage, a softmax of t+- x^T / sqrt d; those of Stage II are *transposed*.

    Args:
        tokens: both streams of contrast tokens, scaled (BH, 2 * n, d).
        x: keys in Stage I, queries in Stage II (BH, T, d).
        axes: `STAGE1`, `STAGE2` or `STAGE2_JOINT`; the sum of the maps over these axes is 1.
        both: False for the positive stream alone.
        in_place: see `softmax`.

    Returns:
        (BH, S, n, T).
    """
    chosen = tokens if both else tokens[:, : tokens.shape[1] // 2]
    scores = torch.bmm(chosen, x.transpose(1, 2))
    if axes == STAGE2_JOINT:
        return softmax(scores, 1, in_place).unflatten(1, (1 + both, -1))
    return softmax(scores.unflatten(1, (1 + both, -1)), axes[0], in_place)


def subtract_streams(streams: Tensor, lam: Tensor | None, in_place: bool = False) -> Tensor:
    """D = A+ - lambda A-: (..., 2, n, T) -> (..., n, T), or A+ of a single stream (..., 1, n, T) without lambda.

    `in_place` overwrites the positive stream.
    """
    if lam is None:
        return streams.squeeze(-3)
    positive, negative = streams.unbind(-3)
    subtract = positive.addcmul_ if in_place else positive.addcmul
    return subtract(negative, lam, value=-1)


def rms_scale(x: Tensor, gain: float, eps: float = RMS_EPS) -> Tensor:
    """The row factor of RMSNorm times `gain`: gain / sqrt(mean(x^2) + eps), (..., d) -> (..., 1)."""
    x = upcast(x)
    return ((x * x).sum(-1, keepdim=True) * (1 / (gain**2 * x.shape[-1])) + eps / gain**2).rsqrt()


def apply_map(difference: Tensor, values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """D1 v (BH, n, d) or D2 vhat (BH, T, d), of the map (BH, n, T), in the type of the values."""
    rows = difference if axes == STAGE1 else difference.transpose(1, 2)
    return torch.bmm(rows.to(values.dtype), values)


@register_notrace_function
@torch.fx.wrap
def contrast(
    tokens: Tensor, x: Tensor, values: Tensor, lam: Tensor | None, gain: float, axes: tuple[int, ...]
) -> Tensor:
    """One stage: the differential map times the values, RMS-normalised and times `gain`, without its learned gains.

    Args:
        tokens, x, axes: see `stream_maps`.
        values: v (BH, T, d) in Stage I, vhat (BH, n, d) in Stage II.
        lam: lambda, a scalar; None for the positive stream alone.
        gain: 1 - lambda_init.

    Returns:
        (BH, n, d) in Stage I, (BH, T, d) in Stage II.
    """
    in_place = not torch.is_grad_enabled()
    streams = stream_maps(tokens, x, axes, lam is not None, in_place)
    out = apply_map(subtract_streams(streams, lam, in_place), values, axes)
    scale = rms_scale(out, gain).to(out.dtype)
    return out.mul_(scale) if in_place else out * scale


@register_notrace_function
@torch.fx.wrap
def add_product(base: Tensor, x: Tensor, gain: Tensor) -> Tensor:
    """base + x * gain, in the memory of `base` if no gradient is recorded."""
    return base.addcmul(x, gain) if torch.is_grad_enabled() else base.addcmul_(x, gain)


def join(
    gathered: Tensor, v: Tensor, gain: Tensor, weight: Tensor, bias: Tensor, grid_size: tuple[int, int], prefix: int
) -> Tensor:
    """The heads' outputs times their gain, joined, plus the depthwise 3x3 convolution of the patches' values.

    Args:
        gathered: what Stage II gives, (B, H, P + N, d).
        v: values (B, H, P + N, d), a view of (B, P + N, H, d).
        gain: of the norm in Stage II, (d).
        weight, bias: of the convolution, (C, 1, 3, 3) and (C), C = H * d.
        grid_size: rows and columns of the patches.
        prefix: P, tokens before the patches, which get no convolution.

    Returns:
        (B, P + N, C).
    """
    out, values = gathered.transpose(1, 2), v.transpose(1, 2)  # (B, P + N, H, d)
    image = as_image(values[:, prefix:].flatten(2), grid_size)  # (B, C, Hg, Wg)
    local = F.conv2d(image, weight, bias, padding=1, groups=weight.shape[0])
    local = local.permute(0, 2, 3, 1).flatten(1, 2).view(out[:, prefix:].shape)  # (B, N, H, d)
    gain = gain.to(out.dtype)
    if prefix:
        out = torch.cat([out[:, :prefix] * gain, add_product(local, out[:, prefix:], gain)], dim=1)
    else:
        out = add_product(local, out, gain)
    return out.flatten(2)


def attend(
    qkv: Tensor,
    parameters: Sequence[Tensor],
    grid_size: tuple[int, int],
    token_grid: tuple[int, int],
    prefix: int,
    init: float,
) -> Tensor:
    """What the paper's layer does between its projections.

    Args:
        qkv: what the first projection gives, (B, P + N, 3 * C).
        parameters: the embeddings of the positive and the negative contrast tokens, (n, C); the vectors q1, k1, q2, k2
            of lambda in Stage I and in Stage II, (d); the gain of the norm in each stage, (d); weight (C, 1, 3, 3) and
            bias (C) of the convolution.
        grid_size, token_grid: rows and columns of the patches, and of the cells from which contrast tokens are pooled.
        prefix: P, tokens before the patches.
        init: lambda_init.

    Returns:
        (B, P + N, C).
    """
    embeds, vectors, (gain1, gain2, weight, bias) = parameters[:2], parameters[2:10], parameters[10:]
    batch, dim, d = len(qkv), qkv.shape[2] // 3, len(gain1)
    pooled = pool_queries(qkv[:, prefix:, :dim], grid_size, token_grid)
    tokens = contrast_tokens(pooled, embeds, dim // d, batch).to(qkv.dtype)
    q, k, v = qkv.unflatten(2, (3, dim // d, d)).transpose(1, 3).unbind(2)  # (B, H, T, d)
    lambda1, lambda2 = contrast_lambda(*vectors[:4], init), contrast_lambda(*vectors[4:], init)
    values = contrast(tokens, k.flatten(0, 1), v.flatten(0, 1), lambda1, 1 - init, STAGE1) * gain1
    gathered = contrast(tokens, q.flatten(0, 1), values.to(qkv.dtype), lambda2, 1 - init, STAGE2)
    return join(gathered.unflatten(0, q.shape[:2]), v, gain2, weight, bias, grid_size, prefix)


def effective_map(d1: Tensor, r1: Tensor | None, d2: Tensor | None = None, r2: Tensor | None = None) -> Tensor:
    """The exact map from tokens to tokens: E = diag(r2) D2 diag(r1) D1, or diag(r1) D1 of a single stage.

    The heads' output is E v, times the gains of the norms that an attention kind has, plus its depthwise convolution;
    for Visual-Contrast Attention (E v) * g1 * g2.

    Args:
        d1: map of the first stage (B, H, n, T), or of the only one (..., T, T).
        r1: its row factors (..., 1), `rms_scale` of D1 v; None where the kind does not normalise.
        d2: map of the second stage (B, H, T, n).
        r2: its row factors (B, H, T, 1), `rms_scale` of D2 vhat.

    Returns:
        (B, H, T, T), of rank at most n if there are two stages.
    """
    first = d1 if r1 is None else r1 * d1
    if d2 is None:
        return first
    return (d2 if r2 is None else r2 * d2) @ first


def split_windows(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Cuts a grid into windows, both row-major: (B, Hg, Wg, C) -> (B, windows, M, C), M = h * w patches a window."""
    (h, w), (batch, rows, cols, dim) = window_size, x.shape
    x = x.reshape(batch, rows // h, h, cols // w, w, dim).transpose(2, 3)
    return x.reshape(batch, rows // h * (cols // w), h * w, dim)


def join_windows(x: Tensor, window_size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """Undoes `split_windows`: (B, windows, M, C) -> (B, Hg, Wg, C)."""
    (h, w), (rows, cols) = window_size, grid_size
    x = x.reshape(x.shape[0], rows // h, cols // w, h, w, x.shape[-1]).transpose(2, 3)
    return x.reshape(x.shape[0], rows, cols, x.shape[-1])


def window_patches(grid_size: tuple[int, int], window_size: tuple[int, int], shift_size: tuple[int, int]) -> Tensor:
    """Which patch stands where in shifted windows: (windows, M) indices into the row-major grid, -1 for padding.

    As Swin does it, the grid is first rolled up and left by `shift_size` and then padded at the bottom and the right.
    """
    rows, cols = grid_size
    patches = torch.arange(rows * cols).view(rows, cols).roll((-shift_size[0], -shift_size[1]), (0, 1))
    patches = F.pad(patches, (0, -cols % window_size[1], 0, -rows % window_size[0]), value=-1)
    return split_windows(patches[None, ..., None], window_size)[0, ..., 0]
