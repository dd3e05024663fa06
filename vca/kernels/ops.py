"""What Visual-Contrast Attention does between its projections as fused operators: its stages, and how they are joined.

The stages' kernels are Triton's on a GPU (`vca.kernels.triton_kernels`) and C++ on a CPU (`vca.kernels.cpu`). What
joins their result with the convolution of the values has a kernel for a CPU alone; so has all of it in one, which is
`vca.kernels.whole`. A layer's `fused_attn` says whether it takes them; its initial value is that of the environment
variable VCA_FUSED, and None without one, see `vca.fused`. They have first derivatives in reverse mode; derivatives in
forward mode and those of second order are the plain path's. torch.compile, torch.export, autocast and FlopCounterMode
know them.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from vca import functional as VF
from vca.kernels import cpu
from vca.kernels.layout import empty_sequence

ENABLED = {"0": False, "1": True}.get(os.environ.get("VCA_FUSED", ""))  # None: where they are there and win
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # runs the kernels of a GPU on a CPU, for tests
MAX_TOKENS = 64  # of the kernels for a GPU
SHARED_MEMORY = {64: 64 * 1024, 128: 112 * 1024}  # bytes a block that they need, by the most channels of a head
DTYPES = (torch.bfloat16, torch.float16, *(torch.float32,) * INTERPRETED)  # float32 products have no tensor cores


def supported(x: Tensor, num_tokens: int) -> bool:
    """Whether the operators take the sequence x (..., d) and n = `num_tokens` contrast tokens.

    The first question about a CPU compiles its kernels, see `vca.kernels.cpu.kernels`.
    """
    if runs_on_cpu(x):
        return supported_by_cpu(x) and _cpu_kernels_exist()
    runs = HAS_TRITON and (x.is_cuda or INTERPRETED)
    if not runs or num_tokens > MAX_TOKENS or x.dtype not in DTYPES:
        return False
    return x.shape[-1] <= (max(SHARED_MEMORY) if INTERPRETED else _max_head_dim(x.get_device()))


def runs_on_cpu(x: Tensor) -> bool:
    return x.is_cpu and not INTERPRETED


def supported_by_cpu(x: Tensor) -> bool:
    """Whether the kernels for a CPU, where they exist, take x (..., d)."""
    return x.shape[-1] % 16 == 0 and x.dtype != torch.float64


@torch.compiler.assume_constant_result
def _cpu_kernels_exist() -> bool:
    return cpu.kernels() is not None


@torch.compiler.assume_constant_result
def _max_head_dim(device: int) -> int:
    """The most channels of a head that the kernels take on this GPU; 0 before the Ampere generation."""
    gpu = torch.cuda.get_device_properties(device)
    fitting = (d for d, needed in SHARED_MEMORY.items() if needed <= gpu.shared_memory_per_block_optin)
    return max(fitting, default=0) if gpu.major >= 8 else 0


def kernels_of(x: Tensor) -> ModuleType:
    if runs_on_cpu(x):
        kernels = cpu.kernels()
        assert kernels is not None, "`supported` was not asked."
        return kernels
    from vca.kernels import triton_kernels

    return triton_kernels


def contrast(tokens: Tensor, x: Tensor, values: Tensor, lam: Tensor, gain: float, axes: tuple[int, ...]) -> Tensor:
    """`vca.functional.contrast` of two streams with a softmax each, for what is `supported`.

    Args:
        tokens: both streams of contrast tokens, scaled (BH, 2 * n, d).
        x: keys in Stage I, queries in Stage II, (B, H, T, d).
        values: v (B, H, T, d) in Stage I, vhat (BH, n, d) in Stage II.
        lam: lambda, a scalar in float32.
        gain: 1 - lambda_init.
        axes: `STAGE1` or `STAGE2`.

    Returns:
        (BH, n, d) in Stage I, (B, H, T, d) in Stage II.
    """
    if _has_tangents(tokens, x, values, lam):
        return plain(tokens, x, values, lam, gain, axes)
    if axes == VF.STAGE1:
        return contrast_stage1(tokens, x, values, lam, gain)[0]
    return contrast_stage2(tokens, x, values, lam, gain)


def _has_tangents(*tensors: Tensor) -> bool:
    """Whether a derivative in forward mode goes through one of them."""
    if forward_ad._current_level < 0:  # as it nearly always is; the question to each tensor takes microseconds
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def join(
    gathered: Tensor, v: Tensor, gain: Tensor, weight: Tensor, bias: Tensor, grid_size: tuple[int, int], prefix: int
) -> Tensor:
    """`vca.functional.join`, for what is `supported`; on a GPU it is the plain function."""
    tensors = (gathered, v, gain, weight, bias)
    if not runs_on_cpu(v) or _has_tangents(*tensors):
        return VF.join(*tensors, grid_size, prefix)
    return contrast_join(*tensors, grid_size, prefix)


def plain(tokens: Tensor, x: Tensor, values: Tensor, lam: Tensor, gain: float, axes: tuple[int, ...]) -> Tensor:
    """`contrast` without an operator."""
    values = values.flatten(0, 1) if axes == VF.STAGE1 else values
    out = VF.contrast(tokens, x.flatten(0, 1), values, lam, gain, axes)
    return out if axes == VF.STAGE1 else out.unflatten(0, x.shape[:2])


@torch.library.custom_op("vca::contrast_stage1", mutates_args=())
def contrast_stage1(tokens: Tensor, k: Tensor, v: Tensor, lam: Tensor, gain: float) -> tuple[Tensor, Tensor, Tensor]:
    """Stage I of `vca.functional.contrast`; all tensors but lambda are of one type.

    Args:
        tokens: both streams of contrast tokens, scaled (BH, 2 * n, d).
        k, v: keys and values (B, H, T, d).
        lam: lambda, a scalar in float32.
        gain: 1 - lambda_init.

    Returns:
        The output (BH, n, d); and for the backward pass, in float32, A+- v (BH, 2 * n, d) and what the softmax takes:
        the maxima of the scores, and the sums of exp(score - maximum), (2, BH, 2 * n). They stay apart, since their
        logarithm, the maximum plus that of the sum, loses the sum where scores are huge.
    """
    return kernels_of(k).stage1(tokens, k, v, lam, gain)


@contrast_stage1.register_fake
def _(tokens: Tensor, k: Tensor, v: Tensor, lam: Tensor, gain: float) -> tuple[Tensor, Tensor, Tensor]:
    groups, rows, d = tokens.shape
    float32 = dict(dtype=torch.float32)
    out = tokens.new_empty(groups, rows // 2, d)
    return out, tokens.new_empty(groups, rows, d, **float32), tokens.new_empty(2, groups, rows, **float32)


@torch.library.custom_op("vca::contrast_stage1_backward", mutates_args=())
def contrast_stage1_backward(
    grad: Tensor, tokens: Tensor, k: Tensor, v: Tensor, lam: Tensor, gain: float, products: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of `contrast_stage1`.

    Args:
        grad: the gradient of the output, (BH, n, d).
        tokens, k, v, lam, gain: the inputs of `contrast_stage1`.
        products: A+- v (BH, 2 * n, d) in float32, as `contrast_stage1` returns it.
        norms: the maxima of the scores and the sums of the softmax (2, BH, 2 * n) in float32, likewise.

    Returns:
        The gradients of tokens, k, v and lambda, in their shapes and types.
    """
    return kernels_of(k).stage1_backward(grad, tokens, k, v, lam, gain, products, norms)


