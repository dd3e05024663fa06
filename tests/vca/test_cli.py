"""The command line: what it prints and writes, its exit codes, and the page that it makes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vca
from tests.helpers.browser import browser, needs_browser, open_page
from tests.helpers.checkpoints import tiny
from vca import cli, preprocessing
from vca.images import read_image

LABELS = ["left", "right", "up"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier, a generator and a photo."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=3, embed_dim=24, num_heads=2, depth=2, reg_tokens=1)
    vca.save(model, folder / "classifier", label_names=LABELS)
    vca.save(tiny("vca_sit_xs_2"), folder / "generator", label_names=LABELS)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(list(words))
        return code, *capsys.readouterr()

    return run


def probabilities(place) -> torch.Tensor:
    model = vca.load(place / "classifier")
    with torch.no_grad():
        return model(preprocessing.preprocess(model, read_image(place / "photo.png")))[0].softmax(0)


def test_classify_prints_the_likeliest_classes(run, place):
    code, out, err = run("classify", "photo.png", "photo.png", "--model", "classifier", "--top", "2", "--json")
    assert (code, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    want = probabilities(place)
    assert first == second and first["photo"] == "photo.png"
    assert list(first["answers"]) == [LABELS[i] for i in want.argsort(descending=True)[:2]]
    assert list(first["answers"].values()) == pytest.approx(want.sort(descending=True).values[:2].tolist(), abs=1e-5)
    code, out, _ = run("classify", "photo.png", "--model", "classifier")
    assert code == 0 and len(out.splitlines()) == 4 and out.splitlines()[1].endswith(f"%  {LABELS[want.argmax()]}")


def test_generate_writes_one_picture_or_a_folder(run, place):
    asked = ("up", "0", "--count", "3", "--steps", "2", "--model", "generator", "--guidance", "1", "--seed", "4")
    code, out, err = run("generate", *asked, "--out", "all.png")
    assert (code, out, err) == (0, "all.png: 6 pictures\n", "")
    code, out, _ = run("generate", *asked, "--out", "folder")
    assert (code, out) == (0, "folder: 6 files\n")
    images = vca.load(place / "generator").sample([2, 2, 2, 0, 0, 0], steps=2, seed=4)
    files = sorted((place / "folder").iterdir())
    assert [file.name for file in files] == [f"{i}.png" for i in range(6)]
    sheet = np.asarray(Image.open(place / "all.png"))
    assert sheet.shape == (16, 24, 3)
    for i, (file, picture) in enumerate(zip(files, vca.to_pil(images), strict=True)):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(picture))
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(sheet[8 * row : 8 * row + 8, 8 * column : 8 * column + 8], np.asarray(picture))


def test_a_terminal_is_told_how_far_it_is(run, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    show = cli.progress()
    for step in range(3):
        show(step, 2, torch.zeros(1))


def test_list_names_models_and_checkpoints(run, place):
    (place / "weights").mkdir(exist_ok=True)
    if not (place / "weights" / "mine").exists():
        (place / "weights" / "mine").symlink_to(place / "classifier")
    code, out, _ = run("list")
    assert code == 0 and set(vca.list_models()) <= set(out.split())
    assert "weights/mine: vca_vit_pico_patch4_32, 3 classes" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "classify photo.png",
            "there is no weights/vca_vit_small_patch14_everyday here: name a checkpoint with --model",
        ),
        ("classify none.png --model classifier", "none.png: No such file or directory"),
        ("classify classifier/config.json --model classifier", "config.json: not an image that can be read"),
        ("classify photo.png --model nowhere", "no such checkpoint folder"),
        ("classify photo.png --model generator", "generator is for generation; vca generate use"),
        ("classify photo.png --model classifier --top 0", "--top must be at least 1"),
        ("generate up --model classifier", "classifier is for classification; vca classify and"),
        ("generate lft --model generator", "label 'lft' is none of the 3 classes; did you mean left"),
        ("generate up --model generator --sampler none", "sampler='none' is unknown"),
        ("generate up --model generator --count 0", "--count must be at least 1"),
        ("explain photo.png --model classifier --out none/maps.html", "none/"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(run, words, said):
    code, out, err = run(*words.split())
    assert code == 1 and not out and said in err and err.startswith("error: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize("words", ["", "none", "explain", "classify"])
def test_a_command_that_is_none_has_exit_code_2(run, words):
    with pytest.raises(SystemExit) as end:
        run(*words.split())
    assert end.value.code == 2


@pytest.mark.parametrize("words", ["--help", "explain --help", "generate --help"])
def test_help(run, words):
    with pytest.raises(SystemExit) as end:
        run(*words.split())
    assert end.value.code == 0


@needs_browser
def test_the_page_of_explain_opens_offline_and_shows_the_maps(run, place):
    code, out, _ = run("explain", "photo.png", "--model", "classifier", "--out", "maps.html")
    assert code == 0 and out.startswith("maps.html: ") and "2 blocks" in out
    model = vca.load(place / "classifier")
    with torch.no_grad(), vca.record(model) as maps:
        model(preprocessing.preprocess(model, read_image(place / "photo.png")))
    address = (place / "maps.html").as_uri()
    size = dict(width=1000, height=900)
    with browser() as running, open_page(running, address, offline=True, viewport=size) as page:
        page.goto(address)
        page.wait_for_selector(".vx[data-state=complete]")
        page.locator(".vx [data-mode=stage1]").click()
        page.locator(".vx-blocks button").first.click()
        page.locator(".vx-heads button").nth(2).click()
        page.screenshot(path=place / "page.png")
        rows = page.evaluate("() => Object.fromEntries(Object.entries(document.querySelector('.vx').explorer.rows)"
                             ".map(([name, row]) => [name, [...row]]))")  # fmt: skip
        words = page.locator(".vx-caption").inner_text()
    best = int(probabilities(place).argmax())
    assert words.startswith(LABELS[best])
    stored = maps[0].stage1.positive[0, 1].numpy()
    np.testing.assert_allclose(rows["positive"], stored[_nearest(stored, rows["positive"])], atol=1e-3)


def _nearest(rows: np.ndarray, row: list[float]) -> int:
    return int(np.abs(rows - np.asarray(row)).sum(1).argmin())
