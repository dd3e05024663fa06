"""Attributions against references of their own: NumPy in float64, finite differences, loops by hand."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vca
from tests.helpers.reference import parameters, softmax, visual_contrast_attention
from tests.helpers.vits import HEADS, make_timm_vit, make_vca_vit, randomized
from vca import attribution
from vca.attribution import METHODS

POOLS = {
    "class token": dict(class_token=True, global_pool="token", reg_tokens=1),
    "mean": dict(class_token=False, global_pool="avg"),
}
MAPS = ["effective-map rollout", "gradient-weighted effective map"]


def make(pool: str = "mean", **overrides) -> nn.Module:
    """A VCA classifier of 8x12 pixels, patches of 4, in float64, with gains that are not 1."""
    model = make_vca_vit(img_size=(8, 12), token_grid=(2, 2), **POOLS[pool], **overrides)
    return randomized(model, 0.2).double()


def pictures(count: int = 2, size: tuple[int, int] = (8, 12), seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_inputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    seen = []
    hooks = [b.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in model.blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def effective_maps(model: nn.Module, x: torch.Tensor) -> list[np.ndarray]:
    """(B, H, T, T) of every block, by the second implementation."""
    return [
        visual_contrast_attention(
            parameters(block.attn), tokens, num_heads=HEADS, grid_size=(2, 3), token_grid=(2, 2),
            num_prefix_tokens=model.num_prefix_tokens, depth=depth,
        ).effective
        for depth, (block, tokens) in enumerate(zip(model.blocks, layer_inputs(model, x), strict=True))
    ]  # fmt: skip


def over_pixels(patches: np.ndarray, patch: int = 4) -> np.ndarray:
    """Each patch's value shared out among its pixels: (B, rows, cols) -> (B, H, W)."""
    return np.kron(patches, np.ones((1, patch, patch))) / patch**2


@pytest.mark.parametrize("pool", POOLS)
def test_rollout_of_signed_maps(pool):
    model, x = make(pool), pictures()
    result, negative = np.eye(6 + model.num_prefix_tokens), 0
    for maps in effective_maps(model, x):
        mean = maps.mean(1)
        negative += (mean < 0).sum()
        result = (np.eye(len(result[-1])) + mean / np.abs(mean).sum(-1, keepdims=True)) / 2 @ result
    assert negative
    prefix = model.num_prefix_tokens
    row = result[:, 0, prefix:] if pool == "class token" else result[:, prefix:, prefix:].mean(1)
    got = METHODS["effective-map rollout"](model, x, torch.tensor([0, 1]))
    np.testing.assert_allclose(got.numpy(), over_pixels(row.reshape(2, 2, 3)), rtol=0, atol=1e-12)


