"""An autoencoder of our own: what it learns, what it leaves for generators, and that a killed run ends alike."""

import json
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vca
from tests.helpers.autoencoders import command, toy_recipe, toy_teacher
from tests.helpers.generator_runs import train_here, write_images
from tests.helpers.runs import run, start_and_signal_command, untimed_log
from training import autoencoder, latents
from training.core import recipe as recipes
from training.core.autoencoder import Reconstruction, measure
from training.core.autoencoder_recipe import AutoencoderRecipe
from training.core.features import at_side, misalignment, on_grid
from training.data.errors import DataError
from training.data.images import Images, eval_transform, generator_cfg
from training.data.latents import LatentBatches, Latents, open_latents
from vca.diffusion.vae import LatentDecoder

pytest.importorskip("diffusers", reason="diffusers, which has the autoencoder, is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of 16 px, a teacher, and a recipe."""
    root = tmp_path_factory.mktemp("autoencoder")
    write_images(root / "data", "train", 14, seed=0, size=16)
    write_images(root / "data", "val", 4, seed=1, size=16)
    toy_teacher(root / "teacher")
    toy_recipe(root)
    return root


@pytest.fixture(scope="module")
def undisturbed(place):
    result = run(command(place, place / "undisturbed"))
    assert result.returncode == 0 and "PSNR" in result.stdout, result.stderr
    return place / "undisturbed"


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(place, undisturbed):
    out = place / "killed"
    start_and_signal_command(command(place, out), out, signal.SIGKILL, 0.05)
    result = run(command(place, out))
    assert result.returncode == 0, result.stderr
    for name in ("diffusion_pytorch_model.safetensors", "config.json", "samples.png"):
        whole, killed = (folder / "checkpoint" / name for folder in (undisturbed, out))
        assert whole.read_bytes() == killed.read_bytes(), name
    assert untimed_log(undisturbed / "log.jsonl") == untimed_log(out / "log.jsonl")


def test_the_result_is_diffusers_own_folder_with_what_was_measured(place, undisturbed):
    folder = undisturbed / "checkpoint"
    made = json.loads((folder / "results.json").read_text())
    assert made["steps"] == 12 and made["train_images"] == 42 and made["results"]["images"] == 10
    assert str(place) not in json.dumps(made)
    recipe = recipes.read(str(place / "toy.toml"), AutoencoderRecipe, {})
    model = Reconstruction(recipe)
    model.autoencoder.load_state_dict(LatentDecoder(str(folder)).load(CPU).state_dict())
    images = Images(place / "data", "val", eval_transform(generator_cfg(16)))
    held_out = torch.stack([images[i][0] for i in range(len(images))])[:10]
    found = measure(model, at_side(str(place / "teacher"), 32, [0, 2], CPU), held_out)
    assert found == pytest.approx(made["results"], abs=2e-4)

    log = untimed_log(undisturbed / "log.jsonl")
    assert [line["step"] for line in log if "psnr" in line] == [6, 12]
    assert np.mean([line["loss"] for line in log[-5:-1]]) < log[0]["loss"]
    assert Image.open(undisturbed / "samples" / "step-00000012.png").size == (10 * 16, 2 * 16)
    assert (undisturbed / "curve.png").stat().st_size > 1000


def test_psnr_and_l1_are_those_of_the_pixels(place):
    class Gray(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode(self, x):
            return self

        autoencoder = latent_dist = property(lambda self: self)

        def mode(self):
            return torch.zeros(3, 3, 16, 16)

        def decode(self, z):
            self.sample = z + 0.5
            return self

    images = torch.tensor([-0.5, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    found = measure(Gray(), at_side(str(place / "teacher"), 32, [0], CPU), images)
    errors = np.array([1.0, 0.5, 0.5])
    assert found["l1"] == pytest.approx(errors.mean(), abs=1e-5)
    assert found["psnr"] == pytest.approx(np.mean(-20 * np.log10(errors / 2)), abs=1e-4)


def test_latents_have_mean_zero_and_deviation_one_and_come_back_as_the_image(place, undisturbed):
    vae = LatentDecoder(str(undisturbed / "checkpoint"))
    assert vae.stride == 2
    train, _ = open_latents(str(place / "data"), vae, (3, 8, 8), 0)
    indices, plain = torch.arange(len(train)), torch.zeros(len(train))
    moments = train.read(indices, plain)
    latents = train.scaling.apply(moments.chunk(2, 1)[0])
    variance = moments.chunk(2, 1)[1].exp() * torch.tensor(train.scaling.factor).view(1, -1, 1, 1) ** 2
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    total = (latents.square() + variance).mean((0, 2, 3))
    assert torch.allclose(total, torch.ones(3), atol=1e-3)
    theirs = vae.load(CPU)
    assert torch.allclose(vae.decode(latents[:2]), theirs.decode(moments[:2].chunk(2, 1)[0]).sample, atol=1e-5)


@pytest.fixture(scope="module")
def cached(place, undisturbed):
    arguments = ["latents", "--data", str(place / "data"), "--out", str(place / "latents"), "--image-size", "16",
                 "--vae", str(undisturbed / "checkpoint"), "--batch-size", "5", "--workers", "0",
                 "--device", "cpu"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        latents.main()
    return place / "latents"


def test_cached_and_online_latents_give_the_same_batches(place, undisturbed, cached):
    vae = LatentDecoder(str(undisturbed / "checkpoint"))
    shared = dict(batch_size=12, seed=3, device=CPU)
    stored, online = (
        LatentBatches(open_latents(str(data), vae, (3, 8, 8), 0)[0], **shared) for data in (cached, place / "data")
    )
    pairs = [pair for epoch in (0, 1) for pair in zip(stored.epoch(epoch, 0), online.epoch(epoch, 0), strict=True)]
    assert len(pairs) == 6
    for (x, y), (other_x, other_y) in pairs:
        assert torch.allclose(x, other_x, atol=1e-5) and torch.equal(y, other_y)


def test_a_generator_trains_on_them_and_its_checkpoint_brings_the_autoencoder(place, undisturbed, cached, tmp_path):
    own = dict(vae=str(undisturbed / "checkpoint"), in_channels=3, input_size=8, steps=2, batch_size=12)
    from_cached = train_here(cached, tmp_path / "cached", **own, sample_every=2)
    online = train_here(place / "data", tmp_path / "online", **own, sample_every=0)
    assert from_cached["val_loss"] == pytest.approx(online["val_loss"], abs=1e-4)
    folder = tmp_path / "moved"
    (tmp_path / "cached" / "checkpoint").rename(folder)
    model = vca.load(folder)
    assert model.model_args["vae"] == "vae" and model.latent_decoder.source == str(folder / "vae")
    images = model.sample([0, 1], steps=2)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    assert Image.open(folder / "samples.png").size == (3 * 16, 8 * 16)
    measured = json.loads((folder / "vae" / "results.json").read_text())["results"]
    card = (folder / "README.md").read_text()
    assert (
        "8x8 latents of its own autoencoder, which is in `vae/`. It predicts" in card
        and '".[latents]"' in card
        and f"PSNR of {measured['psnr']:.2f} dB" in card
    )
    assert str(tmp_path) not in card and "training.autoencoder" in card


def test_latents_of_another_autoencoder_or_shape_are_refused(place, undisturbed, cached, tmp_path):
    other = tmp_path / "other"
    LatentDecoder(str(undisturbed / "checkpoint")).load(CPU).save_pretrained(other)
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"another")
    with pytest.raises(DataError, match="latents of another autoencoder than vae = "):
        open_latents(str(cached), LatentDecoder(str(other)), (3, 8, 8), 0)
    vae = LatentDecoder(str(undisturbed / "checkpoint"))
    with pytest.raises(DataError, match="have 3 channels; the recipe's model takes 4"):
        open_latents(str(cached), vae, (4, 8, 8), 0)
    with pytest.raises(DataError, match="have side 8; the recipe has input_size = 16"):
        open_latents(str(cached), vae, (3, 16, 16), 0)
    assert Latents(cached, "val").scaling == vae.scaling


def test_features_are_those_of_the_last_layer_on_the_grid(place):
    features = on_grid(str(place / "teacher"), 4, CPU)
    assert features.side == 16
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    (tokens,) = features(images)
    cfg = features.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    whole = features.model.forward_features((images / 2 + 0.5 - mean) / std)
    assert tokens.shape == (2, 16, features.model.embed_dim)
    assert torch.allclose(tokens, whole[:, features.model.num_prefix_tokens :], atol=1e-4)
    assert torch.allclose(misalignment(tokens, 3 * tokens), torch.zeros(2), atol=1e-5)
    assert torch.allclose(misalignment(tokens, -tokens), torch.full((2,), 2.0), atol=1e-5)
    with pytest.raises(recipes.RecipeError, match=r"no features of layers \[9\]"):
        at_side(str(place / "teacher"), 32, [9], CPU)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(model="vca_sit_xs_4"), "must be AutoencoderKL"),
        (dict(channels="[8, 9]"), "must be numbers that groups = 4 divides"),
        (dict(image_size="15"), "image_size = 15 is not divisible by the factor 2"),
        (dict(feature_layers="[]"), "feature_layers = [] must be numbers of layers"),
        (dict(kl_weight="-1"), "kl_weight = -1.0 must not be negative"),
    ],
)
def test_bad_recipes_are_refused_in_words(place, overrides, message):
    with pytest.raises(recipes.RecipeError, match=message.replace("[", r"\[").replace("]", r"\]")):
        recipes.read(str(place / "toy.toml"), AutoencoderRecipe, overrides)


def test_plan_smoke_and_a_missing_package(place, monkeypatch, capsys):
    common = ["autoencoder", str(place / "toy.toml"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*common, "--plan", "--data", str(place / "data")])
    autoencoder.main()
    assert "teacher          not counted" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*common, "--smoke", "2", "--batch-size", "2"])
    autoencoder.main()
    assert "smoke: 2 steps of 2 images" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=r"extra \[latents\]"):
        autoencoder.main()
