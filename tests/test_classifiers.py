"""The paper's classifiers: exact sizes and costs, structure, what timm asks of a model, image sizes, and learning."""

import inspect

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import Attention
from timm.models import create_feature_extractor, get_graph_node_names
from timm.models.swin_transformer import SwinTransformerBlock
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vca
from vca.grid import GridBlock
from vca.models import BASELINES, CLASSIFIERS, cswin, deit, pvt, swin
from vca.models.cswin import CrossShapedAttention, StripeAttention
from vca.models.pvt import SpatialReductionAttention

PAPER = {  # parameters, and GMACs at 224 px on the fast path
    "deit_tiny_patch16_224": (5_717_416, 1.2537),
    "vca_deit_tiny_patch16_224": (5_973_928, 1.2124),
    "deit_small_patch16_224": (22_050_664, 4.5989),
    "vca_deit_small_patch16_224": (22_556_008, 4.5162),
    "vca_deit_base_patch16_224": (87_570_664, 17.3985),
    "pvt_tiny": (13_227_240, 1.9264),
    "vca_pvt_tiny": (11_555_560, 2.0172),
    "swin_tiny_patch4_window7_224": (28_288_354, 4.4906),
    "vca_swin_tiny": (28_546_680, 4.5641),
    "cswin_tiny": (20_393_320, 4.3419),
    "vca_cswin_tiny": (20_413_928, 4.3122),
}
OURS = sorted(set(PAPER) - set(BASELINES))
PYRAMID = dict(img_size=64, depths=(1, 2, 1, 1), mlp_ratios=(2, 2, 2, 2))
PVT = PYRAMID | dict(embed_dims=(8, 16, 16, 24), num_heads=(1, 2, 2, 3))
CSWIN = PYRAMID | dict(embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4), split_sizes=(1, 2, 2, None))
SMALL = {
    "vca_deit_tiny_patch16_224": dict(img_size=64, embed_dim=32, depth=3, num_heads=2, token_grid=(2, 2)),
    "vca_pvt_tiny": PVT | dict(token_grid=(2, 2)),
    "pvt_tiny": PVT,
    "vca_swin_tiny": dict(
        img_size=64, embed_dim=16, depths=(1, 2, 1, 2), num_heads=(1, 2, 2, 4), token_grid=(2, 2), drop_path_rate=0
    ),
    "vca_cswin_tiny": CSWIN | dict(token_grid=(2, 2)),
    "cswin_tiny": CSWIN,
}
FAMILIES = sorted(SMALL)


def small(name: str, **overrides) -> nn.Module:
    torch.manual_seed(0)
    return vca.create_model(name, **(SMALL[name] | dict(num_classes=4) | overrides))


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    size = (model.in_chans, *model.patch_embed.img_size)
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name: str, **overrides) -> nn.Module:
    with torch.device("meta"):
        return vca.create_model(name, **overrides).eval()


# --- size and structure ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER)
def test_exact_parameters_and_multiply_adds(name):
    parameters, gmacs = PAPER[name]
    model = on_meta(name)
    assert count(model) == parameters
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=5e-4)


def test_names_are_registered_and_listed():
    assert set(PAPER) <= set(CLASSIFIERS) <= set(vca.list_models())
    assert set(deit.MODELS + pvt.MODELS + swin.MODELS + cswin.MODELS) == set(OURS)
    for name in OURS:
        entry = timm.models.model_entrypoint(name)
        assert entry.__name__ == name and inspect.getdoc(entry)


def test_structure_of_deit():
    for size, (dim, heads) in dict(tiny=(192, 3), small=(384, 6), base=(768, 12)).items():
        model = on_meta(f"vca_deit_{size}_patch16_224")
        assert (model.embed_dim, len(model.blocks), model.num_prefix_tokens, model.global_pool) == (dim, 12, 1, "token")
        for depth, block in enumerate(model.blocks):
            layer = block.attn
            assert (layer.num_heads, layer.grid_size, layer.token_grid) == (heads, (14, 14), (7, 7))
            assert layer.num_prefix_tokens == 1 and layer.dwc is not None and layer.qkv.bias is not None
            assert layer.lambda_init == vca.functional.lambda_init(depth)


def test_structure_of_pvt_stage_by_stage():
    for name in ("pvt_tiny", "vca_pvt_tiny"):
        model, depth = on_meta(name), 0
        assert isinstance(model.norm, nn.Identity) and not hasattr(model, "cls_token")
        embeds = [model.patch_embed, *(stage.downsample for stage in model.stages[1:])]
        assert [e.proj.kernel_size[0] for e in embeds] == [e.proj.stride[0] for e in embeds] == [4, 2, 2, 2]
        for i, stage in enumerate(model.stages):
            dim, heads, grid = (64, 128, 320, 512)[i], (1, 2, 5, 8)[i], (56, 28, 14, 7)[i]
            assert stage.pos_embed.shape == (1, grid, grid, dim) and len(stage.blocks) == 2
            for block in stage.blocks:
                layer = block.attn
                assert block.mlp.fc1.out_features == dim * (8, 8, 4, 4)[i]
                assert (layer.num_heads, layer.grid_size) == (heads, (grid, grid))
                assert block.norm1.eps == block.norm2.eps == 1e-6
                if name == "pvt_tiny":
                    ratio = (8, 4, 2, 1)[i]
                    assert type(layer) is SpatialReductionAttention and layer.ratio == ratio
                    assert (layer.sr is None) == (layer.norm is None) == (ratio == 1)
                    assert layer.sr is None or layer.sr.kernel_size == layer.sr.stride == (ratio, ratio)
                else:
                    assert layer.token_grid == ((3, 3), (4, 4), (7, 7), (7, 7))[i] and layer.dwc is not None
                    assert layer.lambda_init == vca.functional.lambda_init(depth)
                depth += 1
        assert depth == 8


def test_structure_of_swin_stage_by_stage():
    model, depth = on_meta("vca_swin_tiny"), 0
    for i, stage in enumerate(model.layers):
        for block in stage.blocks:
            if i < 3:
                assert type(block) is GridBlock and type(block.attn) is vca.VisualContrastAttention
                assert block.attn.grid_size == ((56, 56), (28, 28), (14, 14))[i]
                assert block.attn.token_grid == ((3, 3), (4, 4), (7, 7))[i]
                assert block.attn.lambda_init == vca.functional.lambda_init(depth)
            else:
                assert type(block) is SwinTransformerBlock and block.window_size == (7, 7)
            depth += 1
    tables = [name for name, _ in model.named_parameters() if "relative_position" in name]
    assert tables == [f"layers.3.blocks.{i}.attn.relative_position_bias_table" for i in range(2)]


def test_structure_of_cswin_stage_by_stage():
    for name in ("cswin_tiny", "vca_cswin_tiny"):
        model = on_meta(name)
        stem, merges = model.patch_embed.proj, [stage.downsample.proj for stage in model.stages[1:]]
        assert (stem.kernel_size, stem.stride, stem.padding) == ((7, 7), (4, 4), (2, 2))
        assert {(m.kernel_size, m.stride, m.padding) for m in merges} == {((3, 3), (2, 2), (1, 1))}
        assert [len(stage.blocks) for stage in model.stages] == [2, 4, 18, 1]
        assert isinstance(model.norm, nn.LayerNorm)
        for i, stage in enumerate(model.stages):
            dim, heads, grid = (64, 128, 256, 512)[i], (2, 4, 8, 16)[i], (56, 28, 14, 7)[i]
            assert stage.pos_embed is None
            for block in stage.blocks:
                layer = block.attn
                assert block.mlp.fc1.out_features == 4 * dim and layer.grid_size == (grid, grid)
                if name == "vca_cswin_tiny" and i < 2:
                    assert type(layer) is vca.VisualContrastAttention and layer.dwc is not None
                    assert (layer.num_heads, layer.token_grid) == (heads, ((3, 3), (4, 4))[i])
                    continue
                assert type(layer) is CrossShapedAttention
                if i == 3:
                    (branch,) = layer.branches
                    assert (branch.num_heads, branch.window_size((7, 7))) == (heads, (7, 7))
                else:
                    width = (1, 2, 7)[i]
                    assert [b.num_heads for b in layer.branches] == [heads // 2] * 2
                    windows = [b.window_size(b.grid_size) for b in layer.branches]
                    assert windows == [(grid, width), (width, grid)]


def test_stripes_equal_attention_with_a_mask():
    """A stripe attends to its own patches only: the same as attention over the whole grid with all others masked."""
    torch.manual_seed(0)
    grid, width = (4, 6), 2
    patch = torch.arange(24).view(grid)
    for vertical in (True, False):
        layer = StripeAttention(8, 2, grid_size=grid, width=width, vertical=vertical).double()
        nn.init.zeros_(layer.lepe.weight)
        nn.init.zeros_(layer.lepe.bias)
        qkv = torch.randn(2, 24, 3, 8, dtype=torch.float64)
        line = patch % 6 // width if vertical else patch // 6 // width
        same = line.flatten()[:, None] == line.flatten()
        q, k, v = qkv.unflatten(-1, (2, 4)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) / 2).masked_fill(~same, -torch.inf)
        want = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(layer(qkv), want, rtol=0, atol=1e-12)


def test_lepe_stops_at_the_border_of_a_stripe():
    layer = StripeAttention(4, 1, grid_size=(4, 4), width=1, vertical=True)
    nn.init.ones_(layer.lepe.weight)
    nn.init.zeros_(layer.lepe.bias)
    qkv = torch.zeros(1, 16, 3, 4)
    qkv[:, 5, 2] = 1  # row 1, column 1
    lit = layer(qkv)[0, :, 0].view(4, 4) > 0.9
    assert lit.nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]


def test_spatial_reduction_of_ratio_one_is_self_attention():
    torch.manual_seed(0)
    layer = SpatialReductionAttention(8, 2, grid_size=(3, 4), ratio=1, qkv_bias=True, proj_drop=0.0)
    plain = Attention(8, 2, qkv_bias=True)
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([layer.q.weight, layer.kv.weight]))
        plain.qkv.bias.copy_(torch.cat([layer.q.bias, layer.kv.bias]))
    plain.proj = layer.proj
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(layer(x), plain(x))


# --- a small member of every family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_and_backward(name):
    model = small(name, drop_path_rate=0.1, drop_rate=0.1, proj_drop_rate=0.1)
    y = model(images(model))
    assert y.shape == (2, 4)
    y.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates[-1] == pytest.approx(0.1) and rates == sorted(rates)


@pytest.mark.parametrize("name", FAMILIES)
def test_determinism_and_state_dict_round_trip(name):
    model, same = small(name).eval(), small(name).eval()
    x = images(model)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(model(x), want) and torch.equal(same(x), want)
        for parameter in same.parameters():
            parameter.add_(0.1)
        assert not torch.equal(same(x), want)
        same.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(same(x), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_batch_is_learnt_by_heart(name):
    model = small(name)
    x, labels = images(model, 8), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        if loss < 0.05:
            break
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name):
    model = small(name).eval()
    x = images(model)
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        low = model.to(torch.bfloat16)(x.bfloat16())
    for got in (mixed, low):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() < 0.05 * want.norm() + 0.02


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_export(name):
    model = small(name).eval()
    x = images(model)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_torch_compile(name):
    torch._dynamo.reset()
    model = small(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(model)
    want, got = model(x), compiled(x)
    torch.testing.assert_close(got, want)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(want.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_nothing(name):
    model = small(name)
    x, parameters = images(model), list(model.parameters())
    plain = torch.autograd.grad(model(x).sum(), parameters)
    model.set_grad_checkpointing()
    for a, b in zip(plain, torch.autograd.grad(model(x).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b)
    model.set_grad_checkpointing(False)
    for a, b in zip(plain, torch.autograd.grad(model(x).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b)


# --- what timm asks of a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_default_cfg_is_complete(name):
    model = on_meta(name)
    config = model.default_cfg
    assert config is model.pretrained_cfg and config["architecture"] == name
    assert isinstance(model.get_submodule(config["first_conv"]), nn.Conv2d)
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert config["num_classes"] == 1000 and config["fixed_input_size"]
    assert config["pool_size"] == (None if "deit" in name else (7, 7))
    data = resolve_data_config(model=model)
    assert (data["input_size"], data["interpolation"], data["crop_pct"]) == ((3, 224, 224), "bicubic", 0.9)
    assert data["mean"] == (0.485, 0.456, 0.406) and data["std"] == (0.229, 0.224, 0.225)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_heads(name):
    model = small(name, in_chans=1).eval()
    x = images(model)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.num_features) and model.head_hidden_size == model.num_features
        assert torch.equal(model.forward_head(features), model(x))
        assert torch.equal(model.get_classifier()(pooled), model(x))
        model.reset_classifier(7)
        assert model.num_classes == 7 and model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)
        assert small(name, num_classes=0, in_chans=1).eval()(x).shape == pooled.shape


@pytest.mark.parametrize("name", FAMILIES)
def test_intermediate_features(name):
    model = small(name).eval()
    x = images(model)
    with torch.no_grad():
        final, features = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        for feature, info in zip(features, model.feature_info, strict=True):
            assert feature.shape == (2, info["num_chs"], *(64 // info["reduction"],) * 2)
        last = model.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)[0]
        if "deit" not in name:
            assert torch.equal(last.permute(0, 2, 3, 1), final)
        early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(early, features[:2], strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_only(name):
    wrapped = timm.create_model(name, features_only=True, out_indices=(0, 2), **SMALL[name]).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = wrapped(x)
    channels, reductions = wrapped.feature_info.channels(), wrapped.feature_info.reduction()
    for feature, dim, reduction in zip(features, channels, reductions, strict=True):
        side = 64 // reduction
        assert feature.shape in ((2, dim, side, side), (2, side, side, dim))
    with vca.record(wrapped) as maps, torch.no_grad():
        wrapped(x)
    assert maps and all(record.grid_size for record in maps)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_decayed_and_layer_wise_learning_rates(name):
    model = small(name, **(dict(pooling="learned") if name.startswith("vca") else {}))
    skipped = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    weights = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {n for n, p in parameters.items() if p.ndim > 1 and n not in skipped} == weights
    lambdas = {n for n in parameters if ".lambda_" in n}
    assert lambdas <= skipped <= set(parameters) | {"cls_token", "reg_token", "dist_token"}
    if name.startswith("vca"):
        assert lambdas and {n for n in parameters if n.endswith(("_embed", "pool_query"))} <= skipped
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=skipped)
    assert {id(p) for g in groups if g["weight_decay"] for p in g["params"]} == {id(parameters[n]) for n in weights}

    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=skipped)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    scales = {n: scale[id(p)] for n, p in parameters.items()}
    assert scales[model.default_cfg["classifier"] + ".weight"] == 1
    assert scales["patch_embed.proj.weight"] == min(scales.values()) < scales[list(parameters)[-5]]
    blocks = [s for n, s in scales.items() if n.endswith("mlp.fc1.weight")]
    assert blocks == sorted(blocks) and len(set(blocks)) == len(blocks)
    for coarse in (True, False):
        assert timm.models.group_modules(model, model.group_matcher(coarse=coarse))


@pytest.mark.parametrize("name", FAMILIES)
def test_fx_tracing_gives_equal_outputs(name):
    model = small(name).eval()
    x = images(model)
    _, nodes = get_graph_node_names(model)
    attention = [n for n in nodes if n.endswith(".attn")]
    traced = create_feature_extractor(model, {nodes[-1]: "logits"} | ({attention[0]: "attention"} if attention else {}))
    with torch.no_grad():
        out = traced(x)
        assert torch.equal(out["logits"], model(x))
    assert not attention or out["attention"].isfinite().all()


# --- image sizes -----------------------------------------------------------------------------------------------------

SIZES = [(288, 288), (448, 448), (192, 320)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["vca_deit_tiny_patch16_224", "vca_pvt_tiny", "pvt_tiny", "vca_swin_tiny"])
def test_other_image_sizes_at_full_width(name, size):
    """Built for a size, or set to it: the grids are right and, on the meta device, every layer accepts them."""
    for model in (on_meta(name, img_size=size), on_meta(name)):
        model.set_input_size(img_size=size)
        assert model(torch.empty(1, 3, *size, device="meta")).shape == (1, 1000)
        shrink = (16,) if "deit" in name else (4, 8, 16, 32)
        grids = {layer.grid_size for layer in model.modules() if isinstance(layer, vca.VisualContrastAttention)}
        assert grids <= {tuple(side // patch for side in size) for patch in shrink}
        assert model.default_cfg["input_size"] == (3, *size)
        if name == "vca_swin_tiny":
            assert model.layers[3].blocks[0].window_size == (6 if size[0] == 192 else 7, 7)


@pytest.mark.parametrize("name", ["cswin_tiny", "vca_cswin_tiny"])
def test_cswin_needs_stripes_that_fill_the_grid(name):
    for size in ((448, 448), (224, 448)):
        model = on_meta(name)
        model.set_input_size(img_size=size)
        assert model(torch.empty(1, 3, *size, device="meta")).shape == (1, 1000)
    message = r"stripes 7 wide do not fill a 18x18 grid; choose another img_size or split_sizes"
    with pytest.raises(ValueError, match=message):
        on_meta(name, img_size=288)
    with pytest.raises(ValueError, match=message):
        model.set_input_size(img_size=288)
    assert model.patch_embed.img_size == (224, 448), "a refused size has changed the model"
    model = on_meta(name, img_size=(192, 320), split_sizes=(1, 2, 4, None))
    assert model(torch.empty(1, 3, 192, 320, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_move_to_another_image_size(name):
    """A trained model set to a new size equals one built for it with the same weights, positions resampled."""
    model = small(name).eval()
    model.set_input_size(img_size=(128, 64))
    built = small(name, img_size=(128, 64)).eval()
    built.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(built(x), want)
        with vca.record(model) as maps:
            torch.testing.assert_close(model(x), want)
    assert all(r.grid_size[0] == 2 * r.grid_size[1] for r in maps)
    model.set_input_size(img_size=64)
    with torch.no_grad():
        assert model(x[:, :, :64]).isfinite().all()


def test_swin_accepts_any_size_if_asked():
    model = small("vca_swin_tiny", strict_img_size=False).eval()
    with torch.no_grad():
        for size in ((64, 64), (96, 128), (160, 64)):
            assert model(torch.randn(1, 3, *size)).shape == (1, 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_use_is_refused_in_words(name):
    model = small(name).eval()
    with pytest.raises(AssertionError, match=r"Input height \(96\) doesn't match model \(64\)"):
        model(torch.randn(1, 3, 96, 64))
    with pytest.raises(TypeError, match="kernel"):
        small(name, kernel=3)
    if "pvt" in name or "cswin" in name:
        for size in (100, (64, 80), 0):
            with pytest.raises(ValueError, match="must be a multiple of 32 in both directions"):
                small(name, img_size=size)
        with pytest.raises(ValueError, match="global_pool='max' is unknown; choose 'avg' or ''"):
            small(name, global_pool="max")
        with pytest.raises(ValueError, match="output_fmt='NLC' is unknown"):
            model.forward_intermediates(images(model), output_fmt="NLC")
    if name == "cswin_tiny":
        with pytest.raises(ValueError, match="num_heads=1 cannot be halved"):
            small(name, num_heads=(1, 2, 4, 4))
    if name == "vca_deit_tiny_patch16_224":
        with pytest.raises(ValueError, match="gradient checkpointing needs a fixed image size"):
            small(name, dynamic_img_size=True).set_grad_checkpointing()


# --- full size -------------------------------------------------------------------------------------------------------


IN_SHORT = ("vca_deit_tiny_patch16_224", "vca_pvt_tiny", "vca_swin_tiny", "vca_cswin_tiny")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in IN_SHORT else pytest.mark.long) for n in OURS])
def test_full_size_forward(name):
    model = vca.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        y = model(torch.randn(1, 3, 224, 224))
    assert y.shape == (1, 10) and y.isfinite().all() and y.std() > 0
