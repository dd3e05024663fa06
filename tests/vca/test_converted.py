"""Models of timm with another attention, by timm's name: built, saved, loaded, and refused."""

import pytest
import torch

import vca
from vca.models import task_of

SMALL_SWIN = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
MODELS = [
    ("vit_tiny_patch16_224", dict(img_size=64, depth=2), vca.VisualContrastAttention),
    ("vit_small_patch14_reg4_dinov2.lvd142m", dict(img_size=56, depth=2), vca.VisualContrastAttention),
    ("deit_tiny_distilled_patch16_224", dict(img_size=64, depth=2), vca.VisualContrastAttention),
    ("deit_tiny_patch16_224", dict(img_size=64, depth=2), vca.VisualContrastAttention),
    ("swin_tiny_patch4_window7_224", SMALL_SWIN, vca.VisualContrastAttention),
]


@pytest.mark.parametrize("name, arguments, kind", MODELS, ids=[name for name, *_ in MODELS])
def test_a_converted_model_is_saved_and_loaded(name, arguments, kind, tmp_path):
    torch.manual_seed(0)
    model = vca.create_model(name, attention="vca", tokens="emb", num_classes=3, **arguments).eval()
    assert any(type(module) is kind for module in model.modules())
    vca.save(model, tmp_path, label_names=["a", "b", "c"])
    loaded = vca.load(tmp_path)
    x = torch.rand(2, *model.pretrained_cfg["input_size"])
    assert torch.equal(loaded(x), model(x)) and loaded.task == task_of(name) == "classification"
    assert {module.tokens for module in loaded.modules() if type(module) is kind} == {"emb"}


def test_another_image_size_is_kept(tmp_path):
    model = vca.create_model("vit_tiny_patch16_224", attention="vca", num_classes=2, depth=1).eval()
    model.set_input_size(img_size=128)
    vca.save(model, tmp_path, label_names=["a", "b"])
    x = torch.rand(1, 3, 128, 128)
    assert torch.equal(vca.load(tmp_path)(x), model(x))


def test_fewer_patches_than_contrast_tokens_are_not_saved(tmp_path):
    model = vca.create_model("vca_deit_tiny_patch16_224", num_classes=2, depth=1)
    model.set_input_size(img_size=64)
    with pytest.raises(ValueError, match=r"token_grid=\(7, 7\) must lie between 1x1 and the patch grid \(4, 4\)"):
        vca.save(model, tmp_path / "model", label_names=["a", "b"])
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("vit_tiny_patch16_224", {}, "say which attention it shall have"),
        ("vit_tiny_patch16_224", dict(attention="none"), "none"),
        ("resnet18", dict(attention="vca"), "unknown model"),
        ("vit_tiny_patch16_384x", dict(attention="vca"), "unknown model"),
    ],
)
def test_what_cannot_be_converted_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        vca.create_model(name, **arguments)
