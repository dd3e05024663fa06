"""A CNN as the second model of Compare, and nowhere else: its Grad-CAM beside the maps of the first model."""

import json
import shutil
import zipfile

import gradio as gr
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf

import vca
from app.runtime import cams, loading, records
from app.runtime.checkpoints import Checkpoints
from app.runtime.images import read_image
from tests.helpers.app import PLAIN, recorded, save_cnn
from tests.helpers.browser import needs_browser
from tests.helpers.compare_page import READ, facts_of, load_another, panel_of, send
from tests.helpers.page import our_faults
from vca import preprocessing
from vca.attribution import grad_cam

ELSEWHERE = "is a CNN and has no attention to show: it can be the second model of Compare"


@pytest.fixture(scope="module")
def cnn_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "cnn"
    save_cnn(folder)
    return folder


def answer_of(folder, picture) -> tuple[torch.nn.Module, np.ndarray, torch.Tensor]:
    """The model, its probabilities, and the Grad-CAM of its likeliest class over 32x32 cells of 2x2 pixels."""
    model = loading.open_model(str(folder))
    x = preprocessing.preprocess(model, read_image(picture))
    probabilities = records.classify(model, x)
    values = grad_cam(model, x, torch.tensor([int(probabilities.argmax())]))
    return model, probabilities, F.avg_pool2d(values, 2)[0]


# ---- The server


def test_the_checkpoint_opens_as_timm_opens_it(cnn_folder):
    x = torch.randn(1, 3, 64, 64)
    opened, saved = loading.open_model(str(cnn_folder)), timm.create_model(f"local-dir:{cnn_folder}", pretrained=True)
    assert torch.equal(opened(x), saved.eval()(x)) and loading.is_cnn(opened)
    assert records.record(opened, x)[1] == []


@pytest.mark.parametrize(
    "name, size", [("convnextv2_atto", 64), ("efficientnet_b0", 96), ("regnetx_002", 64), ("resnetv2_50", 64)]
)
def test_other_families(name, size, tmp_path):
    model = timm.create_model(name, num_classes=3)
    model.pretrained_cfg["input_size"] = (3, size, size)
    save_for_hf(model, tmp_path / name, safe_serialization=True)
    opened = loading.open_model(str(tmp_path / name))
    assert cams.grad_cam(opened, torch.randn(1, 3, size, size), 2).shape == (32, 32)


def test_only_who_asks_for_a_cnn_gets_one(weights, cnn_folder):
    served = Checkpoints(weights)
    uploaded = served.keep(loading.open_model(str(cnn_folder)))
    for name, shown in ((str(cnn_folder), str(cnn_folder)), (uploaded, "resnet18")):
        assert loading.is_cnn(served.load(name, cnn=True))
        with pytest.raises(gr.Error, match=f"{shown} {ELSEWHERE}"):
            served.load(name)


def test_a_gradient_that_takes_much_memory_is_refused(cnn_folder, monkeypatch):
    monkeypatch.setattr(loading, "GRADIENT_BYTES", 100_000)
    with pytest.raises(vca.CheckpointError, match=r"its gradient takes \d MB, the limit is 0 MB"):
        loading.open_model(str(cnn_folder))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(global_pool=""), "cannot run at 64x64"),
        (dict(features_only=True), "the model is a FeatureListNet"),
        (dict(layers=[2, 1, 1, 1]), "missing layer1.1.bn1.bias"),
        (dict(color="red"), "cannot build resnet18"),
    ],
)
def test_what_is_no_such_classifier_is_refused(cnn_folder, tmp_path, arguments, words):
    folder = shutil.copytree(cnn_folder, tmp_path / "cnn")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= arguments
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(vca.CheckpointError, match=words):
        loading.open_model(str(folder))


def test_grad_cam_leaves_the_model_to_others(cnn_folder, picture):
    model, probabilities, want = answer_of(cnn_folder, picture)
    x = preprocessing.preprocess(model, read_image(picture))
    disturbed = []
    model.layer4.register_forward_hook(lambda *_: disturbed.append(len(model.layer4._forward_hooks)))
    values = cams.grad_cam(model, x, int(probabilities.argmax()))
    torch.testing.assert_close(values, want)
    assert values.min() >= 0 and values.max() > 0
    assert set(disturbed) <= {1} and len(model.layer4._forward_hooks) == 1


