"""Generating in the app: over HTTP, in a real browser, and what a run keeps."""

import json
import time

import numpy as np
import pytest
import torch
from gradio_client.exceptions import AppError
from PIL import Image

import vca
from app.generation import Run, check_request
from app.ui import build
from tests.browser import PATIENCE, needs_browser
from tests.test_app import LABELS, PLAIN, save_checkpoints
from tests.test_browser import READ, expected_rows, our_faults
from vca.models.dit import DiffusionTransformer
from vca.sampling import to_bytes

SIT, DIT, LATENT = "vca_small_sit", "vca_small_dit", "a_latent_dit"
SETTINGS = dict(label="right", count=3, steps=6, guidance=2.0, seed=11, sampler="euler")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Small generators of pixels, one of latents whose autoencoder is nowhere, and classifiers."""
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoints(folder)
    save_generator(folder / SIT, "vca_sit_xs_4", input_size=(16, 24))
    save_generator(folder / DIT, "vca_dit_xs_4", input_size=16)
    save_generator(folder / LATENT, "dit_s_8", input_size=8, vae=str(folder / "no autoencoder"))
    return folder


def save_generator(folder, architecture: str, labels=LABELS, **options) -> None:
    """Saves a small generator with random weights."""
    model = vca.create_model(architecture, num_classes=len(labels), dim=24, depth=2, num_heads=3, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(0.1 * torch.randn_like(parameter))
    vca.save(model, folder, label_names=labels)


class Calls(list):
    """What every forward pass of a generator was asked, and how many ran then. Each takes `delay` seconds more."""

    delay = 0.03


@pytest.fixture
def forwards(monkeypatch) -> Calls:
    """The forward passes from now on."""
    calls, running, forward = Calls(), [0], DiffusionTransformer.forward

    def slow(self, x, t, y):
        running[0] += 1
        calls.append(dict(x=x, t=t, y=y, running=running[0]))
        try:
            time.sleep(calls.delay)
            return forward(self, x, t, y)
        finally:
            running[0] -= 1

    monkeypatch.setattr(DiffusionTransformer, "forward", slow)
    return calls


def sampled(weights, name: str = SIT, *, callback=None, **changes) -> np.ndarray:
    """The pictures (B, H, W, 3), uint8, as the model itself gives them."""
    asked = SETTINGS | changes
    model = vca.load(weights / name)
    images = model.sample(
        [LABELS.index(asked["label"])] * asked["count"], steps=asked["steps"], guidance_scale=asked["guidance"],
        seed=asked["seed"], sampler=asked["sampler"], callback=callback,
    )  # fmt: skip
    return to_bytes(images).permute(0, 2, 3, 1).numpy()


def make_run(weights, name: str = SIT, **changes) -> Run:
    model = vca.load(weights / name)
    return Run(model, check_request(model, **(SETTINGS | changes)))


# ---- The endpoint


def generated(client, **changes) -> np.ndarray:
    files = client.predict(**(dict(model=SIT) | SETTINGS | changes), api_name="/generate")
    assert all(file.endswith(".png") for file in files)
    return np.stack([np.asarray(Image.open(file)) for file in files])


def test_generate_is_the_model(client, weights):
    np.testing.assert_array_equal(generated(client), sampled(weights))
    pictures = generated(client, model=DIT, sampler=None, guidance=1)
    np.testing.assert_array_equal(pictures, sampled(weights, DIT, sampler="ddpm", guidance=1))


def test_same_seed_same_pictures_whatever_the_count(client):
    many, one = generated(client), generated(client, count=1)
    assert np.abs(many[:1].astype(int) - one).max() <= 2
    assert np.abs(many[:1].astype(int) - generated(client, count=1, seed=12)).max() > 50


def test_models_lists_generators(client):
    by_name = {entry["name"]: entry for entry in client.predict(api_name="/models")}
    assert by_name[PLAIN]["task"] == "classify"
    facts = by_name[SIT]
    assert (facts["task"], facts["classes"], facts["sample_shape"]) == ("generate", LABELS, [3, 16, 24])
    assert facts["samplers"] == ["euler", "heun", "sde"] and facts["vae"] is None
    assert by_name[LATENT]["vae"].endswith("no autoencoder")


WRONG = {
    "unknown label": (dict(label="dog"), "label must be one of: left, right, up, down."),
    "label of another type": (dict(label=["left"]), "label must be one of"),
    "unknown model": (dict(model="nothing"), f"model must be one of: {DIT}, {SIT}, {LATENT}."),
    "a classifier": (dict(model=PLAIN), "model must be one of"),
    "no pictures": (dict(count=0), "count must be a whole number from 1 to 16."),
    "a billion pictures": (dict(count=10**9), "count must be a whole number from 1 to 16."),
    "more than fits a float": (dict(count=10**400), "count must be a whole number from 1 to 16."),
    "half a picture": (dict(count=1.5), "count must be a whole number"),
    "no steps": (dict(steps=0), "steps must be a whole number from 1 to 250."),
    "too many steps": (dict(steps=251), "steps must be a whole number from 1 to 250."),
    "too much at once": (dict(count=16, steps=101), "count times steps may be at most 1600 with euler."),
    "too much for Heun": (dict(count=16, steps=51, sampler="heun"), "count times steps may be at most 800 with heun."),
    "guidance nan": (dict(guidance=float("nan")), "guidance must be a number from 1 to 10."),
    "guidance infinite": (dict(guidance=float("inf")), "guidance must be a number from 1 to 10."),
    "guidance below 1": (dict(guidance=0.5), "guidance must be a number from 1 to 10."),
    "guidance a text": (dict(guidance="2"), "guidance must be a number from 1 to 10."),
    "negative seed": (dict(seed=-1), "seed must be a whole number from 0 to 4294967295."),
    "seed nothing": (dict(seed=None), "seed must be a whole number from 0 to 4294967295."),
    "seed true": (dict(seed=True), "seed must be a whole number"),
    "unknown sampler": (dict(sampler="magic"), "sampler must be one of: euler, heun, sde."),
    "the other family's sampler": (dict(sampler="ddim"), "sampler must be one of: euler, heun, sde."),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_name_the_allowed_ones(client, weights, name):
    changes, words = WRONG[name]
    try:
        json.dumps(changes, allow_nan=False)
    except ValueError:  # the client refuses to send it, another may not
        with pytest.raises(Exception, match=words):
            make_run(weights, **changes)
        return
    with pytest.raises(AppError) as caught:
        generated(client, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_autoencoder_is_named_in_a_line(client):
    with pytest.raises(AppError) as caught:
        generated(client, model=LATENT, sampler=None)
    said = str(caught.value)
    assert "\n" not in said and "335 MB" in said and "no autoencoder" in said


def test_one_request_is_served_at_a_time(client, forwards):
    jobs = [client.submit(**SETTINGS | dict(model=SIT, seed=seed), api_name="/generate") for seed in range(3)]
    assert all(len(job.result(timeout=60)) == 3 for job in jobs)
    assert len(forwards) == 3 * SETTINGS["steps"] and {call["running"] for call in forwards} == {1}


def test_without_a_generator_the_tab_says_how_to_train_one(tmp_path):
    demo = build(tmp_path)
    words = "".join(str(block.value) for block in demo.blocks.values() if hasattr(block, "value"))
    assert "python -m training.generate cifar10_sit_vca" in words


# ---- A run


@pytest.mark.parametrize("steps", [1, 6, 50, 51, 250])
def test_kept_states_are_bounded_and_end_with_the_last(weights, steps):
    run, seen = make_run(weights, steps=steps, count=1, guidance=1), {}
    run.sample(lambda step, total, x: seen.update({step: x}))
    assert set(seen) == set(range(steps + 1))
    assert min(run.states) == 0 and max(run.states) == steps - 1
    assert len(run.states) == steps if steps <= 50 else 50 <= len(run.states) <= 51
    assert all(torch.equal(x, seen[step]) for step, x in run.states.items())
    held = sum(x.numel() * x.element_size() for x in run.states.values())
    assert held <= run.size <= held + 8 * seen[0].numel()


def test_progress_is_at_most_twelve_a_second_and_closing_it_ends_the_run(weights, forwards):
    run = make_run(weights, steps=250)
    progress, times = run.progress(), []
    for _ in range(6):
        next(progress)
        times.append(time.perf_counter())
    assert times[5] - times[0] >= 5 / 12
    progress.close()
    time.sleep(0.2)
    done = len(forwards)
    time.sleep(0.3)
    assert len(forwards) == done < 100 and run.images is None


def test_progress_goes_forward_and_ends_with_the_pictures(weights, forwards):
    run = make_run(weights)
    steps = [step for step, _ in run.progress()]
    assert steps == sorted(steps) and len(set(steps)) >= 2 and steps[0] < 6
    np.testing.assert_array_equal(to_bytes(run.images).permute(0, 2, 3, 1), sampled(weights))


def test_what_fails_in_the_thread_is_raised_where_it_was_asked_for(weights):
    with pytest.raises(Exception, match="335 MB"):
        list(make_run(weights, LATENT, sampler=None).progress())


@pytest.mark.parametrize("name, sampler", [(SIT, "euler"), (SIT, "heun"), (DIT, "ddim"), (DIT, "ddpm")])
@pytest.mark.parametrize("without_class", [False, True])
def test_the_maps_of_a_step_are_those_of_the_sampling(weights, forwards, name, sampler, without_class):
    run = make_run(weights, name, sampler=sampler)
    run.sample(lambda *_: None)
    step, picture = 4, 1
    asked = forwards[2 * step if sampler == "heun" else step]
    row = picture + 3 * without_class  # the batch is the pictures with the class, then those without
    with torch.no_grad(), vca.record(run.model) as maps:
        run.model(asked["x"], asked["t"], asked["y"])
    expected = [(layer.effective[row], layer.stage1.negative[row]) for layer in maps]
    found = run.record(step, picture, without_class)
    assert len(found) == 2 and found[0].effective.shape[0] == 1
    for layer, (effective, negative) in zip(found, expected, strict=True):
        torch.testing.assert_close(layer.effective[0], effective, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.stage1.negative[0], negative, atol=1e-6, rtol=1e-4)
    words = run.caption(step, picture, without_class)
    assert f"t = {asked['t'][0].item():.4g}," in words
    assert words.endswith("told no class" if without_class else "told the class")


# ---- In the browser


@pytest.fixture
def page(page, url):
    """The Generate tab."""
    open_tab(page, url)
    return page


def open_tab(page, url: str) -> None:
    page.goto(url)
    page.get_by_role("tab", name="Generate").click()
    choose_pixels(page)


def choose_pixels(page) -> None:
    """Chooses the model of pixels, and waits until the form offers what it has."""
    choose(page, "Model", SIT)
    page.wait_for_function("() => document.querySelector('input[aria-label=Sampler]').value === 'euler'")


def choose(page, label: str, option: str) -> None:
    page.get_by_role("tabpanel").locator("visible=true").get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


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

    page.locator(".vg .vv-timeline input").fill("4")
    page.locator(".vg-grid button").nth(2).click()
    model = vca.load(weights / SIT)
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
    page.wait_for_selector(".vca-strip")
    assert page.locator("[data-testid=label-output-value]").inner_text() in LABELS


@needs_browser
def test_problems_are_said_in_a_sentence(page):
    generate(page, count=16, steps=250)
    page.wait_for_selector(".vg .vv-problem:has-text('count times steps may be at most 1600 with euler.')")
    choose(page, "Model", LATENT)
    page.wait_for_selector(".vca-hint:has-text('335 MB')")
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
    second = running.new_page()
    second.set_default_timeout(PATIENCE)
    open_tab(second, url)
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
    second.close()


@needs_browser
def test_a_closed_page_ends_its_run(running, url, forwards):
    page = running.new_page()
    page.set_default_timeout(PATIENCE)
    open_tab(page, url)
    generate(page, steps=250)
    page.wait_for_selector(".vg[data-state=running] canvas")
    page.close()
    for _ in range(30):
        before = len(forwards)
        time.sleep(0.5)
        if len(forwards) == before:
            break
    assert len(forwards) == before < 250


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_tab_is_accessible_and_fits_a_phone(page, url, theme):
    open_tab(page, f"{url}?__theme={theme}")
    generate(page)
    ended(page, "complete")
    page.wait_for_timeout(500)
    assert our_faults(page) == []
    page.set_viewport_size(dict(width=390, height=844))
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
