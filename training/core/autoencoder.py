"""A small autoencoder of diffusers: how it is built, what it learns, and what is measured of it."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from training.core.autoencoder_recipe import AutoencoderRecipe
from training.core.features import FrozenFeatures, misalignment
from training.core.recipe import RecipeError
from vca.extras import import_extra

EVAL_BATCH = 50


class Reconstruction(nn.Module):
    """An `AutoencoderKL` of a recipe, from images to images.

    Attributes:
        sample_shape, latent_shape: channels, height and width of an image and of its latents.

    Raises:
        RecipeError: diffusers is not installed.
    """

    task = "autoencoder"

    def __init__(self, recipe: AutoencoderRecipe):
        super().__init__()
        try:
            diffusers = import_extra("diffusers", "latents")
        except ImportError as error:
            raise RecipeError(str(error)) from None
        torch.manual_seed(recipe.seed)
        self.autoencoder = diffusers.AutoencoderKL(**recipe.model_args())
        self.sample_shape = (3, recipe.image_size, recipe.image_size)
        self.latent_shape = (recipe.latent_channels, *(side // recipe.factor for side in self.sample_shape[1:]))

    def forward(self, images: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions (B, 3, H, W) of images in [-1, 1] from latents drawn with `normal`, and their divergence.

        Args:
            images: (B, 3, H, W).
            normal: standard normal draws of the latents' shape (B, C, H / factor, W / factor); zeros for their means.

        Returns:
            The images, and the mean over the latents' elements of their KL divergence from a standard normal, (B,).
        """
        posterior = self.autoencoder.encode(images).latent_dist
        decoded = self.autoencoder.decode(posterior.mean + posterior.std * normal).sample
        return decoded, posterior.kl() / normal[0].numel()


def losses(model: Reconstruction, features: FrozenFeatures, images: Tensor, normal: Tensor) -> dict[str, Tensor]:
    """What is learned of images (B, 3, H, W) in [-1, 1], each a scalar: `l1`, `features` and `kl`."""
    decoded, divergence = model(images, normal)
    with torch.no_grad():
        seen = features(images)
    distance = _distances(features(decoded), seen).mean()
    return dict(l1=(decoded.float() - images).abs().mean(), features=distance, kl=divergence.float().mean())


def _distances(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """`misalignment` of two lists of features, by layer and image, (layers, B)."""
    return torch.stack([misalignment(one, other) for one, other in zip(ours, theirs, strict=True)])


@torch.inference_mode()
def measure(model: Reconstruction, features: FrozenFeatures, images: Tensor) -> dict:
    """Of reconstructions from mean latents, in float32: L1 distance on pixels in [-1, 1], mean PSNR in dB over the
    images, clipped and on pixels in [0, 1], and the distance of features.

    Args:
        images: (N, 3, H, W) in [-1, 1].
    """
    model.eval()
    device = next(model.parameters()).device
    sums = dict(l1=0.0, psnr=0.0, features=0.0)
    for x in images.split(EVAL_BATCH):
        x = x.to(device)
        decoded = reconstruct(model, x)
        sums["l1"] += (decoded - x).abs().mean((1, 2, 3)).sum().item()
        sums["psnr"] += -10 * ((decoded.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)).log10().sum().item()
        sums["features"] += _distances(features(decoded), features(x)).mean(0).sum().item()
    return {name: round(total / len(images), 5) for name, total in sums.items()} | dict(images=len(images))


@torch.inference_mode()
def reconstruct(model: Reconstruction, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] by way of their mean latents."""
    posterior = model.autoencoder.encode(images).latent_dist
    return model.autoencoder.decode(posterior.mode()).sample


@torch.inference_mode()
def set_scaling(model: Reconstruction, batches: Iterator[Tensor]) -> None:
    """Notes mean and deviation of every latent channel in the config, from images in [-1, 1], for generators."""
    model.eval()
    device = next(model.parameters()).device
    count, total, squares = 0, 0.0, 0.0
    for x in batches:
        posterior = model.autoencoder.encode(x.to(device)).latent_dist
        mean, variance = posterior.mean.double(), posterior.var.double()
        total, squares = total + mean.sum((0, 2, 3)), squares + (mean.square() + variance).sum((0, 2, 3))
        count += mean.numel() // mean.shape[1]
    mean = [value / count for value in total.tolist()]
    std = [math.sqrt(value / count - m * m) for value, m in zip(squares.tolist(), mean, strict=True)]
    model.autoencoder.register_to_config(latents_mean=mean, latents_std=std)


def save(model: Reconstruction, folder: Path, dtype: torch.dtype) -> None:
    """Writes the folder from which diffusers' `from_pretrained` loads the autoencoder. The model is cast to `dtype`."""
    model.to(dtype).autoencoder.save_pretrained(folder, safe_serialization=True)
