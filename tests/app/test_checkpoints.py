"""The models served: a ViT for 224 px is also served at larger sizes, where its maps are finer."""

import json
import shutil

import pytest
import torch

import vca
from app.runtime import records
from app.runtime.checkpoints import Checkpoints

MEASURED = dict(results=dict(val=dict(top1=80.0)), by_size={"336": dict(top1=71.0), "518": dict(top1=69.0)})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    weights = tmp_path_factory.mktemp("weights")
    for name in ("vca_vit_small_patch14_224", "vca_deit_tiny_patch16_224", "vca_vit_pico_patch4_32"):
        vca.save(vca.create_model(name, num_classes=2), weights / name, label_names=["cat", "dog"])
    for name in ("vca_vit_small_patch14_224", "vca_vit_pico_patch4_32"):
        (weights / name / "results.json").write_text(json.dumps(MEASURED))
    return Checkpoints(weights)


def test_a_larger_size_is_offered_where_it_was_measured_to_keep_the_accuracy(served):
    assert served.finer == ["vca_vit_small_patch14_224 @ 336 px"]
    assert not {*served.finer} & {*served.classifiers}


@pytest.mark.parametrize("text", ["", "[]", '{"results": {"val": {}}, "by_size": {}}', '{"by_size": {"336": 3}}'])
def test_results_that_cannot_be_read_offer_no_size(served, text, tmp_path):
    name = "vca_vit_small_patch14_224"
    shutil.copytree(served.folders[name], tmp_path / name)
    (tmp_path / name / "results.json").write_text(text)
    assert Checkpoints(tmp_path).finer == []


def test_a_finer_model_has_finer_maps_and_as_many_contrast_tokens(served):
    own, finer = (served.load(f"vca_vit_small_patch14_224{size}") for size in ("", " @ 336 px"))
    _, maps = records.record(finer, torch.zeros(1, 3, 336, 336))
    assert {layer.grid_size for layer in maps} == {(24, 24)} and {layer.token_grid for layer in maps} == {(8, 8)}
    _, maps = records.record(own, torch.zeros(1, 3, 224, 224))
    assert {layer.grid_size for layer in maps} == {(16, 16)} and list(own.pretrained_cfg["input_size"]) == [3, 224, 224]
    assert finer.label_names == own.label_names
    weight = "blocks.3.attn.qkv.weight"
    assert torch.equal(own.state_dict()[weight], finer.state_dict()[weight])
