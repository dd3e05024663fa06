"""The Compare tab, and "Load another model" in every tab, in a real browser."""

import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from app.runtime import cost, loading, records
from app.runtime.images import read_image
from tests.helpers.app import MHSA, PLAIN, PREFIXED, photo, recorded, save_timm
from tests.helpers.browser import needs_browser
from tests.helpers.compare_page import READ, facts_of, load_another, pair, panel_of, send
from tests.helpers.page import cell, expected_rows, our_faults, points_in_cells, signed_colors
from vca import preprocessing

PIXELS = """([side, stream, points, aspect]) => {
    const canvas = document.querySelector(`.vc-side[data-side="${side}"] figure[data-stream=${stream}] canvas`);
    const context = canvas.getContext("2d");
    return points.map(([x, y]) => [...context.getImageData(
        Math.floor(x * canvas.width), Math.floor(canvas.height - (1 - y) * canvas.width * aspect), 1, 1).data]);
}"""


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "vit"
    save_timm(folder, "vit")
    return folder


def canvas_point(page, side: int, x: float, y: float, aspect: float) -> tuple:
    canvas = page.locator(".vc-large canvas").nth(side)
    box = canvas.bounding_box()
    top = box["height"] - box["width"] * aspect
    return canvas, dict(x=x * box["width"], y=top + y * box["width"] * aspect)


# ---- Compare


@needs_browser
def test_one_query_and_one_scale_for_two_models(page, weights, picture):
    """The models see different parts of the photo on different grids; a click in either is the same place in both."""
    names = (PLAIN, PREFIXED)
    pair(page, picture, *names)
    image = read_image(picture)
    known = [recorded(weights, name, picture) for name in names]
    boxes = [np.array(preprocessing.crop_box(model, image)) for model, _, _ in known]
    crops = [preprocessing.center_crop(model, image) for model, _, _ in known]
    for side, mode, block, head in (
        (0, "effective", 2, 0),
        (1, "effective", 0, 2),
        (1, "stage2", 1, 1),
        (0, "stage1", 1, 3),
    ):
        page.locator(f".vc [data-mode={mode}]").click()
        page.locator(".vc-blocks button").nth(block).click()
        page.locator(".vc-heads button").nth(head).click()
        x, y = (0.35, 0.6) if side else (0.7, 0.3)
        canvas, position = canvas_point(page, side, x, y, crops[side].height / crops[side].width)
        canvas.click(position=position)
        page.mouse.move(0, 0)
        left, top, right, bottom = boxes[side]
        place = left + x * (right - left), top + y * (bottom - top)
        expected = []
        for (_, _, maps), (left, top, right, bottom) in zip(known, boxes, strict=True):
            layer = maps[block]
            px, py = ((p - low) / (high - low) for p, low, high in ((place[0], left, right), (place[1], top, bottom)))
            (rows, cols), (h, w) = layer.grid_size, layer.token_grid
            size = (h, w) if mode == "stage1" else (rows, cols)
            r, c = cell(np.clip(py, 0, 0.9999), size[0], rows), cell(np.clip(px, 0, 0.9999), size[1], cols)
            query = r * size[1] + c + (0 if mode == "stage1" else layer.num_prefix_tokens)
            expected.append(expected_rows(layer, mode, None if head == 0 else head - 1, query))
        shown = page.evaluate(READ)
        for stream in ("positive", "negative", "differential"):
            limit = max(np.abs(rows[s]).max() for rows in expected for s in (
                ("differential",) if stream == "differential" else ("positive", "negative")
            ))  # fmt: skip
            for i, rows in enumerate(expected):
                np.testing.assert_allclose(shown[i][stream], rows[stream], atol=3e-3 * limit)
                layer = known[i][2][block]
                keys = layer.token_grid if mode == "stage2" else layer.grid_size
                across = points_in_cells(keys[1], layer.grid_size[1])
                points = [(px, py) for py in points_in_cells(keys[0], layer.grid_size[0]) for px in across]
                values = rows[stream][-len(points) :]
                aspect = crops[i].height / crops[i].width
                painted = page.evaluate(PIXELS, [i, stream, points, aspect])
                signed = -values if stream == "negative" else values
                np.testing.assert_allclose(np.array(painted)[:, :3], signed_colors(signed, limit), atol=5)

    own = max(np.abs(expected[0][s]).max() for s in ("positive", "negative"))
    page.locator("[data-scale=own]").click()
    mark = page.locator(".vc-side").first.locator("figure[data-stream=positive] .vv-marks span").last.inner_text()
    assert float(mark) == pytest.approx(own, rel=6e-3)


