"""The small vision transformers by name: registration, exact size, repeatability, and that it learns."""

import inspect

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import Attention
from timm.models import is_model
from torch import nn

import vca
from vca import VisualContrastAttention
from vca.models import cswin, deit, describe, pvt, swin, task_of, vit

SIZES = {"pico": (128, 6, 4), "nano": (192, 9, 6), "tiny": (192, 12, 3)}
GEOMETRIES = [(2, 32), (4, 32), (4, 64), (8, 64)]
NAMES = [f"{a}_vit_{s}_patch{p}_{i}" for a in ("vca", "mhsa") for s in SIZES for p, i in GEOMETRIES]
DINOV2 = ["vca_vit_small_patch14_224", "mhsa_vit_small_patch14_224"]
SMALL = dict(embed_dim=32, depth=2, num_heads=2, num_classes=4)


def parse(name: str) -> tuple[str, int, int, int, int, int]:
    """(attention, channels, depth, heads, patch side, image side) of a name."""
    attention, _, size, patch, image = name.split("_")
    return attention, *SIZES[size], int(patch.removeprefix("patch")), int(image)


def parameter_count(attention: str, dim: int, depth: int, heads: int, patch: int, image: int, classes: int) -> int:
    """The size of a ViT in closed form; a VCA block adds 2nC (embeddings), 10C (convolution) and 10d to MHSA."""
    side = image // patch
    patch_embed = 3 * patch**2 * dim + dim
    position = side**2 * dim
    norms = 2 * 2 * dim
    mhsa = (3 * dim**2 + 3 * dim) + (dim**2 + dim)
    mlp = (4 * dim**2 + 4 * dim) + (4 * dim**2 + dim)
    n, d = (side // 2) ** 2, dim // heads
    added = 2 * n * dim + 10 * dim + 10 * d if attention == "vca" else 0
    head = 2 * dim + dim * classes + classes
    return patch_embed + position + depth * (norms + mhsa + mlp + added) + head


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_names():
    assert sorted(vit.MODELS) == sorted([*NAMES, *DINOV2])
    assert set(NAMES) <= set(vca.list_models())
    assert vca.list_models() == sorted(set(vca.list_models()))


def test_every_classifier_has_a_function_of_its_name():
    for module in (cswin, deit, pvt, swin, vit):
        source = inspect.getsource(module)
        for name in module.MODELS:
            assert f"@register_model\ndef {name}(" in source, name
            assert inspect.getdoc(getattr(module, name)), name


def test_the_twin_of_dinov2_has_its_parameters_and_preprocessing():
    with torch.device("meta"):
        theirs = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=1000)
        ours, contrast = (vca.create_model(name) for name in reversed(DINOV2))
    shapes = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert {name: parameter.shape for name, parameter in ours.named_parameters()} == shapes
    assert shapes.keys() < dict(contrast.named_parameters()).keys()
    assert contrast.blocks[0].attn.token_grid == (8, 8) and contrast.blocks[0].attn.num_prefix_tokens == 1
    for model in (ours, contrast):
        assert {key: model.pretrained_cfg[key] for key in ("mean", "std")} == {
            key: theirs.pretrained_cfg[key] for key in ("mean", "std")
        }


@pytest.mark.parametrize("name", ["vca_vit_pico_patch4_32", "deit_tiny_patch16_224", "vca_sit_xs_4", "dit_s_4"])
def test_a_model_knows_its_task_and_describes_itself(name):
    with torch.device("meta"):
        model = vca.create_model(name, num_classes=7)
    task = "generation" if "it_s" in name or "it_xs" in name else "classification"
    assert model.task == task_of(name) == task
    facts = describe(model)
    assert facts["architecture"] == name and facts["task"] == task and facts["num_classes"] == 7
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    shapes = dict(vca_vit_pico_patch4_32=[3, 32, 32], deit_tiny_patch16_224=[3, 224, 224], vca_sit_xs_4=[3, 32, 32])
    assert facts["input_shape"] == shapes.get(name, [4, 32, 32])
    with pytest.raises(ValueError, match="unknown model 'vca_vit_pico'; did you mean"):
        task_of("vca_vit_pico")


@pytest.mark.parametrize("name", NAMES)
def test_registered_with_timm(name):
    assert is_model(name)
    assert name in timm.list_models("vca_vit*" if name.startswith("vca") else "mhsa_vit*")
    assert timm.models.model_entrypoint(name).__name__ == name


