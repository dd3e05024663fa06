"""Links: what they name, and the way back to it."""

import base64
import io
import json
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from app import links
from app.runtime import loading
from app.runtime.examples import examples
from app.runtime.gradio_adapter import kept_file
from app.ui import build
from tests.helpers.app import MHSA, PLAIN, photo
from tests.helpers.browser import needs_browser, open_page
from tests.helpers.compare_page import READ, panel_of, send


@pytest.fixture
def follow(weights):
    return next(f.fn for f in build(weights).fns.values() if getattr(f.fn, "__name__", "") == "follow")


@pytest.fixture
def uploaded(picture):
    """A photo that was uploaded, as gradio hands it to a function."""
    return dict(path=kept_file(picture.read_bytes(), "photo.png"))


def asked(link: str, path: str | None = None) -> str:
    return json.dumps(dict(hash=link, path=path))


def is_skipped(update) -> bool:
    return isinstance(update, dict) and update.get("__type__") == "update" and len(update) == 1


def test_what_a_link_begins_with(uploaded, tmp_path):
    assert links.base_of("m", examples()["cat"].path) == dict(model="m", image="cat")
    assert links.base_of("m", Path(uploaded["path"])) == dict(model="m")
    assert links.base_of(f"{loading.UPLOADED}secret", examples()["cat"].path) is None
    (linked := tmp_path / links.LINKED).write_bytes(b"\xff\xfe")
    assert links.base_of("m", linked) == dict(model="m", photo="__4=")


def test_a_photo_that_is_gone_meanwhile_is_in_no_link(tmp_path):
    for name in ("gone.png", links.LINKED):
        assert links.base_of("m", tmp_path / name) == dict(model="m")


def test_a_reduced_photo_is_small_and_the_same_picture():
    image = photo(1600, 900, seed=5)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = base64.urlsafe_b64decode(links.reduced(Path(kept_file(stream.getvalue(), "large.png"))))
    assert len(data) < links.MOST_BYTES
    small = Image.open(io.BytesIO(data))
    assert small.size == (256, 144) and not small.getexif()
    np.testing.assert_allclose(np.asarray(small, float), image.resize(small.size), atol=30)


def test_a_link_to_an_example_and_two_models(follow, uploaded):
    link = f"#compare?model={MHSA}&image=lion&with={PLAIN}"
    image, model, second, tab = follow(asked(link), uploaded, PLAIN, MHSA)
    assert (image, model, second) == (str(examples()["lion"].path), MHSA, PLAIN)
    assert isinstance(tab, gr.Tabs) and tab.selected == "compare"
    shown = dict(path=kept_file(examples()["lion"].path.read_bytes(), "lion.jpg"))
    assert all(map(is_skipped, follow(asked(link), shown, MHSA, PLAIN)[:3])), "it is on show"


def test_a_photo_in_the_link_is_an_upload_like_any_other(follow, uploaded):
    data = links.reduced(Path(uploaded["path"]))
    image, *_ = follow(asked(f"#classify?model={PLAIN}&photo={data}"), uploaded, PLAIN, MHSA)
    assert Path(image).name == links.LINKED and Path(image).read_bytes() == base64.urlsafe_b64decode(data)
    assert links.base_of(PLAIN, Path(image)) == dict(model=PLAIN, photo=data)
    assert is_skipped(follow(asked(f"#classify?photo={data}"), dict(path=image), PLAIN, MHSA)[0])


def test_back_finds_ones_own_photo_and_nothing_else(follow, uploaded):
    image, *_ = follow(asked("#explore?", uploaded["path"]), None, PLAIN, MHSA)
    assert image == uploaded["path"]
    for path in ("/etc/passwd", __file__, str(Path(uploaded["path"]).parent / "none.png"), None, 7):
        assert is_skipped(follow(asked("#explore?", path), None, PLAIN, MHSA)[0]), path


@pytest.mark.parametrize(
    "link", ["", "#", "#nowhere?model=x", "#classify?photo=%%%", "#classify?photo=é", f"#classify?photo={'A' * 90_000}"]
)
def test_what_is_no_link_changes_nothing(follow, uploaded, link):
    assert all(map(is_skipped, follow(asked(link), uploaded, PLAIN, MHSA)[:3]))


def test_a_model_that_is_not_here_is_named_without_its_markup(follow, uploaded, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", lambda text, title: said.append(text))
    _, model, *_ = follow(asked("#classify?model=<b>x</b>"), uploaded, PLAIN, MHSA)
    assert is_skipped(model) and "not here" in said[0] and "<" not in said[0]
    follow(asked("#classify?image=cat"), uploaded, PLAIN, MHSA)
    assert len(said) == 1, "a link without a model says nothing of one"


@needs_browser
def test_a_link_with_ones_own_photo_in_a_fresh_browser(page, running, url, picture):
    send(page, picture)
    page.wait_for_selector(".vt[data-state=complete]")
    assert "photo=" not in page.url and "image=" not in page.url
    page.get_by_role("button", name="Link with my photo").click()
    page.wait_for_function("() => location.hash.includes('photo=')")
    page.get_by_role("button", name="Copy link").wait_for()
    page.wait_for_selector(".vt[data-state=complete]")
    answer = page.locator(".vt-answer").inner_text()
    panel_of(page, "Compare")
    page.wait_for_selector(".vc[data-state=complete]")
    page.locator(".vc-blocks button").nth(1).click()
    rows, address = page.evaluate(READ), page.url
    assert "#compare?" in address and "photo=" in address
    with open_page(running, url, viewport=dict(width=1400, height=1000)) as fresh:
        fresh.goto(address)
        fresh.wait_for_selector(".vc[data-state=complete]")
        assert fresh.locator(".vc-blocks [aria-pressed=true]").inner_text() == "2"
        for side, other in zip(fresh.evaluate(READ), rows, strict=True):
            np.testing.assert_allclose(side["differential"], other["differential"], atol=1e-7)
        fresh.get_by_role("tab", name="Classify").click()
        fresh.wait_for_selector(".vt[data-state=complete]")
        assert fresh.locator(".vt-answer").inner_text() == answer
        fresh.go_back()
        fresh.wait_for_selector(".vc-large canvas >> nth=0")
