"""A vision transformer written a second time, in NumPy and float64, with the changes that `vca.intervene` makes.

Nothing here is shared with `vca` or timm: the parameters are read from a model's state dict by name.
"""

import math

import numpy as np
import torch
from torch import nn

from tests.helpers.reference import parameters, softmax, visual_contrast_attention

NORM_EPS = 1e-6


def layer_norm(x: np.ndarray, p: dict[str, np.ndarray], name: str) -> np.ndarray:
    centered = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centered**2).mean(-1, keepdims=True) + NORM_EPS)
    return centered / scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x: np.ndarray, p: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def embed(images: np.ndarray, p: dict[str, np.ndarray], patch: int) -> np.ndarray:
    """Patches as a stride-`patch` convolution, row by row: (B, C, H, W) -> (B, N, dim)."""
    batch, _, height, width = images.shape
    kernel = p["patch_embed.proj.weight"].reshape(len(p["patch_embed.proj.bias"]), -1)
    rows = [
        images[:, :, top : top + patch, left : left + patch].reshape(batch, -1)
        for top in range(0, height, patch)
        for left in range(0, width, patch)
    ]
    return np.stack(rows, axis=1) @ kernel.T + p["patch_embed.proj.bias"]


def self_attention(p: dict[str, np.ndarray], x: np.ndarray, heads: int, muted: tuple[int, ...]) -> np.ndarray:
    dim = x.shape[-1]
    d = dim // heads
    qkv = linear(x, p, "qkv")
    out = np.zeros_like(x)
    for head in range(heads):
        if head not in muted:
            q, k, v = (qkv[..., i * dim + head * d : i * dim + (head + 1) * d] for i in range(3))
            out[..., head * d : (head + 1) * d] = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(d)) @ v
    return linear(out, p, "proj")


def answers(
    model: nn.Module, images: torch.Tensor, *, heads: int, patch: int, token_grid=None, prefix: int = 0, changes=None
) -> np.ndarray:
    """What the head makes of the tokens after every block: (blocks, B, classes); the last is the model's answer.

    Args:
        model: a ViT with mean pooling and `prefix` 0, or with the class token alone and `prefix` 1.
        images: (B, C, H, W).
        heads, patch, token_grid: of the model; without a token grid its attention is self-attention.
        changes: for some blocks the last arguments of `visual_contrast_attention`, or `muted` for self-attention.
    """
    p = parameters(model)
    x = embed(images.double().numpy(), p, patch)
    grid_size = images.shape[2] // patch, images.shape[3] // patch
    if prefix:
        x = np.concatenate([np.broadcast_to(p["cls_token"], (len(x), 1, x.shape[-1])), x], axis=1)
    x = x + p["pos_embed"]
    result = []
    for block in range(len(model.blocks)):
        own = {name.removeprefix(f"blocks.{block}."): v for name, v in p.items() if name.startswith(f"blocks.{block}.")}
        layer = {name.removeprefix("attn."): value for name, value in own.items() if name.startswith("attn.")}
        change = (changes or {}).get(block, {})
        normed = layer_norm(x, own, "norm1")
        if token_grid is None:
            x = x + self_attention(layer, normed, heads, change.get("muted", ()))
        else:
            geometry = dict(grid_size=grid_size, token_grid=token_grid, num_prefix_tokens=prefix, depth=block)
            x = (
                x
                + visual_contrast_attention(
                    layer, torch.from_numpy(normed), num_heads=heads, **geometry, **change
                ).output
            )
        x = x + linear(gelu(linear(layer_norm(x, own, "norm2"), own, "mlp.fc1")), own, "mlp.fc2")
        result.append(read_out(p, x, prefix))
    return np.stack(result)


def read_out(p: dict[str, np.ndarray], x: np.ndarray, prefix: int) -> np.ndarray:
    """The class token after the last norm, or the mean over the patches and then that norm, through the head."""
    if prefix:
        return linear(layer_norm(x, p, "norm")[:, 0], p, "head")
    return linear(layer_norm(x.mean(1), p, "fc_norm"), p, "head")