@pytest.mark.parametrize("name", NAMES)
def test_exact_parameter_count(name):
    attention, dim, depth, heads, patch, image = parse(name)
    with torch.device("meta"):
        model = timm.create_model(name)
        small = vca.create_model(name, num_classes=10)
    assert count(model) == parameter_count(attention, dim, depth, heads, patch, image, classes=1000)
    assert count(small) == parameter_count(attention, dim, depth, heads, patch, image, classes=10)
    kind = VisualContrastAttention if attention == "vca" else Attention
    assert [type(block.attn) for block in model.blocks] == [kind] * depth
    if attention == "vca":
        side = image // patch
        for i, block in enumerate(model.blocks):
            layer = block.attn
            assert (layer.grid_size, layer.token_grid) == ((side, side), (side // 2, side // 2))
            assert layer.num_heads == heads and layer.num_prefix_tokens == 0
            assert layer.lambda_init == pytest.approx(0.8 - 0.6 * torch.tensor(-0.3 * i).exp().item())


def test_vca_adds_what_the_paper_says_per_block():
    for size, (dim, depth, heads) in SIZES.items():
        with torch.device("meta"):
            ours, baseline = (timm.create_model(f"{a}_vit_{size}_patch4_32") for a in ("vca", "mhsa"))
        assert count(ours) - count(baseline) == depth * (2 * 16 * dim + 10 * dim + 10 * dim // heads)


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_is_complete(name):
    image = parse(name)[-1]
    config = vit.default_cfgs[name].default
    assert config.input_size == (3, image, image)
    assert config.fixed_input_size
    assert config.num_classes == 1000
    assert (config.interpolation, config.crop_pct, config.crop_mode) == ("bicubic", 1.0, "center")
    assert config.mean == config.std == (0.5, 0.5, 0.5)
    assert not config.has_weights, "there are no weights to download by name"
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.pretrained_cfg["architecture"] == name
    assert model.default_cfg is model.pretrained_cfg
    assert isinstance(model.get_submodule(config.first_conv), nn.Conv2d)
    assert model.get_submodule(config.classifier) is model.get_classifier()
    data = resolve_data_config(model=model)
    assert (data["input_size"], data["crop_pct"], data["mean"]) == ((3, image, image), 1.0, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["vca_vit_pico_patch4_32", "mhsa_vit_pico_patch8_64", "vca_vit_nano_patch8_64"])
def test_forward(name):
    image = parse(name)[-1]
    model = timm.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        logits = model(images(2, image))
        features = model.forward_features(images(2, image))
    assert logits.shape == (2, 7) and logits.isfinite().all()
    assert features.shape == (2, model.patch_embed.num_patches, model.num_features)


def test_unknown_names_are_refused_with_a_proposal():
    with pytest.raises(ValueError, match=r"unknown model 'vca_vit_pico_patch4'; did you mean.* vca_vit_pico_patch4_3"):
        vca.create_model("vca_vit_pico_patch4")
    with pytest.raises(ValueError, match=r"vca\.list_models\(\) names them all"):
        vca.create_model("resnet18")


def test_unknown_attention_is_refused_in_words():
    with pytest.raises(ValueError, match="attention='linear' is unknown; choose one of vca, mhsa"):
        vca.create_model("vca_vit_pico_patch4_32", attention="linear")


def test_layer_options_reach_every_layer():
    model = vca.create_model(
        "vca_vit_pico_patch4_32", **SMALL, token_grid=(3, 5), tokens="emb", dwc=False, stage2_softmax="joint",
        class_token=True, reg_tokens=2, global_pool="token", qkv_bias=False, proj_drop_rate=0.25,
    )  # fmt: skip
    for block in model.blocks:
        layer = block.attn
        assert (layer.token_grid, layer.tokens, layer.stage2_softmax) == ((3, 5), "emb", "joint")
        assert layer.positive_embed.shape == (15, 32)
        assert layer.dwc is None and layer.qkv.bias is None
        assert layer.num_prefix_tokens == 3 and layer.proj_drop.p == 0.25
    assert model.eval()(images(2)).shape == (2, 4)


def test_token_grid_too_large_for_the_image_is_refused():
    with pytest.raises(ValueError, match=r"token_grid=\(9, 9\) must lie between 1x1 and the patch grid \(8, 8\)"):
        vca.create_model("vca_vit_pico_patch4_32", token_grid=(9, 9))


@pytest.mark.parametrize("prefix", [False, True], ids=["no prefix", "class token and register"])
def test_no_weight_decay_contains_every_embedding(prefix):
    more = dict(class_token=True, reg_tokens=1, global_pool="token") if prefix else {}
    model = vca.create_model("vca_vit_pico_patch4_32", **SMALL, **more)
    skipped = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    embeddings = {name for name in parameters if name.endswith(("_embed", "_token"))}
    assert {"pos_embed", "blocks.0.attn.positive_embed", "blocks.1.attn.negative_embed"} <= embeddings
    assert embeddings <= skipped
    decayed = {name for name, p in parameters.items() if p.ndim > 1 and name not in skipped}
    weights = (nn.Linear, nn.Conv2d)
    assert decayed == {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, weights)}


@pytest.mark.parametrize("name", ["vca_vit_pico_patch4_32", "mhsa_vit_pico_patch4_32"])
def test_state_dict_round_trip(name):
    model, other = vca.create_model(name, **SMALL).eval(), vca.create_model(name, **SMALL).eval()
    with torch.no_grad():
        want = model(images(2))
        assert not torch.equal(other(images(2)), want)
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(images(2)), want)


@pytest.mark.parametrize("name", ["vca_vit_pico_patch4_32", "mhsa_vit_pico_patch4_32"])
def test_a_seed_decides_everything(name):
    def train(seed):
        torch.manual_seed(seed)
        model = vca.create_model(name, **SMALL, drop_path_rate=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 32, 32)).logsumexp(-1).sum().backward()
            optimizer.step()
        return model.state_dict()

    first, again, another = train(1), train(1), train(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], another["head.weight"])


