"""AttnLRP: layer-wise relevance with rules for attention (Achtibat et al., ICML 2024, arXiv 2402.05602).

In its gradient form (arXiv 2502.15886), relevance is gradient x input with some derivatives exchanged. The rules act on
the functions that a model calls and know no layer, so that they serve VCA, timm's transformers and CNNs alike.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from vca import functional as VF
from vca.kernels import ops


class Rules(TorchFunctionMode):
    """Within this block functions keep their values and have the derivatives of AttnLRP; parameters are constants.

    - A product of two tensors that depend on the input gives each of them half of its gradient, be it by element, of
      matrices or an einsum (Propositions 3.2 and 3.3).
    - A norm divides by a constant (Proposition 3.4), and so does every quotient; the mean that a norm subtracts has its
      derivative.
    - GELU, SiLU, Mish, Hardswish, ELU and tanh are x times a constant, f(x) / x (Equation 9).
    - Softmax keeps its derivative (Proposition 3.1), and so does all that is not named here: linear layers,
      convolutions, ReLU, pooling, batch norm.

    Beyond the paper, gates by `sigmoid` are constants, and so is `exp`, by which VCA's learned pooling weights queries.
    Fused kernels of VCA are computed in plain PyTorch, and fused attention is taken apart.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(nn.Parameter, Tensor.detach, (args, kwargs or {}))
        rule = RULES.get(func.__name__)
        return rule(func, *args, **kwargs) if rule else func(*args, **kwargs)


def relevance(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The relevance of every pixel for the logit of a class, summed over the colours, by the rules of `Rules`.

    Relevance stays behind in two places only. With the derivatives of the rules, the logit y of the class is

        sum of the map  +  sum of b dy/db over constants b  +  sum of s dy/ds - z dy/dz over softmaxes s of z

    to rounding. The constants are those that are added: biases, the shifts of norms, class token, position embeddings,
    VCA's embeddings of contrast tokens. A softmax keeps what the paper's rule for it does not hand down. So the map of
    a model without constants and without softmax adds up to the logit; that of a transformer, by VCA or
    self-attention, misses what its softmaxes keep, which may be most of the logit.

    Linear layers have the paper's epsilon rule, with an epsilon of 0. Its gamma rule, which the authors use for vision
    transformers, is left out.

    Args:
        model: a classifier in evaluation mode.
        images: (B, 3, H, W), normalised as the model takes them.
        classes: (B,), the index of any class for each image.

    Returns:
        (B, H, W), in units of the logit. Positive speaks for the class.

    Raises:
        ValueError: the model has a layer that the rules cannot reach into, such as `nn.MultiheadAttention`.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), Rules():
        scores = model(images).gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(scores, images)
    return (gradient * images).sum(1).detach()


def _is_live(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _share(x: Any, parts: int) -> Any:
    """x with 1 / `parts` of its gradient, in the same memory."""
    if parts < 2 or not _is_live(x):
        return x
    view = x.view_as(x)
    view.register_hook(lambda gradient: gradient / parts)
    return view


def _product(func: Callable, *factors: Any, **kwargs: Any) -> Tensor:
    if func is torch.einsum and not isinstance(factors[1], Tensor):
        factors = factors[0], *factors[1]
    live = sum(map(_is_live, factors))
    return func(*(_share(factor, live) for factor in factors), **kwargs)


def _quotient(func: Callable, x: Any, divisor: Any, **kwargs: Any) -> Tensor:
    return func(x, divisor.detach() if isinstance(divisor, Tensor) else divisor, **kwargs)


def _constant(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    return func(*args, **kwargs).detach()


def _activation(func: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """f(x) = x c with c = f(x) / x, and at 0 its limit. One that works in place leaves x as it was."""
    constant = torch.where(x == 0, torch.finfo(x.dtype).eps, x).detach()
    return x * (func(constant.clone(), *args, **kwargs) / constant)


def _divided_by_size(x: Tensor, dims: tuple[int, ...], eps: float | None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * (x.square().mean(dims, keepdim=True) + eps).rsqrt().detach()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(func, x: Tensor, normalized_shape, weight=None, bias=None, eps: float = 1e-5, *_) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(_divided_by_size(x - x.mean(dims, keepdim=True), dims, eps), weight, bias)


def _rms_norm(func, x: Tensor, normalized_shape, weight=None, eps: float | None = None) -> Tensor:
    return _affine(_divided_by_size(x, tuple(range(-len(normalized_shape), 0)), eps), weight, None)


def _group_norm(func, x: Tensor, num_groups: int, weight=None, bias=None, eps: float = 1e-5, *_) -> Tensor:
    groups = x.unflatten(1, (num_groups, -1)).flatten(2)
    groups = _divided_by_size(groups - groups.mean(-1, keepdim=True), (-1,), eps)
    weight, bias = (y if y is None else y.view(-1, *[1] * (x.ndim - 2)) for y in (weight, bias))
    return _affine(groups.view(x.shape), weight, bias)


def _normalize(func, x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    return x / x.norm(p, dim, keepdim=True).clamp(min=eps).detach()


def _attention(
    func, q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **options
) -> Tensor:  # fmt: skip
    if is_causal or options.get("enable_gqa"):
        raise ValueError("AttnLRP is not written for causal attention or keys that heads share.")
    scores = _product(torch.matmul, q * (q.shape[-1] ** -0.5 if scale is None else scale), k.transpose(-2, -1))
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    return _product(torch.matmul, scores.softmax(-1), v)


def _contrast(
    axes: tuple[int, ...], func, tokens: Tensor, x: Tensor, values: Tensor, lam: Tensor, gain: float
) -> Tensor | tuple[Tensor, None, None]:
    """The fused operator of a stage of VCA. Stage I's returns more than its output, for its own backward pass."""
    with Rules():
        out = ops.plain(tokens, x, values, lam, gain, axes)
    return (out, None, None) if axes == VF.STAGE1 else out


def _attend(func, *args: Any) -> Tensor:
    with Rules():
        return VF.attend(*args)


def _refused(func, *args: Any, **kwargs: Any) -> Tensor:
    raise ValueError("AttnLRP cannot reach into nn.MultiheadAttention, which this model uses.")


RULES: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("mul", "multiply", "matmul", "bmm", "einsum"), _product),
    **dict.fromkeys(("div", "divide", "true_divide"), _quotient),
    **dict.fromkeys(("__rdiv__", "reciprocal", "rsqrt", "exp", "sigmoid", "hardsigmoid"), _constant),
    **dict.fromkeys(("gelu", "silu", "mish", "hardswish", "elu", "tanh"), _activation),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "normalize": _normalize,
    "scaled_dot_product_attention": _attention,
    "attend": _attend,
    "contrast_stage1.default": partial(_contrast, VF.STAGE1),
    "contrast_stage2.default": partial(_contrast, VF.STAGE2),
    "multi_head_attention_forward": _refused,
}
