"""The kernels of the fused operators on a CPU against float64: the C++ ones, or the Triton ones in its interpreter.

Triton reads TRITON_INTERPRET when it is imported, so that its kernels need a process of their own, in which
`tests/vca/test_fused.py` runs this file once more. On a GPU, with and without its sanitizer:

    VCA_TEST_DEVICE=cuda python -m pytest tests/vca/test_fused_kernels.py
    VCA_TEST_DEVICE=cuda compute-sanitizer python -m pytest tests/vca/test_fused_kernels.py
"""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from tests.helpers.kernels import DEVICE, needs_compiler
from tests.helpers.layers import IRREGULAR, calls, describe, fused_and_exact, gradients, make, relative_error
from vca import functional as VF
from vca.kernels import cpu, ops

if ops.INTERPRETED:
    from triton.runtime import interpreter

    from vca.kernels import triton_kernels

ON_GPU = DEVICE != "cpu"
RUNS_CPP = not (ops.INTERPRETED or ON_GPU)
FLOAT = torch.bfloat16 if ON_GPU else torch.float32
pytestmark = [pytest.mark.usefixtures("every_new_tensor_holds_nan"), *[needs_compiler] * RUNS_CPP]
only_float32 = pytest.mark.skipif(ON_GPU, reason="the kernels for a GPU take no float32")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
OPERATORS = {
    VF.STAGE1: (ops.contrast_stage1, ops.contrast_stage1_backward),
    VF.STAGE2: (ops.contrast_stage2, ops.contrast_stage2_backward),
}


@pytest.fixture(scope="module", autouse=True)
def bfloat16_as_on_a_gpu():
    """Triton's interpreter holds bfloat16 as uint16; it would multiply those integers, and round towards zero."""
    if not ops.INTERPRETED:
        yield
        return
    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    bfloat16, float32 = interpreter.tl.bfloat16, interpreter.tl.float32

    def widened(x):
        if x.dtype.scalar != bfloat16:
            return x
        return interpreter.TensorHandle(np.left_shift(x.data.astype(np.uint32), 16).view(np.float32), float32)

    def rounded(x, source, target, mode):
        if target != bfloat16:
            return convert(x, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter.InterpreterBuilder, "create_dot", lambda _, a, b, *c: dot(_, widened(a), widened(b), *c)
        )
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


def test_the_kernels_are_compiled_where_there_is_a_compiler():
    assert not RUNS_CPP or cpu.kernels() is not None


@pytest.fixture(autouse=True)
def few_parts(monkeypatch):
    """The interpreter is slow; a part then has several blocks, and some sequences several parts."""
    if ops.INTERPRETED:
        monkeypatch.setattr(triton_kernels, "PROGRAMS", 4)


def inputs(axes, dtype, batch=1, heads=2, length=50, n=9, d=32):
    """Tokens, keys or queries, values and lambda; the sequences are views of one projection, as in the layer."""

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)

    x, v = randn(batch, length, 2, heads, d).transpose(1, 3).unbind(2)
    values = v if axes == VF.STAGE1 else randn(batch * heads, n, d)
    tokens = 2 * d**-0.5 * randn(batch * heads, 2 * n, d)
    return [y.requires_grad_() for y in (tokens, x.detach(), values.detach(), torch.tensor(0.6, device=DEVICE))]


def in_float64(tokens, x, values, lam, gain, axes):
    """`VF.contrast`, whose sequences are (BH, T, d)."""
    flat = (y.flatten(0, 1) if y.ndim == 4 else y for y in (x, values))
    out = VF.contrast(tokens, *flat, lam, gain, axes)
    return out if axes == VF.STAGE1 else out.view(x.shape)


CASES = [
    (torch.float32, dict(length=1, n=1)),
    (torch.float32, dict(length=197, n=49, d=64)),
    (torch.float16, dict(length=130, n=17)),
    (torch.bfloat16, dict(length=2, n=4, batch=2)),
    (torch.bfloat16, dict(length=197, n=49, d=64)),
    (torch.bfloat16, dict(length=257, n=64, d=128, heads=1)),
]
if ON_GPU:
    CASES = [case for case in CASES if case[0] != torch.float32]
    CASES += [(torch.bfloat16, dict(length=length, n=49, d=64, batch=8)) for length in (1, 1024, 4999)]
