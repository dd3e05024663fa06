"""Visual-Contrast Attention written a second time, straight from its equations, to check the implementation against.

NumPy in float64, one image and one head at a time, every step spelled out. Nothing here is shared with `vca`: it reads
the parameters from a layer's state dict by name. Only the tests use it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

EPS = 1e-5


@dataclass
class Reference:
    """All that the equations define, for a batch: maps (B, H, rows, columns), output (B, P + N, C)."""

    output: np.ndarray
    values: np.ndarray  # (B, H, P + N, d)
    local: np.ndarray  # (B, P + N, C), the depthwise convolution, zero for prefix tokens
    stage1_positive: np.ndarray
    stage1_negative: np.ndarray
    stage1_differential: np.ndarray
    stage2_positive: np.ndarray
    stage2_negative: np.ndarray
    stage2_differential: np.ndarray
    effective: np.ndarray
    lambda1: float
    lambda2: float


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax of every row."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def lambda_init(depth: int) -> float:
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def pool(image: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Mean over the cells [floor(i * Hg / h), ceil((i + 1) * Hg / h)): (Hg, Wg, C) -> (h * w, C), row-major."""
    height, width, _ = image.shape
    means = []
    for i in range(rows):
        top, bottom = math.floor(i * height / rows), math.ceil((i + 1) * height / rows)
        for j in range(cols):
            left, right = math.floor(j * width / cols), math.ceil((j + 1) * width / cols)
            means.append(image[top:bottom, left:right].reshape(-1, image.shape[2]).mean(axis=0))
    return np.stack(means)