@needs_browser
def test_one_model_on_two_photos(page, weights, picture, tmp_path):
    photo(160, 200, seed=8).save(other := tmp_path / "other.png")
    send(page, picture)
    page.wait_for_selector(".vt[data-state=complete]")
    panel = panel_of(page, "Compare")
    panel.get_by_label("One model, two photos").check()  # while the models are still compared
    page.wait_for_selector(".vc .vv-note:has-text('Choose a second photo')")
    panel.locator(".vca-photo input[type=file]").set_input_files(other)
    page.wait_for_selector(".vc[data-state=complete]")
    assert page.locator(".vc-side h2").all_inner_texts() == ["First photo", "Second photo"]
    canvas, position = canvas_point(page, 1, 0.7, 0.3, 1)
    canvas.click(position=position)
    for side, path in enumerate((picture, other)):
        model, probabilities, maps = recorded(weights, PLAIN, path)
        first = page.locator(".vc-side").nth(side).locator(".vc-top li").first.inner_text()
        assert first.split("\n")[0] == model.label_names[probabilities.argmax()]
        rows, cols = maps[-1].grid_size
        row = expected_rows(maps[-1], "effective", None, int(0.3 * rows) * cols + int(0.7 * cols))
        np.testing.assert_allclose(page.evaluate(READ)[side]["differential"], row["differential"], atol=2e-3)
    assert not page.locator(".vc-numbers").is_visible() and "#compare" not in page.url
    panel.get_by_label("Classifiers", exact=True).check()
    page.wait_for_selector(".vc-numbers:visible")
    assert MHSA in page.locator(".vc-side h2").last.inner_text()


@needs_browser
def test_what_each_model_says_and_costs(page, weights, picture):
    pair(page, picture, PLAIN, MHSA)
    for side, name in enumerate((PLAIN, MHSA)):
        model, probabilities, _ = recorded(weights, name, picture)
        order = np.argsort(-probabilities)
        said = page.locator(".vc-side").nth(side).locator(".vc-top li").all_inner_texts()
        assert [line.split("\n")[0] for line in said] == [model.label_names[i] for i in order]
        assert said[0].endswith(f"{100 * probabilities.max():.1f} %")
        facts = facts_of(page, side)
        assert facts["Parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
        assert facts["Input"] == "32 × 32 px" and facts["Classes"] == "4"
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))
        assert float(facts["Multiply-adds, one image"].split()[0]) == pytest.approx(
            counter.get_total_flops() / 2e9, rel=6e-3
        )
        lambdas = page.locator(".vc-legend > span").nth(side).inner_text()
        assert ("no λ" in lambdas) == (name == MHSA)
    page.wait_for_selector(".vc-facts tr:last-child td:has-text(' ms')")
    assert "on this server" in page.locator(".vc-measured").inner_text()
    model, _, maps = recorded(weights, PLAIN, picture)
    words = page.locator(".vc-chart svg").get_attribute("aria-label")
    for stage in (1, 2):
        values = ", ".join(f"{float(getattr(layer, f'lambda{stage}')):.3f}" for layer in maps)
        assert f"first model, lambda {stage}: {values}" in words


@needs_browser
def test_models_of_other_depths_are_met_at_the_same_part_of_the_way(page, picture, timm_folder):
    assert "is loaded" in load_another(page, "Compare", str(timm_folder))
    panel_of(page, "Compare")
    send(page, picture)
    page.wait_for_selector(".vc[data-state=complete]")
    assert page.locator(".vc-depth").inner_text() == "Depth"
    for depth, blocks in enumerate(((1, 1), (2, 2), (3, 2))):
        page.locator(".vc-blocks button").nth(depth).click()
        for side, (block, count) in enumerate(zip(blocks, (3, 2), strict=True)):
            assert f"block {block} of {count}" in page.locator(".vc figcaption").nth(side).inner_text()
    page.locator(".vc-large canvas").nth(1).focus()
    page.keyboard.press("[")
    page.keyboard.press(".")
    page.keyboard.press("ArrowRight")
    assert "block 2 of 3, head 1" in page.locator(".vc figcaption").first.inner_text()


