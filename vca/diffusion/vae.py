"""From images to the latents of Stable Diffusion's autoencoder and back, through diffusers (optional)."""

from typing import Any

import torch
from torch import Tensor

from vca.extras import import_extra

SD_VAE = "stabilityai/sd-vae-ft-ema"
SCALE = 0.18215
STRIDE = 8  # pixels to a latent, in each direction


class DecoderError(RuntimeError):
    """The autoencoder cannot be loaded; the message says what is missing, how large it is and how to get it."""


class LatentDecoder:
    """An AutoencoderKL, loaded when it is first used. It is no part of a generator's weights.

    Args:
        source: Hub id, or a folder with `config.json` and `diffusion_pytorch_model.safetensors`.
    """

    def __init__(self, source: str = SD_VAE):
        self.source = source
        self._autoencoder: Any = None

    def load(self, device: torch.device):
        """The autoencoder, diffusers' `AutoencoderKL` in float32 and evaluation mode, on `device`.

        Raises:
            DecoderError: diffusers or the weights are missing.
        """
        if self._autoencoder is None:
            try:
                diffusers = import_extra("diffusers", "latents")
            except ImportError as error:
                raise DecoderError(
                    "this model makes latents; showing them takes the package diffusers (pip install diffusers; it is "
                    f"of the extra [latents] of vca) and the autoencoder {self.source} (335 MB for Stable Diffusion's)."
                ) from error
            try:
                self._autoencoder = diffusers.AutoencoderKL.from_pretrained(self.source, use_safetensors=True)
            except (OSError, ValueError) as error:
                raise DecoderError(
                    f"cannot load the autoencoder {self.source} (335 MB for Stable Diffusion's): it is no folder, "
                    "not in the Hub's cache, and could not be downloaded. Fetch it where there is a network with "
                    f"`hf download {self.source}`, or give a folder as vae=. ({error})"
                ) from error
            self._autoencoder.requires_grad_(False).eval()
        return self._autoencoder.to(device)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images (B, 3, 8H, 8W) in [-1, 1] -> mean and log-variance of their latents, unscaled, (B, 8, H, W)."""
        return self.load(images.device).encode(images).latent_dist.parameters

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, H, W) -> images (B, 3, 8H, 8W), about [-1, 1]."""
        return self.load(latents.device).decode(latents / SCALE).sample


def sample_latents(moments: Tensor, normal: Tensor) -> Tensor:
    """Scaled latents (B, 4, H, W) from moments (B, 8, H, W) and standard normal draws (B, 4, H, W)."""
    mean, log_variance = moments.chunk(2, dim=1)
    return SCALE * (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * normal)
