"""The app in a real browser: from an uploaded file to the cells on the screen."""

import base64
import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from app.runtime.images import read_image
from app.tabs.attribution import BOTTOM, HEIGHT, STEPS
from tests.helpers.app import MHSA, PLAIN, PREFIXED, photo, recorded
from tests.helpers.browser import needs_browser
from tests.helpers.compare_page import send
from tests.helpers.page import PIXELS, READ, cell, expected_rows, our_faults, points_in_cells, signed_colors
from vca import preprocessing
from vca.attribution import METHODS, head_map
from vca.faithfulness import curves

pytestmark = needs_browser


def upload(page, path, tab: str = "Classify", model: str | None = None) -> None:
    page.get_by_role("tab", name=tab).click()
    if model:
        page.get_by_label("Model", exact=True).click()
        page.get_by_role("option", name=model).click()
    send(page, path)


def explore(page, path, model: str) -> None:
    upload(page, path, "Explore", model)
    page.wait_for_selector(".vx[data-state=complete]")


@pytest.fixture
def other_picture(tmp_path):
    """Another photo than `picture`: a page that has one already does not look at the same one again."""
    photo(160, 200, seed=4).save(path := tmp_path / "other.png")
    return path


def test_upload_is_classified(page, weights, picture):
    upload(page, picture)
    model, probabilities, _ = recorded(weights, PLAIN, picture)
    best = model.label_names[probabilities.argmax()]
    page.wait_for_selector(".vt[data-state=complete]")
    assert page.locator(".vt-best").inner_text() == best
    assert page.locator(".vt-strip button").count() == 9
    assert page.locator(".vca-classes li").all_inner_texts() == model.label_names
    page.locator(".vt-strip button").nth(2).click()
    name = page.locator(".vt-strip button").nth(2).get_attribute("aria-label")
    page.get_by_role("button", name="Explore this head").click()
    page.wait_for_selector(".vx[data-state=complete]")
    assert page.locator(".vx-caption").inner_text().startswith(best)
    block, head = (page.locator(f".vx-{part} [aria-pressed=true]").inner_text() for part in ("blocks", "heads"))
    assert name.startswith(f"Block {block}, head {head}:")
    page.go_back()
    page.wait_for_selector(".vt-best:visible")


def test_a_broken_file_is_met_with_a_sentence_and_the_app_goes_on(page, tmp_path, picture):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    for tab, problem, good in (("Classify", ".vt .vv-problem", ".vt-body"), ("Explore", ".vx .vv-problem", ".vx-body")):
        upload(page, broken, tab)
        page.wait_for_selector(f"{problem}:has-text('This file is not a JPEG, PNG')")
        page.get_by_label("Remove Image").click()
        upload(page, picture, tab)
        page.wait_for_selector(good)


