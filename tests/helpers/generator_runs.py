"""Runs of the generation command."""

import json
import sys

import numpy as np
import torch
from PIL import Image

from training.core import recipe as recipes
from training.core.generator_recipe import GeneratorRecipe
from training.generate import train

CLASSES = ("bird", "cat", "dog")


SHORT = dict(
    steps=14, batch_size=16, warmup_steps=3, input_size=8, save_every=3, val_every=7, sample_every=7, sample_steps=2,
    compile="false", precision="fp32", workers=0, device="cpu",
)  # fmt: skip


LATENT = dict(in_channels=4, vae="none")


def write_images(root, split, per_class, seed, size=8):
    rng = np.random.default_rng(seed)
    for shade, name in enumerate(CLASSES):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 120, (size, size, 3)) + np.array([60 * shade, 0, 120 - 60 * shade])
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")


def command(data, out, recipe="cifar10_sit_vca", **options):
    given = [f"--{key.replace('_', '-')}={value}" for key, value in (SHORT | options).items()]
    return [sys.executable, "-m", "training.generate", recipe, "--data", str(data), "--out", str(out), *given]


def train_here(data, out, recipe="cifar10_sit_vca", init=None, teacher=None, **options):
    """A run inside this process, which is faster to start."""
    overrides = {key: str(value) for key, value in (SHORT | options).items()}
    read = recipes.read(recipe, GeneratorRecipe, overrides)
    return train(read, str(data), str(out), torch.device("cpu"), init, "command", teacher=teacher)


def untimed_log(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]
