"""The endpoint /intervene answers as the changed model does, and says what it does not take."""

import json

import numpy as np
import pytest
import torch
from gradio_client import handle_file
from gradio_client.exceptions import AppError

import vca
from app.runtime.images import read_image
from tests.helpers.app import LABELS, MHSA, PLAIN, PREFIXED, photo
from vca import preprocessing


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    photo(90, 60).save(path)
    return path


def assert_sorted_probabilities(answer: dict[str, float], want: torch.Tensor) -> None:
    probabilities = [want[LABELS.index(label)].item() for label in answer]
    np.testing.assert_allclose(list(answer.values()), probabilities, rtol=1e-5)
    assert probabilities == sorted(probabilities, reverse=True)


@pytest.mark.parametrize(
    "name, arguments, blocks, change, patches",
    [
        (PLAIN, dict(block=1, head=2), [1], dict(mute=[2]), []),
        (PLAIN, dict(head=[0, 2]), None, dict(mute=[0, 2]), []),
        (PLAIN, dict(lambda_scale=-1.5), None, dict(lambda1_scale=-1.5, lambda2_scale=-1.5), []),
        (PLAIN, dict(lambda1=0, lambda2=1.5), None, dict(lambda1=0, lambda2=1.5), []),
        (PREFIXED, dict(block=2, off=["negative", "stage1"]), [2], dict(off=["negative", "stage1"]), []),
        (PREFIXED, dict(patches=[0, 7, 19]), [], {}, [0, 7, 19]),
        (MHSA, dict(block="all", head=0, patches=[3]), None, dict(mute=[0]), [3]),
    ],
)
def test_answers_are_those_of_the_changed_model(client, weights, picture, name, arguments, blocks, change, patches):
    given = dict(image=handle_file(picture), model=name, top_k=len(LABELS), api_name="/intervene")
    answer = client.predict(**given, **arguments)
    model = vca.load(weights / name)
    x = preprocessing.preprocess(model, read_image(picture))
    with torch.no_grad():
        before = model(x)[0].softmax(0)
        with vca.intervene(model, blocks, **change):
            after = model(vca.replace_patches(model, x, patches))[0].softmax(0)
    assert_sorted_probabilities(answer["before"], before)
    assert_sorted_probabilities(answer["after"], after)
    assert answer["before"] != answer["after"]


def test_labels_are_the_likeliest_of_both_answers_and_nothing_changed_is_nothing_changed(client, picture):
    given = dict(image=handle_file(picture), model=PLAIN, api_name="/intervene")
    answer = client.predict(**given, top_k=2)
    assert answer["before"] == answer["after"] and len(answer["before"]) == 2
    changed = client.predict(**given, off=["positive", "negative"], top_k=1)
    assert changed["before"].keys() == changed["after"].keys()
    assert {next(iter(changed["before"])), next(iter(changed["after"]))} == set(changed["before"])
    assert client.predict(**given, top_k=2) == answer


def test_visitors_who_change_one_model_at_once_do_not_meet(client, picture):
    given = dict(image=handle_file(picture), model=PLAIN, api_name="/intervene", top_k=len(LABELS))
    changes = [dict(head=[0], block=0), dict(off=["negative"]), dict(lambda_scale=2.5), dict(patches=[0, 1, 2]), {}]
    alone = [client.predict(**given, **change) for change in changes]
    assert len({json.dumps(answer) for answer in alone}) == len(changes)
    jobs = [client.submit(**given, **change) for change in changes * 4]
    assert [job.result(timeout=120) for job in jobs] == alone * 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(model="nothing"), PLAIN),
        (dict(model=PLAIN, block=3), "block must be a whole number from 0 to 2"),
        (dict(model=PLAIN, block="last"), 'block must be "all" or a whole number from 0 to 2'),
        (dict(model=PLAIN, head=3), "head must be a whole number from 0 to 2"),
        (dict(model=PLAIN, head=[0, "1"]), "head must be a whole number from 0 to 2"),
        (dict(model=PLAIN, lambda_scale=-11), "lambda_scale must be a number from -10 to 10"),
        (dict(model=PLAIN, lambda1=11), "lambda1 must be a number from -10 to 10"),
        (dict(model=PLAIN, lambda2="much"), "lambda2 must be a number from -10 to 10"),
        (dict(model=PLAIN, off=["stage3"]), "off must be one of: positive, negative, stage1, stage2"),
        (dict(model=PLAIN, off="stage1"), "off must be a list"),
        (dict(model=PLAIN, patches=[64]), "patch 64 is out of range: 8x8 patches are 0 to 63"),
        (dict(model=PLAIN, patches=["all"]), "patch all is out of range"),
        (dict(model=PLAIN, patches=7), "patches must be a list"),
        (dict(model=PLAIN, top_k=0), "top_k must be a whole number from 1 to 4"),
        (dict(model=MHSA, lambda1=0), "has no lambda1 to change"),
        (dict(model=MHSA, block=0, off=["negative"]), "has no negative to change"),
    ],
    ids=str,
)
def test_wrong_arguments_are_answered_in_one_line(client, picture, arguments, message):
    with pytest.raises(AppError) as caught:
        client.predict(image=handle_file(picture), api_name="/intervene", **(dict(top_k=2) | arguments))
    assert message in str(caught.value) and "\n" not in str(caught.value)
