"""Hostile files, checkpoints, recipes and data get the right answer or one line of explanation, never a traceback.

Every case of the app is followed by a good image, which must be answered as before.
"""

import io
import json
import re
import signal
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageOps

import vca
from app import models
from app.images import ImageError, read_image
from tests.test_app import LABELS, MHSA, PLAIN, PREFIXED, photo, save_checkpoints
from training import classify, evaluate

NOT_AN_IMAGE = "This file is not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image."
DAMAGED = "This image file is damaged or incomplete."
TRANSPOSED = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def assert_one_line(text: str, words: str) -> None:
    assert words in text
    assert "Traceback" not in text and "\n" not in text.strip() and len(text) < 1000, text


# ---- Pictures: name -> the file and what it shows, or the sentence that refuses it

PHOTO = photo(120, 90, seed=1)
GREY = PHOTO.convert("L")
RAMP = Image.fromarray(np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1)))
DEEP = Image.fromarray(np.asarray(RAMP).astype(np.uint16) * 257)
FEW = PHOTO.quantize(255).convert("RGB")
LEFT = Image.new("L", PHOTO.size, 0)
LEFT.paste(255, (0, 0, 60, 90))  # opaque on the left
ON_WHITE, FEW_ON_WHITE = (Image.composite(i, Image.new("RGB", i.size, "white"), LEFT) for i in (PHOTO, FEW))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def animated(format: str, **options) -> bytes:
    frames = [Image.new("RGB", PHOTO.size, colour) for colour in ("red", "lime")]
    return encoded(PHOTO, format, save_all=True, append_images=frames, **options)


