"""The layer against an independent reference: outputs, maps, gradients, precision, and refusals in words."""

import itertools
import math

import pytest
import torch

from tests.helpers.layers import DIM, GEOMETRIES, HEADS, SMALL, describe, make, relative_error
from tests.helpers.reference import Reference, lambda_init, parameters, visual_contrast_attention
from vca import VisualContrastAttention
from vca import functional as VF

OPTIONS = [
    dict(dwc=dwc, tokens=tokens, stage2_softmax=softmax)
    for dwc, tokens, softmax in itertools.product((True, False), ("pool+emb", "emb", "pool"), ("separate", "joint"))
]
# Every geometry with the options and depths taken in turn, then every option and prefix count on a hard grid.
DEPTHS = (0, 1, 5, 11)
CASES = [
    geometry | OPTIONS[(5 * i) % len(OPTIONS)] | dict(depth=DEPTHS[i % len(DEPTHS)])
    for i, geometry in enumerate(GEOMETRIES)
] + [
    dict(grid_size=(5, 7), token_grid=(3, 5), num_prefix_tokens=prefix, depth=2) | options
    for options in OPTIONS
    for prefix in (0, 1, 2)
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def expected(layer: VisualContrastAttention, x: torch.Tensor, heads=HEADS, **case) -> Reference:
    options = {k: v for k, v in case.items() if k != "dwc"}
    return visual_contrast_attention(parameters(layer), x, num_heads=heads, **options)


def largest_error(actual: torch.Tensor, target) -> float:
    """Largest difference, in units of the target's largest value where that is above 1."""
    target = torch.as_tensor(target)
    assert actual.shape == target.shape
    return float((actual.detach().double() - target).abs().max() / max(1.0, float(target.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_output_and_maps_equal_the_reference(case, dtype):
    layer, x = make(dtype, **case)
    want = expected(layer, x, **case)
    tolerance = TOLERANCE[dtype]

    y, maps = layer.forward_with_maps(x)
    assert y.dtype == dtype
    assert largest_error(y, want.output) < tolerance
    assert largest_error(layer(x), want.output) < tolerance
    with torch.no_grad():
        assert largest_error(layer(x), want.output) < tolerance
        inference_maps = layer.forward_with_maps(x)[1]
    for stage, stream in itertools.product(("stage1", "stage2"), ("positive", "negative", "differential")):
        error = largest_error(getattr(getattr(maps, stage), stream), getattr(want, f"{stage}_{stream}"))
        assert error < tolerance, f"{stage}.{stream}"
        torch.testing.assert_close(
            getattr(getattr(inference_maps, stage), stream), getattr(getattr(maps, stage), stream).detach()
        )
    assert maps.lambda1.item() == pytest.approx(want.lambda1, abs=tolerance)
    assert maps.lambda2.item() == pytest.approx(want.lambda2, abs=tolerance)
    start = lambda_init(case["depth"])
    assert abs(want.lambda1 - start) > 1e-3 and abs(want.lambda2 - start) > 1e-3, "the lambdas have not moved"


def test_without_qkv_bias_equals_the_reference():
    case = dict(grid_size=(5, 4), token_grid=(2, 3), num_prefix_tokens=1)
    layer, x = make(**case, qkv_bias=False)
    assert layer.qkv.bias is None
    assert largest_error(layer(x), expected(layer, x, **case).output) < 1e-10


def test_one_contrast_token_and_as_many_as_patches():
    for token_grid in [(1, 1), (3, 4)]:
        case = dict(grid_size=(3, 4), token_grid=token_grid, num_prefix_tokens=1)
        layer, x = make(**case)
        assert largest_error(layer(x), expected(layer, x, **case).output) < 1e-10


def test_a_trained_layer_runs_on_another_grid():
    case = dict(grid_size=(6, 6), token_grid=(3, 3), num_prefix_tokens=1)
    layer, _ = make(**case)
    layer.grid_size = (9, 13)
    x = torch.randn(2, 1 + 9 * 13, DIM, dtype=torch.float64)
    want = expected(layer, x, **(case | dict(grid_size=(9, 13))))
    assert largest_error(layer(x), want.output) < 1e-10


def test_an_image_does_not_depend_on_the_rest_of_its_batch():
    case = dict(grid_size=(6, 5), token_grid=(3, 2), num_prefix_tokens=1)
    layer, x = make(**case, batch=3)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), rtol=0, atol=1e-12)


def test_initial_values():
    layer = VisualContrastAttention(768, 12, grid_size=(14, 14), token_grid=(7, 7), depth=3)
    assert layer.positive_embed.shape == layer.negative_embed.shape == (49, 768)
    for embed in (layer.positive_embed, layer.negative_embed):
        assert abs(embed.mean().item()) < 0.02
        assert abs(embed.std().item() - 1) < 0.02
    assert not torch.equal(layer.positive_embed, layer.negative_embed)
    vectors = [getattr(s, f"lambda_{v}") for s in (layer.stage1, layer.stage2) for v in ("q1", "k1", "q2", "k2")]
    assert all(vector.shape == (64,) for vector in vectors)
    assert abs(torch.cat(vectors).std().item() - 0.1) < 0.02
    for stage in (layer.stage1, layer.stage2):
        assert torch.equal(stage.norm.weight, torch.ones(64))
        assert stage.norm.eps == 1e-5
    assert layer.lambda_init == pytest.approx(0.8 - 0.6 * math.exp(-0.9))


def test_parameter_names_that_checkpoints_depend_on():
    layer = VisualContrastAttention(DIM, HEADS, grid_size=(4, 4), token_grid=(2, 2))
    vectors = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "norm.weight")
    names = {f"{stage}.{vector}" for stage in ("stage1", "stage2") for vector in vectors}
    names |= {f"{part}.{kind}" for part in ("qkv", "dwc", "proj") for kind in ("weight", "bias")}
    assert set(layer.state_dict()) == names | {"positive_embed", "negative_embed"}


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_every_parameter_receives_a_finite_gradient_that_is_not_zero(options):
    layer, x = make(**SMALL, **options)
    (layer(x) ** 2).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if options["tokens"] == "pool" and ".lambda" not in name and ".norm" not in name:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad.abs().max() > 1e-8, name
    for name, part in zip("qkv", layer.qkv.weight.grad.chunk(3), strict=True):
        assert (part.abs().amax(dim=1) > 0).all(), f"rows of the {name} weight"


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[4], OPTIONS[8]], ids=describe)
def test_gradcheck(options):
    layer, x = make(dim=4, heads=2, batch=1, **SMALL, **options)
    names = [name for name, _ in layer.named_parameters()]
    inputs = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *inputs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_maps_path_has_the_gradients_of_the_fast_path(options):
    layer, x = make(**SMALL, **options)
    x.requires_grad_()
    wanted = [x, *layer.parameters()]
    weight = torch.randn_like(x)
    fast = torch.autograd.grad((layer(x) * weight).sum(), wanted)
    explicit = torch.autograd.grad((layer.forward_with_maps(x)[0] * weight).sum(), wanted)
    for a, b in zip(fast, explicit, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_flow_through_the_maps():
    layer, x = make(**SMALL)
    _, maps = layer.forward_with_maps(x)
    maps.stage2.differential.pow(2).sum().backward()
    assert layer.positive_embed.grad.abs().max() > 0
    assert layer.stage2.lambda_q1.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=describe)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_inference_equals_training_path(options, dtype, large, monkeypatch):
    layer, x = make(dtype, **SMALL, **options)
    before = x.clone()
    trained = layer(x).detach()
    if large:
        monkeypatch.setattr(VF, "IN_PLACE_FROM", 0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), trained)
        torch.testing.assert_close(layer.forward_with_maps(x)[0], trained)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), trained)
    assert torch.equal(x, before), "the in-place path has written into its input"


