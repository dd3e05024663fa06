"""Two generators in the Compare tab, in a real browser."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vca
from tests.helpers.app import LABELS, PLAIN, save_checkpoints
from tests.helpers.browser import needs_browser
from tests.helpers.compare_page import COUNT, LABEL, READ, STEPS, complete, facts_of, pixels, send, shown
from tests.helpers.generate_tab import (
    choose,
    save_generator,
)
from tests.helpers.page import expected_rows, our_faults
from vca.models.dit import DiffusionTransformer

pytestmark = needs_browser

VCA, MHSA, OTHER = "vca_sit", "mhsa_sit", "other_dit"  # in the order of the choice: those with VCA first


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two generators of one size, VCA and self-attention; another of two classes, one of them theirs; a classifier."""
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoints(folder)
    torch.manual_seed(3)
    save_generator(folder / VCA, "vca_sit_xs_4", input_size=(16, 24))
    save_generator(folder / MHSA, "sit_xs_4", input_size=(16, 24))
    save_generator(folder / OTHER, "dit_xs_4", labels=[LABEL, "elsewhere"], input_size=16)
    return folder


@pytest.fixture
def page(page):
    """The Compare tab with the choice of generators."""
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Generators", exact=True).check()
    page.wait_for_selector(".vc .vv-note:has-text('the same noise')")
    return page


def generate(page, **changes) -> None:
    asked = dict(steps=STEPS, guidance=2, seed=11) | changes
    choose(page, "Class", LABEL)
    panel = page.get_by_role("tabpanel").locator("visible=true")
    for label, key in (("Steps", "steps"), ("Guidance (1 is none)", "guidance")):
        panel.get_by_label(f"number input for {label}").fill(str(asked[key]))
    panel.get_by_label("Seed", exact=True).fill(str(asked["seed"]))
    page.keyboard.press("Tab")
    panel.get_by_role("button", name="Generate", exact=True).click()


def states_of(weights, name: str, **changes) -> tuple[DiffusionTransformer, dict, np.ndarray]:
    """The model, its states by step, and the finished pictures (B, H, W, 3)."""
    model, states = vca.load(weights / name), {}
    asked = dict(steps=STEPS, guidance_scale=2.0, seed=11) | changes
    labels = [model.label_names.index(LABEL)] * COUNT
    images = model.sample(labels, callback=lambda step, _, x: states.update({step: x}), **asked)
    return model, states, pixels(images)


def expected(model, state, time: float, picture: int, label: int, query: int) -> dict:
    with torch.no_grad(), vca.record(model) as maps:
        model(state[picture : picture + 1], torch.tensor([time]), torch.tensor([label]))
    return expected_rows(maps[1], "effective", None, query)


def test_the_same_noise_and_every_step_of_both(page, weights):
    generate(page)
    complete(page)
    known = [states_of(weights, name) for name in (VCA, MHSA)]
    for side, (_, _, images) in zip(shown(page), known, strict=True):
        np.testing.assert_array_equal(side, images.reshape(COUNT, -1, 3))
    assert "right, picture 1: finished" in page.locator(".vc .vv-says").inner_text()
    middle = 2 * 6 + 3  # of 4 x 6 patches
    for step, picture, without_class in ((STEPS, 0, False), (4, 2, False), (4, 2, True), (0, 3, True)):
        page.locator(".vc .vv-timeline input").fill(str(step))
        page.locator(".vc-pictures").nth(1).locator("button").nth(picture).click()
        page.locator(".vc .vv-branch input").set_checked(without_class)
        page.wait_for_function(
            "([step, picture, without]) => { const { film, isIdle } = document.querySelector('.vc').compare;"
            " return isIdle && film.step === step && film.picture === picture && film.withoutClass === without; }",
            arg=[step, picture, without_class],
        )
        complete(page)
        seen = min(step, STEPS - 1)
        rows = page.evaluate(READ)
        for i, (model, states, images) in enumerate(known):
            pictures = images if step == STEPS else pixels(model.decode(states[step]))
            np.testing.assert_array_equal(shown(page)[i], pictures.reshape(COUNT, -1, 3))
            label = len(LABELS) if without_class else LABELS.index(LABEL)
            truth = expected(model, states[seen], seen / STEPS, picture, label, middle)
            np.testing.assert_allclose(rows[i]["differential"], truth["differential"], atol=2e-3)
    noise = shown(page)
    np.testing.assert_array_equal(noise[0], noise[1])

    canvas = page.locator(".vc-large canvas").nth(1)
    canvas.focus()
    page.keyboard.press("ArrowRight")
    for i, (model, states, _) in enumerate(known):
        truth = expected(model, states[0], 0.0, 3, len(LABELS), middle + 1)
        np.testing.assert_allclose(page.evaluate(READ)[i]["differential"], truth["differential"], atol=2e-3)


