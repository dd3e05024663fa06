"""Triton kernels of the two stages of Visual-Contrast Attention and of their gradients (arXiv 2511.00833, section 3).

Shapes are those of `vca.functional`. What has the length of the sequence is a view (B, H, T, d) with any strides whose
channels are adjacent, so that q, k and v are read from the output of one projection; what has the length of the
contrast tokens is contiguous, (BH, 2 * n, d) or (BH, n, d). Products accumulate in float32.

A program takes one head and a part of the sequence, so that a small batch fills the device as well. Stage I is the
online softmax over a split sequence of FlashAttention (arXiv 2205.14135) and Flash-Decoding, with the 2 * n contrast
tokens as queries; Stage II needs none, its softmax runs over n <= 64 numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vca import functional as VF
from vca.kernels.layout import empty_sequence

RMS_EPS = tl.constexpr(VF.RMS_EPS)
PROGRAMS = 256  # about as many as fill a large GPU


@triton.jit
def load_rows(start, rows, stride, count, channels, d):
    mask = (rows < count)[:, None] & (channels < d)[None, :]
    return tl.load(start + rows[:, None] * stride + channels[None, :], mask=mask, other=0.0)


@triton.jit
def load_streams(start, rows, n, channels, d):
    """The positive and the negative stream, which follow one another: twice (ROWS, D)."""
    return load_rows(start, rows, d, n, channels, d), load_rows(start + n * d, rows, d, n, channels, d)


@triton.jit
def store_rows(start, rows, stride, count, channels, d, x):
    mask = (rows < count)[:, None] & (channels < d)[None, :]
    tl.store(start + rows[:, None] * stride + channels[None, :], x.to(start.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b):
    """a b in float32, of a rounded to the type of b."""
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def dot_unrounded(a, b):
    """a b of a float32 a, which is split into two numbers where b has half precision."""
    product = dot(a, b)
    if b.dtype != tl.float32:
        product += dot(a - a.to(b.dtype).to(tl.float32), b)
    return product


@triton.jit
def rms_scale(x, d, gain):
    return gain * tl.rsqrt(tl.sum(x * x, 1) / d + RMS_EPS)[:, None]


@triton.jit
def rms_backward(grad, x, d, gain):
    """The gradient of x in x * rms_scale(x)."""
    scale = rms_scale(x, d, gain)
    return scale * (grad - x * (scale * scale / (gain * gain * d)) * tl.sum(grad * x, 1)[:, None])


@triton.jit
def stage1_kernel(
    tokens, k, v, products, norms, k_b, k_h, k_t, v_b, v_h, v_t, heads, length, n, d, part,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A+- v (BH, parts, 2 * n, d), and the maxima and sums of the softmax, for one part of the keys.

    `norms` is (2, BH, parts, 2 * n): first the maxima of the scores, then the sums of exp(score - maximum).
    """
    head, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, D)
    t = load_rows(tokens + head * 2 * n * d, rows, d, 2 * n, channels, d)
    k += head // heads * k_b + head % heads * k_h
    v += head // heads * v_b + head % heads * v_h

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS, D], tl.float32)
    for start in range(index * part, tl.minimum(index * part + part, length), BLOCK):
        keys = start + tl.arange(0, BLOCK)
        scores = dot(t, tl.trans(load_rows(k, keys, k_t, length, channels, d)))
        scores = tl.where((keys < length)[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights, decay = tl.exp(scores - higher[:, None]), tl.exp(maximum - higher)
        total = total * decay + tl.sum(weights, 1)
        # The two streams nearly cancel: rounding each before they are subtracted would lose the contrast.
        product = product * decay[:, None] + dot_unrounded(weights, load_rows(v, keys, v_t, length, channels, d))
        maximum = higher

    slot = (head * tl.num_programs(1) + index) * 2 * n
    sums = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * 2 * n
    store_rows(products + slot * d, rows, d, 2 * n, channels, d, product / total[:, None])
    tl.store(norms + slot + rows, maximum, mask=rows < 2 * n)
    tl.store(norms + sums + slot + rows, total, mask=rows < 2 * n)


@triton.jit
def merge_parts(products, norms, sums, parts, n, d, rows, channels, ROWS: tl.constexpr, D: tl.constexpr):
    """A v (ROWS, D), and the maximum and the sum of the softmax of one stream, from those of every part of the keys."""
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS, D], tl.float32)
    for index in range(parts):
        found = tl.load(norms + index * 2 * n + rows, mask=rows < n, other=0.0)
        higher = tl.maximum(maximum, found)
        decay = tl.exp(maximum - higher)
        share = tl.load(norms + sums + index * 2 * n + rows, mask=rows < n, other=1.0) * tl.exp(found - higher)
        new = load_rows(products + index * 2 * n * d, rows, d, n, channels, d)
        product = product * decay[:, None] + new * share[:, None]
        total = total * decay + share
        maximum = higher
    return product / total[:, None], maximum, total


