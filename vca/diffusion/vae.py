"""From images to the latents of an autoencoder and back, through diffusers (optional)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vca.extras import import_extra

SD_VAE = "stabilityai/sd-vae-ft-ema"
SCALE = 0.18215
STRIDE = 8  # pixels to a latent of Stable Diffusion's autoencoder, in each direction
MEGABYTES = 335  # of Stable Diffusion's autoencoder
SMALL = 10_000_000  # parameters; Stable Diffusion's has 84 million


class DecoderError(RuntimeError):
    """The autoencoder cannot be loaded; the message says what is missing, how large it is and how to get it."""


class Scaling(NamedTuple):
    """How a generator sees the latents z of an autoencoder: (z - mean) * factor.

    Attributes:
        mean, factor: one number for each channel, or one for all.
    """

    mean: list[float]
    factor: list[float]

    def apply(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as the autoencoder has them -> as a generator sees them."""
        return (latents - _by_channel(self.mean, latents)) * _by_channel(self.factor, latents)

    def undo(self, latents: Tensor) -> Tensor:
        """The inverse of `apply`."""
        return latents / _by_channel(self.factor, latents) + _by_channel(self.mean, latents)


SD_SCALING = Scaling([0.0], [SCALE])


def scaling_of(config: Any) -> Scaling:
    """What the config of an autoencoder of diffusers says: `scaling_factor`, and `latents_mean` and `latents_std` or
    `shift_factor` where it has them."""
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
    std = config.get("latents_std") or [1.0]
    return Scaling(list(mean), [config["scaling_factor"] / deviation for deviation in std])


def stride_of(config: Any) -> int:
    """Pixels to a latent of an autoencoder of diffusers with this config, in each direction."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def described(source: str) -> str:
    """The name of an autoencoder, and its size where that is known."""
    return f"{source} ({MEGABYTES} MB)" if source == SD_VAE else source


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
        return self._open().to(device)

    def _open(self) -> Any:
        if self._autoencoder is None:
            try:
                diffusers = import_extra("diffusers", "latents")
            except ImportError as error:
                raise DecoderError(
                    "this model makes latents; showing them takes the package diffusers (pip install diffusers; it is "
                    f"of the extra [latents] of vca) and the autoencoder {described(self.source)}."
                ) from error
            try:
                self._autoencoder = diffusers.AutoencoderKL.from_pretrained(
                    self.source, use_safetensors=True, low_cpu_mem_usage=False
                )  # which would take the package accelerate, and says so at every load
            except (OSError, ValueError) as error:
                raise DecoderError(
                    f"cannot load the autoencoder {described(self.source)}: it is no folder, "
                    "not in the Hub's cache, and could not be downloaded. Fetch it where there is a network with "
                    f"`hf download {self.source}`, or give a folder as vae=. ({error})"
                ) from error
            self._autoencoder.requires_grad_(False).eval()
        return self._autoencoder

    @property
    def is_small(self) -> bool:
        """Whether decoding takes no longer than a few steps of a small generator; loads the autoencoder, as all do."""
        return sum(parameter.numel() for parameter in self._open().parameters()) < SMALL

    @property
    def stride(self) -> int:
        """Pixels to a latent, in each direction."""
        return stride_of(self._open().config)

    @property
    def scaling(self) -> Scaling:
        """How a generator sees its latents."""
        return scaling_of(self._open().config)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images (B, 3, sH, sW) in [-1, 1], s = stride -> mean and log-variance of their latents, (B, 2C, H, W)."""
        return self.load(images.device).encode(images).latent_dist.parameters

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as a generator sees them (B, C, H, W) -> images (B, 3, sH, sW), about [-1, 1]."""
        autoencoder = self.load(latents.device)
        return autoencoder.decode(scaling_of(autoencoder.config).undo(latents)).sample


def sample_latents(moments: Tensor, normal: Tensor, scaling: Scaling = SD_SCALING) -> Tensor:
    """Latents (B, C, H, W) as a generator sees them, from moments (B, 2C, H, W) and normal draws (B, C, H, W)."""
    mean, log_variance = moments.chunk(2, dim=1)
    return scaling.apply(mean + (0.5 * log_variance.clamp(-30, 20)).exp() * normal)


def _by_channel(values: list[float], latents: Tensor) -> Tensor:
    return torch.tensor(values, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1)