def test_rollout_of_self_attention_is_the_published_one():
    model, x = make_timm_vit(img_size=(8, 12)).double(), pictures()
    result = np.eye(7)
    for block, tokens in zip(model.blocks, layer_inputs(model, x), strict=True):
        q, k, _ = block.attn.qkv(tokens).detach().numpy().reshape(2, 7, 3, HEADS, 8).transpose(2, 0, 3, 1, 4)
        result = (np.eye(7) + softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(8)).mean(1)) / 2 @ result
    np.testing.assert_allclose(result.sum(-1), 1)
    got = METHODS["effective-map rollout"](model, x, torch.tensor([0, 1]))
    np.testing.assert_allclose(got.numpy(), over_pixels(result[:, 0, 1:].reshape(2, 2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("target", [0, 3])
def test_gradient_weighted_map_against_finite_differences(pool, target):
    """Every entry of every effective map is nudged by hand, in what the layer hands to its output projection."""
    model, x, step = make(pool), pictures(1), 1e-5
    prefix = model.num_prefix_tokens
    length, width = 6 + prefix, model.embed_dim // HEADS
    want, signs = np.zeros(length), set()
    for block, tokens, maps in zip(model.blocks, layer_inputs(model, x), effective_maps(model, x), strict=True):
        layer = block.attn
        v = layer.qkv(tokens)[0, :, 2 * model.embed_dim :].detach().unflatten(-1, (HEADS, width))
        drawn = v * layer.stage1.norm.weight.detach() * layer.stage2.norm.weight.detach()
        for head in range(HEADS):
            nudges = torch.zeros(2, length, length, length, HEADS, width, dtype=torch.float64)
            for query in range(length):
                for key in range(length):
                    nudges[0, query, key, query, head] = step * drawn[key, head]
            nudges[1] = -nudges[0]
            nudges = nudges.flatten(4).flatten(0, 2)
            hook = layer.proj.register_forward_pre_hook(lambda _, args, nudges=nudges: (args[0] + nudges,))
            with torch.no_grad():
                plus, minus = model(x.expand(len(nudges), -1, -1, -1))[:, target].view(2, length, length)
            hook.remove()
            gradient = ((plus - minus) / (2 * step)).numpy()
            signs |= set(np.sign(gradient).ravel())
            want += (maps[0, head] * gradient.clip(0)).sum(0)
    assert signs >= {-1, 1}
    got = METHODS["gradient-weighted effective map"](model, x, torch.tensor([target]))
    np.testing.assert_allclose(got.numpy(), over_pixels(want[None, prefix:].reshape(1, 2, 3)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["vca_pvt_tiny", "pvt_tiny"])
def test_gradient_weighted_map_of_a_pyramid_counts_each_block_on_its_own_grid(name):
    model = vca.create_model(name, img_size=32, embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), num_classes=4)
    model, x, classes = model.double().eval(), pictures(2, (32, 32)), torch.tensor([1, 2])
    with vca.record(model) as maps:
        score = model(x)[[0, 1], classes].sum()
    want = torch.zeros(2, 32, 32, dtype=torch.float64)
    for layer in maps:
        gradient = torch.einsum(
            "bhid,bhjd->bhij", torch.autograd.grad(score, layer.gathered, retain_graph=True)[0], layer.values
        )
        rows, cols = layer.key_grid or layer.grid_size
        patches = (layer.effective * gradient.relu()).sum((1, 2)).unflatten(-1, (rows, cols)).detach()
        side = 32 // rows
        want += patches.repeat_interleave(side, 1).repeat_interleave(side, 2) / side**2
    got = METHODS["gradient-weighted effective map"](model, x, classes)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_map_of_one_head():
    model, x = make("class token"), pictures()
    want = effective_maps(model, x)[1][:, 2, 0, model.num_prefix_tokens :].reshape(2, 2, 3)
    got = attribution.head_map(model, x, torch.tensor([0, 1]), block=1, head=2)
    np.testing.assert_allclose(got.numpy(), over_pixels(want), rtol=0, atol=1e-12)


def gradient(model: nn.Module, x: torch.Tensor, target: int) -> np.ndarray:
    x = x.clone().requires_grad_()
    model(x)[:, target].sum().backward()
    return x.grad.numpy()


def test_gradient_x_input():
    model, x = make(), pictures()
    want = (gradient(model, x, 3) * x.numpy()).sum(1)
    got = METHODS["gradient x input"](model, x, torch.tensor([3, 3]))
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-12)


def test_integrated_gradients():
    """The same integral with NumPy's own Gauss-Legendre points; and with many of them it is complete."""
    model, x = make(), pictures()
    nodes, weights = np.polynomial.legendre.leggauss(32)
    mean = sum(w / 2 * gradient(model, (n + 1) / 2 * x, 3) for n, w in zip(nodes, weights, strict=True))
    got = METHODS["integrated gradients"](model, x, torch.tensor([3, 3])).numpy()
    np.testing.assert_allclose(got, (mean * x.numpy()).sum(1), rtol=0, atol=1e-6)  # Captum's points are float32
    with torch.no_grad():
        difference = (model(x) - model(torch.zeros_like(x)))[:, 3].numpy()
    assert np.abs(difference).min() > 0.05
    many = attribution.integrated_gradients(model, x, torch.tensor([3, 3]), steps=400)
    np.testing.assert_allclose(many.sum((1, 2)), difference, rtol=1e-2)


def test_occlusion():
    model, x = make(), pictures()
    with torch.no_grad():
        whole = model(x)[:, 3].numpy()
        falls, windows = np.zeros((2, 8, 12)), np.zeros((8, 12))
        for left in (0, 4):  # windows of 8x8 pixels on 8x12
            covered = x.clone()
            covered[:, :, :, left : left + 8] = 0
            falls[:, :, left : left + 8] += (whole - model(covered)[:, 3].numpy())[:, None, None]
            windows[:, left : left + 8] += 1
    got = METHODS["occlusion"](model, x, torch.tensor([3, 3]))
    np.testing.assert_allclose(got.numpy(), falls / windows, rtol=0, atol=1e-6)  # Captum adds up in float32


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make_model", [make_vca_vit, make_timm_vit])
def test_every_method_in_batches_for_any_class_and_from_the_model(name, make_model):
    model, x, method = make_model().double(), pictures(3, (16, 16)), METHODS[name]
    model.requires_grad_(False)
    classes = torch.tensor([0, 4, 2])
    together = method(model, x, classes)
    assert together.shape == (3, 16, 16) and together.isfinite().all() and not together.requires_grad
    alone = torch.cat([method(model, image[None], target[None]) for image, target in zip(x, classes, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)

    another_class = method(model, x, (classes + 1) % 5)
    assert (not torch.allclose(another_class, together)) == (name != "effective-map rollout")
    another_model = randomized(make_model().double(), 0.05, seed=1)
    assert not torch.allclose(method(another_model, x, classes), together, rtol=0.01)


@pytest.mark.parametrize("name", MAPS)
def test_windows_are_refused_in_words(name):
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(2, 3), num_classes=3
    )
    with pytest.raises(ValueError, match="within windows"):
        METHODS[name](swin.eval(), torch.randn(1, 3, 56, 56), torch.tensor([0]))


@pytest.mark.parametrize(
    "name, message", [("pvt_tiny", "coarser grid"), ("vca_pvt_tiny", "different sizes")], ids=["pvt", "vca_pvt"]
)
def test_rollout_across_grids_is_refused_in_words(name, message):
    model = vca.create_model(name, img_size=32, embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2)).eval()
    with pytest.raises(ValueError, match=message):
        METHODS["effective-map rollout"](model, torch.randn(1, 3, 32, 32), torch.tensor([0]))


def test_rollout_needs_a_row_that_the_classifier_reads():
    model = make_timm_vit(global_pool="max", class_token=False)
    with pytest.raises(ValueError, match="pools with 'max'"):
        METHODS["effective-map rollout"](model, torch.randn(1, 3, 16, 16), torch.tensor([0]))


@pytest.mark.parametrize(
    "stride, size, want",
    [
        ((4, 4), (32, 32), (4, 4)),
        ((16, 16), (224, 224), (16, 16)),
        ((4, 4), (224, 112), (16, 16)),
        ((2, 4), (20, 68), (4, 8)),
    ],
)
def test_cells_are_patches_or_several(stride, size, want):
    model = nn.Module()
    model.patch_embed = nn.Module()
    model.patch_embed.proj = nn.Conv2d(3, 1, stride, stride)
    assert attribution.cell_size(model, torch.empty(1, 3, *size)) == want


def test_a_cnn_is_explained_where_a_method_is_defined_for_it():
    model = timm.create_model("resnet10t", num_classes=3).eval()
    x, classes = torch.randn(1, 3, 64, 64), torch.tensor([1])
    assert attribution.cell_size(model, x) == (4, 4)
    for name, method in METHODS.items():
        if name in MAPS:
            with pytest.raises(ValueError, match="ResNet has no attention layer"):
                method(model, x, classes)
        else:
            assert method(model, x, classes).shape == (1, 64, 64)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_behind_its_own_normalization(name):
    model, x, classes = make("class token"), pictures(), torch.tensor([1, 2])
    for wrapped in (nn.Sequential(nn.Identity(), model).eval(), nn.DataParallel(model).eval()):
        want = METHODS[name](model, x, classes)
        torch.testing.assert_close(METHODS[name](wrapped, x, classes), want, rtol=0, atol=1e-6)


READOUTS = {  # what the classifier reads: its arguments, the tokens that decide, and their name
    "class token": (dict(class_token=True, global_pool="token", reg_tokens=2), [0], "the class token"),
    "average beside a class token": (dict(class_token=True, global_pool="avg"), range(1, 7), "the average patch"),
    "average beside registers": (
        dict(class_token=False, global_pool="avg", reg_tokens=2), range(2, 8), "the average patch"
    ),
    "average of all tokens": (
        dict(class_token=True, global_pool="avg", pool_include_prefix=True), range(7), "the average token"
    ),
}  # fmt: skip


@pytest.mark.parametrize("pool", POOLS)
def test_head_relevance_is_the_slope_of_the_logit_along_the_head(pool):
    """Without the depthwise convolution, scaling a head's columns of the output projection scales its attention."""
    model, x, classes = make(pool, dwc=False), pictures(), torch.tensor([2, 0])
    found, step = attribution.head_relevance(model, x, classes), 1e-6
    for block, layer in enumerate(model.blocks):
        width = layer.attn.proj.weight.shape[1] // HEADS
        for head in range(HEADS):
            logits = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight = layer.attn.proj.weight
                    kept = weight.clone()
                    weight[:, head * width : (head + 1) * width] *= 1 + sign * step
                    logits.append(model(x).gather(1, classes[:, None])[:, 0])
                    weight.copy_(kept)
            torch.testing.assert_close(
                found[block][:, head], (logits[0] - logits[1]) / (2 * step), rtol=1e-5, atol=1e-8
            )


@pytest.mark.parametrize("case", READOUTS)
@pytest.mark.parametrize("make_model", [make_vca_vit, make_timm_vit], ids=["vca", "timm"])
def test_the_readout_is_what_the_logits_depend_on(make_model, case):
    """The tokens of the last block whose change moves the logits are those that the readout names."""
    arguments, tokens, name = READOUTS[case]
    model, x = make_model(img_size=(8, 12), **arguments), pictures(1).float()
    model.eval()
    with vca.record(model) as maps, torch.no_grad():
        model(x)
    read = attribution.readout(model, maps[-1])
    assert read.name == name
    count = maps[-1].num_prefix_tokens + 6
    last = torch.randn(1, count, model.embed_dim, requires_grad=True)
    model.forward_head(model.norm(last)).sum().backward()
    moved = last.grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert moved == list(tokens) == list(range(count))[read.tokens]
    effective = maps[-1].effective
    row = effective[:, :, list(tokens), maps[-1].num_prefix_tokens :].mean(2).unflatten(-1, (2, 3))
    torch.testing.assert_close(read.rows(effective), row)


def test_a_distilled_model_reads_both_of_its_tokens():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    with vca.record(model) as maps, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    read = attribution.readout(model, maps[0])
    assert read.name == "the average of the class token and the distillation token"
    torch.testing.assert_close(
        read.rows(maps[0].effective), maps[0].effective[:, :, :2, 2:].mean(2).unflatten(-1, (2, 2))
    )


def test_what_is_no_row_of_a_map_is_refused():
    model = make_timm_vit(img_size=(8, 12), class_token=False, global_pool="max").eval()
    with vca.record(model) as maps, torch.no_grad():
        model(pictures(1).float())
    with pytest.raises(ValueError, match="no row of a map: it pools with 'max'"):
        attribution.readout(model, maps[0])


def test_grad_cam_by_hand():
    model = timm.create_model("resnet18", num_classes=3).eval()
    x, classes = torch.randn(2, 3, 64, 96), torch.tensor([0, 2])
    found = attribution.grad_cam(model, x, classes)
    features = model.forward_features(x).detach().requires_grad_()
    scores = model.forward_head(features).gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(scores, features)
    want = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    want = torch.nn.functional.interpolate(want, (64, 96), mode="bilinear")[:, 0]
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="Grad-CAM is for convolutional networks"):
        attribution.grad_cam(make_vca_vit(), torch.randn(1, 3, 16, 16), torch.tensor([0]))