@triton.jit
def stage1_merge_kernel(
    part_products, part_norms, lam, out, products, norms, parts, n, d, gain, ROWS: tl.constexpr, D: tl.constexpr
):
    """The parts together, the difference of the streams, and its RMSNorm."""
    head = tl.program_id(0).to(tl.int64)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, D)
    sums = tl.num_programs(0).to(tl.int64) * 2 * n  # of all heads, where the sums of the softmax follow its maxima
    part_products += head * parts * 2 * n * d
    part_norms += head * parts * 2 * n
    positive, positive_maximum, positive_sum = merge_parts(
        part_products, part_norms, sums * parts, parts, n, d, rows, channels, ROWS, D
    )
    negative, negative_maximum, negative_sum = merge_parts(
        part_products + n * d, part_norms + n, sums * parts, parts, n, d, rows, channels, ROWS, D
    )
    difference = positive - tl.load(lam) * negative
    store_rows(out + head * n * d, rows, d, n, channels, d, difference * rms_scale(difference, d, gain))
    store_rows(products + head * 2 * n * d, rows, d, n, channels, d, positive)
    store_rows(products + (head * 2 + 1) * n * d, rows, d, n, channels, d, negative)
    norms += head * 2 * n + rows
    tl.store(norms, positive_maximum, mask=rows < n)
    tl.store(norms + n, negative_maximum, mask=rows < n)
    tl.store(norms + sums, positive_sum, mask=rows < n)
    tl.store(norms + sums + n, negative_sum, mask=rows < n)


