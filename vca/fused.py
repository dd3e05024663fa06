"""Which path Visual-Contrast Attention takes on a CPU: its fused C++ kernels, or plain PyTorch.

A layer whose `fused_attn` is None, as it is by default, takes the kernels where they win and where they are there. The
first such layer that runs on a CPU has them compiled in the background, once a machine; until then, and where there is
no compiler, the path is plain. VCA_FUSED=0 turns them off, VCA_FUSED=1 makes every layer wait for them.
"""

import functools

import torch
from torch import Tensor

from vca.kernels import cpu, ops

_settled: bool | None = None


def status() -> str:
    """A line that says which path is taken on this CPU, and why. It starts no compiler."""
    kernels = cpu.KERNELS
    if ops.ENABLED is False:
        return "plain PyTorch; the fused kernels are switched off by VCA_FUSED=0"
    if _settled is False and not kernels.problem:
        return "plain PyTorch, as decided at the start"
    if kernels.building or kernels.library.exists():
        kernels.poll()
    if kernels.module:
        return f"fused C++ kernels ({cpu.capability()})"
    if kernels.building:
        return "plain PyTorch, until the fused kernels are compiled in the background"
    if problem := kernels.problem or kernels.hindrance():
        return _without(problem)
    return "plain PyTorch; the fused kernels are compiled in the background when a layer first runs on this CPU"


def prepare() -> None:
    """Has the kernels compiled in the background, if they are not there, and returns at once."""
    if ops.ENABLED is not False and _settled is None:
        cpu.KERNELS.poll()


def must_compile() -> bool:
    """Whether `settle` would compile the kernels first, which takes a minute or two."""
    kernels = cpu.KERNELS
    there = kernels.module or kernels.problem or kernels.library.exists()
    return ops.ENABLED is not False and not there and not kernels.hindrance()


def settle(use: bool = True) -> bool:
    """Decides for the rest of this process, for runs whose results must not depend on when a compiler is done.

    Args:
        use: take the kernels, compiled first if they are not there; False for the plain path.

    Returns:
        Whether layers whose `fused_attn` is None take them from now on.
    """
    global _settled
    if use and ops.ENABLED is not False and not cpu.KERNELS.poll() and not cpu.KERNELS.problem:
        cpu.KERNELS.wait()
    _settled = use and ops.ENABLED is not False and cpu.KERNELS.module is not None
    return _settled


def wins(dtype: torch.dtype) -> bool:
    """Whether the kernels are faster than plain PyTorch on this CPU, docs/speed.md."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu.has_bfloat16_products())


def applies(setting: bool | None, x: Tensor, num_tokens: int) -> bool:
    """Whether a layer takes the operators of `vca.kernels.ops`.

    The transformations of `torch.func`, such as vmap, have no rule for them. What leaves this process as a graph of
    plain operators, by torch.export, ONNX or torch.fx, takes them only if it was told to, as do tensors without data.

    Args:
        setting: its `fused_attn`.
        x: its queries, keys and values, or some of them, (..., d).
        num_tokens: n.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    if setting is None:
        leaves = type(x) is not Tensor or torch.compiler.is_exporting() or torch.jit.is_tracing()
        if leaves or not ops.runs_on_cpu(x):
            return False
        return wins(x.dtype) and ops.supported_by_cpu(x) and _taken_up(x.requires_grad)
    return setting and ops.supported(x, num_tokens)


def _without(problem: str) -> str:
    return f"plain PyTorch, without the fused kernels: {problem}"


@torch.compiler.assume_constant_result
def _taken_up(records_gradients: bool) -> bool:
    if _settled is not None:
        return _settled
    return _there_at_the_first_gradient() if records_gradients else cpu.KERNELS.poll() is not None


@functools.cache
def _there_at_the_first_gradient() -> bool:
    """Training stays on the path that it starts on: checkpointed layers run again and must give what they gave."""
    return cpu.KERNELS.poll() is not None