@contrast_stage1_backward.register_fake
def _(
    grad: Tensor, tokens: Tensor, k: Tensor, v: Tensor, lam: Tensor, gain: float, products: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), empty_sequence(k), empty_sequence(v), torch.empty_like(lam)


@torch.library.custom_op("vca::contrast_stage2", mutates_args=())
def contrast_stage2(tokens: Tensor, q: Tensor, values: Tensor, lam: Tensor, gain: float) -> Tensor:
    """Stage II of `vca.functional.contrast`; all tensors but lambda are of one type.

    Args:
        tokens: both streams of contrast tokens, scaled (BH, 2 * n, d).
        q: queries (B, H, T, d).
        values: vhat (BH, n, d).
        lam: lambda, a scalar in float32.
        gain: 1 - lambda_init.

    Returns:
        (B, H, T, d), a view of (B, T, H, d).
    """
    return kernels_of(q).stage2(tokens, q, values, lam, gain)


@contrast_stage2.register_fake
def _(tokens: Tensor, q: Tensor, values: Tensor, lam: Tensor, gain: float) -> Tensor:
    return empty_sequence(q)


@torch.library.custom_op("vca::contrast_stage2_backward", mutates_args=())
def contrast_stage2_backward(
    grad: Tensor, tokens: Tensor, q: Tensor, values: Tensor, lam: Tensor, gain: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of `contrast_stage2`, which computes its maps again.

    Args:
        grad: the gradient of the output, (B, H, T, d).
        tokens, q, values, lam, gain: the inputs of `contrast_stage2`.

    Returns:
        The gradients of tokens, q, values and lambda, in their shapes and types.
    """
    return kernels_of(q).stage2_backward(grad, tokens, q, values, lam, gain)


@contrast_stage2_backward.register_fake
def _(
    grad: Tensor, tokens: Tensor, q: Tensor, values: Tensor, lam: Tensor, gain: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), empty_sequence(q), values.new_empty(values.shape), torch.empty_like(lam)


@torch.library.custom_op("vca::contrast_join", mutates_args=())
def contrast_join(
    gathered: Tensor, v: Tensor, gain: Tensor, weight: Tensor, bias: Tensor, grid_size: Sequence[int], prefix: int
) -> Tensor:
    """`vca.functional.join` on a CPU."""
    return kernels_of(v).join(gathered, v, gain, weight, bias, *grid_size, prefix)


@contrast_join.register_fake
def _(
    gathered: Tensor, v: Tensor, gain: Tensor, weight: Tensor, bias: Tensor, grid_size: Sequence[int], prefix: int
) -> Tensor:
    return empty_sequence(gathered).transpose(1, 2).flatten(2)


@torch.library.custom_op("vca::contrast_join_backward", mutates_args=())
def contrast_join_backward(
    grad: Tensor, gathered: Tensor, v: Tensor, gain: Tensor, weight: Tensor, bias: Tensor, grid_size: Sequence[int],
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the five tensors of `contrast_join`, in their shapes and types; `grad` is that of its result."""
    return kernels_of(v).join_backward(grad, gathered, v, gain, weight, bias, *grid_size, prefix)


@contrast_join_backward.register_fake
def _(
    grad: Tensor, gathered: Tensor, v: Tensor, gain: Tensor, weight: Tensor, bias: Tensor, grid_size: Sequence[int],
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parameters = (torch.empty_like(tensor) for tensor in (gain, weight, bias))
    return empty_sequence(gathered), empty_sequence(v), *parameters


def backward_is_plain(grad: Tensor) -> bool:
    """Whether a backward pass is differentiated itself, or one of several under vmap or `is_grads_batched`.

    The compiler's always records gradients, and has no second derivatives.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def plain_gradients(
    function: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor], *more
) -> list[Tensor | None]:
    """The gradients of a plain function, which can be differentiated and batched; None where no input asks for one."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views stand apart in the graph; of the inputs, the tokens depend on the queries.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        out = function(*inputs, *more)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def _save_stage1(ctx, inputs, output) -> None:
    tokens, k, v, lam, ctx.gain = inputs
    _, products, norms = output
    ctx.mark_non_differentiable(products, norms)
    ctx.save_for_backward(tokens, k, v, lam, products, norms)


def _backward_stage1(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
    tokens, k, v, lam, products, norms = ctx.saved_tensors
    if backward_is_plain(grad):
        return *plain_gradients(plain, grad, (tokens, k, v, lam), ctx.gain, VF.STAGE1), None
    return *contrast_stage1_backward(grad, tokens, k, v, lam, ctx.gain, products, norms), None


def _save_stage2(ctx, inputs, output) -> None:
    *tensors, ctx.gain = inputs
    ctx.save_for_backward(*tensors)


def _backward_stage2(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    if backward_is_plain(grad):
        return *plain_gradients(plain, grad, ctx.saved_tensors, ctx.gain, VF.STAGE2), None
    return *contrast_stage2_backward(grad, *ctx.saved_tensors, ctx.gain), None


def _save_join(ctx, inputs, output) -> None:
    *tensors, ctx.grid_size, ctx.prefix = inputs
    ctx.save_for_backward(*tensors)


def _backward_join(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    if backward_is_plain(grad):
        return *plain_gradients(VF.join, grad, ctx.saved_tensors, ctx.grid_size, ctx.prefix), None, None
    return *contrast_join_backward(grad, *ctx.saved_tensors, ctx.grid_size, ctx.prefix), None, None


contrast_stage1.register_autograd(_backward_stage1, setup_context=_save_stage1)
contrast_stage2.register_autograd(_backward_stage2, setup_context=_save_stage2)
contrast_join.register_autograd(_backward_join, setup_context=_save_join)


@register_flop_formula([torch.ops.vca.contrast_stage1, torch.ops.vca.contrast_stage2])
def contrast_flops(tokens_shape, x_shape, *_, **__) -> int:
    """Those of `vca.functional.contrast`: two products for the scores, one for the difference of the maps."""
    groups, rows, d = tokens_shape
    return 2 * groups * (rows + rows // 2) * x_shape[2] * d


@register_flop_formula([torch.ops.vca.contrast_stage1_backward, torch.ops.vca.contrast_stage2_backward])
def contrast_backward_flops(grad_shape, tokens_shape, x_shape, *_, **__) -> int:
    """Twice those of the forward pass, as without recomputation."""
    return 2 * contrast_flops(tokens_shape, x_shape)


def convolution_flops(batch: int, grid_size: Sequence[int], weight_shape: Sequence[int]) -> int:
    return 2 * batch * math.prod(grid_size) * math.prod(weight_shape)


@register_flop_formula(torch.ops.vca.contrast_join)
def join_flops(gathered_shape, v_shape, gain_shape, weight_shape, bias_shape, grid_size, *_, **__) -> int:
    """Those of the convolution."""
    return convolution_flops(gathered_shape[0], grid_size, weight_shape)


@register_flop_formula(torch.ops.vca.contrast_join_backward)
def join_backward_flops(grad_shape, *shapes, **__) -> int:
    """Twice those of the forward pass."""
    return 2 * join_flops(*shapes)
