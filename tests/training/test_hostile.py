"""Damaged recipes, data, arguments and states of a training command."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vca
from tests.helpers.app import photo
from tests.helpers.hostile import PICTURES, assert_one_line, encoded, header_bomb
from training import classify, evaluate

RECIPE = dict(model='"vca_vit_pico_patch4_32"', epochs=1, batch_size=4, lr=1e-3, precision='"fp32"', workers=0)


RECIPES: dict[str, tuple[dict | str, str]] = {
    "not TOML": ("epochs = = 3", "is not valid TOML"),
    "binary": (b"\xff\xfe\x00".decode("latin-1"), "is not valid TOML"),
    "empty recipe": ("", "key 'model' is missing"),
    "unknown key": (dict(epoch=3), "unknown key 'epoch'; did you mean epochs?"),
    "token grid is no key": (dict(token_grid=[9, 9]), "unknown key 'token_grid'"),
    "image size is no key": (dict(img_size=0), "unknown key 'img_size'"),
    "a table": ("[model]\nname = 3", "must be of type str, not dict"),
    "epochs a text": (dict(epochs='"3"'), "epochs = '3' must be of type int, not str"),
    "epochs a boolean": (dict(epochs="true"), "must be of type int, not bool"),
    "epochs a fraction": (dict(epochs=1.5), "must be of type int, not float"),
    "lr nan": (dict(lr="nan"), "lr = nan must be positive"),
    "lr infinite": (dict(lr="inf"), "lr = inf must be positive"),
    "lr negative": (dict(lr=-1.0), "lr = -1.0 must be positive"),
    "seed negative": (dict(seed=-1), "seed = -1 must not be negative"),
    "workers negative": (dict(workers=-1), "workers = -1 must not be negative"),
    "micro-batch negative": (dict(micro_batch=-1), "micro_batch = -1 must not be negative"),
    "padding negative": (dict(padding=-1), "padding = -1 must not be negative"),
    "drop path one": (dict(drop_path=1.0), "drop_path = 1.0 must lie in [0, 1)"),
    "EMA nan": (dict(ema_decay="nan"), "ema_decay = nan must lie in [0, 1)"),
    "mean of two": (dict(mean=[0.5, 0.5]), "mean = [0.5, 0.5] must be three numbers"),
    "mean of texts": (dict(mean=["a", "b", "c"]), "must be three numbers"),
    "std zero": (dict(std=[0, 1, 1]), "std = [0, 1, 1] must be positive"),
    "unknown model": (dict(model='"vca_vit_pico"'), "model = 'vca_vit_pico' is no classifier"),
    "a generator": (dict(model='"vca_dit_s_2"'), "model = 'vca_dit_s_2' is no classifier"),
    "unknown attention": (dict(attention='"none"'), "attention='none' is unknown"),
    "unknown precision": (dict(precision='"fp64"'), "must be bf16 or fp32"),
    "unknown augmentation": (dict(memory="false", auto_augment='"nonsense"'), "is not known to timm"),
    "batch larger than the data": (
        dict(batch_size=99), "8 training images are fewer than one batch of 99; give --batch-size 6 or less"
    ),
}  # fmt: skip


def write_recipe(path: Path, change: dict | str) -> None:
    if isinstance(change, dict):
        change = "\n".join(f"{key} = {value}" for key, value in (RECIPE | change).items())
    path.write_text(change, encoding="latin-1")


def write_data(root: Path, splits=("train", "val"), classes=("cat", "dog"), images: int = 4) -> None:
    for split in splits:
        for seed, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                photo(12, 9, seed=10 * i + seed).save(folder / f"{i}.png")


def add(name: str, content: bytes) -> Callable[[Path], None]:
    """A good data folder with one more file."""

    def write(root: Path) -> None:
        write_data(root)
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)

    return write


def with_other_val(*classes: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        write_data(root, splits=["train"])
        write_data(root, splits=["val"], classes=classes)

    return write


DATA: dict[str, tuple[Callable[[Path], None], str, dict]] = {
    "no folder": (lambda root: None, "has no folder 'train'", {}),
    "a file": (lambda root: root.write_text("data"), "has no folder 'train'", {}),
    "empty folders": (lambda root: (root / "train" / "cat").mkdir(parents=True), "train holds no images", {}),
    "no validation": (lambda root: write_data(root, splits=["train"]), "has no folder 'val'", {}),
    "no training": (lambda root: write_data(root, splits=["val"]), "has no folder 'train'", {}),
    "one class": (lambda root: write_data(root, classes=["cat"]), "has 1 class folder(s)", {}),
    "no class folders": (lambda root: write_data(root, classes=["."]), "images, but no folders of classes", {}),
    "other classes in val": (with_other_val("cat", "cow"), "train and val do not hold the same class folders", {}),
    "fewer classes in val": (with_other_val("dog"), "has 1 class folder(s)", {}),
    "more classes in val": (with_other_val("cat", "cow", "dog"), "do not hold the same class folders", {}),
    "broken image": (add("train/cat/x.png", b"text"), "x.png is not a readable image", {}),
    "broken image in a worker": (add("train/cat/x.png", b"text"), "x.png is not a readable image", dict(workers=1)),
    "broken image from files": (
        add("train/cat/x.png", b"text"), "x.png is not a readable image", dict(memory="false", workers=1, batch_size=9)
    ),
    "truncated image": (
        add("train/cat/x.jpg", encoded(photo(400, 300), "JPEG")[:4000]), "x.jpg is not a readable image", {}
    ),
    "broken image in val": (add("val/cat/x.png", b""), "x.png is not a readable image", {}),
    "bomb": (add("train/cat/x.png", header_bomb(20_000, 20_000)), "x.png is not a readable image", {}),
    "too few names": (add("classes.txt", b"cat"), "must name 2 classes, one a line", {}),
}  # fmt: skip


def trained(monkeypatch, tmp_path: Path, recipe: dict | str, *arguments: str) -> str | None:
    """Runs `python -m training.classify` in this process; returns what it exits with, None if it ends well."""
    write_recipe(tmp_path / "mine.toml", recipe)
    command = [
        "classify",
        str(tmp_path / "mine.toml"),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", *arguments])
    try:
        classify.main()
    except SystemExit as end:
        return str(end.code)
    return None


def assert_refused(said: str | None, words: str) -> None:
    assert said and said.startswith("error: "), said
    assert_one_line(said, words)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(monkeypatch, tmp_path, name):
    recipe, words = RECIPES[name]
    write_data(tmp_path / "data")
    assert_refused(trained(monkeypatch, tmp_path, recipe), words)


@pytest.mark.parametrize("name", DATA)
def test_data(monkeypatch, tmp_path, name):
    write, words, recipe = DATA[name]
    write(tmp_path / "data")
    assert_refused(trained(monkeypatch, tmp_path, recipe), words)


ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "unknown device": (["--device", "nonsense"], "--device nonsense cannot be used"),
    "start from nowhere": (["--init", "nowhere"], "nowhere: no such checkpoint folder"),
    "out is a file": (["--out", __file__], "File exists"),
    "value of another type": (["--epochs", "many"], "--epochs many: not a int"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(monkeypatch, tmp_path, name):
    arguments, words = ARGUMENTS[name]
    write_data(tmp_path / "data")
    assert_refused(trained(monkeypatch, tmp_path, {}, *arguments), words)


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "zip"])
def test_a_damaged_state_is_named(monkeypatch, tmp_path, content):
    write_data(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state-00000001.pt").write_bytes(content)
    said = trained(monkeypatch, tmp_path, {})
    assert_refused(said, "state-00000001.pt is damaged; delete it to go on from the state before")


def test_odd_but_good_images_are_trained_on_and_evaluated(monkeypatch, tmp_path, capsys):
    write_data(tmp_path / "data", images=1)
    for name in ("animated.png", "cmyk.jpg", "transparent palette.png", "1x1.png", "tall.png", "exif 6.jpg"):
        (tmp_path / "data" / "train" / "cat" / name).write_bytes(PICTURES[name][0]())
    (tmp_path / "data" / "train" / "cat" / "notes.txt").write_text("not an image, and not read as one")
    assert trained(monkeypatch, tmp_path, dict(batch_size=8)) is None
    top1 = re.search(r"top-1 (\S+) %", capsys.readouterr().out).group(1)
    checkpoint = tmp_path / "out" / "checkpoint"
    monkeypatch.setattr(sys, "argv", ["evaluate", str(checkpoint), "--data", str(tmp_path / "data"), "--device", "cpu"])
    evaluate.main()
    assert f"top-1 {top1} %" in capsys.readouterr().out
    model = vca.load(checkpoint)
    assert model.label_names == ["cat", "dog"] and model.training_history[0]["train_images"] == 8