@pytest.mark.parametrize("name", [PLAIN, PREFIXED])
def test_clicks_show_what_numpy_computes(page, weights, picture, name):
    explore(page, picture, name)
    model, _, maps = recorded(weights, name, picture)
    crop = preprocessing.center_crop(model, read_image(picture))
    aspect, random, times = crop.height / crop.width, np.random.default_rng(1), []
    for _ in range(10):
        block, head, mode = random.integers(3), random.integers(4), random.choice(["stage1", "stage2", "effective"])
        layer, (x, y) = maps[block], random.uniform(0.02, 0.98, 2)
        page.locator(".vx-blocks button").nth(block).click()
        page.locator(".vx-heads button").nth(head).click()
        page.locator(f".vx [data-mode={mode}]").click()
        canvas = page.locator(".vx-large canvas")
        box = canvas.bounding_box()
        top = box["height"] - box["width"] * aspect
        canvas.click(position=dict(x=x * box["width"], y=top + y * box["width"] * aspect))
        page.mouse.move(0, 0)

        (rows, cols), (h, w), prefix = layer.grid_size, layer.token_grid, layer.num_prefix_tokens
        r, c = (cell(y, h, rows), cell(x, w, cols)) if mode == "stage1" else (int(y * rows), int(x * cols))
        query = r * w + c if mode == "stage1" else prefix + r * cols + c
        expected = expected_rows(layer, mode, None if head == 0 else head - 1, query)
        shown = page.evaluate(READ)
        assert f"row {r + 1}, column {c + 1}" in shown["words"]
        times.append(shown["ms"])
        shared = max(expected["positive"].max(), expected["negative"].max())
        for stream, values in expected.items():
            limit = np.abs(values).max() if stream == "differential" else shared
            np.testing.assert_allclose(shown["rows"][stream], values, atol=3e-3 * shared, err_msg=f"{mode} {stream}")
            keys_down, keys_across = (h, w) if mode == "stage2" else (rows, cols)
            across = points_in_cells(keys_across, cols)
            points = [(px, py) for py in points_in_cells(keys_down, rows) for px in across]
            values = values[-len(points) :]
            signed = -values if stream == "negative" else values
            painted = page.evaluate(PIXELS.replace("ASPECT", str(aspect)), [stream, points])
            np.testing.assert_allclose(np.array(painted)[:, :3], signed_colors(signed, limit), atol=4)
    print(json.dumps(dict(model=name, redraw_ms=times)))


def test_self_attention_has_one_map(page, weights, picture):
    explore(page, picture, MHSA)
    assert page.locator(".vx [data-mode=stage1]").is_disabled()
    assert page.locator(".vx .vv-panels figure:visible").count() == 1
    _, _, maps = recorded(weights, MHSA, picture)
    shown = page.evaluate(READ)["rows"]["positive"]
    np.testing.assert_allclose(shown, maps[2].effective[0, :, 4 * 8 + 4].mean(0), atol=1e-4)


def test_keys_move_query_block_and_head(page, picture):
    explore(page, picture, PREFIXED)
    page.locator(".vx-large canvas").focus()
    query = page.locator(".vx-query")
    assert query.inner_text() == "patch, row 3, column 3"
    for key, text in (
        ("ArrowRight", "row 3, column 4"),
        ("ArrowUp", "row 2, column 4"),
        ("ArrowLeft", "row 2, column 3"),
    ):
        page.keyboard.press(key)
        assert query.inner_text() == f"patch, {text}"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert query.inner_text() == "class token"
    page.keyboard.press("ArrowRight")
    assert query.inner_text() == "register 1 token"
    page.keyboard.press("ArrowDown")
    assert query.inner_text() == "patch, row 1, column 3"
    page.keyboard.press("[")
    page.keyboard.press(".")
    state = page.evaluate("() => document.querySelector('.vx').explorer.state")
    assert (state["block"], state["head"]) == (1, 0)


def test_a_model_and_a_photo_that_come_at_once_are_looked_at_once(page, picture):
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json) if "component_server" in request.url else 0)
    explore(page, picture, PREFIXED)
    page.wait_for_timeout(1500)  # the later change of the two comes after the first answer
    blocks = [request["data"]["block"] for request in asked if request["fn_name"] == "fetch_maps"]
    assert sorted(blocks) == [0, 1, 2]


def test_forgotten_maps_are_fetched_anew(page, picture):
    page.route("**/component_server/", lambda route: route.fulfill(json=dict(expired=True)))
    upload(page, picture, "Explore")
    page.wait_for_selector(".vx .vv-note:has-text('no longer kept')")
    page.unroute("**/component_server/")
    page.get_by_role("button", name="Run again").click()
    page.wait_for_selector(".vx[data-state=complete]")


