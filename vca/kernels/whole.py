"""What Visual-Contrast Attention does between its projections as one operator on a CPU, beside the parts of `ops`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.flop_counter import register_flop_formula

from vca import functional as VF
from vca.kernels import ops


def takes(qkv: Tensor) -> bool:
    """Whether `attend` takes what is `ops.supported`: on a CPU, without derivatives in forward mode."""
    return ops.runs_on_cpu(qkv) and forward_ad._current_level < 0


def attend(
    qkv: Tensor,
    parameters: Sequence[Tensor],
    grid_size: tuple[int, int],
    token_grid: tuple[int, int],
    prefix: int,
    init: float,
) -> Tensor:
    """`vca.functional.attend`, for what is `ops.supported` and `takes`."""
    geometry = grid_size, token_grid, prefix, init
    if has_torch_function_unary(qkv):  # which an autograd.Function does not ask
        return handle_torch_function(attend, (qkv,), qkv, parameters, *geometry)
    if torch.is_grad_enabled():
        return _Attend.apply(qkv, geometry, *parameters)
    return torch.ops.vca.contrast_attend(qkv, parameters, *geometry, False)[0]


def contrast_attend(
    qkv: Tensor, parameters: Sequence[Tensor], grid_size: Sequence[int], token_grid: Sequence[int], prefix: int,
    init: float, saves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`attend`, and what its gradients need if it `saves` that, in float32.

    Returns:
        The output (B, P + N, C); what the stages gather (B, P + N, C), and A+- v and the norms of `contrast_stage1`.
        Without `saves` all but the output are empty.
    """
    return ops.kernels_of(qkv).attend(qkv, parameters, grid_size, token_grid, prefix, init, saves)


def contrast_attend_backward(
    grad: Tensor, qkv: Tensor, parameters: Sequence[Tensor], grid_size: Sequence[int], token_grid: Sequence[int],
    prefix: int, init: float, gathered: Tensor, products: Tensor, norms: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The gradients of qkv and of each parameter, in their shapes and types; `grad` is that of the output."""
    saved = gathered, products, norms
    return ops.kernels_of(qkv).attend_backward(grad, qkv, parameters, grid_size, token_grid, prefix, init, *saved)


LIBRARY = torch.library.Library("vca", "FRAGMENT")  # `custom_op` looks at the memory of every tensor at every call
for function in (contrast_attend, contrast_attend_backward):
    LIBRARY.define(function.__name__ + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(function.__name__, function, "CPU")


@torch.library.register_fake("vca::contrast_attend", lib=LIBRARY)
def _(qkv: Tensor, parameters: Sequence[Tensor], *geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, length, _), (num_tokens, dim), d = qkv.shape, parameters[0].shape, parameters[2].shape[0]
    groups, rows = (batch * dim // d if geometry[-1] else 0), 2 * num_tokens
    saved = (batch if geometry[-1] else 0, length, dim), (groups, rows, d), (2, groups, rows)
    return qkv.new_empty(batch, length, dim), *(qkv.new_empty(shape, dtype=torch.float32) for shape in saved)


@torch.library.register_fake("vca::contrast_attend_backward", lib=LIBRARY)
def _(grad: Tensor, qkv: Tensor, parameters: Sequence[Tensor], *_) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (qkv, *parameters)]


class _Attend(torch.autograd.Function):
    """`attend` with gradients."""

    @staticmethod
    def forward(ctx, qkv: Tensor, geometry: tuple, *parameters: Tensor) -> Tensor:
        out, *saved = torch.ops.vca.contrast_attend(qkv, parameters, *geometry, True)
        ctx.geometry = geometry
        ctx.save_for_backward(qkv, *parameters, *saved)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *parameters, gathered, products, norms = ctx.saved_tensors
        if ops.backward_is_plain(grad):
            inputs = qkv, *parameters
            of_qkv, *others = ops.plain_gradients(lambda x, *y: VF.attend(x, y, *ctx.geometry), grad, inputs)
        else:
            saved = gathered, products, norms
            of_qkv, *others = torch.ops.vca.contrast_attend_backward(grad, qkv, parameters, *ctx.geometry, *saved)
        return of_qkv, None, *others


@register_flop_formula(torch.ops.vca.contrast_attend)
def attend_flops(qkv_shape, parameter_shapes, grid_size, *_, **__) -> int:
    """Those of its parts."""
    (batch, length, _), (num_tokens, dim) = qkv_shape, parameter_shapes[0]
    stage = ops.contrast_flops((batch, 2 * num_tokens, dim), (batch, 1, length, dim))
    return 2 * stage + ops.convolution_flops(batch, grid_size, parameter_shapes[12])


@register_flop_formula(torch.ops.vca.contrast_attend_backward)
def attend_backward_flops(grad_shape, *shapes, **__) -> int:
    """Twice those of the forward pass."""
    return 2 * attend_flops(*shapes)