# --- precision -------------------------------------------------------------------------------------------------------

PRECISION_CASES = [
    dict(grid_size=(14, 14), token_grid=(7, 7), num_prefix_tokens=1, depth=0),
    dict(grid_size=(8, 8), token_grid=(4, 4), depth=5),
    dict(grid_size=(9, 13), token_grid=(3, 5), num_prefix_tokens=2, depth=11, stage2_softmax="joint"),
    dict(grid_size=(7, 7), token_grid=(4, 4), depth=2, tokens="emb", dwc=False),
]


def assert_kept_in_float32(maps: dict) -> None:
    for stage in ("stage1", "stage2"):
        for stream in ("positive", "negative", "differential"):
            assert getattr(getattr(maps, stage), stream).dtype == torch.float32, f"{stage}.{stream}"
    for scalar in ("lambda1", "lambda2", "row_scale1", "row_scale2"):
        assert getattr(maps, scalar).dtype == torch.float32, scalar


def in_mode(mode: str, layer, x):
    """The layer and input of a reduced-precision mode, and a function that runs the layer in that mode."""
    if mode == "cast":
        return layer.to(torch.bfloat16), x.to(torch.bfloat16), lambda f, x: f(x)

    def autocast(f, x):
        with torch.autocast("cpu", torch.bfloat16):
            return f(x)

    return layer, x, autocast


