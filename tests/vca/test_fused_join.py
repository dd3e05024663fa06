"""What joins the stages of a layer, and all of it as one operator, on a CPU against float64."""

import copy
import math
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

from tests.helpers.kernels import needs_compiler
from tests.helpers.layers import calls, fused_and_exact, gradients, make, relative_error
from vca import functional as VF
from vca.kernels import ops, whole

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
pytestmark = [pytest.mark.usefixtures("every_new_tensor_holds_nan"), needs_compiler]


JOINED = [
    (torch.float32, dict(grid_size=(14, 14), prefix=1, d=64)),
    (torch.float32, dict(grid_size=(1, 4), prefix=2, batch=3, d=48)),
    (torch.float32, dict(grid_size=(5, 1), prefix=0, heads=1, d=16)),
    (torch.float32, dict(grid_size=(1, 1), prefix=0, d=16)),
    (torch.bfloat16, dict(grid_size=(3, 7), prefix=0, batch=2, d=32)),
]


def joined(dtype, grid_size, prefix, batch=1, heads=2, d=32):
    """What `ops.join` takes; the values are a view of a projection, as in the layer."""

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    length, dim = prefix + grid_size[0] * grid_size[1], heads * d
    gathered, v = (
        randn(batch, length, heads, d).transpose(1, 2),
        randn(batch, length, 2, heads, d).transpose(1, 3)[:, :, 1],
    )
    tensors = gathered, v, randn(d), randn(dim, 1, 3, 3), randn(dim)
    return [y.detach().requires_grad_() for y in tensors], (grid_size, prefix)


