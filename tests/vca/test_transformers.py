"""Checkpoints through transformers, after `import vca`: its wrapper of timm's models reads them as they are."""

import pytest
import torch
from PIL import Image

import vca
from tests.helpers.kinds import SMALL, make
from vca.checkpoint import read_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
LABELS = ["left", "right", "up"]
FAMILIES = ["vca_vit_pico_patch4_32", "vca_deit_tiny_patch16_224", "vca_pvt_tiny", "vca_swin_tiny", "cswin_tiny"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_outputs_are_the_same(tmp_path, name):
    model = make(name)
    vca.save(model, tmp_path, label_names=LABELS)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert [theirs.config.id2label[i] for i in range(3)] == LABELS
    size = SMALL[name].get("img_size")
    photo = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 20).convert("RGB")
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photo, return_tensors="pt")
    x = vca.preprocess(model, photo)
    torch.testing.assert_close(inputs["pixel_values"], x, atol=0, rtol=0)
    assert size is None or x.shape[-1] == (size[1] if isinstance(size, tuple) else size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, model(x), atol=1e-5, rtol=1e-5)


def test_weights_stored_in_half_the_bits_are_computed_in_float32(tmp_path):
    model = make("vca_vit_pico_patch4_32")
    vca.save(model, tmp_path, label_names=LABELS, dtype=torch.float16)
    assert read_config(tmp_path)["dtype"] == "float32"
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    ours = vca.load(tmp_path)
    for parameters in (theirs.parameters(), ours.parameters()):
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
    vca.save(model, tmp_path, label_names=LABELS)
    assert "dtype" not in read_config(tmp_path)


def test_a_pipeline_answers_with_the_labels(tmp_path):
    model = make("vca_vit_pico_patch4_32")
    vca.save(model, tmp_path, label_names=LABELS)
    photo = Image.effect_mandelbrot((60, 50), (-2, -1, 1, 1), 20).convert("RGB")
    answers = transformers.pipeline("image-classification", model=str(tmp_path))(photo)
    with torch.no_grad():
        want = model(vca.preprocess(model, photo))[0].softmax(0)
    assert [answer["label"] for answer in answers] == [LABELS[i] for i in want.argsort(descending=True)]
    assert answers[0]["score"] == pytest.approx(want.max().item(), abs=1e-5)
