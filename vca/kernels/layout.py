"""The memory layout that all kernels share."""

from torch import Tensor


def empty_sequence(x: Tensor) -> Tensor:
    """Memory for a result like x (B, H, T, d), in the order (B, T, H, d), in which a layer joins its heads."""
    batch, heads, length, d = x.shape
    return x.new_empty(batch, length, heads, d).transpose(1, 2)
