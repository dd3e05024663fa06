"""Which path the attention of a run takes on a CPU, decided before its first step."""

import sys

import torch
from torch import nn

from training.core.distributed import ALONE, World
from vca import VisualContrastAttention, fused


def settle_attention(
    *models: nn.Module, device: torch.device, wins: bool = True, before: bool | None = None, world: World = ALONE
) -> bool:
    """Decides it for the rest of this process, and prints it: a run must not depend on when a compiler is done.

    Args:
        models: those of the run. Kernels that one of them can use are compiled first, if they are not there.
        device: where they run.
        wins: whether the kernels are faster in the run's precision.
        before: what the run decided when it was started, if it is resumed.
        world: the processes that share the run; all take one path.

    Returns:
        Whether the fused kernels are taken.
    """
    layers = [m for model in models for m in model.modules() if isinstance(m, VisualContrastAttention)]
    use = device.type == "cpu" and wins and before is not False and any(layer.has_kernels for layer in layers)
    if use and world.first and fused.must_compile():
        print("the fused kernels of attention are compiled, once on this machine: a minute or two.", file=sys.stderr)
    taken = fused.settle(use)
    everywhere = world.sum([float(taken)], device)[0] == world.size
    if taken and not everywhere:
        taken = fused.settle(False)
    if world.first and layers and device.type == "cpu":
        print(f"attention: {fused.status()}", file=sys.stderr)
        if before and not taken:
            print("this run was started with the fused kernels; its numbers now differ by rounding.", file=sys.stderr)
    return taken
