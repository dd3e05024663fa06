"""What the Classify tab asks the server for: the answer, its reasons by head and block, and what would change it."""

import base64
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch

import vca
from app import inputs
from app.runtime import examples, records, thinking
from app.runtime.checkpoints import Checkpoints
from app.runtime.images import read_image
from app.runtime.records import Recorded
from app.ui import WEIGHTS
from tests.helpers import http
from tests.helpers.app import MHSA, PLAIN, PREFIXED
from vca import preprocessing
from vca.attribution import head_relevance


def seen(folder: Path, name: str, picture: Path) -> tuple[torch.nn.Module, Recorded]:
    model = vca.load(folder / name)
    model.eval()
    return model, records.Recordings().get(model, picture)


def rows_of(block: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(block["rows"]), "<f4").reshape(block["heads"], *block["grid"])


@pytest.mark.parametrize("name", [PLAIN, PREFIXED, MHSA])
def test_the_maps_are_what_the_classifier_reads(weights, picture, name):
    model, recorded = seen(weights, name, picture)
    look = thinking.look(model, recorded)
    order = np.argsort(-recorded.probabilities)
    assert [label for label, _, _ in look["top"]] == [model.label_names[i] for i in order][: len(look["top"])]
    assert [before for _, before, _ in look["top"]] == [after for _, _, after in look["top"]]
    for block, layer in zip(look["blocks"], recorded.maps, strict=True):
        prefix = layer.num_prefix_tokens
        read = layer.effective[0, :, 0] if prefix else layer.effective[0].mean(1)
        want = read[:, prefix:].unflatten(-1, layer.grid_size)
        np.testing.assert_allclose(rows_of(block), want, atol=1e-6)
    assert look["reader"] == ("the class token" if name == PREFIXED else "the average patch")


def test_a_model_that_reads_no_row_says_so(weights, picture):
    model, recorded = seen(weights, PREFIXED, picture)
    model.global_pool = "max"
    look = thinking.look(model, recorded)
    assert look["blocks"] == [] and "it pools with 'max'" in look["problem"]


@pytest.mark.parametrize("name", [PLAIN, PREFIXED, MHSA])
def test_the_last_block_of_the_lens_is_the_answer(weights, picture, name):
    model, recorded = seen(weights, name, picture)
    inside = thinking.look_inside(model, recorded)
    best = int(recorded.probabilities.argmax())
    last = inside["lens"][-1]
    assert len(inside["lens"]) == 3
    assert last["label"] == model.label_names[best]
    assert last["answer"] == last["probability"] == pytest.approx(float(recorded.probabilities[best]), abs=1e-7)
    want = head_relevance(model, recorded.x, torch.tensor([best]))
    np.testing.assert_allclose(inside["relevance"], [layer[0] for layer in want])


@pytest.mark.parametrize(
    "name, change, patches, blocks, library",
    [
        (PLAIN, dict(block=1, head=[0, 2]), [], [1], dict(mute=[0, 2])),
        (PLAIN, dict(block="all", lambda_scale=-1.5), [], None, dict(lambda1_scale=-1.5, lambda2_scale=-1.5)),
        (PREFIXED, dict(block=2, off=["negative", "stage1"]), [3, 7], [2], dict(off=["negative", "stage1"])),
        (MHSA, dict(block="all", head=[1]), [0], None, dict(mute=[1])),
    ],
)
def test_what_if_is_the_changed_model(weights, picture, name, change, patches, blocks, library):
    model, recorded = seen(weights, name, picture)
    answer = thinking.what_if(model, recorded, change, patches)
    x = vca.replace_patches(model, recorded.x, patches)
    with torch.no_grad(), vca.intervene(model, blocks, **library), vca.record(model) as maps:
        after = model(x)[0].softmax(0)
    for label, before, now in answer["top"]:
        index = model.label_names.index(label)
        assert (before, now) == pytest.approx((recorded.probabilities[index], float(after[index])), abs=1e-7)
    assert [now for *_, now in answer["top"]] == sorted((now for *_, now in answer["top"]), reverse=True)
    reads = vca.attribution.readout(model, maps[2])
    np.testing.assert_allclose(rows_of(answer["blocks"][2]), reads.rows(maps[2].effective[0]), atol=1e-6)


def test_nothing_changed_is_the_same_bits(weights, picture):
    model, recorded = seen(weights, PLAIN, picture)
    answer = thinking.what_if(model, recorded, dict(block="all", head=[], lambda_scale=None, off=[]), [])
    assert all(before == after for _, before, after in answer["top"])
    assert [b["rows"] for b in answer["blocks"]] == [b["rows"] for b in thinking.look(model, recorded)["blocks"]]


@pytest.mark.parametrize(
    "change, patches, sentence",
    [
        (dict(block=9), [], "block must be a whole number from 0 to 2"),
        (dict(head=[3]), [], "head must be a whole number from 0 to 2"),
        (dict(lambda_scale=99), [], "lambda_scale must be a number"),
        (dict(off=["everything"]), [], "off must be one of"),
        ({}, [64], "patch 64 is out of range"),
        ({}, "all", "patches must be a list"),
    ],
)
def test_an_impossible_change_is_refused_in_a_line(weights, picture, change, patches, sentence):
    model, recorded = seen(weights, PLAIN, picture)
    with pytest.raises(gr.Error, match=sentence):
        thinking.what_if(model, recorded, change, patches)


