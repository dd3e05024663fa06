"""Number formats of training: autocast, TF32, stored weights, and the compiler's settings."""

import platform
import time
import warnings
from functools import cache

import torch
from torch import nn

STORED = dict(fp32=torch.float32, fp16=torch.float16)  # how a checkpoint stores the weights


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that computes in "bf16" or "fp32"; warns if a CPU is slower in the former."""
    bf16 = precision == "bf16"
    if bf16 and device.type == "cpu" and (factor := bf16_slowdown()) > 1.3:
        text = f"a product of matrices in bf16 takes this CPU {factor:.1f} times as long; --precision fp32 is faster."
        warnings.warn(text, stacklevel=2)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@cache
def bf16_slowdown() -> float:
    """How much longer this CPU takes for a product of matrices in bf16 than in float32.

    Measured, in some 50 ms: a CPU without such instructions emulates them, and on some that have them they are slow.
    """
    pairs = [
        (torch.ones(512, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    seconds = [[], []]
    for _ in range(5):
        for times, (a, b) in zip(seconds, pairs, strict=True):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
    return min(seconds[0]) / min(seconds[1])


@torch.no_grad()
def round_weights(model: nn.Module, stored_as: str) -> None:
    """Rounds the weights, in place, to what a checkpoint in "fp32" or "fp16" will hold."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(STORED[stored_as]))


def prepare_compiler() -> None:
    """Before `torch.compile` on a CPU: keeps GCC from using 512-bit vectors of its own.

    With those, GCC 12 and `-march=native` on an Intel Xeon with AMX, kernels that transpose bf16 compute NaN. What
    PyTorch itself writes in 512 bits stays. An architecture of the user's, TORCHINDUCTOR_CPP_MARCH, is left alone.
    """
    from torch._inductor import config  # takes a second, and not every run compiles

    if platform.machine() == "x86_64" and getattr(config.cpp, "march", "") is None:
        config.cpp.march = "native -mprefer-vector-width=256"


def set_tf32(enabled: bool) -> None:
    """Whether float32 products on NVIDIA GPUs may round their inputs to 10 bits of mantissa, for speed."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled
