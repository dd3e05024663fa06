"""Classifiers do all that timm asks of a model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import create_feature_extractor, get_graph_node_names
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import vca
from tests.helpers.classifiers import FAMILIES, OURS, SMALL, images, on_meta, small


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
        assert not any(module.training for module in model.modules())
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


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_made_where_and_as_the_factory_is_told(name):
    """timm's `create_model(device=, dtype=)`, without a device context; what is frozen stays so."""
    model = small(name, device="meta", dtype=torch.float64)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    assert not {"device", "dtype"} & set(model.model_args)
    model.requires_grad_(False)
    model.reset_classifier(0)
    model.set_input_size(img_size=(128, 128))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", [*FAMILIES, "vca_sit_xs_4"])
def test_init_weights_sets_every_parameter(name):
    """A model of the meta device gets memory, and then its weights by `init_weights` alone."""
    with torch.device("meta"):
        model = small(name) if name in FAMILIES else vca.create_model(name, depth=1)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    torch.manual_seed(0)
    built = dict((small(name) if name in FAMILIES else vca.create_model(name, depth=1)).named_parameters())
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
        if parameter.numel() >= 256:
            assert parameter.mean().item() == pytest.approx(built[key].mean().item(), abs=0.1), key
            assert parameter.std().item() == pytest.approx(built[key].std().item(), rel=0.3, abs=0.01), key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_no_images(name):
    model = small(name).eval()
    x = images(model)[:0]
    with torch.no_grad():
        if name == "vca_swin_tiny":
            with pytest.raises(AssertionError, match="the batch is empty: a Swin needs at least one image"):
                model(x)
            return
        assert model(x).shape == (0, 4)
        assert len(model.forward_features(x)) == 0


@pytest.mark.parametrize("name", ["pvt_tiny", "vca_pvt_tiny", "cswin_tiny", "vca_cswin_tiny"])
def test_features_of_pyramids_are_nhwc_and_say_so(name):
    model = small(name).eval()
    assert model.output_fmt == "NHWC"
    with torch.no_grad():
        assert model.forward_features(images(model)).shape == (2, 2, 2, model.num_features)


@pytest.mark.parametrize("name", FAMILIES)
def test_options_that_the_attention_cannot_follow_are_refused(name):
    if name in ("cswin_tiny", "pvt_tiny") or name.startswith("vca"):
        with pytest.raises(ValueError, match="attention dropout"):
            small(name, attn_drop_rate=0.1)
        small(name, attn_drop_rate=0.0)
    if "deit" not in name and "swin_tiny" not in name:
        with pytest.raises(ValueError, match="dynamic_img_size: these models have one size"):
            small(name, dynamic_img_size=True)
    if "deit" in name:
        with pytest.raises(ValueError, match="patch_drop_rate: attention='vca' needs all patches"):
            small(name, patch_drop_rate=0.5)
        assert small(name, patch_drop_rate=0.5, attention="mhsa").patch_drop.prob == 0.5
        for block in (ParallelScalingBlock, ParallelThingsBlock):
            with pytest.raises(ValueError, match=f"block 0 is a {block.__name__}, which has no attention layer"):
                small(name, block_fn=block)


def test_a_script_of_timms_knows_the_models_by_the_documented_line(tmp_path):
    root = Path(__file__).parents[2]
    (code,) = re.findall(r'python -c "(import runpy.*)" \\', (root / "docs" / "models.md").read_text(encoding="utf-8"))
    script = tmp_path / "train.py"
    script.write_text(
        "import argparse, timm\n"
        "if __name__ == '__main__':\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('data')\n"
        "    parser.add_argument('--model')\n"
        "    given = parser.parse_args()\n"
        "    print(given.data, type(timm.create_model(given.model, depth=1)).__name__)\n"
    )
    command = [sys.executable, "-c", code, str(script), "IMAGENET", "--model", "vca_deit_tiny_patch16_224"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.stdout == "IMAGENET ContrastVisionTransformer\n", done.stderr


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


IN_SHORT = ("vca_deit_tiny_patch16_224", "vca_pvt_tiny", "vca_swin_tiny", "vca_cswin_tiny")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in IN_SHORT else pytest.mark.long) for n in OURS])
def test_full_size_forward(name):
    model = vca.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        y = model(torch.randn(1, 3, 224, 224))
    assert y.shape == (1, 10) and y.isfinite().all() and y.std() > 0
