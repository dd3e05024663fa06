"""The keys of an autoencoder's recipe."""

from dataclasses import dataclass
from typing import ClassVar

from training.core.recipe import AUTOENCODER, RunRecipe, check_ranges, key


@dataclass(frozen=True)
class AutoencoderRecipe(RunRecipe):
    """Every key that an autoencoder's recipe may set."""

    labeled: ClassVar[bool] = True
    latent: ClassVar[bool] = False
    checkpointing: ClassVar[bool] = False
    task: ClassVar[str] = "autoencoder"
    passes: ClassVar[float] = 3

    model: str
    steps: int
    batch_size: int
    lr: float
    image_size: int = key(64, "side of the images in pixels")
    channels: list = key([32, 64, 128], "channels at each resolution, each half of the one before: 3 are a factor of 4")
    layers: int = key(1, "residual blocks at each resolution; the decoder has one more")
    groups: int = key(8, "groups of a normalization")
    latent_channels: int = key(4, "channels of the latents")
    min_lr: float = key(0.0, "learning rate at the end of the cosine")
    warmup_steps: int = key(200, "steps of linear warm-up")
    feature_weight: float = key(0.5, "of the distance on the features of --teacher; the L1 distance has 1")
    feature_layers: list = key([2, 5], "layers of the teacher, from 0, that are compared")
    feature_size: int = key(112, "side at which the teacher sees the images, in pixels")
    kl_weight: float = key(1e-4, "of the KL divergence of a latent from a standard normal one")
    eval_images: int = key(500, "validation images on which it is measured")
    eval_every: int = key(1000, "steps between evaluations, with a picture of reconstructions")
    ema_decay: float = key(0.999, "decay of the EMA of the weights; 0 for none")
    ema_warmup: bool = key(True, "let the decay rise with the steps")

    def __post_init__(self):
        self.check_shared()
        check_ranges(
            self,
            positive=("steps", "image_size", "layers", "groups", "latent_channels", "feature_size", "eval_images",
                      "eval_every"),
            not_negative=("min_lr", "warmup_steps", "feature_weight", "kl_weight"),
        )  # fmt: skip
        if self.model != AUTOENCODER:
            raise ValueError(f"model = {self.model!r} must be {AUTOENCODER}, a class of diffusers.")
        if not self.channels or not all(type(c) is int and c > 0 and c % self.groups == 0 for c in self.channels):
            raise ValueError(f"channels = {self.channels} must be numbers that groups = {self.groups} divides.")
        if self.image_size % self.factor:
            raise ValueError(f"image_size = {self.image_size} is not divisible by the factor {self.factor}.")
        if not self.feature_layers or not all(type(layer) is int and layer >= 0 for layer in self.feature_layers):
            raise ValueError(f"feature_layers = {self.feature_layers} must be numbers of layers, from 0.")

    @property
    def factor(self) -> int:
        """Pixels to a latent, in each direction."""
        return 2 ** (len(self.channels) - 1)

    def model_args(self) -> dict:
        """The arguments of diffusers' `AutoencoderKL`."""
        depth = len(self.channels)
        return dict(
            down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
            block_out_channels=tuple(self.channels), layers_per_block=self.layers, norm_num_groups=self.groups,
            latent_channels=self.latent_channels, sample_size=self.image_size, scaling_factor=1.0,
        )  # fmt: skip

    def relative_area(self, side: int) -> float:
        """As that of other recipes: all images have one size."""
        return 1.0
