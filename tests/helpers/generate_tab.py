"""Small generators for the app, and what they make."""

import numpy as np
import torch

import vca
from app.runtime.sampling import Run, check_request
from tests.helpers.app import LABELS
from vca.diffusion.sampling import to_bytes

SIT, DIT, LATENT = "vca_small_sit", "vca_small_dit", "a_latent_dit"


SETTINGS = dict(label="right", count=3, steps=6, guidance=2.0, seed=11, sampler="euler")


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