def depthwise_conv3x3(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Every channel with its own 3x3 kernel, zeros outside the image: (Hg, Wg, C), (C, 1, 3, 3), (C,)."""
    height, width, _ = image.shape
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros_like(image) + bias
    for dy in range(3):
        for dx in range(3):
            out += padded[dy : dy + height, dx : dx + width] * weight[:, 0, dy, dx]
    return out


def contrast_lambda(p: dict[str, np.ndarray], stage: str, init: float) -> float:
    first = math.exp(float(p[f"{stage}.lambda_q1"] @ p[f"{stage}.lambda_k1"]))
    second = math.exp(float(p[f"{stage}.lambda_q2"] @ p[f"{stage}.lambda_k2"]))
    return first - second + init


def row_factors(rows: np.ndarray, gain: float) -> np.ndarray:
    """What RMSNorm times `gain` multiplies every row with, (n, d) -> (n, 1)."""
    return gain / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + EPS)


def parameters(layer: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().to(torch.float64).numpy() for name, tensor in layer.state_dict().items()}


def visual_contrast_attention(
    p: dict[str, np.ndarray],
    x: torch.Tensor,
    *,
    num_heads: int,
    grid_size: tuple[int, int],
    token_grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    depth: int = 0,
    tokens: str = "pool+emb",
    stage2_softmax: str = "separate",
    lambdas: tuple[float | None, float | None] = (None, None),
    scales: tuple[float, float] = (1.0, 1.0),
    off: tuple[str, ...] = (),
    muted: tuple[int, ...] = (),
) -> Reference:
    """Runs the equations on `x` (B, P + N, C) with the parameters `p` of a layer.

    The last four change them: lambdas that are not learned, their multiples, streams without maps and stages without
    scores, and heads whose last map is zero.
    """
    x = x.detach().to(torch.float64).numpy()
    dim = x.shape[-1]
    d = dim // num_heads
    init = lambda_init(depth)
    lambda1, lambda2 = (
        scale * (contrast_lambda(p, stage, init) if given is None else given)
        for stage, given, scale in zip(("stage1", "stage2"), lambdas, scales, strict=True)
    )
    gain1, gain2 = p["stage1.norm.weight"], p["stage2.norm.weight"]
    names = ("positive1", "negative1", "d1", "positive2", "negative2", "d2", "effective", "v")
    batch = {name: [] for name in names}
    outputs, locals_ = [], []

    for tokens_in in x:
        projected = tokens_in @ p["qkv.weight"].T + p.get("qkv.bias", 0.0)
        q_all, k_all, v_all = projected[:, :dim], projected[:, dim : 2 * dim], projected[:, 2 * dim :]

        pooled = 0.0 if tokens == "emb" else pool(q_all[num_prefix_tokens:].reshape(*grid_size, dim), *token_grid)
        t_positive = pooled if tokens == "pool" else pooled + p["positive_embed"]
        t_negative = pooled if tokens == "pool" else pooled + p["negative_embed"]

        local = np.zeros_like(tokens_in)
        if "dwc.weight" in p:
            image = v_all[num_prefix_tokens:].reshape(*grid_size, dim)
            local[num_prefix_tokens:] = depthwise_conv3x3(image, p["dwc.weight"], p["dwc.bias"]).reshape(-1, dim)

        heads = {name: [] for name in names}
        mixed = np.zeros_like(tokens_in)
        for head in range(num_heads):
            own = slice(head * d, (head + 1) * d)
            q, k, v, t_pos, t_neg = q_all[:, own], k_all[:, own], v_all[:, own], t_positive[:, own], t_negative[:, own]

            positive1 = softmax(t_pos @ k.T / math.sqrt(d))
            negative1 = softmax(t_neg @ k.T / math.sqrt(d))
            if "stage1" in off:
                positive1 = np.full_like(positive1, 1 / len(k))
                negative1 = np.full_like(negative1, 1 / len(k))
            if "positive" in off:
                positive1 = np.zeros_like(positive1)
            if "negative" in off:
                negative1 = np.zeros_like(negative1)
            d1 = positive1 - lambda1 * negative1
            gathered = d1 @ v
            r1 = row_factors(gathered, 1 - init)
            v_hat = r1 * gathered * gain1

            scores_pos, scores_neg = q @ t_pos.T / math.sqrt(d), q @ t_neg.T / math.sqrt(d)
            if stage2_softmax == "joint":
                both = softmax(np.concatenate([scores_pos, scores_neg], axis=-1))
                positive2, negative2 = both[:, : len(t_pos)], both[:, len(t_pos) :]
            else:
                positive2, negative2 = softmax(scores_pos), softmax(scores_neg)
            if "stage2" in off:
                count = len(t_pos) * (2 if stage2_softmax == "joint" else 1)
                positive2, negative2 = np.full_like(positive2, 1 / count), np.full_like(negative2, 1 / count)
            if "positive" in off:
                positive2 = np.zeros_like(positive2)
            if "negative" in off:
                negative2 = np.zeros_like(negative2)
            d2 = positive2 - lambda2 * negative2
            if head in muted:
                d2 = np.zeros_like(d2)
            spread = d2 @ v_hat
            r2 = row_factors(spread, 1 - init)
            mixed[:, own] = r2 * spread * gain2

            effective = (r2 * d2) @ (r1 * d1)
            found = (positive1, negative1, d1, positive2, negative2, d2, effective, v)
            for name, value in zip(names, found, strict=True):
                heads[name].append(value)

        outputs.append((mixed + local) @ p["proj.weight"].T + p["proj.bias"])
        locals_.append(local)
        for name in names:
            batch[name].append(np.stack(heads[name]))

    stacked = {name: np.stack(images) for name, images in batch.items()}
    return Reference(
        output=np.stack(outputs),
        values=stacked["v"],
        local=np.stack(locals_),
        stage1_positive=stacked["positive1"],
        stage1_negative=stacked["negative1"],
        stage1_differential=stacked["d1"],
        stage2_positive=stacked["positive2"],
        stage2_negative=stacked["negative2"],
        stage2_differential=stacked["d2"],
        effective=stacked["effective"],
        lambda1=lambda1,
        lambda2=lambda2,
    )
