"""Generating in a real browser."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

import vca
from tests.helpers.app import LABELS
from tests.helpers.browser import needs_browser, open_page
from tests.helpers.generate_tab import LATENT, SETTINGS, SIT, choose, sampled
from tests.helpers.page import READ, expected_rows, our_faults
from vca.diffusion.sampling import to_bytes


@pytest.fixture
def page(page):
    """The Generate tab."""
    open_tab(page)
    return page


def open_tab(page) -> None:
    page.get_by_role("tab", name="Generate").click()
    choose_pixels(page)


def choose_pixels(page) -> None:
    """Chooses the model of pixels, and waits until the form offers what it has."""
    choose(page, "Generator", SIT)
    page.wait_for_function("() => document.querySelector('input[aria-label=Sampler]').value === 'euler'")


def generate(page, **changes) -> None:
    """Fills in the form as in SETTINGS, and presses Generate."""
    asked = SETTINGS | changes
    choose(page, "Class", asked["label"])
    for label, key in (("Pictures", "count"), ("Steps", "steps"), ("Guidance (1 is none)", "guidance")):
        page.get_by_label(f"number input for {label}").fill(str(asked[key]))
    page.get_by_label("Seed", exact=True).fill(str(asked["seed"]))
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Generate", exact=True).click()


def shown(page) -> np.ndarray:
    """The pictures on the page, (B, H, W, 3)."""
    data = page.evaluate("""() => [...document.querySelectorAll(".vg-grid canvas")].map((canvas) => [canvas.height,
        canvas.width, [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]])""")
    return np.stack([np.array(pixels, np.uint8).reshape(rows, cols, 4)[..., :3] for rows, cols, pixels in data])


def ask_for_too_much(route) -> None:
    """Lets a request to generate ask for more pictures and steps than are allowed."""
    asked = route.request.post_data_json
    if SIT in asked["data"] and len(asked["data"]) == 7:
        asked["data"][2], asked["data"][3] = 16, 250
    route.continue_(post_data=json.dumps(asked))


def ended(page, state: str) -> None:
    page.wait_for_selector(f".vg[data-state={state}][data-film=complete]")


@needs_browser
def test_pictures_come_step_by_step_and_every_step_can_be_explored(page, weights, forwards):
    generate(page)
    page.wait_for_selector(".vg[data-state=running] canvas")
    ended(page, "complete")
    states = {}
    np.testing.assert_array_equal(shown(page), sampled(weights, callback=lambda step, _, x: states.update({step: x})))
    assert page.locator(".vg-count").inner_text() == "6 of 6 steps"
    assert page.locator(".vg-size").inner_text() == "24 × 16 pixels each, smoothly enlarged here."

    page.locator(".vg .vv-timeline input").fill("4")
    page.locator(".vg-grid button").nth(2).click()
    model = vca.load(weights / SIT)
    said = page.locator(".vg .vv-says")
    assert "t = 0.667: the picture that the network then expects" in said.inner_text()
    labels = torch.full((3,), LABELS.index("right"))
    with torch.no_grad():
        velocity = model.conditioned(labels, 2.0)(states[4], torch.full((3,), 4 / 6))
    expected = to_bytes(model.decode(states[4] + (1 - 4 / 6) * velocity)).permute(0, 2, 3, 1).numpy()
    page.wait_for_function("() => document.querySelector('.vg').pictures.expected[4]")
    np.testing.assert_allclose(shown(page).astype(int), expected, atol=1)
    page.locator(".vg-noisy input").check()
    np.testing.assert_array_equal(shown(page), to_bytes(model.decode(states[4])).permute(0, 2, 3, 1))
    assert "right, picture 3: after 4 of 6 steps, t = 0.667" in page.locator(".vg .vv-says").inner_text()

    page.get_by_role("button", name="Explore this step").click()
    page.wait_for_selector(".vx[data-state=complete]")
    assert "picture 3, seed 11, after 4 of 6 steps of euler, guidance 2" in page.locator(".vx-caption").inner_text()
    with torch.no_grad(), vca.record(model) as maps:
        model(states[4][2:3], torch.tensor([4 / 6]), torch.tensor([LABELS.index("right")]))
    row = expected_rows(maps[1], "effective", None, 2 * 6 + 3)  # the patch in the middle of 4 x 6, mean of all heads
    np.testing.assert_allclose(page.evaluate(READ)["rows"]["differential"], row["differential"], atol=2e-3)

    page.get_by_role("tab", name="Generate").click()
    page.locator(".vg .vv-branch input").check()
    page.get_by_role("button", name="Explore this step").click()
    page.wait_for_selector(".vx-caption:has-text('told no class')")


@needs_browser
def test_stop_ends_at_the_next_step_and_what_was_reached_can_be_looked_at(page, weights, forwards):
    forwards.delay = 0.1
    generate(page, steps=250)
    page.wait_for_selector(".vg[data-state=running] canvas")
    page.wait_for_function("() => parseInt(document.querySelector('.vg-count').textContent) >= 3")
    page.get_by_role("button", name="Generate", exact=True).click()  # ignored while pictures are being made
    page.get_by_role("button", name="Stop").click()
    ended(page, "stopped")
    reached = int(page.locator(".vg-count").inner_text().split()[0])
    assert 3 <= reached == len(forwards) < 250
    assert page.locator(".vg-count").inner_text() == f"{reached} of 250 steps, stopped"
    forwards.delay, states = 0, {}
    sampled(weights, steps=250, callback=lambda step, _, x: states.update({step: x}))
    preview = vca.load(weights / SIT).decode(states[reached])
    np.testing.assert_array_equal(shown(page), to_bytes(preview).permute(0, 2, 3, 1))
    page.locator(".vg .vv-timeline input").fill("0")
    assert "after 0 of 250 steps, t = 0" in page.locator(".vg .vv-says").inner_text()


@needs_browser
def test_a_picture_moves_to_classify(page, weights):
    generate(page, guidance=1)
    ended(page, "complete")
    assert page.locator(".vg .vv-branch").is_hidden()
    page.locator(".vg-grid button").nth(1).click()
    page.get_by_role("button", name="Classify this picture").click()
    page.wait_for_selector(".vt[data-state=complete]")
    assert page.locator(".vt-best").inner_text() in LABELS


@needs_browser
def test_pictures_survive_a_reload_and_can_be_saved(page, weights, tmp_path):
    generate(page)
    ended(page, "complete")
    before = shown(page)
    page.reload()
    page.get_by_role("tab", name="Generate").click()
    ended(page, "complete")
    np.testing.assert_array_equal(shown(page), before)
    for form, frames in (("png", 1), ("gif", 7)):
        with page.expect_download() as download:
            page.locator(f"[data-save={form}]").click()
        assert download.value.suggested_filename == f"right.{form}"
        download.value.save_as(path := tmp_path / f"saved.{form}")
        saved = Image.open(path)
        assert saved.size == (3 * 8 * 24, 8 * 16) and getattr(saved, "n_frames", 1) == frames
    large = [Image.fromarray(picture).resize((8 * 24, 8 * 16), Image.Resampling.BICUBIC) for picture in before]
    np.testing.assert_array_equal(Image.open(tmp_path / "saved.png"), np.concatenate(large, axis=1))


@needs_browser
def test_the_slider_of_steps_ends_where_a_request_is_refused(page):
    page.get_by_label("number input for Steps").fill("250")
    page.get_by_label("number input for Pictures").fill("16")
    page.keyboard.press("Tab")
    page.wait_for_function("() => document.querySelector('[aria-label=\"number input for Steps\"]').max === '100'")
    assert page.get_by_label("number input for Steps").input_value() == "100"


@needs_browser
def test_problems_are_said_in_a_sentence(page):
    page.route("**/queue/join?*", ask_for_too_much)  # the page itself would not
    generate(page)
    page.wait_for_selector(".vg .vv-problem:has-text('count times steps may be at most 1600 with euler.')")
    page.unroute("**/queue/join?*")
    choose(page, "Generator", LATENT)
    page.wait_for_selector(".vca-hint:has-text('makes latents')")
    generate(page)
    page.wait_for_selector(".vg .vv-problem:has-text('cannot load the autoencoder')")
    choose_pixels(page)
    generate(page)
    ended(page, "complete")


@needs_browser
def test_who_has_to_wait_is_told_so_and_may_give_up(page, running, url, forwards):
    forwards.delay = 0.3
    generate(page, steps=250)
    page.wait_for_selector(".vg[data-state=running] canvas")
    with open_page(running, url) as second:
        second.goto(url)
        open_tab(second)
        generate(second, seed=1)
        second.wait_for_selector(".vg .vv-note:has-text('Waiting for the pictures of other visitors')")
        second.get_by_role("button", name="Cancel").click()
        second.wait_for_selector(".vg .vv-note:has-text('Choose a class')")
        page.get_by_role("button", name="Stop").click()
        ended(page, "stopped")
        done = len(forwards)
        forwards.delay = 0
        time.sleep(1)
        assert len(forwards) == done
        generate(second, seed=1)
        ended(second, "complete")


@needs_browser
def test_a_closed_page_ends_its_run(running, url, forwards):
    with open_page(running, url) as page:
        page.goto(url)
        open_tab(page)
        generate(page, steps=250)
        page.wait_for_selector(".vg[data-state=running] canvas")
    for _ in range(30):
        before = len(forwards)
        time.sleep(0.5)
        if len(forwards) == before:
            break
    assert len(forwards) == before < 250


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_tab_is_accessible_and_fits_a_phone(page, theme):
    generate(page)
    ended(page, "complete")
    page.wait_for_timeout(500)
    assert our_faults(page) == []
    page.set_viewport_size(dict(width=390, height=844))
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
