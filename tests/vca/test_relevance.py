"""AttnLRP: what adds up to the logit, each rule by its formula in float64, and a layer of VCA written by hand."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import vca
from tests.helpers import kinds
from tests.helpers.kernels import needs_compiler
from tests.helpers.reference import softmax
from tests.helpers.vits import DIM, HEADS, make_layer, make_timm_vit, make_vca_vit
from vca.attribution import attn_lrp, cell_size, gradient_x_input
from vca.layers.factory import KINDS
from vca.relevance import Rules, relevance

CONSTANTS = ("bias", "bias_table", "cls_token", "reg_token", "pos_embed", "positive_embed", "negative_embed")
MODELS = {
    **{kind: ("vca_vit_pico_patch4_32", dict(attention=kind)) for kind in KINDS},
    "joint softmax": ("vca_vit_pico_patch4_32", dict(stage2_softmax="joint")),
    "learned pooling": ("vca_vit_pico_patch4_32", dict(pooling="learned")),
    "without convolution": ("vca_vit_pico_patch4_32", dict(dwc=False)),
    "windows": ("vca_swin_tiny", {}),
    "coarser keys": ("pvt_tiny", {}),
    "stripes": ("cswin_tiny", {}),
}


class KeptBySoftmaxes(TorchFunctionMode):
    """Adds up s dy/ds - z dy/dz of every softmax s of z, once y is differentiated."""

    total = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.__name__ == "softmax":
            self._add(out, 1)
            self._add(args[0], -1)
        return out

    def _add(self, x: torch.Tensor, sign: int) -> None:
        def hook(gradient: torch.Tensor) -> None:
            self.total += sign * (x * gradient).sum().item()

        x.register_hook(hook)


def make(case: str) -> tuple[nn.Module, torch.Tensor]:
    name, options = MODELS[case]
    model = kinds.make(name, **options).double()
    return model, kinds.images(model, 1).double()


def constants_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith(CONSTANTS)}


def without_constants(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in constants_of(model).values():
            parameter.zero_()
    return model


@pytest.mark.parametrize("case", MODELS)
def test_map_and_softmaxes_add_up_to_the_logit_without_constants(case):
    model, x = make(case)
    without_constants(model)
    with KeptBySoftmaxes() as kept:
        total = relevance(model, x, torch.tensor([1])).sum().item()
    logit = model(x)[0, 1].item()
    assert abs(kept.total) > 1e-3 * abs(logit)
    assert total + kept.total == pytest.approx(logit, rel=1e-9)


@pytest.mark.parametrize("case", MODELS)
def test_map_constants_and_softmaxes_add_up_to_the_logit(case):
    model, x = make(case)
    constants = {name: p.detach().clone().requires_grad_() for name, p in constants_of(model).items()}
    assert {name.rpartition(".")[2] for name in constants} >= {"bias"}
    x.requires_grad_()
    with KeptBySoftmaxes() as kept, Rules():
        logit = torch.func.functional_call(model, constants, (x,))[0, 1]
    gradients = torch.autograd.grad(logit, [x, *constants.values()])
    parts = [(tensor * g).sum().item() for tensor, g in zip([x, *constants.values()], gradients, strict=True)]
    assert sum(parts) + kept.total == pytest.approx(logit.item(), rel=1e-9)
    assert logit.item() == pytest.approx(model(x)[0, 1].item(), rel=1e-9)
    torch.testing.assert_close(relevance(model, x, torch.tensor([1])), (x * gradients[0]).sum(1).detach())


@pytest.mark.parametrize("name", ["resnet10t", "convnextv2_atto", "efficientnet_b0", "mixer_s32_224"])
def test_without_softmax_and_constants_the_map_adds_up_to_the_logit(name):
    size = 224 if "mixer" in name else 64
    model = without_constants(kinds.randomized(timm.create_model(name, num_classes=3), 0.02)).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    total = relevance(model, x, torch.tensor([0, 2])).sum((1, 2))
    torch.testing.assert_close(total, model(x)[[0, 1], [0, 2]].detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3)), timm.create_model("resnet10t")]
)
def test_a_linear_and_a_rectifying_model_have_gradient_x_input(model):
    x, classes = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([2, 0])
    model(x.float())
    model.double().eval()
    torch.testing.assert_close(relevance(model, x, classes), gradient_x_input(model, x, classes), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (40, 72)])
def test_a_map_is_even_within_cells_and_has_the_sum_of_the_pixels(size):
    model = timm.create_model("resnet10t", num_classes=3).eval()
    x, classes = torch.randn(2, 3, *size), torch.tensor([0, 2])
    pixels, found = relevance(model, x, classes), attn_lrp(model, x, classes)
    rows, cols = cell_size(model, x)
    assert found.shape == pixels.shape and (rows, cols) == {16: (1, 1), 40: (5, 5)}[size[0]]
    for top in range(0, size[0], rows):
        for left in range(0, size[1], cols):
            part = np.s_[:, top : top + rows, left : left + cols]
            mean = pixels[part].mean((1, 2), keepdim=True)
            torch.testing.assert_close(found[part], mean.expand_as(found[part]), rtol=1e-3, atol=1e-7)


# ---- Each rule


def derivatives(function, *inputs: np.ndarray) -> list[np.ndarray]:
    """Those of the sum of WEIGHT times the function, by the rules."""
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    with Rules():
        out = function(*tensors)
    torch.testing.assert_close(out, function(*tensors))
    return [g.numpy() for g in torch.autograd.grad((out * torch.tensor(WEIGHT)).sum(), tensors)]


RANDOM = np.random.default_rng(0)
WEIGHT, X, Y, Z = RANDOM.normal(size=(4, 2, 4, 4))
GAIN, SHIFT = RANDOM.normal(size=(2, 4))


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("product", [torch.mul, torch.multiply, torch.Tensor.mul, lambda x, y: x * y])
def test_factors_share_what_an_elementwise_product_has(product):
    for got, other in zip(derivatives(product, X, Y), (Y, X), strict=True):
        close(got, WEIGHT * other / 2)
    constant = torch.tensor(Y)
    close(derivatives(lambda x: product(x, constant), X)[0], WEIGHT * Y)
    close(derivatives(lambda x: product(x, x), X)[0], WEIGHT * X)


@pytest.mark.parametrize(
    "product",
    [
        torch.matmul,
        torch.bmm,
        lambda x, y: x @ y,
        lambda x, y: torch.einsum("bij,bjk->bik", x, y),
        lambda x, y: torch.einsum("bij,bjk->bik", [x, y]),
    ],
)
def test_factors_share_what_a_product_of_matrices_has(product):
    first, second = derivatives(product, X, Y)
    close(first, WEIGHT @ Y.transpose(0, 2, 1) / 2)
    close(second, X.transpose(0, 2, 1) @ WEIGHT / 2)


def test_three_factors_have_a_third_each():
    for got, others in zip(
        derivatives(lambda *xyz: torch.einsum("bij,bij,bij->bij", *xyz), X, Y, Z), (Y * Z, X * Z, X * Y), strict=True
    ):
        close(got, WEIGHT * others / 3)


def test_what_is_divided_by_is_a_constant():
    first, second = derivatives(lambda x, y: x / y + 0 * y, X, Y)
    close(first, WEIGHT / Y)
    close(second, 0 * Y)


@pytest.mark.parametrize("gate", [torch.sigmoid, torch.exp, lambda y: (y * y + 1).rsqrt(), lambda y: 1 / y])
def test_gates_are_constants(gate):
    first, second = derivatives(lambda x, y: x * gate(y) + 0 * y, X, Y)
    close(first, WEIGHT * gate(torch.tensor(Y)).numpy())
    close(second, 0 * Y)


@pytest.mark.parametrize("affine", [False, True])
def test_norms_divide_by_a_constant(affine):
    weight, bias = (torch.tensor(GAIN), torch.tensor(SHIFT)) if affine else (None, None)
    gain = GAIN if affine else np.ones(4)
    (got,) = derivatives(lambda x: F.layer_norm(x, (4,), weight, bias, 1e-3), X)
    scaled = WEIGHT * gain / np.sqrt(X.var(-1, keepdims=True) + 1e-3)
    close(got, scaled - scaled.mean(-1, keepdims=True))

    (got,) = derivatives(lambda x: F.rms_norm(x, (4,), weight, 1e-3), X)
    close(got, WEIGHT * gain / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-3))

    (got,) = derivatives(lambda x: F.group_norm(x, 2, weight, bias, 1e-3), X)
    groups = X.reshape(2, 2, 8)
    scaled = (WEIGHT * gain[:, None]).reshape(2, 2, 8) / np.sqrt(groups.var(-1, keepdims=True) + 1e-3)
    close(got, (scaled - scaled.mean(-1, keepdims=True)).reshape(X.shape))

    (got,) = derivatives(lambda x: F.normalize(x, dim=-1), X)
    close(got, WEIGHT / np.linalg.norm(X, axis=-1, keepdims=True))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    "activation, formula, at_zero",
    [
        (F.gelu, lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2, 0.5),
        (nn.GELU("tanh"), lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), 0.5),
        (F.silu, lambda x: x * logistic(x), 0.5),
        (lambda x: x * x.sigmoid(), lambda x: x * logistic(x), 0.5),
        (F.mish, lambda x: x * math.tanh(math.log1p(math.exp(x))), 0.6),
        (nn.Hardswish(), lambda x: x * min(max(x + 3, 0), 6) / 6, 0.5),
        (F.elu, lambda x: x if x > 0 else math.expm1(x), 1),
        (torch.tanh, math.tanh, 1),
        (F.relu, lambda x: max(x, 0), 0),
    ],
)
def test_activations_are_the_input_times_a_constant(activation, formula, at_zero):
    x = np.concatenate([X[:, :-1], np.zeros_like(X[:, -1:])], 1)
    quotient = np.vectorize(lambda value: formula(value) / value if value else at_zero)(x)
    close(derivatives(activation, x)[0], WEIGHT * quotient)


def test_activations_in_place():
    close(derivatives(lambda x: F.silu(x * 1, inplace=True), X)[0], derivatives(F.silu, X)[0])
    close(derivatives(lambda x: F.hardswish(x * 1, True), X)[0], derivatives(F.hardswish, X)[0])


def test_softmax_hands_down_what_proposition_3_1_says():
    (got,) = derivatives(lambda z: z.softmax(-1), X)
    of_maps = WEIGHT * softmax(X)
    close(X * got, X * (of_maps - softmax(X) * of_maps.sum(-1, keepdims=True)))


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_fused_attention_is_taken_apart(mask):
    allowed = np.tril(np.ones((4, 4), bool))
    added = {None: 0 * X, "bool": np.where(allowed, 0, -np.inf), "float": Z}[mask]
    given = {None: None, "bool": torch.tensor(allowed), "float": torch.tensor(Z)}[mask]
    q, k, v = derivatives(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, given), X, Y, Z)
    maps = softmax(X @ Y.transpose(0, 2, 1) / 2 + added)
    close(v, maps.transpose(0, 2, 1) @ WEIGHT / 2)
    of_maps = WEIGHT @ Z.transpose(0, 2, 1) / 2
    of_scores = maps * (of_maps - (maps * of_maps).sum(-1, keepdims=True))
    close(q, of_scores @ Y / 4)
    close(k, of_scores.transpose(0, 2, 1) @ X / 4)


# ---- Visual-Contrast Attention


def by_hand(layer: vca.VisualContrastAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer with the rules written into its equations; 2 prefix tokens, then 5x6 patches."""

    def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.detach() + a.detach() @ b) / 2

    def normed(out: torch.Tensor, stage: nn.Module) -> torch.Tensor:
        size = (out.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach()
        return out / size * (1 - layer.lambda_init) * stage.norm.weight.detach()

    width, heads = DIM // HEADS, []
    q, k, v = layer.qkv(x)[0].split(DIM, -1)  # (32, 12)
    pooled = F.adaptive_avg_pool2d(q[2:].T.unflatten(1, (5, 6)), (2, 3)).flatten(1).T  # (6, 12)
    streams = [pooled + embed.detach() for embed in (layer.positive_embed, layer.negative_embed)]
    lambdas = [stage.contrast_lambda(layer.lambda_init).detach() for stage in (layer.stage1, layer.stage2)]
    for part in torch.arange(DIM).split(width):
        positive, negative = (stream[:, part] / math.sqrt(width) for stream in streams)
        first, second = (times(t, k[:, part].T).softmax(-1) for t in (positive, negative))
        drawn = normed(times(first - lambdas[0] * second, v[:, part]), layer.stage1)  # (6, 4)
        first, second = (times(q[:, part], t.T).softmax(-1) for t in (positive, negative))
        heads.append(normed(times(first - lambdas[1] * second, drawn), layer.stage2))
    local = layer.dwc(v[2:].T.unflatten(1, (5, 6))[None])[0].flatten(1).T
    return layer.proj(torch.cat(heads, 1) + F.pad(local, (0, 0, 2, 0)))[None]


def test_a_layer_of_vca_is_that_by_hand():
    layer, x = make_layer(), torch.randn(1, 32, DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 32, DIM, dtype=torch.float64)
    with Rules():
        got = layer(x)
    want = by_hand(layer, x)
    torch.testing.assert_close(got, want)
    (got, want), (plain,) = (
        (torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)),
        torch.autograd.grad((layer(x) * weight).sum(), x),
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(got, plain, rtol=0.1)


@needs_compiler
def test_fused_kernels_make_no_difference():
    model = make_vca_vit(embed_dim=32, num_heads=2)
    x, classes = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
    want = relevance(model.double(), x.double(), classes).float()
    model.float()
    for block in model.blocks:
        block.attn.fused_attn = True
    torch.testing.assert_close(relevance(model, x, classes), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make_model", [make_vca_vit, make_timm_vit])
def test_what_changes_or_compiles_a_model_is_heeded(make_model):
    model, x, classes = make_model(), torch.randn(1, 3, 16, 16), torch.tensor([1])
    found = relevance(model, x, classes)
    torch.testing.assert_close(relevance(torch.compile(model, backend="eager"), x, classes), found)
    with vca.intervene(model, mute=[0]):
        assert not torch.allclose(relevance(model, x, classes), found, rtol=0.01)


@pytest.mark.parametrize(
    "attend, message",
    [
        (lambda x: nn.MultiheadAttention(8, 2)(x, x, x)[0], "cannot reach into nn.MultiheadAttention"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "not written for causal attention"),
    ],
)
def test_what_the_rules_cannot_reach_is_refused(attend, message):
    with pytest.raises(ValueError, match=message), Rules():
        attend(torch.randn(1, 4, 8, requires_grad=True))
