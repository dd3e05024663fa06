"""Alignment with a pretrained model: its features, stored and online; what is learned; and that it leaves no trace."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vca
from tests.helpers.autoencoders import FakeDecoder, toy_teacher
from tests.helpers.generator_runs import command, train_here, untimed_log, write_images
from tests.helpers.runs import run, start_and_signal_command
from training import features
from training.core import recipe as recipes
from training.core.align import Aligned
from training.core.generator_recipe import GeneratorRecipe
from training.data.errors import DataError
from training.data.features import Features
from training.data.images import Images, open_splits
from training.data.latents import Latents, encode
from training.generate import open_data

CPU = torch.device("cpu")
ALIGN = dict(align_weight=0.5, align_block=3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(toy_teacher(tmp_path_factory.mktemp("teacher") / "teacher"))


@pytest.fixture(scope="module")
def stored(data, teacher, tmp_path_factory):
    """The features of the images, 2 x 2 patches."""
    out = tmp_path_factory.mktemp("features")
    arguments = ["--data", str(data), "--out", str(out), "--teacher", teacher, "--image-size", "8", "--grid", "2",
                 "--precision", "fp32", "--batch-size", "7", "--workers", "0", "--device", "cpu"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["features", *arguments])
        features.main()
    return str(out)


@pytest.fixture(scope="module")
def cached(data, tmp_path_factory):
    """Latents of the images, of side 4."""
    out = tmp_path_factory.mktemp("latents")
    for split in ("train", "val"):
        encode(Images(data, split), out / split, FakeDecoder("fake"), 8, batch_size=7, workers=0, device="cpu")
    return out


def batches(data, teacher):
    overrides = dict(input_size="8", batch_size="16", workers="0", precision="fp32")
    recipe = recipes.read("cifar10_sit_vca", GeneratorRecipe, overrides)
    return open_data(recipe, *open_splits(str(data)), CPU, teacher=teacher).batches


def test_stored_and_online_features_are_those_of_the_images_as_they_are_seen(data, teacher, stored):
    assert Features(stored, "train").shape == (4, 128) and Features(stored, "train").array.dtype == np.float16
    ours, online, plain = batches(data, stored), batches(data, teacher), batches(data, "")
    for mine, theirs, two in zip(ours.epoch(1, 0), online.epoch(1, 0), plain.epoch(1, 0), strict=True):
        assert len(two) == 2 and torch.equal(mine[0], two[0]) and torch.equal(theirs[0], two[0])
        assert torch.allclose(mine[2].float(), theirs[2], rtol=1e-2, atol=1e-2)
        model = vca.load(teacher)
        model.set_input_size(img_size=(8, 8))
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        whole = model.forward_features((two[0] / 2 + 0.5 - mean) / std)
        assert torch.allclose(theirs[2], whole[:, model.num_prefix_tokens :], atol=1e-4)


def test_the_loss_is_the_generators_own_and_the_cosine_distance_of_the_blocks_tokens():
    torch.manual_seed(0)
    model = vca.create_model("vca_sit_xs_4", input_size=8, dim=20, depth=3, num_classes=3)
    aligned = Aligned(model, 2, 6)
    for parameter in aligned.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, noise, y, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0, 3]), torch.tensor([0.2, 0.9])
    target = torch.randn(2, 4, 6)
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out))
    own = model.loss(x, y, noise, t)
    handle.remove()
    projected = aligned.projector(seen[0]).detach().double().numpy()
    theirs = target.double().numpy()
    norms = np.linalg.norm(projected, axis=2) * np.linalg.norm(theirs, axis=2)
    distance = (1 - (projected * theirs).sum(2) / norms).mean(1)
    loss = aligned.loss(x, y, noise, t, target, 0.5)
    assert np.allclose(loss.detach().numpy(), own.detach().numpy() + 0.5 * distance, atol=1e-5)
    assert aligned.distance() == pytest.approx(distance.mean(), abs=1e-5)


@pytest.fixture(scope="module")
def aligned_run(data, stored, tmp_path_factory):
    out = tmp_path_factory.mktemp("aligned") / "whole"
    result = run([*command(data, out, **ALIGN, log_every=1), "--teacher", stored])
    assert result.returncode == 0, result.stderr
    return out


def test_tokens_come_closer_and_the_checkpoint_knows_nothing_of_it(finished, aligned_run, stored):
    distances = [line["align"] for line in untimed_log(aligned_run / "log.jsonl") if "align" in line]
    assert len(distances) == 14 and distances[-1] < 0.9 * distances[0]
    plain, aligned = (vca.load(folder / "checkpoint") for folder in (finished, aligned_run))
    assert plain.state_dict().keys() == aligned.state_dict().keys()
    assert aligned.training_history[-1]["recipe"]["align_weight"] == 0.5
    seen = json.loads((Path(stored) / "train" / "index.json").read_text())["teacher"]
    assert aligned.training_history[-1]["teacher"] == seen and seen.endswith("/teacher"), "not the folder of features"
    assert f"its block 3 aligned with `{seen}`" in (aligned_run / "checkpoint" / "README.md").read_text()


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(data, stored, aligned_run, tmp_path):
    arguments = [*command(data, tmp_path / "killed", **ALIGN, log_every=1), "--teacher", stored]
    start_and_signal_command(arguments, tmp_path / "killed", signal.SIGKILL, 0.05)
    result = run(arguments)
    assert result.returncode == 0, result.stderr
    same = "checkpoint/model.safetensors"
    assert (tmp_path / "killed" / same).read_bytes() == (aligned_run / same).read_bytes()
    assert untimed_log(tmp_path / "killed" / "log.jsonl") == untimed_log(aligned_run / "log.jsonl")


def test_cached_latents_of_any_autoencoder_train_with_stored_features(cached, stored, tmp_path):
    options = dict(steps=2, batch_size=4, time_sampling="uniform", input_size=4, sample_every=0, **ALIGN)
    with pytest.raises(DataError, match="holds 4 features an image; the model has 1 x 1"):
        train_here(cached, tmp_path / "run", recipe="imagenet_vca_sit_s_4", teacher=stored, **options)
    options |= dict(model="vca_sit_xs_2", vae="somewhere/sd-vae", in_channels=4)
    train_here(cached, tmp_path / "run", recipe="imagenet_vca_sit_s_4", teacher=stored, **options)
    assert Latents(cached, "train").names() == Features(stored, "train").names()
    model = vca.load(tmp_path / "run" / "checkpoint")
    assert model.sample_shape == (4, 4, 4) and model.latent_decoder.source == "somewhere/sd-vae"


def test_what_does_not_fit_is_refused_in_words(data, cached, teacher, stored, tmp_path):
    with pytest.raises(recipes.RecipeError, match=r"align_weight = 0\.5 needs a --teacher"):
        train_here(data, tmp_path / "a", **ALIGN)
    with pytest.raises(recipes.RecipeError, match=r"align_weight = 0 is for no --teacher"):
        train_here(data, tmp_path / "a", teacher=teacher)
    with pytest.raises(recipes.RecipeError, match="align_block = 9, but the model has 8 blocks"):
        train_here(data, tmp_path / "a", teacher=teacher, align_weight=0.5, align_block=9)
    latents = dict(model="vca_sit_xs_2", vae="fake", in_channels=4, input_size=4, sample_every=0)
    with pytest.raises(recipes.RecipeError, match="cached latents have no images for --teacher to see"):
        train_here(cached, tmp_path / "b", teacher=teacher, **latents, **ALIGN)
    for split in ("train", "val"):
        write_images(tmp_path / "other", split, 8, seed=0)
    with pytest.raises(DataError, match="holds the features of other images than --data"):
        train_here(tmp_path / "other", tmp_path / "c", teacher=stored, **ALIGN)


def test_a_smoke_run_needs_no_teacher(monkeypatch, capsys):
    from training import generate

    for recipe in ("scenes_sit_vca_align", "scenes_sit_vca_latents_4_align"):
        arguments = ["--smoke", "2", "--batch-size", "2", "--compile", "false", "--device", "cpu", "--workers", "0"]
        monkeypatch.setattr(sys, "argv", ["generate", recipe, *arguments])
        generate.main()
        assert "smoke: 2 steps of 2 images" in capsys.readouterr().out


@pytest.mark.parametrize("space", ["", "_latents_4", "_latents_2"])
@pytest.mark.parametrize("align", ["", "_align"])
def test_recipes_of_scenes_differ_in_what_they_compare_alone(space, align):
    ours, twin, plain = (
        recipes.read(name, GeneratorRecipe, {})
        for name in (f"scenes_sit_vca{space}{align}", f"scenes_sit_mhsa{space}{align}", f"scenes_sit_vca{space}")
    )
    assert ours.model == f"vca_{twin.model}" and {**vars(ours), "model": ""} == {**vars(twin), "model": ""}
    differs = {key for key in vars(ours) if vars(ours)[key] != vars(plain)[key]}
    assert differs == ({"align_weight", "align_block"} if align else set())
    pixels = vars(recipes.read("scenes_sit_vca", GeneratorRecipe, {}))
    differs = {key for key in vars(plain) if vars(plain)[key] != pixels[key]}
    assert differs <= {"model", "vae", "in_channels", "input_size"}
    patches = plain.input_size // int(plain.model[-1])
    assert patches == 8