def turned(orientation: int) -> bytes:
    """The photo as a camera held another way stores it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    way = TRANSPOSED[orientation]
    stored = PHOTO if way is None else PHOTO.transpose(way)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(stored, "PNG", exif=exif)))).size == PHOTO.size
    return encoded(stored, "JPEG", exif=exif, quality=95)


def translucent() -> Image.Image:
    image = PHOTO.convert("RGBA")
    image.putalpha(LEFT)
    return image


def palette() -> Image.Image:
    """The photo in palette colours, and a last one, to be transparent, on the right half."""
    image = PHOTO.quantize(255)
    image.putpalette([*image.getpalette(), 255, 0, 255])
    image.paste(255, (60, 0, 120, 90))
    return image


def header_bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


PICTURES: dict[str, tuple[Callable[[], bytes], Image.Image | str]] = {
    "photo.png": (lambda: encoded(PHOTO, "PNG"), PHOTO),
    "photo.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95), PHOTO),
    "progressive.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95, progressive=True), PHOTO),
    "photo.webp": (lambda: encoded(PHOTO, "WEBP", lossless=True), PHOTO),
    "photo.bmp": (lambda: encoded(PHOTO, "BMP"), PHOTO),
    "photo.tiff": (lambda: encoded(PHOTO, "TIFF"), PHOTO),
    "a png named.jpg": (lambda: encoded(PHOTO, "PNG"), PHOTO),
    "no extension": (lambda: encoded(PHOTO, "PNG"), PHOTO),
    "größe <b>&amp; 'ä'.png": (lambda: encoded(PHOTO, "PNG"), PHOTO),
    "damaged profile.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95, icc_profile=b"no profile"), PHOTO),
    "damaged exif.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), PHOTO),
    "animated.gif": (lambda: animated("GIF"), FEW),
    "animated.webp": (lambda: animated("WEBP", lossless=True), PHOTO),
    "animated.png": (lambda: animated("PNG"), PHOTO),
    "cmyk.jpg": (lambda: encoded(PHOTO.convert("CMYK"), "JPEG", quality=95), PHOTO),
    "cmyk.tiff": (lambda: encoded(PHOTO.convert("CMYK"), "TIFF"), PHOTO),
    "grey.jpg": (lambda: encoded(GREY, "JPEG", quality=95), GREY),
    "grey with alpha.png": (lambda: encoded(Image.merge("LA", (GREY, LEFT)), "PNG"), ON_WHITE.convert("L")),
    "black and white.tiff": (lambda: encoded(LEFT.convert("1"), "TIFF"), LEFT),
    "16 bit.png": (lambda: encoded(DEEP, "PNG"), RAMP),
    "16 bit.tiff": (lambda: encoded(DEEP, "TIFF"), RAMP),
    "16 bit with a transparent tone.png": (lambda: encoded(DEEP, "PNG", transparency=7), RAMP),
    "32 bit.tiff": (lambda: encoded(Image.fromarray(np.asarray(RAMP).astype(np.int32) * 9000), "TIFF"), RAMP),
    "floats.tiff": (lambda: encoded(Image.fromarray(np.asarray(RAMP) / np.float32(999)), "TIFF"), RAMP),
    "palette.png": (lambda: encoded(PHOTO.quantize(255), "PNG"), FEW),
    "transparent palette.png": (lambda: encoded(palette(), "PNG", transparency=255), FEW_ON_WHITE),
    "transparent palette.gif": (lambda: encoded(palette(), "GIF", transparency=255), FEW_ON_WHITE),
    "transparent.png": (lambda: encoded(translucent(), "PNG"), ON_WHITE),
    "transparent.webp": (lambda: encoded(translucent(), "WEBP", lossless=True), ON_WHITE),
    **{f"exif {way}.jpg": (lambda way=way: turned(way), PHOTO) for way in TRANSPOSED},
    "1x1.png": (lambda: encoded(Image.new("RGB", (1, 1), "teal"), "PNG"), Image.new("RGB", (1, 1), "teal")),
    "wide.png": (lambda: encoded(photo(20_000, 3), "PNG"), photo(20_000, 3)),
    "tall.png": (lambda: encoded(photo(1, 20_000), "PNG"), photo(1, 20_000)),
    "30 MB.bmp": (lambda: encoded(photo(3200, 3200), "BMP"), photo(3200, 3200)),
    "30 MB behind the picture.jpg": (lambda: encoded(PHOTO, "JPEG", quality=95) + bytes(30_000_000), PHOTO),
    "empty.png": (lambda: b"", "This file is empty."),
    "text.png": (lambda: b"hello, I am not a picture", NOT_AN_IMAGE),
    "zeros.jpg": (lambda: bytes(4096), NOT_AN_IMAGE),
    "page.html": (lambda: b"<!doctype html><img src=x onerror=alert(1)>", NOT_AN_IMAGE),
    "drawing.svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", NOT_AN_IMAGE),
    "drawing.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", NOT_AN_IMAGE),
    "script.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", NOT_AN_IMAGE),
    "paper.pdf": (lambda: encoded(PHOTO, "PDF"), NOT_AN_IMAGE),
    "icon.ico": (lambda: encoded(PHOTO, "ICO"), NOT_AN_IMAGE),
    "archive.webp": (lambda: b"PK\x03\x04" + bytes(100), NOT_AN_IMAGE),
    "header only.gif": (lambda: b"GIF89a", NOT_AN_IMAGE),
    "truncated.jpg": (lambda: encoded(photo(400, 300), "JPEG")[:4000], DAMAGED),
    "truncated.png": (lambda: encoded(photo(400, 300), "PNG")[:4000], DAMAGED),
    "truncated.webp": (lambda: encoded(photo(400, 300), "WEBP", lossless=True)[:4000], NOT_AN_IMAGE),
    "truncated.bmp": (lambda: encoded(photo(400, 300), "BMP")[:4000], DAMAGED),
    "bomb.png": (lambda: header_bomb(20_000, 20_000), "This image is too large: the limit is 100 megapixels."),
    "small bomb.png": (lambda: header_bomb(13_000, 13_000), "it has 169 megapixels, the limit is 100."),
    "1 bit bomb.png": (lambda: encoded(Image.new("1", (10_001, 10_000)), "PNG"), "megapixels, the limit is 100."),
}


def assert_same_picture(seen: Image.Image, truth: Image.Image) -> None:
    """Equal to the eye: same shape, and nearly the same colours everywhere once both are 24 x 24."""
    assert seen.mode == "RGB" and seen.width * truth.height == pytest.approx(truth.width * seen.height, rel=0.01)
    small = [np.asarray(i.convert("RGB").resize((24, 24), Image.Resampling.BOX), dtype=float) for i in (seen, truth)]
    assert np.abs(small[0] - small[1]).max() < 25 and np.abs(small[0] - small[1]).mean() < 5


def probabilities_of(model, image: Image.Image) -> list[float]:
    return models.run(model, models.preprocess(model, image.convert("RGB")))[0].tolist()


# ---- Checkpoints: name -> how a good one is damaged, and what is said about it


def edit(*keys: str, value) -> Callable[[Path], None]:
    """Sets a field of `config.json`."""

    def change(folder: Path) -> None:
        config = place = json.loads((folder / "config.json").read_text())
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
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
    answer = httpx.post(f"{url}gradio_api/upload", files=dict(files=("huge.bmp", bytes(65 * 2**20))))
    assert answer.status_code == 413
    assert_one_line(answer.text, "64")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"data": 3}', b'{"data": [{}, [], {}]}', b"\xff" * 99])
def test_requests_that_are_none(url, goes_on, body):
    answer = httpx.post(f"{url}gradio_api/call/classify", content=body, headers={"content-type": "application/json"})
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
    known = models.Checkpoints(weights)
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
    page = json.dumps(httpx.get(f"{url}config").json())
    assert "not a readable JSON file" in page and "Traceback" not in page


# ---- Recipes and data: name -> what is wrong, and what training says about it

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
    "batch larger than the data": (dict(batch_size=99), "8 training images are fewer than one batch of 99"),
}


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
    "no class folders": (lambda root: write_data(root, classes=["."]), "has 1 class folder(s)", {}),
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
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        classify.main()
    except SystemExit as end:
        return str(end.code)
    finally:
        signal.signal(signal.SIGTERM, at_sigterm)
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
