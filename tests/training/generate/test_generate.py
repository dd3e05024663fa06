"""Training a generator end to end at tiny size: resume after kill -9, grids, cards, latents, samples."""

import random
import re
import signal
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vca
from tests.helpers.generator_runs import CLASSES, command, train_here, untimed_log
from tests.helpers.runs import run, start_and_signal_command
from training import evaluate
from training.core import recipe as recipes
from training.core.generator_recipe import GeneratorRecipe
from training.core.metrics import draw_times, validation_loss
from training.core.plots import grid_png
from training.data.images import open_splits
from training.generate import open_data
from vca.checkpoint import place


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(data, finished, tmp_path):
    out = tmp_path / "killed"
    code, _ = start_and_signal_command(command(data, out), out, signal.SIGKILL, random.uniform(0, 0.3))
    assert code in (-signal.SIGKILL, 0)
    result = run(command(data, out))
    assert result.returncode == 0 and "resumed" in result.stderr, result.stderr
    for name in ("model.safetensors", "config.json", "samples.png"):
        whole, killed = (folder / "checkpoint" / name for folder in (finished, out))
        assert whole.read_bytes().replace(bytes(finished), bytes(out)) == killed.read_bytes(), name
    assert untimed_log(finished / "log.jsonl") == untimed_log(out / "log.jsonl")


def test_a_finished_run_trained_longer_ends_with_the_bytes_of_a_long_one(data, finished, tmp_path):
    out = tmp_path / "grown"
    assert run(command(data, out, steps=3)).returncode == 0
    assert vca.load(out / "checkpoint").training_history[-1]["steps"] == 3
    result = run(command(data, out))
    assert result.returncode == 0 and "resumed" in result.stderr, result.stderr
    for name in ("model.safetensors", "samples.png"):
        long, grown = (folder / "checkpoint" / name for folder in (finished, out))
        assert long.read_bytes() == grown.read_bytes(), name


