"""Pictures of maps: which row is drawn, where, and in which colours."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import vca
from tests.helpers.vits import images, make_timm_vit, make_vca_vit
from vca import drawing, plot

LAYER = dict(img_size=16, window_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 4), num_classes=3)


def recorded(model, x):
    with vca.record(model.eval()) as maps, torch.no_grad():
        model(x)
    return maps


@pytest.fixture(scope="module")
def maps():
    model = make_vca_vit(reg_tokens=1)
    for block in model.blocks:
        block.attn.stage1.lambda_q1.data.fill_(0.7)
        block.attn.stage1.lambda_k1.data.fill_(0.1)  # large enough that maps have both signs
    return recorded(model, images(2))


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


# ---- Which row


def test_rows_are_those_of_the_record(maps):
    layer = maps[1]
    (rows, cols), prefix = layer.grid_size, layer.num_prefix_tokens
    assert prefix and layer.token_grid
    patch = prefix + 2 * cols + 1
    effective = layer.effective[1, :, patch, prefix:].reshape(-1, rows, cols).numpy()
    found = layer.on_grid(query=(2, 1), sample=1)
    np.testing.assert_allclose(found["differential"], effective, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found["positive"] - found["negative"], found["differential"])
    assert found["positive"].min() == found["negative"].min() == 0 < found["negative"].max()
    np.testing.assert_array_equal(layer.on_grid(query=patch, sample=1)["differential"], found["differential"])
    first = layer.on_grid("stage1", (1, 0))
    token = layer.token_grid[1]
    for name in ("positive", "negative", "differential"):
        row = getattr(layer.stage1, name)[0, :, token, prefix:]
        np.testing.assert_array_equal(first[name], row.reshape(-1, rows, cols).numpy())
    second = layer.on_grid("stage2", 0)["positive"]
    np.testing.assert_array_equal(second, layer.stage2.positive[0, :, 0].reshape(-1, *layer.token_grid).numpy())


def test_without_a_query_the_row_is_what_the_classifier_reads():
    x = images(1)
    for model in (make_vca_vit(reg_tokens=2), make_vca_vit(global_pool="token", class_token=True)):
        layer = recorded(model, x)[-1]
        read = vca.attribution.readout(model, layer)
        assert layer.readout == read
        np.testing.assert_allclose(layer.on_grid()["differential"], read.rows(layer.effective[0]).numpy(), atol=1e-7)
    layer = recorded(model.blocks[0].attn, torch.randn(1, layer.effective.shape[-1], model.embed_dim))[0]
    assert layer.readout is None
    mean = layer.effective[0, :, 1:, 1:].mean(1).reshape(-1, *layer.grid_size)
    np.testing.assert_allclose(layer.on_grid()["differential"], mean.numpy(), atol=1e-7)


def test_outside_its_window_a_query_sees_nothing():
    model = vca.create_model("swin_tiny_patch4_window7_224", **LAYER)
    maps = recorded(model, torch.randn(1, 3, 16, 16))
    layer = maps[1]  # shifted
    window, slot = (layer.window_patches == 6).nonzero()[0].tolist()
    keys = layer.window_patches[window]
    (found,) = layer.on_grid(query=(1, 2)).values()
    seen = np.isfinite(found[0]).flatten()
    assert set(np.flatnonzero(seen)) == set(keys[keys >= 0].tolist()) and seen.sum() < seen.size
    np.testing.assert_array_equal(
        found.reshape(2, -1)[:, keys[keys >= 0]], layer.stage1.positive[0, window, :, slot, keys >= 0].numpy()
    )
    with pytest.raises(ValueError, match="block 1 attends within windows: give a query"):
        layer.on_grid()
    assert len(layer.plot(query=(1, 2)).axes) == 2 and maps._repr_html_() is None
    with pytest.raises(ValueError, match="no maps to draw"):
        maps.overview()
    assert [label.get_text() for label in maps.overview(query=(0, 0)).axes[0].get_xticklabels()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "options, error, said",
    [
        (dict(stage="stage3"), ValueError, "this attention has effective, stage1, stage2"),
        (dict(query=(9, 0)), IndexError, "outside the"),
        (dict(query=-1), IndexError, "rows, counted from 0"),
        (dict(sample=2), IndexError, "2 images were recorded"),
        (dict(head=99), IndexError, "block 0 has heads 0 to"),
        (dict(image=3), ValueError, "image must be a PIL image"),
        (dict(image=torch.zeros(2)), ValueError, "image must be a PIL image"),
    ],
)
def test_what_is_not_there_is_refused(maps, options, error, said):
    with pytest.raises(error, match=said):
        maps[0].plot(**options)


def test_attention_of_one_stage_has_no_second():
    with pytest.raises(ValueError, match="this attention has effective, stage1"):
        recorded(make_timm_vit(), images(1))[0].on_grid("stage2")


# ---- The pictures


def drawn(ax) -> np.ndarray:
    return np.asarray(ax.get_images()[0].get_array())


def test_both_streams_and_their_difference_stand_in_a_row(maps, photo):
    layer = maps[2]
    figure = layer.plot(photo, stage="stage1", head=1, query=(0, 1))
    below = drawing.backdrop(photo, layer.grid_size)
    rows = {name: row[1] for name, row in layer.on_grid("stage1", (0, 1)).items()}
    most = max(rows["positive"].max(), rows["negative"].max())
    shown, *panels = figure.axes[:4]
    np.testing.assert_array_equal(drawn(shown), np.asarray(below))
    for ax, values, limit in zip(
        panels,
        (rows["positive"], -rows["negative"], rows["differential"]),
        (most, most, np.abs(rows["differential"]).max()),
        strict=True,
    ):
        np.testing.assert_array_equal(drawn(ax), np.asarray(drawing.laid_over(below, values, limit)))
        assert len(ax.patches) == 2  # the frame around the query
    assert [ax.get_title() for ax in panels] == ["Positive A₁⁺", "Negative A₁⁻", "Differential D₁"]
    assert "contrast token (0, 1)" in figure.get_suptitle()
    assert figure._repr_png_()[:4] == b"\x89PNG"


def test_a_figure_of_ones_own_is_drawn_into(maps, photo):
    import matplotlib.pyplot as plt

    mine = plt.figure()
    left, right = mine.subfigures(1, 2)
    assert maps[0].plot(figure=left) is left and maps.overview(photo, figure=right) is right
    assert len(left.axes) == 6 and len(right.axes) == 2
    plt.close(mine)


def test_the_overview_has_a_tile_for_every_head_of_every_block(maps, photo):
    photo_axis, ax = maps.overview(photo, sample=1).axes
    below = drawing.backdrop(photo, maps[0].grid_size)
    columns = [layer.on_grid(sample=1)["differential"] for layer in maps]
    np.testing.assert_array_equal(drawn(photo_axis), np.asarray(below))
    np.testing.assert_array_equal(drawn(ax), np.asarray(drawing.tiles(columns, below)))
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(layer.block) for layer in maps]
    assert len(ax.get_yticklabels()) == len(columns[0])


def test_a_tile_is_orange_where_a_map_is_largest_and_blue_where_it_is_negative():
    values = np.array([[[0.0, 1.0], [-1.0, np.nan]]], np.float32)
    tile = drawing.tiles([values]).load()
    edge = drawing.TILE // 4
    red, green, blue = tile[3 * edge, edge]
    assert red > 240 and blue < 40 and green < 140
    assert tile[edge, 3 * edge][2] > 240 and tile[edge, 3 * edge][0] < 60
    assert tile[edge, edge] == tile[3 * edge, 3 * edge] == (242, 242, 242)


def test_an_attribution_is_drawn(photo):
    values = torch.linspace(-1, 2, 24).reshape(1, 4, 6)
    figure = vca.attribution.plot(values, photo, title="mine")
    below = drawing.backdrop(photo, (4, 6))
    np.testing.assert_array_equal(drawn(figure.axes[1]), np.asarray(drawing.laid_over(below, values[0].numpy(), 2.0)))
    assert figure.get_suptitle() == "mine"


def test_smooth_keeps_the_size_and_the_largest_place(photo):
    values = np.zeros((4, 4), np.float32)
    values[1, 2] = 1
    (ax, *_) = plot.panels([plot.Panel("", values, 0, 1)], smooth=True).axes
    pixels = drawn(ax).astype(int)
    row, column = np.unravel_index(np.argmin(pixels[..., 2]), pixels.shape[:2])
    assert (4 * row // pixels.shape[0], 4 * column // pixels.shape[1]) == (1, 2)
    assert len(np.unique(pixels[..., 2])) > 20


def test_what_lies_below_has_the_aspect_of_the_grid(photo, tmp_path):
    assert drawing.backdrop(photo, (8, 8)).size == (40, 40)
    assert drawing.backdrop(photo, (4, 12)).size == (60, 20)
    photo.save(tmp_path / "photo.png")
    assert drawing.backdrop(tmp_path / "photo.png", (8, 8)).tobytes() == drawing.backdrop(photo, (8, 8)).tobytes()
    x = torch.stack([torch.zeros(3, 8, 8), 3 * torch.eye(8).expand(3, 8, 8) - 1])
    below = np.asarray(drawing.backdrop(x, (4, 4), 1))
    assert below[0, 0].tolist() == [255] * 3 and below[0, 1].tolist() == [0] * 3


# ---- Words


def test_records_say_what_they_are_in_a_line(maps):
    lambdas = f"{float(maps[1].lambda1):.3f}, {float(maps[1].lambda2):.3f}"
    said = f"<vca maps: block 1, batch of 2, 3 heads, 4x4 patches, 2x2 contrast tokens, lambda {lambdas}>"
    assert repr(maps[1]) == said and len(repr(maps).splitlines()) == len(maps)
    shape = tuple(maps[0].stage1.positive.shape)
    assert repr(maps[0].stage1) == f"<positive, negative, differential: {shape}>"
    assert repr(vca.Maps()) == "<no maps: the model has not run>" and vca.Maps()._repr_html_() is None
    plain = recorded(make_timm_vit(), images(1))[0]
    assert "mhsa maps" in repr(plain) and "lambda" not in repr(plain)


def test_a_notebook_shows_the_overview(maps):
    html = maps._repr_html_()
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^']+)'", html)[1])))
    columns = [layer.on_grid()["differential"] for layer in maps]
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(drawing.tiles(columns)))
