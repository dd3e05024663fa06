"""Small generators for the app, and what they make."""

import numpy as np
import torch
from diffusers import AutoencoderKL

import vca
from app.runtime.sampling import Run, check_request
from tests.helpers.app import LABELS
from vca.checkpoint import AUTOENCODER_FOLDER
from vca.diffusion.sampling import to_bytes

SIT, DIT, LATENT = "vca_small_sit", "vca_small_dit", "a_latent_dit"


SETTINGS = dict(label="right", count=3, steps=6, guidance=2.0, seed=11, sampler="euler")


def save_generator(folder, architecture: str, labels=LABELS, sampling: dict | None = None, **options) -> None:
    """Saves a small generator with random weights, and what suits it best."""
    model = vca.create_model(architecture, num_classes=len(labels), dim=24, depth=2, num_heads=3, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.sampling = sampling or {}
    vca.save(model, folder, label_names=labels)


def save_latent_generator(folder, **autoencoder) -> None:
    """Saves a small generator of 4x4x3 latents with an autoencoder of its own that makes 8 px images of them."""
    save_generator(folder, "sit_xs_2", input_size=4, in_channels=3, vae=AUTOENCODER_FOLDER)
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, sample_size=8) | autoencoder
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    AutoencoderKL(**blocks, **sizes, scaling_factor=1.0).save_pretrained(folder / AUTOENCODER_FOLDER)


class Calls(list):
    """What every forward pass of a generator was asked, and how many ran then. Each takes `delay` seconds more."""

    delay = 0.03


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


def choose(page, label: str, option: str) -> None:
    page.get_by_role("tabpanel").locator("visible=true").get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()
