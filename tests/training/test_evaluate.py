"""Accuracy by source and by image size."""

import json
import shutil
import sys

import pytest
import torch

import vca
from tests.helpers.runs import CLASSES, run, write_images
from training.data.images import Images
from training.evaluate import accuracy_at, variant_accuracy


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of three classes, a split with two of them, and a classifier that always says "cat"."""
    root = tmp_path_factory.mktemp("evaluate")
    for split in ("val", "strangers"):
        write_images(root / "data", split, 8, seed=1)
    shutil.rmtree(root / "data" / "strangers" / "dog")
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=3)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    vca.save(model, root / "checkpoint", label_names=list(CLASSES))
    return root


def test_a_split_with_some_classes_is_measured_among_all_of_the_models(place):
    model = vca.load(place / "checkpoint")
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([1.0, 0.0, 2.0]))  # dog, then bird
    folder = str(place / "data" / "strangers")
    assert variant_accuracy(model, folder, list(CLASSES), 0, all_compete=True)["top1"] == 0
    assert variant_accuracy(model, folder, list(CLASSES), 0)["top1"] == 50


def test_another_size_is_measured_on_a_copy_and_evenly(place):
    model = vca.load(place / "checkpoint")
    before = model.pos_embed.clone()
    measured = accuracy_at(model, Images(place / "data", "val"), 64, 0, count=6)
    assert measured["images"] == 6 and measured["top1"] == pytest.approx(100 / 3, abs=0.01)
    assert torch.equal(model.pos_embed, before) and list(model.pretrained_cfg["input_size"]) == [3, 32, 32]


def test_the_command_writes_both(place):
    args = [str(place / "checkpoint"), "--data", str(place / "data"), "--splits", "strangers", "--sizes", "32", "64"]
    result = run([sys.executable, "-m", "training.evaluate", *args, "--precision", "bf16"])
    assert result.returncode == 0, result.stderr
    measured = json.loads((place / "checkpoint" / "results.json").read_text())
    assert measured["results"]["strangers"]["top1"] == 50 and measured["precision"] == "bf16"
    assert list(measured["by_size"]) == ["32", "64"] and measured["by_size"]["64"]["images"] == 24
    assert "at 64 px top-1 33.33 %" in result.stdout
