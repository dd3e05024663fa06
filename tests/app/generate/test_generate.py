"""Generating in the app: over HTTP, in a real browser, and what a run keeps."""

import json
import time

import numpy as np
import pytest
import torch
from gradio_client.exceptions import AppError
from PIL import Image

import vca
from app.runtime import sampling
from app.runtime.checkpoints import Checkpoints
from app.runtime.sampling import enlarged, tiled
from app.tabs import generate
from app.ui import build
from tests.helpers.app import LABELS, PLAIN
from tests.helpers.generate_tab import (
    DIT,
    LATENT,
    SETTINGS,
    SIT,
    make_run,
    sampled,
    save_generator,
    save_latent_generator,
)
from vca.diffusion.sampling import to_bytes

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
    assert "\n" not in said and "cannot load the autoencoder" in said and "no autoencoder" in said


def test_one_request_is_served_at_a_time(client, forwards):
    jobs = [client.submit(**SETTINGS | dict(model=SIT, seed=seed), api_name="/generate") for seed in range(3)]
    assert all(len(job.result(timeout=60)) == 3 for job in jobs)
    assert len(forwards) == 3 * SETTINGS["steps"] and {call["running"] for call in forwards} == {1}


def test_without_a_generator_the_tab_says_how_to_train_one(tmp_path):
    demo = build(tmp_path)
    words = "".join(str(block.value) for block in demo.blocks.values() if hasattr(block, "value"))
    assert "python -m training.generate cifar10_sit_vca" in words


def test_what_suits_a_generator_best_is_what_the_app_does(tmp_path):
    best = dict(steps=5, guidance_scale=2.5, guidance_interval=[0.3, 0.7], time_shift=2.0)
    save_generator(tmp_path / SIT, "vca_sit_xs_4", input_size=(16, 24), sampling=best)
    assert sampling.defaults_of(Checkpoints(tmp_path).configs[SIT]) == (5, 2.5)
    assert sampling.defaults_of({}) == (50, 3)
    run = make_run(tmp_path, steps=5, guidance=2.5)
    run.sample(lambda *_: None)
    model = vca.load(tmp_path / SIT)
    assert model.sampling == best
    expected = model.sample(["right"] * 3, seed=SETTINGS["seed"], **model.sampling)
    assert torch.equal(run.images, expected)
    assert run.time(2) == model.times(5, "euler", 2.0)[2] != 2 / 5
    assert "guidance 2.5 from 0.3 to 0.7 of the way" in run.caption(2, 0, without_class=False)
    t = run.time(1)  # before 0.3: not guided
    velocity = model.conditioned(torch.tensor([LABELS.index("right")] * 3))(run.states[1], torch.full((3,), t))
    alone = to_bytes(model.decode(run.states[1] + (1 - t) * velocity.detach())).permute(0, 2, 3, 1).flatten(0, 1)
    assert t < 0.3 and np.abs(np.asarray(run.predicted(1)).astype(int) - alone.numpy()).max() <= 1


def test_the_class_chosen_at_first_is_the_one_recognized_most():
    def config(*shares, **quality) -> dict:
        rows = [dict(guidance=1, recognised_by_class=[9] * 4), dict(guidance=3, recognised_by_class=list(shares))]
        results = dict(quality=dict(guidance=rows, best_guidance=3) | quality)
        return dict(label_names=LABELS, training=[dict(results=results)])

    assert generate._first(config(40, 90.5, 12, 90.5)) == LABELS[1]
    strange = [config("x", 1, 2, 3), config(None), config(), config(1, 2, best_guidance=7), config(guidance=5)]
    unknown = [dict(label_names=LABELS, training=training) for training in ([], ["none"], [dict(results=None)])]
    assert {generate._first(one) for one in (*strange, *unknown)} == {LABELS[0]}


def test_opening_the_tab_loads_its_generator_but_fetches_nothing(tmp_path, weights, monkeypatch):
    save_latent_generator(tmp_path / "latents")
    checkpoints = Checkpoints(tmp_path)
    generate.prepare(checkpoints)
    decoder = checkpoints.load_generator("latents").latent_decoder
    opened = []
    monkeypatch.setattr("vca.diffusion.vae.LatentDecoder.load", lambda self, device: opened.append(self.source))
    generate.prepare(checkpoints)
    assert opened == [decoder.source]
    monkeypatch.setattr(checkpoints, "generators", [])
    generate.prepare(checkpoints)
    for name in (LATENT, SIT):  # an autoencoder that is nowhere here, and none
        others = Checkpoints(weights)
        monkeypatch.setattr(others, "generators", [name])
        generate.prepare(others)
    assert len(opened) == 1


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
    with pytest.raises(Exception, match="cannot load the autoencoder"):
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


def test_latents_of_a_small_autoencoder_are_shown_decoded_at_every_step(tmp_path, monkeypatch):
    save_latent_generator(tmp_path / "latents")
    run = make_run(tmp_path, "latents")
    seen = dict(run.progress())
    decoded = to_bytes(run.model.decode(run.states[3])).permute(0, 2, 3, 1).flatten(0, 1)
    np.testing.assert_array_equal(np.asarray(run.frame(3)), decoded)
    assert seen and run.images.shape == (3, 3, 8, 8) and run.predicted(2).size == (8, 24)
    monkeypatch.setattr("vca.diffusion.vae.SMALL", 100)
    channels = to_bytes((run.states[3] / 4 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).flatten(0, 1)
    np.testing.assert_array_equal(np.asarray(run.frame(3)), channels)


def test_small_pictures_are_enlarged_smoothly():
    edge = Image.fromarray(np.repeat([[0, 0, 255, 255]], 4, axis=0).astype(np.uint8)).convert("RGB")
    for large in (enlarged(edge), tiled(edge, 1)):
        row = np.asarray(large)[large.height // 2, :, 0].astype(int)
        assert row[0] == 0 and row[-1] == 255 and len(set(row)) > 20
        assert np.abs(np.diff(row)).max() < 64, "no step as of one pixel to the next"
