"""The Compare tab on the checkpoints that ship, in a real browser."""

import numpy as np
import pytest

import vca
from app.ui import WEIGHTS
from tests.helpers.app import recorded
from tests.helpers.browser import needs_browser
from tests.helpers.compare_page import READ, complete, facts_of, pair, pixels, shown
from tests.helpers.generate_tab import choose
from tests.helpers.page import expected_rows

pytestmark = needs_browser

VCA, MHSA, GENERATOR = "vca_vit_pico_patch4_32_cifar10", "mhsa_vit_pico_patch4_32_cifar10", "vca_sit_xs_2_scenes"
TITLES = {
    VCA: "VCA ViT-Pico/4 · CIFAR-10",
    MHSA: "Self-attention ViT-Pico/4 · CIFAR-10",
    GENERATOR: "VCA SiT-XS/2 · Scenes",
}


@pytest.fixture(scope="module")
def weights():
    return WEIGHTS


def test_a_classifier_and_its_twin(page, weights, picture):
    pair(page, picture, TITLES[VCA], TITLES[MHSA])
    rows = page.evaluate(READ)
    for side, name in enumerate((VCA, MHSA)):
        model, probabilities, maps = recorded(weights, name, picture)
        first = page.locator(".vc-side").nth(side).locator(".vc-top li").first.inner_text()
        assert first.split("\n")[0] == model.label_names[probabilities.argmax()]
        assert facts_of(page, side)["Trained on"] == "CIFAR-10" and facts_of(page, side)["Id"] == name
        middle = expected_rows(maps[-1], "effective", None, 4 * 8 + 4)
        np.testing.assert_allclose(rows[side]["differential"], middle["differential"], atol=2e-3)


def test_a_title_fits_its_choice_whose_tooltip_is_the_id(page):
    choice = page.get_by_label("Model", exact=True)
    for size in (1400, 390):
        page.set_viewport_size(dict(width=size, height=900))
        choice.click()
        page.get_by_role("option", name=TITLES[MHSA], exact=True).click()
        page.wait_for_function("(id) => document.querySelector('#model-model input').title === id", arg=MHSA)
        assert choice.input_value() == TITLES[MHSA]
        page.wait_for_function("(id) => location.hash.includes(`model=${id}`)", arg=MHSA)
        assert choice.evaluate("(input) => input.scrollWidth <= input.clientWidth")
        choice.click()
        page.get_by_role("option", name=TITLES[VCA], exact=True).click()
        page.wait_for_function("(id) => document.querySelector('#model-model input').title === id", arg=VCA)


def test_the_generator_beside_itself(page, weights):
    """Twice the same model: what differs would be another noise, class or step."""
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Generators", exact=True).check()
    page.wait_for_selector(".vc .vv-note:has-text('the same noise')")
    choose(page, "Second generator", TITLES[GENERATOR])
    choose(page, "Class", "sea")
    panel = page.get_by_role("tabpanel").locator("visible=true")
    panel.get_by_label("number input for Steps").fill("5")
    page.keyboard.press("Tab")
    panel.get_by_role("button", name="Generate", exact=True).click()
    complete(page)
    model = vca.load(weights / GENERATOR)
    settings = model.sampling | dict(steps=5)
    images = pixels(model.sample(["sea"] * 4, seed=0, **settings))
    for side in shown(page):
        np.testing.assert_array_equal(side, images.reshape(4, -1, 3))
    first, second = page.evaluate(READ)
    assert first == second and np.ptp(first["differential"]) > 0