@pytest.mark.parametrize("mode", ["cast", "autocast"])
@pytest.mark.parametrize("case", PRECISION_CASES, ids=describe)
def test_bfloat16_stays_near_the_reference(case, mode):
    layer, x, run = in_mode(mode, *make(torch.float32, **case))
    want = expected(layer, x, **case)
    y, maps = run(layer.forward_with_maps, x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, want.output) < 2e-2
    assert relative_error(run(layer, x), want.output) < 2e-2
    with torch.no_grad():
        assert relative_error(run(layer, x), want.output) < 2e-2
    assert_kept_in_float32(maps)
    assert maps.lambda1.item() == pytest.approx(want.lambda1, abs=1e-5)
    assert maps.lambda2.item() == pytest.approx(want.lambda2, abs=1e-5)
    for stream in (maps.stage1.positive, maps.stage1.negative):
        torch.testing.assert_close(stream.sum(-1), torch.ones(stream.shape[:-1]), rtol=0, atol=1e-5)


def contrast_of_close_streams():
    """A layer whose scores are exact in bfloat16 and whose streams differ by a percent, with lambda = 1.

    All of its signal is in the difference of two nearly equal maps, so rounding the maps or lambda to bfloat16 (0.4 %)
    before subtracting destroys it, while rounding anything else costs a fraction of a percent.
    """
    case = dict(grid_size=(7, 7), token_grid=(2, 2), tokens="emb", dwc=False)
    layer = VisualContrastAttention(4, 1, **case)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (2, 49, 4), generator=generator).float()
    keys, values = torch.diag(torch.tensor([1.0, 1, 0, 0])), torch.diag(torch.tensor([32.0, 64, 32, 64]))
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.cat([keys, keys, values]))
        layer.qkv.bias.zero_()
        layer.proj.weight.copy_(torch.eye(4))
        layer.proj.bias.zero_()
        layer.positive_embed.copy_(torch.tensor([[1, 0.5, 0, 0], [-1, 1, 0, 0], [0.5, -1, 0, 0], [-0.5, -0.5, 0, 0]]))
        layer.negative_embed.copy_(layer.positive_embed)
        layer.negative_embed[:, 0] += torch.tensor([1.0, 0, -1, 0]) / 32
        layer.negative_embed[:, 1] += torch.tensor([0.0, -1, 0, 1]) / 32
        for stage in (layer.stage1, layer.stage2):  # lambda = exp(log 1.8) - exp(0) + 0.2 = 1
            for vector in (stage.lambda_q1, stage.lambda_k1, stage.lambda_q2, stage.lambda_k2):
                vector.zero_()
            stage.lambda_q1[0] = stage.lambda_k1[0] = math.sqrt(math.log(1.8))
    return layer, x, case


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_softmax_and_lambda_in_bfloat16_would_lose_the_contrast(mode, monkeypatch):
    layer, x, case = contrast_of_close_streams()
    layer, x, run = in_mode(mode, layer, x)
    want = expected(layer, x, heads=1, **case)
    assert want.lambda1 == pytest.approx(1, abs=1e-2)
    assert relative_error(run(layer, x), want.output) < 2e-2
    with torch.no_grad():
        assert relative_error(run(layer, x), want.output) < 2e-2

    with monkeypatch.context() as patched:
        patched.setattr(VF, "softmax", lambda scores, dim, in_place: torch.softmax(scores.bfloat16(), dim).bfloat16())
        assert relative_error(run(layer, x), want.output) > 0.1, "this case does not tell the two apart"
    with monkeypatch.context() as patched:
        patched.setattr(VF, "contrast_lambda", lambda *_: torch.tensor(want.lambda1 * (1 + 2**-8)))
        assert relative_error(run(layer, x), want.output) > 0.1, "this case does not tell the two apart"