@pytest.mark.parametrize("dtype, case", JOINED, ids=str)
def test_what_is_joined_and_its_gradients_equal_the_reference(dtype, case):
    given, geometry = joined(dtype, **case)
    exact = [y.detach().double().requires_grad_() for y in given]
    out, want = ops.join(*given, *geometry), VF.join(*exact, *geometry)
    assert out.dtype == dtype and relative_error(out, want.detach()) < TOLERANCE[dtype]
    weight = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    targets = torch.autograd.grad(want, exact, weight.double())
    for x, grad, target in zip(given, torch.autograd.grad(out, given, weight), targets, strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype and relative_error(grad, target) < TOLERANCE[dtype]


def test_joining_is_registered_as_torch_wants_it():
    given, geometry = joined(torch.float32, (2, 3), 1)
    torch.library.opcheck(ops.contrast_join, (*given, *geometry))
    with torch.no_grad():
        grad = torch.randn_like(ops.contrast_join(*given, *geometry))
        torch.library.opcheck(ops.contrast_join_backward, (grad, *given, *geometry))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(
    "grid_size, token_grid, prefix",
    [((5, 7), (3, 4), 2), ((4, 6), (2, 3), 0), ((1, 1), (1, 1), 1), ((30, 32), (8, 10), 1)],
)
def test_a_whole_layer_is_one_operator(grid_size, token_grid, prefix, batch):
    geometry = dict(grid_size=grid_size, token_grid=token_grid, num_prefix_tokens=prefix)
    layer, x = make(torch.float32, dim=96, heads=2, batch=max(batch, 1), **geometry)
    x, exact = x[:batch], copy.deepcopy(layer).double()
    layer.fused_attn = True
    with torch.no_grad():
        want = exact(x.double())
        assert layer(x).shape == want.shape and (layer(x) - want).norm() <= 1e-5 * want.norm()
        found, plain = calls(lambda: layer(x)), calls(lambda: exact(x.double()))
    assert torch.ops.vca.contrast_attend in found and torch.ops.vca.contrast_stage1 not in found
    assert sum(found.values()) == sum(plain.values())
    weight = torch.randn_like(x)
    targets = gradients(exact, x.double(), weight.double())
    least = 1e-6 * max(target.norm() for target in targets)  # of sums that cancel
    for grad, target in zip(gradients(layer, x, weight), targets, strict=True):
        assert grad.shape == target.shape and (grad - target).norm() <= 1e-4 * target.norm() + least
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and (y - want).norm() <= 2e-2 * want.norm()


def given(grid_size, token_grid, prefix, heads, d, batch=1, seed=0):
    """What `whole.attend` takes in bfloat16, and its geometry."""
    random = torch.Generator().manual_seed(seed)
    length, dim, n = prefix + math.prod(grid_size), heads * d, math.prod(token_grid)
    shapes = (n, dim), (n, dim), *[(d,)] * 10, (dim, 1, 3, 3), (dim,)
    scales = 0.5, 0.5, *[0.1] * 8, 1, 1, 0.3, 0.1
    qkv, *parameters = (
        (scale * torch.randn(shape, generator=random)).bfloat16()
        for shape, scale in zip(((batch, length, 3 * dim), *shapes), (1, *scales), strict=True)
    )
    return qkv, parameters, (grid_size, token_grid, prefix, 0.3)


@pytest.mark.parametrize(
    "shape",
    [
        ((14, 14), (7, 7), 1, 3, 64),
        ((30, 35), (8, 8), 0, 1, 32),  # more scores than are kept of float32
        ((9, 9), (2, 3), 2, 2, 32, 3),
        ((1, 1), (1, 1), 0, 1, 32),
        ((3, 3), (1, 1), 1, 1, 96),
        ((5, 7), (3, 3), 1, 2, 16),
        ((5, 7), (3, 3), 1, 2, 48),
    ],
    ids=str,
)
def test_bfloat16_is_rounded_before_products_alone(shape):
    """The plain path, which rounds after each step, has about twice the error."""
    qkv, parameters, geometry = given(*shape)
    exact = [y.double().requires_grad_() for y in (qkv, *parameters)]
    want = VF.attend(exact[0], exact[1:], *geometry)
    with torch.no_grad():
        out = whole.attend(qkv, parameters, *geometry)
        assert out.dtype == torch.bfloat16 and relative_error(out, want.detach()) < 4e-3
        apart = torch.nn.functional.pad(qkv, (0, 1))[..., :-1]  # whose rows are an odd number apart
        assert relative_error(whole.attend(apart, parameters, *geometry), want.detach()) < 4e-3
        missing = qkv.clone()
        missing[0, -1] = torch.nan
        assert whole.attend(missing, parameters, *geometry)[0].isnan().all()
    inputs = [y.requires_grad_() for y in (qkv, *parameters)]
    out, weight = whole.attend(inputs[0], inputs[1:], *geometry), torch.randn(want.shape).bfloat16()
    assert relative_error(out, want.detach()) < 4e-3
    targets = torch.autograd.grad(want, exact, weight.double())
    least = 2e-3 * max(target.norm() for target in targets)  # of sums that cancel
    for x, grad, target in zip(inputs, torch.autograd.grad(out, inputs, weight), targets, strict=True):
        assert grad.dtype == torch.bfloat16 and grad.shape == x.shape
        assert (grad.double() - target).norm() <= 1e-2 * target.norm() + least


def test_a_tangent_goes_through_a_layer_without_gradients():
    layer, exact, x = fused_and_exact()
    tangent = torch.randn_like(x)
    want = torch.func.jvp(exact, (x.double(),), (tangent.double(),))[1].detach()
    with torch.no_grad(), forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    assert relative_error(got, want) < 1e-5


def test_the_one_operator_is_registered_as_torch_wants_it():
    layer, _, x = fused_and_exact()
    with mock.patch.object(whole, "attend", side_effect=whole.attend) as attend, torch.no_grad():
        want = layer(x)
    qkv, parameters, *geometry = (
        value.detach() if torch.is_tensor(value) else value for value in attend.call_args.args
    )
    inputs = qkv, [parameter.detach() for parameter in parameters], *geometry
    with torch.no_grad():
        for saves in (False, True):
            torch.library.opcheck(torch.ops.vca.contrast_attend.default, (*inputs, saves))
        out, *saved = torch.ops.vca.contrast_attend(*inputs, True)
        torch.library.opcheck(torch.ops.vca.contrast_attend_backward.default, (torch.randn_like(out), *inputs, *saved))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want)
        assert torch.ops.vca.contrast_attend in calls(lambda: torch.export.export(layer, (x,)).module()(x))
