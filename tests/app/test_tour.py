"""The sentences of the guided tour say what the model's own numbers are."""

import base64

import numpy as np
import pytest
import torch

import vca
from app.runtime import records, tour
from tests.helpers.app import MHSA, PLAIN, PREFIXED


def recorded_by(weights, name, picture):
    model = vca.load(weights / name)
    return model, records.Recordings().get(model, picture)


def decoded(data: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data), "<f4")


@pytest.mark.parametrize("name", [PLAIN, PREFIXED])
@pytest.mark.parametrize("sign", [1, -1])
def test_lambda_is_told_with_its_sign(weights, picture, name, sign):
    model, _ = recorded_by(weights, name, picture)
    with torch.no_grad(), vca.intervene(model, lambda1=0.3 * sign):
        recorded = records.Recordings().get(model, picture)
        scenes = {scene["id"]: scene for scene in tour.scenes(model, recorded, 1, 2)}
    said = scenes["subtraction"]["text"]
    if sign < 0:
        assert said.startswith("λ is −0.30 here: negative, so the model learned to add 0.30 of the second map")
        assert "1 − λ = 1.30" in said and scenes["subtraction"]["title"] == "Adding the two"
    else:
        assert said.startswith("λ is 0.30 here: the model takes 0.30 of the second map off the first")
        assert "1 − λ = 0.70" in said and scenes["subtraction"]["title"] == "The subtraction"


@pytest.mark.parametrize("name", [PLAIN, PREFIXED])
def test_the_streams_are_those_of_the_contrast_token_read_most(weights, picture, name):
    model, recorded = recorded_by(weights, name, picture)
    layer, head = recorded.maps[2], 1
    prefix = layer.num_prefix_tokens
    read = layer.stage2.differential[0, head]
    read = read[0] if name == PREFIXED else read[prefix:].mean(0)
    token = int(read.abs().argmax())
    scenes = {scene["id"]: scene for scene in tour.scenes(model, recorded, 2, head)}
    rows, cols = layer.token_grid
    assert f"{rows} × {cols} cells" in scenes["tokens"]["text"] and scenes["tokens"]["token"] == token
    for stream in ("positive", "negative"):
        want = getattr(layer.stage1, stream)[0, head, token]
        np.testing.assert_array_equal(decoded(scenes[stream]["values"]), want[prefix:])
        peak = int(want[prefix:].argmax())
        across = layer.grid_size[1]
        assert f"row {peak // across + 1}, column {peak % across + 1} (" in scenes[stream]["text"]
    shared = float(torch.minimum(layer.stage1.positive, layer.stage1.negative)[0, head, token].sum())
    assert f"{shared:.0%} of the two maps is the same" in scenes["negative"]["text"]


def test_self_attention_has_fewer_scenes(weights, picture):
    model, recorded = recorded_by(weights, MHSA, picture)
    scenes = tour.scenes(model, recorded, 0, 0)
    assert [scene["id"] for scene in scenes] == ["patches", "attention", "lens"]
    assert "nothing to contrast" in scenes[1]["text"]


def test_the_last_scene_says_from_which_block_on_the_answer_leads(weights, picture):
    model, recorded = recorded_by(weights, PLAIN, picture)
    with torch.no_grad():
        lens = vca.logit_lens(model, recorded.x)[:, 0].softmax(-1)
    best = int(lens[-1].argmax())
    leads = [int(p.argmax()) == best for p in lens]
    settled = max((i + 2 for i, is_best in enumerate(leads) if not is_best), default=1)
    said = tour.scenes(model, recorded, 0, 0)[-1]["text"]
    where = "from the first block on" if settled == 1 else f"leads from block {settled} of 3 on"
    assert where in said and f"“{model.label_names[best]}”" in said


@pytest.mark.parametrize("place", [(9, 0), (0, 3), (0, -1)])
def test_a_head_that_is_not_there_is_refused(weights, picture, place):
    model, recorded = recorded_by(weights, PLAIN, picture)
    with pytest.raises(LookupError):
        tour.scenes(model, recorded, *place)