@needs_browser
def test_forgotten_maps_are_made_anew(page, picture):
    page.route("**/component_server/", lambda route: route.fulfill(json=dict(expired=True)))
    panel_of(page, "Compare")
    send(page, picture)
    page.wait_for_selector(".vc .vv-note:has-text('no longer kept')")
    page.unroute("**/component_server/")
    page.locator(".vc .vv-note").get_by_role("button", name="Run again").click()
    page.wait_for_selector(".vc[data-state=complete]")


def test_latencies_take_turns():
    order = []

    def forward(name, seconds):
        assert not torch.is_grad_enabled()
        order.append(name)
        time.sleep(seconds)

    fast, slow = cost.latencies([partial(forward, "fast", 0.001), partial(forward, "slow", 0.02)])
    assert order == ["fast", "slow"] * (len(order) // 2) and len(order) == 2 * (cost.ROUNDS + 1)
    assert 1 <= fast < 10 and 20 <= slow < 40


# ---- Any model, in every tab


@needs_browser
def test_a_model_loaded_in_one_tab_is_in_the_choice_of_all(page, picture, timm_folder):
    assert "config.json: file not found" in load_another(page, "Classify", str(timm_folder.parent))
    panel_of(page, "Classify")
    inputs = page.locator(".vca-choice")
    inputs.get_by_label("Hub id, or a folder").fill(str(timm_folder))
    inputs.get_by_role("button", name="Load", exact=True).click()
    inputs.locator(".vca-hint:has-text('is loaded')").wait_for()
    send(page, picture)
    model = loading.open_model(str(timm_folder))
    probabilities, _ = records.record(model, preprocessing.preprocess(model, read_image(picture)))
    page.wait_for_selector(f".vt-best:has-text('class {probabilities.argmax()}')")
    for tab, label in (("Explore", "Model"), ("Compare", "Second model")):
        panel_of(page, tab)
        page.get_by_label(label, exact=True).click()
        page.get_by_role("option", name=str(timm_folder)).wait_for()
        page.keyboard.press("Escape")


@needs_browser
def test_by_hub_id_in_the_explorer(page, hub, picture, timm_folder):
    hub.put("timm/vit_of_the_test", {file.name: file.read_bytes() for file in timm_folder.iterdir()})
    assert "is loaded" in load_another(page, "Explore", "hf-hub:timm/vit_of_the_test")
    panel_of(page, "Explore")
    send(page, picture)
    page.wait_for_selector(".vx[data-state=complete]")
    assert page.locator(".vx-blocks button").count() == 2
    model = loading.open_model(str(timm_folder))
    _, maps = records.record(model, preprocessing.preprocess(model, read_image(picture)))
    assert maps[0].kind == "mhsa"


@needs_browser
def test_a_visitors_own_file_and_what_is_none(page, tmp_path, timm_folder):
    with zipfile.ZipFile(tmp_path / "my model.zip", "w") as archive:
        for file in timm_folder.iterdir():
            archive.write(file, file.name)
    panel = panel_of(page, "Compare")
    panel.get_by_text("Load another model").click()
    files = panel.locator(".vca-loader input[type=file]")
    files.set_input_files(timm_folder / "config.json")
    panel.locator(".vca-problem:has-text('has no model.safetensors')").wait_for()
    panel.locator(".vca-loader input[type=file]").set_input_files(tmp_path / "my model.zip")
    panel.locator(".vca-hint:has-text('my model (uploaded) is loaded')").wait_for()
    assert panel.get_by_label("Second model").input_value() == "my model (uploaded)"


# ---- For everybody


@needs_browser
def test_a_phone_never_scrolls_sideways(page, picture):
    page.set_viewport_size(dict(width=390, height=844))
    panel_of(page, "Compare")
    send(page, picture)
    page.wait_for_selector(".vc[data-state=complete]")
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    assert page.locator(".vc-large canvas").nth(1).bounding_box()["width"] > 140


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility(page, picture, theme):
    pair(page, picture, PLAIN, PREFIXED)
    page.get_by_role("tabpanel").locator("visible=true").get_by_text("Load another model").click()
    page.wait_for_selector(".vc-facts tr:last-child td:has-text(' ms')")
    page.wait_for_timeout(500)
    assert our_faults(page) == []
