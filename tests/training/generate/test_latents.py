"""Cached latents, and training on them."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import vca
from tests.helpers.autoencoders import FakeDecoder
from tests.helpers.generator_runs import CLASSES, LATENT, train_here
from tests.helpers.runs import PATIENCE
from training.core.metrics import draw_times
from training.data.batches import epoch_order
from training.data.images import DataError, Images, eval_transform, generator_cfg
from training.data.latents import LatentBatches, Latents, encode
from training.data.seeding import derive_seed
from training.latents import main as encode_main
from vca.diffusion.vae import SCALE, DecoderError, LatentDecoder, sample_latents


def encode_all(data, out, decoder, split="train"):
    encode(Images(data, split), out / split, decoder, 8, batch_size=7, workers=0, device="cpu")


def test_cached_latents_are_those_of_the_images(data, tmp_path):
    decoder = FakeDecoder("fake")
    encode_all(data, tmp_path, decoder)
    latents = Latents(tmp_path, "train")
    assert len(latents) == 60 and latents.shape == (4, 4, 4) and latents.class_names == list(CLASSES)
    pixels = np.asarray(Image.open(data / "train" / "cat" / "003.png"))
    image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).float()[None]
    stored = latents.read(torch.tensor([23, 23]), torch.tensor([False, True]))
    assert torch.allclose(stored, decoder.moments(torch.cat([image, image.flip(-1)])), atol=1e-6)
    assert latents.labels[23] == 1
    online = sample_latents(stored[:1], torch.ones(1, 4, 4, 4))
    assert torch.allclose(online, SCALE * (stored[:1, :4] + np.exp(-1.5)), atol=1e-6)

    batches = LatentBatches(latents, batch_size=16, seed=1, device=torch.device("cpu"))
    whole, rest = list(batches.epoch(2, 0)), list(batches.epoch(2, 1))
    assert len(whole) == 3 and whole[0][0].shape == (16, 4, 4, 4)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[1:], rest, strict=True))
    assert not torch.equal(whole[0][0], next(batches.epoch(3, 0))[0])


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A folder with diffusers' autoencoder, tiny and of random weights: images of side 8 -> latents of side 4."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers, which has the autoencoder, is not installed")
    folder = tmp_path_factory.mktemp("vae")
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(folder)
    return folder


def test_losses_with_cached_moments_equal_those_with_online_encoding(data, autoencoder, tmp_path):
    """Two trainings of the same seeds: one from stored moments, one that flips and encodes each image in each epoch."""
    decoder = LatentDecoder(str(autoencoder))
    encode_all(data, tmp_path, decoder)
    batches = LatentBatches(Latents(tmp_path, "train"), batch_size=20, seed=1, device=torch.device("cpu"))
    images = Images(data, "train", eval_transform(generator_cfg(8)))

    def online(epoch):
        for number, chosen in enumerate(epoch_order(60, 1, epoch).split(20)):
            generator = torch.Generator().manual_seed(derive_seed(1, epoch, number, 3))
            flipped = torch.rand(20, generator=generator) < 0.5
            x = torch.stack([images[i][0].flip(-1 if flip else ()) for i, flip in zip(chosen, flipped, strict=True)])
            with torch.no_grad():
                latents = decoder.load("cpu").encode(x).latent_dist.sample(generator) * SCALE
            yield latents, torch.tensor([images[i][1] for i in chosen])

    losses = []
    for source in (lambda epoch: batches.epoch(epoch, 0), online):
        torch.manual_seed(2)
        model = vca.create_model("vca_dit_xs_2", dim=16, depth=2, num_heads=2, input_size=4, num_classes=3, **LATENT)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for epoch in range(2):
            for x, y in source(epoch):
                loss = model.loss(x, y, torch.randn(x.shape), draw_times("dit", "uniform", len(x), "cpu")).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    cached, encoded = losses
    assert len(cached) == 6 and cached == pytest.approx(encoded, rel=1e-4) and cached[-1] < cached[0]


def test_killed_encoding_ends_with_the_bytes_of_undisturbed_encoding(data, autoencoder, tmp_path, monkeypatch):
    """In chunks of 5 images, so that there is something to resume."""
    code = "import training.data.stored as d, training.latents as l; d.CHUNK = 5; l.main()"
    arguments = ["--data", str(data), "--vae", str(autoencoder), "--image-size", "8", "--batch-size", "2"]
    arguments += ["--workers", "0", "--device", "cpu", "--out"]
    out, note = tmp_path / "killed", tmp_path / "killed" / "train" / "index.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, str(out)], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + PATIENCE
    while not note.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait(PATIENCE) in (-signal.SIGKILL, 0) and note.exists()
    monkeypatch.setattr("training.data.stored.CHUNK", 5)
    for folder in (out, tmp_path / "whole"):
        monkeypatch.setattr(sys, "argv", ["latents", *arguments, str(folder)])
        encode_main()
    for name in ("train/moments.npy", "train/index.json", "val/moments.npy", "val/index.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_encoding_resumes_and_finds_damage(data, tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.stored.CHUNK", 20)
    decoder = FakeDecoder("fake")
    encode_all(data, tmp_path, decoder)
    array, note = tmp_path / "train" / "moments.npy", tmp_path / "train" / "index.json"
    whole, index = array.read_bytes(), json.loads(note.read_text())
    assert len(index["checksums"]) == 3

    note.write_text(json.dumps(index | dict(checksums=index["checksums"][:2])))
    damaged = bytearray(whole)
    damaged[-10:] = bytes(10)
    array.write_bytes(damaged)
    with pytest.raises(DataError, match="unfinished"):
        Latents(tmp_path, "train")
    decoder.calls = 0
    encode_all(data, tmp_path, decoder)
    assert array.read_bytes() == whole and decoder.calls == 2 * 3

    damaged[1000:1010] = bytes(10)
    array.write_bytes(damaged)
    with pytest.raises(DataError, match="images 0 to 19 are damaged"):
        encode_all(data, tmp_path, decoder)
    with pytest.raises(DataError, match="another vae"):
        encode_all(data, tmp_path, FakeDecoder("other"))
    with pytest.raises(DataError, match=r"python -m training\.latents"):
        Latents(tmp_path, "val")


def test_a_latent_generator_trains_from_cached_latents(data, tmp_path, monkeypatch):
    for split in ("train", "val"):
        encode_all(data, tmp_path / "latents", FakeDecoder("fake"), split)
    options = dict(steps=2, batch_size=4, time_sampling="uniform", input_size=4)
    train_here(tmp_path / "latents", tmp_path / "run", recipe="imagenet_vca_sit_s_4", **options, sample_every=0)
    model = vca.load(tmp_path / "run" / "checkpoint")
    assert model.sample_shape == (4, 4, 4) and model.latent_decoder.source == "stabilityai/sd-vae-ft-ema"
    with pytest.raises(DataError, match="the latents have side 4"):
        train_here(tmp_path / "latents", tmp_path / "other", recipe="imagenet_vca_sit_s_4", input_size=8)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DecoderError, match="sd-vae-ft-ema"):
        train_here(tmp_path / "latents", tmp_path / "third", recipe="imagenet_vca_sit_s_4", **options, sample_every=1)
