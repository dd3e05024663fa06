"""The part of a photo that the model sees, and another that the visitor chooses."""

import io
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

import vca
from app.runtime import crops, records
from app.runtime.examples import examples
from app.runtime.gradio_adapter import kept_file, upload_folder
from app.runtime.images import read_image
from tests.helpers.app import MHSA, PLAIN, PREFIXED, photo
from tests.helpers.browser import needs_browser
from tests.helpers.compare_page import panel_of, send
from tests.helpers.page import our_faults
from vca import preprocessing

COMPLETE = ".vt[data-state=complete]"


@pytest.fixture
def large() -> Path:
    stream = io.BytesIO()
    photo(800, 400, seed=4).save(stream, "PNG")
    return Path(kept_file(stream.getvalue(), "large.png"))


def test_a_part_is_that_part_and_knows_its_photo(large):
    part = crops.part_of(large, (100, 200, 600, 900))
    expected = read_image(large).crop((80, 80, 480, 360))
    found = read_image(part)
    assert found.size == expected.size
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=12)
    assert crops.origin_of(part) == (large, (100, 200, 600, 900))
    assert crops.part_of(large, crops.WHOLE) == large and crops.origin_of(large) == (large, crops.WHOLE)


def test_a_part_of_an_example_and_of_a_photo_that_is_gone(large):
    origin, _ = crops.origin_of(crops.part_of(examples()["lion"].path, (0, 0, 500, 500)))
    assert origin.read_bytes() == examples()["lion"].path.read_bytes()
    part = crops.part_of(large, (0, 0, 500, 500))
    large.unlink()
    assert crops.origin_of(part) == (part, crops.WHOLE)


@pytest.mark.parametrize(
    "comment",
    [b"[]", b"[" * 50_000, b'["../../../etc/passwd", [0, 0, 9, 9]]', b'["x", [0, 0, 500, 500]]', b"7", b'[[], "abcd"]'],
)
def test_a_file_with_a_comment_of_its_own_is_a_photo(comment):
    stream = io.BytesIO()
    photo(32, 32).save(stream, "JPEG", comment=crops.MARK + comment)
    path = Path(kept_file(stream.getvalue(), "mine.jpg"))
    assert crops.origin_of(path) == (path, crops.WHOLE) and path.is_relative_to(upload_folder())


@pytest.mark.parametrize("name", [PLAIN, PREFIXED])
@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
@pytest.mark.parametrize("middle", [(0.5, 0.5), (0.35, 0.6)])
def test_the_model_sees_the_part_that_was_asked_for(weights, large, name, crop_pct, middle):
    model = vca.load(weights / name)
    model.pretrained_cfg["crop_pct"] = crop_pct
    rows, cols = preprocessing.input_size(model)[1:]
    width, height = 0.2, 0.2 * 2 * rows / cols  # the photo is twice as wide as high
    wanted = [middle[0] - width / 2, middle[1] - height / 2, middle[0] + width / 2, middle[1] + height / 2]
    image = read_image(large)
    part = crops.part_of(large, crops.box_seen_as(model, image.size, wanted))
    box = crops.origin_of(part)[1]
    np.testing.assert_allclose(crops.seen_in(model, image.size, box), wanted, atol=0.008)
    seen = preprocessing.center_crop(model, read_image(part))
    pixels = [edge * side for edge, side in zip(wanted, image.size * 2, strict=True)]
    expected = image.resize(seen.size, Image.Resampling.BICUBIC, pixels)
    assert np.abs(np.asarray(seen, float) - np.asarray(expected, float)).mean() < 6


def test_without_a_choice_the_box_is_the_middle(weights):
    model = vca.load(weights / PLAIN)
    assert crops.seen_in(model, (800, 400), crops.WHOLE) == [0.25, 0, 0.75, 1]
    wide = crops.box_seen_as(model, (800, 400), [0.5, 0, 1, 1])
    assert wide == (500, 0, 1000, 1000)


@pytest.mark.parametrize("wanted", [None, [], [0, 0, 1], "abcd", [0, 0, 2, 2], [0.5, 0.5, 0.5, 0.5], [0, 0, None, 1], 7,
                                    [float("nan")] * 4, [0.6, 0, 0.4, 1]])  # fmt: skip
def test_what_is_no_part_is_refused(weights, wanted):
    with pytest.raises(gr.Error, match="not a part of the photo"):
        crops.box_seen_as(vca.load(weights / PLAIN), (800, 400), wanted)


# ---- In a real browser


def answer_of(weights, name: str, path: Path) -> str:
    model = vca.load(weights / name)
    return model.label_names[records.classify(model, preprocessing.preprocess(model, read_image(path))).argmax()]


def asked(page) -> None:
    """Waits until the part that was asked for is on show."""
    page.wait_for_function("() => document.querySelector('.vk-words')?.textContent.includes('you chose')")
    page.wait_for_selector(COMPLETE)


@needs_browser
def test_the_visitor_moves_the_box_by_keys_and_all_tabs_see_that_part(page, weights, large):
    send(page, large)
    page.wait_for_selector(COMPLETE)
    page.locator(".vk summary").focus()
    assert "the middle of the photo" in page.locator(".vk-words").inner_text()
    page.keyboard.press("Enter")
    box = page.locator(".vk-large i")
    assert "50 % of the width and 100 % of the height" in box.get_attribute("aria-label")
    page.evaluate("() => { document.querySelector('.vt').dataset.state = 'before'; }")
    box.focus()
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    asked(page)
    page.wait_for_function("() => document.activeElement.matches('.vk-large i')")
    assert "its middle at 75 % from the left" in box.get_attribute("aria-label")
    part = crops.part_of(large, (500, 0, 1000, 1000))
    assert page.locator(".vt-best").inner_text() == answer_of(weights, PLAIN, part)
    assert Path(page.evaluate("() => history.state.path")).read_bytes() == part.read_bytes()
    page.get_by_role("button", name="The middle of the photo").click()
    page.wait_for_function("() => document.querySelector('.vk-words')?.textContent.includes('the middle')")


@needs_browser
def test_a_link_and_a_drag(page, url, weights):
    """A part of an example is in its link, and Back undoes it."""
    page.goto(f"{url}#classify?model={MHSA}&image=cat")
    page.wait_for_selector(COMPLETE)
    page.locator(".vk summary").click()
    frame = page.locator(".vk-large").bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(frame["x"] + 2, y, steps=3)
    page.mouse.up()
    page.wait_for_function("() => location.hash.includes('crop=0%2C0%2C')")
    address = page.url
    panel_of(page, "Compare")
    page.wait_for_selector(".vc[data-state=complete]")
    assert "crop=" in page.url
    page.goto(f"{url}?again{address[address.index('#') :]}")
    asked(page)
    page.locator(".vk summary").click()
    assert page.locator(".vk-large i").evaluate("(box) => getComputedStyle(box).left") == "0px"
    page.get_by_role("button", name="The middle of the photo").click()
    page.wait_for_function("() => !location.hash.includes('crop=')")
    head = "document.querySelector('.vt-strip button:not([aria-pressed=true])')"
    page.evaluate(f"() => addEventListener('popstate', () => {head}.click(), {{ once: true }})")
    page.go_back()
    page.wait_for_function("() => location.hash.includes('crop=')")
    asked(page)


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_open_box_is_accessible_and_fits_a_phone(page, url, theme):
    page.goto(f"{url}?__theme={theme}#classify?image=lion")
    page.wait_for_selector(COMPLETE)
    page.locator(".vk summary").click()
    page.wait_for_timeout(300)
    assert our_faults(page) == []
    page.set_viewport_size(dict(width=390, height=844))
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