@triton.jit
def stage1_backward_kernel(
    grad, tokens, k, v, lam, products, norms, grad_tokens, grad_k, grad_v, grad_lam,
    k_b, k_h, k_t, v_b, v_h, v_t, heads, length, n, d, gain, part,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of one part of the keys and values, and what that part adds to those of the tokens and lambda."""
    head, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, D)
    lam = tl.load(lam)
    k += head // heads * k_b + head % heads * k_h
    v += head // heads * v_b + head % heads * v_h
    shared = (head // heads * length * heads + head % heads) * d  # the heads of one token are adjacent
    grad_k += shared
    grad_v += shared

    positive_t, negative_t = load_streams(tokens + head * 2 * n * d, rows, n, channels, d)
    norms += head * 2 * n + rows
    sums = tl.num_programs(0).to(tl.int64) * 2 * n
    positive_maximum = tl.load(norms, mask=rows < n, other=float("inf"))[:, None]
    negative_maximum = tl.load(norms + n, mask=rows < n, other=float("inf"))[:, None]
    positive_scale = 1 / tl.load(norms + sums, mask=rows < n, other=1.0)[:, None]
    negative_scale = 1 / tl.load(norms + sums + n, mask=rows < n, other=1.0)[:, None]
    positive, negative = load_streams(products + head * 2 * n * d, rows, n, channels, d)
    grad = load_rows(grad + head * n * d, rows, d, n, channels, d).to(tl.float32)
    grad = rms_backward(grad, positive - lam * negative, d, gain).to(positive_t.dtype)
    positive_mean = tl.sum(grad.to(tl.float32) * positive, 1)[:, None]  # of the map's gradient, weighted by the map
    negative_mean = tl.sum(grad.to(tl.float32) * negative, 1)[:, None]
    if index == 0:
        tl.store(grad_lam + head, -tl.sum(negative_mean))

    grad_positive_t = tl.zeros([ROWS, D], tl.float32)
    grad_negative_t = tl.zeros([ROWS, D], tl.float32)
    for start in range(index * part, tl.minimum(index * part + part, length), BLOCK):
        keys = start + tl.arange(0, BLOCK)
        inside = (keys < length)[None, :]
        key = load_rows(k, keys, k_t, length, channels, d)
        positive_map = tl.where(inside, tl.exp(dot(positive_t, tl.trans(key)) - positive_maximum), 0.0) * positive_scale
        negative_map = tl.where(inside, tl.exp(dot(negative_t, tl.trans(key)) - negative_maximum), 0.0) * negative_scale
        grad_map = dot(grad, tl.trans(load_rows(v, keys, v_t, length, channels, d)))
        store_rows(grad_v, keys, heads * d, length, channels, d, dot(tl.trans(positive_map - lam * negative_map), grad))
        grad_positive = positive_map * (grad_map - positive_mean)
        grad_negative = -lam * negative_map * (grad_map - negative_mean)
        grad_key = dot(tl.trans(grad_positive), positive_t) + dot(tl.trans(grad_negative), negative_t)
        store_rows(grad_k, keys, heads * d, length, channels, d, grad_key)
        grad_positive_t += dot(grad_positive, key)
        grad_negative_t += dot(grad_negative, key)

    grad_tokens += (head * tl.num_programs(1) + index) * 2 * n * d
    store_rows(grad_tokens, rows, d, n, channels, d, grad_positive_t)
    store_rows(grad_tokens + n * d, rows, d, n, channels, d, grad_negative_t)


@triton.jit
def softmax_over_tokens(query, t, inside):
    """softmax(q t^T) over the contrast tokens: (BLOCK, D), (ROWS, D) -> (BLOCK, ROWS)."""
    scores = tl.where(inside, dot(query, tl.trans(t)), float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def stage2_kernel(
    tokens, q, values, lam, out, q_b, q_h, q_t, heads, length, n, d, gain, part,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The outputs of one part of the queries."""
    head, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, D)
    lam = tl.load(lam)
    q += head // heads * q_b + head % heads * q_h
    out += (head // heads * length * heads + head % heads) * d
    positive_t, negative_t = load_streams(tokens + head * 2 * n * d, rows, n, channels, d)
    value = load_rows(values + head * n * d, rows, d, n, channels, d)
    inside = (rows < n)[None, :]
    for start in range(index * part, tl.minimum(index * part + part, length), BLOCK):
        queries = start + tl.arange(0, BLOCK)
        query = load_rows(q, queries, q_t, length, channels, d)
        positive = softmax_over_tokens(query, positive_t, inside)
        negative = softmax_over_tokens(query, negative_t, inside)
        product = dot(positive - lam * negative, value)
        store_rows(out, queries, heads * d, length, channels, d, product * rms_scale(product, d, gain))


@triton.jit
def stage2_backward_kernel(
    grad, tokens, q, values, lam, grad_tokens, grad_q, grad_values, grad_lam,
    q_b, q_h, q_t, heads, length, n, d, gain, part,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of one part of the queries, and what that part adds to those of the tokens, values and lambda."""
    head, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, D)
    lam = tl.load(lam)
    q += head // heads * q_b + head % heads * q_h
    shared = (head // heads * length * heads + head % heads) * d
    grad += shared
    grad_q += shared
    positive_t, negative_t = load_streams(tokens + head * 2 * n * d, rows, n, channels, d)
    value = load_rows(values + head * n * d, rows, d, n, channels, d)
    inside = (rows < n)[None, :]

    grad_positive_t = tl.zeros([ROWS, D], tl.float32)
    grad_negative_t = tl.zeros([ROWS, D], tl.float32)
    grad_value = tl.zeros([ROWS, D], tl.float32)
    total_lam = 0.0
    for start in range(index * part, tl.minimum(index * part + part, length), BLOCK):
        queries = start + tl.arange(0, BLOCK)
        query = load_rows(q, queries, q_t, length, channels, d)
        positive = softmax_over_tokens(query, positive_t, inside)
        negative = softmax_over_tokens(query, negative_t, inside)
        difference = positive - lam * negative
        grad_out = load_rows(grad, queries, heads * d, length, channels, d).to(tl.float32)
        grad_out = rms_backward(grad_out, dot(difference, value), d, gain).to(query.dtype)
        grad_value += dot(tl.trans(difference), grad_out)
        grad_map = dot(grad_out, tl.trans(value))
        negative_mean = tl.sum(grad_map * negative, 1)[:, None]
        total_lam -= tl.sum(negative_mean)
        grad_positive = positive * (grad_map - tl.sum(grad_map * positive, 1)[:, None])
        grad_negative = -lam * negative * (grad_map - negative_mean)
        grad_query = dot(grad_positive, positive_t) + dot(grad_negative, negative_t)
        store_rows(grad_q, queries, heads * d, length, channels, d, grad_query)
        grad_positive_t += dot(tl.trans(grad_positive), query)
        grad_negative_t += dot(tl.trans(grad_negative), query)

    slot = head * tl.num_programs(1) + index
    tl.store(grad_lam + slot, total_lam)
    store_rows(grad_values + slot * n * d, rows, d, n, channels, d, grad_value)
    store_rows(grad_tokens + slot * 2 * n * d, rows, d, n, channels, d, grad_positive_t)
    store_rows(grad_tokens + (slot * 2 + 1) * n * d, rows, d, n, channels, d, grad_negative_t)


def power_of_two(size: int) -> int:
    """The next one that `tl.dot` takes."""
    return max(16, triton.next_power_of_2(size))


def options(x: Tensor) -> dict:
    """Sizes of the tiles, and launch options, for the sequence x (B, H, T, d).

    With larger blocks the backward kernels spill registers to memory.
    """
    d = power_of_two(x.shape[-1])
    return dict(D=d, BLOCK=32 if d <= 64 else 16, num_warps=8, num_stages=2)


def split(x: Tensor, block: int) -> tuple[int, int]:
    """How many parts the sequence x (B, H, T, d) is split into, and how many tokens a part has, whole blocks."""
    batch, heads, length, _ = x.shape
    part = block * triton.cdiv(length, block * max(1, PROGRAMS // max(1, batch * heads)))
    return triton.cdiv(length, part), part


def with_adjacent_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def stage1(tokens: Tensor, k: Tensor, v: Tensor, lam: Tensor, gain: float) -> tuple[Tensor, Tensor, Tensor]:
    """`vca.kernels.ops.contrast_stage1` on a GPU, with its arguments and result."""
    tokens, k, v = tokens.contiguous(), with_adjacent_channels(k), with_adjacent_channels(v)
    (_, heads, length, d), (groups, rows, _), tile = k.shape, tokens.shape, options(k)
    parts, part = split(k, tile["BLOCK"])
    float32 = dict(dtype=torch.float32, device=k.device)
    part_products, products = (torch.empty(groups, p, rows, d, **float32) for p in (parts, 1))
    part_norms, norms = (torch.empty(2, groups, p, rows, **float32) for p in (parts, 1))
    out, n = tokens.new_empty(groups, rows // 2, d), rows // 2
    stage1_kernel[groups, parts](
        tokens, k, v, part_products, part_norms, *k.stride()[:3], *v.stride()[:3], heads, length, n, d, part,
        ROWS=power_of_two(rows), **tile,
    )  # fmt: skip
    stage1_merge_kernel[groups,](
        part_products, part_norms, lam, out, products, norms, parts, n, d, gain,
        ROWS=power_of_two(n), D=tile["D"], num_warps=8,
    )  # fmt: skip
    return out, products.squeeze(1), norms.squeeze(2)


def stage1_backward(
    grad: Tensor, tokens: Tensor, k: Tensor, v: Tensor, lam: Tensor, gain: float, products: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vca.kernels.ops.contrast_stage1_backward` on a GPU, with its arguments and result."""
    grad, tokens, k, v = grad.contiguous(), tokens.contiguous(), with_adjacent_channels(k), with_adjacent_channels(v)
    (_, heads, length, d), (groups, rows, _), tile = k.shape, tokens.shape, options(k)
    parts, part = split(k, tile["BLOCK"])
    grad_tokens = products.new_empty(groups, parts, rows, d)
    grad_k, grad_v, grad_lam = empty_sequence(k), empty_sequence(v), products.new_empty(groups)
    stage1_backward_kernel[groups, parts](
        grad, tokens, k, v, lam, products, norms, grad_tokens, grad_k, grad_v, grad_lam,
        *k.stride()[:3], *v.stride()[:3], heads, length, rows // 2, d, gain, part,
        ROWS=power_of_two(rows // 2), **tile,
    )  # fmt: skip
    return grad_tokens.sum(1).to(tokens.dtype), grad_k, grad_v, grad_lam.sum()


def stage2(tokens: Tensor, q: Tensor, values: Tensor, lam: Tensor, gain: float) -> Tensor:
    """`vca.kernels.ops.contrast_stage2` on a GPU, with its arguments and result."""
    tokens, q, values = tokens.contiguous(), with_adjacent_channels(q), values.contiguous()
    (_, heads, length, d), (groups, rows, _), tile = q.shape, tokens.shape, options(q)
    parts, part = split(q, tile["BLOCK"])
    out = empty_sequence(q)
    stage2_kernel[groups, parts](
        tokens, q, values, lam, out, *q.stride()[:3], heads, length, rows // 2, d, gain, part,
        ROWS=power_of_two(rows // 2), **tile,
    )  # fmt: skip
    return out


def stage2_backward(
    grad: Tensor, tokens: Tensor, q: Tensor, values: Tensor, lam: Tensor, gain: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vca.kernels.ops.contrast_stage2_backward` on a GPU, with its arguments and result."""
    grad = grad.transpose(1, 2).contiguous()
    tokens, q, values = tokens.contiguous(), with_adjacent_channels(q), values.contiguous()
    (_, heads, length, d), (groups, rows, _), tile = q.shape, tokens.shape, options(q)
    parts, part = split(q, tile["BLOCK"])
    float32 = dict(dtype=torch.float32, device=q.device)
    grad_tokens = torch.empty(groups, parts, rows, d, **float32)
    grad_values = torch.empty(groups, parts, rows // 2, d, **float32)
    grad_q, grad_lam = empty_sequence(q), torch.empty(groups, parts, **float32)
    stage2_backward_kernel[groups, parts](
        grad, tokens, q, values, lam, grad_tokens, grad_q, grad_values, grad_lam,
        *q.stride()[:3], heads, length, rows // 2, d, gain, part,
        ROWS=power_of_two(rows // 2), **tile,
    )  # fmt: skip
    return grad_tokens.sum(1).to(tokens.dtype), grad_q, grad_values.sum(1).to(values.dtype), grad_lam.sum()
