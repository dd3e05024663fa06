"""The explorer in a real browser: pyramids, lambda, scales, links and what is saved. One app and one page for all."""

import numpy as np
import pytest
import torch

from app.runtime import export
from tests.helpers.app import PREFIXED
from tests.helpers.browser import needs_browser
from tests.helpers.explorer import SHIPPED, choose, point_at, recorded, rows_shown, show
from tests.helpers.page import PIXELS, points_in_cells, signed_colors
from vca import drawing
from vca.explorer.packing import pack

pytestmark = needs_browser


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
        solid = signed_colors(np.nan_to_num(expected), np.nanmax(expected))
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
        np.testing.assert_allclose(painted[cells, :3], signed_colors(row, float(mark))[cells], atol=5)
    page.locator(".vx [data-scale=map]").click()


# ---- What is saved


# ---- The link of a view


# ---- Touch, and colours for all eyes


def seen_by(color: np.ndarray, weakness: np.ndarray) -> np.ndarray:
    """A colour (3,) from 0 to 255 as it looks with a colour weakness (Machado et al. 2009), in CIE Lab."""
    linear = np.where(color / 255 <= 0.04045, color / 255 / 12.92, ((color / 255 + 0.055) / 1.055) ** 2.4)
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
def test_palettes_work_for_the_color_blind(weakness):
    for theme in ("light", "dark"):
        ramps = {
            side: np.array([seen_by(drawing.rgb(color), weakness) for color in drawing.PALETTE[theme][side]])
            for side in ("positive", "negative")
        }
        for ramp in ramps.values():
            steps = np.diff(ramp[:, 0])
            assert (np.abs(steps) > 5).all() and len(set(np.sign(steps))) == 1  # more is always darker, or lighter
        apart = np.linalg.norm(ramps["positive"][1:4] - ramps["negative"][1:4], axis=1)
        assert (apart > 15).all(), (theme, apart)
    veil = [seen_by(drawing.rgb(drawing.PALETTE["overlay"][side]), weakness) for side in ("positive", "negative")]
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
        packed = pack(layer)
        head = export.rows(packed, "effective", 1, 7)["differential"]
        np.testing.assert_allclose(head, layer.effective[0, 1, 7], atol=3e-3 * np.abs(head).max())
        mean = export.rows(packed, "stage1", -1, 3)["differential"]
        np.testing.assert_allclose(mean, layer.stage1.differential[0, :, 3].mean(0), atol=1e-3)


@pytest.mark.parametrize("place", [("stage3", 0, 0), ("effective", 9, 0), ("effective", 0, -1), ("stage1", 0, 999)])
def test_rows_refuse_what_is_not_there(weights, cat, place):
    with pytest.raises(LookupError):
        export.rows(pack(recorded(weights, SHIPPED, cat)[0]), *place)
