"""Autoencoders at toy size: one that stands for another; a recipe, its teacher, and the command that trains it."""

import sys

import torch

import vca
from vca.diffusion.vae import SD_SCALING, LatentDecoder

VAE_SCALE = 2
RECIPE = """
model = "AutoencoderKL"
image_size = 16
channels = [8, 8]
groups = 4
latent_channels = 3
steps = 12
batch_size = 8
lr = 3e-3
warmup_steps = 2
feature_layers = [0, 2]
feature_size = 32
eval_images = 10
eval_every = 6
log_every = 1
save_every = 3
precision = "fp32"
workers = 0
"""


class FakeDecoder(LatentDecoder):
    """Stands for an autoencoder: means are pooled pixels, log-variances a constant."""

    calls = 0
    scaling = SD_SCALING

    def moments(self, images):
        self.calls += 1
        pooled = torch.nn.functional.avg_pool2d(images, VAE_SCALE)
        mean = torch.cat([pooled, pooled[:, :1]], dim=1)
        return torch.cat([mean, torch.full_like(mean, -3)], dim=1)


def toy_recipe(folder):
    file = folder / "toy.toml"
    file.write_text(RECIPE)
    return file


def toy_teacher(folder):
    """A checkpoint of a classifier with self-attention and random weights."""
    torch.manual_seed(0)
    model = vca.create_model("mhsa_vit_pico_patch4_32", num_classes=3)
    vca.save(model, folder, label_names=["bird", "cat", "dog"])
    return folder


def command(place, out, *more):
    """The command that trains the toy in `place` on the images there."""
    return [sys.executable, "-m", "training.autoencoder", str(place / "toy.toml"), "--data", str(place / "data"),
            "--teacher", str(place / "teacher"), "--out", str(out), "--device", "cpu", *more]  # fmt: skip
