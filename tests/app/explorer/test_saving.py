"""Saved files, links, and touch in the Explore tab."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.helpers.app import PREFIXED
from tests.helpers.browser import needs_browser, open_page
from tests.helpers.explorer import SHIPPED, choose, point_at, rows_shown, save, show
from tests.helpers.page import PIXELS, our_faults, points_in_cells, signed_colors

pytestmark = needs_browser


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
        colors = signed_colors(np.nan_to_num(-row if stream == "negative" else row), settings["view"]["limits"][stream])
        away = np.ones(len(row), bool)
        if settings["map"] == "effective" and settings["query"] >= info["prefix"]:
            away[settings["query"] - info["prefix"]] = False  # the box of the query
        away &= ~np.isnan(row)
        np.testing.assert_allclose(painted[away, :3], colors[away], atol=4)


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
    assert "VCA ViT-Pico/4 · CIFAR-10" in words and "block 6" in words and "Pushes away" in words and "row sum" in words
    bars = [element for element in root.iter("{http://www.w3.org/2000/svg}linearGradient")]
    assert len(bars) == 3
    with open_page(running, drawing.as_uri(), viewport=dict(width=1100, height=520)) as viewer:
        viewer.goto(drawing.as_uri())
        viewer.screenshot(path=tmp_path / "opened.png")
    picture = Image.open(save(page, "png", tmp_path))
    width, height = int(root.get("width")), int(root.get("height"))
    assert picture.size == (2 * width, 2 * height)
    row = rows_shown(page)["positive"]
    centers = [(348 + 200 * (c + 0.5) / 8, 98 + 200 * (r + 0.5) / 8) for r in range(8) for c in range(8)]
    expected = signed_colors(row, row.max())
    for image, scale in ((picture.convert("RGB"), 2), (Image.open(tmp_path / "opened.png").convert("RGB"), 1)):
        painted = [image.getpixel((int(scale * x), int(scale * y))) for x, y in centers]
        np.testing.assert_allclose(painted, expected, atol=5)


def test_saved_page_works_with_the_network_off(page, running, tmp_path):
    choose(page, PREFIXED)
    show(page, 1, 2, "stage2")
    saved = save(page, "html", tmp_path)
    with open_page(running, saved.as_uri(), offline=True, viewport=dict(width=390, height=844)) as copy:
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


def test_a_link_brings_the_view_back(page, running, url):
    choose(page, PREFIXED)
    show(page, 1, 2, "stage2")
    page.locator(".vx [data-scale=block]").click()
    page.locator("figure[data-stream=negative] button").click()
    page.locator(".vx-large canvas").click(position=dict(x=120, y=8))  # the square of the register
    assert page.locator(".vx-query").inner_text() == "register 1 token"
    with open_page(running, url, viewport=dict(width=1000, height=900)) as other:
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
    page.locator(".vx [data-scale=map]").click()
    page.locator("figure[data-stream=differential] button").click()


@pytest.mark.parametrize(
    "link, sentence",
    [("model=nothing", "not here"), ("model=swin&image=nothing&block=999&head=x&query=9,9&map=<b>", "Effective")],
)
def test_a_broken_link_breaks_nothing(running, url, link, sentence):
    with open_page(running, url) as page:
        page.goto(f"{url}#explore?{link}")
        page.wait_for_selector(f"text={sentence} >> visible=true")
        page.locator(".ve-mine button").first.click()
        page.wait_for_selector(".vx[data-state=complete]")


def test_touch_on_a_phone(running, url):
    phone = dict(width=390, height=844)
    with open_page(running, url, has_touch=True, is_mobile=True, viewport=phone) as page:
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