def test_the_endpoints(client, cnn_folder, picture):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    found = client.predict(handle_file(picture), PLAIN, str(cnn_folder), api_name="/compare")
    model, probabilities, _ = answer_of(cnn_folder, picture)
    answers = found[str(cnn_folder)]["answers"]
    assert answers == pytest.approx(records.top_labels(model, probabilities, 5), rel=1e-4)
    for name, more in (("/classify", []), ("/attribution", []), ("/compare", [PLAIN])):
        with pytest.raises(AppError, match=ELSEWHERE):
            client.predict(handle_file(picture), str(cnn_folder), *more, api_name=name)


# ---- The page


@needs_browser
def test_a_cnn_is_the_second_model(page, weights, picture, cnn_folder):
    send(page, picture)
    assert "is loaded" in load_another(page, "Compare", str(cnn_folder))
    page.wait_for_selector(".vc-side h2:has-text('cnn')")
    page.wait_for_selector(".vc[data-state=complete]")
    model, probabilities, values = answer_of(cnn_folder, picture)
    order = np.argsort(-probabilities)
    second = page.locator(".vc-side").nth(1)
    assert [line.split("\n")[0] for line in second.locator(".vc-top li").all_inner_texts()] == [
        model.label_names[i] for i in order
    ]
    says = f"Grad-CAM of {model.label_names[order[0]]}: a CNN has no attention to ask"
    caption = second.locator("figcaption")
    assert caption.inner_text() == says
    assert second.locator(".vv-panels figure").locator("visible=true").count() == 1
    assert float(second.locator(".vv-marks span").nth(1).inner_text()) == pytest.approx(float(values.max()), rel=6e-3)
    facts = facts_of(page, 1)
    assert facts["Attention"] == "none" and facts["Input"] == "64 × 64 px"
    assert facts["Parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    page.wait_for_selector(".vc-facts tr:last-child td:has-text(' ms')")
    assert not page.locator(".vc-scales").is_visible() and page.locator(".vc-depth").inner_text() == "Block"
    assert page.locator(".vc-blocks button").count() == 3

    _, _, maps = recorded(weights, PLAIN, picture)
    first = page.locator(".vc-side").first.locator("figcaption")
    page.locator(".vc [data-mode=stage1]").click()
    page.locator(".vc-blocks button").first.click()
    page.locator(".vc-heads button").nth(2).click()
    canvas = second.locator(".vc-large canvas")
    box = canvas.bounding_box()
    canvas.click(position=dict(x=0.9 * box["width"], y=0.9 * box["height"]))
    tokens = maps[0].token_grid
    assert f"block 1 of 3, head 2; contrast token, row {tokens[0]}, column {tokens[1]}" in first.inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("]")
    assert f"block 2 of 3, head 2; contrast token, row {tokens[0]}, column {tokens[1] - 1}" in first.inner_text()
    assert caption.inner_text() == says
    shown = page.evaluate(READ)[1]
    np.testing.assert_allclose(shown["positive"], values.flatten(), rtol=1e-4, atol=1e-6)
    assert our_faults(page) == []
    page.set_viewport_size(dict(width=390, height=844))
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390


@needs_browser
def test_a_cnn_is_in_no_other_choice(page, picture, cnn_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "net.zip", "w") as archive:
        for file in cnn_folder.iterdir():
            archive.write(file, file.name)
    assert f"{cnn_folder} {ELSEWHERE}" in load_another(page, "Classify", str(cnn_folder))
    choice = page.locator(".vca-choice")
    choice.locator(".vca-loader input[type=file]").set_input_files(tmp_path / "net.zip")
    choice.locator(f".vca-problem:has-text('resnet18 {ELSEWHERE}')").wait_for()
    panel = panel_of(page, "Compare")
    panel.get_by_text("Load another model").click()
    panel.locator(".vca-loader input[type=file]").set_input_files(tmp_path / "net.zip")
    panel.locator(".vca-hint:has-text('net (uploaded) is loaded')").wait_for()
    assert panel.get_by_label("Second model").input_value() == "net (uploaded)"
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=PLAIN, exact=True).wait_for()
    assert page.get_by_role("option", name="net (uploaded)").count() == 0