def test_row_factors_do_not_overflow_in_float16():
    x = torch.full((3, 8), 1000.0, dtype=torch.float16)  # the square of 1000 is not a float16
    scale = VF.rms_scale(x, 0.5)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, torch.full((3, 1), 0.5 / 1000))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dim=25), r"dim=25 is not divisible by num_heads=3"),
        (dict(num_heads=0), r"dim=24 is not divisible by num_heads=0"),
        (dict(token_grid=(5, 2)), r"token_grid=\(5, 2\) must lie between 1x1 and the patch grid \(4, 6\)"),
        (dict(token_grid=(2, 7)), r"token_grid=\(2, 7\) must lie between 1x1 and the patch grid \(4, 6\)"),
        (dict(token_grid=(0, 2)), r"token_grid=\(0, 2\) must lie between 1x1"),
        (dict(num_prefix_tokens=-1), r"num_prefix_tokens=-1 is negative"),
        (dict(tokens="embed"), r"tokens='embed' is unknown; choose one of pool\+emb, emb, pool"),
        (dict(stage2_softmax="both"), r"stage2_softmax='both' is unknown; choose one of separate, joint"),
    ],
    ids=lambda value: describe(value) if isinstance(value, dict) else "",
)
def test_contradictory_arguments_are_refused_in_words(change, message):
    arguments = dict(dim=24, num_heads=3, grid_size=(4, 6), token_grid=(2, 3)) | change
    with pytest.raises(ValueError, match=message):
        VisualContrastAttention(**arguments)


@pytest.mark.parametrize("path", ["forward", "forward_with_maps"])
def test_masks_are_refused_in_words(path):
    layer, x = make(**SMALL)
    run = getattr(layer, path)
    with pytest.raises(ValueError, match="no masked form: attn_mask and is_causal are not supported"):
        run(x, attn_mask=torch.ones(10, 10, dtype=torch.bool))
    with pytest.raises(ValueError, match="no masked form"):
        run(x, is_causal=True)
    run(x, attn_mask=None, is_causal=False)


@pytest.mark.parametrize("path", ["forward", "forward_with_maps"])
def test_a_wrong_number_of_tokens_is_refused_in_words(path):
    layer, x = make(**SMALL)
    message = r"got 11 tokens, but this layer is set to 1 prefix tokens and a 3x3 grid \(10 tokens\); set its grid_size"
    with pytest.raises(ValueError, match=message):
        getattr(layer, path)(torch.cat([x, x[:, :1]], dim=1))
