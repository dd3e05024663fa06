"""The logit lens is the reference's answer after every block, and the model's own after the last."""

import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled

import vca
from tests.helpers.classifiers import images as images_of
from tests.helpers.classifiers import small
from tests.helpers.reference_vit import answers
from tests.helpers.vits import images, make_timm_vit, make_vca_vit, randomized


@pytest.mark.parametrize(
    "make, known", [(make_vca_vit, dict(token_grid=(2, 2))), (make_timm_vit, dict(prefix=1))], ids=["vca", "timm"]
)
def test_every_block_answers_as_the_reference(make, known):
    model, x = make().double(), images().double()
    with torch.no_grad():
        lens = vca.logit_lens(model, x)
    want = answers(model, x, heads=3, patch=4, **known)
    assert lens.shape == (3, 2, 5)
    np.testing.assert_allclose(lens, want, rtol=0, atol=1e-12)
    assert np.abs(want[0] - want[-1]).max() > 0.01


def make_distilled():
    arguments = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    return randomized(VisionTransformerDistilled(**arguments), 0.1).eval()


MODELS = {
    "mean of the patches": make_vca_vit,
    "class token and registers": lambda: make_vca_vit(class_token=True, global_pool="token", reg_tokens=2),
    "mean beside a class token": lambda: make_vca_vit(class_token=True, global_pool="avg"),
    "any image size": lambda: make_vca_vit(dynamic_img_size=True),
    "timm": make_timm_vit,
    "distilled": make_distilled,
    "self-attention exchanged": lambda: vca.replace_attention(make_timm_vit(), "vca").eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_last_answer_is_that_of_the_model_bit_for_bit(name):
    model, x = MODELS[name](), images()
    if name == "any image size":
        x = torch.nn.functional.pad(x, (0, 8))
    with torch.no_grad():
        lens = vca.logit_lens(model, x)
        assert torch.equal(lens[-1], model(x))
        assert len(lens) == 3 and not torch.equal(lens[0], lens[1])
        with vca.intervene(model, [1], mute=[0]), vca.record(model) as maps:
            changed = vca.logit_lens(model, x)
            assert torch.equal(changed[-1], model(x))
    assert torch.allclose(changed[0], lens[0], atol=1e-5) and not torch.allclose(changed[1], lens[1], atol=1e-5)
    assert len(maps) == 3


def test_models_without_a_lens_are_refused():
    for name in ("vca_pvt_tiny", "vca_swin_tiny", "vca_cswin_tiny"):
        model = small(name).eval()
        with pytest.raises(ValueError, match="needs a ViT or DeiT"):
            vca.logit_lens(model, images_of(model))
    with pytest.raises(ValueError, match="no classes"):
        vca.logit_lens(make_vca_vit(num_classes=0), images())
    with pytest.raises(ValueError, match="training mode"):
        vca.logit_lens(make_vca_vit().train(), images())