elif ops.INTERPRETED:  # any number of channels
    CASES += [
        (torch.float32, dict(length=65, n=9, batch=2, heads=2, d=24)),
        (torch.float32, dict(length=4999, n=3, heads=1, d=8)),
    ]
else:  # any number of contrast tokens, and 16 channels at a time
    CASES += [
        (torch.float32, dict(length=length, n=n, batch=2, d=48))
        for length, n in ((65, 9), (255, 6), (256, 1), (529, 11), (1400, 100), (4999, 3))
    ]


@pytest.mark.parametrize("axes", [VF.STAGE1, VF.STAGE2], ids=["stage1", "stage2"])
@pytest.mark.parametrize("dtype, case", CASES, ids=str)
def test_output_and_gradients_equal_the_reference(dtype, case, axes):
    given = inputs(axes, dtype, **case)
    exact = [y.detach().double().requires_grad_() for y in given]
    out, want = ops.contrast(*given, 0.7, axes), in_float64(*exact, 0.7, axes)
    assert out.dtype == dtype
    assert relative_error(out, want.detach()) < TOLERANCE[dtype]

    weight = torch.randn(out.shape, dtype=torch.float64).to(DEVICE, dtype)
    found = torch.autograd.grad(out, given, weight)
    targets = torch.autograd.grad(want, exact, weight.double())
    for name, x, grad, target in zip(("tokens", "x", "values", "lambda"), given, found, targets, strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype, name
        unit = target.norm().clamp(min=0.5 * weight.norm())  # with one key, some vanish; lambda's is a sum that cancels
        assert (grad.double() - target).norm() < TOLERANCE[dtype] * unit, name


@only_float32
def test_scores_of_any_size():
    """Large ones neither overflow nor reach the padding, where a score of 0 would be the largest of all."""
    for axes in (VF.STAGE1, VF.STAGE2):
        given = inputs(axes, torch.float32, length=70)
        with torch.no_grad():
            given[0].copy_(-200 * given[0].abs())
            given[1].copy_(given[1].abs())
        out = ops.contrast(*given, 0.7, axes)
        torch.testing.assert_close(out, in_float64(*given, 0.7, axes), rtol=1e-3, atol=1e-3)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), given))


@only_float32
@pytest.mark.parametrize("axes", OPERATORS, ids=["stage1", "stage2"])
def test_gradients_at_huge_scores_that_are_close(axes):
    """Scores of 10^4 and a few 64ths, which float32 holds exactly: next to them, the softmax's sum must not be lost."""
    given = inputs(axes, torch.float32, length=300, n=6)
    with torch.no_grad():
        for tensor in given[:2]:
            tensor.copy_(tensor.mul(8).round().clamp(-8, 8) / 8)
            tensor[..., 0] = 100
    exact = [y.detach().double().requires_grad_() for y in given]
    out, want = ops.contrast(*given, 0.7, axes), in_float64(*exact, 0.7, axes)
    weight = torch.randn_like(out)
    targets = torch.autograd.grad(want, exact, weight.double())
    for grad, target in zip(torch.autograd.grad(out, given, weight), targets, strict=True):
        assert relative_error(grad, target) < 5e-5


def test_an_empty_batch():
    for axes in OPERATORS:
        given = inputs(axes, FLOAT, batch=0)
        out = ops.contrast(*given, 0.7, axes)
        assert out.shape == ((0, 9, 32) if axes == VF.STAGE1 else given[1].shape)
        found = torch.autograd.grad(out.sum(), given)
        assert [grad.shape for grad in found] == [x.shape for x in given] and found[-1] == 0


def test_the_difference_of_close_streams_is_not_rounded_away():
    """Streams whose maps differ by less than bfloat16 resolves, and lambda = 1: all of the output is the difference."""
    for axes in (VF.STAGE1, VF.STAGE2):
        tokens, x, values, _ = (y.detach() for y in inputs(axes, torch.bfloat16, length=200))
        positive, negative = tokens.chunk(2, dim=1)
        negative.copy_(positive * (1 + 2**-7))
        out = ops.contrast(tokens, x, values, torch.tensor(1.0, device=DEVICE), 0.7, axes)
        want = in_float64(*(y.double() for y in (tokens, x, values, torch.tensor(1.0, device=DEVICE))), 0.7, axes)
        assert relative_error(out, want) < 1e-2


