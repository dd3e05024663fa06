"""Number formats of training: autocast, TF32, stored weights, and the compiler's settings."""

import platform
import warnings

import torch
from torch import nn

STORED = dict(fp32=torch.float32, fp16=torch.float16)  # how a checkpoint stores the weights


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that computes in "bf16" or "fp32"; warns if a CPU is much slower in the former."""
    bf16, mkldnn = precision == "bf16", device.type == "cpu" and torch.backends.mkldnn.is_available()
    if bf16 and mkldnn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        text = "this CPU has no instructions for bf16; --precision fp32 is several times faster."
        warnings.warn(text, stacklevel=2)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


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