def test_evaluation_prints_the_number_of_the_card(data, finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", str(finished / "checkpoint"), "--data", str(data), "--device", "cpu"])
    evaluate.main()
    printed = re.fullmatch(r"validation loss (\d\.\d{4})  \(15 images\)\n", capsys.readouterr().out)
    assert f"Validation loss {printed[1]} on 15 images" in (finished / "checkpoint" / "README.md").read_text()


def test_sigterm_saves_and_exits_with_zero(data, tmp_path):
    out = tmp_path / "run"
    code, stderr = start_and_signal_command(command(data, out, steps=100000), out, signal.SIGTERM, 0)
    assert code == 0, stderr
    step = int(re.search(r"state saved at step (\d+)", stderr).group(1))
    assert (out / f"state-{step:08d}.pt").exists() and not (out / "checkpoint").exists()


def test_the_run_folder_shows_and_the_card_tells_what_was_trained(data, finished):
    checkpoint = finished / "checkpoint"
    assert {p.name for p in checkpoint.iterdir()} == {
        "config.json", "model.safetensors", "README.md", "log.jsonl", "samples.png",
    }  # fmt: skip
    grids = sorted(finished.glob("samples/*.png"))
    assert [grid.name for grid in grids] == ["step-00000007.png", "step-00000014.png"]
    assert Image.open(grids[0]).size == (3 * 8, 8 * 8)
    assert (finished / "curve.png").stat().st_size > 1000
    log = untimed_log(finished / "log.jsonl")
    assert [line["step"] for line in log if "val_loss" in line] == [7, 14]
    assert [line["lr"] for line in log if "lr" in line] == [5e-4]

    model = vca.load(checkpoint)
    assert model.label_names == list(CLASSES) and model.sample_shape == (3, 8, 8)
    images = model.sample(list(range(3)) * 8, steps=2, guidance_scale=2.0)
    assert grid_png(images, 3) == (checkpoint / "samples.png").read_bytes()
    card = (checkpoint / "README.md").read_text()
    entry = model.training_history[-1]
    assert entry["steps"] == 14 and entry["train_images"] == 60
    for fact in (
        f"Validation loss {entry['results']['val_loss']:.4f} on 15 images", "seed 0", "on own data", "euler",
        "2 steps, guidance 2", "exponential moving average", "python -m training.generate cifar10_sit_vca", "sha256",
        "No FID",
    ):  # fmt: skip
        assert fact in card, fact


def test_validation_loss_is_repeatable_and_comparable(data, finished):
    recipe = recipes.read("cifar10_sit_vca", GeneratorRecipe, dict(input_size="8", batch_size="16", workers="0"))
    opened = open_data(recipe, *open_splits(str(data)), torch.device("cpu"))
    model = vca.load(finished / "checkpoint")
    assert opened.val_samples.shape == (15, 3, 8, 8) and opened.val_samples.abs().max() <= 1
    whole = validation_loss(model, opened.val_samples, opened.val_labels)
    assert whole == pytest.approx(model.training_history[-1]["results"]["val_loss"], abs=1e-5)
    assert whole == pytest.approx(validation_loss(model, opened.val_samples, opened.val_labels, batch_size=4), rel=1e-5)
    x, _ = next(opened.batches.epoch(0, 0))
    assert x.shape == (16, 3, 8, 8) and x.min() >= -1 and x.max() <= 1


def test_init_starts_from_the_weights_and_diffusion_trains_in_the_same_loop(data, finished, tmp_path):
    first = finished / "checkpoint"
    train_here(data, tmp_path / "second", init=str(first), lr=1e-12, sample_every=0, steps=2)
    old, new = (load_file(c / "model.safetensors") for c in (first, tmp_path / "second" / "checkpoint"))
    assert all(torch.allclose(old[key], new[key], atol=1e-6) for key in old)
    assert [bool(entry["init"]) for entry in vca.load(tmp_path / "second" / "checkpoint").training_history] == [0, 1]
    card = (tmp_path / "second" / "checkpoint" / "README.md").read_text()
    assert card.index("from random weights") < card.index(f"(`--init {place(first)}`)")
    assert "      python -m training.generate cifar10_sit_vca" in card and "\n      command\n" in card
    options = dict(model="dit_xs_4", time_sampling="uniform", attention="mhsa_dwc", micro_batch=5)
    train_here(data, tmp_path / "dit", **options)
    assert vca.load(tmp_path / "dit" / "checkpoint").family == "dit"
    assert "ddpm, 2 steps" in (tmp_path / "dit" / "checkpoint" / "README.md").read_text()


def test_times_are_drawn_as_the_objective_needs_them():
    torch.manual_seed(0)
    t = draw_times("dit", "uniform", 5000, "cpu")
    assert t.dtype == torch.long and t.min() >= 0 and t.max() <= 999 and len(t.unique()) > 900
    uniform, middle = (draw_times("sit", kind, 5000, "cpu") for kind in ("uniform", "logit_normal"))
    assert uniform.min() >= 0 and uniform.max() <= 1 and middle.std() < 0.22 < uniform.std()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(model="vca_vit_pico_patch4_32"), "is no generator"),
        (dict(model="dit_xs_4"), "'logit_normal' is for SiT"),
        (dict(time_sampling="cosine"), "must be one of uniform, logit_normal"),
        (dict(class_dropout="1.0"), "class_dropout = 1.0 must lie in"),
        (dict(steps="0"), "steps = 0 must be positive"),
    ],
)
def test_bad_recipes_are_refused_in_words(overrides, message):
    with pytest.raises(recipes.RecipeError, match=re.escape(message)):
        recipes.read("cifar10_sit_vca", GeneratorRecipe, overrides)


@pytest.mark.parametrize("pair", ["cifar10_sit_{}", "cifar10_sit_{}_gpu", "imagenet_{}sit_b_2", "imagenet_{}dit_s_4"])
def test_twins_differ_in_the_attention_alone(pair):
    names = ("vca_", "") if pair.startswith("imagenet") else ("vca", "mhsa")
    ours, baseline = (recipes.read(pair.format(name), GeneratorRecipe, {}) for name in names)
    assert ours.model == f"vca_{baseline.model}"
    assert {**vars(ours), "model": ""} == {**vars(baseline), "model": ""}