@only_float32
@pytest.mark.skipif(ops.INTERPRETED, reason="the plain operations of NumPy decide there")
@pytest.mark.parametrize("place", range(3), ids=["tokens", "x", "values"])
@pytest.mark.parametrize("axes", OPERATORS, ids=["stage1", "stage2"])
def test_a_number_that_is_none_is_not_hidden(axes, place):
    """Training stops at a loss that is not finite; a kernel must not make a number of it."""
    for bad in (float("nan"), float("inf")):
        given = [y.detach() for y in inputs(axes, torch.float32, length=70)]
        given[place][..., 0, 5].fill_(bad)
        lost = in_float64(*given, 0.7, axes).isnan()
        assert lost.any() and ops.contrast(*given, 0.7, axes)[lost].isnan().all()


@pytest.mark.skipif(not RUNS_CPP, reason="it has no threads")
def test_threads_change_nothing():
    threads = torch.get_num_threads()
    for axes in OPERATORS:
        given, results = inputs(axes, torch.float32, batch=3, length=300), []
        for count in (1, 3):
            torch.set_num_threads(count)
            out = ops.contrast(*given, 0.7, axes)
            results.append([out, *torch.autograd.grad(out.square().sum(), given)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    layer, _, x = fused_and_exact()
    x, results = torch.cat([x, x.flip(1), -x]), []
    for count in (1, 3):
        torch.set_num_threads(count)
        with torch.no_grad():
            results.append([layer(x)])
        results[-1] += gradients(layer, x, torch.ones_like(x))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("axes", OPERATORS, ids=["stage1", "stage2"])
def test_operators_are_registered_as_torch_wants_them(axes):
    forward, backward = OPERATORS[axes]
    given = inputs(axes, FLOAT, length=5, n=2, heads=1, d=16)
    torch.library.opcheck(forward, (*given, 0.7))
    with torch.no_grad():
        out = forward(*given, 0.7)
        out, saved = (out[0], out[1:]) if axes == VF.STAGE1 else (out, ())
        torch.library.opcheck(backward, (torch.randn_like(out), *given, 0.7, *saved))


# --- the layer -------------------------------------------------------------------------------------------------------


@only_float32
@pytest.mark.parametrize("options", [{}, dict(pooling="learned"), dict(tokens="emb", dwc=False)], ids=describe)
def test_a_layer_has_the_output_and_gradients_of_the_plain_one(options):
    layer, exact, x = fused_and_exact(**options)
    assert relative_error(layer(x), exact(x.double()).detach()) < 1e-5
    weight = torch.randn_like(x)
    names = ["x", *dict(layer.named_parameters())]
    targets = gradients(exact, x.double(), weight.double())
    for name, grad, target in zip(names, gradients(layer, x, weight), targets, strict=True):
        tolerance = 1e-4 if "lambda" in name else 1e-5  # lambda's gradient is a sum that cancels
        assert relative_error(grad, target) < tolerance, name


@only_float32
def test_derivatives_in_forward_mode_are_those_of_the_plain_layer():
    layer, exact, x = fused_and_exact()
    tangent = torch.randn_like(x)
    want = torch.func.jvp(exact, (x.double(),), (tangent.double(),))[1]
    assert relative_error(torch.func.jvp(layer, (x,), (tangent,))[1], want.detach()) < 1e-5
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    assert relative_error(got, want.detach()) < 1e-5
    change = torch.randn_like(layer.positive_embed)

    def of_the_weights(net: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        def run(embed: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(net, dict(positive_embed=embed), (x.to(dtype),))

        return torch.func.jvp(run, (layer.positive_embed.detach().to(dtype),), (change.to(dtype),))[1].detach()

    assert relative_error(of_the_weights(layer, torch.float32), of_the_weights(exact, torch.float64)) < 1e-5


@only_float32
def test_derivatives_of_second_order_are_those_of_the_plain_layer():
    (layer, exact, x), (weight, direction) = fused_and_exact(), torch.randn(2, 1, 37, 32)

    def along(net: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        """How a gradient's length along a direction changes with the input and the parameters."""
        point = x.detach().to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(net(point), point, weight.to(dtype), create_graph=True)
        return torch.autograd.grad((first * direction.to(dtype)).sum(), [point, net.qkv.weight, net.positive_embed])

    for got, want in zip(along(layer, torch.float32), along(exact, torch.float64), strict=True):
        assert relative_error(got, want) < 1e-4


@only_float32
def test_gradients_of_every_sample_are_those_of_the_plain_layer():
    layer, exact, x = fused_and_exact()
    samples = torch.cat([x, x.flip(1), 2 * x])

    def of_every_sample(net: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        def loss(parameters: dict, sample: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(net, parameters, (sample[None],)).square().sum()

        given = {name: parameter.detach() for name, parameter in net.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(given, samples.to(dtype))

    wanted = of_every_sample(exact, torch.float64)
    for name, got in of_every_sample(layer, torch.float32).items():
        assert relative_error(got, wanted[name]) < (1e-4 if "lambda" in name else 1e-5), name


@only_float32
def test_gradients_of_many_outputs_at_once_are_those_of_the_plain_layer():
    layer, exact, x = fused_and_exact()
    weights = torch.randn(3, *x.shape)

    def of_all(net: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        point = x.detach().to(dtype).requires_grad_()
        return torch.autograd.grad(net(point), point, weights.to(dtype), is_grads_batched=True)[0]

    assert relative_error(of_all(layer, torch.float32), of_all(exact, torch.float64)) < 1e-5


def test_a_layer_on_an_empty_batch():
    layer, _, x = (part.to(DEVICE, FLOAT) for part in fused_and_exact())
    x = x[:0].requires_grad_()
    assert torch.autograd.grad(layer(x).sum(), x)[0].shape == layer(x).shape == x.shape


def test_autocast():
    layer, exact, x = (part.to(DEVICE) for part in fused_and_exact())
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact(x.double()).detach()) < 2e-2
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@only_float32
@pytest.mark.parametrize("tokens, parts", [("pool+emb", ["attend"]), ("pool", ["stage1", "stage2", "join"])])
def test_flops_are_those_of_the_plain_layer(tokens, parts):
    layer, exact, x = fused_and_exact(tokens=tokens)
    found = calls(lambda: layer(x).sum().backward())
    names = {name for part in parts for name in (f"vca.contrast_{part}", f"vca.contrast_{part}_backward")}
    assert ops.INTERPRETED or names == {str(name) for name in found if str(name).startswith("vca.")}
    plain = calls(lambda: exact(x.double()).sum().backward())
    if not ops.INTERPRETED:  # PyTorch counts this as if the convolution mixed its channels
        plain[torch.ops.aten.convolution_backward] = 2 * plain[torch.ops.aten.convolution]
    assert sum(found.values()) == sum(plain.values())


@only_float32
def test_compiled_and_exported_layers(monkeypatch):
    monkeypatch.delattr(ops, "plain_gradients")  # the compiled backward pass is the kernels'
    layer, _, x = fused_and_exact()
    weight = torch.randn_like(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, x, weight), gradients(layer, x, weight))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    last = torch.ops.vca.contrast_stage2 if ops.INTERPRETED else torch.ops.vca.contrast_attend
    assert last in calls(lambda: exported(x))


@only_float32
@pytest.mark.parametrize(
    "options",
    [
        dict(stage2_softmax="joint"),
        dict(stage1_differential=False),
        dict(stage2_differential=False),
        dict(dim=258, heads=2),
        *[dict(dim=32, heads=2, grid_size=(9, 9), token_grid=(8, 9))] * ops.INTERPRETED,
    ],
    ids=describe,
)
def test_what_is_not_the_standard_form_takes_the_plain_path(options):
    layer, x = make(torch.float32, **IRREGULAR | options)
    layer.fused_attn = True
    assert not any("vca" in str(operator) for operator in calls(lambda: layer(x)))


@only_float32
def test_maps_and_float64_take_the_plain_path():
    layer, exact, x = fused_and_exact()
    exact.fused_attn = True
    for run in (lambda: layer.forward_with_maps(x), lambda: exact(x.double())):
        assert not any("vca" in str(operator) for operator in calls(run))