@pytest.mark.parametrize("function", ["look_inside", "what_if", "reduce"])
def test_the_page_is_told_of_uploads_alone(url, function):
    components = http.get(f"{url}config").json()["components"]
    component = next(c["id"] for c in components if c["props"].get("elem_id") == "think")
    change = dict(block="all", head=[], lambda_scale=None, off=[], patches=[])
    for path in ("/etc/passwd", __file__, None, 5, "../x"):
        body = dict(fn_name=function, component_id=component, session_hash="t")
        request = dict(model=PLAIN, path=path) | change
        answer = http.post(f"{url}gradio_api/component_server", json=body | dict(data=request))
        assert answer.status_code == 200 and answer.json()["expired"] is True, path


# ---- Honest answers


def measured(score: str, threshold: float) -> dict:
    rejection = dict(score=score, threshold=threshold, known_kept=0.95, unknown_caught=0.4, auroc=0.87)
    return dict(results=dict(calibration=dict(rejection=rejection)))


@pytest.mark.parametrize("score", ["energy", "probability"])
def test_none_of_the_classes_by_the_measured_threshold(weights, picture, score):
    model, recorded = seen(weights, PLAIN, picture)
    with torch.no_grad():
        logits = model(recorded.x)[0]
    value = float(logits.logsumexp(0) if score == "energy" else logits.softmax(0).max())
    assert thinking.verdict(model, recorded) == ""  # nobody measured it
    model.training_history = [measured(score, value + 0.01)]
    said = thinking.verdict(model, recorded)
    assert said.startswith("Probably none of the 4 classes") and "AUROC 0.87" in said and "40% of others" in said
    model.training_history = [measured(score, value - 0.01)]
    assert thinking.verdict(model, recorded) == ""
    model.training_history = [dict(results=None)]
    assert thinking.verdict(model, recorded) == ""


# ---- Examples


SMALL = "vca_vit_pico_patch4_32_cifar10"
CLASSIFIERS = sorted(
    file.parent.name
    for file in WEIGHTS.glob("*/config.json")
    if "vit" in json.loads(file.read_text(encoding="utf-8"))["architecture"]
)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_examples_of_a_shipped_model_are_right_and_its_mistake_is_one(name):
    model = vca.load(WEIGHTS / name)
    chosen = examples.chosen_for(model.label_names, partial(examples.ask, model))
    assert 3 <= len(chosen.right) <= examples.SHOWN and chosen.mistake is not None

    def says(example: examples.Example) -> str:
        with torch.no_grad():
            return model.label_names[int(model(preprocessing.preprocess(model, read_image(example.path))).argmax())]

    for answer in chosen.right:
        assert says(answer.example) == answer.label and answer.label.lower() in answer.example.right
    assert says(chosen.mistake.example) == chosen.mistake.label
    assert chosen.mistake.label.lower() not in chosen.mistake.example.right
    surest = [answer.probability for answer in chosen.right]
    assert surest == sorted(surest, reverse=True)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_kept_answers_of_a_shipped_model_are_its_own(name):
    kept = examples.kept(WEIGHTS / name)
    assert any(example.startswith("generated") for example in kept), "run: python -m scripts.examples"
    model = vca.load(WEIGHTS / name)
    for example, answer in kept.items():
        now = examples.ask(model, examples.examples()[example])
        assert (now.label, now.is_right) == (answer.label, answer.is_right)
        assert now.probability == pytest.approx(answer.probability, abs=2e-3)


def test_the_first_five_examples_of_the_default_model_are_right_above_80_percent():
    checkpoints = Checkpoints(WEIGHTS)
    first = inputs.Gallery(checkpoints).chosen(checkpoints.classifiers[0]).right[:5]
    assert len(first) == 5 and all(answer.is_right and answer.probability > 0.8 for answer in first)


@pytest.fixture
def served(tmp_path):
    """A checkpoint with answers kept beside it."""
    shutil.copytree(WEIGHTS / SMALL, tmp_path / SMALL)
    examples.keep(tmp_path / SMALL, vca.load(tmp_path / SMALL))
    return tmp_path


def test_kept_answers_need_no_model(served, monkeypatch):
    shipped = inputs.Gallery(Checkpoints(WEIGHTS)).chosen(SMALL)
    monkeypatch.setattr(Checkpoints, "load", None)
    chosen = inputs.Gallery(Checkpoints(served)).chosen(SMALL)
    answers, known = (  # whose probabilities differ in the sixth digit where another processor gave them
        [(answer.example, answer.label) for answer in (*each.right, each.mistake)] for each in (chosen, shipped)
    )
    assert answers == known and len(chosen.right) == examples.SHOWN


def test_kept_answers_are_of_these_weights_and_these_files(served, monkeypatch, tmp_path):
    folder, all_examples = served / SMALL, examples.examples()
    assert examples.kept(folder).keys() == all_examples.keys()
    (other := tmp_path / "lion.jpg").write_bytes(all_examples["lion"].path.read_bytes() + b"x")
    changed = all_examples | dict(lion=replace(all_examples["lion"], path=other))
    monkeypatch.setattr(examples, "examples", lambda: changed)
    assert examples.kept(folder).keys() == all_examples.keys() - {"lion"}
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(b"x")
    assert examples.kept(folder) == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weights_sha256": 7, "answers": {}}'])
def test_kept_answers_that_cannot_be_read_are_none(text, served):
    (served / SMALL / examples.KEPT).write_text(text)
    assert examples.kept(served / SMALL) == {}


def test_a_model_of_other_classes_has_no_examples(weights):
    model = vca.load(weights / PLAIN)
    assert examples.chosen_for(model.label_names, partial(examples.ask, model)) == examples.Chosen()


@pytest.mark.parametrize(
    "label, is_right",
    [("cat", True), ("Tabby, tabby cat", True), ("tiger cat", True), ("catamaran", False), ("lion", False)],
)
def test_labels_of_other_models_are_understood(label, is_right):
    assert examples.examples()["cat"].fits(label) == is_right
