"""The Classify tab in a real browser, with two of the checkpoints that ship."""

import shutil
from functools import partial

import numpy as np
import pytest

import vca
from app.runtime import examples, records, thinking, tour
from app.ui import WEIGHTS
from tests.helpers.browser import needs_browser, open_page
from tests.helpers.page import our_faults

pytestmark = needs_browser

VCA, MHSA = "vca_vit_pico_patch4_32_cifar10", "mhsa_vit_pico_patch4_32_cifar10"
TITLES = {VCA: "VCA ViT-Pico/4 · CIFAR-10", MHSA: "Self-attention ViT-Pico/4 · CIFAR-10"}
COMPLETE = ".vt[data-state=complete]"
SCENE = ".vt-scene:visible"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name in (VCA, MHSA):
        shutil.copytree(WEIGHTS / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def chosen(weights):
    model = vca.load(weights / VCA)
    return examples.chosen_for(model.label_names, partial(examples.ask, model))


def seen(weights, example, name: str = VCA):
    model = vca.load(weights / name)
    return model, records.Recordings().get(model, example.path)


def percent(part: float) -> str:
    return f"{100 * part:.1f} %" if part < 0.0995 else f"{100 * part:.0f} %"


def answers(page) -> dict[str, str]:
    """The probabilities on show, by label."""
    read = "(all) => all.map((li) => [li.firstChild.textContent, li.lastChild.lastChild.textContent])"
    return dict(page.locator(".vt-answer .vt-top li").evaluate_all(read))


def test_the_page_opens_on_an_example_that_the_model_gets_right(page, chosen):
    page.wait_for_selector(COMPLETE)
    first = chosen.right[0]
    assert page.locator(".vt-best").inner_text() == first.label
    assert page.locator(".vt-sure").inner_text() == percent(first.probability)
    assert f"model={VCA}&image={first.example.name}" in page.url
    colors = page.evaluate(
        """() => { const canvas = document.querySelector(".vt-large canvas");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return data.reduce((most, _, i) => (i % 4 ? most : Math.max(most, data[i] - data[i + 2])), 0); }"""
    )
    assert colors > 60  # an orange map over a grey photo
    names = page.locator(".ve-mine button").evaluate_all("(all) => all.map((b) => b.getAttribute('aria-label'))")
    for name, answer in zip(names, chosen.right, strict=False):
        assert name == f"{answer.example.title}: the model says {answer.label} {answer.probability:.0%}"
    assert names[-1].startswith("A mistake") and len(names) == len(chosen.right) + 1


def test_an_example_of_another_model_changes_the_model(page, chosen):
    page.wait_for_selector(COMPLETE)
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=TITLES[MHSA], exact=True).click()
    page.wait_for_function(f"() => location.hash.includes('model={MHSA}&')")
    page.wait_for_selector(f".ve-others button[title*='{TITLES[VCA]}']")
    page.locator(f".ve-others button[title*='{TITLES[VCA]}']").first.click()
    page.wait_for_function(f"() => location.hash.includes('model={VCA}&')")
    page.wait_for_selector(COMPLETE)
    assert page.get_by_label("Model", exact=True).input_value() == TITLES[VCA]
    page.go_back()
    page.wait_for_function(f"() => location.hash.includes('model={MHSA}&')")


def test_what_is_turned_off_shows_at_once_and_reset_brings_it_back(page, weights, chosen):
    page.wait_for_selector(COMPLETE)
    before = answers(page)
    model, recorded = seen(weights, chosen.right[0].example)
    change = dict(block="all", head=[0], lambda_scale=None, off=["negative"])
    want = thinking.what_if(model, recorded, change, [])
    page.get_by_role("button", name="second stream").click()
    page.locator(".vt-mute button").first.click()
    now = want["top"][0][2]
    page.wait_for_function(f"() => document.querySelector('.vt-sure').textContent.endsWith('→ {percent(now)}')")
    page.wait_for_function("() => !document.querySelector('.vt').thinking.change.asked")
    assert answers(page) == {name: percent(after) for name, _, after in want["top"]}
    assert page.locator(".vt-reset").is_enabled()
    canvas = page.locator(".vt-large canvas")
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    want = thinking.what_if(model, recorded, change, [4 * 8 + 3])
    page.wait_for_function(
        f"() => document.querySelector('.vt-sure').textContent.endsWith('→ {percent(want['top'][0][2])}')"
    )
    page.locator(".vt-reset").click()
    page.wait_for_function("() => !document.querySelector('.vt-sure').textContent.includes('→')")
    assert answers(page) == before


def test_the_tour(page, weights, chosen, running, url):
    page.wait_for_selector(COMPLETE)
    model, recorded = seen(weights, chosen.right[0].example)
    relevance = np.abs(thinking.look_inside(model, recorded)["relevance"])
    block, head = (int(i) for i in np.unravel_index(relevance.argmax(), relevance.shape))
    scenes = tour.scenes(model, recorded, block, head)
    assert [scene["id"] for scene in scenes] == ["patches", "tokens", "positive", "negative", "subtraction", "lens"]
    page.get_by_role("button", name="See it think").click()
    pictures = []
    for number, scene in enumerate(scenes, start=1):
        page.wait_for_selector(f".vt-scene h2:has-text('{number} of 6: {scene['title']}')")
        assert page.locator(".vt-text").inner_text() == scene["text"]
        assert page.locator(".vt-scene dt").all_inner_texts() == list(scene["words"])
        pictures.append(page.locator(".vt-large canvas").evaluate("(canvas) => canvas.toDataURL()"))
        assert f"scene={scene['id']}" in page.url
        if scene["id"] == "subtraction":
            check_the_wipe(page, recorded.maps[block], head, scene)
            with open_page(running, url, viewport=dict(width=390, height=844)) as fresh:
                fresh.goto(page.url)
                fresh.wait_for_selector(f".vt-scene h2:has-text('5 of 6: {scene['title']}')")
                assert fresh.evaluate("() => document.documentElement.scrollWidth") == 390
        if number < len(scenes):
            page.get_by_role("button", name="Next", exact=True).click()
    assert len(set(pictures)) == 6
    page.get_by_role("button", name="Leave the tour").click()
    assert page.locator(SCENE).count() == 0 and page.locator(".vt-change").is_visible()
    assert "scene=" not in page.url


def check_the_wipe(page, layer, head: int, scene: dict) -> None:
    """At the model's own lambda the wipe is its differential map, bit for bit; elsewhere what the equation says."""
    row = "() => [...document.querySelector('.vt').thinking.tour.row]"
    positive, negative = (stream[0, head, scene["token"]] for stream in (layer.stage1.positive, layer.stage1.negative))
    np.testing.assert_array_equal(np.float32(page.evaluate(row)), layer.stage1.differential[0, head, scene["token"]])
    page.locator(".vt-wipe input").fill("0.5")
    np.testing.assert_allclose(page.evaluate(row), positive - 0.5 * negative, atol=1e-7)
    page.locator(".vt-wipe button").click()
    np.testing.assert_array_equal(np.float32(page.evaluate(row)), layer.stage1.differential[0, head, scene["token"]])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(page, theme):
    page.wait_for_selector(COMPLETE)
    page.wait_for_timeout(500)
    assert our_faults(page) == []
    page.get_by_role("button", name="See it think").click()
    page.wait_for_selector(SCENE)
    assert our_faults(page) == []