def test_what_each_generator_costs(page, weights):
    generate(page, guidance=1)
    complete(page)
    assert page.locator(".vc .vv-branch").is_hidden()
    for side, name in enumerate((VCA, MHSA)):
        model = vca.load(weights / name)
        facts = facts_of(page, side)
        assert facts["Architecture"] == model.architecture
        assert facts["Attention"] == ("vca" if name == VCA else "mhsa")
        assert facts["Parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
        assert facts["Works on"] == "24 × 16 px, 3 channels"
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 16, 24), torch.zeros(1), torch.tensor([0]))
        assert float(facts["Multiply-adds, one image"].split()[0]) == pytest.approx(
            counter.get_total_flops() / 2e9, rel=6e-3
        )
    page.wait_for_selector(".vc-facts tr:last-child td:has-text(' ms')")


def test_other_families_and_sizes_and_only_the_classes_that_both_know(page, weights):
    choose(page, "Second generator", OTHER)
    label = page.get_by_role("tabpanel").locator("visible=true").get_by_label("Class", exact=True)
    page.wait_for_function("(input) => input.value === 'right'", arg=label.element_handle())
    generate(page)
    complete(page)
    first, second = shown(page)
    np.testing.assert_array_equal(first, states_of(weights, VCA)[2].reshape(COUNT, -1, 3))
    np.testing.assert_array_equal(second, states_of(weights, OTHER)[2].reshape(COUNT, -1, 3))
    label.click()
    page.get_by_role("option", name=LABEL, exact=True).wait_for()
    assert [name for name in LABELS if page.get_by_role("option", name=name, exact=True).count()] == [LABEL]


def test_stop_and_forgotten_pictures_and_the_way_back(page, forwards, picture):
    forwards.delay = 0.1
    generate(page, steps=250)
    page.wait_for_selector(".vc progress:visible")
    page.locator(".vc").get_by_role("button", name="Stop").click()
    page.wait_for_selector(".vc .vv-note:has-text('the same noise')")
    forwards.delay = 0
    generate(page)
    complete(page)
    page.route("**/component_server/", lambda route: route.fulfill(json=dict(expired=True)))
    page.locator(".vc .vv-timeline input").fill("2")
    page.wait_for_selector(".vc .vv-note:has-text('Please generate them again')")
    page.unroute("**/component_server/")
    page.get_by_label("Classifiers", exact=True).check()
    page.wait_for_selector(".vc .vv-note:has-text('Drop an image')")
    send(page, picture)
    complete(page)
    assert page.locator(".vc-side h2").first.inner_text() == PLAIN
    assert page.locator(".vc-film").is_hidden()
    page.get_by_label("Generators", exact=True).check()
    page.wait_for_selector(".vc .vv-note:has-text('the same noise')")


def test_a_problem_is_said_in_a_sentence(page):
    generate(page, steps=250, seed=-1)
    page.wait_for_selector(".vc .vv-problem:has-text('seed must be a whole number')")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_fits_a_phone(page, theme):
    generate(page)
    complete(page)
    page.wait_for_selector(".vc-facts tr:last-child td:has-text(' ms')")
    page.wait_for_timeout(500)
    assert our_faults(page) == []
    page.set_viewport_size(dict(width=390, height=844))
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