def test_initial_embeddings_and_weights_of_a_model():
    model = vca.create_model("vca_vit_pico_patch4_32")
    for block in model.blocks:
        layer = block.attn
        assert abs(float(layer.positive_embed.detach().std()) - 1) < 0.1
        assert abs(float(layer.negative_embed.detach().std()) - 1) < 0.1
        assert abs(float(layer.qkv.weight.detach().std()) - 0.02) < 0.002
        assert float(layer.qkv.bias.detach().abs().max()) == 0
        assert torch.equal(layer.stage1.norm.weight, torch.ones(32))
    with torch.no_grad():
        assert abs(float(model.pos_embed.std()) - 0.02) < 0.002


@pytest.mark.parametrize("attention", ["vca", "mhsa"])
def test_one_batch_is_learnt_by_heart(attention):
    model = vca.create_model(f"{attention}_vit_pico_patch4_32", **SMALL, img_size=16)
    x, labels = images(8, 16), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_preprocessing_follows_the_image_size_and_channels():
    model = vca.create_model("vca_vit_pico_patch4_32", **SMALL, img_size=(16, 24), in_chans=1)
    assert model.pretrained_cfg["input_size"] == resolve_data_config(model=model)["input_size"] == (1, 16, 24)
    model.set_input_size(img_size=48)
    assert resolve_data_config(model=model)["input_size"] == (1, 48, 48)
    assert vca.create_model("vca_vit_pico_patch4_32", **SMALL).pretrained_cfg["input_size"] == (3, 32, 32)


def test_another_image_size():
    model = vca.create_model("vca_vit_pico_patch4_32", **SMALL).eval()
    model.set_input_size(img_size=(36, 52))
    assert all(block.attn.grid_size == (9, 13) for block in model.blocks)
    assert all(block.attn.token_grid == (4, 4) for block in model.blocks)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 36, 52)).isfinite().all()
        with pytest.raises(AssertionError, match=r"Input height \(32\) doesn't match model \(36\)"):
            model(images(1, 32))


@pytest.mark.parametrize("name", ["vca_vit_pico_patch4_32", "mhsa_vit_pico_patch4_32"])
def test_gradient_checkpointing_changes_nothing(name):
    model = vca.create_model(name, **SMALL)
    x = images(2)
    plain = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
    model.set_grad_checkpointing()
    saved = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["vca_vit_pico_patch4_32", "mhsa_vit_pico_patch4_32"])
def test_features_of_inner_blocks(name):
    torch.manual_seed(3)
    backbone = timm.create_model(name, features_only=True, out_indices=(1, 3)).eval()
    torch.manual_seed(3)
    model = vca.create_model(name).eval()
    found = []
    for i in (1, 3):
        model.blocks[i].register_forward_hook(lambda block, args, y: found.append(y))
    with torch.no_grad():
        features = backbone(images(2))
        model(images(2))
    assert backbone.feature_info.channels() == [128, 128]
    for feature, tokens in zip(features, found, strict=True):
        torch.testing.assert_close(feature, tokens.transpose(1, 2).unflatten(2, (8, 8)))
