"""`vca.replace_attention` in models of timm."""

import copy

import pytest
import timm
import torch
from timm.layers import Attention, DiffAttention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import vca
from tests.helpers.kinds import images, kind_of, randomized
from vca import functional as VF
from vca.layers.factory import KINDS
from vca.layers.grid import GridBlock


def timm_model(name: str, **overrides) -> nn.Module:
    small = {
        "vit_tiny_patch16_224": dict(img_size=64, embed_dim=24, depth=2, num_heads=2),
        "deit_tiny_patch16_224": dict(img_size=64, embed_dim=24, depth=2, num_heads=2),
        "deit_tiny_distilled_patch16_224": dict(img_size=64, embed_dim=24, depth=2, num_heads=2),
        "swin_tiny_patch4_window7_224": dict(img_size=64, embed_dim=12, depths=(1, 2, 1, 2), num_heads=(1, 2, 2, 4)),
    }[name]
    torch.manual_seed(0)
    return randomized(timm.create_model(name, num_classes=3, **(small | overrides)))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "swin_tiny_patch4_window7_224",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_exchanged_in_place_and_keeps_its_projections(name, kind):
    model = timm_model(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert vca.replace_attention(model, kind, token_grid=(2, 2)) is model and not model.training
    after = model.state_dict()
    kept = [key for key in before if key in after]
    assert all(torch.equal(before[key], after[key]) for key in kept)
    lost = {key.split(".")[-1] for key in before if key not in after}
    assert lost == ({"relative_position_bias_table"} if "swin" in name else set())
    with torch.no_grad():
        assert model(images(model)).shape == (2, 3)
    if "swin" in name:
        blocks = [type(block) for stage in model.layers for block in stage.blocks]
        assert blocks == [GridBlock] * 4 + [SwinTransformerBlock] * 2
        assert [kind_of(b.attn) for stage in model.layers[:3] for b in stage.blocks] == [kind] * 4
    else:
        assert [kind_of(block.attn) for block in model.blocks] == [kind] * 2
    if kind == "mhsa" and "swin" not in name:
        original = timm_model(name).eval()
        with torch.no_grad():
            assert torch.equal(model(images(model)), original(images(model)))
    skipped = model.no_weight_decay()
    wanted = ("_embed", "lambda_q1", "lambda_k2", "relative_position_bias_table")
    assert {key for key in after if key.endswith(wanted) and not key.startswith("patch_embed")} <= skipped
    model.set_input_size(img_size=(96, 64))
    with torch.no_grad():
        assert model(images(model)).isfinite().all()
        assert copy.deepcopy(model)(images(model)).isfinite().all()


def test_options_and_stages_of_replace_attention():
    model = vca.replace_attention(timm_model("deit_tiny_patch16_224").double(), num_tokens=4, tokens="emb", dwc=False)
    layer = model.blocks[1].attn
    assert (layer.token_grid, layer.tokens, layer.dwc, layer.num_prefix_tokens) == ((2, 2), "emb", None, 1)
    assert {p.dtype for p in model.parameters()} == {torch.float64} and model.training
    model = vca.replace_attention(timm_model("swin_tiny_patch4_window7_224"), stages=[0, -1], token_grid=(2, 2))
    kinds = [[type(block) is GridBlock for block in stage.blocks] for stage in model.layers]
    assert kinds == [[True], [False, False], [False], [True, True]]
    assert [m.lambda_init for m in model.modules() if isinstance(m, vca.VisualContrastAttention)] == [
        VF.lambda_init(depth) for depth in (0, 4, 5)
    ]


def test_a_vit_may_keep_the_attention_of_some_blocks(tmp_path):
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=2, blocks=[0, 5]).eval()
    kinds = [vca.VisualContrastAttention, *[Attention] * 4, vca.VisualContrastAttention]
    assert [type(block.attn) for block in model.blocks] == kinds
    assert model.blocks[5].attn.lambda_init == VF.lambda_init(5)
    vca.save(model, tmp_path, label_names=["a", "b"])
    loaded, x = vca.load(tmp_path), torch.randn(1, 3, 32, 32)
    with vca.record(loaded) as maps, torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    assert [type(layer).__name__ for layer in maps] == ["ContrastMaps", *["GlobalMaps"] * 4, "ContrastMaps"]
    vit = timm_model("vit_tiny_patch16_224")
    vca.replace_attention(vit, "agent", blocks=[1])
    assert [type(block.attn).__name__ for block in vit.blocks] == ["Attention", "AgentAttention"]


@pytest.mark.parametrize(
    "make_model, options, message",
    [
        (
            lambda: timm.create_model("resnet10t"),
            {},
            "cannot exchange the attention of a ResNet; it must be exactly one",
        ),
        (lambda: timm_model("vit_tiny_patch16_224", qk_norm=True), {}, "block 0: attention with q_norm, k_norm cannot"),
        (lambda: timm_model("vit_tiny_patch16_224", proj_bias=False), {}, "unusual projections"),
        (lambda: timm_model("vit_tiny_patch16_224", attn_layer=DiffAttention), {}, "has DiffAttention, not timm's"),
        (
            lambda: timm_model("vit_tiny_patch16_224", block_fn=ParallelScalingBlock),
            {},
            "block 0 is a ParallelScalingBlock, which has no attention layer",
        ),
        (
            lambda: timm_model("vit_tiny_patch16_224", attn_drop_rate=0.1),
            {},
            "attention dropout .* would be lost",
        ),
        (lambda: timm_model("swin_tiny_patch4_window7_224", attn_drop_rate=0.1), {}, "attention dropout .* would be"),
        (lambda: timm_model("vit_tiny_patch16_224", patch_drop_rate=0.5), {}, "patch_drop_rate: attention='vca' needs"),
        (lambda: timm_model("vit_tiny_patch16_224"), dict(token_grid=(5, 5)), r"token_grid=\(5, 5\) must lie"),
        (lambda: timm_model("swin_tiny_patch4_window7_224"), dict(token_grid=(5, 5)), r"token_grid=\(5, 5\) must lie"),
        (lambda: timm_model("swin_tiny_patch4_window7_224", head_dim=8), {}, "do not add up to 12"),
        *(
            (
                lambda: timm_model("vit_tiny_patch16_224"),
                dict(blocks=blocks),
                "blocks=.* must be different indices, from 0",
            )
            for blocks in ([], [2], [-1], [1, 1])
        ),
    ],
)
def test_what_cannot_be_exchanged_is_refused_and_unchanged(make_model, options, message):
    model = make_model()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(ValueError, match=message):
        vca.replace_attention(model, **options)
    assert list(model.state_dict()) == keys and type(model) is cls


def test_a_model_with_exchanged_attention_is_not_saved_as_what_it_was(tmp_path):
    model = vca.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=2)
    vca.replace_attention(model, token_grid=(1, 1))
    with pytest.raises(ValueError, match=r"only models of vca\.create_model can be saved"):
        vca.save(model, tmp_path, label_names=["a", "b"])


@pytest.mark.parametrize("side, tokens", [(64, 4), (224, 8), (448, 8)])
def test_a_large_image_gets_no_more_than_8x8_contrast_tokens(side, tokens):
    model = timm_model("vit_tiny_patch16_224", img_size=side, patch_size=8 if side == 64 else 14)
    vca.replace_attention(model)
    assert {block.attn.token_grid for block in model.blocks} == {(tokens, tokens)}
    if side == 224:
        model.set_input_size(img_size=(518, 518))
        assert {(block.attn.grid_size, block.attn.token_grid) for block in model.blocks} == {((37, 37), (8, 8))}
