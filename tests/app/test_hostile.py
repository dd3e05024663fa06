"""Hostile files, checkpoints, recipes and data get the right answer or one line of explanation, never a traceback.

Every case of the app is followed by a good image, which must be answered as before.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import vca
from app.runtime import checkpoints, records
from app.runtime.images import ImageError, read_image
from tests.helpers import http
from tests.helpers.app import LABELS, MHSA, PLAIN, PREFIXED, save_checkpoints
from tests.helpers.hostile import PHOTO, PICTURES, assert_one_line
from training import evaluate
from vca import preprocessing

# ---- Pictures: name -> the file and what it shows, or the sentence that refuses it


def assert_same_picture(seen: Image.Image, truth: Image.Image) -> None:
    """Equal to the eye: same shape, and nearly the same colours everywhere once both are 24 x 24."""
    assert seen.mode == "RGB" and seen.width * truth.height == pytest.approx(truth.width * seen.height, rel=0.01)
    small = [np.asarray(i.convert("RGB").resize((24, 24), Image.Resampling.BOX), dtype=float) for i in (seen, truth)]
    assert np.abs(small[0] - small[1]).max() < 25 and np.abs(small[0] - small[1]).mean() < 5


def probabilities_of(model, image: Image.Image) -> list[float]:
    return records.record(model, preprocessing.preprocess(model, image.convert("RGB")))[0].tolist()


# ---- Checkpoints: name -> how a good one is damaged, and what is said about it


def edit(*keys: str, value) -> Callable[[Path], None]:
    """Sets a field of `config.json`."""

    def change(folder: Path) -> None:
        config = place = json.loads((folder / "config.json").read_text())
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        config.pop("config_sha256", None)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def scribble(folder: Path) -> None:
    """Overwrites the header of the weights."""
    with open(folder / "model.safetensors", "r+b") as stream:
        stream.write(b"\xff" * 64)


def take_weights_of(other: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder.parent / other / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content)

    return change


def misname(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "corrupt weights": (scribble, "not a complete safetensors file"),
    "truncated weights": (truncate("model.safetensors", 0.7), "not a complete safetensors file"),
    "empty weights": (truncate("model.safetensors", 0), "not a complete safetensors file"),
    "misnamed weights": (misname, "file not found; a checkpoint needs safetensors weights"),
    "weights of self-attention": (take_weights_of(MHSA), "missing blocks."),
    "weights of other sizes": (take_weights_of(PREFIXED), "negative_embed is (6, 24) instead of (16, 24)"),
    "truncated config": (truncate("config.json", 0.5), "not a readable JSON file"),
    "empty config": (truncate("config.json", 0), "not a readable JSON file"),
    "misnamed architecture": (edit("architecture", value="vca_vit_pico"), "unknown architecture 'vca_vit_pico'"),
    "impossible token grid": (edit("model_args", "token_grid", value=[9, 9]), "must lie between 1x1"),
    "impossible image size": (edit("model_args", "img_size", value=2), "cannot build"),
    "another image size": (edit("model_args", "img_size", value=64), "negative_embed is (16, 24) instead of (64, 24)"),
    "mismatched input size": (edit("pretrained_cfg", "input_size", value=[3, 64, 64]), "but the model takes"),
    "input size a text": (edit("pretrained_cfg", "input_size", value="32"), "must be a list of fitting numbers"),
    "negative input size": (edit("pretrained_cfg", "input_size", value=[3, -1, -1]), "list of fitting numbers"),
    "mean null": (edit("pretrained_cfg", "mean", value=None), "pretrained_cfg.mean = None must be"),
    "std zero": (edit("pretrained_cfg", "std", value=[0, 0, 0]), "pretrained_cfg.std = [0, 0, 0] must be"),
    "history of texts": (edit("training", value=["long"]), "training must be a list of objects"),
    "one label too few": (edit("label_names", value=LABELS[1:]), "3 label_names for 4 classes"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Good checkpoints, one with an odd history, and every damaged one."""
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoints(folder)
    for name, (damage, _) in {**CHECKPOINTS, "odd history": (edit("training", value=[dict(results=3)]), "")}.items():
        copy = folder / name
        copy.mkdir()
        for file in (folder / PLAIN).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        damage(copy)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good image, whose answer must stay what it is."""
    path = tmp_path_factory.mktemp("good") / "good.png"
    PHOTO.save(path)
    return path


def classified(client, path: Path, model: str = PLAIN) -> list[float]:
    answer = client.predict(handle_file(path), model, len(LABELS), api_name="/classify")
    return [answer[label] for label in LABELS]


@pytest.fixture
def goes_on(client, weights, good):
    """After the test, the app answers a good image as before."""
    yield
    np.testing.assert_allclose(classified(client, good), probabilities_of(vca.load(weights / PLAIN), PHOTO), atol=1e-4)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(client, weights, goes_on, tmp_path, name):
    make, expected = PICTURES[name]
    path = tmp_path / name
    path.write_bytes(make())
    if isinstance(expected, str):
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert_one_line(caught.value.message, expected)
        with pytest.raises(AppError) as caught:
            classified(client, path)
        assert_one_line(str(caught.value), expected)
    else:
        assert_same_picture(read_image(path), expected)
        truth = probabilities_of(vca.load(weights / PLAIN), expected)
        np.testing.assert_allclose(classified(client, path), truth, atol=0.03)


def test_a_file_above_the_limit_is_refused(url, goes_on):
    answer = http.post(f"{url}gradio_api/upload", files=dict(files=("huge.bmp", bytes(65 * 2**20))))
    assert answer.status_code == 413
    assert_one_line(answer.text, "64")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"data": 3}', b'{"data": [{}, [], {}]}', b"\xff" * 99])
def test_requests_that_are_none(url, goes_on, body):
    answer = http.post(f"{url}gradio_api/call/classify", content=body, headers={"content-type": "application/json"})
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(client, weights, goes_on, good, monkeypatch, capsys, name):
    _, words = CHECKPOINTS[name]
    with pytest.raises(vca.CheckpointError) as caught:
        vca.load(weights / name)
    assert_one_line(str(caught.value), words)
    assert str(weights / name) in str(caught.value)

    with pytest.raises(AppError) as caught:
        classified(client, good, name)
    known = checkpoints.Checkpoints(weights)
    assert_one_line(str(caught.value), words if name in known.classifiers else "model must be one of")
    assert name in known.classifiers or any(words in problem for problem in known.problems)

    monkeypatch.setattr(sys, "argv", ["evaluate", str(weights / name), "--data", "nowhere"])
    with pytest.raises(SystemExit) as caught:
        evaluate.main()
    assert_one_line(str(caught.value), words)


def test_damaged_checkpoints_do_not_hide_the_good_ones(client, url):
    entries = {entry["name"]: entry for entry in client.predict(api_name="/models")}
    assert all("blocks" in entries[name] for name in (PLAIN, PREFIXED, MHSA, "odd history"))
    assert "not a complete safetensors file" in entries["truncated weights"]["problem"]
    page = json.dumps(http.get(f"{url}config").json())
    assert "not a readable JSON file" in page and "Traceback" not in page


# ---- Recipes and data: name -> what is wrong, and what training says about it
