"""The explorer in a real browser: pyramids, lambda, scales, links and what is saved. One app and one page for all."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import vca
from app import draw, export, models
from app.images import read_image
from app.inputs import example_files
from app.ui import WEIGHTS
from tests.browser import PATIENCE, needs_browser, note_faults
from tests.test_app import PREFIXED, SMALL_PYRAMID, save_checkpoints
from tests.test_browser import PIXELS, READ, our_faults, points_in_cells, signed_colours

pytestmark = needs_browser
SHIPPED = "vca_vit_pico_patch4_32_cifar10"
LABELS = ["left", "right", "up", "down"]


def save_more_checkpoints(folder: Path) -> None:
    """The shipped checkpoint, the same with other parameters and without training, and three small pyramids."""
    shutil.copytree(WEIGHTS / SHIPPED, folder / SHIPPED)
    torch.manual_seed(3)
    shipped = vca.load(WEIGHTS / SHIPPED)
    vca.save(
        vca.create_model("vca_vit_pico_patch4_32", num_classes=10),
        folder / "untrained",
        label_names=shipped.label_names,
    )
    with torch.no_grad():
        for parameter in shipped.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    vca.save(shipped, folder / "shaken", label_names=shipped.label_names)
    swin = dict(img_size=36, window_size=3, embed_dim=12, depths=(2, 1), num_heads=(2, 4))
    pyramids = {
        "swin": ("swin_tiny_patch4_window7_224", dict(num_classes=4, **swin)),
        "pvt": ("pvt_tiny", dict(SMALL_PYRAMID, img_size=64, num_heads=(1, 2, 2, 2))),
        "cswin": ("cswin_tiny", dict(SMALL_PYRAMID, num_heads=(2, 2, 2, 4), split_sizes=(2, 1, 1, None))),
    }
    for name, (architecture, options) in pyramids.items():
        model = vca.create_model(architecture, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        vca.save(model, folder / name, label_names=LABELS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoints(folder)
    save_more_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def cat():
    """The first example's picture."""
    return Path(example_files()[0])


def watched(page, faults: list[str], *allowed: str):
    """Notes what a page must not do: log an error, or ask anything of another machine."""
    page.set_default_timeout(PATIENCE)
    note_faults(page, allowed, faults)
    return page


@pytest.fixture(scope="module")
def open_page(running, url):
    faults = []
    page = watched(running.new_page(viewport=dict(width=1400, height=1000), accept_downloads=True), faults, url)
    page.goto(url)
    page.get_by_role("tab", name="Explore").click()
    page.get_by_role("tabpanel").locator("visible=true").locator(".gallery-item").first.click()
    page.wait_for_selector(".vx[data-state=complete]")
    yield page, faults
    page.close()


@pytest.fixture
def page(open_page):
    page, faults = open_page
    yield page
    assert not faults


def choose(page, model: str) -> None:
    """Explores the picture on the page with another model."""
    if f"model={model}&" in page.url:
        return
    page.get_by_role("tabpanel").locator("visible=true").get_by_label("Model").click()
    page.get_by_role("option", name=model, exact=True).click()
    page.wait_for_function(f"() => location.hash.includes('model={model}&')")
    page.wait_for_selector(".vx[data-state=complete]")


def show(page, block: int, head: int | None = None, mode: str = "effective") -> None:
    """`head` None is the mean of all heads."""
    page.locator(f".vx [data-mode={mode}]").click()
    page.locator(".vx-blocks button").nth(block).click()
    page.locator(".vx-heads button").nth(0 if head is None else head + 1).click()


def point_at(page, x: float, y: float) -> None:
    canvas = page.locator(".vx-large canvas")
    box = canvas.bounding_box()
    canvas.click(position=dict(x=x * box["width"], y=box["height"] - (1 - y) * box["width"]))
    page.mouse.move(0, 0)