def test_a_phone_never_scrolls_sideways(page, picture, other_picture):
    page.set_viewport_size(dict(width=390, height=844))
    upload(page, picture)
    page.wait_for_selector(".vt[data-state=complete]")
    for tab in ("Classify", "Explore", "About"):
        page.get_by_role("tab", name=tab).click()
        if tab == "Explore":
            explore(page, other_picture, PREFIXED)
        page.wait_for_timeout(300)
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390, tab


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_tab_is_accessible(page, picture, other_picture, theme):
    for tab in ("Classify", "Explore", "About"):
        if tab == "Classify":
            upload(page, picture)
            page.wait_for_selector(".vt[data-state=complete]")
        elif tab == "Explore":
            explore(page, other_picture, PREFIXED)
        else:
            page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)  # tabs and buttons fade in
        assert our_faults(page) == [], tab


def test_the_keyboard_reaches_the_explorer(page, picture):
    explore(page, picture, PREFIXED)
    page.get_by_role("tab", name="Explore").focus()
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.closest('.vx') && document.activeElement.className"))
        if page.evaluate("() => document.activeElement === document.querySelector('.vx-large canvas')"):
            break
    else:
        raise AssertionError(f"Tab never reaches the map: {reached}")
    before = page.locator(".vx-query").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator(".vx-query").inner_text() != before


def drawn_attribution(page) -> np.ndarray:
    """The cells of the attribution on the page: their sign times their opacity, from -1 to 1."""
    data = page.locator(".vca-attribution-figure img").get_attribute("src")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1])))).astype(float)
    return np.where(pixels[..., 0] > 128, 1, -1) * pixels[..., 3] / 230


def choose(page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def test_attribution_of_a_chosen_class_and_its_faithfulness(page, weights, picture):
    upload(page, picture, model=PREFIXED)
    model, probabilities, _ = recorded(weights, PREFIXED, picture)
    x = preprocessing.preprocess(model, read_image(picture))
    best, other = (int(i) for i in np.argsort(-probabilities)[[0, 2]])
    caption = page.locator(".vca-attribution-figure figcaption")
    page.wait_for_selector(f".vca-attribution-figure figcaption:has-text('for {model.label_names[best]}')")
    for method, target in (("Occlusion", best), ("Occlusion", other), ("Block 2, head 3", other)):
        of_class = method == "Occlusion"
        if not caption.inner_text().startswith(method):
            choose(page, "Method, or the map of one head", method)
            caption.locator(f"text={method}").wait_for()
        if of_class and f"{method} for {model.label_names[target]}" not in caption.inner_text():
            choose(page, "Class", model.label_names[target])
        words = f"for {model.label_names[target]}" if of_class else "attention, the same whichever class is asked for"
        caption.locator(f"text={words}").wait_for()
        function = METHODS.get(method.lower()) or partial(head_map, block=1, head=2)
        values = function(model, x, torch.tensor([target]))[0].numpy()
        np.testing.assert_allclose(drawn_attribution(page), values / np.abs(values).max(), atol=0.02)
        assert f"{np.abs(values).max():+.2g}" in caption.inner_text()

    page.set_viewport_size(dict(width=390, height=844))
    page.get_by_role("button", name="Measure faithfulness").click()
    page.wait_for_selector(".vca-plots")
    found = curves(model, x, torch.tensor([other]), dict(a=torch.from_numpy(values)[None]), STEPS)["a"]
    assert len(page.locator(".vca-verdict").inner_text()) > 40
    cells = page.locator(".vca-faithfulness tbody tr").first.locator("td").all_inner_texts()
    assert cells == [f"{found.deletion_area.item():.3f}", f"{found.insertion_area.item():.3f}"]
    for kind in ("deletion", "insertion"):
        path = page.locator(f".vca-plots [data-curve={kind}] .vca-line-method").get_attribute("d")
        points = np.array([point.split() for point in path[1:].split("L")], dtype=float)
        heights = 1 - (points[:, 1] - 8) / (HEIGHT - BOTTOM - 8)
        np.testing.assert_allclose(heights, getattr(found, kind)[0], atol=1e-3)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390

    page.get_by_label("Method, or the map of one head").click()
    page.get_by_role("option", name="Gradient x input", exact=True).click()
    page.wait_for_selector(".vca-plots", state="detached")  # what was measured was another map
