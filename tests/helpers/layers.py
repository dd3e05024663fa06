"""Layers of Visual-Contrast Attention for tests."""

import copy
import itertools

import torch
from torch.utils.flop_counter import FlopCounterMode

from vca import VisualContrastAttention

DIM, HEADS, BATCH = 24, 3, 2


GRIDS = [(7, 7), (14, 14), (9, 13), (8, 8)]


TOKEN_GRIDS = [(7, 7), (4, 4), (3, 5)]


GEOMETRIES = [
    dict(grid_size=grid, token_grid=token_grid, num_prefix_tokens=prefix)
    for grid, token_grid, prefix in itertools.product(GRIDS, TOKEN_GRIDS, (0, 1, 2))
]


def describe(value) -> str | None:
    if not isinstance(value, dict):
        return None
    return "-".join("x".join(map(str, v)) if isinstance(v, tuple) else f"{k}={v}" for k, v in value.items())


def randomized(layer: VisualContrastAttention, seed: int = 1) -> VisualContrastAttention:
    """Moves every parameter away from its initial value, lambdas and gains included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif "lambda" in name:
                parameter.copy_(0.3 * noise)
            elif name.endswith("_embed"):
                parameter.copy_(noise)
            else:
                parameter.copy_(0.3 * noise)
    return layer


def make(dtype=torch.float64, dim=DIM, heads=HEADS, batch=BATCH, seed=1, **case):
    """A layer with random parameters, and an input for it."""
    layer = randomized(VisualContrastAttention(dim, heads, **case).to(dtype), seed)
    rows, cols = case["grid_size"]
    length = case.get("num_prefix_tokens", 0) + rows * cols
    generator = torch.Generator().manual_seed(seed + 1)
    return layer, torch.randn(batch, length, dim, generator=generator, dtype=torch.float64).to(dtype)


def relative_error(actual: torch.Tensor, target) -> float:
    target = torch.as_tensor(target)
    assert actual.shape == target.shape
    return float((actual.detach().double() - target).norm() / target.norm())


SMALL = dict(grid_size=(3, 3), token_grid=(2, 2), num_prefix_tokens=1, depth=1)


IRREGULAR = dict(grid_size=(5, 7), token_grid=(3, 4), num_prefix_tokens=2, depth=2)


def fused_and_exact(**options):
    """A layer that uses the operators, the same layer in float64 that does not, and an input."""
    layer, x = make(torch.float32, dim=32, heads=2, batch=1, **IRREGULAR, **options)
    exact = copy.deepcopy(layer).double()
    layer.fused_attn = True
    return layer, exact, x


def gradients(layer, x, weight) -> list[torch.Tensor]:
    """Those of the input and of every parameter, in this order."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], weight)


def calls(run) -> dict:
    """The products that a run multiplies, and their flops, by operator."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()["Global"]