def rows_shown(page) -> dict[str, np.ndarray]:
    rows = page.evaluate(READ)["rows"]
    return {name: np.array([np.nan if value is None else value for value in row]) for name, row in rows.items()}


def recorded(weights, name: str, picture: Path):
    model = vca.load(weights / name)
    return models.record(model, models.preprocess(model, read_image(picture)))[1]


def save(page, form: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.locator(f".vx [data-save={form}]").click()
    download.value.save_as(path := folder / download.value.suggested_filename)
    return path


# ---- Pyramids


@pytest.mark.parametrize("name", ["swin", "pvt", "cswin"])
def test_each_block_of_a_pyramid_is_drawn_on_its_own_grid(page, weights, cat, name):
    choose(page, name)
    layers = recorded(weights, name, cat)
    assert page.locator(".vx-blocks button").count() == len(layers)
    padded = 0
    for block, layer in enumerate(layers):
        head = layer.stage1.positive.shape[2 if layer.window_size else 1] - 1
        show(page, block, head)
        point_at(page, 0.62, 0.3)
        (rows, cols), shown = layer.grid_size, rows_shown(page)["positive"]
        patch = int(0.3 * rows) * cols + int(0.62 * cols)
        assert page.locator(".vx-query").inner_text() == f"patch, row {patch // cols + 1}, column {patch % cols + 1}"
        if layer.window_size is None:
            expected = layer.stage1.positive[0, head, patch].numpy()
        else:
            window, slot = (layer.window_patches == patch).nonzero()[0].tolist()
            patches = layer.window_patches[window]
            expected = np.full(rows * cols, np.nan)
            expected[patches[patches >= 0]] = layer.stage1.positive[0, window, head, slot, patches >= 0]
            padded += bool((patches < 0).any())
        np.testing.assert_allclose(shown, expected, atol=1e-3)
        said = page.locator(".vx-sum").first.inner_text()
        assert said.startswith(f"row sum {np.nansum(shown):.3f}")
        assert ("the rest on padding" in said) == (np.nansum(shown) < 0.999)
        keys = layer.key_grid or layer.grid_size
        points = [(x, y) for y in points_in_cells(keys[0], rows) for x in points_in_cells(keys[1], cols)]
        cells = np.arange(len(points)) != (0 if keys != layer.grid_size else patch)
        painted = np.array(page.evaluate(PIXELS.replace("ASPECT", "1"), ["positive", points]))
        solid = signed_colours(np.nan_to_num(expected), np.nanmax(expected))
        cells &= ~np.isnan(expected)
        np.testing.assert_allclose(painted[cells, :3], solid[cells], atol=4)
        assert (painted[np.isnan(expected), 3] == 0).all()
    assert padded == (1 if name == "swin" else 0)


def test_window_borders_are_drawn(page):
    choose(page, "swin")
    point = (3 / 9, 1.5 / 9)  # between the first two windows of 3 x 3 patches, and inside the second shifted one
    darkness = []
    for block in (0, 1):
        show(page, block)
        point_at(page, 0.9, 0.9)
        pixels = np.array(page.evaluate(PIXELS.replace("ASPECT", "1"), ["positive", [point]]))
        darkness.append(pixels[0, 3])
    assert darkness[0] > 100 and darkness[1] == 0


# ---- Lambda


def test_lambda_chart(page, weights, cat):
    choose(page, SHIPPED)
    layers = recorded(weights, SHIPPED, cat)
    bars = page.locator(".vx-bars button")
    names = bars.evaluate_all("(buttons) => buttons.map((button) => button.getAttribute('aria-label'))")
    values = [(float(layer.lambda1), float(layer.lambda2)) for layer in layers]
    assert names == [
        f"Block {i + 1}: λ₁ = {one:.3f}, λ₂ = {two:.3f}".replace("-", "−") for i, (one, two) in enumerate(values)
    ]
    negative = [(i, s) for i, pair in enumerate(values) for s, value in enumerate(pair) if value < 0]
    assert negative  # or the marks would go untested
    marked = page.locator(".vx-bars i.vx-negative")
    assert marked.count() == len(negative)
    heights = [bar.bounding_box()["height"] for bar in page.locator(".vx-bars button:first-child i").all()]
    np.testing.assert_allclose(heights[1] / heights[0], abs(values[0][1] / values[0][0]), rtol=0.05)
    bars.nth(2).click()
    assert page.locator(".vx-blocks [aria-pressed=true]").inner_text() == "3"
    assert page.locator(".vx-lambdas").inner_text().lower() == names[2].lower()


def test_what_if_redraws_the_differential_alone(page, weights, cat):
    choose(page, SHIPPED)
    show(page, 3, 1, "effective")
    assert page.locator(".vx-what-if input").is_disabled()
    show(page, 3, 1, "stage1")
    point_at(page, 0.4, 0.4)
    before, answer = rows_shown(page), page.locator(".vx-caption").inner_text()
    page.locator(".vx-what-if input").fill("-0.5")
    shown = rows_shown(page)
    stage = recorded(weights, SHIPPED, cat)[3].stage1
    query = 1 * 4 + 1
    expected = stage.positive[0, 1, query] + 0.5 * stage.negative[0, 1, query]
    np.testing.assert_allclose(shown["differential"], expected, atol=1e-3)
    np.testing.assert_array_equal(shown["positive"], before["positive"])
    assert page.locator("figure[data-stream=differential] .vx-sum").inner_text() == "row sum 1.500 = 1 − λ"
    assert "redraws the map D₁ only" in page.locator(".vx-what-if p").inner_text()
    assert page.locator(".vx-caption").inner_text() == answer
    page.locator(".vx-what-if button").click()
    np.testing.assert_array_equal(rows_shown(page)["differential"], before["differential"])
    page.locator(".vx-what-if input").fill("0.1")
    page.locator(".vx-blocks button").nth(2).click()
    assert page.locator(".vx-what-if button").is_disabled()  # another block is shown with its own lambda


# ---- Scales


def test_scale_of_a_map_of_a_block_and_of_all(page, weights, cat):
    choose(page, SHIPPED)
    show(page, 2, 0, "stage2")
    point_at(page, 0.1, 0.1)
    heads = [layer.stage2.differential[0, :, 0].abs().amax(-1) for layer in recorded(weights, SHIPPED, cat)]
    expected = dict(map=heads[2][0], block=heads[2].max(), all=torch.stack(heads).max())
    assert len({float(value) for value in expected.values()}) == 3
    for scale, limit in expected.items():
        page.locator(f".vx [data-scale={scale}]").click()
        mark = page.locator("figure[data-stream=differential] .vv-marks span").last.inner_text()
        assert float(mark) == pytest.approx(float(limit), rel=6e-3), scale
        row = rows_shown(page)["differential"]
        points = [(x, y) for y in points_in_cells(4, 8) for x in points_in_cells(4, 8)]
        painted = np.array(page.evaluate(PIXELS.replace("ASPECT", "1"), ["differential", points]))
        cells = np.arange(16) != 0  # the first holds the box of the query
        np.testing.assert_allclose(painted[cells, :3], signed_colours(row, float(mark))[cells], atol=5)
    page.locator(".vx [data-scale=map]").click()


# ---- What is saved


@pytest.mark.parametrize(
    "name, block, head, mode",
    [(SHIPPED, 4, None, "effective"), (SHIPPED, 1, 2, "stage2"), (PREFIXED, 2, 1, "effective"), ("swin", 1, 0, None)],
)
def test_saved_numbers_drawn_again_are_the_picture(page, tmp_path, name, block, head, mode):
    choose(page, name)
    show(page, block, head, mode or "effective")
    point_at(page, 0.55, 0.7) if name != PREFIXED else page.locator(".vx-large canvas").click(position=dict(x=8, y=8))
    with np.load(save(page, "npz", tmp_path)) as file:
        settings, arrays = json.loads(str(file["settings"])), dict(file)
    assert settings["block"] == block and settings["head"] == ("mean" if head is None else head)
    shown, info = rows_shown(page), settings
    keys = info["tokens"] if settings["map"] == "stage2" else info["grid"]
    aspect = page.evaluate("() => { const c = document.querySelector('.vx-strip canvas'); return c.height / c.width; }")
    for stream in ("positive", "negative", "differential"):
        if stream not in arrays:
            assert name == "swin" and stream != "positive"
            continue
        np.testing.assert_allclose(arrays[stream], shown[stream], atol=2e-6)
        row = arrays[stream][-keys[0] * keys[1] :]
        across = points_in_cells(keys[1], info["grid"][1])
        points = [(x, y) for y in points_in_cells(keys[0], info["grid"][0]) for x in across]
        painted = np.array(page.evaluate(PIXELS.replace("ASPECT", str(aspect)), [stream, points]))
        colours = signed_colours(
            np.nan_to_num(-row if stream == "negative" else row), settings["view"]["limits"][stream]
        )
        away = np.ones(len(row), bool)
        if settings["map"] == "effective" and settings["query"] >= info["prefix"]:
            away[settings["query"] - info["prefix"]] = False  # the box of the query
        away &= ~np.isnan(row)
        np.testing.assert_allclose(painted[away, :3], colours[away], atol=4)


def test_saved_numbers_of_another_lambda_say_so(page, tmp_path):
    choose(page, SHIPPED)
    show(page, 1, 0, "stage1")
    page.locator(".vx-what-if input").fill("0.25")
    with np.load(save(page, "npz", tmp_path)) as file:
        assert json.loads(str(file["settings"]))["what_if_lambda"] == 0.25
        np.testing.assert_allclose(file["differential"], file["positive"] - 0.25 * file["negative"], atol=1e-6)
        assert file["block_positive1"].shape == (4, 16, 64)


def test_saved_drawing_opens_and_shows_the_map(page, running, tmp_path):
    choose(page, SHIPPED)
    show(page, 5, None, "effective")
    drawing = save(page, "svg", tmp_path)
    root = ElementTree.parse(drawing).getroot()
    words = " ".join("".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text"))
    assert SHIPPED in words and "block 6" in words and "Pushes away" in words and "row sum" in words
    bars = [element for element in root.iter("{http://www.w3.org/2000/svg}linearGradient")]
    assert len(bars) == 3
    faults = []
    viewer = watched(running.new_page(viewport=dict(width=1100, height=520)), faults, drawing.as_uri())
    viewer.goto(drawing.as_uri())
    viewer.screenshot(path=tmp_path / "opened.png")
    viewer.close()
    assert not faults
    picture = Image.open(save(page, "png", tmp_path))
    width, height = int(root.get("width")), int(root.get("height"))
    assert picture.size == (2 * width, 2 * height)
    row = rows_shown(page)["positive"]
    centres = [(348 + 200 * (c + 0.5) / 8, 98 + 200 * (r + 0.5) / 8) for r in range(8) for c in range(8)]
    expected = signed_colours(row, row.max())
    for image, scale in ((picture.convert("RGB"), 2), (Image.open(tmp_path / "opened.png").convert("RGB"), 1)):
        painted = [image.getpixel((int(scale * x), int(scale * y))) for x, y in centres]
        np.testing.assert_allclose(painted, expected, atol=5)


def test_saved_page_works_with_the_network_off(page, running, tmp_path):
    choose(page, PREFIXED)
    show(page, 1, 2, "stage2")
    saved = save(page, "html", tmp_path)
    faults = []
    context = running.new_context(offline=True, viewport=dict(width=390, height=844))
    copy = watched(context.new_page(), faults, saved.as_uri())
    copy.goto(saved.as_uri())
    copy.wait_for_selector(".vx[data-state=complete]")
    np.testing.assert_allclose(rows_shown(copy)["differential"], rows_shown(page)["differential"], atol=1e-7)
    assert copy.evaluate("() => document.documentElement.scrollWidth") == 390
    copy.locator(".vx-large canvas").focus()
    for other in (page, copy):
        other.locator(".vx-large canvas").focus()
        other.keyboard.press("ArrowDown")
        other.keyboard.press("]")
    assert copy.locator(".vx-query").inner_text() == page.locator(".vx-query").inner_text()
    np.testing.assert_allclose(rows_shown(copy)["positive"], rows_shown(page)["positive"], atol=1e-7)
    assert copy.locator("[data-save=html]").is_hidden() and copy.locator("[data-save=svg]").is_visible()
    assert our_faults(copy) == []
    context.close()
    assert not faults


# ---- The link of a view


def test_a_link_brings_the_view_back(page, running, url):
    choose(page, PREFIXED)
    show(page, 1, 2, "stage2")
    page.locator(".vx [data-scale=block]").click()
    page.locator("figure[data-stream=negative] button").click()
    page.locator(".vx-large canvas").click(position=dict(x=120, y=8))  # the square of the register
    assert page.locator(".vx-query").inner_text() == "register 1 token"
    faults = []
    other = watched(running.new_page(viewport=dict(width=1000, height=900)), faults, url)
    other.goto(page.url)
    other.wait_for_selector(".vx[data-state=complete]")
    other.wait_for_function(f"() => location.hash.includes('model={PREFIXED}&')")
    for selector in (".vx-query", ".vx-caption", ".vx-blocks [aria-pressed=true]", ".vx-heads [aria-pressed=true]"):
        assert other.locator(selector).inner_text() == page.locator(selector).inner_text()
    for pressed in ("data-mode=stage2", "data-scale=block"):
        assert other.locator(f".vx [{pressed}]").get_attribute("aria-pressed") == "true"
    assert other.locator("figure[data-stream=negative] button").get_attribute("aria-pressed") == "true"
    np.testing.assert_allclose(rows_shown(other)["negative"], rows_shown(page)["negative"], atol=1e-7)
    assert other.url == page.url
    other.evaluate("() => { location.hash = location.hash.replace('block=2', 'block=1'); }")  # as typed by hand
    other.wait_for_function("() => document.querySelector('.vx').explorer.state.block === 0")
    other.close()
    assert not faults
    page.locator(".vx [data-scale=map]").click()
    page.locator("figure[data-stream=differential] button").click()


@pytest.mark.parametrize(
    "link, sentence", [("model=nothing", "not here"), ("model=swin&block=999&head=x&query=9,9&map=<b>", "drop it")]
)
def test_a_broken_link_breaks_nothing(running, url, link, sentence):
    faults = []
    page = watched(running.new_page(), faults, url)
    page.goto(f"{url}#explore?{link}")
    page.wait_for_selector(f"text={sentence}")
    page.get_by_role("tabpanel").locator("visible=true").locator(".gallery-item").first.click()
    page.wait_for_selector(".vx[data-state=complete]")
    page.close()
    assert not faults


# ---- Touch, and colours for all eyes


def test_touch_on_a_phone(running, url):
    faults = []
    context = running.new_context(has_touch=True, is_mobile=True, viewport=dict(width=390, height=844))
    page = watched(context.new_page(), faults, url)
    page.goto(f"{url}#explore?model={SHIPPED}&image=cat")
    page.wait_for_selector(".vx[data-state=complete]")
    canvas = page.locator(".vx-large canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.touchscreen.tap(box["x"] + 0.95 * box["width"], box["y"] + 0.05 * box["height"])
    assert page.locator(".vx-query").inner_text() == "patch, row 1, column 8"
    page.locator(".vx-bars button").first.tap()
    assert page.locator(".vx-blocks [aria-pressed=true]").inner_text() == "1"
    for name in ("swin", "cswin"):
        page.evaluate(f"() => {{ location.hash = '#explore?model={name}&image=cat'; }}")
        page.wait_for_function(f"() => location.hash.includes('model={name}&image=cat&map')")
        page.wait_for_selector(".vx[data-state=complete]")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    context.close()
    assert not faults


def seen_by(colour: np.ndarray, weakness: np.ndarray) -> np.ndarray:
    """A colour (3,) from 0 to 255 as it looks with a colour weakness (Machado et al. 2009), in CIE Lab."""
    linear = np.where(colour / 255 <= 0.04045, colour / 255 / 12.92, ((colour / 255 + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ (weakness @ linear).clip(0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(
    "weakness",
    [
        np.eye(3),
        np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
        np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
    ],
    ids=["none", "protanopia", "deuteranopia", "tritanopia"],
)
def test_palettes_work_for_the_colour_blind(weakness):
    for theme in ("light", "dark"):
        ramps = {
            side: np.array([seen_by(draw.rgb(colour), weakness) for colour in draw.PALETTE[theme][side]])
            for side in ("positive", "negative")
        }
        for ramp in ramps.values():
            steps = np.diff(ramp[:, 0])
            assert (np.abs(steps) > 5).all() and len(set(np.sign(steps))) == 1  # more is always darker, or lighter
        apart = np.linalg.norm(ramps["positive"][1:4] - ramps["negative"][1:4], axis=1)
        assert (apart > 15).all(), (theme, apart)
    veil = [seen_by(draw.rgb(draw.PALETTE["overlay"][side]), weakness) for side in ("positive", "negative")]
    assert np.linalg.norm(veil[0] - veil[1]) > 40


# ---- The maps are the model's, not the picture's


def test_what_is_drawn_follows_the_parameters(page, weights, cat):
    shown, entropy = {}, {}
    for name in (SHIPPED, "shaken", "untrained"):
        choose(page, name)
        show(page, 5, 0, "stage1")
        point_at(page, 0.4, 0.4)
        shown[name] = rows_shown(page)
        layer = recorded(weights, name, cat)[5]
        np.testing.assert_allclose(shown[name]["positive"], layer.stage1.positive[0, 0, 5], atol=1e-3)
        rows = np.stack([layer.stage1.positive[0].numpy(), layer.stage1.negative[0].numpy()])
        entropy[name] = -(rows * np.log(rows + 1e-12)).sum(-1).mean() / np.log(rows.shape[-1])
    for name in ("shaken", "untrained"):
        correlation = np.corrcoef(shown[SHIPPED]["differential"], shown[name]["differential"])[0, 1]
        assert correlation < 0.9, name
    assert entropy["untrained"] > 0.99 and entropy[SHIPPED] < 0.95, entropy  # 1 is a map without any preference


# ---- The numbers that are saved, without a browser


def test_rows_are_the_record(weights, cat):
    for name in (SHIPPED, PREFIXED):
        layer = recorded(weights, name, cat)[2]
        packed = models.pack(layer)
        head = export.rows(packed, "effective", 1, 7)["differential"]
        np.testing.assert_allclose(head, layer.effective[0, 1, 7], atol=3e-3 * np.abs(head).max())
        mean = export.rows(packed, "stage1", -1, 3)["differential"]
        np.testing.assert_allclose(mean, layer.stage1.differential[0, :, 3].mean(0), atol=1e-3)


@pytest.mark.parametrize("place", [("stage3", 0, 0), ("effective", 9, 0), ("effective", 0, -1), ("stage1", 0, 999)])
def test_rows_refuse_what_is_not_there(weights, cat, place):
    with pytest.raises(LookupError):
        export.rows(models.pack(recorded(weights, SHIPPED, cat)[0]), *place)
